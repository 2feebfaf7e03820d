"""Which heads and MLPs bring the professions: two measurements of plain runs, without an intervention.

1. `attention_to_names`: how much of its attention each head gives to each name's tokens.
2. `value_vectors`: what each head and MLP writes, read off at the unembeddings of professions and supersets: is it the
   right profession, or only the right superset, and is it right for the name or the same for every name?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pandera.pandas as pa
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lib import hooks
from lib.batches import distinct_prompts, grouped, token_ids
from lib.hooks import NOISE, Model
from lib.readout import PostNorms, Readout, post_norms, readout
from lib.single_pass import BaseRun, SweepError, plain_runs
from lib.tasks import SLOTS, SUPERSETS, Pair
from lib.weights import ModelError
from steps.retrieval_heads.one_name import KINDS, Labels, centred, centred_within

_share = pa.Column("float32", pa.Check.in_range(0, 1), nullable=True)
_PAIR = {name: pa.Column(str) for name in ("pair_id", "quad_id", "half")}
_SITE = {"layer": pa.Column("int32"), "head": pa.Column("int32"), "position": pa.Column(str)}
ATTENTION = pa.DataFrameSchema(
    {
        **_PAIR,
        **_SITE,
        "onto": pa.Column(str),  # the name attended to
        "share": pa.Column("float32", pa.Check.in_range(0, 1.02)),  # of the attention from the position's last token
        "uniform": pa.Column("float32", pa.Check.in_range(0, 1)),  # what even attention to all tokens would give
    },
    strict=True,
    unique=["pair_id", *_SITE, "onto"],
    name="table of attention",
)
VALUES = pa.DataFrameSchema(
    {
        **_PAIR,
        "side": pa.Column(str, pa.Check.isin(("clean", "corrupt"))),
        "component": pa.Column(str, pa.Check.isin(("head", "mlp"))),
        **_SITE,
        # logits: own labels less the others, each centred over the half's prompts (`within`: those of its superset)
        **{f"{kind}_contrast": pa.Column("float32", nullable=True) for kind in KINDS},
        # 1 where the top label is an own one, 0 where it is not; and the share that a blind choice gets
        **{f"{kind}_{what}": _share for what in ("top", "chance") for kind in KINDS},
    },
    strict=True,
    unique=["pair_id", "side", "component", *_SITE],
    name="table of value vectors",
)


Prompted = tuple[Pair, str]  # a prompt: its pair, and "clean" or "corrupt"


def _names(pair: Pair) -> list[str]:
    """The name roles of a pair's template."""
    names = [role for role in pair.clean.roles if role.startswith("name_")]
    if not names:
        raise ValueError(f"pair {pair.pair_id}: template {pair.template!r} has no role name_a; use one with names")
    return names


# --- 1. attention ---


@contextmanager
def eager(model: Model) -> Iterator[None]:
    """Attention in its eager form, the only one that gives its pattern; the form before comes back on every way out."""
    before = model.model.config._attn_implementation
    try:
        model.model.set_attn_implementation("eager")
        yield
    finally:
        model.model.set_attn_implementation(before)


@torch.no_grad()
def attention_to_names(model: Model, pairs: Sequence[Pair], batch: int = 16) -> pd.DataFrame:
    """How each head shares out its attention over the names of the clean prompts (schema ATTENTION).

    A row per pair x layer x head x position x name: from `last` onto the tokens of each name, and from a name's last
    token onto that name's own tokens, itself included.

    Raises ModelError when the architecture gives no pattern that sums to one, SweepError when the eager run's logits
    are not those of the ordinary run within the dtype's noise.
    """
    frames = []
    for group in grouped(pairs, batch):
        frames += _attention(model, group)
    out = pd.concat(frames, ignore_index=True)
    order = {pair.pair_id: index for index, pair in enumerate(pairs)}
    return out.iloc[np.argsort(out["pair_id"].map(order).to_numpy(), kind="stable")].reset_index(drop=True)


def _attention(model: Model, pairs: Sequence[Pair]) -> list[pd.DataFrame]:
    """The rows of pairs that share a pass: one frame per position and name."""
    roles, ids = pairs[0].clean.roles, token_ids(model, [pair.clean.ids for pair in pairs])
    names = _names(pairs[0])
    asked = [("last", name) for name in names] + [(name, name) for name in names]
    shares = torch.zeros(len(asked), len(pairs), model.n_layers, model.n_heads)
    plain = model.logits(model.body(input_ids=ids, use_cache=False).last_hidden_state[:, -1])
    with eager(model), hooks.removing() as handles:
        for layer, module in enumerate(model.attns):

            def keep(_: torch.nn.Module, __: tuple, output: Any, layer: int = layer) -> None:
                pattern = _pattern(model, layer, output, ids.shape)
                for index, (position, name) in enumerate(asked):
                    shares[index, :, layer] = pattern[:, :, roles[position][-1], list(roles[name])].sum(-1).cpu()

            handles.append(module.register_forward_hook(keep))
        seen = model.logits(model.body(input_ids=ids, use_cache=False).last_hidden_state[:, -1])
    off, noise = (seen - plain).abs().max().item(), max(model.noise, NOISE[torch.float32])  # its softmax is in fp32
    if not off <= noise:
        raise SweepError(
            f"pair {pairs[0].pair_id} ...: with eager attention a logit differs from the ordinary run by {off:.3g}, "
            f"more than {noise:g}, the noise of {model.dtype}: these are not the patterns of the model's own run"
        )
    sites = pd.MultiIndex.from_product(
        [range(len(pairs)), range(model.n_layers), range(model.n_heads)], names=["pair", "layer", "head"]
    ).to_frame(index=False)
    about = {key: np.array([getattr(pair, key) for pair in pairs])[sites["pair"]] for key in _PAIR}
    where = {key: sites[key].to_numpy(np.int32) for key in ("layer", "head")}
    return [
        pd.DataFrame(about | where).assign(
            position=position,
            onto=name,
            share=part.flatten().numpy(),
            uniform=np.float32(len(roles[name]) / (roles[position][-1] + 1)),
        )
        for (position, name), part in zip(asked, shares, strict=True)
    ]


def _pattern(model: Model, layer: int, output: Any, shape: Sequence[int]) -> Float[Tensor, "pairs heads tokens tokens"]:
    """The attention pattern in what an attention module returns, checked."""
    pattern = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    wanted = (shape[0], model.n_heads, shape[1], shape[1])
    if pattern is None or tuple(pattern.shape) != wanted:
        found = "none" if pattern is None else f"one of shape {tuple(pattern.shape)}"
        raise ModelError(
            f"{model.name}: the attention module of layer {layer} gives no pattern of shape {wanted} (pairs, heads, "
            f"tokens, tokens) with eager attention but {found}; attention cannot be measured on this architecture"
        )
    off = (pattern.float().sum(-1) - 1).abs().max().item()
    if not off < 0.02:  # bf16 shares of 30 tokens add up to 1 within 0.01
        raise ModelError(
            f"{model.name}: the attention of layer {layer} does not add up to 1 but is off by {off:.2g}: this "
            "architecture has a sink or a cap that takes a share; attention cannot be compared with even attention"
        )
    return pattern.float()


# --- 2. value vectors ---


def professions_of(table: pd.DataFrame, people: pd.DataFrame) -> dict[tuple[str, str], dict[str, str]]:
    """The profession at each name role of each prompt of a pairs table: {(pair_id, side): {"name_a": "poet", ...}}.

    From the table's own columns, else from the table of people. ValueError names the people that are in neither.
    """
    known, found, missed = dict(zip(people["name"], people["profession"], strict=True)), {}, {}
    for row in table.to_dict("records"):
        for side in ("clean", "corrupt"):
            names = {slot: row[f"{side}_{slot}"] for slot in SLOTS if row.get(f"{side}_{slot}")}
            own = {slot: row.get(f"{side}_profession_{slot}") or known.get(name) for slot, name in names.items()}
            missed |= {names[slot]: None for slot, profession in own.items() if profession is None}
            found[row["pair_id"], side] = {f"name_{slot}": profession for slot, profession in own.items()}
    if missed:
        some = ", ".join(list(missed)[:10]) + (", ..." if len(missed) > 10 else "")
        raise ValueError(
            f"the professions of {len(missed)} people are not known: {some}; add them to the people_file, this step "
            "compares what the model writes at their names with what they are"
        )
    return found


def value_vectors(
    model: Model,
    pairs: Sequence[Pair],
    professions: Mapping[tuple[str, str], Mapping[str, str]],
    labels: Labels,
    batch: int = 16,
) -> pd.DataFrame:
    """What every head and MLP says of the names: a row per prompt x site x position (schema VALUES).

    A head's output is its value vectors mixed by its attention, through its own slice of o_proj, any norm behind the
    attention, and the final norm, both at the run's own scale, onto the labels' unembeddings: logits before any cap
    (direct logit attribution; Elhage et al. 2021). An MLP's output is read likewise. Positions are `last`, where the
    own labels are those of all names, and the last token of each name, where they are that name's alone; labels that
    only another name of the prompt has count for neither side. Each label is centred on its mean over the prompts
    given, half by half, every superset counting alike: a site that promotes one word whatever the names has contrast 0.
    For `within` it is centred on the prompts of the own superset: a site that promotes the commonest profession of the
    right superset has contrast 0 there. So `within` alone says that the profession itself is written; `profession`
    rises with the superset as well.

    Args:
        pairs: clean and corrupt prompts are both read, each prompt once.
        professions: see `professions_of`.
        labels: see `labels_of`.
    """
    if unknown := {one for own in professions.values() for one in own.values()} - set(labels.words):
        raise ValueError(f"profession {min(unknown)!r} is not among the labels {', '.join(labels.words)}")
    read, posts = readout(model), post_norms(model)
    maps = _label_maps(model, read, posts, labels)
    parts: dict[tuple[str, str], list] = {}  # by half and role
    for group in grouped(pairs):
        prompts = distinct_prompts(group)
        roles = [*_names(group[0]), "last"]
        positions = [group[0].clean.roles[role][-1] for role in roles]
        for places, run in plain_runs(model, list(prompts), positions, hooks.COMPONENTS, size=batch, cache=True):
            chunk = [list(prompts.values())[place] for place in places]
            said = _said(model, run, read, posts, maps)
            for index, role in enumerate(roles):
                parts.setdefault((group[0].half, role), []).append((chunk, said[:, index]))
    sites = [(layer, "head", head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    sites += [(layer, "mlp", -1) for layer in range(model.n_layers)]
    frames = []
    for (_, role), said in parts.items():
        prompted, values = [prompt for chunk, _ in said for prompt in chunk], np.concatenate([own for _, own in said])
        frames.append(_scored(prompted, values, role, professions, labels, sites))
    out = pd.concat(frames, ignore_index=True)
    out.attrs["facts"] = {"professions": list(labels.words), "scored": list(labels.scored)}
    return out


class LabelMap(NamedTuple):
    """From a layer's o_proj input and MLP output to labels: what each feature adds to each label at scale 1."""

    head: Float[Tensor, "heads size labels"]
    mlp: Float[Tensor, "hidden labels"]


@torch.no_grad()
def _label_maps(model: Model, read: Readout, posts: Sequence[PostNorms], labels: Labels) -> list[LabelMap]:
    """One per layer. A profession of two forms is read off at their mean; labels: candidates, then professions."""
    nothing = torch.zeros(read.unembed.shape[1], dtype=torch.float64)
    directions = torch.stack(
        [read.directions(token) for token in labels.candidates]
        + [read.directions(own).mean(0) if own else nothing for own in labels.tokens]
    )
    maps, width = [], model.n_heads * model.head_size
    for layer, post in enumerate(posts):
        features = torch.eye(width, dtype=model.dtype, device=model.device)
        o_proj = model.o_projs[layer]  # run, not read: its weight may be quantised or transposed
        written = (o_proj(features) - o_proj(torch.zeros_like(features[:1]))).cpu().double()
        ends = [directions if norm is None else norm.pull(directions) for norm in post]
        maps.append(LabelMap((written @ ends[0].T).unflatten(0, (model.n_heads, -1)), ends[1].T))
    return maps


def _said(
    model: Model, base: BaseRun, read: Readout, posts: Sequence[PostNorms], maps: Sequence[LabelMap]
) -> Float[np.ndarray, "prompts positions sites labels"]:
    """Each site's logits of the labels at the run's own scales; heads by layer, then MLPs."""

    def of(component: str, layer: int) -> Tensor:
        return base.activations[component, layer].cpu().double()

    def scale(component: str, layer: int) -> Tensor:
        norm = getattr(posts[layer], component)
        return final if norm is None else final * norm.scale(of(component, layer))[..., None]

    final = read.norm.scale(of("resid", model.n_layers - 1))[..., None]
    heads = [
        torch.einsum("nphs,hsl->nphl", of("head", layer).unflatten(-1, own.head.shape[:2]), own.head)
        / scale("attn", layer)[..., None]
        for layer, own in enumerate(maps)
    ]
    mlps = [(of("mlp", layer) @ own.mlp / scale("mlp", layer))[:, :, None] for layer, own in enumerate(maps)]
    return torch.cat(heads + mlps, dim=2).float().numpy()


def _scored(
    prompts: Sequence[Prompted],
    said: Float[np.ndarray, "prompts sites labels"],
    role: str,
    professions: Mapping[tuple[str, str], Mapping[str, str]],
    labels: Labels,
    sites: Sequence[tuple[int, str, int]],
) -> pd.DataFrame:
    """The rows of one half and position."""
    everyone = [list(professions[pair.pair_id, side].values()) for pair, side in prompts]
    own = [professions[pair.pair_id, side].get(role) for pair, side in prompts]
    own = [[one] if one else all_of_them for one, all_of_them in zip(own, everyone, strict=True)]
    supersets = ["+".join(sorted({labels.superset_of[one] for one in mine})) for mine in own]
    across, inside = centred(said, supersets), centred_within(said, supersets)
    sizes = (len(prompts), len(sites))
    columns: dict[str, np.ndarray] = {
        key: np.repeat([getattr(pair, key) for pair, _ in prompts], sizes[1]) for key in _PAIR
    }
    columns["side"] = np.repeat([side for _, side in prompts], sizes[1])
    for key, values in zip(("layer", "component", "head"), zip(*sites, strict=True), strict=True):
        columns[key] = np.tile(np.array(values, dtype=None if key == "component" else np.int32), sizes[0])
    columns["position"] = np.repeat(role, sizes[0] * sizes[1])
    for kind in KINDS:
        each = [_contest(kind, mine, those, labels) for mine, those in zip(own, everyone, strict=True)]
        weights, mine, asked = (np.stack(column) for column in zip(*each, strict=True))
        chance = np.where((mine & asked).any(1), (mine & asked).sum(1) / asked.sum(1).clip(min=1), np.nan)[:, None]
        values = inside if kind == "within" else across
        top = np.where(asked[:, None], values, -np.inf).argmax(-1)
        columns[f"{kind}_contrast"] = np.einsum("nsl,nl->ns", values, weights)
        columns[f"{kind}_top"] = np.where(np.isfinite(chance), np.take_along_axis(mine, top, 1), np.nan)
        columns[f"{kind}_chance"] = np.repeat(chance, sizes[1], axis=1)
    return pd.DataFrame(
        {key: value.ravel().astype(np.float32) if value.ndim == 2 else value for key, value in columns.items()}
    )[list(VALUES.columns)]


class Contest(NamedTuple):
    """Which labels a prompt's own ones compete with; candidates first, then professions."""

    weights: Float[np.ndarray, " labels"]  # of the contrast; NaN if no own label is scored or none is left beside it
    mine: Bool[np.ndarray, " labels"]
    asked: Bool[np.ndarray, " labels"]  # labels that compete for the top, the own ones among them


def _contest(kind: str, own: Sequence[str], everyone: Sequence[str], labels: Labels) -> Contest:
    """The contest of one kind for the professions `own`, in a prompt whose names have those of `everyone`."""
    words, of = np.array([*SUPERSETS, *labels.words]), np.array([*SUPERSETS, *labels.supersets])
    asked = np.array([True] * len(SUPERSETS) + [bool(tokens) for tokens in labels.tokens])
    asked &= (np.arange(len(words)) < len(SUPERSETS)) == (kind == "superset")
    superset_of = labels.superset_of
    if kind == "superset":
        own, everyone = ([superset_of[one] for one in who] for who in (own, everyone))
    if kind == "within":
        asked &= np.isin(of, [superset_of[one] for one in own])
    mine = np.isin(words, own)
    asked &= mine | ~np.isin(words, everyone)
    weights = []
    for one in own:
        this = asked & (words == one)
        others = asked & ~mine & ((of == superset_of[one]) if kind == "within" else True)
        if this.any() and others.any():
            weights.append(this - others / others.sum())
    return Contest(np.mean(weights, axis=0) if weights else np.full(len(words), np.nan), mine, asked)
