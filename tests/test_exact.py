"""Training does not depend on the number of ranks: the same weights and statistics after ten real steps.

In fp64 the promise can be tested sharply. In fp32 a sum in another order now and then carries an activation
to the other side of zero, and the kink of its ReLU makes a visible difference of that, which is a small one
at a lower learning rate.

`EXACT_TABLE=FILE python -m pytest tests/test_exact.py` also writes what is measured here as a table.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from model.loss.reference import reference_loss
from model.twin import Twin
from pipelines.augment import distort
from pipelines.loaders import build_loader
from tests.ranks.exact import ThinResNet
from train.checkpoint import load_checkpoint
from train.config import RunConfig, save_config
from train.loop import build_twin, pretrain
from train.optim import build_optimizer
from train.schedule import learning_rates

pytestmark = pytest.mark.timeout(600)  # all runs belong to the first test, and a busy machine is slow

STEPS, STEPS_PER_EPOCH = 10, 3  # of 8 of the 24 images
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-4}
LEARNING_RATE_SHARE = {"fp64": 1.0, "fp32": 0.03}
REFERENCE_WORLD_SIZE = 16
STOPS = {
    1: 2,
    2: 4,
    4: 8,
}  # where the run that changes its number of ranks is stopped, each time in mid-epoch
TABLE_HEAD = """\
| ranks | loss | norm | precision | micro_batches | loader | weights | statistics | share of the way |
|---:|---|---|---|---:|---|---:|---:|---:|
"""


class Case(NamedTuple):
    algorithm: str
    norm: str
    precision: str
    micro_batches: int
    sync_bn: str = "all"

    @property
    def loader(self) -> str:
        return "ffcv" if self.micro_batches > 1 else "folder"

    @property
    def steps(self) -> int:
        """Less where pieces of 2 samples of one rank alone make tenfold of a rounding error in each step."""
        return 5 if self.sync_bn != "all" and self.micro_batches > 1 else STEPS

    def __str__(self) -> str:
        return "-".join(map(str, self))


# In fp64 any two of the settings meet in all their values.
SYNCHRONISED = [
    Case("dense", "twin", "fp64", 1),
    Case("dense", "torch", "fp64", 2),
    Case("gram", "twin", "fp64", 2),
    Case("gram", "torch", "fp64", 1),
    Case("sharded", "twin", "fp64", 1),
    Case("sharded", "torch", "fp64", 2),
    Case("dense", "torch", "fp32", 1),
    Case("gram", "twin", "fp32", 1),
    Case("sharded", "twin", "fp32", 2),
]
CHANGING = Case("gram", "twin", "fp64", 2)
LOCAL = [Case("dense", "twin", "fp64", 1, "none"), Case("gram", "twin", "fp32", 1, "none")]
PARTLY = [
    LOCAL[0],
    Case("gram", "torch", "fp64", 2, "none"),
    Case("sharded", "twin", "fp64", 2, "projector"),
    Case("gram", "torch", "fp64", 1, "projector"),
]

State = dict[str, Any]  # a checkpoint


class Runs:
    """The runs of all cases on 1, 2 and 4 ranks."""

    def __init__(self, folder: Path, image_folder: Path, beton: Path) -> None:
        self.folder = folder
        self.data_paths = {"folder": image_folder, "ffcv": beton}

    def config(self, case: Case, name: str, max_steps: int | None = None) -> RunConfig:
        share = LEARNING_RATE_SHARE[case.precision]
        loss = {"algorithm": case.algorithm, "reference_world_size": REFERENCE_WORLD_SIZE}
        data = {"path": self.data_paths[case.loader], "loader": case.loader, "image_size": 33, "workers": 0}
        model = {"norm": case.norm, "sync_bn": case.sync_bn, "loss": loss}
        train = {
            "max_steps": max_steps or case.steps,
            "precision": case.precision,
            "micro_batches": case.micro_batches,
            "optim": {"lr_weights": 300 * share, "lr_biases": share, "warmup_epochs": 0.1},
        }
        return RunConfig.model_validate(
            {
                "run_dir": self.folder / name,
                "seed": 3,
                "data": data,
                "model": {"backbone": "resnet18", "zero_init_residual": False, "projector": "21-30", **model},
                "train": {"epochs": 4, "batch_size": 8, "device": "cpu", **train},
                "eval": {"online": {"knn_every_epochs": 0}},
            }
        )

    def planned(self, ranks: int) -> list[RunConfig]:
        cases = [*SYNCHRONISED, *([*PARTLY, LOCAL[1]] if ranks == 2 else [])]
        configs = [self.config(case, f"{case}-on-{ranks}") for case in cases]
        return [*configs, self.config(CHANGING, "changing", STOPS[ranks])]

    def state(self, case: Case, ranks: int) -> State:
        return load_checkpoint(self.folder / f"{case}-on-{ranks}" / "checkpoint.pt")

    def start(self, case: Case) -> dict[str, Tensor]:
        return build_twin(self.config(case, "none"), torch.device("cpu")).state_dict()


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, image_folder: Path, beton: Path, run_ranks: Callable[..., None]
) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.backbones.ResNet", ThinResNet)
        runs = Runs(tmp_path_factory.mktemp("exact"), image_folder, beton)
        for config in runs.planned(1):
            pretrain(config)
        for ranks in (2, 4):
            recipes = []
            for number, config in enumerate(runs.planned(ranks)):
                recipes.append(runs.folder / f"{ranks}-{number}.yaml")
                save_config(config, recipes[-1])
            run_ranks(ranks, "exact.py", *recipes)
        yield runs


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    lines: list[str] = []
    yield lines
    if "EXACT_TABLE" in os.environ:
        Path(os.environ["EXACT_TABLE"]).write_text(TABLE_HEAD + "\n".join(lines) + "\n")


class Difference(NamedTuple):
    """Norms of differences; weights and biases, of which there are few, count for themselves."""

    weights: float  # over the norm of the weights, or of the biases if that is more
    statistics: float  # the running ones, over their norm
    share_of_way: float  # over the norm of the way from the start, whatever has the largest


def difference(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor]) -> Difference:
    assert one.keys() == other.keys() == start.keys()
    kinds: dict[str, list[str]] = {"weights": [], "biases": [], "statistics": []}
    for name, tensor in one.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, other[name]), name
        elif "running" in name:
            kinds["statistics"].append(name)
        else:
            kinds["weights" if tensor.ndim > 1 else "biases"].append(name)

    def joined(state: dict[str, Tensor], kind: str) -> Tensor:
        return torch.cat([state[name].double().flatten() for name in kinds[kind]])

    of_norm, of_way = {}, {}
    for kind in kinds:
        distance = (joined(one, kind) - joined(other, kind)).norm()
        way = (joined(one, kind) - joined(start, kind)).norm()
        assert way > 0.001 * joined(one, kind).norm(), f"the {kind} hardly change"
        of_norm[kind], of_way[kind] = float(distance / joined(one, kind).norm()), float(distance / way)
    return Difference(max(of_norm["weights"], of_norm["biases"]), of_norm["statistics"], max(of_way.values()))


@pytest.mark.parametrize("case", SYNCHRONISED, ids=str)
def test_weights_and_statistics_do_not_depend_on_the_number_of_ranks(
    case: Case, runs: Runs, table: list[str]
) -> None:
    one, start = runs.state(case, 1)["model"], runs.start(case)
    for ranks in (2, 4):
        found = difference(one, runs.state(case, ranks)["model"], start)
        settings = (ranks, case.algorithm, case.norm, case.precision, case.micro_batches, case.loader)
        table.append("| " + " | ".join([*map(str, settings), *(f"{value:.1e}" for value in found)]) + " |")
        assert max(found.weights, found.statistics) < TOLERANCE[case.precision], (ranks, found)


@pytest.mark.parametrize("case", LOCAL, ids=str)
def test_a_statistic_of_each_rank_alone_would_be_seen(case: Case, runs: Runs) -> None:
    whole, start = runs.state(case._replace(sync_bn="all"), 1)["model"], runs.start(case)
    found = difference(whole, runs.state(case, 2)["model"], start)
    assert min(found.weights, found.statistics) > 10 * TOLERANCE[case.precision]
    assert found.share_of_way > 0.1


def test_run_may_change_its_number_of_ranks_in_mid_epoch(runs: Runs) -> None:
    """1, 2, 4 and again 1 process, against one that was never stopped. The probe learns in float32."""
    whole = runs.state(CHANGING, 1)
    assert load_checkpoint(runs.folder / "changing" / "checkpoint.pt")["step"] == STOPS[4]
    changed = load_checkpoint(pretrain(runs.config(CHANGING, "changing")).checkpoint)
    found = difference(whole["model"], changed["model"], runs.start(CHANGING))
    assert max(found) < 1e-9
    momenta = [
        torch.cat([of_one["mu"].flatten() for of_one in state["optimizer"]["state"].values()])
        for state in (whole, changed)
    ]
    assert (momenta[0] - momenta[1]).norm() < 1e-9 * momenta[0].norm()
    torch.testing.assert_close(changed["probe"], whole["probe"], rtol=1e-4, atol=1e-6)
    assert changed["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]


@pytest.mark.parametrize("case", PARTLY, ids=str)
def test_norms_that_are_not_synchronised_have_the_statistics_of_each_rank(case: Case, runs: Runs) -> None:
    """And rank 0's running statistics; those that are synchronised have those of all ranks."""
    expected = plain_training(runs.config(case, "none"), ranks=2)
    found = difference(expected, runs.state(case, 2)["model"], runs.start(case))
    assert max(found) < 1e-9


def plain_training(config: RunConfig, ranks: int) -> dict[str, Tensor]:
    """What `model.sync_bn` says, in one process: torch's own batch-norm, called with what it may see."""
    twin = build_twin(
        config.model_copy(update={"model": config.model.model_copy(update={"norm": "torch"})}),
        torch.device("cpu"),
    )
    train, per_rank = config.train, config.train.batch_size // ranks
    optimizer = build_optimizer(twin, train.optim)
    with closing(build_loader(config.data, seed=config.seed, batch_size=train.batch_size)) as loader:
        batches = [batch for epoch in range(train.epochs) for batch in loader.epoch(epoch)]
    for step, batch in enumerate(batches[: train.max_steps]):
        views_VNCHW = distort(batch.views_VNHWC, batch.params, config.data.augment, torch.float64)
        pieces = [
            [of_rank[:, start :: train.micro_batches] for of_rank in views_VNCHW.split(per_rank, dim=1)]
            for start in range(train.micro_batches)
        ]
        embeddings = [embed_plainly(twin, piece, config.model.sync_bn) for piece in pieces]
        z_a_ND, z_b_ND = (torch.cat(of_view) for of_view in zip(*embeddings, strict=True))
        optimizer.zero_grad()
        (reference_loss(z_a_ND, z_b_ND, config.model.loss)[0] / REFERENCE_WORLD_SIZE).backward()
        rates = {"batch_size": train.batch_size, "steps_per_epoch": STEPS_PER_EPOCH, "epochs": train.epochs}
        optimizer.set_rates(learning_rates(step, train.optim, **rates))
        optimizer.step()
    return twin.state_dict()


def embed_plainly(twin: Twin, ranks_VnCHW: list[Tensor], sync_bn: str) -> tuple[Tensor, Tensor]:
    """The embeddings of one piece's samples on all ranks, rank by rank for each view."""

    def on_each_rank(layers: nn.Module, views_by_rank: list[list[Tensor]]) -> list[list[Tensor]]:
        outputs = []
        for rank, views in enumerate(views_by_rank):
            # Only rank 0's running statistics are kept.
            own = {} if rank == 0 else {name: buffer.clone() for name, buffer in layers.named_buffers()}
            outputs.append([functional_call(layers, own, (view,)) for view in views])
        return outputs

    features = on_each_rank(twin.backbone, [list(views_VnCHW) for views_VnCHW in ranks_VnCHW])
    if sync_bn == "projector":
        z_a_ND, z_b_ND = (twin.projector(torch.cat(of_view)) for of_view in zip(*features, strict=True))
    else:
        embeddings = on_each_rank(twin.projector, features)
        z_a_ND, z_b_ND = (torch.cat(of_view) for of_view in zip(*embeddings, strict=True))
    return z_a_ND, z_b_ND
