"""What the mirror remembers of the store, and what it therefore need not send: shown by counting requests."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.mirror import Mirror, ownership, push
from launcher.rundir import RunDir, append_json
from launcher.storage import Store, StoreSettings, open_store
from launcher.storage.folder import FolderStore
from tests.launcher.mirrored import ID, KEEP, Mark, add_checkpoint, content, durable, make_run, prune
from tests.launcher.proxy import Proxy, Request, proxied
from tests.launcher.store_fixture import Weed, weed

MB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    with weed(tmp_path_factory.mktemp("weed")) as running:
        yield running


@pytest.fixture
def proxy(server: Weed, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    server.use(monkeypatch)
    with proxied(server.env["AWS_ENDPOINT_URL"]) as made:
        yield made


@pytest.fixture
def store(server: Weed, proxy: Proxy, tmp_path: Path) -> Store:
    settings = server.settings
    return open_store(
        f"s3://runs/lab/{tmp_path.name}/{ID}", StoreSettings(proxy.url, settings.region, settings.profile)
    )


def claimed(run: RunDir, store: Store, token: str, attempt: int) -> Mirror:
    """A mirror whose passes are made by the test: no thread, no beats."""
    mirror = Mirror(run, store, every=60, keep=KEEP)
    mirror.claim(token, attempt)
    return mirror


def one_pass(mirror: Mirror) -> None:
    assert mirror._pass(), mirror._said["error"]


def in_store(store: Store) -> dict[str, bytes]:
    keys = {entry.key for entry in store.list()} - {"owner.json", "code.json"}
    return {key: store.get_bytes(key)[0] for key in keys}


def asked(proxy: Proxy, work: Callable[[], object]) -> list[Request]:
    before = len(proxy.seen)
    work()
    return proxy.seen[before:]


def test_a_supervisor_that_comes_back_sends_only_what_is_new(
    proxy: Proxy, store: Store, tmp_path: Path
) -> None:
    run = make_run(tmp_path, store.url)
    for step in (10, 20):
        add_checkpoint(run, step)
    first = claimed(run, store, "first", 1)
    one_pass(first)
    assert asked(proxy, lambda: one_pass(first)) == []
    second = claimed(run, store, "second", 2)  # the first was killed
    assert asked(proxy, lambda: one_pass(second)) == []
    append_json(run.metrics, {"step": 21})
    sent = asked(proxy, lambda: one_pass(second))
    assert [(request.method, request.path.rpartition("/")[2]) for request in sent] == [
        ("PUT", "metrics.jsonl")
    ]
    assert in_store(store) == content(run.path)


@pytest.mark.parametrize("what", ["torn", "foreign", "published since", "owner gone"])
def test_a_state_that_does_not_count(
    proxy: Proxy, store: Store, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would say that all is there, as it was."""
    run = make_run(tmp_path, store.url)
    add_checkpoint(run, 10)
    one_pass(claimed(run, store, "first", 1))
    if what == "torn":
        os.truncate(run.mirrored, run.mirrored.stat().st_size // 2)
    elif what == "foreign":
        run.mirrored.write_text(run.mirrored.read_text().replace("first", "another"))
    elif what == "published since":
        monkeypatch.setattr(ownership, "PATIENCE", 0.0)
        Mirror(make_run(tmp_path / "b", ""), store, every=60, keep=KEEP).claim("elsewhere", 2)
    else:
        store.delete("owner.json")
    store.put_bytes("recipe.yaml", b"another's")
    store.delete("run.json")
    sent = asked(proxy, lambda: one_pass(claimed(run, store, "second", 2)))
    assert any("list-type" in request.path for request in sent)
    assert in_store(store) == content(run.path)


def test_a_checkpoint_deleted_in_the_store_is_sent_again(store: Store, tmp_path: Path) -> None:
    run = make_run(tmp_path, store.url)
    mark = add_checkpoint(run, 10)
    one_pass(claimed(run, store, "first", 1))
    for entry in list(store.list(f"checkpoints/{mark.name}/")):
        store.delete(entry.key)
    one_pass(claimed(run, store, "second", 2))
    assert durable(in_store(store)) == [mark]


def test_of_a_large_log_only_the_tail_travels(proxy: Proxy, store: Store, tmp_path: Path) -> None:
    run = make_run(tmp_path, store.url)
    log, key = run.rank_log(1, 0), "logs/attempt-1/rank-0.log"
    log.write_bytes(os.urandom(20 * MB))
    mirror = claimed(run, store, "first", 1)
    one_pass(mirror)

    def append() -> None:
        with log.open("ab") as file:
            file.write(os.urandom(100_000))

    for token in ("", "second"):
        again = claimed(run, store, token, 2) if token else mirror
        append()
        sent = asked(proxy, lambda: one_pass(again))  # noqa: B023
        assert sum(request.size for request in sent) < 200_000
        assert store.digest(key) == (log.stat().st_size, _sha(log))
    assert asked(proxy, lambda: one_pass(again)) == []
    os.utime(log)
    assert [request.method for request in asked(proxy, lambda: one_pass(again))] == ["HEAD"], "only touched"

    whole = log.read_bytes()
    log.write_bytes(whole[: 10 * MB] + os.urandom(12 * MB))  # cut, and grown past what was sent
    one_pass(again)
    assert store.digest(key) == (22 * MB, _sha(log))
    log.with_name("new").write_bytes(os.urandom(10 * MB) + log.read_bytes()[10 * MB :] + b"more")
    log.with_name("new").rename(log)  # another file, with what was the end at the same place
    one_pass(again)
    assert store.digest(key) == (22 * MB + 4, _sha(log))
    store.put_bytes(key, b"somebody wrote there")
    append()
    one_pass(again)
    assert store.digest(key) == (log.stat().st_size, _sha(log))


def _sha(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_metrics_are_cut_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewritten and grown past its old size between two passes, in place or by a rename."""
    monkeypatch.setattr(push, "LARGE", 100_000)
    run, store = make_run(tmp_path, ""), FolderStore(tmp_path / "store")
    run.metrics.write_bytes(b"".join(b'{"step": %d, "seconds": 1}\n' % step for step in range(10_000)))
    mirror = claimed(run, store, "first", 1)
    one_pass(mirror)
    for seconds, aside in ((2, run.metrics), (3, run.path / "aside")):
        kept = run.metrics.read_bytes()[:150_000]
        aside.write_bytes(kept + b'{"step": 7, "seconds": %d}\n' % seconds * 20_000)
        aside.rename(run.metrics)
        one_pass(mirror)
        assert store.get_bytes("metrics.jsonl")[0] == run.metrics.read_bytes()


def uploads(server: Weed, store: Store) -> list[str]:
    """Unfinished multipart uploads below the store's prefix."""
    import boto3

    session = boto3.Session(profile_name=server.env["AWS_PROFILE"])  # the default one remembers others' keys
    client = session.client("s3", endpoint_url=server.env["AWS_ENDPOINT_URL"])
    found = client.list_multipart_uploads(Bucket="runs").get("Uploads", [])
    prefix = store.url.removeprefix("s3://runs/")
    return [upload["Key"] for upload in found if upload["Key"].startswith(prefix)]


def test_a_checkpoint_deleted_during_its_upload(
    server: Weed, proxy: Proxy, store: Store, tmp_path: Path
) -> None:
    """Nothing of it stays, and the newest goes next, with metrics that reach it, and before the logs."""
    run = make_run(tmp_path, store.url)
    mirror = claimed(run, store, "first", 1)
    doomed = add_checkpoint(run, 10, size=60 * MB)
    pruned = threading.Event()

    def rule(request: Request) -> None:
        if "partNumber=2" in request.path and not pruned.is_set():
            pruned.set()
            add_checkpoint(run, 20)
            prune(run, keep=1)

    proxy.rule = rule
    sent = asked(proxy, lambda: one_pass(mirror))
    files = in_store(store)
    assert pruned.is_set() and durable(files) == [Mark(1, 20)]
    assert not any(doomed.name in key for key in files) and uploads(server, store) == []
    names = [request.path for request in sent if request.method == "PUT"]
    manifest = next(i for i, name in enumerate(names) if name.endswith("manifest.json"))
    assert not any("/logs/" in name for name in names[:manifest])
    assert any("/logs/" in name for name in names[manifest:])


def test_unfinished_uploads_are_removed_when_the_run_is_claimed(
    server: Weed, store: Store, tmp_path: Path
) -> None:
    import boto3

    session = boto3.Session(profile_name=server.env["AWS_PROFILE"])  # the default one remembers others' keys
    client = session.client("s3", endpoint_url=server.env["AWS_ENDPOINT_URL"])
    prefix = store.url.removeprefix("s3://runs/")
    for key in (f"{prefix}/checkpoints/x", f"{prefix}-another/x"):
        client.create_multipart_upload(Bucket="runs", Key=key)
    assert len(uploads(server, store)) == 2
    claimed(make_run(tmp_path, store.url), store, "first", 1)
    assert uploads(server, store) == [f"{prefix}-another/x"]
