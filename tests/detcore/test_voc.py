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
    assert again.returncode != 0 and "exists already" in again.stderr


def test_a_bad_file_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    make_voc(tmp_path / "voc")
    (tmp_path / "voc/Annotations/b.xml").write_text("<annotation><filename>b.jpg</filename></annotation>")
    done = convert(tmp_path / "voc", tmp_path / "out")
    assert done.returncode == 1 and "b.xml" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["voc"]
