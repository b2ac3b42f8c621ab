"""Noise schedule, forward process, sampler, U-Net and EMA."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def test_cosine_schedule_by_the_formula(script):
    betas = script.cosine_beta_schedule(10)

    def alpha_bar(t):
        return math.cos((t / 10 + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [min(1 - alpha_bar(t) / alpha_bar(t - 1), 0.999) for t in range(1, 11)]
    assert betas.dtype == torch.float64
    assert torch.allclose(betas, torch.tensor(expected, dtype=torch.float64), atol=1e-14)
    assert betas[-1] == 0.999 and script.cosine_beta_schedule(1000).max() == 0.999


def test_q_sample_target_and_x0_by_hand(script):
    diffusion = script.GaussianDiffusion(10)
    alpha_bar = torch.cumprod(1 - script.cosine_beta_schedule(10), 0)
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


def test_p_sample_is_the_posterior(script):
    # q(x_{t-1} | x_t, x0) as a product of Gaussians: precisions add, in closed form.
    diffusion, t = script.GaussianDiffusion(50), 20
    betas = script.cosine_beta_schedule(50)
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
def test_sampler_recovers_a_gaussian(script, steps):
    # Data N(0.2, 0.1^2) in every pixel: E[x0 | x_t] is known, and clipping does not matter. Each
    # step is then linear, so the variance of the result follows in closed form; the posterior
    # variance makes it fall short of 0.1 by O(1 / steps).
    mean, std = 0.2, 0.1
    diffusion = script.GaussianDiffusion(400)
    alpha_bar = torch.cumprod(1 - script.cosine_beta_schedule(400), 0)

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


def test_respacing(script):
    diffusion = script.GaussianDiffusion(20)
    torch.manual_seed(0)
    unet = script.UNet(1)
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


def test_an_image_does_not_depend_on_its_batch(script):
    diffusion = script.GaussianDiffusion(5)

    def sample(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return diffusion.sample(lambda x, t: x.cos(), len(seeds), generators)

    assert torch.equal(sample([1, 2, 3])[1:], sample([2, 3]))


def test_timestep_embedding_by_hand(script):
    row = script.timestep_embedding(torch.tensor([0, 7]), 4)[1]
    expected = [math.sin(7), math.sin(0.07), math.cos(7), math.cos(0.07)]
    assert torch.allclose(row, torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_unet_uses_time_and_both_skips(script, channels):
    torch.manual_seed(0)
    unet = script.UNet(channels)
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


def test_every_resblock_receives_the_time(script):
    torch.manual_seed(0)
    block = script.ResBlock(8, 16)
    torch.nn.init.normal_(block.conv2.weight)
    x = torch.randn(1, 8, 4, 4)
    assert not torch.allclose(block(x, torch.zeros(1, 16)), block(x, torch.ones(1, 16)), atol=1e-2)
    blocks = [m for m in script.UNet(1).modules() if isinstance(m, script.ResBlock)]
    assert len(blocks) >= 4


def test_all_arms_start_as_the_same_model(script):
    outputs = []
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 700])
    for arm in script.ARMS:
        torch.manual_seed(0)
        unet = script.UNet(1, arm)
        torch.manual_seed(1)
        torch.nn.init.normal_(unet.head.weight, std=0.1)
        outputs.append(unet(x, t))
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_unknown_arm(script):
    with pytest.raises(ValueError, match="expected one of"):
        script.UNet(1, "quantom")


def test_ema_by_hand(script):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    ema = script.EMA(model, 0.3)
    expected = 1.0
    for k, value in enumerate([2.0, -1.0, 5.0, 0.5]):
        torch.nn.init.constant_(model.weight, value)
        ema.update(model)
        decay = min(0.3, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * value
    assert ema.shadow["weight"].item() == pytest.approx(expected, abs=1e-6)


def test_learning_rate(script):
    rates = [script.learning_rate(k, 1000, 2.0) for k in range(1000)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == pytest.approx(2.0, rel=0.03)
    assert rates[500] == pytest.approx(1.0) and rates[-1] < 1e-4


def test_batches_cover_the_set_once_an_epoch_and_strata_once_a_step(script):
    settings = script.Settings(
        **dict.fromkeys(script.Settings.__annotations__) | {"seed": 3, "batch_size": 4}
    )
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(-1, 1, 28, 28)
    seen = []
    for step in range(6):  # four epochs
        x0, t, noise = script.training_batch(settings, images, step, 100)
        seen += script.to_uint8(x0)[:, 0, 0, 0].tolist()
        assert [stratum // 25 for stratum in t.tolist()] == [0, 1, 2, 3]
        assert noise.shape == x0.shape
    epochs = [seen[k : k + 6] for k in range(0, 24, 6)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4, 5] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


class Operations(TorchDispatchMode):
    """Records the names of all operations, those of the backward pass too."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("arm, conditions", [
    ("classical", {}), ("matched", {}), ("quantum", {}), ("product", {"gate_noise": (0.1, 0.1)}),
    ("quantum", {"shots": 4, "gate_noise": (0.1, 0.1), "readout_noise": 0.1}),
    ("quantum", {"gate_noise": (0.1, 0.1), "trajectories": 0}),
])  # fmt: skip
def test_a_step_never_makes_the_host_wait_for_the_device(script, embedded, arm, conditions):
    # Reading a value (.item(), if), building a tensor from a list, and masks all synchronise CUDA.
    settings = dict.fromkeys(script.Settings.__annotations__) | {"seed": 0, "batch_size": 4}
    settings = script.Settings(**settings)
    diffusion = script.GaussianDiffusion(1000)
    model = script.UNet(embedded.channels, arm, n_qubits=4, n_layers=2, **conditions)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, ema = torch.optim.Adam(parameters, fused=True), script.EMA(model, 0.9)
    images = torch.zeros(9, embedded.channels, 28, 28, dtype=torch.uint8)
    with Operations() as seen:
        x0, t, noise = script.training_batch(settings, images, 3, 1000)
        errors = model(diffusion.q_sample(x0, t, noise), t) - diffusion.target(x0, t, noise)
        (diffusion.noise[t] * errors.square().mean((1, 2, 3))).mean().backward()
        optimizer.step()
        ema.update(model)
        with torch.no_grad():
            diffusion.p_sample(model, noise, 500, noise)
    assert "aten.convolution_backward.default" in seen.names
    waiting = {
        "aten.lift_fresh.default",
        "aten._local_scalar_dense.default",
        "aten.nonzero.default",
    }
    assert not seen.names & waiting
