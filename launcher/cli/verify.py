"""`launch verify`: every checkpoint of a run read again, on this disk and in its store."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from launcher.cli.status import Row
from launcher.errors import StoreError, UserError
from launcher.mirror.verify import WHOLE, Advance, Verdict, newest_whole, verify
from launcher.recipe import load_frozen
from launcher.rundir import RUN_ID, RunDir, find_run, read_json
from launcher.storage import Store, StoreSettings, open_store, reach

SCHEMA = 1


def run(spec: str, as_json: bool) -> int:
    """0 if every checkpoint is whole; 1 if one is broken, none is there, or the store could not be read."""
    folder, store = (None, _of_url(spec)) if "://" in spec else _of_run(find_run(spec))
    trouble = None
    with _progress() as advance:
        try:
            verdicts = verify(folder, store, advance)
        except StoreError as error:
            if folder is None:
                raise
            verdicts, trouble = verify(folder, None, advance), error.message
    resume = newest_whole(verdicts)
    told = {
        "schema": SCHEMA,
        "run": folder.id if folder else None,
        "url": store.url if store else None,
        "error": trouble,
        "resume": resume.name if resume else None,
        "checkpoints": [_row(verdict) for verdict in verdicts],
    }
    if as_json:
        click.echo(json.dumps(told, indent=1))
    else:
        _show(told)
    good = resume is not None and trouble is None and not any(verdict.broken for verdict in verdicts)
    return 0 if good else 1


def _of_url(url: str) -> Store:
    store = reach(url, StoreSettings())
    if not RUN_ID.fullmatch(store.url.rpartition("/")[2]) or not any(store.list("run.json")):
        raise UserError(f"there is no run at {url}", "give the URL that `launch status RUN` shows")
    return store


def _of_run(run: RunDir) -> tuple[RunDir, Store | None]:
    url, settings = (read_json(run.run) or {}).get("url"), load_frozen(run.recipe).storage.settings
    return run, open_store(url, settings) if url else None


def _row(verdict: Verdict) -> Row:
    mark = verdict.mark
    row: Row = {"name": mark.name, "step": mark.step, "fence": mark.fence, "bytes": verdict.size}
    return row | {"here": verdict.here, "store": verdict.store}


def _show(told: Row) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    rows, sides = told["checkpoints"], [("here", told["run"]), ("store", told["url"] and not told["error"])]
    if rows:
        made = Table(box=None, header_style="bold", pad_edge=False)
        for name in ("STEP", "FENCE", "SIZE"):
            made.add_column(name, justify="right", no_wrap=True)
        for side, there in sides:
            if there:
                made.add_column(side.upper())
        for row in rows:
            verdicts = [_verdict(row[side]) for side, there in sides if there]
            made.add_row(str(row["step"]), str(row["fence"]), f"{row['bytes'] / 1e6:.1f} MB", *verdicts)
        console.print(made)
    else:
        console.print(Text("there is no checkpoint"))
    if told["error"]:
        console.print(Text(f"the store could not be read: {told['error']}", style="bold red"))
    if told["run"] and told["url"] and not told["error"]:
        lacking = [row["name"] for row in rows if row["store"] is None]
        if lacking:
            console.print(Text(f"not in the store: {', '.join(lacking)}", style="yellow"))
    if told["resume"]:
        console.print(Text(f"a resume goes on from {told['resume']}"))
    elif rows:
        console.print(Text("none of them can be resumed from", style="bold red"))


def _verdict(said: str | None) -> Any:
    from rich.text import Text

    if said is None:
        return Text("-", style="dim")
    return Text(said, style="green") if said == WHOLE else Text(f"broken: {said}", style="bold red")


@contextmanager
def _progress() -> Iterator[Advance]:
    """The checkpoint that is being read, where a person watches stderr."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda name: None
        return
    with console.status("listing") as status:
        yield lambda name: status.update(f"reading {name}")
