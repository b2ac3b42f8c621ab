"""Shots, gate noise and readout noise, against PennyLane's own channels and measurements."""

import itertools
import math

import numpy as np
import pennylane as qml
import pytest
import torch
from conftest import circuit_inputs, only, tiny
from test_quantum import N_RANDOM, random_circuit

import quantum_diffusion_mnist as qd

NOISE = {"gate_noise": (0.07, 0.2), "readout_noise": 0.06}
NOISES = [
    pytest.param({}, id="ideal"),
    pytest.param(NOISE, id="noisy"),
    pytest.param({"gate_noise": (0.3, 0.75)}, id="depolarised"),
]
NAMES = ["quantum", "published", "product", "cz", "ising", "brickwork", "reupload"]


def streams(n, seed=0):
    """A generator for each of n samples."""
    return [qd.random_stream(seed, k) for k in range(n)]


# ----------------------------------------------------------------- joint measurements of all qubits


def mixed_probabilities(circuit, angles, weights):
    """All 2**n probabilities of the bit strings by PennyLane's density matrix, in complex128.

    angles: (n,). The readout's bit flips stand in the circuit.
    """

    @qml.qnode(qml.device("default.mixed", wires=len(angles)))
    def probabilities():
        circuit(angles.numpy(), weights.numpy())
        return qml.probs(wires=range(len(angles)))

    return probabilities()


def sampled_probabilities(circuit, angles, weights):
    """All 2**n probabilities with which ``sample_outcomes`` draws the bit strings.

    Qubit i reads 0 for uniform numbers up to the probability of 0, given the outcomes before: that
    number is found by bisection. angles: (n,).
    """
    n = len(angles)
    n_layers, _, n_weights = weights.shape
    chain = qd.compile_circuit(circuit, n, n_layers, n_weights, torch.float64)
    sites = qd.site_tensors(chain, angles[None], weights)

    # One shot for each prefix of outcomes; a uniform number of 0 surely reads 0, one of 1 reads 1.
    prefixes = [bits for i in range(n) for bits in itertools.product((0, 1), repeat=i)]
    place = torch.tensor([len(bits) for bits in prefixes])
    rows = torch.arange(len(prefixes))
    uniform = torch.zeros(1, len(prefixes), n, dtype=torch.float64)
    for row, bits in enumerate(prefixes):
        uniform[0, row, : len(bits)] = torch.tensor(bits)

    low = torch.zeros(len(prefixes), dtype=torch.float64)
    high = torch.ones(len(prefixes), dtype=torch.float64)
    for _ in range(40):
        middle = (low + high) / 2
        uniform[0, rows, place] = middle
        outcomes = qd.sample_outcomes(sites, uniform)[0]
        reads_zero = outcomes[rows, place] > 0
        low = torch.where(reads_zero, middle, low)
        high = torch.where(reads_zero, high, middle)
    odds_of_zero = dict(zip(prefixes, low.tolist(), strict=True))

    probabilities = []
    for bits in itertools.product((0, 1), repeat=n):
        factors = [abs(bits[i] - odds_of_zero[bits[:i]]) for i in range(n)]
        probabilities.append(math.prod(factors))
    return np.array(probabilities)


@pytest.mark.parametrize("n_qubits, n_layers", [(1, 2), (2, 3), (4, 2), (5, 1)])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", NAMES)
def test_joint_distribution_equals_default_mixed(name, noise, n_qubits, n_layers):
    arm = qd.ARMS[name]
    circuit = qd.with_noise(arm.circuit, **noise)
    inputs = circuit_inputs(1, n_qubits, n_layers, arm.n_weights)
    angles, weights = (values.detach() for values in inputs)
    ours = sampled_probabilities(circuit, angles[0], weights)
    theirs = mixed_probabilities(circuit, angles[0], weights)
    assert np.abs(ours - theirs).max() < 1e-10

    # And the means are those of this distribution.
    means = qd.circuit_expectations(angles, weights, circuit)[0]
    theirs = theirs.reshape([2] * n_qubits)
    for i in range(n_qubits):
        others = tuple(j for j in range(n_qubits) if j != i)
        zero, one = theirs.sum(axis=others)
        assert abs(zero - one - means[i]) < 1e-10


@pytest.mark.parametrize("seed", range(10))
def test_joint_distribution_of_random_chains_with_channels(seed):
    circuit = random_circuit(seed, has_channels=True)
    angles, weights = (values.detach() for values in circuit_inputs(1, N_RANDOM, 1))
    ours = sampled_probabilities(circuit, angles[0], weights)
    assert np.abs(ours - mixed_probabilities(circuit, angles[0], weights)).max() < 1e-10


@pytest.mark.parametrize("noise", NOISES[:2])
@pytest.mark.parametrize("name", ["quantum", "product", "brickwork"])
def test_the_shots_of_an_estimate_are_independent(name, noise):
    # So the variance falls as 1 / shots: every shot has errors and readout flips of its own.
    circuit = qd.with_noise(qd.ARMS[name].circuit, **noise)
    angles, weights = (values.detach() for values in circuit_inputs(1, 5, 3))
    estimates = qd.circuit_expectations(
        angles.expand(2000, 5), weights, circuit, shots=50, generators=streams(2000)
    )
    mean = qd.circuit_expectations(angles, weights, circuit)[0]
    variance = (1 - mean**2) / 50
    assert ((estimates.mean(0) - mean).abs() < 4.5 * (variance / 2000).sqrt()).all()
    assert ((estimates.var(0) / variance - 1).abs() < 4.5 * math.sqrt(2 / 2000)).all()


@pytest.mark.parametrize("noise", NOISES[:2])
@pytest.mark.parametrize("name", ["quantum", "product", "brickwork"])
def test_gradient_through_shots_is_that_of_the_exact_means(name, noise):
    circuit = qd.with_noise(qd.ARMS[name].circuit, **noise)
    inputs = circuit_inputs(4, 3, 2)
    measured = qd.circuit_expectations(*inputs, circuit, shots=64, generators=streams(4))
    exact = qd.circuit_expectations(*inputs, circuit)
    gradients = [torch.autograd.grad(values.sum(), inputs) for values in (measured, exact)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-13, rtol=0)

    grid = (measured + 1) * 64 / 2  # whole numbers of shots that read 0
    assert torch.allclose(grid, grid.round(), atol=1e-9)
    assert (measured - exact).abs().max() > 0.01


def test_a_sample_has_shots_of_its_own_and_every_call_new_ones():
    angles, weights = (values.detach() for values in circuit_inputs(1, 3, 1))
    generators = streams(3)
    draws = [
        qd.circuit_expectations(angles.expand(3, 3), weights, shots=100, generators=generators)
        for _ in range(2)
    ]
    assert len({tuple(values.tolist()) for values in torch.cat(draws)}) == 6

    alone = qd.circuit_expectations(angles, weights, shots=100, generators=[qd.random_stream(0, 2)])
    assert torch.allclose(draws[0][2], alone[0], atol=1e-9)


# --------------------------------------------------------------------------- PennyLane's devices


def device_gate(simulator, weights, shots):
    """A gate on a PennyLane device, with these weights of its circuit."""
    n_layers, n_qubits, _ = weights.shape
    gate = qd.QuantumGate(
        4, qd.quantum_circuit, n_qubits, n_layers, simulator=simulator, shots=shots
    )
    gate.weights = torch.nn.Parameter(weights.detach().clone())
    return gate


def test_shots_on_a_pennylane_device():
    angles, weights = circuit_inputs(2, 3, 1)
    exact = qd.circuit_expectations(angles, weights)
    gate = device_gate("default.qubit", weights, 4000)
    measured = gate.expectations(angles, streams(2))
    with torch.no_grad():
        inference = gate.expectations(angles, streams(2))

    for values in (measured, inference):
        error = (values - exact).abs()
        assert (error < 5 * ((1 - exact**2) / 4000).sqrt() + 1e-9).all()
        assert error.max() > 1e-4

    # The gradient is measured too, by parameter shifts.
    wanted = torch.autograd.grad(exact.sum(), (angles, weights))
    shifted = torch.autograd.grad(measured.sum(), (angles, gate.weights))
    for a, b in zip(shifted, wanted, strict=True):
        assert 0 < (a - b).abs().max() < 0.15


@pytest.mark.parametrize("simulator", ["default.qubit", "lightning.qubit", "default.mixed"])
def test_shots_of_a_device_follow_the_streams(simulator):
    angles, weights = (values.detach() for values in circuit_inputs(3, 3, 1))
    gate = device_gate(simulator, weights, 10)
    with torch.no_grad():
        together = gate.expectations(angles, streams(3))
        again = gate.expectations(angles, streams(3))
        other = gate.expectations(angles, streams(3, seed=1))
        alone = gate.expectations(angles[2:], streams(3)[2:])
    assert together.shape == (3, 3)
    assert torch.equal(together, again)
    assert torch.equal(together[2:], alone)
    assert not torch.equal(together, other)


def test_gradients_of_a_device_with_shots_follow_the_streams():
    angles, weights = circuit_inputs(2, 2, 1)
    gradients = []
    for seed in (0, 0, 1):
        gate = device_gate("lightning.qubit", weights, 10)
        values = gate.expectations(angles, streams(2, seed))
        gradients.append(torch.autograd.grad(values.sum(), (angles, gate.weights)))
    same, again, other = (torch.cat([g.flatten() for g in parts]) for parts in gradients)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def on_lightning(save_dir, *more):
    """The command line of a tiny run whose circuit is measured by lightning.qubit."""
    sizes = ["--n_qubits", "2", "--n_layers", "1", "--steps", "3", "--batch_size", "2"]
    sampling = ["--timesteps", "3", "--n_frames", "1", "--n_samples", "1", "--n_eval", "3"]
    device = ["--use_quantum", "--simulator", "lightning.qubit", "--shots", "5"]
    return tiny(save_dir, *sizes, *sampling, *device, *more)


@pytest.mark.usefixtures("quick_loss_curve")
def test_a_run_on_a_device_with_shots_resumes_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(qd, "CHECKPOINT_STEPS", 1)
    qd.main(on_lightning(tmp_path / "whole"))
    whole = only(tmp_path / "whole")

    # Killed after the checkpoint of step 2.
    save = qd.save_checkpoint

    def save_and_die(folder, run_hash, state, losses):
        save(folder, run_hash, state, losses)
        if len(losses) == 2:
            raise SystemError("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(qd, "save_checkpoint", save_and_die)
        qd.main(on_lightning(tmp_path / "cut"))
    qd.main(on_lightning(tmp_path / "cut"))
    cut = only(tmp_path / "cut")
    for name in ("loss.csv", "model.pt"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert torch.equal(
        qd.load_grid(cut / "samples_final.png"), qd.load_grid(whole / "samples_final.png")
    )


@pytest.mark.usefixtures("quick_loss_curve")
def test_images_on_a_device_with_shots_do_not_depend_on_their_company(tmp_path):
    qd.main(on_lightning(tmp_path / "at_once", "--n_eval", "18"))
    qd.main(on_lightning(tmp_path / "in_parts", "--n_eval", "2"))
    qd.main(on_lightning(tmp_path / "in_parts", "--n_eval", "18"))
    at_once, in_parts = (
        qd.load_grid(only(tmp_path / name) / "samples_final.png")
        for name in ("at_once", "in_parts")
    )
    assert len(at_once) == 18
    assert torch.equal(at_once, in_parts)
