"""The task of a node that is not node 0: starts and ends torchrun here as the supervisor on node 0 says.

It decides nothing. `python -m launcher.supervisor.node RUN_DIR --node K --job JOB`, or `serve`.
"""

import argparse
import contextlib
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from launcher import activation
from launcher.errors import LaunchError, UserError
from launcher.recipe import load_frozen
from launcher.rundir import RunDir, read_json, write_json
from launcher.supervisor import processes, torchrun
from launcher.supervisor.attempt import Attempt, Pulse
from launcher.supervisor.guard import marks
from launcher.supervisor.lease import BEAT
from launcher.supervisor.meeting import SILENCE, dismissed, peek, unreachable
from launcher.supervisor.signals import Signals

POLL = 0.1  # seconds
FORSAKEN = 600.0  # seconds without a supervisor after which none will come: node 0's task was killed


def serve(run: RunDir, node: int, job: str) -> int:
    """Follow the supervisor of `job` until node 0's task is done; the exit status. Main thread only.

    A signal that the cluster sends to all tasks is node 0's to judge: here it is noted and no more.
    """
    with Signals().handled(), processes.subreaper():
        return Agent(run, node, job).serve()


class Agent:
    """nodes/node-K.json is its own: for which attempt it is ready, running or ended, and a counter."""

    def __init__(self, run: RunDir, node: int, job: str) -> None:
        record = read_json(run.run)
        if record is None:
            raise UserError(f"{run.path} holds no run: its run.json is missing or torn")
        self._run, self._record, self._recipe = run, record, load_frozen(run.recipe)
        self._node, self._job = node, job
        self._attempt: Attempt | None = None
        self._grace = self._recipe.restart.grace
        self._fence, self._state, self._error = 0, "waiting", ""
        self._exit_status: int | None = None
        self._counter, self._due = 0, 0.0
        self._lease = Pulse()
        run.nodes.mkdir(exist_ok=True)

    def serve(self) -> int:
        while True:
            told = peek(self._run.rendezvous) or {}
            lease = peek(self._run.lease) or {}
            silence = self._lease.still(lease)
            over = dismissed(self._run, self._job)
            if self._attempt:
                self._tend(self._attempt, over or silence > SILENCE or self._unwanted(told, lease))
            elif over or silence > FORSAKEN:
                return 0
            elif told.get("job") == self._job:
                self._follow(told)
            if self._attempt is None:  # else its exit status might be reaped from under it
                self._reap()
            self._tick()
            time.sleep(POLL)

    def _unwanted(self, told: dict[str, Any], lease: dict[str, Any]) -> bool:
        """Whether the attempt is over elsewhere. What was said of earlier ones may still be seen here."""
        stopped = told.get("order") == "stop" and told.get("fence") == self._fence
        released = lease.get("ended") and lease.get("fence") == self._fence
        return bool(stopped or released or lease.get("fence", 0) > self._fence)

    def _follow(self, told: dict[str, Any]) -> None:
        fence, order = told["fence"], told["order"]
        if order == "meet" and fence > self._fence:
            self._fence, self._grace = fence, told["grace"]
            processes.end(self._leftovers, self._grace, self._tick)
            error = unreachable(told["host"], told["port"])
            self._become("ended" if error else "ready", error)
        elif self._state == "ready" and fence == self._fence and order == "start":
            self._start(told)
        elif self._state == "ready" and fence == self._fence and order == "stop":
            self._become("ended")

    def _start(self, told: dict[str, Any]) -> None:
        meeting = torchrun.Meeting(told["host"], told["port"], told["nodes"], self._node)
        about = (self._recipe, self._run, self._fence, told["gpus"], self._record)
        try:
            entered = activation.find(self._recipe.env, Path(self._record["workdir"]), os.environ)
            command = torchrun.command(*about, os.environ, self._grace, entered, meeting)
            self._attempt = Attempt(self._run, self._fence, command, self._node)
        except (OSError, activation.Unusable) as error:
            self._become("ended", f"torchrun did not start: {error}")
        else:
            self._become("running")

    def _tend(self, attempt: Attempt, unwanted: bool) -> None:
        """Until nothing of it is alive."""
        if unwanted and attempt.stopping_since is None:
            attempt.stop(self._grace)
        if attempt.running:
            return
        processes.end(self._leftovers, attempt.remaining(self._grace), self._tick)
        self._attempt, self._exit_status = None, attempt.exit_status
        self._become("ended")

    def _leftovers(self) -> list[processes.Process]:
        """Whatever of any attempt is alive here."""
        self._reap()
        return processes.of_attempts(self._run.path, node=self._node)

    def _become(self, state: str, error: str = "") -> None:
        self._state, self._error = state, error
        if state == "ready":
            self._exit_status = None
        print(f"launch: node {self._node}, attempt {self._fence}: {state}{error and ': '}{error}", flush=True)
        self._due = 0.0
        self._tick()

    def _tick(self) -> None:
        """Move the counter, when it is time to; a disk that is full may not be so for long."""
        if time.monotonic() < self._due:
            return
        self._counter += 1
        said = {"schema": 1, "job": self._job, "fence": self._fence, "state": self._state}
        said |= {"exit_status": self._exit_status, "error": self._error, "counter": self._counter}
        with contextlib.suppress(OSError):
            write_json(self._run.node(self._node), said | {"host": socket.gethostname(), "pid": os.getpid()})
            self._due = time.monotonic() + BEAT

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def main() -> int:
    parser = argparse.ArgumentParser(prog="launcher.supervisor.node")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--node", type=int, required=True)
    parser.add_argument("--job", required=True)
    args = parser.parse_args()
    run = RunDir(args.run_dir.absolute())
    if "LAUNCH_RUN_DIR" not in os.environ:  # only an environment given to exec can be seen from outside
        os.execve(sys.executable, sys.orig_argv, os.environ | marks(run))
    try:
        return serve(run, args.node, args.job)
    except LaunchError as error:
        print(f"launch: {error.message}. {error.hint}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
