"""Fixtures for the suites of the training scripts."""

import re
import sys
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

import quantum_diffusion_mnist as mnist
import quantum_diffusion_pathmnist as pathmnist


class Embedded(NamedTuple):
    """How a script is run on the data that its libraries ship."""

    data: str
    classes: list[str]
    named: str
    channels: int


EMBEDDED = {
    mnist: Embedded("digits", ["--digits", "3"], "digits3", 1),
    pathmnist: Embedded("tissue", [], "tissue_immunohistochemistry", 3),
}


@pytest.fixture(params=EMBEDDED, ids=lambda module: module.__name__.rsplit("_")[-1])
def script(request) -> ModuleType:
    """A training script. Only for what differs between the two: test_shared_definitions.py keeps
    the rest identical, and it is tested on the first."""
    return request.param


@pytest.fixture
def embedded(script) -> Embedded:
    return EMBEDDED[script]


@pytest.fixture
def tiny():
    """The command line of a run that takes a second: tiny(save_dir, *more)."""

    def argv(save_dir, *more, script=mnist) -> list[str]:
        data = EMBEDDED[script]
        return [
            *("--data", data.data, *data.classes, "--save_dir", str(save_dir)),
            *("--device", "cpu", "--steps", "6", "--n_train", "8", "--batch_size", "4"),
            *("--timesteps", "8", "--n_frames", "3", "--n_samples", "2", "--n_eval", "4"),
            *("--n_qubits", "3", "--n_layers", "2", *map(str, more)),
        ]

    return argv


@pytest.fixture
def only():
    """The one run in a folder."""

    def run(folder):
        (found,) = folder.iterdir()
        return found

    return run


@pytest.fixture
def weights(only):
    """What the one run in a folder has learnt."""
    return lambda folder: torch.load(only(folder) / "model.pt", weights_only=True)


@pytest.fixture
def fails(capsys):
    """Runs main and returns the one line it must print on stderr before exit code 2."""

    def check(module, argv) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            module.main([str(word) for word in argv])
        assert exit_.value.code == 2
        lines = re.split(r"[\r\n]+", capsys.readouterr().err.strip())
        lines = [line for line in lines if line and "img/s" not in line]  # progress bars
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return check


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails, as on a machine that is offline."""

    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """No launcher's variables from outside."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["pytest"])
