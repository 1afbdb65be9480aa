"""The supervisor: takes a run, starts attempt after attempt, watches, decides, until the run has ended.

One loop. Signal handlers set a flag and nothing else; the loop looks at it ten times a second, and while it
waits for anything, the lease's counter moves on. What ends a run: docs/contract.md, last table.
"""

import os
import sys
import time
from typing import Any, Literal

from launcher.checkpoints import checkpoints
from launcher.errors import Taken, UserError
from launcher.recipe import load_frozen
from launcher.rundir import RunDir, read_json
from launcher.supervisor import history, processes, restart, torchrun
from launcher.supervisor.attempt import Attempt, Pulse
from launcher.supervisor.console import Console
from launcher.supervisor.durable import Durable
from launcher.supervisor.lease import Lease
from launcher.supervisor.postmortem import crash_reason
from launcher.supervisor.restart import FINISHED, STATUS, TAKEN
from launcher.supervisor.signals import Signals

POLL = 0.1  # seconds

Wish = Literal["preempt", "stop", "hung"]


class Supervisor:
    """`run` returns FINISHED, FAILED, STOPPED or TAKEN. Raises UserError for a folder that holds no run."""

    def __init__(self, run: RunDir, gpus: int | None = None) -> None:
        record = read_json(run.run)
        if record is None:
            raise UserError(f"{run.path} holds no run: its run.json is missing or torn")
        self._run, self._record = run, record
        self._recipe = load_frozen(run.recipe)
        self._gpus = gpus or self._recipe.resources.gpus
        self._console = Console(run.run_log)
        self._lease = Lease(run)
        self._durable = Durable(run, self._recipe, record, self._say, self._tick)
        self._signals = Signals()
        self._lost: str | None = None
        self._complained = ""
        self._history: list[restart.End] = []

    def run(self) -> int:
        """Hold the run until it has ended, or somebody else has it."""
        with self._signals.handled(), self._console.listening():
            try:
                self._lease.take(lambda by: self._print(f"{by} holds the run; watching whether it lives"))
            except Taken as taken:
                self._print(f"{taken.message}. {taken.hint}")
                return TAKEN
            except OSError as error:
                raise UserError(f"{self._run.path} cannot be written: {error.strerror}") from None
            try:
                final = read_json(self._run.final)
                if final and final.get("state") == "finished":
                    self._print(f"run {self._run.id} has finished already")
                    return FINISHED
                return self._supervise(resumed=final is not None)
            except Taken as taken:
                self._say(f"leaving: {taken.message}")
                self._durable.close()
                return TAKEN
            finally:
                self._console.progress(None)
                self._lease.release()

    def _supervise(self, resumed: bool) -> int:
        self._end_leftovers()
        self._history = [] if resumed else history.load(self._run)
        budget = (self._recipe.restart.crashes, self._recipe.restart.backoff)
        while True:
            decision = restart.decide(self._history, *budget)
            if decision.again:
                if decision.pause:
                    self._say(f"{decision.reason}; again in {decision.pause:g} s")
                self._pause(decision.pause)
                stop = self._stop_wanted()
                if not stop and self._attempt(resumed and not self._history):
                    continue
                decision = restart.Decision(False, stop or self._stop_wanted(), state="stopped")
            return self._conclude(decision)

    def _attempt(self, resume: bool) -> bool:
        """One attempt from claim to end line; False if a stop came before it began."""
        wanted = self._durable.claim(self._lease.token, self._lease.fence + 1, self._give_up)
        if wanted is None and not self._lost:
            return False
        if wanted is None or not self._lease.raise_fence(wanted):
            raise self._moved_away()
        number = self._lease.fence
        self._signals.preempt = ""  # a preemption between two attempts has nothing to end
        self._write(lambda: history.begin(self._run, number, self._gpus, self._record["backend"], resume))
        if resume:  # not before the run is ours in the store too, or was refused
            self._write(lambda: self._run.final.unlink(missing_ok=True))
        command = torchrun.command(self._recipe, self._run, number, self._gpus, self._record, os.environ)
        workers = f"{self._gpus} worker{'s' * (self._gpus > 1)}"
        self._say(f"attempt {number} of {self._run.id}: {workers} on {os.uname().nodename}")
        try:
            attempt = Attempt(self._run, number, command)
        except OSError as error:
            end, resumed, seconds = restart.End("crashed", f"torchrun did not start: {error}"), None, None
        else:
            end, resumed, seconds = self._watch(attempt)
        if self._lost:
            raise self._moved_away()
        took = f" ({seconds:.1f} s after the signal)" if seconds is not None else ""
        self._say(f"attempt {number} {end.state}{took}: {end.reason}")
        self._write(lambda: history.close(self._run, number, end, resumed, seconds))
        self._history.append(end)
        return True

    def _watch(self, attempt: Attempt) -> tuple[restart.End, int | None, float | None]:
        """See the attempt to its end: how it ended, at which step it began, seconds from signal to end."""
        grace = self._recipe.restart.grace
        pulse, beat, asked, seen = Pulse(), None, None, 0
        while attempt.running:
            self._tick()
            self._console.pour(attempt.words())
            beat = attempt.heartbeat() or beat
            self._console.progress(beat)
            wish = self._wanted(pulse, beat)
            if asked is None and wish:
                asked, seen = wish, self._signals.count
                self._say(f"{wish[1]}: asking the program to save, {grace:g} s at most")
                attempt.stop(grace)
            elif asked and wish and wish[0] == "stop":
                asked = wish  # a stop while the attempt is being preempted ends the run
            if asked and self._signals.count > seen:
                seen = self._signals.count
                self._say("the program is saving; asking again would not make it faster")
            time.sleep(POLL)
        asked = asked or self._wanted(pulse, None)  # the signal may have reached torchrun before us
        began = attempt.stopping_since or time.monotonic()
        if not processes.end(attempt.processes, attempt.remaining(grace), self._tick):
            self._say("some processes of the attempt outlive even SIGKILL: they are stuck in the kernel")
        seconds = time.monotonic() - began if attempt.stopping_since else None
        while words := attempt.words(last=True):
            self._console.pour(words)
        return *self._judge(attempt.number, asked, attempt.exit_status), seconds

    def _judge(
        self, number: int, asked: tuple[Wish, str] | None, exit_status: int | None
    ) -> tuple[restart.End, int | None]:
        beat, outcome = (read_json(path) or {} for path in (self._run.heartbeat, self._run.outcome))
        beat = beat if beat.get("fence") == number else {}
        newest = next(iter(checkpoints(self._run)), None)
        progress = newest is not None and newest.fence == number and newest.step > (beat.get("resumed") or 0)
        crash = crash_reason(self._run, number, exit_status) if exit_status else "its supervisor died"
        end = restart.classify(
            asked[0] if asked else None,
            asked[1] if asked else "",
            outcome if outcome.get("fence") == number else None,
            exit_status,
            beat.get("step"),
            progress,
            crash,
        )
        return end, beat.get("resumed")

    def _end_leftovers(self) -> None:
        """An earlier supervisor and its guard may have been killed: what they left trains on, or is hung."""
        found = processes.of_attempts(self._run.path)
        if found:
            self._say(f"{len(found)} processes of an earlier attempt are still alive; ending them")
            processes.end(
                lambda: processes.of_attempts(self._run.path), self._recipe.restart.grace, self._tick
            )
        number = history.unfinished(self._run)
        if number is not None:
            end, resumed = self._judge(number, ("preempt", "its supervisor died"), None)
            self._write(lambda: history.close(self._run, number, end, resumed))

    def _conclude(self, decision: restart.Decision) -> int:
        self._console.progress(None)
        self._say(f"run {self._run.id} {decision.state}: {decision.reason}")
        self._durable.flush()
        self._write(lambda: history.finish(self._run, decision, self._gpus))
        self._durable.close()
        return STATUS[decision.state]

    def _wanted(self, pulse: Pulse, beat: dict[str, Any] | None) -> tuple[Wish, str] | None:
        """Why the attempt must end now, if it must."""
        if self._lost:
            return "preempt", self._lost
        if stop := self._stop_wanted():
            return "stop", stop
        if self._signals.preempt:
            return "preempt", self._signals.preempt
        # A program that never was heard of need not keep the contract: it may have no heart at all.
        heard = beat or self._recipe.program.check or self._run.heartbeat.exists()
        hung = pulse.hung(beat, self._recipe.restart.hang) if heard else ""
        return ("hung", hung) if hung else None

    def _stop_wanted(self) -> str:
        """The sentence, or nothing. A stop by signal is written down: it must outlive this process."""
        if self._signals.stop:
            if not self._run.stop_requested.exists():
                self._write(self._run.stop_requested.touch)
            return self._signals.stop
        return "stopped by `launch stop`" if self._run.stop_requested.exists() else ""

    def _give_up(self) -> str | None:
        return self._stop_wanted() or self._lost

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stop_wanted():
            self._tick()
            if self._lost:
                raise self._moved_away()
            time.sleep(POLL)

    def _tick(self) -> None:
        """What must go on while anything is waited for."""
        alive = True

        def beat() -> None:
            nonlocal alive
            alive = self._lease.beat()

        self._write(beat)
        if not alive:
            self._lost = "another supervisor has taken the run"
        self._lost = self._lost or self._durable.lost

    def _write(self, write: Any) -> None:
        """A full disk must not end the run: its checkpoints may fit again soon. Said once."""
        try:
            write()
        except OSError as error:
            if str(error) != self._complained:
                self._complained = str(error)
                self._say(f"the run folder cannot be written: {error}")

    def _moved_away(self) -> Taken:
        return Taken(self._lost or "another supervisor has taken the run")

    def _say(self, sentence: str) -> None:
        self._console.say(sentence)

    def _print(self, sentence: str) -> None:
        """For the window only: the run's log is its holder's."""
        print(f"launch: {sentence}", file=sys.stderr, flush=True)
