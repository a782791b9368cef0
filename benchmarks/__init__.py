"""Benchmarks: each compares with a peer in one run, pairwise, and prints ratios."""
