"""What NVIDIA's management library knows of a GPU at work, and GPM's counters where the GPU has them."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch

# Names in `pynvml`, without their prefix; "idle" and what somebody has set are no throttling.
THROTTLES = {
    "SwPowerCap": "power",
    "HwPowerBrakeSlowdown": "power brake",
    "HwSlowdown": "hardware slowdown",
    "HwThermalSlowdown": "heat",
    "SwThermalSlowdown": "heat",
}
GPM = {
    "sm_active": "SM_UTIL",
    "sm_occupancy": "SM_OCCUPANCY",
    "tensor_active": "ANY_TENSOR_UTIL",
    "dram_active": "DRAM_BW_UTIL",
}
GPM_SECONDS = 0.1  # which NVIDIA's manual of nvmlGpmMetricsGet asks for between two samples, and more


class GpuCounters:
    """One GPU's counters; `read` gives what they say since the last call. For one thread at a time.

    The GPU is found by its UUID, since NVML's numbers ignore CUDA_VISIBLE_DEVICES. Raises
    `pynvml.NVMLError` where there is no driver or the GPU is not found.
    """

    def __init__(self, device: torch.device) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        try:
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._samples = self._gpm_samples()
            self._sampled_at = time.monotonic()
        except BaseException:
            pynvml.nvmlShutdown()
            raise

    @property
    def has_gpm(self) -> bool:
        return bool(self._samples)

    def read(self) -> dict[str, Any]:
        """Shares of 1, watts, MHz, bytes, a list of throttle reasons; what is not to be had is missing.

        So are GPM's figures within `GPM_SECONDS` of the last ones; the next ones cover that time, too.
        """
        nvml, gpu = self._nvml, self._gpu
        found = {
            "kernel_ran": self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100),
            "power_watts": self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
            "power_limit_watts": self._ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000),
            "sm_clock_mhz": self._ask(lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
            "max_sm_clock_mhz": self._ask(lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM)),
            "memory_bytes": self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).used),
            "throttle_reasons": self._ask(self._throttle_reasons),
        }
        if self._samples and time.monotonic() - self._sampled_at > GPM_SECONDS:
            found |= self._ask(self._gpm_metrics) or {}
        return {name: value for name, value in found.items() if value is not None}

    def close(self) -> None:
        self._free(self._samples)
        self._nvml.nvmlShutdown()

    def _free(self, samples: list[Any]) -> None:
        for sample in samples:
            self._ask(lambda sample=sample: self._nvml.nvmlGpmSampleFree(sample))

    def _ask(self, question: Callable[[], Any]) -> Any:
        """None where this GPU or driver does not answer it, or an older `pynvml` does not know its name."""
        try:
            return question()
        except (self._nvml.NVMLError, AttributeError):
            return None

    def _throttle_reasons(self) -> list[str]:
        bits = self._ask(lambda: self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._gpu))
        if bits is None:  # older drivers know only the older name
            bits = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._gpu)
        names = {
            word
            for name, word in THROTTLES.items()
            if bits & getattr(self._nvml, f"nvmlClocksEventReason{name}")
        }
        return sorted(names)

    def _gpm_samples(self) -> list[Any]:
        """The last sample and the next, or none where the GPU has no GPM or lets nobody read it."""
        support = self._ask(lambda: self._nvml.nvmlGpmQueryDeviceSupport(self._gpu))
        if support is None or not support.isSupportedDevice:
            return []
        samples: list[Any] = []
        try:
            samples += [self._nvml.nvmlGpmSampleAlloc() for _ in range(2)]
            self._nvml.nvmlGpmSampleGet(self._gpu, samples[0])
        except self._nvml.NVMLError:
            self._free(samples)
            return []
        return samples

    def _gpm_metrics(self) -> dict[str, float]:
        """Between the last sample and now; what is not to be had comes as an error or as not a number."""
        nvml, (last, current) = self._nvml, self._samples
        nvml.nvmlGpmSampleGet(self._gpu, current)
        request = nvml.c_nvmlGpmMetricsGet_t()
        request.version = nvml.NVML_GPM_METRICS_GET_VERSION
        request.numMetrics = len(GPM)
        request.sample1, request.sample2 = last, current
        for place, name in enumerate(GPM.values()):
            request.metrics[place].metricId = getattr(nvml, f"NVML_GPM_METRIC_{name}")
        nvml.nvmlGpmMetricsGet(request)
        self._samples, self._sampled_at = [current, last], time.monotonic()
        metrics = zip(GPM, request.metrics, strict=False)
        return {
            name: metric.value / 100
            for name, metric in metrics
            if metric.nvmlReturn == nvml.NVML_SUCCESS and math.isfinite(metric.value)
        }
