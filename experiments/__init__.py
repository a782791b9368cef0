"""Experiments: one stoppable, resumable command each, made of the project's entry points."""
