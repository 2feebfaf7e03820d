"""Work units: a step's work in pieces that are done whole, kept on disk and never repeated.

1. A `Unit` says what is asked of which pairs (`subsample`); its id is a pure function of that.
2. `run_units` computes the units whose Parquet file is missing, here or elsewhere (`engine`), with a progress bar.
3. `assemble` joins the files in unit order into the step's table: the same data as an undisturbed run, bit for bit.
4. `remove_units` clears the folder.

Rows that share a pass change each other's last bits, so a killed step repeats or keeps whole units, never parts.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import pandas as pd
import pandera.pandas as pa_schema
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from lib.batches import check_role, grouped, with_donors
from lib.records import AGAIN, SCHEMA, RecordError, atomic, open_table, read_metadata, write, write_table
from lib.tasks import Pair

LOGITS = ("logits", "logits_before", "logits_after", "top_logit_after")  # columns of logits, not of differences


@dataclass(frozen=True)
class Unit:
    """A piece of work that is done whole, whoever runs it: what is asked of which pairs.

    `id` is readable and unique within a table ("last-0003"), `pairs` are pairs or their ids, in order, `options` any
    JSON-able values.
    """

    id: str
    pairs: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def content_id(unit: Unit) -> str:
    """The unit's id and a hash of what it asks: a pure function of the parameters and the pair list."""

    def plain(value: Any) -> Any:
        if hasattr(value, "pair_id"):
            return value.pair_id
        raise TypeError(f"work unit {unit.id}: {value!r} in its options is not plain data, so it has no stable id")

    text = json.dumps([unit.id, list(unit.pairs), dict(unit.options)], sort_keys=True, default=plain)
    # it names a file: a template's text, of any length and with slashes, may be part of the unit's id
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', unit.id)[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def plan_id(units: Sequence[Unit]) -> str:
    """One id for a sequence of units, in order."""
    return hashlib.sha256("\n".join(map(content_id, units)).encode()).hexdigest()[:16]


def without_labels(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs with no words recorded beside the candidates, where nothing reads those words' logits."""
    return [replace(pair, labels=(), label_tokens=()) for pair in pairs]


def sweep_units(
    label: str, pairs: Sequence[Pair], pool: Sequence[Pair] | None = None, /, size: int = 8, **options: Any
) -> list[Unit]:
    """The work units of one sweep: a pure function of the pair lists and the options of `run`.

    Means and resamples, which come from `pool` (default: the pairs), are left out for pairs that have no donors there.
    ValueError for a role that a template lacks, before anything is computed.
    """
    for pair in pairs:
        check_role(pair, options.get("role", "last"))
    kinds = options.get("ablations", [""])
    able = {kind: {pair.pair_id for pair in with_donors(pairs, pool or pairs, kind)} for kind in kinds}
    units: list[Unit] = []
    for group in grouped(pairs):
        alike: dict[tuple[str, ...], list[Pair]] = {}  # the group's pairs by the kinds that they have donors for
        for pair in group:
            alike.setdefault(tuple(kind for kind in kinds if pair.pair_id in able[kind]), []).append(pair)
        for own, members in alike.items():
            there = options | ({"ablations": list(own)} if "ablations" in options else {})
            for at in range(0, len(members) if own else 0, size):
                units.append(Unit(f"{label}-{len(units):04d}", tuple(members[at : at + size]), there))
    return units


def subsample(pairs: Sequence[Pair], count: int | None) -> list[Pair]:
    """At most `count` pairs (None: all), as many of each half and from as many quads as possible, in their order.

    A subset of evenly spaced quads of each half; a quad gives a second pair only after every quad has given one, and
    which of its pairs comes first alternates from quad to quad, so that both sides and both orders are there.
    """
    if count is None or count >= len(pairs):
        return list(pairs)
    taken: list[tuple[int, int]] = []  # (rank within the half, index): halves take turns
    for half in dict.fromkeys(pair.half for pair in pairs):
        quads: dict[str, list[int]] = {}
        ranked: list[tuple[int, float, int]] = []  # (turn of the quad, place within the half, index)
        for index, pair in enumerate(pairs):
            if pair.half == half:
                quads.setdefault(pair.quad_id, []).append(index)
        for number, members in enumerate(quads.values()):
            place = (number * 0.6180339887498949) % 1  # the golden ratio's multiples spread any first few evenly
            turned = members[number % len(members) :] + members[: number % len(members)]
            ranked += [(turn, place, index) for turn, index in enumerate(turned)]
        taken += enumerate(index for *_, index in sorted(ranked))
    return [pairs[index] for index in sorted(index for _, index in sorted(taken)[:count])]


def write_json(path: Path, value: Any) -> None:
    """Atomically, with sorted keys: equal values give equal bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with atomic(path) as file:
        file.write(text.encode() + b"\n")


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value with a checksum of itself, for files that nothing else vouches for; `read_json` takes it off."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)  # as it will be read
    return {**value, "check": hashlib.sha256(text.encode()).hexdigest()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that a step has left. RecordError, with the file and the way out, where it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path} is not JSON ({error}); {AGAIN}") from None
    if not isinstance(value, dict):
        raise RecordError(f"{path} holds a {type(value).__name__}, not an object; {AGAIN}")
    stated = value.pop("check", None)
    if stated is not None and stated != sealed(value)["check"]:
        raise RecordError(f"{path} is damaged: its checksum is that of another text; {AGAIN}")
    return value


class Done(NamedTuple):
    """A unit that was computed."""

    unit: Unit
    frame: pd.DataFrame
    seconds: float


def done(unit: Unit, compute: Callable[[Unit], pd.DataFrame]) -> Done:
    """Compute a unit."""
    begun = time.perf_counter()
    return Done(unit, compute(unit), time.perf_counter() - begun)


def one_by_one(todo: Sequence[Unit], compute: Callable[[Unit], pd.DataFrame]) -> Iterator[Done]:
    """The engine of a run in this process."""
    return (done(unit, compute) for unit in todo)


class Engine(Protocol):
    """Who computes units elsewhere, on replicas that each hold the step's model (`pipeline.workers`)."""

    actors: Sequence[Any]  # the replicas there are by now

    def about(self, step: Any) -> Mapping[str, Any]:
        """What a replica is: {"model": its facts, "memory": GB that a pass may take there}."""

    def distributed(self, step: Any, memory: float) -> Callable[[Sequence[Unit], Callable], Iterator[Done]]:
        """What computes units in the place of `one_by_one`."""


def run_units(
    folder: Path,
    units: Sequence[Unit],
    compute: Callable[[Unit], pd.DataFrame],
    *,
    plan: Mapping[str, Any],
    label: str,
    schema: pa_schema.DataFrameSchema | None = SCHEMA,
    engine: Callable[[Sequence[Unit], Callable], Iterator[Done]] = one_by_one,
    model: Callable[[], Any] = dict,
) -> list[Path]:
    """Compute the units that are not on disk; return their files in unit order.

    `engine` takes the units to do and `compute`, and gives them back as they are finished, in any order. `model` says
    what the model is, once there is a unit of it.

    `plan` (the data key first, then what decided it, the resolved memory budget) is stored in plan.json; a folder whose
    plan has another "data_key" is refused. A computed frame may carry `frame.attrs["log"]`, a list of lines such as
    "halved for memory", and `frame.attrs["facts"]`, a dict for the table's metadata (the candidates' names, say); both
    are kept in the unit's metadata, beside the data key. A unit that is damaged or of another key is computed again,
    and its log says so. Raises RecordError on an empty or repeated plan.
    """
    ids = [content_id(unit) for unit in units]
    if not units:
        raise RecordError(f"{label}: there is nothing to compute (no work units); check the pairs and the layers")
    if len(set(ids)) < len(ids):
        raise RecordError(f"{label}: two work units are the same; each unit must ask for other work")
    stored = read_plan(folder)
    if stored is None:
        remove_units(folder)  # parts without a plan are of no known key
        write_json(folder / "plan.json", sealed(plan))
    elif stored["data_key"] != plan["data_key"]:
        raise RecordError(
            f"{folder.name} holds work units of another run (key {stored['data_key'][:8]}, not "
            f"{plan['data_key'][:8]}); use -p overwrite true, or another results_dir"
        )
    clear_leftovers(folder)
    paths = {name: folder / f"{name}.parquet" for name in ids}
    lost = {name: why_lost(paths[name], unit, plan["data_key"]) for name, unit in zip(ids, units, strict=True)}
    todo = [unit for name, unit in zip(ids, units, strict=True) if lost[name] is not None]
    with progress(label, total=len(units), done=len(units) - len(todo)) as bar:
        for unit, frame, seconds in engine(todo, compute):
            name = content_id(unit)
            about = {"unit": unit.id, "data_key": plan["data_key"], "model": model(), "seconds": seconds}
            about |= {"log": [*lost[name], *frame.attrs.get("log", [])], "facts": dict(frame.attrs.get("facts", {}))}
            write(paths[name], frame, about, schema)
            for line in about["log"]:
                bar.write(line, file=sys.stderr)
            bar.update()
    return list(paths.values())


def clear_leftovers(folder: Path) -> None:
    """Delete what a process left that was killed while writing."""
    for left in folder.glob(".*.tmp"):
        left.unlink()


def why_lost(path: Path, unit: Unit, data_key: str) -> list[str] | None:
    """None for a unit that is done; else what the log says of why it is computed: nothing where it is only missing."""
    if not path.exists():
        return []
    try:
        stated = read_metadata(path)
    except RecordError as error:
        why = str(error).replace(str(path), "its file").removesuffix(f"; {AGAIN}")  # a log names no folder
        return [f"unit {unit.id} was computed again: {why}"]
    if (stated["unit"], stated["data_key"]) == (unit.id, data_key):
        return None
    return [f"unit {unit.id} was computed again: its file held {stated['unit']} of key {stated['data_key'][:8]}"]


def read_plan(folder: Path) -> dict[str, Any] | None:
    """The plan of a folder of work units, None where there is none."""
    path = folder / "plan.json"
    return read_json(path) if path.exists() else None


def assemble(
    path: Path, parts: Sequence[Path], metadata: Mapping[str, Any], schema: pa_schema.DataFrameSchema | None = SCHEMA
) -> dict[str, Any]:
    """Join the units' tables in the order given into one file, values untouched; return the metadata written.

    To `metadata` are added: units, rows, `largest_logit`, seconds (computing, over all sittings), log (the units'
    lines, in order), the units' facts, and what the model is, by the first unit that was computed with it. Raises
    RecordError when two units give the same row or different facts of one name.
    """
    tables = [open_table(part).read() for part in parts]
    about = [read_metadata(part) for part in parts]
    own = [table for table in tables if table.num_rows] or tables[:1]  # the columns of none have no types
    table = pa.concat_tables([table.replace_schema_metadata(None) for table in own], promote_options="permissive")
    if schema is not None and schema.unique:
        identity = table.select(schema.unique).to_pandas()
        if identity.duplicated().any():
            row = identity[identity.duplicated()].iloc[0].to_dict()
            raise RecordError(f"{path.name}: two work units give the same row: {row}")
    facts: dict[str, Any] = {}
    for unit in about:
        for name, value in unit["facts"].items():
            if facts.setdefault(name, value) != value:
                raise RecordError(f"{path.name}: unit {unit['unit']} has {name} {value}, an earlier one {facts[name]}")
    full = {
        **metadata,
        **facts,
        "model": next((unit["model"] for unit in about if "n_layers" in unit["model"]), metadata.get("model")),
        "units": len(parts),
        "rows": table.num_rows,
        "largest_logit": largest_logit(table),
        "seconds": round(math.fsum(unit["seconds"] for unit in about), 3),
        "log": [line for unit in about for line in unit["log"]],
    }
    write_table(path, table, full)
    return full


def largest_logit(table: pa.Table) -> float:
    """The size of the largest of the logits that the columns LOGITS hold, 0 without any."""
    largest = 0.0
    for name in (name for name in LOGITS if name in table.column_names):
        values = table[name].combine_chunks()
        values = values.flatten() if pa.types.is_nested(values.type) else values
        largest = max(largest, pc.max(pc.abs(values)).as_py() or 0.0)
    return float(f"{largest:.3g}")


def remove_units(folder: Path) -> None:
    """Delete a folder of work units, the plan last, so that a half-deleted folder is still known by its key."""
    for part in folder.glob("*.parquet"):
        part.unlink()
    shutil.rmtree(folder, ignore_errors=True)


class _Lines:
    """Gives tqdm a log file: each refresh a line of its own instead of a carriage return."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress(label: str, total: int, done: int = 0, unit: str = "units", delay: float = 0) -> tqdm:
    """A plain progress bar on stderr with rate and time left.

    A terminal gets the usual bar; a log file a line every 10 s; a notebook a line that is rewritten every 20 s (plain
    text: widgets in a saved notebook load scripts from the network). Nothing is shown of what ends within `delay`
    seconds.
    """
    stream, about = sys.stderr, {"total": total, "initial": done, "desc": label, "unit": f" {unit}", "delay": delay}
    if stream.isatty():
        return tqdm(**about, file=stream, dynamic_ncols=True)
    in_notebook = type(stream).__module__.startswith("ipykernel")
    return tqdm(
        **about,
        file=stream if in_notebook else _Lines(stream),
        mininterval=20 if in_notebook else 10,
        maxinterval=30,
        bar_format="{desc}: {percentage:3.0f}% {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left",
    )
