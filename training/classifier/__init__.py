"""Training classifiers, the paper's supervised side, on the same engine."""
