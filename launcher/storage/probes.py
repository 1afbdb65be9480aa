"""What a store does, seen by asking it for what it must refuse. Nothing stays of the objects this makes."""

import hashlib
import secrets
from base64 import b64encode
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from launcher.errors import StoreAway, StoreError
from launcher.storage.base import Damaged, PreconditionFailed

if TYPE_CHECKING:
    from launcher.storage.bucket import Bucket

Guard = Literal["signed", "checksum", "etag"]

PROBE = ".launch-probe-.tmp-"  # mirror and restore leave such a name out, should one be left behind
SENT, WRONG = b"sent", hashlib.sha256(b"not sent").digest()


def conditional(bucket: "Bucket") -> bool:
    """Whether both conditions of a put are kept."""
    key, kept = _key(bucket), 0
    try:
        bucket.ask("put_object", key, Body=b"1")
        for condition in ({"IfNoneMatch": "*"}, {"IfMatch": '"00000000000000000000000000000000"'}):
            try:
                bucket.ask("put_object", key, Body=b"2", **condition)
            except StoreAway:
                raise
            except PreconditionFailed:
                kept += 1
            except StoreError:
                break  # it does not know the condition
    finally:
        bucket.ask("delete_object", key)
    return kept == 2


def guard(bucket: "Bucket") -> Guard:
    """What makes it refuse a body that is not what was sent: the signed hash; a header with the hash, also of
    a part; or neither: then its etags are to be looked at."""
    key, right = _key(bucket), hashlib.sha256(SENT).digest()
    if _refused(bucket, "put_object", WRONG, Key=key):
        return "signed"
    try:
        checksum = {"ChecksumSHA256": b64encode(WRONG).decode()}
        if not _refused(bucket, "put_object", right, Key=key, **checksum):
            return "etag"
        upload = bucket.ask("create_multipart_upload", key)["UploadId"]
        try:
            part = {"Key": key, "UploadId": upload, "PartNumber": 1}
            return "checksum" if _refused(bucket, "upload_part", right, **part, **checksum) else "etag"
        finally:
            with suppress(StoreError):  # who may put may not be let abort
                bucket.abort(key, upload)
    finally:
        bucket.ask("delete_object", key)


def _refused(bucket: "Bucket", operation: str, sha256: bytes, **params: Any) -> bool:
    """Whether the store finds that SENT has another hash than the one that comes with it."""

    def once() -> bool:
        try:
            with bucket.speaking(params["Key"]):
                bucket.wire.put(operation, sha256.hex(), Body=SENT, **params)
        except StoreAway:
            raise
        except Damaged:
            return True
        except StoreError:
            if "ChecksumSHA256" not in params:
                raise  # it does not let us in
        return False

    return bucket.retried(once, params["Key"])


def _key(bucket: "Bucket") -> str:
    return f"{bucket.prefix}{PROBE}{secrets.token_hex(8)}"
