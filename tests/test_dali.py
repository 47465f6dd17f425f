"""The loader `dali`: PIL's pixels from every kind of file, whatever DALI makes of it."""

import gc
import weakref
from collections.abc import Callable
from contextlib import closing
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.augment import distort
from pipelines.augment.reference import distort_one
from pipelines.batch import Batch, Loader
from pipelines.config import DataConfig
from pipelines.dali_graph import Graph
from pipelines.errors import DataError
from pipelines.loaders import build_loader

SEED, BATCH, SIZE = 6, 4, 40


def build(path: Path, name: str = "dali", device: str = "cpu", **settings: object) -> Loader:
    config = DataConfig(**{"path": path, "loader": name, "image_size": SIZE, "workers": 2, **settings})
    return build_loader(config, seed=SEED, batch_size=BATCH, device=device)


def batches_of(path: Path, *arguments: str, epochs: int = 1, **settings: object) -> list[Batch]:
    with closing(build(path, *arguments, **settings)) as loader:
        return [batch for epoch in range(epochs) for batch in loader.epoch(epoch)]


def difference(a_VNHWC: torch.Tensor, b_VNHWC: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of each crop, (V, N), in grey levels."""
    return (a_VNHWC.cpu().float() - b_VNHWC.cpu().float()).abs().mean((2, 3, 4))


def assert_same(ours: list[Batch], theirs: list[Batch], tolerance: float = 0) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.indices_N, b.indices_N)
        assert torch.equal(a.params.box_VN4, b.params.box_VN4)
        assert difference(a.views_VNHWC, b.views_VNHWC).max() <= tolerance


def picture(random: np.random.Generator) -> Image.Image:
    """Smooth colours with some noise; both sides are odd."""
    coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((2 * random.integers(12, 60) + 1, 2 * random.integers(12, 60) + 1)))
    return Image.fromarray((smooth + random.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8))


def with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(image.convert("L"))
    return image


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = 6
    return exif


# By file name: what becomes of an RGB picture, and how it is stored.
FILES: dict[str, tuple[Callable[[Image.Image], Image.Image], str, dict]] = {
    "full.jpg": (lambda image: image, "JPEG", {"subsampling": 0}),
    "half.jpg": (lambda image: image, "JPEG", {"subsampling": 1}),
    "quarter.jpg": (lambda image: image, "JPEG", {"subsampling": 2}),
    "progressive.jpg": (lambda image: image, "JPEG", {"progressive": True}),
    "turned.jpg": (lambda image: image, "JPEG", {"exif": turned()}),
    "gray.jpg": (lambda image: image.convert("L"), "JPEG", {}),
    "cmyk.jpg": (lambda image: image.convert("CMYK"), "JPEG", {}),
    "one_pixel.jpg": (lambda image: image.resize((1, 1)), "JPEG", {}),
    "wide.jpg": (lambda image: image.resize((20_000, 3)), "JPEG", {}),
    "rgb.png": (lambda image: image, "PNG", {}),
    "bits.png": (lambda image: image.convert("1"), "PNG", {}),
    "palette.png": (lambda image: image.quantize(40), "PNG", {"transparency": 3}),
    "alpha.png": (with_alpha, "PNG", {}),
    "gray_alpha.png": (lambda image: with_alpha(image.convert("L")), "PNG", {}),
    "rgb.webp": (lambda image: image, "WEBP", {"lossless": True}),
    "rgb.bmp": (lambda image: image, "BMP", {}),
    "rgb.ppm": (lambda image: image, "PPM", {}),
    "rgb.tif": (lambda image: image, "TIFF", {}),
    "bits.tif": (lambda image: image.convert("1"), "TIFF", {}),
    "gray_alpha.tif": (lambda image: with_alpha(image.convert("L")), "TIFF", {}),
    "gif.png": (lambda image: image.quantize(40), "GIF", {}),  # which DALI refuses
    "second_gif.png": (lambda image: image.quantize(40), "GIF", {}),
}


@pytest.fixture
def files(tmp_path) -> Path:
    """A folder with one file of each kind."""
    random = np.random.default_rng(12)
    (tmp_path / "files" / "all").mkdir(parents=True)
    for name, (change, kind, options) in FILES.items():
        change(picture(random)).save(tmp_path / "files" / "all" / name, kind, **options)
    return tmp_path / "files"


@pytest.mark.timeout(180)
@pytest.mark.parametrize("prefetch", [1, 3])
def test_files_of_every_kind_give_pils_pixels(files, prefetch, caplog):
    """Those that DALI refuses, too; each is named once."""
    ours = batches_of(files, epochs=2, prefetch=prefetch)
    assert_same(ours, batches_of(files, "folder", epochs=2, workers=0))
    warnings = [record.getMessage() for record in caplog.records if "so PIL does" in record.getMessage()]
    assert len(warnings) == 2 and all("gif.png" in warning for warning in warnings)


@pytest.mark.timeout(180)
def test_nothing_is_lost_where_bad_and_refused_images_mix(files):
    """Nor doubled: every batch is that of the folder loader, which replaces bad samples one by one."""
    whole = BytesIO()
    picture(np.random.default_rng(13)).save(whole, "JPEG")
    (files / "all" / "half.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (files / "all" / "rgb.png").write_bytes(b"")
    (files / "all" / "gray.jpg").write_bytes(b"no image" * 99)
    with closing(build(files, prefetch=2)) as ours, closing(build(files, "folder", workers=0)) as theirs:
        for epoch in (0, 1):
            assert_same(list(ours.epoch(epoch)), list(theirs.epoch(epoch)))
        assert ours.bad_samples == theirs.bad_samples
        assert len(ours.bad_samples) == 3


@pytest.mark.timeout(180)
def test_file_that_vanishes_is_replaced_or_stops_the_run(files):
    sound = batches_of(files, "folder", workers=0)
    with closing(build(files)) as loader, closing(build(files, on_bad_sample="stop")) as strict:
        (files / "all" / "rgb.bmp").unlink()
        index = sorted(FILES).index("rgb.bmp")
        for batch, expected in zip(loader.epoch(0), sound, strict=True):
            stand_in_N = torch.where(expected.indices_N == index, index + 1, expected.indices_N)
            assert torch.equal(batch.indices_N, stand_in_N)
        assert list(loader.bad_samples) == [index]
        with pytest.raises(DataError, match=r"rgb\.bmp cannot be read"):
            for epoch in (0, 1):
                list(strict.epoch(epoch))


@pytest.mark.timeout(180)
def test_pipeline_ends_with_the_run_that_a_bad_file_stops(files, monkeypatch):
    """Its threads, too; and a process that is forked later does not inherit what would need them."""
    pipelines, build_graph = [], Graph.build

    def record(graph: Graph, feed: Callable) -> object:
        pipelines.append(weakref.ref(pipeline := build_graph(graph, feed)))
        return pipeline

    monkeypatch.setattr(Graph, "build", record)
    (files / "all" / "rgb.bmp").write_bytes(b"")
    gc.disable()
    try:
        expected = pytest.raises(DataError, match=r"rgb\.bmp cannot be read")
        with closing(build(files, on_bad_sample="stop")) as loader, expected:
            for epoch in (0, 1):
                list(loader.epoch(epoch))
        assert pipelines and all(pipeline() is None for pipeline in pipelines)
    finally:
        gc.enable()


class BrokenPipeline:
    def run(self, stream: object) -> tuple:
        raise RuntimeError("Error in operator x, encountered:\n\nout of everything\nC++ context: y")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("failing", [[], [0], [0, 1]])
def test_dali_that_always_fails_ends_in_one_sentence(failing, beton, monkeypatch):
    """Whether it fails for single samples as well, or for none."""
    monkeypatch.setattr(Graph, "build", lambda graph, feed: feed() and BrokenPipeline())
    monkeypatch.setattr(Graph, "failing", lambda graph, fed: failing)
    expected = pytest.raises(DataError, match=r"DALI cannot load .* \(out of everything\); set data\.loader")
    with closing(build(beton)) as loader, expected:
        next(loader.epoch(0))


def test_own_distortions_come_close_to_the_paper_and_are_normalised(beton):
    """In all, in standard deviations; `test_dali_distortions` has the bounds of each distortion."""
    ours, crops = batches_of(beton, augment={"implementation": "dali"}), batches_of(beton)
    config = DataConfig(path=beton, loader="dali", augment={"implementation": "dali"}).augment
    off, off_without = [], []
    for batch, plain in zip(ours, crops, strict=True):
        ours_VNCHW = distort(batch.views_VNHWC, batch.params, config, torch.float32)
        plain_VNCHW = distort(plain.views_VNHWC, plain.params, config, torch.float32)
        assert ours_VNCHW.shape == (2, BATCH, 3, SIZE, SIZE)
        for v, n in np.ndindex(2, BATCH):
            exact_CHW = distort_one(plain.views_VNHWC[v, n].numpy(), plain.params, v, n, config)
            off.append((ours_VNCHW[v, n] - exact_CHW).abs().mean())
            off_without.append((plain_VNCHW[v, n] - exact_CHW).abs().mean())
    assert np.mean(off) < 0.2
    assert np.mean(off_without) > 0.4


def test_normalising_copies_nothing_to_the_device_after_the_first_time(beton, monkeypatch):
    """A copy from ordinary memory makes the host wait for the GPU in every step."""
    config = DataConfig(path=beton, loader="dali", augment={"implementation": "dali"}).augment
    views_VNHWC = torch.randint(256, (2, 3, 5, 5, 3), dtype=torch.uint8)
    first_VNCHW = distort(views_VNHWC, None, config, torch.float32)
    mean_C, std_C = torch.tensor(config.mean), torch.tensor(config.std)
    expected_VNHWC = (views_VNHWC / 255 - mean_C) / std_C
    torch.testing.assert_close(first_VNCHW.permute(0, 1, 3, 4, 2), expected_VNHWC)
    monkeypatch.delattr(torch, "tensor")
    assert torch.equal(distort(views_VNHWC, None, config, torch.float32), first_VNCHW)


def test_gpu_decoder_asks_for_a_gpu(beton):
    with pytest.raises(DataError, match=r"data\.dali\.device gpu needs a CUDA device, not cpu"):
        build(beton, dali={"device": "gpu"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("decoder", ["cpu", "gpu"])
@pytest.mark.parametrize("distorts", [False, True])
def test_graph_for_a_gpu_is_sound_but_does_not_start_without_one(decoder, distorts):
    """DALI checks the operators and their settings when the graph is made, before it asks for the device."""
    graph = Graph(3, SIZE, "gpu", decoder, 0, 2, 2, distorts, largest_HW=(5000, 4000))
    with pytest.raises(DataError, match=r"DALI does not start \(.*CUDA is not available"):
        graph.build(lambda: None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("decoder", ["cpu", "gpu"])
@pytest.mark.parametrize("own", [False, True])
def test_gpu_gives_what_the_cpu_gives(decoder, own, beton):
    """All batches are kept while later ones load. nvJPEG and DALI's resize round differently."""
    augment = {"implementation": "dali"} if own else {}
    kept = batches_of(beton, "dali", "cuda", epochs=3, prefetch=1, augment=augment, dali={"device": decoder})
    torch.cuda.synchronize()
    assert all(batch.views_VNHWC.is_cuda for batch in kept)
    assert_same(
        [
            Batch(
                batch.views_VNHWC.cpu(), batch.params.to("cpu"), batch.labels_N.cpu(), batch.indices_N.cpu()
            )
            for batch in kept
        ],
        batches_of(beton, epochs=3, augment=augment),
        tolerance=2 if own else 1,
    )
