"""Promises of `fastbarlow verify` and `inspect`: any changed byte is found and its samples named."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from pipelines.errors import DataError
from pipelines.source import open_source
from tools.cli import app
from tools.cli_convert import _show_result
from tools.convert import convert
from tools.convert.inspect import inspect
from tools.convert.manifest import Manifest, load_manifest, manifest_path, save_manifest
from tools.convert.verify import verify

TARGETS = ["x.beton", "x"]
BLOCK = 16
NUM_IMAGES = 75


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """75 images of noise in three classes, as x.beton and as the shards in x, in blocks of 16."""
    root, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(9)
    for i in range(NUM_IMAGES):
        path = root / "images" / "abc"[i // 30] / f"{i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(20, 50, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.convert.blocks.ENTRIES", BLOCK)
        convert(root / "images", root / "x.beton", workers=2)
        convert(root / "images", root / "x", workers=2, shards=2)
    return root


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("images"))
    return tmp_path


def flip(path: Path, offset: int) -> None:
    """Change one bit of the file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", TARGETS)
def test_whole_dataset_passes(name: str, made: Path) -> None:
    calls: list[tuple[int, int]] = []
    manifest = verify(made / name, workers=2, progress=lambda *done: calls.append(done))
    files = [made / name] if name == "x.beton" else [*(made / name).glob("shard-*")]
    total = sum(path.stat().st_size for path in files)
    assert {of for _, of in calls} == {total}
    assert (calls[0][0], calls[-1][0], calls == sorted(calls)) == (0, total, True)
    assert manifest == load_manifest(made / name)


def test_checksums_of_shards_are_those_of_sha256sum(made: Path) -> None:

    for file in load_manifest(made / "x").files:
        assert file.sha256 == hashlib.sha256((made / "x" / file.file).read_bytes()).hexdigest()


def test_any_changed_bit_of_a_beton_is_found(copy: Path) -> None:
    """Also in the gaps and in the room for images that were left out."""
    path, rng = copy / "x.beton", np.random.default_rng(10)
    size = path.stat().st_size
    for offset in [0, 30, 1100, size - 1, *rng.integers(0, size, 25).tolist()]:
        flip(path, offset)
        with pytest.raises(DataError, match=r"x\.beton is damaged: "):
            verify(path)
        flip(path, offset)
    verify(path)


def test_damaged_samples_of_a_beton_are_named(copy: Path) -> None:
    source = open_source(copy / "x.beton")
    data = (copy / "x.beton").read_bytes()
    for index in (0, 15, 16, 40, 74):
        start = data.index(source.encoded(index).tobytes())
        flip(copy / "x.beton", start + 100)
        first = index // BLOCK * BLOCK
        last = min(first + BLOCK, NUM_IMAGES) - 1
        with pytest.raises(
            DataError, match=rf"samples {first} to {last} are not what was written \(bytes \d+"
        ):
            verify(copy / "x.beton")
        flip(copy / "x.beton", start + 100)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("samples", [[40], [38, 41, 47]])
def test_samples_that_no_longer_decode_are_named(samples: list[int], name: str, copy: Path) -> None:
    """Checksums tell of blocks only, and decoding more. The second shard begins with sample 37."""
    path = copy / "x.beton" if name == "x.beton" else copy / "x" / "shard-000001.tar"
    source = open_source(copy / "x.beton")
    data = bytearray(path.read_bytes())
    for sample in samples:
        start = data.index(source.encoded(sample).tobytes())
        data[start + 650 : start + 690] = b"\xff\x42" * 20  # no marker that may be there
    path.write_bytes(data)
    words = rf"are not what was written, and of these {', '.join(map(str, samples))} cannot be decoded \("
    with pytest.raises(DataError, match=words):
        verify(copy / name)


def test_many_samples_are_named_in_one_short_sentence(copy: Path) -> None:
    source = open_source(copy / "x.beton")
    with (copy / "x.beton").open("r+b") as file:
        data = file.read()
        file.seek(data.index(source.encoded(3).tobytes()))
        file.write(bytes(data.index(source.encoded(15).tobytes()) - file.tell()))
    with pytest.raises(DataError, match=r"of these 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 2 others cannot"):
        verify(copy / "x.beton")


def test_first_damage_among_shards_is_named(copy: Path) -> None:
    """The second shard holds the samples from 37 on, in blocks of 16."""
    flip(copy / "x" / "shard-000001.tar", (copy / "x" / "shard-000001.tar").stat().st_size - 1)
    with pytest.raises(DataError, match=r"shard-000001\.tar is damaged: samples 69 to 74 are not"):
        verify(copy / "x")
    flip(copy / "x" / "shard-000001.tar", 3000)
    with pytest.raises(DataError, match=r"shard-000001\.tar is damaged: samples 37 to 52 are not"):
        verify(copy / "x")
    flip(copy / "x" / "shard-000000.idx", 9)
    with pytest.raises(DataError, match=r"shard-000000\.idx is damaged: its index is not what was written"):
        verify(copy / "x")


@pytest.mark.parametrize("name", TARGETS)
def test_missing_and_shortened_files_are_named(name: str, copy: Path) -> None:
    path = copy / name if name == "x.beton" else copy / "x" / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{path.name} has \d+ bytes and not the \d+ that were written"):
        verify(copy / name)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name} cannot be read \(No such file"):
        verify(copy / name)


def test_renamed_beton_still_passes(copy: Path) -> None:
    (copy / "x.beton").rename(copy / "y.beton")
    (copy / "x.manifest.json").rename(copy / "y.manifest.json")
    verify(copy / "y.beton")


def test_manifest_is_checked_too(copy: Path) -> None:
    manifest = load_manifest(copy / "x.beton")
    files = [file.model_dump() for file in manifest.files]
    files[0]["blocks"][1]["sha256"] = "0" * 64
    changed = Manifest.model_validate(manifest.model_dump() | {"files": files})
    save_manifest(changed, manifest_path(copy / "x.beton"))
    with pytest.raises(DataError, match=r"x\.manifest\.json is damaged"):
        verify(copy / "x.beton")
    manifest_path(copy / "x.beton").write_text('{"format": 1, "classes": []}')
    with pytest.raises(DataError, match=r"x\.manifest\.json is not a manifest of this version"):
        verify(copy / "x.beton")
    manifest_path(copy / "x.beton").unlink()
    with pytest.raises(DataError, match=r"There is no manifest .*x\.manifest\.json"):
        verify(copy / "x.beton")


def other(value: object) -> object:
    """A value of the same kind that is not this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return "2001-01-01T00:00:00Z" if value[:2] == "20" else value + "x"
    if isinstance(value, list):
        return value + (value[:1] or [{"file": "x.jpg", "reason": "none"}])
    key, *_ = value
    return value | {key: other(value[key])}


@pytest.mark.parametrize("name", [*Manifest.model_fields, "manifest_sha256"])
def test_every_field_of_the_manifest_is_checked(name: str, copy: Path) -> None:
    path = manifest_path(copy / "x.beton")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content))  # another layout
    verify(copy / "x.beton")
    path.write_text(json.dumps(content | {name: other(content[name])}))
    words = "not a manifest of this version" if name == "format" else "damaged"
    with pytest.raises(DataError, match=rf"x\.manifest\.json is {words}"):
        verify(copy / "x.beton")


def test_images_are_the_sum_of_the_blocks(copy: Path) -> None:
    manifest = load_manifest(copy / "x.beton")
    changed = manifest.model_copy(update={"images": NUM_IMAGES + 1})
    save_manifest(changed, manifest_path(copy / "x.beton"))
    with pytest.raises(DataError, match=r"x\.manifest\.json is damaged"):
        verify(copy / "x.beton")


def test_result_of_an_instant_is_shown(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = load_manifest(made / "x.beton").model_copy(update={"seconds": 0.0})
    _show_result(manifest, made / "x.beton", as_json=False)
    assert "encoded anew: 0; 0.0 s.\n" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--raw-factor", "--max-bad"])
@pytest.mark.parametrize("number", ["nan", "inf"])
def test_numbers_without_end_are_refused(option: str, number: str, made: Path, tmp_path: Path) -> None:
    result = call("convert", made / "images", tmp_path / "y.beton", option, number)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert not (tmp_path / "y.beton").exists()


def test_verify_command_ends_with_2_on_damage(copy: Path) -> None:
    good = call("verify", copy / "x.beton", "--json")
    assert good.exit_code == 0
    assert json.loads(good.stdout)["images"] == NUM_IMAGES
    flip(copy / "x.beton", 5000)
    bad = call("verify", copy / "x.beton")
    assert bad.exit_code == 2
    (sentence,) = bad.stderr.splitlines()
    assert re.search(r"x\.beton is damaged: samples 0 to 15 are not what was written", sentence)


@pytest.mark.parametrize("name", TARGETS)
def test_inspect_shows_what_is_there(name: str, made: Path) -> None:
    found = inspect(made / name)
    source = open_source(made / "x.beton")
    height_N, width_N = source.sizes(np.arange(NUM_IMAGES))
    assert (found.images, found.images_jpg, found.images_raw) == (NUM_IMAGES, NUM_IMAGES, 0)
    assert found.images_per_class == {"a": 30, "b": 30, "c": 15}
    assert found.sizes.max_height == height_N.max()
    assert found.sizes.mean_width == pytest.approx(width_N.mean(), abs=0.01)
    is_small_N = np.maximum(height_N, width_N) <= 32
    assert found.sizes.longer_side == {32: is_small_N.sum(), 64: (~is_small_N).sum()}
    assert found.image_bytes == sum(len(source.encoded(i)) for i in range(NUM_IMAGES))
    assert found.provenance.images_copied == NUM_IMAGES
    result = call("inspect", made / name)
    assert result.exit_code == 0
    for words in (
        "75 JPEG",
        "3, with 15 to 30 images",
        str(made / "images"),
        load_manifest(made / name).sha256,
    ):
        assert words in result.stdout
    bars = [line for line in result.stdout.splitlines() if "#" in line]
    assert len(bars) == 2
    assert json.loads(call("inspect", made / name, "--json").stdout) == found.model_dump(mode="json")


def test_inspect_reads_what_ffcv_has_written(beton: Path) -> None:
    found, source = inspect(beton), open_source(beton)
    assert (found.images_jpg, found.images_raw, found.provenance) == (24, 0, None)
    assert found.images_per_class == {"0": 8, "1": 8, "2": 8}
    assert found.image_bytes == sum(len(source.encoded(i)) for i in range(24))
    assert call("inspect", beton).exit_code == 0


def test_inspect_explains_what_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no dataset at .*absent"):
        inspect(tmp_path / "absent")
    with pytest.raises(DataError, match=r"There is no manifest .*manifest\.json"):
        inspect(tmp_path)
    (tmp_path / "1.jpg").touch()
    with pytest.raises(DataError, match=r"1\.jpg is no dataset"):
        inspect(tmp_path / "1.jpg")
    (tmp_path / "x.beton").write_bytes(b"?" * 9000)
    with pytest.raises(DataError, match=r"x\.beton is not a \.beton file"):
        inspect(tmp_path / "x.beton")
