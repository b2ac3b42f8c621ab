"""Grids and animations."""

import json

import pytest
import torch
from PIL import Image

import quantum_diffusion_mnist as qd
from debug_img import split_grid


def noise_images(n, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, 28, 28), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("n, channels", [(1, 3), (5, 1), (7, 3), (130, 1)])
def test_grid_to_png_and_back_to_the_bit(tmp_path, n, channels):
    """And every pixel of the last tile stands where the description says."""
    images = noise_images(n, channels)
    qd.save_grid(tmp_path / "grid.png", images)
    assert torch.equal(qd.load_grid(tmp_path / "grid.png"), images)
    with Image.open(tmp_path / "grid.png") as file:
        grid, picture = json.loads(file.text["grid"]), file.convert("RGB")
    step, scale = grid["tile_width"] + grid["padding"], grid["scale"]
    row, column = divmod(n - 1, grid["columns"])
    x, y = ((grid["padding"] + place * step + 9) * scale for place in (column, row))
    assert grid["count"] == n and grid["value_range"] == [-1.0, 1.0]
    for corner in ((x, y), (x + scale - 1, y + scale - 1)):
        assert picture.getpixel(corner) == tuple(images[-1].expand(3, -1, -1)[:, 9, 9].tolist())


def test_animations_are_small_and_keep_their_last_frame(tmp_path):
    """Thirty frames of digits are all kept; noise, which nothing compresses, loses frames."""
    _, digits, _ = qd.load_images("digits", tmp_path)
    for images, n_frames in (([digits[k : k + 5] for k in range(29)], 30),
                             ([noise_images(5, 3, k) for k in range(11)], 6)):  # fmt: skip
        frames = [*images, digits[-5:].expand_as(images[0])]
        qd.save_gif(tmp_path / "a.gif", [(f"step {k}", x) for k, x in enumerate(frames)])
        assert (tmp_path / "a.gif").stat().st_size < 400_000
        with Image.open(tmp_path / "a.gif") as animation:
            assert n_frames <= animation.n_frames and animation.width >= 5 * 28
        last = split_grid(tmp_path / "a.gif").images  # of 64 colours
        assert (last.float() - digits[-5:]).abs().mean() < 4
