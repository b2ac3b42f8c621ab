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
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy import linalg, ndimage, stats
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from torchvision.models import Inception_V3_Weights, inception_v3
from tqdm import tqdm

import quantum_diffusion_mnist as mnist
from quantum_diffusion_mnist import (
    ARMS,
    IMAGE_SIZE,
    TILE_PADDING,
    UserError,
    choose_device,
    load_grid,
    random_stream,
    save_figure,
    tile,
    to_float,
    write_atomic,
)

CONTRASTS = (128, 64, 32, 16, 8, 4)  # 8-bit levels by which a tile may differ from the ground
FID_WARNING_BELOW = 1000  # images
FID_INFINITY_SIZES = 15  # subsets
NEIGHBOURS = 3  # k of precision and recall
SSIM_PAIRS = 2000  # at most so many pairs make ssim_diversity
FLOOR_DRAWS = 5  # samples of real images whose mean is the floor
FLOOR = "real images (floor)"
SAMPLE_COLUMNS = 12  # images in a row of samples.png
PAPER_IMAGES = 5
PAPER_DRAWS = 100
CLASSIFIER_STEPS = 1000
CLASSIFIER_BATCH = 128
DECIDING_SEEDS = 5  # fewer decide nothing
CHUNK = 500  # rows of a distance or kernel matrix that are in memory at once
Boxes = list[tuple[int, int, int, int]]  # left, top, right, bottom in pixels

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
FIGURE_METRICS = ("fid", "kid", "precision", "recall", "label_accuracy", "ssim_diversity")
FIGURE_METRICS += ("distance_ratio", "near_copies")
# What makes two runs a pair, and the settings that a comparison of arms must share.
PAIR = ["n_train", "label", "seed"]
BUDGET = ["steps", "batch_size", "lr", "ema_decay", "n_qubits", "n_layers", "timesteps"]
BUDGET += ["sample_steps"]
BASELINES = ("matched", "classical")
ARM_COLOURS = dict(  # Okabe & Ito's colour-blind-safe palette
    zip(ARMS, ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True)
)
MARKERS = "os^Dvp"  # of an arm's conditions


# ---------------------------------------------------------------- from a picture to its images


class Grid(NamedTuple):
    """The images of one picture: ``images`` uint8 (N, C, H, W) with C = 1 or 3, ``boxes`` (left,
    top, right, bottom) in pixels of the picture, ``ground`` its RGB colour, ``method`` "metadata"
    or "detected", ``confidence`` in [0, 1] (1 for metadata)."""

    images: torch.Tensor
    boxes: Boxes
    ground: tuple[int, int, int]
    method: str
    confidence: float


def split_grid(path: str | Path, size: int = IMAGE_SIZE) -> Grid:
    """Cut a picture into its images, in reading order.

    A PNG with this project's ``grid`` text chunk is split to the bit. In any other picture (of an
    animation: the last frame) the tiles are found as equal rectangles on a uniform ground and
    brought back to ``size`` x ``size`` pixels.

    Raises UserError for an unreadable or truncated file and for an ambiguous layout.
    """
    picture, metadata = read_picture(path)
    if metadata is not None:
        try:
            images, layout = load_grid(path), json.loads(metadata)
            size, columns = [layout["tile_width"], layout["tile_height"]], layout["columns"]
        except ZeroDivisionError as error:
            raise UserError(f"{path}: its grid description has no columns") from error
        places = [divmod(k, columns)[::-1] for k in range(len(images))]
        starts = layout["padding"] + np.array(places) * (np.array(size) + layout["padding"])
        boxes = layout["scale"] * np.hstack([starts, starts + size])
        return Grid(images, [*map(tuple, boxes.tolist())], (255, 255, 255), "metadata", 1.0)
    boxes, ground, confidence = detect_tiles(picture, size, path)
    tiles = np.stack([resample(picture[y0:y1, x0:x1], size) for x0, y0, x1, y1 in boxes])
    if np.ptp(tiles.astype(int), axis=-1).mean() < 1:  # grey, but for a stray coloured pixel
        tiles = tiles[..., :1]
    images = torch.from_numpy(np.ascontiguousarray(tiles.transpose(0, 3, 1, 2)))
    return Grid(images, boxes, ground, "detected", confidence)


def read_picture(path: str | Path) -> tuple[np.ndarray, str | None]:
    """Return the pixels, uint8 (height, width, 3) over a white ground, and the ``grid`` chunk."""
    try:
        with Image.open(path) as file:
            file.seek(getattr(file, "n_frames", 1) - 1)
            file.load()
            metadata = getattr(file, "text", {}).get("grid")
            rgba = file.convert("RGBA")
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a readable picture ({error})") from error
    white = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB")), metadata


def detect_tiles(
    picture: np.ndarray, size: int, path: str | Path
) -> tuple[Boxes, tuple[int, int, int], float]:
    """Find equal rectangles on a uniform ground: (boxes in reading order, ground, confidence).

    The picture's outermost pixels propose the ground, then its commonest colours. Every contrast
    in CONTRASTS turns the picture into a mask; among the masks whose connected parts form a grid
    the one with most tiles wins, of equals the most confident. The confidence is the share of the
    tiles' outlines that differs from the ground, times the share of the ground around them that
    does not, times one minus the relative spread of their sizes.
    """
    rim = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    proposals = common_colours(rim, 1) + common_colours(picture.reshape(-1, 3), 3)
    reason = "no tiles on a uniform ground"
    for ground in dict.fromkeys(proposals):
        difference = np.abs(picture.astype(np.int16) - np.array(ground)).max(axis=2)
        best: tuple[Boxes, float] = ([], 0.0)
        for contrast in CONTRASTS:
            try:
                found = arrange_tiles(difference > contrast, size)
            except ValueError as error:
                reason = str(error)
                continue
            best = max(best, found, key=lambda layout: (len(layout[0]), layout[1]))
        if best[0]:
            return best[0], ground, best[1]
    raise UserError(
        f"{path}: ambiguous layout ({reason}); expected equal tiles of at least {size}x{size} "
        f"pixels, apart from each other, on a uniform ground"
    )


def common_colours(pixels: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """The commonest RGB colours of (n, 3) pixels, to the nearest of 32 levels a channel."""
    bins = (pixels >> 3).astype(np.int32) @ np.array([1024, 32, 1])
    values, hits = np.unique(bins, return_counts=True)
    chosen = values[np.argsort(-hits, kind="stable")[:count]]
    return [tuple(int(v) for v in np.median(pixels[bins == c], axis=0)) for c in chosen]


def arrange_tiles(mask: np.ndarray, size: int) -> tuple[Boxes, float]:
    """Arrange the connected parts of ``mask`` (height, width) as a grid of equal tiles.

    Returns (boxes in reading order, confidence). Raises ValueError with the reason when they do
    not form one: letters and strokes are too small or have no straight outline, touching tiles
    are not square, a missing tile leaves a hole.
    """
    parts = [p for p in trimmed_parts(mask) if min(p[2] - p[0], p[3] - p[1]) >= size // 2]
    boxes = np.array([p for p in parts if not any(inside(p, q) for q in parts if q != p)])
    if len(boxes) == 0:
        raise ValueError("no tiles on a uniform ground")
    sides = boxes[:, 2:] - boxes[:, :2]
    alike = (np.abs(sides[:, None] - sides[None]) <= np.maximum(2, 0.04 * sides)).all(axis=2)
    covered = np.array([outline_coverage(mask, box) for box in boxes])
    solid = (covered >= 0.6) & (sides >= size).all(axis=1)
    areas = (alike & solid).sum(axis=1) * sides.prod(axis=1) * solid
    members = alike[areas.argmax()] & solid
    if not members.any():
        raise ValueError(f"no solid rectangles of at least {size}x{size} pixels")
    width, height = (int(side) for side in np.median(sides[members], axis=0))
    if not 2 / 3 <= width / height <= 3 / 2:
        raise ValueError(f"rectangles of {width}x{height} pixels: touching tiles?")
    if (width, height) == mask.shape[::-1]:
        raise ValueError("one rectangle fills the picture")

    rows = lattice(boxes[members, 1], height)
    columns = lattice(boxes[members, 0], width)
    cells = [(x, y, x + width, y + height) for y in rows for x in columns]
    slack = max(2, int(0.04 * max(width, height)))
    for box, side, cover in zip(boxes, sides, covered, strict=True):
        tile_like = (side >= (width // 2, height // 2)).all() and cover >= 0.6
        if tile_like and not any(inside(box, cell, slack) for cell in cells):
            raise ValueError(f"parts of unequal sizes: {side[0]}x{side[1]} and {width}x{height}")
    filled = [mask[y0:y1, x0:x1].mean() > 0.05 for x0, y0, x1, y1 in cells]
    count = len(cells) - filled[::-1].index(True)
    if not all(filled[:count]):
        raise ValueError("a hole between the tiles")
    spread = float(np.ptp(sides[members], axis=0).max() / max(width, height))
    found = np.pad(mask, 2)
    coverage = np.mean([outline_coverage(mask, cell) for cell in cells[:count]])
    moats = [outline_coverage(found, (x0, y0, x1 + 4, y1 + 4)) for x0, y0, x1, y1 in cells[:count]]
    if max(moats) > 0.25:
        raise ValueError("no uniform ground around the tiles")
    return cells[:count], float(coverage * (1 - np.mean(moats)) * (1 - spread))


def lattice(edges: np.ndarray, side: int) -> list[int]:
    """Where the rows (or columns) of tiles with these first edges begin, missing ones filled in."""
    edges = np.sort(edges)
    starts = [
        int(np.median(group))
        for group in np.split(edges, np.flatnonzero(np.diff(edges) > side / 2) + 1)
    ]
    steps = np.diff(starts)
    if len(steps) == 0:
        return starts
    if steps.min() < side:
        raise ValueError("rows or columns of tiles overlap")
    filled = [
        np.linspace(start, start + step, round(step / steps.min()), endpoint=False)
        for start, step in zip(starts, steps, strict=False)
    ]
    return [int(round(edge)) for edge in np.concatenate([*filled, starts[-1:]])]


def trimmed_parts(mask: np.ndarray) -> Boxes:
    """Bounding boxes of the connected parts, less edge rows and columns that are mostly ground
    (tick marks, compression noise)."""
    parts = []
    for rows, columns in ndimage.find_objects(ndimage.label(mask, np.ones((3, 3)))[0]):
        part = mask[rows, columns]
        if min(part.shape) < 2:
            continue
        down = np.flatnonzero(part.mean(axis=1) >= 0.5)
        across = np.flatnonzero(part.mean(axis=0) >= 0.5)
        if len(down) and len(across):
            top, left = rows.start, columns.start
            parts.append(
                (left + across[0], top + down[0], left + across[-1] + 1, top + down[-1] + 1)
            )
    return [tuple(int(edge) for edge in part) for part in dict.fromkeys(parts)]


def outline_coverage(mask: np.ndarray, box: Sequence[int]) -> float:
    """Share of the box's outermost pixels that belong to the mask."""
    part = mask[box[1] : box[3], box[0] : box[2]]
    return float(np.concatenate([part[0], part[-1], part[:, 0], part[:, -1]]).mean())


def inside(box: Sequence[int], other: Sequence[int], slack: int = 0) -> bool:
    """Whether ``box`` lies within ``other``, but for ``slack`` pixels."""
    low = all(box[i] >= other[i] - slack for i in (0, 1))
    return low and all(box[i] <= other[i] + slack for i in (2, 3))


def resample(tile: np.ndarray, size: int) -> np.ndarray:
    """Undo an enlargement: (h, w, 3) to (size, size, 3), each pixel the mean over the middle half
    of its cell, so that edges one pixel off do not mix neighbours."""
    for axis in (0, 1):
        cell = tile.shape[axis] / size
        middles = (np.arange(size) + 0.5) * cell
        distance = np.abs(np.arange(tile.shape[axis]) + 0.5 - middles[:, None])
        weight = (distance <= np.maximum(cell / 4, distance.min(axis=1, keepdims=True))) * 1.0
        weight /= weight.sum(axis=1, keepdims=True)
        tile = np.moveaxis(np.tensordot(weight, tile, (1, axis)), 0, axis)
    return np.rint(tile).astype(np.uint8)


# ----------------------------------------------------------------------------------- metrics


class Moments(NamedTuple):
    """Mean (d,) and root (min(n, d), d) of n features: their covariance is root.T @ root."""

    mean: np.ndarray
    root: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Mean and covariance root of features (n, d); the covariance is divided by n - 1.

    Raises UserError for fewer than 2 images and for features that are not finite.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise UserError(f"features of shape {features.shape}: expected at least 2 images")
    if not np.isfinite(features).all():
        raise UserError("features are not finite: the images or the extractor's weights are bad")
    mean = features.mean(axis=0)
    return Moments(mean, np.linalg.qr((features - mean) / np.sqrt(len(features) - 1), mode="r"))


def frechet_distance(a: np.ndarray | Moments, b: np.ndarray | Moments) -> float:
    """Fréchet distance of two Gaussians fitted to features (n, d) and (m, d) (Heusel et al. 2017).

        |mean_a - mean_b|^2 + tr A + tr B - 2 tr (A B)^(1/2)        A, B the covariances

    With A = X.T X and B = Y.T Y the last trace is the sum of the singular values of X Y.T: no
    matrix root, which loses half the digits or turns complex when a covariance has not full rank
    (n <= d, dead features), and no epsilon on the diagonal.
    """
    a, b = (x if isinstance(x, Moments) else moments(x) for x in (a, b))
    if a.mean.shape != b.mean.shape:
        raise UserError(f"features of {len(a.mean)} and {len(b.mean)} dimensions")
    cross = linalg.svdvals(a.root @ b.root.T).sum()
    squared = ((a.mean - b.mean) ** 2).sum() + (a.root**2).sum() + (b.root**2).sum()
    return float(squared - 2 * cross)


def frechet_infinity(features: np.ndarray, reference: Moments, seed: int) -> float:
    """FID extrapolated to infinitely many generated images (Chong & Forsyth 2020, section 4).

    The bias of FID is linear in 1/n: a line through FID_INFINITY_SIZES subsets of n/4 to n images
    is read off at 1/n = 0. Below n = 2 d the expansion does not hold: NaN.
    """
    n, d = features.shape
    if n < 2 * d:
        return float("nan")
    sizes = np.linspace(n / 4, n, FID_INFINITY_SIZES).astype(int)
    generator = random_stream(seed, "fid_infinity")
    values = [
        frechet_distance(features[torch.randperm(n, generator=generator)[:size]], reference)
        for size in sizes
    ]
    return float(np.polyfit(1 / sizes, values, 1)[1])


def kernel_distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """KID: unbiased squared MMD with the kernel (x.y / d + 1)^3, and its standard error.

    Bińkowski et al. 2018, section 4, over all pairs instead of random blocks. The standard error
    is the two-sample jackknife's (each image left out once, from the kernel's row sums); NaN for
    fewer than 3 images. It is conservative near zero, where the estimator is degenerate.
    """
    n, m = len(a), len(b)
    within_a, within_b = (
        kernel_sums(x, x) - ((x * x).sum(axis=1) / x.shape[1] + 1) ** 3 for x in (a, b)
    )
    across_a, across_b = kernel_sums(a, b), kernel_sums(b, a)
    aa, bb, ab = within_a.sum(), within_b.sum(), across_a.sum()

    def estimate(aa: Any, bb: Any, ab: Any, n: int, m: int) -> Any:
        return aa / (n * (n - 1)) + bb / (m * (m - 1)) - 2 * ab / (n * m)

    value = float(estimate(aa, bb, ab, n, m))
    if min(n, m) < 3:
        return value, float("nan")
    without_a = estimate(aa - 2 * within_a, bb, ab - across_a, n - 1, m)
    without_b = estimate(aa, bb - 2 * within_b, ab - across_b, n, m - 1)
    variance = (n - 1) * without_a.var() + (m - 1) * without_b.var()
    return value, float(np.sqrt(variance))


def kernel_sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sum of the KID kernel between each row of ``a`` and all rows of ``b``: (n,)."""
    chunks = [a[i : i + CHUNK] for i in range(0, len(a), CHUNK)]
    return np.concatenate([((x @ b.T / a.shape[1] + 1) ** 3).sum(axis=1) for x in chunks])


def precision_recall(
    real: np.ndarray, generated: np.ndarray, k: int = NEIGHBOURS
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, section 3), each in [0, 1].

    Precision: share of generated features inside a ball around some real feature that reaches to
    its k-th nearest other real feature; recall: the two sets exchanged. On the ball is inside.
    Both sets should be of one size. NaN with k or fewer images.
    """
    if min(len(real), len(generated)) <= k:
        return float("nan"), float("nan")
    real, generated = torch.from_numpy(real), torch.from_numpy(generated)
    real_radius, generated_radius = (
        torch.cat([rows.kthvalue(k + 1, dim=1).values for rows in distances(x, x)])
        for x in (real, generated)
    )
    inside_real = torch.zeros(len(generated), dtype=torch.bool)
    recalled = []
    for start, rows in zip(range(0, len(real), CHUNK), distances(real, generated), strict=True):
        inside_real |= (rows <= real_radius[start : start + CHUNK, None]).any(dim=0)
        recalled.append((rows <= generated_radius).any(dim=1))
    return inside_real.double().mean().item(), torch.cat(recalled).double().mean().item()


def distances(a: Tensor, b: Tensor) -> Iterable[Tensor]:
    """Euclidean distances (CHUNK, m) of successive rows of ``a``; exact for equal rows, as ties
    of collapsed samples need."""
    for rows in a.split(CHUNK):
        yield torch.cdist(rows, b, compute_mode="donot_use_mm_for_euclid_dist")


def ssim(a: Tensor, b: Tensor) -> np.ndarray:
    """SSIM (Wang et al. 2004) of uint8 image pairs (N, C, H, W), each at most 1: (N,).

    scikit-image's defaults: a uniform 7x7 window, so that 22x22 of 28x28 pixels count (the 11x11
    Gaussian window leaves 18x18); colour: the mean over the channels. One call for all images,
    one above the other; the rim that mixes neighbours is the one that SSIM leaves out anyway.
    """
    tall = (x.reshape(-1, x.shape[-1]).numpy() for x in (a, b))
    values = structural_similarity(*tall, data_range=255, full=True)[1].reshape(a.shape)
    return values[..., 3:-3, 3:-3].mean(axis=(1, 2, 3))


def ssim_paired(generated: Tensor, real: Tensor) -> float:
    """Mean SSIM of image i against real image i: the published figure, kept for comparison. It
    pairs unrelated images, so neither high nor low is good."""
    n = min(len(generated), len(real))
    return float(ssim(generated[:n], real[:n]).mean())


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
    return ssim_paired(images[first], images[second])


def nearest_images(images: Tensor, training: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """For each uint8 image its nearest training image: (distance, index), each (N,).

    The distance is the root mean square difference of the pixels, black to white being 1.
    Integers below 2^53 in float64: a copy has distance 0 exactly.
    """
    a, b = (x.flatten(1).double() for x in (images, training))
    lengths = (b * b).sum(dim=1)
    found = [
        ((x * x).sum(dim=1, keepdim=True) + lengths - 2 * x @ b.T).min(dim=1)
        for x in a.split(CHUNK)
    ]
    squared = torch.cat([f.values for f in found]) / a.shape[1]
    return squared.sqrt().numpy() / 255, torch.cat([f.indices for f in found]).numpy()


# -------------------------------------------------------------------------------- extractors


@dataclass(frozen=True)
class Extractor:
    """A network with what it needs of an image: uint8 (N, C, H, W) in, float64 (N, d) out.

    The images, the preprocessing and the weights' checksum are all that the features depend on.
    """

    name: str
    preprocessing: str
    model: nn.Module
    prepare: Callable[[Tensor], Tensor]
    device: torch.device | str

    def __str__(self) -> str:
        """Name and the SHA-256 of the weights, for example ``classifier:0f3a9c12d4e5``."""
        state = self.model.state_dict()
        return f"{self.name}:{content_hash(*(state[key] for key in sorted(state)))[:12]}"

    def __call__(self, images: Tensor, batch: int = 100) -> np.ndarray:
        """Features of the images; the batch size does not change them."""
        with torch.inference_mode():
            rows = [
                self.model(self.prepare(x).to(self.device)).double().cpu()
                for x in tqdm(images.split(batch), self.name, delay=2, leave=False)
            ]
        return torch.cat(rows).numpy()


def inception_extractor(weights: Path | None, device: torch.device | str) -> Extractor:
    """torchvision's InceptionV3: 2,048 features after the last pooling.

    The preprocessing is the one that torchvision documents for these weights: resize to 342
    (bilinear, antialiased), centre crop 299, ImageNet's mean and deviation. Grey is repeated.

    Raises UserError when the weights cannot be had or the file does not hold them.
    """
    official = Inception_V3_Weights.IMAGENET1K_V1
    try:
        if weights is None:
            state = official.get_state_dict(progress=True, check_hash=True)
        else:
            state = read_weights(weights)
        with torch.random.fork_rng(devices=[]):
            model = inception_v3(aux_logits=False, transform_input=True, init_weights=False)
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith("AuxLogits.")})
    except (OSError, RuntimeError, AttributeError, TypeError, UserError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"no Inception weights from {weights or official.url} ({reason}); give a local copy of "
            "that file with --inception_weights FILE, or use --features classifier"
        ) from error
    model.fc = nn.Identity()
    transform = official.transforms()

    def prepare(images: Tensor) -> Tensor:
        return transform(images.expand(-1, 3, -1, -1))

    return Extractor("inception", str(transform), model.eval().to(device), prepare, device)


def classifier_extractor(classifier: nn.Sequential, device: torch.device | str) -> Extractor:
    """The 64 features before the last layer of the data set's classifier."""
    return Extractor(
        "classifier", "x / 127.5 - 1", copy.deepcopy(classifier[:-1]).to(device), to_float, device
    )


def read_weights(path: Path) -> Any:
    """What ``torch.save`` wrote, tensors and plain values only. UserError when damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails anywhere inside the unpickler
        raise UserError(f"{path}: missing, damaged or not a file of weights") from error


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


def train_classifier(images: Tensor, labels: Tensor, steps: int, seed: int) -> nn.Sequential:
    """Train on uint8 (N, C, 28, 28) and labels (N,): Adam, one cycle, shifts of up to 2 pixels."""
    model = build_classifier(images.shape[1], int(labels.max()) + 1, seed)
    generator = random_stream(seed, "classifier")
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps, pct_start=0.2)
    order = torch.empty(0, dtype=torch.int64)
    for _ in tqdm(range(steps), "classifier", delay=2, leave=False):
        while len(order) < CLASSIFIER_BATCH:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        chosen, order = order[:CLASSIFIER_BATCH], order[CLASSIFIER_BATCH:]
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        batch = to_float(images[chosen]).roll(shift, dims=(2, 3))
        loss = F.cross_entropy(model(batch), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    # KID's kernel expects features of about 1. ReLU hands a factor on: the classes stay the same.
    with torch.no_grad():
        scale = model[:-1](to_float(images[:CLASSIFIER_BATCH])).square().mean().sqrt()
        for parameter, factor in ((model[-3], 1 / scale), (model[-1], scale)):
            parameter.weight *= factor
        model[-3].bias /= scale
    return model


# ------------------------------------------------------------------ real images and what is kept


class DataSet(NamedTuple):
    """What differs between the MNIST and the PathMNIST command line: the training script's module
    (load_images, select_images, UserError, perhaps symmetries), the data sources, and the paper's
    table: arm, FID and paired SSIM."""

    module: ModuleType
    sources: tuple[str, ...]
    withdrawn: dict[str, tuple[float, float]]


MNIST = DataSet(
    mnist, ("mnist", "digits"), {"classical": (271.05, 0.1085), "quantum": (259.25, 0.1263)}
)


def content_hash(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' types, shapes and values."""
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
        digest.update(x.cpu().contiguous().numpy())
    return digest.hexdigest()


def keep(path: Path, save: Callable[[io.BytesIO], None]) -> None:
    """Store what ``save`` writes for the next time, or say in one line why not."""
    buffer = io.BytesIO()
    save(buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        print(f"note: {path} not kept ({error.strerror}): --data_dir is not writable", flush=True)


def load_classifier(
    source: str, folder: Path, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int
) -> tuple[nn.Sequential, dict[str, Any]]:
    """The data set's classifier and its record (source, seed, steps, content hash of the training
    images and labels, test accuracy). Trained when ``folder`` has none with the same record.

    Raises UserError when there is but one class.
    """
    if len(train[1].unique()) < 2:
        raise UserError(
            f"{source} has a single class: no classifier can be trained on it; use "
            "--features inception, or --features none for the figures that need no features"
        )
    record = {"source": source, "seed": seed, "steps": CLASSIFIER_STEPS, "n_train": len(train[0])}
    record["trained_on"] = content_hash(*train)
    path = folder / f"classifier_{source}_seed{seed}.pt"
    if path.exists():
        try:
            kept = read_weights(path)
            if {key: kept["record"].get(key) for key in record} == record:
                model = build_classifier(train[0].shape[1], int(train[1].max()) + 1, seed)
                model.load_state_dict(kept["state"])
                return model.eval(), kept["record"]
            print(f"{path}: trained on other images or settings, trained again", flush=True)
        except UserError as error:
            print(f"{error}, trained again", flush=True)
    model = train_classifier(*train, CLASSIFIER_STEPS, seed)
    guesses = classify(model, test[0])
    record["test_accuracy"] = (guesses == test[1]).double().mean().item()
    record["n_test"] = len(guesses)
    keep(path, lambda file: torch.save({"record": record, "state": model.state_dict()}, file))
    return model, record


def classify(model: nn.Sequential, images: Tensor) -> Tensor:
    """The class (N,) that the classifier gives each uint8 image (N, C, 28, 28)."""
    with torch.inference_mode():
        return torch.cat([model(to_float(x)).argmax(dim=1) for x in images.split(CHUNK)])


def cached_features(extractor: Extractor, images: Tensor, folder: Path) -> np.ndarray:
    """Features of real images, read from ``folder`` when the same images have been through the
    same preprocessing and weights before."""
    made_of = f"{content_hash(images)} {extractor.preprocessing} {extractor}"
    path = folder / f"features_{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.npy"
    if path.exists():
        try:
            return np.load(path).astype(np.float64)
        except (OSError, ValueError, EOFError) as error:
            print(f"{path}: not readable ({type(error).__name__}), computed again", flush=True)
    features = extractor(images)
    keep(path, lambda file: np.save(file, features.astype(np.float32)))  # as the network gave them
    return features


class Real(NamedTuple):
    """Real images of one class or of all: uint8 (N, C, H, W), and their features (N, d) or None."""

    images: Tensor
    features: np.ndarray | None

    def take(self, index: Tensor) -> "Real":
        """The images with these indices."""
        return Real(self.images[index], None if self.features is None else self.features[index])


# ---------------------------------------------------------------------------- measuring one run


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its settings, the condition that its circuit was sampled under
    ("": ideal), the SHA-256 of the images that it was trained on, its final images (N, C, 28, 28)
    uint8, and whether --augment was given."""

    folder: Path
    settings: dict[str, Any]
    condition: str
    trained_on: str
    images: Tensor
    augmented: bool = False

    @property
    def arm(self) -> str:
        """Arm and condition, as in the tables."""
        return f"{self.settings['arm']} {self.condition}".strip()


def read_run(folder: Path, dataset: DataSet) -> Run:
    """Read a run folder. Raises UserError when it is none, unfinished, or of another data set."""
    path, grid = folder / "config.json", folder / "samples_final.png"
    try:
        config = json.loads(path.read_text())
        settings, trained_on = config["settings"], config["images"]["sha256"]
        condition, augmented = config.get("condition", ""), "symmetries" in config["images"]
        source, *_ = (settings[key] for key in ("data", "arm", *PAIR, *BUDGET))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a run's configuration ({error!r})") from error
    if source not in dataset.sources:
        raise UserError(
            f"{folder}: data set {source}; this script measures {' and '.join(dataset.sources)} "
            "(cal_fid_ssim.py: MNIST, cal_fid_ssim_medmnist.py: PathMNIST)"
        )
    if not grid.exists():
        raise UserError(f"{folder}: not finished, no {grid.name}; {config.get('command', '')}")
    images = split_grid(grid).images
    if len(images) < 2:
        raise UserError(f"{grid}: 1 image; at least 2 are needed to measure a distribution")
    return Run(folder, settings, condition, trained_on, images, augmented)


class Evaluator:
    """Measures runs of one data source; what runs share (real images, floors) is kept."""

    def __init__(self, dataset: DataSet, source: str, options: argparse.Namespace) -> None:
        self.dataset, self.source, self.options = dataset, source, options
        self.train, self.test = (
            dataset.module.load_images(source, options.data_dir, split)[1:]
            for split in ("train", "test")
        )
        self.folder = options.data_dir / "evaluation"
        self.extractor, self.classifier, self.record = None, None, None
        if options.features == "classifier" or len(self.train[1].unique()) > 1:
            self.classifier, self.record = load_classifier(
                source, self.folder, self.train, self.test, options.seed
            )
        if options.features == "classifier":
            self.extractor = classifier_extractor(self.classifier, options.device)
        elif options.features == "inception":
            self.extractor = inception_extractor(options.inception_weights, options.device)
        self.kept: dict[Any, Any] = {}

    def stream(self, *name: object) -> torch.Generator:
        """A random generator for one purpose."""
        return random_stream(self.options.seed, "evaluation", *name)

    def of_class(self, split: tuple[Tensor, Tensor], label: int) -> Tensor:
        """The images of a class in a split. Raises UserError when they are too few to measure."""
        images = split[0][split[1] == label]
        if len(images) <= NEIGHBOURS:
            raise UserError(
                f"{self.source}, class {label}: {len(images)} real images of a split in "
                f"{self.options.data_dir}, expected more than {NEIGHBOURS}"
            )
        return images

    def real(self, label: int) -> tuple[Real, Real]:
        """Reference images (training split) and held-out images (test split), at most ``--n_real``
        of each, of the class or of all classes."""
        key = label if self.options.reference == "class" else "all"
        if key not in self.kept:
            pools = []
            for split in (self.train, self.test):
                images = split[0] if key == "all" else self.of_class(split, label)
                if len(images) > self.options.n_real:
                    order = torch.randperm(len(images), generator=self.stream("reference"))
                    images = images[order[: self.options.n_real].sort().values]
                features = self.extractor and cached_features(self.extractor, images, self.folder)
                pools.append(Real(images, features))
            self.kept[key] = tuple(pools)
        return self.kept[key]

    def compare(self, sample: Real, reference: Real) -> dict[str, float]:
        """The figures that compare two sets of images; precision and recall on equal numbers."""
        figures = dict.fromkeys([*METRICS, "kid_standard_error"], float("nan"))
        figures["ssim_paired"] = ssim_paired(sample.images, reference.images)
        figures["ssim_diversity"] = ssim_diversity(sample.images, self.options.seed)
        if self.extractor is not None:
            a, b = sample.features, reference.features
            fitted = moments(b)
            figures["fid"] = frechet_distance(a, fitted)
            figures["fid_infinity"] = frechet_infinity(a, fitted, self.options.seed)
            figures["kid"], figures["kid_standard_error"] = kernel_distance(a, b)
            size = min(len(a), len(b))
            chosen = torch.randperm(len(b), generator=self.stream("equal"))[:size]
            figures["precision"], figures["recall"] = precision_recall(b[chosen], a[:size])
        return figures

    def floor(self, label: int, n: int) -> dict[str, Any]:
        """What n real images score: the mean over draws from the test split; where it holds fewer
        than n, from one half of the training split against the rest."""
        key = (label if self.options.reference == "class" else "all", n)
        if key not in self.kept:
            reference, held_out = self.real(label)
            aside = n > len(held_out.images)
            size = min(n, len(reference.images) // 2) if aside else n
            pool, draws = reference if aside else held_out, []
            for draw in range(FLOOR_DRAWS if size <= FID_WARNING_BELOW else 1):
                order = torch.randperm(len(pool.images), generator=self.stream("floor", draw))
                rest = reference.take(order[size:]) if aside else reference
                draws.append(self.compare(pool.take(order[:size]), rest))
            figures = {key: float(np.mean([d[key] for d in draws])) for key in draws[0]}
            split = "training split, set aside" if aside else "test split"
            self.kept[key] = {"n": size, "draws": len(draws), "from": split, **figures}
        return self.kept[key]

    def measure(self, run: Run) -> dict[str, Any]:
        """All figures of a run, as they go into ``metrics.json`` (None: not measured); draws its
        ten closest pairs."""
        images, label, options = run.images, run.settings["label"], self.options
        reference, _ = self.real(label)
        shape = reference.images.shape[1:]
        if images.shape[1:] != shape:
            raise UserError(
                f"{run.folder}: images of {tuple(images.shape[1:])}, the real ones are of "
                f"{tuple(shape)} (channels, height, width)"
            )
        n_train, seed = run.settings["n_train"], run.settings["seed"]
        training = self.dataset.module.select_images(*self.train, label, n_train, seed)
        if run.augmented:
            training = self.dataset.module.symmetries(training)
        if run.trained_on != hashlib.sha256(training.numpy().tobytes()).hexdigest():
            raise UserError(f"{run.folder}: trained on other images than are in {options.data_dir}")
        held_out = self.of_class(self.test, label)
        sample = Real(images, self.extractor and self.extractor(images))
        figures, floor = self.compare(sample, reference), dict(self.floor(label, len(images)))
        # The threshold is the first percentile of images that the model never saw: a generator of
        # new images makes about 1 % near copies, whatever the class and the number of images.
        closest, usual = (nearest_images(x, training) for x in (images, held_out))
        threshold, middle = np.percentile(usual[0], 1), np.median(usual[0])
        for part, own, (distance, nearest) in (
            (figures, images, closest),
            (floor, held_out, usual),
        ):
            part["ssim_nearest"] = ssim_paired(own, training[nearest])
            part["distance_ratio"] = float(np.median(distance) / middle) if middle else float("nan")
            part["near_copies"] = float((distance <= threshold).mean())
            if self.classifier is not None:
                right = classify(self.classifier, own) == label
                part["label_accuracy"] = right.double().mean().item()
        draw_closest_pairs(run, training, *closest, threshold)
        notes = {
            f"FID biased upwards: n < {FID_WARNING_BELOW}": self.extractor
            and len(images) < FID_WARNING_BELOW,
            "trained with augmentation": run.augmented,
            f"floor at n = {floor['n']}": floor["n"] < len(images),
            f"against embedded {self.source}": self.source in ("digits", "tissue"),
        }
        return {
            "run": run.folder.name,
            "condition": run.condition,
            "settings": run.settings,
            "reference": options.reference,
            "n_generated": len(images),
            "n_real": len(reference.images),
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


def show_tiles(axes: Axes, images: Tensor, columns: int) -> None:
    """Draw images (N, C, H, W) uint8 in rows of ``columns``, without axes."""
    grey = {"cmap": "gray", "vmin": 0, "vmax": 255}
    axes.imshow(tile(images, columns), interpolation="nearest", **grey)
    axes.set(xticks=[], yticks=[], frame_on=False)


def draw_closest_pairs(
    run: Run, training: Tensor, distance: np.ndarray, nearest: np.ndarray, threshold: float
) -> None:
    """``closest_pairs.png``: the ten generated images that are nearest to a training image, above
    these, with their distance."""
    closest = np.argsort(distance, kind="stable")[:10]
    images = torch.cat([run.images[closest], training[nearest[closest]]])
    figure = Figure(figsize=(7.5, 2.1), layout="constrained")
    axes = figure.subplots()
    show_tiles(axes, images, len(closest))
    side = images.shape[-1] + TILE_PADDING
    places = (np.arange(len(closest)) + 0.5) * side
    axes.set_xticks(places, [f"{x:.3f}" for x in distance[closest]])
    axes.set_yticks([side / 2, 1.5 * side], ["generated", "training"])
    axes.tick_params(length=0, labelsize=7)
    title = f"closest pairs, RMS difference (near copy: ≤ {threshold:.3f})"
    axes.set_title(f"{run.folder.name}: {title}", fontsize=8)
    save_figure(run.folder / "closest_pairs.png", figure)


# --------------------------------------------------------------------------- tables and figures


def comparison_csv(results: list[dict[str, Any]]) -> str:
    """One line a run: settings, figures, floors."""
    frame = pd.json_normalize(results, sep="_")
    frame.columns = [re.sub("^(settings|metrics)_", "", column) for column in frame.columns]
    columns = ["run", "arm", "condition", "data", "label", "n_train", "seed", *BUDGET, "features"]
    columns += ["reference", "n_generated", "n_real", "n_training", "note"]
    columns += [column for column in frame if column.startswith("floor_") or column in METRICS]
    columns.insert(columns.index("floor_n"), "kid_standard_error")
    return frame[columns].astype({"n_train": "Int64"}).to_csv(index=False)


def read_comparison(file: Path | io.StringIO) -> pd.DataFrame:
    """``comparison.csv``, one row a run, from which every table and figure is made.

    ``n_train`` is infinite for a whole class; ``name``, an ordered category that ends with FLOOR,
    is the arm with its condition.
    """
    frame = pd.read_csv(file, dtype={"condition": str, "note": str})
    frame = frame.fillna({"condition": "", "note": "", "n_train": np.inf})
    frame["name"] = (frame["arm"] + " " + frame["condition"]).str.strip()
    order = sorted(set(frame["name"]), key=lambda name: ([*ARMS].index(name.split()[0]), name))
    frame["name"] = pd.Categorical(frame["name"], [*order, FLOOR], ordered=True)
    return frame


def measured(frame: pd.DataFrame) -> list[str]:
    """The metrics that at least one run has."""
    return [key for key in METRICS if frame[key].notna().any()]


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


def over_seeds(frame: pd.DataFrame, skipna: bool = False) -> pd.DataFrame:
    """Index n_train, name, seed, columns METRICS: the mean over the classes, NaN when one is or,
    with ``skipna``, when all are."""
    groups = frame.groupby(["n_train", "name", "seed"], observed=True)[list(METRICS)]
    return groups.agg(lambda values: values.mean(skipna=skipna))


def pair_differences(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """A row for each pair of runs of equal class, size and seed: the metrics of the arm in ``name``
    minus those of ``baseline``. An arm other than BASELINES is the ideal twin of its own conditions
    and compared with these alone."""
    base = frame[frame["name"] == baseline]
    others = frame[frame["name"] != baseline]
    if baseline not in BASELINES:
        others = others[others["arm"] == baseline]
    pairs = others.merge(base, on=PAIR, suffixes=("", "_base"))
    for key in METRICS:
        pairs[key] -= pairs[f"{key}_base"]
    return pairs


def interval(values: pd.Series) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval by Student's t; NaN half-width for one value."""
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * values.sem()


def show(value: float, form: str, missing: str = "–") -> str:
    """A figure for a table; a dash for what could not be measured."""
    return form.format(value) if np.isfinite(value) else missing


def size_name(n_train: float) -> str:
    """A training-set size for people."""
    return f"{n_train:.0f}" if np.isfinite(n_train) else "all"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that is also aligned on a terminal."""
    rows = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def result_table(frame: pd.DataFrame) -> str:
    """One row a run, below it what real images score at the same n."""
    rows = []
    for run in frame.to_dict("records"):
        for name, prefix, n, note in (
            (run["run"], "", "n_generated", run["note"]),
            (f"  {FLOOR}", "floor_", "floor_n", run["floor_from"]),
        ):
            cells = {key: show(run[prefix + key], form) for key, (_, form) in METRICS.items()}
            cells["kid"] += show(run[f"{prefix}kid_standard_error"], " ±{:.1g}", "")
            rows.append([name, str(run[n]), str(run["n_real"]), run["features"], *cells.values()])
            rows[-1].append(note)
    headings = [heading for heading, _ in METRICS.values()]
    return table(["run", "n", "n real", "features", *headings, "note"], rows)


def arm_table(frame: pd.DataFrame) -> str:
    """Per training-set size and arm: mean over seeds and 95 % interval; then the floor."""
    frame, keys, rows = shared_classes(frame), measured(frame), []
    means = over_seeds(frame)
    for (size, name), runs in frame.groupby(["n_train", "name"], observed=True):
        row = [size_name(size), name]
        for column in ("label", "seed", "n_generated", "n_real"):
            row.append("/".join(map(str, sorted(set(runs[column])))))
        if name == FLOOR:
            row[3] = "–"
        for key in keys:
            mean, half = interval(means.loc[(size, name), key].dropna())
            form = METRICS[key][1]
            row.append(show(mean, form) + show(half, f" ± {form}", ""))
        rows.append(row)
    header = ["N", "arm", "classes", "seeds", "n generated", "n real"]
    return table(header + [METRICS[key][0] for key in keys], rows)


def difference_rows(frame: pd.DataFrame, baseline: str) -> list[list[str]]:
    """Rows (difference, N, metric, pairs, seeds, mean, 95 % interval, clear of zero) of every arm
    minus ``baseline``.

    The classes' differences are averaged for each seed; the interval is Student's t over seeds, a
    star where zero is outside. Fewer than DECIDING_SEEDS seeds decide nothing.
    """
    rows, pairs = [], pair_differences(frame, baseline)
    means = over_seeds(pairs, skipna=True)
    for (name, size), group in pairs.groupby(["name", "n_train"], observed=True):
        for key in measured(group):
            seeds = means.loc[(size, name), key].dropna()
            form = METRICS[key][1].replace("{:", "{:+")
            mean, half = interval(seeds)
            limits, clear = "–", "no"
            if np.isfinite(half) and seeds.any():
                limits = f"[{form.format(mean - half)}, {form.format(mean + half)}]"
                if abs(mean) > half:
                    limits, clear = f"{limits} *", "yes"
            if len(seeds) < DECIDING_SEEDS:
                clear = "too few seeds"
            counts = [METRICS[key][0], str(group[key].count()), str(len(seeds))]
            row = [f"{name} − {baseline}", size_name(size), *counts, form.format(mean)]
            rows.append([*row, limits, clear])
    return rows


def budget_text(frame: pd.DataFrame) -> str:
    """What the runs were trained and sampled with, and in bold what not all of them share."""
    texts = []
    for name in [*BUDGET, "n_generated"]:
        values = frame[name].unique()
        text = f"{name.replace('n_generated', 'images')} {' / '.join(map(str, values))}"
        texts.append(f"**{text} (not the same in all runs)**" if len(values) > 1 else text)
    return ", ".join(texts) + "."


def comparison_text(frame: pd.DataFrame) -> str:
    """The Markdown report on several runs."""
    parts = [
        "# Comparison of runs",
        f"Features: {', '.join(sorted(set(frame['features'])))}. Real images: {frame['data'][0]}, "
        f"reference {frame['reference'][0]}. Mean over seeds ± half of the 95 % interval "
        f"(Student's t). {FLOOR}: held-out images, as many as generated.",
        f"Budget: {budget_text(frame)}",
        "; ".join(sorted(set("; ".join(frame["note"]).split("; ")) - {""})),
        arm_table(frame),
    ]
    header = ["difference", "N", "metric", "pairs", "seeds", "mean", "95 % interval", "clear of 0"]
    twins = [arm for arm in ARMS if arm in set(frame["name"]) and arm not in BASELINES]
    for baseline in (*BASELINES, *twins):
        if rows := difference_rows(frame, baseline):
            parts += [f"## Paired differences against {baseline}", table(header, rows)]
            limits = [row[6] for row in rows if row[6] != "–"]
            outside, chance = sum(text.endswith("*") for text in limits), 0.05 * len(limits)
            if limits:
                parts.append(
                    f"{outside} of {len(limits)} intervals (Student's t over seeds) leave zero out "
                    f"(*). If nothing differed, chance would make that {chance:.2g} on average, "
                    "with a wide spread, since the metrics depend on each other."
                )
    return "\n\n".join(filter(None, [*parts, "## Runs", result_table(frame)])) + "\n"


def draw_panels(frame: pd.DataFrame, against_size: bool) -> Figure:
    """One panel a metric of FIGURE_METRICS: each arm's mean and 95 % interval over seeds, small
    dots for the seeds, and the floor as a dashed line; or, ``against_size``, a line per arm over
    the number of training images. When there are runs of ``matched``, a panel below shows the other
    arms' paired differences to it."""
    keys = [key for key in FIGURE_METRICS if key in measured(frame)]
    names = [name for name in frame["name"].cat.categories if name != FLOOR]
    sizes = frame.groupby("n_train")["n_training"].mean()
    places = sizes if against_size else pd.Series(np.arange(len(sizes)), sizes.index, float)
    parts = [over_seeds(shared_classes(frame))]
    baseline = BASELINES[0]
    if baseline in names and len(names) > 1:
        parts.append(over_seeds(pair_differences(frame, baseline), skipna=True))
    heights = [2, 1][: len(parts)]
    rows = -(-len(keys) // 4)
    figure = Figure(figsize=(12, 1.3 * sum(heights) * rows), layout="constrained")
    ratios = {"height_ratios": heights * rows}
    panels = figure.subplots(len(heights) * rows, 4, squeeze=False, gridspec_kw=ratios)

    def beside(shift: float) -> pd.Series:
        """Where something is drawn at each size, so that intervals do not hide one another."""
        return places * 1.12**shift if against_size else places + shift * 0.8 / len(names)

    def draw_name(axes: Axes, name: str, values: pd.Series) -> None:
        """Mean and interval of the values at each size, joined when they are over size."""
        x = beside(names.index(name) - (len(names) - 1) / 2)
        arm = name.split()[0]
        own = [other for other in names if other.split()[0] == arm]
        style = {"color": ARM_COLOURS[arm], "marker": MARKERS[own.index(name) % len(MARKERS)]}
        style |= {"ls": "-" if against_size else "none", "linewidth": 1, "elinewidth": 0.8}
        by_size = {size: interval(group) for size, group in values.groupby("n_train")}
        middle, half = np.array([*by_size.values()]).T
        axes.errorbar(x[[*by_size]], middle, half, label=name, capsize=2, markersize=4, **style)
        dots = x[values.index.get_level_values("n_train")]
        axes.scatter(dots, values, 5, ARM_COLOURS[arm], alpha=0.4)

    for k, key in enumerate(keys):
        column = panels[len(heights) * (k // 4) :, k % 4]
        for axes, part, heading in zip(column, parts, ("", f"\n− {baseline}"), strict=False):
            for name, values in part[key].dropna().groupby("name", observed=True):
                if name == FLOOR:
                    floor = values.droplevel(["name", "seed"]).reindex(sizes.index)
                    ends = beside(-0.55 * len(names)), beside(0.55 * len(names))
                    axes.hlines(floor, *ends, "#666666", "--", label=FLOOR, linewidth=1)
                else:
                    draw_name(axes, name, values)
            axes.set_ylabel(METRICS[key][0] + heading)
            if against_size:
                axes.set_xscale("log")
                axes.set_xticks(places, [f"{place:.0f}" for place in places])
                axes.minorticks_off()
            else:
                axes.set_xticks(places, [f"N = {size_name(size)}" for size in sizes.index])
            axes.set_xlim(column[0].get_xlim())
            if heading:
                axes.axhline(0, color=ARM_COLOURS[baseline], linewidth=1)
        if against_size:
            axes.set_xlabel("training images")
    for axes in figure.axes:
        if not axes.has_data():
            axes.remove()
    figure.align_ylabels()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    return figure


def draw_samples(runs: Sequence[Run], evaluator: Evaluator) -> Figure:
    """For each class and size, of its lowest seed: the first training images, and below them the
    first images that each arm generated."""
    chosen = {}
    for run in sorted(runs, key=lambda r: -r.settings["seed"]):
        label, n_train = run.settings["label"], run.settings["n_train"]
        place = label, n_train or np.inf, [*ARMS].index(run.settings["arm"]), run.condition
        chosen[place] = run  # the last stays
    rows: dict[str, Tensor] = {}
    for (label, *_), run in sorted(chosen.items()):
        n_train, seed = run.settings["n_train"], run.settings["seed"]
        name = run.settings.get("label_name", label)
        end = f", N = {n_train or 'all'}, seed {seed}"
        if f"real {name}{end}" not in rows:
            train = evaluator.dataset.module.select_images(*evaluator.train, label, n_train, seed)
            rows[f"real {name}{end}"] = train
        rows[f"{name}: {run.arm}{end}"] = run.images
    figure = Figure(figsize=(6, 0.36 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False).flat
    for axes, (title, images) in zip(panels, rows.items(), strict=True):
        images = images[:SAMPLE_COLUMNS]
        white = images.new_full((SAMPLE_COLUMNS - len(images), *images.shape[1:]), 255)
        show_tiles(axes, torch.cat([images, white]), SAMPLE_COLUMNS)
        axes.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=6)
    return figure


def write_comparison(out: Path, frame: pd.DataFrame) -> None:
    """``comparison.md`` and ``.png``, and of several training-set sizes ``scaling.png``."""
    write_atomic(out / "comparison.md", comparison_text(frame))
    save_figure(out / "comparison.png", draw_panels(frame, against_size=False))
    if frame["n_train"].nunique() > 1:
        save_figure(out / "scaling.png", draw_panels(frame, against_size=True))


# ----------------------------------------------------------------------- the published procedure


def paper_protocol(evaluator: Evaluator, runs: list[Run]) -> str:
    """The published evaluation, and beside it what real images score under it; a table that ends
    with the paper's own figures, and ``metrics_paper.json`` in each run folder.

    Published: 5 generated images against the first 5 training images of any class, FID and paired
    SSIM. A perfect generator would draw its 5 images from the run's own class: PAPER_DRAWS times
    5 real images of that class show how far chance alone moves both figures.
    """
    (images, labels), extractor = evaluator.train, evaluator.extractor
    first = images[:PAPER_IMAGES]
    fitted = moments(extractor(first))
    others = torch.arange(len(images)) >= PAPER_IMAGES
    drawn, rows = {}, []

    def scores(sample: Real) -> tuple[float, float]:
        return frechet_distance(sample.features, fitted), ssim_paired(sample.images, first)

    for run in tqdm(runs, "runs", delay=2, leave=False):
        sample, label = run.images[:PAPER_IMAGES], run.settings["label"]
        if sample.shape != first.shape:
            raise UserError(f"{run.folder}: {tuple(sample.shape)}, expected {tuple(first.shape)}")
        if label not in drawn:
            candidates, generator = images[others & (labels == label)], evaluator.stream("paper")
            order = torch.randperm(len(candidates), generator=generator)[: 2 * PAPER_DRAWS]
            pool = Real(candidates[order], extractor(candidates[order]))
            fives = (torch.randperm(len(order), generator=generator) for _ in range(PAPER_DRAWS))
            drawn[label] = np.array([scores(pool.take(five[:PAPER_IMAGES])) for five in fives])
        record = {"n_generated": len(sample), "n_real": len(first), "draws": PAPER_DRAWS}
        record["features"] = str(extractor)
        row = [run.folder.name, str(len(sample)), str(len(first)), str(extractor)]
        found = scores(Real(sample, extractor(sample)))
        for key, value, real in zip(("fid", "ssim_paired"), found, drawn[label].T, strict=True):
            limits = np.percentile(real, [2.5, 97.5]).tolist()
            record[key] = {"run": value, "real_mean": float(real.mean()), "real_95": limits}
            row += [f"{value:.4g}", f"{real.mean():.4g}", "{:.4g} to {:.4g}".format(*limits)]
        write_atomic(run.folder / "metrics_paper.json", json.dumps(record, indent=2) + "\n")
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
    add("--features", choices=("classifier", "inception", "none"), default=argparse.SUPPRESS,
        help="what FID, KID, precision and recall compare: a small CNN trained once on the data "
        "set, torchvision's InceptionV3, or leave them out (default: classifier; with --protocol "
        "paper: inception)")  # fmt: skip
    add("--inception_weights", type=Path, metavar="FILE", help="a local copy of the weights")
    add("--reference", choices=("class", "all"), default="class",
        help="real training images to compare with: of the run's class or of all")  # fmt: skip
    add("--n_real", type=int, default=10_000, help="at most so many real images, drawn by the seed")
    add("--data_dir", type=Path, default=Path("data"), help="data set; keeps classifier, features")
    add("--out", type=Path, metavar="DIR",
        help="write comparison.csv, .md, .png and samples.png; with several sizes scaling.png; "
        "with --protocol paper only paper_protocol.md")  # fmt: skip
    add("--protocol", choices=("full", "paper"), default="full",
        help="paper: 5 images against the first 5 training images, as published")  # fmt: skip
    add("--seed", type=int, default=0, help="of classifier, subsets and floors")
    add("--device", default="auto", help="for the features: auto, cpu, cuda or cuda:N")
    options = parser.parse_args(argv)
    options.device = choose_device(options.device)
    if "features" not in options:
        options.features = "inception" if options.protocol == "paper" else "classifier"
    if options.protocol == "paper" and options.features == "none":
        raise UserError("--features none: --protocol paper needs features, use inception")
    if options.n_real <= NEIGHBOURS:
        raise UserError(f"--n_real {options.n_real}: expected more than {NEIGHBOURS}")
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
    evaluator = Evaluator(dataset, runs[0].settings["data"], options)
    if evaluator.record:
        print("classifier: {test_accuracy:.2%} of {n_test} test images".format(**evaluator.record))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    if options.protocol == "paper":
        text = paper_protocol(evaluator, runs)
        print(text)
        if options.out:
            write_atomic(options.out / "paper_protocol.md", text + "\n")
        return
    results = []
    for run in tqdm(runs, "runs", delay=2, leave=False):
        results.append(evaluator.measure(run))
        write_atomic(run.folder / "metrics.json", json.dumps(results[-1], indent=2) + "\n")
    text = comparison_csv(results)
    frame = read_comparison(io.StringIO(text))
    print(result_table(frame))
    if options.out:
        write_atomic(options.out / "comparison.csv", text)
        write_comparison(options.out, frame)
        save_figure(options.out / "samples.png", draw_samples(runs, evaluator))
        print(f"written to {options.out}")


def main(argv: Sequence[str] | None = None, dataset: DataSet = MNIST) -> None:
    """Run the command line; a user's mistake prints one line and exits 2."""
    try:
        evaluate(parse_options(argv, dataset), dataset)
    except (UserError, dataset.module.UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
