"""A method is declared once, in its file, as data that needs no torch."""

import ast
import importlib
import re

import pytest

from cifd_clip import DECLARED, METHODS
from cifd_clip.methods import read_literal
from cifd_clip.methods.options import GROUPS, declare
from cifd_clip.student import SITES
from test_layers import ROOT
from tiny import clip, task

FOLDER = ROOT / "cifd_clip" / "methods"


def test_none_comes_first_and_every_other_file_with_a_declaration_follows():
    names = [path.stem for path in sorted(FOLDER.glob("*.py")) if read_literal(path)]
    assert list(DECLARED) == list(METHODS) == ["none", *(name for name in names if name != "none")]


@pytest.mark.parametrize("name", METHODS)
def test_what_is_read_without_importing_a_method_is_what_its_class_has(name):
    module = importlib.import_module(f"cifd_clip.methods.{name}")
    assert declare(name, module.DECLARATION) == METHODS[name].declaration == DECLARED[name]
    assert METHODS[name].__module__ == module.__name__


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_every_option_that_it_declares_at_its_default(name):
    made = task(name, clip("tiny-student"), [48]).method
    assert made.options == {option.name: option.default for option in DECLARED[name].options}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_reads_every_option_that_it_declares(name):
    """An option without effect is a lie: its own are read in its file, a group's by its owner."""
    shared = {option for group in GROUPS.values() for option in group}
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    read = {node.slice.value for node in ast.walk(tree) if is_option(node)}
    own = {option.name for option in DECLARED[name].options} - shared
    assert read >= own, f"{name} never reads {own - read}"


def is_option(node: ast.AST) -> bool:
    return isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("options")


@pytest.mark.parametrize("name", METHODS)
def test_options_are_named_and_explained_once(name):
    options = DECLARED[name].options
    assert len({option.name for option in options}) == len(options)
    for option in options:
        assert option.help and "%" not in option.help, "argparse would read a % of its own"
        assert option.choices is None or option.default in option.choices


def test_the_site_of_the_bottleneck_is_a_site_of_the_student():
    (site,) = (option for option in DECLARED["cifd"].options if option.name == "ibm_site")
    assert site.choices == SITES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lambda_cl": 1.0},
            "the method kd has no option lambda_cl: expected one of .*, lambda_n",
        ),
        ({"rdm_output": "clean"}, "rdm_output is 'clean': expected one of rounded, noisy, raw"),
    ],
)
def test_an_option_that_is_not_declared_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        task("kd", clip("tiny-student"), [48], **options)


def test_the_readme_names_every_method():
    (names,) = re.findall(r"  methods/ +(.*): one file each", (ROOT / "README.md").read_text())
    assert set(names.split(", ")) == set(DECLARED)


def test_a_name_that_is_no_method_is_a_key_error():
    with pytest.raises(KeyError):
        METHODS["sgd"]
    assert "sgd" not in METHODS and "base" not in METHODS
