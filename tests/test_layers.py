"""Imports go one way, and the library stays a library."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = {"cifd_clip", "training", "eval", "experiments", "demo", "benchmarks", "slurm", "tests"}
#: What of this project each package may import, besides itself.
ALLOWED = {
    "cifd_clip": set(),
    "training": {"cifd_clip"},
    # training.clip.flags: what a recipe costs depends on how training reads it;
    # training.classifier…: a classifier's RDMs are measured on the images and with the teachers as
    # training reads them;
    # training.clip.models: model configs are read, and weights refused, as in training
    "eval": {
        "cifd_clip",
        "training.engine.run",
        "training.errors",
        "training.clip.models.add_model_configs",
        "training.clip.models.check_weights",
        "training.clip.models.images_of",
        "training.clip.flags",
        "training.classifier.run.load_split",
        "training.classifier.cifar",
        "training.classifier.imagenet",
        "training.classifier.teachers",
    },
    "experiments": {"cifd_clip", "training", "eval"},
    # experiments.study: the runner of everything that is a list of commands
    "demo": {"cifd_clip", "training", "eval", "experiments"},
    "benchmarks": {"cifd_clip", "training", "eval", "experiments"},
    "slurm": {"cifd_clip", "training", "eval", "experiments.study"},
}
#: The library's one command line, ``python -m cifd_clip.export``.
EXPORT_COMMAND = ROOT / "cifd_clip" / "export" / "__main__.py"
#: Its one module that deals with the operating system.
FILES = ROOT / "cifd_clip" / "files.py"


def sources(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package}/ has no Python file: the test looks in the wrong place"
    return files


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


def within(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package):
    allowed = ALLOWED[package] | {package}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imports(path)
        if name.partition(".")[0] in PROJECT and not within(name, allowed)
    ]
    assert not wrong, f"{package} may import only {sorted(allowed)}: " + "; ".join(wrong)


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
