"""The supervisor's signals: handlers set a flag and nothing else."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

PREEMPTED = "preempted by SIGTERM"
STOPS = {
    signal.SIGINT.value: "stopped by Ctrl-C",
    signal.SIGHUP.value: "stopped because its window was closed",
}
IGNORED = (
    *(
        signal.SIGUSR1,
        signal.SIGUSR2,
    ),  # torchrun dies of them and leaves its workers; it inherits the ignoring
    signal.SIGTTOU,  # the supervisor is in its terminal's background, and writes
)


class Signals:
    """`preempt` and `stop` say why, once a signal came; `count` moves with every signal."""

    def __init__(self) -> None:
        self.preempt = ""
        self.stop = ""
        self.count = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if number == signal.SIGTERM:
            self.preempt = PREEMPTED
        else:
            self.stop = STOPS[number]

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Main thread only. The handlers before come back afterwards."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, *STOPS)}
        before |= {number: signal.signal(number, signal.SIG_IGN) for number in IGNORED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
