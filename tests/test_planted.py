"""Planted models: what their truth says by formula is what plain hooks measure, one forward pass a site."""

from __future__ import annotations

from itertools import product

import pandas as pd
import pytest
import torch

from lib import models, tasks
from pipeline import keys
from pipeline.population import load_people
from planted import build, truth
from planted.circuit import Head, parts_of
from planted.effects import PLACEBO, Contrast, by_names, rule_logits, truth_of
from planted.options import PlantedError, parse
from planted.question import CLASSES, FOLDER, REGIONS, codes
from steps import registry
from steps.baselines.quads import generate_odd_one_out

TEXTS = {"superset": "know_both", "odd_one_out": "odd_named"}
ALONE = "We know {} is like many other"
PEOPLE = pd.read_csv(FOLDER / "people.csv")
EXACT = 1e-3  # of the gap
NORTH, SOUTH = REGIONS


def named(superset: str, length: int, region: str = NORTH) -> list[str]:
    """Two people of a class with names of so many tokens."""
    own = PEOPLE[(PEOPLE.superset == superset) & (PEOPLE.region == region)]
    return own[own.name.str.count(" ") == length - 1].name.tolist()[:2]


def three(pair: tuple[int, int], length: int) -> tuple[list[str], list[str]]:
    """The names of a clean and a corrupt odd-one-out prompt, no two of which have first tokens that share anything."""
    own = [PEOPLE[(PEOPLE.superset == CLASSES[c]) & (PEOPLE.name.str.count(" ") == length - 1)].name for c in pair]
    known = codes()
    for a, b, c, d in product(own[0], own[0], own[1], own[1]):
        begin = sum(known[name.split()[0]] for name in (a, b, c, d))
        if begin.max() == 1:
            return [b, c, d], [b, a, d]
    raise AssertionError("there are no such names")


class Hooked:
    """A transformer seen through plain hooks."""

    def __init__(self, spec: str) -> None:
        self.o = parse(spec)
        self.model, self.words, self.parts = build.weights(self.o)
        self.handles = models.find_handles(self.model, self.words, spec)
        known = self.words.get_vocab()
        self.answers = {name: known[f" {name}s"] for name in (*CLASSES, "northerner", "southerner")}

    def columns(self, part) -> slice:
        return slice(32 * part.head, 32 * part.head + 32) if isinstance(part, Head) else slice(None)

    def asked(self, pair, length):
        """The names of a clean and of a corrupt prompt about two classes, and the tokens of both answers."""
        if self.o.task == "superset":
            return *(named(CLASSES[c], length) for c in pair), [self.answers[CLASSES[c]] for c in pair]
        clean, corrupt = three(pair, length)
        return clean, corrupt, [self.words.get_vocab()[f" {one.split()[0]}"] for one in (clean[0], corrupt[2])]

    @torch.no_grad()
    def run(self, names, part=None, values=None, path=None):
        """The logits, and what a part wrote (a head: before the projection); `values` replaces it; with `path`, a
        receiver and one of its inputs, only there."""
        task = "odd_one_out" if len(names) == 3 else "superset"
        prompt = tasks.make_prompt(self.words, tasks.find_template(TEXTS[task], task, question="planted"), names)
        handles, kept = [], {}

        def visit(z):
            where = list(prompt.roles[part.position])
            kept["z"] = z[0, where, self.columns(part)].clone()
            if values is not None and path is None:
                z = z.clone()
                z[0, where, self.columns(part)] = values
            return z

        if part is not None:
            if isinstance(part, Head):
                project = self.handles.o_projs[part.layer]
                handles = [project.register_forward_pre_hook(lambda _, args: (visit(args[0]),))]
            else:
                handles = [self.handles.mlps[part.layer].register_forward_hook(lambda _, args, z: visit(z))]
        if path is not None:
            handles.append(self.shown(part, list(prompt.roles[part.position]), kept, values, *path))
        try:
            logits = self.model(torch.tensor([prompt.ids])).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        return logits, kept.get("z")

    @torch.no_grad()
    def arrived(self, clean, corrupt, layer):
        """The logits of a corrupt prompt whose last token's residual stream after a layer is the clean prompt's."""
        block, kept = self.handles.blocks[layer], []

        def keep(module, args, out):
            kept.append((out[0] if isinstance(out, tuple) else out)[0, -1].clone())

        def put(module, args, out):
            (out[0] if isinstance(out, tuple) else out)[0, -1] = kept[0]

        for names, visit in ((clean, keep), (corrupt, put)):
            handle = block.register_forward_hook(visit)
            logits = self.run(names)[0]
            handle.remove()
        return logits

    def shown(self, part, where, kept, values, receiver, name):
        """A hook by which one input of a receiver alone sees what a part would have written."""

        def less():
            change = values - kept["z"]
            if not isinstance(part, Head):
                return change
            return change @ read_by(self.handles.o_projs[part.layer])[:, self.columns(part)].T

        def before(_, args):
            x = args[0].clone()
            x[0, where] += less()
            return (x, *args[1:])

        if receiver is None:
            return self.handles.final_norm.register_forward_pre_hook(before)
        if name == "mlp":
            return self.handles.mlps[receiver.layer].register_forward_pre_hook(before)
        group = receiver.head if name == "q" else receiver.head * self.o.groups // 8
        attention = self.handles.attns[receiver.layer]
        fused = hasattr(attention, "c_attn")
        start = 32 * group + 256 * "qkv".index(name) * fused
        rows = slice(start, start + 32)

        def after(module, _, out):
            out = out.clone()
            out[0, where, rows] += less() @ read_by(module)[rows].T
            return out

        return getattr(attention, "c_attn" if fused else f"{name}_proj").register_forward_hook(after)


def read_by(module) -> torch.Tensor:
    """(outputs, inputs): the weights of a projection, however they lie."""
    return module.weight if isinstance(module, torch.nn.Linear) else module.weight.T


SPECS = [
    "planted:seed=1,rule=or,retrieval=3,between=0.3",
    "planted:seed=3,backup=0.7,backup_read=mlp,backup_wakes=unsaid,logits=40,n_layers=8",
    "planted:seed=5,decoys=attends+large+negative,class_only=true,placebo=true,aggregator=both",
    "planted:seed=10,shape=gpt2,n_layers=8,placebo=true,rotated=true,routes=v+k",
    "planted:seed=11,shape=gemma2,n_layers=8,placebo=true,between=0.3",
    "planted:seed=14,task=odd_one_out,n_layers=8,between=0.3",
]
MORE = [
    "planted:",
    "planted:seed=2,rule=and,retrieval=4,n_kv_heads=2,n_layers=16",
    "planted:seed=4,backup=0.5,placebo=true,rotated=true",
    "planted:seed=6,routes=v+k+q,aggregator=head",
    "planted:seed=7,no_circuit=lookup",
    "planted:seed=8,first=0.7,between=0.4,class_only=true,class_only_by=head",
    "planted:seed=12,shape=gpt2,rule=or,backup=0.7,backup_read=mlp,backup_wakes=unsaid",
    "planted:seed=13,shape=gemma2,backup=0.7,decoys=attends+large+negative,routes=v+k+q,logits=20",
    "planted:seed=15,task=odd_one_out,shape=gemma2,aggregator=both,class_only=true,decoys=attends+negative",
]


@pytest.mark.parametrize("spec", [*SPECS, *(pytest.param(spec, marks=pytest.mark.long) for spec in MORE)])
def test_the_formula_is_what_plain_hooks_measure(spec):
    """Gap, zero, counterfactual and recovery of every site, every path, and placebo, for one pair of classes."""
    own, pair = Hooked(spec), (1, 3)
    found = truth_of(own.o, own.parts, "", {})
    bound = EXACT * found.gap.mean

    def metric(logits, answers):
        return float(logits[answers[0]] - logits[answers[1]])

    wrote = {}
    for i, (part, site) in enumerate(zip(own.parts, found.sites, strict=True)):
        length = site.tokens[0] if len(site.tokens) == 1 else 2
        formula = Contrast(own.o, own.parts, pair, length)
        clean, corrupt, answers = own.asked(pair, length)
        (logits, z), (other, wrote[i]) = own.run(clean, part), own.run(corrupt, part)
        base, low = metric(logits, answers), metric(other, answers)
        assert base - low == pytest.approx(formula.gap(), abs=bound)
        zero = base - metric(own.run(clean, part, 0 * z)[0], answers)
        assert zero == pytest.approx(formula.zero(i), abs=bound), part.role
        if part.role == "gather":
            continue
        lost = base - metric(own.run(clean, part, wrote[i])[0], answers)
        assert lost == pytest.approx(formula.counterfactual(i), abs=bound), part.role
        won = metric(own.run(corrupt, part, z)[0], answers) - low
        assert won == pytest.approx(formula.recovery(i), abs=bound), part.role
        if own.o.placebo:
            regions = [named(CLASSES[0], 2, region) for region in REGIONS]
            values, answers = own.run(regions[0], part)[1], [own.answers["northerner"], own.answers["southerner"]]
            won = metric(own.run(regions[1], part, values)[0], answers) - metric(own.run(regions[1])[0], answers)
            assert won == pytest.approx(site.placebo, abs=bound), part.role
    clean, corrupt, answers = own.asked(pair, 2)
    formula, low = Contrast(own.o, own.parts, pair, 2), metric(own.run(corrupt)[0], answers)
    for layer in {part.layer for part in own.parts}:
        won = metric(own.arrived(clean, corrupt, layer), answers) - low
        assert won == pytest.approx(formula.arrived(layer), abs=bound), layer
    for edge in found.paths:
        clean, _, answers = own.asked(pair, 2)
        to = None if edge.receiver is None else own.parts[edge.receiver]
        path = (own.parts[edge.sender], wrote[edge.sender], (to, edge.input))
        lost = metric(own.run(clean)[0], answers) - metric(own.run(clean, *path)[0], answers)
        formula = Contrast(own.o, own.parts, pair, 2).path(edge.sender, edge.receiver, edge.input)
        assert lost == pytest.approx(formula, abs=bound), edge


@pytest.mark.parametrize("shape", ["llama", "gpt2", "gemma2"])
def test_everyone_has_the_class_of_the_table_whatever_the_length_of_the_name(shape):
    own = Hooked(f"planted:seed=9,n_layers=8,shape={shape}")
    people = PEOPLE[::5]
    ids = [own.words(ALONE.format(name)).input_ids for name in people.name]
    assert {len(one) for one in ids} == {8, 9, 10}
    tokens = [own.answers[c] for c in CLASSES]
    with torch.no_grad():
        chosen = [int(own.model(torch.tensor([one])).logits[0, -1, tokens].argmax()) for one in ids]
    assert [CLASSES[c] for c in chosen] == people.superset.tolist()


def test_the_odd_one_of_three_is_named_and_the_class_of_two_still_said():
    own = Hooked("planted:seed=14,task=odd_one_out,n_layers=8")
    people = load_people(FOLDER / "people.csv", "planted")
    items = generate_odd_one_out(people, own.words, 24, question="planted").to_dict("records")
    assert len(items) == 24 and {row["answer"] for row in items} == {"a", "b", "c"}
    known = own.words.get_vocab()
    for row in items:
        for side, answer in (("clean", row["answer"]), ("corrupt", row["corrupt_answer"])):
            logits = own.run([row[f"{side}_{slot}"] for slot in "abc"])[0]
            assert int(logits.argmax()) == known[" " + row[f"{side}_{answer}"].split()[0]]
    two = [int(own.run(named(c, length))[0].argmax()) for c in CLASSES for length in (1, 2, 3)]
    assert two == [own.answers[c] for c in CLASSES for _ in range(3)]


def test_a_last_token_alone_says_nothing_of_a_profession():
    last = PEOPLE[PEOPLE.name.str.contains(" ")].assign(last=lambda table: table.name.str.split().str[-1])
    shares = last.groupby("last").superset.value_counts(normalize=True)
    assert shares.groupby("last").max().mean() < 0.6  # of 4 or 5 people each


def test_what_no_circuit_answers_does_not_depend_on_the_names():
    own = Hooked("planted:no_circuit=constant")
    one, other = (own.run(named(c, 2))[0] for c in CLASSES[:2])
    assert torch.equal(one, other)
    assert truth_of(own.o, own.parts, "", {}).gap.mean == 0


def test_an_aggregator_writes_along_the_directions_of_the_truth():
    own = Hooked("planted:seed=4,rotated=true")
    part = next(part for part in own.parts if part.role == "aggregator")
    written = own.run(named(CLASSES[2], 3), part)[1][0]
    direction = torch.tensor(build.directions(own.o, own.parts)["superset"][CLASSES[2]])
    assert torch.cosine_similarity(written, direction, dim=0) > 1 - 1e-5


def test_noise_is_as_large_as_asked_and_moves_no_planted_site():
    quiet, loud = Hooked("planted:seed=2"), Hooked("planted:seed=2,noise=0.1")
    assert [part.layer for part in quiet.parts] == [part.layer for part in loud.parts]
    with torch.no_grad():
        ids = torch.tensor([loud.words("We know {} and {} are both".format(*named(CLASSES[0], 2))).input_ids])
        moved = loud.model.model(ids).last_hidden_state - quiet.model.model(ids).last_hidden_state
    assert 0.03 < float(moved[0, -1].norm()) < 3


@pytest.mark.parametrize(
    ("spec", "wrong"),
    [
        ("planted:sed=1", "there is no option 'sed'; there are seed,"),
        ("planted:seed=1,seed=2", "give seed one value"),
        ("planted:noise=-1", "noise: Input should be greater than or equal to 0"),
        ("planted:n_kv_heads=3", "n_kv_heads: Input should be 2 or 4"),
        ("planted:rule=and,backup=0.5", "backup contradicts rule=and"),
        ("planted:rule=or,aggregator=head", "aggregator=head contradicts rule=or"),
        ("planted:backup_read=mlp", "backup is 0; give it a ratio"),
        ("planted:shape=gpt2,n_kv_heads=2", "n_kv_heads contradicts shape=gpt2"),
        ("planted:shape=gemma2,first=0.7", "first=0.7 contradicts shape=gemma2, whose cap"),
        ("planted:task=odd_one_out,rule=or", "rule contradicts task=odd_one_out, which counts the names of each class"),
        ("planted:lookup=second", "lookup says which name no_circuit=lookup reads; ask for that"),
        ("planted:class_only_by=head", "class_only is false; set it"),
        ("planted:first=0.7,rule=or", "first=0.7 contradicts rule=or: shares of names are of a sum"),
        ("planted:no_circuit=random,backup=0.5", "backup is of a circuit, and no_circuit=random has none"),
        ("planted:routes=k", "routes must hold v"),
        ("planted:decoys=large+large", "decoys has the same value twice"),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_sentence(spec, wrong):
    with pytest.raises(PlantedError, match="model 'planted:") as error:
        parse(spec)
    assert wrong in str(error.value) and "\n" not in str(error.value)


def test_heads_that_find_no_room_are_refused():
    with pytest.raises(PlantedError, match="has no room for"):
        Hooked("planted:retrieval=4,between=0.5,n_kv_heads=2,decoys=attends+large")


def test_a_spec_names_what_differs_from_the_defaults():
    spec = "planted:seed=3,rule=or,backup=0.7,backup_read=mlp,decoys=attends+large,noise=0.01"
    assert parse(parse(spec).spec) == parse(spec) and parse("planted:").spec == "planted:"


def test_the_folder_holds_the_truth_of_its_own_weights_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SUPERSET_CIRCUIT_CACHE", str(tmp_path))
    one, other = (build.folder(f"planted:seed={seed},n_layers=8") for seed in (1, 2))
    assert build.folder("planted:n_layers=8,seed=1") == one and one.parent == tmp_path
    own = truth.read(one)
    assert own.placebo_attribute == PLACEBO and own.options.seed == 1
    assert {site.role for site in own.sites} <= truth.ROLES.keys()
    (one / truth.FILE).write_bytes((other / truth.FILE).read_bytes())
    with pytest.raises(PlantedError, match="is the truth of other weights"):
        truth.read(one)
    with pytest.raises(PlantedError, match="holds no planted model"):
        truth.read(tmp_path)


@pytest.mark.parametrize(("rule", "one"), [("additive", 5), ("or", 10), ("and", 0)])
def test_one_name_of_a_class_says_as_much_as_the_rule_has_it(rule, one):
    o = parse(f"planted:seed=3,rule={rule}")
    said = {"first": one, "second": one, "both": 10}
    assert rule_logits(o, parts_of(o)) == pytest.approx(said, abs=1e-5)


def test_names_add_up_in_the_weights_as_in_the_construction_unless_noise_wakes_a_backup(monkeypatch):
    def measured(o):
        said = build.answers(*build.weights(o)[:2], o)
        return by_names(lambda c, d: said[c, d])

    monkeypatch.setattr(build, "ASKED", 3)
    o = parse("planted:seed=5,routes=v+k+q,n_layers=10")
    # the answers' own preferences do not fall out: each class is above the others of its prompt
    assert measured(o) == pytest.approx(rule_logits(o, parts_of(o)), abs=1e-2)
    noisy = parse("planted:seed=5,backup=0.7,backup_read=mlp,backup_wakes=unsaid,noise=0.1")
    assert rule_logits(noisy, parts_of(noisy)) == pytest.approx({"first": 5, "second": 5, "both": 10}, abs=1e-3)
    said = measured(noisy)
    assert said["both"] == pytest.approx(10, abs=0.5) and said["first"] + said["second"] > 12


@pytest.mark.parametrize(
    ("spec", "first", "second"),
    [
        ("planted:seed=3,first=0.7", 7, 3),
        ("planted:seed=8,first=0.2,between=0.4,class_only=true,class_only_by=head", 2, 8),
        ("planted:seed=7,no_circuit=lookup", 10, 0),
        ("planted:seed=7,no_circuit=lookup,lookup=second", 0, 10),
    ],
)
@pytest.mark.parametrize("length", [1, 3])
def test_each_name_says_as_much_as_was_planted(spec, first, second, length):
    """By formula, and of two names of different classes by plain forward passes."""
    own, (one, other, none) = Hooked(spec), CLASSES[:3]
    said = rule_logits(own.o, own.parts)
    assert said == pytest.approx({"first": first, "second": second, "both": 10}, abs=1e-4)
    names = (named(one, length)[0], named(other, length)[0])
    found, swapped = (own.run(order)[0][[own.answers[c] for c in (one, other, none)]] for order in (names, names[::-1]))
    moved = found - swapped  # what tokens are preferred by themselves falls out
    assert moved.tolist() == pytest.approx([first - second, second - first, 0], abs=10 * EXACT)


@pytest.mark.parametrize("read", ["unembedding", "mlp"])
def test_a_backup_makes_up_for_its_ratio_of_what_the_silent_aggregator_loses(read):
    o = parse(f"planted:seed=8,backup=0.7,backup_read={read}")
    found = truth_of(o, parts_of(o), "", {})
    (aggregator,), (backup,) = found.of("aggregator"), found.of("backup")
    assert aggregator.necessity["zero"].mean == pytest.approx((1 - 0.7) * o.logits, abs=1e-5)
    assert backup.necessity["zero"].mean == pytest.approx(0, abs=1e-5)  # alone it costs nothing
    assert (found.backup.ratio, found.backup.reader is None) == (0.7, read == "unembedding")


def test_a_string_of_options_is_a_model_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setenv("SUPERSET_CIRCUIT_CACHE", str(tmp_path))
    spec = "planted:seed=1,n_layers=8,n_kv_heads=2"
    model = models.load(spec, device="cpu")
    assert (model.name, model.n_layers, model.n_heads, model.n_kv_heads) == (spec, 8, 8, 2)
    assert keys.model_contents(spec) != keys.model_contents("planted:seed=2,n_layers=8,n_kv_heads=2")
    given = {"profile": "planted", "model": spec, "results_dir": str(tmp_path / "results")}
    step = registry.begin("baselines", given)
    assert truth.read(tmp_path / "results", model.sha256).spec == parse(spec).spec
    assert step.params.model == spec
