"""What this machine has, and what a run on it would use. Changes nothing and never fails: what is absent is said."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import av
import torch
import torch.distributed as dist
from av.codec import Codec
from av.codec.codec import UnknownCodecError

from longvila.errors import ConfigError
from longvila.parallel.kernel import flash_attention_4

ABSENT = "not installed"

PACKAGES = ("transformers", "open_clip_torch", "webdataset", "peft", "av")
OPTIONAL_PACKAGES = ("flash-attn-4", "deepspeed", "gguf")
DECODERS = ("h264", "hevc", "vp9", "av1")
ENCODER = "libx264"

Section = dict[str, str]


def examine() -> dict[str, Section]:
    """Sections of `name: what was found`, in the order they are read."""
    return {
        "machine": machine(),
        "torch": torch_build(),
        "packages": {name: installed(name) for name in (*PACKAGES, *OPTIONAL_PACKAGES)},
        "codecs": codecs(),
        "a run here would use": choices(),
    }


def machine() -> Section:
    """Python, cores, memory and free disk."""
    gib = 2**30
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / gib
    disk = shutil.disk_usage(Path.cwd()).free / gib
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "free disk here": f"{disk:.0f} GiB",
    }


def torch_build() -> Section:
    """The build of torch, the GPUs it sees, and the backends it can talk over."""
    backends = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "GPUs": ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus) or "none",
        "backends": ", ".join(name for name, available in backends.items() if available) or "none",
    }


def codecs() -> Section:
    """Decoders for the codecs that videos come in, and the encoder of the demo's videos."""
    found = {f"decode {name}": has_codec(name, "r") for name in DECODERS} | {
        f"encode {ENCODER}": has_codec(ENCODER, "w")
    }
    return {"ffmpeg": av.ffmpeg_version_info, **{name: "yes" if there else "no" for name, there in found.items()}}


def choices() -> Section:
    """What the machinery picks on this machine."""
    gpus = torch.cuda.device_count()
    return {
        "device": f"{gpus} x cuda" if gpus else "cpu",
        "backend": "nccl" if gpus else "gloo",
        "precision": "bf16 for scales 1.5b and 7b, fp32 for tiny and small",
        "attention": attention_kernels(),
        "engine": "FSDP2",
        "decoder": "PyAV",
        "ranks": f"torchrun --nproc-per-node {gpus}"
        if gpus
        else "torchrun --nproc-per-node N, N the number of processes",
    }


def attention_kernels() -> str:
    """What computes attention here."""
    try:
        if flash_attention_4():
            return "FlashAttention 4 for head dims 64 and 128, torch's FlashAttention 2 for others"
    except ConfigError as error:
        return str(error)
    return "torch's flash attention for " + ("CUDA" if torch.cuda.is_available() else "the CPU")


def installed(package: str) -> str:
    """The version of an installed distribution, or `ABSENT`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ABSENT


def has_codec(name: str, mode: Literal["r", "w"]) -> bool:
    """Whether PyAV can decode (`r`) or encode (`w`) the codec."""
    try:
        Codec(name, mode)
    except UnknownCodecError:
        return False
    return True
