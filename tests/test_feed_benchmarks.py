"""What measures a cache from end to end runs here too, small."""

import json

from benchmarks import cache
from runs import CONFIGS


def test_a_cache_is_written_and_read_end_to_end(tmp_path):
    out = tmp_path / "cache.json"
    models = ["--teacher=tiny-teacher", "--student=tiny-student", "--model-config", *CONFIGS]
    size = ["--images=48", "--steps=10", "--batch-size=16", "--workers=0"]
    cache.main(["--end-to-end", *models, *size, "--device=cpu", f"--json={out}"])
    figures = json.loads(out.read_text())
    assert figures["embedded / bare teacher"] > 0 and 0 <= figures["data wait"] <= 1
    assert min(figures[f"{what} per s"] for what in ("views stored", "embedded", "trained")) > 0
