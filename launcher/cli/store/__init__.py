"""`launch store`: the verbs of `aws s3`, on buckets and folders alike, and a server of one's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

RULES = "launch.store.rules"


@click.group()
def store() -> None:
    """Copy to, from and between buckets and folders; serve a bucket.

    \b
      launch store ls s3://bucket/prefix/
      launch store cp weights.pth s3://bucket/weights/
      launch store sync data/coco s3://bucket/coco --exclude '*' --include '*.jpg'

    The words of `aws s3`. Credentials, region and endpoint: profile or AWS_* variables.
    Exit status: 0 all done, 1 something failed, 2 the input was wrong.
    """


class Filtered(click.Command):
    """Keeps --include and --exclude in the order they were typed, which click would lose."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rules, rest = [], iter(args)
        for word in rest:
            if word == "--":
                break
            name, equals, value = word.partition("=")
            if name in ("--include", "--exclude"):  # no other option takes a value
                rules.append((name == "--include", value if equals else next(rest, "")))
        ctx.meta[RULES] = rules
        return super().parse_args(ctx, args)


def options(*extra: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    shared = [
        click.option("--include", multiple=True, metavar="PATTERN", help="Take what matches after all."),
        click.option("--exclude", multiple=True, metavar="PATTERN",
                     help="Leave out what matches; the last --include or --exclude that matches decides."),
        click.option("--dry-run", "--dryrun", is_flag=True, help="Say what would be done; do nothing."),
    ]  # fmt: skip

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([*extra, *shared]):
            function = option(function)
        return function

    return add


RECURSIVE = click.option("--recursive", is_flag=True, help="All that is below a folder.")


@store.command()
@click.argument("place", required=False)
@click.option("--recursive", is_flag=True, help="All that is below, with full names.")
def ls(place: str | None, recursive: bool) -> int:
    """List buckets, or what is at PLACE: s3://BUCKET/PREFIX or a folder."""
    from launcher.cli.store import listing, verbs

    with verbs.reached():
        return listing.show(place, recursive)


@store.command(cls=Filtered)
@click.argument("source")
@click.argument("target")
@options(RECURSIVE)
def cp(source: str, target: str, recursive: bool, dry_run: bool, **rules: Any) -> int:
    """Copy an object or file, or all below a folder with --recursive."""
    from launcher.cli.store import verbs

    return verbs.copy(source, target, recursive, _rules(), dry_run, move=False)


@store.command(cls=Filtered)
@click.argument("source")
@click.argument("target")
@options(RECURSIVE)
def mv(source: str, target: str, recursive: bool, dry_run: bool, **rules: Any) -> int:
    """Copy, and delete each source once it has arrived."""
    from launcher.cli.store import verbs

    return verbs.copy(source, target, recursive, _rules(), dry_run, move=True)


@store.command(cls=Filtered)
@click.argument("target")
@options(RECURSIVE)
def rm(target: str, recursive: bool, dry_run: bool, **rules: Any) -> int:
    """Delete an object or file, or all below a folder with --recursive."""
    from launcher.cli.store import verbs

    return verbs.remove(target, recursive, _rules(), dry_run)


@store.command(cls=Filtered)
@click.argument("source")
@click.argument("target")
@options(
    click.option("--delete", is_flag=True, help="At the end delete in TARGET what SOURCE does not have."),
    click.option("--checksum", is_flag=True, help="Compare contents (SHA-256) where sizes are equal."),
)
def sync(source: str, target: str, delete: bool, checksum: bool, dry_run: bool, **rules: Any) -> int:
    """Copy what is new or changed below SOURCE to TARGET.

    Run again after an interruption, it goes on."""
    from launcher.cli.store import verbs

    return verbs.sync(source, target, _rules(), dry_run, delete, checksum)


@store.command()
@click.argument("folder", default=".store", type=click.Path(path_type=Path))
def serve(folder: Path) -> None:
    """Serve an S3-compatible store from FOLDER, on this machine only, until Ctrl-C."""
    from launcher.storage.server import serve as serve_store

    serve_store(folder)


def _rules() -> list[tuple[bool, str]]:
    rules: list[tuple[bool, str]] = click.get_current_context().meta[RULES]
    return rules
