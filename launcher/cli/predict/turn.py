"""When the queue of this workstation would let a run start, and who goes before it. Takes no place in it."""

import time
from collections.abc import Sequence, Set
from dataclasses import dataclass

from launcher.errors import UserError
from launcher.recipe import Recipe
from launcher.recipe.sections import Resources
from launcher.supervisor import lease
from launcher.supervisor.member import alive
from launcher.workstation import devices, order, queue
from launcher.workstation.order import GPUS, Claim


@dataclass(frozen=True)
class Turn:
    """`place`: in the queue, 0 if it would start at once. `behind`: who goes before it or must give way."""

    gpus: int
    place: int
    behind: tuple[str, ...]


def turns(recipe: Recipe, counts: Sequence[int]) -> list[Turn]:
    """For so many GPUs or workers, each by itself. Raises UserError for what this machine never has."""
    wants = recipe.resources
    visible, there = machine(wants, max(counts))
    busy = devices.busy() if visible else frozenset()
    others = _queued()
    return [_turn(recipe, count, visible, others, there, busy) for count in counts]


def machine(wants: Resources, workers: int) -> tuple[tuple[str, ...], dict[str, int]]:
    """The GPUs to choose from, and the total of all that is counted. Raises UserError if it is too little."""
    on_gpus = wants.device == "cuda"
    visible, there = devices.gpus() if on_gpus else (), devices.totals()
    asked = devices.wants(wants, workers)
    lacking = devices.lacking(asked, there | ({GPUS: len(visible)} if on_gpus else {}))
    if lacking:
        raise UserError("; ".join(lacking.values()), "Ask for less, or for another machine.")
    return visible, there


def _turn(
    recipe: Recipe,
    gpus: int,
    visible: tuple[str, ...],
    others: Sequence[Claim],
    there: dict[str, int],
    busy: Set[str],
) -> Turn:
    wants = recipe.resources
    mine = Claim(
        key="",
        run="this run",
        priority=wants.priority,
        ticket=time.monotonic_ns(),  # as one that comes now
        preemptible=wants.preemptible,
        wants=devices.wants(wants, gpus),
        visible=visible,
    )
    claims = [*others, mine]
    decision = order.decide(claims, there, busy)
    if mine.key in decision.granted:
        return Turn(gpus, 0, ())
    line = order.line(claims)
    place = line.index(mine) + 1
    before = [claim.run for claim in line[: place - 1]]
    holding = [claim.run for claim in others if claim.holding]
    giving = [claim.run for claim in others if decision.gives_way.get(claim.key) is mine]
    return Turn(gpus, place, tuple(before or giving or holding))


def _queued() -> list[Claim]:
    """Who holds or waits, less those of whom nothing is alive."""
    if not queue.folder().is_dir():
        return []
    boot = lease.boot()
    with queue.opened() as files:
        return [entry for entry in files.entries() if alive(entry, boot)]


def words(turn: Turn) -> str:
    if not turn.place:
        return "now"
    return f"after {', '.join(turn.behind)}" if turn.behind else "after other programs on the GPUs"


def advice(found: Sequence[Turn], unit: str) -> str:
    wish = found[0]
    if not wish.place:
        return f"{wish.gpus} {unit} are free: the run would start now."
    waits = f"{wish.gpus} {unit} would wait at place {wish.place} of the queue, {words(wish)}"
    sooner = next((turn for turn in found if not turn.place), None)
    if sooner is None:
        return f"{waits}."
    return f"{waits}; {sooner.gpus} would start now. A run can go on with more later: --gpus {sooner.gpus}"
