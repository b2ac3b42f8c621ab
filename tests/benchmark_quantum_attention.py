"""What the exact quantum layer costs, everything side by side in one run. Not a test.

    python tests/benchmark_quantum_attention.py                 # cost.csv, about five minutes
    python tests/benchmark_quantum_attention.py --trainability  # trainability.csv and .png instead
    python tests/benchmark_quantum_attention.py --peers         # peers.csv instead

Batch 64, 16 qubits, 3 layers unless said; medians over interleaved repeats.
"""

import argparse
import csv
import itertools
import multiprocessing
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import quantum_diffusion_mnist as mnist

BATCH, QUBITS, LAYERS = 64, 16, 3


def medians(functions: dict, repeats: int) -> dict:
    """Median seconds of each function; they take turns, after one call to warm up."""
    times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def training_step(arm: str, channels: int = 1, **conditions):
    """The script's own training step, drawing the batch included."""
    images = torch.randint(256, (6131, channels, 28, 28), dtype=torch.uint8)
    settings = mnist.Settings(arm, batch_size=BATCH, **conditions)
    return mnist.Trainer(settings, images, Path("no checkpoint")).step


def muon_step():
    """What Muon adds to a step."""
    weights = [p for p in mnist.UNet(1, mnist.Settings()).parameters() if p.ndim == 4][1:-1]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return lambda: mnist.muon_step(weights, [p.grad for p in weights], 1e-3)


def convolutions():
    """Forward and backward of the U-Net's convolutions alone, on inputs of their shapes."""
    model, calls = mnist.UNet(1, mnist.Settings()), []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            layer.register_forward_hook(lambda *call: calls.append(call))
    model(torch.randn(BATCH, 1, 28, 28), torch.zeros(BATCH, dtype=torch.long))
    for layer, _, _ in calls:
        layer._forward_hooks.clear()

    def run():
        for layer, (x,), output in calls:
            x = x.detach().requires_grad_(layer is not model.stem)  # no gradient of the image
            layer(x).backward(torch.ones_like(output))

    return run


def sampling_step(arm: str, batch: int):
    """One evaluation of the network in sampling."""
    model, x = mnist.UNet(1, mnist.Settings(arm)), torch.randn(batch, 1, 28, 28)
    return torch.no_grad()(lambda: model(x, torch.full((batch,), 500)))


def layer(simulator: str, qubits: int = QUBITS, layers: int = LAYERS):
    """Forward and backward of the circuit alone."""
    torch.manual_seed(0)
    settings = mnist.Settings("quantum", n_qubits=qubits, n_layers=layers, simulator=simulator)
    gate = mnist.QuantumAttention(128, settings)
    angles = torch.randn(BATCH, qubits, requires_grad=True)
    return lambda: gate.expectations(angles).square().sum().backward()


def peak(queue, simulator: str, calls: int):
    """In a process of its own: seconds of the best call and megabytes it added to the peak."""
    call = layer(simulator)
    layer(simulator, 2, 1)()  # imports and thread pools are not the layer's memory
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queue.put((statistics.median(seconds), (after - before) / 1024))


def state_vector(xp, angles, weights):
    """<Z_i> (B, n) by plain state vectors. xp: torch or jax.numpy; weights: (L, n, 2)."""
    n, state = angles.shape[1], xp.ones_like(angles[:, :1]) + 0j

    def pairs(i, *axes):  # the state's amplitudes, with qubit i, or i and i + 1, on an axis
        return state.reshape((len(angles), 2**i, *axes, -1))

    for i in range(n):  # RY(x)|0>
        cos, sin = (f(angles[:, i] / 2) for f in (xp.cos, xp.sin))
        state = (state[:, :, None] * xp.stack([cos, sin], 1)[:, None]).reshape(len(angles), -1)
    for layer in weights:
        for i in range(n):
            cos, sin = (f(layer[i, 1] / 2) for f in (xp.cos, xp.sin))
            turn = xp.exp(0.5j * layer[i, 0])
            zero, one = pairs(i, 2)[:, :, 0] / turn, pairs(i, 2)[:, :, 1] * turn
            state = xp.stack([cos * zero - sin * one, sin * zero + cos * one], 2)
        for i in range(n - 1):
            zero, one = pairs(i, 2, 2)[:, :, 0], pairs(i, 2, 2)[:, :, 1]
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
    """peers.csv: forward and backward of the circuit by other simulators, and the exact
    layer after each. What is compared first: values and gradients."""
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(BATCH, QUBITS, generator=generator)
    weights = 2 * torch.pi * torch.rand(LAYERS, QUBITS, 2, generator=generator)
    settings = mnist.Settings("quantum")
    exact = by_torch(lambda *both: mnist.circuit_expectations(*both, settings))
    true, rows = exact(angles, weights), []
    for name, make in PEERS.items():
        try:
            peer, start = make(), time.perf_counter()
        except ImportError as error:
            print(f"{name}: skipped, no package {error.name}")
            continue
        found = peer(angles, weights)
        first = time.perf_counter() - start  # compiling included
        errors = [(a - b).abs().max().item() for a, b in zip(found, true, strict=True)]
        # One after the other: threads that spin and freed memory would slow a call between two
        seconds, ours = (
            medians({f: partial(f, angles, weights)}, n)[f] for f, n in ((peer, 5), (exact, 40))
        )
        numbers = (1e3 * seconds, seconds / ours, first, max(errors[:1]), max(errors[1:]))
        rows.append((name, *(f"{x:.4g}" for x in numbers)))
        print(*rows[-1], sep=", ", flush=True)
    columns = ("simulator", "ms", "times the exact layer's", "first call, s")
    columns += ("largest difference of a value", "of a gradient")
    with (out / "peers.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


ANSATZE = {"quantum": 2, "product": 2, "published": 1}  # rotations per layer
NOISE = {"ideal": (0.0, 0.0), "noise": (0.001, 0.01)}


def gradient_variances(n: int, layers: int, ansatz: str, noise: str, circuits: int) -> dict:
    """Variance of the circuit's gradients over random circuits, each with an input of its own.

    Weights are uniform in 0..2 pi, as at the start of training, inputs in -pi..pi. Returns the mean
    over all weights, or all inputs, of the variance of d<Z_last>/d(.), and of the sum over i of the
    variances of d<Z_i>/d(.), by one probe with random signs ("all").
    """
    settings = mnist.Settings(ansatz, gate_noise=NOISE[noise])
    generator = torch.Generator().manual_seed(0)
    squares = dict.fromkeys(itertools.product(("last", "all"), ("weights", "inputs")), 0.0)
    for _ in range(circuits):
        weights = torch.rand(layers, n, ANSATZE[ansatz], dtype=torch.float64, generator=generator)
        weights = (weights * 2 * torch.pi).requires_grad_()
        angles = torch.rand(1, n, dtype=torch.float64, generator=generator)
        angles = ((angles * 2 - 1) * torch.pi).requires_grad_()
        values = mnist.circuit_expectations(angles, weights, settings)[0]
        signs = torch.randint(2, (n,), generator=generator) * 2 - 1.0
        for observable, value in (("last", values[-1]), ("all", values @ signs.double())):
            gradients = torch.autograd.grad(value, (weights, angles), retain_graph=True)
            for name, gradient in zip(("weights", "inputs"), gradients, strict=True):
                squares[observable, name] += gradient.square().mean().item() / circuits
    return squares  # the means of the gradients are zero: every angle is uniform over a period


def trainability(out: Path) -> None:
    """trainability.csv and .png: the variance of gradients against qubits and layers."""
    start, rows = time.perf_counter(), []
    qubits, depths = [2, 4, 8, 16, 32, 64, 128], [1, 2, 3, 4]
    for ansatz, noise, layers, n in itertools.product(ANSATZE, NOISE, depths, qubits):
        circuits = min(64, 2048 // n)  # more qubits are more parameters to average over
        variances = gradient_variances(n, layers, ansatz, noise, circuits)
        rows += [(ansatz, noise, layers, n, *key, v, circuits) for key, v in variances.items()]
    with (out / "trainability.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = ["ansatz", "noise", "layers", "qubits", "observable", "parameters"]
        writer.writerows([[*columns, "variance", "circuits"], *rows])
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey="row")
    colours = ["#56b4e9", "#0072b2", "#e69f00", "#d55e00"]
    for line, observable in zip(panels, ("all", "last"), strict=True):
        for axes, ansatz in zip(line, ANSATZE, strict=True):
            parameters = "inputs" if ansatz == "published" else "weights"
            for layers, noise in itertools.product(depths, NOISE):
                chosen = (ansatz, noise, layers)
                points = [r for r in rows if r[:3] == chosen and r[4:6] == (observable, parameters)]
                style = {"color": colours[layers - 1], "ls": "-" if noise == "ideal" else ":"}
                label = f"{layers} layer{'s' * (layers > 1)}" if noise == "ideal" else None
                axes.plot([r[3] for r in points], [r[6] for r in points], label=label, **style)
            axes.set(xscale="log", yscale="log", xticks=qubits)
            axes.set_xticks(qubits, map(str, qubits))
            axes.set_xticks([], minor=True)
            if observable == "all":
                note = "inputs (weights: zero)" if ansatz == "published" else "weights"
                axes.set_title(f"{ansatz}: {note}")
            else:
                axes.set_xlabel("qubits")
        what = {"all": "all $\\langle Z_i \\rangle$", "last": "the last $\\langle Z_i \\rangle$"}
        line[0].set_ylabel(f"gradient variance of {what[observable]}")
    panels[0, 0].legend(frameon=False, fontsize=8, title="dotted: with noise", title_fontsize=8)
    figure.savefig(out / "trainability.png", dpi=150)
    print(f"{out}/trainability.csv and .png: {time.perf_counter() - start:.0f} s")


def cost(out: Path) -> None:
    """cost.csv: what the layer costs beside no layer, other gates and other simulators."""
    rows = []

    def add(what: str, value: float, unit: str) -> None:
        rows.append((what, f"{value:.4g}", unit))
        print(f"{what:60} {value:10.4g} {unit}", flush=True)

    for channels, data in ((1, ""), (3, ", PathMNIST")):
        steps = {arm: training_step(arm, channels) for arm in ("classical", "matched", "quantum")}
        if channels == 1:
            noise = {"gate_noise": (0.001, 0.01)}
            steps["quantum with noise"] = training_step("quantum", **noise)
            steps["quantum with 1,000 shots"] = training_step("quantum", shots=1000)
            steps["its convolutions alone"] = convolutions()
            steps["its Muon alone"] = muon_step()
        times = medians(steps, 40)
        add(f"training step classical{data}", 1e3 * times["classical"], "ms")
        for name in [*times][1:]:
            add(f"training step {name} / classical{data}", times[name] / times["classical"], "")

    context = multiprocessing.get_context("spawn")
    exact = None
    for simulator, calls in (("exact", 50), ("lightning.qubit", 2), ("default.qubit", 1)):
        queue = context.Queue()
        process = context.Process(target=peak, args=(queue, simulator, calls))
        process.start()
        seconds, megabytes = queue.get()
        process.join()
        exact = exact or seconds
        add(f"layer {simulator}, forward and backward", 1e3 * seconds, "ms")
        if simulator != "exact":
            add(f"layer {simulator} / exact", seconds / exact, "")
        add(f"layer {simulator}, memory added at the peak", megabytes, "MiB")

    sizes = [(n, LAYERS) for n in (16, 32, 64, 128)] + [(QUBITS, n) for n in (1, 2, 3, 4)]
    for (n, depth), seconds in medians({s: layer("exact", *s) for s in sizes}, 20).items():
        add(f"layer exact, {n} qubits, {depth} layers", 1e3 * seconds, "ms")
    for batch in (64, 5):
        times = medians({a: sampling_step(a, batch) for a in ("classical", "quantum")}, 60)
        ratio = times["quantum"] / times["classical"]
        add(f"sampling step quantum / classical, batch {batch}", ratio, "")
    machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    rows.append(("machine", machine, ""))
    with (out / "cost.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("what", "value", "unit"), *rows])


def processor() -> str:
    """The CPU's model and family, from Linux's /proc/cpuinfo."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    known = dict(reversed([map(str.strip, line.split(":", 1)) for line in lines if ":" in line]))
    family, model = known.get("cpu family"), known.get("model")
    return f"{known.get('model name')} (family {family}, model {model})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "draw the variance of the circuit's gradients instead"
    parser.add_argument("--trainability", action="store_true", help=text)
    text = "time other simulators, if installed (tensorcircuit-ng, jax, deepquantum), instead"
    parser.add_argument("--peers", action="store_true", help=text)
    text = "where the files go (default: result_gif/results)"
    parser.add_argument("--out", type=Path, default=Path("result_gif/results"), help=text)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (peers if args.peers else trainability if args.trainability else cost)(args.out)


if __name__ == "__main__":
    main()
