#!/usr/bin/env bash
# Score ranks that join a training run of instruct and leave it at any time, on any nodes:
#   sbatch slurm/score_ranks.sh -- --run /runs/instruct
#SBATCH --job-name=kosmosg-score
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@60
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

run_tool tools/score_rank.py "$@"
