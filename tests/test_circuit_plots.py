"""The figures of steps 05 to 07: that what is drawn is what was given."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.patches import PathPatch

from report import plots

COLUMNS = [("names", ["names"]), ("at the names", ["mlp 23 at names"]), ("slice", ["21.6", "mlp 23"]), ("", ["answer"])]
EDGES = pd.DataFrame(
    [
        ("names", "mlp 23 at names", 2.0, True), ("mlp 23 at names", "21.6", -1.0, True),
        ("21.6", "mlp 23", 0.5, True), ("mlp 23", "answer", 0.3, False), ("21.6", "answer", 0.15, False),
    ],
    columns=["source", "target", "estimate", "significant"],
)  # fmt: skip


def drawn(figure) -> dict:
    """Lines by where they start and end."""
    lines = [patch for patch in figure.axes[0].patches if isinstance(patch, PathPatch)]
    return {tuple(np.round(line.get_path().vertices[[0, -1]].ravel(), 2)): line for line in lines}


def test_a_graph_has_lanes_by_role_and_rows_by_layer():
    lanes = [*COLUMNS[:2], ("slice", ["21.6", "23.4", "mlp 23"]), ("", ["answer"])]
    places, layers = plots.laid_out(lanes)
    assert layers == ["", "21", "23", "", ""]
    assert places == {
        "names": (0, 0),
        "21.6": (2, 1),
        "mlp 23 at names": (1, 2),
        "23.4": (2, 2),
        "mlp 23": (2, 3),
        "answer": (3, 4),
    }
    words = [text.get_text() for text in plots.circuit_graph(lanes, EDGES).axes[0].texts]
    assert words.count("mlp 23") == 2 and {"layer 21", "layer 23", "slice", "answer", "2.00", "−1.00"} <= set(words)


def test_a_graph_draws_effects_as_widths():
    figure = plots.circuit_graph(COLUMNS, EDGES)
    lines = drawn(figure)
    first, second, last = lines[0.12, 0, 0.88, 2], lines[1.12, 2, 1.88, 1], lines[2.12, 2, 2.88, 3]
    inside = lines[2.12, 1, 2.12, 2]
    assert len(lines) == 5 and first.get_linewidth() == 9
    assert second.get_linewidth() == pytest.approx(9 * 0.5**0.5) and last.get_linewidth() == pytest.approx(
        9 * 0.15**0.5
    )
    assert to_hex(first.get_edgecolor()) == plots.BLUE.lower()
    assert to_hex(second.get_edgecolor()) == plots.VERMILION.lower()
    assert inside.get_path().vertices[:, 0].max() > 2.2  # around the lane
    assert to_hex(last.get_edgecolor()) == plots.GREY and last.get_linestyle() != "-"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:3] == ["raises logit_diff", "lowers it", "not significant"]
    few = plots.circuit_graph(COLUMNS, EDGES.assign(significant=False, low=np.nan))
    assert to_hex(drawn(few)[2.12, 2, 2.88, 3].get_edgecolor()) == plots.BLUE.lower(), (
        "not tested is not 'not significant'"
    )
    assert "not significant" not in [text.get_text() for text in few.legends[0].get_texts()]


def test_a_graph_of_many_paths_shows_the_strongest():
    many = pd.concat([EDGES.assign(estimate=EDGES["estimate"] / scale) for scale in range(1, 11)])
    figure = plots.circuit_graph(COLUMNS, many)
    count = sum(isinstance(patch, PathPatch) for patch in figure.axes[0].patches)
    assert plots.EDGES <= count < plots.EDGES + 5
    assert f"{count} of 50 paths: " in [text.get_text() for text in figure.legends[0].get_texts()][-1]


def test_a_graph_refuses_what_it_cannot_place():
    with pytest.raises(ValueError, match="edges name '9.9', which is in no lane; the nodes are names, 21.6, mlp 23 at"):
        plots.circuit_graph(COLUMNS, EDGES.replace("21.6", "9.9"))
    with pytest.raises(ValueError, match="the node 'names' is in two lanes"):
        plots.circuit_graph([*COLUMNS, ("again", ["names"])], EDGES)


def test_probe_bars():
    rows = [
        (label, template, centred, 0.1 * number, 0.0, 0.9, chance)
        for number, (label, template, centred, chance) in enumerate(
            (label, template, centred, chance)
            for label in ("superset", "profession")
            for template, chance in (("profession_is", 0.2), ("{a} is a", 0.3))
            for centred in (False, True)
        )
    ]
    frame = pd.DataFrame(rows, columns=["label", "template", "centred", "estimate", "low", "high", "chance"])
    figure = plots.probe_bars(frame)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["superset", "profession"]
    for axes, first in zip(figure.axes, (0, 4), strict=True):
        heights = [bar.get_height() for bars in axes.containers for bar in bars]
        assert heights == pytest.approx([0.1 * (first + n) for n in (0, 2, 1, 3)])  # raw, then centred
        lines = np.concatenate([c.get_segments() for c in axes.collections if isinstance(c, LineCollection)])
        flat = lines[lines[:, 0, 1] == lines[:, 1, 1]]
        assert set(flat[:, 0, 1]) == {0.2, 0.3}
    assert [tick.get_text() for tick in figure.axes[1].get_xticklabels()] == ["profession_is", "... is a"]


def test_four_tests():
    frame = pd.DataFrame(
        [
            ("21.6", "path", 0.5, 0.4, 0.6, True), ("21.6", "attends", 0.1, None, None, False),
            ("16.3", "path", 0.0, -0.1, 0.1, False),
        ],
        columns=["site", "test", "estimate", "low", "high", "passed"],
    )  # fmt: skip
    figure = plots.four_tests(frame.assign(whole=frame["test"]), {"path": "logits", "attends": "share"})
    path, attends = figure.axes
    assert (path.get_xlabel(), attends.get_xlabel()) == ("logits", "share")
    dots = [c for c in path.collections if isinstance(c, PathCollection) and len(c.get_offsets())]
    assert {to_hex(c.get_edgecolors()[0]): c.get_offsets().tolist() for c in dots} == {
        plots.BLUE.lower(): [[0.5, 0]], plots.GREY: [[0.0, 1]],
    }  # fmt: skip
    hollow = [c for c in attends.collections if isinstance(c, PathCollection) and len(c.get_offsets())]
    assert len(hollow) == 1 and to_hex(hollow[0].get_facecolors()[0]) == "#ffffff"
    assert [text.get_text() for text in attends.texts] == ["1 of 2", "0 of 1"]
    assert [tick.get_text() for tick in path.get_yticklabels()] == ["21.6", "16.3"]
    one = plots.four_tests(frame.assign(whole="both"), {"path": "logits", "attends": "share"}).axes[1]
    assert [text.get_text() for text in one.texts] == ["0 of 1", "0 of 1"]  # two parts of one test: both, or it fails
