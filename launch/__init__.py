"""Starting runs: on this machine, under MPI and as Slurm jobs; looking at them, and ending them."""
