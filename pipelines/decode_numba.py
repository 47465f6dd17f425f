"""JPEGs decoded by libturbojpeg, called from code that numba compiles: without the GIL, on any thread.

With the accurate DCT and smooth ("fancy") upsampling, libturbojpeg's pixels are those of PIL, whose decoder
is the same library. (Versions 2.1.5 and 3.2 once differed, by up to 2 of 255, on a progressive file
with damaged bytes that neither complained about.) A decoder of its own for every call makes the functions
safe on any number of threads; making one takes less than 1 % of the time of decoding a photograph.

Nothing raises: a status tells whether the picture is good. libturbojpeg also refuses what PIL can read, such
as CMYK, or files with mere warnings, such as damaged ones: ask PIL then.

Compiled code refers to libturbojpeg's functions by names that are bound here, when this module is imported,
so that numba can keep it on disk.
"""

import ctypes
from ctypes.util import find_library

import numpy as np
from llvmlite import binding
from numba import njit, types

from pipelines.errors import DataError

UNREADABLE = 1
OTHER_SIZE = 2  # than that of the memory to decode into
_RGB = 0  # 8 bits each, in this order
_ACCURATE = 0  # no flags


def _bind(name: str, returns: types.Type, *arguments: types.Type) -> types.ExternalFunction:
    """The library's function `name` for compiled code. Raises `DataError` where the library is missing."""
    try:
        library = ctypes.CDLL(find_library("turbojpeg") or "libturbojpeg.so.0")
        function = getattr(library, name)
    except (OSError, AttributeError) as error:
        raise DataError(
            "The library libturbojpeg, which the loaders 'ffcv' and 'dali' need, is missing or unusable "
            f"({error}); install it (Debian's package is libturbojpeg0) or set data.loader to folder."
        ) from error
    symbol = f"fastbarlow_{name}"  # not `name`: another copy of the library may be in this process
    binding.add_symbol(symbol, ctypes.cast(function, ctypes.c_void_p).value)
    return types.ExternalFunction(symbol, returns(*arguments))


_pointer, _int, _long = types.uintp, types.int32, types.uint64
_new_decoder = _bind("tjInitDecompress", _pointer)
_free_decoder = _bind("tjDestroy", _int, _pointer)
_read_header = _bind("tjDecompressHeader3", _int, _pointer, _pointer, _long, *4 * [_pointer])
_decompress = _bind("tjDecompress2", _int, _pointer, _pointer, _long, _pointer, *5 * [_int])


@njit(nogil=True)
def image_size(jpeg: np.ndarray) -> tuple[int, int]:
    """Height and width of the image in `jpeg`, uint8 (num_bytes,); (0, 0) where the header is unreadable."""
    decoder = _new_decoder()
    if decoder == 0:
        return 0, 0
    numbers = np.zeros(4, np.int32)  # width, height, subsampling, colour space
    start = numbers.ctypes.data
    failed = _read_header(decoder, jpeg.ctypes.data, jpeg.size, start, start + 4, start + 8, start + 12)
    _free_decoder(decoder)
    if failed:
        return 0, 0
    return numbers[1], numbers[0]


@njit(nogil=True)
def decode(jpeg: np.ndarray, pixels_HW3: np.ndarray) -> int:
    """Decode `jpeg`, uint8 (num_bytes,), as RGB into C-contiguous uint8 memory of the image's very size.

    Returns 0, or UNREADABLE, where the memory may be partly written, or OTHER_SIZE, where it is not.
    """
    height, width = image_size(jpeg)
    if height == 0:
        return UNREADABLE
    if pixels_HW3.shape != (height, width, 3):
        return OTHER_SIZE
    decoder = _new_decoder()
    if decoder == 0:
        return UNREADABLE
    target = pixels_HW3.ctypes.data
    failed = _decompress(
        decoder, jpeg.ctypes.data, jpeg.size, target, width, 3 * width, height, _RGB, _ACCURATE
    )
    _free_decoder(decoder)
    return UNREADABLE if failed else 0
