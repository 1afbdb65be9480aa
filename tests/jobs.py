"""Real runs for the tests at the top: the command line, four gloo workers, a tiny YOLOF on drawn shapes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = [sys.executable, "-m", "launcher.cli"]
STEPS = 80
# Small enough for seconds, and still all of it: four ranks, batch norm, warm-up, augmentation, evaluation.
TINY = [
    "train.model.backbone.width=0.125",
    "train.model.encoder.channels=32",
    "train.model.encoder.mid_channels=16",
    "train.data.batch=8",
    "train.data.augment.short=[64]",
    "train.data.augment.max=64",
    "train.data.test.short=64",
    "train.data.test.max=64",
    f"train.schedule.iterations={STEPS}",
    "train.schedule.warmup.iterations=5",
    "train.log_every=5",
    "checkpoint.every=10it",
    "mirror.every=1s",
    "restart.backoff=0.2s",
]


def launch(
    *argv: str, env: Mapping[str, str] | None = None, check: bool = True, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """One call of the command line; a status other than 0 fails the test with what it printed."""
    done = subprocess.run(
        [*LAUNCH, *argv], cwd=cwd, env=os.environ | (env or {}), capture_output=True, text=True, timeout=240
    )
    if check:
        assert done.returncode == 0, (
            f"launch {' '.join(argv)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
    return done


def start(data: Path, *argv: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Start the tiny recipe on four workers."""
    recipe = ["recipes/yolof_shapes.yaml", "--gpus", "4", *TINY, f"train.data.root={data}"]
    return launch(*recipe, *argv, env=env)


def only_run(root: Path) -> Path:
    """The folder of the one run there is."""
    runs = [folder for folder in root.iterdir() if (folder / "run.json").exists()]
    assert len(runs) == 1, runs
    return runs[0]


def read(path: Path) -> dict[str, object]:
    return json.loads(path.read_text()) if path.exists() else {}


def attempts(run: Path, event: str = "end") -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def at_step(run: Path, step: int, after_attempt: int = 0) -> Callable[[], bool]:
    """Whether the run has come to `step`, in an attempt later than `after_attempt`."""

    def reached() -> bool:
        beat = read(run / "heartbeat.json")
        return bool(beat) and beat["fence"] > after_attempt and (beat["step"] or 0) >= step  # type: ignore[operator]

    return reached


def processes_of(run: Path) -> list[psutil.Process]:
    """Every live process that carries the run's id in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.status() != psutil.STATUS_ZOMBIE
                and process.environ().get("LAUNCH_RUN_ID") == run.name
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def final_state(run: Path) -> dict[str, object]:
    """All that training ends with: weights, optimizer and the rest of the newest checkpoint."""
    newest = max(
        (run / "checkpoints").glob("step-*"), key=lambda folder: read(folder / "manifest.json")["step"]
    )
    files = sorted(newest.glob("*.pth"))
    return {file.name: torch.load(file, weights_only=True) for file in files}


def assert_same(a: object, b: object, where: str = "state") -> None:
    """Equal bit for bit, tensors and all."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert isinstance(b, list | tuple) and len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert a == b, where
