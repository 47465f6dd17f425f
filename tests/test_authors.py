"""Twenty steps in float64 follow the authors' algorithm (`authors_algorithm.py`), on any number of ranks."""

from functools import cache
from itertools import islice
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from model.twin import Twin, build_projector
from pipelines.augment import distort
from pipelines.batch import Batch
from pipelines.loaders import build_loader
from tests.authors_algorithm import AuthorsLars, AuthorsRun, BarlowTwins, Ranks
from tools.bench.step_authors import AuthorsStep
from train.config import RunConfig
from train.step import TrainStep

ROWS, STEPS, WIDTHS = 12, 20, [24, 20, 28]
FEATURES = 128  # of a ResNet-18 whose last two stages are left out, for speed
TOLERANCE = 1e-8
BN_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Course(NamedTuple):
    """The loss at each step, and parameters and buffers after the last one."""

    losses_S: Tensor
    state: dict[str, Tensor]


def configure(model: dict | None = None, loss: dict | None = None, **optim: float) -> RunConfig:
    """One step in an epoch, so that 20 steps see the whole of the schedule."""
    settings = {
        "run_dir": "none",
        "data": {"path": "none", "loader": "synthetic", "image_size": 16},
        "model": {
            "backbone": "resnet18",
            "projector": "-".join(map(str, WIDTHS)),
            "loss": loss or {},
            **(model or {}),
        },
        "train": {"batch_size": ROWS, "precision": "fp32", "epochs": STEPS, "optim": optim},
    }
    return RunConfig.model_validate(settings)


class DoubleTwin(Twin):
    """In float64, and without the last two stages of the backbone."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config.model)
        shorten(self.backbone)
        self.projector = build_projector(FEATURES, WIDTHS, config.model.norm)
        self.to(torch.float64, memory_format=torch.channels_last)

    def forward(self, views_VNCHW: Tensor, with_features: bool = False) -> tuple[Tensor, ...]:
        return super().forward(views_VNCHW.double(), with_features)


def shorten(resnet: nn.Module) -> None:
    resnet.layer1, resnet.layer2 = resnet.layer1[:1], resnet.layer2[:1]
    resnet.layer3, resnet.layer4 = nn.Identity(), nn.Identity()


@cache
def start() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return DoubleTwin(configure()).state_dict()


@cache
def batches() -> list[Batch]:
    loader = build_loader(configure().data, seed=5, batch_size=ROWS, device=torch.device("cpu"))
    found = list(islice(loader.epoch(0), STEPS))
    loader.close()
    return found


def views_of(batch: Batch) -> Tensor:
    """The pixels that our network gets, in float64."""
    return distort(batch.views_VNHWC, batch.params, configure().data.augment, torch.float32).double()


def ours(config: RunConfig) -> Course:
    twin = DoubleTwin(config)
    twin.load_state_dict(start())
    step = TrainStep(config, twin, steps_per_epoch=1)
    losses = [step(batch, number).total for number, batch in enumerate(batches())]
    return Course(torch.stack(losses), twin.state_dict())


@cache
def theirs(world_size: int, rates: float) -> Course:
    model = BarlowTwins("resnet18", WIDTHS, Ranks(world_size))
    shorten(model.backbone)
    model.projector[0] = nn.Linear(FEATURES, WIDTHS[0], bias=False)
    model.double().load_state_dict(start(), strict=False)
    optimizer = AuthorsLars(model)
    lr = {"lr_weights": 0.2 * rates, "lr_biases": 0.0048 * rates}
    run = AuthorsRun(model, optimizer, ROWS, epochs=STEPS, steps_per_epoch=1, **lr)
    losses = [run.train(views_of(batch), number) for number, batch in enumerate(batches())]
    return Course(torch.tensor(losses, dtype=torch.float64), model.state_dict())


def distance(course: Course, reference: Course) -> float:
    """The largest relative difference: of the loss of a step, or of a tensor against its largest element."""
    differences = [(course.losses_S / reference.losses_S - 1).abs().max()]
    for name, value in course.state.items():
        expected = reference.state[name]
        assert value.shape == expected.shape and value.isfinite().all()
        differences.append((value - expected).abs().max() / expected.abs().max())
    return torch.stack(differences).max().item()


@pytest.mark.parametrize(
    ("rates", "world_size", "norm", "algorithm"),
    [
        (1, 1, "torch", "dense"),
        (1, 1, "twin", "gram"),
        (40, 2, "twin", "sharded"),
        (40, 4, "twin", "dense"),
        (40, 4, "torch", "gram"),
    ],
)
def test_losses_weights_and_statistics_are_the_authors(
    rates: float, world_size: int, norm: str, algorithm: str
) -> None:
    """At their learning rates, and at larger ones that take the weights far from where they started."""
    loss = {"algorithm": algorithm, "reference_world_size": world_size}
    optim = {"lr_weights": 0.2 * rates, "lr_biases": 0.0048 * rates} if rates != 1 else {}
    course, reference = ours(configure({"norm": norm}, loss, **optim)), theirs(world_size, rates)
    assert reference.state.keys() - course.state.keys() == {f"bn.{name}" for name in BN_BUFFERS}
    assert distance(course, Course(reference.losses_S, start())) > 1  # the weights have moved
    assert distance(course, reference) < TOLERANCE


@pytest.mark.parametrize(
    ("loss", "optim"),
    [
        ({"reference_world_size": 2}, {}),
        ({"off_diagonal_weight": 0.005}, {}),
        ({}, {"weight_decay": 0}),
        ({}, {"warmup_epochs": 9}),
    ],
)
def test_any_other_setting_is_far_from_the_authors(loss: dict, optim: dict) -> None:
    assert distance(ours(configure(loss=loss, **optim)), theirs(1, 1)) > 1000 * TOLERANCE


def test_true_gradient_is_not_that_of_several_ranks() -> None:
    optim = {"lr_weights": 8.0, "lr_biases": 0.192}
    assert distance(ours(configure(**optim)), theirs(4, 40)) > 0.1


def test_step_that_the_benchmark_measures_is_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure({"norm": "torch"})
    monkeypatch.setattr("tools.bench.step_authors.Twin", lambda _: DoubleTwin(config))
    bench = AuthorsStep(config, torch.device("cpu"), steps_per_epoch=1)
    bench.network.load_state_dict(start())
    bench.loss.double()
    losses = [bench(views_of(batch), number) for number, batch in enumerate(batches())]
    assert distance(Course(torch.stack(losses), bench.network.state_dict()), theirs(1, 1)) < TOLERANCE
