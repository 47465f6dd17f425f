"""One image of the source, as it goes into a dataset.

Shape legend: H, W height and width.
"""

from errno import EMFILE, ENFILE, ENOMEM
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn.functional import interpolate

from pipelines.source import decode_rgb
from tools.convert.jpeg import START, DamagedJpegError, JpegLayout, decodes_cleanly, read_layout
from tools.convert.manifest import ConvertSettings

MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # where Pillow refuses; of all formats
_SHORTAGES = (EMFILE, ENFILE, ENOMEM)


class Stored(NamedTuple):
    """An image in a dataset."""

    encoded: bytes  # a JPEG file, or uint8 pixels (H, W, 3)
    height: int
    width: int
    is_raw: bool
    was_copied: bool  # the source's own bytes


class BadImage(Exception):  # noqa: N818 (it is news, not a fault)
    """The image cannot be in a dataset; the text says why."""


def is_shortage(error: Exception) -> bool:
    """Whether memory or file descriptors have run out, which says nothing about the image."""
    if isinstance(error, OSError):  # Pillow's own have no number
        return error.errno in _SHORTAGES or str(error).startswith("out of memory")
    # That of torch's allocator is a plain RuntimeError.
    return isinstance(error, MemoryError) or "tried to allocate" in str(error)


def is_kept(
    settings: ConvertSettings,
    is_plain: bool | np.ndarray,
    height: int | np.ndarray,
    width: int | np.ndarray,
    end: int | np.ndarray,
) -> bool | np.ndarray:
    """Step 2 of `prepare`, of one whole JPEG or many: whether it is kept; arguments as in `JpegLayout`."""
    if settings.storage == "raw":
        return False
    fits = is_plain & (np.maximum(height, width) <= settings.max_side)
    wants_raw = settings.storage == "mixed" and 3 * height * width <= settings.raw_factor * end
    return fits & ~np.asarray(wants_raw)


def prepare(data: bytes, settings: ConvertSettings) -> Stored:
    """What to store of an image file. Any number of threads may call it; the result depends on nothing else.

    1. A JPEG is checked: its structure always, and every bit where a block of the file seems to be lost,
       where a table is missing or, with `check="decode"`, where step 2 may keep it.
    2. With `storage="jpg"`, a whole JPEG that all decoders take and whose longer side is at most `max_side`
       is kept as it is, but for what follows its end marker.
    3. Anything else is decoded to RGB, at half, a quarter or an eighth of the size where the file allows and
       that is enough, and shrunk to `max_side` with an antialiasing bicubic filter, Pillow's within one grey
       level. Orientation tags are not applied, transparency is dropped.
    4. The pixels are stored raw, or encoded once, with `quality` and Pillow's 4:2:0 sampling of colours;
       `storage="mixed"` takes the pixels where they need at most `raw_factor` times the JPEG's bytes.

    Raises `BadImage`, and what `is_shortage` tells where the image may be good. Pillow may warn of
    oddities.
    """
    layout = _check(data, settings)  # 1
    if layout is not None and _keeps(settings, layout):
        whole = data[: layout.end]
        return Stored(whole, layout.height, layout.width, is_raw=False, was_copied=True)  # 2
    pixels_HW3 = _decode(data, settings.max_side)  # 3
    height, width, _ = pixels_HW3.shape
    if settings.storage != "raw":  # 4
        jpeg = BytesIO()
        Image.fromarray(pixels_HW3).save(jpeg, "JPEG", quality=settings.quality)
        encoded = jpeg.getvalue()
        if settings.storage == "jpg" or pixels_HW3.nbytes > settings.raw_factor * len(encoded):
            return Stored(encoded, height, width, is_raw=False, was_copied=False)
    return Stored(pixels_HW3.tobytes(), height, width, is_raw=True, was_copied=False)


def _check(data: bytes, settings: ConvertSettings) -> JpegLayout | None:
    """The layout of a JPEG, None for other formats. Raises `BadImage`."""
    if not data:
        raise BadImage("the file is empty")
    if not data.startswith(START):
        return None
    try:
        layout = read_layout(data)
    except DamagedJpegError as error:
        raise BadImage(str(error)) from error
    if layout.height * layout.width > MAX_PIXELS:
        raise BadImage(f"{layout.width} x {layout.height} pixels are more than the {MAX_PIXELS} allowed")
    wants_decoding = layout.is_suspicious or (settings.check == "decode" and _keeps(settings, layout))
    if layout.is_plain and wants_decoding and not decodes_cleanly(data, layout.height, layout.width):
        raise BadImage("damaged: its pixels do not decode without errors")
    return layout


def _keeps(settings: ConvertSettings, layout: JpegLayout) -> bool:
    return bool(is_kept(settings, layout.is_plain, layout.height, layout.width, layout.end))


def _decode(data: bytes, max_side: int) -> np.ndarray:
    """The shrunk pixels, uint8 (H, W, 3). Raises `BadImage`."""
    try:
        with Image.open(BytesIO(data)) as image:
            width, height = image.size
        size = _fit(width, height, max_side)
        image = decode_rgb(BytesIO(data), at_least=size)
    except UnidentifiedImageError as error:
        raise BadImage("not an image") from error
    except Exception as error:  # Pillow's format plug-ins raise many kinds for damaged files
        if is_shortage(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BadImage(f"damaged: {reason}") from error
    pixels_HW3 = np.array(image)
    if image.size == size:
        return pixels_HW3
    # Against the full size, as a reduced one is rounded up; and a hair more, as the result is rounded down.
    reduction = round(max(width, height) / max(image.size)) * (1 + 1e-9)
    scales = size[1] * reduction / height, size[0] * reduction / width
    # On uint8 in this memory order: five times as fast as Pillow's filter.
    pixels_13HW = torch.from_numpy(pixels_HW3).permute(2, 0, 1)[None]
    shrunk_13HW = interpolate(pixels_13HW, scale_factor=scales, mode="bicubic", antialias=True)
    return np.stack(tuple(shrunk_13HW[0].numpy()), axis=-1)


def _fit(width: int, height: int, max_side: int) -> tuple[int, int]:
    """Width and height with the longer side at most `max_side`, rounded down as FFCV does, at least 1."""
    longer = max(width, height)
    if longer <= max_side:
        return width, height
    return max(1, width * max_side // longer), max(1, height * max_side // longer)
