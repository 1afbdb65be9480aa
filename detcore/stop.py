"""The stop signal, as a flag. Standard library only, so that it can be in place before torch is imported.

Nothing is done inside the handler: the training loop looks at the flag where the ranks can agree on a step.
"""

import signal
from types import FrameType

_requested = False


def install() -> None:
    """From here on SIGTERM and SIGINT, once or often, are a wish to stop; SIGUSR1 and SIGUSR2, which a
    cluster may send to every process of a job, are nothing."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def requested() -> bool:
    """Whether this process was asked to stop."""
    return _requested


def _note(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True
