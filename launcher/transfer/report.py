"""What a transfer tells while it works, and at its end."""

from dataclasses import dataclass


@dataclass
class Summary:
    """What became of the objects. `left`: not tried, because it was stopped or had to stop."""

    done: int = 0
    size: int = 0  # bytes of those
    same: int = 0
    deleted: int = 0
    failed: int = 0
    links: int = 0  # symbolic links that were passed over
    left: int = 0
    kept: int = 0  # what --delete would have deleted, had nothing failed
    stopped: bool = False

    @property
    def complete(self) -> bool:
        return not (self.failed or self.left or self.stopped)


class Report:
    """Is told from many threads at once, but of `begin` and `tick` from the caller's. Says nothing."""

    def begin(self, files: int, size: int) -> None:
        """So much is to be transferred at most."""

    def moved(self, size: int) -> None:
        """So many bytes more are on their way."""

    def line(self, text: str) -> None:
        """Something is done: one line for people, as `aws s3` writes them."""

    def problem(self, text: str) -> None:
        """Something failed or was passed over."""

    def tick(self) -> None:
        """Comes ten times a second."""
