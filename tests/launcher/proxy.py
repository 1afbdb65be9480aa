"""An HTTP proxy before a real store that goes wrong as it is told, and counts what passes.

`with proxied(upstream) as proxy:`; clients use `proxy.url` as their endpoint. The signature of a request
covers its Host header, which is passed on as it came, so the store still checks it.
"""

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Rule = Callable[["Request"], "Fault | None"]
HOP = {"connection", "keep-alive", "transfer-encoding"}


@dataclass(frozen=True)
class Request:
    number: int  # counted from 1
    method: str
    path: str  # with its query
    size: int  # of the body, in bytes


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request; without anything set, nothing does."""

    status: int = 0  # answered with, in the store's place
    code: str = "SlowDown"
    flip_request: bool = False  # one bit of the body
    flip_response: bool = False
    silent: bool = False  # accepted, never answered
    cut: int | None = None  # bytes of the answer's body, then the connection is closed
    trickle: bool = False  # a byte a second
    lost: bool = False  # the store does it, and its answer is lost
    after: threading.Event | None = None  # goes on only then


class Proxy:
    """`rule` decides for each request what goes wrong with it; `seen` are the requests in their order."""

    def __init__(self, upstream: str) -> None:
        self.rule: Rule = lambda request: None
        self.seen: list[Request] = []
        self.dropped: set[str] = (
            set()
        )  # headers of requests that the store does not get to see, in lower case
        self.closing = threading.Event()
        self._lock = threading.Lock()
        proxy, host = self, urlsplit(upstream).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.store = http.client.HTTPConnection(host, timeout=60)

            def finish(self) -> None:
                self.store.close()
                with suppress(OSError):  # the client may be gone
                    super().finish()

            def log_message(self, *words: object) -> None:
                pass

            def do_GET(self) -> None:
                with suppress(OSError, http.client.HTTPException):
                    self.pass_on()
                    return
                self.close_connection = True

            do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

            def pass_on(self) -> None:
                if self.headers.get("Expect", "").lower() == "100-continue":
                    self.headers.__delitem__("Expect")
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = proxy.meet(self.command, self.path, len(body))
                if fault.after:
                    fault.after.wait(60)
                if fault.silent:
                    proxy.closing.wait()
                    self.close_connection = True
                    return
                if fault.status:
                    text = f"<Error><Code>{fault.code}</Code><Message>told to</Message></Error>".encode()
                    self.answer(fault.status, [("Content-Type", "application/xml")], text, fault)
                    return
                headers = {
                    name: value for name, value in self.headers.items() if name.lower() not in proxy.dropped
                }
                self.store.request(self.command, self.path, flipped(body, fault.flip_request), headers)
                there = self.store.getresponse()
                if fault.lost:
                    there.read()
                    self.close_connection = True
                    return
                self.answer(there.status, there.getheaders(), there.read(), fault, there.length)

            def answer(
                self,
                status: int,
                headers: list[tuple[str, str]],
                body: bytes,
                fault: Fault,
                length: int | None = None,
            ) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in HOP | {"content-length"}:
                        self.send_header(name, value)
                told = dict((name.lower(), value) for name, value in headers).get("content-length")
                size = told if self.command == "HEAD" and told else str(len(body))
                if status not in (204, 304):
                    self.send_header("Content-Length", size)
                self.end_headers()
                if self.command == "HEAD":
                    return
                body = flipped(body, fault.flip_response)
                if fault.trickle:
                    for position in range(len(body)):
                        self.wfile.write(body[position : position + 1])
                        if proxy.closing.wait(1.0):
                            break
                    return
                self.wfile.write(body if fault.cut is None else body[: fault.cut])
                if fault.cut is not None and fault.cut < len(body):
                    self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def meet(self, method: str, path: str, size: int) -> Fault:
        with self._lock:
            request = Request(len(self.seen) + 1, method, path, size)
            self.seen.append(request)
            return self.rule(request) or Fault()

    def sent(self) -> int:
        """Bytes of bodies that clients have sent."""
        return sum(request.size for request in self.seen)

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


def flipped(body: bytes, wanted: bool) -> bytes:
    """`body` with one bit of its middle changed."""
    if not wanted or not body:
        return body
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


@contextmanager
def proxied(upstream: str) -> Iterator[Proxy]:
    proxy = Proxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()


def only_first(count: int, fault: Fault, match: Callable[[Request], bool] = lambda request: True) -> Rule:
    """The first `count` requests that match go wrong."""
    left = [count]

    def rule(request: Request) -> Fault | None:
        if left[0] and match(request):
            left[0] -= 1
            return fault
        return None

    return rule
