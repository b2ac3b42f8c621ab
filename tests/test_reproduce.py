"""The study's script: its commands are understood, and they ask for the runs of the plan."""

import os
import shlex
import subprocess
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


# Of the tables of whole blocks; a run of tissue has eleven.
ROWS = {"A": 150, "B": 30, "C": 110, "D": 40, "E": 80}


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
    for block, n_rows in ROWS.items():
        (pictures / f"{block}.csv").write_text("a row\n" * (1 + n_rows))

    def call(*blocks: str) -> list[list[str]]:
        log.write_text("")
        environment = os.environ | {
            "PATH": f"{stub.parent}:{os.environ['PATH']}",
            "OUT": str(pictures),
            "PICTURES": str(tmp_path),
        }
        script = ROOT / "result_gif" / "reproduce.sh"
        command = ["bash", script, *blocks]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        calls = log.read_text().splitlines()
        is_training = [shlex.split(line)[0] in TRAINING for line in calls]
        assert done.stdout.count(b"FID") == sum(is_training)
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
            assert len(options.runs) > 0 and options.out is None
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
    n_rows = 15 if block == "E" else ROWS[block] - 1  # one is missing; of E of a seed
    (tmp_path / "study" / f"{block}.csv").write_text("a row\n" * (1 + n_rows))
    tables = shown(commands("tables"))
    assert set(tables) == left
    assert all(f"{block}.csv" not in files for files in tables.values())


def test_the_studys_judge_is_put_where_the_evaluation_finds_it(commands, tmp_path, monkeypatch):
    (judge,) = (ROOT / "result_gif" / "results" / "study").glob("classifier_*.pt")
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


def test_pictures_wait_for_a_whole_block(commands, tmp_path):
    (tmp_path / "study" / "A.csv").write_text("a row\n" * ROWS["A"])
    assert commands("pictures") == []


@pytest.mark.parametrize("blocks", [[], ["X"], ["A", "X"]])
def test_an_unknown_block_is_an_error(blocks):
    command = ["bash", ROOT / "result_gif" / "reproduce.sh", *blocks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "expected some of A, B, C, D, E, pictures, gates, judges, tables" in done.stderr
    assert done.stdout == ""


def test_the_circuits_are_shown_when_a_seed_of_all_is_there(commands, tmp_path):
    (tmp_path / "study" / "E.csv").write_text("a row\n" * (1 + 3 * 16))
    assert shown(commands("tables"))["circuits"] == ["A.csv", "E.csv"]


def test_a_run_that_diverged_is_named(commands, tmp_path, monkeypatch):
    (tmp_path / "study" / "A.csv").write_text("a row\n" * ROWS["A"])
    assert "questions" not in shown(commands("tables"))
    monkeypatch.setenv("MISSING_A", "1")
    assert "A.csv" in shown(commands("tables"))["questions"]
