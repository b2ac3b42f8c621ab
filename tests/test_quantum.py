"""The exact simulation, the circuit and the gates."""

import math

import pennylane as qml
import pytest
import torch
from conftest import circuit, leave_zero, tiny

import quantum_diffusion_mnist as qd

NOISE = {"gate_noise": (0.07, 0.2), "readout_noise": 0.0625}


def value_and_gradients(values, *inputs):
    probe = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).to(values)
    return values, *torch.autograd.grad((values * probe).sum(), inputs)


@pytest.mark.parametrize("noise", [{}, NOISE, {"gate_noise": (1.0, 0.0)}], ids=str)
@pytest.mark.parametrize("arm", ["quantum", "published", "product"])
def test_exact_simulation_equals_pennylane(arm, noise):
    # Noise: the exact mean over all errors, from the density matrix, whose channels are float32.
    device, bound = ("default.mixed", 1e-6) if noise else ("default.qubit", 1e-10)
    for n, layers in (
        [(1, 1), (1, 3), (5, 2), (3, 4)] if noise else [(1, 1), (2, 1), (6, 3), (3, 4)]
    ):
        settings = qd.Settings(arm, n_qubits=n, n_layers=layers, simulator=device, **noise)
        inputs = circuit(3, n, layers, arm)
        ours = value_and_gradients(qd.circuit_expectations(*inputs, settings), *inputs)
        theirs = torch.stack(qd.make_qnode(settings)(*inputs), -1)
        for a, b in zip(ours, value_and_gradients(theirs, *inputs), strict=True):
            assert a.shape == b.shape and (a - b).abs().max() < bound, (n, layers)


def test_published_circuit_is_a_product_of_cosines_whatever_its_weights():
    # Three CNOT chains on basis states: prefix sums modulo 2, three times. <Z_i> is the product of
    # cos(x_j) over the j that occur an odd number of times in bit i.
    angles, weights = circuit(4, 7, 3, "published")
    chain = torch.ones(7, 7, dtype=torch.float64).tril()
    odd = torch.linalg.matrix_power(chain, 3).remainder(2).bool()
    products = torch.stack([angles.cos()[:, row].prod(dim=1) for row in odd], 1)
    for w in (weights, torch.zeros_like(weights)):
        exact = qd.circuit_expectations(angles, w, qd.Settings("published"))
        assert torch.allclose(exact, products, atol=1e-12, rtol=0)


def test_trainable_circuit_has_gradients_and_float32_is_enough():
    angles, weights = circuit(16, 16, 3)
    settings = qd.Settings("quantum")
    values = qd.circuit_expectations(angles, weights, settings)
    gradient = torch.autograd.grad((values[:, :4] - 0.5).square().sum(), weights)[0]
    assert (gradient.abs().amax(dim=1) > 1e-4).all()  # in every layer, RZ and RY alike
    single = qd.circuit_expectations(angles.float(), weights.float(), settings)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), values, atol=2e-5, rtol=0)


def test_a_hundred_qubits_look_like_fewer_from_the_left():
    # <Z_i> depends on all qubits to the left, and on L - 1 to the right (by the CNOTs' back-action
    # on the control), so a chain cut after qubit 7 is right up to qubit 5 and wrong from qubit 6.
    angles, weights = circuit(2, 100, 3)
    wide = qd.circuit_expectations(angles, weights, qd.Settings("quantum"))
    narrow = qd.circuit_expectations(angles[:1, :8], weights[:, :8], qd.Settings("quantum"))
    assert wide.abs().max() <= 1 + 1e-12
    assert torch.allclose(wide[:1, :6], narrow[:, :6], atol=1e-12, rtol=0)
    assert (wide[:1, 6:8] - narrow[:, 6:]).abs().min() > 1e-6


@pytest.mark.parametrize("simulator", ["lightning.qubit", "reference.qubit"])
def test_a_pennylane_device_gives_the_same_layer(simulator):
    settings = [qd.Settings("quantum", n_qubits=4, simulator=s) for s in ("exact", simulator)]
    layers = [leave_zero(qd.UNet(1, how).gate).double() for how in settings]
    features = torch.randn(3, 128, dtype=torch.float64)
    gates = [layer(features) for layer in layers]
    for gate in gates:
        gate.square().sum().backward()
    assert torch.allclose(*gates, atol=1e-6)
    for a, b in zip(*(layer.parameters() for layer in layers), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)
    with torch.no_grad():  # the inference circuit, without a gradient method
        assert torch.allclose(layers[1](features), gates[0], atol=1e-6)


def test_self_check_catches_an_edited_circuit(monkeypatch, tmp_path, fails):
    for arm in qd.QUANTUM_ARMS:
        qd.check_simulation(qd.Settings(arm))
        qd.check_simulation(qd.Settings(arm, **NOISE))
        qd.check_simulation(qd.Settings(arm, readout_noise=0.1))
    original = qd.quantum_circuit

    def edited(*args):
        original(*args)
        qml.RX(0.1, wires=0)

    monkeypatch.setattr(qd, "quantum_circuit", edited)
    message = fails(qd, tiny(tmp_path / "runs", "--use_quantum"))
    assert "differs from quantum_circuit on default.mixed" in message
    assert not (tmp_path / "runs").exists()


def test_all_arms_start_as_the_same_model_with_equal_counts():
    outputs, counts = [], {}
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 700])
    for arm in qd.ARMS:
        unet = qd.UNet(1, qd.Settings(arm))
        counts[arm] = sum(p.numel() for p in unet.parameters() if p.requires_grad)
        torch.nn.init.constant_(unet.head.weight, 0.1)
        outputs.append(unet(x, t))
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    gate = {arm: count - counts["classical"] for arm, count in counts.items()}
    assert gate["matched"] == gate["quantum"] == gate["product"] == 16 * 129 + 128 * 17 + 2 * 3 * 16
    assert gate["quantum"] - gate["frozen"] == 2 * 3 * 16
    assert gate["quantum"] - gate["published"] == 3 * 16
    assert not torch.equal(qd.UNet(1, qd.Settings(seed=1)).stem.weight, unet.stem.weight)


@pytest.mark.parametrize("arm", ["matched", *qd.QUANTUM_ARMS])
def test_gate_trains_from_encoder_to_output(arm):
    unet = leave_zero(qd.UNet(1, qd.Settings(arm, n_qubits=6, n_layers=2)), 0.3)
    out = unet(torch.randn(4, 1, 28, 28), torch.tensor([0, 300, 600, 999]))
    (100 * out.square().mean()).backward()
    gate = {name: p.grad for name, p in unet.gate.named_parameters()}
    if arm == "frozen":
        assert gate["weights"] is None
    else:
        assert (gate["weights"].abs().max() > 1e-3) == (arm != "published")
        assert arm != "published" or gate["weights"].abs().max() < 1e-5
    for name in ("project_in.weight", "project_in.bias", "project_out.weight"):
        assert gate[name].abs().max() > 1e-3


def test_gate_multiplies_the_channels_by_hand():
    unet, seen = leave_zero(qd.UNet(1, qd.Settings("matched")), 0.3), {}
    unet.attention.register_forward_hook(lambda _, inputs, out: seen.update(features=out))
    unet.merge7.register_forward_pre_hook(lambda _, inputs: seen.update(merged=inputs[0]))
    unet.gate.register_forward_pre_hook(lambda _, inputs: seen.setdefault("in", inputs[0]))
    unet(torch.randn(2, 1, 28, 28), torch.tensor([3, 700]))
    gate = unet.gate(seen["features"].mean((2, 3)))[..., None, None]
    assert gate.abs().max() > 0.1 and seen["in"].requires_grad  # the encoder learns by it
    assert torch.allclose(seen["merged"][:, :128], seen["features"] * (1 + gate), atol=1e-5)


def test_matched_gate_by_hand():
    gate = qd.QuantumAttention(2, qd.Settings("matched", n_qubits=2, n_layers=2))
    with torch.no_grad():
        gate.weights.copy_(torch.tensor([[[1.0, 0.5], [2.0, 0.0]], [[3.0, 0.1], [1.0, 1.0]]]))
        gate.project_in.weight.copy_(torch.eye(2))
        gate.project_in.bias.zero_()
        gate.project_out.weight.copy_(torch.eye(2))
    first = math.cos(3 * math.cos(0.7 + 0.5) + 0.1)
    second = math.cos(math.cos(2 * -0.2) + 1)
    assert gate(torch.tensor([[0.7, -0.2]]))[0].tolist() == pytest.approx([first, second], abs=1e-6)
