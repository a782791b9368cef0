"""The command for a machine with a GPU runs here too, small: every stage leaves its figures."""

import json

import torch

from benchmarks.gpu.__main__ import STAGES, main


def test_every_stage_leaves_its_figures_and_the_table_has_every_form(tmp_path, capsys):
    with torch.compiler.set_stance("force_eager"):
        main(["--out", str(tmp_path), "--rounds", "1", "--batch-size", "8", "--minutes", "5"])
    figures = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in STAGES}
    assert not any("error" in own for own in figures.values())
    assert len(list(tmp_path.iterdir())) <= 8, "more files than some machines give back"
    for method, away in figures["correct"]["to_cpu_fp32"].items():
        assert away["fp32"] == {"loss": 0, "gradient": 0}, f"{method} differs from itself"
    assert figures["correct"]["resumed"] == {"none": 0, "cifd": 0}
    assert figures["correct"]["infinite_gradient"] == {
        "weights_kept": True, "counted": 1, "goes_on": True,
    }  # fmt: skip
    (student,) = figures["steps"]["students"].values()
    for form in ("before", "default", "compiled"):
        for way in ("cached", "live"):
            assert student[form][way]["to_fd"]["cifd"]["median"] > 0
    shown = capsys.readouterr().out
    assert shown.count("tiny-gap10-vit") == 6 and "cifd / fd" in shown


def test_a_stage_whose_time_is_up_keeps_what_it_has(tmp_path):
    main(["--out", str(tmp_path), "--stages", "card", "density", "--minutes", "0"])
    for name in ("card", "density"):
        figures = json.loads((tmp_path / f"{name}.json").read_text())
        assert figures["error"] == "its time was up" and "environment" in figures
