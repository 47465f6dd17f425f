"""The figures that Barlow Twins's paper reports, and others beside them, with where each comes from.

Figures are in percent, as printed. A cell is empty where the sources named have no figure.

PAPER   Zbontar et al., Barlow Twins, ICML 2021 (arXiv 2103.03230), tables 1 to 4: the row of Barlow Twins
VICREG  Bardes et al., VICReg, ICLR 2022 (arXiv 2105.04906), tables 1 and 2: the rows of other methods
MOCO    github.com/facebookresearch/moco, detection/README.md: means of five trials
"""

from collections.abc import Mapping
from dataclasses import dataclass

PAPER = "Zbontar et al. 2021"
VICREG = "Bardes et al. 2022, tables 1 and 2"
MOCO = "MoCo's repository, means of 5 trials"


@dataclass(frozen=True)
class Column:
    """A figure of a protocol; of `semisup` at that percentage of the labels."""

    heading: str
    protocol: str
    figure: str
    percent: int | None = None


@dataclass(frozen=True)
class Row:
    """A method's figures, by the headings of the columns."""

    method: str
    percentages: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables. All rows are ResNet-50 pretrained on ImageNet."""

    number: int
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Published:
    """What a protocol was measured with: numbers of images by role, of classes, and settings.

    `train` are the numbers of images that may be learned from. A name of `settings` stands for every setting
    whose dotted name ends with it, and the values are those that count as published.
    """

    data: str
    train: tuple[range, ...]
    test: int
    classes: int
    settings: Mapping[str, tuple[object, ...]]


def _exactly(*counts: int) -> tuple[range, ...]:
    return tuple(range(count, count + 1) for count in counts)


ARCHITECTURE = "resnet50"  # of all rows
# A percentage of the images is rounded in different ways.
SUBSETS = {1: range(12_800, 12_823), 10: range(128_105, 128_128)}
_CROPS = {"features.image_size": (224,), "features.resize": (256,)}
# Learning rate of the backbone: the authors' README has had both.
_FINETUNE = {
    "epochs": (20,),
    "semisup.batch_size": (256,),
    "lr_backbone": (0.002, 0.005),
    "lr_classifier": (0.5,),
    "weight_decay": (0.0,),
    "augmentation": ("random crops",),
}
_TRANSFER = _CROPS | {
    "transfer.lr": (0.01,),
    "transfer.weight_decay": (5e-4,),
    "transfer.batch_size": (256,),
    "augmentation": ("random crops",),
}

PUBLISHED = {
    "linear": Published(
        "ImageNet",
        _exactly(1_281_167),
        50_000,
        1_000,
        _CROPS
        | {
            "linear.epochs": (100,),
            "linear.batch_size": (256,),
            "linear.lr": (0.3, 0.1),  # the paper; the authors' README, of the model they publish
            "linear.weight_decay": (1e-6,),
            "augmentation": ("random crops",),
        },
    ),
    "semisup": Published("ImageNet", tuple(SUBSETS.values()), 50_000, 1_000, _CROPS | _FINETUNE),
    "transfer-places205": Published(
        "Places-205", _exactly(2_448_873), 20_500, 205, _TRANSFER | {"transfer.epochs": (14,)}
    ),
    "transfer-inat18": Published(
        "iNaturalist 2018", _exactly(437_513), 24_426, 8_142, _TRANSFER | {"transfer.epochs": (84,)}
    ),
    "voc07": Published("VOC 2007", _exactly(5_011), 4_952, 20, _CROPS),
    "detect-voc": Published(
        "VOC 2007+2012",
        _exactly(16_551),
        4_952,
        20,
        {"iterations": (24_000,), "batch_size": (16,), "lr": (0.1,)},
    ),
    "detect-coco": Published(
        "COCO 2017",
        _exactly(117_266, 118_287),  # with objects, or all
        5_000,
        80,
        {"iterations": (90_000,), "batch_size": (16,), "lr": (0.03,)},
    ),
}


def _rows(
    columns: tuple[Column, ...], source: str, methods: Mapping[str, tuple[float | None, ...]]
) -> tuple[Row, ...]:
    """Rows from figures in the order of the columns; None where there is none."""
    return tuple(
        Row(
            method,
            {c.heading: f for c, f in zip(columns, figures, strict=True) if f is not None},
            source,
        )
        for method, figures in methods.items()
    )


_LINEAR = (Column("top-1", "linear", "top1"), Column("top-5", "linear", "top5"))
_SEMISUP = (
    Column("top-1, 1 %", "semisup", "top1", 1),
    Column("top-1, 10 %", "semisup", "top1", 10),
    Column("top-5, 1 %", "semisup", "top5", 1),
    Column("top-5, 10 %", "semisup", "top5", 10),
)
_TRANSFER = (
    Column("Places-205 top-1", "transfer-places205", "top1"),
    Column("VOC07 mAP", "voc07", "mAP"),
    Column("iNat18 top-1", "transfer-inat18", "top1"),
)
_DETECT = (
    Column("VOC AP", "detect-voc", "AP"),
    Column("VOC AP50", "detect-voc", "AP50"),
    Column("VOC AP75", "detect-voc", "AP75"),
    Column("COCO AP", "detect-coco", "AP"),
    Column("COCO AP50", "detect-coco", "AP50"),
    Column("COCO AP75", "detect-coco", "AP75"),
    Column("COCO mask AP", "detect-coco", "maskAP"),
    Column("COCO mask AP50", "detect-coco", "maskAP50"),
    Column("COCO mask AP75", "detect-coco", "maskAP75"),
)
_NO_COCO = (None,) * 6

TABLES = (
    PaperTable(
        1,
        "Linear classification of ImageNet",
        _LINEAR,
        (
            *_rows(
                _LINEAR,
                VICREG,
                {
                    "Supervised": (76.5, None),
                    "MoCo": (60.6, None),
                    "PIRL": (63.6, None),
                    "SimCLR": (69.3, 89.0),
                    "MoCo v2": (71.1, None),
                    "SimSiam": (71.3, None),
                    "SwAV without multi-crop": (71.8, None),
                    "BYOL": (74.3, 91.6),
                    "SwAV": (75.3, None),
                },
            ),
            *_rows(_LINEAR, PAPER, {"Barlow Twins": (73.2, 91.0)}),
        ),
    ),
    PaperTable(
        2,
        "Semi-supervised classification of ImageNet",
        _SEMISUP,
        (
            *_rows(
                _SEMISUP,
                VICREG,
                {
                    "Supervised": (25.4, 56.4, 48.4, 80.4),
                    "PIRL": (None, None, 57.2, 83.8),
                    "SimCLR": (48.3, 65.6, 75.5, 87.8),
                    "BYOL": (53.2, 68.8, 78.4, 89.0),
                    "SwAV": (53.9, 70.2, 78.5, 89.9),
                },
            ),
            *_rows(_SEMISUP, PAPER, {"Barlow Twins": (55.0, 69.7, 79.2, 89.3)}),
        ),
    ),
    PaperTable(
        3,
        "Transfer to other classification tasks",
        _TRANSFER,
        (
            *_rows(
                _TRANSFER,
                VICREG,
                {
                    "Supervised": (53.2, 87.5, 46.7),
                    "SimCLR": (52.5, 85.5, 37.2),
                    "MoCo v2": (51.8, 86.4, 38.6),
                    "SwAV": (56.7, 88.9, 48.6),
                    "BYOL": (54.0, 86.6, 47.6),
                },
            ),
            *_rows(_TRANSFER, PAPER, {"Barlow Twins": (54.1, 86.2, 46.5)}),
        ),
    ),
    PaperTable(
        4,
        "Transfer to detection and segmentation (C4 backbone)",
        _DETECT,
        (
            *_rows(
                _DETECT,
                MOCO,
                {
                    "Supervised": (53.5, 81.3, 58.8, *_NO_COCO),
                    "MoCo v2": (57.4, 82.5, 64.0, *_NO_COCO),
                },
            ),
            *_rows(
                _DETECT,
                VICREG,
                {
                    "SwAV": (None, 82.6, None, *_NO_COCO),
                    "SimSiam": (None, 82.4, None, *_NO_COCO),
                },
            ),
            *_rows(
                _DETECT,
                PAPER,
                {
                    "Barlow Twins": (56.8, 82.6, 63.4, 39.2, None, None, 34.3, None, None),
                },
            ),
        ),
    ),
)
