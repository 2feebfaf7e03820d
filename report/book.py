"""Assemble and build the book of one profile.

1. Read the table of contents: each page `executed/NN_step` in it is a step whose executed notebook, findings and run
   record must be there.
2. Copy the sources of `book/` and the executed notebooks, each checked for having run to its end. The pages of a
   profile that is a quicker form of another begin with what they leave out.
3. Fill the generated pages: the landing page from the findings, reproducibility from the run records, cost from the
   results of `bench/`, the library from its sources. Their prose is in `book/*.md`, with `$names` for generated text.
4. Build the HTML with Jupyter Book, warnings as errors.

Nothing here knows a model or a number: what a page says was written by a step.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from lib import questions
from lib.errors import Refusal
from lib.questions import Question
from lib.records import RecordError
from pipeline import keys, params, units
from report import front, glossary, pairs, robustness, scale, shed, shell, validation
from report.library import block, contents, library

ROOT = Path(__file__).resolve().parent.parent
GLOSSARY = "glossary.yaml"
PACKAGES = ("lib", "report")  # those whose modules have a page each
WORDED = ("index.md", "how_to_read.md", GLOSSARY)  # what is about the question, and put into its words

# What of a profile may be a file or folder of one's own.
LOCAL = ("model", "tokenizer", "adapter", "question", "pairs_file", "people_file")


class BookError(Refusal):
    """The book cannot be built; the message names the step or page and what to do."""


def pages(source: Path) -> dict[str, str]:
    """Steps in the table of contents: step name -> page (`necessity` -> `executed/03_necessity`), in reading order."""
    found = re.findall(r"executed/\d\d_\w+", (source / "_toc.yml").read_text(encoding="utf-8"))
    return {page.split("_", 1)[1]: page for page in found}


def read_json(results: Path, step: str, kind: str) -> dict[str, Any]:
    """Findings or run record (`kind`: "findings", "run") of a step; BookError when the step has not written it."""
    path = results / f"{step}.{kind}.json"
    try:
        if keys.left(results, step, path.name) is None:
            raise BookError(f"step {step} has no {kind} file ({path}): run the step, then build the book again")
        return units.read_json(path)
    except RecordError as error:
        raise BookError(f"step {step}: {error}") from None


def quick_notes(sections: params.Sections, results: Path, steps: Mapping[str, str]) -> dict[str, str]:
    """For a profile that is the quick form of another: what each page and the whole ("index") leave out, as MyST; for
    one that only names another as its full one, that it is none ("index")."""
    notes, heading = {}, "The quick form"
    for step in steps:
        run = read_json(results, step, "run")
        own = run.get("parameters", {})
        if not (full := own.get("full_profile")):
            continue
        if others := other_than_full(sections, step, run, read_json(results, step, "findings")):
            heading, notes = "Not a quick form", {}
            notes["index"] = (
                f"This report was made with profile `{own['profile']}`, which is not the quick form of `{full}`, the "
                f"`full_profile` that it names: it differs from that in `{'`, `'.join(others)}`."
            )
            break
        which = f"profile `{own['profile']}`, the quick form of `{full}`"
        less = params.left_out(sections, step, own) or ["nothing but what the steps before it left out"]
        notes[step] = f"This page was made with {which}. It leaves out:\n\n- " + "\n- ".join(less)
        notes["index"] = (
            f"This report was made with {which}: every page, from fewer prompts, so that intervals are "
            "wider, and missing where fewer than 20 quads (groups of four people) are left: what needs one is then "
            "not decided. "
            f"Each page says what it leaves out. The full report: `make book PROFILE={full}`."
        )
    return {name: f":::{{admonition}} {heading}\n{note}\n:::" for name, note in notes.items()}


def other_than_full(
    sections: params.Sections, step: str, run: Mapping[str, Any], found: Mapping[str, Any]
) -> list[str]:
    """The keys of what a profile is about in which a step's run is not of its `full_profile`: with any of them the
    profile is no quicker form of it. Of pairs and people the contents count, not where their files lie."""
    own, people = run["parameters"], run.get("ingredients", {}).get("inputs", {}).get("people_file")
    full = params.validate(sections, step, params.load_profile(own["full_profile"]))
    given = full.model_dump(mode="json")
    others = [key for key in params.ABOUT if own.get(key, given[key]) != given[key]]
    others += ["pairs_file"] * (found.get("about", {}).get("pairs_file") != keys.given_pairs(full))
    return others + ["people_file"] * (people is not None and people != keys.hash_place(full.people_file))


def named_sites(found: Any) -> list[str]:
    """The sites that a step's findings single out ("21.6", "mlp 3"), sorted; not the tables of every site (`sites`)."""
    if isinstance(found, Mapping):
        own = re.findall(r"^(?:\w+ )?\d+(?:\.\d+)?(?= at |$)", str(found.get("site", "")))
        parts = [part for key, part in found.items() if key != "sites"]
    else:
        own, parts = [], found if isinstance(found, list) else []
    return sorted({*own, *(site for part in parts for site in named_sites(part))})


def indexed(found: Mapping[str, Any]) -> str:
    """Index entries for those sites, as MyST: the search splits words at a point, and finds "21.6" by these alone."""
    sites = named_sites(found)
    return f"```{{index}} {', '.join(f'!{site}' for site in sites)}\n```" if sites else ""


def clean_notebook(path: Path, step: str, note: str = "") -> dict[str, Any]:
    """The executed notebook for the book, without papermill's metadata and what was written to stderr:
    they hold times and this machine's paths. `note` goes under its title.

    Jupyter Book renders a failed or half-run notebook without a warning, so both are BookErrors here.
    """
    if not path.is_file():
        raise BookError(f"step {step} has no executed notebook ({path}): run the step, then build the book again")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    if note:
        heading, _, rest = "".join(notebook["cells"][0]["source"]).partition("\n")
        notebook["cells"][0]["source"] = f"{heading}\n\n{note}\n{rest}"
    for number, cell in enumerate(notebook["cells"], start=1):
        for key in ("papermill", "execution"):
            cell["metadata"].pop(key, None)
        tags = cell["metadata"].get("tags", [])
        if {"parameters", "injected-parameters"} & set(tags) and "hide-input" not in tags:
            cell["metadata"]["tags"] = [*tags, "hide-input"]
        shown = cell["metadata"].get("mystnb", {})
        if "figure" in shown:  # for who does not see it
            shown["image"] = {"alt": shown["figure"]["caption"]} | shown.get("image", {})
        if cell["cell_type"] != "code" or not "".join(cell["source"]).strip():
            continue
        for output in cell.get("outputs", ()):
            if output["output_type"] == "error":
                raise BookError(f"step {step} failed in cell {number} of {path}: {output['ename']}: {output['evalue']}")
        cell["outputs"] = [output for output in cell.get("outputs", ()) if output.get("name") != "stderr"]
        if cell.get("execution_count") is None:
            raise BookError(f"step {step} stopped before cell {number} of {path}: run the step again")
    for key in ("papermill", "widgets"):
        notebook.get("metadata", {}).pop(key, None)
    return notebook


def asked(results: Path, step: str) -> Question:
    """The question that a step's run record names."""
    return questions.load(read_json(results, step, "run").get("parameters", {}).get("question", questions.DEFAULT))


def reworded(notebook: dict[str, Any], topic: Question) -> str:
    """A notebook as JSON text, in the question's words: its prose, captions, and the texts and tables it shows."""
    for cell in notebook["cells"] if topic.words else ():
        if cell["cell_type"] == "markdown":
            cell["source"] = topic.reworded("".join(cell["source"]))
        for part in (cell["metadata"].get("mystnb", {}).get(name, {}) for name in ("figure", "image")):
            part |= {key: topic.reworded(part[key]) for key in ("caption", "alt") if key in part}
        for output in cell.get("outputs", ()):
            shown = output.get("data", {})
            for kind in ("text/markdown", "text/html"):
                if kind in shown:
                    parts = re.split(r"(<[^>]*>)", "".join(shown[kind]))
                    shown[kind] = "".join(part if part.startswith("<") else topic.reworded(part) for part in parts)
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def landing(results: Path, steps: Mapping[str, str], to: Path) -> dict[str, str]:
    """Fields of `index.md` from the findings. Copies the one figure it shows, of the last step, to `to/figures/`: those
    of the steps stand on their pages.

    A findings file has `model` {name, n_layers, ...}, `task`, `able`, `sentences` (MyST) and `figures`
    [{file, caption}], `file` relative to the results folder. `headline`, if there, stands in for `sentences` here.
    """
    findings = {step: read_json(results, step, "findings") for step in steps}
    models = {step: found["model"]["name"] for step, found in findings.items()}
    if len(set(models.values())) > 1:
        raise BookError(f"{results} mixes models {models}: run the steps of one profile into one results folder")
    first, *others = steps
    last = next((step for step in reversed(others) if "outline" in findings[step]), others[-1])  # it concludes
    others.remove(last)
    answer = [
        item(f"[{title(step)}]({steps[step]}.ipynb)", sentences(step, findings[step])) for step in (last, *others)
    ]
    model = findings[first]["model"]
    facts = {key: value for key, value in model.items() if key != "name"}
    rows = [
        f"| [{title(step)}]({page}.ipynb) | `{findings[step].get('task', '')}` | "
        f"{'measured' if findings[step].get('able', True) else 'not measured: the model cannot do this task'} |"
        for step, page in steps.items()
    ]
    runs = {step: read_json(results, step, "run") for step in steps}
    return {
        "model": short(model["name"]),
        **front.head(findings[last].get("outline", {})),
        **front.times(runs, first, "sufficiency"),
        "level": f"{100 * runs[first].get('parameters', {}).get('level', 0.95):g}%",
        "answer": "\n\n".join(answer),
        "slice": front.in_map(findings.get("sufficiency", {}).get("critical_slice", ()), steps.get("sufficiency", "")),
        "claims": front.verdicts(results),
        "figure": "\n\n".join(figure_block(results, to, last, own) for own in findings[last].get("figures", ())[:1]),
        "able": " ".join(sentences(first, findings[first])),
        "tried": front.tried(findings[first]),
        "measured": table(facts, head=("model", code(model["name"]))),
        "pages": "\n".join(["| page | task | this model |", "| --- | --- | --- |", *rows]),
    }


def short(model: str) -> str:
    """A model's name for headings: a hub id as it is, else the file's or folder's own name without the way to it."""
    if model.startswith("planted:"):  # its options are with its facts
        return "a planted model"
    return Path(model).name if model.startswith(("package:", "config:", ".", "/")) else model


def title(step: str) -> str:
    return step.replace("_", " ").capitalize()


def item(link: str, said: Sequence[str]) -> str:
    """A step in the list on the landing page: its first sentence, and the others folded away behind it."""
    more = f"\n\n  ```{{dropdown}} more\n  {' '.join(said[1:])}\n  ```" if said[1:] else ""
    return f"- {link}: {said[0]}{more}"


def sentences(step: str, found: Mapping[str, Any]) -> Sequence[str]:
    """What a step found, for the landing page; a step without a sentence is a BookError."""
    said = found.get("headline") or found.get("sentences") or ()
    if not said and found.get("able", True) is False:
        said = [f"This model cannot do the task `{found.get('task')}`, so nothing was measured."]
    if not any(said):
        raise BookError(f"the findings of step {step} hold no sentences: run the step again")
    return said


def figure_block(results: Path, to: Path, step: str, figure: Mapping[str, str]) -> str:
    """A MyST figure directive for one figure of a findings file, its image copied beside the page."""
    image = results / figure["file"]
    if not image.is_file():
        raise BookError(f"figure {figure['file']} of step {step} is not in {results}: run the step again")
    (to / "figures").mkdir(exist_ok=True)
    shutil.copyfile(image, to / "figures" / image.name)
    caption = " ".join(figure["caption"].split())
    alternative = re.sub(r"[`*\[\]{}]", "", caption)
    return (
        f"```{{figure}} figures/{image.name}\n:name: fig-landing-{step.replace('_', '-')}\n"
        f":alt: {alternative}\n\n{caption}\n```"
    )


def needed(profile: str, root: Path) -> str:
    """What git does not hold of what a profile is made of, its own file included, as a sentence; "" where it holds all
    of it, and where there is no git to ask."""
    file = root / "params" / f"{profile}.yaml"
    given = params.load_profile(str(file)) if file.is_file() else {}
    named = [str(given[key]).removeprefix("config:") for key in LOCAL if given.get(key)]
    try:
        there = [name for name in (f"params/{profile}.yaml", *named) if (root / name).exists()]
        lacking = [f"`{name}`" for name in there if not tracked(name, root)] if tracked(".", root) else []
    except OSError:
        return ""
    said = f"Git does not hold all of it: {', '.join(lacking)} must be there, too, as when the report was made."
    return f"{said} (`dirty` in the table is about the files that git tracks.)" if lacking else ""


def tracked(name: str, root: Path) -> bool:
    """Whether git holds a file, or something in a folder. OSError where there is no git."""
    command = ["git", "-C", str(root), "ls-files", "--", name]
    return bool(subprocess.run(command, capture_output=True, text=True, check=False).stdout)


def reproducibility(results: Path, steps: Mapping[str, str]) -> str:
    """The run records of all steps as MyST: first what all of them share, then each step's own facts."""
    records = {step: read_json(results, step, "run") for step in steps}
    for record in records.values():
        for name in ("step", "files"):  # the heading says it; hashes of files are for who checks them
            record.pop(name, None)
        for part in record.get("tables", {}).values():
            part.pop("log", None)  # the record's own log has the same lines
    shared, own = split(list(records.values()))
    parts = ["## The same in every step", describe(shared)] if shared else []
    for step, record in zip(records, own, strict=True):
        parts += [f"## {title(step)}", describe(record) or "Nothing differs."]
    return "\n\n".join(parts)


def split(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what all records share, the rest of each), nested mappings key by key; lists stay with their record."""
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [dict(record) for record in records]
    for key in records[0]:
        values = [record.get(key) for record in records]
        if all(isinstance(value, Mapping) for value in values):
            common, rests = split(values)
            shared.update({key: common} if common else {})
            for record, rest in zip(own, rests, strict=True):
                record.pop(key)
                record.update({key: rest} if rest else {})
        elif all(value == values[0] for value in values) and not isinstance(values[0], list):
            shared[key] = values[0]
            for record in own:
                record.pop(key)
    return shared, own


def describe(record: Mapping[str, Any]) -> str:
    """A record as MyST: a table of its plain values, then a folded block for each mapping or list of lines in it."""
    plain = {key: value for key, value in record.items() if not nested(value)}
    parts = [table(plain)] if plain else []
    for key, value in record.items():
        if nested(value) and value:
            body = table(flat(value)) if isinstance(value, Mapping) else block("text", "\n".join(map(as_text, value)))
            parts.append(f"::::{{dropdown}} {title(key)}\n{body}\n::::")
    return "\n\n".join(parts)


def nested(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(v, str | Mapping) for v in value))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return out


def table(values: Mapping[str, Any], head: tuple[str, str] = ("name", "value")) -> str:
    """A two-column MyST table of names and values, both as code."""
    rows = [f"| {code(key)} | {code(value)} |" for key, value in values.items()]
    return "\n".join([f"| {head[0]} | {head[1]} |", "| --- | --- |", *rows])


def code(value: Any) -> str:
    text = " ".join(as_text(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`" if text else ""


def as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Folders:
    """Where a profile's book is made from, and where it is built."""

    source: Path  # prose and configuration
    executed: Path  # notebooks that have run
    results: Path  # findings, run records, figures
    to: Path  # replaced


def assemble(sections: params.Sections, profile: str, folders: Folders, root: Path = ROOT) -> None:
    """Write the complete sources of a profile's book to `folders.to`. `sections` are the plan's."""
    results, to = folders.results, folders.to
    steps = pages(folders.source)
    notes = quick_notes(sections, results, steps)
    topic = asked(results, next(iter(steps)))
    notebooks = step_pages(folders, steps, notes, topic)
    able = read_json(results, list(steps)[-1], "findings").get("able", True) is not False
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folders.source, to, ignore=shutil.ignore_patterns("_build", ".*", "executed"))
    (to / ("unable.md" if able else "index.md")).unlink()
    if not able:
        (to / "unable.md").rename(to / "index.md")
    (to / "executed").mkdir()
    for page, text in notebooks.items():
        (to / f"{page}.ipynb").write_text(text, encoding="utf-8")
    toc = params.read_yaml(to / "_toc.yml")
    listed = [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]
    if unknown := [page for page in listed if not list(to.glob(f"{page}.*"))]:
        raise BookError(f"{folders.source / '_toc.yml'} names pages that do not exist: {', '.join(unknown)}")
    about = {"profile": profile, "title": topic.title, "introduction": topic.introduction}
    about |= {"quick": notes.get("index", ""), "needed": needed(profile, root)}
    for name, fields in generated(folders, steps, topic, root).items():
        page = to / f"{name}.md"
        page.write_text(Template(page.read_text(encoding="utf-8")).substitute(about | fields), encoding="utf-8")
    (to / "api").mkdir()
    for name, page in {name: page for package in PACKAGES for name, page in library(root / package).items()}.items():
        (to / "api" / f"{name}.md").write_text(page, encoding="utf-8")
    for page in (to / name for name in WORDED if (to / name).is_file()):
        page.write_text(topic.reworded(page.read_text(encoding="utf-8")), encoding="utf-8")


def step_pages(folders: Folders, steps: Mapping[str, str], notes: Mapping[str, str], topic: Question) -> dict[str, str]:
    """The executed notebook of every step with what stands around it, by page, as JSON text."""
    claims, out = front.ledger_of(folders.results)["claims"], {}
    for step, page in steps.items():
        run, name = read_json(folders.results, step, "run"), Path(page).name
        note = f"{notes.get(step, '')}\n\n{indexed(read_json(folders.results, step, 'findings'))}".strip()
        notebook = clean_notebook(folders.executed / f"{name}.ipynb", step, note)
        time = front.minutes(float(run.get("seconds") or 0))
        out[page] = reworded(notebook | {"cells": shell.around(notebook["cells"], name, run, claims, time)}, topic)
    return out


def generated(folders: Folders, steps: Mapping[str, str], topic: Question, root: Path) -> dict[str, dict[str, str]]:
    """The fields of every page that has some, by page."""
    results, to, measured = folders.results, folders.to, root / "bench" / "results"
    commit = read_json(results, next(iter(steps)), "run").get("commit") or "unknown"  # outside git
    return {
        "index": landing(results, steps, to),
        "how_to_read": {"glossary": glossary.listing(glossary.load(to / GLOSSARY))},
        "cite": {"commit": commit[:7]},
        "pairs": pairs.fields(results, to, topic),
        "scale": scale.fields(measured, to),
        "validation": validation.fields(measured, to, results),
        "robustness": robustness.fields(measured, to),
        "reproducibility": {"runs": reproducibility(results, steps)},
        "api": {name: contents(root / name) for name in PACKAGES},
    }


def build(folder: Path) -> Path:
    """Build the assembled book in `folder` with warnings as errors; returns its index.html."""
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    command += ["build", str(folder), "-W", "--keep-going"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    log = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    (folder / "build.log").write_text(log, encoding="utf-8")
    index = folder / "_build" / "html" / "index.html"
    if done.returncode or not index.is_file():
        said = [line for line in log.splitlines() if re.search(r"WARNING|ERROR|Error\b", line)]
        raise BookError(f"jupyter-book stopped (all it said is in {folder / 'build.log'}):\n" + "\n".join(said[:40]))
    shed.shed(index.parent)
    terms = glossary.load(folder / GLOSSARY)
    for page in index.parent.rglob("*.html"):
        page.write_text(glossary.explained(page.read_text(encoding="utf-8"), terms), encoding="utf-8")
    return index
