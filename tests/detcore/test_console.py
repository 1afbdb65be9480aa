"""A bar where a person watches, plain lines everywhere else."""

import os
import pty
import subprocess
import sys

import pytest

from detcore.console import duration

PROGRAM = """
from detcore.console import Console
console = Console({active}, 10)
for step in range(1, 11):
    console.show(step, 0.5)
console.say("step 10/10  [loss] 0.5")
console.close()
"""


def shown(active: bool = True, terminal: bool = False, **env: str) -> str:
    """What the program writes to stdout and stderr."""
    argv = [sys.executable, "-c", PROGRAM.format(active=active)]
    environ = os.environ | {"TERM": "xterm", "COLUMNS": "100"} | env
    if not terminal:
        done = subprocess.run(argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.stdout
    ours, theirs = pty.openpty()
    subprocess.run(argv, env=environ, stdout=theirs, stderr=theirs, check=True)
    os.close(theirs)
    words = b""
    while True:
        try:
            words += os.read(ours, 65536)
        except OSError:  # all of it was read
            os.close(ours)
            return words.decode()


def test_a_terminal_has_a_bar_below_the_lines() -> None:
    told = shown(terminal=True)
    assert "10/10" in told and "loss 0.500" in told and "\x1b[" in told and "━" in told
    assert "step 10/10  [loss] 0.5" in told


@pytest.mark.parametrize(
    ("terminal", "env"), [(False, {}), (True, {"LAUNCH_RUN_ID": "toy"})], ids=["a log", "under the launcher"]
)
def test_elsewhere_there_are_only_lines(terminal: bool, env: dict[str, str]) -> None:
    told = shown(terminal=terminal, **env)
    assert told.replace("\r", "") == "step 10/10  [loss] 0.5\n"


def test_other_ranks_say_nothing() -> None:
    assert shown(active=False) == shown(active=False, terminal=True) == ""


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 3600, 90061)] == [
        "0:00:00",
        "0:01:00",
        "1:00:00",
        "25:01:01",
    ]
