"""Exact path patching: what a sender gives its receivers, along every path that attention does not mediate.

Of one pair of prompts, a base run and a source for each sender (Wang et al. 2022, arXiv 2211.00593, section 3.1;
Goldowsky-Dill et al. 2023, arXiv 2304.05969):

1. Run the base prompt with all attention held at its base values, the receivers' included, and the sender replaced.
   MLPs between are recomputed, or held at their base values too. Record what the receivers would be given.
2. Run the base prompt anew with all receivers' inputs set together, everything downstream recomputed.

All senders go through each run as rows of one growing batch. With attention held, no token reads another, so the first
run is made of the sender's tokens alone and computes no attention; a sender reaches a receiver at the tokens that both
their roles hold. Nothing is linearised. What the first run records is the row's difference from the base row of the
same pass; in the second run the receiver is given the base row's input with this difference, and so nothing of what
other receivers do. What does not arrive changes nothing, to the bit.

With grouped queries, k and v are made once for a group of query heads: their paths reach all of them. Where a norm
spans the queries or keys of all heads (OLMo 2 and 3), a head's are read and set behind it: before it, more would hear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lib import hooks, sweep
from lib.batches import Grow, Options, check_role, grouped
from lib.hooks import EMBED, Model, Site
from lib.single_pass import Activations, BaseRun, Batch, Growing, Grown, Ids, Row, SweepError, base_run, token_ids
from lib.tasks import Pair
from lib.weights import ModelError

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
NORMS = {"q": "q_norm", "k": "k_norm"}
FUSED = ("c_attn", "qkv_proj")  # q, k and v in one module, side by side
KINDS = (*PROJECTIONS, "mlp", "block", "final")
MLPS = ("recomputed", "frozen")
Roles = Mapping[str, tuple[int, ...]]


class Receiver(NamedTuple):
    """What is patched: the q, k or v of a head, the input of an MLP (behind its norm), of a block or the final norm."""

    layer: int
    kind: str
    head: int = -1  # the query head of q, the key-value head of k and v
    role: str = "last"

    def __str__(self) -> str:
        if self.kind == "final":
            return f"final norm at {self.role}"
        where = f"{self.layer}.{self.head} {self.kind}" if self.head >= 0 else f"{self.kind} {self.layer}"
        return f"{where} at {self.role}"


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


@dataclass(frozen=True)
class Route:
    """What the senders of a batch speak to, and what is recomputed on the way."""

    receivers: Sequence[Receiver]
    roles: Roles  # the batch's tokens by role
    mlps: str


def run(
    model: Model,
    pairs: Sequence[Pair],
    *,
    receivers: Sequence[Receiver],
    senders: Sequence[Sequence[Site]] | None = None,
    sender_role: str = "last",
    mlps: str = "recomputed",
    label: str = "",
    **options: Any,
) -> pd.DataFrame:
    """Path patching of sets of senders into receivers that are set together; one row per pair x set x ablation.

    senders      sets of heads, MLPs, attention modules or `EMBED`, replaced together at `sender_role`; default: all
                 that come before a receiver, each alone.
    mlps         `recomputed` or `frozen`: the MLPs between senders and receivers.
    label        what the column `receivers` says; default: the receivers listed.
    options      direction, ablations, pool, seed, memory, profile, pools: as in `sweep.run`.

    The rows have the columns of `records.PATH_SCHEMA`: `layer` and `head` are the first sender's, `sender` its
    component, `site_set` the set's place in the list, `arrived` the L2 norm of the change at the receivers' inputs.

    Raises ValueError for unknown words, a sender not before any receiver, and roles that share no token (attention is
    held, so nothing travels between tokens); SweepError when a row does not prove itself.
    """
    receivers = [Receiver(*receiver) for receiver in receivers]
    if mlps not in MLPS:
        raise ValueError(f"mlps {mlps!r} is unknown; allowed are {', '.join(MLPS)}")
    check_receivers(model, receivers)
    prove_receivers(model, token_ids(model, [pairs[0].clean.ids] if pairs else [[0]]))
    for group in grouped(pairs):
        check_roles(group[0], receivers, sender_role)
    sets = senders_before(model, receivers) if senders is None else [tuple(Site(*site) for site in s) for s in senders]
    for sender in {site for sites in sets for site in sites}:
        if sender.component == "resid":
            raise ValueError("resid cannot be a sender: it holds what every earlier sender has said; name those")
        hooks.check_site(model, sender)
        if not any(before(sender, receiver) for receiver in receivers):
            raise ValueError(f"sender {sender} is not before any receiver: {', '.join(map(str, receivers))}")

    def grower(roles: Roles) -> Grow:
        return lambda *parts: grow_paths(*parts, Route(receivers, roles, mlps))

    how = Options(role=sender_role, **options)
    out = sweep.run_sets(model, pairs, sets, how, grower=grower, needs=("attn", "head", "mlp", "resid"))
    text = label or "; ".join(map(str, receivers))
    return out.assign(sender=out["component"], component="path", receivers=text, mlps=mlps)


def check_receivers(model: Model, receivers: Sequence[Receiver]) -> None:
    """ValueError for receivers that the model lacks, and for none at all."""
    if not receivers:
        raise ValueError("no receivers: give at least one q, k or v of a head, MLP, block, or the final norm")
    for receiver in receivers:
        if receiver.kind not in KINDS:
            raise ValueError(f"receiver kind {receiver.kind!r} is unknown; allowed are {', '.join(KINDS)}")
        if receiver.kind == "final" and receiver.role != "last":
            raise ValueError(f"receiver {receiver}: only the last token's final norm reaches the answer")
        if receiver.kind != "final" and not 0 <= receiver.layer < model.n_layers:
            raise ValueError(f"receiver {receiver}: {model.name} has layers 0 to {model.n_layers - 1}")
        count, what = (model.n_heads, "query") if receiver.kind == "q" else (model.n_kv_heads, "key-value")
        if receiver.kind in PROJECTIONS and not 0 <= receiver.head < count:
            raise ValueError(f"receiver {receiver}: {model.name} has {what} heads 0 to {count - 1}")


def check_roles(pair: Pair, receivers: Sequence[Receiver], sender_role: str) -> None:
    """ValueError where the template lacks a role, or no token of the sender's role can reach a receiver."""
    roles = pair.clean.roles
    for role in (sender_role, *(receiver.role for receiver in receivers)):
        check_role(pair, role)
    if not any(set(roles[sender_role]) & set(roles[receiver.role]) for receiver in receivers):
        raise ValueError(
            f"no path from {sender_role!r} to {', '.join(map(str, receivers))}: attention is held, so a sender is "
            "heard at its own tokens only; give receivers at the sender's role"
        )


class Change(NamedTuple):
    """How far a receiver's input lies from the base row's in the first run, at the tokens that senders reach."""

    delta: Float[Tensor, "rows tokens width"]
    tokens: list[int]


@torch.no_grad()
def grow_paths(model: Model, base: BaseRun, rows: Sequence[Row], sources: Activations, route: Route) -> Grown:
    """Both runs for every row: `row.sites` are its senders, at the base run's positions. `base` holds `attn`, `head`,
    `mlp` and `resid` beside the senders' components."""
    first_run = FirstRun(model, base, rows, sources, route)
    changes, last = first_run.run(), model.n_layers - 1
    joins = {receiver: last if receiver.kind == "final" else receiver.layer for receiver in route.receivers}
    first = [min([joins[r] for r in changes if any(before(s, r) for s in row.sites)], default=last) for row in rows]
    batch = Batch(model, base, rows, first)
    start = min(token for change in changes.values() for token in change.tokens)
    device, fired = batch.owner.device, {}  # asked only when the pass is over: an answer waits for the device
    with hooks.removing() as handles:
        for layer in range(model.n_layers):
            handles.append(batch.joining(model, layer))
        for receiver in route.receivers:
            # all tokens of its role, also those that no sender changed; before the first one nothing differs
            tokens = [token for token in route.roles[receiver.role] if token >= start]
            here = torch.tensor([i for i, layer in enumerate(first) if layer <= joins[receiver]], device=device)
            if not tokens or not len(here):
                continue
            change, place, fired[receiver] = changes.get(receiver), input_of(model, receiver), []
            places = batch.at.to(device)[here]
            given = Given(places, batch.owner[places], torch.tensor(tokens, device=device) - start, place.columns)
            if change is not None:
                changed = torch.tensor([tokens.index(token) for token in change.tokens], device=device)
                given = given._replace(delta=change.delta[here.to(change.delta.device)], changed=changed)
            handles += [place.on(given.set), place.on(partial(given.note, fired[receiver]))]
        hidden = batch.run(model, base, start)
    for receiver, seen in fired.items():
        if (times := sum(map(bool, seen))) != 1:
            raise SweepError(f"receiver {receiver}: its input was set {times} times in a pass, not once")
    squares = [change.delta.double().flatten(1).square().sum(1).to(device) for change in changes.values()]
    grown = Grown(hidden[: batch.prompts], hidden[batch.at.to(hidden.device)], *first_run.proof())
    return replace(grown, arrived=torch.stack(squares).sum(0).sqrt().cpu())


class Given(NamedTuple):
    """What a receiver is given in the second run: the base row's input with what arrived, whatever else has changed."""

    rows: Tensor  # places in the batch of the rows that it is given to
    owner: Tensor  # of each, the place of its base row
    offsets: Tensor  # of the receiver's tokens, from the pass's first
    columns: slice
    delta: Float[Tensor, "rows changed width"] | None = None
    changed: Tensor | None = None  # which of these tokens something arrives at

    def at(self, value: Tensor, rows: Tensor) -> tuple[Tensor, tuple]:
        """The values as a view to index, and the index of these rows' tokens in it."""
        return value[..., self.columns], (rows.to(value.device)[:, None], self.offsets.to(value.device)[None])

    def wanted(self, value: Tensor) -> Float[Tensor, "rows tokens width"]:
        """The base rows' input, with what arrived."""
        view, index = self.at(value, self.owner)
        out = view[index]
        if self.delta is not None:
            out[:, self.changed.to(out.device)] += self.delta.to(out)
        return out

    def set(self, value: Tensor) -> Tensor:
        """The values of the pass with the receiver's set."""
        value = value.clone()
        view, index = self.at(value, self.rows)
        view[index] = self.wanted(value)
        return value

    def note(self, seen: list[Tensor], value: Tensor) -> None:
        """Note whether the receiver's values are set."""
        view, index = self.at(value, self.rows)
        seen.append((view[index] == self.wanted(value)).all())


class FirstRun(Growing):
    """The run of the senders' tokens that records what arrives at the receivers, with all attention held."""

    def __init__(self, model: Model, base: BaseRun, rows: Sequence[Row], sources: Activations, route: Route) -> None:
        super().__init__(model, base, rows, sources)
        self.route, self.changes = route, {}
        self.offsets = torch.arange(len(base.positions), device=base.ids.device)
        # laid out before the pass: on its way nothing is to wait for the host
        self.made = {key: self.edit(*key) for key in self.edits}
        with_head = {layer: {row for row, *_ in edits} for (part, layer), edits in self.edits.items() if part == "head"}
        self.with_head = {at: torch.tensor(sorted(places), device=base.ids.device) for at, places in with_head.items()}

    def run(self) -> dict[Receiver, Change]:
        """Each receiver's change, where it shares tokens with the senders."""
        model, base, layers = self.model, self.base, range(self.model.n_layers)
        forwards = [(model.attns[layer], partial(self.attend, layer)) for layer in layers]
        if self.route.mlps == "frozen":
            forwards += [(model.mlps[layer], partial(self.held, "mlp", layer)) for layer in layers]
        written = [("embed", -1)] + [("mlp", layer) for layer in layers if self.route.mlps == "recomputed"]
        with hooks.removing() as handles, hooks.with_forwards(forwards):
            handles += [self.batch.joining(model, layer) for layer in layers]
            handles += [hooks.on_activation(model, at, part, partial(self.send, part, at)) for part, at in written]
            for receiver in self.route.receivers:
                shared = [i for i, token in enumerate(base.positions) if token in self.route.roles[receiver.role]]
                if shared:
                    self.changes[receiver], place = None, input_of(model, receiver)  # until it is read
                    read = partial(self.read, receiver, place, torch.tensor(shared, device=base.ids.device))
                    handles.append(hooks.on_input(place.read, read))
            handles.append(hooks.on_activation(model, layers[-1], "resid", partial(prove_base_rows, model, base)))
            tokens = torch.tensor(base.positions, device=base.ids.device)
            model.body(input_ids=base.ids[:, tokens], position_ids=tokens[None], use_cache=False)
        for receiver, change in self.changes.items():
            if change is None:
                raise SweepError(f"receiver {receiver}: its input was not read in the first run")
        return self.changes

    def send(self, component: str, layer: int, activation: Tensor) -> None:
        """Put the senders' values into an activation that this pass made."""
        if edit := self.made.get((component, layer)):
            edit.write(activation)
            self.observe(edit, self.base.activations[component, layer], activation)

    def held(self, component: str, layer: int, hidden_states: Tensor) -> Tensor:
        """The base values of a module for each row of the batch, the senders' own in theirs."""
        owner = self.batch.owner[: len(hidden_states)].to(hidden_states.device)
        value = self.base.activations[component, layer][owner]
        self.send(component, layer, value)
        if component == "attn" and layer in self.with_head:
            plain = self.base.activations["head", layer][owner]
            heads = plain.clone()
            self.send("head", layer, heads)
            rows = self.with_head[layer].to(hidden_states.device)
            # both through one call of o_proj: what the kernel's shape does to the last bits cancels
            new, old = self.model.o_projs[layer](torch.cat([heads[rows], plain[rows]])).chunk(2)
            value[rows] += new - old
        return value

    def attend(self, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """An attention module's `forward`: its base values."""
        return self.held("attn", layer, hooks.split_call(args, kwargs)[0]), None

    def read(self, receiver: Receiver, place: Input, shared: Tensor, value: Tensor) -> None:
        """Record a receiver's input at the tokens that it shares with the senders."""
        value = place.values(value[:, shared.to(value.device)])[..., place.columns]
        rows = self.batch.at.to(value.device)
        rows = torch.where(rows < len(value), rows, 0)  # one that has not joined yet: base row 0, no difference
        delta = value[rows] - value[self.batch.owner.to(value.device)[rows]]
        self.changes[receiver] = Change(delta, [self.base.positions[index] for index in shared.tolist()])


class Input(NamedTuple):
    """Where a receiver's input is read in the first run and set in the second."""

    read: nn.Module  # its input is what the first run reads
    values: Callable[[Tensor], Tensor]  # from that input to the values that are recorded
    columns: slice  # of these values
    on: Callable[[Callable[[Tensor], Tensor]], Any]  # puts a function on the values of the second run


def input_of(model: Model, receiver: Receiver) -> Input:
    """The modules behind a receiver."""
    if receiver.kind not in PROJECTIONS:
        modules = {"mlp": model.mlps, "block": model.blocks}.get(receiver.kind)
        module = model.final_norm if modules is None else modules[receiver.layer]
        return Input(module, lambda value: value, slice(None), partial(hooks.on_input, module))
    attention = model.attns[receiver.layer]
    module, first = projection(model, attention, receiver.kind)
    values, norm = module, getattr(attention, NORMS.get(receiver.kind, ""), None)
    if norm is not None and norm.weight.numel() > model.head_size:
        values, module = nn.Sequential(module, norm), norm
    columns = slice(first + receiver.head * model.head_size, first + (receiver.head + 1) * model.head_size)

    def on(visit: Callable[[Tensor], Tensor]) -> Any:
        return module.register_forward_hook(lambda _, args, output: visit(output))

    return Input(attention, values, columns, on)


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


@torch.no_grad()
def prove_receivers(model: Model, ids: Ids) -> None:
    """SweepError unless q, k and v of heads of layer 0, as `receivers_of` names them, are set where they are read, and
    move these heads, and those that share the k and v, alone. In attention by itself, on one prompt."""
    attention, calls, group = model.attns[0], [], model.n_heads // model.n_kv_heads
    note = attention.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with hooks.removing([note]):
        base_run(model, ids, (), (), layers=[0])
    args, kwargs = calls[0]

    def heads(place: Input | None = None) -> tuple[Tensor, list[Tensor]]:
        """The heads' outputs, (tokens, heads, head size), with a receiver's values in the reverse order of tokens."""
        seen, found = [], []

        def turn(value: Tensor) -> Tensor:
            found.append(value[..., place.columns].clone())
            value[..., place.columns] = found[0].flip(1)
            return value

        with hooks.removing([hooks.on_activation(model, 0, "head", lambda z: seen.append(z[0].clone()))]) as handles:
            handles += [place.on(turn)] if place else []
            attention(*args, **kwargs)
        return seen[0].unflatten(-1, (model.n_heads, -1)).double(), found

    plain, hidden = heads()[0], hooks.split_call(args, kwargs)[0]
    for head in sorted({0, group - 1, model.n_heads - 1}):
        for receiver in receivers_of(model, [Site(0, "head", head)], dict.fromkeys(PROJECTIONS, "all")):
            place, size = input_of(model, receiver), 1 if receiver.kind == "q" else group
            (turned, found), read = heads(place), place.values(hidden)[..., place.columns]
            if not (found and torch.allclose(read, found[0], rtol=1e-3)):
                raise SweepError(f"{model.name}: receiver {receiver} is not set where it is read")
            moved = (turned - plain).norm(dim=(0, 2))
            reached = torch.nonzero(moved > 1e-3 * moved.max()).flatten().tolist()
            if any(at // size != head // size for at in reached):
                raise SweepError(f"{model.name}: receiver {receiver} of head 0.{head} moves heads {reached}")


def prove_base_rows(model: Model, base: BaseRun, value: Tensor) -> None:
    """SweepError unless the first run's base rows end where the plain run's residual stream ends."""
    plain = base.activations["resid", model.n_layers - 1].double()
    off = (value[: len(plain)].double() - plain).norm() / plain.norm()
    # kernels of other shapes round differently in 16 bits, and eighty layers add up
    loose = 1e-1 if model.low_precision else 1e-3
    if not off <= loose:
        raise SweepError(
            f"{model.name}: with attention held, the base rows end {off:.2g} (relative) away from the plain run"
        )
