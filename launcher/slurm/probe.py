"""A job of some seconds that finds out what the configuration does not say: who gets which signal and when,
whether a node sees the run folders, and what it has. Its other half, on the node: probe_task.py.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import LaunchError
from launcher.rundir import read_json, read_jsonl
from launcher.slurm import probe_task
from launcher.slurm.commands import SlurmError, call
from launcher.slurm.jobs import LIVE, show
from launcher.slurm.options import flags

NAME = "launch-doctor"
PATIENCE = 60.0  # seconds for a node, and for each answer from it
ROLES = ("task", "child", "grandchild")
POLL = 0.1  # seconds
CORES = 2
# A job cannot write why it failed into a folder that it does not see: its exit status tells.
SCRIPT = """#!/bin/sh
test -d "$1" || exit 81
test -w "$1" || exit 82
test -x "$2" || exit 83
test -r "$3" || exit 84
exec srun --ntasks=1 --cpus-per-task="$4" --output="$1/step.log" "$2" -I "$3" "$1" task "$5"
"""
SHARED = "Set LAUNCH_RUNS to a folder on a disk that all nodes share."
INSTALL = "Install the launcher and its Python on a disk that all nodes share."
ENDS = {
    81: ("the compute node does not see {folder}: no run could start there", SHARED),
    82: ("the compute node may not write to {folder}: no run could start there", SHARED),
    83: ("the compute node does not have {python}: no run could start there", INSTALL),
    84: ("the compute node does not have {task}: no run could start there", INSTALL),
}
Say = Callable[[str], None]


class Blind(LaunchError):
    """The probe could not find out. `bad`: a run would fail as well."""

    def __init__(self, message: str, hint: str, bad: bool) -> None:
        super().__init__(message, hint)
        self.bad = bad


@dataclass
class Found:
    """What the probe found; times in seconds. Processes are named as in `ROLES`."""

    node: dict[str, Any]
    round_trip: float = 0.0  # until a file is seen on the node and its answer here: the slowest
    clock: float = 0.0  # how far the node's clock is ahead of ours
    clock_error: float = 0.0
    reached: list[str] = field(default_factory=list)  # who got the signal of `scancel --signal`
    kill_after: float | None = None  # from SIGTERM to SIGKILL when the job is cancelled
    outlived: list[str] = field(default_factory=list)  # who was alive after the job


def probe(options: Mapping[str, str], root: Path, kill_after: float, say: Say, python: str = "") -> Found:
    """Submit, look, cancel, clean up. `options` of sbatch; `kill_after`: seconds, as configured.

    `python`: what is to run torchrun, if not ours. Raises Blind, SlurmError, OSError.
    """
    fresh = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=root))
    job = None
    try:
        script = folder / "job.sh"
        script.write_text(SCRIPT)
        own = {"job-name": NAME, "time": "10", "output": os.devnull, "chdir": "/", "no-requeue": ""}
        own |= {"nodes": "1", "ntasks-per-node": "1", "cpus-per-task": str(CORES)}
        argv = flags({**options, **own})
        told = [str(folder), sys.executable, probe_task.__file__, str(CORES), python or sys.executable]
        job = call("sbatch", "--parsable", *argv, str(script), *told).split(";")[0].strip()
        _started(job, folder, say)
        return _look(job, folder, kill_after, say)
    finally:
        if job is not None:
            with contextlib.suppress(SlurmError):
                call("scancel", job)
        shutil.rmtree(folder, ignore_errors=True)
        if fresh:
            with contextlib.suppress(OSError):
                root.rmdir()


def _started(job: str, folder: Path, say: Say) -> None:
    """Wait until the three processes have said that they are up."""
    began: float | None = None
    submitted = time.monotonic()
    while not all(_events(folder, role, "up") for role in ROLES) or not _events(folder, "task", "node"):
        seen = show(job)
        if seen is None or seen.state not in LIVE:
            raise _failed(job, folder)
        if seen.state not in ("PENDING", "CONFIGURING"):
            began = began or time.monotonic()
            say("the probe has started; looking at the node")
        else:
            say(f"the probe waits for a node ({seen.reason})")
        if began is None and time.monotonic() > submitted + PATIENCE:
            why = f"no node was free within {PATIENCE:g} s ({seen.reason})"
            raise Blind(why, "Try again when one is, or name another with --partition.", bad=False)
        # nvidia-smi and a cold disk may take a minute each
        if began is not None and time.monotonic() > began + 3 * PATIENCE:
            why = f"the probe started, but not all that it wrote to {folder.parent} has come here"
            raise Blind(why, SHARED, bad=True)
        time.sleep(5 * POLL if time.monotonic() > submitted + 10 else POLL)


def _look(job: str, folder: Path, kill_after: float, say: Say) -> Found:
    found = Found(_events(folder, "task", "node")[0])
    say("asking the node through files")
    _ask(folder, found)
    say("sending SIGTERM to the job's step")
    call("scancel", "--signal=TERM", f"{job}.0")
    if _until(lambda: _signals(folder, "task"), 10):
        time.sleep(1)  # the others have it by now, or never
    found.reached = [role for role in ROLES if "SIGTERM" in _signals(folder, role)]
    before = len(_terms(folder))
    say(f"cancelling the probe; SIGKILL should come {kill_after:g} s after SIGTERM")
    call("scancel", job)
    _until(lambda: (seen := show(job)) is None or seen.state not in LIVE, kill_after + PATIENCE)
    time.sleep(0.75 * probe_task.AFTERLIFE)
    last = {role: read_jsonl(folder / f"{role}.jsonl")[-1]["at"] for role in ROLES}
    terms = _terms(folder)[before:]
    found.kill_after = round(last["task"] - terms[0], 1) if terms else None
    found.outlived = [role for role in ROLES if last[role] > last["task"] + 0.25 * probe_task.AFTERLIFE]
    return found


def _ask(folder: Path, found: Found) -> None:
    """How long a file takes there and back, and between which of our times the node's clock was read."""
    trips = []
    for number in range(3):
        sent = time.time(), time.monotonic()
        (folder / f"question-{number}").touch()
        answer = folder / f"answer-{number}"
        if not _until(lambda answer=answer: read_json(answer), PATIENCE):  # type: ignore[misc]
            why = f"a file in {folder.parent} took more than {PATIENCE:g} s to the node and back"
            raise Blind(why, SHARED, bad=True)
        took = time.monotonic() - sent[1]
        trips.append((took, (read_json(answer) or {})["time"] - sent[0] - took / 2))
    shortest = min(trips)
    found.round_trip, found.clock, found.clock_error = max(trips)[0], shortest[1], shortest[0] / 2


def _failed(job: str, folder: Path) -> Blind:
    """Why the job ended before its processes were up."""
    told = call("scontrol", "--oneliner", "show", "job", job)
    said = dict(part.partition("=")[::2] for part in told.split())
    status = said.get("ExitCode", "0:0").partition(":")[0]
    if status.isdigit() and int(status) in ENDS:
        message, hint = ENDS[int(status)]
        names = {"folder": folder.parent, "python": sys.executable, "task": probe_task.__file__}
        return Blind(message.format(**names), hint, bad=True)
    words = ""
    with contextlib.suppress(OSError):
        words = ": " + (folder / "step.log").read_text(errors="replace").strip()[-300:]
    state, reason = said.get("JobState", "gone"), said.get("Reason", "None")
    why = f"the probe ended at once ({state}, exit code {said.get('ExitCode', '?')}, reason {reason}){words}"
    return Blind(why, f"Look at the node {said.get('NodeList', '')} or ask who runs the cluster.", bad=True)


def _events(folder: Path, role: str, event: str) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(folder / f"{role}.jsonl") if line.get("event") == event]


def _signals(folder: Path, role: str) -> list[str]:
    return [str(line["name"]) for line in _events(folder, role, "signal")]


def _terms(folder: Path) -> list[float]:
    return [line["at"] for line in _events(folder, "task", "signal") if line["name"] == "SIGTERM"]


def _until(check: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True
