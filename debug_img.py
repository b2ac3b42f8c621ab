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
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps
from scipy import ndimage
from torch import Tensor

import quantum_diffusion_mnist as mnist
from quantum_diffusion_mnist import IMAGE_SIZE, TILE_PADDING, UserError, reading, tile, write_atomic

MAX_PIXELS = 50_000_000  # of a picture that is split by its look
CONTRASTS = (128, 64, 32, 16, 8, 4)  # 8-bit levels by which a tile may differ from the ground
MIN_CONFIDENCE = 0.5  # tests/test_split_grid.py holds the cases that it was chosen on
LARGEST_LETTER = 0.35  # of a tile's side: what is larger is no title and no tick
FRAME_TOLERANCE = 24  # 8-bit levels within which a ring around the tiles is of one colour
FLAT = 20  # 8-bit levels: a mean deviation below it may be a compression's noise
LARGEST_LOSS = 0.15  # of a single image's mean deviation, when it is shrunk and enlarged again
SHOWN = 100  # tiles at most that are numbered, and shown beside the picture
NOTHING_FOUND = "no solid rectangles on a uniform ground"
BOX_COLOUR = "#D55E00"


# ---------------------------------------------------------------- from a picture to its images
class Grid(NamedTuple):
    """The images of one picture and where they stood in it."""

    images: Tensor  # (N, C, H, W) uint8, C = 1 or 3
    boxes: np.ndarray  # (N, 4): left, top, right, bottom in pixels of the picture
    ground: tuple[int, int, int]  # red, green, blue
    method: str  # "metadata" or "detected"
    confidence: float  # in [0, 1]; 1 for metadata


def split_grid(path: Path, expect: int | None = None) -> Grid:
    """Cut a picture into its images, in reading order.

    A PNG with this project's ``grid`` text chunk is split to the bit. In any other picture (of an
    animation: the last frame) the tiles are found as equal rectangles on a uniform ground and
    brought back to 28x28 pixels. ``expect`` is the number of images if it is known; it decides
    whether an empty last place of the grid is a white image, and lets a single rectangle of finer
    detail than an image pass as one.

    Raises UserError for an unreadable or truncated file and for an ambiguous layout.
    """
    picture, description = read_picture(path)
    if description is not None:
        return split_described(path, description)

    # Found by their look, each brought back to the size of an image.
    boxes, ground, confidence = detect_tiles(picture, path, expect)
    tiles = np.stack([shrink(picture[y0:y1, x0:x1]) for x0, y0, x1, y1 in boxes])  # (N, H, W, 3)

    # A grey picture has equal channels, but for a stray coloured pixel.
    spread = tiles.max(axis=3).astype(int) - tiles.min(axis=3)
    if spread.mean() < 1:
        tiles = tiles[..., :1]

    images = torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous()  # (N, C, H, W)
    return Grid(images, boxes, ground, "detected", confidence)


def read_picture(path: Path) -> tuple[np.ndarray, str | None]:
    """Read the pixels and the ``grid`` text chunk (None: there is none).

    Pixels: uint8 (height, width, 3), over a white ground where the picture is transparent, turned
    as EXIF tells. Raises UserError for what is no picture, has over 8 bits a channel or, without a
    ``grid``, more than MAX_PIXELS pixels.
    """
    with reading(path, "a readable picture"), quiet(), Image.open(path) as file:
        is_ours = "grid" in file.info
        if not is_ours and file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.size}: over {MAX_PIXELS} pixels")
        if file.mode.startswith(("I", "F")):
            raise ValueError(f"{file.mode}: more than 8 bits a channel")

        last_frame = getattr(file, "n_frames", 1) - 1
        file.seek(last_frame)
        rgba = (file if is_ours else ImageOps.exif_transpose(file)).convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        pixels = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))

        texts = getattr(file, "text", {})  # PNG has them, JPEG does not
        return pixels, texts.get("grid")


def split_described(path: Path, description: str) -> Grid:
    """Split a grid that this project saved, by its description (the text chunk, JSON).

    Raises UserError where the picture is not the one that the description belongs to.
    """
    images = mnist.load_grid(path)  # (N, C, H, W)
    with reading(path, "the grid that it describes"):
        layout = json.loads(description)
        columns = layout["columns"]
        scale = layout["scale"]

    # Tile k stands at row k // columns, column k % columns, after a margin of TILE_PADDING.
    height, width = images.shape[2:]
    boxes = []
    for k in range(len(images)):
        left = TILE_PADDING + (k % columns) * (width + TILE_PADDING)
        top = TILE_PADDING + (k // columns) * (height + TILE_PADDING)
        boxes.append([left, top, left + width, top + height])

    return Grid(images, scale * np.array(boxes), (255, 255, 255), "metadata", 1.0)


# ------------------------------------------------------------------- tiles found by their look
#
#       left              left + width
#   top  +-----------------+ . . . +-----------------+      Three steps: which colour is the
#        |                 |       |                 |      ground; where do equal runs of lines
#        |      tile       | moat  |      tile       |      begin (``lattice``, first of rows, then
#        |                 |       |                 |      of columns); and are the cells of that
#        +-----------------+ . . . +-----------------+      lattice filled to straight edges, with
#        . . . . . . . . . . . . . . . . . . . . . .        empty moats around them
#        +-----------------+ . . . +-----------------+
#
def detect_tiles(
    picture: np.ndarray, path: Path, expect: int | None
) -> tuple[np.ndarray, tuple[int, int, int], float]:
    """Find equal rectangles on a uniform ground: boxes (n, 4) in reading order, ground, confidence.

    For each of the ``likely_grounds`` every contrast in CONTRASTS turns the picture (height, width,
    3) into a mask. Of the first ground that has masks with a lattice of tiles, the mask with most
    tiles wins, of equals the most confident.
    Raises UserError, which names ``path``, when none is.
    """
    reason = ""
    for ground in likely_grounds(picture):
        difference = np.abs(picture.astype(np.int16) - np.array(ground)).max(axis=2)  # (h, w)
        candidates = []
        for contrast in CONTRASTS:
            try:
                boxes, confidence = find_tiles(difference > contrast, expect)
                boxes = without_frames(picture, boxes)
                if len(boxes) == 1 and expect != 1:
                    check_detail(picture, boxes[0])
                candidates.append((boxes, confidence))
            except ValueError as error:
                # Told is the first reason that says more than that nothing was found.
                if reason in ("", NOTHING_FOUND):
                    reason = str(error)

        if candidates:
            boxes, confidence = max(candidates, key=lambda pair: (len(pair[0]), pair[1]))
            return boxes, ground, confidence

    expected = f"equal tiles of at least {IMAGE_SIZE}x{IMAGE_SIZE} pixels, apart from each other"
    raise UserError(f"{path}: ambiguous layout ({reason}); expected {expected}, on uniform ground")


def likely_grounds(picture: np.ndarray) -> list[tuple[int, int, int]]:
    """The commonest colour of the outermost pixels, then the three commonest of all pixels."""
    rim = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])  # (n, 3)

    grounds = []
    for pixels, count in ((rim[None], 1), (picture, 3)):
        colours = Image.fromarray(pixels).getcolors(maxcolors=pixels.size)
        commonest = sorted(colours, reverse=True)[:count]
        grounds += [colour for _, colour in commonest]

    return list(dict.fromkeys(grounds))  # each once, in order


def find_tiles(mask: np.ndarray, expect: int | None) -> tuple[np.ndarray, float]:
    """Find the tiles in ``mask`` (height, width; True: differs from the ground).

    Returns boxes (n, 4) in reading order and the confidence (see ``outline_confidence``). Raises
    ValueError with the reason where this is no lattice of tiles.
    """
    # Find the rows of tiles. For the columns use the same function on the rows turned on their
    # side: (picture width, sum of the bands' heights), so the lines are now the picture's columns.
    tops, height = lattice(mask)
    bands = [mask[top : top + height] for top in tops]
    lefts, width = lattice(np.hstack([band.T for band in bands]))
    if not 2 / 3 <= width / height <= 3 / 2:
        raise ValueError(f"rectangles of {width}x{height} pixels: touching tiles?")

    cells = np.array([(x, y, x + width, y + height) for y in tops for x in lefts])  # (cells, 4)
    cells = cells[: count_tiles(mask, cells, expect)]

    # A single image is found only with ground on all sides: else it may be cut out of a figure.
    if len(tops) == len(lefts) == 1:
        left, top, right, bottom = cells[0]
        if left == 0 or top == 0 or right == mask.shape[1] or bottom == mask.shape[0]:
            raise ValueError("a single rectangle at the picture's edge")

    # Titles and ticks are small; what is as large as a tile may be one that was not recognised.
    largest = largest_part_outside(mask, cells)
    if largest > LARGEST_LETTER * min(width, height):
        raise ValueError(f"a part of {largest} pixels beside tiles of {width}x{height}")

    confidence = outline_confidence(mask, cells)
    if confidence < MIN_CONFIDENCE:
        raise ValueError(f"no straight outlines, confidence {confidence:.2f}")
    return cells, confidence


def count_tiles(mask: np.ndarray, cells: np.ndarray, expect: int | None) -> int:
    """How many cells of the lattice hold an image: all of them but empty ones at the end.

    A white image on a white ground looks like an empty cell. Raises ValueError for a hole, and
    where the count cannot be told.
    """
    filled = [mask[y0:y1, x0:x1].mean() > 0.05 for x0, y0, x1, y1 in cells]
    if not any(filled):
        raise ValueError(NOTHING_FOUND)

    count = 1 + max(k for k, full in enumerate(filled) if full)
    if not all(filled[:count]):
        raise ValueError("a hole between the tiles")
    # Two or more empty cells are taken for an unfinished row; one may also be a white image, which
    # only ``expect`` tells.
    if count == len(cells) - 1 and expect not in (count, count + 1):
        found = f"{count} or {count + 1} images: the last place is empty, or of the ground's colour"
        raise ValueError(f"{found}; --expect tells")
    return expect if expect == count + 1 == len(cells) else count


def outline_confidence(mask: np.ndarray, boxes: np.ndarray) -> float:
    """How surely the boxes are tiles, in [0, 1]: weakest side * (1 - worst moat).

    Weakest side: for each of left, right, top, bottom, the share of its pixels that differ from the
    ground, averaged over the tiles; the smallest of the four. Worst moat: the largest share, over
    the tiles, of pixels just outside the box that differ from the ground.
    """
    padded = np.pad(mask, 2)  # box (x0, y0, x1, y1) lies at (x0 + 2, y0 + 2, x1 + 2, y1 + 2)

    def edge_shares(part: np.ndarray) -> list[float]:
        return [edge.mean() for edge in (part[0], part[-1], part[:, 0], part[:, -1])]

    # Boxes may be off by a pixel: test one pixel inside each edge, and two pixels outside it.
    sides = []
    moats = []
    for x0, y0, x1, y1 in boxes:
        sides.append(edge_shares(padded[y0 + 3 : y1 + 1, x0 + 3 : x1 + 1]))
        moats.append(edge_shares(padded[y0 : y1 + 4, x0 : x1 + 4]))

    weakest_side = np.mean(sides, axis=0).min()
    worst_moat = np.mean(moats, axis=1).max()
    return float(weakest_side * (1 - worst_moat))


def largest_part_outside(mask: np.ndarray, boxes: np.ndarray) -> int:
    """The size in pixels of the largest connected part of ``mask`` beside the boxes.

    The size of a part is its shorter side, as letters that touch make a long word; at the picture's
    edge its longer one, as it may be a row of tiles that is cut off.
    """
    outside = np.pad(mask, 2)
    for x0, y0, x1, y1 in boxes:
        outside[y0 + 1 : y1 + 3, x0 + 1 : x1 + 3] = False  # with a pixel around, for rounding

    labels, _ = ndimage.label(outside, structure=np.ones((3, 3)))  # diagonal neighbours connect
    parts = ndimage.find_objects(labels)
    sizes = []
    for part in parts:
        sides = [edge.stop - edge.start for edge in part]
        at_edge = any(
            edge.start <= 2 or edge.stop >= length - 2
            for edge, length in zip(part, outside.shape, strict=True)
        )
        sizes.append(max(sides) if at_edge else min(sides))
    return max(sizes, default=0)


def lattice(mask: np.ndarray) -> tuple[list[int], int]:
    """Where the rows of tiles begin in ``mask`` (height, width), and their height.

    ::

        line    0 . . . . . . . . . . . . . . . . . . . . . .
        drawn   0 0 1 1 1 1 1 0 0 1 1 1 0 1 0 0 1 1 1 1 1 0 0
        runs        |<----->|     |<->|   |     |<----->|       lengths 5, 3, 1, 5
        places      0             1             2               fitted to the two of length 5

    A line is drawn on where half of some IMAGE_SIZE neighbouring pixels differ from the ground.
    Tiles are runs of equal length: the runs that cover most lines together. Evenly spaced places
    are fitted to them, since an image that is like the ground in its middle breaks a run in two.
    Raises ValueError when there are no such runs or they are not evenly spaced.
    """
    share = ndimage.uniform_filter1d(
        mask.astype(np.float32), size=IMAGE_SIZE, axis=1, mode="constant"
    )
    drawn = share.max(axis=1) > 0.5  # (height,)

    starts, lengths = runs_of(drawn)
    if lengths.max(initial=0) < IMAGE_SIZE:
        raise ValueError(NOTHING_FOUND)

    is_tile = most_alike(lengths)
    starts = starts[is_tile]
    side = int(np.median(lengths[is_tile]))
    if len(starts) == 1:
        return starts.tolist(), side
    return fit_places(starts, side, drawn), side


def runs_of(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The starts and lengths of the runs of True in ``drawn`` (n,), both (runs,)."""
    change = np.diff(np.pad(drawn, 1).astype(int))  # 1 where a run begins, -1 behind its end
    starts = np.flatnonzero(change == 1)
    ends = np.flatnonzero(change == -1)
    return starts, ends - starts


def most_alike(lengths: np.ndarray) -> np.ndarray:
    """Which of the runs of these lengths (runs,) are tiles: (runs,), True or False.

    They are about equally long, at least IMAGE_SIZE, and cover more lines than any other such
    group.
    """
    # alike[i, j]: run j is as long as run i, within 2 pixels or 4 %.
    tolerance = np.maximum(2, 0.04 * lengths)
    alike = np.abs(lengths[:, None] - lengths) <= tolerance  # (runs, runs)

    covered = alike.sum(axis=1) * lengths  # lines, by the runs that are like run i
    covered[lengths < IMAGE_SIZE] = 0
    return alike[covered.argmax()]


def fit_places(starts: np.ndarray, side: int, drawn: np.ndarray) -> list[int]:
    """The pixel at which each tile begins: an evenly spaced grid fitted to ``starts`` (n,), n >= 2.

    ``side`` is the length of a tile, ``drawn`` (lines,) says which lines are drawn on. The grid is
    extended as far as the picture goes, then cut to the first and last position whose tile has
    drawn lines two pixels inside both ends; positions between these are kept. Raises ValueError
    when the starts are not evenly spaced.
    """
    # A straight line through the starts: start = origin + step * number. The step is first that of
    # neighbours, on average: a pixel too few in it would be several tiles at the end of a long row.
    gaps = np.diff(starts)
    of_neighbours = gaps[gaps < 1.5 * gaps.min()].mean()
    numbers = np.rint((starts - starts[0]) / of_neighbours)
    step, origin = np.polyfit(numbers, starts, deg=1)
    deviation = np.abs(origin + step * numbers - starts).max()
    if deviation > max(2, 0.04 * side):
        raise ValueError("rows or columns of tiles at unequal distances")

    # All positions for which the picture has room, within a pixel.
    before = int((origin + 1) // step)  # tiles that fit before the first start
    last = int((len(drawn) - side - origin + 1) // step)
    positions = np.rint(origin + step * np.arange(-before, last + 1)).astype(int)
    positions = positions.clip(0, len(drawn) - side)

    # From the first to the last whose outer lines, two pixels inside, are drawn on.
    used = np.flatnonzero(drawn[positions + 2] & drawn[positions + side - 3])
    if len(used) == 0:
        raise ValueError("rows or columns of tiles at unequal distances")
    return positions[used[0] : used[-1] + 1].tolist()


def without_frames(picture: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The boxes (n, 4) less a frame that is drawn around the images.

    A frame is made of rings of one colour in all tiles, from the edge inwards, and ends where most
    of the next ring has another colour. Raises ValueError for one that hides over half a pixel.
    """
    tiles = np.stack([picture[y0:y1, x0:x1] for x0, y0, x1, y1 in boxes], axis=2).astype(int)
    height, width = tiles.shape[:2]  # (height, width, n, 3)
    pixel = min(height, width) / IMAGE_SIZE  # side of an enlarged pixel

    def share_of(ring: np.ndarray, colour: np.ndarray) -> float:
        return (np.abs(ring - colour).max(axis=1) <= FRAME_TOLERANCE).mean()

    # Ring 0 is the outermost. Where under half of a ring has the colour of the ring before, all
    # before it is frame. A digit's plain border is none, as its content comes into less than half
    # of a ring. The search ends at the first ring of mixed colours.
    frame = 0
    colour = None  # of the ring before
    for depth in range(int(3 * pixel)):  # a frame thicker than half a pixel is refused below
        inner = tiles[depth : height - depth, depth : width - depth]
        ring = np.concatenate([inner[0], inner[-1], inner[:, 0], inner[:, -1]]).reshape(-1, 3)
        if colour is not None and share_of(ring, colour) < 0.5:
            frame = depth

        colour = np.median(ring, axis=0)
        if share_of(ring, colour) < 0.85:
            break  # the image begins

    if frame > pixel / 2:
        raise ValueError(f"a frame of {frame} pixels, enlarged pixels are {pixel:.1f} wide")
    return boxes + np.array([frame, frame, -frame, -frame])


def check_detail(picture: np.ndarray, box: np.ndarray) -> None:
    """Raises ValueError for a box with more detail than an image has, as of images that touch.

    Shrunk to an image and enlarged again it is another picture.
    """
    left, top, right, bottom = box
    shown = picture[top:bottom, left:right]
    image = Image.fromarray(shrink(shown))
    again = [
        np.asarray(image.resize(shown.shape[1::-1], how)).astype(float)
        for how in (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)
    ]
    lost = min(np.abs(shown - enlarged).mean() for enlarged in again)
    spread = np.abs(shown - shown.mean()).mean()
    if lost > LARGEST_LOSS * max(spread, FLAT):
        raise ValueError("one image, or several that touch; --expect 1 if it is one")


def shrink(enlarged: np.ndarray, size: int = IMAGE_SIZE) -> np.ndarray:
    """Undo an enlargement: uint8 (h, w, 3) to (size, size, 3).

    Each pixel is the mean over about the middle half of its cell, so that edges one pixel off do
    not mix neighbours.
    """
    cell_height = enlarged.shape[0] / size
    cell_width = enlarged.shape[1] / size
    window = (odd_half(cell_height), odd_half(cell_width), 1)  # not over the channels
    smooth = ndimage.uniform_filter(enlarged.astype(float), window)

    rows = ((np.arange(size) + 0.5) * cell_height).astype(int)  # the cells' middles
    columns = ((np.arange(size) + 0.5) * cell_width).astype(int)
    return np.rint(smooth[np.ix_(rows, columns)]).astype(np.uint8)


def odd_half(length: float) -> int:
    """About half of a length, odd so that a window has a middle: 1 below 5, 3 below 9, and so on.

    It is rather too small: a window that is larger than its cell would mix neighbours.
    """
    return 2 * int((length - 1) / 4) + 1


# ------------------------------------------------------------------------------------- figures
def show_tiles(axes: Axes, images: Tensor, columns: int) -> None:
    """Draw images (N, C, H, W) uint8 in rows of ``columns``, without axes."""
    picture = tile(images, columns)
    axes.imshow(picture, interpolation="nearest", cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[], frame_on=False)


def draw_split(path: Path, grid: Grid) -> Figure:
    """The picture with its numbered boxes on the left, the tiles in reading order on the right."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)

    # The picture, and where its tiles were found.
    left.imshow(read_picture(path)[0])
    title = f"{path.name}: {len(grid.boxes)} tiles, {grid.method}"
    left.set_title(title, fontsize=10, parse_math=False)
    for number, (x0, y0, x1, y1) in enumerate(grid.boxes[:SHOWN]):
        corner = (x0 - 0.5, y0 - 0.5)  # imshow centres pixel 0 on 0
        left.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, color=BOX_COLOUR))
        left.text(x0, y0, number, color=BOX_COLOUR, fontsize=8, va="bottom")

    # The tiles as extracted.
    tiles = grid.images[:SHOWN]
    columns = max(5, math.ceil(math.sqrt(len(tiles))))
    show_tiles(right, tiles, columns)
    side = tiles.shape[-1]
    distance = side + TILE_PADDING
    for number in range(len(tiles)):
        x = (number % columns) * distance
        y = (number // columns + 0.3) * distance
        right.text(x, y, number, color=BOX_COLOUR, fontsize=8)
    right.set_title(f"tiles 0 to {len(tiles) - 1} as extracted, {side}x{side} pixels", fontsize=10)

    left.set_axis_off()
    right.set_axis_off()
    return figure


def save_figure(path: Path, draw: Callable[..., Figure], *arguments: Any, **options: Any) -> None:
    """Write the figure that ``draw`` makes of the arguments, whole or not at all.

    200 dots an inch, or fewer where that makes over 6,000 pixels. By matplotlib's own defaults:
    the user's matplotlibrc may ask for what is not installed (LaTeX). Raises UserError for a
    figure that cannot be drawn, OSError for one that cannot be written.
    """
    buffer = io.BytesIO()
    try:
        with matplotlib.rc_context(), quiet():
            matplotlib.rcdefaults()
            figure = draw(*arguments, **options)
            dpi = min(200, 6000 / max(figure.get_size_inches()))
            figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
    except Exception as error:  # whatever matplotlib does not like
        raise UserError(f"not drawn: {type(error).__name__}: {one_line(error)}") from error

    write_atomic(path, buffer.getvalue())


# ------------------------------------------------------------ printing, errors, command line
def say(text: str) -> None:
    """Print on stdout. A full disk is a note; a reader that has left (``| head``) is nothing."""
    try:
        print(text, flush=True)
    except OSError as error:
        # What Python still holds back goes nowhere: at its end it would fail again.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            note(f"not printed ({error.strerror})")


def note(text: str) -> None:
    """Print a line on stderr, where that is possible."""
    with contextlib.suppress(OSError):
        print(f"note: {one_line(text)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides warnings: Pillow's of large pictures, matplotlib's of characters its font lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def exit_codes(*mistakes: type[Exception]) -> Iterator[None]:
    """Print one line and exit 2 for a mistake of the user's, exit 130 for Ctrl-C.

    Mistakes are UserError, ``mistakes``, files that cannot be read or written, too little memory.
    """
    # Progress bars need a stderr, a terminal that cannot show "±" shows an escape.
    if sys.stderr is None:
        sys.stderr = io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    try:
        yield
    except (UserError, OSError, MemoryError, RuntimeError, *mistakes) as error:
        if isinstance(error, RuntimeError) and "allocat" not in str(error):
            raise  # a fault of this program; torch says "allocate" when memory is not enough
        print("error:", one_line(error) or "out of memory", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def one_line(message: object) -> str:
    """A message without line breaks."""
    return " ".join(str(message).split())


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage, and exit 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {one_line(message)}\n")


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options; raises UserError for those that make no sense."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "picture", type=mnist.a_path, help="a sample grid, figure or GIF (its last frame)"
    )
    parser.add_argument("--expect", type=int, metavar="N", help="exit 2 unless N images are found")
    parser.add_argument(
        "--out",
        type=mnist.a_path,
        metavar="PNG",
        help="figure to write (default: PICTURE_split.png)",
    )

    options = parser.parse_args(argv)
    if options.expect is not None and options.expect < 1:
        raise UserError(f"--expect {options.expect}: expected at least 1")
    if options.out is None:
        options.out = options.picture.parent / f"{options.picture.stem}_split.png"
    return options


def report(options: argparse.Namespace) -> None:
    """Split the picture, draw how, and print what was found."""
    path = options.picture
    out = options.out
    check_output(out, path)
    grid = split_grid(path, options.expect)

    x0, y0, x1, y1 = grid.boxes[0]
    count, channels, height, width = grid.images.shape
    red, green, blue = grid.ground
    say(f"images      {count}")
    say(f"size        {width}x{height}, {channels} channel(s), from {x1 - x0}x{y1 - y0} pixels")
    say(f"ground      #{red:02x}{green:02x}{blue:02x}")
    say(f"method      {grid.method}")
    say(f"confidence  {grid.confidence:.2f}")

    out.parent.mkdir(parents=True, exist_ok=True)
    save_figure(out, draw_split, path, grid)
    say(f"figure      {out}")
    if options.expect not in (None, count):
        raise UserError(f"{path}: {count} images, --expect {options.expect}; see {out}")


def check_output(out: Path, picture: Path) -> None:
    """Raise UserError for an --out that is no new PNG and no PNG that may be replaced."""
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the figure is a PNG; name a file that ends with .png")
    if not out.exists():
        return
    if not out.is_file() or (picture.exists() and out.samefile(picture)):
        raise UserError(f"--out {out}: is the picture itself, or no file; name another")
    with out.open("rb") as file:
        beginning = file.read(8)
    if beginning != b"\x89PNG\r\n\x1a\n":
        raise UserError(f"--out {out}: exists and is no PNG; name another")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 2 a mistake of the user's, 130 interrupted."""
    with exit_codes():
        report(parse_options(argv))


if __name__ == "__main__":
    main()
