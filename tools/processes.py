"""Jobs in worker processes, watched: the parent never waits for a process that has died."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from pipelines.errors import DataError

# A fork of this process could inherit locks that its other threads hold. The fork server has no other
# threads, and it imports the slow libraries once for all workers.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["ffcv.writer", "torchvision.datasets.folder"])

POLL_S = 0.05


def run_processes(jobs: Sequence[Callable[[], Any]], poll: Callable[[], None]) -> list[Any]:
    """Run each job in a process of its own and return their results in order.

    `poll` is called several times a second and once after the last result. Raises `DataError` where a job
    raises, or its process dies or cannot be started. However this function ends, it leaves no process behind.
    """
    processes, pipes = [], []
    try:
        try:
            _start_fork_server()
            for job in jobs:
                receiver, sender = PROCESSES.Pipe(duplex=False)
                pipes.append(receiver)
                with sender:  # closed here, the process holds the only one: its death is the end of the pipe
                    process = PROCESSES.Process(target=_run, args=(sender, job), daemon=True)
                    process.start()
                processes.append(process)
        except OSError as error:
            raise DataError(
                f"A worker process cannot be started ({error.strerror}); use fewer workers, then try again."
            ) from error
        results: dict[Connection, Any] = {}
        while len(results) < len(jobs):
            for pipe in wait([pipe for pipe in pipes if pipe not in results], timeout=POLL_S):
                results[pipe] = _receive(pipe)
            poll()
        return [results[pipe] for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def _start_fork_server() -> None:
    """Start it, if it is not running, deaf to Ctrl-C: that would end its imports with a traceback."""
    resource_tracker.ensure_running()  # now, since starting it unblocks SIGINT
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _receive(pipe: Connection) -> Any:
    try:
        failure, result = pipe.recv()
    except (EOFError, OSError) as error:
        raise DataError(
            "A worker process died; free some memory or use fewer workers, then try again."
        ) from error
    if failure:
        raise DataError(failure)
    return result


def _run(pipe: Connection, job: Callable[[], Any]) -> None:
    """Body of a worker process: send (sentence about a failure, result)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # Pillow warns of oddities in single images
    try:
        pipe.send((None, job()))
    except DataError as error:
        pipe.send((str(error), None))
    except Exception as error:
        pipe.send(
            (
                f"A worker process failed ({type(error).__name__}: {error}); "
                "check memory and free disk space, then try again.",
                None,
            )
        )


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
