"""Whole runs from the command line: what they write, resume, sharding, errors, help, README."""

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import only, tiny, weights
from PIL import Image

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
    return {
        name: tensors(torch.load(path, weights_only=True)) if path.suffix == ".pt"
        else path.read_bytes()
        for name, path in files.items()
        if path.name not in ("config.json", "circuit.png", ".lock")
    }  # fmt: skip


def tensors(state):
    """All numbers in a nested state, as bytes."""
    if isinstance(state, torch.Tensor):
        return state.numpy().tobytes()
    if isinstance(state, dict):
        return {key: tensors(value) for key, value in state.items()}
    return [tensors(value) for value in state] if isinstance(state, list | tuple) else repr(state)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def grid_of(folder):
    return qd.load_grid(folder / "samples_final.png")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folders of a finished run without noise and of one with, to be left as they are."""
    folders = [tmp_path_factory.mktemp(name) for name in ("ideal", "noisy")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qd, "save_circuit", lambda *_: None)
        qd.main(tiny(folders[0], "--use_quantum", "--lr", "0.05"))
        qd.main(tiny(folders[1], *NOISY))
    return folders


# ----------------------------------------------------------------------- one run, whole and cut


def test_a_run_writes_its_folder(script, tmp_path):
    script.main(tiny(tmp_path, "--use_quantum", script=script))
    run, channels = only(tmp_path), {qd: 1, pathmnist: 3}[script]
    names = {qd: "digits3", pathmnist: "tissue_immunohistochemistry"}
    assert run.name == f"quantum_{names[script]}_n8_seed0"
    pictures = ["circuit.png", "loss_curve.png", "samples_final.png", "training_progress.gif"]
    samples = [f"samples/step_{step:06d}.png" for step in (2, 4, 6)]
    files = ["config.json", "loss.csv", "checkpoint.pt", "model.pt", ".lock"]
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert found == {*pictures, *samples, *files}
    config = config_of(run)
    assert config["settings"]["arm"] == "quantum" and config["settings"]["lr"] == 0.003
    assert config["images"]["used"] == 8 and config["images"]["available"] > 100
    unet = script.UNet(channels, script.Settings("quantum", n_qubits=3, n_layers=2))
    counts = [sum(p.numel() for p in part.parameters()) for part in (unet, unet.gate)]
    assert [config["parameters"][part] for part in ("model", "gate")] == counts
    assert {"command", "versions", "device", "git"} <= set(config) and config["n_eval"] == 4
    losses = (run / "loss.csv").read_text().splitlines()
    assert losses[0] == "step,loss" and len(losses) == 7
    assert 0.1 < float(losses[1].split(",")[1]) < 3  # v has variance about 1
    assert script.load_grid(run / "samples_final.png").shape == (4, channels, 28, 28)
    assert script.load_grid(run / samples[0]).shape == (2, channels, 28, 28)
    with Image.open(run / "training_progress.gif") as animation:
        assert animation.n_frames == 3


STOPS = """
import os, signal, sys, quantum_diffusion_mnist as qd
save = qd.Trainer.save
qd.Trainer.save = lambda self: (save(self), os.kill(os.getpid(), signal.SIGSTOP))
qd.main(sys.argv[1:])
"""


def test_killed_and_continued_equals_uninterrupted(finished, tmp_path, monkeypatch, fails):
    whole, argv = only(finished[1]), tiny(tmp_path, *NOISY)
    run = tmp_path / whole.name
    # A process that is stopped holds its folder; killed, it leaves it.
    silent = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "cwd": ROOT}
    process = subprocess.Popen([sys.executable, "-c", STOPS, *argv], **silent)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    left = run / ".checkpoint.pt.1.tmp"
    left.write_text("what a kill in the middle of a write leaves")
    assert "in use by another process" in fails(qd, argv) and left.exists()
    process.kill()
    process.wait()
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 2
    # Ctrl-C in the middle of a step: it is finished, and kept.
    step = qd.Trainer.step

    def pressed(self):
        signal.raise_signal(signal.SIGINT)
        step(self)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(qd.Trainer, "step", pressed)
        qd.main(argv)
    assert exit_.value.code == 130 and not left.exists()
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 3
    # Cut at the third write of every start, before the file has its name or after.
    replace, cuts, writes = os.replace, 0, []

    def cut(source, target):
        writes.append(target)
        if len(writes) < 3 or cuts % 2:
            replace(source, target)
        if len(writes) == 3:
            raise SystemError("killed")

    monkeypatch.setattr(os, "replace", cut)
    while cuts < 20:
        try:
            writes.clear()
            qd.main(argv)
            break
        except SystemError:
            cuts += 1
            assert config_of(run)["n_eval"] == 0
    assert 3 <= cuts < 20 and contents(run) == contents(whole)


def test_looking_changes_no_weights_and_a_seed_all(finished, tmp_path):
    look = ["--n_frames", 6, "--n_samples", 5, "--sample_steps", 4, "--n_eval", 1]
    qd.main(tiny(tmp_path / "look", *NOISY, *look))
    qd.main(tiny(tmp_path / "seed", *NOISY, "--seeds", 1))
    known, looked, other = (weights(f) for f in (finished[1], tmp_path / "look", tmp_path / "seed"))
    assert tensors(looked) == tensors(known)
    assert all((other[k] - known[k]).abs().max() > 1e-3 for k in known if known[k].ndim > 1)
    before = contents(only(finished[1]))
    qd.main(tiny(finished[1], *NOISY))  # a finished run is left alone
    assert contents(only(finished[1])) == before


def test_a_larger_n_eval_only_samples_the_missing_images(tmp_path, monkeypatch):
    # Shots too: an image does not depend on those it is drawn with.
    argv = (*NOISY, "--lr", "0.05", "--timesteps", "3", "--n_eval")
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

    model = (b / "model.pt").stat().st_mtime_ns
    marked = grid_of(b)
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


# --------------------------------------------------------------- flags, conditions, processes


def test_every_flag_of_a_setting_reaches_the_run_and_no_other(tmp_path, monkeypatch):
    found = []
    for name in ("train", "sample_final"):
        monkeypatch.setattr(qd, name, lambda settings, *_: found.append(settings))
    values = {
        "steps": 7, "batch_size": 5, "lr": 0.01, "muon_lr": 0.3, "ema_decay": 0.5, "n_qubits": 4,
        "n_layers": 1, "timesteps": 90, "n_frames": 2, "n_samples": 1, "sample_steps": 3,
        "simulator": "default.mixed", "simulator_options": {"seed": 1}, "shots": 5,
        "gate_noise": (0.2, 0.0), "readout_noise": 0.2,
    }  # fmt: skip
    assert set(values) == {item.name for item in fields(qd.Settings) if item.metadata}
    words = [str(v).strip("()").replace("'", '"').replace(", ", ",") for v in values.values()]
    argv = [word for name, text in zip(values, words, strict=True) for word in (f"--{name}", text)]
    common = ["--data", "digits", "--save_dir", str(tmp_path), "--arm", "quantum", "matched"]
    qd.main([*common, "--digits", "3", "8", "--n_train", "6", "all", "--seeds", "4", *argv])
    ideal = {item.name: item.default for item in fields(qd.Settings)} | values | {"shots": None}
    ideal |= {"simulator": "exact", "simulator_options": None, "readout_noise": 0.0}
    expected = [
        qd.Settings(arm, "digits", label, n_train, 4, **conditions)
        for label in (3, 8)
        for n_train in (6, None)
        for arm, conditions in (
            ("quantum", values),
            ("matched", {k: ideal[k] for k in values} | {"gate_noise": (0.0, 0.0)}),
        )
    ]
    assert found[::2] == expected
    assert {run.name for run in tmp_path.iterdir()} >= {
        "quantum_digits3_n6_seed4_default.mixed_shots5_gate0.2-0.0_readout0.2_steps3",
        "matched_digits8_nall_seed4_steps3",
    }
    found.clear()
    qd.main([*common[:4], "--epochs", "5", "--n_train", "9", "--batch_size", "4"])
    assert found[0].steps == 5 * 3 and found[0].arm == "classical"


def test_weights_of_one_run_are_sampled_under_other_conditions(finished, tmp_path, fails):
    run = only(finished[0])
    argv = ("--use_quantum", "--lr", "0.05", "--weights", finished[0])
    before, images = contents(run), grid_of(run)
    twin = tmp_path / "others" / f"{run.name}_default.qubit"
    device = ("--simulator", "default.qubit")
    for n in (4, 6):
        qd.main(tiny(tmp_path / "others", *argv, *device, "--n_eval", n))
        other = grid_of(twin)
        assert len(other) == config_of(twin)["n_eval"] == n
        assert (other[:4].int() - images.int()).abs().max() <= 2
    names = {path.name for path in twin.iterdir()}
    assert names == {"config.json", "model.pt", "samples_final.png", ".lock"}  # nothing trained
    assert (twin / "model.pt").read_bytes() == (run / "model.pt").read_bytes()
    digest = qd.hashlib.sha256((run / "model.pt").read_bytes()).hexdigest()
    assert config_of(twin)["condition"] == "default.qubit"
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


def test_a_grid_over_two_processes_is_the_lone_process_grid(tmp_path, monkeypatch, fails):
    extra = ["--arm", "classical", "quantum", "--seeds", "0", "1", "--steps", "1"]
    qd.main(tiny(tmp_path / "lone", *extra))
    shares = []
    for rank in "01":
        for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, value)
        qd.main(tiny(tmp_path / rank, *extra))
        shares.append({run.name for run in (tmp_path / rank).iterdir()})
        for name in shares[-1]:
            assert contents(tmp_path / rank / name) == contents(tmp_path / "lone" / name)
    assert len(shares[0]) == len(shares[1]) == 2
    assert shares[0] | shares[1] == {run.name for run in (tmp_path / "lone").iterdir()}
    for rank in ("2", "-1", "x", "1.0"):
        monkeypatch.setenv("RANK", rank)
        assert f"RANK={rank} WORLD_SIZE=2" in fails(qd, tiny(tmp_path / "none"))
    monkeypatch.setenv("RANK", "0")
    for count, devices in ((1, [0] * 8), (3, [0, 1, 2, 0, 1, 2, 0, 1])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        for rank, index in enumerate(devices):
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            assert qd.this_process("auto") == (torch.device("cuda", index), 0, 2)


# ------------------------------------------------------------------------------------ mistakes

MISTAKES = [
    *(("--n_train 0", "expected 1 to"), ("--n_train 999999", "training images")),
    *(("--n_train many", "--n_train"), ("--arm quantom", "invalid choice")),
    *(("--arm classical --use_quantum", "not allowed with"), ("--use_quantum=x", "invalid choice")),
    *(("--device abacus", "expected auto, cpu"), ("--sample_steps 51", "> --timesteps")),
    *(("--ema_decay 1", "expected 0.0 to 0.999999"), ("--lr -1", "expected 1e-09 to")),
    *(("--lr nan", "expected 1e-09 to"), ("--lr fast", "invalid"), ("--steps 0", "expected 1 to")),
    *(
        ("--steps 1.5", "invalid"),
        ("--epochs 2", "not allowed with"),
        ("--no_such_flag", "no_such"),
    ),
    *(("--gate_noise 0.1", "--gate_noise"), ("--gate_noise 0.1,1.5", "expected 0.0 to 1.0")),
    *(("--readout_noise -0.1", "expected 0.0 to 1.0"), ("--shots 0", "expected 1 to")),
    *(
        ("--use_quantum --simulator_options [1]", "expected a PennyLane"),
        ("--digits 11", "--digits"),
    ),
    *(("--simulator_options {", "--simulator_options"), ("--seeds -1", "expected 0 to")),
    ("""--use_quantum --simulator_options '{"seed": 1}'""", "expected a PennyLane device"),
    (
        """--use_quantum --simulator default.qubit --simulator_options '{"shots": 9}'""",
        "and no shots",
    ),
    ("""--simulator default.qubit --simulator_options '{"a": 1}' --use_quantum""", "argument 'a'"),
    ("--use_quantum --n_layers 6", "at most 5"),
    ("--use_quantum --simulator no.device", "--simulator no.device does not run"),
    ("--use_quantum --simulator lightning.qubit --gate_noise 0.1,0.1", "lightning.qubit does not"),
    ("--use_quantum --simulator default.mixed --n_qubits 16", "memory for 10"),
]


@pytest.mark.parametrize("mistake, words", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, fails, mistake, words):
    assert words in fails(qd, tiny(tmp_path / "runs", *shlex.split(mistake)))
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent(tmp_path, fails):
    assert "use --device cpu" in fails(qd, tiny(tmp_path, "--device", "cuda"))


def test_foreign_folders_and_other_settings_are_refused(finished, tmp_path, fails):
    before = contents(only(finished[0]))
    message = fails(qd, tiny(finished[0], "--use_quantum", "--lr", "0.5", "--n_frames", "2"))
    assert "lr 0.05 (asked for: 0.5)" in message and "n_frames 3" in message
    assert "muon_lr" not in message and contents(only(finished[0])) == before
    foreign = tmp_path / "b" / "classical_digits3_n8_seed0"
    foreign.mkdir(parents=True)
    (foreign / "thesis.tex").write_text("all my work")
    assert "not a run" in fails(qd, tiny(tmp_path / "b"))
    assert (foreign / "thesis.tex").read_text() == "all my work"
    (tmp_path / "file").write_text("")
    assert "file" in fails(qd, tiny(tmp_path / "file"))


class Payload:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_damaged_files_are_named_and_other_runs_are_made(tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    qd.main(tiny(tmp_path / "runs"))
    run = only(tmp_path / "runs")
    kept = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}

    def refused(name, data, *more):
        for old in kept:
            (run / old).write_bytes(kept[old])
        if name == "checkpoint.pt":
            (run / "model.pt").unlink()
        (run / name).write_bytes(data)
        message = fails(qd, tiny(tmp_path / "runs", "--n_eval", "9", *more))
        assert str(run / name) in message and (run / name).read_bytes() == data

    for name in ("checkpoint.pt", "model.pt", "samples_final.png", "config.json"):
        refused(name, kept[name][: len(kept[name]) // 2])
    for name in ("checkpoint.pt", "model.pt"):
        flip = len(kept[name]) // 2  # one bit, inside a tensor
        refused(name, kept[name][:flip] + bytes([kept[name][flip] ^ 1]) + kept[name][flip + 1 :])
    torch.save({"x": Payload()}, tmp_path / "payload.pt")
    refused("model.pt", (tmp_path / "payload.pt").read_bytes(), "--seeds", 0, 1)
    assert not Path("owned").exists()
    other = run.with_name(run.name.replace("seed0", "seed1"))
    assert len(grid_of(other)) == 9  # in spite of the first one's error


def test_full_disk_and_divergence_keep_the_last_good_checkpoint(tmp_path, fails, monkeypatch):
    write, done = Path.write_bytes, []

    def until_full(self, data):
        done.append(self.name)
        if sum("checkpoint" in name for name in done) == 2:
            raise OSError(28, "No space left on device", str(self))
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", until_full)
        assert "No space left" in fails(qd, tiny(tmp_path / "a"))
    checkpoint = only(tmp_path / "a") / "checkpoint.pt"
    assert torch.load(checkpoint, weights_only=True)["step"] == 2
    adam, steps = torch.optim.Adam.step, []

    def diverges(self):
        steps.append(self.param_groups[0]["lr"])
        self.param_groups[0]["lr"] *= 1e60 if len(steps) == 6 else 1
        adam(self)

    monkeypatch.setattr(torch.optim.Adam, "step", diverges)  # the last step, after the last loss
    assert "not finite at step 6" in fails(qd, tiny(tmp_path / "b", "--n_frames", "2"))
    run = only(tmp_path / "b")
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 3
    assert not (run / "model.pt").exists()


# ------------------------------------------------------------------------------ help and README


def test_help_explains_every_flag(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script.__file__, "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(script.__file__, run_name="__main__")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for action in script.build_parser()._actions:
        assert action.help and action.option_strings[-1] in text
    assert all(f"  {arm} " in text for arm in script.ARMS)


def test_readme_commands_parse(script):
    name = Path(script.__file__).name
    text = "\n".join((ROOT / page).read_text() for page in ("README.md", "result_gif/README.md"))
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line for line in lines if f" {name}" in line]
    assert commands
    for line in commands:
        words = shlex.split(line, comments=True)
        script.build_parser().parse_args(words[words.index(name) + 1 :])
