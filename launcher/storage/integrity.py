"""Whether what came is what was stored: by the SHA-256 that we put beside an object, else by its etag."""

import hashlib
import re
from collections.abc import Callable
from functools import partial

from launcher.errors import StoreAway, StoreError
from launcher.storage.bucket import Bucket
from launcher.storage.files import Source
from launcher.storage.parts import spans
from launcher.storage.wire import META, Headers, is_sealed, md5_of

Hashed = Callable[[str], "hashlib._Hash"]

COMPOSITE = re.compile(r'"?([0-9a-f]{32})-(\d{1,5})"?')


def is_whole(headers: Headers, hashed: Hashed) -> bool:
    """By a hash of all of it. True if nothing tells; `hashed` makes the hash of a kind."""
    if sha256 := headers.get(META + "sha256"):
        return hashed("sha256").hexdigest() == sha256
    md5 = md5_of(headers)
    return md5 is None or hashed("md5").hexdigest() == md5


def parts_fit(bucket: Bucket, key: str, headers: Headers, file: Source, size: int) -> bool:
    """By the etag of an object that another program sent in parts: on AWS, and on most stores, the MD5 of
    their MD5s. True if there is none, or the store does not tell how long they are."""
    etag = COMPOSITE.fullmatch(headers.get("etag", ""))
    if META + "sha256" in headers or not etag or is_sealed(headers):
        return True
    try:
        first = int(bucket.head(key, PartNumber=1, IfMatch=headers["etag"]).get("content-length", 0))
    except StoreAway:
        raise
    except StoreError:  # it knows no parts
        return True
    parts = spans(0, size, first, parts=size) if first else []
    if len(parts) != int(etag[2]):
        return True
    each = [partial(file.hashed, "md5", part.start + part.size, part.start) for part in parts]
    md5s = bucket.pool.in_order(each)
    return hashlib.md5(b"".join(md5.digest() for md5 in md5s), usedforsecurity=False).hexdigest() == etag[1]
