"""What is written is there whole, or not at all, after a kill or a power cut."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cifd_clip import files


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch):
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    def rename(self: Path, target: Path) -> None:
        calls.append(("rename", target.name))
        os.replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    files.write_text(tmp_path / "note", "content")
    (_, temporary), *rest = calls
    assert temporary.startswith("note."), "the data reach the disk under their temporary name"
    assert rest == [("rename", "note"), ("sync", tmp_path.name)]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    files.write_text(tmp_path / "note", "old")
    with pytest.raises(RuntimeError), files.writing(tmp_path / "note") as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["note"]
    assert (tmp_path / "note").read_text() == "old"


def test_another_format_is_refused_in_a_sentence_that_names_both(tmp_path):
    files.write_json(tmp_path / "bank.json", {"rates": [1.0]}, version=1)
    assert files.read_json(tmp_path / "bank.json", version=1) == {"rates": [1.0]}
    with pytest.raises(files.BadFile, match=r"bank.json has format 1, .* reads format 2"):
        files.read_json(tmp_path / "bank.json", version=2)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000], ids=len)
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(files.BadFile, match=r"run\.json"):
        files.read_json(tmp_path / "run.json", version=1)


@pytest.mark.parametrize("content", [{}, {"views": None}, {"views": "2"}], ids=str)
def test_a_file_that_lacks_what_is_needed_of_it_is_named_with_the_key(tmp_path, content):
    files.write_json(tmp_path / "run.json", content, version=1)
    with pytest.raises(files.BadFile, match=r"run\.json is damaged: its 'views' is"):
        files.read_json(tmp_path / "run.json", version=1, views=int)


def test_tensors_can_be_read_by_whoever_may_read_the_folder(tmp_path):
    files.write_tensors(tmp_path / "w.safetensors", {"w": torch.arange(6.0).view(2, 3).t()})
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], torch.arange(6.0).view(2, 3).t())
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "w.safetensors").stat().st_mode == plain.stat().st_mode


def test_a_folder_appears_whole_with_everything_in_it_synced(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (synced.add(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd)),
    )
    with files.writing_folder(tmp_path / "runs" / "out") as folder:
        (folder / "part").mkdir()
        (folder / "part" / "note").write_text("content")
        assert not (tmp_path / "runs" / "out").exists()
    assert (tmp_path / "runs" / "out" / "part" / "note").read_text() == "content"
    new = {"note", "part", "out", "runs"}
    assert synced == {*new, tmp_path.name}, "and the folder in which a new one appears"
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["out"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "runs" / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_whose_block_fails_never_appears(tmp_path):
    with pytest.raises(RuntimeError), files.writing_folder(tmp_path / "out") as folder:
        (folder / "note").write_text("content")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff" * 64])
def test_damaged_tensors_are_named(content, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(content)
    for path in (tmp_path / "w.safetensors", tmp_path / "nowhere.safetensors"):
        with pytest.raises(files.BadFile, match=rf"{path.name} can't be read: "):
            files.read_tensors(path, {"w": torch.zeros(2)})
