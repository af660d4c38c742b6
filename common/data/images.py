"""Image files as arrays: one function for every kind of file, and no trust in any.

Only the formats of photographs and pictures are read, by Pillow's own decoders: none that runs a
program (as PostScript does), and none whose pixels outnumber a limit.
"""

import io
import os
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import ExifTags, Image, ImageOps

from common.data.sources import DamagedRecord

SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
    ".tif", ".tiff", ".webp",
)  # fmt: skip
MAX_PIXELS = 89_478_485  # Where Pillow, too, begins to suspect a decompression bomb.
WHITE = (255, 255, 255)
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def open_image(
    source: str | os.PathLike[str] | bytes,
    *,
    background: tuple[int, int, int] = WHITE,
    stretch: bool = False,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> np.ndarray:
    """Decodes an image; what its EXIF says of orientation is applied.

    Grey becomes three equal channels; palettes, CMYK and others become RGB, without regard to
    colour profiles. Of several frames it is the first. What is transparent is laid over
    `background`. Whole numbers of 16 bits (or 32) are scaled from 0 … 65535 to 0 … 255,
    floating-point numbers from 0 … 1.

    Args:
        source: A file's path, or a file's content.
        background: Red, green and blue from 0 to 255.
        stretch: Scale an image of more than 8 bits from its own least and largest value instead,
            for such as 12-bit radiographs.
        max_pixels: An image of more is refused before it is decoded.
        name: What errors call the image; by default the path.

    Returns:
        uint8 [H, W, 3].

    Raises:
        DamagedRecord: It is no image that can be read, it is truncated, or too large. The message
            names the file.
    """
    if name is None:
        name = "image" if isinstance(source, bytes) else repr(os.fspath(source))

    def read(image: Image.Image) -> np.ndarray:
        return _to_rgb(ImageOps.exif_transpose(image), background, stretch)

    return _opened(source, name, max_pixels, read)


def open_map(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads the values of an image of one channel as they are stored: labels, depths.

    Returns:
        [H, W] of the file's own type; of a palette the numbers of colours.

    Raises:
        DamagedRecord: As for `open_image`, or it has several channels.
    """
    name = repr(os.fspath(path))

    def read(image: Image.Image) -> np.ndarray:
        if image.mode not in ("1", "L", "P", "F") and not image.mode.startswith("I"):
            raise DamagedRecord(f"{name}: one channel was expected, this is {image.mode}")
        return np.asarray(image)

    return _opened(path, name, max_pixels, read)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width that `open_image` will give, from the file's head alone.

    Raises:
        DamagedRecord: It is no image that can be read.
    """
    name = repr(os.fspath(path))
    try:
        with Image.open(path, formats=_formats()) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
    except Exception as error:  # As in `open_image`.
        raise DamagedRecord(f"{name}: not an image that can be read ({error})") from error
    return (width, height) if turned else (height, width)


def to_uint8(values: np.ndarray, stretch: bool = False) -> np.ndarray:
    """Scales pixel values of any type to 0 … 255; see `open_image`.

    Raises:
        ValueError: They lie outside of what their type is scaled from, or are not finite.
    """
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint8:
        return values
    whole = np.issubdtype(values.dtype, np.integer)
    values = values.astype(np.float64)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not np.isfinite([low, high]).all():
        raise ValueError("values that are not finite")
    if stretch:
        start, end = low, high if high > low else low + 1
    else:
        start, end = 0.0, 65535.0 if whole else 1.0
    if low < start or high > end:
        raise ValueError(f"values from {low:g} to {high:g}; stretch scales any to 0 … 255")
    return np.round((values - start) / (end - start) * 255).astype(np.uint8)


def to_rgb(array: np.ndarray, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    """uint8 [H, W], or [H, W, C] of 1 to 4 channels, to uint8 [H, W, 3].

    Two channels are grey and opacity, four are RGB and opacity.
    """
    if array.ndim == 2:
        array = array[..., None]
    channels = array.shape[-1]
    if channels in (2, 4):
        opacity = array[..., -1:].astype(np.uint32)
        below = np.array(background, np.uint32)
        mixed = array[..., :-1] * opacity + below * (255 - opacity)
        array = ((mixed + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _opened(
    source: str | os.PathLike[str] | bytes,
    name: str,
    max_pixels: int,
    read: Callable[[Image.Image], np.ndarray],
) -> np.ndarray:
    """What `read` makes of an image; whatever goes wrong is a DamagedRecord."""
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(stream, formats=_formats()) as image:
            if image.width * image.height > max_pixels:
                raise DamagedRecord(
                    f"{name}: {image.width} × {image.height} pixels are more than the limit of "
                    f"{max_pixels:,}"
                )
            return read(image)
    except DamagedRecord:
        raise
    except Image.UnidentifiedImageError as error:
        raise DamagedRecord(f"{name}: not an image in a format that is read here") from error
    except OSError as error:
        raise DamagedRecord(f"{name}: {error.strerror or error}") from error
    except (Exception, MemoryError) as error:
        # Pillow's parsers raise whatever a malformed file makes them run into.
        raise DamagedRecord(f"{name}: damaged ({type(error).__name__}: {error})") from error


@cache
def _formats() -> tuple[str, ...]:
    """Those formats that this build of Pillow has."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image, background: tuple[int, int, int], stretch: bool) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        return to_rgb(to_uint8(np.asarray(image), stretch), background)
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return to_rgb(np.asarray(image), background)
    if image.has_transparency_data:
        return to_rgb(np.asarray(image.convert("RGBA")), background)
    return to_rgb(np.asarray(image.convert("RGB")), background)
