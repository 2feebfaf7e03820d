"""What the residual stream says after each layer: two ways to read it as words.

1. The *logit lens* (nostalgebraist 2020) sends the stream through the final norm and the unembedding, as if its layer
   were the last.
2. The *patchscope* (Ghandeharioun et al. 2024, arXiv 2401.06102, the token identity prompt of its own notebooks) puts
   it, after the same layer, in the place of the last token's stream in TARGET, a prompt that repeats words, and reads
   what is predicted next. All layers, roles and pairs of a unit are rows of one growing pass.

The streams are those at the last token of each name and of the prompt, of both prompts of a pair. Kept is the rank of
words over the vocabulary: of each prompt's superset, and of each person's profession. Every word is read in both
prompts, so that its rank where it is wrong stands beside its rank where it is right. The patchscope has two more
sources: a `random` direction as long as the stream at `last`, and `none`, TARGET as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib import records, tasks
from lib.batches import logit_rows
from lib.data import HALVES
from lib.hooks import Model, Site
from lib.questions import Question
from lib.readout import FixedNorm, readout
from lib.single_pass import (
    BaseRun,
    Row,
    base_run,
    grow,
    plain_runs,
    prove_base_rows,
    prove_rows,
    row_limit,
    token_ids,
)
from lib.tasks import Pair
from pipeline import costs
from pipeline.assumed import Case
from pipeline.costs import Work, total
from pipeline.declaration import Table
from pipeline.step import Step
from pipeline.units import Unit, subsample, sweep_units

TARGET = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"
TARGET_TOKENS = 20  # about as many, for the planner
LENS, PATCHSCOPE = "logit lens", "patchscope"
SIDES, CONTROLS = ("clean", "corrupt"), ("random", "none")
WORDS = ("superset", "name_a", "name_b")  # the superset, and the profession at either name
SIZE = 16  # pairs of a unit
SCHEMA = records.table_schema(
    "table of words read from the residual stream",
    {
        **{name: records.text() for name in ("half", "quad_id", "pair_id")},
        "instrument": records.text((LENS, PATCHSCOPE)),
        "source": records.text((*SIDES, *CONTROLS)),  # whose stream it is
        "position": records.text(records.ROLES),
        "layer": records.whole(0),
        "word": records.text(WORDS),
        "of": records.text(SIDES),  # the prompt that the word is right for
        "text": records.text(),
        "rank": records.whole(1, "int64"),  # of the word's likeliest form in the vocabulary, 1 is first
    },
    unique=["pair_id", "instrument", "source", "position", "layer", "word", "of"],
)
KEYS = tuple(product(WORDS, SIDES))


class Said(NamedTuple):
    """A word, and the single tokens that stand for it."""

    text: str
    tokens: tuple[int, ...]


Lexicon = Mapping[tuple[str, str], Said]  # of a pair, by KEYS


def roles_of(pair: Pair) -> list[str]:
    """The names and the last token."""
    return [role for role in pair.clean.roles if role.startswith("name_")] + ["last"]


def words_of(tokenizer: Any, pair: Pair, row: Mapping[str, Any], topic: Question) -> dict[tuple[str, str], Said]:
    """The words of a pair with their tokens: the template's answer, singular and plural. `row` of the pairs table has
    the professions, where they are known. A word without a form of one token is left out."""
    answers = {"clean": (pair.answer, pair.clean_tokens), "corrupt": (pair.corrupt_answer, pair.corrupt_tokens)}
    out = {}
    for side, (answer, known) in answers.items():
        named = {word: str(row.get(f"{side}_profession_{word[-1]}") or "") for word in WORDS[1:]}
        for word, text in ({"superset": pair.candidates[answer]} | named).items():
            forms = [f" {topic.in_form(text, form)}" for form in ("singular", "plural")] if text else []
            tokens = [own[0] for own in tasks.answer_ids(tokenizer, forms) if len(own) == 1] if forms else []
            if own := tuple(dict.fromkeys([known[answer]] * (word == "superset") + tokens)):
                out[word, side] = Said(text, own)
    return out


def laid_out(lexicons: Sequence[Lexicon]) -> Int[Tensor, "pairs words forms"]:
    """The tokens of each of KEYS, the first repeated where there are fewer; -1 where a pair lacks the word."""
    most = max(len(said.tokens) for own in lexicons for said in own.values())

    def padded(said: Said | None) -> list[int]:
        return [-1] * most if said is None else [*said.tokens, *said.tokens[:1] * most][:most]

    return torch.tensor([[padded(own.get(key)) for key in KEYS] for own in lexicons])


def ranks(
    model: Model, hidden: Float[Tensor, "rows hidden"], tokens: Int[Tensor, "rows words forms"]
) -> Int[np.ndarray, "rows words"]:
    """The rank of each word's likeliest form in the logits of final hidden states; 0 for words that are not there."""
    parts, block = [], logit_rows(model)
    for at in range(0, len(hidden), block):
        logits, own = model.logits(hidden[at : at + block]), tokens[at : at + block]
        index = own.clamp(min=0).to(logits.device)
        best = logits.gather(1, index.flatten(1)).unflatten(1, index.shape[1:]).amax(-1)
        above = [how_many_above(logits, best[:, word, None]) for word in range(own.shape[1])]
        parts.append((1 + np.stack(above, 1)) * (own[..., 0] >= 0).numpy())
    return np.concatenate(parts)


def how_many_above(logits: Float[Tensor, "rows vocab"], least: Float[Tensor, "rows 1"]) -> Int[np.ndarray, " rows"]:
    """Tokens of each row above its `least`; on a CPU by numpy, which counts ten times as fast."""
    if logits.device.type == "cpu":
        return (logits.numpy() > least.numpy()).sum(-1)
    return (logits > least).sum(-1).cpu().numpy()


def random_directions(pairs: Sequence[Pair], like: Float[Tensor, "pairs hidden"], seed: int) -> Tensor:
    """One for each pair, of the pair and the seed alone, as long as `like`."""
    digests = [hashlib.sha256(f"{seed}|{pair.pair_id}".encode()).digest() for pair in pairs]
    drawn = [np.random.default_rng(int.from_bytes(own[:8], "little")).normal(size=like.shape[1]) for own in digests]
    out = torch.tensor(np.stack(drawn), dtype=torch.float64)
    length = like.double().norm(dim=1, keepdim=True)
    return (out.to(length) / out.to(length).norm(dim=1, keepdim=True) * length).to(like.dtype)


@torch.no_grad()
def read(
    model: Model, pairs: Sequence[Pair], lexicons: Sequence[Lexicon], norm: FixedNorm, target: Sequence[int], **how: Any
) -> pd.DataFrame:
    """The rank of every word of pairs of one group after every layer, by both instruments. `target` are the tokens of
    TARGET; `how`: seed, and memory (GB) that a pass may take."""
    roles, tokens, count = roles_of(pairs[0]), laid_out(lexicons), len(pairs)
    at = [pairs[0].clean.roles[role][-1] for role in roles]
    prompts = [getattr(pair, side).ids for side in SIDES for pair in pairs]
    ((_, run),) = plain_runs(model, prompts, at, ("resid",), size=len(prompts))
    streams = [run.activations["resid", layer].flatten(0, 1) for layer in range(model.n_layers)]
    about = list(product(SIDES, range(count), roles))  # of each stream, in their order
    parts = []
    for layer, stream in enumerate(streams):
        found = ranks(model, norm(stream).float(), tokens[[pair for _, pair, _ in about]])
        parts.append(tidy(pairs, lexicons, LENS, [(*own, layer) for own in about], found))
    clean_last = slice(len(roles) - 1, len(roles) * count, len(roles))
    about += [("random", pair, "last") for pair in range(count)]
    streams = [torch.cat([one, random_directions(pairs, one[clean_last], how["seed"])]) for one in streams]
    rows = [Row((Site(layer, "resid"),), 0, source) for layer in range(model.n_layers) for source in range(len(about))]
    base = base_run(model, token_ids(model, [target]), (len(target) - 1,), ("resid",))
    hidden = torch.cat([base.hidden.expand(count, -1), *patched(model, base, rows, streams, how["memory"])])
    where = [("none", pair, "last", 0) for pair in range(count)]
    where += [(*about[row.source], row.sites[0].layer) for row in rows]
    found = ranks(model, hidden, tokens[[pair for _, pair, *_ in where]])
    return pd.concat([*parts, tidy(pairs, lexicons, PATCHSCOPE, where, found)], ignore_index=True)


def patched(
    model: Model, base: BaseRun, rows: Sequence[Row], streams: Sequence[Tensor], memory: float
) -> Iterator[Float[Tensor, "rows hidden"]]:
    """Final hidden states of the base prompt with each row's stream in it, as many rows to a pass as memory allows."""
    sources = {("resid", layer): stream[:, None] for layer, stream in enumerate(streams)}
    limit = row_limit(model, base, memory)
    for first in range(0, len(rows), limit):
        some = rows[first : first + limit]
        grown = grow(model, base, some, sources)
        prove_rows(model, grown, lambda row, some=some: f"patchscope, stream {some[row].source}, {some[row].sites[0]}")
        prove_base_rows(model, base, grown, lambda _: "patchscope")
        yield grown.hidden.to(base.hidden.device)


def tidy(
    pairs: Sequence[Pair], lexicons: Sequence[Lexicon], instrument: str, about: Sequence[tuple], found: np.ndarray
) -> pd.DataFrame:
    """A row for each word that is there, of each source, pair, role and layer in `about`."""
    row, word = np.nonzero(found)
    source, pair, position, layer = (np.array(column)[row] for column in zip(*about, strict=True))
    named = {name: np.array([getattr(one, name) for one in pairs])[pair] for name in ("half", "quad_id", "pair_id")}
    said, of = (np.array(column)[word] for column in zip(*KEYS, strict=True))
    texts = np.array([[own[key].text if key in own else "" for key in KEYS] for own in lexicons])[pair, word]
    where = {"instrument": instrument, "source": source, "position": position, "layer": layer.astype(np.int32)}
    return pd.DataFrame(named | where | {"word": said, "of": of, "text": texts, "rank": found[row, word]})


def units(step: Step | Case) -> list[Unit]:
    """Some pairs of the half that is reported on."""
    prompts = step.prompts()
    half = [half for half in HALVES if any(pair.half == half for pair in prompts)][-1]
    own = subsample([pair for pair in prompts if pair.half == half], step.params.lens_pairs)
    return sweep_units("lenses", own, size=SIZE)


def reader(step: Step) -> Callable[[Unit], pd.DataFrame]:
    """What reads a unit's pairs."""
    norm = cache(lambda: readout(step.model).norm)
    about = {row["pair_id"]: row for row in step.pairs().to_dict("records")}
    how = {"seed": step.params.seed, "memory": step.memory}

    def compute(unit: Unit) -> pd.DataFrame:
        lexicons = [words_of(step.tokenizer, pair, about[pair.pair_id], step.params.topic) for pair in unit.pairs]
        return read(step.model, unit.pairs, lexicons, norm(), tasks.encoded(step.tokenizer, TARGET)[0], **how)

    return compute


def cost(case: Case, planned: Sequence[Unit]) -> Work:
    """Both prompts of every pair; every stream read through the unembedding, and again from its layer on in TARGET."""
    each = []
    for unit in planned:
        pairs, shape = len(unit.pairs), case.shape
        streams = pairs * (2 * len(roles_of(unit.pairs[0])))
        grown = costs.of_rows(shape, range(case.n_layers), streams + pairs, TARGET_TOKENS)
        rows = (2 * streams + pairs) * case.n_layers
        each.append(costs.plain(shape, 2 * pairs, len(unit.pairs[0].clean.ids)) + costs.vocabulary(shape, rows))
        each.append(Work(passes=1, grown=grown, light=rows, table=8 * rows))
    return total(each)


READ = Table("lenses", units, reader, cost, schema=SCHEMA)
