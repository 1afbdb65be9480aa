"""Which multipart uploads are ours and under way, so that a killed process leaves none in the bucket.

A record per upload, in $XDG_STATE_HOME/launch/uploads, is written before the upload begins and removed after
it has ended well. Its writer holds a lock on it, which the kernel lets go with the process: who gets the lock
knows that nobody carries this upload on.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import StoreError
from launcher.storage import Store

if TYPE_CHECKING:
    from launcher.storage.bucket import Bucket

Abort = Callable[[str, str | None], None]  # of one upload, by key and id; no id: all to exactly this key


class Uploads:
    """To one bucket, whose address tells it from all others; keys are relative to it."""

    def __init__(self, bucket: str, abort: Abort) -> None:
        self._bucket, self._abort = bucket, abort
        self._running: dict[Path, dict[str, str | None]] = {}

    @contextmanager
    def recorded(self, key: str) -> Iterator[Callable[[str], None]]:
        """Around one upload, which tells its id once it has one.

        Where nothing can be written (no home) uploads go on unrecorded: the bucket's lifecycle rule remains.
        """
        record: dict[str, str | None] = {"bucket": self._bucket, "key": key, "upload": None}
        try:
            path, fd = _held()
        except OSError:
            yield lambda upload: None
            return

        def write(upload: str | None) -> None:
            record["upload"] = upload
            os.pwrite(fd, json.dumps(record).encode(), 0)

        try:
            write(None)
            self._running[path] = record
            yield write
            path.unlink(missing_ok=True)  # not after an error: who comes next sees whether the upload is gone
        finally:
            self._running.pop(path, None)
            os.close(fd)

    def abandon(self) -> None:
        """Abort those of this process that still run: it is about to end."""
        for record in list(self._running.values()):
            with suppress(StoreError):
                self._abort(str(record["key"]), record["upload"])

    def clean(self) -> None:
        """Abort those of dead processes."""
        for path in sorted(folder().glob("*.json")):
            with suppress(OSError), path.open("r+b") as file:
                flock(file, LOCK_EX | LOCK_NB)
                record = _parsed(file.read())
                if record and record.get("bucket") != self._bucket:
                    continue
                if record:
                    try:
                        self._abort(str(record["key"]), record.get("upload"))
                    except StoreError:
                        continue  # the next command tries again
                path.unlink()


def of_store(store: Store) -> Uploads | None:
    """The records of what this store uploads; None if it has no uploads that could be left behind."""
    bucket = bucket_of(store)
    if bucket is None:
        return None
    uploads = Uploads(f"{bucket.where}/{bucket.name}", bucket.abort)
    bucket.recorded = uploads.recorded
    return uploads


def bucket_of(store: Store) -> "Bucket | None":
    """What an S3 store sends its requests by. (An import of its class would be one of boto3.)"""
    bucket: Bucket | None = getattr(store, "bucket", None)
    return bucket


def folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")  # noqa: PTH111 - no home: no error
    return Path(state) / "launch" / "uploads"


def _held() -> tuple[Path, int]:
    """A new record, open and locked."""
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    while True:
        path = folder() / f"{os.urandom(8).hex()}.json"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        flock(fd, LOCK_EX)
        if os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)  # somebody had the lock before us, and found nothing in it


def _parsed(data: bytes) -> dict[str, Any] | None:
    """A record; one that was cut while it was made stands for nothing that has begun."""
    try:
        record = json.loads(data)
        return record if isinstance(record, dict) and "key" in record else None
    except ValueError:
        return None
