"""Result files say what was measured, and only those of this very checkpoint are taken for its own."""

from pathlib import Path

import pytest
import torch

from eval.result import DataSummary, EvalResult
from tools.results import default_place, file_hash, records_of, result_record, write_record
from train.errors import TrainingError

RESULT = EvalResult("knn", {"k": 5}, {"test": DataSummary("data/val.beton", 7, 3)}, {"top1": 0.25})


def test_results_are_found_by_what_the_checkpoint_holds(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(b"weights")
    record = result_record(RESULT, checkpoint, "resnet18", torch.device("cpu"))
    assert record["checkpoint_sha256"] == file_hash(checkpoint)
    place = default_place(checkpoint, "knn", Path("data/val.beton"))
    assert place == tmp_path / "eval" / "checkpoint-knn-val.json"
    write_record(record, place)
    (tmp_path / "eval" / "broken.json").write_text("{")
    assert records_of(checkpoint) == [record]
    assert record["architecture"] == "resnet18"
    assert record["figures"] == {"top1": 0.25} and record["data"]["test"]["images"] == 7
    checkpoint.write_bytes(b"other weights")
    assert records_of(checkpoint) == []


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"--out\.$"):
        write_record({}, tmp_path / "file" / "result.json")
