"The training loop: against a plain loop, stopped and gone on with, killed, in several processes, and what it refuses."
import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from notebooks import ROOT
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import sd_scratch.training
from sd_scratch.data import CaptionedPictures
from sd_scratch.optimizers import ExponentialMovingAverage, Muon, one_cycle
from sd_scratch.training import Fit, LivePlot, draw, every_steps, join, replayed, seeded, several_processes, sparkline, step_generator
from sd_scratch.unet import UNet2DConditionModel

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
        moments = run.optimizer_of[w].state[w]
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


@pytest.mark.parametrize("muon", [False, True])
def test_step_is_a_plain_loop(muon):
    "Against PyTorch's AdamW and clipping, written out; with Muon for the three matrices."
    run, model = fit(muon=muon), network()
    matrices = [w for w in model.parameters() if muon and w.ndim > 1]
    others = [w for w in model.parameters() if not (muon and w.ndim > 1)]
    optimizers = [torch.optim.AdamW(others, lr=1, weight_decay=0.1, betas=(0.9, 0.99)), *([Muon(matrices, weight_decay=0.1)] if muon else [])]
    assert len(matrices) == 3 * muon and len(run.optimizers) == 1 + muon
    average, lengths = ExponentialMovingAverage(model, 0.9), []
    for number in range(STEPS):
        for optimizer in optimizers:
            for group in optimizer.param_groups: group["lr"] = one_cycle(number, STEPS, 0.01, 0.3)
            optimizer.zero_grad()
        value = loss_of(model)(torch.Generator().manual_seed(3 * 1_000_003 + number))
        value.backward()
        lengths.append(torch.cat([w.grad.flatten() for w in model.parameters()]).norm())
        for w in model.parameters(): w.grad *= min(1, 0.5 / lengths[-1])
        for optimizer in optimizers: optimizer.step()
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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.safetensors", "run.safetensors.before"]


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
        assert set(file.keys()) == {"losses", "count", *(f"{key}/{name}" for key in ("weight", "average", "mean", "square", "taken") for name in names)}
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
    with pytest.raises(ValueError, match="2 shares for 1 data sets"): join([pictures(4, 3, 1, "a")], [1, 1])


def test_nothing_to_draw_from():
    nothing = pictures(0, 3, 1, "holiday")
    with pytest.raises(ValueError, match="no picture in the data set holiday: leave it out"): join([pictures(4, 3, 1, "a"), nothing], [1, 1])
    with pytest.raises(ValueError, match="at least one data set"): join([], [])
    for shares in ([0, 0], [1, -1], [float("nan"), 1], [float("inf"), 1]):
        with pytest.raises(ValueError, match="a share above 0"): join([pictures(4, 3, 1, "a"), pictures(4, 3, 1, "b")], shares)
    with pytest.raises(ValueError, match="the data set is empty"): draw(torch.zeros(0), 3, torch.Generator())


class Awkward(nn.Module):
    "What is easily forgotten: running statistics, dropout, a weight that never gets a gradient, one that is frozen, one that gets one now and then."
    def __init__(self, start=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(start)
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Conv2d(4, 2, 1))
        self.unused, self.frozen, self.rare = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 1, 1), requires_grad=False), nn.Parameter(torch.ones(2, 1, 1))

    def loss(self, generator):
        x = torch.randn(4, 3, 6, 6, generator=generator)
        found = self.layers(x + 0.1 * float(np.random.rand()) + 0.1 * random.random()) * self.frozen
        return (found * self.rare if torch.rand(1, generator=generator) < 0.5 else found).square().mean()


def everything(run):
    "Weights, buffers, averages and the optimizer's state, by name."
    found = {k: v.clone() for k, v in run.model.state_dict().items()} | {f"average/{k}": v.clone() for k, v in run.average.weights.items()}
    for name, w in zip(run.names, run.weights): found |= {f"{key}/{name}": v.clone() for key, v in run.optimizer_of[w].state.get(w, {}).items()}
    return found


def test_muon_leaves_the_ends_and_all_that_is_no_matrix_to_adamw():
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_in, self.middle, self.norm, self.words, self.conv_out = nn.Conv2d(3, 4, 3), nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Linear(4, 4)]), nn.GroupNorm(2, 4), nn.Embedding(5, 4), nn.Conv2d(4, 3, 3)
    run = Fit(Ends(), steps=1, muon=True)
    muons = [name for name, w in zip(run.names, run.weights) if isinstance(run.optimizer_of[w], Muon)]
    assert muons == ["middle.0.weight", "middle.1.weight"]
    assert sum(w.numel() for optimizer in run.optimizers for group in optimizer.param_groups for w in group["params"]) == sum(w.numel() for w in run.weights)
    shared = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    shared[1].weight = shared[0].weight
    assert [len(optimizer.param_groups[0]["params"]) for optimizer in Fit(shared, steps=1, muon=True).optimizers] == [2, 1]
    bare = Fit(nn.Linear(2, 2, bias=False), steps=1, muon=True)                      # nothing is left for AdamW
    bare.step(lambda generator: bare.model(torch.ones(1, 2)).sum())
    assert [type(optimizer) for optimizer in bare.optimizers] == [Muon]


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_nothing_is_forgotten(stop, muon, tmp_path):
    "Buffers, hidden generators, and an optimizer that has seen some weights less often than others."
    run = Fit(Awkward(), **SETTINGS, muon=muon)
    for _ in range(STEPS): run.step(run.model.loss)
    assert 0 < run.optimizers[0].state[run.model.rare]["step"] < STEPS and run.model.unused not in run.optimizers[0].state
    first = Fit(Awkward(), **SETTINGS, muon=muon, checkpoint=tmp_path / "run.safetensors")
    for _ in range(stop): first.step(first.model.loss)
    first.save()
    torch.rand(3), np.random.rand(3), random.random()
    again = Fit(Awkward(1), **SETTINGS, muon=muon, checkpoint=first.checkpoint)
    for _ in range(stop, STEPS): again.step(again.model.loss)
    a, b = everything(run), everything(again)
    assert a.keys() == b.keys() and again.losses == run.losses
    for key in a: assert torch.equal(a[key], b[key]), key
    if muon:
        with pytest.raises(ValueError, match="muon is True there and None here"): Fit(Awkward(), **SETTINGS, checkpoint=first.checkpoint)


def test_hidden_generators_are_put_back():
    def states(): return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    before = states()
    with pytest.raises(KeyError), seeded(5):
        torch.rand(3), np.random.rand(3), random.random()
        raise KeyError
    assert states() == before
    def numbers(number):
        with seeded(number): return torch.rand(1).item(), np.random.rand(), random.random()
    assert numbers(5) == numbers(5) and len({x for n in (-6, 5, 7, 2 ** 40) for x in numbers(n)}) == 12
    run = fit()
    run.step(loss_of(run.model))
    assert states() == before
    with seeded(-1 - 3 * 1_000_003): hidden = torch.rand(4)                          # step 0 of the run with seed 3: other numbers than its generator's
    assert not torch.equal(hidden, torch.rand(4, generator=step_generator(3, 0)))


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << position % 8
    path.write_bytes(content)


def test_every_flipped_bit_is_noticed(checkpoint):
    content, dice = checkpoint.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    for position in [*range(8), *dice.sample(range(8, header), 40), *dice.sample(range(header, len(content)), 40), len(content) - 1]:
        flip(checkpoint, position)
        with pytest.raises(ValueError, match="damaged.*delete it to begin again"): fit(checkpoint)
        checkpoint.write_bytes(content)
    assert len(fit(checkpoint).losses) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another kind of file"])
def test_the_one_before_a_damaged_checkpoint(damage, undisturbed, tmp_path):
    states, end = undisturbed
    run = fit(tmp_path / "run.safetensors")
    for stop in range(1, 5):
        run.step(loss_of(run.model))
        run.save()
        assert run.before.exists() == (stop > 1)
    content = run.checkpoint.read_bytes()
    if damage == "flipped": flip(run.checkpoint, len(content) - 50)
    else: run.checkpoint.write_bytes({"cut": content[:-60], "empty": b"", "another kind of file": b"PK" + content[2:]}[damage])
    with pytest.warns(UserWarning, match="going on with the one before it, of step 3") as warned: again = fit(run.checkpoint, start=1)
    assert str(run.checkpoint) in str(warned[0].message) and "damaged" in str(warned[0].message)
    assert_same(state(again), states[2])
    assert len(fit(run.checkpoint).losses) == 3                                      # without a warning: the good one is in its place
    again.go(loss_of(again.model), progress=False)
    assert all(torch.equal(w, end[k]) for k, w in again.model.named_parameters())
    for path in (run.checkpoint, run.before): flip(path, 700)
    with pytest.raises(ValueError, match="no good one before it; delete it to begin again"): fit(run.checkpoint)


def test_two_checkpoints_and_nothing_else(tmp_path, monkeypatch):
    run = fit(tmp_path / "run.safetensors")
    for left in (".run.1.part.safetensors", ".run.safetensors.2.part.before"): (tmp_path / left).write_bytes(b"of a killed process")
    for neighbour in ("other.safetensors", ".other.1.part.safetensors", ".run.b.1.part.safetensors"): (tmp_path / neighbour).write_bytes(b"")
    for _ in range(3):
        run.step(loss_of(run.model))
        run.save()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.1.part.safetensors", ".run.b.1.part.safetensors", "other.safetensors", "run.safetensors", "run.safetensors.before"]
    run.checkpoint.unlink()                                                          # as the messages say: delete it to begin again
    new = fit(run.checkpoint)
    assert not new.losses
    new.step(loss_of(new.model))
    new.save()
    assert not new.before.exists()                                                   # or a damaged checkpoint would go back to the old run
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("this disk knows no second names")))
    first = new.checkpoint.read_bytes()
    new.step(loss_of(new.model))
    new.save()
    assert new.before.read_bytes() == first != new.checkpoint.read_bytes()


def test_checkpoints_of_before_the_checksum(checkpoint, undisturbed):
    with safe_open(checkpoint, "pt") as file: kept = {k: file.get_tensor(k) for k in file.keys() if not k.startswith("taken/")}, {"run": file.metadata()["run"]}
    save_file(kept[0], checkpoint, metadata=kept[1])
    assert_same(state(fit(checkpoint, start=1)), undisturbed[0][1])


def test_killed_at_random_moments(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "benchmarks/killed_runs.py", "--kills", "8", "--steps", "40", "--out", tmp_path / "out.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["total"]["kills"] == 8 and found["total"]["same"] == found["total"]["runs"] == len(found["runs"]) and found["total"]["damaged"] == 0
    assert any(0 < step < 40 for row in found["runs"] for step in row["at_steps"])   # or nothing was killed in the middle


def test_mixed_precision(tmp_path):
    "bfloat16 in the products, float32 in what is kept."
    types, losses, gradients = set(), {}, {}
    for dtype in (None, torch.bfloat16):
        run = fit(dtype=dtype)
        run.model[3].register_forward_hook(lambda layer, inputs, output: types.add(output.dtype))
        losses[dtype] = [run.step(loss_of(run.model))]
        gradients[dtype] = torch.cat([w.grad.flatten() for w in run.weights])
        losses[dtype] += [run.step(loss_of(run.model)) for _ in range(STEPS - 1)]
        assert {t.dtype for t in everything(run).values()} == {torch.float32}
    assert types == {torch.float32, torch.bfloat16}
    assert losses[None] != losses[torch.bfloat16] and losses[None] == pytest.approx(losses[torch.bfloat16], rel=0.03)
    assert torch.cosine_similarity(*gradients.values(), dim=0) > 0.999
    first = fit(tmp_path / "run.safetensors", dtype=torch.bfloat16)
    for _ in range(3): first.step(loss_of(first.model))
    first.save()
    again = fit(first.checkpoint, start=1, dtype=torch.bfloat16)
    for _ in range(3, STEPS): again.step(loss_of(again.model))
    assert again.losses == losses[torch.bfloat16]
    with pytest.raises(ValueError, match="dtype is torch.bfloat16 there and None here"): fit(first.checkpoint)
    with pytest.raises(ValueError, match="torch.float16.*torch.bfloat16"): fit(dtype=torch.float16)


def test_callbacks(undisturbed, tmp_path):
    "Called after each step, with the run; training doesn't notice."
    states, end = undisturbed
    run, calls = fit(tmp_path / "run.safetensors"), []
    def meddle(run):
        calls.append(len(run.losses))
        run.model.eval()
        torch.manual_seed(0)
    modes = []
    def loss(generator):
        modes.append(run.model.training)
        if len(run.losses) == 5 and len(modes) == 6: raise KeyboardInterrupt
        return loss_of(run.model)(generator)
    rare = []
    with pytest.raises(KeyboardInterrupt): run.go(loss, every=-1, progress=False, callbacks=[meddle, every_steps(3, lambda run: rare.append(len(run.losses)))])
    run = fit(tmp_path / "run.safetensors", start=1)
    run.go(loss, progress=False, callbacks=[meddle, every_steps(3, lambda run: rare.append(len(run.losses)))])
    assert calls == list(range(1, STEPS + 1)) and rare == [3, 6, STEPS] and all(modes)
    assert all(torch.equal(w, end[k]) for k, w in run.model.named_parameters())


def test_averaged_weights_for_a_moment(undisturbed):
    run = fit()
    for _ in range(3): run.step(loss_of(run.model))
    run.model.train()
    with pytest.raises(KeyError), run.averaged() as model:
        assert model is run.model and not model.training and not torch.is_grad_enabled()
        assert all(torch.equal(w, run.average.weights[k]) for k, w in model.named_parameters())
        raise KeyError
    assert run.model.training and torch.is_grad_enabled()
    assert_same(state(run), undisturbed[0][2])
    for number in range(3, STEPS): run.step(loss_of(run.model))
    assert_same(state(run), undisturbed[0][-1])


def test_sparkline():
    assert sparkline([1, 10, 100, 1000], 4) == "▁▃▆█" and sparkline([0, 1, 2, 7], 4) == "▁▂▃█"    # logarithmic, unless a value is 0
    assert sparkline([], 5) == "" and sparkline([2.0], 5) == "▁" and sparkline([5] * 9, 4) == "▁▁▁▁"
    assert sparkline(range(100), 10) == sparkline([4.5 + 10 * i for i in range(10)], 10) and len(sparkline(range(3), 10)) == 3


def test_live_plot_in_a_terminal(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    clock = [0.0]
    monkeypatch.setattr(sd_scratch.training.time, "monotonic", lambda: clock[0])
    run, plot = fit(), LivePlot(seconds=10)
    def loss(generator):
        clock[0] += 4
        return loss_of(run.model)(generator)
    run.go(loss, progress=False, callbacks=[plot])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" of ")[0].split()[-1] for line in lines] == ["1", "4", "7", "8"]
    assert sparkline(run.losses) in lines[-1]
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="ascii", write=lambda text: text.encode("ascii"), flush=lambda: None))
    plot(run)                                                                        # a terminal without these characters doesn't stop the run
    run.accelerator = SimpleNamespace(is_main_process=False)
    monkeypatch.setattr(plot, "show", None)
    plot(run)


def test_live_plot_in_a_notebook(monkeypatch):
    shown = []
    handle = SimpleNamespace(update=lambda picture: shown.append(picture.data))
    def display(picture, display_id):
        shown.append(picture.data)
        return handle
    import IPython.display
    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=True))
    run, plot = fit(), LivePlot(seconds=0)
    run.go(loss_of(run.model), progress=False, callbacks=[plot])
    assert len(shown) == STEPS and all(data.startswith(b"\x89PNG") for data in shown) and len(set(shown)) == STEPS
    plot.show([1.0, 0.0, -1.0], 5)                                                   # no logarithm of these


def test_a_loss_that_cant_be_used():
    run = fit()
    with pytest.raises(ValueError, match=r"at step 0: .*channels.*begins with 0.weight \(8, 3, 3, 3\), torch.float32.*shape") as error: run.step(lambda g: run.model(torch.randn(4, 1, 6, 6)).mean())
    assert isinstance(error.value.__cause__, RuntimeError)
    for wrong, said in ((lambda g: run.model(torch.randn(4, 3, 6, 6)).mean(1), r"the loss is \(4,\)"), (lambda g: loss_of(run.model)(g).item(), "single number"), (lambda g: loss_of(run.model)(g).detach(), "no_grad"),
                        (lambda g: None, "the loss is None")):
        with pytest.raises(ValueError, match=said): run.step(wrong)
    def full(g): raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"): run.step(full)
    with pytest.raises(KeyError): run.step(lambda g: {}["my own mistake"])
    assert run.losses == [] and all(torch.equal(a, b) for a, b in zip(run.weights, network().parameters()))


def test_divergence_says_where(tmp_path):
    run = fit(tmp_path / "run.safetensors")
    run.step(loss_of(run.model))
    run.save()
    kept = run.checkpoint.read_bytes()
    def loss(generator): return loss_of(run.model)(generator) + (0 * run.weights[2]).sum().sqrt()
    with pytest.raises(FloatingPointError) as error: run.go(loss, every=-1, progress=False)
    for said in ("step 1", f"isn't finite from {run.names[2]} on", "clip (now 0.5)", "step_generator(3, 1)", f"{run.checkpoint} keeps an earlier step"): assert said in str(error.value)
    assert run.checkpoint.read_bytes() == kept


PROGRAM = """
import os, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
import sd_scratch.training as training
from test_training import SETTINGS, network
accelerator = training.several_processes(cpu=True)
assert accelerator.num_processes == 2
written, save_file = [], training.save_file
def counted(*args, **kwargs): written.append(1); save_file(*args, **kwargs)
training.save_file = counted
run = training.Fit(network(accelerator.process_index).to(accelerator.device), **(SETTINGS | dict(steps=20)), checkpoint=sys.argv[1], accelerator=accelerator)
def loss(generator):
    x = run.part(torch.randn(4, 3, 6, 6, generator=generator))
    return (run.model(x) - 3 * x.mean((2, 3)).sum(1, keepdim=True)).square().mean()
run.go(loss, every=-1, progress=False)
total = sum(w.double().sum().item() for w in run.weights)
print(f"\\nprocess {accelerator.process_index} wrote {len(written)} files, sum {total!r}, loss {run.losses[-1]!r}\\n", end="", flush=True)
"""


def test_two_processes_do_what_one_does(tmp_path):
    "The tolerance: 20 steps of AdamW multiply what rounding does to the order of a sum; 1e-4 of a learning rate of 0.01 is 1e-6 a step."
    pytest.importorskip("accelerate")
    alone = fit(steps=20)
    alone.go(loss_of(alone.model), progress=False)
    (tmp_path / "program.py").write_text(PROGRAM)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no",
                           "--dynamo_backend", "no", tmp_path / "program.py", tmp_path / "run.safetensors", ROOT / "tests"], capture_output=True, text=True, env=env)
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("process"))
    assert len(lines) == 2, done.stdout + done.stderr
    assert "process 0 wrote 21 files" in lines[0] and "process 1 wrote 0 files" in lines[1]
    assert lines[0].split("files")[1] == lines[1].split("files")[1]                  # the two agree to the last bit
    together = fit(tmp_path / "run.safetensors", start=5, steps=20)                  # and a single process can go on with what they wrote
    assert together.losses == pytest.approx(alone.losses, rel=1e-4)
    together.go(None, progress=False)
    for (name, a), b in zip(together.model.named_parameters(), alone.model.parameters()): torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=name)


def test_accelerator_of_one_process_changes_nothing(undisturbed):
    pytest.importorskip("accelerate")
    run = fit(accelerator=several_processes(cpu=True))
    for _ in range(STEPS): run.step(loss_of(run.model))
    assert_same(state(run), undisturbed[0][-1])


def test_processes_that_dont_fit_together(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    class Two:
        num_processes, process_index, is_main_process, device = 2, 1, False, torch.device("cpu")
        def reduce(self, t, how): return t
        def gather(self, t): return torch.cat([t, t + 5])
    monkeypatch.setattr("accelerate.utils.broadcast", lambda t: t)
    with pytest.raises(ValueError, match=r"steps \[0, 5\]: put the checkpoint into a folder that all of them see"): fit(accelerator=Two())
    Two.gather = lambda self, t: torch.cat([t, t])
    run = fit(tmp_path / "run.safetensors", accelerator=Two())
    run.save()
    assert not run.checkpoint.exists()                                               # only the first writes
    assert run.part(torch.arange(6)).tolist() == [1, 3, 5] and run.part(["a", "b"]) == ["b"]
    with pytest.raises(ValueError, match="a batch of 5 can't be divided evenly among 2 processes: make it a multiple of 2"): run.part(torch.zeros(5, 3))
    Two.device = torch.device("meta")
    with pytest.raises(ValueError, match="the model is on cpu, and this process computes on meta"): fit(accelerator=Two())
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="pip install accelerate"): several_processes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (CUDA)")
def test_replayed_on_a_gpu_trains_the_same():
    "Recorded or launched one by one, a training ends with the same weights; in evaluation mode another batch size works."
    unet = dict(sample_size=8, block_out_channels=[32, 32], layers_per_block=1, norm_num_groups=8, cross_attention_dim=16, attention_head_dim=2,
                down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2)
    text = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(0)).cuda()
    ends = []
    for record in (False, True):
        with seeded(0): net = UNet2DConditionModel(**unet).cuda()
        def loss(g):
            x, t = torch.randn(8, 4, 8, 8, generator=g).cuda(), torch.randint(0, 1000, (8,), generator=g).cuda()
            return (net(x, t, text) - x).square().mean()
        run = Fit(net, steps=20)
        if record: replayed(net, torch.zeros(8, 4, 8, 8).cuda(), torch.zeros(8, dtype=torch.long).cuda(), text)
        run.go(loss, progress=False)
        ends.append((run.losses, net(torch.ones(3, 4, 8, 8).cuda(), 7, text[:1]).detach().cpu()))
    (a, x), (b, y) = ends
    assert a[-1] < 0.9 * a[0]
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2)
