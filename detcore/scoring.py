"""COCO's twelve numbers: detections as its results, their file, and faster-coco-eval's verdict on them."""

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from detcore.rundir import write_whole

STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

Result = dict[str, Any]


def as_results(
    image_id: int, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, categories: Sequence[int | None]
) -> list[Result]:
    """Detections of an image, boxes (D, 4) x1 y1 x2 y2 in its pixels, as COCO has them, in thousandths of a
    pixel.

    categories: the id of each label, None where the data has no such class: those are left out.
    """
    corners = np.round(boxes.astype(np.float64), 3)
    corners[:, 2:] = np.round(corners[:, 2:] - corners[:, :2], 3)
    rows = zip(labels.tolist(), corners.tolist(), scores.tolist(), strict=True)
    return [
        {"image_id": image_id, "category_id": categories[label], "bbox": box, "score": score}
        for label, box, score in rows
        if categories[label] is not None
    ]


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Half a million dictionaries, none in a circle; looking for circles takes a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@_no_garbage()
def coco_eval(truth: dict[str, Any], results: list[Result]) -> Any:
    """`results` against a COCO annotation file's content, accumulated; maxDets 1, 10, 100 as always.

    Of the annotations, `iscrowd` and `area` may be missing; then they are 0 and that of the box. Their ids,
    which the evaluation counts by and some files lack or repeat, are given anew.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    annotations = [
        {"iscrowd": 0, "area": one["bbox"][2] * one["bbox"][3]} | one | {"id": number}
        for number, one in enumerate(truth["annotations"], 1)
    ]
    reference = COCO({**truth, "annotations": annotations})
    # loadRes writes into what it is given, and would draw a polygon around each box
    copies = [{**one, "segmentation": None} for one in results]
    found = reference.loadRes(copies) if copies else COCO({**truth, "annotations": []})
    evaluation = COCOeval_faster(reference, found, "bbox", print_function=lambda *_: None)
    evaluation.params.maxDets = [1, 10, 100]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def stats(evaluation: Any) -> dict[str, float]:
    """The twelve numbers in percent; those that are undefined (-1) are left out."""
    values = zip(STATS, map(float, evaluation.stats[: len(STATS)]), strict=True)
    return {name: 100 * value for name, value in values if value >= 0}


def write_results(path: Path, results: list[Result]) -> None:
    """coco_instances_results.json, as detectron2 names it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(results).encode())


def table(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())
