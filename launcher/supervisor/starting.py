"""How an attempt is started: what its torchrun is made of, here or on all nodes of a job."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import activation
from launcher.recipe import Recipe
from launcher.rundir import RunDir
from launcher.supervisor import torchrun
from launcher.supervisor.attempt import Attempt
from launcher.supervisor.fleet import Fleet
from launcher.supervisor.meeting import job_name
from launcher.supervisor.torchrun import Command, Meeting
from launcher.supervisor.warm import Warm


class Start:
    """Starts attempts of one run on `gpus` workers of each of `nodes` nodes."""

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        record: Mapping[str, Any],
        gpus: int,
        nodes: int,
        warm: Warm | None,
        say: Callable[[str], None],
    ) -> None:
        self._run, self._recipe, self._record = run, recipe, record
        self._gpus, self._nodes, self._warm, self._say = gpus, nodes, warm, say

    def attempt(
        self, number: int, devices: Mapping[str, str], grace: float, where: Mapping[str, Any]
    ) -> Attempt:
        """`devices`: variables of the place, which win; `where`: what it says of itself.

        Raises OSError, activation.Unusable."""
        environ = os.environ | devices
        entered = activation.find(self._recipe.env, Path(self._record["workdir"]), environ)
        about = (self._recipe, self._run, number, self._gpus, self._record, environ, grace, entered)

        def command(meeting: Meeting | None = None) -> Command:
            made = torchrun.command(*about, meeting)
            return replace(made, env=made.env | dict(devices))

        if self._nodes == 1:
            return Attempt(self._run, number, command(), warm=self._warm)
        job = job_name(where.get("job", "here"), where.get("restarts", 0))
        return Fleet(self._run, number, job, self._nodes, self._gpus, grace, command, self._say)
