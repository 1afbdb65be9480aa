"""The promise, with nothing mocked: a run that is preempted, killed, cut off from its store or moved to an
empty disk ends with the weights, the optimizer state and the metrics of one that was left alone."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import jobs
from tests.launcher.progress import wait
from tests.launcher.store_fixture import Weed, weed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    sizes = ["--train", "32", "--val", "8", "--size", "64"]
    subprocess.run([sys.executable, "-m", "detcore.data.shapes", str(folder), *sizes], check=True)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    with weed(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The run that nobody touched."""
    root = tmp_path_factory.mktemp("undisturbed")
    jobs.start(data, "--backend", "local", env={"LAUNCH_RUNS": str(root)})
    return jobs.only_run(root)


def assert_equal_runs(run: Path, undisturbed: Path) -> None:
    jobs.assert_same(jobs.final_state(run), jobs.final_state(undisturbed))
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def test_preempted_twice_and_killed_once(data: Path, store: Weed, undisturbed: Path, tmp_path: Path) -> None:
    env = dict(store.env)
    jobs.start(data, "--backend", "tmux", env=env)
    run = jobs.only_run(tmp_path / "runs")

    wait("step 6", jobs.at_step(run, 6))
    jobs.launch("preempt", run.name, env=env)
    wait("step 14 of the second attempt", jobs.at_step(run, 14, after_attempt=1))
    jobs.launch("preempt", run.name[:-2], env=env)
    wait("step 23 of the third attempt", jobs.at_step(run, 23, after_attempt=2))
    workers = [process for process in jobs.processes_of(run) if "RANK" in process.environ()]
    workers[-1].send_signal(signal.SIGKILL)
    wait("the end", lambda: jobs.read(run / "final.json"), 240)

    ends = jobs.attempts(run)
    assert [end["state"] for end in ends] == ["preempted", "preempted", "crashed", "finished"]
    starts = [end["resumed"] for end in ends]
    assert starts[1] == ends[0]["step"] and starts[2] == ends[1]["step"], (
        "a graceful preemption loses no step"
    )
    assert ends[2]["step"] - starts[3] <= 10, "a SIGKILL loses at most the interval between checkpoints"
    final = jobs.read(run / "final.json")
    assert final["state"] == "finished" and final["lost_steps"] == ends[2]["step"] - starts[3]
    assert_equal_runs(run, undisturbed)
    wait("no process of the run", lambda: not jobs.processes_of(run), 20)
    assert_no_secret_in(run, store)


def assert_no_secret_in(run: Path, store: Weed) -> None:
    for file in run.rglob("*"):
        if file.is_file():
            assert store.secret.encode() not in file.read_bytes(), f"the store's secret stands in {file}"
    bucket = store.files()
    assert any(key.endswith("manifest.json") for key in bucket)
    for key, content in bucket.items():
        assert store.secret.encode() not in content, f"the store's secret stands in the bucket: {key}"


def test_store_dies_and_the_disk_is_lost(data: Path, store: Weed, undisturbed: Path, tmp_path: Path) -> None:
    env = dict(store.env)
    jobs.start(data, "--backend", "tmux", env=env)
    run = jobs.only_run(tmp_path / "runs")
    wait("a durable checkpoint", lambda: jobs.read(run / "synced.json").get("step"))
    store.kill()
    jobs.launch(
        "preempt", run.name, env=env
    )  # saved, and nowhere to send it; the next attempt starts all the same
    wait("the second attempt", jobs.at_step(run, 1, after_attempt=1))
    with standing_still(run):
        said = lambda: jobs.launch("status", run.name, env=env).stdout  # noqa: E731
        wait("status to tell", lambda: "does not answer" in said())
        store.start()
        wait("the mirror to catch up", lambda: not jobs.read(run / "synced.json").get("away_since"))
    jobs.launch("stop", run.name, env=env, check=False)
    assert not jobs.processes_of(run)
    final = jobs.read(run / "final.json")
    assert final["synced"]["step"] == final["step"], "the last checkpoint is in the store before the run ends"

    elsewhere = tmp_path / "elsewhere"
    shutil.rmtree(run)
    url = str(final["url"])
    assert final["state"] == "stopped", "the run finished before it could be stopped: raise STEPS"
    jobs.launch("resume", url, "--backend", "local", env=env | {"LAUNCH_RUNS": str(elsewhere)})
    assert_equal_runs(jobs.only_run(elsewhere), undisturbed)
    wait("no process of the run", lambda: not jobs.processes_of(run), 20)


@contextlib.contextmanager
def standing_still(run: Path) -> Iterator[None]:
    """Its ranks do no step, so that it cannot be over before what is looked for is seen."""
    ranks = [process for process in jobs.processes_of(run) if "RANK" in process.environ()]
    for rank in ranks:
        rank.suspend()
    try:
        yield
    finally:
        for rank in ranks:
            rank.resume()


def test_supervisor_killed(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL to the supervisor: its guard lets the workers save, and the run comes back by itself."""
    jobs.start(data, "--backend", "tmux")
    run = jobs.only_run(tmp_path / "runs")
    wait("step 8", jobs.at_step(run, 8))
    first = jobs.processes_of(run)
    os.kill(int(str(jobs.read(run / "lease.json")["pid"])), signal.SIGKILL)
    wait("the end", lambda: jobs.read(run / "final.json"), 240)
    assert_equal_runs(run, undisturbed)
    assert not [process for process in first if process.is_running() and "RANK" in process.environ()]
