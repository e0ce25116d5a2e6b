"Guidance: the formula, the order of the batch, what each scale costs, a classifier's slope, attention maps, bad input."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from oracles import randomised
from sd_scratch.guidance import attention_maps, classifier_guided, guided
from sd_scratch.noise import PREDICTION_TYPES, NoiseSchedule
from sd_scratch.samplers import ddim, karras_steps, mixture_noise, sampling_steps
from sd_scratch.unet import UNet2DConditionModel


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


@settings(deadline=None, max_examples=60)
@given(st.one_of(st.floats(0, 30), st.integers(0, 30)))
def test_formula(scale):
    x, text, no_text = inputs()
    network = Network()
    with_prompt, without = network(x, 40, text), network(x, 40, no_text)
    stable_diffusion = without + scale * (with_prompt - without)
    paper = scale * with_prompt - (scale - 1) * without                     # Ho and Salimans, eq. 6: (1 + w') and w'
    result = guided(network, text, no_text, scale)(x, 40)
    assert torch.allclose(result, stable_diffusion, atol=1e-5) and torch.allclose(result, paper, atol=1e-4)


def test_one_call_of_twice_the_batch_with_nothing_first():
    x, text, no_text = inputs()
    network = Network()
    guided(network, text, no_text, 7.5)(x, 123)
    (seen, t, both), = network.calls
    assert t == 123 and torch.equal(seen, torch.cat([x, x])) and torch.equal(both, torch.cat([no_text, text]))


@pytest.mark.parametrize("negative, scale, follows", [(True, 1.0, "text"), (True, 1, "text"), (False, 7.5, "text"), (False, 0, "text"), (True, 0, "no_text"), (True, 0.0, "no_text")])
def test_one_question_where_one_is_enough(negative, scale, follows):
    x, text, no_text = inputs()
    network, one = Network(), dict(text=text, no_text=no_text)[follows]
    result = guided(network, text, no_text if negative else None, scale)(x, 123)
    (seen, t, given_text), = network.calls
    assert seen is x and torch.equal(given_text, one) and torch.equal(result, Network()(x, 123, one))


@pytest.mark.parametrize("scale", [0.3, 1.5])
def test_two_questions_where_two_are_needed(scale):
    x, text, no_text = inputs()
    network = Network()
    guided(network, text, no_text, scale)(x, 123)
    assert [len(seen) for seen, *_ in network.calls] == [2 * len(x)]


@pytest.mark.parametrize("edge", [0, 1])
def test_the_edges_are_limits(edge):
    x, text, no_text = inputs()
    near = guided(Network(), text, no_text, abs(edge - 1e-7))(x, 5)
    assert torch.allclose(near, guided(Network(), text, no_text, float(edge))(x, 5), atol=1e-5)


@pytest.mark.parametrize("steps", [sampling_steps(NoiseSchedule(), 20), karras_steps(NoiseSchedule(), 20)], ids=["leading", "karras"])
def test_between_guides_there_and_costs_two_questions_there(steps):
    x, text, no_text = inputs()
    network, low, high = Network(), 200, 701
    denoiser = guided(network, text, no_text, 4.0, between=(low, high))
    ddim(denoiser, x, steps, schedule=NoiseSchedule())
    inside = [low <= t <= high for t, _ in steps]
    assert [len(seen) // len(x) for seen, *_ in network.calls] == [2 if guide else 1 for guide in inside] and {True, False} == set(inside)
    for t in (200, 450, 701): assert torch.equal(denoiser(x, t), guided(Network(), text, no_text, 4.0)(x, t))
    for t in (199, 702): assert torch.equal(denoiser(x, t), Network()(x, t, text))


@pytest.mark.parametrize("between", [(500, 200), (float("nan"), 3)])
def test_an_interval_that_is_none(between):
    _, text, no_text = inputs()
    with pytest.raises(ValueError, match="lower one first"): guided(Network(), text, no_text, 4.0, between=between)


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
    for negative in (no_text, None):
        with pytest.raises(ValueError, match="guidance scale"): guided(Network(), text, negative, scale)
    with pytest.raises(ValueError, match="guidance scale"): classifier_guided(Network(), None, NoiseSchedule(), scale)


@pytest.mark.parametrize("scale", [-1, -1e-9, -7.5])
def test_a_negative_scale_is_told_of_negative_prompts(scale):
    _, text, no_text = inputs()
    with pytest.raises(ValueError, match="0 or more.*negative prompt"): guided(Network(), text, no_text, scale)


def test_what_a_negative_prompt_subtracts():
    "With another \"nothing\" the prompt's direction counts w times, the negative's -(w - 1) times, both measured from the empty prompt."
    x, text, negative = inputs()
    empty = torch.zeros(1, 7, 8)
    nothing, d_text, d_negative = (Network()(x, 9, o.expand_as(text)) for o in (empty, text, negative))
    d_text, d_negative = d_text - nothing, d_negative - nothing
    assert torch.allclose(guided(Network(), text, negative, 6.0)(x, 9), nothing + 6 * d_text - 5 * d_negative, atol=1e-4)


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


# -- with a classifier

def log_share(x, t, of):
    "The exact log p(c | x_t) of the mixture, as a function of x and t that autograd can differentiate."
    a = SCHEDULE.alpha_bar(t)
    return (-(torch.cdist(x, a.sqrt() * MEANS) ** 2) / (2 * (a * 0.09 + 1 - a))).log_softmax(1)[:, of > 0].logsumexp(1)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_the_exact_classifier_leads_where_classifier_free_guidance_leads(kind, scale):
    "Bayes' rule, at every scale and in every prediction type: the classifier knows the mixture, the two answers are the mixture's own."
    schedule = NoiseSchedule(prediction_type=kind)
    def network(x, t, text):
        eps = mixture_noise(x, t, MEANS, 0.3, text[:, 0], SCHEDULE)
        signal, sigma = SCHEDULE.scales(t, x)
        return schedule.target((x - sigma * eps) / signal, eps, t)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    left, all_of_them = LEFT.expand(50, 1, -1), ((LEFT + RIGHT) / 2).expand(50, 1, -1)
    for t in (20, 300, 800):
        by_classifier = classifier_guided(lambda x, t: network(x, t, all_of_them), lambda x, t: log_share(x, t, LEFT), schedule, scale)(x, t)
        without_one = guided(network, left, all_of_them, scale)(x, t)
        assert (by_classifier - without_one).abs().max() <= 2e-4 * max(1, without_one.abs().max()) and not by_classifier.requires_grad


def test_the_slope_is_taken_of_each_picture_alone_and_inside_no_grad():
    x, seen = torch.randn(3, 4, 5, 6), []
    def log_probability(x, t):
        seen.append(t)
        return -x.square().sum((1, 2, 3)) / 2                                # its slope is -x
    with torch.no_grad(): out = classifier_guided(lambda x, t: torch.zeros_like(x), log_probability, NoiseSchedule(), 2.0)(x, 500)
    assert seen == [500] and torch.allclose(out, 2 * (1 - NoiseSchedule().alpha_bar(500)).sqrt() * x, atol=1e-5)


# -- attention maps

def small_unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(UNet2DConditionModel(block_out_channels=[16, 32], layers_per_block=1, norm_num_groups=8, cross_attention_dim=12, attention_head_dim=2,
            down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2))


@pytest.mark.parametrize("texts", [1, 2])
def test_attention_maps_are_what_the_layers_use(texts):
    unet, generator = small_unet(), torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 6, generator=generator), torch.randn(texts, 5, 12, generator=generator)
    used = {}
    hooks = [m.register_forward_hook(lambda m, given, out, name=name: used.__setitem__(name, (m, given, out))) for name, m in unet.named_modules() if name.endswith("attn2")]
    with torch.no_grad(): before = unet(x, 300, text)
    for hook in hooks: hook.remove()
    maps = attention_maps(unet, x, 300, text)
    assert [name + ".transformer_blocks.0.attn2" for name in maps] == list(used) and len(maps) == 7
    for shares, (layer, (_, context), out) in zip(maps.values(), used.values()):
        assert shares.shape[:2] == (2, 2) and shares.shape[2] in (48, 12) and shares.shape[3] == 5
        assert torch.allclose(shares.sum(3), torch.ones(()), atol=1e-5)
        v = layer.to_v(context).unflatten(-1, (2, -1)).transpose(1, 2)
        assert torch.allclose(layer.to_out[0]((shares @ v).transpose(1, 2).flatten(2)), out, atol=1e-5)
    with torch.no_grad(): assert torch.equal(unet(x, 300, text), before)     # watching has changed nothing
    assert not any(m._forward_hooks for m in unet.modules())


def test_attention_maps_leave_no_hook_after_an_error():
    unet = small_unet()
    with pytest.raises(ValueError): attention_maps(unet, torch.zeros(1, 3, 8, 8), 300, torch.zeros(1, 5, 12))
    assert not any(m._forward_hooks for m in unet.modules())
