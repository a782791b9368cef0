"""``--in-memory``: the loader's batches, looked up on the device instead of made anew."""

import numpy as np
import pytest
import torch

from runs import assert_bit_equal, final
from shards import Letters, sample, write_shards, write_tar
from training.cache_teacher import main as write_cache
from training.data.decode import BadSample
from training.data.in_memory import READ, Held, MemoryLoader
from training.data.index import index_shards
from training.data.loader import Fetcher, Loader, Reader, Recipe
from training.data.order import Order
from training.data.views import ImageSpec, View, train_view
from training.errors import Failure, UsageError
from training.main import main

CPU = torch.device("cpu")
SEED, BATCH, STEPS = 5, 6, 16  # three passes of 30 samples, and a bit


class Stored(Fetcher):
    """Two numbers of each row and view; nothing of row 4's second view."""

    def check(self, row, view):
        if (row, view) == (4, 1):
            raise BadSample("nothing stored")

    def __call__(self, rows, views):
        return {"teacher": torch.stack([rows, 10 * views], 1).half()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """30 samples in two shards, some of whose images or captions are broken."""
    folder = tmp_path_factory.mktemp("data")
    for shard in range(2):
        members = {}
        for i in range(15 * shard, 15 * shard + 15):
            members |= sample(f"{i:03d}", i)
            if i % 7 == 0:
                members[f"{i:03d}.jpg"] = b"no image"
            if i % 11 == 5:
                members |= {f"{i:03d}.txt": b"\xff", f"{i:03d}.json": b"{}"}
        write_tar(folder / f"{shard}.tar", members)
    return index_shards(str(folder))


def loader(kind, sources, rank=0, ranks=1, **options):
    where = {"device": CPU} if kind is MemoryLoader else {}
    order = options.pop("order", {})
    images = options.pop("views_of", [train_view(ImageSpec(8)), train_view(ImageSpec(4))])
    return kind(
        Order(sources, SEED, window=16, **order), sources, images, [Letters()],
        global_batch=BATCH, rank=rank, world_size=ranks, fetchers=[Stored()],
        **where, **({"views": 2, "seed": SEED, "captions": "all"} | options),
    )  # fmt: skip


def assert_same(found, expected):
    assert found.keys == expected.keys and found.skipped == expected.skipped
    for name in ("images", "texts", "rows", "views", "extras"):
        assert_bit_equal(getattr(found, name), getattr(expected, name), name)
    for image, other in zip(found.images, expected.images, strict=True):
        assert torch.equal(image, other)
        assert image.is_contiguous(memory_format=torch.channels_last)


ORDERS = {
    "all": {},
    "some": {"kept": np.arange(0, 30, 2)},
    "drawn": {"replacement": True},
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_its_batches_are_the_loaders_in_the_loaders_order(sources, order, ranks):
    replaced = 0
    for rank in range(ranks):
        options = {"rank": rank, "ranks": ranks, "order": ORDERS[order]}
        expected = list(loader(Loader, sources, **options).batches(0, STEPS))
        held = loader(MemoryLoader, sources, **options)
        found = list(held.batches(0, STEPS))
        assert len(found) == STEPS
        for batches in zip(found, expected):
            assert_same(*batches)
        assert_same(next(held.batches(9, 11)), expected[9])
        replaced += sum(sum(batch.skipped.values()) for batch in found)
        assert set(torch.cat([batch.views for batch in found]).tolist()) == {0, 1}
    assert replaced > 0


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_make_the_same_samples_and_are_gone_afterwards(sources):
    alone = list(loader(MemoryLoader, sources).batches(0, 3))
    helped = list(loader(MemoryLoader, sources, workers=2, start_method="fork").batches(0, 3))
    for batches in zip(helped, alone, strict=True):
        assert_same(*batches)
    assert not torch.multiprocessing.active_children()


def test_each_view_is_made_once_whatever_the_number_of_passes(sources):
    made = []

    def count(image):
        made.append(1)
        return image

    view = train_view(ImageSpec(8))
    counted = View((count, *view.stages), view.finish)
    held = MemoryLoader(
        Order(sources, SEED, kept=np.array([1, 2, 3])), sources, [counted], [Letters()],
        device=CPU, seed=SEED, global_batch=BATCH, views=2,
    )  # fmt: skip
    assert sum(len(batch) for batch in held.batches(0, STEPS)) == BATCH * STEPS
    assert len(made) == 3 * 2


def counting(sources, made, **options):
    """A `MemoryLoader` that notes each view it makes."""

    def count(image):
        made.append(1)
        return image

    view = train_view(ImageSpec(8))
    return loader(MemoryLoader, sources, views_of=[View((count, *view.stages))], **options)


def test_what_one_run_made_the_next_one_reads(sources, tmp_path):
    made, expected = [], list(loader(Loader, sources).batches(0, STEPS))
    for at_a_time in (READ, 1):  # one batch of each view; many, and the first of them empty
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("training.data.in_memory.READ", at_a_time)
            for _ in range(2):
                held = loader(MemoryLoader, sources, folder=tmp_path / str(at_a_time))
                for batches in zip(held.batches(0, STEPS), expected, strict=True):
                    assert_same(*batches)
    counts = []
    for _ in range(2):
        assert len(list(counting(sources, made, folder=tmp_path).batches(0, 2))) == 2
        counts.append(len(made))
    assert counts[1] == counts[0] > 0, "the second made some itself"


def test_other_samples_are_made_anew(sources, tmp_path):
    made = []
    others = ({}, {"order": {"kept": np.arange(4)}}, {"views": 3}, {"captions": "first"})
    for options in (*others, {"recipe": "other"}, {"seed": 6}):
        before = len(made)
        next(counting(sources, made, folder=tmp_path, **options).batches(0, 1))
        assert len(made) > before, options
    assert len(list(tmp_path.iterdir())) == 6


def test_nothing_is_kept_of_a_making_that_was_interrupted(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("training.data.in_memory.READ", 7)
    for calls in (1, 3):
        answers = [False] * calls
        held = loader(MemoryLoader, sources, folder=tmp_path)
        assert not list(held.batches(0, STEPS, stopping=lambda a=answers: not a or a.pop()))
        assert not list(tmp_path.iterdir())


def test_two_runs_that_make_the_same_samples_at_once_both_go_on(sources, tmp_path):
    both = [loader(MemoryLoader, sources, folder=tmp_path) for _ in range(2)]
    making = [held._made(stopping=None, timeout=None) for held in both]
    for batches in zip(*making, strict=True):
        for held, batch in zip(both, batches):
            held._held.add(batch)
    assert_same(*(next(held.batches(0, 1)) for held in both))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_ends_the_making_even_where_another_run_has_made_all(
    sources, tmp_path, monkeypatch
):
    monkeypatch.setattr("training.data.in_memory.READ", 7)
    late = loader(MemoryLoader, sources, folder=tmp_path)
    making = late._made(stopping=None, timeout=None)
    next(making)
    next(loader(MemoryLoader, sources, folder=tmp_path).batches(0, 1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.data.kept.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        list(making)


def test_of_several_ranks_one_keeps_and_all_read(sources, tmp_path):
    expected = [next(loader(Loader, sources, rank, 2).batches(0, 1)) for rank in range(2)]
    for rank, kept in ((1, 0), (0, 1), (1, 1)):
        held = loader(MemoryLoader, sources, rank, 2, folder=tmp_path)
        assert_same(next(held.batches(0, 1)), expected[rank])
        assert len(list(tmp_path.iterdir())) == kept, f"after rank {rank}"


def test_a_damaged_file_is_named(sources, tmp_path):
    next(loader(MemoryLoader, sources, folder=tmp_path).batches(0, 1))
    (folder,) = tmp_path.iterdir()
    path = next(folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Failure, match=rf"{path.name} is damaged: remove {folder}"):
        next(loader(MemoryLoader, sources, folder=tmp_path).batches(0, 1))


def test_a_signal_while_samples_are_made_ends_the_batches(sources):
    assert not list(loader(MemoryLoader, sources).batches(0, STEPS, stopping=lambda: True))


def test_data_of_which_nothing_can_be_used_end_in_a_failure(tmp_path):
    members = sample("a", 1) | sample("b", 2)
    write_tar(tmp_path / "0.tar", members | {"a.jpg": b"no image", "b.jpg": b"no image"})
    with pytest.raises(Failure, match=r"64 samples in a row cannot be used.*image: broken"):
        next(loader(MemoryLoader, index_shards(str(tmp_path))).batches(0, 1))


def test_more_than_memory_holds_is_refused_with_its_size(tmp_path):
    sources = index_shards(write_shards(tmp_path, [3]))
    reader = Reader(sources, Recipe([train_view(ImageSpec(224))], [Letters()]))
    held = Held(reader, (3, 1), 10**10, CPU)
    with pytest.raises(UsageError, match=r"10000000000 samples take \d+\.\d GiB on cpu"):
        held.add(reader.batch([0, 1, 2], [0, 0, 0]))


@pytest.mark.parametrize("stored", [[], ["--store-views"]], ids=["drawn", "stored"])
def test_a_run_from_a_cache_is_the_same_run_in_memory(stored, flags, teacher, tmp_path):
    cache = ["--teacher-cache", str(tmp_path / "cache")]
    made = [*flags, "--distill-model", teacher, "--views", "2", *stored, *cache]
    assert write_cache(made) == 0
    command = [*flags, *cache, "--epochs", "3", "--val-fraction", "0.2", "--logs", str(tmp_path)]
    for method in (["--distill", "clipkd"], ["--distill", "rdm", "--rates", "100"]):
        memory = ["--in-memory"]
        keeping = [*memory, "--in-memory-dir", str(tmp_path / method[1])]
        runs = {"read": [], "held": memory, "kept": keeping, "again": keeping}
        for name, more in runs.items():
            assert main([*command, *method, *more, "--name", f"{name}-{method[1]}"]) == 0
        read, *others = (final(tmp_path / f"{name}-{method[1]}") for name in runs)
        for other in others:
            assert_bit_equal(other, read)
        assert len(list((tmp_path / method[1]).iterdir())) == 1


def test_without_fixed_views_there_is_nothing_to_hold(flags, tmp_path):
    with pytest.raises(UsageError, match="--in-memory holds views that come again"):
        main([*flags, "--in-memory", "--logs", str(tmp_path)])
    with pytest.raises(UsageError, match="--in-memory-dir keeps what --in-memory makes"):
        main([*flags, "--in-memory-dir", str(tmp_path), "--logs", str(tmp_path)])
