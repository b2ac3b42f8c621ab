"""Noise schedule, forward process, sampler, U-Net and EMA."""

import math

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode

import quantum_diffusion_mnist as qd


def test_cosine_schedule_by_the_formula():
    betas = qd.cosine_beta_schedule(10)

    def alpha_bar(t):
        return math.cos((t / 10 + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [min(1 - alpha_bar(t) / alpha_bar(t - 1), 0.999) for t in range(1, 11)]
    assert betas.dtype == torch.float64
    assert torch.allclose(betas, torch.tensor(expected, dtype=torch.float64), atol=1e-14)
    assert betas[-1] == 0.999 and qd.cosine_beta_schedule(1000).max() == 0.999


def test_q_sample_target_and_x0_by_hand():
    diffusion = qd.GaussianDiffusion(10)
    alpha_bar = torch.cumprod(1 - qd.cosine_beta_schedule(10), 0)
    x0, noise = torch.full((2, 1, 2, 2), 0.5), torch.full((2, 1, 2, 2), -2.0)
    t = torch.tensor([0, 7])
    x, v = diffusion.q_sample(x0, t, noise), diffusion.target(x0, t, noise)
    for k, a in enumerate(alpha_bar[t].tolist()):
        assert x[k].flatten()[0].item() == pytest.approx(
            math.sqrt(a) * 0.5 - 2 * math.sqrt(1 - a), abs=1e-6
        )
        assert v[k].flatten()[0].item() == pytest.approx(
            -2 * math.sqrt(a) - math.sqrt(1 - a) * 0.5, abs=1e-6
        )
    assert torch.allclose(diffusion.predict_x0(x, t, v), x0, atol=1e-6)
    assert diffusion.predict_x0(x, t, v - 100).max() == 1  # clipped


def test_p_sample_is_the_posterior():
    # q(x_{t-1} | x_t, x0) as a product of Gaussians: precisions add, in closed form.
    diffusion, t = qd.GaussianDiffusion(50), 20
    betas = qd.cosine_beta_schedule(50)
    alpha_bar = torch.cumprod(1 - betas, 0)
    beta, before = betas[t].item(), alpha_bar[t - 1].item()
    x0, x = torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), -0.7)
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = (math.sqrt(1 - beta) / beta * -0.7 + math.sqrt(before) / (1 - before) * 0.3) / precision

    def model(x, t):  # v for which the predicted x0 is 0.3
        a = alpha_bar[t].float().view(-1, 1, 1, 1)
        return (a.sqrt() * x - x0) / (1 - a).sqrt()

    quiet = diffusion.p_sample(model, x, t, torch.zeros_like(x)).item()
    loud = diffusion.p_sample(model, x, t, torch.ones_like(x)).item()
    assert quiet == pytest.approx(mean, abs=1e-6)
    assert loud - quiet == pytest.approx(precision**-0.5, abs=1e-6)
    last = diffusion.p_sample(model, x, 0, torch.ones_like(x))
    assert last.item() == pytest.approx(0.3, abs=2e-5)  # no noise in the last step


@pytest.mark.parametrize("steps", [None, 100])
def test_sampler_recovers_a_gaussian(steps):
    # Data N(0.2, 0.1^2) in every pixel: E[x0 | x_t] is known, and clipping does not matter. Each
    # step is then linear, so the variance of the result follows in closed form; the posterior
    # variance makes it fall short of 0.1 by O(1 / steps).
    mean, std = 0.2, 0.1
    diffusion = qd.GaussianDiffusion(400)
    alpha_bar = torch.cumprod(1 - qd.cosine_beta_schedule(400), 0)

    def gain(a):
        return a.sqrt() * std**2 / (a * std**2 + 1 - a)

    def optimal(x, t):
        a = alpha_bar[t].view(-1, 1, 1, 1).float()
        x0 = mean + gain(a) * (x - a.sqrt() * mean)
        return (a.sqrt() * x - x0) / (1 - a).sqrt()

    variance, kept = torch.tensor(1.0), alpha_bar[diffusion.respaced(steps or 400).model_t]
    for k in reversed(range(len(kept))):
        a, before = kept[k], kept[k - 1] if k else torch.tensor(1.0)
        beta = 1 - a / before
        slope = before.sqrt() * beta * gain(a) + (1 - beta).sqrt() * (1 - before)
        variance = (slope / (1 - a)) ** 2 * variance + beta * (1 - before) / (1 - a)
    assert variance.sqrt() == pytest.approx(std, abs=0.005 if steps is None else 0.013)

    images = diffusion.sample(optimal, 20, torch.Generator().manual_seed(0), steps)
    assert images.shape == (20, 1, 28, 28)
    # 15,680 pixels: standard errors 0.0008 of the mean, 0.0006 of the deviation
    assert images.mean().item() == pytest.approx(mean, abs=0.003)
    assert images.std().item() == pytest.approx(variance.sqrt().item(), abs=0.002)


def test_respacing():
    diffusion = qd.GaussianDiffusion(20)
    torch.manual_seed(0)
    unet = qd.UNet(1)
    torch.nn.init.normal_(unet.head.weight, std=0.1)

    def images(steps):
        return diffusion.sample(unet, 2, torch.Generator().manual_seed(1), steps)

    assert torch.equal(images(20), images(None))
    assert not torch.allclose(images(5), images(None), atol=0.1)
    assert diffusion.respaced(5).model_t.tolist() == [0, 5, 10, 14, 19]
    assert diffusion.respaced(1).model_t.tolist() == [19]
    for steps in (0, 21):
        with pytest.raises(ValueError, match="expected 1 to 20"):
            diffusion.respaced(steps)


def test_timestep_embedding_by_hand():
    row = qd.timestep_embedding(torch.tensor([0, 7]), 4)[1]
    expected = [math.sin(7), math.sin(0.07), math.cos(7), math.cos(0.07)]
    assert torch.allclose(row, torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_unet_uses_time_and_both_skips(channels):
    torch.manual_seed(0)
    unet = qd.UNet(channels)
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.05)
    x = torch.randn(2, channels, 28, 28)
    out = unet(x, torch.tensor([10, 10]))
    assert out.shape == x.shape
    assert not torch.allclose(out, unet(x, torch.tensor([900, 900])), atol=1e-3)
    for name in ("merge7", "merge14"):  # the second half of the input is the skip
        merge = getattr(unet, name)
        kept = merge.weight.detach().clone()
        with torch.no_grad():
            merge.weight[:, merge.in_channels // 2 :] = 0
        assert not torch.allclose(out, unet(x, torch.tensor([10, 10])), atol=1e-3), name
        with torch.no_grad():
            merge.weight.copy_(kept)


def test_every_resblock_receives_the_time():
    torch.manual_seed(0)
    block = qd.ResBlock(8, 16)
    torch.nn.init.normal_(block.conv2.weight)
    x = torch.randn(1, 8, 4, 4)
    assert not torch.allclose(block(x, torch.zeros(1, 16)), block(x, torch.ones(1, 16)), atol=1e-2)
    blocks = [m for m in qd.UNet(1).modules() if isinstance(m, qd.ResBlock)]
    assert len(blocks) >= 4


def test_self_attention_by_hand():
    torch.manual_seed(0)
    layer, x = qd.SelfAttention(16, heads=2), torch.randn(1, 16, 3, 3)
    torch.nn.init.normal_(layer.out.weight)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2)[0].view(3, 2, 8, 9)
    mixed = v @ (q.mT @ k / math.sqrt(8)).softmax(-1).mT  # (heads, 8, 9 positions)
    expected = x + layer.out(mixed.reshape(1, 16, 3, 3))
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_all_arms_start_as_the_same_model():
    outputs = []
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 700])
    for arm in qd.ARMS:
        torch.manual_seed(0)
        unet = qd.UNet(1, arm)
        torch.manual_seed(1)
        torch.nn.init.normal_(unet.head.weight, std=0.1)
        outputs.append(unet(x, t))
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_unknown_arm():
    with pytest.raises(ValueError, match="expected one of"):
        qd.UNet(1, "quantom")


def test_ema_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    ema = qd.EMA(model, 0.3)
    expected = 1.0
    for k, value in enumerate([2.0, -1.0, 5.0, 0.5]):
        torch.nn.init.constant_(model.weight, value)
        ema.update(model)
        decay = min(0.3, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * value
    assert ema.shadow["weight"].item() == pytest.approx(expected, abs=1e-6)


def test_learning_rate():
    rates = [qd.learning_rate(k, 1000, 2.0) for k in range(1000)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == pytest.approx(2.0, rel=0.03)
    assert rates[500] == pytest.approx(1.0) and rates[-1] < 1e-4


def test_batches_cover_the_set_once_an_epoch_and_strata_once_a_step():
    settings = qd.Settings("classical", "digits", 3, None, 3, batch_size=4, timesteps=100)
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(-1, 1, 28, 28)
    seen = []
    for step in range(6):  # four epochs
        x0, t, noise = qd.training_batch(settings, images, step)
        seen += qd.to_uint8(x0)[:, 0, 0, 0].tolist()
        assert [stratum // 25 for stratum in t.tolist()] == [0, 1, 2, 3]
        assert noise.shape == x0.shape and noise.std() == pytest.approx(1, abs=0.1)
    epochs = [seen[k : k + 6] for k in range(0, 24, 6)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4, 5] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


class Operations(TorchDispatchMode):
    """Records the names of all operations, those of the backward pass too."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function).removeprefix("aten."))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("arm, conditions", [
    ("classical", {}), ("matched", {}), ("quantum", {}), ("product", {"gate_noise": (0.1, 0.1)}),
    ("quantum", {"gate_noise": (0.1, 0.1)}),
    ("quantum", {"shots": 4, "gate_noise": (0.1, 0.1), "readout_noise": 0.1}),
])  # fmt: skip
def test_a_step_never_makes_the_host_wait_for_the_device(arm, conditions):
    # Reading a value (.item(), if), building a tensor from a list, and masks all synchronise CUDA.
    settings = qd.Settings(
        arm, "digits", 3, None, 0, steps=3, batch_size=4, n_qubits=4, n_layers=2, **conditions
    )
    trainer = qd.Trainer(settings, torch.zeros(9, 1, 28, 28, dtype=torch.uint8))
    with Operations() as seen:
        trainer.step()
        with torch.no_grad():
            noise = torch.randn(4, 1, 28, 28)
            trainer.model.seed_circuit(torch.Generator())
            trainer.diffusion.p_sample(trainer.model, noise, 500, noise)
    assert "convolution_backward.default" in seen.names and trainer.done == 1
    waiting = {"lift_fresh.default", "_local_scalar_dense.default", "nonzero.default"}
    assert not waiting & set(seen.names)


def test_training_makes_a_model_of_the_digit():
    _, images, labels = qd.load_images("digits", None)
    settings = qd.Settings(
        *("quantum", "digits", 0, None, 0), steps=120, batch_size=8, timesteps=20, n_qubits=3
    )
    trainer = qd.Trainer(settings, qd.select_images(images, labels, 0, None, 0))
    for _ in range(settings.steps):
        trainer.step()
    model, diffusion = trainer.model, trainer.diffusion
    model.load_state_dict(trainer.ema.shadow)
    x0, t, noise = qd.training_batch(settings, trainer.images, 0)
    with torch.no_grad():
        x, wanted = diffusion.q_sample(x0, t, noise), diffusion.target(x0, t, noise)
        error, mistimed = ((model(x, s) - wanted).square().mean().item() for s in (t, t.flip(0)))
    samples = qd.to_uint8(diffusion.sample(model, 32, torch.Generator().manual_seed(0)))
    pixels, drawn = images.flatten(1).numpy() / 255, samples.flatten(1).numpy() / 255
    nearest = KNeighborsClassifier(1).fit(pixels, labels)
    recognised = (nearest.predict(drawn) == 0).mean()
    assert trainer.losses[-50:].mean() < 0.08  # from 0.35
    assert mistimed > 2 * error  # so the model has learnt to use the time
    assert recognised >= 0.8


def test_every_resblock_of_the_unet_receives_the_time():
    unet, seen = qd.UNet(1), []
    for block in unet.modules():
        if isinstance(block, qd.ResBlock):
            block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].detach()))
    unet(torch.zeros(1, 1, 28, 28), torch.tensor([10]))
    unet(torch.zeros(1, 1, 28, 28), torch.tensor([900]))
    assert len(seen) == 8
    assert all((a - b).abs().max() > 0.01 for a, b in zip(seen[:4], seen[4:], strict=True))
