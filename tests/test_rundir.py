"""Run directories: a run goes on with the configuration that it began with."""

import json

import pytest

from training.classifier import flags as classify_params
from training.engine.run import RunDirectory
from training.errors import UsageError


def test_other_rates_of_its_bank_make_another_classifier(tmp_path):
    parser = classify_params.parser()
    common = ["--model=cnn2", "--method=cifd", "--teacher=a", "--rdm-bank=b", "--data=c"]

    def config(*flags):
        return classify_params.run_config(classify_params.parse_args([*common, *flags]))

    begun = config("--rates", "50", "150")
    (tmp_path / "config.json").write_text(json.dumps(begun))
    RunDirectory(tmp_path, begun, parser, resume=True)
    with pytest.raises(UsageError, match=r"--rates was \[50.0, 150.0\], now \[20.0\]"):
        RunDirectory(tmp_path, config("--rates", "20"), parser, resume=True)
