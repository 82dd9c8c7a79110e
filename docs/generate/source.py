"""Pages from the code itself: rules, vocabulary, spellings, and every reason that ends a region."""

from __future__ import annotations

import ast
import inspect
import pathlib
import re
import sys

import torch
from results import ROOT, table
from torch import nn

from fxfuse import vocabulary
from fxfuse.call import ATEN, FUNCTIONS, METHODS, MODULES
from fxfuse.patterns import DEFAULT_RULES, Legality, Rule
from fxfuse.vocabulary import Kind


# --- rules ------------------------------------------------------------------------------------------
def rules() -> str:
    """Every built-in rule, by family: its identity, its class, and what its docstring adds."""
    parts = []
    for family in dict.fromkeys(type(r).__module__ for r in DEFAULT_RULES):
        title, _, intro = (sys.modules[family].__doc__ or "").strip().partition("\n\n")
        parts += [f"## {title.rstrip('.')}", _plain(intro.strip())]
        parts += [_rule(r) for r in DEFAULT_RULES if type(r).__module__ == family]
    return "\n\n".join(p for p in parts if p)


def _rule(rule: Rule) -> str:
    rest = inspect.cleandoc(type(rule).__doc__ or "").partition("\n")[2].strip()
    lines = [f"### {rule.name}", f"```text\n{rule.identity}\n```", f"*{rule.legality.value}*", _plain(rest)]
    if rule.forward_only:
        lines.append("The two sides route gradients differently; a backward differentiates the original chain.")
    return "\n\n".join(line for line in lines if line)


def _plain(text: str) -> str:
    """Text whose products, a*b, are not taken for emphasis; what stands between backticks is as it is."""
    pieces = re.split(r"(``.*?``|`.*?`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"(?<=[\w)\]])\*(?=[\w(\[])", r"\\*", p) for p in pieces)


def legality() -> str:
    """The classes, how many rules each has, and whether they are on by default."""
    default = Legality.parse(None)
    counts = {c: sum(r.legality is c for r in DEFAULT_RULES) for c in Legality}
    return table(
        ["class", "rules", "applied by default"],
        [[f"`{c.value}`", str(counts[c]), "yes" if c in default else "no"] for c in Legality],
    )


# --- vocabulary -------------------------------------------------------------------------------------
def operators() -> str:
    """All operators, by kind, with the first line of what they mean."""
    about = _comments(pathlib.Path(inspect.getfile(Kind)), "Kind")
    parts = []
    for kind in Kind:
        parts.append(f"## {kind.value.capitalize()}\n\n{about[kind.name].capitalize()}.")
        parts.append(table(["operator", "meaning"], [[f"`{n}`", _meaning(n)] for n in vocabulary.names(kind)]))
    return "\n\n".join(parts)


def _meaning(name: str) -> str:
    op = vocabulary.lookup(name)
    text = inspect.cleandoc(op.__doc__ or "").partition("\n\n")[0].replace("\n", " ").strip()
    if not text or "->" in text or text.startswith((".. ", "Appl", "See")) or "(input" in text:
        return f"as torch's `{name}`"
    return _plain(text)


def _comments(path: pathlib.Path, name: str) -> dict[str, str]:
    """The ``#:`` comments behind the members of an enum."""
    lines = path.read_text().splitlines()
    (node,) = (n for n in ast.parse("\n".join(lines)).body if isinstance(n, ast.ClassDef) and n.name == name)
    found = {}
    for item in node.body:
        if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            found[item.targets[0].id] = lines[item.lineno - 1].partition("#:")[2].strip()
    return found


def spellings() -> str:
    """What a model may write: modules, functions, methods, aten overloads."""
    functions = {_name(f) for f in FUNCTIONS}
    groups = {
        "Modules": {f"nn.{m.__name__}" for m in MODULES},
        "Functions": {f for f in functions if f},
        "Methods of a tensor": set(METHODS),
        "aten operators": set(ATEN),
    }
    return "\n\n".join(f"**{title}:** {', '.join(f'`{n}`' for n in sorted(names))}" for title, names in groups.items())


def _name(function: object) -> str:
    module, name = getattr(function, "__module__", "") or "", getattr(function, "__name__", "")
    for prefix, space in (
        ("torch.special", torch.special),
        ("torch.linalg", torch.linalg),
        ("F", torch.nn.functional),
        ("torch", torch),
    ):
        if getattr(space, name, None) is function:
            return f"{prefix}.{name}"
    return f"operator.{name}" if module == "_operator" else ""


def outside() -> str:
    """Modules of torch.nn that the vocabulary does not have: they end a region, and run as they are."""
    containers = {"Module", "Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict", "Container"}
    known = {m.__name__ for m in MODULES}
    names = {n for n, m in vars(nn).items() if inspect.isclass(m) and issubclass(m, nn.Module)} - known - containers
    shown = sorted(n for n in names if not n.startswith("Lazy") and "Loss" not in n)
    return ", ".join(f"`nn.{n}`" for n in shown)


def reasons() -> str:
    """What a report says where an operator of the vocabulary is written in a way that is not covered."""
    found: dict[str, None] = {}
    for path in [*sorted((ROOT / "fxfuse" / "spellings").glob("*.py")), ROOT / "fxfuse" / "normalize.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "refuse":
                found[_text(node.args[0])] = None
    return "\n".join(f"* {reason}" for reason in sorted(found))


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    assert isinstance(node, ast.JoinedStr)
    return "".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values)
