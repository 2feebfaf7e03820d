"""The figures: that what is drawn is what was given, to the number."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.colors import to_hex, to_rgb

from report import plots


def intervals(estimate, reach=0.1, **columns):
    estimate = np.asarray(estimate, dtype=float)
    return pd.DataFrame({**columns, "estimate": estimate, "low": estimate - reach, "high": estimate + reach})


def segments(axes) -> np.ndarray:
    """Ends of all interval lines: (n, 2 ends, 2 coordinates)."""
    lines = [line for c in axes.collections if isinstance(c, LineCollection) for line in c.get_segments()]
    return np.array([line for line in lines if len(line)])  # matplotlib keeps no point of a line to NaN


def points(axes) -> np.ndarray:
    return np.concatenate([np.array(c.get_offsets()) for c in axes.collections if isinstance(c, PathCollection)])


def test_layer_curve():
    frame = pd.concat(
        [intervals([0.1, 0.5], layer=[0, 1], position="names", direction=d) for d in ("denoise", "noise")]
        + [intervals([0.9, 0.7], layer=[1, 0], position="last", direction="noise")]
    )
    figure = plots.layer_curve(frame, "recovery (share)", panel="direction", marked=[1])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["denoise", "noise"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[1].lines}
    assert lines["last"] == [[0, 0.7], [1, 0.9]] and lines["names"] == [[0, 0.1], [1, 0.5]]
    band = next(c for c in figure.axes[0].collections if isinstance(c, PolyCollection)).get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.0) and band[:, 1].max() == pytest.approx(0.6)
    assert figure.axes[0].patches[0].get_x() == 0.5  # the marked layer, from half a layer before to half a layer after
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["names", "last"]  # the second panel's, too
    assert figure.get_supylabel() == "recovery (share)" and figure.axes[1].get_xlabel() == "layer"


def test_a_legend_has_as_many_columns_as_there_is_room_for():
    assert plots.legend_columns(["denoise", "noise"]) == 2 and plots.legend_columns(["x"] * 7) == 6
    assert plots.legend_columns(["x" * 20] * 5) == 3, "25 letters each, in 90"
    assert plots.legend_columns(["x" * 99] * 2) == 1


def test_heat_map_is_centred_at_zero_and_marks_cells():
    matrix = np.array([[0.1, -0.4, np.nan], [0.2, 0.0, 0.3]])
    figure = plots.heat_map(
        matrix, "damage (share)", significant=np.array([[0, 1, np.nan], [0, 0, 1.0]]), layers=[20, 21]
    )
    axes, bar = figure.axes
    image = axes.images[0]
    assert (image.norm.vmin, image.norm.vcenter, image.norm.vmax) == (-0.4, 0, 0.4)
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), matrix.T)  # layers to the right
    assert points(axes).tolist() == [[0, 1], [1, 2]]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["20", "21"]
    assert bar.get_ylabel() == "damage (share)"
    middle = image.cmap(image.norm(0.0))[:3]
    assert max(middle) - min(middle) < 0.02 and min(middle) > 0.9  # zero is white


def test_heat_maps_share_a_scale():
    figure = plots.heat_map({"zero": np.eye(3), "mean": np.eye(3) * -2}, "change (logits)", {"mean": np.eye(3) > 0})
    norms = [axes.images[0].norm for axes in figure.axes[:2]]
    assert [(norm.vmin, norm.vmax) for norm in norms] == [(-2, 2), (-2, 2)]
    assert len(points(figure.axes[1])) == 3 and not any(
        isinstance(c, PathCollection) for c in figure.axes[0].collections
    )


def test_heat_map_of_zeros_and_of_nothing():
    plots.heat_map(np.zeros((2, 2)), "damage")
    for bad in (np.full((2, 2), np.nan), np.zeros(3), {}, {"a": np.zeros((2, 2)), "b": np.zeros((2, 3))}):
        with pytest.raises(ValueError, match="heat_map"):
            plots.heat_map(bad, "damage")


def test_layer_bars():
    frame = pd.concat([intervals([0.2, -0.1], layer=[3, 4], component=c) for c in ("attn", "mlp")])
    (axes,) = plots.layer_bars(frame, "damage (share)").axes
    assert [bar.get_height() for bar in axes.patches] == [0.2, -0.1, 0.2, -0.1]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    assert centres == pytest.approx([2.8, 3.8, 3.2, 4.2])
    assert segments(axes)[:, :, 1] == pytest.approx(np.array([[0.1, 0.3], [-0.2, 0.0]] * 2))
    assert segments(axes)[:, 0, 0] == pytest.approx(centres)


def test_ranked_sites_keeps_the_order_and_shows_halves_apart():
    frame = pd.concat([intervals([3, 2], site=["21.6", "mlp 3"], half=h) for h in ("discovery", "confirmation")])
    (axes,) = plots.ranked_sites(frame, "change (logits)").axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["21.6", "mlp 3"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    assert points(axes)[:, 0].tolist() == [3, 2, 3, 2] and len(np.unique(points(axes)[:, 1])) == 4
    assert segments(axes)[:, :, 0] == pytest.approx(np.array([[2.9, 3.1], [1.9, 2.1]] * 2))


def test_no_interval_is_drawn_hollow():
    frame = intervals([1, 2], site=["a", "b"], half="discovery").astype({"low": object, "high": object})
    frame.loc[1, ["low", "high"]] = None
    (axes,) = plots.ranked_sites(frame, "change (logits)").axes
    faces = [to_hex(face) for c in axes.collections if isinstance(c, PathCollection) for face in c.get_facecolors()]
    assert faces == [plots.GREY, "#ffffff"]
    assert segments(axes)[:, :, 0].tolist() == [[0.9, 1.1]]


def test_an_interval_beside_its_estimate_is_drawn_where_it_is():
    frame = pd.DataFrame({"site": ["a"], "half": ["discovery"], "estimate": [1.0], "low": [1.2], "high": [1.5]})
    (axes,) = plots.ranked_sites(frame, "change (logits)").axes
    assert segments(axes)[0, :, 0].tolist() == [1.2, 1.5]


def test_agreement():
    frame = pd.DataFrame(
        {"site": ["1.0", "2.0"], "d": [0.5, -1.0], "c": [0.4, -0.8], "c_low": [0.3, -1], "c_high": [0.6, 0]}
    )
    (axes,) = plots.agreement(frame, "d", "c", "discovery (logits)", "confirmation (logits)", named=["2.0"]).axes
    assert points(axes).tolist() == [[0.5, 0.4], [-1.0, -0.8]]
    assert segments(axes).tolist() == [[[0.5, 0.3], [0.5, 0.6]], [[-1.0, -1.0], [-1.0, 0.0]]]
    assert [text.get_text() for text in axes.texts] == ["2.0"]
    assert axes.get_xlim() == axes.get_ylim() and (axes.get_xlabel(), axes.get_ylabel())[1] == "confirmation (logits)"


def test_answer_and_foil_are_apart():
    frame = pd.concat(
        [intervals([-1, -0.5], site=["a", "b"], logit="answer"), intervals([2, 1], site=["a", "b"], logit="foil")]
    )
    (axes,) = plots.answer_and_foil(frame).axes
    assert [bar.get_height() for bar in axes.patches] == [-1, -0.5, 2, 1]
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2


def test_accuracy_bars_with_chance():
    """Each bar has the chance of its own task, and one that has none has no line."""
    frame = intervals([0.9, 0.7, 0.4], task=["superset", "odd_one_out", "superset"], chance=[0.2, 1 / 3, np.nan])
    (axes,) = plots.accuracy_bars(frame, "task", by="task").axes
    assert [bar.get_height() for bar in axes.patches] == [0.9, 0.4, 0.7]
    lines = [line for c in axes.collections if isinstance(c, LineCollection) for line in c.get_segments()]
    level = {round(float(line[0, 1]), 3): line[:, 0] for line in lines if len(line) and line[0, 1] == line[1, 1]}
    assert {*level} == {0.2, 0.333}
    assert level[0.2].max() < 0.5 < level[0.333].min(), "each over its own bar"
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["chance", "superset", "odd_one_out"]


def test_fame_match():
    frame = pd.DataFrame({"fame_clean": [1.0, 2.0], "fame_corrupt": [1.2, 1.9], "half": ["discovery", "confirmation"]})
    (axes,) = plots.fame_match(frame, "margin (logits)", tolerance=0.5).axes
    assert sorted(points(axes).tolist()) == [[1.0, 1.2], [2.0, 1.9]]
    band = next(c for c in axes.collections if isinstance(c, PolyCollection)).get_paths()[0].vertices
    assert [band[:, 1].min(), band[:, 1].max()] == pytest.approx([0.5, 2.5])


def test_slice_curve():
    parts = [
        intervals([0.3, 0.9], n_sites=[1, 2], quantity=q, half=h)
        for h in ("discovery", "confirmation")
        for q in ("recovery", "damage")
    ]
    figure = plots.slice_curve(pd.concat(parts), 0.75, sites=["21.6", "mlp 3"])
    axes = figure.axes[1]
    assert any(set(line.get_ydata()) == {0.75} for line in axes.lines)
    assert points(axes)[:, 1].tolist() == [0.3, 0.9, 0.3, 0.9] and len(segments(axes)) == 4
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1\n+ 21.6", "2\n+ mlp 3"]


def test_wrong_frames_say_what_is_missing():
    with pytest.raises(
        ValueError, match=r"layer_curve: the frame lacks the column\(s\) position; it has layer, estimate"
    ):
        plots.layer_curve(intervals([1], layer=[0]), "x")
    with pytest.raises(ValueError, match="ranked_sites: the frame has no rows"):
        plots.ranked_sites(intervals([], site=[], half=[]), "x")


def test_save_writes_the_same_bytes(tmp_path):
    def draw(folder):
        frame = intervals([0.1, 0.5], layer=[0, 1], position="last")
        return plots.save(plots.layer_curve(frame, "recovery (share)"), tmp_path / folder, "coarse_sweep", "curve")

    assert draw("one") == draw("two") == "figures/coarse_sweep-curve.png"
    for kind in ("png", "svg"):
        one, two = ((tmp_path / f / f"figures/coarse_sweep-curve.{kind}").read_bytes() for f in ("one", "two"))
        assert one == two and b"matplotlib.org" not in one and b"dc:date" not in one
    assert (
        matplotlib.image.imread(tmp_path / "one/figures/coarse_sweep-curve.png").shape[1] == 1125
    )  # 7.5 inches at 150


def test_a_figure_shows_itself_and_leaves_no_state():
    before = dict(matplotlib.rcParams)
    figure = plots.accuracy_bars(intervals([0.9], superset=["artist"], chance=[0.2]))
    assert set(figure._repr_mimebundle_()) == {"image/png", "text/plain"}
    assert dict(matplotlib.rcParams) == before


def test_colours_differ_in_lightness_or_hue_for_every_eye():
    """Each word has one colour, and words drawn together never share theirs."""
    for together in (
        ("noise", "denoise"),
        ("discovery", "confirmation"),
        ("name_a", "name_b", "names", "last", "swapped"),
        ("resid", "attn", "mlp", "head"),
        ("zero", "mean", "resample", "counterfactual"),
        ("answer", "foil"),
    ):
        colours = np.array([to_rgb(plots.COLOURS[word]) for word in together])
        grey = colours @ [0.2126, 0.7152, 0.0722]
        far = np.abs(colours[:, None] - colours).max(-1) + np.abs(grey[:, None] - grey)
        assert far[~np.eye(len(together), dtype=bool)].min() > 0.25, together


def test_a_forest_says_the_quads_of_every_estimate_of_a_row():
    rows = [("superset gap", "artist", 12), ("placebo gap", "artist", 9), ("superset gap", "writer", 7)]
    frame = pd.DataFrame(rows, columns=["quantity", "group", "quads"]).assign(kind="region")
    frame = frame.assign(estimate=0.5, low=None, high=None)
    (axes,) = plots.forest(frame, "recovery").axes
    assert [text.get_text() for text in axes.texts] == ["", "12, 9", "7", "quads"]
    same = plots.forest(frame.assign(quads=12), "recovery").axes[0]
    assert [text.get_text() for text in same.texts][1] == "12"


OWN = "Here is a fact: {a} and {b} are both known as"


def test_the_text_of_a_template_is_cut_where_it_is_a_label():
    other, shares = OWN.replace("fact", "rule"), [0.1, 0.2, 0.3]
    short, second = "Here is a ... known as", "Here is a ... known as (2)"
    assert plots.brief([OWN, "profession_both", other, OWN]) == [short, "profession_both", second, short]
    assert plots.brief(["{a} is a", "a long name of a class, without a slot"])[1].endswith("a slot"), "no template"
    assert plots.brief(["x" * 30 + "{a}"]) == ["x" * 12 + " ... " + "x" * 9 + "{a}"], "one word"

    names = [OWN, "both_famous", other]
    bars = plots.accuracy_bars(intervals(shares, template=names, task="superset", chance=0.2), "template", by="task")
    matrix = plots.class_matrices({"": pd.DataFrame(np.eye(3), index=names, columns=names)}, "share")
    rows = plots.forest(intervals(shares, kind="template", group=names, quantity="recovery", quads=9), "recovery")
    legend = plots.ranked_sites(intervals(shares, site=["1.0", "1.1", "1.2"], order=names), "rank", by="order")
    shown = [axes.get_text() for axes in bars.axes[0].get_xticklabels()]
    assert shown == [short, "both_famous", second]
    for labels in (matrix.axes[0].get_xticklabels(), matrix.axes[0].get_yticklabels(), legend.legends[0].get_texts()):
        assert [label.get_text() for label in labels] == shown
    assert [label.get_text() for label in rows.axes[0].get_yticklabels()] == ["template", *shown]
