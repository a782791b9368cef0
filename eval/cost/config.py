"""The command line of ``python -m eval.cost``: a recipe of `training.main`, and the machine."""

from collections.abc import Sequence
from dataclasses import dataclass

from training.clip import flags
from training.clip.config import Config, read_cache_config
from training.engine.flags import add_flags, check_ranges, construct, flag
from training.errors import UsageError

DESCRIPTION = """\
MACs, bytes and GPU hours of every stage of a run, before it starts.

  python -m eval.cost @slurm/recipes/cc12m_vitl14_vits16.args --gpus 4

Takes a command line of training.main, of which --train-data may be left out."""


@dataclass(frozen=True)
class CostConfig(Config):
    """A run's configuration, and what it does not know beforehand."""

    gpus: int = flag(1, "processes that share a global batch", least=1)
    tflops: float = flag(312.0, "peak of one GPU [312: A100, bf16]", above=0)
    mfu: float = flag(0.35, "share of it that is reached", above=0)
    dataset_samples: int | None = flag(None, "samples a cache covers [one epoch's]", least=1)
    sample_bytes: int = flag(
        30_000, "of an image and its caption in the shards [30000: CC12M at 256 px]", least=1
    )
    assistants: str = flag("", "of TAKD and DGKD [ViT-B-16]", metavar="NAME[,NAME]")
    hours: bool = flag(False, "print one line of JSON: hours, disk_bytes")
    sweep_views: tuple[int, ...] = flag((), "print what caches of V views save", metavar="V")
    students: tuple[str, ...] = flag((), "of --sweep-views [--model]")
    json: str = flag("", "write everything as JSON too", metavar="FILE")
    architectures: tuple[str, ...] = ()
    """Of the teachers, which a written cache knows."""

    @property
    def covered(self) -> int:
        """Samples that a cache covers."""
        return self.dataset_samples or self.train_num_samples

    def gpu_hours(self, macs: float) -> float:
        """Hours on one GPU; two floating-point operations are a MAC."""
        return 2 * macs / (self.tflops * 1e12 * self.mfu) / 3600


def parse(argv: Sequence[str]) -> CostConfig:
    """A command line of `training.main`, with flags of its own.

    Raises:
        UsageError: a flag is wrong, or one that cost depends on is missing.
    """
    usage = "python -m eval.cost [@recipe.args] [flags of training.main] [flags]"
    parser = flags.parser("eval.cost", DESCRIPTION, usage)
    add_flags(parser.add_argument_group("cost"), CostConfig, besides=Config)
    gone = "the paper's own figures are counted by `python -m experiments.paper_costs`"
    parser.unsupported = {**parser.unsupported, gone: "--paper"}
    # Cost depends on the number of samples, not on where they lie.
    given = {"train_data": "none", **parser.given(argv)}
    caches = construct(Config, given).caches
    written = [read_cache_config(c) for c in caches if (c / "config.json").is_file()]
    files = flags.named_files({k: v for k, v in given.items() if k != "teacher_cache"})
    if written:
        files["cache"] = written[0]
    run = flags.resolve(given, max(1, given.get("gpus", 1)), "cuda", **files)
    names = [teacher.model for teacher in run.teachers] or [c["teacher"]["model"] for c in written]
    config = construct(CostConfig, {**given, **vars(run), "architectures": names})
    check_ranges(config)
    if not config.train_num_samples:
        raise UsageError(
            "--train-num-samples is missing: the samples of an epoch, which a run takes from its "
            "shards"
        )
    if config.sweep_views and config.distill == "none":
        raise UsageError("--sweep-views compares caches of a teacher, but --distill is none")
    if caches and not (config.views and names):
        raise UsageError(
            f"--teacher-cache '{config.teacher_cache}' is not written yet: say what it will hold "
            "with --views V and --distill-model NAME --distill-pretrained TAG"
        )
    return config
