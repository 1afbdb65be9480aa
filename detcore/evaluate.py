"""COCO evaluation: detections of a whole split from all ranks, their file, and the twelve numbers.

python -m detcore.evaluate WEIGHTS [--images DIR --annotations FILE] [--recipe FILE] [--out DIR]
torchrun --nproc-per-node N -m detcore.evaluate ...
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from detcore import stop

if __name__ == "__main__":
    stop.install()  # before the second that importing torch takes

import numpy as np
import torch
from PIL import Image
from torch import nn

from detcore.annotations import read_json
from detcore.config import Data, Split, Train
from detcore.data.coco import Coco, read_coco
from detcore.data.loader import Batch, EvaluationSet, batches
from detcore.data.transforms import resized
from detcore.distributed import World, share_statistics
from detcore.draw import draw_detections, draw_truth
from detcore.errors import DetcoreError, InputError, listed
from detcore.loading import Loaded, autocast, load_run
from detcore.scoring import Result, as_results, coco_eval, stats, table, write_results

BATCH = 8  # images at a time; always as many, so that detections do not depend on the number of ranks
PICTURES = 4


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
    names: Sequence[str] | None = None,
) -> Evaluation | None:
    """Evaluate on `data.val`; None if a stop was requested before the end. Every rank must call this.

    names: the model's classes, see `category_ids`; left out, they are those of the data. Raises InputError.
    """
    coco = read_coco(
        cfg.data.path(cfg.data.val.images), cfg.data.path(cfg.data.val.annotations), training=False
    )
    if names is None and len(coco.categories) != cfg.model.num_classes:
        raise InputError(
            f"the model has {cfg.model.num_classes} classes, {coco.annotations} has {len(coco.categories)}"
        )
    categories = category_ids(coco, coco.names if names is None else names)
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
            results += _detect(model, batch, coco, categories, cfg, world, pictures)
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
    model: nn.Module,
    batch: Batch,
    coco: Coco,
    categories: Sequence[int | None],
    cfg: Train,
    world: World,
    pictures: list[Image.Image],
) -> list[Result]:
    """Detections of a batch, in pixels of the images as they are on disk; on rank 0 `pictures` are filled."""
    images = batch.images.to(world.device)
    with autocast(cfg.amp, world.device):
        found = model.detect(images, batch.sizes.to(world.device))
    boxes, scores, labels, counts = (tensor.cpu().numpy() for tensor in found)
    results: list[Result] = []
    for row, index in enumerate(batch.index.tolist()):
        count = int(counts[row])
        own = boxes[row, :count], scores[row, :count], labels[row, :count]
        height, width = batch.sizes[row].tolist()
        if world.rank == 0 and len(pictures) < PICTURES:
            pixels = batch.images[row, :, :height, :width].permute(1, 2, 0).contiguous().numpy()
            truth = batch.targets.boxes[row][batch.targets.labels[row] >= 0].numpy()
            pictures.append(_picture(pixels, truth, *own, categories, coco))
        scale = np.tile(coco.sizes[index].astype(np.float64) / [width, height], 2)
        results += as_results(int(coco.ids[index]), own[0] * scale, *own[1:], categories)
    return results


def _picture(
    pixels: np.ndarray,
    truth: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    categories: Sequence[int | None],
    coco: Coco,
) -> Image.Image:
    """An image with its objects and what was found of them with some certainty."""
    picture = Image.fromarray(pixels)
    draw_truth(picture, truth)
    place = {id_: index for index, id_ in enumerate(coco.categories)}
    shown = [
        row for row, label in enumerate(labels.tolist()) if scores[row] > 0.3 and categories[label] in place
    ]
    colours = np.array([place[categories[label]] for label in labels[shown].tolist()], np.int64)
    draw_detections(picture, boxes[shown], scores[shown], colours, coco.names)
    return picture


def category_ids(coco: Coco, names: Sequence[str]) -> list[int | None]:
    """The id of each of a model's classes in a data set, found by name; None where the data has no such
    class, whose detections then count for nothing. Raises InputError if the data has a class that the model
    does not know, or a name is there twice."""
    if list(names) == coco.names:
        return list(coco.categories)
    unknown = [name for name in coco.names if name not in names]
    if unknown:
        raise InputError(
            f"{coco.annotations} has classes that the model does not know: {listed(unknown)}; "
            f"the model's are {listed(names)}"
        )
    for where, known in ((coco.annotations, coco.names), ("the model", names)):
        twice = [name for name, count in Counter(known).items() if count > 1]
        if twice:
            raise InputError(f"{where} has more than one class called {listed(twice)}; which is meant?")
    ids = dict(zip(coco.names, coco.categories, strict=True))
    return [ids.get(name) for name in names]


def other_data(loaded: Loaded, images: Path | None, annotations: Path | None) -> Loaded:
    """The same detector before other data than its recipe's. Raises InputError."""
    if images is None and annotations is None:
        return loaded
    if images is None or annotations is None:
        raise InputError(
            "--images and --annotations go together: a folder, and the COCO-format file about it"
        )
    if not images.is_dir():
        raise InputError(f"the folder of images {images} does not exist")
    split = Split(images=str(images.absolute()), annotations=str(annotations.absolute()))
    data = loaded.cfg.data.model_copy(update={"val": split})
    return loaded._replace(cfg=loaded.cfg.model_copy(update={"data": data}))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m detcore.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=Path, help="a run folder, a checkpoint of one, or a file of weights")
    parser.add_argument("--images", type=Path, help="folder of other images than the recipe's `val`")
    parser.add_argument("--annotations", type=Path, help="COCO-format file about them; classes match by name")
    parser.add_argument("--recipe", type=Path, help="the recipe, if the weights are in no run folder")
    parser.add_argument("--out", type=Path, help="folder for the detections (RUN/inference)")
    args = parser.parse_args(argv)
    world = None
    try:
        loaded = other_data(load_run(args.weights, args.recipe), args.images, args.annotations)
        world = World.join()
        done = evaluate(
            loaded.model.to(world.device), loaded.cfg, world, names=loaded.names if loaded.named else None
        )
        if done is None:
            print("stopped before the end", file=sys.stderr)
            return 1
        if world.rank == 0:
            own = loaded.folder is not None and args.annotations is None
            out = args.out or (loaded.folder / "inference" if own else Path("inference"))
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
