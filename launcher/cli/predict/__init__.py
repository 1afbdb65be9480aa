"""`launch predict`: when a run would start, whether a part of it would sooner, how long the whole takes."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.backends import BACKENDS
from launcher.cli.predict import pace, turn
from launcher.cli.predict.pace import Pace
from launcher.cli.show import duration
from launcher.cli.submit import pick_backend
from launcher.recipe import Flags, Recipe, parse, resolve
from launcher.recipe.document import Document
from launcher.recipe.sections import hours
from launcher.slurm import cluster as slurm
from launcher.slurm.forecast import Slot, forecast, halvings
from launcher.slurm.options import options

SCHEMA = 1
# Measured: it names a time behind every job that waits, where backfill starts a short one at once.
GUESS = "Slurm's guess puts it behind all that waits; a short slice may be let into a gap before that."
SOON = 60  # seconds; what starts within them starts now


def predict(path: Path, overrides: Sequence[str], flags: Flags, backend: str, as_json: bool) -> int:
    """Print the prediction; nothing is made. Raises RecipeError, UserError, SlurmError."""
    document = resolve(path, overrides, flags)
    recipe = parse(document)
    backend = pick_backend(backend)
    table, record = of_slurm(recipe, document) if backend == "slurm" else of_queue(recipe)
    if as_json:
        print(json.dumps({"schema": SCHEMA, "backend": backend} | record))
        return 0
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    console.print(table)
    console.print(Text(record["advice"]), soft_wrap=True)
    return 0


def of_slurm(recipe: Recipe, document: Document) -> tuple[Table, dict[str, Any]]:
    """What Slurm would do with it and with parts of it, for people and for programs."""
    if wrong := list(BACKENDS["slurm"].check(recipe)):
        raise document.error(wrong)
    found = slurm.read()
    place = found.partition(options(recipe).get("partition"))
    asked = int(recipe.resources.time) if recipe.resources.time else None
    longest = asked or (place and (place.default_time or place.max_time)) or None
    with Console(stderr=True).status("asking Slurm") as status:
        slots = list(forecast(recipe, longest, status.update))
    nodes, now = recipe.resources.nodes, found.now or int(time.time())
    known = pace.of_recipe(recipe.hash(), recipe.resources.gpus * nodes)
    rows = [_record(slot, nodes, known) for slot in slots]
    said = advice(slots, now, _unit(recipe))
    if any(slot.start is not None and slot.start > now + SOON for slot in slots):
        said += f"\n{GUESS}"
    return _table(slots, now, recipe, known), {"now": now, "slots": rows, "advice": said}


def of_queue(recipe: Recipe) -> tuple[Table, dict[str, Any]]:
    """The answer of this workstation's queue."""
    wants = recipe.resources
    found = turn.turns(recipe, halvings(wants.gpus, wants.min_gpus))
    made = Table(box=None, header_style="bold", pad_edge=False)
    made.add_column(_unit(recipe).upper(), justify="right")
    made.add_column("WOULD START")
    for one in found:
        made.add_row(str(one.gpus), turn.words(one))
    return made, {"turns": [asdict(one) for one in found], "advice": turn.advice(found, _unit(recipe))}


def advice(slots: Sequence[Slot], now: int, unit: str) -> str:
    """The longest slice of those that start first, with the GPUs asked for if that gains anything."""
    wish = slots[0]
    assert wish.start is not None  # else it was refused
    whole = f"{wish.gpus} {unit} for {_length(wish.time)} would start {when(wish.start, now)}"
    sooner = [slot for slot in slots if slot.start is not None and slot.start < wish.start - SOON]
    if wish.start <= now + SOON or not sooner:
        return f"{whole}; neither fewer {unit} nor a shorter time would start sooner."
    same = [slot for slot in sooner if slot.gpus == wish.gpus]
    first = min(slot.start or 0 for slot in same or sooner)
    best = max(
        (slot for slot in same or sooner if (slot.start or 0) <= first + SOON),
        key=lambda slot: (slot.gpus, slot.time or float("inf")),
    )
    flags = "".join(
        [
            f" --gpus {best.gpus}" if best.gpus != wish.gpus else "",
            f" --time {_flag(best.time)}" if best.time != wish.time and best.time else "",
        ]
    )
    slices = f"{best.gpus} {unit} for {_length(best.time)} at a time would start {when(best.start or 0, now)}"
    return f"{slices}; {whole}. A run can be cut safely:{flags}"


def when(start: int, now: int) -> str:
    """now, 18:30, tomorrow 06:00, Mon 06:00, 2026-12-01 06:00."""
    if start <= now + SOON:
        return "now"
    then, today = time.localtime(start), time.localtime(now)
    days = (
        time.mktime((*then[:3], 12, 0, 0, 0, 0, -1)) - time.mktime((*today[:3], 12, 0, 0, 0, 0, -1))
    ) / 86400
    clock = time.strftime("%H:%M", then)
    if round(days) == 0:
        return clock
    if round(days) == 1:
        return f"tomorrow {clock}"
    return time.strftime("%a %H:%M" if days < 6.5 else "%Y-%m-%d %H:%M", then)


def _table(slots: Sequence[Slot], now: int, recipe: Recipe, known: Pace | None) -> Table:
    made = Table(box=None, header_style="bold", pad_edge=False)
    made.add_column(_unit(recipe).upper(), justify="right")
    made.add_column("SLICE", justify="right")
    made.add_column("WOULD START")
    if known:
        made.add_column("THE WHOLE RUN")
    for slot in slots:
        start = slot.refused if slot.start is None else when(slot.start, now)
        cells = [str(slot.gpus), _length(slot.time), start]
        if known:
            row = _record(slot, recipe.resources.nodes, known)
            much = (
                f"{row['slices']} slice{'s' * (row['slices'] != 1)}" if row["slices"] else "never: too short"
            )
            cells.append(f"{much}, {duration(row['seconds'])} of work" if row["slices"] else much)
        made.add_row(*cells)
    return made


def _record(slot: Slot, nodes: int, known: Pace | None) -> dict[str, Any]:
    """`seconds`: of work that the whole run takes, start-ups among them, if earlier runs tell."""
    workers = slot.gpus * nodes
    slices = known.slices(workers, slot.time) if known else None
    seconds = known.work(workers) + slices * known.start_up if known and slices else None
    about = {"gpus": slot.gpus, "time": slot.time, "start": slot.start, "refused": slot.refused}
    return about | {"slices": slices, "seconds": seconds and round(seconds)}


def _unit(recipe: Recipe) -> str:
    return "GPUs" if recipe.resources.device == "cuda" else "workers"


def _length(seconds: int | None) -> str:
    return "any time" if seconds is None else hours(seconds)


def _flag(seconds: int) -> str:
    return f"{seconds // 3600}h" if seconds % 3600 == 0 else f"{seconds // 60}m"
