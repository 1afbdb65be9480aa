"""From samples to padded batches, in loader processes that outlive signals meant for others."""

import ctypes
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detcore.config import Augment, Resize
from detcore.data.coco import Coco
from detcore.data.order import Sample
from detcore.data.transforms import Boxes, Labels, Pixels, augment, read_image, resize
from detcore.errors import InputError
from detcore.ops.targets import Targets

STRIDE = 32  # batches are padded to multiples of it; see `padded`
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}


class Batch(NamedTuple):
    """images (N, 3, H, W) uint8 RGB, in memory (N, H, W, 3), zero beyond the true sizes (N, 2) (h, w);
    index (N,): which images of the data set."""

    images: Tensor
    sizes: Tensor
    targets: Targets
    index: Tensor


Shape = tuple[int, int]
Item = tuple[Pixels, Boxes, Labels, int]


class TrainingSet(Dataset[Item | InputError]):
    """Sample (epoch, index) -> augmented image; the draws depend on (seed, epoch, index) alone."""

    def __init__(self, coco: Coco, how: Augment, seed: int) -> None:
        self.coco, self.how, self.seed = coco, how, seed

    def __getitem__(self, sample: Sample) -> Item | InputError:
        epoch, index = sample
        rng = np.random.default_rng([self.seed, 3, epoch, index])
        try:
            image = read_image(self.coco.folder / self.coco.files[index], tuple(self.coco.sizes[index]))
        except InputError as error:
            return error
        return *augment(image, *self.coco.objects(index), self.how, rng), index


class EvaluationSet(Dataset[Item | InputError]):
    """Index -> resized image, with its boxes in the resized image's pixels."""

    def __init__(self, coco: Coco, how: Resize) -> None:
        self.coco, self.how = coco, how

    def __getitem__(self, index: int) -> Item | InputError:
        boxes, labels = self.coco.objects(index)
        try:
            image = read_image(self.coco.folder / self.coco.files[index], tuple(self.coco.sizes[index]))
        except InputError as error:
            return error
        image, boxes = resize(image, boxes, self.how)
        return np.asarray(image), boxes, labels, index


def padded(sizes: Sequence[Shape]) -> Shape:
    """(height, width) of the batch that images of these are in: multiples of STRIDE, but for squares of one
    size, as an SSD is made for exactly that."""
    height, width = (max(side) for side in zip(*sizes, strict=True))
    if height == width and len(set(sizes)) == 1:
        return height, width
    return -(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE


def collate(items: list[Item | InputError]) -> Batch | InputError:
    """One padded batch. An error travels as a value: raised in a loader process it would come out as a
    traceback."""
    good: list[Item] = []
    for item in items:
        if isinstance(item, InputError):
            return item
        good.append(item)
    sizes = [pixels.shape[:2] for pixels, *_ in good]
    height, width = padded(sizes)
    canvas = np.zeros((len(good), height, width, 3), np.uint8)
    objects = max(1, *(len(labels) for _, _, labels, _ in good))
    targets = Targets(torch.zeros(len(good), objects, 4), torch.full((len(good), objects), -1))
    for row, (pixels, boxes, labels, _) in enumerate(good):
        canvas[row, : pixels.shape[0], : pixels.shape[1]] = pixels
        targets.boxes[row, : len(boxes)] = torch.from_numpy(boxes)
        targets.labels[row, : len(labels)] = torch.from_numpy(labels)
    index = torch.tensor([item[3] for item in good])
    return Batch(torch.from_numpy(canvas).permute(0, 3, 1, 2), torch.tensor(sizes), targets, index)


def batches(
    dataset: Dataset[Item | InputError],
    samples: Iterable[list[Sample]] | Iterable[list[int]],
    workers: int,
    pin: bool,
) -> Iterator[Batch]:
    """Batches in the order of `samples`, whatever the number of workers. Raises InputError for an image
    that cannot be read."""
    loader: DataLoader[Batch | InputError] = DataLoader(
        dataset,
        batch_sampler=samples,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_stay if workers else None,
    )
    with _held():
        iterator = iter(loader)  # here and now: the processes begin to work
    return _checked(iterator)


def _checked(iterator: Iterator[Batch | InputError]) -> Iterator[Batch]:
    for batch in iterator:
        if isinstance(batch, InputError):
            raise batch
        yield batch


@contextmanager
def _held() -> Iterator[None]:
    """Stop signals are blocked in the processes that are started here, from their first instruction on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stay(worker: int) -> None:
    """A loader process lives exactly as long as its rank: signals to the whole group are the rank's to
    handle, the rank's own one ends the process, and so does the kernel when the rank is gone."""
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG, prctl(2)
    Thread(target=_leave_when_the_rank_says_so, daemon=True).start()


def _leave_when_the_rank_says_so() -> None:
    # Without it a rank that fails with its loader still at work would wait for it at exit, for ever.
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)
