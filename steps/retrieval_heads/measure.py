"""Step 06, measured: what feeds the slice? Probes, path patching, value vectors, attention, and ablated paths.

1. `PROBES_TABLE`: what the model says of one name. `SENDERS`: every sender's path into the slice, at the names and at
   the last token, on the discovery half; `CONFIRMED`: those of largest effect on the other half, and in one-name
   prompts. `GROUPS`: whole kinds of senders together.
2. `ATTENTION`, `OUTPUTS`: where every head looks, and what it writes, in plain runs.
3. `candidates` are picked on the discovery half; `ABLATION`: their paths alone are ablated, and those of the slice's
   own heads and of heads that the profile names, beside each of the heads that theirs are ranked among (`band`).
4. `EDGES`: the path from the names to the answer through the slice, edge by edge. `HOP_READS`: what the last token
   reads at the names, in one hop, and at the tokens that the names have spoken to, in two.

A slice without heads reads nothing at the names: only its MLPs' inputs at the last token are asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field

from lib import effects, records, tasks
from lib.data import HALVES
from lib.effects import SITE
from lib.hooks import Model, Site, site_of
from lib.tasks import Pair
from lib.weights import Shape
from pipeline import costs
from pipeline.assumed import Case, few_pairs, of_paths, order_of, pair_of
from pipeline.costs import Machine, Work
from pipeline.declaration import ANALYSED, Declaration, Table
from pipeline.params import Heads, OfSlice
from pipeline.population import aligned, alone, people_of, superset_by_profession
from pipeline.step import Step, with_gap
from pipeline.units import Unit, subsample, sweep_units
from steps.retrieval_heads import attention, hops, one_name, outputs, routes
from steps.retrieval_heads.routes import BETWEEN, LAST, NAMES, heads_of, speaks

HOPS = 6  # sites at the names whose paths are followed edge by edge
FOLLOWED = 24  # senders of largest discovery effect whose path is measured on the confirmation half
COLUMNS = (*ANALYSED, "site_set", "sender", "receivers", "mlps")


class RetrievalHeads(OfSlice):
    """06: what feeds the slice; path patching, value vectors, attention, path ablation."""

    pairs: int | None = Field(None, ge=1, description="pairs on which senders at `last` are patched; default all")
    name_pairs: int = Field(100, ge=1, description="pairs on which senders at the names are patched")
    one_name_pairs: int = Field(60, ge=0, description="one-name pairs on which senders are patched; 0: none")
    edge_pairs: int = Field(60, ge=2, description="pairs on which the two-hop path is followed edge by edge")
    probe_people: int = Field(200, ge=1, description="people asked about with the one-name templates")
    mlps: Literal["recomputed", "frozen"] = Field(
        "recomputed", description="MLPs between sender and receiver: recomputed, or frozen at their base values"
    )
    candidates: int = Field(6, ge=1, description="most retrieval heads whose path is ablated")
    null_heads: int = Field(
        100, ge=1, description="fewest other heads of the nearest layers that a head's numbers are ranked among"
    )
    named_heads: Heads = Field(
        (), description="heads such as 10.6,4.2, put to the same tests at the names, as a family of their own"
    )


# --- what is measured ---


class Subject(NamedTuple):
    """The pairs of the step: at the names, at the last token, and of single names."""

    at_names: list[Pair]
    at_last: list[Pair]
    one_name: list[Pair]


def subject(step: Step) -> Subject:
    """The pairs that are patched; of single names those that line up, too, in a prompt of their own."""
    p, prompts = step.params, step.prompts()
    how = {"chat_template": p.chat_template, "attributes": p.attributes, "question": p.question}
    single, _ = aligned(routes.one_name_rows(step.pairs(), p.topic.alone), step.tokenizer, **how)
    alone = subsample(step.prompts(single), p.one_name_pairs)
    return Subject(subsample(prompts, p.name_pairs), subsample(prompts, p.pairs), alone)


def people_asked(step: Step) -> pd.DataFrame:
    """The people of the one-name probes."""
    drawn, topic = one_name.draw_people(people_of(step), step.params.probe_people, step.params.seed), step.params.topic
    templates = [topic.find(text, "one_name", form) for form, text in topic.probes]
    return drawn[drawn["name"].isin(alone(drawn["name"], step.tokenizer, templates, step.params.chat_template))]


def probe_units(step: Step | Case, names: Sequence[str]) -> list[Unit]:
    """One unit for each one-name prompt."""
    return [Unit(text, tuple(names), {"template": text, "form": form}) for form, text in step.params.topic.probes]


def prober(step: Step, names: Sequence[str]) -> Callable[[Unit], pd.DataFrame]:
    """What asks a unit's people."""
    people, superset_of = people_asked(step), superset_by_profession(people_of(step))

    def compute(unit: Unit) -> pd.DataFrame:
        template = step.params.topic.find(unit.options["template"], "one_name", unit.options["form"])
        return one_name.probe(step.model, people, [template], superset_of, step.params.chat_template)

    return compute


def patcher(step: Step, *chosen: Any) -> Callable[[Unit], pd.DataFrame]:
    """What patches the paths of a unit; all tables share the pool of activations, and the proofs of the first unit."""
    return step.shared("patcher", lambda: step.sweeper(step.prompts(), routes.run))


def of_half(pairs: Sequence[Pair], which: int) -> list[Pair]:
    """The pairs of the half that sites are picked on (0), or reported on (-1); all where there is only one half."""
    halves = [half for half in HALVES if any(pair.half == half for pair in pairs)]
    return [pair for pair in pairs if pair.half == halves[which]]


def routes_of(step: Step | Case, pairs: Subject) -> dict[str, tuple[list[Pair], list[Site], Mapping[str, str]]]:
    """Where senders speak to the slice, by role: their pairs, the sites that hear them, and by which inputs."""
    sites = step.slice()
    own = {"names": (pairs.at_names, heads_of(sites), NAMES), "last": (pairs.at_last, sites, LAST)}
    return own if heads_of(sites) else {"last": own["last"]}


def screened_routes(step: Step | Case, pairs: Subject) -> dict[str, tuple[list[Pair], list[Site], Mapping[str, str]]]:
    """`routes_of`, and the tokens between the names and the last one, where the slice's heads read what the names have
    left there."""
    own, heads = routes_of(step, pairs), heads_of(step.slice())
    there = all("between" in pair.clean.roles for pair in pairs.at_names) and any(site.layer for site in heads)
    return own | ({"between": (pairs.at_names, heads, BETWEEN)} if heads and there else {})


def sender_units(step: Step | Case, pairs: Subject) -> list[Unit]:
    """All senders, singly, into the slice, on the discovery half; whole attention modules in the place of heads at the
    tokens between, of which there are several."""
    units = []
    for role, (some, into, route) in screened_routes(step, pairs).items():
        senders = routes.modules(into) if role == "between" else None
        units += routes.paths(f"slice at {role}", of_half(some, 0), into, route, step.params.mlps, senders)
    return units


def confirmed_units(step: Step | Case, pairs: Subject, leaders: Mapping[str, Sequence[Site]]) -> list[Unit]:
    """The leading senders on the confirmation half, if there is another, and those at the names in one-name prompts."""
    units, mlps = [], step.params.mlps
    for role, (some, into, route) in screened_routes(step, pairs).items():
        senders = [(site,) for site in leaders[role]]
        if len({pair.half for pair in some}) > 1:
            units += routes.paths(f"slice at {role}", of_half(some, -1), into, route, mlps, senders)
        if role == "names" and pairs.one_name:
            alone = of_half(pairs.one_name, -1)
            units += routes.paths("slice in one-name prompts", alone, into, route, mlps, senders)
    return units


def group_units(step: Step | Case, pairs: Subject) -> list[Unit]:
    """Whole kinds of senders into what the slice is given at the names; at the last token where it has no heads."""
    some = pairs.at_names if heads_of(step.slice()) else pairs.at_last
    return routes.group_units(of_half(some, -1), step.slice(), step.n_heads)


def attention_units(step: Step | Case, pairs: Subject) -> list[Unit]:
    """One for each half."""
    halves = dict.fromkeys(pair.half for pair in pairs.at_last)
    return [Unit(half, tuple(pair for pair in pairs.at_last if pair.half == half)) for half in halves]


def attention_reader(step: Step, pairs: Subject) -> Callable[[Unit], pd.DataFrame]:
    """What reads a unit's attention."""
    return lambda unit: attention.attention_to_names(step.model, unit.pairs)


def output_units(step: Step | Case, pairs: Subject) -> list[Unit]:
    """One for each role: the halves together, as folds and directions need."""
    return [Unit(role, tuple(pairs.at_last)) for role in routes_of(step, pairs)]


def output_reader(step: Step, pairs: Subject) -> Callable[[Unit], pd.DataFrame]:
    """What reads and probes the heads' outputs of a unit's role."""
    people, sites = people_of(step), step.slice()
    known = outputs.professions_of(step.pairs(), people)
    described = outputs.described(step.pairs(), people, [*step.params.topic.attributes])
    template = step.params.topic.find(pairs.at_last[0].template, pairs.at_last[0].task)

    def compute(unit: Unit) -> pd.DataFrame:
        candidates = tasks.candidates(step.model.tokenizer, template)
        words = dict(zip(*candidates, strict=True))
        about = outputs.About(known, superset_by_profession(people), words, described)
        return outputs.table(step.model, unit.pairs, about, sites, unit.id, step.params.seed)

    return compute


Sets = Mapping[str, Sequence[tuple[str, tuple[Site, ...]]]]  # by role: kind of set, senders


def ablation_units(step: Step | Case, pairs: Subject, sets: Sets) -> list[Unit]:
    """The paths of the sets, ablated, on the confirmation half."""
    some, mlps = of_half(pairs.at_names, -1), step.params.mlps
    each = (routes.ablation_units(role, own, some, step.slice(), mlps) for role, own in sets.items())
    return [unit for units in each for unit in units]


def edge_units(step: Step | Case, senders: Sequence[Site]) -> list[Unit]:
    """The two-hop path, edge by edge, on the confirmation half."""
    pairs = of_half(subsample(step.prompts(), step.params.edge_pairs), -1)
    return routes.edge_units(pairs, senders, step.slice(), step.params.mlps)


def hop_units(step: Step | Case, pairs: Subject) -> list[Unit]:
    """What the last token reads where, on the confirmation half."""
    return sweep_units("hops", of_half(pairs.at_names, -1), size=16)


def hop_reader(step: Step, pairs: Subject) -> Callable[[Unit], pd.DataFrame]:
    """What reads a unit's pairs."""
    return lambda unit: hops.read(step.model, unit.pairs, step.slice(), step.memory)


def probe_cost(case: Case, units: Sequence[Unit], *chosen: Any) -> Work:
    """Each person asked in each form."""
    topic = case.params.topic
    return case.asked(len(topic.probes) * case.params.probe_people, topic.find(topic.alone), 256)


def attention_cost(case: Case, units: Sequence[Unit], *chosen: Any) -> Work:
    """Clean prompts, run plainly and with eager attention, and each head's shares."""
    count, tokens = sum(len(unit.pairs) for unit in units), len(units[0].pairs[0].clean.ids)
    shares = count * case.n_layers * case.n_heads * 4
    read = costs.plain(case.shape, 2 * count, tokens, 2 * -(-count // 16)) + costs.vocabulary(case.shape, 2 * count)
    return read + Work(table=6 * shares, other={"values": shares / 2})


def output_cost(case: Case, units: Sequence[Unit], *chosen: Any) -> Work:
    """Both prompts of each pair, and a probe of each head and fold."""
    prompts, tokens = 2 * sum(len(unit.pairs) for unit in units), len(units[0].pairs[0].clean.ids)
    quads = sum(len({pair.quad_id for pair in unit.pairs}) for unit in units)
    heads = case.n_layers * case.n_heads
    read = costs.plain(case.shape, prompts, tokens, -(-prompts // 16))
    return read + Work(table=20 * quads * heads, other={"head probes": 2 * outputs.FOLDS * heads * len(units)})


PATHS = {"schema": records.PATH_SCHEMA, "columns": COLUMNS}
PROBES_TABLE = Table("probes", probe_units, prober, probe_cost, schema=one_name.PROBES)
SENDERS = Table("retrieval_heads", sender_units, patcher, of_paths, **PATHS)
CONFIRMED = Table("confirmed", confirmed_units, patcher, of_paths, **PATHS)
GROUPS = Table("groups", group_units, patcher, of_paths, **PATHS)
ATTENTION = Table("attention", attention_units, attention_reader, attention_cost, schema=attention.ATTENTION)
OUTPUTS = Table("outputs", output_units, output_reader, output_cost, schema=outputs.OUTPUTS)
ABLATION = Table("ablation", ablation_units, patcher, of_paths, **PATHS)
HOP_READS = Table("hops", hop_units, hop_reader, hops.cost, schema=hops.SCHEMA)
EDGES = Table("edges", edge_units, patcher, of_paths, **PATHS)


def assumed(case: Case) -> Iterator[tuple[Any, ...]]:
    """The tables in order: heads are candidates at even depths before the slice, MLPs of the first layers the hops."""
    p, sites, single = case.params, case.slice(), case.params.topic.find(case.params.topic.alone)
    some = subsample(case.prompts(), p.name_pairs)
    asked = subsample(case.prompts(), p.one_name_pairs)
    alone = [pair_of(single, int(pair.quad_id[1:]), 0, pair.half, [len(pair.clean.roles["name_a"])]) for pair in asked]
    pairs = Subject(some, subsample(case.prompts(), p.pairs), alone)
    before = max(1, min(site.layer for site in sites))
    layers = [before * (2 + number) // (p.candidates + 2) for number in range(p.candidates)]
    heads = {"names": list(dict.fromkeys(Site(layer, "head", 0) for layer in layers))}
    heads["last"] = order_of(case, len(sites) + 2)[len(sites) :]
    heads = {role: heads[role] for role in routes_of(case, pairs)}
    followed = [Site(number % before, "head", number // before) for number in range(FOLLOWED)]
    yield PROBES_TABLE, ()
    yield SENDERS, pairs
    yield CONFIRMED, pairs, dict.fromkeys(screened_routes(case, pairs), followed)
    for table in (GROUPS, HOP_READS, ATTENTION, OUTPUTS):
        yield table, pairs
    yield ABLATION, pairs, ablation_sets(case, heads)
    yield EDGES, [Site(layer, "mlp") for layer in range(min(HOPS, before))] if "names" in heads else []


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
    timings=outputs.timings,
)


# --- what is chosen ---


def senders_table(records: pd.DataFrame, params: RetrievalHeads) -> pd.DataFrame:
    """`effects.both_halves` over the senders of one route."""
    table = effects.both_halves(records.assign(component=records["sender"]), params)
    return table.assign(site=table["site"].replace("embed -1", "embedding"))


def candidates(table: pd.DataFrame, slice_sites: Sequence[Site], params: RetrievalHeads) -> list[Site]:
    """Heads outside the slice whose path into it is significant familywise on the discovery half, largest first."""
    own = table[(table["half"] == table["half"].iloc[0]) & (table["component"] == "head") & (table["estimate"] > 0)]
    sure = (own["p"] <= 1 - params.level) & ~(own["low"].astype(float) <= 0)  # of too few quads the tests say so
    own = own[sure].sort_values("estimate", ascending=False)
    sites = [Site(*row) for row in own[SITE].itertuples(index=False)]
    return [site for site in sites if site not in slice_sites][: params.candidates]


def leading(table: pd.DataFrame, count: int, floor: float = -np.inf) -> list[Site]:
    """The senders of largest discovery effect, those above the floor (logits), in the order of the layers."""
    first = table[table["half"] == table["half"].iloc[0]]
    first = first[first["estimate"] > floor].nlargest(count, "estimate")
    return sorted(Site(*row) for row in first[SITE].itertuples(index=False))


def needed(family: int, level: float) -> int:
    """Heads that a rank among must be one of, for the smallest p that it can give, 1 / (n + 1), to reach the level
    after Holm's correction over a family."""
    return int(np.ceil(round(family / (1 - level), 6))) - 1


def band(site: Site, others: Sequence[Site], least: int) -> list[Site]:
    """What a head is ranked among: the others of the layers nearest to its own, of as few layers as hold `least`; all
    where there are fewer. Layers as near above as below count alike."""
    away = sorted(abs(other.layer - site.layer) for other in others)
    reach = away[min(least, len(away)) - 1] if away else 0
    return [other for other in others if abs(other.layer - site.layer) <= reach]


def by_kind(records: pd.DataFrame, slice_sites: Sequence[Site]) -> pd.DataFrame:
    """The records of GROUPS with the place of each set of senders among `routes.GROUPS`, of which some may be empty."""
    some = [place for place, own in enumerate(routes.groups(heads_of(slice_sites) or slice_sites, 1)) if own]
    return records.assign(site_set=[some[number] for number in records["site_set"]])


Family = dict[Site, list[Site]]  # heads put to the tests together, each with the heads that it is ranked among


def named_heads(step: Step | Case) -> list[Site]:
    """The `named_heads` that the slice hears at the names, where it has heads."""
    into = heads_of(step.slice())
    return [site for site in map(site_of, step.params.named_heads) if into and speaks(site, into)]


def others(step: Step | Case, role: str, heads: Mapping[str, Sequence[Site]]) -> list[Site]:
    """What heads put to the tests at a role are ranked among: all heads before the sites that hear them, but for the
    candidates, the slice and the named ones."""
    sites = step.slice()
    into, put = heads_of(sites) if role == "names" else sites, {*heads[role], *sites}
    put |= {*named_heads(step)} if role == "names" else set()
    every = [Site(layer, "head", head) for layer in range(step.n_layers) for head in range(step.n_heads)]
    return [site for site in every if speaks(site, into) and site not in put]


def family_of(heads: Sequence[Site], among: Sequence[Site], params: RetrievalHeads) -> Family:
    """Heads corrected together, with the `band` of others that each is ranked among, of as many as that asks for."""
    least = max(params.null_heads, needed(len(heads), params.level))
    return {site: band(site, among, least) for site in heads}


def families(step: Step | Case, heads: Mapping[str, Sequence[Site]]) -> dict[str, Family]:
    """The heads put to the tests at each role. The candidates are a family of tests; so are the slice's own heads, at
    the last token."""
    inside, out = [site for site in step.slice() if site.component == "head"], {}
    for role, chosen in heads.items():
        each = [chosen, inside] if role == "last" else [chosen]
        among = others(step, role, heads)
        out[role] = {site: own for some in each for site, own in family_of(some, among, step.params).items()}
    return out


def named_family(step: Step | Case, heads: Mapping[str, Sequence[Site]]) -> Family:
    """The `named_heads`, a family of their own at the names: whoever named them looked at other results."""
    asked = named_heads(step)
    return family_of(asked, others(step, "names", heads), step.params) if asked else {}


def ablation_sets(step: Step | Case, heads: Mapping[str, Sequence[Site]]) -> Sets:
    """The sets of senders whose path is ablated, by role: the candidates together; each of them, of the slice's own
    heads and of the named ones alone; and, alone, each head that these are ranked among."""
    out = {}
    for role, family in families(step, heads).items():
        named = named_family(step, heads) if role == "names" else {}
        out[role] = [("together", tuple(heads[role]))] if heads[role] else []
        own = [site for site in family if site in heads[role] or speaks(site, step.slice())]
        out[role] += [("candidate" if site in heads[role] else "slice", (site,)) for site in own]
        out[role] += [("named", (site,)) for site in named if site not in family]
        among = {other for some in (family, named) for each in some.values() for other in each}
        out[role] += [("null", (site,)) for site in sorted(among)]
    return out


class Measured(NamedTuple):
    """What step 06 has measured, and what was chosen from it."""

    slice_sites: list[Site]
    probes: pd.DataFrame
    routes: dict[str, pd.DataFrame]  # effects of senders by half: "slice at names", "slice at last", ...
    groups: pd.DataFrame
    hops: pd.DataFrame  # what the last token reads, by reader and role
    attention: pd.DataFrame
    outputs: pd.DataFrame
    heads: dict[str, list[Site]]  # candidates by role
    families: dict[str, Family]  # heads put to the tests by role, and what each is ranked among
    named: Family  # those that the profile names, at the names
    sets: Sets
    ablation: pd.DataFrame
    senders: list[Site]  # the sites at the names that the two-hop path goes through
    edges: pd.DataFrame


def run(step: Step) -> Measured:
    """Measure, or read what is there."""
    p, sites, pairs = step.params, step.slice(), subject(step)
    step.sites_of("named_heads", p.named_heads)
    probes = step.table(PROBES_TABLE, people_asked(step)["name"].tolist())
    screened = with_gap(step.table(SENDERS, pairs))
    picked = {name: senders_table(rows, p) for name, rows in screened.groupby("receivers", sort=False)}
    roles = list(routes_of(step, pairs))
    heads = {role: candidates(picked[f"slice at {role}"], sites, p) for role in roles}
    asked, named = families(step, heads), named_family(step, heads) if "names" in roles else {}
    put = {role: [*asked[role], *(named if role == "names" else ())] for role in roles}
    heard = {role: [site for site in put[role] if speaks(site, sites)] for role in roles}
    leaders = {
        role: sorted({*leading(picked[f"slice at {role}"], FOLLOWED), *heard.get(role, ())})
        for role in screened_routes(step, pairs)
    }
    more = confirmed_units(step, pairs, leaders)
    both = pd.concat([screened, *([step.table(CONFIRMED, pairs, leaders)] if more else [])])
    by_route = {name: senders_table(rows, p) for name, rows in both.groupby("receivers", sort=False)}
    measured = [step.table(table, pairs) for table in (GROUPS, HOP_READS, ATTENTION, OUTPUTS)]
    measured[0] = by_kind(measured[0], sites)
    sets = ablation_sets(step, heads)
    none = pd.DataFrame(columns=COLUMNS)
    ablated = step.table(ABLATION, pairs, sets) if any(sets.values()) else none
    senders = leading(by_route["slice at names"], HOPS, p.floor) if "names" in roles else []
    edges = step.table(EDGES, senders)
    return Measured(sites, probes, by_route, *measured, heads, asked, named, sets, ablated, senders, edges)
