#!/usr/bin/env bash
# Makes the study of result_gif/README.md, block by block: runs, measurements, tables, figures.
#
#     bash result_gif/reproduce.sh A    # or B, C, D, E, pictures, gates, judges, tables; several in a row
#
# Two processes with one thread each. What is finished is skipped, what was interrupted continues.
# The variables below make it smaller, for a look or for a test.
set -euo pipefail
cd "$(dirname "$0")/.."

RUNS=${RUNS:-runs/study}             # the run folders
OUT=${OUT:-result_gif/results/study} # measurements, tables, figures
PICTURES=${PICTURES:-result_gif}     # the pages' pictures
DATA_DIR=${DATA_DIR:-data}
DIGITS=${DIGITS:-mnist}              # data source of the digits
TISSUE=${TISSUE:-pathmnist}          # and of the tissue
CLASSES=${CLASSES:-0 1 2 3 4 5 6 7 8 9}
TWO_CLASSES=${TWO_CLASSES:-3 8}
SEEDS=${SEEDS:-100 101 102 103 104}
CONTROL_SEEDS=${CONTROL_SEEDS:-100 101 102}
STEPS=${STEPS:-1250}
CONTROL_STEPS=${CONTROL_STEPS:-1150}
TISSUE_STEPS=${TISSUE_STEPS:-5000}
TISSUE_ROWS=${TISSUE_ROWS:-11}       # of a tissue run: nine classes, their mean, all together
N_EVAL=${N_EVAL:-1000}
N_EVAL_TISSUE=${N_EVAL_TISSUE:-200}
MORE=${MORE:-}                       # further flags of all runs
JUDGE=classifier_7bde9f4dda9fc13686ebd701.pt  # of MNIST, named by what it was trained on

# train SCRIPT FOLDER FLAGS...: the grid of runs that the flags ask for, by two processes.
train() {
    local script=$1 folder=$2 process
    local processes=()
    shift 2
    for rank in 0 1; do
        RANK=$rank WORLD_SIZE=2 OMP_NUM_THREADS=1 python "$script" --device cpu \
            --data_dir "$DATA_DIR" --save_dir "$RUNS/$folder" "$@" $MORE &
        processes+=($!)
    done
    for process in "${processes[@]}"; do wait "$process" || echo "a run failed, see above" >&2; done
}

# measure SCRIPT FOLDER SEED FLAGS...: evaluates the finished runs of a seed. What it prints has the
# arms beside each other, which nobody is to see before a block is whole.
measure() {
    local script=$1 folder=$2 seed=$3 grid
    local finished=()
    shift 3

    # The evaluation finds the study's judge there; no other kind of machine trains it to the bit.
    if [ -d "$DATA_DIR/MNIST" ] && [ ! -e "$DATA_DIR/evaluation/$JUDGE" ]; then
        mkdir -p "$DATA_DIR/evaluation"
        cp "result_gif/results/study/$JUDGE" "$DATA_DIR/evaluation"
    fi

    for grid in "$RUNS/$folder"/*_seed"$seed"/samples_final.png; do finished+=("$(dirname "$grid")"); done
    python "$script" "${finished[@]}" --data_dir "$DATA_DIR" "$@" > /dev/null
}

# digits FOLDER SEED FLAGS...: runs of single digits, and what they measured.
digits() {
    local folder=$1 seed=$2
    shift 2
    train quantum_diffusion_mnist.py "$folder" --data "$DIGITS" --seeds "$seed" \
        --n_eval "$N_EVAL" "$@"
    measure cal_fid_ssim.py "$folder" "$seed" --csv "$OUT/$folder.csv"
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
            --arm matched quantum --n_eval "$N_EVAL_TISSUE" --n_frames 1 --steps "$TISSUE_STEPS"
        measure cal_fid_ssim_medmnist.py C "$seed" --csv "$OUT/C.csv"
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

# Block A by two other judges: classifiers of other seeds. While its run folders exist.
block_judges() {
    for judge in 1 2; do
        for seed in $SEEDS; do
            measure cal_fid_ssim.py A "$seed" --seed "$judge" --csv "$OUT/judge$judge.csv"
        done
    done
}

# The overview and the GIFs, of block A's first seed, while its run folders exist. It compares two
# arms, so A must be whole; those tables stay in the run folders' place.
block_pictures() {
    local seed=${SEEDS%% *} run name
    is_whole A || return 0
    python cal_fid_ssim.py "$RUNS"/A/{classical,quantum}_*_seed"$seed" --data_dir "$DATA_DIR" \
        --out "$RUNS/pictures" > /dev/null
    cp "$RUNS/pictures/overview.png" "$PICTURES"
    for run in "$RUNS"/A/{classical,quantum}_*_seed"$seed"; do
        name=$(basename "$run")
        cp "$run/training_progress.gif" "$PICTURES/${name%%_n*}_training_progress.gif"
    done
}

# What block A's models do with their gate.
block_gates() {
    python tests/gate_use.py "$RUNS"/A/{quantum,matched}_* --data_dir "$DATA_DIR" --out "$OUT"
}

# planned BLOCK: how many rows its table has when all its runs are measured.
planned() {
    local classes two seeds
    classes=$(wc -w <<< "$CLASSES") two=$(wc -w <<< "$TWO_CLASSES") seeds=$(wc -w <<< "$SEEDS")
    case $1 in
        A) echo $((3 * classes * seeds)) ;;
        B) echo $((classes * $(wc -w <<< "$CONTROL_SEEDS"))) ;;
        C) echo $((2 * TISSUE_ROWS * seeds)) ;;
        D) echo $((2 * 2 * two * seeds)) ;;
        E) echo $((8 * two)) ;;  # a seed
    esac
}

# is_whole BLOCK: whether its table has all rows; of E those of whole seeds. A run that diverged
# leaves rows out: name their number, MISSING_A=1.
is_whole() {
    local block=$1 rows=0 diverged=MISSING_$1 missing
    if [ -f "$OUT/$block.csv" ]; then rows=$(($(wc -l < "$OUT/$block.csv") - 1)); fi
    missing=$(($(planned "$block") - rows - ${!diverged:-0}))
    if [ "$block" = E ] && [ "$rows" -gt 0 ]; then missing=$((missing % $(planned E))); fi
    if [ "$missing" -ne 0 ]; then echo "block $block is not whole: $rows rows" >&2; fi
    [ "$missing" -eq 0 ]
}

# show FOLDER FAMILY BLOCKS...: tables and figures of those of the blocks that are whole. Holm's
# adjustment is over at least FAMILY tests.
show() {
    local folder=$1 family=$2 block
    local whole=()
    shift 2
    for block in "$@"; do
        if is_whole "$block"; then whole+=("$OUT/$block.csv"); fi
    done
    python cal_fid_ssim.py --csv "${whole[@]}" --out "$OUT/$folder" --family "$family" > /dev/null
}

# The six questions, the control, the other circuits, all: nothing before A is whole. The questions'
# Holm adjustment is always over six, so that no later block takes an answer back. The judges'
# tables have the pairs whose run folders were there.
block_tables() {
    local judge
    is_whole A || return 0
    show questions 6 A C D
    if is_whole B; then show control 0 A B; fi
    if is_whole E; then show circuits 0 A E; fi
    show all 0 A B C D E
    if [ -f "$OUT/all/forest.png" ]; then cp "$OUT/all/forest.png" "$PICTURES"; fi
    for judge in judge1 judge2; do
        if [ -f "$OUT/$judge.csv" ]; then
            python cal_fid_ssim.py --csv "$OUT/$judge.csv" --out "$OUT/$judge" > /dev/null
        fi
    done
}

for block in "${@:-none}"; do
    if ! declare -F "block_$block" > /dev/null; then
        echo "$block: expected some of A, B, C, D, E, pictures, gates, judges, tables" >&2
        exit 2
    fi
done
for block in "$@"; do
    "block_$block"
done
