"""What a backend does: brings the guard of a run to life somewhere, and people to its window."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from launcher.recipe import Recipe
from launcher.recipe.document import Problem
from launcher.rundir import RunDir
from launcher.supervisor import control
from launcher.workstation import devices, queue


class Backend(Protocol):
    def check(self, recipe: Recipe) -> Iterable[Problem]:
        """What of the recipe cannot be had this way. Raises UserError, LaunchError; starts nothing."""

    def notes(self, recipe: Recipe) -> list[str]:
        """What a run should know of this way before it starts."""

    def start(self, run: RunDir, gpus: int | None, nodes: int | None = None) -> int | None:
        """Start the run, where they are given on other numbers than the recipe's.

        In the foreground: the supervisor's exit status, at the end. Else None, at once."""

    def close(self, run: RunDir) -> None:
        """Take away what is left to look at of a run that has ended."""

    def stop(self, run: RunDir) -> None:
        """End the run; nothing of it is alive afterwards. Raises UserError if it has ended."""

    def preempt(self, run: RunDir) -> None:
        """End the attempt that runs now; the run comes back by itself. Raises UserError if there is none."""

    def attach(self, run: RunDir) -> None:
        """Bring the caller's terminal to the run's window. Raises UserError if it has none."""


class OneMachine:
    """What a window and a terminal have in common: the run's processes are here. `name`: the backend's."""

    name: str

    def check(self, recipe: Recipe) -> Iterator[Problem]:
        """There is no second machine, and no more than this one has. Raises UserError."""
        if recipe.resources.nodes > 1:
            many = f"the recipe asks for {recipe.resources.nodes}"
            wrong = f"the {self.name} backend runs on one machine, and {many}"
            yield Problem(("resources", "nodes"), wrong)
        queue.check()
        wanted = devices.wants(recipe.resources, recipe.resources.gpus)
        for kind, wrong in devices.lacking(wanted, devices.totals()).items():
            yield Problem(("resources", "gpus" if kind == devices.WORKERS else kind), wrong)

    def notes(self, recipe: Recipe) -> list[str]:
        return []

    def stop(self, run: RunDir) -> None:
        control.stop(run)

    def preempt(self, run: RunDir) -> None:
        control.preempt(run)
