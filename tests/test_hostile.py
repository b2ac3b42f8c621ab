"""Everything foreign (files, flags, environment) ends in one line and changes nothing."""

import errno
import hashlib
import io
import json
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
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


def refused(capsys, module, argv) -> str:
    """The one line in which a command ends, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        module.main([str(word) for word in argv])
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in lines if line and not re.search(r"\d%\|", line)]  # progress bars
    assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def picture(text: str | None = None, size=(62, 32)) -> bytes:
    """A grey PNG, with a description."""
    information, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    if text is not None:
        information.add_text("grid", text)
    Image.new("L", size).save(buffer, "png", pnginfo=information)
    return buffer.getvalue()


def tensors(value: object) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def archive(**members: bytes) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


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
    "a picture": lambda data: picture(),
    "an archive": lambda data: archive(a=b"b"),
    "a tensor": lambda data: tensors(torch.zeros(3)),
    "an empty dict": lambda data: tensors({}),
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
def test_files_of_a_run(runs, tmp_path, capsys, name, how):
    folder = shutil.copytree(runs, tmp_path / "runs") / NAME.format("quantum")
    path = folder / name
    if name.startswith(("checkpoint", "samples/")):  # what is read when training goes on
        (folder / "model.pt").unlink()
    data = MUTATIONS[how](path.read_bytes())
    if name == "config.json" and how in ("a bit flipped", "cut by one"):
        pytest.skip("may be another valid configuration")
    if name.endswith(".png") and how == "cut by one":
        pytest.skip("PNG readers need no end")
    path.write_bytes(data)
    before = hashes(folder)
    line = refused(capsys, mnist, [*TINY, "--arm", "quantum", "--save_dir", folder.parent])
    assert name in line
    assert hashes(folder) == before
    if name in ("config.json", "samples_final.png"):
        assert name in refused(capsys, cal_fid_ssim, [folder, "--data", "digits"])


@pytest.mark.parametrize("text", DESCRIPTIONS)
def test_descriptions_of_a_grid(tmp_path, capsys, text):
    path = tmp_path / "grid.png"
    path.write_bytes(picture(text, (62, 62)))
    with pytest.raises(mnist.UserError, match="grid.png"):
        mnist.load_grid(path)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("settings", {"steps": "4"}), ("settings", {"steps": 5}), ("settings", {"arm": None}),
        ("settings", []), ("images", 7), ("images", {}), ("weights", 1), ("settings", {}),
    ],
)  # fmt: skip
def test_configurations(runs, tmp_path, capsys, part, change):
    folder = shutil.copytree(runs, tmp_path / "runs") / NAME.format("quantum")
    config = json.loads((folder / "config.json").read_text())
    mixed = config[part] | change if change and isinstance(change, dict) else change
    (folder / "config.json").write_text(json.dumps(config | {part: mixed}))
    before = hashes(folder)
    refused(capsys, mnist, [*TINY, "--arm", "quantum", "--save_dir", folder.parent])
    assert hashes(folder) == before


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.pt"])
@pytest.mark.parametrize("other", ["matched", "not finite", "doubled"])
def test_weights_of_another_run(runs, tmp_path, capsys, name, other):
    folder = shutil.copytree(runs, tmp_path / "runs") / NAME.format("quantum")
    if name == "checkpoint.pt":
        (folder / "model.pt").unlink()
    state = torch.load(runs / NAME.format("quantum") / name, weights_only=True)
    weights = state["average"] if name == "checkpoint.pt" else state
    if other == "matched":
        state = torch.load(runs / NAME.format("matched") / name, weights_only=True)
        state["more"] = torch.zeros(1)  # a matched gate's weights have the quantum gate's shapes
    elif other == "not finite":
        weights["stem.bias"][0] = torch.nan
    else:
        weights["stem.weight"] = weights["stem.weight"].repeat(1, 2, 1, 1)
    torch.save(state, folder / name)
    line = refused(capsys, mnist, [*TINY, "--arm", "quantum", "--save_dir", folder.parent])
    assert "model.pt" in line or name in line


NUMBERS = ["-1", "1e999", "-inf", "nan", "x", "", "9" * 25, "²", "0x10", "1,5", "None"]
LISTS = ["--n_train", "--seeds"]
FLAGS = [f"--{field.name}" for field in mnist.fields(mnist.Settings) if field.metadata]
FLAGS = [flag for flag in FLAGS if flag not in ("--simulator", "--simulator_options")]


@pytest.mark.parametrize("flag", [*FLAGS, *LISTS, "--epochs", "--n_eval"])
def test_numbers(tmp_path, capsys, flag):
    values = NUMBERS if flag in ("--seeds", "--muon_lr", "--ema_decay") else [*NUMBERS, "0"]
    for value in values:
        if (flag, value) == ("--readout_noise", "0"):
            continue
        argv = [*TINY[:2], "--arm", "quantum", "--save_dir", tmp_path / "runs", f"{flag}={value}"]
        assert flag in refused(capsys, mnist, argv), value
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
        ("--simulator default.qubit --simulator_options 5", "default.qubit"),
        ("--simulator default.qubit --simulator_options [1]", "default.qubit"),
        ("--simulator lightning.qubit --gate_noise 0.1,0.1", "lightning.qubit does not run"),
        ("--device cuda:99", "expected auto, cpu"), ("--device cuda:²", "expected auto, cpu"),
        ("--device tpu", "expected auto, cpu"), ("--arm none", "arm"), ("--arm all", "arm"),
        ("--use_quantum maybe", "use_quantum"), ("--arm quantum --use_quantum", "not allowed with"),
        ("--digits 10", "digits"), ("--digits ³", "digits"), ("--data cifar", "data"),
        ("--n_train 10000", "class 3 has 131 training images"), ("--nope", "nope"),
        ("--steps 5 --epochs 5", "not allowed with"), ("--weights nowhere", "nowhere"),
        ("--save_dir /proc/none", "/proc/none"), ("--save_dir /dev/null", "/dev/null"),
        ("--data mnist --data_dir /dev/null", "/dev/null"),
    ],
)  # fmt: skip
def test_words(tmp_path, capsys, words, said, no_network):
    arm = [] if words.startswith(("--arm", "--use_quantum")) else ["--arm", "quantum"]
    argv = [*TINY[:2], *arm, "--save_dir", tmp_path / "runs", *words.split()]
    assert said in refused(capsys, mnist, argv)
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_names_the_file_and_keeps_what_was_there(runs, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(runs, tmp_path / "runs") / NAME.format("quantum")
    before = hashes(folder)

    def full(path, data):
        open(path, "xb").close()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    argv = [*TINY, "--arm", "quantum", "--n_eval", "9", "--save_dir", folder.parent]
    assert refused(capsys, mnist, argv).endswith(
        f"No space left on device: '{folder}/samples_final.png'"
    )
    assert hashes(folder) == before


@pytest.mark.parametrize(
    "variables",
    [
        ("2", "2", "0"), ("32", "32", "0"), ("-1", "2", "0"), ("x", "2", "0"), ("0", "0", "0"),
        ("0", "", "0"), ("0", "two", "0"), ("0", "1.0", "0"), ("0", "2", "-1"), ("²", "3", "0"),
    ],
)  # fmt: skip
def test_environment(tmp_path, capsys, monkeypatch, variables):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), variables, strict=True):
        monkeypatch.setenv(name, value)
    assert "RANK" in refused(capsys, mnist, [*TINY, "--save_dir", tmp_path / "runs"])
    assert not (tmp_path / "runs").exists()


def test_a_folder_in_use_and_a_foreign_one(runs, tmp_path, capsys):
    folder = shutil.copytree(runs, tmp_path / "runs") / NAME.format("quantum")
    (folder / ".model.pt.7.tmp").write_text("being written")
    before, argv = hashes(folder), [*TINY, "--arm", "quantum", "--save_dir", folder.parent]
    with FileLock(folder / ".lock"):
        assert "in use" in refused(capsys, mnist, argv)
    assert hashes(folder) == before
    (folder / "config.json").unlink()
    assert "config.json" in refused(capsys, mnist, argv)
    mnist.main([*TINY, "--arm", "matched", "--save_dir", str(folder.parent)])  # the other is whole


def test_a_half_sampled_grid_is_not_measured(runs, tmp_path, capsys):
    folder = shutil.copytree(runs, tmp_path / "runs") / NAME.format("quantum")
    images = mnist.load_grid(folder / "samples_final.png")
    mnist.save_grid(folder / "samples_final.png", images[:3])
    assert "n_eval" in refused(capsys, cal_fid_ssim, [folder, "--data", "digits"])


@pytest.mark.parametrize("how", [*MUTATIONS, "a short header", "wrong labels", "floats"])
def test_data_sets(tmp_path, capsys, how):
    if how == "a bit flipped":
        pytest.skip("lies in a split that is not read")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.zeros((4, 28, 28, 3), np.uint8)
    data = npz(images, np.full((4, 1), 9 if how == "wrong labels" else 0, np.uint8))
    if how == "floats":
        data = npz(images / 2, np.zeros((4, 1)))
    elif how == "a short header":
        data = npz(images[:2], np.zeros((4, 1), np.uint8))
    elif how in MUTATIONS:
        data = MUTATIONS[how](data)
    (tmp_path / "pathmnist.npz").write_bytes(data)
    (raw / "train-images-idx3-ubyte").write_bytes(data[:100])
    argv = ["--data_dir", tmp_path, "--save_dir", tmp_path / "runs", "--steps", "1"]
    assert "pathmnist.npz" in refused(capsys, pathmnist, [*argv, "--data", "pathmnist"])
    assert "raw" in refused(capsys, mnist, [*argv, "--data", "mnist"])


def npz(images, labels) -> bytes:
    arrays = {f"{split}_{name}": array for split in ("train", "val", "test")
              for name, array in (("images", images), ("labels", labels))}  # fmt: skip
    np.savez(buffer := io.BytesIO(), **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("how", ["empty", "half", "zeros", "text", "a pickle", "an archive"])
def test_pictures(runs, tmp_path, capsys, how):
    path = tmp_path / "a$b|c\n.png"
    path.write_bytes(MUTATIONS[how]((runs / NAME.format("quantum") / "circuit.png").read_bytes()))
    before = hashes(tmp_path)
    refused(capsys, debug_img, [path])
    refused(capsys, debug_img, [path, "--out", path])
    assert hashes(tmp_path) == before
