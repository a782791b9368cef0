"""What is installed works from an empty directory: commands, recipes, data files."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from test_layers import ALLOWED, ROOT
from training.commands import COMMANDS

#: What commands start with; benchmarks and experiments are for a checkout.
PACKAGES = ("cifd_clip", "training", "eval", "slurm", "demo")


def modules() -> list[str]:
    """Every module with a command line, as ``python -m`` takes it."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    commands = (path for path in files if '__name__ == "__main__"' in path.read_text())
    dotted = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in commands)
    return sorted(name.removesuffix(".__main__") for name in dotted)


def python(code: str, cwd: Path, path: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A wheel, unpacked where nothing else is."""
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(
        ".*", "shared", "logs", "build", "out", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, folder / "source", ignore=unwanted)
    command = "pip wheel --quiet --no-deps --no-build-isolation --no-index -w . ./source".split()
    subprocess.run([sys.executable, "-m", *command], cwd=folder, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


HELP = """
import contextlib, io, runpy, sys
for module in {modules}:
    sys.argv, out = [module, "--help"], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert "usage:" in out.getvalue(), f"{{module}} --help says {{out.getvalue()!r}}"
    assert "torch" not in sys.modules, f"{{module}} imports torch before it has read its flags"
"""


def test_every_commands_help_comes_without_torch(tmp_path):
    assert len(modules()) >= 14, modules()
    done = python(HELP.format(modules=modules()), tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_package_data_file_is_in_the_wheel(installed):
    tracked = subprocess.run(
        ["git", "ls-files", *ALLOWED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("this is no git checkout")
    missing = [name for name in tracked.stdout.splitlines() if not (installed / name).is_file()]
    assert not missing


SCRIPT = """
import sys
import training.commands
assert training.commands.__file__.startswith({site!r}), training.commands.__file__
sys.argv = ["/usr/bin/{name}", *{words}]
training.commands.main()
"""


def script(installed: Path, cwd: Path, name: str, *words: str) -> subprocess.CompletedProcess:
    """A console script, as an installer would write it."""
    code = SCRIPT.format(site=str(installed), name=name, words=list(words))
    return python(code, cwd, installed)


def test_every_script_is_declared_and_answers_where_there_is_no_checkout(installed, tmp_path):
    (dist,) = installed.glob("*.dist-info")
    declared = ConfigParser()
    declared.read(dist / "entry_points.txt")
    assert dict(declared["console_scripts"]) == dict.fromkeys(COMMANDS, "training.commands:main")
    for name, module in COMMANDS.items():
        done = script(installed, tmp_path, name, "--help")
        assert f"python -m {module}" in done.stdout, f"{name}: {done.stderr}"


def test_a_recipe_is_found_in_what_is_installed(installed, tmp_path):
    recipe = "@slurm/recipes/cc12m_vitl14_vits16.args"
    done = script(installed, tmp_path, "cifd-train", recipe)
    assert "error: --train-data is missing" in done.stderr, done.stderr


def test_a_run_works_where_there_is_no_checkout(installed, flags, tmp_path):
    words = [*flags, "--logs=logs", "--name=run", "--workers=1"]
    done = script(installed, tmp_path, "cifd-train", *words)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "logs" / "run"
    assert (run / "student" / "open_clip_model.safetensors").is_file()
    (start,) = json.loads((run / "environment.json").read_text())["starts"]
    assert start["command"].startswith("python -m training.main ") and start["commit"] is None


def test_the_demo_runs_where_there_is_no_checkout(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "demo", "--quick"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = tmp_path / "demo" / "out" / "quick"
    assert "| cifd | cifd (3 RDM) | teacher |" in (out / "report.md").read_text()
    assert (out / "logs" / "cifd" / "student" / "open_clip_model.safetensors").is_file()


def test_a_folder_that_stands_in_the_way_is_named_and_scripts_do_not_meet_it(installed, tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "eval.benchmark", "--help"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{tmp_path}/training/__init__.py stands in the way" in done.stderr


def test_the_commit_of_a_repository_around_the_package_is_not_recorded_as_its_own(installed):
    user = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "of a user"]):
        subprocess.run([*user, *words], cwd=installed.parent, check=True)
    code = "from training.engine.environment import origin, versions; print(origin(), versions())"
    done = python(code, installed.parent, installed)
    assert "'commit': None" in done.stdout and "'cifd_clip': '0." in done.stdout, done.stderr
