"""What a backend does: brings the guard of a run to life somewhere, and people to its window."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from launcher.recipe import Recipe
from launcher.recipe.document import Problem
from launcher.rundir import RunDir
from launcher.workstation import devices, queue


def one_machine(recipe: Recipe, name: str) -> Iterator[Problem]:
    """A window has no second machine, and no more than this one has. Raises UserError."""
    if recipe.resources.nodes > 1:
        wrong = f"the {name} backend runs on one machine, and the recipe asks for {recipe.resources.nodes}"
        yield Problem(("resources", "nodes"), wrong)
    queue.check()
    wanted = devices.wants(recipe.resources, recipe.resources.gpus)
    for kind, wrong in devices.lacking(wanted, devices.totals()).items():
        yield Problem(("resources", "gpus" if kind == devices.WORKERS else kind), wrong)


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
