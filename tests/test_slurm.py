"""Studies on a real SLURM, as shipped: arrays survive pre-emption, limits and dead nodes."""

import contextlib
import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.scenes import pairs, retrieval
from experiments.shards import describe, write_shards, write_split
from runs import CONFIGS, ROOT, assert_bit_equal, final, lines
from slurm_cluster import cluster, kill_node, why_not, without_controller
from training import cache_teacher
from training.engine.run import read_run
from training.main import main

PATIENCE = 900  # seconds for what takes a few on an idle machine


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment of a running SLURM; skips, with the reason, where there can't be one."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        Path(name).chmod(0o755)  # munged runs as a user of its own
        with cluster(Path(name)) as environment:
            yield {**environment, "PYTHON": sys.executable}  # of submit.sh


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """96 training scenes in four shards, and a small benchmark."""
    out = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    write_shards(out / "train", pairs("train", 96, rng), 24, "{:09}", "{:05}")
    write_split(out / "scenes", "test", retrieval("test", 12, rng), 250, "{:09}")
    describe(out / "scenes")
    return out


@pytest.fixture
def site(slurm, data, tmp_path) -> Path:
    """A cluster.env for the pretended cluster: a node for each task, no GPUs."""
    path = tmp_path / "cluster.env"
    path.write_text(
        "source slurm/cluster.env\n"
        "RANKS_PER_NODE=1 CPUS_PER_RANK=16 GRES= CACHE_PARTS=2\n"
        f"TRAIN_DATA={data}/train DATA_ROOT={data} DATASETS=scenes\n"
        f"TEACHER_CACHE={tmp_path}/cache LOGS={tmp_path}/logs PYTHON={sys.executable}\n"
        # what a real site would have in its environment anyway
        f"SLURM_CONF={slurm['SLURM_CONF']}\n"
    )
    return path


@pytest.fixture
def common(tmp_path) -> Path:
    """Flags of every run."""
    path = tmp_path / "common.args"
    path.write_text(
        f"--model-config {shlex.join(CONFIGS)} --model tiny-student --device cpu\n"
        "--global-batch 24 --epochs 30 --workers 0 --precision fp32\n"
        "--log-every-n-steps 1 --save-frequency 0\n"
    )
    return path


class Cluster:
    """What a test asks of SLURM."""

    def __init__(self, environment: dict[str, str]):
        self.environment = environment

    def __call__(self, *command: str | Path) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(map(str, command))}: {done.stderr}{done.stdout}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Fields of one job or array task."""
        text = self("scontrol", "show", "job", "--oneliner", number).splitlines()[0]
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def wait(self, numbers: list[str], logs: Path) -> dict[str, str]:
        """Final states of jobs or array tasks."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        until(lambda: {self.state(n) for n in numbers} <= over, lambda: self.story(logs), every=1)
        return {number: self.state(number) for number in numbers}

    def story(self, logs: Path) -> str:
        """What there is to know when something went wrong."""
        texts = [f"-- {p.name}\n{p.read_text()[-1500:]}" for p in sorted(logs.rglob("*.log"))]
        return "\n".join([self("squeue", "--states=all", "--format=%i %j %T %r"), *texts])


def until(condition, story=lambda: "", every: float = 0.02) -> None:
    """Poll; `every` counts in seconds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE} s\n{story()}"
        time.sleep(every)


def processes(run: Path) -> list[int]:
    """The training processes of a run, without the workers that they forked."""
    mine = f"--name\0{run.name}\0".encode(), f"--logs\0{run.parent}\0".encode()
    parents = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # gone
            command = path.read_bytes()
            if not command.startswith(b"srun") and all(words in command for words in mine):
                status = (path.parent / "status").read_text()
                parents[int(path.parent.name)] = int(re.search(r"PPid:\s*(\d+)", status)[1])
    return sorted(process for process, parent in parents.items() if parent not in parents)


def catch(run: Path, story) -> int:
    """Stop a run's (only) process in the middle, and hold it there: its number."""

    def in_the_middle() -> bool:
        metrics = run / "metrics.jsonl"
        return metrics.is_file() and len(metrics.read_text().splitlines()) > 4

    until(in_the_middle, story)
    process = json.loads((run / "lease.json").read_text())["pid"]
    os.kill(process, signal.SIGSTOP)
    assert not (run / "finished.json").exists(), f"{run} was too fast to be caught"
    return process


def let_go_when_signalled(process: int) -> None:
    """Let a held process go on when a signal waits for it (or SLURM has let it go)."""

    def pending() -> bool:
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:
            return True
        masks = re.findall(r"(?:SigPnd|ShdPnd):\s*(\w+)", status)
        return any(int(mask, 16) for mask in masks) or "(stopped)" not in status

    until(pending)
    os.kill(process, signal.SIGCONT)


def test_a_study_survives_signals_a_time_limit_and_a_dead_node(
    slurm, data, site, common, teacher, tmp_path
):
    ask = Cluster(slurm)
    grid, study = tmp_path / "chain.grid", tmp_path / "logs" / "chain"
    runs = {
        "bank": "--distill rdm --rates 300 30 --epochs 5",
        "diverges": "--distill none --lr 1e30 --warmup 1 --max-nonfinite-steps 2",
        "alone": "--distill none",
        "usr1": "--distill cifd --rates 300 30 --rdm-bank $LOGS/bank/bank",
        "term": "--distill clipkd",
        "node": "--distill fd --save-every-n-steps 2",
        "limit": "--distill none --seed 1",  # the last: the array's number is its job number too
    }
    with_teacher = {
        n: t if "none" in t else f"{t} --distill-model {teacher}" for n, t in runs.items()
    }
    grid.write_text("".join(f"--name {n} @{common} {t}\n" for n, t in with_teacher.items()))

    told = ask("slurm/submit.sh", "--cluster", site, grid)
    jobs = dict(re.findall(r"([a-z-]+) (\d+)", told.partition(":")[2]))
    task = {n: f"{jobs['distill']}_{i}" for i, n in enumerate(list(runs)[1:], 1)}

    def story() -> str:
        return ask.story(study)

    held = {name: catch(study / name, story) for name in ("usr1", "term", "node", "limit")}
    ask("scontrol", "update", f"JobId={task['limit']}", "EndTime=now+5")
    ask("scancel", "--batch", "--signal=USR1", task["usr1"])
    ask("scancel", "--signal=TERM", task["term"])
    lost = ask.job(task["node"])
    kill_node(lost["NodeList"], lost["JobId"])
    ask("scontrol", "update", f"NodeName={lost['NodeList']}", "State=down", "Reason=lost")
    for name in ("usr1", "term", "limit"):
        let_go_when_signalled(held[name])
    until(lambda: ask.job(task["limit"])["Restarts"] != "0", story, every=0.5)
    ask("scontrol", "update", f"JobId={task['limit']}", "TimeLimit=60")

    states = ask.wait([*task.values(), jobs["eval-teachers"], jobs["report"]], study)
    restarts = {name: int(ask.job(number)["Restarts"]) for name, number in task.items()}
    expected = {"alone": 0, "usr1": 1, "term": 1, "node": 1, "limit": 1, "diverges": 0}
    assert restarts == expected, story()
    ended = {name: states[number] for name, number in task.items()}
    assert ended.pop("diverges") == "FAILED", "divergence is final"
    assert set(ended.values()) == {"COMPLETED"}, story()
    logs = {
        n: (study / "slurm" / f"distill-{t.partition('_')[2]}.log").read_text()
        for n, t in task.items()
    }
    for name in ("usr1", "term", "node", "limit"):
        assert "restart 0" in logs[name] and "restart 1" in logs[name], "a log has every start"
        assert "resumed from" in logs[name], logs[name]

    # what a failed task leaves undone, and what it doesn't
    evaluations = [ask.state(f"{jobs['eval']}_{i}") for i in range(1, len(task) + 1)]
    assert evaluations == ["CANCELLED"] + ["COMPLETED"] * 5, story()
    assert states[jobs["report"]] == "FAILED"
    assert "not finished: " in (study / "slurm" / "report-1.log").read_text()
    with open(study / "report.csv") as table:
        reported = {row["model"] for row in csv.DictReader(table)}
    assert reported == {"alone", "usr1", "term", "node", "limit", "teacher"}

    # the same commands, undisturbed
    planned = {
        job: [
            shlex.split(line) for line in (study / "plan" / f"{job}.lines").read_text().splitlines()
        ]
        for job in ("cache", "rdm", "distill")
    }
    apart = str(tmp_path / "undisturbed")
    moved = [
        [word.replace(f"{tmp_path}/cache", f"{apart}/cache") for word in flags]
        for flags in planned["cache"]
    ]
    for flags in moved:
        assert cache_teacher.main(flags) == 0
    for flags in [*planned["rdm"], *planned["distill"][1:]]:
        words = [w.replace(f"{tmp_path}/cache", f"{apart}/cache") for w in flags]
        words = [w.replace(str(study), f"{apart}/logs") for w in words]
        assert main(words) == 0
    for name in ("bank", "alone", "usr1", "term", "node", "limit"):
        assert_bit_equal(final(study / name), final(Path(apart) / "logs" / name), name)
        losses, whole = (
            [row["loss"] for row in lines(where / name)] for where in (study, Path(apart) / "logs")
        )
        assert losses == whole, f"{name}: one curve, no gap, nothing twice"


def test_of_eight_tasks_on_one_host_each_ends_alone_and_a_killed_ranks_within_a_minute(
    slurm, data, site, common, tmp_path
):
    ask = Cluster({**slurm, "CLUSTER": str(site)})
    site.write_text(site.read_text() + "MAX_RESTARTS=0\n")
    logs, file = tmp_path / "logs", tmp_path / "eight.lines"
    flags = f"--train-data {data}/train @{common} --epochs 10 --save-every-n-steps 2 --logs {logs}"
    file.write_text("".join(f"--name r{i} --seed {i} {flags}\n" for i in range(1, 9)))

    def start(*options: str) -> str:
        out = f"--output={logs}/%a.log"
        script = ("slurm/distill.sbatch", file)
        return ask("sbatch", "--parsable", "--cpus-per-task=1", out, *options, *script).strip()

    logs.mkdir()
    number = start("--array=1-8", "--nodelist=n1", "--ntasks=2")
    tasks = [f"{number}_{i}" for i in range(1, 9)]

    def story() -> str:
        return ask.story(logs)

    until(lambda: {ask.state(t) for t in tasks} == {"RUNNING"}, story, every=0.5)
    victim = logs / "r3"
    until(lambda: (victim / "checkpoints" / "latest.json").exists(), story)
    os.kill(processes(victim)[-1], signal.SIGKILL)
    before = time.monotonic()
    ask("scancel", tasks[3])
    ask("scancel", "--batch", "--signal=USR1", tasks[4])
    ask.wait(tasks[2:3], logs)
    assert time.monotonic() - before < 60
    states = ask.wait(tasks, logs)
    # a rank killed; cancelled for good; stopped, with no restart left (MAX_RESTARTS)
    expected = ["COMPLETED"] * 2 + ["FAILED", "CANCELLED", "FAILED"] + ["COMPLETED"] * 3
    assert [states[t] for t in tasks] == expected, story()
    assert "MAX_RESTARTS" in (logs / "5.log").read_text()
    assert {ask.job(t)["NodeList"] for t in tasks} == {"n1"}
    assert {ask.job(t)["Restarts"] for t in tasks} == {"0"}, "a crash is not a pre-emption"
    ports = [re.search(r"port (\d+)", (logs / f"{i}.log").read_text())[1] for i in range(1, 9)]
    assert len(set(ports)) == 8

    # it goes on, and its ranks find each other on two nodes
    again = f"{start('--array=3', '--nodes=2', '--ntasks-per-node=1')}_3"
    assert ask.wait([again], logs) == {again: "COMPLETED"}, story()
    assert ask.job(again)["NumNodes"] == "2"
    assert "resumed from" in (logs / "3.log").read_text()
    assert [row["step"] for row in lines(victim)] == list(range(1, 41))


def test_a_failed_stage_cancels_what_waits_for_it_and_wrong_input_is_not_tried_again(
    slurm, site, common, teacher, tmp_path
):
    ask = Cluster(slurm)
    grid, study = tmp_path / "broken.grid", tmp_path / "logs" / "broken"
    grid.write_text(
        f"--name bank @{common} --distill rdm --distill-model {teacher} --train-data {tmp_path}\n"
        f"--name student @{common} --distill cifd --distill-model {teacher} --train-data {tmp_path}"
        " --rdm-bank $LOGS/bank/bank\n"
    )
    site.write_text(site.read_text() + "TEACHER_CACHE=\n")
    told = ask("slurm/submit.sh", "--cluster", site, grid)
    jobs = dict(re.findall(r"([a-z-]+) (\d+)", told.partition(":")[2]))
    states = ask.wait([jobs[n] for n in ("rdm", "distill", "eval", "report")], study)
    assert [states[jobs[n]] for n in ("rdm", "distill", "eval")] == ["FAILED", *["CANCELLED"] * 2]
    assert ask.job(jobs["rdm"])["ExitCode"] == "2:0" and ask.job(jobs["rdm"])["Restarts"] == "0"
    assert "error: --train-data" in (study / "slurm" / "rdm-1.log").read_text()


def test_a_task_outlives_its_machine_and_a_controller_that_is_down_when_it_stops(
    slurm, site, common, tmp_path
):
    ask = Cluster(slurm)
    grid, study = tmp_path / "alone.grid", tmp_path / "logs" / "alone"
    grid.write_text(f"--name a @{common}\n--name 'b c' @{common} --epochs 1\n")
    # a machine on which the first run of training fails with 76, when it is told to
    python, failing = tmp_path / "python", tmp_path / "failing"
    python.write_text(
        "#!/bin/bash\n"
        'if [[ "$*" == *"training.main "*"--name a "* && ! $SLURM_RESTART_COUNT -gt 0 ]]; then\n'
        f"    while [ ! -f {failing} ]; do sleep 0.1; done\n"
        "    exit 76\n"
        "fi\n"
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    site.write_text(site.read_text() + f"PYTHON={python} RETRY_SECONDS=1 MAX_RESTARTS=1\n")
    notes = ("--", "--wandb-notes", "two\nlines")
    told = ask("slurm/submit.sh", "--cluster", site, grid, *notes)
    jobs = dict(re.findall(r"([a-z-]+) (\d+)", told.partition(":")[2]))
    log = study / "slurm" / "distill-1.log"

    def story() -> str:
        return ask.story(study)

    until(lambda: log.is_file() and "restart 0" in log.read_text(), story)
    with without_controller(slurm):
        failing.touch()
        until(lambda: "squeue --noheader failed" in log.read_text(), log.read_text)
    tasks = [f"{jobs['distill']}_{i}" for i in (1, 2)]
    states = ask.wait([*tasks, jobs["report"]], study)
    assert set(states.values()) == {"COMPLETED"}, story()
    assert [ask.job(task)["Restarts"] for task in tasks] == ["1", "0"]
    assert "exit code 76, state RUNNING" in log.read_text()
    for run in ("a", "b c"):
        assert read_run(study / run)["wandb_notes"] == "two\nlines"
    with open(study / "report.csv") as table:
        assert {row["model"] for row in csv.DictReader(table)} == {"a", "b c"}


def test_four_tasks_tune_one_study_of_which_one_is_pre_empted(slurm, site, common, tmp_path):
    ask = Cluster(slurm)
    grid, logs = tmp_path / "tune" / "weights.grid", tmp_path / "logs" / "weights"
    grid.parent.mkdir()
    runs = f"-- --train-data $TRAIN_DATA @{common} --epochs 4 --val-fraction 0.3"
    size = "--trials 3 --seeds 2 --space lr=1e-4:1e-2"
    grid.write_text(f"--name study --methods none 'low=--distill none --lr 2e-4' {size} {runs}\n")
    told = ask("slurm/submit.sh", "--cluster", site, grid)
    (job,) = re.findall(r"tune (\d+)", told.partition(":")[2])
    study = logs / "study"

    def story() -> str:
        return ask.story(logs)

    # while a run is held in the middle, its task is told to stop
    held = catch(study / "runs" / "none-t00", story)
    environment = Path(f"/proc/{held}/environ").read_text().split("\0")
    (task,) = [w.partition("=")[2] for w in environment if w.startswith("SLURM_ARRAY_TASK_ID=")]
    ask("scancel", "--batch", "--signal=USR1", f"{job}_{task}")
    let_go_when_signalled(held)
    tasks = [f"{job}_{i}" for i in range(1, 5)]
    assert set(ask.wait(tasks, logs).values()) == {"COMPLETED"}, story()
    assert ask.job(f"{job}_{task}")["Restarts"] == "1", story()
    rows = {row["row"]: row for row in json.loads((study / "table.json").read_text())["rows"]}
    assert {name: len(row["trials"]) for name, row in rows.items()} == {"none": 3, "low": 0}
    for row in rows.values():
        assert list(row["scores"]) == ["1", "2"]


def test_classifiers_follow_their_teachers_and_a_failed_one_takes_only_its_own_along(
    slurm, site, tmp_path
):
    ask = Cluster(slurm)
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    for split, name, i in ((s, n, i) for s in ("train", "val") for n in "abc" for i in range(8)):
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / split / name / f"{name}_{i}.JPEG")
    grid, study = tmp_path / "classify" / "small.grid", tmp_path / "logs" / "small"
    grid.parent.mkdir()
    common = "--data $IMAGENET --dataset imagenet --global-batch 8 --workers 1 --epochs"
    runs = {
        "teacher": "20 --model resnet18 --final",
        "broken": "1 --model resnet18 --data nowhere",
        "bank": "1 --method rdm --teacher $LOGS/teacher --rates 10 100",
        "orphan": "1 --method kd --model resnet18 --teacher $LOGS/broken",
        "cifd": "1 --method cifd --model resnet18 --final --teacher $LOGS/teacher"
        " --rdm-bank $LOGS/bank",
    }
    grid.write_text("".join(f"--name {n} {common} {t}\n" for n, t in runs.items()))
    site.write_text(site.read_text() + f"IMAGENET={folder}\n")
    told = ask("slurm/submit.sh", "--cluster", site, grid, "--", "--lr", "0.001")
    jobs = dict(re.findall(r"([a-z]+(?:-[0-9])?) (\d+)", told.partition(":")[2]))

    def story() -> str:
        return ask.story(study)

    held = catch(study / "teacher", story)
    ask("scancel", "--batch", "--signal=USR1", f"{jobs['classify-1']}_1")
    let_go_when_signalled(held)
    tasks = {
        n: f"{jobs[f'classify-{level}']}_{i}"
        for n, level, i in (
            *(("teacher", 1, 1), ("broken", 1, 2)),
            *(("bank", 2, 1), ("orphan", 2, 2), ("cifd", 3, 1)),
        )
    }
    states = ask.wait([*tasks.values(), jobs["report"]], study)
    ended = {name: states[number] for name, number in tasks.items()}
    failed = {"broken": "FAILED", "orphan": "FAILED"}
    assert ended == dict.fromkeys(runs, "COMPLETED") | failed, story()
    assert ask.job(tasks["teacher"])["Restarts"] == "1", story()
    assert "resumed from" in (study / "slurm" / "classify-1-1.log").read_text()
    assert states[jobs["report"]] == "FAILED", "it names what is missing"
    with open(study / "report.csv") as table:
        assert {row["method"] for row in csv.DictReader(table)} == {"none", "cifd (2 RDM)"}
