"The learning-rate schedule, and the moving average against its closed form."
import math

import pytest
import torch

from sd_scratch.optimizers import ExponentialMovingAverage, one_cycle


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
