"""Training: data, the loop, checkpoints and the command lines."""
