"""Detectors as programs for other runtimes: torch.export's and ONNX, up to scored boxes; NMS is left out.

Inputs: `images` (N, 3, H, W) uint8 RGB of one size, and `sizes` (N, 2) int64, the true (h, w) of each: beyond
them an image is padding. Outputs: `boxes`, `scores` and, of CornerNet, `labels`, as in
`detcore.ops.targets.Candidates`. N is free.
"""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from detcore.config import Train
from detcore.data.loader import STRIDE
from detcore.errors import InputError
from detcore.rundir import write_whole

NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3  # of scores, and of boxes in the larger side of the image


class Named(nn.Module):
    """A detector whose forward gives named tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        found = self.model.scored(images, sizes)._asdict()
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def canvas(cfg: Train) -> tuple[int, int]:
    """(width, height) of the largest lying image as the recipe looks at it, in multiples of 32. Raises
    InputError if the recipe leaves images as large as they are."""
    test, augment = cfg.data.test, cfg.data.augment
    if square := test.square or (augment.square if test.short is None else None):
        return square, square
    if test.short is None:
        raise InputError("the recipe has no size for images; say one: --size WIDTHxHEIGHT")
    width, height = (-(-side // STRIDE) * STRIDE for side in (test.max, test.short))
    return width, height


def trace(model: nn.Module, size: tuple[int, int]) -> torch.export.ExportedProgram:
    """What `model` computes of images of `size` (height, width). Raises InputError for a size that it cannot
    take."""
    divisor = getattr(model.backbone, "divisor", 1)  # of hourglasses
    if any((side + 1) % divisor > 1 for side in size):
        raise InputError(f"height and width must be multiples of {divisor}, or a pixel less")
    batch = torch.export.Dim("batch", min=1)
    free = {"images": {0: batch}, "sizes": {0: batch}}
    with _quiet():
        return torch.export.export(Named(model).eval(), _noise(2, size), dynamic_shapes=free)


def write(
    program: torch.export.ExportedProgram, model: nn.Module, size: tuple[int, int], path: Path
) -> dict[str, float]:
    """Writes what `trace` found in `model` to `path`, whose suffix is .pt2 or .onnx, and compares what it
    computes with the model, on noise in another batch size than it was traced with.

    Returns the largest difference of each output (see `_differences`). Raises InputError if that
    is more than TOLERANCE, or something that is needed is not installed; nothing is written then.
    """
    inputs = _noise(3, size)
    with _quiet(), torch.no_grad():
        content, run = (_onnx if path.suffix == ".onnx" else _pt2)(program)
        wanted, got = Named(model).eval()(*inputs), run(*inputs)
    worst = _differences(wanted, got, max(size))
    wrong = [f"{name} by {value:.2g}" for name, value in worst.items() if not value <= TOLERANCE]
    if wrong:
        raise InputError(f"{path}: what was exported computes something else: {', '.join(wrong)}")
    save(path, content)
    return worst


def save(path: Path, content: bytes) -> None:
    """Writes all of a file or nothing. Raises InputError."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


Run = Callable[[Tensor, Tensor], dict[str, Tensor]]


def _pt2(program: torch.export.ExportedProgram) -> tuple[bytes, Run]:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return buffer.getvalue(), torch.export.load(buffer).module()


def _onnx(program: torch.export.ExportedProgram) -> tuple[bytes, Run]:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"ONNX needs {', '.join(missing)}: pip install 'launch-detcore[export]'")
    import onnxruntime

    cummax = torch.ops.aten.cummax.default
    graphs = (m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule))
    if any(node.target is cummax for graph in graphs for node in graph.nodes):
        program = program.run_decompositions({cummax: _cummax})
    names = list(program.call_spec.out_spec.context)
    exported = torch.onnx.export(program, dynamo=True, output_names=names, verbose=False)
    content = exported.model_proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        values = session.run(names, {"images": images.numpy(), "sizes": sizes.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return content, run


def _noise(count: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)
    return images, torch.tensor([size] * count)


def _differences(wanted: dict[str, Tensor], got: dict[str, Tensor], side: int) -> dict[str, float]:
    """The largest difference of each output, of boxes in `side`.

    CornerNet's pairs are sorted, and rounding may put two of equal score the other way round, or one in the
    other's place at the end of the list. So each is compared with the one that is most like it, and one in a
    hundred may have none.
    """
    if "labels" not in wanted:
        worst = {name: float((got[name] - value).abs().max()) for name, value in wanted.items()}
        return worst | {"boxes": worst["boxes"] / side}
    rows = [
        torch.cat([one["boxes"] / side, one["scores"][..., None], one["labels"][..., None]], -1)
        for one in (wanted, got)
    ]
    nearest = torch.cdist(*rows, p=torch.inf).amin(dim=2)[wanted["scores"] >= 0]
    return {"pairs": float(nearest.quantile(0.99)) if len(nearest) else 0.0}


def _cummax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """torch.cummax, which ONNX does not have, without its indices: the largest of the last 2, 4, 8, ..."""
    length, reach = x.shape[dim], 1
    while reach < length:
        before = x.narrow(dim, 0, length - reach)
        later = torch.maximum(x.narrow(dim, reach, length - reach), before)
        x = torch.cat([x.narrow(dim, 0, reach), later], dim)
        reach *= 2
    return x, torch.zeros_like(x, dtype=torch.int64)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks about themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
