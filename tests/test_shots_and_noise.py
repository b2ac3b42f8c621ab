"""Shots, gate noise and readout noise, against PennyLane's own channels and measurements."""

import itertools
import math

import numpy as np
import pennylane as qml
import pytest
import torch
from scipy.stats import chisquare

import quantum_diffusion_mnist as qd

ANSATZ = {"quantum": (True, 2), "published": (True, 1), "product": (False, 2)}
NOISE = [(0.05, 0.0), (0.0, 0.1), (0.07, 0.2)]


def draw(batch, n, layers, kinds=2):
    generator = torch.Generator().manual_seed(10 * n + layers)
    angles = 2 * torch.randn(batch, n, dtype=torch.float64, generator=generator)
    return angles, 6 * torch.rand(layers, n, kinds, dtype=torch.float64, generator=generator)


def layer_of(weights, seed=0, **conditions):
    layer = qd.QuantumAttention(4, weights.shape[1], weights.shape[0], **conditions).double()
    layer.weights.data = weights.clone()
    layer.generator = torch.Generator().manual_seed(seed)
    return layer


def mixed_probabilities(angles, weights, entangle=True, noise=None, readout=0.0):
    """All 2**n probabilities of the bit strings, from PennyLane's density matrix."""
    n = len(angles)

    @qml.qnode(qml.device("default.mixed", wires=n))
    def probabilities():
        qd.quantum_circuit(angles.numpy(), weights.numpy(), entangle, noise)
        for i in range(n if readout else 0):
            qml.BitFlip(readout, wires=i)
        return qml.probs(wires=range(n))

    return probabilities()


def flipped(probabilities, flips):
    """The distribution after a flip of bit i with probability flips[i]."""
    p = np.reshape(probabilities, [2] * len(flips))
    for i, f in enumerate(flips):
        p = (1 - f) * p + f * np.flip(p, i)
    return p.flatten()


def chain_of_probabilities(angles, weights, noise):
    """p(z_0 .. z_i) for every i, by the sampler's chain, E <- T_i(x_i) E and then E[b] <- 0 where
    b_L is not z_i. Entry i has 2**(i + 1) probabilities. angles: (n,)."""
    transfer = qd.transfer_matrices(weights, noise)
    _, right = qd.environments(angles[None], transfer)
    inputs = torch.stack([torch.ones_like(angles), angles.cos(), angles.sin()], -1)
    left, found = torch.zeros(1, transfer.shape[-1], dtype=angles.dtype), []
    left[0, 0] = 1
    for i, site in enumerate(torch.einsum("nk,nkdc->ndc", inputs, transfer)):
        pairs = (left @ site.T).unflatten(-1, (-1, 2))
        split = torch.stack([pairs * keep for keep in torch.eye(2, dtype=angles.dtype)], 1)
        left = split.flatten(0, 1).flatten(1)
        found.append(left @ right[i, 0])
    return found


def chi_square(outcomes, probabilities):
    """p-value of the outcomes (..., n), 1 or -1; cells that expect below five are pooled."""
    n = outcomes.shape[-1]
    codes = (outcomes.reshape(-1, n) < 0).long() @ (2 ** torch.arange(n - 1, -1, -1))
    counts = torch.bincount(codes, minlength=2**n).numpy()
    expected = probabilities / probabilities.sum() * counts.sum()
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
        if expected[-1] < 1e-6:
            assert counts[-1] == 0
            counts, expected = counts[:-1], expected[:-1]
    return chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


# ---------------------------------------------------------------------------- the exact mean


@pytest.mark.parametrize("arm", ANSATZ)
@pytest.mark.parametrize("noise", [*NOISE, (1.0, 1.0)])
def test_exact_mean_over_noise_equals_default_mixed(arm, noise):
    entangle, kinds = ANSATZ[arm]
    for n, layers in [(1, 2), (3, 1), (5, 3)]:
        angles, weights = draw(2, n, layers, kinds)
        qnode = qd.make_qnode(n, layers, "default.mixed", entangle, None, gate_noise=noise)
        ours = qd.staircase_expectations(angles, weights, entangle, noise)
        assert torch.allclose(ours, torch.stack(qnode(angles, weights), -1), atol=1e-10, rtol=0)


def test_gradient_of_the_noisy_mean_equals_parameter_shift():
    angles, weights = draw(1, 3, 2)
    angles, weights = angles[0].requires_grad_(), weights.requires_grad_()
    noise = (0.07, 0.2)
    qnode = qd.make_qnode(3, 2, "default.mixed", True, "parameter-shift", gate_noise=noise)
    probe = torch.tensor([1.0, -0.3, 0.6], dtype=torch.float64)
    theirs = torch.autograd.grad(torch.stack(qnode(angles, weights)) @ probe, (angles, weights))
    exact = qd.staircase_expectations(angles[None], weights, True, noise)[0]
    for a, b in zip(torch.autograd.grad(exact @ probe, (angles, weights)), theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("arm", ANSATZ)
def test_three_quarters_depolarise_fully(arm):
    # PennyLane's channel shrinks the Bloch vector by 1 - 4 p / 3.
    entangle, kinds = ANSATZ[arm]
    angles, weights = draw(3, 4, 2, kinds)
    assert qd.staircase_expectations(angles, weights, entangle, (0.75, 0.0)).abs().max() < 1e-15


def test_readout_noise_scales_exactly():
    angles, weights = draw(3, 4, 2)
    clean, noisy = (layer_of(weights, readout_noise=q) for q in (0.0, 0.1))
    assert torch.equal(noisy.expectations(angles), clean.expectations(angles) * (1 - 2 * 0.1))


# -------------------------------------------------------------------- the joint distribution


@pytest.mark.parametrize("noise", [None, *NOISE, (0.3, 0.75)])
@pytest.mark.parametrize("kinds", [1, 2])
@pytest.mark.parametrize("n, layers", [(2, 1), (2, 3), (3, 2), (4, 3), (5, 1), (5, 2)])
def test_joint_distribution_equals_default_mixed(n, layers, kinds, noise):
    (angles,), weights = draw(1, n, layers, kinds)
    chain, readout, p2 = chain_of_probabilities(angles, weights, noise), 0.06, (noise or (0, 0))[1]
    # The last CNOT's error on its control stands behind all sites: X and Y, 2 p2 / 3, flip the bit.
    control = [2 * p2 / 3] * (n - 1) + [0]
    flips = [f * (1 - readout) + (1 - f) * readout for f in control]
    theirs = mixed_probabilities(angles, weights, noise=noise, readout=readout)
    assert np.abs(flipped(chain[-1].numpy(), flips) - theirs).max() < 1e-12
    factors = qd.noise_factors(n, layers, True, noise, readout)
    assert np.abs((1 - factors.numpy()) / 2 - flips).max() < 1e-15
    for shorter, longer in itertools.pairwise(chain):  # what is right of a bond is summed over
        assert torch.allclose(shorter, longer.view(-1, 2).sum(1), atol=1e-14, rtol=0)

    # The sampler goes either way when its number is just on either side of p(z_i | z_0 .. z_i-1).
    bits = torch.tensor(list(itertools.product((0, 1), repeat=n)))
    uniform = torch.zeros(1, 2**n, n, dtype=torch.float64)
    before, code = torch.ones(1, dtype=torch.float64), torch.zeros(2**n, dtype=torch.long)
    for i in range(n):
        zero = chain[i][2 * code] / before[code]
        uniform[0, :, i] = zero + (2 * bits[:, i] - 1) * 1e-9
        before, code = chain[i], 2 * code + bits[:, i]
    reachable = ((uniform > 0) & (uniform < 1)).all(-1)[0]
    assert reachable.all() or kinds == 1
    outcomes = qd.sample_outcomes(angles[None], qd.transfer_matrices(weights, noise), uniform)
    assert torch.equal(outcomes[0][reachable], (1 - 2 * bits[reachable]).double())


@pytest.mark.parametrize("noise", [None, *NOISE])
@pytest.mark.parametrize("n, layers", [(2, 1), (3, 3), (5, 2)])
def test_without_cnots_the_qubits_are_independent_coins(n, layers, noise):
    (angles,), weights = draw(1, n, layers)
    layer = layer_of(weights, arm="product", gate_noise=noise, readout_noise=0.06)
    with torch.no_grad():
        coins = torch.stack([1 + (m := layer.expectations(angles[None])[0]), 1 - m], -1) / 2
    ours = coins[0]
    for coin in coins[1:]:
        ours = torch.outer(ours, coin).flatten()
    theirs = mixed_probabilities(angles, weights, False, noise, 0.06)
    assert np.abs(ours.numpy() - theirs).max() < 1e-12


@pytest.mark.parametrize("conditions", [{}, {"gate_noise": (0.05, 0.1), "readout_noise": 0.08}])
@pytest.mark.parametrize("arm", ANSATZ)
def test_single_shots_have_default_mixeds_probabilities(arm, conditions):
    entangle, kinds = ANSATZ[arm]
    for n in (2, 4):
        (angles,), weights = draw(1, n, 2, kinds)
        layer = layer_of(weights, 5, arm=arm, shots=1, **conditions)
        with torch.no_grad():
            outcomes = layer.expectations(angles.expand(20_000, n))
        assert torch.allclose(outcomes.abs(), torch.ones_like(outcomes), atol=1e-12, rtol=0)
        theirs = mixed_probabilities(angles, weights, entangle, *conditions.values())
        assert chi_square(outcomes.round(), theirs) > 1e-3


@pytest.mark.parametrize("arm", ["quantum", "product"])
@pytest.mark.parametrize("conditions", [{}, {"gate_noise": (0.05, 0.1), "readout_noise": 0.08}])
def test_the_shots_of_an_estimate_are_independent(arm, conditions):
    # So the variance falls as 1 / shots: every shot has errors and readout flips of its own.
    angles, weights = draw(1, 5, 3)
    layer, exact = (layer_of(weights, arm=arm, shots=s, **conditions) for s in (50, None))
    with torch.no_grad():
        estimates = layer.expectations(angles.expand(2000, 5))
        mean = exact.expectations(angles)[0]
    variance = (1 - mean**2) / 50
    assert ((estimates.mean(0) - mean).abs() < 4.5 * (variance / 2000).sqrt()).all()
    assert ((estimates.var(0) / variance - 1).abs() < 4.5 * math.sqrt(2 / 2000)).all()


# ------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize(
    "conditions",
    [{"shots": 7}, {"shots": 6, "gate_noise": (0.1, 0.1)}, {"shots": 6, "readout_noise": 0.1}],
)
@pytest.mark.parametrize("arm", ["quantum", "product"])
def test_gradient_through_shots_is_that_of_the_exact_values(arm, conditions):
    angles, weights = draw(4, 3, 2)
    gradients, values = [], []
    for shots in (conditions["shots"], None):
        layer = layer_of(weights, 3, arm=arm, **conditions | {"shots": shots})
        x = angles.clone().requires_grad_()
        values.append(layer.expectations(x))
        gradients.append(torch.autograd.grad(values[-1].sum(), (x, layer.weights)))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-13, rtol=0)
    grid = (values[0] + 1) * conditions["shots"] / 2  # whole numbers of shots that read 0
    assert torch.allclose(grid, grid.round(), atol=1e-9)
    assert (values[0] - values[1]).abs().max() > 0.01


def test_shots_keep_no_graph():
    angles, weights = draw(2, 3, 1)
    layer = layer_of(weights, gate_noise=(0.1, 0.1), shots=50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        layer.expectations(angles)
    assert sum(kept) < 5000  # one sweep; fifty would keep fifty times as much


def test_a_hundred_qubits_can_be_measured():
    angles, weights = (values.float() for values in draw(2, 128, 3))
    layer = layer_of(weights, shots=2000).float()
    with torch.no_grad():
        estimate = layer.expectations(angles)
    exact = qd.staircase_expectations(angles, weights)
    errors = (estimate - exact) / ((1 - exact**2) / 2000).sqrt()
    assert errors.isfinite().all() and errors.abs().max() < 5 and 0.8 < errors.std() < 1.2


def test_shots_on_a_pennylane_device():
    angles, weights = draw(2, 3, 1)
    exact = qd.staircase_expectations(angles, weights)
    how = {"simulator": "default.qubit", "simulator_options": {"seed": 1}, "shots": 4000}
    layer = layer_of(weights, **how)
    x = angles.clone().requires_grad_()
    values = layer.expectations(x)
    assert ((values - exact).abs() < 5 * ((1 - exact**2) / 4000).sqrt() + 1e-9).all()
    assert (values - exact).abs().max() > 1e-4
    gradient = torch.autograd.grad(values.sum(), (x, layer.weights))  # parameter shifts, measured
    y, w = angles.clone().requires_grad_(), weights.clone().requires_grad_()
    wanted = torch.autograd.grad(qd.staircase_expectations(y, w).sum(), (y, w))
    for a, b in zip(gradient, wanted, strict=True):
        assert (a - b).abs().max() < 0.15 and (a - b).abs().max() > 0
    with torch.no_grad():  # the inference circuit measures too
        assert (layer.expectations(angles) - exact).abs().max() > 1e-4


@pytest.mark.parametrize("simulator", ["default.qubit", "lightning.qubit", "default.mixed"])
def test_a_batch_of_one_keeps_its_shape(simulator):
    angles, weights = draw(1, 3, 1)
    layer = layer_of(weights, simulator=simulator, shots=10)
    with torch.no_grad():
        assert layer.expectations(angles).shape == (1, 3)
    assert layer.expectations(angles).shape == (1, 3)


def test_a_device_without_batches_or_backpropagation():
    angles, weights = (values.requires_grad_() for values in draw(2, 2, 1))
    layer = layer_of(weights.detach(), simulator="reference.qubit")
    values = layer.expectations(angles)
    exact = qd.staircase_expectations(angles, weights)
    assert torch.allclose(values, exact, atol=1e-6)
    ours = torch.autograd.grad(values.sum(), (angles, layer.weights))
    theirs = torch.autograd.grad(exact.sum(), (angles, weights))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))
