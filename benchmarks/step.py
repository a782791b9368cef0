"""``python -m benchmarks.step``: what each method costs in a training step.

Step time (forward, backward, update, through the real `training.engine.trainer.Trainer`) and peak
memory of none, kd, fd, clipkd and cifd with K = 1 and 3 assistants, with one student and teacher.
Methods are also timed without the teacher's forward pass (as with a teacher cache), where their own
cost is not hidden behind it.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.harness import paired, ratios, record
from cifd_clip import RDMBank, World
from training.clip.config import parse_args
from training.clip.models import add_model_configs
from training.clip.stages import StudentStage
from training.data.loader import Batch
from training.engine.trainer import Trainer

CONTESTANTS = {
    "none": (["--distill", "none"], 0),
    "kd": (["--distill", "kd"], 0),
    "fd": (["--distill", "fd"], 0),
    "clipkd": (["--distill", "clipkd"], 0),
    "cifd (K=1)": (["--distill", "cifd"], 1),
    "cifd (K=3)": (["--distill", "cifd"], 3),
    "cifd (K=3, no IBM)": (["--distill", "cifd", "--no-ibm"], 3),
}
RATES = (1000.0, 300.0, 100.0)


class Contestant:
    """A method with its own student and a teacher, taking steps on one random batch."""

    def __init__(self, name: str, args: argparse.Namespace, teacher: str, folder: Path):
        flags, assistants = CONTESTANTS[name]
        flags = [*flags, "--model", args.student, "--batch-size", str(args.batch_size)]
        flags += ["--train-data", "-", "--warmup", "1", "--seed", str(args.seed)]
        flags += ["--device", args.device, "--precision", args.precision, "--epochs", "1000"]
        if "none" not in flags:
            flags += ["--distill-model", teacher]
        if assistants:
            flags += ["--rdm-bank", str(folder / f"bank{assistants}")]
        self.device = torch.device(args.device)
        parsed = parse_args(flags)
        if assistants:
            self._make_bank(folder / f"bank{assistants}", assistants, parsed)
        self.stage = StudentStage(parsed, self.device, World())
        self.trainer = Trainer(parsed, self.stage, World(), self.device, 1000)
        self.batch = self._batch(args.batch_size, args.seed)
        if args.cached and self.stage.source.teachers:
            features = self.stage.source(self.batch)
            source = self.stage.source
            self.stage.source = lambda batch: list(features)
            self.stage.source.identities = source.identities

    def _make_bank(self, folder: Path, count: int, parsed) -> None:
        if not folder.exists():
            source = StudentStage(
                parse_args([*_without_bank(parsed), "--distill", "fd"]), self.device, World()
            ).source
            generator = torch.Generator().manual_seed(0)
            bank = RDMBank(
                source.identities[0], list(RATES[:count]), source.dims[0], generator=generator
            )
            bank.save(folder)

    def _batch(self, rows: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        images, texts = [], []
        for spec in self.stage.inputs.specs:
            size = spec.size if isinstance(spec.size, (tuple, list)) else (spec.size, spec.size)
            shape = (rows, 3, *size)
            images.append(torch.randint(256, shape, generator=generator, dtype=torch.uint8))
        captions = [f"a photo of scene number {i}" for i in range(rows)]
        texts = [tokenizer(captions) for tokenizer in self.stage.inputs.tokenizers]
        index = torch.arange(rows)
        return Batch(images, texts, index, index, captions).to(self.device)

    def __call__(self) -> None:
        """One step."""
        self.trainer.step(self.batch)


def _without_bank(parsed) -> list[str]:
    return ["--model", parsed.model, "--train-data", "-", "--device", parsed.device,
            "--distill-model", parsed.distill_model, "--precision", parsed.precision]  # fmt: skip


def _peak(name, args, teacher, folder, queue) -> None:
    add_model_configs(args.model_config)
    contestant = Contestant(name, args, teacher, folder)
    if contestant.device.type == "cuda":
        contestant()
        torch.cuda.reset_peak_memory_stats()
        contestant()
        queue.put(torch.cuda.max_memory_allocated() / 2**20)
    else:
        contestant()
        contestant()
        queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak_megabytes(name: str, args: argparse.Namespace, teacher: str, folder: Path) -> float:
    """Peak memory of a process that takes two steps, in MiB."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(name, args, teacher, folder, queue))
    process.start()
    result = queue.get(timeout=600)
    process.join()
    return result


def random_teacher(args: argparse.Namespace, folder: Path) -> str:
    """A randomly initialised teacher as a ``local-dir:`` model: its speed is that of a real one."""
    from training.clip.models import build_student, save_student, student_config

    flags = ["--train-data", "-", "--model", args.teacher, "--seed", str(args.seed)]
    parsed = parse_args(flags)
    save_student(build_student(parsed), student_config(parsed), folder / "teacher")
    return f"local-dir:{folder / 'teacher'}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--teacher", default="ViT-L-14" if on_gpu else "ViT-B-32")
    parser.add_argument("--student", default="ViT-B-16" if on_gpu else "ViT-S-32")
    parser.add_argument("--model-config", nargs="+", default=[])
    parser.add_argument("--batch-size", type=int, default=256 if on_gpu else 16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--precision", default="amp_bf16" if on_gpu else "fp32")
    parser.add_argument("--cached", action="store_true", help="leave the teacher's forward out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="save the figures here")
    args = parser.parse_args()
    add_model_configs(args.model_config)
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher = random_teacher(args, folder)
        memory = {name: peak_megabytes(name, args, teacher, folder) for name in CONTESTANTS}
        steps = {name: Contestant(name, args, teacher, folder) for name in CONTESTANTS}
        seconds = paired(steps, args.rounds, 2, device)
    against = {name: ratios(seconds, name, "fd") for name in CONTESTANTS}
    print(f"{args.teacher} -> {args.student}, batch {args.batch_size}, {args.precision}, {device}")
    for name, times in seconds.items():
        middle, ratio = 1000 * statistics.median(times), against[name]
        print(
            f"{name:20} {middle:9.1f} ms  {memory[name]:8.0f} MiB  "
            f"{ratio['median']:.3f} x fd (min {ratio['min']:.3f}, max {ratio['max']:.3f})"
        )
    settings = json.loads(json.dumps(vars(args), default=str))
    figures = {"seconds": seconds, "peak_mib": memory, "ratio_to_fd": against}
    record("step", {**figures, "settings": settings}, args.json)


if __name__ == "__main__":
    main()
