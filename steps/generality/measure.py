"""What generality is tested on: the dense grid of pairs, and circuits grown class by class.

1. `build` lines up the pairs of the grid: those of confirmation quads, in the profile's template and in others.
2. `swept` replaces sites in every pair of it, both ways. A pair's mirror has the same two prompts the other way round,
   so its noise run *is* the pair's denoise run: where both are in the grid, one run says what is necessary and what is
   sufficient.
3. `grown` replaces the growing sets of circuits that are picked on part of the discovery pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from lib import batches, data, models, records, sweep, tasks
from lib.data import HALVES, pairs_of
from lib.hooks import Site
from lib.tasks import Pair
from pipeline.params import OfSlice, Share, Words
from pipeline.step import Ability, Step, StepError
from pipeline.units import Unit, sweep_units


class Generality(OfSlice):
    """07: the dense grid, class by class; templates never used for picking; the rule; negative controls."""

    pairs: int | None = Field(None, ge=1, description="most pairs of a template; default all")
    templates: Words = Field(
        ("profession_both", "both_famous", "common_both"), description="templates of the grid; the profile's own leads"
    )
    pairs_per_quad: int = Field(4, ge=1, le=4, description="pairs taken from a confirmation quad, own template")
    template_pairs: int = Field(2, ge=1, le=4, description="pairs taken from a confirmation quad, other templates")
    rule_prompts: int = Field(400, ge=1, description="prompts of two random people from which the rule is read")
    control_prompts: int = Field(60, ge=1, description="prompts of each negative control")
    random_sets: int = Field(5, ge=1, description="sets of random heads ablated")
    silence_margin: Share = Field(
        0.2, description="a control is silent if no candidate moves by this share of the ordinary effect"
    )
    general_floor: Share = Field(0.5, description="what joint recovery and damage must exceed in every class")


SITE = ["layer", "component", "head"]
LOGIT_DIFFS = ["logit_diff_before", "logit_diff_after", "logit_diff_clean", "logit_diff_corrupt"]
WORDS = ["profile", "task", "template", "pair_id", "quad_id", "half", "direction", "ablation", "position"]
COLUMNS = [*SITE, *WORDS, *LOGIT_DIFFS]  # what is read of a sweep; the rows of mirrored pairs have no others
WITH_MARGINS = [*COLUMNS, "metric_before", "metric_after"]
# The pairs of a quad, each followed by its mirror; every second quad begins with the other order of its names.
TURNS = ((0, 2, 1, 3), (1, 3, 0, 2))


def able(step: Step) -> Ability:
    """Whether there is something to generalise over: answers that are supersets, which the model can give."""
    if step.params.task not in ("superset", "bi_association"):
        return Ability(False, f"this step asks about supersets, and the answers of `{step.params.task}` are none")
    return step.able()


def prompt_options(params: Generality) -> dict[str, Any]:
    """How prompts are made: the arguments that `lib.data` and `lib.tasks` share."""
    return {"chat_template": params.chat_template, "attributes": params.attributes}


# --- the grid -----------------------------------------------------------------------------------------------------


def build(step: Step, quads: pd.DataFrame | None) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """The pairs of the grid, and for each template how many could be made, line up, were asked and are left.

    `quads` are those of step 01, None where there are none: then the step's pairs are taken.
    """
    table = step.table("grid", [Unit("grid")], lambda _: solved_pairs(step, candidates(step, quads)), schema=None)
    return table, records.read_metadata(step.path("grid"))["templates"]


def candidates(step: Step, quads: pd.DataFrame | None) -> pd.DataFrame:
    """Every pair that could be in the grid: four of each confirmation quad; without quads, the pairs there are.

    `order` is "better known first" or "better known second", by the mean fame of the two names in each slot; "" where
    fame is not known. Professions that are not in the pairs come from the table of people, "" if it has none.
    """
    if quads is None:
        pairs, people = last_half(step.pairs()), data.load_people(step.people_file).set_index("name")["profession"]
        own = {f"clean_profession_{slot}": pairs[f"clean_{slot}"].map(people).fillna("") for slot in "ab"}
        return pairs.assign(**{name: pairs.get(name, column) for name, column in own.items()}, order="")
    quads = last_half(quads)
    fame = {quad[slot]: quad[f"fame_{slot}"] for quad in quads.to_dict("records") for slot in "abcd"}
    pairs = pairs_of(quads, 4)
    first, second = (pairs[f"clean_{slot}"].map(fame) + pairs[f"corrupt_{slot}"].map(fame) for slot in "ab")
    pairs["order"] = np.where(first > second, "better known first", "better known second")
    number = pairs.groupby("quad_id").cumcount()
    quad = pd.factorize(pairs["quad_id"])[0]
    turn = [TURNS[q % 2].index(n) for q, n in zip(quad, number, strict=True)]
    return pairs.iloc[np.lexsort((turn, quad))].reset_index(drop=True)


def last_half(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the confirmation half; all of them if they form one half."""
    own = table[table["half"] == HALVES[1]]
    return (own if len(own) else table).reset_index(drop=True)


def solved_pairs(step: Step, source: pd.DataFrame) -> pd.DataFrame:
    """The pairs of `source` that line up and that the model solves, template by template, with the counts in `attrs`.

    Pairs of a `pairs_file` are taken as they are in their own template. StepError when nothing is left anywhere.
    """
    p, words = step.params, step.model.tokenizer
    kept, counts = [], []
    for name in dict.fromkeys([p.template, *p.templates]):
        template, own = tasks.find_template(name, p.task), name == p.template
        rows = source if own else source.assign(pair_id=source["pair_id"] + f"@{name}", template=name)
        rows, why = data.aligned(rows.assign(task=template.task), words, **prompt_options(p))
        each = 4 if p.pairs_file else p.pairs_per_quad if own else p.template_pairs
        asked = rows.groupby("quad_id").head(each)
        left = asked
        if len(asked) and not (own and p.pairs_file):
            score = lambda prompts: models.next_logits(step.model, prompts)  # noqa: E731
            scored = data.add_margins(asked, words, score, **prompt_options(p))
            left = scored[(scored["metric_clean"] > 0) & (scored["metric_corrupt"] < 0)]
        left = pd.DataFrame(batches.subsample(list(left.itertuples(index=False)), p.pairs), columns=left.columns)
        kept.append(left)
        counts.append(
            {"template": name, "possible": len(source), "aligned": len(rows), "asked": len(asked), "left": len(left)}
            | {"quads": left["quad_id"].nunique(), "why": why[0] if why else ""}
        )
    grid = pd.concat(kept, ignore_index=True)
    if grid.empty:
        raise StepError(f"no pairs are left for the grid: {counts}")
    grid.attrs["facts"] = {"templates": counts}
    return grid


def mirrors(pairs: Iterable[Pair]) -> dict[str, str]:
    """For each pair that has one, its mirror: the same two prompts, clean and corrupt exchanged."""
    pairs = list(pairs)
    own = {(pair.template, pair.clean.ids, pair.corrupt.ids, pair.answer, pair.corrupt_answer): pair for pair in pairs}
    out = {}
    for pair in pairs:
        key = (pair.template, pair.corrupt.ids, pair.clean.ids, pair.corrupt_answer, pair.answer)
        if key in own:
            out[pair.pair_id] = own[key].pair_id
    return out


def with_mirrors(frame: pd.DataFrame, mirror: Mapping[str, str]) -> pd.DataFrame:
    """`frame` and the denoise rows that its counterfactual noise rows are, read as their mirror's.

    Noise in a pair puts its corrupt activation into its clean prompt: its mirror's clean activation into its mirror's
    corrupt prompt. The logit difference changes sign, and clean and corrupt change places.
    """
    noise = frame[(frame["direction"] == "noise") & frame["pair_id"].isin(mirror)]
    turned = {
        name: -noise[name.replace("clean", "x").replace("corrupt", "clean").replace("x", "corrupt")]
        for name in LOGIT_DIFFS
    }
    same = noise.assign(pair_id=noise["pair_id"].map(mirror), direction="denoise", ablation="clean", **turned)
    return pd.concat([frame, same], ignore_index=True)


def swept(step: Step, name: str, pairs: Sequence[Pair], **options: Any) -> pd.DataFrame:
    """A sweep at `last` in both directions; the denoise runs of pairs whose mirror is there are not run again."""
    pairs = [replace(pair, labels=(), label_tokens=()) for pair in pairs]  # other words' logits are not read here
    mirror = mirrors(pairs)
    alone = [pair for pair in pairs if pair.pair_id not in mirror]
    plan = sweep_units("noise", pairs, direction="noise", role="last", **options)
    plan += sweep_units("denoise", alone, direction="denoise", role="last", **options)
    sets = "site_sets" in options
    schema, columns = (records.SET_SCHEMA, [*COLUMNS, "site_set"]) if sets else (records.SCHEMA, COLUMNS)
    frame = step.table(name, plan, step.sweeper(pairs), schema=schema, columns=columns)
    return with_mirrors(frame, mirror)


# --- circuits, class by class -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Circuit:
    """Heads and MLPs in order of recovery on some of the discovery pairs, and how many of them make the circuit."""

    kind: str  # "without" a superset: no pair has it; "only": it is the answer of every pair
    superset: str
    pairs: tuple[str, ...]
    order: tuple[Site, ...]
    size: int = 0  # 0: no sites, or too little to choose by
    reached: bool = False  # whether joint recovery and damage reach the critical slice's share

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.order[: self.size]

    @property
    def growing(self) -> list[frozenset[Site]]:
        """Its first site, its first two, ..."""
        return [frozenset(self.order[: size + 1]) for size in range(len(self.order))]


def numbered_sets(circuits: Sequence[Circuit]) -> dict[frozenset[Site], int]:
    """Every growing set of the circuits, with its place in the list of all."""
    return {sites: number for number, sites in enumerate(dict.fromkeys(s for c in circuits for s in c.growing))}


def grown(step: Step, circuits: Sequence[Circuit]) -> pd.DataFrame:
    """The circuits' growing sets replaced in the pairs they were ordered by; `site_set` as in `numbered_sets`.

    A set that several circuits share is run once on a pair. No rows where there are no sets.
    """
    number, table = numbered_sets(circuits), step.pairs()
    wanted: dict[str, set[int]] = {}
    for circuit in circuits:
        for pair_id in circuit.pairs:
            wanted.setdefault(pair_id, set()).update(number[sites] for sites in circuit.growing)
    used = table[table["pair_id"].isin([pair_id for pair_id, sets in wanted.items() if sets])]
    if used.empty:
        return pd.DataFrame(columns=[*WITH_MARGINS, "site_set"])
    prompts = [replace(pair, labels=(), label_tokens=()) for pair in step.prompts(used)]
    groups: dict[tuple[int, ...], list[Pair]] = {}
    for pair in prompts:
        groups.setdefault(tuple(sorted(wanted[pair.pair_id])), []).append(pair)
    listed, plan = [sorted(sites) for sites in number], []
    for index, (own, pairs) in enumerate(groups.items()):
        for direction in sweep.DIRECTIONS:
            options = {"direction": direction, "role": "last", "site_sets": [listed[i] for i in own], "numbers": own}
            plan += sweep_units(f"{direction}-{index:02d}", pairs, **options)
    compute, columns = numbered(step.sweeper(prompts)), [*WITH_MARGINS, "site_set"]
    return step.table("circuits", plan, compute, schema=records.SET_SCHEMA, columns=columns)


def numbered(compute: Callable[[Unit], pd.DataFrame]) -> Callable[[Unit], pd.DataFrame]:
    """`compute` for units that sweep some of the sets of a longer list: `site_set` becomes the number in that list."""

    def run(unit: Unit) -> pd.DataFrame:
        options = {key: value for key, value in unit.options.items() if key != "numbers"}
        frame = compute(replace(unit, options=options))
        frame["site_set"] = np.asarray(unit.options["numbers"])[frame["site_set"]]
        return frame

    return run
