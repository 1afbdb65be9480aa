"""YAML in and out: text to a Document with the place of every key and value, and plain data to text.

Numbers and words are read as YAML 1.2 reads them: `1e-3` is a number, `24:00:00`, `yes` and `010` as an
octal are not. Only plain data is built (safe), keys are always text, twice the same key is refused, and so
are anchors: `extends` is the one way to share, and without them no file can grow beyond its own size.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import RecipeError
from launcher.recipe.document import Document, Loc, Mark, display

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_WORDS: dict[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip


def read_file(path: Path) -> Document:
    """Raises RecipeError: not there, not readable, not UTF-8, not YAML, not a mapping."""
    name = display(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{name}: there is no such recipe") from None
    except IsADirectoryError:
        raise RecipeError(f"{name}: this is a folder, not a recipe") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{name}: not UTF-8 text, so no recipe") from None
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read: {error.strerror}") from None
    lines = text.splitlines() or [""]

    def mark(place: yaml.Mark | None) -> Mark:
        line = min(place.line, len(lines) - 1) if place else 0
        return Mark(name, line + 1, (place.column if place else 0) + 1, lines[line])

    document = Document({}, Mark(name, 1, 1, lines[0]))
    document.data = _build(text, mark, document)
    return document


def read_override(dotted_key: str, value: object, origin: str) -> Document:
    """One value from the command line, as a document to lay on top. Text is read as YAML."""
    mark = Mark(origin)
    document = Document({}, mark)
    loc: Loc = tuple(dotted_key.split("."))
    if not all(loc):
        raise RecipeError(mark.block("an override looks like section.key=value"))
    if isinstance(value, str):
        value = _build(value, lambda place: mark, document, loc)
    for end in range(1, len(loc) + 1):
        document.keys[loc[:end]] = document.values[loc[:end]] = mark
    for part in reversed(loc):
        value = {part: value}
    assert isinstance(value, dict)
    document.data = value
    return document


def dump(data: object) -> str:
    """YAML that every reader, of YAML 1.1 or 1.2, takes for the same data."""
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None
    )


class _Loader(yaml.SafeLoader):
    """Composes nodes only; `_build` makes the data."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        refused = ""
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            refused = "anchors and aliases are not read; share through `extends`"
        elif getattr(event, "tag", None):
            refused = f"tags such as {event.tag} are not read; write plain values"
        if refused:
            raise yaml.MarkedYAMLError(problem=refused, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 (PyYAML's own rules) or 1.2 would take for something else."""


for _name, _pattern in (("float", _FLOAT), ("int", _INT)):
    _Dumper.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(f"^({_pattern.pattern})$"), list("-+.0123456789")
    )


def _build(text: str, mark: Any, document: Document, at: Loc = ()) -> Any:
    """Text to plain data, filling the document's marks. The top level of a file must be a mapping."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not at and not isinstance(node, yaml.MappingNode):
            what = "must hold `key: value` lines" if node else "is empty"
            raise RecipeError(document.root.block(f"this recipe {what}"))
        return _value(node, mark, document, at) if node is not None else None
    except yaml.MarkedYAMLError as error:
        place = mark(error.problem_mark or error.context_mark)
        raise RecipeError(place.block(f"not YAML: {error.problem or error.context}")) from None
    except yaml.reader.ReaderError as error:
        raise RecipeError(document.root.block(f"not YAML: {error.reason}")) from None
    except RecursionError:
        raise RecipeError(document.root.block("nested too deeply to be a recipe")) from None
    finally:
        if loader is not None:
            loader.dispose()


def _value(node: yaml.Node, mark: Any, document: Document, loc: Loc) -> Any:
    if loc:
        document.values[loc] = mark(node.start_mark)
    if isinstance(node, yaml.MappingNode):
        return dict(_items(node, mark, document, loc))
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, mark, document, (*loc, i)) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    try:
        return _scalar(node)
    except ValueError as error:
        raise RecipeError(mark(node.start_mark).block(str(error))) from None


def _items(node: yaml.MappingNode, mark: Any, document: Document, loc: Loc) -> Iterator[tuple[str, Any]]:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        place = mark(key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(place.block("a key must be plain text"))
        key = key_node.value
        if key in seen:
            first = f"line {seen[key]}" if place.line else "before"
            raise RecipeError(place.block(f"`{key}` is here twice (first: {first})"))
        seen[key] = place.line
        document.keys[(*loc, key)] = place
        yield key, _value(value_node, mark, document, (*loc, key))


def _scalar(node: yaml.ScalarNode) -> Any:
    """By the core schema of YAML 1.2.2, section 10.3.2."""
    text: str = node.value
    if node.style is not None:  # quoted, or a block: text
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        if len(text) > 40:
            raise ValueError("this number is too long")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        number = float(text) if not text.lower().lstrip("+-").startswith((".inf", ".nan")) else math.nan
        if not math.isfinite(number):
            raise ValueError("numbers here must be finite")
        return number
    return text
