"""COCO evaluation: detections of a whole split from all ranks, their file, and the twelve numbers.

torchrun --nproc-per-node N -m detcore.evaluate RUN | CHECKPOINT [--recipe FILE] [--out DIR]
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from detcore import stop

if __name__ == "__main__":
    stop.install()  # before the second that importing torch takes

import numpy as np
import torch
from PIL import Image
from torch import nn

from detcore.annotations import read_json
from detcore.config import Data, Train
from detcore.data.coco import Coco, read_coco
from detcore.data.loader import Batch, EvaluationSet, batches
from detcore.data.transforms import resized
from detcore.distributed import World, share_statistics
from detcore.draw import draw_detections, draw_truth
from detcore.errors import DetcoreError
from detcore.loading import autocast, load_run
from detcore.rundir import write_whole

BATCH = 8  # images at a time; always as many, so that detections do not depend on the number of ranks
PICTURES = 4
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

Result = dict[str, Any]


class Evaluation(NamedTuple):
    """metrics: the twelve numbers in percent, without those that no object counts for. results: detections
    as COCO has them. pictures: a few images with their boxes. The last two on rank 0 only."""

    metrics: dict[str, float]
    results: list[Result]
    pictures: list[Image.Image]


def evaluate(
    model: nn.Module,
    cfg: Train,
    world: World,
    progress: Callable[[], None] = lambda: None,
) -> Evaluation | None:
    """Evaluate on `data.val`; None if a stop was requested before the end. Every rank must call this."""
    coco = read_coco(
        cfg.data.path(cfg.data.val.images), cfg.data.path(cfg.data.val.annotations), training=False
    )
    plan = _plan(coco, cfg.data)
    share_statistics(model, world)
    model.eval()
    results: list[Result] = []
    pictures: list[Image.Image] = []
    loader = batches(
        EvaluationSet(coco, cfg.data.test), plan[world.rank :: world.size], cfg.data.workers, pin=False
    )
    for _ in range(-(-len(plan) // world.size)):  # as many rounds on every rank, so that they can agree
        if world.any(stop.requested()):
            model.train()
            return None
        batch = next(loader, None)
        if batch is not None:
            results += _detect(model, batch, coco, cfg, world, pictures)
        progress()
    model.train()
    gathered = world.gather(results)
    metrics: dict[str, float] = {}
    if world.rank == 0:
        results = sorted((one for part in gathered for one in part), key=lambda one: one["image_id"])
        metrics = stats(coco_eval(read_json(coco.annotations), results))
    return Evaluation(world.from_first(metrics), results, pictures)


def _plan(coco: Coco, data: Data) -> list[list[int]]:
    """Batches of images of similar shape."""
    shapes = [resized(tuple(size), data.test) for size in coco.sizes]
    order = sorted(range(len(coco)), key=lambda index: shapes[index])
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


@torch.no_grad()
def _detect(
    model: nn.Module, batch: Batch, coco: Coco, cfg: Train, world: World, pictures: list[Image.Image]
) -> Iterator[Result]:
    images = batch.images.to(world.device)
    with autocast(cfg.amp, world.device):
        found = model.detect(images, batch.sizes.to(world.device))
    boxes, scores, labels, counts = (tensor.cpu().numpy() for tensor in found)
    for row, index in enumerate(batch.index.tolist()):
        count = int(counts[row])
        height, width = batch.sizes[row].tolist()
        original = coco.sizes[index].astype(np.float64)
        scale = np.tile(original / [width, height], 2)
        if world.rank == 0 and len(pictures) < PICTURES:
            pixels = batch.images[row, :, :height, :width].permute(1, 2, 0).contiguous().numpy()
            picture = Image.fromarray(pixels)
            draw_truth(picture, batch.targets.boxes[row][batch.targets.labels[row] >= 0].numpy())
            shown = int((scores[row, :count] > 0.3).sum())
            draw_detections(picture, boxes[row, :shown], scores[row, :shown], labels[row, :shown], coco.names)
            pictures.append(picture)
        for box, score, label in zip(
            boxes[row, :count] * scale,
            scores[row, :count].tolist(),
            labels[row, :count].tolist(),
            strict=True,
        ):
            x1, y1, x2, y2 = (round(float(value), 3) for value in box)
            yield {
                "image_id": int(coco.ids[index]),
                "category_id": coco.categories[label],
                "bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)],
                "score": score,
            }


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
    found = COCO({**truth, "annotations": []}) if not results else reference.loadRes(results)
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="torchrun -m detcore.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run folder, a checkpoint of one, or a file of weights")
    parser.add_argument("--recipe", type=Path, help="frozen recipe, if it is not in the run folder")
    parser.add_argument("--out", type=Path, help="folder for the detections (RUN/inference)")
    args = parser.parse_args(argv)
    world = None
    try:
        loaded = load_run(args.run, args.recipe)
        world = World.join()
        done = evaluate(loaded.model.to(world.device), loaded.cfg, world)
        if done is None:
            print("stopped before the end", file=sys.stderr)
            return 1
        if world.rank == 0:
            out = args.out or (loaded.folder / "inference" if loaded.folder else Path("inference"))
            write_results(out / "coco_instances_results.json", done.results)
            print(f"{loaded.what}: {table(done.metrics)}")
            print(f"{len(done.results)} detections in {out / 'coco_instances_results.json'}")
        return 0
    except DetcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    finally:
        if world is not None:
            world.leave()


if __name__ == "__main__":
    sys.exit(main())
