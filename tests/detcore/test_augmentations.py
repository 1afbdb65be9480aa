"""Each augmentation: painted squares are where their boxes say, and contact sheets for people to look at.

    PICTURES=FOLDER python -m pytest tests/detcore/test_augmentations.py

leaves a sheet for each kind in FOLDER: the image as it comes, then eleven draws, with their boxes. Without
PICTURES they go where pytest keeps what tests write.
"""

import colorsys
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from detcore.config import Augment
from detcore.data import colours, geometry
from detcore.data.geometry import Window
from detcore.data.transforms import MEAN, augment
from detcore.draw import draw_truth

WIDTH, HEIGHT = 160, 120
BOXES = np.array([[20, 30, 50, 60], [90, 10, 120, 40], [70, 60, 130, 110]], np.float32)
LABELS = np.arange(3)
PAINT = [(230, 30, 30), (30, 230, 30), (30, 30, 230)]  # of the channel that the label counts
SAME = {"short": [HEIGHT], "max": 1000, "flip": 0.0}
COLOURS: dict[str, dict[str, Any]] = {
    "photometric": {"photometric": True},
    "channel_swap": {"photometric": True, "channel_swap": 1.0},
    "jitter": {"jitter": 0.4},
    "lighting": {"lighting": 0.1},
}
KINDS: dict[str, dict[str, Any]] = {
    "short_side": {"short": [80, 120, 200], "max": 240, "flip": 0.0},
    "flips": SAME | {"flip": 0.5, "flip_vertical": 0.5},
    "shift": SAME | {"shift": {"pixels": 32, "p": 0.5}},
    "expand": SAME | {"max": 300, "expand": {}},
    "crop": SAME | {"crop": {}},
    "square": {"square": 96, "flip": 0.0},
    "corner_crop": {"square": 128, "flip": 0.0, "corner_crop": {"border": 32}},
    "ssdlite": {"square": 160, "expand": {}, "crop": {}} | COLOURS["channel_swap"],
    "cornernet": {"square": 128, "corner_crop": {"border": 32}, "jitter": 0.4, "lighting": 0.1},
} | {name: SAME | section for name, section in COLOURS.items()}


def scene() -> Image.Image:
    """Grey of many levels, ruled every 20 pixels, with a red, a green and a blue square."""
    ramp = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)) * 0.4 + 40
    image = Image.fromarray(np.repeat(ramp.astype(np.uint8)[..., None], 3, axis=2))
    pen = ImageDraw.Draw(image)
    for at in range(0, WIDTH, 20):
        pen.line([(at, 0), (at, HEIGHT)], fill=(70, 70, 70))
        pen.line([(0, at), (WIDTH, at)], fill=(70, 70, 70))
    for (x1, y1, x2, y2), paint in zip(BOXES.astype(int).tolist(), PAINT, strict=True):
        pen.rectangle([x1, y1, x2 - 1, y2 - 1], fill=paint)
    return image


def painted(pixels: np.ndarray, label: int) -> np.ndarray:
    """Where the paint of this label is: more than half of it, to the pixel."""
    own, others = pixels[..., label].astype(int), np.delete(pixels, label, axis=2).max(axis=2)
    rows, columns = np.nonzero(own - others > 100)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def draw(section: dict[str, Any], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    how = Augment.model_validate(section)
    return augment(scene(), BOXES, LABELS, how, np.random.default_rng([seed, 7]))


def save_sheet(name: str, section: dict[str, Any], folder: Path) -> Path:
    """The scene and eleven draws, four in a row."""
    tiles = [(np.asarray(scene()), BOXES)] + [draw(section, seed)[:2] for seed in range(11)]
    height, width = np.max([pixels.shape[:2] for pixels, _ in tiles], axis=0) + 4
    sheet = Image.new("RGB", (4 * int(width), 3 * int(height)), (255, 0, 255))
    for i, (pixels, boxes) in enumerate(tiles):
        tile = Image.fromarray(np.ascontiguousarray(pixels))
        draw_truth(tile, boxes - [0, 0, 1, 1])
        sheet.paste(tile, (i % 4 * int(width), i // 4 * int(height)))
    folder.mkdir(parents=True, exist_ok=True)
    sheet.save(folder / f"{name}.png")
    return folder / f"{name}.png"


@pytest.mark.parametrize("name", KINDS)
def test_boxes_stay_on_what_they_were_painted_on(name: str, tmp_path: Path) -> None:
    section, shown = KINDS[name], set()
    plain = {key: value for key, value in section.items() if key not in set().union(*COLOURS.values())}
    for seed in range(40):
        pixels, boxes, labels = draw(plain, seed)
        height, width = pixels.shape[:2]
        assert len(boxes) == len(labels) and boxes.dtype == np.float32 and pixels.dtype == np.uint8
        assert (boxes >= 0).all() and (boxes <= [width, height] * 2).all()
        for box, label in zip(boxes, labels, strict=True):
            if (box[2:] - box[:2] >= 2).all():  # less paint than that may be blurred away
                assert np.abs(painted(pixels, label) - box).max() <= 1, (seed, label)
        coloured = draw(section, seed)
        assert np.array_equal(coloured[1], boxes), "colours change nothing about where things are"
        shown.add(coloured[0].tobytes())
    assert len(shown) == 1 if name == "square" else len(shown) > 2
    assert save_sheet(name, section, Path(os.environ.get("PICTURES") or tmp_path)).stat().st_size > 1000


def test_a_window_may_reach_beyond_the_image_and_drops_what_is_not_central() -> None:
    window = Window(-10, 20, 60, 110)  # the blue square's centre is to the right of it, and so is the green
    image, boxes, labels = geometry.view(scene(), BOXES, LABELS, window, fill=MEAN, central=True)
    pixels = np.asarray(image)
    assert image.size == (70, 90) and labels.tolist() == [0]
    assert boxes.tolist() == [[30, 10, 60, 40]] and painted(pixels, 0).tolist() == boxes[0].tolist()
    assert (pixels[:, :10] == MEAN).all() and not (pixels[:, 10:] == MEAN).all(axis=2).all()

    window = Window(100, 0, 200, 100)
    _, boxes, labels = geometry.view(scene(), BOXES, LABELS, window, fill=MEAN, central=True)
    assert labels.tolist() == [1], "blue's centre, and half of green's, lies on the border"
    image, boxes, _ = geometry.view(scene(), BOXES, LABELS, window, fill=MEAN, central=False)
    assert boxes[2].tolist() == painted(np.asarray(image), 2).tolist() == [0, 60, 30, 100]


def test_expansion_is_uniform_and_keeps_the_image_inside() -> None:
    rng, factors = np.random.default_rng(0), []
    for _ in range(400):
        window = geometry.expand((WIDTH, HEIGHT), 4.0, rng)
        assert window.left <= 0 and window.top <= 0 and window.right >= WIDTH and window.bottom >= HEIGHT
        assert abs(window.size[0] / WIDTH - window.size[1] / HEIGHT) < 0.02, "of the image's shape"
        factors.append(window.size[0] / WIDTH)
    assert 1 <= min(factors) < 1.1 and 3.9 < max(factors) <= 4 and abs(np.mean(factors) - 2.5) < 0.15


@pytest.mark.parametrize("bound", [0.1, 0.3, 0.5])
def test_a_cropped_window_overlaps_every_object_as_much_as_was_drawn(bound: float) -> None:
    rng, size, boxes = np.random.default_rng(0), (100, 80), np.array([[30, 20, 80, 70]], np.float32)
    boxes = np.concatenate([boxes, boxes + np.array([5, -5, 5, -5], np.float32)])
    met, whole = 0, 0
    for _ in range(220):
        window = geometry.overlapping(size, boxes, [bound] * 9, 0.3, rng)
        width, height = window.size
        assert min(window[:2]) >= 0 and window.right <= 100 and window.bottom <= 80
        if window == (0, 0, *size):
            whole += 1
            continue
        assert width >= 29 and height >= 23 and 0.45 <= height / width <= 2.1
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        assert ((centres > window[:2]) & (centres < window[2:])).all(axis=1).any()
        met += min(iou(np.array(window), box) for box in boxes) >= bound
    assert 8 <= whole <= 40 and met >= 0.85 * (220 - whole), "but one time in ten the bound is 0"


def iou(a: np.ndarray, b: np.ndarray) -> float:
    common = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    return common / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - common)


def test_a_window_that_nothing_meets_ends_with_the_whole_image_and_no_object_is_no_bound() -> None:
    rng = np.random.default_rng(0)
    apart = np.array([[0, 0, 2, 2], [98, 78, 100, 80]], np.float32)
    found = {geometry.overlapping((100, 80), apart, [0.9] * 5, 0.3, rng) for _ in range(30)}
    assert Window(0, 0, 100, 80) in found
    empty = np.zeros((0, 4), np.float32)
    assert len({geometry.overlapping((100, 80), empty, [0.9], 0.3, rng) for _ in range(30)}) > 10


@pytest.mark.parametrize("size", [(640, 480), (200, 900), (30, 20), (1, 1)])
def test_corner_windows_are_squares_around_a_point_away_from_the_edges(size: tuple[int, int]) -> None:
    rng, scales = np.random.default_rng(0), [0.6, 1.0, 1.3]
    seen = set()
    for _ in range(60):
        window = geometry.around(size, 511, scales, 128, rng)
        assert window.size in {(306, 306), (511, 511), (664, 664)}
        centre = [low + window.size[0] // 2 for low in window[:2]]
        for at, extent in zip(centre, size, strict=True):
            margin = next(128 >> k for k in range(9) if extent > 2 * (128 >> k))
            assert margin <= at < extent - margin
        seen.add(window.size)
    assert len(seen) == 3


def test_photometric_distortion_has_ssds_strengths() -> None:
    grey, red = Image.new("RGB", (2, 2), (100, 100, 100)), Image.new("RGB", (2, 2), (200, 100, 100))
    levels, hues, depths = [], [], []
    for seed in range(800):
        levels.append(colours.photometric(grey, 0.0, np.random.default_rng(seed)).getpixel((0, 0))[0])
        pixel = colours.photometric(red, 0.0, np.random.default_rng(seed)).getpixel((0, 0))
        hue, depth, _ = colorsys.rgb_to_hsv(*pixel)
        hues.append((hue * 360 + 180) % 360 - 180)
        depths.append(depth)
    assert 170 <= sum(level == 100 for level in levels) <= 260, "a quarter has neither, a few round back"
    assert 34 <= min(levels) < 50 and 180 < max(levels) <= 198  # (100 -+ 32) times 0.5 to 1.5
    assert -21 < min(hues) < -15 and 15 < max(hues) < 21  # 18 degrees; bytes of hue are 1.4 wide
    assert 0.1 < min(depths) < 0.3 and 0.7 < max(depths) < 0.95  # 0.5 times 0.5 to 1.5, clipped bytes


def test_swapped_channels_are_the_same_three() -> None:
    image = Image.new("RGB", (2, 2), (10, 120, 230))
    found = set()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        found.add(tuple(np.argsort(colours.photometric(image, 1.0, rng).getpixel((0, 0))).tolist()))
    assert len(found) == 6


def test_jitter_is_cornernets_step_by_step() -> None:
    """The reference mixes in place, one change after the other; ours is one map of colours."""
    values = np.random.default_rng(5).integers(60, 180, (8, 9, 3), np.uint8)
    for seed in range(20):
        got = np.asarray(colours.jitter(Image.fromarray(values), 0.4, 0.1, np.random.default_rng(seed)))
        rng = np.random.default_rng(seed)
        grey = values @ np.array([0.299, 0.587, 0.114])
        factors, wanted = rng.uniform(0.6, 1.4, 3), values.astype(float)
        for change in rng.permutation(3):
            mixed = (0.0, grey.mean(), grey[..., None])[change]  # brightness, contrast, saturation
            wanted = factors[change] * wanted + (1 - factors[change]) * mixed
        drawn = rng.normal(0, 0.1, 3) * colours.EIGENVALUES
        wanted += 255 * sum(drawn[k] * colours.EIGENVECTORS[:, k] for k in range(3))
        assert np.abs(got - np.clip(wanted, 0, 255)).max() <= 1


def test_principal_components_are_orthonormal_and_the_first_is_grey() -> None:
    vectors = colours.EIGENVECTORS
    assert np.abs(vectors.T @ vectors - np.eye(3)).max() < 1e-6
    assert np.abs(np.abs(vectors[:, 0]) - 3**-0.5).max() < 0.03
    assert colours.EIGENVALUES[0] > 10 * colours.EIGENVALUES[1] > 10 * colours.EIGENVALUES[2] / 10


def test_a_setting_changes_only_what_it_is_about() -> None:
    """Everything else stays as drawn."""
    with_crop = {"square": 96, "crop": {}, "shift": {"pixels": 20}}
    assert np.array_equal(draw(with_crop, 3)[0], draw(with_crop | {"short": [8, 9]}, 3)[0])
    flipped = [draw(KINDS["flips"], seed)[0].tobytes() for seed in range(10)]
    twice = [draw(KINDS["flips"] | {"shift": {"pixels": 0}}, seed)[0].tobytes() for seed in range(10)]
    assert flipped == twice


def test_draws_are_a_function_of_seed_epoch_and_image_alone() -> None:
    for name in ("ssdlite", "cornernet"):
        for one, other in zip(draw(KINDS[name], 1), draw(KINDS[name], 1), strict=True):
            assert np.array_equal(one, other)


def test_an_image_without_objects_is_changed_like_any_other() -> None:
    for section in KINDS.values():
        empty = (np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
        pixels, boxes, labels = augment(
            scene(), *empty, Augment.model_validate(section), np.random.default_rng(2)
        )
        assert pixels.shape[2] == 3 and boxes.shape == (0, 4) and labels.shape == (0,)
