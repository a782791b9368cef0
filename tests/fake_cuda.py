"""Steps on fake CUDA tensors: they have shapes and a device but no data, so reading one fails.

``python tests/fake_cuda.py FOLDER`` takes them where `stub` is the CUDA that torch finds. It prints
as JSON, of each step, what went wrong or the kernels it would have launched.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

from cifd_clip import Student, World
from trainers import CASES, MODELS, batch, prepare, trainer
from training.data.views import _statistics
from training.engine.trainer import Trainer

ROWS = 8
VOCABULARY = 49408  # of OpenCLIP's own tokenizer
#: Ways to take a step, beside the plain one: flags, and the precision.
WAYS = {
    "plain": ([], "amp_bf16"),
    "accumulation": (["--batch-size", str(ROWS // 2), "--accum-freq", "2"], "amp_bf16"),
    "EMA": (["--ema", "0.99"], "amp_bf16"),
    "checkpointing": (["--grad-checkpointing"], "amp_bf16"),
    "clipping": (["--grad-clip-norm", "1"], "amp_bf16"),
    "amp": ([], "amp"),
}


def stub(folder: Path) -> dict[str, str] | None:
    """The environment in which torch finds our CUDA; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library, source = folder / "libcuda.so.1", Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-w", "-shared", "-fPIC", "-o", library, source], check=True)
    return {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(folder)}


class Launches(TorchDispatchMode):
    """Counts the operations that start kernels: all that are no views and no allocations."""

    def __init__(self):
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns, name = function._schema.returns, function.__name__.partition(".")[0]
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        free = view or "empty" in name or name == "_unsafe_view"
        if function.namespace == "aten" and not free:
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def on_fake_cuda(made: Trainer, precision: str, mode: FakeTensorMode) -> Trainer:
    """A trainer of the host on the fake device."""
    device, stage = torch.device("cuda"), made.stage

    def moved(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor).to(device)

    for teacher in stage.source.teachers:
        teacher.model._apply(moved)
    for task in filter(None, (stage.task, stage.average)):
        task._apply(moved)
        if hasattr(task, "student"):  # cut anew: the halves hold parameters
            task.student = Student(task.student.model, task.student.site)
    for bank in stage.banks.values():
        if bank is not getattr(stage.task, "bank", None):
            bank._apply(moved)
    return Trainer(stage, made.config, 100, World(), device, precision)


def step(case: str, home: Path, flags: list[str], precision: str) -> dict[str, int]:
    """Kernels that a settled step launches."""
    host = ["--custom-blocks", "--distill-precision", "bf16", "--batch-size", str(ROWS)]
    made = trainer(case, home, *host, *flags)
    rows = batch(ROWS)
    _statistics.cache_clear()  # another mode's
    with FakeTensorMode() as mode:
        fake = on_fake_cuda(made, precision, mode)
        rows = rows.map(mode.from_tensor).to(fake.device)
        fake.step(rows)
        with Launches() as launches:
            fake.step(rows)
    return dict(launches.calls)


def hugging_face(folder: Path) -> list[str]:
    """Flags of a student whose text tower is transformers'."""
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**tower, intermediate_size=32, vocab_size=VOCABULARY)).save_pretrained(
        folder
    )
    config = json.loads((MODELS / "tiny-student.json").read_text())
    text = {"hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}
    text["context_length"] = config["text_cfg"].get("context_length", 77)
    config["text_cfg"] = {"hf_model_name": str(folder), **text}
    (folder / "tiny-hf.json").write_text(json.dumps(config))
    others = (str(MODELS / f"tiny-{name}.json") for name in ("student", "teacher"))
    return ["--model", "tiny-hf", "--model-config", str(folder / "tiny-hf.json"), *others]


def main(folder: Path) -> None:
    """Every case plainly, and one in every way."""
    home, results = prepare(folder), {}
    torch.compiler.set_stance("force_eager")  # compiling needs a device
    steps = {case: (case, *WAYS["plain"]) for case in CASES}
    steps |= {f"cifd, {way}": ("cifd", *WAYS[way]) for way in WAYS}
    steps["cifd, no IBM"] = ("cifd", ["--no-ibm"], "amp_bf16")
    steps["clipkd, a Hugging Face text tower"] = ("clipkd", hugging_face(folder), "amp_bf16")
    for name, (case, flags, precision) in steps.items():
        try:
            results[name] = step(case, home, flags, precision)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"[:1000]
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
