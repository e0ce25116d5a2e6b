"What comparing with a reference implementation takes."
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
