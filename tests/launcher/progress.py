"""What tests of the launcher wait for, and what every run of the toy program (toy.py) is to leave."""

import json
import time
from collections.abc import Callable

from launcher.rundir import RunDir, read_json


def wait(what: str, check: Callable[[], object], seconds: float = 120) -> None:
    """Poll until `check()` is true; the deadline is generous, machines are slow at times."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.05)


class Progress:
    """A run of the toy program, wherever it runs."""

    run: RunDir

    def at(self, step: int, attempt: int = 1) -> None:
        """Wait until `attempt` has come to `step`."""

        def there() -> bool:
            beat = read_json(self.run.heartbeat) or {}
            return beat.get("fence") == attempt and beat["step"] >= step

        wait(f"step {step} of attempt {attempt} of {self.run.id}", there)

    def assert_undisturbed(self, steps: int) -> None:
        """The metrics are those of a run that nobody touched, to the byte."""
        total, expected = 0, ""
        for step in range(1, steps + 1):
            total += step - 1
            expected += json.dumps({"step": step, "sum": total}) + "\n"
        assert self.run.metrics.read_text() == expected
