"""Studies of CLIP students: grids whose lines are flags of `training.main`.

    cache  ->  rdm  ->  distill (array)  ->  eval (array, task by task)  ->  report

Lines with ``--distill rdm`` are stage 1 and come first.
"""

import re
import shlex
from pathlib import Path

from eval import cost as estimate
from slurm.jobs import Job, Line, Site, read_lines
from training.clip.config import OWN_WEIGHTS, Config, modality_of
from training.clip.flags import parse, resolve
from training.clip.models import add_model_configs, check_model
from training.errors import UsageError


def read_grid(path: Path, site: Site, extra: list[str]) -> list[Line]:
    """The runs of a grid file; `extra` flags win over every line's.

    Raises:
        UsageError: a line is no valid command line or names what OpenCLIP lacks, or the lines
            contradict each other. Files of weights may be `missing`.
    """
    logs = str(site.logs(path))
    # with the flag, a node whose GPU can't be seen refuses, instead of training on its CPU
    device = ["--device", "cuda"] if site["GRES"] else []
    known: dict[str, str] = {}  # the --model-config of every line, by the name it gives

    def read(line: list[str]) -> Line:
        flags = [
            *(*device, "--train-data", site["TRAIN_DATA"], *line, "--logs", logs),
            *("--wandb-project-name", path.stem),  # a W&B run is called by the run's name
        ]
        run = understood(flags, site)
        check_models(run.config, known)
        return run

    runs = read_lines(path, site, read, extra)
    trained = [run.path for run in runs if run.config.distill == "rdm"]
    banks = {*trained, *(run / "bank" for run in trained)}
    for run in runs:
        for bank in run.config.banks:
            if bank not in banks and not bank.is_dir():
                raise UsageError(
                    f"{path}: --rdm-bank '{bank}' of {run.config.name} neither exists nor is "
                    "trained by a line with --distill rdm"
                )
    return runs


def understood(flags: list[str], site: Site) -> Line:
    """A run, as the site's processes understand its flags."""
    return Line(flags, resolve(parse(flags), site.ranks, device_type="cuda"))


def check_models(config: Config, known: dict[str, str]) -> None:
    """Refuse models and tags of weights that are not OpenCLIP's, as a task would, but at once.

    `known` are the model configs of the lines before, by the name they give; this line's are added.
    """
    add_model_configs(config.model_config)
    own = {Path(file).stem: file for file in config.model_config}
    for name, file in own.items():
        if known.setdefault(name, file) != file:
            raise UsageError(
                f"--model-config '{file}': an earlier line's '{name}' is {known[name]}; give the "
                "file another name"
            )
    for model, name, weights, tag in models(config):
        if name in known and name not in own:
            raise UsageError(
                f"{model} '{name}' is an earlier line's --model-config {known[name]}: give it to "
                "this line too"
            )
        file, modality = weights_file(name, tag), modality_of(name)
        known_here = file.is_file() if file else modality
        if (modality or name.startswith(OWN_WEIGHTS)) and not known_here:
            continue  # `missing`, or only the hub knows
        quick = config.force_quick_gelu and model == "--model"
        check_model(name, tag if modality or not file else None, model, weights, quick)


def models(config: Config) -> list[tuple[str, str, str, str | None]]:
    """(flag, model, flag, its weights) of a run's student and teachers."""
    student = ("--model", config.model, "--pretrained", config.pretrained or None)
    flags = "--distill-model", "--distill-pretrained"
    return [student, *((flags[0], name, flags[1], tag) for name, tag in config.teachers)]


def weights_file(name: str, weights: str | None) -> Path | None:
    """The file that a model comes from, if one; a tag has neither folder nor suffix."""
    for kind, file in (("local-dir:", "open_clip_config.json"), ("hf-text:", "config.json")):
        if name.startswith(kind):
            return Path(name.removeprefix(kind)) / file
    if not weights or not ("/" in weights or Path(weights).suffix or Path(weights).is_file()):
        return None
    return Path(weights)


def with_caches(runs: list[Line], site: Site) -> tuple[list[Line], list[list[str]]]:
    """Runs that read their teachers' caches, and the command lines that write these, by part.

    Under ``TEACHER_CACHE``, where that is set. All runs then see the same ``VIEWS`` of an image,
    also those without a teacher, and those that validate, whose held-out images need the live one.
    A run's own flags win.
    """
    if not site.get("TEACHER_CACHE"):
        return runs, []
    parts = site.number("CACHE_PARTS")
    reading, writers, most = [], {}, {}
    data: dict[str, dict[str, None]] = {}  # a cache grows by the shards of each --train-data
    for run in runs:
        views = run.config.views or site.number("VIEWS")
        # caches are the site's: their views hang on no run's --seed
        flags = ["--view-seed", "0", *run.flags, "--views", str(views)]
        run = understood(flags, site)
        config = run.config
        if config.teacher_cache or config.val_data or config.distill == "none":
            reading.append(run)
            continue
        folders = []
        for name, weights in config.teachers:
            folder = str(Path(site["TEACHER_CACHE"]) / cache_name(name, weights, config))
            folders.append(folder)
            model = ["--distill-model", name, "--distill-pretrained", weights or ""]
            writers.setdefault(folder, [*flags, *model, "--teacher-cache", folder])
            most[folder] = max(views, most.get(folder, 0))
            data.setdefault(folder, {})[config.train_data] = None
        flags += ["--teacher-cache", ",".join(folders)]
        reading.append(understood(flags, site))
    shares = [f"{i}/{parts}" for i in range(1, parts + 1)]
    written = [
        [*flags, "--train-data", shards, "--views", str(most[folder])]
        for folder, flags in writers.items()
        for shards in data[folder]
    ]
    return reading, [[*flags, "--part", share] for flags in written for share in shares]


def cache_name(name: str, weights: str | None, config: Config) -> str:
    """The folder of a teacher's cache, another one for each of what a run refuses a cache for."""
    usual = {"captions": "first", "aug_cfg": {}, "view_seed": 0, "image_backend": "pil"}
    chosen = {flag: getattr(config, flag) for flag in usual}
    other = (f"{flag}-{value}" for flag, value in chosen.items() if value != usual[flag])
    text = "-".join([name.removeprefix("local-dir:"), *filter(None, [weights]), *other])
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-")


def teachers(runs: list[Line]) -> list[str]:
    """The distinct teachers as `eval.benchmark` names models."""
    pairs = (teacher for run in runs for teacher in run.config.teachers)
    return list(dict.fromkeys(f"{name}:{weights}" if weights else name for name, weights in pairs))


def configs(runs: list[Line]) -> list[str]:
    """The flag that lets another program know the models that OpenCLIP lacks, if there are any."""
    files = dict.fromkeys(file for run in runs for file in run.config.model_config)
    return ["--model-config", *files] if files else []


def chain(runs: list[Line], site: Site) -> list[Job]:
    """The jobs of a study, each after those it waits for."""
    runs, caches = with_caches(runs, site)
    banks = [run for run in runs if run.config.distill == "rdm"]
    students = [run for run in runs if run.config.distill != "rdm"]
    logs = Path(runs[0].config.logs)
    evaluation = ["--data-root", site["DATA_ROOT"], "--datasets", *shlex.split(site["DATASETS"])]
    results, names = str(logs / "teachers"), teachers(runs)
    page = [str(logs / "report.html"), *(str(run.path) for run in runs)]
    shape = {"nodes": site.number("NODES"), "ranks": site.number("RANKS_PER_NODE")}
    ready, evaluated = (("afterok", "cache"), ("afterok", "rdm")), (("aftercorr", "distill"),)
    ended = tuple(("afterany", name) for name in ("eval", "eval-teachers", "rdm"))
    jobs = [
        Job("cache", caches),
        Job("rdm", [run.flags for run in banks], **shape, after=ready[:1]),
        Job("distill", [run.flags for run in students], **shape, after=ready),
        Job("eval", [[str(run.path), *evaluation] for run in students], after=evaluated),
        Job("eval-teachers", [[t, *evaluation, "--out", results, *configs(runs)] for t in names]),
        # Whatever became of them: the page of fourteen runs should not wait for a fifteenth that
        # diverged. The job names those that are missing.
        Job("report", [[*page, results] if names else page], gpus=False, after=ended),
    ]
    if not students:
        jobs = jobs[:2]
    return [job for job in jobs if job.tasks]


def cost(job: Job, site: Site) -> tuple[float, float] | str:
    """GPU hours and bytes of a job's training; or why there is no telling."""
    stage = {"cache": "cache", "rdm": "rdm", "distill": "student"}.get(job.name)
    if stage is None:
        return "only caches and training are estimated"
    hours = disk = 0.0
    for task in job.tasks:
        parts = site.number("CACHE_PARTS") if stage == "cache" else 1
        options = ["--gpus", str(site.ranks)]
        if stage == "cache":  # its tasks read every shard, whatever an epoch is
            task = task[: task.index("--part")]
            if parse(task)["train_data"] == site["TRAIN_DATA"]:
                options += ["--dataset-samples", site["TRAIN_SAMPLES"]]
        try:
            counted = estimate.summary(estimate.parse([*task, *options]))
        except UsageError as error:  # no --train-num-samples: the shards are not counted here
            return f"{parse(task)['name']}: {error}"
        for name in (stage, "rdm") if stage == "student" else (stage,):
            hours += counted["hours"].get(name, 0) / parts
            disk += counted["disk_bytes"].get(name, 0) / parts
    return hours, disk


def preparation(runs: list[Line], site: Site) -> str:
    """The command that fetches what the study needs, on a machine with a network."""
    from eval import datasets  # takes seconds to import

    named = [*teachers(runs), *(r.config.model for r in runs if r.config.distill != "rdm")]
    sets = datasets.names(shlex.split(site["DATASETS"]))
    fetch = ["python", "-m", "training.prefetch", *dict.fromkeys(named)]
    fetch += [*configs(runs), "--datasets", *sets, "--data-root", site["DATA_ROOT"]]
    line = shlex.join(fetch)
    home = site.get("HF_HOME")  # the jobs look there
    line = f"HF_HOME={shlex.quote(home)} {line}" if home else line
    return f"{line}\nnot there yet: {', '.join(files)}" if (files := missing(runs)) else line


def missing(runs: list[Line]) -> list[str]:
    """Files of weights that are not there and that no job makes; tags' are for prefetch."""
    named = [(name, weights) for run in runs for _, name, _, weights in models(run.config)]
    files = (weights_file(name, weights) for name, weights in dict.fromkeys(named))
    return [str(file) for file in files if file and not file.is_file()]
