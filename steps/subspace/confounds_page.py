"""Step 08, what else is in the class directions: from the tables of `confounds` to numbers, tables and sentences."""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd
from IPython.display import Markdown

from lib import effects
from report.words import interval, listed, of_row
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


def with_point(share: float, highest: float) -> str:
    """A share and what spans dealt out anew stay below, with a third digit where two would not tell them apart."""
    digits = 2 + (f"{share:.2f}" == f"{highest:.2f}")
    return f"{share:.{digits}f} ({highest:.{digits}f})"


def beyond_sentence(shares: pd.DataFrame, level: float) -> str:
    """Which single directions lie further along an attribute than spans dealt out anew, beside how many would by
    chance."""
    own = shares[shares["name"] != MEAN]
    far = own[own["share"] > own["highest"]].sort_values("p", kind="stable")
    each = [
        f"{row.name_} along {'all together' if row.attribute == TOGETHER else row.attribute} "
        f"{with_point(row.share, row.highest)}"
        for row in far.rename(columns={"name": "name_"}).head(NAMED).itertuples()
    ]
    which = f": {listed(each)}{', ...' * (len(far) > NAMED)}" if each else ""
    return (
        f"Direction by direction and attribute by attribute, each by itself, {len(far)} of {len(own)} shares exceed "
        f"their {level:.0%} point ({len(own) * (1 - level):.2g} would on average by chance){which}."
    )


def attribute_sentences(n: Numbers, layer: int, level: float) -> list[str]:
    """How much of the class directions lies along the people's attributes, and what that part does."""
    mean, by = n.shares[n.shares["name"] == MEAN].set_index("attribute"), n.parts.set_index("part")
    every, each = mean.loc[TOGETHER], n.shares[n.shares["attribute"] == TOGETHER]
    each_alone = [name for name in mean.index if name != TOGETHER]
    if not each_alone:
        return ["Nothing is known of the people beside their classes: what else lies in the directions was not asked."]
    alone = listed(f"{name} {with_point(*mean.loc[name, ['share', 'highest']])}" for name in each_alone)
    rest = each[each["name"].str.endswith("the rest")].sort_values("share", ascending=False)
    more = "more" if every["p"] <= 1 - level else "not surely more"
    ends = [rest.iloc[place] for place in (0, -1)]
    most, least = (f"{end['name'].removesuffix(' against the rest')} ({end['share']:.2f})" for end in ends)
    first = (
        f"Within a class, the people's {listed(each_alone)} move the activation at `last` after layer {layer} "
        f"along a span of {every['k']} dimensions (fitted on {every['prompts']} couples of people). Of the squared "
        f"length of the difference between two classes' means {every['share']:.2f} lies in it (mean over all pairs of "
        f"classes), {more} than in spans of attributes dealt out anew within classes: {every['by_chance']:.2f} on "
        f"average, at most {every['highest']:.2f} in {level:.0%} of them (p = {every['p']:.2g}). Of one attribute "
        f"alone, with that {level:.0%} point: {alone}. Of the directions of one class against the rest, most lies "
        f"there of {most}, least of {least}. {beyond_sentence(n.shares, level)}"
    )
    if f"{TOGETHER} inside" not in by.index:
        return [first]
    inside, outside = (value(by.loc[f"{TOGETHER} {part}"]) for part in PARTS)
    dealt = " and ".join(value(by.loc[f"{DEALT_OUT} {part}"]) for part in PARTS)
    return [
        first,
        f"Of the class difference's change, the part along {listed(each_alone)} alone recovers {inside} of "
        f"the gap, the rest of it {outside}, all of it {value(by.loc[''])}; with the attributes dealt out anew the "
        f"two parts recover {dealt}.",
    ]


def value(row: pd.Series) -> str:
    return interval(row["estimate"], row["low"], row["high"])


def placebo_sentence(rows: pd.DataFrame, attribute: str, layer: int) -> str:
    """What the class directions carry in pairs of one superset, beside the attribute's own direction."""
    by = {row.method: row for row in rows.itertuples()}
    one, own = by[ONE[0]], by[f"{attribute} difference"]
    less = {"specific": "surely less", "general": "surely more", "open": "not surely less"}

    def both(method: str) -> str:
        row = by[method]
        verdict = f", {less[row.verdict]}" if row.verdict else ""
        return f"{of(row, 'placebo')} against {of_row(row)} ({of(row, 'quotient')} times as much{verdict})"

    return (
        f"Placebo: in pairs whose four people are of one superset and differ in {attribute} ({one.placebo_quads} "
        f"quads), one direction between their superset and another (mean over the others), patched after layer "
        f"{layer}, recovers this share of the gap between that attribute's answers, against the share of the superset "
        f"gap by the pair's own class difference ({one.quads} quads): {both(ONE[0])}. All directions that the "
        f"supersets' means span: {both('class means')}. The direction between the two classes of {attribute}, fitted "
        f"on other placebo pairs: {of(own, 'placebo')} against {of_row(own)}. A random direction, its change as long "
        f"as the class difference's: {of(by['random'], 'placebo')} against {of_row(by['random'])}. Everything there: "
        f"{of(by['whole'], 'placebo')} against {of_row(by['whole'])}."
    )


def sentences(m: Measured, n: Numbers, params: Subspace) -> list[str]:
    """Everything that the page says of confounds, in words."""
    placebo = [placebo_sentence(rows, name, m.layer) for name, rows in n.placebo.groupby("attribute", sort=False)]
    return [*attribute_sentences(n, m.layer, params.level), *(placebo or [not_asked(params)])]
