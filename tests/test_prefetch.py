"""What was prefetched loads where there is no network; what was not is named in one sentence."""

import os
import socket
import time

import pytest
import torch
from huggingface_hub import constants

from eval import models
from training import prefetch
from training.clip.flags import parse_args
from training.clip.models import build_teachers
from training.errors import UsageError

NO_PROXY = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"}


def test_what_is_here_is_proved_by_a_process_without_a_network(teacher, tmp_path, capsys):
    models = [teacher, "RN50", "--cache-dir", str(tmp_path)]
    assert prefetch.main(models) == 0
    assert capsys.readouterr().out.splitlines() == [f"{teacher}: is here", "RN50: is here"]


def test_without_a_network_what_is_missing_is_named_in_a_sentence_and_nothing_is_left_behind(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in NO_PROXY:
        monkeypatch.delenv(name, raising=False)
    sets = ["--datasets", "imagenetv2", "--data-root", str(tmp_path / "sets")]
    assert prefetch.main(["ViT-B-32:laion2b_s34b_b79k", *sets]) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2, told
    for line, name in zip(told, ("ViT-B-32:laion2b_s34b_b79k", "imagenetv2")):
        assert line.startswith(f"error: {name}: not here") and "network" in line
    assert not (tmp_path / "sets").exists()


def test_weights_that_are_not_here_are_refused_at_once_with_the_line_that_fetches_them(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in NO_PROXY:
        monkeypatch.delenv(name, raising=False)
    fetch = r"python -m training\.prefetch ViT-B-32:laion2b_s34b_b79k$"
    start = time.monotonic()
    with pytest.raises(UsageError, match=fetch):
        models.load("ViT-B-32:laion2b_s34b_b79k", torch.device("cpu"))
    with pytest.raises(UsageError, match=rf"--distill-model .*{fetch}"):
        teacher = ["--distill-model=ViT-B-32", "--distill-pretrained=laion2b_s34b_b79k"]
        config = parse_args(["--train-data=x", "--distill=kd", *teacher])
        build_teachers(config, torch.device("cpu"))
    with pytest.raises(UsageError, match=r"python -m training\.prefetch timm:test_vit:r160_in1k$"):
        teacher = ["--distill-model=timm:test_vit", "--distill-pretrained=r160_in1k"]
        config = parse_args(["--train-data=x", "--distill=cifd", *teacher])
        build_teachers(config, torch.device("cpu"))
    with pytest.raises(UsageError, match=r"did you mean ViT-B-32"):
        models.load("ViT-B-33:laion2b_s34b_b79k", torch.device("cpu"))
    assert time.monotonic() - start < 10


def test_a_set_that_is_here_is_not_fetched_again(tmp_path):
    for folder in ("wds_imagenetv2", "flickr30k"):
        (tmp_path / folder / "test").mkdir(parents=True)
        (tmp_path / folder / "test" / "nshards.txt").write_text("1\n")
    sets = ["--datasets", "imagenetv2", "flickr30k", "--data-root", str(tmp_path)]
    assert prefetch.main(sets) == 0


def test_a_folder_in_the_way_of_a_set_is_named_before_anything_is_fetched(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(prefetch, "online", lambda: pytest.fail("asks for the network"))
    (tmp_path / "wds_imagenetv2" / "train").mkdir(parents=True)
    assert prefetch.main(["--datasets", "imagenetv2", "--data-root", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert f"{tmp_path}/wds_imagenetv2 is there without test/nshards.txt" in told


def test_a_job_that_asks_for_the_network_is_refused():
    child = os.fork()
    if child == 0:  # an audit hook stays for good
        prefetch.forbid_network()
        try:
            socket.create_connection(("127.0.0.1", 9))
        except PermissionError as error:
            os._exit(0 if "a job has no network" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_wrong_names_end_before_anything_is_fetched():
    with pytest.raises(UsageError, match="did you mean ViT-B-16"):
        prefetch.main(["ViT-B-17"])
    with pytest.raises(UsageError, match="neither a file nor a tag"):
        prefetch.main(["ViT-B-16:nothing"])
    with pytest.raises(UsageError, match="did you mean test_vit"):
        prefetch.main(["timm:test_vti:r160_in1k"])
    with pytest.raises(UsageError, match=r"is neither a file nor a tag .*r160_in1k"):
        prefetch.main(["timm:test_vit:r161"])
    with pytest.raises(UsageError, match="names no weights"):
        prefetch.main(["timm:test_vit"])
    with pytest.raises(UsageError, match="needs --data-root"):
        prefetch.main(["--datasets", "imagenetv2"])
    with pytest.raises(UsageError, match="does not exist"):
        prefetch.main(["local-dir:/nowhere"])
