"""Gradient attribution: every head's and MLP's effect at the last token from one backward pass, beside the exact one.

1. `attribute` runs the last token of each clean prompt once more over the kept KV cache, with gradients of logit_diff
   at every head's output (its slice of the o_proj input), query and MLP output. Attribution patching (AtP) estimates
   what replacing one by its value in the corrupt run would cost: -(corrupt - clean) . gradient.
2. *QK fix* (Kramar et al. 2024, arXiv 2403.00745, section 3.1): a query acts through a softmax, which a gradient
   mistakes where it is saturated. The attention under the corrupt query is computed exactly, and only what follows is
   linear. At `last` that is the head's output under the corrupt query (`queried`), for all heads of a model in one pass
   over two rows a prompt. Keys at `last` are read by the last token alone and are not attributed.
3. *GradDrop* (section 3.2): effects through different layers may cancel. A backward pass for each layer, in which
   nothing flows back through that layer's attention and MLP; the absolute estimates are averaged over the others.
4. `exact` replaces the same sites and queries in the sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lib import hooks, records, sweep
from lib.batches import both_runs, grouped
from lib.hooks import Model
from lib.paths import projection
from lib.single_pass import Activations, BaseRun, SweepError, rerun
from lib.tasks import Pair

BATCH = 8  # pairs that share a pass: with a row for every layer each
KEPT = ("head", "mlp")  # whose plain activations are kept
KINDS = (*KEPT, "query")

_NODE = ["pair_id", "layer", "component", "head"]
_IDENTITY = {
    "pair_id": records.text(),
    "quad_id": records.text(),
    "half": records.text(),
    "layer": records.whole(0),
    "component": records.text(KINDS),
    "head": records.whole(-1),
}
# One row per pair and node: what replacing it would cost by each method (logits of logit_diff; `grad_drop` unsigned).
METHODS = {name: records.number() for name in ("atp", "atp_qk", "grad_drop")}
SCHEMA = records.table_schema("table of attributions", _IDENTITY | METHODS | {"tokens": records.whole(1)}, _NODE)
EXACT_SCHEMA = records.table_schema("table of exact effects", _IDENTITY | {"exact": records.number()}, _NODE)


def last_token(model: Model, run: BaseRun, times: int = 1) -> Float[Tensor, "rows hidden"]:
    """The last token of every prompt once more (each prompt `times` times) over the kept cache: final hidden states."""
    owner = torch.arange(len(run.ids), device=run.ids.device).repeat(times)
    return rerun(model, run, run.ids.shape[1] - 1, owner)


def on_queries(model: Model, layer: int, visit: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call `visit` with a layer's queries, (rows, tokens, heads x size), before any rotation; what it returns replaces
    them."""
    module, first = projection(model, model.attns[layer], "q")
    columns = slice(first, first + model.n_heads * model.head_size)

    def after(_: torch.nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        new = visit(output[..., columns])
        if new is None:
            return None
        return torch.cat([output[..., : columns.start], new, output[..., columns.stop :]], dim=-1)

    return module.register_forward_hook(after)


@torch.no_grad()
def queried(model: Model, clean: BaseRun, corrupt: BaseRun) -> tuple[Activations, Activations]:
    """The corrupt run's queries at `last`, ("query", layer), and what each head of the clean run puts out under them,
    ("head", layer); (pairs, 1, heads x size). SweepError unless heads keep their output under the queries they had."""
    count, queries, heads, handles = len(clean.ids), {}, {}, []
    heads_before: dict[int, Tensor] = {}

    def note(q: Tensor, layer: int) -> None:
        queries["query", layer] = q.clone()

    with hooks.removing(handles):
        handles += [on_queries(model, layer, partial(note, layer=layer)) for layer in range(model.n_layers)]
        last_token(model, corrupt)

    def twin(hidden: Tensor) -> Tensor:
        return hidden[:count].repeat(2, 1, 1)  # each layer starts from the clean run

    def swap(q: Tensor, layer: int) -> Tensor:
        return torch.cat([q[:count], queries["query", layer].to(q)])

    def keep(z: Tensor, layer: int) -> None:
        heads_before[layer], heads["head", layer] = z[:count], z[count:].clone()

    with hooks.removing() as handles:
        for layer in range(model.n_layers):
            handles.append(hooks.on_input(model.blocks[layer], twin))
            handles.append(on_queries(model, layer, partial(swap, layer=layer)))
            handles.append(hooks.on_activation(model, layer, "head", partial(keep, layer=layer)))
        last_token(model, clean, times=2)
    for layer, z in heads_before.items():
        plain = clean.activations["head", layer]
        if not (z - plain).norm() <= max(model.noise, 1e-3) * plain.norm():
            raise SweepError(
                f"layer {layer}: the heads' output at `last` differs from the plain run's by more than noise"
            )
    return queries, heads


def attribute(model: Model, pairs: Sequence[Pair]) -> pd.DataFrame:
    """Every node's effect at `last` on every pair by AtP, AtP with QK fix and GradDrop (`SCHEMA`)."""
    frames = []
    for batch in grouped(pairs, BATCH):
        clean, corrupt = both_runs(model, batch, batch[0].clean.roles["last"], KEPT)
        queries, heads = queried(model, clean, corrupt)
        nodes, gradients, dropped = differentiate(model, clean, batch)
        for layer in range(model.n_layers):
            moved = {part: corrupt.activations[part, layer] - clean.activations[part, layer] for part in KEPT}
            moved["query"] = queries["query", layer] - nodes["query", layer]
            fixed = moved | {"query": heads["head", layer] - clean.activations["head", layer]}
            for part in KINDS:
                size = 1 if part == "mlp" else model.n_heads
                through = "head" if part == "query" else part
                others = max(1, model.n_layers - 1)
                columns = {
                    "atp": effect(moved[part], gradients[part, layer], size),
                    "atp_qk": effect(fixed[part], gradients[through, layer], size),
                    # with the fix as well, as in the paper's AtP*
                    "grad_drop": np.abs(effect(fixed[part], dropped[through, layer], size)).sum(0) / others,
                }
                numbers = [-1] if part == "mlp" else range(model.n_heads)
                about = {
                    name: np.repeat([getattr(pair, name) for pair in batch], size)
                    for name in ("pair_id", "quad_id", "half")
                }
                site = {"layer": layer, "component": part, "head": np.tile(numbers, len(batch))}
                values = {name: value.ravel() for name, value in columns.items()}
                frames.append(pd.DataFrame(about | site | values | {"tokens": clean.ids.shape[1]}))
    return pd.concat(frames, ignore_index=True).astype({"layer": "int32", "head": "int32", "tokens": "int32"})


def effect(
    moved: Float[Tensor, "*more pairs 1 width"], gradient: Float[Tensor, "*more pairs 1 width"], size: int
) -> Float[np.ndarray, "*more pairs nodes"]:
    """-(moved . gradient) of each of `size` nodes beside each other."""
    product = (moved * gradient).double()[..., 0, :]
    return -product.unflatten(-1, (size, -1)).sum(-1).cpu().numpy()


def differentiate(
    model: Model, clean: BaseRun, pairs: Sequence[Pair]
) -> tuple[Activations, Activations, Mapping[tuple[str, int], Float[Tensor, "layers pairs 1 width"]]]:
    """Nodes of the last token's run, the gradients of logit_diff there, and those with each layer dropped in turn."""
    nodes: dict[tuple[str, int], Tensor] = {}
    handles: list = []
    count, times = len(pairs), 1 + model.n_layers  # one backward pass for all: rows in which nothing is dropped, then
    # rows in which layer 0 is, ...

    def dropping(gradient: Tensor, layer: int) -> Tensor:
        gradient = gradient.clone()
        gradient[(1 + layer) * count : (2 + layer) * count] = 0
        return gradient

    def keep(value: Tensor, key: tuple[str, int]) -> Tensor | None:
        nodes[key] = value
        if key[0] in ("attn", "mlp"):
            value.register_hook(partial(dropping, layer=key[1]))
        return value if key[0] == "query" else None  # a slice is no part of what follows unless it is put back

    with hooks.removing(handles), torch.enable_grad():
        handles.append(hooks.on_activation(model, -1, "embed", lambda x: x.detach().requires_grad_()))
        for layer in range(model.n_layers):
            for part in (*KEPT, "attn"):
                handles.append(hooks.on_activation(model, layer, part, partial(keep, key=(part, layer))))
            handles.append(on_queries(model, layer, partial(keep, key=("query", layer))))
        hidden = last_token(model, clean, times)
        tokens = torch.tensor([[p.clean_tokens[p.answer], p.clean_tokens[p.corrupt_answer]] for p in pairs])
        logits = model.logits(hidden, tokens.repeat(times, 1))
        wanted = {key: value for key, value in nodes.items() if key[0] in KINDS}
        found = torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), list(wanted.values()))
    gradients = {key: value.unflatten(0, (times, count)) for key, value in zip(wanted, found, strict=True)}
    for layer in range(model.n_layers):
        gradients["mlp", layer][1 + layer] = 0  # what is asked for is taken before it is dropped
    return (
        {key: value[:count].detach() for key, value in wanted.items()},
        {key: value[0] for key, value in gradients.items()},
        {key: value[1:] for key, value in gradients.items()},
    )


def exact(model: Model, pairs: Sequence[Pair], memory: float = 2.0) -> pd.DataFrame:
    """What replacing each node by its value in the corrupt run costs, by the sweep (`EXACT_SCHEMA`)."""
    how = {"direction": "noise", "role": "last", "memory": memory}
    sites = sweep.run(model, pairs, components=KEPT, ablations=("counterfactual",), **how)

    def values(batch: Sequence[Pair], base: BaseRun, other: BaseRun) -> dict[str, Activations]:
        return {"query": queried(model, base, other)[1]}

    sets = [(site,) for site in hooks.all_sites(model, ("head",))]
    queries = sweep.run_variants(model, pairs, sets, ("query",), values, **how).assign(component="query")
    both = pd.concat([sites, queries], ignore_index=True)
    return both.assign(exact=both["logit_diff_before"] - both["logit_diff_after"])[list(EXACT_SCHEMA.columns)]
