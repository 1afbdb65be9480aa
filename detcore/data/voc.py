"""A data set in Pascal VOC's layout (Annotations/*.xml, JPEGImages, ImageSets/Main/*.txt), made COCO-format.

python -m detcore.data.voc VOC_FOLDER DIR
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from detcore.data.newfolder import new_folder
from detcore.data.transforms import SUFFIXES, read_image
from detcore.errors import InputError


class Object(NamedTuple):
    """Its class, its box x y w h in pixels, and whether only evaluation is told of it, to leave it out."""

    label: str
    box: list[float]
    difficult: bool


def read_annotation(path: Path, images: Path) -> tuple[dict[str, Any], list[Object]]:
    """One XML file -> the image's COCO entry (no id yet) and its objects. Raises InputError.

    In files of VOC itself the first pixel is number 1 and a box ends with its last pixel (VOC2007 devkit,
    section 4.2); in others, as LabelImg writes them, corners are points between pixels, from 0.
    """
    try:
        root = ElementTree.parse(path).getroot()
        if root.find("size") is None and root.find("object") is None:
            raise ValueError("it has neither <size> nor <object>")
        picture = _picture(root, path.stem, images)
        width, height = (int(root.findtext(f"size/{side}") or 0) for side in ("width", "height"))
        if width <= 0 or height <= 0:
            width, height = read_image(picture).size
        first = 1 if "VOC" in (root.findtext("source/database") or "") else 0
        objects = []
        for found in root.iter("object"):
            x1, y1, x2, y2 = (
                float(_text(found, f"bndbox/{name}")) for name in ("xmin", "ymin", "xmax", "ymax")
            )
            box = [x1 - first, y1 - first, x2 - x1 + first, y2 - y1 + first]
            if box[2] > 0 and box[3] > 0:
                difficult = (found.findtext("difficult") or "0").strip() == "1"
                objects.append(Object(_text(found, "name"), box, difficult))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise InputError(f"annotation file {path} cannot be used: {error}") from None
    return {"file_name": picture.name, "width": width, "height": height}, objects


def _picture(root: ElementTree.Element, stem: str, images: Path) -> Path:
    """The image that a file is about: of the name it says, or of its own, as files that were renamed need."""
    named = images / Path(root.findtext("filename") or stem).name
    if named.is_file():
        return named
    for suffix in SUFFIXES:
        if (images / f"{stem}{suffix}").is_file():
            return images / f"{stem}{suffix}"
    raise ValueError(f"its image {named} does not exist")


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if not text:
        raise ValueError(f"<{path.replace('/', '><')}> is missing")
    return text.strip()


def convert(voc: Path, folder: Path) -> dict[str, int]:
    """Write `folder`/SPLIT/* and `folder`/annotations/instances_SPLIT.json; images of each split.

    The class ids are those of the names in alphabetical order, from 1. Difficult objects become crowds, which
    are not trained on, and count neither for nor against a detector."""
    lists = sorted((voc / "ImageSets" / "Main").glob("*.txt"))
    splits = {
        path.stem: [line.split()[0] for line in path.read_text().splitlines() if line] for path in lists
    }
    splits = {name: stems for name, stems in splits.items() if name in ("train", "val", "test")}
    if not splits:
        raise InputError(f"{voc} has no ImageSets/Main/train.txt, val.txt or test.txt")
    pictures = voc / "JPEGImages"
    read = {
        name: [read_annotation(voc / "Annotations" / f"{stem}.xml", pictures) for stem in stems]
        for name, stems in splits.items()
    }
    classes = sorted({one.label for pairs in read.values() for _, objects in pairs for one in objects})
    (folder / "annotations").mkdir(parents=True)
    for name, pairs in read.items():
        (folder / name).mkdir()
        images, annotations = [], []
        for number, (image, objects) in enumerate(pairs, 1):
            shutil.copyfile(pictures / image["file_name"], folder / name / image["file_name"])
            images.append({"id": number, **image})
            for one in objects:
                category = classes.index(one.label) + 1
                entry = {"id": len(annotations) + 1, "image_id": number, "category_id": category}
                entry |= {"bbox": one.box, "area": one.box[2] * one.box[3], "iscrowd": int(one.difficult)}
                annotations.append(entry)
        categories = [{"id": number, "name": label} for number, label in enumerate(classes, 1)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return {name: len(pairs) for name, pairs in read.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m detcore.data.voc", description=__doc__.split("\n")[0])
    parser.add_argument("voc", type=Path, help="folder that holds Annotations, JPEGImages and ImageSets")
    parser.add_argument("dir", type=Path, help="folder to make; an existing one is left alone")
    args = parser.parse_args()
    with new_folder(args.dir) as folder:
        counts = convert(args.voc, folder)
    print(f"{args.dir}: " + ", ".join(f"{count} images in {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
