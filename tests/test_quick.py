"""The quick book has answers: at least 24 quads in each half of whatever it reports with an interval."""

from collections import defaultdict

import pandas as pd
import pyarrow.parquet as pq
import pytest
from fake_score import fake_score

from lib import weights
from lib.tasks import Pair
from pipeline import assumed, costs, params, population
from steps.baselines import quads
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
# In other templates, in which only some of a table's quads have a gap of the right sign or line up: without intervals.
ELSEWHERE = {
    "generality.placebo": "both_famous",
    "subspace.direction_transfer": "both_famous",
    "retrieval_heads.confirmed": "profession_is",
}

RESULTS = params.ROOT / "results" / "smollm2-135m-quick"


def quads_of(table: pd.DataFrame) -> pd.Series:
    """Quads by half, for each kind of row that is reported apart."""
    kinds = [name for name in ("template", "direction", "ablation", "position", "attribute") if name in table]
    return table.groupby([*kinds, "half"], observed=True)["quad_id"].nunique()


@pytest.mark.skipif(not (RESULTS / "story.run.json").is_file(), reason="the quick book was not made here")
def test_every_table_that_the_quick_book_left_has_enough_quads_in_each_half():
    few = {}
    for path in sorted(RESULTS.glob("*.parquet")):
        step, _, name = path.stem.partition(".")
        if {"quad_id", "half"} <= set(pq.read_schema(path).names) and (name or step) not in FEWER.get(step, ()):
            columns = {"template", "direction", "ablation", "position", "attribute", "half", "quad_id", "kept"}
            table = pd.read_parquet(path, columns=[*columns.intersection(pq.read_schema(path).names)])
            counts = quads_of(table[table["kept"]] if "kept" in table else table)
            few |= {(path.stem, *key): count for key, count in counts.items() if count < QUADS}
    assert not {key: count for key, count in few.items() if ELSEWHERE.get(key[0]) != key[1]}


def test_the_quick_profile_draws_enough_quads_from_the_people_there_are(smollm_tokenizer):
    """The people, their names' tokens and the drawing are real. The model is made up: by its logits it knows as many of
    them as the real one does, 62%."""
    own = params.validate(PLAN.sections, "baselines", params.load_profile("smollm2-135m-quick"))
    people = population.load_people(params.ROOT / own.people_file)
    score = fake_score(smollm_tokenizer, people, 0.85)
    asked = population.ask_alone(quads.to_ask(people, own)[0], smollm_tokenizer, score)
    made, drops = quads.build_quads(people, asked, smollm_tokenizer, score, own)
    known = next(drop for drop in drops if drop["filter"] == "not known by the model")
    assert 0.55 < known["left"] / (known["left"] + known["dropped"]) < 0.69
    assert quads_of(made).min() >= QUADS + own.min_bucket


@pytest.mark.parametrize("step", PLAN.names)
def test_every_table_of_the_quick_book_has_enough_quads_in_each_half(step, tmp_path):
    given = params.load_profile("smollm2-135m-quick") | {"results_dir": str(tmp_path)}
    shape, place = weights.shape_of(weights.config_of(given["model"])), costs.Machine(2.0, "float32")
    case = assumed.case_of(PLAN, step, given, shape, place)
    found: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for table, *chosen in PLAN[step].assumed(case):
        for unit in table.units(case, *chosen):
            label = unit.id.rpartition("-")[0]
            if not {table.name, label} & FEWER.get(step, set()):
                for pair in (one for one in unit.pairs if isinstance(one, Pair)):  # probes ask about people
                    found[table.name, label, pair.template, pair.half].add(pair.quad_id)
    few = {key: len(own) for key, own in found.items() if len(own) < QUADS}
    assert not few
    assert found or step == "baselines"


def test_the_quick_book_asks_for_more_quads_than_it_needs():
    given = params.load_profile("smollm2-135m-quick")
    own = params.validate(PLAN.sections, "baselines", given)
    assert own.quads_per_half >= QUADS + own.min_bucket, "a bucket that is too small may be dropped"
    assert own.accuracy_pairs >= 5 * 20, "twenty prompts of each superset, for an interval"
