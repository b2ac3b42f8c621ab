"""Measures what the runs generated: FID, KID, precision and recall, SSIM, label accuracy, copies.

Reads the sample grids of run folders, compares them with real images of the same class and data
source, and beside every figure prints what held-out real images score at the same number of
images (the floor).

    python cal_fid_ssim.py runs/classical_mnist3_nall_seed* runs/quantum_mnist3_nall_seed*
    python cal_fid_ssim.py runs/*mnist3* --out comparison           # csv, markdown, figures
    python cal_fid_ssim.py runs/quantum_mnist3_nall_seed0 --protocol paper

cal_fid_ssim_medmnist.py does the same for PathMNIST, debug_img.py shows how a picture is split.
"""

import argparse
import copy
import functools
import hashlib
import io
import itertools
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import linalg, stats
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from torchvision.models import Inception_V3_Weights, inception_v3
from tqdm import tqdm

import quantum_diffusion_mnist as mnist
from debug_img import exit_codes, show_tiles, split_grid
from quantum_diffusion_mnist import ARMS, UserError, between, random_stream, reading

FID_WARNING_BELOW = 1000  # images
FID_INFINITY_SIZES = 15  # subsets
NEIGHBOURS = 3  # k of precision and recall
SSIM_PAIRS = 2000  # at most so many pairs make ssim_diversity
FLOOR_DRAWS = 5  # samples of real images whose mean is the floor
FLOOR = "real images (floor)"
OVERVIEW_COLUMNS = 12  # images in a row of overview.png
PAPER_IMAGES, PAPER_DRAWS = 5, 100
CLASSIFIER_STEPS, CLASSIFIER_BATCH = 1000, 128
DECIDING_SEEDS = 5  # fewer decide nothing
CHUNK = 500  # rows of a distance or kernel matrix that are in memory at once

# What the tables and figures show: key in metrics.json, heading, format.
METRICS = {
    "fid": ("FID", "{:.3g}"),
    "fid_infinity": ("FID∞", "{:.3g}"),
    "kid": ("KID", "{:.3g}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "ssim_paired": ("SSIM paired", "{:.4f}"),
    "ssim_diversity": ("SSIM diversity", "{:.4f}"),
    "ssim_nearest": ("SSIM nearest", "{:.4f}"),
    "label_accuracy": ("label accuracy", "{:.3f}"),
    "distance_ratio": ("distance ratio", "{:.3f}"),
    "near_copies": ("near copies", "{:.3f}"),
}
FIGURE_METRICS = [m for m in METRICS if m not in ("fid_infinity", "ssim_paired", "ssim_nearest")]
PAIR = ["n_train", "label", "seed"]  # what makes two runs a pair; then what arms must share
BUDGET = ["steps", "batch_size", "lr", "muon_lr", "ema_decay", "n_qubits", "n_layers", "timesteps"]
BUDGET += ["sample_steps"]
BASELINES = ("matched", "classical")
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe & Ito
ARM_COLOURS = dict(zip(ARMS, COLOURS, strict=True))
MARKERS = "os^Dvp"  # of an arm's conditions
Sample = tuple[Tensor, np.ndarray]  # images (N, C, H, W) uint8, features (N, d); d = 0: none


# ----------------------------------------------------------------------------------- metrics
def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two Gaussians fitted to features (n, d) and (m, d) (Heusel et al. 2017).
        |mean_a - mean_b|^2 + tr A + tr B - 2 tr (A B)^(1/2)        A, B the covariances, n - 1

    With A = X.T X and B = Y.T Y the last trace is the sum of the singular values of X Y.T: no
    matrix root, which loses half the digits or turns complex when a covariance has not full rank
    (n <= d, dead features), and no epsilon on the diagonal. Both are of 2 or more images. Raises
    UserError for features that are not finite."""
    means, roots = [], []
    for features in (a, b):
        if not np.isfinite(features).all():
            raise UserError("features are not finite: the images or the weights are bad")
        means.append(features.mean(axis=0, dtype=np.float64))
        scaled = (features - means[-1]) / np.sqrt(len(features) - 1)
        roots.append(np.linalg.qr(scaled, mode="r"))
    cross = linalg.svdvals(roots[0] @ roots[1].T).sum()
    squared = ((means[0] - means[1]) ** 2).sum() + sum((root**2).sum() for root in roots)
    return float(squared - 2 * cross)


def frechet_infinity(features: np.ndarray, reference: np.ndarray, seed: int) -> float:
    """FID extrapolated to infinitely many generated images (Chong & Forsyth 2020, section 4).
    The bias of FID is linear in 1/n: a line through FID_INFINITY_SIZES subsets of n/4 to n images
    is read off at 1/n = 0. Below n = 2 d the expansion does not hold: NaN."""
    n, d = features.shape
    if n < 2 * d:
        return float("nan")
    sizes = np.linspace(n / 4, n, FID_INFINITY_SIZES).astype(int)
    generator = random_stream(seed, "fid_infinity")
    subsets = (features[torch.randperm(n, generator=generator)[:size]] for size in sizes)
    values = [frechet_distance(subset, reference) for subset in subsets]
    return float(np.polyfit(1 / sizes, values, 1)[1])


def kernel_distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """KID: unbiased squared MMD with the kernel (x.y / d + 1)^3, and its standard error.
    Bińkowski et al. 2018, section 4, over all pairs instead of random blocks. The standard error
    is the two-sample jackknife's (each image left out once, from the kernel's row sums); NaN for
    fewer than 3 images. It is conservative near zero, where the estimator is degenerate."""

    def row_sums(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        chunks = [x[i : i + CHUNK] for i in range(0, len(x), CHUNK)]
        return np.concatenate([((c @ y.T / x.shape[1] + 1) ** 3).sum(axis=1) for c in chunks])

    def estimate(aa: Any, bb: Any, ab: Any, n: int, m: int) -> Any:
        return aa / (n * (n - 1)) + bb / (m * (m - 1)) - 2 * ab / (n * m)

    n, m = len(a), len(b)
    within_a, within_b = (  # of an image with the others
        row_sums(x, x) - ((x * x).sum(axis=1) / x.shape[1] + 1) ** 3 for x in (a, b)
    )
    across_a, across_b = row_sums(a, b), row_sums(b, a)
    aa, bb, ab = within_a.sum(), within_b.sum(), across_a.sum()
    value = float(estimate(aa, bb, ab, n, m))
    if min(n, m) < 3:
        return value, float("nan")
    without_a = estimate(aa - 2 * within_a, bb, ab - across_a, n - 1, m)
    without_b = estimate(aa, bb - 2 * within_b, ab - across_b, n, m - 1)
    variance = (n - 1) * without_a.var() + (m - 1) * without_b.var()
    return value, float(np.sqrt(variance))


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, section 3), each in [0, 1].
    Precision: share of generated features inside a ball around some real feature that reaches to
    its k-th nearest other real feature; recall: the two sets exchanged. On the ball is inside.
    Both sets should be of one size. NaN with k or fewer images. Distances are exact for equal rows,
    as ties of collapsed samples need."""
    distance = functools.partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")

    def covered(points: Tensor, balls: Tensor) -> float:
        radii = torch.cat([distance(x, balls).kthvalue(k + 1).values for x in balls.split(CHUNK)])
        found = [(distance(x, balls) <= radii).any(dim=1) for x in points.split(CHUNK)]
        return torch.cat(found).double().mean().item()

    if min(len(real), len(generated)) <= k:
        return float("nan"), float("nan")
    real, generated = torch.from_numpy(real), torch.from_numpy(generated)
    return covered(generated, real), covered(real, generated)


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean SSIM (Wang et al. 2004) of uint8 image i of ``a`` against image i of ``b``, (N, C, H, W)
    and as many of the longer as the shorter has; 1 for equal images.

    scikit-image's defaults: a uniform 7x7 window, so that 22x22 of 28x28 pixels count (the 11x11
    Gaussian window leaves 18x18); colour: the mean over the channels. One call for all images,
    one above the other; the rim that mixes neighbours is the one that SSIM leaves out anyway."""
    n = min(len(a), len(b))
    tall = (x[:n].reshape(-1, x.shape[-1]).numpy() for x in (a, b))
    values = structural_similarity(*tall, data_range=255, full=True)[1].reshape(a[:n].shape)
    return float(values[..., 3:-3, 3:-3].mean(axis=(1, 2, 3)).mean())


def ssim_diversity(images: Tensor, seed: int) -> float:
    """Mean SSIM over pairs of the images: 1 means that all are the same. All pairs up to
    SSIM_PAIRS, beyond that so many random ones."""
    n = len(images)
    if n * (n - 1) // 2 <= SSIM_PAIRS:
        first, second = torch.combinations(torch.arange(n)).T
    else:
        generator = random_stream(seed, "ssim_diversity")
        first = torch.randint(n, (SSIM_PAIRS,), generator=generator)
        second = (first + torch.randint(1, n, (SSIM_PAIRS,), generator=generator)) % n
    return ssim(images[first], images[second])


def nearest_images(images: Tensor, training: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """For each image its nearest training image: (distance, index), each (N,). The distance is the
    root mean square difference of the pixels, whole numbers of any type, over 255: for uint8 black
    to white is 1. Integers below 2^53 in float64: a copy has distance 0 exactly."""
    a, b = (x.flatten(1).double() for x in (images, training))
    lengths, found = b.square().sum(dim=1), []
    for x in a.split(CHUNK):
        squared = x.square().sum(dim=1, keepdim=True) + lengths - 2 * x @ b.T
        found.append(torch.stack([*squared.min(dim=1)]))
    squared, index = torch.cat(found, dim=1)
    return (squared / a.shape[1]).sqrt().numpy() / 255, index.long().numpy()


# -------------------------------------------------------------------------------- extractors
def content_hash(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' types, shapes and values."""
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
        digest.update(x.cpu().contiguous().numpy())
    return digest.hexdigest()


def cached(path: Path, record: dict, make: Callable[[], dict], fits: Callable) -> dict[str, Any]:
    """What ``make`` returns, {"record": at least ``record``, "state": tensors}, read from ``path``
    when made from the same record before and ``fits``. What cannot be read or kept costs a line."""
    if path.exists():
        try:
            with reading(path, "from the same images and settings"):
                assert zipfile.ZipFile(path).testzip() is None, "checksum"
                kept = torch.load(path, map_location="cpu", weights_only=True)
                assert record.items() <= kept["record"].items(), "made from others"
                assert fits(kept), "other shapes, or not finite"
                return kept
        except UserError as error:
            print(f"{error}: made again", flush=True)
    kept = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mnist.write_atomic(path, kept)
    except OSError as error:
        print(f"note: {path} not kept ({error.strerror}): --data_dir is not writable", flush=True)
    return kept


class Extractor(NamedTuple):
    """A network with what it needs of an image: uint8 (N, C, H, W) in, float64 (N, d) out. Features
    depend on the images, the preprocessing and the weights' checksum alone."""

    name: str
    preprocessing: str
    model: nn.Module
    prepare: Callable[[Tensor], Tensor]
    channels: int  # grey images are repeated to as many
    device: torch.device | str

    def __str__(self) -> str:
        """Name and the SHA-256 of the weights, for example ``classifier:0f3a9c12d4e5``."""
        state = self.model.state_dict()
        return f"{self.name}:{content_hash(*(state[key] for key in sorted(state)))[:12]}"

    def __call__(self, images: Tensor, folder: Path | None = None, batch: int = 100) -> np.ndarray:
        """Features of the images, kept in ``folder``; the batch size does not change them."""
        if folder:
            record = {"images": content_hash(images), "made_by": f"{self.preprocessing} {self}"}
            path = folder / f"features_{hashlib.sha256(repr(record).encode()).hexdigest()[:24]}.pt"
            make = lambda: {"record": record, "state": torch.from_numpy(self(images))}  # noqa: E731

            def fits(kept: dict[str, Any]) -> bool:
                state, shape = kept["state"], (len(images), self(images[:1]).shape[1])
                whole = state.dtype == torch.float64 and state.shape == shape
                return whole and state.isfinite().all()

            return cached(path, record, make, fits)["state"].double().numpy()
        with torch.inference_mode():
            parts = images.expand(-1, self.channels, -1, -1).split(batch)
            parts = tqdm(parts, self.name, delay=2, leave=False)
            rows = [self.model(self.prepare(x).to(self.device)).double() for x in parts]
        return torch.cat(rows).cpu().numpy()


def inception_extractor(weights: Path | None, device: torch.device | str) -> Extractor:
    """torchvision's InceptionV3: 2,048 features after the last pooling.
    The preprocessing is the one that torchvision documents for these weights: resize to 342
    (bilinear, antialiased), centre crop 299, ImageNet's mean and deviation. Grey is repeated.
    Raises UserError when the weights cannot be had or the file does not hold them."""
    official = Inception_V3_Weights.IMAGENET1K_V1
    mend = "give a local copy with --inception_weights FILE, or leave --features out"
    with reading(weights or official.url, f"InceptionV3's weights; {mend}"):
        if weights:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        else:
            state = official.get_state_dict(progress=True, check_hash=True)
        with torch.random.fork_rng(devices=[]):
            model = inception_v3(aux_logits=False, transform_input=True, init_weights=False)
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith("AuxLogits.")})
    model.fc, transform = nn.Identity(), official.transforms()
    return Extractor("inception", str(transform), model.eval().to(device), transform, 3, device)


def build_classifier(channels: int, classes: int, seed: int) -> nn.Sequential:
    """A small CNN for 28x28 images; the layers before the last give 64 features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(channels, 24, 5, 2, 2, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
            *(nn.Conv2d(24, 48, 3, 2, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU()),
            *(nn.Conv2d(48, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(7 * 7 * 64, 64), nn.ReLU(), nn.Linear(64, classes)),
        )


def train_classifier(images: Tensor, labels: Tensor, seed: int) -> nn.Sequential:
    """Train on uint8 (N, C, 28, 28) and labels (N,): Adam, one cycle, shifts of up to 2 pixels."""
    model = build_classifier(images.shape[1], int(labels.max()) + 1, seed)
    generator, steps = random_stream(seed, "classifier"), CLASSIFIER_STEPS
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps, pct_start=0.2)
    order = torch.empty(0, dtype=torch.int64)
    for _ in tqdm(range(steps), "classifier", delay=2, leave=False):
        while len(order) < CLASSIFIER_BATCH:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        chosen, order = order[:CLASSIFIER_BATCH], order[CLASSIFIER_BATCH:]
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        batch = mnist.to_float(images[chosen]).roll(shift, dims=(2, 3))
        loss = F.cross_entropy(model(batch), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    # KID's kernel expects features of about 1. ReLU hands a factor on: the classes stay the same.
    with torch.no_grad():
        scale = model[:-1](mnist.to_float(images[:CLASSIFIER_BATCH])).square().mean().sqrt()
        model[-3].weight *= 1 / scale
        model[-3].bias /= scale
        model[-1].weight *= scale
    return model


def accuracy(model: nn.Sequential, images: Tensor, labels: Tensor | int) -> float:
    """Share of uint8 images (N, C, 28, 28) that the classifier gives these labels, (N,) or one."""
    with torch.inference_mode():
        guesses = [model(mnist.to_float(x)).argmax(dim=1) for x in images.split(CHUNK)]
    return (torch.cat(guesses) == labels).double().mean().item()


def load_classifier(
    source: str, folder: Path, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int
) -> tuple[nn.Sequential, dict[str, Any]]:
    """The data set's classifier and its record (source, seed, steps, content hash of the training
    images and labels, test accuracy). Trained when ``folder`` has none with the same record.
    Raises UserError when there is but one class."""
    if len(train[1].unique()) < 2:
        ways = "--features none or inception, or leave --features out"
        raise UserError(f"{source} has a single class, which trains no classifier; use {ways}")
    record = {"source": source, "seed": seed, "steps": CLASSIFIER_STEPS, "n_train": len(train[0])}
    record |= {"trained_on": content_hash(*train), "n_test": len(test[0])}

    def make() -> dict[str, Any]:
        model = train_classifier(*train, seed)
        tested = {"test_accuracy": accuracy(model, *test)}
        return {"record": record | tested, "state": model.state_dict()}

    def fits(kept: dict[str, Any]) -> bool:
        model.load_state_dict(kept["state"])
        finite = all(x.isfinite().all() for x in model.state_dict().values())
        return finite and 0 <= float(kept["record"]["test_accuracy"]) <= 1

    path = folder / f"classifier_{source}_seed{seed}.pt"
    model = build_classifier(train[0].shape[1], int(train[1].max()) + 1, seed)
    kept = cached(path, record, make, fits)
    model.load_state_dict(kept["state"])
    return model.eval(), record | {"test_accuracy": float(kept["record"]["test_accuracy"])}


# ---------------------------------------------------------------------------- measuring one run
class DataSet(NamedTuple):
    """What differs between the MNIST and the PathMNIST command line: the training script's module
    (load_images, select_images, UserError, perhaps symmetries), the data sources, the paper's
    table (arm, FID and paired SSIM), --features of its own, the first being the default, and what
    of the images is compared in the search for copies."""

    module: Any
    sources: tuple[str, ...]
    withdrawn: dict[str, tuple[float, float]]
    features: dict[str, Callable[[Tensor], Extractor]]
    compared: Callable[[Tensor], Tensor] = Tensor.double


WITHDRAWN = {"classical": (271.05, 0.1085), "quantum": (259.25, 0.1263)}
MNIST = DataSet(mnist, ("mnist", "digits"), WITHDRAWN, {})


class Run(NamedTuple):
    """A finished run: its folder and that folder's name as one line of valid text, arm and
    condition ("": ideal) as in tables, config.json's settings and description of the training
    images, and its final images (N, C, 28, 28) uint8."""

    folder: Path
    name: str
    arm: str
    condition: str
    settings: dict[str, Any]
    trained_on: dict[str, Any]
    images: Tensor


def read_run(folder: Path, dataset: DataSet) -> Run:
    """Read a run folder. Raises UserError when it is none, unfinished, or of another data set."""
    path, grid = folder / "config.json", folder / "samples_final.png"
    config, module = mnist.read_config(path), dataset.module
    settings, trained_on = config["settings"], config["images"]
    if (source := settings.get("data")) not in dataset.sources:
        scripts = "cal_fid_ssim.py measures MNIST, cal_fid_ssim_medmnist.py PathMNIST"
        raise UserError(f"{folder}: data set {source}; {scripts}")
    with reading(path, "a run's configuration"):
        arm, label, n_train = (settings[key] for key in ("arm", "label", "n_train"))
        known = {key: value for key, value in settings.items() if key != "label_name"}
        condition = module.Settings(**known).condition
        assert arm in ARMS and re.fullmatch(r"[\w.-]{,99}", condition, re.ASCII), condition
        assert condition == config["condition"], "condition"
        whole = label, settings["seed"], config["n_eval"], 1 if n_train is None else n_train
        assert all(type(x) is int for x in whole) and 0 <= label < len(module.CLASS_NAMES), whole
        assert settings.get("label_name") in (None, module.CLASS_NAMES[label]), "label_name"
        assert all(isinstance(known[key], (int, float)) for key in BUDGET), "budget"
        assert hasattr(module, "symmetries") or "symmetries" not in trained_on, "symmetries"
    if not grid.exists():
        raise UserError(f"{folder}: not finished, no {grid.name}; {config.get('command', '')}")
    images, _, _, method, _ = split_grid(grid, config["n_eval"])
    if method != "metadata":
        raise UserError(f"{grid}: not the lossless grid that the run wrote")
    if not len(images) == config["n_eval"] >= 2:
        expected = f"expected n_eval = {config['n_eval']} of {path.name}, and at least 2"
        raise UserError(f"{grid}: {len(images)} images, {expected}")
    name = " ".join(folder.resolve().name.encode(errors="replace").decode().split())
    return Run(folder, name, f"{arm} {condition}".strip(), condition, settings, trained_on, images)


class Evaluator:
    """Measures runs of one data source; what runs share (real images, floors) is kept."""

    def __init__(self, dataset: DataSet, source: str, options: argparse.Namespace) -> None:
        self.dataset, self.source, self.options = dataset, source, options
        load = dataset.module.load_images
        self.train, self.test = (load(source, options.data_dir, s)[1:] for s in ("train", "test"))
        self.folder, device = options.data_dir / "evaluation", options.device
        self.extractor, self.classifier, self.record = None, None, None
        if options.features == "classifier" or len(self.train[1].unique()) > 1:
            splits = self.train, self.test, options.seed
            self.classifier, self.record = load_classifier(source, self.folder, *splits)
        if options.features == "classifier":
            made_by, channels = ("classifier", "x / 127.5 - 1"), self.train[0].shape[1]
            layers = copy.deepcopy(self.classifier[:-1]).to(device)
            self.extractor = Extractor(*made_by, layers, mnist.to_float, channels, device)
        elif options.features == "inception":
            self.extractor = inception_extractor(options.inception_weights, device)
        elif options.features != "none":
            self.extractor = dataset.features[options.features](self.train[0])
        self.stream = functools.partial(random_stream, options.seed, "evaluation")
        self.kept: dict[Any, Any] = {}

    def sample(self, images: Tensor, folder: Path | None = None) -> Sample:
        """The images with their features, which are kept in ``folder``."""
        none = np.empty((len(images), 0))
        return images, self.extractor(images, folder) if self.extractor else none

    def real(self, label: int) -> list[Sample]:
        """Reference images (training split) and held-out images (test split), at most ``--n_real``
        of each, of the class or of all classes."""
        key = label if self.options.reference == "class" else "all"
        if key not in self.kept:
            self.kept[key] = []
            for split in (self.train, self.test):
                images = split[0] if key == "all" else split[0][split[1] == label]
                if len(images) <= NEIGHBOURS:
                    found = f"class {key}: {len(images)} real images in {self.options.data_dir}"
                    raise UserError(f"{self.source}, {found}, expected more than {NEIGHBOURS}")
                if len(images) > self.options.n_real:
                    order = torch.randperm(len(images), generator=self.stream("reference"))
                    images = images[order[: self.options.n_real].sort().values]
                self.kept[key].append(self.sample(images, self.folder))
        return self.kept[key]

    def compare(self, sample: Sample, reference: Sample) -> dict[str, float]:
        """The figures that compare two sets of images; precision and recall on equal numbers."""
        (images, a), (others, b) = sample, reference
        figures = dict.fromkeys([*METRICS, "kid_standard_error"], float("nan"))
        figures["ssim_paired"] = ssim(images, others)
        figures["ssim_diversity"] = ssim_diversity(images, self.options.seed)
        if self.extractor:
            figures["fid"] = frechet_distance(a, b)
            figures["fid_infinity"] = frechet_infinity(a, b, self.options.seed)
            figures["kid"], figures["kid_standard_error"] = kernel_distance(a, b)
            size = min(len(a), len(b))
            chosen = torch.randperm(len(b), generator=self.stream("equal"))[:size]
            pair = precision_recall(b[chosen], a[:size], NEIGHBOURS)
            figures["precision"], figures["recall"] = pair
        return figures

    def floor(self, label: int, n: int) -> dict[str, Any]:
        """What n real images score: the mean over draws from the test split; where it holds fewer
        than n, from one half of the training split against the rest."""
        key = (label if self.options.reference == "class" else "all", n)
        if key not in self.kept:
            reference, held_out = self.real(label)
            aside = n > len(held_out[0])
            size = min(n, len(reference[0]) // 2) if aside else n
            pool, draws = reference if aside else held_out, []
            for draw in range(FLOOR_DRAWS if size <= FID_WARNING_BELOW else 1):
                order = torch.randperm(len(pool[0]), generator=self.stream("floor", draw))
                rest = tuple(part[order[size:]] for part in reference) if aside else reference
                draws.append(self.compare(tuple(part[order[:size]] for part in pool), rest))
            split = "training split, set aside" if aside else "test split"
            means = {metric: float(np.mean([d[metric] for d in draws])) for metric in draws[0]}
            self.kept[key] = {"n": size, "draws": len(draws), "from": split, **means}
        return self.kept[key]

    def measure(self, run: Run) -> dict[str, Any]:
        """All figures of a run, as they go into ``metrics.json`` (None: not measured); draws its
        ten closest pairs. Raises UserError when the images or the training images do not fit."""
        images, label, options = run.images, run.settings["label"], self.options
        reference, _ = self.real(label)
        if images.shape[1:] != (shape := reference[0].shape[1:]):
            found = f"images of {tuple(images.shape[1:])}, the real ones are of {tuple(shape)}"
            raise UserError(f"{run.folder}: {found} (channels, height, width)")
        n_train, seed = run.settings["n_train"], run.settings["seed"]
        training = self.dataset.module.select_images(*self.train, label, n_train, seed)
        if augmented := "symmetries" in run.trained_on:
            training = self.dataset.module.symmetries(training)
        if run.trained_on.get("sha256") != hashlib.sha256(training.numpy().tobytes()).hexdigest():
            raise UserError(f"{run.folder}: trained on other images than are in {options.data_dir}")
        held_out = self.dataset.module.select_images(*self.test, label, None, seed)
        figures = self.compare(self.sample(images), reference)
        floor = dict(self.floor(label, len(images)))
        # The threshold is the first percentile of held-out images: new images score about 1 %.
        *both, known = map(self.dataset.compared, (images, held_out, training))
        closest, usual = (nearest_images(x, known) for x in both)
        threshold, middle = np.percentile(usual[0], 1), np.median(usual[0])
        parts = (figures, images, *closest), (floor, held_out, *usual)
        for part, own, distance, nearest in parts:
            part["ssim_nearest"] = ssim(own, training[nearest])
            part["distance_ratio"] = float(np.median(distance) / middle) if middle else float("nan")
            part["near_copies"] = float((distance <= threshold).mean())
            if self.classifier:
                part["label_accuracy"] = accuracy(self.classifier, own, label)
        draw_closest_pairs(run, training, *closest, threshold)
        few = self.extractor and len(images) < FID_WARNING_BELOW
        notes = {
            f"FID biased upwards: n < {FID_WARNING_BELOW}": few,
            "trained with augmentation": augmented,
            f"floor at n = {floor['n']}": floor["n"] < len(images),
            f"against embedded {self.source}": self.source in ("digits", "tissue"),
        }
        return {
            "run": run.name,
            "condition": run.condition,
            "settings": run.settings,
            "reference": options.reference,
            "n_generated": len(images),
            "n_real": len(reference[0]),
            "n_training": len(training),
            "n_held_out": len(held_out),
            "features": str(self.extractor or "none"),
            "preprocessing": self.extractor and self.extractor.preprocessing,
            "classifier": self.record,
            "near_copy_threshold": float(threshold),
            "metrics": {key: None if value != value else value for key, value in figures.items()},
            "floor": {key: None if value != value else value for key, value in floor.items()},
            "note": "; ".join(note for note, holds in notes.items() if holds),
        }


def draw_closest_pairs(
    run: Run, training: Tensor, distance: np.ndarray, nearest: np.ndarray, threshold: float
) -> None:
    """``closest_pairs.png``: the ten generated images that are nearest to a training image, above
    these, with their distance."""
    closest = np.argsort(distance, kind="stable")[:10]
    axes = (figure := Figure(figsize=(7.5, 2.1), layout="constrained")).subplots()
    pairs = torch.cat([run.images[closest], training[nearest[closest]]])
    show_tiles(axes, pairs, len(closest))
    side = pairs.shape[-1] + mnist.TILE_PADDING
    axes.set_xticks((np.arange(len(closest)) + 0.5) * side, [f"{x:.3f}" for x in distance[closest]])
    axes.set_yticks([side / 2, 1.5 * side], ["generated", "training"])
    axes.tick_params(length=0, labelsize=7)
    title = f"closest pairs, RMS difference (near copy: ≤ {threshold:.3f})"
    axes.set_title(f"{run.name}: {title}", fontsize=8, parse_math=False)
    mnist.save_figure(run.folder / "closest_pairs.png", figure)


# --------------------------------------------------------------------------- tables and figures
def comparison_csv(results: list[dict[str, Any]]) -> str:
    """One line a run: settings, figures, floors."""
    frame = pd.json_normalize(results, sep="_")
    frame.columns = [name.removeprefix("settings_").removeprefix("metrics_") for name in frame]
    columns = ["run", "arm", "condition", "data", "label", "n_train", "seed", *BUDGET, "features"]
    columns += ["reference", "n_generated", "n_real", "n_training", "note"]
    columns += [column for column in frame if column.startswith("floor_") or column in METRICS]
    columns.insert(columns.index("floor_n"), "kid_standard_error")
    return frame[columns].astype({"n_train": "Int64"}).to_csv(index=False)


def read_comparison(file: Path | io.StringIO) -> pd.DataFrame:
    """``comparison.csv``, one row a run, from which every table and figure is made.
    ``n_train`` is infinite for a whole class; ``name``, an ordered category that ends with FLOOR,
    is the arm with its condition."""
    with reading(file, "a comparison of runs"):
        texts = dict.fromkeys(("run", "condition", "note"), str)
        frame = pd.read_csv(file, dtype=texts, keep_default_na=False, na_values=[""])
        frame = frame.fillna(dict.fromkeys(texts, "") | {"n_train": np.inf})
        frame["name"] = (frame["arm"] + " " + frame["condition"]).str.strip()
        order = sorted(set(frame["name"]), key=lambda name: ([*ARMS].index(name.split()[0]), name))
        frame["name"] = pd.Categorical(frame["name"], [*order, FLOOR], ordered=True)
        return frame


def shared_classes(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs of those classes that every arm and seed has at a training-set size; then, named
    FLOOR and of one seed, their floors."""
    series = frame.groupby(["name", "seed"], observed=True).ngroup()
    needed = series.groupby(frame["n_train"]).transform("nunique")
    present = series.groupby([frame["n_train"], frame["label"]]).transform("nunique")
    runs = frame[present == needed]
    name = pd.Categorical([FLOOR] * len(runs), dtype=frame["name"].dtype)
    floors = {key: runs[f"floor_{key}"] for key in METRICS}
    return pd.concat([runs, runs.assign(name=name, seed=0, **floors)])


def pair_differences(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """A row for each pair of runs of equal class, size and seed: the metrics of the arm in ``name``
    minus those of ``baseline``. An arm other than BASELINES is the ideal twin of its own conditions
    and compared with these alone."""
    others = frame[frame["name"] != baseline]
    if baseline not in BASELINES:
        others = others[others["arm"] == baseline]
    pairs = others.merge(frame[frame["name"] == baseline], on=PAIR, suffixes=("", "_base"))
    return pairs.assign(**{key: pairs[key] - pairs[f"{key}_base"] for key in METRICS})


def over_seeds(frame: pd.DataFrame, skipna: bool = False) -> pd.DataFrame:
    """Index n_train, name, seed, columns METRICS: the mean over the classes, NaN when one is or,
    with ``skipna``, when all are."""
    groups = frame.groupby(["n_train", "name", "seed"], observed=True)[[*METRICS]]
    return groups.mean() if skipna else groups.mean()[groups.count().eq(groups.size(), axis=0)]


def interval(values: pd.Series) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval by Student's t; NaN half-width for one value."""
    return values.mean(), stats.t.ppf(0.975, values.count() - 1) * values.sem()


def show(value: float, form: str, missing: str = "–") -> str:
    """A figure for a table; a dash for what could not be measured."""
    return form.format(value) if np.isfinite(value) else missing


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that is also aligned on a terminal."""
    rows = [header, *([cell.replace("|", "¦") for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def result_table(frame: pd.DataFrame) -> str:
    """One row a run, below it what real images score at the same n."""
    rows = []
    for run in frame.to_dict("records"):
        floor = f"  {FLOOR}", "floor_", "floor_n", run["floor_from"]
        for name, prefix, n, note in ((run["run"], "", "n_generated", run["note"]), floor):
            cells = {key: show(run[prefix + key], form) for key, (_, form) in METRICS.items()}
            cells["kid"] += show(run[f"{prefix}kid_standard_error"], " ±{:.1g}", "")
            row = [name, str(run[n]), str(run["n_real"]), run["features"], *cells.values(), note]
            rows.append(row)
    header = ["run", "n", "n real", "features", *next(zip(*METRICS.values(), strict=True)), "note"]
    return table(header, rows)


def arm_table(frame: pd.DataFrame) -> str:
    """Per training-set size and arm: mean over seeds and 95 % interval; then the floor."""
    frame, rows = shared_classes(frame), []
    keys = [key for key in METRICS if frame[key].notna().any()]
    means = over_seeds(frame)
    for (size, name), runs in frame.groupby(["n_train", "name"], observed=True):
        row = [show(size, "{:.0f}", "all"), name]
        for column in ("label", "seed", "n_generated", "n_real"):
            row.append("/".join(map(str, sorted(set(runs[column])))))
        if name == FLOOR:
            row[3] = "–"
        for key in keys:
            (mean, half), form = interval(means.loc[(size, name), key]), METRICS[key][1]
            row.append(show(mean, form) + show(half, f" ± {form}", ""))
        rows.append(row)
    header = ["N", "arm", "classes", "seeds", "n generated", "n real"]
    return table(header + [METRICS[key][0] for key in keys], rows)


def difference_rows(frame: pd.DataFrame, baseline: str) -> list[list[str]]:
    """Rows (difference, N, metric, pairs, seeds, mean, 95 % interval, clear of zero) of every arm
    minus ``baseline``.

    The classes' differences are averaged for each seed; the interval is Student's t over seeds, a
    star where zero is outside. Fewer than DECIDING_SEEDS seeds decide nothing."""
    rows, pairs = [], pair_differences(frame, baseline)
    means = over_seeds(pairs, skipna=True)
    for (name, size), group in pairs.groupby(["name", "n_train"], observed=True):
        for key in (key for key in METRICS if group[key].notna().any()):
            seeds, form = means.loc[(size, name), key], METRICS[key][1].replace("{:", "{:+")
            mean, half = interval(seeds)
            outside = bool(abs(mean) > half)
            limits = f"[{form.format(mean - half)}, {form.format(mean + half)}]{' *' * outside}"
            if not (half > 0 or outside):
                limits = "–"
            clear = (
                "too few seeds" if seeds.count() < DECIDING_SEEDS else "yes" if outside else "no"
            )
            counts = [METRICS[key][0], str(group[key].count()), str(seeds.count())]
            row = [f"{name} − {baseline}", show(size, "{:.0f}", "all"), *counts, form.format(mean)]
            rows.append([*row, limits, clear])
    return rows


def comparison_text(frame: pd.DataFrame) -> str:
    """The Markdown report on several runs."""
    budget = []
    for name in frame.columns.intersection([*BUDGET, "n_generated"], sort=False):
        values = frame[name].unique()
        text = f"{name.replace('n_generated', 'images')} {' / '.join(map(str, values))}"
        budget.append(f"**{text} (not the same in all runs)**" if len(values) > 1 else text)
    parts = [
        "# Comparison of runs",
        f"Features: {', '.join(sorted(set(frame['features'])))}. Real images: {frame['data'][0]}, "
        f"reference {frame['reference'][0]}. Mean over seeds ± half of the 95 % interval "
        f"(Student's t). {FLOOR}: held-out images, as many as generated.",
        f"Budget: {', '.join(budget)}.",
        "; ".join(sorted(set("; ".join(frame["note"]).split("; ")) - {""})),
        arm_table(frame),
    ]
    header = ["difference", "N", "metric", "pairs", "seeds", "mean", "95 % interval", "clear of 0"]
    for baseline in (*BASELINES, *(arm for arm in ARMS if arm not in BASELINES)):
        if rows := difference_rows(frame, baseline):
            parts += [f"## Paired differences against {baseline}", table(header, rows)]
        if limits := [row[6] for row in rows if row[6] != "–"]:
            outside = sum(text.endswith("*") for text in limits)
            parts.append(
                f"{outside} of {len(limits)} intervals (Student's t over seeds) leave zero out "
                f"(*). If nothing differed, chance would make that {0.05 * len(limits):.2g} on "
                "average, with a wide spread, since the metrics depend on each other."
            )
    return "\n\n".join(filter(None, [*parts, "## Runs", result_table(frame)])) + "\n"


def draw_panels(frame: pd.DataFrame, against_size: bool) -> Figure:
    """One panel a metric of FIGURE_METRICS: each arm's mean and 95 % interval over seeds, small
    dots for the seeds, and the floor as a dashed line; or, ``against_size``, a line per arm over
    the number of training images. When there are runs of ``matched``, a panel below shows the other
    arms' paired differences to it."""
    keys = [key for key in FIGURE_METRICS if frame[key].notna().any()]
    *names, _ = frame["name"].cat.categories
    sizes = frame.groupby("n_train")["n_training"].mean()
    places, unit = pd.Series(np.arange(len(sizes)), sizes.index), 1 / len(names)
    labels = ["N = " + show(size, "{:.0f}", "all") for size in sizes.index]
    if against_size:
        places, unit, labels = np.log10(sizes), 0.06, sizes.map("{:.0f}".format)
    parts = [("", over_seeds(shared_classes(frame)))]
    if BASELINES[0] in names and len(names) > 1:
        below = over_seeds(pair_differences(frame, BASELINES[0]), skipna=True)
        parts.append((f"\n− {BASELINES[0]}", below))
    heights = [2, 1][: len(parts)] * -(-len(keys) // 4)
    figure = Figure(figsize=(12, 1.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 4, squeeze=False, height_ratios=heights)

    for (k, key), (row, (heading, means)) in itertools.product(enumerate(keys), enumerate(parts)):
        axes = panels[k // 4 * len(parts) + row, k % 4]
        for name, values in means[key].dropna().groupby("name", observed=True):
            found = {size: interval(group) for size, group in values.groupby("n_train")}
            x, (middle, half) = places[[*found]], np.array([*found.values()]).T
            if name == FLOOR:
                wide = 0.45 * unit * len(names)
                axes.hlines(middle, x - wide, x + wide, "#666666", "--", label=FLOOR, lw=1)
                continue
            x = x + 0.8 * unit * (names.index(name) - (len(names) - 1) / 2)
            conditions = [other for other in names if other.split()[0] == name.split()[0]]
            style = {
                "marker": MARKERS[conditions.index(name) % 6],
                "color": ARM_COLOURS[name.split()[0]],
            }
            style |= {"ls": "-" if against_size else "none", "lw": 1, "elinewidth": 0.8}
            axes.errorbar(x, middle, half, label=name, capsize=2, markersize=4, **style)
            dots = x[values.index.get_level_values("n_train")]
            axes.scatter(dots, values, 5, [style["color"]], alpha=0.4)
        axes.set_ylabel(METRICS[key][0] + heading)
        axes.set_xticks(places, labels)
        axes.set_xlim(panels[k // 4 * len(parts), k % 4].get_xlim())
        if against_size and row == len(parts) - 1:
            axes.set_xlabel("training images (log scale)")
        if heading:
            axes.axhline(0, color=ARM_COLOURS[BASELINES[0]], linewidth=1)
    for axes in panels.flat:
        if not axes.has_data():
            axes.remove()
    figure.align_ylabels()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    return figure


def draw_overview(runs: Sequence[Run], evaluator: Evaluator) -> Figure:
    """Real training images and, row by row, the first images of each arm (and training size), by
    the lowest seed: of every class equally many, OVERVIEW_COLUMNS in all where it can be."""
    labels, names = {run.settings["label"] for run in runs}, evaluator.dataset.module.CLASS_NAMES
    names = {label: names[label] for label in sorted(labels)}
    each, rows = max(1, OVERVIEW_COLUMNS // len(names)), {}
    white = torch.full((each, *runs[0].images.shape[1:]), 255, dtype=torch.uint8)
    for run in sorted(runs, key=lambda run: -run.settings["seed"]):
        label, n_train, seed = (run.settings[key] for key in ("label", "n_train", "seed"))
        train = evaluator.dataset.module.select_images(*evaluator.train, label, n_train, seed)
        place = [*ARMS].index(run.settings["arm"]), run.condition, run.arm
        for key, images in (((-1, "", "real"), train), (place, run.images)):
            found = rows.setdefault((n_train or np.inf, *key), dict.fromkeys(names, white))
            found[label] = torch.cat([images, white])[:each]
    figure = Figure(figsize=(6, 0.3 + 5 / each / len(names) * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False).flat
    style = {"va": "center", "rotation": 0, "fontsize": 7, "parse_math": False}
    for axes, ((size, *_, arm), found) in zip(panels, sorted(rows.items()), strict=True):
        show_tiles(axes, torch.cat([*found.values()]), each * len(names))
        axes.set_ylabel(arm + (f", N = {size}" if size < np.inf else ""), ha="right", **style)
    for k, name in enumerate(names.values()):
        x = (k + 0.5) * each * (white.shape[-1] + mnist.TILE_PADDING)
        figure.axes[0].text(x, -9, name, ha="center", **style)
    return figure


# ----------------------------------------------------------------------- the published procedure
def paper_protocol(evaluator: Evaluator, runs: list[Run]) -> str:
    """The published evaluation, and beside it what real images score under it; a table that ends
    with the paper's own figures, and ``metrics_paper.json`` in each run folder.

    Published: 5 generated images against the first 5 training images of any class, FID and paired
    SSIM. Beside it PAPER_DRAWS times 5 real images of the run's own class, as a perfect generator
    would draw them: how far chance alone moves both figures."""
    images, labels = evaluator.train
    first, others = evaluator.sample(images[:PAPER_IMAGES]), torch.arange(len(images))
    drawn, rows = {}, []

    def scores(sample: Sample) -> tuple[float, float]:
        return frechet_distance(sample[1], first[1]), ssim(sample[0], first[0])

    for run in tqdm(runs, "runs", delay=2, leave=False):
        sample, label = run.images[:PAPER_IMAGES], run.settings["label"]
        if sample.shape != (shape := first[0].shape):
            raise UserError(f"{run.folder}: {tuple(sample.shape)}, expected {tuple(shape)}")
        if label not in drawn:
            generator = evaluator.stream("paper")
            pool = images[(others >= PAPER_IMAGES) & (labels == label)]
            order = torch.randperm(len(pool), generator=generator)[: 2 * PAPER_DRAWS]
            if len(order) < PAPER_IMAGES:
                raise UserError(f"{run.folder}: {len(order)} real images, expected {PAPER_IMAGES}")
            pool = evaluator.sample(pool[order])
            fives = (torch.randperm(len(order), generator=generator) for _ in range(PAPER_DRAWS))
            draws = (tuple(part[five[:PAPER_IMAGES]] for part in pool) for five in fives)
            drawn[label] = np.array([*map(scores, draws)])
        record = {"n_generated": len(sample), "n_real": PAPER_IMAGES}
        record |= {"draws": PAPER_DRAWS, "features": str(evaluator.extractor)}
        row = [run.name, str(len(sample)), str(PAPER_IMAGES), record["features"]]
        found = scores(evaluator.sample(sample))
        for key, value, real in zip(("fid", "ssim_paired"), found, drawn[label].T, strict=True):
            limits = np.percentile(real, [2.5, 97.5]).tolist()
            record[key] = {"run": value, "real_mean": float(real.mean()), "real_95": limits}
            row += [f"{value:.4g}", f"{real.mean():.4g}", "{:.4g} to {:.4g}".format(*limits)]
        mnist.write_atomic(run.folder / "metrics_paper.json", json.dumps(record, indent=2) + "\n")
        rows.append(row)
    for arm, (fid, paired) in evaluator.dataset.withdrawn.items():
        row = [f"paper, {arm} (withdrawn by its authors)", "5", "5", "inception"]
        rows.append([*row, str(fid), "–", "–", str(paired), "–", "–"])
    beside = ("real images", f"95 % of {PAPER_DRAWS} draws")
    header = ["run", "n", "n real", "features", "FID", *beside, "SSIM paired", *beside]
    return table(header, rows)


# -------------------------------------------------------------------------------- command line
def parse_options(argv: Sequence[str] | None, dataset: DataSet) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description="FID, KID, precision, recall, SSIM, label accuracy and copies of run folders "
        f"({' or '.join(dataset.sources)}), each beside what held-out real images score.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run folders with config.json and samples_final.png")
    features = (*dataset.features, "classifier", "inception", "none")
    add("--features", choices=features, default=argparse.SUPPRESS,
        help="what FID, KID, precision and recall compare; classifier: of a CNN trained on the "
        f"data (default: {features[0]}; with --protocol paper: inception)")  # fmt: skip
    add("--inception_weights", type=Path, metavar="FILE", help="a local copy of the weights")
    add("--reference", choices=("class", "all"), default="class",
        help="real training images to compare with: of the run's class or of all")  # fmt: skip
    add("--n_real", type=between(NEIGHBOURS + 1, 10**6), default=10_000,
        help="at most so many real images, drawn by the seed")  # fmt: skip
    add("--data_dir", type=Path, default=Path("data"), help="data set; keeps classifier, features")
    add("--out", type=Path, metavar="DIR",
        help="write comparison.csv, .md, .png and overview.png; with several sizes scaling.png; "
        "with --protocol paper only paper_protocol.md")  # fmt: skip
    add("--protocol", choices=("full", "paper"), default="full",
        help="paper: 5 images against the first 5 training images, as published")  # fmt: skip
    add("--seed", type=between(0, 2**32 - 1), default=0, help="of classifier, subsets and floors")
    add("--device", default="auto", help="for the features: auto, cpu, cuda or cuda:N")
    parser.error = lambda message: parser.exit(2, f"error: {' '.join(message.split())}\n")
    options = parser.parse_args(argv)
    options.device = mnist.this_process(options.device)[0]
    if "features" not in options:
        options.features = "inception" if options.protocol == "paper" else features[0]
    if options.protocol == "paper" and options.features == "none":
        raise UserError("--features none: --protocol paper needs features, use inception")
    return options


def evaluate(options: argparse.Namespace, dataset: DataSet) -> None:
    """Measure the runs and write what was asked for."""
    runs = [read_run(folder, dataset) for folder in options.runs]
    if len(sources := {run.settings["data"] for run in runs}) > 1:
        raise UserError(f"mixed data sets: {', '.join(sorted(sources))}; evaluate each by itself")
    known: dict[Any, Path] = {}
    for run in runs:
        other = known.setdefault((run.arm, *(run.settings[name] for name in PAIR)), run.folder)
        if other is not run.folder:
            found = f"{other} and {run.folder} have the same arm, condition, class, size and seed"
            raise UserError(f"{found}; evaluate each by itself")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(dataset, runs[0].settings["data"], options)
    if evaluator.record:
        print("classifier: {test_accuracy:.2%} of {n_test} test images".format(**evaluator.record))
    if options.protocol == "paper":
        print(text := paper_protocol(evaluator, runs))
        if options.out:
            mnist.write_atomic(options.out / "paper_protocol.md", text + "\n")
        return
    results = []
    for run in tqdm(runs, "runs", delay=2, leave=False):
        results.append(evaluator.measure(run))
        mnist.write_atomic(run.folder / "metrics.json", json.dumps(results[-1], indent=2) + "\n")
    text = comparison_csv(results)
    frame = read_comparison(io.StringIO(text))
    print(result_table(frame))
    if options.out:
        mnist.write_atomic(options.out / "comparison.csv", text)
        mnist.write_atomic(options.out / "comparison.md", comparison_text(frame))
        mnist.save_figure(options.out / "comparison.png", draw_panels(frame, against_size=False))
        if frame["n_train"].nunique() > 1:
            mnist.save_figure(options.out / "scaling.png", draw_panels(frame, against_size=True))
        mnist.save_figure(options.out / "overview.png", draw_overview(runs, evaluator))
        print(f"written to {options.out}")


def main(argv: Sequence[str] | None = None, dataset: DataSet = MNIST) -> None:
    """Run the command line. Exit codes: 0 done, 2 a mistake of the user's, 130 interrupted."""
    with exit_codes(dataset.module.UserError):
        evaluate(parse_options(argv, dataset), dataset)


if __name__ == "__main__":
    main()
