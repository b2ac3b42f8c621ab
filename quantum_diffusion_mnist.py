"""Diffusion on MNIST digits with a 16-qubit quantum attention layer, simulated exactly.

Implements the system of "Quantum Generative Models for Image Generation: Insights from MNIST and
MedMNIST" (arXiv 2504.00034): one denoising diffusion model per digit, a small U-Net whose
bottleneck channels are re-weighted by a variational circuit, and the controls that a fair
comparison needs. README.md lists what differs from the authors' code and why.

    python quantum_diffusion_mnist.py --use_quantum                        # digit 3, ten minutes
    python quantum_diffusion_mnist.py --arm classical matched quantum --digits 3 8 --n_train 25 100

Measured: --use_quantum --n_eval 1000 (digit 3, seed 0, all 1,000 sampling steps) gives images of
which a classifier calls 98.3 % a 3 (n = 1,000, standard error 0.4; real 3s: 99.6 %); 9 minutes of
training on two cores of an AMD EPYC (Zen 4), torch 2.15.0.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

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
TILE_PADDING = 2  # pixels between the tiles of a sample grid, before enlargement
PREVIEW_STEPS = 50  # respaced sampling steps of the previews
SAMPLE_BATCH = 16, 64  # least and most images of the final grid that are sampled together
GIF_BYTES = 400_000
EXACT_LAYERS = 5  # memory and time grow by 16 with every layer
MIXED_QUBITS = 10  # of PennyLane's default.mixed: 16 MiB a sample, four times as much each qubit

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


@dataclass(frozen=True)
class Settings:
    """Everything that one run's result depends on; the command line's help explains each."""

    arm: str
    data: str
    label: int
    n_train: int | None
    seed: int
    steps: int
    batch_size: int
    lr: float
    ema_decay: float
    n_qubits: int
    n_layers: int
    timesteps: int
    n_frames: int
    n_samples: int
    sample_steps: int
    # How a circuit is run: CONDITIONS. A finished run can be sampled under others.
    simulator: str = "exact"
    simulator_options: dict | None = None
    shots: int | None = None
    gate_noise: tuple[float, float] | None = None
    readout_noise: float = 0.0
    trajectories: int = 1

    @property
    def name(self) -> str:
        """The run folder's name, for example ``quantum_mnist3_nall_seed0``."""
        size = "all" if self.n_train is None else self.n_train
        label = CLASS_PREFIX + CLASS_NAMES[self.label]
        return f"{self.arm}_{self.data}{label}_n{size}_seed{self.seed}"


CONDITIONS = {f.name: f.default for f in fields(Settings) if f.default is not MISSING}


def random_stream(seed: int, *name: object, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on ``seed`` and ``name`` alone.

    Every use of randomness has a stream of its own (batch k, image k, the data subset), so none
    disturbs another, and nothing but the step number has to be stored to resume a run.
    """
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def draw(
    kind: Callable,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    n: int,
    *size: int,
) -> Tensor:
    """``kind`` (torch.rand or torch.randn) of n x size, from one generator for all n, or from a
    sequence of n generators, one for each; None is torch's own."""
    if isinstance(generator, Sequence):
        return torch.stack([kind(size, generator=g, device=g.device) for g in generator])
    device = None if generator is None else generator.device
    return kind(n, *size, generator=generator, device=device)


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
    if data != "digits":
        try:
            return "mnist", *_load_mnist(data_dir, split)
        except ConnectionError as error:
            if data == "mnist":
                where = data_dir / "MNIST" / "raw"
                way_out = f"copy the four *-ubyte files to {where} or use --data digits"
                raise UserError(f"{error}; {way_out}") from error
            notice = (
                "Using scikit-learn's 8x8 DIGITS, enlarged, INSTEAD OF MNIST; all names say so."
            )
            print(f"NOTICE: {error}. {notice}", file=sys.stderr)
    bunch = load_digits()
    small = torch.from_numpy(bunch.images)[:, None] / 16  # published range 0..16
    large = F.interpolate(small, size=IMAGE_SIZE, mode="bicubic", align_corners=False)
    held_out = torch.arange(len(large)) % 5 == 4
    chosen = held_out if split == "test" else ~held_out
    images = (large.clamp(0, 1) * 255).round().to(torch.uint8)
    return "digits", images[chosen], torch.from_numpy(bunch.target).long()[chosen]


def _load_mnist(data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """MNIST by torchvision. Raises ConnectionError when it is missing and cannot be fetched."""
    raw = data_dir / "MNIST" / "raw"
    if not raw.exists():
        # Fetched aside and renamed, so neither a broken download nor a second process that
        # downloads at the same time can leave half a data set behind.
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=data_dir) as aside:
                torchvision.datasets.MNIST(aside, download=True)
                raw.parent.mkdir(exist_ok=True)
                (Path(aside) / "MNIST" / "raw").rename(raw)
        except (OSError, RuntimeError) as error:
            if not raw.exists():
                reason = " ".join(str(error).split())
                raise ConnectionError(
                    f"no MNIST in {data_dir}, download failed: {reason}"
                ) from None
    try:
        dataset = torchvision.datasets.MNIST(data_dir, train=split == "train")
        images, labels = dataset.data[:, None], dataset.targets.long()
        assert images.shape[1:] == (1, IMAGE_SIZE, IMAGE_SIZE), f"images of {tuple(images.shape)}"
        assert images.dtype == torch.uint8, f"images of type {images.dtype}"
        assert labels.shape == (len(images),), f"{len(images)} images, {tuple(labels.shape)} labels"
        assert labels.min() >= 0 and labels.max() <= 9, "labels outside 0-9"
    except (AssertionError, ValueError, RuntimeError, TypeError, KeyError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{raw}: not MNIST ({reason}); delete it to download again") from None
    return images, labels


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
    """The cosine schedule of Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17.

    Returns:
        beta_1 .. beta_T as (timesteps,) float64, clipped to at most 0.999.
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
        self.model_t = torch.arange(timesteps) if keep is None else keep
        alpha_bar = torch.cumprod(1 - cosine_beta_schedule(timesteps), 0)[self.model_t]
        previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        beta = 1 - alpha_bar / previous

        def table(values: Tensor) -> Tensor:
            return values.float().to(device)

        self.signal, self.noise = table(alpha_bar.sqrt()), table((1 - alpha_bar).sqrt())
        # q(x_{t-1} | x_t, x0), Ho et al. eq. 6 and 7; the variance is beta-tilde.
        self.mean_x0 = table(previous.sqrt() * beta / (1 - alpha_bar))
        self.mean_xt = table((1 - beta).sqrt() * (1 - previous) / (1 - alpha_bar))
        self.std = table((beta * (1 - previous) / (1 - alpha_bar)).sqrt())
        self.model_t = self.model_t.to(device)

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
        generator: torch.Generator | Sequence[torch.Generator],
        steps: int | None = None,
        progress: tqdm | None = None,
    ) -> Tensor:
        """Draws n images.

        Args:
            model: (x (n, C, 28, 28), t (n,)) -> v; its attribute ``channels`` gives C (default 1).
            generator: one for all images, or one for each, in which case an image does not
                depend on those it is drawn with.
            steps: of the T steps, how many (respacing); default all of them.
            progress: a bar that is advanced by one at each step.

        Returns:
            (n, C, 28, 28) float32 in -1..1.
        """
        process = self if steps is None else self.respaced(steps)
        size = (getattr(model, "channels", 1), IMAGE_SIZE, IMAGE_SIZE)
        x = draw(torch.randn, generator, n, *size).to(self.device)
        for t in reversed(range(len(process.model_t))):
            noise = draw(torch.randn, generator, n, *size).to(self.device)
            x = process.p_sample(model, x, t, noise)
            if progress is not None:
                progress.update()
        return x.clamp(-1, 1)

    @staticmethod
    def _at(table: Tensor, t: Tensor) -> Tensor:
        return table[t][:, None, None, None]


# --------------------------------------------------- quantum circuit and exact simulation


def quantum_circuit(
    angles: Tensor,
    weights: Tensor,
    entangle: bool = True,
    gate_noise: Sequence[float] | None = None,
) -> None:
    """The layer's definition in PennyLane operations, on wires 0 .. n-1.

    RY(angles[i]), then per layer RZ(weights[l, i, 0]), RY(weights[l, i, 1]) on every qubit and the
    chain CNOT(0,1), CNOT(1,2), ...

    Args:
        angles: (n,) or (B, n), radians.
        weights: (L, n, 2) = (RZ, RY) radians; (L, n, 1) for the published circuit, RZ alone.
        entangle: False leaves the CNOTs out.
        gate_noise: (p1, p2), probabilities of PennyLane's ``DepolarizingChannel``, which follows
            every one-qubit gate (p1) and stands on both qubits after every CNOT (p2).
    """
    n_layers, n_qubits, kinds = weights.shape
    p1, p2 = gate_noise or (0, 0)

    def depolarise(p: float, *wires: int) -> None:
        for wire in wires:
            if p:
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
        if entangle:
            for i in range(n_qubits - 1):
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
    gate_noise: Sequence[float] | None = None,
    readout_noise: float = 0.0,
) -> qml.QNode:
    """``quantum_circuit`` as a QNode on any PennyLane device.

    Args:
        diff_method: None for inference alone; with shots any other means parameter-shift.
        options: keyword arguments of the device.
        shots: measurements of all qubits together; None for exact expectation values.
        gate_noise, readout_noise: on devices that take channels, such as ``default.mixed``.

    Returns:
        f(angles (B, n), weights (L, n, 2 or 1)) -> list of n tensors (B,), <Z_i>. Stack on dim -1.

    Raises:
        ValueError: on a call with weights of other than ``n_layers`` and ``n_qubits``.
        qml.exceptions.DeviceError: no such device.
    """
    device = qml.device(device_name, wires=n_qubits, **options or {})
    if shots and diff_method:
        diff_method = "parameter-shift"

    @qml.qnode(device, interface="torch", diff_method=diff_method)
    def expectations(angles: Tensor, weights: Tensor):
        if tuple(weights.shape[:2]) != (n_layers, n_qubits):
            shape = tuple(weights.shape)
            raise ValueError(f"weights {shape}, expected ({n_layers}, {n_qubits}, .)")
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


def transfer_matrices(weights: Tensor, gate_noise: Sequence[float] | None = None) -> Tensor:
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
    which a qubit controls in the last layer changes its own measurement only: see ``sweep``.)

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


class Paulis(NamedTuple):
    """What one noise trajectory per sample does to a circuit; see ``insert_paulis``."""

    flips: Tensor  # (n + 1, B, L) int64, of the bond before each site and behind the last one
    signs: Tensor  # (n + 1, B, L) int64
    output: Tensor  # (B, n), 1 or -1, times the measured value


def draw_paulis(probabilities: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Pauli errors from uniform numbers: each of X, Y, Z with a third of the probability.

    Returns (x, z), bool, shaped like uniform: the error is X^x Z^z up to a phase.
    """
    x = uniform < probabilities * 2 / 3
    return x, (uniform >= probabilities / 3) & (uniform < probabilities)


def error_probabilities(
    weights: Tensor, gate_noise: Sequence[float], entangle: bool = True
) -> Tensor:
    """Where errors can be: (n, 1 + 4 L), after the data's RY and, per layer, after RZ, RY, the CNOT
    whose target the qubit is, and the one whose control it is. weights: as in the circuit."""
    n_layers, n, kinds = weights.shape
    p1, p2 = gate_noise
    table = weights.new_full((n, 1 + 4 * n_layers), p1)
    table[:, 3::4] = table[:, 4::4] = p2 if entangle else 0
    table[0, 3::4] = table[-1, 4::4] = 0  # the ends of the chain
    if kinds == 1:
        table[:, 2::4] = 0
    return table


def insert_paulis(angles: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor, Paulis]:
    """Turns Pauli errors inside the circuit into changes at the bonds between its sites.

    X behind RZ is Z before it and Y behind RY; X on a CNOT's target may stand before that CNOT, Z
    behind the next one. So errors are left before and behind each U_l only. There X flips an index
    of the site's matrix, U_l[b_l + c_l + x', b_{l-1} + x], which is A with c and b flipped, and Z
    is a sign (-1)^b or (-1)^(b + c). The bond does not grow.

    angles: (B, n); x, z: (B, n, 1 + 4 L) bool, placed as in ``error_probabilities``.
    Returns the angles that include the errors of the data's RY, and the rest.
    """
    rz_x, ry_x, target_x, control_x = x[..., 1:].unflatten(-1, (-1, 4)).unbind(-1)  # (B, n, L)
    rz_z, ry_z, target_z, control_z = z[..., 1:].unflatten(-1, (-1, 4)).unbind(-1)
    before_x = torch.cat([x[..., :1], control_x], -1)  # (B, n, L + 1); the last: before measuring
    before_z = torch.cat([z[..., :1], control_z ^ target_z], -1)
    before_z[..., :-1] ^= rz_x ^ rz_z
    behind_x, behind_z = rz_x ^ ry_x ^ target_x, rz_x ^ ry_z
    angles = torch.where(before_z[..., 0], -angles, angles)  # Z RY(a)|0> = RY(-a)|0>
    angles = torch.where(before_x[..., 0], math.pi - angles, angles)  # X RY(a)|0> = RY(pi-a)|0>
    last = torch.zeros_like(before_x[..., :1])
    right_flips = torch.cat([before_x[..., 1:-1], last], -1)
    right_signs = torch.cat([before_z[..., 1:-1], last], -1) ^ behind_z
    edge = torch.zeros_like(right_flips[:, :1])
    flips = torch.cat([right_flips ^ behind_x, edge], 1) ^ torch.cat([edge, right_flips], 1)
    signs = torch.cat([behind_z, edge], 1) ^ torch.cat([edge, right_signs], 1)
    output = 1 - 2 * before_x[..., -1].to(angles.dtype)
    return angles, Paulis(flips.transpose(0, 1).long(), signs.transpose(0, 1).long(), output)


def environments(
    angles: Tensor, transfer: Tensor, paulis: Paulis | None = None
) -> tuple[Tensor, Tensor]:
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
    edge[0, :, 1:] = 0
    arriving, leaving = [], [edge]
    for i, (x, site) in enumerate(zip(inputs.unbind(0), maps.unbind(0), strict=True)):
        arriving.append(leaving[-1])
        if paulis is not None:  # before site i from the left, behind site n-1-i from the right
            flips = torch.stack([paulis.flips[i], paulis.flips[n - i]])
            signs = torch.stack([paulis.signs[i], paulis.signs[n - i]])
            arriving[-1] = move_bond(arriving[-1], flips, signs)
        stacked = (x * arriving[-1].unsqueeze(2)).view(2, batch, 3 * d)
        leaving.append(torch.bmm(stacked, site))
    leaving = torch.stack(leaving)
    arriving = leaving[:-1] if paulis is None else torch.stack(arriving)
    return leaving[1:, 0], arriving.flip(0)[:, 1]


def move_bond(vector: Tensor, flips: Tensor, signs: Tensor) -> Tensor:
    """Flips and signs the bits of a doubled bond: vector (..., D); flips, signs (..., L) int64.

    The index counts (b_1 b_1* b_2 b_2* .. b_L) with the last bit fastest, D = 2 * 4**(L-1).
    """
    n_layers = flips.shape[-1]
    shift = 2 * torch.arange(n_layers - 1, -1, -1, device=flips.device) - 1  # of b*, b is above it
    index = torch.arange(vector.shape[-1], device=flips.device)
    odd = (index[:, None] >> shift[:-1]) + (index[:, None] >> shift[:-1] + 1)  # b + b*
    parity = signs[..., :-1].to(vector) @ (odd % 2).T.to(vector)
    mask = (flips[..., :-1] * 3 << shift[:-1]).sum(-1) + flips[..., -1]
    moved = vector.gather(-1, index ^ mask[..., None])
    return moved * (1 - 2 * (parity % 2))


def sweep(angles: Tensor, transfer: Tensor, gate_noise: Sequence[float] | None = None) -> Tensor:
    """<Z_i> of every qubit, from the ``transfer_matrices`` of that noise.

    angles: (B, n), radians; transfer: (n, 3, D, D). Returns (B, n) in -1..1.
    """
    values = contract(*environments(angles, transfer))
    if gate_noise:  # on the control of its last CNOT, behind which no site comes
        factors = values.new_full((values.shape[1],), 1 - 4 * gate_noise[1] / 3)
        factors[-1] = 1
        values = values * factors
    return values


def contract(left: Tensor, right: Tensor) -> Tensor:
    """<Z_i> = sum_b (-1)^{b_L} left_i[b] right_i[b]. left, right: (n, B, D). Returns (B, n)."""
    sign = 1 - 2.0 * (torch.arange(left.shape[-1], device=left.device) % 2).to(left)
    return ((left * right) @ sign).T


def product_expectations(angles: Tensor, weights: Tensor, noise: Tensor | None = None) -> Tensor:
    """<Z_i> without CNOTs: every qubit's Bloch vector (x, y, z), turned gate by gate.

    angles: (B, n), weights: (L, n, 2) as in ``quantum_circuit``; noise: (B or 1, n, 1 + 2 L, 3),
    factors of x, y, z after the data's RY and after each RZ and RY. Returns (B, n).
    """
    if noise is None:
        noise = angles.new_ones(1, 1, 1 + 2 * len(weights), 3)
    factors = iter(noise.unbind(2))
    x, y, z = (torch.stack([angles.sin(), 0 * angles, angles.cos()], -1) * next(factors)).unbind(-1)
    for rz, ry in weights.mT:  # (n,) each
        x, y = x * rz.cos() - y * rz.sin(), x * rz.sin() + y * rz.cos()
        x, y, z = (torch.stack([x, y, z], -1) * next(factors)).unbind(-1)
        x, z = x * ry.cos() + z * ry.sin(), z * ry.cos() - x * ry.sin()
        x, y, z = (torch.stack([x, y, z], -1) * next(factors)).unbind(-1)
    return z


def site_matrices(weights: Tensor) -> Tensor:
    """A_i[c, b] of ``transfer_matrices`` itself, for either value of b_0, which the data sets.

    weights: (L, n, 2 or 1). Returns (n, 2, 2**L, 2**L) complex, indexed [qubit, b_0, c, b], the
    bits of a bond in the order (b_1 .. b_L), the last one fastest.
    """
    n_layers, _, kinds = weights.shape
    rz = weights[..., 0] / 2
    half = weights[..., 1] / 2 if kinds == 2 else torch.zeros_like(rz)
    ry = torch.stack([half.cos(), -half.sin(), half.sin(), half.cos()], -1).unflatten(-1, (2, 2))
    unitary = (
        ry
        * torch.stack([torch.polar(torch.ones_like(rz), k * rz) for k in (-1, 1)], -1)[..., None, :]
    )
    index = torch.arange(2**n_layers, device=weights.device)
    bits = index[:, None] >> torch.arange(n_layers, device=weights.device).flip(0) & 1
    before = torch.arange(2, device=weights.device)[:, None, None]  # b_0
    site = 1
    for layer, bit in zip(unitary, bits.T, strict=True):
        site = site * layer[:, bit[:, None] ^ bit, before]
        before = bit[None, None]
    return site


def sample_outcomes(
    angles: Tensor, sites: Tensor, right: Tensor, uniform: Tensor, paulis: Paulis | None = None
) -> Tensor:
    """Measures all qubits together, from left to right: 1 or -1 of every qubit and shot.

    The amplitude over the bond behind the qubits measured so far, with what is right of it, gives
    the next qubit's probabilities. These are the joint distribution; nothing is approximated.

    Args:
        angles: (B, n), radians.
        sites: of ``site_matrices``.
        right: (n, B, D), of ``environments``.
        uniform: (B, S, n) random numbers in 0..1, one for each measurement.
        paulis: the errors in the circuit, for which ``right`` was made too.

    Returns:
        (B, S, n), 1 or -1.
    """
    batch, shots, n = uniform.shape
    dim = sites.shape[-1]
    n_layers = dim.bit_length() - 1
    # right = S + K holds the Hermitian matrix S - iK for either value of b_L.
    pairs = range(2, 2 * n_layers, 2)  # where the bits b stand, each before its b*
    right = right.view(n, batch, *[2] * (2 * n_layers - 1))
    right = right.permute(0, 1, -1, *pairs, *(k + 1 for k in pairs))
    right = right.reshape(n, batch, 2, dim // 2, dim // 2)
    right = torch.complex(right + right.mT, right.mT - right) / 2
    data = torch.stack([(angles / 2).cos(), (angles / 2).sin()], -1).to(sites)
    index = torch.arange(dim, device=angles.device)
    places = torch.arange(n_layers, device=angles.device).flip(0)
    amplitude = sites.new_zeros(batch, shots, dim)
    amplitude[..., 0] = 1
    outcomes = []
    for i in range(n):
        site = torch.einsum("bk,kcd->bcd", data[:, i], sites[i])
        if paulis is not None:
            bits = (index >> places[:, None] & 1).to(data)  # no integer products on a GPU
            parity = (paulis.signs[i].to(data) @ bits).real % 2  # (B, dim)
            rows = index ^ (paulis.flips[i] << places).sum(-1, keepdim=True)
            site = (site * (1 - 2 * parity)[..., None]).take_along_dim(rows[..., None], 1)
        amplitude = (amplitude @ site).view(batch, shots, dim // 2, 2)
        halves = amplitude.permute(0, 3, 1, 2)  # (B, 2, S, dim / 2)
        weight = ((halves @ right[i]) * halves.conj()).sum(-1).real.clamp(min=0)
        zero, one = weight.unbind(1)  # (B, S), up to a common factor the two probabilities
        bit = uniform[..., i] * (zero + one) >= zero
        kept = torch.stack([~bit, bit], -1) / torch.where(bit, one, zero).sqrt()[..., None]
        amplitude = (amplitude * kept[:, :, None]).flatten(2)
        outcomes.append(1 - 2 * bit.to(angles.dtype))
    outcomes = torch.stack(outcomes, -1)
    return outcomes if paulis is None else outcomes * paulis.output[:, None]


def bloch_signs(x: Tensor, z: Tensor) -> Tensor:
    """What errors X^x Z^z do to a Bloch vector, for ``product_expectations``.

    x, z: (B, n, 1 + 4 L) bool, placed as in ``error_probabilities``. Returns (B, n, 1 + 2 L, 3).
    """
    odd = torch.stack([z, x ^ z, x], -1)
    gates = odd[:, :, 1:].unflatten(2, (-1, 4))[:, :, :, :2].flatten(2, 3)  # no CNOTs
    return 1 - 2 * torch.cat([odd[:, :, :1], gates], 2).to(torch.get_default_dtype())


def staircase_expectations(
    angles: Tensor,
    weights: Tensor,
    entangle: bool = True,
    gate_noise: Sequence[float] | None = None,
) -> Tensor:
    """``quantum_circuit`` simulated exactly: <Z_i> of every qubit.

    A matrix product state of bond dimension 2**L holds the circuit's state without truncation, so
    time and memory grow linearly with the number of qubits (exponentially with layers only). With
    noise the same holds for its density matrix: the result is the exact mean over all errors.

    Args:
        angles: (B, n), radians, float32 or float64.
        weights: (L, n, 2) = (RZ, RY) radians, or (L, n, 1) for RZ alone, with entanglement.
        entangle: False leaves the CNOTs out.
        gate_noise: (p1, p2), depolarising probabilities, see ``quantum_circuit``.

    Returns:
        (B, n) in -1..1, differentiable in both arguments.
    """
    if entangle:
        return sweep(angles, transfer_matrices(weights, gate_noise), gate_noise)
    if not gate_noise:
        return product_expectations(angles, weights)
    factors = angles.new_full((1, 1, 1 + 2 * len(weights), 3), 1 - 4 * gate_noise[0] / 3)
    return product_expectations(angles, weights, factors)


def check_simulation(arm: str, gate_noise: Sequence[float] | None = None) -> None:
    """Compares the exact simulation with PennyLane's, on a small random circuit of this arm.

    Raises UserError when values or gradients differ: one was edited without the other.
    """
    generator = random_stream(0, "check")
    entangle, kinds = arm != "product", 1 if arm == "published" else 2
    angles = torch.randn(2, 4, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.randn(2, 4, kinds, dtype=torch.float64, generator=generator).requires_grad_()
    probe = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    device = "default.mixed" if gate_noise else "default.qubit"
    qnode = make_qnode(4, 2, device, entangle, gate_noise=gate_noise)
    reference = torch.stack(qnode(angles, weights), -1)
    exact = staircase_expectations(angles, weights, entangle, gate_noise)
    ours, theirs = (
        [values, *torch.autograd.grad((values * probe).sum(), (angles, weights))]
        for values in (exact, reference)
    )
    errors = [(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]
    if not max(errors) < (1e-6 if gate_noise else 1e-9):  # PennyLane's channels are float32
        raise UserError(
            f"the exact simulation differs from quantum_circuit by {max(errors):.1e}: one was "
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

    Args:
        channels: C.
        arm: which circuit, one of ``QUANTUM_ARMS``.
        simulator: ``exact`` or the name of a PennyLane device.
        simulator_options: keyword arguments of that device.
        shots: <Z_i> is the mean of so many measurements of all qubits together (None: exact). The
            gradient is that of <Z_i> without shots (straight-through), given the drawn errors, or
            on a PennyLane device the parameter-shift rule's, measured as well.
        gate_noise: (p1, p2), depolarising probabilities, see ``quantum_circuit``.
        readout_noise: probability that a measured bit is flipped.
        trajectories: each sample's <Z_i> is the mean over so many draws of its errors, which share
            the shots; 0: over all that can be, exactly, and each shot has errors of its own.

    Attributes:
        generator: of shots and errors: one for the batch, or a sequence, one for each sample.
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
        gate_noise: Sequence[float] | None = None,
        readout_noise: float = 0.0,
        trajectories: int = 1,
    ):
        super().__init__(channels, n_qubits, n_layers)
        self.entangle = arm != "product"
        kinds = 1 if arm == "published" else 2
        weights = torch.rand(n_layers, n_qubits, kinds) * 2 * math.pi  # as PennyLane's TorchLayer
        self.weights = nn.Parameter(weights, requires_grad=arm != "frozen")
        self.shots, self.gate_noise, self.readout_noise = shots, gate_noise, readout_noise
        self.trajectories = trajectories
        self.generator: torch.Generator | Sequence[torch.Generator] | None = None
        self.qnode = self.inference_qnode = None
        self.cache: tuple[object, Tensor] | None = None
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
        if not self.gate_noise or self.trajectories:
            return self._run(angles, self.trajectories if self.gate_noise else 1)
        if self.entangle:
            mean = sweep(angles, self._transfer(self.gate_noise), self.gate_noise)
        else:
            mean = staircase_expectations(angles, self.weights, False, self.gate_noise)
        mean = mean * (1 - 2 * self.readout_noise)
        if self.shots:
            with torch.no_grad():
                measured = self._run(angles, self.shots)
            mean = mean + (measured - mean.detach())
        return mean

    def _run(self, angles: Tensor, copies: int) -> Tensor:
        """The mean over ``copies`` of each sample, each with errors of its own. (B, n) -> (B, n)"""
        batch, n = angles.shape
        paulis = factors = None
        if self.gate_noise:
            angles = angles.repeat_interleave(copies, 0)
            table = error_probabilities(self.weights, self.gate_noise, self.entangle)
            uniform = draw(torch.rand, self.generator, batch, copies, *table.shape)
            x, z = draw_paulis(table, uniform.to(angles).flatten(0, 1))
            if self.entangle:
                angles, paulis = insert_paulis(angles, x, z)
            else:
                factors = bloch_signs(x, z)
        if self.entangle:
            left, right = environments(angles, self._transfer(), paulis)
            values = contract(left, right)
            values = values if paulis is None else values * paulis.output
        else:
            values = product_expectations(angles, self.weights, factors)
        mean = values * (1 - 2 * self.readout_noise) if self.readout_noise else values
        if self.shots:
            with torch.no_grad():
                size = copies, 1 + (self.readout_noise > 0), self.shots // copies, n
                uniform = draw(torch.rand, self.generator, batch, *size).to(angles).flatten(0, 1)
                if self.entangle:
                    sites = site_matrices(self.weights)
                    bits = sample_outcomes(angles, sites, right, uniform[:, 0], paulis)
                else:
                    bits = 2 * (2 * uniform[:, 0] < 1 + values[:, None]).to(angles) - 1
                bits = torch.where(uniform[:, -1] < self.readout_noise, -bits, bits)
            mean = mean + (bits.mean(1) - mean).detach()
        return mean if copies == 1 else mean.view(batch, copies, n).mean(1)

    def _transfer(self, gate_noise: Sequence[float] | None = None) -> Tensor:
        """The circuit's transfer matrices; without gradients, kept until the weights change."""
        if torch.is_grad_enabled():
            return transfer_matrices(self.weights, gate_noise)
        state = (self.weights._version, self.weights.data_ptr(), self.weights.dtype, gate_noise)
        if self.cache is None or self.cache[0] != state:
            self.cache = state, transfer_matrices(self.weights, gate_noise)
        return self.cache[1]


# -------------------------------------------------------------------------------------- U-Net


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (Vaswani et al. 2017). t: (B,). Returns (B, dim), dim even."""
    k = torch.arange(dim // 2, device=t.device)
    frequencies = torch.exp(-math.log(10_000) * k / (dim // 2))
    phases = t.float()[:, None] * frequencies
    return torch.cat([phases.sin(), phases.cos()], dim=1)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice; the time embedding scales and shifts in between."""

    def __init__(self, channels: int, embedding: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

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
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, H, W) -> the same shape."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, -1, height * width)
        q, k, v = qkv.transpose(3, 4).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        return x + self.out(mixed.reshape(batch, channels, height, width))


class UNet(nn.Module):
    """The denoiser: 28x28 folded to 14x14, then 7x7, where the gate sits; a skip at both.

    Args:
        channels: of the images, 1 or 3.
        arm: one of ``ARMS``.
        width: feature channels at 14x14.
        bottleneck: feature channels at 7x7 (C of the gate).
        conditions: how the circuit is run, see ``QuantumAttention``.

    Raises:
        ValueError: unknown arm.
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
        self.head = nn.Conv2d(width, 4 * channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        # Built last: the same seed gives the same U-Net in every arm.
        self.gate: nn.Module | None = None
        if arm == "matched":
            self.gate = MatchedAttention(bottleneck, n_qubits, n_layers)
        elif arm != "classical":
            self.gate = QuantumAttention(bottleneck, n_qubits, n_layers, arm, **conditions)
        self.to(memory_format=torch.channels_last)

    def seed_circuit(self, generator: torch.Generator | Sequence[torch.Generator]) -> None:
        """Where the circuit's shots and errors come from: one for the batch, or one a sample."""
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


def save_grid(path: Path, images: Tensor) -> None:
    """Saves images (N, C, H, W) uint8 as one lossless PNG, with a description to split it by.

    Tile k stands at row k // columns, column k % columns, on a white ground; the text chunk
    ``grid`` holds count, columns, tile size, padding, scale, channels and value range as JSON.
    """
    n, channels, height, width = images.shape
    columns = min(n, max(5, math.ceil(math.sqrt(n))))
    rows = math.ceil(n / columns)
    scale = max(1, min(4, 640 // (columns * (width + TILE_PADDING))))
    size = [rows * (height + TILE_PADDING), columns * (width + TILE_PADDING), channels]
    canvas = np.full([size[0] + TILE_PADDING, size[1] + TILE_PADDING, channels], 255, np.uint8)
    for k, tile in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        top = TILE_PADDING + k // columns * (height + TILE_PADDING)
        left = TILE_PADDING + k % columns * (width + TILE_PADDING)
        canvas[top : top + height, left : left + width] = tile
    description = {"count": n, "columns": columns, "tile_height": height, "tile_width": width}
    description |= {"padding": TILE_PADDING, "scale": scale, "channels": channels}
    description |= {"value_range": [-1.0, 1.0]}
    text = PngImagePlugin.PngInfo()
    text.add_text("grid", json.dumps(description))
    picture = Image.fromarray(canvas.repeat(scale, 0).repeat(scale, 1).squeeze())
    buffer = io.BytesIO()
    picture.save(buffer, "png", pnginfo=text)
    write_atomic(path, buffer.getvalue())


def load_grid(path: Path) -> Tensor:
    """The images (N, C, H, W) uint8 of a PNG that ``save_grid`` wrote, to the bit.

    Raises UserError: no such file, damaged, or without the description.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            grid = json.loads(picture.text["grid"])
            canvas = np.asarray(picture)[:: grid["scale"], :: grid["scale"]]
        height, width, padding = grid["tile_height"], grid["tile_width"], grid["padding"]
        canvas = canvas.reshape(*canvas.shape[:2], grid["channels"])
        tiles = np.empty((grid["count"], height, width, grid["channels"]), np.uint8)
        for k in range(grid["count"]):
            row, column = divmod(k, grid["columns"])
            top, left = padding + row * (height + padding), padding + column * (width + padding)
            tiles[k] = canvas[top : top + height, left : left + width]
    except (OSError, SyntaxError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path}: not a sample grid of this project ({error!r})") from None
    return torch.from_numpy(tiles).permute(0, 3, 1, 2)


def save_gif(path: Path, frames: Sequence[tuple[str, Tensor]]) -> None:
    """Saves (caption, images (N, C, H, W) uint8) frames as an animation below ``GIF_BYTES``.

    Shows at most ten images a frame. The enlargement shrinks from 4, and then every other frame
    goes, until the file is small enough.
    """
    for scale, stride in [(4, 1), (3, 1), (2, 1), (1, 1), (1, 2), (1, 4), (1, 8)]:
        pictures = []
        for caption, images in frames[::-1][::stride][::-1]:  # the last frame always stays
            tiles = F.pad(images[:10], (1, 1, 1, 1), value=255).permute(2, 0, 3, 1).cpu().numpy()
            strip = tiles.reshape(len(tiles), -1, tiles.shape[3]).repeat(scale, 0).repeat(scale, 1)
            canvas = Image.new("RGB", (strip.shape[1], strip.shape[0] + 14), "white")
            canvas.paste(Image.fromarray(strip.squeeze()), (0, 14))
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
    axes.set(
        xlabel="optimizer step", ylabel="weighted squared error of v", title=title, yscale="log"
    )
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
    return {
        "name": settings.name,
        "command": shlex.join([Path(__file__).name, *argv]),
        "settings": asdict(settings) | {"label_name": CLASS_NAMES[settings.label]},
        "images": {"source": settings.data, "split": "train"}
        | counts
        | {"used": len(images), "sha256": hashlib.sha256(images.numpy().tobytes()).hexdigest()},
        "parameters": {name: sum(p.numel() for p in part) for name, part in parameters.items()},
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (torch, qml, np)},
        "git": {"commit": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty")},
    }


def open_run(folder: Path, config: dict) -> Path:
    """Creates the run folder, or makes sure that the existing one belongs to this very run.

    A finished run may be sampled under other CONDITIONS or in other steps; the grid is then named
    after them, and config.json says so. Returns the path of the grid. Raises UserError when
    the folder holds something else, and names the settings that differ.
    """
    path, grid = folder / "config.json", folder / "samples_final.png"
    config = json.loads(json.dumps(config))
    if not path.exists():
        if folder.exists() and any(not f.name.endswith(".tmp") for f in folder.iterdir()):
            raise UserError(f"{folder} has no config.json: not a run; use another --save_dir")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(config, indent=2) + "\n")
        return grid
    for left in folder.rglob(".*.tmp"):  # by a process that was killed while it wrote
        left.unlink()
    try:
        known = json.loads(path.read_text())
        known["settings"] = CONDITIONS | known["settings"]
        differences = {
            key: f"{key} {known[part].get(key)!r} (asked for: {value!r})"
            for part in ("settings", "images")
            for key, value in config[part].items()
            if known[part].get(key) != value
        }
        conditions = {name: config["settings"][name] for name in (*CONDITIONS, "sample_steps")}
        finished, entry = (folder / "model.pt").exists(), known
        if finished and differences and differences.keys() <= conditions.keys():
            grid = folder / f"samples_final_{conditions_name(config['settings'])}.png"
            entry = {"conditions": conditions, "command": config["command"]}
            entry = known.setdefault("other_grids", {}).setdefault(grid.name, entry)
            differences = {
                name: f"{grid.name} made with {name} {entry['conditions'][name]!r} (now {value!r})"
                for name, value in conditions.items()
                if entry["conditions"][name] != value
            }
        if not differences and config["n_eval"] > entry.get("n_eval", 0):
            entry["n_eval"] = config["n_eval"]
            write_atomic(path, json.dumps(known, indent=2) + "\n")
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); use another --save_dir") from None
    if differences:
        found = f"a run with other settings: {', '.join(differences.values())}"
        raise UserError(f"{folder} holds {found}; use another --save_dir or remove that folder")
    return grid


def conditions_name(settings: dict) -> str:
    """How a grid was sampled, for its file's name, as in ``exact_shots1000_gate0.001-0.01``."""
    words = [settings["simulator"]]
    for name, default in CONDITIONS.items():
        value = settings[name]
        if name not in ("simulator", "simulator_options") and value != default:
            value = "-".join(map(str, value)) if isinstance(value, list) else value
            words.append(f"{name.removesuffix('_noise')}{value}")
    if settings["sample_steps"] != settings["timesteps"]:
        words.append(f"steps{settings['sample_steps']}")
    return "_".join(words)


def n_finished(path: Path) -> int:
    """How many images a finished run has in its final grid; 0 when it is not finished."""
    return len(load_grid(path)) if path.exists() and path.with_name("model.pt").exists() else 0


def save_tensors(path: Path, tensors: dict) -> None:
    """torch.save, atomically; a full disk is an OSError like everywhere else."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_atomic(path, buffer.getvalue())


def load_tensors(path: Path, device: torch.device) -> dict:
    """What ``save_tensors`` wrote; unpickles nothing. Raises UserError when damaged or foreign."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, ValueError, IndexError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is damaged ({reason}); remove it to start from step 0") from None


# ------------------------------------------------------------------------------------ training


def build_model(settings: Settings, channels: int) -> UNet:
    """The U-Net with initial weights that depend on the seed alone, equal in all arms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        size = settings.n_qubits, settings.n_layers
        conditions = {name: getattr(settings, name) for name in CONDITIONS}
        return UNet(channels, settings.arm, *size, **conditions)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 100 steps (at most a tenth), then half a cosine to zero."""
    warm_up = min(100, max(1, steps // 10))
    return peak * min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def training_batch(
    settings: Settings, images: Tensor, step: int, timesteps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Images, timesteps and noise of one step; depends on the seed and the step alone.

    The images are consecutive pieces of one shuffle of the training set after another. The
    timesteps are stratified, one in each of B equal parts of 0..T, which lowers the variance.

    Returns:
        x0 (B, C, H, W) float in -1..1, t (B,) int64, noise like x0.
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
    strata = torch.arange(size, device=images.device)
    t = ((strata + uniform) * (timesteps / size)).long().clamp(max=timesteps - 1)
    return x0, t, torch.randn(x0.shape, generator=generator, device=images.device)


@contextlib.contextmanager
def deferred_interrupt():
    """Ctrl-C only sets the event that is yielded, so that a step is never cut in two."""
    pressed = threading.Event()
    previous = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def train(settings: Settings, images: Tensor, folder: Path) -> None:
    """Trains one model, from its checkpoint if there is one, and writes ``model.pt``.

    images: the training set, (n, C, 28, 28) uint8, on the training device. Raises DivergedError
    when the loss is not finite (the last good checkpoint stays), UserError for a damaged
    checkpoint, and KeyboardInterrupt, after saving, when Ctrl-C was pressed.
    """
    device, channels = images.device, images.shape[1]
    diffusion = GaussianDiffusion(settings.timesteps, device)
    model = build_model(settings, channels).to(device)
    ema, average = EMA(model, settings.ema_decay), build_model(settings, channels).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=settings.lr, betas=(0.9, 0.99), fused=True)
    losses, start = torch.zeros(settings.steps, device=device), 0
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        state = load_tensors(checkpoint, device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.shadow, ema.updates = state["ema"], state["step"]
        start = state["step"]
        losses[:start] = state["losses"]
    n_frames = settings.n_frames
    frames = {math.ceil(settings.steps * k / n_frames) for k in range(1, n_frames + 1)}

    def save(step: int) -> None:
        bad = torch.nonzero(~torch.isfinite(losses[:step]))
        if len(bad):
            what = f"{settings.name}: the loss is not finite at step {bad[0].item() + 1}"
            way_out = "stopped, the last good checkpoint is kept; try a lower --lr"
            raise DivergedError(f"{what}; {way_out} with another --save_dir")
        if step in frames:
            average.load_state_dict(ema.shadow)
            generators, circuits = (
                [
                    random_stream(settings.seed, name, k, device=device)
                    for k in range(settings.n_samples)
                ]
                for name in ("preview", "circuit preview")
            )
            average.seed_circuit(circuits)
            steps = min(PREVIEW_STEPS, settings.sample_steps)
            preview = diffusion.sample(average, settings.n_samples, generators, steps)
            save_grid(folder / "samples" / f"step_{step:06d}.png", to_uint8(preview))
        rows = "".join(f"{k},{loss!r}\n" for k, loss in enumerate(losses[:step].tolist(), 1))
        write_atomic(folder / "loss.csv", "step,loss\n" + rows)
        state = {"step": step, "losses": losses[:step].clone(), "ema": ema.shadow}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_tensors(checkpoint, state)

    (folder / "samples").mkdir(exist_ok=True)
    total, size = settings.steps * settings.batch_size, settings.batch_size
    bar = tqdm(total=total, initial=start * size, desc=settings.name, unit="img", unit_scale=True)
    with deferred_interrupt() as interrupted, bar:
        for step in range(start, settings.steps):
            x0, t, noise = training_batch(settings, images, step, settings.timesteps)
            model.seed_circuit(random_stream(settings.seed, "circuit", step, device=device))
            output = model(diffusion.q_sample(x0, t, noise), t)
            errors = (output - diffusion.target(x0, t, noise)).square().mean((1, 2, 3))
            loss = (diffusion.noise[t] * errors).mean()  # the noisy end decides the shape
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings.steps, settings.lr)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            losses[step] = loss.detach()
            done = step + 1
            bar.update(settings.batch_size)
            if done % 20 == 0:
                bar.set_postfix(step=done, loss=f"{losses[done - 20 : done].mean():.4f}")
            if done in frames or done % 100 == 0 or done == settings.steps or interrupted.is_set():
                save(done)
            if interrupted.is_set():
                raise KeyboardInterrupt
    paths = {step: folder / "samples" / f"step_{step:06d}.png" for step in sorted(frames)}
    pictures = [(f"{settings.name}  step {k}", load_grid(path)) for k, path in paths.items()]
    save_gif(folder / "training_progress.gif", pictures)
    save_loss_curve(folder / "loss_curve.png", losses.cpu(), settings.name)
    save_tensors(folder / "model.pt", ema.shadow)


def sample_final(
    settings: Settings, path: Path, n_eval: int, channels: int, device: torch.device
) -> None:
    """Brings the grid at ``path`` to ``n_eval`` images with the EMA weights of its run's model.pt.

    Image k has its own random stream, so images that are already there are kept.
    """
    images = load_grid(path) if path.exists() else torch.empty(0, channels, IMAGE_SIZE, IMAGE_SIZE)
    model = build_model(settings, channels).to(device)
    model.load_state_dict(load_tensors(path.with_name("model.pt"), device))
    diffusion = GaussianDiffusion(settings.timesteps, device)
    # The CPU's kernels round differently below eight images, so a small rest is drawn in company.
    least, most = SAMPLE_BATCH
    chunks = range(len(images), n_eval, most)
    with tqdm(total=len(chunks) * settings.sample_steps, desc="sampling", unit="step") as bar:
        for first in chunks:
            n = min(most, n_eval - first)
            numbers = range(first, first + max(n, least))
            generators, circuits = (
                [random_stream(settings.seed, name, k, device=device) for k in numbers]
                for name in ("image", "circuit image")
            )
            model.seed_circuit(circuits)
            new = diffusion.sample(model, len(numbers), generators, settings.sample_steps, bar)
            images = torch.cat([images.to(torch.uint8), to_uint8(new[:n]).cpu()])
            save_grid(path, images)


# -------------------------------------------------------------------------------- command line


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def positive(kind: type):
    """An argparse type: a finite number above zero."""

    def parse(text: str):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}, expected a number above 0")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its messages
    return parse


def probability(text: str) -> float:
    """An argparse type: a number in 0..1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}, expected a probability, 0 to 1")
    return value


def probabilities(text: str) -> tuple[float, float] | None:
    """An argparse type: two probabilities, as in 0.001,0.01; None when both are zero."""
    words = text.split(",")
    if len(words) != 2:
        raise argparse.ArgumentTypeError(f"{text}, expected two probabilities, as in 0.001,0.01")
    pair = probability(words[0]), probability(words[1])
    return pair if any(pair) else None


def json_object(text: str) -> dict | None:
    """An argparse type: a JSON object; None when it is empty."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text}, expected a JSON object, as in {{"seed": 1}}')
    return value or None


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that do not depend on the data set. Settings' fields are found by their names."""
    add, count, number = parser.add_argument, positive(int), positive(float)
    add("--arm", nargs="+", choices=ARMS, metavar="ARM", help="list, default classical; see below")
    text = "shorthand for --arm quantum (True) or --arm classical (False)"
    add("--use_quantum", nargs="?", const="True", choices=["True", "False"], help=text)
    add("--n_train", nargs="+", default=["all"], help="training images, list (default: all)")
    add("--seeds", nargs="+", type=int, default=[0], help="list (default: 0)")
    length = parser.add_mutually_exclusive_group()
    text = "optimizer steps (default: 2820, the paper's 30 epochs over a full digit)"
    length.add_argument("--steps", type=count, default=2820, help=text)
    length.add_argument("--epochs", type=count, help="instead: passes over the training images")
    add("--batch_size", type=count, default=64, help="images per step (default: 64)")
    add("--lr", type=number, default=3e-3, help="peak learning rate (default: 0.003)")
    add("--ema_decay", type=number, default=0.995, help="target decay, below 1 (default: 0.995)")
    add("--n_qubits", type=count, default=16, help="qubits, or units (default: 16)")
    add("--n_layers", type=count, default=3, help="circuit layers (default: 3)")
    add("--simulator", default="exact", help="exact, or a PennyLane device (default: exact)")
    text = "the PennyLane device's keyword arguments, as a JSON object"
    add("--simulator_options", type=json_object, metavar="JSON", help=text)
    text = "measurements per expectation value (default: exact expectation values)"
    add("--shots", type=count, help=text)
    text = (
        "depolarising probabilities: after every one-qubit gate, and on both qubits of every CNOT"
    )
    add("--gate_noise", type=probabilities, metavar="P1,P2", help=text + " (default: none)")
    text = "probability that a measured bit is flipped (default: 0)"
    add("--readout_noise", type=probability, default=0.0, metavar="Q", help=text)
    text = "draws of the gate noise that are averaged, 0: exactly over all (default: 1)"
    add("--trajectories", type=int, default=1, metavar="K", help=text)
    add("--timesteps", type=count, default=1000, help="noise levels T (default: 1000)")
    add("--n_frames", type=count, default=30, help="previews in a run (default: 30)")
    add("--n_samples", type=count, default=5, help="images per preview (default: 5)")
    add("--n_eval", type=count, default=25, help="images in the final grid (default: 25)")
    add("--sample_steps", type=count, help="sampling steps of the final grid (default: timesteps)")
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
    text = "auto takes MNIST, or without a network scikit-learn's digits; mnist never falls back"
    add(
        "--data",
        choices=["auto", "mnist", "digits"],
        default="auto",
        help=text + " (default: auto)",
    )
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


def choose_arms(arms: Sequence[str] | None, use_quantum: str | None) -> list[str]:
    """The arms that --arm and --use_quantum ask for together."""
    if use_quantum is None:
        return list(arms or ["classical"])
    short = "quantum" if use_quantum == "True" else "classical"
    if arms and list(arms) != [short]:
        raise UserError(f"--use_quantum={use_quantum} means --arm {short}, not {' '.join(arms)}")
    return [short]


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
    choose_arms(args.arm, args.use_quantum)
    choose_device(args.device)
    if (args.sample_steps or 0) > args.timesteps:
        raise UserError(
            f"--sample_steps {args.sample_steps}: more than --timesteps {args.timesteps}"
        )
    if args.ema_decay >= 1:
        raise UserError(f"--ema_decay {args.ema_decay}: expected below 1")
    copies, exact = args.trajectories, args.simulator == "exact"
    if copies < 0 or copies != 1 and not (args.gate_noise and exact):
        where = "with --gate_noise and the exact simulator"
        raise UserError(f"--trajectories {copies}: expected 0 or more, {where}")
    if args.shots and copies and args.shots % copies:
        raise UserError(f"--trajectories {copies}: expected a divisor of --shots {args.shots}")
    if args.simulator_options and exact:
        raise UserError("--simulator_options: expected a PennyLane device as --simulator")
    if "shots" in (args.simulator_options or {}):
        raise UserError("--simulator_options: use --shots for the number of shots")
    for size in args.n_train:
        if size != "all" and not size.isdigit():
            raise UserError(f"--n_train {size}: expected a number of images, or all")


def make_grid(
    args: argparse.Namespace, classes: Sequence[int], source: str, images: Tensor, labels: Tensor
) -> list[tuple[Settings, Tensor, dict]]:
    """Every run that the flags ask for: settings, training images, and how many there were."""
    arms = choose_arms(args.arm, args.use_quantum)
    shared = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    shared["sample_steps"] = args.sample_steps or args.timesteps
    grid = []
    for label, size, arm, seed in itertools.product(classes, args.n_train, arms, args.seeds):
        n_train = None if size == "all" else int(size)
        chosen = select_images(images, labels, label, n_train, seed)
        run = {"arm": arm, "data": source, "label": label, "n_train": n_train, "seed": seed}
        if arm not in QUANTUM_ARMS:
            run |= CONDITIONS
        if args.epochs:
            run["steps"] = args.epochs * math.ceil(len(chosen) / args.batch_size)
        counts = {"total": len(labels), "available": int((labels == label).sum())}
        grid.append((Settings(**shared | run), chosen, counts))
    return grid


def run_grid(
    grid: Sequence[tuple[Settings, Tensor, dict]], args: argparse.Namespace, argv: Sequence[str]
) -> None:
    """Makes every run of the grid, or this process's share of it, that is not there yet.

    A launcher that sets RANK and WORLD_SIZE (torchrun, a job array) gives each process every
    WORLD_SIZE-th run. A run whose loss diverges does not stop the others.
    """
    device = choose_device(args.device)
    hardware = f"cpu, {platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = f"{device}, {torch.cuda.get_device_name(device)}"
    check_simulator(args, {settings.arm for settings, _, _ in grid} & set(QUANTUM_ARMS))
    share = grid[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]
    paths = []
    for settings, images, counts in share:
        config = run_config(settings, images, counts, argv)
        config |= {"device": hardware, "n_eval": args.n_eval}
        paths.append(open_run(args.save_dir / settings.name, config))
    diverged = []
    for number, (path, (settings, images, _)) in enumerate(zip(paths, share, strict=True), 1):
        folder = args.save_dir / settings.name
        other = "" if path.name == "samples_final.png" else f": only sampled, as {path.name}"
        print(f"[{number}/{len(share)}] {folder}{other}", flush=True)
        try:
            if not (folder / "model.pt").exists():
                if settings.arm in QUANTUM_ARMS:
                    save_circuit(folder / "circuit.png", settings)
                train(settings, images.to(device), folder)
            if n_finished(path) < args.n_eval:
                sample_final(settings, path, args.n_eval, images.shape[1], device)
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
        grid = make_grid(args, classes, *load_images(args.data, args.data_dir))
        run_grid(grid, args, argv)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
