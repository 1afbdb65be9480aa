"""What all tests share: an environment of their own, and no silent skips in CI."""

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

# Threads of four workers and of the test itself would fight for the cores, and the number of threads changes
# the order of sums: tests that compare bits want it fixed.
os.environ["OMP_NUM_THREADS"] = "1"
for name in [name for name in os.environ if name.startswith(("LAUNCH_", "SLURM_", "AWS_", "DETCORE_"))]:
    del os.environ[name]

# Whoever started us in the background or under nohup: what tests start must hear Ctrl-C and a closed window.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs, tmux server and home of a test are its own, so a user's never show up and nothing is left."""
    monkeypatch.setenv("LAUNCH_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("LAUNCH_TMUX_SOCKET", f"test-{uuid.uuid4().hex[:8]}")
    monkeypatch.setenv("LAUNCH_QUEUE", str(tmp_path / "queue"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the checkout; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder shared/ beside the checkout")
    return SHARED


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """In CI a skipped test is a failed one, unless all it lacks is the folder beside the checkout, a GPU, or
    weights that others publish."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    excused = {"shared", "cuda", "released"} & set(getattr(item, "fixturenames", ()))
    if report.skipped and os.environ.get("CI") and not excused:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
