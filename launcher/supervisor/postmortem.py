"""How an attempt ended, from the files that it left.

Why it crashed, in one sentence: the rank that failed first, how, and its traceback's last line.
"""

import re
from pathlib import Path

from launcher import activation
from launcher.checkpoints import checkpoints
from launcher.rundir import RunDir, read_json
from launcher.supervisor.restart import End, classify, exit_words
from launcher.supervisor.watch import Asked

TAIL = 256 << 10  # bytes of a log that are looked at
# torch/distributed/elastic/multiprocessing/errors: the report that torchrun ends with
ROOT_CAUSE = re.compile(
    r"Root Cause.*?time\s*:\s*(?P<time>\S+)"
    r".*?rank\s*:\s*(?P<rank>\d+).*?exitcode\s*:\s*(?P<status>-?\d+)",
    re.DOTALL,
)


def judge(
    run: RunDir, number: int, asked: Asked | None, exit_status: int | None, trouble: str = ""
) -> tuple[End, int | None]:
    """How attempt `number` ended, and at which step it began. `trouble`: what is known of its other nodes."""
    beat, outcome = (read_json(path) or {} for path in (run.heartbeat, run.outcome))
    beat = beat if beat.get("fence") == number else {}
    newest = next(iter(checkpoints(run)), None)
    progress = newest is not None and newest.fence == number and newest.step > (beat.get("resumed") or 0)
    crash = crash_reason(run, number, exit_status, trouble) if exit_status else "its supervisor died"
    end = classify(
        asked[0] if asked else None,
        asked[1] if asked else "",
        outcome if outcome.get("fence") == number else None,
        exit_status,
        beat.get("step"),
        progress,
        crash,
    )
    return end, beat.get("resumed")


def crash_reason(run: RunDir, attempt: int, exit_status: int, trouble: str = "") -> str:
    """A sentence for `reason`; never raises, however little there is to read."""
    torchrun = _tail(run.torchrun_log(attempt))
    if early := activation.gave_up(torchrun, exit_status):
        return early
    logs = [_tail(log) for log in run.attempt_logs(attempt).glob("torchrun*.log")]  # of all its nodes
    causes = [
        (cause["time"], int(cause["status"]), int(cause["rank"]))
        for cause in map(ROOT_CAUSE.search, logs)
        if cause
    ]
    if not causes:
        return trouble or _with(f"torchrun {exit_words(exit_status)}", _last_error(torchrun))
    _, status, rank = min(causes)  # the first; within one second, what was killed before what missed it
    words = _last_error(_tail(run.rank_log(attempt, rank))) if status > 0 else ""
    return "; ".join(filter(None, [_with(f"rank {rank} {exit_words(status)}", words), trouble]))


def _with(what: str, words: str) -> str:
    return f"{what}: {words}" if words else what


def _last_error(log: str) -> str:
    """What ends the last traceback (`ValueError: ...`), or else the last line; 300 letters at most."""
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    starts = [index for index, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    for line in lines[starts[-1] + 1 :] if starts else []:
        line = re.sub(r"^\[rank\d+\]:", "", line)  # torch marks the lines of an uncaught exception
        if line and not line.removeprefix(" ").startswith(" "):
            return line.strip()[:300]
    return lines[-1].strip()[:300] if lines else ""


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
