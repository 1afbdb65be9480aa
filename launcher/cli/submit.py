"""From a recipe to a run folder: every check before the first file, then the folder in one go.

A dry run is the same code up to the last call.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launcher import environ, rundir
from launcher.activation import Activation
from launcher.cli import snapshot
from launcher.errors import LaunchError, StoreAway, UserError
from launcher.recipe import Flags, Recipe, environment, load_frozen, parse, program, resolve
from launcher.recipe.document import Document, display
from launcher.rundir import RunDir
from launcher.slurm import commands
from launcher.supervisor import torchrun


@dataclass
class Plan:
    """All that is settled before anything is written."""

    recipe: Recipe
    path: Path
    run: RunDir
    backend: str
    record: dict[str, Any]  # run.json
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    activation: Activation = field(default_factory=Activation)

    def command(self) -> torchrun.Command:
        """What would start the first attempt."""
        gpus, entered = self.recipe.resources.gpus, self.activation
        return torchrun.command(self.recipe, self.run, 1, gpus, self.record, os.environ, activation=entered)


def plan(
    path: Path, overrides: Sequence[str], flags: Flags, name: str | None, backend: str, dry: bool
) -> Plan:
    """Check everything. Raises RecipeError, UserError, StoreError.

    A dry run only warns of what this machine or the store lacks."""
    document = resolve(path, overrides, flags)
    recipe = parse(document)
    key = recipe_key(path)
    run = RunDir(rundir.runs_root() / rundir.new_run_id(name or key.rpartition("/")[2]))
    plan = Plan(recipe, path, run, pick_backend(backend), {})
    with ThreadPoolExecutor(1) as pool:  # the program looks at its half while we look at ours
        asked = pool.submit(program.check, recipe, document, here=plan.backend != "slurm")
        try:
            url = _here(plan, document, dry)
        finally:  # what is wrong with the recipe is said rather than what is wrong with the place
            findings = asked.result()
            problems = findings.environment + findings.machine
            if not dry:
                _refuse(document, findings, plan.backend)
    plan.warnings += [str(document.error([problem])) for problem in problems]
    plan.notes += findings.notes
    plan.activation = findings.activation
    plan.record = _record(plan, key, url)
    return plan


def check_again(run: RunDir, flags: Flags, backend: str) -> Recipe:
    """What a resumed run needs of this machine, which may not be the one that it came from."""
    document = resolve(run.recipe, (), flags)
    recipe = parse(document)
    record = rundir.read_json(run.run) or {}
    prefix = (record.get("git") or {}).get("prefix") or ""
    findings = program.check(recipe, document, run.code / prefix, here=backend != "slurm")
    _refuse(document, findings, backend)
    _backend_check(backend, recipe, document)
    if str(record.get("url")).startswith("s3://"):
        environment.check_credentials_travel(os.environ, backend, recipe.storage.profile)
    return recipe


def adopt(run: RunDir, backend: str, elsewhere: bool) -> None:
    """Tell run.json where the run goes on, and that it shall. The caller knows that nobody holds the run."""
    run.stop_requested.unlink(missing_ok=True)  # of the run's last life; from here on it is of this one
    run.resume_requested.touch()
    record = rundir.read_json(run.run) or {}
    changed = record | {"backend": backend}
    if elsewhere:
        env = environment.frozen_env(os.environ, load_frozen(run.recipe).env.keep)
        changed |= {"host": socket.gethostname(), "workdir": str(Path.cwd()), "env": env}
    if changed != record:
        rundir.write_json(run.run, changed)


def create(plan: Plan) -> None:
    """Make the run's folder: aside, then renamed, so that nobody ever sees half of one. Raises UserError."""
    root = plan.run.path.parent
    fresh = not root.exists()
    aside = root / f".{plan.run.id}.new"
    try:
        aside.mkdir(parents=True)
        _fill(aside, plan)
        rundir.sync_dir(aside)
        aside.rename(plan.run.path)
        rundir.sync_dir(root)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if fresh:
            with contextlib.suppress(OSError):
                root.rmdir()
        if isinstance(error, OSError):
            raise UserError(
                f"cannot make a run folder in {root}: {error.strerror or error}",
                "set LAUNCH_RUNS to a folder where there is room and that you may write to",
            ) from None
        raise


def discard(run: RunDir) -> None:
    """Take back a folder whose run did not start. What an attempt has touched stays."""
    if not run.attempts.exists():
        shutil.rmtree(run.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # others may be there
            run.path.parent.rmdir()


def pick_backend(wanted: str) -> str:
    """`auto` is Slurm where its controller answers, else tmux where there is one, else the foreground."""
    if wanted != "auto":
        return wanted
    if commands.answers():
        return "slurm"
    return "tmux" if shutil.which("tmux") else "local"


def recipe_key(path: Path) -> str:
    """The recipe's name in the store: its path in its repository, or its stem outside of one."""
    real = path.resolve()
    top = repository(real.parent)
    parts = (real.relative_to(top) if top else Path(real.name)).with_suffix("").parts
    return "/".join(re.sub(r"[^A-Za-z0-9._-]", "_", part).lstrip(".") or "_" for part in parts)


def repository(folder: Path) -> Path | None:
    """The top of the git work tree that `folder` is in."""
    try:
        told = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--show-toplevel"], capture_output=True, text=True
        )
    except OSError:
        return None
    return Path(told.stdout.rstrip("\n")) if told.returncode == 0 and told.stdout.strip() else None


def _here(plan: Plan, document: Document, dry: bool) -> str | None:
    """Check backend, credentials and store; the URL of the store, if there is one."""
    url = None
    try:
        plan.notes += _backend_check(plan.backend, plan.recipe, document)
    except LaunchError as error:
        _tell(plan, error, dry)
    try:
        url = _store(plan.recipe, plan.backend)
    except LaunchError as error:
        _tell(plan, error, dry)
        url = storage_url(plan.recipe)
    if plan.recipe.fetch:
        try:
            _sources(plan.recipe, plan.backend)
        except LaunchError as error:
            _tell(plan, error, dry)
    return url


def _tell(plan: Plan, error: LaunchError, dry: bool) -> None:
    if not dry:
        raise error
    plan.warnings.append(error.message)


def _refuse(document: Document, findings: program.Findings, backend: str) -> None:
    """Raise RecipeError for what would not work. What only this machine lacks, a job elsewhere may have."""
    problems = findings.environment + (findings.machine if backend != "slurm" else [])
    if problems:
        raise document.error(problems)


def _backend_check(name: str, recipe: Recipe, document: Document) -> list[str]:
    """Raises what the backend has against the recipe; what it has to say of it."""
    from launcher.backends import BACKENDS

    problems = list(BACKENDS[name].check(recipe))
    if problems:
        raise document.error(problems)
    return BACKENDS[name].notes(recipe)


def storage_url(recipe: Recipe) -> str | None:
    return recipe.storage.url or os.environ.get("LAUNCH_STORAGE") or None


def _store(recipe: Recipe, backend: str) -> str | None:
    """Ask the store whether it is there and lets us in; its URL."""
    url = storage_url(recipe)
    if url is None:
        return None
    from launcher.storage import reach

    if environment.holds_secret(url):
        raise UserError("the URL in LAUNCH_STORAGE holds credentials", "put them into a profile or a file")
    if url.startswith("s3://"):
        environment.check_credentials_travel(os.environ, backend, recipe.storage.profile)
    try:
        return reach(url, recipe.storage.settings).url
    except StoreAway as error:
        raise StoreAway(error.message, error.hint or "nothing was started") from None


def _sources(recipe: Recipe, backend: str) -> None:
    """Ask for the data sets that would be fetched: where nothing is, nothing need be started."""
    from launcher import fetch

    if any(item.source.startswith("s3://") for item in recipe.fetch):
        environment.check_credentials_travel(os.environ, backend, recipe.storage.profile)
    fetch.check(recipe, Path.cwd())


def _record(plan: Plan, key: str, url: str | None) -> dict[str, Any]:
    """run.json."""
    user = environ.user()
    prefix = re.sub(r"[^A-Za-z0-9._-]", "_", user).lstrip(".") or "_"
    return {
        "schema": 1,
        "id": plan.run.id,
        "name": plan.run.name,
        "recipe": display(plan.path),
        "recipe_key": key,
        "recipe_hash": plan.recipe.hash(),
        "user": user,
        "host": socket.gethostname(),
        "created": time.time(),
        "git": snapshot.describe(Path.cwd()),
        "workdir": str(Path.cwd()),
        "backend": plan.backend,
        "resources": plan.recipe.resources.model_dump(include={"gpus", "nodes", "device"}),
        "env": environment.frozen_env(os.environ, plan.recipe.env.keep),
        "url": f"{url.rstrip('/')}/{prefix}/{key}/{plan.run.id}" if url else None,
        "launcher": version("launch-detcore"),
    }


def _fill(folder: Path, plan: Plan) -> None:
    half, script = RunDir(folder), plan.recipe.program.script
    half.recipe.write_text(plan.recipe.dump(), encoding="utf-8")
    half.logs.mkdir()
    git = plan.record["git"] = snapshot.take(Path.cwd(), half.code, script)
    rundir.write_json(half.run, plan.record)
    tracked = script and git["commit"] and ".." not in Path(script).parts and not Path(script).is_absolute()
    if script and tracked and not (half.code / git["prefix"] / script).is_file():
        raise UserError(
            f"{script} is not tracked by git, so it is not in the snapshot that a run is started from",
            f"git add {script}",
        )
