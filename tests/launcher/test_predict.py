"""`launch predict`: what Slurm says of parts of a run, what the queue says, and what earlier runs tell."""

import getpass
import json
import os
import time
from pathlib import Path

import pytest

from launcher.cli.predict import advice, pace, when
from launcher.recipe import load
from launcher.rundir import RunDir, append_json, runs_root, write_json
from launcher.slurm.forecast import MOST, Slot, grid
from launcher.supervisor import lease, processes
from launcher.workstation import queue
from tests.lab import Lab
from tests.launcher.on_slurm import launch, wait

HOUR = 3600
NOW = 1_795_000_000


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("program: {script: train.py}\nresources: {gpus: 8}\n")
    (tmp_path / "train.py").touch()
    return path


@pytest.mark.parametrize("gpus", [1, 2, 6, 8])
@pytest.mark.parametrize("longest", [None, 1800, HOUR, 24 * HOUR, 96 * HOUR])
def test_the_grid_is_small_and_begins_with_the_wish(gpus: int, longest: int | None) -> None:
    asked = grid(gpus, 1, longest)
    assert asked[0] == (gpus, longest) and len(set(asked)) == len(asked) <= MOST
    assert {count for count, _ in asked} >= {gpus, 1}
    if longest is None or longest > HOUR:
        assert (gpus, HOUR) in asked, "the shortest slice has the best chance"
    assert all(longest is None or (length is not None and length <= longest) for _, length in asked)


def test_no_fewer_gpus_than_the_recipe_needs() -> None:
    assert {gpus for gpus, _ in grid(8, 3, 24 * HOUR)} == {8, 4}


def slots(*told: tuple[int, int, int]) -> list[Slot]:
    """(GPUs, hours, hours until it starts)"""
    return [Slot(gpus, length * HOUR, NOW + start * HOUR) for gpus, length, start in told]


def test_what_is_advised() -> None:
    assert "8 GPUs for 24 h would start now" in advice(slots((8, 24, 0), (8, 1, 0), (4, 24, 0)), NOW, "GPUs")
    said = advice(slots((8, 24, 9), (8, 8, 9), (8, 4, 0), (8, 2, 0), (4, 24, 0)), NOW, "GPUs")
    assert said.startswith("8 GPUs for 4 h at a time would start now; 8 GPUs for 24 h would start ")
    assert said.endswith("--time 4h"), "the longest of those that start first, with all GPUs"
    said = advice(slots((8, 24, 9), (8, 1, 9), (4, 24, 3), (2, 1, 0), (2, 24, 0)), NOW, "GPUs")
    assert said.endswith("cut safely: --gpus 2"), "fewer GPUs only where a shorter time gains nothing"
    assert "neither" in advice([Slot(8, HOUR, NOW + HOUR), Slot(4, HOUR, None, "no")], NOW, "GPUs")


def test_times_as_people_say_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    now = 1_795_262_400  # a Saturday, 12:00
    assert [when(now + hours * HOUR, now) for hours in (0, 2, 18, 48, 24 * 20)] == [
        "now", "14:00", "tomorrow 06:00", "Mon 12:00", "2026-12-11 12:00",
    ]  # fmt: skip
    monkeypatch.undo()
    time.tzset()


def earlier_run(recipe: Path, gpus: int = 8, timing: bool = True) -> RunDir:
    """100 steps of 2 s after 20 s of start-up, preempted once at step 40; of 1000 steps."""
    run = RunDir(runs_root() / "toy-20260101-120000-beef")
    run.path.mkdir(parents=True)
    write_json(run.run, {"recipe_hash": load(recipe).hash()})
    write_json(run.heartbeat, {"of": 1000, "step": 100})
    begin, done = 5000.0, 0
    for attempt, step in enumerate((40, 100), 1):
        append_json(run.attempts, {"event": "start", "attempt": attempt, "time": begin, "gpus": gpus})
        for at in range(done + 10, step + 1, 10):
            if timing:
                append_json(run.path / "timing.jsonl", {"step": at, "time": begin + 20 + 2 * (at - done)})
        begin += 20 + 2 * (step - done)
        end = {"event": "end", "attempt": attempt, "time": begin, "step": step, "resumed": done}
        append_json(run.attempts, end)
        begin, done = begin + 60, step
    return run


def test_the_pace_of_earlier_runs(recipe: Path) -> None:
    found = pace.of_run(earlier_run(recipe))
    assert found == pace.Pace(gpus=8, step=2.0, start_up=20.0, steps=1000)
    assert found.work(8) == 2000 and found.work(4) == 4000
    assert found.slices(8, HOUR) == 1 and found.slices(4, HOUR) == 2 and found.slices(8, None) == 1
    assert found.slices(8, 20) is None, "an allocation as short as the start-up gets nowhere"


def test_the_pace_of_a_program_without_timing(recipe: Path) -> None:
    found = pace.of_run(earlier_run(recipe, timing=False))
    assert found is not None and found.start_up == 0 and 2.0 < found.step < 3.0


def test_only_runs_of_the_same_recipe_count(recipe: Path) -> None:
    earlier_run(recipe)
    assert pace.of_recipe(load(recipe).hash(), 2) is not None
    assert pace.of_recipe(load(recipe, ["program.args=[--other]"]).hash(), 8) is None


def test_on_slurm(lab: Lab, recipe: Path) -> None:
    """A maintenance in three hours, then a job on six of every eight GPUs."""
    earlier_run(recipe)
    before = sorted(runs_root().rglob("*"))
    free = json.loads(launch("predict", str(recipe), "--time", "24h", "--json").stdout)
    assert free["schema"] == 1 and free["backend"] == "slurm"
    assert "8 GPUs for 24 h would start now" in free["advice"]
    assert free["slots"][0]["slices"] == 1 and free["slots"][0]["seconds"] == 2020

    reservation = (
        f"reservationname=maintenance starttime=now+3hours duration=60 nodes=ALL users={getpass.getuser()}"
    )
    lab.call("scontrol", "create", "reservation", *reservation.split(), "flags=maint", check=True)
    said = launch("predict", str(recipe), "--time", "24h")
    assert "8 GPUs for 1 h at a time would start now; 8 GPUs for 24 h would start" in said.stdout
    assert "--time 1h" in said.stdout and "1 slice, 33m40s of work" in said.stdout
    lab.call("scontrol", "delete", "reservationname=maintenance", check=True)

    argv = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gres=gpu:6", "--time=2:00:00"]
    job = lab.call(*argv, "--output=/dev/null", "--wrap=sleep 600", check=True)
    try:
        wait("the other job", lambda: lab.call("squeue", "-h", "-t", "R", "-j", job))
        told = json.loads(launch("predict", str(recipe), "--json").stdout)
    finally:
        lab.call("scancel", job)
    late = {slot["gpus"]: slot["start"] - told["now"] > HOUR for slot in told["slots"]}
    assert late == {8: True, 4: True, 2: False, 1: False}
    assert "--gpus 2" in told["advice"]
    assert sorted(runs_root().rglob("*")) == before, "a prediction makes nothing"
    assert not lab.call("squeue", "-h", "--name=launch-predict")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--partition", "bacth"], "there is no partition `bacth` here; did you mean `batch`?"),
        (["--gpus", "9"], "a node of `batch` has 8 GPUs, the recipe asks for 9"),
        (["--time", "25h"], "`batch` lets a job last 24 h at most, not 25 h"),
    ],
)
def test_what_slurm_never_has(lab: Lab, recipe: Path, flags: list[str], words: str) -> None:
    said = launch("predict", str(recipe), *flags, check=False)
    assert said.returncode == 2 and words in said.stderr and not said.stdout


def test_on_a_workstation(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four slots; another run holds two of them."""
    monkeypatch.setenv("LAUNCH_CPU_SLOTS", "4")
    monkeypatch.setenv("LAUNCH_QUEUE", str(tmp_path / "queue"))
    asked = ["predict", str(recipe), "--backend", "tmux", "resources.device=cpu", "--gpus", "4", "--json"]
    told = json.loads(launch(*asked).stdout)
    assert told["backend"] == "tmux" and "4 workers are free" in told["advice"]
    assert not (tmp_path / "queue").exists()

    me = processes.inspect(os.getpid())
    assert me is not None
    entry = queue.Entry(
        key="other.json", run="other", priority=0, ticket=1, preemptible=False, wants={"workers": 2},
        holding=True, folder=str(tmp_path), uid=os.getuid(), boot=lease.boot(),
        supervisor=(me.pid, me.start), guard=None, grace=20.0,
    )  # fmt: skip
    with queue.held(0) as files:
        files.write(entry)
    told = json.loads(launch(*asked).stdout)
    assert [(turn["gpus"], turn["place"]) for turn in told["turns"]] == [(4, 1), (2, 0), (1, 0)]
    assert told["turns"][0]["behind"] == ["other"] and "--gpus 2" in told["advice"]
    said = launch(*asked[:-1], "--gpus", "5", check=False)
    assert said.returncode == 2 and "4 slots for CPU workers" in said.stderr
    assert [path.name for path in (tmp_path / "queue").glob("*.json")] == ["other.json"]
