"""From a trained student to the paper's tables: evaluation and report."""
