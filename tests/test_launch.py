"""Several processes, launched as torchrun and srun launch them, are one run."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from cifd_clip import World
from eval.benchmark import Place
from runs import ROOT, final, lines
from shards import encode, picture, write_tar
from training.engine.checkpoint import Checkpoints
from training.engine.config import ProcessConfig
from training.engine.control import STOPPED_EXIT, barrier, start_processes
from training.errors import Failure, UsageError
from training.main import main


def launch(
    command: list[str],
    log: Path,
    ranks: int = 2,
    module: str = "training.main",
    own: dict[int, list[str]] | None = None,
) -> list[subprocess.Popen]:
    """One process a rank, with the variables that torchrun and srun both end in.

    ``own``: what some ranks' command lines have besides.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *command, *(own or {}).get(rank, [])],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1",
                "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
            cwd=ROOT,
            stderr=open(f"{log}.{rank}", "w"),
        )
        for rank in range(ranks)
    ]  # fmt: skip


def test_two_ranks_stopped_by_a_signal_to_one_go_on_as_one_rank_with_the_same_losses(
    flags, teacher, bank, tmp_path
):
    command = [*flags, "--distill", "cifd", "--distill-model", teacher, "--rdm-bank", str(bank)]
    command += ["--epochs", "30", "--logs", str(tmp_path), "--save-frequency", "0"]
    assert main([*command, "--name", "alone"]) == 0
    shared = [*command, "--name", "shared", "--batch-size", "12"]
    ranks = launch(shared, tmp_path / "log")
    metrics = tmp_path / "shared" / "metrics.jsonl"
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 5):
        assert all(rank.poll() is None for rank in ranks), (tmp_path / "log.0").read_text()
        time.sleep(0.02)
    ranks[1].send_signal(signal.SIGUSR1)
    codes = [rank.wait(timeout=60) for rank in ranks]
    assert codes == [STOPPED_EXIT, STOPPED_EXIT], (tmp_path / "log.0").read_text()
    stopped = final(tmp_path / "shared")["progress"]["step"]
    assert 5 < stopped < 120, "stopped in the middle"
    assert main([*command, "--name", "shared", "--resume", "latest"]) == 0
    alone, shared = lines(tmp_path / "alone"), lines(tmp_path / "shared")
    assert [row["step"] for row in shared] == [row["step"] for row in alone]
    for a, b in zip(alone, shared):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3), f"step {a['step']}"


def test_samples_that_two_ranks_skipped_are_counted_across_a_stop(flags, tmp_path):
    """Between log lines too: here there is none before the end."""
    pairs = {f"{i:03}": {"jpg": encode(picture(i)), "txt": b"a caption"} for i in range(96)}
    for i in range(0, 96, 6):
        pairs[f"{i:03}"]["jpg"] = b"no image"
    members = {f"{key}.{kind}": data for key, pair in pairs.items() for kind, data in pair.items()}
    data = write_tar(tmp_path / "0.tar", members)
    command = [*flags, "--train-data", str(data), "--logs", str(tmp_path), "--epochs", "20"]
    command += ["--max-bad-fraction", "1", "--log-every-n-steps", "0", "--save-frequency", "0"]
    assert main([*command, "--name", "alone"]) == 0
    shared = [*command, "--name", "shared", "--batch-size", "12"]
    ranks = launch(shared, tmp_path / "log")
    metrics = tmp_path / "shared" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size):
        assert all(rank.poll() is None for rank in ranks), (tmp_path / "log.0").read_text()
        time.sleep(0.02)
    ranks[0].terminate()
    assert [rank.wait(timeout=60) for rank in ranks] == [STOPPED_EXIT] * 2
    assert 0 < final(tmp_path / "shared")["progress"]["step"] < 80
    assert main([*command, "--name", "shared", "--resume", "latest"]) == 0
    alone, shared = (final(tmp_path / run)["progress"] for run in ("alone", "shared"))
    assert shared["skipped"] == alone["skipped"] and sum(alone["skipped"].values()) >= 16 * 20


def test_ranks_that_see_other_folders_do_not_go_on_from_other_checkpoints(flags, tmp_path):
    command = [*flags, "--logs", str(tmp_path / "shared"), "--name", "run"]
    assert main(command) == 0
    (tmp_path / "shared" / "run" / "finished.json").unlink()
    command += ["--batch-size", "12", "--resume", "latest"]
    ranks = launch(command, tmp_path / "log", own={1: ["--logs", str(tmp_path / "of its node")]})
    assert [rank.wait(timeout=300) for rank in ranks] == [Failure.exit_code] * 2
    told = (tmp_path / "log.1").read_text()
    assert "can't be read by process 1" in told and "one folder for all nodes" in told


def late(rank: int, rendezvous: str) -> None:
    short = timedelta(seconds=2)
    dist.init_process_group("gloo", f"file://{rendezvous}", short, world_size=2, rank=rank)
    time.sleep(2 * short.total_seconds() * rank)
    barrier(World(rank, 2))


def test_processes_wait_for_one_that_is_later_than_the_time_limit(tmp_path):
    mp.start_processes(late, (str(tmp_path / "rendezvous"),), nprocs=2, start_method="spawn")


def test_torchrun_trains_the_bank_and_the_student_in_one_go(flags, teacher, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*flags, "--distill", "cifd", "--distill-model", teacher, "--rates", "100"]
    command += ["--rdm-epochs", "1", "--batch-size", "12", "--logs", str(tmp_path)]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", "2", "-m", "--", "training.main", *command, "--name=run"],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "rdm" / "finished.json").is_file()
    assert (tmp_path / "run" / "student" / "open_clip_model.safetensors").is_file()


def workers(rank: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"resource_tracker" not in
            Path(f"/proc/{pid}/cmdline").read_bytes()]  # fmt: skip


def test_ranks_of_which_one_has_a_stopped_worker_leave_within_a_minute_of_a_signal(flags, tmp_path):
    command = [*flags, "--batch-size", "12", "--workers", "1", "--epochs", "9999"]
    command += ["--logs", str(tmp_path), "--name", "run", "--save-every-n-steps", "1"]
    ranks = launch(command, tmp_path / "log")
    try:
        while not (tmp_path / "run" / "checkpoints.json").is_file():
            assert all(rank.poll() is None for rank in ranks), (tmp_path / "log.0").read_text()
            time.sleep(0.02)
        for worker in workers(ranks[1]):
            os.kill(worker, signal.SIGSTOP)
        time.sleep(5)
        for rank in ranks:
            rank.terminate()
        assert [rank.wait(timeout=60) for rank in ranks] == [STOPPED_EXIT] * 2
    finally:
        for rank in ranks:
            rank.kill()
    assert Checkpoints(tmp_path / "run" / "checkpoints").newest()


@pytest.mark.parametrize("signalled", [True, False])
def test_a_process_whose_data_do_not_come_is_left_by_all_with_the_last_checkpoint_whole(
    signalled, flags, scenes, tmp_path
):
    (shard,) = (scenes / "train").glob("*.tar")
    dead = tmp_path / "dead"
    shards = f"pipe:cat {shard}::pipe:test -e {dead} && sleep 999; cat {shard}"
    command = [*flags, "--train-data", shards, "--train-num-samples", "96", "--batch-size", "12"]
    command += ["--logs", str(tmp_path), "--name", "run", "--epochs", "9999"]
    command += ["--save-every-n-steps", "1", "--data-timeout", "60" if signalled else "5"]
    ranks = launch(command, tmp_path / "log")
    logs = [tmp_path / f"log.{rank}" for rank in (0, 1)]
    try:
        while not (tmp_path / "run" / "checkpoints.json").is_file():
            assert all(rank.poll() is None for rank in ranks), logs[0].read_text()
            time.sleep(0.02)
        dead.touch()
        start = time.monotonic()
        if signalled:
            time.sleep(5)
            for rank in ranks:
                rank.terminate()
        codes = [rank.wait(timeout=60) for rank in ranks]
        assert time.monotonic() - start < 60
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [STOPPED_EXIT if signalled else Failure.exit_code] * 2
    what = (
        "SIGTERM: data don't come" if signalled else r"no batch for 5 seconds: data worker \d+ re"
    )
    for log in logs:
        assert re.search(f"error: process [01]: {what}", log.read_text())
    assert Checkpoints(tmp_path / "run" / "checkpoints").newest()


@pytest.mark.parametrize(
    "environment",
    [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "5"}, {"WORLD_SIZE": "x", "RANK": "0"}],
    ids=str,
)
@pytest.mark.parametrize("read", [lambda: start_processes(ProcessConfig()), Place.of_process])
def test_a_process_without_a_place_in_its_group_is_refused_before_it_waits(
    read, environment, monkeypatch
):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"LOCAL_RANK": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"WORLD_SIZE is '.*' and RANK '.*' in the environment"):
        read()
