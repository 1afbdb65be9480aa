"""What state runs are in, derived from the files of their folders. Reads only, and decides nothing.

An ended run costs one small file; only runs that have not ended are looked at more closely.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from launcher import rundir
from launcher.cli import queues
from launcher.rundir import RUN_ID, RunDir, read_json, read_jsonl

RECENT = 20  # ended runs in a listing
YOUNG = 60.0  # seconds in which a run that nobody holds yet is still on its way up
SCHEMA = 1

Row = dict[str, Any]


def listing(everything: bool = False) -> list[Row]:
    """A row per run, oldest first: all that have not ended, and of the others the last `RECENT`."""
    root = rundir.runs_root()
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if RUN_ID.fullmatch(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    names.sort(key=lambda name: (name.rsplit("-", 3)[1:], name), reverse=True)
    rows, ended = [], 0
    for name in names:
        path = f"{root}/{name}"
        final = _final(path)
        if final is not None:
            ended += 1
            if everything or ended <= RECENT:
                rows.append(_ended(name, final))
        elif RunDir(Path(path)).run.exists():
            rows.append(_active(RunDir(Path(path))))
    return rows[::-1]


def row(run: RunDir) -> Row:
    """The line of one run. The keys are those of `launch status --json`, and stay."""
    final = _final(str(run.path))
    return _ended(run.id, final) if final is not None else _active(run)


def details(run: RunDir) -> Row:
    """`row`, and what `launch status RUN` shows below it."""
    about = read_json(run.run) or {}
    told = row(run)
    if told["durable"] and (synced := read_json(run.synced)):
        told["durable"] = _durable(
            synced, told["url"]
        )  # final.json was written before the last words were sent
    if told["state"] == "lost" and about.get("backend") == "slurm":
        told["reason"] = f"{epitaph(run)}; {told['reason']}"
    return told | {
        "folder": str(run.path),
        "recipe": about.get("recipe"),
        "user": about.get("user"),
        "host": about.get("host"),
        "backend": about.get("backend"),
        "git": about.get("git"),
        "attempt_list": _attempts(run),
        "checkpoints": _checkpoints(run),
    }


def _final(path: str) -> Row | None:
    if os.path.exists(f"{path}/resume_requested"):  # noqa: PTH110
        return None
    try:
        with open(f"{path}/final.json", "rb") as file:  # noqa: PTH123 - a thousand of these; Path costs as much again
            final = json.loads(file.read())
    except (OSError, ValueError):
        return None
    return final if isinstance(final, dict) else None


def _ended(name: str, final: Row) -> Row:
    synced = final.get("synced") or {}
    return {
        "id": name,
        "name": final.get("name"),
        "state": final.get("state"),
        "reason": final.get("reason"),
        "phase": None,
        "step": final.get("step"),
        "of": final.get("of"),
        "loss": None,
        "eta": None,
        "metrics": final.get("metrics") or {},
        "gpus": final.get("gpus"),
        "attempts": final.get("attempts"),
        "lost_steps": final.get("lost_steps"),
        "created": final.get("created"),
        "ended": final.get("ended"),
        "url": final.get("url"),
        "durable": _durable(synced, final.get("url")),
        "held_on": None,
    }


def _active(run: RunDir) -> Row:
    from launcher.supervisor import history

    about = read_json(run.run) or {}
    events = read_jsonl(run.attempts)
    beat = read_json(run.heartbeat) or {}
    starts = [event for event in events if event.get("event") == "start"]
    ends = [event for event in events if event.get("event") == "end"]
    state, reason, host = _state(run, about, starts, ends)
    now = bool(starts) and beat.get("fence") == starts[-1].get("attempt") and state == "running"
    if state == "running" and not now:
        state = "starting"
    gpus = (starts[-1] if starts else about.get("resources") or {}).get("gpus")
    return {
        "id": run.id,
        "name": about.get("name"),
        "state": state,
        "reason": reason,
        "phase": beat.get("phase") if now else None,
        "step": _step(beat, ends),
        "of": beat.get("of"),
        "loss": beat.get("loss") if now else None,
        "eta": beat.get("eta") if now else None,
        "metrics": {},
        "gpus": gpus,
        "attempts": len(starts),
        "lost_steps": history.lost_steps([*ends, beat] if now else ends),
        "created": about.get("created"),
        "ended": None,
        "url": about.get("url"),
        "durable": _durable(read_json(run.synced) or {}, about.get("url")),
        "held_on": host,
    }


def _step(beat: Row, ends: list[Row]) -> int | None:
    """Of the heartbeat; an attempt that is still on its way up says what the last one came to."""
    step: int | None = beat.get("step")
    return step if step is not None or not ends else ends[-1].get("step")


def _state(run: RunDir, about: Row, starts: list[Row], ends: list[Row]) -> tuple[str, str | None, str | None]:
    """(state, reason, host) of a run without final.json."""
    from launcher.supervisor import lease, processes

    holder = lease.holder(run)
    if holder is not None and holder.rebooted and about.get("backend") != "slurm":
        holder = None
    last = ends[-1] if ends else {}
    reason = f"{last.get('state')}: {last.get('reason')}" if ends else None
    of_slurm = about.get("backend") == "slurm" and not (holder and holder.alive)
    told = queues.of_slurm() if of_slurm else {}
    mine = (told or {}).get(run.id, [])
    if holder is not None and holder.alive is None and told is not None and not mine and of_slurm:
        holder = None  # it was elsewhere, and its job is gone
    if holder is not None and holder.alive is not False:
        between = len(ends) >= len(starts) and bool(starts)
        state = "stopping" if run.stop_requested.exists() else "coming back" if between else "running"
        if holder.alive and state != "stopping" and (between or not starts):
            waits = queues.of_machine().get(str(run.path))
            if waits:
                return "queued", waits, holder.host
        return state, reason if between else None, holder.host
    if of_slurm and told is None:
        return "unknown", "Slurm does not answer", None
    if mine and mine[0].pending:
        return "queued", queues.words(mine[0]), None
    if mine:
        return ("coming back" if starts else "starting"), reason, None
    # Nobody holds it. Between two supervisors its guard lives; right after the start, it is on its way.
    on_its_way = not starts and holder is None and 0 <= time.time() - (about.get("created") or 0.0) < YOUNG
    on_its_way = on_its_way and not (of_slurm and run.jobs.exists())  # squeue would have it
    if on_its_way or processes.keepers(run.path):
        return ("coming back" if starts else "starting"), reason, None
    return "lost", f"nobody runs it; launch resume {run.id}", None


def epitaph(run: RunDir) -> str:
    """How the last job of a run ended, as far as Slurm still knows."""
    from launcher.slurm import jobs

    rows = read_jsonl(run.jobs)
    if rows and rows[-1].get("error"):
        return f"no further job came of it: {rows[-1]['error']}"
    submitted = [row for row in rows if row.get("job")]
    ids = [row["job"] for row in submitted]
    if not ids:
        return "no job came of it"
    if submitted[-1].get("deadline") and not run.attempts.exists():
        return f"job {ids[-1]} did not start within resources.max_wait"
    return f"job {ids[-1]} is over ({jobs.ended(ids[-1]) or 'Slurm knows no more of it'})"


def _durable(synced: Row, url: object) -> Row | None:
    """What the store holds: None if the run is not mirrored."""
    if not url:
        return None
    names = ("step", "since", "time", "behind", "missing", "away_since", "error")
    return {key: synced.get(key) for key in names}


def _attempts(run: RunDir) -> list[Row]:
    """One row per attempt, its start and end together."""
    rows: dict[int, Row] = {}
    for event in read_jsonl(run.attempts):
        number = event.get("attempt")
        if isinstance(number, int):
            row = rows.setdefault(number, {"attempt": number})
            if event.get("event") == "start":
                names = ("host", "backend", "gpus", "job", "save_budget", "returned")
                row |= {"started": event.get("time")} | {k: event.get(k) for k in names}
            else:
                names = ("state", "reason", "step", "resumed", "saved", "seconds_to_stop")
                row |= {"ended": event.get("time")} | {k: event.get(k) for k in names}
    return [rows[number] for number in sorted(rows)]


def _checkpoints(run: RunDir) -> list[Row]:
    """The checkpoints on disk, newest first, as their manifests tell; nothing is verified here."""
    found = []
    for path in run.checkpoints.glob("step-*-fence-*/manifest.json"):
        manifest = read_json(path) or {}
        files = manifest.get("files")
        if isinstance(manifest.get("step"), int) and isinstance(files, dict):
            size = sum(entry.get("size", 0) for entry in files.values() if isinstance(entry, dict))
            fence = manifest.get("fence", 0)
            found.append({"name": path.parent.name, "step": manifest["step"], "fence": fence, "bytes": size})
    return sorted(found, key=lambda row: (row["fence"], row["step"]), reverse=True)
