"The training loop: against a plain loop, stopped and gone on with, and what it refuses."
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import sd_scratch.training
from sd_scratch.data import CaptionedPictures
from sd_scratch.optimizers import ExponentialMovingAverage, one_cycle
from sd_scratch.training import Fit, draw, join, step_generator

STEPS = 8
SETTINGS = dict(steps=STEPS, lr=0.01, warmup=0.3, weight_decay=0.1, clip=0.5, decay=0.9, seed=3)


def network(seed=0, width=8):
    "A network with convolutions (whose memory order Fit changes), a linear layer and a norm."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.GroupNorm(2, width), nn.SiLU(), nn.Conv2d(width, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 5))


def loss_of(model):
    def loss(generator):
        x = torch.randn(4, 3, 6, 6, generator=generator)
        return (model(x) - 3 * x.mean((2, 3)).sum(1, keepdim=True)).square().mean()
    return loss


def fit(checkpoint=None, start=0, **changes):
    return Fit(network(start), **(SETTINGS | changes), checkpoint=checkpoint)


def state(run):
    "All that a run holds, as it is in memory: values and their order."
    tensors = {}
    for name, w in zip(run.names, run.weights):
        moments = run.optimizer.state[w]
        for key, t in (("weight", w.detach()), ("average", run.average.weights[name]), ("mean", moments["exp_avg"]), ("square", moments["exp_avg_sq"]), ("step", moments["step"])):
            tensors[f"{key}/{name}"] = t.clone()
    return dict(losses=list(run.losses), count=run.average.count, tensors=tensors)


def assert_same(a, b):
    assert (a["losses"], a["count"]) == (b["losses"], b["count"])
    assert a["tensors"].keys() == b["tensors"].keys()
    for key, t in a["tensors"].items():
        assert torch.equal(t, b["tensors"][key]) and t.stride() == b["tensors"][key].stride() and t.dtype == b["tensors"][key].dtype, key


@pytest.fixture(scope="module")
def undisturbed():
    "The states of a run after each step, and its weights at the end."
    run = fit()
    states = [run.step(loss_of(run.model)) and state(run) for _ in range(STEPS)]
    whole = fit()
    whole.go(loss_of(whole.model), progress=False)
    assert whole.losses == states[-1]["losses"]
    return states, {k: w.detach().clone() for k, w in whole.model.named_parameters()}


def test_step_is_a_plain_loop():
    "Against PyTorch's AdamW and clipping, written out."
    run, model = fit(), network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1, weight_decay=0.1, betas=(0.9, 0.99))
    average, lengths = ExponentialMovingAverage(model, 0.9), []
    for number in range(STEPS):
        for group in optimizer.param_groups: group["lr"] = one_cycle(number, STEPS, 0.01, 0.3)
        optimizer.zero_grad()
        value = loss_of(model)(torch.Generator().manual_seed(3 * 1_000_003 + number))
        value.backward()
        lengths.append(torch.cat([w.grad.flatten() for w in model.parameters()]).norm())
        for w in model.parameters(): w.grad *= min(1, 0.5 / lengths[-1])
        optimizer.step()
        average.update(model)
        assert run.step(loss_of(run.model)) == pytest.approx(value.item(), rel=1e-4)
    assert max(lengths) > 0.5                                                        # or nothing was clipped
    for name, ours, theirs in zip(run.names, run.weights, model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(run.average.weights[name], average.weights[name], rtol=1e-3, atol=1e-5)


def test_go_ends_with_the_averaged_weights(undisturbed):
    states, end = undisturbed
    for name, w in end.items():
        assert torch.equal(w, states[-1]["tensors"][f"average/{name}"]) and w.is_contiguous()
        assert not torch.equal(w, states[-1]["tensors"][f"weight/{name}"])
    run = fit()
    run.model.eval()
    modes = []
    def loss(generator):
        modes.append(run.model.training)
        return loss_of(run.model)(generator)
    assert run.go(loss, progress=False) is run.losses
    assert modes == [True] * STEPS and not run.model.training


@pytest.mark.parametrize("stop", [1, 2, 3, 5, STEPS - 1])
def test_resume_is_exact(stop, undisturbed, tmp_path):
    "Saved after some steps and killed after one more, a run goes on as if nothing had happened: to the last bit, in each step."
    states, end = undisturbed
    run = fit(tmp_path / "deep" / "run.safetensors")
    for _ in range(stop): run.step(loss_of(run.model))
    run.save()
    assert_same(state(run), states[stop - 1])
    run.step(loss_of(run.model))                                                     # lost
    torch.rand(5)                                                                    # the global generator doesn't matter
    again = fit(run.checkpoint, start=1)                                              # nor do the weights that the network starts with
    assert_same(state(again), states[stop - 1])
    for number in range(stop, STEPS):
        again.step(loss_of(again.model))
        assert_same(state(again), states[number])
    last = fit(run.checkpoint, start=2)
    assert len(last.losses) == stop
    last.go(loss_of(last.model), progress=False)
    assert last.losses == states[-1]["losses"]
    assert all(torch.equal(w, end[k]) for k, w in last.model.named_parameters())
    done = fit(run.checkpoint, start=3)                                               # a finished run takes no step
    assert done.go(None, progress=False) == states[-1]["losses"]
    assert all(torch.equal(w, end[k]) for k, w in done.model.named_parameters())


def test_interrupted_again_and_again(undisturbed, tmp_path):
    states, end = undisturbed
    for stop in (2, 3, 6):
        run = fit(tmp_path / "run.safetensors", start=stop - 2)                      # the first as the undisturbed run, the others read the checkpoint
        def loss(generator):
            if len(run.losses) == stop: raise KeyboardInterrupt
            return loss_of(run.model)(generator)
        with pytest.raises(KeyboardInterrupt): run.go(loss, every=-1, progress=False)
        assert_same(state(run), states[stop - 1])
    last = fit(run.checkpoint)
    assert len(last.losses) == 6
    last.go(loss_of(last.model), progress=False)
    assert all(torch.equal(w, end[k]) for k, w in last.model.named_parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_checkpoints_are_written_in_time(tmp_path, monkeypatch):
    "Every so many seconds and at the end, not after every step."
    run, clock, saved = fit(tmp_path / "run.safetensors"), [0.0], []
    monkeypatch.setattr(sd_scratch.training.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Fit, "save", lambda self: saved.append(len(self.losses)))
    def loss(generator):
        clock[0] += 25
        return loss_of(run.model)(generator)
    run.go(loss, progress=False)
    assert saved == [3, 6, 8]
    plain = fit()
    plain.go(loss_of(plain.model), every=-1, progress=False)                         # no checkpoint: nothing to write
    assert saved == [3, 6, 8]


@pytest.fixture
def checkpoint(tmp_path):
    run = fit(tmp_path / "run.safetensors")
    for _ in range(2): run.step(loss_of(run.model))
    run.save()
    return run.checkpoint


def test_format_of_the_checkpoint(checkpoint):
    with safe_open(checkpoint, "pt") as file:
        assert json.loads(file.metadata()["run"]) == SETTINGS
        names = [name for name, _ in network().named_parameters()]
        assert set(file.keys()) == {"losses", "count", *(f"{key}/{name}" for key in ("weight", "average", "mean", "square") for name in names)}
        assert file.get_tensor("losses").dtype == torch.float64


@pytest.mark.parametrize("changes", [dict(steps=9), dict(lr=0.02), dict(warmup=0.1), dict(weight_decay=0), dict(clip=1.0), dict(decay=0.99), dict(seed=4), dict(lr=0.5, seed=9)])
def test_another_runs_checkpoint_is_refused(checkpoint, changes):
    with pytest.raises(ValueError, match="belongs to another run") as error: fit(checkpoint, **changes)
    message = str(error.value)
    assert str(checkpoint) in message and "delete" in message
    for key in SETTINGS: assert (f"{key} is {SETTINGS[key]} there and {changes.get(key)} here" in message) == (key in changes)


def test_another_networks_checkpoint_is_refused(checkpoint):
    before = {k: w.detach().clone() for k, w in network(width=16).named_parameters()}
    other = network(width=16)
    with pytest.raises(ValueError, match="belongs to another network.*delete"): Fit(other, **SETTINGS, checkpoint=checkpoint)
    assert all(torch.equal(before[k], w) for k, w in other.named_parameters())
    with pytest.raises(ValueError, match="belongs to another network"): Fit(nn.Sequential(network(), nn.Identity()), **SETTINGS, checkpoint=checkpoint)
    save_file({"x": torch.zeros(1)}, checkpoint)                                     # not a checkpoint at all
    with pytest.raises(ValueError, match="belongs to another run"): fit(checkpoint)


@pytest.mark.parametrize("left", [0, 4, 100, 0.5, -1])
def test_damaged_checkpoint_is_refused(checkpoint, left):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:int(left * len(content)) if isinstance(left, float) else left])
    with pytest.raises(ValueError, match="damaged.*delete it to begin again") as error: fit(checkpoint)
    assert str(checkpoint) in str(error.value)


def test_pickle_is_never_opened(tmp_path):
    torch.save(dict(weight=torch.zeros(3)), tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match="damaged"): fit(tmp_path / "run.safetensors")


def test_failing_save_leaves_the_checkpoint_before(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()
    run = fit(checkpoint)
    run.step(loss_of(run.model))
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")
    monkeypatch.setattr(sd_scratch.training, "save_file", full)
    with pytest.raises(OSError, match="no space"): run.save()
    assert checkpoint.read_bytes() == before and list(checkpoint.parent.iterdir()) == [checkpoint]
    checkpoint.unlink()
    with pytest.raises(OSError, match="no space"): run.save()
    assert not list(checkpoint.parent.iterdir())


@pytest.mark.parametrize("kind", ["nan loss", "infinite loss", "nan gradient"])
def test_divergence_stops_before_the_step(kind, undisturbed, tmp_path):
    "A gradient that isn't finite would spoil the weights, and then the checkpoint, one step before the loss shows it."
    states, _ = undisturbed
    run = fit(tmp_path / "run.safetensors")
    def loss(generator):
        value = loss_of(run.model)(generator)
        if len(run.losses) < 3: return value
        if kind == "nan gradient": return value + (0 * run.weights[0]).sum().sqrt()  # 0, with the slope ∞ · 0
        return value * (float("nan") if kind == "nan loss" else float("inf"))
    with pytest.raises(FloatingPointError) as error: run.go(loss, every=-1, progress=False)
    rate = one_cycle(3, STEPS, 0.01, 0.3)
    assert "step 3" in str(error.value) and f"{rate:g}" in str(error.value) and "lr=0.01" in str(error.value)
    assert_same(state(run), states[2])
    assert_same(state(fit(run.checkpoint)), states[2])


def test_step_generator():
    def numbers(seed, step): return torch.randint(2 ** 31, (4,), generator=step_generator(seed, step)).tolist()
    assert numbers(0, 5) == numbers(0, 5)
    assert len({tuple(numbers(seed, step)) for seed in range(5) for step in range(50)}) == 250
    assert step_generator(0, 0).device.type == "cpu"


def pictures(count, channels, value, name):
    return CaptionedPictures(torch.full((count, channels, 4, 4), value, dtype=torch.uint8), [f"{name} {i}" for i in range(count)], name, "train")


def test_join_splits_as_asked():
    sets = [pictures(700, 1, 10, "grey"), pictures(30, 3, 20, "color"), pictures(5, 3, 30, "few")]
    data, weights = join(sets, [2, 5, 1])
    assert (data.name, data.split, data.pictures.shape, data.pictures.dtype) == ("grey+color+few", "train", (735, 3, 4, 4), torch.uint8)
    assert data.captions == [c for d in sets for c in d.captions]
    assert data.pictures[:, :, 0, 0].tolist() == [[10] * 3] * 700 + [[20] * 3] * 30 + [[30] * 3] * 5
    assert weights.shape == (735,) and weights.sum() == pytest.approx(1, abs=1e-5)
    for part, share in zip(weights.split([700, 30, 5]), (2 / 8, 5 / 8, 1 / 8)):
        assert part.sum() == pytest.approx(share, abs=1e-5) and part.unique().numel() == 1
    drawn = draw(weights, 4000, torch.Generator().manual_seed(0))
    assert drawn.shape == (4000,) and drawn.dtype == torch.long
    counts = [((drawn >= a) & (drawn < b)).float().mean().item() for a, b in ((0, 700), (700, 730), (730, 735))]
    assert counts == pytest.approx([2 / 8, 5 / 8, 1 / 8], abs=0.03)
    assert torch.equal(drawn, draw(weights, 4000, torch.Generator().manual_seed(0)))
    assert not torch.equal(drawn, draw(weights, 4000, torch.Generator().manual_seed(1)))


def test_join_of_one_and_with_nothing_of_another():
    data, weights = join([pictures(4, 3, 1, "a")], [7])
    assert (data.name, len(data)) == ("a", 4) and weights.tolist() == pytest.approx([0.25] * 4)
    _, weights = join([pictures(4, 3, 1, "a"), pictures(2, 3, 1, "b")], [1, 0])
    assert draw(weights, 100, torch.Generator().manual_seed(0)).max() < 4
    with pytest.raises(ValueError): join([pictures(4, 3, 1, "a")], [1, 1])
