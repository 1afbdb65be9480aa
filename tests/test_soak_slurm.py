"""Preemption on a real Slurm, again and again, with the figures. `make soak`; they go to docs/results.md."""

import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.rundir import read_json
from launcher.slurm import jobs as slurm
from tests import jobs
from tests.lab import CORES, Lab, Settings
from tests.launcher.on_slurm import SlurmRun, cluster, parent, state_of, take_all, wait

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
TIMES, STEPS, SAVE = 10, 100, 0.5
HANDOVER = 3.0  # seconds from the first signal until the node is free, beside the save
RUNS, CHAOS, LAST = 20, 300.0, 900.0  # seconds: of chaos, and until all have finished after it
GONE = (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError, IndexError, KeyError)


@pytest.mark.parametrize("proctrack", ["linuxproc", "pgid"])
@pytest.mark.parametrize("user_signal", [False, True], ids=["term", "user-signal"])
def test_graceful_preemption(user_signal: bool, proctrack: str) -> None:
    with cluster(Settings(user_signal=user_signal, proctrack=proctrack)) as lab:
        figures = [preempted(lab, f"n{number}") for number in range(TIMES)]
    handed, stopped, back = zip(*figures, strict=True)
    sent = "user signal" if user_signal else "SIGTERM"
    print(f"\n{sent}, {proctrack}: {TIMES} of {TIMES} saved, 0 steps lost")
    for what, seconds in (("node free", handed), ("all ended", stopped), ("next attempt", back)):
        low, high = min(seconds), max(seconds)
        print(f"  {what}: {low:.1f} / {statistics.median(seconds):.1f} / {high:.1f} s (min/median/max)")
    assert max(handed) < SAVE + HANDOVER


def preempted(lab: Lab, name: str) -> tuple[float, float, float]:
    """One run, preempted once: seconds to a free node, to its last process, of its absence."""
    run = SlurmRun(lab, f"--steps {STEPS} --pace 0.02 --every 1000 --save {SAVE}", name=name)
    run.at(20)
    (job,) = run.jobs
    urgent = take_all(lab)
    wait("Slurm to preempt it", lambda: slurm.show(job).preempt_time)  # type: ignore[union-attr]
    began = time.monotonic()  # no later than the signal, but for a look
    wait("the urgent job to run", lambda: state_of(lab, urgent) == "RUNNING")
    handed = time.monotonic() - began
    assert not run.alive(), "the node is somebody else's, and a process of the run lives on it"
    assert run.end()["state"] == "finished"
    first = run.ends[0]
    assert first["state"] == "preempted" and first["saved"] and run.lost_steps() == 0, run.log
    run.assert_undisturbed(STEPS)
    return handed, first["seconds_to_stop"], run.starts[1]["returned"]["seconds"]


def test_twenty_runs(tmp_path: Path) -> None:
    """All finish, none twice, none is lost, whatever happens to half of them for five minutes."""
    draw = random.Random(0)
    with cluster(Settings()) as lab, Witness(tmp_path / "runs") as witness:
        wants = {"resources": {"gpus": 2, "cpus": 4, "device": "cpu"}, "restart": {"crashes": 100}}
        args = "--steps 300 --pace 0.25 --every 20"
        runs = [SlurmRun(lab, args, name=f"n{number}", **wants) for number in range(RUNS)]
        happened = Counter(disturb(lab, draw.sample(runs, RUNS // 2), draw))
        wait("all to finish", lambda: all(run.final for run in runs), LAST)
        wait("no job and no process", lambda: not lab.call("squeue", "-h") and not witness.alive(), 60)
    ends = Counter(end["state"] for run in runs for end in run.ends)
    lost, attempts = sum(run.lost_steps() for run in runs), [len(run.starts) for run in runs]
    print(f"\n{happened.total()} events {dict(happened)}; attempts {sorted(attempts)}, ended as {dict(ends)}")
    print(f"{lost} of {300 * RUNS} steps done twice; {witness.looks} looks, at once: {witness.twice}")
    for run in runs:
        assert run.final["state"] == "finished" and sum(end["state"] == "finished" for end in run.ends) == 1
        numbers = [start["attempt"] for start in run.starts]
        assert numbers == sorted(set(numbers))
        run.assert_undisturbed(300)
    assert not witness.twice and sum(count > 1 for count in attempts) >= RUNS // 2


def urgent(lab: Lab, run: SlurmRun, draw: random.Random) -> None:
    """A job of any size and length, which preempts whom Slurm chooses."""
    wants = ["-p", "urgent", "-n1", f"-c{draw.randint(1, CORES)}", "-o", os.devnull]
    lab.call("sbatch", *wants, f"--wrap=sleep {draw.randint(3, 15)}", check=True)


def requeue(lab: Lab, run: SlurmRun, draw: random.Random) -> None:
    lab.call("scontrol", "requeue", run.jobs[0])


def kill_supervisor(lab: Lab, run: SlurmRun, draw: random.Random) -> None:
    os.kill(run.supervisor(), signal.SIGKILL)


def kill_guard(lab: Lab, run: SlurmRun, draw: random.Random) -> None:
    os.kill(parent(run.supervisor()), signal.SIGKILL)


def kill_both(lab: Lab, run: SlurmRun, draw: random.Random) -> None:
    for pid in (parent(run.supervisor()), run.supervisor()):
        os.kill(pid, signal.SIGKILL)


def disturb(lab: Lab, victims: list[SlurmRun], draw: random.Random) -> Iterator[str]:
    """For CHAOS seconds; the names of what happened. A victim may be in training, or anywhere else."""
    until, root = time.monotonic() + CHAOS, victims[0].run.path.parent
    while time.monotonic() < until:
        time.sleep(draw.uniform(2, 10))
        event = draw.choice([urgent, urgent, requeue, kill_supervisor, kill_guard, kill_both])
        training = ranks(root)
        victim = draw.choice([run for run in victims if run.run.id in training] or victims)
        if event is urgent or (read_json(victim.run.lease) and victim.alive()):
            with contextlib.suppress(*GONE):
                event(lab, victim, draw)
                yield event.__name__


def ranks(root: Path) -> dict[str, set[str]]:
    """The attempts of each run below `root` of which a worker lives."""
    found: dict[str, set[str]] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environ = process.environ()
            if "RANK" in environ and environ.get("LAUNCH_RUN_DIR", "").startswith(f"{root}/"):
                found.setdefault(environ["LAUNCH_RUN_ID"], set()).add(environ["LAUNCH_ATTEMPT"])
    return found


class Witness:
    """Looks, as long as it is asked to, whether workers of two attempts of a run ever live at once."""

    def __init__(self, root: Path) -> None:
        self.root, self.looks, self.twice = root, 0, list[str]()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Witness":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def alive(self) -> list[psutil.Process]:
        """Whatever is left of any run."""
        return [process for run in self.root.glob("*") for process in jobs.processes_of(run)]

    def _look(self) -> None:
        while not self._over.wait(0.5):
            self.looks += 1
            now = ranks(self.root)
            self.twice += [f"{run}: {sorted(alive)}" for run, alive in now.items() if len(alive) > 1]


def test_two_nodes_of_four_end_as_one_of_eight(tmp_path: Path) -> None:
    data, calm = tmp_path / "shapes", tmp_path / "calm"
    sizes = ["--train", "32", "--val", "8", "--size", "64"]
    subprocess.run([sys.executable, "-m", "detcore.data.shapes", str(data), *sizes], check=True)
    told = ["train.data.workers=0", "train.schedule.iterations=40"]
    jobs.start(data, *told, "--gpus", "8", "--backend", "local", env={"LAUNCH_RUNS": str(calm)})
    with cluster(Settings()) as lab:
        jobs.start(data, *told, "--nodes", "2", "--backend", "slurm")
        run = jobs.only_run(tmp_path / "runs")
        wait("step 8", jobs.at_step(run, 8))
        take_all(lab)
        wait("the end", lambda: jobs.read(run / "final.json"), 300)
        wait("no job and no process", lambda: not lab.call("squeue", "-h") and not jobs.processes_of(run))
    ends, one = jobs.attempts(run), jobs.only_run(calm)
    assert [end["state"] for end in ends] == ["preempted", "finished"], ends
    assert ends[0]["saved"] and ends[1]["resumed"] == ends[0]["step"]
    assert "8 workers on 2 nodes" in (run / "logs" / "run.log").read_text()
    jobs.assert_same(jobs.final_state(run), jobs.final_state(one))
    assert (run / "metrics.jsonl").read_bytes() == (one / "metrics.jsonl").read_bytes()
