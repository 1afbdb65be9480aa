"""A recipe: `extends`, overrides, checking, freezing. Its keys are in `launcher.recipe.sections`."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, Field, ValidationError

from launcher.errors import RecipeError
from launcher.recipe import environment
from launcher.recipe.document import Document, Loc, Mark, Problem, display, dotted
from launcher.recipe.sections import (
    Checkpoint,
    Env,
    Fetch,
    Mirror,
    Program,
    Resources,
    Restart,
    Section,
    Slurm,
    Storage,
    Tmux,
    apart,
)
from launcher.recipe.yamlpos import dump, read_file, read_override

Flags = Mapping[str, tuple[str, object]]
_NO_FLAGS: Flags = {}


class Recipe(Section):
    program: Program
    resources: Resources = Resources()
    restart: Restart = Restart()
    fetch: Annotated[list[Fetch], AfterValidator(apart)] = Field(default=[])
    """Data sets that must be on a machine before the program starts there."""
    checkpoint: Checkpoint = Checkpoint()
    storage: Storage = Storage()
    mirror: Mirror = Mirror()
    env: Env = Env()
    slurm: Slurm = Slurm()
    tmux: Tmux = Tmux()
    train: dict[str, Any] = Field(default={})
    """Belongs to the program, which checks it."""

    def dump(self) -> str:
        """The frozen recipe: YAML that stands alone, with every default spelled out."""
        return dump(self.model_dump(exclude_none=False, by_alias=True) | {"train": self.train})

    def hash(self) -> str:
        """sha256 over what determines the training: not where it runs, nor how it is brought back."""
        parts = [self.program.model_dump(), self.train, self.checkpoint.every]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load(path: Path, overrides: Sequence[str] = (), flags: Flags = _NO_FLAGS) -> Recipe:
    """Read, merge and check a recipe. `flags`: key -> (the option that says so, value).

    Raises RecipeError with a block per mistake: `file:line:column: sentence`, the line, a caret."""
    return parse(resolve(path, overrides, flags))


def load_frozen(path: Path) -> Recipe:
    """A recipe as it lies in a run folder: one without `extends`."""
    document = read_file(path)
    if "extends" in document.data:
        raise document.error([Problem(("extends",), "a frozen recipe cannot extend another")])
    return parse(document)


def resolve(path: Path, overrides: Sequence[str] = (), flags: Flags = _NO_FLAGS) -> Document:
    """The recipe with its bases under it and the command line on top, not yet checked."""
    document = _with_bases(path, ())
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"{text}: an override looks like section.key=value")
        _override(document, key, value, f"{text} on the command line")
    return _flagged(document, flags)


def typed(data: dict[str, Any], flags: Flags) -> Document:
    """What no file says: `data` with the options of the command line on top, not yet checked."""
    return _flagged(Document(data, Mark("launch")), flags)


def _flagged(document: Document, flags: Flags) -> Document:
    for key, (flag, given) in flags.items():
        _override(document, key, given, flag)
    return document


def _with_bases(path: Path, above: tuple[Path, ...]) -> Document:
    real = path.resolve()
    document = read_file(path)
    bases = document.data.pop("extends", [])
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise document.error([Problem(("extends",), "`extends` takes a path or a list of paths")])
    merged = Document({}, document.root)
    for index, name in enumerate(names):
        base, loc = path.parent / name, ("extends",) if isinstance(bases, str) else ("extends", index)
        circle = (*above, real)
        if base.resolve() in circle:
            files = [*circle[circle.index(base.resolve()) :], base.resolve()]
            chain = " -> ".join(display(file) for file in files)
            raise document.error([Problem(loc, f"`extends` goes in a circle: {chain}")])
        if not base.is_file():
            raise document.error([Problem(loc, f"there is no recipe {display(base)} to extend")])
        merged.merge(_with_bases(base, circle))
    merged.merge(document)
    return merged


def _override(document: Document, key: str, value: object, origin: str) -> None:
    over = read_override(key, value, origin)
    here: Any = document.data
    parts = key.split(".")
    if parts[0] == "extends":
        raise over.error(
            [Problem(("extends",), "`extends` belongs into the recipe; write one that extends both")]
        )
    for end, part in enumerate(parts[:-1], 1):
        here = here.get(part) if part in here else {}
        if here is None:  # `evaluation: null` and then `evaluation.every=5`
            here = {}
        if not isinstance(here, dict):
            above = ".".join(parts[:end])
            raise over.error([Problem(tuple(parts[:end]), f"`{above}` holds no keys to override")])
    program = document.data.get("program")
    # The launcher's own keys, and those of a program with a check, are checked later; else the recipe knows.
    unchecked = parts[0] == "train" and isinstance(program, dict) and not program.get("check")
    if unchecked and parts[-1] not in here:
        raise over.error([Problem(tuple(parts), f"`{key}` is not in the recipe", list(here))])
    document.merge(over)


def parse(document: Document) -> Recipe:
    """The merged document as a checked recipe."""
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        raise document.error(_plain(finding) for finding in error.errors()) from None
    problems = list(_across(recipe, document))
    if problems:
        raise document.error(problems)
    return recipe


def _across(recipe: Recipe, document: Document) -> Iterator[Problem]:
    """What single fields cannot tell."""
    program, resources = recipe.program, recipe.resources
    if (program.module is None) == (program.script is None):
        yield Problem(("program",), "`program` names either a `module` or a `script`")
    if recipe.env.conda is not None and recipe.env.venv is not None:
        yield Problem(("env", "venv"), "`env` names either a `conda` environment or a `venv`")
    have = resources.gpus * resources.nodes
    if have < resources.min_gpus:
        what = ("GPU" if resources.device == "cuda" else "worker") + "s" * (have != 1)
        why = f": {resources.min_gpus_why}" if resources.min_gpus_why else ""
        few = f"{have} {what} {'are' if have != 1 else 'is'} too few"
        yield Problem(("resources", "gpus"), f"{few}; this recipe needs {resources.min_gpus}{why}")
    names: list[tuple[Loc, str]] = [(("env", "vars", name), name) for name in recipe.env.vars]
    names += [(("env", "keep", index), name) for index, name in enumerate(recipe.env.keep)]
    for loc, name in names:
        if environment.names_secret(name):
            why = f"`{name}` looks like a secret, and it would be written into the run folder"
            yield Problem(loc, why, quiet=loc[1] == "vars")
        if name.startswith("LAUNCH_"):
            yield Problem(loc, f"`{name}` belongs to the launcher")
    for loc in environment.secrets_in(document.data):
        where = "put them into a profile (storage.profile) or a file"
        yield Problem(loc, f"`{dotted(loc)}` holds credentials; {where}", quiet=True)


_SENTENCES = {
    "missing": "is missing",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text (quote it if it looks like a number)",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must hold `key: value` lines",
    "model_type": "must hold `key: value` lines",
    "string_pattern_mismatch": "has characters that are not allowed here",
}


def _plain(error: Any) -> Problem:
    """One of pydantic's findings in our words."""
    loc: Loc = tuple(part for part in error["loc"] if part != "[key]")
    name = f"`{dotted(loc)}`"
    if error["type"] == "extra_forbidden":
        return Problem(loc, f"{name} is unknown", _fields(loc[:-1]))
    if error["type"] == "value_error":
        given = "" if isinstance(error["input"], list) else f", not {error['input']!r}"
        return Problem(loc, f"{name} {error['ctx']['error']}{given}")
    if error["type"] == "greater_than":
        return Problem(loc, f"{name} must be more than {error['ctx']['gt']:g}")
    if error["type"] == "greater_than_equal":
        return Problem(loc, f"{name} must be at least {error['ctx']['ge']}, not {error['input']}")
    if error["type"] == "literal_error":
        expected = error["ctx"]["expected"].replace("'", "`")
        return Problem(loc, f"{name} must be {expected}, not `{error['input']}`")
    return Problem(loc, f"{name} {_SENTENCES.get(error['type'], error['msg'])}")


def _fields(loc: Loc) -> list[str]:
    if not loc:
        return [*Recipe.model_fields, "extends"]
    section: Any = Recipe.model_fields[str(loc[0])].annotation
    section = next(iter(get_args(section)), section)  # of a list: what it lists
    known = isinstance(section, type) and issubclass(section, Section)
    return [field.alias or name for name, field in section.model_fields.items()] if known else []


def schema() -> dict[str, Any]:
    """JSON Schema for editors: of a recipe as written, so `extends` is in it and nothing is required."""
    made = Recipe.model_json_schema()
    made.pop("required", None)
    paths = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    made["properties"]["extends"] = paths | {"description": "Recipes under this one, relative to this file."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}
