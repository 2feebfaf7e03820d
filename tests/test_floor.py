"""One floor for every step: what moves logit_diff by no more than the model's noise is picked and named nowhere."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from professions import SUPERSETS

from lib import effects, hooks, models, records, single_pass, stats
from lib.hooks import Site
from pipeline import units
from pipeline.params import Shared
from steps.generality import class_circuits
from steps.neurons import picks
from steps.neurons.measure import Neurons
from steps.retrieval_heads import measure as retrieval
from steps.retrieval_heads import page as retrieval_page
from steps.retrieval_heads.measure import RetrievalHeads
from steps.story import circuits, circuits_page, sentences
from steps.story.measure import Story
from steps.subspace import directions_page
from steps.subspace import measure as subspace

TINY = 1e-5  # logits, as far apart as two runs of a prompt may be
HALVES = ("discovery", "confirmation")


def swept(moved: dict[int, float], component: str = "head") -> pd.DataFrame:
    """Denoise records: how far each head moves logit_diff of 24 quads a half, nearly alike; gaps of 2."""
    rng = np.random.default_rng(0)
    rows = [
        {"layer": 0, "component": component, "head": head, "quad_id": f"{half}{quad}", "pair_id": f"{half}{quad}"}
        | {"half": half, "direction": "denoise", "logit_diff_before": 0.0, "logit_diff_clean": 2.0, "direct": 0.0}
        | {"logit_diff_corrupt": 0.0, "logit_diff_after": by + 1e-7 * rng.normal(), "written": 1.0}
        | {"answer": "artist", "corrupt_answer": "writer"}
        for half, quad, (head, by) in product(HALVES, range(24), moved.items())
    ]
    return pd.DataFrame(rows)


def test_a_site_of_1e_5_logits_is_significant_in_no_half_though_all_quads_are_alike():
    params = RetrievalHeads(model="m")
    table = effects.both_halves(swept({0: 0.5, 1: TINY, 2: 0.0011}), params)
    assert effects.confirmed(table, params)["head"].tolist() == [0, 2]
    bare = effects.both_halves(swept({0: 0.5, 1: TINY, 2: 0.0011}), stats.Settings())
    assert effects.confirmed(bare, stats.Settings())["head"].tolist() == [0, 2, 1], "without a floor it would be"
    assert retrieval.candidates(table, [], params) == [Site(0, "head", 0), Site(0, "head", 2)]
    assert retrieval.leading(table, 3, params.floor) == [Site(0, "head", 0), Site(0, "head", 2)]


def test_a_circuit_of_a_class_and_the_neurons_have_none_of_it_either():
    frame = swept({0: 0.5, 1: TINY})
    every = class_circuits.orders(frame, 5, SUPERSETS, 1e-3)
    (only,) = [own for own in every if (own.kind, own.superset) == ("only", "artist")]
    assert [site.head for site in only.order] == [0]
    frame = swept({0: 0.5, 1: TINY, 2: -TINY, 3: -0.2}, "neuron")
    assert picks.top(frame, Neurons(model="m", top_neurons=4))["head"].tolist() == [0, 3]


def test_a_path_that_lowers_the_margin_by_the_noise_alone_does_not_pass_its_test():
    params, test = RetrievalHeads(model="m"), retrieval_page.TESTS[4]
    names = {"0.0": [f"1.{number}" for number in range(40)]}
    sites = ["0.0", *names["0.0"]]
    for by, verdict in ((TINY, retrieval_page.NOT_SUPPORTED), (0.1, retrieval_page.SUPPORTED)):
        own = [by] + [0.0] * 40
        table = pd.DataFrame({"site": sites, "estimate": own, "low": own, "high": own, "quads": 30})
        (row,) = retrieval_page.four_tests(names, {test: table}, params).to_dict("records")
        assert row["verdict"] == verdict
    assert row["p"] < 0.05 and row["why"] == ""


def test_what_costs_a_circuit_nothing_is_no_member():
    rng = np.random.default_rng(0)
    costs = {"circuit": 0.0, "everything": 1.0, "nothing": -3.0, "member a": -2.0, "member b": -TINY}
    rows = [
        {"test": test, "quad_id": f"q{quad}", "pair_id": f"q{quad}", "logit_diff": value + 1e-7 * rng.normal()}
        for quad, (test, value) in product(range(24), costs.items())
    ]
    table = circuits_page.members(pd.DataFrame(rows), Story(model="m")).set_index("site")
    assert table["matters"].to_dict() == {"a": True, "b": False} and table.loc["b", "p"] == 1


@pytest.mark.parametrize(("share", "left"), [(0.9, ["a"]), (0.4, ["a"])])
def test_pruning_drops_what_is_worth_less_than_the_noise(monkeypatch, share, left):
    """Of a gap of 2 logits `a` brings half: where 0.9 is asked for, `b` would be kept for its 1e-5."""
    worth = {"a": 1.0, "b": TINY}

    def logits(_: object, ready: SimpleNamespace, tested: list) -> np.ndarray:
        values = [2.0, 0.0, *(sum(worth[site] for site in own.sites) for own in tested)]
        return np.array(values)[:, None, None, None] * np.array([1.0, 0.0]) * np.ones((1, 1, len(ready.pairs), 1))

    monkeypatch.setattr(circuits, "scored", logits)
    ready = SimpleNamespace(pairs=[SimpleNamespace(answer=0, corrupt_answer=1)] * 3)
    monkeypatch.setattr(circuits, "ready", lambda *_, **__: [ready])
    frame = circuits.search(SimpleNamespace(floor=1e-3), [], ["a", "b"], share, 2)
    chosen = frame[frame["chosen"]]
    gone = set(chosen.loc[chosen["phase"] == "prune", "site"])
    assert [site for site in chosen.loc[chosen["phase"] == "grow", "site"] if site not in gone] == left
    assert circuits.search(SimpleNamespace(floor=3.0), [], ["a", "b"], share, 2).empty, "all there is, is noise"


def test_the_noise_is_no_denominator():
    top = pd.DataFrame({"x": [1.0] * 24, "y": [1.0] * 24}).rename_axis(columns="k")
    bottom = pd.DataFrame({"x": [TINY] * 24, "y": [2.0] * 24}).rename_axis(columns="k")
    assert subspace.ratios(top, bottom, subspace.Subspace(model="m"))["k"].tolist() == ["y"]


def test_too_few_quads_say_neither_yes_nor_no():
    """One cluster of pairs: whatever the estimate, no interval can decide."""
    one = {"size": 2, "estimate": 1.0, "low": np.nan, "high": np.nan}
    one |= {f"minus_{end}": 0.5 if end == "estimate" else np.nan for end in ("estimate", "low", "high")}
    said = circuits_page.at_size_sentence([one | {"order": "circuit"}, one | {"order": "random"}])
    assert said.partition("\n\n")[0].endswith(
        ". There are too few quads to say whether the search is ahead at this size."
    )
    parts = pd.DataFrame(
        {"name": ["x"], "part": ["outside"], "share": [0.9], "share_low": [None], "share_high": [None]}
    )
    directions = pd.DataFrame({"method": ["probe"], "k": [1], "variance": [1.0], "between": [0.5]})
    said = directions_page.split_sentence(parts, directions)
    assert said.startswith("There are too few quads to say which is mostly dormant.") and "| x | 0.90 |" in said
    entries = [SimpleNamespace(id="slice_sufficient", verdict=sentences.NOT_TESTABLE)]
    told = "Whether a few heads and MLPs at the last token bring the answer over is not testable here."
    assert sentences.answer(entries, {}) == told


# --- logits of another size ---


def test_noise_grows_with_logits_beyond_ordinary_ones_alone(tiny):
    model = tiny("llama", "float32")
    ordinary = hooks.ORDINARY * torch.tensor([-1.0, 0.5])
    assert model.noise_of(ordinary) == model.noise == 1e-3 and model.noise_of(-20 * ordinary) == pytest.approx(0.02)
    params = Shared(model="m")
    assert params.floor == 1e-3
    params.note_logits(1e4)
    params.note_logits(30.0)
    assert params.floor == pytest.approx(0.1) and params.model_dump() == Shared(model="m").model_dump()


def test_a_model_of_large_logits_is_proved_and_its_faults_are_not(config_file):
    model = models.load(f"config:{config_file('llama')}", device="cpu")
    with torch.no_grad():
        model.unembed.weight *= 3e5 / model.logits(torch.eye(32)).abs().max()
    base = models.base_run(model, torch.arange(24).view(2, 12), [5, 11])
    assert models.prove_identity(model, base) > 0
    plain = model.logits(base.hidden)
    words = lambda row, off: f"row {row} by {off:g}"  # noqa: E731
    size = plain.abs().max()
    assert size > 1e4 and single_pass.prove_same(model, plain + 1e-6 * size, plain, words) > model.noise
    with pytest.raises(single_pass.SweepError, match="row 1 by"):
        single_pass.prove_same(model, plain + 1e-4 * size * torch.tensor([[0.0], [1.0]]), plain, words)


def test_a_table_knows_the_size_of_its_logits(tmp_path):
    frame = pd.DataFrame({"logits_after": [[1.0, -700.0], [3.0, 2.0]], "top_logit_after": [1.0, 31.0], "effect": 9e9})
    for name in ("a", "b"):
        about = {"unit": name, "facts": {}, "model": {}, "seconds": 0.0, "log": []}
        records.write(tmp_path / f"{name}.parquet", frame, about, schema=None)
    parts = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    assert units.assemble(tmp_path / "whole.parquet", parts, {}, None)["largest_logit"] == 700
    records.write(parts[0], frame[:0].astype({"logits_after": str}), about | {"unit": "none"}, schema=None)
    assert units.assemble(tmp_path / "some.parquet", parts, {}, None)["rows"] == 2, "a unit without rows has no types"
    assert units.largest_logit(pa.table({"effect": [9e9]})) == 0
