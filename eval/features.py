"""Frozen features of a whole dataset, on one process or shared out over several.

Shape legend: N samples, n of them on this rank, C colours (3), H and W pixels, F feature width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from eval.config import FeaturesConfig
from eval.crops import CentreCrops, loading
from eval.feature_memory import allocate_features
from eval.keeper import KEEP_NOTHING, Keeper
from eval.progress import Progress
from model.collectives import column_range as share_range
from model.collectives import column_shares, gather_rows, world_size
from model.errors import ModelError
from model.weights import IMAGENET, Normalisation
from pipelines.errors import DataError
from pipelines.source import Source

BLOCK_IMAGES = 4096  # whose features are kept together: a minute of a CPU's work, seconds of a GPU's


@dataclass(frozen=True)
class FeatureShare:
    """Features of this rank's consecutive samples of a dataset; those of one process are all."""

    features_nF: Tensor  # float32, on the CPU
    labels_n: Tensor  # int64
    start: int  # the first one's position in the dataset
    total: int  # samples of all ranks


def extract_features(
    backbone: nn.Module,
    source: Source,
    config: FeaturesConfig,
    device: torch.device | str,
    progress: Progress | None = None,
    *,
    normalisation: Normalisation = IMAGENET,
    images: Dataset | None = None,
    keeper: Keeper = KEEP_NOTHING,
    name: str = "features",
) -> tuple[Tensor, Tensor]:
    """Features (N, F) float32 and labels (N,) int64 of all images of `source` in its order, on the CPU.

    The same on every rank of the process group, if there is one: each has extracted its share. See
    `extract_share` for what is computed, and for errors.
    """
    share = extract_share(
        backbone,
        source,
        config,
        device,
        progress,
        normalisation=normalisation,
        images=images,
        keeper=keeper,
        name=name,
    )
    return gathered(share, torch.device(device)), torch.from_numpy(source.labels_N.copy())


def extract_share(
    backbone: nn.Module,
    source: Source,
    config: FeaturesConfig,
    device: torch.device | str,
    progress: Progress | None = None,
    *,
    normalisation: Normalisation = IMAGENET,
    images: Dataset | None = None,
    keeper: Keeper = KEEP_NOTHING,
    name: str = "features",
) -> FeatureShare:
    """Features of this rank's equal share of the images.

    1. take the finished blocks of `BLOCK_IMAGES` that are kept, under `name`
    2. run the backbone on the images of the others, and keep each block as it is finished

    `images` are `CentreCrops` unless others are given, in the same form. `backbone` is moved to `device` and
    put into evaluation mode. On CUDA it runs under bfloat16 autocast (float16 where the GPU has no bfloat16),
    elsewhere in float32. `progress` counts this rank's images, scaled to all.

    Raises `DataError` where an image cannot be read, a worker process dies or there are fewer images than
    ranks, `ModelError` where a feature is not finite.
    """
    device, total = torch.device(device), len(source)
    if total < world_size():
        raise DataError(
            f"There are {total} images in {source.path} for {world_size()} processes; check the path, or "
            f"start fewer."
        )
    backbone.to(device, memory_format=torch.channels_last).eval()
    mine = range(total)[share_range(total)]
    blocks = _parts(mine, BLOCK_IMAGES)
    features_nF: Tensor | None = None
    done = 0

    def put(indices: range, batch_NF: Tensor) -> Tensor:
        """Into its place; gives all features so far."""
        nonlocal done
        into_nF = features_nF
        if into_nF is None:  # allocated once: joining a list would need twice the memory
            into_nF = allocate_features(len(mine), batch_NF.shape[1])
        into_nF[indices.start - mine.start : indices.stop - mine.start] = batch_NF
        done += len(indices)
        if progress is not None:
            progress(done * total // len(mine), total)
        return into_nF

    missing = []
    for block in blocks:  # 1
        block_NF = keeper.load(f"{name}-{block.start}-{block.stop}")
        if block_NF is None:
            missing.append(block)
        else:
            features_nF = put(block, block_NF)

    batches = [batch for block in missing for batch in _parts(block, config.batch_size)]
    by_end = {block.stop: block for block in missing}
    with loading(images or CentreCrops(source, config), batches, config, device) as found:  # 2
        for batch, crops_NCHW in zip(batches, found, strict=True):
            features_nF = put(batch, features_of_crops(backbone, crops_NCHW, device, normalisation))
            if batch.stop in by_end:
                block = by_end[batch.stop]
                block_NF = features_nF[block.start - mine.start : block.stop - mine.start]
                if not block_NF.isfinite().all():
                    raise ModelError(
                        "The backbone's features are not all finite numbers; its training has diverged."
                    )
                keeper.save(f"{name}-{block.start}-{block.stop}", block_NF.clone())
            keeper.stop_if_asked()
    assert features_nF is not None
    labels_n = torch.from_numpy(source.labels(np.array(mine)))
    return FeatureShare(features_nF, labels_n, mine.start, total)


def gathered(share: FeatureShare, device: torch.device) -> Tensor:
    """All ranks' features (N, F) in the order of the dataset, on the CPU of every rank.

    They pass through `device`, where the process group's backend works, `BLOCK_IMAGES` of each rank at once.
    """
    if world_size() == 1:
        return share.features_nF
    sizes = column_shares(share.total)
    starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
    width = share.features_nF.shape[1]
    features_NF = allocate_features(share.total, width)
    for first in range(0, max(sizes), BLOCK_IMAGES):
        count = min(BLOCK_IMAGES, max(sizes) - first)
        sent = torch.zeros(count, width, device=device)  # every rank must send as many rows
        piece = share.features_nF[first : first + count]
        sent[: len(piece)] = piece
        for rank, rows in enumerate(gather_rows(sent).cpu().split(count)):
            valid = max(0, min(count, sizes[rank] - first))
            features_NF[starts[rank] + first : starts[rank] + first + valid] = rows[:valid]
    return features_NF


def features_of_crops(
    backbone: nn.Module, crops_NCHW: Tensor, device: torch.device, normalisation: Normalisation
) -> Tensor:
    """Features (N, F) of uint8 crops (N, C, H, W) on `device`, where the backbone is, in evaluation mode."""
    with torch.inference_mode(), _autocast(device):
        return backbone(normalised(crops_NCHW, device, normalisation))


def normalised(crops_NCHW: Tensor, device: torch.device, normalisation: Normalisation) -> Tensor:
    """uint8 crops as the network takes them: float32 on `device`, channels-last."""
    mean_C11, std_C11 = (torch.tensor(values, device=device).view(-1, 1, 1) for values in normalisation)
    images_NCHW = crops_NCHW.to(device, non_blocking=True).float().div_(255)
    return images_NCHW.sub_(mean_C11).div_(std_C11).contiguous(memory_format=torch.channels_last)


def feature_width(
    backbone: nn.Module, config: FeaturesConfig, device: torch.device, normalisation: Normalisation
) -> int:
    """F, by a crop that is run through the backbone, which is on `device` and in evaluation mode."""
    crop_1CHW = torch.zeros(1, 3, config.image_size, config.image_size, dtype=torch.uint8)
    return features_of_crops(backbone, crop_1CHW, device, normalisation).shape[1]


def _parts(indices: range, size: int) -> list[range]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def half_precision(device: torch.device) -> torch.dtype | None:
    """What convolutions compute in: bfloat16 on GPUs that have it, else float16; None for float32 on CPUs."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _autocast(device: torch.device) -> torch.autocast:
    half = half_precision(device)
    return torch.autocast(device.type, dtype=half, enabled=half is not None)
