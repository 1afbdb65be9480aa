"""--include and --exclude, as `aws s3` has them: the last one that matches decides."""

import re
from collections.abc import Sequence
from fnmatch import translate

from launcher.errors import UserError


class Filters:
    """Patterns over keys relative to the source; `*` matches `/` too. What no pattern matches is in."""

    def __init__(self, rules: Sequence[tuple[bool, str]] = ()) -> None:
        """`rules`: (is it an include, pattern), in the order of the command line."""
        for _, pattern in rules:
            if not pattern or pattern.startswith("/"):
                raise UserError(
                    f"the pattern {pattern!r} matches nothing",
                    "patterns are relative to the source: --exclude 'folder/*'",
                )
        # From the last to the first, so that the first match decides.
        self._rules = [(include, re.compile(translate(text)).match) for include, text in reversed(rules)]
        # A pattern that ends in `*` and matches `folder/` matches all that is below it.
        self._whole = [] if any(include for include, _ in rules) else [
            re.compile(translate(text)).match for _, text in rules if text.endswith("*")
        ]  # fmt: skip

    def take(self, key: str) -> bool:
        for include, match in self._rules:
            if match(key):
                return include
        return True

    def skip_folder(self, folder: str) -> bool:
        """Whether nothing below `folder` (which ends in a slash) can be in: it need not even be read."""
        return any(match(folder) for match in self._whole)
