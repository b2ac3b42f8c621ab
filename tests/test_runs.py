"""Whole runs from the command line: what they write, resume, sharding, errors, help, README."""

import hashlib
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


def test_a_run_writes_its_folder(script, embedded, tiny, only, tmp_path):
    script.main(tiny(tmp_path, "--use_quantum", script=script))
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
    unet = script.UNet(embedded.channels, "quantum", n_qubits=3, n_layers=2)
    assert config["parameters"]["model"] == sum(p.numel() for p in unet.parameters())
    assert config["parameters"]["gate_weights"] == 2 * 3 * 2
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
def reference(tiny, only, references, tmp_path_factory):
    """The command line and the folder of an uninterrupted noisy run, made once."""
    argv = ("--steps", "60", *NOISY)
    if not references:
        folder = tmp_path_factory.mktemp("reference")
        qd.main(tiny(folder, *argv))
        references["run"] = only(folder)
    return argv, references["run"]


def test_same_seed_same_bits_and_another_seed_others(tiny, only, weights, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        qd.main(tiny(tmp_path / name, "--seeds", seed))
    assert contents(only(tmp_path / "a")) == contents(only(tmp_path / "b"))
    assert tensors(weights(tmp_path / "a")) != tensors(weights(tmp_path / "c"))
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    qd.main(tiny(tmp_path / "a"))  # finished runs are skipped
    assert finished == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("kill_at", ["samples/step_000040.png", "model.pt"])
def test_killed_and_continued_equals_uninterrupted(tiny, tmp_path, reference, kill_at):
    argv, whole = reference
    command = [sys.executable, qd.__file__, *tiny(tmp_path, *argv)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    run = tmp_path / whole.name
    while not (run / kill_at).exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (run / "samples_final.png").exists()
    (run / ".checkpoint.pt.1.tmp").write_text("what a kill in the middle of a write leaves")
    qd.main(tiny(tmp_path, *argv))
    assert contents(run) == contents(whole)


def test_ctrl_c_saves_and_says_how_to_go_on(tiny, tmp_path, reference):
    argv, whole = reference
    command = [sys.executable, qd.__file__, *tiny(tmp_path, *argv)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    run = tmp_path / whole.name
    while not (run / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "same command continues" in err.splitlines()[-1]
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert 20 <= step < 60
    qd.main(tiny(tmp_path, *argv))
    assert contents(run) == contents(whole)


def test_looking_at_samples_does_not_change_the_weights(tiny, weights, tmp_path):
    variants = [[], ["--n_frames", 6, "--n_samples", 5], ["--n_eval", 1, "--sample_steps", 4]]
    for k, extra in enumerate(variants):
        qd.main(tiny(tmp_path / str(k), *NOISY, *extra))
    assert all(tensors(weights(tmp_path / k)) == tensors(weights(tmp_path / "0")) for k in "12")


def test_a_larger_n_eval_only_samples_the_missing_images(tiny, only, tmp_path):
    # Shots too: an image does not depend on those it is drawn with.
    argv = (*NOISY, "--lr", "0.05", "--n_eval")
    qd.main(tiny(tmp_path / "a", *argv, 20))
    qd.main(tiny(tmp_path / "b", *argv, 3))
    model = (only(tmp_path / "b") / "model.pt").stat().st_mtime_ns
    few, path = qd.load_grid(only(tmp_path / "b") / "samples_final.png"), only(tmp_path / "b")
    qd.main(tiny(tmp_path / "b", *argv, 20))
    assert (path / "model.pt").stat().st_mtime_ns == model
    assert json.loads((path / "config.json").read_text())["n_eval"] == 20
    at_once, grown = (qd.load_grid(only(tmp_path / k) / "samples_final.png") for k in "ab")
    assert torch.equal(at_once, grown) and torch.equal(grown[:3], few) and len(grown) == 20
    assert len({image.numpy().tobytes() for image in grown}) == 20
    qd.main(tiny(tmp_path / "b", *argv, 5))  # never fewer
    assert len(qd.load_grid(path / "samples_final.png")) == 20


CHANGES = [
    *(["--arm", "matched"], ["--steps", 7], ["--batch_size", 5], ["--lr", 0.01]),
    *(["--ema_decay", 0.05], ["--n_train", 7], ["--timesteps", 9], ["--seeds", 4]),
]
CIRCUIT_CHANGES = [
    *(["--arm", "published"], ["--arm", "product"], ["--arm", "frozen"], ["--shots", 5]),
    *(["--gate_noise", "0.2,0"], ["--gate_noise", "0,0.2"], ["--readout_noise", 0.2]),
]


@pytest.mark.parametrize(
    "common, changes", [([], CHANGES), (["--arm", "quantum"], CIRCUIT_CHANGES)]
)
def test_every_training_flag_changes_the_weights(tiny, weights, tmp_path, common, changes):
    quick = ("--lr", "0.05", "--n_frames", 1, "--n_samples", 1, "--n_eval", 1, "--sample_steps", 1)
    results = []
    for k, extra in enumerate([[], *changes]):
        qd.main(tiny(tmp_path / str(k), *quick, *common, *extra))
        results.append(weights(tmp_path / str(k))["head.weight"])
    for (j, a), (k, b) in itertools.combinations(enumerate(results), 2):
        assert (a - b).abs().max() > 1e-5, (j, k)


def test_sizes_of_circuit_and_epochs_are_obeyed(tiny, only, weights, tmp_path):
    argv = tiny(tmp_path / "epochs", "--arm", "quantum", "--n_qubits", 5, "--n_layers", 1)
    cut = argv.index("--steps")
    qd.main([*argv[:cut], *argv[cut + 2 :], "--epochs", "5"])  # of two steps each
    assert len((only(tmp_path / "epochs") / "loss.csv").read_text().splitlines()) == 11
    assert weights(tmp_path / "epochs")["gate.weights"].shape == (1, 5, 2)


def test_pennylane_simulator_trains_the_same_model(tiny, weights, tmp_path):
    for simulator in ("exact", "default.qubit"):
        qd.main(tiny(tmp_path / simulator, "--use_quantum", "--simulator", simulator))
    a, b = (weights(tmp_path / s) for s in ("exact", "default.qubit"))
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


# ----------------------------------------------------------------------------- conditions


def test_weights_of_one_run_are_sampled_under_other_conditions(tiny, only, tmp_path, fails):
    argv = ("--use_quantum", "--lr", "0.05")
    qd.main(tiny(tmp_path / "trained", *argv))
    trained = only(tmp_path / "trained")
    before, images = contents(trained), qd.load_grid(trained / "samples_final.png")
    argv = (*argv, "--weights", tmp_path / "trained")

    twin = tmp_path / "others" / f"{trained.name}_default.qubit"
    qd.main(tiny(tmp_path / "others", *argv, "--simulator", "default.qubit"))
    other = qd.load_grid(twin / "samples_final.png")
    assert (other.int() - images.int()).abs().max() <= 2 and len(other) == 4
    names = {path.name for path in twin.iterdir()}
    assert names == {"config.json", "model.pt", "samples_final.png"}  # nothing was trained
    assert (twin / "model.pt").read_bytes() == (trained / "model.pt").read_bytes()
    config = json.loads((twin / "config.json").read_text())
    assert config["condition"] == "default.qubit" and config["n_eval"] == 4
    digest = hashlib.sha256((trained / "model.pt").read_bytes()).hexdigest()
    assert config["weights"]["weights_sha256"] == digest
    qd.main(tiny(tmp_path / "others", *argv, "--simulator", "default.qubit", "--n_eval", 6))
    grown = qd.load_grid(twin / "samples_final.png")
    assert len(grown) == 6 and torch.equal(grown[:4], other)
    assert json.loads((twin / "config.json").read_text())["n_eval"] == 6

    qd.main(tiny(tmp_path / "others", *argv, *NOISY[1:], "--sample_steps", 3))
    noisy = tmp_path / "others" / f"{trained.name}_shots8_gate0.05-0.1_readout0.02_steps3"
    assert not torch.equal(qd.load_grid(noisy / "samples_final.png"), images)
    assert contents(trained) == before and len(list((tmp_path / "others").iterdir())) == 2

    for extra, words in (
        (("--n_qubits", 4), "was trained with n_qubits 3 (asked for: 4)"),
        (("--steps", 7), "was trained with steps 6 (asked for: 7)"),
        (("--seeds", 5), "0 trained models"),
        (("--weights", tmp_path / "nowhere"), "0 trained models"),
    ):
        assert words in fails(qd, tiny(tmp_path / "new", *argv, "--shots", 9, *extra))
    assert not (tmp_path / "new").exists()
    message = fails(qd, tiny(tmp_path / "others", *argv[:-2], "--simulator", "default.qubit"))
    assert f"sha256 {digest!r} (asked for: None)" in message


def test_a_condition_has_a_folder_of_its_own_and_none_has_none(tiny, tmp_path):
    qd.main(tiny(tmp_path, "--use_quantum", "--gate_noise", "0,0", "--sample_steps", 8))
    qd.main(tiny(tmp_path, "--arm", "matched", *NOISY[1:]))  # no circuit, no condition
    qd.main(tiny(tmp_path, *NOISY))
    names = "quantum_digits3_n8_seed0", "matched_digits3_n8_seed0"
    noisy = f"{names[0]}_shots8_gate0.05-0.1_readout0.02"
    assert {path.name for path in tmp_path.iterdir()} == {*names, noisy}
    settings = json.loads((tmp_path / names[1] / "config.json").read_text())["settings"]
    assert settings["shots"] is None and settings["gate_noise"] is None


# ------------------------------------------------------------------------ many processes


def test_a_grid_over_two_processes_is_the_lone_process_grid(tiny, tmp_path, monkeypatch):
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


def test_processes_share_the_gpus_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, devices in ((1, [0] * 8), (3, [0, 1, 2, 0, 1, 2, 0, 1])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        for rank, index in enumerate(devices):
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            assert qd.choose_device("auto") == torch.device("cuda", index)


# -------------------------------------------------------------------------------- mistakes

MISTAKES = [
    ("--n_train 0", "1 to"),
    ("--n_train 999999", "training images"),
    ("--n_train many", "number of images"),
    ("--arm quantom", "invalid choice"),
    ("--arm classical --use_quantum", "not allowed with argument --arm"),
    ("--use_quantum=maybe", "invalid choice"),
    ("--device abacus", "expected auto, cpu"),
    ("--sample_steps 9", "more than --timesteps"),
    ("--ema_decay 1", "expected 0.0 to 0.999999"),
    ("--lr -1", "expected 1e-09 to"),
    ("--lr nan", "expected 1e-09 to"),
    ("--lr fast", "invalid float value"),
    ("--steps 0", "expected 1 to"),
    ("--steps 1.5", "invalid int value"),
    ("--steps 3 --epochs 2", "not allowed with"),
    ("--no_such_flag", "unrecognized"),
    ("--gate_noise 0.1", "as in 0.001,0.01"),
    ("--gate_noise 0.1,1.5", "expected 0.0 to 1.0"),
    ("--gate_noise 0.1,x", "--gate_noise"),
    ("--readout_noise -0.1", "expected 0.0 to 1.0"),
    ("--shots 0", "expected 1 to"),
    ("--simulator_options [1]", "JSON object"),
    ("--simulator_options {", "--simulator_options"),
    ("""--simulator_options '{"seed": 1}'""", "expected a PennyLane device"),
    ("""--simulator default.qubit --simulator_options '{"shots": 9}'""", "use --shots"),
    ("""--simulator default.qubit --simulator_options '{"a": 1}' --use_quantum""", "argument 'a'"),
    ("--use_quantum --n_layers 6", "up to 5"),
    ("--use_quantum --simulator no.device", "nor a PennyLane device"),
    ("--use_quantum --simulator default.gaussian", "neither exact nor"),
    ("--use_quantum --simulator lightning.qubit --gate_noise 0.1,0.1", "not supported"),
    ("--use_quantum --simulator default.mixed --n_qubits 16", "64 GiB a sample"),
]


@pytest.mark.parametrize("mistake, words", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(tiny, tmp_path, fails, mistake, words):
    argv = tiny(tmp_path / "runs", *shlex.split(mistake))
    if "--epochs" not in argv and "--steps" in mistake:
        argv = [*argv[: argv.index("--steps")], *argv[argv.index("--steps") + 2 :]]
    assert words in fails(qd, argv)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script, flag", [(qd, "--digits"), (pathmnist, "--labels")])
def test_unknown_class(script, flag, tmp_path, fails):
    for word in ("11", "-1", "stromata"):
        assert f"{flag} {word}" in fails(script, [flag, word, "--save_dir", tmp_path / "runs"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent(tiny, tmp_path, fails):
    assert "use --device cpu" in fails(qd, tiny(tmp_path, "--device", "cuda"))


def test_other_settings_in_an_existing_folder(tiny, only, tmp_path, fails):
    qd.main(tiny(tmp_path))
    before = contents(only(tmp_path))
    message = fails(qd, tiny(tmp_path, "--lr", "0.5", "--n_frames", "2"))
    assert "lr 0.003 (asked for: 0.5)" in message and "n_frames 3" in message
    assert "seed" not in message.split("settings: ")[1].split(";")[0]
    assert contents(only(tmp_path)) == before


def test_foreign_and_unwritable_folders(tiny, only, tmp_path, fails):
    qd.main(tiny(tmp_path / "a"))
    foreign = tmp_path / "b" / only(tmp_path / "a").name
    foreign.mkdir(parents=True)
    (foreign / "thesis.tex").write_text("all my work")
    assert "not a run" in fails(qd, tiny(tmp_path / "b"))
    (tmp_path / "file").write_text("")
    assert "file" in fails(qd, tiny(tmp_path / "file"))
    assert (foreign / "thesis.tex").read_text() == "all my work"


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.pt", "samples_final.png", "config.json"])
def test_truncated_files_are_named(tiny, only, tmp_path, fails, name):
    qd.main(tiny(tmp_path))
    path = only(tmp_path) / name
    if name == "checkpoint.pt":
        (only(tmp_path) / "model.pt").unlink()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert name in fails(qd, tiny(tmp_path, "--n_eval", "9"))


def test_full_disk_is_one_line_and_keeps_the_checkpoint(tiny, only, tmp_path, fails, monkeypatch):
    write, done = Path.write_bytes, []

    def until_full(self, data):
        done.append(self.name)
        if sum("checkpoint" in name for name in done) == 2:
            raise OSError(28, "No space left on device", str(self))
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", until_full)
        assert "No space left" in fails(qd, tiny(tmp_path / "a"))
    qd.load_tensors(only(tmp_path / "a") / "checkpoint.pt", torch.device("cpu"))


def test_a_loss_that_is_not_finite_stops_the_run(tiny, only, tmp_path, fails, monkeypatch):
    rate = qd.learning_rate
    monkeypatch.setattr(
        qd, "learning_rate", lambda step, *rest: 1e30 if step == 3 else rate(step, *rest)
    )
    assert "not finite at step 5" in fails(qd, tiny(tmp_path))
    state = torch.load(only(tmp_path) / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4 or state["step"] == 2
    assert not (only(tmp_path) / "model.pt").exists()


def test_weights_file_that_would_execute_code_is_refused(tiny, only, tmp_path, fails):
    qd.main(tiny(tmp_path))

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"x": Payload()}, only(tmp_path) / "model.pt")
    assert "model.pt" in fails(qd, tiny(tmp_path, "--n_eval", "9"))
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


def test_readme_commands_parse(script):
    name = Path(script.__file__).name
    pages = [page for page in (ROOT / "README.md", ROOT / "result_gif/README.md") if page.exists()]
    text = "\n".join(page.read_text() for page in pages)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line for line in lines if f" {name}" in line]
    assert commands
    for line in commands:
        words = shlex.split(line, comments=True)
        args = script.build_parser().parse_args(words[words.index(name) + 1 :])
        script.check_flags(args)
