"""Secrets stay out of what a run records, logs and prints."""

import json
import subprocess
import sys

import pytest

from runs import ROOT, final
from training.errors import UsageError
from training.main import main
from training.masking import masked

TOKEN = "hf_SECRETsecretSECRET"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"curl -H 'Authorization: Bearer {TOKEN}' https://h/x", "Authorization: Bearer ***'"),
        ("curl -u me:SECRET https://h/x", "-u *** "),
        ("curl --cookie SECRET2 -H 'Cookie: id=SECRET' x", "Cookie: ***"),
        ("AWS_SECRET_ACCESS_KEY=SECRET aws s3 cp s3://b/x -", "ACCESS_KEY=*** aws"),
        ("https://h/x.tar?sig=SECRET&sv=1", "https://h/x.tar?***"),
    ],
)
def test_what_is_secret_is_masked_once_and_for_all(text, shown):
    once = masked(text)
    assert shown in once and masked(once) == once
    assert masked([{"a": text}]) == [{"a": once}], "in JSON values too"


def test_a_token_stands_in_nothing_that_a_run_leaves_and_a_renewed_one_resumes(
    flags, scenes, tmp_path, capfd
):
    (shard,) = (scenes / "train").glob("*.tar")

    def command(token: str, *more: str) -> list[str]:
        data = f'pipe:test -n "Authorization: Bearer {token}" && cat {shard}'
        words = [*flags, "--train-data", data, "--train-num-samples", "96"]
        words += ["--logs", str(tmp_path), "--name", "run", "--save-every-n-steps", "2", *more]
        return [sys.executable, "-m", "training.main", *words]

    for words in (command(TOKEN), command("hf_RENEWED", "--resume", "latest", "--epochs", "1")):
        subprocess.run(words, cwd=ROOT, check=True)
    wrong = subprocess.run(command(TOKEN, "--resume", "latest", "--lr", "1"), cwd=ROOT, check=False)
    assert wrong.returncode == 2
    left = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    printed = "".join(capfd.readouterr())
    assert not any(b"SECRET" in content or b"RENEWED" in content for content in left)
    assert "SECRET" not in printed and "can't be resumed" in printed
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert 'Authorization: Bearer ***" && cat' in config["train_data"]
    assert final(tmp_path / "run")["progress"]["step"] == 4


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "", ".", "a/../../b", "n" * 300])
def test_a_run_lies_in_its_logs(name, flags, tmp_path):
    with pytest.raises(UsageError, match="--name"):
        main([*flags, "--logs", str(tmp_path / "logs"), "--name", name])
    assert not list(tmp_path.iterdir())


def test_logs_that_are_a_file_are_refused(flags, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--logs .* is a file, expected a folder"):
        main([*flags, "--logs", str(tmp_path / "file" / "logs"), "--name", "run"])


def test_an_error_of_the_system_is_one_line(flags, tmp_path):
    """Such as a file that can't be opened."""
    words = [sys.executable, "-m", "training.main", *flags, "--logs", str(tmp_path), "--name", "r"]
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "out.log").mkdir()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: [Errno 21] Is a directory" in done.stderr.splitlines()[-1]
