"""Shots, gate noise and readout noise, against PennyLane's own channels and measurements."""

import itertools
import math

import numpy as np
import pennylane as qml
import pytest
import torch
from conftest import circuit

import quantum_diffusion_mnist as qd

NOISE = {"gate_noise": (0.07, 0.2), "readout_noise": 0.06}


def values_of(angles, weights, seed=0, arm="quantum", **conditions):
    """``circuit_expectations`` with a stream of shots for each sample."""
    streams = [qd.random_stream(seed, k) for k in range(len(angles))]
    return qd.circuit_expectations(angles, weights, qd.Settings(arm, **conditions), streams)


def mixed_probabilities(angles, weights, settings):
    """All 2**n probabilities of the bit strings, from PennyLane's density matrix (complex128)."""

    @qml.qnode(qml.device("default.mixed", wires=len(angles)))
    def probabilities():
        qd.quantum_circuit(angles.detach().numpy(), weights.detach().numpy(), settings)
        return qml.probs(wires=range(len(angles)))

    return probabilities()


def sampled_probabilities(angles, weights, settings):
    """All probabilities with which ``sample_outcomes`` draws: the number up to which it takes
    qubit i for 0, after each outcome of those before, found by bisection. angles: (n,)."""
    transfer, n = qd.transfer_matrices(weights, settings), len(angles)
    prefixes = [bits for i in range(n) for bits in itertools.product((0, 1), repeat=i)]
    place = torch.tensor([len(bits) for bits in prefixes])
    uniform = torch.zeros(1, len(prefixes), n, dtype=torch.float64)
    for row, bits in enumerate(prefixes):
        uniform[0, row, : len(bits)] = torch.tensor(bits)  # surely under, surely over it
    low, high = torch.zeros(2, len(prefixes), dtype=torch.float64)
    high += 1
    for _ in range(40):
        uniform[0, torch.arange(len(place)), place] = middle = (low + high) / 2
        outcomes = qd.sample_outcomes(angles[None], transfer, uniform)[0]
        zero = outcomes.gather(1, place[:, None])[:, 0] > 0
        low, high = torch.where(zero, middle, low), torch.where(zero, high, middle)
    odds = dict(zip(prefixes, low.tolist(), strict=True))
    codes = itertools.product((0, 1), repeat=n)
    return np.array([math.prod(abs(z[i] - odds[z[:i]]) for i in range(n)) for z in codes])


@pytest.mark.parametrize("noise", [{}, NOISE, {"gate_noise": (0.3, 0.75)}], ids=str)
@pytest.mark.parametrize("arm", ["quantum", "published", "product"])
def test_joint_distribution_equals_default_mixed(arm, noise):
    settings = qd.Settings(arm, **noise)
    sizes = itertools.product((2, 3, 4, 5), (1, 2, 3)) if noise is NOISE else [(2, 3), (4, 2)]
    for n, layers in sizes:
        with torch.no_grad():
            angles, weights = circuit(1, n, layers, arm)
            theirs = mixed_probabilities(angles[0], weights, settings).reshape([2] * n)
            ours = sampled_probabilities(angles[0], weights, settings)
            mean = qd.circuit_expectations(angles, weights, settings)[0]
        # The last CNOT's error on its control stands behind all: X and Y, 2 p2 / 3, flip the bit.
        control = 0 if arm == "product" else 2 * settings.gate_noise[1] / 3
        q = settings.readout_noise
        ours = ours.reshape([2] * n)
        for i, f in enumerate([control] * (n - 1) + [0]):
            f = f * (1 - q) + (1 - f) * q
            ours = (1 - f) * ours + f * np.flip(ours, i)
        assert np.abs(ours - theirs).max() < 1e-10, (n, layers)
        for i in range(n):
            zero, one = theirs.sum(axis=tuple({*range(n)} - {i}))
            assert abs(zero - one - mean[i]) < 1e-10, (n, layers)


@pytest.mark.parametrize("noise", [{}, NOISE], ids=["ideal", "noisy"])
@pytest.mark.parametrize("arm", ["quantum", "product"])
def test_the_shots_of_an_estimate_are_independent(arm, noise):
    # So the variance falls as 1 / shots: every shot has errors and readout flips of its own.
    angles, weights = circuit(1, 5, 3, arm)
    with torch.no_grad():
        estimates = values_of(angles.expand(2000, 5), weights, arm=arm, shots=50, **noise)
        mean = values_of(angles, weights, arm=arm, **noise)[0]
    variance = (1 - mean**2) / 50
    assert ((estimates.mean(0) - mean).abs() < 4.5 * (variance / 2000).sqrt()).all()
    assert ((estimates.var(0) / variance - 1).abs() < 4.5 * math.sqrt(2 / 2000)).all()


@pytest.mark.parametrize("noise", [{}, NOISE], ids=["ideal", "noisy"])
@pytest.mark.parametrize("arm", ["quantum", "product"])
def test_gradient_through_shots_is_that_of_the_exact_values(arm, noise):
    gradients, values = [], []
    for shots in (64, None):
        inputs = circuit(4, 3, 2, arm)
        values.append(values_of(*inputs, arm=arm, shots=shots, **noise))
        gradients.append(torch.autograd.grad(values[-1].sum(), inputs))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-13, rtol=0)
    grid = (values[0] + 1) * 64 / 2  # whole numbers of shots that read 0
    assert torch.allclose(grid, grid.round(), atol=1e-9)
    assert (values[0] - values[1]).abs().max() > 0.01


def test_a_sample_has_shots_of_its_own_and_every_call_new_ones():
    angles, weights = (values.detach() for values in circuit(1, 3, 1))
    settings = qd.Settings("quantum", shots=100)
    streams = [qd.random_stream(0, k) for k in range(3)]
    rows = angles.expand(3, 3), weights, settings
    draws = [qd.circuit_expectations(*rows, streams) for _ in range(2)]
    assert len({tuple(values.tolist()) for values in torch.cat(draws)}) == 6
    alone = qd.circuit_expectations(angles, weights, settings, [qd.random_stream(0, 2)])
    assert torch.allclose(draws[0][2], alone[0], atol=1e-9)


def measured(angles, weights, simulator, shots, **settings):
    """By the layer on a PennyLane device. Returns the values, with and without gradients."""
    settings |= {"simulator": simulator, "n_qubits": weights.shape[1], "shots": shots}
    layer = qd.QuantumAttention(4, qd.Settings("quantum", n_layers=len(weights), **settings))
    layer.weights = torch.nn.Parameter(weights)
    with torch.no_grad():
        inference = layer.expectations(angles)
    return layer.expectations(angles), inference, layer.weights


def test_shots_on_a_pennylane_device():
    inputs = circuit(2, 3, 1)
    exact = values_of(*inputs)
    *both, weights = measured(*inputs, "default.qubit", 4000, simulator_options={"seed": 1})
    for values in both:
        assert ((values - exact).abs() < 5 * ((1 - exact**2) / 4000).sqrt() + 1e-9).all()
        assert (values - exact).abs().max() > 1e-4
    wanted = torch.autograd.grad(exact.sum(), inputs)
    shifted = torch.autograd.grad(both[0].sum(), (inputs[0], weights))  # by parameter shifts
    for a, b in zip(shifted, wanted, strict=True):
        assert (a - b).abs().max() < 0.15 and (a - b).abs().max() > 0
    for simulator in ("default.qubit", "lightning.qubit", "default.mixed"):
        values, inference, _ = measured(*circuit(1, 3, 1), simulator, 10)
        assert values.shape == inference.shape == (1, 3)  # some devices drop a batch of one
