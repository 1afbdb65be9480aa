"""`launch status` with 1,000 jobs in Slurm's queue, twenty of them runs of ours: it asks once."""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.measure import Result, in_turn, show, wall
from tests.lab import Lab, Settings

LAUNCH = Path(sys.executable).parent / "launch"
JOBS, RUNS = 1000, 20


def main() -> list[Result]:
    with Lab(Settings()) as lab, tempfile.TemporaryDirectory() as folder:
        env = os.environ | lab.env | {"LAUNCH_RUNS": folder, "HOME": folder}
        names = [f"run-20260101-{number:06d}-{number:04x}" for number in range(RUNS)]
        for name in names:
            make(Path(folder, name))
        others = [f"other-{number}" for number in range(JOBS - RUNS)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda name: submit(lab, name), [*names, *others]))
        shown = subprocess.run([LAUNCH, "status"], env=env, capture_output=True, text=True, check=True)
        assert shown.stdout.count("queued") == RUNS, shown.stdout
        squeue, status, usage = ["squeue"], [str(LAUNCH), "status"], [str(LAUNCH), "--help"]
        return [
            in_turn(
                f"`launch status` with {JOBS:,} jobs in the queue",
                "<= 2",
                ("launch status", lambda: wall(status, env=env)),
                ("squeue + launch --help", lambda: wall(squeue, env=env) + wall(usage, env=env)),
            )
        ]


def make(run: Path) -> None:
    run.mkdir()
    record = {"id": run.name, "name": "run", "backend": "slurm", "created": time.time()}
    (run / "run.json").write_text(json.dumps(record | {"resources": {"gpus": 8}}))
    (run / "jobs.jsonl").write_text('{"job": "1"}\n')


def submit(lab: Lab, name: str) -> None:
    lab.call("sbatch", "--hold", f"--job-name={name}", "-o", os.devnull, "--wrap=true", check=True)


if __name__ == "__main__":
    show(main())
