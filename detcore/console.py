"""What a person sees: a line now and then in a log, a moving bar above it where somebody watches."""

import os
import sys
from typing import Any


class Console:
    """Prints on rank 0 only. The bar is for a terminal, and not for a launcher's log."""

    def __init__(self, active: bool, of: int) -> None:
        self.active = active
        self._bar: Any = None
        if active and sys.stderr.isatty() and "LAUNCH_RUN_ID" not in os.environ:
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("loss {task.fields[loss]:.3f}"),
                console=Terminal(stderr=True),
            )
            self._task = self._bar.add_task("training", total=of, loss=float("nan"))
            self._bar.start()

    def say(self, line: str) -> None:
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        elif self.active:
            print(line, flush=True)

    def show(self, step: int, loss: float) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step, loss=loss)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def duration(seconds: float) -> str:
    """h:mm:ss"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
