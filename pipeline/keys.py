"""Keys that decide what must run again.

1. `ingredients` lists what a step's data depends on: its parameters, input files, findings read, weights, and the
   source of the modules that its measure file reaches by import. Contents only, never dates or paths.
2. The *data key* is their hash. Results whose key differs are stale.
3. The *page key* adds what only the page depends on: the notebook's cells, the modules that draw, all parameters and
   all earlier findings. A new sentence or colour changes it alone.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lib import questions, records
from lib.records import AGAIN, RecordError
from pipeline import params as parameters
from pipeline.declaration import CRITICAL_LAYERS, PAIRS, Declaration, Plan
from pipeline.params import ParameterError, Shared, section_keys
from pipeline.units import read_json
from planted.options import PREFIX, fingerprint

# Modules of pipeline through which the imports of a measure file are followed. What else pipeline has computes nothing.
FOLLOWED = ("pipeline.step", "pipeline.units", "pipeline.population", "pipeline.declaration")
# Of these, what a step's data depend on: how work is cut into units, and whom it asks about.
HASHED = ("pipeline.units", "pipeline.population")

# Shared keys that reach a step's data. `memory` does: what shares a pass changes the last bits.
MODEL_KEYS = ("model", "model_sha256", "tokenizer", "adapter")
MODEL_KEYS += ("dtype", "device", "device_map", "quantisation", "max_memory")
DATA_KEYS = ("profile", *MODEL_KEYS, "chat_template", "question", "task", "template", "attributes", "seed", "memory")
# Keys that reach nothing: where files lie. (What lies there is hashed.)
PLACES = ("results_dir", "pairs_file", "people_file", "offload_folder", "overwrite", "workers")


# What of a question reaches the book alone.
BOOK_WORDS = ("title", "introduction", "words")


class MissingInput(ParameterError):
    """A step whose inputs are not there yet, or that does not exist."""


def results_folder(params: Shared) -> Path:
    """`results_dir` where given (from the working directory), else results/<profile> of the repository."""
    return Path(params.results_dir) if params.results_dir else parameters.ROOT / "results" / params.profile


def input_file(name: str) -> Path:
    """A file named in the parameters: from the working directory, else from the repository; an error if in neither."""
    for path in (Path(name), parameters.ROOT / name):
        if path.is_file():
            return path
    raise MissingInput(f"there is no file {name!r}, neither here nor in the repository")


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_once(path: Path) -> str:
    """`hash_file` of what may be many GB: once a process, as long as neither size nor time of the file changes."""
    stat = path.stat()
    return _hash_at(path.absolute(), stat.st_size, stat.st_mtime_ns)


@cache
def _hash_at(path: Path, size: int, time: int) -> str:
    return hash_file(path)


def hash_place(name: str) -> Any:
    """Hash of an input file, or of each file in a folder."""
    if Path(name).is_dir():
        return {path.name: hash_file(path) for path in sorted(Path(name).iterdir()) if path.is_file()}
    return hash_file(input_file(name))


def hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def hash_source(path: Path) -> str | None:
    """Hash of a module's code without comments, docstrings and layout, or of another file; None where there is none."""
    if path.suffix == ".py" and path.is_file():
        return _hash_code(path.read_bytes())
    return hash_file(path) if path.is_file() else None


@cache
def _hash_code(source: bytes) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
        if isinstance(node, ast.Call):  # what a parameter means, in words
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "description"]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def hash_notebook(path: Path) -> str | None:
    """Hash of a notebook's cells: kind, source, tags and figure captions; not outputs, counts or ids."""
    if not path.is_file():
        return None
    marks = ("tags", "mystnb")
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        parts = [[c["cell_type"], "".join(c["source"]), {key: c["metadata"].get(key) for key in marks}] for c in cells]
    except (ValueError, LookupError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ParameterError(f"{shown(path)} is not a notebook ({what}): mend it, or bring it back with git") from None
    return hash_json(parts)


def weights(params: Shared) -> Any:
    """What identifies the model without loading it: the SHA-256 given, else the contents of local files; with those of
    a tokenizer and an adapter that are named. Of a folder, config and tokenizer count beside the weights.

    A hub id without `model_sha256` is known by its name alone.
    """
    own = params.model_sha256
    own = model_contents(params.model) if own is None or Path(params.model).is_dir() else own
    beside = {name: spec for name in ("tokenizer", "adapter") if (spec := getattr(params, name)) is not None}
    return {"model": own} | {name: model_contents(spec) for name, spec in beside.items()} if beside else own


def model_contents(spec: str) -> Any:
    """The contents of the local files behind a model string; None where there are none."""
    if spec.startswith("config:"):
        return hash_file(input_file(spec.removeprefix("config:")))
    if spec.startswith(PREFIX):
        return fingerprint(spec)
    if spec.startswith("package:"):
        package, _, name = spec.removeprefix("package:").partition("/")
        found = find_spec(package) if package.isidentifier() else None
        folders = list(found.submodule_search_locations or ()) if found else []
        path = Path(folders[0]) / name if folders else None
        return hash_once(path) if path is not None and path.is_file() else None  # models.load says what is missing
    if spec.endswith(".gguf") and Path(spec).is_file():
        return hash_once(Path(spec))
    if Path(spec).is_dir():
        kinds = (".json", ".safetensors", ".model", ".jinja", ".txt")  # weights, tokenizer, chat template
        files = sorted(path for path in Path(spec).iterdir() if path.suffix in kinds)
        return {path.name: hash_once(path) for path in files}
    return None


# --- earlier steps ------------------------------------------------------------------------------------------------


def sources(params: Shared) -> list[Path]:
    """Where earlier steps' results are looked for, in order: results_dir, then results/<profile>."""
    return list(dict.fromkeys([results_folder(params), parameters.ROOT / "results" / params.profile]))


def find_findings(step: str, params: Shared) -> dict[str, Any] | None:
    """Findings of an earlier step about the same model and question, as they are now (and task; step 01 reports on
    every task), or None."""
    for folder in sources(params):
        path = left(folder, step, f"{step}.findings.json")
        if path is not None:
            findings = read_json(path)
            made, now = findings.get("about", {}), contents(params)
            if same_subject(made, params, task=step != PAIRS) and made.get("contents", now) == now:
                return findings
    return None


def same_subject(about: Mapping[str, Any], params: Shared, task: bool = True) -> bool:
    """Whether results are about this model (and this task)."""
    keys = ("model", "model_sha256", "tokenizer", "adapter", "quantisation", *(("task",) if task else ()))
    question = about.get("question", questions.DEFAULT)  # what is older names none
    return question == params.topic.name and all(about.get(key) == getattr(params, key) for key in keys)


def contents(params: Shared) -> dict[str, Any]:
    """What a name may stand for at another time: the model's weights, the question's words."""
    topic = params.topic
    asked = topic.model_dump(mode="json", exclude=set(BOOK_WORDS)) | {"labels": topic.labels}
    return {"weights": weights(params), "question": hash_json(asked)}


def ability(params: Shared) -> dict[str, Any] | None:
    """What step 01 found about this task on these pairs: {"able": bool, "why": str}, or None where it has not asked."""
    found = find_findings(PAIRS, params) or {}
    if found.get("about", {}).get("pairs_file") != given_pairs(params):
        return None
    return (found.get("able") or {}).get(params.task)


def given_pairs(params: Shared) -> str | None:
    """The hash of the `pairs_file`, None without one."""
    return None if params.pairs_file is None else hash_file(input_file(params.pairs_file))


def about(params: Shared) -> dict[str, Any]:
    """The head of a findings file: what it is about."""
    own = params.model_dump(
        mode="json", include={"profile", *MODEL_KEYS, "question", "task", "template", "chat_template"}
    )
    own |= {"question": params.topic.name, "pairs_file": given_pairs(params)}
    return own | {"contents": contents(params)}


def find_pairs(step: str, params: Shared) -> Path:
    """The pairs a step sweeps: `pairs_file`, else the pairs.parquet that step 01 made for this model with the same
    prompts."""
    if params.pairs_file is not None:
        return input_file(params.pairs_file)
    prompting = params.model_dump(mode="json", include={"template", "attributes", "chat_template"})
    for folder in sources(params):
        made_of = stored_ingredients(folder, PAIRS) or {}
        stored, inputs = made_of.get("parameters", {}), made_of.get("inputs", {})
        same = same_subject(stored, params) and all(stored.get(key, own) == own for key, own in prompting.items())
        same = same and all(inputs.get(key, own) == own for key, own in contents(params).items())
        if same and (path := left(folder, PAIRS, "pairs.parquet")):
            return path
    where = " or ".join(map(shown, sources(params)))
    raise MissingInput(
        f"step {step} needs pairs, and {where} has none of model {params.model} as it is now and task {params.task} in "
        f"template {params.template!r}, with these attributes and this chat_template: "
        f"run 01_baselines first (make does: make book PROFILE={params.profile}), or give pairs_file"
    )


def find_placebo(params: Shared) -> Path | None:
    """The placebo pairs that step 01 has left beside the pairs; None where there are none, and with a `pairs_file`."""
    if params.pairs_file is not None:
        return None
    return left(find_pairs(PAIRS, params).parent, PAIRS, "placebo.parquet")


def left(folder: Path, step: str, name: str) -> Path | None:
    """A file that a step has left, None where it is not there. RecordError where it is another than the step wrote: one
    that was damaged, or put in its place."""
    path = folder / name
    if not path.is_file():
        return None
    if stored_record(folder, step).get("files", {}).get(name) in (None, hash_file(path)):
        return path
    raise RecordError(f"{shown(path)} is not the file that step {step} wrote (see {step}.run.json); {AGAIN}")


def shown(path: Path) -> str:
    """A path as a reader knows it: relative to the repository where it lies inside."""
    return str(path.relative_to(parameters.ROOT)) if path.is_relative_to(parameters.ROOT) else str(path)


# --- the keys -----------------------------------------------------------------------------------------------------


def ingredients(step: Declaration, params: Shared) -> dict[str, Any]:
    """Everything a step's data depends on, by name. MissingInput when an input is not there yet.

    A step of a task that step 01 found the model cannot do computes nothing, and needs no pairs.
    """
    # a question's contents count, and its name: not where its folder lies
    given, inputs = params.model_dump(mode="json") | {"question": params.topic.name}, contents(params)
    if step.name != PAIRS and (ability(params) or {"able": True})["able"] is False:
        inputs["able"] = False
    else:
        inputs |= data_inputs(step, params)
    keys = (*DATA_KEYS, *(["layers"] if step.layered else []), *section_keys(step.params))
    return {
        "parameters": {key: given[key] for key in keys if key not in step.page_keys},
        "inputs": inputs,
        "modules": {name: hash_source(path) for name, path in measuring(step).items()},
    }


def data_inputs(step: Declaration, params: Shared) -> dict[str, Any]:
    """What a step's data rest on beside parameters, weights and code: pairs, findings, tables and files."""
    inputs: dict[str, Any] = {}
    if step.name != PAIRS or params.pairs_file is not None:
        inputs["pairs"] = hash_file(find_pairs(step.name, params))
    if step.name != PAIRS and step.layered and params.layers == "auto":
        inputs["critical_layers"] = (find_findings(CRITICAL_LAYERS, params) or {}).get("critical_layers")
    if step.placebo:
        path = find_placebo(params)
        inputs["placebo"] = hash_file(path) if path else None
    for earlier, names in step.reads.items():
        found = find_findings(earlier, params) or {}
        inputs |= {name: found.get(name) for name in names}
    for earlier in step.reads_tables:
        there = (path for path in sources(params) if (path / f"{earlier}.parquet").is_file())
        inputs[f"{earlier} table"] = next((stored_key(path, earlier) for path in there), None)
    named = {name: getattr(params, name, name) for name in step.files}
    return inputs | {name: hash_place(file) for name, file in named.items() if file is not None}


# --- which code a step rests on -----------------------------------------------------------------------------------


def code(*rooms: str) -> dict[str, str]:
    """A hash of the code of each room or module (`lib`, `steps/hydra`, `report/scores.py`): a committed result that
    keeps them knows when they have changed under it."""
    out = {}
    for room in rooms:
        place = parameters.ROOT / room
        files = [place] if place.is_file() else sorted(place.rglob("*.py"))
        out[room] = hash_json([hash_source(path) for path in files])[:16]
    return out


@cache
def imports(source: bytes) -> frozenset[str]:
    """The modules of the repository that a module's code imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(name for name in found if module_file(name) is not None)


def module_file(name: str) -> Path | None:
    """The file of a module of the repository; None for packages and for what is not one."""
    path = parameters.ROOT / f"{name.replace('.', '/')}.py"
    return path if path.is_file() else None


def reached(start: Iterable[str], follow: Callable[[str], bool]) -> dict[str, Path]:
    """The modules that are reached by import from those of `start`, through those that `follow` admits."""
    todo, found = list(start), {}
    while todo:
        name = todo.pop()
        if name not in found and follow(name):
            found[name] = module_file(name)
            todo += imports(found[name].read_bytes())
    return dict(sorted(found.items()))


def measuring(step: Declaration) -> dict[str, Path]:
    """The modules that make a step's data: what its measure file reaches of lib and of its own folder."""
    own = f"steps.{step.name}."
    through = reached([f"{own}measure"], lambda name: name.startswith(("lib.", own)) or name in FOLLOWED)
    return {name: path for name, path in through.items() if name in HASHED or not name.startswith("pipeline.")}


def drawing(step: Declaration) -> dict[str, Path]:
    """The modules and styles that a step's page is drawn with: what any file of its folder reaches."""
    own = f"steps.{step.name}."
    files = sorted((parameters.ROOT / "steps" / step.name).glob("*.py"))
    start = [f"{own}{path.stem}" for path in files if path.stem != "__init__"]
    modules = reached(start, lambda name: name.startswith(("lib.", "pipeline.", "report.", own)))
    return modules | {path.name: path for path in sorted((parameters.ROOT / "report").glob("*.mplstyle"))}


def page_key(plan: Plan, step: str, params: Shared, data: str) -> str:
    """The data key with everything that only the page depends on."""
    own = plan[step]
    parts = [
        data,
        params.model_dump(mode="json", exclude=set(PLACES)),
        hash_notebook(plan.notebook(step)),
        {name: hash_source(path) for name, path in drawing(own).items()},
        hash_source(module_file(plan.module)),
        {name: hash_source(parameters.ROOT / getattr(params, name, name)) for name in own.page_files},
        {name: find_findings(name, params) for name in plan.before(step)},
    ]
    return hash_json(parts)


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two lists of ingredients, one phrase each."""
    out = []
    for group in ("parameters", "inputs", "modules"):
        then, here = stored.get(group, {}), now.get(group, {})
        for key in sorted(key for key in {*then, *here} if then.get(key) != here.get(key)):
            if group == "modules":
                out.append(f"{key.replace('.', '/')}.py has changed")
            elif group == "parameters" or key == "critical_layers":
                out.append(f"{key} was {then.get(key)!r}, now {here.get(key)!r}")
            else:
                out.append(f"{key}: the contents have changed")
    return out


# --- results on disk ----------------------------------------------------------------------------------------------


def step_files(folder: Path, step: Declaration) -> list[Path]:
    """Everything a step has left in a folder: tables, findings, work units, extra files, and the run record.

    The record last: until it has moved, what is left is still known by its key.
    """
    extra = [path for name in step.extra_files if (path := folder / name).exists()]
    return sorted([*folder.glob(f"{step.name}.*"), *extra], key=lambda path: (path.name.endswith(".run.json"), path))


def stored_record(folder: Path, step: str) -> dict[str, Any]:
    """The run record of the results in a folder, {} where there is none."""
    path = folder / f"{step}.run.json"
    record = read_json(path) if path.is_file() else {}
    if record.get("step", step) != step:
        raise RecordError(f"{shown(path)} is the record of step {record['step']}; {AGAIN}")
    return record


def stored_ingredients(folder: Path, step: str) -> dict[str, Any] | None:
    """The ingredients under which the results in a folder were made, {} if they do not say, None if there are none.

    Read from the run record, else from the plan of work units that were not finished, else from a table.
    """
    if record := stored_record(folder, step):
        return record.get("ingredients", {})
    for plan in sorted(folder.glob(f"{step}.*units/plan.json")):
        return read_json(plan).get("ingredients", {})
    # work units without a plan count for nothing: a run was killed as it began
    known = [path for path in sorted(folder.glob(f"{step}.*")) if path.suffix != ".units"]
    for table in known:
        if table.suffix == ".parquet" and (stored := records.read_metadata(table).get("ingredients")):
            return stored
    return {} if known else None


def stored_key(folder: Path, step: str) -> str | None:
    """The data key of the results in a folder; "unknown" if they do not say, None if there are none."""
    stored = stored_ingredients(folder, step)
    return None if stored is None else hash_json(stored) if stored else "unknown"


def set_aside(folder: Path, step: Declaration) -> Path:
    """Move a step's results into stale/<step>-<key>; returns that folder."""
    target = folder / "stale" / f"{step.name}-{(stored_key(folder, step.name) or 'unknown')[:8]}"
    if (target / f"{step.name}.run.json").exists():  # without, a killed process has begun to move these there
        shutil.rmtree(target)
    target.mkdir(parents=True, exist_ok=True)
    for path in step_files(folder, step):
        shutil.rmtree(target / path.name, ignore_errors=True)
        os.replace(path, target / path.name)
    return target


def find_aside(folder: Path, step: Declaration, key: str) -> Path | None:
    """Where results of this data key were set aside; None where there are none, and where the folder has others of the
    step. (It has some of them where a process was killed that moved them.)"""
    aside = folder / "stale" / f"{step.name}-{key[:8]}"
    there = aside.is_dir() and stored_key(folder, step.name) in (None, key) and stored_key(aside, step.name) == key
    return aside if there else None


def bring_back(folder: Path, step: Declaration, key: str) -> None:
    """Move results of this data key that were set aside back."""
    if aside := find_aside(folder, step, key):
        for path in reversed(step_files(aside, step)):  # the record first: they are known by it
            if not (folder / path.name).exists():
                os.replace(path, folder / path.name)
        shutil.rmtree(aside)


def remove(folder: Path, step: Declaration) -> list[Path]:
    """Delete a step's results; returns what was deleted."""
    gone = step_files(folder, step)
    for path in gone:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return gone
