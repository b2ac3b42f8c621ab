"""Diffusion on MNIST digits with a 16-qubit quantum attention layer, simulated exactly.

Implements the system of "Quantum Generative Models for Image Generation: Insights from MNIST and
MedMNIST" (arXiv 2504.00034): one denoising diffusion model per digit, a small U-Net whose
bottleneck channels are re-weighted by a variational circuit, and the controls that a fair
comparison needs. README.md lists what differs from the authors' code and why.

    python quantum_diffusion_mnist.py --use_quantum                        # digit 3
    python quantum_diffusion_mnist.py --arm classical matched quantum --digits 3 8 --n_train 25 100
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path

# OpenMP's threads spin while they wait: on a busy machine a step is up to thirteen times slower
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch loads OpenMP

import filelock
import numpy as np
import pennylane as qml
import torch
import torch.nn.functional as F
import torchvision
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

# ---------------------------------------------------------------------------------- settings

IMAGE_SIZE = 28
TILE_PADDING = 2  # white pixels between the tiles of a picture, before enlargement
SAMPLE_STEPS, PREVIEW_STEPS = 50, 25  # network evaluations for the final grid and for previews
NOISE_SCALE = 1.01  # of the sampler's new noise (Karras et al. 2022): else contrast is lost
EXACT_LAYERS = 5  # memory and time grow by 16 with every layer
MIXED_QUBITS, DEVICE_QUBITS = 10, 24  # what fits into memory on default.mixed, on other devices

ARMS = {
    "classical": "no gate: the paper's classical model",
    "matched": "a classical gate with as many weights as the circuit: the fair control",
    "quantum": "the trainable circuit RY(x), then per layer RZ, RY and a CNOT chain",
    "published": "the circuit as printed, RZ only: a fixed function of its input",
    "product": "the trainable circuit without CNOTs: does entanglement matter?",
    "frozen": "the trainable circuit with its weights frozen: does training it matter?",
}
QUANTUM_ARMS = ("quantum", "published", "product", "frozen")
CLASS_NAMES = tuple("0123456789")
CLASS_IDS = {name: k for k, name in enumerate(CLASS_NAMES)}
CLASS_PREFIX = ""  # between data set and class in a run's name
STEPS = 1250  # 13 epochs over a full digit, 100 over 100 tissues and their symmetries
DEFAULT_CLASS = {"mnist": "3", "digits": "3"}
DATA_FLAGS = {
    "--digits": {"dest": "classes", "nargs": "+", "choices": [*CLASS_IDS, "all"]}
    | {"metavar": "DIGIT", "help": "list of 0-9, or all (default: 3)"},
    "--data": {"choices": ["auto", "mnist", "digits"], "default": "auto"}
    | {"help": "auto (default) takes MNIST, or without a network scikit-learn's digits"},
    "--data_dir": {"type": Path, "default": "data", "help": "holds MNIST/raw (default: data)"},
}


class UserError(Exception):
    """A mistake that the user can mend: printed as one line, exit code 2."""


def between(low: float, high: float, none: str | None = None) -> Callable[[str], float | None]:
    """An argparse type: a number from low to high, whole when low is an int; ``none`` is None."""

    def number(text: str) -> float | None:
        value = None if text == none else type(low)(text)
        if value is not None and not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}, expected {low} to {high}")
        return value

    return number


def pair(text: str) -> tuple[float, float]:
    """An argparse type: two probabilities with a comma between."""
    first, second = map(between(0.0, 1.0), text.split(","))
    return first, second


def setting(default: object, kind: Callable, text: str, metavar: str | None = None) -> field:
    """A field of Settings that is a flag of the same name."""
    return field(default=default, metadata={"type": kind, "help": text, "metavar": metavar})


@dataclass(frozen=True)
class Settings:
    """Everything that one run's result depends on. Raises UserError where fields disagree."""

    arm: str = "classical"
    data: str = "digits"
    label: int = 3
    n_train: int | None = None
    seed: int = 0
    steps: int = setting(STEPS, between(1, 10**8), "optimizer steps")
    batch_size: int = setting(64, between(1, 10**5), "images per step")
    lr: float = setting(3e-3, between(1e-9, 1e3), "peak learning rate of Adam")
    muon_lr: float = setting(0.02, between(0.0, 1e3), "that of Muon, for the inner convolutions")
    ema_decay: float = setting(0.995, between(0.0, 0.999999), "target decay of the weights' mean")
    n_qubits: int = setting(16, between(1, 1024), "qubits, or units of the matched gate")
    n_layers: int = setting(3, between(1, 100), "circuit layers")
    timesteps: int = setting(1000, between(2, 10**5), "noise levels T")
    n_frames: int = setting(30, between(1, 1000), "previews in a run")
    n_samples: int = setting(5, between(1, 1000), "images per preview")
    # Conditions, which may differ when --weights samples a model; the last five are a circuit's
    sample_steps: int = setting(SAMPLE_STEPS, between(1, 10**5), "network evaluations per image")
    simulator: str = setting("exact", str, "exact, or a PennyLane device")
    simulator_options: dict | None = setting(None, json.loads, "that device's arguments", "JSON")
    shots: int | None = setting(None, between(1, 10**5), "measurements, or by default exact means")
    gate_noise: tuple = setting((0.0, 0.0), pair, "depolarising per gate, per CNOT", "P1,P2")
    readout_noise: float = setting(0.0, between(0.0, 1.0), "share of flipped bits", "P")

    def __post_init__(self):
        exact, options = self.simulator == "exact", self.simulator_options
        most = MIXED_QUBITS if self.simulator == "default.mixed" else DEVICE_QUBITS
        for mistake, message in (
            (self.timesteps < self.sample_steps != SAMPLE_STEPS,
             f"sample_steps {self.sample_steps}: expected at most --timesteps {self.timesteps}"),
            (options is not None and (exact or type(options) is not dict or "shots" in options),
             "simulator_options: expected a PennyLane device as --simulator, and no shots"),
            (exact and self.arm in QUANTUM_ARMS and self.n_layers > EXACT_LAYERS,
             f"n_layers {self.n_layers}: at most {EXACT_LAYERS}, or --simulator default.qubit"),
            (not exact and self.n_qubits > most,
             f"n_qubits {self.n_qubits}: at most {most} on {self.simulator}, or --simulator exact"),
        ):  # fmt: skip
            if mistake:
                raise UserError(f"--{message}")

    @property
    def condition(self) -> str:
        """What is not as usual in a run, for example ``shots1000_gate0.001-0.01``; else empty."""
        words = {
            "": self.simulator != "exact" and self.simulator,
            "shots": self.shots,
            "gate": any(self.gate_noise) and "-".join(map(str, self.gate_noise)),
            "readout": self.readout_noise,
            "steps": self.sample_steps != SAMPLE_STEPS and self.sample_steps,
        }
        return "_".join(f"{word}{value}" for word, value in words.items() if value)

    @property
    def name(self) -> str:
        """The run folder's name, for example ``quantum_mnist3_nall_seed0_shots1000``."""
        label = CLASS_PREFIX + CLASS_NAMES[self.label]
        name = f"{self.arm}_{self.data}{label}_n{self.n_train or 'all'}_seed{self.seed}"
        return f"{name}_{self.condition}".rstrip("_")


IDEAL = {item.name: item.default for item in fields(Settings)[-5:]}  # a circuit's conditions


def random_stream(seed: int, *name: object, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on ``seed`` and ``name`` alone. Every use of randomness has its own
    (batch k, image k, the data subset), so none disturbs another, and a run resumes by its step."""
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """The door for foreign files: whatever reading one raises becomes a UserError that names it."""
    try:
        if not __debug__ or (isinstance(path, Path) and (path.is_fifo() or path.is_char_device())):
            raise ValueError("a pipe or device, or python -O, which leaves the checks out")
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{path}: not {what} ({reason})") from error


# -------------------------------------------------------------------------------------- data
def load_images(data: str, data_dir: Path, split: str = "train") -> tuple[str, Tensor, Tensor]:
    """Reads one split, ``train`` or ``test``: (source, images (N, 1, 28, 28) uint8, labels (N,)).
    data: ``mnist`` (downloaded when data_dir holds no ``MNIST/raw``), ``digits`` (scikit-learn's
    1,797 embedded 8x8 digits, enlarged; every fifth is the test split), or ``auto``: the first, and
    without a network the second; the returned source says which. Raises UserError: MNIST was asked
    for and cannot be had, or its files are damaged."""
    fetch, raw = partial(torchvision.datasets.MNIST, download=True), "MNIST/raw"
    way_out = data == "mnist" and f"copy its four files to {data_dir / raw} or use --data digits"
    if data != "digits" and available(data_dir, raw, fetch, way_out):
        with reading(data_dir / raw, "MNIST; delete it to download again"):
            dataset = torchvision.datasets.MNIST(data_dir, train=split == "train")
            images, labels = dataset.data[:, None], dataset.targets.long()
            assert images.shape == (len(labels), 1, IMAGE_SIZE, IMAGE_SIZE), images.shape
            assert images.dtype == torch.uint8 and {*labels.tolist()} <= {*range(10)}, "0 to 9"
            return "mnist", images, labels
    bunch = load_digits()
    small = torch.from_numpy(bunch.images)[:, None] / 16  # published range 0..16
    large = F.interpolate(small, size=IMAGE_SIZE, mode="bicubic", align_corners=False)
    chosen = (torch.arange(len(large)) % 5 == 4) == (split == "test")
    images = (large.clamp(0, 1) * 255).round().to(torch.uint8)
    return "digits", images[chosen], torch.from_numpy(bunch.target).long()[chosen]


def available(data_dir: Path, name: str, fetch: Callable, way_out: str | bool) -> bool:
    """Whether ``name`` is in data_dir, or can be fetched (aside, and renamed, so nothing leaves
    half of it). If not, raises UserError with the way_out, or says that embedded data are used."""
    path = data_dir / name
    try:
        if not path.exists():
            data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=data_dir) as aside:
                fetch(root=aside)
                path.parent.mkdir(exist_ok=True)
                (Path(aside) / name).rename(path)
    except Exception as error:  # of the network, or of what it answers
        found = f"no {path}, download failed: {' '.join(str(error).split())}"
        if way_out and not path.exists():  # it does when another process was faster
            raise UserError(f"{found}; {way_out}") from error
        if not path.exists():
            print(f"NOTICE: {found}. Using EMBEDDED DATA, as all names say.", file=sys.stderr)
    return path.exists()


def select_images(images: Tensor, labels: Tensor, label: int, n: int | None, seed: int) -> Tensor:
    """The training images of a run: ``n`` of one class (None: all), drawn by the seed.
    Subsets are nested: 25 are the first of 100. Raises UserError when the class has fewer."""
    of_class = images[labels == label]
    n = len(of_class) if n is None else n
    if not 1 <= n <= len(of_class):
        found = f"class {CLASS_NAMES[label]} has {len(of_class)} training images"
        raise UserError(f"--n_train {n or 'all'}: {found}, expected at least 1, at most as many")
    order = torch.randperm(len(of_class), generator=random_stream(seed, "subset"))
    return of_class[order[:n]]


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1, the value range of the diffusion."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float -1..1 -> uint8 0..255, rounded to the nearest; values outside are clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------- noise schedule and diffusion
def cosine_beta_schedule(timesteps: int, s: float = 0.008) -> Tensor:
    """beta_1 .. beta_T of the cosine schedule, (timesteps,) float64, clipped to at most 0.999:
    Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17."""
    t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2  # alpha_bar(t) = f(t) / f(0)
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


class GaussianDiffusion:
    """The forward process q of DDPM (Ho et al. 2020) and a sampler of second order.
    Index t = 0 .. T-1 is the paper's 1 .. T. With alpha = sqrt(alpha_bar), sigma = sqrt(1 -
    alpha_bar), the network predicts v = alpha noise - sigma x0, which is stable in pure noise."""

    def __init__(self, timesteps: int, device: torch.device | str = "cpu"):
        self.timesteps, self.device = timesteps, torch.device(device)
        self.alpha_bar = torch.cumprod(1 - cosine_beta_schedule(timesteps), 0)  # float64
        squares = torch.stack([self.alpha_bar, 1 - self.alpha_bar])[..., None, None, None]
        self.alpha, self.sigma = squares.sqrt().float().to(device)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x_t given x0 (Ho et al. eq. 4), and v (Salimans & Ho 2022), the network's target there.
        x0, noise: (B, C, H, W); t: (B,) int64."""
        alpha, sigma = self.alpha[t], self.sigma[t]
        return alpha * x0 + sigma * noise, alpha * noise - sigma * x0

    @torch.no_grad()
    def sample(
        self, model: nn.Module, seed: int, series: str, numbers: range, steps: int, bar: tqdm
    ) -> Tensor:
        """Draws the images ``numbers`` of a series, (n, C, 28, 28) float32 in -1..1, in ``steps``
        calls v = model(x, t) with x (n, C, 28, 28) and t (n,); 1 <= steps <= T.
        SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095): d extrapolates from the last step's
        x0 and this one. With d = x0 and NOISE_SCALE 1 it is DDPM's ancestral step. The levels lie
        evenly in asinh(lambda), lambda = log(alpha / sigma), from -6 to t = 0, but the first, which
        is T - 1. x0 is clipped at the end alone: earlier, black turns grey. An image has its own
        random streams and does not depend on those it is drawn with."""
        stream = partial(random_stream, seed, series, device=self.device)
        noise = [stream(k) for k in numbers]
        if model.gate is not None:
            model.gate.generators = [stream(k, "shots") for k in numbers]
        log_snr = (self.alpha_bar / (1 - self.alpha_bar)).log() / 2  # lambda, falls with t
        wanted = torch.linspace(math.asinh(-6), log_snr[0].asinh(), steps).sinh()
        levels, k = (log_snr - wanted[:, None]).abs().argmin(1), torch.arange(steps)
        levels[0] = self.timesteps - 1  # and now to free ones where several fall on one level
        levels = (levels + k).clamp(min=steps - 1).cummin(0).values - k
        alpha_bar, log_snr = self.alpha_bar[levels], log_snr[levels].tolist()
        alpha, sigma = alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist()
        size, before, h_before = (model.channels, IMAGE_SIZE, IMAGE_SIZE), 0.0, math.inf
        x = torch.stack([torch.randn(size, generator=g, device=self.device) for g in noise])
        for k, t in enumerate(levels.tolist()):
            v = model(x, torch.full((len(x),), t, device=self.device))
            x0 = alpha[k] * x - sigma[k] * v
            bar.update()
            if k == steps - 1:
                return x0.clamp(-1, 1)
            h = log_snr[k + 1] - log_snr[k]
            d, before, h_before = x0 + (x0 - before) * (h / (2 * h_before)), x0, h
            fresh = -math.expm1(-2 * h)  # the share of the next level's noise that is drawn anew
            x = (sigma[k + 1] / sigma[k] * math.exp(-h)) * x + (alpha[k + 1] * fresh) * d
            new = torch.stack([torch.randn(size, generator=g, device=self.device) for g in noise])
            x = x + (NOISE_SCALE * sigma[k + 1] * math.sqrt(fresh)) * new


# --------------------------------------------------- quantum circuit and exact simulation
def quantum_circuit(angles: Tensor, weights: Tensor, settings: Settings) -> None:
    """The layer's definition in PennyLane operations, on wires 0 .. n-1.
    RY(angles[i]), then per layer RZ(weights[l, i, 0]), RY(weights[l, i, 1]) on every qubit and the
    chain CNOT(0,1), CNOT(1,2), ... unless the arm is ``product``. angles: (n,) or (B, n), radians;
    weights: (L, n, 2), radians, or (L, n, 1) for ``published``, RZ alone; the settings' gate_noise:
    the probabilities p1 of PennyLane's ``DepolarizingChannel`` after every one-qubit gate and p2 of
    one on each of its qubits after every CNOT; readout_noise: that a measured bit is flipped."""
    n, (p1, p2) = weights.shape[1], settings.gate_noise

    def noise(p: float, gate: qml.operation.Operator) -> None:
        for wire in gate.wires if p else ():
            qml.DepolarizingChannel(p, wires=wire)

    for i in range(n):
        noise(p1, qml.RY(angles[..., i], wires=i))
    for layer in weights:
        for i in range(n):
            for rotation, angle in zip((qml.RZ, qml.RY), layer[i], strict=False):
                noise(p1, rotation(angle, wires=i))
        for i in range(n - 1 if settings.arm != "product" else 0):
            noise(p2, qml.CNOT([i, i + 1]))
    for i in range(n if settings.readout_noise else 0):
        qml.BitFlip(settings.readout_noise, wires=i)


def make_qnode(settings: Settings, diff_method: str | None = "best") -> qml.QNode:
    """``quantum_circuit`` as a QNode on the settings' PennyLane device; exact: ``default.qubit``.
    diff_method is None for inference alone; with shots (measurements of all qubits together) any
    other means parameter-shift. Noise needs a device that takes channels: ``default.mixed``.
    Returns f(angles (B, n), weights (L, n, 2 or 1)) -> list of n tensors (B,), <Z_i>."""
    n, name = settings.n_qubits, settings.simulator.replace("exact", "default.qubit")
    device = qml.device(name, wires=n, **settings.simulator_options or {})
    diff_method = "parameter-shift" if settings.shots and diff_method else diff_method

    @qml.qnode(device, interface="torch", diff_method=diff_method)
    def expectations(angles: Tensor, weights: Tensor):
        quantum_circuit(angles, weights, settings)
        return [qml.expval(qml.PauliZ(i)) for i in range(n)]

    expectations = qml.set_shots(expectations, shots=settings.shots)
    if diff_method == "parameter-shift" or not name.startswith("default."):
        expectations = qml.transforms.broadcast_expand(expectations)  # takes no batch of inputs
    return expectations


# The exact simulation works in the Pauli basis, where all is real: a qubit's density matrix is
# sum_p v[p] P_p / 2 over P = I, X, Y, Z, and a gate turns the Bloch vector v[1:] about an axis.
PAULIS = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [0, -1j, 1j, 0], [1, 0, 0, -1]]).view(4, 2, 2)
# A CNOT is two tensors with a bond between its qubits, on which the control's bit b travels, as a
# density matrix: COPY [bond, qubit, qubit before] takes |b><d| to |b><d| x |b><d|, and ADD
# [qubit, qubit before, bond] takes the target's density matrix rho to X^b rho X^d.
COPY = torch.einsum("rba,sba,tab->rst", PAULIS, PAULIS, PAULIS).real / 2
FLIPS = PAULIS[:2]  # X to the power of 0 and 1
ADD = torch.einsum("tij,bjk,pkl,dli,qbd->tpq", PAULIS, FLIPS, PAULIS, FLIPS, PAULIS).real / 4
AXES = torch.zeros(2, 4, 4)  # the generators of RZ and RY
AXES[[0, 1], [2, 1], [1, 3]], AXES[[0, 1], [1, 3], [2, 1]] = 1, -1
ENDS = {1: torch.ones(2, 1)}  # by D: bonds at a chain's left end (b = d = 0), right end (sum)
for _ in range(EXACT_LAYERS - 1):
    inner, layer = ENDS[max(ENDS)], torch.tensor([[1.0, 0, 0, 1], [1, 1, 0, 0]])
    ENDS[4 * max(ENDS)] = (layer[:, :, None] * inner[:, None]).flatten(1)
placed = cache(Tensor.to)  # a copy to a GPU makes the host wait, so each constant is copied once


def depolarising(p: float, like: Tensor) -> Tensor:
    """PennyLane's ``DepolarizingChannel(p)`` in the Pauli basis, where it is diagonal: (4,)."""
    return torch.cat([like.new_ones(1), like.new_full((3,), 1 - 4 * p / 3)])


def gate_matrices(weights: Tensor, p1: float = 0.0) -> Tensor:
    """RY(w1) RZ(w0) of every layer and qubit, each with depolarising noise of probability p1, on
    the vectors v of the Pauli basis: (L, n, 2 or 1) radians -> (L, n, 4, 4)."""
    gates = eye = torch.eye(4, dtype=weights.dtype, device=weights.device)
    axes = placed(AXES, weights.device, weights.dtype)
    for angle, axis in zip(weights[..., None, None].unbind(2), axes, strict=False):
        rotation = eye + angle.sin() * axis + (1 - angle.cos()) * (axis @ axis)  # Rodrigues
        gates = depolarising(p1, weights)[:, None] * (rotation @ gates)
    return gates


def transfer_matrices(weights: Tensor, settings: Settings) -> Tensor:
    """The site tensors of the circuit's density matrix, an exact matrix product, for all inputs.
    In every layer, qubit i shares a bond q with its left neighbour, which controls it, and a bond r
    with its right neighbour, which it controls. From layer to layer, with the gates G of
    ``gate_matrices``, v becomes sum_{p,t} COPY[r, s, t] ADD[t, p, q] (G v)[p]. In the last layer a
    measured Z can be read on r instead of s, as COPY[Z, I] = COPY[I, Z]; so s is I, and ADD hands Z
    on: q = r is Z up to the measured qubit and I beyond. The other layers' bonds have D = 4**(L-1)
    values together. There are c chains of m qubits: one of n or, in arm ``product``, n of one.
    The input enters by RY(x)|0>, whose v is linear in (1, cos x, sin x), hence three matrices per
    qubit; all else does not depend on the batch. Noise is diagonal, so its exact mean is free; in
    the last layer that of a CNOT's control is on s, not r: ``circuit_expectations`` adds it.
    weights: as in ``quantum_circuit``. Returns (2, m, c, 3, D, D), indexed [I or Z, qubit of the
    chain, chain, (1, cos, sin), bonds to the left, bonds to the right]."""
    n, (p1, p2) = weights.shape[1], settings.gate_noise
    length = 1 if settings.arm == "product" else n
    noise = depolarising(p2, weights).repeat(2, length, n // length, 1)
    noise[0, -1].fill_(1), noise[1, 0].fill_(1)  # a chain's ends have no target, no control
    control, target = noise.flatten(1, 2)
    copy, add = (placed(x, weights.device, weights.dtype) for x in (COPY, ADD))
    cnot = torch.einsum("ns,rst,nt,tpq->nrsqp", control, copy, target, add)
    layers = torch.einsum("nrsqp,lnpu->lnrsqu", cnot, gate_matrices(weights, p1))
    site = weights.new_zeros(4, 3)
    site[0, 0], site[3, 1], site[1, 2] = depolarising(p1, weights)[:3]  # RY(x)|0>: (1, sin, 0, cos)
    site = site.view(1, 4, 3, 1, 1).expand(n, 4, 3, 1, 1)
    for layer in layers[:-1]:
        site = torch.einsum("nrsqu,nukcb->nskqcrb", layer, site).flatten(5, 6).flatten(3, 4)
    last = layers[-1, :, ::3, 0, ::3].diagonal(dim1=1, dim2=2)  # s is I, r = q is I or Z
    site = torch.einsum("nuz,nukcb->nzkcb", last, site)
    return site.unflatten(0, (length, -1)).movedim(2, 0)


def environments(angles: Tensor, transfer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The chain up to and with each qubit, Z on all of them, and the chain beyond it.
    Before: one sweep along the chain, from a neighbour whose bit is 0 in all layers. Beyond, each
    layer but the last spreads an observable by one qubit; so sweeps over L - 1 qubits do, all in
    one batch, each from the end of a chain. angles: (B, n), radians; transfer: (2, m, c, 3, D, D).
    Returns the inputs (m, c, B, 3, 1) and both environments (m, c, B, D)."""
    inputs = torch.stack([torch.ones_like(angles), angles.cos(), angles.sin()], -1).transpose(0, 1)
    inputs, d = inputs.unflatten(0, transfer.shape[1:3]).unsqueeze(4), transfer.shape[-1]
    start, end = placed(ENDS[d], angles.device, angles.dtype)
    left, right = [start.expand(*inputs.shape[1:3], d)], end.expand(*inputs.shape[:3], d)
    on_i, on_z = transfer.unbind(0)
    for x, site in zip(inputs.unbind(0), on_z.flatten(2, 3).unbind(0), strict=True):
        left.append(torch.bmm((left[-1].unsqueeze(2) * x).flatten(2), site))
    sites = on_i[1:].mT.flatten(2, 3)
    for _ in range(round(math.log(d, 4))):
        inner = (right[1:].unsqueeze(3) * inputs[1:]).flatten(3) @ sites
        right = torch.cat([inner, right[-1:]])
    return inputs, torch.stack(left[1:]), right


def sample_outcomes(angles: Tensor, transfer: Tensor, uniform: Tensor) -> Tensor:
    """Measures all qubits together, from left to right: 1 or -1 of every qubit and shot.
    The chain before a qubit, given the outcomes so far, and that beyond it give its <Z>, so the
    odds of its outcome z. (1 + z Z) / 2 then projects: Z on its last bond is z. This is the exact
    joint distribution under noise, but for the flips that ``circuit_expectations`` adds. angles:
    (B, n), radians; transfer: (2, m, c, 3, D, D); uniform: (B, S, n) in 0..1. -> (B, S, n)."""
    inputs, _, right = environments(angles, transfer)
    uniform = uniform.permute(2, 0, 1).unflatten(0, inputs.shape[:2]).unsqueeze(4)
    left = placed(ENDS[right.shape[-1]], angles.device, angles.dtype)[0]
    left, z, outcomes = left.expand(*uniform.shape[1:4], -1), 1, []
    for i, numbers in enumerate(uniform):
        sites = torch.einsum("ackde,cbkx->acbde", transfer[:, i], inputs[i])
        after, after_z = left @ sites[0], z * (left @ sites[1])
        total, total_z = (x @ right[i].unsqueeze(3) for x in (after, after_z))
        z = (2 * numbers * total < total + total_z).to(left) * 2 - 1
        left = (after + z * after_z) / (total + z * total_z)
        outcomes.append(z)
    return torch.stack(outcomes).flatten(0, 1).squeeze(3).permute(1, 2, 0)


def circuit_expectations(
    angles: Tensor, weights: Tensor, settings: Settings, generators: Sequence[torch.Generator] = ()
) -> Tensor:
    """``quantum_circuit`` simulated exactly: <Z_i> of every qubit, the mean over all errors.
    With the settings' shots the values are means of so many joint measurements of all qubits,
    drawn by a generator for each sample; the gradient is still the exact mean's. angles: (B, n),
    radians; weights: as in ``quantum_circuit``. Returns (B, n) in -1..1, differentiable in both."""
    n, shots, transfer = angles.shape[1], settings.shots, transfer_matrices(weights, settings)
    factors = angles.new_full((n,), 1 - 2 * settings.readout_noise)
    if settings.arm != "product":  # the last CNOTs' noise on their controls: like misread bits
        factors[:-1] *= 1 - 4 * settings.gate_noise[1] / 3
    _, left, right = environments(angles, transfer)
    mean = factors * (left * right).sum(-1).flatten(0, 1).T
    if shots:
        with torch.no_grad():
            uniform = [torch.rand(2, shots, n, generator=g, device=g.device) for g in generators]
            uniform = torch.stack(uniform).to(angles)
            outcomes = sample_outcomes(angles, transfer, uniform[:, 0])
            outcomes = torch.where(2 * uniform[:, 1] < 1 - factors, -outcomes, outcomes)
        mean = outcomes.mean(1) + mean - mean.detach()
    return mean


def check_simulation(settings: Settings) -> None:
    """Compares the exact simulation with PennyLane's on a small random circuit, values and
    gradients; with ``--simulator DEVICE`` on this device, and with shots that it runs at all.
    Raises UserError when they differ (one was edited without the other), or the device fails."""
    name = settings.simulator.replace("exact", "default.mixed")  # which takes noise
    small = replace(settings, n_qubits=3, n_layers=2, simulator=name)
    how = {"dtype": torch.float64, "generator": random_stream(0, "check"), "requires_grad": True}
    kinds, angles = 1 if settings.arm == "published" else 2, torch.randn(2, 3, **how)
    weights = torch.randn(2, 3, kinds, **how)
    results = [circuit_expectations(angles, weights, replace(small, shots=None))]
    try:
        results.append(torch.stack(make_qnode(small)(angles, weights), -1).view_as(angles))
    except Exception as error:  # a plugin may raise anything; the reason is shown
        raise UserError(f"--simulator {name} does not run the circuit: {error}") from None
    results += [torch.autograd.grad(y.square().sum(), weights)[0].flatten() for y in results]
    error = max((results[k] - results[k + 1]).abs().max() for k in (0, 2))
    if not settings.shots and not error < 1e-5:  # some devices use float32
        found = f"the exact simulation differs from quantum_circuit on {name} by {error:.1e}"
        raise UserError(f"{found}: one was edited without the other")


# ---------------------------------------------------------------------------- attention gates
class QuantumAttention(nn.Module):
    """The gate of the bottleneck: Linear(C, n), the circuit's <Z_i>, Linear(n, C).
    The arm ``matched`` has no circuit: there each unit applies z <- cos(a z + b) once per layer,
    with weights (a, b) of its own: as many as the circuit's, in the same range -1..1, not mixing
    the units. The output starts at zero, so that every arm starts as the classical model. On a
    PennyLane device the gradient through shots is the parameter-shift rule's, measured as well."""

    def __init__(self, channels: int, settings: Settings):
        super().__init__()
        self.settings, n = settings, settings.n_qubits
        self.generators: Sequence[torch.Generator] = ()  # of the shots, one for each sample
        self.project_in = nn.Linear(channels, n)
        self.project_out = start_at_zero(nn.Linear(n, channels))
        kinds = 1 if settings.arm == "published" else 2
        weights = torch.rand(settings.n_layers, n, kinds) * 2 * math.pi  # as PennyLane's TorchLayer
        if settings.arm == "matched":
            weights[..., 0] = 1
        self.weights = nn.Parameter(weights, requires_grad=settings.arm != "frozen")
        if settings.simulator != "exact":  # inference has its own, which is much faster on some
            self.qnode, self.inference_qnode = make_qnode(settings), make_qnode(settings, None)

    def expectations(self, angles: Tensor) -> Tensor:
        """<Z_i> in -1..1, or what replaces them. angles: (B, n), radians. Returns (B, n)."""
        if self.settings.arm == "matched":
            for scale, shift in self.weights.mT:  # (n,) each
                angles = torch.cos(scale * angles + shift)
            return angles
        if self.settings.simulator == "exact":
            return circuit_expectations(angles, self.weights, self.settings, self.generators)
        qnode = self.qnode if torch.is_grad_enabled() else self.inference_qnode
        # With shots some devices drop a batch of one
        return torch.stack(qnode(angles.cpu(), self.weights.cpu()), -1).to(angles).view_as(angles)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, C) -> gate (B, C)."""
        return self.project_out(self.expectations(self.project_in(features)))


# -------------------------------------------------------------------------------------- U-Net
def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (Vaswani et al. 2017). t: (B,). Returns (B, dim), dim even."""
    k = torch.arange(dim // 2, device=t.device)
    phases = t.float()[:, None] * torch.exp(-math.log(10_000) * k / (dim // 2))
    return torch.cat([phases.sin(), phases.cos()], dim=1)


def start_at_zero(layer: nn.Module) -> nn.Module:
    """The same layer, with zero weights and bias."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice; the time embedding scales and shifts in between."""

    def __init__(self, channels: int, embedding: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = start_at_zero(nn.Conv2d(channels, channels, 3, padding=1))
        self.modulation = nn.Linear(embedding, 2 * channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, channels, H, W), embedding (B, E) -> (B, channels, H, W)."""
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        return x + self.conv2(F.silu(h * (1 + scale) + shift))


class SelfAttention(nn.Module):
    """Attention with four heads between the positions of a feature map (not the quantum gate)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = start_at_zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, H, W) -> the same shape."""
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, 3 C), no copy
        q, k, v = qkv.unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(mixed.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2))


class UNet(nn.Module):
    """The denoiser: 28x28 folded to 14x14, then 7x7, where the gate sits; a skip at both.
    channels: 1 or 3. The initial weights depend on the seed alone and are equal in all arms."""

    def __init__(self, channels: int, settings: Settings):
        super().__init__()
        torch.manual_seed(settings.seed)
        self.channels = channels
        width, bottleneck, embedding = 48, 128, 128  # channels at 14x14, at 7x7, of the time
        layers = nn.Linear(64, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        self.embed = nn.Sequential(*layers)
        self.stem = nn.Conv2d(4 * channels, width, 3, padding=1)
        self.encode14 = ResBlock(width, embedding)
        self.down = nn.Conv2d(width, bottleneck, 2, stride=2)
        self.encode7 = ResBlock(bottleneck, embedding)
        self.attention = SelfAttention(bottleneck)
        self.merge7 = nn.Conv2d(2 * bottleneck, bottleneck, 1)
        self.decode7 = ResBlock(bottleneck, embedding)
        self.up = nn.ConvTranspose2d(bottleneck, width, 2, stride=2)
        self.merge14 = nn.Conv2d(2 * width, width, 1)
        self.decode14 = ResBlock(width, embedding)
        self.norm = nn.GroupNorm(8, width)
        self.head = start_at_zero(nn.Conv2d(width, 4 * channels, 3, padding=1))
        # Built last: the same seed gives the same U-Net in every arm.
        self.gate = None if settings.arm == "classical" else QuantumAttention(bottleneck, settings)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, channels, H, W), H and W multiples of 4; t (B,) int64 -> v, shaped like x."""
        embedding = self.embed(timestep_embedding(t, 64))
        x = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)
        h14 = self.encode14(self.stem(x), embedding)
        h7 = self.encode7(self.down(h14), embedding)
        h = self.attention(h7)
        if self.gate is not None:
            pixels = h.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, C) without a copy
            pixels = pixels * (1 + self.gate(pixels.mean(1)))[:, None]
            h = pixels.unflatten(1, h.shape[2:]).permute(0, 3, 1, 2)
        h = self.decode7(self.merge7(torch.cat([h, h7], dim=1)), embedding)
        h = self.decode14(self.merge14(torch.cat([self.up(h), h14], dim=1)), embedding)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), 2)


# ----------------------------------------------------------------------------------- pictures
def write_atomic(path: Path, data: bytes | str | dict) -> None:
    """Writes bytes, text or a dict of tensors aside and renames the file: all or none."""
    if isinstance(data, dict):
        torch.save(data, buffer := io.BytesIO())
        data = buffer.getvalue()
    aside = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(aside, path)
    except OSError as error:  # names the file that was meant
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        aside.unlink(missing_ok=True)


def tile(images: Tensor, columns: int, scale: int = 1) -> np.ndarray:
    """Images (N, C, H, W) uint8 as one picture (height, width, C), row by row on a white ground,
    TILE_PADDING pixels apart and then enlarged ``scale`` times."""
    half = [TILE_PADDING // 2] * 4
    tiles = F.pad(images.cpu(), half, value=255)
    picture = torchvision.utils.make_grid(tiles, nrow=columns, padding=0, pad_value=255)
    picture = F.pad(picture, half, value=255)[: images.shape[1]].permute(1, 2, 0)
    return picture.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy()


def save_grid(path: Path, images: Tensor) -> None:
    """Saves images (N, C, H, W) uint8 as one lossless PNG, with a description to split it by: the
    text chunk ``grid``, JSON. Tile k stands at row k // columns, column k % columns."""
    n, channels, height, width = images.shape
    columns = min(n, max(5, math.ceil(math.sqrt(n))))
    scale = max(1, min(4, 640 // (columns * (width + TILE_PADDING))))
    description = {"count": n, "columns": columns, "tile_height": height, "tile_width": width}
    description |= {"padding": TILE_PADDING, "scale": scale, "channels": channels}
    text = PngImagePlugin.PngInfo()
    text.add_text("grid", json.dumps(description | {"value_range": [-1.0, 1.0]}))
    buffer = io.BytesIO()
    Image.fromarray(tile(images, columns, scale).squeeze()).save(buffer, "png", pnginfo=text)
    write_atomic(path, buffer.getvalue())


def load_grid(path: Path) -> Tensor:
    """The images (N, C, H, W) uint8 of ``save_grid``, to the bit. Raises UserError when damaged."""
    with reading(path, "a sample grid of this project"), Image.open(path) as picture:
        grid = json.loads(picture.text["grid"])
        n, columns, scale, padding = (grid[k] for k in ("count", "columns", "scale", "padding"))
        height, width = grid["tile_height"] + padding, grid["tile_width"] + padding
        shape = -(-n // columns) * height + padding, columns * width + padding, grid["channels"]
        pixels = picture.height / scale, picture.width / scale, {"L": 1, "RGB": 3}[picture.mode]
        assert pixels == shape, f"{pixels}, described as {shape}"
        canvas, half = torch.from_numpy(np.array(picture)[::scale, ::scale]), padding // 2
        canvas = canvas.view(shape)[half:-half, half:-half]
        tiles = canvas.unfold(0, height, height).unfold(1, width, width).flatten(0, 1)[:n]
        return tiles[..., half:-half, half:-half].contiguous()


def save_gif(path: Path, frames: Sequence[tuple[str, Tensor]]) -> None:
    """Saves (caption, images (N, C, H, W) uint8) frames as an animation, at most ten images each.
    The enlargement shrinks from 4, and then every other frame goes, until it has 400 kB."""
    for scale, stride in ((4, 1), (3, 1), (2, 1), (1, 1), (1, 2), (1, 4), (1, 8)):
        pictures = []
        for caption, images in frames[::-1][::stride][::-1]:  # the last frame always stays
            strip = Image.fromarray(tile(images[:10], 10, scale).squeeze()).convert("RGB")
            canvas = ImageOps.expand(strip, (0, 7 * scale, 0, 0), "white")
            ImageDraw.Draw(canvas).text((4, scale), caption, fill="black", font_size=5 * scale)
            pictures.append(canvas.quantize(64))
        buffer = io.BytesIO()
        options = {"duration": [200] * (len(pictures) - 1) + [2000], "loop": 0}  # milliseconds
        pictures[0].save(buffer, "gif", save_all=True, append_images=pictures[1:], **options)
        if buffer.tell() < 400_000:
            break
    write_atomic(path, buffer.getvalue())


def save_figure(path: Path, figure: plt.Figure) -> None:
    """Writes a matplotlib figure at 200 dpi, or fewer where that makes over 6,000 pixels."""
    dpi = min(200, 6000 / max(figure.get_size_inches()))
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=dpi, bbox_inches="tight")
    write_atomic(path, buffer.getvalue())


def save_loss_curve(path: Path, losses: Tensor, title: str) -> None:
    """Draws the loss of every step and its mean over a hundredth of the run."""
    window = max(1, len(losses) // 100)
    smooth, figure = F.avg_pool1d(losses[None], window, 1)[0], plt.Figure(figsize=(5, 3))
    axes = figure.subplots()
    axes.semilogy(torch.arange(len(losses)) + 1, losses, "#bbbbbb", lw=0.5, label="each step")
    centres = torch.arange(len(smooth)) + (window + 1) / 2
    axes.semilogy(centres, smooth, "#0072b2", lw=1.2, label=f"mean of {window}")
    axes.set(xlabel="optimizer step", ylabel="mean squared error of v", title=title)
    axes.legend(frameon=False)
    save_figure(path, figure)


def save_circuit(path: Path, settings: Settings) -> None:
    """Draws the gate's circuit by PennyLane, or of a very large one its first qubits and layers."""
    n, layers = min(settings.n_qubits, 32), min(settings.n_layers, EXACT_LAYERS)
    weights = torch.zeros(layers, n, 1 if settings.arm == "published" else 2)
    qnode = make_qnode(Settings(settings.arm, n_qubits=n, n_layers=layers))
    figure, axes = qml.draw_mpl(qnode)(torch.zeros(n), weights)
    axes.set_title(f"{n} of {settings.n_qubits} qubits, {layers} of {settings.n_layers} layers")
    save_figure(path, figure)
    plt.close(figure)


# ------------------------------------------------------------------ run folder and checkpoints
def run_config(settings: Settings, images: Tensor, counts: dict, device: torch.device) -> dict:
    """What made a run, for ``config.json``. ``images`` are those trained on, (n, C, H, W) uint8."""
    weights = list(UNet(images.shape[1], settings).named_parameters())
    counted = {"model": weights, "gate": [item for item in weights if item[0].startswith("gate.")]}
    counted["trainable"] = [item for item in weights if item[1].requires_grad]
    commit = hardware = ""
    with contextlib.suppress(FileNotFoundError):  # no git on this machine
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = done.stdout.strip()
    with contextlib.suppress(OSError):  # Linux tells the model
        hardware = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].split("\n")[0]
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else hardware
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    config = {
        "condition": settings.condition,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": asdict(settings) | {"label_name": CLASS_NAMES[settings.label]},
        "images": {"split": "train", **counts, "used": len(images), "sha256": digest},
        "weights": {"weights_sha256": None},
        "n_eval": 0,  # images in samples_final.png, once they are all there
        "parameters": {k: sum(p.numel() for _, p in part) for k, part in counted.items()},
        "versions": {"python": sys.version.split()[0]}
        | {module.__name__: module.__version__ for module in (torch, qml, np)},
        "git": commit,
        "device": f"{device}, {hardware or 'unknown'}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }
    return json.loads(json.dumps(config))


def read_config(path: Path) -> dict:
    """A run's ``config.json``. Raises UserError when it is none, or an older version's."""
    with reading(path, "a run's configuration of this version"):
        config = json.loads(path.read_text())
        assert all(isinstance(config[part], dict) for part in ("settings", "images", "weights"))
        return config


def differences(path: Path, config: dict, skip: Sequence[str] = ()) -> str:
    """In what a run's ``config.json`` differs from ``config``, for an error; empty: in nothing."""
    known, asked = (c["settings"] | c["images"] | c["weights"] for c in (read_config(path), config))
    return ", ".join(
        f"{key} {known.get(key)!r} (asked for: {value!r})"
        for key, value in asked.items()
        if key not in skip and known.get(key) != value
    )


@contextlib.contextmanager
def open_run(folder: Path, config: dict) -> Iterator[None]:
    """Creates the run folder, or makes sure that it is this very run's and no other process works
    in it. Raises UserError otherwise, and names the settings that differ."""
    path = folder / "config.json"
    if not path.exists() and {f.name[:12] for f in folder.glob("*")} - {".lock", ".config.json"}:
        raise UserError(f"{folder} has no config.json: not a run; use another --save_dir")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(folder / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{folder} is in use by another process") from None
    with lock:
        if not path.exists():
            write_atomic(path, json.dumps(config, indent=2))
        if found := differences(path, config):
            raise UserError(f"{folder} is another run: {found}; use another --save_dir")
        for left in [*folder.glob(".*.[0-9]*.tmp"), *folder.glob("samples/.*.[0-9]*.tmp")]:
            left.unlink()  # by a process that was killed while it wrote
        yield


def find_weights(folder: Path, settings: Settings, config: dict) -> dict:
    """The ``model.pt`` of the ideal run of the same arm, data, class, size and seed in ``folder``,
    as entries of ``config.json``. Raises UserError: there is none, or it was trained otherwise."""
    path = folder / replace(settings, **IDEAL, sample_steps=SAMPLE_STEPS).name / "model.pt"
    if not path.is_file():
        raise UserError(f"--weights {folder}: no {path}; train it, or name its folder")
    skip = (*IDEAL, "sample_steps", "n_frames", "n_samples", "weights_sha256")
    if found := differences(path.with_name("config.json"), config, skip):
        raise UserError(f"--weights {folder}: {path} was trained with {found}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"weights": {"weights_sha256": digest}, "weights_from": str(path)}


# ------------------------------------------------------------------------------------ training
def training_batch(settings: Settings, images: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """One step's x0 (B, C, H, W) float in -1..1, t (B,) int64 and noise like x0, by seed and step.
    The images are consecutive pieces of one shuffle of the training set after another. The
    timesteps are stratified, one in each of B equal parts of 0..T, which lowers the variance."""
    size, n, device = settings.batch_size, len(images), images.device
    epochs = range(step * size // n, ((step + 1) * size - 1) // n + 1)
    stream, start = partial(random_stream, settings.seed, "shuffle"), step * size % n
    order = torch.cat([torch.randperm(n, generator=stream(epoch)) for epoch in epochs])
    x0 = to_float(images[order[start : start + size].to(device, non_blocking=True)])
    generator = random_stream(settings.seed, "noise", step, device=device)
    uniform = torch.rand(size, generator=generator, device=device)
    t = (torch.arange(size, device=device) + uniform) * (settings.timesteps / size)
    t = t.long().clamp(max=settings.timesteps - 1)
    return x0, t, torch.randn(x0.shape, generator=generator, device=device)


@torch.no_grad()
def muon_step(weights: Sequence[Tensor], momenta: Sequence[Tensor], lr: float) -> None:
    """One step of Muon (Jordan et al. 2024) on convolutions, each weight a matrix, first axis by
    rest: three steps x <- (3.4445 - 4.7750 x x^T + 2.0315 (x x^T)^2) x bring most singular values
    of the Nesterov momentum near 1 (Jordan's five: no clear gain); x is multiplied once, last."""
    for weight, momentum in zip(weights, momenta, strict=True):
        weight, grad, momentum = (x.permute(0, 2, 3, 1) for x in (weight, weight.grad, momentum))
        x = grad.lerp(momentum.lerp_(grad, 0.05), 0.95).flatten(1)  # as stored: not a copy
        scale, wide = max(1, len(x) / x.shape[1]) ** 0.5, len(x) <= x.shape[1]
        x = (x if wide else x.mT) / (x.norm() + 1e-7)
        gram, factor, total = x @ x.mT, None, None
        for k in range(3):
            gram = factor @ gram @ factor if k else gram
            factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
            factor.diagonal().add_(3.4445)
            total = factor @ total if k else factor
        weight.add_((total @ x if wide else x.mT @ total).view_as(weight), alpha=-lr * scale)


class Trainer:
    """A model in training, its average and optimizers; continued from ``checkpoint`` if it exists.
    images: (n, C, 28, 28) uint8, on its device. Muon trains inner convolutions, Adam the rest."""

    def __init__(self, settings: Settings, images: Tensor, checkpoint: Path):
        self.settings, self.images, self.checkpoint = settings, images, checkpoint
        self.done, device, channels = 0, images.device, images.shape[1]  # done: steps
        self.diffusion = GaussianDiffusion(settings.timesteps, device)
        self.model, self.average = (UNet(channels, settings).to(device) for _ in range(2))
        rest = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        hidden = [k for k, p in rest.items() if p.ndim == 4 and k[:5] not in ("stem.", "head.")]
        self.hidden = [rest.pop(name) for name in hidden]
        self.moments = [torch.zeros_like(p) for p in self.hidden]  # Muon's, and then Adam's
        self.adam = torch.optim.Adam(rest.values(), settings.lr, (0.9, 0.99), fused=True)
        for p in rest.values():
            self.adam.state[p] = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
            self.adam.state[p]["step"] = torch.zeros((), device=device)
            self.moments += self.adam.state[p].values()
        self.losses = torch.zeros(settings.steps, device=device)
        if checkpoint.exists():
            with reading(checkpoint, "a checkpoint of this run; if damaged, remove it"):
                assert zipfile.ZipFile(checkpoint).testzip() is None, "checksum"
                state = dict(torch.load(checkpoint, map_location=device, weights_only=True))
                assert state["name"] == settings.name, f"of {state['name']}"
                for name in ("model", "average"):
                    getattr(self, name).load_state_dict(state[name])
                for own, kept in zip(self.moments, state["moments"], strict=True):
                    own.copy_(kept.view_as(own))
                self.done, losses = int(self.moments[-1]), state["losses"]  # Adam counts steps
                self.losses[: self.done].view_as(losses).copy_(losses)
                assert all(p.isfinite().all() for p in self.average.parameters()), "not finite"

    def step(self) -> None:
        """One optimizer step; never makes the host wait for the device."""
        settings, step, device = self.settings, self.done, self.images.device
        x0, t, noise = training_batch(settings, self.images, step)
        if settings.shots:
            streams = [(settings.seed, "circuit", step, k) for k in range(len(x0))]
            self.model.gate.generators = [random_stream(*name, device=device) for name in streams]
        x, v = self.diffusion.q_sample(x0, t, noise)
        loss = F.mse_loss(self.model(x, t), v)
        self.model.zero_grad()
        loss.backward()
        # Learning rates: warm-up over 100 steps, or a tenth of all, under a straight line to 0
        warm_up = min(100, max(1, settings.steps // 10))
        rate = min((step + 1) / warm_up, 1 - step / settings.steps)
        self.adam.param_groups[0]["lr"] = rate * settings.lr
        self.adam.step()
        muon_step(self.hidden, self.moments[: len(self.hidden)], rate * settings.muon_lr)
        # A decay that grows with the steps (as in TensorFlow) soon forgets the initial weights
        decay, new = min(settings.ema_decay, (1 + step) / (10 + step)), self.model.parameters()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(new), 1 - decay)
        self.losses[step] = loss.detach()
        self.done += 1

    def save(self) -> None:
        """Writes ``loss.csv`` and the checkpoint. Raises UserError instead, and keeps the last good
        checkpoint, when a loss or a weight is not finite."""
        losses = self.losses[: self.done].cpu()
        finite = losses.isfinite()
        finite[-1] &= all(p.isfinite().all() for p in self.model.parameters())
        if not finite.all():
            found = f"the loss or a weight is not finite at step {finite.int().argmin() + 1}"
            raise UserError(f"{self.settings.name}: {found}; try a lower --lr, another --save_dir")
        rows = "".join(f"{k},{loss!r}\n" for k, loss in enumerate(losses.tolist(), 1))
        write_atomic(self.checkpoint.with_name("loss.csv"), "step,loss\n" + rows)
        state = {"name": self.settings.name, "model": self.model.state_dict(), "losses": losses}
        state |= {"average": self.average.state_dict(), "moments": self.moments}
        write_atomic(self.checkpoint, state)


def train(settings: Settings, images: Tensor, folder: Path) -> None:
    """Trains one model, from its checkpoint if there is one, and writes ``model.pt``. Raises
    UserError when it diverges, and KeyboardInterrupt, after saving, when Ctrl-C was pressed."""
    (folder / "samples").mkdir(exist_ok=True)
    steps, size, n = settings.steps, settings.batch_size, settings.n_frames
    frames = [math.ceil(steps * k / n) for k in range(1, n + 1)]
    trainer = Trainer(settings, images, folder / "checkpoint.pt")
    previews = {k: folder / "samples" / f"step_{k:06d}.png" for k in frames}
    preview_steps = min(PREVIEW_STEPS, settings.sample_steps, settings.timesteps)
    interrupted = []  # Ctrl-C only fills it, so that a step is never cut in two
    handler = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    bar = tqdm(desc=settings.name, total=steps * size, initial=trainer.done * size, unit="img")
    try:
        while True:
            done, path = trainer.done, previews.get(trainer.done)
            if path and not path.exists():
                how = "preview", range(settings.n_samples), preview_steps, tqdm(disable=True)
                new = trainer.diffusion.sample(trainer.average, settings.seed, *how)
                save_grid(path, to_uint8(new))
            if interrupted:
                raise KeyboardInterrupt
            if done == steps:
                break
            trainer.step()
            bar.update(size)
            if trainer.done in previews or trainer.done % 100 == 0 or interrupted:
                trainer.save()
                bar.set_postfix(step=trainer.done, loss=f"{trainer.losses[done].item():.4f}")
    finally:
        bar.close()
        signal.signal(signal.SIGINT, handler)
    kept = [(f"{settings.name}  step {k}", load_grid(p)) for k, p in previews.items() if p.exists()]
    if len(kept) < len(previews):
        print(f"NOTICE: {len(previews) - len(kept)} lost previews left out", file=sys.stderr)
    save_gif(folder / "training_progress.gif", kept)
    save_loss_curve(folder / "loss_curve.png", trainer.losses.cpu(), settings.name)
    write_atomic(folder / "model.pt", {"name": settings.name} | trainer.average.state_dict())


def sample_final(settings: Settings, folder: Path, n_eval: int, device: torch.device) -> None:
    """Brings ``samples_final.png`` to ``n_eval`` images with the averaged weights in ``model.pt``.
    Image k has its own random stream, so images that are already there are kept."""
    path, weights = folder / "samples_final.png", folder / "model.pt"
    images = [load_grid(path)] if path.exists() else []
    with reading(weights, "this run's weights"):
        assert zipfile.ZipFile(weights).testzip() is None, "checksum"
        state = dict(torch.load(weights, map_location=device, weights_only=True))
        name, ideal = state["name"], settings.name.removesuffix(f"_{settings.condition}")
        assert name in (settings.name, ideal), f"of {name}"
        model = UNet(state["stem.weight"].shape[1] // 4, settings).to(device)
        model.load_state_dict({key: state[key] for key in state.keys() - {"name"}})
        assert all(p.isfinite().all() for p in model.parameters()), "not finite"
        assert all(x.shape[1:] == (model.channels, IMAGE_SIZE, IMAGE_SIZE) for x in images), path
    size = 64 if device.type == "cpu" else 512  # a GPU takes hardly longer
    chunks = range(sum(map(len, images)), n_eval, size)
    steps = min(settings.sample_steps, settings.timesteps)
    diffusion = GaussianDiffusion(settings.timesteps, device)
    with tqdm(total=len(chunks) * steps, desc="sampling", disable=not chunks) as bar:
        for first in chunks:
            n = min(size, n_eval - first)
            # The CPU's kernels round differently for few images: a small rest has company.
            numbers = range(first, first + max(n, 16))
            new = diffusion.sample(model, settings.seed, "image", numbers, steps, bar)
            if not new.isfinite().all():
                raise UserError(f"{weights}: its images are not finite; train with a lower --lr")
            images.append(to_uint8(new[:n]).cpu())
            save_grid(path, torch.cat(images))
    config = read_config(folder / "config.json") | {"n_eval": sum(map(len, images))}
    write_atomic(folder / "config.json", json.dumps(config, indent=2))


# -------------------------------------------------------------------------------- command line
def build_parser() -> argparse.ArgumentParser:
    """The command line; most flags are the fields of Settings."""
    epilog = "arms:\n" + "\n".join(f"  {arm:10} {text}" for arm, text in ARMS.items())
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=epilog, formatter_class=formatter)
    parser.error = lambda message: parser.exit(2, f"error: {' '.join(message.split())}\n")
    add, arm = parser.add_argument, parser.add_mutually_exclusive_group()
    for flag, options in DATA_FLAGS.items():
        add(flag, **options)
    arm.add_argument("--arm", nargs="+", choices=ARMS, metavar="ARM", help="list; see below")
    text = "shorthand for --arm quantum (True) or --arm classical (False)"
    arm.add_argument("--use_quantum", nargs="?", const="True", choices=["True", "False"], help=text)
    count = {"type": between(1, 10**9, "all"), "default": [None], "metavar": "N"}
    add("--n_train", nargs="+", **count, help="training images a run, list, or all (default: all)")
    add("--seeds", nargs="+", type=between(0, 2**63 - 1), default=[0], help="list (default: 0)")
    length = parser.add_mutually_exclusive_group()
    for item in fields(Settings):
        if item.metadata:
            where = length if item.name == "steps" else parser
            flag = where.add_argument(f"--{item.name}", default=item.default, **item.metadata)
            flag.help += "" if item.default is None else " (default: %(default)s)"
    length.add_argument("--epochs", type=between(1, 10**6), help="passes over what is trained on")
    add("--n_eval", type=between(1, 50_000), default=25, help="images drawn finally (default: 25)")
    add("--weights", type=Path, metavar="FOLDER", help="only sample the models of FOLDER's runs")
    add("--save_dir", type=Path, default=Path("runs"), help="of the run folders (default: runs)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


def this_process(device: str) -> tuple[torch.device, int, int]:
    """The device, and which process this is, of how many: RANK and WORLD_SIZE, set by torchrun or a
    job array; LOCAL_RANK gives each a GPU. Raises UserError when there is none, or no such rank."""
    size, local = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_RANK", "0")
    rank = os.environ.get("RANK", "0" if size == "1" else "")
    whole = all(x.isdecimal() and len(x) < 10 for x in (rank, size, local))
    if not (whole and int(rank) < int(size)):
        raise UserError(f"RANK={rank} WORLD_SIZE={size} LOCAL_RANK={local}: not whole, or too big")
    count = torch.cuda.device_count()
    device = device.replace("auto", "cuda" if count else "cpu")
    if device == "cuda" and count:
        device = f"cuda:{int(local) % count}"
    if device not in ("cpu", *(f"cuda:{k}" for k in range(count))):
        expected = f"auto, cpu, cuda or cuda:N; {count} CUDA devices found; use --device cpu"
        raise UserError(f"--device {device}: expected {expected}")
    return torch.device(device), int(rank), int(size)


def make_all(args: argparse.Namespace, augment: Callable | None = None) -> None:
    """Makes every missing run that the flags ask for, or this process's share of them. ``augment``
    makes eight of each image. Mistakes are found before any work; one run's stops no other."""
    device, rank, processes = this_process(args.device)
    arms = args.arm or ["quantum" if args.use_quantum == "True" else "classical"]
    options = {f.name: getattr(args, f.name) for f in fields(Settings) if f.metadata}
    for settings in [Settings(arm, **options) for arm in arms]:
        if settings.arm in QUANTUM_ARMS:
            check_simulation(settings)
    source, images, labels = load_images(args.data, args.data_dir)
    names, runs, failed = args.classes or [DEFAULT_CLASS[source]], [], []
    ids = labels.unique().tolist() if "all" in names else map(CLASS_IDS.get, names)
    grid = itertools.product(dict.fromkeys(ids), args.n_train, arms, args.seeds)
    for label, n_train, arm, seed in itertools.islice(grid, rank, None, processes):
        chosen = select_images(images, labels, label, n_train, seed)
        counts = {"total": len(labels), "available": int((labels == label).sum())}
        if augment:
            chosen, counts["symmetries"] = augment(chosen), 8
        if args.epochs:
            options["steps"] = math.ceil(args.epochs * len(chosen) / args.batch_size)
        how = options if arm in QUANTUM_ARMS else options | IDEAL
        settings = Settings(arm, source, label, n_train, seed, **how)
        config = run_config(settings, chosen, counts, device)
        if args.weights:
            config |= find_weights(args.weights, settings, config)
        with open_run(args.save_dir / settings.name, config):
            runs.append((settings, config))  # not the images, of which a grid has too many
    for number, (settings, config) in enumerate(runs, 1):
        folder = args.save_dir / settings.name
        print(f"[{number}/{len(runs)}] {settings.name}", flush=True)
        try:
            with open_run(folder, config):
                model = folder / "model.pt"
                if args.weights and not model.exists():
                    write_atomic(model, Path(config["weights_from"]).read_bytes())
                if not model.exists():
                    if settings.arm in QUANTUM_ARMS:
                        save_circuit(folder / "circuit.png", settings)
                    which = settings.label, settings.n_train, settings.seed
                    chosen = select_images(images, labels, *which)
                    train(settings, (augment(chosen) if augment else chosen).to(device), folder)
                sample_final(settings, folder, args.n_eval, device)
        except UserError as error:
            failed.append(str(error))
    if failed:
        raise UserError("; ".join(failed))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 a mistake of the user's, 130 interrupted."""
    sys.stderr = sys.stderr or io.StringIO()  # closed: the progress bars need one
    try:
        args = build_parser().parse_args(argv)
        make_all(args)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "allocat" not in str(error):
            raise  # a fault of this script
        print("error:", " ".join(str(error).split()) or "out of memory", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
