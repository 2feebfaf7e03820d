"""Parameters: the keys that every step takes, profiles, and notebooks' variables, as checked values.

1. `Shared` holds the keys of every step, with units, defaults and bounds; a step's own model adds its section's keys.
2. `load_profile` reads `params/<name>.yaml`: flat shared keys and one section per step.
3. `validate` merges the two (a flat key beats the section) and turns every mistake into one sentence.
4. `from_notebook` picks what was given out of a notebook's variables.

`sections` is what a plan has: each step's name with its model, in order.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from lib import questions, safe_yaml
from lib.errors import Refusal
from lib.hooks import FLOORS, at_size
from lib.questions import Question

ROOT = Path(__file__).resolve().parents[1]


class ParameterError(Refusal):
    """A parameter that is unknown, out of bounds, or does not fit the model."""


# What to write where a text looks like a number.
AS_TEXT = "give papermill a text with -r in place of -p, and YAML one in quotes"
Component = Literal["resid", "attn", "mlp", "head"]
Ablation = Literal["zero", "mean", "resample", "counterfactual"]
Role = Literal["name_a", "name_b", "name_c", "names", "swapped", "between", "last", "rest", "all"]


def _bare(value: Any) -> Any:
    """A list in brackets comes as text through `-p`: what stands between them."""
    found = re.fullmatch(r"\s*\[(.*)\]\s*", value) if isinstance(value, str) else None
    return found[1] if found else value


def _words(value: Any) -> Any:
    """`-p components head,mlp` comes as text; YAML gives lists. One word alone is a list of one."""
    value = _bare(value)
    if isinstance(value, str):
        return tuple(word.strip(" '\"") for word in value.split(",") if word.strip())
    return tuple(value) if isinstance(value, list) else value


def _sites(value: Any) -> Any:
    """As `_words`; a number is refused, because 21.1 and 21.10 are two heads and one number."""
    value = _words(value)
    for site in value if isinstance(value, tuple) else (value,):
        if isinstance(site, float):
            raise ValueError(f"{site} came as a number; {AS_TEXT}")
    return value


def _layers(value: Any) -> Any:
    """`all`, `auto`, a number, a list, or papermill's text "21,22"."""
    value = _bare(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return (value,)
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+(\s*,\s*-?\d+)*\s*,?\s*", value):
        return tuple(int(part) for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _numbers(value: Any) -> Any:
    """A list of numbers, one number, or papermill's text "-1,0,0.5"."""
    value = _bare(value)
    if isinstance(value, str):
        value = [float(word) if re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", word) else word for word in value.split(",")]
    value = [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    return tuple(float(x) if type(x) is int else x for x in value) if isinstance(value, (list, tuple)) else value


def _distinct(value: tuple | None) -> tuple | None:
    if value is not None and len(set(value)) < len(value):
        raise ValueError("names something twice")
    return value


Layer = Annotated[int, Field(ge=0)]
ONCE = AfterValidator(_distinct)
Layers = Annotated[
    Literal["all", "auto"] | Annotated[tuple[Layer, ...], Field(min_length=1), ONCE], BeforeValidator(_layers)
]
Components = Annotated[tuple[Component, ...], Field(min_length=1), BeforeValidator(_words), ONCE]
Ablations = Annotated[tuple[Ablation, ...], Field(min_length=1), BeforeValidator(_words), ONCE]
Roles = Annotated[tuple[Role, ...], BeforeValidator(_words), ONCE]
Names = Annotated[tuple[str, ...], BeforeValidator(_words), ONCE]
Words = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_words), ONCE]
# papermill reads "True" as a truth value and leaves "true" a text
Flag = Annotated[bool, BeforeValidator(lambda value: {"true": True, "false": False}.get(str(value).lower(), value))]
Share = Annotated[float, Field(gt=0, le=1)]
Sites = Annotated[
    tuple[Annotated[str, Field(pattern=r"^(\d+\.\d+|(mlp|attn) \d+)$")], ...] | None, BeforeValidator(_sites), ONCE
]
Heads = Annotated[tuple[Annotated[str, Field(pattern=r"^\d+\.\d+$")], ...], BeforeValidator(_sites), ONCE]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), BeforeValidator(_layers), ONCE]
Doses = Annotated[tuple[float, ...], Field(min_length=1), BeforeValidator(_numbers), ONCE]
SaeSite = Annotated[str, Field(pattern=r"^(mlp|resid) \d+$")]


class Workers(BaseModel):
    """Who does the work units: this process, or actors on a Ray cluster that each hold the model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    engine: Literal["local", "ray"] = Field("local", description="local: this process; ray: actors on a Ray cluster")
    address: str = Field("auto", description="auto: the cluster this machine belongs to; local: start one; host:port")
    replicas: int = Field(1, ge=1, description="actors that each hold the model")
    gpus_per_replica: float = Field(0, ge=0, description="GPUs of each")


class Shared(BaseModel):
    """The keys that every step takes."""

    _largest_logit: float = PrivateAttr(0.0)  # no parameter: what was measured, for `floor`

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    profile: str = Field(
        "smollm2-135m",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of params/<profile>.yaml and results/<profile>",
    )
    model: str = Field(
        min_length=1,
        description="package:name/file.gguf, a folder, a hub id owner/name, or config:file.json",
    )
    tokenizer: str | None = Field(None, description="the model whose tokenizer is taken; needed with config:file.json")
    adapter: str | None = Field(None, description="folder of a LoRA adapter (peft's) that is merged into the model")
    model_sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="SHA-256 of the weights file, checked at load"
    )
    dtype: Literal["float32", "float64", "float16", "bfloat16"] = Field(
        "float32", description="type of the weights and activations"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N or mps")
    device_map: str | dict[str, int | str] | None = Field(
        None, description="accelerate's device map, for models on several devices"
    )
    quantisation: Literal["nf4", "int8"] | None = Field(None, description="load in 4 or 8 bits through bitsandbytes")
    max_memory: dict[int | str, float] | None = Field(None, description="GB per device, for device_map")
    offload_folder: str | None = Field(None, description="folder for weights that fit on no device")
    chat_template: Flag = Field(False, description="wrap prompts in the tokenizer's chat template")
    question: str = Field(
        questions.DEFAULT,
        min_length=1,
        description="what is asked: a folder of data/questions, or one of your own with a question.yaml",
    )
    task: questions.Task = Field("superset", description="how it is asked")
    template: str | None = Field(
        None, description="a template of the task, or its text with {a} and {b}; default: the task's first"
    )
    attributes: Words = Field(("profession", "school"), description="attributes listed in the bi-association prompt")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every random choice")
    full_profile: str | None = Field(None, description="the profile that this one is a quicker form of, if it is")
    layers: Layers = Field(
        "all", description="all, auto (the critical layers of step 02), or a list of layers, counted from 0"
    )
    aggregator_layer: Literal["auto"] | Layer = Field(
        "auto", description="a layer to test as the aggregator; auto: step 02 chooses"
    )
    pairs_file: str | None = Field(None, description="CSV of your own pairs, instead of those of step 01")
    people_file: str | None = Field(
        None, description="table of people (of the question's items) that pairs are made of; default: the question's"
    )
    results_dir: str | None = Field(None, description="folder for results; default results/<profile>")
    memory: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        "auto", description="GB that one pass may take; auto: from the machine's size"
    )
    workers: Workers = Field(Workers(), description="who does the work: engine, address, replicas, gpus_per_replica")
    overwrite: Flag = Field(False, description="replace results that other parameters wrote")
    level: float = Field(0.95, gt=0.5, lt=1, description="confidence level of intervals")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples over quads")
    flips: int = Field(2000, ge=100, description="sign flips of whole quads in max-T tests")
    min_pairs: int = Field(
        40,
        ge=1,
        description="fewest pairs with a gap of the right sign above the noise for a task to count as done",
    )
    critical_share: Share = Field(
        0.8, description="share of the denoise curve's rises that the critical layers add up to"
    )
    slice_share: Share = Field(0.8, description="joint recovery and damage that the critical slice must reach")
    slice_limit: int = Field(24, ge=1, description="most heads and MLPs in the critical slice")
    restores_share: Share = Field(0.5, description="share of pairs whose top candidate must become the clean answer")
    restores_recovery: float = Field(
        0.5, ge=0, le=1, description="what the lower end of recovery's interval must exceed"
    )

    @property
    def topic(self) -> Question:
        """What is asked. ValueError where the question has gone since."""
        return questions.load(self.question)

    @property
    def controls_file(self) -> str | None:
        """The question's lists of invented names and of things."""
        return self.topic.file("controls")

    @property
    def sentences_file(self) -> str | None:
        """The question's sentences."""
        return self.topic.file("sentences")

    @property
    def odd_one_out_file(self) -> str | None:
        """The question's own odd-one-out items."""
        return self.topic.file("odd_one_out")

    @property
    def floor(self) -> float:
        """Logits: what a mean change must exceed to be an effect (`lib.stats.Settings`), of logits as large as those of
        the tables that were read."""
        return at_size(FLOORS[self.quantisation or self.dtype], self._largest_logit)

    def note_logits(self, largest: float) -> None:
        """A table with logits of this size has been read."""
        self._largest_logit = max(self._largest_logit, largest)


class OfSlice(Shared):
    """What the steps about the critical slice share."""

    slice_sites: Sites = Field(
        None, description="the slice, as heads and modules such as 21.6,mlp 23; default: that of step 04"
    )


SHARED = frozenset(Shared.model_fields)
# Shared keys that a notebook's parameters cell lists, because one gives them by hand.
BY_HAND = ("model", "question", "task", "template", "seed", "layers")
BY_HAND += ("pairs_file", "people_file", "results_dir", "memory", "overwrite")
# What a profile is about, which its quicker form leaves as it is, and shared keys of which that may take less.
ABOUT = ("model", "adapter", "chat_template", "question", "task", "template")
SIZES = ("layers", "resamples", "flips")
# Variables of an IPython session that no one gave as a parameter.
_IPYTHON = {"In", "Out", "exit", "quit", "get_ipython", "open"}
# How papermill heads the cell that it adds for what it was given.
ADDED = "# Parameters\n"
Sections = Mapping[str, type[Shared]]


def section_keys(model: type[Shared]) -> list[str]:
    """The keys of a step's own section, in order."""
    return [key for key in model.model_fields if key not in SHARED]


def step_model(sections: Sections, step: str) -> type[Shared]:
    """The pydantic model of a step."""
    if step not in sections:
        raise ParameterError(f"step {step!r} is unknown{_nearest(step, sections)}; the steps are {', '.join(sections)}")
    return sections[step]


def _nearest(word: str, allowed: Sequence[str] | Mapping) -> str:
    close = difflib.get_close_matches(str(word), list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def profiles() -> list[str]:
    """Names of the profiles in params/."""
    return sorted(path.stem for path in (ROOT / "params").glob("*.yaml"))


def read_yaml(given: Path | str) -> Any:
    """What a YAML file or text holds, read safely. ParameterError for what is not YAML, and for a key given twice."""
    try:
        return safe_yaml.parse(given, "-y") if isinstance(given, str) else safe_yaml.read_yaml(given)
    except ValueError as error:
        raise ParameterError(str(error)) from None


def load_profile(name: str) -> dict[str, Any]:
    """The content of params/<name>.yaml, or of the YAML file at the path `name`; `profile` is filled in."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else ROOT / "params" / f"{name}.yaml"
    if not path.is_file():
        known = profiles()
        raise ParameterError(f"profile {name!r} is unknown{_nearest(name, known)}; there are {', '.join(known)}")
    given = read_yaml(path)
    if not isinstance(given, dict):
        raise ParameterError(f"profile {path.name} must hold keys and values, not {type(given).__name__}")
    if given.setdefault("profile", path.stem) != path.stem:
        raise ParameterError(f"profile {path.name} calls itself {given['profile']!r}; name it {path.stem!r}")
    return given


def validate(sections: Sections, step: str, given: Mapping[str, Any]) -> Shared:
    """The step's parameters, checked. None means "not given"; other steps' sections are left alone.

    Raises ParameterError naming the key, the value and what is allowed.
    """
    model = step_model(sections, step)
    flat = {key: value for key, value in given.items() if key not in sections and value is not None}
    section = {} if given.get(step) is None else given[step]
    own = section_keys(model)
    if not isinstance(section, Mapping):
        raise ParameterError(f"section {step} = {section!r}: must hold keys and values ({', '.join(own)})")
    for key in section:
        if key not in own:
            shared = f"; {key!r} is a shared key: give it outside the section" if key in SHARED else ""
            raise ParameterError(_unknown(key, section[key], own, f"in section {step}") + shared)
    for key in flat:
        if key not in model.model_fields:
            homes = [name for name, other in sections.items() if key in section_keys(other)]
            elsewhere = f"; {key!r} belongs to {' and '.join(homes)}" if homes else ""
            raise ParameterError(_unknown(key, flat[key], list(model.model_fields), f"of step {step}") + elsewhere)
    if "model" not in flat:
        raise ParameterError("model is not given: run with -f params/<profile>.yaml, or give -p model")
    topic = _question(flat.get("question", questions.DEFAULT))
    asked = {key: value for key, value in section.items() if value is not None} | flat
    defaults = _defaults(topic, sections)
    try:
        params = model(**{key: value for key, value in defaults.items() if key in model.model_fields} | asked)
    except ValidationError as error:
        raise ParameterError(_sentence(step, model, error)) from None
    filled = {"template": _template(params), "people_file": params.people_file or topic.file("items")}
    attributes = getattr(params, "placebo_attributes", ())
    if unknown := [name for name in attributes if name not in topic.answers]:
        if "placebo_attributes" in asked:
            known = ", ".join([*topic.answers][1:]) or "none"
            raise ParameterError(
                f"parameter placebo_attributes = {unknown[0]!r}: attributes of question {topic.name} that have answers "
                f"of their own: {known}"
            )
        filled["placebo_attributes"] = ()  # a question without an attribute to make placebo pairs by
    return params.model_copy(update=filled)


def _defaults(topic: Question, sections: Sections) -> dict[str, Any]:
    """What parameters are by default in a question. ParameterError where it names one that no step has."""
    known = {key for model in sections.values() for key in model.model_fields}
    if unknown := sorted(topic.defaults.keys() - known):
        raise ParameterError(
            f"{topic.folder / 'question.yaml'}: defaults: no step has a parameter {unknown[0]!r}"
            f"{_nearest(unknown[0], known)}"
        )
    own = {"placebo_attributes": (topic.placebo,)} if topic.placebo else {}
    return own | (topic.defaults if topic is questions.load() else topic.template_defaults)


def _question(name: Any) -> Question:
    """The question of that name. ParameterError for what is none."""
    try:
        return questions.load(str(name))
    except ValueError as error:
        raise ParameterError(f"parameter question = {name!r}: {error}") from None


def _unknown(key: str, value: Any, allowed: Sequence[str], where: str) -> str:
    return f"unknown parameter {key} = {value!r} {where}{_nearest(key, allowed)}; allowed are {', '.join(allowed)}"


def _sentence(step: str, model: type[Shared], error: ValidationError) -> str:
    """The first broken rule: key, value, what is allowed, what the key means."""
    details = error.errors(include_url=False)
    key = str(details[0]["loc"][0])
    # a union fails once per member: say what every member wants
    wanted = dict.fromkeys(detail["msg"].removeprefix("Value error, ") for detail in details if detail["loc"][0] == key)
    inner = [detail["input"] for detail in details if detail["loc"][0] == key]
    value = next((item for item in inner if not isinstance(item, (tuple, dict))), inner[0])
    if any(detail["type"] == "string_type" for detail in details) and type(value) in (int, float, bool):
        wanted[AS_TEXT] = None
    meaning = model.model_fields[key].description
    return f"parameter {key} = {value!r} of step {step}: {'; or '.join(wanted)} ({key}: {meaning})"


def parameters_cells(namespace: Mapping[str, Any]) -> list[str] | None:
    """The parameters cells of an IPython session as they were run last: the one that gives `profile`, and the one that
    papermill adds. None where these are not the variables of such a session."""
    run = namespace.get("In")
    if not isinstance(run, list):
        return None
    given = [cell for cell in run if re.search(r"^profile *=(?!=)", cell, re.M) and not cell.startswith(ADDED)]
    return given[-1:] + [cell for cell in run if cell.startswith(ADDED)][-1:]


def run_by_hand(namespace: Mapping[str, Any]) -> bool:
    """Whether someone runs the cells of a notebook, rather than papermill."""
    cells = parameters_cells(namespace)
    return cells is not None and not any(cell.startswith(ADDED) for cell in cells)


def given_in(sections: Sections, step: str, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """What a notebook's variables give as parameters: plain values (text, numbers, lists, dicts) under names without a
    leading underscore that are not IPython's.

    In an IPython session other variables than parameters are left alone, unless a parameters cell sets them: there, a
    name that is no parameter is a mistake, and so is a value of another type.
    """
    cells = parameters_cells(namespace)
    here = set(re.findall(r"^(\w+)\b[^=\n]*=(?!=)", "\n".join(cells or ()), re.M))
    known, plain = {*step_model(sections, step).model_fields, *sections}, (str, int, float, list, tuple, dict)
    own = {key: value for key, value in namespace.items() if not key.startswith("_") and key not in _IPYTHON}
    return {
        key: value
        for key, value in own.items()
        if (isinstance(value, plain) and (cells is None or key in known | here)) or key in known & here
    }


def from_notebook(sections: Sections, step: str, namespace: Mapping[str, Any]) -> Shared:
    """The step's parameters out of a notebook's `globals()` (see `given_in`).

    Where no `model` is given, and where the notebook is run by hand, the profile's YAML is read beneath them.
    """
    for name in sections:
        if isinstance(namespace.get(name), ModuleType):
            raise ParameterError(f"the notebook imports a module under the name {name!r}, which hides that section")
    given = {key: value for key, value in given_in(sections, step, namespace).items() if value is not None}
    if "model" not in given or (run_by_hand(namespace) and given.get("profile") in profiles()):
        base = load_profile(given.get("profile", Shared.model_fields["profile"].default))
        if given.get("model", base.get("model")) != base.get("model"):
            base |= {"model_sha256": None}  # that of the profile's own model
        given = base | given | {"profile": base["profile"]}
    elif "profile" not in given:
        raise ParameterError("profile is not given: it names the folder of the results; run with -p profile <name>")
    elif given["profile"] in profiles():
        load_profile(given["profile"])
    for each in handed_over():
        read_yaml(each)
    return validate(sections, step, given)


def handed_over() -> list[Path | str]:
    """The files (`-f`) and texts (`-y`) of parameters of the papermill whose kernel this is, by its command line: it
    reads them with PyYAML, which takes the last of two equal keys and says nothing."""
    import psutil  # for kernels alone, which have it

    try:
        parent = psutil.Process().parent()
        words, folder = parent.cmdline(), Path(parent.cwd())
    except (AttributeError, psutil.Error):
        return []
    if not any("papermill" in word for word in words[:3]):
        return []
    command = "\0".join(words)
    named = re.findall(r"\0(?:-f\0?|--parameters_file[\0=])([^\0]+)", command)
    texts = re.findall(r"\0(?:-y\0?|--parameters_yaml[\0=])([^\0]+)", command)
    return [*(folder / name for name in named if (folder / name).is_file()), *texts]


def left_out(sections: Sections, step: str, own: Mapping[str, Any]) -> list[str]:
    """What a step with the parameters `own` (as JSON) does less than with its `full_profile`, one phrase each."""

    def said(value: Any) -> str:
        return (
            "all" if value is None else ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
        )

    full = validate(sections, step, load_profile(own["full_profile"]))
    meaning = {key: field.description.split(";")[0] for key, field in type(full).model_fields.items()}
    wanted = full.model_dump(mode="json", include={*SIZES, *section_keys(type(full))})
    less = {key: value for key, value in wanted.items() if own.get(key, value) != value}
    return [f"{meaning[key]}: {said(own[key])} instead of {said(value)}" for key, value in less.items()]


def check_layers(params: Shared, n_layers: int) -> None:
    """ParameterError when a layer in the parameters is not in the model."""
    named = {"layers": params.layers, "aggregator_layer": (params.aggregator_layer,)}
    for key, layers in named.items():
        for layer in layers if isinstance(layers, tuple) else ():
            if layer != "auto" and layer >= n_layers:
                has = f"which has layers 0 to {n_layers - 1}"
                raise ParameterError(f"parameter {key}: layer {layer} is not in {params.model}, {has}")


def _template(params: Shared) -> str:
    """The template asked for, or the task's first; texts of one's own are checked."""
    known, own = params.topic.texts, [template.name for template in params.topic.of_task(params.task)]
    if not own:
        raise ParameterError(f"parameter task = {params.task!r}: question {params.question} has no template of it")
    named = [("template", params.template)] if params.template is not None else []
    named += [(key, name) for key in ("templates", "order_templates") for name in getattr(params, key, ())]
    named += [("probe_template", name) for name in [getattr(params, "probe_template", None)] if name is not None]
    named += [("probe_questions", name) for name in getattr(params, "probe_questions", ())]
    for key, name in named:
        task = "one_name" if key == "probe_questions" else params.task
        try:
            found = params.topic.find(name, task)
        except ValueError as error:
            raise ParameterError(f"parameter {key} = {name!r}{_nearest(name, known)}: {error}") from None
        if key == "probe_questions" and found.task != task:
            raise ParameterError(f"parameter {key} = {name!r}: this template is of task {found.task}, not {task}")
    if params.template in known and params.template not in own:
        raise ParameterError(
            f"parameter template = {params.template!r} (it is of task {known[params.template].task}): templates of "
            f"task {params.task} are {', '.join(own)}, or give a text with {{a}} and {{b}}"
        )
    return params.template or own[0]
