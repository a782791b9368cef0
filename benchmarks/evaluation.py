"""``python -m benchmarks.evaluation``: ImageNet and four variants, against clip_benchmark.

eval.benchmark and clip_benchmark's own command take turns on the same weights, data, batch
size, worker processes and threads; each is timed as a user runs it, from start to exit. Both must
give the same figures. The data are generated (benchmarks.fabricate), with the real class names
and templates: clip_benchmark embeds 2513 classes, set by set, of which 1051 differ.
"""

import json
import statistics
import tempfile
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from benchmarks.fabricate import CLASSIFICATION, Pictures, webdataset
from benchmarks.harness import command_line, paired, ratios, record, spelled
from eval.datasets import open_folder
from experiments.study import output, read_result
from training.errors import Failure, cli

#: ViT-S-32-alt with a text tower of the given size, which two CPU cores can run 200,000 times.
MODEL = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 384, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "heads": 2},
}
EQUAL = 1e-4


def model_folder(folder: Path, width: int, layers: int, seed: int) -> Path:
    """An OpenCLIP folder of random weights."""
    folder.mkdir()
    config = {**MODEL, "text_cfg": {**MODEL["text_cfg"], "width": width, "layers": layers}}
    content = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def figures(folder: Path) -> dict[str, dict[str, float]]:
    """Metrics by data set, of result files."""
    results = [read_result(path) for path in folder.glob("*.json")]
    return {result["dataset"].removeprefix("wds/"): result["metrics"] for result in results}


def difference(a: dict, b: dict) -> float:
    """The largest difference of two figures of the same data set and name."""
    if a.keys() != b.keys():
        raise Failure(f"evaluated: {sorted(a)} and {sorted(b)}")
    return max(abs(a[name][metric] - b[name][metric]) for name in a for metric in a[name])


def main(argv: list[str]) -> None:
    """Measure, compare figures and print."""
    parser = command_line("evaluation", __doc__, rounds=2)
    add = parser.add_argument
    add("--images", type=int, default=2000, help="in all five data sets together")
    add("--side", type=int, nargs=2, default=(256, 500), help="least and most pixels of a side")
    add("--templates", type=int, default=80, help="of each class")
    add("--text-width", type=int, default=128, help="of the model")
    add("--text-layers", type=int, default=2, help="of the model")
    add("--batch-size", type=int, default=64, help="of both")
    add("--workers", type=int, default=1, help="processes that decode, of both")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, turns = folder / "data", iter(range(args.rounds))
        for number, name in enumerate(CLASSIFICATION):
            count = args.images // len(CLASSIFICATION)
            pictures = Pictures(count, *args.side, seed=args.seed + number)
            webdataset(data, name, pictures, args.templates)
        prints = {name: open_folder(data, name, "test").fingerprint for name in CLASSIFICATION}
        model = model_folder(folder / "model", args.text_width, args.text_layers, args.seed)
        same = ("--batch-size", str(args.batch_size), "--workers", str(args.workers))

        def ours() -> None:
            output(
                "eval.benchmark", f"local-dir:{model}", "--data-root", str(data), "--datasets",
                *CLASSIFICATION, "--out", str(folder / f"ours{next(turns)}"), *same,
            )  # fmt: skip

        def stock() -> None:
            (folder / "stock").mkdir(exist_ok=True)
            output(
                "clip_benchmark.cli", "eval", "--dataset", *(f"wds/{n}" for n in CLASSIFICATION),
                "--dataset_root", f"{data}/{{dataset}}", "--model", f"local-dir:{model}",
                "--pretrained", "", "--output", f"{folder}/stock/{{dataset}}.json", "--no_amp",
                "--batch_size", same[1], "--num_workers", same[3],
            )  # fmt: skip

        contestants = {"ours": ours, "clip_benchmark": stock}
        seconds = paired(contestants, args.rounds, warmup=0)
        measured = {"ours": figures(folder / "ours0"), "clip_benchmark": figures(folder / "stock")}
    largest = difference(*measured.values())
    if largest > EQUAL:
        raise Failure(f"figures differ by {largest}: {measured}")
    for name, times in seconds.items():
        print(f"{name:15} {statistics.median(times):8.1f} s")
    ratio = ratios(seconds, "clip_benchmark", "ours")
    print(f"clip_benchmark / ours, pair by pair: {spelled(ratio)}")
    print(f"largest difference of a figure: {largest:.1e}")
    content = {"seconds": seconds, "ratio": ratio, "largest_difference": largest}
    record("evaluation", args, content | {"figures": measured, "data": prints})


if __name__ == "__main__":
    cli(main)
