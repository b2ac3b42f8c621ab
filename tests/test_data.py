"""Reading, downloading and selecting images of MNIST and of the embedded digits."""

import errno
import gzip
import os
import socket

import pytest
import torch
import torchvision
from conftest import pictures

import quantum_diffusion_mnist as mnist


def test_mnists_own_files_are_read(mnist_dir):
    for split, n in (("train", 60), ("test", 20)):
        source, images, labels = mnist.load_images("auto", mnist_dir, split)
        assert source == "mnist"
        assert images.dtype == torch.uint8
        assert torch.equal(images, pictures(n).to(torch.uint8)[:, None])
        assert torch.equal(labels, torch.arange(n) % 10)


def test_published_files_are_read_packed(mnist_dir):
    _, images, labels = mnist.load_images("mnist", mnist_dir)
    raw = mnist_dir / "MNIST" / "raw"
    for path in list(raw.iterdir()):
        (raw / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    _, unpacked, same_labels = mnist.load_images("mnist", mnist_dir)
    assert torch.equal(unpacked, images)
    assert torch.equal(same_labels, labels)


def test_two_machines_write_aside_under_different_names(tmp_path, monkeypatch):
    """They share a disk, and may have equal process numbers."""
    asides = []
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(os, "replace", lambda source, target: asides.append(source))
    for _ in range(2):
        mnist.write_atomic(tmp_path / "model.pt", b"weights")
    first, second = asides
    assert first != second
    assert all(path.parent == tmp_path and path.match(".model.pt.*.part") for path in asides)


def test_published_files_where_nothing_can_be_written_are_named(mnist_dir, monkeypatch):
    raw = mnist_dir / "MNIST" / "raw"
    for path in list(raw.iterdir()):
        (raw / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()

    def refuse(path, data):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(mnist, "write_atomic", refuse)
    with pytest.raises(mnist.UserError, match="unpack it by gunzip into a folder of your own"):
        mnist.load_images("mnist", mnist_dir)


def test_damaged_packed_files_are_named(mnist_dir, fails, tmp_path):
    raw = mnist_dir / "MNIST" / "raw"
    path = raw / "train-images-idx3-ubyte"
    (raw / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes())[:-30])
    path.unlink()
    message = fails(mnist, ["--data_dir", mnist_dir, "--save_dir", tmp_path / "runs"])
    assert f"{raw}: not MNIST's four files" in message
    assert not path.exists()


def test_without_network_auto_takes_digits_loudly_and_mnist_is_an_error(
    no_network, tmp_path, capsys, fails
):
    source, images, _ = mnist.load_images("auto", tmp_path)
    assert source == "digits"
    assert images.shape == (1438, 1, 28, 28)
    assert images.dtype == torch.uint8
    notice = capsys.readouterr().err.splitlines()[-1]
    assert notice.startswith(f"NOTICE: no {tmp_path}/MNIST/raw, download failed: ")
    assert "EMBEDDED DATA" in notice

    message = fails(mnist, ["--data", "mnist", "--data_dir", tmp_path])
    assert f"copy its four files to {tmp_path}/MNIST/raw, or use --data digits" in message
    assert not any(tmp_path.iterdir())  # nothing half downloaded stays


def test_a_data_folder_that_takes_no_files_is_an_error_not_other_data(tmp_path, fails, monkeypatch):
    quick = ["--save_dir", tmp_path / "runs", "--steps", 1, "--n_eval", 1, "--n_frames", 1]
    in_the_way = tmp_path / "a file"
    in_the_way.write_text("")
    message = fails(mnist, ["--data_dir", in_the_way, *quick])
    found = "File exists; MNIST/raw would be downloaded there"
    assert message == f"error: [Errno 17] {found}: '{in_the_way}'"

    def full(folder, download):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(torchvision.datasets, "MNIST", full)
    message = fails(mnist, ["--data_dir", tmp_path / "data", *quick])
    assert message == f"error: [Errno 28] No space left on device: '{tmp_path / 'data'}'"
    assert not (tmp_path / "runs").exists()


def test_a_download_is_announced_and_has_a_time_limit(tmp_path, capsys, monkeypatch):
    limits = []

    def never_answers(folder, download):
        limits.append(socket.getdefaulttimeout())
        assert capsys.readouterr().err == f"downloading MNIST/raw to {tmp_path} ...\n"
        raise TimeoutError("timed out")

    monkeypatch.setattr(torchvision.datasets, "MNIST", never_answers)
    socket.setdefaulttimeout(77.0)
    try:
        with pytest.raises(mnist.UserError, match="download failed: timed out; copy its four"):
            mnist.load_images("mnist", tmp_path)
        assert limits == [mnist.DOWNLOAD_TIMEOUT]
        assert 0 < mnist.DOWNLOAD_TIMEOUT <= 60
        assert socket.getdefaulttimeout() == 77
    finally:
        socket.setdefaulttimeout(None)


def test_a_download_is_moved_in_when_it_is_whole(tmp_path, monkeypatch):
    seen = []

    def fetch(folder):
        assert folder.parent == tmp_path / "data"
        (folder / "MNIST" / "raw").mkdir(parents=True)
        (folder / "MNIST" / "raw" / "file").write_text("whole")
        seen.append((tmp_path / "data" / "MNIST").exists())

    path = tmp_path / "data" / "MNIST" / "raw"
    assert mnist.download(tmp_path / "data", "MNIST/raw", fetch) is None
    assert seen == [False]
    assert (path / "file").read_text() == "whole"
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["MNIST"]
    assert mnist.download(tmp_path / "data", "MNIST/raw", None) is None  # is there


def test_embedded_digits_are_split_without_overlap(tmp_path):
    _, train, labels = mnist.load_images("digits", tmp_path)
    _, test, test_labels = mnist.load_images("digits", tmp_path, "test")
    assert len(train) == 1438
    assert len(test) == 359
    assert labels[:5].tolist() == [0, 1, 2, 3, 5]
    assert test_labels[:2].tolist() == [4, 9]
    assert train.max() == 255
    assert train.min() == 0
    assert torch.bincount(labels).min() == 127
    assert torch.equal(train, mnist.load_images("digits", tmp_path)[1])


def test_subsets_are_of_one_class_nested_and_moved_by_the_seed():
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1)
    labels = torch.arange(100) % 10

    def subset(n, seed):
        return mnist.select_images(images, labels, 7, n, seed).flatten().tolist()

    assert sorted(subset(None, 0)) == list(range(7, 100, 10))
    assert set(subset(5, 0)) < set(range(7, 100, 10))
    assert len(set(subset(5, 0))) == 5
    assert subset(5, 0) == subset(9, 0)[:5]
    assert subset(5, 0) != subset(5, 1)

    # Each class has an order of its own: image k of class 8 is 10 k + 8.
    of_eights = mnist.select_images(images, labels, 8, None, 0).flatten()
    assert [number // 10 for number in subset(None, 0)] != [n // 10 for n in of_eights.tolist()]
    with pytest.raises(mnist.UserError, match="--n_train 11: class 7 has 10 training images"):
        subset(11, 0)
    with pytest.raises(mnist.UserError, match="class 3 has no images in this data set"):
        mnist.select_images(images, labels.clamp(min=5), 3, None, 0)


def test_pixels_to_the_range_of_the_diffusion_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    scaled = mnist.to_float(pixels)
    assert scaled[[0, 255]].tolist() == [-1, 1]
    assert torch.equal(mnist.to_uint8(scaled), pixels)
    assert mnist.to_uint8(torch.tensor([-1.2, 1.2, 0.0])).tolist() == [0, 255, 128]
