"""docs/api.md says what the library does: its example runs, its signatures are the real ones."""

import inspect
import re

import pytest
from safetensors.torch import load_file

import cifd_clip
from test_layers import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text()
#: (name, its parameters as the page has them), at the start of a paragraph.
SIGNATURES = dict(re.findall(r"^`(\w+)\(([^)]*)\)`:", PAGE, re.MULTILINE))


def test_the_example_trains_both_stages_and_ships(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    scope = {"folder": tmp_path / "bank"}
    exec(code, scope)
    bank = load_file(tmp_path / "bank" / "bank.safetensors")
    assert any("image" in name for name in bank) and any("text" in name for name in bank)
    assert [teacher.weight for teacher in scope["teachers"]] == [1.0, 1.4, 1.4]
    assert {"image_rate_loss", "contrastive_loss"} < scope["losses"].keys()


def test_every_public_name_has_its_paragraph():
    named = {*SIGNATURES, *re.findall(r"^`(\w+)`:", PAGE, re.MULTILINE)}
    assert named == set(cifd_clip.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_on_the_page_is_the_real_one(name):
    parameters = list(inspect.signature(getattr(cifd_clip, name)).parameters)
    assert re.split(r",\s*", SIGNATURES[name]) == parameters
