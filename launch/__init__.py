"""Starting runs: on this machine, under MPI and as Slurm jobs; looking at them, and ending them.

Who starts whom: local.py, or a job's batch script, runs supervisor.py; that starts rank.py for each learner
rank, which calls train.py, and server_supervisor.py for each rollout server. Under MPI mpirun starts the
ranks, and mpi.py does the rest.
"""
