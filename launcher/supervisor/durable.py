"""The supervisor's side of the mirror: claim, restore and flush while the lease's counter moves on.

A store that is away, or that refuses, never ends a run; only a run that somebody else owns does.
"""

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from launcher.checkpoints import newest
from launcher.errors import StoreError
from launcher.recipe import Recipe
from launcher.rundir import RunDir, read_json

if TYPE_CHECKING:
    from launcher.mirror import Mirror

T = TypeVar("T")
FLUSH = 600.0  # seconds for the last files to reach a store that answers,
FLUSH_AWAY = 30.0  # and one that does not
LAST_WORDS = 10.0  # and for final.json after them
RETRY = 3.0  # seconds between two tries to bring what is newer in the store
POLL = 0.1
NOT_ALL = "not all of the run is in the store; `launch resume` here would send the rest"


class Durable:
    """The run's mirror, or nothing if it is not mirrored. `tick` is called while a call takes its time."""

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        record: Mapping[str, Any],
        say: Callable[[str], None],
        tick: Callable[[], None],
    ) -> None:
        self._run, self._recipe, self._say, self._tick = run, recipe, say, tick
        self._url: str | None = record.get("url")
        self._asked = self._restored = self._started = False
        self._mirror: Mirror | None = None

    @property
    def lost(self) -> str | None:
        return self._mirror.lost if self._mirror else None

    def claim(self, token: str, at_least: int, give_up: Callable[[], object]) -> int | None:
        """The number of the next attempt, at least `at_least`; None if `give_up()` came true meanwhile.

        Raises Taken. The first time the store answers, what the folder lacks is brought from it. Where it is
        a newer checkpoint, there is no going on without it: an older one would win by the higher number.
        """
        if not self._url:
            return at_least
        fence, self._asked, said = at_least, True, ""
        while not give_up():
            behind = False
            try:
                mirror = self._opened(self._url)
                claimed = self._meanwhile(partial(mirror.claim, token, at_least), give_up)
                if claimed is None:
                    return None
                fence = claimed
                if not self._restored or mirror.foreign:
                    self._restored = self._meanwhile(partial(_restore, mirror), give_up) is True
            except StoreError as error:
                behind = self._behind()
                if not behind:
                    self._say(f"going on without the store: {error.message}")
                elif said != (said := error.message):
                    self._say(f"waiting for the store, where the run is newer: {error.message}")
            if not behind and not give_up():
                self._start()
                return fence
            self._pause(give_up)
        return None

    def _behind(self) -> bool:
        """Whether the store, when it was claimed, had what is newer than here, and it was not brought."""
        there = self._mirror.newest if self._mirror else None
        if self._mirror and self._mirror.foreign:
            return True
        if self._restored or there is None:
            return False
        here = self._meanwhile(partial(newest, self._run), lambda: False)
        return here is None or here < there

    def _pause(self, give_up: Callable[[], object]) -> None:
        until = time.monotonic() + RETRY
        while time.monotonic() < until and not give_up():
            self._tick()
            time.sleep(POLL)

    def flush(self, limit: float = FLUSH) -> None:
        """Within `limit` seconds, send what is not in the store yet, and say so if that cannot be done."""
        if not self._url or self.lost:
            return
        try:
            # one that could not be opened for the attempts has not asked whether they may be published
            mirror = self._mirror if self._asked else self._opened(self._url)
        except StoreError as error:
            mirror = None
            self._say(f"going on without the store: {error.message}")
        if mirror is None or self._behind():  # what is older here must not be put over what is there
            self._say(NOT_ALL if mirror is None else "what is in the store is newer, and was left as it is")
            return
        self._start()
        began = time.monotonic()

        def hopeless() -> bool:
            away = (read_json(self._run.synced) or {}).get("away_since")
            return bool(away) and time.monotonic() - began > FLUSH_AWAY

        if not self._meanwhile(lambda: mirror.flush(limit), hopeless):
            self._say(f"the store was left as it is: {mirror.lost}" if mirror.lost else NOT_ALL)

    def close(self, limit: float = LAST_WORDS) -> None:
        """Within `limit` seconds, send the last words; then let go of the run in the store."""
        mirror = self._mirror
        if mirror is None:
            return
        if self._started:
            self._meanwhile(lambda: mirror.stop(0.0 if mirror.lost else limit), lambda: False)
        if not mirror.lost:
            self._meanwhile(mirror.release, lambda: False)

    def _opened(self, url: str) -> "Mirror":
        """The mirror. Raises StoreError: a profile may be gone, a file of credentials torn."""
        if self._mirror is None:
            from launcher import mirror
            from launcher.storage import open_store

            store, every = open_store(url, self._recipe.storage.settings), self._recipe.mirror.every
            stay = self._recipe.checkpoint
            self._mirror = mirror.Mirror(self._run, store, every, stay.keep, stay.keep_every)
        return self._mirror

    def _start(self) -> None:
        if self._mirror and not self._started:
            self._mirror.start()
            self._started = True

    def _meanwhile(self, call: Callable[[], T], give_up: Callable[[], object]) -> T | None:
        """The result of `call`, done in a thread while the lease moves on; None if `give_up()` came true."""
        results: list[T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                results.append(call())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True)  # given up, it must not keep the process
        thread.start()
        while thread.is_alive():
            self._tick()
            if give_up():
                return None
            thread.join(POLL)
        if errors:
            raise errors[0]
        return results[0]


def _restore(mirror: "Mirror") -> bool:
    mirror.restore()
    return True
