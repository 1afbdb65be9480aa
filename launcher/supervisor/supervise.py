"""The supervisor: takes a run, starts attempt after attempt, watches, decides, until the run has ended.

One loop. Signal handlers set a flag and nothing else; the loop looks at it ten times a second, and while it
waits for anything, the lease's counter moves on. What ends a run: docs/contract.md, last table.
"""

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from launcher import activation
from launcher.errors import Taken, UserError
from launcher.recipe import load_frozen
from launcher.rundir import RunDir, read_json
from launcher.supervisor import history, processes, restart
from launcher.supervisor.console import Console
from launcher.supervisor.durable import Durable
from launcher.supervisor.lease import Lease
from launcher.supervisor.place import Here, Inquiry, Place, Refused, Verdict
from launcher.supervisor.postmortem import judge
from launcher.supervisor.restart import FINISHED, LEFT, STATUS, TAKEN
from launcher.supervisor.signals import Signals
from launcher.supervisor.starting import Start
from launcher.supervisor.warm import Warm
from launcher.supervisor.watch import POLL, Watch

PARTING_FLUSH, PARTING_WORDS = 2.0, 0.5  # seconds for the store where somebody waits for the node


class Supervisor:
    """`run` returns FINISHED, FAILED, STOPPED, TAKEN or LEFT. Raises UserError for a folder without a run."""

    def __init__(
        self,
        run: RunDir,
        gpus: int | None = None,
        place: Place | None = None,
        nodes: int | None = None,
        warm: Warm | None = None,
    ) -> None:
        record = read_json(run.run)
        if record is None:
            raise UserError(f"{run.path} holds no run: its run.json is missing or torn")
        self._run, self._record = run, record
        self._place: Place = place or Here()
        self._recipe = load_frozen(run.recipe)
        self._gpus = gpus or self._recipe.resources.gpus  # of each node
        self._nodes = nodes or (self._recipe.resources.nodes if record["backend"] == "slurm" else 1)
        self._warm = warm
        self._start = Start(run, self._recipe, record, self._gpus, self._nodes, warm, self._say)
        self._console = Console(run.run_log)
        self._lease = Lease(run)
        self._durable = Durable(run, self._recipe, record, self._say, self._tick)
        self._signals = Signals()
        self._lost: str | None = None
        self._complained = self._waiting = ""
        self._history: list[restart.End] = []

    def run(self) -> int:
        """Hold the run until it has ended, has to go on elsewhere, or somebody else has it."""
        with self._signals.handled(), self._console.listening():
            status = self._hold()
            self._place.last_act(ended=status in STATUS.values())
            if self._warm:
                self._warm.close()
            return status

    def _hold(self) -> int:
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
        verdict: Verdict | None = None
        while True:
            decision = restart.decide(self._history, *budget)
            if not decision.again:
                return self._conclude(decision)
            if verdict and verdict.leave:
                return self._leave(verdict)
            if decision.pause:
                self._say(f"{decision.reason}; again in {decision.pause:g} s")
            self._pause(decision.pause)
            verdict = self._signalled()
            stop = verdict.reason if verdict and verdict.wish == "stop" else self._stop_wanted()
            if stop:
                return self._conclude(restart.Decision(False, stop, state="stopped"))
            if not (verdict and verdict.leave):
                try:
                    verdict = self._attempt(resumed and not self._history)
                except Refused as refused:
                    return self._conclude(restart.Decision(False, str(refused), state="failed"))

    def _attempt(self, resume: bool) -> Verdict | None:
        """One attempt, from its devices to its end line; what the place says of that end, if it was its."""
        devices = self._place.enter(self._wait)
        if devices is None:
            return None
        try:
            wanted = self._durable.claim(self._lease.token, self._lease.fence + 1, self._give_up)
            if wanted is None and not self._lost:
                return None
            if wanted is None or not self._lease.raise_fence(wanted):
                raise self._moved_away()
            verdict = self._signalled()
            if verdict and (verdict.leave or verdict.wish == "stop"):
                return verdict
            return self._run_attempt(self._lease.fence, devices, resume)
        finally:
            last = self._history[-1].state if self._history else ""
            self._place.leave(again=last == "preempted" and not self._give_up())

    def _run_attempt(self, number: int, devices: Mapping[str, str], resume: bool) -> Verdict | None:
        where = self._place.about()
        total = self._gpus * self._nodes
        self._write(lambda: history.begin(self._run, number, total, self._record["backend"], resume, where))
        if resume:  # not before the run is ours in the store too, or was refused
            self._write(lambda: self._run.final.unlink(missing_ok=True))
            self._write(lambda: self._run.resume_requested.unlink(missing_ok=True))
        grace = self._place.grace(self._recipe.restart.grace)
        host = f"{self._nodes} nodes" if self._nodes > 1 else os.uname().nodename
        self._say(f"attempt {number} of {self._run.id}: {total} worker{'s' * (total > 1)} on {host}")
        watch = Watch(
            self._place,
            self._lease.leave,
            self._console,
            self._signals,
            self._stop_wanted,
            lambda: self._lost,
            self._heard,
            self._recipe.restart.hang,
            self._tick,
        )
        try:
            attempt = self._start.attempt(number, devices, grace, where)
        except (OSError, activation.Unusable) as error:
            end, resumed = restart.End("crashed", f"torchrun did not start: {error}"), None
        else:
            watch.see(attempt, grace)
            end, resumed = judge(self._run, number, watch.asked, attempt.exit_status, attempt.trouble)
        if self._lost:
            raise self._moved_away()
        took = f" ({watch.seconds:.1f} s after the signal)" if watch.seconds is not None else ""
        self._say(f"attempt {number} {end.state}{took}: {end.reason}")
        self._write(lambda: history.close(self._run, number, end, resumed, watch.seconds))
        self._history.append(end)
        self._signals.preempt = ""
        return watch.verdict

    def _signalled(self) -> Verdict | None:
        """What a signal between two attempts means: nothing has to save, but the place may be lost."""
        known = self._place.parting()
        if not known and not self._signals.preempt:
            return None
        self._signals.preempt = ""
        inquiry = Inquiry(self._place, known, self._lease.leave)
        while not inquiry.done:
            self._tick()
            time.sleep(POLL)
        return inquiry.verdict

    def _leave(self, verdict: Verdict) -> int:
        """The run goes on elsewhere. What is not in the store yet is in the folder that all places share."""
        self._console.progress(None)
        self._say(f"leaving: {verdict.reason}")
        self._durable.flush(PARTING_FLUSH)
        self._durable.close(PARTING_WORDS)
        return LEFT

    def _end_leftovers(self) -> None:
        """An earlier supervisor and its guard may have been killed: what they left trains on, or is hung."""

        def found() -> list[processes.Process]:
            ours = self._warm.pid if self._warm else None
            return [left for left in processes.of_attempts(self._run.path) if left.pid != ours]

        if left := found():
            self._say(f"{len(left)} processes of an earlier attempt are still alive; ending them")
            processes.end(found, self._recipe.restart.grace, self._tick)
        number = history.unfinished(self._run)
        if number is not None:
            end, resumed = judge(self._run, number, ("preempt", "its supervisor died"), None)
            self._write(lambda: history.close(self._run, number, end, resumed))

    def _conclude(self, decision: restart.Decision) -> int:
        self._console.progress(None)
        self._say(f"run {self._run.id} {decision.state}: {decision.reason}")
        self._durable.flush()
        self._write(lambda: history.finish(self._run, decision, self._gpus * self._nodes))
        self._durable.close()
        return STATUS[decision.state]

    def _stop_wanted(self) -> str:
        """The sentence, or nothing. A stop by signal is written down: it must outlive this process."""
        if self._signals.stop:
            if not self._run.stop_requested.exists():
                self._write(self._run.stop_requested.touch)
            return self._signals.stop
        return "stopped by `launch stop`" if self._run.stop_requested.exists() else ""

    def _heard(self) -> bool:
        """A program that never was heard of need not keep the contract: it may have no heart at all."""
        return bool(self._recipe.program.check) or self._run.heartbeat.exists()

    def _wait(self, why: str) -> bool:
        """A tenth of a second of waiting for a place; False once the run is not wanted any more."""
        if why != self._waiting:
            self._waiting = why
            if why:
                self._say(why)
        self._tick()
        time.sleep(POLL)
        return not self._give_up()

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
        if self._warm:
            self._warm.age()
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
