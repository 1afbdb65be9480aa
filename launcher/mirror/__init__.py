"""The mirror of one run: a background thread that sends the run folder to the store while the run goes on.

It owns `synced.json`, which tells what is durable and since when it is not. What a pass sends is push.py's,
who may publish is ownership.py's, the way back is restore.py's and pull.py's. Callers hold the local lease.
"""

import contextlib
import logging
import os
import secrets
import threading
import time
from functools import partial
from typing import Any

from launcher.checkpoints import Mark, kept
from launcher.errors import StoreAway, StoreError, Taken
from launcher.mirror import restore
from launcher.mirror.layout import marks_of
from launcher.mirror.ownership import Ownership, Pulse, read_owner
from launcher.mirror.pull import pull_run
from launcher.mirror.push import Push
from launcher.mirror.record import Record
from launcher.rundir import RunDir, read_json, write_json
from launcher.storage import Store

__all__ = ["Mirror", "pull_run"]

log = logging.getLogger("launch.mirror")

NICENESS = 10
LONGEST_PAUSE = 30.0  # seconds between two tries while the store is away, unless `every` is longer
SHORTEST_PAUSE = 1.0
NAMED = 5  # files that synced.json names when they are not in the store
NO_TIME = "there was no time to send the rest"
UNCONDITIONAL = (
    "%s ignores the conditions of a put: of two supervisors that take the run in the same moment, it may let "
    "both write (docs/contract.md)"
)


class Lost(Exception):
    """The run is somebody else's; nothing may be published any more."""


class Mirror:
    """Keeps `store` (opened at the run's own URL) equal to the run folder, with a pass every `every` seconds.

    claim() before each attempt, restore() before the first, start() once, flush() or stop() at the end, then
    release(). `lost` says who has the run if it was taken away: then the caller stops its attempt and leaves.
    """

    def __init__(
        self, run: RunDir, store: Store, every: float, keep: int, keep_every: int | None = None
    ) -> None:
        self._run, self._store, self._every = run, store, every
        self._owner = Ownership(store)
        self._pulse = Pulse(self._owner)
        self._record = Record(run.mirrored, store)
        stay = partial(kept, keep=max(1, keep), keep_every=keep_every)
        self._push = Push(run, store, self._record, stay, self._confirm, self._say_again)
        self._claiming, self._first = threading.RLock(), True
        # The token and fence of the last claim(), successful or not. Fence 0: no attempt was made, and all
        # that is published is how the run ended before its first one.
        self._claimed = (secrets.token_hex(8), 0)
        said = read_json(run.synced) or {}
        self.newest: Mark | None = None  # the newest checkpoint in the store, as of the last claim()
        self.foreign = False  # others have published since this folder did, and it was not restored since
        self._token = said.get("token")
        self._said: dict[str, Any] = said
        self._saying = threading.Lock()
        self._since: float | None = None  # when the first pass of those failed that have failed since
        self._state = threading.Condition()
        self._asked = self._answered = 0  # flushes wanted, and done
        self._ending = False
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    @property
    def lost(self) -> str | None:
        return self._owner.lost

    def claim(self, token: str, at_least: int) -> int:
        """Take the run in the store for the attempt `at_least`; return the fence that the attempt must use.

        It is higher than any that the store has seen from others. Raises Taken (another supervisor lives;
        up to 20 s pass until that is known) and StoreAway: the attempt may then go on as `at_least`, and the
        mirror takes the run by itself when the store is back, or is `lost` if a fence as high was used there.
        """
        with self._claiming:
            self._claimed = (token, at_least)
            found, last = list(self._store.list("checkpoints/")), self._token
            self.newest = next(iter(marks_of(entry.key for entry in found)), None)
            seen = self.newest.fence if self.newest else 0
            fence = self._owner.claim(token, max(at_least, seen + 1), dead=self._token)
            self._record.claimed(token, self._owner.predecessor, found)
            self._claimed = (token, fence)
            self._token = token
            self.foreign |= self._owner.predecessor not in (None, last, token)
            if self._first:
                self._first = False
                self._clear_up()
        return fence

    def _clear_up(self) -> None:
        """What our dead predecessors left half-sent; nothing of ours is under way yet, and an older attempt
        that still sends is fenced."""
        for path in (self._run.synced, self._run.mirrored):
            for left in self._run.path.glob(f".{path.name}.tmp-*"):
                left.unlink(missing_ok=True)
        try:
            if swept := self._store.sweep():
                log.info("%d unfinished uploads of earlier attempts were removed", swept)
            if not self._store.conditional:
                log.warning(UNCONDITIONAL, self._store.url)
        except StoreError as error:
            log.warning("unfinished uploads of earlier attempts may be left: %s", error.message)

    def restore(self) -> None:
        """Bring what the store has and the folder lacks. Raises StoreAway, StoreError."""
        restore.restore(self._run, self._store)
        self.foreign = False

    def start(self) -> None:
        self._pulse.start()
        self._thread.start()

    def flush(self, budget: float) -> bool:
        """Wait until all that is in the folder now is in the store; False if that takes over `budget` s."""
        with self._state:
            self._asked += 1
            asked = self._asked
            self._state.notify_all()
            self._state.wait_for(lambda: self._answered >= asked or self.lost is not None, timeout=budget)
            done = self._answered >= asked
        if not done:
            self._say(self.lost or self._said.get("error") or NO_TIME)
        return done

    def stop(self, budget: float) -> bool:
        """flush(), then no further pass."""
        done = self.flush(budget)
        with self._state:
            self._ending = True
            self._state.notify_all()
        self._pulse.stop()
        return done

    def release(self) -> None:
        """Give the run back in the store. If that fails, the next holder waits a little longer."""
        with contextlib.suppress(StoreError):
            self._owner.release()

    def _work(self) -> None:
        # On Linux this is the thread's own, setpriority(2): training has the first claim on the cores.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        failures = 0
        while self.lost is None:
            with self._state:
                if self._ending:
                    return
                asked = self._asked
            ok = self._pass()
            failures = 0 if ok else failures + 1
            pause = self._every
            if not ok:
                longest = max(self._every, LONGEST_PAUSE)
                pause = min(longest, max(SHORTEST_PAUSE, self._every) * 2 ** min(failures - 1, 8))
            with self._state:
                if ok:
                    self._answered = asked
                elif self._asked > self._answered:
                    pause = SHORTEST_PAUSE
                self._state.notify_all()
                asked_again = self._asked > asked
                if not self._ending and not (ok and asked_again):
                    self._state.wait(pause)

    def _pass(self) -> bool:
        """One pass, told truthfully in synced.json. True if all that was there is in the store now."""
        error: str | None = None
        try:
            self._hold()
            self._push.send()
        except Lost:
            error = self.lost
        except (StoreError, OSError) as problem:
            error = str(problem)
        except Exception as bug:  # a mirror that died of it could not say so in synced.json
            log.exception("the mirror failed; it goes on")
            error = f"{type(bug).__name__}: {bug}"
        self._since = (self._since or time.time()) if error else None
        self._say(error)
        return error is None

    def _hold(self) -> None:
        """Take the run if claim() could not; then see that it is still ours."""
        with self._claiming:
            if not self._owner.held and self.lost is None:
                try:
                    self._owner.lost = self._claim_late(*self._claimed)
                except Taken as taken:
                    self._owner.lost = taken.message
        self._confirm()

    def _claim_late(self, token: str, fence: int) -> str | None:
        """Why what is here is not the run's newest any more; None: the run was claimed."""
        last = self._token
        if fence > 0:
            same = self.claim(token, fence) == fence
            self.foreign = False  # the attempt has begun: with this number, what it makes is the newest
            return None if same else f"attempt {fence} of the run was made on another machine, too"
        # Without an attempt of its own, the folder is as old as its last hold on the run.
        owner = read_owner(self._store)
        if owner is None or owner[0].get("token") == last:
            self.claim(token, fence)
            if self._owner.predecessor in (None, last):
                return None
        return "the run has gone on elsewhere since it was here last"

    def _confirm(self) -> None:
        held = self._owner.confirm()
        if self.lost is not None:
            raise Lost
        if not held:  # a claim for the next attempt failed in the middle of this pass
            raise StoreAway("the run could not be claimed in the store")

    def _say_again(self) -> None:
        self._say(self._said.get("error"))

    def _say(self, error: str | None) -> None:
        """Write synced.json, if there is something new to say. A full disk must not stop the mirror."""
        with self._saying:
            durable, before = self._push.durable, self._said
            step, fence = (durable.step, durable.fence) if durable else (None, None)
            same = (step, fence) == (before.get("step"), before.get("fence"))
            missing = self._push.behind() if error else []
            news = {
                "schema": 1,
                "url": self._store.url,
                "step": step,
                "fence": fence,
                "since": (before.get("since") if same else time.time()) if durable else None,
                "behind": len(missing),
                "missing": missing[:NAMED],
                "away_since": self._since,
                "error": error,
                "token": self._token,
            }
            if error and error != before.get("error"):
                log.warning("the mirror is behind: %s", error)
            elif not error and before.get("error"):
                log.info("the mirror has caught up")
            if news != {key: value for key, value in before.items() if key != "time"}:
                self._said = {**news, "time": time.time()}
                try:
                    write_json(self._run.synced, self._said)
                except OSError as problem:
                    log.warning("%s cannot be written: %s", self._run.synced, problem.strerror)
