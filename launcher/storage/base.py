"""What a store can do. It knows keys and bytes, nothing of runs.

Every method raises StoreAway when the store cannot be reached (the same call may work later) and StoreError
when the answer is final. Calls try again by themselves for less than a minute: the callers' loops are the
real retry. All of them are safe to call from many threads at once. Callers send and bring files in parallel,
a store sends and brings the parts of a file in parallel.
"""

import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.errors import StoreError
from launcher.storage.files import Changed

__all__ = ["Changed"]

CONTROL = re.compile(r"[\\\x00-\x1f\x7f]")
MAX_DOCUMENT = 16 << 20  # bytes that get_bytes accepts: what is in a bucket is not ours to trust


class NotFound(StoreError):
    """No object has this key."""


class Damaged(StoreError):
    """What arrived, there or here, is not what was sent."""


class PreconditionFailed(StoreError):
    """A conditional put lost: the object is there already, or is not the one that was expected."""


@dataclass(frozen=True)
class StoreSettings:
    """How to reach an S3 store; what is None is left to boto3's own chain (environment, ~/.aws)."""

    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    path_style: bool | None = None
    ca_bundle: str | None = None
    checksum: Literal["auto", "signed", "etag"] = "auto"


@dataclass(frozen=True)
class Entry:
    """One object in a listing; `key` is relative to the store."""

    key: str
    size: int
    mtime: float = 0.0  # seconds since 1970 by the store's clock; in a folder the file's own
    etag: str = ""  # a folder's listing has none


Level = tuple[list[str], list[Entry]]


@dataclass(frozen=True)
class Version:
    """One content of one object."""

    size: int
    etag: str


@dataclass(frozen=True)
class Info:
    """What the store knows of one object; the last two are what we wrote beside it, None for foreign ones."""

    size: int
    mtime: float
    etag: str
    sha256: str | None
    file_mtime_ns: int | None


class Store(ABC):
    """Objects by key. A put is atomic: readers see the old object or the whole new one."""

    url: str

    @abstractmethod
    def check(self) -> None:
        """Raises a StoreError with one clear sentence unless the store is there and lets us in."""

    @abstractmethod
    def put_file(self, key: str, path: Path, *, if_absent: bool = False, growing: bool = False) -> Version:
        """Store a file, which must stay as it is meanwhile; of a `growing` one what there is now.

        Raises Changed if it does not stay, or gets shorter, PreconditionFailed if `if_absent` and the key is
        taken. After any error nothing was stored, and no part of a big file is left behind.
        """

    @abstractmethod
    def grow_file(self, key: str, path: Path, base: Version) -> Version:
        """Bring the object `base`, a prefix of the file, to the file's present size, sending only the rest.

        A prefix too small to be a part of a multipart upload is sent again. Raises PreconditionFailed if the
        object is not `base` any more, Changed if `base` is no prefix of the file.
        """

    @abstractmethod
    def put_bytes(
        self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        """Store `data`, return its etag. With a condition, PreconditionFailed says that it does not hold.

        Data put under a condition should name its writer: a put whose first answer was lost finds its own
        object there, and knows it by its bytes.
        """

    @abstractmethod
    def get_bytes(self, key: str) -> tuple[bytes, str]:
        """A small object and its etag. Raises NotFound."""

    @abstractmethod
    def get_file(self, key: str, path: Path, *, durable: bool = True, expect: Entry | None = None) -> Info:
        """Bring an object to `path`: written aside, verified, if `durable` fsynced, renamed.

        `expect` is what a listing said of it: that saves a request, and another content raises
        PreconditionFailed. Raises NotFound.
        """

    @abstractmethod
    def digest(self, key: str) -> tuple[int, str]:
        """Size and SHA-256 of an object, read from the store; nothing is written to disk. Raises NotFound."""

    @abstractmethod
    def stat(self, key: str) -> Info:
        """Raises NotFound."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every object whose key starts with `prefix`, in no particular order.

        The keys come from outside: check them with `key_problem` before a path is made of one.
        """

    @abstractmethod
    def level(self, prefix: str = "") -> Level:
        """What of a listing stands before the next slash: "folders", which end in one, and objects."""

    def copy(self, key: str, source: "Store", source_key: str, expect: Entry | None = None) -> None:
        """Make `key` what `source_key` is in `source`, its metadata included; within the server if it can."""
        with source.as_file(source_key, expect) as path:
            self.put_file(key, path)

    @contextmanager
    def as_file(self, key: str, expect: Entry | None = None) -> Iterator[Path]:
        """An object as a file, to be read and left alone."""
        with tempfile.TemporaryDirectory(prefix="launch-copy-") as folder:
            path = Path(folder, "object")
            info = self.get_file(key, path, durable=False, expect=expect)
            if info.file_mtime_ns is not None:
                os.utime(path, ns=(info.file_mtime_ns, info.file_mtime_ns))
            yield path

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is no error."""

    def delete_many(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.delete(key)

    @abstractmethod
    def sweep(self, prefix: str = "") -> int:
        """Remove what unfinished puts below `prefix` have left, and say of how many.

        Only for who owns all that is below `prefix`: a put that still goes on fails.
        """

    @property
    @abstractmethod
    def conditional(self) -> bool:
        """Whether it honours the conditions of a put. Where not, we look before and after: best effort."""

    @property
    @abstractmethod
    def verifies(self) -> bool:
        """Whether it refuses a body that is not what was sent. Where not, we compare what it has stored."""


def key_problem(key: str) -> str | None:
    """Why `key` must not be used, or None. A good key is a relative path that stays below its folder."""
    if not key or key.startswith("/"):
        return "it is not a relative path"
    if CONTROL.search(key):
        return "it has a backslash or a control character"
    if any(part in ("", ".", "..") for part in key.split("/")):
        return "it has an empty part, '.' or '..'"
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        return "it is not valid UTF-8"
    if len(encoded) > 900 or any(len(part.encode()) > 255 for part in key.split("/")):
        return "it is too long"
    return None


def checked(key: str) -> str:
    if problem := key_problem(key):
        raise StoreError(f"the key {key!r} cannot be stored: {problem}")
    return key
