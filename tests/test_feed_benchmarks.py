"""What measures a cache from end to end runs here too, small."""

import json

from benchmarks import cache
from runs import CONFIGS


def test_a_cache_is_written_and_read_by_runs_that_take_turns(tmp_path):
    out = tmp_path / "cache.json"
    models = ["--teacher=tiny-teacher", "--student=tiny-student", "--model-config", *CONFIGS]
    size = ["--images=48", "--steps=10", "--batch-size=16", "--workers=0", "--rounds=1"]
    cache.main(["--store-views", *models, *size, "--device=cpu", f"--json={out}"])
    figures = json.loads(out.read_text())
    assert figures["written"]["embedded / bare teacher"] > 0
    assert min(figures["written"][f"{what} per s"] for what in ("views stored", "embedded")) > 0
    assert figures["runs"].keys() == set(cache.RUNS)
    for (run,) in figures["runs"].values():
        assert run["samples_per_s"] > 0 and 0 <= run["data_wait"] <= 1
    assert figures["ratios"].keys() == cache.COMPARED.keys()
