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
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import quantum_diffusion_mnist as mnist

ARMS = ("quantum", "product", "published")
NOISE = {"ideal": (0.0, 0.0), "noise": (0.001, 0.01)}
QUBITS = [2, 4, 8, 16, 32, 64, 128]
LAYERS = [1, 2, 3, 4]
COLOURS = ["#56b4e9", "#0072b2", "#e69f00", "#d55e00"]  # one a number of layers
COLUMNS = [
    "ansatz", "noise", "layers", "qubits", "observable", "parameters", "variance", "circuits",
]  # fmt: skip


def gradient_variances(n: int, layers: int, arm: str, noise: str, circuits: int) -> dict:
    """Variance of a circuit's gradients over random weights, each with an input of its own.

    Weights are uniform in 0..2 pi, as at the start of training, inputs in -pi..pi. Returns the mean
    over all weights, or all inputs, of the variance of d<Z_last>/d(.), and of the sum over i of the
    variances of d<Z_i>/d(.), by one probe with random signs ("all").
    """
    circuit = mnist.with_noise(mnist.ARMS[arm].circuit, NOISE[noise])
    shape = (layers, n, mnist.ARMS[arm].n_weights)
    generator = torch.Generator().manual_seed(0)
    variances = dict.fromkeys(itertools.product(("last", "all"), ("weights", "inputs")), 0.0)
    for _ in range(circuits):
        # A random circuit and input.
        weights = torch.rand(shape, dtype=torch.float64, generator=generator) * 2 * torch.pi
        angles = torch.rand(1, n, dtype=torch.float64, generator=generator) * 2 - 1
        angles = angles * torch.pi
        weights.requires_grad_()
        angles.requires_grad_()

        # Its gradients, whose means over all circuits are zero: every angle is uniform.
        values = mnist.circuit_expectations(angles, weights, circuit)[0]
        signs = torch.randint(2, (n,), generator=generator) * 2 - 1.0
        for observable, value in (("last", values[-1]), ("all", values @ signs.double())):
            gradients = torch.autograd.grad(value, (weights, angles), retain_graph=True)
            for name, gradient in zip(("weights", "inputs"), gradients, strict=True):
                variances[observable, name] += gradient.square().mean().item() / circuits
    return variances


def measure() -> list[dict]:
    """The rows of trainability.csv."""
    rows = []
    for arm, noise, layers, n in itertools.product(ARMS, NOISE, LAYERS, QUBITS):
        circuits = min(64, 2048 // n)  # more qubits are more parameters to average over
        variances = gradient_variances(n, layers, arm, noise, circuits)
        for (observable, parameters), variance in variances.items():
            values = (arm, noise, layers, n, observable, parameters, variance, circuits)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def draw(rows: list[dict]) -> Figure:
    """A column a circuit; above the sum over all qubits, below the last one alone."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey="row")
    names = {"all": "all $\\langle Z_i \\rangle$", "last": "the last $\\langle Z_i \\rangle$"}
    for line, observable in zip(panels, ("all", "last"), strict=True):
        line[0].set_ylabel(f"gradient variance of {names[observable]}")
        for axes, arm in zip(line, ARMS, strict=True):
            # The published circuit's weights have no gradient at all.
            parameters = "inputs" if arm == "published" else "weights"
            chosen = [
                row
                for row in rows
                if (row["ansatz"], row["observable"], row["parameters"])
                == (arm, observable, parameters)
            ]
            draw_lines(axes, chosen)
            if observable == "all":
                note = "inputs (weights: zero)" if arm == "published" else "weights"
                axes.set_title(f"{arm}: {note}")
            else:
                axes.set_xlabel("qubits")
    panels[0, 0].legend(frameon=False, fontsize=8, title="dotted: with noise", title_fontsize=8)
    return figure


def draw_lines(axes: Axes, rows: list[dict]) -> None:
    """A line over the qubits for each number of layers, dotted with noise."""
    for layers, noise in itertools.product(LAYERS, NOISE):
        points = [row for row in rows if (row["layers"], row["noise"]) == (layers, noise)]
        axes.plot(
            [row["qubits"] for row in points],
            [row["variance"] for row in points],
            color=COLOURS[layers - 1],
            linestyle="-" if noise == "ideal" else ":",
            label=f"{layers} layer{'s' * (layers > 1)}" if noise == "ideal" else None,
        )
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(QUBITS, map(str, QUBITS))
    axes.set_xticks([], minor=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "where the files go (default: runs/trainability)"
    parser.add_argument("--out", type=Path, default=Path("runs/trainability"), help=text)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    rows = measure()
    with (out / "trainability.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows).savefig(out / "trainability.png", dpi=150)
    print(f"{out}/trainability.csv and .png: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
