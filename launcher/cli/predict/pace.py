"""How fast earlier runs of a recipe went: the seconds of a step and of a start-up, from their own files."""

from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from launcher import rundir
from launcher.rundir import RunDir, read_json, read_jsonl


@dataclass(frozen=True)
class Pace:
    """On `gpus`, over all nodes. `steps`: of the whole run. `start_up`: seconds before the first step."""

    gpus: int
    step: float
    start_up: float
    steps: int

    def work(self, gpus: int) -> float:
        """Seconds of stepping that the whole run takes; that more GPUs take as much less is a guess."""
        return self.steps * self.step * self.gpus / gpus

    def slices(self, gpus: int, length: float | None) -> int | None:
        """Allocations of `length` seconds that the whole run takes; None if it never gets anywhere in one."""
        if length is None:
            return 1
        useful = length - self.start_up
        return None if useful <= 0 else max(1, -(-int(self.work(gpus)) // max(1, int(useful))))


def of_recipe(recipe_hash: str, gpus: int) -> Pace | None:
    """The pace of the newest run of this recipe; one on as many GPUs goes before all others."""
    paces = []
    for run in reversed(rundir.all_runs()):
        if (read_json(run.run) or {}).get("recipe_hash") == recipe_hash and (found := of_run(run)):
            if found.gpus == gpus:
                return found
            paces.append(found)
    return paces[0] if paces else None


def of_run(run: RunDir) -> Pace | None:
    """Of the attempts that came as far as a step, the medians; None if there are none."""
    steps = (read_json(run.heartbeat) or {}).get("of")
    events, clock = read_jsonl(run.attempts), read_jsonl(run.path / "timing.jsonl")
    starts = {event.get("attempt"): event for event in events if event.get("event") == "start"}
    seen: list[tuple[int, float, float]] = []
    for end in events:
        start = starts.get(end.get("attempt"))
        if end.get("event") == "end" and start and start.get("gpus"):
            seen += [(start["gpus"], *pace) for pace in [_attempt(start, end, clock)] if pace]
    if not seen or not isinstance(steps, int):
        return None
    gpus = seen[-1][0]
    mine = [(step, start_up) for count, step, start_up in seen if count == gpus]
    return Pace(gpus, median(step for step, _ in mine), median(start_up for _, start_up in mine), steps)


def _attempt(
    start: dict[str, Any], end: dict[str, Any], clock: list[dict[str, Any]]
) -> tuple[float, float] | None:
    """(seconds of a step, of the start-up) of one attempt."""
    first, last = end.get("resumed"), end.get("step")
    if first is None or last is None or last <= first:
        return None
    took = end["time"] - start["time"]
    lines = [line for line in clock if "time" in line and start["time"] <= line["time"] <= end["time"]]
    gaps = [
        (then["time"] - was["time"]) / (then["step"] - was["step"])
        for was, then in pairwise(lines)
        if then["step"] > was["step"]
    ]
    if not gaps:  # a program without timing.jsonl: the start-up is counted into its steps
        return took / (last - first), 0.0
    step = median(gaps)
    return step, max(0.0, lines[0]["time"] - start["time"] - step * (lines[0]["step"] - first))
