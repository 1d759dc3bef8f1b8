"""
Draw what each position of Gemma 3 sees, asked of model.py's own code: python docs/draw_gemma3.py

Writes docs/gemma3-masks.png. A small model of the wanted layers runs forward, and each position's output is
differentiated with respect to all positions' inputs: where the gradient is not zero, the output sees the input.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib
import torch

from model import FULL, SLIDING, Gemma, GemmaConfig

T, WINDOW = 24, 4
PANELS = [
    ("one full layer", [FULL]),
    (f"one sliding layer, window {WINDOW}", [SLIDING]),
    ("five sliding layers, one after another", [SLIDING] * 5),
]


def visible(layer_types):
    """(T, T) booleans: whether the output at position i, a row, depends on the input at position j, a column."""
    config = GemmaConfig(
        vocab_size=T, hidden_size=32, intermediate_size=64, num_hidden_layers=len(layer_types), layer_types=layer_types,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=WINDOW, max_position_embeddings=T,
    )  # fmt: skip
    model, seen = Gemma(config).init_weights(0), {}
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.update(inputs=args[0]))
    model.model.layers[-1].register_forward_hook(lambda *args: seen.update(outputs=args[-1]))
    model(torch.arange(T)[None])
    rows = [torch.autograd.grad(y.sum(), seen["inputs"], retain_graph=True)[0][0] for y in seen["outputs"][0]]
    return torch.stack(rows).abs().sum(-1) > 0


def main():
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(10, 4.1), layout="constrained", sharey=True)
    for ax, (title, layer_types) in zip(axes, PANELS, strict=True):
        mask = visible(layer_types)
        ax.pcolormesh(mask, cmap="Blues", vmin=0, vmax=1.3, edgecolors="white", linewidth=0.5)
        ax.set_title(f"{title}:\nthe last sees {mask[-1].sum()} of {T} positions", fontsize=11)
        ax.set(xlabel="position seen", aspect="equal", xticks=range(0, T, 4), yticks=range(0, T, 4))
    axes[0].invert_yaxis()
    axes[0].set_ylabel("position that sees")
    figure.savefig(Path(__file__).with_name("gemma3-masks.png"), dpi=100)


if __name__ == "__main__":
    main()
