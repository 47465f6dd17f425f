"""Both crops of a whole batch, on threads, are what PIL makes of each image by itself."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.decode_numba import OTHER_SIZE, UNREADABLE
from pipelines.two_crops import OUTSIDE, decode_and_crop

POISON = 0xAB
SIZE = 37


@dataclass
class Stored:
    """A file's bytes and its samples: the arguments of `decode_and_crop`, and the images as PIL sees them."""

    file_bytes: np.ndarray
    ptr_N: np.ndarray
    size_N: np.ndarray
    height_N: np.ndarray
    width_N: np.ndarray
    is_raw_N: np.ndarray
    box_VN4: np.ndarray
    images: list[Image.Image]

    def crops(self, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """The status and both views; fails where anything beside the views was written."""
        memory = np.full((4, len(self.ptr_N), SIZE, SIZE, 3), POISON, np.uint8)
        arguments = list(vars(self).values())[:-1]
        status_N = decode_and_crop(*arguments, memory[1:3], threads)
        assert (memory[0] == POISON).all() and (memory[3] == POISON).all()
        return status_N, memory[1:3]

    def expected(self, view: int, n: int) -> np.ndarray:
        top, left, height, width = self.box_VN4[view, n].tolist()
        crop = self.images[n].crop((left, top, left + width, top + height))
        return np.asarray(crop.resize((SIZE, SIZE), Image.BICUBIC))


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """40 images of all sizes, two thirds JPEGs and the rest raw, in a file that is mapped read-only."""
    rng = np.random.default_rng(1)
    parts, images, boxes = [], [], []
    for n in range(40):
        height, width = (int(side) for side in np.exp(rng.uniform(0, 5.5, 2)).astype(int))
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        image = coarse.resize((width, height), Image.BICUBIC)
        encoded = BytesIO()
        if n % 3:
            image.convert("L" if n % 4 == 0 else "RGB").save(
                encoded, "JPEG", quality=int(rng.integers(30, 96))
            )
            image = Image.open(encoded).convert("RGB")
            parts.append(np.frombuffer(encoded.getvalue(), np.uint8))
        else:
            parts.append(np.asarray(image).reshape(-1))
        images.append(image)
        sides = rng.integers(1, (height + 1, width + 1), (2, 2))
        boxes.append(np.concatenate((rng.integers((height, width) - sides + 1), sides), 1))
    file = tmp_path / "images"
    np.concatenate(parts).tofile(file)
    size_N = np.array([len(part) for part in parts])
    return Stored(
        np.memmap(file, np.uint8, "r").view(np.ndarray),
        np.cumsum(size_N) - size_N,
        size_N,
        np.array([image.height for image in images], np.int32),
        np.array([image.width for image in images], np.int32),
        np.arange(40) % 3 == 0,
        np.stack(boxes, 1).astype(np.int32),
        images,
    )


@pytest.mark.parametrize("threads", [1, 2, 7, 60])
def test_every_crop_is_that_of_pil(stored: Stored, threads: int) -> None:
    for _ in range(5):
        status_N, views_VNSS3 = stored.crops(threads)
        assert not status_N.any()
        for view in range(2):
            for n in range(40):
                np.testing.assert_array_equal(views_VNSS3[view, n], stored.expected(view, n))


def test_arrays_of_other_types_and_layouts(stored: Stored) -> None:
    """As .beton files hold their numbers: unsigned, and as fields of records."""
    expected = stored.crops(1)[1]
    records = np.zeros(
        40, [("ptr", np.uint64), ("height", np.uint16), ("width", np.uint16), ("mode", np.uint8)]
    )
    records["ptr"], records["mode"] = stored.ptr_N, stored.is_raw_N
    records["height"], records["width"] = stored.height_N, stored.width_N
    stored.ptr_N, stored.is_raw_N = records["ptr"], records["mode"]
    stored.height_N, stored.width_N = records["height"], records["width"]
    stored.box_VN4 = np.asfortranarray(stored.box_VN4).astype(np.int64)
    status_N, views_VNSS3 = stored.crops(2)
    assert not status_N.any()
    np.testing.assert_array_equal(views_VNSS3, expected)


def test_a_bad_sample_is_reported_and_leaves_the_others_alone(stored: Stored) -> None:
    good = stored.crops(1)[1]
    whole = len(stored.file_bytes)
    wrong = dict.fromkeys(range(0, 36, 3), OUTSIDE)  # raw ones
    stored.ptr_N[0], stored.ptr_N[3], stored.ptr_N[6] = -1, whole, np.iinfo(np.int64).max
    stored.size_N[9], stored.size_N[12], stored.size_N[15] = 0, -1, np.iinfo(np.int64).max
    stored.height_N[18], stored.width_N[21] = 0, -stored.width_N[21]
    stored.size_N[24] -= 1
    stored.box_VN4[0, 27, 0] = -1
    stored.box_VN4[1, 30, 3] = stored.width_N[30] + 1
    stored.box_VN4[1, 33] = np.iinfo(np.int32).max
    stored.box_VN4[0, 1, 2], stored.box_VN4[1, 2, 3] = 0, -5  # JPEGs
    stored.box_VN4[1, 4, 1], stored.box_VN4[0, 5, 2] = 10_000, np.iinfo(np.int32).min
    wrong |= dict.fromkeys((1, 2, 4, 5), OUTSIDE)
    stored.height_N[7] += 1
    stored.width_N[8] += 100_000_000  # more memory than there is
    stored.size_N[10] = 200  # within the header
    stored.ptr_N[11] += 4
    stored.size_N[13] -= 20
    wrong |= {7: OTHER_SIZE, 8: OTHER_SIZE, 10: UNREADABLE, 11: UNREADABLE, 13: UNREADABLE}
    for threads in (1, 3):
        status_N, views_VNSS3 = stored.crops(threads)
        assert {n: status_N[n] for n in np.flatnonzero(status_N)} == wrong
        fine = np.flatnonzero(status_N == 0)
        np.testing.assert_array_equal(views_VNSS3[:, fine], good[:, fine])


def test_a_batch_without_samples(stored: Stored) -> None:
    for name in ("ptr_N", "size_N", "height_N", "width_N", "is_raw_N"):
        setattr(stored, name, getattr(stored, name)[:0])
    stored.box_VN4 = stored.box_VN4[:, :0]
    assert len(stored.crops(2)[0]) == 0
