"""Promises of `tools.convert.beton`: stock FFCV and our source read what was written, from any page."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from pipelines.source import BetonSource
from pipelines.threads import keep_torch_threads
from tools.convert.beton import MIN_PAGE_SIZE, BetonTarget
from tools.convert.target import SAMPLE

with keep_torch_threads():
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader

CROP = 40


class Sample(NamedTuple):
    encoded: bytes
    height: int
    width: int
    is_raw: bool
    label: int
    colour: np.ndarray


def make_samples(rng: np.random.Generator, count: int, max_side: int) -> list[Sample]:
    """Images of one colour each, every third a JPEG, the others raw: several to a page of the file."""
    samples = []
    for i in range(count):
        height, width = rng.integers(max_side // 2, max_side + 1, 2).tolist()
        colour = rng.integers(0, 256, 3, dtype=np.uint8)
        pixels_HWC = np.broadcast_to(colour, (height, width, 3))
        encoded = pixels_HWC.tobytes()
        if i % 3 == 0:
            file = io.BytesIO()
            Image.fromarray(pixels_HWC).save(file, "JPEG", quality=95)
            encoded = file.getvalue()
        samples.append(Sample(encoded, height, width, i % 3 != 0, int(rng.integers(0, 7)), colour))
    return samples


def as_table(samples: list[Sample]) -> np.ndarray:
    rows = [(s.is_raw, False, s.height, s.width, s.label, len(s.encoded)) for s in samples]
    return np.array(rows, SAMPLE)


def write(path: Path, samples: list[Sample], *, max_side: int, spare: int = 0) -> None:
    """In blocks of uneven sizes; `spare`: entries of the source that did not become samples."""
    target = BetonTarget(path, len(samples) + spare, max_side)
    for start in range(0, len(samples), 7):
        block = samples[start : start + 7]
        target.append(as_table(block), [s.encoded for s in block], start + 7 >= len(samples))
    target.finish()
    target.close()


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return make_samples(np.random.default_rng(11), 31, 1001)


@pytest.fixture(scope="module")
def beton(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """31 images over several pages of the file, and room for five that were left out."""
    path = tmp_path_factory.mktemp("beton") / "x.beton"
    write(path, samples, max_side=1001, spare=5)
    return path


def test_ffcv_reader_finds_every_sample(beton: Path, samples: list[Sample]) -> None:
    reader, data = Reader(str(beton)), beton.read_bytes()
    assert reader.num_samples == len(samples)
    assert reader.field_names == ["image", "label"]
    assert reader.metadata["f1"].tolist() == [s.label for s in samples]
    assert reader.alloc_table["sample_id"].tolist() == list(range(len(samples)))
    for image, place, sample in zip(reader.metadata["f0"], reader.alloc_table, samples, strict=True):
        start = int(image["data_ptr"])
        assert place["ptr"] == start
        assert data[start : start + int(place["size"])] == sample.encoded
        assert (image["height"], image["width"], image["mode"]) == sample[1:4]


def test_no_image_crosses_a_page(beton: Path) -> None:
    reader = Reader(str(beton))
    first = reader.alloc_table["ptr"] // reader.page_size
    last = (reader.alloc_table["ptr"] + reader.alloc_table["size"] - 1) // reader.page_size
    assert reader.page_size == MIN_PAGE_SIZE
    assert (first == last).all()
    assert len(np.unique(first)) > 3


@pytest.mark.parametrize("os_cache", [True, False])
def test_stock_ffcv_loader_decodes_every_sample(os_cache: bool, beton: Path, samples: list[Sample]) -> None:
    """With `os_cache=False` FFCV reads the file page by page."""
    with keep_torch_threads():
        loader = Loader(
            str(beton),
            batch_size=6,
            num_workers=2,
            order=OrderOption.RANDOM,
            seed=3,
            os_cache=os_cache,
            drop_last=False,
            pipelines={"image": [CenterCropRGBImageDecoder((CROP, CROP), 1.0)], "label": [IntDecoder()]},
        )
        batches = [(image.copy(), label.copy()) for image, label in loader]
    order = loader.traversal_order.sample_order(0)
    got_NHWC, label_N1 = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert sorted(order) == list(range(len(samples)))
    assert label_N1[:, 0].tolist() == [samples[i].label for i in order]
    for got_HWC, i in zip(got_NHWC, order, strict=True):
        assert np.abs(got_HWC.astype(int) - samples[i].colour).max() <= (0 if samples[i].is_raw else 4)


def test_our_source_reads_it(beton: Path, samples: list[Sample]) -> None:
    source = BetonSource(beton)
    assert source.labels_N.tolist() == [s.label for s in samples]
    height_N, width_N = source.sizes(np.arange(len(samples)))
    assert list(zip(height_N, width_N, strict=True)) == [(s.height, s.width) for s in samples]
    for i in range(0, len(samples), 3):
        assert source.encoded(i).tobytes() == samples[i].encoded


def test_small_dataset_makes_a_small_file(tmp_path: Path) -> None:
    few = make_samples(np.random.default_rng(12), 4, 20)
    write(tmp_path / "x.beton", few, max_side=512)
    assert (tmp_path / "x.beton").stat().st_size < sum(len(s.encoded) for s in few) + 4096
    assert len(BetonSource(tmp_path / "x.beton")) == 4


def test_sample_without_label_gets_0(tmp_path: Path) -> None:
    few = [s._replace(label=-1) for s in make_samples(np.random.default_rng(13), 3, 20)]
    write(tmp_path / "x.beton", few, max_side=512)
    assert Reader(str(tmp_path / "x.beton")).metadata["f1"].tolist() == [0, 0, 0]


def test_large_images_get_larger_pages(tmp_path: Path) -> None:
    """Raw pixels of the largest image fit."""
    largest = Sample(bytes(3 * 3000 * 3000), 3000, 3000, True, 1, np.zeros(3, np.uint8))
    write(tmp_path / "x.beton", [largest, largest], max_side=3000)
    assert Reader(str(tmp_path / "x.beton")).page_size == 1 << 25
    assert BetonSource(tmp_path / "x.beton").sizes(np.arange(2))[0].tolist() == [3000, 3000]


def test_restored_target_goes_on_where_the_other_stopped(tmp_path: Path, samples: list[Sample]) -> None:
    write(tmp_path / "whole.beton", samples, max_side=1001)
    blocks = [samples[:13], samples[13:20], samples[20:]]
    stopped = BetonTarget(tmp_path / "x.beton", len(samples), 1001)
    for block in blocks[:2]:
        stopped.append(as_table(block), [s.encoded for s in block], False)
    stopped.append(as_table(blocks[2][::-1]), [s.encoded for s in blocks[2][::-1]], True)  # of no account
    stopped.close()
    target = BetonTarget(tmp_path / "x.beton", len(samples), 1001)
    for block in blocks[:2]:
        target.restore(as_table(block), False)
    target.truncate()
    target.append(as_table(blocks[2]), [s.encoded for s in blocks[2]], True)
    target.finish()
    target.close()
    assert (tmp_path / "x.beton").read_bytes() == (tmp_path / "whole.beton").read_bytes()
