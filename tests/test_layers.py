"""Imports go one way, and the library stays a library."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: What of this project each package may import, besides itself.
ALLOWED = {
    "cifd_clip": set(),
    "training": {"cifd_clip"},
    "eval": {"cifd_clip", "training"},
    "experiments": {"cifd_clip", "training", "eval"},
    "demo": {"cifd_clip", "training", "eval", "experiments"},
    "benchmarks": {"cifd_clip", "training", "eval", "experiments"},
    "slurm": {"cifd_clip", "training", "eval", "experiments"},
}
PROJECT = {*ALLOWED, "tests"}
#: The library's one command line, ``python -m cifd_clip.export``.
EXPORT_COMMAND = ROOT / "cifd_clip" / "export" / "__main__.py"
#: Its one module that deals with the operating system.
FILES = ROOT / "cifd_clip" / "files.py"
#: What a command needs before it knows that its flags are right.
WITHOUT_TORCH = ("cifd_clip", "cifd_clip.methods", "cifd_clip.files", "cifd_clip.artefact")


def sources(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package}/ has no Python file: the test looks in the wrong place"
    return files


@cache
def imports(path: Path) -> set[str]:
    """Dotted names a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides its layer"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package):
    allowed = ALLOWED[package] | {package}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imports(path)
        if (top := name.partition(".")[0]) in PROJECT and top not in allowed
    ]
    assert not wrong, f"{package} may import only {sorted(allowed)}: " + "; ".join(wrong)


@pytest.mark.parametrize("package", ALLOWED)
def test_no_file_and_no_function_is_too_long_to_be_read_at_once(package):
    for path in sources(package):
        text = path.read_text()
        assert len(text.splitlines()) <= 450, f"{path} has more than 450 lines: split it"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                said = node.body[0] if ast.get_docstring(node) else None
                length = node.end_lineno - node.lineno + 1
                length -= said.end_lineno - said.lineno + 1 if said else 0
                assert length <= 80, f"{path}: {node.name} has {length} lines beside its docstring"


def test_no_module_imports_itself_through_others():
    modules = {dotted(path): path for package in ALLOWED for path in sources(package)}
    graph = {
        module: {longest(name, modules) for name in imports(path)} - {None, module}
        for module, path in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def dotted(path: Path) -> str:
    """The name that a file is imported by."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def longest(name: str, modules: dict[str, Path]) -> str | None:
    """The module that an imported name is, or is in; None if it is none of this project's."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_what_flags_are_checked_with_does_not_import_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_public_name_of_the_library_is_there():
    import cifd_clip

    for name in cifd_clip.__all__:
        assert getattr(cifd_clip, name) is not None and name in dir(cifd_clip)
    with pytest.raises(AttributeError, match="module 'cifd_clip' has no attribute 'Teachers'"):
        _ = cifd_clip.Teachers


def test_the_library_reads_no_command_line_environment_or_log_settings():
    wrong = []
    for path in sources("cifd_clip"):
        if path in (EXPORT_COMMAND, FILES):
            continue
        where = path.relative_to(ROOT)
        for name in imports(path):
            if name.partition(".")[0] in {"argparse", "os", "logging", "sys"}:
                wrong.append(f"{where} imports {name}")
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and ast.unparse(node.func)
            if called in {"print", "input"}:
                wrong.append(f"{where}:{node.lineno} calls {called}")
    assert not wrong, "; ".join(wrong)


def test_no_module_draws_from_torchs_global_generator():
    """Law: randomness only through an explicit generator (initial weights, noise)."""
    draws = {"rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal"}
    draws |= {"rand_like", "randn_like", "manual_seed", "dropout"}
    draws |= {"uniform_", "normal_", "bernoulli_", "random_", "exponential_"}
    wrong = []
    for path in sources("cifd_clip"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            explicit = any(k.arg == "generator" for k in node.keywords) or owner == "generator"
            if node.func.attr in draws and not explicit:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "; ".join(wrong)
