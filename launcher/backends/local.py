"""In the foreground of the caller's terminal: Ctrl-C stops the run gracefully."""

import os

from launcher.backends.base import OneMachine
from launcher.errors import UserError
from launcher.rundir import RunDir, read_json


class Local(OneMachine):
    name = "local"

    def start(self, run: RunDir, gpus: int | None, nodes: int | None = None) -> int:
        from launcher.supervisor.guard import Guard

        frozen = (read_json(run.run) or {}).get("env", {})
        return Guard(run, gpus, os.environ | frozen).run()

    def close(self, run: RunDir) -> None:
        """Nothing is left."""

    def attach(self, run: RunDir) -> None:
        raise UserError(
            f"run {run.id} has no window: it was started in the foreground of a terminal",
            f"`launch logs {run.id} -f` shows what it says.",
        )
