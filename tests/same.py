"""Whether two results folders, or two builds, hold the same: `python -m tests.same OLD NEW`.

1. `COMPARED` names the files that are looked at: tables, findings, claims, run records, saved figures, executed pages.
   A file that only one side has is a difference; files that are not looked at are named at the end.
2. Tables are compared column by column: order, type, and every value bit for bit (NaN equals NaN, 0.0 is not -0.0);
   their metadata, and run records, without what `ASIDE` names. Findings and claims hold nothing that depends on the
   code's version or on the clock, so they are compared whole.
3. Figures are compared as decoded pixels where their bytes differ: of the results folder by file, of a page by the
   name that the cell gives them (`mystnb`), in order. Of pages also captions, displayed tables and texts, and prose,
   paragraph by paragraph. Code and what went to stderr (progress with times) are not compared.
4. A table of counts is printed, and each difference with its place. Exit status: 0 equal, 1 different, 2 nothing to
   compare.

    python -m tests.same old/results/smoke results/smoke          two results folders
    python -m tests.same old/build/smoke build/smoke              two builds
    python -m tests.same old . --profile smoke                    results and builds of a profile in two checkouts
"""

from __future__ import annotations

import argparse
import base64
import difflib
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

METADATA_KEY = b"superset_circuit"
# What a table's metadata or a run record may differ in while the data are the same, and why.
ASIDE = {
    "started": "the date of the run",
    "seconds": "how long the run took",
    "commit": "which commit ran",
    "dirty": "whether the checkout had changes of its own",
    "data_key": "a hash in which the source of the computing modules is included",
    "ingredients": "what that hash is made of, the hashes of modules among it (run records only)",
    "versions": "of Python and its packages",
    "machine": "where it ran",
    "files": "hashes of files that are compared themselves",
    "check": "a checksum of the record",
}
LONGEST = 60  # characters shown of a differing value


class Difference(NamedTuple):
    """One thing that differs: of what kind, where, and how."""

    kind: str
    place: str
    what: str


@dataclass
class Comparison:
    """What was compared so far, and what differs."""

    compared: Counter = field(default_factory=Counter)  # items by kind: files, or figures and texts of pages
    different: Counter = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # files that were not looked at

    def add(self, kind: str, place: str, found: Sequence[tuple[str, str]]) -> None:
        """One compared item: `found` has a (place within it, what differs) for each difference."""
        self.compared[kind] += 1
        self.different[kind] += bool(found)
        self.differences += [Difference(kind, f"{place}{within and ': ' + within}", what) for within, what in found]

    def __str__(self) -> str:
        lines = [f"{'kind':<16}{'compared':>10}{'equal':>10}{'different':>11}"]
        for kind, count in self.compared.items():
            wrong = self.different[kind]
            lines.append(f"{kind:<16}{count:>10}{count - wrong:>10}{wrong:>11}")
        lines += [f"\n{len(self.differences)} differences"] if self.differences else ["\nno difference"]
        lines += [f"- {kind}, {place}: {what}" for kind, place, what in self.differences]
        if self.others:
            lines.append(f"\nnot looked at: {', '.join(self.others)}")
        return "\n".join(lines)


def shown(old: Any, new: Any) -> str:
    """Both values; long ones are cut to what is around the first place where they differ."""
    texts = [value if isinstance(value, str) else repr(value) for value in (old, new)]
    pairs = zip(*texts, strict=False)
    first = next((index for index, (a, b) in enumerate(pairs) if a != b), min(map(len, texts)))
    start = max(0, first - LONGEST // 2) if max(map(len, texts)) > LONGEST else 0
    cut = [
        f"{'...' * (start > 0)}{text[start : start + LONGEST]}{'...' * (len(text) > start + LONGEST)}" for text in texts
    ]
    return " / ".join(
        repr(text) if isinstance(value, str) else text for text, value in zip(cut, (old, new), strict=True)
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def unlike(old: pa.Array, new: pa.Array) -> np.ndarray:
    """(rows,) whether two arrays of one type and length differ there; by bits, NaN equal to NaN, null only to null."""
    bad = pc.xor(pc.is_null(old), pc.is_null(new)).to_numpy(zero_copy_only=False)
    if pa.types.is_floating(old.type):
        a, b = (np.ascontiguousarray(array.to_numpy(zero_copy_only=False)) for array in (old, new))
        kind = f"u{a.dtype.itemsize}"
        return bad | ((a.view(kind) != b.view(kind)) & ~(np.isnan(a) & np.isnan(b)))
    if pa.types.is_list(old.type):
        lengths = [pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False) for array in (old, new)]
        bad = bad | (lengths[0] != lengths[1])
        rows = np.flatnonzero(~bad)
        flat = unlike(*(array.take(pa.array(rows)).flatten() for array in (old, new)))
        bad[np.repeat(rows, lengths[0][rows])[flat]] = True
        return bad
    if pa.types.is_nested(old.type) or pa.types.is_dictionary(old.type):
        return np.array([repr(a) != repr(b) for a, b in zip(old.to_pylist(), new.to_pylist(), strict=True)], dtype=bool)
    return bad | pc.fill_null(pc.not_equal(old, new), False).to_numpy(zero_copy_only=False)


def column_differences(name: str, old: pa.ChunkedArray, new: pa.ChunkedArray) -> list[tuple[str, str]]:
    """What differs between two columns of equally many rows."""
    place = f"column {name}"
    if old.type != new.type:
        return [(place, f"type {old.type} / {new.type}")]
    one, other = (pa.concat_arrays(column.chunks) if column.num_chunks else None for column in (old, new))
    if one is None or other is None:
        return []
    rows = np.flatnonzero(unlike(one, other))
    if not len(rows):
        return []
    first = int(rows[0])
    text = f"{len(rows)} of {len(one)} rows, first row {first}: {shown(one[first].as_py(), other[first].as_py())}"
    if pa.types.is_integer(old.type) or pa.types.is_floating(old.type):
        a, b = (array.take(pa.array(rows)).to_numpy(zero_copy_only=False).astype(float) for array in (one, other))
        both = np.isfinite(a) & np.isfinite(b)
        text += f"; largest difference {np.abs(a - b)[both].max():.3g}" if both.any() else ""
    return [(place, text)]


def table_differences(old: pa.Table, new: pa.Table) -> list[tuple[str, str]]:
    """Columns, their order and types, rows and values."""
    found = []
    names = old.column_names, new.column_names
    for side, own, other in (("OLD", *names), ("NEW", *reversed(names))):
        found += [(f"column {name}", f"only in {side}") for name in own if name not in other]
    common = [name for name in names[0] if name in names[1]]
    if common != [name for name in names[1] if name in names[0]]:
        found.append(("columns", "in another order"))
    if old.num_rows != new.num_rows:
        return [*found, ("rows", f"{old.num_rows} / {new.num_rows}")]
    return found + [line for name in common for line in column_differences(name, old[name], new[name])]


def about(table: pa.Table) -> Any:
    """The metadata that a table carries, {} if it has none."""
    return json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))


def compare_tables(out: Comparison, place: str, old: Path, new: Path) -> None:
    """Two Parquet files: what they hold, and their metadata."""
    tables = [pq.read_table(path) for path in (old, new)]
    out.add("table", place, table_differences(*tables))
    out.add("metadata", place, json_differences(*(without_aside(about(table)) for table in tables)))


# --- JSON -------------------------------------------------------------------------------------------------------------


def without_aside(value: Any) -> Any:
    """Metadata without the keys of `ASIDE`, at any depth but not among the parameters; a log has each line once, for a
    run that was killed makes its proofs again when it goes on."""
    if isinstance(value, list):
        return [without_aside(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: item for key, item in value.items() if key not in ASIDE}
    if "log" in kept:
        kept["log"] = list(dict.fromkeys(kept["log"]))
    return {key: item if key == "parameters" else without_aside(item) for key, item in kept.items()}


def json_differences(old: Any, new: Any, path: str = "") -> list[tuple[str, str]]:
    """The places at which two JSON values differ; 1 is not 1.0."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in dict.fromkeys([*old, *new]):
            place = f"{path}.{key}" if path else str(key)
            if key in old and key in new:
                found += json_differences(old[key], new[key], place)
            else:
                found.append((place, f"only in {'OLD' if key in old else 'NEW'}"))
        return found
    if isinstance(old, list) and isinstance(new, list):
        found = [(path, f"{len(old)} / {len(new)} entries")] if len(old) != len(new) else []
        for index, (one, other) in enumerate(zip(old, new, strict=False)):
            found += json_differences(one, other, f"{path}[{index}]")
        return found
    same = type(old) is type(new) and (old == new or (old != old and new != new))
    return [] if same else [(path, shown(old, new))]


def compare_json(kind: str, prepare: Callable[[Any], Any] = lambda value: value) -> Callable[..., None]:
    """A comparison of two JSON files, of this kind, after `prepare`."""

    def compare(out: Comparison, place: str, old: Path, new: Path) -> None:
        values = [prepare(json.loads(path.read_text(encoding="utf-8"))) for path in (old, new)]
        out.add(kind, place, json_differences(*values))

    return compare


# --- figures ----------------------------------------------------------------------------------------------------------


def png_differences(old: bytes, new: bytes) -> list[tuple[str, str]]:
    """Size, mode and pixels of two PNGs whose bytes may differ."""
    if old == new:
        return []
    images = [Image.open(io.BytesIO(data)) for data in (old, new)]
    for name in ("size", "mode"):
        if getattr(images[0], name) != getattr(images[1], name):
            return [("", f"{name} {getattr(images[0], name)} / {getattr(images[1], name)}")]
    a, b = (np.asarray(image.convert("RGBA"), dtype=int) for image in images)
    bad = (a != b).any(axis=2)
    if not bad.any():
        return []
    y, x = np.argwhere(bad)[0]
    return [("", f"{bad.sum()} of {bad.size} pixels, first at ({x}, {y}), by at most {np.abs(a - b).max()} of 255")]


def compare_images(out: Comparison, place: str, old: Path, new: Path) -> None:
    """Two saved PNGs."""
    out.add("saved figure", place, png_differences(old.read_bytes(), new.read_bytes()))


def compare_drawings(out: Comparison, place: str, old: Path, new: Path) -> None:
    """Two saved SVGs, as text."""
    texts = [path.read_text(encoding="utf-8").splitlines() for path in (old, new)]
    out.add("saved drawing", place, [("", what) for _, what in listed_differences(*texts)[:1]])


# --- pages ------------------------------------------------------------------------------------------------------------


@dataclass
class Page:
    """What an executed notebook shows, in order."""

    figures: dict[str, bytes] = field(default_factory=dict)  # by name; a second one of a name: "fig-x (2)"
    captions: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # paragraphs of what the code displays
    prose: list[str] = field(default_factory=list)  # paragraphs of the cells of text


def paragraphs(text: str) -> list[str]:
    """Texts between blank lines, so that it does not matter how they are dealt out to cells."""
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def joined(value: str | Sequence[str]) -> str:
    """A notebook's text, which it keeps as one string or as lines."""
    return value if isinstance(value, str) else "".join(value)


def take(page: Page, output: Mapping[str, Any], name: str) -> None:
    """Put one output of a cell on the page; `name` is the cell's figure."""
    kind = output["output_type"]
    if kind == "stream":
        page.texts += paragraphs(joined(output["text"])) if output["name"] == "stdout" else []
        return
    if kind == "error":
        page.texts.append(f"{output['ename']}: {output['evalue']}")
        return
    data = output["data"]
    if "image/png" in data:
        same = sum(known == name or known.startswith(f"{name} (") for known in page.figures)
        page.figures[f"{name} ({same + 1})" if same else name] = base64.b64decode(joined(data["image/png"]))
    elif "text/html" in data:
        page.tables.append(joined(data["text/html"]))
    elif "text/markdown" in data:
        page.texts += paragraphs(joined(data["text/markdown"]))
    else:
        page.texts += paragraphs(joined(data.get("text/plain", json.dumps(data, sort_keys=True))))


def read_page(path: Path) -> Page:
    """What an executed notebook shows."""
    page = Page()
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            page.prose += paragraphs(joined(cell["source"]))
            continue
        figure = cell["metadata"].get("mystnb", {}).get("figure", {})
        page.captions += [figure["caption"]] if "caption" in figure else []
        for output in cell.get("outputs", ()):
            take(page, output, figure.get("name", "unnamed"))
    return page


def listed_differences(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, str]]:
    """(place in the longer stretch, what differs) for two lists of texts, lined up so that one more moves no other."""
    found = []
    for kind, start, end, there, until in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        pairs = min(end - start, until - there)
        found += [(start + i, shown(old[start + i], new[there + i])) for i in range(pairs)]
        found += [(i, f"only in OLD: {shorter(old[i])}") for i in range(start + pairs, end)]
        found += [(i, f"only in NEW: {shorter(new[i])}") for i in range(there + pairs, until)]
    return found


def shorter(text: str) -> str:
    """The beginning of a text."""
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= 2 * LONGEST else flat[: 2 * LONGEST] + "...")


def compare_pages(out: Comparison, place: str, old: Path, new: Path) -> None:
    """Two executed notebooks."""
    pages = [read_page(path) for path in (old, new)]
    figures = [page.figures for page in pages]
    for name in dict.fromkeys([*figures[0], *figures[1]]):
        if name in figures[0] and name in figures[1]:
            found = png_differences(figures[0][name], figures[1][name])
        else:
            found = [("", f"only in {'OLD' if name in figures[0] else 'NEW'}")]
        out.add("page figure", f"{place}, {name}", found)
    common = [[name for name in one if name in other] for one, other in (figures, reversed(figures))]
    order = [("", f"{', '.join(common[0])} / {', '.join(common[1])}")] if common[0] != common[1] else []
    out.add("figure order", place, order)
    for kind in ("captions", "tables", "texts", "prose"):
        texts = [getattr(page, kind) for page in pages]
        found = listed_differences(*texts)
        out.compared[f"page {kind}"] += max(map(len, texts))
        out.different[f"page {kind}"] += len(found)
        out.differences += [Difference(f"page {kind}", f"{place}, number {index + 1}", what) for index, what in found]


# --- folders ----------------------------------------------------------------------------------------------------------

# Patterns of the files that are compared, in the order of the report, and how.
COMPARED: dict[str, Callable[[Comparison, str, Path, Path], None]] = {
    "*.parquet": compare_tables,
    "*.findings.json": compare_json("findings"),
    "claims.json": compare_json("claims"),
    "*.run.json": compare_json("run record", without_aside),
    "figures/*.png": compare_images,
    "figures/*.svg": compare_drawings,
    "executed/*.ipynb": compare_pages,
}
# Folders with nothing of their own: results set aside, keys, notebooks under way, and the book made from the rest.
SKIPPED = ("stale", "keys", "running", "failed", "book")


def files(folder: Path) -> list[str]:
    """The files of a results folder or build, relative to it; a folder of work units counts as one."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if parts[0] in SKIPPED or parts[0].endswith(".units") and len(parts) > 1:
            continue
        if path.is_file() or parts[0].endswith(".units"):
            found.append("/".join(parts))
    return found


def compare(old: Path, new: Path, out: Comparison) -> None:
    """Add the comparison of two results folders, or of two builds, to `out`."""
    names = [files(folder) for folder in (old, new)]
    every = sorted({*names[0], *names[1]})
    for name in every:
        if name.endswith(".units"):
            out.add("unfinished", name, [("", "work units are left: the run has not come to its end")])
    known: set[str] = set()
    for pattern, how in COMPARED.items():
        for name in every:
            if not Path(name).match(pattern) or name.count("/") != pattern.count("/"):
                continue
            known.add(name)
            if name not in names[0] or name not in names[1]:
                out.add("file", name, [("", f"only in {'OLD' if name in names[0] else 'NEW'}")])
                continue
            try:
                how(out, name, old / name, new / name)
            except (OSError, ValueError, KeyError) as error:  # a broken file differs; the others are still compared
                out.add("file", name, [("", f"cannot be read: {type(error).__name__}: {error}")])
    out.others += [name for name in every if name not in known and not name.endswith(".units")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.same", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD", help="a results folder, a build, or (--profile) a checkout")
    parser.add_argument("new", type=Path, metavar="NEW", help="the same of the new tree")
    parser.add_argument("--profile", help="compare results/PROFILE and build/PROFILE of two checkouts")
    given = parser.parse_args(arguments)
    folders = [(given.old, given.new)]
    if given.profile:
        folders = [
            (given.old / kind / given.profile, given.new / kind / given.profile) for kind in ("results", "build")
        ]
    if missing := [str(folder) for pair in folders for folder in pair if not folder.is_dir()]:
        print(f"error: there is no folder {', '.join(missing)}", file=sys.stderr)
        return 2
    out = Comparison()
    for old, new in folders:
        compare(old, new, out)
    if not out.compared:
        print(f"error: neither folder holds anything to compare ({', '.join(COMPARED)})", file=sys.stderr)
        return 2
    print(out)
    return 1 if out.differences else 0


if __name__ == "__main__":
    sys.exit(main())
