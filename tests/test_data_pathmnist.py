"""Reading and selecting images of PathMNIST and of the embedded tissue."""

import medmnist
import numpy as np
import pytest
import torch

import quantum_diffusion_pathmnist as path

OFFICIAL = {"train": 89_996, "val": 10_004, "test": 7_180}


def write_npz(folder, sizes, **replaced):
    """A file in medmnist's format; label of image k is 4 k mod 9."""
    folder.mkdir(exist_ok=True)
    arrays = {}
    for split, n in sizes.items():
        generator = np.random.default_rng(n)
        pixels = generator.integers(0, 256, (min(n, 90), 28, 28, 3), dtype=np.uint8)
        arrays[f"{split}_images"] = np.resize(pixels, (n, 28, 28, 3))
        arrays[f"{split}_labels"] = (np.arange(n, dtype=np.uint8) * 4 % 9)[:, None]
    arrays |= replaced
    arrays = {name: array for name, array in arrays.items() if array is not None}
    np.savez(folder / "pathmnist.npz", **arrays)
    return folder


REDUCED = {"train": 90, "val": 9, "test": 18}


@pytest.mark.parametrize("sizes", [REDUCED, OFFICIAL], ids=["reduced", "official"])
def test_real_format_is_read_and_classes_are_counted(tmp_path, sizes):
    folder = write_npz(tmp_path / "data", sizes)
    source, images, labels = path.load_images("auto", folder)
    assert source == "pathmnist" and images.shape == (sizes["train"], 3, 28, 28)
    with np.load(folder / "pathmnist.npz") as arrays:
        expected = [k for k, row in enumerate(arrays["train_labels"]) if row[0] == 8]
        first = arrays["train_images"][expected[0]]
    assert labels.eq(8).nonzero().flatten().tolist() == expected
    assert len(expected) > sizes["train"] // 12
    for name in ("8", "adenocarcinoma"):
        (label,) = path.parse_classes("--labels", [name], path.PATHMNIST_CLASSES)
        chosen = path.select_images(images, labels, label, None, 0)
        assert len(chosen) == len(expected)
        assert np.array_equal(chosen[0].permute(1, 2, 0).numpy(), first)
    assert len(path.load_images("auto", folder, "test")[1]) == sizes["test"]


def test_names_follow_medmnist():
    official = medmnist.INFO["pathmnist"]["label"]
    assert len(official) == len(path.PATHMNIST_CLASSES)
    for k, name in enumerate(path.PATHMNIST_CLASSES):
        assert all(word in official[str(k)] for word in name.split("-")), (name, official[str(k)])
    everything = path.parse_classes("--labels", ["all"], path.PATHMNIST_CLASSES)
    assert everything == list(range(9))


def test_channels_are_red_green_blue_through_png_and_back(tmp_path):
    pixels = np.zeros((90, 28, 28, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 200, 100  # orange
    folder = write_npz(tmp_path / "data", REDUCED, train_images=pixels)
    _, images, _ = path.load_images("pathmnist", folder)
    path.save_grid(tmp_path / "grid.png", images[:3])
    from PIL import Image

    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.getpixel((picture.width // 6, picture.height // 2)) == (200, 100, 0)
    assert torch.equal(path.load_grid(tmp_path / "grid.png"), images[:3])


class Payload:
    """Would run when unpickled."""

    def __reduce__(self):
        raise AssertionError("unpickled")


DAMAGE = {
    "missing key": ({"train_labels": None}, "train_labels"),
    "shape": ({"train_images": np.zeros((90, 64, 64, 3), np.uint8)}, "(90, 28, 28, 3)"),
    "grey": ({"train_images": np.zeros((90, 28, 28), np.uint8)}, "(90, 28, 28, 3)"),
    "type": ({"train_images": np.zeros((90, 28, 28, 3), np.float32)}, "expected uint8"),
    "label type": ({"train_labels": np.zeros((90, 1), np.float32)}, "not integers"),
    "label count": ({"train_labels": np.zeros((89, 1), np.uint8)}, "90 images"),
    "label range": ({"train_labels": np.full((90, 1), 9, np.uint8)}, "outside 0-8"),
    "pickled": ({"train_labels": np.array([{}] * 90, dtype=object)}, "allow_pickle=False"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_an_error(tmp_path, fails, damage):
    replaced, words = DAMAGE[damage]
    folder = write_npz(tmp_path / "data", REDUCED, **replaced)
    message = fails(path, ["--data_dir", folder, "--save_dir", tmp_path / "runs"])
    assert "pathmnist.npz" in message and words in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("size", [0, 10, 5000, -100])
def test_truncated_files_are_an_error(tmp_path, fails, size):
    folder = write_npz(tmp_path / "data", REDUCED)
    whole = (folder / "pathmnist.npz").read_bytes()
    (folder / "pathmnist.npz").write_bytes(whole[:size])
    assert "pathmnist.npz" in fails(path, ["--data_dir", folder])


def test_without_network(no_network, tmp_path, capsys, fails):
    source, images, labels = path.load_images("auto", tmp_path)
    assert source == "tissue" and "NOTICE" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    message = fails(path, ["--data", "pathmnist", "--data_dir", tmp_path])
    assert "--data tissue" in message and str(tmp_path) in message


def test_embedded_tiles_are_disjoint_and_deterministic(tmp_path):
    from skimage.data import immunohistochemistry

    _, train, labels = path.load_images("tissue", tmp_path)
    _, test, _ = path.load_images("tissue", tmp_path, "test")
    assert len(train) == 252 and len(test) == 72 and set(labels.tolist()) == {9}
    rows = [torch.cat(list(tiles), dim=2) for tiles in torch.cat([train, test]).split(18)]
    whole = torch.cat(rows, dim=1).permute(1, 2, 0).numpy()
    assert np.array_equal(whole, immunohistochemistry()[:504, :504])
    assert torch.equal(train, path.load_images("tissue", tmp_path)[1])


def test_labels_with_the_embedded_tissue_are_an_error(tmp_path, fails):
    argv = ["--data", "tissue", "--labels", "stroma", "--save_dir", tmp_path / "runs"]
    assert "one class" in fails(path, argv)


def test_augmentation_is_the_symmetry_group_of_the_square():
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    eight = path.symmetries(image)
    assert eight.shape == (8, 3, 2, 2) and torch.equal(eight[:1], image)
    assert len({tuple(x.flatten().tolist()) for x in eight}) == 8
    for x in path.symmetries(eight[5:6]):  # closed under another symmetry
        assert any(torch.equal(x, y) for y in eight)


def test_augmentation_changes_the_training_set_and_says_so(tmp_path):
    import json

    common = ["--data", "tissue", "--n_train", "8", "--steps", "2", "--timesteps", "4"]
    for name, extra in (("a", []), ("b", ["--augment"])):
        path.main([*common, "--n_eval", "1", "--save_dir", str(tmp_path / name), *extra])
    config = {
        name: json.loads(next((tmp_path / name).glob("*/config.json")).read_text())["images"]
        for name in "ab"
    }
    assert config["a"]["used"] == 8 and config["b"]["used"] == 64
    assert config["b"]["symmetries"] == 8 and config["b"]["available"] == 252
