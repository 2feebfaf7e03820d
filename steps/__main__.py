"""What make asks for: `python -m steps run --profile smoke`.

run     brings the pages up to date, as far as a step or to the book: sets stale results aside, executes notebooks,
        builds the HTML. What is up to date is decided by keys and contents, never by dates.
key     prints a step's data key and page key
clean   deletes a step's results and its page
format  writes the parameters cell of every notebook from its step's parameters
freeze  prints the hash of the profile's thresholds and of the claims' rules: `frozen` of section story, where they are
        set before a model's results are seen
fresh   writes down what the profile's fresh people said, in the file that it calls `fresh_claims`, which is committed
pairs   puts a table of names together into pairs that line up in the profile's template: pairs NAMES.csv --to MINE.csv

The profile is the name of a file in params/, or comes from the variable PROFILE of the environment.
"""

from __future__ import annotations

import _thread
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lib.errors import Refusal
from lib.locks import Lock
from pipeline import keys, params
from pipeline.params import ParameterError, Shared
from report import book
from report.book import BookError, Folders
from steps.baselines import names
from steps.registry import PLAN
from steps.story import claims, fresh

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True)
class Build:
    """A profile with the folder that its pages and its book are made in."""

    profile: str

    @cached_property
    def given(self) -> dict[str, Any]:
        """The profile's content. ParameterError for a name that could lead elsewhere."""
        if not re.fullmatch(NAME, self.profile):
            name = "a name has letters, digits, dots, dashes and underscores"
            raise ParameterError(f"profile {self.profile!r}: {name}; there are {', '.join(params.profiles())}")
        return params.load_profile(self.profile)

    def of(self, step: str) -> Shared:
        return params.validate(PLAN.sections, step, self.given)

    @property
    def folder(self) -> Path:
        return params.ROOT / "build" / self.profile

    @property
    def results(self) -> Path:
        return keys.results_folder(self.of(PLAN.names[0]))

    def page(self, step: str, kind: str = "executed") -> Path:
        """The notebook of a step: executed, running or failed."""
        return self.folder / kind / f"{PLAN.page(step)}.ipynb"

    def key_file(self, name: str) -> Path:
        return self.folder / "keys" / f"{name}.key"

    def fingerprint(self) -> str:
        """The hash of the profile's thresholds and of the claims' rules."""
        own = self.of("story")
        return claims.fingerprint(claims.thresholds(own, lambda step, _: self.of(step).model_dump()), own)

    def keys_of(self, step: str) -> str:
        """The data key and the page key of a step, a line each."""
        own = self.of(step)
        data = keys.hash_json(keys.ingredients(PLAN[step], own))
        return f"data {data}\npage {keys.page_key(PLAN, step, own, data)}\n"


# --- run ----------------------------------------------------------------------------------------------------------


def run(build: Build, until: str | None) -> None:
    """Every step in order, up to `until`; without it, the book as well. Prints the path of the book's first page."""
    wanted = PLAN.names if until is None else [*PLAN.before(PLAN[until].name), until]
    own = build.of("story")
    with Lock(build.folder / ".lock"):
        if own.fresh and len(wanted) > 1:  # step 01 draws pairs; what follows looks at them
            fresh.open_once(own, build.fingerprint())
        for step in wanted:
            bring_up_to_date(build, step)
        if until is None:
            print(make_book(build))


def bring_up_to_date(build: Build, step: str) -> None:
    """Execute a step's notebook unless its page is that of the present keys."""
    text, folder = build.keys_of(step), build.results
    stored = keys.stored_key(folder, step)
    if stored is not None and f"data {stored}\n" not in text:
        with Lock(folder / ".lock"):
            aside = keys.set_aside(folder, PLAN[step])
        print(f"{step}: results of other parameters, inputs or code set aside in {keys.shown(aside)}", flush=True)
    page, key = build.page(step), build.key_file(step)
    if whole(folder, step) and page.is_file() and same(key, text + content(page)):
        return
    key.unlink(missing_ok=True)
    execute(build, step)
    write(key, build.keys_of(step) + content(page))


def whole(folder: Path, step: str) -> bool:
    """Whether everything that a step has written, by its run record, is there as it was written."""
    files = keys.stored_record(folder, step).get("files", {})
    there = (folder / name for name in files)
    return f"{step}.findings.json" in files and all(
        path.is_file() and keys.hash_file(path) == files[str(path.relative_to(folder))] for path in there
    )


def content(path: Path) -> str:
    """A line that tells whether a file, or all files in a folder, are still what was made."""
    if path.is_dir():
        found = {str(file.relative_to(path)): keys.hash_file(file) for file in path.rglob("*") if file.is_file()}
        return f"made {keys.hash_json(found)}\n"
    return f"made {keys.hash_file(path)}\n"


def same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def execute(build: Build, step: str) -> None:
    """Run a step's notebook by papermill. BookError when it fails; the notebook as far as it came is kept."""
    running, failed = build.page(step, "running"), build.page(step, "failed")
    for path in (running, failed, build.page(step)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    print(f"==> {PLAN.page(step)} ({build.profile})", flush=True)
    command = [sys.executable, "-m", "papermill", str(PLAN.notebook(step)), str(running)]
    command += ["-f", str(params.ROOT / "params" / f"{build.profile}.yaml"), "-k", "python3", "--log-level", "ERROR"]
    command += ["--no-progress-bar", "--stdout-file", "-", "--stderr-file", "-"]
    # a kernel spec in someone's home must not send the notebooks to another Python
    variables = os.environ | {"JUPYTER_PREFER_ENV_PATH": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    variables |= {"PYTHONWARNINGS": "ignore:IProgress not found"}  # no widgets are asked for, whoever imports tqdm
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(command, cwd=params.ROOT, env=variables, stderr=said)
        try:
            status = process.wait()
        finally:  # interrupted: it ends before this does, and its kernel with it
            process.terminate()
            process.wait()
        said.seek(0)
        log = said.read()
    if status:
        if running.exists():
            os.replace(running, failed)
        raise BookError(f"step {step} failed: {reason(failed, log)}")
    if cut_short(running):
        found = json.loads((build.results / f"{step}.findings.json").read_text(encoding="utf-8"))
        print(f"{step}: {found['sentences'][0]}", flush=True)
    os.replace(running, build.page(step))


def reason(failed: Path, log: str) -> str:
    """Why a notebook failed, in a sentence, and where the rest is; `log` is what papermill said."""
    try:
        cells = json.loads(failed.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError):  # none, or a part of one: the disk is full
        cells = []
    errors = [output for cell in cells for output in cell.get("outputs", ()) if output["output_type"] == "error"]
    if errors:
        why = f"{errors[-1]['ename']}: {errors[-1]['evalue']}"
        return f"{' '.join(why.split())} (the notebook as far as it came, with the traceback: {keys.shown(failed)})"
    rest, last = failed.with_suffix(".log"), (log.strip().splitlines() or ["it ended without a word"])[-1]
    try:
        rest.write_text(log, encoding="utf-8")
    except OSError as error:
        return f"{last} (and what else was said could not be written down: {error})"
    return f"{last} (all that was said: {keys.shown(rest)})"


def cut_short(path: Path) -> bool:
    """Take off what comes after the cell in which a notebook ended itself for want of a task; whether it did."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for number, cell in enumerate(notebook["cells"]):
        kept = [output for output in cell.get("outputs", ()) if output.get("ename") != "SystemExit"]
        if len(kept) < len(cell.get("outputs", ())):
            cell["outputs"], notebook["cells"] = kept, notebook["cells"][: number + 1]
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False), encoding="utf-8")
            return True
    return False


def make_book(build: Build) -> str:
    """Build the HTML unless it is that of the present pages and sources; the path of its first page."""
    folders = Folders(params.ROOT / "book", build.folder / "executed", build.results, build.folder / "book")
    index = folders.to / "_build" / "html" / "index.html"
    key, text = build.key_file("book"), keys.hash_json(book_contents(build, folders))
    if not (index.is_file() and same(key, text + content(index.parent))):
        print(f"==> book ({build.profile})", flush=True)
        key.unlink(missing_ok=True)
        book.assemble(PLAN.sections, build.profile, folders)
        book.build(folders.to)
        write(key, text + content(index.parent))
    return keys.shown(index)


def book_contents(build: Build, folders: Folders) -> dict[str, Any]:
    """What the book is made of: its sources, the code, the measurements of bench/, the question, each step's page and
    results."""
    topic = build.of(PLAN.names[0]).topic
    files = [path for path in folders.source.rglob("*") if path.is_file() and "_build" not in path.parts]
    files += [
        path
        for room in ("lib", "planted", "pipeline", "report", "steps")
        for path in (params.ROOT / room).rglob("*.py")
    ]
    files += (params.ROOT / "bench" / "results").glob("*.json")
    for step in PLAN.names:
        files += [build.page(step), *(folders.results / f"{step}.{kind}.json" for kind in ("findings", "run"))]
    files += [*folders.results.glob("figures/*.png"), folders.results / "claims.json"]
    made_of = {keys.shown(path): keys.hash_file(path) for path in sorted(files) if path.is_file()}
    return made_of | {"question": topic.model_dump(mode="json")}


# --- clean --------------------------------------------------------------------------------------------------------


def clean(build: Build, step: str) -> None:
    """Delete a step's results and page. What else lies there stays."""
    folder = keys.results_folder(build.of(step))
    with Lock(folder / ".lock"):
        gone = keys.remove(folder, PLAN[step])
    for path in (build.key_file(step), *(build.page(step, kind) for kind in ("executed", "running", "failed"))):
        path.unlink(missing_ok=True)
    print(f"{step}: removed {len(gone)} result files from {keys.shown(folder)}")


# --- parameters cells ---------------------------------------------------------------------------------------------


def parameters_cell(step: str) -> str:
    """The parameters cell of a step's notebook: the shared keys that one gives by hand, and its whole section."""
    model = PLAN[step].params
    shared = [key for key in params.BY_HAND if key != "layers" or PLAN[step].layered]
    lines = [f'profile = "{model.model_fields["profile"].default}"  # name of params/<profile>.yaml; it has the rest']
    for key in [*shared, *params.section_keys(model)]:
        meaning = model.model_fields[key].description
        line, short = (f"{key} = None  # {text}" for text in (meaning, meaning.split(";")[0]))
        lines.append(line if len(line) <= 120 else short[:120])
    return "\n".join(lines)


def write_parameters(step: str) -> None:
    """Put the parameters cell into the notebook, if it is another."""
    path = PLAN.notebook(step)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if "parameters" in cell["metadata"].get("tags", ()):
            cell["source"] = parameters_cell(step).splitlines(keepends=True)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    if text != path.read_text(encoding="utf-8"):
        path.write_text(text, encoding="utf-8")


def make_pairs(build: Build, table: Path, to: Path) -> None:
    """Write the pairs that a table of names makes, and say who is left over."""
    try:
        print(names.write_pairs(table, to, build.of("baselines")))
    except ValueError as error:
        raise ParameterError(str(error)) from None


# --- the command line ---------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m steps", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "key", "clean", "format", "freeze", "fresh", "pairs"))
    parser.add_argument("step", nargs="?", help=f"{', '.join(PLAN.names)}; for pairs, the table of names")
    parser.add_argument("--to", help="for pairs, the CSV file to write")
    default = environment.get("PROFILE", Shared.model_fields["profile"].default)
    parser.add_argument("--profile", default=default, help="name in params/")
    options = parser.parse_args(arguments)
    build = Build(options.profile)
    try:
        if options.command == "pairs":
            if not (options.step and options.to):
                parser.error("pairs of whom, and where to? pairs NAMES.csv --to MINE.csv")
            make_pairs(build, Path(options.step), Path(options.to))
            return 0
        if options.step is not None:
            PLAN[options.step]
        if options.command == "run":
            run(build, options.step)
        elif options.command == "format":
            for step in PLAN.names:
                write_parameters(step)
        elif options.command == "freeze":
            print(build.fingerprint())
        elif options.command == "fresh":
            print(keys.shown(fresh.write(build.of("story"))))
        elif options.step is None:
            parser.error(f"{options.command} which step? {', '.join(PLAN.names)}")
        elif options.command == "key":
            print(build.keys_of(options.step), end="")
        else:
            clean(build, options.step)
    except (Refusal, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what is done is kept; run the same command to go on", file=sys.stderr)
        return 130
    return 0


def tell_again(lost: Any) -> None:
    """`sys.unraisablehook`: what is raised in a weak reference's callback Python leaves out, a Ctrl-C, too; it comes
    once more."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(0.1, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(lost)


if __name__ == "__main__":
    sys.unraisablehook = tell_again
    sys.exit(main())
