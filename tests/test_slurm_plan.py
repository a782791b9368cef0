"""Grids and what becomes of them, without a SLURM."""

import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from eval import benchmark
from runs import CONFIGS, ROOT
from slurm import classifiers, clip, tuning
from slurm.clip import chain, preparation, read_grid
from slurm.jobs import Job, Site, running, sbatch, submit
from slurm.plan import GRIDS, describe, grid_path, main
from training import prefetch
from training.classifier.config import parse_args as parse_classifier
from training.clip.config import CacheConfig
from training.clip.flags import cache_config, parse_args, parse_cache
from training.engine.config import share_batch
from training.engine.flags import line_words
from training.errors import UsageError
from training.tuning.plan import parse as parse_tuning

MILLION = 1_000_000


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def site() -> Site:
    return Site.read(Path("slurm/cluster.env"))


def cache_args(task: list[str]) -> CacheConfig:
    """What `training.cache_teacher` makes of a task's flags."""
    return cache_config(parse_cache(task))


def test_table_4_is_three_students_under_five_methods_with_the_papers_settings(site):
    runs = read_grid(grid_path("table4"), site, [])
    students = [run.config for run in runs if run.config.distill != "rdm"]
    assert len({(a.model, a.distill) for a in students}) == len(students) == 15
    for args in students:
        assert args.epochs * args.train_num_samples == 96 * MILLION
        assert args.global_batch == (6000 if args.distill == "tinyclip" else 1024)
        assert (args.lr, args.warmup) == (1e-3, None), "warm-up is a sixth"
        options = args.options
        assert options.get("lambda_cl", 1.54e-4) == 1.54e-4, "see the recipe"
        if args.distill == "clipkd":
            published = (options["lambda_fd"], options["loss_reduction"])
            assert published == (2000, "mean")
    assert sum("lambda_cl" in args.options for args in students) >= 3, "CIFD's at least"
    (bank,) = (run for run in runs if run.config.distill == "rdm")
    assert bank.config.epochs * bank.config.train_num_samples == 21 * MILLION
    assert {run.config.rdm_bank for run in runs} - {""} == {str(bank.path / "bank")}
    weights = Counter(a.distill_pretrained for a in students)
    assert weights == {"datacomp_xl_s13b_b90k": 9, "datacomp_xl_s13b_b90k,openai": 3, "": 3}


def test_table_5_has_zero_one_and_three_rdms_and_the_search_four_weights(site):
    runs = [run.config for run in read_grid(grid_path("table5"), site, [])]
    rates = {a.name: a.rates for a in runs if a.distill == "cifd"}
    assert [len(r) for r in rates.values()] == [0, 1, 3]
    banks = {a.name: a.rates for a in runs if a.distill == "rdm"}
    assert [rates["cifd-1"], rates["cifd-3"]] == [banks["bank-1"], banks["bank-3"]]
    search = [r.config for r in read_grid(grid_path("lambda_i"), site, []) if r.config.val_data]
    assert len({a.options["lambda_i"] for a in search}) == 4 and {a.model for a in search} == {
        "RN50"
    }
    assert all(a.val_data != a.train_data for a in search)


@pytest.mark.parametrize("grid", sorted(path.stem for path in GRIDS.glob("*.grid")))
def test_every_grid_becomes_jobs_whose_evaluations_follow_their_students(grid, site):
    jobs = {job.name: job for job in chain(read_grid(grid_path(grid), site, []), site)}
    numbers = dict(zip(jobs, "123456"))
    names = [parse_args(task).name for task in jobs["distill"].tasks]
    assert [Path(task[0]).name for task in jobs["eval"].tasks] == names, "task by task"
    lines = sbatch(jobs["eval"], grid, Path("logs"), site, numbers)
    assert f"--dependency=aftercorr:{numbers['distill']}" in lines
    after = sbatch(jobs["distill"], grid, Path("logs"), site, numbers)
    assert f"--dependency=afterok:{numbers['cache']},afterok:{numbers['rdm']}" in after
    assert "--gres=gpu:4" in after and "--ntasks-per-node=4" in after
    for task in jobs["cache"].tasks:
        assert task[-2] == "--part" and cache_args(task).views == 2


def test_teachers_of_an_ensemble_have_a_cache_each_and_share_it_with_other_runs(site):
    jobs = {job.name: job for job in chain(read_grid(grid_path("table4"), site, []), site)}
    written = {cache_args(task).teacher_cache for task in jobs["cache"].tasks}
    one, two = "cache/ViT-L-14-datacomp_xl_s13b_b90k", "cache/ViT-L-14-quickgelu-openai"
    assert written == {one, two}
    read = {parse_args(task).teacher_cache for task in jobs["distill"].tasks}
    assert read == {"", one, f"{one},{two}"}
    live = chain(read_grid(grid_path("table4"), site, []), Site(site, TEACHER_CACHE=""))
    assert "cache" not in [job.name for job in live]


def test_with_a_cache_every_run_of_a_study_sees_the_same_views(site):
    for name in ("table4", "table5", "lambda_i"):
        jobs = chain(read_grid(grid_path(name), site, []), site)
        runs = [
            parse_args(task) for job in jobs if job.name in ("rdm", "distill") for task in job.tasks
        ]
        assert {(a.views, a.view_seed) for a in runs} == {(2, 0)}
        assert any(a.distill == "none" or a.val_data for a in runs) == (name != "table5")
    jobs = chain(read_grid(grid_path("table4"), site, []), Site(site, TEACHER_CACHE=""))
    live = [parse_args(task) for job in jobs if job.name == "distill" for task in job.tasks]
    assert {(a.views, a.view_seed) for a in live} == {(0, 0)}


def test_a_runs_own_views_win_and_its_cache_holds_them(site, tmp_path):
    teacher = "--distill fd --distill-model ViT-B-32 --distill-pretrained laion2b_s34b_b79k"
    grid = tmp_path / "x.grid"
    grid.write_text(
        f"--name a {teacher}\n--name b {teacher} --views 4 --seed 1\n--name c --views 3\n"
    )

    def views(*extra: str) -> dict[str, set[int]]:
        jobs = {job.name: job for job in chain(read_grid(grid, site, [*extra]), site)}
        parsed = [parse_args(task) for task in jobs["distill"].tasks]
        written = {cache_args(task).views for task in jobs["cache"].tasks}
        return {**{a.name: {a.views} for a in parsed}, "cache": written}

    assert views() == {"a": {2}, "b": {4}, "c": {3}, "cache": {4}}
    assert set().union(*views("--views", "5").values()) == {5}


def test_every_run_finds_its_own_captions_views_and_shards_in_its_cache(site, tmp_path):
    grid = tmp_path / "x.grid"
    teacher = "--distill fd --distill-model ViT-B-32 --distill-pretrained laion2b_s34b_b79k"
    differ = ["", "--captions all", "--view-seed 7", "--train-data $TRAIN_SUBSET", "--views 3"]
    differ += ["--aug-cfg scale=(0.4,1.0)", "--aug-cfg scale=(0.5,1.0)"]
    grid.write_text("".join(f"--name r{i} {teacher} {d}\n" for i, d in enumerate(differ)))
    jobs = {job.name: job for job in chain(read_grid(grid, site, []), site)}
    caches: dict[str, list] = {}
    for args in (cache_args(task) for task in jobs["cache"].tasks):
        caches.setdefault(args.teacher_cache, []).append(args)
    for args in (parse_args(task) for task in jobs["distill"].tasks):
        written = caches[args.teacher_cache]
        for a in written:
            assert (a.captions, a.view_seed) == (args.captions, args.view_seed), args.name
            assert a.aug_cfg == args.aug_cfg and a.views >= args.views, args.name
        assert sum(a.train_data == args.train_data for a in written) == 8, "all parts, once"
    assert len(caches) == 5, "shards and views can be more in one cache"


def test_runs_of_a_site_with_gpus_ask_for_one_unless_their_line_says_otherwise(site, tmp_path):
    grid = tmp_path / "x.grid"
    grid.write_text("--name a\n--name b --device cpu\n")

    def tasks(site: Site) -> list[list[str]]:
        return chain(read_grid(grid, site, []), site)[0].tasks

    assert [parse_args(task).device for task in tasks(site)] == ["cuda", "cpu"]
    assert all("--device" in task for task in tasks(site)), "a default may fall back to the CPU"
    assert "--device" not in tasks(Site(site, GRES=""))[0]


def test_a_bank_is_named_by_its_folder_or_by_its_run(site, tmp_path):
    grid = tmp_path / "x.grid"
    teacher = "--distill-model ViT-B-32 --distill-pretrained laion2b_s34b_b79k --rates 300"
    student = f"--distill cifd {teacher} --rdm-bank $LOGS/bank"
    grid.write_text(f"--name bank --distill rdm {teacher}\n--name a {student}\n")
    assert len(read_grid(grid, site, [])) == 2
    grid.write_text(f"--name bank --distill rdm {teacher}\n--name a {student}2\n")
    with pytest.raises(UsageError, match="bank2' of a neither exists nor is trained"):
        read_grid(grid, site, [])


def test_the_report_waits_for_no_results_of_teachers_where_there_are_none(site, tmp_path):
    grid = tmp_path / "x.grid"

    def page(*lines: str) -> list[str]:
        grid.write_text("".join(f"{line}\n" for line in lines))
        return chain(read_grid(grid, site, []), site)[-1].tasks[0]

    assert page("--name a") == ["logs/x/report.html", "logs/x/a"]
    taught = "--name b --distill fd --distill-model ViT-B-32-quickgelu --distill-pretrained openai"
    assert page("--name a", taught)[-2:] == ["logs/x/b", "logs/x/teachers"]


@pytest.mark.parametrize("grid", ["table5", "classify/table2"])
def test_logs_whose_path_slurm_would_read_as_a_pattern_are_refused(grid, tmp_path):
    env = tmp_path / "my.env"
    env.write_text(f"source slurm/cluster.env\nLOGS={tmp_path}/%j\n")
    with pytest.raises(UsageError, match=r"/%j/table\d' .* reads a % in the name of a log"):
        main(["--dry-run", "--cluster", str(env), grid])


def test_weights_are_fetched_to_where_the_jobs_look(site):
    runs = read_grid(grid_path("table5"), site, [])
    own = Site({name: value for name, value in site.items() if name != "HF_HOME"})
    assert preparation(runs, own).startswith("python -m training.prefetch ViT-B-16:")
    moved = preparation(runs, Site(site, HF_HOME="/a b"))
    assert moved == f"HF_HOME='/a b' {preparation(runs, own)}"


def test_models_of_ones_own_are_known_to_prefetch_and_the_teachers_evaluation(site, tmp_path):
    grid = tmp_path / "x.grid"
    line = "--name {} --model tiny-student --model-config {} --distill fd --distill-model {}\n"
    grid.write_text(
        line.format("a", shlex.join(CONFIGS), "tiny-teacher --distill-pretrained README.md")
        + line.format("b", CONFIGS[0], "local-dir:x")
    )
    runs = read_grid(grid, site, [])
    jobs = {job.name: job for job in chain(runs, site)}
    for task in jobs["eval-teachers"].tasks:
        assert list(benchmark.parse(task).model_config) == CONFIGS
    fetch = preparation(runs, site).splitlines()[0].partition("training.prefetch ")[2]
    fetched = prefetch._parser().parse_args(shlex.split(fetch))
    assert fetched.model_config == CONFIGS and "tiny-teacher:README.md" in fetched.models


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("table2", [("wrn_40_2", "wrn_40_1"), ("resnet32x4", "resnet8x4")]),
        ("table3", [("resnet34", "resnet18"), ("resnet50", "mobilenetv1_100")]),
        ("table7", [(f"resnet{n}", "resnet18") for n in (50, 101, 152)]),
    ],
)
def test_classifiers_come_after_their_teachers_and_rdms(name, pairs, site):
    runs = classifiers.read_grid(grid_path(f"classify/{name}"), site, [])
    cifd = [run.config for run in runs if run.config.method == "cifd"]
    taught = [(Path(a.teacher.partition(":")[0]).name, a.model) for a in cifd]
    assert taught == pairs and all(a.ibm and a.rdm_bank for a in cifd)
    job_of = {
        Path(flags[flags.index("--name") + 1]).name: number
        for number, job in enumerate(classifiers.chain(runs, site)[:-1])
        for flags in job.tasks
    }
    for run in runs:
        assert run.config.device == "cuda" and (
            run.config.final or run.config.method in ("rdm", "paraphraser")
        )
        for place in classifiers.needs(run):
            assert job_of.get(place.name, -1) < job_of[run.config.name], "what it reads is there"
    whole = sbatch(classifiers.chain(runs, site)[1], name, Path("logs"), site, {"classify-1": "7"})
    assert "slurm/classify.sbatch" in whole and "--dependency=afterany:7" in whole
    share = site.number("RANKS_PER_NODE") if runs[0].config.dataset == "imagenet" else 1
    assert f"--gres=gpu:{share}" in whole and f"--ntasks-per-node={share}" in whole


def test_the_tasks_of_a_tuning_study_share_it(site):
    runs = tuning.read_grid(grid_path("tune/weights"), site, ["--lr", "1e-4"])
    (study,), (job,) = [run.config for run in runs], tuning.chain(runs, site)
    assert job.script == "slurm/tune.sbatch" and (job.nodes, job.ranks) == (1, 1)
    assert len(job.tasks) == site.number("TUNE_TASKS") and len(set(map(tuple, job.tasks))) == 1
    assert parse_tuning(job.tasks[0]).settings == study.settings
    assert "1e-4" in study.flags, "extra flags are of every run"
    assert [row.name for row in study.rows][-3:] == ["clipkd", "clipkd-published", "cifd"]
    assert [row.name for row in study.rows if not row.weights] == [
        "none",
        "fd",
        "kd",
        "tinyclip",
        "clipkd-published",
    ]


def test_classifiers_on_imagenet_whose_batch_the_processes_cannot_share_are_refused(site, tmp_path):
    grid = tmp_path / "classify" / "x.grid"
    grid.parent.mkdir()
    line = "--data d --model resnet18 --global-batch 1022"
    grid.write_text(f"{line}\n")
    assert classifiers.read_grid(grid, site, []), "on CIFAR-100 a run has one process"
    grid.write_text(f"{line} --dataset imagenet\n")
    with pytest.raises(UsageError, match=r"x.grid:1: .* can't be shared by 4 processes"):
        classifiers.read_grid(grid, site, [])


def test_a_classifier_whose_teacher_nobody_trains_is_refused(site, tmp_path):
    grid = tmp_path / "classify" / "x.grid"
    grid.parent.mkdir()
    grid.write_text("--data d --method kd --model cnn2 --teacher $LOGS/nobody\n")
    with pytest.raises(UsageError, match=r"x.grid:1: '.*nobody' neither exists nor is trained"):
        classifiers.read_grid(grid, site, [])


def test_weights_that_are_missing_are_named_by_a_dry_run_and_refused_by_a_submission(
    tmp_path, capsys
):
    env = tmp_path / "my.env"
    env.write_text(f"source slurm/cluster.env\nLOGS={tmp_path}/logs\nWEIGHTS={tmp_path}\n")
    (tmp_path / "resnet50.pth").touch()
    command = ["--cluster", str(env), "classify/table3"]
    main(["--dry-run", *command])
    there, lacking = capsys.readouterr().out.partition("before: ")[2].split("; not there yet: ")
    weights = f"{tmp_path}/resnet34.pth, {tmp_path}/resnet50.pth"
    assert there == f"imagenet's images in imagenet; its teachers {weights}"
    assert lacking.startswith(f"{tmp_path}/resnet34.pth (https://")
    assert "/resnet34-b627a593.pth)" in lacking and "resnet50" not in lacking
    with pytest.raises(UsageError, match=r"not there yet: .*resnet34\.pth \(https"):
        main(command)
    assert not (tmp_path / "logs").exists()


def test_the_weights_of_a_clip_teacher_may_come_later_but_not_after_submission(tmp_path, capsys):
    env, grid = tmp_path / "my.env", tmp_path / "x.grid"
    env.write_text(f"source slurm/cluster.env\nLOGS={tmp_path}/logs\n")
    grid.write_text(
        f"--name a --distill fd --distill-model ViT-B-32 --distill-pretrained {tmp_path}/b32.pt\n"
        f"--name b --distill fd --distill-model local-dir:{tmp_path}/teacher\n"
    )
    command = ["--cluster", str(env), str(grid)]
    main(["--dry-run", *command])
    lacking = f"{tmp_path}/b32.pt, {tmp_path}/teacher/open_clip_config.json"
    assert f"not there yet: {lacking}\n" in capsys.readouterr().out
    with pytest.raises(UsageError, match=f"not there yet: {lacking}"):
        main(command)
    assert not (tmp_path / "logs").exists()


def test_a_machine_without_slurm_is_named_before_anything_is_written(site, tmp_path, monkeypatch):
    grid = tmp_path / "classify" / "x.grid"
    grid.parent.mkdir()
    grid.write_text("--data d --model cnn2\n")
    bare = Site(site, PATH=str(tmp_path), LOGS=str(tmp_path / "logs"))
    monkeypatch.setattr(Site, "read", lambda path: bare)
    with pytest.raises(UsageError, match="squeue is not here: submit from a login node of SLURM"):
        main([str(grid)])
    assert not (tmp_path / "logs").exists()


def test_the_jobs_of_a_study_with_a_longer_name_are_not_taken_for_ones_own(site, tmp_path):
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 77 table4-seed1-distill\necho 78 table4-distill\n")
    squeue.chmod(0o755)
    site["PATH"] = f"{tmp_path}:{site['PATH']}"
    assert running([Job("distill", []), Job("report", [])], "table4", site) == ["78"]


def test_any_number_of_processes_that_divides_it_makes_up_the_global_batch():
    given = {"global_batch": 1024}
    assert [share_batch(given, 64, n)["batch_size"] for n in (1, 4, 16)] == [1024, 256, 64]
    with pytest.raises(UsageError, match="--global-batch 1024 can't be shared by 3 processes"):
        share_batch(given, 64, 3)


def test_the_recipes_of_classifiers_mean_what_they_meant_under_the_former_flags():
    """The batch of all processes, and 0.01 for the densities, whatever --lr."""

    def recipe(name: str, flags: str):
        return parse_classifier([f"@slurm/recipes/classify/{name}.args", *flags.split()])

    bank, teacher = "--data d --teacher t", "--data d --model resnet18"
    student = f"{teacher} --teacher t --rdm-bank b"
    read = {
        name: recipe(name, flags)
        for name, flags in {
            **{"cifar100_teacher": teacher, "cifar100_rdm": bank, "cifar100_cifd": student},
            **{"imagenet_student": teacher, "imagenet_rdm": bank, "imagenet_cifd": student},
        }.items()
    }
    batches = {name: config.global_batch for name, config in read.items()}
    assert batches == {
        **{"cifar100_teacher": 64, "cifar100_rdm": 128, "cifar100_cifd": 64},
        **{"imagenet_student": 4096, "imagenet_rdm": 1024, "imagenet_cifd": 4096},
    }
    for name in ("cifar100_rdm", "cifar100_cifd", "imagenet_rdm", "imagenet_cifd"):
        config = read[name]
        assert config.lr * config.density_lr == pytest.approx(0.01, rel=1e-12), name
    schedules = {(config.dataset, config.lr_scheduler) for config in read.values()}
    assert {("cifar100", "multistep"), ("imagenet", "linear")} < schedules
    assert read["imagenet_cifd"].precision == "amp_bf16"


@pytest.mark.parametrize(
    ("former", "successor"),
    [("--lr-schedule linear", "--lr-scheduler"), ("--precision bf16", "amp_bf16")],
)
def test_a_former_flag_of_classifiers_ends_in_a_sentence_that_names_its_successor(
    former, successor
):
    with pytest.raises(UsageError, match=rf"{former.split()[0]}\b.*{successor}"):
        parse_classifier(["--data", "d", "--model", "cnn2", *former.split()])


WRONG = {
    "--distil none": "unrecognized",
    "--distill none\n--distill none": "a second run 'none-RN50-seed0'",
    "--distill cifd --distill-model local-dir:x --rdm-bank $LOGS/b": "neither exists nor",
    "--distill none --train-data $NOWHERE": "unknown variable 'NOWHERE'",
    "--global-batch 1022": "can't be shared by 4 processes",
    "# nothing": "has no runs",
    "@nowhere.args": "no such flag file",
    "--name 'a": "No closing quotation",
    "--model ViT-S16": "wrong.grid:1: --model 'ViT-S16' is no OpenCLIP .* mean ViT-S-16",
    "--pretrained openia": "--pretrained 'openia' is neither a file nor a tag of RN50",
    "--pretrained openai": "--pretrained 'openai' of RN50 was trained with QuickGELU",
    "--distill fd --distill-model ViT-L14 --distill-pretrained x": "--distill-model 'ViT-L14'",
    "--distill fd --distill-model ViT-L-14 --distill-pretrained datacomp_xl": "a tag of ViT-L-14",
    "--model RN51 --pretrained not/there.pt": "--model 'RN51' is no OpenCLIP model",
    "--model-config ruff.toml": "--model-config: ruff.toml can't be read",
    f"--model-config {CONFIGS[0]}\n--name b --model tiny-student": "wrong.grid:2: .* this line too",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_line_is_refused_before_anything_is_submitted(text, site, tmp_path):
    grid = tmp_path / "wrong.grid"
    grid.write_text(text + "\n")
    with pytest.raises(UsageError, match=WRONG[text]) as raised:
        read_grid(grid, site, [])
    assert str(grid) in str(raised.value)


def test_wrong_studies_and_settings_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"one of .*classify/table2, .*table4, table5"):
        main(["--dry-run", "table9"])
    with pytest.raises(UsageError, match="no such file"):
        main(["--cluster", str(tmp_path / "x.env"), "table4"])
    wrong = tmp_path / "wrong.env"
    wrong.write_text("source slurm/cluster.env\nNODES=two\n")
    with pytest.raises(UsageError, match="NODES='two'"):
        main(["--cluster", str(wrong), "table4"])


def test_a_variable_that_a_cluster_file_lacks_is_named_with_the_file(tmp_path):
    own = tmp_path / "own.env"
    own.write_text("MAX_RESTARTS=1 PYTHON=python TRAIN_DATA=x\n")
    with pytest.raises(UsageError, match=r"unknown variable 'LOGS': .*/own\.env does not set it"):
        main(["--dry-run", "--cluster", str(own), "table4"])
    own.write_text("source slurm/cluster.env\nunset MAX_RESTARTS\n")
    with pytest.raises(UsageError, match="unknown variable 'MAX_RESTARTS'"):
        main(["--dry-run", "--cluster", str(own), "table4"])


def test_a_dry_run_says_what_a_study_would_take_and_submits_nothing(tmp_path):
    grid, env = tmp_path / "small.grid", tmp_path / "my.env"
    env.write_text(f"source slurm/cluster.env\nLOGS={tmp_path}/logs\nTEACHER_CACHE={tmp_path}/c\n")
    teacher = "--distill-model ViT-B-32-quickgelu --distill-pretrained openai --global-batch 64"
    grid.write_text(
        f"--name bank --distill rdm {teacher} --rates 300\n"
        f"--name a --distill cifd {teacher} --rates 300 --rdm-bank $LOGS/bank/bank\n"
    )
    command = ["slurm/submit.sh", "--dry-run", "--cluster", env, grid]
    command += ["--", "--epochs", "20", "--model", "ViT-S-32-alt", "--train-num-samples", "2000000"]
    # an activated environment is what runs it
    environment = {k: v for k, v in os.environ.items() if k != "PYTHON"}
    environment["VIRTUAL_ENV"] = sys.prefix
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    hours = {job: float(rows[job][6]) for job in ("cache", "rdm", "distill")}
    assert hours["distill"] > 0.1 and hours["cache"] > 0.1 and hours["rdm"] < hours["distill"]
    assert rows["cache"][1] == "8" and rows["distill"][2:6] == ["4", "GPUs,", "1", "node"]
    assert "training.prefetch ViT-B-32-quickgelu:openai ViT-S-32-alt" in done.stdout
    assert "imagenet1k" in done.stdout, "suites are spelled out"
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    "line",
    [
        "--name a#seed0 --lr 1 # and why",
        "--name 'a # b' '#c' \\#d # it's",
        "--notes '' #",
        "#--name a",
        "a # b#c",
        "",
    ],
)
def test_a_line_has_the_words_that_a_shell_reads(line):
    shell = ["bash", "-c", f'printf "%s\\0" {line}\n']
    done = subprocess.run(shell, capture_output=True, text=True, check=True)
    words = done.stdout.split("\0")[:-1]
    assert line_words(line) == (words if line.partition("#")[0] else [])


def test_a_number_sign_within_a_word_belongs_to_it_in_grids_and_in_recipes(site, tmp_path):
    grid, recipe = tmp_path / "x.grid", tmp_path / "x.args"
    grid.write_text(f"--name a#seed0 @{recipe} # the first\n")
    recipe.write_text("--wandb-notes b#c # of all\n")
    (run,) = read_grid(grid, site, [])
    assert (run.config.name, run.config.wandb_notes) == ("a#seed0", "b#c")


@pytest.mark.parametrize("kind", ["clip", "classify"])
def test_a_recipe_edited_after_submission_changes_no_task(kind, site, tmp_path):
    grid, recipe, inner = (tmp_path / kind / name for name in ("x.grid", "a.args", "b.args"))
    grid.parent.mkdir()
    recipe.write_text(f"--epochs 3  # of which --warmup-epochs\n@{inner}\n--seed 2\n")
    inner.write_text("--name 'a b' --seed 1\n")
    study, line = clip, "--model RN50"
    if kind == "classify":
        study, line = classifiers, "--data d --model cnn2"
    grid.write_text(f"{line} @{recipe} --epochs 4\n")
    (run,) = study.read_grid(grid, site, [f"@{inner}"])
    assert (run.config.name, run.config.epochs, run.config.seed) == ("a b", 4, 1), "later flags win"
    recipe.unlink()
    inner.unlink()
    tasks = [task for job in study.chain([run], site) for task in job.tasks]
    assert not any(word.startswith("@") for task in tasks for word in task)


def test_what_a_dry_run_cannot_estimate_it_explains(site, tmp_path):
    grid = tmp_path / "x.grid"
    grid.write_text("--name counted --train-num-samples 10\n--name uncounted\n")
    runs = read_grid(grid, site, [])
    told = describe(clip, chain(runs, site), runs, site)
    assert "\n? of distill: uncounted: --train-num-samples is missing" in told
    assert "\n? of eval, report: only caches and training are estimated\n" in told


COMMON = (ROOT / "slurm" / "common.sh").read_text()


def common(script: str, *names: str, folder: Path, **variables: str) -> list[str]:
    """What a script prints that uses functions of common.sh, line by line."""
    functions = [COMMON[start : COMMON.index("\n}\n", start) + 3] for start in map(start_of, names)]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "".join([*functions, script])],
        env={**os.environ, **variables}, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def start_of(name: str) -> int:
    return COMMON.index(f"\n{name}() {{")


class Submission:
    """A study whose lines are written by `submit`, to a SLURM whose sbatch says yes."""

    def __init__(self, site: Site, folder: Path):
        (folder / "bin").mkdir()
        (folder / "bin" / "sbatch").write_text("#!/bin/sh\necho 1\n")
        (folder / "bin" / "sbatch").chmod(0o755)
        self.site = Site(site, PATH=f"{folder / 'bin'}:{os.environ['PATH']}")
        self.logs = folder / "logs"

    def lines(self, tasks: list[list[str]]) -> Path:
        submit([Job("distill", tasks)], "study", self.logs, self.site)
        return self.logs / "plan" / "distill.lines"


def test_a_tasks_line_reaches_its_command_unchanged(site, tmp_path):
    words = [
        "--train-data",
        "a b/{0..3}.tar",
        "--wandb-notes",
        "it's $HOME; *",
        "two\n\n'lines'\n",
        "",
    ]
    lines = Submission(site, tmp_path).lines([["before\nit"], words, ["after"]])
    assert len(lines.read_text().splitlines()) == 3
    for number, task in enumerate((["before\nit"], words, ["after"]), 1):
        script = 'arguments "$FILE"; printf "%s@\\n" "${arguments[@]}"'
        variables = {"FILE": str(lines), "SLURM_ARRAY_TASK_ID": str(number)}
        printed = common(script, "arguments", folder=tmp_path, **variables)
        assert printed == "".join(f"{word}@\n" for word in task).split("\n")[:-1]


def test_lines_that_may_hold_a_password_are_for_their_user_alone(site, tmp_path):
    lines = Submission(site, tmp_path).lines([["--train-data", "pipe:curl -H 'Authorization: x'"]])
    assert lines.stat().st_mode & 0o777 == 0o600


def test_restarts_count_from_the_newest_checkpoint(tmp_path):
    run, lines = tmp_path / "logs" / "a", tmp_path / "distill.lines"
    lines.write_text("--name a --logs logs\n--train-data d\n")
    newest = run / "checkpoints" / "latest.json"
    newest.parent.mkdir(parents=True)

    def in_vain(restarts: int, line: int = 1) -> int:
        variables = {"SLURM_RESTART_COUNT": str(restarts), "SLURM_ARRAY_TASK_ID": str(line)}
        script = "TASK=7_1; arguments distill.lines; restarts_in_vain"
        told = common(script, "arguments", "restarts_in_vain", folder=tmp_path, **variables)
        return int(told[0])

    assert [in_vain(n) for n in range(3)] == [0, 1, 2]
    newest.write_text("step 5")
    assert [in_vain(n) for n in (3, 4)] == [0, 1]
    newest.write_text("step 9")
    assert [in_vain(n) for n in (5, 7)] == [0, 2], "a dead node's restarts count too"
    assert [in_vain(n, line=2) for n in (0, 3)] == [0, 3], "what saves no checkpoint: all of them"


def test_a_controller_that_is_down_is_asked_again(tmp_path):
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho x >>tries\n[ $(wc -l <tries) -gt 2 ] && echo RUNNING None\n")
    squeue.chmod(0o755)
    script = "TASK=7; patiently ./squeue"
    told = common(script, "say", "patiently", folder=tmp_path, RETRY_SECONDS="0")
    assert told == ["RUNNING None"] and len((tmp_path / "tries").read_text()) == 6
    squeue.write_text("#!/bin/sh\nexit 1\n")
    script = "TASK=7; patiently ./squeue || echo gave up"
    told = common(script, "say", "patiently", folder=tmp_path, RETRY_SECONDS="0")
    assert told == ["gave up"]
