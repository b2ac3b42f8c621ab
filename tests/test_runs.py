"""Whole runs from the command line: what they write, resume, identity, sharding, help, README."""

import errno
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import threading
from dataclasses import fields
from functools import partial
from pathlib import Path

import filelock
import matplotlib
import pytest
import torch
from conftest import only, tiny
from PIL import Image
from torch.utils._pytree import tree_map

import quantum_diffusion_mnist as qd
import quantum_diffusion_pathmnist as pathmnist

ROOT = Path(__file__).parent.parent
NOISY = ["--use_quantum", "--shots", "8", "--gate_noise", "0.05,0.1", "--readout_noise", "0.02"]


def tensors(path):
    """A file of nested tensors, with the tensors' bytes in their place."""

    def to_bytes(value):
        return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value

    return tree_map(to_bytes, torch.load(path, weights_only=True))


def contents(run):
    """Everything that a run wrote but its record of the circumstances."""
    result = {}
    for path in run.rglob("*"):
        if path.is_file() and path.name not in ("config.json", ".lock"):
            is_tensors = path.suffix == ".pt"
            result[str(path.relative_to(run))] = tensors(path) if is_tensors else path.read_bytes()
    return result


def config_of(run):
    return json.loads((run / "config.json").read_text())


def grid_of(run):
    return qd.load_grid(run / "samples_final.png")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run without noise, to be left as it is."""
    folder = tmp_path_factory.mktemp("ideal")
    qd.main(tiny(folder, "--use_quantum", "--lr", "0.05"))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of this run, in ``tmp_path / "copy"``."""
    shutil.copytree(finished, tmp_path / "copy")
    return only(tmp_path / "copy")


# ------------------------------------------------------------------------------ what a run writes


def test_a_run_writes_its_folder(script, tmp_path):
    script.main(tiny(tmp_path, "--use_quantum", script=script))
    run = only(tmp_path)
    data = {qd: "digits3", pathmnist: "tissue_immunohistochemistry"}[script]
    channels = {qd: 1, pathmnist: 3}[script]
    assert run.name == f"quantum_{data}_n8_seed0"
    assert {path.name for path in run.rglob("*") if path.is_file()} == {
        "config.json",
        "loss.csv",
        "checkpoint.pt",
        "model.pt",
        ".lock",
        "circuit.png",
        "loss_curve.png",
        "samples_final.png",
        "training_progress.gif",
        "step_000002.png",
        "step_000004.png",
        "step_000006.png",
    }

    losses = (run / "loss.csv").read_text().splitlines()
    assert losses[0] == "step,loss"
    assert len(losses) == 7
    assert script.load_grid(run / "samples_final.png").shape == (4, channels, 28, 28)
    assert script.load_grid(run / "samples/step_000002.png").shape == (2, channels, 28, 28)
    with Image.open(run / "training_progress.gif") as animation:
        assert animation.n_frames == 3


def test_the_configuration_says_what_made_the_run(finished):
    config = config_of(only(finished))
    assert config["images"]["used"] == 8
    assert config["images"]["available"] == 131
    assert config["images"]["total"] == 1438
    assert config["n_eval"] == 4
    assert config["settings"]["lr"] == 0.05
    assert {"command", "versions", "device", "git", "threads"} <= set(config)
    assert config["circuit"]["operations"].startswith("RY(x0) 0; RY(x1) 1; RY(x2) 2; RZ(w0) 0;")

    unet = qd.make_unet(1, qd.Settings("quantum", n_qubits=3, n_layers=2))
    for part, module in (("model", unet), ("gate", unet.gate)):
        assert config["parameters"][part] == sum(p.numel() for p in module.parameters())


def test_a_finished_run_is_loaded_as_a_library(finished):
    run = only(finished)
    settings, model = qd.load_run(run)
    assert settings == qd.Settings(
        "quantum",
        n_train=8,
        steps=6,
        batch_size=4,
        lr=0.05,
        timesteps=8,
        n_qubits=3,
        n_layers=2,
        n_frames=3,
        n_samples=2,
    )

    # model.pt is a plain state dict.
    by_hand = qd.UNet(1, partial(qd.QuantumGate, n_qubits=3, n_layers=2))
    by_hand.load_state_dict(torch.load(run / "model.pt"))
    x = torch.randn(2, 1, 28, 28)
    t = torch.tensor([1, 5])
    assert torch.equal(by_hand(x, t), model(x, t))
    assert model(x, t).abs().max() > 1e-3
    with torch.no_grad():
        model.gate.project_out.bias.add_(1)  # the gate that was loaded is in use
    assert not torch.equal(by_hand(x, t), model(x, t))


def test_captions_begin_with_the_step(run, monkeypatch):
    frames = []
    monkeypatch.setattr(qd, "save_gif", lambda path, pictures, names: frames.extend(pictures))
    settings, _ = qd.load_run(run)
    (run / "training_progress.gif").unlink()
    qd.draw_pictures(settings, run)
    assert [caption.split()[:2] for caption, _ in frames] == [
        ["step", "2"],
        ["step", "4"],
        ["step", "6"],
    ]


# ------------------------------------------------------------------------------- killed, resumed


@pytest.mark.usefixtures("quick_loss_curve")
def test_killed_anywhere_and_continued_equals_uninterrupted(tmp_path, monkeypatch):
    # What is on the disk just before each file gets its name.
    states = []
    replace = os.replace

    def photographed(source, target):
        copy = tmp_path / f"state{len(states)}"
        shutil.copytree(tmp_path / "whole", copy)
        states.append((Path(target).name, copy))
        replace(source, target)

    options = [*NOISY, "--steps", "4", "--n_frames", "2", "--timesteps", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", photographed)
        qd.main(tiny(tmp_path / "whole", *options))
    whole = contents(only(tmp_path / "whole"))

    pictures = ["loss_curve.png", "training_progress.gif", "circuit.png"]
    assert [name for name, _ in states] == [
        "config.json",
        *["step_000002.png", "loss.csv", "checkpoint.pt"],
        *["step_000004.png", "loss.csv", "checkpoint.pt"],
        *["model.pt", "config.json"],
        *["samples_final.png", "config.json"],
        *pictures,
    ]
    for name, copy in states:
        assert list(only(copy).rglob(".*.part"))
        qd.main(tiny(copy, *options))
        assert contents(only(copy)) == whole, name


@pytest.mark.parametrize("place", ["training_noise", "save_checkpoint", "sample_images"])
def test_ctrl_c_leaves_a_run_that_continues(place, run, tmp_path, monkeypatch, capsys):
    original = getattr(qd, place)
    calls = []

    def pressed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    argv = tiny(tmp_path / "cut", "--use_quantum", "--lr", "0.05")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(qd, place, pressed)
        qd.main(argv)
    assert exit_.value.code == 130
    assert "the same command continues" in capsys.readouterr().err.splitlines()[-1]
    qd.main(argv)
    assert contents(only(tmp_path / "cut")) == contents(run)


@pytest.mark.usefixtures("quick_loss_curve")
def test_main_runs_in_a_thread(tmp_path):
    errors = []

    def work():
        try:
            qd.main(tiny(tmp_path, "--steps", "1"))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    assert grid_of(only(tmp_path)).shape == (4, 1, 28, 28)


def test_a_second_start_changes_nothing(run, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.p*")}
    qd.main(tiny(tmp_path / "copy", "--use_quantum", "--lr", "0.05"))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.p*")} == before


@pytest.mark.usefixtures("quick_loss_curve")
def test_a_larger_n_eval_only_samples_the_missing_images(tmp_path, monkeypatch):
    # Shots too: an image does not depend on those it is drawn with.
    argv = [*NOISY, "--lr", "0.05", "--timesteps", "2", "--n_eval"]
    qd.main(tiny(tmp_path / "a", *argv, 70))
    qd.main(tiny(tmp_path / "b", *argv, 3))
    b = only(tmp_path / "b")
    at_once = grid_of(only(tmp_path / "a"))
    assert len({image.numpy().tobytes() for image in at_once}) == 70
    assert torch.equal(grid_of(b), at_once[:3])

    # The first image is marked, to be seen again.
    model = (b / "model.pt").stat().st_mtime_ns
    marked = grid_of(b)
    marked[0] = 77
    qd.save_grid(b / "samples_final.png", marked, run=qd.run_hash(config_of(b)))

    # Killed at the second chunk of images.
    drawn = []
    sample_images = qd.sample_images

    def interrupted(settings, model, series, numbers, steps, bar):
        drawn.append(numbers)
        if len(drawn) == 2:
            raise SystemError("killed")
        return sample_images(settings, model, series, numbers, steps, bar)

    monkeypatch.setattr(qd, "sample_images", interrupted)
    with pytest.raises(SystemError):
        qd.main(tiny(tmp_path / "b", *argv, 70))
    assert len(grid_of(b)) == 67
    assert config_of(b)["n_eval"] == 3

    # What the evaluation says is of fewer images, and goes; it stays where no image is added.
    metrics = b / "metrics.json"
    metrics.write_text("of 3 images")
    qd.main(tiny(tmp_path / "b", *argv, 70))
    assert not metrics.exists()
    metrics.write_text("of 70 images")
    qd.main(tiny(tmp_path / "b", *argv, 5))  # never fewer
    assert metrics.read_text() == "of 70 images"
    assert drawn == [range(3, 67), range(67, 83), range(67, 83)]
    assert torch.equal(grid_of(b)[1:], at_once[1:])
    assert grid_of(b)[0].eq(77).all()
    assert config_of(b)["n_eval"] == 70
    assert (b / "model.pt").stat().st_mtime_ns == model


@pytest.mark.usefixtures("quick_loss_curve")
def test_lost_previews_do_not_block_a_run(tmp_path, monkeypatch):
    def die(*args, **changes):
        raise SystemError("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(qd, "update_config", die)  # model.pt is there, and config.json without it
        qd.main(tiny(tmp_path))
    run = only(tmp_path)
    (run / "samples/step_000002.png").unlink()
    qd.main(tiny(tmp_path))
    with Image.open(run / "training_progress.gif") as animation:
        assert animation.n_frames == 2
    assert len(grid_of(run)) == 4


# --------------------------------------------------------------------------------- what a run is


def planned(*argv):
    """The settings of the runs that a command line asks for."""
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qd, "make_run", lambda args, data, device, run: runs.append(run))
        qd.main([str(word) for word in argv])
    return [run.settings for run in runs]


FLAGS = {  # each with another value than its default
    "steps": 7,
    "batch_size": 5,
    "lr": 0.01,
    "muon_lr": 0.3,
    "ema_decay": 0.5,
    "timesteps": 90,
    "n_qubits": 4,
    "n_layers": 1,
    "n_frames": 2,
    "n_samples": 1,
    "sample_steps": 3,
    "simulator": "default.mixed",
    "simulator_options": {},
    "shots": 5,
    "gate_noise": (0.2, 0.0),
    "readout_noise": 0.2,
}


def test_every_flag_of_a_setting_reaches_its_runs(tmp_path):
    of_the_grid = {"arm", "data", "classes", "n_train", "seed"}
    assert FLAGS.keys() | of_the_grid == {field.name for field in fields(qd.Settings)}
    words = []
    for name, value in FLAGS.items():
        text = {"simulator_options": "{}", "gate_noise": "0.2,0.0"}.get(name, value)
        words += [f"--{name}", text]
    grid = ["--digits", "3", "8", "--n_train", "6", "all", "--seeds", "4"]
    where = ["--data", "digits", "--save_dir", tmp_path]
    found = planned(*where, "--arm", "quantum", "matched", *grid, *words)

    expected = []
    for label in (3, 8):
        for n_train in (6, None):
            known = {"data": "digits", "classes": (label,), "n_train": n_train, "seed": 4}
            expected.append(qd.Settings("quantum", **known, **FLAGS))
            expected.append(qd.Settings("matched", **known, **FLAGS | qd.IDEAL))  # no circuit
    assert found == expected
    assert found[0].name == "quantum_digits3_n6_seed4_default.mixed_shots5_gate0.2-0.0_" + (
        "readout0.2_steps3"
    )
    assert found[-1].name == "matched_digits8_nall_seed4_steps3"
    assert not list(tmp_path.iterdir())


def test_epochs_are_passes_over_the_training_images(tmp_path):
    where = ["--data", "digits", "--save_dir", tmp_path, "--n_train", "9", "--batch_size", "4"]
    (settings,) = planned(*where, "--epochs", "5")
    assert settings.steps == 12  # 45 images in batches of 4
    assert settings.arm == "classical"

    # A batch for which the default number of steps would be too many.
    large = ["--batch_size", "100000", "--conditional"]
    (settings,) = planned(*where, *large, "--epochs", "1")
    assert settings.steps == 1


@pytest.mark.parametrize(
    "options, said",
    [
        (["--n_qubits", "4"], "n_qubits 3 (asked for: 4)"),
        (["--steps", "7"], "steps 6 (asked for: 7)"),
        (["--lr", "0.01"], "lr 0.05 (asked for: 0.01)"),
    ],
)
def test_another_run_of_the_same_name_is_refused(options, said, run, tmp_path, fails):
    before = contents(run)
    argv = tiny(tmp_path / "copy", "--use_quantum", "--lr", "0.05", *options)
    message = fails(qd, argv)
    assert f"{run} is another run: " in message
    assert said in message
    assert "use another --save_dir" in message
    assert contents(run) == before


def test_a_run_of_more_images_than_asked_for_is_another_run(run, tmp_path, fails):
    config = config_of(run)
    config["images"]["symmetries"] = 8  # which --no-augment does not write
    (run / "config.json").write_text(json.dumps(config))
    message = fails(qd, tiny(tmp_path / "copy", "--use_quantum", "--lr", "0.05"))
    assert "is another run: symmetries 8 (asked for: None)" in message


@pytest.mark.usefixtures("quick_loss_curve")
def test_a_model_trained_anew_has_its_own_images(run, tmp_path, monkeypatch):
    plain = qd.training_noise

    def other_noise(settings, x0, step):
        t, noise = plain(settings, x0, step)
        return t, -noise

    monkeypatch.setattr(qd, "training_noise", other_noise)
    argv = [
        tiny(folder, "--use_quantum", "--lr", "0.05")
        for folder in (tmp_path / "copy", tmp_path / "new")
    ]
    before = grid_of(run)
    measured = [run / name for name in ("metrics.json", "metrics_paper.json", "closest_pairs.png")]
    for file in measured:
        file.write_text("of the model that is lost")
    (run / "model.pt").unlink()
    (run / "checkpoint.pt").unlink()

    # Killed where the new model is written and not yet named in config.json: it goes on, too.
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        update = qd.update_config

        def killed(folder, **entries):
            if entries.get("model_sha256"):
                raise KeyboardInterrupt
            update(folder, **entries)

        patch.setattr(qd, "update_config", killed)
        qd.main(argv[0])
    assert (run / "model.pt").exists()
    qd.main(argv[0])
    assert not any(file.exists() for file in measured)
    qd.main(argv[1])
    assert not torch.equal(grid_of(run), before)
    new = only(tmp_path / "new")
    assert torch.equal(grid_of(run), grid_of(new))
    for name in ("loss.csv", "training_progress.gif"):
        assert (run / name).read_bytes() == (new / name).read_bytes()


def test_previews_are_in_the_order_of_steps(run, monkeypatch):
    """Also those of more than 999,999 steps."""
    (run / "samples/step_000004.png").rename(run / "samples/step_200000.png")
    (run / "samples/step_000006.png").rename(run / "samples/step_1000000.png")
    (run / "training_progress.gif").unlink()
    captions = []
    monkeypatch.setattr(
        qd, "save_gif", lambda _path, frames, _names: captions.extend(text for text, _ in frames)
    )
    qd.draw_pictures(qd.load_run(run)[0], run)
    steps = [int(caption.split()[1]) for caption in captions]
    assert steps == [2, 200000, 1000000]


def test_a_run_that_goes_on_elsewhere_says_so(run, tmp_path, capsys):
    (run / "config.json").write_text(json.dumps(config_of(run) | {"threads": 99}))
    argv = tiny(tmp_path / "copy", "--use_quantum", "--lr", "0.05")
    qd.main(argv)  # all is there
    assert "NOTICE" not in capsys.readouterr().out
    assert "went_on" not in config_of(run)

    qd.main([*argv, "--n_eval", "5"])
    assert "NOTICE: made with threads 99 so far: it goes on otherwise" in capsys.readouterr().out
    qd.main([*argv, "--n_eval", "6"])
    assert "NOTICE" not in capsys.readouterr().out
    (went_on,) = config_of(run)["went_on"]
    assert went_on["threads"] == torch.get_num_threads()
    assert set(went_on) == {"versions", "git", "device", "threads"}

    # The script was changed.
    elsewhere = went_on | {"git": "another"}
    (run / "config.json").write_text(json.dumps(config_of(run) | {"went_on": [elsewhere]}))
    qd.main([*argv, "--n_eval", "7"])
    assert "NOTICE: made with git 'another' so far: it goes on" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, said",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory"),
        (MemoryError(), "out of memory"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ],
)
def test_no_advice_to_remove_a_file_that_is_not_at_fault(
    error, said, run, tmp_path, fails, monkeypatch
):

    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", load)
    argv = tiny(tmp_path / "copy", "--use_quantum", "--lr", "0.05", "--n_eval", "5")
    message = fails(qd, argv)
    assert said in message
    assert "remove" not in message


def test_conditions_without_effect_are_told(tmp_path, capsys):
    qd.main(tiny(tmp_path, "--shots", "5", "--steps", "1", "--n_frames", "1"))
    notice = "NOTICE: --shots: without effect, no circuit in --arm classical"
    assert notice in capsys.readouterr().out


def test_more_images_than_one_picture_takes(tmp_path, fails):
    argv = tiny(tmp_path, "--digits", "all", "--conditional", "--n_eval", "20000")
    assert "--n_eval 20000: at most 9876 images of each class of a model" in fails(qd, argv)

    # Ten rows of so many tiles of 30 pixels, and a rim; and of one more.
    height = 10 * 30 + 2
    assert (9876 * 30 + 2) * height <= Image.MAX_IMAGE_PIXELS < (9877 * 30 + 2) * height


def test_a_changed_circuit_is_another_run(run, tmp_path, fails, monkeypatch):
    changed = qd.ARMS["quantum"]._replace(circuit=qd.cz_circuit)
    monkeypatch.setitem(qd.ARMS, "quantum", changed)
    message = fails(qd, tiny(tmp_path / "copy", "--use_quantum", "--lr", "0.05"))
    assert "operations 'RZ(w0) 0' (asked for: 'RX(w0) 0')" in message


@pytest.fixture(scope="module")
def another_rate(tmp_path_factory):
    """The folder of the run that only its learning rate tells from ``finished``."""
    folder = tmp_path_factory.mktemp("other")
    qd.main(tiny(folder, "--use_quantum", "--lr", "0.01"))
    return folder


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.pt", "samples_final.png"])
def test_a_file_of_a_run_with_another_rate_is_refused(name, run, another_rate, tmp_path, fails):
    other = only(another_rate)
    if name == "checkpoint.pt":  # which is read when training goes on
        (run / "model.pt").unlink()
        (run / "samples_final.png").unlink()
        (run / "config.json").write_text(json.dumps(config_of(run) | {"model_sha256": None}))
    shutil.copy(other / name, run / name)
    before = contents(run)
    message = fails(qd, tiny(tmp_path / "copy", "--use_quantum", "--lr", "0.05"))
    assert str(run / name) in message
    assert "remove it" in message
    assert contents(run) == before


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint.pt",
        "model.pt",
        "samples_final.png",
        "loss_curve.png",
        "circuit.png",
        "training_progress.gif",
    ],
)
def test_what_was_removed_is_made_again(name, run, tmp_path):
    before = contents(run)
    (run / name).unlink()
    qd.main(tiny(tmp_path / "copy", "--use_quantum", "--lr", "0.05"))
    after = contents(run)
    if name == "checkpoint.pt":  # of a finished run, it is not needed
        after[name] = before[name]
    assert after == before


def test_a_run_is_loaded_with_its_own_circuit_alone(run, monkeypatch):
    monkeypatch.setitem(qd.ARMS, "quantum", qd.ARMS["quantum"]._replace(circuit=qd.cz_circuit))
    with pytest.raises(
        qd.UserError, match="not this script's: operations 'RZ.w0. 0' .asked for: 'RX"
    ):
        qd.load_run(run)


@pytest.mark.usefixtures("quick_loss_curve")
def test_whether_the_circuit_is_trained_is_part_of_a_run(tmp_path, monkeypatch, fails):
    argv = tiny(tmp_path, "--use_quantum")
    qd.main(argv)
    monkeypatch.setitem(qd.ARMS, "quantum", qd.ARMS["quantum"]._replace(trained=False))
    assert "trained True (asked for: False)" in fails(qd, argv)


@pytest.mark.usefixtures("quick_loss_curve")
def test_a_folder_that_becomes_another_runs_loses_its_pictures(tmp_path, monkeypatch):
    qd.main(tiny(tmp_path, "--use_quantum"))
    run = only(tmp_path)
    for name in ("metrics.json", "closest_pairs.png"):
        (run / name).write_text("of the evaluation")
    before = contents(run)
    for result in ("checkpoint.pt", "model.pt", "samples_final.png"):
        (run / result).unlink()

    def killed(*arguments):
        raise SystemError("killed")

    # Killed before the first step: nothing of the old run is left.
    argv = tiny(tmp_path, "--use_quantum", "--n_layers", "1", "--steps", "4")
    with monkeypatch.context() as patched, pytest.raises(SystemError):
        patched.setattr(qd, "train", killed)
        qd.main(argv)
    assert {path.name for path in run.iterdir()} <= {"config.json", ".lock", "samples"}
    qd.main(argv)

    # All is of the new run.
    after = contents(run)
    assert config_of(run)["settings"]["n_layers"] == 1
    for name in ("circuit.png", "loss_curve.png", "training_progress.gif", "loss.csv"):
        assert after[name] != before[name], name
    assert {path.name for path in (run / "samples").iterdir()} == {
        "step_000002.png",
        "step_000003.png",
        "step_000004.png",
    }


def test_equal_settings_have_one_name_and_one_hash():
    def config(**numbers):
        settings = qd.Settings("quantum", **numbers)
        return {"settings": vars(settings), "images": {}, "weights": {}, "circuit": {}}, settings

    for same in (
        [{"readout_noise": 0.0}, {"readout_noise": -0.0}, {"gate_noise": (-0.0, 0)}],
        [{"gate_noise": (0, 1)}, {"gate_noise": [-0.0, 1.0]}],
        [{"muon_lr": 0, "lr": 1}, {"muon_lr": -0.0, "lr": 1.0}],
    ):
        configs = [config(**numbers) for numbers in same]
        assert len({qd.run_hash(one) for one, _ in configs}) == 1
        assert len({settings.name for _, settings in configs}) == 1


def test_weights_of_one_run_are_sampled_under_other_conditions(finished, run, tmp_path, fails):
    argv = ["--use_quantum", "--lr", "0.05", "--weights", finished]
    source = only(finished)
    before = contents(source)
    images = grid_of(source)

    # On another exact simulator the images are the same but for rounding.
    device = ["--simulator", "default.qubit"]
    twin = tmp_path / "others" / f"{source.name}_default.qubit"
    for n in (4, 6):
        qd.main(tiny(tmp_path / "others", *argv, *device, "--n_eval", n))
        other = grid_of(twin)
        assert len(other) == config_of(twin)["n_eval"] == n
        assert (other[:4].int() - images.int()).abs().max() <= 2
    names = {path.name for path in twin.iterdir()}
    assert names == {"config.json", ".lock", "model.pt", "samples_final.png"}  # nothing trained
    assert (twin / "model.pt").read_bytes() == (source / "model.pt").read_bytes()
    assert config_of(twin)["weights"]["weights_sha256"] == config_of(source)["model_sha256"]

    # With noise they are not.
    qd.main(tiny(tmp_path / "others", *argv, *NOISY[1:], "--sample_steps", 3))
    noisy = tmp_path / "others" / f"{source.name}_shots8_gate0.05-0.1_readout0.02_steps3"
    assert not torch.equal(grid_of(noisy), images)
    assert contents(source) == before

    # The source is trained anew between planning and sampling.
    def changed(folder, recorded, config):
        (tmp_path / "copied" / source.name / "model.pt").write_bytes(b"another")

    shutil.copytree(finished, tmp_path / "copied")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qd, "note_machine", changed)
        argv_of_copy = [*argv[:-1], tmp_path / "copied", "--shots", 9]
        message = fails(qd, tiny(tmp_path / "late", *argv_of_copy))
    assert "model.pt has changed since this command began; run it again" in message

    # A run trained with shots is another than one sampled with them.
    assert "weights_sha256" in fails(qd, tiny(tmp_path / "others", *argv[:-2], *device))


def test_weights_of_a_run_with_other_sampling_steps(tmp_path):
    argv = ["--use_quantum", "--sample_steps", 2]
    qd.main(tiny(tmp_path / "first", *argv))
    source = only(tmp_path / "first")
    assert source.name.endswith("_steps2")
    qd.main(tiny(tmp_path / "new", *argv, "--shots", 9, "--weights", tmp_path / "first"))
    weights = config_of(only(tmp_path / "new"))["weights"]
    assert weights["weights_sha256"] == config_of(source)["model_sha256"]


def test_what_load_run_says_of_other_models(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings, _ = qd.load_run(f"~/copy/{run.name}")
    assert settings.name == run.name
    with pytest.raises(qd.UserError, match="model.pt/config.json: not a run's configuration"):
        qd.load_run(run / "model.pt")

    # The other script's, and one that was killed before its checksum was written.
    for changed, said in (
        ({"settings": {"class_names": ["mucus"]}}, "the other training script's; use that one's"),
        ({"model_sha256": None}, "not finished; the command that began this run"),
    ):
        copy = tmp_path / said[:9]
        shutil.copytree(run, copy)
        config = json.loads((copy / "config.json").read_text())
        for key, value in changed.items():
            config[key] = config[key] | value if isinstance(value, dict) else value
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(qd.UserError, match=said):
            qd.load_run(copy)

    # The file is whole: the script is another one.
    monkeypatch.setattr(qd, "WIDTHS", (16, 64))
    with pytest.raises(qd.UserError, match="not a model of this script as it is now"):
        qd.load_run(run)
    (run / "model.pt").unlink()
    with pytest.raises(qd.UserError, match="not finished; the command that began this run"):
        qd.load_run(run)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--n_qubits", 4], "was trained with n_qubits 3 (asked for: 4)"),
        (["--steps", 7], "was trained with steps 6 (asked for: 7)"),
        (["--seeds", 5], "seed5/model.pt; train it, or name its folder"),
        (["--weights", "nowhere"], "--weights nowhere: no nowhere/"),
    ],
)
def test_weights_that_do_not_fit(options, said, finished, tmp_path, fails):
    argv = ["--use_quantum", "--lr", "0.05", "--weights", finished, "--shots", 9, *options]
    assert said in fails(qd, tiny(tmp_path / "new", *argv))
    assert not (tmp_path / "new").exists()


def test_damaged_weights_that_are_mended_lock_nothing_out(run, tmp_path, fails):
    argv = ["--use_quantum", "--lr", "0.05", "--weights", tmp_path / "copy", "--sample_steps", 3]
    whole = (run / "model.pt").read_bytes()
    (run / "model.pt").write_bytes(whole[:-1])
    assert f"{run / 'model.pt'}: damaged" in fails(qd, tiny(tmp_path / "new", *argv))
    assert not (tmp_path / "new").exists()
    (run / "model.pt").write_bytes(whole)
    qd.main(tiny(tmp_path / "new", *argv))
    assert len(grid_of(only(tmp_path / "new"))) == 4


# -------------------------------------------------------------------- nobody is locked out


@pytest.mark.usefixtures("quick_loss_curve")
def test_a_refused_command_does_not_lock_out_the_mended_one(tmp_path, fails):
    qd.main(tiny(tmp_path, "--digits", "5", "--steps", "2"))
    message = fails(qd, tiny(tmp_path, "--digits", "5", "0", "--steps", "3"))
    assert "digits5_n8_seed0 is another run: steps 2 (asked for: 3)" in message
    assert only(tmp_path).name == "classical_digits5_n8_seed0"
    qd.main(tiny(tmp_path, "--digits", "0", "5", "--steps", "2"))
    assert len(list(tmp_path.iterdir())) == 2


def diverge_at(call, monkeypatch):
    """Adam takes a step of 1e60 at this call."""
    original = torch.optim.Adam.step
    calls = []

    def step(self):
        calls.append(self)
        if len(calls) == call:
            self.param_groups[0]["lr"] = 1e60
        original(self)

    monkeypatch.setattr(torch.optim.Adam, "step", step)


@pytest.mark.usefixtures("quick_loss_curve")
def test_a_diverged_run_does_not_lock_out_a_lower_rate(tmp_path, fails, monkeypatch):
    with monkeypatch.context() as patch:
        diverge_at(1, patch)
        message = fails(qd, tiny(tmp_path, "--lr", "0.5"))
    assert "not finite at step 2; try a lower --lr or --muon_lr" in message
    qd.main(tiny(tmp_path, "--lr", "0.01"))
    assert config_of(only(tmp_path))["settings"]["lr"] == 0.01
    assert len(grid_of(only(tmp_path))) == 4


def test_divergence_in_the_last_step_is_not_saved(tmp_path, fails, monkeypatch):
    diverge_at(6, monkeypatch)
    assert "not finite at step 6" in fails(qd, tiny(tmp_path))  # the last loss is
    run = only(tmp_path)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 4
    assert not (run / "model.pt").exists()


@pytest.mark.usefixtures("quick_loss_curve")
def test_one_bad_run_stops_no_other(run, tmp_path, fails):
    (run / "model.pt").write_bytes(b"")
    argv = tiny(tmp_path / "copy", "--use_quantum", "--lr", "0.05", "--seeds", 0, 1)
    assert str(run / "model.pt") in fails(qd, argv)
    other = run.with_name(run.name.replace("seed0", "seed1"))
    assert len(grid_of(other)) == 4


@pytest.mark.parametrize("name", ["save_gif", "draw_loss_curve", "draw_circuit"])
def test_a_picture_that_fails_is_a_notice(name, tmp_path, monkeypatch, capsys):
    def broken(*args, **options):
        raise RuntimeError("no such font\nat all")

    monkeypatch.setattr(qd, name, broken)
    qd.main(tiny(tmp_path, "--use_quantum", "--steps", "2"))
    picture = {
        "save_gif": "training_progress.gif",
        "draw_loss_curve": "loss_curve.png",
        "draw_circuit": "circuit.png",
    }
    run = only(tmp_path)
    notice = f"NOTICE: no {run / picture[name]} (RuntimeError: no such font at all)"
    assert notice in capsys.readouterr().err.splitlines()
    assert not (run / picture[name]).exists()
    assert {p.name for p in run.iterdir()} >= {*picture.values()} - {picture[name]}
    assert config_of(run)["n_eval"] == 4


def test_the_users_matplotlibrc_is_not_read(finished, tmp_path, capsys):
    settings, _ = qd.load_run(only(finished))
    shutil.copytree(only(finished), tmp_path / "copy")
    before = (tmp_path / "copy" / "loss_curve.png").read_bytes()
    (tmp_path / "copy" / "loss_curve.png").unlink()
    with matplotlib.rc_context({"text.usetex": True, "lines.linewidth": 9, "axes.facecolor": "r"}):
        qd.draw_pictures(settings, tmp_path / "copy")
        assert matplotlib.rcParams["text.usetex"]
    assert "NOTICE" not in capsys.readouterr().err
    assert (tmp_path / "copy" / "loss_curve.png").read_bytes() == before


def test_the_commit_is_the_scripts(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    monkeypatch.setattr(qd, "__file__", str(script))
    assert qd.git_commit() == ""  # no repository

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    script.write_text("1")
    assert qd.git_commit() == ""  # not committed
    git("add", ".")
    git("commit", "-m", "a script")
    commit = qd.git_commit()
    assert re.fullmatch(r"[0-9a-f]{40}", commit)

    # Other files do not matter.
    (tmp_path / "README.md").write_text("2")
    git("add", ".")
    assert qd.git_commit() == commit
    git("commit", "-m", "a page")
    assert qd.git_commit() == commit
    script.write_text("3")
    assert qd.git_commit() == f"{commit}-dirty"


def test_images_drawn_again_elsewhere_are_noted(run, capsys):
    config = config_of(run)
    (run / "config.json").write_text(json.dumps(config | {"threads": 99}))
    (run / "samples_final.png").unlink()
    qd.main(tiny(run.parent, "--use_quantum", "--lr", "0.05"))
    assert "NOTICE: made with threads 99 so far" in capsys.readouterr().out
    assert len(config_of(run)["went_on"]) == 1


def test_a_home_folder_that_there_is_not_is_one_line(fails):
    assert "~no-such-user/runs: " in fails(qd, tiny("~no-such-user/runs", "--use_quantum"))


def test_git_is_optional(tmp_path, monkeypatch):
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", qd.git_commit())

    # One that may not be executed.
    (tmp_path / "git").write_text("#!/bin/sh\necho wrong\n")
    (tmp_path / "git").chmod(stat.S_IRUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert qd.git_commit() == ""

    # One that hangs.
    def hang(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert qd.git_commit() == ""


def test_a_file_system_without_locks(tmp_path, fails, monkeypatch):
    def no_locks(self, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    message = fails(qd, tiny(tmp_path / "runs"))
    assert f"{tmp_path / 'runs' / 'classical_digits3_n8_seed0'}: no file can be locked" in message
    assert "use a --save_dir on another disk" in message
    assert not list((tmp_path / "runs").iterdir())


def test_a_folder_in_use_is_left_alone(run, tmp_path, fails):
    (run / ".model.pt.7.part").write_text("being written")
    argv = tiny(tmp_path / "copy", "--use_quantum", "--lr", "0.05", "--n_eval", "9")
    before = contents(run)
    with filelock.FileLock(run / ".lock"):
        assert fails(qd, argv) == f"error: {run} is in use by another process"
    assert contents(run) == before


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, fails):
    foreign = tmp_path / "classical_digits3_n8_seed0"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    assert f"{foreign} has no config.json: not a run" in fails(qd, tiny(tmp_path))
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


# ------------------------------------------------------------------------------ many processes


@pytest.mark.usefixtures("quick_loss_curve")
def test_a_grid_over_two_processes_is_the_lone_process_grid(tmp_path, monkeypatch):
    grid = ["--arm", "classical", "quantum", "se", "--steps", "1", "--timesteps", "2"]
    qd.main(tiny(tmp_path / "lone", *grid))
    shares = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        qd.main(tiny(tmp_path / rank, *grid))
        shares.append({run.name: contents(run) for run in (tmp_path / rank).iterdir()})
    assert [len(share) for share in shares] == [2, 1]
    lone = {run.name: contents(run) for run in (tmp_path / "lone").iterdir()}
    assert shares[0] | shares[1] == lone


@pytest.mark.parametrize(
    "n_devices, expected", [(1, [0, 0, 0, 0, 0, 0, 0, 0]), (3, [0, 1, 2, 0, 1, 2, 0, 1])]
)
def test_every_process_of_a_machine_has_a_gpu(n_devices, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_devices)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for local_rank, index in enumerate(expected):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert qd.this_process("auto") == (torch.device("cuda", index), 0, 2)


def test_a_process_without_a_run_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    qd.main(tiny(tmp_path / "runs"))
    assert capsys.readouterr().out == "RANK=3 of 8 has nothing to do: 1 runs in all\n"
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------- help, README


def test_help_explains_every_flag(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    text = capsys.readouterr().out
    for action in script.build_parser()._actions:
        assert action.help
        assert action.option_strings[-1] in text
    for name, arm in script.ARMS.items():
        assert f"  {name:10} {arm.text}" in text


def test_readme_commands_parse(script):
    name = Path(script.__file__).name
    text = "\n".join((ROOT / page).read_text() for page in ("README.md", "result_gif/README.md"))
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in blocks.splitlines() if name in line]
    assert commands
    for words in commands:
        flags = words[words.index(name) + 1 :]
        if "&" in flags:  # in the background
            flags = flags[: flags.index("&")]
        script.build_parser().parse_args(flags)
