"""An S3 store when things go wrong on the wire, at the server, with credentials; and what its errors say."""

import hashlib
import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import StoreAway, StoreError
from launcher.storage import PreconditionFailed, StoreSettings, Version, connections, open_store
from launcher.storage.s3 import S3Store
from launcher.storage.wire import Boto, Signed
from tests.launcher.proxy import Fault, Proxy, Request, only_first, proxied
from tests.launcher.store_fixture import Weed, weed

BIG = 17 << 20  # bytes, more than one part


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    with weed(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def proxy(server: Weed, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    server.use(monkeypatch)
    with proxied(server.env["AWS_ENDPOINT_URL"]) as proxy:
        yield proxy


@pytest.fixture
def store(server: Weed, proxy: Proxy, tmp_path: Path) -> S3Store:
    """Through the proxy; what is probed once is known already."""
    store = opened(server, proxy.url, tmp_path.name)
    assert (store.conditional, store.bucket.guard, store.verifies) == (True, "checksum", True)
    proxy.seen.clear()
    return store


def opened(server: Weed, url: str, prefix: str) -> S3Store:
    store = open_store(f"s3://runs/{prefix}", replace(server.settings, endpoint=url))
    assert isinstance(store, S3Store) and isinstance(store.bucket.wire, Signed)
    return store


def file(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "source"
    path.write_bytes(data)
    return path


def is_body(request: Request) -> bool:
    return request.method in ("GET", "PUT") and "list-type" not in request.path


def test_the_answer_to_a_conditional_put_was_lost(store: S3Store, proxy: Proxy, tmp_path: Path) -> None:
    """It is sent again and gets a 412 for our own object: that is no failure."""
    proxy.rule = only_first(1, Fault(lost=True), is_body)
    etag = store.put_bytes("owner", b"token 1", if_absent=True)
    proxy.rule = only_first(1, Fault(lost=True), is_body)
    etag = store.put_bytes("owner", b"token 2", if_match=etag)
    assert store.get_bytes("owner") == (b"token 2", etag)
    path = file(tmp_path, os.urandom(BIG))
    for key in ("small", "big"):
        proxy.rule = only_first(1, Fault(lost=True), lambda request: request.method in ("PUT", "POST"))
        store.put_file(key, path, if_absent=True)
        proxy.rule = only_first(
            1, Fault(lost=True), lambda request: request.method == "POST" and "uploadId" in request.path
        )
        store.put_file(f"{key}-completed", path, if_absent=True)
        with pytest.raises(PreconditionFailed):
            store.put_file(key, path, if_absent=True)
    store.sweep()  # of an upload whose begin was not heard nobody knows but the store


@pytest.mark.parametrize("guard", ["checksum", "etag"])
@pytest.mark.parametrize("size", [10_000, BIG])
def test_bits_that_flip_on_the_way(
    store: S3Store, proxy: Proxy, tmp_path: Path, size: int, guard: str
) -> None:
    store.bucket.__dict__["refuses"] = guard
    data = os.urandom(size)
    path = file(tmp_path, data)
    proxy.rule = only_first(1, Fault(flip_request=True), lambda request: request.size > 5000)
    store.put_file("key", path)
    assert store.digest("key") == (size, hashlib.sha256(data).hexdigest())
    proxy.rule = only_first(1, Fault(flip_response=True), is_body)
    store.get_file("key", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    proxy.rule = lambda request: Fault(flip_response=True) if request.method == "GET" else None
    with pytest.raises(StoreError, match="/key does not come as it was stored"):
        store.get_file("key", tmp_path / "never")
    proxy.rule = lambda request: Fault(flip_request=True) if request.size > 5000 else None
    with pytest.raises(StoreError, match="/new "):
        store.put_file("new", path)
    proxy.rule = lambda request: None
    assert [entry.key for entry in store.list()] == ["key"] and store.sweep() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "source"]


def test_a_small_document_is_verified_too(store: S3Store, proxy: Proxy) -> None:
    store.put_bytes("doc", b"0123456789")
    proxy.rule = only_first(1, Fault(flip_response=True), is_body)
    assert store.get_bytes("doc")[0] == b"0123456789"


def test_answers_that_are_cut(store: S3Store, proxy: Proxy, tmp_path: Path) -> None:
    path = file(tmp_path, os.urandom(BIG))
    store.put_file("key", path)
    proxy.rule = only_first(2, Fault(cut=100_000), is_body)
    store.get_file("key", tmp_path / "back")
    proxy.rule = only_first(2, Fault(cut=100_000), is_body)
    assert store.digest("key")[1] == hashlib.sha256((tmp_path / "back").read_bytes()).hexdigest()


def test_a_store_that_is_busy(
    store: S3Store, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.storage.answers.LONGEST_PAUSE", 0.01)
    dice = random.Random(7)
    proxy.rule = lambda request: Fault(status=503) if dice.random() < 0.3 else None
    path = file(tmp_path, os.urandom(BIG))
    store.put_file("big", path)
    for number in range(30):
        store.put_bytes(f"{number}", b"x")
    assert len(list(store.list())) == 31
    proxy.rule = lambda request: Fault(status=503)
    proxy.seen.clear()
    with pytest.raises(StoreAway, match="SlowDown"):
        store.put_bytes("never", b"x")
    assert len(proxy.seen) == 8


@pytest.mark.parametrize("fault", [Fault(silent=True), Fault(trickle=True)])
def test_a_store_that_does_not_get_on(
    store: S3Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    store.put_bytes("key", b"x" * 1000)
    for name in ("SILENCE", "PATIENCE"):
        monkeypatch.setattr(connections, name, 0.7)
    pool = store.bucket._access.connections._idle
    connections._close(pool)  # new ones have the new patience
    pool.clear()
    proxy.rule = lambda request: fault
    for call in (lambda: store.get_bytes("key"), lambda: list(store.list())):
        proxy.seen.clear()
        with pytest.raises(StoreAway, match="does not answer"):
            call()
        assert len(proxy.seen) == 3


def test_what_is_stored_is_not_sent_again(store: S3Store, proxy: Proxy, tmp_path: Path) -> None:
    log = file(tmp_path, os.urandom(BIG))
    base = store.put_file("log", log, growing=True)
    with log.open("ab") as file_:
        file_.write(b"a few more lines")
    proxy.seen.clear()
    store.grow_file("log", log, base)
    assert proxy.sent() < 2000  # the end of the file, and what is said at the end of an upload


def test_a_connection_that_the_store_has_closed(store: S3Store) -> None:
    store.put_bytes("key", b"1")
    for connection in next(iter(store.bucket._access.connections._idle.values())):
        connection.sock.shutdown(socket.SHUT_RDWR)
    assert store.get_bytes("key")[0] == b"1"


def test_conditions_that_the_store_ignores(store: S3Store, tmp_path: Path) -> None:
    """Then we look before and after: not safe against everybody, but against those that came before."""
    store.bucket.__dict__["conditional"] = False
    first = store.put_bytes("doc", b"1", if_absent=True)
    for condition in ({"if_absent": True}, {"if_match": '"other"'}):
        with pytest.raises(PreconditionFailed):
            store.put_bytes("doc", b"2", **condition)  # type: ignore[arg-type]
    second = store.put_bytes("doc", b"3", if_match=first)
    with pytest.raises(PreconditionFailed):
        store.grow_file("doc", file(tmp_path, b"34"), Version(1, first))
    assert store.grow_file("doc", file(tmp_path, b"34"), Version(1, second)).size == 2


def test_through_boto3_alone(store: S3Store, tmp_path: Path) -> None:
    """As behind a proxy, or with a signature that is not the usual one."""
    store.bucket.__dict__["wire"] = Boto(store.bucket._client, "runs")
    data = os.urandom(BIG)
    for key, size in (("empty", 0), ("small", 1000), ("big", BIG)):
        store.put_file(key, file(tmp_path, data[:size]), if_absent=True)
        store.get_file(key, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == data[:size]
    assert store.get_bytes("small")[0] == data[:1000]


def test_credentials_are_looked_at_for_each_request(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """So those that are refreshed meanwhile go on."""
    wire = store.bucket.wire
    assert isinstance(wire, Signed)
    frozen = []
    known = wire._credentials

    class Counting:
        def get_frozen_credentials(self) -> object:
            frozen.append(1)
            return known.get_frozen_credentials()

    monkeypatch.setattr(wire, "_credentials", Counting())
    store.put_bytes("a", b"1")
    store.get_bytes("a")
    assert len(frozen) == 2


def test_credentials_that_are_rewritten_in_their_file(
    server: Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both for boto3's requests and for ours; a file that is torn for a moment changes nothing."""
    server.use(monkeypatch)
    path, good = tmp_path / "credentials", (server.folder / "credentials").read_text()
    path.write_text(good)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    store = open_store(f"s3://runs/{tmp_path.name}", server.settings)
    store.put_bytes("a", b"1")
    path.write_text(good.replace(server.secret, "AnotherSecret"))
    for call in (store.check, lambda: store.put_bytes("b", b"1")):
        with pytest.raises(StoreError, match="credentials are refused"):
            call()
    path.write_text(good)
    store.check()
    store.put_bytes("b", b"1")
    for torn in ("[half", ""):
        path.write_text(torn)
        store.check()
    path.unlink()
    store.put_bytes("c", b"1")
    assert {entry.key for entry in store.list()} == {"a", "b", "c"}


CONFIG = """
[profile plain]
aws_access_key_id = k
aws_secret_access_key = s
[profile full]
aws_access_key_id = k
aws_secret_access_key = s
region = eu-there
endpoint_url = http://of.the.profile:9000
s3 =
    addressing_style = virtual
"""
OWN = {"endpoint": "http://of.the.recipe", "region": "eu-here"}
OF_ENV = {"AWS_ENDPOINT_URL": "http://of.env", "AWS_DEFAULT_REGION": "eu-env"}


@pytest.mark.parametrize(
    ("settings", "env", "base", "region"),
    [
        ({"profile": "plain"}, {}, "https://runs.s3.amazonaws.com/", "us-east-1"),
        ({"profile": "plain"}, OF_ENV, "http://of.env/runs/", "eu-env"),
        ({"profile": "full"}, {}, "http://runs.of.the.profile:9000/", "eu-there"),
        ({}, {"AWS_PROFILE": "full"}, "http://runs.of.the.profile:9000/", "eu-there"),
        ({"profile": "full", "path_style": True}, {}, "http://of.the.profile:9000/runs/", "eu-there"),
        ({"profile": "full", **OWN, "path_style": True}, OF_ENV, "http://of.the.recipe/runs/", "eu-here"),
        ({"profile": "plain", **OWN}, {}, "http://of.the.recipe/runs/", "eu-here"),
        ({"profile": "plain", **OWN, "path_style": False}, {}, "http://runs.of.the.recipe/", "eu-here"),
    ],
)
def test_recipe_environment_and_profile(
    settings: dict[str, Any], env: dict[str, str], base: str, region: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What the recipe has goes before the environment, and that before the profile."""
    (tmp_path / "config").write_text(CONFIG)
    for name, value in {"AWS_CONFIG_FILE": f"{tmp_path}/config", "no_proxy": "*", **env}.items():
        monkeypatch.setenv(name, value)
    store = open_store("s3://runs/x", StoreSettings(**settings))
    assert isinstance(store, S3Store) and isinstance(store.bucket.wire, Signed)
    assert (store.bucket.wire._base, store.bucket.wire._region) == (base, region)


def test_over_https_with_an_authority_of_ones_own(
    server: Weed, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl to make a certificate with")
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run(make, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    proxy._server.socket = context.wrap_socket(proxy._server.socket, server_side=True)
    settings = replace(server.settings, endpoint=proxy.url.replace("http:", "https:"))
    with pytest.raises(StoreError, match=r"certificate .* is not trusted") as caught:
        open_store("s3://runs/tls", settings).check()
    assert "storage.ca_bundle" in caught.value.hint and not isinstance(caught.value, StoreAway)
    store = open_store("s3://runs/tls", replace(settings, ca_bundle=cert))
    store.check()
    store.put_file("big", file(tmp_path, os.urandom(BIG)))
    assert store.digest("big")[0] == BIG
    with pytest.raises(StoreError, match=r"nowhere\.pem"):
        open_store("s3://runs/tls", replace(settings, ca_bundle="/nowhere.pem"))


def check_fails(url: str, settings: StoreSettings, *words: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(url, settings).check()
    said = f"{caught.value.message} {caught.value.hint}"
    assert "\n" not in said and all(word in said for word in words), said
    assert not isinstance(caught.value, StoreAway)


def test_errors_are_clear_sentences(server: Weed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server.use(monkeypatch)
    where = server.settings.endpoint.removeprefix("http://")  # type: ignore[union-attr]
    check_fails("s3://nowhere/x", server.settings, "no bucket 'nowhere'", where, "storage.url")
    check_fails("s3://runs/x", StoreSettings(server.settings.endpoint, profile="nobody"), "nobody", "profile")
    wrong = tmp_path / "credentials"
    wrong.write_text((server.folder / "credentials").read_text().replace(server.secret, "AnotherSecret"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(wrong))
    check_fails("s3://runs/x", server.settings, "credentials are refused", "'runs'", where)
    with pytest.raises(StoreError, match="credentials are refused"):
        open_store("s3://runs/x", server.settings).put_bytes("key", b"x")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.delenv("AWS_PROFILE")
    check_fails("s3://runs/x", StoreSettings(server.settings.endpoint), "no usable credentials", where)
    with pytest.raises(StoreError, match="no usable credentials"):
        open_store("s3://runs/x", StoreSettings(server.settings.endpoint)).put_bytes("key", b"x")
    server.use(monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    away = StoreSettings(f"http://user:pass@127.0.0.1:{port}", "us-east-1")
    for call in (lambda store: store.check(), lambda store: store.get_bytes("key")):
        with pytest.raises(StoreAway) as caught:
            call(open_store("s3://runs/x", away))
        said = caught.value.message
        assert f"127.0.0.1:{port} does not answer" in said and "pass" not in said


def test_importing_costs_nothing() -> None:
    code = "import sys, launcher.storage; print([m for m in ('boto3', 'botocore') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
