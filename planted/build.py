"""A planted circuit as a folder that transformers loads: config, weights, tokenizer, and `truth.json` beside them.

1. `tokenizer`: a word is a token, with its leading space; every word of the question is known.
2. `weights`: the parts of `planted.circuit`, each in its head or neurons, laid into an architecture (`planted.shapes`).
   The slowest rotary pairs hardly turn, so that scores rest on content; fast ones make a head attend to the token one
   or two before. A neuron with a steep gate is a ReLU.
3. `folder` makes it once, in the user's cache, under a name that holds the hash of spec, code and question.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import pad

from lib import questions
from lib.locks import Lock
from lib.records import atomic
from lib.weights import cache_folder, sha256_of
from planted import circuit, shapes, truth
from planted.circuit import AT, SPACES, WIDE, WIDTH, Head, Mlp, Part, Read, parts_of
from planted.effects import by_names, means_at_last, truth_of
from planted.options import HEADS, Options, fingerprint, parse
from planted.question import ASKS, CLASSES, JOINS, LABELS, MIDDLES, NAME, ODD, REGIONS, codes, make, read_tokens
from planted.shapes import HIDDEN, SIZE, Layer, Weights

ASKED = 24  # prompts of each two classes, by which noise is measured
SLOW = [*range(10, 16), *range(26, 32)]  # rotary dimensions that turn by less than 1e-7 a token
OFFSET_SCORE = 150.0  # of the token at a distance, by each of `shapes.TURNS`


# --- the tokenizer ---


def vocabulary(question: questions.Question) -> list[str]:
    """Every word of the question, as it begins a text and as it goes on."""
    texts = [template.text for template in question.texts.values()]
    texts += [*question.table("controls")["name"], *question.table("sentences")["text"]]
    texts += [token.text for token in read_tokens()]
    named = [*question.labels, *(word for words in question.answers.values() for word in words.values())]
    texts += [form for word in named for form in (word, question.plural(word), word.capitalize())]
    words = dict.fromkeys(word for text in texts for word in re.sub(r"\{\w+\}", " ", text).split())
    return ["<s>", "<unk>", *(start + word for word in words for start in ("", " "))]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The tokenizer; what it does not know is `<unk>`."""
    words = {word: number for number, word in enumerate(vocabulary(questions.load(NAME)))}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r" ?[\p{L}\p{N}]+| ?[^\s\p{L}\p{N}]+"), "isolated")
    made.decoder = decoders.Fuse()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")


# --- the weights ---


def row(functional: Read) -> Tensor:
    """A linear functional of spaces as a vector of the residual stream, whose last dimensions no space has."""
    return pad(torch.as_tensor(circuit.row(functional), dtype=torch.float32), (0, HIDDEN - WIDE))


def weights(o: Options) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast, tuple[Part, ...]]:
    """The model, its tokenizer, and the parts that it was made of."""
    words, parts = tokenizer(), parts_of(o)
    torch.manual_seed(o.seed)
    model = transformers.AutoModelForCausalLM.from_config(shapes.config(o, len(words))).eval()
    if o.no_circuit == "random":
        return model, words, parts
    draw, laid = torch.Generator().manual_seed(o.seed), Weights(o, len(words))
    embed(laid, words, o, draw)
    for part in parts:
        if isinstance(part, Head):
            put_head(laid.layers[part.layer], part, o)
        else:
            put_mlp(laid.layers[part.layer], part)
    if o.noise:
        add_noise(laid, parts, o, draw)
    with torch.no_grad():
        shapes.install(model, laid, o)
    return model, words, parts


def embed(laid: Weights, words: transformers.PreTrainedTokenizerFast, o: Options, draw: torch.Generator) -> None:
    """What tokens say of themselves, and the answers' logits, with a small preference of its own for each, but under a
    cap, where no preference would be the same for all prompts."""
    embedding, unembedding = laid.embedding, laid.unembedding
    tokens = {token.text: token for token in read_tokens()}
    begins = {word: torch.as_tensor(code, dtype=torch.float32) for word, code in codes().items()}
    embedding[:, AT["one"]] = 1
    embedding[0, AT["start"]] = 1
    embedding[:, AT["identity"]] = 0.3 * torch.randn(len(embedding), SPACES["identity"], generator=draw)
    for text, number in words.get_vocab().items():
        word = text.strip()
        embedding[number, AT["asks"]] = float(word in (*ASKS, ODD))
        embedding[number, AT["odd"]] = float(word == ODD)
        embedding[number, AT["joins"]] = float(word == JOINS)
        embedding[number, AT["middle"]] = float(word in MIDDLES)
        if (token := tokens.get(word)) is not None and token.number >= 0:
            space = {"single": "single", "first": "u", "last": "v"}[token.kind]
            embedding[number, AT[space].start + token.number] = 1
            if token.region >= 0:
                embedding[number, AT["own_region"].start + token.region] = 1
            if word in begins:
                embedding[number, AT[f"{token.kind}_code"]] = begins[word]
                if o.task == "odd_one_out" and text.startswith(" "):
                    unembedding[number, AT["answer_code"]] = o.logits / 3 * begins[word]
    question = questions.load(NAME)
    preference = 0.0 if o.shape == "gemma2" else 0.2
    for space, attribute, order in (("superset", "superset", CLASSES), ("region_answer", "region", REGIONS)):
        answers = question.answers[attribute]
        for at, label in enumerate(order):
            number = words.get_vocab()[f" {question.plural(answers[label])}"]
            if o.no_circuit != "constant":
                unembedding[number, AT[space].start + at] = o.logits
            unembedding[number, AT["one"]] = preference * torch.randn(1, generator=draw)
            if space == "region_answer":  # what is not asked for does not come first
                unembedding[number, AT["one"]] -= o.logits


def put_head(layer: Layer, part: Head, o: Options) -> None:
    """A head's queries, and the keys and values of its group."""
    own, group = SIZE * part.head, SIZE * (part.head * o.groups // HEADS)
    query, key, value = (torch.zeros(SIZE, HIDDEN) for _ in range(3))
    for dim, (asked, known) in zip(SLOW, part.scores, strict=False):
        query[dim], key[dim] = row(asked), row(known)
    if part.offset is not None:
        find_distance(query, key, part.offset, o)
    start, places = 0, {}
    for source in dict.fromkeys(source for source, *_ in part.values):
        places[source] = slice(start, start + SPACES[source])
        value[places[source], AT[source]] = torch.eye(SPACES[source])
        start += SPACES[source]
    for source, space, matrix in part.values:
        out = layer.out[AT[space], own : own + SIZE]
        out[:, places[source]] += torch.as_tensor(matrix, dtype=torch.float32)
    layer.query[own : own + SIZE] = query
    layer.key[group : group + SIZE] = key
    layer.value[group : group + SIZE] = value


def find_distance(query: Tensor, key: Tensor, offset: int, o: Options) -> None:
    """Scores of 0 for the token so many before, and far less for others: cosines of distances, less their maximum.
    Rotary positions turn a constant; learned ones are turned here."""
    size, half = OFFSET_SCORE, SIZE // 2
    for pair, turns in enumerate(shapes.TURNS):
        cosine, sine = size * np.cos(offset * turns), size * np.sin(offset * turns)
        if o.shape == "gpt2":
            cos, sin = AT["position"].start + pair, AT["position"].start + len(shapes.TURNS) + pair
            query[pair, [cos, sin]] = torch.tensor([cosine, sine], dtype=torch.float32)
            query[pair + half, [cos, sin]] = torch.tensor([-sine, cosine], dtype=torch.float32)
            key[pair, cos] = key[pair + half, sin] = 1
        else:
            query[pair, AT["one"]], query[pair + half, AT["one"]] = cosine, -sine
            key[pair, AT["one"]] = 1
    query[SLOW[0], AT["one"]], key[SLOW[0], AT["one"]] = -size * len(shapes.TURNS), 1


def put_mlp(layer: Layer, part: Mlp) -> None:
    for neuron in part.neurons:
        layer.gate[neuron.at] = row(neuron.gate)
        layer.down[:, neuron.at] = row(neuron.to)


def add_noise(laid: Weights, parts: Sequence[Part], o: Options, draw: torch.Generator) -> None:
    """Every head and neuron without a role writes a vector of about size `noise`, by what it happens to read; so do
    embedding and unembedding, in all dimensions."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) / HIDDEN**0.5

    def reading(*shape: int) -> Tensor:
        out = random(*shape)
        out[:, : AT["identity"].start] = 0  # noise is about tokens, and about no class: probes would read it
        return out

    shared = HEADS // o.groups
    laid.embedding += o.noise * random(*laid.embedding.shape)
    laid.unembedding += o.noise * o.logits * random(*laid.unembedding.shape)
    for number, layer in enumerate(laid.layers):
        own = [part for part in parts if part.layer == number]
        heads = {part.head for part in own if isinstance(part, Head)}
        for head in set(range(HEADS)) - heads:
            at, group = slice(SIZE * head, SIZE * (head + 1)), head // shared
            layer.out[:, at] = o.noise * random(HIDDEN, SIZE)
            layer.query[at] = reading(SIZE, HIDDEN) / SIZE**0.5
            if group not in {head // shared for head in heads}:
                at = slice(SIZE * group, SIZE * (group + 1))
                layer.key[at] = reading(SIZE, HIDDEN)
                layer.value[at] = reading(SIZE, HIDDEN)
        taken = {neuron.at for part in own if isinstance(part, Mlp) for neuron in part.neurons}
        spare = sorted(set(range(WIDTH)) - taken)
        # ReLUs, as the planted ones are: products of what they read would grow without bound
        layer.gate[spare] = reading(len(spare), HIDDEN)
        layer.down[:, spare] = o.noise * random(HIDDEN, len(spare))


# --- the folder ---


def directions(o: Options, parts: Sequence[Part]) -> dict[str, dict[str, list[float]]]:
    """Space -> label -> the direction in the residual stream by which it is written; under "at last", class by class,
    the mean of all that is at the last token in the end."""
    labels = {"profession": LABELS, "retrieved": LABELS, "superset": CLASSES, "region": REGIONS}
    labels |= {"region_answer": REGIONS} if o.placebo else {}
    turn = shapes.rotation(o).T
    means = {
        label: (turn[:, :WIDE] @ torch.from_numpy(own).float()).tolist() for label, own in means_at_last(parts).items()
    }
    return {"at last": means} | {
        space: {label: turn[:, AT[space].start + at].tolist() for at, label in enumerate(names)}
        for space, names in labels.items()
    }


@torch.no_grad()
def answers(model: transformers.PreTrainedModel, words: transformers.PreTrainedTokenizerFast, o: Options) -> np.ndarray:
    """(classes, classes, classes): the mean logits of all classes where the first name is of one and the second of
    another, by plain forward passes on names drawn from the table."""
    question, rng = questions.load(NAME), np.random.default_rng(o.seed)
    text = question.texts[question.defaults["templates"][0]].text
    of = [[person.name for person in make()[1] if person.superset == c] for c in range(len(CLASSES))]
    asked: dict[int, list[tuple[int, int, list[int]]]] = {}
    for c, d in product(range(len(CLASSES)), repeat=2):
        for _ in range(ASKED):
            first, second = rng.choice(of[c]), rng.choice(of[d])
            ids = words(text.format(a=first, b=second)).input_ids
            asked.setdefault(len(ids), []).append((c, d, ids))
    tokens = [words.get_vocab()[f" {question.plural(question.answers['superset'][name])}"] for name in CLASSES]
    total = np.zeros((len(CLASSES),) * 3)
    for own in asked.values():
        logits = model(input_ids=torch.tensor([ids for *_, ids in own])).logits[:, -1, tokens]
        for (c, d, _), said in zip(own, logits.numpy(), strict=True):
            total[c, d] += said / ASKED
    return total


def write(o: Options, to: Path) -> truth.Truth:
    """Make the model, with its truth, in a folder."""
    model, words, parts = weights(o)
    transformers.logging.disable_progress_bar()
    model.save_pretrained(to)
    words.save_pretrained(to)
    found = truth_of(o, parts, sha256_of(to / "model.safetensors"), directions(o, parts))
    if o.noise:
        said = answers(model, words, o)
        found = found.model_copy(update={"rule_logits": by_names(lambda c, d: said[c, d])})
    (to / truth.FILE).write_text(found.model_dump_json(indent=1), encoding="utf-8")
    return found


def folder(spec: str) -> Path:
    """The folder of the model of that spec, made if it is not there, under the cache of converted weights."""
    o = parse(spec)
    to = cache_folder() / f"planted-{fingerprint(spec)}"
    if not (to / truth.FILE).is_file():
        with Lock(to.with_suffix(".lock"), patience=600):
            if not (to / truth.FILE).is_file():  # nobody was first
                beside = Path(tempfile.mkdtemp(dir=to.parent, prefix="planted-new-"))
                try:
                    write(o, beside)
                    shutil.rmtree(to, ignore_errors=True)
                    beside.rename(to)
                finally:
                    shutil.rmtree(beside, ignore_errors=True)
    return to


def copy_truth(spec: str, to: Path) -> None:
    """Put the truth of the model of that spec into a folder of results, unless it is there."""
    text = (folder(spec) / truth.FILE).read_bytes()
    if not (to / truth.FILE).is_file() or (to / truth.FILE).read_bytes() != text:
        with atomic(to / truth.FILE) as file:
            file.write(text)
