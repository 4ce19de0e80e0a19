"""Block kernels against dense attention, forward and backward, on every device there is."""

import pytest
import torch

from longvila.difference import relative_error
from longvila.doctor import attention_kernels
from longvila.errors import ConfigError
from longvila.parallel import kernel
from longvila.parallel.kernel import block_backward, block_forward
from longvila.parallel.traffic import counting

SCALE = 0.1
DIM = 64
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPUS = [
    pytest.param("cuda", torch.bfloat16, 3e-2, id="flash2-bf16", marks=CUDA),
    pytest.param("cuda4", torch.bfloat16, 3e-2, id="flash4-bf16", marks=pytest.mark.skipif(
        not kernel.flash_attention_4(), reason="needs FlashAttention 4 and a GPU for it"
    )),
]  # fmt: skip
DEVICES = [
    pytest.param("cpu", torch.float64, 1e-13, id="cpu-fp64"),
    pytest.param("cpu", torch.float32, 1e-5, id="cpu-fp32"),
    pytest.param("cpu", torch.bfloat16, 3e-2, id="cpu-bf16"),
    *GPUS,
]
VISIBLE = {
    "full": lambda rows, columns: torch.ones(rows, columns, dtype=torch.bool),
    "causal": lambda rows, columns: torch.ones(rows, columns, dtype=torch.bool).tril(),
    "edge": lambda rows, columns: torch.ones(rows, columns, dtype=torch.bool).triu(),
}


@pytest.fixture
def device(request, monkeypatch):
    """Where tensors go; on a GPU, with the kernels that the parameter names."""
    if request.param == "cuda":  # FlashAttention 2
        monkeypatch.setattr(kernel, "flash_attention_4", lambda: None)
    return request.param.rstrip("4")


def dense(q, k, v, visible):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT * SCALE).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def error(found, expected):
    return relative_error(found.cpu().double(), expected)


@pytest.mark.parametrize(("device", "dtype", "bound"), DEVICES, indirect=["device"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize(("kind", "rows", "columns"), [
    ("full", 7, 19), ("full", 19, 7), ("causal", 33, 33), ("causal", 1, 1), ("edge", 33, 33), ("edge", 1, 1),
])  # fmt: skip
def test_a_block_equals_dense_attention(kind, rows, columns, heads, device, dtype, bound):
    torch.manual_seed(0)
    query, key = (1, heads[0], rows, DIM), (1, heads[1], columns, DIM)
    shapes = [query, key, key, query]
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


@pytest.mark.parametrize(("device", "dtype", "bound"), GPUS, indirect=["device"])
def test_squares_end_to_end_equal_each_by_itself(device, dtype, bound):
    torch.manual_seed(0)
    cuts = (0, 5, 6, 40, 103)
    shapes = [(1, heads, cuts[-1], DIM) for heads in (4, 2, 2, 4)]
    q, k, v, grad = (torch.randn(shape).to(dtype).double() for shape in shapes)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    document = torch.repeat_interleave(torch.arange(len(cuts) - 1), torch.tensor(cuts).diff())
    expected, expected_lse = dense(*whole, (document[:, None] == document).tril())
    expected_grads = torch.autograd.grad(expected, whole, grad)
    local = [x.to(device, dtype) for x in (q, k, v)]
    out, lse = block_forward(*local, "causal", SCALE, cuts)
    grads = block_backward(grad.to(device, dtype), *local, out, lse, "causal", SCALE, cuts)
    for found, reference in zip((out, lse, *grads), (expected, expected_lse, *expected_grads), strict=True):
        assert found.shape == reference.shape
        assert error(found, reference) < bound


def test_a_broken_flash_attention_4_is_said_and_the_doctor_goes_on(monkeypatch):
    kernel.flash_attention_4.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(kernel, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="FlashAttention 4 is installed and cannot be imported"):
        kernel.flash_attention_4()
    assert "cannot be imported" in attention_kernels()


@CUDA
def test_a_gpu_takes_all_squares_in_one_launch():
    q = torch.randn(1, 4, 12, DIM, device="cuda", dtype=torch.bfloat16)
    with counting() as counts:
        out, lse = block_forward(q, q, q, "causal", SCALE, (0, 5, 12))
        block_backward(out, q, q, q, out, lse, "causal", SCALE, (0, 5, 12))
    assert counts["kernel forward"] == counts["kernel backward"] == 1


@CUDA
def test_head_dims_that_flash_attention_does_not_take_are_refused():
    x = torch.zeros(1, 1, 4, 20, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="multiples of 8 up to 256, not 20"):
        block_forward(x, x, x, "full", 1.0)


@CUDA
def test_types_that_flash_attention_does_not_take_are_refused():
    x = torch.zeros(1, 1, 4, 16, device="cuda")
    with pytest.raises(ConfigError, match=r"bf16 or fp16, not torch\.float32"):
        block_forward(x, x, x, "full", 1.0)
