"""Grids, animations, curves and drawn circuits."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import quantum_diffusion_mnist as qd


def noise_images(n, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, 28, 28), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("n, channels", [(1, 3), (5, 1), (7, 3), (130, 1)])
def test_grid_to_png_and_back_to_the_bit(tmp_path, n, channels):
    images = noise_images(n, channels)
    path = tmp_path / "grid.png"
    qd.save_grid(path, images, run="of this run")
    assert torch.equal(qd.load_grid(path), images)
    grid = qd.grid_description(path)
    assert grid["count"] == n
    assert grid["value_range"] == [-1.0, 1.0]
    assert grid["run"] == "of this run"

    # Pixel (9, 9) of the last tile stands where the description says.
    with Image.open(path) as file:
        assert json.loads(file.text["grid"]) == grid
        picture = file.convert("RGB")
    row, column = divmod(n - 1, grid["columns"])
    step = grid["tile_width"] + grid["padding"]
    scale = grid["scale"]
    x = (grid["padding"] + column * step + 9) * scale
    y = (grid["padding"] + row * step + 9) * scale
    expected = tuple(images[-1].expand(3, -1, -1)[:, 9, 9].tolist())
    assert picture.getpixel((x, y)) == expected
    assert picture.getpixel((x + scale - 1, y + scale - 1)) == expected
    assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_a_grid_with_other_pixels_is_refused(tmp_path):
    path = tmp_path / "grid.png"
    qd.save_grid(path, noise_images(3, 1))
    with Image.open(path) as file:
        text = file.text["grid"]
        pixels = np.array(file)

    # One pixel of an enlarged one, one of the white between the tiles, the picture at half size.
    one = pixels.copy()
    one[40, 40] ^= 1
    between = pixels.copy()
    between[0, 0] = 0
    for wrong in (one, between, pixels[::2, ::2]):
        information = qd.PngImagePlugin.PngInfo()
        information.add_text("grid", text)
        Image.fromarray(wrong).save(path, pnginfo=information)
        with pytest.raises(qd.UserError, match="grid.png: not a sample grid of this project"):
            qd.load_grid(path)


def test_animations_have_every_frame_with_its_caption(tmp_path):
    _, digits, _ = qd.load_images("digits", tmp_path)
    frames = [(f"step {k}", digits[k : k + 5]) for k in range(29)]
    frames.append(("step 30", digits[28:33]))  # only the caption is new
    qd.save_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 30
        assert animation.info["loop"] == 0
        durations = []
        for k in range(30):
            animation.seek(k)
            durations.append(animation.info["duration"])
        last = torch.from_numpy(np.array(animation.convert("L")))
    assert durations == [200] * 29 + [2000]

    # The last five digits, of 64 colours, three pixels a pixel, below the caption.
    tiles = last[21 + 6 :: 3, 6::3][:28, : 5 * 30].unflatten(1, (5, 30))[:, :, :28]
    assert (tiles.permute(1, 0, 2) - digits[28:33, 0].float()).abs().mean() < 4
    assert (last[:21] < 100).any()


def test_a_caption_wider_than_the_images_is_not_cut(tmp_path):
    _, digits, _ = qd.load_images("digits", tmp_path)
    caption = "step 1250  quantum_mnist3_nall_seed0_shots1000"
    qd.save_gif(tmp_path / "a.gif", [("step 1", digits[:1]), (caption, digits[1:2])])
    with Image.open(tmp_path / "a.gif") as animation:
        animation.seek(1)
        last = np.array(animation.convert("L"))
    columns = (last[:21] < 100).any(axis=0).nonzero()[0]
    assert 300 < columns.max() < last.shape[1] - 1


def test_loss_curve_shows_every_step_and_the_mean_of_a_hundredth():
    losses = torch.linspace(2, 1, 400)
    figure = qd.draw_loss_curve(losses, "a run")
    (axes,) = figure.axes
    each, mean = axes.lines
    assert each.get_xdata().tolist() == list(range(1, 401))
    assert np.allclose(each.get_ydata(), losses)
    assert mean.get_xdata()[:2].tolist() == [2.5, 3.5]
    assert np.allclose(mean.get_ydata()[0], losses[:4].mean())
    assert axes.get_title() == "a run"
    assert axes.get_yscale() == "log"


def test_circuits_of_any_size_are_drawn():
    drawing = qd.draw_circuit(qd.product_circuit, 100, 9, 2)
    with Image.open(io.BytesIO(drawing)) as picture:
        assert max(picture.size) <= 6100
        pixels = np.array(picture.convert("L"))
    assert (pixels < 100).mean() > 0.001
    assert qd.draw_circuit(qd.product_circuit, 100, 9, 2) is drawing  # kept
    assert qd.draw_circuit(qd.cz_circuit, 3, 1, 2) != qd.draw_circuit(qd.quantum_circuit, 3, 1, 2)


def test_animations_of_several_classes_have_a_row_for_each(tmp_path):
    _, digits, _ = qd.load_images("digits", tmp_path)
    names = ("three", "eight")
    qd.save_gif(tmp_path / "a.gif", [("step 1", digits[:24])], names)
    with Image.open(tmp_path / "a.gif") as animation:
        picture = torch.from_numpy(np.array(animation.convert("L")))

    # Ten images of each class, two pixels a pixel, below the caption and right of the names.
    font = ImageFont.load_default(10)
    top, left = 14, 5 + math.ceil(max(map(font.getlength, names)))
    assert picture.shape == (top + 2 * (2 * 30 + 2), left + 2 * (10 * 30 + 2))
    tiles = picture[top + 4 :: 2, left + 4 :: 2][:58].unflatten(1, (-1, 30))[:, :10, :28]
    for row, first in enumerate((0, 12)):
        shown = tiles[30 * row : 30 * row + 28].permute(1, 0, 2)
        assert (shown - digits[first : first + 10, 0].float()).abs().mean() < 4
    assert (picture[top:, 1 : left - 4] < 100).any()
    assert (picture[:, 0] > 200).all()  # no name is cut off


def test_names_of_one_letter_are_not_cut_off(tmp_path):
    _, digits, _ = qd.load_images("digits", tmp_path)
    qd.save_gif(tmp_path / "a.gif", [("step 1", digits[:24])], ("3", "8"))
    with Image.open(tmp_path / "a.gif") as animation:
        picture = np.array(animation.convert("L"))
    names = picture[14:, :11] < 128
    assert not names[:, [0, 10]].any()
    assert names.any(axis=0).sum() >= 4  # columns of ink
