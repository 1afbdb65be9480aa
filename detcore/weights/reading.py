"""Files of weights to named tensors, without running anything that is in them."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detcore.weights import WeightsError
from detcore.weights.tfjs import read_tfjs

# Where other projects put the state dict inside their checkpoints.
WRAPPERS = ("model", "state_dict", "model_state_dict", "blobs")

# All that rebuilding an array of numbers takes, under numpy 1's names and numpy 2's.
ARRAY_PARTS = {
    (f"numpy{core}", name)
    for core, name in (
        ("", "ndarray"),
        ("", "dtype"),
        (".core.multiarray", "_reconstruct"),
        ("._core.multiarray", "_reconstruct"),
        (".core.numeric", "_frombuffer"),
        ("._core.numeric", "_frombuffer"),
    )
} | {("_codecs", "encode"), ("collections", "OrderedDict")}


class ArrayUnpickler(pickle.Unpickler):
    """Plain containers, numbers, text and numpy arrays; anything else is refused by name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only numpy arrays are allowed")
        if module.startswith("numpy.core"):
            module = module.replace("numpy.core", "numpy._core")
        return super().find_class(module, name)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth (state dict, or a checkpoint that wraps one), of a detectron2 .pkl, or of
    TensorFlow.js's model.json and its shards."""
    return tensors_of(read_content(path), path)


def read_content(path: Path) -> dict[str, Any]:
    """All that is in such a file."""
    if path.suffix == ".json":
        return read_tfjs(path)
    try:
        if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                content = ArrayUnpickler(file, encoding="latin1").load()
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        EOFError,
        OSError,
        RuntimeError,
        LookupError,
        ValueError,
        TypeError,
    ) as error:
        raise WeightsError(f"weights {path}: this cannot be read as weights: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"weights {path}: it holds a {type(content).__name__}, not named tensors")
    return content


def tensors_of(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors among what `read_content` found in `path`."""
    while isinstance(content, dict) and (inner := next((w for w in WRAPPERS if w in content), None)):
        content = content[inner]
    if not isinstance(content, dict):
        raise WeightsError(f"weights {path}: it holds a {type(content).__name__}, not named tensors")
    try:
        state = {str(name): torch.as_tensor(v) for name, v in content.items() if hasattr(v, "shape")}
    except TypeError as error:  # an array of objects
        raise WeightsError(f"weights {path}: it holds something that is not numbers: {error}") from error
    if not state:
        raise WeightsError(f"weights {path}: it holds no tensors")
    return state


def _reason(error: Exception) -> str:
    """One line. torch wraps what it met into advice to trust the file; what it met is underneath."""
    lines = str(error.__context__ or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
