"Training the noise predictor: the loss against its formula, captions dropped, latents in batches, a network that starts as nothing."
import copy

import pytest
import torch

from sd_scratch.data import CaptionedPictures
from sd_scratch.denoising import denoising_loss, drop_captions, encode_pictures, start_as_nothing
from sd_scratch.layers import ResnetBlock2D
from sd_scratch.noise import PREDICTION_TYPES, NoiseSchedule
from sd_scratch.unet import Transformer2DModel, UNet2DConditionModel
from sd_scratch.vae import AutoencoderKL

TINY = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=2, cross_attention_dim=6, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def tiny_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY)


def batch(size=6): return torch.randn(size, 4, 5, 6, generator=seeded(1)), torch.randn(size, 3, 6, generator=seeded(2))


class Spy:
    "Stands for a UNet: notes what it is given, returns what it was told to"
    def __init__(self, answer): self.answer = answer
    def __call__(self, x, t, text):
        self.x, self.t, self.text = x, t, text
        return self.answer(x, t)


# -- the loss

@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_loss_is_its_formula(kind):
    latents, text = batch()
    spy = Spy(lambda x, t: 0.3 * x + 0.1)
    found = denoising_loss(spy, NoiseSchedule(prediction_type=kind), latents, text, seeded(7))
    a = NoiseSchedule().alphas_cumprod[spy.t].view(-1, 1, 1, 1)
    noise = (spy.x - a.sqrt() * latents) / (1 - a).sqrt()                              # solved from x_t; it must be what the generator drew
    generator = seeded(7)
    assert torch.equal(torch.randint(0, 1000, (6,), generator=generator), spy.t)
    assert torch.allclose(noise, torch.randn(latents.shape, generator=generator), atol=1e-4)
    wanted = dict(epsilon=noise, sample=latents, v_prediction=a.sqrt() * noise - (1 - a).sqrt() * latents)[kind]
    assert torch.allclose(found, ((0.3 * spy.x + 0.1 - wanted) ** 2).mean(), atol=1e-4)
    assert found.shape == () and spy.text is text


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_right_answer_costs_nothing(kind):
    schedule, (latents, text) = NoiseSchedule(prediction_type=kind), batch()
    def answer(x, t):
        signal, sigma = schedule.scales(t, x)
        return schedule.target(latents, (x - signal * latents) / sigma, t)
    assert denoising_loss(Spy(answer), schedule, latents, text, seeded()) < 1e-8


def test_every_time_step_has_its_turn_and_every_picture_its_own():
    latents, text = torch.zeros(8000, 1, 1, 1), torch.zeros(8000, 1, 1)
    spy = Spy(lambda x, t: x)
    denoising_loss(spy, NoiseSchedule(num_train_timesteps=200), latents, text, seeded())
    counts = torch.bincount(spy.t, minlength=200)
    assert len(counts) == 200 and counts.min() > 10 and counts.max() < 80              # 40 each, within about five standard deviations
    assert abs(spy.x.mean()) < 0.03


def test_the_generator_decides():
    schedule, (latents, text), unet = NoiseSchedule(), batch(), tiny_unet()
    with torch.no_grad(): first, again, other = (denoising_loss(unet, schedule, latents, text, seeded(s)) for s in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_number_format_is_kept(dtype):
    latents, text = (o.to(dtype) for o in batch())
    assert denoising_loss(tiny_unet().to(dtype), NoiseSchedule(), latents, text, seeded()).dtype == dtype


# -- captions

def test_share_of_captions_dropped():
    ids, empty = torch.arange(1, 60_001).reshape(20_000, 3), torch.tensor([[-1, -2, -3]])
    before = ids.clone()
    for share in 0.1, 0.25:
        found = drop_captions(ids, empty, seeded(), share)
        dropped = (found == empty).all(1)
        assert torch.equal(found[~dropped], ids[~dropped])                             # whole captions or nothing of them
        assert abs(dropped.float().mean() - share) < 0.01
    assert torch.equal(ids, before)
    assert torch.equal(drop_captions(ids, empty, seeded()), drop_captions(ids, empty, seeded(), 0.1))


def test_none_or_all_captions_dropped():
    ids, empty = torch.arange(12).reshape(4, 3), torch.full((1, 3), 99)
    assert torch.equal(drop_captions(ids, empty, seeded(), 0), ids)
    assert torch.equal(drop_captions(ids, empty, seeded(), 1), empty.expand(4, 3))


# -- latents

@pytest.mark.parametrize("channels", [1, 3])
def test_batches_of_latents_are_equal(channels):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    data = CaptionedPictures(torch.randint(0, 256, (7, channels, 16, 16), generator=seeded(), dtype=torch.uint8), [""] * 7)
    with torch.no_grad(): whole = vae.encode(data.batch(range(7))[0])
    for size in 1, 3, 7, 256:
        mean, std = encode_pictures(vae, data, size)
        assert mean.shape == std.shape == (7, 4, 8, 8) and not mean.requires_grad
        assert torch.allclose(mean, whole.mean, atol=1e-5) and torch.allclose(std, whole.std, atol=1e-5)


# -- a network that starts as nothing

@pytest.mark.parametrize("extra", [{}, dict(use_linear_projection=True)], ids=str)
def test_it_starts_as_nothing(extra):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY | extra)
    before = copy.deepcopy(unet.state_dict())
    assert start_as_nothing(unet) is unet
    x, text = batch()
    with torch.no_grad(): assert torch.equal(unet(x, 500, text), torch.zeros_like(x))
    changed = {n for n, w in unet.state_dict().items() if not torch.equal(w, before[n])}
    assert changed == {n for n in before if ".conv2." in n or ".proj_out." in n or n.startswith("conv_out.")}


def test_each_block_passes_on_what_it_gets():
    unet = start_as_nothing(tiny_unet())
    h, time, text = torch.randn(2, 16, 4, 4, generator=seeded()), torch.randn(2, 32, generator=seeded()), torch.randn(2, 3, 6, generator=seeded())
    middle = unet.mid_block
    assert [type(o) for o in (*middle.resnets, *middle.attentions)] == [ResnetBlock2D, ResnetBlock2D, Transformer2DModel]
    with torch.no_grad(): assert torch.equal(middle(h, time, text), h)


def test_nothing_becomes_something():
    "Zeros wake up layer by layer: first the last convolution, then the branches, then what feeds them."
    unet, schedule, (latents, text) = start_as_nothing(tiny_unet()), NoiseSchedule(), batch()
    optimizer, awake = torch.optim.AdamW(unet.parameters(), 1e-2), []
    for step in range(4):
        optimizer.zero_grad()
        loss = denoising_loss(unet, schedule, latents, text, seeded(step))
        if step == 0: assert abs(loss - 1) < 0.15                                      # the mean square of the noise, as nothing is predicted
        loss.backward()
        optimizer.step()
        awake.append({n for n, p in unet.named_parameters() if p.grad.any()})
    assert awake[0] == {"conv_out.weight", "conv_out.bias"} and awake[0] < awake[1] < awake[2]
    assert awake[3] == {n for n, _ in unet.named_parameters()}
