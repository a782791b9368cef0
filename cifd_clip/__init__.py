"""Controlled Information Flow for knowledge distillation of CLIP models (CIFD, NeurIPS 2024)."""

from cifd_clip.bottleneck import InformationBottleneck
from cifd_clip.entropy import FactorizedDensity
from cifd_clip.losses import Features, World
from cifd_clip.methods import METHODS, Method
from cifd_clip.noise import Noise
from cifd_clip.rdm import RateDistortionModules, RDMBank
from cifd_clip.student import Student
from cifd_clip.task import DistillationTask, RDMTask, Task
from cifd_clip.teacher import Teacher, assistants

__all__ = [
    "METHODS",
    "DistillationTask",
    "FactorizedDensity",
    "Features",
    "InformationBottleneck",
    "Method",
    "Noise",
    "RDMBank",
    "RDMTask",
    "RateDistortionModules",
    "Student",
    "Task",
    "Teacher",
    "World",
    "assistants",
]
