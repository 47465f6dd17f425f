"""The distortions as the authors apply them: one image at a time, with PIL, in 8 bits.

This is what every other implementation is measured against. It follows the `Transform` of the authors' code,
with the random numbers handed in. Note that PIL's Gaussian blur is three box blurs.

Shape legend: H, W height and width; C channels (3).
"""

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from pipelines.batch import ViewParams
from pipelines.config import AugmentConfig


def crop_and_resize(image: Image.Image, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """uint8 (size, size, C): the `box` (top, left, height, width) of an RGB image, resized as the authors do.

    PIL's bicubic resize always filters against aliasing.
    """
    resized = tv.resized_crop(image, *map(int, box), [size, size], InterpolationMode.BICUBIC)
    return np.asarray(resized)


def crop_views(image: Image.Image, box_V4: Tensor, views_VSS3: np.ndarray) -> None:
    """Write both views' crops of an image into `views_VSS3`, uint8."""
    for box, view_SS3 in zip(box_V4.tolist(), views_VSS3, strict=True):
        view_SS3[:] = crop_and_resize(image, box, view_SS3.shape[0])


def distort_one(
    view_HWC: np.ndarray, params: ViewParams, view: int, sample: int, config: AugmentConfig
) -> Tensor:
    """float32 (C, H, W): one uint8 crop, distorted with the numbers of `params[view, sample]`, normalised."""
    pixels_CHW = tv.to_tensor(distort_pixels_one(view_HWC, params, view, sample))
    return tv.normalize(pixels_CHW, torch.tensor(config.mean), torch.tensor(config.std))


def distort_pixels_one(view_HWC: np.ndarray, params: ViewParams, view: int, sample: int) -> np.ndarray:
    """uint8 (H, W, C): one uint8 crop, distorted with the numbers of `params[view, sample]`."""
    image = Image.fromarray(np.ascontiguousarray(view_HWC))
    if params.flip_VN[view, sample]:
        image = tv.hflip(image)
    if params.jitter_VN[view, sample]:
        image = _jitter(image, params, view, sample)
    if params.grayscale_VN[view, sample]:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if params.blur_VN[view, sample] > 0:
        image = image.filter(ImageFilter.GaussianBlur(params.blur_VN[view, sample].item()))
    if params.solarize_VN[view, sample]:
        image = ImageOps.solarize(image)
    return np.array(image)


def _jitter(image: Image.Image, params: ViewParams, view: int, sample: int) -> Image.Image:
    """The four colour operations in the drawn order.

    A shift of hue by exactly 0 is left out, as `ColorJitter` does where its hue is 0.
    """
    hue = params.hue_VN[view, sample].item()
    operations = (
        lambda x: tv.adjust_brightness(x, params.brightness_VN[view, sample].item()),
        lambda x: tv.adjust_contrast(x, params.contrast_VN[view, sample].item()),
        lambda x: tv.adjust_saturation(x, params.saturation_VN[view, sample].item()),
        lambda x: tv.adjust_hue(x, hue) if hue else x,
    )
    for which in params.order_VN4[view, sample].tolist():
        image = operations[which](image)
    return image
