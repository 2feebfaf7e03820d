"""The dense grid: mirrors, circuits picked on part of the pairs; the prompts of controls and of the rule."""

from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from professions import SUPERSETS, TEMPLATES

from lib import batches, hooks, records, sweep, tasks
from lib.hooks import Site
from pipeline import params, population, units
from pipeline import step as steps
from pipeline.params import ROOT
from pipeline.step import single_sites
from pipeline.units import Unit
from steps.generality import class_circuits, controls, grid, measure, name_rule_prompts, placebo
from steps.generality.class_circuits import Circuit
from steps.registry import PLAN
from tests.test_sweep import PAIRS, plain

# --- mirrors


def turned(pair):
    """The pair with its sides exchanged."""
    return replace(
        pair, pair_id=f"{pair.pair_id}'", clean=pair.corrupt, corrupt=pair.clean, answer=pair.corrupt_answer,
        corrupt_answer=pair.answer,
    )  # fmt: skip


def test_the_noise_run_of_a_pair_is_the_denoise_run_of_its_mirror(tiny):
    """The identity that halves the grid's cost, on every kind of site and on a set of them."""
    model, pairs = tiny("llama"), [pair for own in PAIRS[:3] for pair in (own, turned(own))]
    options = {"site_sets": [[Site(0, "head", 1)], [Site(1, "mlp")], [Site(1, "head", 0), Site(2, "mlp")]]}
    noise = sweep.run(model, pairs, direction="noise", **options)
    denoise = sweep.run(model, pairs, direction="denoise", **options)
    both = grid.with_mirrors(noise, grid.mirrors(pairs))
    read = both[both["direction"] == "denoise"]
    key = ["pair_id", "site_set"]
    joined = denoise.merge(read, on=key, suffixes=("", "_read"))
    assert len(joined) == len(denoise) == 3 * 6
    for column in grid.LOGIT_DIFFS:
        assert joined[column].to_numpy() == pytest.approx(joined[f"{column}_read"].to_numpy(), abs=1e-9)
    assert np.ptp(joined["logit_diff_after"]) > 0.1  # the runs differ, so the comparison says something


def test_a_mirror_has_the_same_prompts_and_answers_the_other_way_round():
    one, other = PAIRS[0], PAIRS[1]
    mirror = turned(one)
    assert grid.mirrors([one, mirror, other]) == {one.pair_id: mirror.pair_id, mirror.pair_id: one.pair_id}
    assert grid.mirrors([one, replace(mirror, template="another")]) == {}
    assert grid.mirrors([one, replace(mirror, answer=one.answer)]) == {}


# --- the pairs of the grid


def made_quads(number: int = 4) -> pd.DataFrame:
    people = {slot: [f"{slot.upper()} Person{index}" for index in range(number)] for slot in "abcd"}
    rows = {"quad_id": [f"q{index}" for index in range(number)], "half": "confirmation", "task": "superset"}
    rows |= {"template": "profession_both", "superset": "artist", "other": "writer", "bucket": "b"} | people
    for index, slot in enumerate("abcd"):
        rows |= {f"profession_{slot}": "painter" if slot in "ab" else "poet", f"fame_{slot}": -0.1 - 0.1 * index}
    return pd.DataFrame(rows).assign(n_tokens_a=2, n_tokens_b=2)


def test_candidates_are_mirror_after_mirror_and_take_turns_with_the_order(tmp_path):
    quads = made_quads()
    discovery = quads.assign(half="discovery", quad_id=[f"x{i}" for i in range(4)])
    own = stored_step(tmp_path, population.pairs_of(quads, 2), pd.concat([quads, discovery]))
    pairs = grid.candidates(own)
    assert set(pairs["quad_id"]) == set(quads["quad_id"]) and len(pairs) == 16
    for quad, rows in pairs.groupby("quad_id"):
        first, second, third, fourth = rows.itertuples()
        for one, mirror in ((first, second), (third, fourth)):
            assert (one.clean_a, one.clean_b) == (mirror.corrupt_a, mirror.corrupt_b)
            assert (one.answer, one.corrupt_answer) == (mirror.corrupt_answer, mirror.answer)
            assert one.order == mirror.order
        assert first.order == ("better known first" if quad in ("q0", "q2") else "better known second")


def stored_step(folder, pairs: pd.DataFrame, quads: pd.DataFrame | None = None, **changes) -> steps.Step:
    """Step 07 of the smoke profile on results that hold these pairs."""
    given = params.load_profile("smoke") | {"results_dir": str(folder), "memory": 1.0} | changes
    own = steps.Step(PLAN, "generality", params.validate(PLAN.sections, "generality", given))
    about = {"ingredients": {"parameters": own.params.model_dump(mode="json")}}
    units.write_json(folder / "baselines.run.json", about)
    records.write(folder / "pairs.parquet", pairs, {}, schema=None)
    if quads is not None:
        records.write(folder / "baselines.quads.parquet", quads, {}, schema=None)
    return own


# --- circuits


def single_records(effects: dict[tuple[str, str], dict[int, float]]) -> pd.DataFrame:
    """Denoise records of single heads of layer 0: for (answer, corrupt answer), head -> recovery; a quad each."""
    rows = []
    for number, ((answer, other), heads) in zip(count(), effects.items()):
        for head, recovery in heads.items():
            rows.append(
                {"layer": 0, "component": "head", "head": head, "pair_id": f"p{number}", "quad_id": f"q{number}"}
                | {"direction": "denoise", "answer": answer, "corrupt_answer": other}
                | {"logit_diff_before": -1.0, "logit_diff_after": -1.0 + 2 * recovery, "metric_before": 0.0}
                | {"logit_diff_clean": 1.0, "logit_diff_corrupt": -1.0, "metric_after": 0.0}
            )
    return pd.DataFrame(rows)


def test_an_order_without_a_superset_never_sees_it_and_one_by_it_sees_nothing_else():
    frame = single_records(
        {
            ("artist", "writer"): {0: 0.9, 1: 0.1, 2: 0.2},
            ("writer", "artist"): {0: 0.1, 1: 0.9, 2: 0.2},
            ("athlete", "writer"): {0: 0.1, 1: 0.2, 2: 0.5},
        }
    )
    found = {(own.kind, own.superset): own for own in class_circuits.orders(frame, 2, SUPERSETS)}
    heads = {key: [site.head for site in own.order] for key, own in found.items()}
    assert heads["without", "artist"] == [2, 1] and found["without", "artist"].pairs == ("p2",)
    assert heads["only", "artist"] == [0, 2] and found["only", "artist"].pairs == ("p0",)
    assert heads["only", "writer"] == [1, 2]
    assert heads["without", "writer"] == [] and found["without", "writer"].sites == ()  # every pair has a writer


def test_a_circuit_is_cut_where_both_quantities_reach_the_share():
    sites = tuple(Site(0, "head", head) for head in range(3))
    other = Circuit("without", "writer", ("p1",), sites[1:])
    circuit = Circuit("only", "artist", ("p0",), sites)
    number = class_circuits.numbered_sets([other, circuit])
    assert sorted(number.values()) == list(range(5))  # (1), (1, 2), (0), (0, 1), (0, 1, 2)
    assert number[frozenset(sites[:1])] == 2
    rows = []
    for direction, effects in (("denoise", (0.5, 0.9, 0.95)), ("noise", (0.3, 0.6, 0.85))):
        for own, effect in zip(circuit.growing, effects, strict=True):
            sign = 1 if direction == "denoise" else -1
            rows.append(
                {"pair_id": "p0", "quad_id": "q0", "direction": direction, "site_set": number[own]}
                | {"logit_diff_before": 0.0, "logit_diff_after": sign * 2 * effect, "metric_before": 0.0}
                | {"logit_diff_clean": 1.0, "logit_diff_corrupt": -1.0, "metric_after": 0.0}
            )
    grown = pd.DataFrame(rows)

    def picked(frame: pd.DataFrame, share: float) -> Circuit:
        untested, own = class_circuits.cut([other, circuit], frame, share)
        assert untested.sites == ()  # nothing was measured for it
        return own

    assert picked(grown, 0.8).sites == sites and picked(grown, 0.8).reached  # damage reaches 0.8 with the third only
    assert picked(grown, 0.55).sites == sites[:2]
    assert picked(grown, 0.99).sites == sites and not picked(grown, 0.99).reached
    assert picked(grown.assign(logit_diff_corrupt=1.0), 0.8).sites == ()  # nothing to recover


def test_sets_of_a_unit_keep_their_place_in_the_whole_list():
    def sweep_(unit: Unit) -> pd.DataFrame:
        assert set(unit.options) == {"site_sets"}  # the sweep takes no other
        frame = pd.DataFrame({"site_set": [0, 1, 0, 1]})
        frame.attrs["log"] = ["kept"]
        return frame

    compute = class_circuits.grown(SimpleNamespace(sweeper=lambda pairs: sweep_), [], [])
    frame = compute(Unit("u", (), {"site_sets": ["a", "b"], "numbers": (3, 8)}))
    assert frame["site_set"].tolist() == [3, 8, 3, 8] and frame.attrs["log"] == ["kept"]


# --- controls


def test_control_names_are_two_words_of_nobody_known():
    names = pd.read_csv(ROOT / "data" / "controls.csv", dtype=str)
    assert list(names) == ["kind", "name"] and not names["name"].duplicated().any()
    assert names["name"].str.fullmatch(r"[A-Z][a-z]+ [A-Z][a-z]+").all()
    assert (names["kind"].value_counts()[["invented", "thing"]] >= 150).all()
    people = population.load_people(ROOT / "data" / "people.csv")
    surnames = set(people["name"].str.split().str[-1])
    invented = names[names["kind"] == "invented"]["name"]
    assert not set(invented.str.split().str[-1]) & surnames and not set(names["name"]) & set(people["name"])


def test_matched_names_fit_a_shape_share_a_key_and_are_used_once():
    counts = [(2, 2)] * 5 + [(3, 3)] * 6 + [(4, 4)]
    names = pd.DataFrame(
        {"name": [f"n{i}" for i in range(12)], "n_tokens": counts, "key": list("aabbb" + "xxyyyz" + "a")}
    )
    drawn = list(controls.matched(names, [(2, 2), (3, 3), (4, 4)], 10))
    used = [name for one, other, *_ in drawn for name in (one, other)]
    assert len(drawn) == 4 and len(set(used)) == 8  # aa, bb of two tokens; xx, yy of three; nothing fits (4, 4)
    known = names.set_index("name")
    for one, other, key, shape in drawn:
        assert known.loc[one, "n_tokens"] == known.loc[other, "n_tokens"] == shape
        assert known.loc[one, "key"] == known.loc[other, "key"] == key
    assert len(list(controls.matched(names, [(2, 2), (3, 3)], 3))) == 3


def test_random_heads_are_of_the_same_layers_in_the_same_number_and_outside_the_slice():
    sites = [Site(1, "head", 0), Site(1, "head", 3), Site(2, "head", 1), Site(2, "mlp")]
    own = drawing(7)
    sets = controls.named_sets(own, sites)
    assert sets[:2] == [("slice", sites), ("heads", sites[:3])] and len(sets) == 9
    for name, drawn in sets[2:]:
        assert name == "random"
        assert [site.layer for site in drawn] == [1, 1, 2] and not set(drawn) & set(sites)
    assert controls.named_sets(own, [Site(2, "mlp")]) == [("slice", [Site(2, "mlp")])]


def drawing(count):
    """A step that draws `count` random sets in a model of 6 layers with 4 heads."""
    params = SimpleNamespace(random_sets=count)
    return SimpleNamespace(rng=lambda _: np.random.default_rng(0), params=params, n_heads=4, n_layers=6)


def test_random_sets_are_of_the_kinds_of_the_slice():
    head, mlp, step = Site(1, "head", 0), Site(2, "mlp"), drawing(20)
    heads, mlps = controls.random_sets(step, [head]), controls.random_sets(step, [mlp])
    both = controls.random_sets(step, [head, mlp])
    assert (list(heads), list(mlps)) == (["random heads"], ["random MLPs"])
    assert {site for own in mlps["random MLPs"] for site in own} == {Site(layer, "mlp") for layer in (3, 4, 5)}
    assert list(both) == ["random heads", "random heads and MLPs"] and both["random heads"] == heads["random heads"]
    assert [own[:1] for own in both["random heads and MLPs"]] == heads["random heads"]
    assert [own[1:] for own in both["random heads and MLPs"]] == mlps["random MLPs"]
    late = controls.random_sets(step, [Site(4, "mlp"), Site(5, "mlp")])["random MLPs"]
    assert {site.layer for own in late for site in own} == {1, 2, 3}, "where no later ones are left: the nearest before"
    assert len(set(late)) > 1 and all(len(own) == 2 for own in late)
    assert controls.random_sets(step, [Site(layer, "mlp") for layer in (1, 3, 5)]) == {}, "of three, one set alone"
    assert controls.random_sets(step, [Site(layer, "mlp") for layer in range(6)]) == {}


def test_evidence_is_nothing_on_average_for_people_outside_the_class():
    rng = np.random.default_rng(0)
    own = list(SUPERSETS) * 20
    logits = rng.normal(size=(100, 5)) + 3 * (np.array(own)[:, None] == np.array(SUPERSETS)) + np.arange(5)
    found = name_rule_prompts.evidence(logits, own, SUPERSETS)
    outside = np.array(own)[:, None] != np.array(SUPERSETS)
    assert (found * outside).sum(0) / outside.sum(0) == pytest.approx(np.zeros(5), abs=1e-12)
    assert found[~outside].mean() == pytest.approx(3, abs=0.4)  # the classes' own levels (0 to 4) are gone


# --- the real model, on a handful of a user's own pairs


@pytest.fixture(scope="module")
def own_pairs(tmp_path_factory, smollm, smollm_tokenizer):
    """A step on twelve pairs of people of one token count, each a cluster of its own, and its grid."""
    folder = tmp_path_factory.mktemp("generality")
    people = population.unambiguous(population.load_people(ROOT / "data" / "people.csv"))
    people = people.groupby("superset").head(120)
    counted = population.add_tokens(people, smollm_tokenizer, TEMPLATES["profession_both"])
    fitting = counted[counted["n_tokens"] == (3, 3)]
    artists, scientists = (fitting[fitting["superset"] == name]["name"].tolist() for name in ("artist", "scientist"))
    rows = [
        {"clean_a": a, "clean_b": b, "corrupt_a": c, "corrupt_b": d, "answer": "artist", "corrupt_answer": "scientist"}
        for a, b, c, d in zip(artists[0:24:2], artists[1:24:2], scientists[0:24:2], scientists[1:24:2], strict=True)
    ]
    path = folder / "pairs.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    given = params.load_profile("smoke") | {"results_dir": str(folder), "pairs_file": str(path), "memory": 1.0}
    step = steps.Step(PLAN, "generality", params.validate(PLAN.sections, "generality", given))
    step.__dict__["model"] = smollm
    table = step.table(measure.GRID)
    return step, table, step.metadata(measure.GRID)["templates"]


def test_own_pairs_are_taken_as_they_are_and_those_with_a_gap_in_other_templates(own_pairs):
    step, table, counts = own_pairs
    own, other = counts
    assert own["left"] == own["possible"] == own["aligned"] and own["template"] == "profession_both"
    assert (
        other["template"] == "both_famous" and other["left"] <= other["asked"] <= other["aligned"] <= other["possible"]
    )
    kept = table[table["template"] == "both_famous"]
    assert ((kept["logit_diff_clean"] - kept["logit_diff_corrupt"]).groupby(kept["quad_id"]).mean() > 0).all()
    answered = (table["metric_clean"] > 0) & (table["metric_corrupt"] < 0)
    assert (table["solved"] == answered).all(), "each pair is a quad of its own here"
    assert set(table[table["template"] == "profession_both"]["clean_profession_a"]) <= {
        "actor",
        "musician",
        "singer",
        "",
    }
    single = single_sites(step)
    assert single.empty and class_circuits.orders(single, 5, SUPERSETS) == []  # step 04 has left nothing here
    assert measure.picked_circuits(step) == []


def test_only_pairs_without_a_mirror_are_run_twice(own_pairs):
    step, table, _ = own_pairs
    first, second = [prompt for prompt in step.prompts(table) if prompt.template == "profession_both"][:2]
    pairs = [first, turned(first), second]
    frame = step.table(replace(measure.JOINT, name="few"), pairs, [[Site(21, "head", 6)]])
    frame = grid.with_mirrors(frame, grid.mirrors(pairs))
    counted = frame.groupby(["pair_id", "direction"]).size()
    assert (counted == 1).all() and len(counted) == 6
    stored = records.read(step.path("few"), ["pair_id", "direction"])
    assert len(stored) == 4 and stored[stored["direction"] == "denoise"]["pair_id"].tolist() == [second.pair_id]


def test_a_control_prompt_is_ablated_by_the_mean_of_ordinary_prompts_balanced_over_supersets(own_pairs, smollm):
    step, table, _ = own_pairs
    prompts = [prompt for prompt in step.prompts(table) if prompt.template == "profession_both"]
    ordinary = controls.poolable(prompts)
    rows, pairs = controls.control_prompts(step, ordinary, table)
    assert len(rows) == len(pairs) and {"invented names", "things", "mixed"} <= set(rows["control"])
    groups = {batches.group_of(pair) for pair in ordinary}
    assert {batches.group_of(pair) for pair in pairs} <= groups
    sites = [Site(21, "head", 6), Site(23, "mlp")]
    sets = controls.named_sets(step, sites)
    changed = step.table(measure.CONTROLS, sets, ordinary, pairs[:3])
    assert [name for name, _ in sets] == ["slice", "heads", "random", "random"]
    place = [len(pairs[0].clean.ids) - 1]

    def kept(prompt):
        with hooks.capture(smollm, sites, place) as seen:
            logits = plain(smollm, prompt.ids)
        return seen, logits[list(pairs[0].clean_tokens)]

    sides = [(kept(side)[0], name) for pair in ordinary
             for side, name in ((pair.clean, "artist"), (pair.corrupt, "scientist"))]  # fmt: skip
    mean = {site: torch.stack([torch.cat([seen[site] for seen, own in sides if own == name]).mean(0, keepdim=True)
                               for name in ("artist", "scientist")]).mean(0) for site in sites}  # fmt: skip
    plain.cache_clear()
    with hooks.patch(smollm, mean, place):
        expected = smollm.model(torch.tensor([pairs[0].clean.ids])).logits[0, -1][list(pairs[0].clean_tokens)]
    own = changed[(changed["pair_id"] == pairs[0].pair_id) & (changed["number"] == 0)].set_index("ablation")
    assert own.loc["mean", "after"] == pytest.approx(expected.detach().numpy(), abs=1e-3)
    assert own.loc["mean", "before"] == pytest.approx(kept(pairs[0].clean)[1].detach().numpy(), abs=1e-3)


def test_damage_is_by_a_mean_of_both_classes_where_no_third_gives_a_resample_and_its_ceiling_is_the_last_residual(
    own_pairs, smollm
):
    step, table, _ = own_pairs
    pairs = [prompt for prompt in step.prompts(table) if prompt.template == "profession_both"][:5]
    frame, judge = measure.neutral(step, pairs, [(Site(21, "head", 6),)])
    assert judge == "mean" and set(frame["site_set"]) == {0, measure.WHOLE} and set(frame["direction"]) == {"noise"}
    last, place = Site(smollm.n_layers - 1, "resid"), [len(pairs[0].clean.ids) - 1]

    def kept(ids):
        with hooks.capture(smollm, [last], place) as seen:
            plain(smollm, ids)
        return seen[last]

    plain.cache_clear()
    sides = ([kept(getattr(pair, side).ids) for pair in pairs[1:]] for side in ("clean", "corrupt"))
    mean = torch.stack([torch.cat(own).mean(0, keepdim=True) for own in sides]).mean(0)
    plain.cache_clear()
    with hooks.patch(smollm, {last: mean}, place):
        logits = smollm.model(torch.tensor([pairs[0].clean.ids])).logits[0, -1]
    answers = [pairs[0].clean_tokens[index] for index in (pairs[0].answer, pairs[0].corrupt_answer)]
    whole = frame[(frame["pair_id"] == pairs[0].pair_id) & (frame["site_set"] == measure.WHOLE)]
    expected = (logits[answers[0]] - logits[answers[1]]).item()
    assert whole["logit_diff_after"].item() == pytest.approx(expected, abs=1e-3)
    alone = [replace(pairs[0], pair_id="x", quad_id="x")]
    assert measure.neutral(step, alone, [(Site(21, "head", 6),)]) == (None, None)  # nobody lends it anything


def test_placebo_pairs_are_asked_in_every_template_and_attributes_do_not_share_a_unit(smollm_tokenizer):
    rows = [
        {
            "pair_id": f"{kind}{n}",
            "quad_id": f"{kind}{n}",
            "half": "confirmation",
            "task": "superset",
            "attribute": kind,
            "kept": n > 0,
        }
        | dict(zip(("clean_a", "clean_b", "corrupt_a", "corrupt_b"), names, strict=True))
        | {"template": "profession_both", "answer": answer, "corrupt_answer": other}
        for n, names in enumerate([("Brad Pitt", "Bob Dylan", "Hugh Grant", "Elton John")] * 3)
        for kind, answer, other in (("region", "North America", "Europe"), ("gender", "male", "female"))
    ]
    given = params.load_profile("smoke")
    own = SimpleNamespace(
        params=params.validate(PLAN.sections, "generality", given).model_copy(update={"placebo_pairs": 2}),
        tokenizer=smollm_tokenizer,
        placebo_pairs=lambda: pd.DataFrame(rows),
        placebo=lambda: rows,
        prompts=lambda table: [tasks.make_pair(smollm_tokenizer, row) for row in table.to_dict("records")],
    )
    pairs = placebo.pairs_of(own)
    assert {pair.template for pair in pairs} == {"profession_both", "both_famous"} and len(pairs) == 2 * 2 * 2
    assert not any(pair.quad_id.endswith("0") for pair in pairs)  # those that are not kept take nobody's place
    assert all(pair.pair_id.endswith(f"@{pair.template}") and not pair.labels for pair in pairs)
    units_ = placebo.units(own, pairs, [(Site(1, "mlp"),)])
    assert len(units_) == 4 and all(len({pair.candidates for pair in unit.pairs}) == 1 for unit in units_)
    assert placebo.pairs_of(SimpleNamespace(params=own.params, placebo=list)) == []


def test_rule_rows_are_of_known_people_each_asked_once(own_pairs):
    step, _, _ = own_pairs
    rows = step.table(measure.RULE)
    prompts = rows.groupby("prompt")[["name_a", "name_b"]].first()
    names = prompts.to_numpy().ravel()
    assert len(set(names)) == len(names) and (rows.groupby("prompt").size() == 5).all()
    absent = rows[rows["n_a"] + rows["n_b"] == 0]
    assert absent.groupby("prompt")["y"].mean().to_numpy() == pytest.approx(np.zeros(len(prompts)), abs=1e-6)
    people = population.load_people(step.people_file).set_index("name")
    for slot in "ab":
        inside = rows[rows[f"n_{slot}"] == 1]
        assert (inside["superset_class"].to_numpy() == people.loc[inside[f"name_{slot}"], "superset"].to_numpy()).all()
    same = rows[(rows["n_a"] == 1) & (rows["n_b"] == 1)]
    assert len(same) == pytest.approx(len(prompts) / 2, abs=3)


def test_a_task_without_supersets_is_said_to_have_none():
    given = params.load_profile("smoke") | {"task": "odd_one_out", "template": None}
    step = steps.Step(PLAN, "generality", params.validate(PLAN.sections, "generality", given))
    assert not step.able() and "odd_one_out" in step.able().why
