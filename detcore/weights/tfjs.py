"""TensorFlow.js graph models: a model.json that names tensors, and shards with their numbers, one after the
other. Of the graph itself nothing is read, and nothing is run."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detcore.weights import WeightsError

DTYPES = {
    "float32": np.dtype("<f4"),
    "int32": np.dtype("<i4"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}


def read_tfjs(path: Path) -> dict[str, Tensor]:
    """The tensors of `path`, a model.json, with the axes of convolutions in PyTorch's order.

    Raises WeightsError if it does not say which bytes are whose, if shards lie elsewhere than beside it, or
    if they hold more or less than it says.
    """
    try:
        manifest = json.loads(path.read_bytes())["weightsManifest"]
        groups = [([_shard(path, name) for name in group["paths"]], group["weights"]) for group in manifest]
        state: dict[str, Tensor] = {}
        for shards, entries in groups:
            _read_group(path, b"".join(shard.read_bytes() for shard in shards), entries, state)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"weights {path}: this is no model of TensorFlow.js: {type(error).__name__}: {error}"
        ) from error
    except OSError as error:
        raise WeightsError(f"weights {path}: {error.filename} cannot be read: {error.strerror}") from error
    return state


def _shard(path: Path, name: str) -> Path:
    shard = (path.parent / name).resolve()
    if shard.parent != path.parent.resolve():
        raise WeightsError(f"weights {path}: it names {name!r}, which is not in its own folder")
    return shard


def _read_group(path: Path, content: bytes, entries: list[dict[str, Any]], state: dict[str, Tensor]) -> None:
    """Adds the tensors of one group of shards, whose `content` must be theirs to the last byte."""
    start = 0
    for entry in entries:
        name, shape = entry["name"], entry["shape"]
        if entry["dtype"] not in DTYPES or "quantization" in entry:
            kind = "quantized" if "quantization" in entry else entry["dtype"]
            raise WeightsError(f"weights {path}: {name} is {kind}, and only {', '.join(DTYPES)} can be read")
        if not all(type(side) is int and side >= 0 for side in shape):
            raise WeightsError(f"weights {path}: {name} has the shape {shape}")
        dtype, count = DTYPES[entry["dtype"]], math.prod(shape)
        stop = start + count * dtype.itemsize
        if stop > len(content):
            raise WeightsError(f"weights {path}: the shards end at byte {len(content)}, before {name} does")
        values = np.frombuffer(content, dtype, count, start).reshape(shape)
        state[name] = torch.from_numpy(_layout(name, values).copy())
        start = stop
    if start < len(content):
        raise WeightsError(f"weights {path}: the shards have {len(content) - start} bytes too many")


def _layout(name: str, values: np.ndarray) -> np.ndarray:
    """TensorFlow's (H, W, in, out), of depthwise convolutions (H, W, in, multiplier), as (out, in, H, W)."""
    if values.ndim != 4:
        return values
    if name.rsplit("/", 1)[-1] == "depthwise_weights":
        return values.reshape(*values.shape[:2], -1)[None].transpose(3, 0, 1, 2)
    return values.transpose(3, 2, 0, 1)
