"""A sample's two distorted views are the same bits however the run that makes them is laid out."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from pipelines.augment import distort
from pipelines.batch import Batch, ViewParams
from pipelines.config import AugmentConfig, DataConfig, ViewConfig
from pipelines.draw import draw_views
from pipelines.loaders import LOADERS, build_loader
from pipelines.threads import keep_torch_threads

SEED, EPOCH, SIZE, NUM_SAMPLES = 11, 3, 41, 24
REAL = [name for name in LOADERS if name != "synthetic"]
# Each distortion meets about half of the samples, so that batches of many kinds come together.
VIEW = ViewConfig(jitter_p=0.6, grayscale_p=0.4, blur_p=0.5, solarize_p=0.4)


class Layout(NamedTuple):
    batch_size: int  # global
    ranks: int
    workers: int
    start_step: int = 0


PLAIN = Layout(batch_size=4, ranks=1, workers=1)
OTHERS = {
    "another batch size, two workers": Layout(batch_size=7, ranks=1, workers=2),
    "two ranks, no workers, resumed": Layout(batch_size=6, ranks=2, workers=0, start_step=2),
}


def load(beton: Path, loader: str, layout: Layout) -> Iterator[Batch]:
    """The batches of every rank, as a run of that layout gets them."""
    config = DataConfig(
        path=beton,
        loader=loader,
        image_size=SIZE,
        workers=layout.workers,
        augment=AugmentConfig(view_a=VIEW, view_b=VIEW),
    )
    for rank in range(layout.ranks):
        built = build_loader(
            config, seed=SEED, batch_size=layout.batch_size, rank=rank, world_size=layout.ranks
        )
        with closing(built):
            yield from built.epoch(EPOCH, layout.start_step)


@pytest.fixture(scope="module", params=REAL)
def batches(request: pytest.FixtureRequest, beton: Path) -> dict[str, list[Batch]]:
    """What one loader delivers to runs of all layouts."""
    layouts = {"plain": PLAIN} | OTHERS
    return {name: list(load(beton, request.param, layout)) for name, layout in layouts.items()}


def views_by_sample(batches: list[Batch], implementation: str) -> dict[int, torch.Tensor]:
    """Float32 (V, C, H, W) of every sample, distorted in the batches that it came in."""
    config = AugmentConfig(view_a=VIEW, view_b=VIEW, implementation=implementation)
    found = {}
    for batch in batches:
        views_VNCHW = distort(batch.views_VNHWC, batch.params, config, torch.float32)
        found |= zip(batch.indices_N.tolist(), views_VNCHW.unbind(1), strict=True)
    return found


@pytest.mark.parametrize("implementation", ["torch", "numba"])
def test_views_do_not_depend_on_the_layout_of_the_run(
    batches: dict[str, list[Batch]], implementation: str
) -> None:
    expected = views_by_sample(batches["plain"], implementation)
    assert expected.keys() == set(range(NUM_SAMPLES))
    for name, layout in OTHERS.items():
        views = views_by_sample(batches[name], implementation)
        steps = NUM_SAMPLES // layout.batch_size - layout.start_step
        assert len(views) == steps * layout.batch_size, name
        different = [index for index, view in views.items() if not torch.equal(view, expected[index])]
        assert not different, f"{name}: samples {different}"


def test_views_of_samples_and_sides_differ(batches: dict[str, list[Batch]]) -> None:
    """Otherwise the test above could not fail."""
    views = torch.stack([*views_by_sample(batches["plain"], "torch").values()]).flatten(0, 1)
    assert len(views.flatten(1).unique(dim=0)) == 2 * NUM_SAMPLES


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(
    ("implementation", "device"),
    [
        ("torch", "cpu"),
        ("numba", "cpu"),
        pytest.param("torch", "cuda", marks=GPU),
        pytest.param("triton", "cuda", marks=GPU),
    ],
)
@pytest.mark.parametrize(("size", "dtype"), [(33, torch.float32), (224, torch.bfloat16)])
def test_distortion_does_not_depend_on_batch_place_or_threads(
    implementation: str, device: str, size: int, dtype: torch.dtype
) -> None:
    num_samples = 11
    config = AugmentConfig(view_a=VIEW, view_b=VIEW, implementation=implementation)
    sizes = np.full(num_samples, 100), np.full(num_samples, 100)
    params = draw_views(config.views, SEED, EPOCH, np.arange(num_samples), *sizes).to(device)
    generator = torch.Generator().manual_seed(1)
    shape = 2, num_samples, size, size, 3
    views_VNHWC = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
    whole = distort(views_VNHWC, params, config, dtype)
    with keep_torch_threads():
        for threads, batch_size in ((1, 4), (2, 3), (1, 1)):
            torch.set_num_threads(threads)
            for indices in torch.randperm(num_samples, generator=generator).to(device).split(batch_size):
                part = ViewParams(**{f.name: getattr(params, f.name)[:, indices] for f in fields(params)})
                views = distort(views_VNHWC[:, indices], part, config, dtype)
                assert torch.equal(views, whole[:, indices])
