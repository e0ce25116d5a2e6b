"Editing: inversion against scipy and diffusers, the path of resampling, inpainting against the pipeline, the sphere, and the gradient that steers."
import math

import diffusers
import numpy as np
import pytest
import scipy
import torch
from hypothesis import given, settings, strategies as st
from oracles import close

from sd_scratch.editing import ddim_invert, inpaint, resampling_steps, slerp, steered
from sd_scratch.noise import PREDICTION_TYPES, NoiseSchedule
from sd_scratch.samplers import ddim, karras_steps, mixture_noise, noise_level, sampling_steps


def seeded(seed=0): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0, dtype=torch.float32): return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def denoiser(x, t):
    "Answer with something that depends on every number given, and is about as large as a network's answer."
    return torch.tanh(x.flip(-1) * (1 + t / 700)) + math.sin(t)


class Counted:
    "Count the evaluations, and note the time steps."
    def __init__(self, denoiser=denoiser): self.denoiser, self.times = denoiser, []
    def __call__(self, x, t):
        self.times.append(t)
        return self.denoiser(x, t)


# -- inversion

@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("count, spacing, to_one", [(7, "leading", False), (50, "leading", True), (25, "trailing", False)])
def test_inversion_is_diffusers(prediction_type, count, spacing, to_one):
    "Each step from the same x with the same answer; the answer is asked for at the level where we stand."
    schedule = NoiseSchedule(prediction_type=prediction_type, timestep_spacing=spacing, set_alpha_to_one=to_one)
    theirs = diffusers.DDIMInverseScheduler(**schedule.config, clip_sample=False)
    theirs.set_timesteps(count)
    steps, x = sampling_steps(schedule, count), normal(2, 4, 5, 6)
    assert theirs.timesteps.tolist() == [t for t, _ in reversed(steps)]
    for t, t_next in reversed(steps):
        if t_next < 0 and to_one and prediction_type != "epsilon": continue                   # we stand at no noise, which no time step has: ours asks at 0, and splits there
        output = denoiser(x, max(t_next, 0))
        after = theirs.step(output, t, x).prev_sample
        close(ddim_invert(denoiser, x, [(t, t_next)], schedule=schedule), after)
        x = after


MEANS, STD, WEIGHTS = torch.tensor([[-1.0, 0.5], [1.0, 1.0], [0.2, -1.2]]).double(), 0.3, torch.tensor([0.5, 0.3, 0.2])


def exact(schedule): return lambda x, t: mixture_noise(x, t, MEANS, STD, WEIGHTS, schedule)


def flowed(points, first, last):
    "Solve the probability-flow equation of the mixture with scipy, between two levels."
    def slope(sigma, flat):
        way = MEANS.numpy() - flat.reshape(-1, 1, 2)
        share = scipy.special.softmax(np.log(WEIGHTS.double().numpy()) - (way ** 2).sum(-1) / (2 * (STD ** 2 + sigma ** 2)), axis=1)
        return (-sigma * (share[..., None] * way).sum(1) / (STD ** 2 + sigma ** 2)).ravel()
    solved = scipy.integrate.solve_ivp(slope, (first, last), points.numpy().ravel(), method="DOP853", rtol=1e-10, atol=1e-10)
    return torch.from_numpy(solved.y[:, -1].reshape(-1, 2))


def test_inversion_follows_the_flow_upwards():
    "Against scipy's solution: the error halves when the steps do."
    schedule = NoiseSchedule()
    x = MEANS[torch.arange(30) % 3] + STD * normal(30, 2, dtype=torch.float64)
    low, high = (noise_level(schedule, t).double().item() for t in (0, 999))
    truth = flowed(x * (1 + low ** 2) ** 0.5, low, high) / (1 + high ** 2) ** 0.5
    error = [(ddim_invert(exact(schedule), x, karras_steps(schedule, n + 1)[:-1], schedule=schedule) - truth).norm(dim=1).mean().item() for n in (80, 160)]
    assert 1.6 < error[0] / error[1] < 2.5 and error[1] < 0.05


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("count", [1, 4, 50])
def test_round_trip_is_exact_on_straight_paths(prediction_type, count):
    "A denoiser that knows the one clean picture draws straight paths in x̄, which Euler's steps follow exactly, up and down."
    schedule, answer = NoiseSchedule(prediction_type=prediction_type), normal(1, 8, seed=1, dtype=torch.float64)
    def knows(x, t):
        signal, sigma = schedule.scales(t, x)
        return schedule.target(answer.expand_as(x), (x - signal * answer) / sigma, t)
    x, steps = answer + 0.02 * normal(3, 8, dtype=torch.float64), sampling_steps(schedule, count)
    z = ddim_invert(knows, x, steps, schedule=schedule)
    assert (z - x).abs().max() > 0.01 and torch.allclose(ddim(knows, z, steps, schedule=schedule), x, atol=1e-6)


def test_corrections_solve_the_step():
    "With enough of them the round trip is exact for any number of steps, and each costs an evaluation."
    schedule = NoiseSchedule()
    x, steps = MEANS + STD * normal(3, 2, dtype=torch.float64), sampling_steps(schedule, 25)
    errors = []
    for corrections in 0, 1, 3, 60:
        counted = Counted(exact(schedule))
        z = ddim_invert(counted, x, steps, schedule=schedule, corrections=corrections)
        assert len(counted.times) == 25 * (1 + corrections)
        errors.append((ddim(exact(schedule), z, steps, schedule=schedule) - x).abs().max().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[3] < 1e-9 < 1e-3 < errors[0]


def test_inversion_asks_where_it_stands():
    schedule, counted, seen = NoiseSchedule(), Counted(), []
    steps = sampling_steps(schedule, 4)
    x = normal(2, 8)
    z = ddim_invert(counted, x, steps, schedule=schedule, on_step=lambda i, t, x: seen.append((i, t)))
    assert counted.times == [0, 1, 251, 501] and seen == [(0, 1), (1, 251), (2, 501), (3, 751)]
    assert torch.equal(x, normal(2, 8)) and z.dtype == x.dtype
    halted = ddim_invert(denoiser, x, steps, schedule=schedule, on_step=lambda i, t, x: torch.zeros_like(x) if i == 3 else None)
    assert torch.equal(halted, torch.zeros_like(x))


# -- resampling and inpainting

@settings(deadline=None, max_examples=100)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 80))
def test_path_of_resampling(count, repeats, jump):
    steps = sampling_steps(NoiseSchedule(), count)
    path = resampling_steps(steps, repeats, jump)
    down = [pair for pair in path if pair[1] < pair[0]]
    assert sorted(down) == sorted(steps * repeats)                                            # each step, so many times
    assert len(path) - len(down) == (repeats - 1) * math.ceil(count / jump)
    assert (path[0][0], path[-1][1]) == (steps[0][0], -1) and all(a[1] == b[0] for a, b in zip(path, path[1:]))


def test_path_by_hand():
    steps = [(751, 501), (501, 251), (251, 1), (1, -1)]
    assert resampling_steps(steps, 2, 3) == [*steps[:3], (1, 751), *steps[:3], steps[3], (-1, 1), steps[3]]
    assert resampling_steps(steps, 1, 2) == steps


MASK = (torch.arange(8) >= 4).float().expand(1, 1, 8, 8)


@pytest.mark.parametrize("path", [dict(repeats=1), dict(repeats=3, jump=2)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("same", [True, False])
def test_known_latents_come_back_exactly_and_evaluations_are_counted(path, eta, same):
    schedule, counted, known, x = NoiseSchedule(), Counted(), normal(2, 4, 8, 8, seed=1), normal(2, 4, 8, 8, seed=2)
    steps = resampling_steps(sampling_steps(schedule, 10), **path)
    run = lambda seed: inpaint(counted, x, steps, seeded(seed), schedule=schedule, known=known, mask=MASK, noise=x if same else None, eta=eta)
    result = run(0)
    kept = MASK.expand_as(x) == 0
    assert torch.equal(result[kept], known[kept]) and not torch.isclose(result[~kept], known[~kept]).any()
    assert len(counted.times) == 10 * path["repeats"]
    assert torch.equal(run(0), result)
    deterministic = same and eta == 0 and path["repeats"] == 1
    assert torch.equal(run(1), result) == deterministic


def test_known_part_has_the_level_of_each_step():
    "On the way the known part is √ᾱ known + √(1 - ᾱ) noise; the noise is the one given, or fresh each time."
    schedule, known, x = NoiseSchedule(), normal(1, 4, 8, 8, seed=1), normal(1, 4, 8, 8, seed=2)
    steps = sampling_steps(schedule, 6)
    kept = MASK.expand_as(x) == 0
    for noise in x, None:
        seen = []
        inpaint(denoiser, x, steps, seeded(3), schedule=schedule, known=known, mask=MASK, noise=noise, on_step=lambda i, t, x: seen.append(x))
        noises = []
        for (_, t_next), x_next in list(zip(steps, seen))[:-1]:
            a = schedule.alpha_bar(t_next)
            noises.append(((x_next - a.sqrt() * known) / (1 - a).sqrt())[kept])
        if noise is None: assert all((a - b).abs().mean() > 0.5 for a, b in zip(noises, noises[1:])) and 0.8 < torch.cat(noises).std() < 1.2
        else: assert all(torch.allclose(n, x[kept], atol=1e-3) for n in noises)


def test_going_up_adds_the_noise_between_two_levels():
    "Noise of one pair up and of the whole way at once have the same distribution."
    schedule, x0 = NoiseSchedule(), torch.full((1, 200_000), 2.0)
    x = schedule.add_noise(x0, normal(1, 200_000), 301)
    up = inpaint(denoiser, x, [(301, 701)], seeded(1), schedule=schedule, known=x0, mask=torch.ones(1, 1))
    a = schedule.alpha_bar(701)
    assert up.mean() == pytest.approx(2 * a.sqrt().item(), abs=0.01) and up.var() == pytest.approx(1 - a.item(), abs=0.01)


def test_inpainting_by_the_pipeline(tmp_path):
    "With the starting noise for the known part, and no resampling, it is what StableDiffusion does with a mask."
    from PIL import Image
    from sd_scratch.guidance import guided
    from sd_scratch.pipeline import StableDiffusion
    pipe, picture = StableDiffusion.from_pretrained("tiny"), Image.effect_noise((32, 32), 80).convert("RGB")
    mask = Image.fromarray(np.uint8([[0] * 13 + [255] * 19] * 32))
    noise = normal(1, 4, 8, 8, seed=2)
    theirs = pipe("red heart", image=picture, mask_image=mask, strength=0.7, num_inference_steps=6, guidance_scale=3.0, latents=noise, generator=seeded(1), output_type="latent").images
    known = pipe.encode_images([picture], 32, 32, seeded(1))
    steps = sampling_steps(pipe.schedule, 6)[-4:]
    with torch.no_grad():
        network = guided(pipe.unet, pipe.encode_prompts(["red heart"]), pipe.encode_prompts([""]), 3.0)
        ours = inpaint(network, pipe.schedule.add_noise(known, noise, steps[0][0]), steps, schedule=pipe.schedule, known=known, mask=pipe.encode_mask(mask, 32, 32), noise=noise)
    close(ours, theirs)


# -- the sphere

@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0.1, 3))
def test_slerp(seed, share, ratio):
    a = normal(3, 4, 2, 2, seed=seed, dtype=torch.float64)
    b = normal(3, 4, 2, 2, seed=seed + 1, dtype=torch.float64)
    b = b / b.flatten(1).norm(dim=1)[:, None, None, None] * a.flatten(1).norm(dim=1)[:, None, None, None]
    mixed = slerp(a, b, share)
    assert torch.allclose(mixed.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))             # equal norms are kept
    assert torch.allclose(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b)
    assert torch.allclose(slerp(a, b, share), slerp(b, a, 1 - share))
    for i in range(3):                                                                        # a turn by the share of the angle, in the plane of both
        u = a[i].flatten() / a[i].norm()
        w = b[i].flatten() - (b[i].flatten() @ u) * u
        angle = math.acos((a[i] * b[i]).sum() / a[i].norm() / b[i].norm())
        turned = a[i].norm() * (math.cos(share * angle) * u + math.sin(share * angle) * w / w.norm())
        assert torch.allclose(mixed[i].flatten(), turned)


def test_slerp_in_rows_and_between_nearly_equal_ones():
    a, b = normal(1, 4, 8, 8), normal(1, 4, 8, 8, seed=1)
    row = slerp(a, b, torch.linspace(0, 1, 5))
    assert row.shape == (5, 4, 8, 8)
    for i in range(5): close(row[i:i + 1], slerp(a, b, i / 4))
    close(slerp(a, a, 0.3), a)
    close(slerp(a, 1.0001 * a, 0.3), a, 1e-3)


@pytest.mark.parametrize("a, b, share, says", [
    (torch.zeros(1, 4), torch.zeros(1, 5), 0.5, r"shapes \(1, 4\) and \(1, 5\)"), (torch.ones(1, 4), -torch.ones(1, 4), 0.5, "opposite"), (torch.ones(1, 4), torch.zeros(1, 4), 0.5, "all zeros"),
    (torch.ones(1, 4), torch.ones(1, 4), float("nan"), r"share is \[nan\]")])
def test_what_slerp_refuses(a, b, share, says):
    with pytest.raises(ValueError, match=says): slerp(a, b, share)


# -- a loss of one's own

@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("t", [50, 500, 950])
def test_steering_is_the_gradient(prediction_type, t):
    "The noise moves by scale √(1 - ᾱ) times the slope of the loss at the guessed clean picture, found by finite differences through denoiser and split."
    schedule, x = NoiseSchedule(prediction_type=prediction_type), normal(2, 6, dtype=torch.float64)
    loss = lambda x0: (x0 ** 2).mean(1) + x0[:, 0].sin()
    inner = lambda x, t: denoiser(x, t) * torch.tensor([[1.0], [0.5]])                         # a batch's pictures differ
    def at(x): return loss(schedule.split(inner(x, t), x, t)[0])
    slope = torch.zeros_like(x)
    for i in range(6):
        nudge = torch.zeros_like(x)
        nudge[:, i] = 1e-5
        slope[:, i] = (at(x + nudge) - at(x - nudge)) / 2e-5
    _, before = schedule.split(inner(x, t), x, t)
    x0, after = schedule.split(steered(inner, loss, 3.0, schedule=schedule)(x, t), x, t)
    signal, sigma = schedule.scales(t, x)
    assert torch.allclose(after - before, 3 * sigma * slope, rtol=1e-4, atol=1e-6)
    assert torch.allclose(signal * x0 + sigma * after, x)                                     # picture and noise still make up x


def test_steering_lowers_the_loss_and_leaves_no_trace():
    schedule, target = NoiseSchedule(), torch.tensor([[1.0, 1.0]])
    exact = lambda x, t: mixture_noise(x, t, MEANS.float(), STD, WEIGHTS, schedule)
    x, steps = normal(200, 2), sampling_steps(schedule, 30)
    loss = lambda x0: (x0 - target).square().sum(1)
    ends = [ddim(steered(exact, loss, scale, schedule=schedule), x, steps, schedule=schedule) for scale in (0.0, 0.5)]
    assert torch.allclose(ends[0], ddim(exact, x, steps, schedule=schedule), atol=1e-5)       # a scale of 0 changes nothing
    assert loss(ends[1]).mean() < 0.6 * loss(ends[0]).mean() and not ends[1].requires_grad
    with torch.no_grad(): inside = steered(exact, loss, 0.5, schedule=schedule)(x, 500)
    assert torch.equal(inside, steered(exact, loss, 0.5, schedule=schedule)(x, 500)) and torch.is_grad_enabled()


# -- bad input

SCHEDULE, X = NoiseSchedule(), torch.zeros(2, 4, 8, 8)
def paint(**more): return inpaint(denoiser, X, **dict(steps=[(500, 1), (1, -1)], schedule=SCHEDULE, known=X, mask=MASK) | more)


@pytest.mark.parametrize("attempt, says", [
    (lambda: resampling_steps([(1, -1)], 0), "repeats is 0"), (lambda: resampling_steps([(1, -1)], 2, 0.5), "jump is 0.5"), (lambda: resampling_steps([(1, -1)], True), "repeats is True"),
    (lambda: paint(steps=[(500, 1), (41, -1)]), "ends at 1 and the next one begins at 41"), (lambda: paint(steps=[(1000, 1)]), "from 0 to 999"), (lambda: paint(steps=[(1, 1000)]), "no time step 1000"),
    (lambda: paint(steps=[(5, 5)]), "from 5 to 5"),
    (lambda: paint(mask=torch.ones(1, 1, 32, 32)), r"mask has the shape \(1, 1, 32, 32\)"), (lambda: paint(mask=2 * MASK), "from 0"), (lambda: paint(mask=float("nan") * MASK), "from 0"),
    (lambda: paint(mask=torch.zeros(1, 1, 8, 8)), "nothing would be drawn"), (lambda: paint(known=X[:, :3]), r"known has the shape \(2, 3, 8, 8\)"), (lambda: paint(noise=X[:, :, :4]), r"noise has the shape \(2, 4, 4, 8\)"),
    (lambda: ddim_invert(denoiser, X, [(500, 600)], schedule=SCHEDULE), "downwards"), (lambda: ddim_invert(denoiser, X, [(500, 1)], schedule=SCHEDULE, corrections=-1), "corrections is -1"),
    (lambda: steered(denoiser, lambda x0: x0.sum(), 1.0, schedule=SCHEDULE)(X, 5), r"shape \(\)"), (lambda: steered(denoiser, lambda x0: x0.flatten(1).sum(1), float("inf"), schedule=SCHEDULE), "scale is inf"),
    (lambda: steered(denoiser, lambda x0: x0.detach().flatten(1).sum(1), 1.0, schedule=SCHEDULE)(X, 5), "doesn't depend on the picture"),
])
def test_refuses(attempt, says):
    with pytest.raises((ValueError, IndexError), match=says): attempt()
