"""Supervised CIFD: distilling classifiers (eq. 5, 8, 9, 22, 23; sections 4.1 and 4.3)."""
