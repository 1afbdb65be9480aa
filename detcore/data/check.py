"""A data set looked through before anybody trains on it: its annotation file, its images, its histograms.

python -m detcore.data.check ANNOTATIONS IMAGES [--decode] [--tensorboard DIR]
"""

import argparse
import sys
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from detcore.annotations import LISTS, Annotations, Entry, Picture, look, read_json
from detcore.board import Board
from detcore.data.transforms import read_image
from detcore.draw import bars
from detcore.errors import DetcoreError, InputError, listed

FIRST = 5  # findings of a kind that are named
SLACK = 0.5  # pixels that a box may reach out of its image: files round
SMALL, LARGE = 32, 96  # pixels, square roots of COCO's bounds on areas
SIDES = (0, 8, 16, 32, 64, 96, 128, 256, 512)
THREADS, SHARE = 16, 64  # readers, and files that one of them takes at a time
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # in the last bytes of a whole file
TAIL, ORIENTATION = 1024, 0x0112  # a thumbnail has an end of its own, far before
TURNED = {5, 6, 7, 8}  # EXIF orientations that swap width and height

Findings = dict[str, list[str]]


class Look(NamedTuple):
    """What a file says, and what is wrong, by kind, in words."""

    read: Annotations
    findings: Findings


def look_through(content: dict[str, Any]) -> Look:
    """The content of an annotation file, without its images."""
    findings: Findings = {}
    bad: set[Entry] = set()

    def complain(entry: Entry, why: str) -> None:
        bad.add(entry)
        kind = "name what is not in the file" if why.startswith("names ") else "are not what they must be"
        findings.setdefault(f"entries {kind}", []).append(f"{entry} {why}")

    read = look(content, complain)
    for key in LISTS:
        good = [one for number, one in enumerate(content[key]) if Entry(key, number) not in bad]
        findings[f"ids of {key} are there more than once"] = _twice(one["id"] for one in good if "id" in one)
    findings["names of categories are there more than once"] = _twice(read.categories.values())
    outside: list[str] = []
    flat: list[str] = []
    for number, one in enumerate(content["annotations"]):
        if Entry("annotations", number) in bad:
            continue
        x, y, w, h = map(float, one["bbox"])
        image = read.images[one["image_id"]]
        where = f"annotations[{number}], image {image.id} ({image.file}): {x:g} {y:g} {w:g} {h:g}"
        if w <= 0 or h <= 0:
            flat.append(where)
        elif min(x, y) < -SLACK or x + w > image.width + SLACK or y + h > image.height + SLACK:
            outside.append(f"{where} in {image.width}x{image.height}")
    findings["boxes (x y width height) have no area"] = flat
    findings["boxes (x y width height) reach out of their image"] = outside
    used = {category for objects in read.objects.values() for category, _ in objects}
    findings["classes have no object"] = [
        f"{name} (id {id_})" for id_, name in read.categories.items() if id_ not in used
    ]
    return Look(read, findings)


def _twice(values: Iterable[Any]) -> list[str]:
    return [f"{value!r}, {count} times" for value, count in Counter(map(str, values)).items() if count > 1]


def image_finding(path: Path, size: tuple[int, int], decode: bool) -> tuple[str, str] | None:
    """What is wrong with an image, its kind and words: looked at by its header and its end, or decoded where
    these leave doubts, and with `decode` always."""
    try:
        with Image.open(path) as image:
            actual, kind = image.size, image.format
            # a PNG without this would be decoded to look for it
            if kind != "PNG" or "exif" in image.info:
                turned = image.getexif().get(ORIENTATION) in TURNED
                actual = actual[::-1] if turned else actual
        if decode or kind not in ENDS or ENDS[kind] not in _tail(path):
            read_image(path)
    except FileNotFoundError:
        return "images are missing", str(path)
    except DetcoreError as error:
        return "images cannot be read", str(error)
    except Exception as error:  # PIL names a dozen kinds
        return "images cannot be read", f"image {path} cannot be read: {error}"
    if actual != size:
        return (
            "images have another size than their annotations say",
            f"{path}: {actual[0]}x{actual[1]}, not {size[0]}x{size[1]}",
        )
    return None


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        return file.read()


def image_findings(
    folder: Path, images: Sequence[Picture], decode: bool, progress: Callable[[int], None]
) -> Findings:
    """Of all images; `progress` is told how many have been looked at."""

    def some(share: Sequence[Picture]) -> list[tuple[str, str] | None]:
        return [image_finding(folder / one.file, (one.width, one.height), decode) for one in share]

    findings: Findings = {}
    shares = [images[start : start + SHARE] for start in range(0, len(images), SHARE)]
    with ThreadPoolExecutor(THREADS) as pool:
        for number, answers in enumerate(pool.map(some, shares), 1):
            for kind, words in filter(None, answers):
                findings.setdefault(kind, []).append(words)
            progress(min(number * SHARE, len(images)))
    return findings


def sides(read: Annotations) -> list[int]:
    """How many objects are between each of SIDES and the next, by the square root of their box's area."""
    counts = [0] * len(SIDES)
    for objects in read.objects.values():
        for _, (x1, y1, x2, y2) in objects:
            counts[bisect_right(SIDES, ((x2 - x1) * (y2 - y1)) ** 0.5) - 1] += 1
    return counts


def classes(read: Annotations) -> Counter[str]:
    """Objects of each class, most first."""
    own = Counter(category for objects in read.objects.values() for category, _ in objects)
    return Counter({read.categories[id_]: count for id_, count in own.most_common()})


def histograms(read: Annotations) -> dict[str, Image.Image]:
    """Pictures by name."""
    ranges = [f"{low} to {high}" for low, high in pairwise(SIDES)] + [f"from {SIDES[-1]}"]
    images = Counter(f"{image.width}x{image.height}" for image in read.images.values()).most_common(40)
    without = {name: 0 for name in read.categories.values()}
    return {
        "data/classes": bars("objects of each class", without | classes(read)),
        "data/objects": bars(
            "objects by the root of their area, pixels", dict(zip(ranges, sides(read), strict=True))
        ),
        "data/images": bars("images of each size, pixels", dict(images)),
    }


def overview(read: Annotations) -> str:
    """What is there, in three lines."""
    own, by_side = classes(read), dict(zip(SIDES, sides(read), strict=True))
    total = sum(own.values())
    empty = sum(not objects for objects in read.objects.values())
    small = sum(count for side, count in by_side.items() if side < SMALL)
    large = sum(count for side, count in by_side.items() if side >= LARGE)
    shares = [round(100 * count / max(1, total)) for count in (small, total - small - large, large)]
    named = [f"{name} {count:,}" for name, count in own.items()]
    return (
        f"{len(read.images):,} images, {empty:,} of them without objects; {total:,} objects of "
        f"{len(read.categories)} classes\n"
        f"small (less than {SMALL}x{SMALL} pixels) {shares[0]} %, medium {shares[1]} %, "
        f"large (from {LARGE}x{LARGE}) {shares[2]} %\n{listed(named, 10)}"
    )


def report(findings: Findings) -> str:
    """Each kind with its number, and the first of it."""
    lines = []
    for kind, found in findings.items():
        if found:
            rest = [f"    and {len(found) - FIRST:,} more"] if len(found) > FIRST else []
            lines += [f"{len(found):,} {kind}:", *(f"    {one}" for one in found[:FIRST]), *rest]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m detcore.data.check", description=__doc__.split("\n")[0])
    parser.add_argument("annotations", type=Path, help="COCO-format JSON file")
    parser.add_argument("images", type=Path, help="folder of its images")
    parser.add_argument(
        "--decode", action="store_true", help="read images to the end: finds damage inside, too"
    )
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="folder for histograms")
    args = parser.parse_args(argv)
    try:
        if not args.images.is_dir():
            raise InputError(f"the folder of images {args.images} does not exist")
        read, findings = look_through(read_json(args.annotations))
        print(overview(read), flush=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, of files that are told of below or that can be used
            images = list(read.images.values())
            findings |= image_findings(args.images, images, args.decode, counter(len(images)))
        if args.tensorboard:
            args.tensorboard.mkdir(parents=True, exist_ok=True)
            board = Board(args.tensorboard, fence=0, resumed=-1)
            for tag, picture in histograms(read).items():
                board.picture(0, tag, picture)
            board.close()
            print(f"histograms in {args.tensorboard}; TensorBoard's page of images shows them")
        wrong = any(findings.values())
        print(report(findings) if wrong else "nothing is wrong")
        return int(wrong)
    except DetcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.exit_status


def counter(of: int) -> Callable[[int], None]:
    """A line that counts images where somebody watches."""

    def show(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done:,} of {of:,} images", end="\n" if done == of else "", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
