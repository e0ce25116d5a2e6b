"Only the new row moves, words and LoRAs are read by diffusers and read back, merged is equal to unmerged, and what doesn't fit is refused."
import copy
import json

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from oracles import close, randomised, same

from sd_scratch import textual_inversion
from sd_scratch.pipeline import StableDiffusion
from sd_scratch.textual_inversion import (LoRALinear, NewWord, add_lora, add_words, frozen, learn_word, load_lora, load_word, lora_layers, loss_on_pictures,
                                          merge_lora, nearest_words, remove_lora, save_lora, save_word, unmerge_lora, word_id)
from sd_scratch.training import Fit
from sd_scratch.unet import UNet2DConditionModel

PICTURES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
CAPTIONS = ["red <moon>", "<moon>", "blue <Moon> on a white background"]
PROMPTS = ["red <moon>", "a large <moon> on a white background"]


@pytest.fixture(scope="module")
def pipe(): return StableDiffusion.from_pretrained("tiny")


@pytest.fixture(scope="module")
def vector(pipe): return torch.randn(96, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def more(pipe, vector): return add_words(pipe, {"<moon>": vector})


@pytest.fixture(scope="module")
def tiny_folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    pipe.save_pretrained(folder)                                               # float32
    return folder


def reference(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, prompts=PROMPTS):
    return torch.tensor(pipe(prompts, num_inference_steps=4, guidance_scale=4.0, output_type="np", latents=torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(1))).images)


def with_lora(unet, rank=3, alpha=6):
    "A copy with a LoRA that does something."
    unet = add_lora(copy.deepcopy(unet), rank, alpha)
    generator = torch.Generator().manual_seed(2)
    for layer in lora_layers(unet).values(): torch.nn.init.normal_(layer.lora_B.weight, std=0.05, generator=generator)
    return unet


def inputs():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([10, 700]), torch.randn(2, 32, 96, generator=generator)


@pytest.fixture
def tiny_unet():
    torch.manual_seed(0)
    return randomised(UNet2DConditionModel(block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1, norm_num_groups=8, cross_attention_dim=96, attention_head_dim=2))


# --- only one row moves

def moved(before, after):
    "Names of all weights that differ; of the table of words, the rows."
    names = [name for name in before if name != "embeddings.token_embedding.weight" and not torch.equal(before[name], after[name])]
    old, new = (w["embeddings.token_embedding.weight"] for w in (before, after))
    return names, (old != new[:len(old)]).any(1).nonzero().flatten().tolist()


def state(pipe): return {name: {k: w.clone() for k, w in part.state_dict().items()} for name, part in dict(text=pipe.text_encoder, unet=pipe.unet, vae=pipe.vae).items()}


def test_only_the_new_row_moves(pipe):
    "The bug that others shipped: weight decay and Adam's moments move the other words, too."
    before = state(pipe)
    seen = []
    vector, losses = learn_word(pipe, "<moon>", PICTURES, CAPTIONS, "circle", steps=4, batch=4, callbacks=[lambda run: seen.append(run)])
    after, start = state(pipe), pipe.text_encoder.embeddings.token_embedding.weight[word_id(pipe.tokenizer, "circle")]
    for part in before: assert all(torch.equal(w, after[part][name]) for name, w in before[part].items())
    run = seen[-1]
    assert run.names == ("vector",) and len(losses) == len(seen) == 4          # the optimizer knows nothing else
    assert moved(before["text"], run.model.pipe.text_encoder.state_dict()) == ([], [])
    assert (vector - start).abs().max() > 1e-3
    assert "<moon>" not in pipe.tokenizer.vocab
    assert moved(before["text"], add_words(pipe, {"<moon>": vector}).text_encoder.state_dict()) == ([], [])


def test_the_naive_training_fails_that_test(pipe):
    "The whole table as a parameter: decay moves every row, and without decay the moments of Adam move the caption's words."
    for decay, least in (0.01, 1500), (0.0, 2):
        naive = add_words(pipe, {"<moon>": torch.zeros(96)})
        before, table = copy.deepcopy(pipe.text_encoder.state_dict()), naive.text_encoder.embeddings.token_embedding
        loss = loss_on_pictures(naive, PICTURES, CAPTIONS, naive.text_encoder, batch=4)
        with frozen(naive.unet):
            naive.text_encoder.requires_grad_(False), table.requires_grad_(True)
            Fit(naive.text_encoder, 3, lr=0.02, weight_decay=decay).go(loss, progress=False)
        names, rows = moved(before, naive.text_encoder.state_dict())
        assert names == [] and len(rows) >= least


def test_the_gradient_is_that_of_the_row_in_the_table(pipe):
    new = NewWord(pipe, "<moon>", "circle")
    ids = new.pipe.tokenizer(CAPTIONS, 32)
    torch.testing.assert_close(new(ids), new.pipe.text_encoder(ids), rtol=0, atol=0)
    new(ids).square().sum().backward()
    new.pipe.text_encoder(ids).square().sum().backward()
    close(new.vector.grad, new.pipe.text_encoder.embeddings.token_embedding.weight.grad[-1], 1e-4)


def test_frozen_puts_back_what_it_found(pipe):
    pipe.unet.conv_in.weight.requires_grad_(False)
    with pytest.raises(KeyError), frozen(pipe.unet):
        assert not any(w.requires_grad for w in pipe.unet.parameters())
        raise KeyError
    assert sum(not w.requires_grad for w in pipe.unet.parameters()) == 1
    pipe.unet.conv_in.weight.requires_grad_(True)


def test_the_same_seed_gives_the_same_word(pipe):
    a, b, c = (learn_word(pipe, "<moon>", PICTURES, CAPTIONS, "circle", steps=2, batch=2, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_nearest_word_of_a_word_is_itself(pipe):
    (word, cosine), *others = nearest_words(pipe, 3 * pipe.text_encoder.embeddings.token_embedding.weight[word_id(pipe.tokenizer, "heart")], 4)
    assert word == "heart" and abs(cosine - 1) < 1e-5 and len(others) == 3 and all(c < 0.99 for _, c in others)


# --- words in files

def test_diffusers_reads_our_word_and_draws_the_same(more, vector, tiny_folder, tmp_path):
    save_word(tmp_path / "learned_embeds.safetensors", "<moon>", vector)
    theirs = reference(tiny_folder)
    theirs.load_textual_inversion(str(tmp_path))
    close(picture(more), picture(theirs), 1e-4)
    assert (picture(more) - picture(more, [p.replace("<moon>", "heart") for p in PROMPTS])).abs().max() > 0.05


@pytest.mark.parametrize("shape", [(96,), (1, 96)])
def test_we_read_what_diffusers_reads(vector, tmp_path, shape):
    path = tmp_path / "learned_embeds.safetensors"
    save_file({"<cat-toy>": vector.reshape(shape).contiguous()}, path)
    word, found = load_word(path)
    assert word == "<cat-toy>" and torch.equal(found, vector)
    save_word(path, word, found)
    assert {k: tuple(v.shape) for k, v in load_file(path).items()} == {"<cat-toy>": (1, 96)}


def test_a_model_with_a_new_word_is_saved_and_opened(more, vector, tmp_path):
    two = add_words(more, {"<sun>": 2 * vector})
    two.save_pretrained(tmp_path)
    again, theirs = StableDiffusion.from_pretrained(tmp_path), reference(tmp_path)
    same(again.text_encoder, two.text_encoder)
    assert again.tokenizer.added == {"<moon>": 1500, "<sun>": 1501} == two.tokenizer.added
    prompts = ["red <moon> <sun>", "<SUN>"]
    assert torch.equal(picture(again, prompts), picture(two, prompts))
    close(picture(two, prompts), picture(theirs, prompts), 1e-4)


# --- LoRA

def test_a_fresh_lora_changes_nothing(tiny_unet):
    before = tiny_unet(*inputs())
    add_lora(tiny_unet, 2)
    assert torch.equal(tiny_unet(*inputs()), before)
    trained = {name for name, w in tiny_unet.named_parameters() if w.requires_grad}
    assert len(lora_layers(tiny_unet)) == 56 and trained == {f"{name}.{part}.weight" for name in lora_layers(tiny_unet) for part in ("lora_A", "lora_B")}


def test_training_a_lora_moves_nothing_else(tiny_unet):
    before = {name: w.clone() for name, w in tiny_unet.state_dict().items()}
    add_lora(tiny_unet, 2)
    Fit(tiny_unet, 3, lr=1e-2).go(lambda g: tiny_unet(*inputs()).square().mean(), progress=False)
    after = tiny_unet.state_dict()
    assert all(torch.equal(w, after[name]) for name, w in before.items())
    assert all(layer.lora_B.weight.abs().max() > 0 for layer in lora_layers(tiny_unet).values())


def test_merged_unmerged_and_removed_agree(tiny_unet):
    plain, before = tiny_unet(*inputs()), copy.deepcopy(tiny_unet)
    unet = with_lora(tiny_unet)
    beside = unet(*inputs())
    assert (beside - plain).abs().max() > 0.01
    close(merge_lora(unet)(*inputs()), beside)
    close(merge_lora(unet)(*inputs()), beside)                                 # twice is once
    close(unmerge_lora(unet)(*inputs()), beside)
    for name, w in before.state_dict().items(): close(unet.state_dict()[name], w, 1e-6)
    baked = remove_lora(merge_lora(unet))
    close(baked(*inputs()), beside)
    assert baked.state_dict().keys() == before.state_dict().keys() and not lora_layers(baked) and all(w.requires_grad for w in baked.parameters())
    same(remove_lora(with_lora(tiny_unet)), tiny_unet)                         # never merged: as if nothing had been


def test_a_layer_is_the_equation():
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 7)
    layer = LoRALinear(linear, 2, 3)
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(4, 5)
    close(layer(x), x @ linear.weight.T + linear.bias + 3 / 2 * x @ layer.lora_A.weight.T @ layer.lora_B.weight.T)


def test_peft_computes_the_same(tiny_unet, tmp_path):
    "The same matrices in peft's layers, at another alpha than the rank."
    tiny_unet.save_pretrained(tmp_path)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    unet = with_lora(tiny_unet, rank=3, alpha=5)
    theirs.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    peft_layers = dict(theirs.named_modules())
    for name, layer in lora_layers(unet).items():
        for part in "lora_A", "lora_B": getattr(peft_layers[name], part)["default"].weight.data.copy_(getattr(layer, part).weight)
    close(unet(*inputs()), theirs(*inputs()).sample)


def test_diffusers_reads_our_lora_and_draws_the_same(pipe, tiny_folder, tmp_path):
    ours = StableDiffusion(pipe.vae, pipe.text_encoder, pipe.tokenizer, with_lora(pipe.unet), pipe.schedule)
    save_lora(ours.unet, tmp_path / "pytorch_lora_weights.safetensors")
    theirs = reference(tiny_folder)
    theirs.load_lora_weights(str(tmp_path))
    prompts = ["red heart", "a small blue square on a white background"]
    close(picture(ours, prompts), picture(theirs, prompts), 1e-4)
    assert (picture(ours, prompts) - picture(pipe, prompts)).abs().max() > 0.05
    again = load_lora(copy.deepcopy(pipe.unet), tmp_path / "pytorch_lora_weights.safetensors")
    same(again, ours.unet)
    assert {(layer.rank, layer.alpha) for layer in lora_layers(again).values()} == {(3, 6)}


@pytest.mark.parametrize("facts", [True, False])
def test_we_read_the_lora_that_diffusers_wrote(tiny_unet, tmp_path, facts):
    "Its older names (lora.down, lora.up), with alpha in the metadata; without it, alpha is the rank."
    tiny_unet.save_pretrained(tmp_path)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    theirs.add_adapter(LoraConfig(r=3, lora_alpha=5 if facts else 3, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **(_collate_lora_metadata({"unet": theirs}) if facts else {}))
    ours = load_lora(tiny_unet, tmp_path / "pytorch_lora_weights.safetensors")
    close(ours(*inputs()), theirs(*inputs()).sample)


def test_files_are_whole_or_as_before(tiny_unet, vector, tmp_path, monkeypatch):
    word, lora = tmp_path / "learned_embeds.safetensors", tmp_path / "pytorch_lora_weights.safetensors"
    unet = with_lora(tiny_unet)
    save_word(word, "<moon>", vector), save_lora(unet, lora)
    before = word.read_bytes(), lora.read_bytes()
    def dies(tensors, path, **more):
        path.write_bytes(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(textual_inversion, "save_file", dies)
    with pytest.raises(OSError): save_word(word, "<moon>", 2 * vector)
    with pytest.raises(OSError): save_lora(unet, lora)
    assert (word.read_bytes(), lora.read_bytes()) == before and len(list(tmp_path.iterdir())) == 2


# --- bad input

@pytest.mark.parametrize("word, says", [("heart", "has the word 'heart' already"), ("HEART", "already"), ("<moon>", "already"), ("<Moon>", "already"), ("", "without spaces"), ("my moon", "without spaces"),
    (7, "the new word is 7"), ("eart", r"inside '.*eart.*', too; write it in angle brackets: <eart>"), ("<|endoftext|>", "already")])
def test_words_that_cannot_be_added(more, vector, word, says):
    with pytest.raises(ValueError, match=says): add_words(more, {word: vector})


@pytest.mark.parametrize("size", [(95,), (768,), (1, 96)])
def test_a_word_of_another_model(pipe, size):
    with pytest.raises(ValueError, match=r"has the shape \(.*\(96,\).*another model"): add_words(pipe, {"<moon>": torch.zeros(size)})


@pytest.mark.parametrize("changes, says", [
    (dict(pictures=PICTURES[:0], captions=[]), "0 pictures and 0 captions; give at least one"), (dict(captions=CAPTIONS[:2]), "3 pictures and 2 captions"), (dict(captions="<moon>"), "3 pictures and 1 captions"),
    (dict(captions=["red <moon>", "red", "<moon>"]), "the caption 'red' lacks the new word '<moon>'"), (dict(like="zebrafish moon"), r"'zebrafish moon' is \d+ tokens"), (dict(like=""), "0 tokens"),
    (dict(word="heart", captions=["heart"] * 3), "already")])
def test_a_training_that_cannot_begin(pipe, changes, says):
    with pytest.raises(ValueError, match=says): learn_word(pipe, **dict(word="<moon>", pictures=PICTURES, captions=CAPTIONS, like="circle", steps=1) | changes)


def test_files_that_are_no_word(tmp_path, vector):
    path = tmp_path / "learned_embeds.safetensors"
    for tensors, says in ({"<a>": vector, "<b>": vector.clone()}, "holds 2 tensors"), ({"<a>": torch.zeros(4, 96)}, r"shape \(4, 96\); only words of one vector"):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=says): load_word(path)
    path.write_bytes(b"not at all")
    with pytest.raises(ValueError, match="damaged"): load_word(path)
    with pytest.raises(FileNotFoundError): load_word(tmp_path / "other.safetensors")


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, 17])
def test_a_rank_that_is_none(tiny_unet, rank):
    with pytest.raises(ValueError, match="a whole number from 1 to 16"): add_lora(tiny_unet, rank)


def test_a_lora_of_another_model(pipe, tiny_unet, tmp_path):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    with pytest.raises(ValueError, match="no LoRA to save"): save_lora(pipe.unet, path)
    save_lora(with_lora(tiny_unet), path)
    before = {name: w.clone() for name, w in pipe.unet.state_dict().items()}
    with pytest.raises(ValueError, match=r"made for another model: at down_blocks.* \(3, 16\) and \(16, 3\); this network needs \(r, 64\)"): load_lora(pipe.unet, path)
    with pytest.raises(ValueError, match="no such linear layer"): load_lora(pipe.vae, path)
    assert not lora_layers(pipe.unet) and all(torch.equal(w, before[name]) for name, w in pipe.unet.state_dict().items())
    with pytest.raises(ValueError, match="has a LoRA already"): add_lora(with_lora(tiny_unet))
    with pytest.raises(ValueError, match="has a LoRA already"): load_lora(with_lora(tiny_unet), path)
    with pytest.raises(ValueError, match="no linear layer whose name ends in to_z"): add_lora(tiny_unet, layers=("to_z",))


def test_files_that_are_no_lora(tiny_unet, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_lora(with_lora(tiny_unet), path)
    tensors = load_file(path)
    first = next(key for key in tensors if "lora_A" in key)
    facts = lambda **more: {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in more.items()})}
    for change, meta, says in [
            ({first: None}, {}, "only one of the two"), ({first: tensors[first][:2].contiguous()}, {}, "same rank"), ({first: tensors[first][0].contiguous()}, {}, "a LoRA for a UNet holds"),
            ({"lora_unet_down_blocks_0.alpha": torch.ones(1)}, {}, "lora_unet_down_blocks_0.alpha"), ({"text_encoder.q_proj.lora_A.weight": torch.ones(2, 2)}, {}, "text_encoder.q_proj"),
            ({}, facts(use_dora=True), "use_dora = True; only plain LoRA"), ({}, facts(rank_pattern={"to_q": 8}), "rank_pattern")]:
        save_file({key: t for key, t in (tensors | change).items() if t is not None}, path, metadata=meta)
        with pytest.raises(ValueError, match=says): load_lora(tiny_unet, path)
