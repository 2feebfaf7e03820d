"""Step 04, measured: is the slice about supersets? Its sites, patched in pairs whose names differ in something else.

1. `TABLE`: the slice, its heads, its MLPs, each leading site alone, and the whole residual stream behind the last layer
   (all there is to move), clean into corrupt, in the task's pairs and in the placebo pairs; the slice, corrupt into
   clean, as well. A row keeps the logits of every attribute's answers, whichever its pair is about.
2. `specificity` compares the shares of the two gaps, and how far the patches move the other answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lib import effects, stats, tasks
from lib.effects import reported
from lib.hooks import Site, site_name
from lib.questions import SUPERSET
from lib.tasks import Pair
from pipeline.assumed import Case, of_sweep
from pipeline.declaration import EFFECTS, Table
from pipeline.params import Shared
from pipeline.step import Step
from pipeline.units import Unit, subsample, sweep_units

TASK = SUPERSET
SLICE, WHOLE = "the slice", "all there is"


def pairs_of(step: Step | Case) -> dict[str, list[Pair]]:
    """The pairs by the attribute in which their names differ: the task's own, and the placebo's."""
    own: dict[str, list[Pair]] = {TASK: subsample(step.prompts(), step.params.pairs)}
    for attribute, classes in step.params.topic.answers.items():
        placebo = [pair for pair in step.placebo() if pair.candidates == tuple(classes)]
        if placebo:
            own[attribute] = subsample(placebo, step.params.placebo_pairs)
    return own


def site_sets(order: Sequence[Site], size: int, last: int) -> dict[str, tuple[Site, ...]]:
    """What is patched together, by name: the first `size` sites of an order, all there is, the slice's heads and its
    MLPs where it has both, and each site of the order alone."""
    own = tuple(order[:size])
    sets = {SLICE: own, WHOLE: (Site(last, "resid", -1),)}
    heads, mlps = (tuple(site for site in own if site.component == kind) for kind in ("head", "mlp"))
    sets |= {"its heads": heads, "its MLPs": mlps} if heads and mlps else {}
    sets |= {site_name(site.layer, site.component, site.head): (site,) for site in order}
    return sets


def units(step: Step | Case, order: Sequence[Site], size: int) -> list[Unit]:
    """Every set of sites, clean into corrupt, and the slice, corrupt into clean; the table's `site_set` counts them."""
    sets, out = [*site_sets(order, size, step.n_layers - 1).values()], []
    for attribute, pairs in pairs_of(step).items():
        for direction, own in (("denoise", sets), ("noise", sets[:1])):
            out += sweep_units(f"{attribute}-{direction}", pairs, direction=direction, role="last", site_sets=own)
    return out


def swept(step: Step, *chosen: Any) -> Callable[[Unit], pd.DataFrame]:
    """A sweep whose rows say which attribute their pair is about, and have the answers of all of them."""
    sweep, topic = step.sweeper(step.prompts()), step.params.topic

    def compute(unit: Unit) -> pd.DataFrame:
        frame = sweep(unit)
        found = frame.attrs.pop("facts")
        own = next(name for name, classes in topic.answers.items() if [*classes] == found["candidates"])
        named = answers_of(frame, own, found["labels"], topic.find(unit.pairs[0].template, unit.pairs[0].task))
        wanted = (*EFFECTS, "metric_before", "metric_after", "site_set", "kl_after")
        kept = [name for name in frame.columns if name in wanted]
        return frame[kept].assign(attribute=own, **named)

    return compute


def answers_of(frame: pd.DataFrame, attribute: str, labels: Sequence[str], template: tasks.Template) -> dict[str, list]:
    """`answers_before` and `answers_after`: the logits of every attribute's answers, one attribute after the other; NaN
    where an answer is not a single token."""
    words = {name: [word.strip() for word in tasks.answers(template, name)] for name in template.question.answers}
    there = [*words[attribute], *labels]
    places = [there.index(word) if word in there else -1 for own in words.values() for word in own]
    out = {}
    for when in ("before", "after"):
        logits = np.hstack([np.stack(frame[f"{kind}_{when}"]) for kind in ("logits", "label_logits")])
        logits = np.hstack([logits, np.full((len(logits), 1), np.nan)])
        out[f"answers_{when}"] = list(logits[:, places].astype(np.float32))
    return out


TABLE = Table("placebo", units, swept, of_sweep, schema=None)


# --- what is compared ---


class Specificity(NamedTuple):
    """The slice, and its sites, in the task's pairs and in those of a placebo; confirmation half."""

    joint: pd.DataFrame  # the slice: a row per attribute, choice of placebo pairs and direction
    parts: pd.DataFrame  # its heads, its MLPs, and each site alone: a row per attribute and set, with its verdict
    classes: pd.DataFrame  # the slice, by the superset of the four people (`shared`)
    moved: pd.DataFrame  # how far the slice moves each attribute's answers, and the whole vocabulary


def specificity(frame: pd.DataFrame, quads: pd.DataFrame, sets: Sequence[str], params: Shared) -> Specificity:
    """Everything that is said of the placebo. `quads` says of each placebo quad (its index) whether it was `kept` and
    which superset its people `shared`; `sets` names the sets of sites in the table's order."""
    frame = frame.assign(site=np.array(sets)[frame["site_set"]])
    own = reported(frame[frame["attribute"] == TASK])
    joint, parts, classes, moved = [], [], [], [movement(own, params)]
    for attribute in (name for name in params.topic.answers if name != TASK):
        every = frame[(frame["attribute"] == attribute) & (frame["half"] == own["half"].iloc[0])]
        good = every[every["quad_id"].map(quads["kept"]).astype(bool)]
        if good.empty:
            continue
        joint += [
            shares(own, rows, direction, params).assign(attribute=attribute, choice=choice)
            for choice, rows in (("kept", good), ("all", every))
            if effects.gap(rows).sum() > 0  # of a model that knows nothing of the attribute, all quads' may not be
            for direction in ("denoise", "noise")
        ]
        single = (rows[~rows["site"].isin([SLICE, WHOLE])] for rows in (own, good))
        table = effects.specific(*single, ["site"], params, params.specific_ratio)
        parts.append(table.sort_values("site", key=lambda names: names.map([*sets].index)).assign(attribute=attribute))
        alone = good[(good["site"] == SLICE) & (good["direction"] == "denoise")]
        for shared, rows in alone.groupby(alone["quad_id"].map(quads["shared"])):
            classes.append(effects.curve(rows, params, []).assign(attribute=attribute, shared=shared))
        moved.append(movement(good, params))
    tables = (pd.concat(rows, ignore_index=True) if rows else pd.DataFrame() for rows in (joint, parts, classes, moved))
    return Specificity(*tables)


def shares(own: pd.DataFrame, placebo: pd.DataFrame, direction: str, params: Shared) -> pd.DataFrame:
    """The slice's shares of the two gaps; of one set, the verdict is its own interval's."""
    sets = (rows[(rows["site"] == SLICE) & (rows["direction"] == direction)] for rows in (own, placebo))
    table = effects.specific(*sets, [], params, params.specific_ratio)
    ends = table["quotient_low"].iloc[0], table["quotient_high"].iloc[0]
    return table.assign(direction=direction, verdict=effects.specific_or_general(*ends, params.specific_ratio))


def movement(frame: pd.DataFrame, params: Shared) -> pd.DataFrame:
    """How far the slice, and all there is, move each attribute's answers against each other (root mean square of their
    centred changes, logits), and the whole vocabulary (KL, nats); means over quads of pairs about one attribute."""
    own = frame[(frame["direction"] == "denoise") & frame["site"].isin([SLICE, WHOLE])]
    change = np.stack(own["answers_after"]) - np.stack(own["answers_before"])
    ends = np.cumsum([0, *map(len, params.topic.answers.values())])
    values = {"whole vocabulary": own["kl_after"].to_numpy()}
    for name, low, high in zip(params.topic.answers, ends, ends[1:], strict=False):
        values[name] = change[:, low:high].std(axis=1)
    rows = []
    for words, value in values.items():
        if not np.isfinite(value).all():
            continue
        each = effects.quad_matrix(own.assign(value=value), "value", ["site"])
        spans = dict(zip(each.sites["site"], stats.mean_intervals(each.values, params), strict=True))
        numbers = effects.columns([spans[SLICE]]) | effects.columns([spans[WHOLE]], "whole_")
        rows.append(pd.DataFrame(numbers).assign(words=words, quads=len(each.quads)))
    return pd.concat(rows, ignore_index=True).assign(attribute=own["attribute"].iloc[0])
