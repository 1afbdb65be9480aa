"""What a run folder holds at one moment: files by key, told apart by fingerprint. Reads no content."""

import os
import stat
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from launcher.mirror.layout import CODE, LATER, NOT_MIRRORED, stays_inside
from launcher.storage import key_problem
from launcher.storage.files import is_aside


class Print(NamedTuple):
    """What tells one content of a file from the next."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass
class Scan:
    """Files to mirror, what of the snapshot is no content, and what cannot be mirrored."""

    needed: dict[str, Print] = field(default_factory=dict)
    later: dict[str, Print] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)  # below code/, as `executable` is
    executable: list[str] = field(default_factory=list)
    unreadable: dict[str, OSError] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)


def scan(folder: Path, known: Container[str] = ()) -> Scan:
    """Everything below `folder` that is mirrored, without checkpoints; symbolic links are not followed.

    Names of `known` keys need no second look. Raises FileNotFoundError if there is no such folder.
    """
    found, prefixes = Scan(), [""]
    while prefixes:
        prefix = prefixes.pop()
        try:
            with os.scandir(f"{folder}/{prefix}") as entries:
                prefixes += [f"{key}/" for entry in entries for key in _see(entry, prefix, found, known)]
        except FileNotFoundError:
            if not prefix:
                raise
        except OSError as error:
            found.unreadable[prefix.rstrip("/")] = error
    return found


def _see(entry: "os.DirEntry[str]", prefix: str, found: Scan, known: Container[str]) -> list[str]:
    """Note one entry of a folder; its key, if it is a folder to look into."""
    key = prefix + entry.name
    if key in NOT_MIRRORED or is_aside(entry.name):
        return []
    try:
        info = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return []  # gone since the folder was listed
    except OSError as error:
        found.unreadable[key] = error
        return []
    if stat.S_ISDIR(info.st_mode):
        return [key]
    if key not in known and (problem := key_problem(key)):
        found.unfit[key] = problem
    elif stat.S_ISREG(info.st_mode):
        files = found.later if key.startswith(LATER) else found.needed
        files[key] = Print(info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        if info.st_mode & stat.S_IXUSR and key.startswith(CODE):
            found.executable.append(key.removeprefix(CODE))
    elif stat.S_ISLNK(info.st_mode) and key.startswith(CODE):
        link, target = key.removeprefix(CODE), os.readlink(entry.path)  # noqa: PTH115 - Path would tidy it up
        if stays_inside(link, target):
            found.links[link] = target
        else:
            found.unfit[key] = "it is a link that leads out of code/"
    else:
        found.unfit[key] = "it is no regular file"
    return []
