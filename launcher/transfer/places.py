"""What the arguments of a transfer name, and what a trailing slash means: as `aws s3` has it.

With --recursive, and for `sync`, both arguments are folders. Without, the source is one object, and the
target is a folder if it ends in a slash, names a bucket alone, or is a folder on this disk; else it is the
new name.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from launcher.errors import UserError
from launcher.storage import Store, StoreSettings, key_problem, open_store
from launcher.storage.folder import FolderStore

S3 = "s3://"


@dataclass(frozen=True)
class Place:
    """A folder on this disk (`root` says where), or what is below a prefix of a bucket."""

    store: Store
    shown: str  # as it was typed; a key is appended to show one object
    root: Path | None

    @property
    def name(self) -> str:
        """What is the same for the same place, however it was typed; ends in a slash."""
        return f"{self.root or self.store.url}".rstrip("/") + "/"

    def show(self, key: str) -> str:
        return self.shown + key


def folder(argument: str, settings: StoreSettings | None = None) -> Place:
    """The place that `argument` names as a whole, whether it ends in a slash or not."""
    if is_s3(argument):
        bucket, key = split(argument)
        url = S3 + (f"{bucket}/{key}" if key else bucket)
        return Place(open_store(url, settings), f"{url}/", None)
    path = local(argument)
    # What a person names is what is meant: links are followed up to there, and not below.
    root = Path(path).resolve()
    shown = "" if path == "." else path.rstrip("/") + "/"
    return Place(FolderStore(root), shown, root)


def one(argument: str, settings: StoreSettings | None = None) -> tuple[Place, str]:
    """The folder that one object lies in, and its name there."""
    if is_s3(argument):
        bucket, key = split(argument)
        above, _, name = key.rpartition("/")
        return folder(f"{S3}{bucket}/{above}", settings), name
    above, name = os.path.split(local(argument))  # Path would drop `.` and `/` at the end
    place = folder(above or ".", settings)
    if name in ("", ".", ".."):
        raise UserError(f"{argument} names no file")
    return place, name


def is_s3(argument: str) -> bool:
    return argument.startswith(S3)


def is_folder(argument: str) -> bool:
    """Whether `argument` can only be a folder: by its trailing slash, as a bucket, or because it is one."""
    if is_s3(argument):
        return argument.endswith("/") or not split(argument)[1]
    path = local(argument)
    return path.endswith("/") or Path(path).is_dir()


def split(argument: str) -> tuple[str, str]:
    """The bucket and the key without its trailing slash, of `s3://bucket/key/`."""
    bucket, _, key = argument.removeprefix(S3).partition("/")
    key = key.removesuffix("/")
    problem = key_problem(key) if key else None
    if not bucket or problem:
        raise UserError(f"{argument!r} names nothing: {problem or 'it has no bucket'}", "s3://BUCKET/KEY")
    return bucket, key


def local(argument: str) -> str:
    """The path that `argument` is; `file:///path` is one, too."""
    if argument.startswith("file://"):
        parts = urlsplit(argument)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise UserError(f"{argument!r} names nothing", "file:///FOLDER")
        return unquote(parts.path)
    if "://" in argument or argument.startswith("s3:"):
        raise UserError(f"{argument!r} is neither s3://BUCKET/KEY nor a path")
    if argument == "-":
        raise UserError("nothing is read from a pipe, or written to one", "./- is a file of that name")
    if not argument or "\0" in argument:
        raise UserError(f"{argument!r} is not a path")
    return os.path.expanduser(argument)  # noqa: PTH111 - Path's own raises without a home


def refuse_overlap(source: Place, target: Place) -> None:
    """One inside the other would be read while it is written, or deleted for not being in itself."""
    one, other = source.name, target.name
    if one == other:
        raise UserError(f"source and target are the same: {source.shown or '.'}")
    if one.startswith(other) or other.startswith(one):
        raise UserError(f"{source.shown or '.'} and {target.shown or '.'}: one lies inside the other")
