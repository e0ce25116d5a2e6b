"Training the noise predictor: the loss against its formula, level by level, captions dropped, latents in batches, a network that starts as nothing; and DDPM's loop."
import copy

import pytest
import torch

from sd_scratch.data import CaptionedPictures
from sd_scratch.denoising import ddpm, denoising_loss, draw_noise, drop_captions, encode_pictures, loss_per_level, start_as_nothing
from sd_scratch.layers import ResnetBlock2D
from sd_scratch.noise import PREDICTION_TYPES, NoiseSchedule
from sd_scratch.samplers import ddim, sampling_steps
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


@pytest.mark.parametrize("captions", [1, 5, 7])
def test_loss_of_mismatched_captions(captions):
    latents, text = batch()
    with pytest.raises(ValueError, match=f"6 pictures and {captions} captions"):
        denoising_loss(tiny_unet(), NoiseSchedule(), latents, torch.zeros(captions, 3, 6), seeded())


# -- the loss, level by level

@pytest.mark.parametrize("total, levels", [(1000, 10), (1000, 3), (20, 7), (5, 5), (8, 1)])
def test_levels_are_equal_parts_of_the_time_steps(total, levels):
    seen = []
    def spy(x, t, text):
        seen.append(t)
        return x
    loss_per_level(spy, NoiseSchedule(num_train_timesteps=total), torch.zeros(400, 1, 1, 1), None, seeded(), levels)
    assert len(seen) == levels
    edges = [k * total // levels for k in range(levels + 1)]
    for t, low, high in zip(seen, edges, edges[1:]):
        assert low <= t.min() and t.max() < high
        if high - low <= 20: assert set(t.tolist()) == set(range(low, high))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_loss_per_level_is_its_formula(kind):
    schedule, (latents, text), found = NoiseSchedule(prediction_type=kind), batch(), []
    def answer(x, t, given):
        assert given is text
        signal, sigma = schedule.scales(t, x)
        found.append(((0.3 * x - schedule.target(latents, (x - signal * latents) / sigma, t)) ** 2).mean())
        return 0.3 * x
    losses = loss_per_level(answer, schedule, latents, text, seeded(), 4)
    assert losses.shape == (4,) and torch.allclose(losses, torch.stack(found), rtol=1e-3)


def test_levels_together_are_the_loss():
    schedule, latents = NoiseSchedule(), torch.randn(3000, 1, 2, 2, generator=seeded(1))
    net = lambda x, t, text: x * (t < 300).float().view(-1, 1, 1, 1)
    assert torch.isclose(loss_per_level(net, schedule, latents, None, seeded(2)).mean(), denoising_loss(net, schedule, latents, None, seeded(3)), rtol=0.03)


def test_loss_per_level_can_be_compared():
    "The same seed gives the same noise, no gradient is kept, and the mode of the network stays."
    latents, text = batch()
    unet = tiny_unet()
    first, again, other = (loss_per_level(unet, NoiseSchedule(), latents, text, seeded(s), 2) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other) and not first.requires_grad and unet.training


@pytest.mark.parametrize("levels", [0, -1, 21])
def test_impossible_levels(levels):
    with pytest.raises(ValueError, match=rf"into {levels} levels: choose from 1 to 20"):
        loss_per_level(lambda x, t, text: x, NoiseSchedule(num_train_timesteps=20), torch.zeros(2, 1, 1, 1), None, seeded(), levels)


# -- the noise that is put in

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noise_is_drawn_for_each_picture(dtype):
    shape, seeds = (3, 2, 4, 5), (5, 6, 5)
    found = draw_noise(shape, [seeded(s) for s in seeds], dtype=dtype)
    assert found.shape == shape and found.dtype == dtype and torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    for k, s in enumerate(seeds): assert torch.equal(found[k], torch.randn(shape[1:], generator=seeded(s), dtype=dtype))
    assert torch.equal(draw_noise(shape, seeded(5), dtype=dtype), torch.randn(shape, generator=seeded(5), dtype=dtype))
    torch.manual_seed(7)
    assert torch.equal(torch.randn(shape, generator=seeded(7)), draw_noise(torch.Size(shape)))         # without a generator PyTorch's own


def test_noise_goes_where_it_is_wanted():
    assert draw_noise((2, 3), seeded(), "meta").device.type == draw_noise((2, 3), [seeded(), seeded(1)], "meta").device.type == "meta"
    with pytest.raises(ValueError, match="1 generators for 3 pictures: give one, or one for each"): draw_noise((3, 2), [seeded()])


# -- DDPM's loop

def strides(stride, start=999): return [(t, max(t - stride, -1)) for t in range(start, -1, -stride)]
def curved(x, t): return torch.tanh(x + 0.001 * t) * 0.8             # stands for a network


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("count", [10, 40])
def test_ddpm_is_diffusers(kind, count):
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind, clip_sample=False, variance_type="fixed_small")
    scheduler.set_timesteps(count)
    x = wanted = torch.randn(2, 3, 4, 4, generator=seeded(1))
    generator = seeded(2)
    for t in scheduler.timesteps: wanted = scheduler.step(curved(wanted, t), t, wanted, generator=generator).prev_sample
    times = scheduler.timesteps.tolist()
    found = ddpm(curved, x, list(zip(times, times[1:] + [-1])), seeded(2), schedule=NoiseSchedule(prediction_type=kind, set_alpha_to_one=True))
    assert (found - wanted).abs().max() <= 1e-5 * count * max(1, wanted.abs().max())


@pytest.mark.parametrize("one", [True, False])
def test_ddpm_is_ddim_with_all_its_noise(one):
    schedule = NoiseSchedule(prediction_type="v_prediction", set_alpha_to_one=one)
    x, steps = torch.randn(3, 4, 2, 2, generator=seeded(1)), sampling_steps(schedule, 30)
    assert torch.allclose(ddpm(curved, x, steps, seeded(2), schedule=schedule), ddim(curved, x, steps, seeded(2), schedule=schedule, eta=1.0), atol=1e-5)


@pytest.mark.parametrize("std", [0.2, 1.0, 1.7])
def test_ddpm_draws_what_the_denoiser_knows(std):
    schedule = NoiseSchedule(set_alpha_to_one=True)
    def bell(x, t):
        a = schedule.alpha_bar(t)
        return (1 - a).sqrt() * (x - a.sqrt() * 0.5) / (a * std ** 2 + 1 - a)
    x = ddpm(bell, torch.randn(20_000, 1, generator=seeded(1)), strides(1), seeded(2), schedule=schedule)
    assert abs(x.mean() - 0.5) < 0.05 * max(std, 1) and abs(x.std() / std - 1) < 0.05


def test_each_picture_has_its_own_noise():
    "A picture drawn with its own generator doesn't depend on its neighbours."
    schedule, x = NoiseSchedule(), torch.randn(3, 1, 4, 4, generator=seeded(1))
    together = ddpm(curved, x, strides(100), [seeded(5), seeded(6), seeded(5)], schedule=schedule)
    for k, seed in enumerate((5, 6, 5)): assert torch.allclose(together[k:k + 1], ddpm(curved, x[k:k + 1], strides(100), seeded(seed), schedule=schedule), atol=1e-6)
    assert not torch.allclose(together[0], ddpm(curved, x[:1], strides(100), seeded(6), schedule=schedule)[0], atol=0.1)


def test_clean_pictures_are_clipped():
    schedule, x = NoiseSchedule(set_alpha_to_one=True), 5 * torch.randn(2, 1, 4, 4, generator=seeded(1))
    free, clipped = (ddpm(lambda x, t: torch.zeros_like(x), x, [(500, -1)], seeded(), schedule=schedule, clip=clip) for clip in (None, 1))
    assert free.abs().max() > 2 and torch.allclose(clipped, free.clamp(-1, 1))


def test_each_step_can_be_watched_and_changed():
    schedule, x, seen = NoiseSchedule(), torch.randn(2, 1, 2, 2, generator=seeded(1)), []
    end = ddpm(curved, x, strides(250), seeded(), schedule=schedule, on_step=lambda i, t, x: seen.append((i, t, x)))
    assert [(i, t) for i, t, _ in seen] == [(0, 999), (1, 749), (2, 499), (3, 249)] and torch.equal(seen[-1][2], end)
    assert torch.equal(ddpm(curved, x, strides(250), seeded(), schedule=schedule, on_step=lambda i, t, x: torch.zeros_like(x)), torch.zeros_like(x))


@pytest.mark.parametrize("steps, said", [([(1000, 0)], "from 0 to 999"), ([(-1, -2)], "from 0 to 999"), ([(5, 5)], "downwards"), ([(5, 9)], "downwards"),
                                         ([(999, 500), (499, -1)], "ends at 500 and the next one begins at 499"), ([(999, 998), (979, 978)], "where the one before has ended")])
def test_impossible_steps(steps, said):
    asked = []
    with pytest.raises(ValueError, match=said): ddpm(lambda x, t: asked.append(t), torch.zeros(1, 1), steps, schedule=NoiseSchedule())
    assert not asked                                                                   # refused before the network is asked


def test_generators_for_other_pictures():
    with pytest.raises(ValueError, match="2 generators for 3 pictures"): ddpm(curved, torch.zeros(3, 1), [(9, -1)], [seeded(), seeded()], schedule=NoiseSchedule())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ddpm_keeps_the_number_format(dtype):
    assert ddpm(curved, torch.zeros(2, 3, dtype=dtype), strides(500), seeded(), schedule=NoiseSchedule()).dtype == dtype


# -- captions

def test_empty_caption_of_another_length():
    with pytest.raises(ValueError, match=r"\(3,\) tokens and the empty one \(2,\)"): drop_captions(torch.ones(4, 3), torch.zeros(1, 2), seeded())


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
