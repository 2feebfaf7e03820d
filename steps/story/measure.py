"""Step 10, measured: the smallest circuits, at `last` and over all tokens, and gradient attribution beside exact
effects.

1. `SEARCH` grows a circuit on discovery pairs by exact tests, and prunes it.
2. `ATTRIBUTION` estimates every head's, query's and MLP's effect by gradients, `EXACT` replaces each.
3. `tests_of` names what the page asks of the circuit: growing circuits in its order and in others, random ones, the
   circuit without each member, circuit and model without random subsets of it. `CIRCUITS` tests them all.
4. `PLACEBO`: the circuit in pairs of one superset whose names differ in another attribute.
5. `EVERYWHERE_SEARCH` and `EVERYWHERE`: the same for a circuit over all tokens, and the slice of step 04 and the
   circuit at `last` under its tests.

What is judged from this and from the earlier steps, the claims, is the page's (`steps.story.claims`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field

from lib import hooks
from lib.batches import grouped, with_donors
from lib.effects import in_halves, named
from lib.hooks import site_name
from lib.sweep import SHARED_ROW_TOKENS
from lib.tasks import Pair
from lib.weights import Shape
from pipeline import costs
from pipeline.assumed import Case
from pipeline.costs import Machine, Work, sweep_unit, total
from pipeline.declaration import SUPERSET_TASKS, Declaration, Table
from pipeline.params import OfSlice, Share, Words
from pipeline.step import Step, single_sites
from pipeline.units import Unit, subsample, sweep_units
from steps.story import attribution, circuits, everywhere
from steps.story.circuits import ALL, AT_LAST, BATCH, NOTHING, QUEUE, REFRESH, Circuit


class Story(OfSlice):
    """10: the claims ledger, the minimal circuit and the sentence."""

    pairs: int | None = Field(None, ge=1, description="pairs on which circuits are tested; default all")
    search_pairs: int = Field(40, ge=1, description="discovery pairs on which the circuit is searched")
    circuit_limit: int = Field(40, ge=1, description="most sites of a circuit")
    everywhere_limit: int = Field(160, ge=1, description="most sites, each at a role, of a circuit over all tokens")
    faithful_share: Share = Field(0.8, description="share of logit_diff that a faithful circuit keeps")
    random_sets: int = Field(10, ge=2, description="random circuits of each size")
    subsets: int = Field(20, ge=2, description="subsets of the circuit in the test of completeness")
    attribution_pairs: int = Field(
        32, ge=1, description="pairs on which gradient attribution is compared with patching"
    )
    claims: dict[str, float] = Field(default_factory=dict, description="threshold of each claim; none may be missing")
    left_out: Words = Field((), description="claims that are not asked: too few quads, or of each class too few")
    fresh: bool = Field(False, description="the people were kept aside until now; opened once, under one `frozen` hash")
    fresh_claims: str = Field(
        "", description="file of the verdicts on fresh people, which decide what was set after (python -m steps fresh)"
    )
    frozen: str = Field("", description="hash of thresholds and rules, if set before results (python -m steps freeze)")


LADDERS = 2  # of random circuits over all tokens, at each size of the curve
MEMBERS = 40  # of that circuit that are removed one by one: the last by attribution
# For the planner: sites of the circuit, and of that over all tokens, before they are pruned, as in the default book.
GROWN, GROWN_EVERYWHERE = 17, 160


# --- what is measured ---


def sites_of(step: Step | Case) -> list[str]:
    """What could be in the circuit: every head and MLP of the layers."""
    return [site_name(*site) for site in hooks.all_sites(step, ("head", "mlp"), step.layers)]


def of_one_kind(pairs: Sequence[Pair], pool: Sequence[Pair]) -> tuple[list[Pair], str]:
    """The pairs to which other quads of the pool can give values, and `resample`; where none can, all pairs and
    `counterfactual`."""
    able = with_donors(pairs, pool, "resample")
    return (able, "resample") if able else (list(pairs), "counterfactual")


def searched_pairs(step: Step | Case) -> tuple[list[Pair], str]:
    """Pairs of the discovery half (or the only one) for the search, and how what is not kept is ablated."""
    prompts = step.prompts()
    first = [pair for pair in prompts if pair.half == "discovery"] or prompts
    return of_one_kind(subsample(first, step.params.search_pairs), prompts)


def search_units(step: Step | Case) -> list[Unit]:
    """The search is one unit."""
    (pairs, kind), p = searched_pairs(step), step.params
    options = {"sites": sites_of(step), "share": p.faithful_share, "limit": p.circuit_limit, "ablation": kind}
    return [Unit("search", tuple(pairs), options)]


def nodes_of(step: Step | Case) -> list[str]:
    """What could be in the circuit over all tokens: the same at every role that the prompts have."""
    return [f"{site} at {role}" for role in circuits.roles_of(step.prompts()[0]) for site in sites_of(step)]


def everywhere_search_units(step: Step | Case) -> list[Unit]:
    """As `search_units`."""
    (unit,), limit = search_units(step), step.params.everywhere_limit
    return [Unit("search", unit.pairs, unit.options | {"sites": nodes_of(step), "limit": limit})]


def everywhere_units(step: Step | Case, tests: Mapping[str, Circuit]) -> list[Unit]:
    """All of the tests on the confirmation half (or the only one), the one called `circuit` also on the other, and
    from the corrupt prompt."""
    prompts, kind = step.prompts(), searched_pairs(step)[1]
    pairs, _ = of_one_kind(subsample(prompts, step.params.pairs), prompts)
    last = [pair for pair in pairs if pair.half == "confirmation"] or pairs
    circuit = {"circuit": tests["circuit"]}
    asked = [(kind, "tests", last, tests), (kind, "other", [pair for pair in pairs if pair not in last], circuit)]
    asked += [("counterfactual", "circuit", last, circuit)] * (kind != "counterfactual")
    return [
        Unit(f"{name}-{how}-{index:04d}", tuple(chunk), {"tests": which, "ablations": [how]})
        for how, name, own, which in asked
        for index, chunk in enumerate(grouped(own, 8))
    ]


def attributed_pairs(step: Step | Case) -> list[Pair]:
    """The pairs on which gradients and exact effects are compared."""
    return subsample(step.prompts(), step.params.attribution_pairs)


def attribution_units(step: Step | Case) -> list[Unit]:
    """Gradients and exact effects alike."""
    return sweep_units("pairs", attributed_pairs(step))


def circuit_units(step: Step | Case, tests: Mapping[str, Circuit]) -> list[Unit]:
    """All of the circuits under the ablation of the search, the one called `circuit` also from the corrupt prompt."""
    prompts, kind = step.prompts(), searched_pairs(step)[1]
    pairs, _ = of_one_kind(subsample(prompts, step.params.pairs), prompts)
    asked = (
        {kind: tests} if kind == "counterfactual" else {kind: tests, "counterfactual": {"circuit": tests["circuit"]}}
    )
    return [
        Unit(f"{how}-{index:04d}", tuple(chunk), {"tests": which, "ablations": [how]})
        for how, which in asked.items()
        for index, chunk in enumerate(grouped(pairs, 8))
    ]


def placebo_pairs(step: Step | Case) -> list[Pair]:
    """The kept placebo pairs (for the planner, all) of the confirmation half, or of the only one: no other is read."""
    pairs = step.placebo()
    if pairs and not isinstance(step, Case):
        rows = step.placebo_pairs()
        kept = set(rows.loc[rows["kept"], "pair_id"])
        pairs = [pair for pair in pairs if pair.pair_id in kept]
    return [pair for pair in pairs if pair.half == "confirmation"] or pairs


def placebo_units(step: Step | Case, tests: Mapping[str, Circuit]) -> list[Unit]:
    """The circuit in placebo pairs, all else from their corrupt prompts: few have donors among the task's prompts."""
    units, every = [], placebo_pairs(step)
    for classes in dict.fromkeys(pair.candidates for pair in every):
        pairs = subsample([pair for pair in every if pair.candidates == classes], step.params.pairs)
        options = {"tests": {"circuit": tests["circuit"]}, "ablations": ["counterfactual"]}
        units += [Unit(f"{'-'.join(classes)}-{n:04d}", tuple(own), options) for n, own in enumerate(grouped(pairs, 8))]
    return units


def donor_options(step: Step) -> dict[str, Any]:
    """Where resampled values come from, and what a pass may take (`circuits.ready`)."""
    return {"pool": step.prompts(), "seed": step.params.seed, "memory": step.memory}


def searched(step: Step, search: Callable[..., pd.DataFrame] = circuits.search) -> Callable[[Unit], pd.DataFrame]:
    """`circuits.search`, or another, of a unit."""
    how = donor_options(step)

    def compute(unit: Unit) -> pd.DataFrame:
        options = dict(unit.options)
        return search(step.model, unit.pairs, ablations=[options.pop("ablation")], **options, **how)

    return compute


def tested(step: Step, tests: Mapping[str, Circuit], roles: Sequence[str] = AT_LAST) -> Callable[[Unit], pd.DataFrame]:
    """`circuits.run` of a unit."""
    how = donor_options(step) | {"roles": roles}
    return lambda unit: circuits.run(step.model, unit.pairs, **unit.options, **how)


def tested_on_placebo(step: Step, tests: Mapping[str, Circuit]) -> Callable[[Unit], pd.DataFrame]:
    """As `tested`; its candidates are those of the pair's attribute."""

    def compute(unit: Unit) -> pd.DataFrame:
        frame = tested(step, tests)(unit)
        frame.attrs.pop("facts")
        return frame

    return compute


# --- what it costs ---


def circuit_work(
    shape: Shape,
    pairs: Sequence[Pair],
    tested: Sequence[Circuit],
    machine: Machine,
    plain: bool = True,
    roles: Sequence[str] = AT_LAST,
) -> Work:
    """Circuits tested on pairs (`circuits.run`), with the plain runs of both prompts if `plain`: a row of the tree is
    run in a module only where the circuit keeps something of it."""
    kept, out = circuits.kept_parts(shape, [ALL, NOTHING, *tested], roles), Work()
    for group in grouped(pairs):
        tokens, at = len(group[0].clean.ids), circuits.role_at(group[0], roles)
        tree, _ = circuits.branches(kept[..., at])
        limit = costs.limit_of(shape, tokens, tokens - len(at), machine.dtype, machine.memory)
        limit = min(limit, SHARED_ROW_TOKENS // len(at))
        attention = len(at) * (2 * shape.attention + 4 * shape.n_heads * shape.head_size * tokens)
        heads = sum(int(rows.kept[:, :-1].any((1, 2)).sum()) for rows in tree)
        mlps = sum(int(rows.kept[:, -1].sum()) for rows in tree)
        each = heads * attention + mlps * 2 * shape.mlp
        passes = -(-len(group) // max(1, limit // len(kept)))
        grown = {"grown" if len(at) == 1 else "spans": float(len(group) * each)}
        out += Work(passes=passes, light=len(group) * len(kept), **grown)
        if plain:
            out += costs.plain(shape, 2 * len(group), tokens, 2 * -(-len(group) // BATCH)) + Work(other={"jobs": 1})
    return out


def assumed_order(case: Case) -> tuple[list[str], int]:
    """Sites in a random order, and how many of them the circuit takes in."""
    names = sites_of(case)
    drawn = [names[index] for index in np.random.default_rng(0).permutation(len(names))]
    return drawn, min(GROWN, case.params.circuit_limit, len(drawn) - 1)


def search_cost(case: Case, units: Sequence[Unit]) -> Work:
    """Every size that the circuit grows through, and one round of pruning."""
    (drawn, size), pairs = assumed_order(case), units[0].pairs
    work = circuit_work(case.shape, pairs, [], case.machine) + Work(table=20 * 100 * size)
    rounds = [([[*drawn[:count], site] for site in drawn[count : count + QUEUE]], count) for count in range(size)]
    for queue, count in [*rounds, ([drawn[:size]] * size, -1)]:
        asked = len(drawn) - count if count in REFRESH else len(queue)
        one = [Circuit(True, tuple(kept)) for kept in queue]
        work += circuit_work(case.shape, pairs, one, case.machine, plain=False).times(asked / len(queue))
    return work


def assumed_nodes(case: Case) -> tuple[list[str], int]:
    """As `assumed_order`, of the circuit over all tokens."""
    names = nodes_of(case)
    drawn = [names[index] for index in np.random.default_rng(0).permutation(len(names))]
    return drawn, min(GROWN_EVERYWHERE, case.params.everywhere_limit, len(drawn) - 1)


def everywhere_search_cost(case: Case, units: Sequence[Unit]) -> Work:
    """Gradients, the ladder and what is between two of its sizes, and the rounds of pruning."""
    (drawn, size), pairs = assumed_nodes(case), units[0].pairs
    each = {"machine": case.machine, "plain": False, "roles": circuits.EVERYWHERE}
    ladder = [drawn[:own] for own in everywhere.ladder(min(case.params.everywhere_limit, len(drawn)))]
    between = [drawn[:size]] * everywhere.TOGETHER
    asked = [ladder, between, between]
    for chunk in everywhere.CHUNKS:
        asked += [[[*drawn[:at], *drawn[at + chunk : size]] for at in range(0, size, chunk)], between, between]
    work = circuit_work(case.shape, pairs, [], case.machine, roles=circuits.EVERYWHERE)
    for kept in asked:
        work += circuit_work(case.shape, pairs, [Circuit(True, tuple(own)) for own in kept], **each)
    for group in grouped(pairs):
        whole = circuits.tokens_of(group[0], circuits.EVERYWHERE)
        rows = 3 * everywhere.POINTS * len(group)  # forward, and backward towards the input alone
        work += Work(passes=2, spans=costs.of_rows(case.shape, [0] * rows, len(whole), whole.stop))
    return work + Work(table=20 * len(units[0].options["sites"]))


def node_rows(case: Case, units: Sequence[Unit]) -> int:
    """Heads, queries and MLPs of every pair."""
    return case.n_layers * (2 * case.n_heads + 1) * sum(len(unit.pairs) for unit in units)


def attribution_cost(case: Case, units: Sequence[Unit]) -> Work:
    """Forward and backward of the last token, a row for every layer dropped (`attribution.attribute`)."""
    shape, out = case.shape, Work(table=27 * node_rows(case, units))
    for unit in units:
        count, tokens = len(unit.pairs), len(unit.pairs[0].clean.ids)
        rows = count * (1 + shape.n_layers)
        # backward: towards the input alone, no weight has a gradient
        grown = 2 * costs.of_rows(shape, [0] * rows, 1, tokens) + costs.of_rows(shape, [0] * 3 * count, 1, tokens)
        out += costs.plain(shape, 2 * count, tokens)
        out += Work(passes=4, grown=grown, light=rows, other={"jobs": 1})
    return out


def exact_cost(case: Case, units: Sequence[Unit]) -> Work:
    """Every head and MLP replaced, and every query."""
    each = [{"components": components} for components in (["head", "mlp"], ["head"])]
    work = total(sweep_unit(case.shape, unit.pairs, how, case.machine) for how in each for unit in units)
    return work + Work(table=5 * node_rows(case, units))


def circuits_cost(
    case: Case, units: Sequence[Unit], tests: Mapping[str, Circuit], roles: Sequence[str] = AT_LAST
) -> Work:
    """The circuits of each unit."""
    work = Work()
    for unit in units:
        asked, rows = list(unit.options["tests"].values()), len(unit.pairs) * len(unit.options["tests"])
        work += circuit_work(case.shape, unit.pairs, asked, case.machine, roles=roles) + Work(table=39 * rows)
    return work


SEARCH = Table("search", search_units, searched, search_cost, schema=circuits.SEARCH_SCHEMA)
ATTRIBUTION = Table(
    "attribution",
    attribution_units,
    lambda step: lambda unit: attribution.attribute(step.model, unit.pairs),
    attribution_cost,
    schema=attribution.SCHEMA,
)
EXACT = Table(
    "exact",
    attribution_units,
    lambda step: lambda unit: attribution.exact(step.model, unit.pairs, step.memory),
    exact_cost,
    schema=attribution.EXACT_SCHEMA,
)
CIRCUITS = Table("circuits", circuit_units, tested, circuits_cost, schema=circuits.SCHEMA)
PLACEBO = Table("placebo", placebo_units, tested_on_placebo, circuits_cost, schema=circuits.SCHEMA)
EVERYWHERE_SEARCH = Table(
    "everywhere_search",
    everywhere_search_units,
    lambda step: searched(step, everywhere.search),
    everywhere_search_cost,
    schema=everywhere.SCHEMA,
)
EVERYWHERE = Table(
    "everywhere",
    everywhere_units,
    lambda step, tests: tested(step, tests, circuits.EVERYWHERE),
    lambda case, units, tests: circuits_cost(case, units, tests, circuits.EVERYWHERE),
    schema=circuits.SCHEMA,
)


def assumed(case: Case) -> Iterator[tuple[Any, ...]]:
    """The tables in order; the circuit is as large as the default book's, and nothing was pruned."""
    yield from ((SEARCH,), (ATTRIBUTION,), (EXACT,))
    drawn, size = assumed_order(case)
    rows = [("grow", number, site, 1.0, True) for number, site in enumerate(drawn[:size])]
    search = pd.DataFrame(rows, columns=list(circuits.SEARCH_SCHEMA.columns))
    orders = dict.fromkeys(("recovery", "damage", "attribution"), sorted(drawn))
    subsets = subsets_of(drawn[:size], case.params.subsets, case.rng())
    tests = tests_of(search, orders, drawn, subsets, case.params, case.rng())
    yield CIRCUITS, tests
    if placebo_units(case, tests):
        yield PLACEBO, tests
    yield (EVERYWHERE_SEARCH,)
    nodes, kept = assumed_nodes(case)
    others = {"slice": [site_name(*site) for site in case.slice()], "last": drawn[:size]}
    rows = [("grow", number, site, 1.0, number < kept) for number, site in enumerate(nodes)]
    search = pd.DataFrame(rows, columns=list(everywhere.SCHEMA.columns))
    yield EVERYWHERE, everywhere_tests(search, others, nodes_of(case), case.params, case.rng())[1]


STEP = Declaration(
    "story",
    Story,
    assumed,
    layered=True,
    tasks=SUPERSET_TASKS,
    always=True,
    placebo=True,
    reads={"sufficiency": ("critical_slice",)},
    reads_tables=("sufficiency", "necessity"),
    page_keys=("claims", "left_out", "fresh", "fresh_claims", "frozen"),
    page_files=("data/filter_heads_llama-3.3-70b.csv", "data/claims.yaml", "data/claims.schema.json", "fresh_claims"),
    extra_files=("claims.json",),
)


# --- what is chosen ---


def grown(search: pd.DataFrame) -> list[str]:
    """Sites in the order in which they joined."""
    return search.loc[search["chosen"] & (search["phase"] == "grow"), "site"].tolist()


def circuit_of(search: pd.DataFrame) -> list[str]:
    """The circuit: what was grown, less what was pruned."""
    gone = set(search.loc[search["chosen"] & (search["phase"] == "prune"), "site"])
    return [site for site in grown(search) if site not in gone]


def subsets_of(sites: Sequence[str], count: int, rng: np.random.Generator) -> list[tuple[str, ...]]:
    """Random subsets of the circuit, every member in each with probability one half; none empty or the whole."""
    if len(sites) < 2:
        return []
    drawn = [rng.permutation(len(sites))[: 1 + rng.binomial(len(sites) - 2, 0.5)] for _ in range(count)]
    return [tuple(sites[index] for index in sorted(members)) for members in drawn]


def ranked(table: pd.DataFrame, value: str, sites: Sequence[str]) -> list[str]:
    """Those of the sites that are in a table by their mean on the discovery half (or the only one), largest first."""
    rows = in_halves(table)[0][1]
    rows = rows.assign(site=named(rows))
    return rows[rows["site"].isin(sites)].groupby("site")[value].mean().sort_values(ascending=False).index.tolist()


def tests_of(
    search: pd.DataFrame,
    orders: Mapping[str, Sequence[str]],
    everything: Sequence[str],
    subsets: Sequence[Sequence[str]],
    params: Story,
    rng: np.random.Generator,
) -> dict[str, Circuit]:
    """Every circuit that the page asks about, by name."""
    sites, path = circuit_of(search), grown(search)
    out = {"circuit": Circuit(True, tuple(sites)), "necessity": Circuit(False, tuple(sites))}
    step = max(1, params.circuit_limit // 10)
    sizes = sorted({1, 2, len(path), *range(step, params.circuit_limit + 1, step)})
    for order, ranking in {"circuit": path, **orders}.items():
        out |= {f"{order} {size}": Circuit(True, tuple(ranking[:size])) for size in sizes if size <= len(ranking)}
    for number in range(params.random_sets):
        drawn = [everything[index] for index in rng.permutation(len(everything))]
        out |= {f"random {size} {number}": Circuit(True, tuple(drawn[:size])) for size in sizes if size <= len(drawn)}
    for site in sites:
        out[f"member {site}"] = Circuit(True, tuple(other for other in sites if other != site))
    for number, subset in enumerate(subsets):
        out[f"kept {number}"] = Circuit(True, tuple(site for site in sites if site not in subset))
        out[f"model {number}"] = Circuit(False, tuple(subset))
    return out


def everywhere_tests(
    search: pd.DataFrame,
    others: Mapping[str, Sequence[str]],
    nodes: Sequence[str],
    params: Story,
    rng: np.random.Generator,
) -> tuple[list[tuple[str, ...]], dict[str, Circuit]]:
    """Subsets of the circuit over all tokens, and every circuit that the page asks about beside it, by name.

    `others` are sites at `last` by the name of their set. Random circuits have as many nodes at each role as those
    before them in the ranking, or as the circuit; the latter are also `removed`. Of every set: `alone` keeps it and
    nothing else, `there` resamples what is not in it at `last` alone, `removed` resamples it alone.
    """
    sites, order = circuit_of(search), search.loc[search["phase"] == "grow", "site"].tolist()
    subsets, out = subsets_of(sites, params.subsets, rng), {"circuit": Circuit(True, tuple(sites))}
    out["necessity"] = Circuit(False, tuple(sites))
    # the curve goes on to all nodes, so that it can be seen where it reaches what a circuit of the limit may not
    growing = {size: order[:size] for size in everywhere.ladder(len(order))}
    out |= {f"attribution {size}": Circuit(True, tuple(own)) for size, own in growing.items()}
    growing = {size: own for size, own in growing.items() if size <= params.everywhere_limit}
    for number in range(params.random_sets):
        drawn = [nodes[index] for index in rng.permutation(len(nodes))]
        for size, own in ((growing if number < LADDERS else {}) | {len(sites): sites}).items():
            alike = [name for role, count in at_roles(own).items() for name in at_role(drawn, role)[:count]]
            out[f"random {size} {number}"] = Circuit(True, tuple(alike))
            if own is sites:
                out[f"random removed {number}"] = Circuit(False, tuple(alike))
    for site in sites[-MEMBERS:]:
        out[f"member {site}"] = Circuit(True, tuple(other for other in sites if other != site))
    for number, subset in enumerate(subsets):
        out[f"kept {number}"] = Circuit(True, tuple(site for site in sites if site not in subset))
        out[f"model {number}"] = Circuit(False, tuple(subset))
    for role in at_roles(sites):
        out[f"without {role}"] = Circuit(True, tuple(site for site in sites if not site.endswith(f" at {role}")))
    sets = {name: [f"{site} at last" for site in own] for name, own in others.items()} | {"everywhere": sites}
    for name, own in sets.items():
        rest = [node for node in at_role(nodes, "last") if node not in own]
        out |= {f"{name} alone": Circuit(True, tuple(own)), f"{name} removed": Circuit(False, tuple(own))}
        out[f"{name} there"] = Circuit(False, tuple(rest))
    for site in dict.fromkeys(site for own in sets.values() for site in at_role(own, "last")):
        out[f"single {site}"] = Circuit(False, (site,))
    return subsets, out


def at_role(nodes: Iterable[str], role: str) -> list[str]:
    """Those of the nodes that are at a role."""
    return [node for node in nodes if node.endswith(f" at {role}")]


def at_roles(nodes: Iterable[str]) -> dict[str, int]:
    """How many of the nodes are at each role."""
    return dict(Counter(node.partition(" at ")[2] for node in nodes))


class Everywhere(NamedTuple):
    """The circuit over all tokens; fields as in `Measured`."""

    sites: list[str]  # nodes that could be in it
    search: pd.DataFrame
    subsets: list[tuple[str, ...]]
    tests: dict[str, Circuit]
    ablation: str
    tested: pd.DataFrame


class Measured(NamedTuple):
    """What step 10 has measured, and what was chosen from it."""

    sites: list[str]  # that could be in the circuit
    search: pd.DataFrame
    gradients: pd.DataFrame
    exact: pd.DataFrame
    subsets: list[tuple[str, ...]]  # of the circuit
    tests: dict[str, Circuit]
    ablation: str  # of what is not kept
    tested: pd.DataFrame  # the circuits
    placebo: pd.DataFrame | None = None  # the circuit in placebo pairs, with their `attribute`; kept ones alone
    everywhere: Everywhere | None = None


def run(step: Step) -> Measured | None:
    """Measure, or read what is there; None where the model does not do the task."""
    if not step.able():
        return None
    p, sites = step.params, sites_of(step)
    search, gradients, exact = step.table(SEARCH), step.table(ATTRIBUTION), step.table(EXACT)
    orders = {"damage": ranked(exact, "exact", sites), "attribution": ranked(gradients, "atp", sites)}
    single = single_sites(step)
    if len(single):
        rise = single["logit_diff_after"] - single["logit_diff_before"]
        orders = {"recovery": ranked(single.assign(rise=rise), "rise", sites)} | orders
    subsets = subsets_of(circuit_of(search), p.subsets, step.rng("subsets"))
    tests = tests_of(search, orders, sites, subsets, p, step.rng("random circuits"))
    tested = step.table(CIRCUITS, tests)
    kind, placebo = searched_pairs(step)[1], None
    if placebo_units(step, tests):
        about = step.placebo_pairs().set_index("pair_id")[["attribute"]]
        placebo = step.table(PLACEBO, tests).join(about, on="pair_id")
    over_all = run_everywhere(step, circuit_of(search))
    return Measured(sites, search, gradients, exact, subsets, tests, kind, tested, placebo, over_all)


def run_everywhere(step: Step, last: Sequence[str]) -> Everywhere:
    """The circuit over all tokens, beside the slice and the circuit at `last`."""
    search, nodes = step.table(EVERYWHERE_SEARCH), nodes_of(step)
    others = {"slice": [site_name(*site) for site in step.slice()], "last": last}
    subsets, tests = everywhere_tests(search, others, nodes, step.params, step.rng("circuits over all tokens"))
    return Everywhere(nodes, search, subsets, tests, searched_pairs(step)[1], step.table(EVERYWHERE, tests))
