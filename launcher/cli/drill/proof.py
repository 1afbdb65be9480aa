"""What a drill promises, and what its two runs' files say of it: a row each."""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.checkpoints import MANIFEST, checkpoints, read_manifest, verify
from launcher.cli.drill.blow import Blow
from launcher.rundir import RunDir, read_jsonl
from launcher.supervisor import history

LEAVING = 3.0  # seconds beyond the budget: what SIGKILL ends is gone, and known to be, a moment later
VERDICTS = {
    True: ("held", "green"),
    False: ("broken", "bold red"),
    None: ("not looked at", "yellow"),
}


@dataclass(frozen=True)
class Row:
    """`held`: None where it could not be looked at."""

    what: str
    promised: str
    seen: str
    held: bool | None

    def record(self) -> dict[str, object]:
        return asdict(self)


def rows(preempted: RunDir, undisturbed: RunDir, blow: Blow, step: int, back: float) -> list[Row]:
    """Both runs are over. `step`: of the checkpoint to compare. `back`: seconds until it trained again."""
    ends = [line for line in read_jsonl(preempted.attempts) if line.get("event") == "end"]
    end = next((line for line in ends if line.get("attempt") == blow.attempt), {})
    then = next((line for line in ends if line.get("attempt", 0) > blow.attempt), {})
    return [
        _saved(end, blow),
        *_resumed(preempted, end, then, blow),
        _state(preempted, undisturbed, blow, step),
        _orphans(blow),
        _free(blow),
        _back(preempted, blow, back),
    ]


def _saved(end: dict[str, Any], blow: Blow) -> Row:
    took, saved = end.get("seconds_to_stop"), end.get("saved") is True
    how = f", {took:.1f} s" if took is not None else " before its supervisor was killed"
    words = f"step {end.get('step')}{how}"
    seen = words if saved else f"not saved: {end.get('reason')}"
    return Row("saved", f"within {blow.budget:g} s", seen, saved and (took or 0) <= blow.budget)


def _resumed(run: RunDir, end: dict[str, Any], then: dict[str, Any], blow: Blow) -> list[Row]:
    before = (mark for mark in checkpoints(run) if mark.fence <= blow.attempt)
    durable = next((mark.step for mark in before if verify(run.checkpoints / mark.name) is None), 0)
    at = then.get("resumed")
    known = at is not None and end.get("step") is not None
    lost = history.lost_steps([end, then]) if known else None
    return [
        Row("steps lost", "0", "not known" if lost is None else str(lost), lost == 0),
        Row("resumed at", f"step {durable}, the last durable", f"step {at}", at == durable),
    ]


def _state(preempted: RunDir, undisturbed: RunDir, blow: Blow, step: int) -> Row:
    """By the hashes in the manifests, and by the metrics themselves."""
    ours, theirs = (_files(run, step, after) for run, after in ((preempted, blow.attempt), (undisturbed, 0)))
    ours["metrics.jsonl"], theirs["metrics.jsonl"] = (_metrics(run, step) for run in (preempted, undisturbed))
    names = sorted(ours.keys() | theirs.keys())
    other = [name for name in names if ours.get(name) != theirs.get(name)]
    seen = f"differs in {', '.join(other)}" if other else f"equal in {', '.join(names)}"
    return Row("state", f"an undisturbed run's, at step {step}", seen, not other)


def _files(run: RunDir, step: int, after: int) -> dict[str, object]:
    """The hashes of the checkpoint of that step, of an attempt later than `after`."""
    mark = next(mark for mark in checkpoints(run) if mark.step == step and mark.fence > after)
    return dict(read_manifest((run.checkpoints / mark.name / MANIFEST).read_bytes(), mark))


def _metrics(run: RunDir, step: int) -> object:
    """The lines up to the step, as they are: bytes, not numbers."""
    lines = run.metrics.read_bytes().splitlines() if run.metrics.exists() else []
    return [line for line in lines if json.loads(line).get("step", 0) <= step]


def _orphans(blow: Blow) -> Row:
    if blow.orphans is None:
        return Row("orphans", "none", f"not looked at: it ran on {blow.host}", None)
    alive = f"processes {', '.join(map(str, blow.orphans))}" if blow.orphans else "none"
    return Row("orphans", "none", f"{alive} on {blow.host}", not blow.orphans)


def _free(blow: Blow) -> Row:
    limit = blow.budget + LEAVING
    promised = f"within {limit:g} s"
    if blow.free is None:
        return Row("node free", promised, "not at all", False)
    return Row("node free", promised, f"{blow.free:.1f} s after the signal", blow.free <= limit)


def _back(run: RunDir, blow: Blow, seconds: float) -> Row:
    starts = (line for line in read_jsonl(run.attempts) if line.get("event") == "start")
    start = next((line for line in starts if line.get("attempt", 0) > blow.attempt), {})
    way = (start.get("returned") or {}).get("by") or "the same supervisor"
    return Row("back", "by itself", f"trained {seconds:.1f} s after the signal, by {way}", True)


def show(head: str, found: list[Row], kept: list[str]) -> None:
    """For people. `kept`: the runs that were not deleted."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(Text(head, style="bold"), soft_wrap=True)
    made = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("WHAT", "PROMISED", "SEEN", "VERDICT"):
        made.add_column(title, overflow="fold")
    for row in found:
        word, colour = VERDICTS[row.held]
        made.add_row(row.what, row.promised, row.seen, Text(word, style=colour))
    console.print(made)
    if kept:
        console.print(Text(f"Kept, to be looked at: {', '.join(kept)}"), soft_wrap=True)
