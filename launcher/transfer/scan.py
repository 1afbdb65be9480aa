"""What is in a local folder: one walk, which follows no symbolic link and says what it had to leave out."""

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import UserError
from launcher.storage import Entry, key_problem
from launcher.transfer.filters import Filters

TEMPORARY = re.compile(r"\..*\.tmp-[0-9a-f]{12}")  # storage.base.written_aside makes them


@dataclass
class Scan:
    """Files by key; links; what cannot be transferred, and why; temporary files; folders not looked into."""

    files: dict[str, Entry] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    temporary: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)


def scan(root: Path, filters: Filters, *, recursive: bool = True) -> Scan:
    """All below `root` that the filters let through, or what is right in it. Empty folders are nothing."""
    found = Scan(folders=[""])
    while found.folders:
        folder = found.folders.pop()
        try:
            with os.scandir(f"{root}/{folder}") as entries:
                for entry in entries:
                    _look(entry, folder + entry.name, found, filters)
        except OSError as error:
            found.problems.append((folder, _words(error)))
        if not recursive:
            break
    return found


def scan_one(root: Path, name: str, shown: str) -> Entry:
    """The one file that a person named. Raises UserError."""
    try:
        info = os.lstat(f"{root}/{name}")
    except OSError as error:
        raise UserError(f"there is no file {shown}: {error.strerror}") from None
    if stat.S_ISLNK(info.st_mode):
        raise UserError(f"{shown} is a symbolic link", "name the file that it leads to")
    if not stat.S_ISREG(info.st_mode):
        raise UserError(f"{shown} is not a regular file")
    return Entry(name, info.st_size, info.st_mtime, "")


def _look(entry: "os.DirEntry[str]", key: str, found: Scan, filters: Filters) -> None:
    if entry.is_dir(follow_symlinks=False):
        if not filters.skip_folder(f"{key}/"):
            found.folders.append(f"{key}/")
    elif TEMPORARY.fullmatch(entry.name):
        found.temporary.append(key)
    elif not filters.take(key):
        return
    elif entry.is_symlink():
        found.links.append(key)
    elif problem := key_problem(key):
        found.problems.append((key, f"its name cannot be a key: {problem}"))
    else:
        try:
            info = entry.stat(follow_symlinks=False)
        except OSError as error:
            found.problems.append((key, _words(error)))
            return
        if stat.S_ISREG(info.st_mode):
            found.files[key] = Entry(key, info.st_size, info.st_mtime, "")
        else:
            found.problems.append((key, "it is a device, pipe or socket"))


def _words(error: OSError) -> str:
    return "it vanished meanwhile" if isinstance(error, FileNotFoundError) else str(error.strerror)
