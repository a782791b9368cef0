"""Steps on fake CUDA tensors: they have shapes and a device but no data, so reading one fails.

``python tests/fake_cuda.py FOLDER`` takes them where torch finds `benchmarks.fake_cuda`'s CUDA. It
prints as JSON, of each step, what went wrong or the kernels it would have launched.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

from benchmarks.fake_cuda import on_fake_cuda, starts_kernel
from trainers import CASES, MODELS, batch, prepare, trainer

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


class Launches(TorchDispatchMode):
    """Counts the operations that start kernels."""

    def __init__(self):
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if starts_kernel(function):
            self.calls[function.__name__.partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def step(case: str, home: Path, flags: list[str], precision: str) -> dict[str, int]:
    """Kernels that a settled step launches."""
    host = ["--custom-blocks", "--distill-precision", "bf16", "--batch-size", str(ROWS)]
    made = trainer(case, home, *host, *flags)
    rows = batch(ROWS)
    with FakeTensorMode() as mode:
        fake = on_fake_cuda(made.stage, made.config, precision)
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
