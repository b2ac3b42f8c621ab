"""Noise schedule, forward process, sampler, U-Net, optimizer and training."""

import math
from pathlib import Path

import pytest
import torch
from conftest import leave_zero
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import quantum_diffusion_mnist as qd

NOWHERE, SILENT = Path("no/checkpoint.pt"), tqdm(disable=True)
IMAGES = torch.randint(256, (6, 1, 28, 28), generator=torch.Generator().manual_seed(0)).byte()


def test_cosine_schedule_by_the_formula():
    betas = qd.cosine_beta_schedule(10)

    def alpha_bar(t):
        return math.cos((t / 10 + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [min(1 - alpha_bar(t) / alpha_bar(t - 1), 0.999) for t in range(1, 11)]
    assert betas.tolist() == pytest.approx(expected, abs=1e-14)
    assert betas[-1] == 0.999 and qd.cosine_beta_schedule(1000).max() == 0.999


def test_q_sample_and_v_by_hand():
    alpha_bar = torch.cumprod(1 - qd.cosine_beta_schedule(10), 0)
    x0, noise = torch.full((2, 1, 2, 2), 0.5), torch.full((2, 1, 2, 2), -2.0)
    t = torch.tensor([0, 7])
    x, v = qd.GaussianDiffusion(10).q_sample(x0, t, noise)
    for k, a in enumerate(alpha_bar[t].tolist()):
        alpha, sigma = math.sqrt(a), math.sqrt(1 - a)
        assert x[k].unique().tolist() == pytest.approx([alpha * 0.5 - 2 * sigma], abs=1e-6)
        assert v[k].unique().tolist() == pytest.approx([-2 * alpha - sigma * 0.5], abs=1e-6)


class Denoiser:
    """A model without weights: x0 (x, t) -> v, and what it was asked."""

    channels = 1

    def __init__(self, diffusion, x0):
        self.diffusion, self.x0, self.asked, self.gate = diffusion, x0, [], None

    def __call__(self, x, t):
        self.asked.append((t.unique().item(), x.double()))
        alpha, sigma = self.diffusion.alpha[t], self.diffusion.sigma[t]
        return (alpha * x - self.x0(x, t[0])) / sigma


@pytest.mark.parametrize("timesteps, steps", [(1000, 8), (50, 40), (9, 9), (300, 2), (5, 1)])
def test_every_step_of_the_sampler_is_the_posterior(timesteps, steps):
    # With x0 linear in lambda, the second order takes it from the middle of the step; the first
    # step has the x0 where it starts. Given x0, q(x_s | x_t, x0) is a product of two Gaussians,
    # whose precisions add (Ho et al., eq. 6 and 7).
    diffusion = qd.GaussianDiffusion(timesteps)
    log_snr = ((a := diffusion.alpha_bar) / (1 - a)).log() / 2
    model = Denoiser(diffusion, lambda x, t: 0.1 + 0.04 * log_snr[t].float().expand(x.shape))
    result = diffusion.sample(model, 7, "image", range(3, 5), steps, SILENT)
    levels, states = zip(*model.asked, strict=True)
    pairs = list(zip(levels, levels[1:], strict=False))
    assert len(levels) == steps and levels[0] == timesteps - 1 and 0 in (levels[-1], steps - 1)
    assert all(t > s for t, s in pairs)
    if timesteps == 1000:
        wanted = torch.linspace(math.asinh(-6), log_snr[0].asinh(), steps)
        assert (log_snr[list(levels)].asinh() - wanted)[1:].abs().max() < 0.03
    streams = [qd.random_stream(7, "image", k) for k in (3, 4)]
    noise = [torch.stack([torch.randn(1, 28, 28, generator=g) for g in streams]) for _ in levels]
    assert torch.equal(states[0].float(), noise[0])
    for k, (t, s) in enumerate(pairs):
        beta, h = 1 - a[t] / a[s], log_snr[s] - log_snr[t]
        x0 = 0.1 + 0.04 * (log_snr[t] + (h / 2 if k else 0))
        precision = (1 - beta) / beta + 1 / (1 - a[s])
        mean = (1 - beta).sqrt() / beta * states[k] + a[s].sqrt() / (1 - a[s]) * x0
        expected = mean / precision + 1.01 * noise[k + 1] / precision.sqrt()
        assert (states[k + 1] - expected).abs().max() < 2e-5, k
    assert (result - (0.1 + 0.04 * log_snr[levels[-1]])).abs().max() < 1e-5
    bright = Denoiser(diffusion, lambda x, t: torch.full_like(x, 1.5))
    assert diffusion.sample(bright, 0, "image", range(2), steps, SILENT).eq(1).all()  # clipped
    assert steps == 1 or bright.asked[-1][1].mean() > 1.2  # but not on the way


def test_timestep_embedding_by_hand():
    row = qd.timestep_embedding(torch.tensor([0, 7]), 4)[1]
    assert row.tolist() == pytest.approx([f(x) for f in (math.sin, math.cos) for x in (7, 0.07)])


def test_self_attention_by_hand():
    layer, x = leave_zero(qd.SelfAttention(16)), torch.randn(1, 16, 3, 3)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2)[0].view(3, 4, 4, 9)
    mixed = v @ (q.mT @ k / math.sqrt(4)).softmax(-1).mT  # (heads, 4, 9 positions)
    assert torch.allclose(layer(x), x + layer.out(mixed.reshape(1, 16, 3, 3)), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_unet_uses_every_layer_both_skips_and_the_time(channels):
    unet, seen = leave_zero(qd.UNet(channels, qd.Settings())), []
    blocks = [block for block in unet.modules() if isinstance(block, qd.ResBlock)]
    for block in blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].detach()))
    x = torch.randn(2, channels, 28, 28)
    out = unet(x, torch.tensor([10, 900]))
    assert out.shape == x.shape and len(seen) == len(blocks) == 4
    assert all((first - second).abs().max() > 0.01 for first, second in seen)
    (100 * out.square().mean()).backward()
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            halves = (half for dim in (0, 1) for half in parameter.grad.chunk(2, dim))
            assert all(half.abs().max() > 1e-4 for half in halves), name


@pytest.mark.parametrize("shape", [(48, 48, 3, 3), (48, 4, 3, 3), (64, 64, 1, 1)])
def test_muon_by_its_iteration_in_float64(shape):
    torch.manual_seed(0)
    ours, momenta, buffer = torch.randn(shape), [torch.zeros(shape)], 0
    for _ in range(3):
        ours.grad, before = torch.randn(shape), ours.flatten(1).clone()
        qd.muon_step([ours], momenta, 0.1)
        gradient = ours.grad.flatten(1).double()
        buffer = 0.95 * buffer + 0.05 * gradient
        x = 0.95 * buffer + 0.05 * gradient
        x /= x.norm()
        for _ in range(3):
            a = x @ x.mT
            x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
        change = -0.1 * max(1, x.shape[0] / x.shape[1]) ** 0.5 * x
        assert (ours.flatten(1) - before - change).norm() < 1e-4 * change.norm()


def test_first_step_by_hand():
    settings = qd.Settings(seed=4, steps=50, batch_size=4, timesteps=100, lr=0.01, muon_lr=0.03)
    trainer = qd.Trainer(settings, IMAGES, NOWHERE)
    before = trainer.model.head.weight.detach().clone()
    trainer.step()
    x0, t, noise = qd.training_batch(settings, IMAGES, 0)
    v = trainer.diffusion.q_sample(x0, t, noise)[1]  # the model starts at zero
    loss = v.square().mean().item()
    assert trainer.losses[0].item() == pytest.approx(loss, rel=1e-5)
    now = dict(trainer.model.named_parameters())
    gradient, moved = now["head.weight"].grad, now["head.weight"] - before
    sure = gradient.abs() > 1e-5  # Adam's first step is the sign; a fifth of the rate: warm-up
    assert torch.allclose(moved[sure], -0.002 * gradient[sure].sign(), rtol=2e-3)
    assert sure.float().mean() > 0.9
    hidden, adam = trainer.hidden, trainer.adam.param_groups[0]["params"]
    muons = [p for k, p in now.items() if p.ndim == 4 and k not in ("stem.weight", "head.weight")]
    assert [id(p) for p in hidden] == [id(p) for p in muons]
    assert {id(p) for p in adam} == {id(p) for p in now.values()} - {id(p) for p in muons}


def test_average_and_learning_rates_by_hand(monkeypatch):
    settings = qd.Settings(steps=2000, batch_size=2, timesteps=10, ema_decay=0.3, muon_lr=0.5, lr=1)
    trainer, muon = qd.Trainer(settings, IMAGES, NOWHERE), qd.muon_step
    rates, expected = [], trainer.average.head.weight.detach().double()
    monkeypatch.setattr(qd, "muon_step", lambda *args: rates.append(args[2]) or muon(*args))
    for k in range(6):
        trainer.step()
        decay = min(0.3, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * trainer.model.head.weight.detach().double()
    assert torch.allclose(trainer.average.head.weight.double(), expected, atol=1e-6)
    assert rates == pytest.approx([0.005 * (k + 1) for k in range(6)])
    for done, share in ((49, 0.5), (99, 0.9505), (1000, 0.5), (1500, 0.25), (1999, 0.0005)):
        trainer.done = done
        trainer.step()
        assert trainer.adam.param_groups[0]["lr"] == pytest.approx(share, abs=1e-5)
        assert rates[-1] == pytest.approx(share * 0.5, abs=1e-5)


def test_batches_cover_the_set_once_an_epoch_and_strata_once_a_step():
    settings = qd.Settings(seed=3, batch_size=4, timesteps=100)
    data = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(-1, 1, 28, 28)
    batches = [qd.training_batch(settings, data, step) for step in range(6)]  # four epochs
    for x0, t, noise in batches:
        assert [stratum // 25 for stratum in t.tolist()] == [0, 1, 2, 3]
        assert noise.shape == x0.shape and noise.std() == pytest.approx(1, abs=0.1)
    epochs = qd.to_uint8(torch.cat([x0 for x0, *_ in batches]))[:, 0, 0, 0].view(4, 6).tolist()
    assert all(sorted(epoch) == [0, 1, 2, 3, 4, 5] for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4 and len({noise.sum() for *_, noise in batches}) == 6


class Operations(TorchDispatchMode):
    """Records the names of all operations, those of the backward pass too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names = {*getattr(self, "names", ()), str(function).removeprefix("aten.")}
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    "arm, how",
    [("matched", {}), ("product", {}), ("quantum", {"shots": 4, "gate_noise": (0.1, 0.1)})],
)
def test_a_step_never_makes_the_host_wait_for_the_device(arm, how):
    # Reading a value (.item(), if) and masks synchronise CUDA; so does a tensor built from a list.
    settings = qd.Settings(arm, steps=3, batch_size=4, n_qubits=4, n_layers=2, **how)
    trainer = qd.Trainer(settings, IMAGES, NOWHERE)
    with Operations() as seen:
        trainer.step()
    assert "convolution_backward.default" in seen.names and trainer.done == 1
    assert not {"_local_scalar_dense.default", "nonzero.default"} & seen.names
    assert "lift_fresh.default" not in seen.names


def test_training_makes_a_model_of_the_digit():
    _, digits, labels = qd.load_images("digits", None)
    settings = qd.Settings("quantum", steps=80, batch_size=8, timesteps=20, n_qubits=3, label=0)
    trainer = qd.Trainer(settings, qd.select_images(digits, labels, 0, None, 0), NOWHERE)
    for _ in range(settings.steps):
        trainer.step()
    model, diffusion = trainer.average, trainer.diffusion
    x0, t, noise = qd.training_batch(settings, trainer.images, 0)
    with torch.no_grad():
        x, v = diffusion.q_sample(x0, t, noise)
        error, mistimed = ((model(x, s) - v).square().mean().item() for s in (t, t.flip(0)))
    samples = qd.to_uint8(diffusion.sample(model, 0, "image", range(32), 20, SILENT))
    pixels, drawn = digits.flatten(1).numpy() / 255, samples.flatten(1).numpy() / 255
    recognised = (KNeighborsClassifier(1).fit(pixels, labels).predict(drawn) == 0).mean()
    assert trainer.losses[-50:].mean() < 0.15 and recognised >= 0.8  # from 0.78 and about 0.1
    assert mistimed > 2 * error  # so the model has learnt to use the time
