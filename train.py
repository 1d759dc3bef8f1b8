"""
Train a Gemma 3 on a prepared dataset. The one training loop of the project.

    python train.py config/train_fables.py                             # minutes on a laptop
    python train.py config/train_tinystories_270m.py                   # one good GPU
    python train.py config/train_fables.py --init_from=resume          # go on after an interruption
    python train.py --init_from=out/fables/best --eval_only=True --dataset=fables

Writes out/<run>/: last/ and best/ (model directories that transformers opens), log.jsonl, loss.png, samples.txt.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch

from config import UserError, run
from model import Gemma, GemmaConfig
from prepare import DATA, Tokenizer, swap_in


@dataclass
class TrainConfig:
    # data and results
    dataset: str = "tinystories"  # data/<dataset>, or else the newest prepared set whose name begins so
    out_dir: str = ""  # where checkpoints and logs go; by default out/<dataset>
    init_from: str = "scratch"  # scratch, resume (out_dir/last), or a model directory
    eval_only: bool = False  # evaluate init_from on the dataset, and stop
    # batch; an iteration is one optimizer update
    batch_size: int = 32  # rows per micro-batch
    block_size: int = 512  # tokens per row
    gradient_accumulation_steps: int = 1  # micro-batches per update
    max_iters: int = 5000  # updates
    # optimizer
    optimizer: str = "muon"  # muon (matrices by Muon, embedding and norms by AdamW) or adamw (all by AdamW)
    learning_rate: float = 3e-3  # the peak, of both; Muon's updates are scaled to AdamW's size
    min_lr: float = 0.0  # where the schedule ends
    warmup_iters: int = 100  # updates of linear warmup
    decay: str = "linear"  # cosine (after warmup) or linear (constant, then down over the last cooldown_frac)
    cooldown_frac: float = 0.4  # share of max_iters in which decay=linear comes down
    weight_decay: float = 0.0  # on block matrices only: decaying a norm's weight pulls its gain to 1, not to 0
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    dropout: float = 0.0  # on attention weights, residual branches and the embedding
    # evaluation and logs
    eval_interval: int = 500  # updates between evaluations, each with a checkpoint and a sample
    eval_tokens: int = 0  # evaluate on the first so many tokens of the validation split; 0: all of it
    log_interval: int = 10  # updates between lines
    sample_prompt: str = ""  # what the sample at each evaluation continues; empty: a whole new document
    sample_tokens: int = 256  # and for how long at most
    wandb: bool = False  # mirror the log to Weights & Biases
    tensorboard: bool = False  # mirror the log to TensorBoard
    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # bfloat16 (autocast over float32 weights), float32; auto: bfloat16 where it is fast
    compile: bool = True  # torch.compile the model
    seed: int = 1337  # of the initial weights, the order of the data, dropout and samples


# ----------------------------------------------------------------------------------------------------------------------
# data


class Rows:
    """One split of a prepared dataset, dealt into rows of block_size tokens that begin where a document begins.

    A row's first token is the end-of-text before its first document. A document that the row's end cuts off begins the
    next row anew, so that every token is predicted from its whole document at least once; one longer than a row goes on
    in the next."""

    def __init__(self, path, meta, split, block_size, eot):
        self.tokens = np.memmap(path / f"{split}.bin", dtype=meta["dtype"], mode="r")
        self.block_size, self.eot = block_size, eot
        last = len(self.tokens) - 1
        ends = [np.flatnonzero(self.tokens[i : i + 2**24] == eot) + i for i in range(0, len(self.tokens), 2**24)]
        ends = np.concatenate(ends)  # positions of end-of-text tokens, found in pieces to save memory
        starts, at = [], -1  # the first document has no end-of-text before it: position -1 stands for one
        while at < last:
            starts.append(at)
            reach = at + block_size
            end = ends[np.searchsorted(ends, reach, "right") - 1] if reach < last else last
            at = int(end) if end > at else reach
        self.starts = np.array(starts)
        self.fresh = np.diff(self.starts, append=last)  # tokens of each row that the next row does not repeat

    def __len__(self):
        return len(self.starts)

    def batch(self, rows, fresh_only=False):
        """Row numbers -> inputs and targets (B, T), int64. Targets past the data are -100; with fresh_only those that the
        next row repeats are too, so that over all rows each token is a target exactly once."""
        x = np.full((len(rows), self.block_size + 1), self.eot, dtype=np.int64)
        y = np.full((len(rows), self.block_size), -100, dtype=np.int64)
        for i, row in enumerate(rows):
            start = self.starts[row]
            text = self.tokens[max(start, 0) : start + self.block_size + 1]
            skip = int(start < 0)
            x[i, skip : skip + len(text)] = text
            n = self.fresh[row] if fresh_only else skip + len(text) - 1
            y[i, :n] = x[i, 1 : n + 1]
        return torch.from_numpy(x[:, :-1].copy()), torch.from_numpy(y)

    def update(self, step, cfg):
        """The micro-batches of an update, a function of (seed, step) alone: rows in an order drawn anew for every epoch,
        each row once an epoch."""
        size = cfg.batch_size * cfg.gradient_accumulation_steps
        numbers = np.arange(step * size, (step + 1) * size)
        rows = np.empty(size, dtype=np.int64)
        for epoch in np.unique(numbers // len(self)):
            order = np.random.default_rng((cfg.seed, epoch)).permutation(len(self))
            here = numbers // len(self) == epoch
            rows[here] = order[numbers[here] % len(self)]
        return [self.batch(part) for part in rows.reshape(-1, cfg.batch_size)]


def open_dataset(name):
    """data/<name>, or the newest prepared set whose name begins so -> (path, meta, tokenizer)."""
    path = DATA / name
    if not (path / "meta.json").exists():
        found = [p.parent for p in DATA.glob(f"{name}*/meta.json") if p.parent.suffix not in (".part", ".replaced")]
        if not found:
            raise UserError(f"--dataset={name}: no such set in {DATA}; make it with python prepare.py --dataset={name}")
        path = max(found, key=lambda p: (p / "meta.json").stat().st_mtime)
        print(f"dataset: {path}")
    return path, json.loads((path / "meta.json").read_text()), Tokenizer.load(path)


# ----------------------------------------------------------------------------------------------------------------------
# hardware

# dense bfloat16 FLOP/s of GPUs as their makers state them; longer names first where one contains another
PEAK_FLOPS = {
    "GB200": 2500e12, "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "A40": 150e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device={name}: {str(e).splitlines()[0]}") from None
    return device


def pick_dtype(name, device):
    """bfloat16 where the hardware multiplies in it, float32 elsewhere. float16 overflows in Gemma 3."""
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        cpu = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        return torch.bfloat16 if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else torch.float32
    if name not in ("bfloat16", "float32"):
        raise UserError(f"--dtype={name}: choose auto, bfloat16 or float32 (float16 overflows in Gemma 3)")
    return getattr(torch, name)


def autocast(device, dtype):
    """bfloat16 matrix products over float32 weights: small updates of a bfloat16 weight would be rounded away."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def peak_flops(device, dtype):
    """FLOP/s to hold the model's against: the maker's figure for a known GPU, else a large matrix product, timed here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        for name, flops in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name(device):
                return flops
    n = 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


# ----------------------------------------------------------------------------------------------------------------------
# optimizer


def make_optimizers(model, cfg):
    """AdamW, and Muon for the matrices inside blocks (Jordan et al. 2024) unless optimizer=adamw. Every trainable
    parameter is in exactly one group."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trainable if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in trainable if p.ndim != 2 or "embed_tokens" in name]
    assert len({id(p) for p in matrices + others}) == len(matrices) + len(others) == len(trainable)
    groups = [{"params": others, "weight_decay": 0.0}]
    optimizers = []
    if cfg.optimizer == "adamw":
        groups.append({"params": matrices, "weight_decay": cfg.weight_decay})
    elif matrices:
        # match_rms_adamw (Liu et al. 2025) scales Muon's updates to the size of AdamW's, so one learning rate serves both
        muon = torch.optim.Muon(
            matrices, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    groups = [g for g in groups if g["params"]]
    if groups:
        betas = (cfg.beta1, cfg.beta2)
        optimizers.append(torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, fused=True))
    return optimizers


def learning_rate(step, cfg):
    """The rate of update `step`, the first being 0."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    if cfg.decay == "cosine":
        done = (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
        share = 0.5 * (1 + math.cos(math.pi * min(1, done)))
    else:
        cooldown = max(1, cfg.cooldown_frac * cfg.max_iters)
        share = min(1, max(0, (cfg.max_iters - step) / cooldown))
    return cfg.min_lr + share * (cfg.learning_rate - cfg.min_lr)
