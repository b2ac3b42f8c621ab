"""Measures what the runs generated: FID, KID, precision and recall, SSIM, label accuracy, copies.

Reads the sample grids of run folders, compares them with real images of the same class and data
source, and beside every figure prints what held-out real images score at the same number of
images (the floor).

    python cal_fid_ssim.py runs/classical_mnist3_nall_seed* runs/quantum_mnist3_nall_seed*
    python cal_fid_ssim.py runs/*mnist3* --out comparison           # csv, markdown, figures
    python cal_fid_ssim.py runs/*_mnist_conditional*                # a row for each class
    python cal_fid_ssim.py runs/* more/* --out study --margin 3     # FID: different, equivalent?
    python cal_fid_ssim.py runs/quantum_mnist3_nall_seed0 --protocol paper

The file in its order: what is measured; runs and real images; features; the metrics; a run beside
real images; what is compared with what, and the tests; tables; figures; the published procedure;
the command line. cal_fid_ssim_medmnist.py does the same for PathMNIST. debug_img.py holds what all
command lines share: printing, errors, saving figures.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import inspect
import io
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import filelock
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
from debug_img import OneLineParser, exit_codes, note, one_line, save_figure, say, show_tiles
from quantum_diffusion_mnist import ARMS, UserError, random_stream, reading, write_atomic


# ---------------------------------------------------------------------------- what is measured
class Metric(NamedTuple):
    """How tables and figures show a metric."""

    heading: str
    form: str  # of str.format


METRICS = {  # by their key in metrics.json and comparison.csv
    # Sets of images, compared by their features.
    "fid": Metric("FID", "{:.3g}"),
    "fid_ratio": Metric("FID / real", "{:.2f}"),  # over FID of as many real images
    "fid_infinity": Metric("FID∞", "{:.3g}"),
    "kid": Metric("KID", "{:.3g}"),
    "precision": Metric("precision", "{:.3f}"),
    "recall": Metric("recall", "{:.3f}"),
    # Pairs of images: arbitrary ones, generated ones, each with its nearest training image.
    "ssim_paired": Metric("SSIM paired", "{:.4f}"),
    "ssim_diversity": Metric("SSIM diversity", "{:.4f}"),
    "ssim_nearest": Metric("SSIM nearest", "{:.4f}"),
    # The classifier, and the search for copies of training images.
    "label_accuracy": Metric("label accuracy", "{:.3f}"),
    "distance_ratio": Metric("distance ratio", "{:.3f}"),
    "near_copies": Metric("near copies", "{:.3f}"),
}

FLOOR = "real images (floor)"
SET_ASIDE = "training split, set aside"  # where a floor's images are from, if too few are held out
FLOOR_DRAWS = 5  # samples of real images whose mean is the floor
ONE_DRAW_ABOVE = 1000  # images: of larger samples one is enough
FID_WARNING_BELOW = 1000  # images
FEWEST_REAL = 4  # training images, half of which may be the floor
FEWEST_HELD_OUT = 2
CHUNK = 500  # images, or rows of a kernel or distance matrix, that are in memory at once


# ----------------------------------------------------------------------- runs and real images
Classes = int | str | tuple[int, ...]  # of images: one, several, or "all"


def pixels(images: Tensor) -> Tensor:
    """What of digits is compared in the search for copies: the images as they are."""
    return images


@dataclass(frozen=True)
class DataSet:
    """What differs between the MNIST and the PathMNIST command line."""

    module: Any  # the training script: load_images, select_images, symmetries, CLASS_NAMES
    held_out_split: dict[str, str]  # by data source, as in a run's settings, for example "test"
    paper_scores: dict[str, tuple[float, float]]  # by arm: FID and paired SSIM that it printed
    own_extractors: dict[str, Callable[[Tensor], "Extractor"]]  # more --features; first: default
    # What of images (N, C, H, W) uint8 is compared in the search for copies: whole numbers.
    copy_features: Callable[[Tensor], Tensor]


MNIST = DataSet(
    module=mnist,
    held_out_split={"mnist": "test", "digits": "test"},
    paper_scores={"classical": (271.05, 0.1085), "quantum": (259.25, 0.1263)},
    own_extractors={},
    copy_features=pixels,
)


class Split(NamedTuple):
    """Images with the classes that they show or were asked to show."""

    images: Tensor  # (N, C, H, W) uint8
    labels: Tensor | int  # (N,), or one for all

    def of_class(self, label: int) -> Tensor:
        """The images (n, C, H, W) of one class."""
        return self.images[self.labels == label]

    def of_classes(self, labels: int | Sequence[int]) -> "Split":
        """The part that shows one of these classes."""
        is_wanted = torch.isin(self.labels, torch.tensor(labels))
        return Split(self.images[is_wanted], self.labels[is_wanted])


class Run(NamedTuple):
    """A finished run."""

    folder: Path
    condition: str  # for example "conditional-3-8_shots1000"; "": a single class's model, ideal
    settings: dict[str, Any]  # config.json's
    trained_on: dict[str, Any]  # config.json's description of the training images
    machine: str  # for example "cpu, AMD EPYC, AVX512, 1 thread, torch 2.14.1"
    images: dict[int, Tensor]  # the final ones by class, each (n, C, 28, 28) uint8

    @property
    def conditional(self) -> bool:
        """Whether one model made the images of several classes."""
        return len(self.images) > 1


def machine_of(config: dict[str, Any]) -> str:
    """Where a run was made, for example "cpu, AMD EPYC, AVX512, 1 thread, torch 2.14.1".

    Where it went on elsewhere, all places in their order. "": it does not say.
    """
    places = []
    for place in (config, *config.get("went_on", [])):
        device = re.sub(r"^cuda:\d+", "cuda", place.get("device") or "")  # which of equal GPUs
        threads = place.get("threads", "")
        words = f"{threads} thread{'' if threads == 1 else 's'}"
        torch_version = place.get("versions", {}).get("torch", "")
        places.append(f"{device}, {words}, torch {torch_version}" if device else "")
    return "; ".join(dict.fromkeys(place for place in places if place))


def read_run(folder: Path, dataset: DataSet) -> Run:
    """Read a run folder. Raises UserError when it is none, unfinished, or of another data set."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'a file, no folder' if folder.exists() else 'no such folder'}")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no run folder, it has no config.json")
    config = mnist.read_config(folder / "config.json")
    settings = config["settings"]
    source = settings.get("data")
    if source not in list(dataset.held_out_split):  # a list, for what no dictionary can look up
        scripts = "cal_fid_ssim.py measures MNIST, cal_fid_ssim_medmnist.py PathMNIST"
        raise UserError(f"{folder}: data set {source}; {scripts}")
    with reading(folder / "config.json", "a run's configuration of this version"):
        missing = {"arm", "n_train", "seed", *BUDGET} - settings.keys()
        if missing or "condition" not in config:
            raise ValueError(f"no {', '.join(sorted(missing)) or 'condition'}")
        if not isinstance(settings["arm"], str) or not settings["arm"]:
            raise ValueError("arm: expected a name")
        for name in BUDGET:
            value = settings[name]
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} {value!r}: expected a number")
        for name in ("n_train", "seed"):
            value = settings[name]
            if not isinstance(value, int) and not (name == "n_train" and value is None):
                raise ValueError(f"{name} {value!r}: expected a whole number")
        if not isinstance(config["condition"], str):
            raise ValueError(f"condition {config['condition']!r}: expected a text")
        machine = machine_of(config)
        classes = settings["classes"]
        known = range(len(dataset.module.CLASS_NAMES))
        if not isinstance(classes, list) or not classes or not set(classes) <= set(known):
            raise ValueError(f"classes {classes}: expected some of 0 to {known[-1]}")

    # Its final images: n_eval, or fewer while they are still sampled.
    grid = folder / "samples_final.png"
    if not grid.exists():
        command = config.get("command", "")  # makes the run, or finishes it
        raise UserError(f"{folder}: not finished, no {grid.name}; {command}")
    images = mnist.load_grid(grid)
    n = len(images) / len(classes)
    if n != config["n_eval"] or n < 2:
        expected = f"expected n_eval = {config['n_eval']} of config.json, and at least 2"
        raise UserError(f"{grid}: {n:g} images of each class, {expected}")

    # An ideal model that is sampled with shots is another than one that was trained with them:
    # "shots10_sampled", before the sampling steps.
    condition = config["condition"]
    if config.get("weights", {}).get("weights_sha256"):  # --weights
        circuit, steps = re.fullmatch(r"(.*?)_?(steps\d+)?", condition).groups(default="")
        condition = f"{circuit}_sampled_{steps}".strip("_") if circuit else steps

    # A model of some classes only is another condition than one of all: "conditional-3-8".
    if len(classes) > 1:
        names = [dataset.module.CLASS_NAMES[label] for label in classes]
        is_of_all = tuple(classes) == dataset.module.ALL_CLASSES
        name = "conditional" if is_of_all else "-".join(["conditional", *names])
        condition = f"{name}_{condition}".strip("_")
    return Run(
        folder=folder,
        condition=condition,
        settings=settings,
        trained_on=config["images"],
        machine=machine,
        images=dict(zip(classes, images.chunk(len(classes)), strict=True)),
    )


def read_runs(folders: Sequence[Path], dataset: DataSet) -> list[Run]:
    """Read the run folders; raises UserError for runs that do not belong into one table."""
    each: dict[Path, Path] = {}  # a folder that is named twice is one
    for folder in folders:
        each.setdefault(folder.resolve(), folder)
    runs = [read_run(folder, dataset) for folder in each.values()]
    sources = sorted({run.settings["data"] for run in runs})
    if len(sources) > 1:
        raise UserError(f"mixed data sets: {', '.join(sources)}; evaluate each by itself")

    # Two runs of one cell of the table cannot both be shown.
    seen: dict[tuple, Run] = {}
    for run in runs:
        for label in run.images:
            settings = [run.settings[name] for name in ("arm", "n_train", "seed", *BUDGET)]
            other = seen.setdefault((run.condition, label, *settings), run)
            if other is not run:
                alike = "have the same arm, condition, class, size, seed and budget"
                raise UserError(f"{other.folder} and {run.folder} {alike}; evaluate each by itself")
    return runs


# -------------------------------------------------------------- networks: from images to features
CLASSIFIER_STEPS = 1000
CLASSIFIER_BATCH = 128  # images


@dataclass(frozen=True)
class Extractor:
    """A network and how images are prepared for it. Features depend on nothing else."""

    name: str
    preprocessing: str  # in words, for the record
    model: nn.Module
    prepare: Callable[[Tensor], Tensor]  # uint8 (N, C, H, W) to what the model takes
    device: torch.device | str
    batch: int = 100  # images at once, which changes memory and time alone

    def __str__(self) -> str:
        """Name and the SHA-256 of the weights, for example ``classifier:0f3a9c12d4e5``."""
        state = self.model.state_dict()
        weights = [state[key] for key in sorted(state)]
        return f"{self.name}:{content_hash(*weights)[:12]}"

    def features(self, images: Tensor) -> np.ndarray:
        """Features (N, d) float64 of images (N, C, H, W) uint8."""
        features = []
        with torch.inference_mode():
            for part in tqdm(images.split(self.batch), self.name, delay=2, leave=False):
                features.append(self.model(self.prepare(part).to(self.device)).double().cpu())
        return torch.cat(features).numpy()


def content_hash(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' types, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def optional(path: Path) -> Iterator[None]:
    """Around the making of a file that is not worth stopping for: a failure becomes a note."""
    try:
        yield
    except (UserError, OSError) as error:
        note(f"{path} not written ({one_line(error)})")


def cached(
    folder: Path, kind: str, made_from: dict[str, Any], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What ``make`` returns (tensors, numbers), or the same from a file in ``folder``.

    The file is named after ``made_from``: whatever is made from something else has another name. A
    file that cannot be read or written costs a line, not the evaluation.
    """
    name = hashlib.sha256(repr(made_from).encode()).hexdigest()[:24]
    path = folder / f"{kind}_{name}.pt"
    try:
        if path.exists():
            return mnist.load_tensors(path, f"{kind} of an earlier evaluation")
    except (UserError, OSError) as error:  # damaged, or another user's
        note(f"{one_line(error)}: made again")

    state = make()
    with optional(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, state)
    return state


def cached_features(extractor: Extractor, images: Tensor, folder: Path) -> np.ndarray:
    """Features (N, d); read from ``folder`` when the same images and weights made them before."""
    made_from = {
        "images": content_hash(images),
        "network": str(extractor),
        "preprocessing": extractor.preprocessing,
    }
    with contextlib.suppress(OSError):  # of a class without a file
        made_from["code"] = inspect.getsource(type(extractor.model))

    def make() -> dict[str, Tensor]:
        return {"features": torch.from_numpy(extractor.features(images))}

    return cached(folder, "features", made_from, make)["features"].numpy()


def inception_extractor(weights: Path | None, device: torch.device | str) -> Extractor:
    """torchvision's InceptionV3: 2,048 features after the last pooling.

    The preprocessing is the one that torchvision documents for these weights: resize to 342
    (bilinear, antialiased), centre crop 299, ImageNet's mean and deviation. Grey is repeated.
    ``weights`` is a local copy (None: downloaded once, into torch's cache). Raises UserError when
    the weights cannot be had or the file does not hold them.
    """
    official = Inception_V3_Weights.IMAGENET1K_V1
    way_out = "give a local copy with --inception_weights FILE, or use --features classifier"

    if weights is None:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        weights = cache / Path(official.url).name

        def fetch(folder: Path) -> None:
            with contextlib.redirect_stdout(io.StringIO()):  # torch says again what it does
                official.get_state_dict(model_dir=str(folder), check_hash=True)

        # Into a temporary folder, then moved; None, or in words why it failed.
        try:
            failure = mnist.download(cache, weights.name, fetch)
        except OSError as error:  # the cache takes no files
            failure = f"no {weights} ({error})"
        if failure is not None:
            raise UserError(f"{failure}; {way_out}")

    # Without the auxiliary head. transform_input: from ImageNet's normalisation, which the
    # preprocessing ends with, to the one that the weights were trained with.
    with reading(weights, f"InceptionV3's weights; {way_out}"):
        state = torch.load(weights, map_location="cpu", weights_only=True)
        model = inception_v3(aux_logits=False, transform_input=True, init_weights=False)
        main_part = {key: x for key, x in state.items() if not key.startswith("AuxLogits.")}
        model.load_state_dict(main_part)

    model.fc = nn.Identity()  # features instead of ImageNet's classes
    return Extractor(
        name="inception",
        preprocessing=str(official.transforms()),
        model=model.eval().to(device),
        prepare=lambda images: official.transforms()(images.expand(-1, 3, -1, -1)),
        device=device,
        batch=25,  # of 299x299 pixels
    )


def classifier_extractor(classifier: nn.Sequential, device: torch.device | str) -> Extractor:
    """The layers of a classifier before its last: 64 features."""
    return Extractor(
        name="classifier",
        preprocessing="x / 127.5 - 1",
        model=copy.deepcopy(classifier[:-1]).to(device),  # a copy: to() moves what it is called on
        prepare=mnist.to_float,
        device=device,
    )


def build_classifier(channels: int, classes: int, seed: int) -> nn.Sequential:
    """A small CNN for 28x28 images; the layers before the last give 64 features."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would set a GPU's, too
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
    order = torch.empty(0, dtype=torch.int64)  # what is left of the pass, as image numbers
    for _ in tqdm(range(CLASSIFIER_STEPS), "classifier", delay=2, leave=False):
        # The next batch; another pass begins where too few are left of this one.
        while len(order) < CLASSIFIER_BATCH:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        chosen = order[:CLASSIFIER_BATCH]
        order = order[CLASSIFIER_BATCH:]

        # All of its images are shifted alike, cyclically.
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        batch = mnist.to_float(images[chosen]).roll(shift, dims=(2, 3))  # (B, C, 28, 28)
        loss = F.cross_entropy(model(batch), labels[chosen])

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    model.eval()
    scale_features(model, images[:CLASSIFIER_BATCH])
    return model


def scale_features(classifier: nn.Sequential, images: Tensor) -> None:
    """Bring the features' root mean square over the images to 1, as KID's kernel adds 1 to x.y / d.

    Dividing the layer before the ReLU and multiplying the one after it by the same number changes
    no output.
    """
    before_features = classifier[-3]  # Linear, ReLU behind it
    after_features = classifier[-1]  # Linear, to the classes
    with torch.no_grad():
        scale = classifier[:-1](mnist.to_float(images)).square().mean().sqrt()
        before_features.weight /= scale
        before_features.bias /= scale
        after_features.weight *= scale


def accuracy(classifier: nn.Sequential, images: Tensor, labels: Tensor | int) -> float:
    """Share of images (N, C, 28, 28) uint8 that are given these labels, (N,) or one for all."""
    with torch.inference_mode():
        guesses = [classifier(mnist.to_float(part)).argmax(dim=1) for part in images.split(CHUNK)]
    return (torch.cat(guesses) == labels).double().mean().item()


def load_classifier(
    source: str, folder: Path, train: Split, tested_on: dict[str, Split], seed: int
) -> tuple[nn.Sequential, dict[str, Any]]:
    """The data set's classifier and its record, trained when ``folder`` has none of that record.

    tested_on: by name of the split. Raises UserError when there is but one class.
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
    record |= {f"n_{name}": len(split.images) for name, split in tested_on.items()}

    def make() -> dict[str, Any]:
        trained = train_classifier(train.images, train.labels, seed)
        accuracies = {f"{name}_accuracy": accuracy(trained, *tested_on[name]) for name in tested_on}
        return {"weights": trained.state_dict(), "accuracies": accuracies}

    kept = cached(folder, "classifier", record, make)
    model = build_classifier(train.images.shape[1], int(train.labels.max()) + 1, seed)
    with reading(folder, "a folder with classifiers of this version; remove them"):
        model.load_state_dict(kept["weights"])
    return model.eval(), record | kept["accuracies"]  # "n_test": 360, "test_accuracy": 0.98


# ----------------------------------------------------------------------------------- metrics
FID_INFINITY_SIZES = 15  # subsets
NEIGHBOURS = 3  # k of precision and recall
SSIM_PAIRS = 2000  # at most so many pairs make ssim_diversity
SSIM_BORDER = 3  # pixels: half of SSIM's 7x7 window
SSIM_CHUNK = 100  # images at once, each with a dozen arrays of its size in float64


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two Gaussians fitted to features (n, d) and (m, d) (Heusel et al. 2017).

        |mean_a - mean_b|^2 + tr A + tr B - 2 tr (A B)^(1/2)

    A and B are the covariances (divided by n - 1). Let A = X.T X and B = Y.T Y: the eigenvalues of
    A B are those of (X Y.T)(X Y.T).T, the squared singular values of X Y.T, and the trace of the
    root is their sum. This works for covariances of any rank; scipy's sqrtm does not. What is only
    the sum's rounding, as of equal sets, is made 0. Both sets have 2 or more images. Raises
    UserError for features that are not finite.
    """
    means = []
    factors = []  # X (min(n, d), d) and Y (min(m, d), d)
    for features in (a, b):
        if not np.isfinite(features).all():
            raise UserError("features are not finite: the images or the weights are bad")
        mean = features.mean(axis=0, dtype=np.float64)
        centred = (features - mean) / np.sqrt(len(features) - 1)  # centred.T centred = covariance
        means.append(mean)
        factors.append(np.linalg.qr(centred, mode="r"))  # R.T R = centred.T centred

    # The three terms of the formula.
    x, y = factors
    between_means = ((means[0] - means[1]) ** 2).sum()
    traces = (x**2).sum() + (y**2).sum()
    cross = linalg.svdvals(x @ y.T).sum()
    distance = float(between_means + traces - 2 * cross)
    return distance if distance > 1e-13 * traces else 0.0


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

    Bińkowski et al. 2018, section 4, over all pairs instead of random blocks. The mean kernel of
    two images of a (n, d), plus that of two of b (m, d), minus twice that of one of each:

        MMD^2 = aa / (n (n - 1)) + bb / (m (m - 1)) - 2 ab / (n m)

    The standard error is the two-sample jackknife's, which leaves out each image once; NaN for
    fewer than 3 images. It is too large where both sets have one distribution.
    """
    n, d = a.shape
    m = len(b)

    def mmd(aa: Any, bb: Any, ab: Any, n: int, m: int) -> Any:
        """The formula, for one sum or an array of sums."""
        return aa / (n * (n - 1)) + bb / (m * (m - 1)) - 2 * ab / (n * m)

    # Each image's kernel with the others of its set (without itself), and with the other set.
    within_a = kernel_row_sums(a, a) - ((a * a).sum(axis=1) / d + 1) ** 3  # (n,)
    within_b = kernel_row_sums(b, b) - ((b * b).sum(axis=1) / d + 1) ** 3  # (m,)
    across_a = kernel_row_sums(a, b)  # (n,)
    across_b = kernel_row_sums(b, a)  # (m,)

    aa = within_a.sum()
    bb = within_b.sum()
    ab = across_a.sum()
    distance = float(mmd(aa, bb, ab, n, m))
    if min(n, m) < 3:
        return distance, math.nan

    # Leaving image i of a out removes row i and column i of the kernel: 2 * within_a[i] from aa,
    # across_a[i] from ab.
    without_a = mmd(aa - 2 * within_a, bb, ab - across_a, n - 1, m)  # (n,)
    without_b = mmd(aa, bb - 2 * within_b, ab - across_b, n, m - 1)  # (m,)

    # The jackknife's variance of a set: (n - 1) / n times the sum of squared deviations from the
    # mean, hence (n - 1) var, as numpy's var divides by n. Those of the two sets add.
    variance = (n - 1) * without_a.var() + (m - 1) * without_b.var()
    return distance, float(np.sqrt(variance))


def kernel_row_sums(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The sums over all rows of y (m, d) of their kernel with each row of x (n, d): (n,)."""
    sums = []
    for start in range(0, len(x), CHUNK):
        kernel = (x[start : start + CHUNK] @ y.T / x.shape[1] + 1) ** 3  # (chunk, m)
        sums.append(kernel.sum(axis=1))
    return np.concatenate(sums)


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, section 3), each in [0, 1].

    Precision: share of generated features inside a ball around some real feature that reaches to
    its k-th nearest other real feature; recall: the two sets exchanged. A point on a ball's surface
    is inside. real (n, d), generated (m, d); n and m should be equal. NaN with k or fewer images.
    """
    if min(len(real), len(generated)) <= k:
        return math.nan, math.nan

    # Distances that are exactly zero for equal rows; of torch's default they are not.
    distance = functools.partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    real = torch.from_numpy(real)
    generated = torch.from_numpy(generated)

    # Radii up to the k-th nearest other: k + 1, as each is its own nearest.
    real_radii = distance(real, real).kthvalue(k + 1).values  # (n,)
    generated_radii = distance(generated, generated).kthvalue(k + 1).values  # (m,)
    between = distance(generated, real)  # (m, n)
    is_precise = (between <= real_radii).any(dim=1)  # (m,)
    is_recalled = (between <= generated_radii[:, None]).any(dim=0)  # (n,)
    return is_precise.double().mean().item(), is_recalled.double().mean().item()


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean SSIM (Wang et al. 2004) of image i of ``a`` against image i of ``b``; 1 for equal ones.

    Images (N, C, H, W) uint8; the longer set is cut to the length of the shorter. scikit-image's
    defaults: a uniform 7x7 window, so that 22x22 of 28x28 pixels count (the 11x11 Gaussian window
    leaves 18x18); colour: the mean over the channels.
    """
    n = min(len(a), len(b))
    inner = slice(SSIM_BORDER, -SSIM_BORDER)
    means = []  # one value for each image, in chunks
    for x, y in zip(a[:n].split(SSIM_CHUNK), b[:n].split(SSIM_CHUNK), strict=True):
        # One call for all images, stacked into tall pictures (chunk C H, W). Windows across the
        # border of two images mix them, but only within SSIM_BORDER of it, which SSIM leaves out.
        tall = [images.reshape(-1, images.shape[-1]).numpy() for images in (x, y)]
        _mean, values = structural_similarity(*tall, data_range=255, full=True)
        values = values.reshape(x.shape)[..., inner, inner]
        means.append(values.mean(axis=(1, 2, 3)))
    return float(np.concatenate(means).mean())


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


# ------------------------------------------------------------------------------------- copies
CLOSEST_PAIRS = 10  # of a run, in its closest_pairs.png


def nearest_images(
    images: Tensor, training: Tensor, copy_features: Callable[[Tensor], Tensor] = pixels
) -> tuple[np.ndarray, np.ndarray]:
    """For each image its nearest training image: (distance, index), each (N,).

    Images (N, C, H, W) and (M, C, H, W) uint8. ``copy_features`` makes whole numbers of them, and
    the distance is the root mean square difference of these over 255: of pixels 1 from black to
    white.
    """
    a = copy_features(images).flatten(1).double()  # (N, d)
    a_squared = a.square().sum(dim=1, keepdim=True)  # (N, 1)

    # The nearest so far; the training images in pieces, as a whole class may be 100,000.
    smallest = torch.full((len(a),), math.inf, dtype=torch.float64)
    index = torch.zeros(len(a), dtype=torch.int64)
    for start in range(0, len(training), CHUNK):
        b = copy_features(training[start : start + CHUNK]).flatten(1).double()  # (chunk, d)

        # |x - y|^2, (N, chunk): exact (a copy has 0), as float64 holds whole numbers below 2^53.
        squared = a_squared + b.square().sum(dim=1) - 2 * (a @ b.T)
        nearest = squared.min(dim=1)
        is_nearer = nearest.values < smallest
        smallest = torch.where(is_nearer, nearest.values, smallest)
        index = torch.where(is_nearer, start + nearest.indices, index)

    distance = (smallest / a.shape[1]).sqrt() / 255
    return distance.numpy(), index.numpy()


class ClosestPairs(NamedTuple):
    """The generated images of a run that are nearest to a training image."""

    generated: Tensor  # (n, C, H, W) uint8
    training: Tensor  # (n, C, H, W) uint8
    distance: np.ndarray  # (n,), rising
    threshold: float  # of a near copy


def search_copies(
    images: Tensor, unseen: Tensor, training: Tensor, copy_features: Callable[[Tensor], Tensor]
) -> tuple[dict[str, float], dict[str, float], ClosestPairs]:
    """How near generated and held-out images are to training images, all (N, C, H, W) uint8.

    Returns the metrics of the generated images, then those of the held-out ones, their floor:
    ssim_nearest, the mean SSIM with the nearest training image; distance_ratio, the median distance
    to it over the held-out images' median (NaN where at least half of these are copies);
    near_copies, the share that is as near as the nearest 1 % of the held-out images.
    """
    distance, nearest = nearest_images(images, training, copy_features)
    unseen_distance, unseen_nearest = nearest_images(unseen, training, copy_features)
    threshold = float(np.percentile(unseen_distance, 1))
    unseen_median = np.median(unseen_distance)

    def statistics(some: Tensor, index: np.ndarray, to_nearest: np.ndarray) -> dict[str, float]:
        return {
            "ssim_nearest": ssim(some, training[index]),
            "distance_ratio": float(np.median(to_nearest) / unseen_median)
            if unseen_median > 0
            else math.nan,
            "near_copies": float((to_nearest <= threshold).mean()),
        }

    closest = np.argsort(distance, kind="stable")[:CLOSEST_PAIRS]
    return (
        statistics(images, nearest, distance),
        statistics(unseen, unseen_nearest, unseen_distance),
        ClosestPairs(images[closest], training[nearest[closest]], distance[closest], threshold),
    )


# ------------------------------------------------------------------- a run beside real images
# What is measured of a run, a row for each class, goes into its metrics.json:
#
#     {"run": "quantum_mnist3_nall_seed0", "label": 3, "condition": "", "settings": {"arm": ...},
#      "reference": "class", "features": "classifier:0f3a9c12d4e5", "preprocessing": ...,
#      "classifier": {"n_test": 10000, "test_accuracy": 0.99, ...},
#      "n_generated": 1000, "n_real": 6131,
#      "metrics": {"fid": 2.9, "fid_ratio": 1.7, ...},  # METRICS and "kid_standard_error"
#      "floor": {"n": 1000, "draws": 5, "from": "test split", "fid": 1.7, "fid_ratio": 1, ...},
#      "n_training": 6131, "n_held_out": 1010, "near_copy_threshold": 0.09, "note": "",
#      "machine": "cpu, AMD EPYC, AVX512, 1 thread, torch 2.14.1"}
#
# A conditional run has a list of these: its classes, "mean", and "all" without a search for copies.
# NaN is what could not be measured; in the file, as JSON has no NaN, null.
class Sample(NamedTuple):
    """Images with their features."""

    images: Tensor  # (N, C, H, W) uint8
    features: np.ndarray  # (N, d) float64; d = 0 with --features none

    def take(self, index: Tensor) -> "Sample":
        """Those with these numbers, in this order."""
        return Sample(self.images[index], self.features[index])


class Real(NamedTuple):
    """Real images of a class, or of all classes."""

    reference: Sample  # of the training split: what everything is compared with
    held_out: Sample  # new to the models, of the training images' distribution: the floor


class Evaluator:
    """Measures runs of one data source; what runs share (real images, floors) is kept.

    The real images of the classes ``which`` are what images of the classes ``shown`` are compared
    with, and the floor is of ``shown``:

        row                                      which     shown
        class 3                                  3         3
        class 3, --reference all                 "all"     3
        all classes of a model of 3 and 8        (3, 8)    (3, 8)

    options: features, reference, n_real, data_dir, seed, device and inception_weights of
    ``parse_options``.
    """

    def __init__(self, dataset: DataSet, source: str, options: argparse.Namespace) -> None:
        self.dataset = dataset
        self.source = source
        self.options = options
        self.folder = options.data_dir / "evaluation"  # of the classifier and features

        # real(which) and floor(which, shown, n) are measured once for all runs.
        self.real = functools.cache(self.measure_real)
        self.floor = functools.cache(self.measure_floor)

        # The classifier is tested on the held-out split and on the test split, perhaps the same.
        self.held_out_name = dataset.held_out_split[source]
        splits = {}
        for name in dict.fromkeys(["train", self.held_out_name, "test"]):  # each once
            _source, images, labels = dataset.module.load_images(source, options.data_dir, name)
            splits[name] = Split(images, labels)
        self.train = splits.pop("train")
        self.held_out = splits[self.held_out_name]
        self.tested_on = splits

        # The classifier judges labels. One class trains no classifier; where its features are asked
        # for all the same, load_classifier raises the error.
        self.classifier = None
        self.classifier_record = None
        if options.features == "classifier" or len(self.train.labels.unique()) > 1:
            self.classifier, self.classifier_record = load_classifier(
                source, self.folder, self.train, splits, options.seed
            )

        # What FID, KID, precision and recall compare.
        if options.features == "none":
            self.extractor = None
        elif options.features == "classifier":
            self.extractor = classifier_extractor(self.classifier, options.device)
        elif options.features == "inception":
            self.extractor = inception_extractor(options.inception_weights, options.device)
        else:
            self.extractor = dataset.own_extractors[options.features](self.train.images)

    def stream(self, *name: object) -> torch.Generator:
        """The evaluation's randomness for one purpose."""
        return random_stream(self.options.seed, "evaluation", *name)

    def sample(self, images: Tensor, keep: bool = False) -> Sample:
        """Images (N, C, H, W) uint8 with features. keep: for other evaluations, in a file."""
        if self.extractor is None:
            features = np.empty((len(images), 0))
        elif keep:
            features = cached_features(self.extractor, images, self.folder)
        else:
            features = self.extractor.features(images)
        return Sample(images, features)

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
        both = precision_recall(b[chosen], a[:size], NEIGHBOURS)
        metrics["precision"], metrics["recall"] = both
        return metrics

    def measure_real(self, which: Classes) -> Real:
        """A random subset of each split in its order, ``--n_real`` at most, alike for every run."""
        samples = []
        for split in (self.train, self.held_out):
            images = split.images if which == "all" else split.of_classes(which).images
            order = torch.randperm(len(images), generator=self.stream("reference"))
            chosen = order[: self.options.n_real].sort().values
            samples.append(self.sample(images[chosen], keep=True))
        return Real(*samples)

    def draws_held_out(self, which: Classes, shown: Classes, n: int) -> bool:
        """Whether the floor's images are held-out ones; else they are set aside from the reference.

        They are held-out ones where there are n, as many as were generated. Where there are fewer
        the reference stands in, if it shows the same classes; otherwise the floor has fewer images.
        """
        return which != shown or n <= len(self.real(shown).held_out.images)

    def floor_draws(
        self, which: Classes, shown: Classes, n: int
    ) -> Iterator[tuple[Sample, Sample]]:
        """Real images, as if they were generated, and those that they are compared with.

        n of them are drawn from the held-out images, several times, or from the reference (see
        ``draws_held_out``): at most half of it, compared with the rest.
        """
        reference = self.real(which).reference
        held_out = self.real(shown).held_out
        from_held_out = self.draws_held_out(which, shown, n)
        pool = held_out if from_held_out else reference
        size = min(n, len(held_out.images) if from_held_out else len(reference.images) // 2)
        one_draw_is_enough = size > ONE_DRAW_ABOVE or size == len(pool.images)
        for draw in range(1 if one_draw_is_enough else FLOOR_DRAWS):
            order = torch.randperm(len(pool.images), generator=self.stream("floor", draw))
            if from_held_out:
                yield held_out.take(order[:size]), reference
            else:
                yield reference.take(order[:size]), reference.take(order[size:])

    def measure_floor(self, which: Classes, shown: Classes, n: int) -> dict[str, Any]:
        """What n real images score: the mean over ``floor_draws``."""
        draws = list(self.floor_draws(which, shown, n))
        origin = SET_ASIDE
        if self.draws_held_out(which, shown, n):
            origin = f"{self.held_out_name} split"
        some, rest = draws[0]
        floor = {"n": len(some.images), "n_real": len(rest.images), "draws": len(draws)}
        floor["from"] = origin

        floor |= mean_of([self.compare(some, rest) for some, rest in draws])
        floor["fid_ratio"] = 1.0 if self.extractor is not None else math.nan
        return floor

    def measure_images(
        self, generated: Split, which: Classes, shown: Classes, unseen: Split
    ) -> dict[str, Any]:
        """Compares generated images with the reference, and measures their floor.

        unseen: all held-out images of these classes, for the classifier (the floor has --n_real at
        most). Returns n_generated, n_real, metrics, floor. Raises UserError where too few are real.
        """
        n = len(generated.images)
        reference = self.real(which).reference
        held_out = self.real(shown).held_out
        if len(reference.images) < FEWEST_REAL or len(held_out.images) < FEWEST_HELD_OUT:
            counts = f"{len(reference.images)} training and {len(held_out.images)} held-out images"
            expected = f"expected at least {FEWEST_REAL} and {FEWEST_HELD_OUT}"
            raise UserError(f"class {shown} of {self.source}: {counts}; {expected}")
        sample = self.sample(generated.images)
        metrics = self.compare(sample, reference)
        floor = self.floor(which, shown, n).copy()  # the kept one stays as it is

        # FID over that of real images: 1 is as good as they are.
        if floor["fid"] > 0:  # not NaN
            fid = metrics["fid"]
            if floor["n"] != n or not self.draws_held_out(which, shown, n):
                fid = self.fid_like_floor(sample, self.floor_draws(which, shown, n))
            metrics["fid_ratio"] = fid / floor["fid"]

        if self.classifier is not None:
            metrics["label_accuracy"] = accuracy(self.classifier, *generated)
            floor["label_accuracy"] = accuracy(self.classifier, *unseen)
        return {
            "n_generated": n,
            "n_real": len(reference.images),
            "metrics": metrics,
            "floor": floor,
        }

    def fid_like_floor(self, sample: Sample, draws: Iterable[tuple[Sample, Sample]]) -> float:
        """The FID of as many generated images as each of ``floor_draws`` has, beside the same rest.

        For a floor of fewer images, or one that is drawn from the reference.
        """
        n = len(sample.images)
        values = []
        for draw, (some, rest) in enumerate(draws):
            order = torch.randperm(n, generator=self.stream("ratio", draw))
            chosen = sample.features[order[: len(some.images)]]
            values.append(frechet_distance(chosen, rest.features))
        return float(np.mean(values))

    def measure(self, run: Run) -> tuple[list[dict[str, Any]], dict[str, ClosestPairs]]:
        """All figures of a run, a row for each class, and by the row's name its closest pairs.

        Of a conditional run two rows follow: the mean over its classes ("mean"), and its images of
        all classes together ("all").
        """
        by_class = self.training_images(run)
        measured: dict[int | str, dict[str, Any]] = {}
        pairs = {}
        for label, images in run.images.items():
            unseen = self.held_out.of_class(label)
            which = label if self.options.reference == "class" else "all"
            part = self.measure_images(Split(images, label), which, label, Split(unseen, label))

            # Copies of what this class was trained on.
            training = by_class[label]
            if "symmetries" in run.trained_on:  # class by class, as they are eight times more
                training = self.dataset.module.symmetries(training)
            of_generated, of_unseen, closest = search_copies(
                images, unseen, training, self.dataset.copy_features
            )
            part["metrics"] |= of_generated
            part["floor"] |= of_unseen
            part["n_training"] = len(training)
            part["n_held_out"] = len(unseen)
            part["near_copy_threshold"] = closest.threshold
            measured[label] = part
            pairs[self.row_name(run, label)] = closest

        if run.conditional:
            mean = mean_of(list(measured.values()))
            # The KIDs of the classes are independent, but with --reference all: they share it, and
            # this error is too small.
            for part in ("metrics", "floor"):
                errors = [of_class[part]["kid_standard_error"] for of_class in measured.values()]
                mean[part]["kid_standard_error"] = math.hypot(*errors) / len(errors)

            # All its classes at once; copies are searched class by class alone. The classes take
            # turns, as some metrics look at the first images only.
            images = torch.stack(list(run.images.values()), dim=1)  # (n, classes, C, H, W)
            labels = torch.tensor(list(run.images)).repeat(len(images))  # (n classes,)
            which = tuple(run.images)
            unseen = self.held_out.of_classes(which)
            together = self.measure_images(
                Split(images.flatten(0, 1), labels), which, which, unseen
            )
            together["n_training"] = sum(part["n_training"] for part in measured.values())
            measured |= {"mean": mean, "all": together}
        return [self.row(run, label, part) for label, part in measured.items()], pairs

    def check(self, run: Run) -> None:
        """Raises UserError for a run whose images, or training images, are not of this data set."""
        shape = self.train.images.shape[1:]
        for images in run.images.values():
            if images.shape[1:] != shape:
                found = f"images of shape {tuple(images.shape[1:])}, expected {tuple(shape)}"
                raise UserError(f"{run.folder}: {found}")
        self.training_images(run)

    def training_images(self, run: Run) -> dict[int, Tensor]:
        """The images that a run was trained on, by class: (n, C, H, W) uint8, before symmetries.

        Raises UserError when they are not the ones that its configuration describes.
        """
        n_train, seed = run.settings["n_train"], run.settings["seed"]
        select_images = self.dataset.module.select_images
        found = f"{run.folder}: trained on other images than are in {self.options.data_dir}"
        by_class = {}
        for label in run.images:
            try:
                by_class[label] = select_images(*self.train, label, n_train, seed)
            # Fewer images of the class than it was trained on; each script has its own class.
            except (UserError, self.dataset.module.UserError) as error:
                raise UserError(f"{found} ({error})") from None

        # The training script's checksum, of the pixels alone.
        together = torch.cat(list(by_class.values()))
        digest = hashlib.sha256(together.contiguous().numpy()).hexdigest()
        if digest != run.trained_on.get("sha256"):
            raise UserError(found)
        return by_class

    def row(self, run: Run, label: int | str, measured: dict[str, Any]) -> dict[str, Any]:
        """A row as it goes into ``metrics.json``."""
        # What a reader of the row must know.
        notes = []
        if self.extractor is not None and measured["n_generated"] < FID_WARNING_BELOW:
            notes.append(f"FID biased upwards: n < {FID_WARNING_BELOW}")
        if "symmetries" in run.trained_on:
            notes.append("trained with augmentation")
        if measured["floor"]["n"] < measured["n_generated"]:
            notes.append(f"floor at n = {measured['floor']['n']}")
        elif measured["floor"]["n_real"] < measured["n_real"]:
            notes.append("FID / real measured against the floor's real images")
        if self.source in ("digits", "tissue"):
            notes.append(f"against embedded {self.source}")

        return {
            "run": self.row_name(run, label),
            "label": label,
            "condition": run.condition,
            "settings": run.settings,
            # Of the row "all" it is all classes of the run; see scale_of.
            "reference": "all" if label == "all" else self.options.reference,
            "features": str(self.extractor or "none"),
            "preprocessing": self.extractor and self.extractor.preprocessing,
            "classifier": self.classifier_record,
            "machine": run.machine,
            **measured,
            "metrics": none_for_nan(measured["metrics"]),
            "floor": none_for_nan(measured["floor"]),
            "note": "; ".join(notes),
        }

    def row_name(self, run: Run, label: int | str) -> str:
        """What a row of the tables is: the run, and if it has several classes which."""
        if not run.conditional:
            return run.folder.resolve().name
        name = self.dataset.module.CLASS_NAMES[label] if isinstance(label, int) else label
        return f"{run.folder.resolve().name}: {name}"


def mean_of(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each entry: of counts rounded, of dictionaries again entry by entry.

    Of texts it is the different ones, with "; " between them; NaN where one of the parts is NaN.
    Dictionaries come last.
    """
    mean = {}
    for key, first in sorted(parts[0].items(), key=lambda item: isinstance(item[1], dict)):
        values = [part[key] for part in parts]
        if isinstance(first, dict):
            mean[key] = mean_of(values)
        elif isinstance(first, str):
            mean[key] = "; ".join(dict.fromkeys(values))
        else:
            value = float(np.mean(values))
            mean[key] = round(value) if isinstance(first, int) else value
    return mean


def none_for_nan(values: dict[str, Any]) -> dict[str, Any]:
    """The same for JSON, which has no NaN."""
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in values.items()
    }


# ------------------------------------------------------------------ what is compared with what
BASELINES = ("matched", "classical")  # control arms, unless --against names others
BUDGET = ["steps", "batch_size", "lr", "muon_lr", "ema_decay"]  # what all runs should have alike
BUDGET += ["n_qubits", "n_layers", "timesteps", "sample_steps"]
OF_A_GATE = ["n_qubits", "n_layers"]  # mean nothing without a gate
ONE_RUN = ["data", "features", "reference", "n_train", "label", "variant", "seed"]  # name a row


def comparison_csv(results: list[dict[str, Any]]) -> str:
    """``comparison.csv``: one row per result with settings, metrics ("fid"), floors ("floor_fid").

    results: rows of ``metrics.json``. A label is a class, or "mean" or "all".
    """
    rows = []
    for result in results:
        floors = {f"floor_{key}": value for key, value in result["floor"].items()}
        rows.append(result["settings"] | result | result["metrics"] | floors)

    columns = ["run", "arm", "condition", "data", "label", "n_train", "seed", *BUDGET]
    columns += ["features", "reference", "n_generated", "n_real", "n_training", "note"]
    columns += [*METRICS, "kid_standard_error"]
    columns += [f"floor_{key}" for key in results[0]["floor"]]
    columns.append("machine")
    return pd.DataFrame(rows)[columns].astype({"n_train": "Int64"}).to_csv(index=False)


def read_comparison(file: Path | io.StringIO) -> pd.DataFrame:
    """``comparison.csv``, one row per result: all tables and figures are made of this.

    ``n_train`` is infinite for a whole class. Columns are added, for example

        arm       condition            steps   conditional   other_budget   variant
        matched                        1250    False                        matched
        quantum                        1250    False                        quantum
        quantum                        1150    False         "1150 steps"   quantum 1150 steps
        quantum   conditional_shots10  1250    True                         quantum conditional_...

    ``variant`` is what tables and figures tell apart, an ordered category that ends with FLOOR;
    ``scale`` see ``scale_of``. Raises ValueError for another table, and UserError for two runs that
    nothing here tells apart.
    """
    # Nothing but an empty cell is missing; of these columns it is an empty text.
    texts = dict.fromkeys(["run", "arm", "condition", "label", "note", "machine"], "")
    kinds = dict.fromkeys([*texts, "data", "features", "reference"], str)
    frame = pd.read_csv(file, dtype=kinds, keep_default_na=False, na_values="")
    check_columns(frame)
    frame = frame.fillna(texts | {"n_train": np.inf})
    frame["label"] = whole_labels(frame["label"])
    for name in frame.columns.intersection(WHOLE):  # another program may have made 8.0 of 8
        frame[name] = frame[name].astype("int64")

    frame = with_all_columns(frame)
    frame["conditional"] = frame["condition"].str.startswith("conditional")
    frame["other_budget"] = other_budget(frame)
    frame["scale"] = scale_of(frame)

    # Variants in the order of ARMS, then arms that it does not know; also in tables and figures.
    arms = arms_of(frame)
    words = frame["arm"] + " " + frame["condition"] + " " + frame["other_budget"]
    frame["variant"] = words.str.split().str.join(" ")
    arm_of = dict(zip(frame["variant"], frame["arm"], strict=True))
    variants = sorted(arm_of, key=lambda name: (arms.index(arm_of[name]), name))
    frame["variant"] = pd.Categorical(frame["variant"], [*variants, FLOOR], ordered=True)

    # Two runs that nothing tells apart would count as two seeds.
    repeated = frame[frame.duplicated(ONE_RUN, keep=False)]
    for _, rows in repeated.groupby(ONE_RUN, observed=True):
        first, second = rows["run"].iloc[:2]
        alike = f"{rows['variant'].iloc[0]} of one class, size, seed and budget"
        found = f"{first} and {second} are both {alike}; evaluate each by itself"
        if first == second:
            found = f"{first} is there twice, as {alike}; evaluate each by itself, or remove a row"
        raise UserError(found)
    return frame


def arms_of(frame: pd.DataFrame) -> list[str]:
    """The arms of ARMS, then the table's arms that are not there."""
    return [*ARMS, *sorted(set(frame["arm"]) - set(ARMS))]


def whole_labels(labels: pd.Series) -> pd.Series:
    """Labels as texts: "3" where another program made "3.0" of it."""
    return labels.str.removesuffix(".0")


def with_all_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """A table of an earlier version with the columns that it lacks.

    Metrics are NaN, the machine is "", and the floor's number of real images is that of the row
    less those that were set aside.
    """
    keys = [*METRICS, "kid_standard_error"]
    expected = [name for key in keys for name in (key, f"floor_{key}")]
    expected.append("floor_n_real")
    frame = frame.reindex(columns=frame.columns.union(expected, sort=False))
    set_aside = frame["floor_n"].where(frame["floor_from"] == SET_ASIDE, 0)
    rest = frame["n_real"] - set_aside
    frame["floor_n_real"] = frame["floor_n_real"].fillna(rest).astype(int)
    if "machine" not in frame:
        frame["machine"] = ""
    return frame


# Columns of a comparison.csv that hold whole numbers in every row.
WHOLE = ["seed", "n_generated", "n_real", "floor_n"]


def check_columns(frame: pd.DataFrame) -> None:
    """Raises ValueError for a table that lacks columns, cells or rows, or has no numbers."""
    texts = ["run", "arm", "data", "label", "features", "reference"]
    numbers = ["seed", "steps", "n_generated", "n_real", "floor_n"]
    missing = {*texts, *numbers, "condition", "n_train", "note", "floor_from"} - {*frame.columns}
    if missing:
        raise ValueError(f"no column {', '.join(sorted(missing))}")
    if len(single_classes(frame)) == 0:
        raise ValueError("no rows of single classes")
    empty = [name for name in [*texts, *numbers] if frame[name].isna().any()]
    if empty:
        raise ValueError(f"empty cells in {', '.join(empty)}")
    measured = [*METRICS, "kid_standard_error", "n_real"]
    numbers += [*BUDGET, "n_train", "n_training", *measured, *(f"floor_{key}" for key in measured)]
    for name in frame.columns.intersection(numbers):
        pd.to_numeric(frame[name])  # raises ValueError for text
    for name in frame.columns.intersection(WHOLE):
        if (frame[name].astype(float) % 1 != 0).any():  # of infinity it is NaN
            raise ValueError(f"{name}: expected whole numbers")


def other_budget(frame: pd.DataFrame) -> pd.Series:
    """What a variant's name says of its budget, for example "1150 steps"; "": the usual one.

    A column of BUDGET is named where (1) the row's arm has several values of it for this data, size
    and condition, over all classes and seeds, and (2) the row's value is not the usual one: the
    commonest of all arms for this data, size, class and kind of model (of a tie that which is
    commoner in all classes, then the largest). By class, as training by epochs gives each its own
    number of steps. Without a gate, qubits and layers do not count. The sampling steps are in
    ``condition`` and left out here.
    """
    kind_of_model = frame["condition"].str.extract("^(conditional[^_]*)", expand=False)
    kind_of_model = kind_of_model.fillna("single")
    found = pd.Series("", index=frame.index)
    for name in BUDGET:
        if name == "sample_steps" or name not in frame:  # a table of an earlier version
            continue
        # The usual value of each class: the last, in order of how often it is there.
        alike = ["data", "n_train", kind_of_model]
        counts = frame.assign(counts=(frame["arm"] != "classical") | (name not in OF_A_GATE))
        in_class = counts.groupby([*alike, "label", name])["counts"].transform("sum")
        in_all = counts.groupby([*alike, name])["counts"].transform("sum")
        rising = frame.assign(in_class=in_class, in_all=in_all)
        rising = rising.sort_values(["in_class", "in_all", name])
        usual = rising.groupby([*alike, "label"])[name].transform("last").reindex(frame.index)

        values_of_arm = frame.groupby(["data", "n_train", "arm", "condition"])[name]
        has_several = values_of_arm.transform("nunique") > 1
        is_other = has_several & (frame[name] != usual) & frame[name].notna()
        found += (" " + frame[name].map("{:.10g} ".format) + name).where(is_other, "")
    return found.str.strip()


def scale_of(frame: pd.DataFrame) -> pd.Series:
    """What rows must share to be averaged, for example "inception, reference all".

    The kind of features and, if there are several references, the reference.
    The reference of a conditional run's row "all" is always all; it goes with the run's classes.
    """
    features = frame["features"].str.split(":").str[0]
    name = frame["run"].str.split(": ").str[0]  # of the run
    of_the_run = single_classes(frame).groupby(name)["reference"].first()
    own = frame["reference"].where(frame["label"] != "all", name.map(of_the_run).fillna("class"))
    several = own.groupby([frame["data"], features]).transform("nunique") > 1
    return features + (", reference " + own).where(several, "")


def single_classes(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of single classes, without the "mean" and "all" of conditional runs."""
    return frame[~frame["label"].isin(["mean", "all"])]


def pairs_of_runs(
    frame: pd.DataFrame, baseline: str, against: Sequence[str] = BASELINES, is_strict: bool = True
) -> pd.DataFrame:
    """One row per run that has a base among the runs of the arm ``baseline``.

    The base is of the same class, training-set size and seed, with the first of these taken away
    that applies:

        run                      its base         which differs in
        matched 1150 steps       matched          the budget: never in another arm
        quantum shots10_steps2   matched steps2   the arm, with the circuit's condition
        quantum                  matched          the arm, where that is one of ``against``
        product shots10          quantum shots10  the same, if that arm has this condition
        quantum                  strong shots10   the same, if that arm has no other
        matched shots10_steps2   matched steps2   the circuit's condition
        matched steps2           matched          the sampling steps
        matched conditional      matched          one model for all classes instead of each

    Both were trained on as many images, symmetries included. is_strict: the base was judged by the
    same features, and has as many images, generated and real. The columns of the base end with
    "_base".
    """
    bases = frame[(frame["arm"] == baseline) & (frame["other_budget"] == "")]
    bases = bases.assign(condition_of_base=bases["condition"])
    part = ["data", "scale", "n_train"]
    conditions_of = bases.groupby(part)["condition"].agg(set)
    wanted = []
    for run in frame[[*part, "arm", "condition", "other_budget"]].to_dict("records"):
        there = conditions_of.get(tuple(run[name] for name in part), set())
        wanted.append(base_condition(run, baseline, against, there))
    runs = frame.assign(condition_of_base=wanted).dropna(subset="condition_of_base")
    same = ["data", "n_train", "label", "seed", "condition_of_base"]
    if is_strict:
        same += ["features", "reference", "n_generated", "n_real"]
    pairs = runs.merge(bases, on=same, suffixes=("", "_base"))
    if "n_training" in frame:  # a table of an earlier version may lack it
        is_known = pairs[["n_training", "n_training_base"]].notna().all(axis=1)
        pairs = pairs[~is_known | (pairs["n_training"] == pairs["n_training_base"])]
    return pairs


def baselines_of(frame: pd.DataFrame, against: Sequence[str]) -> list[str]:
    """``against``, then the table's other arms, each a base of its own other conditions."""
    present = set(frame["arm"])
    others = [arm for arm in arms_of(frame) if arm in present and arm not in against]
    return [*against, *others]


def base_condition(
    run: dict[str, Any], baseline: str, against: Sequence[str], there: set[str]
) -> str | None:
    """The condition of a run's base in the arm ``baseline``; None: it has none in that arm.

    there: the conditions that this arm has, of runs of as many training images.
    """
    condition = run["condition"]
    is_own = run["arm"] == baseline
    if run["other_budget"]:  # matched 1150 steps -> matched
        return condition if is_own else None

    # In another arm.
    plain = without_circuit(condition)
    if not is_own:
        if baseline not in against:
            return None
        if condition in there:  # product shots10 -> quantum shots10
            return condition
        alike = [other for other in there if without_circuit(other) == plain]
        if plain not in alike and len(alike) == 1:  # matched -> strong lightning.qubit
            return alike[0]
        return plain  # quantum shots10_steps2 -> matched steps2

    # In its own arm.
    if plain != condition:  # quantum shots10_steps2 -> quantum steps2
        return plain
    conditional, _, sampling = parts_of(condition)
    if sampling:  # matched steps2 -> matched
        return conditional
    return "" if conditional else None  # matched conditional -> matched; matched has no base


def parts_of(condition: str) -> tuple[str, str, str]:
    """The parts of a condition: one model of all classes, the circuit's, sampling steps.

    "conditional_shots10_steps2" has "conditional", "shots10" and "steps2".
    """
    return re.fullmatch(r"(conditional[^_]*)?_?(.*?)_?(steps\d+)?", condition).groups(default="")


def without_circuit(condition: str) -> str:
    """The condition without the circuit's part: "conditional_steps2"."""
    conditional, _, sampling = parts_of(condition)
    return f"{conditional}_{sampling}".strip("_")


def shared_classes(frame: pd.DataFrame, within: list[str], series: list[str]) -> pd.DataFrame:
    """Keep only the classes that every series has, so that all means are over the same classes.

    ``within`` splits the table into blocks, ``series`` each block into series. For example
    "quantum" has classes 0 and 1 at seed 0, and "matched" has class 0 at seed 1: only 0 is kept.
    """
    kept = [frame[:0]]  # keeps the columns where there are no rows
    for _, rows in frame.groupby(within, observed=True):
        classes = rows.groupby(series, observed=True)["label"].agg(set)  # one set per series
        kept.append(rows[rows["label"].isin(set.intersection(*classes))])
    return pd.concat(kept).sort_index()


def comparable_runs(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs of those classes that every variant and seed has at a training-set size."""
    return shared_classes(frame, within=["n_train"], series=["variant", "seed"])


def comparable_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs of those classes that every seed has, for each variant and training-set size."""
    return shared_classes(pairs, within=["n_train", "variant"], series=["seed"])


def with_floors(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs, and below them their floors as rows of the variant FLOOR.

    In the place of the seed is which floor of its class and size it is: the same for runs of all
    seeds, so that ``class_means`` takes their mean as well; another where runs have other numbers
    of images or, in rows of all classes, models have other classes.
    """
    # By number of images, then classes; counted from 1 within each class and size.
    kind = runs["n_generated"].map("{:09d}".format) + classes_of(runs)
    rank = kind.rank(method="dense")
    which = rank.groupby([runs["n_train"], runs["label"]]).rank(method="dense").astype(int)
    floors = runs.assign(
        variant=pd.Categorical([FLOOR] * len(runs), dtype=runs["variant"].dtype),
        seed=which,
        n_generated=runs["floor_n"],
        n_real=runs["floor_n_real"],
        **{key: runs[f"floor_{key}"] for key in METRICS},
    )
    return pd.concat([runs, floors])


def classes_of(rows: pd.DataFrame) -> pd.Series:
    """The classes that rows are about: a label, or for "all" those of a model of some, "3-8"."""
    of_model = rows["condition"].str.extract("^conditional-([^_]*)", expand=False)
    return of_model.where(rows["label"] == "all").fillna(rows["label"])


def minus_base(pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs, with the difference of a run and its base as metrics."""
    return pairs.assign(**{key: pairs[key] - pairs[f"{key}_base"] for key in METRICS})


def class_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over the classes: index n_train, variant, seed, columns METRICS.

    NaN when one class is NaN, so that all means are over the same classes. Each class counts once,
    also where its run was measured by several judges.
    """
    series = ["n_train", "variant", "seed"]
    by_class = frame.groupby([*series, "label"], observed=True)[[*METRICS]].mean()
    groups = by_class.groupby(series, observed=True)
    complete = groups.count().eq(groups.size(), axis=0)  # False where a class is NaN
    return groups.mean()[complete]


def over_seeds(means: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of ``class_means`` and half-width of its 95 % interval by Student's t.

    One row for each variant, n_train and measured metric; the half-width is NaN for one seed.

        variant   n_train   metric   seeds   mean    sem     half
        matched   inf       fid      5       3.012   0.050   0.139
    """
    values = means.reset_index().melt(["variant", "n_train", "seed"], var_name="metric").dropna()
    values["metric"] = pd.Categorical(values["metric"], METRICS)  # for their order
    groups = values.groupby(["variant", "n_train", "metric"], observed=True)["value"]
    statistics = groups.agg(seeds="count", mean="mean", sem="sem").reset_index()
    quantile = stats.t.ppf(0.975, statistics["seeds"] - 1)
    return statistics.assign(half=quantile * statistics["sem"])


def paired_differences(pairs: pd.DataFrame) -> pd.DataFrame:
    """``over_seeds`` of comparable pairs, what each row is made of, and whether 0 is outside.

    For example, beside the columns of ``over_seeds``:

        variant_base   classes   pairs   low      high    leaves_zero_out
        matched        2         10      -0.013   0.214   False
    """
    series = ["variant", "n_train"]  # with one baseline each has the same base in all pairs
    groups = pairs.groupby(series, observed=True)
    made_of = groups.agg(variant_base=("variant_base", "first"), classes=("label", "nunique"))
    differences = over_seeds(class_means(minus_base(pairs))).merge(made_of, on=series)
    differences["pairs"] = differences["seeds"] * differences["classes"]
    differences["low"] = differences["mean"] - differences["half"]
    differences["high"] = differences["mean"] + differences["half"]
    # A sum of differences that is 0 may round to 1e-17.
    differences["leaves_zero_out"] = differences["mean"].abs() > differences["half"] + 1e-12
    return differences


# ------------------------------------------------ relative differences of FID and their tests
COMPARISON = ["baseline", "data", "scale", "n_train", "variant", "variant_base"]
DECIDING_UNITS = 5  # seeds, or independent pairs: with fewer the verdict is "too few"
SIGNIFICANCE = 0.05  # of the tests of relative differences
MARGIN = 4.0  # per cent of FID: of the tests of equivalence


def all_pairs_of(frame: pd.DataFrame, against: Sequence[str] = BASELINES) -> pd.DataFrame:
    """The pairs of all baselines, one below the other; of single classes.

    Beside classical - matched there is no matched - classical, if ``against`` names matched first.
    """
    classes = single_classes(frame)
    baselines = baselines_of(classes, against)
    parts = [pairs_of_runs(classes, arm, against).assign(baseline=arm) for arm in baselines]
    pairs = pd.concat(parts, ignore_index=True)

    place = {arm: number for number, arm in enumerate(against)}
    run, base = ["arm", "condition"], ["baseline", "condition_base"]
    one_way, other_way = (pd.MultiIndex.from_frame(pairs[way]) for way in (run + base, base + run))
    is_mirrored = one_way.isin(other_way)
    is_repeated = is_mirrored & (pairs["arm"].map(place) < pairs["baseline"].map(place))
    pairs["baseline"] = pd.Categorical(pairs["baseline"], baselines)  # for their order
    return pairs[~is_repeated]


def relative_differences(frame: pd.DataFrame, against: Sequence[str] = BASELINES) -> pd.DataFrame:
    """The pairs, with the relative difference of FID of a run a and its base b in "percent".

    100 (a - b) / ((a + b) / 2).
    """
    pairs = all_pairs_of(frame, against)
    a = pairs["fid"]
    b = pairs["fid_base"]
    percent = 100 * (a - b) / ((a + b) / 2)
    return pairs.assign(percent=percent).dropna(subset="percent")


def fid_comparisons(
    frame: pd.DataFrame, margin: float, family: int = 0, against: Sequence[str] = BASELINES
) -> pd.DataFrame:
    """One row per comparison and training-set size: statistics of the units and the verdict.

    frame: ``read_comparison`` of one table, or several of these below each other. margin: in per
    cent. The p of each test are adjusted over all rows with enough units, counted as at least
    ``family`` tests; the other rows have none. against: the arms that all others are compared with.
    """
    rows = []
    for key, pairs in relative_differences(frame, against).groupby(COMPARISON, observed=True):
        # Independent units. Of single-class models every pair is one: initial weights and all
        # random streams depend on class and seed. The classes of a conditional model share them: a
        # seed is one, the mean of its classes.
        unit = "class × seed"
        values = pairs["percent"]
        if pairs["conditional"].all():
            unit = "seed"
            values = comparable_pairs(pairs).groupby("seed")["percent"].mean()

        row = dict(zip(COMPARISON, key, strict=True)) | {"unit": unit, "n": len(values)}
        rows.append(row | unit_statistics(values, margin))

    comparisons = pd.DataFrame(rows)
    if len(rows) == 0:
        return comparisons
    can_decide = comparisons["n"] >= DECIDING_UNITS
    for test in ("p_different", "p_equivalent"):
        comparisons[test] = holm(comparisons[test].where(can_decide), family)
    return comparisons.assign(verdict=comparisons.apply(verdict, axis=1))


def unit_statistics(values: pd.Series, margin: float) -> dict[str, float]:
    """Mean and SD of the units, Student's t intervals and p; NaN where the units have no spread.

    p_different: two-sided t test of mean 0. p_equivalent: two one-sided t tests (TOST; Schuirmann
    1987) of a mean above -margin and below +margin, the larger p.
    """
    limits_and_p = ["low_90", "high_90", "low_95", "high_95", "p_different", "p_equivalent"]
    statistics = {"mean": values.mean(), "sd": values.std()} | dict.fromkeys(limits_and_p, math.nan)
    if not values.std() > 1e-9:  # per cent: equal but for rounding, or one unit
        return statistics

    student = {"df": len(values) - 1, "loc": values.mean(), "scale": values.sem()}
    statistics["low_90"], statistics["high_90"] = stats.t.interval(0.90, **student)
    statistics["low_95"], statistics["high_95"] = stats.t.interval(0.95, **student)

    statistics["p_different"] = stats.ttest_1samp(values, 0).pvalue
    above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(values, margin, alternative="less").pvalue
    statistics["p_equivalent"] = max(above, below)
    return statistics


def holm(p: pd.Series, family: int = 0) -> pd.Series:
    """Holm's adjustment (1979) for several tests.

    The smallest of m values is multiplied by m, the next by m - 1 and so on; at most 1, and never
    below the one before. NaN is no test, and stays. family: the least m; of tests that are planned
    and not made, the p count as 1.
    """
    rising = p.dropna().sort_values()
    m = max(len(rising), family)
    adjusted = rising * np.arange(m, m - len(rising), -1)
    return adjusted.cummax().clip(upper=1).reindex(p.index)


def verdict(comparison: pd.Series) -> str:
    """What both adjusted tests say together, at the level SIGNIFICANCE."""
    if comparison["n"] < DECIDING_UNITS:
        return "too few"
    is_different = comparison["p_different"] < SIGNIFICANCE
    is_equivalent = comparison["p_equivalent"] < SIGNIFICANCE
    if is_different and is_equivalent:
        return "different but within the margin"
    if is_different:
        return "different"
    if math.isnan(comparison["p_different"]):  # as of runs and their copies
        return "no spread"
    return "equivalent" if is_equivalent else "undecided"


# -------------------------------------------------------------- tables: numbers become text
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
    # Columns as wide as their widest cell, a rule under the header.
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (header, *rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])

    texts = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        texts.append(f"| {' | '.join(cells)} |")
    return "\n".join(texts)


def result_table(frame: pd.DataFrame) -> str:
    """One row per result, below it what real images score at the same n."""
    rows = []
    for run in frame.to_dict("records"):
        cells = metric_cells(run, prefix="")
        sampled = "sampled" if "_sampled" in run["condition"] else ""  # not in the folder's name
        name = " ".join(word for word in (run["run"], sampled, run["other_budget"]) if word)
        numbers = [str(run["n_generated"]), str(run["n_real"])]
        rows.append([name, *numbers, run["features"], *cells, run["note"]])
        cells = metric_cells(run, prefix="floor_")
        numbers = [str(run["floor_n"]), str(run["floor_n_real"])]
        rows.append([f"  {FLOOR}", *numbers, run["features"], *cells, run["floor_from"]])

    headings = [metric.heading for metric in METRICS.values()]
    return table(["run", "n", "n real", "features", *headings, "note"], rows)


def metric_cells(run: dict[str, Any], prefix: str) -> list[str]:
    """A run's metrics, or with the prefix ``floor_`` its floors; KID with its standard error."""
    cells = {key: show(run[prefix + key], METRICS[key].form) for key in METRICS}
    cells["kid"] += show(run[f"{prefix}kid_standard_error"], " ±{:.1g}", missing="")
    return list(cells.values())


def arm_table(runs: pd.DataFrame) -> str:
    """Per training-set size and variant: mean over seeds and 95 % interval; then the floors.

    ``runs`` are comparable. There are several floors of a size where runs have different numbers of
    images: each is of its own number.
    """
    frame = with_floors(runs)
    means = class_means(frame)
    keys = [key for key in METRICS if frame[key].notna().any()]
    cells = {}
    for item in over_seeds(means.drop(FLOOR, level="variant")).itertuples():
        form = METRICS[item.metric].form
        text = show(item.mean, form) + show(item.half, f" ± {form}", missing="")
        cells[item.n_train, item.variant, item.metric] = text

    def row_of(size: float, variant: str, seeds: str, group: pd.DataFrame) -> list[str]:
        row = [show_size(size), variant, each_once(classes_of(group)), seeds]
        return [*row, each_once(group["n_generated"]), each_once(group["n_real"])]

    rows = []
    for (size, variant), group in frame.groupby(["n_train", "variant"], observed=True):
        if variant != FLOOR:
            row = row_of(size, variant, each_once(group["seed"]), group)
            rows.append([*row, *(cells.get((size, variant, key), "–") for key in keys)])
            continue
        for which, of_which in group.groupby("seed"):
            floors = means.loc[size, variant, which]
            row = row_of(size, variant, "–", of_which)
            rows.append([*row, *(show(floors[key], METRICS[key].form) for key in keys)])

    header = ["N", "arm", "classes", "seeds", "n generated", "n real"]
    return table([*header, *(METRICS[key].heading for key in keys)], rows)


def each_once(values: pd.Series) -> str:
    """The different values in rising order, for example 0/1/2."""
    return "/".join(str(value) for value in sorted(set(values)))


def difference_table(differences: pd.DataFrame) -> str:
    """One row per difference; a star where the interval leaves zero out.

    The last column says that only from DECIDING_UNITS seeds on.
    """
    rows = []
    for item in differences.itertuples():
        metric = METRICS[item.metric]
        signed = metric.form.replace("{:", "{:+")  # "+0.12"
        row = [f"{item.variant} − {item.variant_base}", show_size(item.n_train), metric.heading]
        row += [str(item.pairs), str(item.seeds), show(item.mean, signed)]

        limits = "–"
        if item.seeds > 1:
            limits = f"[{show(item.low, signed)}, {show(item.high, signed)}]"
            limits += " *" if item.leaves_zero_out else ""
        clear = "yes" if item.leaves_zero_out else "no"
        if item.seeds < DECIDING_UNITS:
            clear = "too few seeds"
        rows.append([*row, limits, clear])

    header = ["difference", "N", "metric", "pairs", "seeds", "mean", "95 % interval", "clear of 0"]
    return table(header, rows)


def relative_table(comparisons: pd.DataFrame) -> str:
    """One row per comparison of ``fid_comparisons``."""
    rows = []
    several = kinds_of_parts(comparisons)
    for item in comparisons.itertuples():
        ending = "".join(f", {getattr(item, name)}" for name in several)
        row = [f"{item.variant} − {item.variant_base}{ending}", show_size(item.n_train)]
        row += [item.unit, str(item.n), show(item.mean, "{:+.2f}"), show(item.sd, "{:.2f}")]
        for low, high in ((item.low_95, item.high_95), (item.low_90, item.high_90)):
            row.append(f"[{low:+.2f}, {high:+.2f}]" if np.isfinite(low) else "–")
        row += [show(item.p_different, "{:.3g}"), show(item.p_equivalent, "{:.3g}"), item.verdict]
        rows.append(row)

    header = ["difference", "N", "unit", "n", "mean %", "SD", "95 % interval", "90 % interval"]
    return table([*header, "p different", "p equivalent", "verdict"], rows)


RELATIVE_TEXT = (
    "The relative difference of a pair is 100 (a − b) / ((a + b) / 2) in per cent. A unit is a "
    "class and seed of single-class models, or a seed of conditional models, whose classes are "
    "averaged first. p different: two-sided t test; p equivalent: two one-sided t tests with a "
    "margin of ±{margin:g} %. Both are Holm-adjusted over the rows of this table that have at "
    "least {fewest} units{as_planned}, and decide at {level:g} %; the intervals are not adjusted. "
    "Units that are all equal, such as copies, are not tested. "
    "Few images raise all FIDs and so lower the percentages."
)

FLOOR_TEXT = (
    "A floor is the mean over draws of as many held-out images as were generated or, where these "
    "are too few, of training images, at most half, against the rest (beside --reference all: of "
    "fewer held-out images). The ± of its KID is that "
    "of one draw. Its SSIM nearest, distance ratio, near copies and label accuracy are of all "
    "held-out images: the ratio is 1, and near copies are 1 %, but at least one image. SSIM "
    "diversity is the mean SSIM of two images: the lower, the more diverse."
)


def comparison_text(
    frame: pd.DataFrame, margin: float = MARGIN, family: int = 0, against: Sequence[str] = BASELINES
) -> str:
    """The Markdown report on several runs; what else it takes see ``fid_comparisons``."""
    paragraphs = []
    for part in by_source(frame).values():
        paragraphs += source_paragraphs(part, against)

    comparisons = fid_comparisons(frame, margin, family, against)
    if len(comparisons) > 0:
        as_planned = f", counted as at least {family} tests" if family else ""
        explanation = RELATIVE_TEXT.format(
            margin=margin, fewest=DECIDING_UNITS, as_planned=as_planned, level=100 * SIGNIFICANCE
        )
        paragraphs += ["## Relative differences of FID", explanation, relative_table(comparisons)]
        if frame.loc[frame["other_budget"] != "", "arm"].nunique() > 1:
            paragraphs.append(
                "Arms are compared at their usual budget alone; at another, evaluate its runs by "
                "themselves."
            )
    paragraphs += warnings_about(all_pairs_of(frame, against))
    paragraphs += ["## Runs", result_table(frame)]
    return "\n\n".join(text for text in paragraphs if text) + "\n"


def warnings_about(pairs: pd.DataFrame) -> list[str]:
    """What else than its arm or condition may have made a difference, a paragraph each.

    Not where the variant's name has it: another budget in one arm, other sampling steps.
    """
    paragraphs = []
    is_unnamed = pairs["other_budget"] == ""
    without_gate = pairs[["arm", "arm_base"]].eq("classical").any(axis=1)
    for name in BUDGET:
        if name == "sample_steps" or name not in pairs:  # a table of an earlier version
            continue
        is_known = pairs[[name, f"{name}_base"]].notna().all(axis=1)
        is_unequal = is_unnamed & is_known & (pairs[name] != pairs[f"{name}_base"])
        if name in OF_A_GATE:
            is_unequal &= ~without_gate
        if is_unequal.any():
            words = "training steps" if name == "steps" else name
            unequal = f"Pairs whose two runs had different {words}: {is_unequal.sum()}"
            paragraphs.append(f"**{unequal}. Their difference is one of {name}, too.**")

    is_known = (pairs["machine"] != "") & (pairs["machine_base"] != "")
    is_elsewhere = is_known & (pairs["machine"] != pairs["machine_base"])
    if is_elsewhere.any():
        paragraphs.append(
            f"**Pairs whose two runs were made on different machines: {is_elsewhere.sum()}. "
            "Rounding is different there, which training enlarges.**"
        )
    return paragraphs


def kinds_of_parts(frame: pd.DataFrame) -> list[str]:
    """The columns that split a table: "data" if it has several, "scale" if a source has several."""
    columns = []
    if frame["data"].nunique() > 1:
        columns.append("data")
    if frame.groupby("data")["scale"].nunique().max() > 1:
        columns.append("scale")
    return columns


def by_source(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """A table in parts that may share a mean: of one data source and scale.

    By the ending of the part's figures' names: "" where there is one, else for example "_mnist".
    """
    several = kinds_of_parts(frame)
    parts = {}
    for key, part in frame.groupby(several) if several else [((), frame)]:
        used = part["variant"].cat.remove_unused_categories().cat.add_categories(FLOOR)
        ending = "".join(f"_{re.sub(', | ', '-', word)}" for word in key)
        parts[ending] = part.assign(variant=used)
    return parts


def source_paragraphs(frame: pd.DataFrame, against: Sequence[str]) -> list[str]:
    """The report on the runs of one data source and scale: means, and paired differences."""
    classes = single_classes(frame)
    together = frame[frame["label"] == "all"]
    runs = comparable_runs(classes)
    features = ", ".join(sorted(set(frame["features"])))
    notes = {note for cell in frame["note"] for note in cell.split("; ") if note}
    if classes["floor_from"].nunique() > 1:
        notes.add(
            "floors and FID / real of two kinds (see the rows of runs): their means mix these"
        )
    if classes["features"].nunique() > 1:
        notes.add(
            "features of several networks: means and absolute differences mix their scales; "
            "relative differences and FID / real do not"
        )
    paragraphs = [
        "# Comparison of runs",
        f"Features: {features}. Real images: {frame['data'].iloc[0]}, "
        f"reference {frame['reference'].iloc[0]}. Mean over seeds ± half of the 95 % interval "
        f"(Student's t). {FLOOR}: held-out images, as many as generated.",
        FLOOR_TEXT,
        f"Budget: {budget_text(classes)}.",
        "; ".join(sorted(notes)),
        arm_table(runs) if len(runs) > 0 else "",
    ]
    if len(runs) < len(classes):
        left_out = f"{len(classes) - len(runs)} of {len(classes)} runs are left out"
        paragraphs.append(f"{left_out}: every arm and seed of that size must have the class.")
    if len(together) > 0:
        paragraphs += ["## All classes of a model together", arm_table(together)]

    # All arms against the controls, then every other arm's conditions against the arm itself.
    for baseline in baselines_of(classes, against):
        if baseline not in set(classes["arm"]):
            continue
        all_pairs = pairs_of_runs(classes, baseline, against)
        with_others = pairs_of_runs(classes, baseline, against, is_strict=False)
        is_paired = with_others.set_index(ONE_RUN).index.isin(all_pairs.set_index(ONE_RUN).index)
        lost = len(with_others[~is_paired].drop_duplicates(ONE_RUN))
        if len(with_others) > 0:
            paragraphs.append(f"## Paired differences against {baseline}")
        if len(all_pairs) > 0:
            paragraphs += difference_paragraphs(all_pairs)
        if lost > 0:
            paragraphs.append(
                "Pairs that were judged by different features (the checksum counts), or have "
                f"different numbers of images, and are in no difference: {lost}."
            )
    return paragraphs


def difference_paragraphs(all_pairs: pd.DataFrame) -> list[str]:
    """The table of the pairs that are comparable, and what a reader of it must know."""
    pairs = comparable_pairs(all_pairs)
    differences = paired_differences(pairs)
    paragraphs = [difference_table(differences)]
    if len(pairs) < len(all_pairs):
        left_out = f"{len(all_pairs) - len(pairs)} of {len(all_pairs)} pairs are left out"
        paragraphs.append(f"{left_out}: every seed of that difference must have the class.")

    # How many intervals leave zero out, and how many would by chance.
    intervals = differences[differences["seeds"] > 1]
    if len(intervals) > 0:
        paragraphs.append(
            f"{intervals['leaves_zero_out'].sum()} of {len(intervals)} intervals (Student's t over "
            "seeds) leave zero out (*). If nothing differed, chance would make that "
            f"{0.05 * len(intervals):.2g} on average, with a wide spread, since the metrics depend "
            "on each other."
        )
    return paragraphs


def budget_text(frame: pd.DataFrame) -> str:
    """What the runs were allowed, in bold where they differ."""
    texts = []
    for column in [*BUDGET, "n_generated"]:
        if column not in frame:  # of an older version
            continue
        values = frame[column].dropna().unique()
        heading = "images" if column == "n_generated" else column
        text = f"{heading} {' / '.join(f'{value:.10g}' for value in values)}"
        if frame[column].isna().any():
            text += " (not known of all runs)"
        texts.append(text if len(values) < 2 else f"**{text} (not the same in all runs)**")
    return ", ".join(texts)


# ------------------------------------------------------------------------------------- figures
FIGURE_METRICS = ["fid", "kid", "precision", "recall"]
FIGURE_METRICS += ["ssim_diversity", "label_accuracy", "distance_ratio", "near_copies"]
FOREST_LINE = 32  # characters of a comparison that forest.png has in one line
OVERVIEW_COLUMNS = 15  # images in a row of overview.png, about

FLOOR_COLOUR = "#666666"
OTHER_COLOUR = "#999999"  # of the user's own arms; their markers tell them apart
ARM_COLOURS = {  # Okabe & Ito
    "classical": "#000000",
    "matched": "#E69F00",
    "quantum": "#0072B2",
    "published": "#D55E00",
    "product": "#009E73",
    "frozen": "#CC79A7",
    "se": "#56B4E9",
}
MARKERS = "os^DvpP*X<>hHd8"  # of the variants that share a colour: an arm under its conditions


def draw_closest_pairs(pairs: dict[str, ClosestPairs]) -> Figure:
    """``closest_pairs.png``: generated images above the training images nearest to them.

    pairs: for each class by its name, which has a panel of its own.
    """
    figure = Figure(figsize=(7.5, 2.1 * len(pairs)), layout="constrained")
    panels = figure.subplots(len(pairs), 1, squeeze=False).flat
    for axes, (name, closest) in zip(panels, pairs.items(), strict=True):
        count = len(closest.generated)
        show_tiles(axes, torch.cat([closest.generated, closest.training]), columns=count)

        side = closest.generated.shape[-1] + mnist.TILE_PADDING
        axes.set_xticks((np.arange(count) + 0.5) * side, [f"{x:.3f}" for x in closest.distance])
        axes.set_yticks([0.5 * side, 1.5 * side], ["generated", "training"])
        axes.tick_params(length=0, labelsize=7)

        title = f"{name}: closest pairs, RMS difference (near copy: ≤ {closest.threshold:.3f})"
        axes.set_title(title, fontsize=8, parse_math=False)
    return figure


def draw_panels(
    frame: pd.DataFrame, against_size: bool, against: Sequence[str] = BASELINES
) -> Figure:
    """``comparison.png``, or ``against_size`` ``scaling.png``: one panel per metric.

    Above, each variant's mean and 95 % interval over seeds, small dots for the seeds, the floor as
    a dashed line; training-set sizes side by side or, ``against_size``, on a logarithmic axis with
    a line for each variant. Below, when it has runs, the paired differences from the first arm of
    ``against``.
    """
    # What is drawn: every variant's means and, where there are pairs, their differences.
    frame = single_classes(frame)
    if against_size:  # a line joins means over the same classes
        frame = shared_classes(frame, within=["data"], series=["n_train"])
    runs = comparable_runs(frame)
    if len(runs) == 0:
        sizes = "all sizes" if against_size else "a size"
        raise UserError(f"no class is there for all arms and seeds of {sizes}")
    means = class_means(with_floors(runs))
    baseline = against[0]
    pairs = comparable_pairs(pairs_of_runs(frame, baseline, against))
    differences = class_means(minus_base(pairs))
    has_differences = len(differences) > 0
    metrics = [key for key in FIGURE_METRICS if frame[key].notna().any()]

    # Where: each size has its middle on the x axis, and a slot there for every variant. The slots
    # fill 80 % of ``slot * count`` around the middle, the floor's dashed line 90 %.
    variants = [name for name in frame["variant"].cat.categories if name != FLOOR]
    count = len(variants)
    sizes = frame.groupby("n_train")["n_training"].mean()  # training images, by n_train
    if against_size:
        middle = np.log10(sizes)
        gaps = middle.sort_values().diff()
        slot = min(0.06, gaps[gaps > 0].min() / count)  # no size reaches the next
        ticks = [f"{size:.0f}" for size in sizes]
    else:
        middle = pd.Series(np.arange(len(sizes)), index=sizes.index)
        slot = 1 / count
        ticks = [show_size(n_train) for n_train in sizes.index]
    offsets = 0.8 * slot * (np.arange(count) - (count - 1) / 2)
    places = {variant: middle + offset for variant, offset in zip(variants, offsets, strict=True)}
    places[FLOOR] = middle
    half_floor = 0.45 * slot * count

    # Four metrics side by side, the differences below each.
    rows = math.ceil(len(metrics) / 4)
    row_height = 3.9 if has_differences else 2.6
    figure = Figure(figsize=(12, row_height * rows), layout="constrained")
    parts = figure.subfigures(rows, 4, squeeze=False).flat
    for metric, part in zip(metrics, parts, strict=False):
        heading = METRICS[metric].heading
        if has_differences:
            upper, lowest = part.subplots(2, 1, sharex=True, height_ratios=[2, 1])
            draw_variants(lowest, differences[metric], places, half_floor, against_size)
            lowest.axhline(0, color=colour_of(baseline), linewidth=1)
            lowest.set_ylabel(f"{heading}\n− {baseline}")
        else:
            upper = lowest = part.subplots()

        draw_variants(upper, means[metric], places, half_floor, against_size)
        upper.set_ylabel(heading)

        # Many sizes, or near ones on a logarithmic axis, would overlap if written level.
        turned = {"rotation": 45, "fontsize": 6} if len(ticks) > 3 else {"fontsize": 8}
        lowest.set_xticks(middle, ticks, **turned)
        lowest.set_xlabel("training images" + (" (log scale)" if against_size else ""))

    # One legend for all panels.
    handles, labels = figure.axes[0].get_legend_handles_labels()
    longest = max((len(label) for label in labels), default=0)
    columns = max(1, min(7, 130 // (longest + 7)))  # of what 12 inches hold
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def draw_variants(
    axes: Axes, values: pd.Series, places: dict[str, pd.Series], half_floor: float, with_lines: bool
) -> None:
    """One panel: values by n_train, variant and seed, as mean, interval and a dot for each seed.

    ``places`` of all variants, a number for each n_train; FLOOR is a dashed line of this half width
    around its place. ``with_lines`` from size to size.
    """
    for variant, rows in over_seeds(values.to_frame()).groupby("variant", observed=True):
        if variant == FLOOR:  # of each number of images
            floors = values.xs(variant, level="variant").dropna()
            x = places[variant].loc[floors.index.get_level_values("n_train")]
            ends = x - half_floor, x + half_floor
            axes.hlines(floors, *ends, FLOOR_COLOUR, "--", label=FLOOR, linewidth=1)
            continue

        x = places[variant].loc[rows["n_train"]]
        style = variant_style(variant, list(places)) | {"linestyle": "-" if with_lines else "none"}
        axes.errorbar(x, rows["mean"], rows["half"], label=variant, **style)

        # A dot for each seed.
        dots = values.xs(variant, level="variant").dropna()  # by n_train and seed
        x = places[variant].loc[dots.index.get_level_values("n_train")]
        axes.scatter(x, dots, s=5, color=style["color"], alpha=0.4)


def colour_of(variant: str) -> str:
    """The colour of a variant's arm."""
    return ARM_COLOURS.get(variant.split()[0], OTHER_COLOUR)


def variant_style(variant: str, variants: Sequence[str]) -> dict[str, Any]:
    """How a variant is drawn: its arm's colour, and among those of this colour its own marker."""
    alike = [other for other in variants if colour_of(other) == colour_of(variant)]
    marker = MARKERS[alike.index(variant) % len(MARKERS)]
    sizes = {"linewidth": 1, "elinewidth": 0.8, "capsize": 2, "markersize": 4}
    return {"color": colour_of(variant), "marker": marker, **sizes}


def draw_forest(comparisons: pd.DataFrame, margin: float) -> Figure:
    """``forest.png``: one row per comparison of ``fid_comparisons``, those of most units above.

    The mean as a point, the 90 % interval thick, the 95 % interval thin; the margin in per cent as
    a band.
    """
    comparisons = comparisons.sort_values("n", ascending=False, kind="stable")
    places = np.arange(len(comparisons))
    colours = [colour_of(variant) for variant in comparisons["variant"]]
    figure = Figure(figsize=(7, 1.2 + 0.32 * len(comparisons)), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-margin, margin, color="#E5E5E5", label=f"margin ±{margin:g} %")
    axes.axvline(0, color=FLOOR_COLOUR, linewidth=0.8)
    for confidence, width in ((95, 1.2), (90, 4)):
        low = comparisons[f"low_{confidence}"]
        high = comparisons[f"high_{confidence}"]
        name = f"{confidence} % interval"
        axes.hlines(places, low, high, colours, linewidth=width, label=name)
    style = {"s": 30, "c": colours, "edgecolors": "white", "zorder": 3}
    axes.scatter(comparisons["mean"], places, label="mean", **style)

    # Comparisons at the left, numbers of units at the right.
    axes.set_yticks(places, forest_labels(comparisons))
    axes.set_ylim(len(comparisons) - 0.4, -0.6)
    right = axes.secondary_yaxis("right")
    right.set_yticks(places, [f"n = {n}" for n in comparisons["n"]])
    for side in (axes, right):
        side.tick_params(axis="y", length=0, labelsize=8)

    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("relative difference of FID, % (below 0 the first is better)", fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def forest_labels(comparisons: pd.DataFrame) -> list[str]:
    """What is compared, with what there are several of; if long in two lines."""
    sizes = comparisons["n_train"]
    several = kinds_of_parts(comparisons)
    labels = []
    for item in comparisons.itertuples():
        ending = f", N = {show_size(item.n_train)}" if sizes.nunique() > 1 else ""
        ending += "".join(f", {getattr(item, name)}" for name in several)
        length = len(item.variant) + len(item.variant_base) + len(ending)
        space = "\n" if length > FOREST_LINE else " "
        labels.append(f"{item.variant}{space}− {item.variant_base}{ending}")
    return labels


def draw_overview(runs: Sequence[Run], frame: pd.DataFrame, evaluator: Evaluator) -> Figure:
    """``overview.png``: a panel for each of ``overview_cells``, their first images side by side."""
    cells = overview_cells(runs, frame, evaluator)
    rows = list(dict.fromkeys(row for row, _column in cells))
    columns = list(dict.fromkeys(column for _row, column in cells))

    # Every cell has the same number of images, white where some are missing.
    each = max(1, OVERVIEW_COLUMNS // len(columns))
    white = torch.full_like(next(iter(cells.values()))[:1], 255).repeat(each, 1, 1, 1)

    # Tiles are square, and all of them about 5 of the figure's 6 inches.
    row_height = 5 / each / len(columns)
    figure = Figure(figsize=(6, 0.3 + (row_height + 0.05) * len(rows)))
    figure.set_layout_engine("constrained", h_pad=0.02, hspace=0)
    panels = figure.subplots(len(rows), len(columns), squeeze=False)
    for row, in_row in zip(rows, panels, strict=True):
        for column, axes in zip(columns, in_row, strict=True):
            images = cells.get((row, column), white)[:each]
            show_tiles(axes, torch.cat([images, white[len(images) :]]), columns=each)
        in_row[0].set_ylabel(row, ha="right", va="center", rotation=0, fontsize=7)
    for column, axes in zip(columns, panels[0], strict=True):
        axes.set_title(textwrap.fill(column, max(9, 90 // len(columns))), fontsize=7)
    return figure


def overview_cells(
    runs: Sequence[Run], frame: pd.DataFrame, evaluator: Evaluator
) -> dict[tuple[str, str], Tensor]:
    """What ``overview.png`` shows: by row and column, images (n, C, H, W) of the lowest seed.

    Real training images and those of each variant. Of one class they are the rows; of several each
    class is a row, and they are the columns. Each training-set size has its own rows.
    """
    labels = {label for run in runs for label in run.images}
    names = evaluator.dataset.module.CLASS_NAMES
    select_images = evaluator.dataset.module.select_images

    # The table has one row for each class of each run, in the runs' order.
    by_class = [(run, label) for run in runs for label in run.images]
    shown = single_classes(frame).assign(by_class=by_class).sort_values("seed", kind="stable")
    shown = shown.drop_duplicates(["n_train", "variant", "label"])

    cells = {}
    for n_train, of_size in shown.sort_values("variant", kind="stable").groupby("n_train"):
        ending = "" if np.isinf(n_train) else f", N = {n_train:.0f}"
        found = []  # name, class, images

        # What the first variant was trained on, and what each made.
        for row in of_size.drop_duplicates("label").sort_values("label").itertuples():
            run, label = row.by_class
            real = select_images(*evaluator.train, label, run.settings["n_train"], row.seed)
            found.append(("real", label, real))
        for row in of_size.itertuples():
            run, label = row.by_class
            found.append((row.variant, label, run.images[label]))

        for name, label, images in found:
            one_class = (name + ending, names[label])
            several = (names[label] + ending, name)
            cells[one_class if len(labels) == 1 else several] = images
    return cells


# ----------------------------------------------------------------------- the published procedure
# Published: 5 generated images against the first 5 training images of any class, FID and paired
# SSIM. Beside it 5 real images of the run's own class, PAPER_DRAWS times, as a perfect generator
# would draw them: how far chance alone moves both figures.
PAPER_IMAGES = 5
PAPER_METRICS = ("fid", "ssim_paired")
PAPER_DRAWS = 100


def evaluate_as_published(evaluator: Evaluator, runs: Sequence[Run], out: Path | None) -> None:
    """The published procedure: into each run's folder, a table, and into ``out`` the table."""
    for run in runs:
        evaluator.check(run)
        fewest = min(len(images) for images in run.images.values())
        if fewest < PAPER_IMAGES:
            raise UserError(f"{run.folder}: {fewest} images, expected {PAPER_IMAGES} of a class")

    first_training = evaluator.sample(evaluator.train.images[:PAPER_IMAGES])  # of any class
    labels = sorted({label for run in runs for label in run.images})
    real_scores = {label: real_paper_scores(evaluator, label, first_training) for label in labels}
    records = []
    for run in tqdm(runs, "runs", delay=2, leave=False):
        of_run = [
            paper_record(evaluator, run, label, first_training, real_scores[label])
            for label in run.images
        ]
        records += of_run
        write_json(run.folder / "metrics_paper.json", of_run if run.conditional else of_run[0])

    text = paper_table(records, evaluator.dataset.paper_scores)
    say(text)
    if out is not None:
        write_atomic(out / "paper_protocol.md", f"{text}\n")


def real_paper_scores(evaluator: Evaluator, label: int, first_training: Sample) -> pd.DataFrame:
    """The scores of PAPER_DRAWS draws of real images of a class, one row per draw.

    The draws are from at most 2 * PAPER_DRAWS images, and never from the first training images.
    """
    images, labels = evaluator.train
    is_other = torch.arange(len(images)) >= PAPER_IMAGES
    pool = images[is_other & (labels == label)]

    # A pool that is small enough for InceptionV3; then draws of five different images from it.
    generator = evaluator.stream("paper")
    order = torch.randperm(len(pool), generator=generator)[: 2 * PAPER_DRAWS]
    pool = evaluator.sample(pool[order])
    scores = []
    for _ in range(PAPER_DRAWS):
        five = torch.randperm(len(order), generator=generator)[:PAPER_IMAGES]
        scores.append(evaluator.compare(pool.take(five), first_training))
    return pd.DataFrame(scores)


def paper_record(
    evaluator: Evaluator, run: Run, label: int, first_training: Sample, real: pd.DataFrame
) -> dict[str, Any]:
    """As in ``metrics_paper.json``: scores of a class, mean and central 95 % of real images'."""
    images = run.images[label][:PAPER_IMAGES]
    score = evaluator.compare(evaluator.sample(images), first_training)

    record = {
        "run": evaluator.row_name(run, label),
        "n_generated": PAPER_IMAGES,
        "n_real": PAPER_IMAGES,
        "draws": PAPER_DRAWS,
        "features": str(evaluator.extractor),
    }
    for metric in PAPER_METRICS:
        low, high = np.percentile(real[metric], [2.5, 97.5])
        record[metric] = {
            "run": score[metric],
            "real_mean": float(real[metric].mean()),
            "real_95": [float(low), float(high)],
        }
    return record


def paper_table(records: Sequence[dict[str, Any]], paper_scores: dict[str, tuple]) -> str:
    """One row per record; below them the paper's own figures."""
    rows = []
    for record in records:
        row = [record["run"], str(record["n_generated"]), str(record["n_real"]), record["features"]]
        for metric in PAPER_METRICS:
            score = record[metric]
            low, high = (show(value, "{:.4g}") for value in score["real_95"])
            row += [show(score["run"], "{:.4g}"), show(score["real_mean"], "{:.4g}")]
            row.append(f"{low} to {high}")
        rows.append(row)

    # The paper's own figures; of real images it says nothing.
    for arm, (fid, ssim_paired) in paper_scores.items():
        name = f"paper, {arm} (withdrawn by its authors)"
        rows.append([name, "5", "5", "inception", str(fid), "–", "–", str(ssim_paired), "–", "–"])

    real = ["real images", f"95 % of {PAPER_DRAWS} draws"]
    header = ["run", "n", "n real", "features", "FID", *real, "SSIM paired", *real]
    return table(header, rows)


# -------------------------------------------------------------------------------- command line
def parse_options(argv: Sequence[str] | None, dataset: DataSet) -> argparse.Namespace:
    """The command line's options; raises UserError for those that make no sense."""
    parser = OneLineParser(
        description="FID, KID, precision, recall, SSIM, label accuracy and copies of run folders "
        f"({' or '.join(dataset.held_out_split)}), each beside what held-out real images score."
    )
    add = parser.add_argument
    default = "(default: %(default)s)"
    features = [*dataset.own_extractors, "classifier", "inception", "none"]
    # fmt: off
    add("runs", nargs="*", type=mnist.a_path, help="folders with config.json, samples_final.png")
    add("--csv", nargs="+", type=mnist.a_path, default=[], metavar="FILE",
        help="tables of earlier evaluations (comparison.csv): the rows of these runs are added to "
        "the first, and --out shows them all; of a run in several the last")
    add("--features", choices=features,
        help="what FID, KID, precision and recall compare; classifier: of a CNN trained on the "
        f"data (default: {features[0]}; with --protocol paper: inception)")
    add("--inception_weights", type=mnist.a_path, metavar="FILE", help="Inception's, a local copy")
    add("--reference", choices=["class", "all"], default="class",
        help=f"real training images are of the run's class or of all {default}")
    add("--n_real", type=int, default=10_000, metavar="N",
        help=f"at most so many real images, drawn by the seed {default}")
    add("--data_dir", type=mnist.a_path, default=Path("data"),
        help=f"data set; keeps classifier, features {default}")
    add("--out", type=mnist.a_path, metavar="DIR",
        help="write comparison.csv, .md, .png and overview.png; with several sizes scaling.png; "
        "with pairs of runs forest.png, in place of those there; with --protocol paper only "
        "paper_protocol.md")
    add("--against", nargs="+", metavar="ARM",
        help="arms that every other is compared with; comparison.png has the differences from the "
        f"first (default: {' '.join(BASELINES)})")
    add("--margin", type=float, metavar="PER CENT",
        help=f"relative differences of FID within it are equivalent (default: {MARGIN:g})")
    add("--family", type=int, metavar="N",
        help="Holm's adjustment counts at least N tests, those that are not there as p = 1")
    add("--protocol", choices=["full", "paper"], default="full",
        help=f"paper: 5 images against the first 5 training images of any class {default}")
    add("--seed", type=int, default=0, help=f"of classifier, subsets and floors {default}")
    add("--device", default="auto", help=f"for the features: auto, cpu, cuda or cuda:N {default}")
    # fmt: on

    # What argparse cannot check.
    options = parser.parse_args(argv)
    options.device, _rank, _processes = mnist.this_process(options.device)
    if options.n_real <= NEIGHBOURS:
        raise UserError(f"--n_real {options.n_real}: expected more than {NEIGHBOURS}")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed {options.seed}: expected 0 to {2**32 - 1}")
    if not options.runs and (not options.csv or options.out is None):
        raise UserError("no runs: expected run folders, or --csv and --out to show tables again")
    if options.margin is not None and not 0 < options.margin < math.inf:
        raise UserError(f"--margin {options.margin:g}: expected per cent above 0")
    if options.family is not None and options.family < 0:
        raise UserError(f"--family {options.family}: expected a number of tests")
    if options.against is not None:
        options.against = [*dict.fromkeys(options.against)]
    for name, otherwise in (("margin", MARGIN), ("family", 0), ("against", BASELINES)):
        if getattr(options, name) is None:
            setattr(options, name, otherwise)
        elif options.out is None or options.protocol == "paper":
            raise UserError(f"--{name}: expected --out, and no --protocol paper")
    if options.protocol == "paper" and options.csv:
        raise UserError("--csv: --protocol paper makes no such table")
    if options.protocol == "paper" and options.features == "none":
        raise UserError("--features none: --protocol paper needs features, use inception")
    if options.features is None:
        options.features = "inception" if options.protocol == "paper" else features[0]
    if options.inception_weights is not None and options.features != "inception":
        raise UserError("--inception_weights: expected --features inception")
    return options


def evaluate(options: argparse.Namespace, dataset: DataSet) -> None:
    """Measure the runs by the protocol that was asked for."""
    runs = read_runs(options.runs, dataset)

    # A table that cannot be read, and an arm that is not there, are errors now, not later.
    earlier = options.csv
    if runs and earlier and not earlier[0].exists():  # it will be made of these runs
        earlier = earlier[1:]
    tables = read_tables(earlier)
    check_against(options.against, runs, tables)

    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    if not runs:
        write_tables(tables, options)
        return

    evaluator = Evaluator(dataset, runs[0].settings["data"], options)
    record = evaluator.classifier_record
    if record is not None:
        shares = [
            f"{record[f'{split}_accuracy']:.2%} of {record[f'n_{split}']} {split} images"
            for split in evaluator.tested_on
        ]
        say(f"classifier: {', '.join(shares)}")

    if options.protocol == "paper":
        evaluate_as_published(evaluator, runs, options.out)
    else:
        evaluate_fully(evaluator, runs, options)


def check_against(against: Sequence[str], runs: Sequence[Run], tables: Sequence[str]) -> None:
    """Raises UserError for an arm of ``--against`` of which there is no run."""
    arms = {run.settings["arm"] for run in runs}
    arms.update(*(read_comparison(io.StringIO(text))["arm"] for text in tables))
    for arm in against:
        if arm not in arms and against is not BASELINES:
            raise UserError(f"--against {arm}: no such run, expected of {', '.join(sorted(arms))}")


def evaluate_fully(evaluator: Evaluator, runs: Sequence[Run], options: argparse.Namespace) -> None:
    """All metrics: into each run's folder, a table, and into ``--out`` tables and figures."""
    # One that cannot be measured is an error now, not after the others.
    for run in runs:
        evaluator.check(run)

    # Each run's figures are written as soon as they are known.
    results = []
    for run in tqdm(runs, "runs", delay=2, leave=False):
        rows, pairs = evaluator.measure(run)
        results += rows
        write_json(run.folder / "metrics.json", rows if run.conditional else rows[0])
        draw(run.folder / "closest_pairs.png", draw_closest_pairs, pairs)

    # Printed before anything that may fail.
    measured = comparison_csv(results)
    frame = read_comparison(io.StringIO(measured))  # of these runs alone
    say(result_table(frame))

    # Added to the table of earlier evaluations, and shown with the other ones. What was just
    # measured is the last, and so replaces others.
    if options.csv:
        kept = options.csv[0]
        kept.parent.mkdir(parents=True, exist_ok=True)
        with locked(kept):
            merged = joined([*read_tables([kept] if kept.exists() else []), measured])
            read_comparison(io.StringIO(merged))  # what cannot be in one table is an error
            write_atomic(kept, merged)
    if options.out is not None:
        write_tables([*read_tables(options.csv), measured], options)
        draw(options.out / "overview.png", draw_overview, runs, frame, evaluator)


LOCK_TIMEOUT = 30  # seconds; a table is written in less than one


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other evaluations from writing a table, where the disk has locks.

    Raises UserError when it cannot be locked within LOCK_TIMEOUT.
    """
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(NotImplementedError):
            try:
                stack.enter_context(lock.acquire(timeout=LOCK_TIMEOUT))
            except filelock.Timeout:
                found = "another evaluation is writing it, or its folder takes no files"
                raise UserError(f"{path}: {found}") from None
        yield


def read_tables(files: Sequence[Path]) -> list[str]:
    """The texts of several comparison.csv. Raises UserError for another file."""
    texts = []
    for file in files:
        with reading(file, "a comparison.csv"):
            text = file.read_text(encoding="utf-8")
            try:
                read_comparison(io.StringIO(text))
            except UserError as error:
                raise UserError(f"{file}: {error}") from None
            texts.append(text)
    return texts


def joined(texts: Sequence[str]) -> str:
    """The text of one comparison.csv with the rows of several, to the letter.

    Of rows of one run with equal settings, reference and number of training images the last stays,
    even if its features are of another kind; but one of --features none replaces no other. The
    folder's name alone does not tell a run. Numbers are compared as numbers: a spreadsheet makes
    3.00E-03 of 0.003.
    """
    parts = [pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False) for text in texts]
    rows = pd.concat(parts, ignore_index=True)

    # Equal numbers, however they are written.
    same = ["run", "arm", "condition", "data", "label", "n_train", "seed"]
    told = rows[same].copy()
    told["label"] = whole_labels(told["label"])
    told[["n_train", "seed"]] = told[["n_train", "seed"]].apply(pd.to_numeric)  # NaN: the class

    # The later one of two stays; rows without features are the first.
    has_features = rows["features"].ne("none")
    told["place"] = has_features.sort_values(kind="stable").index.argsort()
    told = told.reset_index()
    both = told.merge(told, on=same, suffixes=("", "_later"))
    both = both[both["place"] < both["place_later"]]

    # They are one run, unless both have a setting, and another. Earlier versions' tables lack some.
    for name in rows.columns.intersection([*BUDGET, "reference", "n_training"]):
        values = rows[name].replace("", np.nan)
        if name != "reference":
            values = pd.to_numeric(values)
        one, later = (values[both[index]].to_numpy() for index in ("index", "index_later"))
        both = both[(one == later) | pd.isna(one) | pd.isna(later)]
    return rows.drop(index=both["index"]).to_csv(index=False)


def write_tables(texts: Sequence[str], options: argparse.Namespace) -> None:
    """Tables and figures of all rows of several comparison.csv, into ``--out``."""
    out = options.out
    csv = joined(texts)
    frame = read_comparison(io.StringIO(csv))
    write_atomic(out / "comparison.csv", csv)
    report = comparison_text(frame, options.margin, options.family, options.against)
    write_atomic(out / "comparison.md", report)

    # Figures of what there is, with several sources or scales one of each; none of others stays.
    sources = "|".join([*MNIST.held_out_split, "pathmnist", "tissue"])
    scales = "(classifier|inception|scattering|none)(-reference-(class|all))?"
    of_a_part = rf"(comparison|scaling)(_({sources}))?(_{scales})?"
    ours = re.compile(rf"({of_a_part}|forest|overview)\.png")
    for path in out.iterdir():
        if ours.fullmatch(path.name):
            path.unlink()
    for ending, part in by_source(frame).items():
        draw(out / f"comparison{ending}.png", draw_panels, part, False, options.against)
        if part["n_train"].nunique() > 1:
            draw(out / f"scaling{ending}.png", draw_panels, part, True, options.against)
    comparisons = fid_comparisons(frame, options.margin, against=options.against)  # no p: no family
    if len(comparisons) > 0:
        draw(out / "forest.png", draw_forest, comparisons, options.margin)
    say(f"written to {out}")


def write_json(path: Path, content: Any) -> None:
    """Write an indented JSON file; one in a colleague's folder is not worth stopping for."""
    with optional(path):
        write_atomic(path, f"{json.dumps(content, indent=2)}\n")


def draw(path: Path, make: Callable[..., Figure], *arguments: Any, **options: Any) -> None:
    """Write the picture that ``make`` draws; one that fails is a note, and leaves no older one."""
    with optional(path):
        path.unlink(missing_ok=True)
        save_figure(path, make, *arguments, **options)


def main(argv: Sequence[str] | None = None, dataset: DataSet = MNIST) -> None:
    """Run the command line. Exit codes: 0 done, 2 a mistake of the user's, 130 interrupted."""
    with exit_codes(dataset.module.UserError):
        evaluate(parse_options(argv, dataset), dataset)


if __name__ == "__main__":
    main()
