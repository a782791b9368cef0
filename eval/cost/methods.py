"""Every method with one run's teacher, student and data: ours, and chains of assistants."""

from argparse import Namespace
from itertools import pairwise

from cifd_clip import METHODS
from eval.cost import macs
from eval.cost.stages import Stage, cache_stage, run_stages, student_options, student_stage
from training.errors import UsageError

#: Assistants in the place of RDMs; True where everything larger teaches, not only the next larger.
CHAINS = {"takd": False, "dgkd": True}
DEFAULT_ASSISTANT = "ViT-B-16"


def compare(args: Namespace) -> dict[str, dict[str, list[Stage]]]:
    """Stages of every method, ``{"live": ..., "cached": ...}``; of chains where there are any."""
    chains = CHAINS if assistant_names(args) else ()
    return {
        method: {way: method_stages(args, method, way == "cached") for way in ("live", "cached")}
        for method in (*METHODS, *chains)
    }


def method_stages(args: Namespace, method: str, cached: bool) -> list[Stage]:
    """A method's stages with the teacher, student and data of a command line.

    TAKD distils each model of the chain teacher, assistants, student from the one before, DGKD
    from all before; every assistant is trained for as long as the student. MobileCLIP has two
    teachers of the teacher's size, as in the paper's Table 14.

    Args:
        args: as `eval.cost.flags.parse` returns them.
        method: a name of `cifd_clip.METHODS` or of `CHAINS`.
        cached: whether each frozen model runs once, on ``--views`` views of the data set.
    """
    teacher = args.teachers[:1]
    run = Namespace(
        **vars(args)
        | {
            "distill": "kd" if method in CHAINS else method,
            "teachers": {"none": [], "mobileclip": 2 * teacher}.get(method, teacher),
            "teacher_cache": "cache" if cached else None,
            "rdm_bank": None,
            "views": args.views or 2,
        }
    )
    return chain_stages(run, CHAINS[method]) if method in CHAINS else run_stages(run)


def chain_stages(args: Namespace, dense: bool) -> list[Stage]:
    """KD's stages for each assistant and the student; `dense` if everything larger teaches."""
    larger, found = [macs.clip(args.teachers[0], "--distill-model")], []
    for name in (*assistant_names(args), args.model):
        if args.teacher_cache:
            found.append(cache_stage(args, larger[-1], f"cache of {larger[-1].name}"))
        title = "student" if name == args.model else f"assistant {name}"
        found.append(student_stage(args, name, larger if dense else larger[-1:], title))
        larger = [*larger, macs.clip(name, "--assistants")]
    return found


def assistant_names(args: Namespace) -> list[str]:
    """``--assistants``, largest first, or the default one if it lies between the two models.

    Raises:
        UsageError: those named do not.
    """
    teacher = args.teachers[0]
    names = args.assistants.split(",") if args.assistants else [DEFAULT_ASSISTANT]
    student = macs.clip(args.model, "--model", student_options(args))
    sizes = [macs.clip(name, "--assistants").macs for name in (teacher, *names)] + [student.macs]
    if all(larger > smaller for larger, smaller in pairwise(sizes)):
        return names
    if args.assistants:
        raise UsageError(
            f"--assistants {args.assistants}: expected models that grow smaller from the teacher "
            f"{teacher} to the student {args.model}, got {[round(s / 1e9, 1) for s in sizes]} GMACs"
        )
    return []
