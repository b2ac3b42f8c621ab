"""Every figure of cal_fid_ssim.py against a closed form, another library or an invariant."""

import numpy as np
import pytest
import torch
from scipy import linalg
from skimage.metrics import structural_similarity
from torchvision.models import inception_v3

import cal_fid_ssim as metrics
from quantum_diffusion_mnist import UserError, load_images, to_float


def normal(n, d, seed, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) * scale + shift


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", None)[1]


# ------------------------------------------------------------------------------------ Fréchet


def test_frechet_of_shifted_set_is_squared_shift():
    """Equal covariances: only the means' distance is left, whether n > d or n < d."""
    shift = np.arange(8) / 4
    for n in (5, 200):
        a = normal(n, 8, 0)
        assert metrics.frechet_distance(a, a + shift) == pytest.approx((shift**2).sum(), rel=1e-10)


def test_frechet_in_one_dimension():
    """(mean difference)^2 + (difference of the standard deviations)^2, with n - 1."""
    a, b = normal(50, 1, 1, 2.0), normal(70, 1, 2, 0.5, 3.0)
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    "n, m", [(2, 5), (5, 5), (10, 400), (400, 10), (24, 24), (25, 400), (100, 300)]
)
def test_frechet_equals_matrix_square_root(n, m):
    """Equal to the textbook formula, full rank or not; zero for identical sets."""
    a, b = normal(n, 24, 4), normal(m, 24, 5, np.linspace(0.5, 2, 24), 0.3)
    assert metrics.frechet_distance(a, a.copy()) == pytest.approx(0, abs=1e-9)
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    cross = linalg.sqrtm(cov_a @ cov_b)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * cross).real
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


def test_frechet_refuses_features_that_are_not_finite():
    bad = normal(5, 3, 0)
    bad[2, 1] = np.nan
    with pytest.raises(UserError, match="not finite"):
        metrics.frechet_distance(bad, normal(5, 3, 0))


def test_frechet_infinity_removes_the_bias():
    """d = 16 unit normals: the extrapolated value's mean is zero within its error, FID's is not."""
    reference = normal(20_000, 16, 6)
    samples = [normal(200, 16, 100 + k) for k in range(12)]
    plain = np.array([metrics.frechet_distance(x, reference) for x in samples])
    extrapolated = np.array([metrics.frechet_infinity(x, reference, 0) for x in samples])
    error = extrapolated.std(ddof=1) / np.sqrt(len(samples))
    assert abs(extrapolated.mean()) < 3 * error
    assert plain.mean() > 10 * error
    shifted = metrics.frechet_infinity(normal(4000, 16, 7, shift=0.5), reference, 0)
    assert shifted == pytest.approx(16 * 0.25, rel=0.05)
    assert np.isnan(metrics.frechet_infinity(normal(31, 16, 8), reference, 0))


# ---------------------------------------------------------------------------------------- KID


def kernel_by_hand(a, b):
    """The unbiased estimator, written as its double sums."""

    def k(x, y):
        return (x @ y / len(x) + 1) ** 3

    n, m = len(a), len(b)
    aa = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    bb = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return aa + bb - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


def test_kernel_distance_equals_double_sums_and_jackknife(monkeypatch):
    """Value and standard error against loops, with unequal n and more rows than a chunk holds."""
    monkeypatch.setattr(metrics, "CHUNK", 4)
    a, b = normal(9, 5, 0), normal(13, 5, 1, 1.2, 0.2)
    value, error = metrics.kernel_distance(a, b)
    assert value == pytest.approx(kernel_by_hand(a, b), rel=1e-10)
    left_a = np.array([kernel_by_hand(np.delete(a, i, 0), b) for i in range(9)])
    left_b = np.array([kernel_by_hand(a, np.delete(b, i, 0)) for i in range(13)])
    variance = 8 / 9 * ((left_a - left_a.mean()) ** 2).sum()
    variance += 12 / 13 * ((left_b - left_b.mean()) ** 2).sum()
    assert error == pytest.approx(np.sqrt(variance), rel=1e-8)


def test_kernel_distance_is_unbiased_and_its_error_is_right():
    """Equal distributions: the mean over draws is zero within its error. Unequal ones: the
    spread over draws is the standard error that each draw states."""
    null = np.array([metrics.kernel_distance(normal(40, 6, k), normal(60, 6, 500 + k))[0]
                     for k in range(120)])  # fmt: skip
    assert abs(null.mean()) < 3 * null.std(ddof=1) / np.sqrt(len(null))
    draws = np.array([metrics.kernel_distance(normal(80, 6, k), normal(80, 6, 500 + k, shift=0.7))
                      for k in range(120)])  # fmt: skip
    assert draws[:, 1].mean() == pytest.approx(draws[:, 0].std(ddof=1), rel=0.2)


# ------------------------------------------------------------------------- precision and recall


def test_precision_and_recall_by_hand(monkeypatch):
    """On a line, k = 1: balls around 0, 1, 3 have radii 1, 1, 2; the edge is inside."""
    monkeypatch.setattr(metrics, "CHUNK", 2)
    real = np.array([[0.0], [1.0], [3.0]])
    generated = np.array([[-1.0], [5.0], [5.5], [-1.25]])
    precision, recall = metrics.precision_recall(real, generated, k=1)
    # generated radii: -1: 0.25, 5: 0.5, 5.5: 0.5, -1.25: 0.25; no real point is that close
    assert (precision, recall) == (0.5, 0.0)
    assert metrics.precision_recall(real, real.copy(), k=1) == (1.0, 1.0)
    assert metrics.precision_recall(real, np.full((4, 1), 1.0), k=1) == (1.0, 1 / 3)
    assert np.isnan(metrics.precision_recall(real, generated, k=3)[0])


def test_precision_of_collapsed_samples():
    """Ten copies of one real image far from the origin: balls of radius 0, with that
    image on their edge: exactly it is recalled."""
    real = normal(30, 24, 0, shift=100.3)
    assert metrics.precision_recall(real, real[7:8].repeat(10, axis=0), 3) == (1.0, 1 / 30)


# --------------------------------------------------------------------------- other libraries


def test_values_equal_other_libraries():
    """torch-fidelity, pytorch-fid and torchmetrics on the same features."""
    pytest.importorskip("torch_fidelity")
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    torchmetrics_fid = pytest.importorskip("torchmetrics.image.fid")
    torchmetrics_kid = pytest.importorskip("torchmetrics.image.kid")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = (torch.from_numpy(normal(300, 24, k, 1 + k / 10, k / 10)).float() for k in (0, 1))
    a, b = x.double().numpy(), y.double().numpy()
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (x, y)), verbose=False)
    fids = [theirs["frechet_inception_distance"]]
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    fids.append(
        fid_score.calculate_frechet_distance(a.mean(0), covariances[0], b.mean(0), covariances[1])
    )
    u, v = torch.from_numpy(a), torch.from_numpy(b)
    fids.append(torchmetrics_fid._compute_fid(u.mean(0), u.T.cov(), v.mean(0), v.T.cov()).item())
    assert [metrics.frechet_distance(a, b)] * 3 == pytest.approx(fids, rel=1e-6)
    options = {"kid_subsets": 1, "kid_subset_size": 300, "verbose": False}
    kids = [kid_features_to_metric(u, v, **options)["kernel_inception_distance_mean"]]
    kids.append(torchmetrics_kid.poly_mmd(u, v).item())
    assert [metrics.kernel_distance(a, b)[0]] * 2 == pytest.approx(kids, rel=1e-6)
    theirs = prc_features_to_metric(y, x, prc_neighborhood=3, verbose=False)
    ours = metrics.precision_recall(a, b, 3)
    assert ours == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert 0 < ours[0] < 1 and 0 < ours[1] < 1


# --------------------------------------------------------------------------------------- SSIM


def test_ssim_equals_scikit_image(digits):
    """Grey and colour; the longer set is cut to the shorter."""
    rgb = torch.randint(0, 256, (10, 3, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    for x in (digits[:10], rgb):
        by_hand = [
            structural_similarity(x[i].numpy(), x[i + 5].numpy(), data_range=255, channel_axis=0)
            for i in range(5)
        ]
        assert metrics.ssim(x[:5], x[5:]) == pytest.approx(np.mean(by_hand), abs=1e-9)
        assert metrics.ssim(x, x[:1]) == pytest.approx(1)


def test_ssim_diversity(digits, monkeypatch):
    few = digits[:4]
    pairs = [metrics.ssim(few[i : i + 1], few[j : j + 1]) for i in range(4) for j in range(i)]
    assert metrics.ssim_diversity(few, 0) == pytest.approx(np.mean(pairs), abs=1e-9)
    assert metrics.ssim_diversity(digits[:1].expand(6, -1, -1, -1), 0) == pytest.approx(1)
    every = metrics.ssim_diversity(digits[:30], 0)
    monkeypatch.setattr(metrics, "SSIM_PAIRS", 300)  # of 435
    assert metrics.ssim_diversity(digits[:30], 0) == pytest.approx(every, abs=0.03)
    monkeypatch.setattr(metrics, "SSIM_PAIRS", 2)  # of 6: never an image with itself
    assert all(metrics.ssim_diversity(few, seed) <= max(pairs) + 1e-9 for seed in range(20))


# ------------------------------------------------------------------------------- memorisation


def test_nearest_image_and_its_distance(digits, monkeypatch):
    """A copy is at 0 exactly; white against black is at 1; one grey level of 255 is 1 / 255."""
    monkeypatch.setattr(metrics, "CHUNK", 64)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    distance, index = metrics.nearest_images(digits[:200][order], digits[:200])
    assert (distance == 0).all() and (index == order.numpy()).all()
    black, white = torch.zeros(1, 3, 28, 28).byte(), torch.full((1, 3, 28, 28), 255).byte()
    assert metrics.nearest_images(black, white)[0] == pytest.approx([1])
    assert metrics.nearest_images(black, black + 1)[0] == pytest.approx([1 / 255])


# ---------------------------------------------------------------------------------- extractors


def test_inception_features(digits, tmp_path):
    """2,048 features; batch 1 equals batch 32; grey equals its three equal channels; equal to
    torchvision's own model and preprocessing put together by hand."""
    path = tmp_path / "inception.pth"  # as torchvision stores them, with the auxiliary head
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = inception_v3(init_weights=False, transform_input=True).eval()
    torch.save(model.state_dict(), path)
    extractor = metrics.inception_extractor(path, "cpu")
    images = digits[:3]
    together = extractor(images, batch=32)
    assert together.shape == (3, 2048) and together.dtype == np.float64
    scale = np.abs(together).max()
    assert np.abs(extractor(images[:2], batch=1) - together[:2]).max() < 1e-5 * scale
    colour = torch.cat([images[:2], images[:2] // 2, 255 - images[:2]], dim=1)
    model.fc = torch.nn.Identity()
    pixels = torch.nn.functional.interpolate(
        colour / 255, size=(342, 342), mode="bilinear", antialias=True
    )
    pixels = (pixels * 255).round() / 255  # torchvision resizes uint8 images to uint8
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.inference_mode():
        expected = model((pixels[..., 21:320, 21:320] - mean) / deviation).numpy()
    assert np.abs(expected - extractor(colour)).max() < 0.02 * scale
    assert np.abs(together[0] - together[1]).max() > 0.05 * scale
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "wrong.pth")
    (tmp_path / "text.pth").write_text("not weights")
    for name in ("wrong", "text", "missing"):
        with pytest.raises(UserError, match="--inception_weights FILE.*--features classifier"):
            metrics.inception_extractor(tmp_path / f"{name}.pth", "cpu")


def test_what_is_computed_once_is_kept_by_what_it_was_made_of(digits, tmp_path, capsys):
    """Same images, same weights: read from the file. One pixel or one weight more: computed."""
    model = metrics.build_classifier(1, 10, 0)[:-1].eval()
    extractor = metrics.Extractor("classifier", "", model, to_float, 1, "cpu")
    images = digits[:6]
    first = extractor(images, tmp_path)
    (file,) = tmp_path.iterdir()
    kept = torch.load(file, weights_only=True)
    torch.save(kept | {"state": torch.full((6, 64), 7.0)}, file)
    assert (extractor(images.clone(), tmp_path) == 7).all()
    changed = images.clone()
    changed[3, 0, 14, 14] ^= 1
    assert np.abs(extractor(changed, tmp_path) - first).max() < 1
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1e-3
    assert (extractor(images, tmp_path) != 7).any() and len([*tmp_path.iterdir()]) == 3
    file.write_bytes(b"broken")
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] -= 1e-3
    assert np.abs(extractor(images, tmp_path) - first).max() < 1e-4
    assert f"{file}: not from the same images" in capsys.readouterr().out


def test_classifier_is_trained_again_for_other_images(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "CLASSIFIER_STEPS", 2)
    labels, before = torch.arange(200) % 10, torch.random.get_rng_state()

    def load(images, labels=labels, seed=0):
        train, test = (images[:150], labels[:150]), (images[150:], labels[150:])
        model, _ = metrics.load_classifier("digits", tmp_path, train, test, seed)
        return model[-1].weight, capsys.readouterr().out

    first, _ = load(digits[:200])
    again, said = load(digits[:200])
    assert torch.equal(first, again) and said == ""
    assert "made again" in load(255 - digits[:200])[1]
    assert "made again" in load(digits[:200], labels.flip(0))[1]
    monkeypatch.setattr(metrics, "CLASSIFIER_STEPS", 3)
    assert "made again" in load(digits[:200])[1]
    assert torch.equal(torch.random.get_rng_state(), before)  # nobody else's randomness moved
    with pytest.raises(UserError, match="single class"):
        load(digits[:200], torch.zeros(200).long())
