"""Shots, gate noise and readout noise, against PennyLane's own channels and measurements."""

import itertools
import json
import math

import numpy as np
import pennylane as qml
import pytest
import torch
from scipy.stats import chisquare

PAULIS = (None, qml.PauliX, qml.PauliY, qml.PauliZ)
ANSATZ = {"quantum": (True, 2), "published": (True, 1), "product": (False, 2)}
NOISE = [(0.05, 0.0), (0.0, 0.1), (0.07, 0.2)]


def draw(batch, n, layers, kinds=2):
    generator = torch.Generator().manual_seed(10 * n + layers)
    angles = 2 * torch.randn(batch, n, dtype=torch.float64, generator=generator)
    return angles, 6 * torch.rand(layers, n, kinds, dtype=torch.float64, generator=generator)


def circuit_with_errors(angles, weights, errors, entangle=True):
    """The circuit, written once more by hand, with Pauli errors[i, position] (0 is none) in it."""
    layers, n, kinds = weights.shape

    def error(i, position):
        if errors[i, position]:
            PAULIS[errors[i, position]](wires=i)

    for i in range(n):
        qml.RY(angles[i], wires=i)
        error(i, 0)
    for layer in range(layers):
        first = 1 + 4 * layer
        for i in range(n):
            qml.RZ(weights[layer, i, 0], wires=i)
            error(i, first)
            if kinds == 2:
                qml.RY(weights[layer, i, 1], wires=i)
                error(i, first + 1)
        for i in range(n - 1 if entangle else 0):
            qml.CNOT(wires=[i, i + 1])
            error(i, first + 3)
            error(i + 1, first + 2)


def bits_of(errors):
    errors = torch.as_tensor(errors)
    return (errors == 1) | (errors == 2), (errors == 2) | (errors == 3)


def trajectory_values(script, angles, weights, errors, entangle=True):
    x, z = bits_of(errors)
    if not entangle:
        return script.product_expectations(angles, weights, script.bloch_signs(x, z))
    angles, paulis = script.insert_paulis(angles, x, z)
    left, right = script.environments(angles, script.transfer_matrices(weights), paulis)
    return script.contract(left, right) * paulis.output


def layer_of(script, weights, **conditions):
    layer = script.QuantumAttention(4, weights.shape[1], weights.shape[0], **conditions).double()
    layer.weights.data = weights.clone()
    return layer


def chi_square(counts, probabilities):
    """p-value of counts against probabilities; cells that expect below five are pooled."""
    expected = probabilities / probabilities.sum() * counts.sum()
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
        if expected[-1] < 1e-6:
            assert counts[-1] == 0
            counts, expected = counts[:-1], expected[:-1]
    return chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


def counted(outcomes):
    """How often each bit string occurs. outcomes (..., n), 1 or -1."""
    n = outcomes.shape[-1]
    codes = (outcomes.reshape(-1, n) < 0).long() @ (2 ** torch.arange(n - 1, -1, -1))
    return torch.bincount(codes, minlength=2**n).numpy()


# ---------------------------------------------------------------------------------- gate noise


@pytest.mark.parametrize("arm", ANSATZ)
@pytest.mark.parametrize("n, layers", [(1, 1), (2, 1), (3, 3), (4, 2)])
def test_every_pauli_at_every_gate_equals_pennylane(script, arm, n, layers):
    entangle, kinds = ANSATZ[arm]
    angles, weights = draw(1, n, layers, kinds)
    probabilities = script.error_probabilities(weights, (0.5, 0.5), entangle)
    generator = torch.Generator().manual_seed(0)
    errors = [torch.randint(4, (n, 1 + 4 * layers), generator=generator) for _ in range(10)]
    errors = [some * (probabilities > 0) for some in errors]  # many together, and one alone:
    for i, position in torch.nonzero(probabilities).tolist():
        for pauli in (1, 2, 3):
            errors.append(torch.zeros(n, 1 + 4 * layers, dtype=torch.long))
            errors[-1][i, position] = pauli

    @qml.qnode(qml.device("default.qubit", wires=n))
    def reference(some):
        circuit_with_errors(angles[0], weights, some, entangle)
        return [qml.expval(qml.PauliZ(i)) for i in range(n)]

    theirs = torch.stack([torch.stack(reference(some)) for some in errors])
    errors = torch.stack(errors)
    ours = trajectory_values(script, angles.expand(len(errors), n), weights, errors, entangle)
    assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("arm", ANSATZ)
def test_errors_stand_where_default_mixed_has_its_channels(script, arm):
    # The number of channels of each probability, gate by gate, in PennyLane's own tape.
    entangle, kinds = ANSATZ[arm]
    n, layers = 4, 3
    angles, weights = draw(1, n, layers, kinds)
    with qml.queuing.AnnotatedQueue() as queue:
        script.quantum_circuit(angles[0], weights, entangle, (0.25, 0.5))
    tape = qml.tape.QuantumScript.from_queue(queue)
    channels = [op for op in tape.operations if isinstance(op, qml.DepolarizingChannel)]
    table = script.error_probabilities(weights, (0.25, 0.5), entangle)
    for i in range(n):
        theirs = sorted(op.parameters[0] for op in channels if op.wires[0] == i)
        assert sorted(p for p in table[i].tolist() if p) == theirs


@pytest.mark.parametrize("arm", ANSATZ)
@pytest.mark.parametrize("noise", [*NOISE, (1.0, 1.0)])
def test_exact_mean_over_noise_equals_default_mixed(script, arm, noise):
    entangle, kinds = ANSATZ[arm]
    for n, layers in [(1, 2), (3, 1), (5, 3)]:
        angles, weights = draw(2, n, layers, kinds)
        qnode = script.make_qnode(n, layers, "default.mixed", entangle, None, gate_noise=noise)
        ours = script.staircase_expectations(angles, weights, entangle, noise)
        assert torch.allclose(ours, torch.stack(qnode(angles, weights), -1), atol=1e-10, rtol=0)


def test_gradient_of_the_noisy_mean_equals_parameter_shift(script):
    angles, weights = draw(1, 3, 2)
    angles, weights = angles[0].requires_grad_(), weights.requires_grad_()
    noise = (0.07, 0.2)
    qnode = script.make_qnode(3, 2, "default.mixed", True, "parameter-shift", gate_noise=noise)
    probe = torch.tensor([1.0, -0.3, 0.6], dtype=torch.float64)
    theirs = torch.autograd.grad(torch.stack(qnode(angles, weights)) @ probe, (angles, weights))
    exact = script.staircase_expectations(angles[None], weights, True, noise)[0]
    for a, b in zip(torch.autograd.grad(exact @ probe, (angles, weights)), theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("arm", ANSATZ)
def test_three_quarters_depolarise_fully(script, arm):
    # PennyLane's channel shrinks the Bloch vector by 1 - 4 p / 3.
    entangle, kinds = ANSATZ[arm]
    angles, weights = draw(3, 4, 2, kinds)
    assert script.staircase_expectations(angles, weights, entangle, (0.75, 0.0)).abs().max() < 1e-15
    layer = layer_of(script, weights, arm=arm, gate_noise=(0.75, 0.0), trajectories=4000)
    layer.generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        assert layer.expectations(angles).abs().max() < 4.5 / math.sqrt(4000)


@pytest.mark.parametrize("arm", ANSATZ)
@pytest.mark.parametrize("noise", NOISE)
def test_mean_over_trajectories_is_within_its_standard_error(script, arm, noise):
    entangle, kinds = ANSATZ[arm]
    angles, weights = draw(1, 5, 3, kinds)
    qnode = script.make_qnode(5, 3, "default.mixed", entangle, None, gate_noise=noise)
    theirs = torch.stack(qnode(angles, weights), -1)[0]
    layer = layer_of(script, weights, arm=arm, gate_noise=noise)
    layer.generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        each = layer.expectations(angles.expand(4000, 5))
    error = each.std(0) / math.sqrt(4000)
    assert ((each.mean(0) - theirs).abs() < 4.5 * error + 1e-12).all()
    assert (error > 1e-3).any() or (arm == "product" and noise[0] == 0)  # they do differ


def test_trajectories_are_averaged_sample_by_sample(script):
    angles, weights = draw(3, 4, 2)
    layer = layer_of(script, weights, gate_noise=(0.1, 0.1), trajectories=5)
    single = layer_of(script, weights, gate_noise=(0.1, 0.1))
    for one in (layer, single):
        one.generator = torch.Generator().manual_seed(2)
    each = single.expectations(angles.repeat_interleave(5, 0)).view(3, 5, 4)
    assert torch.allclose(layer.expectations(angles), each.mean(1), atol=1e-14, rtol=0)
    assert (each.std(1) > 0.01).any()


def test_paulis_are_drawn_with_a_third_of_the_probability_each(script):
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    x, z = script.draw_paulis(torch.tensor(0.3), uniform)
    counts = [int((a & b).sum()) for a, b in itertools.product((x, ~x), (z, ~z))]  # Y, X, Z, none
    assert chi_square(np.array(counts), np.array([0.1, 0.1, 0.1, 0.7])) > 1e-3
    for p, share in ((0.0, 0), (1.0, 1)):
        x, z = script.draw_paulis(torch.tensor(p), uniform)
        assert (x | z).float().mean() == share


# ---------------------------------------------------------------------------------------- shots


def outcomes_of(script, angles, weights, shots, errors=None, seed=0):
    uniform = torch.rand(
        len(angles),
        shots,
        angles.shape[1],
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )
    paulis = None
    if errors is not None:
        angles, paulis = script.insert_paulis(angles, *bits_of(errors))
    _, right = script.environments(angles, script.transfer_matrices(weights), paulis)
    return script.sample_outcomes(angles, script.site_matrices(weights), right, uniform, paulis)


@pytest.mark.parametrize(
    "n, layers, kinds", [(1, 1, 2), (2, 1, 2), (3, 3, 2), (4, 3, 1), (6, 2, 2)]
)
@pytest.mark.parametrize("noisy", [False, True])
def test_bit_strings_have_pennylanes_probabilities(script, n, layers, kinds, noisy):
    angles, weights = draw(2, n, layers, kinds)
    errors = torch.zeros(2, n, 1 + 4 * layers, dtype=torch.long)
    if noisy:
        generator = torch.Generator().manual_seed(n)
        errors = torch.randint(4, errors.shape, generator=generator)
        errors *= script.error_probabilities(weights, (0.5, 0.5)) > 0
    outcomes = outcomes_of(script, angles, weights, 40_000, errors if noisy else None)
    assert outcomes.abs().eq(1).all()

    @qml.qnode(qml.device("default.qubit", wires=n))
    def probabilities(x, some):
        circuit_with_errors(x, weights, some)
        return qml.probs(wires=range(n))

    for k in range(2):
        theirs = probabilities(angles[k], errors[k]).numpy()
        assert chi_square(counted(outcomes[k]), theirs) > 1e-3


def test_correlations_variance_and_the_limit_of_many_shots(script):
    angles, weights = draw(1, 5, 3)
    shots = 100_000
    outcomes = outcomes_of(script, angles, weights, shots)[0]
    exact = script.staircase_expectations(angles, weights)[0]

    @qml.qnode(qml.device("default.qubit", wires=5))
    def correlations():
        script.quantum_circuit(angles[0], weights)
        pairs = itertools.combinations(range(5), 2)
        return [qml.expval(qml.PauliZ(i) @ qml.PauliZ(j)) for i, j in pairs]

    for (i, j), theirs in zip(itertools.combinations(range(5), 2), correlations(), strict=True):
        ours = (outcomes[:, i] * outcomes[:, j]).mean()
        assert abs(ours - theirs) < 4.5 * math.sqrt((1 - theirs**2) / shots) + 1e-12
    assert ((outcomes.mean(0) - exact).abs() < 4.5 * ((1 - exact**2) / shots).sqrt()).all()
    estimates = outcomes.view(1000, 100, 5).mean(1)  # a thousand estimates of a hundred shots
    ratio = estimates.var(0) / ((1 - exact**2) / 100)
    assert ((ratio - 1).abs() < 4.5 * math.sqrt(2 / 1000)).all()


@pytest.mark.parametrize("trajectories", [0, 1])
@pytest.mark.parametrize("arm", ["quantum", "product"])
def test_noisy_shots_have_default_mixeds_probabilities(script, arm, trajectories):
    # One shot each of many equal samples: every shot has errors and readout flips of its own.
    entangle, n, noise = arm != "product", 3, (0.05, 0.1)
    angles, weights = draw(1, n, 2)
    conditions = {"gate_noise": noise, "readout_noise": 0.08, "trajectories": trajectories}
    layer = layer_of(script, weights, arm=arm, shots=1, **conditions)
    layer.generator = torch.Generator().manual_seed(5)

    @qml.qnode(qml.device("default.mixed", wires=n))
    def probabilities():
        script.quantum_circuit(angles[0], weights, entangle, noise)
        for i in range(n):
            qml.BitFlip(0.08, wires=i)
        return qml.probs(wires=range(n))

    with torch.no_grad():
        outcomes = layer.expectations(angles.expand(20_000, n))
    assert torch.allclose(outcomes.abs(), torch.ones_like(outcomes), atol=1e-12, rtol=0)
    assert chi_square(counted(outcomes), probabilities().numpy()) > 1e-3


def test_shots_share_the_errors_of_a_trajectory_but_not_of_the_mean(script):
    # No rotation: a shot says whether its errors flip the qubit, so two shots differ only when
    # each has errors of its own.
    weights = torch.zeros(1, 1, 2, dtype=torch.float64)
    flipped = (1 - (1 - 4 * 0.3 / 3) ** 3) / 2  # three gates
    own = 2 * flipped * (1 - flipped)
    for trajectories, differ in ((1, 0.0), (2, own), (0, own)):
        noise = {"gate_noise": (0.3, 0.0), "trajectories": trajectories}
        layer = layer_of(script, weights, shots=2, **noise)
        layer.generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            estimates = layer.expectations(torch.zeros(10_000, 1, dtype=torch.float64))
        share = estimates.abs().lt(0.5).double().mean()
        assert abs(share - differ) < 4.5 * math.sqrt(differ * (1 - differ) / 10_000) + 1e-12


@pytest.mark.parametrize(
    "conditions",
    [
        {"shots": 7},
        {"shots": 6, "gate_noise": (0.1, 0.1), "trajectories": 3},
        {"shots": 6, "gate_noise": (0.1, 0.1), "trajectories": 0},
        {"shots": 6, "readout_noise": 0.1},
    ],
)
@pytest.mark.parametrize("arm", ["quantum", "product"])
def test_gradient_through_shots_is_that_of_the_exact_values(script, arm, conditions):
    angles, weights = draw(4, 3, 2)
    gradients, values = [], []
    for shots in (conditions["shots"], None):
        layer = layer_of(script, weights, arm=arm, **conditions | {"shots": shots})
        layer.generator = torch.Generator().manual_seed(3)
        x = angles.clone().requires_grad_()
        values.append(layer.expectations(x))
        gradients.append(torch.autograd.grad(values[-1].sum(), (x, layer.weights)))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-13, rtol=0)
    grid = (values[0] + 1) * conditions["shots"] / 2  # whole numbers of shots that read 0
    assert torch.allclose(grid, grid.round(), atol=1e-9)
    assert (values[0] - values[1]).abs().max() > 0.01


def test_readout_noise_scales_exactly(script):
    angles, weights = draw(3, 4, 2)
    clean, noisy = (layer_of(script, weights, readout_noise=q) for q in (0.0, 0.1))
    assert torch.equal(noisy.expectations(angles), clean.expectations(angles) * (1 - 2 * 0.1))


def test_a_hundred_qubits_can_be_measured(script):
    angles, weights = (values.float() for values in draw(2, 128, 3))
    layer = script.QuantumAttention(4, 128, 3, shots=2000).float()
    layer.weights.data = weights
    layer.generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        estimate = layer.expectations(angles)
    exact = script.staircase_expectations(angles, weights)
    errors = (estimate - exact) / ((1 - exact**2) / 2000).sqrt()
    assert errors.isfinite().all() and errors.abs().max() < 5 and 0.8 < errors.std() < 1.2


def test_shots_on_a_pennylane_device(script):
    angles, weights = draw(2, 3, 1)
    exact = script.staircase_expectations(angles, weights)
    options = {"seed": 1}
    layer = layer_of(
        script, weights, simulator="default.qubit", simulator_options=options, shots=4000
    )
    x = angles.clone().requires_grad_()
    values = layer.expectations(x)
    assert ((values - exact).abs() < 5 * ((1 - exact**2) / 4000).sqrt() + 1e-9).all()
    assert (values - exact).abs().max() > 1e-4
    gradient = torch.autograd.grad(values.sum(), (x, layer.weights))  # parameter shifts, measured
    y = angles.clone().requires_grad_()
    w = weights.clone().requires_grad_()
    wanted = torch.autograd.grad(script.staircase_expectations(y, w).sum(), (y, w))
    for a, b in zip(gradient, wanted, strict=True):
        assert (a - b).abs().max() < 0.15 and (a - b).abs().max() > 0
    with torch.no_grad():  # the inference circuit measures too
        assert (layer.expectations(angles) - exact).abs().max() > 1e-4


@pytest.mark.parametrize("simulator", ["default.qubit", "lightning.qubit", "default.mixed"])
def test_a_batch_of_one_keeps_its_shape(script, simulator):
    angles, weights = draw(1, 3, 1)
    layer = layer_of(script, weights, simulator=simulator, shots=10)
    with torch.no_grad():
        assert layer.expectations(angles).shape == (1, 3)
    assert layer.expectations(angles).shape == (1, 3)


def test_a_device_without_batches_or_backpropagation(script):
    angles, weights = (values.requires_grad_() for values in draw(2, 2, 1))
    layer = layer_of(script, weights.detach(), simulator="reference.qubit")
    values = layer.expectations(angles)
    exact = script.staircase_expectations(angles, weights)
    assert torch.allclose(values, exact, atol=1e-6)
    ours = torch.autograd.grad(values.sum(), (angles, layer.weights))
    theirs = torch.autograd.grad(exact.sum(), (angles, weights))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_shots_of_the_mean_keep_no_graph(script):
    angles, weights = draw(2, 3, 1)
    conditions = {"gate_noise": (0.1, 0.1), "trajectories": 0, "shots": 50}
    layer = layer_of(script, weights, **conditions)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        layer.expectations(angles)
    assert sum(kept) < 5000  # one sweep; fifty would keep fifty times as much


# --------------------------------------------------------------------------------- command line

NOISY = ("--shots", "8", "--gate_noise", "0.05,0.1", "--readout_noise", "0.02")


def run_of(folder):
    (run,) = folder.iterdir()
    return run


def test_a_noisy_run_resumes_to_the_same_bits(script, tiny, tmp_path, monkeypatch):
    argv = ("--use_quantum", "--n_qubits", "4", *NOISY)
    script.main(tiny(tmp_path / "whole", *argv))
    original, steps = script.training_batch, []

    def interrupted(settings, images, step, timesteps):
        steps.append(step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return original(settings, images, step, timesteps)

    monkeypatch.setattr(script, "training_batch", interrupted)
    with pytest.raises(SystemExit):
        script.main(tiny(tmp_path / "cut", *argv))
    script.main(tiny(tmp_path / "cut", *argv))
    assert steps == [0, 1, 2, 3, 4, 4, 5]
    a, b = (
        torch.load(run_of(tmp_path / k) / "model.pt", weights_only=True) for k in ("whole", "cut")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name in ("samples_final.png", "samples/step_000006.png"):
        a, b = (script.load_grid(run_of(tmp_path / k) / name) for k in ("whole", "cut"))
        assert torch.equal(a, b)


@pytest.mark.parametrize("flag", [
    ["--shots", "5"], ["--gate_noise", "0.2,0.2"], ["--readout_noise", "0.2"],
    ["--gate_noise", "0.2,0.2", "--trajectories", "0"],
    ["--gate_noise", "0.2,0.2", "--trajectories", "4"],
])  # fmt: skip
def test_every_condition_changes_the_weights(script, tiny, tmp_path, flag):
    argv = ("--use_quantum", "--n_qubits", "3", "--steps", "9", "--lr", "0.05")
    argv += ("--n_frames", "1", "--n_samples", "1", "--n_eval", "1", "--sample_steps", "1")
    reference = ["--gate_noise", "0.2,0.2"] if len(flag) == 4 else []
    script.main(tiny(tmp_path / "a", *argv, *reference))
    script.main(tiny(tmp_path / "b", *argv, *flag))
    a, b = (torch.load(run_of(tmp_path / k) / "model.pt", weights_only=True) for k in "ab")
    assert max((a[name] - b[name]).abs().max() for name in a) > 1e-4


def test_images_do_not_depend_on_those_drawn_with_them(script, tiny, tmp_path):
    argv = ("--use_quantum", "--n_qubits", "4", "--lr", "0.05", *NOISY)
    script.main(tiny(tmp_path, *argv, "--n_eval", "3"))
    few = script.load_grid(run_of(tmp_path) / "samples_final.png")
    (run_of(tmp_path) / "samples_final.png").unlink()
    script.main(tiny(tmp_path, *argv, "--n_eval", "20"))
    assert torch.equal(script.load_grid(run_of(tmp_path) / "samples_final.png")[:3], few)


def test_a_finished_run_samples_with_another_simulator(script, tiny, tmp_path, fails):
    argv = ("--use_quantum", "--n_qubits", "3", "--lr", "0.05")
    script.main(tiny(tmp_path, *argv))
    run = run_of(tmp_path)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    script.main(tiny(tmp_path, *argv, "--simulator", "lightning.qubit", "--n_eval", "6"))
    script.main(tiny(tmp_path, *argv, "--simulator", "default.mixed", *NOISY))
    script.main(tiny(tmp_path, *argv, "--gate_noise", "0.5,0.5"))
    script.main(tiny(tmp_path, *argv, "--sample_steps", "3"))
    assert (run / "samples_final_exact_steps3.png").exists()
    first = script.load_grid(run / "samples_final.png")
    other = script.load_grid(run / "samples_final_lightning.qubit.png")
    assert len(other) == 6
    assert (other[: len(first)].int() - first.int()).abs().max() <= 1
    script.load_grid(run / "samples_final_default.mixed_shots8_gate0.05-0.1_readout0.02.png")
    noisy = script.load_grid(run / "samples_final_exact_gate0.5-0.5.png")
    assert not torch.equal(noisy, first)
    for name, data in before.items():
        assert name == "config.json" or (run / name).read_bytes() == data
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["simulator"] == "exact" and config["n_eval"] == 4
    entry = config["other_grids"]["samples_final_lightning.qubit.png"]
    assert entry["n_eval"] == 6 and "--simulator lightning.qubit" in entry["command"]
    options = ("--simulator", "lightning.qubit", "--simulator_options", '{"seed": 3}')
    message = fails(script, tiny(tmp_path, *argv, *options))
    assert "samples_final_lightning.qubit.png made with simulator_options None" in message


def test_an_unfinished_run_keeps_its_simulator(script, tiny, tmp_path, fails):
    argv = ("--use_quantum", "--n_qubits", "3")
    script.main(tiny(tmp_path, *argv))
    (run_of(tmp_path) / "model.pt").unlink()
    assert "shots None (asked for: 5)" in fails(script, tiny(tmp_path, *argv, "--shots", "5"))


def test_no_noise_is_no_condition(script, tiny, tmp_path, capsys):
    argv = ("--use_quantum", "--n_qubits", "3")
    script.main(tiny(tmp_path, *argv))
    script.main(tiny(tmp_path, *argv, "--gate_noise", "0,0"))
    assert len(list(run_of(tmp_path).glob("samples_final*"))) == 1
    capsys.readouterr()
    script.main(tiny(tmp_path, *argv, "--shots", "3"))
    assert "only sampled, as samples_final_exact_shots3.png" in capsys.readouterr().out


def test_runs_without_conditions_in_their_record_had_the_defaults(script, tiny, tmp_path):
    argv = ("--use_quantum", "--n_qubits", "3")
    script.main(tiny(tmp_path, *argv))
    path = run_of(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    for name in ("shots", "readout_noise", "trajectories"):
        del config["settings"][name]
    path.write_text(json.dumps(config))
    script.main(tiny(tmp_path, *argv, "--n_eval", "6"))
    assert [p.name for p in run_of(tmp_path).glob("samples_final*")] == ["samples_final.png"]
    assert len(script.load_grid(run_of(tmp_path) / "samples_final.png")) == 6


def test_classical_arms_have_no_conditions(script, tiny, tmp_path):
    script.main(tiny(tmp_path, "--arm", "matched", *NOISY))
    settings = json.loads((run_of(tmp_path) / "config.json").read_text())["settings"]
    assert settings["shots"] is None and settings["gate_noise"] is None
    script.main(tiny(tmp_path, "--arm", "matched"))  # the same run: skipped, no other grid
    assert len(list(run_of(tmp_path).glob("samples_final*"))) == 1


ERRORS = {
    "gate": (["--gate_noise", "0.1"], "as in 0.001,0.01"),
    "range": (["--gate_noise", "0.1,1.5"], "0 to 1"),
    "readout": (["--readout_noise", "-0.1"], "0 to 1"),
    "shots": (["--shots", "0"], "above 0"),
    "divisor": (["--shots", "7", "--gate_noise", "0.1,0.1", "--trajectories", "2"], "divisor"),
    "pointless": (["--trajectories", "2"], "with --gate_noise"),
    "negative": (["--gate_noise", "0.1,0.1", "--trajectories", "-1"], "0 or more"),
    "json": (["--simulator_options", "[1]"], "JSON object"),
    "no json": (["--simulator_options", "{"], "json"),
    "options": (["--simulator_options", '{"seed": 1}'], "expected a PennyLane device"),
    "unknown": (
        ["--simulator", "default.qubit", "--simulator_options", '{"a": 1}'],
        "argument 'a'",
    ),
    "channels": (["--simulator", "lightning.qubit", "--gate_noise", "0.1,0.1"], "not supported"),
    "mixed": (["--simulator", "default.mixed"], "64 GiB a sample"),
    "shots twice": (
        ["--simulator", "default.qubit", "--simulator_options", '{"shots": 9}'],
        "use --shots",
    ),
    "no gates": (["--simulator", "default.gaussian"], "neither exact nor"),
}


@pytest.mark.parametrize("mistake", ERRORS)
def test_mistakes_are_one_line_and_leave_nothing(script, tiny, tmp_path, fails, mistake):
    extra, words = ERRORS[mistake]
    assert words in fails(script, tiny(tmp_path / "runs", "--use_quantum", *extra))
    assert not (tmp_path / "runs").exists()
