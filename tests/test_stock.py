"""What ships needs nothing of this project: stock tools load it and agree with our figures."""

import json
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from eval.benchmark import main as benchmark
from training.main import main


@pytest.fixture(scope="module")
def stock_python(tmp_path_factory) -> str:
    """An environment with every dependency and without this project."""
    root = tmp_path_factory.mktemp("stock")
    venv.create(root, with_pip=False)
    python = root / "bin" / "python"
    show = [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    site = subprocess.run(show, capture_output=True, text=True, check=True).stdout.strip()
    # Links in a folder named by a .pth file are not followed: an editable install stays behind.
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return str(python)


def test_the_environment_of_the_judge_lacks_this_project(stock_python, tmp_path):
    code = "import importlib.util as u; print([u.find_spec(n) for n in ('cifd_clip', 'training')])"
    done = subprocess.run(
        [stock_python, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "[None, None]"


def test_stock_clip_benchmark_reports_what_we_report(
    stock_python, flags, teacher, scenes, tmp_path
):
    command = [*flags, "--distill", "clipkd", "--distill-model", teacher]
    assert main([*command, "--logs", str(tmp_path), "--name", "run"]) == 0
    run = tmp_path / "run"
    data = ["--data-root", str(scenes / "benchmark"), "--datasets", "digits", "digit_scenes"]
    assert benchmark([str(run), *data, "--workers", "0", "--device", "cpu"]) == 0
    ours = {}
    for path in (run / "results").glob("*.json"):
        result = json.loads(path.read_text())
        ours[result["dataset"].removeprefix("wds/")] = result["metrics"]
    tasks = {"digits": "zeroshot_classification", "digit_scenes": "zeroshot_retrieval"}
    for dataset, task in tasks.items():
        out = tmp_path / f"{dataset}.json"
        done = subprocess.run(
            [
                stock_python, "-m", "clip_benchmark.cli", "eval", "--output", str(out),
                "--model", f"local-dir:{run / 'student'}", "--pretrained", "", "--task", task,
                "--dataset", f"wds/{dataset}", "--recall_k", "1", "5", "10", "--no_amp",
                "--dataset_root", str(scenes / "benchmark" / dataset), "--num_workers", "0",
            ],
            capture_output=True, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        stock = json.loads(out.read_text())["metrics"]
        for name, value in stock.items():
            assert ours[dataset][name] == pytest.approx(value, abs=1e-4), f"{dataset} {name}"


def test_a_checkpoint_file_is_loaded_strictly_by_stock_open_clip(stock_python, flags, tmp_path):
    assert main([*flags, "--logs", str(tmp_path), "--name", "run"]) == 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("*.pt")
    config = flags[flags.index("--model-config") + 1]
    code = (
        "import open_clip; open_clip.add_model_config(%r); "
        "model = open_clip.create_model('tiny-student', pretrained=%r); print('loaded')"
    )
    done = subprocess.run(
        [stock_python, "-c", code % (str(Path(config).parent), str(checkpoint))],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.stdout.strip().endswith("loaded"), done.stderr[-2000:]
