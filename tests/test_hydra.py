"""The split of a slice's total effect against its definition, and the search for backups on cases where it is known."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from test_sweep import PAIRS, pair_of

from lib import effects, hooks, models, records, single_pass, sweep
from lib.hooks import Site
from lib.tasks import Pair, Prompt
from pipeline import params
from report import plots
from report.words import interval
from steps.hydra import measure, page, splits
from steps.registry import PLAN

SLICE = [Site(0, "mlp"), Site(1, "head", 2), Site(1, "mlp"), Site(1, "head", 0)]
P = params.validate(
    PLAN.sections, "hydra", params.load_profile("smoke") | {"ablations": ["zero", "resample"], "candidates": 3}
)


def norm64(module, x, weight=None):
    """A norm of Llama's and Gemma's kind in the input's own precision, with its own weight or the one given."""
    gain = 1 + module.weight if "Gemma" in type(module).__name__ else module.weight
    return (gain if weight is None else weight) * x * (x.square().mean(-1, keepdim=True) + epsilon(module)).rsqrt()


def epsilon(norm):
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


@pytest.fixture
def exact(config_file, monkeypatch):
    """A tiny fp64 model, uneven in its norms and biases, whose norms compute in fp64 as well."""

    def make(name):
        model = models.load(f"config:{config_file(name)}", dtype="float64", device="cpu")
        torch.manual_seed(1)
        for path, parameter in model.model.named_parameters():
            if "norm" in path or "ln_" in path or path.endswith("bias"):
                parameter.data += 0.5 * torch.randn_like(parameter)
        if name != "gpt2":
            monkeypatch.setattr(type(model.final_norm), "forward", norm64)
        return model

    return make


def parts_of(frame):
    """change of each part, summed over sites, per pair, slice and ablation."""
    return page.changes(frame).set_index(["slice", "pair_id", "ablation"])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "gpt2"])
def test_parts_add_up_to_the_total_and_are_direct_effects_by_definition(exact, name):
    model = exact(name)
    slices = {"slice": SLICE, "other": [Site(1, "attn"), Site(0, "head", 1)]}
    frame = splits.run(model, PAIRS[:3], slices=slices, ablations=sweep.ABLATIONS, pool=PAIRS, seed=3)
    records.conform(frame, splits.SCHEMA)
    parts = parts_of(frame)
    assert len(parts) == 2 * 3 * 4
    assert parts["residual"].abs().max() < 1e-9
    added = parts[["direct", "heads", "mlps", "scale"]].sum(axis=1)
    assert (parts["total"] - added).abs().max() < 1e-9 and parts[["total", "scale"]].abs().min().min() > 1e-4

    # by definition, on one pair: plain hooks, the modules' own weights, the norms written out
    pair, ids, last = PAIRS[1], torch.tensor([PAIRS[1].clean.ids]), [9]
    sites = hooks.all_sites(model, ("resid", "attn", "mlp", "head"))
    with hooks.capture(model, sites, last) as seen:
        logits = {"before": model.model(ids).logits[0, -1]}
    run = {"before": dict(seen)}
    with hooks.ablate(model, SLICE, last), hooks.capture(model, sites, last) as seen:
        logits["after"] = model.model(ids).logits[0, -1]
    run["after"] = dict(seen)
    tokens = [pair.clean_tokens[pair.answer], pair.clean_tokens[pair.corrupt_answer]]
    if model.softcap:
        logits = {when: model.softcap * torch.atanh(value / model.softcap) for when, value in logits.items()}
    difference = {when: (value[tokens[0]] - value[tokens[1]]).item() for when, value in logits.items()}
    towards = model.unembed.weight[tokens[0]] - model.unembed.weight[tokens[1]]
    norm = model.final_norm
    gain = 1 + norm.weight if "gemma" in name else norm.weight

    def centred(x):
        return x - x.mean(-1, keepdim=True) if name == "gpt2" else x

    final = run["before"][Site(2, "resid")][0, 0]
    scale = (centred(final).square().mean() + epsilon(norm)).sqrt()

    def direct(when, site):
        """The site's own vector through its post norm and the final norm, each at a fixed scale."""
        kept = run[when]
        if site.component == "head":
            z = torch.zeros(model.n_heads * model.head_size, dtype=torch.float64)
            z[hooks.columns_of(model, site)] = kept[site][0, 0]
            vector = model.o_projs[site.layer](z) - model.o_projs[site.layer](torch.zeros_like(z))
        else:
            vector = kept[site][0, 0]
        if "gemma" in name:
            whole = "mlp" if site.component == "mlp" else "attn"
            block = model.blocks[site.layer]
            post = block.post_feedforward_layernorm if whole == "mlp" else block.post_attention_layernorm
            out = kept[Site(site.layer, whole)][0, 0]
            vector = (1 + post.weight) * vector / (out.square().mean() + epsilon(post)).sqrt()
        return (gain * centred(vector) / scale @ towards).item()

    own = frame[(frame["pair_id"] == pair.pair_id) & (frame["ablation"] == "zero") & (frame["slice"] == "slice")]
    later = own[own["part"].isin(["heads", "mlps"])]
    beside = [Site(1, "head", 1), Site(1, "head", 3)]
    wanted = [*beside, *(Site(2, "head", head) for head in range(4)), Site(2, "mlp")]
    assert sorted(later[effects.SITE].itertuples(index=False, name=None)) == sorted(wanted)
    assert set(own.loc[own["part"] == "direct", effects.SITE].itertuples(index=False, name=None)) == set(SLICE)
    for row in own[own["component"] != ""].itertuples():
        for when in ("before", "after"):
            assert getattr(row, when) == pytest.approx(direct(when, Site(row.layer, row.component, row.head)), abs=1e-9)
    total = own[own["part"] == "total"].iloc[0]
    # the soft cap is undone here, which costs digits
    assert (total["before"], total["after"]) == pytest.approx((difference["before"], difference["after"]), abs=1e-7)
    ablated = run["after"][Site(2, "resid")][0, 0]
    after = (centred(ablated).square().mean() + epsilon(norm)).sqrt()
    rescaled = (gain * centred(ablated) @ towards * (1 / after - 1 / scale)).item()
    assert own.loc[own["part"] == "scale", "after"].item() == pytest.approx(rescaled, abs=1e-9)


@pytest.mark.parametrize("name,dtype,tolerance", [("llama", "float64", 1e-6), ("gemma3", "float32", 1e-3)])
def test_the_total_is_the_effect_of_the_same_joint_ablation_in_a_sweep(tiny, name, dtype, tolerance):
    model = tiny(name, dtype)
    how = {"ablations": sweep.ABLATIONS, "pool": PAIRS, "seed": 5}
    split = parts_of(splits.run(model, PAIRS[:4], slices={"slice": SLICE}, **how))
    joint = sweep.run(model, PAIRS[:4], site_sets=[SLICE], **how).set_index(["pair_id", "ablation"])
    effect = joint["logit_diff_after"] - joint["logit_diff_before"]
    both = pd.concat([split["total"]["slice"], effect.rename("effect")], axis=1)
    assert len(both) == 16 and (both["total"] - both["effect"]).abs().max() < tolerance
    assert split["residual"].abs().max() < tolerance


def test_the_split_on_the_bundled_model(smollm, two_pairs):
    slices = {"slice": [Site(21, "head", 6), Site(23, "mlp"), Site(29, "mlp")]}
    frame = splits.run(smollm, two_pairs, slices=slices, ablations=("zero", "counterfactual"))
    parts = parts_of(frame)
    assert parts["residual"].abs().max() < 1e-4 < 0.5 < parts["total"].abs().min()
    assert frame.query("part == 'heads' and layer == 21").empty


def test_what_comes_later(tiny):
    llama, gemma = tiny("llama"), tiny("gemma3")
    assert splits.later_sites([Site(2, "head", 1)], 3, 4) == [Site(2, "mlp")]
    assert splits.later_sites([Site(1, "mlp"), Site(2, "attn")], 3, 4) == [Site(2, "mlp")]
    assert splits.later_sites([Site(1, "mlp"), Site(0, "head", 3)], 2, 2) == [
        Site(0, "mlp"), Site(1, "head", 0), Site(1, "head", 1)
    ]  # fmt: skip
    beside = splits.run(gemma, PAIRS[:1], slices={"slice": [Site(2, "head", 1)]}, ablations=("zero",))
    beside = beside[beside["part"].isin(["heads", "mlps"])]  # the post norm's scale ties them to the slice
    assert effects.named(beside).tolist() == ["2.0", "2.2", "2.3", "mlp 2"]
    last = splits.run(llama, PAIRS[:2], slices={"slice": [Site(2, "mlp")]}, ablations=("zero",))
    assert set(last["part"]) == {"total", "direct", "scale", "residual"}
    table = measure.rises(pd.DataFrame(), [], P)
    assert table.empty and measure.candidates(table, P).empty
    only = measure.Round([Site(2, "mlp")], last, pd.DataFrame(), table, table)
    assert "No other site comes after the slice" in page.ending([only], P)
    assert "No head or MLP comes after the slice" in page.backup_sentences([only], P)[0]


def test_rows_prove_themselves(tiny, monkeypatch):
    model, how = tiny("llama"), {"slices": {"slice": SLICE}, "ablations": ("zero",)}
    with pytest.raises(ValueError, match="slice 'none' has no sites"):
        splits.run(model, PAIRS[:1], slices={"none": []})
    with pytest.raises(ValueError, match="layer 7 is not in"):
        splits.run(model, PAIRS[:1], slices={"slice": [Site(7, "mlp")]})
    with monkeypatch.context() as patched:
        patched.setattr(single_pass.Edit, "write", lambda self, activation: None)
        with pytest.raises(single_pass.SweepError, match="pair p0, .*did not take effect"):
            splits.run(model, PAIRS[:1], **how)
    # something that is no head and no MLP writes into the residual stream
    handle = model.blocks[2].register_forward_hook(lambda block, args, out: out * 1.5)
    try:
        with pytest.raises(single_pass.SweepError, match="pair p0, zero of slice: the parts miss the total"):
            splits.run(model, PAIRS[:1], **how)
    finally:
        handle.remove()


def test_random_slices_have_the_slices_make_up():
    sites = [Site(2, "head", 1), Site(2, "head", 3), Site(4, "head", 0), Site(4, "mlp"), Site(5, "mlp")]
    made = splits.random_slices(6, 4, sites, np.random.default_rng(0))
    assert list(made) == ["random 1", "random 2", "random 3"] and len({tuple(own) for own in made.values()}) > 1
    for own in made.values():
        assert [site.layer for site in own if site.component == "head"] == [2, 2, 4]
        assert sum(site.component == "mlp" for site in own) == 2 and min(site.layer for site in own) == 2
        assert not set(own) & set(sites) and len(set(own)) == 5
    assert made == splits.random_slices(6, 4, sites, np.random.default_rng(0))
    assert splits.random_slices(1, 1, [Site(0, "head", 0)], np.random.default_rng(0)) == {}


# --- backups ------------------------------------------------------------------------------------------------------


@pytest.fixture
def planted(config_file):
    """A model whose first MLP writes the answer, and whose last MLP writes it where the first has not."""
    model = models.load(f"config:{config_file('llama')}", dtype="float64", device="cpu")
    towards = model.unembed.weight[20] - model.unembed.weight[30]
    towards = towards / towards.norm()

    def write(x):
        return 8 * towards.expand_as(x) + 0.05 * x

    def stand_in(x):
        return 6 * towards * torch.sigmoid(4 * (1.5 - x @ towards))[..., None]

    for block in model.blocks:
        block.self_attn.o_proj.weight.data *= 0.02
    model.mlps[0].forward, model.mlps[2].forward = write, stand_in
    model.mlps[1].forward = lambda x: 0.02 * x
    return model


def step_of(model, pairs, sites, **chosen):
    """What `measure.run` asks of a step."""
    kept: dict = {}
    step = SimpleNamespace(
        params=P.model_copy(update={"ablations": ("zero",), "pairs": None, "rounds": 2} | chosen),
        model=model,
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        prompts=lambda: pairs,
        slice=lambda: sites,
        rng=lambda purpose: np.random.default_rng(0),
        shared=lambda name, make: kept.setdefault(name, make()),
        sweeper=lambda pool: lambda unit: sweep.run(model, unit.pairs, pool=pool, **unit.options),
    )

    def table(declared, *chosen):
        compute = declared.compute(step, *chosen)
        return pd.concat([compute(unit) for unit in declared.units(step, *chosen)], ignore_index=True)

    step.table = table
    return step


def test_a_planted_backup_is_found_and_confirmed(planted):
    pairs = [
        replace(
            pair_of(index, half=half), quad_id=f"{half}{index}", pair_id=f"{half}{index}", answer=0, corrupt_answer=1
        )
        for half in effects.HALVES
        for index in range(24)
    ]
    once = measure.run(step_of(planted, pairs, [Site(0, "mlp")], rounds=1))[0]
    tests = once.tests
    assert measure.backups_of(tests)[0] == Site(2, "mlp")
    first = tests.iloc[0]
    assert first["estimate"] == pytest.approx(first["gone_estimate"] - first["alone_estimate"]) and first["low"] > 1
    assert first["stands_in"] and 0.3 < first["ratio_low"] <= first["ratio_estimate"] <= first["ratio_high"]
    ratio = page.compensation(once.frame, P).query("later == 'MLPs' and half == 'confirmation'").iloc[0]
    assert 0.3 < ratio["low"] <= ratio["estimate"] <= ratio["high"] < 1
    text = " ".join(page.backup_sentences([once], P))
    assert "mlp 2 stands in for the slice: it makes up for" in text
    rise = interval(first["estimate"], first["low"], first["high"], 3)
    assert f"The rise is {rise}." in text
    assert page.ending([once], P).startswith("mlp 2 stands in for the slice when it is gone. ")
    shown = page.tests_table([once, once])
    assert shown["round"].tolist() == [0] * len(tests) + [1] * len(tests)
    assert shown["backup"].iloc[0] == "yes" and shown["once the slice is gone"].iloc[0].startswith(
        f"{first['gone_estimate']:.3f} ["
    )


# --- a backup whose output another site reads ---------------------------------------------------------------------

BY_HAND = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 4}
BY_HAND |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 4, "vocab_size": 64}
BY_HAND |= {"rope_theta": 1e12, "rms_norm_eps": 1e-9, "tie_word_embeddings": False}
CONSTANT, CODE, SINK, SPOKEN, STANDS_IN, ANSWER, NAME = range(7)  # dimensions of the residual stream below


def by_hand(tmp_path, ratio: float, read: str) -> models.Model:
    """A Llama of four layers set by hand. Head 1.0 writes a name's class to the answer and notes that it has spoken;
    head 2.1 looks away from the name where it has, else it writes `ratio` of the class. `read`: it writes it to the
    answer itself ("unembedding"), to where MLP 3 alone reads it and writes it to the answer ("mlp"), or head 1.0 writes
    there, too ("shared"). A large constant makes the norms linear."""
    (tmp_path / "config.json").write_text(json.dumps(BY_HAND))
    loaded = models.load(f"config:{tmp_path / 'config.json'}", dtype="float64", device="cpu")
    large, steep = 300.0, 100.0
    for path, parameter in loaded.model.named_parameters():
        parameter.data.fill_(large / 8**0.5 if "norm" in path else 0.0)
    words = loaded.model.get_input_embeddings().weight.data
    words[:, CONSTANT], words[1, SINK], words[3:43, NAME] = large, 1.0, 1.0
    words[3:43, CODE] = torch.tensor([side * (1 + 0.02 * step) for side in (1, -1) for step in range(20)])
    primary, backup = loaded.attns[1], loaded.attns[2]
    slow = 1  # the feature of a head of four whose rotary angle stays near zero
    primary.q_proj.weight.data[slow, CONSTANT], primary.k_proj.weight.data[slow, NAME] = steep / large, 1.0
    primary.v_proj.weight.data[0, CODE], primary.v_proj.weight.data[1, NAME] = 1.0, 1.0
    primary.o_proj.weight.data[STANDS_IN if read == "shared" else ANSWER, 0] = 1.0
    primary.o_proj.weight.data[SPOKEN, 1] = 1.0
    backup.q_proj.weight.data[4 + slow, CONSTANT], backup.q_proj.weight.data[4 + slow, SPOKEN] = (
        steep / large,
        -2 * steep,
    )
    backup.k_proj.weight.data[4 + slow, NAME], backup.k_proj.weight.data[4 + slow, SINK] = 1.0, -1.0
    backup.v_proj.weight.data[4, CODE] = 1.0
    backup.o_proj.weight.data[ANSWER if read == "unembedding" else STANDS_IN, 4] = ratio
    reader, gate = loaded.mlps[3], 20.0  # so open that silu is the identity
    reader.gate_proj.weight.data[0, CONSTANT], reader.up_proj.weight.data[0, STANDS_IN] = gate / large, 1.0
    reader.down_proj.weight.data[ANSWER, 0] = 1 / gate
    loaded.unembed.weight.data[[50, 51], ANSWER] = torch.tensor([2.0, -2.0], dtype=torch.float64)
    return loaded


def step_by_hand(model: models.Model) -> SimpleNamespace:
    """The slice of head 1.0 over 24 quads a half of the prompts <sink> <name> <last>."""
    roles, about = {"names": (1,), "last": (2,)}, ((50, 51), (50, 51), (), (), (), ())
    pairs = []
    for half in effects.HALVES:
        for index in range(24):
            name, side = f"{half}{index:02d}", index % 2
            clean, corrupt = (Prompt("", (1, 3 + 20 * one + index % 20, 2), roles) for one in (side, 1 - side))
            answers = ("x", "y"), side, 1 - side
            pairs.append(Pair(name, name, half, "superset", "t", clean, corrupt, *answers, *about))
    return step_of(model, pairs, [Site(1, "head", 0)])


@pytest.mark.parametrize(("ratio", "read"), [(0.7, "unembedding"), (0.7, "mlp"), (0.7, "shared"), (1.0, "shared")])
def test_a_head_that_stands_in_is_found_whoever_reads_it(tmp_path, ratio, read):
    """Through an MLP its direct effect on the logits stays zero, and where the slice speaks through that MLP, too,
    nothing that writes to the answer rises: only the head's own ablation shows it."""
    step = step_by_hand(by_hand(tmp_path, ratio, read))
    rounds = measure.run(step)
    tests = rounds[0].tests.set_index("site")
    assert set(tests.index[tests["backup"]]) == {"2.1"} | ({"mlp 3"} if read == "mlp" else set())
    found = tests.loc["2.1"]
    assert found["ratio_estimate"] == pytest.approx(ratio, abs=1e-3) and found["stands_in"]
    assert found["ratio_low"] == pytest.approx(ratio, abs=1e-3) == found["ratio_high"]
    assert found["alone_estimate"] == pytest.approx(0, abs=1e-6) and found["gone_estimate"] > 4 * ratio
    changes = page.changes(rounds[0].frame).query("slice == 'slice'")
    assert (changes["heads"].abs().max() < 1e-6) == (read != "unembedding")
    repair = page.compensation(rounds[0].frame, step.params).query("later == 'heads and MLPs'")
    repair, above = repair["estimate"], repair["above_noise"]
    if read == "shared":
        assert not changes["mlps"].gt(1e-6).any() and repair.isna().all()
    else:
        assert repair.to_numpy() == pytest.approx(ratio, abs=1e-3) and above.all()
    assert len(rounds) == 2 and rounds[1].tests.empty
    assert all(bound["share"] < 1e-3 for bound in page.missed(rounds[1], step.params))
    share = interval(*[found[f"ratio_{end}"] for end in page.ENDS])
    told = " ".join(page.backup_sentences(rounds, step.params))
    assert f"2.1 stands in for the slice: it makes up for {share} of what the slice would cost without it." in told
    who = "Head 2.1 and mlp 3 stand in" if read == "mlp" else "Head 2.1 stands in"
    assert page.ending(rounds, step.params).startswith(f"{who} for the slice when it is gone. No further")


def test_without_a_backup_none_is_found_and_the_bound_is_small(tmp_path):
    step = step_by_hand(by_hand(tmp_path, 0.0, "mlp"))
    (only,) = measure.run(step)
    assert only.tests.empty and len(only.rises["site"].unique()) == 7  # mlp 1, and two heads and an MLP of two layers
    bounds = page.missed(only, step.params)
    assert {bound["component"] for bound in bounds} == {"head", "mlp"}
    assert all(0 <= bound["share"] < 1e-3 for bound in bounds)
    assert page.ending([only], step.params).startswith(
        "No site at the last token outside the slice is shown to stand in for it. By "
    )
    assert not page.compensation(only.frame, step.params)["above_noise"].any()


def split_rows(pair, half, changes, ablation="zero", name="slice"):
    """Rows of one pair from the change of each (part, site)."""
    about = {"task": "t", "template": "t", "pair_id": pair, "quad_id": f"q{pair}", "half": half, "seed": 0}
    about |= {"slice": name, "ablation": ablation}
    sites = [about | {"part": part, **site._asdict(), "before": 0.0, "after": c} for (part, site), c in changes.items()]
    total = sum(changes.values())
    rest = [("total", total), ("residual", 0.0), ("scale", 0.0)]
    return sites + [about | {"part": part, **Site(-1, "")._asdict(), "before": 0.0, "after": c} for part, c in rest]


def fabricated(rise, loss=-0.3, quads=30, half=effects.HALVES):
    """A table in which the slice loses 2 logits, an MLP loses with it and head 5.1 rises by `rise`, all with noise."""
    rng, rows = np.random.default_rng(0), []
    for which in half:
        for index in range(quads):
            noise = rng.normal(0, [0.5, 0.1, 0.1, 0.1])
            changes = {
                ("direct", Site(3, "mlp")): -2 + noise[0],
                ("heads", Site(5, "head", 0)): noise[1],
                ("heads", Site(5, "head", 1)): rise + noise[2],
                ("mlps", Site(5, "mlp")): loss + noise[3],
            }
            rows += split_rows(f"{which}{index}", which, changes)
    return pd.DataFrame(rows)


LATER = [Site(5, "head", 0), Site(5, "head", 1), Site(5, "mlp")]


def costs(rise, loss=-0.3, quads=30, half=effects.HALVES, damage=2.0):
    """Records of `measure.RISES` in which the slice costs 2 logits, and, once it is gone, `LATER`'s head 5.1 costs
    `rise` more (a number, or one for each half) and the MLP `loss` more than alone, all with noise."""
    rng, rows = np.random.default_rng(0), []
    for which in half:
        risen = rise[which] if isinstance(rise, dict) else rise
        for index in range(quads):
            whole = damage + rng.normal(0, 0.5)
            alone = np.array([0.0, 0.3, 0.5]) + rng.normal(0, 0.05, 3)
            gone = alone + [0.0, risen, loss] + rng.normal(0, 0.1, 3)
            for site_set, cost in enumerate((whole, *(whole + gone), *alone)):
                about = {"half": which, "quad_id": f"q{which}{index}", "direction": "noise", "site_set": site_set}
                rows.append(about | {"logit_diff_before": 0.0, "logit_diff_after": -cost})
    return pd.DataFrame(rows)


def round_of(records, tests=None, frame=None):
    """A round of these records, its candidates as tests unless others are given."""
    table = measure.rises(records, LATER, P)
    tests = measure.candidates(table, P) if tests is None else tests
    return measure.Round([Site(3, "mlp")], fabricated(0.0) if frame is None else frame, records, table, tests)


def test_a_table_without_a_rise_gives_its_bound():
    once = round_of(costs(rise=0.0))
    assert once.tests.empty
    head, mlp = page.missed(once, P)
    own = effects.reported(once.rises)
    assert head["logits"] == own.loc[own["component"] == "head", "high"].max() and 0 < head["logits"] < 0.15
    assert mlp["logits"] == own.loc[own["site"] == "mlp 5", "high"].item() < 0
    assert head["share"] == pytest.approx(head["logits"] / 2, rel=0.2)
    assert page.ending([once], P).startswith(
        "No site at the last token outside the slice is shown to stand in for it. By the upper ends of intervals that "
        f"hold for all later sites, the search could have missed a head whose cost rises by up to {head['logits']:.2g} "
        f"logits (head {head['site']}; {head['share']:.0%} of what ablating the slice costs). It could have missed an "
        "MLP whose cost rises by up to the model's noise (0.001 logits), too."
    )
    assert (
        "`zero`), 0 of the 3 later sites cost more than when ablated alone, significantly on"
        in page.backup_sentences([once], P)[0]
    )


def test_a_member_of_the_slice_that_stands_in_for_those_before_it_is_found():
    """MLP 4 costs 2 logits, as head 3.0 and it do together, until head 6.1 answers for 1.5 of them; the first member is
    asked for nothing."""
    sites = [Site(6, "head", 1), Site(4, "mlp"), Site(3, "head", 0), Site(6, "mlp")]
    assert measure.in_order(sites) == [sites[2], sites[1], sites[0], sites[3]]
    rng, rows = np.random.default_rng(0), []
    for quad in range(60):
        for site_set, cost in enumerate((0.4, 0.5, 2.0, 2.0, 0.4, 0.5, 0.0, 0.3)):
            about = {"half": effects.HALVES[quad % 2], "quad_id": f"q{quad}", "direction": "noise"}
            about |= {"site_set": site_set, "logit_diff_before": 0.0}
            rows.append(about | {"logit_diff_after": -cost - rng.normal(0, 0.02)})
    first = round_of(costs(rise=0.0))._replace(sites=sites)
    step = SimpleNamespace(params=P, table=lambda *_: pd.DataFrame(rows))
    tests = measure.inside(step, first).set_index("site")
    assert tests["backup"].to_dict() == {"mlp 4": False, "6.1": True, "mlp 6": False} and tests.loc["6.1", "stands_in"]
    assert tests["estimate"].tolist() == pytest.approx([-0.4, 1.5, -0.3], abs=0.03)
    assert tests.loc["6.1", "ratio_estimate"] == pytest.approx(1.5 / 2, abs=0.02)
    told = page.inside_sentences(tests.reset_index())
    assert told[0].startswith("Head 6.1 stands in for other members, inside the slice.") and len(told) == 2
    assert told[1].startswith("Head 6.1 costs ") and "and -0.0" in told[1] and "It makes up for 0.75 [" in told[1]
    assert "No member is shown to stand in for others." in page.inside_sentences(tests.reset_index().iloc[[0]])[0]
    assert measure.inside(step, first._replace(sites=sites[:1])).empty and page.inside_sentences(pd.DataFrame()) == []


def test_of_a_slice_that_costs_nothing_no_share_is_given():
    once = round_of(costs(rise=0.0, damage=0.0))
    assert [bound["share"] for bound in page.missed(once, P)] == [None, None]
    assert "does not surely cost more than the model's noise" in (text := page.ending([once], P)) and "%" not in text


def test_a_rise_on_one_half_is_no_backup():
    once = round_of(costs(rise={"discovery": 0.4, "confirmation": 0.0}))
    assert once.tests["site"].tolist() == ["5.1"]
    tests = measure.joint_tests(once.costs, once.tests, P)
    assert not tests["backup"].item() and tests["estimate"].item() == pytest.approx(0, abs=0.1)
    missed = page.missed(once._replace(tests=tests), P)[0]
    assert missed["site"] == "5.1" or missed["logits"] >= tests["high"].item(), "what is not confirmed may be missed"
    tests = measure.joint_tests(costs(rise=0.4), once.tests, P).iloc[0]
    assert tests["backup"] and tests["stands_in"] and tests["estimate"] == pytest.approx(0.4, abs=0.1)
    whole = measure.costs_of(effects.reported(costs(rise=0.4))).whole.mean()
    assert tests["ratio_estimate"] == pytest.approx(tests["estimate"] / (whole + tests["estimate"]))
    assert tests["alone_estimate"] == pytest.approx(0.3, abs=0.1)
    falls = measure.joint_tests(costs(rise=0.4).eval("logit_diff_after = logit_diff_after * 0"), once.tests, P).iloc[0]
    assert np.isnan(falls["ratio_estimate"]) and not falls["backup"], "nothing was lost that could be made up for"


def test_compensation_and_split_by_hand():
    head, mlp, own = ("heads", Site(5, "head", 1)), ("mlps", Site(5, "mlp")), ("direct", Site(3, "mlp"))
    changes = [{own: -2.0, head: 0.5, mlp: 0.25}, {own: -1.0, head: 1.5, mlp: 0.0}, {own: -0.2, head: 0.0, mlp: -0.5}]
    rows = [row for i, c in enumerate(changes) for row in split_rows(f"p{i}", "confirmation", c)]
    rows += [
        row for i, c in enumerate(changes) for row in split_rows(f"p{i}", "confirmation", {own: 0.1}, name="random 1")
    ]
    frame = pd.DataFrame(rows)
    found = page.compensation(frame, P).set_index("later")["estimate"]
    assert found["heads"] == pytest.approx(2.0 / 3.2) and found["MLPs"] == pytest.approx(-0.25 / 3.2)
    assert found["heads and MLPs"] == pytest.approx(1.75 / 3.2)
    ratios = page.pair_ratios(frame, P)  # p2 loses less than the floor of 0.5
    assert dict(zip(ratios["pair_id"], ratios["ratio"], strict=True)) == {"p0": 0.375, "p1": 1.5}
    (spread,) = page.distribution(ratios, P)
    assert spread["pairs"] == 2 and spread["repaired"].estimate == 1 and spread["overshot"].estimate == 0.5
    split = page.split_table(frame, P).set_index(["slice", "part"])["estimate"]
    assert split["slice", "direct"] == pytest.approx(-3.2 / 3) and split["slice", "total"] == pytest.approx(-1.45 / 3)
    assert split["random slices", "direct"] == pytest.approx(0.1)
    gains = frame[frame["slice"] == "random 1"].assign(slice="slice")
    assert page.compensation(gains, P)["estimate"].isna().all()  # nothing was lost
    more = [row for n in range(10) for row in split_rows(f"x{n}", "confirmation", {own: 0.5, head: 0.0, mlp: 0.0})]
    mixed = pd.concat([frame, pd.DataFrame(more).assign(quad_id="qx")])
    assert page.compensation(mixed, P)["estimate"].isna().all(), "quads lose on average, the pairs gain in sum"
    risen = [
        row for i, c in enumerate(changes) for row in split_rows(f"p{i}", "confirmation", {**c, own: 3.0, head: -6})
    ]
    assert page.pair_ratios(pd.DataFrame(risen), P).empty, "a direct effect that rises is no loss to be made up for"


def test_a_ratio_over_a_loss_within_the_noise_is_not_given():
    """Of a slice whose direct effect falls by 0.001 logits nothing can be made up for, whatever later sites do."""
    later, own = ("mlps", Site(5, "mlp")), ("direct", Site(3, "mlp"))
    for loss, given in ((0.001, False), (0.02, True)):
        rows = [
            row
            for half in effects.HALVES
            for index in range(24)
            for row in split_rows(f"{half}{index}", half, {own: -loss * (1 + 0.1 * (index % 3 - 1)), later: 2.0})
        ]
        frame = pd.DataFrame(rows)
        ratios = page.compensation(frame, P)
        assert ratios["estimate"].notna().all() == given and ratios["estimate"].isna().all() != given
        said = page.split_sentences(page.split_table(frame, P), ratios, [], P)[0]
        assert ("no compensation ratio" in said) != given and (": the compensation ratio is" in said) == given


def test_a_rise_within_the_noise_is_no_backup():
    """Head 5.1 costs 9e-6 logits more in every quad once the slice is gone."""
    tiny, records = 9e-6, costs(rise=0.0)
    more = tiny * (1 + 0.01 * (np.arange(len(records)) % 5))
    after = -np.select([records["site_set"].isin(range(5, 7)), records["site_set"].eq(2)], [tiny / 2, 2 + more], 2.0)
    records = records.assign(logit_diff_after=np.where(records["site_set"].eq(5), -tiny / 2, after))
    for floor, names in ((0.0, ["5.1"]), (P.floor, [])):
        given = SimpleNamespace(**P.model_dump() | {"floor": floor})
        table = measure.rises(records, LATER, given)
        assert measure.candidates(table, given)["site"].tolist() == names
    rising = effects.reported(table)[lambda rows: rows["site"] == "5.1"]
    tests = measure.joint_tests(records, rising, P).iloc[0]
    assert 0 < tests["low"] < P.floor and not tests["backup"] and not tests["stands_in"]


def test_what_one_kind_of_later_sites_is_shown_to_do_by_itself_is_said():
    def said(whole, heads, mlps, above_noise=True):
        spans = {"heads and MLPs": whole, "heads": heads, "MLPs": mlps}
        own = {
            name: SimpleNamespace(estimate=0.0, low=low, high=high, above_noise=above_noise)
            for name, (low, high) in spans.items()
        }
        return page.verdict(own["heads and MLPs"]) + page.apart(own["heads and MLPs"], own)

    none = "neither repair nor loss by later sites together is shown"
    assert said((-0.2, 0.1), (-0.03, -0.004), (-0.1, 0.1)) == f"{none}; later heads by themselves lose as well"
    assert said((-0.2, 0.1), (-0.1, 0.1), (-0.1, 0.1)) == none
    assert said((-0.2, -0.1), (-0.2, -0.1), (0.1, 0.2)).endswith("nothing; later MLPs by themselves repair")
    assert said((None, None), (None, None), (np.nan, np.nan)) == "too few quads to say more"
    assert said((1e-6, 2e-6), (1e-6, 2e-6), (-2e-6, -1e-6), above_noise=False) == none


@pytest.mark.parametrize(
    ("rise", "rounds", "why"), [(0.0, 3, "no later site rises"), (0.4, 0, "the limit of rounds (0)")]
)
def test_a_page_without_candidates_says_why(rise, rounds, why):
    frame, once = fabricated(rise=rise), round_of(costs(rise=rise), tests=pd.DataFrame())
    step = SimpleNamespace(params=P.model_copy(update={"rounds": rounds}))
    assert why in page.candidates_table(step, [once]).data
    nothing = once._replace(frame=frame.assign(after=0.0), rises=once.rises.head(0))
    assert page.pairs_figure(step, [nothing]).data.startswith("In no pair does the slice lose more than")
    assert page.ranked(step, [nothing]).data == "No head or MLP comes after the slice."


def test_few_quads_and_one_half_go_through():
    frame = fabricated(rise=0.3, quads=3, half=["confirmation"])
    once = round_of(costs(rise=0.3, quads=3, half=["confirmation"]), frame=frame)
    split, ratios = page.split_table(frame, P), page.compensation(frame, P)
    spread = page.distribution(page.pair_ratios(frame, P), P)
    text = " ".join(page.split_sentences(split, ratios, spread, P))
    assert "oo few quads" in text and "nan" not in text
    assert "too few quads to confirm a backup, or to rule one out" in page.ending([once], P)
    assert page.missed(once, P) == []


def test_below_twenty_quads_no_site_is_said_to_rise_or_to_be_no_backup():
    records = costs(rise=0.4, quads=16)
    once = round_of(records)
    assert once.tests["site"].tolist() == ["5.1"], "the search goes on with it"
    once = once._replace(tests=measure.joint_tests(records, once.tests, P))
    (text,) = page.backup_sentences([once], P)
    assert (
        "significant" not in text
        and " 1 of the 3 later sites costs more than when ablated alone, on the discovery half by the test" in text
    )
    largest = once.tests["estimate"].max()
    assert "its 16 quads are too few for an interval" in text and f"estimate there is {largest:.3f} logits" in text
    assert page.tests_table([once])["backup"].tolist() == ["too few quads to test"]
    assert not page.leading(once.rises, 3, P)["site"].str.contains("*", regex=False).any()
    step, alone = SimpleNamespace(params=P), round_of(costs(rise=0.0, quads=16), tests=pd.DataFrame())
    assert "all that so few quads allow" in page.candidates_table(step, [alone]).data


def test_what_the_figures_show():
    frame = fabricated(rise=0.4)
    split = page.split_table(frame, P)
    axes = plots.part_bars(split, "logits").axes[0]
    bars = [patch.get_height() for patch in axes.patches]
    assert bars == pytest.approx(split["estimate"].tolist()) and len(bars) == 5
    ratios = pd.DataFrame({"ratio": [0.5, 0.52, -9.0, 7.0], "ablation": "zero"})
    drawn = plots.pair_histogram(ratios, "ratio", "ratio").axes[0].patches[0].get_data().values
    assert drawn.sum() == 4 and drawn[0] == 1 and drawn[-1] == 1 and drawn[25] == 2
    once = round_of(costs(rise=0.4), frame=frame)
    table = once.rises
    curve = page.rounds_table([once, once._replace(sites=[Site(3, "mlp"), Site(5, "head", 1)])], P)
    assert curve["n_sites"].unique().tolist() == [1, 2] and len(curve) == 8
    figure = plots.widening_curve(curve)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["joint damage (logits)", "compensation ratio"]
    rise, sure, layers = page.rise_map(table, 3, P)
    assert layers == [5] and rise.shape == (1, 3) and np.isnan(rise[0, 2]) and sure[0, :2].tolist() == [0, 1]
    assert page.leading(table, 2, P)["site"].tolist() == ["5.1 *", "5.1 *", "mlp 5", "mlp 5"]
    assert page.leading(table, 1, P)["site"].tolist() == ["5.1 *"] * 2, "what rises comes before a larger change"


def test_necessity_is_a_share_of_what_the_ablation_can_take_away(tiny):
    """The whole final residual stream is the ceiling: a slice that is this very site takes all of it."""
    model = tiny("llama")
    step = SimpleNamespace(params=P, prompts=lambda: PAIRS, n_layers=model.n_layers)
    whole = [Site(model.n_layers - 1, "resid")]
    frames = [
        sweep.run(model, unit.pairs, pool=PAIRS, **unit.options)
        for unit in measure.needed_units(step, whole)  # site set 0 is the slice, 1 the ceiling
    ]
    frame = pd.concat(frames)
    assert {*frame["ablation"]} == {"resample", "mean", "counterfactual"}
    assert frame.query("ablation == 'counterfactual'").eval("logit_diff_after - logit_diff_corrupt").abs().max() < 1e-9
    sides = np.sign(frame["logit_diff_clean"] - frame["logit_diff_corrupt"])  # a random model prefers either answer
    values = [name for name in frame if name.startswith("logit_diff")]
    taken = page.necessity(frame.assign(**frame[values].mul(sides, axis=0)), P)
    assert taken["estimate"].tolist() == pytest.approx([1.0] * len(taken)) and "counterfactual" in {*taken["ablation"]}


def needed(slice_falls: dict[str, float], ceilings: dict[str, float], quads: int = 24) -> pd.DataFrame:
    """Records of `measure.NEEDED`, gaps of 4 and 6 in turn, in which slice and ceiling take these shares of each."""
    return pd.DataFrame(
        {
            "half": half, "quad_id": f"{half}{quad:02d}", "pair_id": f"{half}{quad:02d}", "ablation": kind,
            "direction": "noise", "site_set": place, "logit_diff_clean": 1.0 + gap, "logit_diff_corrupt": 1.0,
            "logit_diff_before": 1.0 + gap, "logit_diff_after": 1.0 + gap - share * gap,
        }
        for half in effects.HALVES
        for place, shares in enumerate((slice_falls, ceilings))
        for kind, share in shares.items()
        for quad in range(quads)
        for gap in ((4.0, 6.0)[quad % 2],)
    )  # fmt: skip


def test_the_first_class_neutral_ablation_judges_the_slice():
    falls, most = {"mean": 0.3, "resample": 0.2, "counterfactual": 0.9}, {"mean": 0.5, "resample": 0.4}
    taken = page.necessity(needed(falls, most | {"counterfactual": 1.0}), P).set_index("ablation")
    assert taken["estimate"].to_dict() == pytest.approx({"mean": 0.6, "resample": 0.5, "counterfactual": 0.9})
    assert taken["judges"].to_dict() == {"mean": False, "resample": True, "counterfactual": False}
    said = page.necessity_sentences(taken.reset_index())
    assert "(`resample`), the slice takes away 0.50 [0.50, 0.50] of what the whole" in said[0]
    assert "In shares of the gap that is 0.20 [0.20, 0.20], against 0.40 [0.40, 0.40]." in said[0]
    assert "This is over 24 pairs of 24 quads; page 07 gives it over its own pairs" in said[0]
    assert "| `mean` | 0.60 [0.60, 0.60] | 0.30" in said[1] and "`resample`" not in said[1]
    alone = page.necessity(needed({"counterfactual": 0.9}, {"counterfactual": 1.0}), P)
    assert not alone["judges"].any() and "is not testable" in page.necessity_sentences(alone)[0]
    none = page.necessity(needed(falls, {"mean": -0.1, "resample": 0.4, "counterfactual": 1.0}), P)
    assert {*none["ablation"]} == {"resample", "counterfactual"}, "a ceiling that is not above zero has no shares"
