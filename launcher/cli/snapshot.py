"""The snapshot of the program's code that a run keeps in code/: a repository's tracked files as they are now.

Uncommitted changes are in it. Untracked files are not, nor are `.env` files, tracked or not: they hold
secrets, and a run folder is mirrored.
"""

import os
import shutil
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.errors import LaunchError, UserError


def take(workdir: Path, code: Path, script: str | None = None) -> dict[str, Any]:
    """Copy what git tracks around `workdir` into the new folder `code`; say what it was.

    Returns {"commit", "dirty", "prefix"}: prefix is `workdir` as seen from the repository's root. Outside
    of a repository commit is None and `script` alone is copied, if it lies below `workdir`. UserError if git
    refuses to look into the repository.
    """
    code.mkdir(parents=True, exist_ok=True)
    root = _git(workdir, "rev-parse", "--show-toplevel")
    if root is None:
        below = script and ".." not in Path(script).parts and not Path(script).is_absolute()
        if script and below and (workdir / script).is_file():
            _copy(workdir, code, PurePosixPath(script))
        return {"commit": None, "dirty": False, "prefix": ""}
    top = Path(root)
    for path in _tracked(top):
        if not _secret(path):
            _copy(top, code, path)
    return describe(workdir)


def describe(workdir: Path) -> dict[str, Any]:
    """The {"commit", "dirty", "prefix"} of take(), copying nothing."""
    prefix = _git(workdir, "rev-parse", "--show-prefix")
    if prefix is None:
        return {"commit": None, "dirty": False, "prefix": ""}
    changes = _git(workdir, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules")
    return {
        "commit": _git(workdir, "rev-parse", "HEAD"),
        "dirty": bool(changes),
        "prefix": prefix.rstrip("/"),
    }


def _tracked(top: Path) -> list[PurePosixPath]:
    names = _git(top, "ls-files", "-z")
    if names is None:
        raise LaunchError(f"git cannot list the files of {top}", "Try `git ls-files` there; it says why.")
    return [PurePosixPath(name) for name in dict.fromkeys(names.split("\0")) if name]


def _secret(path: PurePosixPath) -> bool:
    return path.name == ".env" or path.name.startswith(".env.") or path.name.endswith(".env")


def _copy(top: Path, code: Path, path: PurePosixPath) -> None:
    source, copy = top / path, code / path
    if source.is_symlink():
        # One that leads out of the repository would lead to something else elsewhere, or to nothing.
        if source.resolve().is_relative_to(top.resolve()) and not source.readlink().is_absolute():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(source.readlink())
    elif source.is_file():  # a tracked file may have been deleted; a submodule is a folder
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)


def _git(folder: Path, *argv: str) -> str | None:
    """git's words without the last newline; None if it refuses, or is not there."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(["git", "-C", str(folder), *argv], env=environ, capture_output=True)
    except FileNotFoundError:
        return None
    if b"dubious ownership" in done.stderr:
        raise UserError(
            f"git does not trust the repository around {folder}, which belongs to another user",
            "Tell it to: git config --global --add safe.directory FOLDER",
        )
    return os.fsdecode(done.stdout).removesuffix("\n") if done.returncode == 0 else None
