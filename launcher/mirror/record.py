"""What is in the store, and which files it was made from: kept in memory, and in `mirrored.json` beside them.

With it a supervisor that comes back sends what is new and asks nothing. It counts only where nobody else has
published since, and that is told by the token in owner.json (ownership.py).
"""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from launcher.checkpoints import Mark
from launcher.mirror.layout import marks_of
from launcher.mirror.scan import Print
from launcher.rundir import read_json
from launcher.storage import Entry, Store
from launcher.storage.files import write_all, written_aside

SCHEMA = 1


class Known(NamedTuple):
    """One object. `print`: of the file it was made from; None if only a listing told of it."""

    size: int
    etag: str
    print: Print | None = None
    sha256: str = ""  # of a document that was made here and is no file


class Record:
    """Objects by key. `objects` is None until it is known what is there."""

    def __init__(self, path: Path, store: Store) -> None:
        self.objects: dict[str, Known] | None = None
        self._path, self._store = path, store
        self._token: str | None = None
        self._saved: dict[str, Known] | None = None

    def claimed(self, token: str, predecessor: str | None, checkpoints: Iterable[Entry]) -> None:
        """The run is claimed as `token`; `predecessor` held it until then. `checkpoints`: listed just now."""
        if self.objects is None:
            self.objects = self._load(predecessor)
            if self.objects is not None:
                rest = {k: v for k, v in self.objects.items() if not k.startswith("checkpoints/step-")}
                steps = [entry for entry in checkpoints if entry.key.startswith("checkpoints/step-")]
                self.objects = rest | {entry.key: Known(entry.size, entry.etag) for entry in steps}
        elif predecessor != self._token:
            self.objects = None
        self._token, self._saved = token, None

    def known(self) -> dict[str, Known]:
        """`objects`, listed if need be. Raises StoreAway, StoreError."""
        if self.objects is None:
            self.objects = {entry.key: Known(entry.size, entry.etag) for entry in self._store.list()}
        return self.objects

    def durable(self) -> set[Mark]:
        """Checkpoints that have a manifest in the store."""
        return set(marks_of(list(self.objects or ())))

    def save(self) -> None:
        """Write it down, if there is anything new. It may be lost: then the store is listed anew."""
        if self.objects is None or self._token is None or self.objects == self._saved:
            return
        objects = dict(self.objects)
        said = {"schema": SCHEMA, "url": self._store.url, "token": self._token, "objects": objects}
        with contextlib.suppress(OSError), written_aside(self._path) as file:
            write_all(file, json.dumps(said).encode())
            self._saved = objects

    def _load(self, predecessor: str | None) -> dict[str, Known] | None:
        said = read_json(self._path) or {}
        ours = predecessor is not None and said.get("token") == predecessor
        if not ours or said.get("url") != self._store.url or said.get("schema") != SCHEMA:
            return None
        try:
            return {str(key): _known(*value) for key, value in said["objects"].items()}
        except (KeyError, TypeError, AttributeError, ValueError):
            return None


def _known(size: int, etag: str, print_: list[Any] | None, sha256: str) -> Known:
    return Known(size, etag, Print(*print_) if print_ else None, sha256)
