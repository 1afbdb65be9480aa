"""One bucket, request by request: each is tried again as answers.py says, and a condition is kept.

Control (listings, copies, deletes, the beginning and end of uploads in parts) is boto3's, bodies are
wire.py's. Their integrity comes from the SHA-256 of each: it is signed, and stands in a header of its own for
stores that compare only that one. The newer checksum trailers, which some stores refuse and one has stored
inside the object (boto3#4392, #4435), stay off.
"""

import contextlib
import hashlib
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import cached_property, partial
from typing import Any, TypeVar

from launcher.errors import StoreAway, StoreError
from launcher.storage import probes
from launcher.storage.answers import Answers, Gone, Unexplained
from launcher.storage.base import Damaged, NotFound, PreconditionFailed, StoreSettings
from launcher.storage.client import Access
from launcher.storage.parts import Pool, Span
from launcher.storage.wire import META, Headers, Read, Wire, md5_of

T = TypeVar("T")

Condition = dict[str, str]  # IfNoneMatch or IfMatch, or nothing
Answer = tuple[Headers, Iterator[memoryview]]
Step = Callable[[dict[str, Any]], str]  # makes a part of an upload, which these parameters name; its etag
Steps = Sequence[Step]

CHUNK = 1 << 20
LOST = timedelta(minutes=1)  # no longer ago than this an upload was begun that is ours
NEXT = {  # what asks for the next page, and what of the one before tells it
    "list_objects_v2": {"ContinuationToken": "NextContinuationToken"},
    "list_multipart_uploads": {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"},
}


class Bucket:
    """Keys are whole here. Below `prefix` keys may be made for a moment, to see what the store can do."""

    def __init__(self, name: str, settings: StoreSettings, prefix: str) -> None:
        self.name, self.settings, self.prefix = name, settings, prefix
        self._answers = Answers(name, "the store", settings.endpoint)
        with self._answers.speaking():
            self._access = Access(settings)
        self.where, self.endpoint = self._access.where, self._access.url
        self._client = self._access.client
        self._answers = Answers(name, self.where, settings.endpoint)
        self.account = (self.where, settings)
        self.retried, self.error = self._answers.retried, self._answers.error
        self.speaking = self._answers.speaking
        self.pool = Pool()
        # Whoever transfers for a person sets these: the first is told of every piece that comes and goes, and
        # may raise to end it; the second is entered around each upload in parts, and told its id.
        self.watch: Callable[[int], None] = lambda size: None
        self.recorded: Callable[[str], contextlib.AbstractContextManager[Callable[[str], None]]] = _unrecorded

    @cached_property
    def wire(self) -> Wire:
        return self._access.wire(self.name)

    def ask(self, operation: str, key: str = "", **params: Any) -> Any:
        """boto3's answer."""
        named = {"Key": key} if key else {}
        call = partial(getattr(self._client, operation), Bucket=self.name, **named, **params)
        return self.retried(call, key)

    def pages(self, operation: str, prefix: str, **params: Any) -> Iterator[dict[str, Any]]:
        """Each page is tried again by itself: a paginator of boto3's that has failed once is at its end, and
        says no more than that."""
        following: dict[str, Any] = {}
        while page := self.ask(operation, Prefix=prefix, **params, **following):
            yield page
            if not page.get("IsTruncated"):
                return
            before, following = following, {name: page.get(said) for name, said in NEXT[operation].items()}
            if following == before or not all(following.values()):
                raise StoreAway(f"the listing of s3://{self.name}/{prefix} stops in its middle")

    def head(self, key: str, **params: Any) -> Headers:
        try:
            headers: Headers = self.ask("head_object", key, **params)["ResponseMetadata"]["HTTPHeaders"]
        except Unexplained:
            self.ask("list_objects_v2", Prefix=key, MaxKeys=1)  # an answer with a body: it may say why
            raise
        return headers

    @contextlib.contextmanager
    def reading(
        self, key: str, etag: str = "", span: Span | None = None, room: memoryview | None = None
    ) -> Iterator[Answer]:
        """One GET, tried once: headers, and the body as it comes, in what is then the next of `room`; where
        that has an end it begins anew. Another object than `etag` is PreconditionFailed."""
        params = {"IfMatch": etag} if etag else {}
        if span and span.size:
            params["Range"] = f"bytes={span.start}-{span.start + span.size - 1}"
        with self.speaking(key), self.wire.get(Key=key, **params) as (headers, read):
            size = int(headers.get("content-length", -1))
            if size < 0 or (span and size != span.size):
                expected = f" instead of {span.size}" if span else ""
                raise Damaged(f"s3://{self.name}/{key} has come with {size} bytes{expected}")
            room = memoryview(bytearray(min(size, CHUNK))) if room is None else room
            yield headers, _exactly(size, read, room, self.watch)

    def put(self, key: str, body: bytes, metadata: dict[str, str], condition: Condition) -> str:
        """PutObject; the etag. `metadata` tells our own object, found in our way after a lost answer."""
        sha256 = hashlib.sha256(body).hexdigest()
        metadata = {**metadata, "sha256": sha256}
        send = partial(self.send, "put_object", key, body, sha256, Metadata=metadata)
        return self._under(condition, key, metadata, lambda condition: send(**condition))

    def send(self, operation: str, key: str, body: bytes, sha256: str, **params: Any) -> str:
        """A body to the store; its etag. Where the store looks at no hash of ours, MD5 tells."""
        if self.guard == "checksum":
            params["ChecksumSHA256"] = b64encode(bytes.fromhex(sha256)).decode()
        md5 = hashlib.md5(body, usedforsecurity=False) if self.guard == "etag" else None
        if md5:
            params["ContentMD5"] = b64encode(md5.digest()).decode()

        def once() -> str:
            self.watch(len(body))
            headers = self.wire.put(operation, sha256, Key=key, Body=body, **params)
            if md5 and md5_of(headers) not in (None, md5.hexdigest()):
                if params.pop("IfNoneMatch", None) or "IfMatch" in params:
                    params["IfMatch"] = headers["etag"]  # what is there now is ours, to be put again
                raise Damaged(f"s3://{self.name}/{key} is not stored as it was sent")
            return headers.get("etag", "")

        return self.retried(once, key)

    def assemble(
        self, key: str, metadata: dict[str, str], steps: Steps, condition: Condition,
        settled: Callable[[], None] = lambda: None,
    ) -> str:  # fmt: skip
        """An upload in parts; the etag. `settled` may raise before it counts. What fails is taken away."""
        with self.recorded(key) as begun:
            upload: dict[str, Any] = {"UploadId": self._upload(key, metadata)}
            try:
                begun(upload["UploadId"])
                calls = [partial(step, {**upload, "PartNumber": n}) for n, step in enumerate(steps, 1)]
                tags = list(self.pool.in_order(calls))
                settled()
                parts = {"Parts": [{"PartNumber": n, "ETag": tag} for n, tag in enumerate(tags, 1)]}
                end = partial(self.ask, "complete_multipart_upload", key, MultipartUpload=parts, **upload)
                return self._under(condition, key, metadata, lambda condition: str(end(**condition)["ETag"]))
            except BaseException:
                # If the store is away the caller is about to hear it, and sweep() removes the parts.
                with contextlib.suppress(StoreError), self.speaking(key):
                    self._client.abort_multipart_upload(Bucket=self.name, Key=key, **upload)
                raise

    def abort(self, key: str, upload: str | None) -> None:
        """Take away an upload in parts that nobody carries on; without an id all to exactly this key."""
        for one in [upload] if upload else list(self._uploads(key)):
            with contextlib.suppress(Gone):
                self.ask("abort_multipart_upload", key, UploadId=one)

    def _upload(self, key: str, metadata: dict[str, str]) -> str:
        """A new upload. Of one whose answer was lost nobody has the id: it is looked for and taken away."""
        tries = 0

        def begin() -> str:
            nonlocal tries
            tries += 1
            answer = self._client.create_multipart_upload(Bucket=self.name, Key=key, Metadata=metadata)
            return str(answer["UploadId"])

        upload = self.retried(begin, key)
        if tries > 1:
            begun = self._uploads(key)
            for other, when in begun.items():
                if other != upload and timedelta() <= begun.get(upload, when) - when < LOST:
                    self.abort(key, other)
        return upload

    def _uploads(self, key: str) -> dict[str, datetime]:
        """Uploads to exactly this key, and when each was begun, by the store's clock."""
        pages = self.pages("list_multipart_uploads", key)
        found = (item for page in pages for item in page.get("Uploads", ()))
        return {item["UploadId"]: item["Initiated"] for item in found if item["Key"] == key}

    @cached_property
    def conditional(self) -> bool:
        """Whether both conditions of a put are kept."""
        return probes.conditional(self)

    @cached_property
    def refuses(self) -> probes.Guard:
        """By what the store itself knows a damaged body."""
        return probes.guard(self)

    @property
    def guard(self) -> probes.Guard:
        """What has to tell that a body has arrived whole."""
        return self.refuses if self.settings.checksum == "auto" else self.settings.checksum

    def _under(
        self, condition: Condition, key: str, metadata: dict[str, str], put: Callable[[Condition], str]
    ) -> str:
        """`put` under a condition: the store's own, or as good as looking before and after can make it."""
        if not condition or self.conditional:
            try:
                return put(condition)
            except (PreconditionFailed, NotFound, Gone) as error:
                found = self._found(key)
                if found and all(found.get(META + name) == value for name, value in metadata.items()):
                    return found["etag"]
                if isinstance(error, Gone):
                    raise
                raise PreconditionFailed(error.message) from error
        taken = PreconditionFailed(
            f"s3://{self.name}/{key} is there already or was changed by another writer"
        )
        if (self._found(key) or {}).get("etag") != condition.get("IfMatch"):
            raise taken
        etag = put({})
        if (self._found(key) or {}).get("etag") != etag:
            raise taken
        return etag

    def _found(self, key: str) -> Headers | None:
        try:
            return self.head(key)
        except NotFound:
            return None


def buckets(settings: StoreSettings) -> list[tuple[str, float]]:
    """Names of the account's buckets, and when each was made."""
    answers = Answers("", "the store", settings.endpoint)
    with answers.speaking():
        listed = answers.retried(Access(settings).client.list_buckets)["Buckets"]
    return [(bucket["Name"], bucket["CreationDate"].timestamp()) for bucket in listed]


@contextlib.contextmanager
def _unrecorded(key: str) -> Iterator[Callable[[str], None]]:
    yield lambda upload: None


def _exactly(size: int, read: Read, room: memoryview, watch: Callable[[int], None]) -> Iterator[memoryview]:
    at = 0
    while size:
        chunk = room[at : at + min(size, CHUNK)]
        if not (count := read(chunk)):
            raise StoreAway("the store has stopped in the middle of an object")
        size -= count
        at = (at + count) % len(room)
        watch(count)
        yield chunk[:count]
