"""Which numbers go from whom to whom in a weight sync, with no process and no network."""

import itertools
import math
import random

import pytest
import torch

from megatron_fp16rl.models.layouts import (
    Cut,
    GatedRows,
    QueryKeyValue,
    Replicated,
    Shapes,
    Vocabulary,
    runs,
)
from megatron_fp16rl.models.parts import (
    Course,
    Part,
    contiguous,
    messages,
    rounds,
    uncovered,
    whole,
)
from megatron_fp16rl.tools.plan.live_bytes import LiveBytes

CPU = torch.device("cpu")
SHAPES = Shapes(heads=8, groups=4, head_dim=6, vocabulary=37, padded_vocabulary=40)
CASES = {  # a layout, and the shapes of the Hugging Face tensors of a parameter
    "rows": (Cut(0), [(24, 10)]),
    "columns": (Cut(1), [(10, 24)]),
    "norm": (Replicated(), [(10,)]),
    "vocabulary": (Vocabulary(), [(37, 10)]),
    "gated": (GatedRows(), [(24, 10), (24, 10)]),
    "qkv": (QueryKeyValue(), [(48, 10), (24, 10), (24, 10)]),
    "qkv bias": (QueryKeyValue(), [(48,), (24,), (24,)]),
}


def fp16(name):
    return torch.float16


def numbered(shapes, start=0):
    """Full tensors in which every number is another one."""
    tensors = []
    for shape in shapes:
        tensors.append(
            torch.arange(start, start + math.prod(shape), dtype=torch.float32).view(shape)
        )
        start += math.prod(shape)
    return tensors


def offers(case, ranks):
    """The shards of all ranks, and what each offers."""
    layout, shapes = CASES[case]
    shards = layout.split(numbered(shapes), ranks, SHAPES)
    shape, dim = shards[0].shape, layout.dim
    found = [[] for _ in shards]
    for i, of_tensor in enumerate(runs(layout, shape[dim], len(shape), ranks, SHAPES)):
        for run in of_tensor:
            start = tuple(run.at if d == dim else 0 for d in range(len(shape)))
            box = tuple(run.length if d == dim else size for d, size in enumerate(shape))
            strides = contiguous(tuple(shape))
            offset = run.start * strides[dim]
            found[run.rank].append(Part(f"t{i}", start, box, "shard", offset, strides))
    return [shard.contiguous() for shard in shards], found


def send(shards, offered, wants, holder, limit, alone):
    """What `holder` has after all messages of all ranks; and the number of messages."""
    count = 0
    for shard, of_rank in zip(shards, offered, strict=True):
        sent = messages(of_rank, wants, limit, fp16, alone)
        here, there = Course(sent, 0, fp16, CPU), Course(sent, 2, fp16, CPU)
        for _ in range(2):  # the second time from views that are known
            here.prepare("here")
            there.prepare("there")
            for turn, message in enumerate(sent):
                assert message.nbytes <= limit
                place = there.place(turn, {"holder": holder}.__getitem__)
                place.copy_(here.pack(turn, {"shard": shard}.__getitem__))  # the broadcast
                there.unpack(turn, {"holder": holder}.__getitem__)
        count += len(sent)
    return count


@pytest.mark.parametrize(("alone", "dtype"), [(40, torch.half), (1 << 30, torch.float)])
@pytest.mark.parametrize("limit", [64, 400, 1 << 20])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_every_number_arrives_where_it_is_wanted(case, ranks, limit, alone, dtype):
    """Whole tensors, and random boxes of them; in one holder, transposed as well."""
    shards, offered = offers(case, ranks)
    shards = [shard.to(dtype) for shard in shards]
    everything = [part for of_rank in offered for part in of_rank]
    chance = random.Random(f"{case} {ranks}")
    for i, tensor in enumerate(numbered(CASES[case][1])):
        low = tuple(chance.randrange(size) for size in tensor.shape)
        some = tuple(chance.randint(1, n - at) for n, at in zip(tensor.shape, low, strict=True))
        for start, shape in (((0,) * tensor.dim(), tuple(tensor.shape)), (low, some)):
            expected = tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
            for transposed in (False, True):
                holder = torch.full((5 + expected.numel(),), -1.0, dtype=dtype)
                strides = contiguous(shape[::-1])[::-1] if transposed else contiguous(shape)
                want = Part(f"t{i}", start, shape, "holder", 5, strides)
                assert uncovered(everything, [want]) == []
                assert send(shards, offered, [want], holder, limit, alone) >= 1
                assert torch.equal(want.view(holder), expected.to(dtype))
                assert holder[:5].eq(-1).all()  # and nowhere else


def test_a_number_offered_twice_or_not_at_all_is_found():
    _, (first, second) = offers("rows", 2)
    want = whole("t0", (24, 10))
    assert uncovered(first + second, [want]) == []
    assert uncovered(first, [want]) == ["t0"]
    assert uncovered(first + first + second, [want]) == ["t0"]
    assert uncovered(first + first, [want]) == ["t0"]  # as many numbers as are wanted
    assert uncovered(first + second, [whole("another", (2,))]) == ["another"]


def test_dtypes_may_change_within_a_message():
    def dtype(name):
        return torch.float32 if name == "bias" else torch.float16

    parts = [whole("a", (3,)), whole("bias", (5,)), whole("b", (7,))]
    (message,) = messages(parts, parts, 1 << 10, dtype, 1 << 10)
    sources = {name: torch.arange(n).float() / 3 for name, n in (("a", 3), ("bias", 5), ("b", 7))}
    targets = {name: torch.zeros(len(tensor)) for name, tensor in sources.items()}
    here, there = Course([message], 0, dtype, CPU), Course([message], 2, dtype, CPU)
    flat = here.pack(0, sources.__getitem__)
    assert flat.nbytes == message.nbytes == 3 * 16 + 14  # 6, 20 and 14, each at a multiple of 16
    there.place(0, targets.__getitem__).copy_(flat)
    there.unpack(0, targets.__getitem__)
    for name, sent in sources.items():
        assert torch.equal(targets[name], sent.to(dtype(name)).float())


def test_tensors_that_move_are_looked_up_again():
    part = whole("t0", (4, 5))
    sent = messages([part], [part], 1 << 10, fp16, 1 << 10)
    course, tensors = Course(sent, 0, fp16, CPU), [torch.full((4, 5), float(i)) for i in range(4)]
    for i, memory in ((0, None), (1, None), (2, "here"), (3, "there")):
        course.prepare(memory)
        assert course.pack(0, lambda _, i=i: tensors[i]).view(torch.half).eq(i).all()


@pytest.mark.parametrize(("senders", "receivers"), [(1, 1), (1, 4), (3, 2), (2, 5), (4, 4)])
def test_rounds_end_for_any_numbers_of_messages_and_keep_all_at_work(senders, receivers):
    """Each rank waits for its next peer to come to the same message, as with a blocking send."""
    chance, ways = random.Random(senders * 10 + receivers), max(senders, receivers)
    counts = [[chance.randint(0, 3) for _ in range(receivers)] for _ in range(senders)]
    sending = [rounds(row, me, ways) for me, row in enumerate(counts)]
    receiving = [rounds(column, me, ways) for me, column in enumerate(zip(*counts, strict=True))]
    assert sum(map(len, sending)) == sum(map(sum, counts))
    turns = 0
    while any(sending):
        met = [
            (me, peer)
            for me, mine in enumerate(sending)
            if mine
            for peer, number in mine[:1]
            if receiving[peer][:1] == [(me, number)]
        ]
        assert met, "everybody waits"
        for me, peer in met:
            del sending[me][0], receiving[peer][0]
        turns += 1
    assert not any(receiving)
    equal = [rounds([1] * receivers, me, ways) for me in range(senders)]
    for turn in itertools.islice(zip(*equal, strict=True), receivers):
        if receivers >= senders:
            assert len({peer for peer, _ in turn}) == senders  # nobody waits for another's peer
    if senders * receivers > 1 and all(map(all, counts)):
        assert turns < sum(map(sum, counts))


def test_two_messages_of_memory_are_all_that_an_end_takes():
    limit = 4_000
    parts = [whole(f"t{i}", (30, 20)) for i in range(40)]
    tensors = {part.key: torch.ones(30, 20).half() for part in parts}
    sent = messages(parts, parts, limit, fp16, 1 << 30)
    assert len(sent) > 10
    with LiveBytes("cpu") as live:
        for end in (0, 2):
            course = Course(sent, end, fp16, CPU)
            course.prepare("here")
            for turn in range(len(course)):
                if end == 0:
                    course.pack(turn, tensors.__getitem__)
                else:
                    course.place(turn, tensors.__getitem__)
                    course.unpack(turn, tensors.__getitem__)
            del course
    assert limit < live.peak <= 2 * (limit + 16)
