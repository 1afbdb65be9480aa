"""A tmux window per run, in one session: tmux gets an argv, no keys are typed and no shell is in between.

The window goes when its run has finished or was stopped, and stays with its last lines after a failure.
Commands and options: tmux(1).
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from launcher.backends.base import OneMachine
from launcher.errors import LaunchError, UserError
from launcher.recipe import Recipe, load_frozen
from launcher.recipe.document import Problem
from launcher.rundir import RunDir, read_json
from launcher.supervisor.guard import OF_THE_WINDOW

OLDEST = (3, 2)  # the first whose remain-on-exit knows `failed`
SCROLLBACK = "100000"  # lines


class Tmux(OneMachine):
    name = "tmux"

    def check(self, recipe: Recipe) -> Iterator[Problem]:
        yield from super().check(recipe)
        if shutil.which("tmux") is None:
            raise UserError("there is no tmux here", "Install it, or use `--backend local`.")
        version = subprocess.run(["tmux", "-V"], capture_output=True, text=True).stdout.strip()
        number = re.search(r"(\d+)\.(\d+)", version)
        if number and (int(number[1]), int(number[2])) < OLDEST:
            raise UserError(f"{version} is too old: 3.2 is needed", "Update it, or use `--backend local`.")

    def start(self, run: RunDir, gpus: int | None, nodes: int | None = None) -> None:
        session = load_frozen(run.recipe).tmux.session
        workdir = (read_json(run.run) or {}).get("workdir") or "/"
        old = _windows(run)
        # The options that new windows begin with have to be there before the first, so the session opens with
        # a window that is taken away again.
        made = tmux(
            "new-session", "-d", "-s", session, "-P", "-F", "#{window_id}", "sleep", "60", check=False
        )
        first = made.stdout.strip() if made.returncode == 0 else None
        tmux("set-option", "-t", f"={session}:", "history-limit", SCROLLBACK)
        argv = [
            sys.executable,
            "-P",
            "-m",
            "launcher.backends.window",
            str(run.path),
            *(["--gpus", str(gpus)] if gpus else []),
        ]
        told = ["-d", "-P", "-F", "#{window_id}", "-t", f"={session}:", "-n", run.id, "-c", workdir]
        window = tmux("new-window", *told, "--", *argv).stdout.strip()
        for option, value in (
            ("remain-on-exit", "failed"),
            ("automatic-rename", "off"),
            ("allow-rename", "off"),
        ):
            tmux("set-option", "-w", "-t", window, option, value, check=False)  # it may have ended already
        for gone in [*old, *filter(None, [first])]:
            tmux("kill-window", "-t", gone, check=False)

    def close(self, run: RunDir) -> None:
        if shutil.which("tmux"):
            for window in _windows(run):
                tmux("kill-window", "-t", window, check=False)

    def attach(self, run: RunDir) -> None:
        windows = _windows(run)
        if not windows:
            raise UserError(
                f"run {run.id} has no window any more", f"`launch logs {run.id}` shows what it said."
            )
        tmux("select-window", "-t", windows[-1])
        session = tmux("display-message", "-p", "-t", windows[-1], "#{session_name}").stdout.strip()
        if _inside():
            tmux("switch-client", "-t", windows[-1])
            return
        argv = [*_command(), "attach-session", "-t", f"={session}"]
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            print(f"This is no terminal; in one, type: {' '.join(argv)}")
            return
        environ = {name: value for name, value in os.environ.items() if name != "TMUX"}
        subprocess.run(argv, env=environ)


def _windows(run: RunDir) -> list[str]:
    """The ids of the windows of the run, oldest first."""
    told = tmux("list-windows", "-a", "-F", "#{window_id} #{window_name}", check=False).stdout
    pairs = [line.split(" ", 1) for line in told.splitlines()]
    return [pair[0] for pair in pairs if pair[-1] == run.id]


def _inside() -> bool:
    """Whether the caller sits in a window of the very server that runs live in."""
    mine = os.environ.get("TMUX", "").split(",")[0]
    socket = tmux("display-message", "-p", "#{socket_path}", check=False).stdout.strip()
    return bool(mine) and bool(socket) and Path(mine).resolve() == Path(socket).resolve()


def _command() -> list[str]:
    """$LAUNCH_TMUX_SOCKET names a server of its own (`tmux -L`); tmux itself honours $TMUX_TMPDIR."""
    name = os.environ.get("LAUNCH_TMUX_SOCKET")
    return ["tmux", *(["-L", name] if name else [])]


def tmux(*argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    # A server that we start would keep all our variables, secrets too, for whoever uses it later.
    names = (*OF_THE_WINDOW, "TMUX_TMPDIR")
    environ = {name: os.environ[name] for name in names if name in os.environ}
    done = subprocess.run([*_command(), *argv], env=environ, capture_output=True, text=True)
    if check and done.returncode != 0:
        raise LaunchError(f"tmux {argv[0]} failed: {done.stderr.strip() or done.returncode}")
    return done
