"""The part of step 08's findings about directions: sentences built from the tables of `steps.subspace.directions_page`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lib import effects, stats
from lib.tasks import Pair
from pipeline.step import Step
from report.plots import Figure
from report.words import ONE_HALF, OVER_QUADS, interval, listed
from steps.subspace.directions_page import (
    ONE,
    against_random,
    by_number,
    called,
    dose_curves,
    last_half,
    single_classes,
    slopes,
    split_parts,
)
from steps.subspace.measure import Subspace


def value(row: Any, prefix: str = "", digits: int = 2) -> str:
    """An estimate with its interval, of a row of a table."""
    names = ("share", "share_low", "share_high") if prefix else ("estimate", "low", "high")
    return interval(*(row[name] for name in names), digits)


def row_of(table: pd.DataFrame, method: str, k: int) -> pd.Series:
    return table[(table["method"] == method) & (table["k"] == k)].iloc[0]


def layer_sentences(table: pd.DataFrame, layer: int, params: Subspace) -> list[str]:
    """Where along the slice one direction carries the class, and whether it does in the slice as a whole."""
    own = effects.reported(table)
    one, whole = (own[own["method"] == name].set_index("layer") for name in (ONE[0], "whole"))
    each = [f"{at} {value(row)} ({row['share']:.0%})" for at, row in one.iterrows() if at >= 0]
    first = table[(table["half"] == table["half"].iloc[0]) & (table["method"] == ONE[0])].set_index("layer")["estimate"]
    reached = first[layer] >= params.slice_share
    share = f"{params.slice_share:.0%} on the discovery half"
    why = f"the first where it recovers {share}" if reached else f"where it recovers most: nowhere {share}"
    random = own[(own["layer"] == -1) & (own["method"] == "random")].iloc[0]
    low, high = one.loc[-1, "low"], whole.loc[-1, "high"]
    more = " (more than everything: what they write beside it works against the answer)"
    more = more if pd.notna(low) and low > high else ""
    return [
        f"One direction, from the mean of the pair's corrupt class to that of its clean class, patched in the residual "
        f"stream at `last` alone, recovers of logit_diff after layer {listed(each)}; in brackets, as a share of what "
        f"the whole residual stream does there. What follows is about layer {layer}, {why}.",
        f"In all sites of the slice together, that component alone recovers {value(one.loc[-1])}{more}, everything "
        f"they write {value(whole.loc[-1])}, and a random direction with a change of equal norm {value(random)}.",
    ]


def number_sentences(numbers: pd.DataFrame, paired: pd.DataFrame, restored: bool | None, params: Subspace) -> list[str]:
    """Whether one direction suffices, how many reach the share, and whether they beat random ones."""
    one, whole = row_of(numbers, *ONE), row_of(numbers, "whole", 0)
    verdict = {True: "suffices", False: "does not suffice", None: "is not shown to suffice (too few quads)"}[restored]
    out = [
        f"One direction {verdict}: the class difference recovers {value(one)}, {one['share']:.0%} of the whole "
        f"residual stream's {value(whole)}; asked for was a lower end above {params.restores_recovery} and the clean "
        f"answer on top in at least {params.restores_share:.0%} of the pairs."
    ]
    words = []
    for method in ("class means", "probe", "profession means", "rotation"):
        own = numbers[numbers["method"] == method].sort_values("k")
        if own.empty:
            continue
        enough = own[own["share"] >= params.slice_share]
        if len(enough):
            words.append(f"{enough['k'].iloc[0]} of the {method} ({value(enough.iloc[0])})")
        else:
            words.append(f"no number of the {method} (at most {value(own.loc[own['estimate'].idxmax()])})")
    out.append(
        f"Directions shared by all pairs reach {params.slice_share:.0%} of the whole residual stream's recovery with "
        f"{listed(words)}; the class means span at most {numbers.loc[numbers['method'] == 'class means', 'k'].max()}."
    )
    if paired["low"].isna().any():
        return [*out, "There are too few quads to say whether directions beat random ones of equal norm."]
    beats = paired["low"] > 0
    shown = paired[~paired["method"].str.endswith("the rest")]
    shown = shown.loc[shown.groupby("method", sort=False)["k"].idxmax()]
    each = [f"{name} by {value(row)}" for name, (_, row) in zip(called(shown), shown.iterrows(), strict=True)]
    weak = called(paired[~beats])
    out.append(
        ("Every method beats" if beats.all() else "Directions do not always beat")
        + f" random subspaces of as many dimensions whose change has the same norm (paired by quads, share of "
        f"logit_diff): {listed(each)}." + ("" if beats.all() else f" Not better than random: {listed(weak)}.")
    )
    return out


def class_sentence(single: pd.DataFrame, params: Subspace) -> str:
    """The direction of one class against the rest, in pairs with and without the class: does it fix the output?"""
    own, other = single[single["there"]], single[~single["there"]]
    each = [f"{row['class_name']} {value(row)}" for _, row in own.iterrows()]
    without = f"; in pairs without it, at most {other['estimate'].abs().max():.2f} either way" if len(other) else ""
    text = (
        f"The direction of one class against the rest, in pairs with it on a side, recovers: {listed(each)}{without}."
    )
    if own["low"].isna().any():
        return text
    enough = own.loc[own["low"].astype(float) > params.restores_recovery, "class_name"]
    return f"{text} By itself it recovers more than {params.restores_recovery} (lower end) for {listed(enough)}."


def split_sentence(parts: pd.DataFrame, directions: pd.DataFrame) -> str:
    """How much runs through the dormant part, and how much the activations vary along each direction."""
    count, outside = (directions["method"] == "component").sum(), parts[parts["part"] == "outside"]
    each = [f"{row['name']}: {value(row, 'share')}" for _, row in outside.iterrows()]
    mostly = outside.loc[outside["share"] > 0.5, "name"]
    verdict = (
        f"mostly dormant, so to that extent an illusion: {listed(mostly)}" if len(mostly) else "mostly dormant: none"
    )
    vary, own = [], directions[directions["method"].isin(["class means", "rotation", "probe"])]
    for (method, k), rows in own.groupby(["method", "k"], sort=False):
        vary.append(
            f"{method}, {k or len(rows)}: {rows['variance'].median():.0f} times ({rows['between'].median():.0%})"
        )
    return (
        f"The dormant part of a change, outside the span of the {count} principal components that hold 95% of the "
        f"variance of the model's own activations, has by itself this share of the whole change's effect: "
        f"{listed(each)} ({verdict}). The activations' variance along the directions, over that along random ones (in "
        f"brackets, the share of it that lies between classes; medians), is {listed(vary)}."
    )


def steering_sentence(slope: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Dose and response, for each kind of prompt."""
    out = []
    for kind, rows in slope.groupby("kind", sort=False):
        real, random = rows[rows["added"] != "random"], rows[rows["added"] == "random"].iloc[0]
        own, lead = curves[curves["kind"] == kind], real["added"].iloc[0]
        means = own[own["added"] != "random"].pivot(index="dose", columns="added", values="estimate")
        rising = int((means.diff().iloc[1:] > 0).all().sum())
        ends = own[own["added"] == lead].sort_values("dose")[["dose", "top"]].to_numpy()[[0, -1]]
        each = [f"{row['added']} {value(row)}" for _, row in real.iterrows()]
        out.append(
            f"{kind} ({rows['prompts'].iloc[0]} prompts): {listed(each)} (random: {value(random)}), with every dose "
            f"higher than the one before on average for {rising} of {len(real)} classes; the {lead} leads in "
            f"{ends[0, 1]:.0%} of them at dose {ends[0, 0]:g} and in {ends[1, 1]:.0%} at {ends[1, 0]:g}"
        )
    return (
        "Steering: one dose of a class's direction adds to the class's logit, less the candidates' mean, this many "
        f"logits (random: directions as long as the first class's): {'; '.join(out)}."
    )


def transfer_sentence(table: pd.DataFrame) -> str:
    """Directions of other prompts, as a share of the own ones'."""
    each = []
    for target, rows in table[table["k"] == 1].groupby("target", sort=False):
        own = rows.loc[rows["source"] == target, "recovery"].iloc[0]
        words = [
            f"`{row['source']}` {value(row)}" for _, row in rows.iterrows() if row["source"] not in (target, "random")
        ]
        chance = rows.loc[rows["source"] == "random", "estimate"]
        words += [f"random ones {chance.iloc[0]:.2f}"] if len(chance) else []
        each.append(f"in `{target}` ({rows['pairs'].iloc[0]} pairs, own recovery {own:.2f}): {listed(words)}")
    return f"One direction fitted on other prompts does this share of what the own one does: {'; '.join(each)}."


CAPTIONS = {
    "layers": "Recovery when only the component along class directions is patched, clean into corrupt, in the residual "
    f"stream at the last token after each layer of the slice; {OVER_QUADS}.",
    "numbers": "Recovery against the number of directions patched together, after the chosen layer; grey: random "
    f"subspaces whose change has the same norm; dashed: the whole residual stream; {OVER_QUADS}.",
    "doses": "Logit of the class whose direction is added, less the candidates' mean, against the dose, in prompts of "
    "no one class; random: a direction of equal norm; 95% bootstrap intervals over prompts.",
}


def part_of(
    step: Step, pairs: Sequence[Pair], layer: int, directions: pd.DataFrame, scan: pd.DataFrame, patches: pd.DataFrame,
    doses: pd.DataFrame, moved: pd.DataFrame, figures: Mapping[str, Figure],
) -> dict[str, Any]:  # fmt: skip
    """This part of the page's findings; `scan`, `doses` and `moved` as `layer_table`, `dose_table` and `transfer_table`
    give them, `patches` the table of changes itself."""
    p, own = step.params, last_half(patches)
    numbers, paired, single = by_number(patches, p), against_random(patches, p), single_classes(patches, pairs, p)
    parts, curves, slope = split_parts(patches, p), dose_curves(doses, p), slopes(doses, p)
    one = row_of(numbers, *ONE)
    span = stats.Interval(one["estimate"], one["low"], one["high"], p.level, int(one["quads"]), "")
    restored = effects.restores(
        own[own["variant"] == "class difference|1|"], span, p.restores_share, p.restores_recovery
    )
    about = directions[(directions["layer"] == layer) & (directions["method"] == "class means")].iloc[0]
    half = "discovery" if own["half"].iloc[0] != about["half"] else "only"
    first = (
        f"Directions were fitted on {about['prompts']} prompts of the {half} half and are reported on "
        f"{own['pair_id'].nunique()} pairs of {own['quad_id'].nunique()} quads of the {own['half'].iloc[0]} half."
    )
    number = number_sentences(numbers, paired, restored, p)
    return {
        "sentences": [
            first + ONE_HALF * (half == "only"),
            *layer_sentences(scan, layer, p),
            *number,
            class_sentence(single, p),
            split_sentence(parts, directions),
            steering_sentence(slope, curves),
            transfer_sentence(moved),
        ],
        "headline": [number[0], number[-1]],
        "figures": dict(figures),
        "captions": CAPTIONS,
        "directions": {
            "layer": layer,
            "restores": restored,
            **{name: table.to_dict("records") for name, table in (
                ("by_layer", effects.reported(scan)), ("by_number", numbers), ("against_random", paired),
                ("single_classes", single), ("parts", parts), ("slopes", slope), ("transfer", moved),
            )},
        },
    }  # fmt: skip
