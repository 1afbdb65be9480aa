"""Pure: who of the queue is given what, and who must give way. No files, no clock, no processes.

By priority, within a priority by ticket. Whoever does not fit blocks those behind it that want of the same,
so nobody is overtaken for ever; runs that share nothing with it (other GPUs, say) need not wait for it.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TypeVar

GPUS = "gpus"  # the only kind whose units have names; all others are counted


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a run wants or holds. `visible`: the GPUs that it may be given; `devices`: those that it was."""

    key: str
    run: str
    priority: int
    ticket: int
    preemptible: bool
    wants: Mapping[str, int]
    visible: tuple[str, ...] = ()
    holding: bool = False
    devices: tuple[str, ...] = ()


C = TypeVar("C", bound=Claim)


@dataclass(frozen=True)
class Decision:
    """By keys: the GPUs that each run is granted (none, for one without), and for whom each gives way."""

    granted: Mapping[str, tuple[str, ...]]
    gives_way: Mapping[str, Claim]


def line(claims: Iterable[C]) -> list[C]:
    """Those who wait, first come first."""
    waiting = [claim for claim in claims if not claim.holding]
    return sorted(waiting, key=lambda claim: (-claim.priority, claim.ticket, claim.key))


def decide(claims: Sequence[Claim], totals: Mapping[str, int], busy: Set[str]) -> Decision:
    """What follows from all claims. totals: what there is of each counted kind; a kind that is missing is
    unlimited. busy: GPUs on which processes run; those that nobody holds are somebody else's."""
    holding = [claim for claim in claims if claim.holding]
    foreign = busy - {gpu for claim in holding for gpu in claim.devices}
    granted: dict[str, tuple[str, ...]] = {}
    gives_way: dict[str, Claim] = {}
    blocked: list[Claim] = []
    for claim in line(claims):
        devices = None
        if not any(_share(claim, other) for other in blocked):
            devices = _fit(claim, holding, totals, foreign)
            if devices is None:
                victims = _victims(claim, holding, totals, foreign)
                gives_way |= {victim.key: claim for victim in victims}
        if devices is None:
            blocked.append(claim)
        else:
            granted[claim.key] = devices
            holding.append(replace(claim, holding=True, devices=devices))
    return Decision(granted, gives_way)


def _fit(
    claim: Claim, holding: Iterable[Claim], totals: Mapping[str, int], foreign: Set[str]
) -> tuple[str, ...] | None:
    """The GPUs that `claim` could have beside those who hold; None if there is too little of anything."""
    holding = list(holding)
    for kind, wanted in claim.wants.items():
        taken = sum(other.wants.get(kind, 0) for other in holding)
        if kind != GPUS and kind in totals and taken + wanted > totals[kind]:
            return None
    held = foreign | {gpu for other in holding for gpu in other.devices}
    free = [gpu for gpu in claim.visible if gpu not in held]
    wanted = claim.wants.get(GPUS, 0)
    return tuple(free[:wanted]) if len(free) >= wanted else None


def _victims(
    claim: Claim, holding: Sequence[Claim], totals: Mapping[str, int], foreign: Set[str]
) -> list[Claim]:
    """Who must give way so that `claim` fits: the lowest and youngest, no more than needed, or nobody."""

    def fits_without(gone: Sequence[Claim]) -> bool:
        keys = {other.key for other in gone}
        rest = [other for other in holding if other.key not in keys]
        return _fit(claim, rest, totals, foreign) is not None

    lower = [other for other in holding if other.preemptible and other.priority < claim.priority]
    lower.sort(key=lambda other: (other.priority, -other.ticket, other.key))
    chosen: list[Claim] = []
    for other in lower:
        if fits_without(chosen):
            break
        chosen.append(other)
    if not fits_without(chosen):
        return []
    for other in reversed(chosen[:]):  # some of them may hold nothing of what is short
        rest = [kept for kept in chosen if kept is not other]
        if fits_without(rest):
            chosen = rest
    return chosen


def _share(one: Claim, other: Claim) -> bool:
    """Whether they want of the same."""
    kinds = {kind for kind in one.wants if other.wants.get(kind)}
    return bool(kinds - {GPUS}) or (GPUS in kinds and bool(set(one.visible) & set(other.visible)))
