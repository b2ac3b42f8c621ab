"""Diffusion on MNIST digits, with a 16-qubit variational circuit inside the U-Net.

Implements the system of "Quantum Generative Models for Image Generation: Insights from MNIST and
MedMNIST" (arXiv 2504.00034): one denoising diffusion model per digit, and the controls that a fair
comparison needs.

    python quantum_diffusion_mnist.py --use_quantum                        # digit 3
    python quantum_diffusion_mnist.py --arm classical matched quantum --digits 3 8 --n_train 25 100

Where the circuit sits: the U-Net's bottleneck h, with C = 128 channels of 7x7 pixels, becomes
h * (1 + g(mean(h))), channel by channel; n are the qubits, v is what the U-Net predicts.

    image, time -> encoder -> h ---------------------------------------> * -> decoder -> v
                              |                                          |
                              |                                        1 + g
                              v                                          |
                          mean over pixels -> Linear(C, n) -> circuit -> Linear(n, C)
                                               angles x        <Z_i>

The paper calls this gate "quantum attention". It is no attention: it is squeeze-and-excitation
(Hu et al. 2018, arXiv 1709.01507) with a circuit in its middle. The last Linear starts at zero, so
all models start as the same function.

What the paper describes, and where it is here:

    the noise schedule                   cosine_beta_schedule
    the forward process q(x_t | x_0)     GaussianDiffusion.q_sample
    the reverse process                  GaussianDiffusion.sample
    the circuit: as printed, repaired    published_circuit, quantum_circuit
    the re-weighting of the features     QuantumGate, UNet.forward
    the moving average of the weights    warmed_up_decay, train

To try a circuit of your own, write a function like quantum_circuit and an entry in ARMS.
quantum_diffusion_pathmnist.py is the same for colour images of tissue: both are complete, so a
circuit goes into the one that you run. README.md lists what differs from the paper and why.
The file reads from top to bottom: settings, diffusion, circuits and gates, U-Net, files, data,
training, sampling, pictures, run folder, command line, and as an appendix the exact simulation of
the circuits, with how a circuit is read.
"""

import argparse
import contextlib
import errno
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

# While they wait, OpenMP's threads spin, which slows a step on a busy machine up to thirteenfold:
# let them spin briefly.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch loads OpenMP

# A shell inside Jupyter names a backend for figures that may not be installed here.
if not importlib.util.find_spec("matplotlib_inline") and "inline" in os.getenv("MPLBACKEND", ""):
    del os.environ["MPLBACKEND"]

import filelock
import matplotlib
import numpy as np
import pennylane as qml
import torch
import torch.nn.functional as F
import torchvision
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

# ---------------------------------------------------------------------------------- settings

IMAGE_SIZE = 28  # pixels
SAMPLE_STEPS = 50  # network evaluations for a final image
PREVIEW_STEPS = 25  # network evaluations for a preview
CHECKPOINT_STEPS = 100  # a killed run loses at most so many steps

# The classes.
CLASS_NAMES = tuple("0123456789")
CLASS_IDS = {name: k for k, name in enumerate(CLASS_NAMES)}
CLASS_PREFIX = ""  # between data set and class in a run's name ("_" in the PathMNIST script)
ALL_CLASSES = tuple(range(10))  # those that a run's name need not list
DEFAULT_CLASS = {"mnist": "3", "digits": "3"}

# The size of the U-Net and of a training.
FOLD = 2  # squares of 2x2 pixels become channels before the first level
WIDTHS = (48, 128)  # channels of each level, at 14x14 and 7x7 pixels
CONDITIONAL_STEPS = 5000  # the default of one model for several classes

MOST_IMAGES = 2 * 10**8  # steps * batch_size: the order of all draws is kept in memory
DEVICE_QUBITS = {"default.mixed": 10, "other": 24}  # what fits into memory


class UserError(ValueError):
    """A mistake that the user can mend: printed as one line, exit code 2."""


@contextlib.contextmanager
def explaining(what: str, mend: str = "") -> Iterator[None]:
    """Whatever fails inside becomes a UserError: what failed, why (in brackets), what mends it.

    Too little memory passes as it is, and so does what the disk refuses (permission, no space);
    a missing file, or one that is no picture or archive, is explained.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        not_there = (None, errno.ENOENT, errno.ENOTDIR)
        is_disk = isinstance(error, OSError) and error.errno not in not_there
        if is_disk or is_out_of_memory(error):
            raise
        raise UserError(f"{what} ({one_line(error)}){mend}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's or the computer's memory was too small."""
    words = str(error).lower()  # "can't allocate", "CUBLAS_STATUS_ALLOC_FAILED"
    of_torch = isinstance(error, RuntimeError) and ("alloc" in words or "out of memory" in words)
    return of_torch or isinstance(error, MemoryError)


def one_line(error: Exception) -> str:
    """What went wrong, for a message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def number(default: float | None, low: float, high: float, text: str) -> Any:
    """A setting that is a number: its default, its range, and what --help says of it."""
    return field(default=default, metadata={"range": (low, high), "text": text})


@dataclass(frozen=True)
class Settings:
    """Everything that one run's result depends on, beside the images, --weights and the machine.

    Raises UserError for values out of their range, or that do not go together.
    """

    # What is trained on what.
    arm: str = "classical"  # a key of ARMS
    data: str = "digits"  # the data source
    classes: tuple[int, ...] = (3,)  # more than one: one class-conditional model of them all
    n_train: int | None = number(None, 1, 10**9, "training images of each class; None: all")
    seed: int = number(0, 0, 2**63 - 1, "of the weights, the data subset, the batches, all noise")

    # The training.
    steps: int = number(1250, 1, 10**6, "optimizer steps")  # 13 passes over an MNIST digit
    batch_size: int = number(64, 1, 10**5, "images per step")
    lr: float = number(3e-3, 1e-9, 1e3, "learning rate of Adam, before warm-up and decay")
    muon_lr: float = number(0.02, 0.0, 1e3, "learning rate of Muon (inner convolutions), likewise")
    ema_decay: float = number(0.995, 0.0, 0.999999, "target decay of the weights' moving average")
    timesteps: int = number(1000, 2, 10**5, "noise levels T")

    # The gate.
    n_qubits: int = number(16, 1, 1024, "qubits, or units of a classical gate")
    n_layers: int = number(3, 1, 100, "circuit layers")

    # What is looked at on the way.
    n_frames: int = number(30, 1, 1000, "previews in a run")
    n_samples: int = number(5, 1, 1000, "images of each class per preview")

    # The conditions, in training and sampling alike. A model trained under ideal ones can also be
    # sampled under others (--weights).
    sample_steps: int = number(SAMPLE_STEPS, 1, 10**5, "network evaluations per image, at most")
    simulator: str = "exact"  # or the name of a PennyLane device
    simulator_options: dict | None = None  # that device's arguments
    shots: int | None = number(None, 1, 10**5, "measurements; by default exact means")
    gate_noise: tuple[float, float] = (0.0, 0.0)  # depolarising: after 1-qubit, 2-qubit gates
    readout_noise: float = number(0.0, 0.0, 1.0, "probability that a measured bit is flipped")

    def __post_init__(self):
        if self.arm not in ARMS:
            raise UserError(f"--arm {self.arm}: expected one of {', '.join(ARMS)}")

        # JSON and users give lists, too. 0 and -0 are 0.0, so that equal runs have equal names.
        object.__setattr__(self, "gate_noise", tuple(float(p) + 0.0 for p in self.gate_noise))
        object.__setattr__(self, "classes", tuple(sorted(set(self.classes))))

        # Ranges.
        if not self.classes or not set(self.classes) <= set(range(len(CLASS_NAMES))):
            last = len(CLASS_NAMES) - 1
            raise UserError(f"classes {self.classes}: expected some of 0 to {last}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name} {value}: expected {low} to {high}")
            if isinstance(low, float):
                object.__setattr__(self, name, float(value) + 0.0)
        if len(self.gate_noise) != 2 or not all(0 <= p <= 1 for p in self.gate_noise):
            raise UserError(f"--gate_noise {self.gate_noise}: expected two numbers of 0.0 to 1.0")
        if self.steps * self.batch_size > MOST_IMAGES:
            product = f"--steps {self.steps} of --batch_size {self.batch_size}"
            raise UserError(f"{product}: expected at most {MOST_IMAGES:,} images in all")

        # Combinations. A sample_steps that was asked for may not exceed T; the default is cut to T
        # in sampling, so that a short schedule needs no second flag.
        if self.sample_steps > self.timesteps and self.sample_steps != SAMPLE_STEPS:
            found = f"--sample_steps {self.sample_steps}"
            raise UserError(f"{found}: expected at most --timesteps {self.timesteps}")
        if self.simulator_options is not None:
            if self.simulator == "exact":
                raise UserError("--simulator_options: expected a PennyLane device as --simulator")
            options = self.simulator_options
            if not isinstance(options, dict) or {"shots", "seed"} & options.keys():
                found = "expected a JSON object, and no shots and no seed in it"
                raise UserError(f"--simulator_options: {found}, which have flags of their own")
        most = DEVICE_QUBITS.get(self.simulator, DEVICE_QUBITS["other"])
        if self.simulator != "exact" and self.n_qubits > most:
            found = f"--n_qubits {self.n_qubits}: at most {most} on {self.simulator}"
            raise UserError(f"{found}; the exact simulation takes more, of a chain")

    @property
    def conditional(self) -> bool:
        """Whether the model is class-conditional: it learns several classes, as an input."""
        return len(self.classes) > 1

    @property
    def condition(self) -> str:
        """The conditions that differ from their defaults, for the name: ``shots1000_steps10``."""
        words = []
        if self.simulator != "exact":
            words.append(self.simulator)
        if self.shots:
            words.append(f"shots{self.shots}")
        if any(self.gate_noise):
            words.append("gate{}-{}".format(*self.gate_noise))
        if self.readout_noise:
            words.append(f"readout{self.readout_noise}")
        if self.sample_steps != SAMPLE_STEPS:
            words.append(f"steps{self.sample_steps}")
        return "_".join(words)

    @property
    def name(self) -> str:
        """The run folder's name.

        For example ``quantum_mnist3_nall_seed0_shots1000``, ``quantum_mnist_conditional_n25_seed0``
        or, of two classes, ``quantum_mnist_conditional-3-8_n25_seed0``.
        """
        names = "-".join(CLASS_NAMES[label] for label in self.classes)
        if not self.conditional:
            of_classes = CLASS_PREFIX + names
        elif self.classes == ALL_CLASSES:
            of_classes = "_conditional"
        else:
            of_classes = f"_conditional-{names}"
        name = f"{self.arm}_{self.data}{of_classes}_n{self.n_train or 'all'}_seed{self.seed}"
        return f"{name}_{self.condition}" if self.condition else name


# Lowest and highest value of each setting that is a number.
RANGES = {one.name: one.metadata["range"] for one in fields(Settings) if one.metadata}

# The conditions of a circuit, at their ideal values. Arms without a circuit keep these, whatever
# the flags say. sample_steps, the remaining condition, is every arm's.
CIRCUIT_CONDITIONS = ("simulator", "simulator_options", "shots", "gate_noise", "readout_noise")
IDEAL = {name: getattr(Settings, name) for name in CIRCUIT_CONDITIONS}


def random_stream(seed: int, *name: object, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on ``seed``, ``name`` and the kind of device alone.

    Every use of randomness has its own (batch k, image k, the data subset), so none disturbs
    another, and a run resumes at any step. PyTorch's CPU generator keeps 32 bits of a seed, so of
    100,000 streams about one pair is equal.
    """
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


# -------------------------------------------------------------------------------- diffusion


def cosine_beta_schedule(timesteps: int, s: float = 0.008) -> Tensor:
    """beta_1 .. beta_T of the cosine schedule.

    Returns (timesteps,) float64, clipped to at most 0.999: Nichol & Dhariwal 2021
    (arXiv 2102.09672), eq. 17.
    """
    t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2  # alpha_bar(t) = f(t) / f(0)
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


class GaussianDiffusion:
    """The forward process of DDPM (Ho et al. 2020), and a sampler of second order.

    x_t = alpha x_0 + sigma noise, with alpha = sqrt(alpha_bar) and sigma = sqrt(1 - alpha_bar).
    Index t = 0 .. T-1 is the paper's 1 .. T. The network predicts v = alpha noise - sigma x_0
    (Salimans & Ho 2022), which is a stable target in pure noise, where the noise itself is not.
    """

    NOISE_SCALE = 1.01  # S_noise of Karras et al. 2022: without it tissue comes out pale

    def __init__(self, timesteps: int, device: torch.device | str = "cpu"):
        self.timesteps = timesteps
        self.alpha_bar = torch.cumprod(1 - cosine_beta_schedule(timesteps), 0)  # (T,) float64
        self.lambdas = (self.alpha_bar / (1 - self.alpha_bar)).log() / 2  # log(alpha / sigma)

        # For images on the device, (T, 1, 1, 1) float32.
        self.alpha = self.alpha_bar.sqrt().float()[:, None, None, None].to(device)
        self.sigma = (1 - self.alpha_bar).sqrt().float()[:, None, None, None].to(device)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x_t given x_0 and noise (Ho et al. eq. 4), and the network's target v there.

        x0, noise: (B, C, H, W); t: (B,) int64. Returns (x_t, v), each like x0.
        """
        alpha, sigma = self.alpha[t], self.sigma[t]
        return alpha * x0 + sigma * noise, alpha * noise - sigma * x0

    def sampling_levels(self, steps: int) -> Tensor:
        """The timesteps that the sampler visits, from T - 1 down: at most ``steps``, int64.

        Their lambda = log(alpha / sigma) run from -6, almost pure noise, to that of t = 0 in equal
        steps of asinh(lambda). So they lie densest around lambda = 0, where an image is decided.
        Sampling begins in pure noise, so the first is T - 1 instead. None is visited twice.
        """
        wanted = torch.linspace(math.asinh(-6), self.lambdas[0].asinh(), steps).sinh()

        # The timesteps whose lambda is nearest to the wanted one. One after the other, as steps
        # times T distances may not fit into the memory.
        levels = torch.stack([(self.lambdas - one).abs().argmin() for one in wanted])
        levels[0] = self.timesteps - 1  # pure noise
        return levels.unique().flip(0)

    @torch.no_grad()
    def sample(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        x_T: Tensor,
        steps: int = SAMPLE_STEPS,
        draw_noise: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> Tensor:
        """Draws images by SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095).

        model: (x (B, C, H, W), t (B,) int64) -> v like x. x_T: standard normal noise
        (B, C, H, W). steps: network evaluations at most, 1 .. T. draw_noise: new noise like its
        argument, once a step. Returns x_0 like x_T, in -1..1.

        The first-order form of this solver is DDPM's ancestral step, but for NOISE_SCALE. x_0 is
        clipped at the end alone: clipped at every step, black turns grey.
        """
        levels = self.sampling_levels(steps)
        alpha = self.alpha_bar[levels].sqrt().tolist()
        sigma = (1 - self.alpha_bar[levels]).sqrt().tolist()
        lambdas = self.lambdas[levels].tolist()

        x = x_T
        x0_last = h_last = None  # the first step is of first order
        for k, t in enumerate(levels.tolist()):
            # What the network takes the image to be.
            v = model(x, torch.full((len(x),), t, device=x.device))
            x0 = alpha[k] * x - sigma[k] * v
            if k == len(levels) - 1:
                return x0.clamp(-1, 1)

            # The second order extrapolates from the last step's x_0 and this one's.
            h = lambdas[k + 1] - lambdas[k]
            d = x0 if x0_last is None else x0 + (x0 - x0_last) * (h / (2 * h_last))
            x0_last = x0
            h_last = h

            # To the next level, where the share 1 - e^-2h of the noise is drawn anew:
            # x' = (sigma' / sigma) e^-h x + alpha' (1 - e^-2h) d + sigma' sqrt(1 - e^-2h) noise,
            # the noise here times NOISE_SCALE.
            share = -math.expm1(-2 * h)
            of_x = sigma[k + 1] / sigma[k] * math.exp(-h)
            of_d = alpha[k + 1] * share
            of_noise = self.NOISE_SCALE * sigma[k + 1] * math.sqrt(share)
            x = of_x * x + of_d * d + of_noise * draw_noise(x)


# ---------------------------------------------------------------------------- circuits, arms
#
# A circuit is a function of PennyLane operations on the wires 0 .. n-1:
#   angles   (n,) or (B, n), radians: the circuit's input; index it as angles[..., i]
#   weights  (layers, n, weights per qubit and layer), radians, trained
# Whatever runs it, <Z_i> of every qubit is measured at its end; to measure X instead, end it with a
# Hadamard on each. An entry in ARMS gives its name and its number of weights. Picture, noise, exact
# simulation and the check of that, ``check_circuit``, follow from the function:
#
#     check_circuit(Settings("mine")); print(circuit_text(Settings("mine")))  # without training
#
# Angles are the outputs of QuantumGate.project_in, of any magnitude: scale them in its forward.
# Weights begin uniform in 0 .. 2 pi; a weight may go unused. Write a new function rather than
# change one that has runs: their folders hold its operations, and are refused where these differ.
# The control matched keeps quantum's two weights per unit and layer.
#
# The exact simulation (see the appendix) takes quantum gates and channels on one qubit or two
# neighbours. What varies is angles[..., i] or weights[l, i, k] itself (-w and 2 * x are refused),
# and enters as cos and sin of it or of its half, as in rotations and controlled rotations. Its cost
# grows with the bond dimension of each pair of neighbours, 256 at most: a product over the gates
# between the two, 4 for CNOT, CZ, CRX, IsingXX, YY or ZZ (2 for a CNOT(i, i + 1) that is the last
# on qubit i), 16 for IsingXY and SWAP. So four layers of CNOTs fit: 4 * 4 * 4 * 2 = 128, or 256
# with noise behind the last. Most else runs on a PennyLane device, --simulator lightning.qubit;
# channels need default.mixed.


def encode(angles: Tensor) -> None:
    """The encoding that all circuits here share: RY(x_i) on qubit i."""
    for i in range(angles.shape[-1]):
        qml.RY(angles[..., i], wires=i)


def rotate(layer: Tensor, *rotations: type) -> None:
    """On every qubit one rotation after the other, each by a weight of its own; layer: (n, k)."""
    for i in range(len(layer)):
        for k, rotation in enumerate(rotations):
            rotation(layer[i, k], wires=i)


def neighbours(layer: Tensor) -> list[list[int]]:
    """The pairs (0, 1), (1, 2), ... of the chain of n qubits; layer: (n, k), its weights."""
    return [[i, i + 1] for i in range(len(layer) - 1)]


def quantum_circuit(angles: Tensor, weights: Tensor) -> None:
    """The authors' repaired circuit: in every layer RZ, RY and a chain of CNOTs."""
    encode(angles)
    for layer in weights:
        rotate(layer, qml.RZ, qml.RY)
        for pair in neighbours(layer):
            qml.CNOT(pair)


def published_circuit(angles: Tensor, weights: Tensor) -> None:
    """The circuit as printed, RZ only.

    RZ is diagonal and CNOTs permute the basis states, so <Z_i> is a product of cosines of the
    inputs, whatever the weights are: their gradient is exactly zero.
    """
    encode(angles)
    for layer in weights:
        rotate(layer, qml.RZ)
        for pair in neighbours(layer):
            qml.CNOT(pair)


def product_circuit(angles: Tensor, weights: Tensor) -> None:
    """``quantum_circuit`` without its CNOTs: nothing is entangled."""
    encode(angles)
    for layer in weights:
        rotate(layer, qml.RZ, qml.RY)


def cz_circuit(angles: Tensor, weights: Tensor) -> None:
    """RX, RY and a chain of CZs in every layer; the last chain has no effect on <Z_i>."""
    encode(angles)
    for layer in weights:
        rotate(layer, qml.RX, qml.RY)
        for pair in neighbours(layer):
            qml.CZ(pair)


def ising_circuit(angles: Tensor, weights: Tensor) -> None:
    """RX, RY and a chain of IsingZZ with a trained angle in every layer.

    Without effect are the last qubit's third weights, and those of the last layer, whose
    IsingZZs commute with what is measured.
    """
    encode(angles)
    for layer in weights:
        rotate(layer, qml.RX, qml.RY)
        for pair in neighbours(layer):
            qml.IsingZZ(layer[pair[0], 2], wires=pair)


def brickwork_circuit(angles: Tensor, weights: Tensor) -> None:
    """RY, RZ, and CNOTs on the even, then on the odd pairs of neighbours in every layer.

    The last layer's RZs have no effect on <Z_i>.
    """
    encode(angles)
    for layer in weights:
        rotate(layer, qml.RY, qml.RZ)
        pairs = neighbours(layer)
        for pair in pairs[0::2] + pairs[1::2]:
            qml.CNOT(pair)


def reupload_circuit(angles: Tensor, weights: Tensor) -> None:
    """``quantum_circuit`` with its input again before every layer (Perez-Salinas et al. 2020)."""
    for layer in weights:
        encode(angles)
        rotate(layer, qml.RZ, qml.RY)
        for pair in neighbours(layer):
            qml.CNOT(pair)


def ring_circuit(angles: Tensor, weights: Tensor) -> None:
    """``quantum_circuit`` whose chains are closed by CNOT(n-1, 0)."""
    n = weights.shape[1]
    encode(angles)
    for layer in weights:
        rotate(layer, qml.RZ, qml.RY)
        closing = [[n - 1, 0]] if n > 1 else []
        for pair in neighbours(layer) + closing:
            qml.CNOT(pair)


def strong_circuit(angles: Tensor, weights: Tensor) -> None:
    """PennyLane's StronglyEntanglingLayers (Schuld et al. 2018) behind the encoding."""
    encode(angles)
    qml.StronglyEntanglingLayers(weights, wires=range(weights.shape[1]))


class Arm(NamedTuple):
    """One arm of the comparison, as of a clinical trial: what stands in the middle of the gate."""

    text: str  # one line for --help
    circuit: Callable[[Tensor, Tensor], None] | None = None
    n_weights: int = 0  # the circuit's weights per qubit and layer
    trained: bool = True  # whether these weights are


ARMS = {
    "classical": Arm("no gate: the paper's classical model"),
    "matched": Arm("a classical gate with as many weights as quantum: the fair control"),
    "se": Arm("ReLU: squeeze-and-excitation, which everybody uses"),
    "quantum": Arm("RY(x), then layers of RZ, RY and a CNOT chain", quantum_circuit, 2),
    "published": Arm("the circuit as printed, RZ alone: a fixed function", published_circuit, 1),
    "product": Arm("quantum without CNOTs: does entanglement matter?", product_circuit, 2),
    "frozen": Arm(
        "quantum with frozen weights: does training matter?", quantum_circuit, 2, trained=False
    ),
    "cz": Arm("layers of RX, RY and a chain of CZs", cz_circuit, 2),
    "ising": Arm("layers of RX, RY and a chain of trained IsingZZs", ising_circuit, 3),
    "brickwork": Arm("layers of RY, RZ and CNOTs on even, then odd pairs", brickwork_circuit, 2),
    "reupload": Arm("quantum with RY(x) again before every layer", reupload_circuit, 2),
    "ring": Arm("quantum with a closed chain (a PennyLane device only)", ring_circuit, 2),
    "strong": Arm("StronglyEntanglingLayers (a PennyLane device only)", strong_circuit, 3),
}


def expand_templates(operations: Sequence[qml.operation.Operator]) -> Iterator:
    """The operations with templates taken apart, until each is a gate or a channel."""
    for operation in operations:
        is_channel = isinstance(operation, qml.operation.Channel)
        if is_channel or operation.has_matrix or not operation.has_decomposition:
            yield operation
        else:
            with qml.QueuingManager.stop_recording():  # else its parts join the circuit being read
                parts = operation.decomposition()
            yield from expand_templates(parts)


def operations_of(circuit: Callable, angles: Tensor, weights: Tensor) -> list:
    """The PennyLane operations of a circuit, in the order of time.

    Raises UserError when the circuit, the user's own code, fails for inputs of these shapes.
    """
    if isinstance(circuit, qml.QNode):
        raise UserError(f"{name_of(circuit)} is a QNode; leave out @qml.qnode and what is returned")
    n_qubits = angles.shape[-1]
    inputs = f"wires 0 to {n_qubits - 1}, angles[..., i], weights of shape {tuple(weights.shape)}"
    mend = f"; expected: {inputs}; a run begins with a check on at most 5 qubits and 3 layers"
    with explaining(f"{name_of(circuit)} fails for {n_qubits} qubits", mend):
        script = qml.tape.make_qscript(circuit)(angles, weights)
        strange = set(script.wires) - set(range(n_qubits))
        if strange:
            raise ValueError(f"it uses the wires {sorted(map(str, strange))}")
        operations = list(expand_templates(script.operations))
    if script.measurements:
        found = "it returns measurements, but <Z_i> of all qubits is what is measured"
        raise UserError(f"{name_of(circuit)}: {found}")
    if any(operation.name in ("MidMeasureMP", "PauliMeasure") for operation in operations):
        raise UserError(f"{name_of(circuit)}: it measures inside, which no simulator here does")
    return operations


def name_of(circuit: Callable) -> str:
    """A circuit's name for messages."""
    return getattr(circuit, "__name__", "the circuit")


@cache  # one function for a circuit and noise, by which the compiled circuit is found again
def with_noise(
    circuit: Callable, gate_noise: tuple[float, float] = (0.0, 0.0), readout_noise: float = 0.0
) -> Callable:
    """The circuit with PennyLane's channels behind its gates, those inside templates too.

    gate_noise: probabilities of a ``DepolarizingChannel`` on the qubit of every one-qubit gate, on
    both of every two-qubit gate. readout_noise: of a ``BitFlip`` on every qubit at the end. Raises
    UserError for gate noise behind a gate on more than two qubits, and beyond 0..1.
    """
    if len(gate_noise) != 2 or not all(0 <= p <= 1 for p in (*gate_noise, readout_noise)):
        found = f"gate_noise {gate_noise}, readout_noise {readout_noise}"
        raise UserError(f"{found}: expected two numbers and one number of 0.0 to 1.0")
    if not any(gate_noise) and not readout_noise:
        return circuit

    @wraps(circuit)
    def noisy_circuit(angles: Tensor, weights: Tensor) -> None:
        for operation in operations_of(circuit, angles, weights):
            # The operation itself; the circuit's own channels get no noise, nor what does nothing.
            qml.apply(operation)
            n = len(operation.wires)
            is_idle = operation.name == "GlobalPhase" or (operation.name == "Identity" and n > 2)
            is_channel = isinstance(operation, qml.operation.Channel)
            if is_idle or is_channel or not any(gate_noise):
                continue
            if n > 2:
                found = f"{operation.name} acts on {n} qubits"
                raise UserError(f"{found}, and --gate_noise knows gates on one or two")
            for wire in operation.wires:
                if gate_noise[n - 1] > 0:
                    qml.DepolarizingChannel(gate_noise[n - 1], wires=wire)

        # The readout's noise.
        if readout_noise > 0:
            for wire in range(angles.shape[-1]):
                qml.BitFlip(readout_noise, wires=wire)

    return noisy_circuit


def make_qnode(
    circuit: Callable,
    n_qubits: int,
    simulator: str = "default.qubit",
    options: dict | None = None,
    shots: int | None = None,
    diff_method: str | None = "best",
) -> qml.QNode:
    """A circuit on a PennyLane device, with <Z_i> of all its qubits.

    shots: joint measurements of all qubits; None: exact means, which hardware does not have.
    diff_method: None for inference alone, which is faster on some devices. Noise needs a device
    that takes channels: ``default.mixed``. Returns f(angles (B, n) or (n,), weights (L, n, k)) ->
    list of n tensors (B,), or () of one sample or a circuit without inputs.
    """
    device = qml.device(simulator, wires=n_qubits, **(options or {}))
    how = {"diff_method": diff_method}
    if diff_method and shots:
        # Without its own way out, finite differences: of measured values these are noise.
        how = {"diff_method": "parameter-shift", "gradient_kwargs": {"fallback_fn": None}}
    elif diff_method and simulator.startswith("lightning."):
        # It would compute the Jacobian of all n outputs; a vector-Jacobian product is enough.
        how = {"diff_method": "adjoint", "device_vjp": True}

    @qml.qnode(device, interface="torch", **how)
    def expectations(angles: Tensor, weights: Tensor):
        circuit(angles, weights)
        return [qml.expval(qml.Z(i)) for i in range(n_qubits)]

    expectations = qml.set_shots(expectations, shots=shots)
    if shots or simulator != "default.qubit":
        # One sample after the other: not all devices take a batch, nor do parameter shifts.
        expectations = qml.transforms.broadcast_expand(expectations)
    return expectations


# -------------------------------------------------------------------------------------- gates


def start_at_zero(layer: nn.Module) -> nn.Module:
    """The same layer, with zero weights and bias."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class QuantumGate(nn.Module):
    """The gate with a circuit in its middle: Linear(C, n), <Z_i> of the circuit, Linear(n, C).

    channels: C; circuit: a function as above; n_weights, trained: as in Arm; the others as in
    Settings. With shots the gradient is that of the exact mean (straight-through), on a PennyLane
    device that of measured parameter shifts. A variable that the circuit reads from outside must
    stay as it is: the exact simulation reads it when any gate is built, and for another size, dtype
    or device. Raises UserError for zero shots, too few weights for the circuit, and a circuit that
    the exact simulation cannot do.
    """

    def __init__(
        self,
        channels: int,
        circuit: Callable = quantum_circuit,
        n_qubits: int = 16,
        n_layers: int = 3,
        n_weights: int = 2,
        *,
        trained: bool = True,
        simulator: str = "exact",
        simulator_options: dict | None = None,
        shots: int | None = None,
        gate_noise: tuple[float, float] = (0.0, 0.0),
        readout_noise: float = 0.0,
    ):
        super().__init__()
        if shots is not None and shots < 1:
            raise UserError(f"shots {shots}: expected at least 1, or None for exact means")
        self.shots = shots
        self.circuit = with_noise(circuit, tuple(gate_noise), readout_noise)
        self.project_in = nn.Linear(channels, n_qubits)
        self.project_out = start_at_zero(nn.Linear(n_qubits, channels))
        weights = torch.rand(n_layers, n_qubits, n_weights) * 2 * math.pi  # as PennyLane's layers
        self.weights = nn.Parameter(weights, requires_grad=trained)

        # A circuit that does not fit is an error here, not in the first step.
        self.simulator = simulator
        self.simulator_options = simulator_options or {}
        if simulator == "exact":
            compile_circuit.cache_clear()  # what a circuit uses may have changed since it was read
            compile_circuit(
                self.circuit, n_qubits, n_layers, n_weights, weights.dtype, weights.device
            )
        else:
            operations_of(self.circuit, torch.rand(1, n_qubits), weights)
            self.make_qnodes()

            # Whether the device takes a seed for its measurements.
            self.takes_seed = False
            with contextlib.suppress(Exception):  # whatever a plugin raises
                qml.device(simulator, wires=1, seed=0)
                self.takes_seed = True

    def make_qnodes(self) -> None:
        """The circuit on the gate's device, with the gate's shots, for training and inference."""
        self.qnode = self.new_qnode("best")
        self.inference_qnode = self.new_qnode(None)
        self.shots_of_qnodes = self.shots

    def new_qnode(self, diff_method: str | None, **options: object) -> qml.QNode:
        """The circuit on the gate's PennyLane device, made with further options."""
        n_qubits = self.weights.shape[1]
        options = self.simulator_options | options
        return make_qnode(self.circuit, n_qubits, self.simulator, options, self.shots, diff_method)

    def expectations(self, angles: Tensor, generators: Sequence[torch.Generator] = ()) -> Tensor:
        """<Z_i> in -1..1. angles: (B, n), radians. Returns (B, n)."""
        if self.simulator != "exact":
            return self.device_expectations(angles.cpu(), generators).to(angles)
        weights = self.weights.to(angles.dtype)
        return circuit_expectations(
            angles, weights, self.circuit, shots=self.shots, generators=generators
        )

    def device_expectations(self, angles: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """<Z_i> (B, n) by the PennyLane device. angles: (B, n) on the CPU."""
        weights = self.weights.to(angles)
        diff_method = "best" if torch.is_grad_enabled() else None

        # Measurements are drawn by each sample's own generator, so that they resume with it.
        if self.shots and self.takes_seed and generators:
            rows = []
            for row, generator in zip(angles.split(1), generators, strict=True):
                seed = torch.randint(2**31, (), generator=generator, device=generator.device)
                qnode = self.new_qnode(diff_method, seed=int(seed))
                rows.append(torch.stack(qnode(row, weights)).view(1, -1))
            return torch.cat(rows)

        if self.shots != self.shots_of_qnodes:  # they were changed since
            self.make_qnodes()
        qnode = self.qnode if diff_method else self.inference_qnode
        # Some devices drop the axis of a batch of one; a circuit without inputs has none: (n,).
        return torch.stack(qnode(angles, weights), -1).expand_as(angles)

    def forward(self, features: Tensor, generators: Sequence[torch.Generator] = ()) -> Tensor:
        """features (B, C) -> g (B, C); generators: of the shots, one for each sample."""
        if features.ndim != 2:
            raise UserError(f"features of shape {tuple(features.shape)}: expected (B, C)")
        angles = self.project_in(features)
        single = torch.promote_types(angles.dtype, torch.float32)  # half is too coarse for angles
        values = self.expectations(angles.to(single), generators)
        return self.project_out(values.to(angles.dtype))


class ClassicalGate(nn.Module):
    """A gate without a circuit, as a control: Linear(C, n), a function of each unit, Linear(n, C).

    matched: each unit applies z <- cos(a z + b) once per layer, with weights (a, b) of its own: as
    many as ``quantum_circuit`` has, in the same range -1..1, not mixing the units. Otherwise ReLU:
    squeeze-and-excitation, with 1 + g instead of its sigmoid; n_layers has no effect then.
    """

    def __init__(self, channels: int, n_units: int = 16, n_layers: int = 3, matched: bool = True):
        super().__init__()
        self.project_in = nn.Linear(channels, n_units)
        self.project_out = start_at_zero(nn.Linear(n_units, channels))
        self.weights = None
        if matched:
            weights = torch.rand(n_layers, n_units, 2) * 2 * math.pi
            weights[..., 0] = 1
            self.weights = nn.Parameter(weights)

    def forward(self, features: Tensor, generators: Sequence[torch.Generator] = ()) -> Tensor:
        """features (B, C) -> g (B, C); generators: not used, nothing is measured."""
        z = self.project_in(features)
        if self.weights is None:
            return self.project_out(F.relu(z))
        for layer in self.weights:  # (n, 2)
            z = torch.cos(layer[:, 0] * z + layer[:, 1])
        return self.project_out(z)


def make_gate(channels: int, settings: Settings) -> nn.Module | None:
    """The gate of the settings' arm for so many channels; None: no gate."""
    arm = ARMS[settings.arm]
    sizes = (settings.n_qubits, settings.n_layers)
    if settings.arm == "classical":
        return None
    if settings.arm in ("matched", "se"):
        return ClassicalGate(channels, *sizes, matched=settings.arm == "matched")
    if arm.circuit is None:
        raise UserError(f"--arm {settings.arm}: it has no circuit in ARMS")
    how = {name: getattr(settings, name) for name in CIRCUIT_CONDITIONS}
    how["trained"] = arm.trained
    return QuantumGate(channels, arm.circuit, *sizes, arm.n_weights, **how)


# -------------------------------------------------------------------------------------- U-Net


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (Vaswani et al. 2017). t: (B,). Returns (B, dim), dim even."""
    k = torch.arange(dim // 2, device=t.device)
    phases = t.float()[:, None] * torch.exp(-math.log(10_000) * k / (dim // 2))
    return torch.cat([phases.sin(), phases.cos()], dim=1)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice; the time embedding scales and shifts in between."""

    def __init__(self, channels: int, embedding: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = start_at_zero(nn.Conv2d(channels, channels, 3, padding=1))
        self.modulation = nn.Linear(embedding, 2 * channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, channels, H, W), embedding (B, E) -> (B, channels, H, W)."""
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        return x + self.conv2(F.silu(h * (1 + scale) + shift))


class SelfAttention(nn.Module):
    """Attention with four heads between the positions of a feature map (not the gate)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = start_at_zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, 3 C)
        qkv = qkv.unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, H W, C / heads)
        query, key, value = qkv

        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, heads, H W, C / heads)
        mixed = mixed.transpose(1, 2).flatten(2)  # (B, H W, C)
        mixed = mixed.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)  # (B, C, H, W)
        return x + self.out(mixed)


class UNet(nn.Module):
    """The denoiser: a residual block at each of WIDTHS' levels, down and up again, with skips.

    channels: 1 or 3. gate: a function of the number of channels that makes the gate of the
    coarsest level (None: no gate), for example ``QuantumGate``. seed: of the initial weights, which
    are the same U-Net's for every gate; torch's global generators are left alone. n_classes: of a
    class-conditional model; None: the class is no input.
    """

    def __init__(
        self,
        channels: int,
        gate: Callable[[int], nn.Module | None] = lambda channels: None,
        seed: int = 0,
        n_classes: int | None = None,
    ):
        super().__init__()
        self.channels = channels
        size = 128  # of the embedding of time and class
        steps = list(itertools.pairwise(WIDTHS))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would set a GPU's, too
            self.embed_time = nn.Sequential(nn.Linear(64, size), nn.SiLU(), nn.Linear(size, size))
            self.embed_class = None
            if n_classes is not None:
                self.embed_class = nn.Embedding(n_classes, size)
                nn.init.zeros_(self.embed_class.weight)

            # The encoder: from each level to the next half as many pixels a side.
            self.stem = nn.Conv2d(FOLD**2 * channels, WIDTHS[0], 3, padding=1)
            self.encode = nn.ModuleList(ResBlock(width, size) for width in WIDTHS)
            self.down = nn.ModuleList(nn.Conv2d(fine, wide, 2, stride=2) for fine, wide in steps)

            # The bottleneck's attention; the decoder, which merges what comes up with the skip.
            self.attention = SelfAttention(WIDTHS[-1])
            self.merge = nn.ModuleList(nn.Conv2d(2 * width, width, 1) for width in WIDTHS)
            self.decode = nn.ModuleList(ResBlock(width, size) for width in WIDTHS)
            self.up = nn.ModuleList(
                nn.ConvTranspose2d(wide, fine, 2, stride=2) for fine, wide in steps
            )
            self.norm = nn.GroupNorm(8, WIDTHS[0])
            self.head = start_at_zero(nn.Conv2d(WIDTHS[0], FOLD**2 * channels, 3, padding=1))

            self.gate = gate(WIDTHS[-1])  # last, so that a seed gives the same U-Net to all gates
        self.to(memory_format=torch.channels_last)  # a CPU's convolutions are faster so

    def embed(self, t: Tensor, labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The embedding of timesteps t (B,), with that of the classes added: (B, 128)."""
        embedding = self.embed_time(timestep_embedding(t, 64).to(dtype))
        if self.embed_class is None:
            if labels is not None:
                raise UserError("labels: expected None, as the model is of one class")
            return F.silu(embedding)
        if labels is None:
            raise UserError("labels None: expected (B,), the class of each image")
        return F.silu(embedding + self.embed_class(labels))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        generators: Sequence[torch.Generator] = (),
    ) -> Tensor:
        """Predicts v, shaped like x.

        x: (B, channels, H, W), H and W multiples of 4; t: (B,) int64; labels: (B,) int64, of a
        class-conditional model; generators: of the circuit's shots, one for each sample. Raises
        UserError for a single image without B, and for labels where none belong, or none.
        """
        if x.ndim != 4:
            raise UserError(f"x of shape {tuple(x.shape)}: expected (B, {self.channels}, H, W)")
        embedding = self.embed(t, labels, x.dtype)  # (B, 128)

        # Encoder.
        x = F.pixel_unshuffle(x, FOLD).contiguous(memory_format=torch.channels_last)
        h = self.stem(x)  # (B, WIDTHS[0], H / FOLD, W / FOLD)
        skips = []
        for level, block in enumerate(self.encode):
            if level > 0:
                h = self.down[level - 1](h)
            h = block(h, embedding)
            skips.append(h)

        # Bottleneck: h * (1 + g(mean(h))).
        h = self.attention(h)  # (B, 128, 7, 7)
        if self.gate is not None:
            g = self.gate(h.mean((2, 3)), generators)  # (B, 128)
            h = h * (1 + g)[:, :, None, None]

        # Decoder, from the coarsest level to the finest.
        for level in reversed(range(len(WIDTHS))):
            h = self.merge[level](torch.cat([h, skips[level]], dim=1))
            h = self.decode[level](h, embedding)
            if level > 0:
                h = self.up[level - 1](h)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), FOLD)


def make_unet(channels: int, settings: Settings) -> UNet:
    """The U-Net of a run, with the gate of its arm and the initial weights of its seed."""
    seed = random_stream(settings.seed, settings.classes, "weights").initial_seed()
    n_classes = len(CLASS_NAMES) if settings.conditional else None
    return UNet(channels, partial(make_gate, settings=settings), seed, n_classes)


# -------------------------------------------------------------------------------------- files


def reading(path: Path, what: str) -> contextlib.AbstractContextManager:
    """The door for files: whatever reading one raises becomes a UserError that names it."""
    return explaining(f"{path}: not {what}")


def packed(tensors: dict) -> bytes:
    """The file that torch.save makes of a dict of tensors."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def write_atomic(path: Path, data: bytes | str | dict) -> None:
    """Writes bytes, text or a dict of tensors aside and renames the file: all or none."""
    if isinstance(data, dict):
        data = packed(data)
    aside = path.parent / f".{path.name}.{os.urandom(8).hex()}.part"
    try:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(aside, path)
    except OSError as error:  # names the file that was meant
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        aside.unlink(missing_ok=True)


def load_tensors(path: Path, what: str) -> dict:
    """Reads a file of torch.save onto the CPU, its checksums too. UserError: it is not ``what``."""
    with reading(path, what):
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at the checksums
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)


# --------------------------------------------------------------------------------------- data


DOWNLOAD_TIMEOUT = 30  # seconds without an answer


def download(data_dir: Path, name: str, fetch: Callable[[Path], object]) -> str | None:
    """Makes sure that ``name`` is in data_dir. Returns None, or in one line why it is not.

    fetch: downloads it into another folder, from which it is moved, so that nothing leaves half.
    Raises OSError when data_dir takes no files, which is no reason to use other data.
    """
    path = data_dir / name
    if path.exists():
        return None
    print(f"downloading {name} to {data_dir} ...", file=sys.stderr, flush=True)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=data_dir)
    except OSError as error:  # names the folder that was meant
        found = f"{error.strerror}; {name} would be downloaded there"
        raise OSError(error.errno, found, str(data_dir)) from None

    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with folder as aside:
            fetch(Path(aside))
            path.parent.mkdir(parents=True, exist_ok=True)
            (Path(aside) / name).rename(path)
    except Exception as error:  # of the network, of what it answers, of the disk
        # A library may call anything a failed download, Ctrl-C and a full disk too.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            number = getattr(cause, "errno", None)
            if number in (errno.ENOSPC, errno.EDQUOT):  # no space, or over the user's quota
                raise OSError(number, os.strerror(number), str(data_dir)) from None
            cause = cause.__cause__ or cause.__context__

        if not path.exists():  # it does when another process was faster
            reason = " ".join(str(error).split()) or "no answer"
            reason = reason.replace(folder.name, str(data_dir))  # it may say where to put a copy
            return f"no {path}, download failed: {reason}"
    finally:
        socket.setdefaulttimeout(timeout_before)
    return None


def load_images(data: str, data_dir: Path, split: str = "train") -> tuple[str, Tensor, Tensor]:
    """Reads one split, ``train`` or ``test``: (source, images (N, 1, 28, 28) uint8, labels (N,)).

    data: ``mnist`` (downloaded when data_dir holds no ``MNIST/raw``), ``digits`` (scikit-learn's
    1,797 embedded 8x8 digits, enlarged; every fifth is the test split), or ``auto``: the first, and
    without a network the second; the returned source says which. Raises UserError: MNIST was asked
    for and cannot be had, or its files are damaged.
    """
    if data != "digits":
        raw = Path(data_dir) / "MNIST" / "raw"
        fetch = partial(torchvision.datasets.MNIST, download=True)
        failure = download(Path(data_dir), "MNIST/raw", fetch)
        if failure is None:
            return ("mnist", *read_mnist(raw, split))
        if data == "mnist":
            raise UserError(f"{failure}; copy its four files to {raw}, or use --data digits")
        print(f"NOTICE: {failure}. Using EMBEDDED DATA, as all names say.", file=sys.stderr)

    # The embedded digits, enlarged.
    bunch = load_digits()
    small = torch.from_numpy(bunch.images)[:, None] / 16  # (1797, 1, 8, 8), published range 0..16
    large = F.interpolate(small, size=IMAGE_SIZE, mode="bicubic", align_corners=False)
    images = (large.clamp(0, 1) * 255).round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target).long()

    # Every fifth is held out.
    chosen = (torch.arange(len(images)) % 5 == 4) == (split == "test")
    return "digits", images[chosen], labels[chosen]


def read_mnist(raw: Path, split: str) -> tuple[Tensor, Tensor]:
    """The images (N, 1, 28, 28) uint8 and labels (N,) of a folder with MNIST's four files.

    Files as they are published, packed by gzip, are unpacked first. Raises UserError for anything
    else than MNIST.
    """
    with reading(raw, "MNIST's four files; move them away to download them again"):
        unpack(raw)
        dataset = torchvision.datasets.MNIST(raw.parent.parent, train=split == "train")
        images = dataset.data[:, None]
        labels = dataset.targets.long()

        # Is this MNIST, and whole?
        if images.shape != (len(labels), 1, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"images of {tuple(images.shape)}, {len(labels)} labels")
        if images.dtype != torch.uint8 or not set(labels.tolist()) <= set(range(10)):
            raise ValueError(f"{images.dtype}, labels {labels.unique().tolist()}, expected 0 to 9")
        blank = int((images.flatten(1).amax(1) == 0).sum())
        if blank:
            raise ValueError(f"{blank} of {len(images)} {split}ing images are black: damaged")
    return images, labels


def unpack(raw: Path) -> None:
    """Unpacks MNIST's files as they are published, by gzip, where they are not unpacked yet."""
    for packed in raw.glob("*-ubyte.gz"):
        unpacked = packed.with_suffix("")
        if unpacked.exists():
            continue
        contents = gzip.decompress(packed.read_bytes())
        try:
            write_atomic(unpacked, contents)
        except OSError as error:
            mend = "unpack it by gunzip into a folder of your own, and name that by --data_dir"
            found = f"{packed} cannot be unpacked there ({one_line(error)})"
            raise UserError(f"{found}; {mend}") from error


def select_images(images: Tensor, labels: Tensor, label: int, n: int | None, seed: int) -> Tensor:
    """The training images of one class: ``n`` of them (None: all), drawn by the seed.

    Subsets are nested: 25 are the first of 100. Raises UserError when the class has fewer.
    """
    of_class = images[labels == label]
    if len(of_class) == 0:
        raise UserError(f"class {CLASS_NAMES[label]} has no images in this data set")
    if n is not None and n > len(of_class):
        found = f"class {CLASS_NAMES[label]} has {len(of_class)} training images"
        raise UserError(f"--n_train {n}: {found}, expected at most as many")
    order = torch.randperm(len(of_class), generator=random_stream(seed, label, "subset"))
    return of_class[order[:n]]


class DataSet(NamedTuple):
    """What runs are trained on."""

    source: str  # which was in fact loaded, for example "mnist" or "digits"
    images: Tensor  # (N, C, 28, 28) uint8
    labels: Tensor  # (N,)
    total: int  # images of all classes
    augment: Callable[[Tensor], Sequence] | None  # eight of each image (the PathMNIST script)

    def chosen_images(self, settings: Settings) -> tuple[Tensor, Tensor]:
        """The images of a run, n_train of each class, drawn by its seed, and their labels (n,)."""
        parts = [
            select_images(self.images, self.labels, label, settings.n_train, settings.seed)
            for label in settings.classes
        ]
        counts = torch.tensor([len(part) for part in parts])
        labels = torch.tensor(settings.classes).repeat_interleave(counts)
        return torch.cat(parts), labels

    def training_images(self, settings: Settings, device: torch.device) -> tuple[Sequence, Tensor]:
        """What a run is trained on: these, or eight of each."""
        images, labels = self.chosen_images(settings)
        images, labels = images.to(device), labels.to(device)
        if not self.augment:
            return images, labels
        augmented = self.augment(images)  # image k % n in its symmetry k // n
        return augmented, labels.repeat(len(augmented) // len(labels))


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1, the value range of the diffusion."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float -1..1 -> uint8 0..255, rounded to the nearest; values outside are clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------ training


def orthogonalize(matrix: Tensor) -> Tensor:
    """Brings most singular values of a matrix (m, n) near 1, by Newton-Schulz (Jordan et al. 2024).

    Three steps X <- p(X X^T) X with p(G) = a + b G + c G^2; Jordan's five had no clear gain. With X
    a step changes G = X X^T, into p(G) G p(G). So the steps are done on G, which is smaller than X;
    their p(G) are collected in ``product``, by which X is multiplied once, at the end.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's

    # Wide, so that X X^T is the smaller of the two products; scaled to singular values up to 1.
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix  # (k, l), k <= l
    x = x / (x.norm() + 1e-7)

    # Three steps on G. All p(G) commute, so their order does not matter.
    identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    product = identity  # of all p(G) so far
    gram = x @ x.mT  # (k, k)
    for _ in range(3):
        polynomial = a * identity + b * gram + c * (gram @ gram)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    x = product @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for convolutions: Nesterov momentum, orthogonalised."""

    def __init__(self, weights: Sequence[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients of the weights."""
        for group in self.param_groups:
            for weight in group["params"]:
                # Nesterov momentum: a moving average of the gradients, and a step beyond it.
                if "average" not in self.state[weight]:
                    self.state[weight]["average"] = torch.zeros_like(weight)
                average = self.state[weight]["average"]
                average.lerp_(weight.grad, 1 - group["momentum"])
                nesterov = weight.grad.lerp(average, group["momentum"])

                # A step of orthogonal directions, larger for a matrix with more rows than columns.
                matrix = nesterov.flatten(1)  # output channels (going up: input) by all other axes
                scale = max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
                update = orthogonalize(matrix).view(weight.shape)
                weight.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model: UNet, settings: Settings) -> tuple[torch.optim.Optimizer, Muon]:
    """Muon for the convolutions but the first and the last, and Adam for all other weights."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    outer = ("stem.weight", "head.weight")
    hidden = [name for name, p in weights.items() if p.ndim == 4 and name not in outer]
    rest = [p for name, p in weights.items() if name not in hidden]
    adam = torch.optim.Adam(rest, settings.lr, betas=(0.9, 0.99), fused=True)
    return adam, Muon([weights[name] for name in hidden], settings.muon_lr)


def learning_rate_factor(step: int, steps: int) -> float:
    """The share of the given rate: the smaller of a warm-up and a straight line from 1 to 0.

    The warm-up takes 100 steps, or a tenth of a run shorter than 1,000.
    """
    warm_up = min(100, max(1, steps // 10))
    return min((step + 1) / warm_up, 1 - step / steps)


def warmed_up_decay(step: int, decay: float) -> float:
    """The decay of the weights' moving average: it grows, to forget the initial weights soon."""
    return min(decay, (1 + step) / (10 + step))


def training_order(settings: Settings, n: int) -> Tensor:
    """Which of ``n`` images are in which batch: (steps, batch_size) int64.

    One shuffle of the training set after another, cut into batches.
    """
    count = settings.steps * settings.batch_size
    epochs = range(math.ceil(count / n))
    run = (settings.seed, settings.classes)
    streams = (random_stream(*run, "shuffle", epoch) for epoch in epochs)
    order = torch.cat([torch.randperm(n, generator=stream) for stream in streams])
    return order[:count].view(settings.steps, settings.batch_size)


def training_noise(settings: Settings, x0: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """One step's timesteps t (B,) int64 and noise like x0 (B, C, H, W).

    The timesteps are stratified, one in each of B equal parts of 0 .. T-1, for a lower variance.
    """
    size, device = len(x0), x0.device
    generator = random_stream(settings.seed, settings.classes, "noise", step, device=device)
    uniform = torch.rand(size, generator=generator, device=device)
    t = (torch.arange(size, device=device) + uniform) * (settings.timesteps / size)
    t = t.long().clamp(max=settings.timesteps - 1)
    return t, torch.randn(x0.shape, generator=generator, device=device)


def shot_generators(
    settings: Settings, names: Sequence[tuple], device: torch.device
) -> list[torch.Generator]:
    """A generator by name for the measurements of each sample; none where nothing is measured."""
    if settings.shots is None:
        return []
    return [random_stream(settings.seed, *name, device=device) for name in names]


def train(
    settings: Settings, images: Sequence, folder: Path, run_id: str, labels: Tensor | None = None
) -> UNet:
    """Trains one model, from its checkpoint in the run folder if there is one.

    images: (n, C, 28, 28) uint8 on the device: a tensor, or what is indexed like one. run_id: the
    ``run_hash`` of its configuration, so that no other run resumes its checkpoint. labels: (n,), of
    a class-conditional model. Writes previews, ``loss.csv`` and checkpoints, and returns the model
    with averaged weights. Raises UserError when it diverges.
    """
    device = images.device
    channels = images.shape[1]
    diffusion = GaussianDiffusion(settings.timesteps, device)
    model = make_unet(channels, settings).to(device)
    average = make_unet(channels, settings).to(device)  # of the model's weights
    adam, muon = make_optimizers(model, settings)
    order = training_order(settings, len(images)).to(device)
    losses = torch.zeros(settings.steps, device=device)

    # A killed run goes on where its checkpoint was written.
    state = {"model": model, "average": average, "adam": adam, "muon": muon}
    first = load_checkpoint(folder / "checkpoint.pt", run_id, state, losses)
    previews = preview_steps(settings)

    bar = tqdm(range(first, settings.steps), settings.name, settings.steps, initial=first)
    for step in bar:
        # The batch, noised.
        x0 = to_float(images[order[step]])  # (B, C, 28, 28)
        t, noise = training_noise(settings, x0, step)
        x_t, v = diffusion.q_sample(x0, t, noise)
        classes = labels[order[step]] if settings.conditional else None  # (B,)

        # The loss, and one step of both optimizers.
        names = [(settings.classes, "circuit", step, k) for k in range(len(x0))]
        generators = shot_generators(settings, names, device)
        loss = F.mse_loss(model(x_t, t, classes, generators), v)
        model.zero_grad()
        loss.backward()
        factor = learning_rate_factor(step, settings.steps)
        adam.param_groups[0]["lr"] = factor * settings.lr
        muon.param_groups[0]["lr"] = factor * settings.muon_lr
        adam.step()
        muon.step()

        # The moving average.
        decay = warmed_up_decay(step, settings.ema_decay)
        with torch.no_grad():
            for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(new, 1 - decay)
        losses[step] = loss.detach()

        # Preview and checkpoint.
        done = step + 1
        if done in previews or done % CHECKPOINT_STEPS == 0:  # the last step is in previews
            check_finite(settings, model, losses[:done])
            if done in previews:
                save_preview(folder, settings, average, done)
            save_checkpoint(folder, run_id, state, losses[:done])
            bar.set_postfix(loss=f"{losses[step].item():.4f}")
    return average


def check_finite(settings: Settings, model: UNet, losses: Tensor) -> None:
    """Raises UserError when a loss (steps,) or a weight is not finite."""
    finite = losses.isfinite().cpu()
    if not all(p.isfinite().all() for p in model.parameters()):
        finite[-1] = False
    if not finite.all():
        step = int(finite.int().argmin()) + 1
        found = f"{settings.name}: the loss or a weight is not finite at step {step}"
        raise UserError(f"{found}; try a lower --lr or --muon_lr")


def save_checkpoint(folder: Path, run_id: str, state: dict, losses: Tensor) -> None:
    """Writes ``loss.csv``, and ``checkpoint.pt``: what ``load_checkpoint`` reads."""
    losses = losses.cpu()
    rows = [f"{step},{loss!r}\n" for step, loss in enumerate(losses.tolist(), 1)]
    write_atomic(folder / "loss.csv", "step,loss\n" + "".join(rows))
    contents = {name: part.state_dict() for name, part in state.items()}
    contents |= {"run": run_id, "step": len(losses), "losses": losses}
    write_atomic(folder / "checkpoint.pt", contents)


def load_checkpoint(path: Path, run_id: str, state: dict, losses: Tensor) -> int:
    """Restores the parts of ``state`` and the losses. Returns the number of steps done; 0: no file.

    Raises UserError when the file is damaged or another run's.
    """
    if not path.exists():
        return 0
    contents = load_tensors(path, "a checkpoint; remove it to train from the start")
    if not isinstance(contents, dict) or contents.get("run") != run_id:
        raise UserError(f"{path}: of a run with other settings; remove it to train from the start")
    with reading(path, "a checkpoint of this version; remove it to train from the start"):
        for name, part in state.items():
            part.load_state_dict(contents[name])
        losses[: contents["step"]] = contents["losses"]
    return contents["step"]


# --------------------------------------------------------------------------- sampling of images


def sample_images(
    settings: Settings,
    model: UNet,
    series: str,
    numbers: range,
    steps: int,
    bar: tqdm | None = None,
) -> Tensor:
    """Draws the images ``numbers`` of each class, one class after the other.

    Returns (classes * len(numbers), C, 28, 28) uint8 on the CPU. Image k of a class in a series,
    ``preview`` or ``image``, has random streams of its own and, but for rounding, does not depend
    on those it is drawn with. bar: shows every network evaluation. Raises UserError when an image
    is not a number.
    """
    device = next(model.parameters()).device
    diffusion = GaussianDiffusion(settings.timesteps, device)
    shape = (model.channels, IMAGE_SIZE, IMAGE_SIZE)

    # The class of each image, and its streams.
    pairs = [(label, k) for label in settings.classes for k in numbers]
    labels = None
    if settings.conditional:
        labels = torch.tensor([label for label, _ in pairs], device=device)
    names = [(label, series, k) for label, k in pairs]
    streams = [random_stream(settings.seed, *name, device=device) for name in names]
    generators = shot_generators(settings, [(*name, "shots") for name in names], device)

    def draw_noise(_: Tensor | None = None) -> Tensor:
        """Noise of every image's own stream, (B, C, 28, 28); the sampler's image is not needed."""
        return torch.stack([torch.randn(shape, generator=s, device=device) for s in streams])

    def predict_v(x: Tensor, t: Tensor) -> Tensor:
        """The network's prediction, and progress."""
        if bar is not None:
            bar.update()
        return model(x, t, labels, generators)

    images = diffusion.sample(predict_v, draw_noise(), min(steps, settings.timesteps), draw_noise)
    if images.isnan().any():
        raise UserError(f"{settings.name}: its images are not numbers; try a lower --lr, --muon_lr")
    return to_uint8(images).cpu()


def preview_steps(settings: Settings) -> list[int]:
    """After how many training steps there is a preview, in rising order, without repetition."""
    n = settings.n_frames
    return sorted({math.ceil(settings.steps * k / n) for k in range(1, n + 1)})


def save_preview(folder: Path, settings: Settings, model: UNet, step: int) -> None:
    """Writes a few images of a model in training, always from the same noise."""
    steps = min(PREVIEW_STEPS, settings.sample_steps)
    numbers = range(settings.n_samples)
    images = sample_images(settings, model, "preview", numbers, steps)
    path = folder / "samples" / f"step_{step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    columns = settings.n_samples if settings.conditional else None  # a row for each class
    save_grid(path, images, columns)


def sample_final(settings: Settings, model: UNet, folder: Path, n_eval: int, run_id: str) -> None:
    """Brings ``samples_final.png`` to ``n_eval`` images a class; those already there are kept.

    Raises UserError when the file is damaged or another run's.
    """
    path = folder / "samples_final.png"
    n_classes = len(settings.classes)
    images = torch.empty(0, model.channels, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    if path.exists():
        images = load_grid(path)
        if grid_description(path).get("run") != run_id:
            raise UserError(f"{path}: of a run with other settings; remove it to draw it again")

    images = images.unflatten(0, (n_classes, -1))  # (classes, n, C, 28, 28)

    # How many of each class at once. A GPU takes hardly longer for more images.
    size = 64 if next(model.parameters()).device.type == "cpu" else 512
    most = math.ceil(size / n_classes)
    fewest = math.ceil(16 / n_classes)  # fewer than 16 images would round differently on a CPU

    chunks = range(images.shape[1], n_eval, most)
    steps = min(settings.sample_steps, settings.timesteps)
    evaluations = len(GaussianDiffusion(settings.timesteps).sampling_levels(steps))
    with tqdm(total=len(chunks) * evaluations, desc="sampling", disable=not chunks) as bar:
        for first in chunks:
            # Draw at least the fewest and keep n.
            n = min(most, n_eval - first)
            numbers = range(first, first + max(n, fewest))
            new = sample_images(settings, model, "image", numbers, steps, bar)
            new = new.unflatten(0, (n_classes, -1))[:, :n]
            images = torch.cat([images, new], dim=1)
            columns = images.shape[1] if settings.conditional else None  # a row for each class
            save_grid(path, images.flatten(0, 1), columns, run_id)
    if read_config(folder / "config.json")["n_eval"] != images.shape[1]:
        update_config(folder, n_eval=images.shape[1])


# ------------------------------------------------------------------------------------ pictures

TILE_PADDING = 2  # white pixels between the tiles of a picture, before enlargement


def tile(images: Tensor, columns: int, scale: int = 1) -> np.ndarray:
    """Images (N, C, H, W) uint8 as one picture (height, width, C), row by row.

    On a white ground, TILE_PADDING pixels apart, and then enlarged ``scale`` times.
    """
    # A white rim around every tile and around the whole.
    half = [TILE_PADDING // 2] * 4
    tiles = F.pad(images.cpu(), half, value=255)
    picture = torchvision.utils.make_grid(tiles, nrow=columns, padding=0, pad_value=255)
    picture = F.pad(picture, half, value=255)
    picture = picture[: images.shape[1]].permute(1, 2, 0)  # make_grid makes three channels of one
    return picture.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy()


def split_tiles(picture: np.ndarray, grid: dict) -> Tensor:
    """The images (N, C, H, W) uint8 of a picture (height, width) or (height, width, C).

    grid: the description that ``save_grid`` wrote.
    """
    scale, padding, columns = grid["scale"], grid["padding"], grid["columns"]
    rows = math.ceil(grid["count"] / columns)
    height = grid["tile_height"] + padding
    width = grid["tile_width"] + padding

    # Back to single pixels, without the outer rim.
    half = padding // 2
    canvas = torch.from_numpy(picture[::scale, ::scale].copy())
    canvas = canvas.view(*canvas.shape[:2], -1)[half : half + rows * height]
    canvas = canvas[:, half : half + columns * width]

    # (rows, height, columns, width, C) to (rows columns, C, height, width).
    tiles = canvas.view(rows, height, columns, width, -1).permute(0, 2, 4, 1, 3).flatten(0, 1)
    return tiles[: grid["count"], :, half:-half, half:-half].contiguous()


def save_grid(path: Path, images: Tensor, columns: int | None = None, run: str = "") -> None:
    """Saves images (N, C, H, W) uint8 as one lossless PNG, with a description to split it by.

    The description is JSON in the text chunk ``grid``. columns: by default nearly a square, but at
    least five. run: the ``run_hash`` of the run that the images belong to.
    """
    n, channels, height, width = images.shape
    if columns is None:
        columns = min(n, max(5, math.ceil(math.sqrt(n))))
    description = {
        "count": n,
        "columns": columns,
        "tile_height": height,
        "tile_width": width,
        "padding": TILE_PADDING,
        "scale": max(1, min(4, 640 // (columns * (width + TILE_PADDING)))),  # to 640 pixels
        "channels": channels,
        "value_range": [-1.0, 1.0],
        "run": run,
    }
    text = PngImagePlugin.PngInfo()
    text.add_text("grid", json.dumps(description))
    picture = tile(images, columns, description["scale"])
    buffer = io.BytesIO()
    Image.fromarray(picture.squeeze()).save(buffer, "png", pnginfo=text)
    write_atomic(path, buffer.getvalue())


def grid_description(path: Path) -> dict:
    """The description in a grid of ``save_grid``. Raises UserError when there is none."""
    with reading(path, "a sample grid of this project"), Image.open(path) as picture:
        return json.loads(picture.text["grid"])


def load_grid(path: Path) -> Tensor:
    """The images (N, C, H, W) uint8 of ``save_grid``, to the bit. Raises UserError when damaged."""
    grid = grid_description(path)
    with reading(path, "a sample grid of this project"), Image.open(path) as picture:
        pixels = np.array(picture)
        images = split_tiles(pixels, grid)

        # A flipped bit may change pixels: then the enlarged tiles or the white between do not fit.
        again = tile(images, grid["columns"], grid["scale"]).squeeze()
        if images.shape[1] != grid["channels"] or not np.array_equal(again, pixels):
            raise ValueError("its pixels are not the tiles that its description tells of")
    return images


def save_gif(path: Path, frames: Sequence[tuple[str, Tensor]], names: Sequence[str] = ()) -> None:
    """Saves (caption, images (N, C, H, W) uint8) frames as a GIF, in one row of ten at most.

    names: of the classes of a conditional model, each of which then has a row, behind its name.
    """
    scale = 2 if names else 3  # of the pixels
    size = 5 * scale  # of the letters
    font = ImageFont.load_default(size)
    width = 8 + max(math.ceil(font.getlength(caption)) for caption, _ in frames)
    pictures = []
    for caption, images in frames:
        # A row of images for each class.
        images = images.unflatten(0, (max(1, len(names)), -1))[:, :10]  # (classes, n, C, H, W)
        rows = tile(images.flatten(0, 1), images.shape[1], scale).squeeze()

        # White above them for the caption, and to the left for the names.
        left = max((5 + math.ceil(font.getlength(name)) for name in names), default=0)
        top = 7 * scale
        right = max(0, width - left - rows.shape[1])  # for a caption that is wider
        rim = (left, top, right, 0)
        picture = ImageOps.expand(Image.fromarray(rows).convert("RGB"), rim, "white")
        draw = ImageDraw.Draw(picture)
        draw.text((4, scale), caption, fill="black", font=font)
        for row, name in enumerate(names):
            y = top + (row + 0.5) * len(rows) / len(names)
            draw.text((left - 4, y), name, fill="black", font=font, anchor="rm")
        pictures.append(picture.quantize(64))

    # The last frame stays for two seconds.
    durations = [200] * (len(pictures) - 1) + [2000]  # milliseconds
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "gif", save_all=True, append_images=pictures[1:], duration=durations, loop=0
    )
    write_atomic(path, buffer.getvalue())


def render(figure: Figure) -> bytes:
    """A matplotlib figure as a PNG of 200 dpi, or fewer where that makes over 4,000 pixels."""
    dpi = min(200, 4000 / max(figure.get_size_inches()))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
    return buffer.getvalue()


def draw_loss_curve(losses: Tensor, title: str) -> Figure:
    """The loss of every step (steps,), and its mean over a hundredth of the run."""
    # The moving mean, drawn at the middle of its window.
    window = max(1, len(losses) // 100)
    smooth = F.avg_pool1d(losses[None], window, 1)[0]
    centres = torch.arange(len(smooth)) + (window + 1) / 2

    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    axes.semilogy(torch.arange(len(losses)) + 1, losses, "#bbbbbb", lw=0.5, label="each step")
    axes.semilogy(centres, smooth, "#0072b2", lw=1.2, label=f"mean of {window}")
    axes.set(xlabel="optimizer step", ylabel="mean squared error of v", title=title)
    axes.legend(frameon=False)
    return figure


@cache
def draw_circuit(circuit: Callable, n_qubits: int, n_layers: int, n_weights: int) -> bytes:
    """A circuit drawn by PennyLane as a PNG; of a very large one the first qubits and layers."""
    n, layers = min(n_qubits, 32), min(n_layers, 4)
    operations = [operation for operation, _ in record(circuit, n, layers, n_weights)]
    tape = qml.tape.QuantumScript(operations, [qml.expval(qml.Z(i)) for i in range(n)])
    figure, axes = qml.drawer.tape_mpl(tape)
    axes.set_title(f"{n} of {n_qubits} qubits, {layers} of {n_layers} layers")
    pyplot.close(figure)
    return render(figure)


@contextlib.contextmanager
def decoration(path: Path) -> Iterator[None]:
    """A picture that cannot be made costs a line, not the run.

    The user's matplotlibrc is not read, so that pictures look the same everywhere.
    """
    try:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            yield
    except Exception as error:
        print(f"NOTICE: no {path} ({one_line(error)})", file=sys.stderr)


def draw_pictures(settings: Settings, folder: Path) -> None:
    """Draws what is missing of the pictures of a finished training: losses, previews, circuit."""
    path = folder / "loss_curve.png"
    if not path.exists():
        with decoration(path):
            rows = (folder / "loss.csv").read_text().splitlines()[1:]
            losses = torch.tensor([float(row.split(",")[1]) for row in rows])
            write_atomic(path, render(draw_loss_curve(losses, settings.name)))

    path = folder / "training_progress.gif"
    if not path.exists():
        with decoration(path):
            frames = []
            previews = {
                int(preview.stem.removeprefix("step_")): preview
                for preview in folder.glob("samples/step_*.png")
            }
            for step, preview in sorted(previews.items()):
                frames.append((f"step {step}  {settings.name}", load_grid(preview)))
            names = [CLASS_NAMES[label] for label in settings.classes]
            save_gif(path, frames, names if settings.conditional else ())

    path = folder / "circuit.png"
    arm = ARMS[settings.arm]
    if arm.circuit is not None and not path.exists():
        with decoration(path):
            sizes = (settings.n_qubits, settings.n_layers, arm.n_weights)
            write_atomic(path, draw_circuit(arm.circuit, *sizes))


# ---------------------------------------------------------------------------------- run folder
#
#     config.json                      what made the run (``run_config``); of what it has made, the
#                                      model's checksum and the number of images; "went_on": other
#                                      machines and versions on which it was continued
#     samples/, loss.csv               previews, losses
#     checkpoint.pt                    the state of the training every CHECKPOINT_STEPS
#     model.pt, samples_final.png      the averaged weights; the images for the metrics
#     loss_curve.png, circuit.png, training_progress.gif      ``draw_pictures``
#     metrics.json, closest_pairs.png  the evaluation's (cal_fid_ssim.py)


def run_config(settings: Settings, data: DataSet, device: torch.device) -> dict:
    """What made a run, for ``config.json``."""
    # The images, before any are turned or mirrored.
    images, _ = data.chosen_images(settings)
    counts = {
        "total": data.total,
        "available": sum(int((data.labels == label).sum()) for label in settings.classes),
        "used": len(images),
    }
    if data.augment:
        counts["symmetries"] = 8

    # How many parameters there are.
    model = make_unet(images.shape[1], settings)
    parameters = {
        "model": list(model.parameters()),
        "gate": list(model.gate.parameters()) if model.gate is not None else [],
        "trainable": [p for p in model.parameters() if p.requires_grad],
    }
    counted = {name: sum(p.numel() for p in part) for name, part in parameters.items()}

    versions = {module.__name__: module.__version__ for module in (torch, qml, np)}
    config = {
        "condition": settings.condition,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": asdict(settings) | {"class_names": [CLASS_NAMES[k] for k in settings.classes]},
        "images": {
            "split": "train",
            **counts,
            "sha256": hashlib.sha256(images.contiguous().numpy()).hexdigest(),
        },
        "weights": {"weights_sha256": None},  # of another run's model (--weights)
        "circuit": {
            "operations": circuit_text(settings),
            "trained": ARMS[settings.arm].trained,
            "n_weights": ARMS[settings.arm].n_weights,
        },
        "model_sha256": None,  # of model.pt, once trained
        "n_eval": 0,  # images in samples_final.png, once they are all there
        "parameters": counted,
        "versions": {"python": sys.version.split()[0]} | versions,
        "git": git_commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }
    return json.loads(json.dumps(config))  # as it will be read


def circuit_text(settings: Settings) -> str | None:
    """The operations of the run's circuit, for example ``RY(x0) 0; CNOT 0 1``; None: no circuit.

    On a PennyLane device a parameter may be computed, or an operation be there for some weights
    alone. So the circuit is read with three sets of numbers, and texts that differ are joined by
    `` | ``. Not every branch is seen.
    """
    arm = ARMS[settings.arm]
    if arm.circuit is None:
        return None
    sizes = (settings.n_qubits, settings.n_layers, arm.n_weights)
    texts = []
    for size in (USUAL_SIZE, *EXTREME_SIZES):
        with contextlib.suppress(UserError) if texts else contextlib.nullcontext():
            recorded = record(arm.circuit, *sizes, size)
            texts.append("; ".join(str(one).replace("; ", ", ") for one in recorded))
    return " | ".join(dict.fromkeys(texts))


def git_commit() -> str:
    """The last commit of this script, ``-dirty`` when it was changed since; empty: not known."""
    script = Path(__file__)
    answers = []
    for question in (("log", "-1", "--format=%H"), ("status", "--porcelain")):
        command = ["git", *question, "--", script.name]
        try:
            done = subprocess.run(
                command, cwd=script.parent, capture_output=True, text=True, timeout=5
            )
        except (OSError, subprocess.SubprocessError):  # no git, or one that hangs
            return ""
        if done.returncode != 0:  # no repository
            return ""
        answers.append(done.stdout.strip())
    commit, changes = answers
    return f"{commit}-dirty" if commit and changes else commit


def device_name(device: torch.device) -> str:
    """The device, its model, and the CPU's instruction set."""
    hardware = "unknown"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        with contextlib.suppress(OSError):  # Linux tells the model
            rows = Path("/proc/cpuinfo").read_text().splitlines()
            models = [row.split(":")[1].strip() for row in rows if row.startswith("model name")]
            hardware = models[0] if models else hardware
    return f"{device}, {hardware}, {torch.backends.cpu.get_cpu_capability()}"


# What a run folder has beside its results: what shows them, and what the evaluation says of them.
PICTURES = ("loss_curve.png", "training_progress.gif", "circuit.png")
EVALUATION = ("metrics.json", "metrics_paper.json", "closest_pairs.png")

# The parts of config.json that, if they differ, make it another run.
IDENTITY_PARTS = ("settings", "images", "weights", "circuit")


def run_hash(config: dict) -> str:
    """A hash of what makes a run, kept in its checkpoint and its final images."""
    identity = {part: config[part] for part in IDENTITY_PARTS}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def read_config(path: Path) -> dict:
    """A run's ``config.json``. Raises UserError when it is none, or an older version's."""
    with reading(path, "a run's configuration of this version"):
        config = json.loads(path.read_text())
        if not all(isinstance(config.get(part, {}), dict) for part in IDENTITY_PARTS):
            raise ValueError(f"expected entries in {', '.join(IDENTITY_PARTS)}")
        missing = {*IDENTITY_PARTS, "model_sha256", "n_eval"} - config.keys()
        if missing or "classes" not in config["settings"]:
            raise ValueError(f"no {', '.join(sorted(missing)) or 'settings.classes'}")
        went_on = config.get("went_on", [])
        is_list = isinstance(went_on, list) and all(isinstance(one, dict) for one in went_on)
        is_text = isinstance(config["circuit"].get("operations"), str | None)
        if not isinstance(config["n_eval"], int) or not is_list or not is_text:
            raise ValueError("n_eval, went_on or operations is of another kind")
        return config


def update_config(folder: Path, **changes: object) -> None:
    """Changes entries of a run's ``config.json``."""
    path = folder / "config.json"
    write_atomic(path, json.dumps(read_config(path) | changes, indent=2))


def differences(known: dict, asked: dict, skip: Sequence[str] = ()) -> str:
    """In what two configurations differ, for an error; empty: in nothing that makes a run."""
    found = []
    for part in IDENTITY_PARTS:
        for key in known[part] | asked[part]:
            before, now = known[part].get(key), asked[part].get(key)
            if key in skip or before == now:
                continue
            if key == "operations" and before and now:  # the first that is another
                pairs = itertools.zip_longest(before.split("; "), now.split("; "))
                before, now = next((a, b) for a, b in pairs if a != b)
            found.append(f"{key} {before!r} (asked for: {now!r})")
    return ", ".join(found)


def check_folder(folder: Path, config: dict) -> None:
    """Raises UserError for a folder with another run's results, or with files but no config.json.

    A folder whose run had no results yet may be taken over: see ``open_run``.
    """
    path = folder / "config.json"
    results = ("checkpoint.pt", "model.pt", "samples_final.png")
    has_begun = any((folder / name).exists() for name in results)
    if not path.exists():
        if folder.exists() and any(name[0] != "." for name in os.listdir(folder)):
            raise UserError(f"{folder} has no config.json: not a run; use another --save_dir")
    elif has_begun and (difference := differences(read_config(path), config)):
        raise UserError(f"{folder} is another run: {difference}; use another --save_dir")


@contextlib.contextmanager
def open_run(folder: Path, config: dict) -> Iterator[None]:
    """Makes the run folder this run's, and keeps other processes out of it.

    Raises UserError when another process works in it, or when it is another run's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(folder / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{folder} is in use by another process") from None
    except PermissionError as error:
        raise UserError(f"{folder} is another user's, or read only ({error.strerror})") from None
    except (OSError, NotImplementedError) as error:  # a disk without locks
        with contextlib.suppress(OSError):
            folder.rmdir()
        found = f"{folder}: no file can be locked there ({error})"
        raise UserError(f"{found}; use a --save_dir on another disk") from None
    with lock:
        # No config.json and no files: a new run. The same configuration: it goes on. Another one:
        # an error where there are results; else the folder is taken over, what is in it goes.
        check_folder(folder, config)
        path = folder / "config.json"
        if not path.exists() or differences(read_config(path), config):
            stale = [folder / name for name in ("loss.csv", *PICTURES, *EVALUATION)]
            for file in [*folder.glob("samples/step_*.png"), *stale]:
                file.unlink(missing_ok=True)
            write_atomic(path, json.dumps(config, indent=2))

        # What a process left that was killed while it wrote.
        for unfinished in [*folder.glob(".*.part"), *folder.glob("samples/.*.part")]:
            unfinished.unlink()
        yield


def note_machine(folder: Path, recorded: dict, config: dict) -> None:
    """Keeps in ``config.json`` that a run goes on elsewhere than it began or went on last."""
    now = {name: config[name] for name in ("versions", "git", "device", "threads")}
    known = [recorded, *recorded.get("went_on", [])][-1]
    changed = [name for name in now if known.get(name) != now[name]]
    if not changed:
        return
    if not any((folder / name).exists() for name in ("checkpoint.pt", "model.pt")):
        update_config(folder, **now)  # nothing has been made yet
        return
    update_config(folder, went_on=[*recorded.get("went_on", []), now])
    made = ", ".join(f"{name} {known.get(name)!r}" for name in changed)
    print(f"NOTICE: made with {made} so far: it goes on otherwise, perhaps not to the same bits")


def find_weights(folder: Path, settings: Settings, config: dict) -> dict:
    """Entries of ``config.json`` for a run that samples another run's model (--weights).

    In ``folder`` it looks for the run folder that this run would have under ideal conditions, with
    the usual number of sampling steps, then with this run's. Returns the checksum of its model.pt
    ("weights") and its path ("weights_from"). Raises UserError: there is none, or it was trained
    otherwise.
    """
    trained = [
        replace(settings, **IDEAL, sample_steps=steps).name
        for steps in (SAMPLE_STEPS, settings.sample_steps)
    ]
    paths = [folder / name / "model.pt" for name in trained]
    path = next((path for path in paths if path.is_file()), paths[0])
    if not path.is_file():
        raise UserError(f"--weights {folder}: no {path}; train it, or name its folder's parent")

    # The conditions and the previews may differ; weights_sha256 is only known below.
    source = read_config(path.with_name("config.json"))
    skip = (*IDEAL, "sample_steps", "n_frames", "n_samples", "weights_sha256")
    if difference := differences(source, config, skip):
        raise UserError(f"--weights {folder}: {path} was trained with {difference}")

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if source["model_sha256"] is None:
        raise UserError(f"{path}: not finished; the command that began this run finishes it")
    if digest != source["model_sha256"]:
        raise UserError(f"{path}: damaged, or of another run; remove it and train again")
    return {"weights": {"weights_sha256": digest}, "weights_from": str(path)}


def load_run(folder: Path | str, device: torch.device | str = "cpu") -> tuple[Settings, UNet]:
    """The settings of a finished run and its model, with averaged weights.

    Raises UserError when the folder holds none, or a file of it is damaged.
    """
    folder = Path(folder).expanduser()
    config = read_config(folder / "config.json")
    with reading(folder / "config.json", "a run's configuration of this version"):
        known = {key: value for key, value in config["settings"].items() if key != "class_names"}
        settings = Settings(**known)
        names = [CLASS_NAMES[k] for k in settings.classes]
        if config["settings"].get("class_names", names) != names:
            raise ValueError("it is the other training script's; use that one's load_run")
        circuit = config["circuit"] | {"operations": circuit_text(settings)}
        if difference := differences(config, config | {"circuit": circuit}):
            raise ValueError(f"its circuit is not this script's: {difference}")

    path = folder / "model.pt"
    if not path.exists() or config["model_sha256"] is None:
        raise UserError(f"{path}: not finished; the command that began this run finishes it")
    state = load_tensors(path, "a run's weights; remove it to train again")
    with reading(path, "this run's weights; remove it to train again"):
        if hashlib.sha256(path.read_bytes()).hexdigest() != config["model_sha256"]:
            raise ValueError("its checksum is not that in config.json")
    with reading(path, "a model of this script as it is now; config.json names its git commit"):
        channels = state["stem.weight"].shape[1] // FOLD**2
        model = make_unet(channels, settings)
        model.load_state_dict(state)
    return settings, model.to(device)


# -------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """The command line; most flags are fields of Settings, whose ranges are checked there."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="arms:\n" + "\n".join(f"  {name:10} {arm.text}" for name, arm in ARMS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"error: {' '.join(message.split())}\n")
    add = parser.add_argument
    add_data_flags(parser)

    # What to run.
    arm = parser.add_mutually_exclusive_group()
    arm.add_argument("--arm", nargs="+", choices=ARMS, metavar="ARM", help="list; see below")
    arm.add_argument(
        "--use_quantum", nargs="?", const="True", choices=["True", "False"],
        help="shorthand for --arm quantum (True) or --arm classical (False)",
    )  # fmt: skip
    add(
        "--n_train", nargs="+", type=whole_number_or_all, default=[None], metavar="N",
        help="training images of each class, list, or all (default: all)",
    )  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0], help="list (default: 0)")

    # Training.
    length = parser.add_mutually_exclusive_group()
    default = f"{Settings.steps}, of a conditional model {CONDITIONAL_STEPS}"
    length.add_argument("--steps", type=int, help=f"optimizer steps (default: {default})")
    length.add_argument("--epochs", type=int, help="passes over what is trained on")

    # The other settings that are numbers, whole ones where their range is.
    for one in fields(Settings):
        if one.metadata and one.name not in ("n_train", "seed", "steps"):
            kind = type(one.metadata["range"][0])
            text = one.metadata["text"]
            text += "" if one.default is None else " (default: %(default)s)"
            add(f"--{one.name}", type=kind, default=one.default, help=text)

    # Conditions that are no numbers.
    add("--simulator", default="exact", help="exact (default), or the name of a PennyLane device")
    add("--simulator_options", type=json.loads, metavar="JSON", help="that device's arguments")
    add(
        "--gate_noise", type=two_numbers, default=Settings.gate_noise, metavar="P1,P2",
        help="depolarising probability after one-qubit, two-qubit gates (default: 0,0)",
    )  # fmt: skip

    # What comes out, and where.
    add("--n_eval", type=int, default=25, help="final images of each class (default: 25)")
    add("--weights", type=a_path, metavar="FOLDER", help="only sample the models of FOLDER's runs")
    add("--save_dir", type=a_path, default="runs", help="of the run folders (default: runs)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the data set."""
    add = parser.add_argument
    add(
        "--digits", dest="classes", nargs="+", choices=[*CLASS_IDS, "all"], metavar="DIGIT",
        help="list of 0-9, or all (default: 3, with --conditional all)",
    )  # fmt: skip
    add(
        "--conditional", action=argparse.BooleanOptionalAction, default=False,
        help="one class-conditional model of all these digits, not a model each (default)",
    )  # fmt: skip
    add(
        "--data", choices=["auto", "mnist", "digits"], default="auto",
        help="auto (default) takes MNIST, or without a network scikit-learn's digits",
    )  # fmt: skip
    add("--data_dir", type=a_path, default="data", help="holds MNIST/raw (default: data)")


def whole_number_or_all(text: str) -> int | None:
    """An argparse type: a whole number, or None for ``all``."""
    return None if text == "all" else int(text)


def a_path(text: str) -> Path:
    """An argparse type: a path, where ``~`` is the home folder."""
    if not text:  # of a variable that is not set
        raise argparse.ArgumentTypeError("expected a path, not an empty text")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: {one_line(error)}") from error


def two_numbers(text: str) -> tuple[float, float]:
    """An argparse type: two numbers with a comma between."""
    first, second = text.split(",")
    return float(first), float(second)


def this_process(device: str) -> tuple[torch.device, int, int]:
    """The device, the number of this process, and how many there are.

    A launcher such as torchrun sets RANK and WORLD_SIZE; LOCAL_RANK gives each process of a machine
    a GPU of its own. Raises UserError when there is no such device or rank.
    """
    # The launcher's numbers.
    numbers = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        if not text.removeprefix("-").isdecimal():
            raise UserError(f"{name}={text[:20]} in the environment: no whole number")
        numbers.append(int(text))
    rank, size, local = numbers
    if size > 1 and "RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE={size} without RANK: set RANK to this process's number too")
    if rank > 0 and "WORLD_SIZE" not in os.environ:
        raise UserError(f"RANK={rank} without WORLD_SIZE: set it to the number of processes too")
    if size < 1 or local < 0:
        found = f"WORLD_SIZE={size} LOCAL_RANK={local}"
        raise UserError(f"{found}: expected at least 1 process, and a rank of at least 0")
    if not 0 <= rank < size:
        raise UserError(f"RANK={rank} WORLD_SIZE={size}: expected a rank of 0 to {size - 1}")

    # The device.
    count = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if count else "cpu"
    if device == "cuda" and count:
        device = f"cuda:{local % count}"
    if device not in ("cpu", *(f"cuda:{k}" for k in range(count))):
        expected = f"auto, cpu, cuda or cuda:N; {count} CUDA devices found; use --device cpu"
        raise UserError(f"--device {device}: expected {expected}")
    return torch.device(device), rank, size


class Run(NamedTuple):
    """A run that the flags ask for."""

    settings: Settings
    config: dict


def settings_of_flags(args: argparse.Namespace, arm: str, **others: object) -> Settings:
    """The settings of a run of an arm; a circuit's conditions only where there is a circuit."""
    of_the_grid = ("arm", "data", "classes", "n_train", "seed")
    names = [one.name for one in fields(Settings) if one.name not in of_the_grid]
    values = {name: getattr(args, name) for name in names} | others
    if values["steps"] is None:
        several = len(others.get("classes", ())) > 1
        values["steps"] = CONDITIONAL_STEPS if several else Settings.steps
    settings = Settings(arm, **values)  # checks all flags, those of no use to this arm too
    return replace(settings, **IDEAL) if ARMS[arm].circuit is None else settings


def plan_run(
    args: argparse.Namespace, data: DataSet, device: torch.device, arm: str, others: dict
) -> Run:
    """The settings and the configuration of a run. Raises UserError when it cannot be made.

    others: the settings that the grid of runs gives: data, classes, n_train and seed.
    """
    if args.epochs is None:
        settings = settings_of_flags(args, arm, **others)
    else:  # passes over what is trained on, symmetries included
        settings = settings_of_flags(args, arm, **others, steps=1)
        images, _ = data.training_images(settings, torch.device("cpu"))
        steps = math.ceil(args.epochs * len(images) / settings.batch_size)
        settings = replace(settings, steps=steps)

    # The final images are one picture, of a size that Pillow reads without a warning.
    side = IMAGE_SIZE + TILE_PADDING
    height = len(settings.classes) * side + TILE_PADDING
    most = (Image.MAX_IMAGE_PIXELS // height - TILE_PADDING) // side
    if settings.conditional and args.n_eval > most:
        raise UserError(f"--n_eval {args.n_eval}: at most {most} images of each class of a model")

    config = run_config(settings, data, device)
    folder = args.save_dir / settings.name
    if args.weights is not None:
        weights = find_weights(args.weights, settings, config)
        is_source = folder.resolve() == Path(weights["weights_from"]).parent.resolve()
        config |= {} if is_source else weights
    check_folder(folder, config)
    return Run(settings, config)


def make_all(args: argparse.Namespace, augment: Callable | None = None) -> None:
    """Makes every run that the flags ask for and that is not made yet, or this process's share.

    Everything is checked before any folder is made. A run that fails with a UserError, the user's
    mistake, or an OSError stops no other; it is raised at the end. augment: see DataSet.
    """
    device, rank, processes = this_process(args.device)
    if not 1 <= args.n_eval <= 50_000:
        raise UserError(f"--n_eval {args.n_eval}: expected 1 to 50000")
    if args.epochs is not None and not 1 <= args.epochs <= 10**6:
        found = f"--epochs {str(args.epochs)[:20]}"
        raise UserError(f"{found}: expected at least 1, at most {10**6}")
    arms = args.arm or ["quantum" if args.use_quantum == "True" else "classical"]
    for arm in dict.fromkeys(arms):
        check_circuit(settings_of_flags(args, arm))
    unused = [f"--{name}" for name, ideal in IDEAL.items() if getattr(args, name) != ideal]
    if unused and not any(ARMS[arm].circuit for arm in arms):
        arms_text = ", ".join(arms)
        print(f"NOTICE: {', '.join(unused)}: without effect, no circuit in --arm {arms_text}")

    # The classes: as asked for, all, or the default.
    source, images, labels = load_images(args.data, args.data_dir)
    names = args.classes or ["all" if args.conditional else DEFAULT_CLASS[source]]
    asked = labels.unique().tolist() if "all" in names else [CLASS_IDS[name] for name in names]
    label_ids = list(dict.fromkeys(asked))
    wanted = torch.isin(labels, torch.tensor(label_ids))  # the others take memory
    data = DataSet(source, images[wanted], labels[wanted], len(labels), augment)
    del images, labels

    # The grid of runs, dealt out to the processes: a model for all classes, or one for each.
    models = [tuple(label_ids)] if args.conditional else [(k,) for k in label_ids]
    grid = [
        (arm, {"data": data.source, "classes": classes, "n_train": n_train, "seed": seed})
        for classes in models
        for n_train in dict.fromkeys(args.n_train)
        for arm in dict.fromkeys(arms)
        for seed in dict.fromkeys(args.seeds)
    ]
    if rank >= len(grid):
        print(f"RANK={rank} of {processes} has nothing to do: {len(grid)} runs in all")
    share = grid[rank::processes]
    runs = [plan_run(args, data, device, arm, others) for arm, others in share]

    failures = []
    for k, run in enumerate(runs, 1):
        print(f"[{k}/{len(runs)}] {run.settings.name}", flush=True)
        try:
            make_run(args, data, device, run)
        except (UserError, OSError) as error:
            failures.append(str(error))
    if failures:
        raise UserError("; ".join(failures))


def make_run(args: argparse.Namespace, data: DataSet, device: torch.device, run: Run) -> None:
    """Makes what is missing of a run: the model, the final images, and then the pictures."""
    settings, config = run
    folder = args.save_dir / settings.name
    model_path = folder / "model.pt"
    with open_run(folder, config):
        # The model, trained or another run's.
        recorded = read_config(folder / "config.json")
        has_model = recorded["model_sha256"] is not None and model_path.exists()
        has_images = (folder / "samples_final.png").exists() and recorded["n_eval"] >= args.n_eval
        if not has_model or not has_images:
            note_machine(folder, recorded, config)
        is_trained_here = config["weights"]["weights_sha256"] is None  # not --weights
        if not has_model:
            if not is_trained_here:
                source = Path(config["weights_from"])
                weights = source.read_bytes()
                if hashlib.sha256(weights).hexdigest() != config["weights"]["weights_sha256"]:
                    raise UserError(f"{source} has changed since this command began; run it again")
            else:
                images, labels = data.training_images(settings, device)
                model = train(settings, images, folder, run_hash(config), labels)
                weights = packed(model.state_dict())
            digest = hashlib.sha256(weights).hexdigest()
            if recorded["model_sha256"] not in (None, digest):  # pictures of a model that is lost
                for name in ("samples_final.png", *PICTURES, *EVALUATION):
                    (folder / name).unlink(missing_ok=True)
                update_config(folder, model_sha256=None)  # until the new model is there
            write_atomic(model_path, weights)
            update_config(folder, model_sha256=digest)

        # The images for the metrics, and what is nice to look at.
        _, model = load_run(folder, device)
        if not has_images:
            for name in EVALUATION:  # of fewer images
                (folder / name).unlink(missing_ok=True)
        sample_final(settings, model, folder, args.n_eval, run_hash(config))
        if is_trained_here:
            draw_pictures(settings, folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 a mistake of the user's, 130 interrupted."""
    sys.stderr = sys.stderr or io.StringIO()  # closed: the progress bars need one
    try:
        args = build_parser().parse_args(argv)
        make_all(args)
    except (UserError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise  # a fault of this script
        found = "out of memory; try a smaller --batch_size, or fewer --shots"
        print(f"error: {found}; a trained model is sampled with --device cpu", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(130)


# --------------------------------------------------- appendix: the exact simulation of circuits
#
# In short: a tensor network whose bonds are never truncated. Time runs along each qubit, and every
# gate between two neighbours is a bond that joins them.
#
# A qubit's density matrix rho is sum_p v_p P_p / 2 over the Pauli matrices P = I, X, Y, Z: four
# real numbers, the means v_p = tr(P_p rho), so that v_I = 1 and v_Z = <Z>; of |0> they are
# (1, 0, 0, 1). n qubits have 4^n, one for each string of Paulis. On them a gate or channel is a
# real matrix, 4x4 on one qubit and 16x16 on two, of a gate with angles trigonometric polynomials in
# these.
#
# Bonds. A gate on two neighbours is, at any angle, a sum of r products of matrices on one (as in
# the operator-Schmidt decomposition), and the index of the sum is a bond between the two qubits.
# CNOT, which is kron(|0><0|, I) + kron(|1><1|, X), has two terms, and since a density matrix is
# multiplied from both sides, r is 2 * 2. It is 2 where CNOT(i, i + 1) is the last operation on
# qubit i, of which only I and Z are read then.
#
# The bonds of several gates are one bond, of dimension 4 * 4 * 2 = 32 for three layers of CNOTs. So
# a circuit on a chain is exactly a product of tensors:
#
#        left ---- qubit 0 ---- qubit 1 ---- ... ---- qubit n-1 ---- right
#                     |            |                      |
#                  I or Z       I or Z                 I or Z
#
# <Z_i> is the number of the string with Z at qubit i and I at all others: to read out I of a qubit
# is to ignore it. One sweep from the left end and one from the right give the chain on either side
# of every qubit, with I read out; then <Z_i> = (left of i) (qubit i with Z) (right of i). Gradients
# are autograd's. Noise is exact too, as channels are matrices like gates.
#
# Two halves. A qubit is two tensors. "Before" is |0> and what acts on the qubit through its last
# input; only it differs by sample. "After" is the rest, computed once for all samples. Of
# quantum_circuit "before" is RY(x)|0>, which has no bond; of reupload_circuit both have bonds.
#
# One index. All gates between two qubits give bonds a, b, c in the order of time, which the sweeps
# carry as one index, the earliest slowest. Each qubit splits it at its own last input into early
# bonds, of "before", and late ones, of "after": 4, 4 and 2 may be 4 early, 8 late for one and 16, 2
# for its neighbour. In quantum_circuit all are late.
#
# Letters: B samples, S shots, q qubits, F trigonometric functions; of a tensor: l and r bonds to
# the left and right, m and s those that come later; o and i Pauli components out of and into a
# matrix, j one in between: of two matrices, or of a qubit's two halves. Index orders:
#
#     a factor, of one operation         (F, l, r, o, i); of a group of qubits (q, F, l, r, o, i)
#     its matrices for all samples       (q, B, l, r, o, i)
#     a product of a group's factors     (q, B, o, i, l, r)
#     a qubit's two tensors              before (B, j, l, r), after (j, m, o, s)

MAX_BOND_DIMENSION = 256  # between two neighbours: four layers of CNOTs, with noise
MAX_FUNCTIONS = 1000  # trigonometric ones, of one gate: of six rotations, 3^6, or four CRX, 5^4
# The seconds are those of 16 qubits, three layers and a batch of 64.
WAY_OUT = (
    "use --simulator lightning.qubit (at most 24 qubits, 2 to 7 s a step;"
    " with noise default.mixed, 10 qubits)"
)

# P_p of one qubit, (4, 2, 2), and P_p x P_q of two, (16, 4, 4).
PAULI = np.array([[[1, 0], [0, 1]], [[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]]])
PAULIS = {1: PAULI, 2: np.einsum("pab,qcd->pqacbd", PAULI, PAULI).reshape(16, 4, 4)}
READ_OUT = [0, 3]  # I, for a qubit that is ignored, and Z

# Factors without bonds, (F, l, r, o, i) = (1, 1, 1, o, i).
ZERO = np.array([1.0, 0, 0, 1]).reshape(1, 1, 1, 4, 1)  # |0>
READ_OUT_MATRIX = np.eye(4)[READ_OUT].reshape(1, 1, 1, 2, 4)
PASS_ON = np.eye(2).reshape(1, 1, 1, 2, 2)  # where I and Z are all that is left


# Reading a circuit. It is run on placeholders, a random number for each angle and weight. A
# parameter equal to a placeholder is that angle or weight; any other with a gradient was computed,
# as 2 * x is; the rest are constants. It is run again with placeholders between 0 and other sizes,
# where most numbers that were computed without gradient show, and most branches: negative and large
# ones, which an absolute value or a limit changes, and more, for branches.
USUAL_SIZE = 6
EXTREME_SIZES = (-1000, 1000)
MORE_SIZES = range(7, 17)


class Recorded(NamedTuple):
    """An operation, and where each of its parameters comes from."""

    operation: qml.operation.Operator
    # ("x", 3): angle 3; ("w", 6): weight 6 of weights.flatten(); ("detached x", 3): without
    # gradient; ("computed", its value and derivatives as text); None: a constant.
    sources: tuple[tuple[str, int | str] | None, ...]

    def __str__(self) -> str:
        """The text by which circuits are compared, also of a run's ``config.json``.

        For example ``RZ(w0) 0``, ``CNOT 0 1`` or ``PauliRot(w0) 0 1 pauli_word='XX'``.
        """
        words = [
            shown_value(value) if source is None else "".join(map(str, source))
            for source, value in zip(self.sources, self.operation.parameters, strict=True)
        ]
        inside = f"({', '.join(words)})" if words else ""
        wires = map(str, self.operation.wires)
        return " ".join([self.operation.name + inside, *wires, *details(self.operation)])


def shown_value(parameter: object) -> str:
    """A constant parameter, a number or a matrix, in the text of its operation."""
    return str((np.round(qml.math.toarray(parameter), 9) + 0.0).tolist())  # no -0.0


def with_parameters(
    operation: qml.operation.Operator, parameters: Sequence
) -> qml.operation.Operator:
    """The operation with other parameters."""
    try:
        return qml.ops.functions.bind_new_parameters(operation, parameters)
    except IndexError:  # PennyLane's, as of evolve(2 X, t) and of sums
        if operation.name != "Evolution":
            raise UserError(f"{operation.name}: its parameters cannot be set; {WAY_OUT}") from None
        return qml.evolve(operation.base, parameters[0])


def details(operation: qml.operation.Operator) -> list[str]:
    """What else tells operations of equal name, parameters and wires apart, for ``Recorded``.

    For example ``pauli_word='XX'``.
    """
    # Composite operations: their text, with 0, 1, ... for scalar parameters, as the values are
    # listed already. An evolution's parameter is its time; its Hamiltonian's follow.
    if operation.name in ("Prod", "Sum", "SProd", "Exp", "Evolution"):
        numbers = [float(k) if np.ndim(p) == 0 else p for k, p in enumerate(operation.parameters)]
        inside = operation.base.parameters if operation.name == "Evolution" else []
        with contextlib.suppress(UserError):  # on a device it may stay as it is
            operation = with_parameters(operation, numbers)
        return [repr(operation), *map(shown_value, inside)]

    # Otherwise its hyperparameters, and those of the operation inside an adjoint or a controlled.
    hyperparameters = operation.hyperparameters
    shown = {"control_wires", "work_wires", "work_wire_type", "num_wires", "base"}
    if all(hyperparameters.get("control_values", ())):  # all ones: the default
        shown.add("control_values")
    extra = [f"{key}={value!r}" for key, value in hyperparameters.items() if key not in shown]
    if "base" in hyperparameters:
        extra += details(hyperparameters["base"])
    return extra


def value_and_derivatives(parameter: Tensor, angles: Tensor, weights: Tensor) -> str:
    """A computed parameter as text: ``1.4 (w2: 2)`` of 2 w2, where w2 is 0.7."""
    numbers = torch.view_as_real(parameter) if parameter.is_complex() else parameter
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(numbers.sum(), (angles, weights), **options)
    derivatives = [
        f"{kind}{k}: {derivative:.6g}"
        for kind, gradient in zip("xw", gradients, strict=True)
        for k, derivative in enumerate(gradient.flatten().tolist())
        if derivative
    ]
    values = [f"{value:.6g}" for value in numbers.flatten().tolist()]
    return f" {' '.join(values)} ({', '.join(derivatives)})"


@torch.inference_mode(False)
@torch.enable_grad()
def record(
    circuit: Callable, n_qubits: int, n_layers: int, n_weights: int, size: float = USUAL_SIZE
) -> list[Recorded]:
    """Runs a circuit once on placeholders, to see which angle or weight each parameter is.

    For example RZ(layer[3, 0]) is recorded with 0.7312, the placeholder of weight 6, so its source
    is ("w", 6). size: the placeholders lie between 0 and it. Raises UserError for a parameter that
    PennyLane cannot take, and for one whose gradient is lost.
    """
    shape = (n_layers, n_qubits, n_weights)
    generator = random_stream(0, "placeholders", size)
    how = {"dtype": torch.float64, "generator": generator, "device": "cpu"}
    angles = size * torch.rand(n_qubits, **how)
    weights = size * torch.rand(shape, **how)
    placeholders = {value: ("x", i) for i, value in enumerate(angles.tolist())}
    placeholders |= {value: ("w", k) for k, value in enumerate(weights.flatten().tolist())}
    operations = operations_of(circuit, angles.requires_grad_(), weights.requires_grad_())

    # Which of them each parameter is.
    recorded = []
    for operation in operations:
        mend = "; it takes one number for each parameter, such as layer[i, 0]"
        with explaining(f"{name_of(circuit)}: {operation.name}", mend):
            if operation.batch_size is not None:
                shapes = [str(tuple(np.shape(parameter))) for parameter in operation.parameters]
                raise ValueError(f"of shape {', '.join(shapes)}")
        sources = []
        for parameter in operation.parameters:
            value = qml.math.toarray(parameter)
            source = placeholders.get(value.item()) if value.ndim == 0 else None
            if source is not None and not isinstance(parameter, Tensor):
                lost = f"{name_of(circuit)}: {operation.name} takes an angle or weight as a number"
                raise UserError(f"{lost} without gradient; leave out float() and .item()")
            has_gradient = isinstance(parameter, Tensor) and parameter.requires_grad
            if source is not None and not has_gradient:
                source = (f"detached {source[0]}", source[1])
            elif source is None and has_gradient:
                source = ("computed", value_and_derivatives(parameter, angles, weights))
            sources.append(source)
        recorded.append(Recorded(operation, tuple(sources)))
    return with_scaled_gradients(recorded, angles, weights)


def with_scaled_gradients(
    recorded: list[Recorded], angles: Tensor, weights: Tensor
) -> list[Recorded]:
    """Parameters with an angle's or a weight's value and another gradient are computed ones, too.

    Such as angle.detach() + 0.1 * (angle - angle.detach()). If angle i is a parameter k times, the
    sum of all parameters has the derivative k by it. angles (n,), weights (layers, n, per qubit).
    """
    total = torch.zeros_like(angles[0])
    times = {"x": torch.zeros_like(angles), "w": torch.zeros_like(weights).flatten()}
    for operation, sources in recorded:
        for parameter, source in zip(operation.parameters, sources, strict=True):
            if source is not None and source[0] in times:
                kind, index = source
                times[kind][index] += 1
                total = total + parameter

    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    derivatives = torch.autograd.grad(total.requires_grad_(), (angles, weights), **options)
    both = zip(derivatives, times.values(), strict=True)
    if all(torch.equal(derivative.flatten(), expected) for derivative, expected in both):
        return recorded

    # Some are: each by itself, as it takes longer.
    marked = []
    for operation, sources in recorded:
        own = list(sources)
        for k, (parameter, source) in enumerate(zip(operation.parameters, sources, strict=True)):
            if source is not None and source[0] in times:
                text = value_and_derivatives(parameter, angles, weights)
                if not text.endswith(f"({source[0]}{source[1]}: 1)"):
                    own[k] = ("computed", text)
        marked.append(Recorded(operation, tuple(own)))
    return marked


class Factor(NamedTuple):
    """What an operation does to one of its qubits: a matrix for each value of the bonds.

    The matrix is sum_f features[f] * coefficients[f]. Of one parameter the features are the first
    ``n_harmonics`` of its ``harmonics``; of several, all products of one from each. So F is
    n_harmonics ** len(sources), and 1 for a constant.
    """

    coefficients: np.ndarray | Tensor  # (F, l, r, o, i); of a group of qubits (q, F, l, r, o, i)
    # A parameter each: ("x", index) of an angle, ("w", index) of a weight, both also "detached".
    sources: tuple = ()
    n_harmonics: int = 1


class Group(NamedTuple):
    """Qubits whose tensors have the same shapes, which are computed as one batch.

    The index of a Factor's source is here a tensor (q,).
    """

    qubits: list[int]
    before: list[Factor]  # |0>, and the operations up to the last that depends on the input
    after: list[Factor]  # all others; at the end, I and Z are read out


def pauli_transfer_matrix(operation: qml.operation.Operator) -> np.ndarray:
    """A gate or channel as a real matrix on Pauli components, its wires in rising order.

    R_pq = tr(P_p sum_k K_k P_q K_k^+) / d with PennyLane's Kraus operators K. Returns (4, 4) for
    one qubit, (16, 16) for two.
    """
    wires = sorted(operation.wires)
    paulis = PAULIS[len(wires)]  # (4 or 16, d, d)
    is_channel = isinstance(operation, qml.operation.Channel)
    kraus = operation.kraus_matrices() if is_channel else [operation.matrix()]

    total = np.zeros((len(paulis), len(paulis)))
    for matrix in kraus:
        matrix = qml.math.expand_matrix(qml.math.toarray(matrix), operation.wires, wires)
        moved = matrix.astype(complex) @ paulis @ matrix.conj().T  # (q, d, d)
        total += np.einsum("pab,qba->pq", paulis, moved).real
    return total / paulis.shape[1]


def harmonics(theta: Tensor) -> Tensor:
    """1, cos, sin of an angle; cos, sin of its half (controlled rotations): (...) -> (..., 5)."""
    half = theta / 2
    one = torch.ones_like(theta)
    return torch.stack([one, theta.cos(), theta.sin(), half.cos(), half.sin()], -1)


def fit_harmonics(
    operation: qml.operation.Operator, variable: Sequence[bool]
) -> tuple[np.ndarray, int]:
    """The transfer matrix of an operation as a trigonometric polynomial of its parameters.

    variable: which parameters are no constants. Returns the coefficients, (F, 4, 4) or
    (F, 16, 16), and the number of ``harmonics``: 3 or, with half angles, 5. Raises UserError when a
    parameter enters in another way. Of constants alone there is one matrix, F = 1.
    """

    if not any(variable):
        constant = pauli_transfer_matrix(operation)
        constant[abs(constant) < 1e-13] = 0  # rounding
        return constant[None], 1

    def matrix_at(angles: Sequence[float]) -> np.ndarray:
        remaining = iter(angles)
        parameters = [
            next(remaining) if is_variable else qml.math.toarray(constant)
            for constant, is_variable in zip(operation.parameters, variable, strict=True)
        ]
        return pauli_transfer_matrix(with_parameters(operation, parameters))

    def features_at(angles: Sequence[float], n: int) -> np.ndarray:
        features = np.ones(1)
        values = torch.tensor(angles, dtype=torch.float64, device="cpu")
        for row in harmonics(values).numpy():
            features = np.kron(features, row[:n])
        return features

    # A rotation's matrix is of first degree in cos and sin of its angle: 3 functions. A controlled
    # one has those of the half angle too: 5, of twice the period. As many evenly spaced angles as
    # there are functions fix the coefficients, which are then tried at other angles.
    count = sum(variable)
    test_angles = [0.3 + 0.9 * k for k in range(count)]
    for n, period in ((3, 2 * math.pi), (5, 4 * math.pi)):
        if n**count > MAX_FUNCTIONS:
            found = f"{operation.name} has {count} angles or weights"
            raise UserError(f"{found}; write it as several gates, or {WAY_OUT}")
        nodes = [period * k / n for k in range(n)]
        combinations = list(itertools.product(nodes, repeat=count))
        features = np.array([features_at(angles, n) for angles in combinations])
        matrices = np.array([matrix_at(angles) for angles in combinations])
        coefficients = np.tensordot(np.linalg.inv(features), matrices, 1)

        error = np.tensordot(features_at(test_angles, n), coefficients, 1) - matrix_at(test_angles)
        if abs(error).max() < 1e-10:
            coefficients[abs(coefficients) < 1e-13] = 0  # rounding
            return coefficients, n
    found = f"{operation.name} is not of first degree in cos and sin of its parameters"
    raise UserError(f"{found} or of their halves; {WAY_OUT}")


def cut(coefficients: np.ndarray, is_last: tuple[bool, bool]) -> tuple[np.ndarray, np.ndarray]:
    """Cuts two-qubit matrices (F, 16, 16) into a part for each qubit, joined by a bond.

    As rows (low o, low i) by columns (F, high o, high i) they are one matrix M = Q (Q^T M), where
    the r columns of Q are an orthonormal basis of M's column space. Q is the low qubit's part and
    does not depend on the gate's angle, Q^T M is the high qubit's and does; the index between them
    is the bond.

    is_last: whether this is the low, the high qubit's last operation, of which only I and Z are
    read. Returns the low part (1, 1, r, o, 4) and the high part (F, r, 1, o, 4); o is 2 for the
    last operation, else 4.
    """
    low_is_last, high_is_last = is_last
    tensor = coefficients.reshape(-1, 4, 4, 4, 4)  # (F, low o, high o, low i, high i)

    # Of a last operation the rows X and Y are never read. Without them the rank may fall, of a CNOT
    # that is the last on its control from 4 to 2. Where the gate is the last on both its qubits, as
    # at the end of a chain, the high one's rows go after the SVD: a smaller rank than that of the
    # layer's other gates would keep the last qubit out of their Group.
    if low_is_last:
        tensor = tensor[:, READ_OUT]
    elif high_is_last:
        tensor = tensor[:, :, READ_OUT]
    n_functions, low_out, high_out = tensor.shape[:3]

    # (low o, low i) by (F, high o, high i).
    matrix = tensor.transpose(1, 3, 0, 2, 4).reshape(low_out * 4, -1)
    columns, singular_values, _ = np.linalg.svd(matrix, full_matrices=False)
    basis = columns[:, singular_values > 1e-10 * singular_values[0]]  # Q: (low o low i, r)

    low = basis.T.reshape(1, 1, -1, low_out, 4)
    high = (basis.T @ matrix).reshape(-1, n_functions, high_out, 4)  # (r, F, high o, high i)
    if low_is_last and high_is_last:
        high = high[:, :, READ_OUT]
    high = high.transpose(1, 0, 2, 3)[:, :, None]  # (F, r, 1, high o, high i)
    return low, high


def check_is_gate(operation: qml.operation.Operator) -> None:
    """Raises UserError for an operation whose matrix is not unitary, such as a sum of gates.

    PennyLane's matrix of a product may be wrong (0.45.1: its first factor's type is that of all).
    """
    if isinstance(operation, qml.operation.Channel) or not operation.has_matrix:
        return
    matrix = qml.math.toarray(operation.matrix())
    error = abs(matrix @ matrix.conj().T - np.eye(len(matrix))).max()
    if not error < 1e-5:  # a matrix of single precision has 1e-7
        found = f"{operation.name} {' '.join(map(str, operation.wires))}: its matrix is not unitary"
        raise UserError(f"{found}, so it is no gate; write a product's gates one after the other")


def check_parameters_can_be_set(operation: qml.operation.Operator) -> None:
    """Raises UserError where PennyLane forgets a part of an operation when it sets parameters."""
    if not hasattr(operation, "base") and not hasattr(operation, "operands"):
        return  # made of no other operations
    set_again = pauli_transfer_matrix(with_parameters(operation, operation.parameters))
    if abs(set_again - pauli_transfer_matrix(operation)).max() > 1e-10:
        raise UserError(f"{operation.name}: its parameters cannot be set; {WAY_OUT}")


def factors_of_qubits(recorded: Sequence[Recorded], n_qubits: int) -> list[list[Factor]]:
    """For each qubit its factors in the order of time; the last reads out I and Z.

    Raises UserError, with the way out, for what the exact simulation cannot do.
    """
    recorded = [one for one in recorded if one.operation.name not in ("Identity", "GlobalPhase")]
    last = {wire: k for k, (operation, _) in enumerate(recorded) for wire in operation.wires}
    factors = [[] for _ in range(n_qubits)]
    known = {}  # coefficients and number of functions by kind of operation
    for k, (operation, sources) in enumerate(recorded):
        wires = sorted(operation.wires)
        is_map = operation.has_matrix or isinstance(operation, qml.operation.Channel)
        if not is_map:
            raise UserError(f"{operation.name} is neither a gate with a matrix nor a channel")
        if len(wires) > 2:
            found = f"{operation.name} on {len(wires)} qubits: the exact simulation knows gates on"
            raise UserError(f"{found} one or two, and channels; {WAY_OUT}")
        if len(wires) == 2 and wires[1] != wires[0] + 1:
            found = f"{operation.name} on qubits {wires[0]} and {wires[1]}"
            raise UserError(f"{found}: the exact simulation knows neighbours only; {WAY_OUT}")

        # Each kind of operation is fitted and cut once. Operations of one name may differ, as in a
        # Pauli word or a constant, so the key holds the matrix at some values of the variable
        # parameters. These are not equal, so that f(a, b) and f(b, a) have different keys.
        variable = tuple(source is not None for source in sources)
        is_last = tuple(last[wire] == k for wire in wires)
        values = [
            0.5 + 0.1 * math.sqrt(2 + j) if is_variable else qml.math.toarray(parameter)
            for j, (parameter, is_variable) in enumerate(
                zip(operation.parameters, variable, strict=True)
            )
        ]
        at_values = operation
        if any(variable):
            check_parameters_can_be_set(operation)
            at_values = with_parameters(operation, values)
        check_is_gate(at_values)
        matrix = pauli_transfer_matrix(at_values)
        key = (operation.name, matrix.tobytes(), variable, is_last)
        if key not in known:
            coefficients, n = fit_harmonics(operation, variable)
            if len(wires) == 2:
                low, high = cut(coefficients, is_last)
            else:
                low, high = None, coefficients[:, None, None]
            known[key] = (low, high, n)

        # The parameters go with the high qubit's part, by the choice that ``cut`` made.
        low, high, n = known[key]
        sources = tuple(source for source in sources if source is not None)
        factors[wires[-1]].append(Factor(high, sources, n))
        if low is not None:
            factors[wires[0]].append(Factor(low))

    # At the end I and Z are read out, to which ``cut`` has cut a gate already.
    for own in factors:
        is_cut = own and own[-1].coefficients.shape[3] == len(READ_OUT)  # o
        own.append(Factor(PASS_ON if is_cut else READ_OUT_MATRIX))
    return factors


def fuse_constants(factors: Sequence[Factor]) -> list[Factor]:
    """The same product with constant factors multiplied into their neighbours."""
    fused = []
    for factor in factors:
        # Two factors with parameters each stay apart; any other pair becomes one.
        if not fused or (fused[-1].sources and factor.sources):
            fused.append(factor)
            continue

        # Functions f, g; bonds l, m to the left and r, s to the right; components o <- j <- i.
        first = fused.pop()
        product = np.einsum("flrji,gmsoj->fglmrsoi", first.coefficients, factor.coefficients)
        f, g, bonds_l, bonds_m, bonds_r, bonds_s, o, i = product.shape
        product = product.reshape(f * g, bonds_l * bonds_m, bonds_r * bonds_s, o, i)
        varying = first if first.sources else factor
        fused.append(varying._replace(coefficients=product))
    return fused


def split_at_last_input(factors: Sequence[Factor]) -> tuple[list[Factor], list[Factor]]:
    """A qubit's factors: |0> and all through its last input; those behind it.

    Of quantum_circuit "before" is |0> and RY(x), one factor; "after" has one for each weight, into
    which the CNOTs' parts are multiplied.
    """
    inputs = [k for k, f in enumerate(factors) if any(kind.endswith("x") for kind, _ in f.sources)]
    split = max(inputs, default=-1) + 1
    before = fuse_constants([Factor(ZERO), *factors[:split]])
    after = fuse_constants(factors[split:])

    # Components in between that are always zero are left out, as Y of RY(x)|0>: rows o of the last
    # factor before, columns i of the first after.
    is_used = before[-1].coefficients.any(axis=(0, 1, 2, 4))  # (o,)
    before[-1] = before[-1]._replace(coefficients=before[-1].coefficients[:, :, :, is_used])
    after[0] = after[0]._replace(coefficients=after[0].coefficients[..., is_used])
    return before, after


def pad_ends(halves: list[tuple[list[Factor], list[Factor]]]) -> None:
    """Pads the outer bonds of the two end qubits with zeros to the size of the inner ones.

    It only saves time, a fifth: where their factors are as many, the ends then mostly have the
    shapes of the inner qubits and are computed in one batch with them. Index 0 of a padded bond is
    the old factor, all others are zero; as the chain begins and ends with (1, 0, 0, ...), nothing
    changes.
    """
    if len(halves) < 3:
        return
    for end, neighbour, axis in ((0, 1, 1), (-1, -2, 2)):  # axis 1: left bonds, 2: right bonds
        if [*map(len, halves[end])] != [*map(len, halves[neighbour])]:
            continue
        for half, like in zip(halves[end], halves[neighbour], strict=True):
            for k, (factor, other) in enumerate(zip(half, like, strict=True)):
                width = [(0, 0)] * 5
                width[axis] = (0, other.coefficients.shape[axis] - 1)
                half[k] = factor._replace(coefficients=np.pad(factor.coefficients, width))


def stack_factors(
    qubits: Sequence[Sequence[Factor]], dtype: torch.dtype, device: torch.device
) -> list[Factor]:
    """The factors of several qubits, of equal shapes, as one list of factors on the device."""
    stacked = []
    for same in zip(*qubits, strict=True):  # the k-th factor of every qubit
        coefficients = np.stack([factor.coefficients for factor in same])
        sources = []
        for parameter in zip(*(factor.sources for factor in same), strict=True):
            kind = parameter[0][0]
            indices = [index for _, index in parameter]
            sources.append((kind, torch.tensor(indices, device=device)))
        coefficients = torch.from_numpy(coefficients).to(device, dtype)
        stacked.append(same[0]._replace(coefficients=coefficients, sources=tuple(sources)))
    return stacked


def read_circuit(circuit: Callable, n_qubits: int, n_layers: int, n_weights: int) -> list[Recorded]:
    """A circuit's operations, which must be the same whatever its angles and weights are.

    Raises UserError where they are not, and for a computed parameter.
    """
    sizes = (n_qubits, n_layers, n_weights)
    recorded = record(circuit, *sizes)
    texts = list(map(str, recorded))
    for size in (USUAL_SIZE, *EXTREME_SIZES, *MORE_SIZES):
        again = record(circuit, *sizes, size)
        for one, other, text in itertools.zip_longest(recorded, again, texts):
            is_same = text == str(other)
            if not is_same and size == USUAL_SIZE:
                raise UserError(f"{name_of(circuit)} is another circuit each time it is called")
            if not is_same or any(source and source[0] == "computed" for source in one.sources):
                found = f"{name_of(circuit)}, {(one or other).operation.name}: a parameter must be"
                must_be = "an angle or a weight, or a constant, not computed"
                way_out = f"and which operations there are must not depend on them; {WAY_OUT}"
                raise UserError(f"{found} {must_be}, {way_out}")

    return recorded


@cache
@torch.inference_mode(False)  # inference tensors would fail in training
def compile_circuit(
    circuit: Callable,
    n_qubits: int,
    n_layers: int,
    n_weights: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Group]:
    """Reads a circuit for the exact simulation: its qubits in groups, with all constants.

    Raises UserError, with the way out, for what the exact simulation cannot do.
    """
    recorded = read_circuit(circuit, n_qubits, n_layers, n_weights)

    # The factors, and how large the bonds are together.
    with explaining(f"{name_of(circuit)} cannot be read", f"; {WAY_OUT}"):
        factors = factors_of_qubits(recorded, n_qubits)
    for i, own in enumerate(factors):
        bonds = math.prod(factor.coefficients.shape[2] for factor in own)
        if bonds > MAX_BOND_DIMENSION:
            found = f"{name_of(circuit)}: bond dimension {bonds} between qubits {i} and {i + 1}"
            raise UserError(f"{found}, at most {MAX_BOND_DIMENSION}; fewer layers, or {WAY_OUT}")
    halves = [split_at_last_input(own) for own in factors]
    pad_ends(halves)

    # Qubits whose factors agree in number, shapes and kinds of parameters are a group.
    members = {}
    for qubit, (before, after) in enumerate(halves):
        shapes = [
            (factor.coefficients.shape, tuple(kind for kind, _ in factor.sources))
            for factor in (*before, *after)
        ]
        members.setdefault((len(before), *shapes), []).append(qubit)
    groups = []
    for qubits in members.values():
        befores, afters = zip(*(halves[qubit] for qubit in qubits), strict=True)
        stacked = [stack_factors(half, dtype, device) for half in (befores, afters)]
        groups.append(Group(qubits, *stacked))
    return groups


def factor_matrices(factor: Factor, features: dict[str, Tensor]) -> Tensor:
    """The matrices of a factor for all qubits of a group: (q, B, l, r, o, i).

    features: ``harmonics`` of the angles "x" (n, B, 5) and of the weights "w" (L n k, 1, 5), which
    are the same for all samples; under "detached x" and "detached w" without gradient.
    """
    if not factor.sources:
        return factor.coefficients  # F = 1 is taken for B = 1: the same for all samples

    # The features: products of one function of each parameter.
    product = None
    for kind, index in factor.sources:
        own = features[kind].index_select(0, index)[..., : factor.n_harmonics]  # (q, B, harmonics)
        if product is not None:
            own = (product[..., :, None] * own[..., None, :]).flatten(-2)
        product = own

    # The sum over the features.
    matrices = product @ factor.coefficients.flatten(2)  # (q, B, F) by (q, F, l r o i)
    return matrices.unflatten(-1, factor.coefficients.shape[2:])


def multiply_factors(factors: Sequence[Factor], features: dict[str, Tensor]) -> Tensor:
    """The product of a group's factors: (q, B, o, i, l, r)."""
    product = factor_matrices(factors[0], features).permute(0, 1, 4, 5, 2, 3)
    for factor in factors[1:]:
        new = factor_matrices(factor, features)  # (q, B, m, s, o, j), bonds m and s

        # Sum over the component j in between, which the new factor turns into o (einsum broadcasts
        # a b of 1). The bonds l, m become one to the left and r, s one to the right.
        product = torch.einsum("qbmsoj,qbjilr->qboilmrs", new, product)
        product = product.flatten(6, 7).flatten(4, 5)
    return product


def site_tensors(
    groups: Sequence[Group], angles: Tensor, weights: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """For each qubit its two tensors, through its last input and behind it.

    Before: (B, j, l, r), the state of every sample, j the component between the halves. After:
    (j, m, o, s), the same for all samples; o is I or Z as read out. Early bonds are l and r, late
    ones m and s, to the left and the right.
    """
    features = {"x": harmonics(angles.T), "w": harmonics(weights.flatten())[:, None]}
    features |= {f"detached {kind}": values.detach() for kind, values in features.items()}
    sites = [None] * angles.shape[1]
    for group in groups:
        before = multiply_factors(group.before, features).squeeze(3)  # (q, B, j, l, r)
        before = before.expand(-1, len(angles), -1, -1, -1)
        after = multiply_factors(group.after, features).squeeze(1)  # (q, o, j, m, s)
        after = after.permute(0, 2, 3, 1, 4).contiguous()  # (q, j, m, o, s)
        pairs = zip(before.unbind(0), after.unbind(0), strict=True)
        for qubit, pair in zip(group.qubits, pairs, strict=True):
            sites[qubit] = pair
    return sites


def end_of_chain(bond_dimension: int, like: Tensor) -> Tensor:
    """The number 1 and, where bonds were padded, zeros: (1, bonds)."""
    return F.pad(like.new_ones(1, 1), (0, bond_dimension - 1))


def step_right(left: Tensor, site: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The chain with one more qubit, this one read out as I, and as Z.

    left: (B, bonds to the left). Returns two tensors (B, bonds to the right).

    The joined bonds are cut into early and late ones, and joined again: see "One index" above.
    """
    before, after = site
    left = left.unflatten(1, (before.shape[2], -1))  # (B, l, m): early bonds l, late ones m
    state = torch.einsum("blm,bjlr->brjm", left, before).flatten(2)  # (B, r, j m)
    state = state @ after.flatten(2).flatten(0, 1)  # (B, r, o s): early bonds r, late ones s
    read_i, read_z = state.chunk(2, dim=2)
    return read_i.flatten(1), read_z.flatten(1)


def chains_beyond(sites: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """For each qubit the chain to its right, read out as I everywhere: (B, bonds) each."""
    before, after = sites[-1]
    n_bonds = before.shape[3] * after.shape[3]
    right = end_of_chain(n_bonds, before).expand(len(before), -1)
    beyond = [right]
    for before, after in reversed(sites[1:]):
        right = right.unflatten(1, (before.shape[3], -1))  # (B, r, s): early bonds r, late ones s
        read_i = after[:, :, 0].flatten(0, 1)  # (j m, s)
        state = (right @ read_i.mT).unflatten(2, (before.shape[1], -1))  # (B, r, j, m)
        right = torch.einsum("bjlr,brjm->blm", before, state).flatten(1)
        beyond.append(right)
    return beyond[::-1]


def exact_means(sites: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """<Z_i> of every qubit: (B, n)."""
    before, after = sites[0]
    left = end_of_chain(before.shape[2] * after.shape[1], before).expand(len(before), -1)
    means = []
    for site, right in zip(sites, chains_beyond(sites), strict=True):
        left, read_z = step_right(left, site)
        means.append((read_z * right).sum(1))
    return torch.stack(means, 1)


def sample_outcomes(sites: Sequence[tuple[Tensor, Tensor]], uniform: Tensor) -> Tensor:
    """Measures all qubits together, from left to right: 1 or -1 of every qubit and shot.

    uniform: (B, S, n) in 0..1. Returns (B, S, n), whose joint distribution is exact: each qubit has
    been read out by the projector (I + z Z) / 2 of its outcome z before the next one is.
    """
    before, after = sites[0]
    left = end_of_chain(before.shape[2] * after.shape[1], before)
    left = left.expand(*uniform.shape[:2], -1)  # (B, S, bonds)
    outcomes = []
    for i, (site, right) in enumerate(zip(sites, chains_beyond(sites), strict=True)):
        # Both halves as one matrix for all shots of a sample, from the joined left bonds l m to the
        # readout o and the joined right bonds r s.
        matrix = torch.einsum("bjlr,jmos->blmors", *site)
        matrix = matrix.flatten(3).flatten(1, 2)  # (B, l m, o r s)

        # <Z_i> given the outcomes so far; the outcome; the chain with its projector, divided by the
        # outcome's probability.
        read_i, read_z = (left @ matrix).chunk(2, dim=2)  # (B, S, r s)
        mean = read_z @ right[:, :, None]  # (B, S, 1)
        z = torch.where(2 * uniform[:, :, i : i + 1] < 1 + mean, 1.0, -1.0).to(mean)
        left = (read_i + z * read_z) / (1 + z * mean)
        outcomes.append(z)
    return torch.cat(outcomes, 2)


def circuit_expectations(
    angles: Tensor,
    weights: Tensor,
    circuit: Callable = quantum_circuit,
    *,
    shots: int | None = None,
    generators: Sequence[torch.Generator] = (),
) -> Tensor:
    """A circuit simulated exactly, its noise included: <Z_i> of every qubit.

    angles: (B, n), radians; weights: (L, n, k), radians. With ``shots`` the values are means of so
    many joint measurements of all qubits, drawn by a generator for each sample; the gradient is
    still the exact mean's. Returns (B, n) in -1..1, differentiable in both. Raises UserError as
    ``compile_circuit`` does, and when generators are missing.
    """
    if weights.ndim != 3 or angles.ndim != 2 or angles.shape[1] != weights.shape[1]:
        found = f"angles {tuple(angles.shape)}, weights {tuple(weights.shape)}"
        raise UserError(f"{found}: expected (B, n) and (L, n, k)")
    n_layers, n_qubits, n_weights = weights.shape
    how = (angles.dtype, angles.device)
    groups = compile_circuit(circuit, n_qubits, n_layers, n_weights, *how)
    if shots is not None and len(generators) != len(angles):
        found = f"{len(generators)} generators for the shots of {len(angles)} samples"
        raise UserError(f"{found}: expected one for each")

    with torch.autocast(angles.device.type, enabled=False):  # half precision is too coarse
        sites = site_tensors(groups, angles, weights)
        means = exact_means(sites)
        if shots is None:
            return means

        # Measurements; their deviation from the mean has no gradient.
        with torch.no_grad():
            draws = [torch.rand(shots, n_qubits, generator=g, device=g.device) for g in generators]
            outcomes = sample_outcomes(sites, torch.stack(draws).to(angles))
        return outcomes.mean(1) + means - means.detach()


def values_and_gradients(compute: Callable, angles: Tensor, weights: Tensor) -> Tensor:
    """<Z_i> and the gradients of the sum of their squares, as one vector."""
    values = compute(angles, weights)
    loss = values.square().sum() + 0 * angles.sum()  # has a gradient if the values have none
    gradients = torch.autograd.grad(
        loss, (angles, weights), allow_unused=True, materialize_grads=True
    )
    return torch.cat([part.detach().flatten() for part in (values, *gradients)])


def on_device(circuit: Callable, n_qubits: int, simulator: str, **how: object) -> Callable:
    """A circuit on a PennyLane device, as ``circuit_expectations`` is called."""
    qnode = make_qnode(circuit, n_qubits, simulator, **how)
    return lambda angles, weights: torch.stack(qnode(angles, weights), -1).expand_as(angles)


def one_by_one(circuit: Callable, n_qubits: int, simulator: str) -> Callable:
    """The same, a sample at a time: for gates that take no batch, such as IsingXY."""
    qnode = make_qnode(circuit, n_qubits, simulator)
    return lambda angles, weights: torch.stack([torch.stack(qnode(x, weights)) for x in angles])


def check_circuit(settings: Settings) -> None:
    """Compares the simulator of a run with PennyLane's own, on the circuit of the run's arm.

    Values and gradients, on at most five qubits and three layers; of a PennyLane device with shots
    the measured values alone, within six deviations. Raises UserError when they differ, when the
    device fails, and for a circuit that the exact simulation cannot do.
    """
    arm = ARMS[settings.arm]
    if arm.circuit is None:
        return
    compile_circuit.cache_clear()  # what the function reads from outside may have changed
    circuit = with_noise(arm.circuit, settings.gate_noise, settings.readout_noise)
    is_exact = settings.simulator == "exact"
    if is_exact:
        compile_circuit(circuit, settings.n_qubits, settings.n_layers, arm.n_weights)

    # Random inputs.
    n_qubits = min(settings.n_qubits, 5)
    n_layers = min(settings.n_layers, 3)
    kind = {"dtype": torch.float64, "generator": random_stream(0, "check")}
    angles = torch.randn(n_qubits + 1, n_qubits, **kind).requires_grad_()
    weights = torch.randn(n_layers, n_qubits, arm.n_weights, **kind).requires_grad_()

    # PennyLane's own simulator; channels, a circuit's own or --gate_noise's, need density matrices.
    operations = operations_of(circuit, angles, weights)
    has_channels = any(isinstance(one, qml.operation.Channel) for one in operations)
    for operation in operations:
        if operation.batch_size is None:
            check_is_gate(operation)
    mend = "; the input is to be indexed as angles[..., i]; constants beside it are tensors, too"
    with explaining(f"{name_of(circuit)} does not run in PennyLane", mend):
        for operation in operations:
            if operation.batch_size not in (None, len(angles)):
                found = f"{operation.name} has {operation.batch_size} values"
                raise ValueError(f"{found} for {len(angles)} samples")
        simulator = "default.mixed" if has_channels else "default.qubit"
        own = one_by_one(circuit, n_qubits, simulator)
        reference = values_and_gradients(own, angles, weights)
        if is_exact and has_channels and not reference.isfinite().all():
            # default.mixed has gradients of NaN where an outcome never occurs: flips leave none.
            circuit = with_noise(circuit, readout_noise=0.1)
            own = one_by_one(circuit, n_qubits, simulator)
            reference = values_and_gradients(own, angles, weights)

    # The run's simulator. Of the exact simulation the means are compared, with shots too; of a
    # device at least 1,000 shots, as any value is within six deviations of few.
    shots = None if is_exact or settings.shots is None else max(settings.shots, 1000)
    what = f"--simulator {settings.simulator}"
    mend = "if it samples, give --shots or its state-vector option; else one of the two is wrong"
    if is_exact:
        what = f"--arm {settings.arm}: the exact simulation"
        mend = f"one of the two is wrong; {WAY_OUT}"
    way_out = "; channels run on default.mixed, or without --simulator" if has_channels else ""
    with explaining(f"{what} does not run the circuit", way_out):
        if is_exact:
            simulate = partial(circuit_expectations, circuit=circuit)
        else:
            how = {"options": settings.simulator_options, "shots": shots}
            simulate = on_device(circuit, n_qubits, settings.simulator, **how)
        if shots is None:
            found = values_and_gradients(simulate, angles, weights)
        else:
            found = simulate(angles, weights).flatten()
            values_and_gradients(simulate, angles[:1], weights)  # PennyLane may have no gradient

    if not found.isfinite().all():
        raise UserError(f"{what} has values or gradients that are no numbers")
    error = (found - reference[: len(found)]).abs().max()
    if not error < (1e-5 if shots is None else 6 / math.sqrt(shots)):  # some have single precision
        raise UserError(f"{what} differs by {error:.1e} from PennyLane's own; {mend}")


if __name__ == "__main__":
    main()
