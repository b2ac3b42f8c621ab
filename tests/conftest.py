"""Fixtures for the suites that both training scripts share."""

import re
import sys

import pytest

import quantum_diffusion_mnist as mnist

SCRIPTS = {"mnist": (mnist, "digits", ["--digits", "3"])}


@pytest.fixture(params=SCRIPTS)
def script(request):
    """A training script as a module; ``tiny`` gives a run of a second on its embedded data."""
    module, data, classes = SCRIPTS[request.param]
    module.tiny = lambda save_dir, *extra: [
        *("--data", data, *classes, "--save_dir", str(save_dir), "--device", "cpu"),
        *("--steps", "6", "--n_train", "8", "--batch_size", "4", "--timesteps", "8"),
        *("--n_frames", "3", "--n_samples", "2", "--n_eval", "4", *extra),
    ]
    return module


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


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """No launcher's variables from outside."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["pytest"])
