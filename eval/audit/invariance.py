"""Which distortions an encoder ignores: the features of an image beside those of its distorted self.

Shape legend: N images, F feature width, C colours (3), S side of the crop in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchvision.transforms import functional as tv

from eval.audit.distortions import DISTORTIONS, Distortion
from eval.audit.sample import Encoder
from eval.crops import CentreCrops
from eval.features import features_of_crops
from eval.progress import Progress
from pipelines.errors import DataError
from pipelines.source import Source, read_image


@dataclass(frozen=True)
class Spread:
    """Of cosine similarities over the images: mean, and the 10th and 90th percentile."""

    mean: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Curve:
    """One distortion by strength.

    `ignored` puts the mean on a scale from 0, as unlike as two images, to 1, the very same features.
    """

    name: str
    unit: str
    is_papers: bool
    strengths: tuple[float, ...]
    similarities: list[Spread]
    ignored: list[float]


@dataclass(frozen=True)
class Invariance:
    """All curves, and the similarity of two different images, against which they are to be read."""

    images: int
    baseline: Spread
    curves: list[Curve]


def measure_invariance(
    encoder: Encoder,
    source: Source,
    indices_N: Sequence[int],
    device: torch.device,
    seed: int,
    progress: Progress | None = None,
    distortions: Sequence[Distortion] = DISTORTIONS,
) -> Invariance:
    """Distort these images in all ways, each strength with random numbers of its own from `seed`.

    1. the crops that the network sees, and their features
    2. the similarity of each to another image, the baseline
    3. for each distortion and strength: distort, embed, compare
    `progress` counts the distorted images. Raises `DataError` where an image cannot be read.
    """
    clean = _Images(source, indices_N, encoder)
    plain_NF = _embed(encoder, clean.crops, device)  # 1
    shift = np.random.default_rng(seed).integers(1, len(clean.crops))
    baseline = _spread(cosine_similarity(plain_NF, plain_NF.roll(int(shift), 0)))  # 2
    total, done, curves = len(clean.crops) * sum(len(each.strengths) for each in distortions), 0, []
    for kind, distortion in enumerate(distortions):  # 3
        spreads = []
        for level, strength in enumerate(distortion.strengths):
            random = np.random.default_rng([seed, kind, level])
            images = clean.distorted(distortion, strength, random)
            spreads.append(_spread(cosine_similarity(plain_NF, _embed(encoder, images, device))))
            done += len(clean.crops)
            if progress is not None:
                progress(done, total)
        room = max(1 - baseline.mean, 1e-12)
        ignored = [(spread.mean - baseline.mean) / room for spread in spreads]
        described = distortion.name, distortion.unit, distortion.is_papers, distortion.strengths
        curves.append(Curve(*described, spreads, ignored))
    return Invariance(len(clean.crops), baseline, curves)


class _Images:
    """The crops that the network sees, and on demand the same part of the originals."""

    def __init__(self, source: Source, indices_N: Sequence[int], encoder: Encoder) -> None:
        self._source, self._indices_N, self._config = source, indices_N, encoder.features
        found = CentreCrops(source, encoder.features)
        self.crops = []
        for index in indices_N:
            crop_CSS = found[index]
            if isinstance(crop_CSS, DataError):
                raise crop_CSS
            self.crops.append(tv.to_pil_image(crop_CSS))

    def distorted(
        self, distortion: Distortion, strength: float, random: np.random.Generator
    ) -> list[Image.Image]:
        """All of them, of the size that the network sees."""
        if not distortion.needs_original:
            return [distortion.apply(crop, strength, random) for crop in self.crops]
        size = self._config.image_size
        return [
            distortion.apply(self._central_square(index), strength, random).resize(
                (size, size), Image.BICUBIC
            )
            for index in self._indices_N
        ]

    def _central_square(self, index: int) -> Image.Image:
        """What the centre crop shows, in the pixels of the file."""
        image = read_image(self._source, index)
        side = max(1, round(min(image.size) * self._config.image_size / self._config.resize))
        return tv.center_crop(image, [side, side])


def _embed(encoder: Encoder, images: list[Image.Image], device: torch.device) -> Tensor:
    """(N, F), float32, on the CPU."""
    encoder.backbone.to(device, memory_format=torch.channels_last).eval()
    size, features = encoder.features.batch_size, []
    for start in range(0, len(images), size):
        crops_NCSS = torch.stack([tv.pil_to_tensor(image) for image in images[start : start + size]])
        features.append(
            features_of_crops(encoder.backbone, crops_NCSS, device, encoder.normalisation).float().cpu()
        )
    return torch.cat(features)


def _spread(similarities_N: Tensor) -> Spread:
    p10, p90 = similarities_N.double().quantile(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    return Spread(similarities_N.double().mean().item(), p10, p90)
