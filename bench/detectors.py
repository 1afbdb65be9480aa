"""A training step of the detectors beside torchvision's, in turn in one process, on two threads; and the peak
of memory of each alone.

RetinaNet and FCOS (detectron2's, which is what torchvision has) on ResNet-50 with frozen batch norm, the last
three stages trained, 80 classes, the same images and boxes for both; SGD. A step is bytes to changed weights;
torchvision gets floats ready made, and does not resize. First ours has `channels_last: true`, as the recipes
for CPUs have (recipes/_base/bccd.yaml), and torchvision's is as its script makes it; then the layout of
memory is the same for both, one and the other. SSDLite stands beside torchvision's, which is on
MobileNetV3-Large, for orientation.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import beside
from bench.measure import Result, in_turn, show, summary
from detcore.config import Train
from detcore.data.feed import Inputs
from detcore.distributed import World
from detcore.learner import Learner
from detcore.ops.targets import Targets

CLASSES, OBJECTS, THREADS = 80, 7, 2
SMALL = (256, 320)  # height and width
MODELS: dict[str, dict[str, Any]] = {
    "retinanet": {"name": "retinanet"},
    "fcos": {"name": "fcos", "style": "detectron2", "test": {"score": 0.2, "nms": 0.6}},
}
SSDLITE = {"name": "ssdlite", "backbone": {"name": "mobilenetv2", "norm": "bn"}}
RESNET = {"name": "resnet50", "style": "torchvision", "norm": "frozen_bn", "freeze": 2}

CPU = torch.device("cpu")

Seconds = Callable[[], float]


def main() -> list[Result]:
    torch.set_num_threads(THREADS)
    folder = str(beside.bring())
    return [*(measure for name in MODELS for measure in (memory(name, folder), *steps(name))), ssdlite()]


def batch(count: int, size: tuple[int, int]) -> Inputs:
    """Noise with boxes on it, a fifth to a half as large as the image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)
    whole = torch.tensor([size[1], size[0]])
    sides = (0.2 + 0.3 * torch.rand(count, OBJECTS, 2, generator=generator)) * whole
    corners = torch.rand(count, OBJECTS, 2, generator=generator) * (whole - sides)
    labels = torch.randint(0, CLASSES, (count, OBJECTS), generator=generator)
    boxes = torch.cat([corners, corners + sides], dim=-1)
    return Inputs(images, torch.tensor([size] * count), Targets(boxes, labels))


def learner(section: dict[str, Any], device: torch.device = CPU, **train: Any) -> Learner:
    """As a recipe makes it, with a learning rate that changes next to nothing."""
    split = {"images": "", "annotations": ""}
    model = {"num_classes": CLASSES, "backbone": RESNET} | section
    cfg = Train.model_validate(
        {
            "model": model,
            "data": {"root": "", "train": split, "val": split, "batch": 1},
            "schedule": {"iterations": 1000, "optimizer": {"lr": 1e-9}},
            **train,
        }
    )
    return Learner(cfg, World(0, 1, device), pretrained=False)


def our_step(section: dict[str, Any], inputs: Inputs, **train: Any) -> Seconds:
    trained = learner(section, **train)
    return timed(lambda: trained.step(1, [inputs]))


def their_step(model: torch.nn.Module, inputs: Inputs) -> Seconds:
    """As torchvision's own training script has it (references/detection/engine.py)."""
    images = [image.float() / 255 for image in inputs.images]
    targets = their_targets(inputs.targets)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-9, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        loss = sum(model(images, targets).values())
        loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return timed(step)


def their_targets(targets: Targets) -> list[dict[str, Tensor]]:
    pairs = zip(targets.boxes, targets.labels, strict=True)
    return [{"boxes": boxes, "labels": labels} for boxes, labels in pairs]


def timed(work: Callable[[], Any]) -> Seconds:
    def seconds() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return seconds


def steps(name: str) -> Iterator[Result]:
    inputs = batch(2, SMALL)
    last, first = (our_step(MODELS[name], inputs, channels_last=on) for on in (True, False))
    theirs = their_step(beside.build(name, CLASSES, SMALL).train(), inputs)
    other = beside.build(name, CLASSES, SMALL).train().to(memory_format=torch.channels_last)
    theirs_last = their_step(other, inputs)
    what = f"{name}: a training step, 2 images of {SMALL[1]}x{SMALL[0]}"
    yield in_turn(what, "<= 0.95", ("detcore", last), ("torchvision", theirs))
    yield in_turn(f"{what}, both channels first", "<= 1", ("detcore", first), ("torchvision", theirs))
    yield in_turn(f"{what}, both channels last", "<= 1", ("detcore", last), ("torchvision", theirs_last))


def ssdlite() -> Result:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    inputs = batch(8, (320, 320))
    theirs = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES + 1, _skip_resize=True
    )
    ours, beside_it = our_step(SSDLITE, inputs), their_step(theirs.train(), inputs)
    return in_turn(
        "ssdlite: training, 8 images of 320x320, for orientation",
        ">= 0",
        ("detcore, MobileNetV2", lambda: 8 / ours()),
        ("torchvision, MobileNetV3-Large", lambda: 8 / beside_it()),
        unit="images/s",
    )


def memory(name: str, folder: str) -> Result:
    """Each side in processes of its own."""
    seen = [tuple(peak_of(side, name, folder) for side in ("detcore", "torchvision")) for _ in range(3)]
    what = f"{name}: peak memory of training, 2 images of {SMALL[1]}x{SMALL[0]}"
    return summary(what, "<= 1", ("detcore", "torchvision"), seen, "MB")


def peak_of(side: str, name: str, folder: str) -> float:
    argv = [sys.executable, "-m", "bench.detectors", "--peak", side, name, folder]
    return float(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


def peak(side: str, name: str, folder: str) -> float:
    """MB at the most, beyond what there was with all imported, in three steps."""
    torch.set_num_threads(THREADS)
    beside.bring(Path(folder))
    import torchvision.models.detection  # noqa: F401

    before, inputs = memory_of("VmRSS"), batch(2, SMALL)
    if side == "detcore":
        step = our_step(MODELS[name], inputs)
    else:
        step = their_step(beside.build(name, CLASSES, SMALL).train(), inputs)
    for _ in range(3):
        step()
    return memory_of("VmHWM") - before


def memory_of(field: str) -> float:
    """MB that this process has (VmRSS) or had at the most (VmHWM), proc(5). getrusage(2) would tell the peak
    of the process that started this one, if that is larger."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if field in line)
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(peak(*sys.argv[2:]))
    else:
        show(main())
