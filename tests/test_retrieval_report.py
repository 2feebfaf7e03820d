"""Retrieval heads, their report and sentences: evidence counted by hand, and what follows from it."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lib.data import HALVES
from lib.hooks import EMBED, Site, site_name
from lib.stats import Interval
from pipeline import params
from steps.registry import PLAN
from steps.retrieval_heads import hops_page, measure, page, routes

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
    wide = table.assign(low=np.where(table["site"] == "11.2", -0.1, table["low"]))
    assert measure.candidates(wide, SLICE, P) == [Site(10, "head", 6)], "the interval holds zero"
    assert measure.leading(table, 2) == [EMBED, Site(21, "head", 6)]


def test_a_group_carries_the_ratio_of_sums_and_the_difference_is_per_quad():
    effects = dict.fromkeys([(0, "mlp", -1), (-1, "embed", -1), (1, "mlp", -1), (2, "head", 0)], 0.0)
    effects |= {(0, "mlp", -1): 6.4, (1, "mlp", -1): 4.0, (2, "head", 0): 1.0}
    frame = paths(effects, spread=1e-3)
    shares = page.shares(frame, P).set_index("senders")["estimate"]
    assert shares.to_dict() == pytest.approx({"everything": 0.8, "embedding": 0, "MLPs": 0.5, "heads": 0.125}, abs=1e-3)
    parts = page.written(frame, "slice at names", P).set_index("senders")  # of what everything carries, 6.4 logits
    assert parts["estimate"].to_dict() == pytest.approx(
        {"everything": 1, "embedding": 0, "MLPs": 0.625, "heads": 0.15625}, abs=1e-3
    )
    assert parts.loc["MLPs", "low"] <= parts.loc["MLPs", "estimate"] <= parts.loc["MLPs", "high"]
    assert page.written(paths(dict.fromkeys(effects, 0.0)), "slice at names", P).empty  # nothing to be a share of
    more = page.difference(frame, 2, 3, P)
    assert more.estimate == pytest.approx(3, abs=0.01) and more.low > 2.9


def measured(**more) -> SimpleNamespace:
    """What the page reads: no head, no set, until a test says otherwise."""
    empty = {"slice_sites": SLICE, "heads": {}, "families": {}, "named": {}, "sets": {}, "routes": {}}
    return SimpleNamespace(**(empty | more))


def span(estimate: float, low: float | None, high: float | None, n: int = 30) -> Interval:
    return Interval(estimate, low, high, 0.95, n, "test")


def test_the_fall_of_the_margin_and_the_answers_that_flip():
    frame = paths({(9, "head", 1): 2.5, (9, "head", 2): 0.3}, spread=1e-3)
    sets = {"names": [("candidate", (Site(9, "head", 1),)), ("null", (Site(9, "head", 2),))]}
    table = page.margins(measured(ablation=frame, sets=sets), "names", P).set_index("site")
    own = frame[(frame["half"] == "confirmation") & (frame["site_set"] == 1)].reset_index(drop=True)  # 2 becomes 1.7
    own["metric_after"] -= 3.0 * (own.index < 12)
    assert page.flips(own, P) == "12 of the 30 answers that were right (0.40 [0.25, 0.58])"
    own["metric_before"] -= 3.0 * (own.index < 2)  # an answer that was wrong cannot flip
    assert page.flips(own, P).startswith("10 of the 28 answers that were right (0.36 ")
    assert page.flips(own.assign(metric_before=-1.0), P) == "no answer, for every one was wrong already"
    assert table.loc["9.1", "estimate"] == pytest.approx(2.5, abs=0.01) and table["quads"].tolist() == [30, 30]
    assert table["kind"].to_dict() == {"9.1": "candidate", "9.2": "null"}


def test_a_rank_is_among_the_heads_own_null_and_corrected_for_the_family():
    estimates = pd.Series({"a": 5.0, "b": 1.5, "n1": 1.0, "n2": 2.0, "n3": 3.0})
    found = page.ranks(estimates, {"a": ["n1", "n2", "n3"], "b": ["n1", "n2"]})
    assert found.loc["a"].tolist() == pytest.approx([1 / 4, 3, 2 / 4, 2 / 4])  # one of four, times two
    assert found.loc["b"].tolist() == pytest.approx([2 / 3, 2, 2 / 3, 2 / 3])
    assert page.ranks(estimates, {"b": ["n1", "gone"]}).loc["b", "null"] == 1


@pytest.mark.parametrize("family, expected", [(1, 19), (2, 39), (6, 119), (12, 239)])
def test_the_size_that_a_null_needs_is_the_smallest_that_reaches_the_level(family, expected):
    n = measure.needed(family, 0.95)
    assert n == expected and family / (1 + n) <= 0.05 + 1e-12 < family / n


def test_a_band_is_of_the_nearest_layers_and_as_few_as_hold_enough():
    others = [Site(layer, "head", head) for layer in range(20) for head in range(9) if (layer, head) != (10, 6)]
    own = measure.band(Site(10, "head", 6), others, 100)
    assert {site.layer for site in own} == set(range(4, 17)) and len(own) == 13 * 9 - 1
    assert {site.layer for site in measure.band(Site(10, "head", 6), others, 8)} == {10}
    edge = measure.band(Site(19, "head", 0), others, 100)
    assert {site.layer for site in edge} == set(range(8, 20)) and len(
        measure.band(Site(0, "head", 0), others, 999)
    ) == 179


def case(**params) -> SimpleNamespace:
    return SimpleNamespace(params=P.model_copy(update=params), n_layers=30, n_heads=9, slice=lambda: SLICE)


def test_families_are_ranked_among_enough_heads_none_of_which_is_put_to_the_tests():
    chosen = [Site(3, "head", 2), Site(4, "head", 2), *(Site(10, "head", head) for head in range(4))]
    found = measure.families(case(), {"names": chosen, "last": chosen[:1]})
    assert set(found["names"]) == set(chosen)
    assert set(found["last"]) == {chosen[0], Site(21, "head", 6), Site(27, "head", 1)}
    for role, put in (("names", chosen), ("last", chosen[:1])):
        for among in found[role].values():
            assert not {*among} & {*put, *SLICE} and len(among) >= 100
            assert all(other.layer < 27 for other in among)
    assert min(len(among) for among in found["names"].values()) >= 119  # six tests: 100 could not reach the level
    sets = measure.ablation_sets(case(), {"names": chosen, "last": []})
    kinds = [kind for kind, _ in sets["names"]]
    assert kinds[:7] == ["together", *["candidate"] * 6] and set(kinds[7:]) == {"null"}
    assert [kind for kind, _ in sets["last"]][:2] == ["slice", "null"]  # nothing of the slice comes after 27.1


def test_named_heads_are_a_family_of_their_own_and_no_ones_null():
    chosen, named = [Site(10, "head", 6), Site(3, "head", 2)], ("10.6", "4.2", "27.3")
    asked, heads = case(named_heads=named), {"names": chosen, "last": chosen[:1]}
    own = measure.named_family(asked, heads)
    assert list(own) == [Site(10, "head", 6), Site(4, "head", 2)]  # no head of the slice hears 27.3
    for among in (*own.values(), *measure.families(asked, heads)["names"].values()):
        assert not {*among} & {*chosen, *SLICE, Site(4, "head", 2)} and len(among) >= 100
    assert Site(4, "head", 2) in {other for among in measure.families(asked, heads)["last"].values() for other in among}
    kinds = [kind for kind, _ in measure.ablation_sets(asked, heads)["names"]]
    assert kinds[:4] == ["together", "candidate", "candidate", "named"] and set(kinds[4:]) == {"null"}
    assert not measure.named_family(case(), heads)


NULL = [Site(8, "head", number) for number in range(120)]


def tables(effects: dict[Site, float], quads: int = 30) -> dict[str, pd.DataFrame]:
    """Every test's table: these heads' effects, and a null of 120 heads at almost nothing."""
    null = {tuple(site): 0.02 * number / len(NULL) for number, site in enumerate(NULL)}
    frame = paths({**{tuple(site): effect for site, effect in effects.items()}, **null}, quads, spread=0.01)
    table = measure.senders_table(frame, P)
    return dict.fromkeys((*page.TESTS, *page.BESIDE), table)


def named(*sites: Site) -> dict[str, list[str]]:
    return {site_name(*site): [site_name(*other) for other in NULL] for site in sites}


GOOD, BLIND = Site(9, "head", 1), Site(9, "head", 2)


def test_a_head_is_a_retrieval_head_only_if_it_passes_all_four_tests():
    own = tables({GOOD: 1.0, BLIND: 1.0})
    own[page.TESTS[1]] = tables({GOOD: 1.0, BLIND: 0.0})[page.TESTS[1]]  # BLIND writes nothing
    tests = page.four_tests(named(GOOD, BLIND), own, P).assign(role="names", inside=False)
    assert page.passing(tests) == {("9.1", "names"): page.SUPPORTED, ("9.2", "names"): page.NOT_SUPPORTED}
    row = tests.set_index(["site", "test"]).loc[("9.1", page.TESTS[4])]
    assert row["null"] == 120 and row["p"] == row["smallest"] == pytest.approx(2 / 121)
    assert (tests.loc[tests["test"].isin(page.BESIDE), "verdict"] == "").all()
    m = measured(heads={"names": [GOOD, BLIND]})
    found = page.verdicts(tests, m, pd.Series({"low": 0.7}), span(1.0, 0.5, 1.5), P)
    assert found["retrieval_heads"] == {"names": ["9.1"]} and found["two_stages"] and found["mlps_at_the_names"]
    said = page.verdict_sentences(found, tests)[0]
    assert "head 9.1 at `names` of the 2 heads put to them" in said
    assert said.endswith("supported (p = 0.017, corrected for all heads of all roles).")
    like_others = tables({GOOD: 1.0, BLIND: 0.012})[page.TESTS[1]]  # above zero, as half of the others are
    for test, verdict in ((page.TESTS[1], page.SUPPORTED), (page.TESTS[2], page.NOT_SUPPORTED)):
        both = page.four_tests(named(GOOD, BLIND), tables({GOOD: 1.0, BLIND: 1.0}) | {test: like_others}, P)
        both = both.assign(role="names", inside=False)
        assert page.passing(both)["9.2", "names"] == verdict  # a probe like others' is enough, a write is not
    table = page.passes(both).set_index("head")
    assert list(table.columns[:5]) == [page.NUMBERED[test] for test in page.TESTS]  # 1, 2a, 2b, 3 and 4
    assert table.loc["9.1 at names"].tolist()[:6] == [*["yes"] * 5, 4]
    assert table.loc["9.2 at names"].tolist()[:6] == [
        "yes",
        "yes",
        "no",
        "yes",
        "yes",
        3,
    ]  # half of the second fails it
    assert [str(size) for size in table["ranked among"]] == ["120", "120"]
    assert table["smallest p"].tolist() == pytest.approx([2 / 121] * 2)
    said = page.test_sentences(both)
    assert (
        said[0].startswith("How many of the 2 heads outside the slice pass each test.")
        and "| path | 2 | 0 |" in said[0]
    )
    assert f"| writes the class | 1 | 0 |\n| output tells the class | 2 | 0 |\n| {page.TESTS[2]} | 1 | 0 |" in said[0]
    assert "ranked among 120 other heads; the smallest p" in said[1] and "of a role, is 0.017." in said[1]
    shown = page.shown_tests(tests)
    assert len(shown) == 2 * 7 and shown["verdict"].str.contains("supported").sum() == 2 * 5


def test_a_head_of_ten_times_any_others_effect_passes_and_one_like_the_others_fails():
    """The first was rejected by a rank among sixteen."""
    own, test = tables({GOOD: 1.0, BLIND: 0.015}), page.TESTS[4]
    tests = page.four_tests(named(GOOD, BLIND), {test: own[test]}, P)
    assert tests["verdict"].tolist() == [page.SUPPORTED, page.NOT_SUPPORTED]
    few = {site: among[:16] for site, among in named(GOOD, BLIND).items()}
    tests = page.four_tests(few, {test: own[test]}, P)
    assert set(tests["verdict"]) == {page.NOT_TESTABLE}
    assert set(tests["why"]) == {"ranked among 16 heads, 39 needed"}


def test_nine_quads_are_not_testable_in_findings_sentences_and_verdicts():
    tests = page.four_tests(named(GOOD), tables({GOOD: 1.0}, quads=9), P).assign(role="names", inside=False)
    own = tests[~tests["test"].isin(page.BESIDE)]
    assert set(own["verdict"]) == {page.NOT_TESTABLE} and set(own["why"]) == {"9 quads, 20 needed"}
    route = tables({GOOD: 1.0}, quads=9)["path"]
    for heads in ([GOOD], []):
        m = measured(heads={"names": heads}, routes={"slice at names": route})
        asked = tests if heads else tests[:0]
        found = page.verdicts(asked, m, pd.Series({"low": None}), span(1.0, None, None, 9), P)
        assert {found[key] for key in ("two_stages", "one_stage", "mlps_at_the_names")} == {None}
        said = " ".join([*page.verdict_sentences(found, asked), *page.test_sentences(asked)])
        assert said.count("not testable here") == 3 and "not supported" not in said
        assert "not testable here (too few quads, or the slice has no heads)" in said
    assert "9 quads, 20 needed" in page.senders_sentence(route, "names", P)
    m = measured(heads={"names": []}, routes={"slice at names": route})
    assert "not testable with 9 quads, 20 are needed" in page.ablation_sentences(m, P)[0]
    assert "| path | 0 | 1 |" in page.test_sentences(tests)[0]
    assert set(page.passes(tests)[[*page.NUMBERED.values()]].iloc[0]) == {"9 quads, 20 needed"}
    enough = measured(heads={"names": []}, routes={"slice at names": tables({GOOD: 1.0})["path"]})
    assert page.verdicts(tests[:0], enough, None, span(1.0, 0.5, 1.5), P)["two_stages"] is False


def two_roles(null: int = 120) -> pd.DataFrame:
    """One good head among two at each of two roles, by ranks among so many other heads."""
    good, few = tables({GOOD: 1.0, BLIND: 0.0}), {site: own[:null] for site, own in named(GOOD, BLIND).items()}
    return pd.concat([page.four_tests(few, good, P).assign(role=role, inside=False) for role in ("names", "last")])


def test_whether_any_head_passes_pays_for_the_heads_of_all_roles():
    """A head passes by Holm's correction within its role; that there is one is corrected for both roles' heads, and
    the page says of it what the claim's p value does."""
    some = page.any_head(two_roles())
    assert (some["estimate"], some["heads"]) == (2, 4)
    assert some["p"] == some["smallest"] == pytest.approx(4 / 121)
    m = measured(heads={"names": [GOOD], "last": [GOOD]})
    one, other = (page.verdicts(tests, m, None, span(1.0, 0.5, 1.5), P) for tests in (two_roles(), two_roles(60)))
    assert one["two_stages"] is True
    assert other["retrieval_heads"] == {"names": ["9.1"], "last": ["9.1"]}  # each by 2/61
    assert other["two_stages"] is None and page.any_head(two_roles(60))["smallest"] == pytest.approx(4 / 61)
    beaten = two_roles()
    beaten.loc[(beaten["site"] == "9.1") & (beaten["test"] == page.TESTS[4]), "alone"] = 2 / 121
    found = page.verdicts(beaten, m, None, span(1.0, 0.5, 1.5), P)
    assert found["two_stages"] is False and "not supported (p = 0.066" in page.verdict_sentences(found, beaten)[0]
    none = page.any_head(beaten[:0])
    assert none == {"estimate": 0, "p": 1.0, "smallest": 0.0, "heads": 0}


def test_a_test_that_only_the_confirmation_half_passes_says_so():
    own, test = tables({GOOD: 1.0}), page.TESTS[0]
    early = own[test]["half"] == "discovery"
    own[test] = own[test].assign(p=own[test]["p"].mask(early & (own[test]["site"] == "9.1"), 0.5))
    row = page.four_tests(named(GOOD), {test: own[test]}, P).iloc[0]
    assert (row["verdict"], row["why"]) == (page.NOT_SUPPORTED, "not significant in the discovery half")
    shown = page.shown_tests(page.four_tests(named(GOOD), {test: own[test]}, P).assign(role="last")).iloc[0]
    assert shown["test"] == "1 path" and shown["verdict"] == "not supported (not significant in the discovery half)"
    assert float(shown["p"]) > 0  # not rounded to 0.000


def test_a_small_p_beside_not_supported_has_its_reason_and_no_cell_is_empty_of_what_was_measured():
    given = tables({GOOD: 1.0, BLIND: 1.0}) | {page.TESTS[3]: tables({GOOD: -1.0, BLIND: 1.0})[page.TESTS[3]]}
    tests = page.four_tests(named(GOOD, BLIND), given, P).assign(role="last", inside=False)
    row = tests[(tests["site"] == "9.1") & (tests["test"] == page.TESTS[3])].iloc[0]
    assert (row["verdict"], row["why"]) == (page.NOT_SUPPORTED, "below zero") and row["p"] <= 0.05
    unmeasured = (tests["site"] == "9.2") & (tests["test"] == page.BESIDE[1])
    shown = page.shown_tests(tests.assign(estimate=tests["estimate"].mask(unmeasured)))
    assert len(shown) == len(tests) - 1, "a probe that was not made decides nothing and has no row"
    assert not shown.isna().any(axis=None) and (shown["found"] != "").all()
    assert set(shown["smallest p"]) == {"", "0.017"}
    zero = pd.Series({"estimate": 0.1, "low": -0.1, "high": 0.3, "p": 0.01, "quads": 30, "passed": False})
    assert page.verdict(zero, False, 2, P) == (page.NOT_SUPPORTED, "its interval holds zero")


def test_one_stage_needs_slice_heads_that_read_and_a_route_that_carries():
    own = Site(21, "head", 6)
    tests = page.four_tests(named(own), tables({own: 1.0}), P).assign(role="last", inside=True)
    for low, expected in ((0.7, True), (0.3, False), (None, None)):
        found = page.verdicts(tests, measured(), pd.Series({"low": low}), span(-1.0, -2.0, -0.5), P)
        assert found["one_stage"] is expected and found["slice_heads_that_retrieve"] == ["21.6"]
        assert not found["two_stages"] and found["mlps_at_the_names"] is False
    assert "not testable" in page.verdict_sentences(found, tests)[1]
    reads = pd.Series({"estimate": 0.71, "low": 0.67, "high": 0.75})
    found = page.verdicts(tests, measured(), reads, span(-1.0, -2.0, -0.5), P)
    said = page.verdict_sentences(found, tests, reads)[1]
    assert "at the names (0.71 [0.67, 0.75], with what they pass on at the tokens between)" in said
    assert "tests: supported. " in said and "writ" not in said, "what is read says nothing of what is written"


@pytest.mark.parametrize("missed", page.TESTS)
def test_the_slices_own_heads_face_all_four_tests(missed):
    own, other = Site(21, "head", 6), Site(27, "head", 1)
    given = tables({own: 1.0, other: 1.0}) | {missed: tables({own: 1.0, other: -1.0})[missed]}
    tests = page.four_tests(named(own, other), given, P).assign(role="last", inside=True)
    found = page.verdicts(tests, measured(), pd.Series({"low": 0.7}), span(-1.0, -2.0, -0.5), P)
    assert found["slice_heads_that_retrieve"] == ["21.6"]
    assert (
        "Of the slice's 2 heads, head 21.6 by itself passes the same four tests."
        in page.verdict_sentences(found, tests)[1]
    )
    failed = next(test for test, parts in page.FOUR.items() if missed in parts)
    held = [test for test in page.FOUR if test != failed]
    assert (
        f"Which head passes which: head 21.6: all four; head 27.1: {' and '.join(held)}."
        in page.test_sentences(tests)[0]
    )


def test_what_path_patching_finds_beside_what_the_last_token_reads():
    spans = {"names": 0.6, "between": 0.1, "rest": 0.0}
    read = pd.DataFrame({"reader": "the slice", "position": spans.keys(), "estimate": spans.values()})
    read, every = read.assign(low=np.nan, high=np.nan), pd.DataFrame([{"estimate": 0.7, "low": 0.6, "high": 0.8}])
    (said,) = hops_page.both_hops(read, every)
    assert "The 0.70 [0.60, 0.80] that path patching" in said
    assert "by itself reads 0.60." in said and "the 0.10 that the last token reads at `between`" in said
    assert hops_page.both_hops(read, every[:0]) == [] and hops_page.both_hops(read[:1], every) == []


def test_edges_of_too_few_quads_are_said_to_be_without_a_test():
    few, enough = (paths({(5, "mlp", -1): 1.0}, quads) for quads in (4, 30))
    assert "on 4 pairs (4 quads) of the confirmation half, too few for intervals" in page.edges_sentence(few)[0]
    assert page.edges_sentence(enough) == [] and page.edges_sentence(few[:0]) == []


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


def test_one_name_rows_are_each_two_people_once():
    row = {"quad_id": "q0", "half": "discovery", "answer": "artist", "corrupt_answer": "writer"}
    table = pd.DataFrame([
        row | {"pair_id": "q0.0", "clean_a": "A", "clean_b": "B", "corrupt_a": "C", "corrupt_b": "D"},
        row | {"pair_id": "q0.1", "clean_a": "D", "clean_b": "C", "corrupt_a": "B", "corrupt_b": "A",
               "answer": "writer", "corrupt_answer": "artist"},
    ])  # fmt: skip
    out = routes.one_name_rows(table, "profession_is")
    assert out[["pair_id", "clean_a", "corrupt_a"]].to_numpy().tolist() == [["q0.0a", "A", "C"], ["q0.0b", "B", "D"]]


def test_a_slice_without_heads_is_asked_about_at_the_last_token():
    mlps = [Site(23, "mlp"), Site(24, "mlp")]
    case = SimpleNamespace(slice=lambda: mlps)
    assert list(measure.routes_of(case, measure.Subject([], [], []))) == ["last"]
    everything = routes.groups(mlps, 9)[0]
    assert Site(24, "head", 8) in everything and Site(24, "mlp") not in everything and EMBED in everything
    assert routes.speaks(Site(23, "head", 0), mlps[:1]) and not routes.speaks(Site(24, "head", 0), mlps[:1])


def test_the_edges_lead_from_the_names_through_the_slice_to_the_answer():
    units = routes.edge_units([], [EMBED, Site(5, "mlp")], SLICE, "recomputed")
    assert units == []  # no pairs, no work
    frame = paths({(5, "mlp", -1): 1.0, (-1, "embed", -1): 0.0}, receivers="21.6")
    edges = page.edges_table(frame, P).set_index("source")
    assert edges["significant"].to_dict() == {"mlp 5 at names": True, "names": False}
    assert set(edges["target"]) == {"21.6"}
    faint = paths({(5, "mlp", -1): P.floor / 2, (-1, "embed", -1): 0.0}, spread=P.floor / 100, receivers="21.6")
    assert not page.edges_table(faint, P)["significant"].any(), "within the model's noise"


def test_the_leading_senders_are_said_with_what_is_significant():
    sites = {"embedding": "embed", "10.6": "head", "mlp 0": "mlp", "10.8": "head"}
    about = pd.DataFrame({"site": sites.keys(), "component": sites.values(), "estimate": [3.0, 0.5, 2.0, -0.5]})
    about = about.assign(p=[0.01, 0.01, 0.4, 0.01], low=0.1, high=9.0, quads=30)
    table = pd.concat([about.assign(half="discovery"), about[:3].assign(half="confirmation")], ignore_index=True)
    turned = table.assign(estimate=table["estimate"].mask(table["half"] == "confirmation", -table["estimate"]))
    assert page.leaders(turned)["site"].tolist() == ["embedding", "mlp 0", "10.6"]  # as discovery picks them
    assert page.leaders(turned)["estimate"].tolist() == [-3.0, -2.0, -0.5]  # as confirmation has them
    assert page.senders_sentence(turned, "names", P, 2).startswith(
        "At `names`, of 4 senders, the largest path effect into the slice on the discovery half is that of embedding "
        "(-3.00 [0.10, 9.00]), before mlp 0; in brackets what the confirmation half gives"
    )
    assert page.senders_sentence(table, "names", P, 2).endswith(
        "embedding (3.00 [0.10, 9.00]), before mlp 0; in brackets what the confirmation half gives (logits, familywise "
        "intervals). Significant in both halves are the embedding, one head and no MLPs, of 3 that were followed to "
        "the other half."
    )


def outputs_of(quads: int = 30, **told: float) -> pd.DataFrame:
    """Accuracy above chance of ten heads, of which the first tells 0.4 and the others 0.1, and of baselines."""
    rng, rows = np.random.default_rng(0), []
    every = {("head", 3, head): 0.4 if head == 0 else 0.1 for head in range(10)}
    every |= {(name, -1, -1): value for name, value in told.items()}
    for half, number in product(("discovery", "confirmation"), range(quads)):
        for (component, layer, head), value in every.items():
            rows.append({"half": half, "quad_id": f"{half}{number}", "position": "names", "component": component,
                         "layer": layer, "head": head, "told": value + 0.01 * rng.normal()})  # fmt: skip
    return pd.DataFrame(rows)


def test_a_probe_must_tell_more_than_what_is_known_without_the_model():
    plain, known = outputs_of(metadata=-0.05, letters=-0.02), outputs_of(metadata=0.2, letters=0.05)
    assert page.baseline(plain, "names")[0] == "chance" and page.baseline(known, "names")[0] == "metadata"
    for frame, expected in ((plain, 0.4), (known, 0.2)):
        table = page.beyond_baseline(frame, "names", P)
        own = table[(table["half"] == "confirmation") & (table["head"] == 0)]
        assert own["estimate"].item() == pytest.approx(expected, abs=0.01)
    said = page.probe_sentence(measured(outputs=plain), "names", P)
    assert "10 of 10 heads better than chance, in both halves. So many meet this" in said
    said = page.probe_sentence(measured(outputs=known), "names", P)
    assert "1 of 10 heads better than the people's metadata do (these are 0.20 above chance), in both halves." in said
    assert "too few quads" in page.probe_sentence(measured(outputs=outputs_of(9)), "names", P)


def test_the_axes_say_how_many_quads_each_kind_of_prompt_has():
    def senders(quads: int) -> pd.DataFrame:
        names = {"site": ["mlp 0", "mlp 1"], "component": "mlp", "estimate": [1.0, 0.5], "quads": quads}
        return pd.concat([pd.DataFrame(names).assign(half=half) for half in HALVES], ignore_index=True)

    routes = {"slice at names": senders(26), "slice in one-name prompts": senders(1)}
    axes = page.pairs_and_names(SimpleNamespace(routes=routes)).axes[0]
    assert axes.get_xlabel() == "pair prompts (logits, 26 quads)"
    assert axes.get_ylabel() == "one-name prompts (logits, 1 quad)"
