"""The command line of ``python -m eval.cost``: a recipe of `training.main`, and the machine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.clip import flags
from training.clip.config import Config, read_cache_config
from training.engine.flags import add_flags, check_ranges, construct, flag
from training.errors import UsageError

#: Share of an H100's 989 TFLOPS that CLIP models reach, as they are and compiled, by MACs of their
#: forward pass: ViT-S-16 and ViT-B-16 in training (fd, from a cache), ViT-L-14's forward pass in
#: bfloat16; 256 rows, NVIDIA H100 80GB HBM3, 8f42fd5 (results/gpu/steps.json, card.json).
MEASURED = {6.29e9: (0.140, 0.147), 20.54e9: (0.264, 0.339), 87.66e9: (0.417, 0.433)}

DESCRIPTION = """\
MACs, bytes and GPU hours of every stage of a run, before it starts.

  python -m eval.cost @slurm/recipes/cc12m_vitl14_vits16.args --gpus 4

Takes a command line of training.main, of which --train-data may be left out."""


@dataclass(frozen=True)
class CostConfig(Config):
    """A run's configuration, and what it does not know beforehand."""

    gpus: int = flag(1, "processes that share a global batch", least=1)
    tflops: float = flag(989.0, "peak of one GPU [989: H100, bf16]", above=0)
    mfu: float | None = flag(
        None, "share of it that is reached [as measured on an H100, by a model's size]", above=0
    )
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

    def share(self, macs: float) -> float:
        """Of the peak, that a model of so many forward MACs reaches: ``--mfu``, or as measured."""
        shares = [both[self.torchcompile] for both in MEASURED.values()]
        return self.mfu or float(np.interp(math.log(macs), np.log([*MEASURED]), shares))


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
    files["caches"] = written
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
