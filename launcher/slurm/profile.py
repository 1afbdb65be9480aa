"""What `launch doctor` measured on a cluster, kept for the budget of later runs: a file per cluster."""

import contextlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.rundir import read_json, write_json


def path(cluster: str) -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")  # noqa: PTH111 - no home: no error
    name = re.sub(r"[^A-Za-z0-9._-]", "_", cluster).lstrip(".") or "_"
    return Path(home) / "launch" / "clusters" / f"{name}.json"


def read(cluster: str) -> dict[str, Any] | None:
    return read_json(path(cluster))


def write(cluster: str, kill_after: float | None, reaches: Sequence[str]) -> Path:
    """`kill_after`: seconds from SIGTERM to SIGKILL; `reaches`: who of a step's processes a signal reaches.

    Raises OSError."""
    where = path(cluster)
    where.parent.mkdir(parents=True, exist_ok=True)
    known = {"cluster": cluster, "kill_after": kill_after, "reaches": list(reaches), "time": time.time()}
    write_json(where, {"schema": 1, **known})
    return where


def kill_after(cluster: str) -> float | None:
    """Measured seconds from SIGTERM to SIGKILL, if they were."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return float((read(cluster) or {})["kill_after"])
    return None
