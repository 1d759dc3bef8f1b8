"""
Read what a model writes.

    python sample.py --start="Once upon"                  # the newest best checkpoint under out/
    python sample.py --out_dir=out/fables --num_samples=4
    python sample.py --model=path/to/any/gemma3 --start=FILE:prompt.txt
    python sample.py --interactive=True                   # keeps asking for a beginning
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from config import UserError, run
from prepare import Tokenizer
from train import open_model, pick_device, pick_dtype, whole_checkpoint


@dataclass
class SampleConfig:
    start: str = ""  # the beginning of the text; FILE:path reads it from a file; empty: a new document
    out_dir: str = ""  # sample from the best checkpoint of this run; empty: of the newest run under out/
    model: str = ""  # or from this model directory
    num_samples: int = 1  # texts from the same beginning, made as one batch
    max_new_tokens: int = 300  # stop here, if not at end-of-text before
    temperature: float = 0.8  # 0: always the likeliest token; 1: as the model has it
    top_k: int = 0  # draw from the k likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the smallest set of tokens with this mass
    min_p: float = 0.0  # drop tokens less than min_p times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens seen before become less likely
    seed: int = 1337  # the same seed gives the same text
    interactive: bool = False  # read beginnings from the terminal, one a line
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # bfloat16, float32; auto: bfloat16 where it is fast

    def __post_init__(self):
        for key, low in (("num_samples", 1), ("max_new_tokens", 0), ("temperature", 0), ("top_k", 0), ("min_p", 0)):
            if getattr(self, key) < low:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {low}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0")


def find_checkpoint(cfg):
    """The model directory that the settings name."""
    if cfg.model:
        return Path(cfg.model)
    if cfg.out_dir:
        path = whole_checkpoint(Path(cfg.out_dir) / "best")
        if not path.is_dir():
            raise UserError(f"--out_dir={cfg.out_dir}: no checkpoint in {path}")
        return path
    found = list(Path("out").glob("*/best/config.json"))
    if not found:
        raise UserError("no checkpoint under out/: train one first, python train.py config/train_fables.py")
    return max(found, key=lambda p: p.stat().st_mtime).parent


def continue_text(model, tokenizer, text, cfg, device):
    """Yield (sample, its text so far) after every token, `text` included; all samples come as one batch."""
    ids = [tokenizer.eot, *map(int, tokenizer.encode(text))]  # documents begin after an end-of-text token
    limit = model.config.max_position_embeddings
    if len(ids) >= limit:
        raise UserError(f"the prompt's {len(ids)} tokens leave no room in the model's {limit} positions: shorten it")
    prompt = torch.tensor([ids] * cfg.num_samples, device=device)
    made = [[] for _ in range(cfg.num_samples)]
    steps = model.generate(
        prompt, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.repetition_penalty,
        stop_ids=[tokenizer.eot], seed=cfg.seed,
    )  # fmt: skip
    for tokens in steps:
        for i, token in enumerate(tokens.tolist()):
            made[i].append(token)
            yield i, text + tokenizer.decode(made[i])


def write(model, tokenizer, text, cfg, device):
    """Print the samples: one streams, several come when all are done."""
    started, texts, shown = time.perf_counter(), [text] * cfg.num_samples, 0
    if cfg.num_samples == 1:
        print(text, end="", flush=True)
        shown = len(text)
    count = 0
    for i, so_far in continue_text(model, tokenizer, text, cfg, device):
        texts[i] = so_far
        count += 1
        if cfg.num_samples == 1 and not so_far.endswith("\ufffd"):  # not in the middle of a character
            print(so_far[shown:], end="", flush=True)
            shown = len(so_far)
    if cfg.num_samples > 1:
        print("\n\n---\n\n".join(texts), end="")
    seconds = time.perf_counter() - started
    print(f"\n\n[{count} tokens, {count / seconds:.0f} per second]")


def main(cfg):
    device = pick_device(cfg.device)
    path = find_checkpoint(cfg)
    model = open_model(path, device).to(pick_dtype(cfg.dtype, device)).eval()
    tokenizer = Tokenizer.load(path)
    text = cfg.start
    if text.startswith("FILE:"):
        try:
            text = Path(text[5:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--start={text}: {e}") from None
    print(f"[{path}]\n")
    if not cfg.interactive:
        return write(model, tokenizer, text, cfg, device)
    while True:
        try:
            text = input("> ")
        except EOFError:
            return print()
        try:
            write(model, tokenizer, text, cfg, device)
        except UserError as e:
            print(e)  # and go on asking


if __name__ == "__main__":
    run(main, SampleConfig)
