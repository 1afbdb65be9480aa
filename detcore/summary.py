"""A recipe's detector layer by layer: shapes, parameters, FLOPs and memory; and its graph for TensorBoard.

python -m detcore.summary RECIPE [--size WIDTHxHEIGHT] [--tensorboard DIR]
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from detcore.anatomy import Anatomy, Cost, dissect
from detcore.board import Board
from detcore.config import Data, Resize
from detcore.data.loader import padded
from detcore.data.transforms import resized
from detcore.errors import DetcoreError, InputError
from detcore.recipe import read_unfrozen

PHOTOGRAPH = (640, 480)  # what most of COCO's images are


def size_of(data: Data) -> tuple[int, int]:
    """(width, height) that a photograph of 640x480 has in training."""
    how = data.augment
    return resized(PHOTOGRAPH, Resize(short=how.short[-1], max=how.max, square=how.square))


def read_size(text: str) -> tuple[int, int]:
    """`1333x800` -> (1333, 800). Raises InputError."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match or not all(map(int, match.groups())):
        raise InputError(f"--size {text}: must be WIDTHxHEIGHT in pixels, such as 1333x800")
    return int(match[1]), int(match[2])


def shown(shapes: Sequence[tuple[int, ...]]) -> str:
    """`256x100x136, 50x68`: maps after the first without their channels, if these are the same."""
    words = []
    for number, shape in enumerate(shapes):
        same = number and len(shape) == 3 and shape[:1] == shapes[number - 1][:1]
        words.append("x".join(map(str, shape[1:] if same else shape)) or "1")
    return ", ".join(words)


def row(name: str, cost: Cost) -> tuple[str, ...]:
    numbers = (f"{cost.parameters:,}", f"{cost.flops / 1e9:.3f}", f"{cost.kept / 2**20:.1f}")
    return (name, cost.kind, shown(cost.shapes), *numbers)


def table(heading: str, rows: Iterable[tuple[str, ...]]) -> str:
    """Columns, the last three of numbers."""
    lines = [(heading, "", "output", "parameters", "GFLOPs", "MiB kept"), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        aligned = [
            cell.rjust(width) if place > 2 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, lines))


def total(anatomy: Anatomy) -> Cost:
    costs = anatomy.parts.values()
    return Cost(
        "",
        parameters=sum(one.parameters for one in costs),
        flops=sum(one.flops for one in costs),
        kept=sum(one.kept for one in costs),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m detcore.summary", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path, help="a recipe; one that extends others is read by `launch`")
    parser.add_argument("--size", metavar="WxH", help="of the image (what 640x480 becomes in training)")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="folder for the graph")
    args = parser.parse_args(argv)
    try:
        cfg = read_unfrozen(args.recipe)
        size = read_size(args.size) if args.size else size_of(cfg.data)
        height, width = padded([size[::-1]])
        anatomy = dissect(cfg, height, width)
        print(table("layer", [row(name, cost) for name, cost in anatomy.layers.items()]))
        print()
        parts = [row(name, cost) for name, cost in anatomy.parts.items()]
        print(table("part", [*parts, row("total", total(anatomy))]))
        precision = "float32" if cfg.amp == "none" else cfg.amp
        print(
            f"\nOne image of {size[0]}x{size[1]}, padded to {width}x{height}, in training, {precision}. "
            "FLOPs: additions and multiplications of convolutions and matrix products; papers often count "
            "a pair as one. "
            "Kept is what stays in memory for the backward pass."
        )
        if args.tensorboard:
            args.tensorboard.mkdir(parents=True, exist_ok=True)
            board = Board(args.tensorboard, fence=0, resumed=-1)
            board.graph(anatomy.operations)
            board.close()
            if board.broken:
                return 1
            print(
                f"{len(anatomy.operations)} operations in {args.tensorboard}; its page of graphs shows them"
            )
        return 0
    except DetcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"error: {args.tensorboard}: {error.strerror}", file=sys.stderr)
        return InputError.exit_status


if __name__ == "__main__":
    sys.exit(main())
