#!/usr/bin/env bash
# One evaluation (toy, dreambench, coco or pairs) of a trained model:
#   sbatch slurm/evaluate.sh toy -- --run instruct=/runs/instruct --output /runs/evaluation
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --dependency=afterok:JOB \
#       slurm/evaluate.sh dreambench -- --model /runs/instruct --dreambooth FOLDER ...
# dreambench and coco generate on all tasks, and then score on all of them. Without a name the
# program is that of tools/ which KOSMOSG_EVALUATION names (evaluate_toy).
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

evaluation=${KOSMOSG_EVALUATION:-evaluate_toy}
case ${1-} in
    toy | dreambench | coco | pairs)
        evaluation=evaluate_$1
        shift
        case $evaluation in evaluate_dreambench | evaluate_coco)
            # No rank can score what another has not drawn. One who names a step gets that step.
            [[ " $* " == *" --only"* ]] || tool_steps=(generate score)
            ;;
        esac
        ;;
    '' | -*) ;;
    *) die "$1 is no evaluation: there are toy, dreambench, coco and pairs; arguments come after --" ;;
esac
run_tool "tools/$evaluation.py" "$@"
