"""The slice ablated at `last`: who lights up after it? The total effect of each pair, split into its parts.

1. The clean prompts are run plainly. Their last token is then run again over the kept KV cache, in one pass: intact,
   and once for each slice and kind of ablation. Nothing before the last token differs, so it is not computed again.
2. Every head's and MLP's output in each of these runs becomes its *direct effect* on logit_diff (`lib.readout`): its
   own vector, after a post-attention or post-MLP norm where the architecture has one, through the final norm at the
   scale of the *intact* run, onto the unembedding of answer minus corrupt answer, before any soft cap.
3. The total change of logit_diff is the sum of the changes of these direct effects and of the final norm's scale:
   slice + later heads + later MLPs + (ablated residual . direction) x (1/s_ablated - 1/s_intact). What is left over is
   rounding; more than that stops the step (`residual`).

Sources: McGrath et al. 2023 (arXiv 2307.15771: direct effects before and after an ablation); Rushing and Nanda 2024
(arXiv 2402.15390: self-repair, and the final norm's share in it).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import pandera.pandas as pa_schema
import torch
from jaxtyping import Float
from torch import Tensor

from lib import hooks
from lib.batches import ablated, grouped, pooled, token_ids
from lib.hooks import NOISE, Model, Site
from lib.readout import PostNorms, Readout, post_norms, readout
from lib.records import ABLATIONS
from lib.single_pass import Activations, BaseRun, Edit, Row, SweepError, base_run, edits_by_module, rerun
from lib.tasks import Pair

PARTS = ("total", "direct", "heads", "mlps", "scale", "residual")

_finite = pa_schema.Check(np.isfinite, name="finite")
# One row per pair, ablation and part; `direct`, `heads` and `mlps` have a row per site. Logits, before any soft cap:
# `before` in the intact run, `after` in the ablated one. `slice` names what was ablated.
SCHEMA = pa_schema.DataFrameSchema(
    {name: pa_schema.Column(str) for name in ("task", "template", "pair_id", "quad_id")}
    | {
        "half": pa_schema.Column(str, pa_schema.Check.isin(["discovery", "confirmation"])),
        "seed": pa_schema.Column("int64", pa_schema.Check.ge(0)),
        "slice": pa_schema.Column(str),
        "ablation": pa_schema.Column(str, pa_schema.Check.isin(ABLATIONS)),
        "part": pa_schema.Column(str, pa_schema.Check.isin(PARTS)),
        "layer": pa_schema.Column("int32", pa_schema.Check.ge(-1)),  # -1, "" and -1 where the part is no site
        "component": pa_schema.Column(str, pa_schema.Check.isin(["", "head", "mlp", "attn"])),
        "head": pa_schema.Column("int32", pa_schema.Check.ge(-1)),
        "before": pa_schema.Column("float64", _finite),
        "after": pa_schema.Column("float64", _finite),
    },
    strict=True,
    ordered=True,
    unique=["pair_id", "seed", "slice", "ablation", "part", "layer", "component", "head"],
    name="table of direct effects",
)


class Reading(NamedTuple):
    """What direct effects are read with."""

    out: Readout
    post: list[PostNorms]


class LastToken(NamedTuple):
    """Runs of the last token: the intact rows lead."""

    hidden: Float[Tensor, "rows hidden"]
    kept: dict[tuple[str, int], Float[Tensor, "rows width"]]  # by (component, layer)


def turn(site: Site) -> tuple[int, bool]:
    """When a site is computed: attention comes before the MLP of its block."""
    return site.layer, site.component == "mlp"


def members(sites: Sequence[Site]) -> list[Site]:
    """The slice without heads whose whole attention module is in it."""
    return [site for site in sites if site.component != "head" or Site(site.layer, "attn") not in sites]


def later_sites(sites: Sequence[Site], n_layers: int, n_heads: int, tied: Collection[int] = ()) -> list[Site]:
    """Every head and MLP computed after the slice's first site and not in it; attention comes before the MLP of its
    block. In the layers `tied`, a post-attention norm ties heads beside one that is ablated to it: they are among
    them."""
    first = min(map(turn, sites))
    every = (
        Site(layer, *part)
        for layer in range(first[0], n_layers)
        for part in (*(("head", head) for head in range(n_heads)), ("mlp",))
    )
    return [
        site
        for site in every
        if (turn(site) > first or (turn(site) == first and site.layer in tied))
        and site not in sites
        and not (site.component == "head" and Site(site.layer, "attn") in sites)
    ]


def random_slices(
    n_layers: int, n_heads: int, sites: Sequence[Site], rng: np.random.Generator, count: int = 3
) -> dict[str, list[Site]]:
    """Controls of the slice's make-up outside it, by name: as many other heads of the same layers, and as many MLPs and
    attention modules of other layers from its first one on (fewer where there are not as many)."""
    first, out = min(site.layer for site in sites), {}

    def others(every: Sequence[int], own: Sequence[int]) -> list[int]:
        rest = [index for index in every if index not in own]
        return sorted(int(index) for index in rng.permutation(rest)[: len(own)])

    for number in range(1, count + 1):
        chosen = [
            Site(layer, "head", head)
            for layer in sorted({site.layer for site in sites if site.component == "head"})
            for head in others(range(n_heads), [s.head for s in sites if s.layer == layer and s.component == "head"])
        ]
        for component in ("mlp", "attn"):
            own = [site.layer for site in sites if site.component == component]
            chosen += [Site(layer, component) for layer in others(range(first, n_layers), own)]
        out |= {f"random {number}": chosen} if chosen else {}
    return out


def run(
    model: Model,
    pairs: Sequence[Pair],
    *,
    slices: Mapping[str, Sequence[Site]],
    ablations: Sequence[str] = ("resample", "zero"),
    pool: Sequence[Pair] | None = None,
    pools: dict | None = None,
    seed: int = 0,
    reading: Reading | None = None,
) -> pd.DataFrame:
    """Split the effect of ablating each slice, all its sites together, for every pair and ablation (`SCHEMA`).

    `pool` and `pools` are as in `sweep.run`: the same prompts lend the same values. ValueError for a slice without
    sites or with sites that the model lacks; SweepError when a row does not prove itself.
    """
    for name, sites in slices.items():
        if not sites:
            raise ValueError(f"slice {name!r} has no sites")
        for site in sites:
            hooks.check_site(model, site)
    reading = reading or Reading(readout(model), post_norms(model))
    kept = {} if pools is None else pools
    frames = [
        split(model, group, slices, tuple(ablations), pool or pairs, kept, seed, reading) for group in grouped(pairs)
    ]
    return pd.concat(frames, ignore_index=True)


def split(
    model: Model,
    pairs: list[Pair],
    slices: Mapping[str, Sequence[Site]],
    kinds: tuple[str, ...],
    pool: Sequence[Pair],
    pools: dict,
    seed: int,
    reading: Reading,
) -> pd.DataFrame:
    """`run` for pairs of one group."""
    sets = [tuple(sites) for sites in slices.values()]
    components = sorted({site.component for sites in sets for site in sites})
    where = pairs[0].clean.roles["last"]
    base = base_run(model, token_ids(model, [pair.clean.ids for pair in pairs]), where, components)
    other = base  # of which only the shapes are read, unless it is the source
    if "counterfactual" in kinds:
        other = base_run(model, token_ids(model, [pair.corrupt.ids for pair in pairs]), where, components)
    donors = partial(pooled, model, pools, pool, pairs[0], "last", sets)
    sources = ablated(kinds, pairs, other.activations, donors, seed)
    rows = [
        Row(sites, owner, kind * len(pairs) + owner)
        for sites in sets
        for kind in range(len(kinds))
        for owner in range(len(pairs))
    ]
    runs = last_token(model, base, rows, sources)
    prove(model, base, runs, rows, sources, pairs)
    owner = torch.tensor([*range(len(pairs)), *(row.owner for row in rows)])
    tokens = torch.tensor([[p.clean_tokens[p.answer], p.clean_tokens[p.corrupt_answer]] for p in pairs])
    weights, bias = model.unembedding(tokens)
    wanted = weights.detach().cpu().double()
    biases = torch.zeros(len(pairs), 2) if bias is None else bias.cpu()
    difference = (wanted[:, 0] - wanted[:, 1])[owner]
    logit_diff = (runs.hidden.cpu().double() * difference).sum(-1) + (biases[:, 0] - biases[:, 1]).double()[owner]
    direction = reading.out.norm.pull(difference)
    resid = runs.kept["resid", model.n_layers - 1]
    inverse = 1 / reading.out.norm.scale(resid)
    effects = direct_effects(model, runs, direction * inverse[owner, None], min(map(turn, sum(sets, ())))[0], reading)
    rescaled = (resid.cpu().double() * direction).sum(-1) * (inverse - inverse[owner])
    tied = [layer for layer, norms in enumerate(reading.post) if norms.attn]
    frames = []
    for place, (name, sites) in enumerate(slices.items()):
        at = len(pairs) + place * len(kinds) * len(pairs) + torch.arange(len(kinds) * len(pairs))
        own = owner[at]
        changes = {("total", Site(-1, "")): (logit_diff[own], logit_diff[at])}
        changes |= {("direct", site): (effects[site][own], effects[site][at]) for site in members(sites)}
        for site in later_sites(sites, model.n_layers, model.n_heads, tied):
            changes[f"{site.component}s", site] = effects[site][own], effects[site][at]
        nothing = torch.zeros(len(at), dtype=torch.float64)
        changes["scale", Site(-1, "")] = nothing, rescaled[at]
        parts = sum(after - before for (part, _), (before, after) in changes.items() if part != "total")
        left = logit_diff[at] - logit_diff[own] - parts
        changes["residual", Site(-1, "")] = nothing, left
        ablation = np.repeat(kinds, len(pairs))
        largest = max(value.abs().max().item() for both in changes.values() for value in both)
        names = [f"pair {pairs[o].pair_id}, {k} of {name}" for o, k in zip(own, ablation, strict=True)]
        prove_sum(model, left, largest, names)
        frames.append(tidy([pairs[index] for index in own], name, ablation, seed, changes))
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
def last_token(model: Model, base: BaseRun, rows: Sequence[Row], sources: Activations) -> LastToken:
    """The last token of every prompt, intact, and of every row, its sites replaced, in one pass over the base's cache.

    Kept are the o_proj inputs, attention outputs, MLP outputs and block outputs as they went on, edits included.
    """
    prompts, start = len(base.ids), base.ids.shape[1] - 1
    owner = torch.tensor([*range(prompts), *(row.owner for row in rows)], device=base.ids.device)
    edits = edits_by_module(rows, {index: prompts + index for index in range(len(rows))})
    offset = torch.tensor([0], device=base.ids.device)
    kept: dict[tuple[str, int], Tensor] = {}
    with hooks.removing() as handles:
        for layer in range(model.n_layers):
            for component in hooks.COMPONENTS:
                key = component, layer
                if key in edits:
                    edit = Edit(model, component, edits[key], offset, sources[key])
                    handles.append(hooks.on_activation(model, layer, component, edit.write))
                handles.append(hooks.on_activation(model, layer, component, partial(keep, kept, key)))
        hidden = rerun(model, base, start, owner)
    return LastToken(hidden, kept)


def keep(kept: dict[tuple[str, int], Tensor], key: tuple[str, int], activation: Tensor) -> None:
    """Put the last token's activation aside."""
    kept[key] = activation[:, -1].clone()


def direct_effects(
    model: Model, runs: LastToken, direction: Float[Tensor, "rows hidden"], first: int, reading: Reading
) -> dict[Site, Float[Tensor, " rows"]]:
    """What each head, attention module and MLP from layer `first` on adds to logit_diff in each run (logits, fp64).

    `direction` is over the intact run's scale of the final norm. A post norm is taken at the scale of the run itself:
    a head's effect is its share of what really was added to the residual stream.
    """
    effects: dict[Site, Tensor] = {}
    for layer in range(first, model.n_layers):
        for component, norm in zip(("attn", "mlp"), reading.post[layer], strict=True):
            output = runs.kept[component, layer].cpu().double()
            towards = direction if norm is None else norm.pull(direction) / norm.scale(output)[:, None]
            effects[Site(layer, component)] = (output * towards).sum(-1)
            if component == "attn":
                heads = head_outputs(model, layer, runs.kept["head", layer]).cpu().double()
                effects |= {Site(layer, "head", h): (heads[:, h] * towards).sum(-1) for h in range(model.n_heads)}
    return effects


@torch.no_grad()
def head_outputs(
    model: Model, layer: int, z: Float[Tensor, "*rows heads_and_size"]
) -> Float[Tensor, "*rows heads hidden"]:
    """What each head of the layer adds to the attention output, given the o_proj inputs z; o_proj's bias is left out.

    o_proj itself is run on each head's slice with the others at zero, so that its kind (quantised, transposed) does not
    matter. In the model's dtype, on its device. A post-attention norm is not applied.
    """
    o_proj = model.o_projs[layer]
    alone = torch.eye(model.n_heads, dtype=z.dtype, device=z.device)[:, :, None]
    masked = (z.unflatten(-1, (model.n_heads, -1))[..., None, :, :] * alone).flatten(-2)
    return o_proj(masked) - o_proj(torch.zeros_like(masked[..., :1, :]))


def prove(
    model: Model, base: BaseRun, runs: LastToken, rows: Sequence[Row], sources: Activations, pairs: Sequence[Pair]
) -> None:
    """SweepError unless the intact rows equal the plain run and every site of every row arrived at its source."""
    plain = model.logits(base.hidden)
    off = (model.logits(runs.hidden[: len(pairs)]) - plain).abs().amax(-1).tolist()
    for pair, value in zip(pairs, off, strict=True):
        if not value <= model.noise_of(plain):
            raise SweepError(f"pair {pair.pair_id}: the intact row differs from the plain run by {value:.3g} logits")
    for place, row in enumerate(rows, len(pairs)):
        for site in row.sites:
            if site.component == "head" and Site(site.layer, "attn") in row.sites:
                continue  # the module behind it was replaced as a whole
            columns = hooks.columns_of(model, site)
            found = runs.kept[site.component, site.layer][place, columns]
            source = sources[site.component, site.layer][row.source, -1, columns].to(found)
            if not torch.equal(found, source):
                away = (found - source).double().norm().item()
                raise SweepError(
                    f"pair {pairs[row.owner].pair_id}, {site}: the edit did not take effect; the activation lies "
                    f"{away:.6g} from its source"
                )


def prove_sum(model: Model, residual: Float[Tensor, " rows"], largest: float, names: Sequence[str]) -> None:
    """SweepError where the parts miss the total by more than rounding, the largest of them having this size: norms
    compute in fp32 even in an fp64 model."""
    allowed = hooks.at_size(max(model.noise, NOISE[torch.float32]), largest)
    worst = int(residual.abs().argmax())
    if not residual.abs().max() <= allowed:
        raise SweepError(
            f"{names[worst]}: the parts miss the total change of logit_diff by {residual[worst]:.3g} logits, more than "
            f"{allowed:g}. Something else writes into the residual stream of {model.name}"
        )


def tidy(
    pairs: Sequence[Pair], name: str, ablation: Sequence[str], seed: int, changes: Mapping[tuple[str, Site], tuple]
) -> pd.DataFrame:
    """The rows of `SCHEMA`: every part of every pair."""
    fields = {field: [getattr(pair, field) for pair in pairs] for field in ("task", "template", "pair_id", "quad_id")}
    about = fields | {"half": [pair.half for pair in pairs], "seed": seed, "slice": name, "ablation": list(ablation)}
    frames = [
        pd.DataFrame(about).assign(part=part, **site._asdict(), before=before.numpy(), after=after.numpy())
        for (part, site), (before, after) in changes.items()
    ]
    return pd.concat(frames, ignore_index=True)[list(SCHEMA.columns)]
