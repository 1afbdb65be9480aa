"""Pure: a recipe -> the options of sbatch that its job is submitted with, by their long names (sbatch(1))."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from launcher.recipe.document import Problem

if TYPE_CHECKING:
    from launcher.recipe import Recipe

# What the launcher itself answers for; each is a key of `resources`, or would break the way back.
OWNED = {
    **{"gpus": "resources.gpus", "gres": "resources.gpus", "gpus-per-node": "resources.gpus"},
    **{"nodes": "resources.nodes", "cpus-per-task": "resources.cpus", "mem": "resources.memory"},
    **{"time": "resources.time", "deadline": "resources.max_wait", "nice": "resources.priority"},
    **dict.fromkeys(("job-name", "output", "error", "open-mode", "signal", "array", "wrap", "export"), ""),
    **dict.fromkeys(("ntasks", "ntasks-per-node", "requeue", "no-requeue", "parsable", "test-only"), ""),
}
NAMED = ("partition", "account", "qos", "constraint", "exclude", "reservation")


def options(
    recipe: "Recipe", gpus: int | None = None, nodes: int | None = None, first: bool = False
) -> dict[str, str]:
    """Long option -> its value, "" for one that takes none.

    gpus, nodes: where a resume has others. first: whether it is the run's first job, whose wait has an end.
    """
    wants, slurm = recipe.resources, recipe.slurm
    gpus, nodes = gpus or wants.gpus, nodes or wants.nodes
    made = {
        "nodes": str(nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(wants.cpus or gpus),
        "requeue": "",  # what brings a run back from a node that died
    }
    if wants.device == "cuda":
        made["gres"] = f"gpu:{gpus}"
    if wants.memory:
        made["mem"] = f"{wants.memory}M"
    if wants.time:
        made["time"] = str(max(1, int(wants.time // 60)))
        if wants.max_wait and first:  # a job that cannot end by then is taken from the queue
            made["deadline"] = f"now+{int(wants.max_wait + wants.time)}"
    if wants.priority < 0:
        made["nice"] = str(-wants.priority)
    made |= {name: value for name in NAMED if (value := getattr(slurm, name)) is not None}
    for section in (slurm.options, slurm.preemptible if wants.preemptible else {}):
        made |= dict(_plain(section))
    return made


def flags(wanted: Mapping[str, str]) -> list[str]:
    """Options as arguments."""
    return [f"--{name}={value}" if value else f"--{name}" for name, value in wanted.items()]


def check(recipe: "Recipe") -> Iterator[Problem]:
    """Options that belong to another key, or to the launcher, and a wait that Slurm cannot be told."""
    if recipe.resources.max_wait and not recipe.resources.time:
        wrong = "on Slurm `max_wait` needs `resources.time`: a deadline is all that Slurm knows"
        yield Problem(("resources", "max_wait"), wrong)
    for section in ("options", "preemptible"):
        for name in getattr(recipe.slurm, section):
            if name in OWNED:
                use = f"; say it as `{OWNED[name]}`" if OWNED[name] else ", which the launcher sets itself"
                yield Problem(("slurm", section, name), f"`{name}` cannot be passed through{use}")


def _plain(section: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for name, value in section.items():
        if value is not False:
            yield name, "" if value is True else str(value)
