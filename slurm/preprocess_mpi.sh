#!/usr/bin/env bash
# Raw files to a dataset, on every core of several nodes; needs mpi4py:
#   sbatch slurm/preprocess_mpi.sh -- --kind caption --input "laion/*.tar" --output-prefix data/laion ...
# KOSMOSG_MPI names the plugin that the MPI library was built for (srun --mpi=list).
#SBATCH --job-name=kosmosg-preprocess
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=32
#SBATCH --cpus-per-task=1
#SBATCH --mem-per-cpu=2G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -uo pipefail

# sbatch runs a copy of this file from a spool folder, so the project is looked for where
# KOSMOSG_HOME says, else beside this file, else in (or above) the folder of the sbatch command.
for home in "${KOSMOSG_HOME-$(dirname "$0")/..}" "${KOSMOSG_HOME-${SLURM_SUBMIT_DIR-}}" \
    "${KOSMOSG_HOME-${SLURM_SUBMIT_DIR-}/..}"; do
    if [ -f "$home/slurm/common.sh" ]; then break; fi
done
if [ ! -f "$home/slurm/common.sh" ]; then
    echo "error: the project is not at KOSMOSG_HOME=${KOSMOSG_HOME-} nor at ${SLURM_SUBMIT_DIR-};" \
        "sbatch from the project's folder, or export KOSMOSG_HOME=FOLDER" >&2
    exit 2
fi
# shellcheck source=slurm/common.sh
source "$home/slurm/common.sh"

# Under MPI they wait for each other.
tool_options=(--kill-on-bad-exit=1 "--mpi=${KOSMOSG_MPI:-pmi2}")
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    run_tool tools/preprocess_data.py "$@" --resume
fi
run_tool tools/preprocess_data.py "$@"
