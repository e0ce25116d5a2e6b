"Differences against known derivatives, the check against planted mistakes, the engine against torch.autograd."
import numpy as np
import pytest
import torch

from sd_scratch.gradients import Tape, Tensor, check_gradient, finite_difference_gradient


def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 1, 3)])
def test_differences_of_a_known_function(shape):
    x, w = normal(*shape), normal(*shape, seed=1)
    def f(x): return (w * x.sin()).sum()
    exact = w * x.cos()
    for central, tolerance in ((True, 1e-9), (False, 1e-6)):
        torch.testing.assert_close(finite_difference_gradient(f, x, central=central), exact, rtol=0, atol=tolerance)


def test_errors_fall_with_the_first_and_the_second_power_of_h():
    x = normal(6)
    def error(h, central): return (finite_difference_gradient(lambda x: x.exp().sum(), x, h, central) - x.exp()).abs().max()
    assert error(2e-3, True) / error(1e-3, True) == pytest.approx(4, rel=0.01)
    assert error(2e-3, False) / error(1e-3, False) == pytest.approx(2, rel=0.01)


def test_default_step_is_near_the_best_for_both_precisions_and_grows_with_x():
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        for size in (1e-3, 1, 1e4):
            x = (size * (1.5 + normal(4).abs())).to(dtype)
            given = finite_difference_gradient(lambda x: (x / size).sin().sum() if size > 1 else x.sin().sum(), x)
            exact = (x / size).cos() / size if size > 1 else x.cos()
            assert (given - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize("central, calls", [(True, 24), (False, 13)])
def test_number_of_evaluations(central, calls):
    seen = []
    finite_difference_gradient(lambda x: seen.append(x.clone()) or x.sum(), normal(3, 4), 0.1, central)
    assert len(seen) == calls
    assert all(int((x != normal(3, 4)).sum()) <= 1 for x in seen)                                # one element at a time, and put back


def test_x_is_left_alone_whatever_its_memory_looks_like():
    x = normal(3, 4).T                                                                           # not contiguous
    before, w = x.clone(), normal(4, 3, seed=1)
    torch.testing.assert_close(finite_difference_gradient(lambda x: (w * x).sum(), x), w)
    assert torch.equal(x, before)
    one = torch.zeros(1, dtype=torch.float64).expand(4)                                          # four elements in one place
    torch.testing.assert_close(finite_difference_gradient(lambda x: (torch.arange(4) * x).sum(), one), torch.arange(4, dtype=torch.float64))
    leaf = normal(3).requires_grad_()
    assert not finite_difference_gradient(lambda x: (x * leaf).sum(), leaf).requires_grad and leaf.grad is None


def test_exact_step_in_memory():
    "x + h is rounded; dividing by what is in memory makes a straight line's slope exact"
    x = torch.tensor([1000.0], dtype=torch.float32)
    assert finite_difference_gradient(lambda x: x.double() * 3, x, h=1e-4).item() == 3
    assert finite_difference_gradient(lambda x: x.double() * 3, x, h=1e-4, central=False).item() == 3


@pytest.mark.parametrize("f, x, h, says", [
    (torch.sum, torch.arange(3), None, "x.double()"), (torch.sin, torch.ones(2), None, r"shape \(2,\)"), (torch.sum, torch.ones(2), 1e-9, "larger h"),
    (torch.sum, torch.ones(2, dtype=torch.float64), 1e-17, "vanishes")])
def test_bad_input_of_differences(f, x, h, says):
    for central in (True, False):
        with pytest.raises(ValueError, match=says): finite_difference_gradient(f, x, h, central)


def test_check_gradient_accepts_what_is_right():
    x = normal(4, 5)
    assert check_gradient(lambda x: x.sin().sum(), x, x.cos()) < 1e-8
    assert check_gradient(lambda x: x.sin().sum(), x.numpy(), x.cos().numpy()) < 1e-8
    assert check_gradient(lambda x: 0 * x.sum(), x, torch.zeros(4, 5)) == 0
    check_gradient(lambda x: 1e-9 * x.sin().sum(), x, 1e-9 * x.cos())                             # small, and still right
    check_gradient(lambda x: 5 + (x - x).sum(), x, torch.zeros(4, 5))
    check_gradient(lambda x: 1e9 + x.sum(), x, torch.ones(4, 5, dtype=torch.float64))            # rounding, not a mistake


@pytest.mark.parametrize("spoil, says", [
    (lambda g: g.index_put((torch.tensor(2), torch.tensor(3)), -g[2, 3]), r"at 1 of 20 elements, worst at \(2, 3\)"), (lambda g: 2 * g, "at 20 of 20"),
    (lambda g: g.index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(float("nan")).double()), r"worst at \(0, 1\): given nan"),
    (lambda g: g + 3e-6 * g.abs().max(), "allowed is 1e-06"), (torch.zeros_like, "given 0")])
def test_check_gradient_names_the_worst_element(spoil, says):
    x = 1 + normal(4, 5).abs()
    with pytest.raises(AssertionError, match=says): check_gradient(lambda x: x.exp().sum(), x, spoil(x.exp()))


def test_tolerance_is_a_share_of_the_largest_element():
    x = normal(4)
    for size in (1e-4, 1, 1e4):
        check_gradient(lambda x: size * x.exp().sum(), x, size * x.exp() * (1 + 3e-7))
        with pytest.raises(AssertionError): check_gradient(lambda x: size * x.exp().sum(), x, size * x.exp() * (1 + 3e-6))


def test_check_gradient_refuses_what_it_cannot_judge():
    x = normal(3)
    with pytest.raises(ValueError, match="float64"): check_gradient(torch.sum, x.float(), torch.ones(3))
    with pytest.raises(ValueError, match=r"\(2,\), x has \(3,\)"): check_gradient(torch.sum, x, torch.ones(2))


def both(f, *values):
    "Return the gradients of f by our engine and by torch.autograd."
    tape = Tape()
    ours = [tape.tensor(v.numpy()) for v in values]
    theirs = [v.clone().requires_grad_() for v in values]
    result, reference = f(*ours), f(*theirs)
    tape.backward(result)
    reference.backward()
    assert result.value == pytest.approx(reference.item(), rel=1e-13)
    return [(a.grad, b.grad.numpy()) for a, b in zip(ours, theirs)]


W = normal(4, 3, seed=9)


@pytest.mark.parametrize("name, f, shapes", [
    ("add", lambda a, b: ((a + b) * W.numpy() if isinstance(a, Tensor) else (a + b) * W).sum(), [(4, 3), (4, 3)]),
    ("add a row", lambda a, b: ((a + b) * (a + b)).sum(), [(4, 3), (3,)]),
    ("add a column", lambda a, b: ((a - b) * (b - a) * a).sum(), [(4, 3), (4, 1)]),
    ("add a number", lambda a, b: ((a * b).tanh() + b).sum(), [(4, 3), ()]),
    ("outer", lambda a, b: ((a * b) * (a - b)).tanh().sum(), [(4, 1), (1, 3)]),
    ("used three times", lambda a: (a * a * a + a).sum(), [(4,)]),
    ("minus", lambda a: (3 - a * 2 - (-a).exp()).sum(), [(4,)]),
    ("number on the left", lambda a: (2 * a + (1 + a)).tanh().sum(), [(4,)]),
    ("matrix", lambda a, b: (a @ b).tanh().sum(), [(4, 3), (3, 2)]),
    ("row times matrix", lambda a, b: (a @ b).tanh().sum(), [(3,), (3, 2)]),
    ("batch of matrices", lambda a, b: (a @ b).tanh().sum(), [(2, 4, 3), (3, 2)]),
    ("sum over rows", lambda a: (a.sum(0) * a.sum(0)).sum(), [(4, 3)]),
    ("sum over columns", lambda a: (a.sum(-1) * a.sum(1)).sum(), [(4, 3)]),
    ("choice", lambda a: (a[1] * a[0, 2]).sum() + a[-1, 0], [(4, 3)]),
    ("the same twice", lambda a: (a[[0, 0, 2]] * a[[1, 0, 0]]).sum(), [(4, 3)]),
    ("exp, log", lambda a: ((a.exp() + 1).log() * a).sum(), [(4, 3)]),
])
def test_operations_are_torchs(name, f, shapes):
    for ours, theirs in both(f, *(normal(*shape, seed=i) for i, shape in enumerate(shapes))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)
        assert ours.shape == theirs.shape


def test_keepdims_and_constants_on_the_left():
    x = normal(4, 3)
    tape = Tape()
    t = tape.tensor(x.numpy())
    tape.backward(((W.T.numpy() @ t) * (W.T.numpy() @ t)).sum() + (W.numpy() * t.sum(axis=1, keepdims=True)).sum())
    place = x.clone().requires_grad_()
    (((W.T @ place) ** 2).sum() + (W * place.sum(1, keepdim=True)).sum()).backward()
    np.testing.assert_allclose(t.grad, place.grad, rtol=1e-12)


def test_log_softmax_is_torchs_and_doesnt_overflow():
    x = normal(4, 3) * torch.tensor([[1.0], [30.0], [800.0], [1e-3]]) + torch.tensor([[0.0], [0.0], [900.0], [0.0]])
    tape = Tape()
    t = tape.tensor(x.numpy())
    y = t.log_softmax()
    tape.backward((y * W.numpy()).sum())
    place = x.clone().requires_grad_()
    (place.log_softmax(-1) * W).sum().backward()
    np.testing.assert_allclose(y.value, place.detach().log_softmax(-1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(t.grad, place.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch", [(), (5,)])
def test_network_is_torchs_to_the_twelfth_digit(batch):
    sizes = (12, 8, 6, 4)
    weights = [normal(a, b, seed=i) / a ** 0.5 for i, (a, b) in enumerate(zip(sizes, sizes[1:]))]
    biases = [normal(b, seed=10 + i) for i, b in enumerate(sizes[1:])]
    def f(x, *wb):
        for w, b in zip(wb[:2], wb[3:5]): x = (x @ w + b).tanh()
        z = x @ wb[2] + wb[5]
        return (z.log_softmax() if isinstance(z, Tensor) else z.log_softmax(-1))[..., 2].sum()
    for ours, theirs in both(f, normal(*batch, 12, seed=20), *weights, *biases):
        assert np.abs(ours - theirs).max() <= 1e-12 * np.abs(theirs).max()


def test_backward_begins_from_nothing_each_time():
    tape = Tape()
    a, b = tape.tensor(2.0), tape.tensor(3.0)
    product, total = a * b, a + b
    tape.backward(product)
    tape.backward(product)
    assert (a.grad, b.grad) == (3, 2)
    tape.backward(total)
    assert (a.grad, b.grad, product.grad) == (1, 1, None)                                        # the product has no part in the sum


def test_what_has_no_part_has_no_slope():
    tape = Tape()
    a, b, c = (tape.tensor(v) for v in (2.0, 3.0, 4.0))
    y = a * a
    b * c
    tape.backward(y)
    assert (a.grad, b.grad, c.grad) == (4, None, None)


def test_precision_is_kept():
    tape = Tape()
    x = tape.tensor(np.ones((2, 3), np.float32))
    y = ((x * 2.0 - 1 + 0.5) @ np.ones((3, 4), np.float32)).tanh().log_softmax().sum() * 0.5
    tape.backward(y)
    assert y.value.dtype == x.grad.dtype == np.float32


def test_bad_input_of_the_engine():
    one, other = Tape(), Tape()
    with pytest.raises(ValueError, match="different tapes"): one.tensor(1.0) + other.tensor(2.0)
    with pytest.raises(ValueError, match=r"shape \(2,\)"): one.backward(one.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"astype\(float\)"): one.tensor([1, 2])
    with pytest.raises(ValueError, match="must be a matrix"): one.tensor([1.0, 2.0]) @ np.ones(2)
