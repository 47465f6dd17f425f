"""Detectors that start from a backbone: data, network, fine-tuning, and the command, on drawn images."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock
from typer.testing import CliRunner, Result

from eval.detection.batches import training_batches
from eval.detection.coco import open_coco
from eval.detection.config import PUBLISHED, DetectionConfig
from eval.detection.finetune import Finetuning, learning_rate
from eval.detection.images import AnnotatedImages, read_sample
from eval.detection.network import build_detector
from eval.detection.predict import predict
from eval.detection.reports import DetectionReport, PhaseReport
from eval.detection.run import evaluate, prepare
from eval.detection.voc import open_voc
from model.backbones import build_backbone
from model.errors import ModelError
from model.weights import IMAGENET, BackboneWeights, read_weights
from pipelines.errors import DataError
from tools.cli import app
from tools.detect import DetectionJob, run_detection
from train.errors import TrainingError
from train.launch import meeting_point

COLOURS = {"cat": (220, 40, 40), "dog": (40, 60, 230)}
CLASSES = list(COLOURS)


def draw_image(
    random: np.random.Generator,
) -> tuple[Image.Image, list[tuple[str, tuple[int, int, int, int]]]]:
    """A noisy grey image with one or two rectangles, side by side, in the colours of their classes."""
    height, width = (int(side) for side in random.integers(64, 97, 2))
    pixels_HW3 = random.normal(128, 12, (height, width, 3))
    objects = []
    half = width // 2
    for left in (0, half)[: random.integers(1, 3)]:
        x1 = left + int(random.integers(0, half // 4))
        y1 = int(random.integers(0, height // 3))
        x2, y2 = x1 + int(random.integers(20, half * 3 // 4)), y1 + int(random.integers(24, height * 2 // 3))
        name = CLASSES[random.integers(0, 2)]
        pixels_HW3[y1:y2, x1:x2] = COLOURS[name] + random.normal(0, 8, (y2 - y1, x2 - x1, 3))
        objects.append((name, (x1, y1, x2, y2)))
    return Image.fromarray(pixels_HW3.clip(0, 255).astype(np.uint8)), objects


def write_voc(root: Path, counts: dict[tuple[str, str], int]) -> None:
    """A devkit: `counts` images in each set, (year, name)."""
    random = np.random.default_rng(0)
    for (year, name), count in counts.items():
        for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (root / year / folder).mkdir(parents=True, exist_ok=True)
        stems = [f"{name}_{number:03}" for number in range(count)]
        (root / year / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(stems) + "\n")
        for number, stem in enumerate(stems):
            image, objects = draw_image(random)
            image.save(root / year / "JPEGImages" / f"{stem}.jpg", quality=95)
            tree = ElementTree.Element("annotation")
            size = ElementTree.SubElement(tree, "size")
            for side in ("width", "height"):
                ElementTree.SubElement(size, side).text = str(getattr(image, side))
            for name_of_class, (x1, y1, x2, y2) in objects:
                entry = ElementTree.SubElement(tree, "object")
                ElementTree.SubElement(entry, "name").text = name_of_class
                ElementTree.SubElement(entry, "difficult").text = str(int(number == 1))
                box = ElementTree.SubElement(entry, "bndbox")
                for side, value in (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2)):
                    ElementTree.SubElement(box, side).text = str(value)
            ElementTree.ElementTree(tree).write(root / year / "Annotations" / f"{stem}.xml")


def write_coco(root: Path, counts: dict[str, int]) -> None:
    """COCO's folders with `counts` images in each split; the last image has no objects, the first a crowd."""
    random = np.random.default_rng(1)
    (root / "annotations").mkdir(parents=True)
    for split, count in counts.items():
        (root / split).mkdir()
        images, annotations = [], []
        for image_id in range(count, 0, -1):
            image, objects = draw_image(random)
            if image_id == 1:
                image, objects = Image.new("RGB", image.size, "grey"), []
            image.save(root / split / f"{image_id}.jpg", quality=95)
            images.append({"id": image_id, "file_name": f"{image_id}.jpg"})
            images[-1] |= {"width": image.width, "height": image.height}
            boxes = [(name, box, 0) for name, box in objects]
            if image_id == count:
                boxes += [("cat", (0, 0, 9, 9), 1), ("cat", (5, 5, 5, 9), 0)]  # a crowd; a box without area
            for name, (x1, y1, x2, y2), is_crowd in boxes:
                outline = [[x1, y1, x2, y1, x2, y2, x1, y2]]
                if is_crowd:
                    outline = {"size": [image.height, image.width], "counts": [image.height * image.width]}
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": {"cat": 17, "dog": 88}[name],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": is_crowd,
                        "segmentation": outline,
                    }
                )
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 88, "name": "dog"}, {"id": 17, "name": "cat"}]
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


class TinyResNet(nn.Module):
    """A ResNet as `build_detector` needs it, an eighth as wide and with one block per stage."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(width, width))
        for stage in (2, 3, 4):
            before, after = width * 2 ** (stage - 2), width * 2 ** (stage - 1)
            shortcut = nn.Sequential(nn.Conv2d(before, after, 1, 2, bias=False), nn.BatchNorm2d(after))
            setattr(self, f"layer{stage}", nn.Sequential(BasicBlock(before, after, 2, shortcut)))
        self.feature_dim = after


class TinyWeights(BackboneWeights):
    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return TinyResNet()


TINY_WEIGHTS = TinyWeights("resnet18", False, IMAGENET, {})
CPU = torch.device("cpu")


def small(protocol: str, **changes: object) -> DetectionConfig:
    """The published settings, made small for images of 64 to 96 pixels."""
    settings = {
        "iterations": 6,
        "batch_size": 2,
        "lr": 0.02,
        "milestones": (4, 5),
        "warmup_iterations": 2,
        "short_sides": (64, 80, 64),
        "long_side": 128,
        "regions": 16,
        "test_proposals": 40,
        "statistics_iterations": 2,
        "workers": 0,
        "log_every": 1,
    }
    return DetectionConfig.model_validate(PUBLISHED[protocol].model_dump() | settings | changes)


def finetune(protocol: str, images: AnnotatedImages, config: DetectionConfig, stop_after: int = 0) -> tuple:
    """Fine-tune to the end, or until a stop is wanted; gives it, its reports and what it saved last."""
    finetuning = prepare(protocol, TINY_WEIGHTS, images, config, CPU)
    return finetuning, *go_on(finetuning, stop_after)


def go_on(finetuning: Finetuning, stop_after: int = 0) -> tuple[list[DetectionReport], dict]:
    reports, saved = [], {}

    def save(is_last: bool) -> None:
        buffer = BytesIO()
        torch.save(finetuning.state_dict(), buffer)
        saved["state"] = torch.load(BytesIO(buffer.getvalue()), weights_only=True)

    is_at_end = finetuning.run(
        save, lambda: False, lambda: bool(stop_after) and finetuning.done >= stop_after, reports.append
    )
    assert is_at_end == (not stop_after)
    return reports, saved["state"]


@pytest.fixture(scope="module")
def voc_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("voc") / "VOCdevkit"
    write_voc(root, {("VOC2007", "trainval"): 3, ("VOC2012", "trainval"): 2, ("VOC2007", "test"): 3})
    return root


@pytest.fixture(scope="module")
def coco_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco") / "coco"
    write_coco(root, {"train2017": 13, "val2017": 7})
    return root


@pytest.fixture
def spoilt(voc_root: Path, coco_root: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a dataset that a test may spoil."""

    def copy(protocol: str) -> Path:
        return shutil.copytree({"voc": voc_root, "coco": coco_root}[protocol], tmp_path / protocol)

    return copy


# The datasets.


@pytest.mark.parametrize("inside", [True, False])
def test_voc_boxes_are_those_drawn_and_difficult_objects_are_marked(voc_root: Path, inside: bool) -> None:
    train, test = open_voc(voc_root if inside else voc_root.parent)
    assert (len(train), len(test), len(train.classes)) == (5, 3, 20)
    random = np.random.default_rng(0)
    for number in range(5):
        image, objects = draw_image(random)
        record = train[number]
        assert [train.classes[label - 1] for label in record.labels_O] == [name for name, _ in objects]
        np.testing.assert_array_equal(record.boxes_O4, [box for _, box in objects])
        assert (record.width, record.height) == image.size
        assert record.difficult_O.all() == record.difficult_O.any() == (number in (1, 4))


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_and_masks_lie_on_the_coloured_pixels_mirrored_or_not(coco_root: Path, flip: bool) -> None:
    train, _ = open_coco(coco_root)
    assert train.classes == CLASSES
    for number in range(len(train)):
        image_3HW, target = read_sample(train[number], flip)
        assert target["masks"].shape == (len(target["boxes"]), *image_3HW.shape[1:])
        for (x1, y1, x2, y2), label, mask in zip(
            *(target[k] for k in ("boxes", "labels", "masks")), strict=True
        ):
            x1, y1, x2, y2 = (int(side) for side in (x1, y1, x2, y2))
            colour = image_3HW[:, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].float().mean(dim=(1, 2))
            expected = torch.tensor(COLOURS[CLASSES[label - 1]]).float()
            assert (colour - expected).abs().max() < 12
            filled = torch.zeros_like(mask)
            filled[y1:y2, x1:x2] = 1
            assert torch.equal(mask, filled)


def test_coco_leaves_out_crowds_empty_boxes_and_in_training_images_without_objects(coco_root: Path) -> None:
    train, test = open_coco(coco_root)
    assert (len(train), len(test)) == (12, 7)
    assert [train[n].image_id for n in range(12)] == list(range(13, 1, -1))
    first = train[0]
    assert len(first.boxes_O4) == len(first.segmentations) == len(first.labels_O) <= 2
    assert len(test[6].boxes_O4) == 0


def edit_json(root: Path, edit: Callable[[dict], None]) -> None:
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


VOC_FAULTS = {
    "no annotation": (
        lambda root: (root / "VOC2007/Annotations/trainval_001.xml").unlink(),
        "trainval_001.xml",
    ),
    "no image": (lambda root: (root / "VOC2012/JPEGImages/trainval_000.jpg").unlink(), "trainval_000.jpg"),
    "no list": (lambda root: (root / "VOC2007/ImageSets/Main/test.txt").unlink(), "test.txt"),
    "no year": (lambda root: shutil.rmtree(root / "VOC2012"), "VOC2012"),
    "empty list": (lambda root: (root / "VOC2007/ImageSets/Main/test.txt").write_text(""), "no images"),
    "no XML": (lambda root: (root / "VOC2007/Annotations/test_001.xml").write_text("<a>"), "damaged"),
}
VOC_EDITS = {  # by what they do to the XML of an image, what the sentence tells
    "class": ("<name>cat</name>", "<name>cow-cat</name>", "'cow-cat'"),
    "empty": ("<xmax>", "<xmax>-", "has no area"),
    "reversed": ("<xmin>", "<xmin>500", "has no area"),
    "no box": ("bndbox", "other", "lacks 'bndbox/xmin'"),
    "no number": ("<ymin>", "<ymin>x", "damaged"),
}
COCO_FAULTS = {
    "no file": (
        lambda root: (root / "annotations/instances_val2017.json").unlink(),
        "instances_val2017.json",
    ),
    "no folder": (lambda root: shutil.rmtree(root / "val2017"), "val2017"),
    "no image": (lambda root: (root / "train2017" / "13.jpg").unlink(), "13.jpg"),
    "no JSON": (lambda root: (root / "annotations/instances_val2017.json").write_text("{"), "damaged"),
}
COCO_EDITS = {
    "category": (lambda c: c["annotations"][0].update(category_id=5), "category 5"),
    "image": (lambda c: c["annotations"][0].update(image_id=999), "image 999"),
    "outside": (lambda c: c["annotations"][0].update(bbox=[500, 0, 9, 9]), "lies outside"),
    "not finite": (lambda c: c["annotations"][0].update(bbox=[float("nan"), 0, 9, 9]), "has no area"),
    "no box": (lambda c: c["annotations"][0].pop("bbox"), "lacks 'bbox'"),
    "three numbers": (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "damaged"),
    "no categories": (lambda c: c.pop("categories"), "lacks 'categories'"),
    "other categories": (lambda c: c["categories"][0].update(name="fox"), "differ"),
    "nothing": (lambda c: c.update(annotations=[]), "no objects"),
}


@pytest.mark.parametrize("fault", VOC_FAULTS)
def test_faults_of_voc_are_told_in_a_sentence(spoilt: Callable, fault: str) -> None:
    spoil, words = VOC_FAULTS[fault]
    root = spoilt("voc")
    spoil(root)
    with pytest.raises(DataError, match=words):
        open_voc(root)


@pytest.mark.parametrize("edit", VOC_EDITS)
def test_wrong_annotations_of_voc_are_named(spoilt: Callable, edit: str) -> None:
    before, after, words = VOC_EDITS[edit]
    root = spoilt("voc")
    paths = [p for p in sorted((root / "VOC2007/Annotations").glob("trainval*")) if before in p.read_text()]
    paths[0].write_text(paths[0].read_text().replace(before, after))
    with pytest.raises(DataError, match=f"{paths[0].name}.*({words})|({words}).*{paths[0].name}"):
        open_voc(root)


@pytest.mark.parametrize("fault", COCO_FAULTS)
def test_faults_of_coco_are_told_in_a_sentence(spoilt: Callable, fault: str) -> None:
    spoil, words = COCO_FAULTS[fault]
    root = spoilt("coco")
    spoil(root)
    with pytest.raises(DataError, match=words):
        open_coco(root)


@pytest.mark.parametrize("edit", COCO_EDITS)
def test_wrong_annotations_of_coco_are_named(spoilt: Callable, edit: str) -> None:
    change, words = COCO_EDITS[edit]
    root = spoilt("coco")
    edit_json(root, change)
    with pytest.raises(DataError, match=f"instances_train2017.*({words})|({words}).*instances_train2017"):
        open_coco(root)


def test_images_that_cannot_be_learnt_from_are_named(spoilt: Callable) -> None:
    root = spoilt("coco")
    edit_json(root, lambda c: c["annotations"][0].update(segmentation=[[1, 2]]))
    Image.new("RGB", (20, 20)).save(root / "train2017" / "12.jpg")
    (root / "train2017" / "11.jpg").write_bytes(b"no image")
    train, _ = open_coco(root)
    for number, words in enumerate(("outline", r"20 x 20 pixels", "Cannot read the image")):
        with pytest.raises(DataError, match=rf"{13 - number}\.jpg") as caught:
            read_sample(train[number], False)
        assert re.search(words, str(caught.value))


# Which images an iteration learns from.


def test_every_image_comes_once_an_epoch_whatever_the_number_of_ranks(coco_root: Path) -> None:
    train, _ = open_coco(coco_root)
    config = small("coco", batch_size=4)

    def drawn(ranks: int, iterations: range) -> list[bytes]:
        per_rank = [training_batches(train, config, iterations, rank, ranks) for rank in range(ranks)]
        return [
            image.numpy().tobytes()
            for parts in zip(*per_rank, strict=True)
            for part in parts
            for image, _ in part
        ]

    one = drawn(1, range(6))  # two epochs of 12 images
    assert drawn(2, range(6)) == one and drawn(4, range(3, 6)) == one[12:]
    unmirrored = {read_sample(train[n], False)[0].numpy().tobytes() for n in range(12)}
    mirrored = [image not in unmirrored for image in one]
    assert 4 < sum(mirrored) < 20
    names = {read_sample(train[n], flip)[0].numpy().tobytes(): n for n in range(12) for flip in (False, True)}
    order = [names[image] for image in one]
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12)) and order[:12] != order[12:]
    with pytest.raises(DataError, match="multiple of 3"):
        training_batches(train, config, range(1), 0, 3)


# The schedule.


def test_published_schedules_are_those_of_the_paper() -> None:
    voc, coco = PUBLISHED["voc"], PUBLISHED["coco"]
    assert [learning_rate(i, voc) for i in (0, 500, 1000, 17_999, 18_000, 22_000, 23_999)] == pytest.approx(
        [0.0333, 0.06665, 0.1, 0.1, 0.01, 0.001, 0.001]
    )
    assert [learning_rate(i, coco) for i in (0, 1000, 59_999, 60_000, 80_000)] == pytest.approx(
        [3e-5, 0.03, 0.03, 0.003, 0.0003]
    )
    assert voc.batch_size == coco.batch_size == 16
    short = voc.with_iterations(2400)
    assert (short.milestones, short.warmup_iterations) == ((1800, 2200), 100)
    assert voc.with_iterations(24_000) == voc
    half = voc.with_short_side(400)
    assert (half.short_sides, half.long_side) == ((400,), 666)


# The network.


@pytest.mark.parametrize(("name", "channels"), [("resnet18", (256, 512)), ("resnet50", (1024, 2048))])
def test_detector_of_a_real_backbone_learns_in_all_its_layers(name: str, channels: tuple[int, int]) -> None:
    torch.manual_seed(0)
    resnet = build_backbone(name, zero_init_residual=False)
    weights = BackboneWeights(name, False, IMAGENET, resnet.state_dict())
    config = small("coco", regions=4, short_sides=(64,))
    detector = build_detector(weights, 2, config, with_masks=True, half=None).train()
    assert (detector.backbone.out_channels, detector.roi_heads.res5.norm.num_features) == channels
    image = torch.rand(3, 64, 80)
    box = torch.tensor([[8.0, 8, 40, 48]])
    target = {"boxes": box, "labels": torch.tensor([2]), "masks": torch.ones(1, 64, 80, dtype=torch.uint8)}
    losses = detector([image], [target])
    sum(losses.values()).backward()
    assert set(losses) == {
        f"loss_{n}" for n in ("classifier", "box_reg", "mask", "objectness", "rpn_box_reg")
    }
    silent = [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    with torch.no_grad():
        features = detector.eval().backbone(detector.transform([image])[0].tensors)
    assert features.shape == (1, channels[0], 4, 6)  # 80 pixels are padded to 96


def test_weights_of_the_backbone_are_the_detectors() -> None:
    torch.manual_seed(0)
    state = build_backbone("resnet18").state_dict()
    weights = BackboneWeights("resnet18", False, IMAGENET, state)
    names = build_detector(weights, 2, small("voc"), with_masks=False, half=None).state_dict()
    places = {"layer4": "roi_heads.res5.layer4"}
    for name, value in state.items():
        stage, _, rest = name.partition(".")
        assert torch.equal(names[f"{places.get(stage, f'backbone.body.{stage}')}.{rest}"], value)


def test_half_precision_is_for_convolutions_alone() -> None:
    losses = {}
    for half in (None, torch.bfloat16):
        torch.manual_seed(0)
        detector = build_detector(TINY_WEIGHTS, 2, small("coco"), with_masks=True, half=half)
        boxes = []
        detector.rpn.anchor_generator.register_forward_hook(lambda *a, boxes=boxes: boxes.extend(a[2]))
        target = {"boxes": torch.tensor([[8.0, 8, 40, 48]]), "labels": torch.tensor([2])}
        target["masks"] = torch.ones(1, 64, 80, dtype=torch.uint8)
        torch.manual_seed(1)
        losses[half] = torch.stack(list(detector([torch.rand(3, 64, 80)], [target]).values()))
        assert boxes[0].dtype == losses[half].dtype == torch.float32
    assert not torch.equal(losses[None], losses[torch.bfloat16])
    torch.testing.assert_close(losses[None], losses[torch.bfloat16], rtol=0.1, atol=0.1)


def test_backbones_with_the_small_stem_are_refused() -> None:
    weights = BackboneWeights("resnet18", True, IMAGENET, {})
    with pytest.raises(ModelError, match="small_stem: false"):
        build_detector(weights, 2, small("voc"), with_masks=False, half=None)


# Fine-tuning.

LEARNING = small(
    "coco", iterations=60, milestones=(50, 55), lr=0.05, regions=32, short_sides=(64,), log_every=10
)


def test_detector_learns_to_find_and_outline_objects(coco_root: Path) -> None:
    train, test = open_coco(coco_root)
    untrained = prepare("coco", TINY_WEIGHTS, train, LEARNING, CPU)
    before = evaluate("coco", untrained, test).figures
    finetuning, reports, _ = finetune("coco", train, LEARNING)
    phases: list[PhaseReport] = []
    result = evaluate("coco", finetuning, test, phases.append)
    assert [report.iteration for report in reports] == list(range(10, 61, 10))
    losses = [report.loss for report in reports]
    assert np.mean(losses[-3:]) < 0.5 * losses[0]
    assert losses == pytest.approx([sum(report.terms.values()) for report in reports])
    assert before["AP50"] < 0.05 and before["maskAP50"] < 0.05
    assert result.figures["AP50"] > 0.25 and result.figures["maskAP50"] > 0.25
    assert [(p.done, p.total) for p in phases if p.done == p.total] == [(2, 2), (7, 7)]
    assert result.protocol == "detect-coco"
    assert [(data.images, data.classes) for data in result.data.values()] == [(12, 2), (7, 2)]


def test_interrupted_fine_tuning_ends_with_the_same_weights(voc_root: Path) -> None:
    train, _ = open_voc(voc_root)
    config = small("voc")
    whole, reports, _ = finetune("voc", train, config)
    _, _, saved = finetune("voc", train, config, stop_after=3)
    assert saved["step"] == 3
    resumed = prepare("voc", TINY_WEIGHTS, train, config, CPU)
    resumed.load_state_dict(saved)
    later, _ = go_on(resumed)
    assert [r.terms for r in later] == [r.terms for r in reports[3:]]
    for name, value in whole.detector.state_dict().items():
        assert torch.equal(resumed.detector.state_dict()[name], value), name


def test_checkpoints_come_when_they_are_due(voc_root: Path) -> None:
    train, _ = open_voc(voc_root)
    finetuning = prepare("voc", TINY_WEIGHTS, train, small("voc"), CPU)
    saved: list[tuple[int, bool]] = []
    finetuning.run(
        lambda is_last: saved.append((finetuning.done, is_last)),
        lambda: finetuning.done % 4 == 0,
        lambda: False,
    )
    assert saved == [(4, False), (6, True)]


def test_a_loss_that_is_not_finite_stops_and_is_not_saved(voc_root: Path) -> None:
    train, _ = open_voc(voc_root)
    finetuning = prepare("voc", TINY_WEIGHTS, train, small("voc"), CPU)
    finetuning.detector.roi_heads.box_predictor.cls_score.bias.data.fill_(float("inf"))
    with pytest.raises(ModelError, match=r"iteration 1; .*--lr"):
        finetuning.run(lambda is_last: pytest.fail("saved"), lambda: True, lambda: False)


def test_statistics_of_the_norms_are_means_over_batches(voc_root: Path) -> None:
    train, _ = open_voc(voc_root)
    finetuning = prepare("voc", TINY_WEIGHTS, train, small("voc", statistics_iterations=3), CPU)
    norm, seen = finetuning.detector.backbone.body.bn1, []
    handle = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    finetuning.measure_statistics()
    handle.remove()
    assert len(seen) == 3 and norm.momentum == 0.1
    expected = torch.stack([x.mean(dim=(0, 2, 3)) for x in seen]).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, expected)
    expected = torch.stack([x.var(dim=(0, 2, 3)) for x in seen]).mean(dim=0)
    torch.testing.assert_close(norm.running_var, expected)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_image_is_tested_once_and_in_order_on_any_number_of_ranks(
    coco_root: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """The ranks' parts one after another, in this process."""
    _, test = open_coco(coco_root)

    class Brightness(nn.Module):
        def forward(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
            return [image.mean() for image in images]

    def tested_by(rank: int, gathered: Callable[[list], list]) -> list:
        monkeypatch.setattr("eval.detection.predict.dist.get_rank", lambda: rank)
        monkeypatch.setattr("eval.detection.predict._gathered", gathered)
        return predict(Brightness(), test, lambda index, found: (index, float(found)), CPU, workers=0)

    monkeypatch.setattr("eval.detection.predict.world_size", lambda: ranks)
    parts: list[list] = []
    for rank in range(1, ranks):
        assert tested_by(rank, lambda part: parts.append(part) or []) == []
    images = [read_sample(test[n], False)[0].float() / 255 for n in range(7)]
    expected = [(n, pytest.approx(float(image.mean()), rel=1e-5)) for n, image in enumerate(images)]
    assert tested_by(0, lambda part: [part, *parts]) == expected


# The command.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable) -> Path:
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    write_checkpoint(path, model={"backbone": "resnet18"})
    return path


SMALL_COMMAND = small("voc", iterations=12, regions=2, test_proposals=4, statistics_iterations=0, lr=1e-3)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Result:
    """`eval detect`, with small settings for the published ones."""
    with monkeypatch.context() as patch:
        patch.setitem(PUBLISHED, "voc", SMALL_COMMAND)
        options = [str(argument) for argument in arguments]
        return CliRunner().invoke(app, ["eval", "detect", *options, "--device", "cpu"])


def test_command_is_stopped_by_a_signal_and_goes_on_to_a_result(
    checkpoint: Path, voc_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = "voc", checkpoint, voc_root, "--iterations", 3, "--json"
    with monkeypatch.context() as patch:
        patch.setattr(
            "tools.cli_detect._describe", lambda report: os.kill(os.getpid(), signal.SIGTERM) or "stop"
        )
        result = call(monkeypatch, *given)
    out = checkpoint.parent / "eval" / "checkpoint-detect-voc-VOCdevkit.json"
    detector = out.with_suffix(".pt")
    assert result.exit_code == 75 and "SIGTERM after iteration 2" in result.stderr
    assert torch.load(detector, weights_only=True)["step"] == 2 and not out.exists()

    result = call(monkeypatch, *given)
    assert result.exit_code == 0, result.output
    assert "iteration 3/3" in result.stderr and "iteration 2/3" not in result.stderr
    record = json.loads(result.stdout)
    assert record == json.loads(out.read_text())
    assert record["protocol"] == "detect-voc" and set(record["figures"]) == {"AP", "AP50", "AP75"}
    assert record["settings"]["iterations"] == 3 and record["settings"]["precision"] == "float32"

    again = call(monkeypatch, *given)
    assert json.loads(again.stdout)["figures"] == record["figures"] and "iteration " not in again.stderr
    other = call(monkeypatch, *given, "--lr", 0.5)
    assert other.exit_code == 2 and "lr=0.001, but now it is 0.5" in other.stderr and "--out" in other.stderr


def test_two_processes_share_training_and_tests(
    checkpoint: Path, voc_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process is rank 0, as torchrun would start it."""
    config = SMALL_COMMAND.model_copy(update={"iterations": 2})
    job = DetectionJob("voc", checkpoint, voc_root, config, "cpu", tmp_path / "result.json")
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    command = [sys.executable, Path(__file__).parent / "ranks" / "detect.py", tmp_path / "job"]
    path = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with meeting_point(2) as (environment, of_other), monkeypatch.context() as patch:
        other = subprocess.Popen([*command, tmp_path / "1.pt"], env={**os.environ, **of_other, **path})
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            record = run_detection(job)
            assert other.wait(60) == 0
        finally:
            other.kill()
    assert record == json.loads(job.out.read_text())
    of_rank_0 = torch.load(job.detector, weights_only=True)["model"]
    of_rank_1 = torch.load(tmp_path / "1.pt", weights_only=True)
    before = read_weights(checkpoint).state["layer4.0.bn1.weight"]
    assert not torch.equal(of_rank_0["roi_heads.res5.layer4.0.bn1.weight"], before)
    for name, value in of_rank_0.items():  # gradients and statistics of the norms are those of both ranks
        assert torch.equal(of_rank_1[name], value), name
    with pytest.raises(TrainingError, match="processes=2, but now it is 1"):
        run_detection(job)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--lr", 0, "--lr: should be greater than 0"),
        ("--iterations", 0, "--iterations must be at least 1"),
        ("--short-side", 8, "--short-side must be at least 32"),
        ("--batch-size", 0, "--batch-size: should"),
        ("--out", "x.pt", "must not end in .pt"),
    ],
)
def test_wrong_options_are_told_in_a_sentence(
    checkpoint: Path, voc_root: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: object, words: str
) -> None:
    result = call(monkeypatch, "voc", checkpoint, voc_root, option, value)
    (sentence,) = result.stderr.splitlines()
    assert result.exit_code == 2 and words in sentence


def test_wrong_paths_are_told_in_a_sentence(
    checkpoint: Path, voc_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for protocol, weights, root in (
        ("voc", tmp_path / "none.pt", voc_root),
        ("voc", checkpoint, tmp_path / "none"),
        ("coco", checkpoint, voc_root),
    ):
        result = call(monkeypatch, protocol, weights, root, "--out", tmp_path / "result.json")
        (sentence,) = result.stderr.splitlines()
        assert result.exit_code == 2 and sentence.endswith(".") and "Traceback" not in sentence


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_detector_learns_on_a_gpu_in_half_precision(coco_root: Path) -> None:
    train, test = open_coco(coco_root)
    finetuning = prepare("coco", TINY_WEIGHTS, train, LEARNING, torch.device("cuda"))
    reports, _ = go_on(finetuning)
    assert finetuning.detector.backbone.half is not None
    assert reports[-1].loss < 0.5 * reports[0].loss
    assert evaluate("coco", finetuning, test).figures["AP50"] > 0.25
