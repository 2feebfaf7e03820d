"""Step tables on disk: their schema, and files that appear whole or not at all.

1. `SCHEMA` is the one pandera model of a sweep's table; `conform` brings a frame into its columns and types.
2. `write` puts a frame into Parquet atomically (written beside, synced, renamed), its metadata as JSON in the file,
   with a checksum of every page and one of the whole file.
3. `read` and `read_metadata` give both back; what is not as it was written is refused.

Columns of a sweep, in logits unless said otherwise; `_before` is the run without the intervention, `_after` with it:

- `metric`: the margin, the clean answer's logit less the highest other candidate's (the foil).
- `logit_diff`: the clean prompt's answer less the corrupt prompt's; `_clean` and `_corrupt` are the two plain runs.
- `rank_after`: how many tokens of the vocabulary lie above the answer; 0 is the top.
- `kl_after`: KL(before || after) of the whole next-token distribution, nats.
- `fired`: how often the row's hooks fired; `site_delta`: how far the activation was moved (L2 norm).
- `position`: the role of the tokens at which the site was changed. Group by it where a table has several.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pandera.errors import SchemaErrors
from pandera.pandas import Check, Column, DataFrameSchema

from lib.errors import Refusal

METADATA_KEY = b"superset_circuit"
CHECK_KEY = b"superset_circuit.sha256"
CHECK = re.compile(re.escape(CHECK_KEY) + rb"\x18\x40([0-9a-f]{64})")  # in a Parquet footer: 64 bytes of text follow
ROLES = ("name_a", "name_b", "name_c", "names", "swapped", "between", "last", "rest", "all")
WHEN = ("before", "after")
ABLATIONS = ("zero", "mean", "resample", "counterfactual", "clean")
# A row is one pair x site x intervention x seed: these columns name it.
IDENTITY = ["task", "template", "pair_id", "layer", "component", "head", "position", "direction", "ablation", "seed"]


AGAIN = "delete it, and run again what writes it"


class RecordError(Refusal):
    """A table that breaks the schema, or a file that is damaged or belongs to another run."""


class NoRoomError(OSError, Refusal):
    """A disk or a quota that is full."""


# --- schemas: columns that hold no gaps unless they say so ---


def text(allowed: Sequence[str] = ()) -> Column:
    """Words; of those allowed, if any are named."""
    return Column(str, Check.isin(allowed) if allowed else None)


def whole(least: int, kind: str = "int32") -> Column:
    """Whole numbers from `least` on."""
    return Column(kind, Check.ge(least))


def number(nullable: bool = False) -> Column:
    """Finite numbers."""
    return Column("float64", Check(np.isfinite, name="finite"), nullable=nullable)


def numbers(nullable: bool = False) -> Column:
    """Lists of finite numbers."""
    return Column(object, Check(_all_finite, name="finite numbers"), nullable=nullable)


def _all_finite(column: pd.Series) -> bool:
    kept = [np.asarray(values, dtype=np.float32) for values in column if values is not None]
    return not kept or bool(np.isfinite(np.concatenate(kept)).all())


def table_schema(
    name: str, columns: Mapping[str, Column], unique: Sequence[str], checks: Sequence[Check] = ()
) -> DataFrameSchema:
    """The schema of a table that has these columns in this order; the columns `unique` name a row."""
    how = {"strict": True, "ordered": True, "unique": list(unique), "name": name}
    return DataFrameSchema(dict(columns), checks=list(checks), **how)


PARTS = Check(
    lambda frame: frame["component"].isin(["head", "neuron"]) == (frame["head"] >= 0),
    name="head >= 0 exactly for heads and neurons",
)
DENOISING = Check(
    lambda frame: (frame["direction"] == "denoise") == (frame["ablation"] == "clean"),
    name="ablation is 'clean' exactly when denoising",
)
FOILS = Check(
    lambda frame: (frame["foil_before"] != frame["answer"]) & (frame["foil_after"] != frame["answer"]),
    name="a foil is not the answer",
)
SCHEMA = table_schema(
    "sweep table",
    {
        "layer": whole(0),
        "component": text(("resid", "attn", "mlp", "head", "neuron", "direction", "path")),
        "head": whole(-1),  # the head's or neuron's number; -1 where the component has no such parts
        "metric_before": number(),  # margin of the base row of the same pass, logits
        "metric_after": number(),
        **{name: text() for name in ("profile", "task", "template", "pair_id", "quad_id")},
        "half": text(("discovery", "confirmation")),
        "direction": text(("noise", "denoise")),
        "ablation": text(ABLATIONS),
        "position": text(ROLES),
        "seed": whole(0, "int64"),
        "metric_clean": number(),
        "metric_corrupt": number(),
        **{f"logit_diff_{run}": number() for run in (*WHEN, "clean", "corrupt")},
        "answer": text(),  # candidate names; the clean prompt's answer in both directions
        **{f"foil_{when}": text() for when in WHEN},
        **{f"logits_{when}": numbers() for when in WHEN},  # all candidates, in the order of the metadata's "candidates"
        "top_token_after": text(),
        "top_logit_after": number(),
        "logsumexp_after": number(),
        "rank_after": whole(0),
        "kl_after": number(),
        "site_delta": number(),
        "fired": whole(0),
        **{f"label_logits_{when}": numbers(nullable=True) for when in WHEN},  # in the order of the metadata's "labels"
        **{f"candidate_probability_{when}": number(nullable=True) for when in WHEN},
        **{f"metric_both_{when}": number(nullable=True) for when in WHEN},  # odd_one_out: over both tokens of a name
    },
    IDENTITY,
    [PARTS, DENOISING, FOILS],
)

# Rows in which a set of sites is changed together: layer, component and head name its first site, `site_set` its place
# in the list of sets.
SET_SCHEMA = table_schema(
    "table of site sets", SCHEMA.columns | {"site_set": whole(0)}, [*IDENTITY, "site_set"], SCHEMA.checks
)

# Rows in which sites are replaced by values that a step makes: `variant` names the values.
VARIANT_SCHEMA = table_schema(
    "table of variants", SET_SCHEMA.columns | {"variant": text()}, [*SET_SCHEMA.unique, "variant"], SCHEMA.checks
)

# Rows of path patching: layer and head are the (first) sender's, `sender` its component; `receivers` names the set.
_PATH = {"sender": text(("embed", "head", "attn", "mlp")), "receivers": text(), "mlps": text(("frozen", "recomputed"))}
PATH_SCHEMA = table_schema(
    "table of paths",
    # the embedding lies below layer 0; L2 norm of the change that arrived at the receivers' inputs
    SET_SCHEMA.columns | {"layer": whole(-1)} | _PATH | {"arrived": number()},
    [*SET_SCHEMA.unique, *_PATH],
    [DENOISING, FOILS],
)


def conform(frame: pd.DataFrame, schema: DataFrameSchema = SCHEMA) -> pd.DataFrame:
    """The frame in the schema's column order and types; nullable columns it lacks are added empty.

    Raises RecordError naming the column, the rule, a value and its row. Integers are only narrowed when exact.
    """
    unknown = [column for column in frame.columns if column not in schema.columns]
    missing = [name for name, column in schema.columns.items() if name not in frame.columns and not column.nullable]
    if unknown or missing:
        parts = [f"has unknown columns {unknown}"] * bool(unknown) + [f"lacks columns {missing}"] * bool(missing)
        raise RecordError(f"{schema.name} {' and '.join(parts)}; the columns are {', '.join(schema.columns)}")
    out = {}
    for name, column in schema.columns.items():
        kind = str(column.dtype)
        if name not in frame.columns:
            out[name] = pd.Series([None] * len(frame), index=frame.index, dtype=object if kind == "object" else kind)
        elif kind == "object":
            out[name] = frame[name].astype(object)
        elif kind.startswith("str") and not frame[name].map(lambda value: isinstance(value, str)).all():
            raise RecordError(f"{schema.name}: column {name!r} holds values that are not text")
        else:
            try:
                cast = frame[name].astype(kind)
            except (ValueError, TypeError) as error:
                raise RecordError(f"{schema.name}: column {name!r} is not {kind}: {error}") from None
            if kind.startswith("int") and not (cast == frame[name]).all():
                raise RecordError(f"{schema.name}: column {name!r} holds values that are not whole numbers")
            out[name] = cast
    try:
        return schema.validate(pd.DataFrame(out).reset_index(drop=True), lazy=True)
    except SchemaErrors as errors:
        first = errors.failure_cases.iloc[0]
        where = f" at row {first['index']}" if pd.notna(first["index"]) else ""
        if first["schema_context"] == "Column":
            message = f"column {first['column']!r} breaks {first['check']!r}: {first['failure_case']}{where}"
        elif first["check"] == "multiple_fields_uniqueness":
            message = f"two rows are the same pair, site, intervention and seed ({', '.join(schema.unique)}){where}"
        else:
            message = f"a row breaks {first['check']!r}{where}"
        raise RecordError(f"{schema.name}: {message}") from None


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears at `path` whole or not at all: written beside, synced, renamed, the folder synced.

    On any error nothing is left behind. NoRoomError on a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoRoomError(
                error.errno,
                f"no room left to write {path.name} ({os.strerror(error.errno)}): nothing partial was left behind and "
                "finished work units are kept; free some space and run again",
            ) from None
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_table(path: Path, table: pa.Table, metadata: Mapping[str, Any]) -> None:
    """To Parquet (zstd), whole or not at all, with the metadata as sorted JSON and checksums of all bytes."""
    text = json.dumps(metadata, sort_keys=True, ensure_ascii=False, allow_nan=False)
    own, stream = {METADATA_KEY: text.encode(), CHECK_KEY: b"0" * 64}, io.BytesIO()
    pq.write_table(table.replace_schema_metadata(own), stream, compression="zstd", write_page_checksum=True)
    content = stream.getvalue()
    _, checksum, place = _checksums(content)
    with atomic(path) as file:
        file.write(content[: place.start] + checksum + content[place.stop :])


def _checksums(content: bytes) -> tuple[bytes, bytes, slice]:
    """Of a Parquet file: the checksum it states, that of all its other bytes, and where it is stated."""
    found = [*CHECK.finditer(content)]
    place = slice(*found[-1].span(1)) if found else slice(0, 0)
    return content[place], hashlib.sha256(content[: place.start] + content[place.stop :]).hexdigest().encode(), place


def write(
    path: Path, frame: pd.DataFrame, metadata: Mapping[str, Any], schema: DataFrameSchema | None = SCHEMA
) -> None:
    """`write_table` of a frame in its schema; None takes any columns. Sequences of numbers become list<float32>."""
    frame, arrays = frame if schema is None else conform(frame, schema), []
    for name in frame.columns:
        column = frame[name]
        first = next((row for row in column if row is not None), None) if column.dtype == object else None
        numbers = isinstance(first, (list, tuple, np.ndarray)) and not any(isinstance(x, str) for x in first)
        if numbers or (column.dtype == object and first is None and name in SCHEMA.columns):
            values = [None if row is None else np.asarray(row, dtype=np.float32) for row in column]
            arrays.append(pa.array(values, type=pa.list_(pa.float32())))
        else:
            arrays.append(pa.array(column, from_pandas=True))
    write_table(path, pa.table(arrays, names=[str(name) for name in frame.columns]), metadata)


def read(path: Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """The table, or some of its columns; list columns come back as float32 arrays. Unknown columns are an error."""
    file = open_table(path)
    names = file.schema_arrow.names
    for name in columns or ():
        if name not in names:
            raise RecordError(f"{Path(path).name} has no column {name!r}; it has {', '.join(names)}")
    return file.read(columns=None if columns is None else list(columns)).to_pandas()


def read_metadata(path: Path) -> dict[str, Any]:
    """What `write` was given as metadata."""
    return json.loads(open_table(path).schema_arrow.metadata[METADATA_KEY])


def open_table(path: Path) -> pq.ParquetFile:
    """A table's file, once its checksum is right. RecordError for what is missing, damaged, or written by others."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise RecordError(f"there is no {path}") from None
    stated, own, _ = _checksums(content)
    if stated != own:
        if not content.endswith(b"PAR1"):
            what = "is not a Parquet file, or a part of one"
        elif stated or METADATA_KEY in content:
            what = "is damaged, or of an earlier version: its checksum is not that of its bytes"
        else:
            what = "was not written by this project: it carries no checksum"
        raise RecordError(f"{path} {what}; {AGAIN}")
    return pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
