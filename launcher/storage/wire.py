"""How bodies travel to an S3 store and back: signed by botocore, over connections of our own.

boto3 takes 2.5 times as long as s5cmd for many small files (measured): most of that goes into what a body
does not need. Here a request is botocore's signature and one exchange. What is unusual, in credentials,
endpoint or proxy, goes through boto3 all the same.
"""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import Any, Protocol
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSPreparedRequest, AWSRequest, AWSResponse
from botocore.exceptions import ClientError
from botocore.parsers import create_parser

from launcher.storage.base import Info
from launcher.storage.connections import Answer, Connections

ERROR = 1 << 20  # bytes of an error's text that are read
META = "x-amz-meta-"
HEADERS = {"IfMatch": "If-Match", "IfNoneMatch": "If-None-Match", "Range": "Range",
           "ContentMD5": "Content-MD5", "ChecksumSHA256": "x-amz-checksum-sha256"}  # fmt: skip
NOTHING = hashlib.sha256(b"").hexdigest()
QUERY = {"PartNumber": "partNumber", "UploadId": "uploadId"}

Headers = Mapping[str, str]
Read = Callable[[memoryview], int]  # as far as there is something to fill it with


class Wire(Protocol):
    """Requests that carry a body, with boto3's names for their parameters; errors are botocore's."""

    def put(self, operation: str, sha256: str, **params: Any) -> Headers:
        """PutObject or UploadPart of the bytes `Body`, whose hash is `sha256`; the answer's headers."""

    def get(self, **params: Any) -> contextlib.AbstractContextManager[tuple[Headers, Read]]:
        """GetObject: its headers, and the function that reads its body."""


class Boto:
    """Through boto3: any kind of credentials, signature, proxy and endpoint that it knows."""

    def __init__(self, client: Any, bucket: str) -> None:
        self._client, self._bucket = client, bucket

    def put(self, operation: str, sha256: str, **params: Any) -> Headers:
        answer = getattr(self._client, operation)(Bucket=self._bucket, **params)
        headers: Headers = answer["ResponseMetadata"]["HTTPHeaders"]
        return headers

    @contextlib.contextmanager
    def get(self, **params: Any) -> Iterator[tuple[Headers, Read]]:
        answer = self._client.get_object(Bucket=self._bucket, **params)
        with contextlib.closing(answer["Body"]) as body:
            yield answer["ResponseMetadata"]["HTTPHeaders"], body.readinto


class Signed:
    """Over connections of our own; `base` is the URL that keys are added to."""

    def __init__(self, connections: Connections, credentials: Any, region: str, base: str) -> None:
        self._connections, self._credentials = connections, credentials
        self._region, self._base, self._host = region, base, urlsplit(base).netloc.rpartition("@")[2]

    def put(self, operation: str, sha256: str, **params: Any) -> Headers:
        with self._exchange("PUT", operation, sha256, **params) as answer:
            answer.read()
            return answer.headers

    @contextlib.contextmanager
    def get(self, **params: Any) -> Iterator[tuple[Headers, Read]]:
        with self._exchange("GET", "get_object", NOTHING, **params) as answer:
            yield answer.headers, answer.readinto

    @contextlib.contextmanager
    def _exchange(
        self, method: str, operation: str, sha256: str, Key: str, Body: bytes = b"",
        Metadata: Mapping[str, str] = MappingProxyType({}), **params: Any,
    ) -> Iterator[Answer]:  # fmt: skip
        query = {QUERY[name]: params[name] for name in QUERY if name in params}
        url = self._base + quote(Key, safe="/~") + (f"?{urlencode(query, quote_via=quote)}" if query else "")
        headers = {HEADERS[name]: params[name] for name in HEADERS if name in params}
        headers |= {META + name: value for name, value in Metadata.items()} | {"Host": self._host}
        request = AWSRequest(method, url, headers)
        request.context["sha256"] = sha256
        _Signer(self._credentials.get_frozen_credentials(), "s3", self._region).add_auth(request)
        headers = dict(request.headers.items()) | ({"Content-Length": str(len(Body))} if Body else {})
        with self._connections.exchange(method, url, headers, Body) as answer:
            if answer.status >= 300:
                raise _error(answer, operation)
            yield answer


class _Signer(S3SigV4Auth):  # type: ignore[misc]
    def payload(self, request: Any) -> str:
        return str(request.context["sha256"])  # it is known already

    def headers_to_sign(self, request: Any) -> Any:
        if "signed" not in request.context:  # asked for twice
            request.context["signed"] = super().headers_to_sign(request)
        return request.context["signed"]


def _error(answer: Answer, operation: str) -> ClientError:
    said = {"status_code": answer.status, "headers": answer.headers, "body": answer.read(ERROR)}
    return ClientError(create_parser("rest-xml").parse(said, None), operation)


class _Whole(io.BytesIO):
    """A body as botocore takes it."""

    def stream(self) -> Iterator[bytes]:
        yield self.read()


def signed(client: Any, bucket: str, credentials: Any, connections: Connections) -> Signed | None:
    """For a bucket that is addressed and signed as most are; what that is, one URL of boto3's tells."""
    url = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"})
    base, _, query = url.partition("k?")
    scope = parse_qs(query).get("X-Amz-Credential", [""])[0].split("/")[2:]
    if len(scope) != 3 or scope[1:] != ["s3", "aws4_request"]:
        return None
    return Signed(connections, credentials, scope[0], base)


def route(client: Any, connections: Connections) -> None:
    """Have boto3's own requests take our connections, too, so that they have to get on as well."""

    def send(request: AWSPreparedRequest, **_: Any) -> AWSResponse:
        body = request.body.read() if hasattr(request.body, "read") else request.body or b""
        with connections.exchange(request.method, request.url, request.headers, body) as answer:
            return AWSResponse(request.url, answer.status, answer.headers, _Whole(answer.read()))

    client.meta.events.register("before-send.s3", send)


def info_of(headers: Headers) -> Info:
    """What the headers of a GET or HEAD say of the whole object."""
    total = headers.get("content-range", "").rpartition("/")[2] or headers.get("content-length", "")
    modified = headers.get("last-modified")
    sha256, mtime_ns = headers.get(META + "sha256", ""), headers.get(META + "mtime-ns", "")
    return Info(
        size=int(total) if total.isdecimal() else 0,
        mtime=parsedate_to_datetime(modified).timestamp() if modified else 0.0,
        etag=headers.get("etag", ""),
        sha256=sha256 if len(sha256) == 64 else None,
        file_mtime_ns=int(mtime_ns) if mtime_ns.isdecimal() else None,
    )


def metadata_of(headers: Headers) -> dict[str, str]:
    return {name.removeprefix(META): value for name, value in headers.items() if name.startswith(META)}


def md5_of(headers: Headers) -> str | None:
    """The MD5 that an etag is, unless the object came in parts or is encrypted with a key of its own."""
    etag = headers.get("etag", "").strip('"')
    return None if is_sealed(headers) or len(etag) != 32 else etag


def is_sealed(headers: Headers) -> bool:
    """Whether the object is encrypted with a key of its own, so that its etag is no hash."""
    sealed = headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
    return sealed or "x-amz-server-side-encryption-customer-algorithm" in headers
