"""What an S3 store answers, in our words; and how often a request is tried."""

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from botocore import exceptions as botocore
from botocore.parsers import ResponseParserError

from launcher.errors import StoreAway, StoreError
from launcher.storage.base import Damaged, NotFound, PreconditionFailed

T = TypeVar("T")

BUSY_TRIES = 8  # where the store says that it cannot now
SILENT_TRIES = 3  # where it says nothing, or what does not come whole
NOT_IMPLEMENTED = 501
LAST_TRY = 25.0  # seconds after the first one begins; with what that may take, no call takes a minute
LONGEST_PAUSE = 5.0

WRONG_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken",
                     "TokenRefreshRequired", "AuthFailure", "InvalidClientTokenId"}  # fmt: skip
OTHER_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
LATER = {"SlowDown", "RequestTimeout", "RequestLimitExceeded", "Throttling", "ThrottlingException",
         "ConditionalRequestConflict", "OperationAborted"}  # fmt: skip
DAMAGED = {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "InvalidDigest",
           "IncompleteBody"}  # fmt: skip


class Busy(StoreAway):
    """The store answered that it is not able to now."""


class Gone(StoreAway):
    """The upload has ended meanwhile: completed by a try whose answer was lost, or taken away."""


class Unexplained(StoreError):
    """The store says no, but not why: the answer to a HEAD has no body."""


class Answers:
    """Errors of the bucket `bucket` at `where`, as StoreErrors; what they say never holds a secret."""

    def __init__(self, bucket: str, where: str, endpoint: str | None) -> None:
        self._bucket, self._where = bucket, where
        self._url = f"s3://{bucket}"
        self._endpoint = endpoint or self._url

    def retried(self, call: Callable[[], T], key: str = "", tries: int = BUSY_TRIES) -> T:
        """What `call` returns, once it succeeds. Raises StoreError."""
        began = time.monotonic()
        for attempt in range(1, tries + 1):
            try:
                with self.speaking(key):
                    return call()
            except (StoreAway, Damaged) as error:
                limit = tries if isinstance(error, Busy) else min(tries, SILENT_TRIES)
                pause = random.uniform(0.5, 1.0) * min(LONGEST_PAUSE, 0.3 * 2**attempt)
                if attempt >= limit or time.monotonic() + pause - began > LAST_TRY:
                    raise
                time.sleep(pause)
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def speaking(self, key: str = "") -> Iterator[None]:
        """botocore's errors in the store's words."""
        try:
            yield
        except botocore.ClientError as error:
            raise self.error(error.response, key) from error
        except (botocore.NoCredentialsError, botocore.PartialCredentialsError,
                botocore.CredentialRetrievalError, botocore.ProfileNotFound) as error:  # fmt: skip
            raise StoreError(
                f"no usable credentials for {self._where}: {error}",
                "set storage.profile or AWS_PROFILE to a profile of ~/.aws/credentials",
            ) from error
        except RuntimeError as error:
            if "refreshed credentials" not in str(error):
                raise
            raise StoreError(
                f"no usable credentials for {self._where}: what the profile brings has expired already",
                "see what its credential_process does, and whether this machine's clock is right",
            ) from error
        except (botocore.ConnectionError, botocore.HTTPClientError, botocore.IncompleteReadError,
                botocore.ResponseStreamingError, botocore.MetadataRetrievalError,
                ResponseParserError) as error:  # fmt: skip
            raise StoreAway(f"{self._where} does not answer ({type(error).__name__})") from error
        except (botocore.BotoCoreError, ValueError) as error:
            # botocore names the parameter on a line of its own, and after it every expression that would do
            why = str(error).removeprefix("Parameter validation failed:\n").partition(": Bucket name must")[0]
            raise StoreError(f"{self._endpoint} cannot be used: {why}") from error

    def error(self, response: dict[str, Any], key: str) -> StoreError:
        code = str(response.get("Error", {}).get("Code", ""))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        bucket = f"bucket {self._bucket!r} at {self._where}"
        if code == "NoSuchBucket":
            return StoreError(f"there is no {bucket}", "make it, or correct storage.url")
        if status == 412 or code == "PreconditionFailed":
            return PreconditionFailed(f"{self._url}/{key} is there already or was changed by another writer")
        if code in LATER or status == 429 or (status >= 500 and status != NOT_IMPLEMENTED):
            return Busy(f"{self._where} is not able to answer now ({code or status})")
        if code == "NoSuchUpload":
            return Gone(f"the upload of {self._url}/{key} was taken away meanwhile")
        if code in DAMAGED:
            return Damaged(f"{self._url}/{key} does not arrive as it was sent ({code})")
        if status == 404 and key:
            return NotFound(f"{self._url}/{key} does not exist")
        if code in WRONG_CREDENTIALS:
            return StoreError(
                f"the credentials are refused by the {bucket} ({code})",
                "check the profile or the AWS_* variables that are in use",
            )
        if code == "RequestTimeTooSkewed":
            return StoreError(f"the {bucket} refuses this machine's clock", "set the clock")
        if code in OTHER_REGION or status == 301:
            return StoreError(f"the {bucket} is in another region", "set storage.region")
        if code in ("400", "403"):
            return Unexplained(f"the {bucket} refused, and does not say why ({code})")
        if status == 403 or code == "AccessDenied":
            return StoreError(f"the credentials may not do this in the {bucket} ({code})")
        return StoreError(f"the {bucket} refused: {code or status}")
