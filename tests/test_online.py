"""Evaluation during training: exact, the same on any number of ranks, and without a trace in the network."""

import copy
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm
from torch.utils._python_dispatch import TorchDispatchMode

from eval.config import EvalConfig
from eval.features import extract_features
from eval.knn import knn_accuracy
from eval.online import OnlineKnn
from model.config import ModelConfig
from model.twin import Twin
from model.weights import IMAGENET, Normalisation, load_backbone
from pipelines.errors import DataError
from pipelines.loaders import build_loader
from pipelines.source import FolderSource
from train.checkpoint import load_checkpoint
from train.config import RunConfig
from train.launch import launch
from train.loop import pretrain
from train.metrics import StepReport, read_metrics
from train.probe import OnlineProbe
from train.step import TrainStep

CPU = torch.device("cpu")
STEPS_PER_EPOCH = 3


def samples(steps: int, N: int, F: int, C: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Features around one direction per class, and their labels, of that many steps."""
    random = torch.Generator().manual_seed(17)
    centres_CF = torch.randn(C, F, generator=random)
    found = []
    for _ in range(steps):
        labels_N = torch.randint(C, (N,), generator=random)
        found.append(((centres_CF[labels_N] + torch.randn(N, F, generator=random)).to(dtype), labels_N))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probe_descends_the_cross_entropy_and_counts_before_it_learns(dtype: torch.dtype) -> None:
    """Against autograd and torch's own optimizer, in 64 bits."""
    F, C, lr = 11, 5, 3.7
    probe = OnlineProbe(F, C, lr, CPU)
    layer = nn.Linear(F, C).double()
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    right = []
    for features_NF, labels_N in samples(20, 13, F, C, dtype):
        probe.learn(features_NF, labels_N)
        logits_NC = layer(layer_norm(features_NF.double(), (F,)) / F**0.5)
        right.append(int((logits_NC.argmax(1) == labels_N).sum()))
        optimizer.zero_grad()
        cross_entropy(logits_NC, labels_N).backward()
        optimizer.step()
    expected_CE = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach()
    torch.testing.assert_close(probe.weight_CE.double(), expected_CE, rtol=1e-4, atol=1e-5)
    assert probe.right == sum(right) and sum(right[10:]) > 1.5 * sum(right[:3])


def test_probe_is_the_same_on_two_ranks(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    steps = samples(6, 10, 9, 4, torch.float32)
    torch.save((steps, 4, 2.5), tmp_path / "given.pt")
    run_ranks(2, "probe.py", tmp_path)
    probe = OnlineProbe(9, 4, 2.5, CPU)
    for features_NF, labels_N in steps:
        probe.learn(features_NF, labels_N)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first[0], second[0]) and first[1] == second[1] == probe.right
    torch.testing.assert_close(first[0], probe.weight_CE, rtol=1e-5, atol=1e-6)


def test_probe_reads_no_value_on_the_host() -> None:
    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            assert name not in ("_local_scalar_dense", "nonzero", "equal", "one_hot"), func
            return func(*args, **(kwargs or {}))

    probe = OnlineProbe(9, 4, 2.5, CPU)
    ((features_NF, labels_N),) = samples(1, 10, 9, 4, torch.float32)
    with NoWaiting():
        probe.learn(features_NF, labels_N)


@pytest.mark.parametrize("norm", ["twin", "torch"])
def test_features_are_those_of_the_first_view(norm: str) -> None:
    torch.manual_seed(2)
    twin = Twin(ModelConfig(backbone="resnet18", projector="8-8", norm=norm))
    views_VNCHW = torch.randn(2, 5, 3, 33, 33)
    plain = copy.deepcopy(twin)
    z_a_ND, z_b_ND, features_NF = twin(views_VNCHW, with_features=True)
    assert not features_NF.requires_grad and z_a_ND.requires_grad
    torch.testing.assert_close(features_NF, plain.backbone(views_VNCHW[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((z_a_ND, z_b_ND), copy.deepcopy(plain)(views_VNCHW), rtol=1e-3, atol=1e-3)


class Pair(nn.Module):
    """A small network for both views, without batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 5, stride=3), nn.ReLU(), nn.Flatten())
        self.projector = nn.Linear(150, 9)

    def forward(self, views_VNCHW: Tensor, with_features: bool = False) -> tuple[Tensor, ...]:
        features_NF, features_b_NF = (self.backbone(view) for view in views_VNCHW)
        z = self.projector(features_NF), self.projector(features_b_NF)
        return (*z, features_NF.detach()) if with_features else z


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_of_pieces_come_in_the_order_of_the_batch(precision: str) -> None:
    data = {"path": "none", "loader": "synthetic", "image_size": 18}
    found = []
    for pieces in (1, 3):
        train = {"batch_size": 12, "precision": precision, "micro_batches": pieces}
        config = RunConfig.model_validate({"run_dir": "none", "data": data, "train": train})
        loader = build_loader(config.data, seed=5, batch_size=12)
        batch = next(iter(loader.epoch(0)))
        loader.close()
        torch.manual_seed(4)
        step = TrainStep(config, Pair(), steps_per_epoch=1, keep_features=True)
        step(batch, 0)
        found.append(step.features_NF)
    assert found[0].shape == (12, 150) and found[0].std(dim=0).max() > 0.1
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, write_images: Callable) -> Path:
    """13 images in each of two classes, one grey brighter than the other."""
    folder = tmp_path_factory.mktemp("images") / "train"
    write_images(folder, ["dark", "light"], per_class=13, seed=3)
    return folder


def configure(run_dir: Path, images: Path, online: dict | None = None, **train: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": run_dir,
            "seed": 11,
            "data": {"path": images, "loader": "folder", "image_size": 32, "workers": 0},
            "model": {"backbone": "resnet18", "projector": "32-32"},
            "train": {
                "epochs": 3,
                "batch_size": 8,
                "precision": "fp32",
                "device": "cpu",
                "log_every": 1,
                "optim": {"lr_weights": 3.0, "lr_biases": 0.1, "warmup_epochs": 1},
                **train,
            },
            "eval": {
                "features": {"image_size": 32, "resize": 32, "workers": 1},
                "online": {"knn_every_epochs": 1, **(online or {})},
            },
        }
    )


def test_run_is_the_same_with_and_without_evaluation(images: Path, tmp_path: Path) -> None:
    """Bit for bit: weights, running statistics, momenta, and torch's random numbers."""
    states = []
    for name, online in (("off", {"probe": False, "knn_every_epochs": 0}), ("on", {})):
        config = configure(tmp_path / name, images, online, epochs=2)
        state = load_checkpoint(pretrain(config).checkpoint)
        states.append((state["model"], state["optimizer"]["state"], torch.get_rng_state()))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    off, on = (read_metrics(tmp_path / name) for name in ("off", "on"))
    assert [r["loss"] for r in off] == [r["loss"] for r in on]
    assert not any({"probe_accuracy", "knn_accuracy"} & record.keys() for record in off)
    assert all(0 <= record["probe_accuracy"] <= 1 for record in on)
    assert [r["step"] for r in on if "knn_accuracy" in r] == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]


def test_run_in_float64_is_evaluated_in_float32_and_goes_on_in_any_precision(
    images: Path, tmp_path: Path
) -> None:
    """Its neighbours are found, its backbone can be used, and momenta take the dtype of the weights."""
    for max_steps, precision in ((3, "fp64"), (4, "fp32"), (5, "fp64")):
        config = configure(tmp_path, images, max_steps=max_steps, precision=precision)
        state = load_checkpoint(pretrain(config).checkpoint)
        momenta = [of_one["mu"] for of_one in state["optimizer"]["state"].values()]
        tensors = [t for t in (*state["model"].values(), *momenta) if t.is_floating_point()]
        assert {t.dtype for t in tensors} == {torch.float64 if precision == "fp64" else torch.float32}
    assert [r["step"] for r in read_metrics(tmp_path) if "knn_accuracy" in r] == [3]
    backbone = load_backbone(tmp_path / "checkpoint.pt")
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


def test_resumed_run_has_the_probe_of_a_whole_one(images: Path, tmp_path: Path) -> None:
    """Bit for bit, and the same accuracies at the same steps; resumed in mid-epoch."""
    whole = configure(tmp_path / "whole", images, epochs=2)
    halves = configure(tmp_path / "halves", images, epochs=2, max_steps=4)
    probe = load_checkpoint(pretrain(whole).checkpoint)["probe"]
    pretrain(halves)
    resumed = load_checkpoint(pretrain(configure(tmp_path / "halves", images, epochs=2)).checkpoint)["probe"]
    assert probe["weight"].shape == (2, 513) and probe["weight"].abs().max() > 0
    assert torch.equal(resumed["weight"], probe["weight"])
    logs = [read_metrics(tmp_path / name) for name in ("whole", "halves")]
    accuracies = [[(r["step"], r["probe_accuracy"], r.get("knn_accuracy")) for r in log] for log in logs]
    assert accuracies[0] == accuracies[1]


def test_probe_accuracy_is_over_the_steps_since_the_last_report(images: Path, tmp_path: Path) -> None:
    every, third = (
        configure(tmp_path / str(n), images, {"knn_every_epochs": 0}, epochs=2, log_every=n) for n in (1, 3)
    )
    each: list[StepReport] = []
    few: list[StepReport] = []
    pretrain(every, each.append)
    pretrain(third, few.append)
    assert [r.step for r in few] == [1, 3, 6]
    known = [r.probe_accuracy for r in each]
    assert [r.probe_accuracy for r in few] == pytest.approx(
        [known[0], np.mean(known[1:3]), np.mean(known[3:])]
    )


def test_two_processes_evaluate_like_one(images: Path, tmp_path: Path) -> None:
    """Rank 0 does the kNN while the other one waits."""
    logs, weights = [], []
    for name, train_it in (("one", pretrain), ("two", lambda config: launch(config, 2))):
        config = configure(tmp_path / name, images, max_steps=4)
        weights.append(load_checkpoint(train_it(config).checkpoint)["probe"]["weight"])
        logs.append(read_metrics(tmp_path / name))
    one, two = logs
    assert [r["probe_accuracy"] for r in two] == [r["probe_accuracy"] for r in one]
    assert [r.get("knn_accuracy") for r in two] == [r.get("knn_accuracy") for r in one]
    assert (weights[0] - weights[1]).norm() < 1e-4 * weights[0].norm()
    assert all("exposed_communication_ms" not in r for r in one)
    assert two[-1]["exposed_communication_ms"] >= 0


def test_dataset_without_labels_is_said_once_and_trained_on(
    tmp_path: Path, write_images: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path / "train", ["all"], per_class=24)
    folder = tmp_path / "train" / "all"
    with caplog.at_level(logging.WARNING, "train"):
        state = load_checkpoint(pretrain(configure(tmp_path / "run", folder, max_steps=3)).checkpoint)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("train")]
    assert messages == [f"{folder} has no labels, so nothing is evaluated during training."]
    assert state["probe"] == {} and "probe_accuracy" not in read_metrics(tmp_path / "run")[-1]


KNN = EvalConfig.model_validate(
    {
        "features": {"image_size": 24, "resize": 28, "batch_size": 7, "workers": 2},
        "online": {"knn_bank": 9, "knn_queries": 1000},
    }
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, write_images: Callable) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("knn")
    write_images(root / "train", ["a", "b", "c"], per_class=35, seed=1)
    write_images(root / "test", ["a", "b", "c"], per_class=3, seed=2)
    return root / "train", root / "test"


def backbone() -> nn.Module:
    torch.manual_seed(6)
    return Twin(ModelConfig(backbone="resnet18", projector="8")).backbone


@pytest.mark.parametrize("has_test", [False, True])
def test_knn_is_that_of_the_chosen_images(folders: tuple[Path, Path], has_test: bool) -> None:
    """Against features of the whole datasets: at most 9 in the bank, and 105 / 20 images to classify."""
    train, test = map(FolderSource, folders)
    statistics = Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    network = backbone()
    before, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    accuracy = OnlineKnn(train, test if has_test else None, KNN, statistics).accuracy(network)

    assert all(module.training for module in network.modules())
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)

    order_N = torch.randperm(105, generator=torch.Generator().manual_seed(0))
    bank, queries = order_N[:9], order_N[9:14]
    features = [
        extract_features(network, s, KNN.features, "cpu", normalisation=statistics) for s in (train, test)
    ]
    if has_test:
        queries = torch.randperm(9, generator=torch.Generator().manual_seed(0))[:5]
    (all_NF, labels_N), (test_NF, test_labels_N) = features[0], features[1 if has_test else 0]
    knn = KNN.knn.model_copy(update={"k": 9})
    expected = knn_accuracy(all_NF[bank], labels_N[bank], test_NF[queries], test_labels_N[queries], knn)
    assert accuracy == expected


def test_knn_leaves_out_what_it_cannot_read_and_decodes_once(
    folders: tuple[Path, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(folders[0], tmp_path / "train")
    source = FolderSource(folder)
    chosen = torch.randperm(105, generator=torch.Generator().manual_seed(0))[:14].sort().values.tolist()
    Path(source.name(chosen[3])).write_bytes(b"no image")
    knn = OnlineKnn(FolderSource(folder), None, KNN, IMAGENET)
    first = knn.accuracy(backbone())
    assert "leaves out 1 images that cannot be read" in caplog.text and source.name(chosen[3]) in caplog.text
    for file in folder.rglob("*.jpg"):
        file.unlink()
    assert knn.accuracy(backbone()) == first
    with pytest.raises(DataError, match="cannot be read"):
        OnlineKnn(source, None, KNN, IMAGENET).accuracy(backbone())


def test_other_classes_to_classify_are_told_before_training(
    images: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    config = configure(tmp_path / "run", images, {"test_path": folders[1]})
    with pytest.raises(
        DataError, match=r"The classes of eval\.online\.test_path .*test are not those of .*train;"
    ):
        pretrain(config)
    assert not (tmp_path / "run").exists()
