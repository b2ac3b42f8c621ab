"""Grids, animations and figures."""

import json

import pytest
import torch
from PIL import Image

import quantum_diffusion_mnist as qd


def noise_images(n, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, 28, 28), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [1, 5, 7, 130])
def test_grid_to_png_and_back_to_the_bit(tmp_path, n, channels):
    images = noise_images(n, channels)
    qd.save_grid(tmp_path / "grid.png", images)
    assert torch.equal(qd.load_grid(tmp_path / "grid.png"), images)
    assert [f.name for f in tmp_path.iterdir()] == ["grid.png"]


def test_grid_layout_follows_its_description(tmp_path):
    images = noise_images(7, 3)
    qd.save_grid(tmp_path / "grid.png", images)
    with Image.open(tmp_path / "grid.png") as picture:
        grid = json.loads(picture.text["grid"])
        assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (255, 255, 255)
        step, scale = grid["tile_width"] + grid["padding"], grid["scale"]
        column, row = 6 % grid["columns"], 6 // grid["columns"]
        x = (grid["padding"] + column * step + 9) * scale
        y = (grid["padding"] + row * step + 4) * scale
        assert scale >= 2 and grid["count"] == 7 and grid["value_range"] == [-1.0, 1.0]
        for corner in ((x, y), (x + scale - 1, y + scale - 1)):
            assert picture.getpixel(corner) == tuple(images[6, :, 4, 9].tolist())


def test_value_range_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(qd.to_uint8(qd.to_float(levels)), levels)
    assert qd.to_float(levels).aminmax() == (-1, 1)
    assert qd.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_foreign_and_truncated_pictures_are_refused(tmp_path):
    path = tmp_path / "grid.png"
    qd.save_grid(path, noise_images(5, 1))
    whole = path.read_bytes()
    Image.new("L", (60, 60)).save(tmp_path / "foreign.png")
    path.write_bytes(whole[: len(whole) // 2])
    for name in ("grid.png", "foreign.png", "missing.png"):
        with pytest.raises(qd.UserError, match=name):
            qd.load_grid(tmp_path / name)


@pytest.mark.parametrize("n, frames", [(5, 12)])
def test_animation_of_noise_stays_small_and_keeps_its_last_frame(tmp_path, n, frames):
    pictures = [(f"step {k}", noise_images(n, 3, seed=k)) for k in range(frames - 1)]
    pictures.append(("last", torch.zeros(n, 3, 28, 28, dtype=torch.uint8)))
    qd.save_gif(tmp_path / "a.gif", pictures)
    assert (tmp_path / "a.gif").stat().st_size < 400_000
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames > 5
        animation.seek(animation.n_frames - 1)
        last = animation.convert("L")
        assert last.getpixel((10, last.height - 10)) == 0  # the black frame is shown last


def test_animation_of_thirty_frames_keeps_them_all(tmp_path):
    _, images, _ = qd.load_images("digits", tmp_path)
    qd.save_gif(tmp_path / "a.gif", [(f"step {k}", images[k : k + 5]) for k in range(30)])
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 30 and animation.width >= 2 * 5 * 28


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    qd.write_atomic(path, "old")

    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")  # names no file, as write() does

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device.*/file"):
        qd.write_atomic(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
