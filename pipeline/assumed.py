"""What a plan counts with before anything has run: pairs without names, and the default book's findings.

1. `pair_of` makes a stand-in: only its half, quad, length and roles matter to the work units. `case_of` gives a step as
   many as step 01 left, or would leave, with the token counts of its pairs, else the default book's (`LENGTHS`).
2. What rests on findings is taken from the findings where they are there, else from the default book: the slice
   (`SLICE`), how long the search for a circuit goes on, ... `ASSUMED` says so in words.
3. `Case` counts the work of a step's tables from its units.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from lib import batches, data, questions, records, tasks
from lib.data import HALVES
from lib.hooks import Site, site_of
from lib.tasks import Pair, Prompt, Template
from lib.weights import Shape
from pipeline import costs, declaration, keys, params
from pipeline.costs import Machine, Work, next_logits, path_unit, sweep_unit, total
from pipeline.declaration import Plan, Table
from pipeline.params import ParameterError, Shared
from pipeline.units import Unit

# What the default book found (SmolLM2-135M, 30 layers of 9 heads); layers stand for their depth.
SLICE = ("21.6", "mlp 23", "27.1", "23.5", "27.2", "mlp 29", "mlp 24", "27.0", "22.6")
DEPTH, HEADS = 30, 9
LENGTHS = {3: 0.42, 4: 0.29, 2: 0.22, 5: 0.07}  # tokens of a name, and the share of the quads with such names
KEPT = 1.0  # quads found of those wanted
MOVED = 0.95  # share of the quads whose gap has the right sign in another template, too
REACH = 0.6  # depth of the sites behind the slice
ASSUMED = (
    "the slice, how often it is widened by backups and the circuit's size are those that the default book found, at "
    "the same depth of the model: nine heads and MLPs from 70% of the layers on",
    "names have 2 to 5 tokens, as in the default book; a template's text counts a token a word",
    f"{KEPT:.0%} of the quads asked for are found, and the gap of {MOVED:.0%} of them has the right sign in another "
    "template",
)
# Bytes of a record in Parquet (measured in the default book): with the labels' logits, without, a path's, others'.
LABELLED, SHORT = 245, 62


@dataclass(frozen=True)
class Case:
    """A step of a profile before it is run: it answers a table's `units` as a `Step` does, with stand-ins."""

    plan: Plan
    name: str
    params: Shared
    shape: Shape
    machine: Machine
    pairs: list[Pair]  # of step 01
    sites: list[Site]  # of the slice
    placebos: list[Pair]

    @property
    def n_layers(self) -> int:
        return self.shape.n_layers

    @property
    def n_heads(self) -> int:
        return self.shape.n_heads

    @property
    def layers(self) -> list[int]:
        chosen = self.params.layers
        return list(range(self.n_layers)) if chosen in ("all", "auto") else list(chosen)

    def prompts(self) -> list[Pair]:
        return list(self.pairs)

    def placebo(self) -> list[Pair]:
        return list(self.placebos)

    def slice(self) -> list[Site]:
        return list(self.sites)

    def rng(self, purpose: str = "") -> np.random.Generator:
        return np.random.default_rng(0)

    def half(self, number: int, pairs: Sequence[Pair] | None = None) -> list[Pair]:
        own = self.pairs if pairs is None else pairs
        return [pair for pair in own if pair.half == HALVES[number]] or list(own)

    def other(self, step: str) -> Shared:
        """The parameters of another step of the profile."""
        return params.validate(self.plan.sections, step, params.load_profile(self.params.profile))

    def stored(self, table: Table) -> pd.DataFrame | None:
        """A table as a run with these very parameters has left it; None where there is none."""
        path = keys.left(keys.results_folder(self.params), self.name, f"{self.name}.{table.name}.parquet")
        if path is None:
            return None
        own = self.params.model_dump(mode="json", exclude=set(keys.PLACES))
        return records.read(path) if records.read_metadata(path)["parameters"] == own else None

    # --- tables ---

    def swept(self, units: Sequence[Unit], pool: Sequence[Pair] | None = None) -> Work:
        """A table of `sweep_units` units; `pool` lends means and resamples."""
        each = [sweep_unit(self.shape, unit.pairs, unit.options, self.machine) for unit in units]
        of_row = [LABELLED if unit.pairs[0].label_tokens else SHORT for unit in units]
        size = sum(count * one.rows for count, one in zip(of_row, each, strict=True))
        return total([*each, self.pool(units, pool), Work(table=size)])

    def pathed(self, units: Sequence[Unit]) -> Work:
        each = [path_unit(self.shape, unit.pairs, unit.options, self.machine) for unit in units]
        size = sum(one.rows for one in each) * (LABELLED + 15)
        return total([*each, self.pool(units, self.pairs), Work(table=size)])

    def pool(self, units: Sequence[Unit], pool: Sequence[Pair] | None) -> Work:
        """Each group that is lent means or resamples has its prompts run once, for each plan that comes to it."""
        groups = {
            (unit.id.rpartition("-")[0], batches.group_of(unit.pairs[0]))
            for unit in units
            if {*unit.options.get("ablations", ())} & {*batches.NEUTRAL}
        }
        donors = [[pair for pair in pool or self.pairs if batches.group_of(pair) == group] for _, group in groups]
        return total(costs.pool(self.shape, own) for own in donors)

    def asked(self, prompts: int, template: Template, chunk: int = 64) -> Work:
        """Prompts of a template asked for their next token, with names of three tokens."""
        tokens, roles = tokens_of(template, [3] * len(template.slots))
        return next_logits(self.shape, prompts, tokens, roles["names"][0], chunk) + Work(table=160 * prompts)


def of_sweep(case: Case, units: Sequence[Unit], *chosen: Any) -> Work:
    """The cost of a table of `sweep_units`."""
    return case.swept(units)


def of_paths(case: Case, units: Sequence[Unit], *chosen: Any) -> Work:
    """The cost of a table of path patching."""
    return case.pathed(units)


# --- stand-ins ------------------------------------------------------------------------------------------------------


def words(text: str) -> int:
    """Tokens of a template's text, nearly: words, signs and line ends."""
    return len(re.findall(r"\w+|[^\w\s]|\n", text))


def tokens_of(template: Template, names: Sequence[int]) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Length of a prompt with names of so many tokens, and where its roles stand."""
    own = dict(zip(template.slots, names, strict=False))
    text, spans = tasks.fill(template, list(own), tasks.DEFAULT_ATTRIBUTES)
    at, before, roles = 0, 0, {}
    for (slot, count), (start, end) in zip(own.items(), spans, strict=True):
        at += words(text[before:start])
        roles[f"name_{slot}"] = tuple(range(at, at + count))
        at, before = at + count, end
    every = tuple(token for tokens in roles.values() for token in tokens)
    length = at + words(text[before:] + template.answer_prefix)
    return length, roles | {"names": every, "swapped": every} | tasks.outside_names(every, length)


def pair_of(
    template: Template,
    quad: int,
    number: int,
    half: str,
    names: Sequence[int],
    labels: int = 50,
    answers: Sequence[str] = (),
) -> Pair:
    """One of a quad's pairs. The third and fourth are the mirrors of the first two, as `population.pairs_of` has them.

    `answers` of the first pair, clean and corrupt, of one attribute; where they are not known, quads take all two
    supersets in turn.
    """
    length, roles = tokens_of(template, names)
    topic = template.question
    about = [tuple(classes) for classes in topic.answers.values() if {*answers} <= {*classes}]
    classes, known = about[0] if about else topic.supersets, about and len(answers) == 2
    turns = list(combinations(range(len(classes)), 2))
    answers = [classes.index(name) for name in answers] if known else turns[quad % len(turns)]

    def prompt(side: int) -> Prompt:
        which = 4 * quad + 2 * (number % 2) + side
        ids = (which % 90, which // 90 % 90, which // 8100 % 90, *range(3, length))[:length]
        return Prompt("", tuple(1 + one for one in ids), roles)

    turn, turned = number // 2, number in (1, 2)  # the order of the prompts; of their answers
    tokens = tuple(range(len(classes)))
    own = (classes, answers[turned], answers[1 - turned], tokens, tokens, (), ())
    label = ("word",) * labels, tuple(range(5, 5 + labels))
    name = f"q{quad:03d}-{number}"
    return Pair(name, f"q{quad:03d}", half, template.task, template.name, prompt(turn), prompt(1 - turn), *own, *label)


def few_pairs() -> list[Pair]:
    """Sixteen pairs of the first template, to time units with."""
    template = questions.load().of_task("superset")[0]
    return [pair_of(template, quad, number, HALVES[0], [3, 3]) for quad in range(8) for number in range(2)]


Quads = list[tuple[str, list[int], tuple[str, ...]]]  # half, the names' token counts, answers


def quads_of(plan: Plan, p: Shared) -> Quads:
    """The quads of step 01's pairs, else as many as it would leave, or as have the given pairs: of the default book's
    lengths, without answers."""
    try:
        path = keys.find_pairs(declaration.PAIRS, p)
    except ParameterError:
        if p.pairs_file is not None:
            raise
        path = None
    if path is not None and p.pairs_file is None:
        table = records.read(path)
        return quads_in(table) if {"n_tokens_a", "n_tokens_b"} <= {*table} else of_lengths(len(table))
    base = params.validate(plan.sections, declaration.PAIRS, params.load_profile(p.profile))
    if path is None:
        return of_lengths(max(4, round(KEPT * base.quads_per_half)))
    asked = {"task": p.task, "template": p.template, "question": p.question}
    given = len(data.read_pairs_file(path, p.seed, **asked)[0])
    return of_lengths(max(1, math.ceil(given / base.pairs_per_quad / len(HALVES))))


def placebos_of(plan: Plan, p: Shared) -> Quads:
    """The quads of step 01's placebo pairs, or as many as it would try."""
    if p.pairs_file is not None:
        return []
    try:
        path = keys.find_placebo(p)
    except ParameterError:
        base = params.validate(plan.sections, declaration.PAIRS, params.load_profile(p.profile))
        names = [name for name in base.placebo_attributes if name in p.topic.answers]
        every = [(name, quad) for name in names for quad in of_lengths(base.placebo_quads_per_half)]
        return [(half, counts, tuple(p.topic.answers[name])) for name, (half, counts, _) in every]
    return quads_in(records.read(path)) if path else []


def quads_in(table: pd.DataFrame) -> Quads:
    """The quads of a pairs table."""
    rows = table.drop_duplicates("quad_id").to_dict("records")
    counts = [[int(row[f"n_tokens_{slot}"]) for slot in "ab"] for row in rows]
    answers = [(row["answer"], row["corrupt_answer"]) for row in rows]
    return list(zip((row["half"] for row in rows), counts, answers, strict=True))


def of_lengths(count: int) -> Quads:
    """So many quads in each half, of the default book's lengths."""
    edges = np.cumsum(list(LENGTHS.values()))
    drawn = [list(LENGTHS)[int(np.searchsorted(edges, (i + 0.5) / count))] for i in range(count)]
    return [(half, [n, n], ()) for half in HALVES for n in drawn]


def case_of(plan: Plan, step: str, profile: Mapping[str, Any], shape: Shape, machine: Machine) -> Case:
    """A step of a profile's content, ready to be counted."""
    p = params.validate(plan.sections, step, profile)
    each = params.validate(plan.sections, declaration.PAIRS, profile).pairs_per_quad
    template = tasks.find_template(p.template, p.task, question=p.question)
    pairs, placebos = (
        [pair_of(template, q, n, half, names, answers=own) for q, (half, names, own) in quads for n in range(each)]
        for quads in (enumerate(quads_of(plan, p)), enumerate(placebos_of(plan, p)))
    )
    found = keys.find_findings(declaration.SLICE, p) or {}
    named = getattr(p, "slice_sites", None) or [site["site"] for site in found.get("critical_slice", ())]
    sites = [site_of(name) for name in named] or [at_depth(site_of(name), shape) for name in SLICE]
    return Case(plan, step, p, shape, machine, pairs, list(dict.fromkeys(sites)), placebos)


def at_depth(site: Site, shape: Shape) -> Site:
    """A site of the default book's model at the same depth of another."""
    layer = min(shape.n_layers - 1, site.layer * shape.n_layers // DEPTH)
    return Site(layer, site.component, site.head * shape.n_heads // HEADS if site.head >= 0 else -1)


def order_of(case: Case, count: int) -> list[Site]:
    """The slice, and after it other heads from `REACH` of the depth on: what recovers anything."""
    layers = range(int(REACH * case.shape.n_layers), case.shape.n_layers)
    more = [Site(layer, "head", head) for head in range(case.shape.n_heads) for layer in layers]
    return [*case.sites, *(site for site in more if site not in case.sites)][:count]
