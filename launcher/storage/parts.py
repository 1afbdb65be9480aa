"""Big objects: how they are cut into parts, and the threads that move parts side by side."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Semaphore
from typing import NamedTuple, TypeVar

T = TypeVar("T")

PART = 16 << 20  # bytes; what is bigger goes, and comes, in parts
MIN_PART = 5 << 20  # S3's own limits: of each part but the last,
MAX_PARTS = 10_000  # of their number,
COPY = 512 << 20  # S3 takes 5 GiB in one request, which is long to wait for an answer
SMALL = 1 << 20
AT_ONCE = 4  # parts that move side by side
SENT, COMING = AT_ONCE, 2 * AT_ONCE  # bodies above SMALL: one that is sent costs more than its own size


class Span(NamedTuple):
    start: int
    size: int


def spans(start: int, end: int, longest: int = PART, parts: int = MAX_PARTS) -> list[Span]:
    """What lies between `start` and `end`, in pieces as long as `longest`, or longer where those would be
    more than `parts`; at least one."""
    step = max(longest, -(-(end - start) // parts), 1)
    return [Span(at, min(step, end - at)) for at in range(start, end, step)] or [Span(start, 0)]


def even_spans(size: int, longest: int) -> list[Span]:
    """Pieces of much the same length, so that none is too small for a part."""
    return spans(0, size, -(-size // -(-size // longest)))


class Pool:
    """A store's threads for parts, started when they are first needed, and the room for bodies in memory."""

    def __init__(self) -> None:
        self._room, self._pieces = Semaphore(SENT), Semaphore(COMING)
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="parts")
        self._spare: list[bytearray] = []  # new memory costs as much as to fill it

    def room(self, size: int) -> AbstractContextManager[object]:
        """Held while a body of `size` is in memory."""
        return self._room if size > SMALL else nullcontext()

    @contextmanager
    def buffer(self, size: int) -> Iterator[memoryview]:
        """Memory for a part that comes."""
        if size <= SMALL:
            yield memoryview(bytearray(size))
            return
        with self._pieces:
            try:
                buffer = self._spare.pop()
            except IndexError:
                buffer = bytearray()
            if len(buffer) < size:
                buffer = bytearray(size)
            try:
                yield memoryview(buffer)[:size]
            finally:
                self._spare.append(buffer)

    def in_order(self, calls: Sequence[Callable[[], T]]) -> Iterator[T]:
        """The results of `calls`, made side by side. After an error none is begun, and none still goes on."""
        if len(calls) == 1:
            yield calls[0]()
            return
        futures: list[Future[T]] = []
        with _ended(futures):
            futures += (self._threads.submit(call) for call in calls)
            for future in futures:
                yield future.result()

    def chain(self, start: T, steps: Sequence[Callable[[Callable[[], T]], T]]) -> T:
        """What the last of `steps` returns. They are made side by side, as above, and each is given what
        waits for the result of the one before: who waits does so for one that has its thread already."""
        futures: list[Future[T]] = []
        try:
            if len(steps) == 1:
                return steps[0](lambda: start)
            with _ended(futures):
                for step in steps:
                    futures.append(
                        self._threads.submit(step, futures[-1].result if futures else lambda: start)
                    )
                return [future.result() for future in futures][-1]
        finally:
            self._spare.clear()


@contextmanager
def _ended(futures: list[Future[T]]) -> Iterator[None]:
    """Afterwards none of them begins, and none still goes on."""
    try:
        yield
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
