"""Which parts of the weights a server's rank keeps, as its own loader tells; with models of a few lines."""

import pytest
import torch

from megatron_fp16rl.models.parts import messages, whole
from megatron_fp16rl.rollout.weight_sync.base import SyncFailed
from megatron_fp16rl.rollout.weight_sync.loader import wanted

SHAPES = {"a": (4, 6), "b": (2, 6), "norm": (6,)}


def fp16(name):
    return torch.float16


class Loads(torch.nn.Module):
    """A model with one parameter, that loads as `how` says: into its data, from tensors by name."""

    def __init__(self, how, *shape):
        super().__init__()
        self.how, self.weight = how, torch.nn.Parameter(torch.full(shape, -1.0).half())

    def load_weights(self, weights):
        self.how(self.weight.data, dict(weights))


def fused(tensors):
    return torch.cat([tensors["a"], tensors["b"]])


PADDED = (lambda to, of: (to[4:].fill_(0), to[:4].copy_(of["a"])), (6, 6))
FOLLOWED = {
    "fused": (lambda to, of: to[1:7].copy_(fused(of)), (8, 6)),
    "half of the rows": (lambda to, of: to.narrow(0, 1, 2).copy_(of["a"].chunk(2)[1]), (4, 6)),
    "transposed": (lambda to, of: to.t()[:3].copy_(of["a"].narrow(1, 2, 3).t()[:3]), (4, 6)),
    "half of two fused": (lambda to, of: to[:3].copy_(fused(of).narrow(0, 2, 3)), (3, 6)),
    "padded": PADDED,
    "twice": (lambda to, of: (to[:4].copy_(of["a"]), to[4:].copy_(of["a"][1:3])), (6, 6)),
}


@pytest.mark.parametrize(("how", "shape"), FOLLOWED.values(), ids=FOLLOWED)
def test_parts_put_in_place_are_what_the_loader_would_have_loaded(how, shape):
    tensors = {name: torch.randn(size).half() for name, size in SHAPES.items()}
    model, expected = Loads(how, *shape), Loads(how, *shape)
    expected.load_weights(tensors.items())
    before = model.weight.clone()
    wants, computed = wanted(model, SHAPES, fp16)
    assert torch.equal(model.weight, before)  # looking changes nothing
    assert computed == {}
    if how is PADDED[0]:
        model.weight.data[4:] = 0  # is so since the model was built
    offers = [whole(name, size) for name, size in SHAPES.items()]
    for message in messages(offers, wants, 40, fp16, 1 << 30):
        for source, _, target in message.parts:
            target.view(model.weight.data).copy_(source.view(tensors[source.key]))
    assert torch.equal(model.weight, expected.weight)


def test_what_a_loader_computes_with_stretches_or_flattens_is_wanted_whole():
    def computes(weight, tensors):
        weight[:4].copy_(tensors["a"] * 2)
        weight[4:].copy_(tensors["b"])
        weight[0].copy_(tensors["norm"])

    def odd(weight, tensors):
        weight.copy_(tensors["norm"])  # a row to all rows
        weight.view(-1)[:12].copy_(tensors["b"].reshape(-1))

    wants, computed = wanted(Loads(computes, 6, 6), SHAPES, fp16)
    assert computed == {"a": (4, 6)}
    assert whole("a", (4, 6)) in wants
    assert {want.name: want.key for want in wants} == {"a": "a", "b": "weight", "norm": "weight"}
    _, computed = wanted(Loads(odd, 6, 6), SHAPES, fp16)
    assert set(computed) == {"norm", "b"}


def test_what_is_kept_beside_a_parameter_is_made_anew_by_the_loader():
    class Keeps(Loads):
        def __init__(self):
            super().__init__(None, 4, 6)
            self.register_buffer("more", torch.full((6,), 0.5).half())
            self.norm = torch.nn.Parameter(self.more - 1)

        def load_weights(self, weights):
            tensors = dict(weights)
            self.weight.data.copy_(tensors["a"])
            self.norm.data.copy_(tensors["norm"])
            self.more.copy_(self.norm.data).add_(1)

    model = Keeps()
    _, computed = wanted(model, SHAPES, fp16)
    assert computed == {"norm": (6,)}
    assert model.more.eq(0.5).all()


def test_a_loader_that_cannot_be_followed_is_refused_and_leaves_its_model_as_it_was():
    class Replaces(Loads):
        def load_weights(self, weights):
            self.weight.data = torch.zeros(4, 6).half()

    def reads(weight, tensors):
        weight.copy_(tensors["a"])
        tensors["norm"].sum().item()

    for model, why in ((Replaces(None, 4, 6), "it replaces weight"), (Loads(reads, 4, 6), "meta")):
        with pytest.raises(SyncFailed, match=rf" cannot be followed: .*{why}.*distributed"):
            wanted(model, SHAPES, fp16)
        assert not model.weight.is_meta
        assert model.weight.eq(-1).all()
