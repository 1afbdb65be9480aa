"""Checkpoints: written aside, manifest last, renamed; the newest good one found again (docs/contract.md)."""

import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.serialization import config as torch_config

from detcore.errors import InputError
from detcore.rundir import SCHEMA, RunDir, write_json, write_whole

MANIFEST = "manifest.json"
LATEST = "latest.json"
CHUNK = 16 * 2**20
NAME = re.compile(r"step-(\d{8,})-fence-(\d+)", re.ASCII)

Progress = Callable[[], None]


class Checkpoint(NamedTuple):
    """A checkpoint folder; of two the one with the higher (fence, step) is the newer."""

    fence: int
    step: int
    path: Path

    def model(self) -> dict[str, Any]:
        """Raises InputError, as `training` does, if there is more in the file than data."""
        return self._load("model.pth")

    def training(self) -> dict[str, Any]:
        return self._load("train.pth")

    def _load(self, name: str) -> dict[str, Any]:
        try:
            return torch.load(self.path / name, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            why = "it holds more than tensors and plain values, and code is not run from there"
            raise InputError(f"checkpoint {self.path}: {name} is not loaded: {why}") from None


class _Hashed:
    """A file for torch.save that hashes what passes. Of an error it tells later: raised inside torch's
    writer it would come out as something else."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.file, self.sha, self.size, self.leaving = path.open("xb"), hashlib.sha256(), 0, 0
        self.progress, self.error = progress, None

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if self.error is None:
            try:
                for start in range(0, view.nbytes, CHUNK):
                    chunk = view[start : start + CHUNK]
                    self.file.write(chunk)
                    self.size += chunk.nbytes
                    self._send_off()
                    self.sha.update(chunk)
                    self.progress()
            except OSError as error:
                self.error = error
        return view.nbytes

    def _send_off(self) -> None:
        """Have the disk take what came since the last time, while it is hashed: so fsync finds little left.
        What is on its way stays in memory, for whoever reads the file next."""
        new = self.size - self.leaving
        if new >= CHUNK:
            with suppress(OSError):  # where the system does not know it, fsync has it all to do
                os.posix_fadvise(self.file.fileno(), self.leaving, new, os.POSIX_FADV_DONTNEED)
            self.leaving = self.size

    def flush(self) -> None:
        pass


def _write(path: Path, content: Any, progress: Progress) -> dict[str, Any]:
    """`content` by torch.save, onto the disk -> the manifest's entry. Raises OSError.

    The weights are a zip file that any program reads. What only resuming reads goes without zip's CRC-32:
    torch never looks at it, and the manifest's hash says more.
    """
    file = _Hashed(path, progress)
    with file.file:
        with torch_config.patch("save.compute_crc32", path.name == "model.pth"):
            torch.save(content, file)
        if file.error is not None:
            raise file.error
        file.file.flush()
        os.fsync(file.file.fileno())
    return {"size": file.size, "sha256": file.sha.hexdigest()}


def save(
    run: RunDir, step: int, training: dict[str, Any], model: dict[str, Any], progress: Progress
) -> Checkpoint:
    """Publish a checkpoint, then delete those that `run.keep` and `run.keep_every` do not spare.

    Raises OSError (a full disk, ...) with nothing left behind and all older checkpoints as they were.
    """
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".tmp-", dir=run.checkpoints))
    target = run.checkpoints / f"step-{step:08d}-fence-{run.fence}"
    try:
        files = {"train.pth": training, "model.pth": model}
        entries = {name: _write(aside / name, content, progress) for name, content in files.items()}
        manifest = {"schema": SCHEMA, "step": step, "fence": run.fence}
        manifest |= {"recipe_hash": run.recipe_hash, "git_commit": run.git_commit, "files": entries}
        write_whole(aside / MANIFEST, json.dumps(manifest).encode())
        aside.chmod(0o755)
        _sync(os.open(aside, os.O_RDONLY))
        if target.exists():  # of this very attempt's number, so it is ours, and was found to be broken
            _delete(target)
        aside.rename(target)
        _sync(os.open(run.checkpoints, os.O_RDONLY))
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    with suppress(OSError):  # it is a hint, and the checkpoint is there without it
        write_json(run.checkpoints / LATEST, {"schema": SCHEMA, "name": target.name})
    _retain(run)
    return Checkpoint(run.fence, step, target)


def _retain(run: RunDir) -> None:
    """Delete what need not stay; never the one that latest.json names, be it another writer's."""
    latest, found = _latest(run.checkpoints), list(candidates(run.checkpoints))
    staying = kept(found, run.keep, run.keep_every)
    for checkpoint in found:
        if checkpoint not in staying and checkpoint.path.name != latest:
            _delete(checkpoint.path)


def _latest(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / LATEST).read_bytes())["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def kept(found: Iterable[Checkpoint], keep: int, keep_every: int | None) -> set[Checkpoint]:
    """Those that stay: the newest `keep`, and the first at or beyond each multiple of `keep_every` steps.
    The first has the lowest step, and of two the higher fence: that attempt did the step again."""
    newest_first = sorted(found, reverse=True)
    first: dict[int, Checkpoint] = {}
    if keep_every:
        for checkpoint in newest_first:
            multiple = checkpoint.step // keep_every
            if multiple and (multiple not in first or checkpoint.step < first[multiple].step):
                first[multiple] = checkpoint
    return {*newest_first[:keep], *first.values()}


def _sync(handle: int) -> None:
    """fsync what is open, and close it."""
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete(folder: Path) -> None:
    """Manifest first: at no instant is a part of it a checkpoint."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def candidates(folder: Path) -> Iterator[Checkpoint]:
    """Folders named like checkpoints, newest first, not verified."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = NAME.fullmatch(path.name)
        if match and _has_manifest(path):
            found.append(Checkpoint(int(match[2]), int(match[1]), path))
    yield from sorted(found, reverse=True)


def _has_manifest(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).is_file()
    except OSError:
        return True  # a disk that cannot even say so; `verify` tells of it


def newest(folder: Path, say: Callable[[str], None], progress: Progress = lambda: None) -> Checkpoint | None:
    """The newest checkpoint that is whole; `say` is told which ones were passed over, and why."""
    for checkpoint in candidates(folder):
        problem = verify(checkpoint, progress)
        if problem is None:
            return checkpoint
        say(f"checkpoint {checkpoint.path.name} is passed over: {problem}")
    return None


def verify(checkpoint: Checkpoint, progress: Progress = lambda: None) -> str | None:
    """What is wrong with a checkpoint; None if every file is what its manifest says."""
    try:
        manifest = json.loads((checkpoint.path / MANIFEST).read_bytes())
        files = {str(name): (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if (manifest["fence"], manifest["step"]) != (checkpoint.fence, checkpoint.step):
            return "its manifest is another checkpoint's"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"
    for name in {"train.pth", "model.pth", *files}:
        if name not in files:
            return f"its manifest does not know {name}"
        size, sha256 = files[name]
        try:
            if Path(name).name != name or not (checkpoint.path / name).is_file():
                return f"{name} is missing"
            actual = (checkpoint.path / name).stat().st_size
            if actual != size:
                return f"{name} has {actual} bytes, its manifest says {size}"
            if _hash(checkpoint.path / name, progress) != sha256:
                return f"{name} does not have the hash that its manifest says"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _hash(path: Path, progress: Progress) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha.update(chunk)
            progress()
    return sha.hexdigest()


def sweep(folder: Path) -> None:
    """Delete what unfinished saves left. A save of an older attempt that still runs fails by it, rightly."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
