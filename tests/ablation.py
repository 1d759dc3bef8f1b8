"""
What each choice of a recipe is worth: the same short training with one thing changed, over several seeds.

    python tests/ablation.py                                   # every variant on the fables, 600 updates, three seeds
    python tests/ablation.py --only="recipe,AdamW 2e-3" --seeds=5 --max_iters=1200
    python tests/ablation.py --recipe=config/train_tinystories_cpu.py --max_iters=200

A result is the mean over seeds of the last validation bits per byte, with their standard deviation. Hours for all of
them: two processes with OMP_NUM_THREADS=1 and different --only take half as long on two cores.
"""

import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

import config
import train


def random_starts():
    """Rows from anywhere in the corpus, as nanoGPT takes them, in place of rows that begin where a document does."""

    class AnywhereRows(train.PackedDataset):
        def __init__(self, path, meta, split, block_size, tokenizer):
            super().__init__(path, meta, split, block_size, tokenizer)
            if split == "train":
                size = len(self.tokens) - block_size - 1
                self.starts = np.random.default_rng(0).integers(0, size, len(self.starts))

    train.PackedDataset = AnywhereRows


def init_changed(change):
    """change(name, weight, config) is called for every weight after init_weights."""

    def patch():
        init_weights = train.Gemma.init_weights

        def changed(self, *args):
            model = init_weights(self, *args)
            for name, p in model.named_parameters():
                change(name, p.data, self.config)
            return model

        train.Gemma.init_weights = changed

    return patch


def scaled_outputs(name, weight, config):
    """Projections back into the residual stream start smaller, as GPT-2's."""
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        weight *= (2 * config.num_hidden_layers) ** -0.5


def identity_norms(name, weight, config):
    """The norms behind attention and MLP start with a gain of 1, as all others."""
    if "norm" in name:
        weight.zero_()


def large_embedding(name, weight, config):
    """The same balance of tokens and blocks, from the other side: embedded tokens start with an rms of 1."""
    identity_norms(name, weight, config)
    if "embed" in name:
        weight *= config.hidden_size**-0.5 / 0.02


def growing_batch():
    """Half the rows in the first half of the updates, one and a half times as many in the second."""

    def micro_batches(self, step):
        size, half = self.data_cfg.batch_size, self.cfg.max_iters // 2
        n = size // 2 if step < half else size * 3 // 2
        first = step * n if step < half else half * (size // 2) + (step - half) * n
        rows = [
            train.epoch_shuffled_indices(len(self.train_rows), 1, self.cfg.seed, i)[0] for i in range(first, first + n)
        ]
        return [self.train_rows.batch(rows)]

    train.Pretraining.micro_batches = micro_batches


ADAMW, COSINE = "--optimizer=adamw", "--schedule=cosine"
VARIANTS = {  # name: (flags, a patch)
    "recipe": ([], None),
    "AdamW 1e-3": ([ADAMW, "--learning_rate=1e-3"], None),
    "AdamW 2e-3": ([ADAMW, "--learning_rate=2e-3"], None),
    "AdamW 4e-3": ([ADAMW, "--learning_rate=4e-3"], None),
    "AdamW 8e-3": ([ADAMW, "--learning_rate=8e-3"], None),
    "AdamW 2e-3 cooldown 0.75": ([ADAMW, "--learning_rate=2e-3", "--cooldown_frac=0.75"], None),
    "AdamW 2e-3 cosine": ([ADAMW, "--learning_rate=2e-3", COSINE], None),
    "Muon 2.5e-3": (["--learning_rate=2.5e-3"], None),
    "Muon 4e-3": (["--learning_rate=4e-3"], None),
    "Muon 1e-2": (["--learning_rate=1e-2"], None),
    "momentum 0.8": (["--momentum=0.8"], None),
    "momentum 0.9": (["--momentum=0.9"], None),
    "momentum 0.95": (["--momentum=0.95"], None),
    "short run": (["--momentum=0.8", "--cooldown_frac=0.75"], None),
    "identity norms": ([], init_changed(identity_norms)),
    "large embedding": ([], init_changed(large_embedding)),
    "scaled outputs": ([], init_changed(scaled_outputs)),
    "cosine": ([COSINE], None),
    "cooldown 0.25": (["--cooldown_frac=0.25"], None),
    "cooldown 0.75": (["--cooldown_frac=0.75"], None),
    "cooldown 1.0": (["--cooldown_frac=1"], None),
    "warmup 20": (["--warmup_iters=20"], None),
    "beta2 0.99": (["--beta2=0.99"], None),
    "random starts": ([], random_starts),
    "growing batch": ([], growing_batch),
}


@dataclass
class AblationConfig:
    recipe: str = "config/train_fables.py"  # what is varied
    max_iters: int = 600  # updates of each run
    seeds: int = 3  # runs of each variant
    only: str = ""  # names of variants, with commas between; empty: all
    out: str = "out/ablation"  # the runs, and results.jsonl


def main(cfg):
    results = Path(cfg.out) / "results.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    for name in cfg.only.split(",") if cfg.only else VARIANTS:
        if name not in VARIANTS:
            raise config.UserError(f"--only={name}: choose from {', '.join(VARIANTS)}")
        bits = []
        for seed in range(cfg.seeds):
            out_dir = Path(cfg.out) / f"{name.replace(' ', '-')}-{seed}"
            flags = [cfg.recipe, *VARIANTS[name][0], f"--max_iters={cfg.max_iters}", f"--seed={seed}"]
            flags += [f"--out_dir={out_dir}", f"--eval_interval={cfg.max_iters}", "--sample_tokens=1"]
            shutil.rmtree(out_dir, ignore_errors=True)
            subprocess.run([sys.executable, __file__, "one", name, *flags], check=True, stdout=subprocess.DEVNULL)
            last = json.loads((out_dir / "log.jsonl").read_text().splitlines()[-1])
            bits.append(last["val_bpb"])
        spread = statistics.stdev(bits) if len(bits) > 1 else None
        line = json.dumps({"recipe": cfg.recipe, "max_iters": cfg.max_iters, "variant": name,
                           "val_bpb": round(statistics.mean(bits), 4), "stdev": spread and round(spread, 4),
                           "runs": [round(b, 4) for b in bits]})  # fmt: skip
        print(line, flush=True)
        with open(results, "a") as f:
            f.write(line + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        if patch := VARIANTS[sys.argv[2]][1]:
            patch()
        sys.argv = ["train.py", *sys.argv[3:]]
        config.run(train.main, train.PretrainConfig, train.TrainConfig, train.GemmaConfig)
    else:
        config.run(main, AblationConfig)
