"""Shows how a picture is split into images: its boxes, numbered, beside the extracted tiles.

    python debug_img.py runs/quantum_mnist3_nall_seed0/samples_final.png
    python debug_img.py figure.png --expect 5          # exits 2 when the count differs

Prints count, size, ground colour, method (metadata: exact; detected: by the look) and confidence.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cal_fid_ssim import Grid, read_picture, show_tiles, split_grid
from quantum_diffusion_mnist import TILE_PADDING, UserError, save_figure

SHOWN = 100  # tiles at most beside the picture
BOX_COLOUR = "#D55E00"


def draw_split(path: Path, grid: Grid) -> Figure:
    """The picture with its numbered boxes on the left, the tiles in reading order on the right."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(read_picture(path)[0])
    left.set_title(f"{path.name}: {len(grid.boxes)} tiles, {grid.method}", fontsize=10)
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake prints one line and exits 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path, help="a sample grid, figure or GIF (its last frame)")
    parser.add_argument("--expect", type=int, metavar="N", help="exit 2 unless N images are found")
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="figure to write (default: PICTURE_split.png)"
    )
    options = parser.parse_args(argv)
    path = options.picture
    out = options.out or path.with_name(f"{path.stem}_split.png")
    try:
        grid = split_grid(path)
        x0, y0, x1, y1 = grid.boxes[0]
        channels, height, width = grid.images.shape[1:]
        print(f"images      {len(grid.images)}")
        print(
            f"size        {width}x{height}, {channels} channel(s), from {x1 - x0}x{y1 - y0} pixels"
        )
        print("ground      #{:02x}{:02x}{:02x}".format(*grid.ground))
        print(f"method      {grid.method}")
        print(f"confidence  {grid.confidence:.2f}")
        save_figure(out, draw_split(path, grid))
        print(f"figure      {out}")
        if options.expect not in (None, len(grid.images)):
            raise UserError(
                f"{path}: {len(grid.images)} images, --expect {options.expect}; see {out}"
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
