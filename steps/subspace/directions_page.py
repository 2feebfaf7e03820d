"""Step 08, directions: from the tables of `steps.subspace.direction_sweeps` to numbers, figures and sentences.

1. Every share here is a ratio of sums over quads (`measure.ratios`): recovery over the gap between clean and corrupt,
   over the whole residual stream's effect, or over another direction's.
2. `by_number`, `against_random`, `single_classes`, `split_parts`, `dose_table` and `slopes`, `transfer_table` answer
   one question each, `numbers` gathers their answers; figures and sentences follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from IPython.display import HTML

from lib import effects, stats
from lib.effects import reported
from lib.stats import MINIMUM_CLUSTERS
from lib.tasks import Pair
from report import interactive, plots, site_tables
from report.plots import Figure
from report.words import ONE_HALF, OVER_QUADS, counted, extremes, interval, listed, tabled
from steps.subspace.direction_sweeps import PARTS
from steps.subspace.measure import ONE, Measured, Subspace, parsed, ratios, sums, with_share

SHOWN = {"": "all of it", "inside": "inside", "outside": "outside (dormant)"}
CAPTIONS = {
    "layers": "Recovery when only the component along class directions is patched, clean into corrupt, in the residual "
    f"stream at the last token after each layer of the slice; {OVER_QUADS}.",
    "numbers": "Recovery against the number of directions patched together, after the chosen layer; grey: random "
    f"subspaces whose change has the same norm; dashed: the whole residual stream; {OVER_QUADS}.",
    "doses": "Logit of the class whose direction is added, less the candidates' mean, against the dose, in prompts of "
    "no one class; random: a direction of equal norm; bootstrap intervals over prompts.",
}


# --- numbers ----------------------------------------------------------------------------------------------------------


def last_half(patches: pd.DataFrame) -> pd.DataFrame:
    """The reported half of a table of variants, its names parsed."""
    return reported(parsed(patches))


def by_number(own: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """Recovery by method and number of directions, with its share of the whole residual stream's."""
    table = with_share(*sums(own[~own["part"].isin(PARTS)]), params)
    return table.drop(columns=["share_low", "share_high"])


def random_band(own: pd.DataFrame) -> pd.DataFrame:
    """The lowest and highest recovery of a random subspace, by its number of dimensions."""
    effect, gap = sums(own[own["method"] == "random"], ["k", "part"])
    recovery = (effect.sum() / gap.sum()).groupby("k").agg(["min", "max"])
    return recovery.reset_index().set_axis(["k", "low", "high"], axis=1)


def against_random(own: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """Recovery of each method less that of the random subspaces of as many dimensions and equal norm, by quads."""
    effect, gap = sums(own[~own["part"].isin(PARTS)])
    sizes = set(effect["random"].columns)
    kept = [column for column in effect if column[0] not in ("random", "whole") and column[1] in sizes]
    paired = pd.DataFrame({c: effect[c] - effect["random", c[1]] for c in kept})
    return ratios(paired.rename_axis(columns=["method", "k"]), gap, params)


def single_classes(own: pd.DataFrame, pairs: Sequence[Pair], params: Subspace) -> pd.DataFrame:
    """Recovery of the direction of one class against the rest, in pairs that have the class on either side (`there`)
    and in those that do not."""
    classes = {p.pair_id: {p.candidates[p.answer], p.candidates[p.corrupt_answer]} for p in pairs}
    parts, against = [], " against the rest"
    for method, rows in own[own["method"].str.endswith(against)].groupby("method", sort=False):
        name = method.removesuffix(against)
        there = rows["pair_id"].map({pair: name in both for pair, both in classes.items()})
        for has, part in rows.groupby(there):
            parts.append(ratios(*sums(part), params).assign(class_name=name, there=has))
    return pd.concat(parts, ignore_index=True)


def split_parts(own: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """Recovery of what was split, all of it and its parts inside and outside the span of the principal components;
    `share` is the part's, of the effect of all of it."""
    split = own.loc[own["part"] == "inside", ["method", "k"]].drop_duplicates()
    effect, gap = sums(own.merge(split, on=["method", "k"]), ["method", "k", "part"])
    out = with_share(effect, gap, params, lambda column: (*column[:2], ""))
    return out.assign(name=called(out), shown=out["part"].map(SHOWN))


def called(table: pd.DataFrame) -> list[str]:
    """Methods with their number of directions, as figures name them."""
    return [
        method if method == "whole" else f"{method}, {k}" for method, k in zip(table["method"], table["k"], strict=True)
    ]


def dose_table(frame: pd.DataFrame, kinds: Mapping[str, str], candidates: Sequence[str]) -> pd.DataFrame:
    """Per prompt, class added and dose: the logit of that class less the mean of all candidates', `y` (random: of the
    first class; the mean over draws), and whether the class leads (`top`)."""
    words = frame["variant"].str.split("|", expand=True)
    after = np.stack(frame["logits_after"].tolist()).astype(float)
    lead = next(name for name in candidates if name in set(words[0]))
    at = [list(candidates).index(name if name != "random" else lead) for name in words[0]]
    y, top = (after - after.mean(1, keepdims=True))[np.arange(len(frame)), at], after.argmax(1) == at
    out = {"prompt": frame["pair_id"], "added": words[0], "dose": words[1].astype(float), "y": y, "top": top}
    out = pd.DataFrame(out).groupby(["prompt", "added", "dose"], as_index=False, sort=False).mean()
    return out.assign(kind=out["prompt"].map(kinds))


def dose_curves(doses: pd.DataFrame, params: Subspace) -> tuple[pd.DataFrame, pd.DataFrame]:
    """By kind of prompt and class added: the mean of `y` at each dose with intervals over prompts, and its slope.

    The slope is that of least squares (logits per dose), its mean over prompts with an interval; `monotone`: the share
    of prompts in which every higher dose gives a higher logit.
    """
    curves, slopes = [], []
    for (kind, added), rows in doses.groupby(["kind", "added"], sort=False):
        wide, about = rows.pivot(index="prompt", columns="dose", values="y"), {"kind": kind, "added": added}
        spans = effects.columns(stats.mean_intervals(wide.to_numpy(), params))
        top = rows.groupby("dose")["top"].mean().to_numpy()
        curves.append(pd.DataFrame({"dose": wide.columns, **spans, "top": top}).assign(**about))
        dose = wide.columns.to_numpy() - wide.columns.to_numpy().mean()
        slope = stats.mean_interval(wide.to_numpy() @ dose / max((dose**2).sum(), 1e-12), params)
        rising = (wide.diff(axis=1).iloc[:, 1:] > 0).all(axis=1).mean()
        ends = {"estimate": slope.estimate, "low": slope.low, "high": slope.high}
        slopes.append(about | {"monotone": rising, "prompts": len(wide)} | ends)
    return pd.concat(curves, ignore_index=True), pd.DataFrame(slopes)


def transfer_table(own: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """Effect of directions fitted on `source` prompts in pairs of each template (`target`), as a share of that of the
    directions fitted on the target's own prompts. `recovery`: of the gap."""
    parts = []
    for target, rows in own.groupby("template", sort=False):
        effect, gap = sums(rows)
        kept = [column for column in effect if (target, column[1]) in effect.columns]
        if not kept:  # too few of its prompts line up to fit directions on
            continue
        at_home = pd.DataFrame({column: effect[target, column[1]] for column in kept}, columns=effect[kept].columns)
        recovery = (effect.sum() / gap.sum()).rename("recovery")
        table = ratios(effect[kept], at_home, params)
        parts.append(table.join(recovery, on=["method", "k"]).assign(target=target, pairs=rows["pair_id"].nunique()))
    return pd.concat(parts, ignore_index=True).rename(columns={"method": "source"})


class Numbers(NamedTuple):
    """What the page says of directions."""

    by_layer: pd.DataFrame
    by_number: pd.DataFrame
    band: pd.DataFrame  # of random subspaces
    against_random: pd.DataFrame
    single_classes: pd.DataFrame
    parts: pd.DataFrame  # inside and outside of what the model's activations span
    doses: pd.DataFrame
    slopes: pd.DataFrame
    transfer: pd.DataFrame
    restores: bool | None  # whether one direction restores the answer
    leads: tuple[int, int]  # pairs in which it puts the clean answer on top, of those that are answered rightly


def numbers(m: Measured, params: Subspace) -> Numbers:
    """Everything that the page says of directions, in numbers."""
    own = last_half(m.patches)
    doses, slopes = dose_curves(dose_table(m.steering, m.kinds, m.pairs[0].candidates), params)
    table = by_number(own, params)
    one = row_of(table, *ONE)
    span = stats.Interval(one["estimate"], one["low"], one["high"], params.level, int(one["quads"]), "")
    patched = own[own["variant"] == "class difference|1|"]
    right = patched[site_tables.answered(patched)]
    return Numbers(
        by_layer=m.by_layer,
        by_number=table,
        band=random_band(own),
        against_random=against_random(own, params),
        single_classes=single_classes(own, m.pairs, params),
        parts=split_parts(own, params),
        doses=doses,
        slopes=slopes,
        transfer=transfer_table(last_half(m.transfer), params),
        restores=site_tables.restores(patched, span, params.restores_share, params.restores_recovery),
        leads=(int((right["metric_after"] > 0).sum()), len(right)),
    )


def row_of(table: pd.DataFrame, method: str, k: int) -> pd.Series:
    """The row of a method and a number of directions."""
    return table[(table["method"] == method) & (table["k"] == k)].iloc[0]


# --- figures ----------------------------------------------------------------------------------------------------------


def lines(
    frame: pd.DataFrame,
    x: str,
    by: str,
    xlabel: str,
    ylabel: str,
    panel: str | None = None,
    band: pd.DataFrame | None = None,
    level: float | None = None,
) -> Figure:
    """A line with whiskers per value of `by` over the numbers `x`; `band` (x, low, high) shaded, `level` dashed."""
    groups = plots.styles_of(frame, by)
    with plots.stacked_panels(frame, panel, 2.9 if panel is None else 2.2) as (figure, panels):
        for axes, part in panels:
            if band is not None:
                ends = band["low"].to_numpy(dtype=float), band["high"].to_numpy(dtype=float)
                axes.fill_between(band[x], *ends, color=plots.GREY, alpha=0.35, lw=0)
            if level is not None:
                axes.axhline(level, color=plots.BLACK, lw=1, ls="--")
            for index, (group, (colour, marker)) in enumerate(groups.items()):
                line = part[part[by] == group].sort_values(x)
                apart = 0.02 * (index - (len(groups) - 1) / 2) if x == "k" else 0.0  # on a logarithmic axis
                at = line[x].to_numpy(dtype=float) * (1 + apart)
                axes.plot(at, line["estimate"], color=colour, lw=1, alpha=0.6)
                plots.draw_points(axes, at, line, colour, marker, label=group)
            plots.zero_line(axes)
        axes.set_xlabel(xlabel)
        plots.shared_ylabel(figure, ylabel)
        plots.add_legend(figure)
    return figure


def number_figure(n: Numbers) -> Figure:
    """Recovery against the number of directions."""
    numbers, ylabel = n.by_number, "recovery (share of the gap)"
    own = numbers[~numbers["method"].str.endswith("the rest") & ~numbers["method"].isin(["whole", "random"])]
    level = float(row_of(numbers, "whole", 0)["estimate"])
    figure = lines(own, "k", "method", "directions", ylabel, band=n.band, level=level)
    figure.axes[0].set_xscale("log", base=2)
    figure.axes[0].set_xticks(sorted(own["k"].unique()), sorted(own["k"].unique()))
    figure.axes[0].minorticks_off()
    return figure


def layer_figure(n: Numbers) -> Figure:
    """Recovery after each of the slice's layers."""
    own = effects.reported(n.by_layer)
    own = own[own["layer"] >= 0]
    return plots.layer_curve(own.assign(what=called(own)), "recovery (share of the gap)", by="what")


def split_figure(n: Numbers) -> Figure:
    """The parts of each change that were split."""
    return plots.part_bars(n.parts, "recovery (share of the gap)", by="shown", panel=None)


def dose_figure(n: Numbers) -> Figure:
    """Dose-response curves, a panel for each kind of prompt."""
    xlabel, ylabel = "dose (multiples of class mean - mean of all classes)", "logit of the class added, less the "
    return lines(n.doses, "dose", "added", xlabel, ylabel + "candidates' mean", panel="kind")


def doses_touched(n: Numbers) -> HTML:
    """`dose_figure` to be read point by point."""
    panels = [
        interactive.Panel(
            own.assign(line=own["added"], x=own["dose"]),
            "dose",
            "logit of the class added, above the candidates' mean",
            "logits",
            kind,
        )
        for kind, own in n.doses.groupby("kind", sort=False)
    ]
    return interactive.curves("fig-subspace-doses", "dose", panels)


def transfer_figure(n: Numbers) -> Figure:
    """Effect of moved directions as a share of the own ones', by source and target."""
    own = n.transfer[n.transfer["source"] != "random"]
    order = {"index": list(dict.fromkeys(own["source"])), "columns": list(dict.fromkeys(own["target"]))}
    wide = {
        f"{k} direction{'s' * (k > 1)}": rows.pivot(index="source", columns="target", values="estimate").reindex(
            **order
        )
        for k, rows in own.groupby("k")
    }
    return plots.class_matrices(wide, "share of own effect", xlabel="patched in", ylabel="fitted on", limit=1)


# --- sentences --------------------------------------------------------------------------------------------------------


def value(row: Any, prefix: str = "", digits: int = 2) -> str:
    """An estimate with its interval, of a row of a table."""
    names = ("share", "share_low", "share_high") if prefix else ("estimate", "low", "high")
    return interval(*(row[name] for name in names), digits)


def layer_sentences(table: pd.DataFrame, layer: int, params: Subspace) -> list[str]:
    """Where along the slice one direction carries the class, and whether it does in the slice as a whole."""
    own = effects.reported(table)
    one, whole = (own[own["method"] == name].set_index("layer") for name in (ONE[0], "whole"))
    each = [(f"{at}", value(row), f"{row['share']:.0%}") for at, row in one.iterrows() if at >= 0]
    first = table[(table["half"] == table["half"].iloc[0]) & (table["method"] == ONE[0])].set_index("layer")["estimate"]
    reached = first[layer] >= params.slice_share
    share = f"{params.slice_share:.0%} on the discovery half"
    why = f"the first where it recovers {share}" if reached else f"where it recovers most: nowhere {share}"
    random = own[(own["layer"] == -1) & (own["method"] == "random")].iloc[0]
    low, high = one.loc[-1, "low"], whole.loc[-1, "high"]
    more = " (more than everything they write: the rest may work against the answer, but was not patched by itself)"
    more = more if pd.notna(low) and low > high else ""
    return [
        "One direction, from the mean of the pair's corrupt class to that of its clean class, was patched in the "
        f"residual stream at `last` alone. What follows is about layer {layer}, {why}.\n\n"
        + tabled(("after layer", "recovers of the gap", "share of the whole residual stream's"), each),
        f"In all sites of the slice together, that component alone recovers {value(one.loc[-1])}, and everything they "
        f"write {value(whole.loc[-1])}{more}. A random direction with a change of equal norm recovers {value(random)}.",
    ]


def number_sentences(n: Numbers, params: Subspace) -> list[str]:
    """Whether one direction suffices, how many reach the share, and whether they beat random ones."""
    numbers, paired = n.by_number, n.against_random
    one, every = row_of(numbers, *ONE), row_of(numbers, "whole", 0)
    verdict = "is tested on too few quads to say whether it suffices"
    verdict = verdict if n.restores is None else "suffices" if n.restores else "is not shown to suffice"
    out = [
        f"For each two supersets one direction, their own, {verdict}: the difference of their means recovers "
        f"{value(one)} of the gap, where the whole residual stream recovers {value(every)}. It puts the clean answer "
        f"on top in {n.leads[0]} of the {n.leads[1]} pairs that are answered rightly. Asked for were a lower end above "
        f"{params.restores_recovery} and {params.restores_share:.0%} of the pairs.{shared(numbers)}"
    ]
    rows = []
    for method in ("class means", "probe", "profession means", "rotation"):
        own = numbers[numbers["method"] == method].sort_values("k")
        if own.empty:
            continue
        enough = own[own["share"] >= params.slice_share]
        if len(enough):
            asked = f"; asked for {listed(own['k'])}" * (method == "rotation")  # it is learned for few numbers
            rows.append((method, f"{enough['k'].iloc[0]}{asked}", value(enough.iloc[0])))
        else:
            rows.append((method, "no number tried", f"at most {value(own.loc[own['estimate'].idxmax()])}"))
    most = numbers.loc[numbers["method"] == "class means", "k"].max()
    out.append(
        f"So many directions shared by all pairs reach {params.slice_share:.0%} of the whole residual stream's "
        f"recovery (the class means span at most {most}):\n\n"
        + tabled(("of the", "directions", "recover of the gap"), rows)
    )
    if paired["low"].isna().any():
        return [*out, "There are too few quads to say whether directions beat random ones of equal norm."]
    beats = paired["low"] > 0
    shown = paired[~paired["method"].str.endswith("the rest")]
    shown = shown.loc[shown.groupby("method", sort=False)["k"].idxmax()]
    named = shown.assign(name=called(shown))
    weak = called(paired[~beats])
    out.append(
        ("Every method beats" if beats.all() else "Directions do not always beat")
        + " random subspaces of as many dimensions whose change has the same norm: paired by quads, they recover more "
        f"by {extremes(named, 'name')} of the gap."
        + ("" if beats.all() else f" Not better than random: {listed(weak)}.")
        + dormant_sentence(n.parts, called(paired[beats]))
    )
    return out


def mostly_dormant(parts: pd.DataFrame) -> pd.DataFrame:
    """The changes of which more than half of the effect is shown to run through the dormant part; that part's rows."""
    outside = parts[parts["part"] == "outside"]
    return outside[outside["share_low"].astype(float) > 0.5]


def dormant_sentence(parts: pd.DataFrame, names: Sequence[str]) -> str:
    """Which of the methods named owe most of it to the dormant part; "" where none is shown to."""
    rows = mostly_dormant(parts)
    does = "the dormant part alone, outside what the model's own activations span, does most of it"
    return "".join(
        f" But for {row['name']}, {does} ({value(row, 'share')}): to that extent it is an illusion."
        for _, row in rows[rows["name"].isin(names)].iterrows()
    )


def shared(numbers: pd.DataFrame) -> str:
    """What one direction that all pairs share recovers, which is another than that of each two classes."""
    one = numbers[(numbers["method"] == "class means") & (numbers["k"] == 1)]
    return "".join(f" One that all pairs share recovers {value(row)} (class means)." for _, row in one.iterrows())


def class_sentence(single: pd.DataFrame, params: Subspace) -> str:
    """The direction of one class against the rest, in pairs with and without the class: does it fix the output?"""
    own, other = single[single["there"]], single[~single["there"]]
    few = f" (fewer than {MINIMUM_CLUSTERS} quads of some: no intervals)" * bool(own["low"].isna().any())
    without = (
        f" In pairs without the class it recovers at most {other['estimate'].abs().max():.2f}, either way (the largest "
        "of several estimates, no interval)."
    ) * bool(len(other))
    text = (
        "The direction of one class against the rest, in pairs with it on a side, recovers "
        f"{extremes(own, 'class_name')} of the gap{few}.{without}"
    )
    if own["low"].isna().any():
        return text
    enough = own.loc[own["low"].astype(float) > params.restores_recovery, "class_name"].tolist()
    return f"{text} The lower end exceeds {params.restores_recovery} for {listed(enough) if enough else 'no class'}."


def split_sentence(parts: pd.DataFrame, directions: pd.DataFrame) -> str:
    """How much runs through the dormant part, and how much the activations vary along each direction."""
    count, outside = (directions["method"] == "component").sum(), parts[parts["part"] == "outside"]
    each = [(row["name"], value(row, "share")) for _, row in outside.iterrows()]
    mostly = mostly_dormant(parts)["name"].tolist()
    verdict = "No change is shown to be mostly dormant"
    if mostly:
        verdict = f"Shown to be mostly dormant, and to that extent an illusion: {listed(mostly)}"
    verdict = "There are too few quads to say which is mostly dormant" if outside["share_low"].isna().all() else verdict
    vary, own = [], directions[directions["method"].isin(["class means", "rotation", "probe"])]
    for (method, k), rows in own.groupby(["method", "k"], sort=False):
        cells = (f"{rows['variance'].median():.0f} times", f"{rows['between'].median():.0%}")
        vary.append((f"{method}, {k or len(rows)}", *cells))
    return (
        f"{verdict}. The dormant part of a change lies outside the span of the {count} principal components that hold "
        "95% of the variance of the model's own activations:\n\n"
        + tabled(("change", "share of its effect that the dormant part has by itself"), each)
        + "\n\nAlong the directions, the activations' variance over that along random ones, and how much of it lies "
        "between classes (medians):\n\n" + tabled(("directions", "variance", "between classes"), vary)
    )


def steering_sentence(n: Numbers) -> str:
    """Dose and response, for each kind of prompt."""
    out, cells, curves = [], [], n.doses
    for kind, rows in n.slopes.groupby("kind", sort=False):
        real, random = rows[rows["added"] != "random"], rows[rows["added"] == "random"].iloc[0]
        own, lead = curves[curves["kind"] == kind], real["added"].iloc[0]
        means = own[own["added"] != "random"].pivot(index="dose", columns="added", values="estimate")
        rising = int((means.diff().iloc[1:] > 0).all().sum())
        ends = own[own["added"] == lead].sort_values("dose")[["dose", "top"]].to_numpy()[[0, -1]]
        cells.append((f"{kind} ({counted(rows['prompts'].iloc[0], 'prompt')})", extremes(real, "added"), value(random)))
        out.append(
            f" With {kind} prompts every dose is higher than the one before on average for {rising} of {len(real)} "
            f"classes. At a dose of {ends[0, 0]:g} the {lead} leads in {ends[0, 1]:.0%} of them, and at a dose of "
            f"{ends[1, 0]:g} in {ends[1, 1]:.0%}."
        )
    columns = ("prompts", "lowest and highest class", "random")
    return (
        "Steering: so many logits does one dose of a class's direction add to the class's logit, less the candidates' "
        f"mean (random: directions as long as the first class's).{''.join(out)}\n\n{tabled(columns, cells)}"
    )


def transfer_sentence(table: pd.DataFrame) -> str:
    """Directions of other prompts, as a share of the own ones'."""
    each = []
    for target, rows in table[table["k"] == 1].groupby("target", sort=False):
        own = rows.loc[rows["source"] == target, "recovery"].iloc[0]
        asked = f"`{target}` ({counted(rows['pairs'].iloc[0], 'pair')}, own recovery {own:.2f})"
        each += [
            (asked, f"`{row['source']}`", value(row))
            for _, row in rows.iterrows()
            if row["source"] not in (target, "random")
        ]
        chance = rows.loc[rows["source"] == "random", "estimate"]
        each += [(asked, "random ones", f"{chance.iloc[0]:.2f}")] if len(chance) else []
    return "Directions fitted on other prompts, one at a time, as a share of what the own one does:\n\n" + tabled(
        ("asked in", "fitted on", "share"), each
    )


def sentences(m: Measured, n: Numbers, params: Subspace) -> tuple[list[str], list[str]]:
    """Everything that the page says of directions, in words; and the headline."""
    own = effects.reported(m.patches)
    about = m.directions[(m.directions["layer"] == m.layer) & (m.directions["method"] == "class means")].iloc[0]
    half = "discovery" if own["half"].iloc[0] != about["half"] else "only"
    first = (
        f"Directions were fitted on {counted(about['prompts'], 'prompt')} of the {half} half and are reported on the "
        f"{own['half'].iloc[0]} half ({counted(own['pair_id'].nunique(), 'pair')} of "
        f"{counted(own['quad_id'].nunique(), 'quad')})."
    )
    number = number_sentences(n, params)
    out = [
        first + ONE_HALF * (half == "only"),
        *layer_sentences(n.by_layer, m.layer, params),
        *number,
        class_sentence(n.single_classes, params),
        split_sentence(n.parts, m.directions),
        steering_sentence(n),
        transfer_sentence(n.transfer),
    ]
    return out, [number[0], number[-1]]


def found(m: Measured, n: Numbers) -> dict[str, Any]:
    """What the findings hold of directions."""
    tables = n._replace(by_layer=effects.reported(n.by_layer))._asdict()
    kept = ("by_layer", "by_number", "against_random", "single_classes", "parts", "slopes", "transfer")
    about = {"layer": m.layer, "restores": n.restores, "leads": n.leads}
    return about | {name: tables[name].to_dict("records") for name in kept}
