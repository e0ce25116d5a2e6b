"Attention and the transformer block: against PyTorch's own modules, what the mask hides, bad input."
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from transformers.activations import ACT2FN
from oracles import close, randomised

from sd_scratch.attention import ACTIVATIONS, CLIPAttention, CLIPEncoderLayer, Transformer
from sd_scratch.course import weights_folder
from sd_scratch.layers import read_json, read_weights

OPTIONS = dict(hidden_size=24, num_attention_heads=3, intermediate_size=40, hidden_act="gelu", layer_norm_eps=1e-3, num_hidden_layers=2)


def options(**changes): return SimpleNamespace(**OPTIONS | changes)


def sequence(seed=0, batch=3, length=7, width=24): return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def hidden(length): return torch.ones(length, length, dtype=torch.bool).triu(1)        # True where PyTorch's modules shall not look


def same_weights(ours, theirs):
    "Copy the weights of a CLIPAttention to a nn.MultiheadAttention, which keeps three matrices in one."
    for part in "weight", "bias":
        getattr(theirs, f"in_proj_{part}").copy_(torch.cat([getattr(getattr(ours, f"{name}_proj"), part) for name in "qkv"]))
        getattr(theirs.out_proj, part).copy_(getattr(ours.out_proj, part))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 3, 8])
@torch.no_grad()
def test_attention_is_pytorchs(heads, causal):
    ours, theirs, x = randomised(CLIPAttention(24, heads, causal)), nn.MultiheadAttention(24, heads, batch_first=True), sequence()
    same_weights(ours, theirs)
    close(ours(x), theirs(x, x, x, attn_mask=hidden(7) if causal else None, need_weights=False)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_pytorchs(causal):
    ours, theirs = randomised(CLIPAttention(24, 3, causal)).double(), nn.MultiheadAttention(24, 3, batch_first=True).double()
    with torch.no_grad(): same_weights(ours, theirs)
    xs = [sequence().double().requires_grad_() for _ in range(2)]
    direction = sequence(seed=1).double()
    (ours(xs[0]) * direction).sum().backward()
    (theirs(xs[1], xs[1], xs[1], attn_mask=hidden(7) if causal else None)[0] * direction).sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=0, atol=1e-10)
    for i, name in enumerate("qkv"):
        torch.testing.assert_close(getattr(ours, f"{name}_proj").weight.grad, theirs.in_proj_weight.grad.chunk(3)[i], rtol=0, atol=1e-10)
    torch.testing.assert_close(ours.out_proj.weight.grad, theirs.out_proj.weight.grad, rtol=0, atol=1e-10)


@torch.no_grad()
def test_attention_is_the_formula():
    "Equation 1 written out with loops over batch, heads and places, so that no fused kernel stands on both sides."
    ours, x = randomised(CLIPAttention(12, 3, causal=True)).double(), sequence(batch=2, length=4, width=12).double()
    q, k, v = (p(x).reshape(2, 4, 3, 4) for p in (ours.q_proj, ours.k_proj, ours.v_proj))
    mixed = torch.zeros(2, 4, 3, 4, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            for i in range(4):
                weights = torch.stack([(q[b, i, h] @ k[b, j, h] / 2).exp() for j in range(i + 1)])
                mixed[b, i, h] = sum(w * v[b, j, h] for j, w in enumerate(weights / weights.sum()))
    torch.testing.assert_close(ours(x), ours.out_proj(mixed.reshape(2, 4, 12)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("act", list(ACTIVATIONS))
@torch.no_grad()
def test_block_is_pytorchs(act, causal):
    ours, x = randomised(CLIPEncoderLayer(options(hidden_act=act), causal)), sequence()
    theirs = nn.TransformerEncoderLayer(24, 3, 40, dropout=0, activation=ACT2FN[act], layer_norm_eps=1e-3, batch_first=True, norm_first=True)
    same_weights(ours.self_attn, theirs.self_attn)
    for mine, its in (ours.layer_norm1, theirs.norm1), (ours.layer_norm2, theirs.norm2), (ours.mlp.fc1, theirs.linear1), (ours.mlp.fc2, theirs.linear2):
        its.load_state_dict(mine.state_dict())
    close(ours(x), theirs(x, src_mask=hidden(7) if causal else None))


@pytest.mark.parametrize("causal", [False, True])
def test_who_hears_whom(causal):
    "The gradient of a position's result says which positions it depends on."
    model = randomised(Transformer(options(), causal))
    for i in range(7):
        x = sequence(batch=1).requires_grad_()
        model(x)[0, i].sum().backward()
        heard = (x.grad[0] != 0).any(-1)
        assert heard.tolist() == ([j <= i for j in range(7)] if causal else [True] * 7)


@torch.no_grad()
def test_without_mask_and_positions_order_means_nothing():
    model, x, order = randomised(Transformer(options())), sequence(), torch.tensor([4, 0, 6, 2, 5, 1, 3])
    close(model(x[:, order]), model(x)[:, order])


@torch.no_grad()
def test_sequences_of_a_batch_do_not_mix():
    model, x = randomised(Transformer(options(), causal=True)), sequence()
    for i in range(3): close(model(x[i:i + 1]), model(x)[i:i + 1])


@torch.no_grad()
def test_layers_follow_each_other():
    model, x = randomised(Transformer(options())), sequence()
    close(model(x), model.layers[1](model.layers[0](x)))
    assert len(Transformer(options(num_hidden_layers=5)).layers) == 5
    assert torch.equal(Transformer(options(num_hidden_layers=0))(x), x)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch, length", [(0, 7), (2, 1), (1, 50)])
@torch.no_grad()
def test_any_batch_and_length(batch, length, causal):
    x = sequence(batch=batch, length=length)
    result = randomised(Transformer(options(), causal))(x)
    assert result.shape == x.shape and result.isfinite().all()


def test_large_inputs_do_not_overflow():
    attention = randomised(CLIPAttention(24, 3, causal=True))
    x = (1e4 * sequence()).requires_grad_()
    result = attention(x)
    result.sum().backward()
    assert result.isfinite().all() and x.grad.isfinite().all()


@torch.no_grad()
def test_shipped_towers_fit_by_name():
    "Both towers that ship go into the one class, under their own names, and give what transformers' encoder layers give."
    from transformers import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer as Theirs
    folder = weights_folder() / "tiny"
    config, weights = read_json(folder / "text_encoder/config.json"), read_weights(folder / "text_encoder/model.safetensors")
    start = "text_model.encoder."
    weights = {name.removeprefix(start): w for name, w in weights.items() if name.startswith(start)}
    ours = Transformer(SimpleNamespace(**config), causal=True)
    ours.load_state_dict(weights)
    x = sequence(batch=2, length=9, width=config["hidden_size"])
    settings = CLIPTextConfig(**{name: config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "hidden_act", "layer_norm_eps")}, attn_implementation="eager")
    mask, want = torch.zeros(9, 9).masked_fill(hidden(9), -torch.inf)[None, None], x
    for i in range(config["num_hidden_layers"]):
        layer = Theirs(settings).eval()
        layer.load_state_dict({name.removeprefix(f"layers.{i}."): w for name, w in weights.items() if name.startswith(f"layers.{i}.")})
        want = layer(want, attention_mask=mask)
        want = want[0] if isinstance(want, tuple) else want
    close(ours(x), want)
    clip = read_weights(folder / "clip/model.safetensors")
    start = "vision_model.encoder."
    Transformer(SimpleNamespace(**read_json(folder / "clip/config.json")["vision_config"])).load_state_dict({name.removeprefix(start): w for name, w in clip.items() if name.startswith(start)})


@pytest.mark.parametrize("act", list(ACTIVATIONS))
def test_activations_are_transformers(act):
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[act](x), ACT2FN[act](x), rtol=0, atol=1e-12)


def test_activations_differ():
    x = torch.linspace(-3, 3, 100)
    assert (ACTIVATIONS["gelu"](x) - ACTIVATIONS["quick_gelu"](x)).abs().max() > 0.01


def test_parameter_names():
    linear = [f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    expected = {f"layers.{i}.{n}.{p}" for i in range(2) for n in linear + ["layer_norm1", "layer_norm2"] for p in ("weight", "bias")}
    assert set(Transformer(options()).state_dict()) == expected


def test_unknown_activation():
    with pytest.raises(ValueError, match="hidden_act='relu' is unknown; there are quick_gelu, gelu"): CLIPEncoderLayer(options(hidden_act="relu"))
    with pytest.raises(ValueError, match="hidden_act='relu' is unknown; there are quick_gelu, gelu"): Transformer(options(hidden_act="relu"))


@pytest.mark.parametrize("heads", [0, 5, 48])
def test_heads_that_do_not_divide_the_width(heads):
    with pytest.raises(ValueError, match=f"hidden_size=24 .*num_attention_heads={heads}"): Transformer(options(num_attention_heads=heads))
    with pytest.raises(ValueError, match=f"hidden_size=24 .*num_attention_heads={heads}"): CLIPEncoderLayer(options(num_attention_heads=heads))
    with pytest.raises(ValueError, match=f"hidden_size=24 .*num_attention_heads={heads}"): CLIPAttention(24, heads)
