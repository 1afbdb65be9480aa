"""What the supervisor records: attempts.jsonl while the run lives, final.json when it has ended."""

import itertools
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from launcher.rundir import RunDir, append_json, read_json, read_jsonl, write_json
from launcher.supervisor.restart import Decision, End


def begin(
    run: RunDir, attempt: int, gpus: int, backend: str, resume: bool, place: Mapping[str, Any] = {}
) -> None:
    """The line at the start of an attempt; `resume`: the user brought the run back, crashes count anew."""
    line = {"event": "start", "attempt": attempt, "fence": attempt, "time": time.time()}
    line |= {"host": socket.gethostname(), "backend": backend, "pid": os.getpid(), "gpus": gpus, **place}
    append_json(run.attempts, line | ({"resume": True} if resume else {}))


def close(
    run: RunDir, attempt: int, end: End, resumed: int | None = None, seconds: float | None = None
) -> None:
    """The line at the end of an attempt; `seconds` from the stop signal until none of it was alive."""
    line = {"event": "end", "attempt": attempt, "time": time.time(), "state": end.state, "reason": end.reason}
    line |= {"step": end.step, "resumed": resumed, "saved": end.saved, "progress": end.progress}
    append_json(run.attempts, line | {"seconds_to_stop": seconds and round(seconds, 2)})


def load(run: RunDir) -> list[End]:
    """How the attempts ended since the user last brought the run back, in order."""
    ends: list[End] = []
    for line in read_jsonl(run.attempts):
        if line.get("resume"):
            ends = []
        if line.get("event") == "end":
            known = (line.get("step"), line.get("saved"), bool(line.get("progress")))
            ends.append(End(line["state"], str(line.get("reason")), *known))
    return ends


def unfinished(run: RunDir) -> int | None:
    """The attempt that was started last, if nobody wrote how it ended."""
    lines = read_jsonl(run.attempts)
    ended = {line.get("attempt") for line in lines if line.get("event") == "end"}
    started = [line["attempt"] for line in lines if line.get("event") == "start"]
    return started[-1] if started and started[-1] not in ended else None


def finish(run: RunDir, decision: Decision, gpus: int) -> None:
    """Write final.json; whatever was asked for before it is done with. Raises OSError."""
    record, outcome, beat = (read_json(path) or {} for path in (run.run, run.outcome, run.heartbeat))
    lines = read_jsonl(run.attempts)
    ends = [line for line in lines if line.get("event") == "end"]
    steps = [line["step"] for line in ends if line.get("step") is not None]
    write_json(
        run.final,
        {
            "schema": 1,
            "id": run.id,
            "name": record.get("name", run.name),
            "state": decision.state,
            "reason": decision.reason,
            "step": steps[-1] if steps else None,
            "of": beat.get("of"),
            "attempts": sum(line.get("event") == "start" for line in lines),
            "created": record.get("created"),
            "ended": time.time(),
            "metrics": outcome.get("metrics") or {},
            "gpus": gpus,
            "lost_steps": lost_steps(ends),
            "url": record.get("url"),
            "synced": read_json(run.synced),
        },
    )
    run.resume_requested.unlink(missing_ok=True)


def lost_steps(ends: list[dict[str, Any]]) -> int:
    """Steps that were done twice: from where each attempt ended back to where the next one began."""
    known = [(end.get("step"), end.get("resumed")) for end in ends]
    pairs = itertools.pairwise(pair for pair in known if pair != (None, None))  # died before it was anywhere
    return sum(max(0, was[0] - then[1]) for was, then in pairs if was[0] is not None and then[1] is not None)
