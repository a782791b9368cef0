"""Commands as child processes: forked from a process with the imports, and yet as `python -m`."""

import json
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest

from training import children
from training.stopping import SIGNALS

COMMAND = """
import json, multiprocessing, os, sys, time
from pathlib import Path
imported = "training.clip.run" in sys.modules
import torch
from training.engine.environment import origin
print("said")
print("complained", file=sys.stderr)
found = dict(imported=imported, command=origin()["command"], folder=os.getcwd(), name=__name__)
found |= dict(threads=torch.get_num_threads(), own=os.getsid(0) == os.getpid())
found |= dict(environment=dict(os.environ), workers=multiprocessing.get_start_method())
Path(sys.argv[1]).write_text(json.dumps(found))
while sys.argv[2] == "wait":
    time.sleep(0.05)
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "some_command.py").write_text(COMMAND)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def start(how: str, threads: int = 1):
        found = tmp_path / "found.json"
        found.unlink(missing_ok=True)
        log = tmp_path / "logs" / "one.log"
        process = children.start(["-m", "some_command", str(found), how], threads, log)
        return process, found

    return start


def until_written(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.is_file():
        assert time.monotonic() < deadline, f"{path} is not written"
        time.sleep(0.05)


def test_a_child_is_the_command_it_was_given_without_its_imports(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("OF_THE_PARENT", "now")
    process, found = run("75", threads=2)
    process.join()
    assert process.exitcode == 75
    told = json.loads(found.read_text())
    assert told["imported"], "the server has imported what takes seconds"
    assert told["command"] == f"python -m some_command {found} 75"
    assert told["name"] == "__main__" and told["own"], "a session of its own"
    assert told["folder"] == str(tmp_path) and told["threads"] == 2
    assert told["workers"] == multiprocessing.get_start_method(), "a loader's, as of any process"
    environment = told["environment"]
    assert environment["OF_THE_PARENT"] == "now" and "WORLD_SIZE" not in environment
    assert environment.items() >= children.KEEP_MEMORY.items()
    assert os.environ["WORLD_SIZE"] == "4", "the parent's own environment is as it was"
    said = (tmp_path / "logs" / "one.log").read_text()
    assert "said" in said and "complained" in said


def test_signals_end_a_child_but_not_the_server_it_is_forked_from(run):
    process, found = run("wait")
    until_written(found)
    server = forkserver._forkserver._forkserver_pid
    for number in SIGNALS:
        os.kill(server, number)
    process.terminate()
    process.join()
    assert process.exitcode == -signal.SIGTERM
    process, found = run("0")
    process.join()
    assert process.exitcode == 0 and forkserver._forkserver._forkserver_pid == server


def test_an_orphan_is_ended_and_no_other_process_of_its_number(run):
    process, found = run("wait")
    until_written(found)
    begin = children.started(process.pid)
    children.end_orphan(process.pid, begin + "0")
    assert process.exitcode is None, "one that began at another time is another"
    children.end_orphan(process.pid, begin)
    process.join()
    assert process.exitcode == -signal.SIGTERM
    children.end_orphan(process.pid, begin)


def test_a_process_that_has_ended_and_is_not_reaped_is_gone():
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {})
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.02)
    assert children.started(pid) is None
    os.waitpid(pid, 0)
