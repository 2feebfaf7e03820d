"""The quick book has answers: at least 24 quads in each half of whatever it reports with an interval."""

from collections import defaultdict

import pytest

from lib import weights
from lib.tasks import Pair
from pipeline import assumed, costs, params
from steps.registry import PLAN

QUADS = 24
# What rests on fewer by choice: sites and circuits are picked there, all neurons are swept one by one, or the page has
# estimates without intervals.
FEWER = {
    "retrieval_heads": {"edges", "slice-in-one-name-prompts"},
    "generality": {"circuits"},
    "neurons": {"neurons", "feature_map", "feature_ranks"},
    "story": {"search", "attribution", "exact", "everywhere_search"},
}


@pytest.mark.parametrize("step", PLAN.names)
def test_every_table_of_the_quick_book_has_enough_quads_in_each_half(step, tmp_path):
    given = params.load_profile("smollm2-135m-quick") | {"results_dir": str(tmp_path)}
    shape, place = weights.shape_of(weights.config_of(given["model"])), costs.Machine(2.0, "float32")
    case = assumed.case_of(PLAN, step, given, shape, place)
    quads: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for table, *chosen in PLAN[step].assumed(case):
        for unit in table.units(case, *chosen):
            label = unit.id.rpartition("-")[0]
            if not {table.name, label} & FEWER.get(step, set()):
                for pair in (one for one in unit.pairs if isinstance(one, Pair)):  # probes ask about people
                    quads[table.name, label, pair.half].add(pair.quad_id)
    few = {key: len(own) for key, own in quads.items() if len(own) < QUADS}
    assert not few
    assert quads or step == "baselines"


def test_the_quick_book_asks_for_more_quads_than_it_needs():
    given = params.load_profile("smollm2-135m-quick")
    own = params.validate(PLAN.sections, "baselines", given)
    assert own.quads_per_half >= QUADS + own.min_bucket, "a bucket that is too small may be dropped"
    assert own.accuracy_pairs >= 5 * 20, "twenty prompts of each superset, for an interval"
