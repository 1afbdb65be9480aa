"""Image and boxes stay together."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detcore.config import Augment, Resize
from detcore.data import transforms as T
from detcore.errors import InputError

NONE = np.zeros(0, np.int64)


def scene(width: int = 40, height: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """A black image with one white box, and the box."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[6:18, 10:30] = 255
    return pixels, np.array([[10, 6, 30, 18]], np.float32)


def box_of(pixels: np.ndarray) -> list[float]:
    """Where the white is."""
    rows, columns = np.nonzero(pixels[..., 0] > 127)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [
        ((640, 480), 800, 1333, (1067, 800)),
        ((480, 640), 800, 1333, (800, 1067)),
        ((1000, 200), 800, 1333, (1333, 267)),
        ((500, 500), 800, 600, (600, 600)),
        ((640, 427), None, 600, (640, 427)),
    ],
)
def test_resized(size: tuple[int, int], short: int | None, longest: int, expected: tuple[int, int]) -> None:
    assert T.resized(size, Resize(short=short, max=longest)) == expected


def test_resize_moves_boxes_along() -> None:
    pixels, boxes = scene()
    image, boxes = T.resize(Image.fromarray(pixels), boxes, Resize(short=48, max=1000))
    assert image.size == (80, 48) and boxes.tolist() == [[20, 12, 60, 36]] == [box_of(np.asarray(image))]


def test_flips() -> None:
    pixels, boxes = scene()
    for function in (T.flip, T.flip_vertical):
        turned, moved = function(pixels, boxes)
        assert moved.tolist() == [box_of(turned)]
        again, back = function(turned, moved)
        assert np.array_equal(again, pixels) and np.array_equal(back, boxes)


@pytest.mark.parametrize(("dx", "dy"), [(3, 4), (-12, 0), (15, -8), (0, 10)])
def test_shift(dx: int, dy: int) -> None:
    pixels, boxes = scene()
    moved, new, labels = T.shift(pixels, boxes, np.array([5]), dx, dy)
    assert moved.shape == pixels.shape and new.tolist() == [box_of(moved)] and labels.tolist() == [5]


def test_shift_drops_what_is_gone_and_never_all() -> None:
    pixels, boxes = scene()
    two = np.concatenate([boxes, [[0, 0, 4, 4]]]).astype(np.float32)
    _, new, labels = T.shift(pixels, two, np.array([5, 6]), -5, 0)
    assert labels.tolist() == [5] and len(new) == 1
    same, back, _ = T.shift(pixels, boxes, np.array([5]), -30, 0)
    assert np.array_equal(same, pixels) and np.array_equal(back, boxes)


def test_augmentation_is_a_function_of_its_seed() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8))
    boxes, labels = scene()[1], np.array([1])
    how = Augment.model_validate(
        {"short": [24, 32, 48], "max": 128, "photometric": True, "shift": {"pixels": 6}}
    )

    def draw(seed: int) -> np.ndarray:
        return T.augment(image, boxes, labels, how, np.random.default_rng(seed))[0]

    assert np.array_equal(draw(1), draw(1))
    assert len({draw(seed).tobytes() for seed in range(8)}) == 8
    assert {min(draw(seed).shape[:2]) for seed in range(30)} == {24, 32, 48}


def test_no_augmentation_changes_nothing() -> None:
    pixels, boxes = scene()
    how = Augment.model_validate({"short": [24], "max": 64, "flip": 0.0})
    same, back, labels = T.augment(
        Image.fromarray(pixels), boxes, np.array([1]), how, np.random.default_rng(0)
    )
    assert np.array_equal(same, pixels) and np.array_equal(back, boxes) and labels.tolist() == [1]


def test_images_are_turned_as_exif_says_and_checked(tmp_path: Path) -> None:
    pixels, _ = scene()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert T.read_image(tmp_path / "turned.png", (24, 40)).size == (24, 40)
    with pytest.raises(InputError, match=r"turned.png is 24x40, its annotations say 40x24"):
        T.read_image(tmp_path / "turned.png", (40, 24))
    (tmp_path / "text.png").write_text("no picture")
    for name, words in [("text.png", "cannot be read"), ("none.png", "does not exist")]:
        with pytest.raises(InputError, match=words):
            T.read_image(tmp_path / name)


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P"):
        Image.new(mode, (9, 7)).save(tmp_path / f"{mode}.png")
        assert T.read_image(tmp_path / f"{mode}.png", (9, 7)).mode == "RGB"
