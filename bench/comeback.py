"""How soon a preempted run trains again, from the moment its resources are free: `launch` on Slurm, beside a
bare `sbatch` of torchrun from its start to its first step; and beside stock submitit (checkpoint and requeue)
and a plain `scontrol requeue`, which Slurm holds back.

All on one lab (tests/lab.py, two pretend nodes) with recipes/yolof_shapes.yaml on four workers. The moment
is the last instruction of the job that preempted it; with `scontrol requeue`, when the job is pending again.
"""

import contextlib
import getpass
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import submitit
from submitit.helpers import DelayedSubmission

from bench.measure import Result, show, summary
from bench.overhead import BIN, RECIPE, torchrun
from tests.lab import Lab, Settings

WORKERS, PAIRS = 4, 3
SMALLER = ["train.schedule.iterations=4000", "train.log_every=1", "checkpoint.every=10it"]
TASK = ["srun", "--ntasks=1", f"--cpus-per-task={WORKERS}", "--cpu-bind=none"]
PATIENCE = 300.0  # seconds


@dataclass(frozen=True)
class Site:
    """A lab, and what the sides share on it."""

    lab: Lab
    root: Path
    recipe: list[str]
    frozen: Path
    env: Mapping[str, str]

    def batch(self, run: Path, *options: str) -> str:
        """Submit bare torchrun; the id of the job, which writes down when it starts."""
        begun = f"date +%s.%N > {shlex.quote(str(run.with_suffix('.start')))}"
        script = f"{begun}\n{shlex.join([*TASK, *torchrun(self.frozen, run)])}"
        named = ["--requeue", "-o", os.devnull, f"--cpus-per-task={WORKERS}", *options]
        return self.lab.call("sbatch", "--parsable", *named, f"--wrap={script}", check=True)

    def preempt(self, meanwhile: Callable[[], object] = lambda: None) -> float:
        """Take the whole cluster for three seconds; when it was free again."""
        free = self.root / f"free-{next(NUMBERS)}"
        script = f"sleep 3; date +%s.%N > {shlex.quote(str(free))}"
        urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "-o", os.devnull]
        self.lab.call("sbatch", *urgent, f"--wrap={script}", check=True)
        meanwhile()
        return float(eventually(lambda: free.exists() and free.read_text().strip()))

    def clear(self) -> None:
        """Cancel what runs, and wait until it is gone."""
        self.lab.call("scancel", f"--user={getpass.getuser()}")
        eventually(lambda: not self.lab.call("squeue", "--noheader"))


NUMBERS = itertools.count()
T = TypeVar("T")


class Stock:
    """What submitit's documentation shows for a command: run it, and requeue it when it is preempted."""

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv

    def __call__(self) -> int:
        return subprocess.run(self.argv).returncode

    def checkpoint(self) -> DelayedSubmission:
        return DelayedSubmission(self)


def main() -> list[Result]:
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(Settings(user_signal=True)))
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        os.environ |= lab.env
        site = prepare(lab, Path(folder))
        seen = [(launched(site, n), bare(site, n), queued(site, n)) for n in range(PAIRS + 1)][1:]
        ours = min(row[0] for row in seen)
        stock, requeued = stock_submitit(site), plain_requeue(site)
    claim = "from free resources to the first new step"
    return [
        summary(claim, "<= 1.2", ("launch", "bare sbatch, from its start"), [row[:2] for row in seen]),
        summary(claim, "<= 1.2", ("launch", "bare sbatch in the queue"), [(a, c) for a, _, c in seen]),
        summary(f"{claim}, beside stock submitit", "<= 0.1", ("launch", "submitit"), [(ours, stock)]),
        summary(f"{claim}, beside a requeue", "<= 0.1", ("launch", "scontrol requeue"), [(ours, requeued)]),
    ]


def prepare(lab: Lab, root: Path) -> Site:
    data = root / "shapes"
    make = [sys.executable, "-m", "detcore.data.shapes", str(data)]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    recipe = [RECIPE, "--gpus", str(WORKERS), *SMALLER, f"train.data.root={data}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "LAUNCH_RUNS": str(root / "runs")}
    frozen = root / "frozen.yaml"
    told = subprocess.run([BIN / "launch", *recipe, "--freeze"], check=True, env=env, stdout=subprocess.PIPE)
    frozen.write_bytes(told.stdout)
    os.environ |= {"OMP_NUM_THREADS": "1", "LAUNCH_CHECKPOINT_EVERY": "10it"}
    return Site(lab, root, recipe, frozen, env)


def launched(site: Site, number: int) -> float:
    argv = [BIN / "launch", *site.recipe, "--backend", "slurm", "--name", f"pair{number}"]
    subprocess.run(argv, check=True, env=site.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (run,) = (site.root / "runs").glob(f"pair{number}-*")
    stepped(run, 0.0)
    free = site.preempt()
    seconds = stepped(run, free) - free
    argv = [BIN / "launch", "stop", run.name]
    subprocess.run(argv, check=True, env=site.env, stdout=subprocess.DEVNULL)
    return seconds


def bare(site: Site, number: int) -> float:
    run = site.root / f"bare-{number}"
    site.batch(run)
    first = stepped(run, 0.0)
    site.clear()
    return first - float(run.with_suffix(".start").read_text())


def queued(site: Site, number: int) -> float:
    """Bare torchrun that waits for the same resources: what Slurm's scheduler takes is in both sides."""
    run = site.root / f"queued-{number}"
    free = site.preempt(lambda: site.batch(run))
    seconds = stepped(run, free) - free
    site.clear()
    return seconds


def stock_submitit(site: Site) -> float:
    run = site.root / "stock"
    executor = submitit.SlurmExecutor(folder=site.root / "submitit")
    executor.update_parameters(time=30, cpus_per_task=WORKERS, signal_delay_s=90)
    job = executor.submit(Stock(torchrun(site.frozen, run)))
    stepped(run, 0.0)
    free = site.preempt()
    left = kill_orphans(run)
    print(f"stock submitit left {left} processes on the node it had handed over", flush=True)
    seconds = stepped(run, free) - free
    site.lab.call("scancel", job.job_id)
    return seconds


def plain_requeue(site: Site) -> float:
    run = site.root / "requeue"
    job = site.batch(run)
    stepped(run, 0.0)
    site.lab.call("scontrol", "requeue", job, check=True)
    eventually(lambda: site.lab.call("squeue", "--noheader", f"--jobs={job}", "--format=%T") == "PENDING")
    free = time.time()
    kill_orphans(run)
    seconds = stepped(run, free) - free
    site.lab.call("scancel", job)
    return seconds


def stepped(run: Path, after: float) -> float:
    """When the first step after the moment `after` was done; by the wall clock, it is one machine."""

    def first() -> float:
        try:
            lines = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
        except (OSError, ValueError):
            return 0.0
        return next((line["time"] for line in lines if line["time"] > after), 0.0)

    return float(eventually(first))


def eventually(check: Callable[[], T]) -> T:
    deadline = time.monotonic() + PATIENCE
    while not (found := check()):
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.02)
    return found


def kill_orphans(run: Path) -> int:
    """Workers that outlived their job would go on training, into the same folder."""
    killed = 0
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                if str(run).encode() in (path / "cmdline").read_bytes() and int(path.name) != os.getpid():
                    os.kill(int(path.name), signal.SIGKILL)
                    killed += 1
            except OSError:
                continue
    return killed


if __name__ == "__main__":
    show(main())
