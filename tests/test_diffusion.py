"""Noise schedule, forward process, sampler, U-Net, optimizers and training."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import leave_zero
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import quantum_diffusion_mnist as qd

IMAGES = torch.randint(256, (6, 1, 28, 28), generator=torch.Generator().manual_seed(0)).byte()


# ------------------------------------------------------------------------- the forward process


def test_cosine_schedule_by_the_formula():
    betas = qd.cosine_beta_schedule(10)

    def alpha_bar(t):
        return math.cos((t / 10 + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [min(1 - alpha_bar(t) / alpha_bar(t - 1), 0.999) for t in range(1, 11)]
    assert betas.tolist() == pytest.approx(expected, abs=1e-14)
    assert betas[-1] == 0.999
    assert qd.cosine_beta_schedule(1000).max() == 0.999


def test_q_sample_and_v_by_hand():
    alpha_bar = torch.cumprod(1 - qd.cosine_beta_schedule(10), 0)
    x0 = torch.full((2, 1, 2, 2), 0.5)
    noise = torch.full((2, 1, 2, 2), -2.0)
    t = torch.tensor([0, 7])
    x, v = qd.GaussianDiffusion(10).q_sample(x0, t, noise)
    for k, a in enumerate(alpha_bar[t].tolist()):
        alpha = math.sqrt(a)
        sigma = math.sqrt(1 - a)
        assert x[k].unique().tolist() == pytest.approx([alpha * 0.5 - 2 * sigma], abs=1e-6)
        assert v[k].unique().tolist() == pytest.approx([-2 * alpha - sigma * 0.5], abs=1e-6)


# ---------------------------------------------------------------------------------- the sampler


class Denoiser:
    """A model without weights, which takes the image to be x0(x, t); it keeps what it was asked."""

    def __init__(self, diffusion, x0):
        self.diffusion = diffusion
        self.x0 = x0
        self.asked = []

    def __call__(self, x, t):
        self.asked.append((t.unique().item(), x.double()))
        alpha = self.diffusion.alpha[t]
        sigma = self.diffusion.sigma[t]
        return (alpha * x - self.x0(x, t[0])) / sigma


def normal_noise(seed=0):
    """A function that draws normal noise like its argument, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator)


def log_snr_of(diffusion):
    """lambda = log(alpha / sigma), (T,) float64."""
    return (diffusion.alpha_bar / (1 - diffusion.alpha_bar)).log() / 2


@pytest.mark.parametrize("timesteps, steps", [(1000, 50), (1000, 8), (50, 40), (9, 9), (5, 1)])
def test_levels_fall_from_pure_noise_without_repetition(timesteps, steps):
    diffusion = qd.GaussianDiffusion(timesteps)
    levels = diffusion.sampling_levels(steps)
    assert levels[0] == timesteps - 1
    assert (levels.diff() < 0).all()
    assert steps == 1 or levels[-1] == 0
    if timesteps == 1000:
        log_snr = log_snr_of(diffusion)
        wanted = torch.linspace(math.asinh(-6), log_snr[0].asinh(), steps)
        assert len(levels) == steps
        assert (log_snr[levels].asinh() - wanted)[1:].abs().max() < 0.03
    else:
        assert steps // 2 <= len(levels) <= steps


@pytest.mark.parametrize("timesteps, steps", [(1000, 8), (50, 40), (9, 9), (300, 2), (5, 1)])
def test_every_step_of_the_sampler_is_the_posterior(timesteps, steps):
    # With x0 linear in lambda, the second order takes it from the middle of the step; the first
    # step has the x0 where it starts. Given x0, q(x_s | x_t, x0) is a product of two Gaussians,
    # whose precisions add (Ho et al., eq. 6 and 7).
    diffusion = qd.GaussianDiffusion(timesteps)
    log_snr = log_snr_of(diffusion)
    alpha_bar = diffusion.alpha_bar
    drawn = []

    def draw_noise(x):
        drawn.append(torch.randn_like(x))
        return drawn[-1]

    model = Denoiser(diffusion, lambda x, t: 0.1 + 0.04 * log_snr[t].float().expand(x.shape))
    x_T = torch.randn(2, 1, 28, 28)
    result = diffusion.sample(model, x_T, steps, draw_noise)

    levels, states = zip(*model.asked, strict=True)
    assert list(levels) == diffusion.sampling_levels(steps).tolist()
    assert torch.equal(states[0].float(), x_T)
    assert len(drawn) == len(levels) - 1
    for k, (t, s) in enumerate(zip(levels, levels[1:], strict=False)):
        beta = 1 - alpha_bar[t] / alpha_bar[s]
        h = log_snr[s] - log_snr[t]
        x0 = 0.1 + 0.04 * (log_snr[t] + (h / 2 if k else 0))

        precision = (1 - beta) / beta + 1 / (1 - alpha_bar[s])
        from_x = (1 - beta).sqrt() / beta * states[k]
        from_x0 = alpha_bar[s].sqrt() / (1 - alpha_bar[s]) * x0
        mean = (from_x + from_x0) / precision
        expected = mean + 1.01 * drawn[k] / precision.sqrt()
        assert (states[k + 1] - expected).abs().max() < 2e-5, k
    assert (result - (0.1 + 0.04 * log_snr[levels[-1]])).abs().max() < 1e-5


def test_images_are_clipped_at_the_end_alone():
    diffusion = qd.GaussianDiffusion(100)
    bright = Denoiser(diffusion, lambda x, t: torch.full_like(x, 1.5))
    result = diffusion.sample(bright, torch.randn(2, 1, 28, 28), 10)
    assert result.eq(1).all()
    assert bright.asked[-1][1].mean() > 1.2


def gaussian_images(steps):
    """Images by the exact denoiser of pixels x0 ~ N(0.3, 0.2^2), whose mean given x_t is known."""
    diffusion = qd.GaussianDiffusion(1000)

    def posterior_mean(x, t):
        alpha = diffusion.alpha[t]
        sigma = diffusion.sigma[t]
        gain = alpha * 0.04 / (alpha**2 * 0.04 + sigma**2)
        return 0.3 + gain * (x - alpha * 0.3)

    x_T = normal_noise(seed=1)(torch.empty(128, 1, 28, 28))
    return diffusion.sample(Denoiser(diffusion, posterior_mean), x_T, steps, normal_noise())


def test_sampler_draws_from_a_gaussian_and_is_of_second_order(monkeypatch):
    with_more_noise = gaussian_images(50).std().item()  # by 1 %
    monkeypatch.setattr(qd.GaussianDiffusion, "NOISE_SCALE", 1.0)
    fine = gaussian_images(200)
    assert fine.mean().item() == pytest.approx(0.3, abs=0.002)
    assert fine.std().item() == pytest.approx(0.2, abs=0.002)

    # Half the steps make four times the error.
    error25, error50 = (gaussian_images(steps).std().item() - 0.2 for steps in (25, 50))
    assert 0 < error50 < 0.007
    assert error25 == pytest.approx(4 * error50, rel=0.25)
    assert with_more_noise / (0.2 + error50) == pytest.approx(1.01, abs=0.001)


# ------------------------------------------------------------------------------------ the U-Net


def test_timestep_embedding_by_hand():
    row = qd.timestep_embedding(torch.tensor([0, 7]), 4)[1]
    expected = [math.sin(7), math.sin(0.07), math.cos(7), math.cos(0.07)]
    assert row.tolist() == pytest.approx(expected, abs=1e-6)


def test_residual_block_by_hand():
    block = leave_zero(qd.ResBlock(16, 5))
    x = torch.randn(3, 16, 7, 7)
    embedding = torch.randn(3, 5)

    def group_norm(h, layer):
        groups = h.view(3, 8, 2, 7, 7)
        mean = groups.mean((2, 3, 4), keepdim=True)
        variance = groups.var((2, 3, 4), keepdim=True, unbiased=False)
        normal = ((groups - mean) / (variance + 1e-5).sqrt()).view(h.shape)
        return normal * layer.weight[:, None, None] + layer.bias[:, None, None]

    def silu(h):
        return h * h.sigmoid()

    def convolve(h, layer):
        return F.conv2d(h, layer.weight, layer.bias, padding=1)

    both = embedding @ block.modulation.weight.T + block.modulation.bias
    scale = both[:, :16, None, None]
    shift = both[:, 16:, None, None]
    h = convolve(silu(group_norm(x, block.norm1)), block.conv1)
    h = group_norm(h, block.norm2) * (1 + scale) + shift
    expected = x + convolve(silu(h), block.conv2)
    assert torch.allclose(block(x, embedding), expected, atol=1e-5)
    assert (expected - x).abs().max() > 0.1


def test_self_attention_by_hand():
    layer = leave_zero(qd.SelfAttention(16))
    x = torch.randn(1, 16, 3, 3)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2)[0].view(3, 4, 4, 9)
    mixed = v @ (q.mT @ k / math.sqrt(4)).softmax(-1).mT  # (heads, 4, 9 positions)
    assert torch.allclose(layer(x), x + layer.out(mixed.reshape(1, 16, 3, 3)), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_unet_uses_every_layer_both_skips_and_the_time(channels):
    unet = leave_zero(qd.UNet(channels))
    blocks = [block for block in unet.modules() if isinstance(block, qd.ResBlock)]
    embeddings = []
    for block in blocks:
        block.register_forward_pre_hook(lambda _, inputs: embeddings.append(inputs[1].detach()))

    x = torch.randn(2, channels, 28, 28)
    out = unet(x, torch.tensor([10, 900]))
    assert out.shape == x.shape
    assert len(embeddings) == len(blocks) == 4
    assert all((first - second).abs().max() > 0.01 for first, second in embeddings)

    (100 * out.square().mean()).backward()
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            for dim in (0, 1):
                for half in parameter.grad.chunk(2, dim):
                    assert half.abs().max() > 1e-4, name


# ----------------------------------------------------------------------------------- optimizers


def newton_schulz(matrix):
    """Three steps of Jordan's iteration, in float64."""
    x = matrix.double()
    x = x / x.norm()
    for _ in range(3):
        a = x @ x.mT
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x


@pytest.mark.parametrize("shape", [(48, 48), (16, 80), (80, 16), (1, 5)])
def test_orthogonalize_by_its_iteration(shape):
    matrix = torch.randn(shape)
    ours = qd.orthogonalize(matrix)
    expected = newton_schulz(matrix)
    assert (ours - expected).norm() < 1e-4 * expected.norm()

    # And of a matrix that is well conditioned all singular values come near 1.
    if shape == (16, 80):
        singular = torch.linalg.svdvals(ours)
        assert singular.min() > 0.6
        assert singular.max() < 1.3


@pytest.mark.parametrize("shape", [(48, 48, 3, 3), (48, 4, 3, 3), (64, 64, 1, 1)])
def test_muon_by_its_iteration_in_float64(shape):
    weight = torch.nn.Parameter(torch.randn(shape))
    muon = qd.Muon([weight], lr=0.1)
    buffer = 0
    for _ in range(3):
        before = weight.detach().flatten(1).clone()
        weight.grad = torch.randn(shape)
        muon.step()

        gradient = weight.grad.flatten(1).double()
        buffer = 0.95 * buffer + 0.05 * gradient
        nesterov = 0.95 * buffer + 0.05 * gradient
        rows, columns = gradient.shape
        change = -0.1 * max(1, rows / columns) ** 0.5 * newton_schulz(nesterov)
        assert (weight.detach().flatten(1) - before - change).norm() < 1e-4 * change.norm()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
@pytest.mark.parametrize("shape", [(48, 48), (80, 16), (16, 80)])
def test_muon_is_torchs(shape):
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    optimizers = [
        qd.Muon([ours], lr=0.1),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0, momentum=0.95, ns_steps=3),
    ]
    for _ in range(4):
        gradient = torch.randn(shape)
        ours.grad = gradient.clone()
        theirs.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = theirs.detach() - start
    assert (ours - theirs).norm() < 0.02 * moved.norm()  # theirs iterates in bfloat16


def test_muon_has_the_inner_convolutions_and_adam_the_rest():
    settings = qd.Settings("frozen", n_qubits=3, n_layers=1, lr=0.25, muon_lr=0.5)
    unet = qd.make_unet(1, settings)
    adam, muon = qd.make_optimizers(unet, settings)
    ids = {id(p): name for name, p in unet.named_parameters()}
    of_adam = {ids[id(p)] for group in adam.param_groups for p in group["params"]}
    of_muon = {ids[id(p)] for group in muon.param_groups for p in group["params"]}

    outer = {"stem.weight", "head.weight"}
    convolutions = {name for name, p in unet.named_parameters() if p.ndim == 4}
    assert of_muon == convolutions - outer
    assert len(of_muon) == 14
    assert of_adam == set(ids.values()) - of_muon - {"gate.weights"}  # frozen
    assert adam.param_groups[0]["lr"] == 0.25
    assert muon.param_groups[0]["lr"] == 0.5


def test_learning_rates_by_hand():
    shares = [qd.learning_rate_factor(step, 2000) for step in (0, 4, 49, 99, 1000, 1500, 1999)]
    assert shares == pytest.approx([0.01, 0.05, 0.5, 0.9505, 0.5, 0.25, 0.0005], abs=1e-12)
    assert qd.learning_rate_factor(0, 1) == 1
    assert qd.learning_rate_factor(0, 50) == pytest.approx(0.2)


def test_decay_of_the_average_by_hand():
    decays = [qd.warmed_up_decay(step, 0.995) for step in (0, 8, 90, 10**6)]
    assert decays == pytest.approx([0.1, 0.5, 0.91, 0.995])


# ---------------------------------------------------------------------------- batches and noise


def test_batches_cover_the_set_once_an_epoch():
    settings = qd.Settings(seed=3, batch_size=4, steps=6)
    order = qd.training_order(settings, 6)
    assert order.shape == (6, 4)
    epochs = order.view(4, 6).tolist()
    assert all(sorted(epoch) == [0, 1, 2, 3, 4, 5] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4

    # More steps begin alike, another seed does not.
    longer = qd.training_order(qd.Settings(seed=3, batch_size=4, steps=9), 6)
    assert torch.equal(longer[:6], order)
    other = qd.training_order(qd.Settings(seed=4, batch_size=4, steps=6), 6)
    assert not torch.equal(other, order)


def test_timesteps_are_stratified_and_every_step_has_its_noise():
    settings = qd.Settings(seed=3, timesteps=100)
    x0 = torch.zeros(4, 1, 28, 28)
    draws = [qd.training_noise(settings, x0, step) for step in range(50)]
    for t, noise in draws:
        assert [timestep // 25 for timestep in t.tolist()] == [0, 1, 2, 3]
        assert noise.shape == x0.shape
        assert noise.std().item() == pytest.approx(1, abs=0.1)
    assert len({noise.sum().item() for _, noise in draws}) == 50

    # Everywhere in its part: 50 draws of 25 timesteps leave few out.
    assert len({int(t[1]) for t, _ in draws}) > 15
    t, noise = qd.training_noise(settings, x0, 7)
    assert torch.equal(t, draws[7][0])
    assert torch.equal(noise, draws[7][1])


# ------------------------------------------------------------------------------------- training


class Stop(Exception):
    """Ends a training that has been watched long enough."""


def watch(settings, folder, monkeypatch, steps):
    """Trains for some steps. Returns the state dicts and losses as checkpointed after each."""
    seen = []

    def save_checkpoint(folder, run_hash, state, losses):
        contents = {name: part.state_dict() for name, part in state.items()}
        model = {name: value.clone() for name, value in contents["model"].items()}
        average = {name: value.clone() for name, value in contents["average"].items()}
        gradients = {name: p.grad.clone() for name, p in state["model"].named_parameters()}
        seen.append((model, average, gradients, losses.clone()))
        if len(seen) == steps:
            raise Stop

    monkeypatch.setattr(qd, "CHECKPOINT_STEPS", 1)
    monkeypatch.setattr(qd, "save_checkpoint", save_checkpoint)
    with pytest.raises(Stop):
        qd.train(settings, IMAGES, folder, "hash")
    return seen


def test_first_step_by_hand(tmp_path, monkeypatch):
    settings = qd.Settings(
        seed=4, steps=50, batch_size=4, timesteps=100, lr=0.01, muon_lr=0.03, n_frames=1
    )
    before = qd.make_unet(1, settings).state_dict()
    ((model, average, gradients, losses),) = watch(settings, tmp_path, monkeypatch, 1)

    # The model starts at zero, so that the loss is the mean square of v.
    x0 = qd.to_float(IMAGES[qd.training_order(settings, len(IMAGES))[0]])
    t, noise = qd.training_noise(settings, x0, 0)
    x_t, v = qd.GaussianDiffusion(100).q_sample(x0, t, noise)
    assert losses.tolist() == pytest.approx([v.square().mean().item()], rel=1e-5)

    # Adam's first step is the sign of the gradient; the warm-up's first rate is a fifth.
    gradient = gradients["head.weight"]
    moved = model["head.weight"] - before["head.weight"]
    sure = gradient.abs() > 1e-5
    assert sure.float().mean() > 0.9
    assert torch.allclose(moved[sure], -0.002 * gradient[sure].sign(), rtol=2e-3)

    # Muon's is orthogonal; only the last convolution has a gradient as yet.
    assert torch.equal(model["down.0.weight"], before["down.0.weight"])
    assert torch.allclose(
        average["head.weight"], 0.1 * before["head.weight"] + 0.9 * model["head.weight"]
    )


def test_second_step_of_muon_by_hand(tmp_path, monkeypatch):
    settings = qd.Settings(steps=50, batch_size=4, timesteps=100, muon_lr=0.03, n_frames=1)
    first, second = watch(settings, tmp_path, monkeypatch, 2)
    gradient = second[2]["down.0.weight"].flatten(1)
    moved = (second[0]["down.0.weight"] - first[0]["down.0.weight"]).flatten(1)
    rows, columns = gradient.shape
    expected = -0.03 * 0.4 * max(1, rows / columns) ** 0.5 * newton_schulz(gradient)
    assert (moved - expected).norm() < 1e-3 * expected.norm()


def test_average_by_hand(tmp_path, monkeypatch):
    settings = qd.Settings(steps=2000, batch_size=2, timesteps=10, ema_decay=0.3, lr=1, n_frames=1)
    expected = qd.make_unet(1, settings).head.weight.detach().double()
    for k, (model, average, _, _) in enumerate(watch(settings, tmp_path, monkeypatch, 6)):
        decay = min(0.3, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * model["head.weight"].double()
        assert torch.allclose(average["head.weight"].double(), expected, atol=1e-6)


class Operations(TorchDispatchMode):
    """Records the names of all operations, those of the backward pass too."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        self.names.add(name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    "arm, conditions",
    [
        ("matched", {}),
        ("product", {}),
        ("reupload", {}),
        ("brickwork", {}),
        ("quantum", {"shots": 4, "gate_noise": (0.1, 0.1)}),
    ],
)
def test_a_step_never_makes_the_host_wait_for_the_device(arm, conditions, tmp_path, monkeypatch):
    # Reading a value (.item(), if) and masks synchronise CUDA; so does a tensor built from a list.
    # The first step may: it makes what stays constant.
    settings = qd.Settings(
        arm, steps=3, batch_size=4, n_qubits=4, n_layers=2, n_frames=1, n_samples=1, **conditions
    )
    operations = Operations()
    starts = []
    to_float = qd.to_float

    def watched(images):
        starts.append(images)
        if len(starts) == 2:
            operations.__enter__()
        if len(starts) == 3:
            operations.__exit__(None, None, None)
        return to_float(images)

    monkeypatch.setattr(qd, "to_float", watched)
    qd.train(settings, IMAGES, tmp_path, "hash")
    assert len(starts) == 3
    assert "convolution_backward.default" in operations.names
    assert "_fused_adam_.default" in operations.names
    waits = {"_local_scalar_dense.default", "nonzero.default", "lift_fresh.default"}
    assert not waits & operations.names


def test_training_makes_a_model_of_the_digit(tmp_path):
    _, digits, labels = qd.load_images("digits", tmp_path)
    settings = qd.Settings(
        "quantum", steps=80, batch_size=8, timesteps=20, n_qubits=3, classes=(0,), n_frames=1
    )
    images = qd.select_images(digits, labels, 0, None, 0)
    model = qd.train(settings, images, tmp_path, "hash")
    losses = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["losses"]
    assert losses[-50:].mean() < 0.15  # from 0.78

    # It has learnt to use the time.
    x0 = qd.to_float(images[:8])
    t, noise = qd.training_noise(settings, x0, 0)
    x_t, v = qd.GaussianDiffusion(20).q_sample(x0, t, noise)
    with torch.no_grad():
        error = F.mse_loss(model(x_t, t), v)
        mistimed = F.mse_loss(model(x_t, t.flip(0)), v)
    assert mistimed > 2 * error

    # And what it draws is read as the digit by the nearest image of all ten.
    with tqdm(disable=True) as bar:
        drawn = qd.sample_images(settings, model, "image", range(32), 20, bar)
    judge = KNeighborsClassifier(1).fit(digits.flatten(1).numpy() / 255, labels)
    recognised = judge.predict(drawn.flatten(1).numpy() / 255) == 0
    assert recognised.mean() >= 0.8  # from about 0.1
