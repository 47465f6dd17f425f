"""What the machine was doing is read from the right GPU, and missing figures stay missing."""

import ctypes
import threading
import time
from types import SimpleNamespace

import psutil
import pynvml
import pytest
import torch

from tools.profile import nvml
from tools.profile.nvml import GPM_SECONDS, GpuCounters
from tools.profile.utilisation import MAX_POINTS, Sampler, warnings_of

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
UUID = "0d1c6b3e-1b2c-4d5e-8f90-a1b2c3d4e5f6"
METRICS = {pynvml.NVML_GPM_METRIC_SM_UTIL: 35.0, pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: 12.5}
IDLE = {"per_core": [0.1, 0.1], "mean": 0.1, "busiest_thread": 0.1}


def address(sample: pynvml.c_nvmlGpmSample_t) -> int:
    return ctypes.addressof(sample.contents)


def refuse(*arguments: object) -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU behind the real module's names, with GPM; `asked` are the calls it has had, `now` its time."""
    gpu = SimpleNamespace(
        has_gpm=True, asked=[], between=[], kernel=98, reasons=pynvml.nvmlClocksEventReasonSwPowerCap, now=0.0
    )
    monkeypatch.setattr(nvml, "time", SimpleNamespace(monotonic=lambda: gpu.now))

    def play(name: str, answer: object) -> None:
        assert hasattr(pynvml, name)

        def call(*arguments: object) -> object:
            gpu.asked.append((name, arguments))
            return answer(*arguments) if callable(answer) else answer

        monkeypatch.setattr(pynvml, name, call)

    def metrics(request: pynvml.c_nvmlGpmMetricsGet_t) -> None:
        assert request.version == pynvml.NVML_GPM_METRICS_GET_VERSION
        gpu.between.append(tuple(map(address, (request.sample1, request.sample2))))
        for metric in request.metrics[: request.numMetrics]:
            metric.nvmlReturn = 0 if metric.metricId in METRICS else pynvml.NVML_ERROR_NOT_SUPPORTED
            metric.value = METRICS.get(metric.metricId, 0.0)

    def by_uuid(uuid: str) -> str:
        if uuid != f"GPU-{UUID}":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return "handle"

    play("nvmlInit", None)
    play("nvmlShutdown", None)
    play("nvmlDeviceGetHandleByUUID", by_uuid)
    play("nvmlDeviceGetUtilizationRates", lambda handle: SimpleNamespace(gpu=gpu.kernel))
    play("nvmlDeviceGetPowerUsage", 312_000)
    play("nvmlDeviceGetEnforcedPowerLimit", refuse)
    play("nvmlDeviceGetClockInfo", 1200)
    play("nvmlDeviceGetMaxClockInfo", 1980)
    play("nvmlDeviceGetMemoryInfo", SimpleNamespace(used=2**30))
    play("nvmlDeviceGetCurrentClocksEventReasons", lambda handle: gpu.reasons)
    play("nvmlGpmQueryDeviceSupport", lambda handle: SimpleNamespace(isSupportedDevice=int(gpu.has_gpm)))
    play("nvmlGpmSampleAlloc", lambda: pynvml.c_nvmlGpmSample_t(pynvml.struct_c_nvmlGpmSample_t()))
    play("nvmlGpmSampleGet", None)
    play("nvmlGpmMetricsGet", metrics)
    play("nvmlGpmSampleFree", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    return gpu


def test_gpu_is_found_by_its_uuid_and_tells_what_it_can(gpu: SimpleNamespace) -> None:
    counters = GpuCounters(GPU)
    gpu.now = 1.0
    found = counters.read()
    assert found == {
        "kernel_ran": 0.98,
        "power_watts": 312.0,
        "sm_clock_mhz": 1200,
        "max_sm_clock_mhz": 1980,
        "memory_bytes": 2**30,
        "throttle_reasons": ["power"],
        "sm_active": 0.35,
        "tensor_active": 0.125,
    }
    counters.close()
    assert [name for name, _ in gpu.asked].count("nvmlGpmSampleFree") == 2
    assert gpu.asked[-1][0] == "nvmlShutdown"


def test_each_reading_is_of_the_time_since_the_one_before(gpu: SimpleNamespace) -> None:
    counters = GpuCounters(GPU)
    for gpu.now in (1.0, 2.0):
        counters.read()
    first, second, third = (address(args[1]) for name, args in gpu.asked if name == "nvmlGpmSampleGet")
    assert first == third != second  # the older of the two is what the next one replaces
    assert gpu.between == [(first, second), (second, third)]


def test_gpm_is_not_asked_sooner_than_it_can_tell(gpu: SimpleNamespace) -> None:
    counters = GpuCounters(GPU)
    gpu.now = 0.9 * GPM_SECONDS
    assert "sm_active" not in counters.read() and not gpu.between
    gpu.now = 1.1 * GPM_SECONDS
    assert counters.read()["sm_active"] == 0.35 and len(gpu.between) == 1


def test_a_gpu_that_lets_nobody_read_gpm_tells_the_rest(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pynvml, "nvmlGpmSampleGet", refuse)
    counters = GpuCounters(GPU)
    gpu.now = 1.0
    assert not counters.has_gpm and counters.read()["power_watts"] == 312.0
    assert [name for name, _ in gpu.asked].count("nvmlGpmSampleFree") == 2


def test_throttling_is_asked_by_the_older_name_too_and_is_not_denied_where_it_is_unknown(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", refuse)
    reasons = pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda handle: reasons)
    with Sampler(GPU) as sampler:
        pass
    figures = sampler.summary()["gpu"]
    assert (figures["throttle_reasons"], figures["throttled"]) == (["heat"], 1)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksThrottleReasons", refuse)
    with Sampler(GPU) as sampler:
        pass
    assert not {"throttle_reasons", "throttled"} & sampler.summary()["gpu"].keys()


def test_a_name_that_an_older_pynvml_lacks_leaves_the_other_figures(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons")
    reasons = pynvml.nvmlClocksThrottleReasonSwPowerCap
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda handle: reasons)
    with Sampler(GPU) as sampler:
        pass
    figures = sampler.summary()["gpu"]
    assert (figures["power_watts"], figures["throttle_reasons"]) == (312.0, ["power"])


def test_a_block_too_short_for_gpm_is_not_blamed_on_the_gpu(gpu: SimpleNamespace) -> None:
    with Sampler(GPU) as sampler:
        pass
    assert any("no finer counters were read" in warning for warning in sampler.summary()["warnings"])


def test_one_thread_alone_asks_and_a_figure_once_missing_leaves_a_gap(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers, readings = [], iter([{"kernel_ran": 0.5, "sm_active": 0.2}, {"kernel_ran": 0.7}])

    def read(counters: GpuCounters) -> dict[str, float]:
        readers.append(threading.get_ident())
        return next(readings, {"kernel_ran": 0.9, "sm_active": 0.4})

    monkeypatch.setattr(GpuCounters, "read", read)
    with Sampler(GPU, seconds=0.001) as sampler:
        while len(readers) < 3:
            time.sleep(0.001)
    assert len(set(readers)) == 1 and threading.get_ident() not in readers
    assert sampler.summary()["timeline"]["sm_active"][:3] == [0.2, None, 0.4]


def test_the_first_sample_counts_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[threading.Thread] = []

    def cpu_percent(*, percpu: bool) -> list[float]:
        """Of a busy machine, as psutil: since the last call of the same thread, so 0 at the first one."""
        asked.append(threading.current_thread())
        share = 100.0 if asked.count(asked[-1]) > 1 else 0.0
        return [share] * psutil.cpu_count()

    monkeypatch.setattr(psutil, "cpu_percent", cpu_percent)
    with Sampler(CPU, seconds=0.001) as sampler:
        while len(asked) < 4:
            time.sleep(0.001)
    assert sampler.summary()["cpu"]["mean"] == 1


def test_a_warm_up_is_forgotten() -> None:
    with Sampler(CPU, seconds=1000.0) as sampler:
        until = time.process_time() + 0.1
        while time.process_time() < until:
            sampler._sample()
        sampler.clear()
        time.sleep(0.1)
    summary = sampler.summary()
    assert summary["samples"] == 1
    assert summary["cpu"]["busiest_thread"] < 0.5


def test_without_gpm_the_sampler_says_that_little_is_known(gpu: SimpleNamespace) -> None:
    gpu.has_gpm, gpu.reasons = False, 0
    with Sampler(GPU, seconds=0.01) as sampler:
        time.sleep(0.05)
    summary = sampler.summary()
    assert summary["source"] == "nvml" and "sm_active" not in summary["gpu"]
    assert summary["gpu"]["kernel_ran"] == pytest.approx(0.98)
    assert summary["gpu"]["throttle_reasons"] == []
    assert any("does not say how much" in warning for warning in summary["warnings"])
    assert len(summary["timeline"]["kernel_ran"]) == len(summary["timeline"]["seconds"]) > 0


def test_without_a_driver_there_is_a_sentence_and_the_cpus_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    with Sampler(GPU, seconds=0.01) as sampler:
        pass
    summary = sampler.summary()
    assert (summary["source"], summary["gpu"]) == ("cpu", None)
    assert summary["warnings"][0].startswith("The GPU's counters cannot be read (")
    assert summary["cpu"]["per_core"]


def test_a_busy_thread_shows() -> None:
    began, began_thread = time.monotonic(), time.thread_time()
    with Sampler(CPU, seconds=0.05) as sampler:
        until = time.thread_time() + 0.4
        while time.thread_time() < until:
            pass
    share = (time.thread_time() - began_thread) / (time.monotonic() - began)
    summary = sampler.summary()
    assert summary["source"] == "cpu" and summary["samples"] > 0
    assert summary["cpu"]["busiest_thread"] == pytest.approx(share, rel=0.2)  # the system counts in 10 ms
    assert all(0 <= share <= 1 for share in summary["cpu"]["per_core"])


def test_only_cores_that_the_process_may_use_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda process: [1, 3])
    monkeypatch.setattr(psutil, "cpu_percent", lambda percpu: [100.0, 20.0, 100.0, 40.0])
    with Sampler(CPU) as sampler:
        pass
    assert sampler.summary()["cpu"]["per_core"] == [0.2, 0.4]


def test_a_long_run_is_drawn_with_few_points() -> None:
    with Sampler(CPU, seconds=1000.0) as sampler:
        for _ in range(2 * MAX_POINTS + 1):
            sampler._sample()
    summary = sampler.summary()
    assert summary["samples"] > 2 * MAX_POINTS
    assert {len(values) <= 200 for values in summary["timeline"].values()} == {True}


@pytest.mark.parametrize(
    ("gpu", "cpu", "sentence"),
    [
        ({"kernel_ran": 0.98}, IDLE, "98% of the time, which does not say"),
        ({"kernel_ran": 0.81, "sm_active": 0.39}, IDLE, "only 39% of the multiprocessors"),
        ({"kernel_ran": 0.98, "sm_active": 0.2}, IDLE, "only 20% of the multiprocessors"),
        ({"kernel_ran": 0.9, "sm_active": 0.9, "tensor_active": 0.01}, IDLE, "train.precision"),
        (
            {"sm_active": 0.9, "throttled": 0.25, "throttle_reasons": ["heat", "power"]},
            IDLE,
            "for 25% of the time because of heat, power",
        ),
        ({"sm_active": 0.9, "sm_clock_mhz": 1000, "max_sm_clock_mhz": 1980}, IDLE, "1000 MHz of 1980"),
        (None, {"per_core": [0.2] * 8, "mean": 0.2, "busiest_thread": 0.99}, "One thread was busy for 99%"),
    ],
)
def test_what_should_make_one_think_is_said(gpu: dict | None, cpu: dict, sentence: str) -> None:
    (warning,) = warnings_of(gpu, cpu)
    assert sentence in warning


def test_a_machine_at_work_gets_no_warning() -> None:
    gpu = {"kernel_ran": 0.99, "sm_active": 0.85, "tensor_active": 0.4, "sm_clock_mhz": 1900}
    gpu |= {"max_sm_clock_mhz": 1980, "throttle_reasons": []}
    busy = {"per_core": [0.6] * 8, "mean": 0.6, "busiest_thread": 0.99}
    assert warnings_of(gpu, busy) == warnings_of(None, IDLE) == []
