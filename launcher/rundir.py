"""Every path of a run folder, and the only ways its JSON files are read and written.

The folder's layout and who writes what: docs/contract.md. No policy lives here.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UserError

RUN_ID = re.compile(r"(?P<name>.+)-(?P<stamp>\d{8}-\d{6})-(?P<random>[0-9a-f]{4})")


@dataclass(frozen=True)
class RunDir:
    """One run's folder; `path` is absolute, its last part is the run's id."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def name(self) -> str:
        """What the user called the run: its id without time and random part."""
        match = RUN_ID.fullmatch(self.id)
        return match["name"] if match else self.id

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def run(self) -> Path:
        return self.path / "run.json"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def stop_requested(self) -> Path:
        return self.path / "stop_requested"

    @property
    def resume_requested(self) -> Path:
        return self.path / "resume_requested"

    @property
    def lease(self) -> Path:
        return self.path / "lease.json"

    @property
    def rendezvous(self) -> Path:
        return self.path / "rendezvous.json"

    @property
    def nodes(self) -> Path:
        return self.path / "nodes"

    def node(self, node: int) -> Path:
        return self.nodes / f"node-{node}.json"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def jobs(self) -> Path:
        return self.path / "jobs.jsonl"

    @property
    def submitit(self) -> Path:
        return self.path / "submitit"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def run_log(self) -> Path:
        return self.logs / "run.log"

    @property
    def synced(self) -> Path:
        return self.path / "synced.json"

    @property
    def mirrored(self) -> Path:
        return self.path / "mirrored.json"

    @property
    def final(self) -> Path:
        return self.path / "final.json"

    @property
    def heartbeat(self) -> Path:
        return self.path / "heartbeat.json"

    @property
    def outcome(self) -> Path:
        return self.path / "outcome.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def results(self) -> Path:
        return self.path / "inference" / "coco_instances_results.json"

    def attempt_logs(self, attempt: int) -> Path:
        return self.logs / f"attempt-{attempt}"

    def rank_log(self, attempt: int, rank: int) -> Path:
        return self.attempt_logs(attempt) / f"rank-{rank}.log"

    def torchrun_log(self, attempt: int, node: int = 0) -> Path:
        return self.attempt_logs(attempt) / (f"torchrun-node-{node}.log" if node else "torchrun.log")


def write_json(path: Path, obj: object) -> None:
    """Replace `path` whole: written aside, fsynced, renamed. A reader sees the old file or the new one.

    Raises OSError (disk full, not writable); nothing is left behind then.
    """
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            json.dump(obj, file)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    sync_dir(path.parent)


def sync_dir(path: Path) -> None:
    """Make renames and new names in the folder `path` survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`; None if the file is missing or is not (yet) an object."""
    try:
        obj = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return obj if isinstance(obj, dict) else None


def ended(run: RunDir) -> dict[str, Any] | None:
    """final.json, unless the user has asked since for the run to go on."""
    return None if run.resume_requested.exists() else read_json(run.final)


def append_json(path: Path, obj: object) -> None:
    """Append one line and fsync it; a torn line of an earlier writer is closed off first. Raises OSError."""
    line = json.dumps(obj).encode() + b"\n"
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(fd, line) != len(line):
            raise OSError(errno.ENOSPC, "no space left for a whole line", str(path))
        os.fsync(fd)
    finally:
        os.close(fd)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole lines of `path`, in order; torn ones are dropped, a missing file is an empty one."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def runs_root() -> Path:
    """$LAUNCH_RUNS, or ./runs; absolute. It need not exist."""
    return Path(os.environ.get("LAUNCH_RUNS") or "runs").absolute()


def new_run_id(name: str) -> str:
    """NAME-YYYYMMDD-HHMMSS-XXXX. `name` becomes a folder's name, so it must not leave its folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
        raise UserError(
            f"{name!r} cannot name a run",
            "Use letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 80.",
        )
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def all_runs() -> list[RunDir]:
    """The runs under `runs_root()`, oldest first by the time in their ids."""
    return sorted(_runs(), key=lambda run: (run.id.rsplit("-", 3)[1:], run.id))


def _runs() -> Iterator[RunDir]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(runs_root()) as entries:
        for entry in entries:
            if RUN_ID.fullmatch(entry.name) and entry.is_dir() and Path(entry.path, "run.json").exists():
                yield RunDir(Path(entry.path))


def find_run(spec: str) -> RunDir:
    """The run meant by a name, the beginning of an id, or `last`. UserError if there is none or several."""
    runs = all_runs()
    if not runs:
        raise UserError(
            f"there are no runs in {runs_root()}", "Start one, or set LAUNCH_RUNS to their folder."
        )
    if spec == "last":
        return _newest(runs)
    for matches in (
        [run for run in runs if run.id == spec],
        [run for run in runs if run.name == spec],
        [run for run in runs if spec and run.id.startswith(spec)],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            shown = ", ".join(run.id for run in reversed(matches[-8:]))
            more = f" and {len(matches) - 8} older ones" if len(matches) > 8 else ""
            raise UserError(
                f"{spec!r} could be any of {len(matches)} runs: {shown}{more}", "Give more of the id."
            )
    recent = ", ".join(run.id for run in reversed(runs[-5:]))
    raise UserError(f"no run {spec!r} in {runs_root()}", f"The newest are: {recent}.")


def _newest(runs: list[RunDir]) -> RunDir:
    """Ids tell seconds; between runs of one second `created` decides."""
    stamp = runs[-1].id.rsplit("-", 3)[1:3]
    ties = [run for run in runs if run.id.rsplit("-", 3)[1:3] == stamp]
    return max(ties, key=lambda run: (read_json(run.run) or {}).get("created", 0.0))
