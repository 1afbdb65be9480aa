"""What a dry run shows: a plan as text for people or as JSON, made from what would really be run."""

import os
import shlex
from collections.abc import Iterator
from typing import Any

from launcher.cli.submit import Plan
from launcher.recipe.sections import Resources
from launcher.recipe.yamlpos import dump


def as_json(plan: Plan) -> dict[str, Any]:
    command = plan.command()
    return {
        "schema": 1,
        "run": plan.record,
        "folder": str(plan.run.path),
        "recipe": plan.recipe.model_dump(),
        "command": list(command.argv),
        "env": _changed(command.env),
        "cwd": str(command.cwd),
        "script": _script(plan),
        "notes": plan.notes,
        "warnings": plan.warnings,
    }


def as_text(plan: Plan) -> str:
    command, recipe = plan.command(), plan.recipe
    lines = [f"This would run {plan.record['recipe']} as {plan.run.id}:", ""]
    lines += [f"  {name:<12}{value}" for name, value in _facts(plan)]
    lines += ["", "  train"]
    lines += [f"    {line}" for line in dump(recipe.train).splitlines()]
    lines += ["", f"by this, in {command.cwd}:", "", *_wrapped(command.argv)]
    lines += ["", "with these variables beside the caller's own:", ""]
    lines += [f"  {name}={shlex.quote(value)}" for name, value in sorted(_changed(command.env).items())]
    if script := _script(plan):
        lines += ["", "in a job that sbatch is given this script for:", "", script.rstrip()]
    return "\n".join(lines)


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    recipe, record = plan.recipe, plan.record
    restart, git = recipe.restart, record["git"]
    window = f", a window of the session {recipe.tmux.session}" if plan.backend == "tmux" else ""
    yield "backend", plan.backend + window
    yield "resources", _resources(recipe.resources)
    if plan.activation.argv:
        yield "env", _environment(plan)
    saves = recipe.checkpoint
    besides = f" and one for each {saves.keep_every} steps" if saves.keep_every else ""
    yield "checkpoint", f"every {saves.every}, the last {saves.keep}{besides} are kept"
    for item in recipe.fetch:
        yield "fetch", f"{item.source} to {item.to}, once per machine"
    most = " at most" if plan.backend == "slurm" else ""  # a note says how many the cluster leaves
    yield "stopping", f"{restart.grace:g} s{most} to save and leave"
    pauses = f"pauses from {restart.backoff:g} s, a standstill of {restart.hang:g} s is a hang"
    yield "restart", f"after at most {restart.crashes} crashes, {pauses}"
    if record["url"]:
        yield "store", f"{record['url']}, every {recipe.mirror.every:g} s"
    else:
        yield "store", "none: set storage.url or LAUNCH_STORAGE, else this disk has the only copy"
    if git["commit"]:
        yield "code", f"commit {git['commit'][:12]}{' with uncommitted changes' if git['dirty'] else ''}"
    else:
        yield "code", "not in a git repository"
    yield "folder", str(plan.run.path)


def _script(plan: Plan) -> str | None:
    """The batch script of the run's first job, where it is to be one of Slurm's."""
    if plan.backend != "slurm":
        return None
    from launcher.supervisor.job.submission import script

    return script(plan.run, plan.recipe)


def _resources(resources: Resources) -> str:
    unit = ("GPU" if resources.device == "cuda" else "CPU worker") + "s" * (resources.gpus != 1)
    nodes = f" on each of {resources.nodes} nodes" if resources.nodes > 1 else ""
    least = f" (at least {resources.min_gpus})" if resources.min_gpus > 1 else ""
    return f"{resources.gpus} {unit}{nodes}{least}"


def _environment(plan: Plan) -> str:
    env = plan.recipe.env
    modules = f"modules {', '.join(env.modules)}" if env.modules else ""
    setup = f"{len(env.setup)} line{'s' * (len(env.setup) > 1)} of setup" if env.setup else ""
    return ", ".join(filter(None, [modules, plan.activation.python, setup]))


def _wrapped(argv: tuple[str, ...]) -> list[str]:
    """The command as lines that can be pasted."""
    lines = [" "]
    for word in map(shlex.quote, argv):
        if len(lines[-1]) + len(word) > 106:
            lines.append("   ")
        lines[-1] += f" {word}"
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _changed(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if os.environ.get(name) != value}
