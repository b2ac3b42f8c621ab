"""What disks damage and users mistype ends in one line and changes nothing."""

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import only, tiny, write_idx, write_npz

import cal_fid_ssim as evaluation
import quantum_diffusion_mnist as mnist
import quantum_diffusion_pathmnist as pathmnist

ROOT = Path(__file__).parent.parent


def hashes(folder) -> dict:
    """The content of every file of a folder but the lock's."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("hostile")
    mnist.main(tiny(folder, "--use_quantum"))
    return only(folder)


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of it, to be damaged, in ``runs`` below the working directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(finished, tmp_path / "runs" / finished.name)


# ------------------------------------------------------------------------------- damaged files


class Payload:
    """What a pickle can do on loading."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def as_bytes(write) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def flip_a_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "a bit flipped": flip_a_bit,
    "text": lambda data: b"hello\xff",
    "a payload": lambda data: as_bytes(lambda file: torch.save({"x": Payload()}, file)),
    "another tensor": lambda data: as_bytes(lambda file: torch.save({"x": torch.zeros(3)}, file)),
}
FILES = ["config.json", "model.pt", "checkpoint.pt", "samples_final.png"]


def not_trained_yet(run):
    """As if the run had been killed before its model was written."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"model_sha256": None}))
    (run / "model.pt").unlink()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_of_a_run(run, name, damage, fails):
    if name == "config.json" and damage == "a bit flipped":
        pytest.skip("may be another valid configuration")
    if name == "checkpoint.pt":  # is read when training goes on
        not_trained_yet(run)
    path = run / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = hashes(run)
    message = fails(mnist, tiny("runs", "--use_quantum", "--n_eval", "9"))
    assert str(path.relative_to(Path.cwd())) in message
    assert hashes(run) == before
    assert not Path("owned").exists()


@pytest.mark.parametrize("value", [float("nan"), 3e38])
@pytest.mark.parametrize("name", ["model.pt", "checkpoint.pt"])
def test_changed_weights(run, name, value, fails):
    if name == "checkpoint.pt":
        not_trained_yet(run)
    state = torch.load(run / name, weights_only=True)
    weights = state["average"] if name == "checkpoint.pt" else state
    weights["stem.bias"][0] = value
    torch.save(state, run / name)
    message = fails(mnist, tiny("runs", "--use_quantum", "--n_eval", "9"))
    assert name in message or "images are not numbers" in message
    assert len(mnist.load_grid(run / "samples_final.png")) == 4


def test_no_flipped_bit_of_a_grid_changes_its_images(finished, tmp_path):
    path = tmp_path / "grid.png"
    data = (finished / "samples_final.png").read_bytes()
    whole = mnist.load_grid(finished / "samples_final.png")
    positions = np.random.default_rng(0).choice(8 * len(data), 400, replace=False)
    refused = 0
    for position in positions.tolist():
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            images = mnist.load_grid(path)
        except mnist.UserError as error:
            assert str(error).startswith(f"{path}: not a sample grid of this project")
            refused += 1
        else:
            assert torch.equal(images, whole)
    assert refused > 300


def test_pictures_of_something_else_are_no_grid(tmp_path, finished):
    for name in ("circuit.png", "loss_curve.png"):
        with pytest.raises(mnist.UserError, match=f"{name}: not a sample grid of this project"):
            mnist.load_grid(finished / name)


@pytest.mark.parametrize("missing", ["circuit", "classes"])
def test_an_older_configuration_is_named(missing, run, fails):
    config = json.loads((run / "config.json").read_text())
    del (config if missing in config else config["settings"])[missing]
    (run / "config.json").write_text(json.dumps(config))
    for message in (
        fails(mnist, tiny("runs", "--use_quantum")),
        fails(evaluation, [run, "--data_dir", "data"]),
    ):
        assert "config.json: not a run's configuration of this version" in message


@pytest.mark.parametrize(
    "change",
    [
        {"n_eval": "2"},
        {"n_eval": None},
        {"went_on": None},
        {"went_on": [1]},
        {"circuit": {"operations": [], "trained": True, "n_weights": 2}},
    ],
)
def test_a_configuration_edited_by_hand_is_one_line(change, run, fails):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | change))
    message = fails(mnist, tiny("runs", "--use_quantum", "--n_eval", "50"))
    assert "config.json: not a run's configuration of this version" in message


def test_a_checkpoint_of_something_else_is_one_line(run, fails):
    (run / "model.pt").unlink()
    torch.save([1], run / "checkpoint.pt")
    assert "checkpoint.pt: of a run with other" in fails(mnist, tiny("runs", "--use_quantum"))


def test_a_full_disk_names_the_file_and_keeps_what_was_there(run, monkeypatch, fails):
    before = hashes(run)

    def full(path, data):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    message = fails(mnist, tiny("runs", "--use_quantum", "--n_eval", "9"))
    assert message.endswith(f"No space left on device: 'runs/{run.name}/samples_final.png'")
    assert hashes(run) == before


# --------------------------------------------------------------------------------- the data sets

PIXELS = np.full((4, 28, 28, 3), 7, np.uint8)
LABELS = np.full((4, 1), 8, np.uint8)
TISSUES = {  # the training images and labels of pathmnist.npz, and what is said
    "no labels": (PIXELS, None, "train_labels"),
    "64 pixels": (np.full((4, 64, 64, 3), 7, np.uint8), LABELS, "expected (N, 28, 28, 3)"),
    "grey": (PIXELS[..., 0], LABELS, "expected (N, 28, 28, 3)"),
    "black": (PIXELS * 0, LABELS, "4 of 4 train images are black: damaged"),
    "floats": (PIXELS / 2, LABELS, "images are float64"),
    "too few labels": (PIXELS, LABELS[1:], "labels are (3, 1), expected (4, 1)"),
    "a tenth class": (PIXELS, LABELS + 1, "labels are [9], expected 0 to 8"),
    "pickles": (PIXELS, np.array([{}] * 4, object), "allow_pickle"),
}


def pathmnist_fails(tmp_path, fails):
    """The one line that training on ``tmp_path / "pathmnist.npz"`` says."""
    argv = ["--data_dir", tmp_path, "--save_dir", tmp_path / "runs", "--n_train", "9"]
    message = fails(pathmnist, argv)
    assert not (tmp_path / "runs").exists()
    return " ".join(message.replace("np.uint8(9)", "9").split())


@pytest.mark.parametrize("kind", TISSUES)
def test_pathmnist_of_another_kind(tmp_path, kind, fails):
    images, labels, said = TISSUES[kind]
    write_npz(tmp_path, train_images=images, train_labels=labels)
    message = pathmnist_fails(tmp_path, fails)
    path = tmp_path / "pathmnist.npz"
    assert f"{path}: not PathMNIST at 28x28 pixels; move it away to download it again" in message
    assert said in message


@pytest.mark.parametrize("damage", ["empty", "half", "zeros", "text", "another tensor"])
def test_damaged_pathmnist(tmp_path, damage, fails):
    write_npz(tmp_path)
    path = tmp_path / "pathmnist.npz"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert f"{path}: not PathMNIST" in pathmnist_fails(tmp_path, fails)


IMAGE_FILE = "train-images-idx3-ubyte"
LABEL_FILE = "train-labels-idx1-ubyte"
DIGITS = {  # what is written in which of MNIST's files, and what is said
    "12 classes": (LABEL_FILE, torch.arange(60) % 12, "labels [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,"),
    "too few labels": (LABEL_FILE, torch.arange(59) % 10, "59 labels"),
    "32 pixels": (IMAGE_FILE, torch.ones(60, 32, 32), "images of (60, 1, 32, 32)"),
    "black": (IMAGE_FILE, torch.zeros(60, 28, 28), "60 of 60 training images are black: damaged"),
    "half black": (
        IMAGE_FILE,
        torch.cat([torch.ones(30, 28, 28), torch.zeros(30, 28, 28)]),
        "30 of 60 training images are black: damaged",
    ),
}


def mnist_fails(mnist_dir, tmp_path, fails):
    """The one line that is said whether MNIST was asked for or not: no other data are taken."""
    raw = mnist_dir / "MNIST" / "raw"
    before = hashes(raw)
    messages = []
    for data in ("auto", "mnist"):
        argv = ["--data", data, "--data_dir", mnist_dir, "--save_dir", tmp_path / "runs"]
        messages.append(fails(mnist, argv))
    assert messages[0] == messages[1]
    assert f"{raw}: not MNIST's four files; move them away to download them again" in messages[0]
    assert hashes(raw) == before
    assert not (tmp_path / "runs").exists()
    return messages[0]


@pytest.mark.parametrize("kind", DIGITS)
def test_mnist_of_another_kind(mnist_dir, tmp_path, kind, fails):
    name, array, said = DIGITS[kind]
    write_idx(mnist_dir / "MNIST" / "raw" / name, array)
    assert said in mnist_fails(mnist_dir, tmp_path, fails)


@pytest.mark.parametrize("damage", ["empty", "half", "zeros", "text", "missing"])
def test_damaged_mnist(mnist_dir, tmp_path, damage, fails):
    path = mnist_dir / "MNIST" / "raw" / IMAGE_FILE
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    mnist_fails(mnist_dir, tmp_path, fails)


# ------------------------------------------------------------------- the command line, environment

NUMBERS = [
    ("--n_train", "0", "--n_train 0: expected 1 to"),
    ("--n_train", "10000", "--n_train 10000: class 3 has 131 training images"),
    ("--n_train", "some", "--n_train: invalid"),
    ("--seeds", "-1", "--seed -1: expected 0 to"),
    ("--seeds", "1.5", "--seeds: invalid int value: '1.5'"),
    ("--steps", "0", "--steps 0: expected 1 to 1000000"),
    ("--steps", "1e3", "--steps: invalid int value: '1e3'"),
    ("--epochs", "0", "--epochs 0: expected at least 1"),
    ("--epochs", "1" + 400 * "0", "--epochs 10000000000000000000: expected at least 1, at most"),
    ("--batch_size", "100001", "--batch_size 100001: expected 1 to 100000"),
    ("--lr", "nan", "--lr nan: expected 1e-09 to 1000.0"),
    ("--lr", "0", "--lr 0.0: expected 1e-09 to 1000.0"),
    ("--lr", "3,5", "--lr: invalid float value: '3,5'"),
    ("--muon_lr", "inf", "--muon_lr inf: expected 0.0 to 1000.0"),
    ("--ema_decay", "1", "--ema_decay 1.0: expected 0.0 to 0.999999"),
    ("--timesteps", "1", "--timesteps 1: expected 2 to 100000"),
    ("--sample_steps", "2000", "--sample_steps 2000: expected at most --timesteps 1000"),
    ("--n_qubits", "0", "--n_qubits 0: expected 1 to 1024"),
    ("--n_layers", "0", "--n_layers 0: expected 1 to 100"),
    ("--n_layers", "5", "bond dimension 512 between qubits 0 and 1, at most 256; fewer layers"),
    ("--n_frames", "0", "--n_frames 0: expected 1 to 1000"),
    ("--n_samples", "0", "--n_samples 0: expected 1 to 1000"),
    ("--n_eval", "0", "--n_eval 0: expected 1 to 50000"),
    ("--shots", "0", "--shots 0: expected 1 to 100000"),
    ("--gate_noise", "0.1", "--gate_noise: invalid two_numbers value: '0.1'"),
    ("--gate_noise", "0.1,1.5", "--gate_noise (0.1, 1.5): expected two numbers of 0.0 to 1.0"),
    ("--readout_noise", "-0.1", "--readout_noise -0.1: expected 0.0 to 1.0"),
]


def quantum_fails(tmp_path, fails, *words):
    """The one line that is said before any folder is made."""
    argv = ["--data", "digits", "--save_dir", tmp_path / "runs"]
    message = fails(mnist, [*argv, *words])
    assert not (tmp_path / "runs").exists()
    return message


@pytest.mark.parametrize("flag, value, said", NUMBERS)
def test_numbers(tmp_path, flag, value, said, fails):
    assert said in quantum_fails(tmp_path, fails, "--use_quantum", f"{flag}={value}")


def test_every_number_has_a_row():
    flags = {flag for flag, *_ in NUMBERS}
    assert flags >= {f"--{name}" for name in mnist.RANGES if name != "seed"}


@pytest.mark.parametrize(
    "words, said",
    [
        ("--nope", "unrecognized arguments: --nope"),
        ("--arm none", "--arm: invalid choice: 'none'"),
        ("--arm quantum --use_quantum", "not allowed with argument"),
        ("--use_quantum maybe", "--use_quantum: invalid choice: 'maybe'"),
        ("--digits 10", "--digits: invalid choice: '10'"),
        ("--data cifar", "--data: invalid choice: 'cifar'"),
        ("--steps 5 --epochs 5", "not allowed with argument"),
        ("--epochs 1000000 --batch_size 1", "--steps 131000000: expected 1 to 1000000"),
        ("--steps 1000000 --batch_size 1000", "expected at most 200,000,000 images in all"),
        ("--device cuda:99", "--device cuda:99: expected auto, cpu, cuda or cuda:N"),
        (
            "--weights nowhere",
            "--weights nowhere: no nowhere/classical_digits3_nall_seed0/model.pt",
        ),
        ("--data mnist --data_dir /dev/null", "MNIST/raw would be downloaded there: '/dev/null'"),
    ],
)
def test_words(tmp_path, words, said, no_network, fails):
    assert said in quantum_fails(tmp_path, fails, *words.split())


@pytest.mark.parametrize(
    "simulator, options, said",
    [
        ("no.such", None, "--simulator no.such does not run the circuit"),
        ("default.qubit", '{"a": 3}', "argument 'a'"),
        ("default.qubit", '{"shots": 3}', "expected a JSON object, and no shots and no seed in it"),
        (
            "lightning.qubit",
            '{"seed": 3}',
            "expected a JSON object, and no shots and no seed in it",
        ),
        ("default.qubit", "[1]", "expected a JSON object"),
        ("default.qubit", "{", "--simulator_options: invalid loads value: '{'"),
        ("exact", '{"a": 1}', "expected a PennyLane device as --simulator"),
    ],
)
def test_simulators(tmp_path, simulator, options, said, fails):
    words = ["--use_quantum", "--simulator", simulator]
    if options is not None:
        words += ["--simulator_options", options]
    assert said in quantum_fails(tmp_path, fails, *words)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--arm ring", "CNOT on qubits 0 and 15: the exact simulation knows neighbours only"),
        ("--arm strong", "use --simulator lightning.qubit (at most 24 qubits, 2 to 7 s a step;"),
        ("--arm ring --shots 5", "use --simulator lightning.qubit"),
        (
            "--use_quantum --simulator lightning.qubit --gate_noise 0.1,0.1",
            "--simulator lightning.qubit does not run the circuit",
        ),
        (
            "--use_quantum --simulator default.qubit --n_qubits 40",
            "--n_qubits 40: at most 24 on default.qubit; the exact simulation takes more",
        ),
        (
            "--use_quantum --simulator default.mixed",
            "--n_qubits 16: at most 10 on default.mixed; the exact simulation takes more",
        ),
    ],
)
def test_circuits_that_a_simulator_cannot_run(tmp_path, words, said, fails):
    assert said in quantum_fails(tmp_path, fails, *words.split())


@pytest.mark.parametrize("folder", ["/proc/none", "/dev/null"])
def test_a_folder_that_cannot_be_made(folder, fails):
    assert folder in fails(mnist, tiny(folder))


@pytest.mark.parametrize(
    "rank, world_size, local_rank, said",
    [
        ("2", "2", "0", "RANK=2 WORLD_SIZE=2: expected a rank of 0 to 1"),
        ("-1", "2", "0", "RANK=-1 WORLD_SIZE=2: expected a rank of 0 to 1"),
        ("x", "2", "0", "RANK=x in the environment: no whole number"),
        ("0", "", "0", "WORLD_SIZE= in the environment: no whole number"),
        ("0", "2", "1.5", "LOCAL_RANK=1.5 in the environment: no whole number"),
        (None, "8", "0", "WORLD_SIZE=8 without RANK: set RANK to this process's number too"),
        ("1", None, "0", "RANK=1 without WORLD_SIZE: set it to the number of processes too"),
        ("0", "2", "-1", "WORLD_SIZE=2 LOCAL_RANK=-1: expected at least 1 process"),
        ("0", "0", "0", "WORLD_SIZE=0 LOCAL_RANK=0: expected at least 1 process"),
    ],
)
def test_environment(tmp_path, monkeypatch, rank, world_size, local_rank, said, fails):
    values = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank}
    for name, value in values.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert said in quantum_fails(tmp_path, fails)


def test_a_shell_inside_jupyter(finished, tmp_path):
    """It names a backend for figures that only Jupyter's own environment has."""
    shutil.copy(finished / "samples_final.png", tmp_path / "grid.png")

    # Both scripts at the same time: each takes seconds to import what it needs.
    processes = []
    for backend, *words in (
        ("matplotlib_inline", ROOT / "quantum_diffusion_mnist.py", "--help"),
        ("not_installed", ROOT / "debug_img.py", "grid.png"),
    ):
        process = subprocess.Popen(
            [sys.executable, *words],
            env=os.environ | {"MPLBACKEND": f"module://{backend}.backend_inline"},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)

    (text, errors), (_, errors_of_figure) = [process.communicate() for process in processes]
    assert processes[0].returncode == 0, errors
    assert "--use_quantum" in text
    assert processes[1].returncode == 0, errors_of_figure
    assert (tmp_path / "grid_split.png").exists()
