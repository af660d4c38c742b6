"""Random crops, colours and blur of images, on the CPU, with Pillow's arithmetic.

Training recipes name these operations by what torchvision does to Pillow images: 8 bits between
any two of them, resizing that averages over all pixels it leaves out. Published weights have seen
just that, so these do the same. Images are `PIL.Image` of mode RGB; each function draws its random
numbers from `rng` only.
"""

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

Range = tuple[float, float]
_TRIES = 10


def random_box(
    rng: np.random.Generator, width: int, height: int, scale: Range, aspect: Range
) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) inside of an image: its area a share of the image's.

    Area and aspect (width by height, its logarithm uniform) are drawn anew until the box fits;
    after ten times it is the largest centred box of an allowed aspect.
    """
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * aspect[1])))
    h = min(height, max(1, round(width / aspect[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_resized_crop(
    rng: np.random.Generator, image: Image.Image, size: int, scale: Range, aspect: Range
) -> Image.Image:
    """Cuts a random box out (see `random_box`) and resizes it to `size` × `size`, bicubically."""
    # Cut first: resizing from a box would look at pixels beyond its edge.
    piece = image.crop(random_box(rng, *image.size, scale, aspect))
    return piece.resize((size, size), Image.Resampling.BICUBIC)


def resize_shorter_side(image: Image.Image, size: int) -> Image.Image:
    """Resizes, bicubically, so that the shorter side is `size`; the longer is rounded down."""
    short = min(image.size)
    width, height = (side * size // short if side != short else size for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Cuts out the middle `size` × `size`; what an image is too small for is black."""
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def random_flip(
    rng: np.random.Generator, image: Image.Image, probability: float = 0.5
) -> Image.Image:
    """Left and right changed round, sometimes."""
    if rng.random() < probability:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def color_jitter(
    rng: np.random.Generator,
    image: Image.Image,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> Image.Image:
    """Changes brightness, contrast, saturation and hue in random order.

    The first three by a factor uniform within the given distance of 1 (never below 0), the hue by
    a turn within ± `hue` of the circle. What is 0 is left out.
    """
    order = rng.permutation(4)
    factors = [
        rng.uniform(max(0.0, 1 - width), 1 + width) for width in (brightness, contrast, saturation)
    ]
    turn = rng.uniform(-hue, hue)
    for step in order:
        if step == 3 and hue:
            image = turn_hue(image, turn)
        elif step == 0 and brightness:
            image = ImageEnhance.Brightness(image).enhance(factors[0])
        elif step == 1 and contrast:
            image = change_contrast(image, factors[1])
        elif step == 2 and saturation:
            image = ImageEnhance.Color(image).enhance(factors[2])
    return image


def change_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Values drawn towards the image's mean grey (or, by a factor above 1, away from it)."""
    # ImageEnhance.Contrast without its histogram, which a small crop's Python would wait for.
    mean = int(np.asarray(image.convert("L")).mean() + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """Every hue moved on by `turn` of the circle, in the 256 steps that HSV has here."""
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(turn * 255) % 256)
    hue = Image.fromarray(turned)
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def grayscale(image: Image.Image) -> Image.Image:
    """Luma in all three channels."""
    return image.convert("L").convert("RGB")


def solarize(image: Image.Image, threshold: int = 128) -> Image.Image:
    """Values from `threshold` up become their distance from 255."""
    return ImageOps.solarize(image, threshold)


def gaussian_blur(image: Image.Image, sigma: float, taps: int = 9) -> Image.Image:
    """Weighted means of `taps` pixels each way, mirrored at the edges.

    Args:
        image: More than `taps` // 2 pixels each way.
        sigma: Standard deviation of the weights in pixels.
        taps: Odd number of weights; they do not become more where sigma is large.
    """
    offsets = np.arange(taps) - taps // 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    values = np.asarray(image, np.float32)
    for axis in (0, 1):
        values = ndimage.correlate1d(values, weights, axis, mode="mirror")
    return Image.fromarray(np.rint(values).astype(np.uint8))
