"""Neurons against the general sweep and against definitions; rankings, shares and verdicts on tables made by hand."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_sweep import PAIRS, pair_of

from lib import effects, hooks, records, single_pass, sweep
from lib.effects import HALVES
from lib.hooks import Site
from report import words
from steps.neurons import neurons, neurons_page, page, picks
from steps.neurons.measure import Measured, Neurons
from steps.story import claims

P = Neurons(model="config:none", resamples=200, flips=200, top_neurons=6, budgets=(1, 2), random_sets=2, cards=2)
SPREAD = [
    replace(pair_of(index, half=half), quad_id=f"{half}{index // 2}", pair_id=f"{half}{index}")
    for half in HALVES
    for index in range(4)
]


class Numbers:
    """A tokenizer whose tokens stand for their numbers."""

    def __call__(self, text, **options):
        return SimpleNamespace(input_ids=[])

    def decode(self, ids):
        return "".join(f"<{token}>" for token in ids)

    def batch_decode(self, ids):
        return list(map(self.decode, ids))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_rows_are_those_of_the_sweep_and_direct_effects_by_definition(tiny, name):
    model, layers = tiny(name), [0, 2]
    reading = neurons.reading_of(model, layers)
    for direction in sweep.DIRECTIONS:
        frame = neurons.run(model, PAIRS[:2], direction=direction, layers=layers, reading=reading)
        frame = records.conform(frame, neurons.SCHEMA).sort_values(["pair_id", "layer", "head"], ignore_index=True)
        usual = sweep.run(model, PAIRS[:2], direction=direction, components=["neuron"], layers=layers)
        usual = usual.sort_values(["pair_id", "layer", "head"], ignore_index=True)
        assert len(frame) == 2 * 2 * model.n_neurons and frame["pair_id"].tolist() == usual["pair_id"].tolist()
        for column in (
            "logit_diff_before",
            "logit_diff_after",
            "logit_diff_clean",
            "logit_diff_corrupt",
            "metric_after",
            "site_delta",
        ):
            assert np.abs(frame[column] - usual[column]).max() < 1e-5, column
        off = np.stack(list(frame["logits_after"])) - np.stack(list(usual["logits_after"]))
        assert np.abs(off).max() < 1e-5 < 1e-3 < effects.effect(frame).abs().max()
        assert np.allclose(frame["change"].abs(), frame["site_delta"], atol=1e-6)

    # by definition, in the last layer of the corrupt run: plain hooks, the modules' own weights, the norms written out
    pair, last = PAIRS[1], [9]
    sites = [Site(2, "neuron", 5), Site(2, "mlp"), Site(2, "resid")]
    seen = {}
    for side in ("clean", "corrupt"):
        with hooks.capture(model, sites, last) as kept:
            model.model(torch.tensor([getattr(pair, side).ids]))
        seen[side] = {site: value[0, 0] for site, value in kept.items()}
    weight, run = model.down_projs[2].weight, seen["corrupt"]
    column = weight[5] if name == "gpt2" else weight[:, 5]
    change = (seen["clean"][sites[0]] - run[sites[0]]).item()

    def through(norm, vector, at):
        centred = (lambda x: x - x.mean()) if name == "gpt2" else (lambda x: x)
        epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        gain = 1 + norm.weight if "Gemma" in type(norm).__name__ else norm.weight
        return gain * centred(vector) / (centred(at).square().mean() + epsilon).sqrt()

    vector = column if name != "gemma3" else through(model.blocks[2].post_feedforward_layernorm, column, run[sites[1]])
    towards = model.unembed.weight[pair.clean_tokens[pair.answer]]
    towards = towards - model.unembed.weight[pair.clean_tokens[pair.corrupt_answer]]
    direct = change * (through(model.final_norm, vector, run[sites[2]]) @ towards).item()
    row = frame[(frame["pair_id"] == "p1") & (frame["layer"] == 2) & (frame["head"] == 5)].iloc[0]
    assert row["direct"] == pytest.approx(direct, rel=1e-4) and abs(direct) > 1e-4
    assert row["written"] == pytest.approx(abs(change) * column.norm().item(), rel=1e-5)


def test_rows_prove_themselves(tiny, monkeypatch):
    model = tiny("llama")
    reading = neurons.reading_of(model, [1])
    monkeypatch.setattr(single_pass.Edit, "write", lambda self, activation: None)
    with pytest.raises(single_pass.SweepError, match="pair p0, noise at last, layer 1 neuron 0: the hook fired"):
        neurons.run(model, PAIRS[:1], direction="noise", layers=[1], reading=reading)


def test_small_passes_give_the_same_rows(tiny):
    model = tiny("llama")
    how = {"direction": "noise", "layers": [1], "reading": neurons.reading_of(model, [1])}
    whole, parts = (neurons.run(model, PAIRS[:1], **how, memory=memory) for memory in (1.0, 1e-4))
    assert whole["head"].tolist() == parts["head"].tolist() == list(range(model.n_neurons))
    assert np.abs(whole["logit_diff_after"] - parts["logit_diff_after"]).max() < 1e-5


def test_classes_tokens_and_activations_of_plain_runs(tiny):
    model = tiny("llama")
    reading = neurons.reading_of(model, [0, 2])
    found = neurons.harvest(model, SPREAD, [0, 2], reading, size=3)
    assert len(found.prompts) == 8 and found.activations[2].shape == (8, model.n_neurons)  # halves share their prompts
    for row in (0, 5):
        about = found.prompts.iloc[row]
        pair = next(pair for pair in SPREAD if pair.pair_id == about["pair_id"])
        ids = getattr(pair, about["side"]).ids
        with hooks.capture(model, [Site(2, "neuron", 7)], [9]) as seen:
            model.model(torch.tensor([ids]))
        assert found.activations[2][row, 7] == pytest.approx(seen[Site(2, "neuron", 7)].item(), abs=1e-5)
    tokens = dict(zip(SPREAD[0].candidates, SPREAD[0].clean_tokens, strict=True))
    table = records.conform(neurons.of_classes(model, found, [0, 2], reading, tokens, 0), neurons.CLASS_SCHEMA)
    own = found.prompts.assign(value=found.activations[2][:, 7])
    units = own.groupby(["quad_id", "superset"])["value"].mean().reset_index()
    for row in table[(table["layer"] == 2) & (table["head"] == 7)].itertuples():
        inside = units["superset"] == row.superset
        assert (row.n, row.n_others) == (inside.sum(), (~inside).sum())
        assert row.auc == pytest.approx(roc_auc_score(inside, units["value"]), abs=1e-6)
        assert row.mean == pytest.approx(units.loc[inside, "value"].mean(), abs=1e-5)
        column = model.final_norm.weight * model.down_projs[2].weight[:, 7]
        logits = model.unembed.weight @ column * found.rates[2]
        assert row.weight == pytest.approx((logits[tokens[row.superset]] - logits.mean()).item(), rel=1e-4, abs=1e-6)
    words = replace(model, tokenizer=Numbers())
    said = neurons.of_tokens(words, found, reading, [(2, 7)])
    assert said[said["end"] == "up"]["token"].tolist()[0] == f"<{int(logits.argmax())}>"
    assert said[said["end"] == "down"]["token"].tolist()[0] == f"<{int(logits.argmin())}>"
    every = (model.unembed.weight @ (model.final_norm.weight[:, None] * model.down_projs[2].weight)).detach()
    every = (every - every.mean(0)) / every.std(0)
    for end, far in (("up", every.max(0).values), ("down", -every.min(0).values)):
        p = (1 + (far > far[7] + 1e-4).sum().item()) / (1 + len(far))  # the layer is small: all of it is compared
        assert said[said["end"] == end]["p"].tolist() == pytest.approx([p] * neurons.TOKENS)
    assert neurons.of_prompts(found, [(2, 7)])["activation"].tolist() == found.activations[2][:, 7].tolist()


def test_labels_dealt_out_anew_say_nothing_of_the_class(tiny):
    """A neuron that knows the class: of quads of two classes each, an exchange within quads would leave 0.62."""
    model, names = tiny("llama"), ["artist", "athlete", "writer"]
    prompts = pd.DataFrame(
        {"half": half, "quad_id": f"{half}{quad}", "superset": superset}
        for half in HALVES
        for quad in range(30)
        for superset in np.delete(names, quad % 3)
    )
    reading = neurons.reading_of(model, [1])
    knows = np.tile(prompts["superset"] == "artist", (model.n_neurons, 1)).T.astype("float32")
    found = neurons.Harvest(prompts, {1: knows}, {1: 1.0})
    tokens = dict(zip(names, [1, 2, 3], strict=True))
    tables = [neurons.of_classes(model, found, [1], reading, tokens, seed) for seed in range(20)]
    own = pd.concat(tables).query("superset == 'artist'")
    assert (own["auc"] == 1).all() and own["auc_chance"].mean() == pytest.approx(0.5, abs=0.04)


# --- tables made by hand ------------------------------------------------------------------------------------------


def made(effect: dict[str, np.ndarray], quads: int = 4, layers: int = 2, written=None) -> pd.DataFrame:
    """A table of neurons with given effects per half; both directions alike."""
    rows = []
    for half, values in effect.items():
        for quad in range(quads):
            for direction, sign in (("noise", -1), ("denoise", 1)):
                n = len(values) // layers
                about = {"pair_id": f"{half}{quad}", "quad_id": f"{half}{quad}", "half": half, "direction": direction}
                sites = {"layer": np.repeat(np.arange(layers), n), "head": np.tile(np.arange(n), layers)}
                numbers = {"logit_diff_before": 0.0, "logit_diff_after": sign * values, "direct": sign * values / 2}
                size = np.ones(len(values)) if written is None else written
                rows.append(pd.DataFrame(about | sites | numbers | {"written": size}))
    return pd.concat(rows, ignore_index=True)


def test_neurons_are_picked_on_discovery_by_size_either_way():
    first, last = np.zeros(40), np.zeros(40)
    first[[3, 25, 30]], last[[3, 25, 30, 7]] = [0.5, -0.9, 0.2], [0.4, -0.3, -0.2, 5.0]
    written = np.linspace(1, 2, 40)
    frame = made({"confirmation": last, "discovery": first}, written=written)
    chosen = picks.top(frame, P.model_copy(update={"top_neurons": 3}))
    assert chosen["site"].tolist() == ["neuron 1.5", "neuron 0.3", "neuron 1.10"]
    assert chosen["effect"].tolist() == pytest.approx([-0.9, 0.5, 0.2]) and chosen["direct"][0] == pytest.approx(-0.45)
    sets = picks.roster(frame, chosen, P, np.random.default_rng(0))
    kinds = [(one.kind, one.n_sites) for one in sets]
    assert kinds == [("single", 1)] * 3 + [("helping", 1), ("helping", 2)] + [("random", 1), ("random", 2)] * 2 + [
        ("opposing", 1), ("MLPs", 2)
    ]  # fmt: skip
    assert sets[4].sites == (Site(0, "neuron", 3), Site(1, "neuron", 10)) and sets[-2].sites == (Site(1, "neuron", 5),)
    assert sets[-1].sites == (Site(0, "mlp"), Site(1, "mlp"))
    taken = {one.sites[0] for one in sets[:3]}
    for one in sets[5:9]:
        assert not taken & set(one.sites) and [site.layer for site in one.sites] == [0, 1][: one.n_sites]
    text, numbers = neurons_page.scope_sentences(frame, chosen)
    assert numbers["kept"] == pytest.approx((0.3 + 0.4 - 0.2) / 1.6) and "keep 31% of it" in text[1]
    assert "help on discovery reach +0.20 logits in sum, half of it after 1 of 2" in text[2]
    drawn = neurons_page.concentration(frame).axes[0].lines
    assert drawn[0].get_ydata()[-1] == pytest.approx(0.4 - 0.2) and drawn[1].get_ydata()[-1] == pytest.approx(-0.3)


def test_mlps_that_were_not_asked_about_are_named():
    sites = [
        {"site": site, "component": site.split()[0], "layer": layer, "ratio": ratio, "low": low, "p": 0.01}
        for site, layer, ratio, low in (
            ("mlp 8", 8, 0.9, 1.0), ("mlp 9", 9, 0.125, 0.2), ("mlp 3", 3, 0.05, 0.1), ("mlp 4", 4, 0.2, -0.1),
            ("head 9.1", 9, 0.5, 1.0), ("mlp 5", 5, 0.5, None),
        )
    ]  # fmt: skip
    [said] = neurons_page.others_sentence(sites, [8], P)
    assert "2 other MLPs that alone surely recover a share" in said and "mlp 9 (0.12 over all supersets" in said
    assert neurons_page.others_sentence(sites, [3, 8, 9], P) == []


def test_random_neurons_write_as_much():
    written = np.tile(np.linspace(0, 1, 100), 2)
    frame = made({"discovery": np.eye(200)[20] + np.eye(200)[180] / 2}, quads=2, written=written)
    chosen = picks.top(frame, P.model_copy(update={"top_neurons": 2}))
    for seed in range(5):
        first, second = picks.matched(frame, chosen, chosen, np.random.default_rng(seed))
        assert (first.layer, second.layer) == (0, 1)
        assert 0 < abs(first.head - 20) <= picks.NEAREST and 0 < abs(second.head - 80) <= picks.NEAREST


def replaced(sets, cost: dict[tuple[str, int], float], quads: int = 24, noise: float = 0.05) -> pd.DataFrame:
    """Sweep rows of a roster whose sets have given mean effects on logit_diff, of a gap of 4 logits."""
    rng, rows = np.random.default_rng(0), []
    for half in HALVES:
        for quad in range(quads):
            for ablation in ("counterfactual", "mean", "clean"):
                sign = 1 if ablation == "clean" else -1
                for index, one in enumerate(sets):
                    effect = cost[one.kind, one.n_sites] + rng.normal(0, noise)
                    about = {"half": half, "quad_id": f"{half}{quad}", "pair_id": f"{half}{quad}", "site_set": index}
                    about |= {"direction": "denoise" if sign > 0 else "noise", "ablation": ablation}
                    about |= one.sites[0]._asdict() | {"logit_diff_clean": 2.0, "logit_diff_corrupt": -2.0}
                    values = {"logit_diff_before": 0.0, "logit_diff_after": sign * effect}
                    rows.append(about | values | {"metric_before": 0.0, "metric_after": sign * effect})
    return pd.DataFrame(rows)


SETS = [picks.Set("single", 1, (Site(1, "neuron", n),)) for n in range(3)]
SETS += [picks.Set("helping", n, tuple(one.sites[0] for one in SETS[:n])) for n in (1, 2)]
SETS += [picks.Set("random", n, tuple(Site(1, "neuron", 9 - i) for i in range(n))) for n in (1, 2, 1, 2)]
SETS += [picks.Set("opposing", 1, SETS[2].sites), picks.Set("MLPs", 1, (Site(1, "mlp"),))]
COST = {("single", 1): 0.5, ("helping", 1): 0.5, ("helping", 2): 1.5, ("opposing", 1): -0.5, ("MLPs", 1): 2.0}
COST |= {("random", 1): 0.1, ("random", 2): 0.2}


def test_shares_of_the_mlps_effect_and_whether_a_few_carry_it():
    table = replaced(SETS, COST)
    carried = neurons_page.shares(table, SETS, P)
    assert len(carried) == 2 * (2 + 2 + 2 + 1 + 1)
    shown = carried[carried["quantity"] == "recovery"].set_index(["kind", "n_sites"])["estimate"]
    expected = {("helping", 2): 0.75, ("helping, summed", 2): 0.5, ("random", 2): 0.1, ("opposing", 1): -0.25}
    for key, value in expected.items():
        assert shown[key] == pytest.approx(value, abs=0.03)
    helping = carried[(carried["kind"] == "helping") & (carried["n_sites"] == 2)]
    assert helping["above_random"].between(1.2, 1.3).all() and carried["mlps"].between(1.9, 2.1).all()
    picking = neurons_page.discovery_shares(table, SETS, P)
    said = neurons_page.few(picking, carried)
    assert "On the discovery half 2 neurons are the fewest, of the numbers tried, that surely carry" in said
    two = helping.set_index("quantity")[["estimate", "low", "high"]]
    each = " and ".join(f"{words.interval(*two.loc[way])} of the {way}" for way in ("damage", "recovery"))
    assert f"On the confirmation half they make up {each}, more than half there, too" in said
    small = neurons_page.shares(replaced(SETS, COST | {("helping", 2): 0.9}), SETS, P)
    assert "not shown to be more than half" in neurons_page.few(picking, small)  # no other size is tried in its place
    assert "no number of them that was tried, up to 2," in neurons_page.few(small, carried)
    random = neurons_page.shares(replaced(SETS, COST | {("random", 2): 1.6}), SETS, P)
    assert "is not supported" in neurons_page.few(random, random)
    first = table["half"] == HALVES[0]
    table.loc[first, "logit_diff_after"] *= 0.5  # of one half alone
    assert neurons_page.shares(table, SETS, P).equals(carried)
    assert not neurons_page.discovery_shares(table, SETS, P).equals(picking)
    text = neurons_page.share_sentence(carried, "damage")
    damage = carried[carried["quantity"] == "damage"].set_index(["kind", "n_sites"])
    first, second = (
        words.interval(*damage.loc[key, ["estimate", "low", "high"]]) for key in (("helping", 2), ("random", 2))
    )
    assert f"joint damage of {damage['mlps'].iloc[0]:.2f}" in text
    assert f"| that help the answer on discovery, together | 2 | {first} |" in text
    assert f"| random ones that write as much, together | 2 | {second} |" in text
    assert neurons_page.shares(replaced(SETS, COST | {("MLPs", 1): -1.0}), SETS, P).empty


def test_the_number_of_the_claim_stands_beside_what_the_page_asks(monkeypatch):
    wanted = neurons_page.CLAIMED
    (claim,) = (one for one in claims.CLAIMS if one.id == "few_neurons")
    assert claim.path == f"neurons.shares[quantity={wanted['quantity']},kind=helping,n_sites={wanted['n_sites']}]"
    carried = neurons_page.shares(replaced(SETS, COST), SETS, P)
    assert neurons_page.claimed(carried) == "", "no set of that size"
    monkeypatch.setitem(wanted, "n_sites", 2)
    row = carried[(carried["quantity"] == "damage") & (carried["kind"] == "helping") & (carried["n_sites"] == 2)].iloc[
        0
    ]
    own = words.interval(row["estimate"], row["low"], row["high"])
    said = neurons_page.claimed(carried)
    assert f"damage alone, by the 2 that help most on discovery: {own}." in said and said.count("page 10") == 1


def test_a_neuron_helps_or_opposes_only_where_its_interval_is_off_zero():
    def said(*numbers):
        return neurons_page.helps(pd.Series(dict(zip(("estimate", "low", "high"), numbers, strict=True))))

    assert said(0.2, 0.1, 0.3) == "helps the answer (effect 0.20 [0.10, 0.30] logits)"
    assert said(-0.2, -0.3, -0.1) == "opposes the answer (effect -0.20 [-0.30, -0.10] logits)"
    unsure = "is not shown to help or oppose the answer (effect "
    assert said(0.2, -0.1, 0.5) == unsure + "0.20 [-0.10, 0.50] logits)"
    few = "is measured in too few quads to be said to help or oppose the answer (effect -0.20 logits)"
    assert said(-0.2, None, None) == said(-0.2, np.nan, np.nan) == few


def test_top_neurons_are_significant_in_both_halves_with_one_sign():
    table = replaced(SETS, COST)
    rows = table["site_set"] == 2
    table.loc[rows & (table["half"] == "confirmation"), "logit_diff_after"] *= -1
    table.loc[table["site_set"] == 1, "logit_diff_after"] *= -1
    tables = neurons_page.singles(table, SETS, P)
    assert list(tables) == ["counterfactual", "mean", "clean"] and all(len(own) == 6 for own in tables.values())
    assert neurons_page.significant(tables["clean"], P).to_dict() == {"neuron 1.0": 1.0, "neuron 1.1": -1.0}
    text, _ = neurons_page.top_sentences(tables, table, P)
    assert "is neuron 1.0: where" in text[0] and "one that helps and one that opposes, under the mean" in text[1]
    assert "logit_diff falls by 0.5" in text[0] and "Next come neuron 1.1 and neuron 1.2." in text[0]
    assert neurons_page.both_ways(pd.Series(dtype=float)) == "no neurons"


def classes_of(areas: np.ndarray, weights: np.ndarray, n: int = 40) -> pd.DataFrame:
    """A class table of neurons x supersets: areas are above 0.5 where the superset's mean is above the others'."""
    parts = []
    for half in HALVES:
        for column, superset in enumerate(["artist", "athlete", "writer"]):
            own = areas[:, column]
            about = {"layer": 1, "head": np.arange(len(areas)), "half": half, "superset": superset, "n": n}
            values = {"n_others": 2 * n, "auc": own, "auc_chance": 0.5, "mean": own - 0.5, "mean_others": 0.0}
            parts.append(pd.DataFrame(about | values | {"weight": weights[:, column]}))
    return pd.concat(parts, ignore_index=True)


def test_selective_neurons_and_what_they_promote():
    areas, weights = np.full((50, 3), 0.5), np.zeros((50, 3))
    areas[4, 1], areas[9, 2], areas[12, 0] = 0.9, 0.1, 0.55
    weights[4], weights[9] = [0.1, 0.5, -0.2], [0.0, 0.3, 0.6]
    table = classes_of(areas, weights)
    told = neurons_page.selective(table, P).set_index("head")
    assert told.index[told["selective"]].tolist() == [4, 9] and not neurons_page.selective(
        table, P, "auc_chance"
    )["selective"].any()  # fmt: skip
    assert told.loc[[4, 9], "superset"].tolist() == ["athlete", "writer"]
    assert told.loc[[4, 9], "promoted"].tolist() == ["athlete", "artist"]  # 9 falls for writers, so it lowers them
    assert told.loc[[4, 9], "suppressed"].tolist() == ["writer", "writer"]
    other_side = table.copy()
    other_side.loc[(table["half"] == "confirmation") & (table["head"] == 4), "auc"] = 0.1
    assert neurons_page.selective(other_side, P).set_index("head")["selective"].sum() == 1
    fewer = table[(table["half"] == "discovery") | (table["superset"] != "athlete")]
    assert set(neurons_page.selective(fewer, P)["superset"]) == {"artist", "writer"}, "what both halves have"
    none = table[(table["half"] == "discovery") == (table["superset"] == "athlete")]
    assert neurons_page.selective(none, P).empty
    words = pd.DataFrame({"writes most on": ["x"]}, index=["neuron 1.4"])
    said = neurons_page.card_sentence(neurons_page.selective(none, P), words, pd.DataFrame(), str)
    assert said.startswith("No superset is in both halves")
    chosen = pd.DataFrame({"layer": 1, "head": [4], "site": ["neuron 1.4"]})
    direct = neurons_page.direct_by_class(table, chosen)
    assert direct.loc["neuron 1.4", "athlete"] == pytest.approx(0.4 * 0.5)


def solved(model, pair):
    """The pair with its answers exchanged where the clean prompt does not favour the first one."""
    logits = [
        model.model(torch.tensor([side.ids])).logits[0, -1][list(pair.clean_tokens)]
        for side in (pair.clean, pair.corrupt)
    ]
    gap = (logits[0] - logits[1])[[pair.answer, pair.corrupt_answer]]
    return pair if gap[0] > gap[1] else replace(pair, answer=pair.corrupt_answer, corrupt_answer=pair.answer)


@pytest.mark.parametrize("halves", [HALVES, HALVES[1:]])
def test_few_quads_and_one_half_go_through(tiny, halves, monkeypatch):
    """Everything that the page calls, on a handful of pairs."""
    model = replace(tiny("llama"), tokenizer=Numbers())
    pairs = [solved(model, pair) for pair in SPREAD if pair.half in halves]
    reading = neurons.reading_of(model, [1, 2])
    how = {"layers": [1, 2], "reading": reading}
    frame = pd.concat([neurons.run(model, pairs, direction=way, **how) for way in sweep.DIRECTIONS])
    chosen = picks.top(frame.reset_index(drop=True), P)
    sets = picks.roster(frame, chosen, P, np.random.default_rng(0))
    sites = [one.sites for one in sets]
    noise = sweep.run(model, pairs, site_sets=sites, ablations=("counterfactual", "mean"), pool=pairs)
    table = pd.concat([noise, sweep.run(model, pairs, site_sets=sites, direction="denoise")], ignore_index=True)
    found = neurons.harvest(model, pairs, [1, 2], reading)
    tokens = dict(zip(pairs[0].candidates, pairs[0].clean_tokens, strict=True))
    classes = neurons.of_classes(model, found, [1, 2], reading, tokens, 0)
    which, cards = list(chosen[picks.NEURON].itertuples(index=False, name=None)), chosen.head(P.cards)
    people = [
        {"pair_id": p.pair_id} | {f"{s}_{x}": f"{s}{x}" for s in ("clean", "corrupt") for x in "ab"} for p in pairs
    ]
    activations = neurons_page.named_prompts(neurons.of_prompts(found, which), pd.DataFrame(people))
    words = neurons_page.card_table(activations, neurons.of_tokens(model, found, reading, which), cards)
    assert words.index.tolist() == cards["site"].tolist() and words["highest"].str.contains("cleana, cleanb").any()
    raw, written = neurons.of_prompts(found, which), neurons.of_tokens(model, found, reading, which)
    nothing = pd.DataFrame()
    features = (nothing, nothing, [], nothing, nothing)
    made = Measured(frame.reset_index(drop=True), chosen, sets, table, classes, raw, written, *features)
    step = SimpleNamespace(params=P, pairs=lambda: pd.DataFrame(people), find=lambda name: None)
    part = neurons_page.part(step, made)
    text = " ".join(part["sentences"])
    assert "nan" not in text.lower() and "None" not in text and "was not tested (no interval" in text
    assert part["neurons"]["top"][0]["site"] == chosen["site"][0] and set(part["figures"]) <= {"top", "joint"}
    asked = f"Those asked were picked, {len(chosen)} of {len(frame[picks.NEURON].drop_duplicates())}, on "
    carried = neurons_page.shares(replaced(SETS, COST), SETS, P)
    monkeypatch.setattr(neurons_page, "shares", lambda *_: carried)
    assert asked in neurons_page.part(step, made)["headline"][0] and asked not in text  # there are shares to carry
    spans = neurons_page.by_class(activations, cards, P)
    panels = neurons_page.cards_figure(spans).axes
    assert [axes.get_title(loc="left") for axes in panels if axes.get_visible()] == cards["site"].tolist()
    assert len(neurons_page.direct_figure(frame, chosen).axes) == 1
    assert len(neurons_page.concentration(frame).axes) == 1


def test_neurons_that_do_nothing_end_the_page_in_a_sentence():
    empty = pd.DataFrame()
    measured = Measured(empty, empty, [], *[empty] * 6, [], *[empty] * 2)
    written = []
    params = SimpleNamespace(floor=0.001, task="superset", model="m")
    step = SimpleNamespace(params=params, record={}, write_findings=lambda found: written.append(found) or found)
    with pytest.raises(SystemExit):
        page.findings(step, measured)
    assert written[0]["able"] is False and "moves logit_diff by more than the model" in written[0]["sentences"][0]
