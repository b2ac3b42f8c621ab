"""Reading and selecting images of PathMNIST and of the embedded tissue."""

import hashlib
import json

import medmnist
import numpy as np
import pytest
import torch
from conftest import only, tiny
from PIL import Image
from skimage.data import immunohistochemistry

import quantum_diffusion_pathmnist as path

REDUCED = {"train": 90, "val": 9, "test": 18}


def write_npz(folder, **replaced):
    """A file in medmnist's format; label of image k is 4 k mod 9."""
    folder.mkdir(exist_ok=True)
    arrays = {}
    for split, n in REDUCED.items():
        pixels = np.random.default_rng(n).integers(0, 256, (n, 28, 28, 3), dtype=np.uint8)
        arrays[f"{split}_images"] = pixels
        arrays[f"{split}_labels"] = (np.arange(n) * 4 % 9).astype(np.uint8)[:, None]
    arrays = {name: array for name, array in (arrays | replaced).items() if array is not None}
    np.savez(folder / "pathmnist.npz", **arrays)
    return arrays


def test_real_format_is_read_and_classes_are_counted(tmp_path):
    for split, n in (("train", 90), ("test", 18)):
        arrays = write_npz(tmp_path)
        source, images, labels = path.load_images("auto", tmp_path, split)
        assert source == "pathmnist" and images.shape == (n, 3, 28, 28)
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), arrays[f"{split}_images"])
        assert labels.tolist() == [4 * k % 9 for k in range(n)]


def test_names_follow_medmnist_and_runs_take_the_class_that_is_asked_for(tmp_path, monkeypatch):
    for name in ("train", "sample_final"):
        monkeypatch.setattr(path, name, lambda *_: None)
    arrays = write_npz(tmp_path)
    path.main(["--data_dir", str(tmp_path), "--save_dir", str(tmp_path / "one")])
    assert only(tmp_path / "one").name == "classical_pathmnist_adenocarcinoma_nall_seed0"
    for words in (["0", "1", "2", "3", "4", "5", "6", "7", "8"], ["all"], path.PATHMNIST_CLASSES):
        path.main(
            ["--data_dir", str(tmp_path), "--save_dir", str(tmp_path / "a"), "--labels", *words]
        )
    official = medmnist.INFO["pathmnist"]["label"]
    assert len(official) == len(path.PATHMNIST_CLASSES) == len(list((tmp_path / "a").iterdir()))
    for k, name in enumerate(path.PATHMNIST_CLASSES):
        assert all(word in official[str(k)] for word in name.split("-")), (name, official[str(k)])
        run = tmp_path / f"a/classical_pathmnist_{name}_nall_seed0"
        config = json.loads((run / "config.json").read_text())
        of_class = arrays["train_images"][arrays["train_labels"][:, 0] == k]
        chosen = path.select_images(torch.from_numpy(of_class), torch.zeros(10), 0, None, 0)
        digest = hashlib.sha256(chosen.permute(0, 3, 1, 2).numpy().tobytes()).hexdigest()
        assert config["images"]["sha256"] == digest and config["images"]["used"] == 10


def test_channels_are_red_green_blue_through_png_and_back(tmp_path):
    pixels = np.zeros((90, 28, 28, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 200, 100  # orange
    write_npz(tmp_path, train_images=pixels)
    _, images, _ = path.load_images("pathmnist", tmp_path)
    path.save_grid(tmp_path / "grid.png", images[:3])
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.getpixel((picture.width // 6, picture.height // 2)) == (200, 100, 0)
    assert torch.equal(path.load_grid(tmp_path / "grid.png"), images[:3])


DAMAGE = {
    "missing key": ({"train_labels": None}, "train_labels"),
    "shape": ({"train_images": np.zeros((90, 64, 64, 3), np.uint8)}, "(90, 64, 64, 3)"),
    "grey": ({"train_images": np.zeros((90, 28, 28), np.uint8)}, "(90, 28, 28)"),
    "type": ({"train_images": np.zeros((90, 28, 28, 3), np.float32)}, "not whole numbers"),
    "label type": ({"train_labels": np.zeros((90, 1), np.float32)}, "not whole numbers"),
    "label count": ({"train_labels": np.zeros((89, 1), np.uint8)}, "(90, 28, 28, 3)"),
    "label range": ({"train_labels": np.full((90, 1), 9, np.uint8)}, "labels"),
    "pickled": ({"train_labels": np.array([{}] * 90, dtype=object)}, "allow_pickle=False"),
    "truncated": (0, "pathmnist.npz"),
    "cut": (-100, "pathmnist.npz"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_an_error(tmp_path, fails, damage):
    replaced, words = DAMAGE[damage]
    file, cut = tmp_path / "data/pathmnist.npz", isinstance(replaced, int)
    write_npz(tmp_path / "data", **{} if cut else replaced)
    if cut:
        file.write_bytes(file.read_bytes()[:replaced])
    message = fails(path, ["--data_dir", tmp_path / "data", "--save_dir", tmp_path / "runs"])
    assert "pathmnist.npz" in message and words in message
    assert not (tmp_path / "runs").exists()


def test_without_network_tissue_is_taken_loudly(no_network, tmp_path, capsys, fails):
    assert path.load_images("auto", tmp_path)[0] == "tissue"
    assert "NOTICE" in capsys.readouterr().err and not any(tmp_path.iterdir())
    message = fails(path, ["--data", "pathmnist", "--data_dir", tmp_path])
    assert "--data tissue" in message and str(tmp_path) in message


def test_embedded_tiles_are_disjoint_and_of_one_class(tmp_path, fails):
    _, train, labels = path.load_images("tissue", tmp_path)
    _, test, _ = path.load_images("tissue", tmp_path, "test")
    assert len(train) == 252 and len(test) == 72 and set(labels.tolist()) == {9}
    rows = [torch.cat(list(tiles), dim=2) for tiles in torch.cat([train, test]).split(18)]
    whole = torch.cat(rows, dim=1).permute(1, 2, 0).numpy()
    assert np.array_equal(whole, immunohistochemistry()[:504, :504])
    argv = ["--data", "tissue", "--labels", "stroma", "--save_dir", tmp_path / "runs"]
    assert "class stroma has 0 training images" in fails(path, argv)


def test_augmentation_trains_on_the_symmetry_group_of_the_square(tmp_path):
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    eight = path.symmetries(image)
    assert eight.shape == (8, 3, 2, 2) and torch.equal(eight[:1], image)
    assert len({tuple(x.flatten().tolist()) for x in eight}) == 8
    for x in path.symmetries(eight[5:6]):  # closed under another symmetry
        assert any(torch.equal(x, y) for y in eight)
    path.main(tiny(tmp_path, "--augment", "--steps", 1, "--n_eval", 1, script=path))
    images = json.loads((only(tmp_path) / "config.json").read_text())["images"]
    assert (images["used"], images["symmetries"], images["available"]) == (64, 8, 252)
