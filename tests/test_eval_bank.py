"""``python -m eval.bank``: what is measured is what teaches in stage 2, and the report draws it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cifd_clip import Features, RDMBank, with_assistants
from eval import bank, benchmark, datasets, metrics, models, reconstruct, report
from experiments import cifar100
from experiments.study import Run, Study
from runs import ROOT
from training.classify import main as classify
from training.engine import result
from training.engine.result import BankResult
from training.errors import UsageError

CPU = torch.device("cpu")
SETS = ("digits", "digit_scenes")


def results(folder):
    return [result.read(path, BankResult) for path in sorted((folder / "bank").glob("*.json"))]


@pytest.fixture(scope="module")
def measured(bank_run, scenes, tmp_path_factory):
    """Results of the bank on both sets, and the command."""
    out = tmp_path_factory.mktemp("measured")
    command = [str(bank_run), "--data-root", str(scenes / "benchmark"), "--workers=0"]
    command += ["--device=cpu", "--datasets"]
    assert bank.main([*command, *SETS, "--out", str(out)]) == 0
    return {one.dataset: one for one in results(out)}, out, command


@pytest.fixture(scope="module")
def bank_run(request):
    return request.getfixturevalue("bank").parent


def test_the_teachers_figures_are_those_of_the_benchmark(measured, teacher, scenes, tmp_path):
    found, _, _ = measured
    command = [teacher, "--data-root", str(scenes / "benchmark"), "--workers=0", "--device=cpu"]
    assert benchmark.main([*command, "--datasets", *SETS, "--out", str(tmp_path)]) == 0
    for path in tmp_path.glob("*.json"):
        stock = result.read(path)
        assert found[stock.dataset].teacher == stock.metrics
        assert found[stock.dataset].provenance.data == stock.provenance.data
        assert found[stock.dataset].provenance.teachers == (stock.provenance.weights,)


def test_an_assistant_is_measured_as_it_teaches(measured, teacher, bank_run, scenes):
    found, _, _ = measured
    model = models.load(teacher, CPU)
    folder = datasets.open_folder(scenes / "benchmark", "digit_scenes", "test")
    captions = folder.targets
    pixels = torch.stack(list(datasets.Images(folder.samples, model.transform)))
    with torch.no_grad():
        images = model.encode_image(pixels)
        texts = model.encode_text([c for some in captions for c in some], CPU)
    image_of = torch.tensor([i for i, some in enumerate(captions) for _ in some])
    loaded = RDMBank.load(bank_run / "bank", {"model": "", "weights": model.weights})
    _, *of_images = with_assistants(loaded, [Features(images, images, torch.tensor(1.0))])
    _, *of_texts = with_assistants(loaded, [Features(texts, texts, torch.tensor(1.0))])
    for k, one in enumerate(found["digit_scenes"].assistants):
        wanted = metrics.retrieval_metrics(of_images[k].image, of_texts[k].text, image_of)
        assert one.metrics == pytest.approx(wanted), f"R = {one.rate}"
        assert one.rate == loaded.rates[k]
    mean = [
        F.normalize(torch.stack([own, *(getattr(a, kind) for a in helpers)]).mean(0), dim=-1)
        for own, kind, helpers in ((images, "image", of_images), (texts, "text", of_texts))
    ]
    wanted = metrics.retrieval_metrics(*mean, image_of)
    assert found["digit_scenes"].mean == pytest.approx(wanted)


def test_bits_are_those_of_the_density(measured, teacher, bank_run, scenes):
    found, _, _ = measured
    model = models.load(teacher, CPU)
    folder = datasets.open_folder(scenes / "benchmark", "digits", "test")
    with torch.no_grad():
        images = model.encode_image(
            torch.stack(list(datasets.Images(folder.samples, model.transform)))
        )
        loaded = RDMBank.load(bank_run / "bank", {"model": "", "weights": model.weights})
        bits = loaded(images, images, None)[1]["image/bits"].tolist()
    assert [a.bits["image"] for a in found["digits"].assistants] == pytest.approx(bits)


def test_the_map_has_a_point_for_each_image_in_every_space(measured):
    found, _, _ = measured
    drawn = found["digits"].map
    assert drawn.points.keys() == {"teacher", "300", "30"}
    assert 2 <= len(drawn.classes) <= reconstruct.CLASSES
    assert set(drawn.labels) == set(range(len(drawn.classes)))
    for points in drawn.points.values():
        assert torch.tensor(points).shape == (len(drawn.labels), 2)
        assert torch.tensor(points).isfinite().all()


def test_a_repeated_measurement_is_skipped_and_a_fresh_one_is_the_same(
    measured, tmp_path, capsys, bank_run
):
    _, out, command = measured
    assert bank.main([*command, "digits", "--out", str(out)]) == 0
    assert "measured already, skipped" in capsys.readouterr().out
    assert bank.main([*command, "digits", "--out", str(tmp_path)]) == 0
    (again,) = (tmp_path / "bank").glob("*.json")
    assert again.read_bytes() == (out / "bank" / again.name).read_bytes()


def test_a_missing_set_is_a_named_gap_and_the_others_are_measured(measured, tmp_path, capsys):
    _, _, command = measured
    assert bank.main([*command, "objectnet", "digit_scenes", "--out", str(tmp_path)]) == 1
    assert "bank on objectnet: not evaluated: no folder" in capsys.readouterr().err
    (gap,) = (tmp_path / "gaps").glob("*.json")
    assert json.loads(gap.read_text())["dataset"] == "objectnet"
    assert len(list((tmp_path / "bank").glob("*.json"))) == 1


def test_a_teacher_that_only_a_config_names_is_the_same_teacher(measured, teacher, tmp_path):
    found, _, command = measured
    config = tmp_path / "teacher-by-file.json"
    config.write_text((ROOT / "tests" / "models" / "tiny-teacher.json").read_text())
    weights = Path(teacher.removeprefix("local-dir:")) / "open_clip_model.safetensors"
    own = ["--teacher", f"teacher-by-file:{weights}", "--model-config", str(config)]
    assert bank.main([*command, "digits", *own, "--out", str(tmp_path)]) == 0
    (again,) = results(tmp_path)
    assert again.assistants == found["digits"].assistants


def test_another_teacher_is_refused(measured, teacher, flags, tmp_path):
    from training.main import main as train

    other = [*flags, "--model", "tiny-teacher", "--seed", "5", "--name", "other"]
    assert train([*other, "--logs", str(tmp_path)]) == 0
    _, _, command = measured
    with pytest.raises(UsageError, match="was trained on"):
        bank.main([*command, "digits", "--teacher", str(tmp_path / "other")])


def test_a_bank_that_names_no_teacher_asks_for_one(bank_run, tmp_path, scenes):
    run = tmp_path / "run"
    run.mkdir()
    (run / "bank").symlink_to(bank_run / "bank")
    config = json.loads((bank_run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "distill_model": ""}))
    command = [str(run), "--data-root", str(scenes / "benchmark"), "--datasets", "digits"]
    with pytest.raises(UsageError, match="--teacher NAME:WEIGHTS"):
        bank.main([*command, "--device=cpu"])


def test_a_folder_without_a_bank_is_one_sentence(tmp_path, scenes):
    command = ["--data-root", str(scenes / "benchmark"), "--datasets", "digits", "--device=cpu"]
    with pytest.raises(UsageError, match=re.escape("bank.safetensors")):
        bank.main([str(tmp_path), *command])


def test_each_kind_of_bank_asks_for_its_data(bank_run, classifiers):
    _, _, rdms = classifiers
    with pytest.raises(UsageError, match="is a CLIP's bank: say --data-root DIR --datasets NAME"):
        bank.main([str(bank_run), "--data=cifar"])
    with pytest.raises(UsageError, match="is a classifier's bank: say --data DIR"):
        bank.main([str(rdms), "--data-root=d", "--datasets=digits"])


def test_the_report_draws_what_the_bank_did_and_twice_the_same(measured, bank_run, tmp_path):
    _, out, _ = measured
    pages = []
    for name in ("a", "b"):
        report.main([str(bank_run), str(out), "--out", str(tmp_path / name / "r.html")])
        pages.append((tmp_path / name / "r.html").read_bytes())
    assert pages[0] == pages[1]
    page = pages[0].decode()
    assert page.count("<h3>The bank on ") == 2 and "t-SNE of image embeddings" in page
    text = Path(tmp_path / "a" / "r.md").read_text()
    assert "### The bank on digits: bank" in text and "| R = 300 |" in text


# -- classifiers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Three classes of generated photos in ImageNet's layout, their classifier, and its RDMs."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1)):
        for name in ("n01440764", "n01443537", "n01484850"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (6, 7 + i, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((250, 240))
                image.save(root / split / name / f"{name}_{i}.JPEG")

    def train(name: str, *flags: str) -> Path:
        where = ["--dataset=imagenet", f"--data={root}", f"--logs={root}/runs", f"--name={name}"]
        steps = ["--device=cpu", "--batch-size=3", "--epochs=1", "--workers=1", "--lr=0.001"]
        assert classify([*where, *steps, "--final", *flags]) == 0
        return root / "runs" / name

    teacher = train("teacher", "--model=cnn4")
    under = ["--method=rdm", f"--teacher={teacher}", "--rates", "10", "300"]
    return root, teacher, train("rdm", *under)


def test_rdms_of_a_classifier_are_measured_as_after_their_training_and_drawn(
    classifiers, tmp_path, capsys
):
    folder, teacher, rdms = classifiers
    command = [str(rdms), f"--data={folder}", "--workers=1", "--device=cpu"]
    assert bank.main(command) == bank.main(command) == 0
    assert "measured already, skipped" in capsys.readouterr().out.splitlines()[-1]
    (measured,) = results(rdms / "results")
    for one in measured.assistants:
        trained = result.read(rdms / f"result_R{one.rate:g}.json")
        assert one.metrics["acc1"] == pytest.approx(trained.metrics["acc1"])
        assert one.bits["image"] == pytest.approx(trained.metrics["bits"], rel=1e-4)
    plain = result.read(teacher / "result.json")
    assert measured.teacher["acc1"] == pytest.approx(plain.metrics["acc1"])
    weights = (plain.provenance.weights,)
    assert measured.provenance.teachers == trained.provenance.teachers == weights
    assert measured.map.classes == ("n01440764", "n01443537", "n01484850")
    report.main([str(teacher), str(rdms), "-o", str(tmp_path / "r.html")])
    page = (tmp_path / "r.html").read_text()
    assert "Figure 5" in page and "Figure 9" in page and "with the accuracy on the whole" in page


def test_a_study_of_classifiers_measures_its_bank_once(classifiers, tmp_path, capsys):
    folder, _, rdms = classifiers
    run = Run("rdm", "training.classify", ())
    study = Study([run], rdms.parent, folder, tmp_path)
    cifar100.keep_results(study, run)
    assert "teacher" in capsys.readouterr().out
    cifar100.keep_results(study, run)
    assert not capsys.readouterr().out and len(results(tmp_path)) == 1


def test_rdms_are_not_measured_on_other_classes_than_their_own(classifiers, tmp_path):
    folder, _, rdms = classifiers
    shutil.copytree(folder / "val", tmp_path / "data" / "val")
    (tmp_path / "data" / "val" / "n01443537").rename(tmp_path / "data" / "val" / "n02")
    command = [str(rdms), f"--data={tmp_path}/data", "--workers=0", f"--out={tmp_path}/out"]
    with pytest.raises(UsageError, match=r"it lacks n01443537 and it has n02$"):
        bank.main([*command, "--device=cpu"])
    assert not (tmp_path / "out").exists()
