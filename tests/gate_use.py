"""What trained models do with their gate: FID without it and with others, its values, its qubits.

    python tests/gate_use.py runs/quantum_mnist3_nall_seed0 runs/quantum_mnist3_nall_seed1 --out DIR

Reads finished single-class runs of arms whose gate has weights (not ``se``) and trains nothing. Of
a digit and arm with one seed there is no other seed's gate, and its FID is left empty.
``gate_use.csv`` in DIR gets a row a run; rows of other runs that are there stay, as run folders may
be lost with a machine, and so do FIDs with a gate that is not given again. ``gate_use.png`` shows
all rows. Not a test.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import cal_fid_ssim as evaluation
import quantum_diffusion_mnist as qd

N_IMAGES = 200  # of each run and kind of gate
N_WATCHED = 64  # images whose gate values are recorded

TOLD_BY = ["run", "steps"]  # a row

# Kinds of gate at sampling, by the column with their FID.
KINDS = {
    "fid": "its own",
    "fid_off": "switched off",
    "fid_mean": "mean of\nimages",
    "fid_other": "another\nseed's",
}


class MeanGate(torch.nn.Module):
    """A gate that looks at no image: given values (steps, C), one row after another."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values
        self.calls = 0

    def forward(self, x: Tensor, generators: object = None) -> Tensor:
        g = self.values[self.calls % len(self.values)]
        self.calls += 1
        return g.expand(len(x), -1)


def sampled(settings: qd.Settings, model: qd.UNet, n: int) -> Tensor:
    """The first n images of a run, (n, 1, 28, 28) uint8, in batches of 50."""
    parts = []
    for first in range(0, n, 50):
        numbers = range(first, min(first + 50, n))
        parts.append(qd.sample_images(settings, model, "image", numbers, settings.sample_steps))
    return torch.cat(parts)


def watched(settings: qd.Settings, model: qd.UNet) -> tuple[Tensor, Tensor]:
    """The gate's values g (steps, B, C) and the circuit's <Z_i> (steps, B, n) while it samples."""
    values = []
    means = []
    hooks = [
        model.gate.register_forward_hook(lambda _gate, _inputs, g: values.append(g)),
        model.gate.project_out.register_forward_hook(
            lambda _l, inputs, _g: means.append(inputs[0])
        ),
    ]
    sampled(settings, model, N_WATCHED)
    for hook in hooks:
        hook.remove()

    # One batch after another was sampled: join their images, step by step.
    wanted = min(settings.sample_steps, settings.timesteps)
    steps = len(qd.GaussianDiffusion(settings.timesteps).sampling_levels(wanted))

    def joined(recorded: list[Tensor]) -> Tensor:
        by_step = [torch.cat(recorded[k::steps]) for k in range(steps)]
        return torch.stack(by_step).detach()

    return joined(values), joined(means)


def spread(values: Tensor) -> Tensor:
    """The standard deviation over images and timesteps of (steps, B, k): (k,)."""
    return values.flatten(0, 1).std(dim=0)


def measure(
    folder: Path, other_gate: torch.nn.Module | None, frechet: Callable[[Tensor], float]
) -> dict[str, object]:
    """A row of ``gate_use.csv``. frechet: the FID of images (N, 1, 28, 28) uint8 of its class."""
    settings, model = qd.load_run(folder)
    gate = model.gate
    row = {
        "run": folder.name,
        "arm": settings.arm,
        "label": settings.classes[0],
        "seed": settings.seed,
        "steps": settings.steps,
        "n": N_IMAGES,
    }

    # The gate's values, and their mean over images (steps, C).
    values, means = watched(settings, model)
    by_channel = values.mean(dim=1)

    # The FID with each kind of gate, from the same noise.
    kinds = {"fid": gate, "fid_off": None, "fid_mean": MeanGate(by_channel)}
    kinds["fid_other"] = other_gate
    for column, kind in kinds.items():
        model.gate = kind
        is_there = column != "fid_other" or kind is not None
        row[column] = frechet(sampled(settings, model, N_IMAGES)) if is_there else np.nan
    model.gate = gate

    # At every timestep: mean and standard deviation of these means over the channels, their size,
    # and the spread over images.
    row["mean"] = " ".join(f"{x:.4f}" for x in by_channel.mean(dim=1))
    row["over_channels"] = " ".join(f"{x:.4f}" for x in by_channel.std(dim=1))
    row["size"] = " ".join(f"{x:.4f}" for x in by_channel.abs().mean(dim=1))
    row["spread"] = " ".join(f"{x:.4f}" for x in values.std(dim=1).mean(dim=1))

    # How much each unit varies, trained and with the circuit as it was at the start.
    row["units"] = " ".join(f"{x:.4f}" for x in spread(means))
    start = qd.make_unet(1, settings).gate
    with torch.no_grad():
        model.gate.weights.copy_(start.weights)
    row["units_start"] = " ".join(f"{x:.4f}" for x in spread(watched(settings, model)[1]))
    return row


def joined(known: pd.DataFrame | None, new: pd.DataFrame) -> pd.DataFrame:
    """The rows of an earlier table and new ones, which replace those of the same run.

    An FID with another seed's gate stays where it was not measured now, if the features are equal.
    """
    if known is None:
        return new
    both = new.merge(known, on=[*TOLD_BY, "features"], how="left", suffixes=("", "_known"))
    new = new.assign(fid_other=new["fid_other"].fillna(both["fid_other_known"]))
    is_replaced = known.set_index(TOLD_BY).index.isin(new.set_index(TOLD_BY).index)
    return pd.concat([known[~is_replaced], new], ignore_index=True)


def numbers(cells: pd.Series) -> np.ndarray:
    """Cells of numbers with spaces between as an array (cells, numbers)."""
    return np.array([[float(word) for word in cell.split()] for cell in cells])


def draw(rows: pd.DataFrame) -> Figure:
    """Three panels: FID with each kind of gate; the gate over the timesteps; its circuit's qubits.

    The gate is shown as the factor 1 + g of the U-Net's features.

    FIDs are shown over that with the run's own gate, so that no two arms' are beside each other.
    """
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    arms = sorted(set(rows["arm"]))
    for arm, own in rows.groupby("arm"):
        colour = evaluation.colour_of(arm)

        # A dot a run, and the mean of a kind: not all runs have all kinds.
        ratios = own[[*KINDS]].div(own["fid"], axis=0)
        shift = 0.1 * arms.index(arm)
        for place, column in enumerate(KINDS):
            left.plot([place + shift] * len(own), ratios[column], ".", color=colour, alpha=0.3)
        left.plot(np.arange(len(KINDS)) + shift, ratios.mean(), "_", color=colour, markersize=14)
        left.plot([], [], "o", color=colour, label=arm)

        # A table of an earlier version lacks the means of some runs.
        known = own.dropna(subset=["mean", "over_channels"])
        if len(known) > 0:
            factor = 1 + numbers(known["mean"]).mean(axis=0)  # (steps,)
            band = numbers(known["over_channels"]).mean(axis=0)
            middle.plot(factor, color=colour)
            steps = range(len(factor))
            middle.fill_between(steps, factor - band, factor + band, color=colour, alpha=0.2)
        middle.plot(numbers(own["spread"]).mean(axis=0), ":", color=colour)
        if qd.ARMS[arm].circuit is not None:
            for column, style in (("units_start", "o:"), ("units", "o-")):
                values = numbers(own[column])  # (runs, qubits)
                right.plot(values.mean(axis=0), style, color=colour, markersize=3)

    left.set(
        ylabel=f"FID of {N_IMAGES} images / own gate's", yscale="log", xlabel="gate at sampling"
    )
    left.set_xticks(range(len(KINDS)), KINDS.values())
    left.tick_params(labelsize=7)
    left.yaxis.set_major_locator(LogLocator(base=2))
    left.yaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter("{x:g}")
    left.legend(frameon=False, fontsize=8)
    middle.set(xlabel="network evaluation, from noise to image", ylabel="factor 1 + g")
    middle.set_title("line, band: mean, SD of the channels; dots: SD of images", fontsize=8)
    right.set(xlabel="qubit", ylabel="spread of ⟨Z⟩", yscale="log")
    right.set_title("line: trained; dots: circuit as at the start", fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the runs and draws all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, help="best two or more seeds of each arm and digit"
    )
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="of the data set")
    parser.add_argument("--out", type=Path, required=True, help="of gate_use.csv and .png")
    args = parser.parse_args(argv)

    # Runs of a digit, arm and training in a ring: each gets the gate of the next seed.
    loaded = {folder: qd.load_run(folder) for folder in sorted(args.runs)}
    rings = {}
    for folder, (settings, model) in loaded.items():
        if settings.conditional:
            raise qd.UserError(f"{folder}: a conditional model; expected single classes")
        if model.gate is None or model.gate.weights is None:
            raise qd.UserError(f"{folder}: arm {settings.arm} has no weights inside its gate")
        kind = (settings.arm, settings.classes, settings.n_train, settings.steps)
        rings.setdefault(kind, []).append(folder)
    following = {}
    for ring in rings.values():
        following |= dict(zip(ring, [*ring[1:], ring[0]], strict=True))

    # Read before anything is measured.
    path = args.out / "gate_use.csv"
    known = None
    if path.exists():
        with qd.reading(path, "a table of this version"):
            known = pd.read_csv(path)
            known[[*TOLD_BY, "features", *KINDS]]

    source = next(iter(loaded.values()))[0].data
    options = ["_", "--data_dir", str(args.data_dir), "--features", "classifier"]
    evaluator = evaluation.Evaluator(
        evaluation.MNIST, source, evaluation.parse_options(options, evaluation.MNIST)
    )

    args.out.mkdir(parents=True, exist_ok=True)
    new = []
    for folder, (settings, _model) in loaded.items():
        reference = evaluator.real(settings.classes[0]).reference

        def frechet(images: Tensor, reference: evaluation.Sample = reference) -> float:
            """The FID against all training images of the class."""
            features = evaluator.sample(images).features
            return evaluation.frechet_distance(features, reference.features)

        other = following[folder]
        row = measure(folder, loaded[other][1].gate if other != folder else None, frechet)
        new.append(row | {"features": str(evaluator.extractor)})

        # At once: a run takes minutes.
        rows = joined(known, pd.DataFrame(new))
        qd.write_atomic(path, rows.to_csv(index=False))
    draw(rows).savefig(args.out / "gate_use.png", dpi=200)


if __name__ == "__main__":
    with evaluation.exit_codes(qd.UserError):
        main()
