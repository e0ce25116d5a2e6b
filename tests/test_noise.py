"The noise schedule: its tables against diffusers' and its properties, its file in both directions, bad input."
import json
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given, settings, strategies as st
from oracles import close

from sd_scratch.noise import BETA_SCHEDULES, PREDICTION_TYPES, NoiseSchedule, alpha_bars, beta_table, zero_terminal_snr

TABLES = [dict(beta_schedule=name, num_train_timesteps=total) for name in BETA_SCHEDULES for total in (1, 50, 1000)] + [
    dict(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)]


def reference(schedule): return DDIMScheduler(**schedule.config, clip_sample=False)


def batch(seed=0, size=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, 6, 7, generator=generator) * 0.7, torch.randn(size, 4, 6, 7, generator=generator)


@pytest.mark.parametrize("config", TABLES, ids=str)
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_tables_are_diffusers(config, set_alpha_to_one):
    schedule = NoiseSchedule(**config, set_alpha_to_one=set_alpha_to_one)
    theirs = reference(schedule)
    for name in "betas", "alphas_cumprod", "final_alpha_cumprod":
        ours = getattr(schedule, name)
        assert ours.dtype == torch.float32
        assert torch.equal(ours, getattr(theirs, name)), name          # every digit: a loss of one adds up over 1,000 products


@pytest.mark.parametrize("config", [c for c in TABLES if c.get("num_train_timesteps") != 1], ids=str)
def test_zero_terminal_snr_is_diffusers(config):
    schedule = NoiseSchedule(**config)
    before, ours = schedule.betas.clone(), zero_terminal_snr(schedule.betas)
    assert torch.equal(ours, rescale_zero_terminal_snr(schedule.betas.clone()))
    assert torch.equal(ours, DDIMScheduler(**schedule.config, clip_sample=False, rescale_betas_zero_snr=True).betas)
    assert torch.equal(schedule.betas, before)                         # the table that came in stays as it was
    a = alpha_bars(ours.double())
    assert ours[-1] == 1 and a[-1] == 0 and (a.diff() < 0).all()
    assert abs(a[0] - schedule.alphas_cumprod[0]) < 1e-6               # the first level stays


def test_zero_terminal_snr_shifts_and_stretches():
    "Lin et al. 2023, algorithm 1: the factor of the picture changes along a straight line."
    betas = beta_table().double()
    old, new = alpha_bars(betas).sqrt(), alpha_bars(zero_terminal_snr(betas)).sqrt()
    slope = (new[1:] - new[:-1]) / (old[1:] - old[:-1])
    assert torch.allclose(slope, slope[0].expand(999), rtol=1e-6) and slope[0] > 1


@pytest.mark.parametrize("betas", [[], [0.1]], ids=str)
def test_zero_terminal_snr_needs_two_steps(betas):
    with pytest.raises(ValueError, match=f"a table of {len(betas)} steps.*2 or more"): zero_terminal_snr(torch.tensor(betas))


@pytest.mark.parametrize("config", TABLES, ids=str)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_mixtures_are_diffusers(config, prediction_type):
    schedule = NoiseSchedule(**config, prediction_type=prediction_type)
    theirs = reference(schedule)
    x0, noise = batch()
    t = torch.tensor([0, 0.1, 0.5, 0.9, 1]).mul(schedule.num_train_timesteps - 1).long()
    close(schedule.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t))
    close(schedule.velocity(x0, noise, t), theirs.get_velocity(x0, noise, t))
    wanted = dict(epsilon=noise, sample=x0, v_prediction=theirs.get_velocity(x0, noise, t))[prediction_type]
    close(schedule.target(x0, noise, t), wanted)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_split_is_diffusers(prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    theirs = reference(schedule)
    theirs.set_timesteps(10)
    output, x_t = batch()
    for t in 1, 250, 999:
        close(schedule.split(output, x_t, t)[0], theirs.step(output, t, x_t).pred_original_sample)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(BETA_SCHEDULES), st.sampled_from(PREDICTION_TYPES), st.integers(0, 999), st.integers(0, 2**31))
def test_split_undoes_target(beta_schedule, prediction_type, t, seed):
    schedule = NoiseSchedule(beta_schedule=beta_schedule, prediction_type=prediction_type)
    x0, noise = (o.double() for o in batch(seed, size=2))
    t = torch.tensor([t, 999 - t])
    x_t = schedule.add_noise(x0, noise, t)
    found = schedule.split(schedule.target(x0, noise, t), x_t, t)
    signal, sigma = schedule.scales(t, x0)
    amplified = dict(epsilon=(1 / signal, 1), sample=(1, 1 / sigma), v_prediction=(1, 1))[prediction_type]
    for value, truth, factor in zip(found, (x0, noise), amplified):
        assert ((value - truth).abs() <= 2e-6 * factor).all()          # float32 tables, times what solving for it amplifies
    assert torch.allclose(schedule.add_noise(*found, t), x_t, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(BETA_SCHEDULES), st.integers(2, 1000), st.floats(1e-4, 0.01), st.floats(1, 20))
def test_alpha_bar_falls(beta_schedule, total, start, ratio):
    schedule = NoiseSchedule(total, start, min(start * ratio, 0.05), beta_schedule)
    a = schedule.alphas_cumprod
    assert len(a) == total and (a.diff() < 0).all() and 0 < a[-1] and a[0] < 1


def test_adding_noise_step_by_step_has_the_same_statistics():
    schedule = NoiseSchedule()
    generator = torch.Generator().manual_seed(0)
    x = torch.full((20_000,), 1.5)
    for t in range(301): x = (1 - schedule.betas[t]).sqrt() * x + schedule.betas[t].sqrt() * torch.randn(x.shape, generator=generator)
    at_once = schedule.add_noise(torch.full((20_000,), 1.5), torch.randn(20_000, generator=generator), 300)
    for walked, jumped in zip(torch.std_mean(x), torch.std_mean(at_once)): assert abs(walked - jumped) < 0.02
    assert abs(x.mean() - 1.5 * schedule.alpha_bar(300).sqrt()) < 0.02
    assert abs(x.var() - (1 - schedule.alpha_bar(300))) < 0.02


@pytest.mark.parametrize("t", [0, 10, 500, 999])
def test_variance_is_preserved(t):
    x0, noise = (torch.randn(50_000, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert abs(NoiseSchedule().add_noise(x0, noise, t).var() - 1) < 0.02


def test_alpha_bar_takes_numbers_and_tensors():
    schedule = NoiseSchedule(set_alpha_to_one=True)
    t = torch.tensor([[-3, 0], [5, 999]])
    assert schedule.alpha_bar(t).tolist() == [[1.0, schedule.alphas_cumprod[0].item()], [schedule.alphas_cumprod[5].item(), schedule.alphas_cumprod[999].item()]]
    assert schedule.alpha_bar(5) == schedule.alphas_cumprod[5] and schedule.alpha_bar(5).shape == ()
    for kind in torch.int32, torch.int16: assert torch.equal(schedule.alpha_bar(t.to(kind)), schedule.alpha_bar(t))
    assert torch.equal(schedule.alpha_bar(torch.tensor([5, 7], dtype=torch.uint8)), schedule.alphas_cumprod[[5, 7]])      # an index, not a mask
    assert schedule.alpha_bar(torch.tensor([], dtype=torch.long)).shape == (0,)


def test_each_picture_has_its_own_time_step():
    schedule = NoiseSchedule(prediction_type="v_prediction")
    x0, noise = batch()
    t = torch.tensor([3, 999, 0, 41, 500])
    for name in "add_noise", "velocity", "split":
        together, alone = getattr(schedule, name)(x0, noise, t), [getattr(schedule, name)(x0[i:i + 1], noise[i:i + 1], int(t[i])) for i in range(5)]
        if name == "split": together, alone = torch.stack(together, 1), [torch.stack(o, 1) for o in alone]
        assert torch.allclose(together, torch.cat(alone), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_number_format_is_kept(dtype):
    x0, noise = (o.to(dtype) for o in batch())
    for t in 700, torch.full((5,), 700):
        for kind in PREDICTION_TYPES:
            schedule = NoiseSchedule(prediction_type=kind)
            assert {o.dtype for o in (schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t), *schedule.split(x0, noise, t))} == {dtype}


# -- bad input

@pytest.mark.parametrize("total", [10, 1000])
@pytest.mark.parametrize("beyond", [0, 1, 5000])
def test_time_steps_out_of_range(total, beyond):
    schedule, t, x = NoiseSchedule(total), total + beyond, torch.zeros(2, 3)
    for call in (lambda: schedule.alpha_bar(t), lambda: schedule.alpha_bar(torch.tensor([0, t])), lambda: schedule.add_noise(x, x, torch.tensor([t, 1])),
                 lambda: schedule.velocity(x, x, t), lambda: schedule.split(x, x, t)):
        with pytest.raises(IndexError, match=f"no time step {t}: the schedule has {total}, from 0 to {total - 1}"): call()


def test_between_two_time_steps():
    schedule = NoiseSchedule()
    log_snr = (schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)).double().log().numpy()
    t = torch.tensor([0.0, 0.25, 1.0, 500.5, 998.75, 999.0])
    expected = 1 / (1 + np.exp(-np.interp(t.numpy(), np.arange(1000), log_snr)))
    assert torch.allclose(schedule.alpha_bar(t).double(), torch.from_numpy(expected), rtol=1e-5)
    assert torch.equal(schedule.alpha_bar(torch.tensor([-1.0, -0.5])), schedule.final_alpha_cumprod.expand(2))
    for beyond in 999.5, float("nan"):
        with pytest.raises(IndexError, match="no time step"): schedule.alpha_bar(beyond)


@pytest.mark.parametrize("t", [torch.tensor([True, False]), True], ids=str)
def test_time_steps_that_are_no_numbers(t):
    with pytest.raises(TypeError, match="numbers from 0 to 999"): NoiseSchedule().alpha_bar(t)


@pytest.mark.parametrize("betas, t", [([0.1, 0.0], 1), ([-0.1, 0.2], 0), ([0.1, 1.5], 1), ([1.0, 0.1], 1), ([0.1, float("nan"), 0.1], 1), ([0.5] * 1000, None), ([1e-9] * 3, 0)], ids=str)
def test_a_table_whose_alpha_bar_does_not_fall(betas, t):
    with pytest.raises(ValueError, match="ᾱ must fall in every step" if t is None else f"at time step {t} β is {torch.tensor(betas)[t].item():g}") as caught: alpha_bars(torch.tensor(betas))
    assert "between 0 and 1" in str(caught.value) and "float32" in str(caught.value)


@pytest.mark.parametrize("config", [dict(beta_start=1e-9, beta_end=1e-9), dict(beta_start=0.5, beta_end=0.9), dict(num_train_timesteps=200_000)], ids=str)
def test_a_schedule_whose_alpha_bar_does_not_fall(config):
    with pytest.raises(ValueError, match="ᾱ must fall in every step"): NoiseSchedule(**config)


@pytest.mark.parametrize("count", [2, 4, 6])
def test_batches_that_do_not_fit(count):
    schedule, (x0, noise) = NoiseSchedule(), batch()
    for call in (schedule.add_noise, schedule.velocity, schedule.split):
        with pytest.raises(ValueError, match=f"{count} time steps for 5 pictures"): call(x0, noise, torch.arange(count))
    for call in (schedule.add_noise, schedule.velocity):
        for other in noise[:count], noise[:1], noise[:, :1], noise[0]:
            if other.shape != x0.shape:
                with pytest.raises(ValueError, match=r"\(5, 4, 6, 7\).*draw noise of the pictures' shape"): call(x0, other, 3)
    assert torch.equal(schedule.add_noise(x0, noise, torch.tensor([3])), schedule.add_noise(x0, noise, 3))      # one for all


# -- the file

def no_warning(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args)


CONFIGS = [{}, dict(prediction_type="v_prediction", set_alpha_to_one=True, steps_offset=0, timestep_spacing="trailing"),
           dict(num_train_timesteps=400, beta_schedule="squaredcos_cap_v2", prediction_type="sample", timestep_spacing="linspace"),
           dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_diffusers_reads_what_we_write(config, tmp_path):
    ours = NoiseSchedule(**config)
    ours.save_pretrained(tmp_path / "scheduler")
    theirs = DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    assert {name: theirs.config[name] for name in ours.config} == ours.config
    assert not (theirs.config.clip_sample or theirs.config.thresholding or theirs.config.rescale_betas_zero_snr) and theirs.config.trained_betas is None
    assert json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"
    assert no_warning(NoiseSchedule.from_pretrained, tmp_path / "scheduler").config == ours.config


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_we_read_what_diffusers_writes(config, tmp_path):
    theirs = DDIMScheduler(**{**NoiseSchedule().config, **config}, clip_sample=False)
    theirs.save_pretrained(tmp_path)
    ours = no_warning(NoiseSchedule.from_pretrained, tmp_path)
    assert ours.config == {name: theirs.config[name] for name in ours.config}
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod) and ours.final_alpha_cumprod == theirs.final_alpha_cumprod


def test_what_a_file_leaves_out_has_the_default_of_the_class_it_names():
    theirs = DDIMScheduler(clip_sample=False)
    ours = NoiseSchedule.from_config(dict(_class_name="DDIMScheduler", clip_sample=False))
    assert ours.config == {name: theirs.config[name] for name in ours.config}
    theirs = PNDMScheduler(skip_prk_steps=True)
    with pytest.warns(UserWarning, match="PNDMScheduler"): ours = NoiseSchedule.from_config(dict(_class_name="PNDMScheduler", beta_schedule="linear"))
    assert ours.config == {name: theirs.config[name] for name in ours.config}
    assert NoiseSchedule.from_config({}).config == NoiseSchedule().config                   # with no class named, they're our own arguments


@pytest.mark.parametrize("name", ["EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep",
                                  "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "LCM", "TCD"])
def test_other_samplers_have_defaults_of_their_own(name):
    theirs = getattr(diffusers, f"{name}Scheduler")()
    with pytest.warns(UserWarning, match=name): ours = NoiseSchedule.from_config(dict(_class_name=f"{name}Scheduler"))
    shared = ours.config.keys() & theirs.config.keys()
    assert {key: ours.config[key] for key in shared} == {key: theirs.config[key] for key in shared} and len(shared) >= 5
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


# As published with Stable Diffusion 1.5 and 2.1: old versions of diffusers wrote them.
SD15 = dict(_class_name="PNDMScheduler", _diffusers_version="0.6.0", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            num_train_timesteps=1000, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1, trained_betas=None)
SD21 = {**SD15, "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "prediction_type": "v_prediction"}


def test_published_configurations():
    with pytest.warns(UserWarning, match="PNDMScheduler.*DDIM"): schedule = NoiseSchedule.from_config(SD15)
    assert schedule.config == NoiseSchedule().config
    assert no_warning(NoiseSchedule.from_config, SD21).config == NoiseSchedule(prediction_type="v_prediction").config
    assert SD15["_class_name"] == "PNDMScheduler" and "trained_betas" in SD15                # the caller's dict stays as it was


def test_another_sampler_becomes_ddim_on_its_own_noise(tmp_path):
    theirs = EulerDiscreteScheduler(beta_start=0.001, beta_end=0.03, beta_schedule="linear", prediction_type="v_prediction", use_karras_sigmas=True)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="EulerDiscreteScheduler.*use_karras_sigmas=True"): ours = NoiseSchedule.from_pretrained(tmp_path)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert ours.prediction_type == "v_prediction" and ours.timestep_spacing == "linspace" and ours.final_alpha_cumprod == 1


@pytest.mark.parametrize("option", [dict(clip_sample=True), dict(thresholding=True), dict(rescale_betas_zero_snr=True), dict(trained_betas=[0.1, 0.2]),
                                    dict(use_flow_sigmas=True), dict(beta_schedule="sigmoid"), dict(prediction_type="flow_prediction"),
                                    dict(timestep_spacing="karras"), dict(num_train_timesteps=0), dict(num_train_timesteps="1000"), dict(num_train_timesteps=10.5),
                                    dict(beta_start=0.0), dict(beta_end=1.0), dict(beta_end=0.0001), dict(beta_end="0.012"), dict(beta_start=float("nan")),
                                    dict(steps_offset=-1), dict(steps_offset=True), dict(set_alpha_to_one=None)], ids=str)
@pytest.mark.parametrize("published", [SD15, SD21], ids=["PNDM", "DDIM"])
def test_refused(option, published, tmp_path):
    name, value = next(iter(option.items()))
    (tmp_path / "scheduler_config.json").write_text(json.dumps({**published, **option}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=name) as caught: NoiseSchedule.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "scheduler_config.json" in message and repr(value) in message and "\n" not in message


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_clipping_is_on_unless_the_file_says_otherwise(name):
    with pytest.raises(ValueError, match="clip_sample=True"): NoiseSchedule.from_config(dict(_class_name=name, beta_schedule="linear"))


def test_unknown_option_of_ddim_is_refused_unless_it_is_off():
    with pytest.raises(ValueError, match="new_trick=3"): NoiseSchedule.from_config({**SD21, "new_trick": 3})
    assert NoiseSchedule.from_config({**SD21, "new_trick": False}).config == NoiseSchedule.from_config(SD21).config


def test_other_kinds_of_noise_are_refused():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no beta_schedule"):
        NoiseSchedule.from_config(dict(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, shift=3.0))


def test_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="scheduler_config.json"): NoiseSchedule.from_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    for content in '{"_class_name": "DDIMSch', "", "[1, 2]", "\x00\xff":
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="scheduler_config.json"): NoiseSchedule.from_pretrained(tmp_path)


@pytest.mark.parametrize("bad", [dict(beta_schedule="cosine"), dict(prediction_type="noise"), dict(timestep_spacing="even")], ids=str)
def test_unknown_names_list_what_there_is(bad):
    with pytest.raises(ValueError) as caught: NoiseSchedule(**bad)
    allowed = dict(beta_schedule="scaled_linear", prediction_type="v_prediction", timestep_spacing="leading")
    assert allowed[next(iter(bad))] in str(caught.value)
    with pytest.raises(ValueError, match="squaredcos_cap_v2"): beta_table("cosine")
