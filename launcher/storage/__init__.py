"""Where runs are mirrored: an S3-compatible store or a plain folder, behind one small interface.

Importing this costs nothing: boto3 is imported when an `s3://` store is opened.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from launcher.errors import StoreAway, StoreError, UserError
from launcher.storage.base import (
    Changed,
    Entry,
    Info,
    NotFound,
    PreconditionFailed,
    Store,
    StoreSettings,
    Version,
    key_problem,
)

__all__ = [
    "Changed",
    "Entry",
    "Info",
    "NotFound",
    "PreconditionFailed",
    "Store",
    "StoreSettings",
    "Version",
    "key_problem",
    "open_store",
    "reach",
]


def open_store(url: str, settings: StoreSettings | None = None) -> Store:
    """The store at `url`: `s3://bucket/prefix`, `file:///folder` or a path; its keys are below that.

    Nothing is asked of the store yet; `check()` does. Raises UserError for a URL that names no store.
    """
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        prefix = prefix.strip("/")
        problem = key_problem(prefix) if prefix else None
        if not bucket or problem:
            raise UserError(
                f"{url!r} is not the address of a store: {problem or 'it names no bucket'}",
                "write s3://BUCKET/PREFIX",
            )
        with _no_collections():
            from launcher.storage.s3 import S3Store

            return S3Store(bucket, prefix, settings or StoreSettings())
    from launcher.storage.folder import FolderStore

    if not separator:
        return FolderStore(Path(os.path.expanduser(url)).absolute())  # noqa: PTH111 - Path's own raises without a home
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path:
        raise UserError(
            f"{url!r} is not the address of a store", "write s3://BUCKET/PREFIX, file:///FOLDER or a path"
        )
    return FolderStore(Path(unquote(parts.path)))


@contextmanager
def _no_collections() -> Iterator[None]:
    """What botocore reads to know S3 is a hundred thousand objects that stay: looking for garbage among them
    is a third of what a short command costs, and a part of what a long one does. The first time they are put
    where nobody looks, not at the end either; not every time, since a store that is let go is garbage."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
        if not gc.get_freeze_count():
            gc.freeze()
    finally:
        if collects:
            gc.enable()


def reach(url: str, settings: StoreSettings | None = None) -> Store:
    """The store at `url`, asked whether it is there and lets us in.

    Raises StoreAway if it does not answer; what else is wrong with it is the caller's input: UserError."""
    try:
        store = open_store(url, settings)
        store.check()
    except StoreAway:
        raise
    except StoreError as error:
        raise UserError(error.message, error.hint) from None
    return store
