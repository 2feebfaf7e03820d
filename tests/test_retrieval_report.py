"""Retrieval heads, their report and sentences: evidence counted by hand, and what follows from it."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from lib.hooks import EMBED, Site
from pipeline import params
from pipeline.params import ParameterError
from steps.registry import PLAN
from steps.retrieval_heads import measure, page, routes

P = params.validate(PLAN.sections, "retrieval_heads", {"model": "config:none.json", "resamples": 500, "flips": 500})
SLICE = [Site(21, "head", 6), Site(23, "mlp"), Site(27, "head", 1)]


def paths(effects: dict[tuple, float], quads: int = 30, spread: float = 0.1, **columns: str) -> pd.DataFrame:
    """Path records of two halves: each sender (layer, component, head) with its mean effect, normal over quads."""
    rng, rows = np.random.default_rng(0), []
    for half, number in product(("discovery", "confirmation"), range(quads)):
        for place, ((layer, sender, head), effect) in enumerate(effects.items()):
            after = 4 - effect - spread * rng.normal()
            rows.append({"layer": layer, "sender": sender, "head": head, "half": half, "quad_id": f"{half}{number}",
                         "pair_id": f"{half}{number}.0", "site_set": place, "metric_after": after - 2,
                         "logit_diff_after": after})  # fmt: skip
    fixed = {"component": "path", "direction": "noise", "ablation": "counterfactual", "position": "names"}
    fixed |= {"receivers": "slice at names", "mlps": "recomputed", "profile": "test", "task": "superset"}
    fixed |= {"template": "t", "logit_diff_before": 4.0, "logit_diff_clean": 4.0, "logit_diff_corrupt": -4.0}
    fixed |= {"metric_before": 2.0}
    return pd.DataFrame(rows).assign(**(fixed | columns))


def test_candidates_are_significant_heads_outside_the_slice_largest_first():
    effects = {(-1, "embed", -1): 2.0, (5, "mlp", -1): 1.0, (10, "head", 6): 0.5, (11, "head", 2): 0.9}
    effects |= {(12, "head", 0): 0.0, (13, "head", 1): -0.8, (21, "head", 6): 1.5}
    table = measure.senders_table(paths(effects), P)
    assert measure.candidates(table, SLICE, P) == [Site(11, "head", 2), Site(10, "head", 6)]
    assert set(table["site"]) >= {"embedding", "mlp 5", "10.6"}
    assert measure.leading(table, 2) == [EMBED, Site(21, "head", 6)]


def test_a_group_carries_the_ratio_of_sums_and_the_difference_is_per_quad():
    effects = dict.fromkeys([(0, "mlp", -1), (-1, "embed", -1), (1, "mlp", -1), (2, "head", 0)], 0.0)
    effects |= {(0, "mlp", -1): 6.4, (1, "mlp", -1): 4.0, (2, "head", 0): 1.0}
    frame = paths(effects, spread=1e-3)
    shares = page.shares(frame, P).set_index("senders")["estimate"]
    assert shares.to_dict() == pytest.approx({"everything": 0.8, "embedding": 0, "MLPs": 0.5, "heads": 0.125}, abs=1e-3)
    more = page.difference(frame, 2, 3, P)
    assert more.estimate == pytest.approx(3, abs=0.01) and more.low > 2.9


def sets_and_falls(falls: dict[tuple, float]) -> pd.DataFrame:
    frame = paths({(place, "head", 0): fall for place, (_, fall) in enumerate(falls.items())}, spread=1e-3)
    sets = [(kind, (Site(*site),)) for kind, *site in falls]
    return page.verification_table(frame, sets, P)


def test_verification_counts_flips_and_random_heads_that_do_as_much():
    falls = {("candidate", 9, "head", 1): 2.5, ("candidate", 9, "head", 2): 0.3}
    falls |= {("random", 9, "head", number): 0.1 * number for number in range(3, 9)}
    table = sets_and_falls(falls).set_index("site")
    assert table.loc["9.1", "flips"] == 1 and table.loc["9.2", "flips"] == 0  # a margin of 2 becomes -0.5, or 1.7
    assert table.loc["9.1", "estimate"] == pytest.approx(2.5, abs=0.01)
    assert table.loc["9.1", "p_random"] == pytest.approx(1 / 7)
    assert table.loc["9.2", "p_random"] == pytest.approx(7 / 7, abs=0.15)


def test_a_head_is_a_retrieval_head_only_if_it_passes_all_four_tests():
    good, blind = Site(9, "head", 1), Site(9, "head", 2)
    path = measure.senders_table(paths({tuple(good): 1.0, tuple(blind): 1.0, (9, "head", 3): 0.0}), P)
    looks = measure.senders_table(paths({tuple(good): 0.4, tuple(blind): 0.0, (9, "head", 3): 0.4}), P)
    falls = {("candidate", *good): 1.0, ("candidate", *blind): 1.0}
    falls |= {("random", 8, "head", number): 0.01 for number in range(25)}
    tests = page.four_tests([good, blind], path, path, looks, sets_and_falls(falls), P)
    assert page.passing(tests) == ["9.1"]
    assert tests.groupby("site")["passed"].sum().to_dict() == {"9.1": 4, "9.2": 3}
    found = page.verdicts({"names": tests}, SLICE, pd.Series({"low": 0.7}), stats_interval(1.0, 0.5, 1.5))
    assert found["retrieval_heads"] == {"names": ["9.1"]} and found["two_stages"] and found["mlps_at_the_names"]
    assert "9.1 at `names`" in page.verdict_sentences(found, {"names": tests})[0]


def test_one_stage_needs_slice_heads_that_read_and_a_route_that_carries():
    own = Site(21, "head", 6)
    table = measure.senders_table(paths({tuple(own): 1.0, (20, "head", 1): 0.0}), P)
    falls = {("slice", *own): 1.0} | {("random", 21, "head", number): 0.0 for number in range(8)}
    tests = {"last": page.four_tests([own], table, table, table, sets_and_falls(falls), P)}
    for low, expected in ((0.7, True), (0.3, False), (None, None)):
        found = page.verdicts(tests, SLICE, pd.Series({"low": low}), stats_interval(-1.0, -2.0, -0.5))
        assert found["one_stage"] is expected
        assert not found["two_stages"] and found["mlps_at_the_names"] is False
    assert "not decided" in page.verdict_sentences(found, tests)[1]


def stats_interval(estimate: float, low: float | None, high: float | None):
    from lib.stats import Interval

    return Interval(estimate, low, high, 0.95, 30, "test")


def test_few_quads_give_estimates_without_intervals_and_nothing_is_decided():
    effects = dict.fromkeys([(0, "mlp", -1), (-1, "embed", -1), (1, "mlp", -1), (2, "head", 0)], 1.0)
    frame = paths(effects, quads=3)
    table = measure.senders_table(frame, P)
    assert table["low"].isna().all() and table["estimate"].notna().all()
    more = page.difference(frame, 2, 3, P)
    found = page.verdicts({}, SLICE, page.shares(frame, P).iloc[0], more)
    assert found["one_stage"] is None and found["mlps_at_the_names"] is None
    assert "not decided" in page.verdict_sentences(found, {})[2]
    assert page.one_table({}).empty


def test_attention_beyond_an_even_spread_adds_up_over_the_names():
    rows = [
        {"pair_id": f"{half}{number}", "quad_id": f"{half}{number}", "half": half, "layer": 3, "head": head,
         "position": "last", "onto": name, "share": share, "uniform": 0.1}
        for half, number in product(("discovery", "confirmation"), range(25))
        for head, name, share in ((0, "name_a", 0.5), (0, "name_b", 0.3), (1, "name_a", 0.1), (1, "name_b", 0.1))
    ]  # fmt: skip
    table = page.attention_table(pd.DataFrame(rows), "last", P)
    own = table[table["half"] == "confirmation"].set_index("head")
    assert own["estimate"].to_dict() == pytest.approx({0: 0.6, 1: 0.0}) and own["share"][0] == pytest.approx(0.8)


def test_random_sets_match_the_layers_and_leave_out_the_heads_and_the_slice():
    heads = [Site(21, "head", 0), Site(21, "head", 1), Site(5, "head", 2)]
    sets = routes.random_sets(heads, SLICE, 9, 20, np.random.default_rng(0))
    assert len(sets) > 10
    for own in sets:
        assert sorted(site.layer for site in own) == [5, 21, 21] and len(set(own)) == 3
        assert not {*own} & {*heads, *SLICE}


def test_the_sets_that_are_ablated_name_their_kind():
    sets = routes.ablation_sets([Site(9, "head", 1)], SLICE, "last", 9, 5, np.random.default_rng(0))
    kinds = [kind for kind, _ in sets]
    assert kinds[:2] == ["together", "candidate"] and set(kinds[2:]) == {"slice", "random", "random together"}
    assert page.inside(sets) == [Site(21, "head", 6)]  # 27.1 is in the slice's last layer: nothing of it comes after
    assert not page.inside(routes.ablation_sets([], SLICE, "names", 9, 5, np.random.default_rng(0)))


def test_one_name_rows_are_each_two_people_once():
    row = {"quad_id": "q0", "half": "discovery", "answer": "artist", "corrupt_answer": "writer"}
    table = pd.DataFrame([
        row | {"pair_id": "q0.0", "clean_a": "A", "clean_b": "B", "corrupt_a": "C", "corrupt_b": "D"},
        row | {"pair_id": "q0.1", "clean_a": "D", "clean_b": "C", "corrupt_a": "B", "corrupt_b": "A",
               "answer": "writer", "corrupt_answer": "artist"},
    ])  # fmt: skip
    out = routes.one_name_rows(table)
    assert out[["pair_id", "clean_a", "corrupt_a"]].to_numpy().tolist() == [["q0.0a", "A", "C"], ["q0.0b", "B", "D"]]


def test_a_slice_without_heads_is_told_what_is_asked():
    with pytest.raises(ParameterError, match="no heads.*slice_sites"):
        routes.groups([Site(23, "mlp")], 9)


def test_the_edges_lead_from_the_names_through_the_slice_to_the_answer():
    units = routes.edge_units([], [EMBED, Site(5, "mlp")], SLICE, "recomputed")
    assert units == []  # no pairs, no work
    frame = paths({(5, "mlp", -1): 1.0, (-1, "embed", -1): 0.0}, receivers="21.6")
    edges = page.edges_table(frame, P).set_index("source")
    assert edges["significant"].to_dict() == {"mlp 5 at names": True, "names": False}
    assert set(edges["target"]) == {"21.6"}


def test_the_leading_senders_are_said_with_what_is_significant():
    sites = {"embedding": "embed", "10.6": "head", "mlp 0": "mlp", "10.8": "head"}
    about = pd.DataFrame({"site": sites.keys(), "component": sites.values(), "estimate": [3.0, 0.5, 2.0, -0.5]})
    about = about.assign(p=[0.01, 0.01, 0.4, 0.01], low=np.nan, high=np.nan)
    table = pd.concat([about.assign(half=half) for half in ("discovery", "confirmation")], ignore_index=True)
    said = page.senders_sentence(table, "names", P, 2)
    assert said == (
        "At `names`, the senders of largest path effect into the slice are embedding (3.00) and mlp 0 (2.00) (logits; "
        "fewer than 20 quads: no intervals); significant in both halves are the embedding, 1 heads and 0 MLPs, of 4 "
        "senders."
    )
    writes, heard = {"names": table, "last": table.assign(p=1.0)}, dict.fromkeys(("names", "last"), {*sites})
    said = page.write_sentence(writes, heard, [Site(10, "head", 6)], P)
    assert "by at `names` 2 of 4 heads and MLPs, most of all embedding (3.00) and 10.6 (0.50) (logits; fewer" in said
    assert said.endswith("of the slice 10.6; at `last` 0 of 4 heads and MLPs.")
