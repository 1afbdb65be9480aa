"""A tiny data set and a tiny recipe for detcore's tests, and real processes that train from them."""

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from torch import Tensor

from detcore.checkpoint import save
from detcore.config import Train
from detcore.config.models import Model
from detcore.data.shapes import write_split
from detcore.models import build_model
from detcore.ops.targets import Targets
from detcore.rundir import RunDir

TINY: dict[str, Any] = {
    "seed": 3,
    "log_every": 1,
    "model": {
        "name": "yolof",
        "num_classes": 3,
        "backbone": {"name": "resnet18", "norm": "bn", "width": 0.125, "freeze": 1},
        "encoder": {"channels": 32, "mid_channels": 16, "dilations": [1, 2]},
        "decoder": {"cls_convs": 1, "reg_convs": 1},
        "anchors": [16, 32],
    },
    "data": {
        "root": "",
        "train": {"images": "train", "annotations": "annotations/instances_train.json"},
        "val": {"images": "val", "annotations": "annotations/instances_val.json"},
        "batch": 8,
        "workers": 1,
        "augment": {
            "short": [48, 64],
            "max": 64,
            "flip": 0.5,
            "shift": {"pixels": 8, "p": 0.5},
            "photometric": True,
        },
        "test": {"short": 64, "max": 64},
    },
    "schedule": {
        "iterations": 24,
        "optimizer": {"lr": 0.02, "clip": 10.0},
        "warmup": {"iterations": 6, "factor": 0.01},
        "steps": [16, 20],
    },
    "evaluation": {"every": 9},
}


def model_section(section: dict[str, Any]) -> Any:
    """`train.model` as a recipe would have it, checked."""
    return TypeAdapter(Model).validate_python(section)


def pad_targets(boxes: list[Tensor], labels: list[Tensor]) -> Targets:
    """Per-image boxes (G_i, 4) and labels (G_i,) as one padded batch."""
    size = max((len(one) for one in labels), default=0)
    targets = Targets(torch.zeros(len(boxes), size, 4), torch.full((len(boxes), size), -1))
    for i, (b, c) in enumerate(zip(boxes, labels, strict=True)):
        targets.boxes[i, : len(c)] = b
        targets.labels[i, : len(c)] = c
    return targets


def batch(count: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Targets]:
    """Images of which the second has no object, and the others one and two."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 128, 160), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[128, 160], [100, 150], [90, 120]])[:count]
    boxes = [[[10.0, 10, 70, 60], [30, 40, 149, 99]], [], [[5, 5, 88, 80]]]
    labels = [[0, 2], [], [1]]
    targets = pad_targets(
        [torch.tensor(b).reshape(-1, 4) for b in boxes[:count]],
        [torch.tensor(c, dtype=torch.int64) for c in labels[:count]],
    )
    return images, sizes, targets


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images to train on and 12 to evaluate on, of 64 pixels."""
    folder = tmp_path_factory.mktemp("shapes")
    write_split(folder, "train", 24, 64, seed=5)
    write_split(folder, "val", 12, 64, seed=5)
    return folder


@pytest.fixture
def tiny(shapes: Path) -> dict[str, Any]:
    """The `train` section of a recipe that takes seconds; change it as you like."""
    train = copy.deepcopy(TINY)
    train["data"]["root"] = str(shapes)
    return train


class Run:
    """A run folder and the processes that work on it, started as a launcher starts them."""

    def __init__(self, folder: Path, train: dict[str, Any], every: str = "5it", keep: int = 3) -> None:
        self.folder, self.attempt = folder, 0
        self.env = {"LAUNCH_CHECKPOINT_EVERY": every, "LAUNCH_CHECKPOINT_KEEP": str(keep)}
        folder.mkdir()
        (folder / "recipe.yaml").write_text(yaml.safe_dump({"train": train}))

    def start(self, ranks: int, module: str = "detcore.train") -> subprocess.Popen[str]:
        """The next attempt: one process with ranks == 1, torchrun otherwise."""
        self.attempt += 1
        program = ["-m", module]
        if ranks > 1:
            program = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *program]
        own = {"LAUNCH_RUN_DIR": str(self.folder), "LAUNCH_ATTEMPT": str(self.attempt)}
        usual = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        with (self.folder / f"log-{self.attempt}.txt").open("w") as log:
            return subprocess.Popen(
                [sys.executable, *program],
                env=os.environ | usual | self.env | own,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def finish(self, ranks: int) -> "Run":
        """An attempt that is left alone, to its end."""
        process = self.start(ranks)
        assert process.wait(timeout=240) == 0, self.log()
        assert self.read("outcome.json")["state"] == "finished", self.log()
        return self

    def log(self) -> str:
        return (self.folder / f"log-{self.attempt}.txt").read_text()

    def read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else {}

    def metrics(self) -> bytes:
        path = self.folder / "metrics.jsonl"
        return path.read_bytes() if path.exists() else b""

    def reached(self, step: int) -> Callable[[], bool]:
        return lambda: f'"step": {step},'.encode() in self.metrics()

    def phase(self, name: str) -> Callable[[], bool]:
        """Whether this attempt is in the phase."""

        def entered() -> bool:
            beat = self.read("heartbeat.json")
            return beat.get("fence") == self.attempt and beat["phase"] == name

        return entered

    def wait(self, check: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 180
        while not check():
            assert process.poll() is None, f"ended too early\n{self.log()}"
            assert time.monotonic() < deadline, f"waited for too long\n{self.log()}"
            time.sleep(0.01)

    def final(self) -> dict[str, Any]:
        """All that the newest checkpoint holds."""
        newest = max((self.folder / "checkpoints").glob("step-*"), key=lambda path: path.name)
        return {file.name: torch.load(file, weights_only=True) for file in sorted(newest.glob("*.pth"))}


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal bit for bit, tensors and all."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert a == b, where


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """A GPU; tests that need one are skipped without."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Run]:
    """new_run(name, train, every=..., keep=...) -> Run"""

    def make(name: str, train: dict[str, Any], **policy: Any) -> Run:
        return Run(tmp_path / name, train, **policy)

    return make


@pytest.fixture
def trained(tiny: dict[str, Any], new_run: Callable[..., Run]) -> Run:
    """A run with weights that detect something, anything."""
    torch.manual_seed(0)
    tiny["data"]["workers"] = 0
    tiny["model"]["test"] = {"score": 0.001, "max": 20}
    run = new_run("trained", tiny)
    model = build_model(Train.model_validate(tiny).model, pretrained=False)
    save(RunDir(run.folder), 5, {"classes": ["disc", "square", "triangle"]}, model.state_dict(), lambda: None)
    return run
