"""One attempt: torchrun from its start until no process of it is alive."""

import signal
import subprocess
import time
from typing import Any

from launcher.rundir import RunDir, read_json
from launcher.supervisor import processes
from launcher.supervisor.console import Tail
from launcher.supervisor.torchrun import Command
from launcher.supervisor.warm import Warm

KILL_AFTER = 1.0  # seconds that torchrun, after its own SIGKILL to the workers, has to say so
LINGER = 5.0  # seconds that helpers of a finished program have to end by themselves
LOOK = 1.0  # seconds between looks at what torchrun has beside itself


class Attempt:
    """torchrun in a session of its own: a Ctrl-C or a closed window reaches it only through the supervisor.

    The supervisor polls `running`; `stop` asks once and never waits. Raises OSError if it cannot be started.
    `node`: which of several nodes this is (fleet.py, node.py). Without a `command` nothing starts yet.
    `warm`: what may become torchrun in less time than a fresh one.
    """

    def __init__(
        self,
        run: RunDir,
        number: int,
        command: Command | None,
        node: int | None = None,
        warm: Warm | None = None,
    ) -> None:
        self.run, self.number, self.node = run, number, node
        self.exit_status: int | None = None
        self.trouble = ""  # what ended it, where torchrun cannot know
        self.stopping_since: float | None = None  # on the monotonic clock
        self._deadline: float | None = None
        self._looked = self._worked = 0.0
        self._words = Tail(run.rank_log(number, 0))
        self._torchrun: subprocess.Popen[bytes] | None = None
        if command:
            self._start(command, warm)

    def _start(self, command: Command, warm: Warm | None = None) -> None:
        self.run.attempt_logs(self.number).mkdir(parents=True, exist_ok=True)
        path = self.run.torchrun_log(self.number, self.node or 0)
        if warm:
            self._torchrun = warm.become(self.number, command.argv, command.env, command.cwd, path)
        if self._torchrun:
            return
        with path.open("ab") as log:
            self._torchrun = subprocess.Popen(
                command.argv,
                env=command.env,
                cwd=command.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether torchrun lives. Past the deadline of `stop` everything of the attempt is killed here."""
        if self._torchrun is None:
            return False
        self.exit_status = self._torchrun.poll()
        late = self._deadline is not None and time.monotonic() > self._deadline
        if self.exit_status is None and (late or self._deaf()):
            for process in self.processes():
                process.signal(signal.SIGKILL)
        return self.exit_status is None

    def stop(self, grace: float) -> None:
        """SIGTERM to torchrun, which passes it on; SIGKILL to all of it when `grace` seconds are over."""
        self.stopping_since = time.monotonic()
        self._terminate(grace)

    def _terminate(self, grace: float) -> None:
        self._worked = time.monotonic()
        self._deadline = self._worked + grace + KILL_AFTER
        if self._torchrun:
            self._torchrun.terminate()

    def _deaf(self) -> bool:
        """Whether torchrun, with no worker, waits for other nodes: inside its store it hears no signal."""
        now = time.monotonic()
        if self._deadline is None or self.node is None or now - self._looked < LOOK:
            return False
        self._looked = now
        if len(self.processes()) > 1:
            self._worked = now
        return now - self._worked > LINGER

    def hurry(self, grace: float) -> None:
        """There are only `grace` seconds from the signal on; what we kill can still be written down."""
        if self.stopping_since is not None and self._deadline is not None:
            self._deadline = min(self._deadline, self.stopping_since + grace)

    def remaining(self, grace: float) -> float:
        """Seconds that processes which torchrun left behind have to save."""
        if self._deadline is not None:
            return max(0.0, self._deadline - time.monotonic())
        return grace if self.exit_status else min(grace, LINGER)

    def processes(self) -> list[processes.Process]:
        return processes.of_attempts(self.run.path, self.number, self.node)

    def words(self, last: bool = False) -> bytes:
        """What rank 0 has said since the last call, in whole lines."""
        return self._words.read(last)

    def heartbeat(self) -> dict[str, Any] | None:
        """The heartbeat, if it is this attempt's."""
        beat = read_json(self.run.heartbeat)
        return beat if beat and beat.get("fence") == self.number else None

    def outcome(self) -> dict[str, Any] | None:
        """The outcome, if it is this attempt's."""
        outcome = read_json(self.run.outcome)
        return outcome if outcome and outcome.get("fence") == self.number else None


class Pulse:
    """Whether a heartbeat moves, on the monotonic clock of whoever looks."""

    def __init__(self) -> None:
        self._seen: tuple[object, ...] = ()
        self._since = time.monotonic()

    def hung(self, beat: dict[str, Any] | None, usual: float) -> str:
        """Why the attempt is hung, or nothing; `usual`: the limit of a beat that names none.

        No beat yet: it has stood still since this began to look."""
        limit = float((beat or {}).get("limit") or usual)
        if self.still(beat or {}) <= limit:
            return ""
        if not beat:
            return f"no heartbeat within {limit:g} s of its start"
        where = f" at step {beat['step']}" if beat.get("step") is not None else ""
        return f"no progress in {beat.get('phase')}{where} for {limit:g} s"

    def still(self, beat: dict[str, Any]) -> float:
        """Seconds for which phase and counter have been what they are."""
        now = (beat.get("phase"), beat.get("counter"))
        if now != self._seen:
            self._seen, self._since = now, time.monotonic()
        return time.monotonic() - self._since
