"""The numbers of steps 02 to 04, from tables small enough to work out by hand: a fixed table in, the number out."""

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import test_lenses

from lib import effects, stats
from lib.effects import SITE
from lib.hooks import Site
from pipeline.params import Shared
from report import site_tables, words
from steps.coarse_sweep import measure as coarse_measure
from steps.coarse_sweep import page as coarse_page
from steps.necessity import measure as necessity_measure
from steps.necessity import page as necessity_page
from steps.sufficiency import measure as sufficiency_measure
from steps.sufficiency import page as sufficiency_page

# Every setting differs from its default and from the others, so that none can stand in for another unseen.
SETTINGS = {"model": "m", "level": 0.9, "resamples": 300, "flips": 256, "seed": 7}
PARAMS = Shared(**SETTINGS)
OWN = stats.Settings(level=0.9, resamples=300, flips=256, seed=7)
MANY = 20  # quads: the fewest with an interval


def profile(**other: float) -> Shared:
    """The parameters with some settings of another value."""
    return Shared(**SETTINGS | other)


def record(effect: float, gap: float = 4.0, quad: str = "q1", **more: object) -> dict:
    """A row of a sweep's table in which a site moves logit_diff by `effect` of a gap between clean and corrupt.

    `margin` is the same for the margin (default: ten times the effect, so that the two cannot be taken for each other).
    """
    row = {
        "profile": "test", "task": "superset", "template": "default", "half": "confirmation", "direction": "denoise",
        "layer": 0, "component": "resid", "head": -1, "position": "last", "quad_id": quad, "pair_id": f"{quad}p",
    } | more  # fmt: skip
    denoise = row["direction"] == "denoise"
    row.setdefault("ablation", "clean" if denoise else "counterfactual")
    margin = row.pop("margin", 10 * effect)
    sign = 1 if denoise else -1
    return row | {
        "logit_diff_clean": gap + 1, "logit_diff_corrupt": 1.0,
        "logit_diff_before": 2.0, "logit_diff_after": 2.0 + sign * effect,
        "metric_before": -1.0 * sign, "metric_after": sign * (margin - 1.0),
        "metric_clean": 1.0, "metric_corrupt": -1.0,
    }  # fmt: skip


def table(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(rows)


def two_quads(**more: object) -> list[dict]:
    """Three pairs of two quads: effects 1 and 2 (gaps 4 and 2) of q1, 3 (gap 10) of q2."""
    return [
        record(1, 4, "q1", **more),
        record(2, 2, "q1", **more, pair_id="other"),
        record(3, 10, "q2", **more),
    ]


def many(moved: list[float], gaps: list[float], **more: object) -> list[dict]:
    """A row for each of as many quads."""
    return [record(e, g, f"q{i:02d}", **more) for i, (e, g) in enumerate(zip(moved, gaps, strict=True))]


def curve_of(estimates: list[float], **more: object) -> pd.DataFrame:
    """A curve as `coarse_curves` gives it, from its estimates by layer."""
    shared = {"half": "confirmation", "direction": "denoise", "position": "last", "low": np.nan, "high": np.nan}
    return pd.DataFrame({"layer": range(len(estimates)), "estimate": estimates}).assign(**shared | more)


def sites(rows: dict[str, tuple], half: str = "confirmation", **more: object) -> pd.DataFrame:
    """A table of sites of one half, name -> (estimate, p, ratio, ratio_low)."""
    shared = {"half": half, "low": 0.1, "high": 9.0, "t": 1.0, "quads": 20, "ratio_high": 9.0} | more
    own = pd.DataFrame(list(rows.values()), columns=["estimate", "p", "ratio", "ratio_low"])
    places = [place_of(name) for name in rows]
    return pd.DataFrame(places, columns=SITE).join(own).assign(site=list(rows), **shared)


def place_of(name: str) -> Site:
    component, _, place = name.rpartition(" ")
    layer, _, head = place.partition(".")
    return Site(int(layer), component or "head", int(head or -1))


# --- curves


def test_a_curve_is_a_ratio_of_sums_per_layer():
    rows = two_quads(layer=1) + [row | {"logit_diff_after": 2.0} for row in two_quads(layer=0)]
    curve = effects.curve(table(rows), PARAMS)
    assert curve["layer"].tolist() == [0, 1]
    # (1 + 2 + 3) / (4 + 2 + 10); the mean of ratios would be (1/4 + 1 + 3/10) / 3, that of quads (3/6 + 3/10) / 2
    assert curve["estimate"].tolist() == [0.0, 6 / 16]
    assert curve["low"].isna().all() and curve["high"].isna().all(), "two quads have no interval"
    assert curve["quads"].tolist() == [2, 2]


def test_a_curve_counts_damage_as_positive_and_keeps_its_own_columns():
    rows = two_quads(direction="noise", site_set=3)
    curve = effects.curve(table(rows), PARAMS, ["site_set"])
    assert curve[["site_set", "estimate"]].to_dict("records") == [{"site_set": 3, "estimate": 6 / 16}]


def test_a_curve_has_intervals_from_20_quads_on():
    gaps = [2.0, 6.0] * 10
    even = effects.curve(table(many([g / 2 for g in gaps], gaps)), PARAMS)
    # every quad loses half of its own gap: the ratio is 0.5 in every resample, whatever the gaps
    assert even.loc[0, ["estimate", "low", "high"]].tolist() == pytest.approx([0.5, 0.5, 0.5], abs=1e-9)
    fewer = effects.curve(table(many([1.0] * (MANY - 1), gaps[1:])), PARAMS)
    assert fewer["quads"].tolist() == [19] and fewer[["low", "high"]].isna().all(axis=None)


def test_a_curves_intervals_are_the_profiles():
    moved, gaps = [float(i % 5) for i in range(MANY)], [4.0 + i % 3 for i in range(MANY)]
    curve = effects.curve(table(many(moved, gaps)), PARAMS)
    (own,) = stats.ratio_intervals(np.array(moved)[:, None], np.array(gaps)[:, None], OWN)
    # 20 quads of effects 0..4: 4 x 10; gaps 4, 5, 6 in turn: 6 x 15 + 4 + 5
    assert own.estimate == pytest.approx(40 / 99)
    assert curve.loc[0, ["estimate", "low", "high"]].tolist() == [own.estimate, own.low, own.high]
    assert own.low < own.estimate < own.high


def test_a_curve_without_a_gap_or_with_nan_is_an_error():
    with pytest.raises(ValueError, match="keep pairs whose corrupt prompt lowers the answer"):
        effects.curve(table([record(1.0, 2.0, "q1"), record(1.0, -2.0, "q2")]), PARAMS)
    with pytest.raises(ValueError, match="NaN or infinite"):
        effects.curve(table([record(np.nan), record(1.0, quad="q2")]), PARAMS)
    with pytest.raises(ValueError, match="one direction"):
        effects.curve(table([record(1.0), record(1.0, direction="noise", ablation="clean")]), PARAMS)


def test_coarse_curves_tell_halves_directions_and_roles_apart():
    parts = itertools.product(("confirmation", "discovery"), ("denoise", "noise"), ("names", "last"), (1, 0))
    keys = [dict(zip(("half", "direction", "position", "layer"), part, strict=True)) for part in parts]
    rows = [record(index, 100.0, **key) for index, key in enumerate(keys)]
    curves = coarse_measure.coarse_curves(table(rows), PARAMS)
    assert len(curves) == 16
    # the halves in order, discovery first; within them directions and roles as they come, layers by number
    assert curves["half"].tolist() == ["discovery"] * 8 + ["confirmation"] * 8
    assert curves["direction"].tolist()[:8] == ["denoise"] * 4 + ["noise"] * 4
    assert curves["position"].tolist()[:4] == ["names"] * 2 + ["last"] * 2
    assert curves["layer"].tolist() == [0, 1] * 8
    found = curves.set_index(["half", "direction", "position", "layer"])["estimate"]
    for index, key in enumerate(keys):
        assert found[tuple(key.values())] == pytest.approx(index / 100)


def test_coarse_curves_of_one_half():
    curves = coarse_measure.coarse_curves(table([record(1.0, half="discovery")]), PARAMS)
    assert curves[["half", "estimate"]].to_dict("records") == [{"half": "discovery", "estimate": 0.25}]


def shares_by_role(values: dict[str, tuple[float, ...]], half: str, quads: int = MANY) -> list[dict]:
    """Denoise records of roles by layer, the same shares of gaps of 4 or 6 in as many quads."""
    return [
        record(share * gap, gap, f"{half}{quad:02d}", position=role, layer=layer, half=half)
        for role, shares in values.items()
        for layer, share in enumerate(shares)
        for quad, gap in ((number, (4.0, 6.0)[number % 2]) for number in range(quads))
    ]


ROUTE = {
    "names": (1.0, 0.6, 0.2, 0.0), "between": (0.0, 0.1, 0.3, 0.05), "last": (0.0, 0.2, 0.4, 0.95),
    "rest": (0.0, 0.05, 0.05, 0.0),
}  # fmt: skip


def test_the_account_of_the_gap_adds_up_to_one():
    rows = shares_by_role(ROUTE, "confirmation")
    rows += [record(9.0, quad="elsewhere", position="last", layer=layer) for layer in range(4)]  # not at every role
    rows += [row | {"direction": "noise", "ablation": "counterfactual"} for row in rows]
    account = coarse_page.account(table(rows), PARAMS)
    assert account["quads"].unique().tolist() == [MANY]
    wide = account.pivot(index="layer", columns="position", values="estimate")
    assert wide.sum(axis=1).tolist() == pytest.approx([1.0] * 4)
    assert wide["remainder"].tolist() == pytest.approx([0.0, 0.05, 0.05, 0.0])
    for role, shares in ROUTE.items():
        assert wide[role].tolist() == pytest.approx(list(shares))
    rises = account[account["position"] == "between"]["rise_estimate"]
    assert rises.tolist() == pytest.approx([0.0, 0.1, 0.2, -0.25])


def test_the_accounts_intervals_are_those_of_ratios_over_quads():
    gaps, last = [4.0 + i % 3 for i in range(MANY)], [float(i % 5) / 2 for i in range(MANY)]
    rows = many(last, gaps) + many([1.0] * MANY, gaps, position="names")
    account = coarse_page.account(table(rows), PARAMS).set_index("position")
    left = [gap - moved - 1.0 for gap, moved in zip(gaps, last, strict=True)]
    own = stats.ratio_intervals(np.array([last, [1.0] * MANY, left]).T, np.array(gaps), OWN)
    for role, span in zip(("last", "names", "remainder"), own, strict=True):
        found = account.loc[role, ["estimate", "low", "high"]].tolist()
        assert found == pytest.approx([span.estimate, span.low, span.high])


def test_what_is_said_of_the_tokens_between():
    other = ROUTE | {"between": (0.0, 0.2, 0.25, 0.05)}
    rows = shares_by_role(ROUTE, "discovery") + shares_by_role(other, "confirmation")
    both = effects.by_half(table(rows), lambda half: coarse_page.account(half, PARAMS))
    found, said = coarse_page.through_between(both, 0.6)
    assert (found["at"], found["fills"], found["empties"]) == (2, (2,), (3,)), "0.2 of 0.3 is enough of it"
    assert said[0].startswith(
        "The tokens between the names and the last one carry most after layer 2 (picked on the discovery half). There "
        "each role alone brings back (20 quads, confirmation half):\n\n| role"
    )
    assert "| `between` | 0.25 [0.25, 0.25] |\n| `last` | 0.40" in said[0]
    assert said[0].endswith("| brought back by no role alone | 0.10 [0.10, 0.10] |")
    assert said[1] == (
        "In shares of the gap, `between` fills in layer 2 (by 0.05 [0.05, 0.05]) and empties in layer 3 (by -0.20 "
        "[-0.20, -0.20]). There `last` gains, in layer 3 (by 0.55 [0.55, 0.55])."
    )
    few = effects.by_half(table(rows), lambda half: coarse_page.account(half[half["quad_id"].str[-2:] < "05"], PARAMS))
    assert "too few quads to test" in coarse_page.through_between(few, 0.6)[1][-1]
    none = shares_by_role(ROUTE | {"between": (0.0, -0.1, -0.1, -0.2)}, "discovery")
    (last,) = coarse_page.through_between(
        effects.by_half(table(none), lambda half: coarse_page.account(half, PARAMS)), 0.6
    )[1][1:]
    assert last == "What `between` carries there: it is not shown to be above zero."


# --- critical layers, crossings, rises


def test_critical_layers_are_those_of_the_denoise_curve_at_last_on_discovery():
    own = curve_of([0.1, 0.6, 1.0], half="discovery")  # rises 0.1, 0.5, 0.4; 0.5 + 0.4 >= 0.8
    others = [
        curve_of([0.9, 0.9, 1.0], half="discovery", direction="noise"),
        curve_of([0.9, 0.5, 0.1], half="discovery", position="names"),
        curve_of([0.95, 1.0, 1.0]),  # confirmation: layer 0 alone
    ]
    curves = pd.concat([own.iloc[::-1], *others], ignore_index=True)
    found = coarse_measure.critical_layers(curves, 0.8)
    assert found.layers == (1, 2) and found.rises == pytest.approx((0.5, 0.4)) and found.share == pytest.approx(0.9)
    half = coarse_measure.critical_layers(curves, 0.5)
    assert half.layers == (1,)
    alone = coarse_measure.critical_layers(curves[curves["half"] == "confirmation"], 0.8)
    assert alone.layers == (0,) and alone.share == pytest.approx(0.95)


def test_equal_rises_are_taken_from_the_first_layer_on():
    found = coarse_measure.critical_layers(curve_of([0.25, 0.5, 0.75, 1.0]), 0.6)
    assert found.layers == (0, 1, 2), "0.25 each: three reach 0.6, the first three"


def test_a_flat_or_broken_curve_has_no_critical_layers():
    with pytest.raises(ValueError, match="not positive"):
        coarse_measure.critical_layers(curve_of([0.5, 0.0]), 0.8)
    with pytest.raises(ValueError, match="every layer"):
        coarse_measure.critical_layers(curve_of([0.5, np.nan, 1.0]), 0.8)


@pytest.mark.parametrize(
    ("estimates", "position", "layer"),
    [
        ([0.2, 0.6, 0.4, 0.7, 0.9], "last", 3),  # above at 1, but back below at 2
        ([0.9, 0.6, 0.3, 0.6, 0.2], "names", 4),  # below at 2, but back above at 3
        ([0.9, 0.4, 0.3], "name_a", 1),
        ([0.6, 0.7], "last", 0),
        ([0.2, 0.5, 0.5], "last", None),  # one half itself is on neither side
        ([0.9, 0.5, 0.5], "names", None),
        ([0.9, 0.9, 0.4], "last", None),  # what counts is that it stays
        ([0.1, 0.9, np.nan], "last", None),
    ],
)
def test_where_a_curve_crosses_one_half_for_good(estimates, position, layer):
    curves = pd.concat(
        [
            curve_of(estimates, position=position, half="discovery").iloc[::-1],
            curve_of([0.9] * 5, position="last" if position != "last" else "names", half="discovery"),
            curve_of([1 - e for e in estimates], position=position, direction="noise", half="discovery"),
            curve_of([1 - e for e in estimates], position=position).iloc[::-1],
        ],
        ignore_index=True,
    )
    found, row = coarse_page.crossing(curves, position)
    assert found == layer
    assert row is None if layer is None else row["estimate"] == 1 - estimates[layer] and row["half"] == "confirmation"


def test_a_crossing_of_the_other_direction_and_of_one_half():
    curves = pd.concat([curve_of([0.9, 0.9]), curve_of([0.1, 0.8], direction="noise")], ignore_index=True)
    assert coarse_page.crossing(curves, "last", "noise")[0] == 1
    assert coarse_page.crossing(curve_of([0.1, 0.8], half="discovery"), "last")[0] == 1


def test_rises_are_shares_of_the_confirmation_curve():
    curves = pd.concat(
        [
            curve_of([0.1, 0.3, 0.7, 0.8]).iloc[::-1],  # rises 0.1, 0.2, 0.4, 0.1
            curve_of([0.8, 0.8, 0.8, 0.8], half="discovery"),
            curve_of([0.0, 0.0, 0.0, 0.8], direction="noise"),
            curve_of([0.8, 0.4, 0.2, 0.1], position="names"),
        ],
        ignore_index=True,
    )
    assert coarse_page.rises_of(curves, [0, 2]) == pytest.approx((0.1 + 0.4) / 0.8)
    assert coarse_page.rises_of(curves, (1,)) == pytest.approx(0.2 / 0.8)
    assert coarse_page.rises_of(curves, [0, 1, 2, 3]) == pytest.approx(1.0)
    assert coarse_page.rises_of(curves[curves["half"] == "discovery"], [0]) == pytest.approx(1.0)


# --- sites


def three_quads(**more: object) -> list[dict]:
    """Two heads in three quads: effects (1, 2, 3) and (2, -1, -1), gaps of 5, 6 and 9."""
    return [
        record(effect, gap, quad, **({"component": "head", "head": head} | more))
        for head, moved in ((1, (2, -1, -1)), (0, (1, 2, 3)))
        for quad, gap, effect in zip(("q1", "q2", "q3"), (5.0, 6.0, 9.0), moved, strict=True)
    ]


def test_site_effects_by_hand():
    found = effects.site_effects(table(three_quads()), PARAMS)
    assert found[SITE].to_numpy().tolist() == [[0, "head", 0], [0, "head", 1]]
    assert found["estimate"].tolist() == [2.0, 0.0]  # (1 + 2 + 3) / 3 and (2 - 1 - 1) / 3
    assert found["ratio"].tolist() == pytest.approx([6 / 20, 0.0])
    assert found["quads"].tolist() == [3, 3]
    # Of the 8 sign patterns, up to a common sign +++ ++- +-+ -++, the sums over the root of the sum of squares are
    # (6, 0, 2, 4) / sqrt(14) = 1.60, 0, 0.53, 1.07 for head 0 and (0, 2, 2, -4) / sqrt(6) = 0, 0.82, 0.82, 1.63 for
    # head 1. Head 0's 1.60 is reached by the larger of the two in +++ and -++ (alone: in +++ only).
    assert found["p"].tolist() == [2 / 4, 1.0]
    assert found[["low", "high", "ratio_low", "ratio_high"]].isna().all(axis=None), "three quads have no interval"


def test_site_effects_average_pairs_within_quads_first():
    found = effects.site_effects(table(two_quads()), PARAMS)
    # quads: (1 + 2) / 2 = 1.5 and 3; the mean over pairs would be 2; the ratio is that of sums over pairs
    assert found.loc[0, ["estimate", "ratio", "quads"]].tolist() == [2.25, 6 / 16, 2]


def test_site_effects_have_intervals_for_all_sites_together_and_ratios_with_their_own():
    wave, other = [float(i % 5) for i in range(MANY)], [float((i * 7) % 11 - 4) for i in range(MANY)]
    gaps = [4.0 + i % 3 for i in range(MANY)]
    rows = many(wave, gaps, component="mlp") + many(other, gaps, component="attn")
    found = effects.site_effects(table(rows), PARAMS)
    assert found["component"].tolist() == ["attn", "mlp"]
    matrix, below = np.array([other, wave]).T, np.array([gaps, gaps]).T
    together, own = stats.simultaneous(matrix, OWN), stats.ratio_intervals(matrix, below, OWN)
    alone = stats.mean_intervals(matrix, OWN)
    assert found["low"].tolist() == [i.low for i in together] != [i.low for i in alone]
    assert found["high"].tolist() == [i.high for i in together]
    assert found["ratio_low"].tolist() == [i.low for i in own] and found["ratio_high"].tolist() == [i.high for i in own]
    assert found["p"].tolist() == stats.max_t(matrix, OWN).tolist()


def test_one_quad_less_at_one_site_is_an_error():
    with pytest.raises(ValueError, match="1 of 6 quad x site cells have no record"):
        effects.site_effects(table(three_quads()[:-1]), PARAMS)


def test_both_halves_are_tested_apart():
    rows = three_quads(half="confirmation")
    discovery = {"q4": (3.0, 1.0), "q5": (3.0, 1.0)}
    rows += [
        record(effect, 5.0, quad, half="discovery", component="head", head=head)
        for quad, moved in discovery.items()
        for head, effect in enumerate(moved)
    ]
    found = effects.both_halves(table(rows), PARAMS)
    assert found["half"].tolist() == ["discovery"] * 2 + ["confirmation"] * 2
    assert found["site"].tolist() == ["0.0", "0.1"] * 2
    assert found["estimate"].tolist() == [3.0, 1.0, 2.0, 0.0] and found["quads"].tolist() == [2, 2, 3, 3]
    assert found["p"].tolist()[2:] == [0.5, 1.0], "as for the confirmation half alone"
    one = effects.both_halves(table(three_quads(half="discovery")), PARAMS)
    assert one["half"].tolist() == ["discovery"] * 2 and one["estimate"].tolist() == [2.0, 0.0]


def test_reported_is_confirmation_or_the_only_half():
    both = pd.concat([sites({"0.1": (1, 0, 0, 0)}, "discovery"), sites({"0.2": (1, 0, 0, 0)})], ignore_index=True)
    assert effects.reported(both)["site"].tolist() == ["0.2"]
    assert effects.reported(both[:1])["site"].tolist() == ["0.1"]
    assert [half for half, _ in effects.in_halves(both[::-1])] == ["discovery", "confirmation"]
    assert [half for half, _ in effects.in_halves(both[1:])] == ["confirmation"]


def effects_of(discovery: list[float], confirmation: list[float]) -> pd.DataFrame:
    """Sites 0.0, 0.1, ... with these effects in the two halves."""
    halves = {"discovery": discovery, "confirmation": confirmation}
    return pd.concat(
        [
            sites({f"0.{i}": (value, 0.01, value, 0.0) for i, value in enumerate(values)}, half)
            for half, values in halves.items()
        ],
        ignore_index=True,
    )


def test_sites_are_picked_by_discovery_alone():
    found = site_tables.picked(effects_of([1.0, 3.0, 2.0, -4.0], [9.0, 0.5, 7.0, 8.0]), 2)
    assert found["site"].tolist() == ["0.1", "0.1", "0.2", "0.2"]
    assert found["half"].tolist() == ["discovery", "confirmation"] * 2
    assert found["estimate"].tolist() == [3.0, 0.5, 2.0, 7.0]


@pytest.mark.parametrize(
    ("discovery", "count", "expected"),
    [
        ([2.0, 3.0, 3.0, 2.0], 3, ["0.1", "0.2", "0.0"]),  # ties: in the order of the table
        ([1.0, np.nan, 2.0], 2, ["0.2", "0.0"]),
        ([1.0, 2.0], 5, ["0.1", "0.0"]),  # fewer than asked for
        ([-3.0, -1.0, -2.0], 1, ["0.1"]),  # the largest, not the largest in size
    ],
)
def test_picks_with_ties_nan_and_few_sites(discovery, count, expected):
    found = site_tables.picked(effects_of(discovery, [0.0] * len(discovery)), count)
    assert found["site"].drop_duplicates().tolist() == expected
    alone = effects_of(discovery, [0.0] * len(discovery))[: len(discovery)]
    assert site_tables.picked(alone, count)["site"].tolist() == expected, "one half only"


def test_confirmed_sites_are_significant_and_positive_twice():
    discovery = {
        "0.0": (1.0, 0.01, 0, 0), "0.1": (1.0, 0.01, 0, 0), "0.2": (1.0, 0.2, 0, 0), "0.3": (-1.0, 0.01, 0, 0),
        "0.4": (1.0, 0.01, 0, 0), "0.5": (5.0, 1 - PARAMS.level, 0, 0), "0.6": (0.0, 0.01, 0, 0),
    }  # fmt: skip
    confirmation = {
        "0.0": (1.0, 0.01, 0, 0),  # yes
        "0.1": (1.0, 0.2, 0, 0),  # on discovery only
        "0.2": (1.0, 0.01, 0, 0),  # on confirmation only
        "0.3": (-1.0, 0.01, 0, 0),  # harms
        "0.4": (-1.0, 0.01, 0, 0),  # two signs
        "0.5": (3.0, 0.01, 0, 0),  # just at the level: yes
        "0.6": (1.0, 0.01, 0, 0),  # no effect on discovery
    }
    both = pd.concat([sites(discovery, "discovery"), sites(confirmation)], ignore_index=True)
    found = effects.confirmed(both, PARAMS)
    assert found["site"].tolist() == ["0.5", "0.0"], "the larger confirmation effect first"
    assert set(found["half"]) == {"confirmation"}
    alone = effects.confirmed(both[both["half"] == "discovery"], PARAMS)
    assert alone["site"].tolist() == ["0.5", "0.0", "0.1", "0.4"], "one half: once is enough"
    assert effects.confirmed(both, profile(level=0.995)).empty
    assert effects.confirmed(both.assign(low=-0.1), PARAMS).empty, "the familywise interval must agree"


def test_ablation_tables_leave_out_resid_and_the_names():
    rows = []
    for ablation, effect in (("zero", 1.0), ("mean", 2.0)):
        shared = {"direction": "noise", "ablation": ablation, "component": "mlp"}
        rows += [record(effect, **shared), record(7.0, **shared | {"component": "resid"})]
        rows += [record(8.0, **shared | {"position": "names"})]
    tables = necessity_measure.ablation_tables(table(rows), PARAMS)
    assert list(tables) == ["zero", "mean"], "in the order of the records"
    assert [own[["site", "estimate"]].to_numpy().tolist() for own in tables.values()] == [
        [["mlp 0", 1.0]],
        [["mlp 0", 2.0]],
    ]


def test_layer_tables_hold_whole_modules_of_the_confirmation_half():
    rows = [
        record(1.0, component="mlp", layer=2), record(2.0, component="attn", layer=2),
        record(3.0, component="mlp", layer=2, position="names"), record(9.0, component="head", head=0, layer=2),
        record(9.0, component="resid", layer=2), record(9.0, component="mlp", layer=2, half="discovery"),
        record(9.0, component="attn", layer=2, half="discovery"),
    ]  # fmt: skip
    found = site_tables.layer_table(table(rows), PARAMS)
    kept = found[["position", "component", "estimate"]].to_numpy().tolist()
    assert kept == [["last", "attn", 2 / 4], ["last", "mlp", 1 / 4], ["names", "mlp", 3 / 4]]
    assert site_tables.layer_table(table(rows), PARAMS, ["resid"])["estimate"].tolist() == [9 / 4]


# --- agreement of ablations, answer and foil


def ablated(moved: dict[str, list[float]], quad: str = "q1", **more: object) -> list[dict]:
    """A row for each ablation and MLP, with these effects by layer."""
    shared = {"direction": "noise", "component": "mlp"} | more
    return [
        record(value, quad=quad, layer=layer, ablation=kind, **shared)
        for kind, values in moved.items()
        for layer, value in enumerate(values)
    ]


def test_agreement_is_spearmans_over_sites_of_the_confirmation_half():
    own = {"zero": [1.0, 2.0, 3.0, 4.0], "mean": [2.0, 1.0, 4.0, 3.0], "resample": [4.0, 3.0, 2.0, 1.0]}
    rows = ablated(own)
    # a quad that lent no mean: with it the ranks under zero would be those of (50, 2, 3, 4)
    rows += ablated({"zero": [99.0, 2.0, 3.0, 4.0]}, quad="q2")
    rows += ablated({kind: [9.0, 1.0, 5.0, 3.0] for kind in own}, position="names")
    rows += ablated({kind: [9.0, 1.0, 5.0, 3.0] for kind in own}, component="resid")
    rows += ablated({kind: [9.0, 1.0, 5.0, 3.0] for kind in own}, half="discovery", quad="q3")
    found = necessity_page.agreement(table(rows), ["zero", "mean", "resample"], PARAMS)
    assert list(found) == ["mean", "resample"]
    # ranks 1 2 3 4 and 2 1 4 3 differ by 1 each: 1 - 6 x 4 / (4 x (16 - 1)); the third are turned round
    assert found["mean"].estimate == pytest.approx(0.6) and found["resample"].estimate == pytest.approx(-1.0)
    assert found["mean"].n == 1 and found["mean"].low is None
    turned = necessity_page.agreement(table(rows), ["mean", "resample"], PARAMS)
    assert list(turned) == ["resample"] and turned["resample"].estimate == pytest.approx(-0.6)


def test_agreement_with_ties_and_without_differences():
    found = necessity_page.agreement(
        table(ablated({"zero": [1.0, 1.0, 2.0], "mean": [1.0, 2.0, 3.0]})), ["zero", "mean"], PARAMS
    )
    # ranks 1.5 1.5 3 and 1 2 3: 1.5 / sqrt(1.5 x 2)
    assert found["mean"].estimate == pytest.approx(1.5 / np.sqrt(3))
    level = necessity_page.agreement(
        table(ablated({"zero": [1.0, 1.0, 1.0], "mean": [1.0, 2.0, 3.0]})), ["zero", "mean"], PARAMS
    )
    assert np.isnan(level["mean"].estimate) and level["mean"].low is None


def test_agreement_is_of_the_mean_over_quads_with_the_profiles_interval():
    rng = np.random.default_rng(1)
    values = {kind: rng.normal(size=(MANY, 4)) + np.arange(4) for kind in ("zero", "mean")}
    rows = [
        row
        for quad in range(MANY)
        for row in ablated({kind: own[quad].tolist() for kind, own in values.items()}, quad=f"q{quad:02d}")
    ]
    found = necessity_page.agreement(table(rows), ["zero", "mean"], PARAMS)["mean"]
    own = site_tables.rank_agreement(values["zero"], values["mean"], OWN)
    # logit_diff_after holds 2 - effect, so that effects come back but for rounding
    assert [found.estimate, found.low, found.high] == pytest.approx([own.estimate, own.low, own.high], abs=1e-9)
    assert found.n == MANY and found.low < found.estimate


def test_ablations_without_a_common_quad_do_not_agree_or_disagree():
    rows = ablated({"zero": [1.0, 2.0, 3.0]}) + ablated({"mean": [1.0, 2.0, 3.0]}, quad="q2")
    assert necessity_page.agreement(table(rows), ["zero", "mean"], PARAMS) == {}
    rows = ablated({"zero": [1.0, 2.0, 3.0], "mean": [2.0, 4.0, 6.0]})  # no donors for a resample in this half
    assert list(necessity_page.agreement(table(rows), ["zero", "mean", "resample"], PARAMS)) == ["mean"]


def test_changes_of_answer_and_foil_at_the_sites_in_their_order():
    def row(answer_change: float, foil_change: float, head: int, **more: object) -> dict:
        # candidates a, b, c; the answer is b, the foil before is c, that after is a
        answers = {"answer": "b", "foil_before": "c", "foil_after": "a"}
        logits = {"logits_before": [5.0, 1.0, 2.0], "logits_after": [50.0, 1.0 + answer_change, 2.0 + foil_change]}
        return record(0.0, component="head", head=head, **answers, **logits, **more)

    rows = [
        row(1.0, -1.0, 0), row(2.0, -3.0, 0, pair_id="other"), row(4.0, 0.0, 0, quad="q2"),
        row(0.5, 0.25, 1), row(0.5, 0.25, 1, pair_id="other"), row(0.5, 0.75, 1, quad="q2"),
        row(9.0, 9.0, 2), row(9.0, 9.0, 0, half="discovery", quad="q3"), row(9.0, 9.0, 0, position="names"),
    ]  # fmt: skip
    found = site_tables.answer_and_foil(table(rows), ["0.1", "0.0"], ["a", "b", "c"], PARAMS)
    assert found[["site", "logit", "estimate"]].to_numpy().tolist() == [
        ["0.1", "answer", 0.5],
        ["0.1", "foil", 0.5],  # (0.25 + 0.75) / 2
        ["0.0", "answer", 2.75],  # ((1 + 2) / 2 + 4) / 2
        ["0.0", "foil", -1.0],  # ((-1 - 3) / 2 + 0) / 2
    ]
    assert found["low"].isna().all()
    with pytest.raises(ValueError, match="not among the candidates"):
        site_tables.answer_and_foil(table(rows), ["0.1"], ["a", "b", "d"], PARAMS)


def test_changes_of_answer_and_foil_have_the_profiles_intervals():
    values = [float(i % 5) for i in range(MANY)]
    shared = {"component": "mlp", "answer": "a", "foil_before": "b"}
    rows = [
        record(0.0, quad=f"q{i:02d}", logits_before=[0.0, 0.0], logits_after=[value, -value], **shared)
        for i, value in enumerate(values)
    ]
    found = site_tables.answer_and_foil(table(rows), ["mlp 0"], ["a", "b"], PARAMS)
    (own,) = stats.mean_intervals(np.array(values)[:, None], OWN)
    assert found.loc[0, ["logit", "estimate", "low", "high"]].tolist() == ["answer", 2.0, own.low, own.high]
    assert found.loc[1, ["low", "high"]].tolist() == pytest.approx([-own.high, -own.low])


# --- sites that restore, and the slice


def test_sites_restore_by_share_of_pairs_and_by_the_intervals_lower_end():
    after = {  # margins after patching, of the pairs of the confirmation half
        "0.0": [1.0, -1.0],  # half of the pairs: enough
        "0.1": [1.0, -1.0, -1.0],
        "0.2": [1.0, 0.0, 0.0],  # zero is no answer
        "mlp 0": [1.0, 1.0],
        "0.3": [1.0, 1.0],
        "0.4": [1.0, 1.0],
        "attn 0": [1.0, 1.0],
        "0.5": [1.0, 1.0],
    }
    low = {"0.3": 0.5, "0.4": None, "mlp 0": 0.6}
    own = sites({name: (1.0, 0.01, 0.9, 0.0) for name in after})
    own["ratio_low"] = pd.Series([low.get(name, 0.51) for name in after], dtype=object)
    rows = [
        record(1.0, pair_id=f"p{i}", margin=margin + 1, **place_of(name)._asdict())
        for name, margins in after.items()
        for i, margin in enumerate(margins)
    ]
    # on the discovery half nothing restores, and its table says otherwise: neither is looked at
    rows += [record(1.0, half="discovery", margin=0.0, **place_of(name)._asdict()) for name in after]
    both = pd.concat([own.assign(half="discovery", ratio_low=0.0), own], ignore_index=True)
    frame = table(rows)
    found = sufficiency_page.restoring_sites(frame, both, PARAMS)
    assert found == ["0.0", "mlp 0", "0.5"]
    higher = sufficiency_page.restoring_sites(frame, both, profile(restores_recovery=0.55))
    assert higher == ["mlp 0"]
    more = sufficiency_page.restoring_sites(frame, both, profile(restores_share=0.6))
    assert more == ["mlp 0", "0.5"]
    fewer = sufficiency_page.restoring_sites(frame, both, profile(restores_share=0.3))
    assert fewer == ["0.0", "0.1", "0.2", "mlp 0", "0.5"]


def test_only_an_answer_that_is_there_can_flip():
    rows = [record(1.0, margin=margin + 1, pair_id=f"p{i}") for i, margin in enumerate((1.0, -1.0, 2.0))]
    unanswered = [record(1.0, margin=0.0, pair_id="p3") | {"metric_clean": -0.5}]
    assert coarse_page.flip_share(table(rows + unanswered)).tolist() == pytest.approx([2 / 3])


def test_nothing_restores_without_an_interval():
    rows = three_quads(margin=9.0)
    own = effects.both_halves(table(rows), PARAMS)
    assert own["ratio"].tolist()[0] == pytest.approx(0.3)
    assert sufficiency_page.restoring_sites(table(rows), own, PARAMS) == []


def test_the_slices_order_is_by_discovery_recovery():
    discovery = {
        "0.0": (9.0, 0, 0.1, 0), "0.1": (1.0, 0, 0.5, 0), "mlp 0": (1.0, 0, 0.3, 0), "attn 0": (1.0, 0, 0.9, 0),
        "0.2": (1.0, 0, 0.3, 0), "0.3": (1.0, 0, 0.0, 0), "0.4": (1.0, 0, -0.8, 0), "0.5": (1.0, 0, np.nan, 0),
    }  # fmt: skip
    confirmation = {name: (1.0, 0, 1.0 - values[2], 0) for name, values in discovery.items()}
    both = pd.concat([sites(discovery, "discovery"), sites(confirmation)], ignore_index=True)
    found = sufficiency_measure.slice_order(both, 24)
    # by ratio, not by effect; no whole attention; ties as in the table; only what recovers anything
    assert found["site"].tolist() == ["0.1", "mlp 0", "0.2", "0.0"] and set(found["half"]) == {"discovery"}
    assert sufficiency_measure.slice_order(both, 2)["site"].tolist() == ["0.1", "mlp 0"]
    only = sufficiency_measure.slice_order(both[both["half"] == "confirmation"], 1)
    assert only["site"].tolist() == ["0.4"], "one half only: 1 + 0.8"


def test_growing_sets_are_replaced_in_both_directions(two_pairs):
    """The first site of an order, the first two, ...: every unit has all of them."""
    first, second, third = order = [Site(0, "head", 1), Site(0, "mlp", -1), Site(0, "head", 2)]
    own = SimpleNamespace(prompts=lambda: two_pairs, params=sufficiency_measure.Sufficiency(**SETTINGS))
    units = sufficiency_measure.set_units(own, order)
    assert [unit.options["direction"] for unit in units] == ["denoise", "noise"]
    for unit in units:
        assert unit.options["site_sets"] == [(first,), (first, second), (first, second, third)]
        assert unit.options["role"] == "last" and [pair.pair_id for pair in unit.pairs] == ["p0", "p1"]


def test_slice_curves_name_what_they_measure_and_count_sites():
    rows = []
    for half, direction, moved in (
        ("confirmation", "denoise", (1.0, 2.0)),
        ("confirmation", "noise", (0.5, 1.5)),
        ("discovery", "denoise", (3.0, 3.5)),
        ("discovery", "noise", (2.5, 4.0)),
    ):
        rows += [record(e, half=half, direction=direction, site_set=i, component="mlp") for i, e in enumerate(moved)]
    found = sufficiency_measure.slice_curves(table(rows), PARAMS)
    keys = ["half", "quantity", "n_sites", "estimate"]
    assert found[keys].to_numpy().tolist() == [
        ["discovery", "recovery", 1, 3.0 / 4],
        ["discovery", "recovery", 2, 3.5 / 4],
        ["discovery", "damage", 1, 2.5 / 4],
        ["discovery", "damage", 2, 4.0 / 4],
        ["confirmation", "recovery", 1, 1.0 / 4],
        ["confirmation", "recovery", 2, 2.0 / 4],
        ["confirmation", "damage", 1, 0.5 / 4],
        ["confirmation", "damage", 2, 1.5 / 4],
    ]


def joint(recovery: list[float], damage: list[float], half: str = "discovery") -> pd.DataFrame:
    """Curves of growing sets as `slice_curves` gives them, the largest set first."""
    parts = [
        pd.DataFrame({"n_sites": range(1, len(own) + 1), "estimate": own, "quantity": name, "half": half})
        for name, own in (("recovery", recovery), ("damage", damage))
    ]
    return pd.concat(parts).iloc[::-1].assign(low=np.nan, high=np.nan).reset_index(drop=True)


def test_the_critical_slice_is_the_first_in_which_both_reach_the_share_on_discovery():
    curves = pd.concat([joint([0.5, 0.85, 0.9], [0.9, 0.79, 0.8]), joint([1.0] * 3, [1.0] * 3, "confirmation")])
    found = sufficiency_measure.critical_slice(curves, 0.8)
    # one site: 0.5 and 0.9; two: 0.85 and 0.79; three: 0.9 and 0.8, which is enough
    assert (found.size, found.recovery, found.damage, found.reached) == (3, 0.9, 0.8, True)
    half = sufficiency_measure.critical_slice(curves, 0.5)
    assert (half.size, half.recovery, half.damage) == (1, 0.5, 0.9)
    short = sufficiency_measure.critical_slice(curves, 0.95)
    assert (short.size, short.reached) == (3, False), "as many as were measured"
    only = sufficiency_measure.critical_slice(curves[curves["half"] == "confirmation"], 0.8)
    assert (only.size, only.reached) == (1, True)


# --- tables that are drawn


def test_tables_for_the_figures():
    both = effects_of([1.0, 2.0], [3.0, 4.0])
    beside = site_tables.side_by_side(both, "half")
    assert beside[["site", "discovery", "confirmation"]].to_numpy().tolist() == [["0.0", 1.0, 3.0], ["0.1", 2.0, 4.0]]
    earlier = sufficiency_page.with_earlier(both, [{"site": "0.1", "estimate": 7.0}, {"site": "9.9", "estimate": 8.0}])
    assert earlier[["site", "fall", "rise"]].to_numpy().tolist() == [["0.1", 7.0, 4.0]]
    heads = sites({"0.1": (1.0, 0, 0, 0), "2.0": (2.0, 0, 0, 0), "mlp 1": (9.0, 0, 0, 0)})
    np.testing.assert_array_equal(site_tables.heads_matrix(heads), [[np.nan, 1.0], [2.0, np.nan]])
    assert effects.named(heads).tolist() == heads["site"].tolist()


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.333, 0.281, 0.3849), "0.33 [0.28, 0.38]"),
        ((0.333, None, None), "0.33"),
        ((0.333, 0.2, np.nan), "0.33"),
        ((-0.001, -0.004, 0.004), "0.00 [0.00, 0.00]"),  # no "-0.00"
        ((2.0, 1.5, 2.5, 1), "2.0 [1.5, 2.5]"),
        ((-0.0191, -0.0342, -0.0041), "-0.019 [-0.034, -0.004]"),  # zero is not in it
        ((0.07, 0.00004, 0.14), "0.07 [0.00, 0.14]"),
        ((0.02, -0.004, 0.05), "0.02 [0.00, 0.05]"),
        ((0.001, 0.0002, 0.002), "0.00 [0.00, 0.00]"),
    ],
)
def test_an_estimate_in_a_sentence(numbers, text):
    assert words.interval(*numbers) == text


def test_lists_in_sentences():
    assert [words.listed(letters) for letters in ((), "a", "ab", "abc")] == ["none", "a", "a and b", "a, b and c"]
    assert words.listed(number for number in (1, 2)) == "1 and 2"


# --- sentences


def step(params: Shared, **more: object) -> SimpleNamespace:
    """What the sentences ask of a step."""
    return SimpleNamespace(params=params, record={}, name="step", layers_from="all layers, by the profile", **more)


def told_of_02(frame: pd.DataFrame, folder: Path, **other: object) -> dict:
    """The findings of step 02 from its records."""
    params = coarse_measure.CoarseSweep(**SETTINGS | other)
    curves = coarse_measure.coarse_curves(frame, params)
    critical = coarse_measure.critical_layers(curves, params.critical_share)
    made = coarse_measure.Measured(frame, curves, critical, test_lenses.words(6))
    pairs = pd.DataFrame({name: frame["pair_id"].unique() for name in ("pair_id", "answer", "corrupt_answer")})
    own = step(params, results=folder, write_findings=dict, pairs=lambda: pairs.assign(template="t"))
    return coarse_page.findings(own, made)


def test_what_step_02_says(tmp_path):
    margins = {"discovery": (-1.0, -1.0, -1.0), "confirmation": (-1.0, 1.0, 2.0)}
    recovery = {"discovery": (0.4, 2.0, 4.0), "confirmation": (0.8, 3.2, 4.0)}  # of gaps of 4: 0.1 0.5 1; 0.2 0.8 1
    rows = []
    for half, moved in recovery.items():
        for layer, effect in enumerate(moved):
            shared = {"half": half, "layer": layer, "quad": f"{half}1"}
            rows.append(record(effect, margin=margins[half][layer] + 1, **shared))
            rows.append(record(effect, margin=0.5, direction="noise", **shared))
            rows.append(record(4 - effect, position="names", **shared))
    found = told_of_02(table(rows), tmp_path, aggregator_layer=0)
    assert found["critical_layers"] == (1, 2) and found["critical_rises"] == pytest.approx((0.4, 0.5))
    assert found["critical_share_confirmation"] == pytest.approx(0.6 + 0.2)
    assert found["first_flip_layer"] == {"denoise": 1, "noise": None}
    sample = "(1 pair of 1 quad, confirmation half)"
    assert found["sentences"] == [
        f"At `last` the estimate of recovery crosses one half upwards after layer 2 (picked on the discovery half): "
        f"1.00 there {sample}.",
        f"At `names` the estimate of recovery crosses one half downwards after layer 2 (picked on the discovery half): "
        f"0.00 there {sample}.",
        "Layers 1 and 2 are critical: the fewest whose rises of the denoise curve at `last` make up 80% of it on "
        "the discovery half; the largest rise is that of layer 2.",
        "Together they make up 90% of the curve there, and 80% of it on the confirmation half.",
        "Replacing the residual stream at `last` (denoise): looked for and read on the same pairs, layer 1 is the "
        "first that gives the clean answer in at least 50% of the pairs that the model answers rightly.",
        "Replacing the residual stream at `last` (noise): no layer takes the clean answer away in at least 50% of the "
        "pairs that the model answers rightly.",
        *found["sentences"][-4:-1],
        "The hypothesis of the profile, layer 0, is not among them.",
    ]
    assert found["sentences"][-4].startswith(
        "Whether a person's profession ranks better at the person's own name than at the other name"
    )
    assert found["headline"] == [found["sentences"][i] for i in (2, 1, 0)]
    last = told_of_02(table(rows), tmp_path, aggregator_layer=2)["sentences"][-1]
    assert last == "The hypothesis of the profile, layer 2, is among them."


def test_a_curve_that_never_crosses_is_said_to_stay(tmp_path):
    rows = [record(0.4, layer=layer, position=role) for role, layer in (("last", 0), ("names", 0), ("names", 1))]
    rows += [record(2.0, layer=1), record(3.0, layer=0, position="name_a"), record(3.0, layer=1, position="name_a")]
    said = told_of_02(table(rows), tmp_path)["sentences"]
    # recovery at the last layer is 2 / 4, which is not above one half; at `name_a` it stays at 3 / 4
    half = "(confirmation half)"
    assert said[0] == f"At `last` the estimate of recovery never crosses one half upwards for good {half}."
    assert said[1] == f"At `names` the estimate of recovery is below one half from the first layer on {half}."
    assert said[2] == f"At `name_a` the estimate of recovery never crosses one half downwards for good {half}."


def test_noise_is_set_beside_denoise_of_the_mirror_and_of_no_other_pair():
    people = {
        "clean_a": list("wxyz"),
        "corrupt_a": list("xwzq"),
        "answer": list("wxyz"),
        "corrupt_answer": list("xwzq"),
    }
    pairs = pd.DataFrame({"pair_id": list("abcd"), "template": "t"} | people)
    pairs = pd.concat([pairs, pairs.assign(pair_id=list("efgh"), template="u")], ignore_index=True)
    assert coarse_page.mirrors(pairs) == {"a": "b", "b": "a", "e": "f", "f": "e"}
    moved = {"a": 1.0, "b": 2.0, "e": 4.0, "f": 3.0, "c": 9.0}
    rows = [record(moved[pair], pair_id=pair, direction="noise") for pair in moved]
    own = {"a": 2.0, "b": 1.0, "e": 3.0, "f": 4.0, "c": -9.0}  # what noise does in the mirror
    frame = table(rows + [record(own[pair], pair_id=pair) for pair in own])
    critical = SimpleNamespace(layers=(0,), rises=(1.0,))
    made = coarse_measure.Measured(frame, None, critical, None)
    assert coarse_page.mirror(made, pairs) == {"layer": 0, "correlation": pytest.approx(1.0), "pairs": 4}
    assert coarse_page.mirror(made, pairs.head(3))["correlation"] is None, "two pairs correlate at 1 or -1"
    assert coarse_page.mirror(made, pairs[pairs["pair_id"] == "c"])["pairs"] == 0


def measured(half: str, moved: dict[str, float], quads: int = MANY, **more: object) -> list[dict]:
    """Sites with the same effect in each of as many quads of a half, gaps of 4: every interval is its estimate."""
    return [
        record(effect, quad=f"{half}{quad:02d}", half=half, **place_of(name)._asdict(), **more)
        for name, effect in moved.items()
        for quad in range(quads)
    ]


def test_leading_sites_are_picked_on_discovery_and_told_on_confirmation():
    rows = measured("discovery", {"0.0": 1.0, "0.1": 3.0, "mlp 0": 2.0})
    rows += measured("confirmation", {"0.0": 4.0, "0.1": -1.0, "mlp 0": 2.5})
    own = effects.both_halves(table(rows), PARAMS)
    said = words.top_sites_sentence(own, PARAMS, 2, "damage")
    assert said == (
        "2 of 3 sites are significant familywise in both halves, with a fall above the model's noise (0.001 logits). "
        "Of largest damage on the discovery half is head 0.1 (-1.00 [-1.00, -1.00]), before mlp 0; in brackets the "
        "fall of logit_diff on the confirmation half (logits, familywise 90% intervals). Not "
        "significant of these: head 0.1."
    )
    rise = words.top_sites_sentence(own, PARAMS, 2, "recovery")
    assert "the rise of logit_diff on the" in rise and "with a rise above the model's noise" in rise
    assert words.top_sites_sentence(own.assign(p=1.0), PARAMS, 2, "damage").endswith(" Not significant of these: all.")
    alone = words.top_sites_sentence(own[own["half"] == "discovery"], PARAMS, 1, "damage")
    assert alone.endswith("picked and reported on the same data.")
    few = words.top_sites_sentence(own.assign(low=np.nan), PARAMS, 1, "damage")
    assert "is head 0.1 (-1.00); in brackets" in few and "half (logits; fewer than 20 quads: no intervals)." in few
    assert words.top_sites(own, 1) == "head 0.1 (-1.00 [-1.00, -1.00])"
    assert words.heads_or_mlps(own, PARAMS, "damage") == (
        "Significant in both halves are one head, one MLP and no attention modules. Of these, the largest damage on "
        "the discovery half is that of head 0.0 among heads (1.00 [1.00, 1.00] of the gap) and mlp 0 among MLPs (0.62 "
        "[0.62, 0.62] of the gap); in brackets what the confirmation half gives."
    ), "0.1, the largest on discovery, is not significant on confirmation"
    assert "The largest damage on the discovery half is that of head 0.1 among heads (" in words.heads_or_mlps(
        own.assign(low=np.nan), PARAMS, "damage"
    )
    none = words.heads_or_mlps(own.assign(p=1.0), PARAMS, "damage")
    assert none == "Significant in both halves are no heads, no MLPs and no attention modules."
    handed = words.site_rows(own)
    assert [row["site"] for row in handed] == ["0.0", "0.1", "mlp 0"]
    assert handed[0] | {"p": 0, "low": 0, "high": 0, "ratio_low": 0, "ratio_high": 0} == {
        "site": "0.0", "layer": 0, "component": "head", "head": 0, "estimate": 4.0, "ratio": 1.0, "discovery": 1.0,
        "p": 0, "low": 0, "high": 0, "ratio_low": 0, "ratio_high": 0,
    }  # fmt: skip


def test_what_step_03_says(tmp_path):
    moved = {"0.0": 1.0, "0.1": 2.0, "mlp 0": 3.0, "attn 0": 0.5, "resid 0": 3.0}
    turned = {"0.0": 3.0, "0.1": 2.0, "mlp 0": 1.0, "attn 0": 0.5, "resid 0": 4.0}
    shared = {"direction": "noise"}
    rows = measured("discovery", moved, ablation="zero", **shared)
    rows += measured("confirmation", moved, ablation="zero", **shared)
    rows += measured("confirmation", turned, quads=MANY - 1, ablation="mean", **shared)
    aside = {"ablation": "counterfactual", "position": "between"}
    rows += measured("confirmation", {"mlp 0": 1.0, "attn 0": 1.4}, **aside, **shared)
    frame, params = table(rows), necessity_measure.Necessity(**SETTINGS | {"ablations": ("zero", "mean")})
    seen = {"mirror": {"layer": 0, "correlation": 0.971, "pairs": 20}}
    own = step(params, results=tmp_path, write_findings=dict, n_layers=1, beside={"coarse_sweep": seen}.get)
    tables = necessity_measure.ablation_tables(frame[frame["position"] == "last"], params)
    made = necessity_measure.Measured(frame, tables, necessity_measure.lead_of(tables))
    found = necessity_page.findings(own, made)
    # ranks under zero 2 3 4 1, under mean 4 3 2 1: differences 2 0 2 0: 1 - 6 x 8 / (4 x 15) = 0.2
    assert found["agreement"]["mean"].estimate == pytest.approx(0.2)
    said = found["sentences"]
    assert said[0] == (
        "Each site at `last` was ablated in the clean run, all layers, by the profile; the confirmation half has "
        "20 pairs of 20 quads."
    )
    assert "zero damage" in said[1]
    assert "mlp 0 (3.00 [3.00, 3.00]), before head 0.1, head 0.0 and attn 0;" in said[1]
    assert said[3] == (
        "No class-neutral ablation could be run in both halves, so necessity is not judged here: what follows is about "
        "`zero`. `counterfactual` noise in a pair is denoise in its mirror pair. The two effects of the residual "
        "stream at `last` after layer 0 correlate at 0.97, without an interval (20 pairs whose mirror was swept, too)."
    )
    assert said[4].startswith(
        "The ceiling of the ablation, what `zero` does to the whole residual stream of the last layer at `last`, is "
        "0.75 [0.75, 0.75] of the gap"
    )
    assert said[5].endswith(
        "| mlp 0 | 1.00 [1.00, 1.00] | 0.25 |\n| 0.1 | 0.67 [0.67, 0.67] | 0.50 |\n"
        "| 0.0 | 0.33 [0.33, 0.33] | 0.75 |\n| attn 0 | 0.17 [0.17, 0.17] | 0.12 |"
    )
    assert "| ceiling (share of the gap) | 0.75 [0.75, 0.75] | 1.00 (no interval: 19 clusters" in said[5]
    assert said[6].startswith("Over sites, effects rank as under `zero` with a Spearman correlation of 0.20")
    assert said[7] == (
        "Under `mean`, the largest damage on the discovery half is that of head 0.0 (3.00), before head 0.1 and mlp 0; "
        "in brackets what the confirmation half gives (logits; fewer than 20 quads: no intervals)."
    )
    assert said[8].startswith("`mean` is there for 19 of 40 pairs: the others lack donors")
    alone = frame[(frame["position"] != "between") | (frame["component"] == "attn")]
    (told,) = (
        text for text in necessity_page.findings(own, made._replace(records=alone))["sentences"] if "At `b" in text
    )
    assert told.startswith("At `between`, the attention module of largest counterfactual damage is attn 0: ")
    assert said[9] == (
        "At `between`, the attention or MLP module of largest counterfactual damage is attn 0: 0.35 [0.35, 0.35] of "
        "the gap (picked and reported on the same pairs)."
    )
    assert found["ablation"] == "zero" and len(found["sites"]) == 4 and found["headline"] == [*said[1:3], said[4]]
    only = frame[frame["ablation"] == "zero"]
    alone = necessity_measure.Measured(only, necessity_measure.ablation_tables(only, params), "zero")
    said = necessity_page.findings(own, alone)["sentences"]
    assert said[6] == "Only `zero` was run." and said[7].startswith("`mean` is there for 0 of 40 pairs")


def test_a_share_of_the_ceiling_is_over_the_same_quads_and_has_an_interval():
    lost, most = [float(i % 3) for i in range(MANY)], [4.0 + i % 5 for i in range(MANY)]
    shared = {"direction": "noise", "ablation": "resample"}
    rows = many(lost, [10.0] * MANY, component="mlp", **shared) + many(most, [10.0] * MANY, **shared)
    rows += many([9.0] * MANY, [10.0] * MANY, layer=1, component="mlp", position="names", **shared)
    (row,) = necessity_page.of_ceiling(table(rows), 1, PARAMS).itertuples()
    own = stats.ratio_intervals(lost, most, OWN)[0]
    assert [row.site, row.ablation] == ["mlp 0", "resample"]
    assert [row.estimate, row.low, row.high] == pytest.approx([own.estimate, own.low, own.high])
    # 0 + 1 + 2 in turn: 19; 4 + 5 + 6 + 7 + 8, four times: 120
    assert row.estimate == pytest.approx(19 / 120)
    (limit,) = effects.damages(necessity_page.at_ceiling(table(rows), 1), PARAMS).values()
    assert limit.estimate == pytest.approx(120 / 200)
    none = table(rows + many([-most for most in most], [10.0] * MANY, **shared | {"ablation": "zero"}))
    assert {*necessity_page.of_ceiling(none, 1, PARAMS)["ablation"]} == {"resample"}, "no ceiling above zero: no share"


def test_a_class_neutral_ablation_leads_where_both_halves_have_it():
    moved = {"zero": [1.0, 2.0], "counterfactual": [3.0, 4.0], "mean": [5.0, 6.0], "resample": [7.0, 8.0]}
    rows = ablated(moved) + ablated(moved, half="discovery", quad="q2")

    def run(frame: pd.DataFrame) -> necessity_measure.Measured:
        params = necessity_measure.Necessity(**SETTINGS)
        return necessity_measure.run(SimpleNamespace(params=params, table=lambda _: frame))

    made = run(table(rows))
    assert made.lead == "resample" and list(made.sites) == ["resample", "zero", "counterfactual", "mean"]
    assert effects.reported(made.sites["resample"])["estimate"].tolist() == [7.0, 8.0]
    once = run(table([row for row in rows if (row["ablation"], row["half"]) != ("resample", "discovery")]))
    assert once.lead == "mean"
    assert run(table([row for row in rows if row["ablation"] in ("zero", "counterfactual")])).lead == "zero"


def test_what_step_04_says(tmp_path):
    moved = {"0.0": 3.0, "0.1": 0.5, "mlp 0": 1.0}
    frame = table(measured("discovery", moved, margin=2.0) + measured("confirmation", moved, margin=2.0))
    own = effects.both_halves(frame, PARAMS)
    order = sufficiency_measure.slice_order(own, 24)
    assert order["site"].tolist() == ["0.0", "mlp 0", "0.1"]
    joint = [
        record(effect, half=half, direction=direction, site_set=i, quad=f"{half}{quad:02d}")
        for half in ("discovery", "confirmation")
        for direction, values in (("denoise", (3.0, 3.6, 3.8)), ("noise", (2.0, 3.4, 3.6)))
        for i, effect in enumerate(values)
        for quad in range(MANY)
    ]
    curves = sufficiency_measure.slice_curves(table(joint), PARAMS)  # recovery 0.75 0.9 0.95, damage 0.5 0.85 0.9

    def found(**other: float) -> dict:
        params = sufficiency_measure.Sufficiency(**SETTINGS | other)
        critical = sufficiency_measure.critical_slice(curves, params.slice_share)
        made = sufficiency_measure.Measured(frame, own, order, table(joint), curves, critical)
        pairs = pd.DataFrame({"pair_id": frame["pair_id"].unique(), "answer": "artist", "corrupt_answer": "writer"})
        pairs = pairs.assign(clean_a="Ann", clean_b="Bo", corrupt_a="Cy", corrupt_b="Di", corrupt_c="Ed")
        taken_out = {"ablation": "resample", "sites": words.site_rows(own.assign(estimate=-1.5))}
        own_step = step(params, results=tmp_path, write_findings=dict, pairs=lambda: pairs, beside=lambda _: taken_out)
        return sufficiency_page.findings(own_step, made)

    good = found()
    (shown,) = re.findall(r'application/json">(.*?)</script>', (tmp_path / "step.map.html").read_text())
    shown = json.loads(shown)
    assert shown["marked"] == ["0.0", "mlp 0"] and shown["lines"] == ["1", "0", "mlp"]
    assert [one["estimate"] for one in shown["shown"]] == [[50, 300, 100], [-150, -150, -150]]
    assert shown["effects"]["0.0"] == [300] * 2 * MANY
    assert shown["pairs"][0][:2] == ["Ann and Bo (artist)", "Cy, Di and Ed (writer)"]
    assert good["restoring"] == ["0.0"] and [row["site"] for row in good["critical_slice"]] == ["0.0", "mlp 0"]
    assert good["critical_slice_reached"] and [row["quantity"] for row in good["joint"]] == ["recovery", "damage"]
    assert [row["estimate"] for row in good["joint"]] == pytest.approx([0.9, 0.85])
    said = good["sentences"]
    assert said[0] == (
        "Single sites that restore the answer on their own: head 0.0. Head 0.0, first in order of discovery recovery, "
        "recovers 0.75 [0.75, 0.75] of the gap."
    )
    assert said[3] == (
        "Heads and MLPs put into the corrupt run together, in order of discovery recovery, bring back 0.90 [0.90, "
        "0.90] of the gap with the first 2 (confirmation half). But there is no edge at 2: from there to all that "
        "were measured (3 sites) the curve rises by 0.05 [0.05, 0.05]. What is called the critical slice is cut off "
        "where the share that the profile asks for (80%) is reached."
    )
    assert said[4] == (
        "The critical slice, heads and MLPs added in order of discovery recovery, has 2 sites and reaches 80% in both "
        "on the discovery half: head 0.0 and mlp 0."
    )
    assert said[5] == (
        "On the confirmation half its joint recovery is 0.90 [0.90, 0.90] of the gap and its joint counterfactual "
        "damage 0.85 [0.85, 0.85]."
    )
    assert said[6].startswith("The slice as a whole restores the answer: with its clean values the clean answer comes ")
    assert "first in 20 of the 20 confirmation" in said[6]
    assert "The slice's sites come first again in 100% of bootstraps" in said[7] and ", 2 of the first 2 are" in said[7]
    assert "Together they recover 0.95 [0.95, 0.95] of the gap" in said[8]
    assert good["headline"] == [said[0], *said[3:8]] and said[9] == sufficiency_page.placebo_page.NONE
    assert [figure["file"] for figure in good["figures"]] == [
        f"figures/step-{name}.png" for name in ("slice", "ranks", "ranked")
    ]
    short = found(slice_share=0.99, restores_recovery=0.8)["sentences"]
    assert short[0].startswith("No single head or MLP restores the answer on its own. Head 0.0, first in order")
    assert "does not reach 99% in both on the discovery half: " in short[4]
    assert "There its recovery is 0.95 and its damage 0.90 (no intervals)." in short[4]
    one = found(slice_share=0.5)["sentences"]
    assert one[4].endswith("has 1 site and reaches 50% in both on the discovery half: head 0.0.")


def test_a_question_that_was_not_asked_has_an_answer():
    bare = step(PARAMS, beside=lambda _: {})
    bare.params = SimpleNamespace(components=("mlp",))
    assert sufficiency_page.heads(bare, None).data == necessity_page.heads(bare, None).data
    assert "`components` does not name them" in necessity_page.heads(bare, None).data
    assert "Step 03 has left no findings" in sufficiency_page.against_necessity(bare, None).data


def test_the_slices_order_is_told_apart_from_that_of_the_leading_sites():
    """Of quads with unequally many pairs, mlp 0 moves the small one by more: first by logits, second by share."""
    rows = []
    for half, quad, number in itertools.product(("discovery", "confirmation"), range(2), range(3)):
        for site, moved in {(0, "head"): (3.0, 1.0), (-1, "mlp"): (1.0, 3.5)}.items():
            if quad == 0 or number == 0:
                about = {"component": site[1], "head": site[0], "pair_id": f"{half}{quad}{number}", "half": half}
                rows.append(record(moved[quad], 4, f"{half}{quad}", **about))
    frame = table(rows)
    own = effects.both_halves(frame, PARAMS)
    order = sufficiency_measure.slice_order(own, 24)
    critical = effects.CriticalSlice(2, 0.9, 0.9, True)
    made = sufficiency_measure.Measured(frame, own, order, frame, frame, critical)
    assert sufficiency_page.two_orders(made).endswith("place 1: head 0.0 by share, mlp 0 by logits.")
    assert sufficiency_page.alone_sentence(made, []) == (
        "There are too few quads to say of a single head or MLP that it restores the answer on its own. Head 0.0, "
        "first in order of discovery recovery, recovers 0.62 of the gap."
    )


@pytest.mark.parametrize(("effect", "lead", "met"), [(3.6, 2.0, True), (3.6, 0.5, False), (1.0, 2.0, False)])
def test_a_slice_restores_the_answer_by_the_definition_for_single_sites(effect, lead, met):
    """Of a gap of 4, 3.6 is enough and 1 is not; where the margin stays below zero, the clean answer does not lead."""
    rows = [
        record(value, half=half, direction=direction, site_set=i, quad=f"{half}{quad}", margin=lead if i else 5.0)
        for half, quad, direction, (i, value) in itertools.product(
            ("discovery", "confirmation"), range(20), ("denoise", "noise"), enumerate((0.1, effect))
        )
    ]
    curves = effects.reported(sufficiency_measure.slice_curves(table(rows), PARAMS))
    found = sufficiency_page.slice_restores(table(rows), curves[curves["n_sites"] == 2], PARAMS)
    assert found == {"share": float(lead > 1), "pairs": 20, "back": 20 * (lead > 1), "restores": met}


def test_a_step_of_a_task_that_the_model_cannot_do_says_why():
    able = SimpleNamespace(why="accuracy 0.20 on 20 prompts")
    found = words.not_done(step(PARAMS, able=lambda: able))
    assert found["able"] is False and found["figures"] == []
    assert found["sentences"] == ["Nothing was computed for the task `superset`: accuracy 0.20 on 20 prompts"]
