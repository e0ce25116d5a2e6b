"The model that comes with the package: what is in its folder, that other programs open it, and what it can draw."
import diffusers
import pytest
import torch
from safetensors.torch import load_file

from sd_scratch.clip import CLIPModel, exchanged
from sd_scratch.course import to_tensor, weights_folder
from sd_scratch.data import CLOTHES, fashion_mnist, shapes
from sd_scratch.evaluation import prompt_report, prompts_for
from sd_scratch.pipeline import Plan, StableDiffusion, painter, shipped_models

TINY = weights_folder() / "tiny"


@pytest.fixture(scope="module")
def pipe(): return StableDiffusion.from_pretrained("tiny")


def test_files(pipe):
    assert shipped_models() == ["tiny"]
    assert sum(p.stat().st_size for p in weights_folder().rglob("*") if p.is_file()) <= 12e6
    weights = [w for p in TINY.rglob("*.safetensors") for w in load_file(p).values()]
    assert {w.dtype for w in weights} == {torch.float16} and all(w.isfinite().all() for w in weights)
    plan = Plan.load(TINY / "training" / "plan.json")
    assert plan.data == ["emoji", "shapes", "fashion_mnist"]
    for name in ("vae", "unet"): assert plan.widths[name].items() <= getattr(pipe, name).config.items()


def test_clip_belongs_to_it(pipe):
    clip = CLIPModel.from_pretrained(TINY / "clip")
    ours, text = clip.text_model.state_dict(), pipe.text_encoder.state_dict()
    assert all(torch.equal(ours[k], text[k]) for k in text)
    assert len(pipe.tokenizer) == text["embeddings.token_embedding.weight"].shape[0]


@torch.no_grad()
def test_clip_finds_captions_and_pictures(pipe):
    "Among 1,000 different captions of test scenes, the right one comes first for at least three pictures of four, and the right picture likewise; clothes are told by their prompts, and what is where by its caption."
    clip = CLIPModel.from_pretrained(TINY / "clip")
    look = lambda data, indices: torch.cat([clip.image_features(data.batch(part)[0]) for part in torch.tensor(indices).split(500)])
    scenes = shapes("test", 2000)
    first = {caption: i for i, caption in reversed(list(enumerate(scenes.captions)))}
    chosen = sorted(first.values())[:1000]
    similar = look(scenes, chosen) @ clip.text_features(pipe.tokenizer([scenes.captions[i] for i in chosen])).T          # (1000, 1000)
    for way in 0, 1: assert (similar.argmax(way) == torch.arange(1000)).float().mean() >= 0.75
    two = [i for i, caption in enumerate(scenes.captions) if exchanged(caption) != caption]
    true, false = (clip.text_features(pipe.tokenizer([tell(scenes.captions[i]) for i in two])) for tell in (str, exchanged))
    assert ((look(scenes, two) * (true - false)).sum(1) > 0).float().mean() >= 0.95
    try: clothes = fashion_mnist("test")
    except FileNotFoundError as error: pytest.skip(str(error))
    said = [f"a photo of {name}" for name in CLOTHES]
    found = (look(clothes, range(len(clothes))) @ clip.text_features(pipe.tokenizer(said)).T).argmax(1)
    assert (found == torch.tensor([said.index(caption) for caption in clothes.captions])).float().mean() >= 0.85


def test_diffusers_draws_the_same(pipe):
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=4, guidance_scale=5.0, output_type="np", latents=torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    a, b = (p(["red heart", "a large red circle above a small blue square on a white background"], **call).images for p in (pipe, theirs))
    assert abs(a - b).max() <= 1e-4


@pytest.mark.parametrize("color", ["red", "blue"])
def test_heart_has_its_color(pipe, color):
    images = pipe(f"{color} heart", num_inference_steps=25, guidance_scale=5.0, num_images_per_prompt=4, generator=torch.Generator().manual_seed(0)).images
    x = torch.stack([to_tensor(image) for image in images])                                  # (4, 3, 32, 32)
    red, green, blue = x[:, :, 10:18, 12:20].mean((0, 2, 3)).tolist()
    assert (red > 0.4 and blue < -0.3 if color == "red" else blue > 0.2 and red < -0.3) and green < 0
    assert x[:, :, -3:, :3].mean() > 0.8 and x[:, :, -3:, -3:].mean() > 0.8                   # white beside its tip


def test_prompt_accuracy(pipe):
    prompts = [p for held_out in (False, True) for things in (1, 2) for p in prompts_for(40, held_out, things)]
    report = prompt_report(painter(pipe), prompts)
    assert report["seen"]["all"]["accuracy"] >= 0.95 and report["held_out"]["all"]["accuracy"] >= 0.9
