"""Every figure of cal_fid_ssim.py against a closed form, another library or an invariant."""

import numpy as np
import pytest
import torch
from scipy import linalg
from skimage.metrics import structural_similarity

import cal_fid_ssim as metrics
from cal_fid_ssim_medmnist import layout, scattering_extractor
from quantum_diffusion_mnist import UserError, load_images, to_float

DIGITS = load_images("digits", None)[1][:200]


def normal(n, d, seed, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) * scale + shift


@pytest.mark.parametrize("n, m", [(2, 5), (10, 400), (400, 10), (24, 24), (100, 300)])
@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_frechet_equals_matrix_square_root(n, m):
    """The textbook's formula with n - 1, full rank or not; zero for identical sets."""
    a, b = normal(n, 24, 4), normal(m, 24, 5, np.linspace(0.5, 2, 24), 0.3)
    assert metrics.frechet_distance(a, a.copy()) == pytest.approx(0, abs=1e-9)
    both = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected += np.trace(sum(both) - 2 * linalg.sqrtm(both[0] @ both[1])).real
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_survives_dead_and_nearly_dead_features():
    """Covariances that commute have a closed form: the squared difference of their roots. Dead
    directions, here not along the axes, make the textbook matrix root lose half of its digits."""
    scale = np.array([1, 1e-3, 1e-7, 0, 0, 2])
    basis = linalg.hadamard(8)[:, 1:7].astype(float)  # orthogonal columns of mean zero
    rotation = linalg.qr(normal(6, 6, 9))[0]
    a, b = basis * scale @ rotation, 1.001 * basis * scale @ rotation
    expected = (0.001 * scale) @ (0.001 * scale) * 8 / 7
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    a[2, 1] = np.nan
    with pytest.raises(UserError, match="not finite"):
        metrics.frechet_distance(a, b)


def test_frechet_infinity_removes_the_bias():
    """Standard normals against a set whose mean is exactly 0 and covariance exactly 1: the
    extrapolated value's mean is zero within its error, FID's is not."""
    reference = np.concatenate([np.eye(16), -np.eye(16)]) * np.sqrt(31 / 2)
    samples = [normal(200, 16, 100 + k) for k in range(12)]
    plain = np.mean([metrics.frechet_distance(x, reference) for x in samples])
    found = np.array([metrics.frechet_infinity(x, reference, 0) for x in samples])
    error = found.std(ddof=1) / np.sqrt(len(samples))
    assert abs(found.mean()) < 3 * error and plain > 10 * error
    assert np.isnan(metrics.frechet_infinity(normal(31, 16, 8), reference, 0))


def test_kernel_distance_equals_double_sums_and_jackknife(monkeypatch):
    """With unequal n and more rows than a chunk holds."""
    monkeypatch.setattr(metrics, "CHUNK", 4)

    def by_hand(a, b):
        n, m, both = len(a), len(b), np.concatenate([a, b])
        kernel = (both @ both.T / both.shape[1] + 1) ** 3
        np.fill_diagonal(kernel, 0)
        within = kernel[:n, :n].sum() / (n * (n - 1)) + kernel[n:, n:].sum() / (m * (m - 1))
        return within - 2 * kernel[:n, n:].mean()

    a, b = normal(9, 5, 0), normal(13, 5, 1, 1.2, 0.2)
    without_a = [by_hand(np.delete(a, i, 0), b) for i in range(9)]
    without_b = [by_hand(a, np.delete(b, i, 0)) for i in range(13)]
    error = np.sqrt(8 * np.var(without_a) + 12 * np.var(without_b))
    assert metrics.kernel_distance(a, b) == pytest.approx((by_hand(a, b), error), rel=1e-8)
    assert np.isnan(metrics.kernel_distance(a[:2], b)[1])


def test_precision_and_recall_by_hand(monkeypatch):
    """On a line, k = 1: balls around 0, 1, 3 have radii 1, 1, 2; the edge is inside."""
    real, generated = np.array([[0.0], [1.0], [3.0]]), np.array([[-1.0], [5.0], [5.5], [-1.25]])
    monkeypatch.setattr(metrics, "CHUNK", 2)
    # generated radii: -1: 0.25, 5: 0.5, 5.5: 0.5, -1.25: 0.25; no real point is that close
    assert metrics.precision_recall(real, generated, k=1) == (0.5, 0.0)
    assert metrics.precision_recall(real, real.copy(), k=1) == (1.0, 1.0)
    assert metrics.precision_recall(real, np.full((4, 1), 1.0), k=1) == (1.0, 1 / 3)
    assert np.isnan(metrics.precision_recall(real, generated, k=3)).all()
    # Ten copies of one real image far from the origin: balls of radius 0 with it on their edge
    real = normal(30, 24, 0, shift=100.3)
    assert metrics.precision_recall(real, real[7:8].repeat(10, axis=0), 3) == (1.0, 1 / 30)


def test_ssim_equals_scikit_image(monkeypatch):
    """Grey and colour; the longer set is cut to the shorter. Diversity is the mean over pairs, or
    beyond SSIM_PAIRS over random ones, none of an image with itself."""
    colour = torch.randint(256, (10, 3, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    for x in (DIGITS[:10], colour):
        by_hand = [
            structural_similarity(x[i].numpy(), x[i + 5].numpy(), data_range=255, channel_axis=0)
            for i in range(5)
        ]
        assert metrics.ssim(x[:5], x[5:]) == pytest.approx(np.mean(by_hand), abs=1e-9)
        assert metrics.ssim(x, x[:1]) == pytest.approx(1)
    few = DIGITS[:4]
    pairs = [metrics.ssim(few[i : i + 1], few[j : j + 1]) for i in range(4) for j in range(i)]
    assert metrics.ssim_diversity(few, 0) == pytest.approx(np.mean(pairs), abs=1e-9)
    every = metrics.ssim_diversity(DIGITS[:30], 0)
    monkeypatch.setattr(metrics, "SSIM_PAIRS", 300)  # of 435
    assert metrics.ssim_diversity(DIGITS[:30], 0) == pytest.approx(every, abs=0.03)
    monkeypatch.setattr(metrics, "SSIM_PAIRS", 2)  # of 6
    assert all(metrics.ssim_diversity(few, seed) <= max(pairs) + 1e-9 for seed in range(20))


def test_nearest_image_and_its_distance(monkeypatch):
    """A copy is at 0 exactly; white against black is at 1; one grey level of 255 is 1 / 255."""
    monkeypatch.setattr(metrics, "CHUNK", 64)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    distance, index = metrics.nearest_images(DIGITS[order], DIGITS)
    assert (distance == 0).all() and (index == order.numpy()).all()
    black, white = torch.zeros(1, 3, 28, 28).byte(), torch.full((1, 3, 28, 28), 255).byte()
    assert metrics.nearest_images(black, white)[0] == pytest.approx([1])
    assert metrics.nearest_images(black, torch.cat([white, black + 1]))[0] == pytest.approx(1 / 255)


def test_features_are_kept_by_what_they_were_made_of(tmp_path, capsys):
    """Same images, same weights: read from the file. One pixel or one weight more: computed."""
    model = metrics.build_classifier(1, 10, 0)[:-1].eval()
    extractor = metrics.Extractor("classifier", "", model, to_float, 1, "cpu")
    first, changed = extractor(DIGITS[:6], tmp_path), DIGITS[:6].clone()
    (file,) = tmp_path.iterdir()
    torch.save(torch.load(file) | {"state": torch.full((6, 64), 7.0).double()}, file)
    assert (extractor(DIGITS[:6].clone(), tmp_path) == 7).all()
    changed[3, 0, 14, 14] ^= 1
    assert np.abs(extractor(changed, tmp_path) - first).max() < 1
    file.write_bytes(b"broken")
    assert np.abs(extractor(DIGITS[:6], tmp_path) - first).max() < 1e-4
    assert f"{file}: not from the same images" in capsys.readouterr().out
    model[0].weight.data[0, 0, 0, 0] += 1e-3
    assert (extractor(DIGITS[:6], tmp_path) != first).any() and len([*tmp_path.iterdir()]) == 3


def test_classifier_is_trained_again_for_other_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "CLASSIFIER_STEPS", 2)
    labels, before = torch.arange(200) % 10, torch.random.get_rng_state()

    def load(images, labels):
        train, test = (images[:150], labels[:150]), (images[150:], labels[150:])
        model, _ = metrics.load_classifier("digits", tmp_path, train, test, 0)
        return model[-1].weight, capsys.readouterr().out

    (first, _), (again, said) = load(DIGITS, labels), load(DIGITS, labels)
    assert torch.equal(first, again) and said == ""
    assert "made again" in load(255 - DIGITS, labels)[1]
    assert "made again" in load(DIGITS, labels.flip(0))[1]
    assert torch.equal(torch.random.get_rng_state(), before)  # nobody else's randomness moved
    with pytest.raises(UserError, match="single class.*--features none"):
        load(DIGITS, torch.zeros(200).long())


def test_scattering_sees_structure_that_spectra_do_not():
    """Dark discs, as nuclei, in noise: new ones are near, ones with the phases of noise are not;
    where a tile is cut does not matter."""
    generator = torch.Generator().manual_seed(0)
    centres, row = 28 * torch.rand(2, 300, 5, 1, 1, generator=generator), torch.arange(28.0)
    discs = (centres[0] - row) ** 2 + (centres[1] - row[:, None]) ** 2 < 9
    colours, noise = torch.tensor([30.0, 37, 20]), torch.randn(300, 3, 28, 28, generator=generator)
    discs = 140 - colours[:, None, None] * discs.any(1, keepdim=True)
    phases = torch.fft.fft2(noise[:, :1]).sgn()
    phases[..., 0, 0] = 1
    scrambled = torch.fft.ifft2(torch.fft.fft2(discs) * phases).real
    discs, scrambled = ((x + 5 * noise.flip(0)).round().byte() for x in (discs, scrambled))
    extractor = scattering_extractor(discs[:200])
    train, new, other = map(extractor, (discs[:200], discs[200:], scrambled[200:]))
    kid = [metrics.kernel_distance(x, train)[0] for x in (new, other)]
    assert 20 * abs(kid[0]) < kid[1] and train.shape == (200, 186), kid
    assert np.abs(extractor(discs[200:].roll((5, 9), (2, 3))) - new).max() < 1e-6
    others = torch.cat([discs[:1] // 2 + 60, torch.full((1, 3, 28, 28), 130).byte()])  # paler, flat
    assert (metrics.nearest_images(*map(layout, (others, discs)))[0] < [0.1, 0.9]).tolist() == [
        1,
        0,
    ]
