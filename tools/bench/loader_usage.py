"""CPU time and memory of this process and all that descend from it, as Linux counts them in /proc."""

import ctypes
import gc
import os
import resource
import threading
import time
from pathlib import Path
from types import TracebackType

_PARENT, _TIMES = 1, slice(11, 15)  # after the name in /proc/PID/stat: own and dead children's CPU time
_PERIOD_S = 0.05


def cpu_seconds() -> float:
    """CPU time so far, of user and system; that of children is counted in clock ticks, mostly of 10 ms."""
    dead = resource.getrusage(resource.RUSAGE_CHILDREN)
    family = _family()
    del family[os.getpid()]
    ticks = sum(int(spent) for fields in family.values() for spent in fields[_TIMES])
    return time.process_time() + dead.ru_utime + dead.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


class PeakMemory:
    """Samples what is held while the block runs; then `bytes` is the most of it beyond the start.

    Counted is memory that is not the page cache's: mapped files are left out, and a page that a fork shares
    counts once. `bytes` is None where the system does not tell (Linux before 5.4, some sandboxes).
    """

    bytes: int | None

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier work has freed would otherwise be reused unseen
        self._samples: list[int | None] = []
        self.sample()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.sample()
        known = None not in self._samples
        self.bytes = max(self._samples) - self._samples[0] if known else None

    def sample(self) -> None:
        """Look at what is held now."""
        self._samples.append(_held_bytes())

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            self.sample()


def _held_bytes() -> int | None:
    held = 0
    for process in _family():
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
        except ProcessLookupError:
            continue  # it has just ended
        except FileNotFoundError:
            if Path(f"/proc/{process}").exists():
                return None
            continue
        kilobytes = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines)}
        if lines and "Pss_Anon" not in kilobytes:
            return None
        held += 1024 * sum(int(kilobytes.get(name, 0)) for name in ("Pss_Anon", "Pss_Shmem"))
    return held


def _family() -> dict[int, list[str]]:
    """This process and its descendants: each one's fields of /proc/PID/stat after its name."""
    stats = {}
    for name in os.listdir("/proc"):  # noqa: PTH208  pathlib's is slower
        if name.isdigit():
            try:
                stat = Path(f"/proc/{name}/stat").read_text(encoding="utf-8", errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            stats[int(name)] = stat.rpartition(")")[2].split()
    family, fresh = {}, {os.getpid()}
    while fresh:
        family |= {process: stats[process] for process in fresh}
        fresh = {process for process, fields in stats.items() if int(fields[_PARENT]) in fresh}
    return family
