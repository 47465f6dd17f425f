"""How busy cores and GPU are while something runs, sampled by a thread beside it."""

import threading
import time
from collections.abc import Mapping, Sequence
from statistics import mean
from types import TracebackType
from typing import Any

import psutil
import torch

from tools.profile.nvml import GpuCounters

SECONDS = 0.1  # no less than GPM's figures take
MAX_POINTS = 200  # of the series that are drawn
HIGH, LOW = 0.8, 0.4  # shares that count as busy, and as hardly busy
LOW_CLOCK = 0.8  # of the highest clock


class Sampler:
    """Samples every `seconds` while the block runs; ask for `summary` afterwards. `clear` forgets a warm-up.

    CPU figures are of the cores this process may use and of all that runs on them; the busiest thread is one
    of this process. A CPU's memory bandwidth can not be read without privileges and is not guessed.
    """

    def __init__(self, device: torch.device, seconds: float = SECONDS) -> None:
        self._device, self._seconds = device, seconds
        self._process = psutil.Process()
        self._cores = self._process.cpu_affinity()
        self._gpu_samples: list[dict[str, Any]] = []
        self._cpu_samples: list[list[float]] = []
        self._times: list[float] = []
        self._lock = threading.Lock()  # of the three lists
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="utilisation", daemon=True)
        self._gpu: GpuCounters | None = None
        self._problem = ""

    def __enter__(self) -> "Sampler":
        if self._device.type == "cuda":
            self._gpu = self._open_gpu()
        self.clear()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        elapsed = time.monotonic() - self._began
        spent = _thread_seconds(self._process)
        busiest = max((seconds - self._threads.get(t, 0.0) for t, seconds in spent.items()), default=0.0)
        self._busiest = busiest / elapsed
        if self._gpu is not None:
            self._gpu.close()

    def clear(self) -> None:
        """Forget all samples so far."""
        with self._lock:
            for samples in (self._gpu_samples, self._cpu_samples, self._times):
                samples.clear()
            self._threads, self._began = _thread_seconds(self._process), time.monotonic()

    def summary(self) -> dict[str, Any]:
        """Means over the block: `gpu` (None without one), `cpu`, `warnings` (sentences), `timeline`."""
        per_core = [mean(values) for values in zip(*self._cpu_samples, strict=True)]
        cpu = {"per_core": per_core, "mean": mean(per_core), "busiest_thread": self._busiest}
        gpu = _means(self._gpu_samples) if self._gpu is not None else None
        source = "cpu" if self._gpu is None else "nvml+gpm" if self._gpu.has_gpm else "nvml"
        return {
            "source": source,
            "samples": len(self._times),
            "gpu": gpu,
            "cpu": cpu,
            "warnings": [self._problem] * bool(self._problem) + warnings_of(gpu, cpu),
            "timeline": self._timeline(),
        }

    def _open_gpu(self) -> GpuCounters | None:
        import pynvml

        try:
            return GpuCounters(self._device)
        except pynvml.NVMLError as error:
            self._problem = f"The GPU's counters cannot be read ({error}), so its use is not known."
            return None

    def _run(self) -> None:
        psutil.cpu_percent(percpu=True)  # the first call of each thread only begins
        while not self._done.wait(self._seconds):
            self._sample()
        if not self._times:
            self._sample()  # so that there is one, however short the block was

    def _sample(self) -> None:
        shares = psutil.cpu_percent(percpu=True)
        gpu = None if self._gpu is None else self._gpu.read()
        with self._lock:
            self._cpu_samples.append([shares[core] / 100 for core in self._cores])
            self._times.append(time.monotonic() - self._began)
            if gpu is not None:
                self._gpu_samples.append(gpu)

    def _timeline(self) -> dict[str, list[float | None]]:
        step = -(-len(self._times) // MAX_POINTS)
        series = {"seconds": self._times, "cpu": [mean(shares) for shares in self._cpu_samples]}
        for name in ("kernel_ran", "sm_active", "tensor_active", "dram_active"):
            if any(name in sample for sample in self._gpu_samples):
                series[name] = [sample.get(name) for sample in self._gpu_samples]
        return {name: values[::step] for name, values in series.items()}


def warnings_of(gpu: Mapping[str, Any] | None, cpu: Mapping[str, Any]) -> list[str]:
    """What the means, `gpu` and `cpu` of a summary, should make one think of: a sentence each."""
    found = []
    if gpu:
        ran, active, tensor = (gpu.get(name) for name in ("kernel_ran", "sm_active", "tensor_active"))
        if active is None and ran is not None:
            found.append(
                f"Some kernel ran for {ran:.0%} of the time, which does not say how much of the GPU it used; "
                "no finer counters were read."
            )
        elif ran is not None and ran >= HIGH and active < LOW:
            found.append(
                f"Some kernel ran for {ran:.0%} of the time, but only {active:.0%} of the multiprocessors "
                "were at work: the kernels are too small, a larger batch per GPU would use more of it."
            )
        elif active is not None and active >= HIGH and tensor is not None and tensor < LOW / 4:
            found.append(
                f"The tensor cores were at work for {tensor:.0%} of the time although the multiprocessors "
                f"were for {active:.0%}: is train.precision a half precision?"
            )
        if gpu.get("throttle_reasons"):
            found.append(
                f"The GPU slowed itself down for {gpu['throttled']:.0%} of the time because of "
                f"{', '.join(gpu['throttle_reasons'])}."
            )
        clock, highest = gpu.get("sm_clock_mhz"), gpu.get("max_sm_clock_mhz")
        if clock and highest and clock < LOW_CLOCK * highest:
            found.append(f"The GPU ran at {clock:.0f} MHz of {highest:.0f}: its clocks are set or held low.")
    if cpu["busiest_thread"] > 0.95 and cpu["mean"] < 0.5 and len(cpu["per_core"]) > 2:
        found.append(
            f"One thread was busy for {cpu['busiest_thread']:.0%} of the time while the cores were idle for "
            f"{1 - cpu['mean']:.0%}: it may be what holds the rest up."
        )
    return found


def _means(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each figure over the samples that have it; of the throttle reasons all that came up.

    `throttled` is the share of the samples with a reason.
    """
    names = dict.fromkeys(name for sample in samples for name in sample if name != "throttle_reasons")
    found = {name: mean(sample[name] for sample in samples if name in sample) for name in names}
    if told := [sample["throttle_reasons"] for sample in samples if "throttle_reasons" in sample]:
        found["throttled"] = mean(bool(reasons) for reasons in told)
        found["throttle_reasons"] = sorted({reason for reasons in told for reason in reasons})
    return found


def _thread_seconds(process: psutil.Process) -> dict[int, float]:
    return {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
