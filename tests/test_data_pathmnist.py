"""Reading and selecting images of PathMNIST and of the embedded tissue."""

import errno
import json
import os
import re

import medmnist
import numpy as np
import pytest
import torch
import torchvision
from conftest import only, tiny, write_npz
from skimage.data import immunohistochemistry

import quantum_diffusion_pathmnist as path


@pytest.mark.parametrize("split, n", [("train", 90), ("val", 9), ("test", 36)])
def test_pathmnists_own_file_is_read(split, n, tmp_path):
    arrays = write_npz(tmp_path)
    source, images, labels = path.load_images("auto", tmp_path, split)
    assert source == "pathmnist"
    assert images.shape == (n, 3, 28, 28)
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), arrays[f"{split}_images"])
    assert labels.tolist() == [4 * k % 9 for k in range(n)]


def planned(*argv):
    """The data and the runs that a command line asks for."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path, "make_run", lambda *call: calls.append(call))
        path.main([str(word) for word in argv])
    return calls[0][1], [run for *_, run in calls]


def test_one_model_of_all_tissues_is_the_default(tmp_path):
    write_npz(tmp_path)
    _, (run,) = planned("--data_dir", tmp_path)
    assert run.settings.name == "classical_pathmnist_conditional_nall_seed0"
    _, (run,) = planned("--data_dir", tmp_path, "--no-conditional")
    assert run.settings.name == "classical_pathmnist_adenocarcinoma_nall_seed0"


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([str(k) for k in range(9)], id="numbers"),
        pytest.param(["all"], id="all"),
        pytest.param(path.PATHMNIST_CLASSES, id="names"),
    ],
)
def test_names_follow_medmnist(words, tmp_path):
    arrays = write_npz(tmp_path)
    data, runs = planned("--data_dir", tmp_path, "--no-conditional", "--labels", *words)
    assert len(runs) == 9
    for k, (settings, config) in enumerate(runs):
        name = settings.name.split("_")[2]
        official = medmnist.INFO["pathmnist"]["label"][str(k)]
        assert all(word in official for word in name.split("-"))
        assert config["settings"]["class_names"] == [name]

        real = arrays["train_images"][arrays["train_labels"][:, 0] == k]
        images, labels = data.training_images(settings, "cpu")
        assert set(labels.tolist()) == {k} and len(labels) == len(images)
        assert len(images) == 8 * len(real) == 80
        assert images[torch.arange(80)].sum() == 8 * real.sum()


def test_embedded_tiles_are_disjoint_and_of_one_class(tmp_path, fails):
    _, train, labels = path.load_images("tissue", tmp_path)
    _, test, _ = path.load_images("tissue", tmp_path, "test")
    assert len(train) == 252
    assert len(test) == 72
    assert torch.equal(test, path.load_images("tissue", tmp_path, "val")[1])
    assert set(labels.tolist()) == {9}

    # Put together they are the picture.
    rows = [torch.cat(list(tiles), dim=2) for tiles in torch.cat([train, test]).split(18)]
    whole = torch.cat(rows, dim=1).permute(1, 2, 0).numpy()
    assert np.array_equal(whole, immunohistochemistry()[:504, :504])

    argv = ["--data", "tissue", "--labels", "stroma", "--save_dir", tmp_path / "runs"]
    assert "class stroma has no images in this data set" in fails(path, argv)


def test_without_network_tissue_is_taken_loudly(no_network, tmp_path, capsys, fails):
    assert path.load_images("auto", tmp_path)[0] == "tissue"
    captured = capsys.readouterr().err
    assert f"downloading pathmnist.npz to {tmp_path} ..." in captured
    assert f"NOTICE: no {tmp_path}/pathmnist.npz, download failed: " in captured
    message = fails(path, ["--data", "pathmnist", "--data_dir", tmp_path])
    assert f"copy it to {tmp_path}, or use --data tissue" in message
    assert not any(tmp_path.iterdir())


def test_a_download_that_is_interrupted_is_no_reason_to_use_other_data(
    tmp_path, fails, monkeypatch
):
    """medmnist calls whatever stops it a failed download."""
    argv = ["--data_dir", tmp_path / "data", "--save_dir", tmp_path / "runs"]
    argv += ["--steps", 1, "--n_eval", 1, "--n_frames", 1]  # quick, should it go on

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", stopped)
    with pytest.raises(SystemExit) as caught:
        path.main([str(word) for word in argv])
    assert caught.value.code == 130

    for number in (errno.ENOSPC, errno.EDQUOT):

        def full(*_, number=number, **__):
            raise OSError(number, "full")

        monkeypatch.setattr(torchvision.datasets.utils, "download_url", full)
        message = fails(path, argv)
        assert message == f"error: [Errno {number}] {os.strerror(number)}: '{tmp_path / 'data'}'"
    assert not (tmp_path / "runs").exists()


def test_augmentation_trains_on_the_symmetry_group_of_the_square(tmp_path):
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    eight = path.symmetries(image)
    assert eight.shape == (8, 3, 2, 2)
    assert torch.equal(eight[:1], image)
    assert len({tuple(x.flatten().tolist()) for x in eight}) == 8
    for x in path.symmetries(eight[5:6]):  # closed under another symmetry
        assert any(torch.equal(x, y) for y in eight)

    # Of many images each has its own eight.
    several = torch.arange(36, dtype=torch.uint8).view(3, 3, 2, 2)
    every_third = path.symmetries(several)[1::3]
    assert torch.equal(every_third, path.symmetries(several[1:2]))

    argv = tiny(tmp_path, "--augment", "--n_eval", 1, script=path)
    steps = argv.index("--steps")
    argv[steps : steps + 2] = ["--epochs", "1"]
    path.main(argv)
    config = json.loads((only(tmp_path) / "config.json").read_text())
    assert config["images"]["used"] == 8
    assert config["images"]["symmetries"] == 8
    assert config["images"]["available"] == 252
    assert config["settings"]["steps"] == 16  # 64 images in batches of 4


def test_symmetries_are_the_same_when_they_are_made_as_drawn():
    images = torch.arange(3 * 3 * 28 * 28).view(3, 3, 28, 28)
    index = torch.tensor([5, 0, 23, 5, 17])
    lazy = path.Symmetries(images)
    assert lazy.shape == (24, 3, 28, 28)
    assert torch.equal(lazy[index], path.symmetries(images)[index])


def test_a_failed_download_says_where_to_put_a_copy(tmp_path, no_network, fails):
    """MedMNIST names the folder into which it downloads, which is gone by then."""
    message = fails(path, ["--data", "pathmnist", "--data_dir", tmp_path / "data"])
    assert not re.search(r"data/tmp\w+", message)  # the folder aside
    assert f"copy it to {tmp_path / 'data'}, or use --data tissue" in message
