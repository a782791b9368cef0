"""A name that nothing goes by is answered with what it may stand for, by every command."""

import runpy

import pytest

from cifd_clip.names import did_you_mean, nearby
from runs import CONFIGS
from training.commands import COMMANDS

#: Of each command, what is misspelt on its line, and what the answer proposes. ``{logs}`` has a
#: `teacher/`, a `bank/` and a `cache/`; ``{data}`` is a folder of shards, in ``{root}``.
EVERY = {
    "cifd-bank": [
        ("{logs}/bnk", "bank"),
        ("{logs}/bank --data-rot {data}", "--data-root"),
        ("{logs}/bank --data-root {root} --datasets digits --precision amp_bf61", "amp_bf16"),
    ],
    "cifd-cache": [
        ("--train-dta {data}", "--train-data"),
        ("{cache} --distill-model ViT-B-31 --distill-pretrained openai", "ViT-B-32"),
        ("{cache} --distill-model {logs}/techer", "teacher"),
        ("{cache} --distill-model ViT-B-32 --distill-pretrained openia", "openai"),
    ],
    "cifd-calibrate": [
        ("--train-data {data} --teacher-cash {logs}/cache", "--teacher-cache"),
        ("--train-data {data} --teacher-cache {logs}/cash --shares 0.9", "cache"),
    ],
    "cifd-check-data": [("{data} --index-dri x", "--index-dir"), ("{data} --dep", "--deep")],
    "cifd-classify": [
        ("--modle cnn2", "--model"),
        ("--data {data} --dataset cifar10", "cifar100"),
        ("--data {data} --model cnn22", "cnn2"),
        ("--data {data} --model cnn2 --method cfid", "cifd"),
        ("--data {data} --model cnn2 --method kd --teacher {logs}/techer", "teacher"),
    ],
    "cifd-cost": [
        ("--model ViT-S-31 --train-num-samples 100", "ViT-S-32"),
        ("--modle ViT-S-32", "--model"),
        ("@{logs}/recipe.arg", "recipe.args"),
    ],
    "cifd-eval": [
        ("{logs}/techer --data-root {root} --datasets flickr30k", "teacher"),
        ("ViT-B-31 --data-root {root} --datasets flickr30k", "ViT-B-32"),
        ("{logs}/teacher --data-root {root}/benchmrak --datasets flickr30k", "benchmark"),
        ("{logs}/teacher --data-root {root} --datasets flickr30", "flickr30k"),
        ("{logs}/teacher --data-root {root} --dataset flickr30k", "--datasets"),
    ],
    "cifd-export": [
        ("{logs}/techer --format onnx", "teacher"),
        ("{logs}/teacher --format onxn", "onnx"),
        ("{logs}/teacher --fromat onnx", "--format"),
    ],
    "cifd-pack": [
        ("{logs}/techer captions.csv -o x", "teacher"),
        ("{logs} {logs}/recipe.arg -o x", "recipe.args"),
        ("{logs} captions.csv --ot x", "--out"),
    ],
    "cifd-prefetch": [("ViT-B-31", "ViT-B-32"), ("--data-rot x", "--data-root")],
    "cifd-reinforced": [
        ("--train-data {data}/00000.tra --views 1 --teacher-cache a,b", "00000.tar"),
        ("--train-data {data} --views 1 --teacher-cash a,b", "--teacher-cache"),
    ],
    "cifd-report": [("{logs}/techer", "teacher"), ("{logs}/teacher --titel x", "--title")],
    "cifd-train": [
        ("--train-data {data} --model ViT-S-31", "ViT-S-32"),
        ("--train-data {data} --distil cifd", "--distill"),
        ("--train-data {data} --distill cfid", "cifd"),
        ("--train-data {data}/00000.tra --model tiny-student {configs}", "00000.tar"),
        ("--train-data {data} --model-config {logs}/modle.json", "model.json"),
        ("--train-data {data} --distill fd --distill-model {logs}/techer", "teacher"),
        ("--train-data {data} --distill cifd --rdm-bank {logs}/bnk {teacher} {configs}", "bank"),
        ("@slurm/recipes/cc12m_vitl14_vits61.args", "cc12m_vitl14_vits16.args"),
    ],
    "cifd-tune": [
        ("--method fd", "--methods"),
        ("--name x --methods fdd -- --train-data {data}", "fd"),
        ("--name x --methods fd --against fdd -- --train-data {data} {teacher} {configs}", "fd"),
    ],
}


@pytest.fixture
def places(scenes, teacher, tmp_path, monkeypatch):
    logs = tmp_path / "logs"
    for folder in ("teacher/student", "bank", "cache"):
        (logs / folder).mkdir(parents=True)
    for name in ("recipe.args", "model.json"):
        (logs / name).touch()
    monkeypatch.chdir(tmp_path)
    return {
        "logs": logs, "data": scenes / "train", "root": scenes,
        "cache": f"--train-data {scenes}/train --views 1 --teacher-cache {logs}/new",
        "configs": "--model-config " + " ".join(CONFIGS),
        "teacher": f"--distill-model {teacher} --model tiny-student",
    }  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_proposes_what_is_near(name, places, monkeypatch, capsys):
    for line, near in EVERY[name]:
        words = line.format(**places).split()
        monkeypatch.setattr("sys.argv", [name, *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(COMMANDS[name], run_name="__main__", alter_sys=True)
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert end.value.code in (1, 2), f"{name} {line}: exit code {end.value.code}: {said}"
        proposed = said.partition("; did you mean ")[2].partition("?")[0].split(" or ")
        assert near in proposed, f"{name} {line} says {said}"


def test_what_is_near_a_path_lies_beside_the_first_part_of_it_that_is_not_there(tmp_path):
    (tmp_path / "logs" / "teacher").mkdir(parents=True)
    assert nearby(tmp_path / "logs" / "techer") == "; did you mean teacher?"
    assert nearby(tmp_path / "lgos" / "teacher" / "student") == "; did you mean logs?"
    assert nearby(tmp_path / "logs" / "teacher") == nearby(tmp_path / "logs" / "zzz") == ""
    assert did_you_mean("cfid", ["cifd", "fd"]) == "; did you mean cifd or fd?"
