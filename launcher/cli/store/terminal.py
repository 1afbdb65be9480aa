"""A transfer on a terminal: a line per object, a bar if somebody watches, and Ctrl-C."""

import os
import signal
import sys
from collections import deque
from types import FrameType, TracebackType
from typing import Any, NoReturn

from launcher.transfer import Report, Summary

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminal(Report):
    """Lines go to stdout, problems and the summary to stderr; the bar only where stderr is a terminal."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()  # from all threads
        self._problems: deque[str] = deque()
        self._pieces: deque[int] = deque()
        self._signal = 0
        self._working = False
        self._bar: Bar | None = None

    def __enter__(self) -> "Terminal":
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tick()
        if self._bar is not None:
            self._bar.stop()
        if not self._signal:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def stopped(self) -> bool:
        return self._signal != 0

    def begin(self, files: int, size: int) -> None:
        self._working = True
        if files and sys.stderr.isatty():
            self._bar = Bar(files, size)

    def moved(self, size: int) -> None:
        self._pieces.append(size)

    def line(self, text: str) -> None:
        self._lines.append(text)

    def problem(self, text: str) -> None:
        self._problems.append(text)

    def tick(self) -> None:
        done, failed = _all(self._lines), _all(self._problems)
        size = sum(_all(self._pieces))
        if self._bar is not None:
            self._bar.advance(len(done), size)
        _write(sys.stdout, done, self._bar)
        _write(sys.stderr, failed, self._bar)

    def end(self, summary: Summary, told: str) -> int:
        """The last line; the exit status. After a signal it does not return: threads may be at work still."""
        print(f"launch: {told}", file=sys.stderr)
        if summary.stopped:
            print("  run it again to go on", file=sys.stderr)
            self._leave()
        return 0 if summary.complete else 1

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if not self._working:  # both sides are still being listed: nothing has begun
            print("launch: stopped before anything was done", file=sys.stderr)
            self._leave()

    def _leave(self) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + self._signal)


class Bar:
    """Bytes, files and rate, on stderr."""

    def __init__(self, files: int, size: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        count = TextColumn("{task.fields[files]}/" + str(files))
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), count)
        self._progress = Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
        self._task = self._progress.add_task("", total=size, files=0)
        self._files = 0
        self._progress.start()

    def advance(self, files: int, size: int) -> None:
        self._files += files
        self._progress.update(self._task, advance=size, files=self._files, refresh=True)

    def write(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True, end="")

    def stop(self) -> None:
        self._progress.stop()


def _write(stream: Any, lines: list[str], bar: Bar | None) -> None:
    if not lines:
        return
    text = "".join(f"{printable(line)}\n" for line in lines)
    if bar is not None and stream.isatty():  # above the bar
        bar.write(text)
        return
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:  # `| head`: nobody reads on, the work is still wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _all(queue: "deque[Any]") -> list[Any]:
    """What is in a queue now; threads may go on adding to it."""
    return [queue.popleft() for _ in range(len(queue))]


def printable(text: str) -> str:
    """Names come from buckets and folders: they do not steer the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
