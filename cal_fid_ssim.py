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
import csv
import hashlib
import io
import itertools
import json
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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
    CONDITIONS,
    IMAGE_SIZE,
    QUANTUM_ARMS,
    UserError,
    choose_device,
    load_grid,
    random_stream,
    save_figure,
    to_float,
    write_atomic,
)

# --------------------------------------------------------------------------------- constants

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
BOOTSTRAP_DRAWS = 10_000
BOOTSTRAP_FROM = 5  # pairs; of three, 95 % of the resampled means are just their range
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
# The settings that a comparison of arms must share, and the figures' metrics.
BUDGET = ("steps", "batch_size", "lr", "ema_decay", "n_qubits", "n_layers", "timesteps")
BUDGET += ("sample_steps",)
BASELINE = "matched"
FIGURE_METRICS = ("fid", "kid", "precision", "recall", "label_accuracy", "ssim_diversity")
FIGURE_METRICS += ("distance_ratio", "near_copies")
ARM_COLOURS = dict(  # Okabe & Ito's colour-blind-safe palette
    zip(ARMS, ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True)
)


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
            boxes = described_boxes(json.loads(metadata), picture.shape)
            return Grid(load_grid(path), boxes, (255, 255, 255), "metadata", 1.0)
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise UserError(f"{path}: its grid description is wrong ({error!r})") from error
    boxes, ground, confidence = detect_tiles(picture, size, path)
    tiles = np.stack([resample(picture[y0:y1, x0:x1], size) for x0, y0, x1, y1 in boxes])
    if np.ptp(tiles.astype(int), axis=-1).mean() < 1:  # grey, but for a stray coloured pixel
        tiles = tiles[..., :1]
    images = torch.from_numpy(np.ascontiguousarray(tiles.transpose(0, 3, 1, 2)))
    return Grid(images, boxes, ground, "detected", confidence)


def described_boxes(layout: dict[str, Any], shape: tuple[int, ...]) -> Boxes:
    """Where the ``grid`` text chunk puts the tiles. ValueError when that is outside the picture."""
    height, width, pad = layout["tile_height"], layout["tile_width"], layout["padding"]
    boxes = []
    for k in range(layout["count"]):
        row, column = divmod(k, layout["columns"])
        left, top = pad + column * (width + pad), pad + row * (height + pad)
        box = [edge * layout["scale"] for edge in (left, top, left + width, top + height)]
        if box[2] > shape[1] or box[3] > shape[0]:
            raise ValueError(f"tile {k} ends at {box[2:]}, the picture at {shape[1::-1]}")
        boxes.append(tuple(box))
    return boxes


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

    Without an epsilon on the diagonal. With A = X.T X and B = Y.T Y the last trace is the sum of
    the singular values of the small matrix X Y.T: that is used when a covariance has not full
    rank (n <= d, dead features), where the matrix root loses half the digits or turns complex.
    """
    a, b = (x if isinstance(x, Moments) else moments(x) for x in (a, b))
    if a.mean.shape != b.mean.shape:
        raise UserError(f"features of {len(a.mean)} and {len(b.mean)} dimensions")
    if has_full_rank(a) and has_full_rank(b):
        cross = np.trace(linalg.sqrtm((a.root.T @ a.root) @ (b.root.T @ b.root))).real
    else:
        cross = linalg.svdvals(a.root @ b.root.T).sum()
    squared = ((a.mean - b.mean) ** 2).sum() + (a.root**2).sum() + (b.root**2).sum()
    return float(squared - 2 * cross)


def has_full_rank(x: Moments) -> bool:
    """Whether the covariance's condition number (infinite for n <= d) leaves its matrix root eight
    digits."""
    return np.linalg.cond(x.root) < 1e4


def frechet_infinity(features: np.ndarray, reference: np.ndarray | Moments, seed: int) -> float:
    """FID extrapolated to infinitely many generated images (Chong & Forsyth 2020, section 4).

    The bias of FID is linear in 1/n: a line through FID_INFINITY_SIZES subsets of n/4 to n images
    is read off at 1/n = 0. Below n = 2 d the expansion does not hold: NaN.
    """
    n, d = features.shape
    if n < 2 * d:
        return float("nan")
    reference = reference if isinstance(reference, Moments) else moments(reference)
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
    within_a, within_b = kernel_sums(a, a), kernel_sums(b, b)
    within_a -= polynomial_kernel(a)
    within_b -= polynomial_kernel(b)
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


def polynomial_kernel(a: np.ndarray) -> np.ndarray:
    """The KID kernel of each row with itself: (n,)."""
    return ((a * a).sum(axis=1) / a.shape[1] + 1) ** 3


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


class Memorisation(NamedTuple):
    """Distance of generated (N,) and of held-out real images (M,) to their nearest training image,
    that image's index, and the distance up to which an image counts as a near copy."""

    distance: np.ndarray
    index: np.ndarray
    usual_distance: np.ndarray
    usual_index: np.ndarray
    threshold: float


def memorisation(generated: Tensor, training: Tensor, held_out: Tensor) -> Memorisation:
    """How close images (N, C, H, W) come to the training images, beside real images that the model
    never saw. The threshold is the held-out images' first percentile: a generator of new images
    makes about 1 % near copies, whatever the class and the number of training images."""
    usual_distance, usual_index = nearest_images(held_out, training)
    threshold = float(np.percentile(usual_distance, 1))
    return Memorisation(
        *nearest_images(generated, training), usual_distance, usual_index, threshold
    )


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
        """Name and checksum, for example ``classifier:0f3a9c12d4e5``."""
        return f"{self.name}:{self.checksum}"

    @property
    def checksum(self) -> str:
        """First 12 hex digits of the SHA-256 of the weights."""
        state = self.model.state_dict()
        return content_hash(*(state[key] for key in sorted(state)))[:12]

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
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file fails anywhere inside the unpickler
        raise UserError(f"{path}: damaged or not a file of weights") from error


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
    """What differs between the MNIST and the PathMNIST command line."""

    sources: tuple[str, ...]
    load_images: Callable[[str, Path, str], tuple[str, Tensor, Tensor]]
    select_images: Callable[[Tensor, Tensor, int, int | None, int], Tensor]
    user_error: type[Exception]
    withdrawn: dict[str, tuple[float, float]]  # the paper's table: arm, FID and paired SSIM
    symmetries: Callable[[Tensor], Tensor] | None = None  # what --augment trains on


MNIST = DataSet(
    sources=("mnist", "digits"),
    load_images=mnist.load_images,
    select_images=mnist.select_images,
    user_error=UserError,
    withdrawn={"classical": (271.05, 0.1085), "quantum": (259.25, 0.1263)},
)


def content_hash(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' types, shapes and values."""
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
        digest.update(x.cpu().contiguous().numpy())
    return digest.hexdigest()


def keep(path: Path, data: bytes) -> None:
    """Store what was computed for the next time, or say in one line why not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
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
    record = {
        "source": source,
        "seed": seed,
        "steps": CLASSIFIER_STEPS,
        "n_train": len(train[0]),
        "trained_on": content_hash(*train),
    }
    path = folder / f"classifier_{source}_seed{seed}.pt"
    model = build_classifier(train[0].shape[1], int(train[1].max()) + 1, seed)
    try:
        kept = read_weights(path)
        if {key: kept["record"].get(key) for key in record} == record:
            model.load_state_dict(kept["state"])
            return model.eval(), kept["record"]
        print(f"{path}: trained on other images or settings, trained again", flush=True)
    except FileNotFoundError:
        pass
    except UserError as error:
        print(f"{error}, trained again", flush=True)
    model = train_classifier(*train, CLASSIFIER_STEPS, seed)
    guesses = classify(model, test[0])
    record["test_accuracy"] = (guesses == test[1]).double().mean().item()
    record["n_test"] = len(guesses)
    buffer = io.BytesIO()
    torch.save({"record": record, "state": model.state_dict()}, buffer)
    keep(path, buffer.getvalue())
    return model, record


def classify(model: nn.Sequential, images: Tensor) -> Tensor:
    """The class (N,) that the classifier gives each uint8 image (N, C, 28, 28)."""
    with torch.inference_mode():
        return torch.cat([model(to_float(x)).argmax(dim=1) for x in images.split(CHUNK)])


def cached_features(extractor: Extractor, images: Tensor, folder: Path) -> np.ndarray:
    """Features of real images, read from ``folder`` when the same images have been through the
    same preprocessing and weights before."""
    made_of = f"{content_hash(images)} {extractor.preprocessing} {extractor.checksum}"
    path = folder / f"features_{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.npz"
    try:
        with np.load(path, allow_pickle=False) as kept:
            return kept["features"].astype(np.float64)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        print(f"{path}: not readable ({type(error).__name__}), computed again", flush=True)
    features = extractor(images)
    buffer = io.BytesIO()
    np.savez(buffer, features=features.astype(np.float32))  # as the network gave them
    keep(path, buffer.getvalue())
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
    """A finished run: its folder, its settings, the SHA-256 of the images that it was trained on,
    its final images (N, C, 28, 28) uint8, and whether --augment was given."""

    folder: Path
    settings: dict[str, Any]
    trained_on: str
    images: Tensor
    augmented: bool = False


def read_run(folder: Path, dataset: DataSet) -> Run:
    """Read a run folder. Raises UserError when it is none, unfinished, or of another data set."""
    path, grid = folder / "config.json", folder / "samples_final.png"
    try:
        config = json.loads(path.read_text())
        settings, trained_on = config["settings"], config["images"]["sha256"]
        augmented = "symmetries" in config["images"]
        source, *_ = (settings[key] for key in ("data", "arm", "label", "n_train", "seed"))
    except OSError as error:
        raise UserError(f"{folder}: not a run folder (config.json: {error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
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
    return Run(folder, settings, trained_on, images, augmented)


class Evaluator:
    """Measures runs of one data source; what runs share (real images, floors) is kept."""

    def __init__(self, dataset: DataSet, source: str, options: argparse.Namespace) -> None:
        self.dataset, self.source, self.options = dataset, source, options
        self.train = dataset.load_images(source, options.data_dir, "train")[1:]
        self.test = dataset.load_images(source, options.data_dir, "test")[1:]
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
        """All figures of a run, as they go into ``metrics.json``; draws its ten closest pairs."""
        images, options = run.images, self.options
        label, n_train, seed = (run.settings[key] for key in ("label", "n_train", "seed"))
        reference, _ = self.real(label)
        shape = reference.images.shape[1:]
        if images.shape[1] == 1:
            images = images.expand(-1, shape[0], -1, -1)
        if images.shape[1:] != shape:
            raise UserError(
                f"{run.folder}: images of {tuple(images.shape[1:])}, the real ones are of "
                f"{tuple(shape)} (channels, height, width)"
            )
        training = self.dataset.select_images(*self.train, label, n_train, seed)
        if run.augmented:
            training = self.dataset.symmetries(training)
        if run.trained_on != hashlib.sha256(training.numpy().tobytes()).hexdigest():
            raise UserError(f"{run.folder}: trained on other images than are in {options.data_dir}")
        held_out = self.of_class(self.test, label)
        sample = Real(images, self.extractor and self.extractor(images))
        figures, floor = self.compare(sample, reference), dict(self.floor(label, len(images)))
        copies = memorisation(images, training, held_out)
        for part, own, nearest, distance in (
            (figures, images, copies.index, copies.distance),
            (floor, held_out, copies.usual_index, copies.usual_distance),
        ):
            part["ssim_nearest"] = ssim_paired(own, training[nearest])
            usual = np.median(copies.usual_distance)
            part["distance_ratio"] = float(np.median(distance) / usual) if usual else float("nan")
            part["near_copies"] = float((distance <= copies.threshold).mean())
            if self.classifier is not None:
                right = classify(self.classifier, own) == label
                part["label_accuracy"] = right.double().mean().item()
        draw_closest_pairs(run, images, training, copies)
        notes = []
        if self.extractor and len(images) < FID_WARNING_BELOW:
            notes.append(f"FID biased upwards: n < {FID_WARNING_BELOW}")
        if run.augmented:
            notes.append("trained with augmentation")
        if floor["n"] < len(images):
            notes.append(f"floor at n = {floor['n']}")
        if self.source in ("digits", "tissue"):
            notes.append(f"against embedded {self.source}")
        return {
            "run": run.folder.name,
            "settings": run.settings,
            "reference": options.reference,
            "n_generated": len(images),
            "n_real": len(reference.images),
            "n_training": len(training),
            "n_held_out": len(held_out),
            "features": str(self.extractor) if self.extractor else "none",
            "preprocessing": self.extractor and self.extractor.preprocessing,
            "classifier": self.record,
            "near_copy_threshold": copies.threshold,
            "metrics": figures,
            "floor": floor,
            "note": "; ".join(notes),
        }


def draw_closest_pairs(run: Run, images: Tensor, training: Tensor, copies: Memorisation) -> None:
    """``closest_pairs.png``: the ten generated images that are nearest to a training image."""
    closest = np.argsort(copies.distance, kind="stable")[:10]
    figure = Figure(figsize=(7.5, 2.1))
    axes = figure.subplots(2, len(closest), squeeze=False)
    for column, i in enumerate(closest):
        axes[0, column].set_title(f"{copies.distance[i]:.3f}", fontsize=7)
        for row, image in enumerate((images[i], training[copies.index[i]])):
            axes[row, column].imshow(to_picture(image), vmin=0, vmax=255)
            axes[row, column].set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("generated", fontsize=7)
    axes[1, 0].set_ylabel("training", fontsize=7)
    title = f"closest pairs, RMS difference (near copy: ≤ {copies.threshold:.3f})"
    figure.suptitle(f"{run.folder.name}: {title}", fontsize=8)
    save_figure(run.folder / "closest_pairs.png", figure)


def to_picture(image: Tensor) -> np.ndarray:
    """uint8 (C, H, W) to (H, W, 3), for matplotlib."""
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy()


# --------------------------------------------------------------------------- tables and figures


def show(value: float, form: str, missing: str = "–") -> str:
    """A figure for a table; a dash for what could not be measured."""
    return form.format(value) if np.isfinite(value) else missing


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that is also aligned on a terminal."""
    rows = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def result_table(results: list[dict[str, Any]]) -> str:
    """One row a run, below it what real images score at the same n."""
    rows = []
    for r in results:
        for name, n, part, note in (
            (r["run"], r["n_generated"], r["metrics"], r["note"]),
            (f"  {FLOOR}", r["floor"]["n"], r["floor"], r["floor"]["from"]),
        ):
            cells = {key: show(part[key], form) for key, (_, form) in METRICS.items()}
            cells["kid"] += show(part["kid_standard_error"], " ±{:.1g}", "")
            rows.append([name, str(n), str(r["n_real"]), r["features"], *cells.values(), note])
    headings = [heading for heading, _ in METRICS.values()]
    return table(["run", "n", "n real", "features", *headings, "note"], rows)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval by Student's t; NaN half-width for one value."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(np.mean(values)), float(half)


def axes_of(results: list[dict[str, Any]]) -> tuple[list[str], list[int | None], list[str]]:
    """The arms in the training script's order, the training-set sizes (None: the whole class)
    ascending, and the metrics that at least one run has."""
    arms = {r["settings"]["arm"] for r in results}
    sizes = {r["settings"]["n_train"] for r in results}
    return (
        [arm for arm in ARMS if arm in arms],
        sorted(sizes, key=lambda n: float("inf") if n is None else n),
        [key for key in METRICS if any(np.isfinite(r["metrics"][key]) for r in results)],
    )


def seed_means(
    results: list[dict[str, Any]], key: str
) -> dict[tuple[str, int | None], list[float]]:
    """Per (arm, training-set size) one value a seed: the mean over the classes that every arm and
    seed has at that size. The floor, one value a size, stands under FLOOR as its arm."""
    cells: dict[Any, dict[Any, dict[int, tuple[float, float]]]] = {}
    for r in results:
        s, pair = r["settings"], (r["metrics"][key], r["floor"][key])
        cells.setdefault(s["n_train"], {}).setdefault((s["arm"], s["seed"]), {})[s["label"]] = pair
    means: dict[tuple[str, int | None], list[float]] = {}
    for n_train, runs in cells.items():
        shared = sorted(set.intersection(*(set(by_label) for by_label in runs.values())))
        if not shared:
            continue
        pairs = {run: np.mean([by[label] for label in shared], 0) for run, by in runs.items()}
        for (arm, _), (value, _) in sorted(pairs.items()):
            if np.isfinite(value):
                means.setdefault((arm, n_train), []).append(float(value))
        means[FLOOR, n_train] = [float(np.mean([floor for _, floor in pairs.values()]))]
    return means


def arm_table(results: list[dict[str, Any]]) -> str:
    """Per training-set size and arm: mean over seeds and 95 % interval; then the floor."""
    arms, sizes, keys = axes_of(results)
    means = {key: seed_means(results, key) for key in keys}
    rows = []
    for n_train, arm in itertools.product(sizes, [*arms, FLOOR]):
        own = [
            r
            for r in results
            if r["settings"]["n_train"] == n_train and arm in (r["settings"]["arm"], FLOOR)
        ]
        if not own:
            continue
        row = [str(n_train or "all"), arm]
        row += ["/".join(sorted({str(r["settings"][k]) for r in own})) for k in ("label", "seed")]
        row += ["/".join(sorted({str(r[k]) for r in own})) for k in ("n_generated", "n_real")]
        for key in keys:
            mean, half = interval(means[key].get((arm, n_train), [float("nan")]))
            row.append(show(mean, METRICS[key][1]) + show(half, " ± " + METRICS[key][1], ""))
        rows.append(row)
    header = ["N", "arm", "classes", "seeds", "n generated", "n real"]
    return table(header + [METRICS[key][0] for key in keys], rows)


def pair_differences(
    results: list[dict[str, Any]], key: str, arm: str, baseline: str, n_train: int | None
) -> dict[tuple[int, int], float]:
    """A metric of ``arm`` minus that of ``baseline`` at one training-set size, by (class, seed)."""
    values: dict[str, dict[tuple[int, int], float]] = {arm: {}, baseline: {}}
    for r in results:
        s = r["settings"]
        if s["n_train"] == n_train and s["arm"] in values and np.isfinite(r["metrics"][key]):
            values[s["arm"]][s["label"], s["seed"]] = r["metrics"][key]
    base = values[baseline]
    return {pair: value - base[pair] for pair, value in values[arm].items() if pair in base}


def bounds(limits: Sequence[float] | None, form: str) -> str:
    """An interval for a table, with a star when zero is outside; a dash when there is none."""
    if limits is None:
        return "–"
    low, high = limits
    star = " *" if low > 0 or high < 0 else ""
    return f"[{form.format(low)}, {form.format(high)}]{star}"


def paired_differences(results: list[dict[str, Any]], baseline: str, seed: int) -> list[list[str]]:
    """Rows (difference, N, metric, pairs, seeds, mean, two 95 % intervals, clear of zero) of every
    arm minus ``baseline``; a pair is two runs of equal class, size and seed.

    The intervals are the bootstrap's over pairs (percentiles of BOOTSTRAP_DRAWS resampled means),
    which needs BOOTSTRAP_FROM of them, and Student's t of the differences; a star where zero is
    outside. A difference is clear of zero when both say so; fewer than DECIDING_SEEDS seeds decide
    nothing, whatever the intervals say.
    """
    arms, sizes, keys = axes_of(results)
    rows = []
    for arm, n_train, key in itertools.product(arms, sizes, keys):
        pairs = pair_differences(results, key, arm, baseline, n_train)
        if arm == baseline or not pairs:
            continue
        values, form = np.array(list(pairs.values())), METRICS[key][1].replace("{:", "{:+")
        mean, half = interval(values)
        bootstrap = student = None
        if len(values) > 1 and values.any():
            student = mean - half, mean + half
        if len(values) >= BOOTSTRAP_FROM:
            draws = np.random.default_rng(seed).choice(values, (BOOTSTRAP_DRAWS, len(values)))
            bootstrap = np.percentile(draws.mean(axis=1), [2.5, 97.5])
        limits = [bounds(found, form) for found in (bootstrap, student)]
        seeds = len({pair_seed for _, pair_seed in pairs})
        clear = "yes" if all(text.endswith("*") for text in limits) else "no"
        clear = clear if seeds >= DECIDING_SEEDS else "too few seeds"
        counts = [str(n_train or "all"), METRICS[key][0], str(len(pairs)), str(seeds)]
        rows.append([f"{arm} − {baseline}", *counts, form.format(mean), *limits, clear])
    return rows


def budget_text(results: list[dict[str, Any]]) -> str:
    """What the runs were trained and sampled with, and in bold what not all of them share. The
    circuit's conditions are compared between the arms that have one, and left out when ideal."""
    circuits = [r["settings"] for r in results if r["settings"]["arm"] in QUANTUM_ARMS]
    values = {name: [r["settings"].get(name) for r in results] for name in BUDGET}
    values["images"] = [r["n_generated"] for r in results]
    for name, ideal in CONDITIONS.items():
        found = [settings.get(name, ideal) for settings in circuits]
        if any(value != ideal for value in found):
            values[name] = found
    texts = {}
    for name, found in values.items():
        different = [value for k, value in enumerate(found) if value not in found[:k]]
        texts[name] = f"{name} {' / '.join(map(str, different))}"
        if len(different) > 1:
            texts[name] = f"**{texts[name]} (not the same in all runs)**"
    return ", ".join(texts.values()) + "."


def comparison_text(results: list[dict[str, Any]], seed: int) -> str:
    """The Markdown report on several runs."""
    parts = [
        "# Comparison of runs",
        f"Features: {', '.join(sorted({r['features'] for r in results}))}. Real images: "
        f"{results[0]['settings']['data']}, reference {results[0]['reference']}. Mean over seeds ± "
        f"half of the 95 % interval (Student's t). {FLOOR}: held-out images, as many as generated.",
        f"Budget: {budget_text(results)}",
        "; ".join(sorted({r["note"] for r in results if r["note"]})),
        arm_table(results),
    ]
    header = ["difference", "N", "metric", "pairs", "seeds", "mean"]
    header += ["95 % bootstrap", "95 % Student's t", "clear of 0"]
    for baseline in ("matched", "classical"):
        if rows := paired_differences(results, baseline, seed):
            limits = [row[7] for row in rows if row[7] != "–"]
            outside, chance = sum(text.endswith("*") for text in limits), 0.05 * len(limits)
            parts += [f"## Paired differences against {baseline}", table(header, rows)]
            parts.append(
                f"{outside} of {len(limits)} Student's t intervals leave zero out (*). If nothing "
                f"differed, chance would make that {chance:.2g} on average, with a wide spread, "
                "since the metrics depend on each other."
            )
    return "\n\n".join(filter(None, [*parts, "## Runs", result_table(results)])) + "\n"


def comparison_csv(results: list[dict[str, Any]]) -> str:
    """One line a run: settings, figures, floors."""
    lines = []
    for r in results:
        line = {"run": r["run"]}
        line |= {key: r["settings"][key] for key in ("arm", "data", "label", "n_train", "seed")}
        for key in ("features", "reference", "n_generated", "n_real", "n_training", "note"):
            line[key] = r[key]
        lines.append(line | r["metrics"] | {f"floor_{key}": r["floor"][key] for key in r["floor"]})
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, lines[0])
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def draw_panels(results: list[dict[str, Any]], against_size: bool) -> Figure:
    """One panel a metric of FIGURE_METRICS: each arm's mean and 95 % interval over seeds, small
    dots for the seeds, and the floor as a dashed line; or, ``against_size``, a line per arm over
    the number of training images. When there are runs of ``matched``, a panel below shows the other
    arms' paired differences to it: mean, 95 % interval (Student's t), small dots for the pairs."""
    arms, sizes, finite = axes_of(results)
    keys = [key for key in FIGURE_METRICS if key in finite]
    places = np.arange(len(sizes), dtype=float)
    if against_size:
        for j, size in enumerate(sizes):
            used = [r["n_training"] for r in results if r["settings"]["n_train"] == size]
            places[j] = np.mean(used)
    x = {}  # beside each other, so that intervals do not hide one another
    for i, arm in enumerate(arms):
        shift = i - (len(arms) - 1) / 2
        x[arm] = places * 1.12**shift if against_size else places + shift * 0.8 / len(arms)
    heights = [2, 1] if BASELINE in arms and len(arms) > 1 else [2]
    rows = -(-len(keys) // 4)
    figure = Figure(figsize=(12, 1.3 * sum(heights) * rows), layout="constrained")
    ratios = {"height_ratios": heights * rows}
    panels = figure.subplots(len(heights) * rows, 4, squeeze=False, gridspec_kw=ratios)
    floor_style = {"color": "#666666", "linestyle": "--", "linewidth": 1, "label": FLOOR}

    def draw_arm(axes: Axes, arm: str, by_size: dict[int, Sequence[float]]) -> None:
        """Mean and interval of the values at each place, joined when they are over size."""
        middle, half = np.array([interval(values) for values in by_size.values()]).T
        style = {"fmt": "o-" if against_size else "o", "capsize": 2, "markersize": 4}
        style |= {"color": ARM_COLOURS[arm], "label": arm, "linewidth": 1}
        axes.errorbar(x[arm][list(by_size)], middle, half, elinewidth=0.8, **style)
        for j, values in by_size.items():
            axes.scatter([x[arm][j]] * len(values), values, 5, ARM_COLOURS[arm], alpha=0.4)

    for k, key in enumerate(keys):
        above, *below = panels[len(heights) * (k // 4) :, k % 4][: len(heights)]
        means = seed_means(results, key)
        floor = np.array([means.get((FLOOR, size), [np.nan])[0] for size in sizes])
        for arm in arms:
            own = {j: means[arm, n] for j, n in enumerate(sizes) if (arm, n) in means}
            if own:
                draw_arm(above, arm, own)
        above.set_ylabel(METRICS[key][0])
        if against_size:
            above.plot(places, floor, **floor_style)
        else:
            above.hlines(floor, places - 0.45, places + 0.45, **floor_style)
        for axes in below:
            for arm in arms:
                differences = (
                    [*pair_differences(results, key, arm, BASELINE, n).values()] for n in sizes
                )
                own = {j: values for j, values in enumerate(differences) if values}
                if arm != BASELINE and own:
                    draw_arm(axes, arm, own)
            axes.axhline(0, color=ARM_COLOURS[BASELINE], linewidth=1)
            axes.set_ylabel(f"{METRICS[key][0]}\n− {BASELINE}")
        for axes in (above, *below):
            if against_size:
                axes.set_xscale("log")
                axes.set_xticks(places, [f"{place:.0f}" for place in places])
                axes.minorticks_off()
            else:
                axes.set_xticks(places, [f"N = {size or 'all'}" for size in sizes])
            axes.set_xlim(above.get_xlim())
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
        place = label, n_train or np.inf, [*ARMS].index(run.settings["arm"])
        chosen[place] = run  # the last stays
    rows: list[tuple[str, Tensor]] = []
    for (label, _, _), run in sorted(chosen.items()):
        n_train, seed = run.settings["n_train"], run.settings["seed"]
        name = run.settings.get("label_name", label)
        end = f", N = {n_train or 'all'}, seed {seed}"
        if f"real {name}{end}" not in dict(rows):
            train = evaluator.dataset.select_images(*evaluator.train, label, n_train, seed)
            rows.append((f"real {name}{end}", train))
        rows.append((f"{run.settings['arm']}{end}", run.images))
    figure = Figure(figsize=(6, 0.36 * len(rows)), layout="constrained")
    for axes, (title, images) in zip(
        figure.subplots(len(rows), 1, squeeze=False).flat, rows, strict=True
    ):
        tiles = F.pad(images[:SAMPLE_COLUMNS], (1, 1, 1, 1), value=255)
        tiles = F.pad(
            tiles.permute(1, 2, 0, 3).flatten(2), (0, 30 * (SAMPLE_COLUMNS - len(tiles))), value=255
        )
        axes.imshow(to_picture(tiles), vmin=0, vmax=255, interpolation="nearest")
        axes.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=6)
        axes.set(xticks=[], yticks=[], frame_on=False)
    return figure


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
    rows = []
    for run in tqdm(runs, "runs", delay=2, leave=False):
        sample = run.images[:PAPER_IMAGES].expand(-1, images.shape[1], -1, -1)
        if sample.shape != first.shape:
            raise UserError(f"{run.folder}: {tuple(sample.shape)}, expected {tuple(first.shape)}")
        label = run.settings["label"]
        if label not in evaluator.kept:
            candidates, generator = images[others & (labels == label)], evaluator.stream("paper")
            order = torch.randperm(len(candidates), generator=generator)[: 2 * PAPER_DRAWS]
            pool = Real(candidates[order], extractor(candidates[order]))
            evaluator.kept[label] = []
            for _ in range(PAPER_DRAWS):
                five = pool.take(torch.randperm(len(order), generator=generator)[:PAPER_IMAGES])
                scores = frechet_distance(five.features, fitted), ssim_paired(five.images, first)
                evaluator.kept[label].append(scores)
        scores = frechet_distance(extractor(sample), fitted), ssim_paired(sample, first)
        record = {"n_generated": len(sample), "n_real": len(first), "draws": PAPER_DRAWS}
        record["features"] = str(extractor)
        row = [run.folder.name, str(len(sample)), str(len(first)), str(extractor)]
        for key, value, real in zip(
            ("fid", "ssim_paired"), scores, np.transpose(evaluator.kept[label]), strict=True
        ):
            limits = np.percentile(real, [2.5, 97.5]).tolist()
            record[key] = {"run": value, "real_mean": float(real.mean()), "real_95": limits}
            form = "{:.4g}".format
            row += [form(value), form(real.mean()), " to ".join(map(form, limits))]
        write_atomic(run.folder / "metrics_paper.json", json.dumps(record, indent=2) + "\n")
        rows.append(row)
    for arm, (fid, paired) in evaluator.dataset.withdrawn.items():
        row = [
            f"paper, {arm} (withdrawn by its authors)",
            "5",
            "5",
            "inception",
            str(fid),
            "–",
            "–",
        ]
        rows.append([*row, str(paired), "–", "–"])
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
    add("--seed", type=int, default=0, help="of classifier, subsets, floors and bootstrap")
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
    sources = {run.settings["data"]: run.folder for run in runs}
    if len(sources) > 1:
        found = ", ".join(f"{source} ({folder})" for source, folder in sources.items())
        raise UserError(f"mixed data sets: {found}; evaluate each by itself")
    known = {}
    for run in runs:
        key = tuple(run.settings[name] for name in ("arm", "label", "n_train", "seed"))
        if key in known:
            found = f"{known[key]} and {run.folder} have the same arm, class, size and seed"
            raise UserError(f"{found}; evaluate each by itself")
        known[key] = run.folder
    evaluator = Evaluator(dataset, runs[0].settings["data"], options)
    if evaluator.record:
        print("classifier: {test_accuracy:.2%} of {n_test} test images".format(**evaluator.record))
    if options.protocol == "paper":
        text = paper_protocol(evaluator, runs)
        print(text)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            write_atomic(options.out / "paper_protocol.md", text + "\n")
        return
    results = []
    for run in tqdm(runs, "runs", delay=2, leave=False):
        results.append(evaluator.measure(run))
        text = json.dumps(without_nan(results[-1]), indent=2)
        write_atomic(run.folder / "metrics.json", text + "\n")
    print(result_table(results))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out / "comparison.csv", comparison_csv(results))
        write_atomic(options.out / "comparison.md", comparison_text(results, options.seed))
        save_figure(options.out / "comparison.png", draw_panels(results, against_size=False))
        save_figure(options.out / "samples.png", draw_samples(runs, evaluator))
        if len({run.settings["n_train"] for run in runs}) > 1:
            save_figure(options.out / "scaling.png", draw_panels(results, against_size=True))
        print(f"written to {options.out}")


def without_nan(value: Any) -> Any:
    """The same nested value with null for NaN, as JSON has none."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def main(argv: Sequence[str] | None = None, dataset: DataSet = MNIST) -> None:
    """Run the command line; a user's mistake prints one line and exits 2."""
    try:
        evaluate(parse_options(argv, dataset), dataset)
    except (UserError, dataset.user_error) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
