"""Tables and figures from run directories, and from nothing else."""
