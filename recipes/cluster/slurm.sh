#!/bin/bash
# A job of two hosts with two ranks each, for SLURM (docs/cluster.md).
#
#   sbatch recipes/cluster/slurm.sh
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --requeue
# 90 s before the time limit: Lightning saves a checkpoint, requeues the job, and the new one resumes from it.
#SBATCH --signal=SIGUSR1@90
#SBATCH --time=08:00:00

export OMP_NUM_THREADS=1
srun python train.py
