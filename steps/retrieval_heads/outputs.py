"""What every head writes: what a probe tells from its output, and what the slice and the unembedding make of it.

1. `read`: plain runs; every head's output (its slice of the o_proj input), and the streams that the slice's sites are
   given, at the last token of each name or of the prompt.
2. `told`: a ridge classifier (scikit-learn) on one head's output tells the class. Quads are whole in a fold, so no
   person of a test fold is in training; chance is one over the number of classes. At the names a second one tells the
   profession among those of the name's own superset. The same classifier on what is known of the people without a
   model stands beside them (`BASELINES`): their region, century and gender; the letters of their names.
3. `shares`: what the slice makes of it. At a receiver, classes lie apart in what its values and output projection make
   of the stream (its own OV) or, for an MLP, in what its neurons are given by the projections that read its normed
   input; the directions between their means are those of the discovery half. A head's share is how much of that
   distance its output makes up, at the run's own scales: all that is written before a receiver adds up to 1, and what
   is the same for every class makes up 0.
4. `unembedded`: the same at the unembeddings of the candidates (direct logit attribution; Elhage et al. 2021). It is
   blind to what later layers still have to turn into a word, and stands beside the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import pandera.pandas as pa
import torch
from jaxtyping import Float, Int
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.utils.class_weight import compute_sample_weight
from torch import Tensor, nn

from lib import hooks, paths
from lib.batches import distinct_prompts, grouped
from lib.data import HALVES
from lib.hooks import Model, Site
from lib.readout import FixedNorm, fixed_norm, post_norms, readout
from lib.single_pass import plain_runs
from lib.tasks import SLOTS, Pair
from lib.weights import ModelError
from pipeline.rates import timed
from steps.retrieval_heads.routes import speaks

FOLDS = 5
BASELINES = ("metadata", "letters")  # in the column `component`, without a layer
LETTERS = 256  # features that runs of one to three letters are hashed into
# A quad's means, every class counting alike: accuracy less chance, for the class and for the profession in it; the
# share at the receivers; and the class at the unembedding (logits).
MEASURES = ("told", "profession_told", "share", "unembedded")
OUTPUTS = pa.DataFrameSchema(
    {
        **{name: pa.Column(str) for name in ("quad_id", "half", "position", "component")},
        **{name: pa.Column("int32") for name in ("layer", "head")},
        **{name: pa.Column("float32", nullable=True) for name in MEASURES},
    },
    strict=True,
    unique=["quad_id", "half", "position", "component", "layer", "head"],
    name="table of heads' outputs",
)


Labels = Mapping[tuple[str, str], Mapping[str, str]]  # by pair and side ("clean", ...): something of each role


def professions_of(table: pd.DataFrame, people: pd.DataFrame) -> dict[tuple[str, str], dict[str, str]]:
    """The profession at each name role of each prompt of a pairs table: {(pair_id, side): {"name_a": "poet", ...}}.

    From the table's own columns, else from the table of people; "" of people that are in neither, or there of another
    superset than the prompt's answer.
    """
    known, found = people.set_index("name")[["superset", "profession"]].to_dict("index"), {}
    for row in table.to_dict("records"):
        for side, answer in (("clean", row["answer"]), ("corrupt", row["corrupt_answer"])):
            own = {}
            for slot in SLOTS:
                there = known.get(name := row.get(f"{side}_{slot}"), {})
                same = answer in SLOTS or there.get("superset") == answer
                if name:
                    own[f"name_{slot}"] = row.get(f"{side}_profession_{slot}") or there.get("profession", "") * same
            found[row["pair_id"], side] = own
    return found


def classes_of(pair: Pair, side: str, about: About) -> list[str]:
    """The class of each name of a prompt: that of its profession, else the prompt's answer; "" where that is a slot."""
    answer = pair.candidates[pair.answer if side == "clean" else pair.corrupt_answer]
    other = "" if answer in SLOTS else answer
    return [about.superset_of.get(own, other) for own in about.professions[pair.pair_id, side].values()]


def described(
    table: pd.DataFrame, people: pd.DataFrame, about: Sequence[str]
) -> dict[tuple[str, str], dict[str, tuple[str, ...]]]:
    """What is known of each name of each prompt without a model: the name, and its attributes `about` ("" of people
    who are not in the table of people), by pair and side and by role."""
    known = people.set_index("name")[about].astype(str)
    found = {}
    for row in table.to_dict("records"):
        for side in ("clean", "corrupt"):
            names = {slot: row[f"{side}_{slot}"] for slot in SLOTS if row.get(f"{side}_{slot}")}
            found[row["pair_id"], side] = {
                f"name_{slot}": (name, *(known.loc[name] if name in known.index else [""] * len(about)))
                for slot, name in names.items()
            }
    return found


class Receiver(NamedTuple):
    """A site of the slice that is given a stream."""

    site: Site
    module: nn.Module  # the norm that makes its input
    norm: FixedNorm
    value: Float[Tensor, "hidden size"] | None  # of a head: from the normed stream to its value; None for an MLP
    metric: Float[Tensor, "size size"]  # inner products of what a head's output projection, an MLP's inputs make of it

    def aim(
        self, stream: Float[Tensor, "rows hidden"], codes: Int[np.ndarray, " rows"], known: np.ndarray
    ) -> Float[Tensor, "rows hidden"]:
        """What a vector of the stream is multiplied with: from all other classes to the row's, at the row's scale."""
        seen = self.norm(stream) if self.value is None else self.norm(stream) @ self.value
        apart = from_others(torch.stack([seen[known & (codes == code)].mean(0) for code in np.unique(codes)]))
        apart = apart @ self.metric if self.value is None else apart @ self.metric @ self.value.T
        return self.norm.pull(apart)[codes] / self.norm.scale(stream)[:, None]


class About(NamedTuple):
    """What is known of the prompts."""

    professions: Labels  # at each name role
    superset_of: Mapping[str, str]
    tokens: Mapping[str, int]  # of each superset, as the template asks for it
    described: Mapping[tuple[str, str], Mapping[str, tuple[str, ...]]] = {}  # `described`


class Read(NamedTuple):
    """What was read: a row per prompt and place."""

    rows: (
        pd.DataFrame
    )  # quad_id, half, label (the class), profession, people (of each name: the name and its attributes)
    heads: Float[np.ndarray, "rows layers width"]
    streams: dict[nn.Module, Float[Tensor, "rows hidden"]]  # what each norm is given
    scales: Float[np.ndarray, "rows layers"]  # of a norm behind attention; 1 where there is none

    def part(self, some: np.ndarray) -> Read:
        """Some of the rows."""
        streams = {module: stream[torch.tensor(some)] for module, stream in self.streams.items()}
        return Read(self.rows[some].reset_index(drop=True), self.heads[some], streams, self.scales[some])


def from_others(values: Float[Tensor, "classes ..."]) -> Float[Tensor, "classes ..."]:
    """Each class's less the mean of all others'."""
    return values - (values.sum(0) - values) / (len(values) - 1)


def receiving(sites: Sequence[Site], position: str) -> list[Site]:
    """What of the slice is given what is written at a position: its heads' values at the names; at the last token its
    MLPs, or its heads where it has none."""
    mlps = [site for site in sites if site.component == "mlp"]
    return mlps if position == "last" and mlps else [site for site in sites if site.component == "head"]


@torch.no_grad()
def receiver(model: Model, site: Site) -> Receiver:
    """The site as a receiver. ModelError where its input does not come from a norm of its block."""
    block, is_head = model.blocks[site.layer], site.component == "head"
    module = (model.attns if is_head else model.mlps)[site.layer]
    made: dict[nn.Module, Tensor] = {}
    found: list[nn.Module] = []
    with hooks.removing() as handles:
        handles += [child.register_forward_hook(lambda m, _, out: made.update({m: out})) for child in block.children()]
        handles += [hooks.on_input(module, lambda hidden: found.extend(m for m, out in made.items() if out is hidden))]
        model.body(input_ids=two_tokens(model), use_cache=False)
    if not found:
        raise ModelError(f"{model.name}: no norm of block {site.layer} makes the input of {hooks.site_name(*site)}")
    width = model.unembed.weight.shape[1]
    norm = fixed_norm(found[-1], width)
    if not is_head:
        return Receiver(site, found[-1], norm, None, heard(model, module))
    project, first = paths.projection(model, module, "v")
    eye = torch.eye(width, dtype=model.dtype, device=model.device)
    group = site.head * model.n_kv_heads // model.n_heads
    columns = slice(first + group * model.head_size, first + (group + 1) * model.head_size)
    value = (project(eye) - project(torch.zeros_like(eye[:1])))[:, columns].cpu().double()
    out = projected(model, site.layer)[hooks.columns_of(model, site)].double()
    return Receiver(site, found[-1], norm, value, out @ out.T)


def two_tokens(model: Model) -> Int[Tensor, "1 2"]:
    """The shortest prompt in which one token attends to another."""
    return torch.arange(1, 3, device=model.device)[None]


def heard(model: Model, mlp: nn.Module) -> Float[Tensor, "hidden hidden"]:
    """Inner products of inputs as an MLP's neurons are given them: what none of its projections reads has length 0, so
    that large vectors that nobody reads are no part of its input. The identity for experts behind a router, which are
    not given the input itself. Projections are run, not read: they may be quantised or transposed."""
    seen: list[Tensor] = []
    readers: list[nn.Module] = []
    matrices = [part for part in mlp.modules() if getattr(getattr(part, "weight", None), "ndim", 0) == 2]
    with hooks.removing() as handles:
        handles.append(hooks.on_input(mlp, seen.append))
        for part in matrices:
            handles.append(hooks.on_input(part, lambda x, part=part: readers.extend([part] * (x is seen[-1]))))
        model.body(input_ids=two_tokens(model), use_cache=False)
    eye = torch.eye(model.unembed.weight.shape[1], dtype=model.dtype, device=model.device)
    made = [(part(eye) - part(torch.zeros_like(eye[:1]))).float() for part in readers]
    return sum(own @ own.T for own in made or [eye.float()]).cpu().double()


def projected(model: Model, layer: int) -> Float[Tensor, "width hidden"]:
    """What each feature of the o_proj input adds to the attention output. o_proj is run, not read: it may be quantised
    or transposed."""
    eye = torch.eye(model.n_heads * model.head_size, dtype=model.dtype, device=model.device)
    return (model.o_projs[layer](eye) - model.o_projs[layer](torch.zeros_like(eye[:1]))).float().cpu()


@torch.no_grad()
def read(model: Model, pairs: Sequence[Pair], about: About, position: str, norms: Iterable[nn.Module]) -> Read:
    """Both prompts of the pairs, each once, at the last token of every name, or at the prompt's, where the class is
    that of all names; with the streams that the norms are given."""
    rows, heads, scales, seen = [], [], [], {norm: [] for norm in norms}
    now: dict[nn.Module, Tensor] = {}
    posts = post_norms(model)
    components = ("head", "attn") if any(post.attn for post in posts) else ("head",)
    with hooks.removing() as handles:
        handles += [hooks.on_input(norm, lambda x, norm=norm: now.update({norm: x})) for norm in norms]
        for group in grouped(pairs):
            prompts = list(distinct_prompts(group).items())
            names = list(about.professions[group[0].pair_id, "clean"])
            at = [group[0].clean.roles[place][-1] for place in (names if position == "names" else ["last"])]
            for chunk, run in plain_runs(model, [ids for ids, _ in prompts], at, components, size=16):
                for pair, side in (prompts[index][1] for index in chunk):
                    own, classes = about.professions[pair.pair_id, side].values(), classes_of(pair, side, about)
                    known = about.described.get((pair.pair_id, side), {})
                    people = [known.get(name) for name in names]
                    both = [("+".join(sorted(set(classes))) if all(classes) else "", "", people)]
                    named = both if position == "last" else zip(classes, own, ([one] for one in people), strict=True)
                    rows += [(pair.quad_id, pair.half, *one) for one in named]
                flat = {key: value.flatten(0, 1) for key, value in run.activations.items()}
                layers = range(model.n_layers)
                heads.append(np.stack([flat["head", layer].float().cpu().numpy() for layer in layers], 1))
                behind = [
                    np.ones(len(heads[-1])) if post.attn is None else post.attn.scale(flat["attn", layer]).numpy()
                    for layer, post in enumerate(posts)
                ]
                scales.append(np.stack(behind, 1))
                for norm, parts in seen.items():
                    parts.append(now[norm][:, at].flatten(0, 1).cpu().double())
    streams = {norm: torch.cat(parts) for norm, parts in seen.items()}
    rows = pd.DataFrame(rows, columns=["quad_id", "half", "label", "profession", "people"])
    return Read(rows, np.concatenate(heads), streams, np.concatenate(scales))


def large_enough(rows: pd.DataFrame, by: str, within: Sequence[str] = ()) -> np.ndarray:
    """Rows whose label has a quad for each fold and is in the discovery half, and is not alone within its group."""
    first = rows.loc[rows["half"] == next(half for half in HALVES if (rows["half"] == half).any()), by]
    sizes = rows[rows[by].isin(first)].groupby(by)["quad_id"].nunique()
    kept = rows[by].isin(sizes.index[sizes >= FOLDS]) & (rows[by] != "")
    left = rows[kept].assign(all="")
    alone = left.groupby(list(within) or "all")[by].transform("nunique") < 2
    return (kept & ~alone.reindex(rows.index, fill_value=True)).to_numpy()


def told(
    outputs: Float[np.ndarray, "rows heads size"], rows: pd.DataFrame, by: str, seed: int, within: Sequence[str] = ()
) -> Float[np.ndarray, "rows heads"]:
    """1 where a held-out row's label is told from one head's output, of those of its group, 0 where it is not; less
    chance, and weighted so that in a half every group, and in it every label, counts alike. NaN in other rows.

    Inputs keep their own units, so that features of mere noise count little; the penalty is their total variance, so
    that it means the same at any scale.
    """
    out, some = np.full(outputs.shape[:2], np.nan), large_enough(rows, by, within)
    own, values = rows[some].assign(all=""), outputs[some]
    labels, group = own[by].to_numpy(), own[within[0] if within else "all"].to_numpy()
    if len(set(own["quad_id"])) < FOLDS:
        return out
    right, classes = np.full(values.shape[:2], np.nan), np.unique(labels)
    rivals = np.array([[(group[labels == one] == mine).any() for one in classes] for mine in group])
    sides = np.where(labels[:, None] == classes, 1.0, -1.0)
    for train, held in GroupKFold(FOLDS, shuffle=True, random_state=seed).split(labels, labels, own["quad_id"]):
        rare = compute_sample_weight("balanced", labels[train])
        for head in range(values.shape[1]):
            x = values[train, head].astype(float)
            ridge = Ridge(alpha=max(x.var(0).sum(), 1e-12)).fit(x, sides[train], sample_weight=rare)
            scores = np.where(rivals[held], ridge.predict(values[held, head]), -np.inf)
            right[held, head] = classes[scores.argmax(1)] == labels[held]
    out[some] = (right - 1 / rivals.sum(1)[:, None]) * even(own, by, within[0] if within else "all")[:, None]
    return out


def even(rows: pd.DataFrame, by: str, group: str) -> Float[np.ndarray, " rows"]:
    """Weights of mean 1 with which, in each half, every group and every label in it counts alike."""
    size = rows.groupby(["half", group, by])[by].transform("size")
    labels = rows.groupby(["half", group])[by].transform("nunique")
    groups, n = (rows.groupby("half")[group].transform(how) for how in ("nunique", "size"))
    return (n / (size * labels * groups)).to_numpy()


def along(
    model: Model, seen: Read, layer: int, aim: Float[Tensor, "rows hidden"], post: FixedNorm | None
) -> Float[np.ndarray, "rows heads"]:
    """How far the output of each head of a layer goes along each row's aim; `post` is the norm behind its attention."""
    aim = aim if post is None else post.pull(aim) / torch.from_numpy(seen.scales[:, layer, None])
    each = (aim.float() @ projected(model, layer).T).numpy() * seen.heads[:, layer]
    return each.reshape(len(each), model.n_heads, -1).sum(2)


@torch.no_grad()
def aimed(
    model: Model, seen: Read, hear: Sequence[Receiver], tokens: Mapping[str, int]
) -> dict[str, Float[np.ndarray, "rows layers heads"]]:
    """`share` and `unembedded` of every head, weighted so that every class counts alike; NaN where nothing hears it.

    Several receivers are added up, each in the squared units of its own outputs; the whole of a half is its rows' mean.
    """
    classes, codes = np.unique(seen.rows["label"], return_inverse=True)
    half, weight = seen.rows["half"].to_numpy(), even(seen.rows.assign(all=""), "label", "all")
    known, posts = half == next(one for one in HALVES if (half == one).any()), post_norms(model)
    aims = {one.site: one.aim(seen.streams[one.module], codes, known) for one in hear}
    wholes = {one.site: (aims[one.site] * seen.streams[one.module]).sum(1).numpy() * weight for one in hear}
    final = readout(model)
    words = [final.directions([tokens[part] for part in one.split("+")]).mean(0) for one in classes]
    word = from_others(torch.stack(words))[codes] / final.norm.scale(seen.streams[model.final_norm])[:, None]
    out = {name: np.full((len(half), model.n_layers, model.n_heads), np.nan) for name in ("share", "unembedded")}
    for layer, post in enumerate(posts):
        out["unembedded"][:, layer] = along(model, seen, layer, word, post.attn) * weight[:, None]
        behind = [one.site for one in hear if speaks(Site(layer, "head", 0), [one.site])]
        if behind:
            aim, whole = sum(aims[site] for site in behind), pd.Series(sum(wholes[site] for site in behind))
            share = along(model, seen, layer, aim, post.attn) * weight[:, None]
            out["share"][:, layer] = share / whole.groupby(half).transform("mean").to_numpy()[:, None]
    return out


def table(
    model: Model, pairs: Sequence[Pair], about: About, sites: Sequence[Site], position: str, seed: int
) -> pd.DataFrame:
    """MEASURES of every head at a position, per quad (schema OUTPUTS); `sites` is the slice. Classes and professions of
    fewer quads than there are folds are left out."""
    hear = [receiver(model, site) for site in receiving(sites, position)]
    norms = {model.final_norm, *(one.module for one in hear)}
    seen = read(model, pairs, about, position, norms)
    n_sites = model.n_layers * model.n_heads
    every = seen.heads.reshape(len(seen.rows), n_sites, model.head_size)
    found = {name: np.full(every.shape[:2], np.nan) for name in MEASURES}
    found["told"] = told(every, seen.rows, "label", seed)
    found["profession_told"] = told(every, seen.rows, "profession", seed, within=("label",))
    if (some := large_enough(seen.rows, "label")).any():
        for name, values in aimed(model, seen.part(some), hear, about.tokens).items():
            found[name][some] = values.reshape(-1, n_sites)
    keys = [seen.rows["quad_id"], seen.rows["half"]]
    means = {name: pd.DataFrame(values).groupby(keys).mean() for name, values in found.items()}
    index, site = means["told"].index, np.arange(n_sites, dtype=np.int32)
    columns = {name: np.repeat(index.get_level_values(name), n_sites) for name in ("quad_id", "half")}
    columns |= {"position": position, "component": "head"}
    columns |= {"layer": np.tile(site // model.n_heads, len(index)), "head": np.tile(site % model.n_heads, len(index))}
    columns |= {name: mean.to_numpy(np.float32).ravel() for name, mean in means.items()}
    parts = [pd.DataFrame(columns)]
    for name, values in known_of(seen.rows["people"]).items() if about.described else ():
        mean = pd.Series(told(values, seen.rows, "label", seed)[:, 0]).groupby(keys).mean().astype(np.float32)
        own = mean.rename("told").rename_axis(["quad_id", "half"]).reset_index()
        parts.append(own.assign(position=position, component=name, layer=np.int32(-1), head=np.int32(-1)))
    every = pd.concat(parts, ignore_index=True).reindex(columns=list(OUTPUTS.columns))
    return every.astype(dict.fromkeys(MEASURES, np.float32))


def known_of(people: Sequence[Sequence[tuple[str, ...]]]) -> dict[str, Float[np.ndarray, "rows 1 features"]]:
    """By BASELINES, features of the people of each row, added up over them, as `told` takes them."""
    facts = [Counter(f"{place} {value}" for one in row for place, value in enumerate(one[1:])) for row in people]
    letters = HashingVectorizer(analyzer="char_wb", ngram_range=(1, 3), n_features=LETTERS, norm=None)
    spelled = letters.transform([" ".join(one[0] for one in row) for row in people]).toarray()
    known = pd.DataFrame(facts).fillna(0).to_numpy() if any(facts) else np.zeros((len(facts), 1))
    return {"metadata": known[:, None], "letters": spelled[:, None]}


def timings(hidden: int) -> dict[str, float]:
    """Seconds of one probe of a head's output, on as many readings as the default book has."""
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"label": np.arange(640) % 5, "quad_id": np.arange(640), "half": HALVES[0]}).astype(str)
    values = rng.normal(size=(640, 1, 64))
    return {"head probes": timed(lambda: told(values, rows, "label", 0)) / FOLDS}
