"""A whole evaluation: from a file of weights and two image folders to figures, on any number of ranks."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torchmetrics.functional.classification import multiclass_accuracy

from eval.classifier import KEPT
from eval.config import EvalConfig, SemisupConfig
from eval.features import FeatureShare, extract_features, extract_share
from eval.knn import knn_accuracy
from eval.linear_fast import linear_fast
from eval.run import PROTOCOLS, VOC07, evaluate
from eval.scores import right_answers
from model.errors import ModelError
from model.weights import IMAGENET, Normalisation, read_weights
from pipelines.errors import DataError
from pipelines.source import FolderSource
from tests.dataset_trees import draw_voc_objects, write_voc
from tests.evaluations import (
    RANK_SETTINGS,
    RANK_SUBSETS,
    TRAINED,
    MemoryKeeper,
    Pixels,
    measure_voc07,
    task_of,
)
from tests.ranks.evaluations import rank
from tools.evaluate import EvalJob, run_job
from tools.work_folder import StoppedError
from train.errors import TrainingError
from train.launch import launch_ranks
from train.preemption import STOP_SIGNALS

CONFIG = EvalConfig.model_validate(
    {
        "features": {"image_size": 32, "resize": 32, "batch_size": 16, "workers": 0},
        "knn": {"k": 5},
        "linear": {"epochs": 10, "batch_size": 8, "lr": 0.03},
        "linear_fast": {"epochs": 20, "batch_size": 8, "passes": 0, "lr": [0.03, 0.1]},
        "semisup": {"epochs": 2, "batch_size": 10, "lr_backbone": 0.01, "lr_classifier": 0.03},
        "transfer": {"epochs": 20, "batch_size": 8, "lr": 0.1},
    }
)
STATISTICS = Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.fixture(scope="module")
def sources(
    tmp_path_factory: pytest.TempPathFactory, write_images: Callable
) -> tuple[FolderSource, FolderSource]:
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "train", ["a", "b", "c"], per_class=10, seed=1)
    write_images(folder / "test", ["a", "b", "c"], per_class=5, seed=2)
    return FolderSource(folder / "train"), FolderSource(folder / "test")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable) -> Path:
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    model = {"backbone": "resnet18"}
    write_checkpoint(path, model=model, data={"augment": STATISTICS._asdict()})
    return path


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS.keys() - {VOC07}))
def test_brightness_classes_are_told_apart_and_the_result_is_plain_data(
    checkpoint: Path, sources: tuple, protocol: str
) -> None:
    calls: list[tuple[int, int]] = []
    result = evaluate(protocol, checkpoint, *sources, CONFIG, "cpu", lambda *call: calls.append(call))
    # A few steps of fine-tuning leave batch-norm's running statistics behind; chance is a third.
    assert result.figures["top1"] > (0.5 if protocol == "semisup" else 0.9)
    assert [(data.images, data.classes) for data in result.data.values()] == [(30, 3), (15, 3)]
    section = protocol.replace("-", "_")
    assert CONFIG.model_dump(mode="json", include={"features", section}).items() <= result.settings.items()
    assert json.loads(json.dumps(asdict(result)))["protocol"] == protocol
    assert calls[-1][0] == calls[-1][1] and all(done <= total for done, total in calls)
    if protocol == "knn":
        assert calls == [(16, 45), (30, 45), (45, 45)]


def test_images_are_normalised_as_in_the_run(
    checkpoint: Path, sources: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Normalisation] = []

    def spy(*arguments: object, **options: Any) -> FeatureShare:
        used.append(options["normalisation"])
        return extract_share(*arguments, **options)

    monkeypatch.setattr("eval.task.extract_share", spy)
    evaluate("knn", checkpoint, *sources, CONFIG, "cpu")
    assert used == [STATISTICS] * 2
    evaluate("knn", read_weights(checkpoint).build(), *sources, CONFIG, "cpu")
    assert used[2:] == [IMAGENET] * 2


def test_backbone_and_its_file_give_the_same_figure(checkpoint: Path, sources: tuple) -> None:
    backbone = read_weights(checkpoint).build()
    result = evaluate("knn", backbone, *sources, CONFIG, "cpu", normalisation=STATISTICS)
    assert result == evaluate("knn", checkpoint, *sources, CONFIG, "cpu")
    train, test = (
        extract_features(backbone, source, CONFIG.features, "cpu", normalisation=STATISTICS)
        for source in sources
    )
    assert result.figures == {"top1": knn_accuracy(*train, *test, CONFIG.knn)}


def test_checkpoint_keeps_the_eval_settings_of_its_run(tmp_path: Path, write_checkpoint: Callable) -> None:
    write_checkpoint(
        tmp_path / "checkpoint.pt", model={"backbone": "resnet18"}, eval=CONFIG.model_dump(mode="json")
    )
    weights = read_weights(tmp_path / "checkpoint.pt")
    assert EvalConfig.model_validate(weights.eval_settings) == CONFIG
    torch.save(weights.state, tmp_path / "backbone.pth")
    assert read_weights(tmp_path / "backbone.pth").eval_settings is None


def test_datasets_with_different_classes_are_one_sentence(
    checkpoint: Path, sources: tuple, tmp_path: Path, write_images: Callable
) -> None:
    write_images(tmp_path / "other", ["a", "b", "d"], per_class=1)
    with pytest.raises(DataError, match=r"The classes of .*train and .*other differ \(only one has 'c'\)"):
        evaluate("knn", checkpoint, sources[0], FolderSource(tmp_path / "other"), CONFIG, "cpu")


def test_labels_that_no_class_has_are_one_sentence(
    checkpoint: Path, sources: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources[1], "labels_N", sources[1].labels_N + 1)
    with pytest.raises(DataError, match=r"^[^\n]*test has labels from 1 to 3, but 3 classes; [^\n]*\.$"):
        evaluate("linear", checkpoint, *sources, CONFIG, "cpu")


def test_right_answers_are_those_of_torchmetrics_and_scikit_learn() -> None:
    random = torch.Generator().manual_seed(1)
    for classes in (3, 5, 11):
        logits = torch.randn(211, classes, generator=random)
        labels = torch.randint(classes, (211,), generator=random)
        top1, top5 = (right_answers(logits, labels) / 211).tolist()
        accuracy = partial(multiclass_accuracy, logits, labels, classes, average="micro")
        assert top1 == pytest.approx(accuracy().item())
        assert top5 == pytest.approx(accuracy(top_k=min(5, classes)).item())
        if classes > 5:
            scored = top_k_accuracy_score(labels, logits, k=5, labels=range(classes))
            assert top5 == pytest.approx(scored)
    with pytest.raises(ModelError, match="not all finite"):
        right_answers(torch.tensor([[0.0, float("nan")]]), torch.tensor([0]))


@pytest.fixture
def job(checkpoint: Path, sources: tuple, tmp_path: Path) -> EvalJob:
    """Fine-tuning on two of every three images."""
    train, test = (source.path for source in sources)
    return EvalJob("semisup", checkpoint, train, test, CONFIG, "cpu", tmp_path / "result.json", percent=66)


def test_two_ranks_find_what_one_finds(
    job: EvalJob, tmp_path: Path, write_images: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "train", ["a", "b", "c"], per_class=7, seed=1)
    write_images(tmp_path / "test", ["a", "b", "c"], per_class=5, seed=2)
    write_voc(
        tmp_path / "VOCdevkit",
        {"trainval": draw_voc_objects(60, 1, seed=1), "test": draw_voc_objects(45, 1000, seed=2)},
    )
    job = replace(job, protocol="knn", percent=None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    reports: list[tuple[int, int]] = []
    waiting = launch_ranks(partial(rank, tmp_path, job), 2, reports.append)
    assert set(STOP_SIGNALS) <= waiting  # of rank 0, which is started first
    assert reports[-1] == (45, 45)
    written = json.loads(job.out.read_text())
    assert not job.out.with_suffix(".work").exists()
    assert written == json.loads(json.dumps(run_job(job)))

    sources = FolderSource(tmp_path / "train"), FolderSource(tmp_path / "test")
    task = task_of(*sources, RANK_SETTINGS)
    features, labels = extract_features(
        task.backbone, sources[0], task.config.features, "cpu", normalisation=IMAGENET
    )
    keepers = {protocol: MemoryKeeper() for protocol in TRAINED}
    figures = {
        protocol: TRAINED[protocol](
            task_of(*sources, RANK_SETTINGS, keeper=keeper, subset_K=RANK_SUBSETS.get(protocol))
        )
        for protocol, keeper in keepers.items()
    }
    fast, voc07 = asdict(linear_fast(task)), measure_voc07(tmp_path / "VOCdevkit", Pixels())
    for number in range(2):
        found = torch.load(tmp_path / f"{number}.pt", weights_only=False)
        torch.testing.assert_close(found["features"][0], features, rtol=1e-5, atol=1e-6)
        assert torch.equal(found["features"][1], labels)
        assert found["linear-fast"] == fast
        assert found["voc07"] == voc07
        for protocol, keeper in keepers.items():
            assert found[protocol][0] == figures[protocol]
            if number == 0:  # which keeps the state
                for part in ("classifier", "backbone"):
                    for name, value in keeper.kept[KEPT][part].items():
                        other = found[protocol][1][part][name]
                        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-5)


def test_signal_ends_a_job_that_the_same_command_completes(job: EvalJob) -> None:
    calls: list[tuple[int, int]] = []
    expected = run_job(job, calls.append)["figures"]
    job.out.unlink()

    def stop(report: tuple[int, int]) -> None:
        if report == calls[len(calls) // 2]:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError, match=r"^Stopped by SIGTERM; the same command goes on from .*\.$"):
        run_job(job, stop)
    assert not job.out.exists()
    other = replace(job, config=CONFIG.model_copy(update={"semisup": SemisupConfig(epochs=1, batch_size=20)}))
    from_the_start: list[tuple[int, int]] = []
    run_job(other, from_the_start.append)
    assert len(from_the_start) == 2 and job.out.with_suffix(".work").exists()  # not that evaluation's work
    rest: list[tuple[int, int]] = []
    assert run_job(job, rest.append)["figures"] == expected
    assert 0 < len(rest) < len(calls) / 2
    assert not job.out.with_suffix(".work").exists()


def test_result_that_cannot_be_written_is_refused_before_the_work(job: EvalJob, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    calls: list[tuple[int, int]] = []
    for out in (tmp_path / "file" / "result.json", tmp_path):
        with pytest.raises(TrainingError, match=rf"^Cannot write the result to {out}: [^\n]*--out\.$"):
            run_job(replace(job, out=out), calls.append)
    assert calls == []


def test_drawn_images_are_listed_and_the_list_gives_the_same_result(job: EvalJob, tmp_path: Path) -> None:
    drawn = run_job(job)
    assert (drawn["settings"]["percent"], drawn["data"]["train"]["images"]) == (66.67, 20)
    listed = Path(drawn["settings"]["subset"])
    assert listed.read_text().count("\n") == 20
    again = run_job(replace(job, percent=None, subset=listed, out=tmp_path / "again.json"))
    assert again["figures"] == drawn["figures"]


def test_a_dataset_without_labels_is_refused(checkpoint: Path, sources: tuple, monkeypatch) -> None:
    for source in sources:
        monkeypatch.setattr(source, "classes", [])
    with pytest.raises(DataError, match=r"train has no labels; evaluate on .*\.$"):
        evaluate("knn", checkpoint, *sources, CONFIG, "cpu")
