#!/usr/bin/env bash
# Makes the study of result_gif/README.md, block by block: runs, measurements, tables, figures.
#
#     bash result_gif/reproduce.sh A          # or B, C, D, E, gates, tables; several in a row
#
# Two processes with one thread each. What is finished is skipped, what was interrupted continues.
# The variables below make it smaller, for a look or for a test.
set -euo pipefail
cd "$(dirname "$0")/.."

RUNS=${RUNS:-runs/study}             # the run folders
OUT=${OUT:-result_gif/results/study} # measurements, tables, figures
DATA_DIR=${DATA_DIR:-data}
DIGITS=${DIGITS:-mnist}              # data source of the digits
TISSUE=${TISSUE:-pathmnist}          # and of the tissue
CLASSES=${CLASSES:-0 1 2 3 4 5 6 7 8 9}
TWO_CLASSES=${TWO_CLASSES:-3 8}
SEEDS=${SEEDS:-100 101 102 103 104}
CONTROL_SEEDS=${CONTROL_SEEDS:-100 101 102}
STEPS=${STEPS:-1250}
CONTROL_STEPS=${CONTROL_STEPS:-1150}
N_EVAL=${N_EVAL:-1000}
N_EVAL_TISSUE=${N_EVAL_TISSUE:-200}
MORE=${MORE:-}                       # further flags of all runs

# train SCRIPT FOLDER FLAGS...: the grid of runs that the flags ask for, by two processes.
train() {
    local script=$1 folder=$2 process
    local processes=()
    shift 2
    for rank in 0 1; do
        RANK=$rank WORLD_SIZE=2 OMP_NUM_THREADS=1 python "$script" \
            --data_dir "$DATA_DIR" --save_dir "$RUNS/$folder" "$@" $MORE &
        processes+=($!)
    done
    for process in "${processes[@]}"; do wait "$process"; done
}

# digits FOLDER SEED FLAGS...: runs of single digits, and what they measured.
digits() {
    local folder=$1 seed=$2
    shift 2
    train quantum_diffusion_mnist.py "$folder" --data "$DIGITS" --seeds "$seed" \
        --n_eval "$N_EVAL" "$@"
    python cal_fid_ssim.py "$RUNS/$folder"/*_seed"$seed" --data_dir "$DATA_DIR" \
        --csv "$OUT/$folder.csv"
}

# Block A: does the circuit help, does a gate? The first seed has all previews, for the GIFs.
block_A() {
    for seed in $SEEDS; do
        frames=1
        if [ "$seed" = "${SEEDS%% *}" ]; then frames=30; fi
        digits A "$seed" --digits $CLASSES --arm matched quantum classical --steps "$STEPS" \
            --n_frames "$frames"
    done
}

# Block B: the positive control, with fewer steps.
block_B() {
    for seed in $CONTROL_SEEDS; do
        digits B "$seed" --digits $CLASSES --arm quantum --steps "$CONTROL_STEPS" --n_frames 1
    done
}

# Block C: tissue, one conditional model a run.
block_C() {
    for seed in $SEEDS; do
        train quantum_diffusion_pathmnist.py C --data "$TISSUE" --seeds "$seed" \
            --arm matched quantum --n_eval "$N_EVAL_TISSUE" --n_frames 1
        python cal_fid_ssim_medmnist.py "$RUNS"/C/*_seed"$seed" --data_dir "$DATA_DIR" \
            --csv "$OUT/C.csv"
    done
}

# Block D: few training images.
block_D() {
    for seed in $SEEDS; do
        digits D "$seed" --digits $TWO_CLASSES --n_train 25 100 --arm matched quantum \
            --steps "$STEPS" --n_frames 1
    done
}

# Block E: other gates and circuits.
block_E() {
    for seed in $SEEDS; do
        digits E "$seed" --digits $TWO_CLASSES --steps "$STEPS" --n_frames 1 \
            --arm se product frozen published cz ising brickwork reupload
    done
}

# What block A's models do with their gate.
block_gates() {
    python tests/gate_use.py "$RUNS"/A/{quantum,matched}_* --data_dir "$DATA_DIR" --out "$OUT"
}

# Tables and figures of what has been measured: each block, the six questions, the control, all.
block_tables() {
    for block in A C D; do python cal_fid_ssim.py --csv "$OUT/$block.csv" --out "$OUT/$block"; done
    python cal_fid_ssim.py --csv "$OUT"/{A,C,D}.csv --out "$OUT/questions"
    python cal_fid_ssim.py --csv "$OUT"/{A,B}.csv --out "$OUT/control"
    python cal_fid_ssim.py --csv "$OUT"/{A,E}.csv --out "$OUT/circuits"
    python cal_fid_ssim.py --csv "$OUT"/{A,B,C,D,E}.csv --out "$OUT"
    cp "$OUT/forest.png" "${FOREST:-result_gif/forest.png}"
}

for block in "$@"; do
    "block_$block"
done
