"""The variance of the circuits' gradients against qubits and layers. Not a test.

    python tests/trainability.py    # trainability.csv and .png

A variance that falls exponentially with the qubits is a barren plateau (McClean et al. 2018).
"""

import argparse
import csv
import itertools
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import quantum_diffusion_mnist as mnist

ANSATZE = ("quantum", "product", "published")
NOISE = {"ideal": (0.0, 0.0), "noise": (0.001, 0.01)}


def gradient_variances(n: int, layers: int, ansatz: str, noise: str, circuits: int) -> dict:
    """Variance of the circuit's gradients over random circuits, each with an input of its own.

    Weights are uniform in 0..2 pi, as at the start of training, inputs in -pi..pi. Returns the mean
    over all weights, or all inputs, of the variance of d<Z_last>/d(.), and of the sum over i of the
    variances of d<Z_i>/d(.), by one probe with random signs ("all").
    """
    circuit = mnist.with_noise(mnist.ARMS[ansatz].circuit, NOISE[noise])
    n_weights = mnist.ARMS[ansatz].n_weights
    generator = torch.Generator().manual_seed(0)
    squares = dict.fromkeys(itertools.product(("last", "all"), ("weights", "inputs")), 0.0)
    for _ in range(circuits):
        weights = torch.rand(layers, n, n_weights, dtype=torch.float64, generator=generator)
        weights = (weights * 2 * torch.pi).requires_grad_()
        angles = torch.rand(1, n, dtype=torch.float64, generator=generator)
        angles = ((angles * 2 - 1) * torch.pi).requires_grad_()
        values = mnist.circuit_expectations(angles, weights, circuit)[0]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "where the files go (default: result_gif/results)"
    parser.add_argument("--out", type=Path, default=Path("result_gif/results"), help=text)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    trainability(args.out)


if __name__ == "__main__":
    main()
