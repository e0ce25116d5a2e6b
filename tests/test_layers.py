"The layers: each against torch's or diffusers' own; a network's folder in both directions; bad input."
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from diffusers.models.attention_processor import Attention as TheirAttention
from diffusers.models.downsampling import Downsample2D as TheirDownsample2D
from diffusers.models.resnet import ResnetBlock2D as TheirResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D as TheirUpsample2D
from oracles import Intruder, close, randomised, same
from safetensors.torch import load_file, save_file

import sd_scratch.layers
from sd_scratch.layers import (Attention, ConfigModel, Downsample2D, PictureAttention, ResnetBlock2D, Stage, Upsample2D, attend, read_json,
                               read_weights)


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


def like(ours, theirs):
    "Give our layer the weights of theirs, under the same names."
    ours.load_state_dict(theirs.state_dict())
    return ours.eval().requires_grad_(False)


@pytest.mark.parametrize("scale", [1, 0.03])                      # where the variance is small, the norm's ε is seen
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("time_channels", [None, 12])
@pytest.mark.parametrize("widths", [(16, 16), (16, 24)])
def test_resnet_block(widths, time_channels, eps, scale):
    theirs = randomised(TheirResnetBlock2D(in_channels=widths[0], out_channels=widths[1], temb_channels=time_channels, groups=8, eps=eps))
    ours = like(ResnetBlock2D(*widths, time_channels, 8, eps), theirs)
    x, time = scale * torch.randn(2, widths[0], 5, 6), torch.randn(2, 12) if time_channels else None
    close(ours(x, time), theirs(x, time))


def test_resnet_block_defaults_are_the_autoencoders():
    theirs = randomised(TheirResnetBlock2D(in_channels=32, out_channels=64, temb_channels=None))
    x = 0.01 * torch.randn(1, 32, 4, 4)
    close(like(ResnetBlock2D(32, 64), theirs)(x), theirs(x, None))


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 9)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_downsample(asymmetric, size):
    theirs = randomised(TheirDownsample2D(6, use_conv=True, padding=0 if asymmetric else 1, name="op"))
    ours = Downsample2D(6, asymmetric)
    like(ours.conv, theirs.conv)
    x = torch.randn(2, 6, *size)
    close(ours(x), theirs(x))


@pytest.mark.parametrize("size", [None, (7, 10)])
def test_upsample(size):
    theirs = randomised(TheirUpsample2D(6, use_conv=True))
    ours, x = like(Upsample2D(6), theirs), torch.randn(2, 6, 4, 5)
    y = ours(x, size)
    assert y.shape[-2:] == (size or (8, 10))
    close(y, theirs(x, size))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_attend_is_torchs_attention(heads, causal):
    theirs = randomised(nn.MultiheadAttention(12, heads, batch_first=True))
    q, k, v = (torch.randn(2, length, 12) for length in (5, 5 if causal else 7, 5 if causal else 7))
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
    projected = [x @ w.T + b for x, w, b in zip((q, k, v), theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3))]
    close(theirs.out_proj(attend(*projected, heads, causal)), theirs(q, k, v, attn_mask=mask)[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("context_width", [None, 10])
def test_attention(context_width, bias):
    theirs = randomised(TheirAttention(12, context_width, heads=3, dim_head=4, bias=bias))
    ours = like(Attention(12, context_width, 3, bias), theirs)
    x, context = torch.randn(2, 5, 12), torch.randn(2, 7, context_width) if context_width else None
    close(ours(x, context), theirs(x, context))


@pytest.mark.parametrize("scale", [1, 0.03])
def test_picture_attention(scale):
    theirs = randomised(TheirAttention(16, heads=1, dim_head=16, bias=True, norm_num_groups=4, eps=1e-6, residual_connection=True, _from_deprecated_attn_block=True))
    ours, x = like(PictureAttention(16, bias=True, groups=4), theirs), scale * torch.randn(2, 16, 4, 5)
    close(ours(x), theirs(x))
    close(ours(x, torch.randn(2, 3, 9)), theirs(x))               # the text isn't for it


@pytest.mark.parametrize("last", [False, True])
def test_stage_on_the_way_down(last):
    theirs = randomised(DownBlock2D(8, 16, 12, num_layers=2, resnet_eps=1e-5, resnet_groups=4, add_downsample=not last))
    ours = like(Stage([ResnetBlock2D(8, 16, 12, 4, 1e-5), ResnetBlock2D(16, 16, 12, 4, 1e-5)], down=None if last else Downsample2D(16)), theirs)
    x, time, kept = torch.randn(2, 8, 6, 7), torch.randn(2, 12), []
    y, (theirs_y, theirs_kept) = ours(x, time, keep=kept), theirs(x, time)
    close(y, theirs_y)
    assert len(kept) == len(theirs_kept) == (2 if last else 3)
    for a, b in zip(kept, theirs_kept): close(a, b)


@pytest.mark.parametrize("last", [False, True])
def test_stage_on_the_way_up(last):
    theirs = randomised(UpBlock2D(in_channels=8, prev_output_channel=20, out_channels=16, temb_channels=12, num_layers=2, resnet_eps=1e-5, resnet_groups=4, add_upsample=not last))
    ours = like(Stage([ResnetBlock2D(20 + 16, 16, 12, 4, 1e-5), ResnetBlock2D(16 + 8, 16, 12, 4, 1e-5)], up=None if last else Upsample2D(16)), theirs)
    x, time, skips = torch.randn(2, 20, 3, 4), torch.randn(2, 12), (torch.randn(2, 8, 3, 4), torch.randn(2, 16, 3, 4))
    below = [] if last else [torch.randn(2, 8, 6, 7)]             # what waits for the next stage says how large to get
    mine = [*below, *skips]
    y = ours(x, time, skips=mine)
    close(y, theirs(x, skips, time, upsample_size=None if last else (6, 7)))
    assert len(mine) == len(below)


def test_stage_adds_no_names_for_what_it_lacks():
    names = list(Stage([ResnetBlock2D(8, 8, groups=4)]).state_dict())
    assert len(names) == 8 and all(name.startswith("resnets.0.") for name in names)


@pytest.mark.parametrize("asymmetric, zeros", [(False, 2), (True, 1)])
def test_downsample_sizes(asymmetric, zeros):
    for size in range(3, 20):
        assert Downsample2D(2, asymmetric)(torch.randn(1, 2, size, 3)).shape[2:] == ((size + zeros - 3) // 2 + 1, 2 - asymmetric), size


@pytest.mark.parametrize("layer, there, here", [
    (lambda: Downsample2D(3), 2, 1), (lambda: Downsample2D(3, True), 2, 1), (lambda: Upsample2D(3), 1, 2)], ids=["down", "down, asymmetric", "up"])
def test_shifted_picture_gives_shifted_features(layer, there, here):
    layer, x = layer().double(), torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    x[..., 5:10, 5:10] = torch.randn(3, 5, 5)                     # nothing near the frame
    torch.testing.assert_close(layer(x.roll((there, -there), (2, 3))), layer(x).roll((here, -here), (2, 3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("asymmetric, first", [(False, -1), (True, 0)])
def test_downsample_sees_the_right_pixels(asymmetric, first):
    layer, x = Downsample2D(1, asymmetric), torch.zeros(1, 1, 8, 8, requires_grad=True)
    nn.init.ones_(layer.conv.weight)
    layer(x)[0, 0, 1, 2].backward()
    seen = torch.zeros(8, 8)
    seen[2 + first:5 + first, 4 + first:7 + first] = 1
    assert torch.equal(x.grad[0, 0], seen)


def test_resnet_block_in_float64_against_patches():
    "Every convolution a matrix product over unfolded patches, every norm written out."
    block, x, time = randomised(ResnetBlock2D(6, 4, 5, 2, 1e-3)).double(), torch.randn(3, 6, 5, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    p = dict(block.named_parameters())
    def conv(x, name): return (p[f"{name}.weight"].flatten(1) @ nn.functional.unfold(x, 3, padding=1) + p[f"{name}.bias"][:, None]).unflatten(2, (5, 4))
    def silu_of_norm(x, name):
        sets = x.reshape(3, 2, -1)
        sets = (sets - sets.mean(2, keepdim=True)) / (sets.var(2, unbiased=False, keepdim=True) + 1e-3).sqrt()
        y = sets.reshape(x.shape) * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]
        return y / (1 + (-y).exp())
    vector = (time / (1 + (-time).exp())) @ p["time_emb_proj.weight"].T + p["time_emb_proj.bias"]
    h = conv(silu_of_norm(x, "norm1"), "conv1") + vector[:, :, None, None]
    h = conv(silu_of_norm(h, "norm2"), "conv2")
    h = h + torch.einsum("oc,bchw->bohw", p["conv_shortcut.weight"][..., 0, 0], x) + p["conv_shortcut.bias"][:, None, None]
    torch.testing.assert_close(block(x, time), h, rtol=0, atol=1e-12)


def test_each_picture_is_on_its_own():
    for layer in ResnetBlock2D(8, 12, groups=4), PictureAttention(8, bias=True, groups=4), Downsample2D(8), Upsample2D(8):
        layer, x = randomised(layer).double(), torch.randn(3, 8, 6, 6, dtype=torch.float64)
        torch.testing.assert_close(layer(x), torch.cat([layer(one[None]) for one in x]), rtol=0, atol=1e-12)


def test_resnet_block_adds_the_same_to_a_brighter_picture():
    "The norm takes scale and mean away before anything is computed."
    block, x = randomised(ResnetBlock2D(8, 8, groups=1, eps=0)).double(), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(block(5 * x + 3) - (5 * x + 3), block(x) - x, rtol=0, atol=1e-10)


def test_attention_does_not_mind_the_order_of_what_it_looks_at():
    q, k, v, order = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8), torch.randperm(7)
    close(attend(q, k[:, order], v[:, order], 2), attend(q, k, v, 2))
    close(attend(q, k[:, :1], v[:, :1], 2), v[:, :1].expand(2, 5, 8))
    layer, x, order = randomised(PictureAttention(8, groups=2)), torch.randn(2, 8, 3, 4), torch.randperm(12)
    close(layer(x.flatten(2)[..., order].unflatten(2, (3, 4))), layer(x).flatten(2)[..., order].unflatten(2, (3, 4)))


@pytest.mark.parametrize("make, message", [
    (lambda: Attention(8, heads=3), r"Attention: 8 channels can't be shared out to 3 heads; choose a number that divides 8"),
    (lambda: Attention(8, heads=0), r"to 0 heads"),
    (lambda: Attention(8, heads=16), r"to 16 heads"),
    (lambda: Attention(8, heads=-2), r"to -2 heads"),
    (lambda: ResnetBlock2D(8, 12, groups=8), r"\(12\) must be divisible by num_groups \(8\)"),
    (lambda: ResnetBlock2D(8, 12), r"\(8\) must be divisible by num_groups \(32\)"),
    (lambda: PictureAttention(10, groups=4), r"\(10\) must be divisible by num_groups \(4\)"),
    (lambda: Stage([ResnetBlock2D(8, 8, groups=4)], [PictureAttention(8, groups=4) for _ in range(2)]), r"Stage: 2 attentions for 1 residual blocks; each follows one")])
def test_layers_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message): make()


def write(path, content): path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("content, error, message", [
    (None, FileNotFoundError, r"c\.json is missing"),
    ("", ValueError, r"c\.json is not JSON: "),
    ('{"a": 1', ValueError, r"c\.json is not JSON: .*line 1"),
    (b"\xff\xfe", ValueError, r"c\.json is not JSON: "),
    ("[1]", ValueError, r"c\.json must hold a JSON object, not a list"),
    ("null", ValueError, r"c\.json must hold a JSON object, not a NoneType"),
    ('"a"', ValueError, r"c\.json must hold a JSON object, not a str")])
def test_read_json_refuses(content, error, message, tmp_path):
    if content is not None: write(tmp_path / "c.json", content)
    with pytest.raises(error, match=message): read_json(tmp_path / "c.json")


def test_read_json(tmp_path):
    write(tmp_path / "c.json", '{"größe": [1, null]}')
    assert read_json(str(tmp_path / "c.json")) == {"größe": [1, None]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_read_weights_gives_float32(dtype, tmp_path):
    save_file(dict(w=torch.tensor([1, 2], dtype=dtype)), tmp_path / "w.safetensors")
    given = read_weights(str(tmp_path / "w.safetensors"))["w"]
    assert given.dtype == torch.float32 and given.tolist() == [1, 2]


@pytest.mark.parametrize("name", ["w.bin", "w.ckpt", "w.pt", "w.pth", "w.pkl"])
def test_pickled_weights_are_named_and_stay_closed(name, tmp_path):
    write(tmp_path / name, pickle.dumps(Intruder(tmp_path / "intruder")))
    with pytest.raises(FileNotFoundError, match=rf"w\.safetensors is missing \({name} is pickled .* convert it to safetensors\)"): read_weights(tmp_path / "w.safetensors")
    assert not (tmp_path / "intruder").exists()
    pickle.loads((tmp_path / name).read_bytes())                  # the file does what it is feared for
    assert (tmp_path / "intruder").exists()


def test_missing_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"w\.safetensors is missing$"): read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:20], lambda b: b"", lambda b: b"\x80\x04" + b, lambda b: pickle.dumps([1])])
def test_damaged_weights(damage, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(dict(w=torch.arange(12.)), path)
    write(path, damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged or cut off .*; copy it again"): read_weights(path)


class Net(ConfigModel):
    defaults = dict(width=4, depth=1)
    only = dict(act_fn="silu", use_bias=True, dropout_kind=0)
    ignored = ("remark", "model_type")
    renames = ((r"^net\.", ""), (r"^layer\.", "linear."), (r"^position_ids$", ""))
    prefix = "net."
    about = dict(model_type="net")

    def __init__(self, **options):
        super().__init__(**options)
        self.linear, self.conv = nn.Linear(self.options.width, 2), nn.Conv2d(2, 3, 3)


def test_options():
    assert Net().config == dict(width=4, depth=1)
    given = dict(width=6, act_fn="silu", use_bias=True, dropout_kind=0.0, remark="x", _class_name="Net", other=False, another=None, more=[], less=0)
    assert Net(**given).config == dict(width=6, depth=1)
    assert Net(width=6).options.width == 6
    Net(width=6)
    assert Net.defaults == dict(width=4, depth=1)                 # one network's options are not the next one's


@pytest.mark.parametrize("option, message", [
    (dict(act_fn="relu"), r"Net: act_fn='relu' is not implemented, only 'silu'"),
    (dict(use_bias=False), r"Net: use_bias=False is not implemented, only True"),      # off is a choice too
    (dict(use_bias=None), r"Net: use_bias=None is not implemented, only True"),
    (dict(dropout_kind=2), r"Net: dropout_kind=2 is not implemented, only 0"),
    (dict(wdith=6), r"Net has no option wdith \(given 6\); it has width, depth")])
def test_options_not_implemented(option, message):
    with pytest.raises(ValueError, match=message): Net(**option)


@pytest.fixture
def saved(tmp_path):
    net = randomised(Net(width=6))
    net.save_pretrained(tmp_path / "deep" / "net")
    return net, tmp_path / "deep" / "net"


def test_round_trip(saved):
    net, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", Net.weights_name]
    assert json.loads((folder / "config.json").read_text()) == dict(_class_name="Net", model_type="net", width=6, depth=1)
    assert sorted(load_file(folder / Net.weights_name)) == ["net.conv.bias", "net.conv.weight", "net.linear.bias", "net.linear.weight"]
    again = Net.from_pretrained(str(folder))
    same(again, net)
    assert not again.training and again.config == net.config


def test_channels_last_network_is_saved(saved):
    net, folder = saved
    net.to(memory_format=torch.channels_last).save_pretrained(folder)
    same(Net.from_pretrained(folder), net)


def test_float16_on_disk_float32_in_memory(saved):
    net, folder = saved
    size = (folder / Net.weights_name).stat().st_size
    net.save_pretrained(folder, torch.float16)
    assert (folder / Net.weights_name).stat().st_size < size
    assert {w.dtype for w in load_file(folder / Net.weights_name).values()} == {torch.float16}
    assert {w.dtype for w in net.parameters()} == {torch.float32}
    again = Net.from_pretrained(folder)
    assert {w.dtype for w in again.parameters()} == {torch.float32}
    same(again, net, rtol=1e-3, atol=1e-3)


def test_older_names(saved):
    net, folder = saved
    weights = {k.replace("net.", "").replace("linear.", "layer."): w for k, w in load_file(folder / Net.weights_name).items()}
    save_file(weights | dict(position_ids=torch.arange(3)), folder / Net.weights_name)
    same(Net.from_pretrained(folder), net)


def test_failed_saving_leaves_what_was_there(saved, monkeypatch):
    net, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    def full(weights, path, metadata):
        write(Path(path), b"half")
        raise OSError("no space left")
    monkeypatch.setattr(sd_scratch.layers, "save_file", full)
    with pytest.raises(OSError, match="no space left"): Net(width=7).save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("linear.bias"), r"does not fit its config\.json: linear\.bias is missing$"),
    (lambda w: w.update(odd=torch.ones(1)), r"does not fit its config\.json: odd is unknown$"),
    (lambda w: w.update({"linear.weight": torch.ones(2, 5)}), r"linear\.weight has shape \(2, 5\), not \(2, 6\)$"),
    (lambda w: (w.pop("linear.bias"), w.update(odd=torch.ones(1))), r"linear\.bias is missing \(and 1 more\)$")])
def test_weights_that_do_not_fit(change, message, saved):
    net, folder = saved
    weights = {k.removeprefix("net."): w for k, w in load_file(folder / Net.weights_name).items()}
    change(weights)
    save_file(weights, folder / Net.weights_name)
    with pytest.raises(ValueError, match=message): Net.from_pretrained(folder)

