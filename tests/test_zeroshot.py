"""Zero-shot evaluation beside the training: its figures, its place in time, what a stop leaves."""

import json
import subprocess
import sys
import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval import benchmark, datasets
from runs import ROOT, lines
from training.clip.flags import parse_args
from training.clip.zeroshot import ZeroShot
from training.engine.config import RunConfig
from training.engine.metrics import MetricWriter
from training.errors import UsageError
from training.main import main

SETS = ("digits", "digit_scenes")


@pytest.fixture(scope="module")
def zeroshot(scenes):
    root = ("--data-root", str(scenes / "benchmark"), "--zeroshot-datasets", *SETS)
    return [*root, "--zeroshot-samples", "30"]


@pytest.fixture(scope="module")
def run(flags, zeroshot, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    command = [*flags, *zeroshot, "--epochs", "2", "--name", "a", "--report-to", "tensorboard"]
    assert main([*command, "--logs", str(logs)]) == 0
    return logs / "a"


def test_a_run_logs_what_eval_benchmark_says_of_its_checkpoints(run, scenes, tmp_path):
    figures = {line["step"]: line for line in lines(run, "zeroshot")}
    assert list(figures) == [4, 8]
    for step, logged in figures.items():
        checkpoint, out = run / "checkpoints" / f"step_{step:08d}.pt", tmp_path / str(step)
        data = ["--data-root", str(scenes / "benchmark"), "--datasets", *SETS, "--samples", "30"]
        assert benchmark.main([str(checkpoint), *data, "--out", str(out), "--workers=0"]) == 0
        assert len(list(out.glob("*.json"))) == 2
        for path in out.glob("*.json"):
            result = json.loads(path.read_text())
            for name, value in result["metrics"].items():
                assert logged[f"{result['dataset']}/{name}"] == pytest.approx(value, abs=1e-6)
    assert (
        "zero-shot, step 8 | digit_scenes/image_retrieval_recall@1" in (run / "out.log").read_text()
    )
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("zeroshot/digits/acc1")] == [4, 8]
    assert not list((run / "zeroshot").glob("*.pt")), "what was evaluated is linked no longer"


def test_training_goes_on_while_a_checkpoint_is_evaluated(run):
    kinds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    order = [(line["kind"], line["step"]) for line in kinds]
    assert order.index(("train", 5)) < order.index(("zeroshot", 4))


def test_what_a_stop_leaves_is_evaluated_when_the_run_goes_on(run, flags, zeroshot, tmp_path):
    config = parse_args([*flags, *zeroshot, "--zeroshot-datasets", "digits"])
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    writer = MetricWriter(tmp_path, RunConfig())
    begun = ZeroShot(config, tmp_path, writer, 0, lambda step: step != 5)
    for step, name in ((4, "step_00000004.pt"), (5, "step_00000004.pt"), (8, "step_00000008.pt")):
        begun.saved(step, run / "checkpoints" / name)
    begun.close()
    links = {path.name for path in (tmp_path / "zeroshot").glob("*.pt")}
    assert links == {"step_00000004.pt", "step_00000008.pt"} and not lines(tmp_path, "zeroshot")
    resumed = ZeroShot(config, tmp_path, writer, 4, lambda step: False)
    resumed.wait(threading.Event().is_set)
    resumed.close()
    assert [line["step"] for line in lines(tmp_path, "zeroshot")] == [4], "step 8 is made again"
    assert lines(tmp_path, "zeroshot")[0]["digits/acc1"] == lines(run, "zeroshot")[0]["digits/acc1"]
    assert not list((tmp_path / "zeroshot").glob("*.pt"))


def test_a_data_root_that_cant_be_evaluated_ends_before_training(flags, zeroshot, tmp_path):
    command = [*flags, *zeroshot, "--logs", str(tmp_path)]
    with pytest.raises(UsageError, match=r"^--zeroshot-datasets 'digitz': .* mean digits\?$"):
        main([*command, "--zeroshot-datasets", "digits", "digitz"])
    with pytest.raises(UsageError, match=r"^flickr30k: no folder 'flickr30k/test'"):
        main([*command, "--zeroshot-datasets", "digits", "flickr30k"])
    with pytest.raises(UsageError, match=r"^--data-root '.*nowhere': no such folder"):
        main([*command, "--data-root", str(tmp_path / "nowhere")])
    with pytest.raises(UsageError, match="--zeroshot-frequency 3 evaluates checkpoints, and"):
        main([*command, "--zeroshot-frequency", "3", "--save-frequency", "2"])
    with pytest.raises(UsageError, match="--data-root DIR and --zeroshot-datasets NAME"):
        main([*flags, "--data-root", str(tmp_path)])
    assert not list(tmp_path.iterdir()), "no run directory was made"


@pytest.mark.parametrize("name", SETS)
def test_a_subset_is_the_same_each_time_and_another_data_set_than_the_whole(name, scenes):
    def opened(samples):
        return datasets.open_folder(scenes / "benchmark", name, "test", samples)

    whole, some, more = opened(None), opened(5), opened(10)
    keys = [sample.key for sample in some.samples]
    assert len(keys) == 5 and keys == [sample.key for sample in opened(5).samples]
    assert set(keys) < {sample.key for sample in more.samples} < {s.key for s in whole.samples}
    assert keys != [sample.key for sample in whole.samples[:5]]
    assert some.fingerprint == opened(5).fingerprint != more.fingerprint != whole.fingerprint
    assert type(opened(len(whole.samples))) is type(whole), "a large number is the whole set"


def test_a_dry_run_of_the_benchmark_needs_no_torch(scenes):
    code = (
        "import sys; from eval.benchmark import main; "
        f"code = main(['any', '--data-root', {str(scenes / 'benchmark')!r}, '--datasets', "
        "'digits', 'flickr30k', '--dry-run']); sys.exit(10 * ('torch' in sys.modules) + code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.startswith("digits: "), done.stderr
