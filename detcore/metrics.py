"""metrics.jsonl and timing.jsonl: lines with a `step`, appended, cut back when a run resumes."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from detcore.rundir import write_whole

Line = dict[str, Any]


class JsonLines:
    """A file of JSON lines. What a full disk refuses waits in memory for the next try, so that no line is
    lost as long as the process lives, and none is written by halves."""

    def __init__(self, path: Path) -> None:
        self.path, self._waiting = path, b""

    def cut(self, keep: Callable[[Line], bool]) -> None:
        """Keep the lines for which `keep` is true; a torn last line goes. Nothing is touched if all stay."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        kept = b"".join(line for line in content.splitlines(keepends=True) if _stays(line, keep))
        if kept != content:
            write_whole(self.path, kept)

    def append(self, **line: Any) -> None:
        """Add a line; floats in full, so that equal files mean equal numbers."""
        self._waiting += json.dumps(line, allow_nan=False).encode() + b"\n"
        with suppress(OSError):  # said by the next save, which needs the file to be whole
            self.flush()

    def flush(self) -> None:
        """Everything to the file. Raises OSError."""
        with self.path.open("ab") as file:
            end = file.tell()
            try:
                file.write(self._waiting)
                file.flush()
            except OSError:
                os.truncate(self.path, end)
                raise
            self._waiting = b""

    def sync(self) -> None:
        """The file to the disk; from any thread. Raises OSError."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())


def _stays(line: bytes, keep: Callable[[Line], bool]) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return keep(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return False


class Mean:
    """Running mean of named numbers since the last `take`; its state travels in checkpoints."""

    def __init__(self) -> None:
        self.sums: list[float] = []
        self.count = 0

    def add(self, values: list[float]) -> None:
        self.sums = [a + b for a, b in zip(self.sums or [0.0] * len(values), values, strict=True)]
        self.count += 1

    def take(self) -> list[float]:
        means = [total / self.count for total in self.sums]
        self.sums, self.count = [], 0
        return means

    def state_dict(self) -> Line:
        return {"sums": list(self.sums), "count": self.count}

    def load_state_dict(self, state: Line) -> None:
        self.sums, self.count = list(state["sums"]), int(state["count"])
