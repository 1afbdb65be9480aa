"""The supervisor with real torchrun and two real workers: how attempts end, and what is left."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli import submit
from launcher.errors import UserError
from launcher.mirror.ownership import Ownership, Pulse
from launcher.rundir import read_json, write_json
from launcher.storage.folder import FolderStore
from launcher.supervisor import control, processes
from tests.launcher.conftest import TOY, Toy, in_sessions, sessions, wait

Make = Callable[..., Toy]


def test_preempted_run_comes_back_with_nothing_lost(toy: Make) -> None:
    run = toy("--steps 12 --wait-at 7 --every 100").start()
    run.at(7)
    first = run.workers()
    groups = sessions(first)
    assert len(first) >= 3, "torchrun and two workers"
    control.preempt(run.run)
    assert not any(process.alive for process in first) and not in_sessions(groups)
    assert run.end() == 0
    assert run.states == ["preempted", "finished"]
    preempted, finished = run.ends
    assert preempted["saved"] and preempted["step"] == 7 == finished["resumed"]
    assert preempted["seconds_to_stop"] < 15
    assert run.final["lost_steps"] == 0 and run.final["attempts"] == 2 and run.final["state"] == "finished"
    run.assert_undisturbed(12)
    assert run.run.run_log.read_text() == run.window
    run.assert_gone()


def test_sigterm_again_during_a_slow_save_changes_nothing(toy: Make) -> None:
    run = toy("--steps 9 --wait-at 4 --every 100 --save 1.5").start()
    run.at(4)
    os.kill(run.supervisor, signal.SIGTERM)
    wait("the save", lambda: "saving" in run.run.heartbeat.read_text())
    os.kill(run.supervisor, signal.SIGTERM)
    assert run.guard
    os.kill(run.guard.pid, signal.SIGTERM)
    for worker in run.workers():  # a cluster may signal everybody
        worker.signal(signal.SIGTERM)
    assert run.end() == 0
    assert run.states == ["preempted", "finished"]
    assert run.ends[0]["saved"] and run.final["lost_steps"] == 0
    run.assert_undisturbed(9)


@pytest.mark.soak
def test_a_save_may_take_longer_than_torchruns_own_patience(toy: Make) -> None:
    """Left alone, torchrun kills its workers 30 s after a signal."""
    run = toy("--steps 6 --wait-at 4 --every 100 --save 33", grace=40).start()
    run.at(4)
    os.kill(run.supervisor, signal.SIGTERM)
    wait("the end of the attempt", lambda: run.ends)
    assert run.states == ["preempted"] and run.ends[0]["saved"] and run.ends[0]["seconds_to_stop"] > 33
    control.stop(run.run)


def test_sigterm_before_the_program_can_save_is_no_crash(toy: Make) -> None:
    run = toy("--steps 3 --late 3", crashes=0).start()
    wait("the first words", lambda: run.run.rank_log(1, 0).exists() and run.run.rank_log(1, 0).read_text())
    os.kill(run.supervisor, signal.SIGTERM)
    assert run.end() == 0
    assert run.states == ["preempted", "finished"] and run.ends[0]["saved"] is False


def test_program_that_ignores_signals_is_killed_when_the_grace_is_over(toy: Make) -> None:
    run = toy("--steps 100000 --deaf", grace=2).start()
    run.at(2)
    wait("torchrun, two workers and a child of each", lambda: len(run.workers()) >= 5)
    first = run.workers()
    groups = sessions(first)
    control.stop(run.run)
    assert not any(process.alive for process in first) and not in_sessions(groups)
    assert run.states == ["stopped"] and run.ends[0]["saved"] is False
    assert run.final["state"] == "stopped" and run.end() == 0
    assert not processes.of_run(run.run.path)


def test_stop_ends_the_run_and_resume_goes_on(toy: Make) -> None:
    run = toy("--steps 10 --wait-at 6 --every 100").start()
    run.at(6)
    first = processes.of_run(run.run.path)
    groups = sessions(first)
    control.stop(run.run)
    assert not any(process.alive for process in first) and not in_sessions(groups)
    assert run.end() == 0 and run.final["state"] == "stopped" and run.final["step"] == 6
    with pytest.raises(UserError, match="has ended already"):
        control.stop(run.run)
    with pytest.raises(UserError, match="is not running"):
        control.preempt(run.run)
    submit.adopt(run.run, "local", elsewhere=False)
    assert run.start().end() == 0
    assert run.final["state"] == "finished" and run.states == ["finished"], "crashes count anew"
    assert run.final["lost_steps"] == 0 and not run.run.stop_requested.exists()
    run.assert_undisturbed(10)


def test_resume_that_is_refused_leaves_the_end_as_it_was(toy: Make, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    other = Ownership(store)
    other.claim("another machine's", 7)
    pulse = Pulse(other)
    pulse.start()
    run = toy("--steps 3", url=store.url)
    write_json(run.run.final, {"schema": 1, "state": "stopped"})
    assert run.start().end() == 4
    pulse.stop()
    assert run.final == {"schema": 1, "state": "stopped"} and "is held by attempt 7" in run.window


def test_restore_that_is_cut_short_is_waited_for(toy: Make, tmp_path: Path) -> None:
    """The store has step 8 of attempt 2, the folder step 4: going on from that would supersede it."""
    store = tmp_path / "store"
    run = toy("--steps 12 --every 4 --wait-at 4", url=store.as_uri()).start()
    run.at(4)
    wait("step 4", lambda: (read_json(run.run.synced) or {}).get("step") == 4)
    control.stop(run.run)
    assert run.end() == 0
    metrics = run.run.metrics.read_bytes()
    newer = store / "checkpoints" / "step-00000008-fence-2"
    shutil.copytree(run.run.checkpoints / "step-00000004-fence-1", newer)
    data = json.dumps({"step": 8, "sum": sum(range(8))}).encode()
    (newer / "train.pth").write_bytes(data)
    file = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_json(newer / "manifest.json", {"schema": 1, "step": 8, "fence": 2, "files": {"train.pth": file}})
    more = [json.dumps({"step": step, "sum": sum(range(step))}) + "\n" for step in range(5, 9)]
    (store / "metrics.jsonl").write_bytes(metrics + "".join(more).encode())
    run.run.metrics.unlink()
    run.run.metrics.mkdir()  # even root cannot rename a file over a folder
    before = run.run.attempts.read_bytes()
    for stopped in (True, False):
        submit.adopt(run.run, "local", elsewhere=False)
        run.start()
        wait("the wait", lambda: run.window.count("waiting for the store") == 2 - stopped)  # noqa: B023
        assert run.run.attempts.read_bytes() == before and run.final["state"] == "stopped"
        if stopped:
            control.stop(run.run)
            assert run.end() == 0 and (store / "metrics.jsonl").stat().st_size > len(metrics)
    run.run.metrics.rmdir()
    assert run.end() == 0 and run.final["state"] == "finished"
    assert run.window.count("waiting for the store") == 2 and run.ends[-1]["resumed"] == 8
    run.assert_undisturbed(12)


def test_stop_of_a_run_that_is_coming_up_again(toy: Make) -> None:
    run = toy("--steps 100000 --every 100000")
    write_json(run.run.final, {"schema": 1, "state": "failed"})
    run.start()
    wait("the guard to be known", lambda: processes.keepers(run.run.path))
    control.stop(run.run)
    assert run.end() == 0 and run.final["state"] == "stopped"


def test_ctrl_c_stops_and_saves(toy: Make) -> None:
    run = toy("--steps 100000 --every 100000").start()
    run.at(3)
    assert run.guard
    os.kill(run.guard.pid, signal.SIGINT)
    assert run.end() == 0
    assert run.final["state"] == "stopped" and run.ends[0]["saved"] and "Ctrl-C" in run.final["reason"]


def test_killed_worker_is_a_crash_and_the_run_comes_back(toy: Make) -> None:
    run = toy("--steps 12 --wait-at 8 --every 3").start()
    run.at(8)
    other = [process for process in run.workers(1) if b"\0RANK=1\0" in environ(process)]
    other[0].signal(signal.SIGKILL)
    assert run.end() == 0
    assert run.states == ["crashed", "finished"]
    assert "rank 1 was killed by SIGKILL" in run.ends[0]["reason"]
    run.assert_undisturbed(12)


def environ(process: processes.Process) -> bytes:
    with open(f"/proc/{process.pid}/environ", "rb") as file:  # noqa: PTH123
        return b"\0" + file.read()


def test_crash_is_told_and_survived(toy: Make) -> None:
    run = toy("--steps 9 --every 4 --crash-at 6 --once").start()
    assert run.end() == 0
    assert run.states == ["crashed", "finished"]
    crashed, finished = run.ends
    assert crashed["reason"] == "rank 0 exited with 1: RuntimeError: told to crash at step 6"
    assert crashed["step"] == 6 and finished["resumed"] == 4 and run.final["lost_steps"] == 2
    run.assert_undisturbed(9)


def test_three_crashes_at_one_step_give_up(toy: Make) -> None:
    run = toy("--steps 9 --every 100 --crash-at 2").start()
    assert run.end() == 1
    assert run.states == ["crashed"] * 3
    assert run.final["state"] == "failed" and "3 crashes in a row" in run.final["reason"]
    assert "rank 0 exited with 1: RuntimeError: told to crash at step 2" in run.final["reason"]
    assert run.final["reason"] in run.window
    run.assert_gone()


def test_hang_is_noticed_and_survived(toy: Make) -> None:
    run = toy("--steps 8 --every 100 --hang-at 5 --once").start()
    assert run.end() == 0
    assert run.states == ["hung", "finished"]
    assert "no progress in training at step 5 for 3 s" in run.ends[0]["reason"]


# The second attempt hangs before it says anything. It takes the heartbeat of the first with it, without which
# the third need not speak up in time: on a busy machine it may not.
SILENT = """
import os, pathlib, signal, sys, time
def leave(*signal):
    pathlib.Path(os.environ["LAUNCH_RUN_DIR"], "heartbeat.json").unlink(missing_ok=True)
    sys.exit(1)
if os.environ["LAUNCH_ATTEMPT"] == "2":
    signal.signal(signal.SIGTERM, leave)
    time.sleep(600)
"""


def test_hang_before_the_first_heartbeat_is_noticed(toy: Make) -> None:
    run = toy("--steps 8 --every 4 --crash-at 6 --once", hang=8)
    late = run.run.path.parent / "late.py"
    late.write_text(SILENT + TOY.read_text())
    recipe = run.run.recipe.read_text()
    assert str(TOY) in recipe
    run.run.recipe.write_text(recipe.replace(str(TOY), str(late)))
    assert run.start().end() == 0
    assert run.states == ["crashed", "hung", "finished"] and run.final["lost_steps"] == 2
    assert run.ends[1]["reason"].startswith("no heartbeat within 8 s of its start")


def test_program_that_says_failed_is_not_started_again(toy: Make) -> None:
    run = toy(["--fail", "the data set is empty"]).start()
    assert run.end() == 1
    assert run.states == ["failed"] and run.final["reason"] == "the data set is empty"


def test_second_supervisor_leaves(toy: Make) -> None:
    run = toy("--steps 100000").start()
    run.at(1)
    second = Toy.__new__(Toy)
    second.run = run.run
    assert second.start().end() == 4
    assert f"is already held by process {run.supervisor}" in run.window
    with pytest.raises(UserError, match="being stopped already"):
        run.run.stop_requested.touch()
        control.stop(run.run)
    assert run.end() == 0 and run.states == ["stopped"]


def test_plain_script_without_the_contract_finishes(toy: Make) -> None:
    run = toy(["done"], script="print('plain words')").start()
    assert run.end() == 0
    assert run.final["state"] == "finished" and "plain words\n" in run.window


def test_full_disk_does_not_end_the_run(toy: Make) -> None:
    run = toy("--steps 6 --every 3 --crash-at 4 --once")
    run.run.logs.mkdir()
    run.run.run_log.symlink_to("/dev/full")
    run.run.attempts.mkdir()  # and one that cannot be written at all
    assert run.start().end() == 0
    assert run.final["state"] == "finished" and "No space left" in run.window
    run.assert_undisturbed(6)


def test_mirrored_run_ends_with_everything_in_the_store(toy: Make, tmp_path: Path) -> None:
    store = tmp_path / "store" / "somebody" / "toy"
    run = toy("--steps 8 --wait-at 5 --every 3", url=store.as_uri()).start()
    run.at(5)
    control.preempt(run.run)
    assert run.end() == 0
    assert run.states == ["preempted", "finished"] and run.final["lost_steps"] == 0
    assert run.final["synced"]["step"] == 8 and run.final["synced"]["error"] is None
    for name in (
        "final.json",
        "metrics.jsonl",
        "attempts.jsonl",
        "logs/run.log",
        "logs/attempt-2/rank-1.log",
    ):
        assert (store / name).read_bytes() == (run.run.path / name).read_bytes(), name
    assert (store / "checkpoints" / "step-00000008-fence-2" / "manifest.json").exists()
    assert (read_json(store / "owner.json") or {})["ended"] is True
