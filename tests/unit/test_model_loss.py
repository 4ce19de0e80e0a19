"""The chunked cross-entropy equals the plain one, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from longvila.difference import relative_error
from longvila.errors import ConfigError
from longvila.model.loss import LogitHead, check_logit_head, chunked_cross_entropy

from .model_parts import qwen3

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_value_and_gradients_equal_the_full_logits(chunk):
    torch.manual_seed(0)
    labels = torch.randint(0, 50, (17,))
    labels[[0, 5, 16]] = -100
    results = []
    for chunked in (True, False):
        torch.manual_seed(1)
        head = torch.nn.Linear(8, 50).double()
        hidden = torch.randn(17, 8, dtype=torch.float64, requires_grad=True)
        if chunked:
            loss, num_targets = chunked_cross_entropy(hidden, labels, head, chunk)
            assert num_targets == 14
        else:
            loss = F.cross_entropy(head(hidden), labels, reduction="sum")
        (loss * 3).backward()
        results.append((loss.detach(), hidden.grad, head.weight.grad, head.bias.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


def test_logits_never_exist_for_more_than_a_chunk_and_are_computed_once():
    sizes = []
    labels = torch.tensor([1, -100, 2, 3, -100, 0, 1, 1])
    hidden, head = torch.randn(8, 4, requires_grad=True), torch.nn.Linear(4, 8)
    loss, _ = chunked_cross_entropy(hidden, labels, head, 4, lambda logits: (sizes.append(len(logits)), logits)[1])
    loss.backward()
    assert sizes == [4, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_follows_the_output_matrix_is_differentiated(dtype):
    labels, results = torch.randint(0, 8, (9,)), []
    for chunked in (True, False):
        torch.manual_seed(1)
        head, hidden = torch.nn.Linear(4, 8, bias=False).to(dtype), torch.randn(9, 4).to(dtype).requires_grad_()

        def cap(logits):
            return 2 * torch.tanh(logits / 2)

        if chunked:
            loss, _ = chunked_cross_entropy(hidden, labels, head, 4, cap)
        else:
            loss = F.cross_entropy(
                cap(head(hidden)).to(torch.promote_types(dtype, torch.float32)), labels, reduction="sum"
            )
        loss.backward()
        results.append((loss.detach(), hidden.grad, head.weight.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-2)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_does(frozen):
    head = torch.nn.Linear(4, 8).requires_grad_(frozen != "head")
    hidden = torch.randn(8, 4, requires_grad=frozen != "hidden")
    labels = torch.arange(8)
    loss, _ = chunked_cross_entropy(hidden, labels, head, 3)
    loss.backward()
    trained = head.weight if frozen == "hidden" else hidden
    (expected,) = torch.autograd.grad(F.cross_entropy(head(hidden), labels, reduction="sum"), trained)
    torch.testing.assert_close(trained.grad, expected)
    assert (head.weight if frozen == "head" else hidden).grad is None


@pytest.mark.parametrize(("vocabulary", "targets"), [(151_936, 110), (4096, 4096), (1_000_000, 32)])
def test_the_chunk_bounds_the_bytes_of_logits(vocabulary, targets):
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**{**SMALL, "vocab_size": vocabulary}))
    assert LogitHead(model).chunk == targets


def test_without_a_target_the_loss_is_zero_and_every_gradient_is_there():
    head = torch.nn.Linear(8, 50)
    hidden = torch.randn(5, 8, requires_grad=True)
    loss, num_targets = chunked_cross_entropy(hidden, torch.full((5,), -100), head, 4)
    loss.backward()
    assert (loss.item(), num_targets.item()) == (0, 0)
    assert hidden.grad.abs().sum() == 0
    assert head.weight.grad.abs().sum() == 0


def test_bf16_hidden_states_give_an_fp32_loss():
    head = torch.nn.Linear(8, 50).bfloat16()
    loss, _ = chunked_cross_entropy(torch.randn(5, 8).bfloat16(), torch.arange(5), head, 2)
    assert loss.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_adds_chunks_without_rounding_them():
    torch.manual_seed(0)
    hidden, weight = torch.randn(600, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    labels = torch.randint(0, 96, (600,))
    found = []
    for device, dtype, chunk in (
        ("cpu", torch.float64, 600),
        ("cuda", torch.bfloat16, 600),
        ("cuda", torch.bfloat16, 8),
    ):
        linear = torch.nn.Linear(64, 96, bias=False, device=device, dtype=dtype)
        linear.weight.data.copy_(weight)
        chunked_cross_entropy(hidden.to(device, dtype), labels.to(device), linear, chunk)[0].backward()
        assert linear.weight.grad is not None
        found.append(linear.weight.grad.cpu().double())
    exact, whole, chunks = found
    errors = [relative_error(one, exact) for one in (whole, chunks)]
    assert errors[1] < 1.1 * errors[0] < 0.02


@pytest.mark.parametrize(
    "model",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0)),
        lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)),
        lambda: CohereForCausalLM(CohereConfig(**SMALL, eos_token_id=1, logit_scale=0.25)),
        qwen3,
    ],
    ids=["gemma2", "granite", "cohere", "qwen3"],
)
def test_logits_that_a_model_caps_or_scales_are_its_own(model):
    torch.manual_seed(0)
    model = model().eval()
    check_logit_head(model)
    ids = torch.randint(0, 60, (1, 9))
    hidden = model.get_decoder()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(LogitHead(model)(hidden), model(input_ids=ids).logits)


def test_a_model_with_an_unknown_change_of_its_logits_is_refused_by_name():
    class Louder(type(qwen3())):
        def forward(self, **kwargs):
            output = super().forward(**kwargs)
            output.logits = output.logits * 1.5
            return output

    with pytest.raises(ConfigError, match="Louder computes its logits in a way"):
        check_logit_head(Louder(qwen3().config))
