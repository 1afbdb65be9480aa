"""`launch doctor`: asks the cluster, a node of it or this machine, and the store; says what that means."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher import activation
from launcher.cli.doctor import examine
from launcher.cli.doctor.equipment import of_node
from launcher.cli.doctor.findings import Finding, of_cluster, of_probe
from launcher.errors import UserError
from launcher.recipe import Recipe, parse, resolve
from launcher.recipe.document import Document, Problem
from launcher.rundir import runs_root
from launcher.slurm import cluster as slurm
from launcher.slurm import commands, probe_task, profile
from launcher.slurm.cluster import Cluster, Partition
from launcher.slurm.commands import SlurmAway, SlurmError
from launcher.slurm.options import options
from launcher.slurm.probe import CORES, Blind, probe
from launcher.storage import StoreSettings

SCHEMA = 1
COLOURS = {"good": "green", "note": "yellow", "bad": "bold red"}
Say = Callable[[str], None]


def doctor(path: Path | None, partition: str | None, as_json: bool) -> int:
    """Print the findings; 1 if any is bad. Raises RecipeError, UserError."""
    flags = {"slurm.partition": (f"--partition {partition}", partition)} if partition else {}
    document = resolve(path, (), flags) if path else None
    recipe = parse(document) if document else None
    python = _python(recipe, document)
    with Console(stderr=True).status("asking Slurm") as status:
        cluster, findings = _cluster()
        place = _partition(cluster, partition, recipe, document) if cluster else None
        if cluster and place:
            findings += on_cluster(cluster, place, recipe, python, status.update)
        else:
            findings += workstation(recipe, python)
        status.update("asking the store")
        findings += _store(recipe)
    if as_json:
        told = asdict(cluster) | {"partition": place.name} if cluster and place else None
        print(json.dumps({"schema": SCHEMA, "cluster": told, "findings": [one.record() for one in findings]}))
    elif cluster and place:
        _show(f"cluster {cluster.name}, Slurm {cluster.version}, partition {place.name}", findings)
    else:
        _show("this machine", findings)
    return int(any(one.state == "bad" for one in findings))


def _python(recipe: Recipe | None, document: Document | None) -> str:
    """What is to run torchrun."""
    if recipe is None or document is None:
        return sys.executable
    try:
        return activation.find(recipe.env, Path.cwd(), os.environ).python
    except activation.Unusable as error:
        raise document.error([Problem(("env", error.key), error.message)]) from None


def _partition(
    cluster: Cluster, named: str | None, recipe: Recipe | None, document: Document | None
) -> Partition:
    """Where the probe goes. Raises RecipeError if the recipe asks for what it has not, UserError."""
    if recipe and document:
        if wrong := slurm.check_asked(cluster, recipe):
            raise document.error(Problem(loc, sentence) for loc, sentence in wrong)
        named = options(recipe).get("partition")
    found = cluster.partition(named)
    if found is None:
        there = f"There are: {', '.join(cluster.partitions)}."
        raise UserError(f"there is no partition `{named}` here" if named else "name a --partition", there)
    return found


def on_cluster(
    cluster: Cluster, partition: Partition, recipe: Recipe | None, python: str, say: Say
) -> list[Finding]:
    """What the configuration says, and what a job finds; its figures are kept for the budget of runs."""
    least = {"program": {"script": "probe"}, "slurm": {"partition": partition.name}}
    least |= {"resources": {"device": "cuda" if partition.gpus else "cpu"}}
    asked = recipe or Recipe.model_validate(least)
    flags = options(asked)
    qos = flags.get("qos")
    grace = recipe.restart.grace if recipe else None
    device = asked.resources.device
    say("submitting a probe")
    try:
        found = probe(_small(flags, device), runs_root(), cluster.kill_after, say, python)
    except (Blind, SlurmError, OSError) as error:
        return [*of_cluster(cluster, partition, qos, grace), _blind(error)]
    unkept = []
    try:
        profile.write(cluster.name, found.kill_after, found.reached)
    except OSError as error:
        means = "later runs count with the cluster's KillWait instead of what was measured"
        unkept = [Finding("profile", "note", f"cannot be kept: {error}", means, "Set XDG_CONFIG_HOME.")]
    told = of_cluster(cluster, partition, qos, grace)  # with the new profile
    return [*told, *of_probe(cluster, found), *of_node(found.node, device, 1, CORES), *unkept]


def workstation(recipe: Recipe | None, python: str) -> list[Finding]:
    """What runs find on this machine."""
    root = runs_root()
    while not root.is_dir():
        root = root.parent
    wants = recipe.resources if recipe else None
    node = probe_task.node(root / "probe", python)
    return [
        examine.tmux(),
        examine.shared(),
        *of_node(node, wants.device if wants else "cuda", wants.gpus if wants else None, None),
    ]


def _cluster() -> tuple[Cluster | None, list[Finding]]:
    """The cluster, or why this machine is looked at instead."""
    instead = "this machine is looked at instead"
    if not commands.here():
        return None, [Finding("slurm", "note", "there is no sbatch here", f"no submit host; {instead}")]
    try:
        return slurm.read(), []
    except SlurmAway as error:
        means = f"no job can be submitted; {instead}"
        return None, [Finding("slurm", "bad", error.message, means, error.hint)]
    except SlurmError as error:  # its commands are installed, but no cluster is configured
        return None, [Finding("slurm", "note", error.message, f"no submit host; {instead}")]


def _small(asked: dict[str, str], device: str) -> dict[str, str]:
    """The options that a run would have, for a job that asks for as little as it can and never comes back."""
    kept = {name: value for name, value in asked.items() if name not in ("requeue", "mem", "gres", "nice")}
    return kept | ({"gres": "gpu:1"} if device == "cuda" else {})


def _blind(error: Blind | SlurmError | OSError) -> Finding:
    means = "not known: who gets which signal, when SIGKILL comes, whether a node sees the runs, what it has"
    if isinstance(error, OSError):
        return Finding(
            "probe", "bad", str(error), means, "Set LAUNCH_RUNS to a folder that you may write to."
        )
    harmless = isinstance(error, Blind) and not error.bad
    return Finding("probe", "note" if harmless else "bad", error.message, means, error.hint)


def _store(recipe: Recipe | None) -> list[Finding]:
    wants = recipe.storage if recipe else None
    url = (wants and wants.url) or os.environ.get("LAUNCH_STORAGE") or None
    return examine.store(url, wants.settings if wants else StoreSettings())


def _show(head: str, findings: list[Finding]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    console.print(Text(f"launch doctor: {head}", style="bold"))
    made = Table.grid(padding=(0, 2))
    made.add_column(no_wrap=True)
    made.add_column(no_wrap=True, style="bold")
    made.add_column(overflow="fold")
    for one in findings:
        said = Text(one.found)
        said.append(f"\n{one.means}", style="dim")
        if one.do and one.state != "good":
            said.append(f"\n-> {one.do}")
        made.add_row(Text(one.state, style=COLOURS[one.state]), one.check, said)
    console.print(made)
