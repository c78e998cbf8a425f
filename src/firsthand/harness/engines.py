"""Where the work runs: worker processes here, or an existing Ray cluster. Same work, same results.

An engine has `slots`, `start(work)` which returns a handle, `wait(seconds)` which yields `(handle, event)` pairs, with `Done` or
`Died` as the last of a handle, `stop(handle)` and `close()`. `firsthand.harness.runner` is the only caller.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, no_type_check

from firsthand.harness.worker import Event, Progress, Work, run_seed

# One thread each, so that trials do not fight for cores and numbers do not depend on how many there are; a fixed hash seed, so
# that nothing depends on the order of a set; and no model hub, because a study reads only what is at hand.
WORKER_ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
PROGRESS_EVERY = 0.2  # seconds


@dataclass(frozen=True)
class Done:
    """All arms of the work have finished."""


@dataclass(frozen=True)
class Died:
    """The process is gone before its work was done."""

    reason: str
    output: str = ""  # the end of what it printed


class Local:
    """Worker processes on this machine, kept from one seed to the next.

    Args:
        jobs: how many at once; by default one per core.
    """

    def __init__(self, jobs: int | None = None) -> None:
        if jobs is not None and jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}")
        self.slots = jobs or os.cpu_count() or 1
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []

    def start(self, work: Work) -> "_Worker":
        worker = self._idle.pop() if self._idle else _Worker()
        worker.connection.send(work)
        self._busy.append(worker)
        return worker

    def wait(self, seconds: float) -> Iterator[tuple["_Worker", Event | Done | Died]]:
        by_connection = {worker.connection: worker for worker in self._busy}
        for connection in wait(list(by_connection), seconds):
            worker = by_connection[connection]  # type: ignore[index]
            try:
                event = worker.connection.recv()
            except (EOFError, OSError):
                self._busy.remove(worker)
                yield worker, Died(*worker.autopsy())
                continue
            if isinstance(event, Done):
                self._busy.remove(worker)
                self._idle.append(worker)
            yield worker, event

    def stop(self, handle: "_Worker") -> None:
        self._busy.remove(handle)
        handle.end()

    def close(self) -> None:
        for worker in self._idle:
            worker.dismiss()
        for worker in self._idle + self._busy:
            worker.end(patience=5.0 if worker in self._idle else 0.0)
        self._idle, self._busy = [], []


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        handle, name = tempfile.mkstemp(prefix="firsthand-worker-", suffix=".log")
        os.close(handle)
        self.log = Path(name)
        # No daemon: those may not have children, and an arm may load its data in processes. `_end_with_parent` ends it if we go.
        self.process: SpawnProcess = context.Process(target=_serve, args=(theirs, name))
        with _environment(WORKER_ENVIRONMENT):
            self.process.start()
        theirs.close()

    def autopsy(self) -> tuple[str, str]:
        self.process.join(5)
        code = self.process.exitcode
        output = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
        self.end()
        if code == -signal.SIGKILL:
            return "its process was killed (out of memory?)", output
        return f"its process ended with exit code {code}", output

    def dismiss(self) -> None:
        """Nothing more will come: an idle worker then ends by itself, and cleans up after itself."""
        self.connection.close()

    def end(self, patience: float = 0.0) -> None:
        self.connection.close()
        self.process.join(patience)
        self.process.kill()
        self.process.join()
        self.log.unlink(missing_ok=True)


def _serve(connection: Connection, log: str) -> None:
    """Main of a worker process: work comes in, events go out, until the other end is closed."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the runner, which then ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError):  # if memory runs out on Linux, let it be the trial that goes, not the runner
        Path("/proc/self/oom_score_adj").write_text("1000")
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays: no need to look through it before every trial
    last = 0.0

    def on_progress(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_EVERY:
            last = now
            connection.send(progress)

    while True:
        try:
            work = connection.recv()
        except EOFError:
            gc.freeze()  # nothing is worth collecting now, and looking for it takes longer than all the rest of the end
            return
        for event in run_seed(work, on_progress):
            connection.send(event)
        connection.send(Done())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Ray:
    """Workers of an existing Ray cluster, one core each.

    The package, and a user's study file, must be found under the same path on every node.

    Args:
        address: of the cluster; by default the one in `RAY_ADDRESS`, or one running on this machine.
    """

    def __init__(self, address: str | None = None) -> None:
        try:
            import ray as library
        except ImportError as error:
            raise ImportError("the ray engine needs Ray: pip install 'firsthand[ray]'") from error
        ray: Any = library
        self._ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            address = address or os.environ.get("RAY_ADDRESS", "auto")
            try:
                _reach(address)
                ray.init(address=address, log_to_driver=False, logging_level="error")
            except OSError as error:
                where = "this machine" if address == "auto" else address
                raise ConnectionError(f"no Ray cluster at {where}: start one with `ray start --head`") from error
        self.slots = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._running: set[Any] = set()  # streams of events, which are the handles

    def start(self, work: Work) -> Any:
        gpu = {"num_gpus": 1} if work.device.startswith("cuda") else {}
        remote = self._ray.remote(
            num_cpus=1, max_retries=0, num_returns="streaming", runtime_env={"env_vars": WORKER_ENVIRONMENT}, **gpu
        )(_stream)
        stream = remote.remote(work)
        self._running.add(stream)
        return stream

    def wait(self, seconds: float) -> Iterator[tuple[Any, Event | Done | Died]]:
        if not self._running:
            return
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds, fetch_local=False)
        for stream in ready:
            event: Event | Done | Died
            try:
                event = self._ray.get(next(stream))
            except StopIteration:
                event = Done()
            except self._ray.exceptions.RayError as error:
                event = Died("its worker died", str(error))
            if isinstance(event, Done | Died):
                self._running.remove(stream)
            yield stream, event

    def stop(self, handle: Any) -> None:
        self._running.remove(handle)
        self._ray.cancel(handle, force=True)

    def close(self) -> None:
        for stream in list(self._running):
            self.stop(stream)
        if self._ours:
            self._ray.shutdown()


def _reach(address: str) -> None:
    """Raise `OSError` if nothing listens at `host:port`. Ray itself would try for minutes."""
    host, _, port = address.rpartition("/")[2].partition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


@no_type_check  # Ray wants a plain generator function, and a runtime type checker would wrap it
def _stream(work: Work) -> Iterator[Event]:
    import torch

    torch.set_num_threads(1)
    yield from run_seed(work)


Engine = Local | Ray
