"The whole pipeline against diffusers, checkpoints in both directions, training from end to end."
import json
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from oracles import randomised

from sd_scratch import pipeline
from sd_scratch.clip import CLIPModel, contrastive_loss, exchanged, in_order
from sd_scratch.course import to_tensor
from sd_scratch.data import CaptionedPictures, emoji_captions, parse_caption, shapes
from sd_scratch.evaluation import prompt_report, prompts_for
from sd_scratch.noise import NoiseSchedule
from sd_scratch.pipeline import WIDTHS, Plan, StableDiffusion, Trainer, examine, fit_picture, model_folder, painter, plan_for
from sd_scratch.tokenizer import CLIPTokenizer

PROMPTS = ["red heart", "a large red circle above a small blue square on a white background"]
SD1 = dict(unet=dict(attention_head_dim=4), text=dict(hidden_act="quick_gelu"), schedule=dict(prediction_type="epsilon"))
SD2 = dict(unet=dict(attention_head_dim=[2, 4], use_linear_projection=True, upcast_attention=True), text=dict(hidden_act="gelu", num_hidden_layers=3), schedule=dict(prediction_type="v_prediction"))


def reference(folder, kind=SD1, length=20):
    "A diffusers pipeline with random weights in Stable Diffusion's configuration, only narrower."
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.train(list(emoji_captions().values()) + PROMPTS, 900, length)
    tokenizer.save_pretrained(folder / "words")
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=length, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id) | kind["text"]))
    unet = diffusers.UNet2DConditionModel(sample_size=8, block_out_channels=(32, 64), layers_per_block=2, cross_attention_dim=32, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **kind["unet"])
    vae = diffusers.AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1, **kind["schedule"])
    pipe = diffusers.StableDiffusionPipeline(randomised(vae), randomised(text), transformers.CLIPTokenizer.from_pretrained(folder / "words"), randomised(unet), scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(**more):
    "What both pipelines are called with."
    return dict(negative_prompt=["blue", ""], num_inference_steps=4, guidance_scale=4.0, num_images_per_prompt=2, output_type="np",
        latents=torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))) | more


def same_pictures(ours, theirs, **more):
    a, b = (pipe(PROMPTS, **arguments(**more)).images for pipe in (ours, theirs))
    assert a.shape == b.shape
    assert b.std() > 0.1                                                     # pictures, not one grey
    assert abs(a - b).max() <= 1e-4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A folder that diffusers wrote, and the pipeline that wrote it."
    folder = tmp_path_factory.mktemp("reference")
    pipe = reference(folder)
    pipe.save_pretrained(folder / "model")
    return folder / "model", pipe


@pytest.mark.parametrize("kind", [SD1, SD2], ids=["sd1", "sd2"])
def test_draws_what_diffusers_draws(tmp_path, kind):
    theirs = reference(tmp_path, kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = StableDiffusion.from_pretrained(tmp_path / "theirs")
    same_pictures(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours", safety_checker=None)
    again.set_progress_bar_config(disable=True)
    same_pictures(ours, again)


def test_no_guidance_eta_and_sizes(saved):
    folder, theirs = saved
    ours = StableDiffusion.from_pretrained(folder)
    same_pictures(ours, theirs, guidance_scale=1.0)
    a, b = (pipe(PROMPTS, **arguments(eta=1.0, generator=torch.Generator().manual_seed(3))).images for pipe in (ours, theirs))
    assert abs(a - b).max() <= 1e-4
    a, b = (pipe(PROMPTS, height=24, width=16, **arguments(latents=None, generator=torch.Generator().manual_seed(3))).images for pipe in (ours, theirs))
    assert a.shape == b.shape == (4, 24, 16, 3) and abs(a - b).max() <= 1e-4
    four = lambda: [torch.Generator().manual_seed(i) for i in range(4)]
    a, b = (pipe(PROMPTS, **arguments(latents=None, generator=four())).images for pipe in (ours, theirs))
    assert abs(a - b).max() <= 1e-4
    with pytest.raises(ValueError, match="generators"): ours(PROMPTS, **arguments(latents=None, generator=four()[:3]))


def test_published_files(saved, tmp_path):
    "The names of the published Stable Diffusion 1.x files: text_model. and position_ids, query/key/value/proj_attn, PNDM, extra parts."
    source, theirs = saved
    folder = tmp_path / "published"
    shutil.copytree(source, folder)
    path = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{k}": w for k, w in load_file(path).items()}
    save_file(weights | {"text_model.embeddings.position_ids": torch.arange(20)[None]}, path)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    for new, old in older.items(): weights = {k.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): w for k, w in weights.items()}
    assert any(".proj_attn." in k for k in weights)
    save_file(weights, path)
    CLIPTokenizer.from_pretrained(source / "tokenizer").save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) | dict(_class_name="PNDMScheduler", skip_prk_steps=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text()) | dict(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="PNDMScheduler"): ours = StableDiffusion.from_pretrained(folder)
    same_pictures(ours, theirs)


def test_half_precision_file(saved, tmp_path):
    ours = StableDiffusion.from_pretrained(saved[0])
    ours.save_pretrained(tmp_path / "half", torch.float16)
    half = StableDiffusion.from_pretrained(tmp_path / "half")
    assert next(half.unet.parameters()).dtype == torch.float32
    assert load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float16
    a, b = (pipe(PROMPTS, **arguments()).images for pipe in (ours, half))
    assert 0 < abs(a - b).max() < 0.05
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "half", safety_checker=None, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    same_pictures(half, theirs)


def test_what_comes_out(saved):
    pipe = StableDiffusion.from_pretrained(saved[0])
    draw = lambda **more: pipe("red heart", **dict(num_inference_steps=2, generator=torch.Generator().manual_seed(0)) | more).images
    pictures = draw(num_images_per_prompt=3)
    assert [(p.size, p.mode) for p in pictures] == [((16, 16), "RGB")] * 3
    pt, arrays, latents = draw(output_type="pt"), draw(output_type="np"), draw(output_type="latent")
    assert pt.shape == (1, 3, 16, 16) and arrays.shape == (1, 16, 16, 3) and latents.shape == (1, 4, 8, 8)
    assert 0 <= pt.min() and pt.max() <= 1 and torch.equal(pt.permute(0, 2, 3, 1), torch.from_numpy(arrays))
    assert torch.equal(draw(output_type="pt"), pt)                                                # same seed, same picture
    assert not torch.equal(draw(output_type="pt", generator=torch.Generator().manual_seed(1)), pt)
    assert not torch.equal(draw(output_type="pt", negative_prompt="blue"), pt)
    assert len(pipe("", num_inference_steps=1).images) == 1                                       # an empty prompt is fine
    assert pipe(["red heart", "blue"], negative_prompt=["a", "b"], num_inference_steps=1, output_type="latent").images.shape[0] == 2
    assert painter(pipe, steps=1)(["red heart"] * 2).shape == (2, 3, 16, 16)


def test_layout_changes_no_picture_and_no_file(saved, tmp_path):
    "On the processor all channels of a place lie side by side; pictures, and the files of a model as it is or trained on, are those of the usual layout."
    pipe, usual = (StableDiffusion.from_pretrained(saved[0]) for _ in range(2))
    for network in (usual.unet, usual.vae): network.to(memory_format=torch.contiguous_format)
    kernels = [w for network in (pipe.unet, pipe.vae) for w in network.parameters() if w.ndim == 4 and w.shape[1] > 1 and w.shape[2] > 1]
    assert kernels and all(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in kernels)
    a, b = (one(PROMPTS, **arguments()).images for one in (pipe, usual))
    assert 0 < abs(a - b).max() <= 1e-5
    parts = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")

    def same_files():
        pipe.save_pretrained(tmp_path / "pipe"), usual.save_pretrained(tmp_path / "usual")
        for part in parts:
            mine, theirs = (load_file(tmp_path / name / f"{part}.safetensors") for name in ("pipe", "usual"))
            assert list(mine) == list(theirs) and all(torch.allclose(mine[k], theirs[k], rtol=0, atol=1e-5) for k in mine)
        again = StableDiffusion.from_pretrained(tmp_path / "pipe")
        assert abs(again(PROMPTS, **arguments()).images - pipe(PROMPTS, **arguments()).images).max() == 0

    same_files()
    written, before = (load_file(folder / f"{parts[0]}.safetensors") for folder in (tmp_path / "pipe", saved[0]))
    assert list(written) == list(before) and all(torch.equal(written[k], before[k]) for k in before)
    for one in (pipe, usual):                                                                     # one step down, of every weight
        latent = one.vae.encode(to_tensor(photo())[None]).mean
        loss = one.unet(latent, 500, one.text_encoder(one.tokenizer(["red heart"]))).square().mean() + one.vae.decode(latent).square().mean()
        loss.backward()
        for network in (one.unet, one.vae, one.text_encoder): torch.optim.SGD(network.parameters(), 1e-3).step()
    same_files()
    assert not torch.equal(load_file(tmp_path / "pipe" / f"{parts[0]}.safetensors")["conv_in.weight"], before["conv_in.weight"])


def test_gradients_after_and_between_the_steps(saved):
    "What a drawing returns, and what its callback is given, may be differentiated: they are ordinary tensors."
    pipe = StableDiffusion.from_pretrained(saved[0])

    def slope(latents):
        with torch.enable_grad():
            latents.requires_grad_()
            pipe.vae.decode(latents).square().mean().backward()
        return latents.grad

    def downhill(_, step, t, given): return {"latents": given["latents"].detach() - 10 * slope(given["latents"])}

    for scale in (1.0, 4.0):                                                                      # without guidance, the answer comes straight from the UNet
        draw = lambda **more: pipe(PROMPTS, **arguments(guidance_scale=scale, output_type="latent") | more).images
        assert slope(draw()).abs().max() > 0
        assert not torch.equal(draw(callback_on_step_end=downhill), draw())


def test_callback(saved):
    pipe, seen = StableDiffusion.from_pretrained(saved[0]), []
    def watch(self, step, t, given):
        assert self is pipe
        seen.append((step, int(t)))
        return {"latents": torch.zeros_like(given["latents"])} if step == 2 else given
    out = pipe("red heart", num_inference_steps=3, callback_on_step_end=watch, output_type="latent").images
    assert seen == [(0, 667), (1, 334), (2, 1)] and out.abs().max() == 0


def test_long_prompt_warns(saved):
    pipe = StableDiffusion.from_pretrained(saved[0])
    with pytest.warns(UserWarning, match="zebra"): pipe("red heart " * 20 + "zebra", num_inference_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("red heart", num_inference_steps=1)


@pytest.mark.parametrize("more, message", [
    (dict(prompt=[]), "prompt is a string"), (dict(prompt=[3]), "prompt is a string"), (dict(negative_prompt=["a", "b"]), "2 negative prompts for 1"),
    (dict(height=15), "multiples of 2"), (dict(width=-16), "multiples of 2"), (dict(num_images_per_prompt=0), "num_images_per_prompt is 0"), (dict(output_type="jpg"), "pil, np, pt, latent"),
    (dict(num_inference_steps=0), "0 sampling steps"), (dict(guidance_scale=float("nan")), "guidance scale"), (dict(latents=torch.zeros(1, 4, 9, 9)), "latents have shape"), (dict(eta=2.0), "eta is 2"),
], ids=str)
def test_refuses(saved, more, message):
    with pytest.raises(ValueError, match=message): StableDiffusion.from_pretrained(saved[0])(**dict(prompt="red heart") | more)


WHITE_LEFT = Image.fromarray(np.uint8([[255] * 8 + [0] * 8] * 16))                                    # whole latent cells, so that every way of shrinking a mask agrees


def photo(side=16, seed=0): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def in_diffusers(kind, pipe):
    pipe = kind(**{name: part for name, part in pipe.components.items() if name != "image_encoder"}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same_edits(saved, kind, generator=lambda: torch.Generator().manual_seed(5), **more):
    "Change a picture here and in diffusers, each with a fresh generator."
    given = {name: value for name, value in arguments(**dict(num_inference_steps=7, latents=None) | more).items() if value is not None}     # image to image knows no latents
    a, b = (pipe(PROMPTS, image=photo(), generator=generator(), **given).images for pipe in (StableDiffusion.from_pretrained(saved[0]), in_diffusers(kind, saved[1])))
    assert a.shape == b.shape and b.std() > 0.1 and abs(a - b).max() <= 1e-4


@pytest.mark.parametrize("more", [dict(), dict(strength=0.5), dict(strength=1.0), dict(strength=0.26), dict(generator=lambda: [torch.Generator().manual_seed(i) for i in range(4)]), dict(eta=1.0),
    dict(guidance_scale=1.0)], ids=lambda more: str(list(more.items())[:1]) if "generator" not in more else "generators")
def test_image_to_image_is_diffusers(saved, more): same_edits(saved, diffusers.StableDiffusionImg2ImgPipeline, **more)


@pytest.mark.parametrize("more", [dict(), dict(strength=0.6), dict(strength=0.3, guidance_scale=1.0), dict(latents=arguments()["latents"])], ids=["whole", "strength", "no guidance", "latents"])
def test_inpainting_is_diffusers(saved, more): same_edits(saved, diffusers.StableDiffusionInpaintPipeline, mask_image=WHITE_LEFT, height=16, width=16, **more)


def test_mask_keeps_the_latents_where_it_is_black(saved):
    "Outside of the mask the result is the picture's latent itself, whatever the prompt; a single white pixel frees its whole cell."
    pipe = StableDiffusion.from_pretrained(saved[0])
    dot = Image.new("L", (16, 16))
    dot.putpixel((5, 11), 255)
    assert pipe.encode_mask(dot, 16, 16).nonzero().tolist() == [[0, 0, 5, 2]]
    draw = lambda prompt: pipe(prompt, image=photo(), mask_image=dot, num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0)).images
    a, b, known = draw("red heart"), draw("blue"), pipe.encode_images([photo()], 16, 16, torch.Generator().manual_seed(0))
    kept = pipe.encode_mask(dot, 16, 16).expand_as(a) == 0
    assert torch.equal(a[kept], known[kept]) and torch.equal(b[kept], known[kept])
    assert not torch.isclose(a[~kept], b[~kept], atol=1e-3).any()


def test_pictures_of_other_sizes_and_kinds(saved):
    "A picture is turned upright, cut and resized, with a warning; what is transparent becomes white; each prompt may have its own."
    pipe = StableDiffusion.from_pretrained(saved[0])
    wide = Image.fromarray(np.uint8([[[255, 0, 0]] * 16 + [[0, 255, 0]] * 32 + [[0, 0, 255]] * 16] * 32))
    with pytest.warns(UserWarning, match="64 x 32.*resized to 16 x 16"): latents = pipe.encode_images([wide], 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        green = pipe.encode_images([Image.new("RGB", (16, 16), (0, 255, 0))] * 2, 16, 16, [torch.Generator().manual_seed(i) for i in (0, 1)])
        assert torch.equal(pipe.encode_images([Image.new("RGBA", (16, 16))], 16, 16, torch.Generator().manual_seed(0)),
                           pipe.encode_images([Image.new("RGB", (16, 16), "white")], 16, 16, torch.Generator().manual_seed(0)))
        draw = lambda images, prompts=PROMPTS: pipe(prompts, image=images, num_inference_steps=3, latents=torch.zeros(2, 4, 8, 8), output_type="latent", generator=torch.Generator().manual_seed(0)).images
        two = draw([photo(), photo(seed=1)])
    assert latents.shape == (1, 4, 8, 8) and not torch.equal(green[0], green[1])
    assert not torch.equal(two[1], draw(photo())[1])
    turned = photo()
    turned.getexif()[0x0112] = 6
    assert pipe.encode_images([turned], 16, 16, torch.Generator().manual_seed(0)).sub(pipe.encode_images([photo().rotate(270)], 16, 16, torch.Generator().manual_seed(0))).abs().max() == 0
    assert pipe("red heart", image=photo(24), height=24, width=24, num_inference_steps=2).images[0].size == (24, 24)


def test_pictures_of_every_mode(saved):
    "A palette doesn't spoil the resizing, sixteen bits are refused and not taken for white, and of a mask, transparent is kept."
    pipe = StableDiffusion.from_pretrained(saved[0])
    stripes = Image.fromarray(np.uint8([[255, 0] * 32] * 64))                                          # reduced, they are grey: of a palette, Pillow takes the nearest pixel
    for picture in (stripes, stripes.convert("1"), stripes.convert("P"), stripes.convert("LA"), stripes.convert("RGB").quantize(2)):
        assert abs(np.asarray(fit_picture(picture, 16, 16)).astype(int) - 128).max() < 20
    clear = Image.new("RGBA", (16, 16), (255, 255, 255, 0))                                            # white, if its transparency is forgotten
    clear.paste((255, 255, 255, 255), (0, 0, 8, 16))
    palette = clear.quantize(4)
    assert palette.mode == "P" and palette.convert("RGBA").getextrema()[3] == (0, 255)
    for mask in (clear, palette, clear.convert("LA"), WHITE_LEFT.convert("1"), WHITE_LEFT.convert("P")): assert torch.equal(pipe.encode_mask(mask, 16, 16), pipe.encode_mask(WHITE_LEFT, 16, 16))
    assert fit_picture(clear, 16, 16).getpixel((12, 8)) == (255, 255, 255) and fit_picture(clear, 16, 16, paper="black").getpixel((12, 8)) == (0, 0, 0)
    deep = Image.fromarray(np.full((16, 16), 30_000, np.uint16))
    for picture in (deep, deep.convert("I"), deep.convert("F")):
        for more in (dict(image=picture), dict(image=photo(), mask_image=picture)):
            with pytest.raises(ValueError, match="more than 8 bits"): pipe("red heart", num_inference_steps=2, **more)
    turned, upright = Image.fromarray(np.uint8([[255] * 24] * 8 + [[0] * 24] * 8)), Image.fromarray(np.uint8([[0] * 8 + [255] * 8] * 24))
    turned.getexif()[0x0112] = 6                                                                      # a camera held on its side: 24 x 16 in the file, 16 x 24 to look at
    draw = lambda image, mask: pipe("red heart", 24, 16, image=image, mask_image=mask, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(draw(turned, upright), draw(upright, turned))
    with pytest.raises(ValueError, match="16 x 24 pixels, the picture 24 x 16"): draw(upright.transpose(Image.Transpose.ROTATE_90), turned)


@pytest.mark.parametrize("more, message", [
    (dict(strength=0.5), "strength says what to do with a picture"), (dict(mask_image=WHITE_LEFT), "mask_image says what to do with a picture"), (dict(image="cat.png"), "PIL image"), (dict(image=torch.zeros(3, 16, 16)), "PIL image"),
    (dict(image=[photo()] * 2), "2 images for 1 prompts"), (dict(image=photo(), strength=0), "strength is 0; it must be above 0"), (dict(image=photo(), strength=1.01), "strength is 1.01"),
    (dict(image=photo(), strength="much"), "strength is 'much'"), (dict(image=photo(), strength=float("nan")), "strength is nan"), (dict(image=photo(), strength=0.01), "less than one step: take 101 steps"), (dict(image=photo(), strength=1e-320), "less than one step"),
    (dict(image=photo(), num_inference_steps=1), "less than one step: take 2 steps"), (dict(image=photo(), num_inference_steps=0), "0 sampling steps"), (dict(image=photo(32), mask_image=WHITE_LEFT), "one size"),
    (dict(image=photo(), mask_image=Image.new("L", (16, 16))), "no white"), (dict(image=photo(), mask_image=[WHITE_LEFT]), "mask_image is a PIL image"), (dict(image=photo(), mask_image=Image.new("RGBA", (16, 16), (255, 255, 255, 0))), "no white"), (dict(image=[]), "0 images"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_refuses_pictures(saved, more, message):
    with pytest.raises(ValueError, match=message): StableDiffusion.from_pretrained(saved[0])("red heart", **more)


def test_examine_blames_the_stage_that_was_broken():
    "Each fault moves the numbers of its stage, and leaves those of the stages before it."
    clip, data = CLIPModel.from_pretrained(model_folder("tiny") / "clip"), shapes("test", 8)

    def numbers(data=data, change=lambda pipe: None):
        change(pipe := StableDiffusion.from_pretrained("tiny"))
        return examine(pipe, data, clip, count=8, seed=3)

    def same(broken, *names): return all(broken[name] == pytest.approx(healthy[name], rel=1e-3) for name in names)

    healthy = numbers()
    assert healthy["copy"] > 30 and 0.8 < healthy["spread"] < 1.2 and healthy["words"] > 0.8 and 0.8 < healthy["drawn"] < 1.3
    assert healthy["right"] < 0.3 < 0.6 < min(healthy["nothing"], healthy["wrong"])
    assert numbers() == healthy

    scaled = numbers(change=lambda pipe: pipe.vae.config.update(scaling_factor=0.3 * pipe.vae.config["scaling_factor"]))
    assert same(scaled, "copy", "words") and scaled["spread"] == pytest.approx(0.3 * healthy["spread"], rel=1e-3) and scaled["drawn"] > 2

    noisy = numbers(change=lambda pipe: setattr(pipe, "schedule", NoiseSchedule(prediction_type="epsilon")))
    assert same(noisy, "copy", "spread", "words") and noisy["nothing"] == pytest.approx(1, abs=0.05) and noisy["right"] > 0.6

    def forget(pipe):
        with torch.no_grad():
            for w in pipe.text_encoder.parameters(): w.copy_(torch.randn(w.shape, generator=torch.Generator().manual_seed(0)))
    deaf = numbers(change=forget)
    assert same(deaf, "copy", "spread", "nothing") and deaf["words"] < 0.5 and deaf["right"] > 2 * healthy["right"]

    moved = numbers(CaptionedPictures(data.pictures, data.captions[-1:] + data.captions[:-1]))                # each picture gets its neighbour's caption
    assert same(moved, "copy", "spread", "nothing") and moved["words"] < 0.2 and moved["right"] == pytest.approx(healthy["wrong"], rel=1e-3)
    assert "words" not in examine(StableDiffusion.from_pretrained("tiny"), data, count=2)


def test_unknown_or_broken_models(saved, tmp_path):
    with pytest.raises(ValueError, match="no model 'nope'"): model_folder("nope")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="model_index.json is missing"): StableDiffusion.from_pretrained(tmp_path / "empty")

    def broken(change):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved[0], folder)
        change(folder)
        with pytest.raises((ValueError, OSError)) as error: StableDiffusion.from_pretrained(folder)
        return str(error.value)

    weights = "unet/diffusion_pytorch_model.safetensors"
    assert weights in broken(lambda f: (f / weights).unlink()).replace("\\", "/")
    assert "damaged" in broken(lambda f: (f / weights).write_bytes((f / weights).read_bytes()[:-100]))
    assert "pickled" in broken(lambda f: (f / weights).rename(f / "unet/diffusion_pytorch_model.bin"))
    assert "shape" in broken(lambda f: save_file(load_file(f / weights) | {"conv_in.bias": torch.zeros(7)}, f / weights))
    assert "config.json is missing" in broken(lambda f: (f / "vae/config.json").unlink())
    assert "JSON" in broken(lambda f: (f / "vae/config.json").write_text("{"))
    assert "StableDiffusionXLPipeline" in broken(lambda f: (f / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}'))
    assert "vocab.json" in broken(lambda f: shutil.rmtree(f / "tokenizer"))
    assert "scheduler_config.json" in broken(lambda f: (f / "scheduler/scheduler_config.json").unlink())
    def narrow(f): (f / "text_encoder/config.json").write_text(json.dumps(json.loads((f / "text_encoder/config.json").read_text()) | dict(hidden_size=16)))
    assert "shape" in broken(narrow)


SMALL = dict(
    vae=WIDTHS["vae"] | dict(block_out_channels=[8, 8, 8], norm_num_groups=4), text=WIDTHS["text"] | dict(hidden_size=16, intermediate_size=32, projection_dim=16),
    vision=WIDTHS["vision"] | dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, projection_dim=16), unet=WIDTHS["unet"] | dict(block_out_channels=[8, 16], norm_num_groups=4, cross_attention_dim=16))
MINI = Plan(["shapes"], vae_steps=6, clip_steps=6, unet_steps=6, vae_batch=4, clip_batch=8, unet_batch=4, shapes=64, vocab_size=560, order=True, muon=["unet"], widths=SMALL)


def parts(trainer):
    "Train the three networks, and give all their weights."
    vae = trainer.vae()
    tokenizer, clip = trainer.clip()
    unet = trainer.unet(vae, tokenizer, clip.text_model, NoiseSchedule(**trainer.plan.schedule))
    return {f"{name}.{k}": w for name, model in (("vae", vae), ("clip", clip), ("unet", unet)) for k, w in model.state_dict().items()}


def test_same_plan_same_weights(tmp_path):
    said = []
    runs = [parts(Trainer(MINI, tmp_path / name, "cpu", progress=False, say=said.append)) for name in "ab"]
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    other = parts(Trainer(replace(MINI, seed=1), tmp_path / "c", "cpu", progress=False, say=said.append))
    assert not any(torch.equal(runs[0][k], other[k]) for k in ("vae.encoder.conv_in.weight", "clip.text_projection.weight", "unet.conv_in.weight"))
    assert sum("dB" in line for line in said) == 3
    for name in ("reconstructions.png", "vae_losses.json"): assert (tmp_path / "a" / "training" / name).exists()


def test_killed_training_goes_on(tmp_path):
    "Killed again and again, the training ends with the very weights of one that was never disturbed."
    undisturbed = parts(Trainer(MINI, tmp_path / "whole", "cpu", progress=False, say=print))
    MINI.save(tmp_path / "plan.json")
    program = f"""
import sys, torch
torch.set_num_threads(1)
from sd_scratch import training
from sd_scratch.pipeline import Plan, Trainer
from sd_scratch.training import Fit
step, left = Fit.step, int(sys.argv[1])
def counted(self, loss):
    global left
    if left == 0: sys.stdout.write("kill me"); sys.stdout.flush(); import time; time.sleep(600)
    left -= 1
    value = step(self, loss)
    self.save()
    return value
Fit.step = counted
sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
from test_pipeline import parts
parts(Trainer(Plan.load({str(tmp_path / "plan.json")!r}), {str(tmp_path / "killed")!r}, "cpu", progress=False, say=lambda line: None))
"""
    for steps in (4, 5, 6):                                                                  # in the autoencoder, in CLIP, in the UNet
        child = subprocess.Popen([sys.executable, "-c", program, str(steps)], stdout=subprocess.PIPE)
        assert child.stdout.read(7) == b"kill me"
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert (tmp_path / "killed" / "clip").exists() and not (tmp_path / "killed" / "unet").exists()
    assert not list((tmp_path / "killed").rglob("*.part*"))
    resumed = parts(Trainer(MINI, tmp_path / "killed", "cpu", progress=False, say=print))
    assert all(torch.equal(undisturbed[k], resumed[k]) for k in undisturbed)


@pytest.mark.parametrize("order", [True, False])
def test_clip_is_asked_for_the_order(order, tmp_path, monkeypatch):
    batches = []
    monkeypatch.setattr(pipeline, "contrastive_loss", lambda logits, ids: batches.append((logits.shape, ids)) or contrastive_loss(logits, ids))
    trainer = Trainer(replace(MINI, order=order, clip_steps=40), tmp_path, "cpu", progress=False, say=lambda line: None)
    tokenizer, _ = trainer.clip()
    ways = dict(said=str, other=lambda c: parse_caption(c).turned().caption)
    known = {tuple(row): caption for way in ways.values() for made in (str, exchanged) for caption in [made(way(c)) for c in trainer.data.captions] for row in tokenizer([caption]).tolist()}
    shares = []
    for shape, ids in batches:
        captions = [known[tuple(row)] for row in ids.tolist()]
        own, false = captions[:MINI.clip_batch], captions[MINI.clip_batch:]
        assert shape == (len(own), len(captions))
        assert false == ([exchanged(c) for c in own if exchanged(c) != c] if order else [])
        two = [c for c in own if len(parse_caption(c).things) == 2]
        shares.append(sum(in_order(c) == c for c in two) / max(1, len(two)))
        if not order: assert set(own) <= set(trainer.data.captions)
    early, late = sum(shares[:20]) / 20, sum(shares[20:]) / 20
    if order: assert early > 0.75 > 0.65 > late                                               # 85 and 50 of 100 are in order
    else: assert abs(early - late) < 0.25


def test_run_leaves_a_whole_model(tmp_path, monkeypatch):
    few = [prompt for held_out in (False, True) for things in (1, 2) for prompt in prompts_for(2, held_out, things)]
    monkeypatch.setattr(pipeline, "prompt_report", partial(prompt_report, prompts=few))
    said = []
    trained = Trainer(MINI, tmp_path / "m", "cpu", progress=False, say=said.append).run()
    assert sum(line.startswith("prompt accuracy") and "500" not in line for line in said) == 2
    opened = StableDiffusion.from_pretrained(tmp_path / "m")
    a, b = (pipe("red heart", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images for pipe in (trained, opened))
    assert abs(a - b).max() == 0
    assert not list((tmp_path / "m" / "training").glob("*.safetensors*"))                     # checkpoints are gone, the plan stays
    assert Plan.load(tmp_path / "m" / "training" / "plan.json") == MINI
    with pytest.raises(ValueError, match="another plan"): Trainer(replace(MINI, seed=5), tmp_path / "m", "cpu")


def test_a_plan_says_whom_muon_trains(tmp_path):
    "Muon has the matrices of the networks that the plan names, and of no other."
    for muon in ([], ["unet"], ["vae", "clip"]):
        trainer, found = Trainer(replace(MINI, muon=muon), tmp_path / "-".join(["m", *muon]), "cpu", progress=False, say=lambda line: None), {}
        kind = lambda name: type(trainer.fitted.optimizer_of[dict(zip(trainer.fitted.names, trainer.fitted.weights))[name]]).__name__
        vae = trainer.vae()
        found["vae"] = kind("encoder.mid_block.resnets.0.conv1.weight")
        tokenizer, clip = trainer.clip()
        found["clip"] = kind("text_model.encoder.layers.0.mlp.fc1.weight")
        trainer.unet(vae, tokenizer, clip.text_model, NoiseSchedule())
        found["unet"] = kind("down_blocks.0.resnets.0.conv1.weight")
        assert found == {name: "Muon" if name in muon else "AdamW" for name in ("vae", "clip", "unet")}
        assert kind("conv_in.weight") == kind("conv_norm_out.weight") == "AdamW"


def test_long_plans_ask_for_the_order(monkeypatch):
    monkeypatch.setattr(pipeline, "seconds_per_step", lambda plan, device: dict(vae=0.1, clip=0.2, unet=0.5))
    short, long = plan_for(10, ["shapes"]), plan_for(20, ["shapes"])
    assert (short.vae_steps, short.clip_steps, short.unet_steps) == pytest.approx((1020, 510, 696), abs=1) and not short.order
    assert long.clip_steps == pytest.approx(1020, abs=1) and long.order


def test_a_plan_from_before_muon_has_none(tmp_path):
    (tmp_path / "plan.json").write_text('{"data": ["shapes"], "unet_lr": 0.0012}')
    assert Plan.load(tmp_path / "plan.json").muon == [] and Plan(["shapes"]).muon == ["vae", "clip", "unet"]
    (tmp_path / "short.json").write_text('{"data": ["shapes"]}')
    assert Plan.load(tmp_path / "short.json") == Plan(["shapes"])


def test_plans(tmp_path):
    with pytest.raises(ValueError, match="vae_steps must be more than 0"): replace(MINI, vae_steps=0)
    with pytest.raises(ValueError, match="order is of type bool; given was 1"): replace(MINI, order=1)
    with pytest.raises(ValueError, match="seed is of type int; given was True"): replace(MINI, seed=True)
    with pytest.raises(ValueError, match="muon names networks, of vae, clip and unet; given was tokenizer"): replace(MINI, muon=["tokenizer", "unet"])
    with pytest.raises(ValueError, match="needs data"): Plan([])
    with pytest.raises(ValueError, match="data is of type list"): Plan("shapes")
    (tmp_path / "p.json").write_text('{"data": ["shapes"], "stpes": 3}')
    with pytest.raises(ValueError, match="is not a plan"): Plan.load(tmp_path / "p.json")
    with pytest.raises(ValueError, match="minutes is 0"): plan_for(0, ["shapes"])
    with pytest.raises(ValueError, match="no data set or folder 'cats'"): Trainer(replace(MINI, data=["cats"]), tmp_path / "x", "cpu")
