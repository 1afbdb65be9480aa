"""Weights from other projects into a file of ours, and detectors of ours into programs for other runtimes.

python -m detcore.convert SOURCE OUT.pth | OUT.onnx | OUT.pt2 [--recipe FILE] [--size WIDTHxHEIGHT]
"""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detcore.errors import DetcoreError, InputError
from detcore.export import canvas, save, trace, write
from detcore.loading import load_run, packed
from detcore.models import build_model
from detcore.recipe import read_unfrozen
from detcore.summary import read_size
from detcore.weights.fetch import locate
from detcore.weights.keys import matches
from detcore.weights.loading import fit, weights_of
from detcore.weights.reading import read_content, tensors_of

SUFFIXES = (".pth", ".onnx", ".pt2")


def convert(source: str, out: Path, recipe: Path | None = None, size: tuple[int, int] | None = None) -> str:
    """Writes `out`, of a kind that its suffix says, and tells what is in it. size: (width, height) of the
    images that a program is for. Raises InputError."""
    if out.suffix not in SUFFIXES:
        raise InputError(f"{out}: its name must end in one of {', '.join(SUFFIXES)}")
    path = Path(source) if Path(source).is_dir() else locate(source)
    if out.exists() and out.samefile(path):
        raise InputError(f"{out} is the source itself; choose another name")
    if recipe is not None and path.is_file() and (backbone := _backbone(path, recipe)) is not None:
        if out.suffix != ".pth":
            raise InputError(f"{source} has no head of a detector, so {out.suffix} has nothing to compute")
        _save(out, {"model": backbone.state_dict()})
        return f"{out}: a backbone, for `train.model.backbone.weights` of a recipe"
    loaded = load_run(path, recipe)
    if out.suffix == ".pth":
        _save(out, packed(loaded))
        return f"{out}: a detector of {len(loaded.names)} classes, with its recipe"
    width, height = size or canvas(loaded.cfg)
    worst = write(trace(loaded.model, (height, width)), loaded.model, (height, width), out)
    differences = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    return f"{out}: for images of {width}x{height}; largest difference to PyTorch: {differences}"


def _backbone(path: Path, recipe: Path) -> nn.Module | None:
    """The recipe's backbone with the weights in a file, if the file knows of nothing else."""
    content = read_content(path)
    if "train" in content:  # a whole detector, by its own word
        return None
    state = tensors_of(content, path)
    with torch.device("meta"):
        model = build_model(read_unfrozen(recipe).model, pretrained=False)
    here = matches(state, set(weights_of(model.backbone)))
    if here < matches(state, set(weights_of(model))) or not here:
        return None
    backbone = build_model(read_unfrozen(recipe).model, pretrained=False).backbone
    fit(backbone, str(path), state)
    return backbone


def _save(out: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    save(out, buffer.getvalue())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m detcore.convert", description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a run, a checkpoint, a file of weights, or a known name")
    parser.add_argument("out", type=Path, help="OUT.pth for detcore, OUT.onnx or OUT.pt2 for other runtimes")
    parser.add_argument("--recipe", type=Path, help="what the weights are for, if they do not say it")
    parser.add_argument("--size", metavar="WxH", help="of images for .onnx and .pt2 (the recipe's)")
    args = parser.parse_args(argv)
    try:
        print(convert(args.source, args.out, args.recipe, read_size(args.size) if args.size else None))
        return 0
    except DetcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"error: {error.filename or args.source}: {error.strerror}", file=sys.stderr)
        return InputError.exit_status


if __name__ == "__main__":
    sys.exit(main())
