"""The circuits, their exact simulation, its check, and PennyLane's devices."""

import itertools
import math
from functools import partial

import numpy as np
import pennylane as qml
import pytest
import torch
from conftest import circuit_inputs, tiny

import quantum_diffusion_mnist as qd

NOISE = {"gate_noise": (0.07, 0.2), "readout_noise": 0.0625}
CIRCUITS = {name: arm for name, arm in qd.ARMS.items() if arm.circuit and arm.trained}
NOT_A_CHAIN = ("ring", "strong")
CHAINS = {name: arm for name, arm in CIRCUITS.items() if name not in NOT_A_CHAIN}


@pytest.fixture
def fresh_chains():
    """No simulation is kept from before the test, nor after it."""
    qd.compile_circuit.cache_clear()
    yield
    qd.compile_circuit.cache_clear()


def with_gradients(values, *inputs):
    """The values, and the gradients of a random combination of them."""
    probe = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).to(values)
    gradients = torch.autograd.grad(
        (values * probe).sum(), inputs, allow_unused=True, materialize_grads=True
    )
    return values, *gradients


def on_device(circuit, angles, weights, simulator="default.qubit"):
    """<Z_i> by a PennyLane device: (B, n)."""
    qnode = qd.make_qnode(circuit, angles.shape[1], simulator)
    return torch.stack(qnode(angles, weights), -1)


def assert_equals_pennylane(circuit, inputs, simulator="default.qubit"):
    """Values and gradients of the exact simulation are those of a PennyLane device."""
    ours = with_gradients(qd.circuit_expectations(*inputs, circuit), *inputs)
    theirs = with_gradients(on_device(circuit, *inputs, simulator), *inputs)

    # default.mixed has matrices in single precision.
    bound = 1e-6 if simulator == "default.mixed" else 1e-10
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < bound


# -------------------------------------------------------------------------- every arm's circuit


@pytest.mark.parametrize("n_qubits, n_layers", [(1, 1), (2, 1), (5, 2), (4, 3)])
@pytest.mark.parametrize("name", CHAINS)
def test_circuit_equals_default_qubit(name, n_qubits, n_layers):
    arm = CHAINS[name]
    inputs = circuit_inputs(3, n_qubits, n_layers, arm.n_weights)
    assert_equals_pennylane(arm.circuit, inputs)


@pytest.mark.parametrize("n_qubits, n_layers", [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("name", CHAINS)
def test_circuit_with_noise_equals_default_mixed(name, n_qubits, n_layers):
    arm = CHAINS[name]
    circuit = qd.with_noise(arm.circuit, **NOISE)
    inputs = circuit_inputs(2, n_qubits, n_layers, arm.n_weights)
    assert_equals_pennylane(circuit, inputs, "default.mixed")
    ideal = qd.circuit_expectations(*inputs, arm.circuit)
    assert (qd.circuit_expectations(*inputs, circuit) - ideal).abs().max() > 1e-2


@pytest.mark.parametrize("name", NOT_A_CHAIN)
def test_circuits_that_are_no_chain_run_on_lightning(name):
    arm = CIRCUITS[name]
    inputs = circuit_inputs(2, 4, 2, arm.n_weights)
    ours = with_gradients(on_device(arm.circuit, *inputs, "lightning.qubit"), *inputs)
    theirs = with_gradients(on_device(arm.circuit, *inputs), *inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-6
    assert theirs[2].abs().max() > 1e-2


def test_two_qubits_of_the_other_circuits_are_a_chain():
    for name in NOT_A_CHAIN:
        arm = CIRCUITS[name]
        assert_equals_pennylane(arm.circuit, circuit_inputs(3, 2, 2, arm.n_weights))


def test_published_circuit_is_a_product_of_cosines_whatever_its_weights():
    # Three CNOT chains on basis states: prefix sums modulo 2, three times. <Z_i> is the product of
    # cos(x_j) over the j that occur an odd number of times in bit i.
    angles, weights = circuit_inputs(4, 7, 3, 1)
    chain = torch.ones(7, 7, dtype=torch.float64).tril()
    odd = torch.linalg.matrix_power(chain, 3).remainder(2).bool()
    products = torch.stack([angles.cos()[:, row].prod(dim=1) for row in odd], 1)

    for w in (weights, torch.zeros_like(weights)):
        exact = qd.circuit_expectations(angles, w, qd.published_circuit)
        assert torch.allclose(exact, products, atol=1e-12, rtol=0)
    exact, _, gradient = with_gradients(
        qd.circuit_expectations(angles, weights, qd.published_circuit), angles, weights
    )
    assert gradient.abs().max() < 1e-12


def test_trained_circuit_has_gradients_and_float32_is_enough():
    angles, weights = circuit_inputs(16, 16, 3)
    values = qd.circuit_expectations(angles, weights)
    (gradient,) = torch.autograd.grad((values[:, :4] - 0.5).square().sum(), weights)
    assert (gradient.abs().amax(dim=1) > 1e-4).all()  # in every layer, RZ and RY alike

    single = qd.circuit_expectations(angles.float(), weights.float())
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), values, atol=2e-5, rtol=0)


def test_a_hundred_qubits_look_like_fewer_from_the_left():
    # <Z_i> depends on all qubits to the left, and on L - 1 to the right (by the CNOTs' back-action
    # on the control), so a chain cut after qubit 7 is right up to qubit 5 and wrong from qubit 6.
    angles, weights = circuit_inputs(2, 100, 3)
    wide = qd.circuit_expectations(angles, weights)
    narrow = qd.circuit_expectations(angles[:1, :8], weights[:, :8])
    assert wide.abs().max() <= 1 + 1e-12
    assert torch.allclose(wide[:1, :6], narrow[:, :6], atol=1e-12, rtol=0)
    assert (wide[:1, 6:8] - narrow[:, 6:]).abs().min() > 1e-6


def test_brickwork_is_no_staircase():
    inputs = circuit_inputs(2, 6, 2)

    def staircase(angles, weights):
        qd.encode(angles)
        for layer in weights:
            for i in range(6):
                qml.RY(layer[i, 0], wires=i)
                qml.RZ(layer[i, 1], wires=i)
            for i in range(5):
                qml.CNOT([i, i + 1])

    assert_equals_pennylane(qd.brickwork_circuit, inputs)
    brickwork = qd.circuit_expectations(*inputs, qd.brickwork_circuit)
    assert (brickwork - qd.circuit_expectations(*inputs, staircase)).abs().max() > 0.1


# ------------------------------------------------------------------- any circuit along the chain

GATES = {  # name: qubits, parameters
    "RX": (1, 1),
    "RY": (1, 1),
    "RZ": (1, 1),
    "Rot": (1, 3),
    "Hadamard": (1, 0),
    "S": (1, 0),
    "CNOT": (2, 0),
    "CZ": (2, 0),
    "CRX": (2, 1),
    "CRZ": (2, 1),
    "IsingXX": (2, 1),
    "IsingZZ": (2, 1),
}
CHANNELS = ("DepolarizingChannel", "AmplitudeDamping", "BitFlip", "PhaseDamping")
N_RANDOM = 4  # qubits of a random circuit
BONDS_RANDOM = 3  # two-qubit gates between two neighbours, 4 bonds each


def random_circuit(seed: int, has_channels: bool):
    """A circuit of 24 random operations on N_RANDOM qubits with two weights each, in one layer."""
    rng = np.random.default_rng(seed)
    pairs = [0] * (N_RANDOM - 1)  # gates so far between qubits i and i + 1
    operations = []  # name, wires, where each parameter comes from
    while len(operations) < 24:
        if has_channels and rng.random() < 0.2:
            operations.append((rng.choice(CHANNELS), [rng.integers(N_RANDOM)], [("constant", 0.1)]))
            continue

        name = rng.choice([*GATES])
        n_wires, n_parameters = GATES[name]
        first = rng.integers(N_RANDOM - n_wires + 1)
        wires = list(range(first, first + n_wires))
        if n_wires == 2:
            if pairs[first] == BONDS_RANDOM:
                continue
            pairs[first] += 1
            if rng.random() < 0.5:
                wires.reverse()

        # PennyLane's Rot takes no mixture of tensors and numbers.
        kinds = rng.choice(["angle", "weight", "constant"], n_parameters)
        if name == "Rot" and "constant" in kinds:
            kinds = ["constant"] * 3
        draw = {
            "angle": lambda: rng.integers(N_RANDOM),
            "weight": lambda: tuple(rng.integers((N_RANDOM, 2))),
            "constant": lambda: rng.uniform(0, 6),
        }
        operations.append((name, wires, [(kind, draw[kind]()) for kind in kinds]))

    def circuit(angles, weights):
        look_up = {
            "angle": lambda i: angles[..., i],
            "weight": lambda place: weights[0, place[0], place[1]],
            "constant": float,
        }
        qd.encode(angles)  # qubits left in |0> give PennyLane's default.mixed gradients of nan
        for name, wires, sources in operations:
            parameters = [look_up[kind](number) for kind, number in sources]
            getattr(qml, name)(*parameters, wires=[int(wire) for wire in wires])

    return circuit


@pytest.mark.parametrize("seed", range(10))
def test_random_chains_equal_pennylane(seed):
    inputs = circuit_inputs(2, N_RANDOM, 1)
    assert_equals_pennylane(random_circuit(seed, False), inputs)
    assert_equals_pennylane(random_circuit(seed, True), inputs, "default.mixed")


def test_random_chains_have_every_gate_and_channel():
    names = set()
    for seed in range(10):
        circuit = random_circuit(seed, True)
        names |= {gate.name for gate, _ in qd.record(circuit, N_RANDOM, 1, 2)}
    assert names == {*GATES, *CHANNELS}


def observable_of(circuit, inputs, observable):
    """<O_i> of every qubit by default.qubit: (B, n)."""
    n = inputs[0].shape[1]

    @qml.qnode(qml.device("default.qubit", wires=n), interface="torch")
    def expectations(angles, weights):
        circuit(angles, weights)
        return [qml.expval(observable(i)) for i in range(n)]

    return torch.stack(expectations(*inputs), -1)


def test_x_is_read_out_by_hadamards_at_the_end():
    inputs = circuit_inputs(2, 5, 2)

    def circuit(angles, weights):
        qd.quantum_circuit(angles, weights)
        for i in range(5):
            qml.Hadamard(i)

    ours = with_gradients(qd.circuit_expectations(*inputs, circuit), *inputs)
    theirs = with_gradients(observable_of(qd.quantum_circuit, inputs, qml.X), *inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-10


def test_zz_of_neighbours_is_read_out_by_a_chain_from_the_end():
    inputs = circuit_inputs(2, 5, 2)

    def circuit(angles, weights):
        qd.quantum_circuit(angles, weights)
        for i in reversed(range(4)):
            qml.CNOT([i, i + 1])

    def observable(i):
        return qml.Z(i - 1) @ qml.Z(i) if i else qml.Z(0)

    ours = with_gradients(qd.circuit_expectations(*inputs, circuit), *inputs)
    theirs = with_gradients(observable_of(qd.quantum_circuit, inputs, observable), *inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-10


def embedding_template(angles, weights):
    qml.AngleEmbedding(angles, wires=range(3), rotation="X")
    qml.CNOT([1, 0])
    qml.RY(weights[0, 1, 0], wires=0)


def entangling_template(angles, weights):
    qd.encode(angles)
    qml.BasicEntanglerLayers(weights[:, :2, 0], wires=[1, 2])


def constant_matrices(angles, weights):
    unitary = qml.matrix(qml.Rot(0.3, 0.5, 0.7, 0) @ qml.RX(0.2, 1))
    qd.encode(angles)
    qml.QubitUnitary(unitary, wires=[2, 1])
    qml.adjoint(qml.S(1))
    qml.QubitUnitary(qml.matrix(qml.RX(0.4, 0)), wires=0)


def many_parameters(angles, weights):
    qd.encode(angles)
    qml.CRot(weights[0, 0, 0], angles[..., 1], weights[0, 0, 1], wires=[1, 0])
    qml.IsingXY(weights[0, 1, 0], wires=[1, 2])
    qml.adjoint(qml.RX(weights[0, 2, 0], wires=1))
    qml.PhaseShift(weights[0, 2, 1], wires=2)


@pytest.mark.parametrize(
    "circuit", [embedding_template, entangling_template, constant_matrices, many_parameters]
)
def test_other_operations_of_pennylane(circuit):
    assert_equals_pennylane(circuit, circuit_inputs(3, 3, 1))


def test_constants_may_be_tensors():
    def circuit(angles, weights):
        qd.encode(angles)
        qml.Rot(weights[0, 0, 0], torch.tensor(0.3, dtype=torch.float64), weights[0, 1, 0], wires=1)

    assert_equals_pennylane(circuit, circuit_inputs(3, 2, 1))


# ------------------------------------------------------- what the exact simulation does not know


def of_five_angles(angles, weights):
    qml.prod(*(qml.CRX(weights[0, 0, 0], [0, 1]) for _ in range(5)))


def a_density_matrix(angles, weights):
    qml.QubitDensityMatrix(torch.eye(2) / 2, wires=0)


def on_three_qubits(angles, weights):
    qd.encode(angles)
    qml.Toffoli([0, 1, 2])


def at_a_distance(angles, weights):
    qd.encode(angles)
    qml.CRX(weights[0, 0, 0], wires=[3, 1])


def of_twice_an_angle(angles, weights):
    for i in range(4):
        qml.RY(2 * angles[..., i], wires=i)


def of_a_product_of_weights(angles, weights):
    qd.encode(angles)
    qml.RX(weights[0, 0, 0] * weights[0, 1, 0], wires=0)


def of_a_scaled_gradient(angles, weights):
    qd.encode(angles.detach() + 0.1 * (angles - angles.detach()))


def of_a_shape_by_value(angles, weights):
    qd.encode(angles)
    for _ in range(int(1000 * weights[0, 0, 0])):
        qml.X(0)


def as_the_ring(angles, weights):
    qd.ring_circuit(angles, weights)


@pytest.mark.parametrize(
    "circuit, reason",
    [
        (on_three_qubits, "Toffoli on 3 qubits"),
        (of_five_angles, "Prod has 5 angles or weights; write it as several gates"),
        (at_a_distance, "CRX on qubits 1 and 3: the exact simulation knows neighbours only"),
        (as_the_ring, "CNOT on qubits 0 and 3"),
        (of_twice_an_angle, "a parameter must be an angle or a weight"),
        (of_a_product_of_weights, "a parameter must be an angle or a weight"),
        (of_a_shape_by_value, "a parameter must be an angle or a weight"),
        (of_a_scaled_gradient, "a parameter must be an angle or a weight"),
    ],
)
def test_refusals_name_the_way_out(circuit, reason):
    inputs = circuit_inputs(1, 4, 1)
    for refused in (
        lambda: qd.circuit_expectations(*inputs, circuit),
        lambda: qd.QuantumGate(8, circuit, 4, 1, 2),
        lambda: qd.QuantumGate(8, circuit, 4, 1, 2, shots=10),
    ):
        with pytest.raises(qd.UserError) as error:
            refused()
        message = str(error.value)
        assert reason in message
        assert "--simulator lightning.qubit" in message
        assert "\n" not in message

    # And there it runs.
    gate = qd.QuantumGate(8, circuit, 4, 1, 2, simulator="lightning.qubit")
    assert gate.expectations(inputs[0].detach()).shape == (1, 4)


@pytest.mark.parametrize("wire", [5, "a"])
def test_a_wire_that_there_is_not_is_an_error(wire):
    def circuit(angles, weights):
        qd.encode(angles)
        qml.RY(angles[..., 0], wires=wire)

    with pytest.raises(qd.UserError, match=f"wire.*{wire}"):
        qd.circuit_expectations(*circuit_inputs(1, 3, 1), circuit)


def test_four_layers_of_cnots_run_and_five_are_refused():
    assert_equals_pennylane(qd.quantum_circuit, circuit_inputs(1, 3, 4))
    with pytest.raises(qd.UserError, match="at most 256; fewer layers, or use --simulator light"):
        qd.circuit_expectations(*circuit_inputs(1, 3, 5))
    qd.circuit_expectations(*circuit_inputs(1, 3, 20), qd.product_circuit)  # no bonds


def test_more_weights_than_there_are_is_an_error_on_every_simulator():
    for simulator in ("exact", "default.qubit"):
        with pytest.raises(
            qd.UserError, match="ising_circuit fails for 3 qubits .*: index 2 is out"
        ):
            qd.QuantumGate(8, qd.ising_circuit, 3, 1, 2, simulator=simulator)


# ------------------------------------------------------------------------------------- its check


def scaled_low_part(original):
    """``cut``, with a hundredth too much in the low qubit's part."""

    def broken(coefficients, is_last):
        low, high = original(coefficients, is_last)
        return 1.01 * low, high

    return broken


def transposed_matrix(original):
    """``pauli_transfer_matrix`` of the inverse gate."""
    return lambda operation: original(operation).T


def with_exchanged_weights(original):
    """``record``, that takes the first weight for the second."""

    def broken(*sizes, **options):
        exchanged = {("w", 0): ("w", 1), ("w", 1): ("w", 0)}
        return [
            one._replace(sources=tuple(exchanged.get(source, source) for source in one.sources))
            for one in original(*sizes, **options)
        ]

    return broken


def paler_readout(original):
    """``step_right``, where Z is read out a hundredth too small."""

    def broken(left, site):
        read_i, read_z = original(left, site)
        return read_i, 0.99 * read_z

    return broken


BREAKS = {
    "cut": scaled_low_part,
    "pauli_transfer_matrix": transposed_matrix,
    "record": with_exchanged_weights,
    "step_right": paler_readout,
}


@pytest.mark.parametrize("shots", [None, 10])
@pytest.mark.parametrize("name", BREAKS)
def test_check_finds_a_wrong_simulation(name, shots, monkeypatch, fresh_chains):
    monkeypatch.setattr(qd, name, BREAKS[name](getattr(qd, name)))
    with pytest.raises(qd.UserError, match="--arm quantum: the exact simulation differs"):
        qd.check_circuit(qd.Settings("quantum", shots=shots))


@pytest.mark.parametrize("name", CHAINS)
def test_check_lets_right_simulations_pass(name):
    qd.check_circuit(qd.Settings(name))
    qd.check_circuit(qd.Settings(name, shots=10, **NOISE))


def test_check_takes_circuits_with_channels_of_their_own(monkeypatch):
    def damped(angles, weights):
        qd.encode(angles)
        qml.AmplitudeDamping(0.1, wires=0)

    monkeypatch.setitem(qd.ARMS, "damped", qd.Arm("a damped circuit", damped, 1))
    qd.check_circuit(qd.Settings("damped"))


def test_check_compares_noise_too(monkeypatch, fresh_chains):
    # As if the exact simulation took depolarising for bit flips.
    original = qd.pauli_transfer_matrix

    def broken(operation):
        if operation.name == "DepolarizingChannel":
            operation = qml.BitFlip(operation.parameters[0], wires=operation.wires)
        return original(operation)

    monkeypatch.setattr(qd, "pauli_transfer_matrix", broken)
    qd.check_circuit(qd.Settings("quantum"))
    with pytest.raises(qd.UserError, match="exact simulation differs"):
        qd.check_circuit(qd.Settings("quantum", gate_noise=(0.05, 0.0)))


def test_check_runs_before_a_folder_is_made(tmp_path, fails, monkeypatch, fresh_chains):
    monkeypatch.setattr(qd, "cut", scaled_low_part(qd.cut))
    message = fails(qd, tiny(tmp_path / "runs", "--arm", "classical", "cz"))
    assert "--arm cz: the exact simulation differs by" in message
    assert not (tmp_path / "runs").exists()


def test_check_lets_right_devices_pass():
    qd.check_circuit(qd.Settings("strong", n_qubits=4, simulator="lightning.qubit"))
    qd.check_circuit(qd.Settings("quantum", n_qubits=4, simulator="default.qubit", shots=200))


def test_check_finds_a_wrong_device_with_few_shots(monkeypatch):
    """Any value is within six deviations of five shots."""
    settings = qd.Settings("quantum", n_qubits=3, n_layers=1, simulator="default.qubit", shots=5)
    original = qd.make_qnode

    def with_the_other_sign(circuit, n_qubits, simulator, options=None, shots=None, **how):
        qnode = original(circuit, n_qubits, simulator, options, shots, **how)
        sign = -1 if shots else 1
        return lambda angles, weights: [sign * value for value in qnode(angles, weights)]

    qd.check_circuit(settings)
    monkeypatch.setattr(qd, "make_qnode", with_the_other_sign)
    with pytest.raises(qd.UserError, match="default.qubit differs"):
        qd.check_circuit(settings)


def test_check_finds_a_device_that_samples_unasked(monkeypatch):
    settings = qd.Settings("quantum", n_qubits=3, n_layers=1, simulator="reference.qubit")
    original = qd.make_qnode

    def with_shots(circuit, n_qubits, simulator, options=None, shots=None, **how):
        unasked = 100 if simulator == "reference.qubit" else None
        return original(circuit, n_qubits, simulator, options, shots or unasked, **how)

    qd.check_circuit(settings)
    monkeypatch.setattr(qd, "make_qnode", with_shots)
    with pytest.raises(qd.UserError, match="reference.qubit differs .* give --shots"):
        qd.check_circuit(settings)


# ------------------------------------------------------------------------- noise, own circuits


def names_and_wires(circuit, n_qubits, n_layers, n_weights):
    """The recorded operations as text, without their parameters."""
    recorded = qd.record(circuit, n_qubits, n_layers, n_weights)
    return [(gate.name, *gate.wires) for gate, _ in recorded]


def test_noise_stands_behind_every_gate():
    def two_gates(angles, weights):
        qml.RY(angles[..., 0], wires=0)
        qml.CNOT([1, 0])

    noisy = qd.with_noise(two_gates, (0.1, 0.2), 0.3)
    assert [str(operation) for operation in qd.record(noisy, 2, 1, 1)] == [
        "RY(x0) 0",
        "DepolarizingChannel(0.1) 0",
        "CNOT 1 0",
        "DepolarizingChannel(0.2) 1",
        "DepolarizingChannel(0.2) 0",
        "BitFlip(0.3) 0",
        "BitFlip(0.3) 1",
    ]
    assert qd.with_noise(two_gates) is two_gates


def test_noise_stands_behind_the_gates_inside_templates():
    noisy = qd.with_noise(qd.strong_circuit, (0.1, 0.2), 0.3)
    names = [name for name, *_ in names_and_wires(noisy, 3, 2, 3)]
    one_qubit_gates = 3 + 2 * 3  # the encoding and Rot
    two_qubit_gates = 2 * 3
    assert names.count("Rot") == 6
    assert names.count("CNOT") == two_qubit_gates
    assert names.count("DepolarizingChannel") == one_qubit_gates + 2 * two_qubit_gates
    assert names[-3:] == ["BitFlip"] * 3
    assert names.count("BitFlip") == 3


def test_no_noise_behind_channels_nor_of_probability_zero():
    def damped(angles, weights):
        qml.RY(angles[..., 0], wires=0)
        qml.AmplitudeDamping(0.2, wires=0)
        qml.CNOT([0, 1])

    assert names_and_wires(qd.with_noise(damped, (0.1, 0.0)), 2, 1, 1) == [
        ("RY", 0),
        ("DepolarizingChannel", 0),
        ("AmplitudeDamping", 0),
        ("CNOT", 0, 1),
    ]


def test_noise_behind_three_qubits_is_refused():
    noisy = qd.with_noise(on_three_qubits, (0.1, 0.1))
    with pytest.raises(qd.UserError, match="Toffoli acts on 3 qubits, and --gate_noise knows"):
        qd.record(noisy, 3, 1, 1)


def test_the_record_tells_angles_weights_and_constants_apart():
    def circuit(angles, weights):
        qml.RX(angles[..., 2], wires=0)
        qml.Rot(weights[1, 2, 0], 0.25, weights[0, 0, 1], wires=1)

    assert [str(x) for x in qd.record(circuit, 3, 2, 2)] == ["RX(x2) 0", "Rot(w10, 0.25, w1) 1"]


# ------------------------------------------------------------------- what users' circuits may do


def plain_numbers(angles, weights):
    qd.encode(angles)
    qml.RX(float(weights[0, 0, 0]), wires=0)


def returned_measurements(angles, weights):
    qd.encode(angles)
    return [qml.expval(qml.X(i)) for i in range(angles.shape[-1])]


def trained_channel(angles, weights):
    qd.encode(angles)
    qml.AmplitudeDamping(weights[0, 0, 0], wires=0)


def rectified(angles, weights):
    for i in range(angles.shape[-1]):
        qml.RY(torch.relu(angles[..., i]), wires=i)


def clamped(angles, weights):
    qd.encode(angles.clamp(max=12))


def measured_inside(angles, weights):
    qd.encode(angles)
    qml.measure(0)


def evolved(angles, weights):
    qml.evolve(qml.X(0), weights[0, 0, 0])


def of_a_complex_weight(angles, weights):
    qml.exp(qml.X(0), 1j * weights[0, 0, 0])


def random_each_time(angles, weights):
    qml.RX(np.random.rand(), wires=0)


def with_a_branch(angles, weights):
    qd.encode(angles)
    if weights[0, 0, 0] > weights[0, 1, 0]:
        qml.Hadamard(0)


@qml.qnode(qml.device("default.qubit", wires=1))
def a_qnode(angles, weights):
    qml.RX(angles[..., 0], wires=0)
    return qml.expval(qml.Z(0))


OWN_WEIGHT = torch.nn.Parameter(torch.tensor(0.3))


def of_an_own_weight(angles, weights):
    qml.RX(OWN_WEIGHT, wires=0)


def without_i(angles, weights):
    qd.encode(angles)
    qml.exp(qml.X(0), 0.3)


def a_sum(angles, weights):
    qd.encode(angles)
    qml.sum(qml.X(0), qml.Z(0))


def zero(angles, weights):
    qd.encode(angles)
    0 * (qml.X(0) @ qml.X(1))


def no_number(angles, weights):
    qd.encode(angles)
    qml.RX(torch.tensor(math.nan), 0)


def projected(angles, weights):
    qd.encode(angles)
    qml.Projector([1], 0)


def pauli_measured(angles, weights):
    qml.pauli_measure("XX", wires=[0, 1])


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize(
    "circuit, reason",
    [
        (without_i, "Exp 0: its matrix is not unitary, so it is no gate"),
        (a_sum, "Sum 0: its matrix is not unitary"),
        (zero, "0 1: its matrix is not unitary"),
        (a_density_matrix, "QubitDensityMatrix is neither a gate with a matrix nor a channel"),
        (no_number, "RX 0: its matrix is not unitary"),
        (projected, "Projector 0: its matrix is not unitary"),
        (pauli_measured, "it measures inside, which no simulator here does"),
        (clamped, "RY: a parameter must be an angle or a weight"),
        (measured_inside, "it measures inside, which no simulator here does"),
        (evolved, "Evolution is not of first degree in cos and sin of its parameters"),
        (of_a_complex_weight, "Exp: a parameter must be an angle or a weight"),
        (plain_numbers, "RX takes an angle or weight as a number without gradient"),
        (returned_measurements, "it returns measurements, but <Z_i> of all qubits is what is"),
        (trained_channel, "trained_channel cannot be read (ValueError: gamma must be in"),
        (rectified, "a parameter must be an angle or a weight"),
        (random_each_time, "random_each_time is another circuit each time it is called"),
        (with_a_branch, "which operations there are must not depend on them"),
        (a_qnode, "a_qnode is a QNode; leave out @qml.qnode"),
        (of_an_own_weight, "RX: a parameter must be an angle or a weight"),
    ],
)
def test_circuits_that_would_be_wrong_in_silence_are_errors(circuit, reason):
    with pytest.raises(qd.UserError) as error:
        qd.QuantumGate(8, circuit, 3, 1, 1)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def detached(angles, weights):
    for i in range(3):
        qml.RY(angles[..., i].detach(), wires=i)
        qml.RX(weights[0, i, 0].detach(), wires=i)
        qml.RY(weights[0, i, 1], wires=i)
        qml.RZ(angles[..., i], wires=i)
    qml.CRX(angles[..., 0].detach(), wires=[0, 1])


def wrapped(angles, weights):
    qd.encode(angles)
    qml.prod(qml.RX(weights[0, 0, 0], wires=0), qml.RY(angles[..., 1], wires=0))
    qml.exp(qml.X(1), 0.3j)
    qml.adjoint(qml.PauliRot(weights[0, 1, 0], "XY", wires=[0, 1]))
    qml.ctrl(qml.PauliRot(weights[0, 2, 1], "Y", wires=2), 1)


def evolved_by_constants(angles, weights):
    qd.encode(angles)
    qml.evolve(qml.X(0) + 0.5 * qml.Z(0), 0.3)
    qml.evolve(0.5 * qml.X(1), weights[0, 1, 0])
    qml.exp(qml.Hermitian(np.diag([1.0, 2.0]), 2), 0.3j)
    qml.TrotterProduct(qml.X(0) + qml.Z(0), 0.3)
    qml.CNOT([1, 2])


def without_effect_on_three(angles, weights):
    qd.encode(angles)
    qml.Identity(wires=[0, 1, 2])
    qml.CNOT([0, 1])
    qml.GlobalPhase(weights[0, 0, 0], wires=[0, 1, 2])


def test_a_global_phase_has_no_noise():
    inputs = circuit_inputs(2, 3, 1)
    noisy, plain = (
        qd.circuit_expectations(*inputs, qd.with_noise(circuit, **NOISE))
        for circuit in (without_effect_on_three, only_a_cnot)
    )
    assert torch.allclose(noisy, plain, atol=1e-12)


def only_a_cnot(angles, weights):
    qd.encode(angles)
    qml.CNOT([0, 1])


def test_a_zero_has_no_sign():
    assert qd.shown_value(-1e-17) == qd.shown_value(1e-17) == "0.0"


def without_inputs(angles, weights):
    for i in range(3):
        qml.RX(0.3, wires=i)


def constants_that_cannot_be_set(angles, weights):
    """Operations of which PennyLane forgets a part, or fails, when it sets parameters."""
    unitary = qml.matrix(qml.RX(0.7, 0))
    qd.encode(angles)
    qml.ctrl(qml.QubitUnitary(unitary, wires=1), control=0, control_values=[0])
    qml.adjoint(qml.ctrl(qml.QubitUnitary(unitary, wires=2), control=1, control_values=[0]))
    qml.evolve(qml.Hermitian(np.array([[1.0, 0.5], [0.5, 2.0]]), 0), 0.3)


@pytest.mark.parametrize(
    "circuit",
    [
        detached,
        wrapped,
        evolved_by_constants,
        without_effect_on_three,
        without_inputs,
        constants_that_cannot_be_set,
    ],
)
def test_detached_and_wrapped_operations_are_exact(circuit):
    inputs = circuit_inputs(3, 3, 1)
    found = qd.values_and_gradients(partial(qd.circuit_expectations, circuit=circuit), *inputs)
    expected = qd.values_and_gradients(qd.on_device(circuit, 3, "default.qubit"), *inputs)
    assert (found - expected).abs().max() < 1e-12


def controlled_by_turns(angles, weights):
    """Constants that differ by 2 pi inside a controlled operation, where this is another gate."""
    qd.encode(angles)
    for i in range(7):
        turned = qml.adjoint(qml.RX(2 * math.pi * (i % 2), wires=i + 1))
        qml.ctrl(turned, control=i)
    qd.rotate(weights[0], qml.RZ, qml.RY)


def nearly_equal_constants(angles, weights):
    """Constants that PyTorch prints as equal."""
    qd.encode(angles)
    strengths = torch.tensor([0.5, 0.5, 0.50004, 0.5, 0.49996, 0.5, 0.5], dtype=torch.float64)
    for i, strength in enumerate(strengths):
        qml.IsingXX(strength, wires=[i, i + 1])


def swapped_parameters(angles, weights):
    """Products whose parameters change places, and an angle with a constant."""
    qd.encode(angles)
    qml.prod(qml.RZ(weights[0, 0, 0], 0), qml.RX(weights[0, 1, 0], 1))
    qml.prod(qml.RX(weights[0, 2, 0], 3), qml.RZ(weights[0, 3, 0], 2))
    qml.prod(qml.RX(weights[0, 4, 0], 4), qml.RX(0.5, 5))
    qml.prod(qml.RX(weights[0, 5, 0], 7), qml.RX(0.5, 6))


@pytest.mark.parametrize("values", [[0], [1, 0]])
def test_what_cannot_be_set_is_refused_beside_a_weight(values):
    """A product with a weight and a controlled constant, whose control values would be lost.

    Behind one that is right as it is, too, which would look the same.
    """
    unitary = qml.matrix(qml.RX(0.7, 0))

    def circuit(angles, weights):
        qd.encode(angles)
        for k, value in enumerate(values):
            gate = qml.ctrl(qml.QubitUnitary(unitary, wires=1), control=0, control_values=[value])
            qml.prod(gate, qml.RX(weights[0, k, 0], 0))
        qd.rotate(weights[0], qml.RZ, qml.RY)

    with pytest.raises(qd.UserError, match="Prod: its parameters cannot be set.*--simulator"):
        qd.circuit_expectations(*circuit_inputs(1, 2, 1), circuit=circuit)


def test_channels_of_one_kraus_matrix():
    def circuit(angles, weights):
        qd.encode(angles)
        qml.QubitChannel([qml.matrix(qml.RX(0.7, 0))], wires=0)

    assert_equals_pennylane(circuit, circuit_inputs(2, 2, 1), "default.mixed")


@pytest.mark.parametrize("place, shape", [((0, 1), r"\(2,\)"), ((0,), "dimensions")])
@pytest.mark.parametrize("simulator", ["exact", "default.qubit"])
def test_one_number_for_each_parameter(place, shape, simulator, monkeypatch):
    def circuit(angles, weights):
        qd.encode(angles)
        qml.RY(weights[place], wires=1)

    monkeypatch.setitem(qd.ARMS, "own", qd.Arm("own", circuit, 2))
    settings = {"arm": "own", "n_qubits": 3, "n_layers": 1, "simulator": simulator}
    with pytest.raises(qd.UserError, match=rf"circuit: RY .*{shape}.*such as layer\[i, 0\]"):
        qd.circuit_text(qd.Settings(**settings))


@pytest.mark.parametrize(
    "circuit", [controlled_by_turns, nearly_equal_constants, swapped_parameters]
)
def test_gates_of_one_kind_with_other_constants_are_others(circuit):
    inputs = circuit_inputs(3, 8, 1)
    found = qd.circuit_expectations(*inputs, circuit=circuit)
    expected = qd.on_device(circuit, 8, "default.qubit")(*inputs)
    assert (found - expected).abs().max() < 1e-12


def test_branches_on_any_weights_are_found():
    for i, j in itertools.permutations(range(5), 2):

        def branching(angles, weights, i=i, j=j):
            qd.encode(angles)
            if weights[0, i, 0] > weights[0, j, 0]:
                qml.Hadamard(0)

        with pytest.raises(qd.UserError, match="must not depend on them"):
            qd.compile_circuit(branching, 5, 2, 1)


def test_without_gradient_the_record_is_the_same():
    expected = [str(one) for one in qd.record(detached, 3, 1, 2)]
    assert expected[:4] == ["RY(detached x0) 0", "RX(detached w0) 0", "RY(w1) 0", "RZ(x0) 0"]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert [str(one) for one in qd.record(detached, 3, 1, 2)] == expected


@pytest.mark.parametrize("wrap", [qml.adjoint, partial(qml.ctrl, control=0)])
@pytest.mark.parametrize("word", ["X", "Y"])
def test_the_text_shows_what_is_inside_a_wrapped_operation(wrap, word):
    def circuit(angles, weights):
        wrap(qml.PauliRot(weights[0, 0, 0], word, wires=1))

    (one,) = qd.record(circuit, 2, 1, 1)
    assert str(one).endswith(f"pauli_word='{word}'")


def test_a_gate_reads_its_circuit_anew(monkeypatch):
    constants = {"angle": 0.3}

    def circuit(angles, weights):
        qml.RX(constants["angle"], wires=0)

    angles = torch.zeros(2, 1)
    for angle in (0.3, 1.3):
        constants["angle"] = angle
        gate = qd.QuantumGate(8, circuit, 1, 1, 0)
        assert gate.expectations(angles).tolist() == [[pytest.approx(math.cos(angle))]] * 2


def test_check_says_that_it_tries_other_sizes(monkeypatch):
    def for_six_alone(angles, weights):
        for i in range(6):
            qml.RY(angles[..., i], wires=i)

    monkeypatch.setitem(qd.ARMS, "six", qd.Arm("for six qubits alone", for_six_alone, 1))
    with pytest.raises(
        qd.UserError, match="for 5 qubits .* check on at most 5 qubits and 3 layers"
    ):
        qd.check_circuit(qd.Settings("six", n_qubits=6))


@pytest.mark.parametrize("circuit", [without_i, a_sum, no_number])
def test_the_check_of_a_device_refuses_what_is_no_gate(circuit, monkeypatch):
    """PennyLane's devices would run it, with means beyond -1..1."""
    monkeypatch.setitem(qd.ARMS, "own", qd.Arm("no gate", circuit))
    with pytest.raises(qd.UserError, match="its matrix is not unitary"):
        qd.check_circuit(qd.Settings("own", n_qubits=3, simulator="default.qubit"))


def test_the_check_takes_gates_that_pennylane_does_not_run_in_batches(monkeypatch):
    def interacting(angles, weights):
        qd.encode(angles)
        qml.IsingXY(angles[..., 0], [0, 1])

    monkeypatch.setitem(qd.ARMS, "own", qd.Arm("IsingXY of an angle", interacting))
    for simulator in ("exact", "lightning.qubit"):
        qd.check_circuit(qd.Settings("own", n_qubits=3, simulator=simulator))


def test_the_check_takes_inputs_in_any_gate(monkeypatch):
    """PennyLane does not divide a batch of the first three into samples."""

    def circuit(angles, weights):
        qd.encode(angles)
        qml.MultiRZ(angles[..., 0], wires=[0, 1])
        qml.evolve(0.5 * qml.X(0), angles[..., 1])
        qml.prod(qml.RX(weights[0, 0, 0], wires=1), qml.RY(angles[..., 2], wires=2))
        qml.CRot(angles[..., 1], 0.3, weights[0, 1, 0], wires=[1, 2])

    monkeypatch.setitem(qd.ARMS, "own", qd.Arm("own", circuit, 1))
    qd.check_circuit(qd.Settings("own", n_qubits=3))


def scaled_gradient(scale):
    def circuit(angles, weights):
        qd.encode(angles.detach() + scale * (angles - angles.detach()))

    return circuit


def test_a_device_s_run_tells_circuits_that_are_not_exact(monkeypatch):
    """What the exact simulation refuses is not refused there, and has a text of its own."""

    def with_evolution(angles, weights):
        qd.encode(angles)
        qml.prod(qml.evolve(0.5 * qml.X(0), weights[0, 0, 0]), qml.RX(weights[0, 1, 0], wires=1))

    texts = set()
    for circuit in (scaled_gradient(1), scaled_gradient(0.1), scaled_gradient(0.2), with_evolution):
        monkeypatch.setitem(qd.ARMS, "own", qd.Arm("own", circuit, 1))
        settings = qd.Settings("own", n_qubits=2, n_layers=1, simulator="lightning.qubit")
        texts.add(qd.circuit_text(settings))
    assert len(texts) == 4
    assert all(text.startswith("RY(") for text in texts)


@pytest.mark.parametrize("channel", [qml.AmplitudeDamping, qml.PhaseDamping])
def test_channels_whose_strength_is_trained_have_no_shots(channel, monkeypatch):
    """PennyLane would take differences of measured values, over 1e-7."""

    def damped(angles, weights):
        qd.encode(angles)
        channel(torch.sigmoid(weights[0, 0, 0]), wires=0)

    monkeypatch.setitem(qd.ARMS, "own", qd.Arm("own", damped, 1))
    own = {"arm": "own", "n_qubits": 2, "n_layers": 1, "simulator": "default.mixed"}
    qd.check_circuit(qd.Settings(**own))
    with pytest.raises(qd.UserError, match="does not run the circuit .*analytic gradient"):
        qd.check_circuit(qd.Settings(**own, shots=1000))


@pytest.mark.parametrize("simulator", ["exact", "default.qubit", "lightning.qubit"])
def test_shots_can_be_switched_off(simulator):
    gate = qd.QuantumGate(8, n_qubits=3, n_layers=1, simulator=simulator, shots=10)
    angles = torch.randn(4, 3)
    gate.shots = None
    exact = qd.circuit_expectations(angles, gate.weights)
    for _ in range(2):
        assert torch.allclose(gate.expectations(angles), exact, atol=1e-6)


@pytest.mark.parametrize("simulator", ["exact", "default.qubit"])
@pytest.mark.parametrize("n_qubits", [2, 3])
def test_check_says_how_to_index_the_input(n_qubits, simulator, monkeypatch):
    def by_rows(angles, weights):
        for i, angle in enumerate(angles):
            qml.RY(angle, wires=i)

    monkeypatch.setitem(qd.ARMS, "rows", qd.Arm("indexed by rows", by_rows, 1))
    with pytest.raises(qd.UserError, match=r"angles\[\.\.\., i\]"):
        qd.check_circuit(qd.Settings("rows", n_qubits=n_qubits, simulator=simulator))


def test_check_takes_gradients_that_default_mixed_does_not_have(monkeypatch):
    """Of outcomes that never occur, such as 01 and 10 here, it divides 0 by 0."""

    def copied(angles, weights):
        qml.RY(angles[..., 0], wires=0)
        qml.CNOT([0, 1])
        qml.AmplitudeDamping(0.1, wires=0)

    monkeypatch.setitem(qd.ARMS, "copied", qd.Arm("copied", copied))
    own = {"arm": "copied", "n_qubits": 3, "n_layers": 1}
    qd.check_circuit(qd.Settings(**own))
    with pytest.raises(qd.UserError, match="values or gradients that are no numbers"):
        qd.check_circuit(qd.Settings(**own, simulator="default.mixed"))

    # A wrong value is still found, and a wrong gradient.
    exact_means = qd.exact_means

    def wrong_gradients(sites):
        means = exact_means(sites)
        return 1.01 * means - 0.01 * means.detach()

    for wrong in (lambda sites: 1.01 * exact_means(sites), wrong_gradients):
        with monkeypatch.context() as patch:
            patch.setattr(qd, "exact_means", wrong)
            with pytest.raises(qd.UserError, match="one of the two is wrong"):
                qd.check_circuit(qd.Settings(**own))


@pytest.mark.parametrize("simulator", ["exact", "default.qubit", "lightning.qubit"])
def test_a_circuit_without_inputs_is_a_control(simulator, monkeypatch):
    def constant(angles, weights):
        for i in range(weights.shape[1]):
            qml.RY(weights[0, i, 0], wires=i)

    monkeypatch.setitem(qd.ARMS, "constant", qd.Arm("no input", constant, 1))
    qd.check_circuit(qd.Settings("constant", n_qubits=3, simulator=simulator))
    gate = qd.QuantumGate(8, constant, 3, 1, 1, simulator=simulator)
    values = gate.expectations(torch.randn(4, 3))
    assert torch.allclose(values, gate.weights[0, :, 0].cos().expand(4, 3), atol=1e-6)


def test_an_arm_without_a_circuit_is_an_error(monkeypatch):
    monkeypatch.setitem(qd.ARMS, "forgotten", qd.Arm("RX, RZ"))
    with pytest.raises(qd.UserError, match="--arm forgotten: it has no circuit in ARMS"):
        qd.make_gate(8, qd.Settings("forgotten"))


@pytest.mark.parametrize(
    "one, other",
    [
        (lambda: qml.PauliRot(0.3, "XX", [0, 1]), lambda: qml.PauliRot(0.3, "YY", [0, 1])),
        (lambda: qml.ctrl(qml.S(1), 0), lambda: qml.ctrl(qml.S(1), 0, control_values=[0])),
        (lambda: qml.prod(qml.X(0), qml.H(0)), lambda: qml.prod(qml.S(0), qml.H(0))),
        (lambda: qml.PauliError("XX", 0.1, [0, 1]), lambda: qml.PauliError("ZZ", 0.1, [0, 1])),
        (
            lambda: qml.evolve(qml.Hermitian(np.diag([1.0, 2.0]), 0), 0.3),
            lambda: qml.evolve(qml.Hermitian(np.diag([1.0, 3.0]), 0), 0.3),
        ),
    ],
)
def test_the_record_tells_operations_of_one_name_apart(one, other):
    texts = []
    for operation in (one, other):

        def circuit(angles, weights, operation=operation):
            qd.encode(angles)
            operation()

        texts.append(str(qd.record(circuit, 2, 1, 1)[-1]))
    assert texts[0] != texts[1]


COMPUTED = {
    "x": lambda x: x,
    "detached": lambda x: x.detach(),
    "twice": lambda x: 2 * x,
    "twice the detached": lambda x: 2 * x.detach(),
    "size": torch.abs,
    "relu": torch.relu,
    "clamped": lambda x: x.clamp(0, 2 * math.pi),
    "turn": lambda x: x % (2 * math.pi),
    "product": lambda x: x * x.detach(),
    "square": lambda x: x * x,
    "branch": lambda x: x if x < 6.2 else -x,
}


def test_the_text_of_a_run_tells_computed_parameters_apart(monkeypatch):
    """A run continues with the same circuit alone, also on PennyLane's devices."""
    texts = set()
    for compute in COMPUTED.values():

        def circuit(angles, weights, compute=compute):
            qml.RX(compute(angles[..., 0]), wires=0)
            qml.RY(compute(weights[0, 1, 0]), wires=1)

        monkeypatch.setitem(qd.ARMS, "own", qd.Arm("", circuit, 1))
        text = qd.circuit_text(qd.Settings("own", n_qubits=2, n_layers=1))
        assert text == qd.circuit_text(qd.Settings("own", n_qubits=2, n_layers=1))
        texts.add(text)
    assert len(texts) == len(COMPUTED)
    assert "RX(x0) 0; RY(w1) 1" in texts


def test_a_circuit_that_takes_usual_numbers_alone_has_a_text(monkeypatch):
    def circuit(angles, weights):
        assert weights.abs().max() < 100
        qml.RX(angles[..., 0], wires=0)

    monkeypatch.setitem(qd.ARMS, "own", qd.Arm("", circuit, 1))
    assert qd.circuit_text(qd.Settings("own", n_qubits=2, n_layers=1)) == "RX(x0) 0"
