"Classifier-free guidance: the formula, the order of the batch, when it is off, bad input."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from sd_scratch.guidance import guided
from sd_scratch.noise import PREDICTION_TYPES, NoiseSchedule
from sd_scratch.samplers import ddim, mixture_noise, sampling_steps


class Network:
    "Answers with something that depends on all three inputs, picture by picture, and keeps what it was given."
    def __init__(self): self.calls = []
    def __call__(self, x, t, text):
        assert len(x) == len(text)
        self.calls.append((x, t, text))
        return torch.sin(x + t / 100) * text.mean((1, 2)).reshape(-1, 1, 1, 1) + text[:, :1, :1, None]


def inputs(size=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 4, 5, 6, generator=generator), torch.randn(size, 7, 8, generator=generator), torch.randn(size, 7, 8, generator=generator)


@settings(deadline=None, max_examples=40)
@given(st.floats(1.001, 30))
def test_formula(scale):
    x, text, no_text = inputs()
    network = Network()
    with_prompt, without = network(x, 40, text), network(x, 40, no_text)
    stable_diffusion = without + scale * (with_prompt - without)
    paper = scale * with_prompt - (scale - 1) * without                     # Ho and Salimans, eq. 6: (1 + w') and w'
    result = guided(network, text, no_text, scale)(x, 40)
    assert torch.equal(result, stable_diffusion)
    assert torch.allclose(result, paper, atol=1e-4)


def test_one_call_of_twice_the_batch_with_nothing_first():
    x, text, no_text = inputs()
    network = Network()
    guided(network, text, no_text, 7.5)(x, 123)
    (seen, t, both), = network.calls
    assert t == 123 and torch.equal(seen, torch.cat([x, x])) and torch.equal(both, torch.cat([no_text, text]))


@pytest.mark.parametrize("nothing, scale", [(True, 1.0), (True, 1), (True, 0.5), (True, 0), (True, -2), (False, 7.5)])
def test_off_is_the_conditional_model_in_one_call(nothing, scale):
    x, text, no_text = inputs()
    network = Network()
    result = guided(network, text, no_text if nothing else None, scale)(x, 123)
    (seen, t, given_text), = network.calls
    assert seen is x and given_text is text and torch.equal(result, Network()(x, 123, text))


def test_scale_1_is_the_limit():
    x, text, no_text = inputs()
    assert torch.allclose(guided(Network(), text, no_text, 1 + 1e-7)(x, 5), guided(Network(), text, no_text, 1.0)(x, 5), atol=1e-5)


def test_pictures_do_not_mix():
    x, text, no_text = inputs()
    together = guided(Network(), text, no_text, 5.0)(x, 9)
    for i in range(3): assert torch.allclose(together[i:i + 1], guided(Network(), text[i:i + 1], no_text[i:i + 1], 5.0)(x[i:i + 1], 9), atol=1e-6)


def test_one_empty_prompt_serves_all():
    x, text, no_text = inputs()
    assert torch.equal(guided(Network(), text, no_text[:1], 5.0)(x, 9), guided(Network(), text, no_text[:1].repeat(3, 1, 1), 5.0)(x, 9))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "5", None, True, [5.0]])
def test_bad_scale(scale):
    _, text, no_text = inputs()
    with pytest.raises(ValueError, match="guidance scale"): guided(Network(), text, no_text, scale)


@pytest.mark.parametrize("shape", [(2, 7, 8), (3, 6, 8), (3, 7, 9)])
def test_texts_that_do_not_fit(shape):
    _, text, _ = inputs()
    with pytest.raises(ValueError, match=rf"{shape[0]}, {shape[1]}, {shape[2]}"): guided(Network(), text, torch.zeros(shape), 5.0)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_formula_means_the_same_in_every_prediction_type(kind):
    "Noise, picture and velocity are linear in one another with factors that add up, so guiding one guides all."
    epsilon, schedule = NoiseSchedule(), NoiseSchedule(prediction_type=kind)
    x, text, no_text = inputs()

    def network(x, t, text):
        x0, eps = epsilon.split(Network()(x, t, text), x, t)
        return schedule.target(x0, eps, t)

    ours = schedule.split(guided(network, text, no_text, 4.0)(x, 300), x, 300)
    theirs = epsilon.split(guided(Network(), text, no_text, 4.0)(x, 300), x, 300)
    for a, b in zip(ours, theirs): assert torch.allclose(a, b, atol=1e-4)


# -- on a distribution that is known: four bumps in a row, two of each class

SCHEDULE, MEANS = NoiseSchedule(), torch.tensor([[-1.2, 0.0], [-0.4, 0.0], [0.4, 0.0], [1.2, 0.0]])
LEFT, RIGHT = torch.tensor([0.5, 0.5, 0, 0]), torch.tensor([0, 0, 0.5, 0.5])


def draw(prompt, nothing, scale, n=500):
    network = lambda x, t, text: mixture_noise(x, t, MEANS, 0.3, text[:, 0], SCHEDULE)
    denoiser = guided(network, prompt.expand(n, 1, -1), nothing.expand(1, 1, -1), scale)
    return ddim(denoiser, torch.randn(n, 2, generator=torch.Generator().manual_seed(0)), sampling_steps(SCHEDULE, 40), schedule=SCHEDULE)


def test_guidance_pulls_away_from_the_other_class():
    means = [draw(LEFT, (LEFT + RIGHT) / 2, scale)[:, 0].mean() for scale in (1.0, 2.0, 4.0, 8.0)]
    assert means[0] == pytest.approx(-0.8, abs=0.05) and means == sorted(means, reverse=True) and means[-1] < -1.0


def test_a_negative_prompt_lowers_its_share():
    share = lambda scale: (draw((LEFT + RIGHT) / 2, 0.2 * LEFT + 0.8 * RIGHT, scale)[:, 0] > 0).float().mean()
    assert share(1.0) == pytest.approx(0.5, abs=0.07) and share(4.0) < 0.15
