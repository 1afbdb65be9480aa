"""Images per second of training on one GPU beside torchvision's detectors: as shipped (float32, two images a
step), and both in bfloat16 with channels_last and the same batch, ours compiled. How many images the loader
gives alone is printed: 640x480 JPEGs, as large as COCO's.

Nothing is measured where there is no GPU. The aims are estimates, written down before anything was measured.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench import beside
from bench.detectors import CLASSES, MODELS, batch, learner, their_targets
from bench.heads import WHOLE
from bench.measure import Result, in_turn, show, table
from detcore.config import Train
from detcore.data.coco import read_coco
from detcore.data.feed import Feed, Inputs
from detcore.distributed import World

SHIPPED, FULL = 2, 16  # images in a step
STEPS, PAIRS = 10, 5  # in one measurement; measurements
FAST = {"amp": "bf16", "channels_last": True, "compile": True}

Rate = Callable[[], float]


def main() -> list[Result]:
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing is measured", file=sys.stderr)
        return []
    print(f"the loader alone: {loading():.0f} images/s with {os.cpu_count()} workers", file=sys.stderr)
    beside.bring()
    return [result for name in MODELS for result in compared(name)]


def compared(name: str) -> Iterator[Result]:
    def against(what: str, bound: str, ours: Rate, theirs: Rate) -> Result:
        sides = ("detcore", ours), ("torchvision", theirs)
        result = in_turn(f"{name}: {what}", bound, *sides, unit="images/s", pairs=PAIRS)
        print(table([result]).splitlines()[-1], file=sys.stderr)
        return result

    shipped = rate(their_step(name, SHIPPED), SHIPPED)
    plain = rate(our_step(name, SHIPPED), SHIPPED)
    yield against(f"both in float32, {SHIPPED} images a step", ">= 1", plain, shipped)
    best = rate(our_step(name, FULL, **FAST), FULL)
    yield against("our best beside theirs as shipped", ">= 4", best, shipped)
    equal = rate(their_step(name, FULL, fast=True), FULL)
    yield against(f"both in bfloat16, channels_last, {FULL} images a step", ">= 1.5", best, equal)


def rate(step: Callable[[], None], images: int) -> Rate:
    for _ in range(3):
        step()

    def images_per_second() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
        return STEPS * images / (time.perf_counter() - began)

    return images_per_second


def our_step(name: str, count: int, **train: object) -> Callable[[], None]:
    device = torch.device("cuda")
    inputs = batch(count, WHOLE)
    images = inputs.images.to(device)
    if train.get("channels_last"):
        images = images.contiguous(memory_format=torch.channels_last)
    there = Inputs(images, inputs.sizes.to(device), inputs.targets.map(lambda t: t.to(device)))
    trained = learner(MODELS[name], device, **train)
    return lambda: trained.step(1, [there])


def their_step(name: str, count: int, fast: bool = False) -> Callable[[], None]:
    """As torchvision's own training script has it (references/detection/engine.py)."""
    inputs = batch(count, WHOLE)
    model = beside.build(name, CLASSES, WHOLE).cuda().train()
    images = [image.cuda().float() / 255 for image in inputs.images]
    if fast:
        model = model.to(memory_format=torch.channels_last)
    targets = their_targets(inputs.targets.map(torch.Tensor.cuda))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-9, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=fast):
            loss = sum(model(images, targets).values())
        loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def loading(images: int = 64, seconds: float = 10.0) -> float:
    """Images per second that detcore's loader gives, decoded, resized to COCO's size and flipped."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), images)
        split = {"images": "", "annotations": "train.json"}
        model = {"num_classes": 1, "backbone": {"name": "resnet50"}, **MODELS["retinanet"]}
        data = {"root": folder, "train": split, "val": split, "batch": 16, "workers": os.cpu_count()}
        schedule = {"iterations": 1_000_000, "optimizer": {"lr": 1.0}}
        cfg = Train.model_validate({"model": model, "data": data, "schedule": schedule})
        coco = read_coco(Path(folder), Path(folder, "train.json"), training=True)
        feed = Feed(cfg, coco, World(0, 1, torch.device("cpu")), 0)
        for step in range(1, 20):  # the workers start
            list(feed.step(step))
        began, first = time.perf_counter(), step
        while time.perf_counter() - began < seconds:
            step += 1
            list(feed.step(step))
        return (step - first) * 16 / (time.perf_counter() - began)


def write(folder: Path, count: int) -> None:
    """Smooth noise, which compresses as photographs do, with a box in each."""
    draw = np.random.default_rng(0)
    entries = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(count)]
    for entry in entries:
        coarse = Image.fromarray(draw.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / entry["file_name"], quality=90)
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [90, 80, 200, 150]} for i in range(count)]
    content = {"images": entries, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "train.json").write_text(json.dumps(content))


if __name__ == "__main__":
    show(main())
