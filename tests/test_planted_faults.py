"""Defects of this field's tools, each put into the real code: a named check of the product stops the run.

`python -m bench.planted_faults` runs this file, the bundled model's tests among it, and writes down which check stopped
which defect, and in what words.
"""

import json
import re
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_sweep import PAIRS
from torch import nn

from lib import batches, data, hooks, metrics, models, paths, records, single_pass, sweep, tasks
from lib.hooks import Site
from lib.paths import Receiver
from pipeline.step import with_gap
from tests.test_records import fake_compute, fake_plan
from tests.test_steps import begin, here, table  # noqa: F401
from tests.test_tasks import words_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "bench/results/planted_faults.json"
ROOMS = ("lib", "pipeline", "report", "steps")


class Fault(NamedTuple):
    """A defect, how it is put in, and the function that must raise."""

    defect: str
    check: str
    plant: Callable


def measure(model: hooks.Model, pairs: list) -> None:
    """What loading a model and the sweeps of a step do, at one layer."""
    models.prove(model)
    sweep.prove(model, pairs[0])
    middle = model.n_layers // 2
    for way in batches.DIRECTIONS:
        frame = sweep.run(model, pairs, direction=way, components=("attn", "mlp", "head"), layers=[middle])
        records.conform(with_gap(frame) if model.tokenizer else frame)  # a random model has no gap
    receivers = [Receiver(middle, kind, 1) for kind in paths.PROJECTIONS] + [Receiver(middle, "mlp")]
    senders = [[hooks.EMBED], [Site(0, "head", 0), Site(0, "mlp")]]
    records.conform(paths.run(model, pairs, receivers=receivers, senders=senders), records.PATH_SCHEMA)


def stopped(run: Callable, check: str) -> str:
    """The message of the product's error, once it is known to be raised in, or by what is called from, that check."""
    with pytest.raises((ValueError, RuntimeError)) as caught:
        run()
    errors = [error for error in (caught.value.__context__, caught.value) if error]  # a step says it in its own name
    frames = [frame for error in errors for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}" for frame in frames]
    assert own[-1].split(".")[0] in ROOMS, f"not the product's error: {caught.value!r}"
    assert check in own, f"{own[-1]}: {caught.value}"
    return re.sub(r"config:\S*/(\w+)/config.json", r"a random \1", str(caught.value))


# --- defects of the passes, in a run that measures ---


def wrapped(patch: pytest.MonkeyPatch, owner: object, name: str, make: Callable) -> None:
    """Put `make(the real one)` in the place of a function."""
    patch.setattr(owner, name, make(getattr(owner, name)))


def deaf(patch, model):
    """Where all of a pass's sites are in one layer, their hooks are never called."""

    def make(real):
        def layer_hooks(self, layer):
            handles = real(self, layer)
            if {site.layer for row in self.rows for site in row.sites} == {layer}:
                for handle in handles[1:]:
                    handle.remove()
            return handles

        return layer_hooks

    wrapped(patch, single_pass.Growing, "layer_hooks", make)


def unhooked(patch, model):
    gone = hooks.on_input(nn.Identity(), print)
    wrapped(patch, hooks, "on_activation", lambda real: lambda *at: gone if at[1:3] == (1, "attn") else real(*at))


def first_row(patch, model):
    def make(real):
        def where(self, activation):
            view, (rows, *rest) = real(self, activation)
            return view, (torch.zeros_like(rows), *rest)

        return where

    wrapped(patch, single_pass.Edit, "where", make)


def kv_number_for_query(patch, model):
    """An edit takes the columns of the head that has the number of the key-value head."""

    def make(real):
        def init(self, own, component, edits, *rest):
            group = own.n_heads // own.n_kv_heads if component == "head" else 1
            real(self, own, component, [(row, head // group, index) for row, head, index in edits], *rest)

        return init

    wrapped(patch, single_pass.Edit, "__init__", make)


def query_number_for_kv(patch, model):
    def make(real):
        return lambda own, sites, roles: [
            Receiver(s.layer, kind, s.head, role) for s in sites for kind, role in roles.items()
        ]

    wrapped(patch, paths, "receivers_of", make)


def kv_number_for_query_in_paths(patch, model):
    group = model.n_heads // model.n_kv_heads

    def make(real):
        return lambda *given: [r._replace(head=r.head // group if r.kind == "q" else r.head) for r in real(*given)]

    wrapped(patch, paths, "receivers_of", make)


def other_prefix(patch, model):
    """The rows of one prompt run behind the cached beginning of another."""
    wrapped(patch, single_pass, "SharedPrefix", lambda real: lambda base, n, owner: real(base, n, owner.max() - owner))


def other_prefix_of_patched_rows(patch, model):
    def make(real):
        def behind(self, prefix, new):
            own, prompts = self.owner, len(prefix)
            self.owner = torch.cat([own[:prompts], prompts - 1 - own[prompts:]])
            out = real(self, prefix, new)
            self.owner = own
            return out

        return behind

    wrapped(patch, single_pass.SharedPrefix, "behind", make)


def position_ids_off(patch, model):
    def make(real):
        return lambda *given: (own := real(*given)) | {"position_ids": own["position_ids"] + 1}

    wrapped(patch, single_pass, "suffix", make)


def edits_off(patch, model):
    def make(real):
        def where(self, activation):
            view, (rows, tokens, *rest) = real(self, activation)
            return view, (rows, (tokens - 1) % activation.shape[1], *rest)

        return where

    wrapped(patch, single_pass.Edit, "where", make)


def padded(patch, model):
    """Prompts of all lengths in one batch, filled up on the left, without a mask and position ids."""

    def make(real):
        def plain_runs(own, prompts, positions=(), *rest, **options):
            longest = max(map(len, prompts))
            filled = [[0] * (longest - len(ids)) + list(ids) for ids in prompts]
            return real(own, filled, [longest - 1], *rest, **options)

        return plain_runs

    wrapped(patch, single_pass, "plain_runs", make)


def tensor_for_tuple(patch, model):
    patch.setattr(hooks, "first_tensor", lambda output: output)


def tuple_for_tensor(patch, model):
    patch.setattr(hooks, "first_tensor", lambda output: output[0])


def sender_not_set(patch, model):
    patch.setattr(paths.FirstRun, "send", lambda *_: None)


def attention_not_held(patch, model):
    wrapped(patch, paths.hooks, "with_forwards", lambda real: lambda forwards: real(forwards[model.n_layers :]))


def sender_recomputed(patch, model):
    """A sender that hears the others of its set: what it is given is added to what it computes."""

    def send(self, component, layer, activation):
        if edit := self.made.get((component, layer)):
            plain, (view, index) = self.base.activations[component, layer], edit.where(activation)
            view[index] += edit.values - edit.of_source(plain, self.batch.owner[edit.rows])
            self.observe(edit, plain, activation)

    patch.setattr(paths.FirstRun, "send", send)


def answer_as_foil(patch, model):
    def margins(logits, answer):
        return logits[:, 0] - logits.max(1), logits.argmax(1)

    patch.setattr(metrics, "margins", margins)


def sides_swapped(patch, model):
    wrapped(patch, batches.PairBatch, "sides", lambda real: lambda *given: real(*given)[::-1])


def runs_swapped(patch, model):
    wrapped(patch, batches, "both_runs", lambda real: lambda *given: real(*given)[::-1])


def reported_swapped(patch, model):
    wrapped(
        patch,
        batches.PairBatch,
        "frame",
        lambda real: lambda s, rows, scored, *runs: real(s, rows, scored, *runs[::-1]),
    )


def rows_reordered(patch, model):
    wrapped(patch, batches.PairBatch, "frame", lambda real: lambda s, rows, *rest: real(s, rows[::-1], *rest))


def narrow_logits(patch, model):
    wrapped(patch, hooks.Model, "logits", lambda real: lambda *given: real(*given).bfloat16())


def rounded_logits(patch, model):
    wrapped(patch, hooks.Model, "logits", lambda real: lambda *given: real(*given).bfloat16().float())


def read_behind_the_norm(patch, model):
    """What a head's q is behind its norm is recorded, and set before it."""

    def make(real):
        def input_of(own, receiver):
            place, norm = real(own, receiver), own.attns[receiver.layer].q_norm
            if receiver.kind != "q":
                return place
            values = nn.Sequential(place.values, nn.Unflatten(-1, (-1, own.head_size)), norm, nn.Flatten(-2))
            return place._replace(values=values)

        return input_of

    wrapped(patch, paths, "input_of", make)


def set_before_the_norm(patch, model):
    patch.setattr(paths, "NORMS", {})


PASSES = [
    Fault("a hook that does not fire", "lib.models.prove_order", unhooked),
    Fault("a hook of a patched row that does not fire", "lib.single_pass.prove_rows", deaf),
    Fault("an edit of batch row 0 only", "lib.models.prove_identity", first_row),
    Fault(
        "a head's slice taken by its key-value head's number", "lib.models.prove_whole_residual", kv_number_for_query
    ),
    Fault("a k and v taken by their query head's number", "lib.paths.prove_receivers", query_number_for_kv),
    Fault("a q taken by its key-value head's number", "lib.paths.prove_receivers", kv_number_for_query_in_paths),
    Fault("prefix cache of the other prompt", "lib.single_pass.prove_base_rows", other_prefix),
    Fault(
        "prefix cache of the other prompt, in patched rows", "lib.models.prove_identity", other_prefix_of_patched_rows
    ),
    Fault("position ids off by one", "lib.single_pass.prove_base_rows", position_ids_off),
    Fault("edits one token too early", "lib.models.prove_identity", edits_off),
    Fault("padding on the left without position ids", "lib.models.prove_lengths", padded),
    Fault("a tuple taken for a tensor", "lib.hooks.on_activation.<locals>.after", tensor_for_tuple),
    Fault("a tensor taken for a tuple", "lib.hooks.on_activation.<locals>.after", tuple_for_tensor),
    Fault("sender not set in its run", "lib.single_pass.prove_rows", sender_not_set),
    Fault("sender not frozen at its new value", "lib.single_pass.prove_rows", sender_recomputed),
    Fault("attention between not frozen", "lib.paths.prove_base_rows", attention_not_held),
    Fault("foils that include the answer", "lib.records.conform", answer_as_foil),
    Fault("clean and corrupt swapped in the run that is edited", "lib.batches.PairBatch.numbers", sides_swapped),
    Fault("clean and corrupt swapped in both runs", "lib.batches.PairBatch.numbers", runs_swapped),
    Fault("clean and corrupt swapped in what is recorded", "lib.batches.prove_own", reported_swapped),
    Fault("row order changed before rows join their pairs", "lib.batches.prove_own", rows_reordered),
    Fault("bf16 logits", "lib.models.prove", narrow_logits),
]


# Defects that need a model of their own: of a norm behind q and k (of each head in Qwen 3 and Gemma 3, of all heads in
# OLMo 2), and of 16 bits.
OTHERS = {
    "a q recorded behind its norm and set before it, in Qwen 3": ("qwen3", "float32", read_behind_the_norm),
    "a q recorded behind its norm and set before it, in Gemma 3": ("gemma3", "float32", read_behind_the_norm),
    "a q edited before the norm of all heads, in OLMo 2": ("olmo2", "float32", set_before_the_norm),
    "bf16 logits, kept in fp32": ("llama", "bfloat16", rounded_logits),
}


@pytest.fixture(params=["tiny", pytest.param("smollm", marks=pytest.mark.long)])
def measured(request) -> tuple[hooks.Model, list]:
    """A model with two pairs: a random Llama in fp32, and the bundled model."""
    if request.param == "smollm":
        return request.getfixturevalue("smollm"), request.getfixturevalue("two_pairs")
    return request.getfixturevalue("tiny")("llama", "float32"), PAIRS[:2]


@pytest.fixture
def told(record_property) -> Callable:
    """Keeps a line for the table."""
    return lambda defect, check, message: record_property(
        "planted", {"defect": defect, "check": check, "message": message}
    )


def test_without_a_defect_nothing_stops(measured):
    measure(*measured)


@pytest.mark.parametrize("fault", PASSES, ids=lambda fault: fault.defect)
def test_a_defect_of_the_passes_is_stopped(measured, fault, monkeypatch, told):
    fault.plant(monkeypatch, measured[0])
    message = stopped(lambda: measure(*measured), fault.check)
    if measured[0].tokenizer:
        told(fault.defect, fault.check, message)


@pytest.mark.parametrize("defect", OTHERS)
def test_a_defect_of_another_model_is_stopped(tiny, defect, monkeypatch, told):
    name, dtype, plant = OTHERS[defect]
    model, check = tiny(name, dtype), "lib.models.prove" if dtype == "bfloat16" else "lib.paths.prove_receivers"
    measure(model, PAIRS[:2])
    plant(monkeypatch, model)
    told(defect, check, stopped(lambda: measure(model, PAIRS[:2]), check))


# --- defects of prompts, tables and results ---


def roles_off(patch, tokenizer):
    """Every name stands a token later than it does."""
    wrapped(patch, tasks, "_name_tokens", lambda real: lambda *given: tuple(at + 1 for at in real(*given)))
    tasks.make_pair(tokenizer, PAIR)


def bos_twice(patch, tokenizer):
    """A chat template writes the first token, and so does the tokenizer."""
    wrapped(patch, tasks, "encoded", lambda real: lambda words, text, special: real(words, text))
    own = words_tokenizer("The profession of Ada Lovelace is", bos=True)
    own.add_special_tokens({"bos_token": "<s>"})
    own.chat_template = "<s>{{ messages[0].content }}"
    tasks.make_prompt(own, tasks.find_template("profession_is"), ["Ada Lovelace"], chat_template=True)


def eos_appended(patch, tokenizer):
    own = words_tokenizer("The profession of Ada Lovelace is", eos=True)
    tasks.make_prompt(own, tasks.find_template("profession_is"), ["Ada Lovelace"])


def answer_without_space(patch, tokenizer):
    bare = lambda words, asked: [tuple(words(word.strip()).input_ids[:1]) for word in asked]  # noqa: E731
    patch.setattr(tasks, "answer_ids", bare)
    tasks.candidates(tokenizer, tasks.find_template("profession_both"))


def of_two_quads(patch, tokenizer):
    """Two pairs of one person that are said to be two quads."""
    Path("mine.csv").write_text(HEADER + ",quad_id\n" + f"{NAMES},q0\n" + f"{NAMES.replace('Picasso', 'Gauguin')},q1\n")
    begin().pairs()


def apart(patch, tokenizer):
    """Every pair is taken for a cluster of its own."""
    patch.setattr(data, "clusters", lambda pairs: range(len(pairs)))
    Path("mine.csv").write_text(HEADER + "\n" + f"{NAMES}\n" + f"{NAMES.replace('Picasso', 'Gauguin')}\n")
    begin().pairs()


def older_parameters(patch, tokenizer):
    begin(seed=4).table(table("necessity", fake_plan(1), fake_compute))
    begin()


HEADER = "clean_a,clean_b,corrupt_a,corrupt_b,answer,corrupt_answer"
NAMES = "Brad Pitt,Pablo Picasso,Isaac Newton,Albert Einstein,artist,scientist"
PAIR = dict(zip(HEADER.split(","), NAMES.split(","), strict=True))
PAIR |= {"pair_id": "p", "quad_id": "q", "half": "discovery", "task": "superset", "template": "profession_both"}
TABLES = [
    Fault("roles off by one token", "lib.tasks._swapped", roles_off),
    Fault("BOS twice", "lib.tasks.encoded", bos_twice),
    Fault("EOS appended", "lib.tasks.encoded", eos_appended),
    Fault("answer token without its space", "lib.tasks.candidates", answer_without_space),
    Fault("a person in both halves, by the file of pairs", "lib.data.check_halves", of_two_quads),
    Fault("a person in both halves, by the split", "lib.data.check_halves", apart),
    Fault("stale results from older parameters", "pipeline.step.Step.refuse_stale", older_parameters),
]


@pytest.mark.parametrize("fault", TABLES, ids=lambda fault: fault.defect)
def test_a_defect_of_prompts_or_tables_is_stopped(here, smollm_tokenizer, fault, monkeypatch, told):  # noqa: F811
    told(fault.defect, fault.check, stopped(lambda: fault.plant(monkeypatch, smollm_tokenizer), fault.check))


SWAPPED = Fault("clean and corrupt answers swapped in the pairs", "pipeline.step.with_gap", lambda *_: None)


@pytest.mark.long
def test_answers_that_have_changed_places_are_stopped(smollm, two_pairs, told):
    turned = [replace(pair, answer=pair.corrupt_answer, corrupt_answer=pair.answer) for pair in two_pairs]
    told(SWAPPED.defect, SWAPPED.check, stopped(lambda: measure(smollm, turned), SWAPPED.check))


def test_the_committed_table_has_these_defects():
    wanted = {(fault.defect, fault.check) for fault in (*PASSES, *TABLES, SWAPPED)}
    found = json.loads(TABLE.read_text(encoding="utf-8"))
    assert {(row["defect"], row["check"]) for row in found if row["defect"] not in OTHERS} == wanted
    assert len(found) == len(wanted) + len(OTHERS) and all(row["message"] for row in found)
