"""Detections on pictures: drawn into copies, as JSON, and those of one class cut out.

python -m detcore.infer WEIGHTS IMAGES... --out DIR [--crop CLASS] [--recipe FILE] [--score S]
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from detcore.config import Resize
from detcore.data.loader import collate
from detcore.data.transforms import SUFFIXES, read_image, resize
from detcore.draw import draw_detections
from detcore.errors import DetcoreError, InputError, listed
from detcore.loading import Loaded, load_run
from detcore.rundir import write_whole


def images_in(paths: list[Path]) -> list[Path]:
    """The files named, and those in folders named. Raises InputError for what does not exist."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"image {path} does not exist")
    if not found:
        raise InputError(f"no images in {', '.join(map(str, paths))}")
    return found


class Free:
    """Names of files to write: numbered where one is taken, by another or by an image that is looked at."""

    def __init__(self, images: list[Path]) -> None:
        self.taken = {path.resolve() for path in images}

    def name(self, folder: Path, stem: str) -> Path:
        path, number = folder / f"{stem}.jpg", 1
        while path.resolve() in self.taken:
            number += 1
            path = folder / f"{stem}-{number}.jpg"
        self.taken.add(path.resolve())
        return path


@torch.no_grad()
def detect(loaded: Loaded, image: Image.Image, how: Resize, device: torch.device) -> dict[str, np.ndarray]:
    """boxes (D, 4) x1 y1 x2 y2 in pixels of `image`, scores (D,), labels (D,), best first."""
    small, _ = resize(image, np.zeros((0, 4), np.float32), how)
    batch = collate([(np.asarray(small), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), 0)])
    found = loaded.model.detect(batch.images.contiguous().to(device), batch.sizes.to(device))
    count = int(found.count[0])
    scale = np.array([image.width / small.width, image.height / small.height] * 2)
    boxes = found.boxes[0, :count].cpu().numpy() * scale
    return {
        "boxes": boxes,
        "scores": found.scores[0, :count].cpu().numpy(),
        "labels": found.labels[0, :count].cpu().numpy(),
    }


def as_json(path: Path, found: dict[str, np.ndarray], names: list[str]) -> dict[str, Any]:
    rows = zip(found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True)
    return {
        "image": str(path),
        "detections": [
            {"label": names[label], "score": round(score, 4), "box": [round(value, 2) for value in box]}
            for box, score, label in rows
        ],
    }


def cut_out(image: Image.Image, box: list[float]) -> Image.Image:
    """What of the image is in a box x1 y1 x2 y2, in whole pixels: one at least."""
    left, top = (
        min(max(0, math.floor(low)), side - 1) for low, side in zip(box[:2], image.size, strict=True)
    )
    right, bottom = (
        min(max(math.ceil(high), low + 1), side)
        for high, low, side in zip(box[2:], (left, top), image.size, strict=True)
    )
    return image.crop((left, top, right, bottom))


def save_crops(image: Image.Image, answer: dict[str, Any], label: str, out: Path, free: Free) -> int:
    """Each detection of the class as a picture of its own, best first, in `out`/crops; how many. The answer
    is told their names."""
    count = 0
    for one in answer["detections"]:
        if one["label"] == label:
            count += 1
            path = free.name(out / "crops", f"{Path(answer['picture']).stem}-{count}")
            path.parent.mkdir(exist_ok=True)
            cut_out(image, one["box"]).save(path, quality=95)
            one["crop"] = f"crops/{path.name}"
    return count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m detcore.infer", description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=Path, help="a run folder, a checkpoint of one, or a file of weights")
    parser.add_argument("images", type=Path, nargs="+", help="pictures, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures and detections.json")
    parser.add_argument("--crop", metavar="CLASS", help="cut out each object of this class, into DIR/crops")
    parser.add_argument("--recipe", type=Path, help="the recipe, if the weights are in no run folder")
    parser.add_argument("--score", type=float, default=0.3, help="leave out what is less certain (0.3)")
    args = parser.parse_args(argv)
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        paths = images_in(args.images)
        loaded = load_run(args.weights, args.recipe)
        if args.crop is not None and args.crop not in loaded.names:
            raise InputError(f"--crop {args.crop}: the classes are {listed(loaded.names)}")
        loaded.model.to(device)
        args.out.mkdir(parents=True, exist_ok=True)
        answers, free, crops = [], Free(paths), 0
        for path in paths:
            image = read_image(path)
            found = detect(loaded, image, loaded.cfg.data.test, device)
            found = {name: values[found["scores"] >= args.score] for name, values in found.items()}
            picture = free.name(args.out, path.stem)
            answer = as_json(path, found, loaded.names) | {"picture": picture.name}
            if args.crop is not None:
                crops += save_crops(image, answer, args.crop, args.out, free)
            draw_detections(image, found["boxes"], found["scores"], found["labels"], loaded.names)
            image.save(picture, quality=92)
            answers.append(answer)
            print(f"{path}: {len(found['scores'])} objects", flush=True)
        write_whole(args.out / "detections.json", json.dumps(answers, indent=1).encode())
        cut = f", {crops} of {args.crop} cut out," if args.crop is not None else ""
        print(f"{len(paths)} pictures{cut} and detections.json in {args.out}")
        return 0
    except DetcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"error: {args.out}: {error.strerror}", file=sys.stderr)
        return InputError.exit_status


if __name__ == "__main__":
    sys.exit(main())
