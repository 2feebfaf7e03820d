"""Step 08, what else is in the class directions: from the tables of `confounds` to numbers, tables and sentences."""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd
from IPython.display import Markdown

from lib import effects
from report.words import interval, listed, of_row, tabled
from steps.subspace.confounds import DEALT_OUT, MEAN, TOGETHER
from steps.subspace.direction_sweeps import PARTS
from steps.subspace.directions_page import last_half
from steps.subspace.measure import ONE, Measured, Subspace, sums, with_share

NAMED = 6  # that a sentence lists at most
NONE = (
    "There are no placebo pairs here with a gap of the right sign above the noise, of a superset that the fitting half "
    "has: whether the class directions are about supersets alone was not asked."
)
NONE_GIVEN = (
    "For the pairs of a `pairs_file` no placebo pairs are made: whether the class directions are about supersets alone "
    "was not asked."
)


class Numbers(NamedTuple):
    """What the page says of confounds."""

    shares: pd.DataFrame  # of each class direction, by attribute
    parts: pd.DataFrame  # recovery of the class difference's parts
    placebo: pd.DataFrame  # of each direction: its share of the superset gap, and of a placebo's

    def found(self) -> dict[str, Any]:
        """What the findings hold."""
        return {name: table.to_dict("records") for name, table in self._asdict().items()}


def numbers(m: Measured, params: Subspace) -> Numbers:
    """Everything that the page says of confounds, in numbers."""
    shares = m.spans[m.spans["what"] == "share"].drop(columns=["what", "vector"]).astype({"k": int})
    own = last_half(m.beside)
    placebo = None if m.placebo is None else last_half(m.placebo)
    return Numbers(shares, parts(own[own["method"] == ONE[0]], params), specific(own, placebo, params))


def parts(own: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """Recovery of the class difference ("") and of its parts inside and outside a span, and their share of its effect;
    of spans dealt out anew, the mean over draws."""
    own = own.assign(part=own["part"].str.replace(r" \d+", "", regex=True))
    return with_share(*sums(own, ["part"]), params, lambda _: "")


def specific(own: pd.DataFrame, placebo: pd.DataFrame | None, params: Subspace) -> pd.DataFrame:
    """`effects.specific` of each direction that is patched in both kinds of pairs, for each placebo attribute."""
    out = [pd.DataFrame(columns=["method", "attribute"])]
    whole = own[~own["part"].str.contains("side")]
    for attribute, rows in () if placebo is None else placebo.groupby("attribute", sort=False):
        methods = [name for name in whole["method"].unique() if name in set(rows["method"])]
        both = (frame[frame["method"].isin(methods)] for frame in (whole, rows))
        table = effects.specific(*both, ["method"], params, 1.0).set_index("method").loc[methods].reset_index()
        out.append(table.assign(attribute=attribute))
    return pd.concat(out[1:] or out, ignore_index=True)


# --- tables -----------------------------------------------------------------------------------------------------------


def share_table(n: Numbers) -> pd.DataFrame:
    """Each direction's shares in the attributes' spans, in brackets what spans dealt out anew stay below, at the
    profile's level."""
    text = [with_point(row.share, row.highest) for row in n.shares.itertuples()]
    wide = n.shares.assign(text=text).pivot(index="name", columns="attribute", values="text")
    order = wide.loc[n.shares["name"].unique(), n.shares["attribute"].unique()]
    order = order.rename(columns={TOGETHER: "all together"})
    return order.rename_axis(index="direction", columns=None)


def not_asked(params: Subspace) -> str:
    """Why there are no placebo pairs."""
    return NONE if params.pairs_file is None else NONE_GIVEN


def placebo_table(n: Numbers, params: Subspace) -> pd.DataFrame | Markdown:
    """Each direction's shares of the two gaps, and their quotient; or why there are none."""
    if n.placebo.empty:
        return Markdown(not_asked(params))
    rows = n.placebo.itertuples()
    each = [(row.method, row.attribute, of_row(row), of(row, "placebo"), of(row, "quotient")) for row in rows]
    names = ["direction", "placebo", "share of the superset gap", "share of the placebo gap", "placebo over superset"]
    return pd.DataFrame(each, columns=names)


# --- sentences --------------------------------------------------------------------------------------------------------


def of(row: Any, prefix: str) -> str:
    """An estimate of a row whose columns have a prefix."""
    ends = (getattr(row, f"{prefix}_{name}") for name in ("estimate", "low", "high"))
    return interval(*ends) if pd.notna(getattr(row, f"{prefix}_estimate")) else "nothing to compare with"


def with_point(share: float, highest: float) -> tuple[str, str]:
    """A share and what spans dealt out anew stay below, with a third digit where two would not tell them apart."""
    digits = 2 + (f"{share:.2f}" == f"{highest:.2f}")
    return f"{share:.{digits}f}", f"{highest:.{digits}f}"


def beyond_sentence(shares: pd.DataFrame, level: float) -> str:
    """Which single directions lie further along an attribute than spans dealt out anew, beside how many would by
    chance."""
    own = shares[shares["name"] != MEAN]
    far = own[own["share"] > own["highest"]].sort_values("p", kind="stable")
    each = [
        f"{row.name_} along {'all together' if row.attribute == TOGETHER else row.attribute}"
        for row in far.rename(columns={"name": "name_"}).head(NAMED).itertuples()
    ]
    which = f" The furthest: {listed(each)}." if each else ""
    return (
        f"Direction by direction and attribute by attribute, each by itself, {len(far)} of {len(own)} shares "
        f"{'exceeds its' if len(far) == 1 else 'exceed their'} {level:.0%} point, where {len(own) * (1 - level):.2g} "
        f"would on average by chance.{which}"
    )


def attribute_sentences(n: Numbers, layer: int, level: float) -> list[str]:
    """How much of the class directions lies along the people's attributes, and what that part does."""
    mean, by = n.shares[n.shares["name"] == MEAN].set_index("attribute"), n.parts.set_index("part")
    every, each = mean.loc[TOGETHER], n.shares[n.shares["attribute"] == TOGETHER]
    each_alone = [name for name in mean.index if name != TOGETHER]
    if not each_alone:
        return ["Nothing is known of the people beside their classes: what else lies in the directions was not asked."]
    alone = "".join(
        f" Along {name} alone it is {share}, where by chance the {level:.0%} point is {point}."
        for name in each_alone
        for share, point in [with_point(*mean.loc[name, ["share", "highest"]])]
    )
    rest = each[each["name"].str.endswith("the rest")].sort_values("share", ascending=False)
    more = "more" if every["p"] <= 1 - level else "not surely more"
    ends = [rest.iloc[place] for place in (0, -1)]
    most, least = (f"{end['name'].removesuffix(' against the rest')} ({end['share']:.2f})" for end in ends)
    first = (
        f"Within a class, the people's {listed(each_alone)} move the activation at `last` after layer {layer} "
        f"along a span of {every['k']} dimensions (fitted on {every['prompts']} couples of people). In it lies "
        f"{every['share']:.2f} of the squared length of the difference between two classes' means (mean over all pairs "
        f"of classes), {more} than by chance (p = {every['p']:.2g}). By chance, in spans of attributes dealt out anew "
        f"within classes, it is {every['by_chance']:.2f} on average, and the {level:.0%} point is "
        f"{every['highest']:.2f}.{alone} Of the directions of one class against the rest, most lies there of {most}, "
        f"least of {least} (no intervals). {beyond_sentence(n.shares, level)}"
    )
    if f"{TOGETHER} inside" not in by.index:
        return [first]
    inside, outside = (value(by.loc[f"{TOGETHER} {part}"]) for part in PARTS)
    dealt = [value(by.loc[f"{DEALT_OUT} {part}"]) for part in PARTS]
    return [
        first,
        f"Of the class difference's change, the part along {listed(each_alone)} alone recovers {inside} of the gap, "
        f"and the rest of it {outside}. All of it recovers {value(by.loc[''])}. With the attributes dealt out anew the "
        f"part along them recovers {dealt[0]}, and the rest {dealt[1]}.",
    ]


def value(row: pd.Series) -> str:
    return interval(row["estimate"], row["low"], row["high"])


def placebo_sentence(rows: pd.DataFrame, attribute: str, layer: int) -> str:
    """What the class directions carry in pairs of one superset, beside the attribute's own direction."""
    by = {row.method: row for row in rows.itertuples()}
    one, own = by[ONE[0]], by[f"{attribute} difference"]
    less = {"specific": "surely less", "general": "surely more", "open": "not surely less"}

    what = {
        ONE[0]: "one direction, between two supersets",
        "class means": "all directions that the supersets' means span",
        own.method: f"the direction between the two classes of {attribute}, fitted on other placebo pairs",
        "random": "a random direction, its change as long as the class difference's",
        "whole": "everything there",
    }
    cells = [
        (name, of(by[method], "placebo"), of_row(by[method]), of(by[method], "quotient"))
        for method, name in what.items()
    ]
    verdict = f", {less[one.verdict]}," if one.verdict else ""
    columns = ("patched", f"of the {attribute} gap", "of the superset gap", "times as much")
    return (
        f"Placebo: where all four people are of one superset and differ in {attribute}, the superset's direction does "
        f"{of(one, 'quotient')} times as much{verdict} as in the task's pairs. It is the direction between the "
        f"people's superset and another (mean over the others), patched after layer {layer} ({one.placebo_quads} "
        f"placebo quads and {one.quads} quads).\n\n{tabled(columns, cells)}"
    )


def sentences(m: Measured, n: Numbers, params: Subspace) -> list[str]:
    """Everything that the page says of confounds, in words."""
    placebo = [placebo_sentence(rows, name, m.layer) for name, rows in n.placebo.groupby("attribute", sort=False)]
    return [*attribute_sentences(n, m.layer, params.level), *(placebo or [not_asked(params)])]
