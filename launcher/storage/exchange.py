"""HTTP/1.1 as far as stores speak it: the bytes of a request, and the answer to it as it is read.

http.client has headers parsed as those of an e-mail: a third of the time that a small download takes.
"""

from collections.abc import Mapping
from io import BufferedReader
from typing import Any

LONGEST, MOST = 64 << 10, 200  # bytes of a line, and lines of headers, that are read
CHUNK = 64 << 10
BODILESS = {204, 304}


class Garbled(Exception):
    """The answer is not HTTP, or not all of it."""


def head(method: str, target: str, host: str, headers: Mapping[str, str | bytes], size: int) -> bytes:
    """All of a request but its body."""
    texts = {k: v.decode("latin-1") if isinstance(v, bytes) else v for k, v in headers.items()}
    names = {name.lower() for name in texts}
    if "host" not in names:
        texts["Host"] = host
    if "content-length" not in names and (size or method in ("PUT", "POST")):
        texts["Content-Length"] = str(size)
    lines = [f"{method} {target} HTTP/1.1", "Accept-Encoding: identity"]
    lines += [f"{name}: {value}" for name, value in texts.items()]
    text = "\r\n".join(lines)
    if not text.count("\n") == text.count("\r") == len(lines) - 1:
        raise ValueError("a header must not have lines")
    return f"{text}\r\n\r\n".encode("latin-1")


class Response:
    """`headers` have their names in lower case; `done` when the body has been read to its end, and `kept` if
    the connection may then be used again."""

    def __init__(self, method: str, file: "BufferedReader[Any]") -> None:
        self._file = file
        self.status = 100
        while 100 <= self.status < 200:
            version, self.status = self._status()
            self.headers = _headers(file)
        connection = self.headers.get("connection", "").lower()
        length = self.headers.get("content-length")
        self._chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        self._left: int | None = None  # of the body, or of the present chunk; None: until the store hangs up
        if method == "HEAD" or self.status in BODILESS:
            self._left, self._chunked = 0, False
        elif self._chunked:
            self._left = 0
        elif length is not None:
            self._left = _number(length, 10)
        self.done = self._left == 0 and not self._chunked
        self.kept = self._left is not None and connection != "close"
        self.kept &= version == "HTTP/1.1" or connection == "keep-alive"

    def readinto(self, view: memoryview) -> int:
        """Fill `view` as far as the body goes."""
        filled = 0
        while filled < len(view) and not self.done:
            if self._chunked and not self._left:
                self._left = self._chunk()
                continue
            end = None if self._left is None else filled + self._left
            count = self._file.readinto(view[filled:end])
            filled += count
            if self._left is None:
                self.done = not count
            elif not count:
                raise Garbled("cut short")
            else:
                self._left -= count
                self.done = not self._left and not self._chunked
                if self._chunked and not self._left:
                    _line(self._file)
        return filled

    def read(self, limit: int | None = None) -> bytes:
        """The rest of the body, or how it begins."""
        data = bytearray()
        while not self.done and (limit is None or len(data) < limit):
            piece = memoryview(bytearray(CHUNK))
            data += piece[: self.readinto(piece)]
        return bytes(data[:limit])

    def _status(self) -> tuple[str, int]:
        if not self._file.peek(1):
            raise ConnectionResetError("closed without an answer")
        version, _, rest = _line(self._file).partition(" ")
        if not version.startswith("HTTP/1."):
            raise Garbled("not HTTP/1")
        return version, _number(rest[:3], 10)

    def _chunk(self) -> int:
        """The size of the chunk that begins here; the last one is empty."""
        size = _number(_line(self._file).partition(";")[0].strip(), 16)
        if not size:
            _headers(self._file)
            self.done = True
        return size


def _headers(file: "BufferedReader[Any]") -> dict[str, str]:
    found: dict[str, str] = {}
    name = ""
    for _ in range(MOST):
        line = _line(file)
        if not line:
            return found
        if line[0] in " \t" and name:  # the one before goes on
            found[name] += f" {line.strip()}"
            continue
        name, colon, value = line.partition(":")
        if not colon:
            raise Garbled("a header without a name")
        name, value = name.strip().lower(), value.strip()
        found[name] = f"{found[name]}, {value}" if name in found else value
    raise Garbled("too many headers")


def _line(file: "BufferedReader[Any]") -> str:
    line = file.readline(LONGEST)
    if not line.endswith(b"\n"):
        raise Garbled("a line without an end")
    return line.rstrip(b"\r\n").decode("latin-1")


def _number(text: str, base: int) -> int:
    if not text.isalnum():  # a sign or an underscore would do for int()
        raise Garbled(f"{text!r} is no number")
    try:
        return int(text, base)
    except ValueError:
        raise Garbled(f"{text!r} is no number") from None
