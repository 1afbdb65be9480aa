"""Kept-alive HTTP connections whose exchanges have to get on.

urllib3's timeout is that of a single read: a store that sends a byte now and then is waited for without end.
Here a whole exchange ends that moves less than LITTLE in PATIENCE seconds.
"""

import http.client
import io
import ssl
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from launcher.errors import StoreAway, StoreError

CONNECT_WITHIN = 5.0  # seconds
SILENCE = 15.0  # without a byte
PATIENCE = 15.0  # with few
LITTLE = 16 << 10  # bytes
PIECE = 256 << 10  # bytes that are sent with one timeout, so that a slow line is not a dead one
KEPT = 32

Connection = http.client.HTTPConnection
Response = http.client.HTTPResponse


class _Patient(io.RawIOBase):
    """What a socket receives, for as long as it gets on."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw, self._got, self._until = raw, 0, time.monotonic() + PATIENCE

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._raw.readinto(buffer) or 0
        self._got += count
        now = time.monotonic()
        if self._got >= LITTLE:
            self._got, self._until = 0, now + PATIENCE
        if now > self._until:
            raise TimeoutError("too slow")
        return int(count)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(Response):
    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.fp = io.BufferedReader(_Patient(self.fp.detach()))


class Answer:
    """Status, headers with their names in lower case, and the body as far as it is read."""

    def __init__(self, response: Response, where: str) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.headers.items()}
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
        request = partial(self._ask, method, urlunsplit(("", "", *there[2:4], "")), headers, body)
        with _speaking(where):
            # A POST that is done twice counts twice: it takes no connection that may be stale.
            reuse = [] if method == "POST" else idle
            connection, response = self._begun(reuse, there.scheme == "https", where, request)
        try:
            yield Answer(response, where)
            if response.isclosed() and not response.will_close and len(idle) < KEPT:
                idle.append(connection)
                return
        except BaseException:
            connection.close()
            raise
        connection.close()

    def _begun(
        self, idle: list[Connection], tls: bool, where: str, request: Callable[[Connection], Response]
    ) -> tuple[Connection, Response]:
        # One that the store has closed meanwhile tells nothing.
        with suppress(IndexError, ConnectionError, ssl.SSLEOFError):
            connection = idle.pop()
            return connection, request(connection)
        if tls:
            connection = http.client.HTTPSConnection(where, timeout=CONNECT_WITHIN, context=self._context)
        else:
            connection = http.client.HTTPConnection(where, timeout=CONNECT_WITHIN)
        connection.response_class = _Response
        connection.connect()
        connection.sock.settimeout(SILENCE)
        return connection, request(connection)

    def _ask(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str | bytes],
        body: bytes,
        connection: Connection,
    ) -> Response:
        try:
            # An answer may come before all was sent: then it says why the store has stopped to listen.
            with suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
                connection.request(method, target, _pieces(body) if body else None, dict(headers))
            return connection.getresponse()
        except BaseException:
            connection.close()
            raise


def _pieces(body: bytes) -> Iterator[memoryview]:
    view = memoryview(body)
    for start in range(0, len(body), PIECE):
        yield view[start : start + PIECE]


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
    except (OSError, http.client.HTTPException) as error:
        raise StoreAway(f"{where} does not answer ({type(error).__name__})") from error
