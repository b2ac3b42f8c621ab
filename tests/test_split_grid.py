"""split_grid and debug_img.py on synthetic figures.

Exact count, tile content within the resampling error, and a refusal where the layout is ambiguous.
"""

import io
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, PngImagePlugin
from torchvision.utils import make_grid

import debug_img
from debug_img import split_grid
from quantum_diffusion_mnist import UserError, load_images, save_grid

DIGITS = load_images("digits", None)[1]
EVERY = ("digits", "tissue", "noise", "light")
FIVE = range(21, 1000, 197)


# ----------------------------------------------------------------------------------- pictures
def make(kind, n, seed=0):
    """n images (n, C, 28, 28) uint8 of a kind that is hard in its own way.

    digits: white on black, their strokes touch the edges; light: dark digits on grey; white: the
    third digit is all white; barred: but for a few pixels. tissue: smooth colours between 60 and
    220. noise: many pixels as white as the ground.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "tissue":
        small = torch.rand(n, 3, 5, 5, generator=generator)
        smooth = torch.nn.functional.interpolate(small, size=28, mode="bicubic").clamp(0, 1)
        return (60 + 160 * smooth).round().byte()
    if kind == "noise":
        noise = torch.randn(n, 1, 28, 28, generator=generator)
        return (noise * 110 + 127).clamp(0, 255).byte()

    tiles = DIGITS[torch.randperm(len(DIGITS), generator=generator)[:n]]
    if kind == "light":
        return 230 - tiles // 2
    if kind in ("white", "barred"):
        tiles[2] = 255
    if kind == "barred":
        tiles[2, :, 8:20, 10:20] = 90
    return tiles


def picture_of(image, side, resampling=Image.Resampling.NEAREST):
    """One enlarged image."""
    small = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
    return small.resize((side, side), resampling)


def figure_of(
    images,
    rows=1,
    size=(10, 2),
    dpi=100,
    ground="white",
    titles="",
    suptitle="",
    frame=0,
    **margins,
):
    """What a script saves after plt.subplots, imshow and savefig."""
    figure = Figure(figsize=size, dpi=dpi, facecolor=ground)
    ink = "white" if ground == "black" else "black"
    columns = math.ceil(len(images) / rows)
    for k, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("on" if frame else "off")
        axes.spines[:].set_linewidth(frame)
        if k < len(images):
            axes.imshow(images[k].expand(3, -1, -1).permute(1, 2, 0).numpy())
            axes.set_title(titles.format(k), color=ink, fontsize=12)

    figure.suptitle(suptitle, color=ink)
    figure.subplots_adjust(**margins)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def row(tiles, lefts, side=168, tops=(15,) * 9, size=(1000, 200)):
    """Tiles enlarged to ``side`` pixels at given places of a white picture."""
    picture = Image.new("RGB", size, "white")
    for image, left, top in zip(tiles, lefts, tops, strict=False):
        picture.paste(picture_of(image, side), (left, top))
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


def largest_error(found, expected):
    """The worst image's mean absolute difference in 8-bit levels."""
    expected = expected.expand(-1, found.shape[1], -1, -1)
    return (found.float() - expected.float()).abs().mean(dim=(1, 2, 3)).max().item()


# ---------------------------------------------------------------------------------- splitting
@pytest.mark.parametrize("layout, kind", [(k, kind) for k in LAYOUTS for kind in LAYOUTS[k][1]])
def test_figures_split_to_their_tiles(layout, kind, tmp_path):
    n, _, draw = LAYOUTS[layout]
    tiles = make(kind, n)
    draw(tiles).save(tmp_path / "figure.png")
    grid = split_grid(tmp_path / "figure.png")
    channels = 3 if kind == "tissue" else 1
    assert grid.images.shape == (n, channels, 28, 28)
    assert len(grid.boxes) == n
    assert largest_error(grid.images, tiles) < 0.01
    assert grid.method == "detected"
    assert 0.5 < grid.confidence <= (0.9 if kind == "barred" else 1)


def test_a_long_row_of_tiles_that_are_no_whole_pixels_apart():
    starts = np.rint(10 + 40.9 * np.arange(30)).astype(int)
    drawn = np.zeros(1250, dtype=bool)
    for start in starts:
        drawn[start : start + 34] = True
    places = debug_img.fit_places(starts, 34, drawn)
    assert np.abs(np.array(places) - starts).max() <= 1


@pytest.mark.parametrize("layout, kind", [("titles", "noise"), *(("published", k) for k in EVERY)])
def test_figures_under_compression_noise(layout, kind, tmp_path):
    n, _, draw = LAYOUTS[layout]
    tiles = make(kind, n)
    draw(tiles).save(tmp_path / "figure.jpg", quality=50)
    images = split_grid(tmp_path / "figure.jpg").images
    assert len(images) == n
    assert largest_error(images, tiles) < (6 if kind in ("digits", "tissue") else 20)


OWN_GRIDS = [("digits", 1), ("tissue", 5), ("noise", 23), ("digits", 64)]


@pytest.mark.parametrize("kind, n", OWN_GRIDS)
def test_own_grids_split_to_the_bit(kind, n, tmp_path):
    path = tmp_path / "samples_final.png"
    tiles = make(kind, n)
    save_grid(path, tiles)
    grid = split_grid(path)
    assert torch.equal(grid.images, tiles)
    assert grid.method == "metadata"
    assert grid.confidence == 1

    # Its boxes are where the tiles stand in the picture, enlarged.
    pixels = np.asarray(Image.open(path).convert("RGB"))
    for image, (x0, y0, x1, y1) in zip(tiles, grid.boxes, strict=True):
        scale = (x1 - x0) // 28
        shown = pixels[y0:y1:scale, x0:x1:scale]
        assert (shown == image.permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("kind, n", OWN_GRIDS[1:])
def test_own_grids_saved_by_another_program(kind, n, tmp_path):
    """Without the description: found by their look, with the same tiles and boxes."""
    path = tmp_path / "samples_final.png"
    tiles = make(kind, n)
    save_grid(path, tiles)
    described = split_grid(path)
    Image.open(path).convert("RGB").save(path)
    grid = split_grid(path)
    assert grid.method == "detected"
    assert torch.equal(grid.images, tiles)
    assert (grid.boxes == described.boxes).all()


@pytest.mark.parametrize("kind, n", OWN_GRIDS)
def test_own_grids_that_one_pixel_contradicts(kind, n, tmp_path):
    """A pixel of the ground, which holds no image."""
    path = tmp_path / "samples_final.png"
    save_grid(path, make(kind, n))
    with Image.open(path) as picture:
        text = PngImagePlugin.PngInfo()
        text.add_text("grid", picture.info["grid"])
        picture.putpixel((picture.width - 1, 0), 99)
        picture.save(path, pnginfo=text)
    with pytest.raises(UserError, match="samples_final.png: not "):
        split_grid(path)


def test_the_last_place_is_empty_or_a_white_image(tmp_path):
    """The look cannot tell which: refused, unless the number is known."""
    path = tmp_path / "grid.png"
    tiles = make("digits", 25)
    tiles[-1] = 255
    save_grid(path, tiles)
    Image.open(path).save(path)  # without the description
    found = "24 or 25 images: the last place is empty, or of the ground's colour; --expect tells"
    with pytest.raises(UserError, match=found):
        split_grid(path)
    for n in (24, 25):
        assert torch.equal(split_grid(path, expect=n).images, tiles[:n])

    # Only the last place is told by it: an unfinished row has no more white images.
    save_grid(path, tiles[:22])
    Image.open(path).save(path)
    assert len(split_grid(path).images) == len(split_grid(path, expect=25).images) == 22


def test_the_reason_is_that_of_the_contrast_that_found_more(tmp_path):
    """Pale tiles differ from the ground by less than the first contrast."""
    pale = 255 - make("tissue", 24) // 4
    save_grid(tmp_path / "pale.png", pale)
    Image.open(tmp_path / "pale.png").save(tmp_path / "pale.png")
    with pytest.raises(UserError, match="24 or 25 images: the last place is empty"):
        split_grid(tmp_path / "pale.png")
    assert len(split_grid(tmp_path / "pale.png", expect=24).images) == 24


def test_words_beside_the_tiles_are_no_tiles():
    """Letters that touch make a part that is longer than a tile; a cut off row of tiles is one."""
    picture = row(make("digits", 5), FIVE, tops=[60] * 5, size=(1000, 260))
    draw = ImageDraw.Draw(picture)
    draw.rectangle([100, 20, 400, 30], fill="black")
    assert len(debug_img.detect_tiles(np.array(picture), "picture", None)[0]) == 5
    draw.rectangle([100, 0, 400, 30], fill="black")
    with pytest.raises(UserError, match="a part of 301 pixels"):
        debug_img.detect_tiles(np.array(picture), "picture", None)


def test_a_photographs_orientation_is_heeded(tmp_path):
    upright = figure_of(make("tissue", 5))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows of the file are columns
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    turned, expected = (split_grid(tmp_path / f"{name}.png") for name in ("turned", "upright"))
    assert torch.equal(turned.images, expected.images)


@pytest.mark.parametrize("kind, n", [("digits", 16), ("tissue", 16), ("digits", 64)])
def test_images_that_touch_are_not_one_image(kind, n, tmp_path):
    """A square of them, as torchvision's make_grid and imshow draw it, inside a margin."""
    picture = make_grid(make(kind, n), math.isqrt(n))
    figure_of(picture[None], size=(6, 6)).save(tmp_path / "figure.png")
    with pytest.raises(UserError, match="one image, or several that touch; --expect 1"):
        split_grid(tmp_path / "figure.png")
    assert len(split_grid(tmp_path / "figure.png", expect=1).images) == 1


def test_a_flat_image_is_one_image_after_compression(tmp_path):
    flat = (200 + 5 * torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))).byte()
    figure_of(flat, size=(3, 3)).save(tmp_path / "figure.jpg", quality=60)
    assert len(split_grid(tmp_path / "figure.jpg").images) == 1


def beside_a_curve(n):
    """n digits in a row, and a curve."""
    picture = row(make("digits", n), FIVE)
    ImageDraw.Draw(picture).line([(640, 15), (760, 150), (970, 170)], "black")
    return picture


def too_small():
    """Tiles of 20 pixels."""
    return row(make("digits", 5), range(10, 160, 30), side=20, tops=[10] * 5, size=(170, 40))


def last_row_centred():
    """Four tiles and below them three, each between two of the row above."""
    lefts = [20, 140, 260, 380, 80, 200, 320]
    tops = [10] * 4 + [130] * 3
    return row(make("digits", 7), lefts, side=100, tops=tops, size=(520, 240))


def crops():
    """Single enlarged images, which are no crops of themselves."""
    pictures = []
    for kind in EVERY:
        for resampling in (Image.Resampling.NEAREST, Image.Resampling.BICUBIC):
            for k, image in enumerate(make(kind, 4)):
                side = 300 if k % 2 else 140
                pictures.append(picture_of(image, side, resampling))
    return pictures


AMBIGUOUS = {  # pictures, of each of which the error says why
    "touching tiles": lambda: [
        row(255 - make("digits", 5), FIVE),
        row(make("digits", 5), range(20, 860, 168)),
        row(make("digits", 4), [20, 188, 420, 640]),
    ],
    "a hole between the tiles": lambda: [
        row(make("digits", 4), [*FIVE[:2], *FIVE[3:]]),
        row(make("white", 5), FIVE),
    ],
    "no solid rectangles": lambda: [too_small(), row([], [])],
    "a part of": lambda: [
        last_row_centred(),
        beside_a_curve(3),
        figure_of(make("digits", 5), ground="black"),
        figure_of(make("white", 5), ground="black"),
    ],
    "a frame of": lambda: [figure_of(make(kind, 5), frame=4) for kind in ("tissue", "noise")],
    "": crops,
}


@pytest.mark.parametrize("reason", AMBIGUOUS)
def test_ambiguous_layouts_are_refused(reason):
    for picture in AMBIGUOUS[reason]():
        with pytest.raises(UserError, match=f"ambiguous layout.*{reason}"):
            debug_img.detect_tiles(np.array(picture), "picture", None)


# ------------------------------------------------------------------------------- command line
def test_debug_img_reports_what_it_found(tmp_path, capsys):
    path = tmp_path / "figure.png"
    figure_of(make("digits", 5), titles="Sample {}").save(path)
    debug_img.main([str(path), "--expect", "5"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["images"] == "5"
    assert lines["ground"] == "#ffffff"
    assert lines["method"] == "detected"
    assert lines["size"].startswith("28x28, 1 channel")
    assert 0.8 < float(lines["confidence"]) <= 1

    # The boxes' colour is in the figure.
    with Image.open(tmp_path / "figure_split.png") as drawn:
        colours = np.asarray(drawn.convert("RGB")).astype(int)
    distance = np.abs(colours - (0xD5, 0x5E, 0x00)).max(axis=2)
    assert (distance < 10).sum() > 500


@pytest.mark.filterwarnings("error")
def test_warnings_of_libraries_are_not_shown(tmp_path):
    """Of characters that a font lacks, and Pillow's of a picture that is refused for its size."""
    figure_of(make("digits", 5)).save(tmp_path / "漢字.png")
    debug_img.main([str(tmp_path / "漢字.png")])
    assert (tmp_path / "漢字_split.png").exists()

    Image.new("1", (10_000, 9_000)).save(tmp_path / "huge.png")
    with pytest.raises(UserError, match="over 50000000 pixels"):
        split_grid(tmp_path / "huge.png")


def test_debug_img_mistakes(tmp_path, capsys):
    path = tmp_path / "figure.png"
    figure_of(make("digits", 5), titles="Sample {}").save(path)
    Image.new("1", (10_000, 5_001)).save(tmp_path / "huge.png")
    (tmp_path / "link.png").symlink_to(path)
    (tmp_path / "thesis.tex").write_text("three years")
    (tmp_path / "thesis.png").write_text("three years")
    before = path.read_bytes()
    other = tmp_path / "new" / "a$b$.png"
    for message, *arguments in (
        ("5 images, --expect 4", path, "--expect", 4, "--out", other),
        ("is the picture itself", path, "--out", tmp_path / "link.png"),
        ("--expect 0: expected at least 1", path, "--expect", 0),
        ("--expect", path, "--expect", "five"),
        ("huge.png: not a readable picture", tmp_path / "huge.png"),
        ("none.png: not a readable picture", tmp_path / "none.png"),
        ("Not a directory", path, "--out", path / "below" / "figure.png"),
        ("name a file that ends with .png", path, "--out", tmp_path / "thesis.tex"),
        ("exists and is no PNG", path, "--out", tmp_path / "thesis.png"),
    ):
        with pytest.raises(SystemExit) as stop:
            debug_img.main([*map(str, arguments)])
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert line.startswith("error: ")
        assert message in line, line
    assert path.read_bytes() == before
    assert other.exists()
    assert (tmp_path / "thesis.tex").read_text() == "three years"
    assert (tmp_path / "thesis.png").read_text() == "three years"
