"""Reading and selecting images of PathMNIST and of the embedded tissue."""

import json

import medmnist
import numpy as np
import torch
from conftest import only, tiny, write_npz
from skimage.data import immunohistochemistry

import quantum_diffusion_pathmnist as path


def test_real_format_is_read_and_classes_are_counted(tmp_path):
    for split, n in (("train", 90), ("test", 36)):
        arrays = write_npz(tmp_path)
        source, images, labels = path.load_images("auto", tmp_path, split)
        assert source == "pathmnist" and images.shape == (n, 3, 28, 28)
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), arrays[f"{split}_images"])
        assert labels.tolist() == [4 * k % 9 for k in range(n)]


def test_names_follow_medmnist(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(path, "train", lambda settings, images, _: made.append((settings, images)))
    monkeypatch.setattr(path, "sample_final", lambda *_: None)
    arrays, argv = write_npz(tmp_path), ["--data_dir", str(tmp_path), "--save_dir"]
    path.main([*argv, str(tmp_path / "default")])
    assert made[0][0].name == "classical_pathmnist_adenocarcinoma_nall_seed0"
    for words in ([str(k) for k in range(9)], ["all"], path.PATHMNIST_CLASSES):
        made.clear()
        path.main([*argv, str(tmp_path / words[0]), "--labels", *words])
        for k, (settings, images) in enumerate(made):
            words = medmnist.INFO["pathmnist"]["label"][str(k)]
            assert all(word in words for word in settings.name.split("_")[2].split("-"))
            real = arrays["train_images"][arrays["train_labels"][:, 0] == k]
            assert images.sum() == 8 * real.sum() and len(images) == 80
        assert len(made) == 9


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
