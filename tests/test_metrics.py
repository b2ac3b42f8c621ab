"""Every figure of cal_fid_ssim.py against a closed form, another library or an invariant."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from skimage.metrics import structural_similarity

import cal_fid_ssim as metrics
import cal_fid_ssim_medmnist as tissue
import quantum_diffusion_mnist as mnist
from cal_fid_ssim_medmnist import layout, scattering_extractor
from quantum_diffusion_mnist import UserError, load_images, to_float

_, DIGITS, _ = load_images("digits", None)
DIGITS = DIGITS[:200]


def normal(n, d, seed, scale=1.0, shift=0.0):
    """Features (n, d) of a normal distribution."""
    return np.random.default_rng(seed).normal(size=(n, d)) * scale + shift


def test_random_streams_are_those_of_the_training_scripts():
    """And of every earlier version: tables are to be had again."""
    ours = torch.rand(3, generator=metrics.random_stream(7, "evaluation", "floor", 2))
    theirs = torch.rand(3, generator=mnist.random_stream(7, "evaluation", "floor", 2))
    assert torch.equal(ours, theirs)

    pinned = torch.randint(10**6, (1,), generator=metrics.random_stream(0, "evaluation", "paper"))
    assert pinned.item() == 233355


# ----------------------------------------------------------------------------------- Fréchet
@pytest.mark.parametrize("n, m", [(2, 5), (10, 400), (400, 10), (24, 24), (100, 300)])
@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_frechet_equals_matrix_square_root(n, m):
    """The textbook's formula with n - 1, full rank or not; zero for identical sets."""
    a = normal(n, 24, 4)
    b = normal(m, 24, 5, np.linspace(0.5, 2, 24), 0.3)
    assert metrics.frechet_distance(a, a.copy()) == 0

    covariance_a = np.cov(a.T)
    covariance_b = np.cov(b.T)
    root = linalg.sqrtm(covariance_a @ covariance_b).real
    expected = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    expected += np.trace(covariance_a + covariance_b - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_equal_covariances_is_the_squared_distance_of_the_means():
    a = normal(40, 6, 1)
    shift = np.array([1.0, -2.0, 0.0, 0.5, 0.0, 3.0])
    assert metrics.frechet_distance(a, a + shift) == pytest.approx((shift**2).sum(), rel=1e-9)


def test_frechet_survives_dead_and_nearly_dead_features():
    """Covariances that commute have a closed form: the squared difference of their roots.

    Dead directions, here not along the axes, make the textbook matrix root lose half of its digits.
    """
    scale = np.array([1, 1e-3, 1e-7, 0, 0, 2])
    basis = linalg.hadamard(8)[:, 1:7].astype(float)  # orthogonal columns of mean zero
    rotation, _ = linalg.qr(normal(6, 6, 9))
    a = basis * scale @ rotation
    b = 1.001 * a

    roots_differ = 0.001 * scale
    expected = (roots_differ**2).sum() * 8 / 7  # n / (n - 1)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)

    a[2, 1] = np.nan
    with pytest.raises(UserError, match="not finite"):
        metrics.frechet_distance(a, b)


def test_frechet_infinity_removes_the_bias():
    """Standard normals against a set whose mean is exactly 0 and covariance exactly 1.

    The extrapolated value's mean is zero within its error, FID's is not.
    """
    reference = np.concatenate([np.eye(16), -np.eye(16)]) * np.sqrt(31 / 2)
    samples = [normal(200, 16, 100 + k) for k in range(12)]
    plain = np.mean([metrics.frechet_distance(x, reference) for x in samples])
    extrapolated = np.array([metrics.frechet_infinity(x, reference, seed=0) for x in samples])
    error = extrapolated.std(ddof=1) / np.sqrt(len(samples))
    assert abs(extrapolated.mean()) < 3 * error
    assert plain > 10 * error


def test_frechet_infinity_of_few_images_is_none():
    """From 8 d images on a tenth of FID's bias is left; below, where the line bends, it is NaN."""
    reference = np.concatenate([np.eye(16), -np.eye(16)]) * np.sqrt(31 / 2)
    samples = [normal(128, 16, 100 + k) for k in range(24)]
    plain = np.mean([metrics.frechet_distance(x, reference) for x in samples])
    extrapolated = np.mean([metrics.frechet_infinity(x, reference, seed=0) for x in samples])
    assert abs(extrapolated) < 0.1 * plain
    assert math.isnan(metrics.frechet_infinity(normal(127, 16, 8), reference, seed=0))


# --------------------------------------------------------------------------------------- KID
def mmd_by_hand(a, b):
    """The unbiased estimate as double sums over pairs."""
    n = len(a)
    m = len(b)
    both = np.concatenate([a, b])
    kernel = (both @ both.T / both.shape[1] + 1) ** 3
    np.fill_diagonal(kernel, 0)
    within_a = kernel[:n, :n].sum() / (n * (n - 1))
    within_b = kernel[n:, n:].sum() / (m * (m - 1))
    return within_a + within_b - 2 * kernel[:n, n:].mean()


def test_kernel_distance_equals_double_sums_and_jackknife(monkeypatch):
    """With unequal n and more rows than a chunk holds."""
    monkeypatch.setattr(metrics, "CHUNK", 4)
    a = normal(9, 5, 0)
    b = normal(13, 5, 1, 1.2, 0.2)
    without_a = [mmd_by_hand(np.delete(a, i, axis=0), b) for i in range(9)]
    without_b = [mmd_by_hand(a, np.delete(b, i, axis=0)) for i in range(13)]
    error = np.sqrt(8 * np.var(without_a) + 12 * np.var(without_b))
    expected = (mmd_by_hand(a, b), error)
    assert metrics.kernel_distance(a, b) == pytest.approx(expected, rel=1e-8)

    _, error_of_two = metrics.kernel_distance(a[:2], b)
    assert math.isnan(error_of_two)


def test_kernel_distance_is_unbiased():
    """Samples of one distribution: zero on average, within the error of 40 draws."""
    values = [metrics.kernel_distance(normal(8, 4, k), normal(8, 4, 99 + k))[0] for k in range(40)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(40)


# ---------------------------------------------------------------------- precision and recall
def test_precision_and_recall_by_hand(monkeypatch):
    """On a line, k = 1: balls around 0, 1, 3 have radii 1, 1, 2; the edge is inside."""
    monkeypatch.setattr(metrics, "CHUNK", 2)
    real = np.array([[0.0], [1.0], [3.0]])
    generated = np.array([[-1.0], [5.0], [5.5], [-1.25]])

    # The generated balls have radii 0.25, 0.5, 0.5, 0.25: no real point is that close.
    assert metrics.precision_recall(real, generated, k=1) == (0.5, 0.0)
    assert metrics.precision_recall(real, real.copy(), k=1) == (1.0, 1.0)
    assert metrics.precision_recall(real, np.full((4, 1), 1.0), k=1) == (1.0, 1 / 3)
    assert np.isnan(metrics.precision_recall(real, generated, k=3)).all()


def test_precision_of_copies():
    """Ten copies of one real image far from the origin: balls of radius 0, it on their edge."""
    real = normal(30, 24, 0, shift=100.3)
    copies = real[7:8].repeat(10, axis=0)
    assert metrics.precision_recall(real, copies, k=3) == (1.0, 1 / 30)


# -------------------------------------------------------------------------------------- SSIM
COLOUR = torch.randint(256, (10, 3, 28, 28), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize("images", [DIGITS[:10], COLOUR], ids=["grey", "colour"])
def test_ssim_equals_scikit_image(images):
    """The mean over pairs; the longer set is cut to the shorter."""
    by_hand = []
    for a, b in zip(images[:5].numpy(), images[5:].numpy(), strict=True):
        by_hand.append(structural_similarity(a, b, data_range=255, channel_axis=0))
    assert metrics.ssim(images[:5], images[5:]) == pytest.approx(np.mean(by_hand), abs=1e-9)
    assert metrics.ssim(images, images[:1]) == pytest.approx(1)


def test_ssim_of_flat_images():
    """No structure: (2 a b + c) / (a^2 + b^2 + c) with c = (0.01 * 255)^2."""
    dark = torch.full((1, 1, 28, 28), 60).byte()
    pale = torch.full((1, 1, 28, 28), 200).byte()
    c = 2.55**2
    expected = (2 * 60 * 200 + c) / (60**2 + 200**2 + c)
    assert metrics.ssim(dark, pale) == pytest.approx(expected, rel=1e-9)


def test_ssim_diversity_is_the_mean_over_pairs(monkeypatch):
    """Beyond SSIM_PAIRS over random ones, none of an image with itself."""
    few = DIGITS[:4]
    pairs = [metrics.ssim(few[i : i + 1], few[j : j + 1]) for i in range(4) for j in range(i)]
    assert metrics.ssim_diversity(few, seed=0) == pytest.approx(np.mean(pairs), abs=1e-9)

    all_pairs = metrics.ssim_diversity(DIGITS[:30], seed=0)
    monkeypatch.setattr(metrics, "SSIM_PAIRS", 300)  # of 435
    assert metrics.ssim_diversity(DIGITS[:30], seed=0) == pytest.approx(all_pairs, abs=0.03)

    monkeypatch.setattr(metrics, "SSIM_PAIRS", 2)  # of 6
    for seed in range(20):
        assert metrics.ssim_diversity(few, seed) <= max(pairs) + 1e-9


# ------------------------------------------------------------------------------------ copies
def test_nearest_image_and_its_distance(monkeypatch):
    """A copy is at 0 exactly; white against black is at 1; one grey level of 255 is 1 / 255."""
    monkeypatch.setattr(metrics, "CHUNK", 64)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    distance, index = metrics.nearest_images(DIGITS[order], DIGITS)
    assert (distance == 0).all()
    assert (index == order.numpy()).all()

    black = torch.zeros(1, 3, 28, 28).byte()
    white = torch.full((1, 3, 28, 28), 255).byte()
    distance, index = metrics.nearest_images(black, white)
    assert distance == pytest.approx([1])
    distance, index = metrics.nearest_images(black, torch.cat([white, black + 1]))
    assert distance == pytest.approx([1 / 255])
    assert index == [1]


def test_layout_is_of_equal_brightness_and_contrast():
    """A paler image is a copy of the original; a flat one is none of anything."""
    original = COLOUR[:1]
    paler = original // 2 + 60
    flat = torch.full((1, 3, 28, 28), 130).byte()
    paler_distance, index = metrics.nearest_images(paler, COLOUR, layout)
    flat_distance, _ = metrics.nearest_images(flat, COLOUR, layout)
    assert index == [0]
    assert paler_distance < 0.1
    noise = torch.randint(256, (2, 3, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    unrelated, _ = metrics.nearest_images(noise[:1], noise[1:], layout)
    assert unrelated == pytest.approx([2**0.5], abs=0.1)
    assert flat_distance > 1.3  # deviations

    values = layout(COLOUR).double()
    assert values.mean(dim=(1, 2, 3)).numpy() == pytest.approx(np.zeros(10), abs=0.1)
    assert values.std(dim=(1, 2, 3)).numpy() == pytest.approx(np.full(10, 255), rel=1e-2)


def test_nearest_of_many_is_the_nearest_of_all_pieces(monkeypatch):
    """Each image's nearest, wherever in the training set its piece is; the first of equals."""
    monkeypatch.setattr(metrics, "CHUNK", 7)
    training = torch.cat([DIGITS[:40], DIGITS[:40]])
    noise = torch.randint(-9, 10, DIGITS[:40].shape, generator=torch.Generator().manual_seed(1))
    images = (DIGITS[:40].int() + noise).clamp(0, 255).byte()
    distance, index = metrics.nearest_images(images, training)
    assert (index == np.arange(40)).all()

    difference = (images.double() - DIGITS[:40].double()).flatten(1)
    expected = difference.square().mean(dim=1).sqrt() / 255
    assert distance == pytest.approx(expected.numpy(), rel=1e-12)


# -------------------------------------------------------------------------------- extractors
def test_features_are_kept_by_what_they_were_made_of(tmp_path, capsys):
    """Same images, same weights: read from the file. One pixel or one weight more: computed."""
    model = metrics.build_classifier(channels=1, classes=10, seed=0).eval()
    extractor = metrics.classifier_extractor(model, "cpu")
    images = DIGITS[:6]
    features = metrics.cached_features(extractor, images, tmp_path)
    assert np.array_equal(features, extractor.features(images))
    assert extractor.features(images[:0]).shape == (0, 64)

    (file,) = tmp_path.iterdir()
    changed = {"features": torch.full((6, 64), 7.0).double()}
    torch.save(changed, file)
    assert (metrics.cached_features(extractor, images.clone(), tmp_path) == 7).all()

    other_images = images.clone()
    other_images[3, 0, 14, 14] ^= 1
    difference = np.abs(metrics.cached_features(extractor, other_images, tmp_path) - features)
    assert difference.max() < 1

    file.write_bytes(b"broken")
    capsys.readouterr()
    assert np.array_equal(metrics.cached_features(extractor, images, tmp_path), features)
    said = "".join(capsys.readouterr())
    assert f"{file}: not features of an earlier evaluation" in said and "made again" in said
    assert np.array_equal(torch.load(file)["features"].numpy(), features)

    extractor.model[0].weight.data[0, 0, 0, 0] += 1e-3
    assert (metrics.cached_features(extractor, images, tmp_path) != features).any()
    assert len([*tmp_path.iterdir()]) == 3


def test_classifier_is_trained_again_for_other_images(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "CLASSIFIER_STEPS", 2)
    labels = torch.arange(200) % 10
    before = torch.random.get_rng_state()

    def load(images, labels):
        train = metrics.Split(images[:150], labels[:150])
        tested_on = {"test": metrics.Split(images[150:], labels[150:])}
        model, _ = metrics.load_classifier("digits", tmp_path, train, tested_on, seed=0)
        return model[-1].weight

    first = load(DIGITS, labels)
    (file,) = tmp_path.iterdir()
    kept = file.read_bytes()
    assert torch.equal(load(DIGITS, labels), first)
    assert file.read_bytes() == kept

    assert not torch.equal(load(255 - DIGITS, labels), first)
    assert not torch.equal(load(DIGITS, labels.flip(0)), first)
    assert file.read_bytes() == kept
    assert len([*tmp_path.iterdir()]) == 3

    assert torch.equal(torch.random.get_rng_state(), before)  # nobody else's randomness moved
    with pytest.raises(UserError, match="single class.*--features none"):
        load(DIGITS, torch.zeros(200).long())


def test_scaled_features_leave_the_classes_as_they_are():
    """Their root mean square is 1, as KID's kernel expects."""
    model = metrics.build_classifier(channels=1, classes=10, seed=3).eval()
    before = model(to_float(DIGITS)).detach()
    metrics.scale_features(model, DIGITS)
    features = model[:-1](to_float(DIGITS)).detach()
    assert features.square().mean().sqrt().item() == pytest.approx(1, abs=1e-5)
    assert model(to_float(DIGITS)).detach().numpy() == pytest.approx(before.numpy(), abs=1e-5)


def test_scattering_sees_structure_that_spectra_do_not():
    """Dark discs, as nuclei, in noise: new ones are near, ones with the phases of noise are not.

    Where a tile is cut does not matter.
    """
    generator = torch.Generator().manual_seed(0)
    centres = 28 * torch.rand(2, 300, 5, 1, 1, generator=generator)  # x and y of five discs each
    noise = torch.randn(300, 3, 28, 28, generator=generator)
    row = torch.arange(28.0)
    is_disc = (centres[0] - row) ** 2 + (centres[1] - row[:, None]) ** 2 < 9  # (300, 5, 28, 28)
    colours = torch.tensor([30.0, 37.0, 20.0])[:, None, None]
    clean = 140 - colours * is_disc.any(dim=1, keepdim=True)  # (300, 3, 28, 28)

    # The same spectra with the phases of noise.
    phases = torch.fft.fft2(noise[:, :1]).sgn()
    phases[..., 0, 0] = 1
    scrambled = torch.fft.ifft2(torch.fft.fft2(clean) * phases).real

    discs = (clean + 5 * noise.flip(0)).round().byte()
    scrambled = (scrambled + 5 * noise.flip(0)).round().byte()
    extractor = scattering_extractor(discs[:200])
    train = extractor.features(discs[:200])
    new = extractor.features(discs[200:])
    other = extractor.features(scrambled[200:])
    assert train.shape == (200, 186)
    new_kid, _ = metrics.kernel_distance(new, train)
    other_kid, _ = metrics.kernel_distance(other, train)
    assert 20 * abs(new_kid) < other_kid

    rolled = discs[200:].roll((5, 9), dims=(2, 3))
    assert np.abs(extractor.features(rolled) - new).max() < 1e-6


def test_the_name_of_scattering_does_not_hang_on_last_bits(monkeypatch):
    """Those of exp and cos are others on another kind of machine."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 3, 28, 28), generator=generator, dtype=torch.uint8)
    name = str(scattering_extractor(images))
    waves = tissue.morlet_wavelets(28, 28)
    other = waves * (1 + 2**-52)
    assert not other.equal(waves)
    monkeypatch.setattr(tissue, "morlet_wavelets", lambda *_: other)
    assert str(scattering_extractor(images)) == name
    assert str(scattering_extractor(images.flip(0)[1:])) != name
