"""What people see of a run: the window, and logs/run.log with the same words but redrawn progress.

Neither may end a run: a window that is gone and a full disk are borne.
"""

import contextlib
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ERASE = b"\r\x1b[2K"
CHUNK = 1 << 20


class Console:
    """Words go to the window (stdout) and to run.log; a progress line stays below them on a terminal."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._lock = threading.Lock()  # the mirror speaks too, from its own thread
        self._line = b""
        self._open: bool = True
        try:
            self._terminal = os.isatty(sys.stdout.fileno())
        except (OSError, ValueError):  # no stdout at all, or a captured one
            self._terminal = False

    def say(self, sentence: str) -> None:
        """One sentence of the launcher's own."""
        self.pour(f"{time.strftime('%H:%M:%S')} launch: {sentence}\n".encode())

    def pour(self, words: bytes) -> None:
        """Whole lines of the program's."""
        if not words:
            return
        with self._lock:
            self._append(words)
            erase = ERASE if self._line else b""
            self._show(erase + words + self._line)

    def progress(self, beat: Mapping[str, Any] | None) -> None:
        """Redraw the line below the words from a heartbeat; None takes it away."""
        if not self._terminal:
            return
        line = _bar(beat) if beat else b""
        with self._lock:
            if line != self._line:
                self._show((ERASE if self._line or line else b"") + line)
                self._line = line

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """What the launcher's parts log (the mirror does) is said here."""
        log, handler = logging.getLogger("launch"), logging.Handler(logging.INFO)
        handler.emit = lambda record: self.say(record.getMessage())  # type: ignore[method-assign]
        log.setLevel(logging.INFO)
        log.addHandler(handler)
        try:
            yield
        finally:
            log.removeHandler(handler)

    def _append(self, words: bytes) -> None:
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(fd, words)
            finally:
                os.close(fd)
        except OSError as error:
            if self._open:
                self._show(f"launch: {self._log} cannot be written: {error.strerror}\n".encode())

    def _show(self, words: bytes) -> None:
        if not self._open:
            return
        try:
            if isinstance(getattr(sys.stdout, "buffer", None), io.BufferedIOBase):
                sys.stdout.buffer.write(words)
            else:
                sys.stdout.write(words.decode(errors="replace"))
            sys.stdout.flush()
        except (OSError, ValueError):  # the window is gone; the run goes on
            self._open = False


class Tail:
    """What is appended to a file that may not exist yet, in whole lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def read(self, last: bool = False) -> bytes:
        """What is new, at most about CHUNK bytes; with `last` an unfinished line too."""
        data = b""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read(CHUNK)
        self._offset += len(data)
        whole, newline, rest = (self._rest + data).rpartition(b"\n")
        if last and not data and rest:
            whole, newline, rest = rest, b"\n", b""
        self._rest = rest
        return whole + newline


def _bar(beat: Mapping[str, Any]) -> bytes:
    """One line, narrower than the terminal, so that erasing one line erases it."""
    from rich.console import Console as Rich
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    step, of = beat.get("step"), beat.get("of")
    numbers = isinstance(step, int) and isinstance(of, int) and of > 0
    words = [str(beat.get("phase", ""))]
    words += [f"{step}/{of}"] if numbers else [str(step)] if step is not None else []
    if isinstance(beat.get("loss"), int | float):
        words.append(f"loss {beat['loss']:.4g}")
    if isinstance(beat.get("eta"), int | float):
        minutes, seconds = divmod(int(beat["eta"]), 60)
        words.append(f"eta {minutes // 60}:{minutes % 60:02}:{seconds:02}")
    table = Table.grid(padding=(0, 2))
    bar = [ProgressBar(total=of, completed=step or 0, width=24)] if numbers else []
    table.add_row(words[0], *bar, *words[1:])
    try:
        width = os.get_terminal_size(sys.stdout.fileno()).columns
    except OSError:
        width = 80
    rich = Rich(file=io.StringIO(), force_terminal=True, width=1000, color_system="standard")
    with rich.capture() as capture:
        rich.print(table, end="")
    visible = sum(map(len, words)) + 24 + 2 * len(words)
    line = capture.get().split("\n")[0].rstrip()
    return line.encode() if visible < width else "  ".join(words)[: width - 1].encode()
