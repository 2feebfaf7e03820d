"""Exact path patching: what a sender says to its receivers, along every path that attention does not mediate.

Of one pair of prompts, a base run and a source for each sender (Wang et al. 2022, arXiv 2211.00593, section 3.1;
Goldowsky-Dill et al. 2023, arXiv 2304.05969):

1. Run the base prompt with all attention held at its base values, the receivers' included, and the sender replaced.
   MLPs between are recomputed, or held at their base values too. Record what the receivers would be given.
2. Run the base prompt anew with all receivers' inputs set together, everything downstream recomputed.

All senders go through each run as rows of one growing batch. With attention held, no token hears another, so the first
run is made of the sender's tokens alone and computes no attention; a receiver hears a sender at the tokens that both
their roles hold. Nothing is linearised. What the first run records is the row's difference from the base row of the
same pass; in the second run the receiver is given the base row's input with this difference, and so hears nothing of
what other receivers do. What does not arrive changes nothing, to the bit.

With grouped queries, k and v are made once for a group of query heads: their paths reach all of them (`reached`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lib import hooks, sweep
from lib.batches import grouped
from lib.hooks import EMBED, Model, Site
from lib.single_pass import Activations, BaseRun, Batch, Edit, Grown, Proof, Row, SweepError, edits_by_module
from lib.tasks import Pair
from lib.weights import ModelError

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
FUSED = ("c_attn", "qkv_proj")  # q, k and v in one module, side by side
KINDS = (*PROJECTIONS, "mlp", "block", "final")
MLPS = ("recomputed", "frozen")
Roles = Mapping[str, tuple[int, ...]]


class Receiver(NamedTuple):
    """What is told: the q, k or v of a head, the input of an MLP (behind its norm), of a block or of the final norm."""

    layer: int
    kind: str
    head: int = -1  # the query head of q, the key-value head of k and v
    role: str = "last"

    def __str__(self) -> str:
        if self.kind == "final":
            return f"final norm at {self.role}"
        where = f"{self.layer}.{self.head} {self.kind}" if self.head >= 0 else f"{self.kind} {self.layer}"
        return f"{where} at {self.role}"


def reached(model: Model, receiver: Receiver) -> tuple[int, ...]:
    """The query heads that a q, k or v path reaches: with grouped queries, k and v reach the whole group."""
    if receiver.kind not in PROJECTIONS:
        return ()
    group = model.n_heads // model.n_kv_heads if receiver.kind != "q" else 1
    return tuple(range(receiver.head * group, (receiver.head + 1) * group))


def receivers_of(model: Model, sites: Sequence[Site], roles: Mapping[str, str]) -> list[Receiver]:
    """The heads and MLPs of a slice as receivers. `roles` gives the role of each kind that counts, such as
    {"q": "last", "k": "names", "v": "names", "mlp": "last"}; heads of one group share their k and v. With "final" the
    final norm is one of them."""
    group, out = model.n_heads // model.n_kv_heads, []
    if "final" in roles:
        out.append(Receiver(model.n_layers, "final", -1, roles["final"]))
    for site in sites:
        if site.component == "mlp":
            out += [Receiver(site.layer, "mlp", -1, roles["mlp"])] if "mlp" in roles else []
            continue
        for head in [site.head] if site.component == "head" else range(model.n_heads):
            places = {"q": head, "k": head // group, "v": head // group}
            out += [Receiver(site.layer, kind, places[kind], roles[kind]) for kind in PROJECTIONS if kind in roles]
    return list(dict.fromkeys(out))


def senders_before(model: Model, receivers: Sequence[Receiver]) -> list[tuple[Site, ...]]:
    """The embedding and every head and MLP that comes before at least one of the receivers, each alone."""
    sites = [EMBED, *hooks.all_sites(model, ("head", "mlp"))]
    return [(site,) for site in sites if any(before(site, receiver) for receiver in receivers)]


def before(sender: Site, receiver: Receiver) -> bool:
    """Whether a sender's output is there when the receiver's input is read."""
    if receiver.kind == "final" or sender.layer < receiver.layer:
        return True
    return sender.layer == receiver.layer and receiver.kind == "mlp" and sender.component in ("head", "attn")


def run(
    model: Model,
    pairs: Sequence[Pair],
    *,
    receivers: Sequence[Receiver],
    senders: Sequence[Sequence[Site]] | None = None,
    sender_role: str = "last",
    mlps: str = "recomputed",
    direction: str = "noise",
    ablations: Sequence[str] = ("counterfactual",),
    pool: Sequence[Pair] | None = None,
    seed: int = 0,
    memory: float = 2.0,
    profile: str = "",
    pools: dict | None = None,
    label: str = "",
) -> pd.DataFrame:
    """Path patching of sets of senders into one set of receivers; one row per pair x set x ablation.

    receivers    set together.
    senders      sets of heads, MLPs, attention modules or `EMBED`, replaced together at `sender_role`; default: all
                 that come before a receiver, each alone.
    mlps         `recomputed` or `frozen`: the MLPs between senders and receivers.
    label        what the column `receivers` says; default: the receivers listed.

    direction, ablations, pool, seed, memory, pools as in `sweep.run`. The rows have the columns of
    `records.PATH_SCHEMA`: `layer` and `head` are the first sender's, `sender` its component, `site_set` the set's place
    in the list, `arrived` the L2 norm of the change at the receivers' inputs.

    Raises ValueError for unknown words, a sender not before any receiver, and roles that share no token (attention is
    held, so nothing travels between tokens); SweepError when a row does not prove itself.
    """
    receivers = [Receiver(*receiver) for receiver in receivers]
    check(model, pairs, receivers, sender_role, mlps)
    sets = senders_before(model, receivers) if senders is None else [tuple(Site(*site) for site in s) for s in senders]
    for sender in {site for own in sets for site in own}:
        if sender.component == "resid":
            raise ValueError("resid cannot be a sender: it holds what every earlier sender has said; name those")
        hooks.check_site(model, sender)
        if not any(before(sender, receiver) for receiver in receivers):
            raise ValueError(f"sender {sender} is not before any receiver: {', '.join(map(str, receivers))}")

    def grower(roles: Roles) -> sweep.Grow:
        return lambda *parts: grow_paths(*parts, receivers, roles, mlps)

    out = sweep.run_sets(
        model, pairs, sets, direction=direction, role=sender_role, ablations=ablations, pool=pool, seed=seed,
        memory=memory, profile=profile, pools=pools, grower=grower, needs=("attn", "head", "mlp", "resid"),
    )  # fmt: skip
    text = label or "; ".join(map(str, receivers))
    return out.assign(sender=out["component"], component="path", receivers=text, mlps=mlps)


def check(model: Model, pairs: Sequence[Pair], receivers: Sequence[Receiver], sender_role: str, mlps: str) -> None:
    """ValueError for receivers that do not exist or that no token of the sender's role can reach."""
    if mlps not in MLPS:
        raise ValueError(f"mlps {mlps!r} is unknown; allowed are {', '.join(MLPS)}")
    if not receivers:
        raise ValueError("no receivers: give at least one q, k or v of a head, MLP, block, or the final norm")
    for receiver in receivers:
        if receiver.kind not in KINDS:
            raise ValueError(f"receiver kind {receiver.kind!r} is unknown; allowed are {', '.join(KINDS)}")
        if receiver.kind != "final" and not 0 <= receiver.layer < model.n_layers:
            raise ValueError(f"receiver {receiver}: {model.name} has layers 0 to {model.n_layers - 1}")
        if receiver.kind in PROJECTIONS:
            count = model.n_heads if receiver.kind == "q" else model.n_kv_heads
            if not 0 <= receiver.head < count:
                what = "query" if receiver.kind == "q" else "key-value"
                raise ValueError(f"receiver {receiver}: {model.name} has {what} heads 0 to {count - 1}")
        if receiver.kind == "final" and receiver.role != "last":
            raise ValueError(f"receiver {receiver}: only the last token's final norm reaches the answer")
    for group in grouped(pairs):
        roles = group[0].clean.roles
        for role in (sender_role, *(receiver.role for receiver in receivers)):
            if role not in roles:
                have = ", ".join(roles)
                raise ValueError(f"role {role!r} is not in template {group[0].template!r}; it has {have}")
        if not any(set(roles[sender_role]) & set(roles[receiver.role]) for receiver in receivers):
            raise ValueError(
                f"no path from {sender_role!r} to {', '.join(map(str, receivers))}: attention is held, so a sender is "
                "heard at its own tokens only; give receivers at the sender's role"
            )


@torch.no_grad()
def grow_paths(
    model: Model,
    base: BaseRun,
    rows: Sequence[Row],
    sources: Activations,
    receivers: Sequence[Receiver],
    roles: Roles,
    mlps: str,
) -> Grown:
    """Both runs for every row: `row.sites` are its senders, at the base run's positions.

    `base` holds `attn`, `head`, `mlp` and `resid` beside the senders' components. Returns the final hidden states.
    """
    deltas, proof = record(model, base, rows, sources, receivers, roles, mlps)
    last = model.n_layers - 1
    joins = {receiver: last if receiver.kind == "final" else receiver.layer for receiver in receivers}
    first = [min([joins[r] for r in deltas if any(before(s, r) for s in row.sites)], default=last) for row in rows]
    batch = Batch(first, [row.owner for row in rows], base, model)
    start = min(position for _, positions in deltas.values() for position in positions)
    fired: dict[Receiver, list[Tensor]] = {}  # asked only when the pass is over: an answer waits for the device
    device, places = batch.owner.device, batch.at.to(batch.owner.device)
    handles: list = []
    with hooks.removing(handles):
        for layer in range(model.n_layers):
            handles.append(batch.joining(model, layer))
        for receiver in receivers:
            # all tokens of its role, also those that no sender changed; before the first one nothing differs
            tokens = [token for token in roles[receiver.role] if token >= start]
            here = [index for index, layer in enumerate(first) if layer <= joins[receiver]]
            if not tokens or not here:
                continue
            at, fired[receiver] = input_of(model, receiver), []
            delta, heard = deltas.get(receiver, (None, []))
            told = torch.tensor([tokens.index(token) for token in heard], dtype=torch.long, device=device)
            here = torch.tensor(here, device=device)
            rows_at, offsets = places[here], torch.tensor(tokens, device=device) - start
            arrived = None if delta is None else delta[here.to(delta.device)]
            row = RowInput(rows_at, batch.owner[rows_at], offsets, arrived, told, at.columns)

            def observe(value: Tensor, seen: list[Tensor] = fired[receiver], row: RowInput = row) -> None:
                seen.append(row.is_set(value))

            handles += [at.on(row.set), at.on(observe)]
        hidden = batch.run(model, base, start)
    for receiver, seen in fired.items():
        if (times := sum(map(bool, seen))) != 1:
            raise SweepError(f"receiver {receiver}: its input was set {times} times in a pass, not once")
    squares = [delta.double().flatten(1).square().sum(1).to(device) for delta, _ in deltas.values()]
    grown = Grown(hidden[: batch.prompts], hidden[batch.at.to(hidden.device)], *proof.of_rows())
    return replace(grown, arrived=torch.stack(squares).sum(0).sqrt().cpu())


class RowInput(NamedTuple):
    """What a receiver is given in the second run: the base row's input with what arrived, whatever else has changed."""

    rows: Tensor  # places in the batch of the rows that hear it
    owner: Tensor  # of each, the place of its base row
    offsets: Tensor  # of the receiver's tokens, from the pass's first
    delta: Float[Tensor, "rows heard width"] | None
    heard: Tensor  # which of these tokens something arrives at
    columns: slice

    def of(self, value: Tensor, rows: Tensor) -> tuple[Tensor, tuple]:
        return value[..., self.columns], (rows.to(value.device)[:, None], self.offsets.to(value.device)[None])

    def wanted(self, value: Tensor) -> Float[Tensor, "rows tokens width"]:
        view, index = self.of(value, self.owner)
        own = view[index]
        if self.delta is not None:
            own[:, self.heard.to(own.device)] += self.delta.to(own)
        return own

    def set(self, value: Tensor) -> Tensor:
        value = value.clone()
        view, index = self.of(value, self.rows)
        view[index] = self.wanted(value)
        return value

    def is_set(self, value: Tensor) -> Tensor:
        view, index = self.of(value, self.rows)
        return (view[index] == self.wanted(value)).all()


@torch.no_grad()
def record(
    model: Model,
    base: BaseRun,
    rows: Sequence[Row],
    sources: Activations,
    receivers: Sequence[Receiver],
    roles: Roles,
    mlps: str,
) -> tuple[dict[Receiver, tuple[Float[Tensor, "rows positions width"], list[int]]], Proof]:
    """The first run. For each receiver that shares tokens with the senders: how far its input lies from the base
    row's, for each row, and the tokens; and the proof that the senders were replaced."""
    batch = Batch([max(0, min(s.layer for s in row.sites)) for row in rows], [r.owner for r in rows], base, model)
    proof, places = Proof(rows, batch), batch.at.to(base.ids.device)
    every = torch.arange(len(base.positions), device=base.ids.device)
    by_module = edits_by_module(rows, batch.place)
    edits = {key: Edit(model, key[0], own, every, sources[key]) for key, own in by_module.items()}
    heads = {layer: {row for row, _, _ in own} for (component, layer), own in by_module.items() if component == "head"}
    edited = {layer: torch.tensor(sorted(own), device=base.ids.device) for layer, own in heads.items()}
    deltas: dict[Receiver, tuple[Tensor, list[int]] | None] = {}
    forwards: list[tuple[nn.Module, Callable]] = []
    handles: list = []

    def replaced(activation: Tensor, component: str, layer: int) -> None:
        """Put the senders' values into an activation that this pass made."""
        if edit := edits.get((component, layer)):
            edit.write(activation)
            proof.observe(edit, activation, base.activations[component, layer])

    def held(component: str, layer: int, hidden: Tensor) -> Tensor:
        """The base values of a module for each row of the batch, the senders' own in theirs."""
        owner = batch.owner[: len(hidden)].to(hidden.device)
        value = base.activations[component, layer][owner]
        replaced(value, component, layer)
        if component == "attn" and layer in edited:
            plain = base.activations["head", layer][owner]
            heads = plain.clone()
            replaced(heads, "head", layer)
            own = edited[layer].to(hidden.device)
            # both through one call of o_proj: what the kernel's shape does to the last bits cancels
            new, old = model.o_projs[layer](torch.cat([heads[own], plain[own]])).chunk(2)
            value[own] += new - old
        return value

    for layer in range(model.n_layers):

        def attend(*args: Any, layer: int = layer, **kwargs: Any) -> tuple[Tensor, None]:
            return held("attn", layer, args[0] if args else kwargs["hidden_states"]), None

        forwards.append((model.attns[layer], attend))
        if mlps == "frozen":
            forwards.append((model.mlps[layer], lambda hidden, layer=layer: held("mlp", layer, hidden)))
        else:
            write = lambda value, layer=layer: replaced(value, "mlp", layer)  # noqa: E731
            handles.append(hooks.on_activation(model, layer, "mlp", write))
    with hooks.removing(handles), hooks.with_forwards(forwards):
        for layer in range(model.n_layers):
            handles.append(batch.joining(model, layer))
        handles.append(hooks.on_activation(model, -1, "embed", lambda value: replaced(value, "embed", -1)))
        for receiver in receivers:
            own = [place for place, token in enumerate(base.positions) if token in roles[receiver.role]]
            if not own:
                continue
            at, heard = input_of(model, receiver), [base.positions[place] for place in own]

            def listen(
                value: Tensor, receiver: Receiver = receiver, heard: list[int] = heard,
                shared: Tensor = torch.tensor(own, device=base.ids.device),  # noqa: B008
                told: Callable = at.told, columns: slice = at.columns,
            ) -> None:  # fmt: skip
                value = told(value[:, shared.to(value.device)])[..., columns]
                own = places.to(value.device)
                own = torch.where(own < len(value), own, 0)  # a row that has not joined yet: base row 0, no difference
                delta = value[own] - value[batch.owner.to(value.device)[own]]
                deltas[receiver] = delta, heard

            handles.append(hooks.on_input(at.listened, listen))
            deltas[receiver] = None  # until it is heard
        last = model.n_layers - 1
        handles.append(hooks.on_activation(model, last, "resid", lambda value: prove_base_rows(model, base, value)))
        tokens = torch.tensor(base.positions, device=base.ids.device)
        model.body(input_ids=base.ids[:, tokens], position_ids=tokens[None], use_cache=False)
    for receiver, heard in deltas.items():
        if heard is None:
            raise SweepError(f"receiver {receiver}: its input was not read in the first run")
    return deltas, proof


class Input(NamedTuple):
    """Where a receiver's input is read in the first run and set in the second."""

    listened: nn.Module  # its input is what the first run reads
    told: Callable[[Tensor], Tensor]  # from that input to the values that are recorded
    columns: slice  # of these values
    on: Callable[[Callable[[Tensor], Tensor]], Any]  # puts a function on the values of the second run


def input_of(model: Model, receiver: Receiver) -> Input:
    """The modules behind a receiver."""
    if receiver.kind not in PROJECTIONS:
        own = {"mlp": model.mlps, "block": model.blocks}.get(receiver.kind)
        module = model.final_norm if own is None else own[receiver.layer]
        return Input(module, lambda value: value, slice(None), lambda visit: hooks.on_input(module, visit))
    attention = model.attns[receiver.layer]
    module, first = projection(model, attention, receiver.kind)
    columns = slice(first + receiver.head * model.head_size, first + (receiver.head + 1) * model.head_size)

    def on(visit: Callable[[Tensor], Tensor]) -> Any:
        return module.register_forward_hook(lambda _, args, output: visit(output))

    return Input(attention, module, columns, on)


def projection(model: Model, attention: nn.Module, kind: str) -> tuple[nn.Module, int]:
    """The module that makes q, k or v, and the first column of that kind in its output."""
    if hasattr(attention, PROJECTIONS[kind]):
        return getattr(attention, PROJECTIONS[kind]), 0
    for name in FUSED:
        if hasattr(attention, name):
            heads = {"q": 0, "k": model.n_heads, "v": model.n_heads + model.n_kv_heads}[kind]
            return getattr(attention, name), heads * model.head_size
    looked = ", ".join((PROJECTIONS[kind], *FUSED))
    raise ModelError(f"{type(attention).__name__}: no {kind} projection found; looked for {looked}")


def prove_base_rows(model: Model, base: BaseRun, value: Tensor) -> None:
    """SweepError unless the first run's base rows end where the plain run's residual stream ends."""
    plain = base.activations["resid", model.n_layers - 1].double()
    off = (value[: len(plain)].double() - plain).norm() / plain.norm()
    # kernels of other shapes round differently in 16 bits, and eighty layers add up
    loose = 1e-1 if model.quantisation or model.dtype in (torch.float16, torch.bfloat16) else 1e-3
    if not off <= loose:
        raise SweepError(
            f"{model.name}: with attention held, the base rows end {off:.2g} (relative) away from the plain run"
        )
