"""Frozen features of a whole dataset.

Shape legend: N samples, C colours (3), H and W pixels, F feature width.
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from eval.config import FeaturesConfig
from eval.feature_memory import allocate_features
from model.errors import ModelError
from model.weights import IMAGENET, Normalisation
from pipelines.errors import DataError
from pipelines.source import Source, read_image
from pipelines.workers import deaths_explained, start_worker, stop_workers, taken

Progress = Callable[[int, int], None]  # images done, images in all


def extract_features(
    backbone: nn.Module,
    source: Source,
    config: FeaturesConfig,
    device: torch.device | str,
    progress: Progress | None = None,
    *,
    normalisation: Normalisation = IMAGENET,
    images: Dataset | None = None,
) -> tuple[Tensor, Tensor]:
    """Features (N, F) float32 and labels (N,) int64 of all images of `source` in its order, on the CPU.

    The images are those of the authors' evaluate.py: short side resized (bilinear, antialiased), centre crop,
    normalised; unless others are given as `images`, in the form of `CentreCrops`. `backbone` is moved to
    `device` and put into evaluation mode. On CUDA it runs under bfloat16 autocast (float16 where the GPU has
    no bfloat16), elsewhere in float32.

    Raises `DataError` where an image cannot be read or a worker process dies, `ModelError` where a feature is
    not finite.
    """
    device = torch.device(device)
    backbone.to(device, memory_format=torch.channels_last).eval()
    loader = DataLoader(
        images or CentreCrops(source, config),
        batch_size=config.batch_size,
        num_workers=config.workers,
        collate_fn=_stack,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
    )
    features_NF: Tensor | None = None
    done = 0
    advice = "lower eval.features.workers or eval.features.batch_size"
    batches = iter(loader)
    with deaths_explained(advice), ExitStack() as at_the_end:
        at_the_end.callback(stop_workers, batches)
        for crops_NCHW in taken(batches, advice):
            if isinstance(crops_NCHW, DataError):
                raise crops_NCHW
            batch_NF = features_of_crops(backbone, crops_NCHW, device, normalisation)
            if not batch_NF.isfinite().all():
                raise ModelError(
                    "The backbone's features are not all finite numbers; its training has diverged."
                )
            if features_NF is None:  # allocated once: joining a list would need twice the memory
                features_NF = allocate_features(len(source), batch_NF.shape[1])
            features_NF[done : done + len(batch_NF)] = batch_NF
            done += len(batch_NF)
            if progress is not None:
                progress(done, len(source))
    if features_NF is None:
        raise DataError(f"There are no images in {source.path}; check the path.")
    return features_NF, torch.from_numpy(source.labels_N.copy())


def features_of_crops(
    backbone: nn.Module, crops_NCHW: Tensor, device: torch.device, normalisation: Normalisation
) -> Tensor:
    """Features (N, F) of uint8 crops (N, C, H, W) on `device`, where the backbone is, in evaluation mode."""
    mean_C11, std_C11 = (torch.tensor(values, device=device).view(-1, 1, 1) for values in normalisation)
    with torch.inference_mode(), _autocast(device):
        images_NCHW = crops_NCHW.to(device, non_blocking=True).float().div_(255)
        images_NCHW = images_NCHW.sub_(mean_C11).div_(std_C11)
        return backbone(images_NCHW.contiguous(memory_format=torch.channels_last))


class CentreCrops(Dataset):
    """Sample i as the uint8 centre crop (C, H, W), or as the `DataError` that tells why there is none.

    Errors travel as values because a DataLoader turns a worker's exception into a page of traceback.
    """

    def __init__(self, source: Source, config: FeaturesConfig) -> None:
        self._source = source
        self._transform = v2.Compose(
            [
                v2.Resize(config.resize),
                v2.CenterCrop(config.image_size),
                v2.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Tensor | DataError:
        try:
            return self._transform(read_image(self._source, index))
        except DataError as error:
            return error


def _stack(crops: list[Tensor | DataError]) -> Tensor | DataError:
    """(N, C, H, W), or the first error."""
    return next((crop for crop in crops if isinstance(crop, DataError)), None) or torch.stack(crops)


def half_precision(device: torch.device) -> torch.dtype | None:
    """What convolutions compute in: bfloat16 on GPUs that have it, else float16; None for float32 on CPUs."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _autocast(device: torch.device) -> torch.autocast:
    half = half_precision(device)
    return torch.autocast(device.type, dtype=half, enabled=half is not None)
