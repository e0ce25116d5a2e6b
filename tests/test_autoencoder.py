"The autoencoder of notebook 06: its linear shortcut against PCA by other means, what it refuses, and that it learns."
import io, json, math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from oracles import close, randomised
from sd_scratch.autoencoder import Autoencoder, check_pictures, psnr

ROOT = Path(__file__).resolve().parent.parent


def pictures(*size, seed=0): return torch.rand(*size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def shortcut(x, k):
    "Return mean, directions and spread of pictures, from a singular value decomposition."
    x = x.flatten(1)
    _, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return x.mean(0), v[:k].T.contiguous(), s[:k] / len(x)**0.5


def test_psnr_against_a_second_way():
    "Peak signal-to-noise ratio of 8-bit pictures, as it is defined for a peak of 255."
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(256, (3, 2, 5, 7), generator=generator) for _ in range(2))
    want = [20 * math.log10(255) - 10 * math.log10(sum((i - j)**2 for i, j in zip(x.flatten().tolist(), y.flatten().tolist())) / 70) for x, y in zip(a, b)]
    assert psnr(a / 127.5 - 1, b / 127.5 - 1).tolist() == pytest.approx(want, abs=1e-4)


def test_psnr_is_of_each_picture_and_clamps_what_was_drawn():
    a = torch.ones(2, 1, 4, 4)
    assert psnr(a, torch.stack([a[0] * 5, a[1] - 0.2])).tolist() == pytest.approx([math.inf, 20.0], abs=1e-3)
    assert psnr(a * 3, a)[0] < math.inf              # the original is taken as it is


@pytest.mark.parametrize("channels, size, width", [(1, 32, 16), (3, 16, 8), (2, 8, 4)])
def test_shapes(channels, size, width):
    net, x = Autoencoder(5, channels=channels, size=size, width=width), pictures(3, channels, size, size)
    z = net.encode(x)
    assert z.shape == (3, 5) and net.decode(z).shape == x.shape
    close(net(x), net.decode(z))


def test_pictures_of_a_batch_dont_touch_each_other():
    net, x = randomised(Autoencoder(5, size=16, width=4)), pictures(4, 1, 16, 16)
    close(net(x)[2:3], net(x[2:3]))


def test_with_a_shortcut_it_begins_as_pca():
    x = pictures(50, 3, 16, 16)
    mean, directions, spread = shortcut(x, 6)
    net = Autoencoder(6, (mean, directions, spread), channels=3, size=16, width=4)
    centred = x.flatten(1) - mean
    close(net(x), (mean + centred @ directions @ directions.T).view_as(x))
    z = net.encode(x)
    close(z.mean(0), torch.zeros(6)), close(z.square().mean(0), torch.ones(6))
    left = (x - net(x)).square().sum()
    close(left, torch.linalg.svdvals(centred)[6:].square().sum(), 1e-4)


def test_the_network_is_added_to_the_shortcut():
    "The decoder sees the latent that is kept, so encoding and decoding come apart nowhere."
    x = pictures(4, 1, 16, 16)
    net = randomised(Autoencoder(3, shortcut(pictures(40, 1, 16, 16, seed=1), 3), size=16, width=4))
    z = net.encoder(x) + (x.flatten(1) - net.mean) @ net.directions / net.spread
    close(net.encode(x), z)
    close(net(x), net.decoder(z) + (net.mean + (z * net.spread) @ net.directions.T).view_as(x))


def test_the_shortcut_isnt_learned_but_is_saved():
    net = Autoencoder(3, shortcut(pictures(40, 1, 16, 16), 3), size=16, width=4)
    assert not {"mean", "directions", "spread"} & dict(net.named_parameters()).keys()
    other = Autoencoder(3, size=16, width=4)
    file = io.BytesIO()
    torch.save(net.state_dict(), file), file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = pictures(2, 1, 16, 16)
    close(other(x), net(x))


def test_the_shortcut_is_copied():
    given = shortcut(pictures(40, 1, 16, 16), 3)
    net = Autoencoder(3, given, size=16, width=4)
    given[0].zero_(), given[1].zero_()
    assert net.mean.any() and net.directions.any()


@pytest.mark.parametrize("with_shortcut", [False, True])
def test_it_learns_what_no_line_can(with_shortcut):
    "Squares at 81 places and one number too few for PCA: every weight gets a gradient, and the error falls below the start."
    torch.manual_seed(0)
    place = torch.arange(81)
    x = torch.full((81, 1, 16, 16), -1.0)
    for i in place.tolist(): x[i, 0, i // 9:i // 9 + 8, i % 9:i % 9 + 8] = 1
    net = Autoencoder(2, shortcut(x, 2) if with_shortcut else None, size=16, width=8)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(net(x), x)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("given, message", [
    (torch.zeros(1, 1, 16, 16, dtype=torch.uint8), r"not torch.uint8 \(1, 1, 16, 16\)"),
    (torch.zeros(1, 16, 16), r"x\[None\] makes a batch"),
    (torch.zeros(0, 1, 16, 16), "at least one picture"),
    ([[0.0]], "not list"),
    (torch.zeros(1, 3, 16, 16), r"takes 1 channel, and the pictures \(1, 3, 16, 16\) have 3"),
    (torch.zeros(1, 1, 12, 16), "multiples of 8, not 12×16.* 16×16 for instance"),
    (torch.zeros(1, 1, 0, 16), "multiples of 8, not 0×16"),
    (torch.full((1, 1, 16, 16), 255.0), "from 255 to 255.*x / 127.5 - 1"),
    (torch.full((1, 1, 16, 16), -1.01), r"lie in \[-1, 1\]"),
    (torch.full((1, 1, 16, 16), math.nan), "from nan to nan"),
    (torch.zeros(1, 1, 24, 24), "built for pictures of 16×16, not 24×24"),
])
def test_bad_pictures(given, message):
    with pytest.raises(ValueError, match=message): Autoencoder(3, size=16, width=4).encode(given)


def test_one_bad_pixel_is_found():
    x = pictures(3, 3, 8, 16)
    check_pictures(x)
    x[1, 2, 3, 4] = 1.5
    with pytest.raises(ValueError, match="to 1.5"): check_pictures(x)
    with pytest.raises(ValueError, match="multiples of 16, not 8×16"): check_pictures(x, factor=16)


def test_the_ends_of_the_range_are_allowed():
    check_pictures(torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2).expand(2, 3, 4, 2), factor=2)
    check_pictures(torch.ones(1, 3, 8, 8, dtype=torch.float16))


@pytest.mark.parametrize("options, message", [
    (dict(latents=3, size=12), "multiple of 8, not 12"), (dict(latents=3, size=0), "multiple of 8, not 0"), (dict(latents=0), "at least one number"),
    (dict(latents=3, shortcut=(torch.zeros(64), torch.zeros(64, 2), torch.ones(2)), size=8), r"directions has the shape \(64, 2\).*\(64, 3\)"),
    (dict(latents=2, shortcut=(torch.zeros(63), torch.zeros(64, 2), torch.ones(2)), size=8), r"mean has the shape \(63,\)"),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message): Autoencoder(**options)


def test_bad_latents():
    net = Autoencoder(3, size=8, width=4)
    for z in torch.zeros(3), torch.zeros(2, 4), torch.zeros(1, 3, 1, 1):
        with pytest.raises(ValueError, match=r"latents have the shape \(B, 3\), not"): net.decode(z)


def test_the_committed_sweep_is_whole_and_plausible():
    found = json.loads((ROOT / "nbs/06_ae_sweep.json").read_text())
    sizes = sorted(map(int, found))
    assert len(sizes) >= 5 and all(list(line) == ["32", "16", "8", "6", "4", "3", "2"] for line in found.values())
    exact = [found[str(k)]["32"] for k in sizes]
    assert exact == sorted(exact) and exact[0] > 14
    for line in found.values():
        assert list(line.values())[2:] == sorted(list(line.values())[2:], reverse=True)      # fewer bits, fewer decibels
        assert abs(line["16"] - line["32"]) < 0.05
