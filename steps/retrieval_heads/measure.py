"""Step 06, measured: what feeds the slice? Probes, path patching, value vectors, attention, and ablated paths.

1. `PROBES_TABLE`: what the model says of one name. `SENDERS`: every sender's path into the slice, at the names, at the
   last token and in one-name prompts. `GROUPS`: whole kinds of senders together.
2. `VALUES`, `ATTENTION`: what every head and MLP writes, and where heads look, in plain runs.
3. `candidates` are picked on the discovery half; `ABLATION`: their paths alone are ablated, beside random heads.
4. `EDGES`: the two-hop path from the names to the answer, edge by edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import pandas as pd
from pydantic import Field

from lib import effects, records, tasks
from lib.effects import SITE
from lib.hooks import Model, Site
from lib.tasks import Pair
from lib.weights import Shape
from pipeline import costs
from pipeline.assumed import Case, few_pairs, of_paths, order_of, pair_of
from pipeline.costs import Machine, Work
from pipeline.declaration import ANALYSED, Declaration, Table
from pipeline.params import OfSlice
from pipeline.population import load_people
from pipeline.step import Step
from pipeline.units import Unit, subsample
from steps.retrieval_heads import one_name, routes, values
from steps.retrieval_heads.routes import LAST, NAMES, sites_that_read

# Each form of the article-free prompt, and the one with an article for comparison.
PROBES = (("plural", "profession_is"), ("singular", "The profession of {a} is"), ("singular", "{a} is a"))
HOPS = 6  # sites at the names whose paths are followed edge by edge
VALUE = 15  # bytes of a row of value vectors in Parquet
COLUMNS = (*ANALYSED, "site_set", "sender", "receivers", "mlps")


class RetrievalHeads(OfSlice):
    """06: what feeds the slice; path patching, value vectors, attention, path ablation."""

    pairs: int | None = Field(None, ge=1, description="pairs on which senders at `last` are patched; default all")
    name_pairs: int = Field(60, ge=1, description="pairs on which senders at the names are patched")
    probe_people: int = Field(200, ge=1, description="people asked about with the one-name templates")
    mlps: Literal["recomputed", "frozen"] = Field(
        "recomputed", description="MLPs between sender and receiver: recomputed, or frozen at their base values"
    )
    candidates: int = Field(6, ge=1, description="most retrieval heads whose path is ablated")
    random_sets: int = Field(20, ge=2, description="sets of matched random heads whose path is ablated beside them")


# --- what is measured ---


class Subject(NamedTuple):
    """The pairs of the step: at the names, at the last token, and of single names."""

    at_names: list[Pair]
    at_last: list[Pair]
    one_name: list[Pair]


def subject(step: Step) -> Subject:
    """The pairs that are patched."""
    p, prompts = step.params, step.prompts()
    alone = subsample(step.prompts(routes.one_name_rows(step.pairs())), p.name_pairs)
    return Subject(subsample(prompts, p.name_pairs), subsample(prompts, p.pairs), alone)


def people_asked(step: Step) -> pd.DataFrame:
    """The people of the one-name probes."""
    return one_name.draw_people(load_people(step.people_file), step.params.probe_people, step.params.seed)


def probe_units(step: Step | Case, names: Sequence[str]) -> list[Unit]:
    """One unit for each one-name prompt."""
    return [Unit(text, tuple(names), {"template": text, "form": form}) for form, text in PROBES]


def prober(step: Step, names: Sequence[str]) -> Callable[[Unit], pd.DataFrame]:
    """What asks a unit's people."""
    people, superset_of = people_asked(step), superset_by_profession(step)

    def compute(unit: Unit) -> pd.DataFrame:
        template = tasks.find_template(unit.options["template"], "one_name", unit.options["form"])
        return one_name.probe(step.model, people, [template], superset_of, step.params.chat_template)

    return compute


def superset_by_profession(step: Step) -> dict[str, str]:
    """The superset of each profession of the table of people."""
    return one_name.superset_by_profession(load_people(step.people_file))


def patcher(step: Step, *chosen: Any) -> Callable[[Unit], pd.DataFrame]:
    """What patches the paths of a unit; all tables share the pool of activations, and the proofs of the first unit."""
    return step.shared("patcher", lambda: step.sweeper(step.prompts(), routes.run))


def sender_units(step: Step | Case, pairs: Subject) -> list[Unit]:
    """All senders, singly, into the slice."""
    sites, mlps = step.slice(), step.params.mlps
    heads = sites_that_read(sites)
    return [
        *routes.paths("slice at names", pairs.at_names, heads, NAMES, mlps),
        *routes.paths("slice at last", pairs.at_last, sites, LAST, mlps),
        *routes.paths("slice in one-name prompts", pairs.one_name, heads, NAMES, mlps),
    ]


def group_units(step: Step | Case, pairs: Subject) -> list[Unit]:
    """Whole kinds of senders into the slice's heads at the names."""
    return routes.group_units(pairs.at_names, step.slice(), step.n_heads)


def reading_units(label: str, step: Step | Case, pairs: Subject) -> list[Unit]:
    """One work unit per half: what `values.value_vectors` centres on is the half as a whole."""
    return [
        Unit(f"{label}-{half}", tuple(pair for pair in pairs.at_last if pair.half == half))
        for half in dict.fromkeys(pair.half for pair in pairs.at_last)
    ]


def value_reader(step: Step, pairs: Subject) -> Callable[[Unit], pd.DataFrame]:
    """What reads a unit's value vectors."""
    professions = values.professions_of(step.pairs(), load_people(step.people_file))
    superset_of = superset_by_profession(step)

    def compute(unit: Unit) -> pd.DataFrame:
        template = tasks.find_template(unit.pairs[0].template, unit.pairs[0].task)
        labels = one_name.labels_of(step.model.tokenizer, template, superset_of, ("plural", "singular"))
        return values.value_vectors(step.model, unit.pairs, professions, labels)

    return compute


def attention_reader(step: Step, pairs: Subject) -> Callable[[Unit], pd.DataFrame]:
    """What reads a unit's attention."""
    return lambda unit: values.attention_to_names(step.model, unit.pairs)


Sets = Mapping[str, Sequence[tuple[str, tuple[Site, ...]]]]  # by role: kind of set, senders


def ablation_units(step: Step | Case, pairs: Subject, sets: Sets) -> list[Unit]:
    """The paths of the sets, ablated."""
    sites, mlps = step.slice(), step.params.mlps
    each = (routes.ablation_units(role, some, pairs.at_names, sites, mlps) for role, some in sets.items())
    return [unit for units in each for unit in units]


def edge_units(step: Step | Case, senders: Sequence[Site]) -> list[Unit]:
    """The two-hop path, edge by edge, on two thirds of the pairs at the names."""
    pairs = subsample(step.prompts(), 2 * step.params.name_pairs // 3)
    return routes.edge_units(pairs, senders, step.slice(), step.params.mlps)


def probe_cost(case: Case, units: Sequence[Unit], *chosen: Any) -> Work:
    """Each person asked in each form."""
    return case.asked(len(PROBES) * case.params.probe_people, tasks.TEMPLATES["profession_is"], 256)


def value_cost(case: Case, units: Sequence[Unit], *chosen: Any) -> Work:
    """Both prompts of each pair, and what every head and MLP writes at three places."""
    prompts, parts = 2 * sum(len(unit.pairs) for unit in units), case.n_layers * (case.n_heads + 1)
    tokens = len(units[0].pairs[0].clean.ids)
    read = costs.plain(case.shape, prompts, tokens, -(-prompts // 16))
    return read + Work(table=VALUE * prompts * parts * 3, other={"values": prompts * parts * 3})


def attention_cost(case: Case, units: Sequence[Unit], *chosen: Any) -> Work:
    """Clean prompts, run plainly and with eager attention, and each head's shares."""
    count, tokens = sum(len(unit.pairs) for unit in units), len(units[0].pairs[0].clean.ids)
    shares = count * case.n_layers * case.n_heads * 4
    read = costs.plain(case.shape, 2 * count, tokens, 2 * -(-count // 16)) + costs.vocabulary(case.shape, 2 * count)
    return read + Work(table=6 * shares, other={"values": shares / 2})


PATHS = {"schema": records.PATH_SCHEMA, "columns": COLUMNS}
PROBES_TABLE = Table("probes", probe_units, prober, probe_cost, schema=one_name.PROBES)
SENDERS = Table("retrieval_heads", sender_units, patcher, of_paths, **PATHS)
GROUPS = Table("groups", group_units, patcher, of_paths, **PATHS)
VALUES = Table("values", partial(reading_units, "values"), value_reader, value_cost, schema=values.VALUES)
ATTENTION = Table(
    "attention", partial(reading_units, "attention"), attention_reader, attention_cost, schema=values.ATTENTION
)
ABLATION = Table("ablation", ablation_units, patcher, of_paths, **PATHS)
EDGES = Table("edges", edge_units, patcher, of_paths, **PATHS)


def assumed(case: Case) -> Iterator[tuple[Any, ...]]:
    """The tables in order: heads are candidates at even depths before the slice, MLPs of the first layers the hops."""
    p, sites, single = case.params, case.slice(), tasks.TEMPLATES["profession_is"]
    some = subsample(case.prompts(), p.name_pairs)
    alone = [pair_of(single, int(pair.quad_id[1:]), 0, pair.half, [len(pair.clean.roles["name_a"])]) for pair in some]
    pairs = Subject(some, subsample(case.prompts(), p.pairs), alone)
    yield PROBES_TABLE, ()
    for table in (SENDERS, GROUPS, VALUES, ATTENTION):
        yield table, pairs
    before = min(site.layer for site in sites_that_read(sites))
    reading = [Site(before * (2 + number) // (p.candidates + 2), "head", 0) for number in range(p.candidates)]
    heads = {"names": list(dict.fromkeys(reading)), "last": order_of(case, len(sites) + 2)[len(sites) :]}
    yield ABLATION, pairs, ablation_sets(case, heads)
    yield EDGES, [Site(layer, "mlp") for layer in range(min(HOPS, before))]


def samples(model: Model, shape: Shape, place: Machine) -> Iterator[tuple[Work, Callable[[], Any]]]:
    """Paths into heads at the names, and into heads and an MLP at the last token, to time a machine with."""
    pairs, middle, last = few_pairs()[:4], shape.n_layers * 2 // 3, shape.n_layers - 1
    sites = [Site(middle, "head", 0), Site(last, "head", 0), Site(last, "mlp")]
    for route, into in ((NAMES, sites[:2]), (LAST, sites)):
        (unit,) = routes.paths("x", pairs, into, route, "recomputed", [sites[:1]])
        work = costs.path_unit(shape, unit.pairs, unit.options, place)
        yield work, partial(routes.run, model, unit.pairs, memory=place.memory, **unit.options)


STEP = Declaration(
    "retrieval_heads",
    RetrievalHeads,
    assumed,
    reads={"sufficiency": ("critical_slice",)},
    files=("people_file",),
    samples=samples,
)


# --- what is chosen ---


def senders_table(records: pd.DataFrame, params: RetrievalHeads) -> pd.DataFrame:
    """`effects.both_halves` over the senders of one route."""
    table = effects.both_halves(records.assign(component=records["sender"]), params)
    return table.assign(site=table["site"].replace("embed -1", "embedding"))


def candidates(table: pd.DataFrame, slice_sites: Sequence[Site], params: RetrievalHeads) -> list[Site]:
    """Heads outside the slice whose path into it is significant familywise on the discovery half, largest first."""
    own = table[(table["half"] == table["half"].iloc[0]) & (table["component"] == "head") & (table["estimate"] > 0)]
    own = own[own["p"] <= 1 - params.level].sort_values("estimate", ascending=False)
    sites = [Site(*row) for row in own[SITE].itertuples(index=False)]
    return [site for site in sites if site not in slice_sites][: params.candidates]


def leading(table: pd.DataFrame, count: int) -> list[Site]:
    """The senders of largest discovery effect, in the order of the layers."""
    first = table[table["half"] == table["half"].iloc[0]].nlargest(count, "estimate")
    return sorted(Site(*row) for row in first[SITE].itertuples(index=False))


def ablation_sets(step: Step | Case, heads: Mapping[str, Sequence[Site]]) -> Sets:
    """The sets of senders whose path is ablated, by role."""
    count, sites = step.params.random_sets, step.slice()
    return {
        role: routes.ablation_sets(chosen, sites, role, step.n_heads, count, step.rng(role))
        for role, chosen in heads.items()
    }


class Measured(NamedTuple):
    """What step 06 has measured, and what was chosen from it."""

    slice_sites: list[Site]
    probes: pd.DataFrame
    routes: dict[str, pd.DataFrame]  # effects of senders by half: "slice at names", "slice at last", ...
    groups: pd.DataFrame
    values: pd.DataFrame
    attention: pd.DataFrame
    heads: dict[str, list[Site]]  # candidates by role
    sets: Sets
    ablation: pd.DataFrame
    senders: list[Site]  # the sites at the names that the two-hop path goes through
    edges: pd.DataFrame


def run(step: Step) -> Measured:
    """Measure, or read what is there."""
    p, sites, pairs = step.params, step.slice(), subject(step)
    probes = step.table(PROBES_TABLE, people_asked(step)["name"].tolist())
    records_of_paths = step.table(SENDERS, pairs).groupby("receivers", sort=False)
    by_route = {name: senders_table(rows, p) for name, rows in records_of_paths}
    measured = [step.table(table, pairs) for table in (GROUPS, VALUES, ATTENTION)]
    heads = {role: candidates(by_route[f"slice at {role}"], sites, p) for role in ("names", "last")}
    sets = ablation_sets(step, heads)
    ablated = step.table(ABLATION, pairs, sets)
    senders = leading(by_route["slice at names"], HOPS)
    return Measured(sites, probes, by_route, *measured, heads, sets, ablated, senders, step.table(EDGES, senders))
