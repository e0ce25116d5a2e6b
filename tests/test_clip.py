"CLIP against transformers: both towers, the logits, the loss and its gradients, the files in both directions; duplicates; bad input."
import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from oracles import close, randomised

from sd_scratch.clip import CLIPModel, CLIPTextModel, CLIPVisionModel, contrastive_loss, exchanged, in_order

# No two sizes are equal, and no option has its default.
TEXT = dict(vocab_size=99, hidden_size=24, intermediate_size=40, projection_dim=20, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=9,
            layer_norm_eps=1e-3, bos_token_id=59, eos_token_id=60, pad_token_id=60)
VISION = dict(hidden_size=32, intermediate_size=48, projection_dim=20, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4, layer_norm_eps=1e-3)

# As published with Stable Diffusion 1.5 and 2.1.
SD15 = """{
  "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0,
  "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072,
  "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12,
  "pad_token_id": 1, "projection_dim": 768, "torch_dtype": "float32", "transformers_version": "4.22.0.dev0", "vocab_size": 49408
}"""
SD21 = SD15.replace("quick_gelu", "gelu").replace("3072", "4096").replace('"hidden_size": 768', '"hidden_size": 1024').replace(
    '"num_attention_heads": 12', '"num_attention_heads": 16').replace('"num_hidden_layers": 12', '"num_hidden_layers": 23')
SMALL = dict(hidden_size=24, intermediate_size=40, num_attention_heads=3, num_hidden_layers=2, vocab_size=99, max_position_embeddings=9)


def theirs_text(**changes): return randomised(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT | changes)))
def theirs_vision(**changes): return randomised(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION | changes)))
def theirs_clip(act="quick_gelu", scale=1.5):
    return randomised(transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT | dict(hidden_act=act), vision_config=VISION | dict(hidden_act=act),
                                                                     projection_dim=20, logit_scale_init_value=scale)))


def ours_of(cls, theirs, folder):
    theirs.save_pretrained(folder)
    return cls.from_pretrained(folder)


def tokens(end=60, length=9):
    "Texts with the end token in four places, padded with it; larger numbers and a 2 stand before it."
    ids = torch.randint(3, 59, (4, length), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 59
    for row, place in zip(ids, (2, 4, 6, length - 1)): row[1], row[place:] = 2, end
    if end == 60: ids[1, 2], ids[3, 5] = 98, 61
    return ids


def pictures(size=16, count=4): return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos, end", [(60, 60), (2, 98)], ids=["real end", "legacy 2"])
@torch.no_grad()
def test_text_tower(act, eos, end, tmp_path):
    theirs = theirs_text(hidden_act=act, eos_token_id=eos)
    ours = ours_of(CLIPTextModel, theirs, tmp_path)
    for ids in tokens(end), tokens(end)[:, :7].index_fill(1, torch.tensor([6]), end):        # full length, and shorter
        reference, states = theirs(ids), ours(ids)
        close(states, reference.last_hidden_state)
        close(ours.pool(states, ids), reference.pooler_output)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("size, patch", [(16, 4), (32, 8), (18, 4)])
@torch.no_grad()
def test_vision_tower(act, size, patch, tmp_path):
    theirs = theirs_vision(hidden_act=act, image_size=size, patch_size=patch)
    close(ours_of(CLIPVisionModel, theirs, tmp_path)(pictures(size)), theirs(pictures(size)).pooler_output)


@torch.no_grad()
def test_picture_and_text_counts_may_differ(tmp_path):
    theirs = theirs_clip()
    ours = ours_of(CLIPModel, theirs, tmp_path)
    reference = theirs(input_ids=tokens()[:3], pixel_values=pictures())
    close(ours(tokens()[:3], pictures()), reference.logits_per_image)
    close(ours.text_features(tokens()[:3]), reference.text_embeds)
    close(ours.image_features(pictures()), reference.image_embeds)


@pytest.mark.parametrize("act, scale", [("quick_gelu", 1.5), ("gelu", 2.6592), ("quick_gelu", 4.6)])
def test_loss_and_gradients(act, scale, tmp_path):
    theirs = theirs_clip(act, scale)
    ours = ours_of(CLIPModel, theirs, tmp_path)
    reference, logits = theirs(input_ids=tokens(), pixel_values=pictures(), return_loss=True), ours(tokens(), pictures())
    close(logits, reference.logits_per_image)
    close(logits.T, reference.logits_per_text)
    loss = contrastive_loss(logits)
    close(loss, reference.loss)
    reference.loss.backward()
    loss.backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    got = {name: p.grad for name, p in ours.named_parameters()}
    assert got.keys() == wanted.keys()
    assert sum(g.abs().max() > 1e-4 for g in wanted.values()) > 0.9 * len(wanted)            # else the comparison below says little
    for name in wanted:
        close(got[name], wanted[name])
        assert (got[name] - wanted[name]).norm() <= 1e-3 * wanted[name].norm() + 1e-5, name  # small gradients, too, are right


@torch.no_grad()
def test_files_back_to_transformers(tmp_path):
    text, vision, clip = randomised(CLIPTextModel(**TEXT)), randomised(CLIPVisionModel(**VISION)), randomised(CLIPModel(text_config=TEXT, vision_config=VISION, projection_dim=20))
    for name, ours in dict(text=text, vision=vision, clip=clip).items(): ours.save_pretrained(tmp_path / name)
    for name, kind in dict(text="CLIPTextModel", vision="CLIPVisionModel", clip="CLIPModel").items():
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == [kind] and config["model_type"] == getattr(transformers, kind).config_class.model_type
    theirs = transformers.CLIPTextModel.from_pretrained(tmp_path / "text")(tokens())
    close(text(tokens()), theirs.last_hidden_state)
    close(text.pool(text(tokens()), tokens()), theirs.pooler_output)
    close(vision(pictures()), transformers.CLIPVisionModel.from_pretrained(tmp_path / "vision")(pictures()).pooler_output)
    close(clip(tokens(), pictures()), transformers.CLIPModel.from_pretrained(tmp_path / "clip")(input_ids=tokens(), pixel_values=pictures()).logits_per_image)


@pytest.mark.parametrize("cls, options", [(CLIPTextModel, TEXT), (CLIPVisionModel, VISION), (CLIPModel, dict(text_config=TEXT, vision_config=VISION, projection_dim=20))])
def test_files_back_to_us(cls, options, tmp_path):
    ours = randomised(cls(**options))
    ours.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert again.config == ours.config and not again.training
    for name, w in ours.state_dict().items(): assert torch.equal(again.state_dict()[name], w)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
@pytest.mark.parametrize("extra", [True, False], ids=["position_ids", "no position_ids"])
@pytest.mark.parametrize("published", [SD15, SD21], ids=["SD 1.5", "SD 2.1"])
@torch.no_grad()
def test_published_text_encoder(published, prefix, extra, tmp_path):
    "The files of Stable Diffusion, only narrower: prefix and position numbers in the weights, the end token called 2 in the configuration."
    config = json.loads(published) | SMALL
    theirs = randomised(transformers.CLIPTextModel(transformers.CLIPTextConfig(**{k: v for k, v in config.items() if k in TEXT or k == "hidden_act"})))
    theirs.save_pretrained(tmp_path)
    weights = {prefix + name.removeprefix("text_model."): w for name, w in load_file(tmp_path / "model.safetensors").items()}
    if extra: weights[prefix + "embeddings.position_ids"] = torch.arange(9)[None]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, reference = CLIPTextModel.from_pretrained(tmp_path), theirs(tokens(98))
    close(ours(tokens(98)), reference.last_hidden_state)
    close(ours.pool(ours(tokens(98)), tokens(98)), reference.pooler_output)


@pytest.mark.parametrize("published, size", [(SD15, 123_060_480), (SD21, 340_387_840)], ids=["SD 1.5", "SD 2.1"])
def test_published_configuration_at_full_size(published, size):
    config = json.loads(published)
    with torch.device("meta"):
        ours = CLIPTextModel(**config)
        theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{k: v for k, v in config.items() if k in ours.defaults}))
    shapes = lambda model: {name.removeprefix("text_model."): p.shape for name, p in model.named_parameters()}
    assert shapes(ours) == shapes(theirs)
    assert sum(p.numel() for p in ours.parameters()) == size


@torch.no_grad()
def test_position_ids_in_a_whole_clip(tmp_path):
    "Published files of the whole model have position numbers in both towers."
    theirs = theirs_clip()
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"text_model.embeddings.position_ids": torch.arange(9)[None], "vision_model.embeddings.position_ids": torch.arange(17)[None]}, tmp_path / "model.safetensors")
    close(CLIPModel.from_pretrained(tmp_path)(tokens(), pictures()), theirs(input_ids=tokens(), pixel_values=pictures()).logits_per_image)


def test_defaults_are_transformers():
    with torch.device("meta"):
        ours, theirs = CLIPModel(), transformers.CLIPModel(transformers.CLIPConfig())
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert ours.config["text_config"].keys() == CLIPTextModel.defaults.keys() and ours.config["vision_config"].keys() == CLIPVisionModel.defaults.keys()
    for part, config in dict(text_config=theirs.config.text_config, vision_config=theirs.config.vision_config).items():
        for name, value in ours.config[part].items(): assert getattr(config, name) == value, name
    assert ours.config["projection_dim"] == theirs.config.projection_dim and ours.config["logit_scale_init_value"] == theirs.config.logit_scale_init_value


@torch.no_grad()
def test_padding_and_later_words_change_nothing_before():
    model, ids = randomised(CLIPTextModel(**TEXT)), tokens()
    other = ids.clone()
    other[:, 5:] = 7
    close(model(other)[:, :5], model(ids)[:, :5])
    assert not torch.allclose(model(other)[:, 5:], model(ids)[:, 5:])


def test_the_loss_in_float64_by_hand():
    logits = 5 * torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    share = lambda s, i: math.exp(s[i]) / sum(map(math.exp, s))
    rows = [-math.log(share(logits[i].tolist(), i)) for i in range(6)]
    columns = [-math.log(share(logits[:, i].tolist(), i)) for i in range(6)]
    assert contrastive_loss(logits).item() == pytest.approx(sum(rows + columns) / 12, abs=1e-12)


def kinds(labels): return torch.tensor(labels)[:, None].expand(-1, 3)      # one row of equal tokens for each caption
def floor(labels): return sum(math.log(labels.count(label)) for label in labels) / len(labels)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.integers(0, 10**6), st.floats(0.1, 30))
def test_no_logits_go_below_the_floor(labels, seed, scale):
    logits = scale * torch.randn(len(labels), len(labels), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert contrastive_loss(logits.float(), kinds(labels)).item() >= floor(labels) - 1e-4
    close(contrastive_loss(logits.float().T, kinds(labels)), contrastive_loss(logits.float(), kinds(labels)))     # pictures and texts have equal rights


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_perfect_features_reach_the_floor(labels):
    features = torch.eye(5)[labels]
    assert contrastive_loss(100 * features @ features.T, kinds(labels)).item() == pytest.approx(floor(labels), abs=1e-5)
    assert contrastive_loss(100 * features @ features.T).item() == pytest.approx(floor(labels), abs=1e-5)


def test_equal_captions_give_equal_loss_and_gradients_with_and_without_ids():
    model, ids = randomised(CLIPModel(text_config=TEXT, vision_config=VISION, projection_dim=20)), tokens()[[0, 1, 1, 2]]
    losses = [contrastive_loss(model(ids, pictures()), given_ids) for given_ids in (None, ids)]
    close(*losses)
    for a, b in zip(*(torch.autograd.grad(loss, model.parameters()) for loss in losses)): close(a, b)


def test_ids_count_only_where_whole_captions_are_equal():
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(4))
    different = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 3, 3], [2, 2, 3]])
    assert torch.equal(contrastive_loss(logits, different), contrastive_loss(logits))
    assert not torch.isclose(contrastive_loss(logits, different[[0, 0, 1, 2]]), contrastive_loss(logits))


def test_texts_of_no_picture_are_wrong_answers_in_the_rows_alone():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows, columns = -logits.log_softmax(1)[range(4), range(4)].mean(), -logits[:, :4].log_softmax(0).diagonal().mean()
    close(contrastive_loss(logits), (rows + columns) / 2)
    ids = torch.arange(7)[:, None].expand(-1, 3)
    close(contrastive_loss(logits, ids), (rows + columns) / 2)
    close(contrastive_loss(logits[:, [0, 1, 2, 3, 6, 4, 5]]), contrastive_loss(logits))                # nor does their order matter
    twice = torch.cat([logits, logits[:, :1]], 1)                                                      # a false caption that is true after all
    floor = math.log(2) / 4 / 2                                                                        # costs one of four rows its log 2
    more = (twice[0].logsumexp(0) - logits[0].logsumexp(0) + sum(twice[i].logsumexp(0) - logits[i].logsumexp(0) for i in (1, 2, 3))) / 4 / 2
    close(contrastive_loss(twice, torch.cat([ids, ids[:1]])), contrastive_loss(logits) + more)
    assert contrastive_loss(100 * F.one_hot(torch.tensor([0, 1, 2, 3, 0]), 4).T.double(), ids[[0, 1, 2, 3, 0]]).item() == pytest.approx(floor, abs=1e-9)


def test_captions_in_order_and_exchanged():
    for relation, straight in {"above": "above", "below": "above", "left of": "left of", "right of": "left of"}.items():
        said = f"a small red star {relation} a large blue square on a gray background"
        first, second = ("small red star", "large blue square") if relation == straight else ("large blue square", "small red star")
        assert in_order(said) == f"a {first} {straight} a {second} on a gray background"
        assert exchanged(said) == f"a large blue square {relation} a small red star on a gray background"
        assert in_order(in_order(said)) == in_order(said) and exchanged(exchanged(said)) == said and in_order(exchanged(said)) != in_order(said)
    for same in "a small red star on a gray background", "red heart", "a photo of a bag", "", "a small red star above a small red star on a gray background":
        assert exchanged(same) == same
    for same in "a small red star on a gray background", "red heart", "": assert in_order(same) == same


@pytest.mark.parametrize("make, message", [
    (lambda: CLIPTextModel(hidden_sise=24), "CLIPTextModel has no option hidden_sise"),
    (lambda: CLIPModel(text_config=dict(TEXT, depth=3), vision_config=VISION), "CLIPTextModel has no option depth"),
    (lambda: CLIPTextModel(**TEXT | dict(hidden_act="relu")), "hidden_act='relu' is unknown; there are quick_gelu, gelu"),
    (lambda: CLIPVisionModel(**VISION | dict(num_attention_heads=5)), "hidden_size=32 .*num_attention_heads=5"),
])
def test_bad_configuration(make, message):
    with pytest.raises(ValueError, match=message): make()


@pytest.mark.parametrize("ids, message", [
    (torch.zeros(2, 10, dtype=torch.long), r"at most 9 tokens.*given was \(2, 10\).*tokenizer\(texts, 9\)"),
    (torch.zeros(9, dtype=torch.long), r"as \(texts, tokens\).*given was \(9,\)"),
    (torch.tensor([[59, 99, 60]]), "numbered 0 to 98; given were 59 to 99.*tokenizer that belongs to it"),
    (torch.tensor([[59, -1, 60]]), "given were -1 to 60"),
])
def test_bad_token_numbers(ids, message):
    model = CLIPTextModel(**TEXT)
    with pytest.raises(ValueError, match=message): model(ids)
    with pytest.raises(ValueError, match=message): CLIPModel(text_config=TEXT, vision_config=VISION, projection_dim=20).text_features(ids)
    assert model(torch.full((1, 9), 98)).shape == (1, 9, 24)                                 # the last token at the last position is allowed


@pytest.mark.parametrize("shape", [(2, 3, 15, 16), (2, 3, 32, 32), (3, 16, 16), (2, 16, 16, 3)])
def test_pictures_of_another_size(shape):
    with pytest.raises(ValueError, match=r"\(B, 3, 16, 16\); given was \(" + ", ".join(map(str, shape))): CLIPVisionModel(**VISION)(torch.zeros(shape))


@pytest.mark.parametrize("logits, ids, message", [
    (torch.zeros(0, 0), None, r"at least one.*given was \(0, 0\)"),
    (torch.zeros(4, 3), None, r"given was \(4, 3\)"),
    (torch.zeros(4), None, r"given was \(4,\)"),
    (torch.zeros(4, 4), torch.zeros(3, 9), "3 rows of token numbers for 4 texts"),
    (torch.zeros(4, 6), torch.zeros(4, 9), "4 rows of token numbers for 6 texts"),
])
def test_bad_batch(logits, ids, message):
    with pytest.raises(ValueError, match=message): contrastive_loss(logits, ids)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"): CLIPTextModel.from_pretrained(tmp_path)
    CLIPTextModel(**TEXT).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights, whole = load_file(path), path.read_bytes()
    name = "text_model.final_layer_norm.bias"
    for changed, message in [
        ({k: w for k, w in weights.items() if k != name}, "final_layer_norm.bias is missing$"),
        (weights | {"text_projection.weight": torch.zeros(2, 2)}, "text_projection.weight is unknown$"),
        (weights | {name: torch.zeros(7)}, r"final_layer_norm.bias has shape \(7,\), not \(24,\)$"),
    ]:
        save_file(changed, path)
        with pytest.raises(ValueError, match=message): CLIPTextModel.from_pretrained(tmp_path)
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="damaged or cut off"): CLIPTextModel.from_pretrained(tmp_path)
    path.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is pickled"): CLIPTextModel.from_pretrained(tmp_path)
