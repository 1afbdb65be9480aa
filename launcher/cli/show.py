"""`launch status` for people: tables on a given rich console."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from launcher import rundir
from launcher.cli import status
from launcher.cli.status import Row
from launcher.rundir import RunDir

COLOURS = {
    "running": "green", "queued": "cyan", "unknown": "bold red", "starting": "cyan",
    "coming back": "yellow", "stopping": "yellow",
    "finished": "bold green", "stopped": "yellow", "failed": "bold red", "lost": "bold red",
}  # fmt: skip
LOG_LINES = 12


def table(rows: list[Row]) -> RenderableType:
    """One line per run."""
    if not rows:
        return Text(f"No runs in {rundir.runs_root()}. Start one: launch RECIPE")
    made = Table(box=None, header_style="bold", pad_edge=False)
    made.add_column("RUN", no_wrap=True)
    made.add_column("STATE", no_wrap=True)
    for name in ("STEP", "LOSS/AP", "LEFT", "GPUS", "TRIES", "LOST"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("DURABLE")
    for row in rows:
        made.add_row(
            row["id"],
            _state(row),
            _progress(row),
            _figure(row),
            duration(row["eta"]),
            _text(row["gpus"]),
            _text(row["attempts"]),
            _text(row["lost_steps"]),
            _durable(row),
        )
    return made


def details(run: RunDir, row: Row) -> RenderableType:
    """One run: what it is, its attempts with their reasons, its checkpoints, its last words."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in _facts(row):
        facts.add_row(name, value)
    parts: list[RenderableType] = [Text(row["id"], style="bold"), facts]
    if row["attempt_list"]:
        parts += [Text(), _attempts(row["attempt_list"])]
    lines = _last_lines(run.run_log)
    if lines:
        shown = Text.from_ansi("\n".join(lines), style="dim")
        parts += [Text(), Text("last lines of the log", style="bold"), shown]
    return Group(*parts)


def watch(console: Console, wanted: Callable[[], RenderableType], over: Callable[[], bool]) -> None:
    """Draw anew every second until `over()` says that nothing will change any more, or Ctrl-C."""
    from rich.live import Live

    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(wanted(), console=console, auto_refresh=False, screen=False) as live,
    ):
        while not over():
            time.sleep(1.0)
            live.update(wanted(), refresh=True)
        live.update(wanted(), refresh=True)


def run_view(run: RunDir) -> RenderableType:
    return details(run, status.details(run))


def duration(seconds: float | None) -> str:
    """1:02:03 as people say it: 1h02m."""
    if seconds is None:
        return ""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _state(row: Row) -> Text:
    shown = row["phase"] if row["state"] == "running" and row["phase"] else row["state"]
    return Text(str(shown), style=COLOURS.get(row["state"], ""))


def _progress(row: Row) -> str:
    if row["step"] is None:
        return ""
    if not row["of"]:
        return str(row["step"])
    return f"{row['step']}/{row['of']} {100 * row['step'] // row['of']:3}%"


def _figure(row: Row) -> str:
    if row["loss"] is not None:
        return f"{row['loss']:.3f}"
    quality = row["metrics"].get("AP")
    return f"AP {quality:.3f}" if isinstance(quality, int | float) else ""


def _durable(row: Row) -> Text:
    """The step that the store holds, and since when it does not keep up."""
    durable = row["durable"]
    if durable is None:
        return Text("no mirror", style="dim")
    step = durable["step"]
    held = "nothing yet" if step is None else f"step {step}"
    if durable["since"]:
        held += f", {_age(durable['since'])} ago" if row["ended"] is None else ""
    if durable["error"]:
        since = f" for {_age(durable['away_since'])}" if durable["away_since"] else ""
        return Text(f"{held}; behind{since}: {durable['error']}", style="bold red")
    return Text(held, style="green" if step is not None and step == row["step"] else "")


def _missing(row: Row) -> str:
    """What of the run is not in the store."""
    durable = row["durable"] or {}
    named, number = durable.get("missing") or [], durable.get("behind") or 0
    more = f" and {number - len(named)} more" if number > len(named) else ""
    return f"{', '.join(named)}{more}" if number else ""


def _age(when: float) -> str:
    return duration(max(0.0, time.time() - when))


def _clock(when: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) if when else ""


def _facts(row: Row) -> list[tuple[str, RenderableType]]:
    state = _state(row)
    if row["reason"]:
        state = Text.assemble(state, f": {row['reason']}")
    figures = "  ".join(f"{k} {v:.4g}" for k, v in row["metrics"].items() if isinstance(v, int | float))
    git = row["git"] or {}
    changes = " with changes" if git.get("dirty") else ""
    commit = f"commit {git['commit'][:12]}{changes}" if git.get("commit") else ""
    newest = row["checkpoints"][:1]
    kept = f"{len(row['checkpoints'])} on disk, newest {newest[0]['name']}" if newest else "none yet"
    left = f"{duration(row['eta'])} left" if row["eta"] is not None else ""
    where = f"on {row['host']}, {row['backend']}, {row['gpus']} GPUs or workers"
    budgets = [attempt["save_budget"] for attempt in row["attempt_list"] if attempt.get("save_budget")]
    stops = [a["seconds_to_stop"] for a in row["attempt_list"] if a.get("seconds_to_stop")]
    taken = f"; the last stop took {stops[-1]:.1f} s" if stops else ""
    facts: list[tuple[str, RenderableType]] = [
        ("state", state),
        ("step", "  ".join(filter(None, [_progress(row), _figure(row), left]))),
        ("metrics", figures),
        ("lost", f"{row['lost_steps'] or 0} steps over {row['attempts'] or 0} attempts"),
        ("to save in", f"{budgets[-1]:g} s from the signal{taken}" if budgets else ""),
        ("durable", _durable(row)),
        ("not in store", _missing(row)),
        ("store", _text(row["url"])),
        ("checkpoints", kept),
        ("recipe", f"{row['recipe']}  {commit}"),
        ("began", f"{_clock(row['created'])} by {row['user']} {where}"),
        ("ended", _clock(row["ended"])),
        ("folder", row["folder"]),
    ]
    return [(name, value) for name, value in facts if value]


def _attempts(rows: list[Row]) -> Table:
    made = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("TRY", "STEPS", "TOOK", "GPUS"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("HOW IT ENDED")
    for row in rows:
        begin, end = _text(row.get("resumed")), _text(row.get("step"))
        took = (row["ended"] - row["started"]) if row.get("ended") and row.get("started") else None
        saved = {"True": "; saved", "False": "; not saved"}.get(str(row.get("saved")), "")
        how = f"{row['state']}: {row.get('reason')}{saved}" if row.get("state") else "(going on)"
        back = row.get("returned") or {}
        if back.get("saved"):
            hold = f"{back['slurm_holds']} s of Slurm's own requeue"
            how += f" (back by {back['by']} after {duration(back['seconds'])}, not {hold})"
        steps = f"{begin}-{end}" if end else ""
        made.add_row(str(row["attempt"]), steps, duration(took), _text(row.get("gpus")), how)
    return made


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 16384))
            return file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        return []
