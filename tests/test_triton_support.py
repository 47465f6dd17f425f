"""Where Triton cannot serve a GPU, loss and batch-norm run on torch, and the log says so once for each."""

from types import SimpleNamespace

import pytest
import torch

from model import triton_support
from model.loss.choose import choose_operations as choose_for_loss
from model.norm.choose import choose_operations as choose_for_norm

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for remembered in (triton_support._warn_once, triton_support._why_not_started):
        remembered.cache_clear()
    yield
    triton_support._why_not_started.cache_clear()


def chosen(dtype: torch.dtype) -> list[str]:
    modules = choose_for_loss("auto", GPU, dtype), choose_for_norm(GPU, dtype)
    return [module.__name__.rpartition(".")[2] for module in modules]


def test_a_gpu_on_which_triton_starts_has_its_kernels(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_target=lambda: None))
    assert chosen(torch.bfloat16) == ["kernels", "kernels"]
    assert not caplog.messages
    assert chosen(torch.float64) == ["torch_ops", "torch_ops"]
    assert len(caplog.messages) == 2


def test_a_missing_compiler_leaves_the_work_to_torch(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    triton = pytest.importorskip("triton")

    def fail() -> None:
        raise RuntimeError("Failed to find C compiler.\nMore.")

    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_target=fail))
    for _ in range(2):
        assert chosen(torch.float16) == ["torch_ops", "torch_ops"]
    assert caplog.messages == [
        f"{whose} runs without its Triton kernels: Triton does not start (Failed to find C compiler.)."
        for whose in ("The loss", "Batch-norm")
    ]
