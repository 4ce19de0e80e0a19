"""Language models of transformers, unmodified, under a fold: loss and every gradient equal one process."""

import functools
import logging
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import FSDPModule

from longvila.apply import apply_folds, attention_of
from longvila.bench.exact import dense_mask
from longvila.config import ParallelConfig
from longvila.difference import relative_error
from longvila.errors import ConfigError
from longvila.parallel.agree import sum_over_world
from longvila.parallel.batch import shard_batch, shift_labels
from longvila.parallel.blocks import Mask
from longvila.parallel.choose import choose
from longvila.parallel.fold import make_fold, start_world
from longvila.parallel.launch import RankError, run_cases, run_ranks
from longvila.parallel.packed import whole
from longvila.parallel.replay import Shape
from longvila.parallel.traffic import counting

LENGTHS = (5, 1, 23, 2, 14)
SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "attention_dropout": 0.0,
}  # fmt: skip
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": False}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "qwen3": functools.partial(transformers.Qwen3Config, **SHAPE),
    "llama": functools.partial(transformers.LlamaConfig, **SHAPE),
    "mistral": functools.partial(transformers.MistralConfig, **SHAPE, sliding_window=6),
    "ministral3": functools.partial(
        transformers.Ministral3Config,
        **SHAPE,
        sliding_window=None,
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 4,
        },
    ),
    "gemma3": functools.partial(
        transformers.Gemma3TextConfig, **SHAPE, sliding_window=5, layer_types=LAYERS, query_pre_attn_scalar=8
    ),
    "qwen2_moe": functools.partial(transformers.Qwen2MoeConfig, **SHAPE, **MIXTURE, shared_expert_intermediate_size=24),
    "mixtral": functools.partial(
        transformers.MixtralConfig, **SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "qwen3_moe": functools.partial(transformers.Qwen3MoeConfig, **SHAPE, **MIXTURE),
}


def make(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).double().train()
    if hasattr(model.config, "num_experts_per_tok"):
        # Routers begin with zeros, by which every token has the same experts.
        for name_, parameter in model.named_parameters():
            if name_.endswith(("gate.weight", "router.weight")):
                torch.nn.init.normal_(parameter, std=0.5)
    model.set_experts_implementation("eager")  # the default, a grouped product, takes no fp64
    return model


def make_row():
    ids = torch.randint(1, 50, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return ids, shift_labels(ids, LENGTHS), positions


def reference(model):
    """Loss and gradients on one process, under dense masks that are built here."""
    ids, labels, positions = make_row()
    window = getattr(model.config, "sliding_window", None)
    full, sliding = (dense_mask(LENGTHS, Mask(window=w))[None, None] for w in (None, window))
    if model.config.model_type == "gemma3_text":
        mask = {"full_attention": full, "sliding_attention": sliding}
    else:
        mask = sliding if window else full
    model.set_attn_implementation("sdpa")  # eager attention takes its softmax in fp32
    logits = model(ids[None], position_ids=positions[None], attention_mask=mask, use_cache=False).logits[0]
    total = int((labels != -100).sum())
    loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / total
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@functools.cache
def expected_of(name):
    """Found once, before ranks are forked, which then have it; and in a rank of its own, since beside a GPU a process
    that ran autograd forks none that can run it."""
    return reference(make(name)) if dist.is_initialized() else run_ranks(reference, 1, make(name))[0]


fold_of = functools.cache(make_fold)  # the cases of one launch share their groups


def compare(model, expected, parallel, recompute="none", keeps=None, mixture=None):
    """max |difference| / max |reference| of the loss and each gradient; what one step counted on this rank; routers."""
    expected_loss, expected_gradients = expected
    fold = fold_of(parallel, "cpu")
    applied = apply_folds(model, fold, recompute=recompute, recompute_keeps=keeps, mixture=mixture)
    ids, labels, positions = make_row()
    batch = shard_batch(
        LENGTHS, fold, parallel.layout, parallel.routing, input_ids=ids, labels=labels, position_ids=positions
    )
    total = int((labels != -100).sum())
    with counting() as counter:
        # The model's own loss, in fp32, is of the same tokens; what is compared in fp64 is taken from the logits.
        out = model(**batch, shift_labels=batch["labels"], num_items_in_batch=total, use_cache=False)
        loss = F.cross_entropy(out.logits[0], batch["labels"][0], ignore_index=-100, reduction="sum") / total
        loss.backward()
    assert abs(out.loss.item() - loss.item()) < 1e-5
    found = {"loss": relative_error(sum_over_world(loss.item())[0], expected_loss)}
    for key, parameter in model.named_parameters():
        found[key] = relative_error(whole(parameter.grad), expected_gradients[key])
    return found, counter, applied.routers


def errors(name, *arguments):
    """Errors and counts of one of `MODELS`."""
    found, counter, _ = compare(make(name), expected_of(name), *arguments)
    return found, counter


def errors_of_all(names, parallel, *arguments):
    """By model, what `errors` finds on each rank."""
    for name in names:
        expected_of(name)
    cases = [(name, parallel, *arguments) for name in names]
    return dict(zip(names, run_cases(errors, parallel.sequence, cases), strict=True))


def worst(found):
    return max(found.items(), key=lambda item: item[1])


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(head=2),
        ParallelConfig(inner=2),
        ParallelConfig(inner=2, outer=2, routing="relay"),
        ParallelConfig(head=4),
        ParallelConfig(inner=4, layout="lightseq"),
    ],
    ids=str,
)
def test_loss_and_every_gradient_equal_one_process(parallel):
    for name, by_rank in errors_of_all(MODELS, parallel).items():
        for found, _ in by_rank:
            assert len(found) > 20
            if name == "gemma3":  # it takes its norms, and so the sums over tokens of their gradients, in fp32
                assert max(found.pop(key) for key in list(found) if "norm" in key) < 1e-6
            assert worst(found)[1] < 1e-11, (name, worst(found))


POLICIES = {
    ("none", None): 0, ("all", None): 1, ("save_attention", None): 0, ("offload_attention", None): 0,
    ("save_attention", (0, 2)): 1 / 3,
}  # fmt: skip
"""Recomputation, and the share of attention's forwards that it computes and sends again."""


# Of what is sent: half of tokens' heads in the forward, and of keys a third, since their gradients travel too.
@pytest.mark.parametrize(
    ("parallel", "kinds", "share"),
    [
        (ParallelConfig(inner=2), ["keys inner", "heads"], 1 / 3),
        (ParallelConfig(head=2), ["heads", "keys inner"], 1 / 2),
    ],
    ids=str,
)
def test_what_is_kept_is_not_computed_or_sent_again(parallel, kinds, share):
    expected_of("qwen3")
    by_case = run_cases(errors, 2, [("qwen3", parallel, *policy) for policy in POLICIES])
    sent, none = ([sum(counted[f"bytes {kind}"] for _, counted in by_rank) for by_rank in by_case] for kind in kinds)
    assert sent[0] > 0
    assert not any(none)
    for (policy, again), by_rank, size in zip(POLICIES.items(), by_case, sent, strict=True):
        assert size == pytest.approx((1 + again * share) * sent[0], rel=1e-12), policy
        for (found, counted), (_, plain) in zip(by_rank, by_case[0], strict=True):
            assert worst(found)[1] < 1e-11, (policy, worst(found))
            assert counted["kernel forward"] == (1 + again) * plain["kernel forward"], policy
            assert counted["kernel backward"] == plain["kernel backward"] > 0


def refuse(name, **changes):
    fold = make_fold(ParallelConfig(), "cpu")
    torch.manual_seed(0)
    config = MODELS[name]() if name in MODELS else name()
    for key, value in changes.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    apply_folds(model, fold, sharding=None)
    ids, _, positions = make_row()
    model(**shard_batch(LENGTHS, fold, input_ids=ids, position_ids=positions))


def gpt_oss():
    return transformers.GptOssConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1, layer_types=LAYERS)


def gemma2():
    return transformers.Gemma2Config(**SHAPE, layer_types=LAYERS)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen3", {"attention_dropout": 0.1}, "dropout 0.1; set attention_dropout=0"),
        (gpt_oss, {}, "s_aux"),
        (gemma2, {}, "softcap"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(name, changes, words):
    with pytest.raises(RankError, match=words):
        run_ranks(functools.partial(refuse, **changes), 1, name)


def differ(lengths_of_rank, tokens):
    fold = make_fold(ParallelConfig(inner=2), "cpu")
    shard_batch(lengths_of_rank[dist.get_rank()], fold, input_ids=torch.zeros(tokens, dtype=torch.long))


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        (((4, 4), (8,)), ["rank 0 has 8 tokens in 2 documents, rank 1 has 8 in 1", "rank 1 has 8 tokens in 1 docu"]),
        (((8,), (9,)), ["rank 1 of the sequence group refused", "9 tokens in all, but 8 input_ids"]),
        (((4, 0, 4), (8,)), ["document 1 of the row has 0 tokens", "rank 0 of the sequence group refused"]),
    ],
)
def test_ranks_that_disagree_all_hear_of_it(lengths, words):
    with pytest.raises(RankError) as caught:
        run_ranks(differ, 2, lengths, 8, timeout=20)
    for word in words:
        assert word in str(caught.value)


def read_other_tokens():
    fold = make_fold(ParallelConfig(inner=2), "cpu")
    shard_batch((8,), fold, input_ids=torch.full((8,), dist.get_rank()))


def test_ranks_that_read_other_tokens_of_the_same_lengths_are_refused():
    with pytest.raises(RankError, match="ranks of one sequence group hold different rows"):
        run_ranks(read_other_tokens, 2)


def test_unknown_policies_are_refused():
    from longvila.parallel.recompute import checkpoint_arguments

    with pytest.raises(ConfigError, match="no recompute policy 'some'"):
        checkpoint_arguments("some")
    with pytest.raises(ConfigError, match=r"keeps no layer's attention, but \[1\]"):
        checkpoint_arguments("all", (1,))


@pytest.mark.parametrize(("policy", "keeps"), [("none", (1,)), ("save_attention", (0, 3))])
def test_layers_to_keep_that_say_nothing_are_refused(policy, keeps):
    with pytest.raises(RankError, match=rf"recompute_keeps=.* with recompute={policy}; .* the model's 3 layers"):
        run_ranks(errors, 1, "qwen3", ParallelConfig(), policy, keeps)


def compiled_errors(parallel):
    """Differences between compiled and plain layers, and graphs made so far: rows of one length, other documents."""
    fold = make_fold(parallel, "cpu")
    model = make("qwen3")
    apply_folds(model, fold, sharding=None)
    counter = CompileCounterWithBackend("aot_eager")
    plain = list(model.model.layers)
    compiled = [torch.compile(layer, backend=counter, fullgraph=True) for layer in plain]
    found = []
    for lengths in ((5, 1, 22, 16), (30, 14), (44,), (20, 24), (11, 33), (7, 37)):
        ids = torch.arange(44)
        positions = torch.cat([torch.arange(length) for length in lengths])
        batch = shard_batch(lengths, fold, input_ids=ids, position_ids=positions)
        results = []
        for layers in (plain, compiled):
            model.model.layers = torch.nn.ModuleList(layers)
            model.zero_grad()
            logits = model(**batch, use_cache=False).logits
            logits.square().sum().backward()
            results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
        difference = max(relative_error(a, b, scale=1) for a, b in zip(*results, strict=True))
        found.append((difference, counter.frame_count))
    return found


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the tracer looks at every attribute
@pytest.mark.parametrize("parallel", [ParallelConfig(inner=2), ParallelConfig(head=2)], ids=str)
def test_compiled_layers_are_one_graph_and_new_rows_do_not_compile_again(parallel):
    found = run_ranks(compiled_errors, 2, parallel)[0]
    assert max(difference for difference, _ in found) < 1e-12
    assert found[-1][1] == found[-2][1]


def readme(folder, code):
    ids, _, positions = torch.arange(1, 1001) % 50, None, torch.cat([torch.arange(700), torch.arange(300)])
    names = {
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM, "ParallelConfig": ParallelConfig, "name": folder,
        "input_ids": ids, "position_ids": positions, "apply_folds": apply_folds, "make_fold": make_fold,
        "shard_batch": shard_batch, "shift_labels": shift_labels, "start_world": start_world,
    }  # fmt: skip
    exec(code, names)
    gradient = names["model"].model.layers[0].self_attn.q_proj.weight.grad.full_tensor()
    return gradient.abs().max().item()


def test_the_readmes_ten_lines_run(tmp_path):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 10
    transformers.AutoModelForCausalLM.from_config(MODELS["qwen3"]()).save_pretrained(tmp_path)
    first, second = run_ranks(readme, 2, tmp_path, code)
    assert first == second > 0


def choose_by_itself():
    fold = make_fold(ParallelConfig(inner=2), "cpu")
    model = make("gemma3")
    attention = attention_of(model.config)
    with caplog_of("longvila.parallel.batch") as messages:
        batch = shard_batch(LENGTHS, fold, "auto", attention=attention, input_ids=torch.arange(sum(LENGTHS)))
    return attention.masks, batch["plan"].plan.identity, messages


@contextmanager
def caplog_of(name):
    """What a logger says; pytest's own fixture does not follow into ranks."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages


def test_auto_picks_the_same_on_every_rank_and_says_why():
    (masks, plan, told), (_, other, silent) = run_ranks(choose_by_itself, 2)
    assert masks == (Mask(window=5), Mask(), Mask(window=5))
    assert plan == other
    assert len(told) == 1
    assert "x ideal" in told[0]
    assert not silent


def test_auto_counts_the_remainder_of_heads():
    choice = choose((4096,), 1, 1, 8, Shape(28, 4, 128))
    assert "28 heads on 8 ranks cost 1.14x" in choice.reason


def embedding_is_a_unit(tied):
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE, tie_word_embeddings=tied))
    apply_folds(model, make_fold(ParallelConfig(), "cpu"))
    return isinstance(model.get_input_embeddings(), FSDPModule)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_gathered_by_themselves_unless_the_output_matrix_is_the_same(tied):
    assert run_ranks(embedding_is_a_unit, 1, tied) == [not tied]
