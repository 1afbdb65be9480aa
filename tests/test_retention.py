"""Which checkpoints stay: detcore on the disk and the launcher in the bucket come to the same answer."""

import random
from pathlib import Path

import pytest

from detcore.checkpoint import Checkpoint
from detcore.checkpoint import kept as kept_on_disk
from launcher.checkpoints import Mark, kept

# (fence, step) of all, keep, keep_every, those that stay
TABLE = [
    ([], 3, 10, []),
    ([(1, 5)], 1, None, [(1, 5)]),
    ([(1, 1), (1, 2), (1, 3)], 2, None, [(1, 2), (1, 3)]),
    ([(1, 90), (2, 50), (2, 60)], 2, None, [(2, 50), (2, 60)]),  # newest by fence, then step
    ([(1, 0), (1, 5), (1, 10), (1, 15), (1, 20), (1, 25)], 1, 10, [(1, 10), (1, 20), (1, 25)]),
    ([(1, 4), (1, 13), (1, 17), (1, 21), (1, 29), (1, 33)], 1, 10, [(1, 13), (1, 21), (1, 33)]),  # by time
    ([(1, 7), (1, 31), (1, 32)], 1, 10, [(1, 31), (1, 32)]),  # one for several multiples
    ([(1, 10), (1, 12), (2, 10), (2, 14)], 1, 10, [(2, 10), (2, 14)]),  # done again: the later attempt's
    ([(1, 10), (1, 14), (2, 12), (2, 16)], 1, 10, [(1, 10), (2, 16)]),  # resumed beyond it: it stays
    ([(1, 8), (1, 9)], 1, 10, [(1, 9)]),  # no multiple was reached
]


def both(marks: list[tuple[int, int]], keep: int, keep_every: int | None) -> list[tuple[int, int]]:
    """The answer of the two, who must agree."""
    ours = kept((Mark(*mark) for mark in marks), keep, keep_every)
    theirs = kept_on_disk((Checkpoint(*mark, Path(f"{mark}")) for mark in marks), keep, keep_every)
    answer = sorted((mark.fence, mark.step) for mark in ours)
    assert answer == sorted((each.fence, each.step) for each in theirs)
    return answer


@pytest.mark.parametrize(("marks", "keep", "keep_every", "staying"), TABLE)
def test_what_stays(
    marks: list[tuple[int, int]], keep: int, keep_every: int | None, staying: list[tuple[int, int]]
) -> None:
    assert both(marks, keep, keep_every) == staying


def test_the_two_agree_and_save_by_save_comes_to_the_same_as_all_at_once() -> None:
    """What is deleted early is never missed later, and the newest always stays."""
    draw = random.Random(4)
    for _ in range(200):
        keep, keep_every, step, left, ever = draw.randint(1, 4), draw.randint(1, 30), 0, [], []
        for fence in range(1, draw.randint(2, 5)):
            for _ in range(draw.randint(1, 12)):
                step += draw.randint(1, 12)
                left, ever = [*left, (fence, step)], [*ever, (fence, step)]
                left = both(left, keep, keep_every)
                assert (fence, step) in left
            step = draw.choice(left)[1]  # an attempt goes on from one that is still there
        assert left == both(ever, keep, keep_every)
