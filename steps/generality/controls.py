"""Prompts beside the grid: negative controls under ablation of the slice, and the rule's prompts of two known people.

1. `control_prompts` draws prompts in which the slice should find nothing, or half; `ablated` takes it out there.
2. `rule_rows` asks about two known people: the logit of a class against how many of the two are in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice, permutations

import numpy as np
import pandas as pd
from jaxtyping import Float

from lib import batches, data, models, tasks
from lib.hooks import Site
from lib.tasks import SUPERSETS, Pair
from pipeline.params import ROOT
from pipeline.step import Step
from pipeline.units import Unit, sweep_units
from steps.generality.measure import prompt_options

ABLATIONS = ("mean", "zero")  # the first one decides
LISTED = {"invented names": "invented", "things": "thing"}  # controls and their kind in data/controls.csv


def poolable(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs whose group has another quad, so that a mean can be taken in it."""
    return [pair for pair in pairs if batches.has_donors(pair, pairs)]


def control_prompts(step: Step, ordinary: Sequence[Pair], table: pd.DataFrame) -> tuple[pd.DataFrame, list[Pair]]:
    """The prompts of the controls that need other names than the ordinary ones: a row each, and pairs to sweep.

    Each prompt lines up with some of the `ordinary` pairs (rows of `table`), whose means it gets, in the proportions in
    which these come; a control uses no name twice. Columns: control, pair_id, quad_id, classes (the supersets of its
    names, comma-separated, "" if it has none), name_a, name_b. Only the clean side of the pairs means anything.
    """
    p, rng = step.params, step.rng("controls")
    template = tasks.find_template(table["template"].iloc[0], p.task)
    shapes = [tuple(len(pair.clean.roles[f"name_{slot}"]) for slot in "ab") for pair in ordinary]
    drawn = []  # control, name_a, name_b, classes, quad_id ("": a quad of its own), shape
    for control, names in name_lists(step).items():
        counted = data.add_tokens(names, step.tokenizer, template, **prompt_options(p)).sample(frac=1, random_state=rng)
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
        pair = tasks.make_pair(step.tokenizer, prompt, **prompt_options(p))
        if batches.group_of(pair) in groups:
            rows.append(row)
            pairs.append(replace(pair, labels=(), label_tokens=()))
    return pd.DataFrame(rows), pairs


def name_lists(step: Step) -> dict[str, pd.DataFrame]:
    """The names of the controls that are drawn from lists; only names of one `key` are put together."""
    people = data.load_people(step.people_file)
    people = people[people["two_supersets"]]
    both = [",".join(sorted(pair, key=SUPERSETS.index)) for pair in people[["superset", "second_superset"]].to_numpy()]
    names = pd.read_csv(ROOT / "data" / "controls.csv", dtype=str).assign(key="")
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


def random_heads(step: Step, sites: Sequence[Site]) -> list[list[Site]]:
    """Sets of heads outside the slice: as many in each layer as the slice has there, where the layer has that many."""
    rng, layers = step.rng("random heads"), Counter(site.layer for site in sites if site.component == "head")
    sets = []
    for _ in range(step.params.random_sets if layers else 0):
        chosen = []
        for layer, count in sorted(layers.items()):
            free = [Site(layer, "head", head) for head in range(step.n_heads)]
            free = [site for site in free if site not in sites]
            chosen += [free[index] for index in rng.permutation(len(free))[:count]]
        sets.append(sorted(chosen))
    return [own for own in sets if own]


def ablated(step: Step, sites: Sequence[Site], ordinary: Sequence[Pair], others: Sequence[Pair]) -> pd.DataFrame:
    """Every candidate's logit before and after sets of sites are ablated at `last`, by `mean` and by `zero`.

    Each mean is over ordinary prompts, every superset counting alike: free of any class. (With the corrupt prompt's
    activations, two prompts without a class would be exchanged, and the mean change would be nothing whatever the sites
    do.) Columns: pair_id, quad_id, ablation, set ("slice", "heads" of the slice, "random"), number of the random set,
    `before` and `after`, lists over the candidates.
    """
    heads = [site for site in sites if site.component == "head"]
    named = [("slice", list(sites))] + [("heads", heads)] * bool(heads)
    named += [("random", own) for own in random_heads(step, sites)]
    ordinary = [replace(pair, labels=(), label_tokens=()) for pair in ordinary]
    options = {"direction": "noise", "role": "last", "ablations": list(ABLATIONS), "site_sets": [s for _, s in named]}
    plan = sweep_units("controls", [*ordinary, *others], **options)
    sweeper = step.sweeper(ordinary)
    renamed = {"logits_before": "before", "logits_after": "after", "site_set": "number"}

    def compute(unit: Unit) -> pd.DataFrame:
        frame = sweeper(unit)
        kept = frame[["pair_id", "quad_id", "ablation", *renamed]].rename(columns=renamed)
        kept.attrs = frame.attrs
        return kept

    frame = step.table("controls", plan, compute, schema=None)
    return frame.assign(set=np.array([name for name, _ in named])[frame["number"]])


def rule_rows(step: Step) -> pd.DataFrame:
    """Prompts of two known people, a row per class: what `rule.compare` reads."""
    return step.table("rule", [Unit("rule")], lambda _: two_known_people(step), schema=None)


def two_known_people(step: Step) -> pd.DataFrame:
    """Logits of every class (`y`, less the mean of the classes of neither name) in prompts of two people, each asked
    about once: two of one superset and two of different ones in turn, every combination and order alike.

    Known is who the model gives the own superset when asked alone, as in step 01. `evidence_a` and `evidence_b` are
    what the name alone says of the class (logits): less its mean over the person's other classes, and less the mean of
    that over people outside the class, so that a name that says nothing of a class has 0.
    """
    p, model, rng = step.params, step.model, step.rng("rule")
    template, options = tasks.find_template(p.template, p.task), prompt_options(p)
    people = data.load_people(step.people_file)
    people = data.add_tokens(people[~people["two_supersets"]], model.tokenizer, template, **options)
    each = -(-4 * p.rule_prompts // people["superset"].nunique())  # twice as many as are needed: not all are known
    asked = people.sample(frac=1, random_state=rng).groupby("superset").head(each)
    alone: list[np.ndarray] = []
    one_name = tasks.candidates(model.tokenizer, tasks.TEMPLATES["profession_is"])[1]

    def score(prompts: list[tuple[int, ...]]) -> np.ndarray:
        logits = models.next_logits(model, prompts)
        alone.append(logits[:, one_name].astype(float))
        return logits

    asked = data.add_fame(asked, model.tokenizer, score, chat_template=p.chat_template)
    asked = asked.assign(evidence=list(evidence(np.concatenate(alone), asked["superset"])))
    free = {name: list(group.itertuples()) for name, group in asked[asked["known"]].groupby("superset")}
    turns = zip(cycle([(name, name) for name in free]), cycle(permutations(free, 2)))
    drawn = []
    for own in islice((both for turn in turns for both in turn), p.rule_prompts):
        if all(len(free[name]) >= own.count(name) for name in own):
            drawn.append([free[name].pop() for name in own])
    prompts = [tasks.make_prompt(model.tokenizer, template, [a.name for a in two], **options).ids for two in drawn]
    words, tokens = tasks.candidates(model.tokenizer, template)
    logits = np.concatenate(
        [models.next_logits(model, prompts[at : at + 64])[:, tokens] for at in range(0, len(prompts), 64)]
    )
    rows = []
    for number, ((a, b), own) in enumerate(zip(drawn, logits.astype(float), strict=True)):
        base = np.mean([value for word, value in zip(words, own, strict=True) if word not in (a.superset, b.superset)])
        for index, word in enumerate(words):
            row = {"prompt": f"rule{number:03d}", "name_a": a.name, "name_b": b.name, "superset_class": word}
            row |= {"y": own[index] - base, "n_a": int(a.superset == word), "n_b": int(b.superset == word)}
            rows.append(row | {"evidence_a": a.evidence[index], "evidence_b": b.evidence[index]})
    return pd.DataFrame(rows)


def evidence(
    logits: Float[np.ndarray, "people classes"], supersets: Sequence[str]
) -> Float[np.ndarray, "people classes"]:
    """What each name alone says of each class, 0 on average for people outside it."""
    outside = np.asarray(supersets)[:, None] != np.asarray(SUPERSETS)
    centred = logits - (logits * outside).sum(1, keepdims=True) / outside.sum(1, keepdims=True)
    return centred - (centred * outside).sum(0) / np.maximum(outside.sum(0), 1)
