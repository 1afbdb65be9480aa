"""In the foreground of the caller's terminal: Ctrl-C stops the run gracefully."""

import os
from collections.abc import Iterator

from launcher.backends.base import one_machine
from launcher.errors import UserError
from launcher.recipe import Recipe
from launcher.recipe.document import Problem
from launcher.rundir import RunDir, read_json
from launcher.supervisor import control


class Local:
    def check(self, recipe: Recipe) -> Iterator[Problem]:
        yield from one_machine(recipe, "local")

    def start(self, run: RunDir, gpus: int | None, nodes: int | None = None) -> int:
        from launcher.supervisor.guard import Guard

        frozen = (read_json(run.run) or {}).get("env", {})
        return Guard(run, gpus, os.environ | frozen).run()

    def close(self, run: RunDir) -> None:
        """Nothing is left."""

    def notes(self, recipe: Recipe) -> list[str]:
        return []

    def stop(self, run: RunDir) -> None:
        control.stop(run)

    def preempt(self, run: RunDir) -> None:
        control.preempt(run)

    def attach(self, run: RunDir) -> None:
        raise UserError(
            f"run {run.id} has no window: it was started in the foreground of a terminal",
            f"`launch logs {run.id} -f` shows what it says.",
        )
