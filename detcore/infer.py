"""Detections on pictures: drawn into copies, and as JSON.

python -m detcore.infer RUN_OR_WEIGHTS IMAGES... --out DIR [--recipe FILE] [--score S]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from detcore.config import Resize
from detcore.data.loader import collate
from detcore.data.transforms import read_image, resize
from detcore.draw import draw_detections
from detcore.errors import DetcoreError, InputError
from detcore.loading import Loaded, load_run
from detcore.rundir import write_whole

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


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


def pictures_of(paths: list[Path], out: Path) -> list[Path]:
    """Where each picture goes: the name of its image, numbered where that is taken; never over an image."""
    taken = {path.resolve() for path in paths}
    pictures = []
    for path in paths:
        picture, number = out / f"{path.stem}.jpg", 1
        while picture.resolve() in taken:
            number += 1
            picture = out / f"{path.stem}-{number}.jpg"
        taken.add(picture.resolve())
        pictures.append(picture)
    return pictures


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m detcore.infer", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a run folder, a checkpoint of one, or a file of weights")
    parser.add_argument("images", type=Path, nargs="+", help="pictures, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures and detections.json")
    parser.add_argument("--recipe", type=Path, help="frozen recipe, if the weights are in no run folder")
    parser.add_argument("--score", type=float, default=0.3, help="leave out what is less certain (0.3)")
    args = parser.parse_args(argv)
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        paths = images_in(args.images)
        loaded = load_run(args.model, args.recipe)
        loaded.model.to(device)
        args.out.mkdir(parents=True, exist_ok=True)
        answers = []
        for path, picture in zip(paths, pictures_of(paths, args.out), strict=True):
            image = read_image(path)
            found = detect(loaded, image, loaded.cfg.data.test, device)
            found = {name: values[found["scores"] >= args.score] for name, values in found.items()}
            draw_detections(image, found["boxes"], found["scores"], found["labels"], loaded.names)
            image.save(picture, quality=92)
            answers.append(as_json(path, found, loaded.names) | {"picture": picture.name})
            print(f"{path}: {len(found['scores'])} objects", flush=True)
        write_whole(args.out / "detections.json", json.dumps(answers, indent=1).encode())
        print(f"{len(paths)} pictures and detections.json in {args.out}")
        return 0
    except DetcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"error: {args.out}: {error.strerror}", file=sys.stderr)
        return InputError.exit_status


if __name__ == "__main__":
    sys.exit(main())
