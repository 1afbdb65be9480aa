"""A run from Slurm goes on in tmux with half the workers: same batches, same images, same schedule."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.rundir import read_jsonl
from tests import jobs
from tests.lab import Settings
from tests.launcher.on_slurm import cluster
from tests.launcher.progress import wait

STEPS, STOP = 24, 4
# A line for every step; statistics over the whole batch, so that the number of workers changes no more than
# the order of sums; steps so small that such a difference never makes another anchor the best one. Then the
# loss of a step tells which images it saw.
TOLD = ["train.model.norm=sync_bn", "train.model.backbone.norm=sync_bn", "train.data.workers=0"]
TOLD += ["train.log_every=1", f"train.schedule.iterations={STEPS}", "train.schedule.optimizer.lr=1e-5"]
ROUNDING = 1e-4  # of the loss


def test_half_the_workers_go_on_with_the_same_batches(tmp_path: Path) -> None:
    data, calm = tmp_path / "shapes", tmp_path / "calm"
    sizes = ["--train", "32", "--val", "8", "--size", "64"]
    subprocess.run([sys.executable, "-m", "detcore.data.shapes", str(data), *sizes], check=True)
    jobs.start(data, *TOLD, "--gpus", "1", "--backend", "local", env={"LAUNCH_RUNS": str(calm)})
    with cluster(Settings()):
        jobs.start(data, *TOLD, "--backend", "slurm")
        run = jobs.only_run(tmp_path / "runs")
        wait(f"step {STOP}", jobs.at_step(run, STOP))
        jobs.launch("stop", run.name)
    jobs.launch("resume", run.name, "--backend", "tmux", "--gpus", "2")
    wait("the end", lambda: jobs.read(run / "final.json").get("state") == "finished")

    ends, starts = jobs.attempts(run), jobs.attempts(run, "start")
    assert [(start["backend"], start["gpus"]) for start in starts] == [("slurm", 4), ("tmux", 2)]
    assert [end["state"] for end in ends] == ["stopped", "finished"]
    assert ends[1]["resumed"] == ends[0]["step"], "no step is lost"
    assert STEPS - int(str(ends[0]["step"])) > 2, "too few steps are left to compare"
    ours, theirs = (
        [line for line in read_jsonl(folder / "metrics.jsonl") if "lr" in line]
        for folder in (run, jobs.only_run(calm))
    )
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    assert [line["lr"] for line in ours] == [line["lr"] for line in theirs]
    losses = [line["loss"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx(losses, rel=ROUNDING)
    nearest = min(abs(a - b) for a, b in itertools.pairwise(losses))
    assert nearest > ROUNDING * max(losses), "the losses of two steps are too much alike to tell them apart"
