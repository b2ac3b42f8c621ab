"""split_grid and debug_img.py on synthetic figures: exact count, tile content within the resampling
error, and a refusal where the layout is ambiguous."""

import io
import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, PngImagePlugin

import debug_img
from debug_img import resample, split_grid
from quantum_diffusion_mnist import UserError, load_images, save_gif, save_grid, tile


def digit_tiles(n, seed=0):
    """White digits on black, the strokes touching the tiles' edges."""
    images = load_images("digits", None)[1]
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n]
    return images[chosen]


def tissue_tiles(n, seed=0):
    """Smooth colours between 60 and 220, as in stained tissue."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(n, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(small, size=28, mode="bicubic").clamp(0, 1)
    return (60 + 160 * smooth).round().byte()


def noise_tiles(n, seed=0):
    """An untrained model's samples: many pixels are as white as the ground."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 1, 28, 28, generator=generator) * 110 + 127).clamp(0, 255).byte()


def light_tiles(n, seed=0):
    """Dark digits on light grey, on a white ground."""
    return 230 - digit_tiles(n, seed) // 2


TILES = {"digits": digit_tiles, "tissue": tissue_tiles, "noise": noise_tiles, "light": light_tiles}


def matplotlib_figure(
    images, rows=1, size=(10, 2), dpi=100, ground="white", titles=None, suptitle=None,
    frame=False, fontsize=10, **margins,
):  # fmt: skip
    """What a script saves after plt.subplots, imshow and savefig."""
    columns = -(-len(images) // rows)
    figure = Figure(figsize=size, dpi=dpi, facecolor=ground)
    ink = "white" if ground in ("black", "#202020") else "black"
    for k, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if k < len(images):
            axes.imshow(images[k].expand(3, -1, -1).permute(1, 2, 0).numpy())
            if titles:
                axes.set_title(titles.format(k), color=ink, fontsize=fontsize)
            if frame:
                axes.axis("on")
    if suptitle:
        figure.suptitle(suptitle, color=ink)
    if margins:
        figure.subplots_adjust(**margins)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=ground)
    return Image.open(buffer).convert("RGB")


def pasted(images, places, side, ground="white", size=(1000, 200)):
    """Tiles enlarged to ``side`` pixels (nearest) at given places."""
    picture = Image.new("RGB", size, ground)
    for image, place in zip(images, places, strict=True):
        tile = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
        picture.paste(tile.resize((side, side), Image.Resampling.NEAREST), place)
    return picture


FIVE = [(21 + 197 * k, 15) for k in range(5)]
LAYOUTS = {
    "published": lambda x: pasted(x(5), FIVE, 170),
    "published_151": lambda x: pasted(x(5), [(30 + 190 * k, 24) for k in range(5)], 151),
    "plain": lambda x: matplotlib_figure(x(5)),
    "titles": lambda x: matplotlib_figure(x(5), titles="Sample {}"),
    "large_title": lambda x: matplotlib_figure(x(5), size=(10, 3), titles="No. {}", fontsize=24),
    "suptitle": lambda x: matplotlib_figure(
        x(5), size=(10, 3), suptitle="Generated HIIIH, epoch 30"
    ),
    "framed": lambda x: matplotlib_figure(x(5), frame=True),
    "black_ground": lambda x: matplotlib_figure(255 - x(5) // 2, ground="black", titles="{}"),
    "grey_ground": lambda x: matplotlib_figure(x(5), ground="#9a9a9a", suptitle="Generated"),
    "blue_ground": lambda x: matplotlib_figure(x(4), ground="#2030d0", size=(8, 2.2)),
    "rows": lambda x: matplotlib_figure(x(15), 3, (9, 6), titles="{}", suptitle="Samples"),
    "last_row_short": lambda x: matplotlib_figure(x(13), 3, (9, 6), suptitle="Samples"),
    "column": lambda x: matplotlib_figure(x(3), 3, (2, 6), titles="sample {}"),
    "uneven": lambda x: matplotlib_figure(x(5), left=0.02, right=0.8, top=0.95, bottom=0.3),
    "no_margin": lambda x: pasted(x(5), [(140 * k, 0) for k in range(5)], 120, size=(680, 120)),
    "small_gap": lambda x: pasted(x(8), [(2 + 58 * k, 2) for k in range(8)], 56, size=(466, 60)),
    "high_dpi": lambda x: matplotlib_figure(x(4), size=(8, 2.4), dpi=230, titles="epoch {}"),
    "single": lambda x: matplotlib_figure(x(1), size=(3, 3), titles="epoch 3"),
}
SLOW = ("titles", "suptitle", "high_dpi", "last_row_short", "published_151", "blue_ground")
SLOW += ("rows", "column", "uneven", "large_title", "plain", "black_ground")
FIGURES = [
    (layout, tiles)
    for layout in LAYOUTS
    for tiles in (["noise"] if layout in SLOW else TILES)
    if not (layout == "grey_ground" and tiles != "digits")  # grey tiles melt into grey
    if not (layout == "no_margin" and tiles != "digits")  # no ground at the rim
]


COUNTS = {"rows": 15, "last_row_short": 13, "column": 3, "small_gap": 8, "single": 1}
COUNTS |= {"blue_ground": 4, "high_dpi": 4}


def expected_tiles(layout, kind):
    tiles = TILES[kind](COUNTS.get(layout, 5))
    return 255 - tiles // 2 if layout == "black_ground" else tiles


def error(found, expected):
    """Mean absolute difference in 8-bit levels."""
    if found.shape[1] != expected.shape[1]:
        expected = expected.expand(-1, 3, -1, -1)
    return (found.float() - expected.float()).abs().mean(dim=(1, 2, 3)).max().item()


@pytest.mark.parametrize("layout, kind", FIGURES)
def test_figures_split_to_their_tiles(layout, kind, tmp_path):
    path = tmp_path / "figure.png"
    LAYOUTS[layout](TILES[kind]).save(path)
    grid = split_grid(path)
    expected = expected_tiles(layout, kind)
    assert grid.images.shape == (len(expected), 3 if kind == "tissue" else 1, 28, 28)
    assert error(grid.images, expected) < (2 if layout == "framed" else 0.6)
    assert grid.method == "detected" and 0.5 < grid.confidence <= 1
    assert len(grid.boxes) == len(expected)


@pytest.mark.parametrize("layout, kind", [("published", "digits"), ("titles", "tissue")])
def test_compression_noise(layout, kind, tmp_path):
    path = tmp_path / "figure.jpg"
    LAYOUTS[layout](TILES[kind]).save(path, quality=50)
    grid = split_grid(path)
    assert len(grid.images) == 5 and error(grid.images, expected_tiles(layout, kind)) < 6


@pytest.mark.parametrize("kind", ["digits", "tissue", "noise"])
def test_last_frame_of_a_training_gif(kind, tmp_path):
    path = tmp_path / "progress.gif"
    tiles = TILES[kind](10)
    save_gif(path, [("epoch 1", TILES[kind](10, seed=1)), ("epoch 30 of 30", tiles)])
    grid = split_grid(path)
    assert len(grid.images) == 10
    assert error(grid.images, tiles) < (16 if kind == "tissue" else 4)  # 64 colours in the file


@pytest.mark.parametrize("kind, n", [("digits", 1), ("tissue", 5), ("noise", 23), ("digits", 64)])
def test_own_grids_split_to_the_bit(kind, n, tmp_path):
    path = tmp_path / "samples_final.png"
    tiles = TILES[kind](n)
    save_grid(path, tiles)
    grid = split_grid(path)
    assert torch.equal(grid.images, tiles)
    assert grid.method == "metadata" and grid.confidence == 1
    picture = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    x0, y0, x1, y1 = grid.boxes[-1]
    scale = (x1 - x0) // 28
    assert torch.equal(picture[: tiles.shape[1], y0:y1:scale, x0:x1:scale], tiles[-1])
    if n > 1:  # saved again by another program: found by its look, with the same tiles
        Image.open(path).convert("RGB").save(path)
        again = split_grid(path)
        assert again.method == "detected" and torch.equal(again.images, tiles)
        assert (again.boxes == grid.boxes).all()


def picture_of(tiles, columns, ground=255):
    """Tiles 4 times enlarged, 8 pixels apart; the ground of another level than white."""
    small = tile(tiles, columns)
    drawn = tile(torch.zeros_like(tiles), columns) == 0
    small = np.where(drawn, small, ground).astype(np.uint8)
    return Image.fromarray(small.repeat(4, 0).repeat(4, 1).squeeze())


def test_the_last_place_is_empty_or_a_white_image(tmp_path):
    """The look cannot tell which: refused, unless the number is known."""
    tiles = digit_tiles(64)
    tiles[-1] = 255
    picture_of(tiles, 8).save(tmp_path / "grid.png")
    with pytest.raises(UserError, match="63 or 64 images: the last place is empty, or white"):
        split_grid(tmp_path / "grid.png")
    for n in (63, 64):
        assert torch.equal(split_grid(tmp_path / "grid.png", expect=n).images, tiles[:n])


def test_tiles_that_melt_into_the_ground_are_never_some_of_the_tiles(tmp_path):
    """Black digits' padding on black: refused. One light tile among them does not stand alone."""
    one_light = digit_tiles(25)
    one_light[7] = 255 - one_light[7]
    for tiles in (digit_tiles(25), one_light):
        picture_of(tiles, 5, ground=0).save(tmp_path / "grid.png")
        with pytest.raises(UserError, match="ambiguous layout"):
            split_grid(tmp_path / "grid.png")


@pytest.mark.parametrize("resampling", [Image.Resampling.NEAREST, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("kind", TILES)
def test_a_single_enlarged_image_is_no_crop_of_itself(kind, resampling):
    for k, image in enumerate(TILES[kind](10).expand(-1, 3, -1, -1)):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        large = np.array(picture.resize([(140, 140), (300, 300)][k % 2], resampling))
        with pytest.raises(UserError, match="ambiguous layout"):
            debug_img.detect_tiles(large, "single.png", None)


@pytest.mark.parametrize("kind", ["tissue", "noise", "light"])
def test_frames_are_cut_off_or_refused(kind, tmp_path):
    for points in (0.8, 4):
        figure = Figure(figsize=(10, 2), dpi=100)
        tiles = TILES[kind](5)
        for axes, image in zip(figure.subplots(1, 5), tiles, strict=True):
            axes.imshow(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_linewidth(points)
        figure.savefig(tmp_path / "figure.png")
        if points < 2:
            assert error(split_grid(tmp_path / "figure.png").images, tiles) < 2
        else:
            with pytest.raises(UserError, match="ambiguous layout"):
                split_grid(tmp_path / "figure.png")


def test_resample_undoes_enlargement_exactly():
    """Nearest enlargement by any factor of 2 and more comes back to the bit."""
    tile = digit_tiles(1)[0].expand(3, -1, -1).permute(1, 2, 0).numpy()
    for side in (56, 71, 99, 142, 151, 170, 283):
        large = np.array(Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST))
        assert np.array_equal(resample(large, 28), tile)


def row(tiles, *lefts, side=168, top=15, **options):
    return pasted(tiles, [(left, top) for left in lefts], side, **options)


def with_white(*rows):
    """Five digits, the third white but for these rows, in which it is grey."""
    tiles = digit_tiles(5)
    tiles[2] = 255
    tiles[2, 0, slice(*rows), 10:20] = 90
    return tiles


def test_nearly_white_tile_is_kept(tmp_path):
    """A tile that melts into the ground but for a few pixels still has its place."""
    pasted(with_white(8, 20), FIVE, 168).save(tmp_path / "figure.png")
    grid = split_grid(tmp_path / "figure.png")
    assert torch.equal(grid.images, with_white(8, 20)) and grid.confidence < 0.9


def beside(*shapes, n=4):
    """n digits in a row, and beside them what ImageDraw draws: (method, coordinates, fill)."""
    picture = pasted(digit_tiles(n), FIVE[:n], 168) if n else Image.new("RGB", (1000, 200), "white")
    for method, place, fill in shapes:
        getattr(ImageDraw.Draw(picture), method)(place, fill=fill)
    return picture


CURVE = [("line", [(640, 15), (640, 182), (980, 182)], "black")]
CURVE += [("line", [(650, 30), (760, 150), (970, 170)], "black")]
CENTRED = [(20 + 120 * k, 10) for k in range(4)] + [(80 + 120 * k, 130) for k in range(3)]
AMBIGUOUS = {
    "white_on_white": lambda: pasted(255 - digit_tiles(5), FIVE, 168),
    "touching": lambda: row(digit_tiles(5), *range(20, 860, 168)),
    "two_touch": lambda: row(digit_tiles(4), 20, 188, 420, 640),
    "hole": lambda: pasted(digit_tiles(4), [FIVE[k] for k in (0, 1, 3, 4)], 168),
    "too_small": lambda: row(digit_tiles(5), *range(10, 160, 30), side=20, top=10, size=(170, 40)),
    "nothing": lambda: Image.new("RGB", (600, 200), "white"),
    "no_ground": lambda: pasted(noise_tiles(1), [(0, 0)], 280, size=(280, 280)),
    "white_tile_inside": lambda: pasted(with_white(0, 0), FIVE, 168),
    "unequal": lambda: beside(("rectangle", (820, 15, 940, 135), "black")),
    "loss_curve_beside": lambda: beside(*CURVE, n=3),
    "bars_only": lambda: beside(
        *(("rectangle", (x, 9, x + 20, 190), "black") for x in (9, 50)), n=0
    ),
    "centred_last_row": lambda: pasted(digit_tiles(7), CENTRED, 100, size=(520, 240)),
}


@pytest.mark.parametrize("figure", AMBIGUOUS)
def test_ambiguous_layouts_are_refused(figure, tmp_path):
    path = tmp_path / "figure.png"
    AMBIGUOUS[figure]().save(path)
    with pytest.raises(UserError, match="ambiguous layout"):
        split_grid(path)


def test_unreadable_files(tmp_path):
    save_grid(tmp_path / "good.png", digit_tiles(30))
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:-2000])
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("1", (10_000, 5_001)).save(tmp_path / "huge.png")
    for name in ("cut.png", "text.png", "huge.png", "missing.png", "."):
        with pytest.raises(UserError, match=f"{tmp_path / name}: not a readable picture"):
            split_grid(tmp_path / name)


CHANGES = [{"count": 99}, {"columns": 0}, {"tile_width": 400}, {"scale": "4"}, {"padding": None}]
CHANGES += [{"scale": 2}, {"count": 10**8}, {"padding": 4}, {"columns": 4}]
CHANGES += [{}]  # one pixel beside those that are read


@pytest.mark.parametrize("change", CHANGES)
def test_description_that_contradicts_the_picture(change, tmp_path):
    path = tmp_path / "grid.png"
    save_grid(path, digit_tiles(5))
    with Image.open(path) as picture:
        text = PngImagePlugin.PngInfo()
        text.add_text("grid", json.dumps(json.loads(picture.text["grid"]) | change))
        if not change:
            picture.putpixel((picture.width // 4 * 4 - 1, 21), 99)
        picture.save(tmp_path / "changed.png", pnginfo=text)
    with pytest.raises(UserError, match="changed.png"):
        split_grid(tmp_path / "changed.png")


def test_debug_img_reports_and_checks_the_count(tmp_path, capsys):
    path = tmp_path / "figure.png"
    LAYOUTS["titles"](digit_tiles).save(path)
    debug_img.main([str(path), "--expect", "5"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["images"] == "5" and lines["ground"] == "#ffffff" and lines["method"] == "detected"
    assert lines["size"].startswith("28x28, 1 channel")
    assert 0.8 < float(lines["confidence"]) <= 1
    with Image.open(tmp_path / "figure_split.png") as drawn:
        colours = np.asarray(drawn.convert("RGB")).reshape(-1, 3)
    assert (np.abs(colours.astype(int) - (0xD5, 0x5E, 0x00)).max(axis=1) < 10).sum() > 500
    (tmp_path / "link.png").symlink_to(path)
    before, other = path.read_bytes(), tmp_path / "new" / "a$b$\udcff.png"
    mistakes = {
        (path, "--expect", "4", "--out", other): "5 images, --expect 4",
        (path, "--out", tmp_path / "link.png"): "is the picture itself",
        (path, "--expect", "0"): "--expect",
        (tmp_path / "missing.png",): "missing.png: not a readable picture",
        (path, "--out", path / "below.png"): "File exists",
    }
    for arguments, message in mistakes.items():
        with pytest.raises(SystemExit) as stop:
            debug_img.main([*map(str, arguments)])
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.startswith("error: ")
        assert line.count("\n") == 1 and message in line, line
    assert path.read_bytes() == before and other.exists()
