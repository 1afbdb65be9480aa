"""What the program says about its half of a recipe, and what this machine has of what it asks for."""

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import activation
from launcher.activation import Activation
from launcher.errors import LaunchError, UserError
from launcher.recipe import Recipe
from launcher.recipe.document import Document, Loc, Problem
from launcher.workstation import devices
from launcher.workstation.order import GPUS

CHECK_PATIENCE = 120.0  # seconds; a check reads a few files, but on a cold network disk
# Before 3.11 Python could not be kept from preferring the working directory to the snapshot (PYTHONSAFEPATH).
OLDEST = (3, 11)
LOOK = (
    "import importlib.util as u, json, sys; sys.path = list(filter(None, sys.path)); "
    "print(json.dumps([sys.version_info[:2], u.find_spec('torch') is not None]))"
)


@dataclass
class Findings:
    """`machine`: what would only fail here (no such data set, no such GPU). `notes`: worth telling.

    `environment`: what is wrong with the environment that `env` names, which all machines of a run share."""

    machine: list[Problem] = field(default_factory=list)
    environment: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    activation: Activation = field(default_factory=Activation)


def check(recipe: Recipe, document: Document, code: Path | None = None, here: bool = True) -> Findings:
    """Ask the program's own check; a program of a snapshot is looked for in `code` first. `here`: whether it
    will run on this machine.

    Raises RecipeError with what is wrong with the recipe itself."""
    findings = Findings()
    program = recipe.program
    places = [place for place in (code, Path.cwd()) if place]
    if program.script is not None and not any((place / program.script).is_file() for place in places):
        wrong = f"there is no script {program.script} here; the path goes from the working directory"
        raise document.error([Problem(("program", "script"), wrong)])
    _look_at_environment(recipe, findings)
    python = "" if findings.environment else findings.activation.python  # without one, nobody can be asked
    sure = not (recipe.env.modules or recipe.env.setup)  # these may tell Python of further places
    if python and sure and program.module and not program.check:
        _check_importable(python, program.module, recipe, document, places)
    if python and program.check:
        answer = _ask(python, program.check, recipe, document, places)
        problems = [_problem(said) for said in answer.get("problems", [])]
        wrong_in_recipe = [problem for kind, problem in problems if kind == "recipe"]
        if wrong_in_recipe:
            raise document.error(wrong_in_recipe)
        findings.machine += [problem for _, problem in problems]
        findings.notes += [str(note) for note in answer.get("notes", [])]
    lacking = _gpus_lacking(recipe) if here else ""
    if lacking:
        findings.machine.append(Problem(("resources", "gpus"), lacking))
    return findings


def _look_at_environment(recipe: Recipe, findings: Findings) -> None:
    """Find the environment, and see whether its Python can run torchrun."""
    env = recipe.env
    missing = activation.modules_missing(env, os.environ)
    if missing:
        findings.machine.append(Problem(("env", "modules"), missing))
    try:
        findings.activation = activation.find(env, Path.cwd(), os.environ)
    except activation.Unusable as error:
        findings.environment.append(Problem(("env", error.key), error.message))
        return
    key = "conda" if env.conda else "venv"
    if env.conda or env.venv:
        wrong = _unfit(findings.activation.python, bool(env.modules or env.setup))
        if wrong:
            name = f"the environment {env.conda or env.venv}"
            findings.environment.append(Problem(("env", key), f"{name} {wrong}"))


def _unfit(python: str, more: bool) -> str:
    """Why torchrun cannot run with this Python. With `more`, only entering the environment gives it all."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    try:
        done = subprocess.run(
            [python, "-c", LOOK], capture_output=True, timeout=CHECK_PATIENCE, env=environ, cwd="/"
        )
        version, torch = json.loads(done.stdout)
    except (OSError, ValueError) as error:
        words = str(error) if isinstance(error, OSError) else _last(done.stderr.decode(errors="replace"))
        return "" if more else f"has a Python that does not start: {words}"
    except subprocess.TimeoutExpired:
        return f"has a Python that did not answer within {CHECK_PATIENCE:.0f} s"
    if tuple(version) < OLDEST:
        return f"has Python {version[0]}.{version[1]}, and {OLDEST[0]}.{OLDEST[1]} is the oldest that will do"
    return "" if torch or more else "has no torch; install it there"


def _ask(python: str, module: str, recipe: Recipe, document: Document, places: list[Path]) -> dict[str, Any]:
    resources = recipe.resources.model_dump(include={"gpus", "nodes", "device", "min_gpus"})
    fetched = [str(Path.cwd() / item.to) for item in recipe.fetch]
    question = json.dumps({"train": recipe.train, "resources": resources, "fetched": fetched})
    argv = [python, "-P", "-m", module, "--check"]
    environ = _environment(places, recipe)
    try:
        done = subprocess.run(
            argv,
            input=question,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CHECK_PATIENCE,
            env=environ,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{module} --check did not answer within {CHECK_PATIENCE:.0f} s") from None
    try:
        answer = json.loads(done.stdout) if done.returncode == 0 else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        if f"No module named '{module.split('.')[0]}" in done.stderr or "find spec for" in done.stderr:
            raise document.error([Problem(("program", "check"), _no_module(module))])
        last = _last(done.stderr) or _last(done.stdout) or "it printed nothing"
        raise UserError(f"{module} --check could not answer: {last}", f"try it: python -m {module} --check")
    return answer


def _problem(said: dict[str, Any]) -> tuple[str, Problem]:
    loc: Loc = tuple(part if isinstance(part, int) else str(part) for part in said.get("loc", []))
    known = said.get("known")
    return said.get("kind", "recipe"), Problem(loc, str(said["message"]), known)


def _last(words: str) -> str:
    return words.strip().rpartition("\n")[2]


def _environment(places: list[Path], recipe: Recipe) -> dict[str, str]:
    """As the program will have it: modules are found in the snapshot or the working directory."""
    environ = os.environ | recipe.env.vars
    if recipe.env.conda or recipe.env.venv:
        environ.pop("PYTHONHOME", None)
    path = os.pathsep.join([*map(str, places), *filter(None, [environ.get("PYTHONPATH")])])
    return {**environ, "PYTHONPATH": path}


def _check_importable(
    python: str, module: str, recipe: Recipe, document: Document, places: list[Path]
) -> None:
    # In a process of its own: looking a module up runs the code of the package that it is in.
    look = "import sys, importlib.util as u; sys.exit(u.find_spec(sys.argv[1]) is None)"
    argv = [python, "-P", "-c", look, module]
    if subprocess.run(argv, capture_output=True, env=_environment(places, recipe)).returncode:
        raise document.error([Problem(("program", "module"), _no_module(module))])


def _no_module(module: str) -> str:
    return f"Python finds no module {module} from here"


def _gpus_lacking(recipe: Recipe) -> str:
    resources = recipe.resources
    if resources.device == "cpu":
        return ""
    try:
        have = len(devices.gpus())
    except LaunchError as error:
        return error.message
    return devices.lacking({GPUS: resources.gpus}, {GPUS: have}).get(GPUS, "")
