"""Whoever is killed, nothing is left behind and the run comes back."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli import status
from launcher.rundir import read_json, write_json
from launcher.supervisor import control, guard, lease, processes, restart
from tests.launcher.conftest import Toy, in_sessions, sessions, wait

Make = Callable[..., Toy]


def test_killed_supervisor_loses_nothing(toy: Make) -> None:
    run = toy("--steps 12 --wait-at 7 --every 100").start()
    run.at(7)
    first = run.workers(1)
    groups = sessions(first)
    killed = run.supervisor
    os.kill(killed, signal.SIGKILL)
    run.at(8, attempt=2)
    assert not any(process.alive for process in first) and not in_sessions(groups)
    assert run.supervisor != killed
    assert run.end() == 0
    assert run.states == ["preempted", "finished"] and run.ends[0]["saved"], "the guard let the program save"
    assert run.final["lost_steps"] == 0
    assert "the supervisor was killed by SIGKILL" in run.window
    run.assert_undisturbed(12)
    run.assert_gone()


def test_a_supervisor_killed_before_it_has_the_run(toy: Make) -> None:
    """A lease that an earlier place let go of, on its way out, says nothing of this supervisor."""
    run = toy("--steps 4 --every 100")
    write_json(run.run.lease, {"schema": 1, "token": "earlier", "fence": 0, "ended": True, "leaving": True})
    run.start()
    assert run.guard
    guard_pid = run.guard.pid
    wait("a supervisor", lambda: [p for p in processes.keepers(run.run.path) if p.parent == guard_pid])
    for process in processes.keepers(run.run.path):
        if process.parent == guard_pid:
            process.signal(signal.SIGKILL)
    assert run.end() == 0 and run.final["state"] == "finished"
    assert "the supervisor was killed by SIGKILL" in run.window


def test_killed_supervisor_and_guard(toy: Make) -> None:
    """The orphans train on with nobody above them; the next supervisor ends them first, and they save."""
    run = toy("--steps 100000 --every 100000", grace=10).start()
    run.at(3)
    orphans = run.workers(1)
    groups = sessions(orphans)
    assert run.guard
    os.kill(run.guard.pid, signal.SIGKILL)
    os.kill(run.supervisor, signal.SIGKILL)
    assert run.end() == -signal.SIGKILL
    assert any(process.alive for process in orphans)
    run.start()
    run.at(1, attempt=2)
    assert not any(process.alive for process in orphans) and not in_sessions(groups)
    resumed = (read_json(run.run.heartbeat) or {})["resumed"]
    assert run.states == ["preempted"] and run.ends[0]["saved"] and run.ends[0]["step"] == resumed >= 3
    control.stop(run.run)
    assert run.end() == 0 and run.final["lost_steps"] == 0


def test_stop_of_a_run_that_everybody_above_it_has_left(toy: Make) -> None:
    run = toy("--steps 100000 --every 100000").start()
    run.at(3)
    orphans = run.workers()
    groups = sessions(orphans)
    assert run.guard
    os.kill(run.guard.pid, signal.SIGKILL)
    os.kill(run.supervisor, signal.SIGKILL)
    run.end()
    control.stop(run.run)
    assert not any(process.alive for process in orphans) and not in_sessions(groups)
    assert not processes.of_run(run.run.path)
    assert run.final["state"] == "stopped" and run.states == ["preempted"] and run.ends[0]["saved"]


def test_folder_that_cannot_be_written_is_told_in_a_sentence(toy: Make) -> None:
    run = toy("")
    run.run.lease.mkdir()  # even root cannot rename a file over a folder
    assert run.start().end() == 2
    assert f"{run.run.path} cannot be written" in run.window and "Traceback" not in run.window


def test_resume_whose_store_cannot_be_opened_goes_on_and_says_so(toy: Make) -> None:
    run = toy("--steps 4", url="s3://runs/somebody/toy/run")
    record = read_json(run.run.run) or {}
    gone = {"AWS_PROFILE": "gone", "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
    write_json(run.run.run, record | {"env": record["env"] | gone})
    write_json(run.run.final, {"schema": 1, "state": "stopped"})
    assert run.start().end() == 0
    assert run.final["state"] == "finished" and run.states == ["finished"]
    log = run.run.run_log.read_text()
    assert "going on without the store: " in log and "gone" in log and "not all of the run is in" in log


def test_end_of_an_earlier_supervisor_is_not_taken_for_that_of_this_one(
    toy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "DEATHS", 1)
    run = toy("--steps 4")
    write_json(run.run.final, {"schema": 1, "state": "stopped"})
    run.run.recipe.write_text("program: {nonsense: 1}")
    assert guard.Guard(run.run, None, os.environ).run() == 2
    assert "nonsense" in run.run.run_log.read_text(), "and what is wrong is in the log"


def test_window_gone_is_a_stop(toy: Make) -> None:
    run = toy("--steps 100000 --every 100000").start()
    run.at(2)
    assert run.guard
    os.kill(run.guard.pid, signal.SIGHUP)
    assert run.end() == 0
    assert run.final["state"] == "stopped" and run.ends[0]["saved"]
    wait("nothing of the run", lambda: not processes.of_run(run.run.path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_stop_before_the_supervisor_can_take_one(toy: Make, number: int) -> None:
    for _ in range(10):  # until one is caught that has no handler of its own yet: it dies of the signal
        run = toy("--steps 100000 --every 100000").start()
        assert run.guard
        while not (found := [one for one in processes.keepers(run.run.path) if one.parent == run.guard.pid]):
            assert run.guard.poll() is None, run.window
            time.sleep(0.002)
        young = found[0]
        young.signal(signal.SIGSTOP)
        wait("it to stand still", lambda: "State:\tT" in status_of(young))  # noqa: B023
        if not has(young, "SigCgt", signal.SIGTERM):
            break
    else:
        pytest.fail("no supervisor was young")
    os.kill(run.guard.pid, number)
    wait("the guard to pass it on", lambda: has(young, "ShdPnd", number))
    young.signal(signal.SIGCONT)
    assert run.end() == 0 and run.final["state"] == "stopped" and not run.run.attempts.exists()
    assert f"the supervisor was killed by {signal.Signals(number).name}" in run.window


def status_of(process: processes.Process) -> str:
    return Path(f"/proc/{process.pid}/status").read_text()


def has(process: processes.Process, mask: str, number: int) -> bool:
    """Whether a signal is in one of the masks of /proc/PID/status (proc(5))."""
    (line,) = [line for line in status_of(process).splitlines() if line.startswith(f"{mask}:")]
    return bool(int(line.split()[1], 16) & 1 << number - 1)


def test_killed_guard_is_not_missed(toy: Make) -> None:
    """The supervisor, an orphan now, sees the run to its end, and a stop still leaves nothing alive."""
    run = toy("--steps 12 --wait-at 5 --every 100").start()
    run.at(5)
    assert run.guard
    os.kill(run.guard.pid, signal.SIGKILL)
    assert run.end() == -signal.SIGKILL
    first = run.workers(1)
    control.preempt(run.run)
    assert not any(process.alive for process in first)
    wait("the end", lambda: run.final)
    assert run.states == ["preempted", "finished"] and run.final["lost_steps"] == 0
    run.assert_undisturbed(12)
    run.assert_gone()

    run = toy("--steps 100000 --every 100000").start()
    run.at(3)
    assert run.guard
    os.kill(run.guard.pid, signal.SIGKILL)
    run.end()
    control.stop(run.run)
    assert not processes.of_run(run.run.path)
    assert run.final["state"] == "stopped" and run.ends[0]["saved"]


def test_supervisor_that_dies_again_and_again_is_given_up(toy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no supervisor gets further than the one before it, the guard says what to type, and leaves."""
    monkeypatch.setattr(guard, "DEATHS", 3)  # the pauses before them double: 0, 1, 3, 7 s
    run, killed = toy("--steps 5"), list[int]()

    def killer() -> None:
        while len(killed) < guard.DEATHS:
            holder = lease.holder(run.run)
            if holder and holder.alive and holder.pid not in killed:
                killed.append(holder.pid)
                os.kill(holder.pid, signal.SIGKILL)
            time.sleep(0.005)

    thread = threading.Thread(target=killer, daemon=True)
    thread.start()
    assert guard.Guard(run.run, None, os.environ).run() == restart.FAILED
    thread.join()
    log = run.run.run_log.read_text()
    assert log.count("the supervisor was killed by SIGKILL") == 3
    assert "died 3 times without a new checkpoint: given up; `launch resume" in log
    assert not processes.of_run(run.run.path) and status.row(run.run)["state"] == "lost"
    assert run.start().end() == 0 and run.final["state"] == "finished"
    run.assert_undisturbed(5)
