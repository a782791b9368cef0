"""Controlled Information Flow for knowledge distillation of CLIP models (CIFD, NeurIPS 2024)."""

from importlib import import_module

__version__ = "0.1.0"

#: Public names by module. They are imported on first use: commands read the methods' declarations
#: and refuse wrong flags before torch is loaded.
_PUBLIC = {
    "bottleneck": ("InformationBottleneck",),
    "distributed": ("World",),
    "entropy": ("FactorizedDensity",),
    "losses": ("Features",),
    "methods": ("DECLARED", "METHODS"),
    "methods.base": ("Method",),
    "noise": ("Noise",),
    "rdm": ("RDMBank", "RateDistortionModules"),
    "student": ("Student",),
    "task": ("DistillationTask", "RDMTask", "Task"),
    "teacher": ("Teacher", "with_assistants"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
