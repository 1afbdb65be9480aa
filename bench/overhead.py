"""What `launch` costs beside bare torchrun on the same recipe: steps per second with the mirror on, and the
time from the command to the first step.

Both sides train recipes/yolof_shapes.yaml on its four workers. The bare side is torchrun on the frozen
recipe: no supervisor, no snapshot, no mirror. Both write the same checkpoints. The store stands for another
machine, so it runs at the lowest priority.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bench.measure import Result, show, summary

BIN = Path(sys.executable).parent
RECIPE = "recipes/yolof_shapes.yaml"
WORKERS, STEPS, PAIRS = 4, 100, 5
SMALLER = [f"train.schedule.iterations={STEPS}", "train.log_every=1", "checkpoint.every=20it"]


def main() -> list[Result]:
    """Both claims, from the same pairs of runs."""
    with tempfile.TemporaryDirectory() as folder, store(Path(folder) / "store") as address:
        root = Path(folder)
        data = root / "shapes"
        subprocess.run(
            [sys.executable, "-m", "detcore.data.shapes", str(data)], check=True, stdout=subprocess.DEVNULL
        )
        recipe = [RECIPE, "--gpus", str(WORKERS), *SMALLER, f"train.data.root={data}"]
        env = os.environ | address | {"OMP_NUM_THREADS": "1", "LAUNCH_RUNS": str(root / "runs")}
        frozen = root / "frozen.yaml"
        frozen.write_bytes(
            subprocess.run(
                [BIN / "launch", *recipe, "--freeze"], check=True, env=env, stdout=subprocess.PIPE
            ).stdout
        )
        seen = []
        for number in range(PAIRS + 1):  # the first pair warms the disk cache and is not counted
            launched = first_step_and_speed(
                [str(BIN / "launch"), *recipe, "--backend", "local", "--name", f"pair{number}"], env, root
            )
            bare = first_step_and_speed(
                torchrun(frozen, root / "bare" / str(number)), env | {"LAUNCH_CHECKPOINT_EVERY": "20it"}, root
            )
            seen.append((launched, bare))
        seen = seen[1:]
    names = ("launch, mirror on", "torchrun")
    return [
        summary("steps per second", ">= 0.97", names, [(a[1], b[1]) for a, b in seen], "steps/s"),
        summary("from the command to the first step", "<= 1.15", names, [(a[0], b[0]) for a, b in seen]),
    ]


def torchrun(recipe: Path, run_dir: Path) -> list[str]:
    program = ["-m", "detcore.train", str(recipe), "--run-dir", str(run_dir)]
    return [str(BIN / "torchrun"), "--nproc-per-node", str(WORKERS), *program]


def first_step_and_speed(argv: list[str], env: Mapping[str, str], root: Path) -> tuple[float, float]:
    """Seconds from the command to the end of the first step, and steps per second between it and the last."""
    before = set(root.glob("*/*/timing.jsonl"))
    began = time.time()  # timing.jsonl has the wall clock of this same machine
    subprocess.run(argv, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (timing,) = set(root.glob("*/*/timing.jsonl")) - before
    lines = [json.loads(line) for line in timing.read_text().splitlines()]
    first, last = lines[0], lines[-1]
    return first["time"] - began, (last["step"] - first["step"]) / (last["time"] - first["time"])


@contextmanager
def store(folder: Path) -> Iterator[dict[str, str]]:
    """A served store, and the variables that lead to it."""
    argv = ["nice", "-n", "19", BIN / "launch", "store", "serve", folder]
    server = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        while not (folder / "env.sh").exists():
            assert server.poll() is None, "the store did not start"
            time.sleep(0.1)
        lines = (folder / "env.sh").read_text().splitlines()
        words = [shlex.split(line) for line in lines if line.startswith("export ")]
        yield dict(word[1].split("=", 1) for word in words)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


if __name__ == "__main__":
    show(main())
