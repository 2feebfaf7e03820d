"""Step 08, interchange interventions: how often the answer is the one that the causal model predicts.

1. `scored`: per case, whether the first of the candidates is the predicted one (`right`), and whether it is another
   than without the interchange (`moved`): `raw`, and `centred`, each word's mean over the base prompts taken off.
2. `accuracies` are shares of cases with intervals over quads; `gains` compares them with nothing swapped, quad by quad.
3. `figure`, `table` and `sentences` show and say it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lib import stats
from lib.effects import columns
from report import plots
from report.plots import Figure
from report.words import extremes, listed, of_row, tabled
from steps.subspace.interchange import LEARNED, MEANS, RANDOM, WHOLE
from steps.subspace.measure import Measured, Subspace

NOTHING = "nothing"
SHOWN = {
    MEANS: "class means",
    LEARNED: "learned rotation",
    RANDOM: "random, equal norm",
    WHOLE: "whole residual",
    NOTHING: "nothing swapped",
}
PANELS = {"name": "swapped at the tokens of the name", "last": "swapped at the last token"}
CAPTIONS = {
    "interchange": "Interchange interventions: share of cases in which the answer (centred) is the one that the causal "
    "model predicts once one name's class is swapped, by the layer after which it is. Whatever does not depend on the "
    "class of the source is right in at most half: nothing swapped, which is a count, hence without an interval. "
    "Confirmation half, Wilson intervals over quads."
}


class Numbers(NamedTuple):
    """What the page says of interchanges."""

    accuracies: pd.DataFrame
    at: dict[str, int]  # the layer that is read, by where
    gains: pd.DataFrame  # there, over nothing swapped (centred)


def scored(records: pd.DataFrame, candidates: Sequence[str]) -> pd.DataFrame:
    """A row per record and scoring: quad_id, layer, basis, kind, scoring, `right` and `moved`.

    The means that centring takes off are of the base prompts, in which every class counts alike, and the same for all.
    """
    words = list(candidates)
    wanted = records["answer"].map(words.index).to_numpy()
    before, after = (np.stack(records[f"logits_{when}"].tolist()).astype(float) for when in ("before", "after"))
    once = ~records.duplicated(["pair_id"]).to_numpy() & records["pair_id"].str.endswith("other").to_numpy()
    mean = np.mean([before[once & (wanted == answer)].mean(0) for answer in np.unique(wanted[once])], axis=0)
    about = {"quad_id": records["quad_id"], "layer": records["layer"], "basis": records["variant"]}
    about |= {"pair_id": records["pair_id"], "kind": records["pair_id"].str.rsplit(n=1).str[-1]}
    out = []
    for scoring, taken in (("raw", 0.0), ("centred", mean)):
        first, then = (before - taken).argmax(1), (after - taken).argmax(1)
        here = {"scoring": scoring, "right": then == wanted, "moved": then != first, "still": first == wanted}
        out.append(pd.DataFrame(about | here))
    return pd.concat(out, ignore_index=True)


def share(own: pd.DataFrame, of: str, params: Subspace) -> dict[str, Any]:
    """A share of cases with its interval over quads."""
    each = own.groupby("quad_id")[of].agg(["sum", "size"])
    span = stats.proportion_interval(each["sum"], each["size"], params)
    return {"estimate": span.estimate, "low": span.low, "high": span.high, "quads": len(each), "cases": len(own)}


def accuracies(cases: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """Of `other` sources the share of right answers, of `same` ones the share of answers that moved: by scoring, kind,
    basis and layer (nothing swapped: layer -1)."""
    keys, rows = ["scoring", "kind", "basis", "layer"], []
    for key, own in cases.groupby(keys, sort=False):
        rows.append(dict(zip(keys, key, strict=True)) | share(own, "right" if key[1] == "other" else "moved", params))
    still = cases[cases["kind"] == "other"].drop_duplicates(["scoring", "pair_id"])
    for scoring, own in still.groupby("scoring", sort=False):
        rows.append({"scoring": scoring, "kind": "other", "basis": NOTHING, "layer": -1} | share(own, "still", params))
    return pd.DataFrame(rows)


def gains(cases: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """How much more often each basis is right than nothing swapped, and the class means than the random subspace, whose
    change is as long as theirs; paired by quads."""
    own = cases[(cases["kind"] == "other") & (cases["scoring"] == "centred")]
    right = own.groupby(["quad_id", "basis"])["right"].mean().unstack()
    still = own.groupby("quad_id")["still"].mean()
    over = pd.DataFrame({basis: right[basis] - still for basis in right if basis != WHOLE})
    beyond = pd.DataFrame({MEANS: right[MEANS] - right[RANDOM]})
    parts = []
    for against, values in ((NOTHING, over), (RANDOM, beyond)):
        spans = columns(stats.mean_intervals(values.to_numpy(), params))
        parts.append(pd.DataFrame({"basis": list(values), "against": against, **spans}))
    return pd.concat(parts, ignore_index=True)


def drawn(table: pd.DataFrame) -> pd.DataFrame:
    """`accuracies` without the interval of nothing swapped, which would reach shares that cannot be."""
    return table.assign(**{end: table[end].mask(table["basis"] == NOTHING) for end in ("low", "high")})


def numbers(m: Measured, params: Subspace) -> Numbers:
    """Everything that the page says of interchanges, in numbers. At the name, the layer before the slice is read; at
    the last token, that after which directions are measured."""
    first = m.by_layer.loc[m.by_layer["layer"] >= 0, "layer"].min()
    at, shares, more = {"name": max(0, int(first) - 1), "last": m.layer}, [], []
    for where, records in m.interchange.items():
        cases = scored(records, m.pairs[0].candidates)
        shares.append(accuracies(cases, params).assign(where=where))
        more.append(gains(cases[cases["layer"] == at[where]], params).assign(where=where))
    return Numbers(pd.concat(shares, ignore_index=True), at, pd.concat(more, ignore_index=True))


def figure(n: Numbers) -> Figure:
    """Accuracy by layer, a line for each basis, a panel for each place."""
    own = drawn(n.accuracies[(n.accuracies["scoring"] == "centred") & (n.accuracies["kind"] == "other")])
    layers = sorted(own.loc[own["layer"] >= 0, "layer"].unique())
    still = own[own["layer"] < 0].drop(columns="layer").merge(pd.DataFrame({"layer": layers}), how="cross")
    own = pd.concat([own[own["layer"] >= 0], still])
    own = own.assign(panel=own["where"].map(PANELS), what=own["basis"].map(SHOWN))
    return plots.layer_curve(own, "predicted answer (share of cases)", by="what", panel="panel")


def table(n: Numbers) -> pd.DataFrame:
    """Shares at the layers that are read: predicted answers, raw and centred, and answers that moved without need."""
    rows = []
    for where, layer in n.at.items():
        own = drawn(n.accuracies[(n.accuracies["where"] == where) & n.accuracies["layer"].isin([layer, -1])])
        for basis, part in own.groupby("basis", sort=False):
            cells = part.set_index(["scoring", "kind"])
            shown = {f"{kind}, {scoring}": of_row(row) for (scoring, kind), row in cells.iterrows()}
            rows.append(
                {"swapped": f"{PANELS[where].removeprefix('swapped ')}, layer {layer}", "what": SHOWN[basis], **shown}
            )
    names = {f"other, {s}": f"predicted, {s}" for s in ("raw", "centred")}
    names |= {f"same, {s}": f"moved without need, {s}" for s in ("raw", "centred")}
    return pd.DataFrame(rows).rename(columns=names).fillna("").set_index(["swapped", "what"])


def sentences(n: Numbers) -> list[str]:
    """The question, both places, and what moves without need."""
    own = n.accuracies.set_index(["where", "scoring", "kind", "basis", "layer"]).sort_index()
    still, last = own.loc[("name", "centred", "other", NOTHING, -1)], n.accuracies["layer"].max()
    out = [
        "Interchange interventions ask whether the answer is the one that a causal model predicts: the evidence of "
        "the two names' classes is added up, and the class with most of it is the answer. A base prompt of two classes "
        "is a tie, of which it predicts nothing; with one name's class swapped for the other's, it predicts the class "
        "that both names then have. When the class is really named twice, that answer comes in a share of "
        f"{of_row(own.loc[('last', 'centred', 'other', WHOLE, last)])} of cases: first of the candidates, each word's "
        "mean over the base prompts taken off. With nothing swapped it comes in "
        f"{still['estimate'] * still['cases']:.0f} of {still['cases']:.0f} cases ({still['quads']:.0f} quads); as both "
        "names are swapped in turn, at most half can be right whatever word the model prefers."
    ]
    for where, layer in n.at.items():
        here = own.loc[where, "centred", "other"]
        each = [(SHOWN[basis], of_row(here.loc[basis, layer])) for basis in SHOWN if (basis, layer) in here.index]
        raw = of_row(own.loc[where, "raw", "other", MEANS, layer])
        more = n.gains[n.gains["where"] == where]
        out.append(
            f"With one name's class {PANELS[where]} after layer {layer}, the predicted answer comes in this share of "
            f"cases (class means, raw: {raw}). {gain_words(more)}\n\n{tabled(('swapped', 'predicted answer'), each)}"
        )
    return [*out, unneeded(n)]


def unneeded(n: Numbers) -> str:
    """How often the answer moves without need."""
    moved, own = pd.DataFrame(), n.accuracies[(n.accuracies["scoring"] == "centred") & (n.accuracies["kind"] == "same")]
    for where, layer in n.at.items():
        here = own[(own["where"] == where) & (own["layer"] == layer) & own["basis"].isin([*SHOWN])]
        moved = pd.concat([moved, here.assign(what=here["basis"].map(SHOWN) + f" {PANELS[where]}")])
    if moved.empty:
        return (
            "No prompt lines up whose source's name is of the class that was there before: how often the answer moves "
            "without need was not asked."
        )
    return (
        "Where the source's name is of the class that was there before, the causal model leaves the answer as it was. "
        f"It moves all the same in a share of {extremes(moved, 'what')} of cases; the table has them all."
    )


def gain_words(more: pd.DataFrame) -> str:
    """Which bases are right more often than nothing swapped, and whether the class means are than random ones."""
    if more["low"].isna().any():
        return "There are too few quads to say what is more often right than nothing swapped."
    out = []
    for against, rows in more.groupby("against", sort=False):
        sure = rows[rows["low"] > 0]
        by = extremes(sure.assign(what=sure["basis"].map(SHOWN)), "what")
        random = "the one random subspace drawn, its change as long as the class means'"
        than = "nothing swapped" if against == NOTHING else random
        lucky = against == NOTHING and bool((rows["basis"].eq(RANDOM) & (rows["low"] > 0)).any())
        not_so = [SHOWN[row.basis] for row in rows.itertuples() if not row.low > 0]
        out.append(
            (f"More often right than {than}: by {by}" if len(sure) else f"Nothing is more often right than {than}")
            + (f"; not shown: {listed(not_so)}" if not_so else "")
            + "."
            + " The random subspace is a single draw: a change of that length does some of it by itself." * lucky
        )
    return " ".join(out)


def found(n: Numbers) -> dict[str, Any]:
    """What the findings hold of interchanges."""
    return {"layers": n.at, "accuracies": n.accuracies.to_dict("records"), "gains": n.gains.to_dict("records")}
