"""What circuits cost, everything side by side in one run. Not a test.

    OMP_NUM_THREADS=1 python tests/benchmark_circuits.py     # cost.csv, about ten minutes
    python tests/benchmark_circuits.py --peers               # peers.csv instead: other simulators

Batch 64, 16 qubits, 3 layers unless said; medians over interleaved repeats, but for PennyLane's
devices, of which one call is timed.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import quantum_diffusion_mnist as mnist
import quantum_diffusion_pathmnist as pathmnist

BATCH = 64
QUBITS = 16
LAYERS = 3
EXACT_ARMS = [
    "matched", "se", "quantum", "published", "product", "frozen", "cz", "ising", "brickwork",
    "reupload",
]  # fmt: skip
CIRCUIT_ARMS = [name for name, arm in mnist.ARMS.items() if arm.circuit is not None]


def medians(functions: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each function; they take turns, after one call to warm up."""
    times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def training_step(arm: str, script: ModuleType = mnist, **conditions: object) -> Callable[[], None]:
    """A training step as a script's loop makes it, without checkpoints."""
    channels = 1 if script is mnist else 3
    settings = script.Settings(arm, batch_size=BATCH, **conditions)
    images = torch.randint(256, (BATCH, channels, 28, 28), dtype=torch.uint8)
    diffusion = script.GaussianDiffusion(settings.timesteps)
    model = script.make_unet(channels, settings)
    average = script.make_unet(channels, settings)
    optimizers = script.make_optimizers(model, settings)
    shots = [script.random_stream(0, k) for k in range(BATCH)] if settings.shots else []

    def step() -> None:
        x0 = script.to_float(images)
        t, noise = script.training_noise(settings, x0, 0)
        x_t, v = diffusion.q_sample(x0, t, noise)
        loss = F.mse_loss(model(x_t, t, generators=shots), v)
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(new, 0.005)

    return step


def muon_step() -> Callable[[], None]:
    """What Muon adds to a step."""
    settings = mnist.Settings()
    model = mnist.make_unet(1, settings)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    return mnist.make_optimizers(model, settings)[1].step


def sampling_step(arm: str, batch: int) -> Callable[[], Tensor]:
    """One evaluation of the network in sampling."""
    model = mnist.make_unet(1, mnist.Settings(arm))
    x = torch.randn(batch, 1, 28, 28)
    t = torch.full((batch,), 500)
    return torch.no_grad()(lambda: model(x, t))


def circuit_call(
    arm: str, simulator: str, qubits: int = QUBITS, layers: int = LAYERS
) -> Callable[[], None]:
    """Forward and backward of the circuit alone."""
    torch.manual_seed(0)
    known = mnist.ARMS[arm]
    gate = mnist.QuantumGate(
        128, known.circuit, qubits, layers, known.n_weights, simulator=simulator
    )
    angles = torch.randn(BATCH, qubits, requires_grad=True)
    return lambda: gate.expectations(angles).square().sum().backward()


def cost(out: Path) -> None:
    """cost.csv: what a circuit costs beside no gate, other gates and other simulators."""
    rows = []

    def add(what: str, value: float, unit: str) -> None:
        rows.append((what, f"{value:.4g}", unit))
        print(f"{what:60} {value:10.4g} {unit}", flush=True)

    # A training step, as a ratio to one without a gate.
    steps = {arm: training_step(arm) for arm in ["classical", *EXACT_ARMS]}
    steps["quantum with noise"] = training_step("quantum", gate_noise=(0.001, 0.01))
    steps["quantum with 1,000 shots"] = training_step("quantum", shots=1000)
    steps["its Muon alone"] = muon_step()
    add_ratios(add, medians(steps, 40), "")
    steps = {arm: training_step(arm, pathmnist) for arm in ("classical", "matched", "quantum")}
    add_ratios(add, medians(steps, 40), ", PathMNIST")

    # The circuit alone, exactly and on PennyLane's devices.
    exact = {arm: circuit_call(arm, "exact") for arm in CIRCUIT_ARMS if arm in EXACT_ARMS}
    exact = medians(exact, 40)
    for arm, seconds in exact.items():
        add(f"circuit {arm}, exact", 1e3 * seconds, "ms")
    for arm in CIRCUIT_ARMS:
        seconds = medians({arm: circuit_call(arm, "lightning.qubit")}, 1)[arm]
        add(f"circuit {arm}, lightning.qubit", seconds, "s")
        if arm in exact:
            add(f"circuit {arm}, lightning.qubit / exact", seconds / exact[arm], "")
    start = time.perf_counter()
    circuit_call("quantum", "default.qubit")()
    seconds = time.perf_counter() - start
    add("circuit quantum, default.qubit", seconds, "s")
    add("circuit quantum, default.qubit / exact", seconds / exact["quantum"], "")

    # Other sizes, and sampling.
    sizes = [(n, LAYERS) for n in (16, 32, 64, 128)] + [(QUBITS, n) for n in (1, 2, 3, 4)]
    calls = {
        f"circuit quantum, exact, {n} qubits, {layers} layers": circuit_call(
            "quantum", "exact", n, layers
        )
        for n, layers in sizes
    }
    for name, seconds in medians(calls, 10).items():
        add(name, 1e3 * seconds, "ms")
    for batch in (64, 5):
        times = medians({arm: sampling_step(arm, batch) for arm in ("classical", "quantum")}, 60)
        ratio = times["quantum"] / times["classical"]
        add(f"sampling step quantum / classical, batch {batch}", ratio, "")

    machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    rows.append(("machine", machine, ""))
    with (out / "cost.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("what", "value", "unit"), *rows])


def add_ratios(add: Callable, times: dict[str, float], data: str) -> None:
    """Rows of training steps: the classical one in ms, all others as ratios to it."""
    add(f"training step classical{data}", 1e3 * times["classical"], "ms")
    for name, seconds in times.items():
        if name != "classical":
            add(f"training step {name} / classical{data}", seconds / times["classical"], "")


def processor() -> str:
    """The CPU's model and family, from Linux's /proc/cpuinfo."""
    known = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        known.setdefault(key.strip(), value.strip())
    return f"{known['model name']} (family {known['cpu family']}, model {known['model']})"


# ------------------------------------------------------------------------- other simulators


def state_vector(xp, angles, weights):
    """<Z_i> (B, n) by plain state vectors. xp: torch or jax.numpy; weights: (L, n, 2)."""
    n = angles.shape[1]
    state = xp.ones_like(angles[:, :1]) + 0j

    def pairs(i, *axes):  # the state's amplitudes, with qubit i, or i and i + 1, on an axis
        return state.reshape((len(angles), 2**i, *axes, -1))

    # RY(x)|0> on each qubit.
    for i in range(n):
        half = angles[:, i] / 2
        qubit = xp.stack([xp.cos(half), xp.sin(half)], 1)  # (B, 2)
        state = (state[:, :, None] * qubit[:, None]).reshape(len(angles), -1)

    for layer in weights:
        # RZ, then RY, on each qubit.
        for i in range(n):
            turn = xp.exp(0.5j * layer[i, 0])
            zero = pairs(i, 2)[:, :, 0] / turn
            one = pairs(i, 2)[:, :, 1] * turn
            cos = xp.cos(layer[i, 1] / 2)
            sin = xp.sin(layer[i, 1] / 2)
            state = xp.stack([cos * zero - sin * one, sin * zero + cos * one], 2)

        # CNOT on each two neighbours.
        for i in range(n - 1):
            zero = pairs(i, 2, 2)[:, :, 0]
            one = pairs(i, 2, 2)[:, :, 1]
            state = xp.stack([zero, xp.flip(one, (2,))], 2)

    odds = [(abs(pairs(i, 2)) ** 2).sum(3).sum(1) for i in range(n)]
    return xp.stack([p[:, 0] - p[:, 1] for p in odds], 1)


def by_torch(function):
    """function(angles, weights) -> <Z_i>, as a call with the loss's gradients."""

    def call(angles, weights):
        both = [x.clone().requires_grad_() for x in (angles, weights)]
        values = function(*both)
        return values.detach(), *torch.autograd.grad(values.square().sum(), both)

    return call


def by_jax(function):
    """The same for a function of JAX, compiled."""
    import jax

    def loss(angles, weights):
        values = function(angles, weights)
        return (values**2).sum(), values

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

    def call(angles, weights):
        (_, values), gradients = compiled(*(jax.numpy.asarray(x) for x in (angles, weights)))
        return [torch.from_numpy(numpy.array(x)) for x in (values, *gradients)]

    return call


def jax_state_vector():
    import jax

    return by_jax(partial(state_vector, jax.numpy))


def tensorcircuit(backend):
    import tensorcircuit

    library = tensorcircuit.set_backend(backend)

    def one(angles, weights):
        n = len(angles)
        circuit = tensorcircuit.Circuit(n)
        for i in range(n):
            circuit.ry(i, theta=angles[i])
        for layer in weights:
            for i in range(n):
                circuit.rz(i, theta=layer[i, 0])
                circuit.ry(i, theta=layer[i, 1])
            for i in range(n - 1):
                circuit.cnot(i, i + 1)
        # JAX: each value a contraction of its own; torch: from the state
        reuse = backend == "pytorch"
        values = [circuit.expectation_ps(z=[i], reuse=reuse) for i in range(n)]
        return library.real(library.stack(values))

    every = library.vmap(one, vectorized_argnums=0)
    return by_jax(every) if backend == "jax" else by_torch(every)


def deepquantum():
    import deepquantum

    def values(angles, weights):
        n = angles.shape[1]
        circuit = deepquantum.QubitCircuit(n, mps=True, chi=8)
        circuit.rylayer(encode=True)
        for _ in weights:
            for i in range(n):
                circuit.rz(i, encode=True)
                circuit.ry(i, encode=True)
            for i in range(n - 1):
                circuit.cnot(i, i + 1)
        for i in range(n):
            circuit.observable(i, "z")
        circuit(data=torch.cat([angles, weights.flatten().expand(len(angles), -1)], 1))
        return circuit.expectation()

    return by_torch(values)


PEERS = {
    "tensorcircuit-ng, JAX, exact contraction": partial(tensorcircuit, "jax"),
    "tensorcircuit-ng, torch, state vector": partial(tensorcircuit, "pytorch"),
    "JAX, state vector": jax_state_vector,
    "torch, state vector": lambda: by_torch(partial(state_vector, torch)),
    "deepquantum, MPS, bond 8": deepquantum,
}


def peers(out: Path) -> None:
    """peers.csv: forward and backward of the circuit by other simulators.

    The exact layer is timed after each. Values and gradients are compared first.
    """
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(BATCH, QUBITS, generator=generator)
    weights = 2 * torch.pi * torch.rand(LAYERS, QUBITS, 2, generator=generator)
    exact = by_torch(mnist.circuit_expectations)
    true = exact(angles, weights)
    rows = []
    for name, make in PEERS.items():
        try:
            peer = make()
        except ImportError as error:
            print(f"{name}: skipped, no package {error.name}")
            continue
        start = time.perf_counter()
        found = peer(angles, weights)
        first = time.perf_counter() - start  # compiling included
        errors = [(a - b).abs().max().item() for a, b in zip(found, true, strict=True)]
        of_value, *of_gradients = errors

        # One after the other: threads that spin and freed memory would slow a call between two.
        seconds = medians({name: partial(peer, angles, weights)}, 5)[name]
        ours = medians({name: partial(exact, angles, weights)}, 40)[name]
        numbers = (1e3 * seconds, seconds / ours, first, of_value, max(of_gradients))
        rows.append((name, *(f"{x:.4g}" for x in numbers)))
        print(*rows[-1], sep=", ", flush=True)
    columns = ("simulator", "ms", "times the exact layer's", "first call, s")
    columns += ("largest difference of a value", "of a gradient")
    with (out / "peers.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "time other simulators, if installed (tensorcircuit-ng, jax, deepquantum), instead"
    parser.add_argument("--peers", action="store_true", help=text)
    text = "where the files go (default: runs/cost)"
    parser.add_argument("--out", type=Path, default=Path("runs/cost"), help=text)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.peers:
        peers(args.out)
    else:
        cost(args.out)


if __name__ == "__main__":
    main()
