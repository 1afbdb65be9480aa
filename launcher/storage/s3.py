"""An S3-compatible store, through boto3.

Bodies are read here, part by part and exactly as long as the file was: s3transfer hangs on a file that gets
shorter (measured) and knows no conditional puts. Integrity on the wire comes from the signed SHA-256 of every
body over http and from TLS over https, so the newer checksum trailers, which some stores refuse and one has
stored inside the object (boto3#4392, #4435), stay off.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launcher.errors import StoreAway, StoreError
from launcher.storage.base import (
    MAX_DOCUMENT,
    Entry,
    NotFound,
    PreconditionFailed,
    Store,
    StoreSettings,
    checked,
    opened,
    read_exactly,
    write_all,
    written_aside,
)

PART = 16 << 20  # bytes held in memory at a time; bigger files go in parts of this size
MAX_PARTS = 10_000  # S3's own limit
GET_ATTEMPTS = 3

WRONG_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken",
                     "TokenRefreshRequired", "AuthFailure", "InvalidClientTokenId"}  # fmt: skip
OTHER_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
LATER = {"SlowDown", "RequestTimeout", "RequestLimitExceeded", "Throttling", "ThrottlingException",
         "ConditionalRequestConflict", "OperationAborted", "NoSuchUpload"}  # fmt: skip


class S3Store(Store):
    """Keys are below `prefix` of `bucket`."""

    def __init__(self, bucket: str, prefix: str, settings: StoreSettings) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._settings = settings
        self._where = "the store"
        with self._speaking():
            self._client = _client(settings)
        endpoint = urlsplit(self._client.meta.endpoint_url)
        self._where = endpoint.netloc.rpartition("@")[2]

    def check(self) -> None:
        # A listing and not head_bucket: the answer to a HEAD has no body, so it does not say what is wrong.
        with self._speaking():
            self._client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> None:
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        with opened(path) as (fd, size):
            if size > PART:
                self._put_parts(key, fd, size, condition)
            else:
                self._put(key, read_exactly(fd, size, 0), condition)

    def put_bytes(
        self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": if_match} if if_match else {}
        return self._put(key, data, condition)

    def get_bytes(self, key: str) -> tuple[bytes, str]:
        with self._speaking(key):
            answer = self._client.get_object(**self._name(key))
            if answer["ContentLength"] > MAX_DOCUMENT:
                raise StoreError(f"{self.url}/{key} is too big to be what its name says")
            return answer["Body"].read(), answer["ETag"]

    def get_file(self, key: str, path: Path) -> None:
        for attempt in range(GET_ATTEMPTS):
            try:
                with self._speaking(key), written_aside(path) as fd:
                    answer = self._client.get_object(**self._name(key))
                    for chunk in answer["Body"].iter_chunks(1 << 20):
                        write_all(fd, chunk)
                return
            except StoreAway:
                if attempt == GET_ATTEMPTS - 1:
                    raise

    def list(self, prefix: str = "") -> Iterator[Entry]:
        with self._speaking():
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix):
                for item in page.get("Contents", ()):
                    yield Entry(item["Key"][len(self.prefix) :], item["Size"])

    def delete(self, key: str) -> None:
        with self._speaking():
            self._client.delete_object(**self._name(key))

    def _name(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + checked(key)}

    def _put(self, key: str, data: bytes, condition: dict[str, str]) -> str:
        try:
            with self._speaking(key):
                answer = self._client.put_object(**self._name(key), Body=data, **condition)
        except (PreconditionFailed, NotFound) as error:
            # boto3 sends a request again whose answer was lost: then what is in our way is our own object.
            try:
                found, etag = self.get_bytes(key)
            except NotFound:
                found = None
            if found != data:
                raise PreconditionFailed(str(error)) from error
            return etag
        return str(answer["ETag"])

    def _put_parts(self, key: str, fd: int, size: int, condition: dict[str, str]) -> None:
        """One part in memory at a time; what was begun and not completed is taken away again."""
        name = self._name(key)
        step = max(PART, -(-size // MAX_PARTS))
        with self._speaking(key):
            upload = {**name, "UploadId": self._client.create_multipart_upload(**name)["UploadId"]}
            try:
                parts = []
                for number, offset in enumerate(range(0, size, step), 1):
                    body = read_exactly(fd, min(step, size - offset), offset)
                    tag = self._client.upload_part(**upload, PartNumber=number, Body=body)["ETag"]
                    parts.append({"PartNumber": number, "ETag": tag})
                self._client.complete_multipart_upload(
                    **upload, MultipartUpload={"Parts": parts}, **condition
                )
            except BaseException:
                self._abort(upload)
                raise

    def _abort(self, upload: dict[str, str]) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        # If the store is away the caller is about to hear it, and a lifecycle rule removes the parts.
        with contextlib.suppress(BotoCoreError, ClientError):
            self._client.abort_multipart_upload(**upload)

    @contextlib.contextmanager
    def _speaking(self, key: str = "") -> Iterator[None]:
        """botocore's errors in the store's words; what they say never holds a secret or a signature."""
        from botocore import exceptions as botocore
        from botocore.parsers import ResponseParserError

        try:
            yield
        except botocore.ClientError as error:
            raise self._answered(error.response, key) from error
        except (botocore.NoCredentialsError, botocore.PartialCredentialsError,
                botocore.CredentialRetrievalError, botocore.ProfileNotFound) as error:  # fmt: skip
            raise StoreError(
                f"no usable credentials for {self._where}: {error}",
                "set storage.profile or AWS_PROFILE to a profile of ~/.aws/credentials",
            ) from error
        except (botocore.ConnectionError, botocore.HTTPClientError, botocore.IncompleteReadError,
                botocore.MetadataRetrievalError, ResponseParserError) as error:  # fmt: skip
            raise StoreAway(f"{self._where} does not answer ({type(error).__name__})") from error
        except (botocore.BotoCoreError, ValueError) as error:
            # botocore names the parameter on a line of its own, and after it every expression that would do
            why = str(error).removeprefix("Parameter validation failed:\n").partition(": Bucket name must")[0]
            raise StoreError(f"{self._settings.endpoint or self.url} cannot be used: {why}") from error

    def _answered(self, response: dict[str, Any], key: str) -> StoreError:
        code = str(response.get("Error", {}).get("Code", ""))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        bucket = f"bucket {self.bucket!r} at {self._where}"
        if code == "NoSuchBucket":
            return StoreError(f"there is no {bucket}", "make it, or correct storage.url")
        if status == 412 or code == "PreconditionFailed":
            return PreconditionFailed(f"{self.url}/{key} is there already or was changed by another writer")
        if code in LATER or status >= 500 or status == 429:
            return StoreAway(f"{self._where} is not able to answer now ({code or status})")
        if status == 404 and key:
            return NotFound(f"{self.url}/{key} does not exist")
        if code in WRONG_CREDENTIALS:
            return StoreError(
                f"the credentials are refused by the {bucket} ({code})",
                "check the profile or the AWS_* variables that are in use",
            )
        if code == "RequestTimeTooSkewed":
            return StoreError(f"the {bucket} refuses this machine's clock", "set the clock")
        if code in OTHER_REGION or status == 301:
            return StoreError(f"the {bucket} is in another region", "set storage.region")
        if status == 403:
            return StoreError(f"the credentials may not do this in the {bucket} ({code})")
        return StoreError(f"the {bucket} refused: {code or status}")


def _client(settings: StoreSettings) -> Any:
    import boto3
    from botocore.config import Config

    session = boto3.session.Session(profile_name=settings.profile, region_name=settings.region)
    env = os.environ.get
    endpoint = settings.endpoint or env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL")
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 3},
        connect_timeout=4,
        read_timeout=20,
        tcp_keepalive=True,
        s3={"addressing_style": "path"} if endpoint else {},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return session.client("s3", endpoint_url=endpoint, config=config)
