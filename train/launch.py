"""Several local processes without torchrun: one per rank, supervised by this one."""

import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from functools import partial
from multiprocessing import parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from train.config import RunConfig
from train.errors import USER_ERRORS, LostRankError, TrainingError
from train.loop import RunResult, pretrain
from train.metrics import StepReport
from train.preemption import STOP_SIGNALS, StopRequest, stop_signals_noted

T = TypeVar("T")
Report = Callable[[Any], None]

_GRACE_SECONDS = 5  # for the rank with the cause of a failure to report after one that fell with it


class _Message(Enum):
    """What a rank tells this process, with the content that follows it."""

    REPORT = auto()
    RESULT = auto()
    FAILURE = auto()


def launch(
    config: RunConfig, num_processes: int, on_step: Callable[[StepReport], None] | None = None
) -> RunResult:
    """`pretrain` on `num_processes` ranks of this machine; see `launch_ranks`."""
    return launch_ranks(partial(pretrain, config), num_processes, on_step)


def launch_ranks(job: Callable[[Report | None], T], num_processes: int, on_report: Report | None = None) -> T:
    """`job`, which can be pickled, on `num_processes` ranks of this machine; the result is rank 0's.

    What rank 0's job hands to the function that it is given, `on_report` receives here; those of other ranks
    are given None. The ranks receive `STOP_SIGNALS` that this process receives. The first failure of a rank
    stops all. Raises the rank's own error if it was for the user, `TrainingError` if a rank was killed, and
    `RuntimeError` with the rank's traceback otherwise.
    """
    context = mp.get_context("spawn")
    ranks: dict[Connection, BaseProcess] = {}
    resource_tracker.ensure_running()  # by itself it would start with rank 0, and let SIGTERM through again
    with meeting_point(num_processes) as environments, stop_signals_noted() as request:
        try:
            for rank, environment in enumerate(environments):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_run_rank, args=(job, environment, sender), name=f"rank {rank}"
                )
                with _blocked(STOP_SIGNALS):  # the rank inherits it: they wait until it takes note of them
                    process.start()
                sender.close()
                ranks[receiver] = process
            return _supervise(ranks, on_report, request)
        finally:
            for process in ranks.values():
                process.kill()
            for process in ranks.values():
                process.join()


@contextmanager
def meeting_point(num_processes: int) -> Iterator[list[dict[str, str]]]:
    """torchrun's environment variables for each rank on this machine; the ranks can meet inside the block."""
    # Port 0: the system picks a free one, and no one else can take it before the ranks connect.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store runs here, not in rank 0
    }
    yield [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]


def default_processes(device_choice: str) -> int:
    """One per GPU of this machine, or one for "cpu"; see `process_group` for the choice."""
    return 1 if device_choice == "cpu" else max(1, torch.cuda.device_count())


def show_notes() -> None:
    """Let what the parts of the trainer choose for themselves appear on standard error."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("model").setLevel(logging.INFO)


def _supervise(ranks: dict[Connection, BaseProcess], on_report: Report | None, request: StopRequest) -> Any:
    """Pass on rank 0's reports, and signals to all ranks, until every rank has ended or one has failed."""
    running = dict(ranks)
    told = 0
    results: list[Any] = []
    failures: list[Exception] = []
    deadline = float("inf")
    while running and time.monotonic() < deadline:
        wait([*running, *(process.sentinel for process in running.values())], timeout=0.5)
        if request.signal != told:
            told = request.signal
            for process in running.values():
                os.kill(process.pid, told)
        for receiver, process in list(running.items()):
            has_ended = not process.is_alive()  # asked before the pipe is emptied, so nothing is missed
            for kind, content in _received(receiver):
                if kind is _Message.FAILURE:
                    failures.append(content)
                elif kind is _Message.RESULT:
                    results.append(content)
                elif on_report is not None:
                    on_report(content)
            if has_ended:
                del running[receiver]
                if process.exitcode != 0:
                    failures.append(_death(process))
        if failures:
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    if failures:
        raise min(failures, key=_remoteness)
    (result,) = results
    return result


def _remoteness(failure: Exception) -> int:
    """How far from the cause: a rank that loses another one fails, too."""
    return 2 if isinstance(failure, LostRankError) else 0 if isinstance(failure, USER_ERRORS) else 1


def _death(process: BaseProcess) -> TrainingError:
    code = process.exitcode
    how = (
        f"was killed by signal {-code}, perhaps for lack of memory" if code < 0 else f"ended with code {code}"
    )
    return TrainingError(
        f"The process of {process.name} {how}; start again to go on from the last checkpoint."
    )


def _received(receiver: Connection) -> list[tuple[_Message, Any]]:
    """All messages that have arrived."""
    messages: list[tuple[_Message, Any]] = []
    try:
        while receiver.poll():
            messages.append(receiver.recv())
    except EOFError:
        pass
    return messages


def _run_rank(job: Callable[[Report | None], Any], environment: dict[str, str], sender: Connection) -> None:
    """Body of one process."""
    os.environ.update(environment)
    # A rank inherits "spawn" for its own children; loaders fork their workers, as they do under torchrun.
    mp.set_start_method("fork", force=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // int(environment["WORLD_SIZE"])))
    is_main = environment["RANK"] == "0"
    for number in STOP_SIGNALS:  # one that comes after the run ends nothing any more
        signal.signal(number, lambda number, frame: None)
    show_notes()
    try:
        result = job((lambda report: sender.send((_Message.REPORT, report))) if is_main else None)
        if is_main:
            sender.send((_Message.RESULT, result))
    except USER_ERRORS as error:
        sender.send((_Message.FAILURE, error))
    except KeyboardInterrupt:
        pass  # the parent has it too and speaks for all
    except Exception:
        sender.send((_Message.FAILURE, RuntimeError(traceback.format_exc())))


@contextmanager
def _blocked(signals: Iterable[int]) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """Not even a killed parent leaves ranks behind."""
    wait([parent_process().sentinel])
    os._exit(1)
