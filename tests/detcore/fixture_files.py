"""Reads tests/fixtures, or the folder that $FIXTURES names, where files of the same kinds may lie."""

import json
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detcore.weights.keys import rename

FOLDER = Path(os.environ.get("FIXTURES") or Path(__file__).parents[1] / "fixtures")


class Fixture:
    """One file: `meta`, arrays as tensors, its tolerances, its weights under our names."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        with np.load(path, allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.meta: dict[str, Any] = json.loads(str(self.arrays.pop("meta").reshape(-1)[0]))
        self.config: dict[str, Any] = self.meta["config"]

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The arrays below `prefix/`, by the rest of their key."""
        start = prefix + "/"
        return {k.removeprefix(start): self[k] for k in self.arrays if k.startswith(start)}

    def names(self, key: str) -> list[str]:
        return [str(name) for name in self.arrays[key]]

    def per_image(self, prefix: str) -> list[Tensor]:
        """prefix/0, prefix/1, ..."""
        count = len(self.under(prefix))
        return [self[f"{prefix}/{i}"] for i in range(count)]

    def weights(self, table: str) -> dict[str, Tensor]:
        return {rename(key, table): value for key, value in self.under("weights").items()}

    def close(self, got: Tensor, key: str, kind: str) -> None:
        """`got` equals the array `key` within the file's tolerance for `kind`."""
        wanted, tolerance = self[key], self.meta["tolerance"][kind]
        message = f"{self.name}: {key}"
        if "relative L2" in tolerance:
            limit = float(re.search(r"[\d.]+e-?\d+", tolerance)[0])
            error = (got - wanted).norm() / wanted.norm().clamp(min=1e-12)
            assert got.shape == wanted.shape and error <= limit, f"{message}: relative error {error:.1e}"
            return
        bounds = {k: float(v) for k, v in reversed(re.findall(r"(atol|rtol) ([\d.e-]+)", tolerance))}
        atol, rtol = bounds.get("atol", 0.0), bounds.get("rtol", 0.0)
        if tolerance != "exact":
            assert bounds, f"{message}: no tolerance in {tolerance!r}"
        torch.testing.assert_close(
            got.detach(), wanted, atol=atol, rtol=rtol, msg=lambda m: f"{message}: {m}"
        )


@cache
def systems() -> dict[str, list[str]]:
    """Which files of which kind there are: {"yolof": ["yolof_hard", ...], ...}."""
    found: dict[str, list[str]] = {}
    for path in sorted(FOLDER.glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            system = json.loads(str(file["meta"].reshape(-1)[0]))["system"]
        found.setdefault(system, []).append(path.stem)
    return found


@cache
def read(name: str) -> Fixture:
    return Fixture(FOLDER / f"{name}.npz")


def each(system: str) -> Callable[[Callable[..., None]], Callable[..., None] | None]:
    """Runs a test once for every file of a kind; the test's argument `name` goes to `read`.

    The outermost decorator: where there is no such file, there is no such test.
    """
    names = systems().get(system)
    return pytest.mark.parametrize("name", names) if names else lambda test: None
