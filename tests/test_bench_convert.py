"""The benchmark of the conversion lets all do the same work on the same files, and leaves nothing behind."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder
from typer.testing import CliRunner

from pipelines.errors import DataError
from pipelines.source import open_source, read_image
from tools.bench import convert as bench
from tools.bench.convert import FFCV_PROGRAM, bench_convert
from tools.cli import app


def run_command(*arguments: object) -> dict:
    result = CliRunner().invoke(app, ["bench", "convert", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_command_measures_all_writers_on_the_same_files(
    image_folder: Path, tmp_path: Path, check_figures: Callable[[dict, int], None]
) -> None:
    options = ["--max-side", 60, "--images", 31, "--workers", 2, "--repeats", 1, "--folder", tmp_path]
    report = run_command(image_folder, *options)
    check_figures(report, 1)
    files = [Path(path) for path, _ in ImageFolder(str(image_folder)).samples]
    assert report["bytes"] == sum(file.stat().st_size for file in files + files[: 31 - 24])
    assert [row["writer"] for row in report["rows"]] == ["fastbarlow", "ffcv", "copy"]
    assert all(row["all_seconds"][0] > 0 for row in report["rows"])
    assert list(tmp_path.iterdir()) == []


def test_ratios_are_taken_turn_by_turn(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text("import time; print(time.time() % 1 + 0.1)")
    monkeypatch.setattr(bench, "FFCV_PROGRAM", program)
    options = ["--max-side", 400, "--max-side", 60, "--images", 24, "--workers", 1, "--repeats", 3]
    rows = {(row["max_side"], row["writer"]): row for row in run_command(image_folder, *options)["rows"]}
    assert list(rows) == [(side, name) for side in (400, 60) for name in ("fastbarlow", "ffcv", "copy")]
    for (side, name), row in rows.items():
        assert len(row["all_seconds"]) == 3
        assert row["images_per_second"] == 24 / median(row["all_seconds"])
        for other in ("ffcv", "copy"):
            ratios = np.array(rows[side, other]["all_seconds"]) / row["all_seconds"]
            assert row[f"ratio_to_{other}"] == pytest.approx(np.median(ratios))
        assert name == "fastbarlow" or row["images_copied"] == {"copy": 24, "ffcv": 0}[name]
    assert rows[400, "fastbarlow"]["images_copied"] == 24
    assert rows[60, "fastbarlow"]["images_copied"] < 8


def test_ffcv_program_writes_all_images_in_that_size(image_folder: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "x.beton"
    arguments = [image_folder, dataset, 64, 90, 2]
    result = subprocess.run(
        [sys.executable, FFCV_PROGRAM, *map(str, arguments)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) > 0
    source = open_source(dataset)
    assert source.labels_N.tolist() == ImageFolder(str(image_folder)).targets
    for index, (file, _) in enumerate(ImageFolder(str(image_folder)).samples):
        with Image.open(file) as image:
            longer = max(image.size)
        assert max(read_image(source, index).size) == min(longer, 64)


def test_bad_images_are_not_measured(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / "good.png")
    (tmp_path / "a" / "bad.jpg").write_text("no image")
    num_bytes = bench._write_tree(tmp_path, tmp_path / "tree", 3)
    written = sorted((tmp_path / "tree").glob("*/*"))
    assert [file.name for file in written] == ["00000000.png", "00000001.png", "00000002.png"]
    assert num_bytes == sum(file.stat().st_size for file in written)
    (tmp_path / "a" / "good.png").unlink()
    with pytest.raises(DataError, match="holds no image that can be converted"):
        bench._write_tree(tmp_path / "a", tmp_path / "other", 3)


def test_ffcv_failure_is_one_sentence(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "program.py"
    broken.write_text("raise SystemExit('out of order')")
    monkeypatch.setattr(bench, "FFCV_PROGRAM", broken)
    with pytest.raises(DataError, match=r"FFCV's writer failed \(out of order\)"):
        bench_convert(image_folder, max_sides=[64], num_images=3, workers=1, repeats=1, folder=tmp_path)


def test_folder_that_cannot_be_written_is_one_sentence(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be written \(No such file or directory"):
        bench_convert(image_folder, max_sides=[64], workers=1, folder=tmp_path / "nowhere")
