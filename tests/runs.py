"""Runs of `training.main` on a few scenes, and what they leave behind."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from demo.scenes import write
from training.main import main

ROOT = Path(__file__).parent.parent
CONFIGS = [str(p) for p in sorted((ROOT / "tests" / "models").glob("tiny-*.json"))]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """96 training scenes in one shard, 30 held out."""
    out = tmp_path_factory.mktemp("scenes")
    write(out, train=96, val=30, scenes=12)
    return out


@pytest.fixture(scope="session")
def flags(scenes) -> list[str]:
    return [
        *("--train-data", str(scenes / "train"), "--model-config", *CONFIGS),
        *("--batch-size", "24", "--epochs", "1", "--workers", "0", "--precision", "fp32"),
        *("--log-every-n-steps", "1", "--model", "tiny-student", "--device", "cpu"),
    ]


@pytest.fixture(scope="session")
def teacher(flags, tmp_path_factory) -> str:
    """A teacher trained for one short epoch, as a ``local-dir:`` name."""
    logs = tmp_path_factory.mktemp("teacher")
    assert main([*flags, "--model", "tiny-teacher", "--logs", str(logs), "--name", "teacher"]) == 0
    return f"local-dir:{logs / 'teacher' / 'student'}"


@pytest.fixture(scope="session")
def bank(flags, teacher, tmp_path_factory) -> Path:
    logs = tmp_path_factory.mktemp("bank")
    command = [*flags, "--distill", "rdm", "--distill-model", teacher, "--rates", "300", "30"]
    assert main([*command, "--logs", str(logs), "--name", "bank"]) == 0
    return logs / "bank" / "bank"


def lines(run: Path, kind: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def final(run: Path) -> dict:
    """The content of a run's newest checkpoint."""
    pointer = json.loads((run / "checkpoints" / "latest.json").read_text())
    return torch.load(run / "checkpoints" / pointer["file"], weights_only=True)


def assert_bit_equal(a, b, where: str = "checkpoint") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{where} differs by {(a - b).abs().max()}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("seconds", "cpu_seconds", "name"):
                assert_bit_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_bit_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


DOZEN = "[PAD] [UNK] [BOS] [EOS] a photo of the dog cat snow door in"


def word_tokenizer(folder: Path, words: str = DOZEN) -> Path:
    """A Hugging Face tokenizer of a few words on disk, with its end of text in the middle."""
    vocabulary = {word: i for i, word in enumerate(words.split())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    special |= {"bos_token": "[BOS]", "eos_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder
