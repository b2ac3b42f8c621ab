"""Everything foreign (files, flags, environment) ends in one line and changes nothing."""

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_idx, write_npz
from filelock import FileLock
from PIL import Image, PngImagePlugin

import cal_fid_ssim
import debug_img
import quantum_diffusion_mnist as mnist
import quantum_diffusion_pathmnist as pathmnist

TINY = [
    *("--data", "digits", "--steps", "4", "--n_train", "8", "--batch_size", "4", "--n_frames", "2"),
    *("--n_samples", "2", "--n_eval", "4", "--sample_steps", "2", "--n_qubits", "3"),
    *("--n_layers", "2", "--device", "cpu"),
]
NAME = "{}_digits3_n8_seed0_steps2"
QUANTUM = [*TINY, "--save_dir", "runs", "--arm", "quantum"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs, of the arms quantum and matched."""
    folder = tmp_path_factory.mktemp("hostile")
    mnist.main([*TINY, "--arm", "quantum", "matched", "--save_dir", str(folder)])
    return folder


def hashes(folder) -> dict:
    """The content of every file of a folder but the lock's."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def run(runs, tmp_path, monkeypatch):
    """A copy of the quantum run, to be damaged."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(runs, tmp_path / "runs") / NAME.format("quantum")


def written(write) -> bytes:
    write(buffer := io.BytesIO())
    return buffer.getvalue()


class Payload:
    def __reduce__(self):
        return os.mkdir, ("owned",)


MUTATIONS = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "cut by one": lambda data: data[:-20],
    "zeros": lambda data: bytes(len(data)),
    "a bit flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4])
    + data[len(data) // 2 + 1 :],
    "text": lambda data: b"hello\xff",
    "a list": lambda data: b"[]",
    "a number": lambda data: b"1e999",
    "a pickle": lambda data: pickle.dumps(print),
    "a picture": lambda data: written(lambda f: Image.new("I;16", (62, 32)).save(f, "png")),
    "a payload": lambda data: written(lambda f: torch.save({"x": Payload()}, f)),
    "an archive": lambda data: written(lambda f: np.savez(f, a=0)),
    "a tensor": lambda data: written(lambda f: torch.save(torch.zeros(3), f)),
    "an empty dict": lambda data: written(lambda f: torch.save({}, f)),
}  # fmt: skip
GRID = {"count": 4, "columns": 2, "tile_height": 28, "tile_width": 28, "padding": 2, "scale": 1,
        "channels": 1}  # fmt: skip
DESCRIPTIONS = [
    "", "null", "[]", "{}", "{", '"x"', *(
        json.dumps(GRID | {key: value})
        for key in GRID for value in (0, -1, 3, 10**8, 1.5, "2", None, [1])
        if (key, value) not in [("count", 3), ("columns", 3)]
    ),
]  # fmt: skip
FILES = ["config.json", "model.pt", "checkpoint.pt", "samples_final.png", "samples/step_000002.png"]


@pytest.mark.parametrize("how", MUTATIONS)
@pytest.mark.parametrize("name", FILES)
def test_files_of_a_run(run, name, how, fails):
    path = run / name
    if name.startswith(("checkpoint", "samples/")):  # what is read when training goes on
        (run / "model.pt").unlink()
    data = MUTATIONS[how](path.read_bytes())
    if name == "config.json" and how in ("a bit flipped", "cut by one"):
        pytest.skip("may be another valid configuration")
    if name.endswith(".png") and how == "cut by one":
        pytest.skip("PNG readers need no end")
    path.write_bytes(data)
    before = hashes(run)
    assert name in fails(mnist, QUANTUM)
    assert hashes(run) == before and not Path("owned").exists()
    if name in ("config.json", "samples_final.png"):
        assert name in fails(cal_fid_ssim, [run, "--data", "digits"])


@pytest.mark.parametrize("text", DESCRIPTIONS)
def test_descriptions_of_a_grid(tmp_path, text):
    information = PngImagePlugin.PngInfo()
    information.add_text("grid", text)
    Image.new("L", (62, 62)).save(tmp_path / "grid.png", pnginfo=information)
    with pytest.raises(mnist.UserError, match="grid.png"):
        mnist.load_grid(tmp_path / "grid.png")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("settings", {"steps": "4"}), ("settings", {"steps": 5}), ("settings", {"arm": None}),
        ("settings", []), ("images", 7), ("images", {}), ("weights", 1), ("settings", {}),
    ],
)  # fmt: skip
def test_configurations(run, part, change, fails):
    config = json.loads((run / "config.json").read_text())
    mixed = config[part] | change if change and isinstance(change, dict) else change
    (run / "config.json").write_text(json.dumps(config | {part: mixed}))
    before = hashes(run)
    fails(mnist, QUANTUM)
    assert hashes(run) == before


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.pt"])
@pytest.mark.parametrize("other", ["matched", "nan", "3e38", "doubled", "cut"])
def test_weights_of_another_run(runs, run, name, other, fails):
    if name == "checkpoint.pt":
        (run / "model.pt").unlink()
    state = torch.load(runs / NAME.format("quantum") / name, weights_only=True)
    weights = state["average"] if name == "checkpoint.pt" else state
    if other == "matched":
        state = torch.load(runs / NAME.format("matched") / name, weights_only=True)
    elif other == "cut":
        state.get("moments", weights)[0] = torch.zeros(3)
    elif other in ("nan", "3e38"):
        weights["stem.bias"][0] = float(other)
    else:
        weights["stem.weight"] = weights["stem.weight"].repeat(1, 2, 1, 1)
    torch.save(state, run / name)
    line = fails(mnist, [*QUANTUM, "--n_eval", "9"])
    assert "model.pt" in line or name in line


NUMBERS = ["-1", "1e999", "-inf", "nan", "x", "", "9" * 25, "²", "0x10", "1,5", "None"]
LISTS = ["--n_train", "--seeds"]
FLAGS = [f"--{field.name}" for field in mnist.fields(mnist.Settings) if field.metadata]
FLAGS = [flag for flag in FLAGS if flag not in ("--simulator", "--simulator_options")]


@pytest.mark.parametrize("flag", [*FLAGS, *LISTS, "--epochs", "--n_eval"])
def test_numbers(tmp_path, flag, fails):
    values = NUMBERS if flag in ("--seeds", "--muon_lr", "--ema_decay") else [*NUMBERS, "0"]
    for value in values:
        if (flag, value) == ("--readout_noise", "0"):
            continue
        argv = [*TINY[:2], "--arm", "quantum", "--save_dir", tmp_path / "runs", f"{flag}={value}"]
        assert flag in fails(mnist, argv), value
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--sample_steps 2000", "sample_steps 2000: expected at most --timesteps 1000"),
        ("--gate_noise 0.1", "gate_noise"), ("--gate_noise 0.1,0.1,0.1", "gate_noise"),
        ("--gate_noise 0.1,1.5", "expected 0.0 to 1.0"), ("--lr nan", "expected 1e-09 to 1000.0"),
        ("--simulator no.such", "no.such does not run"), ("--simulator=", "--simulator"),
        ("--simulator default.qubit --n_qubits 40", "n_qubits 40: at most 24 on default.qubit"),
        ("--simulator default.mixed --n_qubits 11", "n_qubits 11: at most 10 on default.mixed"),
        ("--n_layers 6", "n_layers 6: at most 5, or --simulator default.qubit"),
        ('--simulator_options {"a":1}', "expected a PennyLane device"),
        ('--arm classical --simulator_options {"a":1}', "expected a PennyLane device"),
        ("--simulator_options {", "simulator_options"),
        ('--simulator default.qubit --simulator_options {"shots":3}', "and no shots"),
        ('--simulator default.qubit --simulator_options {"a":3}', "argument 'a'"),
        ("--simulator default.qubit --simulator_options 5", "expected a PennyLane"),
        ("--simulator default.qubit --simulator_options [1]", "expected a PennyLane"),
        ("--simulator lightning.qubit --gate_noise 0.1,0.1", "lightning.qubit does not run"),
        ("--device cuda:99", "expected auto, cpu"), ("--device tpu²", "expected auto, cpu"),
        ("--arm none", "arm"), ("--data cifar", "data"), ("--nope", "nope"),
        ("--use_quantum maybe", "use_quantum"), ("--arm quantum --use_quantum", "not allowed with"),
        ("--digits 10", "digits"), ("--digits ³", "digits"),
        ("--n_train 10000", "class 3 has 131 training images"),
        ("--steps 5 --epochs 5", "not allowed with"), ("--weights nowhere", "nowhere"),
        ("--save_dir /proc/none", "/proc/none"), ("--save_dir /dev/null", "/dev/null"),
        ("--data mnist --data_dir /dev/null", "/dev/null"),
    ],
)  # fmt: skip
def test_words(tmp_path, words, said, no_network, fails):
    arm = [] if words.startswith(("--arm", "--use_quantum")) else ["--arm", "quantum"]
    argv = [*TINY[:2], *arm, "--save_dir", tmp_path / "runs", *words.split()]
    assert said in fails(mnist, argv)
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_names_the_file_and_keeps_what_was_there(run, monkeypatch, fails):
    before = hashes(run)

    def full(path, data):
        open(path, "xb").close()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    message = fails(mnist, [*QUANTUM, "--n_eval", "9"])
    assert message.endswith(f"No space left on device: 'runs/{run.name}/samples_final.png'")
    assert hashes(run) == before


@pytest.mark.parametrize(
    "variables",
    [
        ("2", "2", "0"), ("32", "32", "0"), ("-1", "2", "0"), ("x", "2", "0"), ("0", "0", "0"),
        ("0", "", "0"), ("0", "x", "0"), ("0", "9" * 5000, "0"), ("0", "2", "-1"), ("²", "3", "0"),
    ],
)  # fmt: skip
def test_environment(tmp_path, monkeypatch, variables, fails):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), variables, strict=True):
        monkeypatch.setenv(name, value)
    assert "RANK" in fails(mnist, [*TINY, "--save_dir", tmp_path / "runs"])
    assert not (tmp_path / "runs").exists()


def test_a_folder_in_use_and_a_foreign_one(run, fails):
    (run / ".model.pt.7.tmp").write_text("being written")
    before = hashes(run)
    with FileLock(run / ".lock"):
        assert "in use" in fails(mnist, QUANTUM)
    assert hashes(run) == before
    mnist.save_grid(run / "samples_final.png", torch.zeros(3, 1, 28, 28).byte())  # of four
    assert "n_eval" in fails(cal_fid_ssim, [run])
    (run / "model.pt").write_bytes(b"")  # does not keep others from being made
    assert "model.pt" in fails(mnist, [*QUANTUM, "--seeds", 0, 1])
    assert Path("runs", run.name.replace("seed0", "seed1"), "samples_final.png").exists()
    shutil.rmtree(run), (run / ".git").mkdir(parents=True)
    assert "config.json" in fails(mnist, QUANTUM)


PIXELS, LABELS = np.zeros((4, 28, 28, 3), np.uint8), np.full((4, 1), 8)
TISSUES = {  # the training images and labels of pathmnist.npz
    "as they are": (PIXELS, LABELS), "no labels": (PIXELS, None), "of 64 pixels": (
    np.zeros((4, 64, 64, 3), np.uint8), LABELS), "grey": (PIXELS[..., 0], LABELS),
    "floats": (PIXELS / 2, LABELS), "float labels": (PIXELS, LABELS / 2),
    "too few labels": (PIXELS, LABELS[1:]), "a tenth class": (PIXELS, LABELS + 1),
    "too few images": (PIXELS[1:], LABELS), "pickles": (PIXELS, np.array([{}] * 4, object)),
}  # fmt: skip


@pytest.mark.parametrize("how", [k for k in (*MUTATIONS, *TISSUES) if k != "a bit flipped"])
def test_pathmnist_files(tmp_path, how, fails):
    path = tmp_path / "pathmnist.npz"
    names = "train_images", "train_labels"
    write_npz(tmp_path, **dict(zip(names, TISSUES.get(how, (PIXELS, LABELS)), strict=True)))
    path.write_bytes(MUTATIONS.get(how, bytes)(path.read_bytes()))
    argv = ["--data_dir", tmp_path, "--save_dir", tmp_path / "runs", "--n_train", "9"]
    said = "class adenocarcinoma has 4" if how == "as they are" else "pathmnist.npz"
    assert said in fails(pathmnist, argv)
    assert not (tmp_path / "runs").exists()


IDX = {
    "labels of 12 classes": lambda raw: write_idx(raw / LABEL_FILE, torch.arange(60) % 12),
    "too few labels": lambda raw: write_idx(raw / LABEL_FILE, torch.arange(59) % 10),
    "of 32 pixels": lambda raw: write_idx(raw / IMAGE_FILE, torch.zeros(60, 32, 32)),
    "missing": lambda raw: (raw / IMAGE_FILE).unlink(),
}
IMAGE_FILE, LABEL_FILE = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize("how", [*MUTATIONS, *IDX])
def test_mnist_files(mnist_dir, tmp_path, how, fails):
    """Never replaced by other data, whether MNIST was asked for or not."""
    path = (raw := mnist_dir / "MNIST" / "raw") / IMAGE_FILE
    if how in IDX:
        IDX[how](raw)
    elif how != "a bit flipped":  # of a pixel: another image
        path.write_bytes(MUTATIONS[how](path.read_bytes()))
    else:
        path.write_bytes(b"\1" + path.read_bytes()[1:])
    before = hashes(raw)
    for data in ("auto", "mnist"):
        argv = ["--data", data, "--data_dir", mnist_dir, "--save_dir", tmp_path / "runs"]
        assert str(raw) in fails(mnist, argv)
    assert hashes(raw) == before and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("how", ["empty", "half", "zeros", "text", "a pickle", "a picture"])
def test_pictures(runs, tmp_path, how, fails):
    path = tmp_path / "a$b|c\n.png"
    path.write_bytes(MUTATIONS[how]((runs / NAME.format("quantum") / "circuit.png").read_bytes()))
    before = hashes(tmp_path)
    fails(debug_img, [path])
    fails(debug_img, [path, "--out", path])
    assert hashes(tmp_path) == before
