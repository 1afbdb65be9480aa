"""Looks at this machine and at the store, for `launch doctor`: tmux, and which promises the store keeps."""

import subprocess
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime

from launcher.cli.doctor.findings import Finding, clock
from launcher.errors import LaunchError, StoreAway
from launcher.storage import Store, StoreSettings, open_store, reach
from launcher.transfer.uploads import bucket_of
from launcher.workstation import queue

PATIENCE = 10.0  # seconds for the store's time of day


def store(url: str | None, settings: StoreSettings) -> list[Finding]:
    """The store of a run: reached, its clock, and whether it keeps two writers apart."""
    if url is None:
        means = "this disk has the only copy of every checkpoint"
        return [Finding("store", "note", "there is none", means, "Set storage.url or LAUNCH_STORAGE.")]
    try:
        found = reach(url, settings)
        made = [
            Finding("store", "good", f"{found.url} lets us in", "runs are mirrored there"),
            conditional_writes(found),
            integrity(found, settings.checksum),
        ]
    except StoreAway as error:
        means = "a run trains on, and its mirror catches up when the store is back; a launch is refused"
        made = [Finding("store", "bad", error.message, means, error.hint or "Check storage.endpoint.")]
    except LaunchError as error:
        made = [Finding("store", "bad", error.message, "no run can start that mirrors there", error.hint)]
    return made + _clock(url, settings)


def conditional_writes(found: Store) -> Finding:
    """Two attempts of a run must never both own it: that rests on If-None-Match and If-Match."""
    if found.conditional:
        means = "two attempts of a run can never both own it"
        return Finding("conditional writes", "good", "If-None-Match and If-Match are honoured", means)
    means = "two supervisors that take one run in the same moment may both go on for some seconds"
    do = "Use a store that honours them (AWS S3, MinIO, SeaweedFS 4), or never resume a run in two places."
    return Finding("conditional writes", "note", "If-None-Match and If-Match are ignored", means, do)


def integrity(found: Store, checksum: str) -> Finding:
    """What arrives must be what was sent."""
    if found.verifies:
        means = "what is damaged on the way is sent again"
        return Finding("integrity", "good", "a body with another hash than was sent is refused", means)
    ignored = "a body with another hash than was sent is taken"
    if checksum == "signed":
        means, do = "what is damaged on the way is stored so", "Set storage.checksum to etag or auto."
        return Finding("integrity", "bad", ignored, means, do)
    return Finding("integrity", "good", ignored, "each body has an MD5, which is compared with its etag, too")


def _clock(url: str, settings: StoreSettings) -> list[Finding]:
    """Ours against the store's, by the Date of any answer; its refusal is as good."""
    try:
        bucket = bucket_of(open_store(url, settings))
    except LaunchError:
        bucket = None  # said already
    if bucket is None:
        return []
    began = time.time()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(bucket.endpoint, method="HEAD"), timeout=PATIENCE
        ) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:
        date = error.headers["Date"]
    except (OSError, ValueError):
        return []  # that it does not answer is said already
    if not date:
        return []
    slack = (time.time() - began) / 2 + 1  # a Date has whole seconds
    off = parsedate_to_datetime(date).timestamp() + 0.5 - (began + time.time()) / 2
    return [clock(f"the store's clock is {off:+.0f} s off ours (± {slack:.0f})", abs(off) - slack)]


def tmux() -> Finding:
    try:
        version = subprocess.run(["tmux", "-V"], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        means = "runs go in the foreground and end with their terminal's connection"
        return Finding("tmux", "note", "there is no tmux", means, "Install tmux 3.2 or newer.")
    return Finding("tmux", "good", version, "runs go on in a window when the connection breaks")


def shared() -> Finding:
    """The queue through which the runs of this machine share it."""
    try:
        queue.check()
    except LaunchError as error:
        return Finding("queue", "bad", error.message, "no run can start in tmux", error.hint)
    return Finding("queue", "good", str(queue.folder()), "runs of all users share this machine through it")
