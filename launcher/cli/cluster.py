"""The verbs that ask what a cluster or workstation would do, and that use it for any command."""

from pathlib import Path
from typing import Any

import click

from launcher.cli.options import BACKEND, wants
from launcher.cli.verbs import flags_of


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
@wants
@BACKEND
@click.option("--json", "as_json", is_flag=True, help="For programs; the keys stay as they are.")
def predict(recipe: Path, overrides: tuple[str, ...], backend: str, as_json: bool, **asked: Any) -> int:
    """Say when RECIPE would start, and whether a part of it would sooner; start nothing."""
    from launcher.cli.predict import predict as foresee

    return foresee(recipe, overrides, flags_of(**asked), backend, as_json)


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
@wants
@click.option(
    "--backend",
    type=click.Choice(["auto", "slurm", "local"]),
    default="auto",
    help="auto: Slurm if it answers, else this machine.",
)
@click.option("--predict-only", is_flag=True, help="Say when it would start; start nothing.")
def execute(command: tuple[str, ...], backend: str, predict_only: bool, **asked: Any) -> int:
    """Run any COMMAND, interactive or not, on what it asks for.

    \b
      launch exec --gpus 4 --cpus 8 --memory 30G --max-wait 24h -- bash

    It waits until that is free, in Slurm's queue or in this workstation's, and then has this terminal. Its
    exit status is the command's.
    """
    from launcher.cli.execute import execute as run_command

    return run_command(command, flags_of(**asked), backend, predict_only)


@click.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--partition", help="Slurm's partition; default: the recipe's, or the cluster's own.")
@click.option("--json", "as_json", is_flag=True, help="For programs; the keys stay as they are.")
def doctor(recipe: Path | None, partition: str | None, as_json: bool) -> int:
    """Find out what this cluster or workstation will do to a run.

    On Slurm it submits a job of some seconds. With RECIPE, for what that asks for. Exit status 1 if something
    is bad.
    """
    from launcher.cli.doctor import doctor as examine

    return examine(recipe, partition, as_json)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
@wants
@BACKEND
@click.option(
    "--every", type=click.IntRange(1), default=10, show_default=True, help="Steps between checkpoints."
)
@click.option("--json", "as_json", is_flag=True, help="For programs; the keys stay as they are.")
def drill(
    recipe: Path, overrides: tuple[str, ...], backend: str, every: int, as_json: bool, **asked: Any
) -> int:
    """Preempt RECIPE on purpose, and prove that nothing is lost.

    It runs for some steps, is preempted as its backend would, and comes back; then it runs again undisturbed,
    and both are compared. Exit status 0: all that is promised held.
    """
    from launcher.cli.drill import drill as prove

    return prove(recipe, overrides, flags_of(**asked), backend, every, as_json)


VERBS = (predict, execute, doctor, drill)
