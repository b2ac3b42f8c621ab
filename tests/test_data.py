"""Reading and selecting images of MNIST and of the embedded digits."""

import pytest
import torch
from conftest import pictures

import quantum_diffusion_mnist as mnist


def test_real_loader_on_idx_files(mnist_dir):
    for split, n in (("train", 60), ("test", 20)):
        source, images, labels = mnist.load_images("auto", mnist_dir, split)
        assert source == "mnist" and images.dtype == torch.uint8
        assert torch.equal(images, pictures(n).to(torch.uint8)[:, None])
        assert torch.equal(labels, torch.arange(n) % 10)


def test_without_network_auto_takes_digits_loudly_and_mnist_is_an_error(
    no_network, tmp_path, capsys, fails
):
    source, images, _ = mnist.load_images("auto", tmp_path)
    assert source == "digits" and "NOTICE" in capsys.readouterr().err
    assert images.shape == (1438, 1, 28, 28) and images.dtype == torch.uint8
    message = fails(mnist, ["--data", "mnist", "--data_dir", tmp_path])
    assert "--data digits" in message and str(tmp_path) in message
    assert not any(tmp_path.iterdir())  # nothing half downloaded stays


def test_embedded_digits_are_split_without_overlap(tmp_path):
    _, train, labels = mnist.load_images("digits", tmp_path)
    _, test, test_labels = mnist.load_images("digits", tmp_path, "test")
    assert len(train) == 1438 and len(test) == 359
    assert labels[:5].tolist() == [0, 1, 2, 3, 5] and test_labels[:2].tolist() == [4, 9]
    assert train.max() == 255 and train.min() == 0 and torch.bincount(labels).min() == 127
    assert torch.equal(train, mnist.load_images("digits", tmp_path)[1])


def test_subsets_are_of_one_class_nested_and_moved_by_the_seed():
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1)
    labels = torch.arange(100) % 10

    def subset(n, seed):
        return mnist.select_images(images, labels, 7, n, seed).flatten().tolist()

    assert sorted(subset(None, 0)) == list(range(7, 100, 10))
    assert set(subset(5, 0)) < set(range(7, 100, 10)) and len(set(subset(5, 0))) == 5
    assert subset(5, 0) == subset(9, 0)[:5] != subset(5, 1)
    for n in (0, 11):
        with pytest.raises(mnist.UserError, match="class 7 has 10 training images"):
            subset(n, 0)


def test_pixels_to_the_range_of_the_diffusion_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    scaled = mnist.to_float(pixels)
    assert scaled[[0, 255]].tolist() == [-1, 1] and torch.equal(mnist.to_uint8(scaled), pixels)
    assert mnist.to_uint8(torch.tensor([-1.2, 1.2, 0.0])).tolist() == [0, 255, 128]
