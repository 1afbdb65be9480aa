"""Which images make up which step: a pure function of (seed, step), the same for any number of ranks.

The images of one epoch are a permutation drawn from (seed, epoch), the epochs follow one another without a
gap, and step s takes the next `batch` of them. With `wide` given, the order inside a window of WINDOW steps
is sorted by shape, so that all but one of its batches are of wide or of tall images only; the batches of a
window then come in an order drawn from (seed, window). Every epoch is still seen whole.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

WINDOW = 32

Sample = tuple[int, int]  # (epoch, index of the image); with the seed, all that its augmentation depends on


class Order:
    """images: how many there are. wide: (images,) bool, or None for no grouping."""

    def __init__(self, images: int, batch: int, seed: int, wide: NDArray[np.bool_] | None = None) -> None:
        self.images, self.batch, self.seed, self.wide = images, batch, seed, wide
        self._permutation = lru_cache(maxsize=4)(self._draw_permutation)
        self._window = lru_cache(maxsize=2)(self._draw_window)

    def step(self, step: int) -> list[Sample]:
        """The `batch` samples of this step, over all ranks."""
        if self.wide is None:
            return self._stream(step * self.batch, (step + 1) * self.batch)
        return self._window(step // WINDOW)[step % WINDOW]

    def share(self, step: int, rank: int, ranks: int) -> list[Sample]:
        """The samples of one rank: an equal part, next to one another, so of one shape where possible."""
        size = self.batch // ranks
        return self.step(step)[rank * size : (rank + 1) * size]

    def _stream(self, start: int, stop: int) -> list[Sample]:
        return [
            (place // self.images, int(self._permutation(place // self.images)[place % self.images]))
            for place in range(start, stop)
        ]

    def _draw_permutation(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, 1, epoch]).permutation(self.images)

    def _draw_window(self, window: int) -> list[list[Sample]]:
        assert self.wide is not None
        size = WINDOW * self.batch
        samples = self._stream(window * size, (window + 1) * size)
        samples.sort(key=lambda sample: bool(self.wide[sample[1]]))  # stable: shape first, then the stream
        batches = [samples[start : start + self.batch] for start in range(0, size, self.batch)]
        order = np.random.default_rng([self.seed, 2, window]).permutation(WINDOW)
        return [batches[place] for place in order]


def training_steps(
    order: Order, start: int, stop: int, rank: int, ranks: int, parts: int
) -> Iterator[list[Sample]]:
    """One rank's samples of steps `start` to `stop`, each step in `parts` equal parts."""
    for step in range(start, stop):
        share = order.share(step, rank, ranks)
        size = len(share) // parts
        for part in range(parts):
            yield share[part * size : (part + 1) * size]
