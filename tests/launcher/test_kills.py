"""SIGKILL at random moments of training, with the mirror on a real S3 server; `make soak` does it longer."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launcher.conftest import Toy
from tests.launcher.kills import killed_again_and_again
from tests.launcher.store_fixture import weed


@pytest.mark.parametrize(
    "kills", [10, pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_killed_at_random_moments(
    kills: int, toy: Callable[..., Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random.seed(kills)
    with weed(tmp_path / "weed") as server:
        server.use(monkeypatch)
        killed_again_and_again(toy, server, kills, tmp_path / "disks")
