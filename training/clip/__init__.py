"""Training CLIP models: stage 1, stage 2, and what they read."""
