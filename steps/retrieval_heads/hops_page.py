"""One hop or two, on the page of step 06: shares of the gap, by who reads and at which tokens."""

from __future__ import annotations

import pandas as pd

from lib import stats
from lib.effects import columns, quad_matrix, reported
from lib.stats import Settings
from report.words import of_row, sites, tabled
from steps.retrieval_heads.hops import EVERY, ROLES, SLICE

REMAINDER = "remainder"
SHARING = "with those that share their keys and values"
LEFT = {EVERY: "no role carries alone", SLICE: "is read by other heads, or carried by no role alone"}


def shares(records: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """What is read of the gap at each role, by reader, confirmation half; and of LEFT the `remainder`, with which these
    add up to 1. Columns: reader, position, estimate, low, high, quads."""
    own, parts = reported(records), []
    for reader, rows in own.groupby("reader", sort=False):
        lost, gaps = (quad_matrix(rows, value, ["position"], "sum") for value in ("effect", "gap"))
        by_role = pd.DataFrame(lost.values, columns=lost.sites["position"])
        by_role = by_role[[role for role in ROLES if role in by_role]]
        gap = gaps.values[:, 0]
        if reader in LEFT:
            by_role = by_role.assign(**{REMAINDER: gap - by_role.sum(axis=1)})
        spans = columns(stats.ratio_intervals(by_role.to_numpy(), gap, settings))
        parts.append(pd.DataFrame({"reader": reader, "position": [*by_role]} | spans).assign(quads=len(gap)))
    return pd.concat(parts, ignore_index=True)


def table(shares: pd.DataFrame) -> pd.DataFrame:
    """A row for each reader, a column for each role."""
    said = shares.assign(said=[of_row(row) for row in shares.itertuples()])
    return (
        said.pivot_table(index="reader", columns="position", values="said", aggfunc="first", sort=False)
        .fillna("")
        .reset_index()
    )


def sentences(shares: pd.DataFrame) -> list[str]:
    """What is read in one hop and what in two: by all heads, by the slice's, and by which of these most, where
    that is surely above zero."""
    out = []
    for reader, what in LEFT.items():
        own = shares[shares["reader"] == reader].set_index("position")
        if len(own):
            rows = [(f"`{role}`", of_row(row)) for role, row in own.drop(REMAINDER).iterrows()]
            whose = "heads of all layers" if reader == EVERY else f"the slice's heads, {SHARING},"
            out.append(
                f"What {whose} read at the last token: {of_row(own.loc[REMAINDER])} {what} "
                f"({own['quads'].iloc[0]} quads, confirmation half).\n\n"
                + tabled(("read at", "share of the gap"), rows)
            )
    there = shares[(shares["position"] == "between") & ~shares["reader"].isin([EVERY, SLICE])]
    if len(there):
        row = there.loc[there["estimate"].idxmax()]
        if pd.notna(row["low"]) and row["low"] > 0:
            verb = "share" if "+" in row["reader"] else "reads"
            out.append(
                f"Of the slice's heads, {SHARING}, {sites(row['reader'].split(' + '))} {verb} most at `between`: "
                f"{of_row(row)} of the gap (the largest of these estimates, picked and reported on the same pairs)."
            )
    return out


def both_hops(shares: pd.DataFrame, everything: pd.DataFrame) -> list[str]:
    """Why path patching at the names (`everything` that the slice reads there) finds more than the last token reads
    there: it goes both ways."""
    own = shares[shares["reader"] == SLICE].set_index("position")
    if not len(everything) or "between" not in own.index:
        return []
    return [
        f"The {of_row(everything.iloc[0])} that path patching at the names finds goes both ways. It replaces keys and "
        f"values there for the last token, which by itself reads {of_row(own.loc['names'])}. It also does for the "
        "tokens before it, so that it counts the part that these heads lay down of the "
        f"{of_row(own.loc['between'])} that the last token reads at `between`."
    ]
