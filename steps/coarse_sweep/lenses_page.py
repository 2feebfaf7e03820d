"""Words read from the residual stream, on the page of step 02: their ranks, and where they are read above control.

1. `typical` is the rank of right words; `controls` that of a random direction and of the identity prompt itself.
2. `differences` sets the same words beside each other where they are right and where they are wrong: in blocks of two
   words read in two streams, so that how common a word is, and what a prompt favours, cancel.
3. `compared` tests that layer by layer; `where_read` says from which layer on, and `sentences` does in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib import effects, stats
from lib.effects import columns, reported
from lib.stats import Settings
from report import plots
from report.words import capital, interval
from steps.coarse_sweep.lenses import LENS, PATCHSCOPE, SIDES

NOT_TESTABLE = "not testable"


class Reading(NamedTuple):
    """A question put to the instruments: which word, where, and against what."""

    about: str
    word: str  # "profession": wrong is the other person's of the same prompt; "superset": the pair's other prompt's
    position: str  # "last" or "names"


PROFESSION = Reading("profession at the names, against the other person's", "profession", "names")
AT_NAMES = Reading("superset at the names, against the other prompt's", "superset", "names")
AT_LAST = Reading("superset at the last token, against the other prompt's", "superset", "last")
READINGS = (PROFESSION, AT_NAMES, AT_LAST)


def at(words: pd.DataFrame, word: str, position: str) -> pd.DataFrame:
    """The rows about one kind of word at one role."""
    there = words["position"] == "last" if position == "last" else words["position"].str.startswith("name_")
    return words[there & ((words["word"] == "superset") == (word == "superset"))]


def right(words: pd.DataFrame) -> pd.DataFrame:
    """The rows of words where they are right: of the prompt whose stream it is and, at a name, of the name."""
    own = words[words["source"] == words["of"]]
    return own[(own["word"] == "superset") | (own["position"] == "last") | (own["word"] == own["position"])]


def typical(words: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """The rank of right words, as the mean over quads of its logarithm (base 10), by instrument, word, position (names,
    last) and layer."""
    own, parts = right(reported(words)), []
    own = own.assign(log=np.log10(own["rank"]))
    for instrument, word in ((how, word) for how in (LENS, PATCHSCOPE) for word in ("superset", "profession")):
        for position in ("names", "last"):
            rows = at(own[own["instrument"] == instrument], word, position)
            if len(rows):
                wide = rows.pivot_table(index="quad_id", columns="layer", values="log")
                spans = columns(stats.mean_intervals(wide.to_numpy(), settings))
                about = {"instrument": instrument, "word": word, "position": position, "quads": len(wide)}
                parts.append(pd.DataFrame({"layer": wide.columns} | spans).assign(**about))
    return pd.concat(parts, ignore_index=True)


def controls(words: pd.DataFrame) -> pd.DataFrame:
    """Geometric mean rank of either kind of word in the patchscope, by source (none, random), kind and layer."""
    own = reported(words)
    own = own[~own["source"].isin(SIDES)]
    kind = np.where(own["word"] == "superset", "superset", "profession")
    logs = np.log10(own["rank"]).groupby([own["source"], kind, own["layer"]]).mean()
    return (10**logs).rename_axis(["source", "word", "layer"]).rename("rank").reset_index()


def differences(words: pd.DataFrame, asked: Reading) -> pd.DataFrame:
    """By how much (log10) a word's rank is better where it is right than where it is wrong, quads x layers: the mean
    over blocks of two different words, each read in the stream where it is right and in the other. Incomplete blocks
    are left out."""
    rows = at(words[words["source"].isin(SIDES)], asked.word, asked.position)
    if asked.word == "profession":
        rows = rows[rows["source"] == rows["of"]]
        rows, block = rows.assign(own=rows["word"] == rows["position"]), "source"
    else:
        rows, block = rows.assign(own=rows["source"] == rows["of"]), "position"
    rows, keys = rows.assign(log=np.log10(rows["rank"])), ["quad_id", "pair_id", block, "layer"]
    blocks = rows.groupby(keys)
    whole = (blocks.size() == 4) & (blocks["text"].nunique() == 2)
    means = rows.groupby([*keys, "own"])["log"].mean().unstack("own")
    if not whole.any():
        return pd.DataFrame()
    better = (means[False] - means[True])[whole.reindex(means.index)]
    return better.groupby(["quad_id", "layer"]).mean().unstack("layer")


def compared(words: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """`differences` of each of READINGS by either instrument, layer by layer: mean over quads, with an interval and a p
    value for all layers together. Columns: about, instrument, layer, estimate, low, high, p, quads."""
    own, parts = reported(words), []
    for asked in READINGS:
        for instrument in (LENS, PATCHSCOPE):
            matrix = differences(own[own["instrument"] == instrument], asked)
            if len(matrix):
                found = effects.familywise(matrix.to_numpy(), settings)
                table = pd.DataFrame({"layer": matrix.columns} | found)
                parts.append(table.assign(about=asked.about, instrument=instrument, quads=len(matrix)))
    return pd.concat(parts, ignore_index=True)


def where_read(compared: pd.DataFrame, ranks: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """For each reading and instrument the first layer that is above control, with the rank of the word after it, the
    one at which that rises most, and the one most above it: there the rank of the word, and by what factor it is
    better than where the word is wrong."""
    known, rows = {asked.about: asked for asked in READINGS}, []
    for (about, instrument), own in compared.groupby(["about", "instrument"], sort=False):
        sure = own[effects.significant(own, settings) & (own["estimate"] > 0)]
        best, asked = own.loc[own["estimate"].idxmax()], known[about]
        there = ranks[(ranks["instrument"] == instrument) & (ranks["word"] == asked.word)]
        there = there[there["position"] == asked.position].set_index("layer")
        first = int(sure["layer"].min()) if len(sure) else None
        untested = own["low"].isna().any()
        rows.append(
            {
                "read": about,
                "instrument": instrument,
                "first after layer": NOT_TESTABLE if untested else "none" if first is None else str(first),
                "rank after it": "" if untested or first is None else span(there.loc[first]),
                "rises most at layer": int(own.loc[own["estimate"].diff().fillna(0).idxmax(), "layer"]),
                "most after layer": int(best["layer"]),
                "rank there": span(there.loc[best["layer"]]),
                "times better than where wrong": span(best, 1),
                "quads": int(best["quads"]),
            }
        )
    return pd.DataFrame(rows)


def span(row: pd.Series, digits: int = 0) -> str:
    """An estimate and its interval, from logarithms."""
    return interval(*(10.0 ** row[["estimate", "low", "high"]].astype(float)), digits=digits)


def sentences(words: pd.DataFrame, settings: Settings) -> list[str]:
    """From which layer on the profession ranks better at the names where it is right, and the superset at the last
    token; and the controls."""
    table, empty = where_read(compared(words, settings), typical(words, settings), settings), controls(words)
    what = "a person's profession ranks better at the person's own name than at the other name of the"
    asked = table[table["read"] == PROFESSION.about]
    said = told(asked, f"{what} prompt (of the same superset)", empty[empty["word"] == PROFESSION.word])
    said = said or [unread(words)]
    what = "at `last` the superset's word ranks better in its own prompt than in the pair's other one"
    empty = empty[empty["word"] == AT_LAST.word]
    said += told(table[table["read"] == AT_LAST.about], what, empty)
    plain = empty.loc[empty["source"] == "none", "rank"]
    said += [
        f"With nothing put into it the patchscope's prompt ranks the superset's word at {rank:.0f} (geometric mean)."
        for rank in plain.head(1)
    ]
    return said


def unread(words: pd.DataFrame) -> str:
    """Why no profession was set against another person's at the names."""
    if at(reported(words), PROFESSION.word, PROFESSION.position).empty:
        return (
            "Professions were not read at the names: the pairs do not say them (given pairs never do), or they are no "
            "single tokens of this model."
        )
    return (
        "Professions at the names were not compared: in no prompt have the two people different ones that are single "
        "tokens of this model."
    )


def told(rows: pd.DataFrame, what: str, empty: pd.DataFrame) -> list[str]:
    """One reading by both instruments; nothing where it was not made. `empty`: `controls` of its word."""
    if rows.empty:
        return []
    scope, lens = (rows[rows["instrument"] == name].iloc[0] for name in (PATCHSCOPE, LENS))

    if scope["first after layer"] == NOT_TESTABLE:
        few = f"{scope['quads']} quads, {stats.MINIMUM_CLUSTERS} needed"
        return [f"Whether {what} is {NOT_TESTABLE} ({few})."]

    def first(row: pd.Series) -> str:
        layer = row["first after layer"]
        return "after no layer" if layer == "none" else f"first after layer {layer}"

    most = scope["most after layer"]
    random = empty.loc[(empty["source"] == "random") & (empty["layer"] == most), "rank"]
    beside = "".join(
        f" With a random direction put in after that layer it ranks at {rank:.0f} (geometric mean, no interval)."
        for rank in random
    )
    return [
        f"{capital(what)}: by the patchscope {first(scope)}, by the logit lens {first(lens)} (familywise over layers, "
        f"{scope['quads']} quads).",
        f"By the patchscope this rises most at layer {scope['rises most at layer']} and is largest after layer "
        f"{most} (picked on the same pairs). There the word ranks {scope['times better than where wrong']} times "
        f"better where it is right than where it is wrong, at {scope['rank there']} from the top of the vocabulary."
        f"{beside}",
    ]


def ranks_figure(curves: pd.DataFrame, words: pd.DataFrame, settings: Settings, marked: Sequence[int]) -> Figure:
    """Recovery, and below it the ranks of right words by either instrument, layer by layer."""
    own = reported(curves)
    own = own[(own["direction"] == "denoise") & own["position"].isin(["names", "last"])]
    ranks = typical(words, settings)
    ranks = ranks[(ranks["word"] == "superset") | (ranks["instrument"] == PATCHSCOPE)]
    ranks = ranks.assign(panel=ranks["instrument"] + ", " + ranks["word"] + ": rank (log10)")
    both = pd.concat([own.assign(panel="patching: recovery (share)"), ranks])
    return plots.layer_curve(both, "recovery, or rank of the right word", panel="panel", marked=marked)


def compared_figure(words: pd.DataFrame, settings: Settings, marked: Sequence[int]) -> Figure:
    """How much better a word's rank is where it is right, layer by layer."""
    table = compared(words, settings)
    table = table.assign(about=table["about"].str.partition(",")[0])
    label = "rank where wrong over rank where right (log10)"
    return plots.layer_curve(table, label, by="about", panel="instrument", marked=marked)
