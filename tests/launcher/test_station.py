"""Runs that share a machine: real supervisors, real workers, and one queue between them."""

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli import status
from launcher.errors import UserError
from launcher.recipe import load_frozen
from launcher.rundir import read_json, runs_root
from launcher.supervisor import control, lease, processes
from launcher.supervisor.place import Refused
from launcher.supervisor.station import Station
from launcher.workstation import order, queue
from tests.launcher.conftest import TOY, Toy, wait
from tests.launcher.test_cli import launch
from tests.launcher.test_queue import smi

Make = Callable[..., Toy]
Worker = tuple[str, str, str]  # run, attempt, rank


def workers() -> set[Worker]:
    """All workers of the test's runs that live at one and the same moment, as the kernel knows them."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        process = processes.inspect(int(path.parent.name))
        try:
            lines = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        told = dict(line.split("=", 1) for line in lines if "=" in line)
        if process and told.get("LAUNCH_RUN_DIR", "").startswith(str(runs_root())) and "LOCAL_RANK" in told:
            found[process] = (told["LAUNCH_RUN_ID"], told["LAUNCH_ATTEMPT"], told["LOCAL_RANK"])
    # A look takes its time: whoever was seen early may have made room for whoever was seen late.
    return {worker for process, worker in found.items() if process.alive}


def entries() -> dict[str, queue.Entry]:
    with queue.held(60) as files:
        return {entry.run: entry for entry in files.entries()}


def occupy(amount: int, **changes: object) -> None:
    """As a run that holds so many slots and stays: this very process."""
    me = processes.inspect(os.getpid())
    assert me
    held = {"key": "other.json", "run": "other", "priority": 0, "ticket": 1, "preemptible": False}
    held |= {"wants": {"workers": amount}, "holding": True, "folder": "/nowhere", "uid": os.getuid()}
    held |= {"boot": lease.boot(), "supervisor": (me.pid, me.start), "guard": None, "grace": 1.0}
    with queue.held(5) as files:
        files.write(queue.Entry(**(held | changes)))  # type: ignore[arg-type]


def test_eight_runs_over_four_slots(toy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more workers than slots, nobody is overtaken, all finish, whichever supervisors are killed."""
    monkeypatch.setenv("LAUNCH_CPU_SLOTS", "4")
    dice = random.Random(8)
    runs = []
    for number, wants in enumerate([2, 1, 4, 1, 2, 3, 1, 2]):
        resources = {"gpus": wants, "priority": number % 3, "preemptible": number % 2 == 0}
        runs.append(toy("--steps 8 --pace 0.05 --every 4", name=f"r{number}", resources=resources).start())
    kills, most, shared = dict.fromkeys(runs, 0), 0, 0
    next_kill, deadline = time.monotonic() + 1.0, time.monotonic() + 240
    before, looked = entries(), time.monotonic()
    while any(run.guard and run.guard.poll() is None for run in runs):
        assert time.monotonic() < deadline, {run.run.id: run.window for run in runs if not run.final}
        alive, now = workers(), entries()
        assert len(alive) <= 4, alive
        holders = [entry for entry in now.values() if entry.holding]
        leased = sum(entry.wants["workers"] for entry in holders)
        assert leased <= 4, holders
        most, shared = max(most, leased), max(shared, len(holders))
        if time.monotonic() - looked < 1.0:  # in more, somebody may have held and given way again
            assert_nobody_was_overtaken(before, now)
        before, looked = now, time.monotonic()
        if time.monotonic() > next_kill and sum(kills.values()) < 6:
            run = dice.choice(runs)
            if kills[run] < 2 and killed(run):
                kills[run] += 1
                next_kill = time.monotonic() + dice.uniform(0.5, 2.0)
        time.sleep(0.05)
    assert sum(kills.values()) >= 3, "a fast machine is done before the sixth"
    assert most == 4 and shared >= 2
    for run in runs:
        assert run.end() == 0 and run.final["state"] == "finished", run.window
        run.assert_undisturbed(8)
    assert not entries() and not workers()


def killed(run: Toy) -> bool:
    """SIGKILL to its supervisor, if it has one and has not ended: after that nobody clears away its entry."""
    victim = processes.inspect(run.supervisor) if run.run.lease.exists() else None
    if victim is None:
        return False
    victim.signal(signal.SIGSTOP)
    ended = bool(run.final)
    victim.signal(signal.SIGCONT if ended else signal.SIGKILL)
    return not ended


def assert_nobody_was_overtaken(before: dict[str, queue.Entry], now: dict[str, queue.Entry]) -> None:
    """Whoever has begun to hold since left enough for all who were before it in the line and wait still."""
    known = [one for one in now.values() if one.run in before]
    could = order.decide(known, {"workers": 4}, frozenset()).granted
    for one in known:
        if one.holding and not before[one.run].holding:
            waits = [other for other in known if not other.holding and not before[other.run].holding]
            ahead = [other for other in waits if place(other) < place(one)]
            assert all(other.key in could for other in ahead), (one, ahead)


def place(entry: queue.Entry) -> tuple[int, int]:
    return -entry.priority, entry.ticket


def test_a_preemptible_run_gives_way_and_comes_back_with_nothing_lost(
    toy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCH_CPU_SLOTS", "2")
    low = toy("--steps 12 --wait-at 7 --every 100", resources={"preemptible": True, "priority": -1}).start()
    low.at(7)
    equal = toy("--steps 2 --every 100", name="equal", resources={"priority": -1}).start()
    wait("its place", lambda: "place 1 of 1 in the queue" in equal.window)
    assert status.row(equal.run)["state"] == "queued" and not low.ends
    assert status.row(equal.run)["reason"] == "place 1 of 1: waiting for 2 CPU workers"
    with pytest.raises(UserError, match="waits in this machine's queue") as refused:
        control.preempt(equal.run)
    assert refused.value.hint == "It is place 1 of 1: waiting for 2 CPU workers."
    ticket = entries()[low.run.id].ticket
    high = toy("--steps 40 --every 100 --pace 0.05", name="high", resources={"priority": 5}).start()
    wait("the slots to be given", lambda: high.run.id in {run for run, _, _ in workers()})
    assert not low.workers() and entries()[low.run.id].ticket == ticket
    assert f"gives way to {high.run.id}, of priority 5" in low.ends[0]["reason"]
    assert [run.end() for run in (high, low, equal)] == [0, 0, 0]
    assert low.states == ["preempted", "finished"] and low.ends[0]["saved"] and low.final["lost_steps"] == 0
    assert low.final["ended"] < equal.final["ended"], "it came back in its old place"
    for run, steps in ((low, 12), (high, 40), (equal, 2)):
        run.assert_undisturbed(steps)
    assert not entries()


def test_the_wait_ends_with_a_clear_word(toy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCH_CPU_SLOTS", "3")
    occupy(2)
    run = toy("--steps 2", resources={"max_wait": "2s"}).start()
    assert run.end() == 1
    assert run.final["state"] == "failed" and run.final["attempts"] == 0
    assert run.final["reason"].startswith("waited 2 s for 2 CPU workers, longer than resources.max_wait; ")
    assert "waiting for 2 CPU workers: place 1 of 1 in the queue" in run.window
    assert entries().keys() == {"other"}


def test_a_stop_takes_a_run_out_of_the_queue(toy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCH_CPU_SLOTS", "1")
    occupy(1)
    run = toy("--steps 2", resources={"gpus": 1}).start()
    wait("its place", lambda: run.run.id in entries())
    control.stop(run.run)
    assert run.final["state"] == "stopped" and run.end() == 0 and entries().keys() == {"other"}


def test_more_than_there_is_is_refused_at_once(toy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCH_CPU_SLOTS", "4")
    run = toy("--steps 2", resources={"gpus": 8}).start()
    assert run.end() == 1 and not queue.folder().exists(), run.window
    assert run.final["reason"].startswith("this machine has 4 slots for CPU workers (LAUNCH_CPU_SLOTS)")


def test_launch_refuses_what_the_machine_will_never_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(f"program: {{script: {TOY}}}\nresources:\n  gpus: 2\n  device: cpu\n")
    for slots, said in (
        (
            "1",
            "toy.yaml:3:9: this machine has 1 slot for CPU workers (LAUNCH_CPU_SLOTS), the recipe asks for 2",
        ),
        ("many", "LAUNCH_CPU_SLOTS is 'many'"),
    ):
        refused = launch("toy.yaml", "--backend", "local", LAUNCH_CPU_SLOTS=slots)
        assert refused.returncode == 2 and said in refused.stderr, refused
    lacking = launch("toy.yaml", "--backend", "local", "resources.memory=9000T")
    assert lacking.returncode == 2 and "the recipe asks for 9.216e+06 GB of memory" in lacking.stderr, lacking
    assert not runs_root().exists() and not queue.folder().exists()


def test_what_the_dead_held_is_free_when_nothing_of_them_is_left(
    toy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCH_CPU_SLOTS", "2")
    dead = toy("--steps 12 --wait-at 7 --every 100 --save 2").start()
    dead.at(7)
    assert dead.guard
    os.kill(dead.guard.pid, signal.SIGKILL)
    os.kill(dead.supervisor, signal.SIGKILL)
    dead.guard.wait()
    orphans = dead.workers()
    assert len(orphans) >= 3 and status.row(dead.run)["state"] == "lost"
    heir = toy("--steps 40 --every 100 --pace 0.05", name="heir").start()
    while not any(run == heir.run.id for run, _, _ in workers()):
        assert heir.guard and heir.guard.poll() is None
        if heir.run.attempts.exists():
            assert not any(process.alive for process in orphans), "two runs at a time"
        time.sleep(0.02)
    assert heir.end() == 0 and not any(process.alive for process in orphans)
    assert (read_json(dead.run.outcome) or {})["step"] == 7, "they could save"
    assert dead.start().end() == 0 and dead.final["lost_steps"] == 0
    dead.assert_undisturbed(12)


def test_gpus_that_others_use_are_left_alone(
    toy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apps = smi(tmp_path, monkeypatch)
    apps.write_text("GPU-1, 4711\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    resources = {"device": "cuda", "gpus": 2}
    first = toy("--steps 12 --wait-at 2 --every 100", resources=resources).start()
    first.at(2)
    assert given(first) == {"GPU-0,GPU-2"}
    apps.write_text("GPU-1, 4711\nGPU-0, 17\nGPU-2, 18\n")  # the run's own are not somebody else's
    second = toy("--steps 12 --wait-at 2 --every 100", name="second", resources=resources).start()
    wait("its place", lambda: "waiting for 2 GPUs: place 1 of 1 in the queue" in second.window)
    apps.write_text("GPU-0, 17\nGPU-2, 18\n")
    second.at(2)
    assert given(second) == {"GPU-1,GPU-3"} and given(first) == {"GPU-0,GPU-2"}
    for run in (first, second):
        control.stop(run.run)
        assert run.end() == 0
    assert not entries()


def given(run: Toy) -> set[str]:
    """CUDA_VISIBLE_DEVICES of the run's workers."""
    found = set()
    for process in run.workers():
        lines = Path(f"/proc/{process.pid}/environ").read_text().split("\0")
        if any(line.startswith("LOCAL_RANK=") for line in lines):  # torchrun itself needs none
            found |= {line.partition("=")[2] for line in lines if line.startswith("CUDA_VISIBLE_DEVICES=")}
    return found


def station(run: Toy) -> Station:
    recipe = load_frozen(run.run.recipe)
    return Station(run.run, recipe, recipe.resources.gpus)


def test_a_place_is_kept_by_who_starts_again_at_once(toy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCH_CPU_SLOTS", "2")
    preempted, crashed = (
        toy(name="preempted", resources={"gpus": 1}),
        toy(name="crashed", resources={"gpus": 1}),
    )
    stations = [station(preempted), station(crashed)]
    assert [one.enter(lambda why: False) for one in stations] == [{}, {}]
    tickets = {run: entry.ticket for run, entry in entries().items()}
    for one, again in zip(stations, (True, False), strict=True):
        one.leave(again)
    (waits,) = entries().values()
    assert waits.run == preempted.run.id and waits.ticket == tickets[waits.run] and not waits.holding
    assert stations[1].enter(lambda why: False) == {}, "there is room for both"
    assert stations[0].enter(lambda why: False) == {}
    assert {run: entry.ticket for run, entry in entries().items()} == tickets
    for one in stations:
        one.last_act(ended=True)
    assert not entries()


def test_a_queue_that_cannot_be_had_is_waited_for(toy: Make) -> None:
    run = station(toy())
    said: list[str] = []
    with queue.held(0):
        calls = itertools.count()
        assert run.enter(lambda why: said.append(why) is None and next(calls) < 3) is None
    assert set(said) == {f"waiting for 2 CPU workers: somebody else has the lock of {queue.folder()}"}
    queue.folder().rmdir()
    queue.folder().write_text("a file")
    said.clear()
    assert run.enter(lambda why: bool(said.append(why))) is None
    assert "Not a directory" in said[0]


def test_an_entry_that_somebody_cleans_away_is_written_again(toy: Make) -> None:
    run = station(toy())
    assert run.enter(lambda why: False) == {}
    (entry,) = entries().values()
    (queue.folder() / entry.key).unlink()
    assert run.parting() is None
    assert entries() == {entry.run: entry}


def test_another_supervisor_of_the_run_keeps_its_entry(toy: Make) -> None:
    made = toy()
    one = station(made)
    assert one.enter(lambda why: False) == {}
    (entry,) = entries().values()
    occupy(2, key=entry.key, run=entry.run, supervisor=(1, 1), guard=entry.supervisor)
    one.last_act(ended=True)
    assert entries()[entry.run].supervisor == (1, 1)


def test_the_wait_for_a_first_start_is_not_that_of_a_later_one(
    toy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCH_CPU_SLOTS", "2")
    occupy(1)
    run = toy(resources={"max_wait": "1s"})
    with pytest.raises(Refused, match="waited 1 s"):
        station(run).enter(lambda why: time.sleep(0.1) is None)
    run.run.attempts.write_text('{"event": "start", "attempt": 1}\n')
    calls = itertools.count()
    assert station(run).enter(lambda why: time.sleep(0.1) is None and next(calls) < 20) is None
