"""A small Llama that learns odd-one-out in some ten seconds, so that every step can be run on a model that solves it.

1. `people` invents names: four professions, two tokens per name, no token in two names.
2. `tokenizer` knows the prompt's words and the parts of the names, each with its leading space, as real ones do.
3. `make` trains on random triples until the model solves held-out ones, and saves a folder that `lib.models` loads.
   No triple with two people of one quad as the matching two is ever trained on: those are what the tests ask.
4. `pairs_table` has disjoint quads of people, in the columns of a `pairs_file`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from professions import TEMPLATES
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib.tasks import SLOTS

PROFESSIONS, EACH = 4, 40  # people EACH * p ... EACH * (p + 1) - 1 are of profession p
COUNT = PROFESSIONS * EACH
TRIPLES = 128  # per training step
MOST_STEPS = 1500  # 200 are usual; the limit makes a failure end
WANTED = 0.98  # share of held-out triples with both tokens right at which training stops


def people() -> list[str]:
    """Invented names, "Baka Debir": as many first names and last names as people."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    firsts = [one + other for one in syllables for other in ("ka", "lo", "mi")]
    lasts = [one + other for one in syllables for other in ("bir", "den", "gos")]
    order = np.random.default_rng(0).permutation(len(firsts))[:COUNT]
    return [f"{firsts[i].capitalize()} {lasts[i].capitalize()}" for i in order]


PEOPLE = people()


def tokenizer() -> PreTrainedTokenizerFast:
    """A word with its leading space, a punctuation mark or a newline is one token."""
    splitter = Split(Regex(r" ?[A-Za-z]+|[^A-Za-z]"), "isolated")
    text = TEMPLATES["odd_one_out"].text.format(a=PEOPLE[0], b=PEOPLE[0], c=PEOPLE[0])
    names = [f" {part}" for name in PEOPLE for part in name.split()]
    words = dict.fromkeys(["<unk>", *(word for word, _ in splitter.pre_tokenize_str(text)), *names])
    inner = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", clean_up_tokenization_spaces=False)


def name_ids(words: PreTrainedTokenizerFast) -> Tensor:
    """(people, 2) token ids of every name."""
    return torch.tensor([words.convert_tokens_to_ids([f" {part}" for part in name.split()]) for name in PEOPLE])


def triples(count: int, rng: np.random.Generator, held_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(count, 3) people and the slot of the odd one. The matching two are quad mates if `held_out`, else never."""
    odd, other = rng.integers(0, PROFESSIONS, count), rng.integers(1, PROFESSIONS, count)
    match = rng.integers(0, EACH, count)
    mate = match ^ 1  # people 2k and 2k + 1 of a profession are of one quad
    if not held_out:
        mate = (mate - mate % 2 + rng.integers(2, EACH, count)) % EACH
    rows = np.stack(
        [odd * EACH + rng.integers(0, EACH, count), *((odd + other) % PROFESSIONS * EACH + [match, mate])], 1
    )
    slot = rng.integers(0, 3, count)
    # the odd one goes to its slot, the other two to the slots after it
    return np.take_along_axis(rows, (np.arange(3) - slot[:, None]) % 3, 1), slot


def batch(people_in: np.ndarray, slot: np.ndarray, ids: Tensor, template: Tensor, places: list[int]) -> Tensor:
    """Token ids of prompts with both tokens of the answer behind them."""
    out = template.repeat(len(slot), 1)
    for column, place in enumerate(places):
        out[:, place : place + 2] = ids[people_in[:, column]]
    return torch.cat([out, ids[people_in[np.arange(len(slot)), slot]]], dim=1)


def both_right(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """(prompts, 2): whether the top token is the answer's first, and after it the second."""
    with torch.no_grad():
        return model(ids[:, :-1]).logits[:, -2:].argmax(-1) == ids[:, -2:]


def make(folder: Path, seed: int = 0) -> Path:
    """Train, check on held-out triples, save as safetensors with the tokenizer; the folder. Random state is kept."""
    words = tokenizer()
    ids = name_ids(words)
    first = TEMPLATES["odd_one_out"].text.format(a=PEOPLE[0], b=PEOPLE[0], c=PEOPLE[0])
    template = torch.tensor(words(first).input_ids)
    places = [i for i, token in enumerate(template.tolist()) if token == ids[0, 0]]
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=3, head_dim=16,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rope_theta=100.0,
                initializer_range=0.05, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
            )
        )  # fmt: skip
        with torch.no_grad():  # names begin with a direction per profession: halves the training time
            directions = 0.3 * torch.randn(PROFESSIONS, 64).repeat_interleave(EACH, 0)
            model.model.embed_tokens.weight[ids] += directions[:, None]
            model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].self_attn.o_proj.weight.requires_grad_(False)
        test = batch(*triples(512, rng, held_out=True), ids, template, places)
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
        for step in range(MOST_STEPS):
            for group in optimiser.param_groups:
                group["lr"] = 3e-3 * min(1, (step + 1) / 50)
            rows = batch(*triples(TRIPLES, rng), ids, template, places)
            hidden = model.model(rows[:, :-1], use_cache=False).last_hidden_state[:, -2:]
            loss = cross_entropy(model.lm_head(hidden).flatten(0, 1), rows[:, -2:].flatten())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            if step % 25 == 24 and both_right(model, test).all(1).float().mean() >= WANTED:
                break
        else:
            raise AssertionError(f"odd-one-out was not learnt in {MOST_STEPS} steps: loss {loss.item():.3f}")
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def pairs_table() -> pd.DataFrame:
    """40 quads of four people each, no one in two of them; two pairs per quad that differ in the slot swapped.

    One name differs between the prompts, the swapped one: beside it stand one person of each profession, and the one
    whose profession it does not share is the answer. The second pair is no mirror image of the first: then noise in
    one would be denoise in the other, number for number.
    """
    rows = []
    for number in range(COUNT // 4):
        block, mate = divmod(number, EACH // 2)
        one, other = ([PEOPLE[(2 * block + k) * EACH + 2 * mate + i] for i in (0, 1)] for k in (0, 1))
        for turn in (0, 1):
            swapped = SLOTS[(number + turn) % 3]
            left, right = (slot for slot in SLOTS if slot != swapped)
            clean = {left: one[turn], right: other[0], swapped: other[1]}
            corrupt = clean | {swapped: one[1 - turn]}
            answers = {"answer": left, "corrupt_answer": right}
            if turn:
                clean, corrupt, answers = corrupt, clean, {"answer": right, "corrupt_answer": left}
            rows.append(
                {f"clean_{slot}": clean[slot] for slot in SLOTS}
                | {f"corrupt_{slot}": corrupt[slot] for slot in SLOTS}
                | answers
                | {"task": "odd_one_out", "template": "odd_one_out"}
                | {"pair_id": f"quad{number}-{turn}", "quad_id": f"quad{number}"}
            )
    return pd.DataFrame(rows)
