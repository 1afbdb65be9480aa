"""What can be known about a `train` section before anything is started, without torch.

`python -m detcore.config --check` reads {"train", "resources", "fetched"} as JSON and prints what `check`
answers. `fetched` are folders that will be filled before the program starts: what is not there yet is no
mistake.

Problems of kind `recipe` are mistakes wherever the run would go; those of kind `machine` (a data set or
weights that are not here) say something about this machine only.
"""

import json
import mmap
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from detcore.annotations import read_annotations
from detcore.config import ENOUGH_FOR_NORM, Split, Train
from detcore.errors import InputError
from detcore.recipe import Problem, mistakes
from detcore.weights import fetch
from detcore.weights.catalogue import CATALOGUE

LARGE = 64 * 2**20  # a larger annotation file is looked into, not read: COCO's takes ten seconds


def check(document: dict[str, Any]) -> dict[str, Any]:
    """What the module says -> {"problems": [{"loc", "message", "kind", "known"?}], "notes": [str]}."""
    try:
        train = Train.model_validate(document.get("train"))
    except ValidationError as error:
        return {"problems": mistakes(error), "notes": []}
    resources = document.get("resources", {})
    ranks = resources.get("gpus", 1) * resources.get("nodes", 1)
    what = "worker" if resources.get("device") == "cpu" else "GPU"
    problems, notes = _batch(train, ranks, what)
    notes += [] if problems else decisions(train, ranks, what)
    images = 0
    fetched = [Path(folder) for folder in document.get("fetched", [])]
    for split in ("train", "val"):
        found, count = _data_set(train, split)
        if found and found[0]["kind"] == "machine" and _comes(train, split, fetched):
            continue
        told = [problem["loc"] for problem in problems]  # both splits may say it of the classes
        problems += [problem for problem in found if problem["loc"] not in told]
        images = count if split == "train" else images
    problems += _weights(train)
    notes += _epochs(train, images)
    return {"problems": problems, "notes": notes}


def decisions(train: Train, ranks: int, what: str) -> list[str]:
    """What `train` leaves open and so many ranks decide, in sentences, and what in it can hardly be meant.
    what: a rank is a GPU or a worker."""
    plain, notes, chosen = train.schedule, [], train.on(ranks)
    schedule = chosen.schedule
    if schedule is not plain:
        warmup = schedule.warmup
        kind = "at a constant" if warmup.constant else "from"
        notes.append(
            f"schedule scaled from batch {plain.for_batch} to {train.data.batch}: "
            f"lr {schedule.optimizer.lr:g}, {schedule.iterations} iterations, steps at {schedule.steps}, "
            f"warm-up {warmup.iterations} {kind} {warmup.factor:g}"
        )
    norm, share = getattr(chosen.model, "norm", None), train.at_once(ranks)
    if norm != getattr(train.model, "norm", None):
        few = f"{share} image{'s' * (share != 1)} at a time on a {what}"
        least = f"batch norm wants {ENOUGH_FOR_NORM}"
        if norm == "bn":
            notes.append(f"norm auto is bn: {few}, and {least}")
        elif ranks > 1:
            notes.append(f"norm auto is sync_bn, over all {ranks * share} images: {few}, and {least}")
        else:
            notes.append(f"norm auto is sync_bn, which one {what} alone gains nothing by: {few}, and {least}")
    return notes + _without_statistics(train)


def _without_statistics(train: Train) -> list[str]:
    """Norms that do not learn statistics, and no weights to bring them. No mistake in a recipe that is there
    for converting, evaluating and looking."""
    notes, model = [], train.model
    for where, part in (("train.model.backbone", model.backbone), ("train.model", model)):
        norm = getattr(part, "norm", None)
        if norm in ("frozen_bn", "fixed_bn") and getattr(part, "weights", None) is None:
            cure = "name its `weights`, or take `bn`" if part is model.backbone else "take `bn`"
            notes.append(
                f"`{where}.norm` is {norm}, which keeps the statistics of weights, and there are none: "
                f"nothing is normalised, and little or nothing will be learned; {cure}"
            )
    return notes


def _batch(train: Train, ranks: int, what: str) -> tuple[list[Problem], list[str]]:
    batch, parts = train.data.batch, train.schedule.accumulate
    if batch % (ranks * parts):
        by = f"{ranks} {what}s" + (f" x {parts} parts (train.schedule.accumulate)" if parts > 1 else "")
        message = f"`train.data.batch` {batch} cannot be shared out evenly to {by}"
        return [{"loc": ["train", "data", "batch"], "message": message, "kind": "recipe"}], []
    share = batch // ranks
    note = f"{share} image{'s' * (share != 1)} per {what}, batch {batch}"
    if parts > 1:
        note += f", worked off {share // parts} at a time"
    return [], [note]


def _epochs(train: Train, images: int) -> list[str]:
    if not images:
        return []
    iterations = train.schedule.scaled(train.data.batch).iterations
    epochs = iterations * train.data.batch / images
    return [f"{iterations} iterations are {epochs:.1f} epochs of {images} images"]


def _data_set(train: Train, split: str) -> tuple[list[Problem], int]:
    """Problems with a split, and how many images with objects it has (0: not counted)."""
    data, where = train.data, ["train", "data", split]
    paths: Split = getattr(data, split)

    def machine(key: str, message: str) -> tuple[list[Problem], int]:
        return [{"loc": [*where, key], "message": message, "kind": "machine"}], 0

    images, annotations = data.path(paths.images), data.path(paths.annotations)
    if not data.path("").is_dir():
        if split == "val":
            return [], 0  # said once, for `train`
        message = f"the data set's folder {data.path('')} does not exist"
        return [{"loc": ["train", "data", "root"], "message": message, "kind": "machine"}], 0
    if not images.is_dir():
        return machine("images", f"the folder of images {images} does not exist")
    if not annotations.is_file():
        return machine("annotations", f"the annotation file {annotations} does not exist")
    try:
        classes, files = _look_into(annotations)
    except (InputError, OSError) as error:
        return machine("annotations", str(error))
    if classes != train.model.num_classes:
        have = f"{annotations} has {classes} categories"
        message = f"`train.model.num_classes` is {train.model.num_classes}, but {have}"
        return [{"loc": ["train", "model", "num_classes"], "message": message, "kind": "recipe"}], 0
    if files and not (images / files[0]).is_file():  # the others are missed when their turn comes
        return machine("images", f"the image {images / files[0]} does not exist, and {annotations} names it")
    return [], len(files)


def _comes(train: Train, split: str, fetched: list[Path]) -> bool:
    """Whether files of a split are among what will be fetched."""
    paths: Split = getattr(train.data, split)
    own = [Path.cwd() / train.data.path(path) for path in (paths.images, paths.annotations)]
    return any(path.is_relative_to(folder) for path in own for folder in fetched)


def _look_into(path: Path) -> tuple[int, list[str]]:
    """Number of categories in a COCO file, and its images with objects (none: too large to list).

    Raises InputError."""
    if path.stat().st_size > LARGE:
        return _categories(path), []
    read = read_annotations(path)
    files = [image.file for image in read.with_objects().values()]
    if not files:
        raise InputError(f"{path} has no image with an object")
    return len(read.categories), files


def _categories(path: Path) -> int:
    """Number of categories, without reading all of the file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            start = text.rfind(b'"categories"')
            if start < 0:
                raise ValueError("it has no list `categories`")
            rest = text[start + len('"categories"') : start + LARGE].decode(errors="replace")
            categories, _ = json.JSONDecoder().raw_decode(rest.lstrip(": \t\r\n"))
            return len({category["id"] for category in categories})
    except OSError as error:
        raise InputError(f"annotation file {path} cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a COCO annotation file: {error}") from None


def _weights(train: Train) -> list[Problem]:
    backbone = train.model.backbone
    if backbone.weights is None:
        return []
    name, source = backbone.weights, CATALOGUE.get(backbone.weights)
    message, kind = fetch.problem(name), "machine"
    if source and source.backbone != backbone.name:
        message, kind = f"{name} are weights of {source.backbone}, not {backbone.name}", "recipe"
    elif source and source.style and source.style != backbone.style:
        message, kind = f"{name} are weights of style {source.style}, not {backbone.style}", "recipe"
    where = ["train", "model", "backbone", "weights"]
    return [{"loc": where, "message": message, "kind": kind}] if message else []


def main() -> None:
    if sys.argv[1:] != ["--check"]:
        print("usage: python -m detcore.config --check < {train, resources} as JSON", file=sys.stderr)
        sys.exit(2)
    try:
        document = json.load(sys.stdin)
    except ValueError as error:
        print(f"error: stdin does not hold JSON ({error})", file=sys.stderr)
        sys.exit(2)
    json.dump(check(document), sys.stdout)
    print()
