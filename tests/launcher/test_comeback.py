"""`launch resume --all`, as after a reboot: every run of this machine that nobody holds any more."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.cli import status
from launcher.rundir import read_json, write_json
from tests.launcher.conftest import Toy, wait
from tests.launcher.test_cli import launch

Make = Callable[..., Toy]


@pytest.fixture(autouse=True)
def server() -> Iterator[None]:
    yield
    if shutil.which("tmux"):
        name = os.environ["LAUNCH_TMUX_SOCKET"]
        subprocess.run(["tmux", "-L", name, "kill-server"], capture_output=True)


def ours(run: Toy, **changes: object) -> Toy:
    """Launched on this machine, long ago."""
    record = read_json(run.run.run) or {}
    write_json(run.run.run, record | {"host": socket.gethostname(), "created": 1.0} | changes)
    return run


@pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux")
def test_all_that_were_lost_come_back(toy: Make) -> None:
    killed = ours(toy("--steps 8 --wait-at 5 --every 5", name="killed")).start()
    killed.at(5)
    assert killed.guard
    os.kill(killed.guard.pid, signal.SIGKILL)
    os.kill(killed.supervisor, signal.SIGKILL)
    killed.guard.wait()
    broken = ours(toy("--steps 2", name="broken"))
    broken.run.recipe.write_text("program: {}\n")
    kept = [
        ours(toy(name="stopped")),
        ours(toy(name="elsewhere"), host="elsewhere"),
        ours(toy(name="slurm"), backend="slurm"),
    ]
    kept[0].run.stop_requested.touch()
    done = launch("resume", "--all")
    assert done.returncode == 1 and done.stdout == f"{killed.run.id} in a tmux window\n", done
    assert done.stderr.startswith(f"{broken.run.id} does not come back: "), done.stderr
    wait("the end", lambda: killed.final)
    assert killed.final["state"] == "finished" and killed.final["attempts"] == 2
    killed.assert_undisturbed(8)
    assert not any(run.run.lease.exists() for run in [broken, *kept])


def test_what_goes_with_all_and_what_does_not(toy: Make, tmp_path: Path) -> None:
    none = launch("resume", "--all")
    assert none.returncode == 0 and "was lost on this machine" in none.stdout
    for argv in (["--all", "last"], ["--all", "--follow"], ["--all", "--backend", "local"]):
        refused = launch("resume", *argv)
        assert refused.returncode == 2 and "it goes alone" in refused.stderr, refused
    nothing = launch("resume")
    assert nothing.returncode == 2 and "resume takes a RUN" in nothing.stderr
    run = ours(toy("--steps 2"))
    assert status.row(run.run)["state"] == "lost"
    alone = launch("resume", "--all", PATH=str(tmp_path))
    assert alone.returncode == 2 and "there is no tmux here" in alone.stderr, alone
