"""What an SAE's features do on the pairs: read, patched like any site, and what they promote.

1. `reader` writes what every prompt of the pairs makes the site, its features and its neurons do, with the first-order
   effect of patching each; `steps.neurons.picks` picks from that.
2. `Patcher` replaces the site by base + the change that chosen features, neurons or directions make between the two
   runs of a pair (the error term stays that of the base run), beside random ones of equal norm.
3. `promoter` gives the tokens that a feature's decoder row promotes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib import hooks, sweep
from lib.batches import grouped, token_ids
from lib.hooks import Model, Site
from lib.readout import post_norms, readout
from lib.single_pass import BaseRun
from lib.tasks import Pair, token_texts
from pipeline.step import Step
from pipeline.units import Unit
from steps.neurons.coders import Coder

RANDOM = ("random features", "random directions")


def reader(step: Step, coder: Coder, site: Site) -> Callable[[Unit], pd.DataFrame]:
    """What `Step.table` computes with what each prompt of the pairs makes the site do at `last`: a row per prompt with
    `activation`, `features`, `neurons` (of an MLP), and their attributions: (other prompt's value - own value) x
    gradient of logit_diff, the first-order effect of patching each one alone (Nanda 2023, attribution patching)."""

    def compute(unit: Unit) -> pd.DataFrame:
        rows = []
        for pairs in grouped(unit.pairs):
            sides = {side: read(step.model, site, pairs, side) for side in ("clean", "corrupt")}
            values = {side: coder.encode(own["activation"]) for side, own in sides.items()}
            for side, other in (("clean", "corrupt"), ("corrupt", "clean")):
                own = sides[side] | {"features": values[side]}
                own["feature_attribution"] = (values[other] - values[side]) * (own.pop("gradient") @ coder.decoder.T)
                if "neurons" in own:
                    change = sides[other]["neurons"] - own["neurons"]
                    own["neuron_attribution"] = change * own.pop("neuron_gradient")
                for index, pair in enumerate(pairs):
                    label = pair.answer if side == "clean" else pair.corrupt_answer
                    row = {"pair_id": pair.pair_id, "quad_id": pair.quad_id, "half": pair.half, "side": side}
                    row |= {"superset": pair.candidates[label]}
                    rows.append(row | {name: value[index].numpy() for name, value in own.items()})
        return pd.DataFrame(rows)

    return compute


def read(model: Model, site: Site, pairs: Sequence[Pair], side: str) -> dict[str, Float[Tensor, "pairs width"]]:
    """`activation` and `gradient` of the site at `last`, and those of its neurons where it is an MLP; fp32, CPU."""
    ids = token_ids(model, [getattr(pair, side).ids for pair in pairs])
    kept: dict[str, Tensor] = {}

    def visit(activation: Tensor, name: str) -> Tensor:
        kept[name] = activation if activation.requires_grad else activation.detach().requires_grad_()
        return kept[name]

    with hooks.removing() as handles, torch.enable_grad():
        if site.component == "mlp" and model.down_projs:
            handles.append(hooks.on_activation(model, site.layer, "neuron", lambda x: visit(x, "neurons")))
        handles.append(hooks.on_activation(model, site.layer, site.component, lambda x: visit(x, "activation")))
        logits = model.logits(model.body(input_ids=ids, use_cache=False).last_hidden_state[:, -1])
        tokens = torch.tensor([[getattr(p, f"{side}_tokens")[i] for i in (p.answer, p.corrupt_answer)] for p in pairs])
        both = logits.gather(1, tokens.to(logits.device))
        gradients = torch.autograd.grad((both[:, 0] - both[:, 1]).sum(), list(kept.values()))
    names = {"neurons": "neuron_gradient", "activation": "gradient"}
    out = kept | {names[name]: gradient for name, gradient in zip(kept, gradients, strict=True)}
    return {name: value[:, -1].detach().float().cpu() for name, value in out.items()}


@dataclass(frozen=True)
class Patcher:
    """Computes tables of patches (`records.VARIANT_SCHEMA`), the site patched at `last`.

    Options of a unit: `direction`; `chosen`, lists of "features" and "neurons" from the best on; `budgets`, how many of
    them (and of the rows of `directions`, orthonormal) are patched together, beside `draws` random ones; no budgets:
    each one alone. Variants: "whole", "reconstruction" (all features), "error" (what they leave), "features 4", ...
    """

    step: Step
    coder: Coder
    site: Site
    directions: Float[np.ndarray, "directions width"]

    def __call__(self, unit: Unit) -> pd.DataFrame:
        step, options = self.step, unit.options
        needs = ("neuron",) if options["chosen"].get("neurons") else ()
        names, variants = self.names(options), partial(self.variants, options)
        how = {"direction": options["direction"], "role": "last", "needs": needs, "seed": step.params.seed}
        where = {"memory": step.memory, "profile": step.params.profile}
        return sweep.run_variants(step.model, unit.pairs, [(self.site,)], names, variants, **how, **where)

    def names(self, options: Mapping[str, Any]) -> list[str]:
        """The variants of a unit."""
        chosen, budgets = options["chosen"], options.get("budgets")
        if budgets is None:
            return [f"{kind} {one}" for kind, units in chosen.items() for one in units]
        kinds = ["features", "directions", *(["neurons"] if chosen.get("neurons") else [])]
        drawn = [f"{kind} {{}}.{n}" for kind in RANDOM for n in range(options["draws"])]
        names = [name.format(k) for k in budgets for name in (*(f"{kind} {{}}" for kind in kinds), *drawn)]
        return ["whole", "reconstruction", "error", *names]

    def variants(
        self, options: Mapping[str, Any], pairs: Sequence[Pair], base: BaseRun, other: BaseRun
    ) -> dict[str, dict[tuple[str, int], Tensor]]:
        """The site's activation under each variant."""
        key = self.site.component, self.site.layer
        was, gap = base.activations[key], (other.activations[key] - base.activations[key]).float().cpu()
        change = self.coder.encode(other.activations[key]) - self.coder.encode(base.activations[key])
        hidden = None
        if options["chosen"].get("neurons"):
            hidden = other.activations["neuron", self.site.layer] - base.activations["neuron", self.site.layer]
        moves = Moves(self, options, pairs, gap, change, hidden)
        return {name: {key: was + moves.of(name).to(was)} for name in self.names(options)}

    def down(self, x: Tensor) -> Tensor:
        """What neurons write, without the down projection's bias."""
        project = self.step.model.down_projs[self.site.layer]
        return project(x) - project(torch.zeros_like(x))


class Moves(NamedTuple):
    """What each variant adds to the site in some pairs."""

    patcher: Patcher
    options: Mapping[str, Any]
    pairs: Sequence[Pair]
    gap: Float[Tensor, "pairs 1 width"]  # the other run's activation less the base run's
    change: Float[Tensor, "pairs 1 features"]
    hidden: Float[Tensor, "pairs 1 neurons"] | None

    def of(self, name: str) -> Float[Tensor, "pairs 1 width"]:
        decoder = self.patcher.coder.decoder
        kind, _, number = name.rpartition(" ")
        if not kind:
            rest = self.change @ decoder
            return {"whole": self.gap, "reconstruction": rest, "error": self.gap - rest}[name]
        k = int(number.partition(".")[0])
        if kind in ("features", "neurons"):
            some = [k] if self.options.get("budgets") is None else self.options["chosen"][kind][:k]
            values = self.change if kind == "features" else self.hidden
            alone = torch.zeros_like(values)
            alone[..., some] = values[..., some]
            return alone @ decoder if kind == "features" else self.patcher.down(alone).float().cpu()
        if kind == "directions":
            basis = torch.tensor(self.patcher.directions[:k]).float()
            return self.gap @ basis.T @ basis
        top = self.options["chosen"]["features"][:k]
        wanted = (self.change[..., top] @ decoder[top]).norm(dim=-1, keepdim=True)
        made = torch.stack([self.at_random(kind, k, name, index, top) for index in range(len(self.pairs))])
        return made * (wanted / made.norm(dim=-1, keepdim=True).clamp(min=1e-9))

    def at_random(self, kind: str, k: int, name: str, index: int, top: list[int]) -> Float[Tensor, "1 width"]:
        """Random features among those that change in the pair, or the gap along random directions."""
        gap, change, decoder = self.gap[index], self.change[index], self.patcher.coder.decoder
        purpose = f"{name}|{self.pairs[index].pair_id}"
        rng = np.random.default_rng([self.patcher.step.params.seed, crc32(purpose.encode())])
        if kind == "random directions":
            basis = np.linalg.qr(rng.standard_normal((gap.shape[-1], k)))[0]
            return gap @ torch.tensor(basis @ basis.T).float()
        free = np.setdiff1d(np.flatnonzero(change.abs().sum(0).numpy()), top)
        some = rng.permutation(free)[:k]
        return change[:, some] @ decoder[some]


def promoter(step: Step, coder: Coder, site: Site, count: int = 8) -> Callable[[Unit], pd.DataFrame]:
    """What `Step.table` computes the tokens with that features promote: each decoder row through the final norm and the
    unembedding (the MLP's post norm before, where there is one). `logits` are those of the candidates, at scale 1."""

    def compute(unit: Unit) -> pd.DataFrame:
        model, chosen = step.model, list(unit.options["features"])
        out, post = readout(model), post_norms(model)[site.layer].mlp if site.component == "mlp" else None
        rows = coder.decoder[chosen].double()
        rows = rows if post is None else post.gain * post.centred(rows)
        towards = (out.norm.gain * out.norm.centred(rows)).to(out.unembed)
        logits = towards @ out.unembed.T
        candidates = logits[:, list(unit.pairs[0].clean_tokens)].float().cpu()
        words = [token_texts(model.tokenizer, own.tolist()) for own in logits.topk(count).indices]
        return pd.DataFrame({"feature": chosen, "promotes": [", ".join(map(repr, own)) for own in words]}).assign(
            logits=list(candidates.numpy())
        )

    return compute
