"""What the suites of the training scripts share."""

import os
import re
import struct
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import quantum_diffusion_mnist as mnist
import quantum_diffusion_pathmnist as pathmnist

# Tiny models are slower with more threads. Scripts that tests start see the variable.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

EMBEDDED = {
    mnist: ["--data", "digits", "--digits", "3"],
    pathmnist: ["--data", "tissue", "--no-augment"],
}


@pytest.fixture(params=EMBEDDED, ids=lambda module: module.__name__.rsplit("_")[-1])
def script(request):
    """A training script, for what differs between the two.

    test_shared_definitions.py keeps the rest identical, and it is tested on the first.
    """
    return request.param


def tiny(save_dir, *more, script=mnist) -> list[str]:
    """The command line of a run on embedded data that takes a second."""
    return [
        *EMBEDDED[script],
        "--save_dir", str(save_dir),
        "--device", "cpu",
        "--steps", "6",
        "--n_train", "8",
        "--batch_size", "4",
        "--timesteps", "8",
        "--n_frames", "3",
        "--n_samples", "2",
        "--n_eval", "4",
        "--n_qubits", "3",
        "--n_layers", "2",
        *map(str, more),
    ]  # fmt: skip


def only(folder):
    """The one run in a folder."""
    (found,) = folder.iterdir()
    return found


def circuit_inputs(batch: int, n_qubits: int, n_layers: int, n_weights: int = 2):
    """Random angles (batch, n) and weights (layers, n, k) of a circuit, float64, with gradients."""
    generator = torch.Generator().manual_seed(n_qubits * 10 + n_layers)
    kind = {"dtype": torch.float64, "generator": generator}
    angles = 3 * torch.randn(batch, n_qubits, **kind)
    weights = 6 * torch.rand(n_layers, n_qubits, n_weights, **kind)
    return angles.requires_grad_(), weights.requires_grad_()


def leave_zero(model: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Random weights for the layers that start at zero."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=std)
    return model


def write_idx(path, array):
    """The IDX format of the MNIST files: magic, dimensions, bytes."""
    header = struct.pack(f">I{array.dim()}I", 0x0800 + array.dim(), *array.shape)
    path.write_bytes(header + array.to(torch.uint8).numpy().tobytes())


def pictures(n):
    return torch.randint(256, (n, 28, 28), generator=torch.Generator().manual_seed(n))


@pytest.fixture
def mnist_dir(tmp_path):
    """A data folder with 60 training and 20 test images in torchvision's layout."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n in (("train", 60), ("t10k", 20)):
        write_idx(raw / f"{split}-images-idx3-ubyte", pictures(n))
        write_idx(raw / f"{split}-labels-idx1-ubyte", torch.arange(n) % 10)
    return tmp_path / "data"


def write_npz(folder, **replaced):
    """A file in medmnist's format; label of image k is 4 k mod 9."""
    arrays = {}
    for split, n in (("train", 90), ("val", 9), ("test", 36)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 28, 28, 3), dtype=np.uint8)
        arrays[f"{split}_images"] = pixels
        arrays[f"{split}_labels"] = (np.arange(n) * 4 % 9).astype(np.uint8)[:, None]
    arrays = {name: array for name, array in (arrays | replaced).items() if array is not None}
    np.savez(folder / "pathmnist.npz", **arrays)
    return arrays


@pytest.fixture
def fails(capsys):
    """Runs main and returns the one line it must print on stderr before exit code 2."""

    def check(module, argv) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            module.main([str(word) for word in argv])
        lines = re.split(r"[\r\n]+", capsys.readouterr().err.strip())
        expected = r"\d/\d+\S* \[|^downloading "  # progress bars, and what is downloaded
        lines = [line for line in lines if line.strip() and not re.search(expected, line)]
        assert exit_.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return check


@pytest.fixture
def quick_loss_curve(monkeypatch):
    """A line of text instead of the loss curve, whose axes take a third of a tiny run.

    For tests that do not look at it. Of other losses it is another picture.
    """

    def draw(losses, title):
        figure = Figure(figsize=(1, 1))
        figure.text(0, 0.5, f"{title}: {len(losses)}, {losses.double().mean()}")
        return figure

    for module in (mnist, pathmnist):
        monkeypatch.setattr(module, "draw_loss_curve", draw)


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails, as on a machine that is offline."""

    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.fixture(autouse=True)
def same_start(monkeypatch):
    """Every test has torch's seed 0 and no launcher's variables from outside."""
    torch.manual_seed(0)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["pytest"])
