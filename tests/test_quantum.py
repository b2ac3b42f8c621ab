"""The exact simulation, the circuit and the gates."""

import math

import pennylane as qml
import pytest
import torch

import quantum_diffusion_mnist as qd

ANSATZ = {"quantum": (True, 2), "published": (True, 1), "product": (False, 2)}


def draw(batch, n, layers, kinds, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n * 10 + layers)
    angles = 3 * torch.randn(batch, n, dtype=dtype, generator=generator)
    weights = 6 * torch.rand(layers, n, kinds, dtype=dtype, generator=generator)
    return angles.requires_grad_(), weights.requires_grad_()


def value_and_gradients(values, angles, weights):
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(values.shape, generator=generator).to(values)
    return values, *torch.autograd.grad((values * probe).sum(), (angles, weights))


@pytest.mark.parametrize("arm", ANSATZ)
@pytest.mark.parametrize("n, layers", [(1, 1), (2, 1), (1, 3), (3, 2), (6, 3), (4, 4)])
def test_exact_simulation_equals_pennylane(arm, n, layers):
    entangle, kinds = ANSATZ[arm]
    angles, weights = draw(3, n, layers, kinds)
    qnode = qd.make_qnode(n, layers, "default.qubit", entangle)
    theirs = value_and_gradients(torch.stack(qnode(angles, weights), -1), angles, weights)
    exact = qd.staircase_expectations(angles, weights, entangle)
    ours = value_and_gradients(exact, angles, weights)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-10


def test_gradients_by_finite_differences():
    angles, weights = draw(2, 3, 3, 2)
    assert torch.autograd.gradcheck(qd.staircase_expectations, (angles, weights))


def test_adjoint_on_lightning_gives_the_same_layer():
    layers = []
    for simulator in ("exact", "lightning.qubit"):
        torch.manual_seed(0)
        layer = qd.QuantumAttention(8, 4, 2, simulator=simulator)
        torch.nn.init.normal_(layer.project_out.weight)
        layers.append(layer)
    features = torch.randn(3, 8)
    gates = [layer(features) for layer in layers]
    assert torch.allclose(*gates, atol=1e-5)
    for gate in gates:
        gate.square().sum().backward()
    for a, b in zip(*(layer.parameters() for layer in layers), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)
    with torch.no_grad():  # the inference circuit, without a gradient method
        assert torch.allclose(layers[1](features), gates[0], atol=1e-5)


def test_published_circuit_does_not_depend_on_its_weights():
    angles, weights = draw(5, 16, 3, 1, torch.float32)
    values = qd.staircase_expectations(angles, weights)
    assert torch.equal(values, qd.staircase_expectations(angles, torch.zeros_like(weights)))
    assert torch.autograd.grad(values.square().sum(), weights)[0].eq(0).all()


def test_published_circuit_is_a_product_of_cosines():
    # Three CNOT chains on basis states: prefix sums modulo 2, three times. <Z_i> is the product of
    # cos(x_j) over the j that occur an odd number of times in bit i.
    angles, weights = draw(4, 7, 3, 1)
    chain = torch.ones(7, 7, dtype=torch.float64).tril()
    odd = torch.linalg.matrix_power(chain, 3).remainder(2).bool()
    products = [angles.cos()[:, row].prod(dim=1) for row in odd]
    exact = qd.staircase_expectations(angles, weights)
    assert torch.allclose(exact, torch.stack(products, 1), atol=1e-12, rtol=0)


def test_trainable_circuit_has_gradients():
    angles, weights = draw(16, 16, 3, 2, torch.float32)
    loss = (qd.staircase_expectations(angles, weights)[:, :4] - 0.5).square().sum()
    gradient = torch.autograd.grad(loss, weights)[0]
    assert (gradient.abs().amax(dim=1) > 1e-4).all()  # in every layer, RZ and RY alike


def test_batch_equals_loop_and_float32_equals_float64():
    angles, weights = draw(5, 9, 3, 2)
    together = qd.staircase_expectations(angles, weights)
    alone = torch.cat([qd.staircase_expectations(row[None], weights) for row in angles])
    assert torch.allclose(together, alone, atol=1e-14, rtol=0)
    single = qd.staircase_expectations(angles.float(), weights.float())
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), together, atol=2e-5, rtol=0)


def test_a_hundred_qubits_look_like_fewer_from_the_left():
    # <Z_i> depends on all qubits to the left, and on L - 1 to the right (by the CNOTs' back-action
    # on the control), so a chain cut after qubit 7 is right up to qubit 5 and wrong from qubit 6.
    angles, weights = draw(2, 100, 3, 2)
    wide = qd.staircase_expectations(angles, weights)
    narrow = qd.staircase_expectations(angles[:, :8], weights[:, :8])
    assert wide.abs().max() <= 1 + 1e-12
    assert torch.allclose(wide[:, :6], narrow[:, :6], atol=1e-12, rtol=0)
    assert (wide[:, 6:8] - narrow[:, 6:]).abs().min() > 1e-3


def test_self_check_catches_an_edited_circuit(tiny, monkeypatch, tmp_path, fails):
    for arm in qd.QUANTUM_ARMS:
        qd.check_simulation(arm)
    original = qd.quantum_circuit

    def edited(*args):
        original(*args)
        qml.RX(0.1, wires=0)

    monkeypatch.setattr(qd, "quantum_circuit", edited)
    message = fails(qd, tiny(tmp_path / "runs", "--use_quantum"))
    assert "--simulator default.qubit" in message
    assert not (tmp_path / "runs").exists()


def test_gates_have_equal_counts_and_ranges():
    counts = {}
    for arm in qd.ARMS:
        gate = qd.UNet(1, arm).gate
        counts[arm] = gate and sum(p.numel() for p in gate.parameters() if p.requires_grad)
    assert counts["classical"] is None
    assert counts["matched"] == counts["quantum"] == counts["product"]
    assert counts["quantum"] - counts["frozen"] == 2 * 3 * 16
    assert counts["quantum"] - counts["published"] == 3 * 16


@pytest.mark.parametrize("arm", ["matched", "quantum", "published", "product", "frozen"])
def test_gate_trains_from_encoder_to_output(arm):
    torch.manual_seed(0)
    unet = qd.UNet(1, arm, n_qubits=6, n_layers=2)
    torch.nn.init.normal_(unet.gate.project_out.weight, std=0.3)
    for layer in (unet.head, unet.encode14.conv2):  # leave the zero initialisation
        torch.nn.init.normal_(layer.weight, std=0.1)
    x, t = torch.randn(4, 1, 28, 28), torch.tensor([0, 300, 600, 999])
    (100 * unet(x, t).square().mean()).backward()
    named = dict(unet.named_parameters())
    for name in ("stem.weight", "gate.project_in.weight", "gate.project_out.weight"):
        assert named[name].grad.abs().max() > 1e-4, name
    weights = named["gate.weights"]
    if arm == "frozen":
        assert weights.grad is None
    elif arm == "published":
        assert weights.grad.eq(0).all()
    else:
        assert weights.grad.abs().max() > 1e-4


def test_matched_gate_by_hand():
    gate = qd.MatchedAttention(2, n_qubits=2, n_layers=2)
    with torch.no_grad():
        gate.weights.copy_(torch.tensor([[[1.0, 0.5], [2.0, 0.0]], [[3.0, 0.1], [1.0, 1.0]]]))
        gate.project_in.weight.copy_(torch.eye(2))
        gate.project_in.bias.zero_()
        gate.project_out.weight.copy_(torch.eye(2))
    first = math.cos(3 * math.cos(0.7 + 0.5) + 0.1)
    second = math.cos(math.cos(2 * -0.2) + 1)
    expected = torch.tensor([[first, second]])
    assert torch.allclose(gate(torch.tensor([[0.7, -0.2]])), expected, atol=1e-6)


def test_cached_transfer_matrices_follow_the_weights():
    layer = qd.QuantumAttention(4, 3, 2)
    angles = torch.randn(2, 3)
    for _ in range(2):
        with torch.no_grad():
            cached = layer.expectations(angles)
        assert torch.equal(cached, layer.expectations(angles).detach())
        with torch.no_grad():
            layer.weights.add_(0.3)
    state = {name: value + 1 for name, value in layer.state_dict().items()}
    layer.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(
            layer.expectations(angles), qd.staircase_expectations(angles, state["weights"])
        )
