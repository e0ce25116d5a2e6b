"The UNet against diffusers': outputs, gradients, files in both directions, published configurations, everything that it refuses."
import inspect
import json
import os

import diffusers
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from safetensors.torch import load_file
from oracles import close, randomised

from sd_scratch.unet import GEGLU, Transformer2DModel, UNet2DConditionModel, time_features

SD1 = dict(sample_size=8, block_out_channels=(8, 12, 16, 20), norm_num_groups=4, cross_attention_dim=6, attention_head_dim=2)
SD2 = dict(sample_size=8, block_out_channels=(8, 16, 24, 32), norm_num_groups=4, cross_attention_dim=10, attention_head_dim=[1, 2, 3, 4],
           use_linear_projection=True, upcast_attention=True)
TINY = dict(sample_size=8, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=2, cross_attention_dim=6, attention_head_dim=4, in_channels=3, out_channels=5,
            down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], norm_eps=1e-3)
CONFIGS = dict(SD1=SD1, SD2=SD2, TINY=TINY)


def pair(config, dtype=torch.float32):
    "diffusers' network with every parameter random, and ours with the same weights"
    theirs, ours = randomised(diffusers.UNet2DConditionModel(**config)), UNet2DConditionModel(**config)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def inputs(config, size=(8, 8), batch=2, dtype=torch.float32, words=5):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(batch, config.get("in_channels", 4), *size, generator=generator, dtype=dtype),
            torch.randn(batch, words, config["cross_attention_dim"], generator=generator, dtype=dtype))


# -- the parts

@pytest.mark.parametrize("width", [2, 6, 32, 320])
def test_time_features_are_diffusers(width):
    t = torch.tensor([0, 1, 2, 17, 500, 998, 999])
    close(time_features(t, width), get_timestep_embedding(t, width, flip_sin_to_cos=True, downscale_freq_shift=0))
    close(time_features(t / 7, width), get_timestep_embedding(t / 7, width, flip_sin_to_cos=True, downscale_freq_shift=0))


def test_time_features_tell_steps_apart():
    features = time_features(torch.arange(1000), 32)
    assert torch.allclose(features.square().sum(1), torch.full((1000,), 16.0), atol=1e-4)
    assert (torch.cdist(features, features) + 9 * torch.eye(1000)).min() > 0.3


def test_an_odd_width_has_no_cosine_for_each_sine():
    with pytest.raises(ValueError, match="width is 7; it must be even"): time_features(torch.arange(3), 7)


def test_the_gate_is_the_exact_gelu_of_the_second_half():
    layer, x = GEGLU(3, 5).double(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double() * 3
    value, gate = layer.proj(x).split(5, -1)
    close(layer(x), value * gate * 0.5 * (1 + torch.erf(gate / 2 ** 0.5)), 1e-12)


def test_attention_knows_no_order_but_the_picture_keeps_its_places():
    torch.manual_seed(0)
    part = Transformer2DModel(8, 6, 2, 4, linear=False).double()
    x, text, order = torch.randn(2, 8, 3, 5).double(), torch.randn(2, 7, 6).double(), torch.randperm(7)
    close(part(x, text[:, order]), part(x, text), 1e-12)
    close(part(x.flip(-1), text), part(x, text).flip(-1), 1e-12)
    close(part(x[1:], text[1:]), part(x, text)[1:], 1e-12)                    # pictures of a batch don't see one another


# -- the whole

@pytest.mark.parametrize("t", [0, 500, torch.tensor(999), torch.tensor([3]), torch.tensor([3, 900])], ids=str)
def test_output_is_diffusers(t):
    ours, theirs = pair(SD1)
    x, text = inputs(SD1)
    with torch.no_grad(): close(ours(x, t, text), theirs(x, t, text).sample)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (7, 16), (1, 3)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_output_is_diffusers_at_any_size(name, size):
    ours, theirs = pair(CONFIGS[name])
    x, text = inputs(CONFIGS[name], size)
    t = torch.tensor([40, 951])
    with torch.no_grad(): close(ours(x, t, text), theirs(x, t, text).sample)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_digit_is_diffusers(name):
    "In float64, so that a slightly other ε or activation can't hide below the tolerance; small inputs, on which an ε weighs most."
    ours, theirs = pair(CONFIGS[name], torch.float64)
    x, text = inputs(CONFIGS[name], (9, 12), dtype=torch.float64)
    t = torch.tensor([2, 700])
    with torch.no_grad():
        for scale in 1, 0.03: close(ours(scale * x, t, scale * text), theirs(scale * x, t, scale * text).sample, 1e-11)


@pytest.mark.parametrize("name", ["SD1", "SD2"])
def test_gradients_are_diffusers(name):
    ours, theirs = pair(CONFIGS[name])
    t, weight = torch.tensor([30, 600]), torch.randn(2, 4, 8, 9, generator=torch.Generator().manual_seed(2))
    given = [[o.requires_grad_() for o in inputs(CONFIGS[name], (8, 9))] for _ in range(2)]
    (ours(given[0][0], t, given[0][1]) * weight).sum().backward()
    (theirs(given[1][0], t, given[1][1]).sample * weight).sum().backward()
    for mine, reference in zip(*given): close(mine.grad, reference.grad)
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    assert expected.keys() == {n for n, _ in ours.named_parameters()} and all(g.abs().max() > 0 for g in expected.values())
    for n, p in ours.named_parameters(): close(p.grad, expected[n])


def test_a_picture_does_not_depend_on_its_batch():
    ours, _ = pair(SD1)
    (x, text), t = inputs(SD1, batch=3), torch.tensor([5, 500, 995])
    with torch.no_grad(): close(torch.cat([ours(x[i:i + 1], int(t[i]), text[i:i + 1]) for i in range(3)]), ours(x, t, text))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    ours, _ = pair(TINY)
    x, text = inputs(TINY)
    with torch.no_grad():
        full = ours(x, 300, text)
        half = ours.to(dtype)(x.to(dtype), 300, text.to(dtype))
    assert half.dtype == dtype and (half.float() - full).abs().max() < 0.1 * full.abs().max()


def test_one_text_and_one_time_step_for_all():
    "A batch of one text or one time step means the same as the text or time step repeated."
    ours, _ = pair(SD1)
    x, text = inputs(SD1, batch=3)
    with torch.no_grad():
        close(ours(x, 500, text[:1]), ours(x, torch.tensor([500] * 3), text[:1].expand(3, -1, -1)))
        close(ours(x, torch.tensor([500]), text), ours(x, torch.tensor(500), text))


# -- files

@pytest.mark.parametrize("name", CONFIGS)
def test_we_read_what_diffusers_writes(name, tmp_path):
    _, theirs = pair(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ours = UNet2DConditionModel.from_pretrained(tmp_path)
    x, text = inputs(CONFIGS[name])
    assert not ours.training
    with torch.no_grad(): close(ours(x, 77, text), theirs(x, 77, text).sample)


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_reads_what_we_write(name, tmp_path):
    ours, _ = pair(CONFIGS[name])
    ours.save_pretrained(tmp_path)
    theirs, report = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    x, text = inputs(CONFIGS[name])
    with torch.no_grad(): close(ours(x, 77, text), theirs(x, 77, text).sample)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values()))


def test_half_precision_on_disk(tmp_path):
    ours, _ = pair(TINY)
    ours.save_pretrained(tmp_path, torch.float16)
    assert {w.dtype for w in load_file(tmp_path / "diffusion_pytorch_model.safetensors").values()} == {torch.float16}
    again = UNet2DConditionModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[n], w.half().float()) for n, w in ours.state_dict().items())


# As published with Stable Diffusion 1.5 and 2.1: old versions of diffusers wrote them, with fewer keys than today's.
SD15_FILE = dict(_class_name="UNet2DConditionModel", _diffusers_version="0.6.0", act_fn="silu", attention_head_dim=8, block_out_channels=[320, 640, 1280, 1280],
    center_input_sample=False, cross_attention_dim=768, down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], downsample_padding=1, flip_sin_to_cos=True,
    freq_shift=0, in_channels=4, layers_per_block=2, mid_block_scale_factor=1, norm_eps=1e-05, norm_num_groups=32, out_channels=4, sample_size=64,
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
SD21_FILE = {**SD15_FILE, "_diffusers_version": "0.10.0.dev0", "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False,
    "num_class_embeds": None, "only_cross_attention": False, "sample_size": 96, "use_linear_projection": True, "upcast_attention": True}
PUBLISHED = dict(SD15=(SD15_FILE, 859_520_964, SD1), SD21=(SD21_FILE, 865_910_724, SD2))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configuration_at_full_size(name):
    "Names and shapes of all parameters; on the meta device, which keeps no numbers."
    config, count, _ = PUBLISHED[name]
    with torch.device("meta"): ours, theirs = UNet2DConditionModel(**config), diffusers.UNet2DConditionModel.from_config(config)
    assert sum(p.numel() for p in ours.parameters()) == count
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in theirs.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_folder(name, tmp_path):
    file, _, narrow = PUBLISHED[name]
    _, theirs = pair(narrow)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**file, **narrow}))
    ours = UNet2DConditionModel.from_pretrained(tmp_path)
    x, text = inputs(narrow)
    with torch.no_grad(): close(ours(x, 77, text), theirs(x, 77, text).sample)


# -- what is refused

DIFFUSERS = {n: p.default for n, p in inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters.items() if n not in ("self", "kwargs")}
NO_EFFECT = {"sample_size", "upcast_attention", "addition_embed_type_num_heads"}     # on its own the last one changes nothing
UNIMPLEMENTED = {**{n: True for n in DIFFUSERS if n not in UNet2DConditionModel.defaults}, "flip_sin_to_cos": False, "freq_shift": 1, "act_fn": "gelu", "downsample_padding": 0,
    "mid_block_type": None, "transformer_layers_per_block": 2, "mid_block_scale_factor": 2, "dropout": 0.1, "class_embed_type": "timestep", "time_embedding_type": "fourier",
    "resnet_time_scale_shift": "scale_shift", "addition_embed_type": "text", "encoder_hid_dim": 8, "num_attention_heads": 8, "conv_in_kernel": 1, "conv_out_kernel": 1,
    "attention_type": "gated", "resnet_out_scale_factor": 0.5, "layers_per_block": [1, 2, 2, 2], "cross_attention_dim": [6, 6, 6, 6]}


@pytest.mark.parametrize("option", sorted(UNIMPLEMENTED.keys() - NO_EFFECT))
def test_what_we_do_not_implement_is_refused_by_name(option):
    with pytest.raises(ValueError, match=option) as caught: UNet2DConditionModel(**SD1 | {option: UNIMPLEMENTED[option]})
    assert repr(UNIMPLEMENTED[option]) in str(caught.value) and "\n" not in str(caught.value)


def test_defaults_are_diffusers():
    assert all(UNet2DConditionModel.defaults[n] == DIFFUSERS[n] for n in UNet2DConditionModel.defaults)
    assert all(UNet2DConditionModel.only[n] == DIFFUSERS[n] for n in UNet2DConditionModel.only)
    UNet2DConditionModel(**DIFFUSERS | SD1)


@pytest.mark.parametrize("option, value, says", [
    ("down_block_types", ["AttnDownBlock2D"] * 4, "CrossAttnDownBlock2D, DownBlock2D"), ("up_block_types", ["AttnUpBlock2D"] * 4, "CrossAttnUpBlock2D, UpBlock2D"),
    ("down_block_types", ["UpBlock2D"] * 4, "DownBlock2D"), ("down_block_types", ["DownBlock2D"] * 3, "4 of"), ("up_block_types", ["UpBlock2D"] * 5, "4 of"),
    ("block_out_channels", [8, 16], "2 of"), ("attention_head_dim", [1, 2], "one for each"), ("attention_head_dim", 3, "divide")], ids=str)
def test_configurations_that_fit_no_network(option, value, says):
    with pytest.raises(ValueError, match=says): UNet2DConditionModel(**SD1 | {option: value})


def wrong_inputs():
    "name -> what is given in place of the picture, the time steps or the text, and what the message has to say"
    (x, text), t = inputs(TINY, batch=4), torch.tensor([1, 2, 3, 4])
    return {
        "fewer time steps than pictures": (x, t[:3], text, ["4 pictures", "(3,)", "one number for all", "(4,)"]),
        "more time steps than pictures": (x[:1], t, text[:1], ["1 pictures", "(4,)"]),
        "time steps in a column": (x, t[:, None], text, ["(4, 1)"]),
        "fewer texts than pictures": (x, t, text[:2], ["4 pictures and 2 texts", "(1, L, 6)"]),
        "more texts than pictures": (x[:1], 5, text, ["1 pictures and 4 texts"]),
        "text of another width": (x, t, text[..., :5], ["(B, L, 6)", "(4, 5, 5)"]),
        "a text without its batch": (x, t, text[0], ["(B, L, 6)", "(5, 6)"]),
        "no word at all": (x, t, text[:, :0], ["at least one vector", "(4, 0, 6)"]),
        "no text": (x, t, None, ["(B, L, 6)", "None"]),
        "a picture without its batch": (x[0], 5, text[:1], ["(3, 8, 8)", "x[None]"]),
        "other channels": (x[:, :2], t, text, ["(B, 3, h, w)", "(4, 2, 8, 8)"]),
        "no height": (x[:, :, :0], t, text, ["at least 1", "(4, 3, 0, 8)"]),
        "no width": (x[..., :0], t, text, ["at least 1", "(4, 3, 8, 0)"])}


@pytest.mark.parametrize("name", wrong_inputs())
def test_inputs_that_do_not_fit_are_refused(name):
    *given, says = wrong_inputs()[name]
    with pytest.raises(ValueError, match="UNet2DConditionModel") as caught: UNet2DConditionModel(**TINY)(*given)
    assert all(part in str(caught.value) for part in says) and "\n" not in str(caught.value), caught.value


@pytest.mark.skipif(os.environ.get("SD_SCRATCH_SLOW") != "1", reason="8 GB of memory and a minute: set SD_SCRATCH_SLOW=1 (any machine, with or without a GPU)")
@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_is_diffusers(name):
    torch.manual_seed(0)
    config, _, _ = PUBLISHED[name]
    theirs = diffusers.UNet2DConditionModel.from_config(config).eval()
    with torch.no_grad():
        for p in theirs.parameters(): p.add_(torch.randn_like(p), alpha=0.01)
    with torch.device("meta"): ours = UNet2DConditionModel(**config)
    ours.load_state_dict(theirs.state_dict(), assign=True)                      # the same tensors: no second 3.4 GB
    x, text = torch.randn(2, 4, 16, 24), torch.randn(2, 77, config["cross_attention_dim"])
    with torch.no_grad(): close(ours(x, torch.tensor([1, 981]), text), theirs(x, torch.tensor([1, 981]), text).sample)
