"""Slurm as its commands show it: asked by argv, answered in plain data. No runs and no policy."""
