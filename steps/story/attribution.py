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

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import pandas as pd
import pandera.pandas as pa_schema
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lib import hooks, sweep
from lib.batches import grouped, token_ids
from lib.hooks import Model
from lib.paths import projection
from lib.single_pass import Activations, BaseRun, SharedPrefix, SweepError, base_run
from lib.tasks import Pair
from pipeline.step import Step
from pipeline.units import Unit
from steps.story.circuits import candidate_logits

BATCH = 8  # pairs that share a pass: with a row for every layer each
KINDS = ("head", "mlp", "query")

_finite = pa_schema.Check(np.isfinite, name="finite")
_IDENTITY = {name: pa_schema.Column(str) for name in ("pair_id", "quad_id", "half")} | {
    "layer": pa_schema.Column("int32", pa_schema.Check.ge(0)),
    "component": pa_schema.Column(str, pa_schema.Check.isin(KINDS)),
    "head": pa_schema.Column("int32", pa_schema.Check.ge(-1)),
}
# One row per pair and node: what replacing it would cost by each method (logits of logit_diff; `grad_drop` unsigned).
SCHEMA = pa_schema.DataFrameSchema(
    _IDENTITY
    | {name: pa_schema.Column("float64", _finite) for name in ("atp", "atp_qk", "grad_drop")}
    | {"tokens": pa_schema.Column("int32")},
    strict=True,
    ordered=True,
    unique=["pair_id", "layer", "component", "head"],
    name="table of attributions",
)
EXACT_SCHEMA = pa_schema.DataFrameSchema(
    _IDENTITY | {"exact": pa_schema.Column("float64", _finite)},
    strict=True,
    ordered=True,
    unique=["pair_id", "layer", "component", "head"],
    name="table of exact effects",
)


def last_token(model: Model, run: BaseRun, times: int = 1) -> Float[Tensor, "rows hidden"]:
    """The last token of every prompt once more (each prompt `times` times) over the kept cache: final hidden states."""
    owner = torch.arange(len(run.ids), device=run.ids.device).repeat(times)
    start = run.ids.shape[1] - 1
    return model.body(
        input_ids=run.ids[owner, start:],
        past_key_values=SharedPrefix(run.cache, start, owner),
        position_ids=torch.tensor([[start]], device=run.ids.device),
        use_cache=True,
    ).last_hidden_state[:, -1]


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
    own: dict[int, Tensor] = {}
    with hooks.removing(handles):
        for layer in range(model.n_layers):
            keep = lambda q, layer=layer: queries.update({("query", layer): q.clone()})  # noqa: E731
            handles.append(on_queries(model, layer, keep))
        last_token(model, corrupt)
    handles.clear()

    def twin(_: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = (args[0] if args else kwargs.pop("hidden_states"))[:count]  # each layer starts from the clean run
        return (hidden.repeat(2, 1, 1), *args[1:]), kwargs

    with hooks.removing(handles):
        for layer in range(model.n_layers):

            def swap(q: Tensor, layer: int = layer) -> Tensor:
                return torch.cat([q[:count], queries["query", layer].to(q)])

            def keep(z: Tensor, layer: int = layer) -> None:
                own[layer], heads["head", layer] = z[:count], z[count:].clone()

            handles.append(model.blocks[layer].register_forward_pre_hook(twin, with_kwargs=True))
            handles += [on_queries(model, layer, swap), hooks.on_activation(model, layer, "head", keep)]
        last_token(model, clean, times=2)
    for layer, z in own.items():
        plain = clean.activations["head", layer]
        if not (z - plain).norm() <= max(model.noise, 1e-3) * plain.norm():
            raise SweepError(
                f"layer {layer}: the heads' output at `last` differs from the plain run's by more than noise"
            )
    return queries, heads


def attribute(model: Model, pairs: Sequence[Pair]) -> pd.DataFrame:
    """Every node's effect at `last` on every pair by AtP, AtP with QK fix and GradDrop (`SCHEMA`)."""
    frames = []
    for clean, corrupt, own in both_runs(model, pairs):
        queries, heads = queried(model, clean, corrupt)
        nodes, gradients, dropped = differentiate(model, clean, own)
        clean_queries = {key: value for key, value in nodes.items() if key[0] == "query"}
        for layer in range(model.n_layers):
            moved = {
                part: corrupt.activations[part, layer] - clean.activations[part, layer] for part in ("head", "mlp")
            }
            moved["query"] = queries["query", layer] - clean_queries["query", layer]
            fixed = moved | {"query": heads["head", layer] - clean.activations["head", layer]}
            for part in KINDS:
                size = -1 if part == "mlp" else model.n_heads

                def effect(by: Tensor, gradient: Tensor, size: int = size) -> np.ndarray:
                    """-(moved . gradient) of each head, or of the whole: (..., pairs, nodes)."""
                    product = (by * gradient).double()[..., 0, :]
                    split = product[..., None, :] if size < 0 else product.unflatten(-1, (size, -1))
                    return -split.sum(-1).cpu().numpy()

                key = part, layer
                through = "head" if part == "query" else part
                others = max(1, model.n_layers - 1)
                columns = {
                    "atp": effect(moved[part], gradients[key]),
                    "atp_qk": effect(fixed[part], gradients[through, layer]),
                    # with the fix as well, as in the paper's AtP*
                    "grad_drop": np.abs(effect(fixed[part], dropped[through, layer])).sum(0) / others,
                }
                numbers = np.array([-1]) if part == "mlp" else np.arange(model.n_heads)
                about = {name: np.repeat([getattr(p, name) for p in own], len(numbers)) for name in list(_IDENTITY)[:3]}
                site = {"layer": layer, "component": part, "head": np.tile(numbers, len(own))}
                values = {name: value.ravel() for name, value in columns.items()}
                frames.append(pd.DataFrame(about | site | values | {"tokens": clean.ids.shape[1]}))
    return pd.concat(frames, ignore_index=True).astype({"layer": "int32", "head": "int32", "tokens": "int32"})


def both_runs(model: Model, pairs: Sequence[Pair]) -> Iterator[tuple[BaseRun, BaseRun, list[Pair]]]:
    """Plain runs of the clean and corrupt prompts, a batch at a time."""
    for group in grouped(pairs):
        for at in range(0, len(group), BATCH):
            own, last = group[at : at + BATCH], group[0].clean.roles["last"]
            ids = [pair.clean.ids for pair in own] + [pair.corrupt.ids for pair in own]
            plain = base_run(model, token_ids(model, ids), last, ("head", "mlp"))
            yield plain.part(0, len(own)), plain.part(len(own), 2 * len(own)), own


def differentiate(
    model: Model, clean: BaseRun, pairs: Sequence[Pair]
) -> tuple[Activations, Activations, dict[tuple[str, int], Float[Tensor, "layers pairs 1 width"]]]:
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
            for part in ("head", "mlp", "attn"):
                handles.append(hooks.on_activation(model, layer, part, partial(keep, key=(part, layer))))
            handles.append(on_queries(model, layer, partial(keep, key=("query", layer))))
        hidden = last_token(model, clean, times)
        tokens = torch.tensor([[p.clean_tokens[p.answer], p.clean_tokens[p.corrupt_answer]] for p in pairs])
        logits = candidate_logits(model, hidden[None], tokens.repeat(times, 1))[0]
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
    sites = sweep.run(model, pairs, components=("head", "mlp"), ablations=("counterfactual",), **how)

    def values(own: Sequence[Pair], base: BaseRun, other: BaseRun) -> dict[str, Activations]:
        return {"query": queried(model, base, other)[1]}

    sets = [(site,) for site in hooks.all_sites(model, ("head",))]
    queries = sweep.run_variants(model, pairs, sets, ("query",), values, **how).assign(component="query")
    both = pd.concat([sites, queries], ignore_index=True)
    return both.assign(exact=both["logit_diff_before"] - both["logit_diff_after"])[list(EXACT_SCHEMA.columns)]


def measured(step: Step, pairs: Sequence[Pair]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The step's tables of `attribute` and of `exact`."""
    chunks = [tuple(group[at : at + 8]) for group in grouped(pairs) for at in range(0, len(group), 8)]
    plan = [Unit(f"pairs-{index:04d}", chunk) for index, chunk in enumerate(chunks)]
    estimated = step.table("attribution", plan, lambda unit: attribute(step.model, unit.pairs), schema=SCHEMA)
    swept = step.table("exact", plan, lambda unit: exact(step.model, unit.pairs, step.memory), schema=EXACT_SCHEMA)
    return estimated, swept
