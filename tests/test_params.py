"""Parameters: what is accepted, and the one sentence that says what is wrong."""

import json
import math
import re
from types import SimpleNamespace

import pytest

from pipeline import params
from pipeline.params import ParameterError, load_profile
from steps.__main__ import parameters_cell
from steps.registry import PLAN

BASE = {"model": "./m", "profile": "mine"}
TWICE = """profile: twice
model: x
necessity:
  components: [head]
  ablations: [zero]
layers: [20, 23]
necessity:
  pairs: 4
layers: all
"""


def validate(step, given):
    return params.validate(PLAN.sections, step, given)


def from_notebook(step, namespace):
    return params.from_notebook(PLAN.sections, step, namespace)


def test_every_profile_is_valid_for_every_step():
    assert params.profiles() == [
        "cities-quick",
        "llama-3.3-70b",
        "planted",
        "smoke",
        "smollm2-135m",
        "smollm2-135m-fresh",
        "smollm2-135m-quick",
    ]
    for name in params.profiles():
        for step in PLAN.names:
            assert validate(step, load_profile(name)).profile == name


def test_the_default_profile_has_the_sizes_the_report_is_built_on():
    given = load_profile("smollm2-135m")
    base, coarse = validate("baselines", given), validate("coarse_sweep", given)
    need, enough = validate("necessity", given), validate("sufficiency", given)
    assert base.quads_per_half == 80 and base.pairs_per_quad == 2
    assert coarse.roles == ("name_a", "name_b", "names", "between", "last", "rest")
    assert coarse.name_pairs == 40
    assert need.layers == "all" and need.pairs == enough.pairs == coarse.pairs == 160 and need.name_pairs == 40
    assert need.components == enough.components == ("resid", "attn", "mlp", "head")
    assert need.ablations == ("zero", "mean", "resample", "counterfactual")
    assert need.name_components == ("resid", "attn", "mlp") and need.slice_limit == 24
    assert need.template == "profession_both" and need.seed == 0


def test_the_papers_profile():
    given = validate("necessity", load_profile("llama-3.3-70b"))
    assert given.model == "meta-llama/Llama-3.3-70B-Instruct" and given.aggregator_layer == 37
    assert (given.quantisation, given.dtype, given.device_map) == ("nf4", "bfloat16", "auto")


def test_no_key_means_two_things_and_each_is_described():
    for model in PLAN.sections.values():
        assert not set(params.section_keys(model)) & params.SHARED
        assert not set(model.model_fields) & set(PLAN.names)
        assert all(field.description for field in model.model_fields.values())


def test_a_flat_key_beats_the_section_and_other_sections_are_left_alone():
    given = BASE | {"necessity": {"pairs": 5, "name_pairs": 7}, "coarse_sweep": {"no such": 1}}
    assert validate("necessity", given).pairs == 5
    own = validate("necessity", given | {"pairs": 9})
    assert (own.pairs, own.name_pairs) == (9, 7)
    assert validate("necessity", given | {"pairs": None}).pairs == 5  # None: not given


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"layers": "21,22"}, "layers", (21, 22)),
        ({"layers": " 21, 22 "}, "layers", (21, 22)),
        ({"layers": 21}, "layers", (21,)),
        ({"layers": [3, 1]}, "layers", (3, 1)),
        ({"layers": "[21,22]"}, "layers", (21, 22)),
        ({"layers": " [ 21 ] "}, "layers", (21,)),
        ({"components": "[head, 'mlp']"}, "components", ("head", "mlp")),
        ({"layers": "auto"}, "layers", "auto"),
        ({"components": "head, mlp"}, "components", ("head", "mlp")),
        ({"components": "head"}, "components", ("head",)),
        ({"name_roles": []}, "name_roles", ()),
        ({"memory": 4}, "memory", 4.0),
        ({"max_memory": {0: 70, "cpu": 100}}, "max_memory", {0: 70.0, "cpu": 100.0}),
        ({"aggregator_layer": 37}, "aggregator_layer", 37),
        ({"task": "odd_one_out"}, "template", "odd_one_out"),
        ({}, "template", "profession_both"),
        ({"template": "{a} or {b}: both"}, "template", "{a} or {b}: both"),
    ],
)
def test_what_papermill_and_yaml_give_is_understood(given, key, value):
    assert getattr(validate("necessity", BASE | given), key) == value


# Each line nine times the line before: some 10^10 values.
NINE = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 11)]
GROWING = "\n".join(["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]", *NINE])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layrs": "all"}, r"layrs = 'all' of step necessity \(did you mean 'layers'\?\); allowed are profile, model"),
        ({"roles": "last"}, "roles = 'last'.*'roles' belongs to coarse_sweep"),
        ({"necessity": {"pears": 3}}, r"pears = 3 in section necessity \(did you mean 'pairs'\?\).*name_pairs"),
        ({"necessity": {"seed": 3}}, "seed = 3 in section necessity.*shared key: give it outside"),
        ({"necessity": 3}, "section necessity = 3: must hold keys and values"),
        ({"layers": "some"}, "layers = 'some'.*'all' or 'auto'"),
        ({"layers": [3, -1]}, "layers = -1.*greater than or equal to 0"),
        ({"layers": "-1"}, "layers = -1.*greater than or equal to 0"),
        ({"layers": []}, r"layers = \(\).*at least 1"),
        ({"layers": "1,1"}, "names something twice"),
        ({"layers": True}, "layers = True"),
        ({"layers": 1.5}, "layers = 1.5"),
        ({"layers": "1 site"}, "layers = '1 site'.*'all' or 'auto'.*or a list of layers"),
        ({3: "x"}, "unknown parameter 3 = 'x' of step necessity"),
        ({"results_dir": 2026}, "results_dir = 2026.*valid string; or give papermill a text with -r in place of -p"),
        ({"name_pairs": -3}, "name_pairs = -3.*greater than or equal to 1"),
        ({"name_pairs": 2.5}, "name_pairs = 2.5.*integer"),
        ({"pairs": "ten"}, "pairs = 'ten'.*integer"),
        ({"resamples": -1}, "resamples = -1"),
        ({"components": "hed,mlp"}, "components = 'hed'.*'resid', 'attn', 'mlp' or 'head'"),
        ({"components": []}, "components = .*at least 1"),
        ({"ablations": "mean,none"}, "ablations = 'none'.*'zero', 'mean', 'resample' or 'counterfactual'"),
        ({"name_roles": "frist"}, "name_roles = 'frist'.*'swapped'"),
        ({"task": "supersett"}, "task = 'supersett'.*'superset'"),
        ({"template": "profession_bot"}, r"template = 'profession_bot'.*did you mean 'profession_both'"),
        (
            {"template": "odd_one_out"},
            r"'odd_one_out' \(it is of task odd_one_out\).*task superset are profession_both",
        ),
        ({"dtype": "fp32"}, "dtype = 'fp32'.*'float32'"),
        ({"device": "gpu"}, "device = 'gpu'.*auto, cpu, cuda"),
        ({"quantisation": "nf5"}, "quantisation = 'nf5'.*'nf4' or 'int8'"),
        ({"level": 95}, "level = 95.*less than 1"),
        ({"level": math.nan}, "level = nan"),
        ({"memory": -1}, "memory = -1.*greater than 0"),
        ({"memory": math.inf}, "memory = inf.*finite number"),
        ({"memory": "lots"}, "memory = 'lots'.*'auto'"),
        ({"max_memory": {"cpu": "x"}}, "max_memory = 'x'"),
        ({"model_sha256": "abc"}, "model_sha256 = 'abc'"),
        ({"profile": "../x"}, "profile = '../x'"),
        ({"overwrite": "yes"}, "overwrite = 'yes'.*boolean"),
        ({"seed": True}, "seed = True"),
        ({"aggregator_layer": "x"}, "aggregator_layer = 'x'"),
        ({"model": None}, "model is not given: run with -f params"),
    ],
)
def test_every_mistake_is_one_sentence(given, message):
    with pytest.raises(ParameterError, match=message) as caught:
        validate("necessity", BASE | given)
    assert "\n" not in str(caught.value)
    assert caught.value._render_traceback_() == [f"ParameterError: {caught.value}"]


def test_an_unknown_template_of_step_01():
    with pytest.raises(ParameterError, match=r"templates = 'both_famos' \(did you mean 'both_famous'\?\)"):
        validate("baselines", BASE | {"templates": ["profession_both", "both_famos"]})
    with pytest.raises(ParameterError, match=r"order_templates = 'both_famos' \(did you mean 'both_famous'"):
        validate("sufficiency", BASE | {"order_templates": ["both_famos"]})


def test_steps_and_profiles_that_do_not_exist(tmp_path):
    with pytest.raises(
        ParameterError, match=r"'necesity' is unknown \(did you mean 'necessity'\?\); the steps are base"
    ):
        validate("necesity", BASE)
    with pytest.raises(
        ParameterError, match=r"'smok' is unknown \(did you mean 'smoke'\?\); there are cities-quick, llama"
    ):
        load_profile("smok")
    path = tmp_path / "mine.yaml"
    for text, message in (
        ("a: [1", "mine.yaml is not valid YAML"),
        ("- 1", "must hold keys and values, not list"),
        ("", "must hold keys and values, not NoneType"),
        ("model: x\nprofile: other", "calls itself 'other'; name it 'mine'"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        (
            "model: x\nnecessity: {pairs: 1}\nseed: 0\nnecessity: {pairs: 4}",
            "key 'necessity' stands there twice, in lines 2 and 4",
        ),
        ("model: x\nnecessity: {pairs: 1, pairs: 4}", "key 'pairs' stands there twice, in lines 2 and 2"),
        ("model: x\nlevel: .nan", "level = .nan in line 2 would be misread: write a finite decimal number"),
        ("model: x\nnecessity: {memory: -.inf}", "memory = -.inf in line 2 would be misread: write a finite"),
        ("model: x\nseed: 010", "seed = 010 in line 2 would be misread: write a whole number in decimal digits"),
        ("model: x\nseed: 1:30", "seed = 1:30 in line 2 would be misread: write a whole number"),
        ("model: x\nseed: 0x1F", "seed = 0x1F in line 2 would be misread: write a whole number"),
        ("model: x\nmemory: 1.0e+400", "memory = 1.0e+400 in line 2 would be misread: write a finite decimal number"),
        ("model: x\nlevel: !!float ''", "mine.yaml is not valid YAML: could not convert"),
        ("model: x\nseed: " + "1" * 5000, "mine.yaml is not valid YAML: Exceeds the limit"),
        ("model: x\nlayers: &all [1, *all]", "mine.yaml is not valid YAML: what begins in line 2 holds itself"),
        ("model: x\nstory: &all {claims: *all}", "mine.yaml is not valid YAML: what begins in line 2 holds itself"),
        (GROWING, "mine.yaml is not valid YAML: what begins in line 6 holds itself, or 100000 values or more"),
        ("model: " + "[" * 5000, "mine.yaml is not valid YAML: a list holds itself, or lists are nested too deep"),
        ("model: x\n!!str [a]: 1", "key (a sequence) in line 2 is not text"),
        ("model: x\nnecessity: !!int {pairs: 1}", "mine.yaml is not valid YAML"),
        ("model: x\nseed: !!timestamp 2026-13-45", "seed = 2026-13-45 in line 2 would be misread"),
        ("model: x\n\tseed: 1", "mine.yaml is not valid YAML"),
        ("model: x\n---\nmodel: y", "mine.yaml is not valid YAML: expected a single document"),
        ("model: x\x00", "mine.yaml is not valid YAML"),
        ("model: x\nlevel: 1:30.5", "level = 1:30.5 in line 2 would be misread: write a finite decimal number"),
        (
            "model: x\ntemplate: no",
            "template = no in line 2 would be misread: write true or false, or a text in quotes",
        ),
        ("model: x\nroles:\n- last\n- off", "roles = off in line 4 would be misread: write true or false"),
        ("model: x\nroles: [[last, [yes]]]", "roles = yes in line 2 would be misread: write true or false"),
        ("model: 2026-11-27", "model = 2026-11-27 in line 1 would be misread: write a date in quotes"),
        ("model: x\nyes: 1", "key 'yes' in line 2 is not text: write it in quotes"),
        ("model: x\n~: 1", "key '~' in line 2 is not text"),
        ("model: x\n1.5: 1", "key '1.5' in line 2 is not text"),
        ("model: x\n? [a, b]\n: 1", "key (a sequence) in line 2 is not text"),
        ("model: x\nmax_memory: {010: 1}", "010 = 010 in line 2 would be misread"),
        ("model: x\nnecessity:\n- {a: 1}\n- b: {c: 1}\n  d: 2\n  b: 3", "key 'b' stands there twice, in lines 4 and 6"),
    ):
        path.write_text(text)
        with pytest.raises(ParameterError, match=re.escape(message)):
            load_profile(str(path))
    path.write_text("model: x")
    assert load_profile(str(path)) == {"model": "x", "profile": "mine"}
    path.write_text("model: 'no'\nlevel: -0.5\nseed: 1_000\nmax_memory: {0: 1.0e+3, cpu: .5}\nchat_template: True\n")
    read = {"model": "no", "level": -0.5, "seed": 1000, "max_memory": {0: 1000.0, "cpu": 0.5}, "chat_template": True}
    assert load_profile(str(path)) == read | {"profile": "mine"}
    path.write_bytes("\ufeffmodel: x\r\nseed: 1\r\n".encode())
    assert load_profile(str(path)) == {"model": "x", "seed": 1, "profile": "mine"}
    path.write_text("a: &a {model: x, seed: 1}\n<<: *a\nseed: 2\n")  # a key over one that is merged in is no second one
    assert load_profile(str(path)) == {"a": {"model": "x", "seed": 1}, "model": "x", "seed": 2, "profile": "mine"}


def test_a_site_that_came_as_a_number_is_refused():
    """papermill turns 21.10 into 21.1, which is another head; a text is as it was written."""
    for given in (21.1, [21.1], [21.1, "mlp 23"]):
        with pytest.raises(ParameterError, match="slice_sites = .*21.1 came as a number; give papermill a text"):
            validate("hydra", BASE | {"slice_sites": given})
    with pytest.raises(ParameterError, match="slice_sites = '1 site'.*as heads and modules such as 21.6,mlp 23"):
        validate("hydra", BASE | {"slice_sites": "1 site"})
    assert validate("hydra", BASE | {"slice_sites": "[21.10, mlp 23]"}).slice_sites == ("21.10", "mlp 23")


@pytest.mark.parametrize("how", [["-f", "{}"], ["-f{}"], ["--parameters_file", "{}"], ["--parameters_file={}"]])
def test_a_file_that_papermill_read_is_read_again(tmp_path, monkeypatch, how):
    """A kernel is handed values: of two equal keys the last, without a word."""
    (tmp_path / "twice.yaml").write_text(TWICE)
    words = ["python", "-m", "papermill", "in.ipynb", "out.ipynb", *(word.format("twice.yaml") for word in how)]
    parent = SimpleNamespace(cmdline=lambda: [*words, "-p", "a", "b"], cwd=lambda: str(tmp_path))
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(parent=lambda: parent))
    with pytest.raises(ParameterError, match="twice.yaml .*key 'necessity' stands there twice, in lines 3 and 7"):
        from_notebook("necessity", {"profile": "twice", "model": "x", "necessity": {"pairs": 4}})
    words[3:] = ["in.ipynb", "out.ipynb", "-y", "{model: x, seed: 010}"]
    with pytest.raises(ParameterError, match="-y is not valid YAML: seed = 010 in line 1 would be misread"):
        from_notebook("necessity", {"profile": "twice", "model": "x", "seed": 8})
    words[2] = "jupyterlab"
    assert from_notebook("necessity", {"profile": "twice", "model": "x", "necessity": {"pairs": 4}}).pairs == 4


def test_a_notebooks_variables():
    session = {"In": ["x"], "Out": {}, "exit": print, "get_ipython": print, "_i1": "x", "__name__": "m", "re": re}
    own = from_notebook("necessity", session | {"profile": "smoke", "layers": None, "pairs": 3, "seed": 5})
    base = load_profile("smoke")
    assert (own.profile, own.pairs, own.seed, list(own.layers)) == ("smoke", 3, 5, base["layers"])
    assert from_notebook("necessity", session).profile == "smollm2-135m"
    # papermill -f gives the whole profile
    assert from_notebook("necessity", session | {"profile": "no-such", "model": "./m"}).model == "./m"
    with pytest.raises(ParameterError, match="profile is not given"):
        from_notebook("necessity", session | {"model": "./m"})
    with pytest.raises(ParameterError, match="unknown parameter pear = 3"):
        from_notebook("necessity", {"profile": "smoke", "pear": 3})


PROFILE_CELL = 'profile = "smoke"\npairs = 3  # pairs'
ADDED_CELL = '# Parameters\nprofile = "smoke"\n'


@pytest.mark.parametrize(
    ("cells", "variables", "message"),
    [
        ([PROFILE_CELL + "\npear = 3"], {"pear": 3}, "unknown parameter pear = 3"),
        ([PROFILE_CELL, ADDED_CELL + "layrs = 2"], {"layrs": 2}, "unknown parameter layrs = 2"),
        ([PROFILE_CELL + "\nlayers = range(2)"], {"layers": range(2)}, r"layers = range\(0, 2\)"),
        ([PROFILE_CELL, "pear = 3"], {"pear": 3}, None),
        ([PROFILE_CELL + "\npear = 3", PROFILE_CELL], {"pear": 3}, None),  # mended, and run again
        ([PROFILE_CELL, "found = page.findings(step)"], {"found": {"n": 1}, "i": 2, "roles": ["last"]}, None),
        ([PROFILE_CELL, "model = step.model"], {"model": object(), "pear": object()}, None),
    ],
)
def test_what_is_no_parameter_is_left_alone_unless_it_stands_in_a_parameters_cell(cells, variables, message):
    session = {"In": ["", *cells], "profile": "smoke", "pairs": 3} | variables
    if message is None:
        assert from_notebook("necessity", session) == from_notebook("necessity", {"profile": "smoke", "pairs": 3})
    else:
        with pytest.raises(ParameterError, match=message):
            from_notebook("necessity", session)


def test_a_model_named_in_its_cell_stands_on_the_profile():
    """Not on the defaults alone; the hash of the profile's own weights is not that of another model's."""
    session = {"In": [PROFILE_CELL], "profile": "smoke", "model": "owner/name"}
    own, base = from_notebook("necessity", session), load_profile("smoke")
    assert (own.model, own.model_sha256, own.min_pairs) == ("owner/name", None, base["min_pairs"])
    assert from_notebook("necessity", session | {"model": base["model"]}).model_sha256 == base["model_sha256"]


@pytest.mark.parametrize("step", PLAN.names)
def test_no_variable_of_a_notebook_has_the_name_of_a_parameter(step):
    """Its first cell, run again, would take the variable for the parameter."""
    cells = json.loads(PLAN.notebook(step).read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code" and "parameters" not in cell["metadata"]["tags"]]
    text = "\n".join("".join(cell["source"]) for cell in code)
    names = set(re.findall(r"^(\w+) = ", text, flags=re.M))
    assert {"step", "found"} <= names and not names & {*PLAN[step].params.model_fields, *PLAN.names}


def test_a_profile_with_a_doubled_section_is_refused_by_a_notebook_too(tmp_path, monkeypatch):
    (tmp_path / "params").mkdir()
    (tmp_path / "params/own.yaml").write_text("model: x\nnecessity: {pairs: 1}\nnecessity: {seed: 4}")
    monkeypatch.setattr(params, "ROOT", tmp_path)
    with pytest.raises(ParameterError, match="'necessity' stands there twice"):  # papermill read the last and ran
        from_notebook("necessity", {"profile": "own", "model": "x", "necessity": {"seed": 4}})


def test_layers_are_checked_against_the_model():
    params.check_layers(validate("necessity", BASE | {"layers": "0,29"}), 30)
    for given, key in (({"layers": "3,30"}, "layers"), ({"aggregator_layer": 30}, "aggregator_layer")):
        with pytest.raises(ParameterError, match=f"parameter {key}: layer 30 is not in ./m, which has layers 0 to 29"):
            params.check_layers(validate("necessity", BASE | given), 30)


def test_parameters_cannot_be_changed():
    own = validate("necessity", BASE)
    with pytest.raises(ValueError, match="frozen"):
        own.seed = 3


def test_a_module_under_a_sections_name_does_not_hide_the_section():
    with pytest.raises(ParameterError, match="imports a module under the name 'baselines'"):
        from_notebook("baselines", {"profile": "smoke", "baselines": pytest})


@pytest.mark.parametrize(("given", "meant"), [("true", True), ("True", True), (True, True), ("false", False)])
def test_a_truth_value_may_come_as_papermill_leaves_it(given, meant):
    assert validate("necessity", {"model": "owner/name", "overwrite": given}).overwrite is meant


@pytest.mark.parametrize("step", PLAN.names)
def test_a_notebooks_parameters_cell_is_that_of_its_steps_model(step):
    """Complete and up to date: `make format` writes it, and `papermill --help-notebook` prints it."""
    cells = json.loads(PLAN.notebook(step).read_text())["cells"]
    (cell,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    assert "".join(cell["source"]) == parameters_cell(step)
    names = re.findall(r"^(\w+) = ", "".join(cell["source"]), flags=re.M)
    assert {*params.section_keys(PLAN[step].params), "profile", "model", "results_dir"} <= set(names)
    assert "layers" not in names or PLAN[step].layered
