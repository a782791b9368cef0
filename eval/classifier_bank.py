"""What the RDMs of a classifier still know: their accuracy against R, and maps (Figures 5 and 9).

::

    python -m eval.classifier_bank logs/classify/rdm --data cifar100

The test images go through the teacher and, with rounding as in stage 2, through each RDM of a
finished ``training.classify --method rdm``. Written to ``RUN/results/bank`` in the form of
`eval.bank`: the accuracies, the bits, and a t-SNE map of the embeddings of ten classes.
`eval.report` draws them.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR100

from cifd_clip.artefact import BANK_WEIGHTS, read_bank_config
from eval import metrics
from eval.bank import embedding_map
from eval.benchmark import write_once
from training.classifier.cifar import Table
from training.classifier.imagenet import PhotoTable, check_classes
from training.classifier.run import load_split
from training.classifier.teachers import EVALUATION_BATCH, LiveTeachers, load_rdms, load_teacher
from training.engine.environment import cores, environment
from training.errors import UsageError, cli


@torch.no_grad()
def measure(teachers: LiveTeachers, table: Table | PhotoTable, names: list[str]) -> dict:
    """Accuracies of a teacher and its RDMs, bits, and a map of their embeddings.

    Args:
        teachers: one teacher, and all RDMs of its bank.
        table: the images.
        names: of the classes.
    """
    logits, embeddings = [], []
    for batch in table.in_order(torch.arange(len(table)), EVALUATION_BATCH):
        said = teachers(batch)
        logits.append(torch.stack([one.logits for one in said]))
        embeddings.append([one.embedding for one in said])
    labels, rates = table.labels, teachers.rdms.rates
    scores = [metrics.classification_metrics(each, labels) for each in torch.cat(logits, dim=1)]
    embeddings = [torch.cat(each) for each in zip(*embeddings)]
    nats = [teachers.rdms(x, None).nats.sum(1) for x in embeddings[0].split(EVALUATION_BATCH)]
    bits = (torch.stack(nats).sum(0) / math.log(2) / len(table)).tolist()
    assistants = [
        {"rate": rate, "bits": {"image": b}, "metrics": m}
        for rate, b, m in zip(rates, bits, scores[1:], strict=True)
    ]
    spaces = ["teacher", *(f"{rate:g}" for rate in rates)]
    return {
        "teacher": {"metrics": scores[0]},
        "assistants": assistants,
        "map": embedding_map(embeddings, spaces, labels, names),
    }


def class_names(data: Path, table: Table | PhotoTable) -> list[str]:
    """What the classes are called; their numbers where the data don't say."""
    if isinstance(table, PhotoTable):
        return list(table.class_names)
    packed, meta = data / "cifar100_test.npz", data / "cifar-100-python" / "meta"
    if packed.is_file():
        return np.load(packed)["classnames"].tolist()
    if meta.is_file():
        return CIFAR100(data).classes
    return [str(number) for number in range(table.classes)]


def check_same(out: Path, asked: dict) -> None:
    """Refuse a file of results that holds something else than what is asked for.

    Raises:
        UsageError: what differs, or that it holds no such result.
    """
    try:
        found = json.loads(out.read_text())
        provenance = found["provenance"]
        held = {
            "data set": found["dataset"],
            "test images": provenance["data"]["test"],
            "teacher": provenance["teacher"],
            "rates": [one["rate"] for one in found["assistants"]],
            "seed": provenance["seed"],
            # older results don't say
            "weights": provenance.get("weights", asked["weights"]),
        }
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{out} holds no result of eval.classifier_bank: say --out FILE") from None
    if different := [name for name in asked if held[name] != asked[name]]:
        raise UsageError(
            f"{out} holds another measurement ({', '.join(different)} differ): say --out FILE"
        )


def main(argv: list[str]) -> None:
    """Entry point of ``python -m eval.classifier_bank``."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.classifier_bank",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bank", type=Path, help="a finished run of --method rdm")
    parser.add_argument("--data", type=Path, required=True, help="as for training.classify")
    workers = min(4, cores())
    parser.add_argument("--workers", type=int, default=workers, help="processes that decode images")
    parser.add_argument("--out", type=Path, help="the file to write (default: in RUN/results/bank)")
    args = parser.parse_args(argv)
    if not (args.bank / "bank" / "config.json").is_file():
        raise UsageError(f"'{args.bank}' is no finished run of training.classify --method rdm")
    config = json.loads((args.bank / "config.json").read_text())
    args.dataset = config["dataset"]
    out = args.out or args.bank / "results" / "bank" / f"{args.dataset}_test.json"
    rdm = read_bank_config(args.bank / "bank")
    table = load_split(args, "test")
    if isinstance(table, PhotoTable):
        trained = json.loads((args.bank / "data.json").read_text())["train"]
        check_classes(args.data, table, trained.get("classes"), rdm["classes"])
    weights = hashlib.sha256((args.bank / "bank" / BANK_WEIGHTS).read_bytes()).hexdigest()
    if out.exists():
        asked = {
            "data set": args.dataset,
            "test images": table.hash,
            "teacher": rdm["teacher"]["weights"],
            "rates": rdm["rates"],
            "seed": config["seed"],
            "weights": weights,
        }
        check_same(out, asked)
        print(f"measured already, skipped ({out})")
        return
    teacher = load_teacher(config["teacher"][0], args.dataset)
    rdms = load_rdms(args.bank, teacher)
    picked = list(range(len(rdms.rates)))
    teachers = LiveTeachers([teacher.model], rdms, picked, [1.0] * len(picked))
    found = measure(teachers, table, class_names(args.data, table))
    head = {"task": "classification", "dataset": args.dataset, "model": f"RDMs of {teacher.name}"}
    provenance = {
        "environment": environment(),
        "teacher": teacher.hash,
        "weights": weights,
        "data": {"test": table.hash},
        "seed": config["seed"],
        "scikit-learn": importlib.metadata.version("scikit-learn"),
    }
    write_once(out, {**head, **found, "provenance": provenance})
    figures = [f"R={a['rate']:g} {a['metrics']['acc1']:.4f}" for a in found["assistants"]]
    print(f"acc1: teacher {found['teacher']['metrics']['acc1']:.4f}, {', '.join(figures)} ({out})")


if __name__ == "__main__":
    cli(main)
