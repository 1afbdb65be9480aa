"""Where attempts run: what gives a run its devices, what takes them away, and what becomes of it then.

The supervisor knows places by this page alone: a machine of one's own (`Here`), a workstation that is shared
(station.py), a job of Slurm's (allocation.py).
"""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from launcher.supervisor.signals import PREEMPTED


@dataclass(frozen=True)
class Verdict:
    """What a signal from outside means.

    leave: this place is lost, and the run goes on in another. ending: the last seconds of it have begun.
    """

    wish: Literal["preempt", "stop"]
    reason: str
    leave: bool = False
    ending: bool = False


class Refused(Exception):
    """The run cannot be given what it needs here, however long it waits: its end, in one sentence."""


class Place(Protocol):
    def enter(self, wait: Callable[[str], bool]) -> Mapping[str, str] | None:
        """Wait until an attempt may start; the variables that name its devices.

        `wait(why)` is called ten times a second while waiting, takes its tenth, and is False once the run is
        no longer wanted: then None. Raises Refused.
        """

    def parting(self) -> Verdict | None:
        """Why the attempt must end now though no signal came (a time limit, another run), if it must."""

    def explain(self) -> Verdict:
        """What the SIGTERM that has come means. May take as long as it takes to find out."""

    def grace(self, wanted: float) -> float:
        """Seconds there are from a stop signal to SIGKILL, `wanted` at most."""

    def last_seconds(self) -> float:
        """Seconds from the signal to SIGKILL where a place is ending already."""

    def come_back(self, verdict: Verdict) -> None:
        """See to it that the run goes on elsewhere. Called while it is still saving; twice is as good."""

    def leave(self, again: bool) -> None:
        """The attempt is over: give its devices back. `again`: it was preempted, and wants them at once."""

    def last_act(self, ended: bool) -> None:
        """The run is released; `ended`: for good, else it goes on elsewhere or is somebody else's."""

    def about(self) -> dict[str, Any]:
        """What the line at the start of an attempt says of this place."""


class Here:
    """A machine that nobody takes away: a signal ends the attempt, and the run goes on where it is."""

    def enter(self, wait: Callable[[str], bool]) -> Mapping[str, str] | None:
        return {}

    def parting(self) -> Verdict | None:
        return None

    def explain(self) -> Verdict:
        return Verdict("preempt", PREEMPTED)

    def grace(self, wanted: float) -> float:
        return wanted

    def last_seconds(self) -> float:
        return math.inf

    def come_back(self, verdict: Verdict) -> None:
        """It never left."""

    def leave(self, again: bool) -> None:
        """Nothing was taken."""

    def last_act(self, ended: bool) -> None:
        """Nothing is left to do."""

    def about(self) -> dict[str, Any]:
        return {}


class Inquiry:
    """Finds out in a thread, beside the save, what an end means, and sees to the run's return."""

    def __init__(self, place: Place, known: Verdict | None, leaving: Callable[[], None]) -> None:
        self.verdict = known
        self._place, self._leaving = place, leaving
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def _work(self) -> None:
        self.verdict = self.verdict or self._place.explain()
        if self.verdict.leave:
            self._leaving()  # first: who comes next must know that the run will be free
            self._place.come_back(self.verdict)
