"""numba draws one sample's numbers bit for bit as numpy draws a batch's, also inside an FFCV operation."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import torch
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.state import State

from pipelines import draw_formulas
from pipelines.batch import ViewParams
from pipelines.config import AugmentConfig, ViewConfig
from pipelines.draw import draw_views
from pipelines.draw_formulas import ViewSpec, view_spec
from pipelines.draw_numba import draw_box, draw_sample
from pipelines.source import open_source
from pipelines.threads import keep_torch_threads

CONFIG = AugmentConfig(
    view_b=ViewConfig(
        crop_scale=(0.3, 0.9), crop_ratio=(0.05, 30.0), blur_p=0.4, solarize_p=0.3, hue=0.5, contrast=1.0
    )
)
SPECS = view_spec(CONFIG.view_a), view_spec(CONFIG.view_b)


@numba.njit(nogil=True, fastmath=True)  # as FFCV compiles its operations
def draw_batch(specs, seed, epoch, indices_N, heights_N, widths_N):
    """The fields of `ViewParams` in their order."""
    num_samples = len(indices_N)
    box, order = np.empty((2, num_samples, 4), np.int32), np.empty((2, num_samples, 4), np.uint8)
    flip, jitter = np.empty((2, num_samples), np.bool_), np.empty((2, num_samples), np.bool_)
    grayscale, solarize = np.empty((2, num_samples), np.bool_), np.empty((2, num_samples), np.bool_)
    reals = np.empty((5, 2, num_samples), np.float32)
    for n in range(num_samples):
        for v in range(2):
            drawn = draw_sample(specs[v], seed, epoch, indices_N[n], v, heights_N[n], widths_N[n])
            for k in range(4):
                box[v, n, k] = drawn.box[k]
            order[v, n] = drawn.order
            flip[v, n], jitter[v, n] = drawn.flip, drawn.jitter
            grayscale[v, n], solarize[v, n] = drawn.grayscale, drawn.solarize
            reals[0, v, n], reals[1, v, n] = drawn.brightness, drawn.contrast
            reals[2, v, n], reals[3, v, n] = drawn.saturation, drawn.hue
            reals[4, v, n] = drawn.blur
    return (
        (box, flip, jitter, order),
        (reals[0], reals[1], reals[2], reals[3], grayscale, reals[4], solarize),
    )


def test_numba_draws_what_numpy_draws_bit_for_bit():
    """30,000 samples of 60 seeds and epochs, of all sizes and shapes down to one pixel."""
    rng = np.random.default_rng(3)
    fits = 0
    for k in range(60):
        seed, epoch = rng.integers(2**64, dtype=np.uint64), rng.integers(2**32 if k % 2 else 1000)
        indices = rng.integers(2**32 if k % 3 else 2_000_000, size=500)
        heights, widths = (np.exp(rng.uniform(0, 8, 500)).astype(np.int64) for _ in range(2))
        expected = draw_views(CONFIG.views, int(seed), int(epoch), indices, heights, widths)
        drawn = draw_batch(SPECS, seed, epoch, indices, heights, widths)
        ours = ViewParams(*(torch.from_numpy(array) for part in drawn for array in part))
        for name, value in vars(expected).items():
            assert torch.equal(getattr(ours, name), value), name
        box_N4 = expected.box_VN4[0].numpy()
        whole_or_central = (box_N4[:, 0] == (heights - box_N4[:, 2]) // 2) & (
            box_N4[:, 1] == (widths - box_N4[:, 3]) // 2
        )
        fits += (~whole_or_central).sum()
    assert 0.3 < fits / 30_000 < 0.9  # both the random and the central crop were compared


@numba.njit(fastmath=True)
def formulas(spec, x_N, out_3N):
    for n in range(len(x_N)):
        out_3N[0, n] = draw_formulas.exp(x_N[n])
        h, w = draw_formulas.crop_size(spec, abs(x_N[n]) % 1, abs(7 * x_N[n]) % 1, 371.0, 503.0)
        out_3N[1, n], out_3N[2, n] = h, w


def test_no_bit_depends_on_who_compiles_the_formulas():
    """Library exps differ in their last bit, and fastmath reorders sums: neither may reach a number."""
    x = np.random.default_rng(4).uniform(-3, 3, 100_000)
    ours = np.empty((3, len(x)))
    formulas(SPECS[1], x, ours)
    sizes = draw_formulas.crop_size(SPECS[1], np.abs(x) % 1, np.abs(7 * x) % 1, 371.0, 503.0)
    np.testing.assert_array_equal(ours, [draw_formulas.exp(x), *sizes])


def test_exp_is_the_exponential_function():
    for reach, error in ((1, 1e-14), (14, 2e-13)):
        x = np.linspace(-reach, reach, 20_001)
        np.testing.assert_allclose(draw_formulas.exp(x), np.exp(x), rtol=error)


class BoxOperation(SimpleRGBImageDecoder):
    """In place of the image: the boxes of both views, int64 (2, 4), drawn where FFCV would decode."""

    def __init__(self, specs: tuple[ViewSpec, ViewSpec], seed: int, epoch: int) -> None:
        super().__init__()
        self.arguments = specs, seed, epoch

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, dtype = (2, 4), np.dtype("i8")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        (spec_a, spec_b), seed, epoch = self.arguments
        samples = Compiler.get_iterator()

        def draw(indices_N, boxes_N24, metadata, storage_state):
            for n in samples(len(indices_N)):
                index = indices_N[n]
                height, width = metadata[index]["height"], metadata[index]["width"]
                boxes_N24[n, 0] = draw_box(spec_a, seed, epoch, index, 0, height, width)
                boxes_N24[n, 1] = draw_box(spec_b, seed, epoch, index, 1, height, width)
            return boxes_N24[: len(indices_N)]

        draw.is_parallel = True
        return draw


def test_an_ffcv_operation_draws_the_boxes(beton: Path):
    seed, epoch, source = 2**63 + 9, 4, open_source(beton)
    pipeline = {"image": [BoxOperation(SPECS, seed, epoch)], "label": None}
    with keep_torch_threads():
        loader = Loader(
            str(beton),
            batch_size=5,
            num_workers=2,
            order=OrderOption.SEQUENTIAL,
            drop_last=False,
            pipelines=pipeline,
        )
        boxes_NV4 = np.concatenate([boxes.copy() for (boxes,) in loader])
    indices = np.arange(len(source))
    expected = draw_views(CONFIG.views, seed, epoch, indices, *source.sizes(indices)).box_VN4
    np.testing.assert_array_equal(boxes_NV4.swapaxes(0, 1), expected.numpy())
