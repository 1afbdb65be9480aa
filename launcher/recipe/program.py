"""What the program says about its half of a recipe, and what this machine has of what it asks for."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.recipe import Recipe
from launcher.recipe.document import Document, Loc, Problem

CHECK_PATIENCE = 120.0  # seconds; a check reads a few files, but on a cold network disk


@dataclass
class Findings:
    """`machine`: what would only fail here (no such data set, no such GPU). `notes`: worth telling."""

    machine: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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
    if program.module and not program.check and not _importable(program.module, places):
        raise document.error([Problem(("program", "module"), _no_module(program.module))])
    if program.check:
        answer = _ask(program.check, recipe, document, places)
        problems = [_problem(said) for said in answer.get("problems", [])]
        wrong_in_recipe = [problem for kind, problem in problems if kind == "recipe"]
        if wrong_in_recipe:
            raise document.error(wrong_in_recipe)
        findings.machine = [problem for _, problem in problems]
        findings.notes = [str(note) for note in answer.get("notes", [])]
    lacking = _gpus_lacking(recipe) if here else ""
    if lacking:
        findings.machine.append(Problem(("resources", "gpus"), lacking))
    return findings


def _ask(module: str, recipe: Recipe, document: Document, places: list[Path]) -> dict[str, Any]:
    resources = recipe.resources.model_dump(include={"gpus", "nodes", "device", "min_gpus"})
    question = json.dumps({"train": recipe.train, "resources": resources})
    argv = [sys.executable, "-P", "-m", module, "--check"]
    environ = _environment(places) | recipe.env.vars
    try:
        done = subprocess.run(
            argv, input=question, capture_output=True, text=True, timeout=CHECK_PATIENCE, env=environ
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
        last = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
        raise UserError(f"{module} --check could not answer: {last}", f"try it: python -m {module} --check")
    return answer


def _problem(said: dict[str, Any]) -> tuple[str, Problem]:
    loc: Loc = tuple(part if isinstance(part, int) else str(part) for part in said.get("loc", []))
    known = said.get("known")
    return said.get("kind", "recipe"), Problem(loc, str(said["message"]), known)


def _environment(places: list[Path]) -> dict[str, str]:
    """As the program will have it: modules are found in the snapshot or the working directory."""
    path = os.pathsep.join([*map(str, places), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def _importable(module: str, places: list[Path]) -> bool:
    # In a process of its own: looking a module up runs the code of the package that it is in.
    look = "import sys, importlib.util as u; sys.exit(u.find_spec(sys.argv[1]) is None)"
    argv = [sys.executable, "-P", "-c", look, module]
    return subprocess.run(argv, capture_output=True, env=_environment(places)).returncode == 0


def _no_module(module: str) -> str:
    return f"Python finds no module {module} from here"


def _gpus_lacking(recipe: Recipe) -> str:
    resources = recipe.resources
    if resources.device == "cpu":
        return ""
    have = gpus_here()
    if have >= resources.gpus:
        return ""
    plural = "" if have == 1 else "s"
    return f"this machine has {have or 'no'} GPU{plural}, the recipe asks for {resources.gpus}"


def gpus_here() -> int:
    """GPUs that a program started from here could use: the driver's, less what CUDA_VISIBLE_DEVICES hides."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return 0
    have = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return have if visible is None else min(have, len([part for part in visible.split(",") if part.strip()]))
