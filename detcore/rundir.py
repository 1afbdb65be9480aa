"""detcore's side of docs/contract.md: what it is told by the environment, which files it writes, and how."""

import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
BEAT = 0.5  # seconds between heartbeats, at least
_FENCE = re.compile(r"-fence-(\d+)$")


@dataclass(frozen=True)
class RunDir:
    """Paths of a run folder, and what this attempt was told. Without a launcher all of it has defaults."""

    path: Path
    fence: int = 0
    every: str = "600s"
    """Time or steps between checkpoints: `600s` or `500it`."""
    busy: str = "wait"
    """What a checkpoint does that finds the one before still being written: `wait` or `skip`."""
    keep: int = 3
    keep_every: int | None = None
    """Steps: the first checkpoint at or beyond each multiple of them stays, too."""
    recipe_hash: str = ""
    git_commit: str = ""

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def timing(self) -> Path:
        return self.path / "timing.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def results(self) -> Path:
        return self.path / "inference/coco_instances_results.json"

    @property
    def heartbeat(self) -> Path:
        return self.path / "heartbeat.json"

    @property
    def outcome(self) -> Path:
        return self.path / "outcome.json"

    @classmethod
    def of_attempt(cls, path: Path) -> "RunDir":
        """The folder with what LAUNCH_* say of this attempt. Without LAUNCH_ATTEMPT the fence is one more
        than any that a checkpoint in the folder has."""
        told = os.environ.get
        steps = told("LAUNCH_CHECKPOINT_KEEP_EVERY")
        fences = [int(match[1]) for match in map(_FENCE.search, _names(path / "checkpoints")) if match]
        return cls(
            path=path,
            fence=int(told("LAUNCH_ATTEMPT") or 1 + max(fences, default=0)),
            every=told("LAUNCH_CHECKPOINT_EVERY") or "600s",
            busy=told("LAUNCH_CHECKPOINT_BUSY") or "wait",
            keep=int(told("LAUNCH_CHECKPOINT_KEEP") or 3),
            keep_every=int(steps.removesuffix("it")) if steps else None,
            recipe_hash=told("LAUNCH_RECIPE_HASH") or "",
            git_commit=told("LAUNCH_GIT_COMMIT") or "",
        )


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def write_whole(path: Path, data: bytes, durable: bool = True) -> None:
    """Write aside, fsync, rename: a reader finds the old content or the new, never a part."""
    aside = path.parent / f".{path.name}.tmp-{os.getpid()}"
    try:
        with aside.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict[str, Any], durable: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, allow_nan=False).encode() + b"\n", durable)


def sweep(run: RunDir) -> None:
    """Delete what our own unfinished writes left in the run folder."""
    for name in (run.heartbeat.name, run.outcome.name, run.metrics.name, run.timing.name):
        for aside in run.path.glob(f".{name}.tmp-*"):
            aside.unlink(missing_ok=True)


def write_outcome(run: RunDir, state: str, step: int, **more: Any) -> None:
    """How this attempt ended: `finished`, `stopped` or `failed`, with what else is known."""
    write_json(run.outcome, {"schema": SCHEMA, "fence": run.fence, "state": state, "step": step, **more})


class Heartbeat:
    """heartbeat.json, at most every BEAT seconds; `active` on rank 0 alone."""

    def __init__(self, run: RunDir, active: bool) -> None:
        self.run, self.active = run, active
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "fence": run.fence,
            "phase": "starting",
            "counter": 0,
        }
        # Where the attempt begins is known once a checkpoint is verified: a 0 would mean that all is lost.
        self.content |= dict.fromkeys(("step", "of", "loss", "eta", "resumed", "limit"))
        self._written = float("-inf")

    def enter(self, phase: str, limit: float | None = None, **news: Any) -> None:
        """A new phase, written at once. limit: seconds for which the counter may stand still in it."""
        self._written = float("-inf")
        self.beat(phase=phase, limit=limit, **news)

    def beat(self, **news: Any) -> None:
        """Some work was done."""
        self.content |= news
        self.content["counter"] += 1
        now = time.monotonic()
        if not self.active or now - self._written < BEAT:
            return
        self._written = now
        with suppress(OSError):  # a full disk is told about where it matters, at the next checkpoint
            # not fsynced: it would hold up the step, and after a power cut nobody asks
            write_json(self.run.heartbeat, self.content, durable=False)


def first_beat() -> None:
    """A launcher's watch begins here, before this process knows of the others."""
    folder = os.environ.get("LAUNCH_RUN_DIR")
    if folder and os.environ.get("RANK", "0") == "0":
        Heartbeat(RunDir.of_attempt(Path(folder)), active=True).enter("starting")
