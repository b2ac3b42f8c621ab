"""Whole runs from the command line: what they write, resume, sharding, errors, help, README."""

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import only, tiny
from PIL import Image
from torch.utils._pytree import tree_map

import quantum_diffusion_mnist as qd
import quantum_diffusion_pathmnist as pathmnist

ROOT = Path(__file__).parent.parent
NOISY = ("--use_quantum", "--shots", "8", "--gate_noise", "0.05,0.1", "--readout_noise", "0.02")


@pytest.fixture(autouse=True)
def no_drawing(request, monkeypatch):
    """Drawing the circuit takes longer than a tiny run; one test looks at it."""
    if "script" not in request.fixturenames:
        monkeypatch.setattr(qd, "save_circuit", lambda *_: None)


def contents(folder):
    """Everything a run wrote but its record of the circumstances."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    names = files.keys() - {"config.json", "circuit.png", ".lock"}
    return {
        k: tensors(p) if p.suffix == ".pt" else p.read_bytes() for k in names if (p := files[k])
    }


def tensors(path):
    """All numbers of a file of nested tensors."""
    numbers = lambda x: x.numpy().tobytes() if isinstance(x, torch.Tensor) else x  # noqa: E731
    return tree_map(numbers, torch.load(path, weights_only=True))


def config_of(run):
    return json.loads((run / "config.json").read_text())


def grid_of(run):
    return qd.load_grid(run / "samples_final.png")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folders of a finished run without noise and of one with, to be left as they are."""
    folders = [tmp_path_factory.mktemp(name) for name in ("ideal", "noisy")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qd, "save_circuit", lambda *_: None)
        qd.main(tiny(folders[0], "--use_quantum", "--lr", "0.05"))
        qd.main(tiny(folders[1], *NOISY))
    return folders


def test_a_run_writes_its_folder(script, tmp_path):
    script.main(tiny(tmp_path, "--use_quantum", script=script))
    run, channels = only(tmp_path), {qd: 1, pathmnist: 3}[script]
    data = {qd: "digits3", pathmnist: "tissue_immunohistochemistry"}[script]
    files = "config.json loss.csv checkpoint.pt model.pt .lock circuit.png loss_curve.png "
    files += "samples_final.png training_progress.gif step_000002.png step_000004.png"
    found = {path.name for path in run.rglob("*") if path.is_file()}
    assert found == {*files.split(), "step_000006.png"} and run.name == f"quantum_{data}_n8_seed0"
    config = config_of(run)
    assert config["images"]["used"] == 8 and config["images"]["available"] > 100
    unet = script.UNet(channels, script.Settings("quantum", n_qubits=3, n_layers=2))
    counts = [sum(p.numel() for p in part.parameters()) for part in (unet, unet.gate)]
    assert [config["parameters"][part] for part in ("model", "gate")] == counts
    assert {"command", "versions", "device", "git"} <= set(config) and config["n_eval"] == 4
    losses = (run / "loss.csv").read_text().splitlines()
    assert losses[0] == "step,loss" and len(losses) == 7
    for name, n in (("samples_final.png", 4), ("samples/step_000002.png", 2)):
        assert script.load_grid(run / name).shape == (n, channels, 28, 28)
    with Image.open(run / "training_progress.gif") as animation:
        assert animation.n_frames == 3


def test_killed_and_continued_equals_uninterrupted(finished, tmp_path, monkeypatch):
    whole, argv = only(finished[1]), tiny(tmp_path, *NOISY)
    run = tmp_path / whole.name
    run.mkdir()
    (left := run / ".config.json.1.tmp").write_text("what a kill in the middle of a write leaves")
    # Ctrl-C in the middle of a step: it is finished, and kept.
    step, replace, cuts, writes = qd.Trainer.step, os.replace, 0, []
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        press = lambda self: (signal.raise_signal(signal.SIGINT), step(self))  # noqa: E731
        patch.setattr(qd.Trainer, "step", press)
        qd.main(argv)
    assert exit_.value.code == 130 and not left.exists()
    assert torch.load(run / "checkpoint.pt", weights_only=True)["losses"].shape == (1,)

    def cut(source, target):  # the third write of a start, before the file has its name or after
        writes.append(target)
        if len(writes) < 3 or cuts % 2:
            replace(source, target)
        if len(writes) == 3:
            raise SystemError("killed")

    monkeypatch.setattr(os, "replace", cut)
    while config_of(run)["n_eval"] == 0 and cuts < 12:
        writes.clear()
        with contextlib.suppress(SystemError):
            cuts += 1
            qd.main(argv)
    assert 4 <= cuts < 12 and contents(run) == contents(whole)


def test_a_larger_n_eval_only_samples_the_missing_images(tmp_path, monkeypatch):
    # Shots too: an image does not depend on those it is drawn with.
    argv = (*NOISY, "--lr", "0.05", "--timesteps", "2", "--n_eval")
    qd.main(tiny(tmp_path / "a", *argv, 70))
    qd.main(tiny(tmp_path / "b", *argv, 3))
    (a, b), sample = (only(tmp_path / name) for name in "ab"), qd.GaussianDiffusion.sample
    at_once, drawn = grid_of(a), []
    assert torch.equal(grid_of(b), at_once[:3]) and len(at_once) == 70
    assert len({image.numpy().tobytes() for image in at_once}) == 70

    def interrupted(self, model, seed, series, numbers, steps, bar):
        drawn.append(numbers)
        if len(drawn) == 2:
            raise SystemError("killed")
        return sample(self, model, seed, series, numbers, steps, bar)

    model, marked = (b / "model.pt").stat().st_mtime_ns, grid_of(b)
    marked[0] = 77  # to be seen again
    qd.save_grid(b / "samples_final.png", marked)
    monkeypatch.setattr(qd.GaussianDiffusion, "sample", interrupted)
    with pytest.raises(SystemError):
        qd.main(tiny(tmp_path / "b", *argv, 70))
    assert len(grid_of(b)) == 67 and config_of(b)["n_eval"] == 3
    qd.main(tiny(tmp_path / "b", *argv, 70))
    qd.main(tiny(tmp_path / "b", *argv, 5))  # never fewer
    assert drawn == [range(3, 67), range(67, 83), range(67, 83)]
    assert torch.equal(grid_of(b)[1:], at_once[1:]) and grid_of(b)[0].eq(77).all()
    assert config_of(b)["n_eval"] == 70 and (b / "model.pt").stat().st_mtime_ns == model


def test_lost_previews_do_not_block_a_run(tmp_path, capsys):
    qd.main(tiny(tmp_path))
    run = only(tmp_path)
    for lost in ("model.pt", "samples/step_000002.png", "samples/step_000006.png"):
        (run / lost).unlink()
    qd.main(tiny(tmp_path))
    assert "NOTICE: 1 lost previews left out" in capsys.readouterr().err
    assert (run / "samples/step_000006.png").exists()
    with Image.open(run / "training_progress.gif") as animation:
        assert animation.n_frames == 2


def test_every_flag_of_a_setting_reaches_the_run_and_no_other(tmp_path, monkeypatch):
    found = []
    for name in ("train", "sample_final"):
        monkeypatch.setattr(qd, name, lambda settings, *_: found.append(settings))
    names = "steps=7 batch_size=5 lr=0.01 muon_lr=0.3 ema_decay=0.5 n_qubits=4 n_layers=1 "
    names += "timesteps=90 n_frames=2 n_samples=1 sample_steps=3 simulator=default.mixed "
    names += "simulator_options={} shots=5 gate_noise=0.2,0.0 readout_noise=0.2"
    flags = [flag.split("=") for flag in names.split()]
    assert {name for name, _ in flags} == {f.name for f in fields(qd.Settings) if f.metadata}
    common = ["--data", "digits", "--save_dir", str(tmp_path), "--arm", "quantum", "matched"]
    grid = ["--digits", "3", "8", "--n_train", "6", "all", "--seeds", "4"]
    qd.main([*common, *grid, *(word for name, value in flags for word in (f"--{name}", value))])
    values = {name: int(value) if value.isdecimal() else value for name, value in flags}
    values |= {k: float(values[k]) for k in ("lr", "muon_lr", "ema_decay", "readout_noise")}
    values |= {"simulator_options": {}, "gate_noise": (0.2, 0.0)}
    conditions = {"quantum": values, "matched": values | qd.IDEAL}  # without circuit, none
    expected = itertools.product(conditions, ("digits",), (3, 8), (6, None), (4,))
    runs = {qd.Settings(*run, **conditions[run[0]]).name: run for run in expected}
    assert "quantum_digits3_n6_seed4_default.mixed_shots5_gate0.2-0.0_readout0.2_steps3" in runs
    assert "matched_digits8_nall_seed4_steps3" in runs and len(found) == 2 * len(runs) == 16
    for settings in found:
        assert settings == qd.Settings(*runs[settings.name], **conditions[settings.arm])
    found.clear()
    qd.main([*common[:4], "--epochs", "5", "--n_train", "9", "--batch_size", "4"])
    assert found[0].steps == 12 and found[0].arm == "classical"


def test_weights_of_one_run_are_sampled_under_other_conditions(finished, tmp_path, fails):
    run, device = only(finished[0]), ("--simulator", "default.qubit")
    argv = ("--use_quantum", "--lr", "0.05", "--weights", finished[0])
    before, images = contents(run), grid_of(run)
    twin = tmp_path / "others" / f"{run.name}_default.qubit"
    for n in (4, 6):
        qd.main(tiny(tmp_path / "others", *argv, *device, "--n_eval", n))
        other = grid_of(twin)
        assert len(other) == config_of(twin)["n_eval"] == n
        assert (other[:4].int() - images.int()).abs().max() <= 2
    assert len(list(twin.iterdir())) == 4  # nothing was trained
    assert (twin / "model.pt").read_bytes() == (run / "model.pt").read_bytes()
    digest = qd.hashlib.sha256((run / "model.pt").read_bytes()).hexdigest()
    assert config_of(twin)["weights"]["weights_sha256"] == digest
    qd.main(tiny(tmp_path / "others", *argv, *NOISY[1:], "--sample_steps", 3))
    noisy = tmp_path / "others" / f"{run.name}_shots8_gate0.05-0.1_readout0.02_steps3"
    assert not torch.equal(grid_of(noisy), images)
    assert contents(run) == before and len(list((tmp_path / "others").iterdir())) == 2
    for extra, words in (
        (("--n_qubits", 4), "was trained with n_qubits 3 (asked for: 4)"),
        (("--steps", 7), "was trained with steps 6 (asked for: 7)"),
        (("--seeds", 5), "seed5/model.pt; train it"),
        (("--weights", tmp_path / "nowhere"), "no "),
    ):
        assert words in fails(qd, tiny(tmp_path / "new", *argv, "--shots", 9, *extra))
    assert not (tmp_path / "new").exists()
    message = fails(qd, tiny(tmp_path / "others", *argv[:-2], *device))
    assert f"sha256 {digest!r} (asked for: None)" in message


def test_a_grid_over_two_processes_is_the_lone_process_grid(tmp_path, monkeypatch):
    extra = ["--arm", "classical", "quantum", "--seeds", "0", "1", "--steps", "1"]
    qd.main(tiny(tmp_path / "lone", *extra))
    shares = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        qd.main(tiny(tmp_path / rank, *extra))
        shares.append({run.name: contents(run) for run in (tmp_path / rank).iterdir()})
    assert len(shares[0]) == len(shares[1]) == 2
    assert shares[0] | shares[1] == {x.name: contents(x) for x in (tmp_path / "lone").iterdir()}
    monkeypatch.setenv("RANK", "0")
    for count, devices in ((1, [0] * 8), (3, [0, 1, 2, 0, 1, 2, 0, 1])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        for rank, index in enumerate(devices):
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            assert qd.this_process("auto") == (torch.device("cuda", index), 0, 2)


def test_divergence_in_the_last_step_is_not_saved(tmp_path, fails, monkeypatch):
    adam, rates = torch.optim.Adam.step, [1, 1, 1, 1, 1, 1e60]

    def step(self):
        self.param_groups[0]["lr"] *= rates.pop(0)
        adam(self)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    assert "not finite at step 6" in fails(qd, tiny(tmp_path))  # the last loss is
    assert len(torch.load(only(tmp_path) / "checkpoint.pt", weights_only=True)["losses"]) == 4
    assert not (only(tmp_path) / "model.pt").exists()


def test_help_explains_every_flag(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    text = capsys.readouterr().out
    for action in script.build_parser()._actions:
        assert action.help and action.option_strings[-1] in text
    assert all(f"  {arm} " in text for arm in script.ARMS)


def test_readme_commands_parse(script):
    name = Path(script.__file__).name
    text = "\n".join((ROOT / page).read_text() for page in ("README.md", "result_gif/README.md"))
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in blocks.splitlines() if name in line]
    assert commands
    for words in commands:
        script.build_parser().parse_args(words[words.index(name) + 1 :])
