"""The distillation methods: one file each, each a module from features to a dict of losses.

A method owns only what trains besides the student (projectors, temperatures, bottlenecks). It gets
the student's pooled features and a *list* of teachers, of which assistants are ordinary members.
"""

from cifd_clip.methods.base import Losses, Method, Report
from cifd_clip.methods.cifd import CIFD
from cifd_clip.methods.clipkd import CLIPKD
from cifd_clip.methods.fd import FeatureDistillation
from cifd_clip.methods.kd import KnowledgeDistillation
from cifd_clip.methods.mobileclip import MobileCLIP
from cifd_clip.methods.none import Contrastive
from cifd_clip.methods.tinyclip import TinyCLIP

METHODS: dict[str, type[Method]] = {
    "none": Contrastive,
    "kd": KnowledgeDistillation,
    "fd": FeatureDistillation,
    "clipkd": CLIPKD,
    "tinyclip": TinyCLIP,
    "mobileclip": MobileCLIP,
    "cifd": CIFD,
}

__all__ = ["METHODS", "Losses", "Method", "Report"]
