"""A bucket into which somebody else has written: nothing of it leaves the run's folder, and what is refused
is told in a word, with nothing done."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from launcher.checkpoints import newest
from launcher.errors import StoreError
from launcher.mirror import Mirror, pull_run, restore
from launcher.rundir import RunDir
from launcher.storage import StoreSettings, open_store
from launcher.storage.base import MAX_DOCUMENT
from launcher.storage.folder import FolderStore
from tests.launcher.mirrored import ID, Mark, add_checkpoint, content, make_run

Pair = tuple[RunDir, FolderStore]


def mirrored(run: RunDir, url: str) -> None:
    mirror = Mirror(run, open_store(url), every=60, keep=5)
    mirror.claim("token", 1)
    assert mirror._pass(), mirror._said
    mirror.release()


@pytest.fixture
def stored(tmp_path: Path) -> Pair:
    store = FolderStore(tmp_path / "bucket" / ID)
    run = make_run(tmp_path / "origin", store.url)
    for step in (10, 20):
        add_checkpoint(run, step)
    mirrored(run, store.url)
    return run, store


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The only server here that keeps keys as they are, `..` and all."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


BAD_KEYS = ["../escaped", "/absolute", "logs//x", "code/../../escaped", "back\\slash", "bell\a", "run.json/x",
            "checkpoints/step-00000020-fence-1/../../../escaped"]  # fmt: skip


def test_keys_that_lead_elsewhere(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ENDPOINT_URL", moto), ("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s")):
        monkeypatch.setenv(f"AWS_{name}", value)
    client = boto3.Session().client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="evil")
    url = f"s3://evil/{tmp_path.name}/{ID}"
    run, here = make_run(tmp_path / "origin", url), make_run(tmp_path / "here", url)
    add_checkpoint(run, 10)
    mirrored(run, url)
    before, store = content(tmp_path), open_store(url)
    for bad in BAD_KEYS:
        name = {"Bucket": "evil", "Key": f"{tmp_path.name}/{ID}/{bad}"}
        client.put_object(**name, Body=b"x")
        with pytest.raises(StoreError, match="not safe to write") as caught:
            pull_run(url, StoreSettings(), tmp_path / "runs")
        assert repr(bad.removesuffix("json/x")).strip("'") in caught.value.message
        with pytest.raises(StoreError, match="not safe to write"):
            restore.restore(here, store)
        assert content(tmp_path) == before and not (tmp_path / "runs").exists()
        client.delete_object(**name)
    assert newest(pull_run(url, StoreSettings(), tmp_path / "runs")) == Mark(1, 10)


@pytest.mark.parametrize("way", ["link", "above"])
def test_a_link_in_the_way(stored: Pair, tmp_path: Path, way: str) -> None:
    """Whoever made it, nothing is written to where it leads."""
    here, elsewhere = make_run(tmp_path / "here", ""), tmp_path / "elsewhere"
    elsewhere.mkdir()
    stored[1].put_bytes("tensorboard/deep/board", b"x")
    link = here.path / "tensorboard" if way == "above" else here.path / "tensorboard" / "deep"
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(elsewhere)
    before = content(here.path)
    with pytest.raises(StoreError, match="is a symbolic link, and 'tensorboard/deep/board' would be written"):
        restore.restore(here, stored[1])
    assert not any(elsewhere.iterdir()) and content(here.path) == before


FORMS: dict[str, object] = {
    "out": {"links": {"a": "../../out"}, "executable": []},
    "absolute": {"links": {"a": "/etc/passwd"}, "executable": []},
    "elsewhere": {"links": {"../a": "b"}, "executable": []},
    "over a file": {"links": {"café.py": "package"}, "executable": []},
    "up through a link": {"links": {"a": "package", "b": "a/../../../x"}, "executable": []},
    "no form": [1],
    "torn": {"links": 7},
}


@pytest.mark.parametrize("how", FORMS)
def test_a_form_that_is_not_safe(stored: Pair, tmp_path: Path, how: str) -> None:
    stored[1].put_bytes("code.json", json.dumps(FORMS[how]).encode())
    with pytest.raises(StoreError, match=r"not safe to make|is torn"):
        pull_run(stored[1].url, StoreSettings(), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    here = make_run(tmp_path / "here", "")
    (here.code / "café.py").unlink()
    before = content(here.path)
    with pytest.raises(StoreError, match=r"not safe to make|is torn"):
        restore.restore(here, stored[1])
    assert content(here.path) == before


def test_executable_names_are_only_those_that_came(stored: Pair, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.touch(0o600)
    form = {"links": {}, "executable": ["../../../victim", str(victim), "café.py"]}
    stored[1].put_bytes("code.json", json.dumps(form).encode())
    pulled = pull_run(stored[1].url, StoreSettings(), tmp_path / "pulled")
    assert victim.stat().st_mode & 0o111 == 0 and (pulled.code / "café.py").stat().st_mode & 0o100


def test_a_manifest_that_is_huge_is_passed_over(
    stored: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = stored[1].path(f"checkpoints/{Mark(1, 20).name}/manifest.json")
    with manifest.open("r+b") as file:
        file.truncate(MAX_DOCUMENT + 1)
    pulled = pull_run(stored[1].url, StoreSettings(), tmp_path / "pulled")
    assert newest(pulled) == Mark(1, 10) and "too big to be one" in caplog.text


RUN_JSON: dict[str, Callable[[bytes], bytes]] = {
    "another id": lambda data: data.replace(ID.encode(), b"demo-20260102-030405-ffff"),
    "no object": lambda data: b"[]",
    "torn": lambda data: data[:20],
    "too deep": lambda data: b"[" * 100_000,
    "huge": lambda data: data + b" " * MAX_DOCUMENT,
}


@pytest.mark.parametrize("how", RUN_JSON)
def test_a_run_json_that_is_not_the_runs(stored: Pair, tmp_path: Path, how: str) -> None:
    path = stored[1].path("run.json")
    path.write_bytes(RUN_JSON[how](path.read_bytes()))
    here = make_run(tmp_path / "here", "")
    before = content(here.path)
    for bring in (
        lambda: pull_run(stored[1].url, StoreSettings(), tmp_path / "runs"),
        lambda: restore.restore(here, stored[1]),
    ):
        with pytest.raises(StoreError, match=r"is no whole run|too big"):
            bring()
    assert content(here.path) == before and not (tmp_path / "runs").exists()
