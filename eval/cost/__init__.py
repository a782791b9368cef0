"""What a run costs before it starts: MACs, bytes and GPU hours of its stages.

Models are counted from their architectures (`eval.cost.macs`) and make up stages
(`eval.cost.stages`), which `eval.cost.report` prints.
"""

from collections import Counter

from eval.cost.config import CostConfig, parse

__all__ = ["CostConfig", "parse", "summary"]


def summary(config: CostConfig) -> dict[str, dict[str, float]]:
    """``{"hours": {stage: GPU hours}, "disk_bytes": {stage: bytes}}`` of a run."""
    from eval.cost import stages
    from training.clip.models import add_model_configs

    add_model_configs(config.model_config)
    hours, disk = Counter(), Counter()
    for stage in stages.run_stages(config):  # several teachers have several caches
        hours[stage.name] += stages.gpu_hours(config, [stage])
        disk[stage.name] += stage.disk_bytes
    return {"hours": hours, "disk_bytes": disk}
