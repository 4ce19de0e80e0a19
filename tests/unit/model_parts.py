"""Tiny models and tokenizers for tests, built in milliseconds, with random weights."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from longvila.config import ModelConfig

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}


def byte_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token per byte, plus end of text and the two ChatML marks."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_tokens(["<|im_start|>"], special_tokens=True)
    fast.chat_template = chat_template
    return fast


def qwen3(**changes) -> Qwen3ForCausalLM:
    sizes = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**{**sizes, **changes}))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    )


def model_config(folder: Path, language_model=None, projector: str = "downsample_mlp", **vision) -> ModelConfig:
    """Writes a tower configuration and a language model into `folder`, as `build_model` reads them."""
    tower = folder / "tower.json"
    tower.write_text(json.dumps({"embed_dim": 16, "vision_cfg": {**VISION, **vision}, "text_cfg": {}}))
    (language_model or qwen3()).save_pretrained(folder / "language_model")
    byte_tokenizer().save_pretrained(folder / "language_model")
    return ModelConfig(str(tower), None, str(folder / "language_model"), projector)


def random_frames(num_frames: int, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (num_frames, 3, size, size), generator=torch.Generator().manual_seed(1)).byte()
