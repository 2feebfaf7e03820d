"""Which paths step 06 measures: the work units of its path patching, from the slice to the verification.

A route says at which role a slice's inputs are read. `NAMES`: the keys and values of its heads at the names' tokens.
`LAST`: everything that its heads and MLPs are given at the last token. `INSIDE`: what a site at the names is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lib import paths as path_patching
from lib.hooks import EMBED, Model, Site, site_name
from lib.tasks import Pair
from pipeline.params import ParameterError
from pipeline.units import Unit, has_donors, sweep_units

NAMES = {"k": "names", "v": "names"}
LAST = {"q": "last", "k": "last", "v": "last", "mlp": "last"}
INSIDE = {"q": "names", "k": "names", "v": "names", "mlp": "names"}
ANSWER = {"final": "last"}
READS = {"k and v": NAMES, "v": {"v": "names"}, "k": {"k": "names"}}
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


def sites_that_read(slice_sites: Sequence[Site]) -> list[Site]:
    """The slice's heads. ParameterError when it has none: this step asks what heads read at the names."""
    heads = [site for site in slice_sites if site.component != "mlp"]
    if not heads:
        raise ParameterError(
            "the slice has no heads, and step 06 asks what its heads read at the names; name a slice that has some: "
            "-p slice_sites 21.6,mlp 23"
        )
    return heads


def groups(slice_sites: Sequence[Site], n_heads: int) -> list[tuple[Site, ...]]:
    """GROUPS as sets of senders: everything before the slice's last head, and its kinds apart."""
    layers = range(max(site.layer for site in sites_that_read(slice_sites)))
    mlps = tuple(Site(layer, "mlp") for layer in layers)
    heads = tuple(Site(layer, "head", head) for layer in layers for head in range(n_heads))
    return [(EMBED, *heads, *mlps), (EMBED,), mlps, heads]


def group_units(pairs: Sequence[Pair], slice_sites: Sequence[Site], n_heads: int) -> list[Unit]:
    """GROUPS into the slice's heads at the names: keys and values together and apart, and together with MLPs frozen."""
    sets, heads = groups(slice_sites, n_heads), sites_that_read(slice_sites)
    how = [("recomputed", kind) for kind in READS] + [("frozen", "k and v")]
    return [unit for mlps, kind in how for unit in paths(f"{kind} at names", pairs, heads, READS[kind], mlps, sets)]


def edge_units(pairs: Sequence[Pair], senders: Sequence[Site], slice_sites: Sequence[Site], mlps: str) -> list[Unit]:
    """The two-hop path edge by edge: names -> sites at the names -> slice heads -> later slice sites -> answer."""
    heads, units = sites_that_read(slice_sites), []
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


def random_sets(
    heads: Sequence[Site], excluded: Iterable[Site], n_heads: int, count: int, rng: np.random.Generator
) -> list[tuple[Site, ...]]:
    """`count` sets that match the heads: as many heads of the same layers, none of them in the set or `excluded`.

    A layer without enough other heads gives those it has.
    """
    taken, sets = {*heads, *excluded}, []
    for _ in range(count):
        own: list[Site] = []
        for layer in sorted({site.layer for site in heads}):
            free = [Site(layer, "head", head) for head in range(n_heads)]
            free = [site for site in free if site not in taken]
            wanted = min(len(free), sum(site.layer == layer for site in heads))
            own += [free[index] for index in rng.choice(len(free), wanted, replace=False)] if wanted else []
        sets.append(tuple(own))
    return list(dict.fromkeys(sets))


def singles(heads: Sequence[Site], excluded: Iterable[Site], n_heads: int) -> list[tuple[Site, ...]]:
    """Every other head of the heads' layers, alone: what a single head's path is compared with."""
    taken = {*heads, *excluded}
    layers = sorted({site.layer for site in heads})
    every = (Site(layer, "head", head) for layer in layers for head in range(n_heads))
    return [(site,) for site in every if site not in taken]


def ablation_sets(
    candidates: Sequence[Site], slice_sites: Sequence[Site], role: str, n_heads: int, count: int, rng: Any
) -> list[tuple[str, tuple[Site, ...]]]:
    """The sets of senders whose path is ablated, with their kind: candidates together and alone, the slice's own heads
    at `last`, and matched random heads, together and alone."""
    own = sites_that_read(slice_sites)
    last = max(site.layer for site in slice_sites)
    inside = [site for site in own if role == "last" and site.layer < last]
    sets = [("together", tuple(candidates))] if candidates else []
    sets += [("candidate", (site,)) for site in candidates] + [("slice", (site,)) for site in inside]
    sets += [("random", alone) for alone in singles([*candidates, *inside], slice_sites, n_heads)]
    if candidates:
        drawn = random_sets(candidates, slice_sites, n_heads, count, rng)
        sets += [("random together", some) for some in drawn if some]
    return sets


def ablation_units(
    role: str, sets: Sequence[tuple[str, tuple[Site, ...]]], pairs: Sequence[Pair], sites: Sequence[Site], mlps: str
) -> list[Unit]:
    """The paths of these sets from a role into the slice, resampled; counterfactual where no pair has another quad of
    its half and token counts to take a resample from."""
    route, into = (NAMES, sites_that_read(sites)) if role == "names" else (LAST, sites)
    kind = "resample" if any(has_donors(pair, pairs) for pair in pairs) else "counterfactual"
    senders = [together for _, together in sets]
    return paths(f"slice at {role}", pairs, into, route, mlps, senders, kind) if senders else []


def one_name_rows(pairs: pd.DataFrame, template: str = "profession_is") -> pd.DataFrame:
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
