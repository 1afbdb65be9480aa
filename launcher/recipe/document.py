"""Plain data whose every key and value knows where it was written: merging, pointing at mistakes."""

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import RecipeError

Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class Mark:
    """A place that a person can go to: a line of a file, or something typed (then `line` is 0)."""

    source: str
    line: int = 0
    column: int = 0
    text: str = ""

    def block(self, sentence: str) -> str:
        """The sentence with its place and, from a file, the line with a caret under the column."""
        if not self.line:
            return f"{self.source}: {sentence}"
        start = max(0, self.column - 80)  # keep the caret in sight when the line is very long
        shown = self.text[start : start + 110]
        gap = re.sub(r"[^\t]", " ", shown[: self.column - 1 - start])
        return f"{self.source}:{self.line}:{self.column}: {sentence}\n    {shown}\n    {gap}^"


@dataclass(frozen=True)
class Problem:
    """A mistake at a place of the merged recipe. `known`: what could have stood instead of an unknown key."""

    loc: Loc
    message: str
    known: Sequence[str] | None = None
    quiet: bool = False  # do not repeat the line: it holds a secret


@dataclass
class Document:
    """Plain data, and for every location in it the marks of its key and of its value."""

    data: dict[str, Any]
    root: Mark
    keys: dict[Loc, Mark] = field(default_factory=dict)
    values: dict[Loc, Mark] = field(default_factory=dict)

    def merge(self, over: "Document", at: Loc = ()) -> None:
        """Lay `over` on top: mappings merge, anything else replaces."""
        mine, theirs = self.at(at), over.at(at)
        for key, value in theirs.items():
            loc = (*at, key)
            if isinstance(mine.get(key), dict) and isinstance(value, dict):
                self.merge(over, loc)
                continue
            mine[key] = value
            for marks, new in ((self.keys, over.keys), (self.values, over.values)):
                for old in [place for place in marks if place[: len(loc)] == loc]:
                    del marks[old]
                marks.update({place: mark for place, mark in new.items() if place[: len(loc)] == loc})

    def at(self, loc: Loc) -> Any:
        value: Any = self.data
        for part in loc:
            value = value[part]
        return value

    def error(self, problems: Iterable[Problem]) -> RecipeError:
        """All the problems as one error, a block each, in the order of their places."""
        blocks: dict[tuple[str, int, int, str], str] = {}
        for problem in problems:
            mark = self._mark(problem)
            block = mark.block(problem.message + _suggestion(problem))
            place = (mark.source, mark.line, mark.column, problem.message)
            blocks[place] = block.partition("\n")[0] if problem.quiet else block
        return RecipeError("\n".join(blocks[place] for place in sorted(blocks)))

    def _mark(self, problem: Problem) -> Mark:
        first, second = (self.values, self.keys) if problem.known is None else (self.keys, self.values)
        loc = problem.loc
        while loc:  # what a default filled in has no place of its own: point at what holds it
            if loc in first or loc in second:
                return first[loc] if loc in first else second[loc]
            loc, first, second = loc[:-1], self.keys, self.values
        return self.root


def dotted(loc: Loc) -> str:
    """`("train", "data", 0)` as people write it: `train.data[0]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".")


def _suggestion(problem: Problem) -> str:
    if problem.known is None:
        return ""
    near = difflib.get_close_matches(str(problem.loc[-1]) if problem.loc else "", problem.known, 1, 0.5)
    if near:
        return f"; did you mean `{near[0]}`?"
    return f"; known here: {', '.join(sorted(problem.known))}" if problem.known else ""


def display(path: Path) -> str:
    """A path as short as it can be said from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
