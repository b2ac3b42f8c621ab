"""The study's script: its commands are understood, and they ask for the runs of the plan."""

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

import cal_fid_ssim as evaluation
import cal_fid_ssim_medmnist as evaluation_of_tissue
import quantum_diffusion_mnist as mnist
import quantum_diffusion_pathmnist as pathmnist

ROOT = Path(__file__).parent.parent
TRAINING = {"quantum_diffusion_mnist.py": mnist, "quantum_diffusion_pathmnist.py": pathmnist}
EVALUATION = {
    "cal_fid_ssim.py": evaluation.MNIST,
    "cal_fid_ssim_medmnist.py": evaluation_of_tissue.PATHMNIST,
}


SEEDS = range(100, 105)
OTHERS = ["se", "product", "frozen", "published", "cz", "ising", "brickwork", "reupload"]

# What the tables of whole blocks have: arms, rows of classes, sizes, seeds, steps.
TISSUE = ["adipose", "mean", "all"]
WHOLE = {
    "A": (["matched", "quantum", "classical"], range(10), [""], SEEDS, 1250),
    "B": (["quantum"], range(10), [""], SEEDS[:3], 1150),
    "C": (["matched", "quantum"], TISSUE, [""], SEEDS, 5000),
    "D": (["matched", "quantum"], [3, 8], [25, 100], SEEDS, 1250),
    "E": (OTHERS, [3, 8], [""], SEEDS, 1250),
}


def rows_of(block: str) -> list[str]:
    """The first columns of a whole block's table."""
    *axes, steps = WHOLE[block]
    condition = "conditional" if block == "C" else ""
    return [
        f"{arm}_run,{arm},{condition},mnist,{label},{n_train},{seed},{steps}"
        for arm, label, n_train, seed in itertools.product(*axes)
    ]


def write_table(folder: Path, block: str, rows: list[str]) -> None:
    """A comparison.csv of these rows."""
    header = "run,arm,condition,data,label,n_train,seed,steps"
    (folder / f"{block}.csv").write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture
def commands(tmp_path):
    """The Python commands of some blocks, as lists of words, without running them.

    What they print is not to be seen: it has the arms beside each other.
    """
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    log = tmp_path / "commands"
    stub.write_text(f'#!/bin/bash\nwords=$(printf "%q " "$@")\necho "$words" >> {log}; echo FID\n')
    stub.chmod(0o755)
    pictures = tmp_path / "study"
    (pictures / "all").mkdir(parents=True)
    (pictures / "all" / "forest.png").write_bytes(
        (ROOT / "result_gif" / "overview.png").read_bytes()
    )
    for judge in ("judge1", "judge2"):
        (pictures / f"{judge}.csv").write_text("a row\n")
    for block in WHOLE:
        write_table(pictures, block, rows_of(block))

    # A finished run of each seed, and one that was stopped while it drew its images.
    runs = tmp_path / "runs"
    for block, seed in itertools.product(WHOLE, SEEDS):
        for arm, n_eval in (("quantum", 1000), ("matched", 0)):
            run = runs / block / f"{arm}_mnist3_nall_seed{seed}"
            run.mkdir(parents=True)
            (run / "config.json").write_text(json.dumps({"n_eval": n_eval}, indent=2))
            (run / "samples_final.png").write_bytes(b"")

    def call(*blocks: str) -> list[list[str]]:
        log.write_text("")
        environment = os.environ | {
            "PATH": f"{stub.parent}:{os.environ['PATH']}",
            "RUNS": str(runs),
            "OUT": str(pictures),
            "PICTURES": str(tmp_path),
        }
        script = ROOT / "result_gif" / "reproduce.sh"
        command = ["bash", script, *blocks]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        calls = log.read_text().splitlines()
        is_silent = [shlex.split(line)[0] in EVALUATION for line in calls]
        assert done.stdout.count(b"FID") == len(calls) - sum(is_silent)
        return [shlex.split(line) for line in calls]

    return call


def shown(calls) -> dict[str, list[str]]:
    """Which tables an evaluation without runs shows, by the name of its folder."""
    parsed = [evaluation.parse_options(words, EVALUATION[script]) for script, *words in calls]
    return {options.out.name: [file.name for file in options.csv] for options in parsed}


def test_the_blocks_ask_for_the_runs_of_the_plan(commands):
    # By block, arm and steps; each command is given to two processes, which share its grid.
    runs = Counter()
    for script, *words in commands("A", "B", "C", "D", "E"):
        if script not in TRAINING:
            continue
        args = TRAINING[script].build_parser().parse_args(words)
        models = len(args.classes) if args.classes else 1
        for arm in args.arm:
            key = (args.save_dir.name, arm, args.steps)
            runs[key] += models * len(args.n_train) * len(args.seeds) / 2
    assert runs == {
        ("A", "matched", 1250): 50,
        ("A", "quantum", 1250): 50,
        ("A", "classical", 1250): 50,
        ("B", "quantum", 1150): 30,
        ("C", "matched", 5000): 5,
        ("C", "quantum", 5000): 5,
        ("D", "matched", 1250): 20,
        ("D", "quantum", 1250): 20,
    } | {
        ("E", arm, 1250): 10
        for arm in ("se", "product", "frozen", "published", "cz", "ising", "brickwork", "reupload")
    }
    assert sum(runs.values()) == 310


def test_what_was_measured_is_kept_and_shown(commands):
    # A call after each seed, which computes no difference.
    measured = []
    for script, *words in commands("A", "C"):
        if script in EVALUATION:
            options = evaluation.parse_options(words, EVALUATION[script])
            assert len(options.runs) == 1 and options.out is None
            assert words[words.index("--device") + 1] == "cpu"
            measured.append([file.name for file in options.csv])
    assert measured == [["A.csv"]] * 5 + [["C.csv"]] * 5

    # Then the tables, without any run.
    assert shown(commands("tables")) == {
        "questions": ["A.csv", "C.csv", "D.csv"],
        "control": ["A.csv", "B.csv"],
        "circuits": ["A.csv", "E.csv"],
        "all": [f"{block}.csv" for block in "ABCDE"],
        "judge1": ["judge1.csv"],
        "judge2": ["judge2.csv"],
    }


def test_repeated_runs_are_in_the_control_and_in_no_answer(commands, tmp_path):
    write_table(tmp_path / "study", "repeated", [])
    tables = shown(commands("tables"))
    assert tables["questions"] == ["A.csv", "C.csv", "D.csv"]
    assert tables["control"] == ["A.csv", "repeated.csv", "B.csv"]
    assert tables["circuits"] == ["A.csv", "E.csv"]
    assert tables["all"] == ["A.csv", "repeated.csv", "B.csv", "C.csv", "D.csv", "E.csv"]


def test_a_part_of_a_block_is_not_compared(commands, tmp_path, monkeypatch):
    """Of three seeds that are there, one alone is asked for: it would be a look at a third."""
    write_table(tmp_path / "study", "A", rows_of("A")[: len(rows_of("A")) // 5 * 3])
    monkeypatch.setenv("SEEDS", "102")
    assert commands("tables", "pictures") == []
    monkeypatch.setenv("SEEDS", " ")
    assert commands("tables", "pictures") == []


def test_the_answers_do_not_depend_on_which_other_blocks_are_there(commands, tmp_path):
    for block in "CD":
        (tmp_path / "study" / f"{block}.csv").unlink()
    families = {}
    for script, *words in commands("tables"):
        options = evaluation.parse_options(words, EVALUATION[script])
        families[options.out.name] = options.family
    assert families["questions"] == 6
    assert families["control"] == 0


ALL = {"questions", "control", "circuits", "all", "judge1", "judge2"}


@pytest.mark.parametrize(
    "block, left",
    [("A", set()), ("B", ALL - {"control"}), ("C", ALL), ("D", ALL), ("E", ALL - {"circuits"})],
)
def test_a_block_that_is_not_whole_is_not_shown(block, left, commands, tmp_path):
    # One run is missing, of E one of each seed. A row that is there twice does not take its place.
    rows = rows_of(block)
    without = rows[:-1]
    if block == "E":
        without = [row for row in rows if not row.startswith("cz_run,cz,,mnist,3")]
    write_table(tmp_path / "study", block, [*without, without[0]])
    tables = shown(commands("tables"))
    assert set(tables) == left
    assert all(f"{block}.csv" not in files for files in tables.values())

    # All are there, and one more with other steps.
    other_steps = rows[-1].rpartition(",")[0] + ",7"
    write_table(tmp_path / "study", block, [*rows, other_steps])
    tables = shown(commands("tables"))
    assert set(tables) == left
    assert all(f"{block}.csv" not in files for files in tables.values())


def test_the_studys_judge_is_put_where_the_evaluation_finds_it(commands, tmp_path, monkeypatch):
    judge = ROOT / "result_gif" / "results" / "study" / "classifier_7bde9f4dda9fc13686ebd701.pt"
    (tmp_path / "data" / "MNIST").mkdir(parents=True)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    commands("A")
    found = tmp_path / "data" / "evaluation" / judge.name
    assert found.read_bytes() == judge.read_bytes()

    found.write_text("of this machine")
    commands("A")
    assert found.read_text() == "of this machine"

    # It is the one that A.csv names.
    classifier = evaluation.build_classifier(1, 10, 0)
    classifier.load_state_dict(mnist.load_tensors(judge, "a classifier")["weights"])
    name = str(evaluation.classifier_extractor(classifier.eval(), "cpu"))
    assert name == "classifier:7b2f1f39cef2"
    assert name in (judge.parent / "A.csv").read_text()


def test_the_judge_of_tissue_is_put_there_too(commands, tmp_path, monkeypatch):
    judge = ROOT / "result_gif" / "results" / "study" / "classifier_928845410175c51471edb3d3.pt"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pathmnist.npz").write_bytes(b"")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    commands("C")
    assert (tmp_path / "data" / "evaluation" / judge.name).read_bytes() == judge.read_bytes()


def test_pictures_wait_for_a_whole_block(commands, tmp_path):
    write_table(tmp_path / "study", "A", rows_of("A")[1:])
    assert commands("pictures") == []

    # And for all its run folders.
    write_table(tmp_path / "study", "A", rows_of("A"))
    assert commands("pictures") == []


def test_pictures_are_copied_under_the_pages_names(commands, tmp_path, monkeypatch):
    monkeypatch.setenv("CLASSES", "3 8")
    rows = [row for row in rows_of("A") if row.split(",")[4] in "38"]
    write_table(tmp_path / "study", "A", rows)
    runs = tmp_path / "runs"
    (runs / "pictures" / "A").mkdir(parents=True)
    (runs / "pictures" / "A" / "overview.png").write_text("overview")
    for arm, label in itertools.product(("classical", "quantum"), "38"):
        run = runs / "A" / f"{arm}_mnist{label}_nall_seed100"
        run.mkdir(exist_ok=True)
        (run / "config.json").write_text('{\n  "n_eval": 1000\n}')
        (run / "training_progress.gif").write_text(arm + label)
    (call,) = commands("pictures")
    assert [word.split("/")[-1] for word in call[1:5]] == [
        "classical_mnist3_nall_seed100", "classical_mnist8_nall_seed100",
        "quantum_mnist3_nall_seed100", "quantum_mnist8_nall_seed100",
    ]  # fmt: skip
    assert (tmp_path / "overview.png").read_text() == "overview"
    assert (tmp_path / "quantum_mnist8_training_progress.gif").read_text() == "quantum8"


def test_pictures_of_tissue_are_of_a_seed_of_their_own(commands, tmp_path):
    runs = tmp_path / "runs"
    (runs / "pictures" / "C").mkdir(parents=True)
    (runs / "pictures" / "C" / "overview.png").write_text("nine tissues")
    assert commands("pictures") == []  # one of its runs is not finished

    for arm in ("matched", "quantum"):
        run = runs / "C" / f"{arm}_mnist3_nall_seed104"
        (run / "config.json").write_text('{\n  "n_eval": 200\n}')
        (run / "training_progress.gif").write_text(arm)
    (call,) = commands("pictures")
    assert call[0] == "cal_fid_ssim_medmnist.py"
    assert [word.split("/")[-1] for word in call[1:3]] == [
        "matched_mnist3_nall_seed104", "quantum_mnist3_nall_seed104",
    ]  # fmt: skip
    assert (tmp_path / "tissue.png").read_text() == "nine tissues"
    assert (tmp_path / "matched_mnist3_training_progress.gif").read_text() == "matched"

    write_table(tmp_path / "study", "C", rows_of("C")[:-1])
    assert commands("pictures") == []


def test_runs_with_shots_are_found(commands, tmp_path):
    """MORE="--shots 100": their names go on behind the seed."""
    run = tmp_path / "runs" / "A" / "quantum_mnist3_nall_seed100"
    run.rename(run.with_name(f"{run.name}_shots100"))
    measured = [words for words in commands("A") if words[0] in EVALUATION]
    assert [sum("_nall_" in word for word in words) for words in measured] == [1] * 5
    assert f"{run}_shots100" in measured[0]


def test_seeds_whose_folders_are_gone_stop_nothing(commands, tmp_path):
    for folder in (tmp_path / "runs" / "A").glob("*_seed100"):
        shutil.rmtree(folder)
    judged = [words[-1] for words in commands("judges")]
    assert judged == [str(tmp_path / "study" / f"judge{k}.csv") for k in (1, 2) for _ in range(4)]
    assert commands("pictures") == []
    (gates,) = commands("gates")
    assert not any("matched" in word for word in gates)
    assert sum("_nall_seed" in word for word in gates) == 4  # the unfinished ones are left out
    shutil.rmtree(tmp_path / "runs")
    assert commands("gates", "judges") == []


@pytest.mark.parametrize("block, shown", [("A", 100), ("C", 104)])
def test_the_seed_of_the_pictures_does_not_depend_on_the_others(
    block, shown, commands, monkeypatch
):
    frames = {}
    for seeds in ("100 101", "101 104"):
        monkeypatch.setenv("SEEDS", seeds)
        for script, *words in commands(block):
            if script in TRAINING:
                args = TRAINING[script].build_parser().parse_args(words)
                frames.setdefault(args.seeds[0], set()).add(args.n_frames)
    assert frames == {100: {1}, 101: {1}, 104: {1}} | {shown: {30}}


def test_a_failed_run_is_told_at_the_end(tmp_path):
    stub = tmp_path / "python"
    stub.write_text("#!/bin/bash\nexit 2\n")
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUNS": str(tmp_path)}
    command = ["bash", ROOT / "result_gif" / "reproduce.sh", "B"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("a run failed, see above") == 6


def test_ctrl_c_stops_the_training(tmp_path):
    """Processes in the background of a script do not get it."""
    stub = tmp_path / "python"
    stub.write_text(f"#!/bin/bash\necho $$ >> {tmp_path}/started\nexec sleep 60\n")
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUNS": str(tmp_path)}
    command = ["bash", ROOT / "result_gif" / "reproduce.sh", "B"]

    def listen() -> None:
        """Tests that run in the background of a shell have the signal ignored."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=listen)
    started = tmp_path / "started"
    for _ in range(500):
        if started.exists() and len(started.read_text().split()) == 2:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    for pid in started.read_text().split():
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("blocks", [[], ["X"], ["A", "X"]])
def test_an_unknown_block_is_an_error(blocks):
    command = ["bash", ROOT / "result_gif" / "reproduce.sh", *blocks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "expected some of A, B, C, D, E, pictures, gates, judges, tables" in done.stderr
    assert done.stdout == ""


def test_only_whole_seeds_of_the_circuits_are_shown(commands, tmp_path):
    # Half of one seed and half of another are no seed.
    halves = {(100, "3"), (101, "8"), (103, "3"), (103, "8")}
    rows = [row for row in rows_of("E") if (int(row.split(",")[6]), row.split(",")[4]) in halves]
    write_table(tmp_path / "study", "E", rows)
    tables = shown(commands("tables"))
    assert tables["circuits"] == ["A.csv", "E.csv"]
    kept = (tmp_path / "study" / "circuits" / "E.csv").read_text().splitlines()
    assert kept[0].startswith("run,arm")
    assert [row.split(",")[6] for row in kept[1:]] == ["103"] * 16


def test_a_run_that_diverged_is_named(commands, tmp_path, monkeypatch):
    write_table(tmp_path / "study", "A", rows_of("A")[1:])
    assert "questions" not in shown(commands("tables"))
    monkeypatch.setenv("DIVERGED", "matched 0 all 100 1250")
    assert "A.csv" in shown(commands("tables"))["questions"]
