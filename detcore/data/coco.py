"""A COCO-format annotation file as compact arrays: nothing per box is a Python object, so that loader
processes share it without copying."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def read_json(annotations: Path) -> dict[str, Any]:
    """The whole file, checked for what every COCO file has. Raises InputError."""
    try:
        content = json.loads(annotations.read_bytes())
        if not isinstance(content, dict):
            raise TypeError("it does not hold an object")
        for key in ("images", "annotations", "categories"):
            if not isinstance(content.get(key), list):
                raise TypeError(f"it has no list `{key}`")
    except OSError as error:
        raise InputError(f"annotation file {annotations} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{annotations} is not a COCO annotation file: {error}") from None
    return content


def read_coco(folder: Path, annotations: Path, training: bool) -> Coco:
    """Read a split. As in detectron2, in training crowds and boxes without area are left out, and so are
    images that then have no box; otherwise every image stays.

    Raises InputError if the file is not what it must be.
    """
    content = read_json(annotations)
    try:
        categories = sorted({int(one["id"]): str(one["name"]) for one in content["categories"]}.items())
        labels = {id_: label for label, (id_, _) in enumerate(categories)}
        objects: dict[int, list[tuple[int, list[float]]]] = {int(one["id"]): [] for one in content["images"]}
        for one in content["annotations"]:
            x, y, w, h = map(float, one["bbox"])
            if not one.get("iscrowd", 0) and w > 0 and h > 0:
                box = [x, y, x + w, y + h]
                objects[int(one["image_id"])].append((labels[int(one["category_id"])], box))
        images = [one for one in content["images"] if not training or objects[int(one["id"])]]
        images.sort(key=lambda one: int(one["id"]))
        ids = np.array([int(one["id"]) for one in images], np.int64)
        sizes = np.array([(int(one["width"]), int(one["height"])) for one in images], np.int64)
        files = [str(one["file_name"]) for one in images]
    except (KeyError, TypeError, ValueError) as error:
        what = f"no entry for {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{annotations} is not a COCO annotation file: {what}") from None
    if not images:
        raise InputError(f"{annotations} has no image{' with an object' if training else ''}")

    rows = [row for image in ids for row in objects[int(image)]]
    counts = [len(objects[int(image)]) for image in ids]
    return Coco(
        folder=folder,
        annotations=annotations,
        files=files,
        ids=ids,
        sizes=sizes.reshape(-1, 2),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=np.array([box for _, box in rows], np.float32).reshape(-1, 4),
        labels=np.array([label for label, _ in rows], np.int64),
        categories=[id_ for id_, _ in categories],
        names=[name for _, name in categories],
    )
