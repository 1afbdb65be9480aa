"""A data set is looked through: each kind of mistake is counted and named, and nothing else is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detcore.data.check import look_through, main
from detcore.data.transforms import read_image
from detcore.draw import bars
from detcore.errors import InputError


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """Five images of 40x30 in tmp_path/images, noise, as JPEG and PNG, and an object in each."""
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 256, (30, 40, 3), np.uint8)
        name = f"{number}.{'jpg' if number % 2 else 'png'}"
        Image.fromarray(noise).save(tmp_path / "images" / name)
        images.append({"id": number, "file_name": name, "width": 40, "height": 30})
        annotations.append({"id": number, "image_id": number, "category_id": 1 + number % 2})
        annotations[-1]["bbox"] = [0, 0.3, 40, 30]
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def check(folder: Path, content: dict[str, Any], *argv: str) -> int:
    (folder / "file.json").write_text(json.dumps(content))
    return main([str(folder / "file.json"), str(folder / "images"), *argv])


def test_a_good_one(tmp_path: Path, content: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for option in ([], ["--decode"]):
        assert check(tmp_path, content, *option) == 0
        said = capsys.readouterr().out
        assert "5 images, 0 of them without objects; 5 objects of 2 classes" in said
        assert "a 3, b 2" in said and said.endswith("nothing is wrong\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bbox": [30, 5, 20, 10]}, "image:\n    annotations[2], image 2 (2.png): 30 5 20 10 in 40x30"),
        ({"bbox": [-1, 5, 20, 10]}, "reach out of their image"),
        ({"bbox": [3, 5, 0, 10]}, "1 boxes (x y width height) have no area"),
        ({"bbox": [3, 5, 4, -1]}, "1 boxes (x y width height) have no area"),
        ({"bbox": [3, 5, 4]}, "1 entries are not what they must be:\n    annotations[2] is not what"),
        ({"bbox": [3, 5, 4, float("nan")]}, "annotations[2] is not what it must be (its `bbox` is not fin"),
        ({"id": 4}, "1 ids of annotations are there more than once:\n    '4', 2 times"),
        ({"image_id": 77}, "1 entries name what is not in the file:\n    annotations[2] names image 77"),
        ({"category_id": 9}, "annotations[2] names category 9"),
    ],
)  # fmt: skip
def test_a_wrong_annotation(
    change: dict[str, Any], words: str, tmp_path: Path, content: dict[str, Any], capsys: Any
) -> None:
    content["annotations"][2] |= change
    assert check(tmp_path, content) == 1
    said = capsys.readouterr().out
    assert words in said and said.count(":\n") == 1, said


def test_wrong_lists(content: dict[str, Any]) -> None:
    content["images"].append({"id": 0, "file_name": "other.png", "width": 5, "height": 5})
    content["images"].append({"id": 6, "width": 5, "height": 5})
    content["categories"] += [{"id": 2, "name": "b"}, {"id": 3, "name": "c"}, {"id": 4, "name": "a"}]
    findings = {kind: found for kind, found in look_through(content).findings.items() if found}
    assert findings.pop("boxes (x y width height) reach out of their image"), "id 0 is the last image's"
    assert findings == {
        "entries are not what they must be": ["images[6] has no `file_name`"],
        "ids of images are there more than once": ["'0', 2 times"],
        "ids of categories are there more than once": ["'2', 2 times"],
        "names of categories are there more than once": ["'a', 2 times"],
        "classes have no object": ["c (id 3)", "a (id 4)"],
    }


def test_crowds_are_no_objects(content: dict[str, Any]) -> None:
    for one in content["annotations"][1::2]:
        one["iscrowd"] = 1
    assert look_through(content).findings["classes have no object"] == ["b (id 2)"]


@pytest.mark.parametrize("name", ["1.jpg", "2.png"])
def test_wrong_images(name: str, tmp_path: Path, content: dict[str, Any], capsys: Any) -> None:
    """Each is found without decoding, but for damage inside, and training would stumble over each."""
    path, size = tmp_path / "images" / name, (40, 30)
    whole = path.read_bytes()
    inside = bytearray(whole)
    inside[len(whole) // 2 :: 7] = b"\xff" * len(inside[len(whole) // 2 :: 7])
    inside[-12:] = whole[-12:]
    for damage, words in [
        (None, f"1 images are missing:\n    {path}"),
        (b"", f"1 images cannot be read:\n    image {path} cannot be read"),
        (b"GIF89a", "1 images cannot be read"),
        (whole[:30], "1 images cannot be read"),
        (whole[:-300], "1 images cannot be read"),
        (whole[: len(whole) // 2], "1 images cannot be read"),
        (bytes(inside), ""),
    ]:
        path.unlink(missing_ok=True)
        if damage is not None:
            path.write_bytes(damage)
        if words:
            assert check(tmp_path, content) == 1
            said = capsys.readouterr().out
            assert words in said and said.count(":\n") == 1, said
            with pytest.raises(InputError):
                read_image(path, size)
        elif name == "2.png":
            assert check(tmp_path, content) == 0 and check(tmp_path, content, "--decode") == 1


def test_sizes_are_those_of_upright_images(tmp_path: Path, content: dict[str, Any], capsys: Any) -> None:
    path = tmp_path / "images" / "1.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).rotate(90, expand=True).save(path, exif=exif)
    assert check(tmp_path, content) == 0 and read_image(path, (40, 30)).size == (40, 30)
    Image.new("RGB", (40, 31)).save(path)
    capsys.readouterr()
    assert check(tmp_path, content) == 1
    assert "1 images have another size than their annotations say:\n" in (said := capsys.readouterr().out)
    assert f"{path}: 40x31, not 40x30" in said


def test_many_mistakes_are_counted_and_the_first_named(
    tmp_path: Path, content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    content["images"] += [
        {"id": number, "file_name": f"gone/{number}.jpg", "width": 4, "height": 3} for number in range(5, 205)
    ]
    assert check(tmp_path, content) == 1
    said = capsys.readouterr().out
    assert "200 images are missing:" in said and said.count("gone/") == 5 and "and 195 more" in said


def test_what_cannot_be_checked(tmp_path: Path, content: dict[str, Any], capsys: Any) -> None:
    (tmp_path / "torn.json").write_text('{"images": [],\n "categories": [}')
    for argv, words in [
        (
            ["torn.json", "images"],
            "torn.json is not a COCO annotation file: it is not JSON (Expecting value: line 2",
        ),
        (["none.json", "images"], "none.json cannot be read (No such file or directory)"),
        (["torn.json", "none"], "none does not exist"),
    ]:
        assert main([str(tmp_path / name) for name in argv]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and words in said.err and not said.out
    (tmp_path / "file").write_text("")
    assert check(tmp_path, content, "--tensorboard", str(tmp_path / "file" / "x")) == 2


def test_histograms_for_people(tmp_path: Path, content: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert check(tmp_path, content, "--tensorboard", str(tmp_path / "board")) == 0
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["data/classes", "data/images", "data/objects"]
    assert events.Images("data/classes")[0].width > 100


def test_bars_are_as_long_as_their_counts() -> None:
    pixels = np.asarray(bars("title", {"a": 100, "b": 50, "c": 0} | {f"n{i}": 1 for i in range(200)}, most=3))
    lengths = [(pixels[row] != 255).any(axis=1).nonzero()[0] for row in (42, 63, 84)]
    spans = [int(((at >= 180) & (at < 640)).sum()) for at in lengths]
    assert spans[0] > 440 and abs(spans[1] - spans[0] / 2) < 30 and spans[2] < 30
