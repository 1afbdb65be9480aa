"""The drawn data set: the same for the same numbers, and a whole one or none."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from detcore.data.coco import read_coco


def make(folder: Path, *numbers: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "detcore.data.shapes", str(folder), "--train", "6", "--val", "3", *numbers]
    return subprocess.run(argv, capture_output=True, text=True)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_numbers_give_the_same_files(tmp_path: Path) -> None:
    a, b, c = tmp_path / "new/a", tmp_path / "b", tmp_path / "c"
    for folder, seed in ((a, "1"), (b, "1"), (c, "2")):
        assert make(folder, "--size", "64", "--seed", seed).returncode == 0
    assert content(a) == content(b) != content(c)
    coco = read_coco(a / "train", a / "annotations/instances_train.json", training=True)
    assert len(coco) == 6 and coco.names == ["disc", "square", "triangle"]
    for index, name in enumerate(coco.files):
        boxes, labels = coco.objects(index)
        pixels = np.asarray(Image.open(coco.folder / name)).astype(int)
        for (x1, y1, x2, y2), label in zip(boxes.astype(int), labels, strict=True):
            colour = pixels[y1 + (y2 - y1) * 2 // 3, (x1 + x2) // 2]
            assert (pixels[y1:y2, x1:x2] == colour).all(-1).mean() > 0.4, "one colour fills the box"
            assert label in (0, 1, 2)


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    done = make(tmp_path / "mine")
    assert done.returncode == 2 and "exists already" in done.stderr
    assert not list((tmp_path / "mine").iterdir()) and len(list(tmp_path.iterdir())) == 1
