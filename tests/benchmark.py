"""
Measure the speed and memory of a job, and print each result as a JSON line. pytest does not collect this file, because
it asserts nothing.

    python tests/benchmark.py --job=train --shape=270m --batch_size=4 --block_size=512
    python tests/benchmark.py --job=lora --shape=270m --batch_size=4 --block_size=256 --rank=4
    python tests/benchmark.py --job=generate --shape=270m --batch_size=1 --new_tokens=64
    python tests/benchmark.py --job=prepare                                   # GPT-2's vocabulary on 50 MB of fables
    python tests/benchmark.py --job=train --shape=small --batch_size=32 --block_size=256 --peer=hf_peer.py --rounds=3

--peer names a script that takes the same job and settings and prints the same kind of line. The two run in turn, each
in its own process, and a last line has the medians and their ratio. --profile=True prints the slowest operations.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train
from lora import add_lora, cast_base_weights
from model import Gemma, GemmaConfig, blocked_attention
from support.devices import compile_for_training, peak_flops, pick_device, pick_dtype
from support.settings import UserError, run

SHAPES = {  # vocab_size, hidden_size, layers, heads, key/value heads, head_dim, intermediate_size
    "270m": (50304, 640, 18, 4, 1, 256, 2048),
    "small": (4096, 256, 6, 4, 1, 64, 1024),
    "fables": (2048, 192, 4, 3, 3, 64, 512),
}


@dataclass
class BenchmarkConfig:
    job: str = "train"  # train, lora, generate, prepare, attention
    shape: str = "small"  # 270m, small, fables
    batch_size: int = 4  # rows in a step, or sequences generated at once
    block_size: int = 512  # tokens in a row
    gradient_accumulation_steps: int = 1  # micro-batches in a step
    optimizer: str = "adamw"  # adamw or muon
    rank: int = 4  # rank of LoRA
    new_tokens: int = 64  # tokens to generate for each sequence
    steps: int = 6  # timed repetitions
    compile: bool = True  # torch.compile the model
    activation_memory: float = 1.0  # as in train.py
    dtype: str = "bfloat16"  # bfloat16, float32
    device: str = "auto"  # auto, cpu, cuda
    profile: bool = False  # print the ten operations that take longest
    peer: str = ""  # a script to run in turn with this one
    rounds: int = 3  # runs of each of the two scripts


def build(cfg, device):
    vocab, hidden, layers, heads, kv_heads, head_dim, intermediate = SHAPES[cfg.shape]
    config = GemmaConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, intermediate_size=intermediate,
        max_position_embeddings=4096, sliding_window=512,
    )  # fmt: skip
    with torch.device(device):
        return Gemma(config).init_weights(0)


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(device, step, count):
    """Return the seconds of each of `count` calls."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        step()
        wait_for(device)
        times.append(time.perf_counter() - started)
    return times


def training(cfg, device, dtype):
    """Return (step, tokens per step, model). step() takes one step as train.py does, on random tokens."""
    model = build(cfg, device)
    if cfg.job == "lora":
        cast_base_weights(add_lora(model, cfg.rank, 2.0 * cfg.rank), dtype)
    train_cfg = train.TrainConfig(optimizer=cfg.optimizer, learning_rate=1e-4)
    optimizers = train.make_optimizers(model, train_cfg)
    if cfg.compile:
        compile_for_training(model, cfg.activation_memory)
    rows = torch.randint(1, model.config.vocab_size, (cfg.batch_size, cfg.block_size + 1))
    micro_batches = [(part[:, :-1], part[:, 1:]) for part in rows.chunk(cfg.gradient_accumulation_steps)]
    model.train()

    def step():
        loss = train.accumulate_gradients(model, micro_batches, device, dtype)
        train.optimizer_step(optimizers, loss, train_cfg.grad_clip)

    return step, cfg.batch_size * cfg.block_size, model


def generation(cfg, device, dtype):
    model = build(cfg, device).to(dtype).eval()
    if cfg.compile:
        model.compile_step()
    prompt = torch.randint(1, model.config.vocab_size, (cfg.batch_size, 16), device=device)

    def step():
        for _ in model.generate(prompt, cfg.new_tokens, top_k=50):
            pass

    return step, cfg.batch_size * cfg.new_tokens, model


def bandwidth(device, dtype):
    """Return the bytes per second at which matrix-vector products read a matrix too large for any cache."""
    matrix = torch.randn(2**14, 2**13, device=device).to(dtype)
    vector = torch.randn(1, 2**13, device=device).to(dtype)
    times = timed(device, lambda: torch.nn.functional.linear(vector, matrix), 40)
    return matrix.numel() * matrix.element_size() / min(times)


def measure(cfg):
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    step, tokens, model = (generation if cfg.job == "generate" else training)(cfg, device, dtype)
    warmup = 2 if cfg.job != "generate" else 1
    times = timed(device, step, warmup + cfg.steps)
    rate = tokens / statistics.median(times[warmup:])
    result = {
        "job": cfg.job, "shape": cfg.shape, "device": str(device), "dtype": cfg.dtype, "compile": cfg.compile,
        "batch_size": cfg.batch_size, "block_size": cfg.block_size, "tokens_per_sec": round(rate, 1),
        "first_step_sec": round(times[0], 1), "peak_memory_mb": round(peak_memory_mb(device)),
    }  # fmt: skip
    if cfg.job == "generate":
        # a step reads every matrix once, for any batch size
        result["share_of_bandwidth"] = round(
            rate / cfg.batch_size * model.num_params() * dtype.itemsize / bandwidth(device, dtype), 2
        )
    else:
        result["optimizer"] = cfg.optimizer
    if cfg.job == "train":
        result["mfu"] = round(rate * model.flops_per_token(cfg.block_size) / peak_flops(device, dtype), 3)
    print(json.dumps(result), flush=True)
    if cfg.profile:
        with torch.profiler.profile(profile_memory=False) as profile:
            step()
            wait_for(device)
        print(profile.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=10))


def measure_attention(cfg):
    """Time forward and backward of one layer's attention on the CPU: our blocks and PyTorch's kernel, both compiled."""
    _, _, _, heads, kv_heads, head_dim, _ = SHAPES[cfg.shape]
    dtype = pick_dtype(cfg.dtype, torch.device("cpu"))

    def random(h):  # in the memory layout of the projections' outputs
        return torch.randn(cfg.batch_size, cfg.block_size, h, head_dim, dtype=dtype).transpose(1, 2).requires_grad_()

    q, k, v = random(heads), random(kv_heads), random(kv_heads)
    scale = head_dim**-0.5

    def blocks(q, k, v):
        return blocked_attention(q, k, v, cfg.block_size, scale, 0.0)

    def kernel(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    result = {"job": "attention", "shape": cfg.shape, "batch_size": cfg.batch_size, "block_size": cfg.block_size}
    for name, function in (("blocks", blocks), ("kernel", kernel)):
        forward, count = torch.compile(function), 3 + 3 * cfg.steps
        times = timed(torch.device("cpu"), lambda f=forward: f(q, k, v).backward(q.detach()), count)
        result[f"{name}_ms"] = round(1000 * statistics.median(times[3:]), 2)
    print(json.dumps(result))


def measure_prepare():
    """Time prepare.py on a text file with GPT-2's vocabulary, in its own process."""
    import tempfile

    home = Path(__file__).parent.parent
    sys.path.insert(0, str(home))
    from data import fable_grammar

    with tempfile.TemporaryDirectory(dir=home / "data") as folder:  # the dataset takes its name and replaces it
        file = Path(folder).parent / f"{Path(folder).name}.txt"
        fables = [fable_grammar.tell(f"benchmark/{i}")[0] for i in range(2000)]
        with open(file, "w") as f:
            for i in range(40):
                f.writelines(f"{fable[i:]}\n<|endoftext|>\n" for fable in fables)
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "prepare.py", f"--dataset={file}", "--tokenizer=gpt2"],
            cwd=home, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        megabytes = file.stat().st_size / 1e6
        file.unlink()
    print(json.dumps({"job": "prepare", "megabytes": round(megabytes), "mb_per_sec": round(megabytes / seconds, 1),
                      "peak_memory_mb": round(peak)}))  # fmt: skip


def compare(cfg, args):
    """Run this script and the peer in turn. Print the medians and their ratio."""
    shared = ["job", "shape", "batch_size", "block_size", "new_tokens", "rank", "steps"]
    theirs = [sys.executable, cfg.peer, cfg.job] + [f"--{k}={getattr(cfg, k)}" for k in shared[1:]]
    ours = [sys.executable, __file__, *(a for a in args if not a.startswith(("--peer", "--rounds")))]
    results = {"ours": [], "theirs": []}
    for _ in range(cfg.rounds):
        for name, command in (("ours", ours), ("theirs", theirs)):
            made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[name].append(json.loads(made.splitlines()[-1]))
            print(made.splitlines()[-1], flush=True)
    summary = {
        f"{key}_{name}": statistics.median(r[key] for r in runs)
        for key in ("tokens_per_sec", "peak_memory_mb")
        for name, runs in results.items()
    }
    summary["times_faster"] = round(summary["tokens_per_sec_ours"] / summary["tokens_per_sec_theirs"], 2)
    summary["times_the_memory"] = round(summary["peak_memory_mb_ours"] / summary["peak_memory_mb_theirs"], 2)
    print(json.dumps(summary))


def main(cfg):
    jobs = {"prepare": lambda cfg: measure_prepare(), "attention": measure_attention}
    if cfg.job not in ("train", "lora", "generate", *jobs) or cfg.shape not in SHAPES:
        raise UserError(f"--job is train, lora, generate, {', '.join(jobs)}; --shape is {', '.join(SHAPES)}")
    if cfg.peer:
        compare(cfg, sys.argv[1:])
    else:
        jobs.get(cfg.job, measure)(cfg)


if __name__ == "__main__":
    run(main, BenchmarkConfig)
