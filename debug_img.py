"""Shows how a picture is split into images: its boxes, numbered, beside the extracted tiles.

    python debug_img.py runs/quantum_mnist3_nall_seed0/samples_final.png
    python debug_img.py figure.png --expect 5          # exits 2 when the count differs

Prints count, size, ground colour, method (metadata: exact; detected: by the look) and confidence.
"""

import argparse
import contextlib
import io
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from scipy import ndimage
from torch import Tensor

import quantum_diffusion_mnist as mnist
from quantum_diffusion_mnist import IMAGE_SIZE, TILE_PADDING, UserError, reading, tile

MAX_PIXELS = 50_000_000  # of a picture
CONTRASTS = (128, 64, 32, 16, 8, 4)  # 8-bit levels by which a tile may differ from the ground
MIN_CONFIDENCE = 0.5  # tests/test_split_grid.py holds the cases that it was chosen on
SHOWN = 100  # tiles at most beside the picture
BOX_COLOUR = "#D55E00"


# ---------------------------------------------------------------- from a picture to its images


class Grid(NamedTuple):
    """The images of one picture: ``images`` uint8 (N, C, H, W) with C = 1 or 3, ``boxes`` (left,
    top, right, bottom) in pixels of the picture, ``ground`` its RGB colour, ``method`` "metadata"
    or "detected", ``confidence`` in [0, 1] (1 for metadata)."""

    images: Tensor
    boxes: np.ndarray
    ground: tuple[int, int, int]
    method: str
    confidence: float


def split_grid(path: Path, expect: int | None = None) -> Grid:
    """Cut a picture into its images, in reading order.

    A PNG with this project's ``grid`` text chunk is split to the bit. In any other picture (of an
    animation: the last frame) the tiles are found as equal rectangles on a uniform ground and
    brought back to 28x28 pixels. ``expect``, the number of images if known, decides whether an
    empty last place of the grid is a white image.

    Raises UserError for an unreadable or truncated file and for an ambiguous layout.
    """
    picture, description = read_picture(path)
    if description is not None:
        images = mnist.load_grid(path)
        with reading(path, "the grid that it describes"):
            layout = json.loads(description)
            columns, scale = layout["columns"], layout["scale"]
            assert (tile(images, columns, scale) == picture).all(), "other pixels"
        side = np.array(images.shape[:1:-1])
        places = np.array([divmod(k, columns)[::-1] for k in range(len(images))])
        starts = TILE_PADDING + places * (side + TILE_PADDING)
        boxes = scale * np.hstack([starts, starts + side])
        return Grid(images, boxes, (255, 255, 255), "metadata", 1.0)
    boxes, ground, confidence = detect_tiles(picture, path, expect)
    tiles = np.stack([resample(picture[y0:y1, x0:x1]) for x0, y0, x1, y1 in boxes])
    if np.ptp(tiles.astype(int), axis=-1).mean() < 1:  # grey, but for a stray coloured pixel
        tiles = tiles[..., :1]
    images = torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous()
    return Grid(images, boxes, ground, "detected", confidence)


def read_picture(path: Path) -> tuple[np.ndarray, str | None]:
    """The pixels, uint8 (height, width, 3) over a white ground, and the ``grid`` chunk. Raises
    UserError for what is no picture and for one of more than MAX_PIXELS."""
    with reading(path, "a readable picture"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as file:
            assert file.width * file.height <= MAX_PIXELS, f"{file.size}: over {MAX_PIXELS} pixels"
            assert file.mode[0] not in "IF", f"{file.mode}: more than 8 bits a channel"
            file.seek(getattr(file, "n_frames", 1) - 1)
            rgba = file.convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            pixels = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
            return pixels, getattr(file, "text", {}).get("grid")


def detect_tiles(
    picture: np.ndarray, path: Path, expect: int | None
) -> tuple[np.ndarray, tuple[int, int, int], float]:
    """Find equal rectangles on a uniform ground: (boxes in reading order, ground, confidence).

    The picture's outermost pixels propose the ground, then its commonest colours. Every contrast
    in CONTRASTS turns the picture into a mask; among the masks that are a lattice of tiles the one
    with most tiles wins, of equals the most confident. Raises UserError when none is.
    """
    rim = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    grounds, reason = [], ""
    for pixels, count in ((rim[None], 1), (picture, 3)):
        colours = Image.fromarray(pixels).getcolors(pixels.size)
        grounds += [colour for _, colour in sorted(colours, reverse=True)[:count]]
    for ground in dict.fromkeys(grounds):
        difference = np.abs(picture.astype(np.int16) - np.array(ground)).max(axis=2)
        found = []
        for contrast in CONTRASTS:
            try:
                boxes, confidence = find_tiles(difference > contrast, expect)
                found.append((len(boxes), confidence, without_frames(picture, boxes)))
            except ValueError as error:
                reason = reason or str(error)  # of the likeliest ground
        if found:
            _, confidence, boxes = max(found, key=lambda layout: layout[:2])
            return boxes, ground, confidence
    expected = f"equal tiles of at least {IMAGE_SIZE}x{IMAGE_SIZE} pixels, apart from each other"
    raise UserError(f"{path}: ambiguous layout ({reason}); expected {expected}, on uniform ground")


def find_tiles(mask: np.ndarray, expect: int | None) -> tuple[np.ndarray, float]:
    """The cells of the lattice in ``mask`` (height, width; True: not ground) as boxes (n, 4) in
    reading order, and the confidence: the share of the cells' weakest side that differs from the
    ground times the share of the ground around the worst cell that does not.

    Raises ValueError with the reason where this is no lattice of tiles.
    """
    rows, height = lattice(mask)
    columns, width = lattice(np.hstack([mask[y : y + height].T for y in rows]))
    if not 2 / 3 <= width / height <= 3 / 2:
        raise ValueError(f"rectangles of {width}x{height} pixels: touching tiles?")
    cells = np.array([(x, y, x + width, y + height) for y in rows for x in columns])
    filled = [mask[y0:y1, x0:x1].mean() > 0.05 for x0, y0, x1, y1 in cells]
    count = len(cells) - filled[::-1].index(True)
    if not all(filled[:count]):
        raise ValueError("a hole between the tiles")
    if count == len(cells) - 1 and expect not in (count, count + 1):
        raise ValueError(f"{count} or {count + 1} images: the last place is empty, or white")
    if count < (expect or 0) <= len(cells):
        count = expect
    if len(cells) == 1 and not ((cells[0] > 0) & (cells[0] < [*mask.shape[::-1]] * 2)).all():
        raise ValueError("a single rectangle at the picture's edge")

    padded, outside = np.pad(mask, 2), np.pad(mask, 2)
    sides, moats = [], []
    for x0, y0, x1, y1 in cells[:count]:  # a pixel inside and two outside: edges are rounded
        for part, found in ((padded[y0 + 3 : y1 + 1, x0 + 3 : x1 + 1], sides),
                            (padded[y0 : y1 + 4, x0 : x1 + 4], moats)):  # fmt: skip
            found.append([line.mean() for line in (part[0], part[-1], part[:, 0], part[:, -1])])
        outside[y0 + 1 : y1 + 3, x0 + 1 : x1 + 3] = False
    parts = ndimage.find_objects(ndimage.label(outside, np.ones((3, 3)))[0])
    largest = max((edge.stop - edge.start for part in parts for edge in part), default=0)
    if largest > 0.35 * min(width, height):  # letters and ticks are smaller
        raise ValueError(f"a part of {largest} pixels beside tiles of {width}x{height}")
    confidence = np.mean(sides, axis=0).min() * (1 - np.mean(moats, axis=1).max())
    if confidence < MIN_CONFIDENCE:
        raise ValueError(f"no straight outlines, confidence {confidence:.2f}")
    return cells[:count], float(confidence)


def lattice(mask: np.ndarray) -> tuple[list[int], int]:
    """Where the rows of tiles begin in ``mask`` (height, width), and their height.

    A line is drawn on where half of some IMAGE_SIZE neighbouring pixels differ from the ground.
    Runs of drawn lines of equal length, the longest and most of them, give the places; a place
    between or beside them is one too when its first and last lines are drawn on (a run may be
    broken inside a tile). Raises ValueError when there are none or they are not evenly spaced.
    """
    ink = ndimage.uniform_filter1d(mask.astype(np.float32), IMAGE_SIZE, axis=1, mode="constant")
    drawn = ink.max(axis=1) > 0.5
    starts, ends = np.flatnonzero(np.diff(np.pad(drawn, 1).astype(int))).reshape(-1, 2).T
    lengths = ends - starts
    if lengths.max(initial=0) < IMAGE_SIZE:
        raise ValueError("no solid rectangles on a uniform ground")
    alike = np.abs(lengths[:, None] - lengths) <= np.maximum(2, 0.04 * lengths)
    chosen = alike[(alike.sum(axis=1) * lengths * (lengths >= IMAGE_SIZE)).argmax()]
    starts, side = starts[chosen], int(np.median(lengths[chosen]))
    if len(starts) == 1:
        return starts.tolist(), side
    places = np.rint((starts - starts[0]) / np.diff(starts).min())
    step, origin = np.polyfit(places, starts, 1)
    if np.abs(origin + step * places - starts).max() > max(2, 0.04 * side):
        raise ValueError("rows or columns of tiles at unequal distances")
    room = np.arange(-int((origin + 1) // step), int((len(drawn) - side - origin + 1) // step) + 1)
    edges = np.rint(origin + step * room).astype(int).clip(0, len(drawn) - side)
    used = np.flatnonzero(drawn[edges + 2] & drawn[edges + side - 3])
    if not len(used):
        raise ValueError("rows or columns of tiles at unequal distances")
    return edges[used[0] : used[-1] + 1].tolist(), side


def without_frames(picture: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The boxes less a frame drawn around the images: rings of one colour in all of them that end
    where most of the next ring has another. Raises ValueError for one that hides half a pixel."""
    tiles = np.stack([picture[y0:y1, x0:x1] for x0, y0, x1, y1 in boxes], axis=2).astype(int)
    pixel, frame, colour = min(tiles.shape[:2]) / IMAGE_SIZE, 0, None
    for depth in range(int(3 * pixel)):
        part = tiles[depth : len(tiles) - depth, depth : tiles.shape[1] - depth]
        ring = np.concatenate([part[0], part[-1], part[:, 0], part[:, -1]]).reshape(-1, 3)
        if depth and (np.abs(ring - colour).max(axis=1) <= 24).mean() < 0.5:
            frame = depth
        colour = np.median(ring, axis=0)
        if (np.abs(ring - colour).max(axis=1) <= 24).mean() < 0.85:
            break
    if frame > pixel / 2:
        raise ValueError(f"a frame of {frame} pixels, enlarged pixels are {pixel:.1f} wide")
    return boxes + np.array([frame, frame, -frame, -frame])


def resample(tile: np.ndarray, size: int = IMAGE_SIZE) -> np.ndarray:
    """Undo an enlargement: uint8 (h, w, 3) to (size, size, 3), each pixel the mean over about the
    middle half of its cell, so that edges one pixel off do not mix neighbours."""
    cells = np.array(tile.shape[:2]) / size
    middles = np.ix_(*(((np.arange(size) + 0.5) * cell).astype(int) for cell in cells))
    window = (*(int(cell / 2 - 0.5) | 1 for cell in cells), 1)
    return np.rint(ndimage.uniform_filter(tile.astype(float), window)[middles]).astype(np.uint8)


# ------------------------------------------------------------------------------ figures, errors


def show_tiles(axes: Axes, images: Tensor, columns: int) -> None:
    """Draw images (N, C, H, W) uint8 in rows of ``columns``, without axes."""
    grey = {"cmap": "gray", "vmin": 0, "vmax": 255}
    axes.imshow(tile(images, columns), interpolation="nearest", **grey)
    axes.set(xticks=[], yticks=[], frame_on=False)


def draw_split(path: Path, grid: Grid) -> Figure:
    """The picture with its numbered boxes on the left, the tiles in reading order on the right."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(read_picture(path)[0])
    title = f"{path.name}: {len(grid.boxes)} tiles, {grid.method}"
    left.set_title(title.encode(errors="replace").decode(), fontsize=10, parse_math=False)
    for number, (x0, y0, x1, y1) in enumerate(grid.boxes):
        box = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, color=BOX_COLOUR)
        left.add_patch(box)
        left.text(x0, y0, number, color=BOX_COLOUR, fontsize=8, va="bottom")
    tiles = grid.images[:SHOWN]
    columns = max(5, math.ceil(math.sqrt(len(tiles))))
    show_tiles(right, tiles, columns)
    side = tiles.shape[-1]
    for number in range(len(tiles)):
        row, column = divmod(number, columns)
        x, y = column * (side + TILE_PADDING), (row + 0.3) * (side + TILE_PADDING)
        right.text(x, y, number, color=BOX_COLOUR, fontsize=8)
    right.set_title(f"tiles 0 to {len(tiles) - 1} as extracted, {side}x{side} pixels", fontsize=10)
    for axes in (left, right):
        axes.set_axis_off()
    return figure


@contextlib.contextmanager
def exit_codes(*mistakes: type[Exception]) -> Iterator[None]:
    """A user's mistake, or a file that cannot be read or written, prints one line and exits 2;
    Ctrl-C exits 130."""
    sys.stderr = sys.stderr or io.StringIO()  # closed: progress bars need one
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names that are not UTF-8
    try:
        yield
    except (UserError, OSError, MemoryError, *mistakes) as error:
        print("error:", " ".join(str(error).split()) or "out of memory", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 2 a mistake of the user's, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"error: {' '.join(message.split())}\n")
    add = parser.add_argument
    add("picture", type=Path, help="a sample grid, figure or GIF (its last frame)")
    add(
        "--expect",
        type=mnist.between(1, 10**6),
        metavar="N",
        help="exit 2 unless N images are found",
    )
    add("--out", type=Path, metavar="PNG", help="figure to write (default: PICTURE_split.png)")
    options = parser.parse_args(argv)
    path = options.picture
    out = options.out or path.parent / f"{path.stem}_split.png"
    with exit_codes():
        grid = split_grid(path, options.expect)
        if out.exists() and (not out.is_file() or out.samefile(path)):
            raise UserError(f"--out {out}: is the picture itself, or no file; name another")
        out.parent.mkdir(parents=True, exist_ok=True)
        x0, y0, x1, y1 = grid.boxes[0]
        channels, height, width = grid.images.shape[1:]
        print(f"images      {len(grid.images)}")
        print(
            f"size        {width}x{height}, {channels} channel(s), from {x1 - x0}x{y1 - y0} pixels"
        )
        print("ground      #{:02x}{:02x}{:02x}".format(*grid.ground))
        print(f"method      {grid.method}")
        print(f"confidence  {grid.confidence:.2f}")
        mnist.save_figure(out, draw_split(path, grid))
        print(f"figure      {out}")
        if options.expect not in (None, len(grid.images)):
            found = f"{len(grid.images)} images, --expect {options.expect}"
            raise UserError(f"{path}: {found}; see {out}")


if __name__ == "__main__":
    main()
