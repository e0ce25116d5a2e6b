"Sampling steps and samplers: against diffusers' schedulers, against the formula in float64, and on a distribution that is known."
import math

import diffusers
import numpy as np
import pytest
import scipy
import torch
from hypothesis import given, settings, strategies as st
from oracles import close

from sd_scratch.noise import PREDICTION_TYPES, TIMESTEP_SPACINGS, NoiseSchedule
from sd_scratch.denoising import ddpm, draw_noise
from sd_scratch.samplers import SAMPLERS, ddim, dpm_solver, euler, euler_ancestral, heun, karras_steps, mixture_noise, noise_level, sampler_named, sampling_steps

COUNTS = (1, 7, 13, 25, 50)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def reference(schedule): return diffusers.DDIMScheduler(**schedule.config, clip_sample=False)


class Gap:
    "Stands for a number of steps: makes diffusers' `num_train_timesteps // num_inference_steps` the given length of a step."
    def __init__(self, length): self.length = length
    def __rfloordiv__(self, total): return self.length


def denoiser(x, t):
    "Answer with something that depends on every number given, and is about as large as a network's answer."
    return torch.tanh(x.flip(-1) * (1 + t / 700)) + math.sin(t)


# -- which time steps

@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("total", [1000, 400])
def test_time_steps_are_diffusers(spacing, offset, total):
    schedule = NoiseSchedule(total, timestep_spacing=spacing, steps_offset=offset)
    theirs = reference(schedule)
    for count in range(1, total + 1):
        theirs.set_timesteps(count)
        expected = theirs.timesteps.tolist()
        if spacing == "trailing" and len(expected) == count + 1: assert expected.pop() == -1   # a rounded step length gives diffusers one too many
        if expected[0] >= total:                                                               # diffusers looks beyond the end of its table
            with pytest.raises(ValueError, match="take fewer steps"): sampling_steps(schedule, count)
            continue
        assert [t for t, _ in sampling_steps(schedule, count)] == expected, count


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(TIMESTEP_SPACINGS), st.integers(0, 1), st.integers(1, 1000), st.data())
def test_steps_fall_and_join(spacing, offset, total, data):
    count = data.draw(st.integers(1, max(1, total - offset)))
    schedule = NoiseSchedule(total, timestep_spacing=spacing, steps_offset=0 if total == 1 else offset)
    steps = sampling_steps(schedule, count)
    assert len(steps) == count and steps[-1][1] < 0
    assert all(type(t) is int and 0 <= t < total and t_next < t for t, t_next in steps)
    assert all(after[0] == before[1] for before, after in zip(steps, steps[1:]))


def test_steps_by_hand():
    assert sampling_steps(NoiseSchedule(timestep_spacing="trailing"), 13)[:4] == [(999, 922), (922, 845), (845, 768), (768, 691)]
    assert sampling_steps(NoiseSchedule(), 1) == [(1, -1)]
    assert sampling_steps(NoiseSchedule(steps_offset=0), 1000)[::999] == [(999, 998), (0, -1)]
    assert sampling_steps(NoiseSchedule(timestep_spacing="linspace"), 1000) == sampling_steps(NoiseSchedule(timestep_spacing="trailing"), 1000)


@pytest.mark.parametrize("count", [0, -1, 1001, 2.5, "25", None, True, float("nan")])
def test_bad_counts(count):
    with pytest.raises(ValueError, match="from 1 to 1000") as caught: sampling_steps(NoiseSchedule(), count)
    assert repr(count) in str(caught.value)


def test_an_offset_that_leaves_the_schedule():
    with pytest.raises(ValueError, match="time step 1000.*the last one is 999"): sampling_steps(NoiseSchedule(steps_offset=1), 1000)
    assert sampling_steps(NoiseSchedule(steps_offset=1), 999)[0][0] == 999


# -- DDIM

def follow(schedule, count, eta, right_gap):
    "Walk with diffusers; at each step do the same step with ours, from the same x."
    theirs = reference(schedule)
    theirs.set_timesteps(count)
    x = torch.randn(2, 4, 5, 6, generator=seeded(1))
    generators = seeded(2), seeded(2)
    steps = sampling_steps(schedule, count)
    assert [t for t, _ in steps] == theirs.timesteps.tolist()
    for t, t_next in steps:
        if right_gap: theirs.num_inference_steps = Gap(t - t_next if t_next >= 0 else 10_000)
        after = theirs.step(denoiser(x, t), t, x, eta=eta, generator=generators[0]).prev_sample
        close(ddim(denoiser, x, [(t, t_next)], generators[1], schedule=schedule, eta=eta), after)
        x = after
    assert torch.equal(generators[0].get_state(), generators[1].get_state())    # as many random numbers drawn


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("offset, to_one", [(1, False), (0, False), (0, True), (3, True)])
def test_leading_is_diffusers(count, eta, prediction_type, offset, to_one):
    schedule = NoiseSchedule(prediction_type=prediction_type, steps_offset=offset, set_alpha_to_one=to_one)
    follow(schedule, count, eta, right_gap=False)


@pytest.mark.parametrize("count", [1, 2, 25, 50])                               # these divide 1,000: diffusers' own step lengths are right
@pytest.mark.parametrize("eta", [0.0, 0.4])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("to_one", [False, True])
def test_trailing_is_diffusers(count, eta, prediction_type, to_one):
    schedule = NoiseSchedule(prediction_type=prediction_type, timestep_spacing="trailing", set_alpha_to_one=to_one)
    follow(schedule, count, eta, right_gap=False)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("eta", [0.0, 0.4])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_other_spacings_are_diffusers_where_it_is_told_where_to_go(count, eta, prediction_type, spacing):
    # diffusers takes every step to be 1000 // n long, which `linspace` never is, and `trailing` only where n divides 1,000.
    follow(NoiseSchedule(prediction_type=prediction_type, timestep_spacing=spacing, beta_schedule="linear"), count, eta, right_gap=True)


PRODUCT = [1 - (0.00085 ** 0.5 + (0.012 ** 0.5 - 0.00085 ** 0.5) * i / 999) ** 2 for i in range(1000)]
for i in range(1, 1000): PRODUCT[i] *= PRODUCT[i - 1]


def by_formula(schedule, output, x, t, t_next, eta, z):
    "One step by eqs. 12 and 16 of Song et al. 2020, in Python's floats."
    a = PRODUCT[t]
    a_next = PRODUCT[t_next] if t_next >= 0 else 1.0 if schedule.set_alpha_to_one else PRODUCT[0]
    eps = dict(epsilon=lambda: output, sample=lambda: (x - math.sqrt(a) * output) / math.sqrt(1 - a),
               v_prediction=lambda: math.sqrt(a) * output + math.sqrt(1 - a) * x)[schedule.prediction_type]()
    x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    sigma = eta * math.sqrt((1 - a_next) / (1 - a)) * math.sqrt(1 - a / a_next)
    return math.sqrt(a_next) * x0 + math.sqrt(max(0.0, 1 - a_next - sigma ** 2)) * eps + sigma * z


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("eta", [0.0, 0.4])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("to_one", [False, True])
def test_every_step_is_the_formula(count, eta, prediction_type, spacing, to_one):
    schedule = NoiseSchedule(prediction_type=prediction_type, timestep_spacing=spacing, set_alpha_to_one=to_one)
    x = torch.randn(1, 12, generator=seeded(3))
    ours, random = seeded(4), seeded(4)
    for t, t_next in sampling_steps(schedule, count):
        z = torch.randn(1, 12, generator=random)
        truth = by_formula(schedule, denoiser(x, t).double(), x.double(), t, t_next, eta, z.double())
        after = ddim(denoiser, x, [(t, t_next)], ours, schedule=schedule, eta=eta)
        # float32 tables: 1 - ᾱ has 3 digits fewer than ᾱ near ᾱ = 1, and ᾱ is a product of up to 1,000 rounded numbers
        assert (after - truth).abs().max() <= 2e-4 * max(1, truth.abs().max()), t
        x = after


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_whole_run_is_diffusers(eta, prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    theirs = reference(schedule)
    theirs.set_timesteps(25)
    start = theirs_x = torch.randn(2, 3, 4, 4, generator=seeded(5))
    generator = seeded(6)
    for t in theirs.timesteps: theirs_x = theirs.step(denoiser(theirs_x, int(t)), t, theirs_x, eta=eta, generator=generator).prev_sample
    ours = ddim(denoiser, start, sampling_steps(schedule, 25), seeded(6), schedule=schedule, eta=eta)
    assert (ours - theirs_x).abs().max() <= 1e-4 * max(1, theirs_x.abs().max())


def test_a_list_of_generators_is_diffusers():
    schedule = NoiseSchedule()
    theirs = reference(schedule)
    theirs.set_timesteps(5)
    start = theirs_x = torch.randn(3, 4, 4, 4, generator=seeded(5))
    generators = [seeded(i) for i in range(3)]
    for t in theirs.timesteps: theirs_x = theirs.step(denoiser(theirs_x, int(t)), t, theirs_x, eta=1.0, generator=generators).prev_sample
    steps = sampling_steps(schedule, 5)
    ours = ddim(denoiser, start, steps, [seeded(i) for i in range(3)], schedule=schedule, eta=1.0)
    assert (ours - theirs_x).abs().max() <= 1e-4 * max(1, theirs_x.abs().max())
    alone = ddim(denoiser, start[1:2], steps, seeded(1), schedule=schedule, eta=1.0)
    assert torch.allclose(ours[1:2], alone, atol=1e-5)                           # a picture doesn't depend on its neighbours
    with pytest.raises(ValueError, match="2 generators for 3 pictures"): ddim(denoiser, start, steps, [seeded(), seeded()], schedule=schedule, eta=1.0)


def test_random_numbers():
    schedule, x, steps = NoiseSchedule(), torch.randn(2, 8, generator=seeded(7)), [(981, 500), (500, 20), (20, -1)]
    run = lambda seed, eta: ddim(denoiser, x, steps, seeded(seed), schedule=schedule, eta=eta)
    assert torch.equal(run(0, 1.0), run(0, 1.0)) and not torch.equal(run(0, 1.0), run(1, 1.0))
    assert torch.equal(run(0, 0.0), run(1, 0.0))
    generator = seeded(0)
    ddim(denoiser, x, steps, generator, schedule=schedule)
    assert torch.equal(generator.get_state(), seeded(0).get_state())             # with η = 0 none is drawn
    torch.manual_seed(9)
    first = ddim(denoiser, x, steps, schedule=schedule, eta=0.5)
    torch.manual_seed(9)
    assert torch.equal(first, ddim(denoiser, x, steps, schedule=schedule, eta=0.5))
    assert draw_noise((2, 3), seeded(), dtype=torch.float64).dtype == torch.float64


def test_on_step_sees_and_replaces():
    schedule, x = NoiseSchedule(), torch.randn(2, 8, generator=seeded(8))
    steps, seen = sampling_steps(schedule, 4), []
    plain = ddim(denoiser, x, steps, schedule=schedule, on_step=lambda i, t, x: seen.append((i, t, x)))
    assert [(i, t) for i, t, _ in seen] == list(enumerate([751, 501, 251, 1])) and torch.equal(seen[-1][2], plain)
    replaced = ddim(denoiser, x, steps, schedule=schedule, on_step=lambda i, t, x: torch.zeros_like(x) if i == 1 else None)
    assert torch.equal(replaced, ddim(denoiser, torch.zeros_like(x), steps[2:], schedule=schedule))
    assert torch.equal(x, torch.randn(2, 8, generator=seeded(8)))                # the caller's x stays as it was


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_bad_eta(eta):
    with pytest.raises(ValueError, match="eta is"): ddim(denoiser, torch.zeros(1, 2), [(1, -1)], schedule=NoiseSchedule(), eta=eta)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_number_format_is_kept(dtype):
    x = torch.randn(2, 8, generator=seeded()).to(dtype)
    assert ddim(denoiser, x, sampling_steps(NoiseSchedule(), 3), seeded(), schedule=NoiseSchedule(), eta=0.5).dtype == dtype


# -- on a distribution that is known

MEANS, STD, WEIGHTS = torch.tensor([[-1.0, 0.5], [1.0, 1.0], [0.2, -1.2]]), 0.15, torch.tensor([0.5, 0.3, 0.2])


def test_mixture_noise_is_the_score():
    schedule = NoiseSchedule()
    for t in 0, 300, 999:
        x = (torch.randn(6, 2, generator=seeded(t)).double()).requires_grad_()
        a = schedule.alpha_bar(t).double()
        bumps = torch.distributions.MultivariateNormal(a.sqrt() * MEANS.double(), torch.eye(2, dtype=torch.float64) * (a * STD ** 2 + 1 - a))
        score, = torch.autograd.grad(torch.logsumexp(WEIGHTS.double().log() + bumps.log_prob(x[:, None]), 1).sum(), x)
        ours = mixture_noise(x.detach(), t, MEANS.double(), STD, WEIGHTS.double(), schedule)
        assert torch.allclose(ours, -(1 - a).sqrt() * score, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_noise_becomes_the_mixture(eta, spacing):
    schedule = NoiseSchedule(timestep_spacing=spacing)
    exact = lambda x, t: mixture_noise(x, t, MEANS, STD, WEIGHTS, schedule)
    points = ddim(exact, torch.randn(2000, 2, generator=seeded(11)), sampling_steps(schedule, 300 if eta else 100), seeded(12), schedule=schedule, eta=eta)
    nearest = torch.cdist(points, MEANS).argmin(1)
    assert (torch.bincount(nearest, minlength=3) / 2000 - WEIGHTS).abs().max() < 0.04
    assert (points - MEANS[nearest]).square().mean().sqrt() == pytest.approx(STD, abs=0.02)

# -- the other samplers

COMMON = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
THEIRS = dict(euler=diffusers.EulerDiscreteScheduler, euler_ancestral=diffusers.EulerAncestralDiscreteScheduler, heun=diffusers.HeunDiscreteScheduler, dpm_solver=diffusers.DPMSolverMultistepScheduler)


CASES = [(name, kind) for name in THEIRS for kind in PREDICTION_TYPES if kind != "sample" or name in ("euler", "dpm_solver")]   # the others of diffusers don't know it


def parts(t): return (1 + noise_level(NoiseSchedule(), t).double().item() ** 2) ** 0.5


@pytest.mark.parametrize("count", [1, 7, 13, 50])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("name, prediction_type", CASES)
def test_samplers_are_diffusers(name, spacing, prediction_type, count):
    "Walk with diffusers on our time steps; each of our steps begins where theirs does. It holds x̄, we hold x = x̄/√(1 + σ²); DPM-Solver holds x."
    schedule = NoiseSchedule(prediction_type=prediction_type, timestep_spacing=spacing)
    steps = sampling_steps(schedule, count)
    theirs = THEIRS[name](**COMMON, prediction_type=prediction_type, timestep_spacing=spacing)
    if name == "euler_ancestral":                                                  # it can't be given time steps: only those that it would choose itself
        theirs.config.steps_offset = 1
        theirs.set_timesteps(count)
        if theirs.timesteps.tolist() != [t for t, _ in steps]: steps = [(float(t), float(u)) for t, u in zip(theirs.timesteps, [*theirs.timesteps[1:], -1])]
    else: theirs.set_timesteps(timesteps=[t for t, _ in steps])
    held = (lambda x, t: x) if name == "dpm_solver" else (lambda x, t: x * parts(t))
    given = (lambda x, t: x) if name == "dpm_solver" else (lambda x, t: x / parts(t))
    x = torch.randn(2, 3, 4, 4, generator=seeded(1))
    ours, random = seeded(2), seeded(2)
    theirs_x = held(x, steps[0][0])
    told = iter(theirs.timesteps)

    def their_step(x):
        t = next(told)
        output = denoiser(theirs.scale_model_input(x, t), t.item())
        return theirs.step(output, t, x, **(dict(generator=random) if name == "euler_ancestral" else {})).prev_sample

    before = []
    for i, (t, t_next) in enumerate(steps):
        x = given(theirs_x, t)
        theirs_x = their_step(theirs_x)
        if name == "heun" and t_next >= 0: theirs_x = their_step(theirs_x)
        if name == "dpm_solver": continue
        close(SAMPLERS[name](denoiser, x, [(t, t_next)], ours, schedule=schedule), given(theirs_x, t_next))
    if name == "dpm_solver":                                                       # it remembers: the run as a whole
        start = torch.randn(2, 3, 4, 4, generator=seeded(1))
        run = dpm_solver(denoiser, start, steps, schedule=schedule)
        assert (run - theirs_x).abs().max() <= 1e-4 * max(1, theirs_x.abs().max())


@pytest.mark.parametrize("count", [7, 13, 50])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddpm_is_diffusers(count, prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type, set_alpha_to_one=True)
    theirs = diffusers.DDPMScheduler(**COMMON, prediction_type=prediction_type, timestep_spacing="leading", steps_offset=1, clip_sample=False)
    theirs.set_timesteps(count)
    x, ours, random = torch.randn(2, 3, 4, 4, generator=seeded(1)), seeded(2), seeded(2)
    for t, t_next in sampling_steps(schedule, count):
        after = theirs.step(denoiser(x, t), t, x, generator=random).prev_sample
        if t_next >= 0: close(ddpm(denoiser, x, [(t, t_next)], ours, schedule=schedule), after)
        x = after


@pytest.mark.parametrize("count", [2, 7, 13, 50])
def test_karras_steps_are_diffusers(count):
    theirs = diffusers.EulerDiscreteScheduler(**COMMON, timestep_spacing="linspace", use_karras_sigmas=True)
    theirs.set_timesteps(count)
    steps = karras_steps(NoiseSchedule(), count)
    assert torch.allclose(torch.tensor([t for t, _ in steps]), theirs.timesteps.float(), atol=2e-2)
    assert torch.allclose(torch.stack([noise_level(NoiseSchedule(), t) for t, _ in steps]), theirs.sigmas[:-1], rtol=1e-4)
    assert [after for _, after in steps] == [t for t, _ in steps[1:]] + [-1] and all(t > after for t, after in steps)


def test_time_steps_of_karras_do_not_depend_on_spacing_but_on_rho():
    assert karras_steps(NoiseSchedule(timestep_spacing="trailing"), 9) == karras_steps(NoiseSchedule(), 9)
    even = torch.stack([noise_level(NoiseSchedule(), t) for t, _ in karras_steps(NoiseSchedule(), 9, rho=1.)]).diff()
    assert torch.allclose(even, even.mean().expand(8), rtol=1e-3)
    assert karras_steps(NoiseSchedule(), 1) == [(999.0, -1)]


@pytest.mark.parametrize("bad", [0, -3, 2.5, True, None])
def test_bad_karras_steps(bad):
    with pytest.raises(ValueError, match="1 or more"): karras_steps(NoiseSchedule(), bad)
    with pytest.raises(ValueError, match="rho is 0"): karras_steps(NoiseSchedule(), 5, rho=0)


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_euler_is_ddim_and_its_ancestor_is_ddpm(spacing):
    schedule = NoiseSchedule(timestep_spacing=spacing, set_alpha_to_one=True, prediction_type="v_prediction")
    x, steps = torch.randn(2, 3, 4, 4, generator=seeded(1)).double(), sampling_steps(schedule, 20)
    assert torch.allclose(euler(denoiser, x, steps, schedule=schedule), ddim(denoiser, x, steps, schedule=schedule), atol=1e-4)
    assert torch.allclose(euler_ancestral(denoiser, x, steps, seeded(3), schedule=schedule), ddpm(denoiser, x, steps, seeded(3), schedule=schedule), atol=1e-4)


def flowed(points, first, last):
    "Solve the probability-flow equation of the mixture with scipy, between two levels."
    means, weights = MEANS.double().numpy(), WEIGHTS.double().numpy()
    def slope(sigma, flat):
        way = means - flat.reshape(-1, 1, 2)
        share = scipy.special.softmax(np.log(weights) - (way ** 2).sum(-1) / (2 * (STD ** 2 + sigma ** 2)), axis=1)
        return (-sigma * (share[..., None] * way).sum(1) / (STD ** 2 + sigma ** 2)).ravel()
    solved = scipy.integrate.solve_ivp(slope, (first, last), points.numpy().ravel(), method="DOP853", rtol=1e-10, atol=1e-10)
    return torch.from_numpy(solved.y[:, -1].reshape(-1, 2))


@pytest.mark.parametrize("sampler, order", [(ddim, 1), (euler, 1), (heun, 2), (dpm_solver, 2)])
def test_order(sampler, order):
    schedule = NoiseSchedule()
    exact = lambda x, t: mixture_noise(x, t, MEANS.double(), STD, WEIGHTS.double(), schedule)
    x, first, last = torch.randn(32, 2, generator=seeded(4)).double(), parts(999), parts(0)
    truth = flowed(x * first, (first ** 2 - 1) ** 0.5, (last ** 2 - 1) ** 0.5) / last
    error = [(sampler(exact, x, karras_steps(schedule, n + 1)[:-1], schedule=schedule) - truth).norm(dim=1).mean().item() for n in (40, 80)]
    assert 0.75 * 2 ** order < error[0] / error[1] < 1.4 * 2 ** order and error[1] < (0.02, 0.001)[order - 1]


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_signature_for_all(name):
    schedule, seen = NoiseSchedule(), []
    x, steps = torch.randn(2, 8, generator=seeded(8)), sampling_steps(schedule, 4)
    run = lambda x, steps, on_step=None: sampler_named(name)(denoiser, x, steps, seeded(0), schedule=schedule, on_step=on_step)
    plain = run(x, steps, on_step=lambda i, t, x: seen.append((i, t, x)))
    assert [(i, t) for i, t, _ in seen] == list(enumerate([751, 501, 251, 1])) and torch.equal(seen[-1][2], plain)
    assert torch.equal(run(x, steps), plain) and torch.equal(x, torch.randn(2, 8, generator=seeded(8)))
    assert torch.equal(run(x, steps, on_step=lambda i, t, x: torch.zeros_like(x) if i == 3 else None), torch.zeros_like(x))
    assert run(x.half(), steps).dtype == torch.float16


def test_a_sampler_that_is_not_known():
    with pytest.raises(ValueError, match="no sampler 'plms'; there are ddpm, ddim, euler, euler_ancestral, heun, dpm_solver"): sampler_named("plms")


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps, says", [([(1000, 500), (500, -1)], "begins at time step 1000: there are those from 0 to 999"),
                                         ([(-1, -2)], "begins at time step -1"), ([(float("nan"), -1)], "begins at time step nan"),
                                         ([(500, 600)], "from 500 to 600: noise is taken out downwards"), ([(7, 7)], "from 7 to 7"),
                                         ([(900, 500), (400, -1)], "ends at 500 and the next one begins at 400")])
def test_steps_that_no_sampler_takes(name, steps, says):
    with pytest.raises(ValueError, match=says): SAMPLERS[name](denoiser, torch.zeros(1, 2), steps, seeded(), schedule=NoiseSchedule())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("count", [1, 4, 13])
def test_evaluations_of_the_network(name, count):
    looks = []
    def counted(x, t): looks.append(t); return denoiser(x, t)
    SAMPLERS[name](counted, torch.zeros(1, 2), sampling_steps(NoiseSchedule(), count), seeded(), schedule=NoiseSchedule())
    assert len(looks) == (2 * count - 1 if name == "heun" else count)
