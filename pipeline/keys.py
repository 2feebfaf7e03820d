"""Keys that decide what must run again. Torch-free and quick: `make` asks for them every time.

1. `ingredients` lists what a step's data depends on: its parameters, input files, findings read, weights, and the
   source of the modules that compute. Contents only, never dates or paths.
2. The *data key* is their hash. Results whose key differs are stale.
3. The *page key* adds what only the page depends on: the notebook's cells, the modules that draw, all parameters and
   all earlier findings. A new sentence or colour changes it alone.

    python -m pipeline.keys necessity --profile smoke --output build/smoke/necessity.keys
    python -m pipeline.keys necessity --profile smoke --clean
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline import params as parameters
from pipeline.params import ParameterError, section_keys
from steps.parameters import STEPS, Shared

NOTEBOOKS = {step: f"notebooks/{number:02d}_{step}.ipynb" for number, step in enumerate(STEPS, 1)}

# Which modules of lib make a step's data, and which only draw its page.
SWEEPS = (
    "models", "weights", "hooks", "single_pass", "pools", "jobs", "layerwise", "sweep", "tasks", "data", "quads",
    "metrics", "records", "units",
)  # fmt: skip
COMPUTE = {
    "baselines": ("ability", "models", "weights", "tasks", "data", "quads", "metrics", "records", "units"),
    "coarse_sweep": SWEEPS,
    "necessity": SWEEPS,
    "sufficiency": SWEEPS,
    "hydra": (*SWEEPS, "readout", "hydra"),
    "retrieval_heads": (*SWEEPS, "readout", "paths", "one_name", "retrieval", "hops"),
    "generality": (*SWEEPS, "grid", "controls"),
    "subspace": (*SWEEPS, "readout", "probes", "directions", "direction_sweeps"),
    "neurons": (*SWEEPS, "readout", "directions", "neurons", "features", "feature_patches"),
    "story": (*SWEEPS, "paths", "circuits", "attribution"),
}
# All of `report` but the book itself and its page on cost draws pages, too.
NOT_DRAWING = ("book.py", "scale_report.py", "speed_report.py")
DRAWING = ("stats", "effects", "findings", "rule", "class_tests", "steps", "tokens")

# Shared keys that reach a step's data. `memory` does: what shares a pass changes the last bits.
_MODEL_KEYS = ("model", "model_sha256", "dtype", "device", "device_map", "quantisation", "max_memory")
_DATA_KEYS = ("profile", *_MODEL_KEYS, "chat_template", "task", "template", "attributes", "seed", "memory")
# The steps that go through the model's layers; the others take those of the slice.
LAYERED = ("coarse_sweep", "necessity", "sufficiency", "generality", "subspace", "story")
DATA_KEYS = {step: (*_DATA_KEYS, "layers") if step in LAYERED else _DATA_KEYS for step in STEPS}
# Keys that reach nothing: where files lie. (What lies there is hashed.)
PLACES = ("results_dir", "pairs_file", "people_file", "offload_folder", "overwrite", "workers")
# Findings of earlier steps that a step's data rest on: step -> {earlier step: keys}.
READS = {step: {"sufficiency": ("critical_slice",)} for step in list(STEPS)[4:]}
# Earlier steps whose tables a step reads, known by their data keys.
TABLES = {"generality": ("sufficiency",), "story": ("sufficiency", "necessity")}
# Files beside the pairs that a step's data rest on: keys of the parameters, or paths in the repository.
FILES = {
    "baselines": ("people_file",),
    "retrieval_heads": ("people_file",),
    "generality": ("people_file", "data/controls.csv"),
    "subspace": ("people_file", "data/controls.csv"),
    "neurons": ("people_file", "data/controls.csv", "data/sentences.csv", "sae_file"),
}
# Keys of a step's own section that only its page depends on.
PAGE_ONLY = {"story": ("claims",)}
# What else a step leaves in its folder, beside <step>.*
EXTRA_FILES = {"baselines": ("pairs.parquet",), "story": ("claims.json",)}


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


def hash_place(name: str) -> Any:
    """Hash of an input file, or of each file in a folder."""
    if Path(name).is_dir():
        return {path.name: hash_file(path) for path in sorted(Path(name).iterdir()) if path.is_file()}
    return hash_file(input_file(name))


def hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def hash_source(path: Path) -> str | None:
    """Hash of a module's code without comments, docstrings and layout; None where there is no such file."""
    if not path.is_file():
        return None
    return _hash_code(path.read_bytes()) if path.suffix == ".py" else hash_file(path)


@cache
def _hash_code(source: bytes) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def hash_notebook(path: Path) -> str | None:
    """Hash of a notebook's cells: kind, source, tags and figure captions; not outputs, counts or ids."""
    if not path.is_file():
        return None
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    kept = [
        [cell["cell_type"], "".join(cell["source"]), {key: cell["metadata"].get(key) for key in ("tags", "mystnb")}]
        for cell in cells
    ]
    return hash_json(kept)


def weights(params: Shared) -> Any:
    """What identifies the weights without loading them: the SHA-256 given, else the contents of local files.

    A hub id without `model_sha256` is known by its name alone.
    """
    spec = params.model
    if params.model_sha256 is not None:
        return params.model_sha256
    if spec.startswith("config:"):
        return hash_file(input_file(spec.removeprefix("config:")))
    if spec.startswith("package:"):
        package, _, name = spec.removeprefix("package:").partition("/")
        found = find_spec(package)
        folders = list(found.submodule_search_locations or ()) if found else []
        path = Path(folders[0]) / name if folders else None
        return hash_file(path) if path is not None and path.is_file() else None  # models.load says what is missing
    if Path(spec).is_dir():
        files = sorted(path for path in Path(spec).iterdir() if path.suffix in (".json", ".safetensors", ".model"))
        return {path.name: hash_file(path) for path in files}
    return None


# --- earlier steps ------------------------------------------------------------------------------------------------


def sources(params: Shared) -> list[Path]:
    """Where earlier steps' results are looked for, in order: results_dir, then results/<profile>."""
    return list(dict.fromkeys([results_folder(params), parameters.ROOT / "results" / params.profile]))


def find_findings(step: str, params: Shared) -> dict[str, Any] | None:
    """Findings of an earlier step about the same model (and task; step 01 reports on every task), or None."""
    for folder in sources(params):
        path = folder / f"{step}.findings.json"
        if path.is_file():
            findings = json.loads(path.read_text(encoding="utf-8"))
            if same_subject(findings.get("about", {}), params, task=step != "baselines"):
                return findings
    return None


def same_subject(about: Mapping[str, Any], params: Shared, task: bool = True) -> bool:
    """Whether results are about this model (and this task)."""
    keys = ("model", "model_sha256", "quantisation", *(("task",) if task else ()))
    return all(about.get(key) == getattr(params, key) for key in keys)


def ability(params: Shared) -> dict[str, Any] | None:
    """What step 01 found about this task: {"able": bool, "why": str}, or None where it has not been asked."""
    findings = find_findings("baselines", params)
    return None if findings is None else findings.get("able", {}).get(params.task)


def about(params: Shared) -> dict[str, Any]:
    """The head of a findings file: what it is about."""
    return params.model_dump(mode="json", include={"profile", *_MODEL_KEYS, "task", "template", "chat_template"})


def find_pairs(step: str, params: Shared) -> Path:
    """The pairs a step sweeps: `pairs_file`, else the pairs.parquet of step 01 for this model and task."""
    if params.pairs_file is not None:
        return input_file(params.pairs_file)
    for folder in sources(params):
        path = folder / "pairs.parquet"
        stored = stored_ingredients(folder, "baselines") or {}
        if path.is_file() and same_subject(stored.get("parameters", {}), params):
            return path
    where = " or ".join(map(shown, sources(params)))
    raise MissingInput(
        f"step {step} needs pairs, and {where} has none of model {params.model} and task {params.task}: "
        f"run 01_baselines first (make does: make book PROFILE={params.profile}), or give pairs_file"
    )


def shown(path: Path) -> str:
    """A path as a reader knows it: relative to the repository where it lies inside."""
    path = Path(path)
    return str(path.relative_to(parameters.ROOT)) if path.is_relative_to(parameters.ROOT) else str(path)


# --- the keys -----------------------------------------------------------------------------------------------------


def ingredients(step: str, params: Shared) -> dict[str, Any]:
    """Everything a step's data depends on, by name. MissingInput when an input is not there yet.

    A step of a task that step 01 found the model cannot do computes nothing, and needs no pairs.
    """
    given = params.model_dump(mode="json")
    inputs: dict[str, Any] = {"weights": weights(params)}
    if step != "baselines" and (ability(params) or {"able": True})["able"] is False:
        inputs["able"] = False
    elif step == "baselines":
        if params.pairs_file is not None:
            inputs["pairs"] = hash_file(input_file(params.pairs_file))
    else:
        inputs["pairs"] = hash_file(find_pairs(step, params))
        if params.layers == "auto" and step in LAYERED:
            inputs["critical_layers"] = (find_findings("coarse_sweep", params) or {}).get("critical_layers")
        for earlier, names in READS.get(step, {}).items():
            found = find_findings(earlier, params) or {}
            inputs |= {name: found.get(name) for name in names}
        for earlier in TABLES.get(step, ()):
            there = (path for path in sources(params) if (path / f"{earlier}.parquet").is_file())
            inputs[f"{earlier} table"] = next((stored_key(path, earlier) for path in there), None)
    if "able" not in inputs:
        named = {name: getattr(params, name, name) for name in FILES.get(step, ())}
        inputs |= {name: hash_place(file) for name, file in named.items() if file is not None}
    return {
        "parameters": {
            key: given[key] for key in (*DATA_KEYS[step], *section_keys(step)) if key not in PAGE_ONLY.get(step, ())
        },
        "inputs": inputs,
        "modules": {name: hash_source(parameters.ROOT / "lib" / f"{name}.py") for name in COMPUTE[step]},
    }


def data_key(parts: Mapping[str, Any]) -> str:
    """The hash of `ingredients`."""
    return hash_json(parts)


def drawing() -> list[Path]:
    """The modules and styles that pages are drawn with."""
    report = (path for path in (parameters.ROOT / "report").iterdir() if path.suffix in (".py", ".mplstyle"))
    own = [parameters.ROOT / "lib" / f"{name}.py" for name in DRAWING]
    return own + sorted(path for path in report if path.name not in NOT_DRAWING)


def page_key(step: str, params: Shared, data: str) -> str:
    """The data key with everything that only the page depends on."""
    earlier = list(STEPS)[: list(STEPS).index(step)]
    given = params.model_dump(mode="json", exclude=set(PLACES))
    return hash_json(
        [
            data,
            given,
            hash_notebook(parameters.ROOT / NOTEBOOKS[step]),
            {path.name: hash_source(path) for path in drawing()},
            {name: find_findings(name, params) for name in earlier},
        ]
    )


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two lists of ingredients, one phrase each."""
    out = []
    for group in ("parameters", "inputs", "modules"):
        then, here = stored.get(group, {}), now.get(group, {})
        for key in sorted({*then, *here}):
            if then.get(key) != here.get(key):
                if group == "parameters" or key == "critical_layers":
                    out.append(f"{key} was {then.get(key)!r}, now {here.get(key)!r}")
                else:
                    out.append(
                        f"lib/{key}.py has changed" if group == "modules" else f"{key}: the contents have changed"
                    )
    return out


# --- results on disk ----------------------------------------------------------------------------------------------


def step_files(folder: Path, step: str) -> list[Path]:
    """Everything a step has left in a folder: tables, findings, run record, work units, and its extra files."""
    extra = [folder / name for name in EXTRA_FILES.get(step, ())]
    return sorted(folder.glob(f"{step}.*")) + [path for path in extra if path.exists()]


def stored_ingredients(folder: Path, step: str) -> dict[str, Any] | None:
    """The ingredients under which the results in a folder were made, {} if they do not say, None if there are none.

    Read from the run record, or from the plan of work units that were not finished.
    """
    for path in (folder / f"{step}.run.json", *sorted(folder.glob(f"{step}.*units/plan.json"))):
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8")).get("ingredients", {})
    # work units without a plan count for nothing: a run was killed as it began
    known = [path for path in step_files(folder, step) if path.suffix != ".units"]
    return {} if known else None


def stored_key(folder: Path, step: str) -> str | None:
    """The data key of the results in a folder; "unknown" if they do not say, None if there are none."""
    stored = stored_ingredients(folder, step)
    return None if stored is None else data_key(stored) if stored else "unknown"


def set_aside(folder: Path, step: str) -> Path:
    """Move a step's results into stale/<step>-<key>; returns that folder."""
    target = folder / "stale" / f"{step}-{(stored_key(folder, step) or 'unknown')[:8]}"
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    # the run record last: until it has moved, what is left is still known by its key
    for path in sorted(step_files(folder, step), key=lambda path: path.name.endswith(".run.json")):
        os.replace(path, target / path.name)
    return target


def remove(folder: Path, step: str) -> list[Path]:
    """Delete a step's results; returns what was deleted."""
    gone = sorted(step_files(folder, step), key=lambda path: path.name.endswith(".run.json"))
    for path in gone:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return gone


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.keys", description=__doc__.splitlines()[0])
    parser.add_argument("step", help=", ".join(STEPS))
    parser.add_argument("--profile", default=Shared.model_fields["profile"].default, help="name in params/, or a YAML")
    parser.add_argument("--output", type=Path, help="write the keys here, if they changed or the step has no results")
    parser.add_argument("--clean", action="store_true", help="delete the step's results instead")
    options = parser.parse_args(arguments)
    try:
        params = parameters.validate(options.step, parameters.load_profile(options.profile))
        folder = results_folder(params)
        if options.clean:
            gone = remove(folder, options.step)
            print(f"{options.step}: removed {len(gone)} result files from {shown(folder)}")
            return 0
        data = data_key(ingredients(options.step, params))
        stored = stored_key(folder, options.step)
        if stored not in (None, data):
            target = set_aside(folder, options.step)
            print(f"{options.step}: results of other parameters, inputs or code set aside in {shown(target)}")
        text = f"data {data}\npage {page_key(options.step, params, data)}\n"
    except ParameterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.output is None:
        print(text, end="")
    elif stored is None or not options.output.is_file() or options.output.read_text() != text:
        # a new date tells make to run the step, also when someone has deleted its results
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
