"""Kept-alive HTTP connections whose exchanges have to get on.

urllib3's timeout is that of a single read: a store that sends a byte now and then is waited for without end.
Here a whole exchange ends that moves less than LITTLE in PATIENCE seconds.
"""

import io
import socket
import ssl
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from urllib.parse import SplitResult, urlsplit, urlunsplit

from launcher.errors import StoreAway, StoreError
from launcher.storage.exchange import Garbled, Response, head

CONNECT_WITHIN = 5.0  # seconds
SILENCE = 15.0  # without a byte
PATIENCE = 15.0  # with few
LITTLE = 16 << 10  # bytes
PIECE = 256 << 10  # bytes that are sent with one timeout, so that a slow line is not a dead one
KEPT = 32


class Connection:
    """To one store, for one request after another."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext | None) -> None:
        self.sock = socket.create_connection((host, port), CONNECT_WITHIN)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context:
            self.sock = context.wrap_socket(self.sock, server_hostname=host)
        self.sock.settimeout(SILENCE)
        self._patient = _Patient(self.sock)
        self._file = io.BufferedReader(self._patient)

    def ask(self, method: str, first: bytes, body: bytes) -> Response:
        """`first` goes before the body. The connection is closed after any error."""
        try:
            # An answer may come before all was sent: then it says why the store has stopped to listen.
            with suppress(BrokenPipeError, ConnectionResetError):
                view = memoryview(body if len(body) > PIECE else first + body)
                if len(body) > PIECE:
                    self.sock.sendall(first)
                for start in range(0, len(view), PIECE):
                    self.sock.sendall(view[start : start + PIECE])
            self._patient.begin()  # now: what is sent may take long
            return Response(method, self._file)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.sock.close()


class _Patient(io.RawIOBase):
    """What a socket receives, for as long as it gets on."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def begin(self) -> None:
        self._got, self._until = 0, time.monotonic() + PATIENCE

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._sock.recv_into(buffer)
        self._got += count
        now = time.monotonic()
        if self._got >= LITTLE:
            self._got, self._until = 0, now + PATIENCE
        if now > self._until:
            raise TimeoutError("too slow")
        return count


class Answer:
    """Status and headers, and the body as far as it is read."""

    def __init__(self, response: Response, where: str) -> None:
        self.status, self.headers = response.status, response.headers
        self._response, self._where = response, where

    def read(self, limit: int | None = None) -> bytes:
        with _speaking(self._where):
            return self._response.read(limit)

    def readinto(self, view: memoryview) -> int:
        with _speaking(self._where):
            return self._response.readinto(view)


class Connections:
    """Safe to use from many threads."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self._context = context
        self._idle: dict[str, list[Connection]] = {}
        weakref.finalize(self, _close, self._idle)

    @contextmanager
    def exchange(
        self, method: str, url: str, headers: Mapping[str, str | bytes], body: bytes
    ) -> Iterator[Answer]:
        """One request. Raises StoreAway. The connection is kept if the body was read to its end."""
        there = urlsplit(url)
        where = there.netloc.rpartition("@")[2]
        idle = self._idle.setdefault(f"{there.scheme}://{where}", [])
        target = urlunsplit(("", "", *there[2:4], ""))
        ask = partial(
            Connection.ask, method=method, first=head(method, target, where, headers, len(body)), body=body
        )
        with _speaking(where):
            # A POST that is done twice counts twice: it takes no connection that may be stale.
            connection, response = self._begun([] if method == "POST" else idle, there, ask)
        try:
            yield Answer(response, where)
            if response.done and response.kept and len(idle) < KEPT:
                idle.append(connection)
                return
        except BaseException:
            connection.close()
            raise
        connection.close()

    def _begun(
        self, idle: list[Connection], there: SplitResult, ask: Callable[[Connection], Response]
    ) -> tuple[Connection, Response]:
        with suppress(IndexError, ConnectionError):  # one that the store has closed meanwhile tells nothing
            connection = idle.pop()
            return connection, ask(connection)
        tls = there.scheme == "https"
        port = there.port or (443 if tls else 80)
        connection = Connection(there.hostname or "", port, self._context if tls else None)
        return connection, ask(connection)


def _close(idle: dict[str, list[Connection]]) -> None:
    for connection in chain(*idle.values()):
        connection.close()


@contextmanager
def _speaking(where: str) -> Iterator[None]:
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        why = f"the certificate of {where} is not trusted: {error.verify_message}"
        raise StoreError(why, "set storage.ca_bundle to the file of your own authority") from error
    except (OSError, Garbled) as error:
        raise StoreAway(f"{where} does not answer ({type(error).__name__})") from error
