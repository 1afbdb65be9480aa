"""The verbs on real runs: a tmux window, a real S3 server, a program that keeps the contract."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.mirror.ownership import Ownership, Pulse
from tests.launcher.conftest import TOY, wait
from tests.launcher.store_fixture import Weed, weed
from tests.launcher.test_cli import LAUNCH, launch

RECIPE = f"""\
program:
  script: {TOY}
  args: ["--steps", "90", "--every", "10", "--wait-at", "30", "60"]
resources: {{gpus: 2, device: cpu}}
restart: {{backoff: 0.1s, grace: 20s}}
mirror: {{every: 0.5s}}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    with weed(tmp_path_factory.mktemp("weed")) as started:
        yield started


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    Path("toy.yaml").write_text(RECIPE)
    yield
    if shutil.which("tmux"):
        for run in rows():
            launch("stop", str(run["id"]))
        subprocess.run(["tmux", "-L", os.environ["LAUNCH_TMUX_SOCKET"], "kill-server"], capture_output=True)


def rows() -> list[dict[str, object]]:
    return list(json.loads(launch("status", "--json").stdout)["runs"])


def reached(step: int) -> Callable[[], bool]:
    return lambda: bool(rows()) and (rows()[-1]["step"] or 0) >= step  # type: ignore[operator]


def bucket(server: Weed) -> set[str]:
    return set(server.files())


@pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux")
def test_the_verbs_on_a_mirrored_run_in_a_window(
    server: Weed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.use(monkeypatch)
    started = launch("toy.yaml", "--backend", "tmux", "--name", "verbs")
    assert started.returncode == 0 and "launch logs verbs-" in started.stdout, started
    wait("step 10", reached(10))
    assert launch("resume", "verbs").returncode == 2, "it is running already"
    assert launch("rm", "verbs").returncode == 2, "it is running"
    wait("the store to know it", lambda: any(key.endswith("/owner.json") for key in bucket(server)))
    elsewhere = {"LAUNCH_RUNS": str(tmp_path / "elsewhere")}
    taken = launch("resume", str(rows()[0]["url"]), **elsewhere)
    assert taken.returncode == 2 and "held" in taken.stderr, taken
    assert not (tmp_path / "elsewhere").exists()
    assert "attach-session" in launch("attach", "verbs").stdout, "without a terminal it says what to type"
    told = launch("preempt", "verbs")
    assert told.returncode == 0 and "comes back by itself" in told.stdout, told
    wait("the second attempt", lambda: rows()[0]["attempts"] == 2 and rows()[0]["state"] == "running")
    assert launch("stop", "verbs").returncode == 0
    again = launch("stop", "verbs")
    assert again.returncode == 2 and "has ended already (stopped)" in again.stderr
    (row,) = rows()
    assert row["state"] == "stopped" and row["lost_steps"] == 0
    url = str(row["url"])
    assert "preempted" in launch("status", "verbs").stdout and url in launch(
        "status", "verbs"
    ).stdout.replace("\n", "")

    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    lacking = launch("resume", url, "--backend", "tmux", PATH="/nowhere", **elsewhere)
    assert lacking.returncode == 2 and "there is no tmux here" in lacking.stderr
    with monkeypatch.context() as keys:
        for name in ("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            keys.delenv(name)
        secret = {"AWS_ACCESS_KEY_ID": server.key, "AWS_SECRET_ACCESS_KEY": server.secret}
        unseen = launch("resume", url, "--backend", "tmux", **secret, **elsewhere)
    assert unseen.returncode == 2 and "which a tmux window does not see" in unseen.stderr, unseen
    assert not (tmp_path / "elsewhere").exists(), "a resume that is refused leaves nothing"
    resumed = launch("resume", url, "--backend", "local", **elsewhere)
    assert resumed.returncode == 0, resumed
    (row,) = json.loads(launch("status", "--json", **elsewhere).stdout)["runs"]
    assert row["state"] == "finished" and row["step"] == 90
    record = json.loads((tmp_path / "elsewhere" / str(row["id"]) / "run.json").read_text())
    assert (record["workdir"], record["backend"]) == (str(Path.cwd()), "local")
    other = Ownership(server.store(url.removeprefix("s3://runs/")))
    other.claim("another machine's", 99)
    pulse = Pulse(other)
    pulse.start()
    refused = launch("rm", "verbs", "--store")
    assert refused.returncode == 2 and "is held by attempt 99" in refused.stderr, refused
    pulse.stop()
    other.release()
    store = server.store(url.removeprefix("s3://runs/"))
    left = {"Bucket": "runs", "Key": f"{url.removeprefix('s3://runs/')}/checkpoints/left"}
    store.bucket._client.create_multipart_upload(**left)
    assert launch("rm", "verbs", "--store", **elsewhere).returncode == 0
    assert not [key for key in bucket(server) if str(row["id"]) in key]
    assert store.sweep() == 0, "nor is an upload in parts left that somebody would pay for"


@pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux")
def test_follow_shows_the_log_and_ends_with_the_run() -> None:
    done = launch("toy.yaml", "--follow", "--backend", "tmux", 'program.args=["--steps", "5"]')
    assert done.returncode == 0, done
    assert "finished" in done.stdout
    assert rows()[0]["state"] == "finished"


@pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux")
def test_a_resume_is_followed_to_its_own_end() -> None:
    """What its last life left, an end or a wish to stop, means nothing to it."""
    made = launch("toy.yaml", "--backend", "local", 'program.args=["--fail", "no data"]')
    assert made.returncode == 1 and rows()[0]["state"] == "failed"
    run = Path(os.environ["LAUNCH_RUNS"]) / str(rows()[0]["id"])
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("--fail", "--steps").replace("no data", "'5'"))
    (run / "stop_requested").touch()
    done = launch("resume", "last", "--follow", "--backend", "tmux")
    assert done.returncode == 0 and "finished" in done.stdout, done


def test_a_store_that_is_not_there_or_does_not_let_us_in(
    server: Weed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.use(monkeypatch)
    argv = ["toy.yaml", "--backend", "local"]
    none = launch(*argv, "storage.url=s3://no-such-bucket/x")
    assert none.returncode == 2 and "no-such-bucket" in none.stderr
    dry = launch(*argv, "storage.url=s3://no-such-bucket/x", "--dry-run")
    assert dry.returncode == 0 and "warning" in dry.stderr and "s3://no-such-bucket/x/" in dry.stdout
    wrong = tmp_path / "wrong"
    wrong.write_text(
        f"[{server.env['AWS_PROFILE']}]\naws_access_key_id = nobody\naws_secret_access_key = hunter2\n"
    )
    run = "s3://runs/lab/toy/toy-20260101-000000-0000"
    for verb in (argv, ["resume", run]):
        refused = launch(*verb, AWS_SHARED_CREDENTIALS_FILE=str(wrong))
        assert refused.returncode == 2 and "credentials are refused" in refused.stderr, refused
        assert "hunter2" not in refused.stderr
        nobody = launch(*verb, AWS_PROFILE="nobody")
        assert nobody.returncode == 2 and "no usable credentials" in nobody.stderr, nobody
    for url in ("s3://no-such-bucket", "s3://runs/lab"):
        gone = launch("resume", run.replace("s3://runs/lab", url))
        said = "there is no run at" if "runs" in url else "there is no bucket 'no-such-bucket'"
        assert gone.returncode == 2 and said in gone.stderr, gone
    for override, said in (
        ("storage.url=s3://a!bucket/x", 'Invalid bucket name "a!bucket"'),
        ("storage.endpoint=nonsense", "Invalid endpoint: nonsense"),
        ("storage.url=file:///proc/store", "file:///proc/store cannot be written to"),
    ):
        odd = launch(*argv, override)
        assert odd.returncode == 2 and said in odd.stderr and len(odd.stderr.splitlines()) <= 2, odd
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        away = launch(*argv, AWS_ENDPOINT_URL=f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert away.returncode == 1 and "127.0.0.1" in away.stderr
    assert not Path(os.environ["LAUNCH_RUNS"]).exists()


def test_tensorboard_serves_the_runs_on_loopback() -> None:
    pytest.importorskip("tensorboard")
    run = Path(os.environ["LAUNCH_RUNS"]) / "toy-20260101-000000-0001"
    (run / "tensorboard").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "final.json").write_text('{"state": "finished"}')
    process = subprocess.Popen([*LAUNCH, "tensorboard"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        forward = process.stdout.readline()
        assert "ssh -L " in forward and url.rpartition(":")[2] in forward
        wait("TensorBoard to answer", lambda: answers(url))
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 0


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/data/environment", timeout=10) as page:
            return bool(page.status == 200)
    except OSError:
        time.sleep(0.2)
        return False
