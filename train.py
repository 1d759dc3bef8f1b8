"""
Train a Gemma 3 on a prepared dataset. The one training loop of the project.

    python train.py config/train_fables.py                             # minutes on a laptop
    python train.py config/train_tinystories_270m.py                   # one good GPU
    python train.py config/train_fables.py --init_from=resume          # go on after an interruption
    torchrun --standalone --nproc_per_node=8 train.py config/train_tinystories_270m.py    # on every GPU of a machine
    python train.py --init_from=out/fables/best --eval_only=True --dataset=fables --block_size=224

Writes out/<run>/: last/ and best/ (model directories that transformers opens), log.jsonl, summary.json, loss.png,
samples.txt.
"""

import contextlib
import functools
import gc
import io
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from config import NO_LIMIT, Failure, UserError, check_range, first_line, run, user_errors
from model import Gemma, GemmaConfig, complete, read_json, tensor_shapes
from prepare import DATA, Tokenizer, atomic_replace_dir, hub_directory, intact_dir


@dataclass
class PretrainConfig:
    """What pretraining alone needs."""

    dataset: str = "tinystories"  # data/<dataset>, as prepare.py wrote it
    eval_only: bool = False  # evaluate init_from on the dataset, and stop
    compare: str = ""  # draw and print how these runs went, as out/a,out/b, and stop
    batch_size: int = 32  # rows per micro-batch
    block_size: int = 512  # tokens per row
    dropout: float = 0.0  # on attention weights, residual branches and the embedding
    eval_tokens: int = 0  # evaluate on the first so many tokens of the validation split; 0: all of it
    sample_prompt: str = ""  # what the sample at each evaluation continues; empty: a whole new document

    def __post_init__(self):
        check_range(self, 1, NO_LIMIT, "batch_size", "block_size")
        check_range(self, 0, 0.99, "dropout")


@dataclass
class TrainConfig:
    """What every run of the loop needs. An iteration is one optimizer update."""

    out_dir: str = ""  # where checkpoints and logs go; by default out/<dataset>
    init_from: str = "scratch"  # scratch, resume (out_dir/last), a model directory, or a Hub id of a Gemma 3
    max_iters: int = 5000  # updates
    max_minutes: float = 0.0  # in place of max_iters: as many updates as fit, evaluations not counted
    gradient_accumulation_steps: int = 1  # micro-batches per update
    # optimizer
    optimizer: str = "muon"  # muon (matrices by Muon, embedding and norms by AdamW) or adamw (all by AdamW)
    learning_rate: float | None = None  # the peak; by default 3e-3 from scratch, 1e-4 from a trained model
    min_lr: float = 0.0  # where the schedule ends
    warmup_iters: float = 100  # updates of linear warmup; below 1: that share of max_iters
    schedule: str = "wsd"  # wsd (warmup, stable, linear decay over the last cooldown_frac) or cosine
    cooldown_frac: float = 0.4  # share of max_iters in which wsd comes down
    weight_decay: float = 0.0  # on block matrices only: decaying a norm's weight pulls its gain to 1, not to 0
    momentum: float = 0.95  # Muon: decay of the mean gradient; in short runs less is better
    beta1: float = 0.9  # AdamW: decay of the mean gradient
    beta2: float = 0.95  # AdamW: decay of the mean squared gradient
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    # evaluation and logs
    eval_interval: int = 500  # updates between evaluations, each with a checkpoint and a sample
    log_interval: int = 10  # updates between lines
    sample_tokens: int = 256  # longest sample
    wandb: bool = False  # mirror the log to Weights & Biases
    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # bfloat16 (autocast over float32 weights), float32; auto: bfloat16 where it is fast
    compile: bool = True  # torch.compile the model
    activation_memory: float = 1.0  # share of activations kept for backward, the rest made again: compiled, no dropout
    fsdp: bool = False  # under torchrun: shard weights, gradients and optimizer state too, for what does not fit
    seed: int = 1337  # of the initial weights, the order of the data, dropout and samples

    def __post_init__(self):
        check_range(self, 1, NO_LIMIT, "gradient_accumulation_steps", "eval_interval", "log_interval")
        check_range(self, 0, 0.999999, "momentum", "beta1", "beta2")
        check_range(self, 0, 1, "cooldown_frac", "activation_memory")
        for key, choices in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)!r} must be {' or '.join(choices)}")
        if self.learning_rate is not None:
            check_range(self, 1e-12, 1e3, "learning_rate")
            if not 0 <= self.min_lr <= self.learning_rate:
                raise ValueError(f"min_lr={self.min_lr} must lie between 0 and learning_rate={self.learning_rate}")


# ---- data: rows of tokens --------------------------------------------------------------------------------------------


class PackedDataset:
    """One split of a prepared dataset as rows of block_size tokens, each of which begins where a document begins.

    A row's first token is the end-of-text before its first document, or the tokenizer's <bos> where it has one. A
    document that the row's end cuts off begins the next row anew, so that every token is predicted from its whole
    document at least once; one longer than a row goes on in the next.

    To train on other rows, write another class with batch(rows) and __len__, and name it in Pretraining.train_rows: an
    epoch goes through its rows in an order of its own."""

    def __init__(self, path, meta, split, block_size, tokenizer):
        self.tokens = np.memmap(path / f"{split}.bin", dtype=meta["dtype"], mode="r")
        self.block_size, self.eot = block_size, tokenizer.eot
        self.bos = tokenizer.bos if tokenizer.bos != tokenizer.eot else None
        last, ends = len(self.tokens) - 1, document_ends(self.tokens, path / f"{split}.bin", tokenizer)
        starts, at = [], -1  # the first document has no end-of-text before it: position -1 stands for one
        while at < last:
            starts.append(at)
            reach = at + block_size
            ended = np.searchsorted(ends, reach, "right")  # documents that have ended by then
            end = int(ends[ended - 1]) if ended else -1
            at = end if end > at else reach
        self.starts = np.array(starts)
        self.num_new_targets = np.diff(self.starts, append=last)  # of each row; what the next row repeats is not new

    def __len__(self):
        return len(self.starts)

    def batch(self, rows, new_only=False):
        """Row numbers -> inputs and targets (B, T), int64. Targets past the data are -100; with new_only those that
        the next row repeats are too, so that over all rows each token is a target exactly once."""
        x = np.full((len(rows), self.block_size + 1), self.eot, dtype=np.int64)
        y = np.full((len(rows), self.block_size), -100, dtype=np.int64)
        for i, row in enumerate(rows):
            start = self.starts[row]
            text = self.tokens[max(start, 0) : start + self.block_size + 1]
            skip = int(start < 0)
            x[i, skip : skip + len(text)] = text
            n = self.num_new_targets[row] if new_only else skip + len(text) - 1
            y[i, :n] = x[i, 1 : n + 1]
        if self.bos is not None:  # Gemma's own weights write nonsense without it
            x[:, 0] = self.bos
        return torch.from_numpy(x[:, :-1].copy()), torch.from_numpy(y)


def epoch_shuffled_indices(count, size, seed, step):
    """The `size` of `count` things that update `step` takes, a function of (seed, step) alone: every epoch takes each
    once, in an order of its own."""
    numbers = np.arange(step * size, (step + 1) * size)
    indices = np.empty(size, dtype=np.int64)
    for epoch in np.unique(numbers // count):
        here = numbers // count == epoch
        indices[here] = epoch_permutation(count, seed, int(epoch))[numbers[here] % count]
    return indices


@functools.lru_cache(maxsize=2)
def epoch_permutation(count, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(count)


# ---- one update ------------------------------------------------------------------------------------------------------


def wsd(step, cfg):
    """Stable, then decay: constant, then linearly down to 0 over the last cooldown_frac."""
    return min(1, max(0, (cfg.max_iters - step) / max(1, cfg.cooldown_frac * cfg.max_iters)))


def cosine(step, cfg):
    """Half a cosine from the end of warmup to max_iters."""
    done = (step - warmup_updates(cfg)) / max(1, cfg.max_iters - warmup_updates(cfg))
    return 0.5 * (1 + math.cos(math.pi * min(1, max(0, done))))


SCHEDULES = {"wsd": wsd, "cosine": cosine}  # f(step, cfg) -> where the rate stands between min_lr (0) and its peak (1)


def warmup_updates(cfg):
    return cfg.warmup_iters if cfg.warmup_iters >= 1 else cfg.warmup_iters * cfg.max_iters


def learning_rate(step, cfg):
    """The rate of update `step`, the first being 0: what warmup or the schedule allows, the lower of them."""
    scheduled = cfg.min_lr + SCHEDULES[cfg.schedule](step, cfg) * (cfg.learning_rate - cfg.min_lr)
    return min(scheduled, cfg.learning_rate * (step + 1) / max(1, warmup_updates(cfg)))


def accumulate_gradients(forward, micro_batches, device, dtype):
    """Add up the gradients of an update's micro-batches, which the processes share -> the mean loss in nats per target,
    a tensor on the device, which may still be at work."""
    # every target of the update weighs the same, however unevenly micro-batches and processes share them
    num_targets = sum(int((y != -100).sum()) for _, y, *_ in micro_batches)
    total, mine = torch.zeros((), device=device), local_micro_batches(micro_batches)
    for i, batch in enumerate(mine):
        if isinstance(forward, DistributedDataParallel):  # only an update's last backward averages over processes
            forward.require_backward_grad_sync = i == len(mine) - 1
        with autocast(device, dtype):
            loss = forward(*to_device(batch, device), reduction="sum") / num_targets
        (loss * get_world_size()).backward()  # the mean over processes is then the sum
        total += loss.detach()
    return all_reduce_sum(total, device)


def optimizer_step(optimizers, loss, grad_clip):
    """Clip the gradients and step -> (loss, gradient norm). Where one is not finite, the weights stay as they were."""
    trained = [p for group in groups_of(optimizers) for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)
    loss, grad_norm = torch.stack((loss, full_tensor(grad_norm))).tolist()  # waits for the device
    for optimizer in optimizers:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


# ---- the loop --------------------------------------------------------------------------------------------------------


MAX_SKIPPED = 5  # updates in a row without a finite loss and gradient, then the run ends
CLEAR_LINE = "\033[K"  # in a terminal, from the cursor on
# evaluated: the step of the last evaluation
NEW_STATE = {"step": 0, "tokens": 0, "seconds": 0.0, "best_val_loss": math.inf, "evaluated": -1}


class Trainer:
    """One run of training: Trainer(task).fit(). It owns device, optimizers, state, log and saving. The task owns
    the model and its data (Pretraining below, InstructionTuning in lora.py); it provides

        model, cfg                  cfg: the settings; with max_minutes Trainer fills in max_iters
        floor                       the entropy floor of the validation loss in bits per byte, or None
        micro_batches(step)         [(inputs, targets), ...] of an update, (B, T) int64; -100: nothing to predict here;
                                    or (inputs, targets, documents), as Gemma.forward() takes them
        validation_batches()        an iterable of such batches
        metrics(loss)               of a validation loss: {"val_loss": loss, ...} for the log, and a line to print
        sample()                    a text that the model writes, to look at
        save_model(path, weights)   write a directory that can be opened again
    """

    def __init__(self, task, state=None, device=None):
        """state: of a run to go on with, as read_state returns it."""
        self.task, self.model, cfg = task, task.model, task.cfg
        self.device = device or task.model.device
        self.dtype = pick_dtype(cfg.dtype, self.device)
        self.state = SimpleNamespace(**{**NEW_STATE, "settings": {}, **(state or {})})
        if cfg.learning_rate is None:
            default = 3e-3 if cfg.init_from == "scratch" else 1e-4
            with user_errors("at the default rate"):
                cfg = replace(cfg, learning_rate=self.state.settings.get("learning_rate") or default)
        self.cfg = cfg
        if cfg.fsdp:
            apply_fsdp(self.model, self.device)
        self.optimizers = make_optimizers(self.model, cfg)
        load_optimizer_state(self.optimizers, self.model, self.state.__dict__.pop("optimizer", {}), cfg.fsdp)
        self.forward = compile_and_wrap_ddp(self.model, cfg)
        self.noted_signal, self.stop_signal, self.skipped, self.write_errors = 0, 0, 0, []
        if cfg.max_minutes:
            resumed = self.state.step > 0
            max_iters = self.state.settings["max_iters"] if resumed else self.updates_in(60 * cfg.max_minutes)
            self.cfg = task.cfg = replace(cfg, max_iters=max_iters)
            print(f"max_minutes={cfg.max_minutes:g}: {max_iters:,} updates; --max_iters={max_iters} repeats them")

    def fit(self):
        """Train until max_iters. Where a signal asks for it, save, and end the process."""
        cfg, task, state = self.cfg, self.task, self.state
        start_out_dir(cfg)
        self.peak_flops = peak_flops(self.device, self.dtype) * get_world_size()
        self.started = time.perf_counter() - state.seconds
        self.start_clock()
        first = state.step
        with self.signals_noted(), Log(cfg, state.step) as self.log:
            self.model.train()
            micro_batches = task.micro_batches(state.step)
            while not self.stop_requested():
                due = state.step % cfg.eval_interval == 0 or state.step >= cfg.max_iters
                if due and state.evaluated != state.step:
                    self.evaluate_and_save()
                if state.step >= cfg.max_iters:
                    self.stop_requested()  # during the last evaluation
                    break
                lr = self.set_learning_rate()
                torch.manual_seed(hash((cfg.seed, state.step, get_rank())))  # dropout is a function of these alone
                loss = accumulate_gradients(self.forward, micro_batches, self.device, self.dtype)
                state.tokens += sum(num_tokens(y) for _, y, *_ in micro_batches)
                micro_batches = task.micro_batches(state.step + 1)  # while the device is at work
                loss, grad_norm = optimizer_step(self.optimizers, loss, cfg.grad_clip)
                state.step += 1
                self.check_finite(loss, grad_norm)
                if state.step % cfg.log_interval == 0 or state.step == cfg.max_iters:
                    self.log_update(loss, lr, grad_norm, micro_batches[0])
                if state.step == first + 1:  # which had to compile
                    self.start_clock()
                    gc.freeze()  # what is there by now stays: Python need not look through it for garbage again
            if self.stop_signal:
                state.seconds = time.perf_counter() - self.started
                self.save_checkpoints()
        if self.write_errors:
            raise Failure(f"{len(self.write_errors)} writes failed, the last of them: {self.write_errors[-1]}")
        if self.stop_signal:
            say(f"stopped after update {state.step}; to go on: the same command, and --init_from=resume")
            shutdown_distributed(128 + self.stop_signal)

    def updates_in(self, seconds):
        """How many updates fit: measured on some that move nothing, after one that compiles."""
        for group in groups_of(self.optimizers):
            group["lr"] = 0.0
        self.model.train()
        batches = self.task.micro_batches(0)
        times = [time.perf_counter()]
        for _ in range(9):
            loss = accumulate_gradients(self.forward, batches, self.device, self.dtype)
            optimizer_step(self.optimizers, loss, self.cfg.grad_clip)
            times.append(time.perf_counter())
        for optimizer in self.optimizers:
            optimizer.state.clear()
        mean = all_reduce_sum(torch.tensor((times[-1] - times[1]) / 8), self.device).item() / get_world_size()
        return max(1, int(seconds / mean))

    def set_learning_rate(self):
        lr = learning_rate(self.state.step, self.cfg)
        for group in groups_of(self.optimizers):
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr

    def evaluate(self):
        """The validation loss in nats per target."""
        return evaluate(self.model, self.task.validation_batches(), self.device, self.dtype)

    def evaluate_and_save(self):
        """Evaluate, log, sample and save."""
        paused, state = time.perf_counter(), self.state
        loss = self.evaluate()
        is_best = loss < state.best_val_loss
        state.best_val_loss = loss if is_best else state.best_val_loss
        state.evaluated, state.seconds = state.step, time.perf_counter() - self.started
        metrics, line = self.task.metrics(loss)
        say(f"{CLEAR_LINE * sys.stdout.isatty()}update {state.step}: {line}")
        self.model.eval()
        text = self.task.sample()  # by all processes: where weights are sharded, all are needed
        self.model.train()
        say(f"  {text}\n")
        counters = {key: getattr(state, key) for key in NEW_STATE if key != "evaluated"}
        self.try_write(self.log.write, {"event": "eval", **counters, **metrics, "sample": text})
        self.try_write(draw_loss, Path(self.cfg.out_dir) / "loss.png", [Path(self.cfg.out_dir)], self.task.floor)
        self.try_write(write_samples, Path(self.cfg.out_dir))
        self.try_write(self.write_summary, metrics)
        self.save_checkpoints(is_best)
        self.last_line.at += time.perf_counter() - paused  # speed is that of training alone

    def start_clock(self):
        self.last_line = SimpleNamespace(at=time.perf_counter(), step=self.state.step, tokens=self.state.tokens)

    def settings(self):
        """Those of this run; it began from what it began from before it was resumed."""
        now = asdict(self.cfg)
        return self.state.settings | {k: v for k, v in now.items() if (k, v) != ("init_from", "resume")}

    def write_summary(self, metrics):
        """summary.json: what the run was and where it stands, for programs."""
        state, gpu, out_dir = self.state, self.device.type == "cuda", Path(self.cfg.out_dir)
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
        hardware = torch.cuda.get_device_name(self.device) if gpu else platform.machine()
        summary = {
            "name": out_dir.name,
            "updates": state.step,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 1),
            "metrics": finite(metrics | {"best_val_loss": state.best_val_loss}),
            "floor_bits_per_byte": self.task.floor,
            "parameters": self.model.num_params(),
            "settings": self.settings(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "commit": commit or None,
            "hardware": f"{get_world_size()} x {hardware}, {torch.get_num_threads()} CPU threads",
        }
        write_atomically(out_dir / "summary.json", json.dumps(summary, indent=2) + "\n")

    def log_update(self, loss, lr, grad_norm, batch):
        """A line, and an entry in log.jsonl: add what else you want to see."""
        state, last, now = self.state, self.last_line, time.perf_counter()
        rate = (state.tokens - last.tokens) / (now - last.at)
        _, y, *documents = batch
        head = (y != -100).float().mean().item() if documents else 1.0  # as in Gemma.forward()
        mfu = rate * self.model.flops_per_token(y.shape[1], head) / self.peak_flops
        left = (self.cfg.max_iters - state.step) * (now - last.at) / (state.step - last.step)
        entry = {"event": "step", "step": state.step, "tokens": state.tokens, "seconds": now - self.started,
                 "train_loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_sec": rate, "mfu": mfu}  # fmt: skip
        memory = ""
        if self.device.type == "cuda":
            entry["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            memory = f" {entry['peak_memory_gb']:.1f} GB at most,"
        self.try_write(self.log.write, entry)
        line = (f"update {state.step:5}/{self.cfg.max_iters}: loss {loss:.4f}, lr {lr:.2e}, grad norm {grad_norm:.2f}, "
                f"{rate:,.0f} tokens/s, {mfu:.0%} MFU,{memory} {timedelta(seconds=int(left))} left")  # fmt: skip
        in_place = sys.stdout.isatty()  # the next line is then written over this one
        say(CLEAR_LINE + line[: shutil.get_terminal_size().columns - 1] if in_place else line,
            end="\r" if in_place else "\n")  # fmt: skip
        self.last_line = SimpleNamespace(at=now, step=state.step, tokens=state.tokens)

    def save_checkpoints(self, is_best=False):
        """Save the model in folders of out_dir: "last", with the state that a run resumes from, and perhaps "best". The
        disk being full does not end a run that has a "last" to resume from."""
        state = self.model.state_dict(), optimizer_state(self.optimizers, self.model)
        weights, optimizer = tree_map(full_tensor_on_rank0, state)  # by all processes, one tensor after the other
        self.state.settings = self.settings()
        for name in ["best"] * is_best + ["last"]:
            path = Path(self.cfg.out_dir) / name
            state = {**vars(self.state), "optimizer": optimizer} if name == "last" else None
            self.try_write(write_checkpoint, path, self.task.save_model, weights, state)
            if get_rank() == 0 and name == "last" and not intact_dir(path).exists():
                raise Failure(self.write_errors[-1])

    def try_write(self, write, *args):
        """Let rank 0 write something; what a full disk does not take is said, and does not end the run."""
        try:
            if get_rank() == 0:
                write(*args)
        except OSError as e:
            self.write_errors.append(str(e))
            say(f"warning: {e}; training goes on")

    def check_finite(self, loss, grad_norm):
        """Log an update that was skipped; MAX_SKIPPED in a row end the run."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skipped = 0
            return
        self.skipped += 1
        step = self.state.step
        say(f"update {step}: skipped, its loss is {loss} and its gradient norm {grad_norm}")
        self.try_write(self.log.write, {"event": "skipped", "step": step, "train_loss": loss, "grad_norm": grad_norm})
        if self.skipped == MAX_SKIPPED:
            at = f"the checkpoint of update {self.state.evaluated} is in {self.cfg.out_dir}/last"
            raise Failure(f"{self.skipped} updates in a row without a finite loss and gradient; {at}; lower "
                          "learning_rate, or look for what is odd in the data")  # fmt: skip

    @contextlib.contextmanager
    def signals_noted(self):
        """SIGTERM and Ctrl-C are noted, so that the run can save and end. A second Ctrl-C ends it at once."""
        before = {number: signal.signal(number, self.note_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def note_signal(self, number, _frame):
        if self.noted_signal and number == signal.SIGINT and get_world_size() == 1:  # torchrun passes ours on once more
            raise KeyboardInterrupt
        self.noted_signal = self.noted_signal or number
        if get_rank() == 0:  # not by print(), which a signal may have come upon at work
            with contextlib.suppress(OSError):
                os.write(1, f"{signal.Signals(number).name}: saving, then stopping\n".encode())

    def stop_requested(self):
        """Whether any process was told to stop; then all of them stop here. One that is told while they ask each other
        stops next time, with the others."""
        if all_reduce_sum(torch.tensor(self.noted_signal), self.device).item():
            self.stop_signal = self.noted_signal or signal.SIGTERM
        return bool(self.stop_signal)


class Pretraining:
    """Next-token prediction on a prepared dataset, as a task for Trainer."""

    def __init__(self, data_cfg, cfg, model, dataset):
        self.data_cfg, self.cfg, self.model, self.dataset = data_cfg, cfg, model, dataset
        self.val_rows = self.rows("val")
        counts, floor = dataset.meta["val"], dataset.meta["floor_bits_per_byte"]
        enough = int(np.searchsorted(self.val_rows.num_new_targets.cumsum(), data_cfg.eval_tokens or counts["tokens"]))
        self.num_val_rows = min(len(self.val_rows), 1 + enough)
        if self.num_val_rows < len(self.val_rows):  # of another text than the whole split, the floor is another too
            targets = self.val_rows.tokens[: self.val_rows.num_new_targets[: self.num_val_rows].sum()]
            counts = {"tokens": len(targets), "bytes": len(dataset.tokenizer.decode(targets).encode())}
            floor = None
        self.bytes_per_token, self.floor = counts["bytes"] / counts["tokens"], floor

    def rows(self, split):
        path, meta, tokenizer = self.dataset
        return PackedDataset(path, meta, split, self.data_cfg.block_size, tokenizer)

    @functools.cached_property
    def train_rows(self):
        path, meta, _ = self.dataset
        if (tokens := meta["train"]["tokens"]) < (block_size := self.data_cfg.block_size):
            raise UserError(f"{path}/train.bin has {tokens} tokens, fewer than block_size={block_size}: lower it")
        return self.rows("train")

    def micro_batches(self, step):
        size = self.data_cfg.batch_size * self.cfg.gradient_accumulation_steps
        rows = epoch_shuffled_indices(len(self.train_rows), size, self.cfg.seed, step)
        return [self.train_rows.batch(part) for part in rows.reshape(-1, self.data_cfg.batch_size)]

    def validation_batches(self):
        """The validation split, or the first eval_tokens of it: always the same rows, each token a target once. The
        last batch is filled up, so that all have one shape."""
        size = self.data_cfg.batch_size
        for i in range(0, self.num_val_rows, size):
            x, y = self.val_rows.batch(range(i, min(i + size, self.num_val_rows)), new_only=True)
            filler = (0, 0, 0, size - len(x))
            yield F.pad(x, filler), F.pad(y, filler, value=-100)

    def metrics(self, loss):
        bpb = loss / math.log(2) / self.bytes_per_token  # bits per byte of text compares across tokenizers
        against_floor = f" ({bpb / self.floor:.3f} x the entropy floor of {self.floor:.4f})" if self.floor else ""
        line = f"val loss {loss:.4f}, perplexity {math.exp(min(loss, 99)):.2f}, {bpb:.4f} bits per byte{against_floor}"
        return {"val_loss": loss, "val_bpb": bpb}, line

    def sample(self):
        """A short story, the same draw at every evaluation."""
        tokenizer, text = self.dataset.tokenizer, self.data_cfg.sample_prompt
        prompt, how = [tokenizer.bos, *tokenizer.encode(text).tolist()], {"stop_ids": [tokenizer.eot]}
        how |= {"temperature": 0.8, "seed": self.cfg.seed}
        return text + complete(self.model, tokenizer, [prompt], self.cfg.sample_tokens, **how)[0]

    def save_model(self, path, weights):
        self.model.save_pretrained(path, weights)
        self.dataset.tokenizer.save(path)

    @property
    def memory_hint(self):
        B, count = self.data_cfg.batch_size, self.cfg.gradient_accumulation_steps
        flags = f": --batch_size={B // 2} --gradient_accumulation_steps={2 * count}" if B % 2 == 0 else ""
        return f"lower batch_size, and raise gradient_accumulation_steps as much{flags}"

    def print_plan(self, state):
        total, embedding = self.model.num_params() / 1e6, self.model.model.embed_tokens.weight.numel() / 1e6
        per_update = self.data_cfg.batch_size * self.cfg.gradient_accumulation_steps
        rows, block_size = self.train_rows, self.data_cfg.block_size
        epochs = self.cfg.max_iters * per_update / len(rows)
        repeated = 1 - self.dataset.meta["train"]["tokens"] / (len(rows) * block_size)
        print(f"model: {total:.1f}M parameters, {embedding:.1f}M of them in the tied embedding")
        print(f"updates: {self.cfg.max_iters - state.step:,} of {per_update * block_size:,} tokens; {epochs:.2f} "
              f"epochs of the text in {len(rows):,} rows, {repeated:.0%} of them repeated context")  # fmt: skip
        if warmup_updates(self.cfg) >= self.cfg.max_iters:
            print(f"warning: warmup_iters={self.cfg.warmup_iters:g} never ends before max_iters={self.cfg.max_iters}")
        if epochs > 30 and not self.data_cfg.dropout:
            print(f"warning: {epochs:.0f} epochs over the same text without dropout will memorize it")


def main(data_cfg, cfg, arch):
    if data_cfg.compare:
        return compare_runs([Path(name.strip()) for name in data_cfg.compare.split(",")])
    cfg, device = set_up(cfg)
    dataset = open_dataset(data_cfg.dataset)
    cfg = replace(cfg, out_dir=cfg.out_dir or f"out/{dataset.path.name}")
    cfg = replace(cfg, max_minutes=0.0) if data_cfg.eval_only else resolve_out_dir(cfg)
    with runtime_errors("the model alone is too large"):
        model, state = start_model(data_cfg, cfg, arch, dataset, device)
    task = Pretraining(data_cfg, cfg, model, dataset)
    with runtime_errors(task.memory_hint):
        trainer = Trainer(task, state, device)
        if data_cfg.eval_only:
            print(task.metrics(trainer.evaluate())[1])
        else:
            task.print_plan(trainer.state)
            trainer.fit()
            out_dir = shlex.quote(f"--out_dir={cfg.out_dir}")
            print(f'done. Read what it writes: python sample.py {out_dir} --start="Once"')
    shutdown_distributed()


def start_model(data_cfg, cfg, arch, dataset, device):
    """The model that init_from names, and the state to train it from."""
    _, meta, tokenizer = dataset
    state = {"dataset": meta.get("fingerprint"), "settings": asdict(data_cfg) | asdict(cfg)}
    home = loading_device(cfg, device)
    if cfg.init_from == "scratch":
        vocab_size = arch.vocab_size
        if vocab_size == GemmaConfig.vocab_size:  # not set: the tokenizer's, in whole tiles of a matrix product
            vocab_size = math.ceil(meta["vocab_size"] / 64) * 64
        special = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eot, "pad_token_id": tokenizer.pad}
        with torch.device(home):
            model = Gemma(replace(arch, vocab_size=vocab_size, **special), data_cfg.dropout)
        if home.type != "meta":
            model.init_weights(cfg.seed, device)
    else:
        last = intact_dir(Path(cfg.out_dir) / "last")
        checkpoint = last if cfg.init_from == "resume" else hub_directory(cfg.init_from)
        if not checkpoint.is_dir():
            raise UserError(f"--init_from={cfg.init_from}: no checkpoint in {checkpoint}")
        model = open_model(checkpoint, home, dropout=data_cfg.dropout)
        if Tokenizer.load(checkpoint).spec["model"] != tokenizer.spec["model"]:
            raise UserError(f"the dataset's tokenizer is not the model's: prepare it with --tokenizer={checkpoint}")
        refuse_another_architecture(arch, model.config, checkpoint)
        if cfg.init_from == "resume":
            state = read_state(checkpoint, state, fixed=("optimizer",), on_rank0=cfg.fsdp)
    config = model.config
    if meta["vocab_size"] > config.vocab_size:
        raise UserError(f"the tokenizer's {meta['vocab_size']} entries do not fit into vocab_size={config.vocab_size}")
    if data_cfg.block_size > (limit := config.max_position_embeddings):
        raise UserError(f"block_size={data_cfg.block_size} exceeds max_position_embeddings={limit}: lower it")
    return model, state


# ---- optimizers ------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): matrices move by their mean gradient, orthogonalized. Moves have the size of AdamW's
    (0.2 rms, Liu et al. 2025), so that one learning rate serves both.

    Matrices of one shape are a group, and are orthogonalized together, which keeps the device busier; of several
    processes each does a part of every group."""

    def __init__(self, params, momentum=0.95, weight_decay=0.0):
        by_shape = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        defaults = {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": group} for group in by_shape.values()], defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, beta = group["params"], group["momentum"]
            directions = []
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                mean = self.state[p]["momentum_buffer"]
                mean.lerp_(p.grad, 1 - beta)
                directions.append(full_tensor(p.grad.lerp(mean, beta)))  # Nesterov's
            moves = share_work(orthogonalize, torch.stack(directions))
            size = 0.2 * max(moves.shape[1:]) ** 0.5
            for p, move in zip(params, moves, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(shard_like(move.to(p.dtype), p), alpha=-group["lr"] * size)


def orthogonalize(stack):
    """Matrices (N, rows, columns) -> bfloat16 ones with the same singular vectors, and singular values of about 1: five
    steps of Newton and Schulz with Jordan's coefficients."""
    wide = stack.mT if stack.shape[1] > stack.shape[2] else stack
    x = wide.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x if wide is stack else x.mT


def muon(matrices, others, cfg):
    return [*([Muon(matrices, cfg.momentum, cfg.weight_decay)] if matrices else []), *adamw([], others, cfg)]


def adamw(matrices, others, cfg):
    groups = [{"params": others, "weight_decay": 0.0}, {"params": matrices, "weight_decay": cfg.weight_decay}]
    groups = [group for group in groups if group["params"]]
    return [torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), fused=True)] if groups else []


# f(matrices inside blocks, other parameters, cfg) -> [optimizer, ...]. The loop sets the rate of every group, times
# the group's "lr_scale" where it has one
OPTIMIZERS = {"muon": muon, "adamw": adamw}


def make_optimizers(model, cfg):
    """The optimizers that cfg names. Every trainable parameter is in exactly one group."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in trainable.items() if p.ndim == 2 and "embed_tokens" not in name}
    others = [p for name, p in trainable.items() if name not in matrices]
    optimizers = OPTIMIZERS[cfg.optimizer](list(matrices.values()), others, cfg)
    grouped = [id(p) for group in groups_of(optimizers) for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, trainable.values())), "a parameter is in no group, or in two"
    return optimizers


def groups_of(optimizers):
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def optimizer_state(optimizers, model):
    """{parameter name: its state} of all optimizers, so that a checkpoint does not depend on their groups."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: values for optimizer in optimizers for p, values in optimizer.state.items()}


def load_optimizer_state(optimizers, model, saved, sharded):
    """Give the optimizers their state from a checkpoint, which any number of processes may have written. Settings, as
    momentum, stay what this run has."""
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers if saved else []:
        state = {}
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            values = saved.get(names[p], {})
            state[i] = {key: distribute(value, p) if sharded else value for key, value in values.items()}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# ---- evaluation, log, plot -------------------------------------------------------------------------------------------


def say(text, end="\n"):
    """Print a line at once. A run goes on where nobody reads it any more: Ctrl-C ends `| tee` too, and the run has yet
    to save."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def evaluate(model, batches, device, dtype):
    """Mean loss in nats over the targets of batches, which the processes share."""
    was_training, batches = model.training, iter(batches)
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # of losses, of targets
    with torch.no_grad(), autocast(device, dtype):
        while group := list(itertools.islice(batches, get_world_size())):
            batch = group[min(get_rank(), len(group) - 1)]
            if get_rank() >= len(group):  # nothing left for this process, but all must come along
                batch = without_targets(batch)
            loss = model(*to_device(batch, device), reduction="sum")
            sums += torch.tensor([loss.item(), (batch[1] != -100).sum()], dtype=torch.float64)
    model.train(was_training)
    total, count = all_reduce_sum(sums, device).tolist()
    return total / max(1, count)


def num_tokens(targets):
    """Tokens in rows of targets (B, T), less the padding after each row's last target."""
    padding = (targets != -100).flip(1).int().argmax(1)
    return targets.numel() - int(padding.sum())


class Log:
    """log.jsonl, one object a line, and its mirror, open between `with` and its end. Resuming drops the lines after
    the checkpoint's step."""

    run = None
    torn = False  # whether the last line's writing failed

    def __init__(self, cfg, step):
        out_dir = Path(cfg.out_dir)
        self.path = out_dir / "log.jsonl"
        if get_rank():  # rank 0 alone writes
            return
        entries = [entry for entry in read_log(self.path) if entry["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(entry) + "\n" for entry in entries))
        if cfg.wandb:
            import wandb

            self.run = wandb.init(project="nanogemma", name=out_dir.name, config=asdict(cfg))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.run:
            self.run.finish()

    def write(self, entry):
        entry = finite(entry)
        line = "\n" * self.torn + json.dumps(entry) + "\n"
        self.torn = True
        with open(self.path, "a") as f:
            f.write(line)
        self.torn = False
        if self.run:
            numbers = {k: v for k, v in entry.items() if isinstance(v, int | float) and k != "step"}
            self.run.log(numbers, step=entry["step"])


def finite(entry):
    """A dict with None in place of what JSON has no number for."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}


def read_log(path):
    """The entries of a log.jsonl, less the lines that a crash or a full disk has torn."""
    entries = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    loss = {"step": "train_loss", "eval": "val_loss", "skipped": "train_loss"}
    return [e for e in entries if isinstance(e, dict) and e.get("event") in loss and isinstance(e.get("step"), int)
            and isinstance(e.get(loss[e["event"]], ""), float | None)]  # fmt: skip


def write_atomically(path, content):
    """Write text or bytes to a file that has either all of it or what it had before."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def draw_loss(path, out_dirs, floor=None):
    """The losses in the log.jsonl of runs against updates and against minutes, as a picture: in bits per byte, or in
    nats a token where tokens have no known length; with the entropy floor where that is known."""
    from matplotlib.figure import Figure  # slow to import

    fig, lowest = Figure(figsize=(11, 4.5), layout="constrained"), math.inf
    axes = fig.subplots(1, 2, sharey=True)
    for i, out_dir in enumerate(out_dirs):
        entries = read_log(out_dir / "log.jsonl")
        steps = [e for e in entries if e["event"] == "step" and e["train_loss"] is not None]
        if not (evals := [e for e in entries if e["event"] == "eval" and e["val_loss"]]):
            continue
        bits_per_byte = "val_bpb" in evals[0]
        unit = evals[0]["val_bpb"] / evals[0]["val_loss"] if bits_per_byte else 1
        lowest = min(lowest, *(unit * e["val_loss"] for e in evals))
        for ax, key, per, label in zip(axes, ("step", "seconds"), (1, 60), ("update", "minutes"), strict=True):
            x, y = [e[key] / per for e in steps], [unit * e["train_loss"] for e in steps]
            ax.plot(x, y, f"C{i}", lw=0.6, alpha=0.4)
            x, y = [e[key] / per for e in evals], [unit * e["val_loss"] for e in evals]
            ax.plot(x, y, f"C{i}o-", ms=3, label=out_dir.name)
            ax.set(xlabel=label, ylabel="bits per byte" if bits_per_byte else "nats per token")
    for ax in axes if lowest < math.inf else []:
        if floor:
            ax.axhline(floor, color="black", ls=":", lw=1, label="entropy floor")
        ax.set_ylim(0.9 * (floor or lowest), 3 * lowest)
        ax.grid(alpha=0.3)
        ax.legend()
    picture = io.BytesIO()
    fig.savefig(picture, format="png", dpi=100)
    write_atomically(path, picture.getvalue())


def compare_runs(out_dirs):
    """Print the last figures and sample of several runs, and draw them all into compare.png, beside the first."""
    kinds = set()
    for out_dir in out_dirs:
        evals = [e for e in read_log(out_dir / "log.jsonl") if e["event"] == "eval" and e["val_loss"]]
        if not evals:
            raise UserError(f"--compare: {out_dir / 'log.jsonl'} has no evaluation")
        last = evals[-1]
        kinds.add("val_bpb" in last)
        loss = f"{last['val_bpb']:.4f} bits per byte" if "val_bpb" in last else f"{last['val_loss']:.4f} nats per token"
        print(f"{out_dir}: {loss} after {last['step']:,} updates, {last['tokens']:,} tokens, "
              f"{last['seconds'] / 60:.1f} minutes\n  {last['sample']}\n")  # fmt: skip
    if len(kinds) > 1:
        raise UserError("--compare: pretraining is drawn in bits per byte, tuning in nats per token: name one kind")
    draw_loss(path := out_dirs[0].with_name("compare.png"), out_dirs)
    print(f"drawn to {path}")


def write_samples(out_dir):
    """samples.txt from log.jsonl: how the model wrote at each evaluation."""
    evals = [entry for entry in read_log(out_dir / "log.jsonl") if entry["event"] == "eval"]
    texts = [f"--- update {e['step']}, val loss {e['val_loss'] or math.nan:.4f}\n{e.get('sample')}\n\n" for e in evals]
    write_atomically(out_dir / "samples.txt", "".join(texts))


# ---- what lies on disk: datasets, checkpoints, runs ------------------------------------------------------------------


class Dataset(NamedTuple):
    path: Path
    meta: dict  # of meta.json
    tokenizer: Tokenizer


def open_dataset(name):
    """data/<name>, as prepare.py wrote it."""
    with user_errors(f"--dataset={name!r}"):
        path = intact_dir(DATA / name)
        if not (path / "meta.json").exists():
            half = ", whose preparation was cut off" if path.with_name(f"{path.name}.part").exists() else ""
            make = f"python prepare.py --dataset={name}"
            raise UserError(f"--dataset={name}: no such set in {DATA}{half}; make it with {make}")
    tokenizer = Tokenizer.load(path)
    with user_errors(f"{path / 'meta.json'} does not describe what is here, prepare it again"):
        meta = read_json(path / "meta.json")
        if meta["vocab_size"] != tokenizer.vocab_size:
            raise ValueError(f"vocab_size {meta['vocab_size']}, tokenizer.json has {tokenizer.vocab_size}")
        if meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype {meta['dtype']!r}")
        if not isinstance(meta["floor_bits_per_byte"], float | None):
            raise ValueError("floor_bits_per_byte")
        for split in ("train", "val"):
            size, tokens = (path / f"{split}.bin").stat().st_size, meta[split]["tokens"]
            wanted = tokens * np.dtype(meta["dtype"]).itemsize
            if not (tokens > 0 < meta[split]["bytes"]):
                raise ValueError(f"no tokens in {split}")
            if size != wanted:
                raise ValueError(f"{tokens} tokens in {split}.bin are {wanted} bytes, the file has {size}")
    return Dataset(path, meta, tokenizer)


def document_ends(tokens, path, tokenizer):
    """Positions of the end-of-text tokens. Raises UserError for a token beyond the vocabulary."""
    ends = []
    for i in range(0, len(tokens), 2**24):  # in pieces, to save memory
        piece = tokens[i : i + 2**24]
        if (largest := int(piece.max())) >= tokenizer.vocab_size:
            at = i + int(piece.argmax())
            beyond = f"beyond the vocabulary of {tokenizer.vocab_size}"
            raise UserError(f"{path}: token {at} is {largest}, {beyond}: prepare it again")
        ends.append(np.flatnonzero(piece == tokenizer.eot) + i)
    return np.concatenate(ends)


def write_checkpoint(path, save_model, weights, state=None):
    """Write a model directory (and the state to resume from) beside `path`, make sure that it is whole and on the disk,
    then swap it in. Raises OSError where that fails; what was at `path` is then still there."""
    part = path.with_name(path.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_model(part, weights)
        if state is not None:
            torch.save(state, part / "train_state.pt")
            torch.load(part / "train_state.pt", map_location="meta", weights_only=True)
        for file in part.glob("*.safetensors"):
            tensor_shapes(file)
        atomic_replace_dir(part, path)
    except (OSError, RuntimeError, SafetensorError, ValueError) as e:  # torch and safetensors have errors of their own
        shutil.rmtree(part, ignore_errors=True)
        size = sum(t.nbytes for t in tree_leaves((weights, state)) if isinstance(t, torch.Tensor))
        free = shutil.disk_usage(path.parent).free
        before = "; the checkpoint of before is whole" if intact_dir(path).exists() else ""
        raise OSError(f"{path}: not saved: {first_line(e)} ({size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free)"
                      f"{before}") from None  # fmt: skip


def open_model(path, device, dtype=torch.float32, dropout=0.0):
    """Gemma.from_pretrained, with what can be wrong in one line."""
    path = intact_dir(Path(path))
    with user_errors(f"{path}: not a Gemma 3 model directory"):
        return Gemma.from_pretrained(path, device, dtype, dropout)


def refuse_another_architecture(arch, config, path):
    """Settings can't change the architecture of a trained model. What they leave at its default is not asked for."""
    free = {"bos_token_id", "eos_token_id", "pad_token_id", "sliding_window_pattern"}  # the last is in layer_types
    for f in fields(arch):
        asked, there, default = (getattr(c, f.name) for c in (arch, config, GemmaConfig()))
        if f.name not in free and asked not in (there, default):
            raise UserError(f"{f.name}={asked}: the model in {path} has {there}, which settings can't change")


def read_state(path, new, fixed, on_rank0=False):
    """The state of the run that left the checkpoint `path`, to go on from. new: what this run would start with; its
    dataset must be the same, and so must those of its settings that are in `fixed`; other changes are said.
    on_rank0: the other processes get the optimizer's tensors without their content."""
    wanted = {key: type(value) for key, value in NEW_STATE.items()} | {"optimizer": dict, "settings": dict}
    odd = f"{path / 'train_state.pt'} is not what this version's runs leave; start a new one with --init_from={path}"
    with user_errors(odd), warnings.catch_warnings(action="ignore"):  # of what is odd in it, one line is enough
        where = "meta" if on_rank0 and get_rank() else "cpu"
        state = torch.load(path / "train_state.pt", map_location=where, weights_only=True)
        for key, kind in wanted.items():
            if not isinstance(state[key], kind):
                raise ValueError(f"{key} is {type(state[key]).__name__}")
    if None not in (state.get("dataset"), new.get("dataset")) and state["dataset"] != new["dataset"]:
        raise UserError(f"the run in {path} was trained on another dataset than what is there now: name that one, or "
                        "start a new run")  # fmt: skip
    settings = {key: value for key, value in new["settings"].items() if value is not None and key != "init_from"}
    before, free = state["settings"], {"out_dir", "device", "eval_only"}
    if settings.get("max_minutes"):
        if before.get("max_minutes") != settings["max_minutes"]:
            raise UserError(f"--max_minutes={settings['max_minutes']:g}: the run in {path} is planned for "
                            f"{before['max_iters']} updates; for more, name --max_iters")  # fmt: skip
        settings["max_iters"] = before["max_iters"]
    changed = [key for key in settings if key in before and key not in free and before[key] != settings[key]]
    for key in changed:
        if key in fixed:
            raise UserError(f"{key}={settings[key]}: the run in {path} has {before[key]}; resume with that")
    if changed:
        now = ", ".join(f"{key} {before[key]} -> {settings[key]}" for key in changed)
        print(f"resuming with other settings than before: {now}")
    if "epochs" in changed:
        del before["max_iters"]  # which they decide, unless it is named too
    return {**state, "settings": before | settings}


def resolve_out_dir(cfg):
    """The settings, to resume where torchrun started us again. What lies in out_dir must be a run of ours, which will
    move aside, or nothing."""
    with user_errors(f"--out_dir={cfg.out_dir!r}"):
        out_dir = Path(cfg.out_dir)
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # after a crash, by --max-restarts
        job = out_dir / ".job"
        own = job.exists() and job.read_text() == os.environ.get("TORCHELASTIC_RUN_ID")  # not the run before
        if restarted and own and intact_dir(out_dir / "last").exists():
            cfg = replace(cfg, init_from="resume")
        if cfg.init_from == "resume" or not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
            return cfg
        there = out_dir.resolve()
        if not any((there / name).exists() for name in ("log.jsonl", "last", "best", ".job")):
            raise UserError(f"--out_dir={cfg.out_dir}: this is no run of ours, but has something in it: name another")
        if out_dir.is_symlink() or os.path.ismount(there) or Path.cwd().is_relative_to(there):
            raise UserError(f"--out_dir={cfg.out_dir}: the run in it can't be moved aside from there: name another")
        if Path(cfg.init_from).resolve().is_relative_to(there):
            raise UserError(f"--out_dir={cfg.out_dir}: contains the model to start from: name another")
    return cfg


def start_out_dir(cfg):
    """Make out_dir; a run that is already there is moved aside, unless we resume it."""
    out_dir = Path(cfg.out_dir)
    if get_rank() == 0:
        cfg = resolve_out_dir(cfg)  # once more for those who come without main()
        if cfg.init_from != "resume" and out_dir.exists() and any(out_dir.iterdir()):
            aside = out_dir.with_name(f"{out_dir.name}-{time.strftime('%Y%m%d-%H%M%S')}")
            os.replace(out_dir, aside)
            print(f"the run that was in {out_dir} is now in {aside}")
        out_dir.mkdir(parents=True, exist_ok=True)
        if job := os.environ.get("TORCHELASTIC_RUN_ID"):  # what torchrun calls this job, restarts included
            (out_dir / ".job").write_text(job)
    if dist.is_initialized():
        dist.barrier()


# ---- hardware --------------------------------------------------------------------------------------------------------

# dense bfloat16 FLOP/s of GPUs, summed in float32, as their makers state them, by whole words of the GPU's name; longer
# names first where one contains another. None: what the rest of the name says does not hold
PEAK_FLOPS = {
    "Laptop": None, "MIG": None, "RTX 4090 D": None, "RTX 5090 D": None,
    "GB200": 2500e12, "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "A100": 312e12, "A40": 150e12, "A30": 165e12, "A10": 125e12, "A10G": 70e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12, "RTX A5000": 111e12, "RTX A4000": 77e12,
    "RTX 5090": 209.5e12, "RTX 5080": 112.6e12, "RTX 5070 Ti": 87.9e12, "RTX 5070": 61.7e12,
    "RTX 4090": 165e12, "RTX 4080 SUPER": 104e12, "RTX 4080": 97.5e12, "RTX 4070 Ti SUPER": 88e12,
    "RTX 4070 Ti": 80e12, "RTX 4070 SUPER": 71e12, "RTX 4070": 58e12, "RTX 4060 Ti": 44e12, "RTX 4060": 30e12,
    "RTX 3090 Ti": 80e12, "RTX 3090": 71e12, "RTX 3080 Ti": 68e12, "RTX 3080": 59.5e12, "RTX 3070 Ti": 43.5e12,
    "RTX 3070": 40.6e12, "RTX 3060 Ti": 32.4e12, "RTX 3060": 25.5e12,
}  # fmt: skip


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with user_errors(f"--device={name}", RuntimeError, AssertionError):
        device = torch.device(name)
        torch.empty(1, device=device)
    return device


def pick_dtype(name, device):
    """bfloat16 where the hardware multiplies in it, float32 elsewhere. float16 overflows in Gemma 3."""
    if name == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        is_fast = {
            "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
            "mps": lambda: torch.backends.mps.is_macos_or_newer(14, 0),
            "cpu": lambda: cpu.get("avx512_bf16") or cpu.get("amx_bf16"),
        }
        name = "bfloat16" if is_fast.get(device.type, bool)() else "float32"
    if name not in ("bfloat16", "float32"):
        raise UserError(f"--dtype={name}: choose auto, bfloat16 or float32 (float16 overflows in Gemma 3)")
    return getattr(torch, name)


def can_compile(device):
    if device.type == "mps":  # where torch.compile is a prototype
        return False
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        print("no C++ compiler here: going on without torch.compile")
        return False
    if device.type == "cpu" and " " in torch.__file__:  # its command for the C++ compiler does not quote its own path
        print(f"torch.compile can't work from a folder with a space in its name, {Path(torch.__file__).parent}: "
              "going on without")  # fmt: skip
        return False
    return True


def to_device(batch, device):
    """Copy a batch. From pinned memory this does not wait for the GPU, which is busy with the batch before."""
    return [(t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True) for t in batch]


def autocast(device, dtype):
    """bfloat16 matrix products over float32 weights: small updates of a bfloat16 weight would be rounded away."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def peak_flops(device, dtype):
    """FLOP/s to hold the model's against: the maker's figure for a known GPU, else a matrix product's, timed here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        words = f" {torch.cuda.get_device_name(device).replace('-', ' ')} "
        if flops := next((flops for name, flops in PEAK_FLOPS.items() if f" {name} " in words), None):
            return flops
    n = 1024 if device.type == "cpu" else 4096
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def set_up(cfg):
    """The settings as they stand on this machine, and the device to train on."""
    if dist.is_torchelastic_launched():
        device = init_distributed(cfg.device)
    elif cfg.fsdp:
        raise UserError("--fsdp=True needs several processes: start it with torchrun")
    else:
        device = pick_device(cfg.device)
    dtype = str(pick_dtype(cfg.dtype, device)).removeprefix("torch.")
    if cfg.wandb:
        import wandb  # noqa: F401 -- where it is missing, say so before anything is touched
    cfg = replace(cfg, compile=cfg.compile and can_compile(device))
    processes = f" in {get_world_size()} processes" if get_world_size() > 1 else ""
    print(f"device: {device}{processes}, {dtype}, {'compiled' if cfg.compile else 'not compiled'}")
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu":  # else compiled code adds up the embedding's gradient in whatever order threads finish
        torch.use_deterministic_algorithms(True)
    return cfg, device


@contextlib.contextmanager
def runtime_errors(memory_hint):
    """Say in one line what PyTorch says in many: out of memory, another process gone."""
    try:
        yield
    except RuntimeError as e:
        reason = first_line(e)
        if any(sign in reason for sign in ("out of memory", "not enough memory", "can't allocate memory")):
            raise Failure(f"out of memory: {memory_hint} ({reason})") from None
        if dist.is_initialized() and ("gloo" in reason or "NCCL" in reason):
            raise Failure(f"another process is gone, or hangs: {reason}") from None
        raise


# ---- processes: torchrun starts several of this script, each with a device of its own --------------------------------


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def init_distributed(device_name):
    """Meet the other processes that torchrun started -> the device of this one."""
    local = int(os.environ["LOCAL_RANK"])
    on_gpu = device_name.startswith("cuda") or (device_name == "auto" and torch.cuda.is_available())
    if on_gpu and local >= torch.cuda.device_count():
        raise Failure(f"{torch.cuda.device_count()} GPUs here, fewer than --nproc_per_node")
    device = pick_device(f"cuda:{local}" if on_gpu else device_name)
    if on_gpu:
        torch.cuda.set_device(device)
    # after a restart torchrun's store still has the addresses of processes that are gone (pytorch issue 167288)
    store, number, count = next(rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    patience = timedelta(minutes=10)  # with one that hangs
    backend, gpu = ("nccl", device) if on_gpu else ("gloo", None)
    try:
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=patience, device_id=gpu)
    except RuntimeError as e:
        raise Failure(f"the processes did not meet: {first_line(e)}") from None
    if get_rank():
        sys.stdout = open(os.devnull, "w")
    return device


def shutdown_distributed(code=0):
    """End this process, one of several when all are done: gloo's threads do not always survive an orderly end."""
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def all_reduce_sum(tensor, device):
    """The sum of every process's tensor."""
    if dist.is_initialized():
        tensor = tensor.to(device)
        dist.all_reduce(tensor)
    return tensor


def local_micro_batches(micro_batches):
    """This process's part of an update: whole micro-batches where they share out evenly, else some rows of each."""
    if len(micro_batches) % get_world_size() == 0:
        return micro_batches[get_rank() :: get_world_size()]
    # without a row of its own a process comes along with one that has no targets
    mine = [[t[get_rank() :: get_world_size()] for t in batch] for batch in micro_batches]
    return [rows if len(rows[0]) else without_targets([t[:1] for t in batch])
            for rows, batch in zip(mine, micro_batches, strict=True)]  # fmt: skip


def without_targets(batch):
    """The batch with every target masked: the same shape and cost, no gradient."""
    x, y, *more = batch
    return [x, torch.full_like(y, -100), *more]


def compile_and_wrap_ddp(model, cfg):
    """The model as accumulate_gradients() calls it: compiled, and with gradients that are means over all processes."""
    if cfg.compile:
        if cfg.activation_memory < 1 and any(isinstance(m, torch.nn.Dropout) and m.p for m in model.modules()):
            raise UserError("activation_memory below 1 needs dropout=0: PyTorch would draw other numbers when it "
                            "computes again, and gradients would be wrong")  # fmt: skip
        torch._functorch.config.activation_memory_budget = cfg.activation_memory
        # dropout by PyTorch's own generator, on CPUs faster than by what is compiled for it
        torch._inductor.config.fallback_random = model.device.type == "cpu"
        model.compile_layers()
    return DistributedDataParallel(model) if dist.is_initialized() and not cfg.fsdp else model


def loading_device(cfg, device):
    """Where a model is made: on `device`; with FSDP in rank 0's main memory, from which apply_fsdp deals it out."""
    return device if not cfg.fsdp else torch.device("meta" if get_rank() else "cpu")


def apply_fsdp(model, device):
    """FSDP2: each process keeps a part of every weight, and gathers a block's while it computes with them. They are
    gathered in float32 and cast by autocast, so that the arithmetic is that of one process. Rank 0 has the weights."""
    from torch.distributed.fsdp import fully_shard  # half a second, for those who need it

    whole = dict(model.state_dict())
    model.to("meta")
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(distribute(whole.pop(name), p))


def distribute(tensor, like):
    """Rank 0's tensor, sharded as the DTensor `like`; whole where it is of another shape, as a count of updates."""
    from torch.distributed.tensor import distribute_tensor

    tensor = torch.empty_like(tensor, device=like.device) if tensor.is_meta else tensor.to(like.device)
    if tensor.shape != like.shape:
        dist.broadcast(tensor, 0)
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements)


def shard_like(tensor, like):
    """This process's part of a tensor that all have, sharded as the DTensor `like`; all of it where that is none."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, like.device_mesh, [Replicate()]).redistribute(placements=like.placements)


def share_work(function, stack):
    """function(stack), of a stack of things that all processes have: each works on a part of them."""
    if get_world_size() == 1:
        return function(stack)
    count = math.ceil(len(stack) / get_world_size())
    parts = F.pad(stack, (0, 0) * (stack.ndim - 1) + (0, count * get_world_size() - len(stack)))
    mine = function(parts[get_rank() * count :][:count]).contiguous()
    done = mine.new_empty(len(parts), *mine.shape[1:])
    dist.all_gather_into_tensor(done, mine)
    return done[: len(stack)]


def full_tensor(tensor):
    """A tensor, or all of a sharded one. To be called by all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_tensor_on_rank0(tensor):
    """A tensor for rank 0 to save: a sharded one made whole, in main memory."""
    whole = full_tensor(tensor)
    return whole if whole is tensor else whole.cpu() if get_rank() == 0 else None


if __name__ == "__main__":
    run(main, PretrainConfig, TrainConfig, GemmaConfig)
