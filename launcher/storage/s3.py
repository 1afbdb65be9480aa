"""An S3-compatible store: whole files and objects, from the requests of bucket.py.

Bodies are read here, exactly as long as the file was: s3transfer hangs on a file that gets shorter (measured)
and knows no conditional puts.
"""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.errors import StoreError
from launcher.storage.answers import Gone
from launcher.storage.base import (
    MAX_DOCUMENT,
    Damaged,
    Entry,
    Info,
    Level,
    PreconditionFailed,
    Store,
    StoreSettings,
    Version,
    checked,
)
from launcher.storage.bucket import Bucket, Condition, Steps
from launcher.storage.files import Changed, Source, opened, write_at, written_aside
from launcher.storage.integrity import is_whole, parts_fit
from launcher.storage.parts import COPY, MAX_PARTS, MIN_PART, PART, Span, even_spans, spans
from launcher.storage.wire import META, Headers, info_of, md5_of, metadata_of

Seen = tuple["hashlib._Hash", Headers]

BATCH = 1000  # keys that one DeleteObjects takes
LOOKS = 3  # at an object that is written meanwhile


class S3Store(Store):
    """Keys are below `prefix` of `bucket`."""

    def __init__(self, bucket: str, prefix: str, settings: StoreSettings) -> None:
        self.prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.bucket = Bucket(bucket, settings, self.prefix)

    @property
    def conditional(self) -> bool:
        return self.bucket.conditional

    @property
    def verifies(self) -> bool:
        return self.bucket.refuses == "signed" or self.bucket.guard == "checksum"

    def check(self) -> None:
        # A listing and not head_bucket: the answer to a HEAD has no body, so it does not say what is wrong.
        self.bucket.ask("list_objects_v2", Prefix=self.prefix, MaxKeys=1)

    def put_file(self, key: str, path: Path, *, if_absent: bool = False, growing: bool = False) -> Version:
        with opened(path, still=not growing) as source:
            return self._put(self._key(key), source, {"IfNoneMatch": "*"} if if_absent else {}, growing)

    def grow_file(self, key: str, path: Path, base: Version) -> Version:
        name, condition = self._key(key), {"IfMatch": base.etag}
        with opened(path) as source:
            if source.size < base.size:
                raise Changed("the file is shorter than what was stored of it")
            if base.size < MIN_PART:
                return self._put(name, source, condition, growing=True)
            there = self.stat(key)
            if (there.size, there.etag) != (base.size, base.etag):
                raise PreconditionFailed(f"{self.url}/{key} was changed by another writer")
            seen = source.sha256(base.size)
            if there.sha256 not in (None, seen.hexdigest()):
                raise Changed("what was stored of the file is no longer how it begins")
            if source.size == base.size:
                return base
            for chunk in source.chunks(base.size):
                seen.update(chunk)
            copies = self._copies(name, {"Bucket": self.bucket.name, "Key": name}, base.size, base.etag)
            rest = spans(base.size, source.size, parts=MAX_PARTS - len(copies))
            sends = [partial(self._send_part, name, source, span, "") for span in rest]
            return self._put_parts(name, source, seen.hexdigest(), [*copies, *sends], condition, growing=True)

    def put_bytes(
        self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": if_match} if if_match else {}
        return self.bucket.put(self._key(key), data, {}, condition)

    def get_bytes(self, key: str) -> tuple[bytes, str]:
        def once() -> tuple[bytes, str]:
            with self.bucket.reading(self._key(key)) as (headers, chunks):
                if int(headers["content-length"]) > MAX_DOCUMENT:
                    raise StoreError(f"{self.url}/{key} is too big to be what its name says")
                data = b"".join(map(bytes, chunks))
            if not is_whole(headers, lambda kind: hashlib.new(kind, data, usedforsecurity=False)):
                raise self._damaged(key)
            return data, headers["etag"]

        return self.bucket.retried(once, self._key(key))

    def get_file(self, key: str, path: Path, *, durable: bool = True, expect: Entry | None = None) -> Info:
        for again in reversed(range(LOOKS)):
            try:
                return self._get_file(key, path, durable, expect or self.stat(key))
            except PreconditionFailed:  # the last words of a writer that died may come that late
                if expect or not again:
                    raise
        raise AssertionError("unreachable")

    def _get_file(self, key: str, path: Path, durable: bool, there: Entry | Info) -> Info:
        with written_aside(path, durable) as fd:
            headers, good, sha256 = self._bring(key, fd, there.size, there.etag)
            if not good:
                headers, good, again = self._bring(key, fd, there.size, there.etag)
                # Not every store's etag of parts is made of MD5s: what twice came the same has come well.
                certain = META + "sha256" in headers or md5_of(headers)
                if not good and (certain or again != sha256):
                    raise self._damaged(key)
        return info_of(headers)

    def digest(self, key: str) -> tuple[int, str]:
        there, seen = self.stat(key), hashlib.sha256()

        def more(span: Span) -> "hashlib._Hash":
            now = seen.copy()
            with self.bucket.reading(self._key(key), there.etag, span) as (_, chunks):
                for chunk in chunks:
                    now.update(chunk)
            return now

        for span in spans(0, there.size, 4 * PART):
            seen = self.bucket.retried(partial(more, span), self._key(key))
        return there.size, seen.hexdigest()

    def stat(self, key: str) -> Info:
        return info_of(self.bucket.head(self._key(key)))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        for page in self.bucket.pages("list_objects_v2", self.prefix + prefix):
            yield from map(self._entry, page.get("Contents", ()))

    def level(self, prefix: str = "") -> Level:
        folders: list[str] = []
        entries: list[Entry] = []
        for page in self.bucket.pages("list_objects_v2", self.prefix + prefix, Delimiter="/"):
            folders += [item["Prefix"][len(self.prefix) :] for item in page.get("CommonPrefixes", ())]
            entries += map(self._entry, page.get("Contents", ()))
        return folders, entries

    def copy(self, key: str, source: Store, source_key: str, expect: Entry | None = None) -> None:
        if not isinstance(source, S3Store) or source.bucket.account != self.bucket.account:
            return super().copy(key, source, source_key, expect)
        name, place = self._key(key), {"Bucket": source.bucket.name, "Key": source._key(source_key)}
        headers = source.bucket.head(place["Key"])
        there = info_of(headers)
        if expect and expect.etag not in ("", there.etag):
            raise PreconditionFailed(f"{source.url}/{source_key} was changed by another writer")
        if there.size <= COPY:
            self.bucket.ask("copy_object", name, CopySource=place, CopySourceIfMatch=there.etag)
        else:
            self.bucket.assemble(
                name, metadata_of(headers), self._copies(name, place, there.size, there.etag), {}
            )

    def delete(self, key: str) -> None:
        self.bucket.ask("delete_object", self._key(key))

    def delete_many(self, keys: Iterable[str]) -> None:
        names = map(self._key, keys)
        while batch := [{"Key": name} for name in islice(names, BATCH)]:
            answer = self.bucket.ask("delete_objects", Delete={"Objects": batch, "Quiet": True})
            for left in answer.get("Errors", ()):
                raise self.bucket.error({"Error": left}, left["Key"])

    def sweep(self, prefix: str = "") -> int:
        pages = self.bucket.pages("list_multipart_uploads", self.prefix + prefix)
        uploads = [upload for page in pages for upload in page.get("Uploads", ())]
        for upload in uploads:
            with contextlib.suppress(Gone):
                self.bucket.ask("abort_multipart_upload", upload["Key"], UploadId=upload["UploadId"])
        return len(uploads)

    def _key(self, key: str) -> str:
        return self.prefix + checked(key)

    def _entry(self, item: dict[str, Any]) -> Entry:
        key = item["Key"][len(self.prefix) :]
        return Entry(key, item["Size"], item["LastModified"].timestamp(), item.get("ETag", ""))

    def _put(self, name: str, source: Source, condition: Condition, growing: bool) -> Version:
        if source.size > PART:
            pieces = spans(0, source.size)
            sha256, each = source.hashes(pieces)
            steps = [partial(self._send_part, name, source, *one) for one in zip(pieces, each, strict=True)]
            return self._put_parts(name, source, sha256, steps, condition, growing)
        with self.bucket.pool.room(source.size):
            body = source.read(source.size)
            if source.changed() and not growing:
                raise Changed("the file was written to while it was being sent")
            return Version(source.size, self.bucket.put(name, body, _marks(source), condition))

    def _put_parts(
        self, name: str, source: Source, sha256: str, steps: Steps, condition: Condition, growing: bool
    ) -> Version:
        def settled() -> None:
            # What was hashed first and sent afterwards must be one and the same.
            if source.changed() and not (growing and source.sha256().hexdigest() == sha256):
                raise Changed("the file was written to while it was being sent")

        metadata = {**_marks(source), "sha256": sha256}
        return Version(source.size, self.bucket.assemble(name, metadata, steps, condition, settled))

    def _send_part(self, name: str, source: Source, span: Span, sha256: str, upload: dict[str, Any]) -> str:
        """`sha256`: of the part, if it is known."""
        with self.bucket.pool.room(span.size):
            body = source.read(span.size, span.start)
            if not sha256 or source.changed():  # then it is another, and _put_parts sees whether that matters
                sha256 = hashlib.sha256(body).hexdigest()
            return self.bucket.send("upload_part", name, body, sha256, **upload)

    def _copies(self, name: str, place: dict[str, str], size: int, etag: str) -> Steps:
        """Steps that copy an object inside the store, as long as it has this etag."""

        def copy(span: Span, upload: dict[str, Any]) -> str:
            where = f"bytes={span.start}-{span.start + span.size - 1}"
            answer = self.bucket.ask("upload_part_copy", name, CopySource=place, CopySourceIfMatch=etag,
                                     CopySourceRange=where, **upload)  # fmt: skip
            return str(answer["CopyPartResult"]["ETag"])

        return [partial(copy, span) for span in even_spans(size, COPY)]

    def _bring(self, key: str, fd: int, size: int, etag: str) -> tuple[Headers, bool, str]:
        """Fill a file; and whether it is what was once sent, and its SHA-256."""
        name, file = self._key(key), Source(fd, os.fstat(fd))

        def fetch(span: Span, before: Callable[[], Seen]) -> Seen:
            with self.bucket.pool.buffer(span.size) as buffer:
                headers = self.bucket.retried(partial(receive, span, buffer), name)
                seen, _ = before()
                seen.update(buffer)  # while the next ones come
            return seen, headers

        def receive(span: Span, buffer: memoryview) -> Headers:
            with self.bucket.reading(name, etag, span, buffer) as (headers, chunks):
                at = span.start
                for chunk in chunks:
                    write_at(fd, chunk, at)
                    at += len(chunk)
            return headers

        parts = spans(0, size, parts=size or 1)  # requests, of which there may be any number
        start: Seen = hashlib.sha256(), {}
        seen, headers = self.bucket.pool.chain(start, [partial(fetch, span) for span in parts])
        good = is_whole(headers, lambda kind: seen if kind == "sha256" else file.hashed(kind, size))
        good = good and parts_fit(self.bucket, name, headers, file, size)
        return headers, good, seen.hexdigest()

    def _damaged(self, key: str) -> Damaged:
        return Damaged(f"{self.url}/{key} does not come as it was stored: its hash is another")


def _marks(source: Source) -> dict[str, str]:
    """What goes beside a file: its time, and a word by which this very put knows its own object again."""
    return {"mtime-ns": str(source.mtime_ns), "put": secrets.token_hex(8)}
