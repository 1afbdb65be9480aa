"""What a rank trains on: its share of each step's images, from loader processes to the device."""

import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from detcore.config import Train
from detcore.data.coco import Coco
from detcore.data.loader import Batch, TrainingSet, batches
from detcore.data.order import Order, training_steps
from detcore.distributed import World
from detcore.ops.targets import Targets

REMEMBERED = 4  # steps; a loss is heard of up to two steps later


class Inputs(NamedTuple):
    """What a detector trains on, on the device: images (N, 3, H, W) uint8, true sizes (N, 2), targets."""

    images: Tensor
    sizes: Tensor
    targets: Targets


class Feed:
    """The parts of each step after step `done`; loader processes begin to work at once.

    waited: seconds that training has waited for them.
    """

    def __init__(self, cfg: Train, coco: Coco, world: World, done: int) -> None:
        data, self.parts = cfg.data, cfg.schedule.accumulate
        self.device, self.channels_last = world.device, cfg.channels_last
        self.waited = 0.0
        wide = coco.sizes[:, 0] > coco.sizes[:, 1] if data.group_by_aspect else None
        order = Order(len(coco), data.batch, cfg.seed, wide)
        samples = training_steps(order, done, cfg.schedule.iterations, world.rank, world.size, self.parts)
        dataset = TrainingSet(coco, data.augment, cfg.seed)
        self._batches = batches(dataset, samples, data.workers, pin=world.device.type == "cuda")
        self._ids = coco.ids.tolist()
        self._recent: deque[tuple[int, list[int]]] = deque(maxlen=REMEMBERED)

    def step(self, step: int) -> Iterator[Inputs]:
        """The parts of `step`, which must be the next one, each loaded when it is asked for."""
        images: list[int] = []
        self._recent.append((step, images))
        for _ in range(self.parts):
            began = time.perf_counter()
            batch = next(self._batches)
            self.waited += time.perf_counter() - began
            images += batch.index.tolist()
            yield self._on_device(batch)

    def image_ids(self, step: int) -> list[int]:
        """The data set's ids of the images of a recent step."""
        return [self._ids[index] for number, images in self._recent if number == step for index in images]

    def _on_device(self, batch: Batch) -> Inputs:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, non_blocking=True)

        images = move(batch.images)  # (N, H, W, 3) in memory, which is what channels_last means
        if not self.channels_last:
            images = images.contiguous()
        return Inputs(images, move(batch.sizes), batch.targets.map(move))
