"""Measures what the runs generated: FID, KID, precision and recall, SSIM, label accuracy, copies.

Reads the sample grids of run folders, compares them with real images of the same class and data
source, and beside every figure prints what held-out real images score at the same number of
images (the floor).

    python cal_fid_ssim.py runs/classical_mnist3_nall_seed* runs/quantum_mnist3_nall_seed*
    python cal_fid_ssim.py runs/*mnist3* --out comparison           # csv, markdown, figures
    python cal_fid_ssim.py runs/quantum_mnist3_nall_seed0 --protocol paper

The file in its order: the metrics, which know arrays and images only; the networks that make
features of images; a run and the real images beside it; tables; figures; the published procedure;
the command line. cal_fid_ssim_medmnist.py does the same for PathMNIST. debug_img.py splits
pictures, and holds what all three command lines share: printing, errors, writing files.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import itertools
import json
import math
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import linalg, stats
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from torchvision.models import Inception_V3_Weights, inception_v3
from tqdm import tqdm

import quantum_diffusion_mnist as mnist
from debug_img import (
    OneLineParser,
    exit_codes,
    note,
    one_line,
    save_figure,
    say,
    show_tiles,
    split_grid,
    write_atomic,
)
from quantum_diffusion_mnist import ARMS, TILE_PADDING, UserError, load_tensors, reading, to_float

# How the metrics are taken.
FID_WARNING_BELOW = 1000  # images
FID_INFINITY_SIZES = 15  # subsets
NEIGHBOURS = 3  # k of precision and recall
SSIM_PAIRS = 2000  # at most so many pairs make ssim_diversity
FLOOR_DRAWS = 5  # samples of real images whose mean is the floor
SSIM_CHUNK = 100  # images at once, each with a dozen arrays of its size in float64
CHUNK = 500  # rows of a distance or kernel matrix that are in memory at once
CLASSIFIER_STEPS = 1000
CLASSIFIER_BATCH = 128  # images
DOWNLOAD_TIMEOUT = 60  # seconds without a byte

# The published procedure.
PAPER_IMAGES = 5
PAPER_DRAWS = 100  # times PAPER_IMAGES real images are scored in the same way, for comparison


class Metric(NamedTuple):
    """How tables and figures show a metric."""

    heading: str
    form: str  # of str.format


METRICS = {  # by their key in metrics.json
    "fid": Metric("FID", "{:.3g}"),
    "fid_infinity": Metric("FID∞", "{:.3g}"),
    "kid": Metric("KID", "{:.3g}"),
    "precision": Metric("precision", "{:.3f}"),
    "recall": Metric("recall", "{:.3f}"),
    "ssim_paired": Metric("SSIM paired", "{:.4f}"),
    "ssim_diversity": Metric("SSIM diversity", "{:.4f}"),
    "ssim_nearest": Metric("SSIM nearest", "{:.4f}"),
    "label_accuracy": Metric("label accuracy", "{:.3f}"),
    "distance_ratio": Metric("distance ratio", "{:.3f}"),
    "near_copies": Metric("near copies", "{:.3f}"),
}

# What is compared with what.
FLOOR = "real images (floor)"
PAIR = ["n_train", "label", "seed"]  # runs equal in these are compared with each other
BUDGET = ["steps", "batch_size", "lr", "muon_lr", "ema_decay"]  # what all runs should have alike
BUDGET += ["n_qubits", "n_layers", "timesteps", "sample_steps"]
BASELINES = ("matched", "classical")  # control arms: every other arm is compared with each
DECIDING_SEEDS = 5  # with fewer seeds the verdict is "too few seeds"
CLOSEST_PAIRS = 10  # of a run, in its closest_pairs.png

# Figures: a colour an arm (Okabe & Ito), a marker a condition of it.
OVERVIEW_COLUMNS = 12  # images in a row of overview.png
FIGURE_METRICS = ["fid", "kid", "precision", "recall"]
FIGURE_METRICS += ["ssim_diversity", "label_accuracy", "distance_ratio", "near_copies"]
ARM_COLOURS = {  # other arms take these in turn, with other markers
    "classical": "#000000",
    "matched": "#E69F00",
    "quantum": "#0072B2",
    "published": "#D55E00",
    "product": "#009E73",
    "frozen": "#CC79A7",
    "se": "#56B4E9",
}
MARKERS = "os^DvpP*X"


def random_stream(seed: int, *name: object) -> torch.Generator:
    """A generator that depends on ``seed`` and ``name`` alone.

    Every use of randomness has its own, so that none disturbs another.
    """
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# ----------------------------------------------------------------------------------- metrics
def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two Gaussians fitted to features (n, d) and (m, d) (Heusel et al. 2017).

        |mean_a - mean_b|^2 + tr A + tr B - 2 tr (A B)^(1/2)        A, B the covariances, n - 1

    tr (A B)^(1/2) is the sum of the singular values of X Y.T, where A = X.T X and B = Y.T Y. Taking
    it so works for covariances of any rank; scipy's sqrtm does not. Both sets have 2 or more
    images. Raises UserError for features that are not finite.
    """
    means = []
    roots = []  # X and Y, (at most d, d)
    for features in (a, b):
        if not np.isfinite(features).all():
            raise UserError("features are not finite: the images or the weights are bad")
        mean = features.mean(axis=0, dtype=np.float64)
        centred = (features - mean) / np.sqrt(len(features) - 1)  # centred.T centred = covariance
        means.append(mean)
        # R of QR: R.T R = centred.T centred, with at most d rows.
        roots.append(np.linalg.qr(centred, mode="r"))

    # The three terms of the formula.
    x, y = roots
    between_means = ((means[0] - means[1]) ** 2).sum()
    traces = (x**2).sum() + (y**2).sum()
    cross = linalg.svdvals(x @ y.T).sum()
    return float(between_means + traces - 2 * cross)


def frechet_infinity(features: np.ndarray, reference: np.ndarray, seed: int) -> float:
    """FID extrapolated to infinitely many generated images (Chong & Forsyth 2020, section 4).

    The bias of FID is linear in 1/n: a line through FID_INFINITY_SIZES subsets of n/4 to n images
    is read off at 1/n = 0. features (n, d), reference (m, d). NaN below n = 8 d: the smallest
    subset, n / 4, would have fewer than 2 d images, too few for the 1/n law.
    """
    n, d = features.shape
    if n < 8 * d:
        return math.nan

    # FID of random subsets of rising size.
    sizes = np.linspace(n / 4, n, FID_INFINITY_SIZES).astype(int)
    generator = random_stream(seed, "fid_infinity")
    values = []
    for size in sizes:
        subset = torch.randperm(n, generator=generator)[:size]
        values.append(frechet_distance(features[subset], reference))

    # The line's value at 1/n = 0.
    _slope, at_infinity = np.polyfit(1 / sizes, values, deg=1)
    return float(at_infinity)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """KID: unbiased squared MMD with the kernel (x.y / d + 1)^3, and its standard error.

    Bińkowski et al. 2018, section 4, over all pairs instead of random blocks; a (n, d), b (m, d).
    The standard error is the two-sample jackknife's, which leaves out each image once; NaN for
    fewer than 3 images. It is conservative near zero, where the estimator is degenerate.
    """
    n = len(a)
    m = len(b)

    # Each image's kernel with the others of its set, and with the other set.
    within_a = kernel_row_sums(a, a) - kernel_of_itself(a)  # (n,)
    within_b = kernel_row_sums(b, b) - kernel_of_itself(b)  # (m,)
    across_a = kernel_row_sums(a, b)  # (n,)
    across_b = kernel_row_sums(b, a)  # (m,)

    aa = within_a.sum()
    bb = within_b.sum()
    ab = across_a.sum()
    distance = float(unbiased_mmd(aa, bb, ab, n, m))
    if min(n, m) < 3:
        return distance, math.nan

    # Leaving image i of a out removes row i and column i of the kernel: 2 * within_a[i] from aa,
    # across_a[i] from ab.
    without_a = unbiased_mmd(aa - 2 * within_a, bb, ab - across_a, n - 1, m)  # (n,)
    without_b = unbiased_mmd(aa, bb - 2 * within_b, ab - across_b, n, m - 1)  # (m,)
    variance = (n - 1) * without_a.var() + (m - 1) * without_b.var()
    return distance, float(np.sqrt(variance))


def kernel_row_sums(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The sums over all rows of y (m, d) of their kernel with each row of x (n, d): (n,)."""
    sums = []
    for start in range(0, len(x), CHUNK):
        kernel = (x[start : start + CHUNK] @ y.T / x.shape[1] + 1) ** 3  # (chunk, m)
        sums.append(kernel.sum(axis=1))
    return np.concatenate(sums)


def kernel_of_itself(x: np.ndarray) -> np.ndarray:
    """The kernel of each row of x (n, d) with itself: (n,)."""
    return ((x * x).sum(axis=1) / x.shape[1] + 1) ** 3


def unbiased_mmd(aa: Any, bb: Any, ab: Any, n: int, m: int) -> Any:
    """Squared MMD from kernel sums: aa, bb within each set (no image with itself), ab across.

    The sums are numbers, or arrays of as many cases; n and m are the sets' sizes.
    """
    return aa / (n * (n - 1)) + bb / (m * (m - 1)) - 2 * ab / (n * m)


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, section 3), each in [0, 1].

    Precision: share of generated features inside a ball around some real feature that reaches to
    its k-th nearest other real feature; recall: the two sets exchanged. A point on a ball's surface
    is inside. real (n, d), generated (m, d); n and m should be equal. NaN with k or fewer images.
    """
    if min(len(real), len(generated)) <= k:
        return math.nan, math.nan
    real = torch.from_numpy(real)
    generated = torch.from_numpy(generated)
    precision = share_in_balls(generated, real, k)
    recall = share_in_balls(real, generated, k)
    return precision, recall


def share_in_balls(points: Tensor, centres: Tensor, k: int) -> float:
    """Share of points (n, d) in a ball around a centre (m, d) up to its k-th nearest other one."""
    # How far each ball reaches.
    radii = []
    for chunk in centres.split(CHUNK):
        distance = exact_distance(chunk, centres)  # (chunk, m), 0 to itself: hence k + 1
        radii.append(distance.kthvalue(k + 1).values)
    radii = torch.cat(radii)  # (m,)

    # Whether a point is in any of them.
    inside = []
    for chunk in points.split(CHUNK):
        inside.append((exact_distance(chunk, centres) <= radii).any(dim=1))
    return torch.cat(inside).double().mean().item()


def exact_distance(x: Tensor, y: Tensor) -> Tensor:
    """Distances of rows (n, d) and (m, d): (n, m). Exactly zero for equal rows.

    torch's default, |x|^2 + |y|^2 - 2 x.y, gives small distances that are not zero.
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean SSIM (Wang et al. 2004) of image i of ``a`` against image i of ``b``; 1 for equal ones.

    Images (N, C, H, W) uint8; the longer set is cut to the length of the shorter. scikit-image's
    defaults: a uniform 7x7 window, so that 22x22 of 28x28 pixels count (the 11x11 Gaussian window
    leaves 18x18); colour: the mean over the channels.
    """
    n = min(len(a), len(b))
    means = []
    for start in range(0, n, SSIM_CHUNK):
        end = min(start + SSIM_CHUNK, n)
        means.append(ssim_of_each(a[start:end], b[start:end]))
    return float(np.concatenate(means).mean())


def ssim_of_each(a: Tensor, b: Tensor) -> np.ndarray:
    """SSIM of image i of ``a`` against image i of ``b``, both (N, C, H, W) uint8: (N,)."""
    # One call for all images, stacked into one tall picture. Windows across the border of two
    # images mix them, but only within three pixels of it, and SSIM leaves those out anyway.
    width = a.shape[-1]
    _mean, values = structural_similarity(
        a.reshape(-1, width).numpy(), b.reshape(-1, width).numpy(), data_range=255, full=True
    )  # values: (N C H, W)
    values = values.reshape(a.shape)[..., 3:-3, 3:-3]  # (N, C, H - 6, W - 6)
    return values.mean(axis=(1, 2, 3))


def ssim_diversity(images: Tensor, seed: int) -> float:
    """Mean SSIM over pairs of the images (N, C, H, W) uint8: 1 means that all are the same.

    Over all pairs, or over SSIM_PAIRS random ones when there are more.
    """
    n = len(images)
    if n * (n - 1) // 2 <= SSIM_PAIRS:
        first, second = torch.combinations(torch.arange(n)).T
    else:
        generator = random_stream(seed, "ssim_diversity")
        first = torch.randint(n, (SSIM_PAIRS,), generator=generator)
        offset = torch.randint(1, n, (SSIM_PAIRS,), generator=generator)
        second = (first + offset) % n  # never the same image

    return ssim(images[first], images[second])


def pixels(images: Tensor) -> Tensor:
    """The images as they are. Of digits the search for copies compares these."""
    return images


def nearest_images(
    images: Tensor, training: Tensor, compared: Callable[[Tensor], Tensor] = pixels
) -> tuple[np.ndarray, np.ndarray]:
    """For each image its nearest training image: (distance, index), each (N,).

    Images (N, C, H, W) and (M, C, H, W) uint8. ``compared`` makes whole numbers of them, and the
    distance is the root mean square difference of these over 255: for pixels black to white is 1.
    Integers below 2^53 are exact in float64, so a copy has distance 0 exactly.
    """
    a = compared(images).flatten(1).double()  # (N, d)
    a_squared = a.square().sum(dim=1, keepdim=True)  # (N, 1)

    # The nearest so far; the training images in pieces, as a whole class may be 100,000.
    smallest = torch.full((len(a),), math.inf, dtype=torch.float64)
    index = torch.zeros(len(a), dtype=torch.int64)
    for start in range(0, len(training), CHUNK):
        b = compared(training[start : start + CHUNK]).flatten(1).double()  # (chunk, d)
        squared = a_squared + b.square().sum(dim=1) - 2 * (a @ b.T)  # |x - y|^2, (N, chunk)
        nearest = squared.min(dim=1)
        is_nearer = nearest.values < smallest
        smallest = torch.where(is_nearer, nearest.values, smallest)
        index = torch.where(is_nearer, start + nearest.indices, index)

    distance = (smallest / a.shape[1]).sqrt() / 255
    return distance.numpy(), index.numpy()


# -------------------------------------------------------------- networks: from images to features
@dataclass(frozen=True)
class Extractor:
    """A network and how images are prepared for it. Features depend on nothing else."""

    name: str
    preprocessing: str  # in words, for the record
    model: nn.Module
    prepare: Callable[[Tensor], Tensor]  # uint8 (N, C, H, W) to what the model takes
    channels: int  # grey images are repeated to as many
    device: torch.device | str
    batch: int = 100  # images at once, which changes memory and time alone

    def __str__(self) -> str:
        """Name and the SHA-256 of the weights, for example ``classifier:0f3a9c12d4e5``."""
        state = self.model.state_dict()
        weights = [state[key] for key in sorted(state)]
        return f"{self.name}:{content_hash(*weights)[:12]}"

    def features(self, images: Tensor) -> np.ndarray:
        """Features (N, d) float64 of images (N, C, H, W) uint8."""

        def compute(part: Tensor) -> Tensor:
            part = part.expand(-1, self.channels, -1, -1)
            return self.model(self.prepare(part).to(self.device)).double()

        with torch.inference_mode():
            return in_batches(compute, images, self.batch, self.name).numpy()


def in_batches(
    compute: Callable[[Tensor], Tensor], images: Tensor, batch: int, name: str | None = None
) -> Tensor:
    """What ``compute`` makes of images (N, ...), a batch at a time: (N, ...) on the CPU.

    ``name`` is that of a progress bar (None: no bar). All batches go into one tensor: a list of
    small results that lie between large intermediate ones would keep two gigabytes from being used
    again.
    """
    # The first batch tells shape and type, even when there are no images.
    first = compute(images[:batch])
    result = torch.empty((len(images), *first.shape[1:]), dtype=first.dtype)
    result[:batch] = first

    starts = range(batch, len(images), batch)
    for start in tqdm(starts, name, delay=2, leave=False, disable=name is None):
        result[start : start + batch] = compute(images[start : start + batch])
    return result


def cached_features(extractor: Extractor, images: Tensor, folder: Path) -> np.ndarray:
    """Features (N, d); read from ``folder`` when the same images and weights made them before."""
    record = {"images": content_hash(images), "made_by": f"{extractor.preprocessing} {extractor}"}
    name = hashlib.sha256(repr(record).encode()).hexdigest()[:24]

    def make() -> Tensor:
        return torch.from_numpy(extractor.features(images))

    return cached(folder / f"features_{name}.pt", record, make).numpy()


def content_hash(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' types, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        for part in torch.atleast_1d(tensor).split(CHUNK):  # contiguous copies of a few images only
            digest.update(part.cpu().contiguous().numpy())
    return digest.hexdigest()


def cached(path: Path, record: dict[str, Any], make: Callable[[], Any]) -> Any:
    """What ``make`` returns (tensors, numbers), or the same from ``path``.

    ``record`` says what it is made from, and a file with another record is not taken. A file that
    cannot be read or written (another user's folder) costs a line, not the evaluation.
    """
    wanted = "from the same images and settings"
    try:
        if path.exists():
            content = load_tensors(path, wanted)
            with reading(path, wanted):
                if content["record"] != record:
                    raise ValueError("another record")
                return content["state"]
    except (UserError, OSError) as error:
        note(f"{error}: made again")

    # Made, and kept where that is possible.
    state = make()
    buffer = io.BytesIO()
    torch.save({"record": record, "state": state}, buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        note(f"{path} not kept ({error.strerror}): --data_dir is not writable")
    return state


def inception_extractor(weights: Path | None, device: torch.device | str) -> Extractor:
    """torchvision's InceptionV3: 2,048 features after the last pooling.

    The preprocessing is the one that torchvision documents for these weights: resize to 342
    (bilinear, antialiased), centre crop 299, ImageNet's mean and deviation. Grey is repeated.
    ``weights`` is a local copy (None: downloaded). Raises UserError when the weights cannot be had
    or the file does not hold them.
    """
    official = Inception_V3_Weights.IMAGENET1K_V1
    way_out = "give a local copy with --inception_weights FILE, or use --features classifier"
    with reading(weights or official.url, f"InceptionV3's weights; {way_out}"):
        if weights is not None:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        else:
            state = download_inception(official)

        # Without the auxiliary head; building it draws weights, which is nobody's randomness.
        with torch.random.fork_rng(devices=[]):
            model = inception_v3(aux_logits=False, transform_input=True, init_weights=False)
        main_part = {key: x for key, x in state.items() if not key.startswith("AuxLogits.")}
        model.load_state_dict(main_part)

    model.fc = nn.Identity()  # features instead of ImageNet's classes
    return Extractor(
        name="inception",
        preprocessing=str(official.transforms()),
        model=model.eval().to(device),
        prepare=official.transforms(),
        channels=3,
        device=device,
        batch=25,  # of 299x299 pixels
    )


def download_inception(weights: Inception_V3_Weights) -> dict[str, Tensor]:
    """The weights from torch's cache or, once, from torchvision's server.

    Raises OSError when the server does not answer within DOWNLOAD_TIMEOUT.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not (folder / Path(weights.url).name).exists():
        note(f"downloading InceptionV3's weights (104 MB) from {weights.url} to {folder}")

    before = socket.getdefaulttimeout()  # torch sets none: a silent proxy would be waited for
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    finally:
        socket.setdefaulttimeout(before)


def classifier_extractor(classifier: nn.Sequential, device: torch.device | str) -> Extractor:
    """The layers of a classifier before its last: 64 features."""
    return Extractor(
        name="classifier",
        preprocessing="x / 127.5 - 1",
        model=copy.deepcopy(classifier[:-1]).to(device),
        prepare=to_float,
        channels=classifier[0].in_channels,
        device=device,
    )


def build_classifier(channels: int, classes: int, seed: int) -> nn.Sequential:
    """A small CNN for 28x28 images; the layers before the last give 64 features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 24, kernel_size=5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),  # (N, 24, 14, 14)
            nn.Conv2d(24, 48, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(48),
            nn.ReLU(),  # (N, 48, 7, 7)
            nn.Conv2d(48, 64, kernel_size=3, stride=1, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),  # (N, 64, 7, 7)
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 64),
            nn.ReLU(),  # (N, 64): the features
            nn.Linear(64, classes),
        )


def train_classifier(images: Tensor, labels: Tensor, seed: int) -> nn.Sequential:
    """Train on images (N, C, 28, 28) uint8 and labels (N,).

    Adam under a one-cycle learning rate, whole passes in random order, shifts of up to 2 pixels.
    """
    model = build_classifier(images.shape[1], int(labels.max()) + 1, seed)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=5e-3, total_steps=CLASSIFIER_STEPS, pct_start=0.2
    )

    # One stream draws the passes and the shifts.
    generator = random_stream(seed, "classifier")
    order = torch.empty(0, dtype=torch.int64)  # images whose turn is next
    for _ in tqdm(range(CLASSIFIER_STEPS), "classifier", delay=2, leave=False):
        # The next batch; another pass begins where too few are left of this one.
        while len(order) < CLASSIFIER_BATCH:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        chosen = order[:CLASSIFIER_BATCH]
        order = order[CLASSIFIER_BATCH:]

        # All of its images are shifted alike, cyclically.
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        batch = to_float(images[chosen]).roll(shift, dims=(2, 3))  # (B, C, 28, 28)
        loss = F.cross_entropy(model(batch), labels[chosen])

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    model.eval()
    scale_features(model, images[:CLASSIFIER_BATCH])
    return model


def scale_features(classifier: nn.Sequential, images: Tensor) -> None:
    """Bring the features' root mean square over the images to 1, which KID's kernel expects.

    Dividing the layer before the ReLU and multiplying the one after it by the same number changes
    no output.
    """
    before_features = classifier[-3]  # Linear, before the ReLU
    after_features = classifier[-1]  # Linear, to the classes
    with torch.no_grad():
        scale = classifier[:-1](to_float(images)).square().mean().sqrt()
        before_features.weight /= scale
        before_features.bias /= scale
        after_features.weight *= scale


def accuracy(classifier: nn.Sequential, images: Tensor, labels: Tensor | int) -> float:
    """Share of images (N, C, 28, 28) uint8 that are given these labels, (N,) or one for all."""
    guesses = []
    with torch.inference_mode():
        for part in images.split(CHUNK):
            guesses.append(classifier(to_float(part)).argmax(dim=1))
    return (torch.cat(guesses) == labels).double().mean().item()


class Split(NamedTuple):
    """Real images of one split of a data set, all classes."""

    images: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,)

    def of_class(self, label: int) -> Tensor:
        """The images (n, C, H, W) of one class."""
        return self.images[self.labels == label]

    def of_classes(self, labels: Sequence[int]) -> "Split":
        """The images of some classes, in the split's order."""
        chosen = torch.isin(self.labels, torch.tensor(labels))
        return Split(self.images[chosen], self.labels[chosen])


def load_classifier(
    source: str, folder: Path, train: Split, tested_on: dict[str, Split], seed: int
) -> tuple[nn.Sequential, dict[str, Any]]:
    """The data set's classifier and its record, trained when ``folder`` has none with that record.

    The record: source, seed, steps, content hash of the training images and labels, and its
    accuracy on the splits that it is tested on, by their names. Raises UserError when there is but
    one class.
    """
    if len(train.labels.unique()) < 2:
        ways_out = "--features none or inception, or leave --features out"
        raise UserError(f"{source} has a single class, which trains no classifier; use {ways_out}")

    record = {
        "source": source,
        "seed": seed,
        "steps": CLASSIFIER_STEPS,
        "n_train": len(train.images),
        "trained_on": content_hash(train.images, train.labels),
    }
    for name, split in tested_on.items():
        record[f"n_{name}"] = len(split.images)

    def make() -> dict[str, Any]:
        trained = train_classifier(train.images, train.labels, seed)
        accuracies = {
            f"{name}_accuracy": accuracy(trained, split.images, split.labels)
            for name, split in tested_on.items()
        }
        return {"weights": trained.state_dict(), "accuracies": accuracies}

    kept = cached(folder / f"classifier_{source}_seed{seed}.pt", record, make)
    model = build_classifier(train.images.shape[1], int(train.labels.max()) + 1, seed)
    model.load_state_dict(kept["weights"])
    return model.eval(), record | kept["accuracies"]


# ----------------------------------------------------------- a run, and real images beside it
@dataclass(frozen=True)
class DataSet:
    """What differs between the MNIST and the PathMNIST command line."""

    module: Any  # the training script
    sources: dict[str, str]  # data source, as in a run's settings: the split that is held out
    withdrawn: dict[str, tuple[float, float]]  # the paper's FID and paired SSIM, by arm
    features: dict[str, Callable[[Tensor], Extractor]]  # --features of its own; the first: default
    # What of the images (N, C, H, W) uint8 is compared in the search for copies: whole numbers.
    compared: Callable[[Tensor], Tensor]


MNIST = DataSet(
    module=mnist,
    sources={"mnist": "test", "digits": "test"},
    withdrawn={"classical": (271.05, 0.1085), "quantum": (259.25, 0.1263)},
    features={},
    compared=pixels,
)


class Run(NamedTuple):
    """A finished run."""

    folder: Path
    name: str  # the folder's
    arm: str  # with its condition, as in tables: "quantum shots1000"
    condition: str  # "": ideal
    settings: dict[str, Any]  # config.json's
    trained_on: dict[str, Any]  # config.json's description of the training images
    images: Tensor  # the final ones, (N, C, 28, 28) uint8


def read_run(folder: Path, dataset: DataSet) -> Run:
    """Read a run folder. Raises UserError when it is none, unfinished, or of another data set."""
    path = folder / "config.json"
    config = mnist.read_config(path)
    settings = config["settings"]
    source = settings.get("data")
    if source not in dataset.sources:
        scripts = "cal_fid_ssim.py measures MNIST, cal_fid_ssim_medmnist.py PathMNIST"
        raise UserError(f"{folder}: data set {source}; {scripts}")

    # Recompute the condition from the settings: one that differs comes from another version of the
    # script. "label_name" is written for readers of config.json and is no setting.
    with reading(path, "a run's configuration"):
        if settings["arm"] not in dataset.module.ARMS:
            raise ValueError(f"its arm {settings['arm']} is not in the training script's ARMS")
        fields = {key: value for key, value in settings.items() if key != "label_name"}
        condition = dataset.module.Settings(**fields).condition
        if condition != config["condition"]:
            raise ValueError(f"condition {config['condition']}, its settings are {condition}")
        n_eval = config["n_eval"]

    # Its final images: as many as the configuration says, to the bit.
    grid = folder / "samples_final.png"
    if not grid.exists():
        raise UserError(f"{folder}: not finished, no {grid.name}; {config.get('command', '')}")
    split = split_grid(grid, n_eval)
    if split.method != "metadata":
        raise UserError(f"{grid}: not the lossless grid that the run wrote")
    if len(split.images) != n_eval or n_eval < 2:
        expected = f"expected n_eval = {n_eval} of {path.name}, and at least 2"
        raise UserError(f"{grid}: {len(split.images)} images, {expected}")

    return Run(
        folder=folder,
        name=folder.resolve().name,
        arm=f"{settings['arm']} {condition}".strip(),
        condition=condition,
        settings=settings,
        trained_on=config["images"],
        images=split.images,
    )


class Sample(NamedTuple):
    """Images with their features."""

    images: Tensor  # (N, C, H, W) uint8
    features: np.ndarray  # (N, d) float64; d = 0 with --features none

    def take(self, index: Tensor) -> "Sample":
        """Those with these numbers, in this order."""
        return Sample(self.images[index], self.features[index])


class TrainingSet(NamedTuple):
    """The images that runs were trained on, and held-out images of the same class."""

    images: Tensor  # (M, C, H, W) uint8
    held_out: Tensor  # (n, C, H, W) uint8
    held_out_distance: np.ndarray  # (n,): of each held-out image to its nearest training image
    held_out_nearest: np.ndarray  # (n,): the number of that training image


class ClosestPairs(NamedTuple):
    """The generated images of a run that are nearest to a training image."""

    generated: Tensor  # (n, C, H, W) uint8
    training: Tensor  # (n, C, H, W) uint8
    distance: np.ndarray  # (n,), rising
    threshold: float  # at most so far is a near-copy


class Measurement(NamedTuple):
    """What was found of a run."""

    result: dict[str, Any]  # as it goes into metrics.json
    closest_pairs: ClosestPairs


class Evaluator:
    """Measures runs of one data source; what runs share (real images, floors) is kept."""

    def __init__(self, dataset: DataSet, source: str, options: argparse.Namespace) -> None:
        self.dataset = dataset
        self.source = source
        self.options = options
        self.folder = options.data_dir / "evaluation"  # of the classifier and features

        # real(which) and floor(which, n) are measure_real and measure_floor, each measured once.
        self.real = functools.cache(self.measure_real)
        self.floor = functools.cache(self.measure_floor)

        # Held-out images are new to the models and have the training images' distribution.
        # PathMNIST's test split comes from another clinic, so its val split is held out.
        self.held_out_name = dataset.sources[source]
        self.train = self.load_split("train")
        self.held_out = self.load_split(self.held_out_name)

        # The classifier judges labels. One class trains no classifier; where its features are asked
        # for all the same, load_classifier raises the error.
        self.classifier = None
        self.classifier_record = None
        if options.features == "classifier" or len(self.train.labels.unique()) > 1:
            tested_on = {self.held_out_name: self.held_out}
            if "test" not in tested_on:
                tested_on["test"] = self.load_split("test")
            self.classifier, self.classifier_record = load_classifier(
                source, self.folder, self.train, tested_on, options.seed
            )

        # What FID, KID, precision and recall compare.
        if options.features == "none":
            self.extractor = None
        elif options.features == "classifier":
            self.extractor = classifier_extractor(self.classifier, options.device)
        elif options.features == "inception":
            self.extractor = inception_extractor(options.inception_weights, options.device)
        else:
            self.extractor = dataset.features[options.features](self.train.images)

    def load_split(self, name: str) -> Split:
        """The real images of one split, all classes."""
        load_images = self.dataset.module.load_images
        _, images, labels = load_images(self.source, self.options.data_dir, name)
        return Split(images, labels)

    def stream(self, *name: object) -> torch.Generator:
        """The evaluation's randomness for one purpose."""
        return random_stream(self.options.seed, "evaluation", *name)

    def sample(self, images: Tensor) -> Sample:
        """Images (N, C, H, W) uint8 with their features."""
        if self.extractor is None:
            return Sample(images, np.empty((len(images), 0)))
        return Sample(images, self.extractor.features(images))

    def measure_real(self, which: int | str) -> tuple[Sample, Sample]:
        """Reference images (training split) and held-out images, with features.

        ``which`` is a class or "all". At most ``--n_real`` of each.
        """
        return self.real_sample(self.train, which), self.real_sample(self.held_out, which)

    def real_sample(self, split: Split, which: int | str) -> Sample:
        """At most ``--n_real`` images of a class or of "all", in the split's order."""
        images = split.images if which == "all" else split.of_class(which)
        if len(images) <= NEIGHBOURS:
            raise UserError(
                f"{self.source}, class {which}: {len(images)} real images in "
                f"{self.options.data_dir}, expected more than {NEIGHBOURS}"
            )

        # A random subset, the same for every run.
        if len(images) > self.options.n_real:
            order = torch.randperm(len(images), generator=self.stream("reference"))
            images = images[order[: self.options.n_real].sort().values]

        if self.extractor is None:
            return self.sample(images)
        return Sample(images, cached_features(self.extractor, images, self.folder))

    def compare(self, sample: Sample, reference: Sample) -> dict[str, float]:
        """The metrics that compare two sets of images; NaN: not measured here."""
        metrics = dict.fromkeys([*METRICS, "kid_standard_error"], math.nan)
        # Image i with reference image i: an arbitrary pairing, kept because it was published.
        metrics["ssim_paired"] = ssim(sample.images, reference.images)
        metrics["ssim_diversity"] = ssim_diversity(sample.images, self.options.seed)
        if self.extractor is None:
            return metrics

        a = sample.features
        b = reference.features
        metrics["fid"] = frechet_distance(a, b)
        metrics["fid_infinity"] = frechet_infinity(a, b, self.options.seed)
        metrics["kid"], metrics["kid_standard_error"] = kernel_distance(a, b)

        # Precision and recall depend on the sets' sizes: equal numbers.
        size = min(len(a), len(b))
        chosen = torch.randperm(len(b), generator=self.stream("equal"))[:size]
        precision, recall = precision_recall(b[chosen], a[:size], NEIGHBOURS)
        metrics["precision"] = precision
        metrics["recall"] = recall
        return metrics

    def measure_floor(self, which: int | str, n: int) -> dict[str, Any]:
        """What n real images of a class or of "all" score against the reference: mean over draws.

        The n images are drawn from the held-out split. If it has fewer than n, they are drawn from
        the reference (at most half of it) and compared with the part that was not drawn. One draw
        is enough above FID_WARNING_BELOW images.
        """
        reference, held_out = self.real(which)
        if n <= len(held_out.images):
            pool = held_out
            size = n
            origin = f"{self.held_out_name} split"
        else:
            pool = reference
            size = min(n, len(reference.images) // 2)
            origin = "training split, set aside"

        # Random draws are compared as if they were generated.
        draws = []
        for draw in range(FLOOR_DRAWS if size <= FID_WARNING_BELOW else 1):
            order = torch.randperm(len(pool.images), generator=self.stream("floor", draw))
            rest = reference.take(order[size:]) if pool is reference else reference
            draws.append(self.compare(pool.take(order[:size]), rest))

        floor = {"n": size, "draws": len(draws), "from": origin}
        for key in draws[0]:  # the metrics
            floor[key] = float(np.mean([metrics[key] for metrics in draws]))
        return floor

    def training_images(self, run: Run) -> Tensor:
        """The images (M, C, H, W) uint8 that a run was trained on, with symmetries if it was.

        Raises UserError when they are not the ones that its configuration describes.
        """
        module = self.dataset.module
        label, n_train, seed = (run.settings[key] for key in ("label", "n_train", "seed"))
        images = module.select_images(*self.train, label, n_train, seed)
        digest = hashlib.sha256(images.contiguous().numpy()).hexdigest()
        if digest != run.trained_on.get("sha256"):
            place = self.options.data_dir
            raise UserError(f"{run.folder}: trained on other images than are in {place}")
        return module.symmetries(images) if "symmetries" in run.trained_on else images

    def training_set(self, run: Run) -> TrainingSet:
        """A run's training images and how near held-out images are to them."""
        images = self.training_images(run)
        held_out = self.held_out.of_class(run.settings["label"])
        if len(held_out) == 0:
            raise UserError(f"{run.folder}: no {self.held_out_name} images of its class")
        distance, nearest = nearest_images(held_out, images, self.dataset.compared)
        return TrainingSet(images, held_out, distance, nearest)

    def measure_all(self, runs: Sequence[Run]) -> Iterator[tuple[Run, Measurement]]:
        """Measure runs one by one; those of one training set follow each other and share it."""
        by_training_set = itertools.groupby(sorted(runs, key=training_key), key=training_key)
        for _, group in by_training_set:
            alike = list(group)
            training = self.training_set(alike[0])
            for run in alike:
                yield run, self.measure(run, training)
            del training  # before the next is made: with symmetries it takes much memory

    def measure(self, run: Run, training: TrainingSet) -> Measurement:
        """All figures of a run, and its closest pairs.

        Raises UserError when the images have another shape than the real ones.
        """
        label = run.settings["label"]
        which = label if self.options.reference == "class" else "all"
        reference, _ = self.real(which)
        shape = tuple(run.images.shape[1:])
        expected = tuple(reference.images.shape[1:])
        if shape != expected:
            raise UserError(
                f"{run.folder}: images of {shape}, the real ones are of {expected} "
                "(channels, height, width)"
            )

        # The generated images against the reference, and as many real ones against it.
        metrics = self.compare(self.sample(run.images), reference)
        floor = dict(self.floor(which, len(run.images)))  # a copy: other runs share the cached one

        # Copies: the training image nearest to each generated and to each held-out image.
        held_out_distance = training.held_out_distance
        held_out_nearest = training.images[training.held_out_nearest]
        distance, index = nearest_images(run.images, training.images, self.dataset.compared)
        nearest = training.images[index]
        metrics |= copy_statistics(run.images, distance, nearest, held_out_distance)
        floor |= copy_statistics(
            training.held_out, held_out_distance, held_out_nearest, held_out_distance
        )

        # Labels: the share that the classifier takes for the run's class.
        if self.classifier is not None:
            metrics["label_accuracy"] = accuracy(self.classifier, run.images, label)
            floor["label_accuracy"] = accuracy(self.classifier, training.held_out, label)

        threshold = near_copy_threshold(held_out_distance)
        closest = np.argsort(distance, kind="stable")[:CLOSEST_PAIRS]
        pairs = ClosestPairs(
            generated=run.images[closest],
            training=nearest[closest],
            distance=distance[closest],
            threshold=threshold,
        )
        result = {
            "run": run.name,
            "condition": run.condition,
            "settings": run.settings,
            "reference": self.options.reference,
            "n_generated": len(run.images),
            "n_real": len(reference.images),
            "n_training": len(training.images),
            "n_held_out": len(training.held_out),
            "features": str(self.extractor or "none"),
            "preprocessing": self.extractor and self.extractor.preprocessing,
            "classifier": self.classifier_record,
            "near_copy_threshold": threshold,
            "metrics": without_nan(metrics),
            "floor": without_nan(floor),
            "note": "; ".join(self.notes(run, floor)),
        }
        return Measurement(result, pairs)

    def notes(self, run: Run, floor: dict[str, Any]) -> list[str]:
        """What a reader of the run's row must know."""
        n = len(run.images)
        notes = []
        if self.extractor is not None and n < FID_WARNING_BELOW:
            notes.append(f"FID biased upwards: n < {FID_WARNING_BELOW}")
        if "symmetries" in run.trained_on:
            notes.append("trained with augmentation")
        if floor["n"] < n:
            notes.append(f"floor at n = {floor['n']}")
        if self.source in ("digits", "tissue"):
            notes.append(f"against embedded {self.source}")
        return notes


def training_key(run: Run) -> tuple[int, float, int, bool, str]:
    """Equal for runs that were trained on the same images in the same order; can be sorted."""
    n_train = run.settings["n_train"]
    size = math.inf if n_train is None else n_train

    # The checksum is that of the images before their symmetries.
    augmented = "symmetries" in run.trained_on
    checksum = str(run.trained_on.get("sha256"))
    return run.settings["label"], size, run.settings["seed"], augmented, checksum


def copy_statistics(
    images: Tensor, distance: np.ndarray, nearest: Tensor, held_out_distance: np.ndarray
) -> dict[str, float]:
    """How near images (N, C, H, W) uint8 are to the training images ``nearest`` to them.

    distance (N,): of each image to its nearest training image; held_out_distance (n,): the same of
    held-out images. The ratio is NaN where at least half of the held-out images are copies.
    """
    usual = np.median(held_out_distance)
    ratio = np.median(distance) / usual if usual > 0 else math.nan
    return {
        "ssim_nearest": ssim(images, nearest),
        "distance_ratio": float(ratio),
        "near_copies": float((distance <= near_copy_threshold(held_out_distance)).mean()),
    }


def near_copy_threshold(held_out_distance: np.ndarray) -> float:
    """A near-copy is at most so far from its nearest training image.

    It is the distance that 1 % of the held-out images are below, so that about 1 % of new images
    are called near-copies.
    """
    return float(np.percentile(held_out_distance, 1))


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """The same for JSON, which has no NaN: None."""
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in values.items()
    }


# -------------------------------------------------------------------------------------- tables
def comparison_csv(results: list[dict[str, Any]]) -> str:
    """``comparison.csv``: a row a run with settings, metrics (``fid``), floors (``floor_fid``)."""
    # Nested entries become columns: settings_steps, metrics_fid, floor_fid; two prefixes go.
    frame = pd.json_normalize(results, sep="_")
    frame.columns = [name.removeprefix("settings_").removeprefix("metrics_") for name in frame]
    floors = [name for name in frame if name.startswith("floor_")]
    columns = ["run", "arm", "condition", "data", "label", "n_train", "seed"]
    columns += BUDGET
    columns += ["features", "reference", "n_generated", "n_real", "n_training", "note"]
    columns += [*METRICS, "kid_standard_error"]
    columns += floors
    return frame[columns].astype({"n_train": "Int64"}).to_csv(index=False)


def read_comparison(file: Path | io.StringIO) -> pd.DataFrame:
    """``comparison.csv``, a row a run.

    Tables and figures are made of the csv, so that they can be made of it again. ``n_train`` is
    infinite for a whole class. ``name`` is the arm with its condition, an ordered category that
    ends with FLOOR.
    """
    # An empty cell is an empty text, or a number that is missing.
    texts = ["run", "arm", "condition", "note"]
    frame = pd.read_csv(
        file, dtype=dict.fromkeys(texts, str), keep_default_na=False, na_values=[""]
    )
    frame[texts] = frame[texts].fillna("")
    frame["n_train"] = frame["n_train"].fillna(np.inf)

    # The condition that the sampling steps alone give, "steps2" of "shots10_steps2"; "" for all
    # steps. A run whose condition is just this has no shots and no noise. (MNIST's Settings serve
    # for both data sets: the name depends on these two settings only.)
    frame["sampler_condition"] = [
        mnist.Settings(sample_steps=steps, timesteps=timesteps).condition
        for steps, timesteps in zip(frame["sample_steps"], frame["timesteps"], strict=True)
    ]

    # Arms in their usual order, also in tables and figures.
    frame["name"] = (frame["arm"] + " " + frame["condition"]).str.strip()
    names = sorted(set(zip(frame["arm"], frame["name"], strict=True)), key=order_of_arms)
    categories = [name for _, name in names]
    frame["name"] = pd.Categorical(frame["name"], [*categories, FLOOR], ordered=True)
    return frame


def order_of_arms(arm_and_name: tuple[str, str]) -> tuple[int, str]:
    """A sorting key: arms as in ARMS, each with its conditions; then arms that it does not know."""
    arm, name = arm_and_name
    place = list(ARMS).index(arm) if arm in ARMS else len(ARMS)
    return place, name


def shared_classes(frame: pd.DataFrame, within: list[str], series: list[str]) -> pd.DataFrame:
    """Keep only the classes that every series has.

    ``within`` splits the table into blocks; ``series`` splits a block into series (for example
    every arm and seed). In each block a class stays only if each series of it has that class, so
    that means over classes are over the same classes.
    """
    kept = []
    for _, rows in frame.groupby(within, observed=True):
        classes = rows.groupby(series, observed=True)["label"].agg(set)  # by series
        kept.append(rows[rows["label"].isin(set.intersection(*classes))])
    return pd.concat(kept).sort_index()


def comparable_runs(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs of those classes that every arm and seed has at a training-set size."""
    return shared_classes(frame, within=["n_train"], series=["name", "seed"])


def with_floors(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs, and below them their floors as rows of one seed that are named FLOOR."""
    floors = runs.assign(
        name=pd.Categorical([FLOOR] * len(runs), dtype=runs["name"].dtype),
        seed=0,
        **{key: runs[f"floor_{key}"] for key in METRICS},
    )
    return pd.concat([runs, floors])


def pair_differences(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """A row a pair of runs: the metrics of a run minus those of its baseline run.

    The two runs of a pair have the same class, training-set size and seed. Three kinds of pair: the
    baseline arm with shots or noise minus the same arm without; the baseline arm with fewer
    sampling steps minus the same arm with all; and, for an arm in BASELINES, every other arm minus
    it at the same sampling steps (the other arm may also have shots or noise). "name_base" is the
    baseline run's arm and condition.
    """
    is_baseline = frame["arm"] == baseline
    ideal_circuit = frame["condition"] == frame["sampler_condition"]  # no shots, no noise
    noiseless = frame[is_baseline & ideal_circuit]
    same_sampler = [*PAIR, "sample_steps"]

    # The circuit's condition differs: quantum shots10_steps2 − quantum steps2.
    noisy = frame[is_baseline & ~ideal_circuit]
    kinds = [pair(noisy, noiseless, same_sampler)]

    # The sampler's condition differs: quantum steps2 − quantum.
    all_steps = noiseless[noiseless["sampler_condition"] == ""]
    fewer_steps = noiseless[noiseless["sampler_condition"] != ""]
    kinds.append(pair(fewer_steps, all_steps, PAIR))

    # The arm differs, and perhaps the circuit's condition: quantum shots10_steps2 − matched steps2.
    if baseline in BASELINES:
        kinds.append(pair(frame[~is_baseline], noiseless, same_sampler))

    pairs = pd.concat(kinds, ignore_index=True)
    return pairs.assign(**{key: pairs[key] - pairs[f"{key}_base"] for key in METRICS})


def pair(runs: pd.DataFrame, baselines: pd.DataFrame, alike: list[str]) -> pd.DataFrame:
    """Runs beside the baselines that are alike in some columns: "fid" and "fid_base" and so on."""
    return runs.merge(baselines, on=alike, suffixes=("", "_base"))


def comparable_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs of those classes that every seed has, for each arm and training-set size."""
    if len(pairs) == 0:
        return pairs
    return shared_classes(pairs, within=["n_train", "name"], series=["seed"])


def class_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over the classes: index n_train, name, seed, columns METRICS.

    NaN when one class is NaN, so that all means are over the same classes.
    """
    groups = frame.groupby(["n_train", "name", "seed"], observed=True)[[*METRICS]]
    complete = groups.count().eq(groups.size(), axis=0)
    return groups.mean()[complete]


def interval(values: pd.Series) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval by Student's t; NaN half-width for one value."""
    quantile = stats.t.ppf(0.975, values.count() - 1)
    return values.mean(), quantile * values.sem()


class Difference(NamedTuple):
    """An arm minus a baseline in one metric at one training-set size."""

    name: str  # of the arm, with its condition
    baseline: str  # the same of what is taken away
    n_train: float
    metric: str
    pairs: int
    seeds: int
    mean: float  # over seeds, of the means over classes
    half: float  # of the 95 % interval; NaN: one seed

    @property
    def leaves_zero_out(self) -> bool:
        """Whether zero is outside of the interval."""
        return abs(self.mean) > self.half

    @property
    def verdict(self) -> str:
        """Whether this is clear of zero; fewer than DECIDING_SEEDS decide nothing."""
        if self.seeds < DECIDING_SEEDS:
            return "too few seeds"
        return "yes" if self.leaves_zero_out else "no"


def paired_differences(pairs: pd.DataFrame) -> list[Difference]:
    """The mean difference and its interval, of every arm in every metric that was measured.

    ``pairs`` are comparable. Classes are averaged for each seed; the interval is over seeds. A
    seed with a class that could not be measured is left out.
    """
    means = class_means(pairs)

    differences = []
    for (name, n_train), group in pairs.groupby(["name", "n_train"], observed=True):
        (baseline_name,) = group["name_base"].unique()
        for metric in METRICS:
            by_seed = means.loc[(n_train, name), metric].dropna()
            if len(by_seed) == 0:
                continue  # it was not measured
            mean, half = interval(by_seed)
            differences.append(
                Difference(
                    name=name,
                    baseline=baseline_name,
                    n_train=n_train,
                    metric=metric,
                    pairs=group["seed"].isin(by_seed.index).sum(),
                    seeds=len(by_seed),
                    mean=mean,
                    half=half,
                )
            )
    return differences


# From here on numbers become text.
def show(value: float, form: str, missing: str = "–") -> str:
    """A number for a table; a dash for what could not be measured.

    Twelve digits are taken first: a mean that is 0.8585 but for the order of its sum would be
    0.858 with one version of pandas and 0.859 with another.
    """
    return form.format(float(f"{value:.12g}")) if np.isfinite(value) else missing


def show_size(n_train: float) -> str:
    """A training-set size: "all" for a whole class."""
    return show(n_train, "{:.0f}", "all")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also aligned on a terminal."""
    # Markdown reads a bar as the end of a cell.
    lines = [list(header)]
    for row in rows:
        lines.append([cell.replace("|", "¦") for cell in row])

    # Columns as wide as their widest cell, a rule under the header.
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def result_table(frame: pd.DataFrame) -> str:
    """One row a run, below it what real images score at the same n."""
    rows = []
    for run in frame.to_dict("records"):
        n_real = str(run["n_real"])
        features = run["features"]
        row = [run["run"], str(run["n_generated"]), n_real, features]
        row += metric_cells(run, prefix="")
        rows.append([*row, run["note"]])

        row = [f"  {FLOOR}", str(run["floor_n"]), n_real, features]
        row += metric_cells(run, prefix="floor_")
        rows.append([*row, run["floor_from"]])

    headings = [metric.heading for metric in METRICS.values()]
    return table(["run", "n", "n real", "features", *headings, "note"], rows)


def metric_cells(run: dict[str, Any], prefix: str) -> list[str]:
    """A run's metrics, or with the prefix ``floor_`` its floors; KID with its standard error."""
    cells = {key: show(run[prefix + key], METRICS[key].form) for key in METRICS}
    cells["kid"] += show(run[f"{prefix}kid_standard_error"], " ±{:.1g}", missing="")
    return list(cells.values())


def arm_table(frame: pd.DataFrame) -> str:
    """Per training-set size and arm: mean over seeds and 95 % interval; then the floor."""
    frame = with_floors(comparable_runs(frame))
    means = class_means(frame)
    keys = [key for key in METRICS if frame[key].notna().any()]

    rows = []
    for (size, name), runs in frame.groupby(["n_train", "name"], observed=True):
        seeds = "–" if name == FLOOR else each_once(runs["seed"])
        row = [show_size(size), name, each_once(runs["label"]), seeds]
        row += [each_once(runs["n_generated"]), each_once(runs["n_real"])]
        for key in keys:
            mean, half = interval(means.loc[(size, name), key])
            form = METRICS[key].form
            row.append(show(mean, form) + show(half, f" ± {form}", missing=""))
        rows.append(row)

    header = ["N", "arm", "classes", "seeds", "n generated", "n real"]
    return table([*header, *(METRICS[key].heading for key in keys)], rows)


def each_once(values: pd.Series) -> str:
    """The different values in rising order, for example 0/1/2."""
    return "/".join(str(value) for value in sorted(set(values)))


def difference_table(differences: Sequence[Difference]) -> str:
    """A row a difference; a star where the interval leaves zero out."""
    rows = []
    for item in differences:
        metric = METRICS[item.metric]
        signed = metric.form.replace("{:", "{:+")  # "+0.12"
        limits = "–"
        if item.seeds > 1:
            low = show(item.mean - item.half, signed)
            high = show(item.mean + item.half, signed)
            limits = f"[{low}, {high}]" + (" *" if item.leaves_zero_out else "")
        row = [f"{item.name} − {item.baseline}", show_size(item.n_train), metric.heading]
        row += [str(item.pairs), str(item.seeds), show(item.mean, signed), limits, item.verdict]
        rows.append(row)

    header = ["difference", "N", "metric", "pairs", "seeds", "mean", "95 % interval", "clear of 0"]
    return table(header, rows)


FLOOR_TEXT = (
    "A floor is the mean over draws of as many held-out images as were generated, and the ± of its "
    "KID is that of one draw. Its SSIM nearest, distance ratio, near copies and label accuracy are "
    "of all held-out images: the ratio is 1 and near copies are about 0.01 by construction."
)


def comparison_text(frame: pd.DataFrame) -> str:
    """The Markdown report on several runs."""
    features = ", ".join(sorted(set(frame["features"])))
    paragraphs = [
        "# Comparison of runs",
        f"Features: {features}. Real images: {frame['data'][0]}, "
        f"reference {frame['reference'][0]}. Mean over seeds ± half of the 95 % interval "
        f"(Student's t). {FLOOR}: held-out images, as many as generated.",
        FLOOR_TEXT,
        f"Budget: {budget_text(frame)}.",
        notes_text(frame),
        arm_table(frame),
        left_out_text(len(frame) - len(comparable_runs(frame)), len(frame), "runs"),
    ]

    # All arms against the two controls, then every arm's conditions against the arm itself.
    others = [arm for arm in ARMS if arm not in BASELINES]
    for baseline in (*BASELINES, *others):
        all_pairs = pair_differences(frame, baseline)
        pairs = comparable_pairs(all_pairs)
        differences = paired_differences(pairs)
        if len(all_pairs) > 0:
            paragraphs.append(f"## Paired differences against {baseline}")
            paragraphs.append(difference_table(differences))
            paragraphs.append(left_out_text(len(all_pairs) - len(pairs), len(all_pairs), "pairs"))
            paragraphs.append(chance_text(differences))

    paragraphs += ["## Runs", result_table(frame)]
    return "\n\n".join(text for text in paragraphs if text) + "\n"


def left_out_text(left_out: int, of: int, what: str) -> str:
    """How many runs or pairs the table above leaves out, and why; empty when it has all."""
    if left_out == 0:
        return ""
    need = {"runs": "every arm and seed of that size", "pairs": "every seed of that difference"}
    return f"{left_out} of {of} {what} are left out: {need[what]} must have the class."


def budget_text(frame: pd.DataFrame) -> str:
    """What the runs were allowed, in bold where they differ."""
    texts = []
    for column in [*BUDGET, "n_generated"]:
        if column not in frame:  # a table of an earlier version
            continue
        values = frame[column].unique()
        heading = "images" if column == "n_generated" else column
        text = f"{heading} {' / '.join(str(value) for value in values)}"
        texts.append(text if len(values) == 1 else f"**{text} (not the same in all runs)**")
    return ", ".join(texts)


def notes_text(frame: pd.DataFrame) -> str:
    """The runs' notes, each once."""
    notes = {note for cell in frame["note"] for note in cell.split("; ")}
    return "; ".join(sorted(notes - {""}))


def chance_text(differences: Sequence[Difference]) -> str:
    """How many intervals leave zero out, and how many would by chance; empty without intervals."""
    intervals = [item for item in differences if item.seeds > 1]
    if not intervals:
        return ""
    outside = sum(item.leaves_zero_out for item in intervals)
    return (
        f"{outside} of {len(intervals)} intervals (Student's t over seeds) leave zero out "
        f"(*). If nothing differed, chance would make that {0.05 * len(intervals):.2g} on "
        "average, with a wide spread, since the metrics depend on each other."
    )


# ------------------------------------------------------------------------------------- figures
def draw_closest_pairs(name: str, pairs: ClosestPairs) -> Figure:
    """``closest_pairs.png``: generated images above the training images nearest to them."""
    figure = Figure(figsize=(7.5, 2.1), layout="constrained")
    axes = figure.subplots()
    count = len(pairs.generated)
    show_tiles(axes, torch.cat([pairs.generated, pairs.training]), columns=count)

    side = pairs.generated.shape[-1] + TILE_PADDING
    axes.set_xticks((np.arange(count) + 0.5) * side, [f"{x:.3f}" for x in pairs.distance])
    axes.set_yticks([0.5 * side, 1.5 * side], ["generated", "training"])
    axes.tick_params(length=0, labelsize=7)

    title = f"{name}: closest pairs, RMS difference (near copy: ≤ {pairs.threshold:.3f})"
    axes.set_title(title, fontsize=8, parse_math=False)  # a folder may be called a$b$
    return figure


def draw_panels(frame: pd.DataFrame, against_size: bool) -> Figure:
    """``comparison.png``, or ``against_size`` ``scaling.png``: a panel a metric.

    Above, each arm's mean and 95 % interval over seeds, small dots for the seeds, the floor as a
    dashed line; training-set sizes side by side or, ``against_size``, on a logarithmic axis with a
    line an arm. Below, when there are runs of ``matched``, the paired differences to it.
    """
    metrics = [key for key in FIGURE_METRICS if frame[key].notna().any()]
    names = [name for name in frame["name"].cat.categories if name != FLOOR]
    sizes = frame.groupby("n_train")["n_training"].mean()  # training images, by n_train
    places = arm_places(sizes, names, against_size)

    # Many sizes, or near ones on a logarithmic axis, would overlap if written level.
    ticks = [f"{size:.0f}" if against_size else show_size(n) for n, size in sizes.items()]
    rotation = 45 if len(ticks) > 3 else 0

    # What is drawn: every arm's means and, where there are pairs, their differences.
    means = class_means(with_floors(comparable_runs(frame)))
    pairs = comparable_pairs(pair_differences(frame, BASELINES[0]))
    has_pairs = len(pairs) > 0
    differences = class_means(pairs)

    # Four metrics side by side; each has a panel, and a lower one below it for the differences.
    panels_each = 2 if has_pairs else 1
    heights = [2, 1][:panels_each] * math.ceil(len(metrics) / 4)
    figure = Figure(figsize=(12, 1.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 4, squeeze=False, height_ratios=heights)

    for k, metric in enumerate(metrics):
        column = k % 4
        row = k // 4 * panels_each
        upper = panels[row, column]
        draw_arms(upper, means[metric], names, places, against_size)
        upper.set_ylabel(METRICS[metric].heading)

        # The differences' panel has the same arms at the same places, and a line at zero.
        lowest = upper
        if has_pairs:
            lowest = panels[row + 1, column]
            draw_arms(lowest, differences[metric], names, places, against_size)
            lowest.set_ylabel(f"{METRICS[metric].heading}\n− {BASELINES[0]}")
            lowest.set_xlim(upper.get_xlim())
            lowest.axhline(0, color=ARM_COLOURS[BASELINES[0]], linewidth=1)

        for axes in (upper, lowest):
            axes.set_xticks(
                places["middle"], ticks, rotation=rotation, fontsize=6 if rotation else 8
            )
        lowest.set_xlabel("training images" + (" (log scale)" if against_size else ""))

    # Places without a metric stay empty; one legend for all panels.
    for axes in panels.flat:
        if not axes.has_data():
            axes.remove()
    figure.align_ylabels()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7)
    return figure


def arm_places(sizes: pd.Series, names: Sequence[str], against_size: bool) -> pd.DataFrame:
    """Where the arms stand on the horizontal axis: a row a training-set size, a column an arm.

    ``sizes`` are numbers of training images by n_train. Sizes stand at 0, 1, 2 and so on or,
    ``against_size``, at these numbers on a logarithmic axis. The arms stand side by side around
    that place, the column "middle". The columns "left" and "right" are the ends of the floor.
    """
    arms = len(names)

    # Offsets from the size's place, in units of one arm's slot: arms 0.8 of a slot apart, the
    # floor's line 0.9 of a slot per arm. Linear axis: offset / arms; log axis: factor ** offset.
    offsets = {name: 0.8 * (k - (arms - 1) / 2) for k, name in enumerate(names)}
    offsets |= {"middle": 0, "left": -0.45 * arms, "right": 0.45 * arms}

    if not against_size:
        middle = np.arange(len(sizes))
        places = {name: middle + offset / arms for name, offset in offsets.items()}
        return pd.DataFrame(places, index=sizes.index)

    # On the logarithmic axis an arm is a factor apart from the next: 1.15, or less, so that the
    # last arm of a size does not reach the first of the next size.
    to_next_size = (sizes / sizes.shift()).min()
    factor = min(1.15, to_next_size ** (1 / arms))
    return pd.DataFrame({name: sizes * factor**offset for name, offset in offsets.items()})


def draw_arms(
    axes: Axes, values: pd.Series, names: Sequence[str], places: pd.DataFrame, against_size: bool
) -> None:
    """One panel: values by n_train, name and seed, as means with intervals and dots for the seeds.

    ``names`` are all arms of the figure, ``places`` those of ``arm_places``. FLOOR is a dashed
    line.
    """
    if against_size:
        axes.set_xscale("log")
        axes.minorticks_off()

    for name, arm_values in values.dropna().groupby("name", observed=True):
        by_size = arm_values.groupby("n_train")
        here = places.loc[list(by_size.groups)]
        intervals = [interval(seeds) for _, seeds in by_size]
        means, halves = np.array(intervals).T

        # The floor belongs to all arms of a size: a line over their whole width.
        if name == FLOOR:
            ends = here["left"], here["right"]
            axes.hlines(means, *ends, "#666666", "--", label=FLOOR, linewidth=1)
            continue

        # The mean and its interval, and a dot a seed.
        style = arm_style(name, names)
        axes.errorbar(
            here[name],
            means,
            halves,
            label=name,
            linestyle="-" if against_size else "none",
            linewidth=1,
            elinewidth=0.8,
            capsize=2,
            markersize=4,
            **style,
        )
        x = places.loc[arm_values.index.get_level_values("n_train"), name]
        axes.scatter(x, arm_values, s=5, color=style["color"], alpha=0.4)


def arm_style(name: str, names: Sequence[str]) -> dict[str, str]:
    """Colour of an arm and marker of its condition, among ``names``.

    Where there are more arms than colours, several share one, with other markers.
    """
    arm = name.split()[0]
    arms = [*ARM_COLOURS, *(other for other in ARMS if other not in ARM_COLOURS)]
    arm_index = arms.index(arm) if arm in arms else len(arms)
    colours = list(ARM_COLOURS.values())

    # The marker is the condition's place among this arm's. An arm that reuses a colour starts one
    # marker further, so that it differs from the arm it shares the colour with.
    conditions = [other for other in names if other.split()[0] == arm]
    marker_index = conditions.index(name) + arm_index // len(colours)
    return {
        "color": colours[arm_index % len(colours)],
        "marker": MARKERS[marker_index % len(MARKERS)],
    }


def draw_overview(runs: Sequence[Run], evaluator: Evaluator) -> Figure:
    """``overview.png``: real training images and, row by row, the first images of each arm.

    Each training-set size has such rows. The images are those of the lowest seed, as many of each
    class, and OVERVIEW_COLUMNS in a row.
    """
    labels = sorted({run.settings["label"] for run in runs})
    each = max(1, OVERVIEW_COLUMNS // len(labels))
    rows = overview_rows(runs, evaluator)

    # A panel for each row: its tiles fill about 5 of the figure's 6 inches, and are square.
    row_height = 5 / each / len(labels)
    figure = Figure(figsize=(6, 0.3 + row_height * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False).flat
    style = {"va": "center", "rotation": 0, "fontsize": 7, "parse_math": False}
    for axes, (title, by_label) in zip(panels, rows, strict=True):
        tiles = torch.cat([first_images(by_label, label, each) for label in labels])
        show_tiles(axes, tiles, columns=each * len(labels))
        axes.set_ylabel(title, ha="right", **style)

    # The classes' names, nine pixels above the first row.
    class_width = each * (tiles.shape[-1] + TILE_PADDING)
    for k, label in enumerate(labels):
        name = evaluator.dataset.module.CLASS_NAMES[label]
        figure.axes[0].text((k + 0.5) * class_width, -9, name, ha="center", **style)
    return figure


def overview_rows(runs: Sequence[Run], evaluator: Evaluator) -> list[tuple[str, dict[int, Tensor]]]:
    """The rows of ``overview.png``: title and, by label, images (n, C, H, W) uint8.

    For each training size, the whole class last: real images, then the arms.
    """
    # The order of the rows: sizes rise, arms stand as in all tables.
    n_training = {run.settings["n_train"] for run in runs}
    sizes = sorted(n_training, key=lambda n: math.inf if n is None else n)
    by_arm = sorted(runs, key=lambda run: order_of_arms((run.settings["arm"], run.arm)))
    names = list(dict.fromkeys(run.arm for run in by_arm))

    rows = []
    for size in sizes:
        here = [run for run in runs if run.settings["n_train"] == size]
        ending = "" if size is None else f", N = {size}"

        # What the run with the lowest seed was trained on.
        real = {}
        for label, run in lowest_seeds(here).items():
            select_images = evaluator.dataset.module.select_images
            real[label] = select_images(*evaluator.train, label, size, run.settings["seed"])
        rows.append((f"real{ending}", real))

        # What each arm made of them.
        for name in names:
            of_arm = lowest_seeds([run for run in here if run.arm == name])
            if of_arm:
                images = {label: run.images for label, run in of_arm.items()}
                rows.append((f"{name}{ending}", images))
    return rows


def lowest_seeds(runs: Sequence[Run]) -> dict[int, Run]:
    """Of each class the run with the lowest seed, by label."""
    lowest: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: run.settings["seed"]):
        lowest.setdefault(run.settings["label"], run)
    return lowest


def first_images(by_label: dict[int, Tensor], label: int, n: int) -> Tensor:
    """The first n images of a class; white ones take the place of those that are missing."""
    shape = next(iter(by_label.values())).shape[1:]
    white = torch.full((n, *shape), 255, dtype=torch.uint8)
    return torch.cat([by_label.get(label, white), white])[:n]


# ----------------------------------------------------------------------- the published procedure
# Published: 5 generated images against the first 5 training images of any class, FID and paired
# SSIM. Beside it 5 real images of the run's own class, PAPER_DRAWS times, as a perfect generator
# would draw them: how far chance alone moves both figures.
def paper_protocol(evaluator: Evaluator, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The published evaluation of each run, as it goes into ``metrics_paper.json``.

    Raises UserError for runs with fewer than PAPER_IMAGES images, or of another shape.
    """
    first = evaluator.sample(evaluator.train.images[:PAPER_IMAGES])
    real_by_label: dict[int, np.ndarray] = {}
    records = []
    for run in tqdm(runs, "runs", delay=2, leave=False):
        images = run.images[:PAPER_IMAGES]
        if images.shape != first.images.shape:
            raise UserError(
                f"{run.folder}: {tuple(images.shape)}, expected {tuple(first.images.shape)}"
            )

        # The run's score and, once a class, those of real images.
        label = run.settings["label"]
        if label not in real_by_label:
            real_by_label[label] = real_paper_scores(evaluator, label, first)
        real_fid, real_ssim = real_by_label[label].T  # (PAPER_DRAWS,) each
        fid, paired_ssim = paper_scores(evaluator.sample(images), first)

        records.append({
            "n_generated": len(images),
            "n_real": PAPER_IMAGES,
            "draws": PAPER_DRAWS,
            "features": str(evaluator.extractor),
            "fid": beside_real(fid, real_fid),
            "ssim_paired": beside_real(paired_ssim, real_ssim),
        })  # fmt: skip
    return records


def paper_scores(sample: Sample, first: Sample) -> tuple[float, float]:
    """FID and paired SSIM of a sample against the first training images."""
    return frechet_distance(sample.features, first.features), ssim(sample.images, first.images)


def real_paper_scores(evaluator: Evaluator, label: int, first: Sample) -> np.ndarray:
    """The scores of draws of real images of a class, (PAPER_DRAWS, 2).

    The draws are from at most 2 * PAPER_DRAWS images, and never from the first training images.
    """
    images, labels = evaluator.train
    is_other = torch.arange(len(images)) >= PAPER_IMAGES
    pool = images[is_other & (labels == label)]
    if len(pool) < PAPER_IMAGES:
        found = f"class {label}: {len(pool)} real images"
        raise UserError(f"{found}, expected at least {PAPER_IMAGES}")

    # A pool that is small enough for InceptionV3; then draws of five different images from it.
    generator = evaluator.stream("paper")
    order = torch.randperm(len(pool), generator=generator)[: 2 * PAPER_DRAWS]
    pool = evaluator.sample(pool[order])
    scores = []
    for _ in range(PAPER_DRAWS):
        five = torch.randperm(len(order), generator=generator)[:PAPER_IMAGES]
        scores.append(paper_scores(pool.take(five), first))
    return np.array(scores)


def beside_real(value: float, real: np.ndarray) -> dict[str, Any]:
    """A run's score, and mean and central 95 % of real images' scores (draws,)."""
    low, high = np.percentile(real, [2.5, 97.5])
    return {"run": value, "real_mean": float(real.mean()), "real_95": [float(low), float(high)]}


def paper_table(
    runs: Sequence[Run], records: Sequence[dict[str, Any]], withdrawn: dict[str, tuple]
) -> str:
    """A row a run; below them the paper's own figures."""
    rows = []
    for run, record in zip(runs, records, strict=True):
        row = [run.name, str(record["n_generated"]), str(record["n_real"]), record["features"]]
        for metric in ("fid", "ssim_paired"):
            score = record[metric]
            low, high = score["real_95"]
            row.append(show(score["run"], "{:.4g}"))
            row.append(show(score["real_mean"], "{:.4g}"))
            row.append(f"{show(low, '{:.4g}')} to {show(high, '{:.4g}')}")
        rows.append(row)

    # The paper's own figures; of real images it says nothing.
    for arm, (fid, paired_ssim) in withdrawn.items():
        name = f"paper, {arm} (withdrawn by its authors)"
        rows.append([name, "5", "5", "inception", str(fid), "–", "–", str(paired_ssim), "–", "–"])

    real = ["real images", f"95 % of {PAPER_DRAWS} draws"]
    header = ["run", "n", "n real", "features", "FID", *real, "SSIM paired", *real]
    return table(header, rows)


# -------------------------------------------------------------------------------- command line
def parse_options(argv: Sequence[str] | None, dataset: DataSet) -> argparse.Namespace:
    """The command line's options; raises UserError for those that make no sense."""
    parser = OneLineParser(
        description="FID, KID, precision, recall, SSIM, label accuracy and copies of run folders "
        f"({' or '.join(dataset.sources)}), each beside what held-out real images score."
    )
    features = [*dataset.features, "classifier", "inception", "none"]
    parser.add_argument(
        "runs", nargs="+", type=Path, help="run folders with config.json and samples_final.png"
    )
    parser.add_argument(
        "--features",
        choices=features,
        help="what FID, KID, precision and recall compare; classifier: of a CNN trained on the "
        f"data (default: {features[0]}; with --protocol paper: inception)",
    )
    parser.add_argument(
        "--inception_weights", type=Path, metavar="FILE", help="a local copy of the weights"
    )
    parser.add_argument(
        "--reference",
        choices=["class", "all"],
        default="class",
        help="real training images to compare with: of the run's class or of all "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--n_real",
        type=int,
        default=10_000,
        metavar="N",
        help="at most so many real images, drawn by the seed (default: %(default)s)",
    )
    parser.add_argument(
        "--data_dir",
        type=Path,
        default=Path("data"),
        help="data set; keeps classifier, features (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write comparison.csv, .md, .png and overview.png; with several sizes scaling.png; "
        "with --protocol paper only paper_protocol.md",
    )
    parser.add_argument(
        "--protocol",
        choices=["full", "paper"],
        default="full",
        help="paper: 5 images against the first 5 training images, as published "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of classifier, subsets and floors (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="for the features: auto, cpu, cuda or cuda:N (default: %(default)s)",
    )

    # What argparse cannot check.
    options = parser.parse_args(argv)
    options.device = find_device(options.device)
    if options.n_real <= NEIGHBOURS:
        raise UserError(f"--n_real {options.n_real}: expected more than {NEIGHBOURS}")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed {options.seed}: expected 0 to {2**32 - 1}")
    if options.protocol == "paper" and options.features == "none":
        raise UserError("--features none: --protocol paper needs features, use inception")
    if options.features is None:
        options.features = "inception" if options.protocol == "paper" else features[0]
    return options


def find_device(name: str) -> torch.device:
    """The device for the features; raises UserError when this machine has none of that name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        empty = torch.empty(0, device=name)
        empty.tolist()  # which the "meta" device refuses
        return empty.device
    except Exception as error:  # torch raises five kinds of them
        expected = "expected auto, cpu, cuda or cuda:N that this machine has; use --device cpu"
        raise UserError(f"--device {name}: {expected}") from error


def read_runs(folders: Sequence[Path], dataset: DataSet) -> list[Run]:
    """Read the run folders; raises UserError for runs that do not belong into one table."""
    runs = [read_run(folder, dataset) for folder in folders]
    sources = sorted({run.settings["data"] for run in runs})
    if len(sources) > 1:
        raise UserError(f"mixed data sets: {', '.join(sources)}; evaluate each by itself")

    # Two runs of one cell of the table cannot both be shown.
    seen: dict[tuple, Run] = {}
    for run in runs:
        key = (run.arm, *(run.settings[name] for name in PAIR))
        if key in seen:
            raise UserError(
                f"{seen[key].folder} and {run.folder} have the same arm, condition, class, size "
                "and seed; evaluate each by itself"
            )
        seen[key] = run
    return runs


def evaluate(options: argparse.Namespace, dataset: DataSet) -> None:
    """Measure the runs by the protocol that was asked for."""
    runs = read_runs(options.runs, dataset)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)

    evaluator = Evaluator(dataset, runs[0].settings["data"], options)
    record = evaluator.classifier_record
    if record is not None:
        tested_on = dict.fromkeys([evaluator.held_out_name, "test"])  # each once
        shares = [
            f"{record[f'{split}_accuracy']:.2%} of {record[f'n_{split}']} {split} images"
            for split in tested_on
        ]
        say(f"classifier: {', '.join(shares)}")

    if options.protocol == "paper":
        evaluate_as_published(evaluator, runs, options.out)
    else:
        evaluate_fully(evaluator, runs, options.out)


def evaluate_fully(evaluator: Evaluator, runs: Sequence[Run], out: Path | None) -> None:
    """All metrics: into each run's folder, a table, and into ``out`` tables and figures.

    Files come first, then pictures, and printing last: what fails late loses nothing.
    """
    # Classes that no run has are dropped. Of PathMNIST they take a fifth of a gigabyte.
    if evaluator.options.reference == "class":
        labels = [run.settings["label"] for run in runs]
        evaluator.train = evaluator.train.of_classes(labels)
        evaluator.held_out = evaluator.held_out.of_classes(labels)

    # Each run's figures are written as soon as they are known.
    measured: dict[Path, Measurement] = {}  # by folder
    one_by_one = evaluator.measure_all(runs)
    for run, measurement in tqdm(one_by_one, "runs", total=len(runs), delay=2, leave=False):
        measured[run.folder] = measurement
        with optional(run.folder / "metrics.json"):
            (run.folder / "closest_pairs.png").unlink(missing_ok=True)  # of an earlier evaluation
            write_json(run.folder / "metrics.json", measurement.result)

    csv = comparison_csv([measured[run.folder].result for run in runs])
    frame = read_comparison(io.StringIO(csv))
    try:
        if out is not None:
            write_comparison(out, csv, frame)
        for run in runs:
            path = run.folder / "closest_pairs.png"
            with optional(path):
                pairs = measured[run.folder].closest_pairs
                save_figure(path, draw_closest_pairs, run.name, pairs)
        if out is not None:
            draw_comparison(out, frame, runs, evaluator)
    finally:
        say(result_table(frame))  # even when a file could not be written
    if out is not None:
        say(f"written to {out}")


def write_comparison(out: Path, csv: str, frame: pd.DataFrame) -> None:
    """The tables of several runs; an earlier evaluation's pictures go with its tables."""
    for name in ("comparison.png", "scaling.png", "overview.png"):
        (out / name).unlink(missing_ok=True)
    write_atomic(out / "comparison.csv", csv.encode())
    write_atomic(out / "comparison.md", comparison_text(frame).encode())


def draw_comparison(
    out: Path, frame: pd.DataFrame, runs: Sequence[Run], evaluator: Evaluator
) -> None:
    """The figures of several runs, each of which may fail by itself."""
    with optional(out / "comparison.png"):
        save_figure(out / "comparison.png", draw_panels, frame, against_size=False)
    if frame["n_train"].nunique() > 1:
        with optional(out / "scaling.png"):
            save_figure(out / "scaling.png", draw_panels, frame, against_size=True)
    with optional(out / "overview.png"):
        save_figure(out / "overview.png", draw_overview, runs, evaluator)


def evaluate_as_published(evaluator: Evaluator, runs: Sequence[Run], out: Path | None) -> None:
    """The published procedure: into each run's folder, a table, and into ``out`` the table."""
    records = paper_protocol(evaluator, runs)
    for run, record in zip(runs, records, strict=True):
        with optional(run.folder / "metrics_paper.json"):
            write_json(run.folder / "metrics_paper.json", record)

    text = paper_table(runs, records, evaluator.dataset.withdrawn)
    try:
        if out is not None:
            write_atomic(out / "paper_protocol.md", f"{text}\n".encode())
    finally:
        say(text)


@contextlib.contextmanager
def optional(path: Path) -> Iterator[None]:
    """Makes a file that is not worth stopping for: when that fails, a note says so."""
    try:
        yield
    except (UserError, OSError) as error:
        note(f"{path} not written ({one_line(error)})")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an indented JSON file, whole or not at all."""
    write_atomic(path, f"{json.dumps(content, indent=2)}\n".encode())


def main(argv: Sequence[str] | None = None, dataset: DataSet = MNIST) -> None:
    """Run the command line. Exit codes: 0 done, 2 a mistake of the user's, 130 interrupted."""
    with exit_codes(dataset.module.UserError):
        evaluate(parse_options(argv, dataset), dataset)


if __name__ == "__main__":
    main()
