#!/usr/bin/env bash
# One evaluation of trained models on one GPU:
#   sbatch slurm/evaluate.sh -- --run instruct=/runs/instruct --output /runs/evaluation
# KOSMOSG_EVALUATION names another program of tools/.
#SBATCH --job-name=kosmosg-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
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

run_tool "tools/${KOSMOSG_EVALUATION:-evaluate_toy}.py" "$@"
