"""What the machine was doing is read from the right GPU, and missing figures stay missing."""

import ctypes
import time
from types import SimpleNamespace

import pynvml
import pytest
import torch

from tools.profile.nvml import GpuCounters
from tools.profile.utilisation import Sampler, warnings_of

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
UUID = "0d1c6b3e-1b2c-4d5e-8f90-a1b2c3d4e5f6"
METRICS = {pynvml.NVML_GPM_METRIC_SM_UTIL: 35.0, pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: 12.5}
IDLE = {"per_core": [0.1, 0.1], "mean": 0.1, "busiest_thread": 0.1}


def address(sample: pynvml.c_nvmlGpmSample_t) -> int:
    return ctypes.addressof(sample.contents)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU behind the real module's names, with GPM; `asked` are the calls that it has had."""
    gpu = SimpleNamespace(
        has_gpm=True, asked=[], between=[], kernel=98, reasons=pynvml.nvmlClocksEventReasonSwPowerCap
    )

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

    def refuse(*arguments: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

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
    counters.read()
    counters.read()
    first, second, third = (address(args[1]) for name, args in gpu.asked if name == "nvmlGpmSampleGet")
    assert first == third != second  # the older of the two is what the next one replaces
    assert gpu.between == [(first, second), (second, third)]


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
    with Sampler(CPU, seconds=0.02) as sampler:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
    summary = sampler.summary()
    assert summary["source"] == "cpu" and summary["samples"] > 0
    assert summary["cpu"]["busiest_thread"] > 0
    assert all(0 <= share <= 1 for share in summary["cpu"]["per_core"])


@pytest.mark.parametrize(
    ("gpu", "cpu", "sentence"),
    [
        ({"kernel_ran": 0.98}, IDLE, "98% of the time, which does not say"),
        ({"kernel_ran": 0.98, "sm_active": 0.2}, IDLE, "only 20% of the multiprocessors"),
        ({"kernel_ran": 0.9, "sm_active": 0.9, "tensor_active": 0.01}, IDLE, "train.precision"),
        ({"sm_active": 0.9, "throttle_reasons": ["heat", "power"]}, IDLE, "because of heat, power"),
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
    busy = {"per_core": [0.9] * 8, "mean": 0.9, "busiest_thread": 0.99}
    assert warnings_of(gpu, busy) == warnings_of(None, IDLE) == []
