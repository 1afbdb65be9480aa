"""A COCO-format annotation file as compact arrays: nothing per box is a Python object, so that loader
processes share it without copying."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from detcore.annotations import read_annotations
from detcore.errors import InputError


@dataclass(frozen=True)
class Coco:
    """Images and boxes of one split; n images, m boxes.

    files       n file names under `folder`
    ids, sizes  (n,) image ids and (n, 2) widths and heights
    boxes       (m, 4) float32 x1 y1 x2 y2 in pixels; those of image i are rows offsets[i]:offsets[i + 1]
    labels      (m,) int64, indices into `categories`
    categories  original category ids, ascending; `names` beside them
    """

    folder: Path
    annotations: Path
    files: list[str]
    ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    offsets: NDArray[np.int64]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    categories: list[int]
    names: list[str]

    def __len__(self) -> int:
        return len(self.files)

    def objects(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Boxes and labels of one image."""
        rows = slice(self.offsets[index], self.offsets[index + 1])
        return self.boxes[rows], self.labels[rows]


def read_coco(folder: Path, annotations: Path, training: bool) -> Coco:
    """Read a split. As in detectron2, in training images without a box are left out; otherwise every image
    stays.

    Raises InputError if the file is not what it must be.
    """
    read = read_annotations(annotations)
    images = read.with_objects() if training else read.images
    if not images:
        raise InputError(f"{annotations} has no image{' with an object' if training else ''}")
    labels = {id_: label for label, id_ in enumerate(read.categories)}
    rows = [row for id_ in images for row in read.objects[id_]]
    counts = [len(read.objects[id_]) for id_ in images]
    return Coco(
        folder=folder,
        annotations=annotations,
        files=[image.file for image in images.values()],
        ids=np.array(list(images), np.int64),
        sizes=np.array([(image.width, image.height) for image in images.values()], np.int64).reshape(-1, 2),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=np.array([box for _, box in rows], np.float32).reshape(-1, 4),
        labels=np.array([labels[category] for category, _ in rows], np.int64),
        categories=list(read.categories),
        names=list(read.categories.values()),
    )
