"""From a backbone to the figures of a detector: fine-tune, then find the objects of the test images."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from eval.detection.coco import open_coco
from eval.detection.coco_score import coco_figures, coco_results
from eval.detection.config import DetectionConfig
from eval.detection.finetune import Finetuning
from eval.detection.images import AnnotatedImages
from eval.detection.network import build_detector
from eval.detection.predict import predict
from eval.detection.reports import OnReport
from eval.detection.voc import open_voc
from eval.detection.voc_score import Detections, Truth, voc_figures
from eval.features import half_precision
from eval.result import DataSummary, EvalResult
from model.collectives import is_first_rank, world_size
from model.weights import BackboneWeights

# By protocol, what opens the images to train and to test on, from the root of the dataset.
OPEN = {"voc": open_voc, "coco": open_coco}
HAS_MASKS = {"voc": False, "coco": True}


def prepare(
    protocol: str,
    weights: BackboneWeights,
    train: AnnotatedImages,
    config: DetectionConfig,
    device: torch.device,
) -> Finetuning:
    """The detector of `protocol`, "voc" or "coco", before its first iteration; the seed fixes its new layers.

    Raises `ModelError` where the backbone has the small stem.
    """
    torch.manual_seed(config.seed)
    detector = build_detector(
        weights,
        len(train.classes),
        config,
        with_masks=HAS_MASKS[protocol],
        half=half_precision(device),
    )
    return Finetuning(detector, train, config, device)


def evaluate(
    protocol: str, finetuning: Finetuning, test: AnnotatedImages, on_report: OnReport | None = None
) -> EvalResult:
    """Test the fine-tuned detector; the same result on every rank.

    Raises `DataError` where an image cannot be read.
    """
    finetuning.measure_statistics(on_report)
    detector, config, device = finetuning.detector, finetuning.config, finetuning.device
    figures = SCORE[protocol](detector, test, device, config.workers, on_report)
    if world_size() > 1:
        shared = [figures]
        dist.broadcast_object_list(shared)
        (figures,) = shared
    half = detector.backbone.half
    settings = config.model_dump(mode="json") | {
        "precision": str(half or torch.float32).removeprefix("torch.")
    }
    data = {
        role: DataSummary(str(images.path), len(images), len(images.classes))
        for role, images in (("train", finetuning.images), ("test", test))
    }
    return EvalResult(f"detect-{protocol}", settings, data, figures)


def _score_voc(detector: GeneralizedRCNN, test: AnnotatedImages, *how: Any) -> dict[str, float]:
    def convert(index: int, found: dict[str, Tensor]) -> Detections:
        return Detections(*(found[name].cpu().numpy() for name in ("boxes", "labels", "scores")))

    found_N = predict(detector, test, convert, *how)
    if not is_first_rank():
        return {}
    records = (test[index] for index in range(len(test)))
    truths_N = [Truth(record.boxes_O4, record.labels_O, record.difficult_O) for record in records]
    return voc_figures(truths_N, found_N, len(test.classes))


def _score_coco(detector: GeneralizedRCNN, test: AnnotatedImages, *how: Any) -> dict[str, float]:
    def convert(index: int, found: dict[str, Tensor]) -> list[dict[str, Any]]:
        return coco_results(test[index].image_id, found)

    results_N = predict(detector, test, convert, *how)
    if not is_first_rank():
        return {}
    return coco_figures(test.path, [result for results in results_N for result in results])


SCORE: dict[str, Callable[..., dict[str, float]]] = {"voc": _score_voc, "coco": _score_coco}
