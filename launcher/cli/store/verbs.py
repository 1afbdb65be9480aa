"""What cp, mv, rm and sync do: a transfer, told on this terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from launcher import transfer
from launcher.cli.store.terminal import Terminal
from launcher.errors import StoreError

Rules = list[tuple[bool, str]]


def copy(source: str, target: str, recursive: bool, rules: Rules, dry_run: bool, move: bool) -> int:
    filters = transfer.Filters(rules)
    return _run("moved" if move else "copied", dry_run, lambda terminal: transfer.copy(
        source, target, recursive=recursive, move=move, filters=filters, dry_run=dry_run,
        report=terminal, stop=terminal.stopped,
    ))  # fmt: skip


def remove(target: str, recursive: bool, rules: Rules, dry_run: bool) -> int:
    filters = transfer.Filters(rules)
    return _run("", dry_run, lambda terminal: transfer.remove(
        target, recursive=recursive, filters=filters, dry_run=dry_run, report=terminal, stop=terminal.stopped,
    ))  # fmt: skip


def sync(source: str, target: str, rules: Rules, dry_run: bool, delete: bool, checksum: bool) -> int:
    filters = transfer.Filters(rules)
    return _run("copied", dry_run, lambda terminal: transfer.sync(
        source, target, filters=filters, delete=delete, checksum=checksum, dry_run=dry_run,
        report=terminal, stop=terminal.stopped,
    ))  # fmt: skip


@contextmanager
def reached() -> Iterator[None]:
    """What a store's error advises is meant for recipes; here it is reached by the environment alone."""
    try:
        yield
    except StoreError as error:
        error.hint = "it is reached by AWS_PROFILE, AWS_ENDPOINT_URL and the other AWS_* variables"
        raise


def _run(done: str, dry_run: bool, work: Callable[[Terminal], transfer.Summary]) -> int:
    with reached(), Terminal() as terminal:
        summary = work(terminal)
    return terminal.end(summary, told(summary, done, dry_run))


def told(summary: transfer.Summary, done: str, dry_run: bool) -> str:
    """The counts in one line."""
    counts = [
        (summary.done, f"{done} ({summary.size / 1e6:.1f} MB)", done != ""),
        (summary.same, "unchanged", False),
        (summary.deleted, "deleted", done == ""),
        (summary.links, "symbolic links skipped", False),
        (summary.failed, "failed", False),
        (summary.left, "not tried", False),
        (summary.kept, "not deleted, since not all went well", False),
    ]
    line = ", ".join(f"{count} {what}" for count, what, always in counts if count or always)
    return f"{'dry run: ' if dry_run else 'stopped: ' if summary.stopped else ''}{line}"
