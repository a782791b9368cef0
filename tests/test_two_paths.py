"""A command line and a `Trainer` used without one train the same bits."""

import torch
from safetensors.torch import load_file

from cifd_clip import World
from classification.command import run_photos
from runs import CONFIGS, assert_bit_equal, final
from training.classifier.config import bank_rates
from training.classifier.config import resolve as resolve_classifier
from training.classifier.run import open_images, training_batches
from training.classifier.stage import ClassifierStage, EpochLoader, assemble
from training.classifier.teachers import load_teacher
from training.clip.flags import named_files, resolve
from training.clip.models import add_model_configs
from training.clip.run import make_loader, open_data
from training.clip.stages import StudentStage
from training.engine.loop import train
from training.engine.trainer import Trainer
from training.main import main

CPU = torch.device("cpu")


def test_cifd_of_clip_models(flags, teacher, bank, scenes, tmp_path):
    command = [*flags, "--distill", "cifd", "--distill-model", teacher, "--rdm-bank", str(bank)]
    assert main([*command, "--accum-freq", "2", "--logs", str(tmp_path), "--name", "run"]) == 0
    values = {
        **{"train_data": str(scenes / "train"), "model_config": CONFIGS, "model": "tiny-student"},
        **{"distill": "cifd", "distill_model": teacher, "rdm_bank": str(bank)},
        **{"batch_size": 24, "accum_freq": 2, "epochs": 1, "workers": 0, "name": "run"},
    }
    config = resolve(values, **named_files(values))
    add_model_configs(config.model_config)
    sources = open_data(config, World())
    stage = StudentStage(config, CPU, World(), config.banks)
    trainer = Trainer(stage, config, sources.num_samples // config.global_batch)
    loader = make_loader(config, sources, trainer)
    assert train(trainer, loader, config)
    loader.close()
    assert trainer.progress.step == trainer.total_steps == 2
    assert_bit_equal(trainer.payload(), final(tmp_path / "run"))


def test_cifd_of_classifiers(photos, known, tmp_path):
    teacher, bank = known
    command = ["--method=cifd", "--model=cnn2", f"--teacher={teacher}", f"--rdm-bank={bank}"]
    run = run_photos(photos, "run", *command, "--ema=0.5", f"--logs={tmp_path}")
    values = {
        **{"method": "cifd", "model": "cnn2", "teacher": str(teacher), "rdm_bank": str(bank)},
        **{"dataset": "imagenet", "data": str(photos), "workers": 0},
        **{"batch_size": 3, "epochs": 1, "ema": 0.5},
    }
    config = resolve_classifier(values, bank=bank_rates(values))
    images = open_images(config, CPU)
    epochs = training_batches(config, images, World())
    teachers = [load_teacher(place, config.dataset) for place in config.teachers]
    _, source, task = assemble(config, teachers, images.table)
    trainer = Trainer(ClassifierStage(task, source, ema=config.ema), config, epochs.per_epoch)
    assert train(trainer, EpochLoader(epochs, images=True), config)
    assert trainer.progress.step == trainer.total_steps == 3
    assert_bit_equal(trainer.payload(), final(run))
    for name, tensor in load_file(run / "model.safetensors").items():
        assert torch.equal(trainer.stage.shipped.student.state_dict()[name], tensor), name
