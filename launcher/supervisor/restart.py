"""Pure: how an attempt ended, and what follows from how all of them ended. No clock, no files.

The table of events: docs/contract.md.
"""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["finished", "stopped", "preempted", "failed", "crashed", "hung"]
# the supervisor's exit statuses: three ends of a run, one that is somebody else's, one that goes on elsewhere
FINISHED, FAILED, STOPPED, TAKEN, LEFT = 0, 1, 3, 4, 5
STATUS = {"finished": FINISHED, "failed": FAILED, "stopped": STOPPED}
LONGEST_PAUSE = 600.0  # seconds; doubling goes on no further
SAME_STEP = 3  # crashes in a row at one step after which trying again is pointless


@dataclass(frozen=True)
class End:
    """How an attempt ended. `saved`: whether a graceful stop was answered; None if there was none.

    `progress`: whether the attempt left a checkpoint that is further than where it began.
    """

    state: State
    reason: str
    step: int | None = None
    saved: bool | None = None
    progress: bool = False


@dataclass(frozen=True)
class Decision:
    """What now: start again after `pause` seconds, or end the run as `state`."""

    again: bool
    reason: str
    pause: float = 0.0
    state: Literal["finished", "stopped", "failed"] = "finished"


def classify(
    asked: Literal["preempt", "stop", "hung"] | None,
    asked_why: str,
    outcome: Mapping[str, Any] | None,
    exit_status: int | None,
    step: int | None,
    progress: bool,
    crash: str,
) -> End:
    """What became of an attempt that is over.

    asked: what the supervisor asked it for, `asked_why` the sentence to that. outcome: outcome.json if it is
    of this attempt. exit_status: torchrun's, None if it is not known. crash: the sentence for a crash.
    """
    said = outcome.get("state") if outcome else None
    if outcome is not None and isinstance(outcome.get("step"), int):
        step = outcome["step"]
    if said == "finished" or (said is None and exit_status == 0):
        return End("finished", "the program finished", step, progress=progress)
    if said == "failed" and outcome is not None:
        return End("failed", str(outcome.get("reason") or "the program gave up"), step, progress=progress)
    saved = said == "stopped" and (outcome or {}).get("saved") is not False
    if asked == "hung":
        return End("hung", asked_why, step, saved, progress)
    if asked is not None:
        where = f" at step {step}" if step is not None else ""
        how = f"stopped{where}" if saved else "could not save" if said else "ended without saving"
        state: State = "preempted" if asked == "preempt" else "stopped"
        return End(state, f"{asked_why}; the program {how}", step, saved, progress)
    if saved and exit_status == 0 and progress:
        return End("preempted", "somebody else signalled the workers, and they saved", step, True, progress)
    if said == "stopped" and exit_status == 0:  # again at once, without end, would be a busy loop
        return End("crashed", "the program stopped though nobody asked it to", step, saved, progress)
    return End("crashed", crash, step, saved or None, progress)


def decide(history: Sequence[End], crashes: int, backoff: float) -> Decision:
    """What follows from the attempts so far (since the user last said so), in order.

    crashes: how many crashes and hangs are borne; backoff: the pause after the first, in seconds. Being
    preempted or stopped never counts.
    """
    if not history:
        return Decision(True, "the first attempt")
    last = history[-1]
    if last.state == "finished" or last.state == "stopped":
        return Decision(False, last.reason, state=last.state)
    if last.state == "failed":
        return Decision(False, last.reason, state="failed")
    if last.state == "preempted":
        return Decision(True, "it was preempted")
    bad = [end for end in history if end.state in ("crashed", "hung")]
    where = f"at step {last.step}" if last.step is not None else "before its first step"
    stuck = len(bad) >= SAME_STEP and last.step is not None  # before its first step, it may be the machine
    if stuck and len({end.step for end in bad[-SAME_STEP:]}) == 1:
        return Decision(
            False, f"{SAME_STEP} crashes in a row {where}; the last: {last.reason}", state="failed"
        )
    if len(bad) > crashes:
        return Decision(
            False, f"crash {len(bad)}, restart.crashes is {crashes}; the last: {last.reason}", state="failed"
        )
    fruitless = 1
    for end in reversed(bad[:-1]):
        if last.progress or end.progress:
            break
        fruitless += 1
    pause = min(backoff * 2 ** (fruitless - 1), max(LONGEST_PAUSE, backoff))
    return Decision(True, f"it crashed {where}", pause)


def exit_words(status: int) -> str:
    """`exited with 1`, or `was killed by SIGKILL` for the negative status that a signal leaves."""
    if status >= 0:
        return f"exited with {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
