"""The pages on the library: every public, documented name of a package, from its sources. Nothing is imported."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from markdown_it import MarkdownIt


def block(kind: str, text: str) -> str:
    """A MyST block ("text", "python": code; "{raw} html": HTML as it is) with a fence longer than any in the text."""
    fence = "`" * (max([2, *map(len, re.findall(r"`+", text))]) + 1)
    return f"{fence}{kind}\n{text}\n{fence}"


def library(folder: Path) -> dict[str, str]:
    """A MyST page of every public, documented function and class for each module of a package ("lib.hooks")."""
    pages = {}
    for path in sorted(folder.glob("[a-z]*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        parts = [f"# {folder.name}.{path.stem}", described(module)]
        for node in public(module):
            parts += [f"## {node.name}", block("python", signature(node)), described(node)]
            for method in public(node) if isinstance(node, ast.ClassDef) else ():
                parts += [block("python", signature(method)), described(method)]
        pages[f"{folder.name}.{path.stem}"] = "\n\n".join(part for part in parts if part)
    return pages


def contents(folder: Path) -> str:
    """The modules of a package as a MyST table: each with its page and the first sentence of its docstring."""
    rows = ["| module | what it holds |", "| --- | --- |"]
    for path in sorted(folder.glob("[a-z]*.py")):
        said = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
        first = re.match(r".*?(?<! al)\.(?= |$)|.*", said)[0].rstrip(".").replace("|", "\\|")
        rows.append(f"| [{folder.name}.{path.stem}](api/{folder.name}.{path.stem}.md) | {first} |")
    return "\n".join(rows)


def public(parent: ast.Module | ast.ClassDef) -> list[ast.FunctionDef | ast.ClassDef]:
    return [
        node
        for node in parent.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node)
    ]


def described(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    """A docstring as HTML. Plain Markdown and not MyST: a brace or bracket in a docstring must not break the book."""
    # Lines set in under a paragraph ("Args:", a table of names) keep their lines: made a block of their own.
    text = re.sub(r"(?m)^(?! |[-*] |\d+\. )(.+)\n(?=    )", r"\1\n\n", ast.get_docstring(node) or "")
    html = MarkdownIt("commonmark", {"html": False}).render(text)
    return block("{raw} html", f'<div class="docstring">\n{html}</div>') if text else ""


def signature(node: ast.ClassDef | ast.FunctionDef) -> str:
    """A function's `def` line, or a class line with its annotated fields; one argument a line where it is long."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        fields = [f"    {ast.unparse(sub)}" for sub in node.body if isinstance(sub, ast.AnnAssign)]
        return "\n".join([f"class {node.name}({bases}):" if bases else f"class {node.name}:", *fields])
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"def {node.name}({ast.unparse(node.args)}){returns}"
    if len(line) <= 96:
        return line
    # ast.unparse writes arguments on one line; split only at the commas between them, by unparsing each apart.
    spec, arguments = node.args, []
    positional = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(positional) - len(spec.defaults)) + list(spec.defaults)
    for argument, default in zip(positional, defaults, strict=True):
        arguments.append(parameter(argument, default))
    if spec.vararg or spec.kwonlyargs:
        arguments.append(f"*{ast.unparse(spec.vararg)}" if spec.vararg else "*")
    for argument, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
        arguments.append(parameter(argument, default))
    if spec.kwarg:
        arguments.append(f"**{ast.unparse(spec.kwarg)}")
    return "\n".join([f"def {node.name}(", *(f"    {argument}," for argument in arguments), f"){returns}"])


def parameter(argument: ast.arg, default: ast.expr | None) -> str:
    text = ast.unparse(argument)
    if default is None:
        return text
    return f"{text} = {ast.unparse(default)}" if argument.annotation else f"{text}={ast.unparse(default)}"
