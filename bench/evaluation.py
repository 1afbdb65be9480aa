"""What evaluation costs beside faster-coco-eval itself: 5,000 images, 36,000 objects, 500,000 detections.

Ours: reading the annotation file, turning what a detector gives for each image (arrays of boxes, scores and
labels) into COCO's results, sorting them as ranks would have them sorted, and the twelve numbers. The bare
library: `COCO(file)`, `loadRes` of a list of results that is there already, evaluate, accumulate, summarize.
Both have to find the same numbers.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from bench.measure import Result, in_turn, show
from detcore.annotations import read_json
from detcore.scoring import as_results, coco_eval

IMAGES, OBJECTS, DETECTIONS, CLASSES = 5000, 36000, 100, 80


class Found(NamedTuple):
    """What a detector says of one image."""

    image: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def main() -> list[Result]:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        truth = objects(rng)
        path.write_text(json.dumps(truth))
        found = detections(truth, rng)
        ids = [one["id"] for one in truth["categories"]]
        numbers: dict[str, np.ndarray] = {}

        def ours() -> float:
            began = time.perf_counter()
            rows = [row for one in found for row in as_results(*one, ids)]
            rows.sort(key=lambda row: row["image_id"])
            numbers["ours"] = coco_eval(read_json(path), rows).stats[:12]
            return time.perf_counter() - began

        def theirs() -> float:
            rows = [row for one in found for row in as_results(*one, ids)]
            began = time.perf_counter()
            numbers["theirs"] = bare(path, rows).stats[:12]
            return time.perf_counter() - began

        claim = f"evaluating {IMAGES:,} images with {IMAGES * DETECTIONS:,} detections"
        sides = ("detcore, from arrays to AP", ours), ("faster-coco-eval alone", theirs)
        result = in_turn(claim, "<= 1.2", *sides, pairs=5)
    assert np.array_equal(numbers["ours"], numbers["theirs"]), numbers
    return [result]


def bare(path: Path, rows: list[dict[str, Any]]) -> Any:
    """The library as its README has it."""
    reference = COCO(str(path))
    evaluation = COCOeval_faster(reference, reference.loadRes(rows), "bbox", print_function=lambda *_: None)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def objects(rng: np.random.Generator) -> dict[str, Any]:
    """An annotation file's content, with COCO's sizes and a few crowds."""
    images = [{"id": 7 * n + 3, "file_name": f"{n}.jpg", "width": 640, "height": 480} for n in range(IMAGES)]
    size = np.exp(rng.normal(4, 1, (OBJECTS, 2))).clip(4, (600, 440))
    corner = rng.random((OBJECTS, 2)) * ((640, 480) - size)
    boxes = np.concatenate([corner, size], axis=1).round(2)
    annotations = [
        {
            "id": number,
            "image_id": images[int(image)]["id"],
            "category_id": int(category),
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(number % 100 == 0),
        }
        for number, (image, category, box) in enumerate(
            zip(
                rng.integers(0, IMAGES, OBJECTS),
                rng.integers(1, CLASSES + 1, OBJECTS),
                boxes.tolist(),
                strict=True,
            ),
            1,
        )
    ]
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def detections(truth: dict[str, Any], rng: np.random.Generator) -> list[Found]:
    """For each image 100: each object once or twice, a little off, and boxes of nothing."""
    own: dict[int, list[dict[str, Any]]] = {one["id"]: [] for one in truth["images"]}
    for one in truth["annotations"]:
        own[one["image_id"]].append(one)
    found = []
    for image, there in own.items():
        there = (there * 2)[:DETECTIONS]
        boxes = rng.random((DETECTIONS, 4)) * (500, 400, 140, 80)
        labels = rng.integers(0, CLASSES, DETECTIONS)
        if there:
            exact = np.array([one["bbox"] for one in there])
            boxes[: len(there)] = exact + rng.normal(0, 0.1, exact.shape) * exact[:, 2:].repeat(2, axis=1)
            labels[: len(there)] = [one["category_id"] - 1 for one in there]
        boxes[:, 2:] = boxes[:, :2] + np.abs(boxes[:, 2:]) + 1
        scores = rng.random(DETECTIONS).astype(np.float32)
        scores[: len(there)] += (1 - scores[: len(there)]) / 2
        best = np.argsort(-scores)
        found.append(Found(image, boxes[best].astype(np.float32), scores[best], labels[best]))
    return found


if __name__ == "__main__":
    show(main())
