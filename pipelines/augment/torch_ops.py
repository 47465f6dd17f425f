"""The distortions of a whole batch with torch, on any device, in float32 without rounding to 8 bits.

Every sample has its own numbers, and no operation waits for the host on an accelerator. Differences to the
reference (PIL): no rounding between the operations (PIL cuts off fractions after each blend), and the blur is
a sampled Gaussian where PIL chains three box blurs; `tests/test_augment.py` holds the measured distances.

Shape legend: V views (2), N samples, C channels (3), H = W = S image size in pixels, T taps of the blur.
Pixels are float32 from 0 to 255 until the normalisation.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from pipelines.batch import ViewParams
from pipelines.config import AugmentConfig

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the codes in ViewParams.order_VN4
SOLARIZE_FROM = 128
BLUR_REACH = 4  # taps on either side, in sigmas; the first one left out weighs 3e-4 of the middle one

# Leaving samples out takes a look at their numbers, for which an accelerator would make the host wait.
_SELECTING_DEVICES = {"cpu"}
# Pixels (samples x S x S) at a time: what a CPU's caches hold, and what bounds an accelerator's memory.
_CHUNK_PIXELS_CPU, _CHUNK_PIXELS = 2**19, 2**23


@torch.no_grad()
def distort(views_VNHWC: Tensor, params: ViewParams, config: AugmentConfig, dtype: torch.dtype) -> Tensor:
    """Distort and normalise both views: (V, N, C, H, W) of `dtype`, each view contiguous as channels-last.

    `views_VNHWC` are square uint8 crops; `params` are on the same device.
    """
    num_samples, size = views_VNHWC.shape[1:3]
    device = views_VNHWC.device
    scale_C11, offset_C11 = _normalisation(config.mean, config.std, device)
    chunk = max(1, (_CHUNK_PIXELS_CPU if device.type == "cpu" else _CHUNK_PIXELS) // size**2)
    out_VNHWC = torch.empty(views_VNHWC.shape, dtype=dtype, device=device)
    with torch.autocast(device.type, enabled=False):  # else the blur would run in half precision
        for v, view in enumerate(config.views):
            for start in range(0, num_samples, chunk):
                part = v, slice(start, start + chunk)
                x_NCHW = _distort_part(views_VNHWC[part], params, part, view.blur_sigma[1])
                out_VNHWC[part] = x_NCHW.mul_(scale_C11).add_(offset_C11).permute(0, 2, 3, 1)
    return out_VNHWC.permute(0, 1, 4, 2, 3)


def _distort_part(view_NHWC: Tensor, params: ViewParams, part: tuple[int, slice], max_sigma: float) -> Tensor:
    """The samples `part` (view, range of samples), distorted in the authors' order; a new tensor."""
    x_NCHW = view_NHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    x_NCHW = _on_chosen(params.flip_VN[part], lambda x: x.flip(-1), x_NCHW)
    x_NCHW = jitter(
        x_NCHW,
        params.order_VN4[part],
        params.brightness_VN[part],
        params.contrast_VN[part],
        params.saturation_VN[part],
        params.hue_VN[part],
    )
    x_NCHW = _on_chosen(params.grayscale_VN[part], lambda x: gray(x).expand_as(x), x_NCHW)
    sigma_N = params.blur_VN[part]
    x_NCHW = _on_chosen(sigma_N > 0, partial(gaussian_blur, max_sigma=max_sigma), x_NCHW, sigma_N)
    return _on_chosen(params.solarize_VN[part], solarize, x_NCHW)


def _on_chosen(
    chosen_N: Tensor, operation: Callable[..., Tensor], x_NCHW: Tensor, *numbers_N: Tensor
) -> Tensor:
    """`operation(x, *numbers)` for the chosen samples, the others as they are; may overwrite `x_NCHW`."""
    if x_NCHW.device.type not in _SELECTING_DEVICES:
        return torch.where(chosen_N[:, None, None, None], operation(x_NCHW, *numbers_N), x_NCHW)
    rows = chosen_N.nonzero().squeeze(1)
    if len(rows) == 0:
        return x_NCHW
    return x_NCHW.index_copy_(0, rows, operation(x_NCHW[rows], *(number_N[rows] for number_N in numbers_N)))


def jitter(
    x_NCHW: Tensor,
    order_N4: Tensor,
    brightness_N: Tensor,
    contrast_N: Tensor,
    saturation_N: Tensor,
    hue_N: Tensor,
) -> Tensor:
    """The four colour operations, each sample's in its own order; may overwrite `x_NCHW`.

    Brightness, contrast and saturation each blend the image with another one, so that one blend serves any
    mixture of them in a batch. The shift of hue costs more, so that it runs once:

    1. The blends that precede the hue in a sample's order.
    2. The hue.
    3. The blends that follow it.
    """
    order_N4 = order_N4.long()
    hue_place_N = (order_N4 == HUE).int().argmax(dim=1)
    factors_N4 = torch.stack([brightness_N, contrast_N, saturation_N, torch.ones_like(hue_N)], dim=1)
    factors_N4 = factors_N4.gather(1, order_N4)  # by place in the order

    def blend_at(place: int, chosen_N: Tensor, x_NCHW: Tensor) -> Tensor:
        factor_N = factors_N4[:, place]
        return _on_chosen(chosen_N & (factor_N != 1), blend, x_NCHW, order_N4[:, place], factor_N)

    for place in (0, 1, 2):  # 1
        x_NCHW = blend_at(place, hue_place_N > place, x_NCHW)
    x_NCHW = _on_chosen(hue_N != 0, shift_hue, x_NCHW, hue_N)  # 2
    for place in (1, 2, 3):  # 3
        x_NCHW = blend_at(place, hue_place_N < place, x_NCHW)
    return x_NCHW


def blend(x_NCHW: Tensor, operation_N: Tensor, factor_N: Tensor) -> Tensor:
    """factor * image + (1 - factor) * other, clamped.

    The other image is black for brightness, the mean of the gray image for contrast, the gray image for
    saturation.
    """
    gray_N1HW = gray(x_NCHW)
    mean_N111 = gray_N1HW.mean(dim=(2, 3), keepdim=True)
    operation_N111 = operation_N[:, None, None, None]
    other_N1HW = torch.where(
        operation_N111 == SATURATION, gray_N1HW, mean_N111 * (operation_N111 == CONTRAST)
    )
    return torch.lerp(other_N1HW, x_NCHW, factor_N[:, None, None, None]).clamp_(0, 255)


def gray(x_NCHW: Tensor) -> Tensor:
    """(N, 1, H, W) luma of ITU-R 601, as PIL's."""
    r, g, b = x_NCHW.split(1, dim=1)
    return (0.299 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def shift_hue(x_NCHW: Tensor, turns_N: Tensor) -> Tensor:
    """Turn the hue of each sample, with saturation and value of the HSV hexcone kept."""
    r, g, b = x_NCHW.unbind(1)
    high_NHW, low_NHW = x_NCHW.amax(dim=1), x_NCHW.amin(dim=1)
    chroma_NHW = high_NHW - low_NHW
    divisor_NHW = chroma_NHW.clamp(min=1e-6)  # gray pixels have no hue, and any does
    hue_NHW = torch.where(
        high_NHW == r,
        (g - b) / divisor_NHW,
        torch.where(high_NHW == g, (b - r) / divisor_NHW + 2, (r - g) / divisor_NHW + 4),
    )  # in sixths of a turn
    hue_NHW += 6 * turns_N[:, None, None]
    hue_NHW -= 6 * torch.floor(hue_NHW / 6)
    weights = (
        (hue_NHW - 3).abs_().sub_(1),
        (hue_NHW - 2).abs_().neg_().add_(2),
        (hue_NHW - 4).abs_().neg_().add_(2),
    )
    return torch.stack([torch.addcmul(low_NHW, chroma_NHW, w.clamp_(0, 1)) for w in weights], dim=1)


def gaussian_blur(x_NCHW: Tensor, sigma_N: Tensor, max_sigma: float) -> Tensor:
    """Sampled Gaussian of each sample's own sigma in pixels (at most `max_sigma`).

    Each axis is one product with a banded S x S matrix per sample. Beyond the image its edge pixels go on, as
    with PIL, which however goes on with the edge of each of its three passes: up to 30 gray levels apart next
    to the border, at a sigma of 2.
    """
    num_samples, channels, size, _ = x_NCHW.shape
    matrix_NSS = _blur_matrix(sigma_N, size, math.ceil(BLUR_REACH * max_sigma))
    x_NSS = torch.bmm(x_NCHW.reshape(num_samples, channels * size, size), matrix_NSS.mT)
    return matrix_NSS[:, None] @ x_NSS.view_as(x_NCHW)


def _blur_matrix(sigma_N: Tensor, size: int, reach: int) -> Tensor:
    """(N, S, S): row i holds the weights of the inputs of output pixel i."""
    device = sigma_N.device
    tap_T = torch.arange(-reach, reach + 1, device=device)
    # A sigma of 0, whose result nobody takes, must not divide 0 by 0.
    weights_NT = torch.exp(-0.5 * (tap_T / sigma_N.clamp(min=1e-3)[:, None]) ** 2)
    weights_NT /= weights_NT.sum(dim=1, keepdim=True)
    pixel_S = torch.arange(size, device=device)
    source_TS = (tap_T[:, None] + pixel_S).clamp_(0, size - 1)
    selector_TSS = (source_TS[..., None] == pixel_S).to(weights_NT.dtype)
    return torch.tensordot(weights_NT, selector_TSS, dims=1)


def solarize(x_NCHW: Tensor) -> Tensor:
    """Invert the values from the middle of the range upwards."""
    return torch.where(x_NCHW >= SOLARIZE_FROM, 255 - x_NCHW, x_NCHW)


@lru_cache(maxsize=8)
def _normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scale and offset from 0..255 to normalised values; kept, because the copy to a device waits for it."""
    mean_C11, std_C11 = (torch.tensor(t, dtype=torch.float64)[:, None, None] for t in (mean, std))
    return (1 / (255 * std_C11)).float().to(device), (-mean_C11 / std_C11).float().to(device)
