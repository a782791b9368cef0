"""The distillation methods: one file each, each a module from features to a dict of losses.

A method's file holds its ``DECLARATION``, a literal that is read without importing the file (which
imports torch), and its class; nothing else names it. It owns only what trains beside the student
(projectors, temperatures, bottlenecks). It gets the student's pooled features and a *list* of
teachers, of which assistants are ordinary members.
"""

import ast
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from cifd_clip.methods.options import Declaration, Option, declare

if TYPE_CHECKING:
    from cifd_clip.methods.base import Method

__all__ = ["DECLARED", "METHODS", "Declaration", "Option"]


def read_literal(path: Path) -> dict | None:
    """The literal ``DECLARATION`` of a Python file; None if it has none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DECLARATION":
            return ast.literal_eval(node.value)
    return None


def _declared() -> dict[str, Declaration]:
    literals = {path.stem: read_literal(path) for path in Path(__file__).parent.glob("*.py")}
    names = sorted(literals, key=lambda name: (name != "none", name))
    return {name: declare(name, literals[name]) for name in names if literals[name]}


class _Methods(Mapping[str, "type[Method]"]):
    """The methods' classes, imported when they are used."""

    def __getitem__(self, name: str) -> "type[Method]":
        module = import_module(f"{__name__}.{DECLARED[name].name}")
        (method,) = (
            value
            for value in vars(module).values()
            if isinstance(value, type) and vars(value).get("declaration") is DECLARED[name]
        )
        return method

    def __iter__(self) -> Iterator[str]:
        return iter(DECLARED)

    def __len__(self) -> int:
        return len(DECLARED)


#: Declarations by name: ``none``, then the others in alphabetical order.
DECLARED: dict[str, Declaration] = _declared()
#: Classes by name, in the same order.
METHODS: Mapping[str, "type[Method]"] = _Methods()
