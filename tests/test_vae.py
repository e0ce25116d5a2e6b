"The autoencoder against diffusers': numbers, folders in both directions, older names; its loss; bad input."
import json
import pickle

import diffusers
import pytest
import torch
from oracles import Intruder, close, randomised, same
from safetensors.torch import load_file, save_file

import sd_scratch.autoencoder
import sd_scratch.vae
from sd_scratch.course import weights_folder
from sd_scratch.vae import AutoencoderKL, DiagonalGaussian, autoencoder_loss

WEIGHTS = "diffusion_pytorch_model.safetensors"


def configuration(*widths, **options):
    return dict(block_out_channels=widths, down_block_types=["DownEncoderBlock2D"] * len(widths), up_block_types=["UpDecoderBlock2D"] * len(widths)) | options


CONFIGS = [configuration(32, 64, 64, layers_per_block=2, sample_size=64), configuration(8, 12, norm_num_groups=4, latent_channels=3, scaling_factor=0.5),
           configuration(8, norm_num_groups=2, in_channels=1, out_channels=2)]

# The fields of the config.json that Stable Diffusion 1.x was published with (its widths, without the name of a folder).
PUBLISHED = dict(_class_name="AutoencoderKL", _diffusers_version="0.6.0", act_fn="silu", block_out_channels=[8, 16, 16, 16], down_block_types=["DownEncoderBlock2D"] * 4,
    in_channels=3, latent_channels=4, layers_per_block=2, norm_num_groups=4, out_channels=3, sample_size=512, up_block_types=["UpDecoderBlock2D"] * 4)


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@pytest.fixture(params=CONFIGS, ids=lambda c: str(c["block_out_channels"]))
def pair(request, tmp_path):
    "Return our network and diffusers', both from the folder that diffusers wrote."
    theirs = randomised(diffusers.AutoencoderKL(**request.param))
    theirs.save_pretrained(tmp_path / "theirs")
    return AutoencoderKL.from_pretrained(tmp_path / "theirs").requires_grad_(False), theirs


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_same_numbers(pair, size):
    ours, theirs = pair
    pictures = torch.rand(2, theirs.config.in_channels, *size) * 2 - 1
    a, b = ours.encode(pictures), theirs.encode(pictures).latent_dist
    for name in "mean", "std", "logvar": close(getattr(a, name), getattr(b, name))
    close(a.kl(), b.kl())
    draw = lambda: torch.Generator().manual_seed(5)
    close(a.sample(draw()), b.sample(draw()))
    z = torch.randn(a.mean.shape)
    close(ours.decode(z), theirs.decode(z).sample)
    again, latent = ours(pictures, draw())
    close(again, theirs(pictures, sample_posterior=True, generator=draw()).sample)
    close(latent.mean, b.mean)


def test_same_epsilons(pair):
    "Too small a difference to be seen in the numbers above, where variances are large."
    ours, theirs = ({n: m.eps for n, m in model.named_modules() if isinstance(m, torch.nn.GroupNorm)} for model in pair)
    assert ours == theirs and len(ours) > 5


def test_diffusers_reads_ours(pair, tmp_path):
    ours, theirs = pair
    ours.save_pretrained(tmp_path / "ours")
    back, problems = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(problems.values())
    same(back, theirs)
    assert json.loads((tmp_path / "ours/config.json").read_text())["_class_name"] == "AutoencoderKL"
    plain = lambda config: json.loads(json.dumps({name: config[name] for name in ours.config}))     # diffusers keeps lists as lists, tuples as tuples
    assert plain(back.config) == plain(theirs.config)


def test_ours_read_by_ours(pair, tmp_path):
    ours, _ = pair
    ours.config["scaling_factor"] = 0.7
    ours.save_pretrained(tmp_path / "ours")
    again = AutoencoderKL.from_pretrained(tmp_path / "ours")
    same(again, ours)
    assert again.config == ours.config and again.config["scaling_factor"] == 0.7


def test_fresh_network_goes_to_diffusers(tmp_path):
    ours = randomised(AutoencoderKL(**CONFIGS[1]))
    ours.save_pretrained(tmp_path)
    z = torch.randn(1, 3, 4, 4)
    close(ours.decode(z), diffusers.AutoencoderKL.from_pretrained(tmp_path).requires_grad_(False).decode(z).sample)


def test_older_names(pair, tmp_path):
    ours, _ = pair
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    def old(name):
        for new, was in older.items(): name = name.replace(new, was)
        return name
    path = tmp_path / "theirs" / WEIGHTS
    weights = load_file(path)
    assert sum(old(name) != name for name in weights) == 16          # two attentions, four layers each, weight and bias
    save_file({old(name): w for name, w in weights.items()}, path)
    same(AutoencoderKL.from_pretrained(tmp_path / "theirs"), ours)


def test_published_config():
    model = AutoencoderKL(**PUBLISHED)
    assert model.config["scaling_factor"] == 0.18215
    with torch.no_grad(): assert model.encode(torch.zeros(1, 3, 16, 16)).mean.shape == (1, 4, 2, 2)
    theirs = diffusers.AutoencoderKL.from_config(PUBLISHED)
    assert {n: w.shape for n, w in model.state_dict().items()} == {n: w.shape for n, w in theirs.state_dict().items()}


def test_published_size():
    with torch.device("meta"): model = AutoencoderKL(**PUBLISHED | dict(block_out_channels=[128, 256, 512, 512], norm_num_groups=32))
    assert sum(p.numel() for p in model.parameters()) == 83_653_863


def test_float16(pair, tmp_path):
    ours, _ = pair
    ours.save_pretrained(tmp_path / "half", torch.float16)
    assert {w.dtype for w in load_file(tmp_path / "half" / WEIGHTS).values()} == {torch.float16}
    again = AutoencoderKL.from_pretrained(tmp_path / "half")
    assert {w.dtype for w in again.parameters()} == {torch.float32} and not again.training
    same(again, ours, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [0.1, 3, 100])                   # 100: beyond where the logarithm is cut off
def test_gaussian(scale):
    moments = scale * torch.randn(3, 8, 4, 5)
    ours, theirs = DiagonalGaussian(moments), diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(moments)
    for name in "mean", "std", "logvar": close(getattr(ours, name), getattr(theirs, name))
    close(ours.kl(), theirs.kl())


def test_kl_is_torchs():
    latent, normal = DiagonalGaussian(torch.randn(3, 8, 4, 5)), torch.distributions.Normal
    close(latent.kl(), torch.distributions.kl_divergence(normal(latent.mean, latent.std), normal(0., 1.)).sum((1, 2, 3)))


def test_kl_is_an_average_of_log_ratios():
    latent, p = DiagonalGaussian(torch.tensor([1.5, -0.5, -1.0, 0.7]).view(1, 4, 1, 1)), torch.distributions.Normal(0., 1.)
    q = torch.distributions.Normal(latent.mean, latent.std)
    z = q.sample((200_000,))
    estimates = (q.log_prob(z) - p.log_prob(z)).flatten(1).sum(1)
    assert abs(estimates.mean() - latent.kl()) < 4 * estimates.std() / 200_000**0.5


def test_gradient_goes_through_the_draw():
    "The mean's gradient is 1, that of the logarithm of the variance half of what was added to the mean."
    moments = torch.randn(3, 8, 2, 2, requires_grad=True)
    latent = DiagonalGaussian(moments)
    z = latent.sample(torch.Generator().manual_seed(0))
    by_mean, by_logvar = torch.autograd.grad(z.sum(), moments)[0].chunk(2, dim=1)
    close(by_mean, torch.ones_like(by_mean))
    close(by_logvar, ((z - latent.mean) / 2).detach())


def test_psnr_is_the_autoencoders(): assert sd_scratch.vae.psnr is sd_scratch.autoencoder.psnr


def test_loss_is_its_three_terms():
    vae = randomised(AutoencoderKL(**CONFIGS[1]))
    pictures, g = torch.rand(4, 3, 8, 8) * 2 - 1, lambda: torch.Generator().manual_seed(3)
    again, latent = vae(pictures, g())
    pixels = torch.nn.functional.l1_loss(again, pictures) + torch.nn.functional.mse_loss(again, pictures)
    close(autoencoder_loss(vae, pictures, g(), kl_weight=0), pixels)
    close(autoencoder_loss(vae, pictures, g(), kl_weight=0.1), pixels + 0.1 * latent.kl().mean())
    close(autoencoder_loss(vae, pictures, g()), pixels + 1e-6 * latent.kl().mean())
    assert torch.equal(autoencoder_loss(vae, pictures, g()), autoencoder_loss(vae, pictures, g()))
    assert autoencoder_loss(vae, pictures, torch.Generator().manual_seed(4)) != autoencoder_loss(vae, pictures, g())


def test_every_parameter_learns():
    vae = randomised(AutoencoderKL(**CONFIGS[1])).requires_grad_(True)
    pictures, generator = torch.rand(4, 3, 8, 8) * 2 - 1, torch.Generator().manual_seed(0)
    autoencoder_loss(vae, pictures, generator).backward()
    idle = [name for name, p in vae.named_parameters() if not p.grad.any()]
    assert not [name for name in idle if not name.endswith("to_k.bias")]   # a bias of all keys leaves their comparison as it is
    optimizer, losses = torch.optim.Adam(vae.parameters(), 3e-3), []
    for _ in range(15):
        loss = autoencoder_loss(vae, pictures, generator)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("option, message", [
    (dict(act_fn="relu"), "AutoencoderKL: act_fn='relu' is not implemented, only 'silu'"),
    (dict(use_quant_conv=False), "AutoencoderKL: use_quant_conv=False is not implemented, only True"),
    (dict(use_post_quant_conv=False), "AutoencoderKL: use_post_quant_conv=False is not implemented"),
    (dict(mid_block_add_attention=False), "AutoencoderKL: mid_block_add_attention=False is not implemented"),
    (dict(shift_factor=0.1), r"AutoencoderKL has no option shift_factor \(given 0.1\)"),
    (dict(latents_mean=[0, 1]), "AutoencoderKL has no option latents_mean"),
    (dict(down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]), "down_block_types is .*'AttnDownEncoderBlock2D'.*; it must be DownEncoderBlock2D once for each of"),
    (dict(up_block_types=["UpDecoderBlock2D"]), r"up_block_types is \['UpDecoderBlock2D'\]; it must be UpDecoderBlock2D once for each of block_out_channels=\[8, 12\]"),
    (dict(norm_num_groups=5), "num_channels .*divisible by num_groups")])
def test_options_not_implemented(option, message):
    with pytest.raises(ValueError, match=message): AutoencoderKL(**CONFIGS[1] | option)


def test_diffusers_own_options_are_known():
    assert AutoencoderKL(**diffusers.AutoencoderKL(**CONFIGS[1]).config).config.keys() == AutoencoderKL.defaults.keys()


@pytest.fixture
def three_stages(): return AutoencoderKL(**configuration(4, 4, 4, norm_num_groups=2)).requires_grad_(False)


@pytest.mark.parametrize("pictures, message", [
    (torch.zeros(3, 8, 8), r"float tensor \(B, 3, H, W\) .*not torch.float32 \(3, 8, 8\): x\[None\] makes"),
    (torch.zeros(2, 1, 8, 8), r"takes 3 channels, and the pictures \(2, 1, 8, 8\) have 1"),
    (torch.zeros(2, 8, 8, 3), "takes 3 channels"),
    (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"not torch.uint8 \(2, 3, 8, 8\)"),
    (torch.zeros(1, 3, 30, 32), "multiples of 4, not 30×32"),
    (torch.zeros(1, 3, 32, 6), "multiples of 4, not 32×6"),
    (torch.full((1, 3, 8, 8), 255.), "from 255 to 255: .*x / 127.5 - 1"),
    (torch.zeros(1, 3, 8, 8).index_fill(3, torch.tensor(2), float("nan")), "nan")])
def test_what_is_no_picture_is_refused(three_stages, pictures, message):
    "With the number of channels and the factor of this very network."
    for door in three_stages.encode, three_stages, lambda x: autoencoder_loss(three_stages, x, None):
        with pytest.raises(ValueError, match=message): door(pictures)


def test_one_stage_takes_any_size():
    vae = AutoencoderKL(**CONFIGS[2]).requires_grad_(False)
    assert vae.encode(torch.zeros(1, 1, 7, 5)).mean.shape == (1, 4, 7, 5)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 8, 8), (1, 8, 8, 4)])
def test_what_is_no_latent_is_refused(three_stages, shape):
    with pytest.raises(ValueError, match=r"latents are a tensor \(B, 4, h, w\), and this one has the shape \(" + ", ".join(map(str, shape))): three_stages.decode(torch.zeros(shape))


def test_shipped_folder_opens_in_diffusers():
    ours = AutoencoderKL.from_pretrained(weights_folder() / "tiny" / "vae").requires_grad_(False)
    theirs = diffusers.AutoencoderKL.from_pretrained(weights_folder() / "tiny" / "vae").requires_grad_(False)
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    close(ours.encode(pictures).mean, theirs.encode(pictures).latent_dist.mean)
    close(ours.decode(ours.encode(pictures).mean), theirs.decode(theirs.encode(pictures).latent_dist.mean).sample)
    assert ours.config["scaling_factor"] == theirs.config.scaling_factor


def pickled(folder):
    (folder / WEIGHTS).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Intruder(folder / "intruder")))


def edit(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@pytest.mark.parametrize("damage, error, message", [
    (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"config\.json is missing"),
    (lambda f: (f / "config.json").write_text("{'a': 1}"), ValueError, r"config\.json is not JSON"),
    (lambda f: (f / "config.json").write_text("[]"), ValueError, r"config\.json must hold a JSON object, not a list"),
    (lambda f: (f / "config.json").write_text(json.dumps(CONFIGS[1] | dict(latent_channels=5))), ValueError, r"does not fit its config\.json: .* has shape .*, not .* more\)"),
    (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, WEIGHTS + " is missing$"),
    (pickled, FileNotFoundError, WEIGHTS + r" is missing \(diffusion_pytorch_model\.bin is pickled"),
    (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:5000]), ValueError, WEIGHTS + " is damaged or cut off"),
    (lambda f: edit(f / WEIGHTS, lambda w: w.pop("quant_conv.bias")), ValueError, r"quant_conv\.bias is missing"),
    (lambda f: edit(f / WEIGHTS, lambda w: w.update(extra=torch.ones(1))), ValueError, "extra is unknown"),
    (lambda f: edit(f / WEIGHTS, lambda w: w.update({"encoder.conv_in.weight": torch.ones(8, 3, 1, 1)})), ValueError, r"encoder\.conv_in\.weight has shape \(8, 3, 1, 1\), not \(8, 3, 3, 3\)")],
    ids=["no config", "no JSON", "a list", "other config", "no weights", "pickled", "cut off", "missing key", "unknown key", "wrong shape"])
def test_broken_folder(damage, error, message, tmp_path):
    AutoencoderKL(**CONFIGS[1]).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message): AutoencoderKL.from_pretrained(tmp_path)
    assert not (tmp_path / "intruder").exists()


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"): AutoencoderKL.from_pretrained(tmp_path / "nowhere")
