"""A run's log: terminal lines, log.jsonl and its copy in Weights & Biases, loss.png, samples.txt, summary.json."""

import contextlib
import json
import math
import os
import platform
import shutil
import sys
import time
from datetime import timedelta

import torch

from support.devices import peak_flops
from support.files import write_atomically
from support.processes import get_rank, get_world_size
from support.settings import Failure, UserError

CLEAR_LINE = "\033[K"  # in a terminal: erase from the cursor to the end of the line
MAX_SKIPPED = 5  # the run ends after this many steps in a row without a finite loss and gradient


def say(text, in_place=False):
    """Print a line at once. in_place: the next line overwrites this one, if this is a terminal. A closed pipe is not an
    error: Ctrl-C also ends `| tee`, and the run must still save."""
    end = "\n"
    if sys.stdout.isatty():
        text = CLEAR_LINE + (text[: shutil.get_terminal_size().columns - 1] if in_place else text)
        end = "\r" if in_place else "\n"
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class RunLog(contextlib.ExitStack):
    """The log of one run, until `with` ends. Rank 0 writes it. A resumed run drops what came after its checkpoint.
    folder: the RunFolder. state: the run's step, tokens, settings. floor: entropy floor in bits per byte, or None."""

    def __init__(self, folder, model, state, device, dtype, max_iters, floor=None, wandb=False):
        super().__init__()
        self.folder, self.model, self.state, self.device = folder, model, state, device
        self.max_iters, self.floor, self.wandb_run = max_iters, floor, None
        self.peak_flops = peak_flops(device, dtype) * get_world_size()
        self.skipped = 0  # skipped steps in a row
        self.started = time.perf_counter() - state.seconds
        self.restart_clock()
        if get_rank() == 0:
            path = folder.path / "log.jsonl"
            entries = [entry for entry in read_log(path) if entry.get("step", 0) <= state.step]
            write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in entries))
            if wandb:
                from wandb import init as init_wandb

                self.wandb_run = init_wandb(project="nanogemma", name=folder.path.name, config=state.settings)
                self.callback(self.wandb_run.finish)

    def elapsed(self):
        """Return the seconds that this run has trained, including the time before it was resumed."""
        return time.perf_counter() - self.started

    def restart_clock(self):
        """Measure tokens per second from here on."""
        self.clock_start, self.step_then, self.tokens_then = time.perf_counter(), self.state.step, self.state.tokens

    def step(self, batch, metrics):
        """Report a step: print a line, and add an entry to log.jsonl. batch: a micro-batch of this shape, to count
        FLOPs. metrics: "train_loss", "lr", "grad_norm" and any others; each is a number or a dict of numbers."""
        state, seconds = self.state, time.perf_counter() - self.clock_start
        per_second = (state.tokens - self.tokens_then) / seconds
        _, labels, *doc_ids = batch
        head_share = (labels != -100).float().mean().item() if doc_ids else 1.0  # with doc_ids only labels use the head
        mfu = per_second * self.model.flops_per_token(labels.shape[1], head_share) / self.peak_flops
        left = (self.max_iters - state.step) * seconds / (state.step - self.step_then)
        metrics, memory = metrics | {"tokens_per_sec": per_second, "mfu": mfu}, ""
        if self.device.type == "cuda":
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            memory = f" peak memory {metrics['peak_memory_gb']:.1f} GB,"
        self.write("step", metrics)
        say(f"step {state.step:5}/{self.max_iters}: loss {metrics['train_loss']:.4f}, lr {metrics['lr']:.2e}, "
            f"grad norm {metrics['grad_norm']:.2f}, {per_second:,.0f} tokens/s, {mfu:.0%} MFU,{memory} "
            f"{timedelta(seconds=int(left))} left", in_place=True)  # fmt: skip
        self.restart_clock()

    def evaluation(self, metrics, line, sample):
        """Report an evaluation: print it, add it to log.jsonl and samples.txt, and write loss.png and summary.json."""
        state, path = self.state, self.folder.path
        say(f"step {state.step}: {line}\n  {sample}\n")
        self.write("eval", {"best_val_loss": state.best_val_loss, **metrics, "sample": sample})
        title = f"--- step {state.step}, val loss {metrics['val_loss']:.4f}"
        self.folder.try_write(append, path / "samples.txt", f"{title}\n{sample}\n\n")
        self.folder.try_write(draw_loss, path / "loss.png", [path], self.floor)
        self.folder.try_write(self.write_summary, metrics)

    def check_finite(self, train_loss, grad_norm):
        """Report a step that optimizer_step() skipped. Raises Failure after MAX_SKIPPED such steps in a row."""
        if math.isfinite(train_loss) and math.isfinite(grad_norm):
            self.skipped = 0
            return
        self.skipped += 1
        say(f"step {self.state.step}: skipped, its loss is {train_loss} and its gradient norm {grad_norm}")
        self.write("skipped", {"train_loss": train_loss, "grad_norm": grad_norm})
        if self.skipped == MAX_SKIPPED:
            raise Failure(f"{self.skipped} steps in a row without a finite loss and gradient; the last checkpoint is "
                          f"{self.folder.path}/last; lower learning_rate, or look for odd rows of data")  # fmt: skip

    def write(self, event, values):
        """Append an entry to log.jsonl, and send its numbers to Weights & Biases."""
        counters = {key: getattr(self.state, key) for key in ("step", "tokens", "seconds")}
        entry = finite({"event": event, **counters, **values})
        start = "\n" if self.folder.errors else ""  # a failed write can leave a torn line
        self.folder.try_write(append, self.folder.path / "log.jsonl", start + json.dumps(entry) + "\n")
        if self.wandb_run:  # wandb names numbers in a nested dict "outer.inner"
            numbers = {k: v for k, v in entry.items() if isinstance(v, int | float | dict) and k != "step"}
            self.folder.try_write(self.wandb_run.log, numbers, self.state.step)

    def write_summary(self, metrics):
        """Write summary.json: the run's settings, progress and metrics, for other programs."""
        state, path = self.state, self.folder.path
        hardware = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        summary = {
            "name": path.name, "steps": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 1),
            "metrics": finite(metrics | {"best_val_loss": state.best_val_loss}), "floor_bits_per_byte": self.floor,
            "parameters": self.model.num_params(), "settings": state.settings,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "hardware": f"{get_world_size()} x {hardware}, {torch.get_num_threads()} CPU threads",
        }  # fmt: skip
        write_atomically(path / "summary.json", json.dumps(summary, indent=2) + "\n")


def finite(value):
    """Return the value with None in place of NaN and infinity, which JSON does not have."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def append(path, text):
    """Append a text to a file."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(text)


LOSS_OF = {"step": "train_loss", "eval": "val_loss", "skipped": "train_loss"}  # the loss in each kind of event


def read_log(path, event=None):
    """Return the entries of a log.jsonl, or those of one event with a finite loss. Damaged lines are left out."""
    entries = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, AttributeError):  # torn by a crash or a full disk, or not an object
            entry = json.loads(line)
            loss = LOSS_OF.get(str(entry.get("event")))  # None for an event of other code
            has_step = isinstance(entry.get("step", None if loss else 0), int)
            is_wanted = event is None or (entry.get("event") == event and entry.get(loss) is not None)
            if is_wanted and has_step and isinstance(entry.get(loss), float | None):
                entries.append(entry)
    return entries


def draw_loss(path, out_dirs, floor=None):
    """Plot the losses of some runs against steps and against minutes, as a PNG file. The unit is bits per byte, or
    nats per token for instruction tuning. The entropy floor is plotted if it is known."""
    from matplotlib.figure import Figure  # slow to import

    fig, lowest = Figure(figsize=(11, 4.5), layout="constrained"), math.inf
    axes = fig.subplots(1, 2, sharey=True)
    for i, out_dir in enumerate(out_dirs):
        steps, evals = (read_log(out_dir / "log.jsonl", event) for event in ("step", "eval"))
        if not evals:
            return
        bits = evals[0].get("val_bpb")
        unit = bits / evals[0]["val_loss"] if bits else 1
        train_losses, val_losses = [unit * e["train_loss"] for e in steps], [unit * e["val_loss"] for e in evals]
        lowest = min(lowest, *val_losses)
        for ax, label, key, per in zip(axes, ("step", "minutes"), ("step", "seconds"), (1, 60), strict=True):
            ax.plot([e[key] / per for e in steps], train_losses, f"C{i}", lw=0.6, alpha=0.4)
            ax.plot([e[key] / per for e in evals], val_losses, f"C{i}o-", ms=3, label=out_dir.name)
            ax.set(xlabel=label, ylabel="bits per byte" if bits else "nats per token")
    for ax in axes:
        if floor:
            ax.axhline(floor, color="black", ls=":", lw=1, label="entropy floor")
        ax.set_ylim(0.9 * (floor or lowest), 3 * lowest)
        ax.grid(alpha=0.3)
        ax.legend()
    fig.savefig(path, dpi=100)


def compare_runs(out_dirs):
    """Print the last evaluation of several runs, and plot them all in compare.png, beside the first run's folder."""
    units = set()
    for out_dir in out_dirs:
        evals = read_log(out_dir / "log.jsonl", "eval")
        if not evals:
            raise UserError(f"--compare: {out_dir / 'log.jsonl'} has no evaluation")
        last, bits = evals[-1], evals[-1].get("val_bpb")
        loss, unit = (bits, "bits per byte") if bits else (last["val_loss"], "nats per token")
        units.add(unit)
        print(f"{out_dir}: {loss:.4f} {unit} after {last['step']:,} steps, {last['tokens']:,} tokens, "
              f"{last['seconds'] / 60:.1f} minutes\n  {last['sample']}\n")  # fmt: skip
    if len(units) > 1:
        raise UserError("--compare: pretraining is in bits per byte, tuning in nats per token: name one kind of run")
    draw_loss(path := out_dirs[0].with_name("compare.png"), out_dirs)
    print(f"drawn to {path}")
