"""Faster R-CNN and Mask R-CNN on a C4 backbone, out of torchvision's parts.

conv1 to res4 of the ResNet make the feature map, of stride 16. res5 with one more batch-norm is the head of
the regions, as in MoCo (He et al. 2020, appendix A) and detectron2's C4 models. All layers learn.

Shape legend: N images, H and W pixels, R regions, C channels of res4, D of res5.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
)
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import roi_align

from eval.detection.config import DetectionConfig
from model.errors import ModelError
from model.weights import BackboneWeights

STRIDE = 16
POOLED = 14  # side of a region's features before res5
ANCHOR_SIDES = (32, 64, 128, 256, 512)
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
MASK_CHANNELS = 256


def build_detector(
    weights: BackboneWeights,
    num_classes: int,
    config: DetectionConfig,
    *,
    with_masks: bool,
    half: torch.dtype | None,
) -> GeneralizedRCNN:
    """The detector, float32, on the CPU: the backbone as trained, the rest drawn from torch's generator.

    `num_classes` is without the background. It takes lists of images in 0..1 and their `Target`s, and returns
    a dict of losses in training, else a list of dicts of boxes, labels, scores and, `with_masks`, masks; see
    `torchvision.models.detection`. Convolutions compute in `half`, if given; anchors and boxes never do,
    since bfloat16 has no whole numbers between 256 and 258.

    Raises `ModelError` for a backbone with the small stem, whose feature map has another stride.
    """
    if weights.small_stem:
        raise ModelError(
            f"The backbone is a {weights.architecture}, for images of 32 pixels; detection needs one trained "
            f"with model.small_stem: false, whose features have a stride of {STRIDE}."
        )
    resnet = weights.build()
    backbone = C4Backbone(resnet, half)
    anchors = AnchorGenerator((ANCHOR_SIDES,), (ANCHOR_RATIOS,))
    rpn = RegionProposalNetwork(
        anchors,
        HalfRPNHead(backbone.out_channels, anchors.num_anchors_per_location()[0], half),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 12_000, "testing": 6_000},
        post_nms_top_n={"training": 2_000, "testing": config.test_proposals},
        nms_thresh=0.7,
    )
    heads = Res5RoIHeads(resnet, num_classes + 1, config.regions, with_masks=with_masks, half=half)
    mean, std = map(list, weights.normalisation)
    transform = GeneralizedRCNNTransform(config.short_sides, config.long_side, mean, std)
    return GeneralizedRCNN(backbone, rpn, heads, transform)


class C4Backbone(nn.Module):
    """conv1 to res4: (N, 3, H, W) to float32 (N, C, H / 16, W / 16)."""

    def __init__(self, resnet: nn.Module, half: torch.dtype | None) -> None:
        super().__init__()
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
        self.body = nn.Sequential(OrderedDict((name, getattr(resnet, name)) for name in names))
        self.out_channels = resnet.layer4[0].conv1.in_channels
        self.half = half

    def forward(self, images_N3HW: Tensor) -> Tensor:
        with _autocast(images_N3HW, self.half):
            return self.body(images_N3HW.contiguous(memory_format=torch.channels_last)).float()


class HalfRPNHead(RPNHead):
    """Torchvision's head, its convolutions in half precision and its results in float32."""

    def __init__(self, in_channels: int, num_anchors: int, half: torch.dtype | None) -> None:
        super().__init__(in_channels, num_anchors)
        self.half = half

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        with _autocast(features[0], self.half):
            logits, deltas = super().forward(features)
        return [x.float() for x in logits], [x.float() for x in deltas]


class Res5RoIHeads(RoIHeads):
    """Classes, boxes and masks of regions from one pass through res5.

    In training the masks are learnt from the features that res5 made for the boxes, so that its batch-norms
    see every region once; torchvision's own forward pass would run a head of its own for them.
    """

    def __init__(
        self,
        resnet: nn.Module,
        num_classes: int,
        regions: int,
        *,
        with_masks: bool,
        half: torch.dtype | None,
    ) -> None:
        """`num_classes` counts the background; `regions` of each image are learnt from.

        New layers start as in detectron2.
        """
        channels = resnet.feature_dim
        super().__init__(
            box_roi_pool=None,
            box_head=None,
            box_predictor=FastRCNNPredictor(channels, num_classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=regions,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
        )
        self.res5 = nn.Sequential(OrderedDict(layer4=resnet.layer4, norm=nn.BatchNorm2d(channels)))
        self.half = half
        last = [(self.box_predictor.cls_score, 0.01), (self.box_predictor.bbox_pred, 0.001)]
        if with_masks:
            self.mask_predictor = MaskRCNNPredictor(channels, MASK_CHANNELS, num_classes)
            last.append((self.mask_predictor.mask_fcn_logits, 0.001))
        for layer, std in last:
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def has_mask(self) -> bool:
        return self.mask_predictor is not None

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections and no losses, or in training none and the losses."""
        (features_NCHW,) = features.values()
        if self.training:
            return [], self._losses(features_NCHW, proposals, targets)
        logits, deltas = self.box_predictor(self._regions(features_NCHW, proposals).mean(dim=(2, 3)))
        found = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        results = [
            {"boxes": boxes, "scores": scores, "labels": labels}
            for boxes, scores, labels in zip(*found, strict=True)
        ]
        if self.has_mask():
            boxes, _, labels = found
            masks = maskrcnn_inference(self._masks(self._regions(features_NCHW, boxes)), labels)
            for result, masks_of_image in zip(results, masks, strict=True):
                result["masks"] = masks_of_image
        return results, {}

    def _losses(
        self, features_NCHW: Tensor, proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        proposals, matched, labels, deltas_wanted = self.select_training_samples(proposals, targets)
        regions_RD77 = self._regions(features_NCHW, proposals)
        logits, deltas = self.box_predictor(regions_RD77.mean(dim=(2, 3)))
        loss_classifier, loss_box_reg = fastrcnn_loss(logits, deltas, labels, deltas_wanted)
        losses = {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg}
        if self.has_mask():
            positive = [labels_of_image > 0 for labels_of_image in labels]
            losses["loss_mask"] = maskrcnn_loss(
                self._masks(regions_RD77[torch.cat(positive)]),
                [boxes[chosen] for boxes, chosen in zip(proposals, positive, strict=True)],
                [target["masks"] for target in targets],
                [target["labels"] for target in targets],
                [indices[chosen] for indices, chosen in zip(matched, positive, strict=True)],
            )
        return losses

    def _regions(self, features_NCHW: Tensor, boxes: list[Tensor]) -> Tensor:
        """res5's features of the boxes of all images, float32 (R, D, 7, 7)."""
        pooled = roi_align(
            features_NCHW, boxes, POOLED, spatial_scale=1 / STRIDE, sampling_ratio=0, aligned=True
        )
        with _autocast(pooled, self.half):
            return self.res5(pooled.contiguous(memory_format=torch.channels_last)).float()

    def _masks(self, regions_RD77: Tensor) -> Tensor:
        with _autocast(regions_RD77, self.half):
            return self.mask_predictor(regions_RD77).float()


def batch_norms(detector: nn.Module) -> list[_BatchNorm]:
    return [module for module in detector.modules() if isinstance(module, _BatchNorm)]


def _autocast(x: Tensor, half: torch.dtype | None) -> torch.autocast:
    return torch.autocast(x.device.type, dtype=half, enabled=half is not None)
