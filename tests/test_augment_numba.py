"""The compiled CPU path: as torch's in every size and precision, on any threads, in any process.

`tests/test_augment.py` compares it with PIL, like every other implementation.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pipelines.augment import numba_ops, torch_ops
from pipelines.batch import ViewParams
from pipelines.config import AugmentConfig, ViewConfig
from pipelines.draw import draw_views

MIXED = AugmentConfig(
    view_a=ViewConfig(solarize_p=0.5, blur_sigma=(0.1, 3.0)), view_b=ViewConfig(blur_p=0.5, solarize_p=0.5)
)


def draw(config: AugmentConfig, num_samples: int, seed: int) -> ViewParams:
    side = np.full(num_samples, 100)
    return draw_views(config.views, seed, 0, np.arange(num_samples), side, side)


def noise(num_samples: int, size: int, seed: int) -> torch.Tensor:
    shape = 2, num_samples, size, size, 3
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def case(num_samples: int, size: int, config: AugmentConfig = MIXED) -> tuple:
    return noise(num_samples, size, size), draw(config, num_samples, size), config, torch.float32


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("num_samples", "size"), [(7, 32), (3, 33), (1, 224), (3, 225), (7, 8), (3, 9)])
def test_the_same_bits_as_torchs(num_samples: int, size: int) -> None:
    arguments = case(num_samples, size)
    assert torch.equal(numba_ops.distort(*arguments), torch_ops.distort(*arguments))


@pytest.mark.parametrize("sigmas", [(0.01, 0.2), (3, 9), (11, 12)], ids=str)
@pytest.mark.parametrize("size", [8, 41])
def test_the_narrowest_and_the_widest_blur_are_torchs(sigmas: tuple[float, float], size: int) -> None:
    """Also one whose boxes exceed the image, and beside another view without any."""
    config = AugmentConfig(view_a=ViewConfig(blur_sigma=sigmas), view_b=ViewConfig(blur_p=0))
    arguments = case(5, size, config)
    assert torch.equal(numba_ops.distort(*arguments), torch_ops.distort(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_samples", "size"), [(1, 33), (3, 32), (7, 35)])
def test_half_precision_is_float32_rounded_once(dtype: torch.dtype, num_samples: int, size: int) -> None:
    *arguments, single = case(num_samples, size)
    exact = numba_ops.distort(*arguments, single)
    rounded = numba_ops.distort(*arguments, dtype)
    assert rounded.dtype == dtype
    assert rounded.shape == (2, num_samples, 3, size, size)
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in rounded)
    assert torch.equal(rounded, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1 + 2**-8, 1 + 2**-11, 2**-22, 2.0**9])
def test_ties_and_very_small_and_large_values_round_as_torchs(dtype: torch.dtype, scale: float) -> None:
    """All 256 levels times scales that make ties, and float16's subnormal and infinite numbers."""
    bare = ViewConfig(flip_p=0, jitter_p=0, grayscale_p=0, blur_p=0)
    config = AugmentConfig(view_a=bare, view_b=bare, mean=(0, 0, 0))
    config = config.model_copy(update={"std": (1 / (255 * scale),) * 3})  # any, not only what recipes may say
    levels_HW = torch.arange(256, dtype=torch.uint8).view(16, 16)
    arguments = levels_HW[:, :, None].expand(2, 1, 16, 16, 3), draw(config, 1, 0), config
    exact = numba_ops.distort(*arguments, torch.float32)
    assert torch.equal(exact, (levels_HW.float() * scale).expand(exact.shape))
    assert torch.equal(numba_ops.distort(*arguments, dtype), exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_of_the_output_is_written(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    *arguments, _ = case(3, 33)
    expected = numba_ops.distort(*arguments, dtype)
    handed_out = []

    def poisoned(shape: tuple[int, ...], kind: type) -> np.ndarray:
        handed_out.append(np.full(shape, 0xABAB, kind))
        return handed_out[-1]

    monkeypatch.setattr(numba_ops.np, "empty", poisoned)
    ours = numba_ops.distort(*arguments, dtype)
    assert [memory.nbytes for memory in handed_out] == [expected.nbytes]
    assert torch.equal(ours, expected)


CHILD = """
import sys, torch
torch.set_num_threads(3)
sys.path.insert(0, {tests!r})
from test_augment_numba import case, numba_ops
torch.save([numba_ops.distort(*case(3, size)) for size in (35, 224)], sys.argv[1])
assert torch.get_num_threads() == 3
"""


def test_memory_that_was_not_written_is_not_read_nor_are_torchs_threads_changed(tmp_path: Path) -> None:
    """In a process whose C library fills all new memory with 0x7F: as float32, the largest numbers."""
    tests = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", CHILD.format(tests=str(tests)), str(tmp_path / "views.pt")],
        env={**os.environ, "MALLOC_PERTURB_": str(0x7F ^ 0xFF), "PYTHONPATH": str(tests.parent)},
        check=True,
        timeout=120,
    )
    for size, view in zip((35, 224), torch.load(tmp_path / "views.pt"), strict=True):
        assert torch.equal(view, numba_ops.distort(*case(3, size)))


def test_threads_do_not_change_a_bit(restored_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case(7, 33)
    monkeypatch.setattr(numba_ops, "PIXELS_AT_ONCE", 1)  # a range per image
    torch.set_num_threads(1)
    expected = numba_ops.distort(*arguments)
    for threads in (2, 5, 64):
        torch.set_num_threads(threads)
        assert torch.equal(numba_ops.distort(*arguments), expected)


def test_several_threads_may_call_it_at_a_time() -> None:
    cases = [case(5, size) for size in range(30, 38)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda arguments: numba_ops.distort(*arguments), cases))
    for arguments, views in zip(cases, together, strict=True):
        assert torch.equal(views, numba_ops.distort(*arguments))


class Distorted(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return numba_ops.distort(*case(3, 33 + index))


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_worker_processes_may_call_it(start: str, restored_threads: None) -> None:
    """A forked one too, when the parent has run threads before."""
    torch.set_num_threads(2)
    expected = [Distorted()[index] for index in range(2)]
    loader = DataLoader(
        Distorted(), batch_size=None, num_workers=1, multiprocessing_context=start, timeout=120
    )
    for views, ours in zip(loader, expected, strict=True):
        assert torch.equal(views, ours)


def test_any_memory_layout_of_the_input_will_do() -> None:
    views, *rest = case(3, 33)
    expected, before = numba_ops.distort(views, *rest), views.clone()
    scattered = torch.zeros(3, 2, 3, 33, 40, dtype=torch.uint8).permute(1, 0, 3, 4, 2)[:, :, :, 5:38]
    scattered.copy_(views)
    assert not scattered.is_contiguous()
    assert torch.equal(numba_ops.distort(scattered, *rest), expected)
    assert torch.equal(views, before)
