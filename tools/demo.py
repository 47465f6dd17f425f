"""The main job in small, from nothing to a report: `fastbarlow demo`.

Shape legend: V views (2), N samples, C colours (3), H and W pixels, D embedding width.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.features import FeatureShare, extract_features
from eval.knn import knn_accuracy
from eval.linear_fast import choose_and_train
from model.loss.reference import cross_correlation
from model.twin import Twin
from model.weights import Normalisation
from pipelines.augment import distort
from pipelines.loaders import build_loader
from pipelines.source import Source, open_source
from tools.convert import convert
from tools.demo_data import make_demo_images
from tools.profile.run import profile_run
from tools.report import (
    accuracy_section,
    correlation_section,
    loss_section,
    profile_section,
    render_report,
    settings_section,
    views_section,
)
from train.checkpoint import load_checkpoint, save_checkpoint
from train.config import RunConfig, load_config
from train.distributed import process_group
from train.errors import TrainingError
from train.loop import build_twin, pretrain
from train.metrics import StepReport, read_metrics

PARTS = ("train", "val")
SHOWN_IMAGES = 12
CORRELATION_SAMPLES = 512  # chance correlations of independent features are then about 1 / sqrt(512) = 0.04
PIXELS_SIDE = 16  # images are shrunk to this size where their raw pixels serve as features
PROFILE_STEPS = 10


def run_demo(
    out: Path,
    config_path: Path,
    on_phase: Callable[[str], None] = lambda phase: None,
    on_step: Callable[[StepReport], None] | None = None,
    required_gain_points: float | None = None,
) -> dict[str, Any]:
    """Do the main job in the folder `out` with the recipe `config_path`; returns the figures as plain data.

    1. draw the images, unless they are there from an earlier call
    2. convert them
    3. save the untrained network and evaluate it, and raw pixels
    4. pretrain, from the start even where an earlier call has left a run
    5. evaluate the trained network
    6. profile some steps
    7. write the report

    `on_phase` is called with each phase's name. Where the kNN accuracy gains fewer than
    `required_gain_points`, a sentence in the report and under "shortfall" in the result says so.
    Raises `DataError`, `ConfigError`, `ModelError`, `TrainingError`.
    """
    clock = _Clock(on_phase)
    run_dir = out / "run"
    data = {part: out / f"{part}.beton" for part in PARTS}
    overrides = {"run_dir": run_dir, "data.path": data["train"], "train.checkpoint.resume": False}
    config = load_config(config_path, [f"{key}={value}" for key, value in overrides.items()])

    with clock.phase("draw the images"):  # 1
        images = out / "images"
        if not images.exists():  # it appears only when all images are there
            make_demo_images(images)

    with clock.phase("convert"):  # 2
        for part, target in data.items():
            convert(images / part, target, workers=max(1, config.data.workers), resume=False)
        train, val = (open_source(path) for path in data.values())

    with process_group(config.train.device) as world:
        device = world.device
    evaluate = _Evaluation(config, train, val, device)

    with clock.phase("evaluate untrained"):  # 3
        untrained = build_twin(config, device)
        _save_untrained(untrained, config, len(train))
        accuracies = {
            "raw pixels": evaluate(nn.Sequential(nn.AdaptiveAvgPool2d(PIXELS_SIDE), nn.Flatten())),
            "untrained network": evaluate(untrained.backbone),
        }

    with clock.phase("pretrain"):  # 4
        result = pretrain(config, on_step)

    with clock.phase("evaluate trained"):  # 5
        trained = build_twin(config, device)
        trained.load_state_dict(load_checkpoint(result.checkpoint, device)["model"])
        accuracies["trained network"] = evaluate(trained.backbone)

    with clock.phase("profile"):  # 6
        profile = profile_run(config, PROFILE_STEPS, run_dir / "profile")

    with clock.phase("write the report"):  # 7
        views_VNCHW = _first_views(config, device)
        sections = [
            views_section(_to_pixels(views_VNCHW[:, :SHOWN_IMAGES], config)),
            loss_section(read_metrics(run_dir)),
            correlation_section(
                _correlation(untrained, views_VNCHW), _correlation(trained, views_VNCHW), views_VNCHW.shape[1]
            ),
            accuracy_section(accuracies, len(train.classes)),
            profile_section(profile),
            settings_section(_settings(config, len(train), len(val)) | profile["environment"]),
        ]
        knn_before, knn_after = (accuracies[f"{which} network"]["kNN"] for which in ("untrained", "trained"))
        gain = 100 * (knn_after - knn_before)
        summary = (
            f"A {config.model.backbone} learnt from {len(train)} images without labels, in {result.step} "
            f"steps. The kNN accuracy of its features went from {knn_before:.1%} to {knn_after:.1%}, that is "
            f"{gain:+.1f} points."
        )
        shortfall = None
        if required_gain_points is not None and gain < required_gain_points:
            shortfall = (
                f"This recipe must gain at least {required_gain_points:g} points, but gained {gain:.1f}: "
                f"the training does not work as it should on this machine."
            )
            summary = f"{summary} {shortfall}"
        report = out / "report.html"
        _write(report, render_report("fastbarlow: a Barlow Twins run", summary, sections))

    return {
        "accuracies": accuracies,
        "gain_points": gain,
        "shortfall": shortfall,
        "seconds": clock.seconds,
        "steps": result.step,
        "report": str(report),
        "profile": profile,
    }


def _save_untrained(twin: Twin, config: RunConfig, num_samples: int) -> None:
    """The network at step 0, in the run directory, as a checkpoint that the evaluations read."""
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"Cannot make the folder {config.run_dir}: {error.strerror}.") from error
    state = {"config": config.model_dump(mode="json"), "model": twin.state_dict()}
    nothing_yet = {"optimizer": {}, "scaler": {}, "step": 0, "num_samples": num_samples}
    save_checkpoint(state | nothing_yet, config.run_dir / "untrained.pt")


def _write(report: Path, page: str) -> None:
    try:
        report.write_text(page, encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"Cannot write the report {report}: {error.strerror}.") from error


def _settings(config: RunConfig, train_images: int, val_images: int) -> dict[str, str]:
    """The main settings for people; `config.yaml` in the run directory has all of them."""
    data, model, train = config.data, config.model, config.train
    return {
        "training images": f"{train_images}, {data.image_size} pixels, loader {data.loader}",
        "held-out images": str(val_images),
        "network": f"{model.backbone}{' with the small stem' if model.small_stem else ''}",
        "projector": model.projector,
        "loss": f"redundancy weighs {model.loss.off_diagonal_weight}, algorithm {model.loss.algorithm}",
        "training": f"{train.epochs} epochs, batch {train.batch_size}, {train.precision}, seed {config.seed}",
        "kNN": f"k = {config.eval.knn.k}, temperature {config.eval.knn.temperature}",
        "linear probe": f"{config.eval.linear_fast.epochs} epochs on centre crops, its rate chosen on "
        "held-out training images",
    }


class _Clock:
    """Wall time of each phase, by name."""

    def __init__(self, on_phase: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._on_phase = on_phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._on_phase(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


@dataclass(frozen=True)
class _Evaluation:
    """Both protocols on frozen features, for several networks alike."""

    config: RunConfig
    train: Source
    val: Source
    device: torch.device

    def __call__(self, backbone: nn.Module) -> dict[str, float]:
        """Shares of right answers by kNN and by the linear probe."""
        augment, settings = self.config.data.augment, self.config.eval
        normalisation = Normalisation(augment.mean, augment.std)
        features = [
            extract_features(backbone, source, settings.features, self.device, normalisation=normalisation)
            for source in (self.train, self.val)
        ]
        train, val = (FeatureShare(*of_part, start=0, total=len(of_part[0])) for of_part in features)
        classes, probe = len(self.train.classes), settings.linear_fast
        return {
            "kNN": knn_accuracy(*features[0], *features[1], settings.knn, self.device),
            "linear": choose_and_train([train], val, classes, probe, self.device).top1,
        }


def _first_views(config: RunConfig, device: torch.device) -> Tensor:
    """Both views (V, N, C, H, W) float32 of the first training samples, as the network sees them."""
    samples = min(CORRELATION_SAMPLES, len(open_source(config.data.path)))
    with closing(build_loader(config.data, seed=config.seed, batch_size=samples, device=device)) as loader:
        batch = next(iter(loader.epoch(0)))
    return distort(batch.views_VNHWC, batch.params, config.data.augment, torch.float32)


def _correlation(twin: Twin, views_VNCHW: Tensor) -> np.ndarray:
    """Cross-correlation (D, D) of the views' embeddings; batch-norm works as in training."""
    with torch.inference_mode():
        return cross_correlation(*twin.train()(views_VNCHW)).cpu().numpy()


def _to_pixels(views_VNCHW: Tensor, config: RunConfig) -> np.ndarray:
    """Undo the normalisation: (V, N, H, W, C) uint8."""
    augment = config.data.augment
    mean_C, std_C = (
        torch.tensor(values, device=views_VNCHW.device) for values in (augment.mean, augment.std)
    )
    pixels_VNHWC = (views_VNCHW.permute(0, 1, 3, 4, 2) * std_C + mean_C) * 255
    return pixels_VNHWC.round().clamp(0, 255).to(torch.uint8).cpu().numpy()
