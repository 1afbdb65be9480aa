"""What each verb of the command line does. Imports what it needs when it is called, and nothing before."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.errors import LaunchError, Taken, UserError

if TYPE_CHECKING:
    from launcher.backends.base import Backend
    from launcher.cli.submit import Plan
    from launcher.rundir import RunDir


def run(
    recipe: Path,
    overrides: tuple[str, ...],
    backend: str,
    name: str | None,
    follow: bool,
    dry_run: bool,
    freeze: bool,
    as_json: bool,
    **wants: Any,
) -> int:
    from launcher.cli import submit

    flags = flags_of(**wants)
    if freeze:
        from launcher.recipe import parse, program, resolve

        document = resolve(recipe, overrides, flags)
        frozen = parse(document)
        program.check(frozen, document)
        click.echo(frozen.dump(), nl=False)
        return 0
    dry = dry_run or as_json
    plan = submit.plan(recipe, overrides, flags, name, backend, dry)
    if not as_json:
        _tell(plan)
    if dry:
        from launcher.cli import preview

        click.echo(json.dumps(preview.as_json(plan), indent=1) if as_json else preview.as_text(plan))
        return 0
    submit.create(plan)
    try:
        return _start(plan.run, plan.backend, None, follow)
    except LaunchError as error:
        if not error.uncertain:
            submit.discard(plan.run)
        raise


def status(spec: str | None, as_json: bool, watch: bool, everything: bool) -> int:
    from launcher.cli import logs, status
    from launcher.rundir import find_run

    run = find_run(spec) if spec else None
    if as_json:
        answer = status.details(run) if run else {"schema": status.SCHEMA, "runs": status.listing(everything)}
        click.echo(json.dumps(answer, indent=1))
        return 0
    from rich.console import Console

    from launcher.cli import show

    def view() -> Any:
        return show.run_view(run) if run else show.table(status.listing(everything))

    piped = None if sys.stdout.isatty() else 200  # a line per run, for grep
    console = Console(highlight=False, width=piped)
    if watch:
        show.watch(console, view, lambda: run is not None and logs.over(run))
    else:
        console.print(view())
    return 0


def logs(spec: str, follow: bool, rank: int | None) -> int:
    from launcher.cli import logs
    from launcher.rundir import find_run

    run = find_run(spec)
    if follow:
        logs.follow(run, sys.stdout.buffer, lambda: logs.over(run), rank)
    else:
        logs.show(run, sys.stdout.buffer, rank)
    return 0


def attach(spec: str) -> int:
    from launcher.rundir import find_run

    run = find_run(spec)
    _backend(run).attach(run)
    return 0


def stop(spec: str) -> int:
    from launcher.rundir import find_run

    run = find_run(spec)
    _backend(run).stop(run)
    click.echo(f"{run.id} is stopped; launch resume {run.id} goes on with it")
    return 0


def preempt(spec: str) -> int:
    from launcher.rundir import find_run

    run = find_run(spec)
    _backend(run).preempt(run)
    click.echo(f"{run.id} was preempted and comes back by itself")
    return 0


def resume(
    spec: str | None, gpus: int | None, nodes: int | None, backend: str, follow: bool, everything: bool
) -> int:
    from launcher.cli import comeback, submit
    from launcher.rundir import find_run

    if everything:
        if spec or gpus or nodes or follow or backend != "auto":
            raise UserError("--all brings back all runs that were lost here, as they were; it goes alone")
        return comeback.everything()
    if spec is None:
        raise UserError("resume takes a RUN", "All that were lost on this machine: launch resume --all")
    elsewhere = "://" in spec
    backend = submit.pick_backend(backend)
    nodes = nodes if backend == "slurm" else nodes or 1  # a window is on one machine

    def check(run: "RunDir") -> object:
        return submit.check_again(run, flags_of(gpus=gpus, nodes=nodes), backend)

    run = _pull(spec, check) if elsewhere else find_run(spec)
    comeback.refuse(run)
    if not elsewhere:
        check(run)
    submit.adopt(run, backend, elsewhere)
    try:
        return _start(run, backend, gpus, follow, nodes)
    except LaunchError as error:
        if not error.uncertain:
            run.resume_requested.unlink(missing_ok=True)
        raise


def rm(spec: str, store: bool) -> int:
    from launcher.cli import remove
    from launcher.rundir import find_run

    run = find_run(spec)
    remove.remove(run, store)
    click.echo(f"{run.id} is deleted{' here and in the store' if store else ''}")
    return 0


def validate(recipes: tuple[Path, ...]) -> int:
    from launcher.recipe import parse, program, resolve

    worst = 0
    told: set[str] = set()  # of a base that recipes share it is said once
    for path in recipes:
        try:
            document = resolve(path)
            findings = program.check(parse(document), document)
        except UserError as error:
            click.echo(error.message, err=True)
            worst = max(worst, error.exit_status)
            continue
        for warning in (f"warning: {document.error([problem])}" for problem in findings.machine):
            if warning not in told:
                click.echo(warning, err=True)
                told.add(warning)
        click.echo(f"{path}: good")
    return worst


def schema() -> None:
    from launcher.recipe import schema

    click.echo(json.dumps(schema(), indent=2))


OF_RESOURCES = ("gpus", "nodes", "cpus", "memory", "time", "max_wait", "preemptible", "priority")


def flags_of(**given: Any) -> dict[str, tuple[str, object]]:
    """Options as overrides whose origin is told."""
    flags = {}
    for key, value in given.items():
        if value is not None:
            section = "resources" if key in OF_RESOURCES else "slurm"
            flags[f"{section}.{key}"] = (f"--{key.replace('_', '-')} {value}", value)
    return flags


def _tell(plan: "Plan") -> None:
    for kind, sentences in (("note", plan.notes), ("warning", plan.warnings)):
        for sentence in sentences:
            click.echo(f"{kind}: {sentence}", err=True)


def _backend(run: "RunDir") -> "Backend":
    from launcher.backends import BACKENDS
    from launcher.rundir import read_json

    return BACKENDS[(read_json(run.run) or {}).get("backend", "local")]


def _start(run: "RunDir", backend: str, gpus: int | None, follow: bool, nodes: int | None = None) -> int:
    from launcher.backends import BACKENDS
    from launcher.cli import logs
    from launcher.rundir import read_jsonl

    if backend == "local":
        click.echo(f"{run.id} in the foreground; its folder: {run.path}", err=True)
    over = logs.Over(run)
    answer = BACKENDS[backend].start(run, gpus, nodes)
    if answer is not None:  # it ran in the foreground
        return 0 if answer == 0 else 1
    where = f"is job {read_jsonl(run.jobs)[-1]['job']}" if backend == "slurm" else f"in a {backend} window"
    click.echo(f"{run.id} {where}; its folder: {run.path}")
    if follow:
        return _follow(run, over)
    for line in (f"launch status {run.id}", f"launch logs {run.id} -f", f"launch attach {run.id}"):
        click.echo(f"  {line}")
    return 0


def _follow(run: "RunDir", over: Callable[[], bool]) -> int:
    from launcher.cli import logs
    from launcher.cli.status import row

    try:
        logs.follow(run, sys.stdout.buffer, over)
    except KeyboardInterrupt:
        click.echo(
            f"\n{run.id} goes on; launch logs {run.id} -f looks again, launch stop {run.id} ends it", err=True
        )
        return 0
    return 0 if row(run)["state"] == "finished" else 1


def _pull(url: str, accept: Callable[["RunDir"], object]) -> "RunDir":
    from launcher.mirror import pull_run
    from launcher.rundir import runs_root
    from launcher.storage import StoreSettings

    try:
        return pull_run(url, StoreSettings(), runs_root(), accept)
    except Taken as taken:
        raise UserError(taken.message, taken.hint) from None
