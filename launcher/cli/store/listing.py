"""`launch store ls`, with the columns of `aws s3 ls`."""

import sys
import time
from collections.abc import Iterable
from pathlib import Path

import click

from launcher.cli.store.terminal import printable
from launcher.errors import UserError
from launcher.storage import Entry, StoreSettings
from launcher.transfer import EVERYTHING, places
from launcher.transfer.scan import scan, scan_one


def show(place: str | None, recursive: bool) -> int:
    """Print what is at `place`; 1 if a prefix was named and nothing begins with it."""
    if place is None or place == places.S3:
        from launcher.storage.bucket import buckets

        _print(f"{_date(made)} {name}" for name, made in buckets(StoreSettings()))
        return 0
    if not places.is_s3(place):
        return _folder(place, recursive)
    bucket, key = places.split(place)
    prefix = f"{key}/" if key and place.endswith("/") else key
    store = places.folder(places.S3 + bucket).store
    if recursive:
        found = False
        for entry in store.list(prefix):
            _print([_line(entry, entry.key)])
            found = True
        return 0 if found or not prefix else 1
    folders, entries = store.level(prefix)
    start = prefix.rfind("/") + 1
    _print(f"{'PRE':>30} {folder[start:]}" for folder in folders)
    _print(_line(entry, entry.key[start:]) for entry in entries)
    return 0 if folders or entries or not prefix else 1


def _folder(place: str, recursive: bool) -> int:
    if not places.is_folder(place):
        path = Path(places.local(place))
        if not path.exists():
            raise UserError(f"there is no {place}", "a bucket is s3://BUCKET")
        _print([_line(scan_one(path.parent, path.name, place), path.name)])
        return 0
    root = places.folder(place).root
    assert root is not None
    found = scan(root, EVERYTHING, recursive=recursive)
    _print(f"{'PRE':>30} {folder}" for folder in sorted(found.folders))
    _print(_line(found.files[key], key) for key in sorted(found.files))
    for key, why in found.problems:
        click.echo(f"not listed: {printable(key)}: {why}", err=True)
    return 1 if found.problems else 0


def _line(entry: Entry, name: str) -> str:
    return f"{_date(entry.mtime)} {entry.size:>10} {name}"


def _date(mtime: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(mtime))


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stdout.write(printable(line) + "\n")
