"""What a method declares: its options, and those that several methods share.

A declaration is plain data, read from the method's file without importing torch (see
`cifd_clip.methods`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """An option of a method.

    The type of the default is the option's: a bool is a switch, a list takes one value or more.
    """

    name: str
    default: Any
    help: str
    choices: tuple[str, ...] | None = None
    span: tuple[float, float] | None = None
    """The lowest and highest value that tuning tries, on a logarithmic scale."""


@dataclass(frozen=True)
class Declaration:
    """What is known of a method without importing it."""

    name: str
    summary: str
    options: tuple[Option, ...]
    assistants: bool
    """Whether it can learn from the assistants of an RDM bank; without any, it has no teacher."""
    one_modality: bool
    """Whether it can learn from teachers that embed images alone, or texts alone."""

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every option's value: the given ones, and defaults.

        Raises:
            ValueError: an option that the method lacks, or a value that is none of its choices.
        """
        known = {option.name: option for option in self.options}
        for name, value in given.items():
            if name not in known:
                raise ValueError(
                    f"the method {self.name} has no option {name}: expected one of "
                    + (", ".join(known) or "none")
                )
            if (choices := known[name].choices) and value not in choices:
                raise ValueError(f"{name} is {value!r}: expected one of {', '.join(choices)}")
        return {name: given.get(name, option.default) for name, option in known.items()}


#: Options that several methods share, each (default, help) or (default, help, choices). A method
#: names the groups it uses, and may give another default.
GROUPS = {
    "projector": {
        "projector": (
            "shared",
            "to a teacher of another dimension: one map for images and texts, one for each of the "
            "two, or one for the teacher and for each of its assistants",
            ("shared", "separate", "each"),
        ),
    },
    "ibm": {
        "ibm": (False, "add the Information Bottleneck Module's noise to the student (eq. 7)"),
        "ibm_site": (
            "projection",
            "its noise comes before the towers' final projection, or on the embedding",
            ("projection", "embedding"),
        ),
        "lambda_i": (1e-4, "λ_I of eq. 12: weight of its rate, in nats per element"),
    },
    "reduction": {
        "loss_reduction": (
            "mean",
            "of embedding terms and of λ_I's rate, over elements: mean or sum, the two readings of "
            "eq. 12, whose weights change with the teacher's width and the number of assistants; "
            "relative: weights that don't, means as of 512 elements, over all assistants too",
            ("mean", "sum", "relative"),
        ),
    },
    "ibm_branch": {
        "ibm_branch": (
            "all",
            "all: the contrastive term sees the IBM's noise too (eq. 10); distill: only what is "
            "compared with teachers does (section 3.2)",
            ("all", "distill"),
        ),
    },
    "contrastive": {
        "siglip": (
            False,
            "SigLIP's sigmoid loss as contrastive term, and its form of the similarity terms of "
            "teachers that have a bias; the student gets one",
        ),
    },
    "similarities": {
        "distill_logit_scale": (
            [],
            "the factor 1/τ of each teacher's similarities, in place of its own (MobileCLIP 100, "
            "MobileCLIP2 70 and 60, TinyCLIP 50); its assistants have the same",
        ),
    },
    "assistants": {
        "lambda_n": (
            [1.0],
            "λ_n of eq. 8 and 12: weight of each assistant beside its teacher's 1; one value for "
            "all of them, or one for each",
        ),
        "rdm_output": (
            "rounded",
            "what an RDM teaches: its rounded reconstruction at unit norm, one with noise in place "
            "of rounding, or one that is not normalised",
            ("rounded", "noisy", "raw"),
        ),
    },
}


#: Of the shared weights, what tuning tries.
SPANS = {"lambda_i": (1e-6, 1e-2), "lambda_n": (0.1, 3.0)}


def declare(name: str, literal: Mapping[str, Any]) -> Declaration:
    """The declaration of a method from the literal in its file.

    Args:
        name: the method's.
        literal: ``summary``; ``uses``: names of `GROUPS`; ``options``: its own, as in a group;
            ``defaults``: other defaults of the groups' options; ``spans``: what tuning tries of
            its own; ``assistants``: whether it can learn from any (True); ``one_modality``: whether
            from teachers that lack the other (False).
    """
    assistants = literal.get("assistants", True)
    groups = [*literal.get("uses", ()), *(["assistants"] if assistants else [])]
    options = dict(literal.get("options", {}))
    for group in groups:
        options |= GROUPS[group]
    defaults, spans = literal.get("defaults", {}), SPANS | literal.get("spans", {})
    return Declaration(
        name,
        literal["summary"],
        tuple(
            Option(
                option, defaults.get(option, default), help, *(choices or [None]), spans.get(option)
            )
            for option, (default, help, *choices) in options.items()
        ),
        assistants,
        literal.get("one_modality", False),
    )
