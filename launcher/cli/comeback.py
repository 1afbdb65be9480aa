"""`launch resume`: which runs may go on, and all of a machine's at once, after it was started anew."""

import shutil
import socket

import click

from launcher.backends import BACKENDS
from launcher.cli import queues, status, submit
from launcher.cli.status import Row
from launcher.cli.verbs import flags_of
from launcher.errors import LaunchError, UserError
from launcher.rundir import RunDir, read_json, runs_root
from launcher.supervisor import lease, processes


def refuse(run: RunDir) -> None:
    """Raises UserError if the run has finished, or somebody here has it."""
    if (read_json(run.final) or {}).get("state") == "finished":
        raise UserError(f"run {run.id} is finished; there is nothing to resume")
    holder = lease.holder(run)
    if (holder is not None and holder.alive) or processes.keepers(run.path):
        who = f": {holder} holds it" if holder else ""
        raise UserError(f"run {run.id} is running already{who}", f"launch status {run.id}")
    # Where Slurm is away, a job of the run that comes to start finds the run taken, and leaves.
    told = queues.of_slurm() if run.jobs.exists() else None
    if mine := (told or {}).get(run.id):
        raise UserError(f"run {run.id} is job {mine[0].id} already", f"launch status {run.id}")


def everything() -> int:
    """Bring every run of this machine back that is lost. One that cannot come keeps no other from coming."""
    rows = [row for row in status.listing() if row["state"] == "lost" and _ours(row)]
    if rows and shutil.which("tmux") is None:
        raise UserError("there is no tmux here to bring runs back in", "One by one: launch resume RUN")
    if not rows:
        click.echo(f"no run of {runs_root()} was lost on this machine")
    worst = 0
    for row in rows:
        try:
            _bring_back(RunDir(runs_root() / row["id"]), row["gpus"])
            click.echo(f"{row['id']} in a tmux window")
        except (LaunchError, OSError) as error:
            click.echo(f"{row['id']} does not come back: {error}", err=True)
            worst = 1
    return worst


def _bring_back(run: RunDir, gpus: int | None) -> None:
    refuse(run)
    submit.check_again(run, flags_of(gpus=gpus), "tmux")
    submit.adopt(run, "tmux", elsewhere=False)
    BACKENDS["tmux"].start(run, gpus)


def _ours(row: Row) -> bool:
    """Whether it ran in a window or terminal of this machine, and nobody wanted it to stop."""
    run = RunDir(runs_root() / row["id"])
    record = read_json(run.run) or {}
    here = record.get("host") == socket.gethostname()
    return here and record.get("backend") in ("tmux", "local") and not run.stop_requested.exists()
