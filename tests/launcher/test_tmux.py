"""Runs in windows of a real tmux server, one of the test's own (LAUNCH_TMUX_SOCKET)."""

import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from launcher.backends import BACKENDS
from launcher.cli.remove import remove
from launcher.errors import UserError
from launcher.recipe import load_frozen
from launcher.supervisor import control
from tests.launcher.conftest import Toy, wait

Make = Callable[..., Toy]


def tmux(*argv: str) -> str:
    done = subprocess.run(
        ["tmux", "-L", os.environ["LAUNCH_TMUX_SOCKET"], *argv], capture_output=True, text=True
    )
    return done.stdout


def windows() -> list[str]:
    return tmux("list-windows", "-a", "-F", "#{window_name}").splitlines()


@pytest.fixture(autouse=True)
def server() -> Iterator[None]:
    yield
    tmux("kill-server")


def test_window_lives_as_long_as_its_run(toy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PMIX_RANK", "3")
    monkeypatch.setenv("A_SECRET", "of another job")
    run = toy("--steps 30 --wait-at 9 --every 100", backend="tmux")
    assert not list(BACKENDS["tmux"].check(load_frozen(run.run.recipe)))
    assert BACKENDS["tmux"].start(run.run, None) is None
    assert windows() == [run.run.id]
    run.at(9)
    for process in run.workers():
        with open(f"/proc/{process.pid}/environ") as file:  # noqa: PTH123
            environ = file.read()
        assert not any(name in environ for name in ("SLURM_", "PMIX_", "A_SECRET"))
        assert f"LAUNCH_RUN_ID={run.run.id}" in environ
    assert "A_SECRET" not in tmux("show-environment", "-g")
    wait("progress", lambda: "  9/30  " in tmux("capture-pane", "-p", "-t", run.run.id))
    control.preempt(run.run)
    assert windows() == [run.run.id], "a preempted run keeps its window"
    wait("the end", lambda: run.final)
    wait("the window to go", lambda: not windows())
    assert run.states == ["preempted", "finished"] and run.final["lost_steps"] == 0
    assert "9/30" not in run.run.run_log.read_text(), "redrawn progress is not for the log"
    run.assert_gone()


def test_window_of_a_failure_stays_and_shows_what_the_log_has(toy: Make) -> None:
    run = toy("--steps 150 --pace 0.002 --every 1000 --crash-at 140", crashes=0, backend="tmux")
    BACKENDS["tmux"].start(run.run, None)
    wait("the failure", lambda: run.final)
    wait("the window to be dead", lambda: tmux("list-panes", "-a", "-F", "#{pane_dead}") == "1\n")
    shown = (
        tmux("capture-pane", "-p", "-J", "-S", "-", "-t", run.run.id).split("Pane is dead")[0].splitlines()
    )
    log = run.run.run_log.read_text().splitlines()
    assert [line.rstrip() for line in shown if line.strip()] == log, "and it scrolls back to the first line"
    assert "step 1" in log and "told to crash at step 140" in log[-1]
    assert run.final["state"] == "failed"
    remove(run.run, in_store=False)
    assert not windows() and not run.run.path.exists(), "a window stays no longer than its run"


def test_stop_by_closing_the_window(toy: Make) -> None:
    run = toy("--steps 100000 --every 100000", backend="tmux")
    BACKENDS["tmux"].start(run.run, None)
    run.at(3)
    tmux("kill-window", "-t", run.run.id)
    wait("the end", lambda: run.final)
    assert run.final["state"] == "stopped" and run.ends[0]["saved"]
    run.assert_gone()


def test_attach_says_what_to_type(toy: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = toy("--steps 100000", backend="tmux")
    with pytest.raises(UserError, match="no window any more"):
        BACKENDS["tmux"].attach(run.run)
    BACKENDS["tmux"].start(run.run, None)
    BACKENDS["tmux"].attach(run.run)
    assert f"tmux -L {os.environ['LAUNCH_TMUX_SOCKET']} attach-session -t =launch" in capsys.readouterr().out


def test_attach_shows_the_window_in_a_terminal(toy: Make) -> None:
    run = toy("--steps 100000", backend="tmux")
    BACKENDS["tmux"].start(run.run, None)
    run.at(2)
    ours, theirs = pty.openpty()
    environ = os.environ | {"TERM": "xterm"}
    argv = [sys.executable, "-m", "launcher.cli", "attach", run.run.id]
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as attached:
        os.close(theirs)
        shown = b""
        while b"step 2" not in shown or run.run.id[:20].encode() not in shown:
            assert select.select([ours], [], [], 30)[0], shown
            shown += os.read(ours, 65536)
        assert tmux("list-clients", "-F", "#{session_name}") == "launch\n"
        tmux("detach-client", "-s", "launch")
        assert attached.wait(30) == 0
    os.close(ours)
    assert windows() == [run.run.id], "leaving it leaves the run alone"


def test_no_tmux(toy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as bare, pytest.raises(UserError, match="no tmux"):
        bare.setenv("PATH", "/nonexistent")
        list(BACKENDS["tmux"].check(load_frozen(toy("").run.recipe)))
