"""The queue of a workstation: its order as a pure function, and files that many users write side by side."""

import fcntl
import json
import os
import random
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import LaunchError, UserError
from launcher.rundir import RunDir
from launcher.workstation import devices, order, queue
from launcher.workstation.order import Claim, decide

CARDS = tuple(f"GPU-{number}" for number in range(4))


def claim(
    key: str,
    wants: int = 1,
    ticket: int = 0,
    priority: int = 0,
    preemptible: bool = False,
    holding: bool = False,
    kind: str = "workers",
) -> Claim:
    return Claim(
        key=key,
        run=key,
        priority=priority,
        ticket=ticket or ord(key[0]),
        preemptible=preemptible,
        wants={kind: wants},
        holding=holding,
    )


def test_priority_goes_first_then_the_ticket() -> None:
    line = order.line([claim("a"), claim("b"), claim("c", priority=1), claim("d", holding=True)])
    assert [one.key for one in line] == ["c", "a", "b"]


def test_who_does_not_fit_blocks_those_behind_it() -> None:
    claims = [claim("a", 2, holding=True), claim("b", 3), claim("c", 1), claim("d", 1, priority=1)]
    assert decide(claims, {"workers": 4}, set()).granted.keys() == {"d"}, "c would fit, but b is before it"


def test_who_wants_of_nothing_that_is_short_need_not_wait() -> None:
    claims = [claim("a", 4, holding=True), claim("b", 1), claim("c", 100, kind="memory"), claim("d", 9)]
    assert decide(claims, {"workers": 4, "memory": 200}, set()).granted.keys() == {"c"}
    assert decide(claims, {}, set()).granted.keys() == {"b", "c", "d"}, "without a limit nobody waits"


def test_runs_on_other_gpus_need_not_wait_for_each_other() -> None:
    left = replace(claim("a", 2, kind="gpus"), visible=CARDS[:2], holding=True, devices=CARDS[:2])
    waits = replace(claim("b", 1, kind="gpus"), visible=CARDS[:2])
    right = replace(claim("c", 1, kind="gpus"), visible=CARDS[2:])
    assert decide([left, waits, right], {}, set()).granted == {"c": CARDS[2:3]}


def test_a_gpu_that_somebody_else_uses_is_not_given() -> None:
    held = replace(claim("a", 1, kind="gpus"), visible=CARDS, holding=True, devices=CARDS[:1])
    wants = replace(claim("b", 2, kind="gpus"), visible=CARDS)
    busy = {CARDS[0], CARDS[1]}
    assert decide([held, wants], {}, busy).granted == {"b": CARDS[2:4]}
    assert not decide([held, replace(wants, wants={"gpus": 3})], {}, busy).granted


def test_the_lowest_and_youngest_give_way_and_no_more_than_needed() -> None:
    holders = [
        claim("a", 1, preemptible=True, holding=True),
        claim("b", 1, preemptible=True, holding=True),
        claim("c", 1, preemptible=True, holding=True, priority=-1),
        claim("d", 1, holding=True, priority=-2),
    ]

    def giving_way(wants: int, priority: int) -> set[str]:
        decision = decide([*holders, claim("x", wants, priority=priority)], {"workers": 4}, set())
        assert not decision.granted, "they have not left yet"
        return set(decision.gives_way)

    assert giving_way(1, 1) == {"c"}
    assert giving_way(2, 1) == {"c", "b"}
    assert giving_way(3, 1) == {"a", "b", "c"}
    assert giving_way(4, 1) == set(), "d is not preemptible, so it would be for nothing"
    assert giving_way(1, 0) == {"c"} and giving_way(2, 0) == set(), "only lower priorities give way"
    assert giving_way(1, -1) == set()


def test_nobody_gives_way_whose_leaving_would_not_help() -> None:
    cards = replace(claim("a", 1, kind="gpus", preemptible=True), visible=CARDS[:1], devices=CARDS[:1])
    holders = [replace(cards, holding=True, ticket=999), claim("b", 4, preemptible=True, holding=True)]
    both = replace(claim("x", priority=1), wants={"gpus": 1, "workers": 2}, visible=CARDS[:2])
    assert set(decide([*holders, both], {"workers": 4}, set()).gives_way) == {"b"}


def test_two_that_wait_do_not_drive_out_more_than_the_first_needs() -> None:
    holders = [claim(key, 2, preemptible=True, holding=True) for key in "ab"]
    claims = [*holders, claim("x", 2, priority=2), claim("y", 2, priority=1)]
    assert decide(claims, {"workers": 4}, set()).gives_way.keys() == {"b"}


@pytest.mark.parametrize("seed", range(40))
def test_a_random_machine_is_never_overbooked_and_nobody_is_overtaken(seed: int) -> None:
    """Runs come, are granted, give way and end at random; every grant is checked against all who waited."""
    dice = random.Random(seed)
    totals = {"workers": dice.randint(2, 6), "memory": 10}
    claims: dict[str, Claim] = {}
    to_come, ended = 25, 0
    for turn in range(2000):
        if ended == 25:
            break
        if to_come and dice.random() < 0.4:
            to_come -= 1
            wants = {"workers": dice.randint(1, totals["workers"])}
            wants |= {"memory": dice.randint(1, 10)} if dice.random() < 0.3 else {}
            wants |= {"gpus": dice.randint(1, 4)} if dice.random() < 0.3 else {}
            made = claim(f"{to_come:02}", ticket=turn + 1, priority=dice.randint(-1, 1))
            claims[made.key] = replace(made, wants=wants, visible=CARDS, preemptible=dice.random() < 0.5)
        before = list(claims.values())
        decision = decide(before, totals, set())
        for key, cards in decision.granted.items():
            overtaken = [
                one for one in order.line(before) if (-one.priority, one.ticket) < order_of(claims[key])
            ]
            assert all(one.key in decision.granted or not shares(one, claims[key]) for one in overtaken)
            claims[key] = replace(claims[key], holding=True, devices=cards)
        for key, after in decision.gives_way.items():
            assert claims[key].preemptible and claims[key].priority < after.priority
            claims[key] = replace(claims[key], holding=False, devices=())
        holding = [one for one in claims.values() if one.holding]
        for kind, total in totals.items():
            assert sum(one.wants.get(kind, 0) for one in holding) <= total
        cards_held = [card for one in holding for card in one.devices]
        assert len(cards_held) == len(set(cards_held))
        assert all(len(one.devices) == one.wants.get("gpus", 0) for one in holding)
        if holding and dice.random() < 0.3:
            del claims[dice.choice(holding).key]
            ended += 1
    assert ended == 25, "somebody waits for ever"


def order_of(one: Claim) -> tuple[int, int]:
    return -one.priority, one.ticket


def shares(one: Claim, other: Claim) -> bool:
    return bool(set(one.wants) & set(other.wants))


def entry(run: RunDir, **changes: object) -> queue.Entry:
    made = queue.Entry(
        key=queue.key(run), run=run.id, priority=0, ticket=7, preemptible=False, wants={"workers": 2},
        folder=str(run.path), uid=os.getuid(), boot="b", supervisor=(1, 2), guard=None, grace=20.0,
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "toy-20260101-120000-beef")


def test_what_is_written_is_read_and_everybody_may_add(run: RunDir) -> None:
    written = entry(run, devices=CARDS[:2], guard=(3, 4), visible=CARDS, preemptible=True)
    before = os.umask(0o077)
    try:
        with queue.held(0) as files:
            files.write(written)
            assert files.entries() == [written]
    finally:
        os.umask(before)
    assert stat.S_IMODE(queue.folder().stat().st_mode) == 0o1777
    assert stat.S_IMODE((queue.folder() / written.key).stat().st_mode) == 0o644
    (queue.folder() / f".{written.key}.tmp-1-00").touch()  # of a writer that was killed
    with queue.opened() as files:
        files.remove(written.key)
        files.remove(written.key)
    assert not list(queue.folder().iterdir())


def test_a_copy_of_a_run_in_another_folder_has_a_file_of_its_own(run: RunDir, tmp_path: Path) -> None:
    assert queue.key(run) != queue.key(RunDir(tmp_path / "copy" / run.id))


def test_what_is_no_entry_is_passed_over(run: RunDir, tmp_path: Path) -> None:
    good = entry(run)
    with queue.held(0) as files:
        files.write(good)
    said = json.loads((queue.folder() / good.key).read_text())
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps(said))
    (queue.folder() / "link.json").symlink_to(secret)
    os.mkfifo(queue.folder() / "pipe.json")
    (queue.folder() / "folder.json").mkdir()
    wrong = {
        "torn": json.dumps(said)[:40],
        "list": "[]",
        "deep": "[" * 60000,
        "huge": json.dumps(said | {"more": "x" * 70000}),
        "liar": json.dumps(said | {"uid": os.getuid() + 1}),
        "escape": json.dumps(said | {"run": "a\x1b[2Jb"}),
        "negative": json.dumps(said | {"wants": {"workers": -4}}),
        "unknown": json.dumps(said | {"wants": {"souls": 4}}),
        "wants": json.dumps(said | {"wants": 4}),
        "infinite": json.dumps(said | {"ticket": float("inf")}),
    }
    for name, text in wrong.items():
        (queue.folder() / f"{name}.json").write_text(text)
    with queue.opened() as files:
        assert files.entries() == [good]


def test_one_lock_for_all(run: RunDir) -> None:
    with queue.held(0):
        with pytest.raises(queue.Busy), queue.held(0.2):
            pass
        script = "import sys; from launcher.workstation import queue\nwith queue.held(0): pass"
        other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert other.returncode == 1 and "Busy" in other.stderr
    with queue.held(0):
        pass


def test_a_folder_that_is_a_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.check()
    assert not queue.folder().exists(), "to check makes nothing"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("LAUNCH_QUEUE", str(tmp_path / "link"))
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError), queue.opened():
        pass
    with pytest.raises(UserError, match="is no folder"):
        queue.check()


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, cards: int = 4) -> Path:
    """An nvidia-smi that stands in for hardware; the file it returns: which GPUs processes compute on."""
    apps = folder / "apps"
    apps.touch()
    listed = "".join(f"{number}, GPU-{number}\\n" for number in range(cards))
    tool = folder / "bin" / "nvidia-smi"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f'#!/bin/sh\ncase "$1" in --query-gpu=*) printf "{listed}";; *) cat {apps};; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return apps


def test_gpus_are_those_that_the_caller_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apps = smi(tmp_path, monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.gpus() == CARDS and devices.busy() == set()
    for mask, seen in {"": (), "3,1": ("GPU-3", "GPU-1"), "GPU-2": ("GPU-2",), "0,-1,1": ("GPU-0",)}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
        assert devices.gpus() == seen, mask
    apps.write_text("GPU-2, 4711\nGPU-2, 4712\n")
    assert devices.busy() == {"GPU-2"}
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho Failed to initialize NVML\nexit 9\n")
    with pytest.raises(LaunchError, match="nvidia-smi failed: Failed to initialize NVML"):
        devices.busy()


def test_what_there_is_and_what_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    there = devices.totals()
    assert there["cpus"] >= 1 and there["memory"] > 100 and "workers" not in there
    assert not devices.lacking({"workers": 10**6}, there)
    monkeypatch.setenv("LAUNCH_CPU_SLOTS", "4")
    assert devices.totals()["workers"] == 4
    (wrong,) = devices.lacking({"workers": 8}, devices.totals()).values()
    assert wrong.startswith("this machine has 4 slots for CPU workers (LAUNCH_CPU_SLOTS), the recipe asks")
    monkeypatch.setenv("LAUNCH_CPU_SLOTS", "many")
    with pytest.raises(UserError, match="LAUNCH_CPU_SLOTS is 'many'"):
        devices.totals()
    assert devices.words({"gpus": 1, "cpus": 8, "memory": 30720}) == "1 GPU, 8 cores and 30 GB of memory"


def test_the_lock_is_that_of_the_folder_itself() -> None:
    """So that nothing has to be made in it, and any program can hold it."""
    with queue.opened():
        pass
    fd = os.open(queue.folder(), os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(queue.Busy), queue.held(0):
        pass
    os.close(fd)
