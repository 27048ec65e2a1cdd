#!/bin/bash
# Train on several nodes under Slurm, and go on by itself after the time limit or a preemption:
#   sbatch recipes/accelerate/slurm.sh RECIPE OUTPUT [more arguments of `unmask train`]
# RECIPE, OUTPUT, the model and UNMASK_CACHE lie on a file system that all nodes share: every process reads weights and
# checkpoints, the first one writes. Not run: written from Slurm's and accelerate's documentation.
#SBATCH --job-name=unmask
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# TERM to this script alone, so long before the end (seconds) as one update or one batch of rollouts takes at most
#SBATCH --signal=B:TERM@300

set -u
recipe=$1 output=$2
shift 2
gpus_per_node=8
config=${ACCELERATE_CONFIG:-recipes/accelerate/fsdp2.yaml}

if [ -f "$output/summary.json" ]; then
    echo "$output is complete"
    exit 0
elif [ -f "$output/config.toml" ]; then
    arguments=(--resume "$output")
else
    arguments=("$recipe" --output "$output" "$@")
fi

stopping=0
stop() {
    stopping=1
    # To one training process, not to its launcher: a launcher that gets TERM kills its processes 30 seconds later.
    # One is enough, for they agree at the next boundary, write a checkpoint and leave together.
    pkill --signal TERM --newest --uid "$USER" --full -- '-u -m unmask train'
}
trap stop TERM

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=1
srun bash -c 'exec accelerate launch --config_file "$0" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * $1))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$2" --main_process_port 29500 --rdzv_backend static \
    -m unmask train --quiet "${@:3}"' "$config" "$gpus_per_node" "$head_node" "${arguments[@]}" &
wait $!
status=$?
while [ "$stopping" = 1 ] && jobs -r | grep -q .; do # a trap ends `wait` at once
    wait
done

if [ "$stopping" = 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
