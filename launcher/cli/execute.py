"""`launch exec`: any command on what it asks for: through Slurm's srun, or in turn on this workstation."""

import math
import os
import re
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from launcher.backends import BACKENDS
from launcher.cli import foreground
from launcher.cli.predict import turn, when
from launcher.cli.submit import pick_backend
from launcher.environ import EXEC, clean
from launcher.errors import LaunchError, UserError
from launcher.recipe import Flags, Recipe, parse, typed
from launcher.recipe.document import Problem
from launcher.recipe.sections import Resources, hours
from launcher.slurm import cluster
from launcher.slurm.forecast import forecast
from launcher.slurm.options import flags, options
from launcher.supervisor import lease, processes
from launcher.supervisor.member import Member
from launcher.supervisor.place import Refused
from launcher.workstation import devices, queue
from launcher.workstation.queue import Entry

GRACE = 30.0  # seconds from SIGTERM to SIGKILL for a command that gives way
WAITED = 213  # what srun shall exit with when --immediate is over; hardly a command's own status


def execute(command: Sequence[str], flags: Flags, backend: str, predict_only: bool) -> int:
    """The command's exit status. Raises UserError before it is queued, LaunchError if it waited too long."""
    if shutil.which(command[0]) is None:
        raise UserError(f"there is no command `{command[0]}` here")
    on_gpus = "resources.gpus" in flags
    # One that asks for no GPUs gets none, and is no worker either.
    document = typed(
        {"program": {"module": "exec"}, "resources": {"device": "cuda" if on_gpus else "cpu"}}, flags
    )
    recipe = parse(document)
    if pick_backend(backend) == "slurm":
        max_wait, recipe = recipe.resources.max_wait, _without_max_wait(recipe)
        if wrong := list(BACKENDS["slurm"].check(recipe)):
            raise document.error(wrong)
        return _predict_slurm(recipe) if predict_only else _srun(recipe, command, max_wait)
    workers = recipe.resources.gpus if on_gpus else 0
    if recipe.resources.nodes > 1:
        raise document.error([Problem(("resources", "nodes"), "this is one machine, and no Slurm answers")])
    queue.check()
    turn.machine(recipe.resources, workers)
    if predict_only:
        (found,) = turn.turns(recipe, [workers])
        click.echo(f"would start {turn.words(found)}")
        return 0
    return _in_turn(recipe.resources, workers, command)


def _without_max_wait(recipe: Recipe) -> Recipe:
    """Which for a batch job is a deadline of Slurm's; srun watches it by itself."""
    return recipe.model_copy(update={"resources": recipe.resources.model_copy(update={"max_wait": None})})


def _srun(recipe: Recipe, command: Sequence[str], max_wait: float | None) -> int:
    """In the foreground, with a terminal of its own where we have one (srun(1))."""
    name, wants = re.sub(r"[^A-Za-z0-9._-]", "_", Path(command[0]).name), recipe.resources
    asked = options(recipe)
    del asked["requeue"]  # sbatch's own
    argv = ["srun", f"--job-name=launch-exec-{name}", *flags(asked)]
    environ = _environment()
    if sys.stdin.isatty() and sys.stdout.isatty():
        argv.append("--pty")
    if max_wait:
        argv.append(f"--immediate={math.ceil(max_wait)}")
        environ["SLURM_EXIT_IMMEDIATE"] = str(WAITED)
    status = foreground.run([*argv, "--", *command], environ)
    if max_wait and status == WAITED:
        gpus = wants.gpus if wants.device == "cuda" else 0
        what = devices.words(devices.wants(wants, gpus) or {devices.CORES: 1})
        raise LaunchError(f"waited {hours(max_wait)} for {what}")
    return status


def _environment() -> dict[str, str]:
    """The caller's; who is given no GPUs sees none."""
    return clean(os.environ) | {"CUDA_VISIBLE_DEVICES": ""}


def _predict_slurm(recipe: Recipe) -> int:
    slot = next(
        forecast(recipe, int(recipe.resources.time) if recipe.resources.time else None, lambda _: None)
    )
    assert slot.start is not None  # else it was refused
    click.echo(f"would start {when(slot.start, cluster.read().now or int(time.time()))}")
    return 0


def _in_turn(wants: Resources, workers: int, command: Sequence[str]) -> int:
    """Wait in this machine's queue, then run."""
    environ, wanted = _environment(), devices.wants(wants, workers)
    if not wanted:
        return foreground.run(command, environ)
    if EXEC in os.environ:
        raise UserError(
            "this is inside of `launch exec` already", "Type the command itself: it has what that has."
        )
    name = f"exec-{os.getpid()}-{secrets.token_hex(4)}"
    member, line = Member(_entry(name, wants, wanted)), foreground.Line()
    try:
        try:
            given = member.enter(wants.max_wait, line.wait)
        finally:
            line.clear()
        assert given is not None
        return foreground.run(command, environ | {**given, EXEC: name}, lambda: _give_way(member))
    except Refused as refused:
        raise LaunchError(str(refused)) from None
    finally:
        member.withdraw()


def _entry(name: str, wants: Resources, wanted: dict[str, int]) -> Entry:
    me = processes.inspect(os.getpid())
    assert me is not None
    return Entry(
        key=f"{name}.json",
        run=name,
        priority=wants.priority,
        ticket=0,  # none yet
        preemptible=wants.preemptible,
        wants=wanted,
        folder="",  # it is no run
        uid=os.getuid(),
        boot=lease.boot(),
        supervisor=(me.pid, me.start),
        guard=None,
        grace=GRACE,
    )


def _give_way(member: Member) -> None:
    """End the command, and all that it has started, if a run of higher priority wants its devices."""
    after = member.successor()
    if after is None:
        return
    why = f"gives way to {after.run}, of priority {after.priority}"
    click.echo(f"\r\nlaunch: the command {why}: SIGTERM now, SIGKILL in {GRACE:g} s", err=True)

    def find() -> list[processes.Process]:
        return processes.of_command(member.entry.run)

    for process in find():  # all of them, as Slurm does: an interactive shell would keep it to itself
        process.signal(signal.SIGTERM)
    if not processes.gone(find, GRACE):
        processes.kill(find)
