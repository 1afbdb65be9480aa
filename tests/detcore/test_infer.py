"""Detections shown: drawn into pictures, as JSON, and cut out."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detcore.data.transforms import read_image
from detcore.infer import cut_out
from detcore.infer import main as infer
from tests.detcore.conftest import Run


def test_crops_of_one_class(trained: Run, shapes: Path, tmp_path: Path) -> None:
    """Cut from the image as it is, before anything is drawn, each named after its picture and a number."""
    out, folder = tmp_path / "out", tmp_path / "photos"
    for number in (1, 2):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "a.png").write_bytes((shapes / "val" / f"00000{number}.png").read_bytes())
    argv = [str(folder / "1"), str(folder / "2"), "--out", str(out), "--score", "0.001"]
    assert infer([str(trained.folder), *argv, "--crop", "square"]) == 0
    answers, named = json.loads((out / "detections.json").read_text()), []
    assert [answer["picture"] for answer in answers] == ["a.jpg", "a-2.jpg"]
    for answer in answers:
        squares = [one for one in answer["detections"] if one["label"] == "square"]
        assert squares and all("crop" not in one for one in answer["detections"] if one not in squares)
        stem = Path(answer["picture"]).stem
        assert [one["crop"] for one in squares] == [
            f"crops/{stem}-{n}.jpg" for n in range(1, len(squares) + 1)
        ]
        whole = np.asarray(read_image(Path(answer["image"]))).astype(int)
        for one in squares:
            x1, y1, x2, y2 = (round(value) for value in one["box"])
            crop = np.asarray(read_image(out / one["crop"])).astype(int)
            assert abs(crop.shape[0] - (y2 - y1)) <= 2 and abs(crop.shape[1] - (x2 - x1)) <= 2
            part = whole[math.floor(one["box"][1]) :, math.floor(one["box"][0]) :]
            part = part[: crop.shape[0], : crop.shape[1]]
            assert np.abs(part - crop).mean() < 12, "what is in the box, but for JPEG"
        named += [one["crop"] for one in squares]
    assert sorted(named) == sorted(f"crops/{path.name}" for path in (out / "crops").iterdir())


def test_a_crop_is_a_pixel_at_least_and_inside() -> None:
    image = Image.new("RGB", (20, 10))
    for box, size in [
        ([2.2, 3.0, 7.5, 6.0], (6, 3)),
        ([-5, -5, 3, 4], (3, 4)),
        ([19.99, 2, 25, 3], (1, 1)),
        ([4, 4, 4, 4], (1, 1)),
        ([20, 10, 20, 10], (1, 1)),
    ]:
        assert cut_out(image, box).size == size


def test_boxes_on_pictures(trained: Run, shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    images = [str(path) for path in sorted((shapes / "val").iterdir())[:2]]
    assert infer([str(trained.folder), *images, "--out", str(out), "--score", "0.001"]) == 0
    answers = json.loads((out / "detections.json").read_text())
    assert [answer["image"] for answer in answers] == images
    assert answers[0]["detections"][0]["label"] in ("disc", "square", "triangle")
    assert sorted(path.name for path in out.glob("*.jpg")) == ["000001.jpg", "000002.jpg"]
    for answer in answers:
        before, after = (
            np.asarray(read_image(Path(path))) for path in (answer["image"], out / answer["picture"])
        )
        x1, y1, x2, y2 = answer["detections"][0]["box"]
        assert -1 <= x1 < x2 <= 65 and -1 <= y1 < y2 <= 65
        assert before.shape == after.shape
        moved = np.abs(before.astype(int) - after).max(axis=2)
        assert (moved > 60).any() and (moved < 60).any(), "boxes are drawn into the image"


def test_pictures_are_not_written_over_one_another(trained: Run, shapes: Path, tmp_path: Path) -> None:
    image = (shapes / "val" / "000001.png").read_bytes()
    (tmp_path / "b").mkdir()
    mine = [tmp_path / "a.jpg", tmp_path / "a.png", tmp_path / "b" / "a.png"]
    for path in mine:
        path.write_bytes(image)
    assert infer([str(trained.folder), *map(str, mine), "--out", str(tmp_path)]) == 0
    assert [path.read_bytes() for path in mine] == [image] * 3
    answers = json.loads((tmp_path / "detections.json").read_text())
    assert [answer["picture"] for answer in answers] == ["a-2.jpg", "a-3.jpg", "a-4.jpg"]
    assert all((tmp_path / answer["picture"]).is_file() for answer in answers)


def test_bad_input_of_infer(
    trained: Run, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, images = tmp_path / "out", [str(shapes / "val" / "000001.png")]
    torn = tmp_path / "torn.png"
    torn.write_bytes(Path(images[0]).read_bytes()[:200])
    other = tmp_path / "other.yaml"
    other.write_text(
        (trained.folder / "recipe.yaml").read_text().replace("mid_channels: 16", "mid_channels: 8")
    )
    weights = next((trained.folder / "checkpoints").glob("step-*/model.pth"))

    for argv, words in [
        ([str(trained.folder), "none.png", "--out", str(out)], "none.png does not exist"),
        ([str(tmp_path / "nothing"), images[0], "--out", str(out)], "nothing does not exist"),
        ([images[0], images[0], "--out", str(out)], "name the recipe with --recipe"),
        ([str(trained.folder), str(torn), "--out", str(out)], str(torn)),
        (
            [str(trained.folder), *images, "--out", str(out), "--crop", "cube"],
            "--crop cube: the classes are disc, square, triangle",
        ),
        ([str(trained.folder), images[0], "--out", f"{torn}/out"], "Not a directory"),
        ([str(weights), images[0], "--out", str(out), "--recipe", str(other)], "does not fit the recipe"),
    ]:
        assert infer(argv) == 2
        assert words in capsys.readouterr().err
