"""
Measure each choice in a recipe: repeat a short training with one thing changed, over several seeds.

    python tests/ablation.py                                   # every variant on the fables, 600 steps, three seeds
    python tests/ablation.py --only="recipe,AdamW 2e-3" --seeds=5 --max_iters=1200
    python tests/ablation.py --recipe=config/train_tinystories_cpu.py --max_iters=200

A result is the mean and standard deviation, over seeds, of the last validation bits per byte. results.jsonl has
all results, and ablation.png shows them. All variants take hours. On two cores, two processes with OMP_NUM_THREADS=1
and different --only take half as long.
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
import torch

import train
from lora import pack
from support.datasets import document_ends
from support.settings import UserError, run


def random_starts():
    """Start rows anywhere in the corpus, as in nanoGPT, instead of at the start of a document."""

    class AnywhereRows(train.PackedDataset):
        def __init__(self, dataset, split, block_size):
            super().__init__(dataset, split, block_size)
            if split == "train":
                size = len(self.tokens) - block_size - 1
                self.starts = np.random.default_rng(0).integers(0, size, len(self.starts))

    train.PackedDataset = AnywhereRows


def whole_documents():
    """Pack rows with whole documents. A token attends only within its document. Evaluate on such rows too."""

    class WholeDocuments(train.PackedDataset):
        def __init__(self, dataset, split, block_size):
            super().__init__(dataset, split, block_size)
            ends = document_ends(self.tokens, dataset.path / f"{split}.bin", dataset.tokenizer)
            self.first_tokens = np.concatenate([[0], ends[:-1] + 1])
            self.lengths = np.minimum(ends + 1 - self.first_tokens, block_size)
            self.rows = pack(self.lengths.tolist(), block_size)
            self.num_new_labels = np.array([self.lengths[row].sum() for row in self.rows])

        def __len__(self):
            return len(self.rows)

        def batch(self, rows, new_only=False):
            x = np.full((len(rows), self.block_size), self.eot, dtype=np.int64)
            y, doc_ids = np.full_like(x, -100), np.zeros_like(x)
            for i, row in enumerate(rows):
                at = 0
                for number, d in enumerate(self.rows[row], 1):
                    first, n = self.first_tokens[d], self.lengths[d]
                    y[i, at : at + n] = self.tokens[first : first + n]
                    x[i, at + 1 : at + n], doc_ids[i, at : at + n] = y[i, at : at + n - 1], number
                    at += n
            return tuple(map(torch.from_numpy, (x, y, doc_ids)))

    def batches(self):
        size = self.batch_size
        for i in range(0, self.num_rows // size * size, size):
            yield self.rows.batch(range(i, i + size))

    train.PackedDataset, train.ValidationSet.__iter__ = WholeDocuments, batches


def init_changed(change):
    """Call change(name, weight, config) for every weight after init_weights()."""

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
    """Projections back into the residual stream start smaller, as in GPT-2."""
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        weight *= (2 * config.num_hidden_layers) ** -0.5


def identity_norms(name, weight, config):
    """The norms after attention and MLP start with a gain of 1, like all other norms."""
    if "norm" in name:
        weight.zero_()


def large_embedding(name, weight, config):
    """Embedded tokens start with an rms of 1, which gives tokens and blocks the same balance in another way."""
    identity_norms(name, weight, config)
    if "embed" in name:
        weight *= config.hidden_size**-0.5 / 0.02


def growing_batch():
    """Steps in the first half have half as many rows, steps in the second half one and a half times as many."""

    def micro_batches(self, step):
        size, half = self.data_cfg.batch_size, self.cfg.max_iters // 2
        n = size // 2 if step < half else size * 3 // 2
        first = step * n if step < half else half * (size // 2) + (step - half) * n
        rows = [
            train.epoch_shuffled_indices(len(self.train_rows), 1, self.cfg.seed, i)[0] for i in range(first, first + n)
        ]
        return [self.train_rows.batch(rows)]

    train.Pretraining.micro_batches = micro_batches


def momentum_schedule():
    """Muon's momentum rises from 0.85 in the first tenth of the steps, and falls back to it in the last tenth."""
    set_learning_rate = train.set_learning_rate

    def scheduled(optimizers, step, cfg):
        done = step / cfg.max_iters
        for group in optimizers[0].param_groups:
            group["momentum"] = 0.85 + (cfg.momentum - 0.85) * min(1, 10 * done, 10 * (1 - done))
        return set_learning_rate(optimizers, step, cfg)

    train.set_learning_rate = scheduled


def row_normalized():
    """NorMuon (Li et al. 2025): each row of an orthogonalized update is divided by its running rms."""
    orthogonalize, mean_squares = train.orthogonalize, {}

    def normalized(stack):
        updates = orthogonalize(stack).float()
        mean_square = mean_squares.setdefault(stack.shape, torch.zeros(*stack.shape[:2], 1))
        mean_square.lerp_(updates.square().mean(2, keepdim=True), 0.05)
        rows = updates / mean_square.sqrt().clamp(min=1e-8)
        return rows * (updates.norm(dim=(1, 2), keepdim=True) / rows.norm(dim=(1, 2), keepdim=True))

    train.orthogonalize = normalized


JORDAN = [(3.4445, -4.7750, 2.0315)] * 5  # the coefficients of train.orthogonalize
POLAR_EXPRESS = [  # Amsel et al. 2025, best for five steps
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]


def newton_schulz(coefficients):
    """Orthogonalize with these coefficients, three for each step."""

    def orthogonalize(stack):
        wide = stack.mT if stack.shape[1] > stack.shape[2] else stack
        x = wide.bfloat16()
        x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-6)
        for a, b, c in coefficients:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x if wide is stack else x.mT

    def patch():
        train.orthogonalize = orthogonalize

    return patch


def adamw_with(scale=1.0, **settings):
    """Give the AdamW of embedding and norms its own settings."""

    def patch():
        muon = train.muon

        def changed(matrices, others, cfg):
            first, adamw = muon(matrices, others, cfg)
            for group in adamw.param_groups:
                group |= {"lr_scale": scale} | settings
            return [first, adamw]

        train.OPTIMIZERS["muon"] = changed

    return patch


def cautious_decay(strength):
    """Weights decay only where the update makes them smaller anyway (Chen et al. 2025). The decay is scaled by the
    learning rate, so both end at zero."""

    def patch():
        shard_like = train.shard_like

        def decayed(update, p):
            update = shard_like(update, p)
            return update + strength * p * (update * p > 0)

        train.shard_like = decayed

    return patch


def separate_cooldowns():
    """The learning rate of embedding and norms decays over half as many steps as the matrices' rate."""
    set_learning_rate = train.set_learning_rate

    def separate(optimizers, step, cfg):
        done, cooldown = step / cfg.max_iters, cfg.cooldown_frac
        for group in optimizers[-1].param_groups:
            group["lr_scale"] = min(1, 2 * (1 - done) / cooldown) / min(1, (1 - done) / cooldown)
        return set_learning_rate(optimizers, step, cfg)

    train.set_learning_rate = separate


def averaged_weights(decay):
    """Evaluate a running mean of the weights."""

    def patch():
        optimizer_step, evaluate, means = train.optimizer_step, train.evaluate, {}

        def step(optimizers, *args):
            result = optimizer_step(optimizers, *args)
            for p in (p for group in train.groups_of(optimizers) for p in group["params"]):
                means.setdefault(p, p.detach().clone()).lerp_(p.detach(), 1 - decay)
            return result

        def swap():
            for p, mean in means.items():
                p.data, means[p] = mean, p.data

        def evaluate_mean(*args):
            swap()
            loss = evaluate(*args)
            swap()
            return loss

        train.optimizer_step, train.evaluate = step, evaluate_mean

    return patch


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
    "momentum schedule": (["--momentum=0.95"], momentum_schedule),
    "rows normalized": ([], row_normalized),
    "polar express": ([], newton_schulz(POLAR_EXPRESS)),
    "polar express 4": ([], newton_schulz(POLAR_EXPRESS[:4])),
    "polar express 3": ([], newton_schulz(POLAR_EXPRESS[:3])),
    "Newton-Schulz 4": ([], newton_schulz(JORDAN[:4])),
    "Newton-Schulz 3": ([], newton_schulz(JORDAN[:3])),
    "embedding and norms x 0.3": ([], adamw_with(0.3)),
    "embedding and norms x 3": ([], adamw_with(3.0)),
    "beta1 0.8 and eps 1e-10": ([], adamw_with(betas=(0.8, 0.95), eps=1e-10)),
    "weight decay 0.1": (["--weight_decay=0.1"], None),
    "weight decay 1": (["--weight_decay=1"], None),
    "cautious decay 0.1": ([], cautious_decay(0.1)),
    "cautious decay 1": ([], cautious_decay(1.0)),
    "separate cooldowns": ([], separate_cooldowns),
    "mean of weights 0.98": ([], averaged_weights(0.98)),
    "mean of weights 0.98 and cooldown 0.25": (["--cooldown_frac=0.25"], averaged_weights(0.98)),
    "random starts": ([], random_starts),
    "whole documents 4x448": (["--batch_size=4", "--block_size=448"], whole_documents),
    "rows of 448": (["--batch_size=4", "--block_size=448"], None),
    "growing batch": ([], growing_batch),
}


@dataclass
class AblationConfig:
    recipe: str = "config/train_fables.py"  # the recipe to vary
    max_iters: int = 600  # steps of each run
    seeds: int = 3  # runs of each variant
    only: str = ""  # names of variants, separated by commas; empty: all
    out: str = "out/ablation"  # folder for the runs and results.jsonl


def main(cfg):
    results = Path(cfg.out) / "results.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    for name in cfg.only.split(",") if cfg.only else VARIANTS:
        if name not in VARIANTS:
            raise UserError(f"--only={name}: choose from {', '.join(VARIANTS)}")
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
        draw(results)


def draw(results):
    """Draw ablation.png beside results.jsonl: a panel for each recipe and length, bars of one standard deviation."""
    from matplotlib.figure import Figure

    panels = {}
    for line in map(json.loads, results.read_text().splitlines()):
        title = f"{Path(line['recipe']).stem}, {line['max_iters']} steps"
        panels.setdefault(title, {})[line["variant"]] = line["val_bpb"], line["stdev"] or 0.0
    height = 1 + 0.25 * max(map(len, panels.values()))
    fig = Figure(figsize=(6 * len(panels), height), layout="constrained")
    for ax, (title, variants) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        names = sorted(variants, key=variants.get, reverse=True)
        means, spreads = zip(*map(variants.get, names), strict=True)
        ax.errorbar(means, names, xerr=spreads, fmt="o", ms=4, capsize=3)
        ax.set(title=title, xlabel="validation bits per byte")
        ax.grid(alpha=0.3)
    fig.savefig(results.with_name("ablation.png"), dpi=100)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        if patch := VARIANTS[sys.argv[2]][1]:
            patch()
        sys.argv = ["train.py", *sys.argv[3:]]
        run(train.main, train.PretrainConfig, train.TrainConfig, train.GemmaConfig)
    else:
        run(main, AblationConfig)
