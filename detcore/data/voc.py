"""A data set in Pascal VOC's layout (Annotations/*.xml, JPEGImages, ImageSets/Main/*.txt), made COCO-format.

python -m detcore.data.voc VOC_FOLDER DIR
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from detcore.data.newfolder import new_folder
from detcore.errors import InputError

Objects = list[tuple[str, list[float]]]  # class, box x y w h


def read_annotation(path: Path) -> tuple[dict[str, Any], Objects]:
    """One XML file -> the image's COCO entry (no id yet) and its objects. Raises InputError."""
    try:
        root = ElementTree.parse(path).getroot()
        image = {"file_name": Path(_text(root, "filename")).name}
        image |= {side: int(_text(root, f"size/{side}")) for side in ("width", "height")}
        objects = []
        for found in root.iter("object"):
            x1, y1, x2, y2 = (
                float(_text(found, f"bndbox/{name}")) for name in ("xmin", "ymin", "xmax", "ymax")
            )
            if x2 > x1 and y2 > y1:
                objects.append((_text(found, "name"), [x1, y1, x2 - x1, y2 - y1]))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise InputError(f"annotation file {path} cannot be used: {error}") from None
    return image, objects


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if not text:
        raise ValueError(f"<{path.replace('/', '><')}> is missing")
    return text.strip()


def convert(voc: Path, folder: Path) -> dict[str, int]:
    """Write `folder`/SPLIT/* and `folder`/annotations/instances_SPLIT.json; images of each split.

    The class ids are those of the names in alphabetical order, from 1."""
    lists = sorted((voc / "ImageSets" / "Main").glob("*.txt"))
    splits = {
        path.stem: [line.split()[0] for line in path.read_text().splitlines() if line] for path in lists
    }
    splits = {name: stems for name, stems in splits.items() if name in ("train", "val", "test")}
    if not splits:
        raise InputError(f"{voc} has no ImageSets/Main/train.txt, val.txt or test.txt")
    read = {
        name: [read_annotation(voc / "Annotations" / f"{stem}.xml") for stem in stems]
        for name, stems in splits.items()
    }
    classes = sorted({label for pairs in read.values() for _, objects in pairs for label, _ in objects})
    (folder / "annotations").mkdir(parents=True)
    for name, pairs in read.items():
        (folder / name).mkdir()
        images, annotations = [], []
        for number, (image, objects) in enumerate(pairs, 1):
            shutil.copyfile(voc / "JPEGImages" / image["file_name"], folder / name / image["file_name"])
            images.append({"id": number, **image})
            for label, box in objects:
                entry = {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": classes.index(label) + 1,
                }
                annotations.append(entry | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
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
