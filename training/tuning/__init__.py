"""Equal tuning: every method gets the same number of trials, and the best of each new seeds."""
