"""Colours that vary: SSD's photometric distortion, CornerNet's jitter and lighting. Of PIL's RGB images."""

import numpy as np
from PIL import Image

BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, 0.5, 0.5, 18  # bytes, share, share, degrees
GREY = np.array([0.299, 0.587, 0.114])

# Principal components of pixels 0..1 of COCO, as CornerNet has them: a column is one, its rows R, G, B.
EIGENVALUES = np.array([0.2141788, 0.01817699, 0.00341571])
EIGENVECTORS = np.array(
    [
        [-0.56089297, 0.71832671, 0.41158938],
        [-0.5832747, 0.00994535, -0.81221408],
        [-0.58752847, -0.69563484, 0.41340352],
    ]
)


def photometric(image: Image.Image, swap: float, rng: np.random.Generator) -> Image.Image:
    """SSD's (arXiv:1512.02325, 2.2, after arXiv:1312.5402): each half of the time bytes get something added,
    they and the saturation are multiplied, the hue is turned; the contrast comes first or last.

    swap: probability that the channels change places, too.
    """
    bright, contrast, first, saturation, hue = rng.random(5) < 0.5
    added = rng.uniform(-BRIGHTNESS, BRIGHTNESS) if bright else 0.0
    factor = rng.uniform(1 - CONTRAST, 1 + CONTRAST) if contrast else 1.0
    richer = rng.uniform(1 - SATURATION, 1 + SATURATION) if saturation else 1.0
    turn = rng.uniform(-HUE, HUE) if hue else 0.0

    levels = np.arange(256)
    image = _looked_up(image, [_bytes(levels + added)] * 3)
    if first:
        image = _looked_up(image, [_bytes(levels * factor)] * 3)
    if saturation or hue:
        turned = np.rint(levels + turn * 256 / 360).astype(int) % 256
        image = _looked_up(image.convert("HSV"), [turned, _bytes(levels * richer), levels]).convert("RGB")
    if not first:
        image = _looked_up(image, [_bytes(levels * factor)] * 3)
    if rng.random() < swap:
        channels = image.split()
        image = Image.merge("RGB", [channels[i] for i in rng.permutation(3)])
    return image


def jitter(image: Image.Image, strength: float, lighting: float, rng: np.random.Generator) -> Image.Image:
    """CornerNet's: in random order brightness, contrast and saturation are multiplied by 1 - strength to
    1 + strength; the last two mix with the mean grey, or each pixel's own, of the image as it was.

    lighting: then the colour moves along the principal components, each by its eigenvalue times a number
    from N(0, lighting) (AlexNet, section 4.1).
    Together that is one affine map of colours.
    """
    matrix, offset = np.eye(3), np.zeros(3)
    mean = GREY @ np.asarray(image).mean((0, 1))
    factors = rng.uniform(1 - strength, 1 + strength, 3)
    for change in rng.permutation(3):
        factor = factors[change]
        matrix, offset = factor * matrix, factor * offset
        if change == 1:
            offset = offset + (1 - factor) * mean
        elif change == 2:
            matrix = matrix + (1 - factor) * GREY  # each row: the grey is added to each channel
    offset = offset + 255 * EIGENVECTORS @ (EIGENVALUES * rng.normal(0, lighting, 3))
    return image.convert("RGB", tuple(np.column_stack([matrix, offset]).ravel().tolist()))


def _bytes(levels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(levels), 0, 255).astype(int)


def _looked_up(image: Image.Image, tables: list[np.ndarray]) -> Image.Image:
    """Each channel's bytes replaced by those in its table."""
    return image.point(np.concatenate(tables).tolist())
