"""Options that several verbs share, and how they complete."""

from collections.abc import Callable
from typing import Any

import click


def complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from launcher.rundir import all_runs

    return [name for name in ["last", *(run.id for run in all_runs())] if name.startswith(incomplete)]


RUN = click.argument("run", shell_complete=complete_run)
GPUS = click.option("--gpus", type=click.IntRange(1), help="GPUs (with device: cpu, workers) to run on.")
BACKENDS = click.Choice(["auto", "slurm", "tmux", "local"])
BACKEND = click.option(
    "--backend", type=BACKENDS, default="auto", help="auto: Slurm if it answers, else tmux if there is one."
)
WANTS = [
    GPUS,
    click.option("--nodes", type=click.IntRange(1), help="Machines."),
    click.option("--cpus", type=click.IntRange(1), help="CPU cores on each node."),
    click.option("--memory", metavar="30G", help="Memory on each node; a bare number is MB."),
    click.option("--time", metavar="24h", help="Longest time of one job; the run goes on in the next."),
    click.option("--max-wait", metavar="24h", help="Give up if it has not started by then."),
    click.option("--preemptible", is_flag=True, default=None, help="It may be killed at any time."),
    click.option("--priority", type=int, help="Higher goes first; default 0."),
    *(
        click.option(f"--{name}", help=f"Slurm's {name}.")
        for name in ("partition", "account", "qos", "constraint", "exclude", "reservation")
    ),
]


def wants(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what a run asks for; each is a key of `resources` or `slurm`."""
    for option in reversed(WANTS):
        function = option(function)
    return function
