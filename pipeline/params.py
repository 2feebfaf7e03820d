"""Profiles and notebooks as checked parameters; the models themselves are in `steps.parameters`.

1. `load_profile` reads `params/<name>.yaml`: flat shared keys and one section per step.
2. `validate` merges the two (a flat key beats the section) and turns every mistake into one sentence.
3. `from_notebook` picks what was given out of a notebook's variables.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from pydantic import ValidationError

from steps.parameters import STEPS, Shared

ROOT = Path(__file__).resolve().parents[1]


class ParameterError(ValueError):
    """A parameter that is unknown, out of bounds, or does not fit the model."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the sentence, without the stack."""
        return [f"{type(self).__name__}: {self}"]


SHARED = frozenset(Shared.model_fields)
# Variables of an IPython session that no one gave as a parameter.
_IPYTHON = {"In", "Out", "exit", "quit", "get_ipython", "open"}


def section_keys(step: str) -> list[str]:
    """The keys of a step's own section, in order."""
    return [key for key in step_model(step).model_fields if key not in SHARED]


def step_model(step: str) -> type[Shared]:
    """The pydantic model of a step."""
    if step not in STEPS:
        raise ParameterError(f"step {step!r} is unknown{_nearest(step, STEPS)}; the steps are {', '.join(STEPS)}")
    return STEPS[step]


def _nearest(word: str, allowed: Sequence[str] | Mapping) -> str:
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def profiles() -> list[str]:
    """Names of the profiles in params/."""
    return sorted(path.stem for path in (ROOT / "params").glob("*.yaml"))


def load_profile(name: str) -> dict[str, Any]:
    """The content of params/<name>.yaml, or of the YAML file at the path `name`; `profile` is filled in."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else ROOT / "params" / f"{name}.yaml"
    if not path.is_file():
        raise ParameterError(
            f"profile {name!r} is unknown{_nearest(name, profiles())}; there are {', '.join(profiles())}"
        )
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ParameterError(f"profile {path.name} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise ParameterError(f"profile {path.name} must hold keys and values, not {type(given).__name__}")
    if given.setdefault("profile", path.stem) != path.stem:
        raise ParameterError(f"profile {path.name} calls itself {given['profile']!r}; name it {path.stem!r}")
    return given


def validate(step: str, given: Mapping[str, Any]) -> Shared:
    """The step's parameters, checked. None means "not given"; other steps' sections are left alone.

    Raises ParameterError naming the key, the value and what is allowed.
    """
    model = step_model(step)
    flat = {key: value for key, value in given.items() if key not in STEPS and value is not None}
    section = given.get(step)
    if section is None:
        section = {}
    elif not isinstance(section, Mapping):
        raise ParameterError(
            f"section {step} = {section!r}: must hold keys and values ({', '.join(section_keys(step))})"
        )
    for key in section:
        if key not in section_keys(step):
            shared = f"; {key!r} is a shared key: give it outside the section" if key in SHARED else ""
            raise ParameterError(_unknown(key, section[key], section_keys(step), f"in section {step}") + shared)
    for key in flat:
        if key not in model.model_fields:
            homes = [name for name in STEPS if key in section_keys(name)]
            elsewhere = f"; {key!r} belongs to {' and '.join(homes)}" if homes else ""
            raise ParameterError(_unknown(key, flat[key], list(model.model_fields), f"of step {step}") + elsewhere)
    if "model" not in flat:
        raise ParameterError("model is not given: run with -f params/<profile>.yaml, or give -p model")
    merged = {key: value for key, value in section.items() if value is not None} | flat
    try:
        params = model(**merged)
    except ValidationError as error:
        raise ParameterError(_sentence(step, model, error)) from None
    return params.model_copy(update={"template": _template(params)})


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
    meaning = model.model_fields[key].description
    return f"parameter {key} = {value!r} of step {step}: {'; or '.join(wanted)} ({key}: {meaning})"


def from_notebook(step: str, namespace: Mapping[str, Any]) -> Shared:
    """The step's parameters out of a notebook's `globals()`.

    Taken are plain values (text, numbers, lists, dicts) under names without a leading underscore that are not
    IPython's. Where no `model` is given (a notebook opened by hand), the profile's YAML is read beneath them.
    """
    for name in STEPS:
        if isinstance(namespace.get(name), ModuleType):
            raise ParameterError(f"the notebook imports a module under the name {name!r}, which hides that section")
    plain = (str, int, float, list, tuple, dict)
    given = {
        key: value
        for key, value in namespace.items()
        if isinstance(value, plain) and not key.startswith("_") and key not in _IPYTHON
    }
    if "model" not in given:
        step_model(step)
        base = load_profile(given.get("profile", Shared.model_fields["profile"].default))
        own = {key: value for key, value in base.items() if key != "profile"}
        given = {"profile": base["profile"]} | own | {key: value for key, value in given.items() if key != "profile"}
    elif "profile" not in given:
        raise ParameterError("profile is not given: it names the folder of the results; run with -p profile <name>")
    return validate(step, given)


def left_out(step: str, own: Mapping[str, Any]) -> list[str]:
    """What a step with the parameters `own` (as JSON) does less than with its `full_profile`, one phrase each."""

    def said(value: Any) -> str:
        return "all" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    full = validate(step, load_profile(own["full_profile"]))
    meaning = {key: field.description.split(";")[0] for key, field in type(full).model_fields.items()}
    wanted = full.model_dump(mode="json", exclude={"profile", "full_profile"}).items()
    return [
        f"{meaning[key]}: {said(own[key])} instead of {said(value)}"
        for key, value in wanted
        if own.get(key, value) != value
    ]


def check_layers(params: Shared, n_layers: int) -> None:
    """ParameterError when a layer in the parameters is not in the model."""
    named = {"layers": params.layers, "aggregator_layer": (params.aggregator_layer,)}
    for key, layers in named.items():
        for layer in layers if isinstance(layers, tuple) else ():
            if layer != "auto" and layer >= n_layers:
                raise ParameterError(
                    f"parameter {key}: layer {layer} is not in {params.model}, which has layers 0 to {n_layers - 1}"
                )


def _template(params: Shared) -> str:
    """The template asked for, or the task's first."""
    from lib.tasks import TEMPLATES  # the words of the tasks; parameters need them only here

    for name in getattr(params, "templates", ()):
        if name not in TEMPLATES and "{a}" not in name:
            raise ParameterError(
                f"parameter templates: {name!r} is unknown{_nearest(name, TEMPLATES)}; the templates are "
                f"{', '.join(TEMPLATES)}, or a text with {{a}} and {{b}}"
            )
    own = [name for name, template in TEMPLATES.items() if template.task == params.task]
    if params.template is None:
        return own[0]
    if params.template in own or (params.template not in TEMPLATES and "{a}" in params.template):
        return params.template
    owner = f" (it is of task {TEMPLATES[params.template].task})" if params.template in TEMPLATES else ""
    raise ParameterError(
        f"parameter template = {params.template!r}{owner}: templates of task {params.task} are {', '.join(own)}, "
        f"or give a text with {{a}} and {{b}}{_nearest(params.template, own)}"
    )
