"""Objects and files from one place to another: what is behind `launch store cp|mv|rm|sync`, and `fetch`.

First both sides are listed, then it is decided what to do, and only then is anything written; see plan.py for
the decision, carry.py for the work.
"""

from collections.abc import Callable

from launcher.errors import LaunchError, UserError
from launcher.storage import Entry, NotFound, StoreSettings
from launcher.transfer import places
from launcher.transfer.carry import Carrier
from launcher.transfer.filters import Filters
from launcher.transfer.places import Place
from launcher.transfer.plan import Plan, compare, hostile, is_marker, surplus
from launcher.transfer.report import Report, Summary
from launcher.transfer.scan import Scan, scan, scan_one
from launcher.transfer.tree import Tree

__all__ = ["Filters", "Report", "Summary", "copy", "remove", "sync"]

SHOWN = 5  # hostile keys that are told one by one
EVERYTHING, SILENT = Filters(), Report()


def never() -> bool:
    return False


def sync(
    source: str, target: str, *, filters: Filters = EVERYTHING, delete: bool = False, checksum: bool = False,
    dry_run: bool = False, settings: StoreSettings | None = None, report: Report = SILENT,
    stop: Callable[[], bool] = never,
) -> Summary:  # fmt: skip
    """Make what is below `target` like what is below `source`; each is a folder or `s3://bucket/prefix`.

    Cut short at any moment, the next call goes on where this one ended. `delete`: last of all, and only if
    nothing failed, what is not in the source is deleted. `stop` is asked ten times a second.

    Raises UserError for what cannot be meant and LaunchError before anything is written if the source holds
    keys that must not be written to disk; what fails later is counted and told to `report`.
    """
    here, there = places.folder(source, settings), places.folder(target, settings)
    places.refuse_overlap(here, there)
    _must_be_folder(here, source)
    carrier = Carrier(here, there, report, stop, checksum=checksum, dry_run=dry_run)
    found = _listed(here, filters, carrier)
    if delete and not found.files:
        raise UserError(f"nothing is deleted, since {source} is empty or all of it is excluded",
                        "launch store rm --recursive deletes all below a place")  # fmt: skip
    existing = _listed(there, filters, carrier, quiet=True, lenient=not delete)
    plan = compare(found.files, existing.files, exact=there.root is not None, checksum=checksum)
    unwanted = surplus(found.files, existing.files, found.links) if delete else []
    _refuse(here, there, plan)
    if there.root is not None and not dry_run:
        Tree(there.root).clean(existing.temporary)
    carrier.run(plan)
    if carrier.summary.complete:
        carrier.delete(unwanted)
    else:
        carrier.summary.kept = len(unwanted)
    return carrier.summary


def copy(
    source: str, target: str, *, recursive: bool = False, move: bool = False, filters: Filters = EVERYTHING,
    dry_run: bool = False, settings: StoreSettings | None = None, report: Report = SILENT,
    stop: Callable[[], bool] = never,
) -> Summary:  # fmt: skip
    """Copy one object, or with `recursive` all below `source`, whatever is in `target`. Raises as `sync`."""
    plan = Plan()
    if recursive:
        here, there = places.folder(source, settings), places.folder(target, settings)
        places.refuse_overlap(here, there)
        _must_be_folder(here, source)
        carrier = Carrier(here, there, report, stop, move=move, dry_run=dry_run)
        found = _listed(here, filters, carrier)
        plan.copy = [(found.files[key], key) for key in sorted(found.files)]
    else:
        here, name = _single(source, settings)
        if places.is_folder(target):
            there, new = places.folder(target, settings), name
        else:
            there, new = places.one(target, settings)
        if here.name + name == there.name + new:
            raise UserError(f"source and target are the same: {source}")
        carrier = Carrier(here, there, report, stop, move=move, dry_run=dry_run)
        if filters.take(name):
            plan.copy = [(_entry(here, name, source), new)]
    _refuse(here, there, plan)
    carrier.run(plan)
    return carrier.summary


def remove(
    target: str, *, recursive: bool = False, filters: Filters = EVERYTHING, dry_run: bool = False,
    settings: StoreSettings | None = None, report: Report = SILENT, stop: Callable[[], bool] = never,
) -> Summary:  # fmt: skip
    """Delete one object, or with `recursive` all below `target`."""
    if recursive:
        place = places.folder(target, settings)
        _must_be_folder(place, target)
        carrier = Carrier(place, place, report, stop, dry_run=dry_run)
        keys = sorted(_listed(place, filters, carrier, markers=True).files)
    else:
        place, name = _single(target, settings)
        carrier = Carrier(place, place, report, stop, dry_run=dry_run)
        keys = [_entry(place, name, target).key] if filters.take(name) else []
    report.begin(0, 0)
    carrier.delete(keys)
    return carrier.summary


def _must_be_folder(place: Place, argument: str) -> None:
    if place.root is None or place.root.is_dir():
        return
    if place.root.exists():
        raise UserError(f"{argument} is a file", "leave --recursive out; `sync` takes folders only")
    raise UserError(f"there is no folder {argument}")


def _single(argument: str, settings: StoreSettings | None) -> tuple[Place, str]:
    if places.is_folder(argument):
        raise UserError(f"{argument} is a folder", "add --recursive for all that is below it")
    return places.one(argument, settings)


def _entry(place: Place, name: str, argument: str) -> Entry:
    """One object, by asking for it."""
    if place.root is not None:
        return scan_one(place.root, name, argument)
    try:
        info = place.store.stat(name)
    except NotFound:
        raise UserError(f"there is no object {argument}",
                        f"if it is a folder: {argument}/ with --recursive") from None  # fmt: skip
    return Entry(name, info.size, info.mtime, info.etag)


def _listed(
    place: Place,
    filters: Filters,
    carrier: Carrier,
    quiet: bool = False,
    markers: bool = False,
    lenient: bool = False,
) -> Scan:
    """What is at a place. What could not be read counts as failed; symbolic links are told unless `quiet`."""
    if place.root is None:
        entries = (entry for entry in place.store.list() if markers or not is_marker(entry))
        return Scan({entry.key: entry for entry in entries if filters.take(entry.key)})
    if not place.root.is_dir():  # a target that is yet to be made
        return Scan()
    found = scan(place.root, filters)
    problems = [] if lenient else found.problems
    carrier.summary.failed += len(problems)
    for key, why in problems:
        carrier.report.problem(f"not read: {place.show(key)}: {why}")
    if not quiet:
        carrier.summary.links += len(found.links)
        for key in found.links:
            carrier.report.problem(f"skipped: {place.show(key)}: a symbolic link is not followed")
    return found


def _refuse(source: Place, target: Place, plan: Plan) -> None:
    """Raises LaunchError if what is to be copied cannot all be written where it has to, and only there."""
    keys = [key for _, key in plan.copy + plan.look]
    bad = hostile(keys, into_folder=target.root is not None) if source.root is None else []
    if not bad and target.root is not None:
        bad = Tree(target.root).obstacles(keys)
    if bad:
        more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise LaunchError(f"nothing done: from {source.shown or '.'} this cannot be written to "
                          f"{target.shown or '.'}:\n  " + "\n  ".join(bad[:SHOWN]) + more,
                          "--exclude leaves a key out")  # fmt: skip
