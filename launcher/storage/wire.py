"""How bodies travel to an S3 store and back."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from launcher.storage.base import Info

CHUNK = 1 << 20
META = "x-amz-meta-"

Headers = Mapping[str, str]
Read = Callable[[int], bytes]


class Boto:
    """Through boto3: any kind of credentials, signature, proxy and endpoint that it knows."""

    def __init__(self, client: Any, bucket: str) -> None:
        self._client, self._bucket = client, bucket

    def put(self, operation: str, sha256: str, **params: Any) -> Headers:
        """PutObject or UploadPart of the bytes `Body`, whose hash is `sha256`."""
        answer = getattr(self._client, operation)(Bucket=self._bucket, **params)
        headers: Headers = answer["ResponseMetadata"]["HTTPHeaders"]
        return headers

    @contextlib.contextmanager
    def get(self, **params: Any) -> Iterator[tuple[Headers, Read]]:
        """GetObject: its headers, and the function that reads its body."""
        answer = self._client.get_object(Bucket=self._bucket, **params)
        with contextlib.closing(answer["Body"]) as body:
            yield answer["ResponseMetadata"]["HTTPHeaders"], body.read


def info_of(headers: Headers) -> Info:
    """What the headers of a GET or HEAD say of the whole object."""
    total = headers.get("content-range", "").rpartition("/")[2] or headers["content-length"]
    sha256, mtime_ns = headers.get(META + "sha256", ""), headers.get(META + "mtime-ns", "")
    return Info(
        size=int(total),
        mtime=parsedate_to_datetime(headers["last-modified"]).timestamp(),
        etag=headers.get("etag", ""),
        sha256=sha256 if len(sha256) == 64 else None,
        file_mtime_ns=int(mtime_ns) if mtime_ns.isdecimal() else None,
    )


def metadata_of(headers: Headers) -> dict[str, str]:
    return {name.lower().removeprefix(META): value for name, value in headers.items()
            if name.lower().startswith(META)}  # fmt: skip


def md5_of(headers: Headers) -> str | None:
    """The MD5 that an etag is, unless the object came in parts or is encrypted with a key of its own."""
    etag = headers.get("etag", "").strip('"')
    sealed = headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
    sealed |= "x-amz-server-side-encryption-customer-algorithm" in headers
    return None if sealed or len(etag) != 32 else etag
