"""The paper's tables hold our figures only where data, protocol and file allow it."""

import copy
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eval.config import FeaturesConfig, TransferConfig, Voc07Config
from eval.transfer import for_data_set
from pipelines.errors import DataError
from tools.cli import app
from tools.eval_report import build_report
from tools.eval_report_page import report_markdown, report_page
from tools.published import PUBLISHED, TABLES

SHA = "0123456789abcdef" * 4
OTHER_SHA = "fedcba9876543210" * 4
IMAGENET = {
    "train": {"path": "train.beton", "images": 1_281_167, "classes": 1000},
    "test": {"path": "val.beton", "images": 50_000, "classes": 1000},
}
LINEAR = {
    "checkpoint": "runs/a/checkpoint.pt",
    "checkpoint_sha256": SHA,
    "architecture": "resnet50",
    "protocol": "linear",
    "settings": {
        "features": {"image_size": 224, "resize": 256, "batch_size": 64},
        "linear": {
            "epochs": 100,
            "batch_size": 256,
            "lr": 0.3,
            "weight_decay": 1e-6,
            "seed": 0,
        },
        "augmentation": "random crops",
    },
    "data": IMAGENET,
    "figures": {"top1": 0.7216, "top5": 0.9},
}


def changed(record: dict, **changes: object) -> dict:
    """A copy with other values: `settings__linear__lr=0.1` sets record["settings"]["linear"]["lr"]."""
    result = copy.deepcopy(record)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = result
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return result


def semisup(percent: int, images: int, **changes: object) -> dict:
    record = changed(LINEAR, protocol="semisup", data__train__images=images, **changes)
    tuned = {"epochs": 20, "batch_size": 256, "lr_backbone": 0.005, "lr_classifier": 0.5, "weight_decay": 0.0}
    settings = {"features": LINEAR["settings"]["features"], "semisup": tuned, "percent": percent}
    settings["augmentation"] = "random crops"
    return record | {"settings": settings}


def written(folder: Path, *records: object) -> Path:
    (folder / "run" / "eval").mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records):
        (folder / "run" / "eval" / f"{number}.json").write_text(json.dumps(record))
    return folder


def test_published_rows_of_barlow_twins_are_the_papers() -> None:
    rows = {table.number: table.rows[-1] for table in TABLES}
    assert all(row.method == "Barlow Twins" for row in rows.values())
    assert list(rows[1].percentages.values()) == [73.2, 91.0]
    assert list(rows[2].percentages.values()) == [55.0, 69.7, 79.2, 89.3]
    assert list(rows[3].percentages.values()) == [54.1, 86.2, 46.5]
    assert list(rows[4].percentages.values()) == [56.8, 82.6, 63.4, 39.2, 34.3]
    for table in TABLES:
        assert all(column.protocol in PUBLISHED for column in table.columns)
        assert len({column.heading for column in table.columns}) == len(table.columns)
        assert all(row.source and row.percentages for row in table.rows)


def test_an_imagenet_result_stands_in_table_1_with_its_checkpoint_and_file(tmp_path: Path) -> None:
    report = build_report([written(tmp_path, LINEAR)])
    (row,) = report.ours[1]
    assert row.percentages == pytest.approx({"top-1": 72.16, "top-5": 90.0})
    assert row.checkpoint == "checkpoint.pt 0123456789ab" and row.notes == []
    assert row.files == [str(tmp_path / "run/eval/0.json")]
    assert not report.ours[2] and not report.ours[3] and not report.ours[4]
    assert not report.others and not report.refused


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data__test__images": 49_999}, "tested on 49,999 images of 1,000 classes, not 50,000 of 1,000"),
        ({"data__test__classes": 10}, "tested on 50,000 images of 10 classes"),
        ({"data__train__images": 1_281_166}, "learned from 1,281,166 images of 1,000 classes, not 1,281,167"),
        ({"data__train__classes": 999}, "learned from 1,281,167 images of 999 classes"),
        ({"data__train": None}, "the data that was learned from is not stated"),
        ({"protocol": "knn"}, "the paper has no protocol knn"),
        ({"protocol": "linear-fast"}, "the paper has no protocol linear-fast"),
        ({"figures": {"top3": 0.5}}, "none of its figures is in the paper"),
    ],
)
def test_other_data_and_protocols_never_reach_a_column_of_the_paper(
    tmp_path: Path, changes: dict, reason: str
) -> None:
    report = build_report([written(tmp_path, changed(LINEAR, **changes))])
    assert not any(report.ours.values())
    assert [reason in other.reason for other in report.others] == [True]
    assert "72.2" not in report_markdown(report).partition("## Other data")[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"checkpoint_sha256": None}, "which checkpoint"),
        ({"checkpoint_sha256": "abc"}, "which checkpoint"),
        ({"checkpoint": None}, "which checkpoint"),
        ({"settings": None}, "which settings"),
        ({"data": None}, "which data"),
        ({"data__test": None}, "which data"),
        ({"data__test__images": "50,000"}, "how many images"),
        ({"figures": {}}, "not shares"),
        ({"figures__top1": 72.16}, "not shares"),
        ({"figures__top1": float("nan")}, "not shares"),
        ({"figures__top1": True}, "not shares"),
    ],
)
def test_a_figure_that_does_not_say_where_it_is_from_is_not_shown(
    tmp_path: Path, changes: dict, reason: str
) -> None:
    report = build_report([written(tmp_path, changed(LINEAR, **changes))])
    assert not any(report.ours.values()) and not report.others
    assert [reason in why for why in report.refused.values()] == [True]
    with pytest.raises(DataError, match=reason):
        build_report([tmp_path / "run" / "eval" / "0.json"])


def test_settings_that_differ_are_stated_in_the_row(tmp_path: Path) -> None:
    record = changed(
        LINEAR,
        architecture="resnet18 with the small stem",
        settings__linear__lr=0.2,
        settings__linear__weight_decay=None,
        settings__features__resize=224,
        settings__features__batch_size=7,  # of no consequence
    )
    (row,) = build_report([written(tmp_path, record)]).ours[1]
    assert row.notes == [
        "linear: resnet18 with the small stem instead of resnet50",
        "linear: features.resize 224 instead of 256",
        "linear: linear.lr 0.2 instead of 0.3 or 0.1",
        "linear: linear.weight_decay not stated",
    ]


def test_results_of_one_checkpoint_share_a_row_unless_they_compete(tmp_path: Path) -> None:
    few, many = semisup(1, 12_812), semisup(10, 128_117)
    again = changed(few, figures__top1=0.5)
    theirs = changed(few, checkpoint_sha256=OTHER_SHA)
    report = build_report([written(tmp_path, few, many, again, theirs)])
    first, second, third = report.ours[2]
    assert list(first.percentages) == ["top-1, 1 %", "top-5, 1 %", "top-1, 10 %", "top-5, 10 %"]
    assert len(first.files) == 2 and first.notes == []
    assert second.sha256 == SHA and second.percentages["top-1, 1 %"] == pytest.approx(50)
    assert third.sha256 == OTHER_SHA
    report = build_report([tmp_path, tmp_path / "run"])  # the same files twice
    assert len(report.ours[2]) == 3


@pytest.mark.parametrize(("percent", "images"), [(1, 128_117), (10, 12_811), (5, 12_811)])
def test_a_percentage_counts_only_if_settings_and_images_agree(
    tmp_path: Path, percent: int, images: int
) -> None:
    report = build_report([written(tmp_path, semisup(percent, images))])
    assert not report.ours[2]
    assert f"{percent} % by the settings and {images:,} images" in report.others[0].reason


def test_each_protocol_of_tables_3_and_4_has_its_columns(tmp_path: Path) -> None:
    def of(protocol: str, figures: dict, settings: dict) -> dict:
        published = PUBLISHED[protocol]
        data = {
            "train": {"path": "x", "images": published.train[0][0], "classes": published.classes},
            "test": {"path": "y", "images": published.test, "classes": published.classes},
        }
        return LINEAR | {"protocol": protocol, "figures": figures, "settings": settings, "data": data}

    scores = dict.fromkeys(("AP", "AP50", "AP75", "maskAP", "maskAP50", "maskAP75"), 0.1)
    tuned = {"iterations": 90_000, "batch_size": 16, "lr": 0.03}
    crops = {"features": FeaturesConfig().model_dump(mode="json")}
    places, inat = (
        crops | {"transfer": for_data_set(name, config).model_dump(mode="json"), "augmentation": augmentation}
        for name, config, augmentation in (
            ("places205", TransferConfig(), "random crops"),
            ("inat18", TransferConfig(epochs=80), "none"),
        )
    )
    records = [
        of("transfer-places205", {"top1": 0.5}, places),
        of("transfer-inat18", {"top1": 0.4}, inat),
        of("voc07", {"mAP": 0.8}, crops | {"voc07": Voc07Config().model_dump(mode="json")}),
        of("detect-voc", {"AP": 0.5, "AP50": 0.8, "AP75": 0.6}, tuned),
        of("detect-coco", scores, tuned),
    ]
    report = build_report([written(tmp_path, *records)])
    (transfer,), (detect,) = report.ours[3], report.ours[4]
    assert list(transfer.percentages.values()) == [50, 40, 80]
    assert transfer.notes == [
        "transfer-inat18: augmentation none instead of random crops",
        "transfer-inat18: transfer.epochs 80 instead of 84",
    ]
    assert list(detect.percentages.values()) == pytest.approx([50, 80, 60, *[10] * 6])
    assert detect.notes == [
        "detect-voc: iterations 90000 instead of 24000",
        "detect-voc: lr 0.03 instead of 0.1",
    ]


def test_page_and_markdown_show_the_same_cells_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    report = build_report(
        [written(tmp_path, LINEAR, changed(LINEAR, protocol="knn"), {"protocol": "x", "figures": 1})]
    )
    page, text = report_page(report), report_markdown(report)
    assert "http" not in page and "<script" not in page
    (ours,) = (line for line in text.splitlines() if "ours: checkpoint.pt" in line)
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert cells[1:3] == ["72.2", "90.0"]
    assert re.search(r"<th>ours: checkpoint.pt 0123456789ab</th><td>72.2</td><td>90.0</td>", page)
    assert text.count("| not run |") == 3 and page.count("not run") == 3
    for text_of in (page, text):
        assert "the paper has no protocol knn" in text_of and "which checkpoint" in text_of


def test_the_command_writes_the_page_and_prints_plain_data(tmp_path: Path) -> None:
    folder, out = written(tmp_path / "runs", LINEAR), tmp_path / "new" / "report.html"
    result = CliRunner().invoke(app, ["eval", "report", str(folder), "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["tables"][0]["ours"][0]["percentages"]["top-1"] == pytest.approx(72.16)
    assert found["tables"][0]["published"][-1]["method"] == "Barlow Twins"
    assert "72.2" in out.read_text()
    for arguments, sentence in (
        ([str(tmp_path / "missing")], "There is no"),
        (["--out", str(tmp_path / "x.pdf")], ".html or .md"),
        (["--out", str(out / "x.md")], "choose another place"),
    ):
        result = CliRunner().invoke(app, ["eval", "report", *arguments])
        assert result.exit_code == 2 and sentence in result.stderr, result.output


def test_without_results_all_of_ours_is_empty(tmp_path: Path) -> None:
    report = build_report([])
    assert not any(report.ours.values()) and report_markdown(report).count("| not run |") == len(TABLES)
