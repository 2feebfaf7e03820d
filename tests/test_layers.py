"""The house stands on its floors: lib < planted < pipeline < report < steps, no step knows another, no circles.

The checks read the imports and definitions of a tree; each is shown to fail on a small tree with the fault planted.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("lib", "planted", "pipeline", "report", "steps")
# What stands above the steps: it knows all of them.
ABOVE = ("steps.registry", "steps.plan", "steps.__main__")
MOST_LINES, MOST_ARGUMENTS = 60, 8


def modules_of(root: Path) -> dict[str, Path]:
    """Every module of the five rooms, by its dotted name."""
    paths = [path for floor in FLOORS for path in sorted((root / floor).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports_of(path: Path, modules: dict[str, Path], always: bool = False) -> set[str]:
    """The rooms' modules that a file imports; with `always`, only those that importing it imports."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    nodes = ast.walk(tree) if not always else [node for node in tree.body if not isinstance(node, ast.If)]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & modules.keys()) | ({node.module} if names - modules.keys() else set())
    return {name for name in found if name.split(".")[0] in FLOORS}


def arrows_up(root: Path) -> list[str]:
    """Imports from a floor to one above it."""
    modules, out = modules_of(root), []
    for name, path in modules.items():
        floor = FLOORS.index(name.split(".")[0])
        out += [f"{name} -> {to}" for to in imports_of(path, modules) if FLOORS.index(to.split(".")[0]) > floor]
    return sorted(out)


def steps_that_import_steps(root: Path) -> list[str]:
    """Imports from one step's folder to another's, or to what stands above them."""
    modules, out = modules_of(root), []
    for name, path in modules.items():
        if name.startswith("steps.") and name not in ABOVE:
            own = name.split(".")[1]
            seen = {to for to in imports_of(path, modules) if to.startswith("steps.")}
            out += [f"{name} -> {to}" for to in seen if to.split(".")[1] != own]
    return sorted(out)


def measures_that_import_pages(root: Path) -> list[str]:
    """Imports from what decides a step's data to what only draws: a sentence must not sweep."""
    modules, out = modules_of(root), []
    for step in sorted({name.split(".")[1] for name in modules if name.count(".") == 2 and name.startswith("steps.")}):
        todo, seen = [f"steps.{step}.measure"], set()
        while todo:
            name = todo.pop()
            if name in seen or name not in modules:
                continue
            seen.add(name)
            for to in imports_of(modules[name], modules):
                if to.startswith("report") or re.fullmatch(rf"steps\.{step}\.\w*page", to):
                    out.append(f"{name} -> {to}")
                elif to.startswith(f"steps.{step}."):
                    todo.append(to)
    return sorted(out)


def circles(root: Path) -> list[str]:
    """Modules that import each other, directly or through others, wherever in the file the import stands."""
    modules = modules_of(root)
    graph = {name: {to for to in imports_of(path, modules) if to in modules} for name, path in modules.items()}
    out = []
    for start in graph:
        todo, seen = list(graph[start]), set()
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph[name]
        out += [start] if start in seen else []
    return sorted(out)


def long_functions(root: Path) -> list[str]:
    """Functions over the limits, lambdas bound to a name, and formatting switched off beside what is no table."""
    out = []
    for name, path in modules_of(root).items():
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                lines, given = node.end_lineno - first + 1, node.args
                names = [a.arg for a in [*given.posonlyargs, *given.args, *given.kwonlyargs]]
                count = len([a for a in names if a not in ("self", "cls")])
                if lines > MOST_LINES or count > MOST_ARGUMENTS:
                    out.append(f"{name}.{node.name}: {lines} lines, {count} arguments")
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
                out.append(f"{name}: a lambda bound to a name in line {node.lineno}")
    return sorted(out)


CHECKS = {
    arrows_up: {"lib/low.py": "from report import words\n", "report/words.py": ""},
    steps_that_import_steps: {
        "steps/one/measure.py": "from steps.two.measure import x\n",
        "steps/two/measure.py": "x = 1\n",
    },
    measures_that_import_pages: {
        "steps/one/measure.py": "from steps.one import sizes\n",
        "steps/one/sizes.py": "def f():\n    from steps.one.page import x\n",
        "steps/one/page.py": "x = 1\n",
    },
    circles: {"lib/a.py": "from lib import b\n", "lib/b.py": "def f():\n    from lib.a import x\n"},
    long_functions: {"lib/a.py": "def f():\n" + "    x = 1\n" * 60},
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_stands(check):
    assert check(ROOT) == []


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_planted_fault_is_found(check, tmp_path):
    for name, text in CHECKS[check].items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert len(check(tmp_path)) >= 1


@pytest.mark.parametrize("text", ["def f(a, b, c, d, e, f, g, h, i):\n    pass\n", "f = lambda: 1\n"])
def test_many_arguments_and_named_lambdas_are_found(text, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_text(text, encoding="utf-8")
    assert len(long_functions(tmp_path)) == 1
