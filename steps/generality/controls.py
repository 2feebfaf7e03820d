"""Negative controls: prompts in which the slice should find nothing, or half, under ablation of the slice.

1. `control_prompts` draws them, each of the token counts of some ordinary prompts.
2. `named_sets` are what is ablated in them and in ordinary prompts: the slice, its heads, random heads.
3. Each mean is over ordinary prompts, every superset counting alike: free of any class. (With the corrupt prompt's
   activations, two prompts without a class would be exchanged, and the mean change would be nothing whatever the sites
   do.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING

import pandas as pd

from lib import batches, tasks
from lib.hooks import Site
from lib.tasks import Pair
from pipeline.population import add_tokens, controls_of, people_of
from pipeline.step import Step
from pipeline.units import Unit, sweep_units, without_labels
from steps.generality.grid import pair_options, prompt_options
from steps.generality.placebo import RANDOM

if TYPE_CHECKING:
    from pipeline.assumed import Case

ABLATIONS = ("mean", "zero")  # the first one decides
LISTED = {"invented names": "invented", "things": "thing"}  # controls and their kind in the question's list


def poolable(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs whose group has another quad, so that a mean can be taken in it."""
    return batches.with_donors(pairs, pairs, "mean")


def control_prompts(step: Step, ordinary: Sequence[Pair], table: pd.DataFrame) -> tuple[pd.DataFrame, list[Pair]]:
    """The prompts of the controls that need other names than the ordinary ones: a row each, and pairs to sweep.

    Each prompt lines up with some of the `ordinary` pairs (rows of `table`), whose means it gets, in the proportions in
    which these come; a control uses no name twice. Columns: control, pair_id, quad_id, classes (the supersets of its
    names, comma-separated, "" if it has none), name_a, name_b. Only the clean side of the pairs means anything.
    """
    p, rng = step.params, step.rng("controls")
    template = tasks.find_template(table["template"].iloc[0], p.task, question=p.question)
    shapes = [tuple(len(pair.clean.roles[f"name_{slot}"]) for slot in "ab") for pair in ordinary]
    drawn = []  # control, name_a, name_b, classes, quad_id ("": a quad of its own), shape
    for control, names in name_lists(step).items():
        counted = add_tokens(names, step.tokenizer, template, **prompt_options(p)).sample(frac=1, random_state=rng)
        wanted = [shapes[index] for index in rng.permutation(len(shapes))]
        drawn += [(control, *names, "", shape) for *names, shape in matched(counted, wanted, p.control_prompts)]
    known = table.set_index("pair_id").loc[[pair.pair_id for pair in ordinary]].assign(shape=shapes)
    for index, row in enumerate(known.groupby("quad_id", sort=False).head(1).head(p.control_prompts).itertuples()):
        sides = [("clean", row.answer), ("corrupt", row.corrupt_answer)][:: -1 if index % 2 else 1]
        names = [getattr(row, f"{side}_{slot}") for (side, _), slot in zip(sides, "ab", strict=True)]
        drawn.append(("mixed", *names, ",".join(superset for _, superset in sides), row.quad_id, row.shape))
    groups, rows, pairs = {batches.group_of(pair) for pair in ordinary}, [], []
    for number, (control, name_a, name_b, classes, quad, shape) in enumerate(drawn):
        other = known[(known["shape"] == shape) & (known["quad_id"] != quad)].iloc[0]
        row = {"control": control, "pair_id": f"control{number:03d}", "quad_id": quad or f"control{number:03d}"}
        row |= {"classes": classes, "name_a": name_a, "name_b": name_b}
        prompt = row | {"clean_a": name_a, "clean_b": name_b}
        prompt |= {key: other[key] for key in ("half", "task", "template", "answer", "corrupt_answer")}
        prompt |= {"corrupt_a": other["clean_a"], "corrupt_b": other["clean_b"]}
        pair = tasks.make_pair(step.tokenizer, prompt, **pair_options(p))
        if batches.group_of(pair) in groups:
            rows.append(row)
            pairs.append(pair)
    return pd.DataFrame(rows), without_labels(pairs)


def name_lists(step: Step) -> dict[str, pd.DataFrame]:
    """The names of the controls that are drawn from lists; only names of one `key` are put together."""
    p = step.params
    people = people_of(step)
    people = people[people["two_supersets"]]
    both = [
        ",".join(sorted(pair, key=p.topic.supersets.index))
        for pair in people[["superset", "second_superset"]].to_numpy()
    ]
    names = controls_of(step).assign(key="")
    lists = {control: names[names["kind"] == kind] for control, kind in LISTED.items()}
    return {"two supersets": people.assign(key=both), **lists}


def matched(names: pd.DataFrame, shapes: Sequence[tuple[int, ...]], count: int) -> Iterator[tuple]:
    """Up to `count` of (name, name, key, shape): names of one key, none used twice, with a shape's token counts."""
    free = list(names[["name", "key", "n_tokens"]].itertuples(index=False))
    for shape in islice(cycle(shapes), 3 * max(count, len(shapes))):
        firsts, seconds = ([name for name in free if name.n_tokens[slot] == shape[slot]] for slot in (0, 1))
        pair = next(((a, b) for a in firsts for b in seconds if a is not b and a.key == b.key), None)
        if pair:
            free = [name for name in free if name not in pair]
            yield pair[0].name, pair[1].name, pair[0].key, shape
            count -= 1
        if not count:
            return


def random_heads(step: Step | Case, sites: Sequence[Site]) -> list[tuple[Site, ...]]:
    """Sets of heads outside the slice, as many in each layer as the slice has there, where the layer has that many; no
    sets where the slice has no heads."""
    rng, heads, out = step.rng("random heads"), [site for site in sites if site.component == "head"], []
    for _ in range(step.params.random_sets):
        chosen = []
        for layer, count in sorted(Counter(site.layer for site in heads).items()):
            free = [Site(layer, "head", head) for head in range(step.n_heads)]
            free = [site for site in free if site not in sites]
            chosen += [free[index] for index in rng.permutation(len(free))[:count]]
        out += [tuple(sorted(chosen))] * bool(chosen)
    return out


def random_mlps(step: Step | Case, sites: Sequence[Site]) -> list[tuple[Site, ...]]:
    """Sets of MLPs outside the slice, as many as the slice has, of the layers from its first MLP on, where as much has
    come to the last token; where those are too few, of the nearest before as well. No sets where it has no MLPs, or
    where only one could be drawn."""
    own = [site.layer for site in sites if site.component == "mlp"]
    rng, others = step.rng("random MLPs"), [layer for layer in range(step.n_layers) if layer not in own]
    if not own or len(others) <= len(own):
        return []
    later = sum(layer > min(own) for layer in others)
    free = sorted(others, key=lambda layer: max(0, min(own) - layer))[: max(later, len(own) + 1)]
    drawn = (sorted(rng.permutation(free)[: len(own)].tolist()) for _ in range(step.params.random_sets))
    return [tuple(Site(layer, "mlp") for layer in layers) for layers in drawn]


def random_sets(step: Step | Case, sites: Sequence[Site]) -> dict[str, list[tuple[Site, ...]]]:
    """What the slice is held against, by name: random heads where it has heads; where it has MLPs, random sites of all
    its kinds."""
    heads, mlps = random_heads(step, sites), random_mlps(step, sites)
    both = [(*one, *other) for one, other in zip(heads, mlps, strict=False)]
    sets = dict(zip(RANDOM, (heads, [] if heads else mlps, both), strict=True))
    return {name: own for name, own in sets.items() if own}


def named_sets(step: Step | Case, sites: Sequence[Site]) -> list[tuple[str, list[Site]]]:
    """What is ablated: the "slice"; its "heads" if it has any; the "random" sets."""
    heads = [site for site in sites if site.component == "head"]
    random = [("random", list(own)) for own in random_heads(step, sites)]
    return [("slice", list(sites)), *[("heads", heads)] * bool(heads), *random]


def units(step: Step, sets: Sequence[tuple], ordinary: Sequence[Pair], others: Sequence[Pair]) -> list[Unit]:
    """Every set ablated at `last` in ordinary and in control prompts, by `mean` and by `zero`."""
    options = {"direction": "noise", "role": "last", "ablations": list(ABLATIONS), "site_sets": [s for _, s in sets]}
    return sweep_units("controls", [*without_labels(ordinary), *others], ordinary, **options)


def compute(
    step: Step, sets: Sequence[tuple], ordinary: Sequence[Pair], others: Sequence[Pair]
) -> Callable[[Unit], pd.DataFrame]:
    """Every candidate's logit before and after.

    Columns: pair_id, quad_id, ablation, number of the set, `before` and `after`, lists over the candidates.
    """
    sweeper = step.sweeper(without_labels(ordinary))
    renamed = {"logits_before": "before", "logits_after": "after", "site_set": "number"}

    def run(unit: Unit) -> pd.DataFrame:
        frame = sweeper(unit)
        kept = frame[["pair_id", "quad_id", "ablation", *renamed]].rename(columns=renamed)
        kept.attrs = frame.attrs
        return kept

    return run
