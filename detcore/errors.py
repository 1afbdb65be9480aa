"""The errors of detcore that people see; anything else is a bug and shows its traceback.

DetcoreError
├── InputError        recipe, data set, weights or arguments are wrong; the same command would fail again
└── TrainingError     training itself went wrong, and would again (the loss is not finite, ...)
"""

from collections.abc import Sequence


class DetcoreError(Exception):
    """A failure told in one sentence: what is wrong, where, what to do."""

    exit_status = 1


class InputError(DetcoreError):
    exit_status = 2


class TrainingError(DetcoreError):
    pass


WRONG_PATH = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""What opening a file raises if its path is wrong; any other OSError may have passed at the next attempt."""


def listed(words: Sequence[str], most: int = 100) -> str:
    """Words for a sentence, not more of them than anybody reads."""
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
