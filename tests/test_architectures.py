"""Every type of model that is loaded: its sweeps, paths and read-outs against one full forward pass per site."""

import re
from pathlib import Path

import brute_force_paths as brute_force
import pytest
import torch
from conftest import CONFIGS, MORE
from test_paths import by_definition
from test_sweep import PAIRS, one_by_one

from lib import hooks, models, paths, readout, sweep
from lib.hooks import Site
from steps.neurons import neurons

EVERY = CONFIGS | MORE
README = Path(__file__).resolve().parents[1] / "README.md"
ROW = re.compile(r"^\| `(\w+)` \| .* \| (yes|no) \| (\S+) \| (\S+) \|$", re.MULTILINE)
STATED = {name: (single == "yes", float(s), float(p)) for name, single, s, p in ROW.findall(README.read_text())}
RECEIVERS = ("q 1.0 all", "q 1.3 swapped", "k 1.1 names", "v 2.1 all", "mlp 1 name_a", "block 2 last", "q 2.2 last")


def margins(logits, pair) -> torch.Tensor:
    """The margin and the logit difference of the clean answer."""
    own = logits[list(pair.clean_tokens)].double()
    rest = [index for index in range(len(own)) if index != pair.answer]
    return torch.stack([own[pair.answer] - own[rest].max(), own[pair.answer] - own[pair.corrupt_answer]])


def worst(frame, logits_of, rows) -> float:
    """The largest difference of a margin between rows of a frame and full passes; the rows must move it."""
    off, moved = [], []
    for row in frame.sample(min(rows, len(frame)), random_state=2).itertuples():
        wanted = margins(logits_of(row), PAIRS[0])
        found = torch.tensor([row.metric_after, row.logit_diff_after], dtype=torch.float64)
        off.append((found - wanted).abs().max().item())
        moved.append(abs(row.metric_after - row.metric_before))
    assert max(moved) > 0.01, "the interventions hardly move the logits: this test could not see an error"
    return max(off)


def test_the_readme_lists_the_types_that_are_proved():
    proved = sorted(config["model_type"] for config in EVERY.values())
    assert proved == sorted(models.PROVED) == sorted(STATED)


@pytest.mark.parametrize("name", list(EVERY))
def test_a_sweep_is_as_exact_as_the_readme_says(tiny, name):
    model, stated = tiny(name), STATED[EVERY[name]["model_type"]]
    parts = (*hooks.COMPONENTS, *(["neuron"] if model.down_projs else []))
    assert bool(model.down_projs) == stated[0]
    for direction, role in (("noise", "names"), ("denoise", "last")):
        frame = sweep.run(model, PAIRS[:1], direction=direction, role=role, components=parts, layers=[0, 1])
        of = {"noise": "counterfactual", "denoise": "clean"}[direction]

        def logits(row, direction=direction, role=role, of=of):
            return one_by_one(model, PAIRS[0], direction, of, 0, Site(row.layer, row.component, row.head), role)

        assert worst(frame, logits, 12) <= stated[1]


@pytest.mark.parametrize("mlps", ["frozen", "recomputed"])
@pytest.mark.parametrize("name", list(EVERY))
def test_paths_are_as_exact_as_the_readme_says(tiny, name, mlps):
    model, receivers = tiny(name), tuple(map(brute_force.receiver, RECEIVERS))
    sets = brute_force.singles(model, receivers)
    frame = paths.run(model, PAIRS[:1], senders=sets, receivers=receivers, sender_role="all", mlps=mlps)

    def logits(row):
        asked = ("p0", "noise", "counterfactual", 0, sets[row.site_set], "all", receivers, mlps)
        return by_definition(model, *asked)[0]

    assert worst(frame, logits, 6) <= STATED[EVERY[name]["model_type"]][2]


@pytest.mark.parametrize("name", ["olmo2", "olmo3"])
@pytest.mark.parametrize("behind,heard", [(True, {2}), (False, {0, 1, 2, 3})])
def test_no_other_head_hears_a_receiver_where_a_norm_spans_all(tiny, name, behind, heard):
    """Set before the norm, a head's queries would change the scale of all the others'."""
    model, ids, heads = tiny(name), torch.tensor([PAIRS[0].clean.ids]), [Site(1, "head", head) for head in range(4)]
    place, before = paths.input_of(model, paths.Receiver(1, "q", 2)), model.attns[1].q_proj

    def doubled(value):
        value = value.clone()
        value[..., place.columns] *= 2
        return value

    with hooks.capture(model, heads) as plain:
        model.model(ids)
    handle = place.on(doubled) if behind else before.register_forward_hook(lambda _, args, value: doubled(value))
    with hooks.capture(model, heads) as seen, hooks.removing([handle]):
        model.model(ids)
    assert {site.head for site in heads if not torch.allclose(seen[site], plain[site], atol=1e-12)} == heard


@pytest.mark.parametrize("name", list(EVERY))
def test_blocks_add_what_is_read_off_and_logits_are_sums_over_it(tiny, name):
    model, ids, tokens = tiny(name), torch.tensor([[5, 17, 80, 33, 2, 64]]), [3, 40, 99]
    norms, read = readout.post_norms(model), readout.readout(model)
    with hooks.capture(model, hooks.all_sites(model, ("resid", "attn", "mlp"))) as seen:
        logits = model.model(ids).logits[0]
    for layer in range(1, model.n_layers):
        added = seen[Site(layer, "resid")] - seen[Site(layer - 1, "resid")]
        parts = zip(norms[layer], (seen[Site(layer, part)] for part in ("attn", "mlp")), strict=True)
        assert (added - sum(norm(x) if norm else x for norm, x in parts)).abs().max() < 1e-4  # norms compute in fp32
    resid = seen[Site(model.n_layers - 1, "resid")][0]
    constant = read.norm.bias @ model.unembedding(tokens)[0].T
    own = resid @ read.directions(tokens).T / read.norm.scale(resid)[:, None] + constant
    own = model.softcap * torch.tanh(own / model.softcap) if model.softcap else own
    assert (own - logits[:, tokens]).abs().max() < 1e-4 and logits.std() > 0.1


@pytest.mark.parametrize("name", ["granite", "phi3", "olmo2", "gemma3 with images"])
def test_the_direct_effect_of_a_neuron_is_what_it_adds_to_the_logits(tiny, name):
    """In the last layer there is no other effect, but for what the change does to the norms' scales."""
    model, pair, layer = tiny(name), PAIRS[0], tiny(name).n_layers - 1
    frame = neurons.run(model, [pair], direction="noise", layers=[layer], reading=neurons.reading_of(model, [layer]))
    reading, norms = readout.readout(model), readout.post_norms(model)[layer]
    with hooks.capture(model, [Site(layer, "resid"), Site(layer, "mlp")], [9]) as seen:
        model.model(torch.tensor([pair.clean.ids]))
    towards = reading.directions([pair.clean_tokens[i] for i in (pair.answer, pair.corrupt_answer)])
    for row in frame.sample(6, random_state=0).itertuples():
        unit = torch.zeros(1, model.n_neurons, dtype=torch.float64)
        unit[0, row.head] = row.change
        written = model.down_projs[layer](unit)[0]
        if norms.mlp is not None:
            written = norms.mlp.gain * norms.mlp.centred(written) / norms.mlp.scale(seen[Site(layer, "mlp")][0, 0])
        wanted = written @ (towards[0] - towards[1]) / reading.norm.scale(seen[Site(layer, "resid")][0, 0])
        assert row.direct == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6)
    if name == "granite":  # small enough changes leave the scale alone: then it is the whole effect
        small = frame[frame["change"].abs() < frame["change"].abs().quantile(0.3)]
        whole = small["logit_diff_after"] - small["logit_diff_before"]
        assert (whole - small["direct"]).abs().max() < 0.1 * whole.abs().max()
