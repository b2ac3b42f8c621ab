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
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

# OpenMP's threads spin while they wait for each other: on a machine that is busy with other work
# that makes a step up to thirteen times slower. Spinning for a shorter time costs nothing.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch loads OpenMP

import numpy as np
import pennylane as qml
import torch
import torch.nn.functional as F
import torchvision
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, PngImagePlugin
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

# ---------------------------------------------------------------------------------- settings

IMAGE_SIZE = 28
TILE_PADDING = 2  # white pixels between the tiles of a picture, before enlargement
PREVIEW_STEPS = 50  # respaced sampling steps of the previews
SAMPLE_BATCH = 16, 64  # least and most images of the final grid that are sampled together
GIF_BYTES = 400_000
EXACT_LAYERS = 5  # memory and time grow by 16 with every layer
MIXED_QUBITS = 10  # of PennyLane's default.mixed: 16 MiB a sample, four times as much each qubit

Noise = Sequence[float] | None  # (p1, p2), depolarising probabilities: see quantum_circuit
Generators = torch.Generator | Sequence[torch.Generator]  # one for all images, or one for each

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
CLASS_PREFIX = ""  # between data set and class in a run's name


class UserError(Exception):
    """A mistake that the user can mend: printed as one line, exit code 2."""


class DivergedError(UserError):
    """The loss of a run is not finite."""


def between(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from low to high, whole when ``low`` is an int."""

    def parse(text: str) -> float:
        value = type(low)(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}, expected {low} to {high}")
        return value

    parse.__name__ = type(low).__name__  # argparse names the type in its messages
    return parse


def probabilities(text: str) -> tuple[float, float] | None:
    """An argparse type: two probabilities, as in 0.001,0.01; None when both are zero."""
    pair = tuple(map(between(0.0, 1.0), text.split(",")))
    if len(pair) != 2:
        raise argparse.ArgumentTypeError(f"{text}, expected two probabilities, as in 0.001,0.01")
    return pair if any(pair) else None


def json_object(text: str) -> dict | None:
    """An argparse type: a JSON object; None when it is empty."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text}, expected a JSON object, as in {{"seed": 1}}')
    return value or None


def setting(default: Any, kind: Callable, text: str, metavar: str | None = None) -> Any:
    """A field of Settings that is a flag of the same name."""
    return field(default=default, metadata={"type": kind, "help": text, "metavar": metavar})


@dataclass(frozen=True)
class Settings:
    """Everything that one run's result depends on."""

    arm: str
    data: str
    label: int
    n_train: int | None
    seed: int
    steps: int = setting(2820, between(1, 10**8), "optimizer steps: 30 epochs over a full digit")
    batch_size: int = setting(64, between(1, 10**5), "images per step")
    lr: float = setting(3e-3, between(1e-9, 1e3), "peak learning rate")
    ema_decay: float = setting(0.995, between(0.0, 0.999999), "target decay of the weights' mean")
    n_qubits: int = setting(16, between(1, 1024), "qubits, or units of the matched gate")
    n_layers: int = setting(3, between(1, 100), "circuit layers")
    timesteps: int = setting(1000, between(1, 10**5), "noise levels T")
    n_frames: int = setting(30, between(1, 1000), "previews in a run")
    n_samples: int = setting(5, between(1, 1000), "images per preview")
    # How the images are drawn and the circuit is run: CONDITIONS.
    sample_steps: int | None = setting(
        None, between(1, 10**5), "sampling steps of the final grid (default: timesteps)"
    )
    simulator: str = setting("exact", str, "exact, or a PennyLane device")
    simulator_options: dict | None = setting(
        None, json_object, "the PennyLane device's keyword arguments, as a JSON object", "JSON"
    )
    shots: int | None = setting(
        None, between(1, 10**6), "measurements per expectation value (default: exact values)"
    )
    gate_noise: tuple[float, float] | None = setting(
        None,
        probabilities,
        "depolarising probabilities: after every one-qubit gate, on both qubits of every CNOT",
        "P1,P2",
    )
    readout_noise: float = setting(
        0.0, between(0.0, 1.0), "probability that a measured bit is flipped", "Q"
    )

    @property
    def model_name(self) -> str:
        """Which weights: arm, data, class, size and seed."""
        size = "all" if self.n_train is None else self.n_train
        label = CLASS_PREFIX + CLASS_NAMES[self.label]
        return f"{self.arm}_{self.data}{label}_n{size}_seed{self.seed}"

    @property
    def condition(self) -> str:
        """What is not ideal in a run, for example ``shots1000_gate0.001-0.01``; else empty."""
        words = [] if self.simulator == "exact" else [self.simulator]
        if self.shots:
            words.append(f"shots{self.shots}")
        if self.gate_noise:
            words.append("gate{}-{}".format(*self.gate_noise))
        if self.readout_noise:
            words.append(f"readout{self.readout_noise}")
        if self.sample_steps not in (None, self.timesteps):
            words.append(f"steps{self.sample_steps}")
        return "_".join(words)

    @property
    def name(self) -> str:
        """The run folder's name, for example ``quantum_mnist3_nall_seed0_shots1000``."""
        return "_".join(filter(None, [self.model_name, self.condition]))


CIRCUIT_CONDITIONS = ("simulator", "simulator_options", "shots", "gate_noise", "readout_noise")
CONDITIONS = ("sample_steps", *CIRCUIT_CONDITIONS)


def random_stream(seed: int, *name: object, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on ``seed`` and ``name`` alone.

    Every use of randomness has a stream of its own (batch k, image k, the data subset), so none
    disturbs another, and nothing but the step number has to be stored to resume a run.
    """
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def draw(kind: Callable, generator: Generators | None, *size: int) -> Tensor:
    """``kind`` (torch.rand or torch.randn) of ``size``, from one generator, or from a sequence of
    them, one for each entry of the first dimension; None is torch's own."""
    if isinstance(generator, Sequence):
        return torch.stack([kind(size[1:], generator=g, device=g.device) for g in generator])
    return kind(size, generator=generator, device=generator and generator.device)


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Whatever reading a file raises becomes a UserError that names it and what it should be."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{path}: not {what} ({reason})") from error


# -------------------------------------------------------------------------------------- data


def load_images(data: str, data_dir: Path, split: str = "train") -> tuple[str, Tensor, Tensor]:
    """Reads one split: (source, images (N, 1, 28, 28) uint8, labels (N,) int64).

    Args:
        data: ``mnist`` (downloaded when missing), ``digits`` (scikit-learn's 1,797 embedded 8x8
            digits, enlarged; every fifth is the test split), or ``auto``: the first, and without a
            network the second. The returned source says which.
        data_dir: torchvision's root folder, which holds ``MNIST/raw``.
        split: ``train`` or ``test``.

    Raises:
        UserError: MNIST was asked for and cannot be had, or its files are damaged.
    """
    raw = data_dir and data_dir / "MNIST" / "raw"
    if data != "digits":
        try:
            download(raw, lambda aside: torchvision.datasets.MNIST(aside, download=True))
            with reading(raw, "MNIST; delete it to download again"):
                dataset = torchvision.datasets.MNIST(data_dir, train=split == "train")
                images, labels = dataset.data[:, None], dataset.targets.long()
                assert images.shape[1:] == (1, IMAGE_SIZE, IMAGE_SIZE), f"images {images.shape}"
                assert labels.shape == (len(images),), f"{len(images)} images, {len(labels)} labels"
                assert labels.min() >= 0 and labels.max() <= 9, "labels outside 0-9"
                return "mnist", images, labels
        except ConnectionError as error:
            if data == "mnist":
                way_out = f"copy the four *-ubyte files to {raw} or use --data digits"
                raise UserError(f"{error}; {way_out}") from error
            notice = "Using scikit-learn's 8x8 DIGITS INSTEAD OF MNIST; all names say so."
            print(f"NOTICE: {error}. {notice}", file=sys.stderr)
    bunch = load_digits()
    small = torch.from_numpy(bunch.images)[:, None] / 16  # published range 0..16
    large = F.interpolate(small, size=IMAGE_SIZE, mode="bicubic", align_corners=False)
    held_out = torch.arange(len(large)) % 5 == 4
    chosen = held_out if split == "test" else ~held_out
    images = (large.clamp(0, 1) * 255).round().to(torch.uint8)
    return "digits", images[chosen], torch.from_numpy(bunch.target).long()[chosen]


def download(path: Path, fetch: Callable[[Path], object]) -> None:
    """Fetches a data set aside and renames what is to be at ``path``, unless it is there, so that
    neither a broken download nor a second process leaves half of it. Raises ConnectionError."""
    if path.exists():
        return
    try:
        folder = path.parents[1] if path.name == "raw" else path.parent  # torchvision's layout
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            fetch(Path(aside))
            path.parent.mkdir(exist_ok=True)
            (Path(aside) / path.relative_to(folder)).rename(path)
    except (OSError, RuntimeError) as error:
        if not path.exists():
            reason = " ".join(str(error).split())
            raise ConnectionError(f"no {path}, download failed: {reason}") from None


def select_images(
    images: Tensor, labels: Tensor, label: int, n_train: int | None, seed: int
) -> Tensor:
    """The training images of a run: ``n_train`` of one class (None: all), drawn by the seed.

    Subsets of one seed are nested: 25 are the first of 100. images (N, C, H, W), labels (N,).
    Raises UserError when ``n_train`` is not between 1 and the size of the class.
    """
    of_class = images[labels == label]
    n = len(of_class) if n_train is None else n_train
    if not 1 <= n <= len(of_class):
        has = f"class {CLASS_NAMES[label]} has {len(of_class)} training images"
        raise UserError(f"--n_train {n}: {has}, expected 1 to {len(of_class)} or all")
    order = torch.randperm(len(of_class), generator=random_stream(seed, "subset"))
    return of_class if n_train is None else of_class[order[:n]]


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1, the value range of the diffusion."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float -1..1 -> uint8 0..255, rounded to the nearest; values outside are clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------- noise schedule and diffusion


def cosine_beta_schedule(timesteps: int, s: float = 0.008) -> Tensor:
    """beta_1 .. beta_T of the cosine schedule, (timesteps,) float64, clipped to at most 0.999.

    Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17.
    """
    t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2  # alpha_bar(t) = f(t) / f(0)
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


class GaussianDiffusion:
    """The forward process q and the ancestral sampler p of DDPM (Ho et al. 2020).

    Index ``t`` = 0 .. T-1 stands for the paper's t = 1 .. T. The network predicts
    v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022), which stays
    well-conditioned at the noisy end, where predicting the noise says nothing about x0.
    """

    def __init__(
        self, timesteps: int, device: torch.device | str = "cpu", keep: Tensor | None = None
    ):
        """``keep`` lists the ascending steps of a respaced process; default all."""
        self.timesteps, self.device = timesteps, torch.device(device)
        steps = torch.arange(timesteps) if keep is None else keep
        alpha_bar = torch.cumprod(1 - cosine_beta_schedule(timesteps), 0)[steps]
        previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        beta = 1 - alpha_bar / previous

        def table(values: Tensor) -> Tensor:
            return values.float().to(device)

        self.model_t = steps.to(device)
        self.signal, self.noise = table(alpha_bar.sqrt()), table((1 - alpha_bar).sqrt())
        # q(x_{t-1} | x_t, x0), Ho et al. eq. 6 and 7; the variance is beta-tilde.
        self.mean_x0 = table(previous.sqrt() * beta / (1 - alpha_bar))
        self.mean_xt = table((1 - beta).sqrt() * (1 - previous) / (1 - alpha_bar))
        self.std = table((beta * (1 - previous) / (1 - alpha_bar)).sqrt())

    def respaced(self, steps: int) -> "GaussianDiffusion":
        """The process with ``steps`` of the T steps, evenly spaced, first and last included.

        Nichol & Dhariwal 2021, section 4. Raises ValueError unless 1 <= steps <= T.
        """
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps = {steps}, expected 1 to {self.timesteps}")
        keep = torch.linspace(self.timesteps - 1, 0, steps, dtype=torch.float64).round().long()
        return GaussianDiffusion(self.timesteps, self.device, keep.flip(0))

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t given x0 (Ho et al. eq. 4). x0, noise: (B, C, H, W); t: (B,) int64."""
        return self._at(self.signal, t) * x0 + self._at(self.noise, t) * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v, what the network is trained to output for q_sample(x0, t, noise)."""
        return self._at(self.signal, t) * noise - self._at(self.noise, t) * x0

    def predict_x0(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """x0 from x_t and the network's output v, clipped to -1..1."""
        return (self._at(self.signal, t) * x - self._at(self.noise, t) * output).clamp(-1, 1)

    def p_sample(self, model: nn.Module, x: Tensor, t: int, noise: Tensor) -> Tensor:
        """One ancestral step x_t -> x_{t-1} with clipped x0; ``noise`` like x, unused at t = 0."""
        index = torch.full((len(x),), t, device=x.device)
        x0 = self.predict_x0(x, index, model(x, self.model_t[index]))
        return self.mean_x0[t] * x0 + self.mean_xt[t] * x + self.std[t] * noise

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        n: int,
        generator: Generators,
        steps: int | None = None,
        progress: tqdm | None = None,
    ) -> Tensor:
        """Draws n images, (n, C, 28, 28) float32 in -1..1, in ``steps`` of the T steps (all).

        model: (x (n, C, 28, 28), t (n,)) -> v; its attribute ``channels`` gives C (default 1). With
        a generator for each image, an image does not depend on those it is drawn with. ``progress``
        is advanced by one at each step.
        """
        process = self if steps is None else self.respaced(steps)
        size = (n, getattr(model, "channels", 1), IMAGE_SIZE, IMAGE_SIZE)
        x = draw(torch.randn, generator, *size).to(self.device)
        for t in reversed(range(len(process.model_t))):
            noise = draw(torch.randn, generator, *size).to(self.device)
            x = process.p_sample(model, x, t, noise)
            if progress is not None:
                progress.update()
        return x.clamp(-1, 1)

    @staticmethod
    def _at(table: Tensor, t: Tensor) -> Tensor:
        return table[t][:, None, None, None]


# --------------------------------------------------- quantum circuit and exact simulation


def quantum_circuit(
    angles: Tensor, weights: Tensor, entangle: bool = True, gate_noise: Noise = None
) -> None:
    """The layer's definition in PennyLane operations, on wires 0 .. n-1.

    RY(angles[i]), then per layer RZ(weights[l, i, 0]), RY(weights[l, i, 1]) on every qubit and the
    chain CNOT(0,1), CNOT(1,2), ...

    angles: (n,) or (B, n), radians; weights: (L, n, 2) = (RZ, RY) radians, or (L, n, 1) for the
    published circuit, RZ alone; entangle: False leaves the CNOTs out; gate_noise: (p1, p2),
    probabilities of PennyLane's ``DepolarizingChannel``, which follows every one-qubit gate (p1)
    and stands on both qubits after every CNOT (p2).
    """
    n_layers, n_qubits, kinds = weights.shape
    p1, p2 = gate_noise or (0, 0)

    def depolarise(p: float, *wires: int) -> None:
        for wire in wires if p else ():
            qml.DepolarizingChannel(p, wires=wire)

    for i in range(n_qubits):
        qml.RY(angles[..., i], wires=i)
        depolarise(p1, i)
    for layer in range(n_layers):
        for i in range(n_qubits):
            qml.RZ(weights[layer, i, 0], wires=i)
            depolarise(p1, i)
            if kinds == 2:
                qml.RY(weights[layer, i, 1], wires=i)
                depolarise(p1, i)
        for i in range(n_qubits - 1 if entangle else 0):
            qml.CNOT(wires=[i, i + 1])
            depolarise(p2, i, i + 1)


def make_qnode(
    n_qubits: int,
    n_layers: int,
    device_name: str = "default.qubit",
    entangle: bool = True,
    diff_method: str | None = "best",
    options: dict | None = None,
    shots: int | None = None,
    gate_noise: Noise = None,
    readout_noise: float = 0.0,
) -> qml.QNode:
    """``quantum_circuit`` as a QNode on any PennyLane device; ``options`` are its arguments.

    diff_method is None for inference alone; with shots (measurements of all qubits together; None:
    exact values) any other means parameter-shift. Noise needs a device that takes channels, such as
    ``default.mixed``. Returns f(angles (B, n), weights (L, n, 2 or 1)) -> list of n tensors (B,),
    <Z_i>. Raises qml.exceptions.DeviceError: no such device.
    """
    device = qml.device(device_name, wires=n_qubits, **options or {})
    if shots and diff_method:
        diff_method = "parameter-shift"

    @qml.qnode(device, interface="torch", diff_method=diff_method)
    def expectations(angles: Tensor, weights: Tensor):
        quantum_circuit(angles, weights, entangle, gate_noise)
        for i in range(n_qubits if readout_noise else 0):
            qml.BitFlip(readout_noise, wires=i)
        return [qml.expval(qml.PauliZ(i)) for i in range(n_qubits)]

    if diff_method == "best":
        example = torch.zeros(n_qubits), torch.zeros(n_layers, n_qubits, 2)
        diff_method = qml.workflow.get_best_diff_method(expectations)(*example)
    if shots:
        expectations = qml.set_shots(expectations, shots=shots)
    if diff_method == "parameter-shift":  # which takes no batch of inputs
        expectations = qml.transforms.broadcast_expand(expectations)
    return expectations


def transfer_matrices(weights: Tensor, gate_noise: Noise = None) -> Tensor:
    """The site tensors of the circuit's matrix product state, doubled, for all inputs at once.

    One CNOT chain per layer means: after layer l, qubit i holds b_l = s + c_l (mod 2), where s is
    the outcome of its own rotation of b_{l-1}, and c_l is what its left neighbour holds. So the
    bond to the right carries (b_1 .. b_L) and the site matrix, from bond c to bond b, is

        A_i[c, b] = prod_l U_{l,i}[b_l + c_l, b_{l-1}],    U_{l,i} = RY(w1) RZ(w0).

    Expectations need A and its conjugate: E -> A^T E A* with the last index pair kept diagonal,
    since <Z_i> reads b_L. This map on E (Hermitian) is what is returned, as a real matrix on
    Re E + Im E. The input enters through RY(x)|0>, whose density matrix is linear in
    (1, cos x, sin x), hence three matrices per qubit; all else is independent of the batch.

    Noise costs nothing: a channel maps the pair (b, b*) of one qubit, so it joins the gate before
    it, and the bond does not grow. The result is the exact mean over all noise. (That of the CNOT
    which a qubit controls in the last layer changes its own measurement: ``noise_factors``.)

    weights: (L, n, 2) or (L, n, 1), radians; gate_noise: as in ``quantum_circuit``. Returns
    (n, 3, D, D) with D = 2 * 4**(L-1), indexed [qubit, (1, cos, sin), bond b b*, bond c c*].
    """
    n_layers, n, kinds = weights.shape
    rz = weights[..., 0]
    half = weights[..., 1] / 2 if kinds == 2 else torch.zeros_like(rz)
    cos, sin = half.cos(), half.sin()
    ry = torch.stack([cos, -sin, sin, cos], -1).view(n_layers, n, 2, 2)
    # RY as rho -> U rho U* on the entries (00, 01, 10, 11) of a qubit's density matrix, and the
    # CNOT after it: the pair (s, s*) becomes b = s + c, so [b, c, b_before] is [b + c, b_before].
    tables = (ry[..., :, None, :, None] * ry[..., None, :, None, :]).reshape(n_layers, n, 4, 4)
    if gate_noise:
        # Depolarising commutes with RZ. Before RY: the noise of what came before, and of RZ.
        one, two = (rz.new_full((), 1 - 4 * p / 3) for p in gate_noise)
        before = one * torch.where(torch.arange(n, device=rz.device) == n - 1, 1, two)
        before = torch.stack([(one * one).expand(n), *[before] * (n_layers - 1)])
        tables = tables @ depolarising(before)
        if kinds == 2:
            tables = depolarising(one) @ tables
    pair = torch.arange(4, device=weights.device)
    source = pair[:, None] ^ pair
    tables = tables.index_select(2, source.flatten()).view(n_layers, n, 4, 4, 4)
    if gate_noise:  # on the target of the CNOT, which qubit 0 never is
        after = torch.where(torch.arange(n, device=rz.device) == 0, 1, two)
        tables = torch.einsum("nab,lnbcd->lnacd", depolarising(after), tables)
    # RZ before it touches only 01 and 10, so a circuit of RZ alone is independent of its weights
    # to the last bit.
    phase = torch.stack([0 * rz, -rz, rz, 0 * rz], -1)
    phase = torch.complex(phase.cos(), phase.sin())
    # RY(x)|0> has rho = (1 + cos x Z + sin x X) / 2.
    eye, bit = torch.eye(2, dtype=rz.dtype, device=rz.device), torch.arange(2, device=rz.device)
    data = torch.stack([eye, eye * (1 - 2 * bit), eye.flip(0)]).flatten(1) / 2
    site = data.view(1, 3, 1, 4, 1).expand(n, 3, 1, 4, 1)  # [qubit, k, older b, newest b, c]
    for layer in range(n_layers):
        d = site.shape[-1]
        site = site * phase[layer, :, None, None, :, None]
        table = tables[layer]
        if layer == n_layers - 1:
            # Measured: of the last pairs only (0, 0) and (1, 1) survive, so this layer keeps E
            # Hermitian in the others. E = S + iK: T E -> (Re T + Im T transpose)(S + K).
            table = table[:, ::3, ::3]
            bits = 2 * layer
            exchange = [4 + (i ^ 1) for i in range(bits)]  # every c with its c*
            imag = site.imag.reshape(n, 3, -1, 4, *[2] * bits).permute(0, 1, 2, 3, *exchange)
            site = site.real + imag.reshape(n, 3, -1, 4, d)
        table = table.permute(0, 3, 1, 2)[:, None, None, :, :, None]  # (n, 1, 1, b_before, b, 1, c)
        pairs = table.shape[4]
        site = site.unsqueeze(4).unsqueeze(6) * table
        if layer == 0:  # b_0 is the input's, no bond
            site = site.sum(3)
        site = site.reshape(n, 3, -1, pairs, d * pairs)
    return site.reshape(n, 3, site.shape[-1], site.shape[-1])


def depolarising(factor: Tensor) -> Tensor:
    """rho -> factor rho + (1 - factor) / 2 on rho's entries (00, 01, 10, 11), (..., 4, 4)."""
    eye = {"dtype": factor.dtype, "device": factor.device}
    trace = torch.eye(2, **eye).flatten()
    mixed = trace[:, None] * trace / 2  # the trace times the maximally mixed state
    return mixed + factor[..., None, None] * (torch.eye(4, **eye) - mixed)


def environments(angles: Tensor, transfer: Tensor) -> tuple[Tensor, Tensor]:
    """Everything left and everything right of each bond: one sweep from each end, in one batch.

    left_i = T_i(x_i) left_{i-1} starts at the left edge, where c = 0; right_{i-1} =
    T_i(x_i)^T right_i starts from all ones (the qubits further right are summed over).

    angles: (B, n), radians; transfer: (n, 3, D, D). Returns left, right, each (n, B, D).
    """
    batch, n = angles.shape
    d = transfer.shape[-1]
    inputs = torch.stack([torch.ones_like(angles), angles.cos(), angles.sin()], -1)  # (B, n, 3)
    inputs = inputs.transpose(0, 1)[..., None]
    inputs = torch.stack([inputs, inputs.flip(0)], 1)  # (n, 2, B, 3, 1)
    maps = torch.stack([transfer.mT, transfer.flip(0)], 1).view(n, 2, 3 * d, d)
    edge = angles.new_ones(2, batch, d)
    edge[0, :, 1:].zero_()
    bonds = [edge]
    for x, site in zip(inputs.unbind(0), maps.unbind(0), strict=True):
        bonds.append(torch.bmm((x * bonds[-1].unsqueeze(2)).view(2, batch, 3 * d), site))
    bonds = torch.stack(bonds)
    return bonds[1:, 0], bonds[:-1].flip(0)[:, 1]


def sweep(angles: Tensor, transfer: Tensor) -> Tensor:
    """<Z_i> = sum_b (-1)^{b_L} left_i[b] right_i[b] of every qubit, from ``transfer_matrices``.

    angles: (B, n), radians; transfer: (n, 3, D, D). Returns (B, n) in -1..1.
    """
    left, right = environments(angles, transfer)
    sign = 1 - 2.0 * (torch.arange(left.shape[-1], device=left.device) % 2).to(left)
    return ((left * right) @ sign).T


def sample_outcomes(angles: Tensor, transfer: Tensor, uniform: Tensor) -> Tensor:
    """Measures all qubits together, from left to right: 1 or -1 of every qubit and shot.

    What is left of a bond, given the outcomes so far, and all that is right of it give the next
    qubit's probabilities p(z) = sum of E[b] right[b] over b_L = z. These are the joint distribution
    of the noisy circuit; every shot has errors of its own, and nothing is approximated.

    angles: (B, n), radians; transfer: (n, 3, D, D); uniform: (B, S, n) random numbers in 0..1, one
    for each measurement. Returns (B, S, n).
    """
    _, right = environments(angles, transfer)
    inputs = torch.stack([torch.ones_like(angles), angles.cos(), angles.sin()], -1)
    left = angles.new_zeros(*uniform.shape[:2], transfer.shape[-1])
    left[..., 0].fill_(1)
    outcomes = []
    for i, number in enumerate(uniform.unbind(-1)):
        left = left @ torch.einsum("bk,kdc->bcd", inputs[:, i], transfer[i])
        pairs = right[i].unflatten(-1, (-1, 2))  # the last bit of b is the measured one
        weight = left @ torch.diag_embed(pairs).flatten(1, 2)  # (B, S, 2)
        zero, one = weight.clamp(min=0).unbind(-1)  # p(0), p(1)
        bit = number * (zero + one) >= zero
        kept = torch.stack([~bit, bit], -1) / torch.where(bit, one, zero)[..., None]
        left = (left.unflatten(-1, (-1, 2)) * kept[..., None, :]).flatten(-2)
        outcomes.append(1 - 2 * bit.to(angles.dtype))
    return torch.stack(outcomes, -1)


def product_expectations(angles: Tensor, weights: Tensor) -> Tensor:
    """<Z_i> without CNOTs: every qubit's Bloch vector (x, y, z), turned gate by gate.

    angles: (B, n), weights: (L, n, 2) as in ``quantum_circuit``. Returns (B, n).
    """
    x, y, z = angles.sin(), 0 * angles, angles.cos()
    for rz, ry in weights.mT:  # (n,) each
        x, y = x * rz.cos() - y * rz.sin(), x * rz.sin() + y * rz.cos()
        x, z = x * ry.cos() + z * ry.sin(), z * ry.cos() - x * ry.sin()
    return z


def noise_factors(
    n: int,
    n_layers: int,
    entangle: bool = True,
    gate_noise: Noise = None,
    readout_noise: float = 0.0,
) -> Tensor:
    """By what <Z_i> shrinks behind the sites, (n,): a flip of the measured bit with probability q
    is a factor 1 - 2 q. Misread bits; the errors of the last CNOT on its control, behind which no
    site comes; and without CNOTs those of all 1 + 2 L gates of a qubit."""
    p1, p2 = gate_noise or (0.0, 0.0)
    factors = torch.full((n,), 1 - 2 * readout_noise, dtype=torch.float64)
    if not entangle:
        return factors * (1 - 4 * p1 / 3) ** (1 + 2 * n_layers)
    factors[:-1] *= 1 - 4 * p2 / 3
    return factors


def staircase_expectations(
    angles: Tensor, weights: Tensor, entangle: bool = True, gate_noise: Noise = None
) -> Tensor:
    """``quantum_circuit`` simulated exactly: <Z_i> of every qubit, the mean over all errors.

    A matrix product state of bond dimension 2**L holds the circuit's state, with noise its density
    matrix, without truncation: time and memory grow linearly with the number of qubits.

    angles: (B, n), radians; weights: (L, n, 2) or with entanglement (L, n, 1), radians. Returns
    (B, n) in -1..1, differentiable in both.
    """
    if entangle:
        values = sweep(angles, transfer_matrices(weights, gate_noise))
    else:
        values = product_expectations(angles, weights)
    factors = noise_factors(*weights.shape[1::-1], entangle, gate_noise)
    return values * factors.to(values) if gate_noise else values


def check_simulation(arm: str, gate_noise: Noise = None) -> None:
    """Compares the exact simulation with PennyLane's, on a small random circuit of this arm.

    Raises UserError when values or gradients differ: one was edited without the other.
    """
    generator = random_stream(0, "check")
    entangle, kinds = arm != "product", 1 if arm == "published" else 2
    angles = torch.randn(2, 4, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.randn(2, 4, kinds, dtype=torch.float64, generator=generator).requires_grad_()
    device = "default.mixed" if gate_noise else "default.qubit"
    qnode = make_qnode(4, 2, device, entangle, gate_noise=gate_noise)
    reference = torch.stack(qnode(angles, weights), -1)
    exact = staircase_expectations(angles, weights, entangle, gate_noise)
    probe = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    ours, theirs = (
        [values, *torch.autograd.grad((values * probe).sum(), (angles, weights))]
        for values in (exact, reference)
    )
    error = max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True))
    if not error < (1e-6 if gate_noise else 1e-9):  # PennyLane's channels are float32
        raise UserError(
            f"the exact simulation differs from quantum_circuit by {error:.1e}: one was "
            "edited without the other. Use --simulator default.qubit, or mend transfer_matrices"
        )


# ---------------------------------------------------------------------------- attention gates


class MatchedAttention(nn.Module):
    """The control gate: Linear(C, n), a function per unit, Linear(n, C), and no circuit.

    Each unit applies z <- cos(a z + b) once per layer, with weights (a, b) of its own: as many
    weights as the circuit, the same range -1..1, and nothing that mixes the units. The output
    projection starts at zero, so that every arm starts as the classical model.
    """

    def __init__(self, channels: int, n_qubits: int = 16, n_layers: int = 3):
        super().__init__()
        self.project_in = nn.Linear(channels, n_qubits)
        self.project_out = nn.Linear(n_qubits, channels)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)
        shift = torch.rand(n_layers, n_qubits) * 2 * math.pi
        self.weights = nn.Parameter(torch.stack([torch.ones_like(shift), shift], -1))

    def expectations(self, angles: Tensor) -> Tensor:
        """What replaces the circuit. angles (B, n) -> (B, n) in -1..1."""
        for scale, shift in self.weights.mT:  # (n,) each
            angles = torch.cos(scale * angles + shift)
        return angles

    def forward(self, features: Tensor) -> Tensor:
        """features (B, C) -> gate (B, C)."""
        return self.project_out(self.expectations(self.project_in(features)))


class QuantumAttention(MatchedAttention):
    """The gate of the paper: the same projections, with <Z_i> of the circuit between them.

    channels is C; arm one of ``QUANTUM_ARMS``; simulator ``exact``, or a PennyLane device with its
    keyword arguments. With shots <Z_i> is the mean of so many measurements of all qubits together,
    each with errors of its own, and the gradient is the exact mean's (straight-through), or on a
    PennyLane device the parameter-shift rule's, measured as well. ``readout_noise`` is the
    probability that a measured bit is flipped. The attribute ``generator`` draws the shots.
    """

    def __init__(
        self,
        channels: int,
        n_qubits: int = 16,
        n_layers: int = 3,
        arm: str = "quantum",
        simulator: str = "exact",
        simulator_options: dict | None = None,
        shots: int | None = None,
        gate_noise: Noise = None,
        readout_noise: float = 0.0,
    ):
        super().__init__(channels, n_qubits, n_layers)
        self.entangle = arm != "product"
        kinds = 1 if arm == "published" else 2
        weights = torch.rand(n_layers, n_qubits, kinds) * 2 * math.pi  # as PennyLane's TorchLayer
        self.weights = nn.Parameter(weights, requires_grad=arm != "frozen")
        self.shots, self.gate_noise = shots, gate_noise
        self.noisy = bool(gate_noise or readout_noise)
        factors = noise_factors(n_qubits, n_layers, self.entangle, gate_noise, readout_noise)
        self.register_buffer("factors", factors, persistent=False)
        self.generator: Generators | None = None
        self.qnode = self.inference_qnode = self.kept = None
        if simulator != "exact":
            circuit = (n_qubits, n_layers, simulator, self.entangle)
            how = (simulator_options, shots, gate_noise, readout_noise)
            self.qnode = make_qnode(*circuit, "best", *how)
            self.inference_qnode = make_qnode(*circuit, None, *how)

    def expectations(self, angles: Tensor) -> Tensor:
        """<Z_i> in -1..1. angles: (B, n), radians. Returns (B, n)."""
        if self.qnode is not None:
            qnode = self.qnode if torch.is_grad_enabled() else self.inference_qnode
            values = torch.stack(qnode(angles.cpu(), self.weights.cpu()), -1).to(angles)
            return values.view_as(angles)  # with shots some devices drop a batch of one
        if self.entangle:
            transfer = self._transfer()
            mean = sweep(angles, transfer)
        else:
            transfer = None
            mean = product_expectations(angles, self.weights)
        if self.noisy:
            mean = mean * self.factors.to(mean)
        if self.shots:
            mean = mean + (self._measure(angles, transfer, mean) - mean).detach()
        return mean

    @torch.no_grad()
    def _measure(self, angles: Tensor, transfer: Tensor | None, mean: Tensor) -> Tensor:
        """The mean (B, n) of ``shots`` measurements of all qubits together."""
        size = len(angles), 1 + self.noisy, self.shots, angles.shape[1]
        uniform = draw(torch.rand, self.generator, *size).to(angles)
        if transfer is None:  # the qubits are independent
            return 2 * (2 * uniform[:, 0] < 1 + mean[:, None]).to(angles).mean(1) - 1
        bits = sample_outcomes(angles, transfer, uniform[:, 0])
        if self.noisy:
            bits = torch.where(2 * uniform[:, 1] < 1 - self.factors.to(bits), -bits, bits)
        return bits.mean(1)

    def _transfer(self) -> Tensor:
        """The circuit's transfer matrices; without gradients, kept until the weights change."""
        if torch.is_grad_enabled():
            return transfer_matrices(self.weights, self.gate_noise)
        state = self.weights._version, self.weights.data_ptr(), self.weights.dtype
        if self.kept is None or self.kept[0] != state:
            self.kept = state, transfer_matrices(self.weights, self.gate_noise)
        return self.kept[1]


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
    """Multi-head attention between the positions of a feature map (not the quantum gate)."""

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = start_at_zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, H, W) -> the same shape."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, -1, height * width)
        q, k, v = qkv.transpose(3, 4).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        return x + self.out(mixed.reshape(batch, channels, height, width))


class UNet(nn.Module):
    """The denoiser: 28x28 folded to 14x14, then 7x7, where the gate sits; a skip at both.

    channels: of the images, 1 or 3; arm: one of ``ARMS``; width: feature channels at 14x14;
    bottleneck: feature channels at 7x7 (C of the gate); conditions: how the circuit is run, see
    ``QuantumAttention``. Raises ValueError for an unknown arm.
    """

    def __init__(
        self,
        channels: int = 1,
        arm: str = "classical",
        n_qubits: int = 16,
        n_layers: int = 3,
        width: int = 48,
        bottleneck: int = 128,
        **conditions: object,
    ):
        super().__init__()
        if arm not in ARMS:
            raise ValueError(f"arm {arm!r}, expected one of {', '.join(ARMS)}")
        self.channels = channels
        embedding = 128
        self.embed = nn.Sequential(
            nn.Linear(64, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
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
        self.gate: nn.Module | None = None
        if arm == "matched":
            self.gate = MatchedAttention(bottleneck, n_qubits, n_layers)
        elif arm != "classical":
            self.gate = QuantumAttention(bottleneck, n_qubits, n_layers, arm, **conditions)
        self.to(memory_format=torch.channels_last)

    def seed_circuit(self, generator: Generators) -> None:
        """Where the circuit's shots come from: one for the batch, or one a sample."""
        if isinstance(self.gate, QuantumAttention):
            self.gate.generator = generator

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


class EMA:
    """Exponential moving average of a model's weights, with decay min(target, (1+k)/(10+k)).

    The warm-up in the number of updates k (as in TensorFlow's ExponentialMovingAverage) forgets
    the random initial weights within tens of steps instead of thousands.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """shadow <- decay * shadow + (1 - decay) * model."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        new = list(model.state_dict().values())
        torch._foreach_lerp_(list(self.shadow.values()), new, 1 - decay)


# ----------------------------------------------------------------------------------- pictures


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes to a temporary name and renames, so ``path`` is never half written."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def tile(images: Tensor, columns: int, scale: int = 1) -> np.ndarray:
    """Images (N, C, H, W) uint8 as one picture (height, width, C), row by row on a white ground,
    TILE_PADDING pixels apart and then enlarged ``scale`` times."""
    half = [TILE_PADDING // 2] * 4
    tiles = F.pad(images.cpu(), half, value=255)
    picture = torchvision.utils.make_grid(tiles, nrow=columns, padding=0, pad_value=255)
    picture = F.pad(picture, half, value=255)[: images.shape[1]].permute(1, 2, 0)
    return picture.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy()


def save_grid(path: Path, images: Tensor) -> None:
    """Saves images (N, C, H, W) uint8 as one lossless PNG, with a description to split it by:
    the text chunk ``grid`` holds count, columns, tile size, padding, scale, channels and value
    range as JSON. Tile k stands at row k // columns, column k % columns."""
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
    """The images (N, C, H, W) uint8 of a PNG that ``save_grid`` wrote, to the bit.

    Raises UserError: no such file, damaged, or without the description.
    """
    with reading(path, "a sample grid of this project"), Image.open(path) as picture:
        picture.load()
        grid = json.loads(picture.text["grid"])
        half, scale = grid["padding"] // 2, grid["scale"]
        canvas = torch.from_numpy(np.array(picture)[::scale, ::scale])
        canvas = canvas.view(*canvas.shape[:2], grid["channels"])[half:-half, half:-half]
        height, width = grid["tile_height"] + 2 * half, grid["tile_width"] + 2 * half
        rows = canvas.unfold(0, height, height).unfold(1, width, width)
        assert rows.shape[:2] == (-(-grid["count"] // grid["columns"]), grid["columns"])
        return rows.flatten(0, 1)[: grid["count"], :, half:-half, half:-half].contiguous()


def save_gif(path: Path, frames: Sequence[tuple[str, Tensor]]) -> None:
    """Saves (caption, images (N, C, H, W) uint8) frames as an animation below ``GIF_BYTES``.

    Shows at most ten images a frame. The enlargement shrinks from 4, and then every other frame
    goes, until the file is small enough.
    """
    for scale, stride in [(4, 1), (3, 1), (2, 1), (1, 1), (1, 2), (1, 4), (1, 8)]:
        pictures = []
        for caption, images in frames[::-1][::stride][::-1]:  # the last frame always stays
            strip = Image.fromarray(tile(images[:10], 10, scale).squeeze())
            canvas = Image.new("RGB", (strip.width, strip.height + 14), "white")
            canvas.paste(strip, (0, 14))
            ImageDraw.Draw(canvas).text((3, 1), caption, fill="black")
            pictures.append(canvas.quantize(64))
        buffer = io.BytesIO()
        duration = [200] * (len(pictures) - 1) + [2000]  # milliseconds; rests on the last frame
        options = {"append_images": pictures[1:], "duration": duration, "loop": 0}
        pictures[0].save(buffer, "gif", save_all=True, **options)
        if buffer.tell() < GIF_BYTES:
            break
    write_atomic(path, buffer.getvalue())


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a matplotlib figure at 200 dpi, or fewer where that makes over 6,000 pixels."""
    buffer = io.BytesIO()
    dpi = min(200, 6000 / max(figure.get_size_inches()))
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
    write_atomic(path, buffer.getvalue())


def save_loss_curve(path: Path, losses: Tensor, title: str) -> None:
    """Draws the loss of every step and its mean over a hundredth of the run."""
    window = max(1, len(losses) // 100)
    smooth = losses[: len(losses) // window * window].view(-1, window).mean(1)
    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="#bbbbbb", lw=0.5, label="each step")
    centres = (torch.arange(len(smooth)) + 0.5) * window + 0.5
    axes.plot(centres, smooth, color="#0072b2", lw=1.2, label=f"mean of {window}")
    label = "weighted squared error of v"
    axes.set(xlabel="optimizer step", ylabel=label, title=title, yscale="log")
    axes.legend(frameon=False)
    save_figure(path, figure)


def save_circuit(path: Path, settings: Settings) -> None:
    """Draws the gate's circuit by PennyLane."""
    kinds = 1 if settings.arm == "published" else 2
    n, layers = settings.n_qubits, settings.n_layers
    qnode = make_qnode(n, layers, entangle=settings.arm != "product")
    figure, _ = qml.draw_mpl(qnode)(torch.zeros(n), torch.zeros(layers, n, kinds))
    save_figure(path, figure)
    plt.close(figure)


# ------------------------------------------------------------------ run folder and checkpoints


def run_config(settings: Settings, images: Tensor, counts: dict, argv: Sequence[str]) -> dict:
    """What made a run, for ``config.json``. ``images`` are those trained on, (n, C, H, W) uint8."""
    model = build_model(settings, images.shape[1])
    parameters = {"model": list(model.parameters()), "gate": []}
    if model.gate is not None:
        parameters |= {"gate": list(model.gate.parameters()), "gate_weights": [model.gate.weights]}
    parameters["trainable"] = [p for p in model.parameters() if p.requires_grad]
    commit = ""
    with contextlib.suppress(FileNotFoundError):  # no git on this machine
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        command = [*git, "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    config = {
        "name": settings.name,
        "condition": settings.condition,
        "command": shlex.join([Path(__file__).name, *argv]),
        "settings": asdict(settings) | {"label_name": CLASS_NAMES[settings.label]},
        "images": {"source": settings.data, "split": "train", **counts, "used": len(images)}
        | {"sha256": digest},
        "weights": {"weights_sha256": None},
        "parameters": {name: sum(p.numel() for p in part) for name, part in parameters.items()},
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (torch, qml, np)},
        "git": {"commit": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty")},
    }
    return json.loads(json.dumps(config))


def read_config(path: Path) -> dict:
    """A run's ``config.json``. Raises UserError when it is none, or an older version's."""
    with reading(path, "a run's configuration of this version"):
        config = json.loads(path.read_text())
        assert all(isinstance(config[part], dict) for part in ("settings", "images", "weights"))
        assert isinstance(config["n_eval"], int), "no number of images"
        return config


def differences(known: dict, asked: dict, skip: Sequence[str] = ()) -> str:
    """In what two configurations differ, as text for an error; empty when in nothing."""
    return ", ".join(
        f"{key} {known[part].get(key)!r} (asked for: {value!r})"
        for part in ("settings", "images", "weights")
        for key, value in asked[part].items()
        if key not in skip and known[part].get(key) != value
    )


def open_run(folder: Path, config: dict) -> None:
    """Creates the run folder, or makes sure that the existing one belongs to this very run.

    Raises UserError when the folder holds something else, and names the settings that differ.
    """
    path = folder / "config.json"
    if not path.exists():
        if folder.exists() and any(not f.name.endswith(".tmp") for f in folder.iterdir()):
            raise UserError(f"{folder} has no config.json: not a run; use another --save_dir")
        folder.mkdir(parents=True, exist_ok=True)
        return write_atomic(path, json.dumps(config, indent=2) + "\n")
    for left in folder.rglob(".*.tmp"):  # by a process that was killed while it wrote
        left.unlink()
    known = read_config(path)
    if found := differences(known, config):
        found = f"a run with other settings: {found}"
        raise UserError(f"{folder} holds {found}; use another --save_dir or remove that folder")
    if config["n_eval"] > known["n_eval"]:
        write_atomic(path, json.dumps(known | {"n_eval": config["n_eval"]}, indent=2) + "\n")


def find_weights(folder: Path, settings: Settings, config: dict) -> Path:
    """The ``model.pt`` that a run of the same arm, data, class, size and seed left in ``folder``.

    Raises UserError when there is none, several different ones, or one that was trained otherwise.
    """
    name = settings.model_name
    paths = [folder / name / "model.pt"]
    if not paths[0].exists():  # perhaps trained under a condition, or with other sampling steps
        paths = sorted(folder.glob(f"{name}_*/model.pt"))
    if len({path.read_bytes() for path in paths}) != 1:
        found = f"{len(paths)} trained models {name}"
        raise UserError(f"--weights {folder}: {found}, expected one; train it, or name its folder")
    known = read_config(paths[0].with_name("config.json"))
    if found := differences(
        known, config, (*CONDITIONS, "n_frames", "n_samples", "weights_sha256")
    ):
        raise UserError(f"--weights {folder}: {name} was trained with {found}")
    return paths[0]


def save_tensors(path: Path, tensors: dict) -> None:
    """torch.save, atomically; a full disk is an OSError like everywhere else."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_atomic(path, buffer.getvalue())


def load_tensors(path: Path, device: torch.device) -> dict:
    """What ``save_tensors`` wrote; unpickles nothing. Raises UserError when damaged or foreign."""
    with reading(path, "a file of this run; remove it to start from step 0"):
        return torch.load(path, map_location=device, weights_only=True)


# ------------------------------------------------------------------------------------ training


def build_model(settings: Settings, channels: int) -> UNet:
    """The U-Net with initial weights that depend on the seed alone, equal in all arms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        size = settings.n_qubits, settings.n_layers
        conditions = {name: getattr(settings, name) for name in CIRCUIT_CONDITIONS}
        return UNet(channels, settings.arm, *size, **conditions)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 100 steps (at most a tenth), then half a cosine to zero."""
    warm_up = min(100, max(1, steps // 10))
    return peak * min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def training_batch(settings: Settings, images: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, timesteps and noise of one step; depends on the seed and the step alone.

    The images are consecutive pieces of one shuffle of the training set after another. The
    timesteps are stratified, one in each of B equal parts of 0..T, which lowers the variance.
    Returns x0 (B, C, H, W) float in -1..1, t (B,) int64, noise like x0.
    """
    size, n = settings.batch_size, len(images)
    first, last = step * size // n, ((step + 1) * size - 1) // n
    shuffles = [
        torch.randperm(n, generator=random_stream(settings.seed, "shuffle", epoch))
        for epoch in range(first, last + 1)
    ]
    start = step * size - first * n
    indices = torch.cat(shuffles)[start : start + size].to(images.device, non_blocking=True)
    generator = random_stream(settings.seed, "noise", step, device=images.device)
    x0 = to_float(images[indices])
    uniform = torch.rand(size, generator=generator, device=images.device)
    strata, timesteps = torch.arange(size, device=images.device), settings.timesteps
    t = ((strata + uniform) * (timesteps / size)).long().clamp(max=timesteps - 1)
    return x0, t, torch.randn(x0.shape, generator=generator, device=images.device)


def draw_images(
    model: UNet,
    settings: Settings,
    name: str,
    numbers: Sequence[int],
    steps: int,
    bar: tqdm | None = None,
) -> Tensor:
    """The images ``numbers`` of the series ``name``, each with random streams of its own for its
    noise and its shots: (len(numbers), C, 28, 28) uint8, on the CPU."""
    device = next(model.parameters()).device
    generators, circuits = (
        [random_stream(settings.seed, kind, k, device=device) for k in numbers]
        for kind in (name, f"circuit {name}")
    )
    model.seed_circuit(circuits)
    diffusion = GaussianDiffusion(settings.timesteps, device)
    return to_uint8(diffusion.sample(model, len(numbers), generators, steps, bar)).cpu()


class Trainer:
    """A model in training, its optimizer and EMA; continued from a checkpoint if there is one.

    images: the training set, (n, C, 28, 28) uint8, on the training device.
    """

    def __init__(self, settings: Settings, images: Tensor, folder: Path | None = None):
        self.settings, self.images, self.folder = settings, images, folder
        device, channels = images.device, images.shape[1]
        self.diffusion = GaussianDiffusion(settings.timesteps, device)
        self.model, self.average = (build_model(settings, channels).to(device) for _ in range(2))
        self.ema, self.done = EMA(self.model, settings.ema_decay), 0
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trainable, settings.lr, (0.9, 0.99), fused=True)
        self.losses = torch.zeros(settings.steps, device=device)
        self.checkpoint = folder and folder / "checkpoint.pt"
        if folder and self.checkpoint.exists():
            state = load_tensors(self.checkpoint, device)
            with reading(self.checkpoint, "a checkpoint of this run; remove it to start anew"):
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.ema.shadow = state["ema"]
                self.done = self.ema.updates = state["step"]
                self.losses[: self.done] = state["losses"]

    def step(self) -> None:
        """One optimizer step; never makes the host wait for the device."""
        settings, step, device = self.settings, self.done, self.images.device
        x0, t, noise = training_batch(settings, self.images, step)
        self.model.seed_circuit(random_stream(settings.seed, "circuit", step, device=device))
        output = self.model(self.diffusion.q_sample(x0, t, noise), t)
        errors = (output - self.diffusion.target(x0, t, noise)).square().mean((1, 2, 3))
        loss = (self.diffusion.noise[t] * errors).mean()  # the noisy end decides the shape
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.lr)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.ema.update(self.model)
        self.losses[step] = loss.detach()
        self.done += 1

    def preview(self) -> None:
        """Samples of the averaged model, always from the same noise, into ``samples/``."""
        self.average.load_state_dict(self.ema.shadow)
        numbers = range(self.settings.n_samples)
        steps = min(PREVIEW_STEPS, self.settings.sample_steps)
        images = draw_images(self.average, self.settings, "preview", numbers, steps)
        save_grid(self.folder / "samples" / f"step_{self.done:06d}.png", images)

    def save(self) -> None:
        """Writes ``loss.csv`` and the checkpoint. Raises DivergedError instead when a loss is not
        finite, so that the last good checkpoint stays."""
        losses = self.losses[: self.done].cpu()
        bad = torch.nonzero(~torch.isfinite(losses))
        if len(bad):
            what = f"{self.settings.name}: the loss is not finite at step {bad[0].item() + 1}"
            way_out = "stopped, the last good checkpoint is kept; try a lower --lr"
            raise DivergedError(f"{what}; {way_out} with another --save_dir")
        rows = "".join(f"{k},{loss!r}\n" for k, loss in enumerate(losses.tolist(), 1))
        write_atomic(self.folder / "loss.csv", "step,loss\n" + rows)
        state = {"step": self.done, "losses": losses, "ema": self.ema.shadow}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        save_tensors(self.checkpoint, state)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C only sets the event that is yielded, so that a step is never cut in two."""
    pressed = threading.Event()
    previous = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def train(settings: Settings, images: Tensor, folder: Path) -> None:
    """Trains one model, from its checkpoint if there is one, and writes ``model.pt``.

    Raises DivergedError, UserError for a damaged checkpoint, and KeyboardInterrupt, after saving,
    when Ctrl-C was pressed.
    """
    (folder / "samples").mkdir(exist_ok=True)
    trainer, size, steps = Trainer(settings, images, folder), settings.batch_size, settings.steps
    frames = [math.ceil(steps * k / settings.n_frames) for k in range(1, settings.n_frames + 1)]
    frames = dict.fromkeys(frames)  # ascending; fewer when there are fewer steps
    done = trainer.done
    bar = tqdm(desc=settings.name, total=steps * size, initial=done * size, unit="img",
               unit_scale=True)  # fmt: skip
    with deferred_interrupt() as interrupted, bar:
        while trainer.done < steps:
            trainer.step()
            done = trainer.done
            bar.update(size)
            if done % 20 == 0:
                recent = trainer.losses[done - 20 : done].mean()
                bar.set_postfix(step=done, loss=f"{recent:.4f}")
            if done in frames and torch.isfinite(trainer.losses[:done]).all():
                trainer.preview()
            if done in frames or done % 100 == 0 or interrupted.is_set():
                trainer.save()
            if interrupted.is_set():
                raise KeyboardInterrupt
    pictures = [
        (f"{settings.name}  step {k}", load_grid(folder / "samples" / f"step_{k:06d}.png"))
        for k in frames
    ]
    save_gif(folder / "training_progress.gif", pictures)
    save_loss_curve(folder / "loss_curve.png", trainer.losses.cpu(), settings.name)
    save_tensors(folder / "model.pt", trainer.ema.shadow)


def sample_final(settings: Settings, folder: Path, n_eval: int, device: torch.device) -> None:
    """Brings ``samples_final.png`` to ``n_eval`` images with the EMA weights in ``model.pt``.

    Image k has its own random stream, so images that are already there are kept.
    """
    path, weights = folder / "samples_final.png", folder / "model.pt"
    images = load_grid(path) if path.exists() else torch.empty(0, dtype=torch.uint8)
    if len(images) >= n_eval:
        return
    state = load_tensors(weights, device)
    with reading(weights, "this run's weights"):
        model = build_model(settings, state["stem.weight"].shape[1] // 4).to(device)
        model.load_state_dict(state)
    # The CPU's kernels round differently below eight images, so a small rest is drawn in company.
    least, most = SAMPLE_BATCH
    chunks = range(len(images), n_eval, most)
    with tqdm(total=len(chunks) * settings.sample_steps, desc="sampling", unit="step") as bar:
        for first in chunks:
            n = min(most, n_eval - first)
            numbers = range(first, first + max(n, least))
            new = draw_images(model, settings, "image", numbers, settings.sample_steps, bar)
            images = torch.cat([images, new[:n]]) if len(images) else new[:n]
            save_grid(path, images)


# -------------------------------------------------------------------------------- command line


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def training_images(text: str) -> int | None:
    """An argparse type: a number of images, or all (None)."""
    if text != "all" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text}, expected a number of images, or all")
    return None if text == "all" else int(text)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that do not depend on the data set; most are the fields of Settings."""
    add, arm = parser.add_argument, parser.add_mutually_exclusive_group()
    text = "list, default classical; see below"
    arm.add_argument("--arm", nargs="+", choices=ARMS, metavar="ARM", help=text)
    text = "shorthand for --arm quantum (True) or --arm classical (False)"
    arm.add_argument("--use_quantum", nargs="?", const="True", choices=["True", "False"], help=text)
    text = "numbers of training images, list, or all (default: all)"
    add("--n_train", nargs="+", type=training_images, default=[None], metavar="N", help=text)
    add("--seeds", nargs="+", type=between(0, 2**63 - 1), default=[0], help="list (default: 0)")
    length = parser.add_mutually_exclusive_group()
    for item in fields(Settings):
        if item.metadata:
            where = length if item.name == "steps" else parser
            default = "" if item.default is None else f" (default: {item.default})"
            options = {**item.metadata, "help": item.metadata["help"] + default}
            where.add_argument(f"--{item.name}", default=item.default, **options)
    text = "instead of --steps: passes over the training images"
    length.add_argument("--epochs", type=between(1, 10**8), help=text)
    add(
        "--n_eval",
        type=between(1, 10**6),
        default=25,
        help="images in the final grid (default: 25)",
    )
    text = "train nothing: take each run's model.pt from the run folders in FOLDER and sample it"
    add("--weights", type=Path, metavar="FOLDER", help=text + " under other conditions")
    add("--save_dir", type=Path, default=Path("runs"), help="of the run folders (default: runs)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(
        description="Train and sample diffusion models of MNIST digits, one per digit, with or\n"
        "without a quantum attention layer. Lists of arms, digits, sizes and seeds make a\n"
        "grid of runs; finished runs are skipped and interrupted ones continued.",
        epilog="arms:\n" + "\n".join(f"  {arm:10} {text}" for arm, text in ARMS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--digits", nargs="+", default=["3"], help="list of 0-9, or all (default: 3)")
    text = "auto (default) takes MNIST, or without a network scikit-learn's digits"
    add("--data", choices=["auto", "mnist", "digits"], default="auto", help=text)
    add("--data_dir", type=Path, default=Path("data"), help="holds MNIST/raw (default: data)")
    add_run_flags(parser)
    return parser


def parse_classes(flag: str, words: Sequence[str], names: Sequence[str]) -> list[int]:
    """Class ids from names, ids or ``all``. Raises UserError that lists what there is."""
    if list(words) == ["all"]:
        return list(range(len(names)))
    ids = {name: k for k, name in enumerate(names)} | {str(k): k for k in range(len(names))}
    for word in words:
        if word not in ids:
            raise UserError(f"{flag} {word}: expected {', '.join(names)}, their numbers, or all")
    return [ids[word] for word in words]


def choose_device(name: str) -> torch.device:
    """The device of this process; under a launcher each process takes a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device {name}: {count} CUDA devices found; use --device cpu")
    if name == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % count)
    return device


def check_simulator(args: argparse.Namespace, arms: set[str]) -> None:
    """Makes sure that the simulator runs these arms' circuits, and that they are the right ones."""
    if not arms:
        return
    if args.simulator == "exact":
        if args.n_layers > EXACT_LAYERS:
            limit = f"the exact simulation is made for up to {EXACT_LAYERS}"
            raise UserError(f"--n_layers {args.n_layers}: {limit}; use --simulator default.qubit")
        for arm in arms:
            check_simulation(arm, args.gate_noise)
        return
    if args.simulator == "default.mixed" and args.n_qubits > MIXED_QUBITS:
        gigabytes = 2 ** (2 * args.n_qubits - 26)
        found = f"a density matrix of {args.n_qubits} qubits takes {gigabytes} GiB a sample"
        way_out = f"use at most {MIXED_QUBITS} qubits, or --simulator exact, which takes noise too"
        raise UserError(f"--simulator default.mixed: {found}; {way_out}")
    how = args.simulator_options, args.shots, args.gate_noise, args.readout_noise
    try:
        for method in ("best", None):
            qnode = make_qnode(2, 1, args.simulator, True, method, *how)
            angles = torch.zeros(2, 2, requires_grad=method is not None)
            values = torch.stack(qnode(angles, torch.zeros(1, 2, 2)), -1)
            if method:
                values.sum().backward()
    except Exception as error:  # a plugin may raise anything; the reason is shown
        reason = " ".join(str(error).split())
        what = f"neither exact nor a PennyLane device that runs this circuit ({reason})"
        raise UserError(f"--simulator {args.simulator}: {what}") from None


def check_flags(args: argparse.Namespace) -> None:
    """Finds the mistakes that need no data, before any is read or downloaded."""
    choose_device(args.device)
    steps, timesteps = args.sample_steps, args.timesteps
    if (steps or 0) > timesteps:
        raise UserError(f"--sample_steps {steps}: more than --timesteps {timesteps}")
    if args.simulator_options and args.simulator == "exact":
        raise UserError("--simulator_options: expected a PennyLane device as --simulator")
    if "shots" in (args.simulator_options or {}):
        raise UserError("--simulator_options: use --shots for the number of shots")


def make_runs(
    args: argparse.Namespace, classes: Sequence[int], source: str, images: Tensor, labels: Tensor
) -> list[tuple[Settings, Tensor, dict]]:
    """Every run that the flags ask for: settings, training images, and how many there were."""
    arms = args.arm or ["quantum" if args.use_quantum == "True" else "classical"]
    shared = {f.name: getattr(args, f.name) for f in fields(Settings) if f.metadata}
    shared["sample_steps"] = args.sample_steps or args.timesteps
    ideal = {f.name: f.default for f in fields(Settings) if f.name in CIRCUIT_CONDITIONS}
    runs = []
    for label, n_train, arm, seed in itertools.product(classes, args.n_train, arms, args.seeds):
        chosen = select_images(images, labels, label, n_train, seed)
        run = {"arm": arm, "data": source, "label": label, "n_train": n_train, "seed": seed}
        run |= shared if arm in QUANTUM_ARMS else shared | ideal
        if args.epochs:
            run["steps"] = args.epochs * math.ceil(len(chosen) / args.batch_size)
        counts = {"total": len(labels), "available": int((labels == label).sum())}
        runs.append((Settings(**run), chosen, counts))
    return runs


def make_all(
    runs: Sequence[tuple[Settings, Tensor, dict]], args: argparse.Namespace, argv: Sequence[str]
) -> None:
    """Makes every run, or this process's share of them, that is not there yet.

    A launcher that sets RANK and WORLD_SIZE (torchrun, a job array) gives each process every
    WORLD_SIZE-th run. A run whose loss diverges does not stop the others.
    """
    device = choose_device(args.device)
    hardware = f"cpu, {platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = f"{device}, {torch.cuda.get_device_name(device)}"
    check_simulator(args, {settings.arm for settings, _, _ in runs} & set(QUANTUM_ARMS))
    share = runs[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]
    for settings, images, counts in share:
        folder, config = args.save_dir / settings.name, run_config(settings, images, counts, argv)
        config |= {"device": hardware, "n_eval": args.n_eval}
        weights = args.weights and find_weights(args.weights, settings, config)
        if weights:
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()
            config |= {"weights": {"weights_sha256": digest}, "weights_from": str(weights)}
        open_run(folder, config)
        if weights and not (folder / "model.pt").exists():
            write_atomic(folder / "model.pt", weights.read_bytes())
    diverged = []
    for number, (settings, images, _) in enumerate(share, 1):
        folder = args.save_dir / settings.name
        print(f"[{number}/{len(share)}] {folder}", flush=True)
        try:
            if not (folder / "model.pt").exists():
                if settings.arm in QUANTUM_ARMS:
                    save_circuit(folder / "circuit.png", settings)
                train(settings, images.to(device), folder)
            sample_final(settings, folder, args.n_eval, device)
        except DivergedError as error:
            diverged.append(str(error))
    if diverged:
        raise UserError("; ".join(diverged))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 a mistake of the user's, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(argv)
    try:
        check_flags(args)
        classes = parse_classes("--digits", args.digits, CLASS_NAMES)
        make_all(make_runs(args, classes, *load_images(args.data, args.data_dir)), args, argv)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
