"""Long chaos: a run is hit by whatever can happen to it, dozens of times, and ends bit for bit as one that
nobody touched. `make soak`; what it printed goes to docs/results.md."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from tests import jobs
from tests.launcher.progress import wait
from tests.launcher.store_fixture import Weed, weed

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
EVENTS, EVERY = 30, 5  # how often it is hit; steps between checkpoints
LONGER = ["train.schedule.iterations=600", f"checkpoint.every={EVERY}it", "restart.crashes=1000"]
GONE = (psutil.NoSuchProcess, ProcessLookupError, IndexError, StopIteration, ValueError)


def workers(run: Path) -> list[psutil.Process]:
    """The ranks and their loaders."""
    return [process for process in jobs.processes_of(run) if "RANK" in process.environ()]


def torchrun(run: Path) -> psutil.Process:
    return next(process for process in jobs.processes_of(run) if "torch.distributed.run" in process.cmdline())


def preempt(run: Path, store: Weed) -> None:
    jobs.launch("preempt", run.name, env=store.env)


def term_twice_to_every_worker(run: Path, store: Weed) -> None:
    """As a cgroup's or a job step's signal arrives."""
    for process in 2 * workers(run):
        process.send_signal(signal.SIGTERM)


def term_torchrun(run: Path, store: Weed) -> None:
    torchrun(run).terminate()


def kill_torchrun(run: Path, store: Weed) -> None:
    torchrun(run).kill()


def kill_a_worker(run: Path, store: Weed) -> None:
    random.choice(workers(run)).kill()


def kill_supervisor(run: Path, store: Weed) -> None:
    os.kill(int(str(jobs.read(run / "lease.json")["pid"])), signal.SIGKILL)


def lose_power(run: Path, store: Weed) -> None:
    """All processes at once, and the newest checkpoint is torn."""
    doomed = workers(run)
    kill_supervisor(run, store)
    for process in doomed:
        process.kill()
    newest = max((run / "checkpoints").glob("step-*/train.pth"), key=lambda path: path.stat().st_mtime)
    os.truncate(newest, newest.stat().st_size // 2)


def store_away(run: Path, store: Weed) -> None:
    store.kill()
    step = int(str(jobs.read(run / "heartbeat.json")["step"] or 0))
    wait("more steps without a store", jobs.at_step(run, step + EVERY))
    store.start()


CHAOS = [
    *(preempt, term_twice_to_every_worker, term_torchrun, kill_torchrun),
    *(kill_a_worker, kill_supervisor, lose_power, store_away),
]


@pytest.mark.parametrize("seed", [0, 1])
def test_chaos(seed: int, tmp_path: Path) -> None:
    random.seed(seed)
    data, calm = tmp_path / "data", tmp_path / "calm"
    sizes = ["--train", "32", "--val", "8", "--size", "64"]
    subprocess.run([sys.executable, "-m", "detcore.data.shapes", str(data), *sizes], check=True)
    jobs.start(data, *LONGER, "--backend", "local", env={"LAUNCH_RUNS": str(calm)})
    with weed(tmp_path / "weed") as store:
        jobs.start(data, *LONGER, "--backend", "tmux", env=store.env)
        run = jobs.only_run(tmp_path / "runs")
        happened = Counter(disturb(run, store))
        wait("the end", lambda: jobs.read(run / "final.json"), 600)
        final, states = jobs.read(run / "final.json"), Counter(end["state"] for end in jobs.attempts(run))
        print(f"\nseed {seed}: {happened.total()} events {dict(happened)}")
        print(f"{final['state']} in {final['attempts']} attempts {dict(states)}; {final['reason']}")
        print(f"{final['lost_steps']} steps done twice, of {final['of']}; checkpoints every {EVERY}")
        assert final["state"] == "finished" and happened.total() == EVENTS
        undisturbed = jobs.only_run(calm)
        jobs.assert_same(jobs.final_state(run), jobs.final_state(undisturbed))
        assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
        assert final["synced"]["step"] == final["step"], "all is in the store"
        wait("no process of the run", lambda: not jobs.processes_of(run), 30)


def disturb(run: Path, store: Weed) -> Iterable[str]:
    """Hit the run again and again, each time a few steps after it came back; the names of what happened."""
    while not jobs.read(run / "heartbeat.json"):
        time.sleep(0.1)
    for _ in range(EVENTS):
        attempt, step = (jobs.read(run / "heartbeat.json")[key] for key in ("fence", "step"))
        target = (step or 0) + random.randint(1, 2 * EVERY)  # type: ignore[operator]
        wait(f"step {target} after attempt {attempt}", jobs.at_step(run, target), 300)
        event = random.choice(CHAOS)
        with contextlib.suppress(*GONE):  # it hit a moment between two attempts
            event(run, store)
        yield event.__name__
