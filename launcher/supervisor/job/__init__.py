"""A run as a job of Slurm's: how it is submitted, what its tasks do, and how it comes back."""
