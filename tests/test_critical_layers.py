"""Step 02's definitions: critical layers, and the first layer that flips the answer, by hand."""

import pandas as pd
import pytest

from steps.coarse_sweep.measure import fewest_layers
from steps.coarse_sweep.page import first_flip_layer, flip_share


def test_critical_layers_are_the_fewest_and_in_order():
    curve = {0: 0.05, 1: 0.05, 2: 0.40, 3: 0.35, 4: 0.55, 5: 1.0}  # rises 0.05, 0, 0.35, -0.05, 0.2, 0.45
    found = fewest_layers(curve, 0.8)
    assert found.layers == (2, 5) and found.rises == pytest.approx((0.35, 0.45))
    assert found.total == 1.0 and found.share == pytest.approx(0.8)
    assert fewest_layers(curve, 0.81).layers == (2, 4, 5)
    assert fewest_layers(curve, 0.4).layers == (5,)
    assert fewest_layers({7: 0.5}, 0.8).layers == (7,)
    # ties are taken by layer, and order of the curve does not matter
    assert fewest_layers({2: 1.0, 1: 0.5}, 0.5).layers == (1,)


@pytest.mark.parametrize(
    ("curve", "share", "message"),
    [
        ({}, 0.8, "every layer"),
        ({0: float("nan")}, 0.8, "every layer"),
        ({0: 0.5, 1: -0.1}, 0.8, "not positive"),
        ({0: 1.0}, 80, "share"),
    ],
)
def test_curves_without_critical_layers_are_errors(curve, share, message):
    with pytest.raises(ValueError, match=message):
        fewest_layers(curve, share)


def test_first_flip_layer():
    margins = {0: (-1, -1, 1, -2), 1: (1, -1, -1, 0), 2: (2, 3, -1, 0), 3: (1, 1, 1, 1)}
    rows = [
        {"layer": layer, "metric_before": -2.0 if pair < 3 else 1.0, "metric_after": float(after)}
        for layer, values in margins.items()
        for pair, after in enumerate(values)
    ]
    frame = pd.DataFrame(rows).assign(
        direction="denoise", metric_clean=5.0, metric_corrupt=lambda f: f["metric_before"]
    )
    # the fourth pair's corrupt prompt is answered as the clean one: it has no answer to flip, and does not count
    assert flip_share(frame).tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 1])
    assert first_flip_layer(frame, 0.5) == 2
    assert first_flip_layer(frame, 0.9) == 3
    assert first_flip_layer(frame[frame["layer"] < 3], 0.9) is None
    mirrored = frame.assign(
        direction="noise",
        metric_before=-frame["metric_before"],
        metric_after=-frame["metric_after"],
        metric_clean=-frame["metric_corrupt"],
        metric_corrupt=-5.0,
    )
    assert flip_share(mirrored).tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 1])
