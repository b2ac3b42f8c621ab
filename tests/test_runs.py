"""Whole runs from the command line: what they write, resume, sharding, errors, help, README."""

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import quantum_diffusion_mnist as mnist
import quantum_diffusion_pathmnist as pathmnist

ROOT = Path(__file__).parent.parent


def contents(folder):
    """Everything a run wrote but its record of the circumstances."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
            files[name] = repr(sorted(state)), tensors(state)
        elif path.is_file() and path.name not in ("config.json", "circuit.png"):
            files[name] = path.read_bytes()
    return files


def tensors(state):
    """All numbers in a nested state, as bytes."""
    if isinstance(state, torch.Tensor):
        return state.numpy().tobytes()
    if isinstance(state, dict):
        return [tensors(value) for value in state.values()]
    return [tensors(value) for value in state] if isinstance(state, list | tuple) else repr(state)


def only(folder):
    (run,) = folder.iterdir()
    return run


def weights(folder):
    return tensors(torch.load(only(folder) / "model.pt", weights_only=True))


def test_a_run_writes_its_folder(script, tiny, embedded, tmp_path):
    script.main(tiny(tmp_path, "--use_quantum", "--n_qubits", "4"))
    run = only(tmp_path)
    assert run.name == f"quantum_{embedded.named}_n8_seed0"
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    pictures = ["circuit.png", "loss_curve.png", "samples_final.png", "training_progress.gif"]
    samples = [f"samples/step_{step:06d}.png" for step in (2, 4, 6)]
    files = ["config.json", "loss.csv", "checkpoint.pt", "model.pt"]
    assert names == {*pictures, *samples, *files}
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["arm"] == "quantum" and config["settings"]["lr"] == 0.003
    assert config["images"]["used"] == 8 and config["images"]["available"] > 100
    unet = script.UNet(embedded.channels, "quantum", n_qubits=4)
    assert config["parameters"]["model"] == sum(p.numel() for p in unet.parameters())
    assert config["parameters"]["gate_weights"] == 3 * 4 * 2
    assert {"command", "versions", "device", "git"} <= set(config)
    losses = (run / "loss.csv").read_text().splitlines()
    assert losses[0] == "step,loss" and len(losses) == 7
    assert 0.1 < float(losses[1].split(",")[1]) < 3  # v has variance about 1
    assert script.load_grid(run / "samples_final.png").shape == (4, embedded.channels, 28, 28)
    assert script.load_grid(run / "samples/step_000002.png").shape == (2, embedded.channels, 28, 28)
    with Image.open(run / "training_progress.gif") as animation:
        assert animation.n_frames == 3


@pytest.fixture(scope="module")
def references():
    return {}


@pytest.fixture
def reference(script, tiny, references, tmp_path_factory):
    """The folder of an uninterrupted run, made once per script."""
    if script not in references:
        folder = tmp_path_factory.mktemp("reference")
        script.main(tiny(folder, "--steps", "60", "--arm", "quantum"))
        references[script] = only(folder)
    return references[script]


def test_same_seed_same_bits_and_another_seed_others(script, tiny, tmp_path, reference):
    argv = tiny(tmp_path / "a", "--steps", "60", "--arm", "quantum")
    script.main(argv)
    assert contents(only(tmp_path / "a")) == contents(reference)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    script.main(argv)  # finished runs are skipped
    assert finished == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    script.main(tiny(tmp_path / "b", "--seeds", "1"))
    script.main(tiny(tmp_path / "c", "--seeds", "0"))
    assert weights(tmp_path / "b") != weights(tmp_path / "c")


@pytest.mark.parametrize("kill_at", ["first checkpoint", "second checkpoint", "final grid"])
def test_killed_and_continued_equals_uninterrupted(script, tiny, tmp_path, reference, kill_at):
    argv = tiny(tmp_path, "--steps", "60", "--arm", "quantum")
    command = [sys.executable, script.__file__, *argv]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    run = tmp_path / reference.name
    marks = {
        "first checkpoint": run / "checkpoint.pt",
        "second checkpoint": run / "samples" / "step_000040.png",
        "final grid": run / "model.pt",
    }
    while not marks[kill_at].exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (run / "samples_final.png").exists()
    (run / ".checkpoint.pt.1.tmp").write_text("what a kill in the middle of a write leaves")
    script.main(argv)
    assert contents(run) == contents(reference)


def test_ctrl_c_saves_and_says_how_to_go_on(script, tiny, tmp_path, reference):
    argv = tiny(tmp_path, "--steps", "60", "--arm", "quantum")
    process = subprocess.Popen(
        [sys.executable, script.__file__, *argv], stderr=subprocess.PIPE, text=True
    )
    run = tmp_path / reference.name
    while not (run / "checkpoint.pt").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "same command continues" in err.splitlines()[-1]
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert 20 <= step < 60
    script.main(argv)
    assert contents(run) == contents(reference)


def test_looking_at_samples_does_not_change_the_weights(script, tiny, tmp_path):
    variants = [[], ["--n_frames", "6"], ["--n_samples", "5"], ["--n_eval", "1"]]
    for k, extra in enumerate(variants):
        script.main(tiny(tmp_path / str(k), *extra))
    assert all(weights(tmp_path / str(k)) == weights(tmp_path / "0") for k in range(1, 4))


def test_a_larger_n_eval_only_samples_the_missing_images(script, tiny, tmp_path):
    script.main(tiny(tmp_path / "a", "--n_eval", "20"))
    script.main(tiny(tmp_path / "b", "--n_eval", "3"))
    model = (only(tmp_path / "b") / "model.pt").stat().st_mtime_ns
    script.main(tiny(tmp_path / "b", "--n_eval", "20"))
    assert (only(tmp_path / "b") / "model.pt").stat().st_mtime_ns == model
    at_once, grown = (
        script.load_grid(only(tmp_path / name) / "samples_final.png") for name in "ab"
    )
    assert torch.equal(at_once, grown) and len(grown) == 20
    assert len({image.numpy().tobytes() for image in grown}) == 20
    script.main(tiny(tmp_path / "b", "--n_eval", "5"))  # never fewer
    assert len(script.load_grid(only(tmp_path / "b") / "samples_final.png")) == 20


CHANGES = [
    ["--arm", "matched"],
    ["--steps", "7"],
    ["--batch_size", "5"],
    ["--lr", "0.01"],
    ["--ema_decay", "0.05"],
    ["--n_train", "7"],
    ["--timesteps", "9"],
    ["--seeds", "4"],
]


def test_every_training_flag_changes_the_weights(script, tiny, tmp_path):
    results = []
    for k, extra in enumerate([[], *CHANGES]):
        script.main(tiny(tmp_path / str(k), *extra))
        results.append(weights(tmp_path / str(k)))
    for (j, a), (k, b) in itertools.combinations(enumerate(results), 2):
        assert a != b, (j, k)
    argv = tiny(tmp_path / "epochs", "--epochs", "5")  # of two steps each
    argv = [*argv[: argv.index("--steps")], *argv[argv.index("--steps") + 2 :]]
    script.main(argv)
    assert len((only(tmp_path / "epochs") / "loss.csv").read_text().splitlines()) == 11
    for extra in (["--n_qubits", "3"], ["--n_layers", "1"]):
        argv = tiny(tmp_path / extra[0], "--arm", "quantum", *extra)
        script.main(argv)
        shape = torch.load(only(tmp_path / extra[0]) / "model.pt")["gate.weights"].shape
        assert int(extra[1]) in shape


def test_sample_steps_changes_the_final_grid_only(script, tiny, tmp_path):
    script.main(tiny(tmp_path / "a"))
    script.main(tiny(tmp_path / "b", "--sample_steps", "4"))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    a, b = (script.load_grid(only(tmp_path / k) / "samples_final.png") for k in "ab")
    assert not torch.equal(a, b)


def test_pennylane_simulator_trains_the_same_model(script, tiny, tmp_path):
    for simulator in ("exact", "default.qubit"):
        argv = tiny(tmp_path / simulator, "--use_quantum", "--n_qubits", "3")
        script.main([*argv, "--simulator", simulator])
    a, b = (torch.load(only(tmp_path / s) / "model.pt") for s in ("exact", "default.qubit"))
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


def test_grid_over_two_processes_covers_it_exactly_once(script, tiny, tmp_path, monkeypatch):
    extra = ["--arm", "classical", "matched", "--seeds", "0", "1", "2", "--steps", "1"]
    shares = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", rank)
        script.main(tiny(tmp_path / rank, *extra))
        shares.append({run.name for run in (tmp_path / rank).iterdir()})
    assert len(shares[0]) == len(shares[1]) == 3 and not shares[0] & shares[1]
    wanted = itertools.product(("classical", "matched"), range(3))
    names = {re.sub(r"_.*_", "_", name) for name in shares[0] | shares[1]}
    assert names == {f"{arm}_seed{seed}" for arm, seed in wanted}


def test_processes_share_the_gpus_there_are(script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, devices in ((1, [0] * 8), (3, [0, 1, 2, 0, 1, 2, 0, 1])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        for rank, index in enumerate(devices):
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            assert script.choose_device("auto") == torch.device("cuda", index)


def test_a_process_of_many_makes_the_lone_process_run(script, tiny, tmp_path, monkeypatch):
    extra = ["--arm", "classical", "quantum", "--n_qubits", "3", "--lr", "0.05"]
    script.main(tiny(tmp_path / "lone", *extra))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    script.main(tiny(tmp_path / "shared", *extra))
    run = only(tmp_path / "shared")
    assert run.name.startswith("quantum")
    assert contents(run) == contents(tmp_path / "lone" / run.name)


ERRORS = {
    "sizes": (["--n_train", "0"], "1 to"),
    "beyond": (["--n_train", "999999"], "training images"),
    "words": (["--n_train", "many"], "number of images"),
    "arm": (["--arm", "quantom"], "invalid choice"),
    "simulator": (["--use_quantum", "--simulator", "no.device"], "nor a PennyLane device"),
    "layers": (["--use_quantum", "--n_layers", "6"], "up to 5"),
    "device": (["--device", "abacus"], "expected auto, cpu"),
    "both": (["--arm", "quantum", "--use_quantum=False"], "--use_quantum=False means"),
    "bool": (["--use_quantum=maybe"], "invalid choice"),
    "respacing": (["--sample_steps", "9"], "more than --timesteps"),
    "ema": (["--ema_decay", "1"], "expected below 1"),
    "lr": (["--lr", "-1"], "above 0"),
    "nan": (["--lr", "nan"], "above 0"),
    "steps": (["--steps", "0"], "above 0"),
    "length": (["--steps", "3", "--epochs", "2"], "not allowed with"),
    "flag": (["--no_such_flag"], "unrecognized"),
}


@pytest.mark.parametrize("mistake", ERRORS)
def test_mistakes_are_one_line_and_leave_nothing(script, tiny, tmp_path, fails, mistake):
    extra, words = ERRORS[mistake]
    assert words in fails(script, tiny(tmp_path / "runs", *extra))
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent(script, tiny, tmp_path, fails):
    assert "use --device cpu" in fails(script, tiny(tmp_path, "--device", "cuda"))


@pytest.mark.parametrize(
    "script, flag", [(mnist, "--digits"), (pathmnist, "--labels")], indirect=["script"]
)
def test_unknown_class(script, flag, tmp_path, fails):
    for word in ("11", "-1", "stromata"):
        assert f"{flag} {word}" in fails(script, [flag, word, "--save_dir", tmp_path / "runs"])
    assert not (tmp_path / "runs").exists()


def test_other_settings_in_an_existing_folder(script, tiny, tmp_path, fails):
    script.main(tiny(tmp_path))
    before = contents(only(tmp_path))
    message = fails(script, tiny(tmp_path, "--lr", "0.5", "--n_frames", "2"))
    assert "lr 0.003 (asked for: 0.5)" in message and "n_frames 3" in message
    assert "seed" not in message.split("settings: ")[1].split(";")[0]
    assert contents(only(tmp_path)) == before


def test_foreign_and_unwritable_folders(script, tiny, tmp_path, fails):
    script.main(tiny(tmp_path / "a"))
    foreign = tmp_path / "b" / only(tmp_path / "a").name
    foreign.mkdir(parents=True)
    (foreign / "thesis.tex").write_text("all my work")
    assert "not a run" in fails(script, tiny(tmp_path / "b"))
    (tmp_path / "file").write_text("")
    assert "file" in fails(script, tiny(tmp_path / "file"))
    assert (foreign / "thesis.tex").read_text() == "all my work"


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.pt", "samples_final.png", "config.json"])
def test_truncated_files_are_named(script, tiny, tmp_path, fails, name):
    script.main(tiny(tmp_path))
    path = only(tmp_path) / name
    if name == "checkpoint.pt":
        (only(tmp_path) / "model.pt").unlink()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert name in fails(script, tiny(tmp_path, "--n_eval", "9"))


def test_full_disk_is_one_line_and_keeps_the_checkpoint(script, tiny, tmp_path, fails, monkeypatch):
    write, done = Path.write_bytes, []

    def until_full(self, data):
        done.append(self.name)
        if sum("checkpoint" in name for name in done) == 2:
            raise OSError(28, "No space left on device", str(self))
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", until_full)
        assert "No space left" in fails(script, tiny(tmp_path / "a"))
    script.load_tensors(only(tmp_path / "a") / "checkpoint.pt", torch.device("cpu"))
    script.main(tiny(tmp_path / "a"))
    script.main(tiny(tmp_path / "b"))
    assert contents(only(tmp_path / "a")) == contents(only(tmp_path / "b"))


def test_a_loss_that_is_not_finite_stops_the_run(script, tiny, tmp_path, fails, monkeypatch):
    rate = script.learning_rate
    monkeypatch.setattr(
        script, "learning_rate", lambda step, *rest: 1e30 if step == 3 else rate(step, *rest)
    )
    assert "not finite at step 5" in fails(script, tiny(tmp_path))
    state = torch.load(only(tmp_path) / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4 or state["step"] == 2
    assert not (only(tmp_path) / "model.pt").exists()


def test_weights_file_that_would_execute_code_is_refused(script, tiny, tmp_path, fails):
    script.main(tiny(tmp_path))

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"x": Payload()}, only(tmp_path) / "model.pt")
    assert "model.pt" in fails(script, tiny(tmp_path, "--n_eval", "9"))
    assert not (tmp_path / "owned").exists()


def test_help_explains_every_flag(script, capsys):
    with pytest.raises(SystemExit) as exit_:
        script.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for action in script.build_parser()._actions:
        assert action.help, action.option_strings
        assert action.option_strings[-1] in text
    for arm in script.ARMS:
        assert f"  {arm} " in text


def readme_commands(name):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if f" {name}" in line]


def test_readme_commands_parse(script):
    commands = readme_commands(Path(script.__file__).name)
    assert len(commands) >= 2
    for line in commands:
        words = shlex.split(line, comments=True)
        argv = words[words.index(Path(script.__file__).name) + 1 :]
        args = script.build_parser().parse_args(argv)
        script.choose_arms(args.arm, args.use_quantum)
