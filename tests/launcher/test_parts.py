"""Parts side by side, one result: in order, whatever comes first, and nothing goes on after an error."""

import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from launcher.storage.parts import AT_ONCE, COMING, PART, SMALL, Pool


def test_a_chain_is_in_order_whatever_comes_first() -> None:
    def step(number: int, before: Callable[[], str]) -> str:
        time.sleep(0.02 if number % 3 == 0 else 0)
        return f"{before()} {number}"

    said = Pool().chain("from", [partial(step, number) for number in range(5 * AT_ONCE)])
    assert said == " ".join(["from", *map(str, range(5 * AT_ONCE))])
    assert Pool().chain("from", [partial(step, 1)]) == "from 1"


def test_after_an_error_no_step_is_begun() -> None:
    begun = []

    def step(number: int, before: Callable[[], None]) -> None:
        begun.append(number)
        if number == 3:
            raise ValueError("no")
        time.sleep(0.02)
        before()

    with pytest.raises(ValueError, match="no"):
        Pool().chain(None, [partial(step, number) for number in range(20 * AT_ONCE)])
    assert len(begun) < 4 * AT_ONCE
    seen = len(begun)
    time.sleep(0.1)
    assert len(begun) == seen


def test_many_chains_at_once_need_no_more_memory_than_one() -> None:
    pool, lock, held, most = Pool(), threading.Lock(), [0], [0]

    def step(size: int, before: Callable[[], int]) -> int:
        with pool.buffer(size) as buffer:
            with lock:
                held[0] += size > SMALL
                most[0] = max(most[0], held[0])
            buffer[:1] = b"x"
            time.sleep(0.001)
            done = before() + len(buffer)
            with lock:
                held[0] -= size > SMALL
        return done

    def chain(pieces: int) -> None:
        assert pool.chain(0, [partial(step, PART)] * pieces + [partial(step, 5)]) == pieces * PART + 5

    threads = [threading.Thread(target=chain, args=(number % 4 * 10,)) for number in range(16)]
    threads += [threading.Thread(target=pool.chain, args=(0, [partial(step, PART)])) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert most[0] <= COMING
