"""Promises of `tools.convert.sources`: the same images, order and labels, whatever they are packed in."""

import io
import json
import os
import tarfile
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from pipelines.errors import DataError
from tools.convert.sources import open_image_set
from tools.convert.sources.tar_index import members

Listing = list[tuple[str, int, bytes]]


def listing(images) -> Listing:
    """(name, label, bytes) of each image."""
    return [(images.name(i), images.label(i), images.read(i)) for i in range(len(images))]


def write_tree(root: Path, names: list[str]) -> Path:
    """Files whose content is their own name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name) * 3)
    return root


def tar_bytes(files: dict[str, bytes], tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format, errors="surrogateescape") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_tar(path: Path, files: dict[str, bytes], **options: int) -> Path:
    path.write_bytes(tar_bytes(files, **options))
    return path


def test_folder_has_the_order_and_labels_of_image_folder(tmp_path: Path) -> None:
    names = [
        "b/2.jpg",
        "b/10.PNG",
        "a b/z/0.jpg",
        "a b/z-1/3.jpg",
        "a b/x.jpeg",
        "ü/é.webp",
        "a b/note.txt",
        "~/5.bmp",
    ]
    root = write_tree(tmp_path / "images", names)
    (root / "empty").mkdir()
    (root / "stray.txt").touch()
    images = open_image_set(root)
    reference = ImageFolder(str(root), allow_empty=True)
    expected = [(os.path.relpath(path, root), label) for path, label in reference.samples]
    assert [entry[:2] for entry in listing(images)] == expected
    assert images.classes == reference.classes == ["a b", "b", "empty", "~", "ü"]
    assert [images.read(i) for i in range(7)] == [os.fsencode(name) * 3 for name, _ in expected]
    assert [images.size(i) for i in range(7)] == [3 * len(os.fsencode(name)) for name, _ in expected]
    assert images.ignored == 1


def test_names_that_are_not_utf8_stay_readable(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9/\xff 1.jpg")
    images = open_image_set(write_tree(tmp_path, [name]))
    assert listing(images) == [("caf\\xe9/\\xff 1.jpg", 0, b"caf\xe9/\xff 1.jpg" * 3)]
    assert images.classes == ["caf\\xe9"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "images", ["a/0.jpg", "b/1.jpg"])
    write_tree(tmp_path / "elsewhere", ["2.jpg"])
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "3.jpg").symlink_to(root / "b" / "1.jpg")
    (root / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    images = open_image_set(root)
    assert [images.name(i) for i in range(5)] == ["a/0.jpg", "a/3.jpg", "b/1.jpg", "b/gone.jpg", "c/2.jpg"]
    assert images.read(1) == b"b/1.jpg" * 3
    assert images.size(3) == 0
    with pytest.raises(FileNotFoundError):
        images.read(3)
    (root / "b" / "itself.jpg").symlink_to("itself.jpg")
    (root / "itself").symlink_to("itself")
    images = open_image_set(root)
    assert (images.name(4), images.classes) == ("b/itself.jpg", ["a", "b", "c"])
    with pytest.raises(OSError, match="Too many levels"):
        images.read(4)
    (root / "b" / "up").symlink_to(root)
    with pytest.raises(DataError, match="leads back to a folder above it"):
        open_image_set(root)


def test_a_pipe_named_as_an_image_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "0.jpg")
    with pytest.raises(OSError, match="not a file"):
        open_image_set(tmp_path).read(0)


@pytest.mark.parametrize("unlabelled", [False, True])
def test_images_directly_in_a_folder_have_no_labels(unlabelled: bool, tmp_path: Path) -> None:
    names = ["0.jpg", "10.jpg", "2.jpg"] + ["part/1.jpg", "part/deep/0.jpg"] * unlabelled
    images = open_image_set(write_tree(tmp_path, names[::-1]), unlabelled=unlabelled)
    assert [entry[:2] for entry in listing(images)] == [(name, -1) for name in names]
    assert images.classes == []


@pytest.fixture
def class_files() -> dict[str, dict[str, bytes]]:
    """Two classes with names out of order, as in ImageNet."""
    rng = np.random.default_rng(11)
    files: dict[str, dict[str, bytes]] = {}
    for wnid in ("n02119789", "n01440764"):
        names = [f"{wnid}_{number}.JPEG" for number in rng.permutation(20000)[:7]]
        files[wnid] = {name: rng.bytes(int(rng.integers(0, 3000))) for name in names}
    return files


def as_folder(root: Path, class_files: dict[str, dict[str, bytes]]) -> Listing:
    """The listing of these files in a folder, for comparison."""
    for wnid, files in class_files.items():
        for name, data in files.items():
            (root / wnid).mkdir(parents=True, exist_ok=True)
            (root / wnid / name).write_bytes(data)
    return listing(open_image_set(root))


def test_archive_of_class_archives_equals_its_unpacked_folder(class_files: dict, tmp_path: Path) -> None:
    archive = write_tar(
        tmp_path / "ILSVRC2012_img_train.tar",
        {f"{wnid}.tar": tar_bytes(files) for wnid, files in class_files.items()},
    )
    images = open_image_set(archive)
    expected = as_folder(tmp_path / "folder", class_files)
    assert listing(images) == [(name.replace("/", ".tar/"), label, data) for name, label, data in expected]
    assert images.classes == sorted(class_files)
    assert [images.size(i) for i in range(14)] == [len(data) for _, _, data in expected]


def test_folder_of_class_archives_equals_the_archive_of_them(class_files: dict, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for wnid, files in class_files.items():
        write_tar(tmp_path / "tars" / f"{wnid}.tar", files)
    images = open_image_set(tmp_path / "tars")
    expected = as_folder(tmp_path / "folder", class_files)
    assert listing(images) == [(name.replace("/", ".tar/"), label, data) for name, label, data in expected]
    assert images.classes == sorted(class_files)


@pytest.mark.parametrize("prefix", ["", "./", "train/", "a/b/"])
def test_tar_of_class_folders_equals_its_unpacked_folder(
    prefix: str, class_files: dict, tmp_path: Path
) -> None:
    files = {
        f"{prefix}{wnid}/{name}": data for wnid, group in class_files.items() for name, data in group.items()
    }
    images = open_image_set(write_tar(tmp_path / "x.tar", {**files, f"{prefix}README": b"text"}))
    expected = as_folder(tmp_path / "folder", class_files)
    inside = prefix.removeprefix("./")
    assert listing(images) == [(inside + name, label, data) for name, label, data in expected]
    assert images.classes == sorted(class_files)
    assert images.ignored == 1


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_agrees_with_tarfile(tar_format: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(12)
    names = ["x.jpg", "d" * 90 + "/" + "e" * 90 + ".jpg", "a b/c.png"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += ["ü/é.jpg", "/".join(["long"] * 60) + "/0.jpg", "f" * 200 + ".jpg", os.fsdecode(b"\xff.jpg")]
    files = {name: rng.bytes(int(rng.integers(1, 2000))) for name in names}
    path = write_tar(tmp_path / "x.tar", files, tar_format=tar_format)
    with tarfile.open(path, "a", format=tar_format) as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"other{kind[0]}.jpg")
            info.type, info.linkname = kind, "x.jpg"
            tar.addfile(info)
    with path.open("rb") as file, tarfile.open(path, errors="surrogateescape") as tar:
        found = list(members(file.fileno(), "x.tar"))
        expected = [info for info in tar if not info.isdir()]
        assert [os.fsdecode(member.path) for member in found] == [info.name for info in expected]
        for member, info in zip(found, expected, strict=True):
            assert member.is_file == info.isfile()
            if member.is_file:
                assert (member.offset, member.size) == (info.offset_data, info.size)
    with pytest.raises(OSError, match="a link inside an archive"):
        images = open_image_set(path, unlabelled=True)
        images.read([images.name(i) for i in range(len(images))].index("other50.jpg"))


def test_sizes_beyond_octal_digits_are_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("huge.jpg")
    info.size = 9 << 30  # a hole in the file
    path = tmp_path / "x.tar"
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        header = info.tobuf(tar_format)
        path.write_bytes(header)
        os.truncate(path, len(header) + info.size)
        images = open_image_set(path)
        assert images.entries_N["size"].tolist() == [info.size]
        assert images.size(0) == 0  # so that nobody takes memory for it
        with pytest.raises(OSError, match="9663676416 bytes are more than 1073741824"):
            images.read(0)


def test_name_ends_before_a_zero_byte(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("0.jpg", "1.jpg"):
            info = tarfile.TarInfo(name)
            info.pax_headers = {"path": f"{name}\0.jpg"}
            tar.addfile(info)
    images = open_image_set(path)
    assert [images.name(i) for i in range(len(images))] == ["0.jpg", "1.jpg"]


@pytest.mark.parametrize("cut", [100, 700, 1500])
def test_incomplete_archive_is_refused(cut: int, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"0.jpg": b"0" * 300, "1.jpg": b"1" * 900})
    os.truncate(path, 512 + 512 + 512 + 900 - cut if cut < 900 else cut)
    with pytest.raises(DataError, match=r"x\.tar is cut short"):
        open_image_set(path)


def test_damaged_header_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"0.jpg": b"0" * 300, "1.jpg": b"1" * 900})
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x.tar is damaged \(at byte 1024\)"):
        open_image_set(path)


def test_archive_that_shrinks_later_is_a_read_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"0.jpg": b"0" * 300})
    images = open_image_set(path)
    os.truncate(path, 600)
    with pytest.raises(OSError, match="cut short"):
        images.read(0)


def test_threads_read_shards_at_the_same_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(13)
    expected = {}
    for shard in range(5):
        files = {f"{shard}{number}.jpg": rng.bytes(int(rng.integers(1, 5000))) for number in range(40)}
        write_tar(tmp_path / f"{shard}.tar", files)
        expected |= {f"{shard}.tar/{name}": data for name, data in files.items()}
    images = open_image_set(tmp_path)
    assert [images.name(i) for i in range(200)] == list(expected)  # the archives' order
    wrong = []

    def read(seed: int) -> None:
        for index in np.random.default_rng(seed).permutation(200).tolist():
            if images.read(index) != expected[images.name(index)]:
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert images.classes == [] and images.label(0) == -1


def sample(key: str, label: object, kind: str) -> dict[str, bytes]:
    """The files of a WebDataset sample: its label comes before the image or after it."""
    if kind == "json":
        return {f"{key}.jpg": key.encode(), f"{key}.json": json.dumps({"label": label, "w": 3}).encode()}
    return {f"{key}.cls": f"{label}\n".encode(), f"{key}.jpg": key.encode()}


@pytest.mark.parametrize("kind", ["cls", "json"])
@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ([2, 0, 5, 2], ["0", "1", "2", "3", "4", "5"], [2, 0, 5, 2]),
        (["dog", "cat", "cow", "dog"], ["cat", "cow", "dog"], [2, 0, 1, 2]),
    ],
)
@pytest.mark.parametrize("how", ["one tar", "folder", "list"])
def test_webdataset_labels(
    kind: str, labels: list, classes: list, expected: list, how: str, tmp_path: Path
) -> None:
    samples = [sample(key, label, kind) for key, label in zip("dbca", labels, strict=True)]
    if how == "one tar":
        images = open_image_set(
            write_tar(tmp_path / "x.tar", samples[0] | samples[1] | samples[2] | samples[3])
        )
        prefixes = [""] * 4
    else:
        shards = tmp_path / "shards"
        shards.mkdir()
        write_tar(shards / "0.tar", samples[0] | samples[1])
        write_tar(shards / "1.tar", samples[2] | samples[3])
        (tmp_path / "shards.txt").write_text("shards/0.tar\nshards/1.tar\n")
        images = open_image_set(shards if how == "folder" else tmp_path / "shards.txt")
        prefixes = ["0.tar/", "0.tar/", "1.tar/", "1.tar/"]
    keys = [
        (f"{prefix}{key}.jpg", label, key.encode())
        for prefix, key, label in zip(prefixes, "dbca", expected, strict=True)
    ]
    assert listing(images) == keys
    assert images.classes == classes


def test_webdataset_image_without_its_label_cannot_be_read(tmp_path: Path) -> None:
    images = open_image_set(write_tar(tmp_path / "x.tar", sample("a", 1, "cls") | {"b.jpg": b"b"}))
    assert [images.label(i) for i in range(2)] == [1, -1]
    assert images.read(0) == b"a"
    with pytest.raises(OSError, match="no label"):
        images.read(1)


def test_shards_of_class_folders_have_the_folders_as_classes(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"t/cat/0.jpg": b"0", "t/dog/1.jpg": b"1"})
    write_tar(tmp_path / "1.tar", {"t/dog/2.jpg": b"2", "t/ant/3.jpg": b"3"})
    images = open_image_set(tmp_path)
    assert images.classes == ["ant", "cat", "dog"]
    assert [images.label(i) for i in range(4)] == [1, 2, 2, 0]


@pytest.fixture
def validation(tmp_path: Path) -> tuple[Path, list[str]]:
    """Images out of order in an archive, and the classes in the order of their names."""
    names = [f"ILSVRC2012_val_{number:08}.JPEG" for number in (3, 1, 4, 2)]
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", {name: name.encode() for name in names})
    return tmp_path / "ILSVRC2012_img_val.tar", ["n03", "n01", "n03", "n02"]


def lines_of_names(classes: list[str], folder: Path) -> Path:
    file = folder / "truth.txt"
    file.write_text("".join(f"{name}\n" for name in classes))
    return file


def kaggle(classes: list[str], folder: Path) -> Path:
    file = folder / "LOC_val_solution.csv"
    rows = [f"ILSVRC2012_val_{i + 1:08},{name} 85 1 499 272 " for i, name in enumerate(classes)]
    file.write_text("\n".join(["ImageId,PredictionString", *rows[::-1]]))
    return file


def caffe(classes: list[str], folder: Path) -> Path:
    file = folder / "val.txt"
    position = {name: label for label, name in enumerate(sorted(set(classes)))}
    rows = [f"ILSVRC2012_val_{i + 1:08}.JPEG {position[name]}" for i, name in enumerate(classes)]
    file.write_text("\n".join(rows))
    return file


def unpacked_kit(classes: list[str], folder: Path) -> Path:
    savemat = pytest.importorskip("scipy.io").savemat
    # Numbers in an order of their own, and an inner node of WordNet after the leaves.
    numbers = {"n02": 1, "n03": 2, "n01": 3}
    rows = [(number, name, f"words of {name}", 0) for name, number in numbers.items()] + [
        (4, "n00", "all", 3)
    ]
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    file = folder / "ILSVRC2012_validation_ground_truth.txt"
    file.write_text("".join(f"{numbers[name]}\n" for name in classes))
    return file


def packed_kit(classes: list[str], folder: Path) -> Path:
    truth = unpacked_kit(classes, folder)
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for file in (truth, folder / "meta.mat"):
            tar.add(file, f"ILSVRC2012_devkit_t12/data/{file.name}")
            file.unlink()
    return folder / "ILSVRC2012_devkit_t12.tar.gz"


@pytest.mark.parametrize("write", [lines_of_names, kaggle, caffe, unpacked_kit, packed_kit])
def test_ground_truth_labels_the_validation_archive(
    write: Callable[[list[str], Path], Path], validation: tuple[Path, list[str]], tmp_path: Path
) -> None:
    archive, classes = validation
    images = open_image_set(archive, ground_truth=write(classes, tmp_path))
    assert [images.name(i)[-6] for i in range(4)] == ["1", "2", "3", "4"]
    assert [images.label(i) for i in range(4)] == [2, 0, 2, 1]
    assert images.classes == (["0", "1", "2"] if write is caffe else ["n01", "n02", "n03"])


def test_devkit_numbers_without_their_meaning_are_refused(
    validation: tuple[Path, list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    file.write_text("1\n2\n3\n1\n")
    with pytest.raises(DataError, match=r"mean nothing without meta\.mat"):
        open_image_set(validation[0], ground_truth=file)


TRUTHS = {
    "with folders": (["cats/1.jpg", "dogs/1.jpg"], "cats/1.jpg cat\ndogs/1.jpg dog"),
    "with folders, without endings": (["cats/1.jpg", "dogs/1.jpg"], "dogs/1 dog\ncats/1 cat"),
    "several dots": (["img.1.jpg", "img.2.jpg"], "img.1.jpg,cat\nimg.2.jpg, dog "),
    "several dots, without endings": (["img.1.jpg", "img.2.jpg"], "img.1 cat\nimg.2\tdog"),
    "twice the same": (["a/1.jpg", "a/2.jpg"], "1.jpg cat\na/1.jpg cat\n2 dog"),
}


@pytest.mark.parametrize(("names", "text"), TRUTHS.values(), ids=TRUTHS.keys())
def test_each_line_labels_the_image_that_it_names(names: list[str], text: str, tmp_path: Path) -> None:
    (tmp_path / "truth.txt").write_text(text)
    root = write_tree(tmp_path / "images", names)
    images = open_image_set(root, ground_truth=tmp_path / "truth.txt", unlabelled=True)
    assert [entry[:2] for entry in listing(images)] == list(zip(names, [0, 1], strict=True))
    assert images.classes == ["cat", "dog"]


def test_class_in_a_list_is_the_rest_of_the_line(tmp_path: Path) -> None:
    (tmp_path / "truth.txt").write_text("1.jpg great white shark\n2.jpg\t great dane \n3.jpg,great dane\n")
    root = write_tree(tmp_path / "images", ["1.jpg", "2.jpg", "3.jpg"])
    images = open_image_set(root, ground_truth=tmp_path / "truth.txt")
    assert images.classes == ["great dane", "great white shark"]
    assert [images.label(i) for i in range(3)] == [1, 0, 0]


SUBSETS = {
    "file names": ["n01_1.JPEG", "n02_0.JPEG"],
    "without ending": ["n01_1", "n02_0"],
    "with folder": ["n01/n01_1.JPEG", "n02/n02_0"],
}


@pytest.mark.parametrize("lines", SUBSETS.values(), ids=SUBSETS.keys())
@pytest.mark.parametrize("packed", [False, True])
def test_subset_keeps_order_and_labels(lines: list[str], packed: bool, tmp_path: Path) -> None:
    groups = {wnid: {f"{wnid}_{i}.JPEG": b"%d" % i for i in range(3)} for wnid in ("n00", "n01", "n02")}
    if packed:
        source = write_tar(
            tmp_path / "x.tar", {f"{wnid}.tar": tar_bytes(files) for wnid, files in groups.items()}
        )
    else:
        source = tmp_path / "folder"
        as_folder(source, groups)
    (tmp_path / "subset.txt").write_text("\n".join(lines[::-1]) + "\n\n")
    images = open_image_set(source, subset=tmp_path / "subset.txt")
    assert [(label, data) for _, label, data in listing(images)] == [(1, b"1"), (2, b"0")]
    assert images.classes == ["n00", "n01", "n02"]


def test_fingerprint_tells_sources_apart(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "images", ["a/0.jpg", "a/1.jpg", "b/2.jpg"])
    first = open_image_set(root).fingerprint()
    (tmp_path / "copy").symlink_to(root)
    assert open_image_set(tmp_path / "copy").fingerprint() == first
    seen = {first}
    for change in (
        lambda: (root / "a" / "1.jpg").write_bytes(b"other size"),
        lambda: (root / "a" / "1.jpg").rename(root / "a" / "3.jpg"),
        lambda: (root / "a" / "3.jpg").rename(root / "b" / "3.jpg"),
        lambda: (root / "c").mkdir(),
    ):
        change()
        seen.add(open_image_set(root).fingerprint())
    assert len(seen) == 5


def test_many_files_in_one_folder_take_little_memory(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "first.jpg").touch()
    for number in range(20_000):
        os.link(folder / "first.jpg", folder / f"{number:08}.jpg")
    tracemalloc.start()
    images = open_image_set(tmp_path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(images) == 20_001
    assert kept < 20_000 * 80
    assert peak < 20_000 * 300


def bad_archives(root: Path) -> None:
    root.mkdir()
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        write_tar(root / name, {"0.jpg": b""})


def bad_compression(root: Path) -> None:
    with tarfile.open(root, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"))


def tree(*names: str) -> Callable[[Path], object]:
    return lambda root: write_tree(root, list(names))


def tar(**files: bytes) -> Callable[[Path], object]:
    """`a__b_jpg` stands for the file a/b.jpg."""
    named = {name.replace("__", "/").replace("_", "."): data for name, data in files.items()}
    return lambda root: write_tar(root, named)


def pax_header(record: bytes) -> Callable[[Path], object]:
    """An archive of one image whose extended header holds this record."""
    digits = len(str(len(record) + 2))
    length = len(record) + 2 + digits
    content = b"%d %s\n" % (length + (len(str(length)) > digits), record)
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(content)
    padding = bytes(-len(content) % 512)
    header = info.tobuf(tarfile.USTAR_FORMAT) + content + padding
    return lambda root: root.write_bytes(header + tar_bytes({"0.jpg": b"0"}))


def negative_size(root: Path) -> None:
    header = bytearray(tarfile.TarInfo("0.jpg").tobuf())
    header[124:136] = b"-0000001000\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    root.write_bytes(header + bytes(1024))


@pytest.mark.parametrize(
    ("prepare", "options", "words"),
    [
        (lambda root: None, {}, "does not exist"),
        (lambda root: root.mkdir(), {}, "holds no images"),
        (lambda root: (root / "a").mkdir(parents=True), {}, "holds no images"),
        (tree("0.jpg", "a/1.jpg"), {}, "holds images and also sub-folders such as a"),
        (tree("train/a/0.jpg", "val/a/1.jpg"), {}, "holds the parts train, val of a data set"),
        (bad_archives, {}, "holds several data sets"),
        (bad_compression, {}, r"is compressed \(gzip\)"),
        (lambda root: root.write_text("some text " * 100), {}, r"is not a tar archive \(at byte 0\)"),
        (lambda root: root.write_bytes(b""), {}, "holds no images"),
        (tar(x__0_jpg=b"", x__y__1_jpg=b""), {}, "in the folder 'x' and also below it"),
        (tar(train__0_jpg=b"", val__1_jpg=b""), {}, "holds the parts train, val of a data set"),
        (tar(a_cls=b"\xff", a_jpg=b""), {}, r"label beside a\.jpg in .*source cannot be read"),
        (os.mkfifo, {}, "is no file"),
        (tree("a/0.jpg"), {"subset": "0.jpg\n1.jpg"}, "Line 2 of .*, '1.jpg', names no image"),
        (tree("a/0.jpg", "b/0.jpg"), {"subset": "0"}, "'0', names 2 images in"),
        (tree("a/0.jpg"), {"subset": ""}, "subset is empty; write one file name"),
        (tree("a/0.jpg"), {"ground_truth": "x"}, "has labels of its own"),
        (tree("0.jpg"), {"ground_truth": "x\ny"}, "has 2 labels for the 1 images"),
        (tree("0.jpg"), {"ground_truth": "1.jpg 3"}, r"has no label for '0\.jpg'"),
        (tree("0.jpg", "1.jpg"), {"ground_truth": "0 1\n2"}, "is no list of labels"),
        (tree("0.jpg"), {"ground_truth": "99999999"}, "label 99999999, which is too large"),
        (tree("img.1.jpg"), {"ground_truth": "img.1.jpg,"}, "Line 1 of .* lacks a file or its class"),
        (
            tree("0.jpg"),
            {"ground_truth": "\n0.jpg a\n0.jpg b"},
            "Lines 2 and 3 of .* different classes",
        ),
        (tree("0.jpg"), {"ground_truth": "0.jpg a\n0 b"}, "Lines 1 and 2 of .* '0.jpg' different classes"),
        (tree("0.jpg", "0.png"), {"ground_truth": "0 a"}, "Line 1 of .*, '0', names 2 images in"),
        (
            tree("0.jpg", "1.jpg", "2.jpg"),
            {"ground_truth": "2\n1\n2"},
            "from 1 to 2; number .* from 0",
        ),
        (pax_header(b"size=abc"), {}, "has a damaged extended header"),
        (pax_header(b"size=-1024"), {}, "has a damaged extended header"),
        (pax_header(b"size=" + b"9" * 5000), {}, "has a damaged extended header"),
        (negative_size, {}, r"is not a tar archive \(at byte 0\)"),
    ],
)
def test_bad_input_gets_one_sentence(
    prepare: Callable[[Path], object], options: dict[str, str], words: str, tmp_path: Path
) -> None:
    prepare(tmp_path / "source")
    files = {name: tmp_path / name for name in options}
    for name, text in options.items():
        files[name].write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        open_image_set(tmp_path / "source", **files)
    assert "\n" not in str(caught.value)


def test_missing_lists_and_locked_folders_get_one_sentence(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "images", ["a/0.jpg"])
    for name in ("subset", "ground_truth"):
        source = root / "a" if name == "ground_truth" else root
        with pytest.raises(DataError, match=r"nowhere\.txt cannot be read: No such file"):
            open_image_set(source, **{name: tmp_path / "nowhere.txt"})
    (tmp_path / "shards.txt").write_text("missing.tar\n")
    with pytest.raises(DataError, match=r"missing\.tar cannot be read: No such file"):
        open_image_set(tmp_path / "shards.txt")


def test_real_archive_equals_its_unpacked_folder(shared_data: Path, tmp_path: Path) -> None:
    archive = shared_data / "imagenet-sample.tar"
    if not archive.is_file():
        pytest.skip("no sample of ImageNet beside the checkout")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    packed, unpacked = open_image_set(archive), open_image_set(tmp_path / "train")
    assert [(f"train/{name}", label, data) for name, label, data in listing(unpacked)] == listing(packed)
    assert packed.classes == unpacked.classes
