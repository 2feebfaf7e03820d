"""Which paths step 06 measures: the work units of its path patching, from the slice to the verification.

A route says at which role a slice's inputs are read. `NAMES`: the keys and values of its heads at the names' tokens.
`BETWEEN`: the same at the tokens between the names and the last one, to which the names have spoken before. `LAST`:
everything that its heads and MLPs are given at the last token. `INSIDE`: what a site at the names is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lib import paths as path_patching
from lib.batches import with_donors
from lib.hooks import EMBED, Model, Site, site_name
from lib.paths import MLPS
from lib.tasks import Pair
from pipeline.units import Unit, sweep_units

NAMES = {"k": "names", "v": "names"}
BETWEEN = {"k": "between", "v": "between"}
LAST = {"q": "last", "k": "last", "v": "last", "mlp": "last"}
INSIDE = {"q": "names", "k": "names", "v": "names", "mlp": "names"}
ANSWER = {"final": "last"}
READS = {"k and v": NAMES, "v": {"v": "names"}, "k": {"k": "names"}}
QUERIES = {"q": "last"}
GROUPS = ("everything", "embedding", "MLPs", "heads")


def paths(
    label: str,
    pairs: Sequence[Pair],
    into: Sequence[Site],
    route: Mapping[str, str],
    mlps: str,
    senders: Sequence[Sequence[Site]] | None = None,
    ablation: str = "counterfactual",
) -> list[Unit]:
    """Units of path patching into sites by a route; senders (default: all, singly) at the route's own role."""
    role = next(iter(route.values()))
    options = {"into": (tuple(into), dict(route)), "sender_role": role, "mlps": mlps, "label": label}
    if senders is not None:
        options["senders"] = tuple(tuple(together) for together in senders)
    return sweep_units(label.replace(" ", "-"), pairs, ablations=[ablation], **options)


def run(model: Model, pairs: Sequence[Pair], *, into: tuple, **options: Any) -> pd.DataFrame:
    """A unit of `paths`: path patching into the receivers that the sites have by the route."""
    receivers = path_patching.receivers_of(model, *into)
    return path_patching.run(model, pairs, receivers=receivers, **options)


def heads_of(slice_sites: Sequence[Site]) -> list[Site]:
    """The slice's heads (or whole attention modules): what of it reads other tokens than its own."""
    return [site for site in slice_sites if site.component != "mlp"]


def speaks(site: Site, into: Sequence[Site]) -> bool:
    """Whether a head comes before one of these sites."""
    return any(site.layer < other.layer or (site.layer == other.layer and other.component == "mlp") for other in into)


def groups(into: Sequence[Site], n_heads: int) -> list[tuple[Site, ...]]:
    """GROUPS as sets of senders: everything before the last of the sites that hear them, and its kinds apart; a kind
    that nothing comes before is empty. An MLP hears the heads of its own layer."""
    last = max(site.layer for site in into)
    own_heads = Site(last, "mlp") in into
    mlps = tuple(Site(layer, "mlp") for layer in range(last))
    heads = tuple(Site(layer, "head", head) for layer in range(last + own_heads) for head in range(n_heads))
    return [(EMBED, *heads, *mlps), (EMBED,), mlps, heads]


def modules(into: Sequence[Site]) -> list[tuple[Site, ...]]:
    """Every attention module and MLP before the last of the sites that hear them, each alone."""
    layers = range(max(site.layer for site in into))
    return [(Site(layer, component),) for layer in layers for component in ("attn", "mlp")]


def group_units(pairs: Sequence[Pair], slice_sites: Sequence[Site], n_heads: int) -> list[Unit]:
    """GROUPS into the slice's heads at the names: keys and values together and apart, and together with MLPs frozen;
    everything into their queries at the last token. Into the MLPs' inputs there where the slice has no heads."""
    into = heads_of(slice_sites)
    sets = [own for own in groups(into or slice_sites, n_heads) if own]
    if not into:
        label = "MLP inputs at last"
        return [unit for mlps in MLPS for unit in paths(label, pairs, slice_sites, LAST, mlps, sets)]
    how = [("recomputed", kind) for kind in READS] + [("frozen", "k and v")]
    units = [unit for mlps, kind in how for unit in paths(f"{kind} at names", pairs, into, READS[kind], mlps, sets)]
    return units + paths("q at last", pairs, into, QUERIES, "recomputed", sets[:1])


def edge_units(pairs: Sequence[Pair], senders: Sequence[Site], slice_sites: Sequence[Site], mlps: str) -> list[Unit]:
    """The two-hop path edge by edge: names -> sites at the names -> slice heads -> later slice sites -> answer."""
    heads, units = heads_of(slice_sites), []
    senders = [site for site in senders if site != EMBED]
    for site in senders:
        units += paths(f"{site_name(*site)} at names", pairs, [site], INSIDE, mlps, [(EMBED,)])
    for head in heads:
        if earlier := [(site,) for site in senders if site.layer < head.layer]:
            units += paths(site_name(*head), pairs, [head], NAMES, mlps, earlier)
    for later in slice_sites:
        same = {"head"} if later.component == "mlp" else set()
        earlier = [s for s in slice_sites if s.layer < later.layer or (s.layer == later.layer and s.component in same)]
        if earlier := [(site,) for site in earlier if site != later]:
            units += paths(site_name(*later), pairs, [later], LAST, mlps, earlier)
    return units + paths("answer", pairs, slice_sites[:0], ANSWER, "frozen", [(site,) for site in slice_sites])


def ablation_units(
    role: str, sets: Sequence[tuple[str, tuple[Site, ...]]], pairs: Sequence[Pair], sites: Sequence[Site], mlps: str
) -> list[Unit]:
    """The paths of these sets from a role into the slice, resampled; counterfactual where no pair has another quad of
    its half and token counts to take a resample from."""
    route, into = (NAMES, heads_of(sites)) if role == "names" else (LAST, sites)
    kind = "resample" if with_donors(pairs, pairs, "resample") else "counterfactual"
    senders = [together for _, together in sets]
    return paths(f"slice at {role}", pairs, into, route, mlps, senders, kind) if senders else []


def one_name_rows(pairs: pd.DataFrame, template: str) -> pd.DataFrame:
    """The one-name pairs in a table of pairs: each name against the one in its place, one row for each two people."""
    rows, taken = [], set()
    for row in pairs.to_dict("records"):
        for slot in "ab":
            names = (row[f"clean_{slot}"], row[f"corrupt_{slot}"])
            if names[0] == names[1] or frozenset(names) in taken:
                continue
            taken.add(frozenset(names))
            own = {key: row[key] for key in ("quad_id", "half", "answer", "corrupt_answer")}
            own |= {"pair_id": f"{row['pair_id']}{slot}", "task": "one_name", "template": template}
            rows.append(own | {"clean_a": names[0], "corrupt_a": names[1]})
    return pd.DataFrame(rows)
