"""A recipe small enough to plan in no time, for the tests of the plan."""

from typing import Any

from tools.plan.cluster import make_cluster
from tools.plan.plan import Planner
from train.config import RunConfig

SMALL = {
    "run_dir": "none",
    "data": {"path": "none", "image_size": 32},
    "model": {"backbone": "resnet18", "projector": "48-64"},
    "train": {"batch_size": 96, "precision": "bf16", "optim": {"warmup_epochs": 0}},
}


def small(**sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        {name: {**SMALL.get(name, {}), **own} for name, own in sections.items()}
        | {name: section for name, section in SMALL.items() if name not in sections}
    )


def planner(
    config: RunConfig, gpus: int = 4, gpu: str = "h100", link: float | None = 12.5, **options: Any
) -> Planner:
    return Planner(config, make_cluster(gpu, gpus, 8, link), **options)
