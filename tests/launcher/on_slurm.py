"""Runs on a lab: launched by the command line, preempted by a job of higher priority, watched."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.rundir import RunDir, read_json, read_jsonl, runs_root
from launcher.supervisor import history, processes
from tests.lab import Lab, Settings, missing
from tests.launcher.progress import Progress, wait

TOY = Path(__file__).with_name("toy.py")


@contextlib.contextmanager
def cluster(settings: Settings) -> Iterator[Lab]:
    """A lab, and the environment of its users."""
    lacking = missing(settings.accounting)
    if lacking:
        pytest.skip(f"needs {', '.join(lacking)}: apt-get install slurm-wlm munge")
    with Lab(settings) as made, pytest.MonkeyPatch.context() as patch:
        for name, value in made.env.items():
            patch.setenv(name, value)
        yield made


def launch(*argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """One call of the command line; a status other than 0 fails the test with what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", *argv], capture_output=True, text=True, timeout=240
    )
    if check:
        assert done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


class SlurmRun(Progress):
    """A run of the toy program on a lab. `recipe`: sections over those that every such run has."""

    def __init__(self, lab: Lab, args: str = "", name: str = "toy", **recipe: dict[str, Any]) -> None:
        self.lab = lab
        told: dict[str, Any] = {
            "program": {"script": str(TOY), "args": args.split()},
            "resources": {"gpus": 2, "device": "cpu"},
            "restart": {"backoff": 0.1, "grace": 20},
        }
        for section, keys in recipe.items():
            told[section] = told.get(section, {}) | keys
        source = runs_root().parent / f"{name}.yaml"
        source.write_text(yaml.safe_dump(told))
        before = set(runs_root().glob("*/run.json"))
        self.said = launch(str(source), "--backend", "slurm", "--name", name)
        (record,) = set(runs_root().glob("*/run.json")) - before
        self.run = RunDir(record.parent)

    @property
    def jobs(self) -> list[str]:
        """The ids of its jobs that Slurm has not done with."""
        return self.lab.call("squeue", "--noheader", f"--name={self.run.id}", "--format=%A").split()

    @property
    def ends(self) -> list[dict[str, Any]]:
        return [line for line in read_jsonl(self.run.attempts) if line["event"] == "end"]

    @property
    def starts(self) -> list[dict[str, Any]]:
        return [line for line in read_jsonl(self.run.attempts) if line["event"] == "start"]

    @property
    def log(self) -> str:
        return self.run.run_log.read_text() if self.run.run_log.exists() else "no log"

    @property
    def final(self) -> dict[str, Any]:
        return read_json(self.run.final) or {}

    def end(self) -> dict[str, Any]:
        """Wait for the end of run and jobs; final.json."""
        wait(f"the end of {self.run.id}: {self.log}", lambda: self.final and not self.jobs)
        return self.final

    def lost_steps(self) -> int:
        return history.lost_steps(self.ends)

    def alive(self) -> list[processes.Process]:
        return processes.of_run(self.run.path)

    def supervisor(self) -> int:
        return int((read_json(self.run.lease) or {})["pid"])


def parent(pid: int) -> int:
    """Of a supervisor: its guard. Raises ProcessLookupError if it is dead."""
    found = processes.inspect(pid)
    if found is None:
        raise ProcessLookupError(pid)
    return found.parent


def take_all(lab: Lab, seconds: float = 2) -> str:
    """An urgent job that wants the whole cluster; its id."""
    argv = ["sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", os.devnull]
    return lab.call(*argv, f"--wrap=sleep {seconds}", check=True)


def state_of(lab: Lab, job: str) -> str:
    return lab.call("squeue", "--noheader", f"--jobs={job}", "--format=%T", "--states=all")
