"""
Check, measure and train on a GPU, and report the results. It needs torch 2.11 to 2.13 and no network.

    python tests/gpu.py                                # runs for 9.5 minutes; run it again to continue
    python tests/gpu.py --only=attention,recipe        # these parts, and their failed items again
    python tests/gpu.py --device=cpu --quick=True      # every part at toy size
    python tests/gpu.py --report=out/gpu/report.jsonl  # print its tables as Markdown, and draw loss.png beside it

A part has a few items. Each item runs in its own process with a time limit, and writes its lines to report.jsonl. Its
last line says ok, failed or skipped. An item that was cut off starts again; training resumes from its checkpoint.
"""

import contextlib
import functools
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import benchmark
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from data import fable_grammar
from model import Gemma, GemmaConfig, blocked_attention, complete, flash_attention
from support.datasets import DATA
from support.devices import autocast, peak_flops, pick_device
from support.log import read_log
from support.runs import open_model
from support.settings import UserError, first_line, run
from support.tokenizer import Tokenizer

HOME = Path(__file__).parent.parent


@dataclass
class GpuConfig:
    device: str = "auto"  # auto, cpu, cuda
    quick: bool = False  # toy sizes
    minutes: float = 9.5  # time limit of this call; on a borrowed machine a command may take ten
    out: str = "out/gpu"  # report.jsonl, logs, datasets and runs
    only: str = ""  # run only these parts, such as attention,recipe, and their failed items again
    peer: str = "shared/bench/hf_peer.py"  # a script that takes benchmark.py's jobs, to compare with; may be absent
    train_minutes: float = 8.0  # for training the 270M shape on fables
    tune_minutes: float = 3.0  # for tuning this model with LoRA
    report: str = ""  # print the tables of this report.jsonl, and stop
    item: str = ""  # run this one item, in this process


class Item(NamedTuple):
    name: str  # "part: item"
    function: object  # function(cfg, *args) yields the lines of the report
    args: tuple = ()
    limit_sec: int = 200
    resumable: bool = False  # continues where it was cut off


class Skipped(Exception):
    """An item that cannot run here. The text says why."""


# ---- the items, the most important first -----------------------------------------------------------------------------


def plan(cfg):
    shapes = [(64, 24)] if cfg.quick else [(1024, 512), (1024, 128), (2048, 512), (2048, 128), (512, 512)]
    batches, modes = ([2] if cfg.quick else [32, 64, 16, 8]), ["not compiled"]
    modes += [] if cfg.quick else ["activation memory 0.7", "activation memory 0.4", "compiled whole"]
    decoded = [(b, compiled) for b in ([1] if cfg.quick else [1, 16, 64]) for compiled in (True, False)]
    train_sec, tune_sec = (int(60 * minutes + 300) for minutes in (cfg.train_minutes, cfg.tune_minutes))
    return [
        Item("parity: machine", machine),
        Item("parity: logits and gradients", parity, (), 400),
        Item("parity: 20 steps", first_steps, (), 400),
        *(Item(f"attention: T {T}, window {window}", attention, (T, window)) for T, window in shapes),
        *(Item(f"recipe: batch {b}", recipe, (b,)) for b in batches),
        *(Item(f"recipe: batch {batches[0]}, {mode}", recipe, (batches[0], mode)) for mode in modes),
        *(Item(f"recipe: peer, batch {b}", peer, ("train", b)) for b in batches),
        Item("recipe: in turn with the peer", in_turn, (), 500),
        *(Item(f"decoding: batch {b}, {'compiled' if c else 'not compiled'}", decoding, (b, c)) for b, c in decoded),
        *(Item(f"decoding: peer, batch {b}", peer, ("generate", b)) for b, compiled in decoded if compiled),
        Item("fables: prepare", prepare_fables, (), 500, True),
        Item("fables: train", train_fables, (), train_sec, True),
        Item("fables: samples", sample_fables),
        Item("fables: LoRA", tune_fables, (), tune_sec, True),
        Item("torchrun: DDP", torchrun, ("ddp",)),
        Item("torchrun: FSDP", torchrun, ("fsdp",)),
    ]


def machine(cfg):
    """Name the machine, and measure how fast it multiplies matrices and reads memory."""
    device, n = pick_device(cfg.device), 512 if cfg.quick else 8192
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    line = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "cores": os.cpu_count()}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(n, n, device=device, dtype=dtype)
        seconds = min(benchmark.timed(device, functools.partial(torch.mm, a, a), 10)[2:])
        line |= {f"{dtype} TFLOP/s": 2 * n**3 / seconds / 1e12, f"{dtype} peak": peak_flops(device, dtype) / 1e12}
    yield line | ({} if cfg.quick else {"reads GB/s": benchmark.bandwidth(device, torch.bfloat16) / 1e9})


def parity(cfg):
    """Compare logits and gradients with the CPU's in float64, in which only norms, RoPE and softmax are float32. The
    model has both kinds of layers. Rows are longer than the window, and have one document or several."""
    small = dict(hidden_size=64, intermediate_size=128, head_dim=16, vocab_size=256) if cfg.quick else {}
    T, device = 64 if cfg.quick else 512, pick_device(cfg.device)
    shape = {"vocab_size": 4096, "num_hidden_layers": 4, "sliding_window_pattern": 2, "sliding_window": T // 4} | small
    tokens = torch.randint(1, shape["vocab_size"], (2, T + 1), generator=torch.Generator().manual_seed(0))
    doc_ids = (torch.arange(T) >= T // 3).long().expand(2, T)
    start = Gemma(GemmaConfig(**shape)).init_weights(0)
    cases = [("float32", "highest", 1e-4), ("float32", "high", 1e-2), ("bfloat16", "high", 0.1)]
    for packed in (False, True):
        batch = [tokens[:, :-1], tokens[:, 1:], doc_ids if packed else None]
        expected = loss_logits_gradients(start, batch, torch.device("cpu"), torch.float64, False)
        for dtype, products, limit in cases:
            for compiled in (False,) if cfg.quick and (packed or products == "highest") else (False, True):
                line = {"dtype": dtype, "products": products, "compiled": compiled, "packed": packed}
                torch.set_float32_matmul_precision(products)
                try:
                    found = loss_logits_gradients(start, batch, device, getattr(torch, dtype), compiled)
                    errors = list(map(relative_error, found, expected))
                    line |= zip(("loss error", "logits error", "gradients error"), errors, strict=True)
                    yield line | {"limit": limit, "ok": max(errors) < limit}
                except RuntimeError as e:  # the other cases still run
                    yield line | {"reason": first_line(e), "ok": False}


def loss_logits_gradients(start, batch, device, dtype, compiled):
    torch._dynamo.reset()
    model = Gemma(start.config).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    model.load_state_dict(start.state_dict())
    if compiled:
        model.compile_layers()
    x, y, doc_ids = (t if t is None else t.to(device) for t in batch)
    with autocast(device, torch.bfloat16) if dtype == torch.bfloat16 else contextlib.nullcontext():
        loss, logits = model(x, y, doc_ids), model(x, None, doc_ids)
    loss.backward()
    return loss, logits, torch.cat([p.grad.flatten() for p in model.parameters()])


def relative_error(a, b):
    a, b = (t.detach().double().cpu() for t in (a, b))
    return float((a - b).norm() / b.norm())


def first_steps(cfg):
    """Compare the losses of train.py's first steps with the CPU's in float32, from the same weights."""
    flags, count, out = small_run(cfg), 3 if cfg.quick else 20, Path(cfg.out).resolve()
    run_ours(cfg, "train", *flags, "--device=cpu", "--dtype=float32", "--compile=False", "--max_iters=0", name="start")
    flags += [f"--max_iters={count}", f"--init_from={out}/start/last", "--learning_rate=5e-3"]
    expected, device = None, pick_device(cfg.device)
    here = [(device.type, dtype, c) for dtype in ("bfloat16", "float32") for c in (False, True)]
    for where, dtype, compiled in [("cpu", "float32", False), *here[: 1 if cfg.quick else 4]]:
        name = f"steps-{where}-{dtype}-{compiled}"
        run_ours(cfg, "train", *flags, f"--device={where}", f"--dtype={dtype}", f"--compile={compiled}", name=name)
        losses = [loss for _, loss in steps_of(out / name, "train_loss")]
        expected = expected or losses
        worst = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
        yield {"device": where, "dtype": dtype, "compiled": compiled, "last loss": losses[-1],
               "worst difference": worst, "ok": worst < 0.05}  # fmt: skip


def attention(cfg, T, window):
    """Measure one layer's compiled attention at the 270M shape: the times of forward, and of forward with backward, and
    the relative error against blocks in float32. Causal attention has no window, so it shows the cost without one."""
    device, (B, H, K, D) = pick_device(cfg.device), (1, 2, 1, 16) if cfg.quick else (16, 4, 1, 256)
    torch.manual_seed(0)
    *qkv, grad = (torch.randn(B, T, h, D, device=device).transpose(1, 2).bfloat16() for h in (H, K, K, H))
    scale, times, count = D**-0.5, {}, 3 if cfg.quick else 30
    blocks = functools.partial(blocked_attention, window=window, scale=scale, dropout=0.0)
    expected = with_gradients(blocks, [t.float() for t in qkv], grad.float())
    causal = torch.nn.functional.scaled_dot_product_attention
    kernels = {"blocks": blocks, "causal": functools.partial(causal, is_causal=True, scale=scale, enable_gqa=True)}
    if device.type == "cuda":
        mask = create_block_mask(lambda b, h, q, k: (k <= q) & (q - k < window), None, None, T, T, device=device)
        kernels["flex"] = functools.partial(flex_attention, block_mask=mask, scale=scale, enable_gqa=True)
        kernels["flash"] = functools.partial(flash_attention, window=window, scale=scale, dropout=0.0, doc_ids=None)
    else:
        yield {"T": T, "window": window, "kernel": "flex, flash", "reason": "skipped: they need CUDA"}
    for name, function in kernels.items():
        line = {"T": T, "window": window, "kernel": name}
        try:
            forward = torch.compile(function, dynamic=False)
            error = max(map(relative_error, with_gradients(forward, qkv, grad), expected))
            both = functools.partial(with_gradients, forward, qkv, grad)
            ms = [
                1000 * statistics.median(benchmark.timed(device, f, count)[count // 3 :])
                for f in (functools.partial(forward, *qkv), both)
            ]
            has_window = name != "causal" or window >= T
            yield line | {"forward ms": ms[0], "both ms": ms[1], "error": error, "ok": error < 0.03 or not has_window}
            times |= {name: ms[1]} if has_window and error < 0.03 else {}
        except Exception as e:  # the other kernels are still timed
            yield line | {"reason": first_line(e), "ok": False}
    yield {"T": T, "window": window, "fastest": min(times, key=times.get, default="none")}


def with_gradients(function, inputs, grad):
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    return y, *torch.autograd.grad(y, inputs, grad)


# {mode: activation_memory of train.py}
BY_LAYERS = {"compiled by layers": 1.0, "activation memory 0.7": 0.7, "activation memory 0.4": 0.4}


def recipe(cfg, batch, mode="compiled by layers"):
    """Measure steps of the 270M recipe: speed, MFU, memory, and the times of host and device in one step."""
    device, dtype, rows = pick_device(cfg.device), torch.bfloat16, 4 if cfg.quick else 256
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    settings = sizes(cfg, job="train", batch_size=rows, block_size=1024, optimizer="muon")
    settings = replace(settings, gradient_accumulation_steps=rows // batch, compile=mode in BY_LAYERS,
                       activation_memory=BY_LAYERS.get(mode, 1.0))  # fmt: skip
    step, tokens, model = benchmark.training(settings, device, dtype)
    if mode == "compiled whole":
        model.compile(dynamic=False)
    count = 2 if cfg.quick else 30 if (batch, mode) == (32, "compiled by layers") else 8
    seconds = benchmark.timed(device, step, 2 + count)
    rate = tokens / statistics.median(seconds[2:])
    flops = rate * model.flops_per_token(settings.block_size)
    with torch.profiler.profile() as profile:
        benchmark.timed(device, step, 1)
    events, waits = profile.key_averages(), ("Synchronize", "cudaMemcpy", "item", "_local_scalar_dense")
    print(events.table(sort_by="self_device_time_total", row_limit=25))  # for the log
    host = sum(e.self_cpu_time_total for e in events if not any(wait in e.key for wait in waits))
    kernels = sum(e.self_device_time_total for e in events if str(e.device_type).endswith("CUDA"))
    yield {"batch": batch, "mode": mode, "tokens/s": rate, "TFLOP/s": flops / 1e12,
           "MFU": flops / peak_flops(device, dtype), "GB": benchmark.peak_memory_mb(device) * 2**20 / 1e9,
           "first step s": seconds[0], "step ms": 1000 * statistics.median(seconds[2:]),
           "host ms": host / 1000, "kernels ms": kernels / 1000}  # fmt: skip


def peer(cfg, job, batch):
    """Measure the peer on a job of benchmark.py. The peer has no micro-batches."""
    if not (HOME / cfg.peer).exists():
        raise Skipped(f"no {cfg.peer}")
    s = sizes(cfg, block_size=1024, new_tokens=256, steps=8)
    flags = [f"--{key}={getattr(s, key)}" for key in ("block_size", "new_tokens", "steps")]
    flags += [f"--shape={'small' if cfg.quick else '270m'}", f"--compile={int(not cfg.quick)}", f"--batch_size={batch}"]
    yield from run_json(cfg.peer, job, *flags, f"--device={pick_device(cfg.device).type}")


def in_turn(cfg):
    """Run our script and the peer in turn, twice, at the peer's best batch size and with its optimizer."""
    rates = {e["batch_size"]: e["tokens_per_sec"] for e in read(cfg) if e.get("peer") and e["job"] == "train"}
    if cfg.quick or not rates:
        raise Skipped("only on GPUs" if cfg.quick else "there is no result of the peer")
    flags = [f"--peer={cfg.peer}", "--rounds=2", "--shape=270m", "--block_size=1024", "--steps=8"]
    yield from run_json("tests/benchmark.py", *flags, f"--batch_size={max(rates, key=rates.get)}")


def decoding(cfg, batch, compiled):
    """Measure generation with benchmark.py. On a GPU every compiled step must be a CUDA graph."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        benchmark.measure(sizes(cfg, job="generate", batch_size=batch, new_tokens=256, compile=compiled))
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    yield json.loads(printed.getvalue()) | {"CUDA graphs skipped": skips, "ok": skips == 0}


def prepare_fables(cfg):
    started = time.time()
    meta = make_fables(cfg)
    yield {"seconds": time.time() - started, "tokens": meta["train"]["tokens"]}


def make_fables(cfg):
    return make_dataset(cfg, *(("gpu-toy", 60) if cfg.quick else ("gpu-fables", 200_000)))


def steps_in(cfg, minutes, script, *flags, name):
    """Return how many steps of a run fit into `minutes`, by the speed of a short run with the same flags."""
    log, count = Path(cfg.out) / f"{name}-speed", 4 if cfg.quick else 30
    if len(steps_of(log, "tokens")) < count:  # a resumed item computes the same number again
        run_ours(cfg, script, *flags, f"--max_iters={count}", "--log_interval=1", name=log.name)
    tokens = steps_of(log, "tokens")[-1][1] / count
    rates = [rate for _, rate in steps_of(log, "tokens_per_sec")]
    return max(1, int(60 * minutes * statistics.median(rates[count // 3 :]) / tokens))


def train_fables(cfg):
    """Train the 270M shape at T 512 for cfg.train_minutes."""
    out, minutes = Path(cfg.out) / "fables", 0.02 if cfg.quick else cfg.train_minutes
    flags = [*TINY, "--dataset=gpu-toy", "--batch_size=4"] if cfg.quick else [
        "--dataset=gpu-fables", "--block_size=512", "--batch_size=32", "--learning_rate=2e-3",
        "--eval_interval=1000"]  # fmt: skip
    flags += ["--warmup_iters=0.02", f"--device={cfg.device}"]
    count = steps_in(cfg, minutes, "train", *flags, "--eval_tokens=2000", name="fables")
    resumed = ["--init_from=resume"] if (out / "last").exists() else []
    run_ours(cfg, "train", *flags, f"--max_iters={count}", *resumed, name="fables")
    evals = [e for e in read_log(out / "log.jsonl") if e["event"] == "eval"]
    floor, last = make_fables(cfg)["floor_bits_per_byte"], evals[-1]
    yield {"curve": steps_of(out, "train_loss"), "evals": [[e["step"], e["val_bpb"]] for e in evals],
           "floor": floor}  # fmt: skip
    rates = [rate for _, rate in steps_of(out, "tokens_per_sec")]
    yield {"steps": last["step"], "tokens": last["tokens"], "minutes": last["seconds"] / 60,
           "tokens/s": statistics.median(rates), "bits per byte": last["val_bpb"],
           "times the floor": last["val_bpb"] / floor}  # fmt: skip


def sample_fables(cfg):
    """Count how many of 100 sampled fables the grammar could have told, and how many have two names."""
    best, names = Path(cfg.out) / "fables" / "best", set(fable_grammar.POOLS["name"])
    model, tokenizer = open_model(best, pick_device(cfg.device)).eval(), Tokenizer.load(best)
    prompts, length = [[tokenizer.bos]] * (4 if cfg.quick else 100), 20 if cfg.quick else 400
    texts = complete(model, tokenizer, prompts, length, temperature=0.8, seed=1, stop_ids=[tokenizer.eot])
    yield {"samples": len(texts), "the grammar's": sum(bool(fable_grammar.derivations(text)) for text in texts),
           "two names": sum(len(names & fable_grammar.words_of(text)) == 2 for text in texts)}  # fmt: skip


def tune_fables(cfg):
    """Tune with LoRA for cfg.tune_minutes, and report how many instructions the model follows."""
    out, minutes = Path(cfg.out).resolve(), 0.02 if cfg.quick else cfg.tune_minutes
    best = out / "fables" / "best"
    if not best.exists():
        raise Skipped("there is no trained model")
    flags = ["--max_records=50", "--num_checked=6", "--compile=False"] if cfg.quick else [
        "--max_records=40000", "--num_checked=240", "--eval_interval=1000", "--max_tokens_per_batch=8192"]  # fmt: skip
    flags += ["--template=short", f"--device={cfg.device}"]
    start = f"--init_from={best}"
    count = steps_in(cfg, minutes, "lora", *flags, start, "--num_checked=4", "--num_samples=0", name="lora")
    start = "--init_from=resume" if (out / "lora" / "last").exists() else start
    run_ours(cfg, "lora", *flags, start, f"--max_iters={count}", name="lora")
    text = (out / "lora" / "samples.txt").read_text()
    found = re.findall(r"^followed: (.*): (\S+) before, (\S+) after$", text, re.M)
    yield from ({"followed": kind, "before": float(before), "after": float(after)} for kind, before, after in found)


def torchrun(cfg, name):
    """Run one process under torchrun, on NCCL (on CPUs gloo): train in bfloat16, save, resume, train as long again."""
    half, launcher = 2 if cfg.quick else 20, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    flags = [*small_run(cfg), f"--fsdp={name == 'fsdp'}", "--dtype=bfloat16", f"--device={cfg.device}"]
    for more in ([f"--max_iters={half}"], [f"--max_iters={2 * half}", "--init_from=resume"]):
        run_ours(cfg, "train", *flags, *more, name=name, launcher=launcher)
    (_, first), *_, (steps, last) = steps_of(Path(cfg.out, name), "train_loss")
    yield {"steps": steps, "first loss": first, "last loss": last, "ok": steps == 2 * half and last < first + 0.1}


# ---- helpers of the items --------------------------------------------------------------------------------------------

TINY = ["--hidden_size=32", "--intermediate_size=64", "--num_hidden_layers=2", "--sliding_window_pattern=2",
        "--num_attention_heads=2", "--num_key_value_heads=1", "--head_dim=16", "--sliding_window=24",
        "--block_size=64", "--sample_tokens=4", "--compile=False"]  # fmt: skip


def sizes(cfg, **settings):
    """Return settings of benchmark.py at the 270M shape, or at a toy's in quick runs."""
    benchmark.SHAPES["toy"] = (256, 32, 2, 2, 1, 16, 64)
    toy = {"shape": "toy", "block_size": 32, "new_tokens": 4, "steps": 2} if cfg.quick else {"shape": "270m"}
    return benchmark.BenchmarkConfig(**{"device": cfg.device, **settings, **toy})


def small_run(cfg):
    """Return flags of train.py for the quick start's shape, with rows beyond the window, on a few fables."""
    name = "gpu-toy" if cfg.quick else "gpu-small"
    make_dataset(cfg, name, 60 if cfg.quick else 2000)
    flags = ["config/train_fables.py", f"--dataset={name}", "--sliding_window=64", "--eval_tokens=2000",
             "--log_interval=1", "--warmup_iters=5"]  # fmt: skip
    return [*flags, *(["--batch_size=2", *TINY] if cfg.quick else [])]


def make_dataset(cfg, name, count):
    """Prepare `count` fables in data/<name>, unless they are there. Return their meta.json."""
    if not (DATA / name / "meta.json").exists():
        tokenizer = ["--tokenizer=bpe:300"] if cfg.quick else []
        run_ours(cfg, "prepare", "--dataset=fables", f"--name={name}", f"--max_documents={count}", *tokenizer)
    return json.loads((DATA / name / "meta.json").read_text())


def steps_of(folder, key):
    """Return [(step, value of key), ...] from a run's log."""
    return [(e["step"], e[key]) for e in read_log(Path(folder) / "log.jsonl") if e["event"] == "step"]


def run_ours(cfg, script, *flags, name="", launcher=()):
    """Run train.py, lora.py or prepare.py in its own process."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # our whole group gets it; the script saves, and then we end
    out = [f"--out_dir={Path(cfg.out).resolve()}/{name}"] if name else []
    command = [sys.executable, *launcher, f"{script}.py", *flags, *out]
    if code := subprocess.run(command, cwd=HOME, stdout=sys.stderr).returncode:
        raise RuntimeError(f"{script}.py ended with code {code}: see the log")


def run_json(*command):
    """Run a script. Return the JSON lines that it prints."""
    printed = subprocess.run([sys.executable, *command], cwd=HOME, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


# ---- running the items -----------------------------------------------------------------------------------------------


def write(cfg, name, **line):
    """Add a line to the report. The newline comes first, so a torn line before it damages no other."""
    line = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}
    with open(Path(cfg.out) / "report.jsonl", "a") as f:
        f.write("\n" + json.dumps({"item": name, **line}))


def read(cfg):
    """Return the lines of each item's last attempt."""
    lines, file = [], Path(cfg.report or f"{cfg.out}/report.jsonl")
    for text in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            line = json.loads(text)  # unless it was torn
            if line.get("status") == "started":
                lines = [old for old in lines if old["item"] != line["item"]]
            lines.append(line)
    return lines


def ends(cfg):
    return {e["item"]: e for e in read(cfg) if e.get("status", "started") != "started"}


def do(cfg, item):
    """Run an item in this process. The process ends when its parent ends."""
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    end = {"status": "ok"}
    try:
        for line in item.function(cfg, *item.args):
            write(cfg, item.name, **line)
            end = end if line.get("ok", True) else {"status": "failed", "reason": "an error above its limit"}
    except Skipped as e:
        end = {"status": "skipped", "reason": str(e)}
    write(cfg, item.name, **end)


def end_with(parent):
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def supervise(cfg, item, seconds):
    """Run an item in its own process. Return its exit code, or None if it was stopped after `seconds`."""
    log = Path(cfg.out) / "logs" / f"{item.name.replace(': ', ', ')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    flags = [f"--{key}={value}" for key, value in vars(cfg).items() if value != ""]
    with open(log, "a") as f:
        command = [sys.executable, __file__, *flags, f"--item={item.name}"]
        process = subprocess.Popen(command, stdout=f, stderr=f, start_new_session=True)
    for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 20)):  # the first signal lets it save
        try:
            process.wait(patience)
            return process.returncode if number == signal.SIGTERM else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, number)
    process.wait()


def main(cfg):
    items, started = plan(cfg), time.monotonic()
    if cfg.report:
        return print_report(cfg)
    if cfg.item:
        return do(cfg, next(item for item in items if item.name == cfg.item))
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    known = list(dict.fromkeys(item.name.split(":")[0] for item in items))
    parts = cfg.only.split(",") if cfg.only else known
    if not set(parts) <= set(known):
        raise UserError(f"--only={cfg.only}: the parts are {', '.join(known)}")
    done = [name for name, end in ends(cfg).items() if not cfg.only or end["status"] != "failed"]
    todo = [item for item in items if item.name.split(":")[0] in parts and item.name not in done]
    for i, item in enumerate(todo):
        left = 60 * cfg.minutes - 25 - (time.monotonic() - started)  # a run needs the last seconds to save
        if left < 10 or (i and left < item.limit_sec and not item.resumable and not cfg.quick):
            return print(f"{len(todo) - i} of {len(items)} items are left: run this again")
        write(cfg, item.name, status="started")
        code = supervise(cfg, item, min(left, item.limit_sec))
        if code is None and left > item.limit_sec:
            write(cfg, item.name, status="failed", reason=f"took more than {item.limit_sec} s")
        elif code:
            write(cfg, item.name, status="failed", reason=f"exit code {code}, see {cfg.out}/logs")
        end = ends(cfg).get(item.name, {"status": "cut off"})
        print(f"{item.name}: {end['status']}", end.get("reason", ""), flush=True)
    print(f"all done; the tables: python tests/gpu.py --report={cfg.out}/report.jsonl")


# ---- the report ------------------------------------------------------------------------------------------------------


def print_report(cfg):
    """Print tables as Markdown, one for each kind of line in a part. Draw loss.png beside the report."""
    tables = {}
    for e in read(cfg):
        if "curve" in e:
            draw(e, Path(cfg.report).with_name("loss.png"))
        elif e.get("status") not in ("started", "ok"):
            tables.setdefault((e["item"].split(":")[0], tuple(e)), []).append(e)
    for (part, columns), rows in sorted(tables.items(), key=lambda table: list(tables).index(table[0])):
        print(f"\n{part}\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        for e in rows:
            print("| " + " | ".join(str(e[key]).replace("|", "/") for key in columns) + " |")


def draw(e, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(*zip(*e["curve"], strict=True), lw=0.8)
    left.set(xlabel="step", ylabel="training loss (nats per token)")
    right.plot(*zip(*e["evals"], strict=True), "o-")
    right.axhline(e["floor"], color="black", ls=":", label="entropy floor")
    right.set(xlabel="step", ylabel="validation bits per byte", yscale="log")
    right.legend()
    fig.savefig(file, dpi=110)


if __name__ == "__main__":
    run(main, GpuConfig)
