"""How benches measure and print: two sides in turn, medians, the ratio of each pair, one table."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Result:
    """One claim and what was seen: `ours` and `theirs` are medians in `unit`, the ratio that of the pairs."""

    claim: str
    ours_is: str
    theirs_is: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    pairs: int
    bound: str

    @property
    def holds(self) -> bool:
        """Whether the median ratio keeps its bound, `<= X` or `>= X`."""
        sign, limit = self.bound.split()
        return self.ratio <= float(limit) if sign == "<=" else self.ratio >= float(limit)


def in_turn(
    claim: str,
    bound: str,
    ours: tuple[str, Callable[[], float]],
    theirs: tuple[str, Callable[[], float]],
    *,
    unit: str = "s",
    pairs: int = 7,
) -> Result:
    """Measure both sides `pairs` times, in turn, every second time in the other order, and once before that
    count, so that a machine whose speed drifts favours neither."""
    ours[1](), theirs[1]()
    seen = []
    for pair in range(pairs):
        sides = (ours[1], theirs[1]) if pair % 2 else (theirs[1], ours[1])
        took = {side: side() for side in sides}
        seen.append((took[ours[1]], took[theirs[1]]))
    return summary(claim, bound, (ours[0], theirs[0]), seen, unit)


def summary(
    claim: str, bound: str, names: tuple[str, str], seen: Sequence[tuple[float, float]], unit: str = "s"
) -> Result:
    """What pairs of (ours, theirs) say."""
    ratios = [a / b for a, b in seen]
    return Result(
        claim=claim,
        ours_is=names[0],
        theirs_is=names[1],
        unit=unit,
        ours=statistics.median(a for a, _ in seen),
        theirs=statistics.median(b for _, b in seen),
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        pairs=len(seen),
        bound=bound,
    )


def wall(argv: Sequence[str], **popen: object) -> float:
    """Seconds that a command takes; its output is thrown away, its failure is ours."""
    began = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, **popen)  # type: ignore[call-overload]
    return time.perf_counter() - began


def show(results: Sequence[Result]) -> None:
    """Print the results as a Markdown table, or as JSON with `--json`."""
    if "--json" in sys.argv[1:]:
        print(json.dumps([asdict(result) | {"holds": result.holds} for result in results], indent=2))
    else:
        print(table(results))


def table(results: Sequence[Result]) -> str:
    lines = [
        "| claim | ours | beside | ratio (min to max) | aim | holds |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        ours, theirs = f"{r.ours_is}: {r.ours:.4g} {r.unit}", f"{r.theirs_is}: {r.theirs:.4g} {r.unit}"
        spread = f"{r.ratio:.3f} ({r.low:.3f} to {r.high:.3f}, {r.pairs} pairs)"
        lines.append(
            f"| {r.claim} | {ours} | {theirs} | {spread} | {r.bound} | {'yes' if r.holds else 'no'} |"
        )
    return "\n".join(lines)
