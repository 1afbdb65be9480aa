"""torchrun with its imports done before there is anything to start: they are most of what a start costs.

The supervisor starts `warm.py` as its own first act, and finds out meanwhile what is to be run. The process
then becomes the torchrun of the attempt whose number it was given, or is thrown away.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

COLD = ("-P", "-m", "torch.distributed.run")
KEPT = 10.0  # seconds; a run that waits for longer, for devices or its store, must not sit on the memory


class Warm:
    """A process that waits to become attempt `attempt`'s torchrun. Never raises: a cold start will do."""

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self._since = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                env=os.environ | {"LAUNCH_ATTEMPT": str(attempt)},  # found by what it was started with
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def become(
        self, attempt: int, argv: tuple[str, ...], env: dict[str, str], cwd: Path, log: Path
    ) -> subprocess.Popen[bytes] | None:
        """torchrun, started; None if it has to be started cold, this process being none that fits."""
        process, self._process = self._process, None
        if process is None:
            return None
        fits = attempt == self.attempt and argv[:4] == (sys.executable, *COLD)
        if fits and process.poll() is None and process.stdin:
            told = {"argv": argv[4:], "env": env, "cwd": str(cwd), "log": str(log)}
            with contextlib.suppress(OSError):
                process.stdin.write(json.dumps(told).encode() + b"\n")
                process.stdin.close()
                return process
        _end(process)
        return None

    def age(self) -> None:
        """Throw it away if it has waited for too long."""
        if self._process and time.monotonic() - self._since > KEPT:
            self.close()

    def close(self) -> None:
        """Throw it away, if it has become nothing."""
        if self._process:
            _end(self._process)
            self._process = None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    with contextlib.suppress(OSError):
        if process.stdin:
            process.stdin.close()


def main() -> None:
    from torch.distributed import run

    line = sys.stdin.readline()
    if not line:  # whoever started us is gone, or needs us no more
        return
    told = json.loads(line)
    log = os.open(told["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, number in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, number)
    os.close(log)
    os.close(nothing)
    os.environ.clear()
    os.environ.update(told["env"])
    os.chdir(told["cwd"])
    sys.argv = ["torchrun", *told["argv"]]
    run.main()


if __name__ == "__main__":
    main()
