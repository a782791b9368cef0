"""The one runner of studies: order, going on, stopping, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from experiments.study import (
    STOPPED,
    Run,
    Study,
    duration,
    output,
    priorities,
    read_results,
    write_result,
)
from runs import ROOT
from training.engine.control import STOPPED_EXIT
from training.errors import Failure, UsageError


def timed(name: str, code: str, **other) -> Run:
    """A run of some Python: of any module's command line, this one takes code."""
    return Run(name, "timeit", ("-n1", "-r1", code), **other)


def study(tmp_path: Path, *runs: Run, **other) -> Study:
    return Study(runs, tmp_path / "logs", **other)


def test_a_run_needs_the_runs_that_its_flags_name_and_stands_in_their_directories():
    run = Run(
        "c", "m", ("--a={a}/x,{b.1}", "{a}"), where=("--at={here}", "{data}/{0..3}", "{name}")
    )
    assert run.needs == ("a", "b.1")
    words = Study([run], Path("L"), Path("D")).command(run)
    assert words == ["-m", "m", "--at=L/c", "D/{0..3}", "c", "--a=L/a/x,L/b.1", "L/a"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_is_needed_comes_first_and_a_finished_run_is_left_alone(jobs, tmp_path, capsys):
    kept: list[str] = []
    log = tmp_path / "log"
    note = f"open({str(log)!r}, 'a').write"
    runs = [timed("a", f"{note}('a')"), timed("b", f"'{{a}}'; {note}('b')")]
    whole = study(tmp_path, *runs, keep=lambda _, run: kept.append(run.name))
    assert whole.execute(jobs) and log.read_text() == "ab" and kept == ["a", "b"]
    started = json.loads((tmp_path / "logs" / "a" / "study.json").read_text())
    assert started["command"].startswith("python -m timeit ") and started["commit"]
    assert json.loads((tmp_path / "logs" / "a" / "finished.json").read_text())["seconds"] > 0
    assert "b is finished after " in capsys.readouterr().out
    assert whole.execute(jobs) and log.read_text() == "ab" and kept == ["a", "b"] * 2


def test_a_failure_is_told_in_its_last_words_and_stops_the_others(tmp_path):
    slow = timed("slow", "import time; time.sleep(60)")
    begin = time.monotonic()
    with pytest.raises(Failure, match=r"c failed: ZeroDivisionError: .* \(.*c\.log\)"):
        study(tmp_path, slow, timed("c", "1 / 0")).execute(2)
    assert time.monotonic() - begin < 30, "the run beside it was waited for"
    assert not (tmp_path / "logs" / "c" / "finished.json").exists()
    assert study(tmp_path, timed("c", "1 / 0")).outstanding(), "it is not taken for finished"
    with pytest.raises(Failure, match="python -m timeit failed: ZeroDivisionError"):
        output("timeit", "1 / 0")


STOPPABLE = """
import os, pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1])
def main(argv):
    if (place / "saved").exists():
        return 0
    signal.signal(signal.SIGTERM, lambda *_: ((place / "saved").touch(), sys.exit(os.EX_TEMPFAIL)))
    (place / "ready").touch()
    time.sleep(60)
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""
STUDY = """
import pathlib, sys
from experiments.study import STOPPED, Run, Study
place = pathlib.Path(sys.argv[1])
runs = [Run("a", "stoppable", (str(place),)), Run("b", "stoppable", (str(place), "{a}"))]
sys.exit(0 if Study(runs, place / "logs").execute(2) else STOPPED)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_study_lets_its_runs_save_and_goes_on(number, tmp_path):
    (tmp_path / "stoppable.py").write_text(STOPPABLE)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    command = [sys.executable, "-c", STUDY, str(tmp_path)]
    heard = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    first = subprocess.Popen(command, env=environment, preexec_fn=heard)
    while not (tmp_path / "ready").exists():
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(number)
    assert first.wait(timeout=60) == STOPPED == STOPPED_EXIT
    assert (tmp_path / "saved").exists() and not list(tmp_path.rglob("finished.json"))
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    assert len(list(tmp_path.rglob("finished.json"))) == 2


def test_a_signal_that_comes_while_a_run_is_started_reaches_it(tmp_path):
    (tmp_path / "stoppable.py").write_text(STOPPABLE)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    first = subprocess.Popen([sys.executable, "-c", STUDY, str(tmp_path)], env=environment)
    while not (tmp_path / "logs" / "a" / "study.json").exists():  # written just before
        assert first.poll() is None
        time.sleep(0.01)
    first.terminate()
    assert first.wait(timeout=50) == STOPPED, "the run, which takes a minute, was waited for"


def results_of(whole: Study) -> list[Path]:
    return [path for run in whole.runs.values() for path in whole.kept(run).values()]


def test_a_run_with_a_result_is_executed_again_only_for_what_it_left_in_the_logs(tmp_path):
    runs = [
        Run("teacher", "m", (), results=("",)),
        Run("bank", "m", ("{teacher}",), results=("_R1", "_R2")),
        Run("student", "m", ("{teacher}", "{bank}"), results=("",)),
    ]
    whole = study(tmp_path, *runs, results=tmp_path)
    for run in runs:
        for path in whole.kept(run).values():
            write_result(path, {"flags": list(run.flags)})
    assert [path.name for path in results_of(whole)] == [
        "teacher.json", "bank_R1.json", "bank_R2.json", "student.json",
    ]  # fmt: skip
    assert list(read_results(tmp_path)) == ["bank_R1", "bank_R2", "student", "teacher"]
    assert whole.outstanding() == [] and "all 4 results are in" in whole.complete()
    (tmp_path / "runs" / "student.json").unlink()
    assert whole.outstanding() == runs and whole.complete() is None
    whole.begin(runs[0], "c0ffee")
    whole.end(runs[0], 1.0)
    assert whole.outstanding() == runs[1:]


def test_results_and_runs_of_other_settings_are_refused(tmp_path):
    run = Run("a", "m", ("--lr=1",), results=("",))
    whole = study(tmp_path, run, results=tmp_path)
    whole.begin(run, None)
    write_result(tmp_path / "runs" / "a.json", {"flags": ["--lr=1"]})
    whole.check()
    write_result(tmp_path / "runs" / "a.json", {"flags": ["--lr=2"]})
    with pytest.raises(UsageError, match=r"runs/a.json \(1 in all\) were made with other settings"):
        whole.check()
    (tmp_path / "runs" / "a.json").unlink()
    other = study(tmp_path, Run("a", "m", ("--lr=3",), where=("--x",), results=("",)))
    with pytest.raises(UsageError, match=r"logs/a/study.json \(1 in all\)"):
        other.execute(1)


def test_the_longest_chain_comes_first_and_the_time_left_is_told_in_words():
    runs = [Run("a", "m", (), cost=1), Run("b", "m", (), cost=5), Run("c", "m", ("{a}",), cost=6)]
    assert priorities(runs) == {"a": 7, "b": 5, "c": 6}
    assert [duration(minutes) for minutes in (0.5, 3.2, 125)] == ["30 s", "3 min", "2 h 05 min"]
