"""Trackers: where a run's metrics go beside metrics.jsonl, which alone is complete.

Each works in a thread of its own, behind a queue: a network that is slow or gone holds up no step. One that
fails is named once, and gets no more; metrics.jsonl has everything.
"""

import contextlib
import importlib
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_fp16rl.metrics.log import METRICS, Row
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.utils.files import read_json, write_json

_CLOSE_TIMEOUT_S = 20  # all trackers together, at the end of a run
_NETWORK_TIMEOUT_S = 5
_PROJECT = "fp16rl"  # of W&B; experiment, of MLflow: unless the environment names another
FOLDER = "trackers"  # in the run directory: ids, and what is not sent anywhere

Say = Callable[[str], None]


class Tracker(Protocol):
    """What a tracker does. The constructor opens the run there, or goes on with it.

    module      what it imports
    where       where its metrics can be seen
    last_step   the last step that it has: -1 if none
    """

    module: str
    where: str
    last_step: int

    def __init__(self, recipe: Recipe, folder: Path, resumed_at: int | None) -> None: ...

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in the run directory, of which TensorBoard forgets the steps that are made again."""

    module = "torch.utils.tensorboard"

    def __init__(self, recipe: Recipe, folder: Path, resumed_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.where = str(folder / "tensorboard")
        self.last_step = -1 if resumed_at is None else resumed_at - 1
        self._writer = SummaryWriter(self.where, purge_step=resumed_at)

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Ledger:
    """A tracker's id of the run and the last step it got: trackers/NAME.json."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = folder / FOLDER / f"{name}.json"
        known = read_json(self._file) if self._file.exists() else {}
        self.id: str | None = known.get("id")
        self.step: int = known.get("step", -1)

    def write(self, run_id: str, step: int) -> None:
        self.id, self.step = run_id, step
        write_json(self._file, {"id": run_id, "step": step})


class WandB:
    """Weights & Biases: online if a key is known and the server answers, else files for `wandb sync`.

    WANDB_MODE, WANDB_PROJECT and all its other variables are obeyed. A rank that is killed loses what W&B's
    own process has not written yet: the steps of the last second.
    """

    module = "wandb"

    def __init__(self, recipe: Recipe, folder: Path, resumed_at: int | None) -> None:
        import wandb

        self._ledger = _Ledger(folder, "wandb")
        run_id = self._ledger.id or uuid.uuid4().hex[:8]
        self._ledger.write(run_id, self._ledger.step)
        self.last_step = self._ledger.step
        (folder / FOLDER).mkdir(exist_ok=True)
        settings = wandb.Settings(
            silent=True,
            console="off",  # rank 0's output has its log
            disable_git=True,
            save_code=False,
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=1.0,  # s; default: 15
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run_id,
            name=folder.name,
            resume="allow",
            dir=folder / FOLDER,
            config=recipe.shown(),
            mode=None if "WANDB_MODE" in os.environ else self._mode(),
            settings=settings,
        )
        self.where = (
            f"offline; to send it: wandb sync {folder / FOLDER / 'wandb'}/*-{run_id}"
            if self._run.offline
            else str(self._run.url)
        )

    @staticmethod
    def _mode() -> Any:
        import httpx
        import requests
        import wandb

        url = wandb.setup().settings.base_url
        key = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
        if not (key or requests.utils.get_netrc_auth(url)):
            return "offline"
        try:
            httpx.get(url, timeout=_NETWORK_TIMEOUT_S)  # any answer will do
        except httpx.HTTPError:
            return "offline"
        return "online"

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step, commit=True)
        self._ledger.write(self._run.id, step)

    def close(self, failed: bool) -> None:
        import wandb

        self._run.finish(exit_code=int(failed))
        wandb.teardown(
            int(failed)
        )  # until W&B's own process (0.31) has written its file and is gone


class MLflow:
    """MLflow: the server of MLFLOW_TRACKING_URI, or files in the run directory; MLFLOW_EXPERIMENT_NAME."""

    module = "mlflow"

    def __init__(self, recipe: Recipe, folder: Path, resumed_at: int | None) -> None:
        # MLflow 3.17 refuses its files in favour of SQLite, whose locks a parallel file system may not have.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        self.where = os.environ.get("MLFLOW_TRACKING_URI") or (folder / FOLDER / "mlflow").as_uri()
        self._client = MlflowClient(self.where)
        self._ledger = _Ledger(folder, "mlflow")
        self.last_step = self._ledger.step
        self._id = self._ledger.id or self._new_run(recipe, folder.name)
        self._client.update_run(self._id, status="RUNNING")

    def _new_run(self, recipe: Recipe, name: str) -> str:
        from mlflow.entities import Param

        run_id: str = self._client.create_run(self._experiment(), run_name=name).info.run_id
        self._ledger.write(run_id, -1)
        shown = recipe.shown().items()
        params = [Param(_mlflow_name(k), str(v)[:6000]) for k, v in shown]  # MLflow's limit
        for first in range(0, len(params), 100):  # its limit of one request
            self._client.log_batch(run_id, params=params[first : first + 100])
        return run_id

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        known = self._client.get_experiment_by_name(name)
        return known.experiment_id if known else self._client.create_experiment(name)

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_mlflow_name(k), float(v), now, step) for k, v in values.items()]
        self._client.log_batch(self._id, metrics=metrics)
        self._ledger.write(self._id, step)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def _mlflow_name(key: str) -> str:
    """eval/aime/avg@32 has a character that MLflow refuses."""
    return re.sub(r"[^\w\-./: ]", "_", key)


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


class Trackers:
    """All trackers of a run. Nothing here raises, or waits longer than _CLOSE_TIMEOUT_S."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        say: Say,
        history: Sequence[Row] = (),
        resumed_at: int | None = None,
    ) -> None:
        """history: the steps before `resumed_at`; those that a tracker has not, it gets now."""
        self._workers = [
            _Worker(name, recipe, folder.absolute(), resumed_at, say)
            for name in dict.fromkeys(recipe.trackers)
        ]
        for row in history:
            self.log(row)

    def log(self, row: Row) -> None:
        for worker in self._workers:
            worker.put(row)

    def close(self, failed: bool) -> None:
        """Waits until all is sent, but not long."""
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        for worker in self._workers:
            worker.put(failed)
        for worker in self._workers:
            worker.wait(deadline)


class _Worker(threading.Thread):
    """Opens a tracker, and gives it rows from a queue until a bool comes: whether the run failed."""

    def __init__(
        self, name: str, recipe: Recipe, folder: Path, resumed_at: int | None, say: Say
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._recipe, self._folder, self._resumed_at, self._say = recipe, folder, resumed_at, say
        self._tracker = TRACKERS[name]
        self._rows: queue.SimpleQueue[Row | bool] = queue.SimpleQueue()
        self._works = True
        try:
            importlib.import_module(self._tracker.module)  # in no thread: others import meanwhile
        except ImportError as error:
            self._give_up(f"{error}; pip install -e '.[{name}]'")
        except Exception as error:
            self._give_up(error)
        else:
            self.start()

    def put(self, row: Row | bool) -> None:
        if self._works:
            self._rows.put(row)

    def wait(self, deadline: float) -> None:
        if self._works:
            self.join(max(0.0, deadline - time.monotonic()))
            if self.is_alive():
                self._give_up(f"it has not taken all steps {_CLOSE_TIMEOUT_S} s after the last")

    def run(self) -> None:
        try:
            tracker = self._tracker(self._recipe, self._folder, self._resumed_at)
        except Exception as error:
            self._give_up(error)
            return
        try:
            self._work(tracker)
        except Exception as error:
            self._give_up(error)
            with contextlib.suppress(Exception):  # what it has may still be written
                tracker.close(failed=True)

    def _work(self, tracker: Tracker) -> None:
        if not isinstance(tracker, TensorBoard):
            self._say(f"tracker {self.name}: {tracker.where}")
        if self._resumed_at is not None and tracker.last_step >= self._resumed_at:
            self._say(
                f"tracker {self.name} has steps {self._resumed_at + 1} to {tracker.last_step + 1} from before, "
                f"and keeps those; {METRICS} has them as they are made again"
            )
        while not isinstance(row := self._rows.get(), bool):
            if row["step"] > tracker.last_step:
                numbers = {key: v for key, v in row.items() if isinstance(v, int | float)}
                tracker.log(row["step"], numbers)
        tracker.close(failed=row)

    def _give_up(self, reason: str | Exception) -> None:
        self._works = False
        if isinstance(reason, Exception):
            reason = f"{type(reason).__name__}: {reason}"
        self._say(
            f"WARNING: tracker {self.name} FAILED and gets no more: {reason}. The run goes on; {METRICS} has "
            "all steps, and a resumed run sends those that are missing"
        )
