"""A small COCO-format data set of drawn shapes, the same for the same numbers.

python -m detcore.data.shapes DIR [--train N] [--val N] [--size S] [--seed K]
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from detcore.data.newfolder import new_folder

# Ids with a gap, as real ones have. A class has a typical colour, so that minutes on a CPU teach something.
CATEGORIES = [(1, "disc", (200, 70, 70)), (3, "square", (70, 190, 80)), (4, "triangle", (80, 90, 210))]


def draw(size: int, rng: np.random.Generator) -> tuple[Image.Image, list[tuple[int, list[float]]]]:
    """An image of (size or a little less) and its objects: (category id, box x y w h)."""
    width, height = (int(side) for side in rng.integers(3 * size // 4, size + 1, 2))
    image = Image.fromarray(
        rng.integers(0, 60, (height, width, 3), np.uint8) + np.uint8(rng.integers(0, 120))
    )
    pen = ImageDraw.Draw(image)
    objects: list[tuple[int, list[float]]] = []
    for _ in range(int(rng.integers(1, 5))):
        side = int(rng.integers(size // 5, size // 2))
        x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
        if any(_overlap([x, y, side, side], box) for _, box in objects):
            continue
        category, _, typical = CATEGORIES[int(rng.integers(len(CATEGORIES)))]
        colour = tuple(int(level) for level in np.clip(rng.normal(typical, 40), 0, 255))
        if category == 1:
            pen.ellipse([x, y, x + side - 1, y + side - 1], fill=colour)
        elif category == 3:
            pen.rectangle([x, y, x + side - 1, y + side - 1], fill=colour)
        else:
            pen.polygon([(x, y + side - 1), (x + side - 1, y + side - 1), (x + side // 2, y)], fill=colour)
        objects.append((category, [float(x), float(y), float(side), float(side)]))
    return image, objects


def _overlap(a: list[float], b: list[float]) -> bool:
    return all(a[i] < b[i] + b[i + 2] and b[i] < a[i] + a[i + 2] for i in (0, 1))


def write_split(folder: Path, name: str, count: int, size: int, seed: int) -> None:
    """`folder`/NAME/*.png and `folder`/annotations/instances_NAME.json."""
    (folder / name).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        rng = np.random.default_rng([seed, number, *name.encode()])
        image, objects = draw(size, rng)
        file = f"{number:06d}.png"
        image.save(folder / name / file, compress_level=1)
        images.append({"id": number, "file_name": file, "width": image.width, "height": image.height})
        for category, box in objects:
            entry = {"image_id": number, "category_id": category, "bbox": box}
            annotations.append(
                {"id": len(annotations) + 1, **entry, "area": box[2] * box[3], "iscrowd": 0}
            )  # fmt: skip
    categories = [{"id": id_, "name": label} for id_, label, _ in CATEGORIES]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m detcore.data.shapes", description=__doc__.split("\n")[0])
    parser.add_argument("dir", type=Path, help="folder to make; an existing one is left alone")
    parser.add_argument("--train", type=int, default=320, help="images to train on (320)")
    parser.add_argument("--val", type=int, default=64, help="images to evaluate on (64)")
    parser.add_argument("--size", type=int, default=128, help="longest side in pixels (128)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with new_folder(args.dir) as folder:
        for name, count in (("train", args.train), ("val", args.val)):
            write_split(folder, name, count, args.size, args.seed)
    print(f"{args.dir}: {args.train} images to train on, {args.val} to evaluate on, {args.size} pixels")


if __name__ == "__main__":
    main()
