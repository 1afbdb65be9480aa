"""A mirrored run when the network, the store, the disk, the clock or its own files go wrong.

What has a manifest in the bucket is whole, whatever happens; synced.json says what ails the mirror; and when
that is over, the bucket gets all there is. Passes are made by the test: no thread, no beats.
"""

import hashlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fcntl import LOCK_EX, flock
from pathlib import Path

import boto3
import pytest

from launcher.checkpoints import newest
from launcher.errors import LaunchError, StoreAway, StoreError, UserError
from launcher.mirror import Mirror, ownership, pull_run, restore
from launcher.mirror.verify import verify
from launcher.rundir import RunDir, read_json
from launcher.storage import Store, StoreSettings, connections, open_store
from launcher.storage.probes import PROBE
from tests.launcher.conftest import Toy
from tests.launcher.faults import (
    BIG,
    NO_HANG,
    always,
    may_only_read,
    of,
    provided,
    small_disk,
    two_keys,
    wrong_clock,
)
from tests.launcher.mirrored import ID, KEEP, Mark, add_checkpoint, content, durable, make_run
from tests.launcher.proxy import Fault, Proxy, Request, only_first, proxied
from tests.launcher.store_fixture import Weed

Log = pytest.LogCaptureFixture
soak = pytest.mark.soak


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    with two_keys(tmp_path_factory.mktemp("weed")) as running:
        yield running


@pytest.fixture
def proxy(server: Weed, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    server.use(monkeypatch)
    with proxied(server.env["AWS_ENDPOINT_URL"]) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        yield made


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"s3://runs/lab/{tmp_path.name}/{ID}"


@pytest.fixture
def run(tmp_path: Path, url: str) -> RunDir:
    """With one checkpoint."""
    made = make_run(tmp_path / "here", url)
    add_checkpoint(made, 10)
    return made


def claimed(run: RunDir, url: str, token: str = "t", attempt: int = 1) -> Mirror:
    mirror = Mirror(run, open_store(url), every=60, keep=KEEP)
    mirror.claim(token, attempt)
    return mirror


def said(run: RunDir) -> str:
    return str((read_json(run.synced) or {}).get("error"))


def in_bucket(server: Weed, url: str) -> dict[str, bytes]:
    """Looked at past the proxy; the checkpoints in it are shown to be whole."""
    files = server.files(url.removeprefix("s3://runs/"))
    durable(files)
    return {key: data for key, data in files.items() if key not in ("owner.json", "code.json")}


def uploads(server: Weed, url: str) -> list[object]:
    """Unfinished ones below the run's prefix."""
    session = boto3.Session(profile_name=server.env["AWS_PROFILE"])
    client = session.client("s3", endpoint_url=server.env["AWS_ENDPOINT_URL"])
    found = client.list_multipart_uploads(Bucket="runs", Prefix=url.removeprefix("s3://runs/"))
    return list(found.get("Uploads", ()))


def catches_up(mirror: Mirror, server: Weed, run: RunDir, url: str) -> None:
    assert mirror._pass(), said(run)
    assert (read_json(run.synced) or {})["behind"] == 0 and said(run) == "None"
    assert in_bucket(server, url) == content(run.path) and uploads(server, url) == []


# --- on the way there

DATA = Mark(1, 20).name + "/train.pth"
MANIFEST = Mark(1, 20).name + "/manifest.json"
KEYS = {"data": (DATA, 1000), "data in parts": (DATA, BIG), "manifest": (MANIFEST, 1000),
        "metrics": ("metrics.jsonl", 1000)}  # fmt: skip


@pytest.mark.parametrize(
    "what", [what if what == "data in parts" else pytest.param(what, marks=soak) for what in KEYS]
)
def test_bits_that_flip_on_their_way(run: RunDir, url: str, server: Weed, proxy: Proxy, what: str) -> None:
    key, size = KEYS[what]
    mirror = claimed(run, url)
    add_checkpoint(run, 20, size=size)
    part = "partNumber=2" if what == "data in parts" else ""
    proxy.rule = always(Fault(flip_request=True), of("PUT", key, part))
    assert not mirror._pass() and key in said(run) and mirror.lost is None
    assert Mark(1, 20) not in durable(server.files(url.removeprefix("s3://runs/")))
    proxy.rule = only_first(1, Fault(flip_request=True), of("PUT", key, part))
    catches_up(mirror, server, run, url)


def test_a_program_that_writes_what_is_being_sent(run: RunDir, url: str, server: Weed, proxy: Proxy) -> None:
    """A board in parts that is rewritten, a log that is cut, a checkpoint that somebody damages."""
    board, log = run.path / "tensorboard" / "image", run.rank_log(1, 0)
    board.parent.mkdir()
    board.write_bytes(bytes(BIG))
    log.write_bytes(bytes(BIG))
    add_checkpoint(run, 20, size=BIG)
    files = {"/image": board, log.name: log, DATA: run.checkpoints / DATA}
    changed: list[str] = []

    def rule(request: Request) -> None:
        for name, path in files.items():
            if of("PUT", name, "partNumber=2")(request) and name not in changed:
                changed.append(name)
                if name == log.name:
                    os.truncate(path, 100)
                else:
                    with path.open("r+b") as file:
                        file.write(b"other")

    proxy.rule = rule
    mirror = claimed(run, url)
    assert not mirror._pass() and DATA.split("/")[0] in said(run) and len(changed) == 3
    assert not mirror._pass() or mirror._push.durable == Mark(1, 10)
    files_there = in_bucket(server, url)
    assert durable(server.files(url.removeprefix("s3://runs/"))) == [Mark(1, 10)]
    assert files_there["tensorboard/image"] == board.read_bytes()
    assert files_there[log.relative_to(run.path).as_posix()] == log.read_bytes()
    assert uploads(server, url) == []


def test_thirty_percent_slow_down(run: RunDir, url: str, server: Weed, proxy: Proxy) -> None:
    for number in range(40):
        (run.code / f"file-{number}").write_text(f"{number}")
    asked: Counter[str] = Counter()

    def rule(request: Request) -> Fault | None:
        asked[request.path] += 1
        draw = hashlib.sha256(f"{Path(request.path).name} {asked[request.path]}".encode()).digest()[0]
        return Fault(503) if draw < 77 and PROBE not in request.path else None

    proxy.rule = rule
    catches_up(claimed(run, url), server, run, url)


TROUBLE: dict[str, tuple[Fault, Callable[[Request], bool], str]] = {
    "expired": (Fault(403, "ExpiredToken"), lambda request: True, "ExpiredToken"),
    "refused": (Fault(403, "AccessDenied"), of("PUT"), "may not do this"),
    "busy": (Fault(503), of("PUT", "/checkpoints/"), "SlowDown"),
    "cut": (Fault(cut=0), of("GET"), "does not answer"),
}


@pytest.mark.parametrize(
    "what", [what if what == "expired" else pytest.param(what, marks=soak) for what in TROUBLE]
)
def test_trouble_that_passes(
    run: RunDir, url: str, server: Weed, proxy: Proxy, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, match, words = TROUBLE[what]
    monkeypatch.setattr("launcher.storage.answers.LAST_TRY", 2.0)
    if what == "cut":  # of the passes it is the first that reads
        proxy.rule = always(fault, match)
        with pytest.raises(StoreAway, match=words):
            claimed(run, url)
        proxy.rule = lambda request: None
    mirror = claimed(run, url)
    catches_up(mirror, server, run, url)
    add_checkpoint(run, 20)
    proxy.rule = always(fault, match)
    if what != "cut":
        assert not mirror._pass() and words in said(run) and mirror.lost is None
        assert (read_json(run.synced) or {})["step"] == 10 and (read_json(run.synced) or {})["behind"] > 0
    proxy.rule = lambda request: None
    catches_up(mirror, server, run, url)


@pytest.mark.parametrize("patience", [0.5, pytest.param(connections.PATIENCE, marks=soak)])
@pytest.mark.parametrize("fault", [Fault(silent=True), pytest.param(Fault(trickle=True), marks=soak)])
def test_a_store_that_does_not_get_on(
    run: RunDir, url: str, server: Weed, proxy: Proxy, fault: Fault, tmp_path: Path, patience: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    mirror = claimed(run, url)
    proxy.rule = lambda request: fault
    ended: dict[str, object] = {}

    def end(name: str, work: Callable[[], object]) -> None:
        try:
            ended[name] = work()
        except LaunchError as error:
            ended[name] = error.message

    works = {"pass": mirror._pass, "pull": lambda: pull_run(url, StoreSettings(), tmp_path / "pulled")}
    threads = [threading.Thread(target=end, args=work, daemon=True) for work in works.items()]
    with monkeypatch.context() as patch:
        patch.setattr(connections, "SILENCE", patience)
        patch.setattr(connections, "PATIENCE", patience)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(NO_HANG if patience > 1 else 240)
    assert ended["pass"] is False and "does not answer" in said(run)
    assert "does not answer" in str(ended["pull"]) and not (tmp_path / "pulled").exists()
    proxy.rule = lambda request: None
    catches_up(claimed(run, url), server, run, url)


def test_answers_that_are_lost(run: RunDir, url: str, server: Weed, proxy: Proxy) -> None:
    """Our own object is no other writer's, under If-None-Match and If-Match, in one piece and in parts."""
    add_checkpoint(run, 20, size=BIG)
    lost, keys = Fault(lost=True), ("owner.json", MANIFEST, Mark(1, 10).name + "/train.pth", "metrics.jsonl")
    rules = [only_first(1, lost, of("PUT", f"/{key}")) for key in keys]
    rules.append(only_first(1, lost, of("POST", DATA, "uploadId=")))
    proxy.rule = lambda request: next((fault for rule in rules if (fault := rule(request))), None)
    mirror = claimed(run, url)
    catches_up(mirror, server, run, url)
    proxy.rule = only_first(1, lost, of("PUT", "owner.json"))
    mirror._owner.beat()
    assert mirror.lost is None
    catches_up(mirror, server, run, url)


# --- on the way back


def test_bits_that_flip_on_their_way_back(
    run: RunDir, url: str, server: Weed, proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_checkpoint(run, 20, size=BIG)
    mirror = claimed(run, url)
    catches_up(mirror, server, run, url)
    mirror.release()
    proxy.rule = only_first(1, Fault(flip_response=True), of("GET", DATA))
    once = pull_run(url, StoreSettings(), tmp_path / "once")
    assert content(once.path) == content(run.path)
    proxy.rule = only_first(1, Fault(flip_response=True), of("GET", DATA))
    assert all(verdict.store == "whole" for verdict in verify(None, open_store(url))), "verify looks twice"
    proxy.rule = always(Fault(flip_response=True), of("GET", DATA))
    assert [verdict.store == "whole" for verdict in verify(None, open_store(url))] == [False, True]
    older = pull_run(url, StoreSettings(), tmp_path / "always")
    assert newest(older) == Mark(1, 10) and f"passed over checkpoint {Mark(1, 20).name}" in caplog.text
    for key in ("run.json", "recipe.yaml", "metrics.jsonl"):
        proxy.rule = always(Fault(flip_response=True), of("GET", f"/{key}"))
        with pytest.raises(StoreError, match=key):
            pull_run(url, StoreSettings(), tmp_path / "none")
        assert not (tmp_path / "none").exists()


def test_a_disk_that_fills_up(
    run: RunDir, url: str, server: Weed, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_checkpoint(run, 20, size=3_000_000)
    mirror = claimed(run, url)
    catches_up(mirror, server, run, url)
    mirror.release()
    with small_disk(tmp_path / "disk", monkeypatch) as disk:
        with pytest.raises(UserError, match="No space left on device"):
            pull_run(url, StoreSettings(), disk)
        assert not any(disk.iterdir())
        here = make_run(disk, url)
        add_checkpoint(here, 10)
        before = content(here.path)
        with pytest.raises(StoreError, match="No space left on device"):
            restore.restore(here, open_store(url))
        assert content(here.path) == before and newest(here) == Mark(1, 10)


PULL = """
import pathlib, sys
from launcher.mirror import pull_run
from launcher.storage import StoreSettings
pull_run(sys.argv[1], StoreSettings(), pathlib.Path(sys.argv[2]))
"""


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=soak), signal.SIGKILL])
def test_killed_while_a_run_is_brought(
    run: RunDir, url: str, server: Weed, proxy: Proxy, tmp_path: Path, number: signal.Signals
) -> None:
    mirror = claimed(run, url)
    catches_up(mirror, server, run, url)
    mirror.release()
    reached, runs = threading.Event(), tmp_path / "pulled"

    def rule(request: Request) -> Fault | None:
        if of("GET", "/train.pth")(request):
            reached.set()
            return Fault(silent=True)
        return None

    proxy.rule = rule
    with subprocess.Popen([sys.executable, "-c", PULL, url, runs]) as process:
        assert reached.wait(60)
        process.send_signal(number)
    assert len(list(runs.iterdir())) == 1
    living = runs / ".tmp-pull-of-a-living"
    living.mkdir()
    proxy.rule = lambda request: None
    with (living / "lock").open("wb") as lock:
        flock(lock, LOCK_EX)
        pulled = pull_run(url, StoreSettings(), runs)
    assert content(pulled.path) == content(run.path)
    assert {path.name for path in runs.iterdir()} == {ID, living.name}, "what the dead left is gone"


# --- clock, rights, credentials


def test_a_clock_that_is_wrong(
    run: RunDir, url: str, server: Weed, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = claimed(run, url)
    with wrong_clock(monkeypatch):
        assert not mirror._pass() and "clock" in said(run) and mirror.lost is None
        with pytest.raises(LaunchError, match="clock"):
            pull_run(url, StoreSettings(), tmp_path / "pulled")
        with pytest.raises(LaunchError, match="clock"):
            verify(None, open_store(url))
    catches_up(mirror, server, run, url)


def test_credentials_that_may_only_read(
    run: RunDir, url: str, server: Weed, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "the credentials may not do this in the bucket 'runs'"
    with monkeypatch.context() as patch:
        may_only_read(tmp_path, patch)
        mirror = Mirror(run, open_store(url), every=60, keep=KEEP)
        with pytest.raises(StoreError, match=words):
            mirror.claim("t", 1)
        assert not mirror._pass() and words in said(run) and mirror.lost is None
        synced = read_json(run.synced) or {}
        assert synced["behind"] > 0 and synced["away_since"] and synced["step"] is None
    assert server.files(url.removeprefix("s3://runs/")) == {}
    catches_up(claimed(run, url), server, run, url)


@soak
def test_a_run_whose_bucket_may_only_be_read(
    toy: Callable[..., Toy], server: Weed, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_only_read(tmp_path, monkeypatch)
    made = toy("--steps 20 --every 5", url=f"s3://runs/lab/{tmp_path.name}/{ID}").start()
    assert made.end(120) == 0 and made.final["state"] == "finished"
    words = "the credentials may not do this in the bucket 'runs'"
    synced = read_json(made.run.synced) or {}
    assert words in synced["error"] and synced["away_since"] and synced["behind"] > 0
    shown = subprocess.run([sys.executable, "-m", "launcher.cli", "status", made.run.id], text=True,
                           capture_output=True, timeout=60, env=os.environ | {"COLUMNS": "1000"})  # fmt: skip
    assert words in shown.stdout, shown
    assert server.files(f"lab/{tmp_path.name}") == {}


def test_credentials_that_run_out(
    run: RunDir, url: str, server: Weed, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from a program, and are good for no more than a moment."""
    calls = provided(server, tmp_path, 901, monkeypatch)  # a second on, botocore wants others
    mirror = claimed(run, url)
    for step in (20, 30):
        add_checkpoint(run, step)
        time.sleep(1.1)
        assert mirror._pass(), said(run)
    assert len(calls.read_text()) > 1 and server.secret not in run.synced.read_text()
    server.use(monkeypatch)
    assert durable(server.files(url.removeprefix("s3://runs/"))) == [Mark(1, 30), Mark(1, 20)]


# --- two writers


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A store that takes conditions and does not look at them: moto's, which asks for no signature."""
    from moto.server import ThreadedMotoServer

    for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with proxied(f"http://{host}:{port}") as made:
            made.dropped = {"if-match", "if-none-match"}
            monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
            boto3.Session().client("s3").create_bucket(Bucket="runs")
            yield made
    finally:
        server.stop()


def test_two_writers_where_conditions_are_ignored(
    tmp_path: Path,
    url: str,
    careless: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As docs/contract.md has it: the older one finds the other's owner.json and stops; checkpoints stay
    apart."""
    store = open_store(url)
    assert not store.conditional
    old_run, new_run = make_run(tmp_path / "old", url), make_run(tmp_path / "new", url)
    with caplog.at_level(logging.WARNING, "launch.mirror"):
        old = claimed(old_run, url, "old", 3)
    assert "ignores the conditions" in caplog.text
    add_checkpoint(old_run, 10, fence=3)
    assert old._pass(), said(old_run)
    monkeypatch.setattr(ownership, "PATIENCE", 0.5)
    new = claimed(new_run, url, "new", 1)
    assert new._claimed == ("new", 4), "a higher fence than any that was seen"
    add_checkpoint(new_run, 20, fence=4)
    assert new._pass(), said(new_run)
    add_checkpoint(old_run, 999, fence=3)
    old._owner.beat()
    assert not old._pass() and "taken over by attempt 4" in str(old.lost)
    assert new._pass() and new.lost is None
    assert marks_in(store) == [Mark(4, 20), Mark(3, 10)]
    new.release()
    pulled = pull_run(url, StoreSettings(), tmp_path / "pulled")
    assert newest(pulled) == Mark(4, 20)


def test_two_writers_who_do_not_see_each_other(tmp_path: Path, url: str, careless: Proxy) -> None:
    """Within the same round trips both take the run: until a beat, both send; no manifest lies."""
    runs = [make_run(tmp_path / name, url) for name in ("one", "two")]
    one, two = (Mirror(run, open_store(url), every=60, keep=KEEP) for run in runs)
    taken, looked, owned = threading.Event(), threading.Event(), of("PUT", "owner.json")

    def rule(request: Request) -> Fault | None:
        if owned(request):  # it has looked whether the other one is there
            looked.set()
            return Fault(after=taken)
        return None

    careless.rule = rule
    late = threading.Thread(target=two.claim, args=("two", 1))
    late.start()
    assert looked.wait(60)
    careless.rule = lambda request: None
    one.claim("one", 1)
    taken.set()
    late.join(60)
    assert one._owner.held and two._owner.held
    for run, step in zip(runs, (10, 20), strict=True):
        add_checkpoint(run, step)
    assert one._pass() and two._pass()
    one._owner.beat()
    two._owner.beat()
    assert "taken over" in str(one.lost) and two.lost is None, "one of them has stopped"
    assert marks_in(open_store(url)) == [Mark(1, 20), Mark(1, 10)]


def marks_in(store: Store) -> list[Mark]:
    """Checkpoints, all of them whole; whose metrics have won is open."""
    files = {entry.key: store.get_bytes(entry.key)[0] for entry in store.list()}
    return durable(files | {"metrics.jsonl": b'{"step": 10}\n{"step": 20}\n'})
