"""The distortions of a whole batch with torch, on any device that has float64; also under `torch.compile`.

Every sample has its own numbers, and no operation waits for the host on an accelerator. The pixels before the
normalisation are PIL's 8-bit ones, bit for bit; see the README beside this file for why the formulas below
give them.

Shape legend: V views (2), N samples, C channels (3), H = W = S image size in pixels, T distances from a pixel
to those that its blur weighs (0 .. reach). Pixels are whole numbers in float32, 0 to 255, until the
normalisation.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipelines.augment.box_blur import box_reach, box_weights
from pipelines.batch import CONTRAST, HUE, SATURATION, ViewParams
from pipelines.config import AugmentConfig

# Leaving samples out takes a look at their numbers, for which an accelerator would make the host wait.
_SELECTING_DEVICES = {"cpu"}
# Pixels (samples x S x S) at a time: what a CPU's caches hold, and what bounds an accelerator's memory.
_CHUNK_PIXELS_CPU, _CHUNK_PIXELS = 2**19, 2**23


@torch.no_grad()
def distort(views_VNHWC: Tensor, params: ViewParams, config: AugmentConfig, dtype: torch.dtype) -> Tensor:
    """Distort and normalise both views: (V, N, C, H, W) of `dtype`, each view contiguous as channels-last.

    `views_VNHWC` are square uint8 crops; `params` were drawn with `config` and are on the same device. What
    leaves a sample without jitter is not `jitter_VN`, but the factors 1 and the shift 0 stored for it.
    """
    num_samples, size = views_VNHWC.shape[1:3]
    device = views_VNHWC.device
    chunk = max(1, (_CHUNK_PIXELS_CPU if device.type == "cpu" else _CHUNK_PIXELS) // size**2)
    out_VNHWC = torch.empty(views_VNHWC.shape, dtype=dtype, device=device)
    for v, view in enumerate(config.views):
        for start in range(0, num_samples, chunk):
            part = v, slice(start, start + chunk)
            x_NCHW = _distort_part(views_VNHWC[part], params, part, view.blur_sigma[1])
            for channel, (scale, offset) in enumerate(zip(*config.normalisation, strict=True)):
                x_NCHW[:, channel].mul_(scale).add_(offset)
            out_VNHWC[part] = x_NCHW.permute(0, 2, 3, 1)
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
    x_NCHW = _on_chosen(sigma_N > 0, partial(box_blur, max_sigma=max_sigma), x_NCHW, sigma_N)
    return _on_chosen(params.solarize_VN[part], solarize, x_NCHW)


def _on_chosen(
    chosen_N: Tensor, operation: Callable[..., Tensor], x_NCHW: Tensor, *numbers_N: Tensor
) -> Tensor:
    """`operation(x, *numbers)` for the chosen samples, the others as they are; may overwrite `x_NCHW`."""
    if x_NCHW.device.type not in _SELECTING_DEVICES or torch.compiler.is_compiling():
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
    """other + factor * (image - other), clamped and cut off to whole numbers.

    The other image is black for brightness, the mean of the gray image for contrast, the gray image for
    saturation.
    """
    gray_N1HW = gray(x_NCHW)
    operation_N111 = operation_N[:, None, None, None]
    mean_N111 = _rounded_mean(gray_N1HW) * (operation_N111 == CONTRAST)
    other_N1HW = torch.where(operation_N111 == SATURATION, gray_N1HW, mean_N111)
    step_NCHW = (x_NCHW - other_N1HW).mul_(factor_N[:, None, None, None])
    # PIL rounds this product. The bound is out of reach, but lets no compiler contract it with the sum.
    step_NCHW.clamp_(max=1024)
    return step_NCHW.add_(other_N1HW).clamp_(0, 255).floor_()


def gray(x_NCHW: Tensor) -> Tensor:
    """(N, 1, H, W) luma of ITU-R 601 as whole numbers: PIL's integers, exact in float32 too (below 2^24)."""
    r, g, b = x_NCHW.split(1, dim=1)
    scaled_N1HW = (r * 19595).add_(g, alpha=38470).add_(b, alpha=7471)
    return scaled_N1HW.add_(2**15).mul_(2**-16).floor_()


def _rounded_mean(gray_N1HW: Tensor) -> Tensor:
    """(N, 1, 1, 1) mean rounded to a whole number, halves up."""
    pixels = gray_N1HW.shape[2] * gray_N1HW.shape[3]
    row_sums_N1H1 = gray_N1HW.sum(dim=3, keepdim=True).int()  # exact in float32; the sum of all might not be
    sum_N111 = row_sums_N1H1.sum(dim=2, keepdim=True)
    return ((2 * sum_N111 + pixels) // (2 * pixels)).to(gray_N1HW.dtype)


def shift_hue(x_NCHW: Tensor, turns_N: Tensor) -> Tensor:
    """Turn the hue of each sample as torchvision does in PIL's 8-bit HSV.

    1. Hue, saturation and value of the pixels. The quotients stay clear of whole numbers by what is added
       to their numerators, so that it does not matter how a device rounds a division.
    2. Where the hue is a whole number of steps without rounding, PIL's arithmetic can come out just below.
    3. Turn, and back to colours: each is the value less a share of the saturation that goes with the hue.
    """
    r, g, b = x_NCHW.unbind(1)
    value_NHW, low_NHW = x_NCHW.amax(dim=1), x_NCHW.amin(dim=1)
    chroma_NHW = value_NHW - low_NHW
    divisor_NHW = chroma_NHW.clamp(min=1)  # gray pixels have no hue, and any does

    angle_NHW = torch.where(  # 1: in sixths of a turn, times chroma
        value_NHW == r,
        g - b,
        torch.where(value_NHW == g, torch.add(b - r, chroma_NHW, alpha=2), (r - g).add_(chroma_NHW, alpha=4)),
    )
    angle_NHW = torch.where(angle_NHW < 0, torch.add(angle_NHW, chroma_NHW, alpha=6), angle_NHW).mul_(85)
    divisor_NHW = divisor_NHW * 2
    hue_NHW = (angle_NHW + 0.25).div_(divisor_NHW).floor_()
    saturation_NHW = (chroma_NHW * 255).add_(0.25).div_(value_NHW.clamp(min=1)).floor_()

    is_whole_NHW = hue_NHW * divisor_NHW == angle_NHW  # 2
    lost_steps = _lost_steps(x_NCHW.device)[hue_NHW.int()]
    hue_NHW -= is_whole_NHW * lost_steps

    shift_N = (turns_N.double() * 255).trunc_().to(x_NCHW.dtype)  # 3
    hue_NHW = (hue_NHW + shift_N[:, None, None]).remainder_(256).mul_(2)  # in 85ths of a sixth of a turn
    weights = (
        torch.minimum(hue_NHW - 85, 425 - hue_NHW),
        torch.maximum(85 - hue_NHW, hue_NHW - 255),
        torch.maximum(255 - hue_NHW, hue_NHW - 425),
    )
    whole = 255 * 85
    colours = [
        (whole - saturation_NHW * w.clamp_(0, 85)).mul_(value_NHW).add_(whole / 2).mul_(1 / whole).floor_()
        for w in weights
    ]
    return torch.stack(colours, dim=1)


def _lost_steps(device: torch.device) -> Tensor:
    """(256,) 1 for each exact hue that PIL rounds to the one below, else 0; found by trying all colours."""
    hue = torch.arange(256, device=device)
    lost = (hue >= 1) & (hue <= 31)
    lost |= (hue >= 88) & (hue <= 104) & (hue % 4 == 0)
    lost |= (hue >= 129) & (hue <= 149) & (hue % 2 == 1)
    lost |= (hue >= 153) & (hue <= 209) & (hue % 4 == 1)
    return (lost | (hue == 176) | (hue == 184)).float()


def box_blur(x_NCHW: Tensor, sigma_N: Tensor, max_sigma: float) -> Tensor:
    """PIL's Gaussian blur by each sample's own sigma in pixels, at most `max_sigma`.

    Three passes along the rows, then three along the columns, each as `box_weights` describes. The pixels are
    shifted to -128 .. 127 meanwhile, so that no sum overflows int32.
    """
    size, reach = x_NCHW.shape[-1], box_reach(max_sigma)
    radius_N, inner_N, outer_N = box_weights(sigma_N)
    distance_T1 = torch.arange(reach + 1, device=x_NCHW.device)[:, None]
    weights_TN = inner_N * (distance_T1 <= radius_N) + outer_N * (distance_T1 == radius_N + 1)
    weights_TN111 = weights_TN[..., None, None, None]
    missing_N = 2**24 - ((2 * radius_N + 1) * inner_N + 2 * outer_N)  # 1 where rounding left it out, else 0
    half_N111 = (2**23 - 128 * missing_N)[:, None, None, None]

    y_NCHW = x_NCHW.int().sub_(128)
    for dim in (3, 3, 3, 2, 2, 2):
        beside = [reach if d == dim else -1 for d in range(4)]
        first, last = (y_NCHW.narrow(dim, edge, 1).expand(beside) for edge in (0, size - 1))
        padded_NCHW = torch.cat([first, y_NCHW, last], dim)
        y_NCHW.mul_(weights_TN111[0]).add_(half_N111)
        for t in range(1, reach + 1):
            before, after = (padded_NCHW.narrow(dim, reach + step, size) for step in (-t, t))
            y_NCHW.addcmul_(before + after, weights_TN111[t])
        y_NCHW.bitwise_right_shift_(24)
    return y_NCHW.add_(128).to(x_NCHW.dtype)


def solarize(x_NCHW: Tensor) -> Tensor:
    """Invert the upper half of the range, from PIL's threshold of 128 on."""
    return torch.minimum(x_NCHW, 255 - x_NCHW)
