"""The distortions as Triton kernels: at most four launches for both views, nothing that waits for the host.

Bytes moved per view of S x S pixels with 2-byte output, and of 224 x 224:

- Floor: the uint8 view is read once, the output written once: 9 S^2, 452 kB.
- Without blur that is all, as long as the second reading of an image whose contrast changes, 3 S^2, comes
  from the cache: each multiprocessor works on one or two images at a time, 20 to 40 MB on an H200.
- With blur, 8-bit colours are written and read again before the passes along the rows, and before those along
  the columns: 21 S^2, 1054 kB.

The paper blurs its first view always and its second in one case of ten: 1.73 times the floor on average.
"""

from dataclasses import fields

import torch
from torch import Tensor

from pipelines.augment import kernels_blur, kernels_colour
from pipelines.augment.box_blur import BoxWeights, box_reach
from pipelines.batch import ViewParams
from pipelines.config import AugmentConfig


@torch.no_grad()
def distort(views_VNHWC: Tensor, params: ViewParams, config: AugmentConfig, dtype: torch.dtype) -> Tensor:
    """Distort and normalise both views: (V, N, C, H, W) of `dtype`, each view contiguous as channels-last.

    `views_VNHWC` are square uint8 crops on a CUDA device, as are `params`, which were drawn with `config`;
    `dtype` is float32, bfloat16 or float16. Up to the normalisation, the result is that of
    `torch_ops.distort` bit for bit.
    """
    scale_C, offset_C = config.normalisation
    views_VNHWC = views_VNHWC.contiguous()
    params = ViewParams(**{f.name: getattr(params, f.name).contiguous() for f in fields(params)})
    out_VNHWC = torch.empty_like(views_VNHWC, dtype=dtype)
    largest_sigmas = [view.blur_sigma[1] for view in config.views if view.blur_p > 0]
    # Where nothing is blurred, nothing is written there either.
    recoloured_VNHWC = torch.empty_like(views_VNHWC) if largest_sigmas else out_VNHWC.view(torch.uint8)
    with torch.cuda.device_of(views_VNHWC):  # Triton launches on the current device
        kernels_colour.recolour(views_VNHWC, params, scale_C, offset_C, recoloured_VNHWC, out_VNHWC)
        if largest_sigmas:
            reach = box_reach(max(largest_sigmas))
            sigma_VN, solarize_VN = params.blur_VN, params.solarize_VN
            weights = BoxWeights(*(torch.empty_like(sigma_VN, dtype=torch.int32) for _ in range(3)))
            kernels_blur.box_weights(sigma_VN, weights)
            turned_VNWHC = torch.empty_like(views_VNHWC)
            for source, target in ((recoloured_VNHWC, turned_VNWHC), (turned_VNWHC, out_VNHWC)):
                kernels_blur.blur_rows(
                    source, sigma_VN, weights, reach, solarize_VN, scale_C, offset_C, target
                )
    return out_VNHWC.permute(0, 1, 4, 2, 3)
