"""Pascal VOC's layout becomes a data set that the reader takes; what is wrong with a file is said."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from detcore.data.coco import read_coco

OBJECT = "<object><name>{}</name><bndbox>{}</bndbox></object>"
BOX = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"


def make_voc(folder: Path) -> None:
    """Two images to train on, one to evaluate on; a box without area among theirs."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets/Main/train.txt").write_text("a\nb\n")
    (folder / "ImageSets/Main/val.txt").write_text("c\n")
    for stem in "abc":
        Image.new("RGB", (40, 30)).save(folder / f"JPEGImages/{stem}.jpg")
        objects = OBJECT.format("dog", BOX.format(1, 2, 11, 22)) + OBJECT.format(
            "cat", BOX.format(3, 3, 3, 9)
        )
        size = "<size><width>40</width><height>30</height></size>"
        text = f"<annotation><filename>{stem}.jpg</filename>{size}{objects}</annotation>"
        (folder / f"Annotations/{stem}.xml").write_text(text)


def convert(*argv: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "detcore.data.voc", *map(str, argv)]
    return subprocess.run(line, capture_output=True, text=True)


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    make_voc(tmp_path / "voc")
    done = convert(tmp_path / "voc", tmp_path / "out")
    assert done.returncode == 0 and "2 images in train, 1 images in val" in done.stdout, done.stderr
    coco = read_coco(tmp_path / "out/train", tmp_path / "out/annotations/instances_train.json", training=True)
    assert coco.names == ["dog"] and len(coco) == 2
    content = json.loads((tmp_path / "out/annotations/instances_val.json").read_text())
    assert [entry["bbox"] for entry in content["annotations"]] == [[1, 2, 10, 20]]
    again = convert(tmp_path / "voc", tmp_path / "out")
    assert again.returncode == 2 and "exists already" in again.stderr


def test_a_bad_file_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    make_voc(tmp_path / "voc")
    (tmp_path / "voc/Annotations/b.xml").write_text("<annotation><filename>b.jpg</filename></annotation>")
    done = convert(tmp_path / "voc", tmp_path / "out")
    assert done.returncode == 2 and "b.xml" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["voc"]


def test_files_of_voc_itself(tmp_path: Path) -> None:
    """Pixels from 1, boxes with their last pixel, fractions, difficult objects, parts of objects, no size, a
    file name that is another's."""
    make_voc(tmp_path / "voc")
    parts = "<part><name>head</name><bndbox>" + BOX.format(2, 2, 4, 4) + "</bndbox></part>"
    whole = OBJECT.format("person", BOX.format(1, 1, 40, 30)).replace("</object>", f"{parts}</object>")
    hard = OBJECT.format("person", BOX.format("5.5", 6, "5.5", 6)).replace(
        "<name>person</name>", "<name>person</name><difficult>1</difficult>"
    )
    text = (
        "<annotation><folder>VOC2007</folder><filename>elsewhere.jpg</filename>"
        f"<source><database>The VOC2007 Database</database></source>{whole}{hard}</annotation>"
    )
    (tmp_path / "voc/Annotations/c.xml").write_text(text)
    done = convert(tmp_path / "voc", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out/annotations/instances_val.json").read_text())
    assert content["images"] == [{"id": 1, "file_name": "c.jpg", "width": 40, "height": 30}]
    seen = [(entry["bbox"], entry["area"], entry["iscrowd"]) for entry in content["annotations"]]
    assert seen == [([0, 0, 40, 30], 1200, 0), ([4.5, 5, 1, 1], 1, 1)]
    assert [one["name"] for one in content["categories"]] == ["dog", "person"]
    coco = read_coco(tmp_path / "out/val", tmp_path / "out/annotations/instances_val.json", training=True)
    assert coco.boxes.tolist() == [[0, 0, 40, 30]], "what is difficult is not trained on"


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    make_voc(tmp_path / "voc")
    (tmp_path / "voc/JPEGImages/b.jpg").unlink()
    done = convert(tmp_path / "voc", tmp_path / "out")
    assert done.returncode == 2 and "b.xml cannot be used: its image" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["voc"]
