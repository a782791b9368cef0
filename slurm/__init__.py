"""Studies on SLURM: grids of runs, submitted as one chain of jobs."""
