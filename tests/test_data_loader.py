"""The global batches do not depend on ranks, workers, start methods or interruptions."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from shards import Letters, encode, picture, sample, write_shards, write_tar
from training.data.batch import Batch, Chunks, assembled, chunk_rows
from training.data.decode import BadSample, Caps
from training.data.index import index_shards
from training.data.loader import Fetcher, Loader, sequential
from training.data.order import Order
from training.data.views import ImageSpec, eval_view, train_view
from training.errors import Failure

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SPEC = ImageSpec(size=8)
SEED, BATCH, STEPS = 5, 6, 6  # an epoch: 6 steps of 6 of the 40 samples


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return index_shards(write_shards(tmp_path_factory.mktemp("good"), [9, 14, 1, 16]))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """30 samples, each third with a broken image."""
    folder = tmp_path_factory.mktemp("damaged")
    members = {}
    for i in range(30):
        members |= sample(f"{i:03d}", i)
        if i % 3 == 0:
            members[f"{i:03d}.jpg"] = b"no image"
    write_tar(folder / "0.tar", members)
    return index_shards(str(folder))


def global_batches(sources, start, stop, ranks=1, workers=0, start_method="fork"):
    """Steps [start, stop) as (keys, pixels, tokens, skipped) over all ranks, from fresh loaders."""
    order = Order(sources, SEED, window=16)
    parts = []
    for rank in range(ranks):
        loader = Loader(
            order,
            sources,
            [train_view(SPEC)],
            [Letters()],
            seed=SEED,
            global_batch=BATCH,
            captions="all",
            rank=rank,
            world_size=ranks,
            workers=workers,
            start_method=start_method,
        )
        parts.append(list(loader.batches(start, stop)))
        loader.close()
    return [
        (
            [key for batch in step for key in batch.keys],
            torch.cat([batch.images[0] for batch in step]),
            torch.cat([batch.texts[0] for batch in step]),
            sum(sum(batch.skipped.values()) for batch in step),
        )
        for step in zip(*parts)
    ]


def assert_same(found, expected):
    assert [batch[0] for batch in found] == [batch[0] for batch in expected]
    for (keys, pixels, tokens, skipped), (_, *others) in zip(found, expected):
        assert torch.equal(pixels, others[0]), f"other pixels for {keys}"
        assert torch.equal(tokens, others[1]), f"other captions for {keys}"
        assert skipped == others[2]


@pytest.fixture(scope="module")
def uninterrupted(sources):
    return global_batches(sources, 0, 2 * STEPS + 2)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 1), (3, 2)])
def test_stopped_at_any_step_and_resumed_elsewhere_the_batches_go_on(
    sources, uninterrupted, ranks, workers
):
    before = global_batches(sources, 0, STEPS, ranks=2, workers=3)
    for stop in range(STEPS + 1):  # the last one is the boundary of the epoch
        after = global_batches(sources, stop, STEPS + 2, ranks, workers)
        assert_same(before[:stop] + after, uninterrupted[: STEPS + 2])


def test_stopped_twice_in_one_epoch_the_batches_go_on(sources, uninterrupted):
    found = global_batches(sources, 0, 2, 2, 3)
    found += global_batches(sources, 2, 5, 3, 1)
    found += global_batches(sources, 5, 2 * STEPS + 2, 1, 2)
    assert_same(found, uninterrupted)


def test_each_sample_is_seen_once_per_pass_across_epochs(sources, uninterrupted):
    seen = [key for keys, *_ in uninterrupted for key in keys]  # 84: two passes of 40 and a bit
    assert len(set(seen[:40])) == len(set(seen[40:80])) == 40
    assert {len(batch[0]) for batch in uninterrupted} == {BATCH}


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_of_any_start_method_make_the_same_batches(sources, uninterrupted, method):
    found = global_batches(sources, 1, 3, workers=1, start_method=method)
    assert_same(found, uninterrupted[1:3])


def test_one_loader_serves_epoch_after_epoch(sources, uninterrupted):
    loader = Loader(
        Order(sources, SEED, window=16), sources, [], [Letters()],
        seed=SEED, global_batch=BATCH, captions="all", workers=2, start_method="fork",
    )  # fmt: skip
    pids = []
    for epoch in range(2):
        steps = range(epoch * STEPS, (epoch + 1) * STEPS)
        keys = [batch.keys for batch in loader.batches(steps.start, steps.stop)]
        assert keys == [uninterrupted[step][0] for step in steps]
        pids.append([worker.pid for worker in loader._loader._iterator._workers])
    assert pids[0] == pids[1], "the workers live on"
    loader.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids[0]), "and end with the loader"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_left_in_mid_epoch_starts_again_where_told(sources, uninterrupted, workers):
    loader = Loader(
        Order(sources, SEED, window=16), sources, [], [Letters()],
        seed=SEED, global_batch=BATCH, workers=workers, start_method="fork" if workers else None,
    )  # fmt: skip
    next(loader.batches(0, STEPS))
    keys = [batch.keys for batch in loader.batches(3, 5)]
    loader.close()
    again = [batch.keys for batch in loader.batches(4, 5)]
    loader.close()
    assert keys + again == [uninterrupted[step][0] for step in (3, 4, 4)]


def test_signals_to_the_job_do_not_stop_its_workers(sources):
    hits = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: hits.append(os.getpid()))
    try:
        loader = Loader(
            Order(sources, SEED), sources, [], [Letters()],
            seed=SEED, global_batch=2, workers=2, start_method="fork",
        )  # fmt: skip
        batches = loader.batches(0, 20)
        keys = next(batches).keys
        for worker in loader._loader._iterator._workers:
            for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
                os.kill(worker.pid, number)
        for batch in batches:
            keys += batch.keys
        loader.close()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert len(keys) == 40 and hits == []


FAILS = """
import sys
from shards import Letters
from training.data.index import index_shards
from training.data.loader import Loader
from training.data.order import Order

sources = index_shards(sys.argv[1])
loader = Loader(Order(sources, 0), sources, [], [Letters()], seed=0, global_batch=2, workers=2,
                start_method="fork")
batches = loader.batches(0, 20)
next(batches)
raise SystemExit("the run fails here")
"""


def test_a_run_that_fails_leaves_no_worker_behind(sources):
    # workers that ignore SIGTERM would keep a process that exits without closing them for ever
    folder = str(Path(sources.shards[0].path).parent)
    run = subprocess.run(
        [sys.executable, "-c", FAILS, folder],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([".", "tests"])},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stderr.strip().splitlines()[-1]) == (1, "the run fails here")


def test_a_bad_sample_is_replaced_the_same_way_everywhere(damaged):
    alone = global_batches(damaged, 0, 10)
    assert_same(global_batches(damaged, 0, 10, ranks=3, workers=2), alone)
    assert_same(global_batches(damaged, 4, 10, ranks=2), alone[4:])
    keys = [key for keys, *_ in alone for key in keys]
    assert len(keys) == 60 and all(int(key) % 3 for key in keys)
    assert sum(batch[3] for batch in alone) >= 20, "each bad sample is counted, in both passes"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_made_in_chunks_is_the_batch_made_at_once(damaged, workers, monkeypatch):
    """384 rows of one rank are three chunks; of two ranks, one each, as 192 has a divisor."""

    def batches(ranks, start=0):
        parts = []
        for rank in range(ranks):
            loader = Loader(
                Order(damaged, SEED), damaged, [train_view(SPEC)], [Letters()],
                seed=SEED, global_batch=384, rank=rank, world_size=ranks, workers=workers,
                start_method="fork" if workers else None,
            )  # fmt: skip
            parts.append(list(loader.batches(start, 2)))
            loader.close()
        return [Batch.joined(step) for step in zip(*parts)]

    assert (chunk_rows(384), chunk_rows(192)) == (128, 192)
    whole = batches(ranks=2)
    for found in (batches(ranks=1), whole[:1] + batches(ranks=1, start=1)):
        for one, other in zip(found, whole, strict=True):
            assert len(one) == 384 and vars(one).keys() == vars(other).keys()
            assert (one.keys, one.skipped) == (other.keys, other.skipped)
            assert torch.equal(one.images[0], other.images[0])
            assert torch.equal(one.texts[0], other.texts[0])
            assert torch.equal(one.rows, other.rows) and torch.equal(one.views, other.views)


def test_a_pinned_batch_is_put_together_where_it_goes(sources):
    loader = Loader(Order(sources, SEED), sources, [], [Letters()], seed=SEED, global_batch=256)
    (whole,) = loader.batches(0, 1)
    (chunks,) = assembled(iter(whole.split(2)), 2, pinned=True)
    assert isinstance(chunks, Chunks) and len(chunks) == 256
    assert torch.equal(chunks.to("cpu").texts[0], whole.texts[0])
    assert chunks.to("meta").rows.device.type == "meta" and chunks.to("cpu").keys == whole.keys


def test_what_waits_for_a_step_stays_small_on_the_host():
    """4,096 rows of 224 pixels and 16 workers: whole batches in flight would be 54 GB."""
    rows, workers, row = 4096, 16, 3 * 224 * 224
    chunk = chunk_rows(rows)
    per_batch = rows // chunk
    in_flight = workers * max(2, -(-per_batch // workers)) + 1
    shared = in_flight * chunk * row
    block = 1 << (chunk * row - 1).bit_length()  # torch pins powers of two
    pinned = (in_flight + 2 * per_batch) * block  # with the batch in use, and the one after it
    assert shared + pinned <= 4e9
    for rows in (64, 127, 128, 1000, 4096, 4097, 32768):
        assert rows % chunk_rows(rows) == 0 and (chunk_rows(rows) <= 256 or rows in (4097,))


def test_workers_hold_the_chunks_that_are_in_flight_and_no_more(sources):
    spec, rows, workers = ImageSpec(size=64), 1024, 2
    loader = Loader(
        Order(sources, SEED), sources, [train_view(spec)], [], seed=SEED, global_batch=rows,
        workers=workers, start_method="fork",
    )  # fmt: skip
    batches = loader.batches(0, 9)
    next(batches)

    def shared() -> int:
        """Bytes of the shared memory files that workers and this process hold open."""
        workers = [worker.pid for worker in loader._loader._iterator._workers]
        sizes = {}
        for place in (
            p for pid in [os.getpid(), *workers] for p in Path(f"/proc/{pid}/fd").iterdir()
        ):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(place).startswith("/dev/shm/torch"):
                    sizes[place.stat().st_ino] = place.stat().st_size
        return sum(sizes.values())

    chunk = chunk_rows(rows) * 3 * 64 * 64
    held = []
    for _ in range(200):  # until they wait for the step
        held.append(shared())
        if len(held) > 20 and held[-1] == held[-20]:
            break
        time.sleep(0.05)
    loader.close()
    in_flight = workers * 4 + 1  # four chunks each: a batch, all together
    assert rows // chunk_rows(rows) == 8 and max(held) <= in_flight * (chunk + 2**14)
    assert held[-1] >= 8 * chunk, "a batch waits for the step"


def test_skipped_samples_are_counted_by_reason(damaged):
    batches = list(sequential(damaged, [eval_view(SPEC)], [Letters()], batch_size=30))
    assert batches[0].skipped == {"image: broken": 10}
    assert len(batches[0]) == len(batches[0].images[0]) == len(batches[0].texts[0]) == 20


def test_data_without_a_good_sample_ends_with_an_error(tmp_path):
    members = {}
    for i in range(4):
        members |= sample(str(i)) | {f"{i}.jpg": b"no image"}
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(Failure, match=r"image: broken.*check_data"):
        global_batches(index_shards(str(tmp_path)), 0, 1)


def test_views_repeat_after_v_passes(sources):
    def images_by_key(start, views):
        order = Order(sources, SEED)
        loader = Loader(
            order, sources, [train_view(SPEC)], [], seed=SEED, global_batch=40, views=views
        )
        (batch,) = loader.batches(start, start + 1)
        return dict(zip(batch.keys, batch.images[0])), set(batch.views.tolist())

    first, number = images_by_key(0, views=2)
    second, _ = images_by_key(1, views=2)
    third, again = images_by_key(2, views=2)
    fresh, _ = images_by_key(2, views=0)
    assert number == again == {0}
    assert all(torch.equal(first[key], third[key]) for key in first)
    assert any(not torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], fresh[key]) for key in first)


def test_captions_are_the_first_or_any_of_several(sources):
    def captions(mode, epoch):
        loader = Loader(
            Order(sources, SEED), sources, [], [Letters()],
            seed=SEED, global_batch=40, captions=mode,
        )  # fmt: skip
        (batch,) = loader.batches(epoch, epoch + 1)
        texts = [bytes(row.tolist()).rstrip(b"\0").decode() for row in batch.texts[0]]
        assert all(key in text for key, text in zip(batch.keys, texts))
        return {text.split()[1] for text in texts}

    assert captions("first", 0) == {"0"}
    assert captions("all", 0) == captions("all", 1) == {"0", "1", "2"}


@pytest.mark.parametrize("mask", ["simple", "random", "shuffle"])
def test_a_mask_that_is_drawn_depends_on_no_worker_rank_or_generator(tmp_path, mask):
    words = " ".join(f"word{i}" for i in range(60))
    members = {}
    for i in range(12):
        members |= sample(str(i)) | {f"{i}.txt": f"{i} {words}".encode()}
    write_tar(tmp_path / "0.tar", members)
    sources = index_shards(str(tmp_path))

    def tokens(ranks, workers):
        random.seed(workers)
        torch.manual_seed(workers)
        tokenizer = SimpleTokenizer(context_length=20, reduction_mask=mask)
        loaders = [
            Loader(
                Order(sources, SEED), sources, [], [tokenizer],
                seed=SEED, global_batch=12, rank=rank, world_size=ranks, workers=workers,
                start_method="fork" if workers else None,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        parts = [[batch.texts[0] for batch in loader.batches(0, 2)] for loader in loaders]
        for loader in loaders:
            loader.close()
        return torch.stack([torch.cat(step) for step in zip(*parts)])

    alone = tokens(1, 0)
    assert torch.equal(tokens(1, 2), alone) and torch.equal(tokens(3, 1), alone)
    assert not torch.equal(alone[0].sort(dim=0)[0], alone[1].sort(dim=0)[0]), "a draw each pass"


class Stored(Fetcher):
    """Stands for a cache of a teacher in which row 3 is missing."""

    def check(self, row, view):
        if row == 3:
            raise BadSample("cache: no entry")

    def __call__(self, rows, views):
        return {"teacher": torch.stack([rows, views], dim=1)}


def test_training_from_a_cache_reads_no_image(sources):
    loader = Loader(
        Order(sources, SEED), sources, [], [],
        seed=SEED, global_batch=40, fetchers=[Stored()], caps=Caps(max_bytes=0, max_caption=0),
    )  # fmt: skip
    (batch,) = loader.batches(1, 2)
    assert batch.images == batch.texts == []
    assert torch.equal(batch.extras["teacher"][:, 0], batch.rows)
    assert torch.equal(batch.extras["teacher"][:, 1], batch.views)
    assert batch.skipped == {"cache: no entry": 1} and 3 not in batch.rows


@pytest.mark.parametrize("ranks", [1, 3])
def test_sequential_reading_visits_each_sample_once_in_file_order(sources, ranks):
    keys, sizes = [], []
    for rank in range(ranks):
        for batch in sequential(
            sources, [eval_view(SPEC)], [], batch_size=6, rank=rank, world_size=ranks
        ):
            keys += batch.keys
            sizes.append(len(batch))
    assert keys == [f"{i:06d}" for i in range(40)]
    assert sizes == [6] * 6 + [4], "a contrastive loss would depend on the number of processes"


def test_reading_leaves_the_callers_generators_alone(sources):
    torch.manual_seed(1)
    random.seed(1)
    expected = torch.rand(1), random.random()
    torch.manual_seed(1)
    random.seed(1)
    global_batches(sources, 0, 1)
    assert (torch.rand(1), random.random()) == expected


def test_many_shards_do_not_exhaust_open_files(tmp_path):
    sources = index_shards(write_shards(tmp_path, [1] * 200))
    list(sequential(sources, [], [Letters()], batch_size=50))
    assert len(os.listdir("/proc/self/fd")) < 180


def test_a_batch_moves_as_a_whole(sources):
    (batch,) = Loader(
        Order(sources, SEED), sources, [eval_view(SPEC)], [Letters()],
        seed=SEED, global_batch=4, fetchers=[Stored()],
    ).batches(0, 1)  # fmt: skip
    moved = batch.to("meta")
    tensors = [*moved.images, *moved.texts, moved.rows, moved.views, *moved.extras.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.keys == batch.keys


DEEP = """
import sys
import torch
from torch import Tensor
from training.data.index import index_shards
from training.data.loader import Loader
from training.data.order import Order

sources = index_shards(sys.argv[1])
tokenizer = lambda texts: torch.tensor([list(text.encode()) for text in texts])
loader = Loader(Order(sources, 0), sources, [], [tokenizer], seed=0, global_batch=1000)
(batch,) = loader.batches(9000, 9001)
print(sources.num_samples, len(set(batch.rows.tolist())), batch.texts[0].shape[0])
# not ru_maxrss, which a process inherits from the one that started it
status = dict(line.split(":") for line in open("/proc/self/status"))
print(status["VmHWM"].split()[0])
"""


def test_seeking_to_sample_nine_million_of_eleven_stays_small(tmp_path):
    """1,100 shards of 10,000 samples: hard links to one tar and its index."""
    jpeg = encode(picture(size=(2, 2)))
    members = {}
    for i in range(10_000):
        members |= {f"{i:06d}.jpg": jpeg[:1], f"{i:06d}.txt": b"a"}
    first = write_tar(tmp_path / "0000.tar", members)
    index_shards(str(first))
    for i in range(1, 1100):
        os.link(first, tmp_path / f"{i:04d}.tar")
        os.link(f"{first}.index.npz", tmp_path / f"{i:04d}.tar.index.npz")
    command = [sys.executable, "-c", DEEP, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    samples, distinct, texts, peak = map(int, run.stdout.split())
    assert (samples, distinct, texts) == (11_000_000, 1000, 1000)
    assert peak < 1_000_000, f"peak memory {peak} KB"
