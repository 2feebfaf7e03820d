"""How stable the slice is and whether sites add up: by hand, and against a bootstrap written out."""

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from professions import TEMPLATES
from test_steps_02_to_04 import place_of, record

from lib import effects
from lib.hooks import Site
from pipeline import keys, params
from pipeline.assumed import pair_of
from pipeline.step import Ability, Step
from report import words
from steps.registry import PLAN
from steps.sufficiency import measure, page, stability, stability_page

SITES = ["0.0", "0.1", "mlp 0", "1.0", "1.1"]
PARAMS = measure.Sufficiency(
    model="m", level=0.9, resamples=200, seed=7, coupled_sites=3, order_templates="both_famous"
)
DRAWN = np.random.default_rng(3)
# effects of each quad (24) and site, clearly apart only at the first
EFFECTS = DRAWN.normal(0, 1, (24, 5))
EFFECTS += [2.0, 1.0, 0.9, 0.8, 0.2] - EFFECTS.mean(0)
COUPLES = {("0.0", "0.1"): -0.5, ("0.0", "mlp 0"): 0.0, ("0.1", "mlp 0"): 0.25}


def alone(values: np.ndarray, half: str, **more: object) -> list[dict]:
    """Records of the sites alone, a pair for each quad, gaps of 10."""
    return [
        record(value, 10.0, f"{half}{quad:02d}", half=half, **place_of(site)._asdict(), **more)
        for quad, row in enumerate(values)
        for site, value in zip(SITES, row, strict=True)
    ]


def together(values: np.ndarray, half: str, less: float = 0.1) -> list[dict]:
    """Records of the first site, the first two, ...: each further one adds its own effect less `less`."""
    joint = values.cumsum(axis=1) - less * np.arange(len(SITES))
    return [
        record(value, 10.0, f"{half}{quad:02d}", half=half, direction=direction, site_set=place)
        for direction in ("denoise", "noise")
        for quad, row in enumerate(joint)
        for place, value in enumerate(row)
    ]


def measured(quads: int = 24, **changed: object) -> measure.Measured:
    """What step 04 has measured: the confirmation half is the discovery half turned by one quad, its sites shifted."""
    first, second = EFFECTS[:quads], EFFECTS[:quads][:, [0, 1, 2, 4, 3]]
    frame = pd.DataFrame(alone(first, "discovery") + alone(second, "confirmation"))
    joint = pd.DataFrame(together(first, "discovery") + together(second, "confirmation"))
    sites, curves = effects.both_halves(frame, PARAMS), measure.slice_curves(joint, PARAMS)
    twos = [
        record(second[quad, [*map(SITES.index, two)]].sum() + extra, 10.0, f"confirmation{quad:02d}", site_set=place)
        for place, (two, extra) in enumerate(COUPLES.items())
        for quad in range(quads)
    ]
    order, critical = measure.slice_order(sites, 24), effects.CriticalSlice(3, 0.4, 0.4, True)
    made = measure.Measured(frame, sites, order, joint, curves, critical, couples=pd.DataFrame(twos))
    return made._replace(**changed)


def test_inclusion_and_ranks_equal_the_bootstrap_written_out():
    m = measured()
    assert m.order["site"].tolist() == SITES, "the drawn values are in this order"
    found = stability_page.stability(m, PARAMS)
    rng, places = np.random.default_rng(7), []
    for indices in rng.integers(24, size=(200, 24)):
        order = np.argsort(-EFFECTS[indices].sum(0) / (10.0 * 24), kind="stable")
        places.append([list(order).index(site) + 1 for site in range(5)])
    places = np.array(places)
    assert found.sites["included"].tolist() == pytest.approx((places <= 3).mean(0).tolist())
    low, high = np.quantile(places, [0.05, 0.95], axis=0, method="nearest")
    assert found.sites["rank_low"].tolist() == low.tolist() and found.sites["rank_high"].tolist() == high.tolist()
    assert found.same == pytest.approx((np.sort(places[:, :3], axis=1) == [1, 2, 3]).all(1).mean())
    assert found.kept == pytest.approx((places[:, :3] <= 3).sum(1).mean())
    assert found.sites["included"][0] == 1 and 0.02 < found.sites["included"][3] < 0.6, "else nothing is tested"


def test_the_critical_size_is_drawn_again_along_the_measured_order():
    m = measured()
    params = PARAMS.model_copy(update={"slice_share": 0.35})
    joint = EFFECTS.cumsum(axis=1) - 0.1 * np.arange(5)
    sizes = []
    for indices in np.random.default_rng(7).integers(24, size=(200, 24)):
        reached = np.flatnonzero(joint[indices].sum(0) / 240 >= 0.35)
        sizes.append(reached[0] + 1 if len(reached) else 6)
    wanted = np.quantile(sizes, [0.05, 0.95], method="nearest")
    assert stability_page.stability(m, params).sizes == tuple(wanted) and wanted[0] < wanted[1]
    assert stability_page.reach((2, 5), 5) == "at 2 to 5 sites"
    assert stability_page.reach((2, 6), 5) == "at 2 to more than 5 sites"
    assert stability_page.reach((6, 6), 5) == "not within the 5 sites measured"
    never = stability_page.findings(m, PARAMS.model_copy(update={"slice_share": 0.99}))["sentences"][0]
    assert "the share that the profile asks for not within the 5 sites measured in the middle 90% of draws" in never


def test_without_a_slice_the_page_says_so_and_so_do_those_that_are_about_it(tmp_path, monkeypatch):
    frame = pd.DataFrame(alone(-np.abs(EFFECTS), "discovery") + alone(-np.abs(EFFECTS), "confirmation"))
    step = SimpleNamespace(params=PARAMS, table=lambda *_: frame, record={}, name="sufficiency", results=tmp_path)
    step.write_findings = written = Mock(side_effect=dict)
    m = measure.run(step)
    assert m.order.empty and m.critical is None
    with pytest.raises(SystemExit, match="0"):
        page.findings(step, m)
    (found,) = written.call_args.args
    assert found["critical_slice"] == [] and found["able"] is True
    assert found["sentences"][0].startswith(
        "There is no critical slice: no head or MLP alone, its clean value put into"
    )
    for section, keys_, able in (
        ("hydra", {}, False),
        ("hydra", {"slice_sites": "mlp 2"}, True),
        ("necessity", {}, True),
    ):
        later = Step(PLAN, section, params.validate(PLAN.sections, section, params.load_profile("smoke") | keys_))
        monkeypatch.setattr(Step, "find", lambda *_: found)
        monkeypatch.setattr(keys, "ability", lambda _: {"able": True, "why": "it does"})
        assert later.able().able is able
    monkeypatch.setattr(Step, "able", lambda _: Ability(False, found["why"]))
    assert words.not_done(later)["sentences"][0].startswith("Nothing was computed for the task `superset`: there is no")


def test_other_orders_are_those_of_the_other_half_and_of_templates_with_a_gap():
    turned = pd.DataFrame(alone(EFFECTS[:, ::-1], "discovery", template="other"))
    wrong = pd.DataFrame(alone(EFFECTS, "discovery", template="none")).assign(logit_diff_clean=0.0)
    some = turned.assign(logit_diff_clean=np.where(turned["quad_id"] == "discovery00", 0.0, turned["logit_diff_clean"]))
    found = stability_page.stability(measured(others=pd.concat([some, wrong])), PARAMS)
    half, template = found.others
    assert (half.name, half.ranks, half.shared, half.quads) == ("confirmation half", [1, 2, 3, 5, 4], 3, 24)
    order = np.argsort(-EFFECTS[1:, ::-1].sum(0))
    assert (template.name, template.quads) == ("other", 23)
    assert template.ranks == [list(order).index(site) + 1 for site in range(5)] and template.shared == 1


def test_too_few_quads_say_so():
    m = measured(quads=19)
    found = stability_page.stability(m, PARAMS)
    assert np.isnan(found.same) and found.sites["included"].isna().all()
    said = stability_page.findings(m, PARAMS)
    assert "too few quads to test whether there is an edge" in said["curve"]
    assert said["sentences"][0].startswith("There are too few discovery quads (19)")
    assert "too few quads allow to say more" in said["sentences"][1] and "too few quads (19)" in said["sentences"][2]
    assert stability_page.table(m, PARAMS)["rank in bootstraps"].tolist() == ["too few quads"] * 5
    assert set(stability_page.interactions_table(m, PARAMS)["significant"]) == {"too few quads"}


def test_joint_recovery_stands_beside_the_sum_of_single_ones():
    sums = stability_page.additivity(measured(), PARAMS).set_index(["quantity", "n_sites"])["estimate"]
    second = EFFECTS[:, [0, 1, 2, 4, 3]].mean(0)  # what the sites do on the confirmation half
    for n in range(1, 6):
        joint = second[:n].sum() - 0.1 * (n - 1)
        assert sums["joint recovery", n] == pytest.approx(joint / 10)
        assert sums["sum of single recoveries", n] == pytest.approx(second[:n].sum() / 10)
        assert sums["joint less sum", n] == pytest.approx(-0.01 * (n - 1))
        assert sums["still to come", n] == pytest.approx((second.sum() - 0.4 - joint) / 10)
    said = stability_page.findings(measured(), PARAMS)["sentences"][1]
    assert "leading sites are sub-additive" in said and "one by one, that is -0.02 [-0.02, -0.02]." in said
    more = measured(joint=pd.DataFrame(together(EFFECTS[:, [0, 1, 2, 4, 3]], "confirmation", less=-0.1)))
    by = {name: rows.set_index("n_sites") for name, rows in stability_page.additivity(more, PARAMS).groupby("quantity")}
    assert "super-additive" in stability_page.additivity_sentence(more, by, PARAMS)


def test_a_curve_that_rises_beyond_the_slice_has_no_edge_there():
    m = measured()
    assert "But there is no edge at 3" in stability_page.findings(m, PARAMS)["curve"]
    flat = m.joint.assign(logit_diff_after=m.joint["logit_diff_after"].where(m.joint["site_set"] < 3, 5.0))
    last = flat[flat["site_set"] == 2].set_index(["quad_id", "direction"])["logit_diff_after"]
    keys = pd.MultiIndex.from_frame(flat[["quad_id", "direction"]])
    flat["logit_diff_after"] = np.where(flat["site_set"] >= 2, last.reindex(keys), flat["logit_diff_after"])
    assert (
        "That the curve goes on rising is not shown" in stability_page.findings(m._replace(joint=flat), PARAMS)["curve"]
    )
    whole = m._replace(critical=m.critical._replace(size=5))
    assert "No more were measured" in stability_page.findings(whole, PARAMS)["curve"]


def test_interactions_are_what_two_do_beyond_each_alone():
    found = stability_page.interactions(measured(), PARAMS)
    assert list(zip(found["site"], found["other"], strict=True)) == list(COUPLES)
    assert found["estimate"].tolist() == pytest.approx(list(COUPLES.values()))
    assert found["sure"].tolist() == [True, False, True]
    said = stability_page.interactions_sentence(found)
    assert "2 of the 3 twos among them interact significantly" in said
    assert "1 of the 2 recover less together than one by one" in said
    assert "that of head 0.0 with head 0.1, is -0.500 [-0.500, -0.500] logits" in said
    assert stability_page.interactions(measured(couples=None), PARAMS) is None
    shown = stability_page.interactions_table(measured(), PARAMS)
    assert sorted(shown["significant"]) == ["no", "yes", "yes"]


def test_units_of_the_tables():
    template = TEMPLATES["profession_both"]
    pairs = [pair_of(template, quad, 0, half, [3, 3]) for half in ("discovery", "confirmation") for quad in range(3)]
    step = SimpleNamespace(params=PARAMS.model_copy(update={"template": "profession_both"}), prompts=lambda: pairs)
    step.layers = [0, 1]
    sets = stability.couples([Site(0, "head", 0), Site(0, "head", 1), Site(0, "mlp"), Site(1, "mlp")], 3)
    assert len(sets) == 3 and Site(1, "mlp") not in {site for two in sets for site in two}
    units = stability.couple_units(step, sets)
    assert {pair.half for unit in units for pair in unit.pairs} == {"confirmation"}
    elsewhere = stability.assumed_in_templates(step)
    assert {pair.template for pair in elsewhere} == {"both_famous"} and len(elsewhere) == 3
    assert {pair.half for pair in elsewhere} == {"discovery"}
    (unit,) = stability.other_units(step, elsewhere)
    assert unit.options["components"] == ["head", "mlp"] and unit.options["direction"] == "denoise"
    step.params = step.params.model_copy(update={"template": "both_famous"})
    assert stability.assumed_in_templates(step) == [], "the profile's own template is no other"
    step.params = step.params.model_copy(update={"task": "odd_one_out", "template": "odd_one_out"})
    assert stability.other_templates(step.params) == [], "three names fit into no template of two"
