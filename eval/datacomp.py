"""DataComp's suite (Gadre et al. 2023, github.com/mlfoundations/datacomp, tasklist.yml).

Of its 38 tasks 37 are clip_benchmark's WebDataset folders; WinoGAViL is a game and no such folder.
The tasks of WILDS, GeoDE and Dollar Street have metrics of their own, some of them over groups of
images, which ``key.npy`` tells apart. Nothing here imports torch before it is needed.
"""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from training.engine.result import Metrics, Result

if TYPE_CHECKING:
    from torch import Tensor

#: Images of each task's test split.
TASKS = {
    **{"vtab/caltech101": 6085, "cifar10": 10_000, "vtab/cifar100": 10_000},
    **{"vtab/clevr_count_all": 15_000, "vtab/clevr_closest_object_distance": 15_000},
    **{"country211": 21_100, "vtab/dtd": 1880, "vtab/eurosat": 5400, "fgvc_aircraft": 3333},
    **{"food101": 25_250, "gtsrb": 12_630, "imagenet1k": 50_000, "imagenet_sketch": 50_889},
    **{"imagenetv2": 10_000, "imagenet-a": 7500, "imagenet-o": 2000, "imagenet-r": 30_000},
    **{"vtab/kitti_closest_vehicle_distance": 711, "mnist": 10_000, "objectnet": 18_574},
    **{"vtab/flowers": 6149, "vtab/pets": 3669, "voc2007": 14_976, "vtab/pcam": 32_768},
    **{"renderedsst2": 1821, "vtab/resisc45": 6300, "cars": 8041, "stl10": 8000},
    **{"sun397": 108_754, "vtab/svhn": 26_032, "flickr30k": 1000, "mscoco_captions": 5000},
    **{"wilds/iwildcam": 42_791, "wilds/camelyon17": 85_054, "wilds/fmow": 22_108},
    **{"dollar_street": 3503, "geode": 12_488},
}
#: What a task is scored by, if not by top-1 or, of retrieval, by the mean recall at 1.
MAIN = {
    **dict.fromkeys(
        ("vtab/caltech101", "fgvc_aircraft", "vtab/flowers", "vtab/pets"), "mean_per_class_recall"
    ),
    "wilds/iwildcam": "F1-macro_all",
    "wilds/fmow": "acc_worst_region",
    "dollar_street": "acc_top5_wg",
    "geode": "acc_wg",
}
#: Tasks scored by their worst group: among how many answers a hit is looked for. A group is the
#: first number of ``key.npy``: FMoW's region, Dollar Street's income, GeoDE's region.
WORST_GROUP = {"wilds/fmow": 1, "dollar_street": 5, "geode": 1}


def own_metrics(name: str, logits: "Tensor", labels: "Tensor", groups: Sequence[int]) -> Metrics:
    """A task's own metric beside top-1, where it has one.

    Args:
        name: of the data set.
        logits, labels: (N, classes) and (N,).
        groups: (N,) the group of each image, of a task in `WORST_GROUP`.
    """
    if name == "wilds/iwildcam":
        from sklearn.metrics import f1_score

        present = labels.unique().tolist()  # of 182 species those that the split shows
        guesses = logits.argmax(dim=1).tolist()
        return {
            MAIN[name]: float(f1_score(labels.tolist(), guesses, labels=present, average="macro"))
        }
    if name not in WORST_GROUP:
        return {}
    hits = (logits.topk(WORST_GROUP[name], dim=1).indices == labels[:, None]).any(dim=1).tolist()
    of_group: dict[int, list[bool]] = {}
    for group, hit in zip(groups, hits, strict=True):
        of_group.setdefault(group, []).append(hit)
    return {MAIN[name]: min(map(fmean, of_group.values()))}


def summary(results: Iterable[Result]) -> str:
    """The mean over a model's results on tasks of the suite, and the tasks that it lacks."""
    scores = {
        one.dataset: fmean(
            [one.metrics[name] for name in one.metrics if name.endswith("retrieval_recall@1")]
            or [one.metrics[MAIN.get(one.dataset, "acc1")]]
        )
        for one in results
        if one.dataset in TASKS
    }
    missing = [name for name in TASKS if name not in scores] + ["winogavil"]
    mean = f"mean {fmean(scores.values()):.4f} of " if scores else ""
    return f"DataComp: {mean}{len(scores)} of 38 tasks; missing: {', '.join(missing)}"
