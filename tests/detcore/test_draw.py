"""Boxes on pictures: where they are, in which colour, and which lie on top."""

import numpy as np
from PIL import Image

from detcore.draw import TRUTH, colour, draw_detections, draw_truth

GREY = (90, 90, 90)


def test_truth_is_a_thin_white_outline() -> None:
    image = Image.new("RGB", (60, 40), GREY)
    draw_truth(image, np.array([[10, 5, 50, 30]]))
    assert {image.getpixel(at) for at in ((10, 5), (50, 30), (30, 5), (10, 20))} == {TRUTH}
    assert {image.getpixel(at) for at in ((11, 6), (9, 4), (30, 20))} == {GREY}


def test_detections_have_their_class_colour_and_the_best_lie_on_top() -> None:
    image = Image.new("RGB", (200, 120), GREY)
    boxes = np.array([[20.0, 40, 120, 100], [20, 40, 120, 100], [60, 60, 180, 110]])
    draw_detections(image, boxes, np.array([0.9, 0.6, 0.5]), np.array([0, 1, 2]), ["a", "b", "c"])
    assert image.getpixel((20, 70)) == colour(0) and image.getpixel((180, 90)) == colour(2)
    assert len({colour(label) for label in range(80)}) > 70
    words = np.asarray(image)[25:40, 20:80].reshape(-1, 3)
    assert (words == colour(0)).all(1).any() and (words.max(1) < 60).any(), "name and score above the box"


def test_a_box_of_no_size_is_drawn_all_the_same() -> None:
    image = Image.new("RGB", (50, 50), GREY)
    draw_detections(image, np.array([[30.0, 30, 20, 20]]), np.array([0.5]), np.array([0]), ["a"])
    assert image.getpixel((30, 30)) == colour(0)
