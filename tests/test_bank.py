"""A stored bank is read back whole, for its own teacher, or refused in a sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cifd_clip import RDMBank
from cifd_clip.artefact import read_bank_config
from cifd_clip.files import BadFile
from cifd_clip.rdm import hidden_widths
from cifd_clip.teacher import weights_hash
from test_rdm import taught
from tiny import bank, pairs, teacher


def test_a_bank_is_the_same_after_save_and_load(tmp_path):
    owner = teacher()
    made = bank(owner, seed=5)
    made.save(tmp_path / "bank")
    loaded = RDMBank.load(tmp_path / "bank", owner.identity)
    assert loaded.config() == json.loads(json.dumps(made.config()))
    assert loaded.state_dict().keys() == made.state_dict().keys()
    for name, tensor in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    features = owner(*pairs(4))
    for a, b in zip(taught(made, features), taught(loaded, features)):
        assert torch.equal(a.image, b.image)
    assert sorted(p.name for p in (tmp_path / "bank").iterdir()) == [
        "bank.safetensors",
        "config.json",
    ]


def test_a_foreign_teacher_is_refused(tmp_path):
    owner, stranger = teacher(seed=1), teacher(seed=2)
    bank(owner).save(tmp_path)
    with pytest.raises(ValueError, match="was trained on tiny with weights") as refusal:
        RDMBank.load(tmp_path, stranger.identity)
    assert owner.weights[:12] in str(refusal.value)
    assert stranger.weights[:12] in str(refusal.value)


def test_a_missing_bank_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no RDM bank"):
        RDMBank.load(tmp_path, teacher().identity)


def test_a_bank_says_what_it_is_before_torch_is_needed(tmp_path):
    owner = teacher()
    bank(owner, rates=(300.0, 7.0)).save(tmp_path)
    config = read_bank_config(tmp_path)
    assert config["task"] == "clip" and config["rates"] == [300.0, 7.0]
    assert config["teacher"]["weights"] == owner.weights and config["hidden"] == 3 * [owner.dim]


DAMAGE = {
    "task": "classifier",
    "teacher": {"model": "tiny"},
    "rates": [1000.0, float("nan")],
    "dim": 1 << 40,
    "hidden": [48, 48],
    "scale": -1.0,
    "classes": 1.5,
    "form": "repeat",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_configuration_is_refused_and_names_its_file(name, tmp_path):
    owner = teacher()
    bank(owner).save(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {name: DAMAGE[name]}))
    with pytest.raises(BadFile, match=r"config\.json is damaged"):
        RDMBank.load(tmp_path, owner.identity)
    del config[name]
    file.write_text(json.dumps(config))
    with pytest.raises(BadFile, match=r"config\.json is damaged"):
        RDMBank.load(tmp_path, owner.identity)


def test_another_format_is_refused(tmp_path):
    owner = teacher()
    bank(owner).save(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(BadFile, match=r"config\.json has format 2, .* reads format 1"):
        RDMBank.load(tmp_path, owner.identity)


def test_weights_that_are_not_those_described_are_refused(tmp_path):
    owner = teacher()
    bank(owner).save(tmp_path)
    file = tmp_path / "bank.safetensors"
    tensors = load_file(file)
    name = "image.weights.0"

    def refused(tensor: torch.Tensor, message: str) -> None:
        save_file(tensors | {name: tensor}, file)
        with pytest.raises(BadFile, match=rf"bank\.safetensors.*{message}"):
            RDMBank.load(tmp_path, owner.identity)

    whole = tensors[name]
    refused(whole[:1].contiguous(), "other tensors")
    refused(whole.half(), "float16")
    refused(whole.index_fill(0, torch.tensor([1]), float("inf")), "not finite")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BadFile, match="can't be read"):
        RDMBank.load(tmp_path, owner.identity)


def test_what_a_configuration_describes_is_not_allocated_before_the_weights_agree(tmp_path):
    """A bank of these widths would need 2⁵⁰ bytes."""
    owner = teacher()
    bank(owner).save(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"hidden": 3 * [1 << 16], "rates": list(range(1, 1024))}
    file.write_text(json.dumps(config))
    with pytest.raises(BadFile, match="other tensors"):
        RDMBank.load(tmp_path, owner.identity)


@pytest.mark.parametrize(
    ("hidden", "form", "widths"),
    [
        (None, "reconstruct", (48, 48, 48)),
        (None, "classify", (512, 306, 100)),
        (20, "reconstruct", (20, 48, 20)),
        ([20], "classify", (20, 48, 20)),
        ([20, 12, 8], "reconstruct", (20, 12, 8)),
    ],
)
def test_one_width_is_of_the_hidden_layers_and_three_are_of_each(hidden, form, widths):
    assert tuple(hidden_widths(hidden, 48, form)) == widths
    with pytest.raises(ValueError, match="expected one width or three"):
        hidden_widths([1, 2], 48, form)


def test_a_teachers_identity_follows_every_weight():
    owner = teacher()
    before = owner.identity
    with torch.no_grad():
        owner.model.ln_final.bias[0] += 1e-7
    assert weights_hash(owner.model) != before["weights"]
    assert teacher().identity == before
