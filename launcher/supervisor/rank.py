"""First words of every worker: `rank.py PYTHON ARGS...` sends stdout and stderr into the rank's own log, then
becomes the program.

Run by its path, with nothing but the standard library, so that a worker's log has every word from the first
instruction on: import errors, native crashes, what comes after the supervisor's death.
"""

import os
import sys
from pathlib import Path


def main() -> None:
    folder = Path(os.environ["LAUNCH_RUN_DIR"], "logs", f"attempt-{os.environ['LAUNCH_ATTEMPT']}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"rank-{os.environ['RANK']}.log"
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)
    except OSError as error:  # a full disk: its words go where torchrun's go
        print(f"no log of its own for rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
    # No signal handler here: until the program has its own, there is nothing to save: SIGTERM may end it.
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
