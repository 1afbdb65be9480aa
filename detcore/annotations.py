"""What a COCO annotation file must hold; mistakes are named with the entry that they are in.

Without numpy, so that a check before the start can read one, too.
"""

import json
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from detcore.errors import WRONG_PATH, InputError

LISTS = ("categories", "images", "annotations")

Box = tuple[float, float, float, float]


class Picture(NamedTuple):
    """One image: its id, file name, width, height."""

    id: int
    file: str
    width: int
    height: int


class Entry(NamedTuple):
    """Where in a file: one of its lists, and a place in it, from 0."""

    list: str
    number: int

    def __str__(self) -> str:
        return f"{self.list}[{self.number}]"


class Annotations(NamedTuple):
    """categories: id -> name, ascending. images: by id, ascending. objects: image id -> (category id, box as
    x1 y1 x2 y2 in pixels), without crowds and boxes that have no area, as in detectron2."""

    categories: dict[int, str]
    images: dict[int, Picture]
    objects: dict[int, list[tuple[int, Box]]]

    def with_objects(self) -> dict[int, Picture]:
        return {id_: image for id_, image in self.images.items() if self.objects[id_]}


def read_json(path: Path) -> dict[str, Any]:
    """The whole file, checked for the three lists that every COCO file has.

    Raises InputError; OSError if the disk is to blame and not the path.
    """
    try:
        content = json.loads(path.read_bytes())
    except WRONG_PATH as error:
        raise InputError(f"annotation file {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a COCO annotation file: it is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a COCO annotation file: it does not hold an object")
    for key in LISTS:
        if not isinstance(content.get(key), list):
            raise InputError(f"{path} is not a COCO annotation file: it has no list `{key}`")
    return content


def read_annotations(path: Path) -> Annotations:
    """Every entry, looked at. Raises InputError."""
    return look(read_json(path), _refusal(path))


def read_categories(path: Path) -> dict[int, str]:
    """Ids and names, ascending, of a file whose images and annotations do not matter. Raises InputError."""
    return look(read_json(path) | {"images": [], "annotations": []}, _refusal(path)).categories


def _refusal(path: Path) -> Callable[[Entry, str], None]:
    def refuse(entry: Entry, why: str) -> None:
        raise InputError(f"{path} is not a COCO annotation file: {entry} {why}")

    return refuse


def look(content: dict[str, Any], complain: Callable[[Entry, str], None]) -> Annotations:
    """What the entries of a file say. `complain` is told of those that are wrong, and why; they are left out.
    Of entries with one id the last one counts."""
    read = Annotations({}, {}, {})
    for key, take in zip(LISTS, (_category, _image, _object), strict=True):
        for number, one in enumerate(content[key]):
            try:
                take(one, read)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                complain(Entry(key, number), _why(error))
    categories, images = (dict(sorted(found.items())) for found in (read.categories, read.images))
    return Annotations(categories, images, read.objects)


class _UnknownError(ValueError):
    """An entry names what is not there."""


def _category(one: Any, read: Annotations) -> None:
    read.categories[int(one["id"])] = str(one["name"])


def _image(one: Any, read: Annotations) -> None:
    image = Picture(int(one["id"]), str(one["file_name"]), int(one["width"]), int(one["height"]))
    read.images[image.id], read.objects[image.id] = image, []


def _object(one: Any, read: Annotations) -> None:
    x, y, w, h = map(float, one["bbox"])
    if not isfinite(x + y + w + h):
        raise ValueError("its `bbox` is not finite")
    image, category = one["image_id"], one["category_id"]
    if image not in read.images:
        raise _UnknownError(f"names image {image!r}, which the file does not have")
    if category not in read.categories:
        raise _UnknownError(f"names category {category!r}, which the file does not have")
    if not one.get("iscrowd", 0) and w > 0 and h > 0:
        read.objects[image].append((int(category), (x, y, x + w, y + h)))


def _why(error: Exception) -> str:
    if isinstance(error, _UnknownError):
        return str(error)
    if isinstance(error, KeyError):
        return f"has no `{error.args[0]}`"
    return f"is not what it must be ({error})"
