"""A recipe, read: its YAML, its `train` section, and mistakes in it told in our words."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from detcore.config import Train
from detcore.config.section import Section
from detcore.errors import WRONG_PATH, InputError

SENTENCES = {
    "missing": "is missing",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text (quote it if it looks like a number)",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "model_type": "must hold `key: value` lines",
    "model_attributes_type": "must hold `key: value` lines",
    "too_short": "must not be empty",
}
BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}

Problem = dict[str, Any]


class RecipeLoader(yaml.SafeLoader):
    """Numbers as YAML 1.2 has them: `1e-3` is one, `24:00:00` and `yes` are words."""


RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
]:
    RecipeLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first)
    )


def read_recipe(path: Path) -> Train:
    """The `train` section of a frozen recipe. Raises InputError with a line for each mistake."""
    document = _document(path)
    if "extends" in document:
        cure = f"`launch {path} --freeze` prints it with everything filled in"
        raise InputError(f"{path}: extends other recipes, and only a frozen one can be run; {cure}")
    return train_section(path, document)


def read_unfrozen(path: Path) -> Train:
    """The same of a recipe as people write it: one that extends others is frozen by `launch`, the command.
    Raises InputError."""
    document = _document(path)
    if "extends" in document:
        beside = Path(sys.executable).with_name("launch")
        launch = str(beside) if beside.is_file() else shutil.which("launch")
        if launch is None:
            raise InputError(
                f"{path}: extends other recipes, which takes `launch` to read, and it is not here"
            )
        done = subprocess.run([launch, str(path.absolute()), "--freeze"], capture_output=True, text=True)
        if done.returncode:
            raise InputError(done.stderr.strip().removeprefix("launch: "))
        document = yaml.load(done.stdout, RecipeLoader)
    return train_section(path, document)


def _document(path: Path) -> dict[str, Any]:
    """What is in the file, with a `train` section or recipes that may have one."""
    try:
        document = yaml.load(path.read_text(), RecipeLoader)
    except WRONG_PATH as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(document, dict) or not ("extends" in document or "train" in document):
        raise InputError(f"{path}: has no `train` section")
    return document


def train_section(path: Path, document: dict[str, Any]) -> Train:
    """That of a document that was in the file at `path`. Raises InputError."""
    if not isinstance(document.get("train"), dict):
        raise InputError(f"{path}: has no `train` section")
    try:
        return Train.model_validate(document["train"])
    except ValidationError as error:
        lines = [f"{path}: {problem['message']}" for problem in mistakes(error)]
        raise InputError("\n".join(lines)) from None


def mistakes(error: ValidationError) -> list[Problem]:
    """What pydantic found in a `train` section, each as {"loc", "message", "kind", "known"?}."""
    return [_problem(finding) for finding in error.errors()]


def _problem(finding: Any) -> Problem:
    path, _ = _walk(finding["loc"])
    loc = ["train", *path]
    message = f"`{'.'.join(map(str, loc))}` {_sentence(finding)}"
    problem = {"loc": loc, "message": message, "kind": "recipe"}
    if finding["type"] == "extra_forbidden":
        _, (section, *_) = _walk(finding["loc"][:-1])
        problem["known"] = list(section.model_fields)
    return problem


def _sentence(finding: Any) -> str:
    kind, context = finding["type"], finding.get("ctx", {})
    if kind == "extra_forbidden":
        return "is unknown"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f"must be {context['expected'].replace(chr(39), '`')}, not `{finding['input']}`"
    if kind == "union_tag_invalid":
        tags, key = (context[part].replace("'", "`") for part in ("expected_tags", "discriminator"))
        return f"must have as {key} one of {tags}, not `{context['tag']}`"
    if kind == "union_tag_not_found":
        return f"needs a {context['discriminator'].replace(chr(39), '`')}"
    if kind.startswith(("greater_than", "less_than")):
        (key, bound), *_ = context.items()
        return f"must be {BOUNDS[key]} {bound:g}, not {finding['input']:g}"
    return SENTENCES.get(kind, finding["msg"])


def _walk(loc: tuple[str | int, ...]) -> tuple[list[str | int], list[type[Section]]]:
    """The keys on the way to `loc`, and what sections may be there.

    Where a section is one of several kinds, pydantic puts the name of the kind between the keys."""
    path: list[str | int] = []
    kinds: list[type[Section]] = [Train]
    for part in loc:
        if len(kinds) > 1:
            kinds = [kind for kind in kinds if part in get_args(kind.model_fields["name"].annotation)]
            continue
        path.append(part)
        field = kinds[0].model_fields.get(str(part)) if kinds else None
        kinds = _sections(field.annotation) if field else []
    return path, kinds


def _sections(annotation: Any) -> list[type[Section]]:
    """The sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]
