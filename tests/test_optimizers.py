"The optimizers that the notebook writes out against torch's, the learning-rate schedule, and the moving average against its closed form and torch's."
import ast
import math

import pytest
import torch
from notebooks import ROOT, read

from sd_scratch.optimizers import ExponentialMovingAverage, Muon, one_cycle, orthogonal


@pytest.mark.parametrize("warmup", [0, 0.05, 0.3, 1])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_one_cycle_rises_to_its_peak_and_falls(steps, warmup):
    rates = [one_cycle(step, steps, 2e-3, warmup) for step in range(steps)]
    rise = max(1, round(warmup * steps))
    assert all(0 < rate <= 2e-3 for rate in rates)
    assert rates[rise - 1] == pytest.approx(2e-3, rel=1e-12)
    assert all(a < b for a, b in zip(rates[:rise], rates[1:rise]))
    assert rates[:rise] == pytest.approx([2e-3 * (step + 1) / rise for step in range(rise)])      # a straight line that doesn't begin at 0
    assert all(a > b for a, b in zip(rates[rise:], rates[rise + 1:]))
    if rise < steps: assert rates[rise] == pytest.approx(2e-3) and one_cycle(steps, steps, 2e-3, warmup) == pytest.approx(0, abs=1e-12)


def test_one_cycle_values():
    assert [one_cycle(step, 1, 3.0) for step in range(1)] == [3.0]
    assert [one_cycle(step, 40, 1.0) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]                   # 5 % of 40 steps on the way up
    assert one_cycle(21, 40, 1.0) == pytest.approx(0.5)                                          # half-way between 2 and 40
    assert one_cycle(39, 40, 1.0) == pytest.approx(math.sin(math.pi / 2 / 38) ** 2)


def test_one_cycle_is_torchs_cosine():
    "Without warm-up the way down is CosineAnnealingLR's."
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
    for step in range(30):
        assert one_cycle(step + 1, 31, 0.1, warmup=0) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        schedule.step()


def model_of(*values):
    model = torch.nn.Module()
    for i, value in enumerate(values): model.register_parameter(f"w{i}", torch.nn.Parameter(torch.as_tensor(value, dtype=torch.float64).clone()))
    return model


@pytest.mark.parametrize("decay", [0, 0.15, 0.5, 0.999])
def test_average_has_its_closed_form(decay):
    "After n updates the average is the sum of all weights so far, each times what was kept of it since."
    random = torch.Generator().manual_seed(0)
    path = torch.randn(30, 2, 3, generator=random, dtype=torch.float64)                          # 30 settings of two weights of 3 numbers
    model = model_of(*path[0])
    average = ExponentialMovingAverage(model, decay)
    keep = [min(decay, (1 + n) / (10 + n)) for n in range(1, 30)]
    for n in range(1, 30):
        for w, value in zip(model.parameters(), path[n]): w.data.copy_(value)
        average.update(model)
        shares = torch.tensor([math.prod(keep[:n])] + [(1 - keep[k]) * math.prod(keep[k + 1:n]) for k in range(n)], dtype=torch.float64)
        assert shares.sum() == pytest.approx(1)
        expected = (shares[:, None, None] * path[:n + 1]).sum(0)
        for i in range(2): torch.testing.assert_close(average.weights[f"w{i}"], expected[i], rtol=1e-10, atol=1e-12)
    assert average.count == 29


def test_average_is_a_copy_and_leaves_the_model_alone():
    model = model_of([1.0, 2.0])
    average = ExponentialMovingAverage(model)
    model.w0.data.fill_(5)
    assert average.weights["w0"].tolist() == [1, 2]
    average.update(model)
    assert model.w0.tolist() == [5, 5] and model.w0.requires_grad and not average.weights["w0"].requires_grad
    kept = average.weights["w0"].clone()
    average.copy_to(model)
    assert torch.equal(model.w0.data, kept)
    model.w0.data.zero_()                                                                         # the model has a copy
    assert torch.equal(average.weights["w0"], kept)


def test_average_stays_where_the_weights_stay():
    model = model_of([0.1, -3.0])
    average = ExponentialMovingAverage(model, 0.9)
    for _ in range(50): average.update(model)
    torch.testing.assert_close(average.weights["w0"], model.w0.data, rtol=1e-12, atol=0)


def rates_of_torch(steps, peak, rise):
    "The same schedule in torch's pieces: LinearLR up, CosineAnnealingLR down."
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / rise, 1, rise - 1)
    down = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - rise)
    schedule, rates = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], [rise]), []
    for _ in range(steps):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("steps, warmup", [(200, 0.05), (200, 0.3), (77, 0.1)])
def test_one_cycle_is_torchs_linear_rise_and_cosine(steps, warmup):
    ours = [one_cycle(step, steps, 2e-3, warmup) for step in range(steps)]
    assert ours == pytest.approx(rates_of_torch(steps, 2e-3, round(warmup * steps)), rel=0, abs=1e-10)


@pytest.mark.parametrize("steps", [10, 99, 12_345])
def test_one_cycle_scales_with_its_peak_and_needs_no_memory(steps):
    "Asked for in any order, and for any peak, a step has the same share of the peak."
    shares = [one_cycle(step, steps, 1.0) for step in range(steps)]
    for step in (steps - 1, 0, steps // 2): assert one_cycle(step, steps, 3e-4) == pytest.approx(3e-4 * shares[step], rel=1e-12)


@pytest.mark.parametrize("decay", [0.5, 0.98, 0.9999])
def test_average_is_torchs_along_a_training(decay):
    "200 steps of Adam on a small network: the average equals AveragedModel's with the growing decay put in."
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    ours = ExponentialMovingAverage(model, decay)

    def grown(average, weight, count):
        d = min(decay, (1 + int(count)) / (10 + int(count)))
        return d * average + (1 - d) * weight

    theirs = torch.optim.swa_utils.AveragedModel(model, avg_fn=grown)
    theirs.update_parameters(model)                                                               # its first update is a copy of the start
    for _ in range(200):
        optimizer.zero_grad()
        x = torch.randn(8, 3, dtype=torch.float64)
        (model(x) - x[:, :2] ** 2).square().mean().backward()
        optimizer.step()
        ours.update(model)
        theirs.update_parameters(model)
    expected = dict(theirs.module.named_parameters())
    assert ours.weights.keys() == expected.keys()
    for name, w in ours.weights.items():
        assert (w - expected[name]).abs().max() <= 1e-10
        assert (w - dict(model.named_parameters())[name]).abs().max() > 1e-4                      # an average, and not the weights themselves


def test_average_is_less_noisy_than_the_weights():
    "Independent noise around a constant: a decay d leaves (1 - d) / (1 + d) of the variance."
    random = torch.Generator().manual_seed(0)
    model = model_of(torch.full((5000,), 3.0))
    average = ExponentialMovingAverage(model, 0.8)
    for _ in range(100):
        model.w0.data.copy_(3 + torch.randn(5000, generator=random, dtype=torch.float64))
        average.update(model)
    assert average.weights["w0"].mean().item() == pytest.approx(3, abs=0.03)
    assert average.weights["w0"].var().item() == pytest.approx(0.2 / 1.8, rel=0.1)


def test_average_keeps_each_weights_type_and_name():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 1).double()})
    average = ExponentialMovingAverage(model)
    average.update(model)
    assert {name: w.dtype for name, w in average.weights.items()} == {name: w.dtype for name, w in model.named_parameters()}
    average.copy_to(model)
    assert all(w.requires_grad and w.grad is None for w in model.parameters())


@pytest.fixture(scope="module")
def written_out():
    "The notebook's own optimizers: the cells that define them, run without the rest."
    wanted, found = {"descend", "momentum", "rmsprop", "adam", "adam_l2", "adamw"}, {"torch": torch, "math": math}
    for cell in read(ROOT / "nbs/02_optimizers.ipynb").cells:
        if cell.cell_type != "code" or cell.source.startswith("%"): continue
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.FunctionDef) and node.name in wanted: exec(ast.unparse(node), found)
    assert wanted <= found.keys()
    return found


@pytest.mark.parametrize("name, settings, torchs", [
    ("descend", dict(lr=0.03), lambda w: torch.optim.SGD(w, lr=0.03)),
    ("momentum", dict(lr=0.01, beta=0.7), lambda w: torch.optim.SGD(w, lr=0.01, momentum=0.7)),
    ("rmsprop", dict(lr=0.02, alpha=0.9, eps=1e-3), lambda w: torch.optim.RMSprop(w, lr=0.02, alpha=0.9, eps=1e-3)),
    ("adam", dict(lr=0.02, betas=(0.8, 0.95), eps=1e-3), lambda w: torch.optim.Adam(w, lr=0.02, betas=(0.8, 0.95), eps=1e-3)),
    ("adam_l2", dict(lr=0.02, betas=(0.9, 0.99), weight_decay=0.3), lambda w: torch.optim.Adam(w, lr=0.02, betas=(0.9, 0.99), weight_decay=0.3)),
    ("adamw", dict(lr=0.02, betas=(0.9, 0.99), weight_decay=0.3), lambda w: torch.optim.AdamW(w, lr=0.02, betas=(0.9, 0.99), weight_decay=0.3)),
])
def test_written_out_is_torchs(written_out, name, settings, torchs):
    "200 steps with random gradients of very different sizes, float64: the same place at every step."
    random = torch.Generator().manual_seed(1)
    place, memory = torch.randn(4, 3, generator=random, dtype=torch.float64), {}
    theirs = place.clone().requires_grad_()
    optimizer = torchs([theirs])
    for _ in range(200):
        gradient = torch.randn(4, 3, generator=random, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 30.0])
        place, theirs.grad = written_out[name](place, gradient, memory, **settings), gradient.clone()
        optimizer.step()
        assert (place - theirs.detach()).abs().max() <= 1e-10


def by_singular_values(G, coefficients=(3.4445, -4.775, 2.0315), steps=5, eps=1e-7):
    "Newton-Schulz as the polynomial of the singular values that it is."
    a, b, c = coefficients
    u, s, v = torch.linalg.svd(G, full_matrices=False)
    s = s / s.norm().clamp(min=eps)
    for _ in range(steps): s = a * s + b * s ** 3 + c * s ** 5
    return u * s @ v


@pytest.mark.parametrize("shape", [(7, 7), (5, 12), (12, 5), (1, 6), (6, 1)], ids=str)
def test_orthogonal_acts_on_the_singular_values_alone(shape):
    G = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for many, one in zip(orthogonal(G), G):
        assert torch.allclose(many, by_singular_values(one), atol=1e-10)
        assert torch.allclose(orthogonal(one * 1e6), many, atol=1e-10)                            # whatever its length
    assert torch.equal(orthogonal(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with PyTorch 2.9")
@pytest.mark.parametrize("shape", [(5, 12), (12, 5)], ids=str)
def test_muon_is_torchs(shape, monkeypatch):
    "200 steps in float64; theirs rounds to bfloat16 inside, so it gets the polynomial by singular values instead."
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", by_singular_values)
    random = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape, dtype=torch.float64)) for _ in range(2))
    settings = dict(lr=0.03, momentum=0.9, weight_decay=0.1)
    optimizers = Muon([ours], **settings), torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(200):
        gradient = torch.randn(shape, generator=random, dtype=torch.float64)
        for w, optimizer in zip((ours, theirs), optimizers):
            w.grad = gradient + w.detach()
            optimizer.step()
    assert (ours - theirs).abs().max() <= 1e-10 and (ours - 1).abs().max() > 0.1


def test_muon_takes_kernels_as_matrices_and_skips_what_has_no_gradient():
    random = torch.Generator().manual_seed(0)
    kernel, matrix, left = (torch.nn.Parameter(torch.zeros(*shape)) for shape in ((4, 3, 2, 2), (4, 12), (2, 2)))
    kernel.grad = torch.randn(kernel.shape, generator=random).to(memory_format=torch.channels_last)
    matrix.grad = kernel.grad.flatten(1)
    Muon([kernel, matrix, left]).step()
    assert torch.equal(kernel.flatten(1), matrix) and matrix.abs().max() > 0 and not left.any()
    with pytest.raises(ValueError, match=r"\(4,\).*leave it to AdamW"): Muon([torch.nn.Parameter(torch.zeros(4))])
