"""HTTP as stores, and what stands between, speak it."""

import io
import socket
import threading
import time

import pytest

from launcher.storage import connections
from launcher.storage.exchange import MOST, Garbled, Response, head


def answer(text: bytes, method: str = "GET") -> Response:
    return Response(method, io.BufferedReader(io.BytesIO(text)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "body", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcdeHTTP/1.1", b"abcde", True),
        (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", b"", True),
        (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nab", b"ab", True),
        (b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1", b"", True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na", b"a", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
         b"3;why=not\r\nabc\r\nA\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\nHTTP/1.1", b"abc0123456789", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\na", b"a", False),
        (b"HTTP/1.1 200 OK\r\n\r\nas long as it lasts", b"as long as it lasts", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\na", b"a", False),
        (b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 1\r\n\r\na", b"a", True),
    ],
)  # fmt: skip
def test_bodies(text: bytes, body: bytes, kept: bool) -> None:
    response = answer(text)
    assert (response.status // 100, response.read(), response.done, response.kept) == (2, body, True, kept)
    assert response.read() == b""


def test_the_answer_to_a_head_has_no_body() -> None:
    response = answer(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "HEAD")
    assert response.read() == b"" and response.done and response.kept
    assert response.headers["content-length"] == "5"


def test_a_body_that_is_not_read_to_its_end() -> None:
    response = answer(b"HTTP/1.1 500 Oh\r\nContent-Length: 5\r\n\r\nabcde")
    assert response.read(3) == b"abc"
    assert answer(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcde").done is False


def test_headers() -> None:
    response = answer(
        b"HTTP/1.1 200 OK\r\nETag:  \"x\" \r\nx-amz-meta-Name: caf\xe9: au lait\r\nFolded: one\r\n two\r\n"
        b"Vary: a\r\nVary: b\r\nContent-Length: 0\r\n\r\n"
    )  # fmt: skip
    told = {"etag": '"x"', "x-amz-meta-name": "café: au lait", "folded": "one two", "vary": "a, b"}
    assert response.headers == told | {"content-length": "0"}


@pytest.mark.parametrize(
    "text",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 xxx\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nETag",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * (MOST + 1) + b"\r\n",
        b"HTTP/1.1 200 OK\r\na: " + b"b" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ],
)
def test_what_is_not_http(text: bytes) -> None:
    with pytest.raises(Garbled):
        answer(text).read()


def test_a_store_that_hangs_up() -> None:
    with pytest.raises(ConnectionResetError):
        answer(b"")


def test_requests() -> None:
    assert head("GET", "/a?b=c", "here:1", {}, 0) == (
        b"GET /a?b=c HTTP/1.1\r\nAccept-Encoding: identity\r\nHost: here:1\r\n\r\n"
    )
    said = head("PUT", "/a", "here", {"host": "there", "x": b"1"}, 5)
    assert b"here\r\nx: 1\r\nContent-Length: 5\r\n\r\n" in said and said.count(b"ost:") == 1
    assert b"Content-Length: 0\r\n" in head("POST", "/a", "here", {}, 0)
    for split in ("a\r\nb: c", "a\nb", "a\r"):
        with pytest.raises(ValueError, match="lines"):
            head("GET", "/", "here", {"x": split}, 0)


def test_patience_with_an_answer_begins_when_all_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PATIENCE", 0.5)
    body = b"x" * (32 << 20)  # more than the kernel keeps on its way
    with socket.create_server(("127.0.0.1", 0)) as server:

        def slow() -> None:
            client, _ = server.accept()
            with client, client.makefile("rb") as file:
                time.sleep(1.0)
                while file.readline() != b"\r\n":
                    pass
                file.read(len(body))
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=slow)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/key"
        with connections.Connections(None).exchange("PUT", url, {}, body) as answer:
            assert answer.status == 200
        thread.join()
