"""Whoever is killed, nothing is left behind and the run comes back."""

import os
import signal
from collections.abc import Callable

from launcher.rundir import read_json
from launcher.supervisor import control, processes
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


def test_window_gone_is_a_stop(toy: Make) -> None:
    run = toy("--steps 100000 --every 100000").start()
    run.at(2)
    assert run.guard
    os.kill(run.guard.pid, signal.SIGHUP)
    assert run.end() == 0
    assert run.final["state"] == "stopped" and run.ends[0]["saved"]
    wait("nothing of the run", lambda: not processes.of_run(run.run.path))
