"""What a detector finds in all images of a dataset, on one process or on many."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eval.detection.batches import images_to_test
from eval.detection.finetune import on_device
from eval.detection.images import AnnotatedImages
from eval.detection.reports import OnReport, Pace
from model.collectives import is_first_rank, world_size


@torch.inference_mode()
def predict(
    detector: nn.Module,
    images: AnnotatedImages,
    convert: Callable[[int, dict[str, Tensor]], Any],
    device: torch.device,
    workers: int,
    on_report: OnReport | None = None,
) -> list[Any]:
    """`convert(index, found)` for each image, in their order, on the first rank; on the others nothing.

    `found` has boxes (D, 4) in the image's own pixels, labels (D,), scores (D,) and, of a Mask R-CNN, masks
    (D, 1, H, W) in 0..1. The ranks share the images; reports are of the first one, as if all went at its
    pace. Raises `DataError` where an image cannot be read.
    """
    detector.eval()
    rank, ranks = dist.get_rank() if world_size() > 1 else 0, world_size()
    converted = []
    pace = Pace("testing images", len(images), on_report)
    for place, sample in enumerate(images_to_test(images, workers, rank, ranks)):
        (found,) = detector(on_device([sample], device)[0])
        converted.append(convert(rank + place * ranks, found))
        pace.step(min((place + 1) * ranks, len(images)))
    parts = _gathered(converted)
    return [parts[index % ranks][index // ranks] for index in range(len(images))] if parts else []


def _gathered(value: Any) -> list[Any]:
    """`value` of every rank on the first one, nothing on the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_first_rank() else None
    dist.gather_object(value, values)
    return values or []
