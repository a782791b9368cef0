"""Run directories: a run goes on with the configuration that it began with."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.classifier.config import parse_args
from training.clip.flags import parse, resolve
from training.engine.run import RunDirectory
from training.errors import UsageError


def test_other_rates_of_its_bank_make_another_classifier(tmp_path):
    def config(*flags: str):
        common = ["--model=cnn2", "--method=cifd", "--teacher=a", "--rdm-bank=b", "--data=c"]
        return parse_args([*common, "--logs", str(tmp_path), "--name=run", *flags])

    run = RunDirectory(config("--rates", "50", "150"))
    run.open()
    run.close()
    RunDirectory(config("--rates", "50", "150", "--resume=latest"))
    with pytest.raises(UsageError, match=r"--rates was \[50.0, 150.0\], now \[20.0\]"):
        RunDirectory(config("--rates", "20", "--resume=latest"))


def test_what_changes_nothing_may_change_on_resumption(tmp_path):
    def config(*flags: str):
        common = ["--model=cnn2", "--global-batch=64", "--logs", str(tmp_path), "--name=run"]
        return parse_args([*common, *flags])

    run = RunDirectory(config("--data=a"))
    run.open()
    run.close()
    moved = config("--data=b", "--accum-freq=2", "--keep=1", "--final", "--resume=latest")
    assert RunDirectory(moved).path == Path(tmp_path, "run")


def test_a_name_that_is_no_utf8_is_logged_by_the_numbers_of_its_bytes(tmp_path, capfd):
    name = os.fsdecode(b"r\xff")
    run = RunDirectory(resolve(parse(["--train-data=x", f"--logs={tmp_path}", f"--name={name}"])))
    run.open()
    logging.getLogger().warning("läuft: %s", run.path)
    run.close()
    assert r"läuft: " in (text := (run.path / "out.log").read_text("utf-8")) and r"r\udcff" in text
    assert "Logging error" not in capfd.readouterr().err


def test_what_logs_and_cards_quote_is_one_line():
    flags = ["--train-data=x", "--wandb-notes=one\ntwo"]
    assert resolve(parse(flags)).wandb_notes == "one\ntwo"
    for flag, value in (("--name", "a\nb"), ("--pretrained", "a\x1b[2Jb")):
        with pytest.raises(UsageError, match=f"{flag} 'a.*b' holds a line break or the like"):
            resolve(parse([*flags, flag, value]))


def test_another_number_of_processes_is_told_what_keeps_the_batch(tmp_path):
    def config(processes: int, *flags: str):
        common = ["--train-data=x", "--logs", str(tmp_path), "--name=run"]
        return resolve(parse([*common, *flags]), processes)

    run = RunDirectory(config(2, "--batch-size=50"))
    run.open()
    run.close()
    with pytest.raises(UsageError, match=r"use 100, or --global-batch 100\)"):
        RunDirectory(config(1, "--batch-size=50", "--resume=latest"))
    RunDirectory(config(1, "--global-batch=100", "--resume=latest"))


def test_numpy_does_not_warn_of_a_process_that_flushes_denormals():
    code = (
        "import warnings, numpy as np; from training.engine.control import flush_denormals\n"
        "flush_denormals(); warnings.simplefilter('error')\n"
        "print(*(np.finfo(kind).smallest_subnormal > 0 for kind in (np.float32, np.float64)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
