"""What a backend does: brings the guard of a run to life somewhere, and people to its window."""

from typing import Protocol

from launcher.recipe import Recipe
from launcher.rundir import RunDir


class Backend(Protocol):
    def check(self, recipe: Recipe) -> None:
        """Raises UserError if this machine cannot run it this way; starts nothing."""

    def start(self, run: RunDir, gpus: int | None) -> int | None:
        """Start the run. In the foreground: the supervisor's exit status, at the end. Else None, at once."""

    def close(self, run: RunDir) -> None:
        """Take away what is left to look at of a run that has ended."""

    def attach(self, run: RunDir) -> None:
        """Bring the caller's terminal to the run's window. Raises UserError if it has none."""
