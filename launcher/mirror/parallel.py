"""Many small transfers at once."""

import queue
import threading
from collections.abc import Callable, Collection
from typing import TypeVar

T = TypeVar("T")
THREADS = 16  # a store on a network answers one after some ms, and many at once


def each(work: Callable[[T], object], items: Collection[T]) -> None:
    """work(item) for all items, in no order; the first error ends it and is raised.

    The threads are daemons: a supervisor whose time is over must not wait for the store, and the threads
    of concurrent.futures are joined when the interpreter ends.
    """
    if len(items) < 2:
        for item in items:
            work(item)
        return
    todo: queue.SimpleQueue[T] = queue.SimpleQueue()
    errors: list[BaseException] = []
    for item in items:
        todo.put(item)

    def labour() -> None:
        while not errors:
            try:
                work(todo.get_nowait())
            except queue.Empty:
                return
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=labour, daemon=True) for _ in range(min(THREADS, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
