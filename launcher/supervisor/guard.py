"""The first process of a window or task: starts the supervisor, and cleans up and starts it again if it dies.

Orphans of a killed supervisor come to their nearest subreaper (PR_SET_CHILD_SUBREAPER, prctl(2)): that is us,
so they are reaped, and nothing of an attempt outlives its window.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.checkpoints import Mark, checkpoints
from launcher.environ import clean
from launcher.errors import LaunchError
from launcher.rundir import RunDir, read_json
from launcher.supervisor import processes, restart
from launcher.supervisor.console import Console

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# A cluster may send its own signal first (slurm.conf(5), send_user_signal); it means what SIGTERM means.
USER = (signal.SIGUSR1, signal.SIGUSR2)
DEATHS = 5  # deaths of the supervisor in a row without a new checkpoint after which we give up
POLL = 0.1  # seconds
# A tmux server may be months old and full of another job's variables: a window takes no others from it.
OF_THE_WINDOW = (
    *(
        "TERM",
        "COLORTERM",
        "TMUX",
        "TMUX_PANE",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "PATH",
        "LD_LIBRARY_PATH",
    ),
    *("LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "XDG_RUNTIME_DIR"),
)


class Guard:
    """`run` sees the run to its end and returns the supervisor's exit status."""

    def __init__(
        self, run: RunDir, gpus: int | None, environ: Mapping[str, str], place: Sequence[str] = ()
    ) -> None:
        self._run = run
        self._argv = [sys.executable, "-P", "-m", "launcher.supervisor", str(run.path), *place]
        self._argv += ["--gpus", str(gpus)] if gpus else []
        self._environ = clean(environ) | marks(run)
        self._console = Console(run.run_log)
        self._signals: list[int] = []
        self._stop = False
        self._before: str | None = None  # the token of the lease that it found
        self._old: dict[str, Any] | None = None  # the final.json that the supervisor found: an earlier end

    def run(self) -> int:
        deaths, newest = 0, self._newest()
        with processes.subreaper(), self._signal_handlers():
            while True:
                status = self._supervisor()
                if (known := self._known(status)) is not None:
                    return known
                now = self._newest()
                deaths = 1 if now != newest else deaths + 1
                newest = now
                words = restart.exit_words(status)
                self._console.say(f"the supervisor {words}; ending what it left, so that it can save")
                self._clean_up()
                if deaths >= DEATHS:
                    self._console.say(
                        f"the supervisor died {deaths} times without a new checkpoint: given up; "
                        f"`launch resume {self._run.id}` tries again"
                    )
                    return restart.FAILED
                self._wait(2.0 ** (deaths - 1) - 1)

    def _supervisor(self) -> int:
        """Run one; its exit status, negative for a signal."""
        self._old = read_json(self._run.final)
        self._before = (read_json(self._run.lease) or {}).get("token")
        # A process group of its own: a Ctrl-C reaches the supervisor once, through us.
        child = subprocess.Popen(
            self._argv,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=_ignore_user_signals,  # which reach it directly, too, on some clusters
        )
        if self._stop:
            self._run.stop_requested.touch()
        while child.returncode is None:
            for number in self._take_signals():
                self._stop = (
                    self._stop or number != signal.SIGTERM
                )  # it may die of it: then the next one stops
                os.kill(child.pid, number)  # not reaped yet, so the pid is still its own
            self._reap(child)
            time.sleep(POLL)
        return child.returncode

    def _reap(self, child: subprocess.Popen[bytes] | None = None) -> None:
        """Reap the child and whatever orphans came to us."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if child and ended[0] == child.pid:
                    child.returncode = os.waitstatus_to_exitcode(ended[1])

    def _known(self, status: int) -> int | None:
        """The exit status that is the run's end; None if the supervisor died before that."""
        final = read_json(self._run.final)
        new = final != self._old or (final or {}).get("state") == "finished"  # that is nobody's to resume
        if final and new and final.get("state") in restart.STATUS:
            return restart.STATUS[final["state"]]  # it may have been killed just after
        held = read_json(self._run.lease) or {}
        mine = held.get("token") != self._before  # else it is that of the place before this one
        if mine and held.get("ended") and held.get("leaving"):  # it had let go, and had only to exit
            return restart.LEFT
        wrong_input = 2
        return status if status in (wrong_input, restart.TAKEN, restart.LEFT) else None

    def _clean_up(self) -> None:
        """Let what the supervisor left behind save and end, as the supervisor would have."""
        from launcher.recipe import load_frozen  # pydantic: not on the way to the first step

        def find() -> list[processes.Process]:
            self._reap()
            return processes.of_attempts(self._run.path)

        processes.end(find, load_frozen(self._run.recipe).restart.grace, self._note_stop)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stop:
            self._note_stop()
            time.sleep(POLL)

    def _note_stop(self) -> None:
        """Without a supervisor to pass it on to, a stop is kept for the next; there is nothing to preempt."""
        if any(number != signal.SIGTERM for number in self._take_signals()):
            self._stop = True

    def _take_signals(self) -> list[int]:
        taken = self._signals[:]
        del self._signals[: len(taken)]
        return taken

    def _newest(self) -> Mark | None:
        return next(iter(checkpoints(self._run)), None)

    @contextlib.contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self._signals.append(signal.SIGTERM if number in USER else number)

        before = {number: signal.signal(number, note) for number in (*PASSED_ON, *USER)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _ignore_user_signals() -> None:
    for number in USER:
        signal.signal(number, signal.SIG_IGN)


def marks(run: RunDir) -> dict[str, str]:
    """What every process of the run carries, so that it can be found."""
    return {"LAUNCH_RUN_DIR": str(run.path), "LAUNCH_RUN_ID": run.id}


def main() -> int:
    """`python -m launcher.supervisor.guard RUN_DIR [--gpus N]`: exits 0 if it finished or stopped."""
    parser = argparse.ArgumentParser(prog="launcher.supervisor.guard")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--gpus", type=int)
    args = parser.parse_args()
    run = RunDir(args.run_dir.absolute())
    frozen = (read_json(run.run) or {}).get("env", {})
    environ = {name: os.environ[name] for name in OF_THE_WINDOW if name in os.environ} | frozen
    if "LAUNCH_RUN_DIR" not in os.environ:  # only an environment given to exec can be seen from outside
        os.execve(sys.executable, sys.orig_argv, environ | marks(run))
    try:
        status = Guard(run, args.gpus, environ).run()
    except LaunchError as error:
        print(f"launch: {error.message}. {error.hint}", file=sys.stderr)
        return error.exit_status
    return 0 if status == restart.STOPPED else status


if __name__ == "__main__":
    sys.exit(main())
