"""`python -m launcher.supervisor RUN_DIR`: the supervisor as a process of its own, as the guard starts it."""

import argparse
import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.environ import EXEC
from launcher.errors import LaunchError
from launcher.rundir import RunDir
from launcher.supervisor.lease import highest_fence
from launcher.supervisor.warm import Warm

if TYPE_CHECKING:
    from launcher.supervisor.place import Place

BUG = 70  # EX_SOFTWARE of sysexits(3), no status of the supervisor's own: the guard starts us again


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.supervisor")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--job")
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--guard", type=int, default=os.getppid())
    args = parser.parse_args()
    run = RunDir(args.run_dir.absolute())
    # Before all else that takes time to import: torchrun takes more.
    warm = Warm(highest_fence(run) + 1) if args.nodes in (None, 1) and run.run.exists() else None
    from launcher.supervisor.console import Console
    from launcher.supervisor.supervise import Supervisor

    try:
        place = _place(run, args.gpus, args.job, args.restarts, args.guard)
        return Supervisor(run, args.gpus, place, args.nodes, warm).run()
    except LaunchError as error:
        words = f"{error.message}. {error.hint}".rstrip(". ") + "."
        if run.run.exists():
            Console(run.run_log).say(words)
        else:  # no run, so nothing is to be written there
            print(f"launch: {words}", file=sys.stderr)
        return error.exit_status
    except Exception:
        Console(run.run_log).pour(traceback.format_exc().encode())
        return BUG


def _place(run: RunDir, gpus: int | None, job: str | None, restarts: int, guard: int) -> "Place":
    """Where the run is to be: a job of Slurm's, or this machine, which others may want as well."""
    from launcher.recipe import load_frozen
    from launcher.supervisor.place import Here

    if not run.run.exists():
        return Here()  # the supervisor says so
    recipe = load_frozen(run.recipe)
    if job:
        from launcher.supervisor.job.allocation import Allocation

        return Allocation(run, recipe, job, restarts, guard)
    if EXEC in os.environ:
        return Here()  # what we need was given to the command that started us
    from launcher.supervisor.station import Station

    return Station(run, recipe, gpus or recipe.resources.gpus)


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(OSError):  # a window that is closed
        sys.stdout.flush()
    # At once: threads that still send a big file are joined where the interpreter ends by itself.
    os._exit(status)
