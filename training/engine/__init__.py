"""The training engine: one loop, trainer, checkpoint and run directory for every stage."""
