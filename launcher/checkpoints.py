"""Checkpoint folders as the contract has them: which there are, and whether one is whole. No torch.

Shared by the mirror, restore and status. A checkpoint is `step-SSSSSSSS-fence-F` with a manifest; the newest
is the one with the highest (fence, step) that verifies.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from launcher.rundir import RunDir
from launcher.storage.base import key_problem

MANIFEST = "manifest.json"
FENCE_DIGITS = 9
NAME = re.compile(rf"step-(\d{{8,12}})-fence-(\d{{1,{FENCE_DIGITS}}})", re.ASCII)


def fence_of(said: object) -> int:
    """An attempt's number as a file or a name has it; 0 for what is none."""
    text = str(said)
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= FENCE_DIGITS else 0


@dataclass(frozen=True, order=True)
class Mark:
    """Which checkpoint: ordered as checkpoints are, newest last."""

    fence: int
    step: int

    @property
    def name(self) -> str:
        return f"step-{self.step:08d}-fence-{self.fence}"


@dataclass(frozen=True)
class File:
    """What a manifest says of one file."""

    size: int
    sha256: str


def mark_of(name: str) -> Mark | None:
    """The mark that a folder's name spells, or None if it is no checkpoint's name."""
    match = NAME.fullmatch(name)
    mark = Mark(int(match[2]), int(match[1])) if match else None
    return mark if mark and mark.name == name else None


def checkpoints(run: RunDir) -> list[Mark]:
    """Checkpoints of the run folder that have a manifest, newest first; none of them is verified."""
    try:
        names = [path.name for path in run.checkpoints.iterdir() if (path / MANIFEST).is_file()]
    except OSError:
        return []
    return sorted((mark for mark in map(mark_of, names) if mark), reverse=True)


def newest(run: RunDir, say: Callable[[Mark, str], object] = lambda mark, reason: None) -> Mark | None:
    """The newest checkpoint of the run folder that verifies; `say` hears of those passed over. Reads all of
    them."""
    for mark in checkpoints(run):
        reason = verify(run.checkpoints / mark.name)
        if reason is None:
            return mark
        say(mark, reason)
    return None


def kept(marks: Iterable[Mark], keep: int, keep_every: int | None) -> set[Mark]:
    """Those of `marks` that stay: the newest `keep`, and the first at or beyond each multiple of `keep_every`
    steps. The first has the lowest step, and of two the higher fence: that attempt did the step again."""
    newest_first = sorted(marks, reverse=True)
    first: dict[int, Mark] = {}
    if keep_every:
        for mark in newest_first:
            multiple = mark.step // keep_every
            if multiple and (multiple not in first or mark.step < first[multiple].step):
                first[multiple] = mark
    return {*newest_first[:keep], *first.values()}


def read_manifest(data: bytes, mark: Mark) -> dict[str, File]:
    """The files that a manifest lists, by name. ValueError says what is wrong with it."""
    try:
        manifest = json.loads(data)
        files = {str(k): File(int(v["size"]), str(v["sha256"])) for k, v in manifest["files"].items()}
        said = Mark(int(manifest["fence"]), int(manifest["step"]))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError("its manifest is torn or is no manifest") from error
    if said != mark:
        raise ValueError(f"its manifest is that of {said.name}")
    if not files or MANIFEST in files or any(key_problem(name) for name in files):
        raise ValueError("its manifest lists no files, or ones outside its folder")
    return files


def verify(folder: Path) -> str | None:
    """Why the checkpoint in `folder` must not be used, or None if every file is what the manifest says."""
    mark = mark_of(folder.name)
    if mark is None:
        return "its name is not a checkpoint's"
    try:
        files = read_manifest((folder / MANIFEST).read_bytes(), mark)
    except FileNotFoundError:
        return "it has no manifest"
    except OSError as error:
        return f"its manifest cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error)
    return verify_files(folder, files)


def verify_files(folder: Path, files: dict[str, File]) -> str | None:
    """As `verify`, for a folder whose manifest is at hand and not yet in it."""
    for name, file in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != file.size:
                return f"{name} has {size} bytes instead of {file.size}"
            with path.open("rb") as data:
                if hashlib.file_digest(data, "sha256").hexdigest() != file.sha256:
                    return f"{name} does not have the hash that its manifest says"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None
