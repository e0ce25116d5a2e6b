"What tests of several modules need: comparing with a reference implementation, and a file that must never be unpickled."
from pathlib import Path

import torch


def close(ours, theirs, tolerance=1e-5):
    "Assert that two tensors are equal as the course means it: the largest difference is at most tolerance times the larger of 1 and the largest value."
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert theirs.isfinite().all()
    assert (ours - theirs).abs().max() <= tolerance * max(1, theirs.abs().max())


@torch.no_grad()
def randomised(model, scale=0.1, seed=0):
    "Move every parameter away from what it starts as: fresh norms and biases hide mistakes."
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters(): p.add_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()


def same(a, b, rtol=0, atol=0):
    "Assert that two networks have the same weights under the same names; to the last bit, unless a tolerance is given."
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a: torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol)


class Intruder:
    "What unpickling runs."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)
