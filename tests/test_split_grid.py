"""split_grid and debug_img.py on synthetic figures: exact count, tile content within the resampling
error, and a refusal where the layout is ambiguous."""

import io
import itertools

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, PngImagePlugin

import debug_img
from debug_img import split_grid
from quantum_diffusion_mnist import UserError, load_images, save_grid

DIGITS = load_images("digits", None)[1]
EVERY = ("digits", "tissue", "noise", "light")
FIVE = range(21, 1000, 197)


def make(kind, n, seed=0):
    """n images: white digits on black, whose strokes touch the edges (light: dark digits on grey;
    white: the third is all white; barred: but for a few pixels), smooth colours between 60 and 220
    as in stained tissue, or noise with many pixels as white as the ground."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "tissue":
        small = torch.rand(n, 3, 5, 5, generator=generator)
        smooth = torch.nn.functional.interpolate(small, size=28, mode="bicubic").clamp(0, 1)
        return (60 + 160 * smooth).round().byte()
    if kind == "noise":
        noise = torch.randn(n, 1, 28, 28, generator=generator)
        return (noise * 110 + 127).clamp(0, 255).byte()
    tiles = DIGITS[torch.randperm(len(DIGITS), generator=generator)[:n]]
    if kind in ("white", "barred"):
        tiles[2], tiles[2, :, 8:20, 10:20] = 255, 90 if kind == "barred" else 255
    return 230 - tiles // 2 if kind == "light" else tiles


def picture_of(image, side, resampling=Image.Resampling.NEAREST):
    """One enlarged image."""
    small = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
    return small.resize((side, side), resampling)


def figure_of(images, rows=1, size=(10, 2), dpi=100, ground="white", titles="", suptitle="",
              frame=0, **margins):  # fmt: skip
    """What a script saves after plt.subplots, imshow and savefig."""
    figure = Figure(figsize=size, dpi=dpi, facecolor=ground)
    ink = "white" if ground == "black" else "black"
    for k, axes in enumerate(figure.subplots(rows, -(-len(images) // rows), squeeze=False).flat):
        axes.axis("on" if frame else "off")
        axes.spines[:].set_linewidth(frame)
        if k < len(images):
            axes.imshow(images[k].expand(3, -1, -1).permute(1, 2, 0).numpy())
            axes.set_title(titles.format(k), color=ink, fontsize=12)
    figure.suptitle(suptitle, color=ink)
    figure.subplots_adjust(**margins)
    figure.savefig(buffer := io.BytesIO(), format="png")
    return Image.open(buffer).convert("RGB")


def row(tiles, lefts, side=168, tops=(15,) * 9, size=(1000, 200)):
    """Tiles enlarged to ``side`` pixels at given places of a white picture."""
    picture = Image.new("RGB", size, "white")
    for image, *place in zip(tiles, lefts, tops, strict=False):
        picture.paste(picture_of(image, side), place)
    return picture


LAYOUTS = {  # number of images, of which kinds, how they are drawn
    "published": (5, (*EVERY, "barred"), lambda x: row(x, FIVE, 170)),
    "no_margin": (5, ["digits"], lambda x: row(x, range(0, 700, 140), 120, [0] * 5, (680, 120))),
    "small_gap": (8, EVERY, lambda x: row(x, range(2, 460, 58), 56, [2] * 8, (466, 60))),
    "titles": (5, ["noise"], lambda x: figure_of(x, titles="Sample {}")),
    "suptitle": (5, ["noise"], lambda x: figure_of(x, size=(10, 3), suptitle="HIIIH, epoch 30")),
    "framed": (5, ["digits", "tissue"], lambda x: figure_of(x, frame=0.8)),
    "black_ground": (5, ["light"], lambda x: figure_of(x, ground="black", titles="{}")),
    "grey_ground": (5, ["digits"], lambda x: figure_of(x, ground="#9a9a9a", suptitle="Made")),
    "last_row_short": (13, ["noise"], lambda x: figure_of(x, 3, (9, 6), suptitle="Samples")),
    "column": (3, ["noise"], lambda x: figure_of(x, 3, (2, 6), titles="sample {}")),
    "uneven": (5, ["noise"], lambda x: figure_of(x, left=0.02, right=0.8, top=0.95, bottom=0.3)),
    "high_dpi": (4, ["noise"], lambda x: figure_of(x, size=(8, 2.4), dpi=230, titles="epoch {}")),
    "single": (1, ["digits", "noise"], lambda x: figure_of(x, size=(3, 3), titles="epoch 3")),
}


def error(found, expected):
    """Mean absolute difference in 8-bit levels."""
    expected = expected.expand(-1, found.shape[1], -1, -1)
    return (found.float() - expected.float()).abs().mean(dim=(1, 2, 3)).max().item()


@pytest.mark.parametrize("layout, kind", [(k, kind) for k in LAYOUTS for kind in LAYOUTS[k][1]])
def test_figures_split_to_their_tiles(layout, kind, tmp_path):
    n, _, draw = LAYOUTS[layout]
    tiles = make(kind, n)
    picture = draw(tiles)
    picture.save(tmp_path / "figure.png")
    grid = split_grid(tmp_path / "figure.png")
    assert grid.images.shape == (n, 3 if kind == "tissue" else 1, 28, 28) and len(grid.boxes) == n
    assert error(grid.images, tiles) < 0.01
    assert grid.method == "detected" and 0.5 < grid.confidence <= (0.9 if kind == "barred" else 1)
    if layout in ("published", "titles"):  # compression noise
        picture.save(tmp_path / "figure.jpg", quality=50)
        found = split_grid(tmp_path / "figure.jpg").images
        assert len(found) == n and error(found, tiles) < (6 if kind in ("digits", "tissue") else 20)


@pytest.mark.parametrize("kind, n", [("digits", 1), ("tissue", 5), ("noise", 23), ("digits", 64)])
def test_own_grids_split_to_the_bit(kind, n, tmp_path):
    path, tiles = tmp_path / "samples_final.png", make(kind, n)
    save_grid(path, tiles)
    grid, own = split_grid(path), Image.open(path).copy()
    assert torch.equal(grid.images, tiles) and (grid.method, grid.confidence) == ("metadata", 1)
    if n > 1:  # saved again by another program: found by its look, with the same tiles
        Image.open(path).convert("RGB").save(path)
        again = split_grid(path)
        assert again.method == "detected" and torch.equal(again.images, tiles)
        assert (again.boxes == grid.boxes).all()
    text = PngImagePlugin.PngInfo()  # with a description that one pixel of the ground contradicts
    text.add_text("grid", own.info["grid"])
    own.putpixel((own.width - 1, 0), 99)
    own.save(path, pnginfo=text)
    with pytest.raises(UserError, match="samples_final.png: not the grid that it describes"):
        split_grid(path)


def test_the_last_place_is_empty_or_a_white_image(tmp_path):
    """The look cannot tell which: refused, unless the number is known."""
    tiles, path = make("digits", 25), tmp_path / "grid.png"
    tiles[-1] = 255
    save_grid(path, tiles)
    Image.open(path).save(path)
    with pytest.raises(UserError, match="24 or 25 images: the last place is empty, or white"):
        split_grid(path)
    for n in (24, 25):
        assert torch.equal(split_grid(path, expect=n).images, tiles[:n])


def beside_a_curve(n):
    """n digits in a row, and a curve."""
    picture = row(make("digits", n), FIVE)
    ImageDraw.Draw(picture).line([(640, 15), (760, 150), (970, 170)], "black")
    return picture


SMALL = range(10, 160, 30), 20, [10] * 5, (170, 40)
RESAMPLING = Image.Resampling.NEAREST, Image.Resampling.BICUBIC
CENTRED = [20, 140, 260, 380, 80, 200, 320], 100, [10] * 4 + [130] * 3, (520, 240)
AMBIGUOUS = {  # pictures, of each of which the error says why
    "touching tiles": lambda: [
        *(row(255 - make("digits", 5), FIVE), row(make("digits", 5), range(20, 860, 168))),
        row(make("digits", 4), [20, 188, 420, 640]),
    ],
    "a hole between the tiles": lambda: [
        row(make("digits", 4), [*FIVE[:2], *FIVE[3:]]),
        row(make("white", 5), FIVE),
    ],
    "no solid rectangles": lambda: [row(make("digits", 5), *SMALL), row([], [])],
    "a part of": lambda: [
        *(row(make("digits", 7), *CENTRED), beside_a_curve(3)),
        *(figure_of(make(kind, 5), ground="black") for kind in ("digits", "white")),
    ],
    "a frame of": lambda: [figure_of(make(k, 5), frame=4) for k in ("tissue", "noise")],
    "": lambda: [  # a single enlarged image is no crop of itself
        picture_of(image, (140, 300)[k % 2], how)
        for kind, how in itertools.product(EVERY, RESAMPLING)
        for k, image in enumerate(make(kind, 4))
    ],
}


@pytest.mark.parametrize("reason", AMBIGUOUS)
def test_ambiguous_layouts_are_refused(reason):
    for picture in AMBIGUOUS[reason]():
        with pytest.raises(UserError, match=f"ambiguous layout.*{reason}"):
            debug_img.detect_tiles(np.array(picture), "picture", None)


def test_debug_img_reports_and_checks_the_count(tmp_path, capsys):
    path, other = tmp_path / "figure.png", tmp_path / "new" / "a$b$\udcff.png"
    figure_of(make("digits", 5), titles="Sample {}").save(path)
    debug_img.main([str(path), "--expect", "5"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    expected = {"images": "5", "ground": "#ffffff", "method": "detected"}
    assert expected.items() <= lines.items() and 0.8 < float(lines["confidence"]) <= 1
    assert lines["size"].startswith("28x28, 1 channel")
    with Image.open(tmp_path / "figure_split.png") as drawn:
        colours = np.asarray(drawn.convert("RGB")).reshape(-1, 3)
    assert (np.abs(colours.astype(int) - (0xD5, 0x5E, 0x00)).max(axis=1) < 10).sum() > 500
    before = path.read_bytes()
    Image.new("1", (10_000, 5_001)).save(tmp_path / "huge.png")
    (tmp_path / "link.png").symlink_to(path)
    for message, *arguments in (
        ("5 images, --expect 4", path, "--expect", 4, "--out", other),
        ("is the picture itself", path, "--out", tmp_path / "link.png"),
        ("--expect", path, "--expect", 0),
        ("huge.png: not a readable picture", tmp_path / "huge.png"),
        ("File exists", path, "--out", path / "below.png"),
    ):
        with pytest.raises(SystemExit) as stop:
            debug_img.main([*map(str, arguments)])
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith("error: ") and message in line, line
    assert path.read_bytes() == before and other.exists()
