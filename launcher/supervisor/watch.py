"""One attempt under watch, from its first words until nothing of it is alive: what it was asked, and why."""

import time
from collections.abc import Callable
from typing import Any, Literal

from launcher.supervisor import processes
from launcher.supervisor.attempt import Attempt, Pulse
from launcher.supervisor.console import Console
from launcher.supervisor.place import Inquiry, Place, Verdict
from launcher.supervisor.signals import Signals

POLL = 0.1  # seconds
Wish = Literal["preempt", "stop", "hung"]
Asked = tuple[Wish, str]


class Watch:
    """`see` returns when the attempt is over; then `asked`, `verdict` and `seconds` say how it went.

    leaving: tell whoever comes next that we are. stop: why the run must stop, or nothing. lost: why it is
    not ours any more, or nothing. heard: whether the program has a heart. hang: seconds, of the recipe.
    tick: what goes on while anything is waited for.
    """

    def __init__(
        self,
        place: Place,
        leaving: Callable[[], None],
        console: Console,
        signals: Signals,
        stop: Callable[[], str],
        lost: Callable[[], str | None],
        heard: Callable[[], bool],
        hang: float,
        tick: Callable[[], None],
    ) -> None:
        self._place, self._leaving = place, leaving
        self._console, self._signals, self._tick = console, signals, tick
        self._stop, self._lost, self._heard, self._hang = stop, lost, heard, hang
        self._inquiry: Inquiry | None = None
        self.asked: Asked | None = None
        self.seconds: float | None = None  # from the signal until nothing of it was alive

    @property
    def verdict(self) -> Verdict | None:
        """What the place says of the end, if it was the place that asked for it."""
        return self._inquiry.verdict if self._inquiry else None

    def see(self, attempt: Attempt, grace: float) -> None:
        pulse, beat, seen = Pulse(), None, 0
        while attempt.running:
            self._tick()
            self._console.pour(attempt.words())
            beat = attempt.heartbeat() or beat
            self._console.progress(beat)
            wish = self._wanted(pulse, beat)
            if self.asked is None and wish:
                self.asked, seen = wish, self._signals.count
                attempt.stop(grace)  # before anything else: it is the save that the seconds are for
                self._console.say(f"{wish[1]}: asking the program to save, {grace:g} s at most")
            elif self.asked and wish and wish[0] == "stop":
                self.asked = wish  # a stop while the attempt is being preempted ends the run
            if self.verdict and self.verdict.ending:
                attempt.hurry(self._place.last_seconds())
            if self.asked and self._signals.count > seen + 1:  # Slurm tells guard and supervisor, so twice
                seen = self._signals.count
                self._console.say("the program is saving; asking again would not make it faster")
            time.sleep(POLL)
        self.asked = self.asked or self._wanted(pulse, None)  # the signal may have reached torchrun before us
        began = attempt.stopping_since or time.monotonic()
        if not processes.end(attempt.processes, attempt.remaining(grace), self._tick):
            self._console.say(
                "some processes of the attempt outlive even SIGKILL: they are stuck in the kernel"
            )
        self.seconds = time.monotonic() - began if attempt.stopping_since else None
        while words := attempt.words(last=True):
            self._console.pour(words)
        self._hear(grace)

    def _wanted(self, pulse: Pulse, beat: dict[str, Any] | None) -> Asked | None:
        """Why the attempt must end now, if it must."""
        if lost := self._lost():
            return "preempt", lost
        if stop := self._stop():
            return "stop", stop
        if self._inquiry is None:
            verdict = self._place.parting()
            if verdict or self._signals.preempt:
                self._inquiry = Inquiry(self._place, verdict, self._leaving)
        if self._inquiry:
            verdict = self.verdict
            return (verdict.wish, verdict.reason) if verdict else ("preempt", self._signals.preempt)
        hung = pulse.hung(beat, self._hang) if self._heard() else ""
        return ("hung", hung) if hung else None

    @property
    def _leaving_now(self) -> bool:
        return self.verdict is not None and self.verdict.leave

    def _hear(self, patience: float) -> None:
        """Wait for what the place has to say; it may name a better reason, or a stop."""
        if self._inquiry is None:
            return
        until = time.monotonic() + patience
        # On the way out nothing is left to do but to see to the way back, however long Slurm is away.
        while not self._inquiry.done and (self._leaving_now or time.monotonic() < until):
            self._tick()
            time.sleep(POLL)
        if self.verdict and self.asked and self.asked[0] == "preempt":
            self.asked = (self.verdict.wish, self.verdict.reason)
