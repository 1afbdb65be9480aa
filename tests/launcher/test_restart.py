"""What follows from how attempts ended: a pure function, every row of the contract's table."""

import pytest

from launcher.supervisor.history import lost_steps
from launcher.supervisor.restart import End, classify, decide


def crash(step: int | None, progress: bool = False) -> End:
    return End("crashed", "boom", step, progress=progress)


def test_pause_doubles_until_an_attempt_gets_further() -> None:
    fruitless = [crash(3), crash(5), crash(4)]
    assert [decide(fruitless[:n], 9, 5).pause for n in (1, 2, 3)] == [5, 10, 20]
    assert decide([*fruitless, crash(90, progress=True)], 9, 5).pause == 5
    assert decide([*fruitless, crash(90, progress=True), crash(91)], 9, 5).pause == 5
    assert decide([*fruitless, crash(90, progress=True), crash(91), crash(92)], 9, 5).pause == 10


def test_pause_ends_growing() -> None:
    assert decide([crash(step) for step in range(20)], 99, 5).pause == 600


def test_budget_of_crashes() -> None:
    assert decide([crash(1)], 1, 5).again
    spent = decide([crash(1), crash(2)], 1, 5)
    assert not spent.again and spent.state == "failed" and "restart.crashes is 1" in spent.reason
    assert not decide([crash(1)], 0, 5).again


def test_preemptions_never_count() -> None:
    preempted = End("preempted", "SIGTERM", 4, True)
    assert decide([preempted] * 1000, 0, 5) == decide([preempted], 0, 5)
    assert decide([preempted], 0, 5).again and decide([preempted], 0, 5).pause == 0
    assert decide([crash(1), preempted, crash(2), preempted], 2, 5).again


def test_crashes_before_any_step_have_the_whole_budget() -> None:
    assert decide([crash(None)] * 5, 5, 5).again and not decide([crash(None)] * 6, 5, 5).again


def test_three_crashes_at_one_step_give_up(step: int = 7) -> None:
    assert decide([crash(step)] * 2, 9, 5).again
    given_up = decide([crash(1), crash(step), End("preempted", "", step), crash(step), crash(step)], 9, 5)
    assert not given_up.again and "boom" in given_up.reason
    assert decide([crash(step), crash(3), crash(step), crash(step)], 9, 5).again


def test_ends() -> None:
    assert decide([], 5, 5).again
    assert decide([End("finished", "done")], 5, 5).state == "finished"
    assert decide([End("stopped", "asked")], 5, 5).state == "stopped"
    failed = decide([End("failed", "no such data set")], 5, 5)
    assert (failed.again, failed.state, failed.reason) == (False, "failed", "no such data set")


UNSAVED = {"state": "stopped", "step": 8, "saved": False}  # a full disk
STOPPED = {"state": "stopped", "step": 8}


@pytest.mark.parametrize(
    ("asked", "outcome", "status", "progress", "state", "saved"),
    [
        (None, {"state": "finished", "step": 8}, 0, True, "finished", None),
        (None, None, 0, False, "finished", None),  # a plain script
        ("preempt", {"state": "finished", "step": 8}, 1, True, "finished", None),  # at the last moment
        ("stop", {"state": "failed", "step": 8, "reason": "bad input"}, 1, False, "failed", None),
        ("preempt", STOPPED, 1, True, "preempted", True),
        ("preempt", STOPPED, 1, False, "preempted", True),  # before the first step
        ("preempt", None, -9, False, "preempted", False),
        ("stop", STOPPED, 1, True, "stopped", True),
        ("stop", None, 1, False, "stopped", False),
        ("stop", UNSAVED, 1, False, "stopped", False),
        ("preempt", UNSAVED, 1, True, "preempted", False),
        (None, UNSAVED, 0, True, "crashed", False),
        ("hung", STOPPED, 1, True, "hung", True),
        ("hung", None, -9, False, "hung", False),
        (None, None, 1, True, "crashed", None),
        (None, STOPPED, 1, True, "crashed", True),  # one rank died, torchrun made the others stop
        (None, STOPPED, 0, True, "preempted", True),  # the cluster signalled the workers only
        (None, STOPPED, 0, False, "crashed", True),  # else it might go on for ever
    ],
)
def test_every_way_to_end(
    asked: object, outcome: object, status: int, progress: bool, state: str, saved: bool | None
) -> None:
    end = classify(asked, "why", outcome, status, 8, progress, "boom")  # type: ignore[arg-type]
    assert (end.state, end.saved, end.step) == (state, saved, 8) and end.reason
    assert saved is not False or "stopped at" not in end.reason


def test_an_attempt_that_did_not_get_anywhere_hides_no_lost_steps() -> None:
    nowhere = {"step": None, "resumed": None}
    assert lost_steps([{"step": 30, "resumed": 0}, nowhere, {"step": 40, "resumed": 10}]) == 20
    assert lost_steps([{"step": 30, "resumed": 0}, nowhere]) == 0
