"""The page on single pairs: all that the steps' tables hold of two prompts, to be chosen by their names.

1. `Tables` reads what is there: the pairs and their prompts' tokens, the candidates' logits of both plain runs, effects
   of the residual stream by layer (step 02) and of every site (step 04), what heads attend to (step 06).
2. `fields` makes the page of it: the figure to be touched, its twin on paper, and the pairs as a table.

A page has room for so much: of many pairs those with the most measured of them, then those of largest gap; of a large
model the sites of largest effect. What a table lacks, or the page, is said in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pandas as pd

from lib import records, tasks
from lib.effects import effect
from lib.hooks import site_name
from lib.questions import Question
from pipeline import keys
from pipeline.step import Remembered
from report import interactive, plots
from report.interactive import MODULES, hundredths
from report.words import listed, literal

MOST_PAIRS = 100
SITE_VALUES, CURVE_VALUES = 33_000, 12_000  # most effects in the page: of sites, and along layers
HEADS = 12  # whose attention is shown
TWIN_PAIRS, TWIN_SITES = 16, 8
PAIRS = ("baselines", "baselines.pairs.parquet")
LAYERS = ("coarse_sweep", "coarse_sweep.parquet")
SITES = ("sufficiency", "sufficiency.parquet")
ABLATED = ("necessity", "necessity.parquet")
ATTENTION = ("retrieval_heads", "retrieval_heads.attention.parquet")
RUNS = {"denoise": "corrupt", "noise": "clean"}  # the plain run that a record's base row is
ANSWERS = {"clean": "answer", "corrupt": "corrupt_answer"}
FIRST = ("last", "names", "between", "name_a", "name_b", "name_c")  # roles in the order in which they get room
CHANGE = ["logit_diff_before", "logit_diff_after", "direction"]
CAPTION = (
    "Single pairs. On paper, and without scripts: what the clean value of each of the leading sites, put into the "
    f"corrupt run at the last token, brings back in the {TWIN_PAIRS} pairs of largest gap, by share of the gap."
)
OTHERWISE = "In the book, this figure answers for every pair."
NONE = "There are no pairs: step 01 has built none, and says why."


def columns_of(results: Path, file: tuple[str, str], columns: Sequence[str]) -> pd.DataFrame | None:
    """Some columns of a step's table; None where it has left none."""
    path = keys.left(results, *file)
    return None if path is None else records.read(path, columns)


# Tokens around the names, which all prompts share; by pair and side, each name's tokens.
Words = tuple[list[list[str]], dict[str, dict[str, list[list[str]]]]]


class Untold(Exception):
    """Words that no step has asked its tokenizer about."""


def untold() -> NoReturn:
    raise Untold


class Tables(NamedTuple):
    """What steps have left in a results folder about single pairs. `fields` need `pairs`; the others may be None."""

    pairs: pd.DataFrame | None
    words: Words | None
    candidates: Sequence[str]
    logits: pd.DataFrame | None  # by pair, a list for each plain run: clean, corrupt
    curves: pd.DataFrame | None  # by pair: (direction, position, layer), logits
    sites: pd.DataFrame | None  # by pair: (layer, component, head), logits
    looks: pd.DataFrame | None  # by pair: (head, or "even" attention; name), share of the last token's attention


def tables(results: Path, topic: Question) -> Tables:
    """Read them."""
    pairs = columns_of(results, PAIRS, None)
    if pairs is None or pairs.empty:
        return Tables(None, None, (), None, None, None, None)
    candidates, logits = plain_logits(results)
    sites = site_effects(results)
    words = prompt_tokens(results, pairs, topic)
    return Tables(pairs, words, candidates, logits, layer_effects(results), sites, looked_at(results, sites))


def plain_logits(results: Path) -> tuple[Sequence[str], pd.DataFrame | None]:
    """The candidates, and their logits in the plain runs of each pair, from the first table that has them."""
    candidates: Sequence[str] = ()
    parts = []
    for file in (LAYERS, SITES, ABLATED):
        frame = columns_of(results, file, ["pair_id", "direction", "logits_before"])
        if frame is not None:
            candidates = records.read_metadata(results / file[1])["candidates"]
            parts.append(frame.drop_duplicates(["pair_id", "direction"]))
    if not parts:
        return (), None
    rows = pd.concat(parts).drop_duplicates(["pair_id", "direction"])
    wide = rows.pivot(index="pair_id", columns="direction", values="logits_before").rename(columns=RUNS)
    return candidates, wide.reindex(columns=["clean", "corrupt"])


def layer_effects(results: Path) -> pd.DataFrame | None:
    """What the residual stream does at each layer and role, pair by pair (logits)."""
    frame = columns_of(results, LAYERS, ["pair_id", "layer", "position", *CHANGE])
    if frame is None:
        return None
    frame = frame.assign(effect=effect(frame))
    return frame.pivot(index="pair_id", columns=["direction", "position", "layer"], values="effect")


def site_effects(results: Path) -> pd.DataFrame | None:
    """What each head and module at the last token does, put back, pair by pair (logits)."""
    own = ["layer", "component", "head"]
    frame = columns_of(results, SITES, ["pair_id", "position", *own, *CHANGE])
    if frame is None:
        return None
    frame = frame[(frame["component"] != "resid") & (frame["position"] == "last")]
    return frame.assign(effect=effect(frame)).pivot(index="pair_id", columns=own, values="effect")


def looked_at(results: Path, sites: pd.DataFrame | None) -> pd.DataFrame | None:
    """How much of the last token's attention the heads of largest effect give to each name."""
    frame = columns_of(results, ATTENTION, ["pair_id", "layer", "head", "position", "onto", "share", "uniform"])
    if frame is None or sites is None:
        return None
    size = sites.abs().mean()[[column for column in sites if column[1] == "head"]].nlargest(HEADS)
    leading = [
        site_name(*site) for site in size.index if site[::2] in {*zip(frame["layer"], frame["head"], strict=True)}
    ]
    if not leading:  # heads were not swept
        return None
    frame = frame.assign(site=frame["layer"].astype(str) + "." + frame["head"].astype(str))
    own = frame[(frame["position"] == "last") & frame["site"].isin(leading)]
    even = own.drop_duplicates(["pair_id", "onto"]).assign(site="even", share=lambda rows: rows["uniform"])
    return pd.concat([own, even]).pivot(index="pair_id", columns=["site", "onto"], values="share")[["even", *leading]]


def prompt_tokens(results: Path, pairs: pd.DataFrame, topic: Question) -> Words | None:
    """The prompts' tokens: those around the names, which all pairs share, and each pair's own, name by name; from what
    the steps have asked their tokenizer. None where they have not asked all of it."""
    for step in (LAYERS[0], SITES[0], ABLATED[0]):
        path, record = keys.left(results, step, f"{step}.tokens.parquet"), keys.stored_record(results, step)
        if path is None:
            continue
        given = {name: record["parameters"][name] for name in ("chat_template", "attributes")}
        try:
            return split(pairs, Remembered(untold, path), topic, **given)
        except Untold:
            continue
    return None


def split(pairs: pd.DataFrame, tokenizer: Remembered, topic: Question, **options: Any) -> Words | None:
    """See `prompt_tokens`."""
    first = pairs.iloc[0]
    template = topic.find(first["template"], first["task"])
    around: list[list[str]] = []
    own: dict[str, dict[str, list[list[str]]]] = {}
    for row in pairs.to_dict("records"):
        for side in ("clean", "corrupt"):
            names = [row[f"{side}_{slot}"] for slot in template.slots]
            prompt = tasks.make_prompt(tokenizer, template, names, **options)
            _, offsets = tasks.encoded(tokenizer, prompt.text, special=not options["chat_template"])
            texts = [shown(prompt.text, offsets, at) for at in range(len(offsets))]
            ends = [prompt.roles[f"name_{slot}"] for slot in template.slots]
            own.setdefault(row["pair_id"], {})[side] = [[texts[at] for at in places] for places in ends]
            if not around:
                edges = [0, *(edge for places in ends for edge in (places[0], places[-1] + 1)), len(texts)]
                around = [texts[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return around, own


def shown(text: str, offsets: Sequence[Sequence[int]], at: int) -> str:
    """A token as a reader sees it: a special one has no text, a part of a letter that of the whole letter once."""
    start, end = offsets[at]
    if at and list(offsets[at]) == list(offsets[at - 1]) and end > start:
        return "\u2026"
    return text[start:end]


# --- the page ---


def fields(results: Path, to: Path, topic: Question) -> dict[str, str]:
    """Fields of `pairs.md`: `figure` and `table`. Writes the twin to `to/figures/`."""
    own = tables(results, topic)
    if own.pairs is None:
        return {"figure": NONE, "table": ""}
    kept = leading_pairs(own)
    parts = [interactive.embedded("pair-explorer", numbers(own, kept), OTHERWISE, "fig-pairs").data]
    if own.sites is not None and len(some := kept[kept["pair_id"].isin(own.sites.index)]):
        file = plots.save(twin(own.sites, some), to, "pairs", "sites")
        parts.insert(0, f"```{{figure}} {file}\n:name: fig-pairs\n:alt: {CAPTION}\n\n{CAPTION}\n```")
    return {"figure": "\n\n".join(parts), "table": listing(kept, len(own.pairs))}


def leading_pairs(own: Tables) -> pd.DataFrame:
    """The pairs that the page has, by the names of their clean prompts: those of which most was measured, then those of
    largest gap."""
    pairs = own.pairs.set_index("pair_id", drop=False).rename_axis(None)
    gap = pairs["logit_diff_clean"] - pairs["logit_diff_corrupt"]
    measured = sum(pairs.index.isin(part.index).astype(int) for part in own[3:] if part is not None)
    order = pd.DataFrame({"measured": measured, "gap": gap}, index=pairs.index)
    first = order.sort_values(["measured", "gap"], ascending=False, kind="stable").index[:MOST_PAIRS]
    return pairs.loc[first].assign(gap=gap).sort_values(["clean_a", "clean_b", "pair_id"])


def numbers(own: Tables, kept: pd.DataFrame) -> dict[str, Any]:
    """What the script draws from: logits in hundredths, a list for each pair in every part; None where it is not in the
    table."""
    diffs = zip(*(hundredths(kept[f"logit_diff_{run}"]) for run in ANSWERS), strict=True)
    about = kept[["pair_id", "half", "answer", "corrupt_answer"]].to_numpy().tolist()
    names = [[names_of(row, side) for side in ANSWERS] for row in kept.to_dict("records")]
    pairs = [[*row, *both, *diff] for row, both, diff in zip(about, names, diffs, strict=True)]
    out = {"pairs": pairs, "all": len(own.pairs), "words": None, "logits": None}
    if own.words:
        around, each = own.words
        out["words"] = {"around": around, "own": [each[pair] for pair in kept.index]}
    if own.logits is not None:
        values = own.logits.reindex(kept.index)
        lists = {run: [in_hundredths(row) for row in values[run]] for run in values}
        out["logits"] = {"names": list(own.candidates), **lists}
    out["links"] = interactive.others("fig-pairs")
    return out | {"curves": curves(own.curves, kept), "map": of_sites(own.sites, kept), "looks": looks(own.looks, kept)}


def names_of(row: Mapping[str, Any], side: str) -> list[str]:
    return [name for slot in tasks.SLOTS if (name := row.get(f"{side}_{slot}"))]


def in_hundredths(values: Any) -> list[int] | None:
    """Numbers as JSON has them; None where there are none."""
    return hundredths(pd.Series(values)) if isinstance(values, np.ndarray) else None


def rows_of(wide: pd.DataFrame, kept: pd.DataFrame) -> list[list[int | None] | None]:
    """A list of hundredths for each pair kept; None for a pair without any."""
    values = [hundredths(row) for _, row in wide.reindex(kept.index).iterrows()]
    return [row if any(value is not None for value in row) else None for row in values]


def room(values: int, wide: pd.DataFrame, kept: pd.DataFrame) -> int:
    """How many of a table's columns the page has room for, at so many values in all."""
    return max(1, values // max(1, int(kept.index.isin(wide.index).sum())))


def curves(wide: pd.DataFrame | None, kept: pd.DataFrame) -> dict[str, Any] | None:
    """Effects along the layers, as many curves as there is room for: at the last token and at the names first."""
    if wide is None:
        return None
    layers = sorted(wide.columns.unique("layer"))
    there = wide.columns.droplevel("layer").unique()
    order = sorted(there, key=lambda curve: (FIRST.index(curve[1]) if curve[1] in FIRST else len(FIRST), curve[0]))
    shown = order[: max(2, room(CURVE_VALUES, wide, kept) // len(layers))]
    wide = wide.reindex(columns=[(*curve, layer) for curve in shown for layer in layers])
    out = {"layers": layers, "shown": [list(curve) for curve in shown], "left": [list(c) for c in order[len(shown) :]]}
    return out | {"values": rows_of(wide, kept)}


def of_sites(wide: pd.DataFrame | None, kept: pd.DataFrame) -> dict[str, Any] | None:
    """Effects of sites, in the order of the map of sites; of those there is room for, those of largest mean effect."""
    if wide is None:
        return None
    layers, heads = sorted(wide.columns.unique("layer")), sorted({c[2] for c in wide if c[1] == "head"}, reverse=True)
    lines = [("head", head) for head in heads] + [(name, -1) for name in MODULES if name in wide.columns.unique(1)]
    grid = pd.MultiIndex.from_tuples([(layer, *line) for line in lines for layer in layers])
    leading = wide.mean().abs().nlargest(room(SITE_VALUES, wide, kept)).index
    places = sorted(grid.get_indexer(leading).tolist())
    out = {"layers": layers, "lines": [str(head) if name == "head" else name for name, head in lines]}
    return out | {"all": wide.shape[1], "places": places, "values": rows_of(wide[grid[places]], kept)}


def looks(wide: pd.DataFrame | None, kept: pd.DataFrame) -> dict[str, Any] | None:
    """Shares of attention in hundredths: for each pair those of even attention, then head by head, name by name."""
    if wide is None:
        return None
    onto = sorted(wide.columns.unique("onto"))
    heads = [site for site in wide.columns.unique("site") if site != "even"]
    wide = wide.reindex(columns=[(site, name) for site in ("even", *heads) for name in onto])
    return {"heads": heads, "onto": onto, "values": rows_of(wide, kept)}


def twin(sites: pd.DataFrame, some: pd.DataFrame) -> plots.Figure:
    """The pairs of largest gap x the sites of largest mean effect: each as a share of the pair's gap."""
    rows = some.nlargest(TWIN_PAIRS, "gap")
    shares = sites.loc[rows.index].div(rows["gap"], axis=0)
    shares = shares[sites.mean().abs().nlargest(TWIN_SITES).index]
    shares.columns = [site_name(*site) for site in shares]
    told = [f"{row.pair_id}: {row.answer}, {row.corrupt_answer}" for row in rows.itertuples()]
    shares.index = [text.replace("$", r"\$") for text in told]  # no formula
    shares = shares.round(2) + 0.0  # without a sign before zero
    return plots.class_matrices({"": shares}, "effect (share of the pair's gap)", "site put back", "pair")


def listing(kept: pd.DataFrame, of: int) -> str:
    """The pairs as a table that the book's script makes sortable; `of` how many there are."""
    left = f"Of {of:,} pairs, the {len(kept)} of which most was measured, then of largest gap:\n\n" * (len(kept) < of)
    lines = [
        "| pair | clean prompt's names | corrupt prompt's names | half | gap |",
        "| --- | --- | --- | --- | ---: |",
    ]
    for row in kept.to_dict("records"):
        sides = (f"{listed(names_of(row, side))} ({row[answer]})" for side, answer in ANSWERS.items())
        cells = [row["pair_id"], *sides, row["half"], f"{row['gap']:.2f}"]
        lines.append(f"| {' | '.join(map(literal, cells))} |")
    return left + ":::{container} sortable\n" + "\n".join(lines) + "\n:::"
