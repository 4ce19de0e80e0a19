"""Block kernels against dense attention, forward and backward, on every device there is."""

import pytest
import torch

from longvila.errors import ConfigError
from longvila.parallel.kernel import block_backward, block_forward

SCALE = 0.2
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = [
    pytest.param("cpu", torch.float64, 1e-13, id="cpu-fp64"),
    pytest.param("cpu", torch.float32, 1e-5, id="cpu-fp32"),
    pytest.param("cpu", torch.bfloat16, 3e-2, id="cpu-bf16"),
    pytest.param("cuda", torch.bfloat16, 3e-2, id="cuda-bf16", marks=CUDA),
]
VISIBLE = {
    "full": lambda rows, columns: torch.ones(rows, columns, dtype=torch.bool),
    "causal": lambda rows, columns: torch.ones(rows, columns, dtype=torch.bool).tril(),
    "edge": lambda rows, columns: torch.ones(rows, columns, dtype=torch.bool).triu(),
}


def dense(q, k, v, visible):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT * SCALE).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def error(found, expected):
    return ((found.cpu().double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("device", "dtype", "bound"), DEVICES)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize(("kind", "rows", "columns"), [
    ("full", 7, 19), ("full", 19, 7), ("causal", 33, 33), ("causal", 1, 1), ("edge", 33, 33), ("edge", 1, 1),
])  # fmt: skip
def test_a_block_equals_dense_attention(kind, rows, columns, heads, device, dtype, bound):
    torch.manual_seed(0)
    shapes = [(1, heads[0], rows, 16), (1, heads[1], columns, 16), (1, heads[1], columns, 16), (1, heads[0], rows, 16)]
    q, k, v, grad = (torch.randn(shape).to(dtype).double() for shape in shapes)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = dense(*whole, VISIBLE[kind](rows, columns))
    expected_grads = torch.autograd.grad(expected, whole, grad)
    local = [x.to(device, dtype) for x in (q, k, v)]
    out, lse = block_forward(*local, kind, SCALE)
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    assert error(out, expected) < bound
    assert error(lse, expected_lse) < bound
    grads = block_backward(grad.to(device, dtype), *local, out, lse, kind, SCALE)
    for found, reference in zip(grads, expected_grads, strict=True):
        assert found.shape == reference.shape
        if reference.abs().max() > 1e-9:  # one query and one key: no gradient but that of the value
            assert error(found, reference) < bound


@CUDA
def test_types_that_flash_attention_does_not_take_are_refused():
    x = torch.zeros(1, 1, 4, 16, device="cuda")
    with pytest.raises(ConfigError, match=r"bf16 or fp16, not torch\.float32"):
        block_forward(x, x, x, "full", 1.0)
