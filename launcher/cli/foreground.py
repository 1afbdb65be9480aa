"""A command in the foreground of the caller's terminal: it has the terminal, and its exit status is ours."""

import contextlib
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType

POLL = 0.1  # seconds between two looks


def run(argv: Sequence[str], environ: Mapping[str, str], tick: Callable[[], None] = lambda: None) -> int:
    """Its exit status, 128 + n if signal n ended it, as bash(1) has it. `tick` is called while it runs.

    It stays in our process group, so the terminal is its own as it is ours: Ctrl-C and Ctrl-Z reach both.
    """
    told: list[int] = []
    with _signals(told), _terminal() as restore:
        child = subprocess.Popen(argv, env=environ, close_fds=False)  # whatever we were given open is for it
        while True:
            try:
                status = child.wait(POLL)
            except subprocess.TimeoutExpired:
                while told:
                    child.send_signal(told.pop(0))
                tick()
            else:
                if status < 0:
                    restore()
                return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _signals(told: list[int]) -> Iterator[None]:
    """`told` gets those that reach us alone; what the terminal sends the command has got as well."""

    def note(number: int, frame: FrameType | None) -> None:
        if number in (signal.SIGTERM, signal.SIGHUP):
            told.append(number)

    numbers = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # nohup(1)
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _terminal() -> Iterator[Callable[[], None]]:
    """What sets the terminal back: an interactive shell that is killed leaves it without echo."""
    try:
        before = termios.tcgetattr(0)
    except (termios.error, OSError):  # it is none
        yield lambda: None
        return

    def restore() -> None:
        handler = signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # the dead shell's group has the terminal
        with contextlib.suppress(termios.error):  # its window is closed
            termios.tcsetattr(0, termios.TCSADRAIN, before)
        signal.signal(signal.SIGTTOU, handler)

    yield restore


class Line:
    """What we wait for, on stderr: one line that changes on a terminal, else a line for each change."""

    def __init__(self) -> None:
        self._shown = ""
        self._terminal = sys.stderr.isatty()

    def wait(self, why: str) -> bool:
        """Show it for a tenth of a second; always True, for only a signal ends the wait."""
        if why != self._shown:
            room = shutil.get_terminal_size().columns - 1
            print(
                f"\r\033[K{why[:room]}" if self._terminal else why,
                end="" if self._terminal else "\n",
                file=sys.stderr,
                flush=True,
            )
            self._shown = why
        time.sleep(POLL)
        return True

    def clear(self) -> None:
        if self._shown and self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
