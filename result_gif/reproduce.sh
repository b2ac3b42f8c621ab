#!/usr/bin/env bash
# Makes the study of result_gif/README.md, block by block: runs, measurements, tables, figures.
#
#     bash result_gif/reproduce.sh A    # or B, C, D, E, pictures, gates, judges, tables; several in a row
#
# Two processes with one thread each. Finished runs are not trained again, only measured; stopped ones
# continue. The variables below make it smaller, for a look or for a test. The pages' own measurements
# and pictures were made, and are shown again, with OUT=result_gif/results/study PICTURES=result_gif.
set -euo pipefail
cd "$(dirname "$0")/.."

RUNS=${RUNS:-runs/study}             # the run folders
OUT=${OUT:-$RUNS/measured}           # measurements, tables, figures
PICTURES=${PICTURES:-$OUT}           # the pages' pictures
DATA_DIR=${DATA_DIR:-data}
DIGITS=${DIGITS:-mnist}              # data source of the digits
TISSUE=${TISSUE:-pathmnist}          # and of the tissue
CLASSES=${CLASSES:-0 1 2 3 4 5 6 7 8 9}
TWO_CLASSES=${TWO_CLASSES:-3 8}
SEEDS=${SEEDS:-100 101 102 103 104}
CONTROL_SEEDS=${CONTROL_SEEDS:-100 101 102}
PICTURE_SEED=${PICTURE_SEED:-100}    # that of the digits with all previews, for the GIFs
TISSUE_PICTURE_SEED=${TISSUE_PICTURE_SEED:-104}  # and that of tissue
STEPS=${STEPS:-1250}
CONTROL_STEPS=${CONTROL_STEPS:-1150}
TISSUE_STEPS=${TISSUE_STEPS:-5000}
N_EVAL=${N_EVAL:-1000}
N_EVAL_TISSUE=${N_EVAL_TISSUE:-200}
MORE=${MORE:-}                       # further flags of all runs
JUDGES=${JUDGES-result_gif/results/study/classifier_*.pt}  # empty: this machine trains its own
DIVERGED=${DIVERGED:-}               # runs left out, one a line: quantum 3 all 101 1250
failed=0

# All by one thread, as a judge that is trained here depends on their number.
export OMP_NUM_THREADS=1

# Ctrl-C does not reach processes in the background of a script.
trap 'kill $(jobs -p) 2> /dev/null; wait; exit 130' INT TERM

# train SCRIPT FOLDER FLAGS...: the grid of runs that the flags ask for, by two processes.
train() {
    local script=$1 folder=$2 process
    local processes=()
    shift 2
    for rank in 0 1; do
        RANK=$rank WORLD_SIZE=2 python "$script" --device cpu \
            --data_dir "$DATA_DIR" --save_dir "$RUNS/$folder" "$@" $MORE &
        processes+=($!)
    done
    for process in "${processes[@]}"; do
        if ! wait "$process"; then
            echo "a run failed, see above" >&2
            failed=1
        fi
    done
}

# folders_of PATTERNS...: the finished run folders, a line each. One that was stopped while it drew its
# images has n_eval 0.
folders_of() {
    local config
    for config in "${@/%//config.json}"; do
        if [ -f "$config" ] && grep -q '"n_eval": [1-9]' "$config"; then echo "${config%/*}"; fi
    done
}

# measure SCRIPT FOLDER SEED FLAGS...: evaluates the finished runs of a seed. What it prints has the
# arms beside each other, which nobody is to see before a block is whole.
measure() {
    local script=$1 folder=$2 seed=$3 judge
    local finished
    shift 3

    # The evaluation finds the study's judges there; no other kind of machine trains them to the bit.
    if [ -d "$DATA_DIR/MNIST" ] || [ -f "$DATA_DIR/pathmnist.npz" ]; then
        mkdir -p "$DATA_DIR/evaluation"
        for judge in $JUDGES; do
            [ -e "$DATA_DIR/evaluation/${judge##*/}" ] || cp "$judge" "$DATA_DIR/evaluation"
        done
    fi

    mapfile -t finished < <(folders_of "$RUNS/$folder"/*_seed"$seed"{,_*})
    if [ "${#finished[@]}" -eq 0 ]; then
        echo "seed $seed of block $folder: no finished runs here" >&2
        return 0
    fi
    python "$script" "${finished[@]}" --data_dir "$DATA_DIR" --device cpu "$@" > /dev/null
}

# digits FOLDER SEED FLAGS...: runs of single digits, and what they measured.
digits() {
    local folder=$1 seed=$2
    shift 2
    train quantum_diffusion_mnist.py "$folder" --data "$DIGITS" --seeds "$seed" \
        --n_eval "$N_EVAL" "$@"
    measure cal_fid_ssim.py "$folder" "$seed" --csv "$OUT/$folder.csv"
}

# frames_of SEED SHOWN: how many previews, thirty of the seed whose GIFs are shown. They have noise of
# their own, and change nothing else.
frames_of() {
    if [ "$1" = "$2" ]; then echo 30; else echo 1; fi
}

# Block A: does the circuit help, does a gate?
block_A() {
    for seed in $SEEDS; do
        digits A "$seed" --digits $CLASSES --arm matched quantum classical --steps "$STEPS" \
            --n_frames "$(frames_of "$seed" "$PICTURE_SEED")"
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
            --arm matched quantum --n_eval "$N_EVAL_TISSUE" --steps "$TISSUE_STEPS" \
            --n_frames "$(frames_of "$seed" "$TISSUE_PICTURE_SEED")"
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

# Block A by two other judges: classifiers of other seeds. While its run folders exist; what is in
# their metrics.json then is the second's.
block_judges() {
    for judge in 1 2; do
        for seed in $SEEDS; do
            measure cal_fid_ssim.py A "$seed" --seed "$judge" --csv "$OUT/judge$judge.csv"
        done
    done
}

# The overviews and GIFs, of one seed of block A and one of block C, while their run folders exist.
# They compare arms, so the block must be whole; the tables that come with them stay in RUNS.
block_pictures() {
    pictures_of cal_fid_ssim.py A "$PICTURE_SEED" overview.png classical quantum
    pictures_of cal_fid_ssim_medmnist.py C "$TISSUE_PICTURE_SEED" tissue.png matched quantum
}

# pictures_of SCRIPT BLOCK SEED NAME ARM ARM: NAME is that of the overview.
pictures_of() {
    local script=$1 block=$2 seed=$3 name=$4 first=$5 second=$6
    local planned run
    local finished
    is_whole "$block" || return 0
    planned=$(planned_runs "$block" | awk -v arms=" $first $second " -v seed="$seed" \
        '$4 == seed && index(arms, " " $1 " ")' | wc -l)
    mapfile -t finished < <(folders_of "$RUNS/$block"/{"$first","$second"}_*_seed"$seed"{,_*})
    if [ "${#finished[@]}" -eq 0 ] || [ "${#finished[@]}" -ne "$planned" ]; then
        echo "seed $seed of block $block: not all runs are here" >&2
        return 0
    fi
    python "$script" "${finished[@]}" --data_dir "$DATA_DIR" --out "$RUNS/pictures/$block" > /dev/null
    cp "$RUNS/pictures/$block/overview.png" "$PICTURES/$name"
    for run in "${finished[@]}"; do
        name=$(basename "$run")
        cp "$run/training_progress.gif" "$PICTURES/${name%%_n*}_training_progress.gif"
    done
}

# What block A's models do with their gate.
block_gates() {
    local finished
    mapfile -t finished < <(folders_of "$RUNS"/A/{quantum,matched}_*)
    if [ "${#finished[@]}" -eq 0 ]; then
        echo "block A: no finished runs here" >&2
        return 0
    fi
    python tests/gate_use.py "${finished[@]}" --data_dir "$DATA_DIR" --out "$OUT"
}

# grid ARMS CLASSES SIZES SEEDS STEPS: a line for each of these runs, as measured_runs has them.
grid() {
    local arm class size seed
    for arm in $1; do for class in $2; do for size in $3; do for seed in $4; do
        echo "$arm $class $size $seed $5"
    done; done; done; done
}

# planned_runs BLOCK: the runs that the plan has.
planned_runs() {
    local others="se product frozen published cz ising brickwork reupload"
    case $1 in
        A) grid "matched quantum classical" "$CLASSES" all "$SEEDS" "$STEPS" ;;
        B) grid quantum "$CLASSES" all "$CONTROL_SEEDS" "$CONTROL_STEPS" ;;
        C) grid "matched quantum" all all "$SEEDS" "$TISSUE_STEPS" ;;
        D) grid "matched quantum" "$TWO_CLASSES" "25 100" "$SEEDS" "$STEPS" ;;
        E) grid "$others" "$TWO_CLASSES" all "$SEEDS" "$STEPS" ;;
    esac
}

# measured_runs BLOCK: those in its table; a run of tissue by its row of all classes.
measured_runs() {
    if [ -f "$OUT/$1.csv" ]; then
        awk -F, 'NR > 1 && ($3 !~ /^conditional/ || $5 == "all") {
            print $2, $5, ($6 == "" ? "all" : $6), $7, $8
        }' "$OUT/$1.csv"
    fi
}

# missing_runs BLOCK: planned ones that are not in its table and did not diverge.
missing_runs() {
    comm -23 <(planned_runs "$1" | sort -u) <({ measured_runs "$1"; echo "$DIVERGED"; } | sort -u)
}

# is_as_planned BLOCK: whether its table has no other runs, as of seeds that SEEDS does not name: a
# part of a block is not compared either.
is_as_planned() {
    local planned others
    planned=$(planned_runs "$1" | sort -u)
    others=$(comm -13 <(echo "$planned") <(measured_runs "$1" | sort -u))
    [ -n "$planned" ] && [ -z "$others" ]
}

# is_whole BLOCK: whether nothing is missing, and nothing else there. Says so if not.
is_whole() {
    local missing
    missing=$(missing_runs "$1" | wc -l)
    if [ "$missing" -ne 0 ]; then
        echo "block $1 is not whole: $missing runs are missing" >&2
        return 1
    fi
    if ! is_as_planned "$1"; then
        echo "block $1: its table has other runs than are asked for" >&2
        return 1
    fi
}

# whole_seeds: block E's table without seeds of which a run is missing; prints its name, if any is left.
whole_seeds() {
    local seed missing
    local kept=()
    is_as_planned E || return 0
    missing=$(missing_runs E | awk '{ print $4 }')
    for seed in $SEEDS; do
        if ! grep -x "$seed" <<< "$missing" > /dev/null; then kept+=("$seed"); fi
    done
    if [ "${#kept[@]}" -eq 0 ]; then return 0; fi
    mkdir -p "$OUT/circuits"
    awk -F, -v kept=" ${kept[*]} " 'NR == 1 || index(kept, " " $7 " ")' "$OUT/E.csv" \
        > "$OUT/circuits/E.csv"
    echo "$OUT/circuits/E.csv"
}

# show FOLDER FAMILY TABLES...: tables and figures of all their rows. Holm's adjustment is over at
# least FAMILY tests.
show() {
    local folder=$1 family=$2
    shift 2
    python cal_fid_ssim.py --csv "$@" --out "$OUT/$folder" --family "$family" > /dev/null
}

# The six questions, the control, the other circuits, all: nothing before A is whole. The questions'
# Holm adjustment is always over six, so that no later block takes an answer back. The judges'
# tables have the pairs whose run folders were there.
block_tables() {
    local block circuits judge
    is_whole A || return 0
    local questions=("$OUT/A.csv")
    local all=("$OUT/A.csv")
    local control=("$OUT/A.csv")

    # Runs of A that had to be made again, so that those of B have pairs. In our study: see plan.md.
    if [ -f "$OUT/repeated.csv" ]; then
        all+=("$OUT/repeated.csv")
        control+=("$OUT/repeated.csv")
    fi
    for block in B C D; do
        if is_whole "$block"; then
            all+=("$OUT/$block.csv")
            if [ "$block" != B ]; then questions+=("$OUT/$block.csv"); fi
        fi
    done

    show questions 6 "${questions[@]}"
    if is_whole B 2> /dev/null; then show control 0 "${control[@]}" "$OUT/B.csv"; fi
    is_whole E || true  # says how much of it is left out
    circuits=$(whole_seeds)
    if [ -n "$circuits" ]; then
        show circuits 0 "$OUT/A.csv" "$circuits"
        all+=("$circuits")
    fi
    show all 0 "${all[@]}"
    if [ -f "$OUT/all/forest.png" ]; then cp "$OUT/all/forest.png" "$PICTURES"; fi
    for judge in judge1 judge2; do
        if [ -f "$OUT/$judge.csv" ]; then show "$judge" 0 "$OUT/$judge.csv"; fi
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
exit "$failed"
