"""What the documents tell people to type is there: commands, options, make targets, recipes, links."""

import itertools
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from launcher.cli.main import cli
from tests.jobs import LAUNCH, ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", *map(str, (ROOT / "docs").glob("*.md")))]
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "recipes").glob("*.yaml"))


def typed(page: Path, program: str) -> list[str]:
    """The command lines of a page that start with `program`: indented blocks and `code`."""
    text = page.read_text()
    lines = re.findall(rf"(?:^    |`)({program} [^`\n]*)", text, re.MULTILINE)
    return [line.split(" #")[0].strip().removesuffix("&").strip() for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_verbs_and_options_are_there(page: Path) -> None:
    for line in typed(page, "launch"):
        command, rest = cli.commands["run"], shlex.split(line)[1:]
        group: click.Command | None = cli
        while isinstance(group, click.Group) and rest and rest[0] in group.commands:
            command = group = group.commands[rest.pop(0)]
        known = {"-h", "--help", *(name for parameter in command.params for name in parameter.opts)}
        ours = itertools.takewhile(lambda word: word != "--", rest)
        used = {word.split("=")[0] for word in ours if word.startswith("-")}
        assert used <= known, f"{page.name}: `{line}`: no {used - known}"
        if (
            command is cli.commands["run"]
            and rest
            and rest[0].startswith("recipes/")
            and "mine" not in rest[0]
        ):
            assert (ROOT / rest[0]).exists(), f"{page.name}: `{line}`"


def test_make_targets_are_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for line in typed(page, "make"):
            assert line.split()[1] in targets, f"{page.name}: `{line}`"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_recipe_is_valid() -> None:
    done = subprocess.run([*LAUNCH, "validate", *map(str, RECIPES)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert RECIPES and all(str(recipe) in done.stdout for recipe in RECIPES)


def test_every_verb_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert not [name for name in cli.commands if name != "run" and f"launch {name}" not in text]


def test_modules_and_their_options_are_there() -> None:
    for page in PAGES:
        for line in typed(page, "python -m detcore"):
            module, *rest = shlex.split(line)[2:]
            source = ROOT / f"{module.replace('.', '/')}.py"
            assert source.is_file(), f"{page.name}: `{line}`"
            unknown = [
                word for word in rest if word.startswith("--") and f'"{word}"' not in source.read_text()
            ]
            assert not unknown, f"{page.name}: `{line}`: no {unknown}"


def test_every_module_that_people_run_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for source in (ROOT / "detcore").rglob("*.py"):
        if "argparse.ArgumentParser" in source.read_text():
            module = ".".join(source.relative_to(ROOT).with_suffix("").parts)
            assert f"-m {module} " in text or f"-m {module}`" in text, module
