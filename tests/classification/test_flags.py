"""The command line of `training.classify`: what is refused, and what is filled in."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runs import ROOT
from training.classifier.config import METHODS, parse_args
from training.classify import main
from training.engine.config import record
from training.engine.optim import make_schedule
from training.errors import UsageError

KD, CIFD = "--method kd --model cnn2 --teacher a", "--method cifd --model cnn2 --teacher a"
DGKD, RDM = "--method dgkd --model cnn2 --teacher a,b", "--method rdm --teacher a"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method kd --model cnn2", "--method kd needs one --teacher RUN, got 0"),
        ("--method kd --model cnn2 --teacher a,b", "needs one --teacher RUN, got 2"),
        ("--method none", "--method none needs --model"),
        ("--method rdm --teacher a --model cnn2", "trains no --model"),
        ("--model cnn2 --teacher a", "has no --teacher"),
        (f"{CIFD} --rates 1", "--rdm-bank RUN, which is missing"),
        (f"{KD} --rdm-bank b", "--rdm-bank belongs to --method"),
        (f"{DGKD} --kd-drop 2", "--kd-drop 2: expected fewer than teachers and assistants, 2"),
        ("--method ft --model cnn2 --teacher a", "--paraphraser RUN go together"),
        ("--model cnn2 --epochs 2 --warmup-epochs 2", "leaves nothing"),
        ("--model cnn2 --warmup-epochs 2 --warmup 3", "say the same in two ways"),
        (f"{RDM} --rdm-hidden 8 8", "--rdm-hidden 8 8: expected one width, or three"),
        ("--model cnn2 --lr-schedule linear", "--lr-schedule .* write --lr-scheduler"),
        ("--model cnn2 --global-batch 3 --accum-freq 2", "--global-batch 3 can't be shared"),
        ("--model cnn2 --precision amp", "--precision amp .* needs a GPU"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        parse_args(["--data", "x", *flags.split()])


@pytest.mark.parametrize(
    "flags",
    [
        "--grad-clip-norm -1",
        "--grad-clip-norm 0",
        "--holdout -1000",
        "--subset -5",
        "--lr -1",
        "--lr 0",
        "--density-lr 0",
        "--wd -1",
        "--gamma -0.1",
        "--warmup-epochs nan",
        "--momentum 2",
        "--momentum -0.1",
        "--workers -1",
        "--keep -1",
        "--epochs 0",
        "--batch-size 0",
        "--accum-freq 0",
        "--ema 1",
        "--max-nonfinite-steps 0",
        "--save-every-n-steps -1",
        "--tau nan",
        "--label-smoothing 2",
        "--lambda-ce -1",
        f"--kd-dropout 1 {KD}",
        f"--lambda-kl -1 {KD}",
        f"--lambda-i -1 {CIFD}",
        f"--lambda-emb nan {CIFD} --rdm-bank b",
        f"--lambda-n 1 -1 {CIFD} --rdm-bank b",
        f"--rates 10 10 {CIFD} --rdm-bank b",
        "--lambda-ft -1 --method ft --model cnn2 --teacher a --paraphraser p",
        "--factors 0 --method paraphraser --teacher a",
        "--factors -3 --method paraphraser --teacher a",
        f"--rates -1 0 {RDM}",
        f"--rates nan {RDM}",
        f"--rates 10 3 10.0000001 {RDM}",
        f"--rdm-hidden 8 0 8 {RDM}",
    ],
)
def test_a_value_out_of_range_is_refused_by_its_flag(flags):
    model = "" if "--method" in flags else "--model cnn2"
    with pytest.raises(UsageError, match=f"^{flags.split()[0]} (must be|has one of)"):
        parse_args(["--data", "x", *flags.split(), *model.split()])


@pytest.mark.parametrize(
    "flags",
    [
        f"--lambda-n 0.1 {DGKD}",
        f"--lambda-n 0.1 {CIFD}",
        "--augment none --dataset imagenet --model resnet18",
        "--augment flip --dataset imagenet --model resnet18",
        f"--rdm-form reconstruct {CIFD} --rdm-bank b",
        f"--rdm-form classify {CIFD} --rdm-bank b",
        f"--rdm-hidden 8 8 8 {CIFD} --rdm-bank b",
        f"--lambda-i 5 {KD}",
        f"--ibm {KD}",
        f"--lambda-ft 3 {KD}",
        f"--factors 3 {KD}",
        f"--embedding-loss smooth_l1 {KD}",
        f"--kd-dropout 0.25 {RDM}",
        f"--kd-drop 1 {KD}",
        f"--label-smoothing 0.1 {RDM}",
        "--lambda-ce 1 --method paraphraser --teacher a",
        "--kd-dropout 0.25 --model cnn2",
    ],
)
def test_a_flag_that_would_have_no_effect_is_refused(flags):
    refusal = f"^{flags.split()[0]}.*( belongs to --method | is of )"
    with pytest.raises(UsageError, match=refusal):
        parse_args(["--data", "x", *flags.split()])


def test_what_is_not_given_is_recorded_as_it_holds():
    config = record(parse_args(["--data=x", "--dataset=imagenet", "--model=resnet18"]))
    held = {"rates": [], "ibm": False, "lambda_n": [1.0], "lambda_kl": 1.0, "lambda_emb": 0.0}
    held |= {"batch_size": 128, "global_batch": 128, "opt": "sgd", "lr": 0.02, "density_lr": 0.5}
    assert config.items() >= held.items()
    config = record(parse_args(["--data=x", *CIFD.split()]))
    assert config.items() >= {"rates": [], "ibm": True, "name": "cifd_cnn2_s0"}.items()
    config = record(parse_args(["--data=x", *RDM.split()]))
    held = {"rates": [1.0, 3.0, 10.0, 30.0, 100.0], "opt": "adamw", "lr": 1e-3, "density_lr": 10.0}
    assert config.items() >= held.items()


def test_the_learning_rate_starts_and_ends_where_it_should():
    optimizer = torch.optim.SGD([torch.zeros(1)])

    def at(flags: str, step: int) -> float:
        """As a share of the peak."""
        config = parse_args(["--data", "x", "--model", "cnn2", *flags.split()])
        return make_schedule(config, optimizer, 10)(step) / config.lr

    assert at("--epochs 4", 0) == 1 and at("--epochs 4", 39) < 0.01
    assert at("--epochs 4", 20) == pytest.approx(0.5)
    assert at("--epochs 4 --warmup-epochs 1", 4) == pytest.approx(0.5)
    assert at("--epochs 4 --warmup-epochs 1", 10) == 1
    multistep = "--epochs 9 --lr-scheduler multistep --milestones 2 5"
    assert [at(multistep, s) for s in (19, 20, 50)] == pytest.approx([1, 0.1, 0.01])


def test_a_model_that_there_is_not_is_named_with_those_there_are():
    with pytest.raises(UsageError, match="--model cnn3: there are cnn10"):
        main(["--data=x", "--model=cnn3", "--device=cpu"])


def test_a_wrong_flag_ends_before_torch_is_imported():
    code = (
        "import sys; from training.classify import main\n"
        "try: main(['--data=x', '--model=cnn2', '--lr=-1'])\n"
        "except Exception as error: print('torch' in sys.modules, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "False --lr must be positive, got -1\n"


def test_help_is_grouped_and_names_every_method():
    command = [sys.executable, "-m", "training.classify", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    for title in ("method:", "weights of the terms:", "data:", "optimisation:"):
        assert f"\n{title}\n" in done.stdout
    assert "{" + ",".join(METHODS) + "}" in done.stdout
    assert len(done.stdout.splitlines()) < 130 and "``" not in done.stdout


MISSING = {
    "cifar100_teacher": "--model wrn_40_2",
    "cifar100_rdm": "--teacher t",
    "cifar100_cifd": "--model resnet8x4 --teacher t --rdm-bank b",
    "cifar100_kd": "--model resnet8x4 --teacher t",
    "cifar100_paraphraser": "--teacher t",
    "cifar100_ft": "--model resnet8x4 --teacher t --paraphraser p",
    "imagenet_student": "--model resnet18",
    "imagenet_rdm": "--teacher t",
    "imagenet_cifd": "--model resnet18 --teacher t --rdm-bank b",
}


def test_every_recipe_needs_only_what_it_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    recipes = {path.stem: path for path in Path("slurm/recipes/classify").glob("*.args")}
    assert set(recipes) == set(MISSING)
    for name, path in recipes.items():
        config = parse_args([f"@{path}", "--data", "d", *MISSING[name].split()])
        assert config.resume == "latest"
    path = recipes["cifar100_cifd"]
    cifd = parse_args([f"@{path}", "--data=d", *MISSING["cifar100_cifd"].split()])
    assert (cifd.tau, cifd.kd_dropout, cifd.lambda_i, cifd.lambda_emb) == (2.0, 0.25, 0.005, 100.0)
    assert cifd.ibm and cifd.epochs == 240 and cifd.milestones == (150, 160, 180)
