"""MobileCLIP's reinforced shards, fabricated as they are published, become teacher caches."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import InterpolationMode, RandAugment, RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from runs import final, lines
from shards import encode, picture, write_tar
from training.clip.cache import shard_name, view_path
from training.data.index import index_shards
from training.data.pixels import tensor
from training.data.reinforced import reapplied
from training.data.stored import encoded
from training.errors import UsageError
from training.main import main as train
from training.reinforced import main

#: As ml-mobileclip's dr/transforms.py numbers them.
NAMES = [
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness"),
    *("Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
]
WIDTH, VIEWS, SAMPLES = 2 * 768, 4, 24
SIZE = (90, 70)


class Fixed(RandAugment):
    """torchvision's own, with one operation at one magnitude to choose from."""

    def __init__(self, name: str, magnitude: float):
        super().__init__(num_ops=1)
        self.only = {name: (torch.full((31,), magnitude), False)}

    def _augmentation_space(self, *_):
        return self.only


def augmentation(generator: np.random.Generator) -> list:
    """Drawn as the published code draws it: torchvision's crop and RandAugment."""
    torch.manual_seed(int(generator.integers(1 << 30)))
    image = Image.new("RGB", SIZE)
    crop = RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
    space, steps = RandAugment()._augmentation_space(31, (224, 224)), []
    for number in generator.integers(len(NAMES), size=2).tolist():
        magnitudes, signed = space[NAMES[number]]
        magnitude = float(magnitudes[9]) if magnitudes.ndim else 0.0
        steps.append([number, -magnitude if signed and generator.integers(2) else magnitude])
    return [list(crop), steps]


def unit(generator: np.random.Generator, rows: int) -> np.ndarray:
    """(rows, 2 · 768) float32: a unit vector of each teacher in a row."""
    parts = generator.standard_normal((rows, 2, 768))
    parts /= np.linalg.norm(parts, axis=-1, keepdims=True)
    return parts.reshape(rows, WIDTH).astype(np.float32)


def npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def sample(number: int, **changed: bytes | None) -> dict[str, bytes]:
    """Members of one sample, by extension (``_`` for a dot), some changed or left out."""
    generator = np.random.default_rng(number)
    captions = [f"a red {number} in snow", "", f"a dog  {number}"]
    augmentations = [augmentation(generator) for _ in range(VIEWS)]
    if number % 2:  # as the data sets' cards show them
        augmentations = json.dumps(augmentations)
    arrays = {"image_emb": unit(generator, VIEWS), "text_emb": unit(generator, 4)}
    members = {
        "url.txt": b"https://example.org",
        "jpg": encode(picture(number, SIZE)),
        "txt": f"photo {number}\nof a cat".encode(),
        "syn.json": json.dumps({"syn_text": captions}).encode(),
        "paug.json": json.dumps({"param_aug": augmentations}).encode(),
        "npz": npz(**arrays),
        "json": json.dumps({"uid": str(number), "sha256": ""}).encode(),
    }
    members |= {name.replace("_", "."): content for name, content in changed.items()}
    return {kind: content for kind, content in members.items() if content is not None}


def shard(path, samples: dict[str, dict[str, bytes]]):
    path.parent.mkdir(exist_ok=True)
    named = {f"{key}.{kind}": c for key, members in samples.items() for kind, c in members.items()}
    return write_tar(path, named)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two shards; of the second, one sample has no embeddings, and one no usable image."""
    folder = tmp_path_factory.mktemp("reinforced")
    for n in range(2):
        samples = {f"uid{i}": sample(i) for i in range(n * SAMPLES, (n + 1) * SAMPLES)}
        shard(folder / f"{n:08}.tar", samples)
    samples["uid30"] = sample(30, npz=None)
    samples["uid31"] = sample(31, jpg=b"no image")
    shard(folder / "00000001.tar", samples)
    return folder


@pytest.fixture(scope="module")
def caches(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    folders = [folder / "openai", folder / "datacomp"]
    assert main(convert(data, *folders, "--workers", "1")) == 0
    return folders


def convert(data, *rest) -> list[str]:
    folders = ",".join(str(r) for r in rest[:2])
    return ["--train-data", str(data), "--teacher-cache", folders, "--views", "3", *rest[2:]]


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_an_operation_is_torchvisions_of_that_name(number):
    name, magnitude = (
        NAMES[number],
        {10: 5.0, 11: 178.5, 3: -30.45, 4: 30.45, 5: 9.0}.get(number, 0.27),
    )
    image = picture(5, SIZE).point(lambda value: 40 + value // 2)  # contrast can be stretched
    cropped = resized_crop(image, 4, 7, 50, 60, [224, 224], InterpolationMode.BICUBIC)
    (expected,) = [Fixed(name, magnitude)(cropped)]
    made = reapplied(image, [[4, 7, 50, 60], [[number, magnitude]]])
    assert np.array_equal(np.array(made), np.array(expected))
    assert number == 0 or not np.array_equal(np.array(made), np.array(cropped))


def views_of(folder, original, view: int) -> dict[str, bytes]:
    """The members of a stored view."""
    with tarfile.open(view_path(folder, original, view)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_a_view_is_its_stored_augmentation_applied_to_the_image(data, caches):
    (original, _) = index_shards(str(data)).shards
    for view in range(3):
        members = views_of(caches[0], original, view)
        assert len(members) == 2 * SAMPLES
        for i in range(SAMPLES):
            augmentations = json.loads(sample(i)["paug.json"])["param_aug"]
            augmentations = json.loads(augmentations) if i % 2 else augmentations
            crop, steps = augmentations[view]
            image = Image.open(io.BytesIO(sample(i)["jpg"]))
            image = resized_crop(image, *crop, [224, 224], InterpolationMode.BICUBIC)
            for number, magnitude in steps:
                image = Fixed(NAMES[number], magnitude)(image)
            assert members[f"uid{i}.jpg"] == encoded(tensor(image), 90)


def test_embeddings_arrive_at_their_view_caption_and_teacher(data, caches):
    seen = set()
    for original in index_shards(str(data)).shards:
        stored = [load_file(f / f"{shard_name(original)}.safetensors") for f in caches]
        members = [views_of(caches[0], original, view) for view in range(3)]
        for row, key in enumerate(original.records["key"].tolist()):
            n = int(key[3:])
            if n in (30, 31):
                assert all(s[m][:, row].isnan().all() for s in stored for m in ("image", "text"))
                continue
            captions = [f"photo {n} of a cat", f"a red {n} in snow", "", f"a dog {n}"]
            with np.load(io.BytesIO(sample(n)["npz"])) as archive:
                images, of_captions = archive["image_emb"], archive["text_emb"]
            for view in range(3):
                caption = captions.index(members[view][f"uid{n}.txt"].decode())
                seen.add(caption)
                expected = np.concatenate([images[view], of_captions[caption]]).astype(np.float16)
                made = [s[m][view, row] for m in ("image", "text") for s in stored]
                assert np.array_equal(torch.cat(made).numpy(), expected)
    assert seen == {0, 1, 3}, "the empty caption is never chosen, each other one is"


def test_what_is_left_out_is_counted_and_what_is_there_is_kept(data, caches, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for f in caches for path in f.iterdir()}
    assert main(convert(data, *caches)) == 0
    assert "0 shards written, 2 are there" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for f in caches for path in f.iterdir()}
    others = [tmp_path / "a", tmp_path / "b"]
    assert main(convert(data, *others, "--workers", "0", "--synthetic", "1")) == 0
    said = capsys.readouterr().out
    assert "1 samples left out: no KEY.npz" in said and "1 samples left out: image: broken" in said
    with pytest.raises(UsageError, match=r"its synthetic is 0.5, this run needs 0.1"):
        main(convert(data, *caches, "--synthetic", "0.1"))


def test_a_student_and_its_banks_learn_from_both_teachers_without_them(
    data, caches, flags, tmp_path
):
    read = [*flags, "--train-data", str(data), "--logs", str(tmp_path), "--batch-size", "12"]
    read += ["--teacher-cache", ",".join(map(str, caches)), "--max-bad-fraction", "0.2"]
    assert train([*read, "--distill", "fd", "--name", "fd"]) == 0
    assert len(lines(tmp_path / "fd")) == 4 and final(tmp_path / "fd")
    cifd = ["--distill", "cifd", "--rates", "30", "--rdm-hidden", "8", "--rdm-epochs", "1"]
    assert train([*read, *cifd, "--name", "cifd"]) == 0
    assert {"teacher0", "teacher1"} <= lines(tmp_path / "cifd")[-1].keys()
    teachers = json.loads((tmp_path / "cifd/teachers.json").read_text())["teachers"]
    assert [t["weights"] for t in teachers] == ["ViT-L-14:openai", "ViT-L-14:datacomp_xl_s13b_b90k"]


OUTSIDE = [[0, 0, 71, 90], []]


def with_augmentation(first) -> bytes:
    kept = json.loads(sample(0)["paug.json"])["param_aug"]
    return json.dumps({"param_aug": [first, *kept[1:]]}).encode()


CROP = [0, 0, 9, 9]
HOSTILE = {
    "no augmentations": ({"paug_json": None}, "no sample can be used: {'no KEY.paug.json': 1}"),
    "no synthetic captions": ({"syn_json": None}, "no KEY.syn.json"),
    "pickled beside": ({"npz": None, "pth_gz": b"x"}, r"pickled \(pth.gz\) and not read"),
    "pickled inside": (
        {"npz": npz(image_emb=np.array([{}]), text_emb=np.zeros(2))},
        r"nothing is unpickled\): Object arrays cannot be loaded",
    ),
    "a pickle": ({"npz": pickle.dumps({"image_emb": 1})}, "nothing is unpickled"),
    "another array": ({"npz": npz(image_emb=np.zeros((4, WIDTH)))}, "text_emb"),
    "too few captions' embeddings": (
        {"npz": npz(image_emb=np.zeros((4, WIDTH)), text_emb=np.zeros((3, WIDTH)))},
        r"'text_emb' is float64 \(3, 1536\), expected floats \(4, 1536\)",
    ),
    "one teacher": (
        {"npz": npz(image_emb=np.zeros((4, 768)), text_emb=np.zeros((4, 768)))},
        r"'image_emb' is float64 \(4, 768\), expected floats \(4, 1536\)",
    ),
    "no unit vectors": (
        {"npz": npz(image_emb=np.ones((4, WIDTH)), text_emb=np.ones((4, WIDTH)))},
        "no unit vectors",
    ),
    "a bomb": ({"npz": npz(image_emb=np.zeros((4, WIDTH)), a=np.zeros(1 << 23))}, "too many bytes"),
    "no JSON": ({"paug_json": b"[" * 10_000}, "KEY.paug.json has no list 'param_aug'"),
    "an unknown operation": ({"paug_json": with_augmentation([CROP, [[14, 1.0]]])}, "not known"),
    "a negative one": ({"paug_json": with_augmentation([CROP, [[-1, 1.0]]])}, "not known"),
    "a flip": ({"paug_json": with_augmentation([CROP, True, []])}, "not known: expected"),
    "a crop outside": ({"paug_json": with_augmentation(OUTSIDE)}, "crops what lies outside"),
    "too large": ({"txt": bytes(1 << 25) + b"x"}, "too many bytes"),
    "too few views": ({"paug_json": b'{"param_aug": []}'}, "image_emb"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_as_it_is_published_is_refused_in_a_sentence(name, tmp_path):
    changed, said = HOSTILE[name]
    shard(tmp_path / "data" / "0.tar", {"uid0": sample(0, **changed)})
    with pytest.raises(UsageError, match=said) as error:
        main(convert(tmp_path / "data", tmp_path / "a", tmp_path / "b", "--workers", "0"))
    assert "0.tar" in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not list((tmp_path / "a").glob("*.tar*")), "no half of a shard is left"


def test_other_flags_than_the_set_has_room_for_are_refused(data, tmp_path):
    with pytest.raises(
        UsageError, match=r"names 1 folders, expected one for each of the 2 teachers"
    ):
        main(["--train-data", str(data), "--teacher-cache", str(tmp_path), "--views", "1"])
    with pytest.raises(UsageError, match=r"4 augmentations for --views 5"):
        main(convert(data, tmp_path / "a", tmp_path / "b", "--views", "5", "--workers", "0"))
    with pytest.raises(UsageError, match="expected --views from 1"):
        main(convert(data, tmp_path / "a", tmp_path / "b", "--views", "0"))
