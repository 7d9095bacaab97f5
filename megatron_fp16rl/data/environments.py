"""Environments of the user's own: classes whose instances play one sample each, in worker processes.

    class Env:
        def reset(self, problem: str, answer: str) -> None: ...
        def step(self, turn: str) -> str | None: ...  # what the model reads next; None: the end
        def reward(self) -> float: ...

`step` may return a pair, of that and a reward of the turn; a sample earns the sum, and what `reward` returns
at the end, if there is such a method. `expert(self) -> str`, a good next turn, is for warm_start alone.

A question names all turns of the sample so far. A worker that does not have the sample, because another one
was killed or the run was resumed, plays them again: an environment must answer the same turns equally. No
torch here: workers import this module.
"""

import inspect
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_fp16rl.data.rewards import Grade, RewardError, as_reward
from megatron_fp16rl.utils.user_code import check_takes, load_function

if TYPE_CHECKING:
    from megatron_fp16rl.data.rewards.workers import Worker
    from megatron_fp16rl.recipe import EnvironmentTask

_MOST_PLAYED = 4096  # samples that a worker remembers; those asked about last


@dataclass
class Transcript:
    """What was said in a sample: turns of the model, and what the environment said after each but the last."""

    problem: str
    answer: str
    turns: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    name: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Reply:
    """What the environment says next; or, at the end, how the sample is graded."""

    text: str = ""
    grade: Grade | None = None


class Environments:
    """The worker processes of a task. They start when they are first needed."""

    def __init__(self, settings: "EnvironmentTask") -> None:
        self.settings = settings
        # A thread for each: the kernel kills a child when the thread that made it ends. A sample stays with its
        # worker.
        self._threads = [
            ThreadPoolExecutor(1, "environment") for _ in range(max(1, settings.workers))
        ]
        self._workers: list[Worker | None] = [None] * settings.workers
        # What each worker has, as `play` keeps it: samples, and the turns of each that it has played.
        self._held: list[dict[str, int]] = [{} for _ in self._workers]

    def step(self, transcript: Transcript) -> "Future[Reply]":
        """Plays the last turn of a transcript. A turn that fails, or takes too long, ends the sample."""
        is_last = len(transcript.turns) >= self.settings.max_turns
        said = list(transcript.said)
        name, turns = transcript.name, list(transcript.turns)
        question = ("step", name, transcript.problem, transcript.answer, turns, said, is_last)
        return self._ask(name, question, len(turns), _reply)

    def expert(self, problem: str, answer: str) -> "Future[Transcript]":
        """The sample that the environment's own `expert` plays. Raises RewardError where it fails."""

        def read(value: Any) -> Transcript:
            return Transcript(problem, answer, *value)

        most = self.settings.max_turns
        return self._ask(f"{problem}\0{answer}", ("expert", problem, answer, most), most, read)

    @staticmethod
    def check(settings: "EnvironmentTask") -> None:
        """Raises RecipeError unless the file has such a class; it is imported in a worker."""
        from megatron_fp16rl.recipe import RecipeError

        one = Environments(settings.model_copy(update={"workers": 1}))
        try:
            one._threads[0].submit(one._worker, 0).result()
        except RewardError as error:
            raise RecipeError(f"task.path={settings.path}: {error}") from None
        finally:
            one.close()

    def close(self) -> None:
        """Ends the workers."""
        for threads in self._threads:
            threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            if worker is not None:
                worker.kill()

    def _ask(
        self, name: str, question: Sequence[Any], turns: int, read: Callable[[Any], Any]
    ) -> "Future[Any]":
        """turns: of the sample, this one included; a worker that lacks the others plays them, too."""
        from megatron_fp16rl.data.rewards.workers import WorkerError

        number, timeout_s = zlib.crc32(name.encode()) % len(self._workers), self.settings.timeout_s

        def ask() -> Any:
            failed = Grade(0.0, timed_out=True)
            worker, held = self._worker(number), self._held[number]
            # Turns that are played again have their time, too: else one lost worker would cost many samples.
            is_held = held.pop(name, None) == turns - 1
            limit_s = timeout_s if is_held else timeout_s * turns
            try:
                reply = read(worker.ask(question, limit_s))
                if read is _reply and reply.grade is None:
                    held[name] = turns
                    if len(held) > _MOST_PLAYED:
                        del held[next(iter(held))]
                return reply
            except TimeoutError:
                reason = f"it took over {limit_s:g} s (task.timeout_s a turn)"
            except (WorkerError, ValueError) as error:
                reason = str(error)
                failed = Grade(0.0, error=reason)
            if read is _reply:
                return Reply(grade=failed)
            raise RewardError(f"task.path={self.settings.path}: {question[0]}: {reason}")

        return self._threads[number].submit(ask)

    def _worker(self, number: int) -> "Worker":
        """Number `number`, alive. Called in its thread."""
        from megatron_fp16rl.data.rewards.workers import Worker

        worker, settings = self._workers[number], self.settings
        if worker is not None and not worker.is_idle:
            worker.kill()
            worker = None
        if worker is None:
            name, arguments = "worker of an environment", (settings.path,)
            worker = Worker(name, settings.memory_gib, play, arguments)
            self._workers[number] = worker
            self._held[number].clear()
        return worker


def _reply(value: Any) -> Reply:
    if value["text"] is None:
        return Reply(grade=Grade(as_reward(value["reward"])))
    return Reply(value["text"])


# In a worker.


@dataclass
class _Played:
    """A sample of an environment: the turns that it has played, and what these earned."""

    environment: Any
    turns: int = 0
    earned: float = 0.0

    def step(self, turn: str) -> str | None:
        """Raises ValueError if the environment returns neither text, None, nor a pair with a reward."""
        said = self.environment.step(turn)
        if isinstance(said, tuple) and len(said) == 2:
            said, reward = said
            self.earned += as_reward(reward)
        if said is not None and not isinstance(said, str):
            raise ValueError(
                f"step must return text, None at the end, or a pair of that and a reward, not {said!r:.100}"
            )
        self.turns += 1
        return said

    def reward(self) -> float:
        at_end = getattr(self.environment, "reward", None)
        return as_reward(self.earned + (as_reward(at_end()) if at_end else 0.0))


def play(path: str) -> Callable[..., Any]:
    """What a worker answers. path: file:class. Raises ValueError if there is no such class."""
    make = load_function(path)
    missing = [name for name in ("reset", "step") if not callable(getattr(make, name, None))]
    if missing:
        raise ValueError(f"{path} has no method {' and no '.join(missing)}")
    check_takes(make)
    for method, arguments in (("reset", ("problem", "answer")), ("step", ("turn",))):
        plain = inspect.getattr_static(make, method)
        if inspect.isfunction(plain):
            check_takes(plain, "self", *arguments)
    known: OrderedDict[str, _Played] = OrderedDict()

    def begin(problem: str, answer: str) -> _Played:
        environment = make()
        environment.reset(problem, answer)
        return _Played(environment)

    def step(
        name: str, problem: str, answer: str, turns: list[str], said: list[str], is_last: bool
    ) -> dict[str, Any]:
        played = known.pop(name, None)
        if played is None or played.turns != len(said):
            played = begin(problem, answer)
            for turn, before in zip(turns, said, strict=False):
                if (again := played.step(turn)) != before:
                    raise ValueError(
                        f"played again, it answers turn {turn!r:.100} with {again!r:.100} in place of "
                        f"{before!r:.100}: an environment must answer the same turns equally"
                    )
        text = played.step(turns[-1])
        if text is None or is_last:
            return {"text": None, "reward": played.reward()}
        known[name] = played
        if len(known) > _MOST_PLAYED:
            known.popitem(last=False)
        return {"text": text}

    def expert(problem: str, answer: str, max_turns: int) -> tuple[list[str], list[str]]:
        played, turns, said = begin(problem, answer), list[str](), list[str]()
        while len(turns) < max_turns:
            turns.append(played.environment.expert())
            text = played.step(turns[-1])
            if text is None or len(turns) == max_turns:
                break
            said.append(text)
        return turns, said

    questions: dict[str, Callable[..., Any]] = {"step": step, "expert": expert}
    return lambda question, *values: questions[question](*values)
