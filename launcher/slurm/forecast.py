"""When a job would start, by `sbatch --test-only`: as asked for, with fewer GPUs, for shorter times."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime

from launcher.recipe import Recipe
from launcher.slurm.commands import SlurmAway, ask, failure
from launcher.slurm.options import flags, options

SLICES = tuple(hours * 3600 for hours in (1, 2, 4, 8, 12, 24))  # seconds
MOST = 12  # questions; each costs the controller a pass of its scheduler
PAUSE = 0.1  # seconds between them


@dataclass(frozen=True)
class Slot:
    """`time`: seconds, None for no limit. `start`: since 1970, by the controller's clock; None if refused."""

    gpus: int
    time: int | None
    start: int | None
    refused: str = ""


def halvings(gpus: int, least: int) -> list[int]:
    """The wish, its half, and so on: four counts at most, none below `least`."""
    counts = [gpus]
    while len(counts) < 4 and counts[-1] // 2 >= max(1, least):
        counts.append(counts[-1] // 2)
    return counts


def grid(gpus: int, least: int, longest: int | None) -> list[tuple[int, int | None]]:
    """What is asked about, (GPUs of a node, seconds), the wish itself first. `longest`: of one allocation."""
    counts = halvings(gpus, least)
    shorter = [length for length in reversed(SLICES) if longest is None or length < longest]
    room = MOST // len(counts) - 1
    if len(shorter) > room:  # the shortest starts first: it, and some between
        step = len(shorter) / room
        shorter = [shorter[round((index + 1) * step) - 1] for index in range(room)]
    return [(count, length) for count in counts for length in [longest, *shorter]]


def forecast(recipe: Recipe, longest: int | None, say: Callable[[str], None]) -> Iterator[Slot]:
    """Ask Slurm about all of the grid. Raises SlurmAway, and SlurmError if it refuses the wish itself."""
    wants = recipe.resources
    least = -(-wants.min_gpus // wants.nodes)
    for number, (gpus, length) in enumerate(grid(wants.gpus, least, longest)):
        say(f"asking Slurm about {gpus} x {length // 3600 if length else 'any'} h")
        time.sleep(PAUSE if number else 0)
        asked = options(recipe, gpus) | ({"time": str(max(1, length // 60))} if length else {})
        done = ask("sbatch", "--test-only", "--job-name=launch-predict", *flags(asked), "--wrap=true")
        told = done.stderr + done.stdout  # its answer comes on stderr
        start = _start(told)
        if start is None:
            error = failure("sbatch", told)
            if number == 0 or isinstance(error, SlurmAway):
                raise error
            yield Slot(gpus, length, None, error.message)
        else:
            yield Slot(gpus, length, start)


def _start(told: str) -> int | None:
    """The time that sbatch names: seconds since 1970, or local time where it ignores SLURM_TIME_FORMAT."""
    match = re.search(r"to start at (\S+)", told)
    if match is None:
        return None
    return int(match[1]) if match[1].isdigit() else int(datetime.fromisoformat(match[1]).timestamp())
