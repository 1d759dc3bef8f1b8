"""The device, its dtype and its speed, and one-line messages for its errors."""

import contextlib
import shutil
import timeit
from pathlib import Path

import torch
import torch.distributed as dist

from support.settings import Failure, UserError, first_line, user_errors

# NVIDIA's figures for dense bfloat16 FLOP/s with float32 accumulation, by whole words of the GPU's name. Longer names
# come first. A MIG slice is only a part of a GPU, so its speed is timed.
PEAK_FLOPS = {
    "MIG": None, "GB200": 2500e12, "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12,
    "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "A40": 150e12, "A30": 165e12, "A10": 125e12, "A10G": 70e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12,
}  # fmt: skip


def pick_device(name):
    """Return the device that --device names."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with user_errors(f"--device={name}"):
        device = torch.device(name)
        torch.empty(1, device=device)
    return device


def pick_dtype(name, device):
    """Return the dtype that --dtype names. "auto" is bfloat16 if the hardware multiplies in it, otherwise float32."""
    if name == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        is_fast = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        if device.type == "cuda":
            is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
        elif device.type == "mps":
            is_fast = torch.backends.mps.is_macos_or_newer(14, 0)
        name = "bfloat16" if is_fast else "float32"
    if name not in ("bfloat16", "float32"):
        raise UserError(f"--dtype={name}: choose auto, bfloat16 or float32 (float16 overflows in Gemma 3)")
    return getattr(torch, name)


def can_compile(device):
    """Return whether torch.compile works here; if not, print why."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        print("continuing without torch.compile: no C++ compiler here")
        return False
    if device.type == "cpu" and " " in torch.__file__:  # torch's command for the C++ compiler does not quote this path
        print(f"continuing without torch.compile: the path of torch has a space in it, {Path(torch.__file__).parent}")
        return False
    return device.type != "mps"  # torch.compile is a prototype there


def compile_for_training(model, activation_memory):
    """Compile a model's layers in place. activation_memory: fraction of activations kept; the rest is recomputed."""
    if activation_memory < 1 and any(isinstance(m, torch.nn.Dropout) and m.p for m in model.modules()):
        raise UserError("activation_memory below 1 needs dropout=0: the recomputation would draw other random numbers "
                        "and make wrong gradients")  # fmt: skip
    torch._functorch.config.activation_memory_budget = activation_memory
    # on CPUs, dropout is faster with the random numbers of eager PyTorch than with those of compiled code
    torch._inductor.config.fallback_random = model.device.type == "cpu"
    model.compile_layers()


def to_device(batch, device):
    """Return a batch on the device. From pinned memory, it is copied while the GPU computes the previous one."""
    return [(t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True) for t in batch]


def autocast(device, dtype):
    """Multiply matrices in `dtype`. Weights stay float32, because bfloat16 weights round small updates away."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def peak_flops(device, dtype):
    """Return the peak FLOP/s for MFU: NVIDIA's figure for a known GPU, or the speed of a timed matrix product."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        words = f" {torch.cuda.get_device_name(device).replace('-', ' ')} "
        if flops := next((flops for name, flops in PEAK_FLOPS.items() if f" {name} " in words), None):
            return flops
    n = 1024 if device.type == "cpu" else 4096
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=10)  # .item() waits for the device
    return 2 * n**3 / min(seconds)


@contextlib.contextmanager
def runtime_errors(memory_hint):
    """Report exhausted memory, or the end of another process, in one line. memory_hint: which settings to change."""
    try:
        yield
    except RuntimeError as e:
        reason = first_line(e)
        if any(sign in reason for sign in ("out of memory", "not enough memory", "can't allocate memory")):
            raise Failure(f"out of memory: {memory_hint} ({reason})") from None
        if dist.is_initialized() and ("gloo" in reason or "NCCL" in reason):
            raise Failure(f"another process has ended or hangs: {reason}") from None
        raise
