"""What a checkpoint costs the training loop, beside a durable torch.save of the same state: torch.save,
fsync, rename, fsync of the folder.

The state is that of YOLOF with ResNet-50 and SGD's momentum, 352 MB. Stall: the seconds from the call until
all is on the disk, with the steps that are made meanwhile, less what as many steps take undisturbed right
after. So the call counts, and so do the steps that the writing slows down. A step is 20 ms of waiting, as for
a GPU, or of work on one core. Background: from the call until the checkpoint is on the disk, hashes and all.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.measure import Result, show, summary
from detcore.config import Train
from detcore.distributed import World
from detcore.learner import Learner
from detcore.recorder import Recorder
from detcore.rundir import Heartbeat, RunDir
from detcore.saving import Saver, State

SPLIT = {"images": "none", "annotations": "none"}  # no step is made from images
TRAIN = {
    "model": {
        "name": "yolof",
        "num_classes": 80,
        "backbone": {"name": "resnet50", "norm": "frozen_bn", "freeze": 2},
    },
    "data": {"root": "none", "train": SPLIT, "val": SPLIT, "batch": 64},
    "schedule": {"iterations": 22500, "optimizer": {"lr": 0.12}},
}
PAIRS, STEP = 9, 0.02


class Training:
    """All of a training but its data: a state to save, and a loop of steps that saves it."""

    def __init__(self, cfg: Train, folder: Path, step: Callable[[], object]) -> None:
        world, run = World(0, 1, torch.device("cpu")), RunDir(folder, keep=1)
        folder.mkdir()
        self.one_step, self.latest = step, run.checkpoints / "latest.json"
        self.recorder = Recorder(cfg, run, world, Heartbeat(run, active=True))
        self.recorder.say = lambda line: None
        self.recorder.begin(0, 0)
        self.learner = Learner(cfg, world, pretrained=False)
        self.saver = Saver(run, world, self.recorder, self.learner.optimizer, saved=None)
        self.saves = 0
        self.saver.warm(*self.state())

    def state(self) -> tuple[State, State]:
        training = self.learner.state_dict() | {"step": self.saves, "mean": self.recorder.mean.state_dict()}
        return training, self.learner.model.state_dict()

    def steps(self, count: int) -> float:
        """Seconds that `count` undisturbed steps take."""
        began = time.perf_counter()
        for _ in range(count):
            self.saver.look()
            self.one_step()
        return time.perf_counter() - began

    def save(self) -> tuple[float, float]:
        """Seconds that a checkpoint holds the loop up for, and those until it is on the disk."""
        self.saves += 1
        os.sync()  # what was written before is not to be waited for here
        began, clock, done = time.perf_counter(), time.time(), 0
        self.saver.begin(self.saves, *self.state())
        while self.saver.saved != self.saves:
            done += 1
            self.steps(1)
        disturbed = time.perf_counter() - began
        written = self.latest.stat().st_mtime - clock
        return disturbed - self.steps(done), written

    def durable(self, path: Path) -> float:
        """Seconds that torch.save of the same state takes, until it is on the disk."""
        training, model = self.state()
        os.sync()
        began = time.perf_counter()
        with path.open("wb") as file:
            torch.save({"training": training, "model": model}, file)
            file.flush()
            os.fsync(file.fileno())
        path.rename(path.with_suffix(".pth"))
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        took = time.perf_counter() - began
        os.close(folder)
        path.with_suffix(".pth").unlink()
        return took


def main() -> list[Result]:
    torch.set_num_threads(1)
    cfg = Train.model_validate(TRAIN)
    with tempfile.TemporaryDirectory() as folder:
        loops = {
            "steps that wait": Training(cfg, Path(folder) / "wait", lambda: time.sleep(STEP)),
            "steps that compute": Training(cfg, Path(folder) / "compute", work()),
        }
        results = []
        for name, training in loops.items():
            training.save(), training.durable(Path(folder) / "durable")
            seen = []
            for _ in range(PAIRS):
                stall, written = training.save()
                seen.append((stall, written, training.durable(Path(folder) / "durable")))
            sides = f"stall, {name}", "durable torch.save"
            results.append(summary("a checkpoint's stall", "<= 0.15", sides, [(a, c) for a, _, c in seen]))
            sides = f"background, {name}", "durable torch.save"
            results.append(summary("a checkpoint's write", "<= 1.5", sides, [(b, c) for _, b, c in seen]))
    return results


def work() -> Callable[[], object]:
    """About STEP seconds of work on one core."""
    square = torch.randn(512, 512)
    began = time.perf_counter()
    for _ in range(20):
        square @ square
    count = max(1, round(STEP / ((time.perf_counter() - began) / 20)))
    return lambda: [square @ square for _ in range(count)]


if __name__ == "__main__":
    show(main())
