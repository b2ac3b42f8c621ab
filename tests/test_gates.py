"""The gates and the U-Net as a library: sizes, values by hand, gradients, number types, errors."""

import math
from functools import partial

import gate_use
import pandas as pd
import pennylane as qml
import pytest
import torch
import torch.nn.functional as F
from conftest import circuit_inputs, leave_zero, only, tiny

import cal_fid_ssim as evaluation
import quantum_diffusion_mnist as qd

CIRCUITS = [name for name, arm in qd.ARMS.items() if arm.circuit]
GATES = ["matched", "se", *CIRCUITS]
NO_CHAIN = {"simulator": "lightning.qubit"}


def unet_of(arm, channels=1, **settings):
    """The U-Net of an arm, with a small gate."""
    if arm in ("ring", "strong"):
        settings |= NO_CHAIN
    sizes = {"n_qubits": 4, "n_layers": 2}
    return qd.make_unet(channels, qd.Settings(arm, **sizes | settings))


def count(parameters):
    return sum(p.numel() for p in parameters)


# ------------------------------------------------------------------------------ a gate of its own


def test_a_gate_with_a_circuit_of_ones_own():
    def own_circuit(angles, weights):
        qd.encode(angles)
        for i in range(3):
            qml.RX(weights[0, i, 0], wires=i)

    gate = leave_zero(qd.QuantumGate(8, own_circuit, n_qubits=3, n_layers=1, n_weights=1))
    features = torch.randn(5, 8)

    # RX mixes Y and Z, and Y is zero after RY.
    x = gate.project_in(features)
    by_hand = gate.project_out(x.cos() * gate.weights[0, :, 0].cos())
    assert torch.allclose(gate(features), by_hand, atol=1e-5)
    assert by_hand.abs().max() > 0.05

    unet = qd.UNet(1, partial(qd.QuantumGate, circuit=own_circuit, n_qubits=3, n_weights=1))
    assert unet(torch.randn(1, 1, 28, 28), torch.tensor([5])).shape == (1, 1, 28, 28)


@pytest.mark.parametrize("shots", [0, -1])
def test_no_shots_are_an_error(shots):
    with pytest.raises(qd.UserError, match=f"shots {shots}: expected at least 1, or None"):
        qd.QuantumGate(8, shots=shots)


@pytest.mark.parametrize(
    "gate_noise, readout_noise",
    [((-0.1, 0), 0), ((0, 1.1), 0), ((0.1,), 0), ((0, 0), -1), ((0, math.nan), 0)],
)
def test_noise_beyond_probabilities_is_an_error(gate_noise, readout_noise):
    noise = {"gate_noise": gate_noise, "readout_noise": readout_noise}
    with pytest.raises(qd.UserError, match=r"expected two numbers and one number of 0.0 to 1.0"):
        qd.QuantumGate(8, n_qubits=2, **noise)


def test_an_unknown_arm_is_an_error():
    with pytest.raises(qd.UserError, match="--arm nonsense: expected one of classical, matched"):
        qd.Settings("nonsense")


def test_too_few_weights_are_an_error():
    with pytest.raises(qd.UserError, match="strong_circuit fails for 16 qubits .*: Weights tensor"):
        qd.QuantumGate(8, qd.strong_circuit, simulator="lightning.qubit")


def test_shots_without_generators_are_an_error():
    angles, weights = circuit_inputs(2, 3, 1)
    for generators in ((), [qd.random_stream(0)]):
        with pytest.raises(qd.UserError, match="for the shots of 2 samples: expected one for each"):
            qd.circuit_expectations(angles, weights, shots=5, generators=generators)


@pytest.mark.parametrize("simulator", ["lightning.qubit", "reference.qubit"])
def test_a_pennylane_device_gives_the_same_gate(simulator):
    # float64, as lightning's are double and reference's single precision.
    gates = []
    for name in ("exact", simulator):
        torch.manual_seed(2)
        gate = qd.QuantumGate(8, n_qubits=4, n_layers=2, simulator=name)
        gates.append(leave_zero(gate).double())
    features = torch.randn(3, 8, dtype=torch.float64)

    values = [gate(features) for gate in gates]
    for value in values:
        value.square().sum().backward()
    assert torch.allclose(*values, atol=1e-6)
    for a, b in zip(*(gate.parameters() for gate in gates), strict=True):
        assert a.grad.abs().max() > 1e-4
        assert torch.allclose(a.grad, b.grad, atol=1e-6)

    with torch.no_grad():  # the inference circuit, without a gradient method
        assert torch.allclose(gates[1](features), values[0], atol=1e-6)


@pytest.mark.parametrize("simulator", ["default.qubit", "lightning.qubit", "default.mixed"])
def test_a_single_sample_on_a_device(simulator):
    gate = qd.QuantumGate(8, n_qubits=3, n_layers=1, simulator=simulator)
    angles = torch.randn(4, 3)
    together = gate.expectations(angles)
    assert gate.expectations(angles[:1]).shape == (1, 3)
    assert torch.allclose(gate.expectations(angles[:1]), together[:1], atol=1e-6)


# -------------------------------------------------------------------------------- values by hand


def test_matched_gate_by_hand():
    gate = qd.ClassicalGate(2, n_units=2, n_layers=2)
    with torch.no_grad():
        gate.weights.copy_(torch.tensor([[[1.0, 0.5], [2.0, 0.0]], [[3.0, 0.1], [1.0, 1.0]]]))
        gate.project_in.weight.copy_(torch.eye(2))
        gate.project_in.bias.zero_()
        gate.project_out.weight.copy_(torch.eye(2))
    first = math.cos(3 * math.cos(0.7 + 0.5) + 0.1)
    second = math.cos(math.cos(2 * -0.2) + 1)
    assert gate(torch.tensor([[0.7, -0.2]]))[0].tolist() == pytest.approx([first, second], abs=1e-6)


def test_squeeze_and_excitation_by_hand():
    gate = leave_zero(qd.ClassicalGate(8, n_units=4, matched=False))
    features = torch.randn(6, 8)
    hidden = F.relu(features @ gate.project_in.weight.T + gate.project_in.bias)
    by_hand = hidden @ gate.project_out.weight.T + gate.project_out.bias
    assert torch.allclose(gate(features), by_hand, atol=1e-6)
    assert (hidden == 0).any()
    assert by_hand.abs().max() > 0.01


def test_gate_multiplies_the_channels_by_hand():
    unet = leave_zero(unet_of("matched"), 0.3)
    seen = {}
    unet.attention.register_forward_hook(lambda _, inputs, out: seen.update(features=out))
    unet.merge[1].register_forward_pre_hook(lambda _, inputs: seen.update(merged=inputs[0]))
    unet.gate.register_forward_pre_hook(lambda _, inputs: seen.setdefault("gate_in", inputs[0]))
    unet(torch.randn(2, 1, 28, 28), torch.tensor([3, 700]))

    g = unet.gate(seen["features"].mean((2, 3)))[..., None, None]
    assert g.abs().max() > 0.1
    assert seen["gate_in"].requires_grad  # the encoder learns by it
    assert torch.allclose(seen["merged"][:, :128], seen["features"] * (1 + g), atol=1e-5)


# ----------------------------------------------------------------------------- initial weights


def test_all_arms_start_as_the_same_model():
    x = torch.randn(2, 1, 28, 28)
    t = torch.tensor([3, 700])
    plain = unet_of("classical")
    torch.nn.init.constant_(plain.head.weight, 0.1)
    for arm in GATES:
        unet = unet_of(arm)
        torch.nn.init.constant_(unet.head.weight, 0.1)
        assert torch.equal(unet(x, t), plain(x, t)), arm
        own = {name for name, _ in unet.named_parameters()}
        shared = {name for name, _ in plain.named_parameters()}
        assert all(name.startswith("gate.") for name in own - shared)
        for name, p in plain.named_parameters():
            assert torch.equal(p, unet.get_parameter(name)), (arm, name)
    assert not torch.equal(unet_of("quantum", seed=1).stem.weight, plain.stem.weight)


def test_numbers_of_weights():
    linears = 16 * (128 + 1) + 128 * (16 + 1)
    circuit_weights = {
        "classical": None,
        "matched": 2 * 3 * 16,
        "se": 0,
        "quantum": 2 * 3 * 16,
        "published": 3 * 16,
        "product": 2 * 3 * 16,
        "frozen": 0,
        "cz": 2 * 3 * 16,
        "ising": 3 * 3 * 16,
        "brickwork": 2 * 3 * 16,
        "reupload": 2 * 3 * 16,
        "ring": 2 * 3 * 16,
        "strong": 3 * 3 * 16,
    }
    assert circuit_weights.keys() == qd.ARMS.keys()
    for arm, expected in circuit_weights.items():
        gate = unet_of(arm, n_qubits=16, n_layers=3).gate
        if expected is None:
            assert gate is None
        else:
            trained = count(p for p in gate.parameters() if p.requires_grad)
            assert trained == linears + expected, arm
    assert count(unet_of("classical").parameters()) == 947_316


@pytest.mark.parametrize("arm", GATES)
def test_gate_trains_from_encoder_to_output(arm):
    unet = leave_zero(unet_of(arm), 0.3)
    out = unet(torch.randn(4, 1, 28, 28), torch.tensor([0, 300, 600, 999]))
    (100 * out.square().mean()).backward()
    gate = {name: p.grad for name, p in unet.gate.named_parameters()}
    for name in ("project_in.weight", "project_in.bias", "project_out.weight"):
        assert gate[name].abs().max() > 1e-3

    if arm == "frozen":
        assert gate["weights"] is None
    elif arm == "published":
        assert gate["weights"].abs().max() < 1e-5
    elif arm != "se":
        assert gate["weights"].abs().max() > 1e-3


@pytest.mark.parametrize("arm", ["quantum", "reupload", "matched"])
def test_gate_gradient_by_finite_differences(arm):
    gate = leave_zero(unet_of(arm, n_qubits=3).gate, 0.5).double()
    features = torch.randn(2, 128, dtype=torch.float64, requires_grad=True)

    def loss():
        return gate(features).square().sum()

    parameters = [features, gate.weights, gate.project_in.weight]
    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        # The slope along a random direction.
        direction = torch.randn_like(parameter)
        direction /= direction.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-5)
                values.append(loss())
                parameter.sub_(direction, alpha=sign * 1e-5)
        slope = (values[0] - values[1]) / 2e-5
        assert slope.abs() > 1e-3
        assert torch.allclose(slope, (gradient * direction).sum(), rtol=1e-5)


# -------------------------------------------------------------------------- a guest in a notebook


def test_a_unet_leaves_torchs_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    unet = unet_of("quantum")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(unet_of("quantum").stem.weight, unet.stem.weight)


def test_a_unet_leaves_a_gpus_generator_alone(monkeypatch):
    """Which torch.manual_seed sets as well, at once or once there is a GPU."""
    unet = unet_of("quantum")
    monkeypatch.setattr("torch.cuda.manual_seed_all", None)
    monkeypatch.setattr("torch.manual_seed", None)
    assert torch.equal(unet_of("quantum").stem.weight, unet.stem.weight)


def test_a_circuit_stays_exact_under_autocast():
    gate = qd.QuantumGate(8, n_qubits=4, n_layers=2)
    angles = torch.randn(3, 4, requires_grad=True)
    expected = gate.expectations(angles)
    (gradient,) = torch.autograd.grad(expected.sum(), angles)
    with torch.autocast("cpu", torch.bfloat16):
        values = gate.expectations(angles)
    assert torch.equal(values, expected)
    assert torch.equal(torch.autograd.grad(values.sum(), angles)[0], gradient)


def test_a_circuit_is_checked_as_it_is_now(monkeypatch):
    """Not as it was when it was checked before."""
    angle = [0.3]

    def mine(angles, weights):
        qd.encode(angles)
        qml.RX(angle[0], wires=0)
        qml.RY(weights[0, 0, 0], wires=1)

    monkeypatch.setitem(qd.ARMS, "mine", qd.Arm("with an angle from outside", mine, 1))
    settings = qd.Settings("mine", n_qubits=2, n_layers=1)
    qd.check_circuit(settings)
    angle[0] = 1.3
    qd.check_circuit(settings)


def test_a_circuit_that_is_read_in_inference_mode_can_be_trained():
    gate = qd.QuantumGate(8, n_qubits=4, n_layers=2)
    qd.compile_circuit.cache_clear()
    with torch.inference_mode():
        gate.expectations(torch.randn(3, 4))
    gate.expectations(torch.randn(3, 4)).sum().backward()
    assert gate.weights.grad.abs().max() > 0


def test_a_circuit_is_read_whatever_the_default_device():
    with torch.device("meta"):
        qd.record(qd.quantum_circuit, 4, 2, 2)
        qd.compile_circuit.cache_clear()
        qd.compile_circuit(qd.quantum_circuit, 4, 2, 2, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("arm", ["classical", "quantum", "se"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_unet_in_half_precision(arm, dtype):
    x = torch.randn(2, 1, 28, 28)
    t = torch.tensor([3, 700])
    unet = leave_zero(unet_of(arm))
    single = unet(x, t)
    other = unet.to(dtype)(x.to(dtype), t)
    assert other.dtype == dtype

    # float16 has 11 binary digits, bfloat16 8.
    bound = {torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    assert (other.double() - single.double()).abs().max() < bound * single.abs().max()


@pytest.mark.parametrize("arm", ["classical", "quantum", "se"])
def test_a_unet_in_double_precision(arm):
    x = torch.randn(2, 1, 28, 28)
    t = torch.tensor([3, 700])
    unet = leave_zero(unet_of(arm))
    single = unet(x, t)
    double = unet.double()(x.double(), t)
    assert double.dtype == torch.float64
    assert torch.allclose(double, single.double(), atol=1e-5)


def test_a_quantum_gate_with_shots_in_half_precision():
    gate = leave_zero(qd.QuantumGate(8, n_qubits=3, n_layers=1, shots=10)).bfloat16()
    streams = [qd.random_stream(0, k) for k in range(2)]
    values = gate(torch.randn(2, 8).bfloat16(), streams)
    assert values.dtype == torch.bfloat16
    assert values.shape == (2, 8)


@pytest.mark.parametrize(
    "call",
    [
        lambda: qd.QuantumGate(8, n_qubits=3)(torch.zeros(8)),
        lambda: qd.circuit_expectations(torch.zeros(3), torch.zeros(1, 3, 2)),
        lambda: qd.circuit_expectations(torch.zeros(2, 4), torch.zeros(1, 3, 2)),
        lambda: unet_of("classical")(torch.zeros(1, 28, 28), torch.tensor([3])),
    ],
)
def test_a_single_sample_without_its_axis_is_an_error(call):
    with pytest.raises(qd.UserError, match=r"expected \(B, "):
        call()


# ------------------------------------------------------------------------- what models do with it


def test_fids_with_another_gate_stay():
    known = pd.DataFrame({
        "run": ["a", "a", "b", "c"],
        "steps": [9, 8, 9, 9],
        "features": ["x", "x", "x", "y"],
        "fid": [1.0, 2.0, 3.0, 4.0],
        "fid_other": [1.5, 2.5, 3.5, 4.5],
    })  # fmt: skip
    new = pd.DataFrame({
        "run": ["c", "a", "d"],
        "steps": [9, 9, 9],
        "features": ["x", "x", "x"],
        "fid": [5.0, 6.0, 7.0],
        "fid_other": [math.nan, math.nan, 7.5],
    })  # fmt: skip
    rows = gate_use.joined(known, new).set_index(["run", "steps"])
    assert rows["fid"].to_dict() == {
        ("a", 8): 2.0, ("b", 9): 3.0, ("c", 9): 5.0, ("a", 9): 6.0, ("d", 9): 7.0,
    }  # fmt: skip
    assert rows["fid_other"].dropna().to_dict() == {
        ("a", 8): 2.5, ("b", 9): 3.5, ("a", 9): 1.5, ("d", 9): 7.5,
    }  # fmt: skip


def test_what_gates_measured_is_kept_at_once(tmp_path, monkeypatch):
    """The second run fails; gates without weights inside are refused before any is measured."""
    runs = tmp_path / "runs"
    qd.main(tiny(runs, "--arm", "matched", "quantum", "se", "--n_frames", "1"))
    matched, quantum, se = sorted(runs.iterdir())
    monkeypatch.setattr(evaluation, "CLASSIFIER_STEPS", 2)

    def fail(folder, *_others):
        if folder == quantum:
            raise OSError("lost")
        return {"run": folder.name, "steps": 1}

    monkeypatch.setattr(gate_use, "measure", fail)
    options = ["--data_dir", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(qd.UserError, match="arm se has no weights inside its gate"):
        gate_use.main([str(matched), str(se), *options])
    assert not (tmp_path / "out").exists()
    with pytest.raises(OSError, match="lost"):
        gate_use.main([str(matched), str(quantum), *options])
    assert pd.read_csv(tmp_path / "out" / "gate_use.csv")["run"].tolist() == [matched.name]


def test_kinds_of_gate_at_sampling(tmp_path, monkeypatch):
    """A run sampled with its gate, with the gate's mean over images at each step, and without."""
    qd.main(tiny(tmp_path, "--use_quantum", "--lr", "0.3", "--n_frames", "1"))
    folder = only(tmp_path)
    monkeypatch.setattr(gate_use, "N_IMAGES", 4)
    monkeypatch.setattr(gate_use, "N_WATCHED", 4)
    drawn = []
    row = gate_use.measure(folder, None, lambda images: drawn.append(images) or len(drawn))
    assert [row[kind] for kind in ("fid", "fid_off", "fid_mean")] == [1, 2, 3]
    assert math.isnan(row["fid_other"])

    settings, model = qd.load_run(folder)
    sample = partial(qd.sample_images, settings, model, "image", range(4), settings.sample_steps)
    values = []
    hook = model.gate.register_forward_hook(lambda gate, inputs, g: values.append(g))
    assert torch.equal(sample(), drawn[0])
    hook.remove()
    means = torch.stack(values).mean(dim=1)  # (steps, C)
    coming = iter(means)
    hook = model.gate.register_forward_hook(lambda gate, inputs, g: next(coming).expand_as(g))
    assert torch.equal(sample(), drawn[2])
    hook.remove()
    assert next(coming, None) is None
    model.gate = None
    assert torch.equal(sample(), drawn[1])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])

    assert row["mean"] == " ".join(f"{x:.4f}" for x in means.mean(dim=1))
    assert row["over_channels"] == " ".join(f"{x:.4f}" for x in means.std(dim=1))
