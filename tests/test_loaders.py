"""All loaders deliver the same samples with the same crops, and none of them hangs on bad data."""

import shutil
import tarfile
from contextlib import closing
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from ffcv.reader import Reader
from ffcv.types import ALLOC_TABLE_TYPE, HeaderType
from ffcv.writer import DatasetWriter
from PIL import Image

from pipelines.batch import Batch, Loader
from pipelines.config import DataConfig
from pipelines.draw import draw_views
from pipelines.errors import DataError
from pipelines.loaders import LOADERS, build_loader
from pipelines.order import epoch_permutation, rank_slice
from pipelines.source import open_source, read_image

REAL = [name for name in LOADERS if name != "synthetic"]
SEED, BATCH, SIZE = 5, 8, 48


def config(path: Path, loader: str, **settings: object) -> DataConfig:
    return DataConfig(**{"path": path, "loader": loader, "image_size": SIZE, "workers": 2, **settings})


def build(path: Path, loader: str, **settings: object) -> Loader:
    return build_loader(config(path, loader, **settings), seed=SEED, batch_size=BATCH)


@pytest.fixture(scope="module", params=REAL)
def loader(request, beton):
    loader = build(beton, request.param)
    yield loader
    loader.close()


@pytest.fixture(scope="module")
def reference(beton) -> list[Batch]:
    loader = build(beton, "folder", workers=0)
    return list(loader.epoch(1))


def assert_same_samples(ours: Batch, theirs: Batch) -> None:
    assert torch.equal(ours.indices_N, theirs.indices_N)
    assert torch.equal(ours.labels_N, theirs.labels_N)
    for name, expected in vars(theirs.params).items():
        assert torch.equal(getattr(ours.params, name), expected), name


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_samples(a, b)
        assert torch.equal(a.views_VNHWC, b.views_VNHWC)


def replace_image(beton: Path, target: Path, index: int, encoded: bytes) -> Path:
    """A copy of `beton` in which another image file is stored for sample `index`."""
    reader, whole = Reader(str(beton)), beton.read_bytes()
    table_start = int(reader.header["alloc_table_ptr"])
    metadata, table, header = reader.metadata.copy(), reader.alloc_table.copy(), reader.header.copy()
    table[table["ptr"] == metadata["f0"][index]["data_ptr"]] = (index, table_start, len(encoded))
    metadata["f0"]["data_ptr"][index] = table_start
    header["alloc_table_ptr"] = table_start + len(encoded)
    head = header.tobytes() + reader.field_descriptors.tobytes() + metadata.tobytes()
    target.write_bytes(head + whole[len(head) : table_start] + encoded + table.tobytes())
    assert table.dtype == ALLOC_TABLE_TYPE and header.dtype == HeaderType
    return target


def test_every_loader_gives_the_samples_and_numbers_that_the_order_and_draw_prescribe(loader, beton):
    source = open_source(beton)
    for epoch in (0, 1):
        batches = list(loader.epoch(epoch))
        assert len(batches) == loader.steps_per_epoch == 3
        permutation = epoch_permutation(loader.num_samples, SEED, epoch)
        for step, batch in enumerate(batches):
            indices = rank_slice(permutation, step, BATCH, 0, 1)
            views = DataConfig(path=beton).augment.views
            params = draw_views(views, SEED, epoch, indices, *source.sizes(indices))
            labels, indices = torch.from_numpy(source.labels_N[indices]), torch.from_numpy(indices)
            assert_same_samples(batch, Batch(batch.views_VNHWC, params, labels, indices))
            assert batch.labels_N.dtype == batch.indices_N.dtype == torch.int64
            assert batch.views_VNHWC.shape == (2, BATCH, SIZE, SIZE, 3)
            assert batch.views_VNHWC.dtype == torch.uint8
            assert batch.views_VNHWC.is_contiguous()


def test_epoch_continues_from_any_step(loader):
    whole = list(loader.epoch(2))
    for start_step in (1, 2, 3):
        assert_equal(list(loader.epoch(2, start_step)), whole[start_step:])


def small_batches(path: Path, name: str, device: str = "cpu", workers: int = 2) -> list[Batch]:
    """All 12 batches of an epoch, of two images each: more than there is room for in any queue."""
    settings = config(path, name, prefetch=1, workers=workers)
    with closing(build_loader(settings, seed=SEED, batch_size=2, device=device)) as loader:
        batches = list(loader.epoch(3))
    assert len(batches) == 12
    return batches


@pytest.mark.parametrize(("name", "workers"), [("folder", 2), ("dali", 2), ("ffcv", 2), ("ffcv", 1)])
def test_batches_stay_valid_while_later_ones_load(name, workers, beton):
    kept, expected = small_batches(beton, name, workers=workers), small_batches(beton, "folder", workers=0)
    for batch, theirs in zip(kept, expected, strict=True):
        assert_same_samples(batch, theirs)
        assert difference(batch.views_VNHWC, theirs.views_VNHWC).max() == 0


def test_abandoned_epoch_is_replaced_by_a_new_one(loader):
    expected = list(loader.epoch(4))
    abandoned = loader.epoch(5)
    next(abandoned)
    assert_equal(list(loader.epoch(4)), expected)
    with pytest.raises(StopIteration):
        next(abandoned)


@pytest.mark.parametrize("name", REAL)
def test_ranks_share_the_global_batch(name, beton, reference):
    halves = []
    for rank in range(2):
        loader = build_loader(config(beton, name), seed=SEED, batch_size=BATCH, rank=rank, world_size=2)
        halves.append(list(loader.epoch(1)))
        loader.close()
    for step, batch in enumerate(reference):
        ours = [half[step] for half in halves]
        assert torch.equal(torch.cat([half.indices_N for half in ours]), batch.indices_N)
        assert torch.equal(torch.cat([half.params.box_VN4 for half in ours], 1), batch.params.box_VN4)
        assert torch.equal(torch.cat([half.params.hue_VN for half in ours], 1), batch.params.hue_VN)
        views_VNHWC = torch.cat([half.views_VNHWC for half in ours], 1)
        assert difference(views_VNHWC, batch.views_VNHWC).max() == 0


def difference(a_VNHWC: torch.Tensor, b_VNHWC: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of each crop, (V, N), in grey levels."""
    return (a_VNHWC.cpu().float() - b_VNHWC.cpu().float()).abs().mean((2, 3, 4))


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("size", [24, 160])  # most crops are made smaller; most are made larger
def test_crops_are_those_of_pil(name, size, beton):
    loaders = [build(beton, kind, image_size=size) for kind in ("folder", name)]
    for expected, batch in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        assert difference(batch.views_VNHWC, expected.views_VNHWC).max() == 0
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("name", ["folder", "dali"])
def test_folder_is_read_by_the_loaders_that_can(name, image_folder, tmp_path):
    """One image has 16 bits per pixel."""
    folder = Path(shutil.copytree(image_folder, tmp_path / "images"))
    bright_HW = 128 + np.random.default_rng(8).integers(0, 64, (60, 70), dtype=np.uint16)
    Image.fromarray(bright_HW * 257).save(folder / "ant" / "00.png")
    (folder / "ant" / "00.jpg").unlink()
    loaders = [build(folder, kind) for kind in ("folder", name)]
    for expected, batch in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        assert_same_samples(batch, expected)
        views_NVHWC = batch.views_VNHWC.transpose(0, 1)
        assert all(view.max() < 220 for view in views_NVHWC[batch.indices_N == 0])
        assert (
            difference(batch.views_VNHWC, expected.views_VNHWC).max() <= 0.5
        )  # DALI rounds the 16-bit pixels
    for loader in loaders:
        loader.close()


def test_number_of_workers_changes_nothing(beton, reference):
    for workers in (1, 2):
        loader = build(beton, "folder", workers=workers, prefetch=1)
        assert_equal(list(loader.epoch(1)), reference)
        loader.close()


def with_bad_image(beton: Path, target: Path, fault: str) -> Path:
    """A copy of `beton` whose sample 13 cannot be read."""
    whole = open_source(beton).encoded(13).tobytes()
    encoded = whole[: len(whole) // 2] if fault == "truncated" else b"not an image" * 50
    return replace_image(beton, target, 13, encoded)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("fault", ["truncated", "no image"])
def test_bad_image_in_a_beton_is_named(name, fault, beton, tmp_path):
    bad = with_bad_image(beton, tmp_path / "bad.beton", fault)
    loader = build(bad, name, on_bad_sample="stop")
    for _ in range(2):  # the loader survives it
        with pytest.raises(DataError, match=r"sample 13 of .*bad\.beton cannot be read"):
            list(loader.epoch(0))
    loader.close()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("fault", ["truncated", "no image"])
def test_bad_image_in_a_beton_is_replaced_by_the_next_one(name, fault, beton, tmp_path):
    bad = with_bad_image(beton, tmp_path / "bad.beton", fault)
    with closing(build(bad, name)) as ours, closing(build(beton, "folder", workers=0)) as good:
        for epoch in range(2):
            whole = list(good.epoch(epoch))
            (theirs,) = (sample_of(batch, 14) for batch in whole if 14 in batch.indices_N)
            for batch, expected in zip(ours.epoch(epoch), whole, strict=True):
                place_N = expected.indices_N == 13
                indices_N = torch.where(place_N, 14, expected.indices_N)
                assert torch.equal(batch.indices_N, indices_N)
                assert difference(batch.views_VNHWC, expected.views_VNHWC)[:, ~place_N].max() == 0
                if place_N.any():
                    stand_in = sample_of(batch, 14)
                    assert torch.equal(stand_in[1], theirs[1])
                    assert difference(stand_in[0][:, None], theirs[0][:, None]).max() == 0
        assert list(ours.bad_samples) == [13]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_image_of_another_size_than_stated_is_replaced_at_once(name, factor, beton, tmp_path):
    """Also where the crops of one epoch happen to lie inside it."""
    image = read_image(open_source(beton), 13)
    encoded = BytesIO()
    image.resize((int(factor * image.width), int(factor * image.height))).save(encoded, "JPEG")
    other = replace_image(beton, tmp_path / "other.beton", 13, encoded.getvalue())
    with closing(build(other, name)) as loader:
        for epoch in range(2):
            assert all(13 not in batch.indices_N for batch in loader.epoch(epoch))
        assert list(loader.bad_samples) == [13]
        assert "as stated" in loader.bad_samples[13]


def sample_of(batch: Batch, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views and boxes of the first sample with this index."""
    n = batch.indices_N.tolist().index(index)
    return batch.views_VNHWC[:, n], batch.params.box_VN4[:, n]


@pytest.mark.parametrize("name", ["dali", "ffcv"])
def test_cmyk_image_is_loaded(name, beton, tmp_path):
    """libjpeg-turbo's RGB decoder, which FFCV calls, refuses it."""
    encoded = BytesIO()
    read_image(open_source(beton), 13).convert("CMYK").save(encoded, "JPEG")
    cmyk = replace_image(beton, tmp_path / "cmyk.beton", 13, encoded.getvalue())
    loaders = [build(cmyk, kind) for kind in ("folder", name)]
    found = 0
    for expected, batch in zip(*(loader.epoch(1) for loader in loaders), strict=True):
        assert difference(batch.views_VNHWC, expected.views_VNHWC).max() == 0
        found += (batch.indices_N == 13).sum().item()
    assert found == 1
    for loader in loaders:
        loader.close()


def test_numbers_go_to_the_gpu_through_pinned_memory(beton, monkeypatch):
    """As torch's `DataLoader` does it, too; without a GPU, pinning is recorded instead."""
    source, indices = open_source(beton), np.arange(4)
    params = draw_views(DataConfig(path=beton).augment.views, SEED, 0, indices, *source.sizes(indices))
    pinned = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", record)
    _, copied = torch.utils.data._utils.pin_memory.pin_memory((torch.zeros(1), params))
    assert len(pinned) == 1 + len(vars(params))
    for name, expected in vars(params).items():
        assert torch.equal(getattr(copied, name), expected), name


@pytest.mark.parametrize("name", LOADERS)
def test_batch_that_does_not_fit_is_refused(name, beton):
    settings = config(beton, name, image_size=8, workers=1)
    too_large = 25 if name != "synthetic" else 2_000_000
    with pytest.raises(DataError, match=rf"batch of {too_large} is larger than the dataset"):
        build_loader(settings, seed=SEED, batch_size=too_large)
    with pytest.raises(DataError, match=r"batch of 8 cannot be split evenly over 3 processes"):
        build_loader(settings, seed=SEED, batch_size=8, rank=0, world_size=3)


def test_ffcv_asks_for_a_converted_dataset(image_folder):
    with pytest.raises(DataError, match=r"reads \.beton files, not .*images; run `fastbarlow convert`"):
        build(image_folder, "ffcv")


def test_missing_library_is_explained(beton, monkeypatch):
    monkeypatch.setitem(LOADERS, "dali", "no_such_library.loader:Loader")
    with pytest.raises(DataError, match=r"needs the Python package 'no_such_library'"):
        build(beton, "dali")


def test_synthetic_batches_are_those_of_an_imagenet_of_500_by_375_pixels():
    loader = build(Path("nowhere"), "synthetic")
    assert loader.num_samples == 1_281_167
    assert loader.steps_per_epoch == 1_281_167 // BATCH
    epoch = loader.epoch(1, start_step=loader.steps_per_epoch - 2)
    first, _ = batches = list(epoch)
    assert len(batches) == 2
    indices = first.indices_N.numpy()
    views = DataConfig(path="nowhere").augment.views
    params = draw_views(views, SEED, 1, indices, np.full(BATCH, 375), np.full(BATCH, 500))
    assert torch.equal(first.params.box_VN4, params.box_VN4)
    assert first.views_VNHWC.float().std() > 60  # not one grey
    assert set(first.labels_N.tolist()) <= set(range(1000))


def test_real_photographs_match_pil(shared_data, tmp_path):
    from ffcv.fields import IntField, RGBImageField
    from torchvision.datasets import ImageFolder

    archive = shared_data / "imagenet-sample.tar"
    if not archive.exists():
        pytest.skip("no ImageNet sample")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    path = tmp_path / "real.beton"
    images = ImageFolder(tmp_path / "train", transform=np.asarray)
    fields = {"image": RGBImageField(write_mode="jpg", max_resolution=500), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=2).from_indexed_dataset(images, chunksize=16)
    loaders = [
        build_loader(DataConfig(path=path, loader=name, workers=2), seed=1, batch_size=62) for name in REAL
    ]
    for batches in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        for batch in batches:
            assert_same_samples(batch, batches[0])
            assert difference(batch.views_VNHWC, batches[0].views_VNHWC).max() == 0
    for loader in loaders:
        loader.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", REAL)
def test_batches_on_the_gpu_are_those_on_the_cpu(name, beton):
    batches, reference = small_batches(beton, name, "cuda"), small_batches(beton, "folder", workers=0)
    for batch, expected in zip(batches, reference, strict=True):
        tensors = batch.views_VNHWC, batch.labels_N, batch.indices_N, *vars(batch.params).values()
        assert all(tensor.is_cuda for tensor in tensors)
        params, labels_N, indices_N = batch.params.to("cpu"), batch.labels_N.cpu(), batch.indices_N.cpu()
        assert_same_samples(Batch(batch.views_VNHWC, params, labels_N, indices_N), expected)
        limit = 1 if name == "dali" else 0  # nvJPEG and DALI's GPU filter round differently
        assert difference(batch.views_VNHWC, expected.views_VNHWC).max() <= limit
