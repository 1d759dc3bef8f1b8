"""
All of Gemma 3 in one file: configuration, layers, generation with a KV cache, loading and saving.

    model = Gemma.from_pretrained("out/fables/best")           # any Gemma 3 directory in the Hugging Face format
    loss = model(tokens, labels)                               # (B, T), (B, T) -> mean cross-entropy in nats
    for token in model.generate(prompt, max_new_tokens=100):   # (B, T) -> a (B,) tensor per step
        ...

Modules and settings have the names of transformers' Gemma3ForCausalLM, so each opens the other's checkpoints. The
mathematics follows google/gemma_pytorch (gemma/model.py) and transformers (modeling_gemma3.py).

Letters in shapes: B batch, T time, C hidden_size, H attention heads, K key/value heads, D head_dim, V vocabulary.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

# The kinds of layers. To add a third kind, also extend check_config(), the contexts in Gemma.forward(), KVCache.slots
# and valid_slots(), flops_per_token() and support/export_gguf.py
SLIDING, FULL = "sliding_attention", "full_attention"
# activation functions by transformers' names: x -> a tensor of the same shape
ACTIVATIONS = {
    # x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), with (1 + tanh y) / 2 written as sigmoid(2 y), which takes one exp
    "gelu_pytorch_tanh": lambda x: x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
}


@dataclass
class GemmaConfig:
    """The architecture, in Hugging Face's names, as config.json stores it. The defaults are Gemma 3 270M."""

    vocab_size: int = 262144  # rows of the embedding; when training from scratch, the tokenizer's size rounded up
    hidden_size: int = 640  # width of the residual stream
    intermediate_size: int = 2048  # width of the gated MLP
    hidden_activation: str = "gelu_pytorch_tanh"  # activation of the MLP's gate, a name in model.py's ACTIVATIONS
    num_hidden_layers: int = 18  # blocks
    num_attention_heads: int = 4  # query heads
    num_key_value_heads: int = 1  # key/value heads, each shared by a group of query heads
    head_dim: int = 256  # width of a head; need not be hidden_size / num_attention_heads
    query_pre_attn_scalar: int | None = None  # attention scores are divided by its square root; None: head_dim
    max_position_embeddings: int = 32768  # longest sequence
    sliding_window: int = 512  # a query of a sliding layer sees itself and the window - 1 tokens before it
    sliding_window_pattern: int = 6  # every n-th layer attends to all earlier tokens, the others slide
    layer_types: list | None = None  # kind of each layer; None: from sliding_window_pattern
    rope_theta: float = 1_000_000.0  # RoPE base of full layers
    rope_local_base_freq: float = 10_000.0  # RoPE base of sliding layers
    rope_linear_factor: float = 1.0  # full layers divide positions by this (8 from Gemma 3 4B up)
    rms_norm_eps: float = 1e-6  # added to the mean square in every RMSNorm
    bos_token_id: int | None = 2  # begins a text; in training from scratch, the tokenizer sets all three ids
    eos_token_id: int | list | None = 1  # ends a text
    pad_token_id: int | None = 0  # fills up a batch

    def __post_init__(self):
        check_config(self)
        self.query_pre_attn_scalar = self.query_pre_attn_scalar or self.head_dim
        layers, n = range(self.num_hidden_layers), self.sliding_window_pattern
        self.layer_types = self.layer_types or [SLIDING if (i + 1) % n else FULL for i in layers]


def linear(x, weight, packed=None):
    """Return x (..., in) times weight (out, in), shape (..., out). packed: None, or (weight in oneDNN's layout, version
    of the weight that was packed). It gives the same bits in half the time on CPUs, and is ignored if it is stale."""
    if packed is None or packed[1] != weight._version:
        return F.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, packed[0], None, "none", [], "")


class Linear(nn.Linear):
    """A linear layer whose weight Gemma.pack_weights() can pack."""

    packed = None

    def forward(self, x):
        return linear(x, self.weight, self.packed)


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), computed in float32 and cast at the end. weight = 0 means a gain of 1."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).type_as(x)


def rope_table(positions, head_dim, base, factor):
    """Return RoPE's cosines and sines for positions (B or 1, T): float32 tensors (B or 1, 1, T, D/2). Pair d rotates
    by base^(-2d/D) radians per position (Su et al. 2021). Positions are divided by `factor` (linear scaling)."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = (positions.float() / factor)[:, None, :, None] / base**exponent
    return angles.cos(), angles.sin()


def apply_rope(x, rope):
    """Rotate x (B, heads, T, D) by its positions. Pairs are (d, d + D/2), the layout of the published weights."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)  # (B, heads, T, D/2) each
    rotated_a = torch.addcmul(a * cos, b, sin, value=-1)  # a cos - b sin
    rotated_b = torch.addcmul(b * cos, a, sin)  # b cos + a sin
    return torch.cat((rotated_a, rotated_b), dim=-1).type_as(x)


# ---- attention -------------------------------------------------------------------------------------------------------

QUERY_BLOCK = 128  # queries in a block of blocked_attention()


def blocked_attention(q, k, v, window, scale, dropout, doc_ids=None):
    """Causal attention of q (B, H, T, D) to k, v (B, K, T, D). Each query sees its own key and the window - 1 keys
    before it, with doc_ids (B, T) only those of its own document. Queries are multiplied in blocks, and only by keys
    that the block can see, so keys outside the window cost nothing. On CPUs this is faster than PyTorch's flash kernel,
    above all backward (tests/benchmark.py --job=attention)."""
    (B, H, T, D), K = q.shape, k.shape[1]
    # int32, because a CPU's vector register holds twice as many int32 as int64
    positions, blocks = torch.arange(T, device=q.device, dtype=torch.int32), []
    for start in range(0, T, QUERY_BLOCK):
        end, first = min(start + QUERY_BLOCK, T), max(0, start + 1 - window)
        q_i = q[:, :, start:end].reshape(B, K, -1, D)  # heads that share keys share one product
        scores = (q_i @ k[:, :, first:end].transpose(2, 3)).view(B, H, end - start, end - first).float() * scale
        distance = positions[start:end, None] - positions[first:end]
        hidden = (distance < 0) | (distance >= window)
        if doc_ids is not None:
            hidden = hidden | (doc_ids[:, None, start:end, None] != doc_ids[:, None, None, first:end])
        scores = scores.masked_fill(hidden, -math.inf)
        weights = F.dropout(scores.softmax(-1), dropout).type_as(v)
        blocks.append((weights.view(B, K, -1, end - first) @ v[:, :, first:end]).view(B, H, end - start, D))
    return torch.cat(blocks, dim=2)


def flash_attention(q, k, v, window, scale, dropout, doc_ids):
    """blocked_attention() as one kernel, FlashAttention-2. Requires dropout 0 and doc_ids None. PyTorch's varlen_attn
    could use doc_ids, but its gradients are wrong when PyTorch 2.11 compiles it (docs/gpu.md)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    T, more = q.shape[1], {"scale": scale, "window_size_left": window - 1, "window_size_right": 0}
    y, *_ = torch.ops.aten._flash_attention_forward(q, k, v, None, None, T, T, dropout, False, False, **more)
    return y.transpose(1, 2)


def cached_attention(q, k, v, window, scale, dropout, valid):
    """Attention of one token, q (B, H, 1, D), to the slots of a KVCache, k and v (B, K, slots, D), where `valid`
    (slots,) is true. `window` and `dropout` are ignored: the cache holds only the window."""
    grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])  # (B, K, H/K, D): heads that share keys share one product
    scores = (grouped @ k.transpose(2, 3)).float() * scale
    return (scores.masked_fill(~valid, -math.inf).softmax(-1).type_as(v) @ v).view(q.shape)


class AttentionContext(NamedTuple):
    """The arguments that all attention layers of one kind share in a forward pass. Each kind of layer has its own."""

    rope: tuple  # from rope_table()
    attend: Any  # blocked_attention, flash_attention or cached_attention
    window: int  # how many keys each query sees, its own included
    mask: torch.Tensor | None  # doc_ids, or the valid slots of the cache
    cache: Any  # KVCache, or None


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm on queries and keys, then RoPE."""

    def __init__(self, config, layer, dropout):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.layer, self.head_dim, self.dropout = layer, D, dropout
        self.scale = config.query_pre_attn_scalar**-0.5
        self.q_proj = Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = Linear(config.num_attention_heads * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.rms_norm_eps)
        self.k_norm = RMSNorm(D, config.rms_norm_eps)

    def forward(self, x, context):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        q, k = apply_rope(self.q_norm(q), context.rope), apply_rope(self.k_norm(k), context.rope)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        y = context.attend(q, k, v, context.window, self.scale, dropout, context.mask)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, H*D) -> (B, T, C)


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        C, I = config.hidden_size, config.intermediate_size  # noqa: E741
        self.gate_proj = Linear(C, I, bias=False)
        self.up_proj = Linear(C, I, bias=False)
        self.down_proj = Linear(I, C, bias=False)
        self.activation = ACTIVATIONS[config.hidden_activation]

    def forward(self, x):
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then MLP. Each has a norm before it and another one after it, and is then added to the residual."""

    def __init__(self, config, layer, dropout):
        super().__init__()
        self.kind = config.layer_types[layer]
        self.self_attn = Attention(config, layer, dropout)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, context):
        y = self.self_attn(self.input_layernorm(x), context)
        x = x + self.dropout(self.post_attention_layernorm(y))
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.dropout(self.post_feedforward_layernorm(y))


def select_labels(x, labels):
    """Return the positions of x (N, C) that have a label, and their labels, from labels (N,). Both are padded to a
    multiple of N / 4, so that the compiled loss sees only four shapes."""
    quarter, rows = max(1, math.ceil(len(labels) / 4)), (labels != -100).nonzero()[:, 0]
    padding = (0, max(1, math.ceil(len(rows) / quarter)) * quarter - len(rows))
    return x.index_select(0, F.pad(rows, padding)), F.pad(labels[rows], padding, value=-100)


CHUNK = 2**24  # logits that LinearCrossEntropy computes at once: 64 MB, and 128 MB for their gradients; 8x on GPUs


class LinearCrossEntropy(torch.autograd.Function):
    """The head and its cross-entropy, summed over the labels that are not -100. It never holds all logits, because for
    B 32, T 1024 and a vocabulary of 50,304 they would take 6.6 GB. forward() works in chunks of positions: it computes
    a chunk's logits, its loss and at once its gradients. backward() only scales these gradients. The gradient is
    written by hand: if you change the logits, change the line of `grad` too (tests/test_model.py checks it)."""

    @staticmethod
    def forward(ctx, x, weight, labels, with_gradients):
        """x (N, C), weight (V, C), labels (N,) -> a float32 number."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        w = weight.to(dtype)
        grad_x = torch.empty_like(x) if with_gradients else None
        grad_w = torch.zeros_like(weight, dtype=torch.float32) if with_gradients and ctx.needs_input_grad[1] else None
        loss = torch.zeros((), device=x.device)
        rows = max(1, CHUNK * (1 if device == "cpu" else 8) // len(weight))
        tokens = torch.arange(len(weight), device=x.device, dtype=torch.int32)
        for i in range(0, len(x), rows):
            x_i, y = x[i : i + rows].to(dtype), labels[i : i + rows, None]
            logits = F.linear(x_i, w).float()  # (rows, V)
            log_sum = logits.logsumexp(-1, keepdim=True)
            index, has_label = y.clamp(min=0), y != -100
            # not in place, because torch.compile of PyTorch 2.11 would lose the gradient of the result
            loss = loss + ((log_sum - logits.gather(1, index)) * has_label).sum()
            if with_gradients:
                # d loss / d logits: the probabilities, minus 1 at the label
                grad = (((logits - log_sum).exp() - (index.int() == tokens).float()) * has_label).to(dtype)
                grad_x[i : i + rows] = grad @ w
                if grad_w is not None:
                    grad_w += grad.T @ x_i
        ctx.save_for_backward(grad_x, grad_w)
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad, None if grad_w is None else grad_w * grad, None, None


class Gemma(nn.Module):
    """The model. `dropout` acts on attention weights, both residual branches and the embedding (0 in Gemma 3)."""

    packed, packed_rows = None, 0  # the packed head and its number of rows, see pack_weights()

    def __init__(self, config, dropout=0.0):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model["layers"] = nn.ModuleList(Block(config, i, dropout) for i in range(config.num_hidden_layers))
        self.model["norm"] = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.compiled_decode_step = None

    def forward(self, tokens, labels=None, doc_ids=None, reduction="mean", cache=None):
        """Return the logits (B, T, V) of tokens (B, T) int64.

        With labels (B, T): return the cross-entropy in nats, the "mean" or "sum" over the labels that are not -100.
        With doc_ids (B, T), the document number of each token: a token attends only within its own document, and each
        document's positions start at 0, as if it had a row of its own.
        With a KVCache: tokens are a prompt for an empty cache, or the one token (B, 1) that follows the cached tokens.
        Return the logits of the last position only, (B, 1, V)."""
        config, embedding = self.config, self.model.embed_tokens.weight
        T, limit = tokens.shape[1], config.max_position_embeddings
        if T > limit and doc_ids is None:
            raise ValueError(f"{T} tokens are more than the model's max_position_embeddings={limit}")
        positions = torch.arange(T, device=tokens.device)[None]
        if cache is not None:
            positions = positions + cache.length
        elif doc_ids is not None:
            is_first = doc_ids != F.pad(doc_ids[:, :-1], (1, 0), value=-1)  # (B, T), true where a document starts
            positions = positions - (positions * is_first).cummax(1).values
            doc_ids = doc_ids.int()  # faster in blocked_attention()
        if cache is not None and T == 1:
            attend, mask = cached_attention, cache.valid_slots()
        else:
            use_flash = doc_ids is None and self.can_use_flash()
            attend, mask = flash_attention if use_flash else blocked_attention, {SLIDING: doc_ids, FULL: doc_ids}
        local_rope = rope_table(positions, config.head_dim, config.rope_local_base_freq, 1.0)
        global_rope = rope_table(positions, config.head_dim, config.rope_theta, config.rope_linear_factor)
        window = min(T, config.sliding_window)
        contexts = {
            SLIDING: AttentionContext(local_rope, attend, window, mask[SLIDING], cache),
            FULL: AttentionContext(global_rope, attend, T, mask[FULL], cache),
        }

        # The scale is rounded, as in the published models (25.25 for 270M in bfloat16). The norms have the dtype of the
        # residual stream, even if lora.py stores frozen matrices in bfloat16
        dtype = self.model.norm.weight.dtype
        x = F.embedding(tokens, embedding).to(dtype) * torch.tensor(config.hidden_size**0.5, dtype=dtype)
        x = self.dropout(x)  # (B, T, C)
        for block in self.model.layers:
            x = block(x, contexts[block.kind])
        if cache is not None:
            cache.length += T
            x = x[:, -1:]
        if labels is None:
            return linear(self.model.norm(x).to(self.head_weight.dtype), self.head_weight, self.packed)  # (B, T, V)
        x, y = x.flatten(0, 1), labels.flatten()
        if doc_ids is not None:  # instruction tuning: most positions have no label and skip the head
            x, y = select_labels(x, y)
        loss = self.loss(x, y)
        return loss / (labels != -100).sum() if reduction == "mean" else loss

    @property
    def head_weight(self):
        """The matrix (V, C) that produces the logits. Gemma 3 uses the embedding."""
        return self.model.embed_tokens.weight

    def loss(self, x, labels):
        """Return the summed cross-entropy in nats of x (N, C) after the last norm and the head, for labels (N,)."""
        return LinearCrossEntropy.apply(self.model.norm(x), self.head_weight, labels, torch.is_grad_enabled())

    def compile_layers(self):
        """Compile each block and the loss for training. All layers of a kind share one graph. So a deep model compiles
        as fast as a shallow one, and the compiler plans memory for one layer at a time."""
        # the loss is compiled for four shapes from select_labels(), with and without gradients, and for pretraining
        torch._dynamo.config.recompile_limit = 16
        for block in self.model.layers:
            block.compile(dynamic=False)
        self.loss = torch.compile(self.loss, dynamic=False)

    def can_use_flash(self):
        """Return whether flash_attention() can run: it needs an NVIDIA GPU from Ampere on, half precision, dropout 0,
        and a head_dim of at most 256 that is a multiple of 8."""
        if self.device.type != "cuda" or torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
            return False
        amp = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if amp else self.model.embed_tokens.weight.dtype
        ampere, D = torch.cuda.get_device_properties(self.device).major >= 8, self.config.head_dim
        return ampere and dtype.itemsize == 2 and D <= 256 and D % 8 == 0 and not self.dropout.p

    @torch.no_grad()
    def init_weights(self, seed, device=None):
        """Draw every matrix, the embedding too, from N(0, 0.02^2) on `device` (default: the model's). The first loss is
        then about ln(V). The norms after attention and MLP start with a gain that makes their outputs as large
        as an embedded token. A gain of 1 makes the outputs larger (twice as large at 270M) and slows training down
        (docs/experiments.md). Other norms start with gain 1. Raises ValueError for any other vector."""
        device = device or self.device
        generator = torch.Generator(device).manual_seed(seed)
        embedded = 0.02 * self.config.hidden_size**0.5  # rms of an embedded token
        for name, p in self.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.empty(p.shape, device=device).normal_(0, 0.02, generator=generator))
            elif name.endswith("norm.weight"):
                p.fill_(embedded - 1 if "post_" in name else 0.0)
            else:
                raise ValueError(f"init_weights() has no initial value for {name} {list(p.shape)}: add one")
        return self

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    def num_params(self):
        return sum(p.numel() for p in self.parameters())  # a tied embedding counts once

    def flops_per_token(self, T, head_share=1.0):
        """Return the training FLOPs (forward and backward) per token at sequence length T: 6 per weight in a matrix
        product, 4 if it is frozen, and 12 * H * D per token attended to. Like PaLM (appendix B) and nanoGPT, count the
        whole length or window, as if there were no causal mask. head_share: share of the tokens that use the head."""
        c, embedding, head = self.config, self.model.embed_tokens.weight, self.head_weight
        shares = ((p, head_share if p is head else p is not embedding) for p in self.parameters() if p.ndim > 1)
        matrices = sum(share * (6 if p.requires_grad else 4) * p.numel() for p, share in shares)
        attended = sum({SLIDING: min(T, c.sliding_window), FULL: T}[kind] for kind in c.layer_types)
        return matrices + 12 * c.num_attention_heads * c.head_dim * attended

    @torch.no_grad()
    def generate(self, prompt, max_new_tokens, stop_ids=(), seed=None, lengths=None, **sampling):
        """Continue prompt (B, T), T >= 1: yield a (B,) tensor of token ids per step.

        A row ends after max_new_tokens, with one of stop_ids, or at the model's last position, and yields -1 from then
        on. sampling: temperature, top_k, top_p, as in sample_token(). Raises ValueError if the prompt leaves no
        position free, FloatingPointError if logits are NaN.
        lengths (B,): lengths of prompts that are padded on the right. Generation begins after the shortest prompt. A
        row with a longer prompt yields -1 until its prompt has been read. max_new_tokens may be a (B,) tensor."""
        (B, T), device, limit = prompt.shape, self.device, self.config.max_position_embeddings
        if T >= limit:
            raise ValueError(f"the prompt's {T} tokens leave no room in the model's {limit} positions: shorten it")
        lengths = torch.full((B,), T, device=device) if lengths is None else lengths
        ends = (lengths + max_new_tokens).clamp(max=limit)
        shortest, longest = int(lengths.min()), int(ends.max())
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        room, cuda_graphs = longest, False
        if self.compiled_decode_step is not None:  # compiled once for each cache size, so use few sizes
            room, cuda_graphs = min(limit, max(1024, 1 << (longest - 1).bit_length())), device.type == "cuda"
        cache = KVCache(self.config, room, device, cuda_graphs)
        stops = torch.tensor(stop_ids, dtype=torch.int64, device=device)
        done = ends <= shortest
        tokens, forward = prompt[:, :shortest], self
        for position in range(shortest, longest):
            logits = forward(tokens, cache=cache)[:, -1].float()  # (B, V)
            if logits.amax().isnan():
                raise FloatingPointError("the model's logits are NaN: its weights are damaged or too large")
            token = sample_token(logits, generator=generator, **sampling)
            if torch.distributed.is_initialized():  # processes with different tokens would wait for each other forever
                torch.distributed.broadcast(token, 0)
            reading = position < lengths  # (B,), whether the row still reads its prompt
            if position < T:
                token = torch.where(reading, prompt[:, position], token)
            yield token.masked_fill(reading | done, -1)
            done |= (~reading & torch.isin(token, stops)) | (position + 1 >= ends)
            if done.all():
                return
            if position == shortest and not (self.packed_rows or self.compiled_decode_step):  # after the first token
                self.pack_weights(B)
            tokens, forward = token[:, None], self.compiled_decode_step or self

    def generate_batch(self, prompts, max_new_tokens, stop_ids=(), **sampling):
        """Continue prompts, which are lists of token ids of any length. At the start and after each step, yield a list
        with each prompt's new ids, without stop_ids. max_new_tokens: a number or a list. sampling: as in generate()."""
        made = [[] for _ in prompts]
        yield made
        padded = pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True).to(self.device)
        lengths = torch.tensor([len(ids) for ids in prompts], device=self.device)
        limits = torch.as_tensor(max_new_tokens, device=self.device)
        for tokens in self.generate(padded, limits, lengths=lengths, stop_ids=stop_ids, **sampling):
            for ids, token in zip(made, tokens.tolist(), strict=True):
                if token >= 0 and token not in stop_ids:
                    ids.append(token)
            yield made

    def pack_weights(self, rows):
        """Pack bfloat16 weights for steps of `rows` tokens, if the CPU supports bfloat16. 0 drops the packed copies."""
        self.packed_rows = rows
        usable = rows and self.device.type == "cpu" and torch.backends.mkldnn.is_available()
        usable = usable and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        for module in self.modules():
            if isinstance(module, Linear | Gemma):
                w = self.head_weight if module is self else module.weight
                good = usable and w.dtype == torch.bfloat16
                packed = torch.ops.mkldnn._reorder_linear_weight(w.detach(), rows) if good else None
                module.packed = (packed, w._version) if good else None

    def train(self, mode=True):
        if mode and self.packed_rows:
            self.pack_weights(0)  # the copies take as much memory as the weights
        return super().train(mode)

    def compile_step(self):
        """Compile the step that generates one token, for every later generate(). On GPUs it is a CUDA graph. On CPUs it
        contains the weights, packed for fast products, so the weights must not change afterwards."""
        # Freezing takes effect too late as an option of torch.compile. On GPUs it stays off, because it generates wrong
        # tokens when the cache has static addresses (PyTorch 2.13)
        torch._inductor.config.freezing = self.device.type == "cpu"
        graphs = {"triton.cudagraphs": self.device.type == "cuda"}
        self.compiled_decode_step = torch.compile(self.forward, options=graphs)

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.float32, dropout=0.0):
        """Open a model directory in the Hugging Face format. Only the text part of a multimodal model is read. On the
        "meta" device, no weights are loaded. Raises ValueError for a missing, unexpected or misshapen tensor."""
        path, device = Path(path), torch.device(device)
        with torch.device("meta"):  # takes no memory and draws no random numbers
            model = cls(read_config(path), dropout)
        found = find_tensors(path, {name: tuple(w.shape) for name, w in model.state_dict().items()})
        if device.type != "meta":
            weights = {name: read_tensor(*where, device).to(dtype) for name, where in found.items()}
            model.load_state_dict(weights, assign=True)
        return model.eval()

    def save_pretrained(self, path, weights=None):
        """Write config.json, generation_config.json and model.safetensors. weights: saved instead of the model's."""
        path, c = Path(path), self.config
        path.mkdir(parents=True, exist_ok=True)
        ids = {"bos_token_id": c.bos_token_id, "eos_token_id": c.eos_token_id, "pad_token_id": c.pad_token_id}
        dtype = str(self.model.embed_tokens.weight.dtype).removeprefix("torch.")
        (path / "config.json").write_text(json.dumps(config_to_dict(c) | {"dtype": dtype}, indent=2) + "\n")
        (path / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
        weights = {name: w.detach().contiguous() for name, w in (weights or self.state_dict()).items()}
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


# ---- generation ------------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of every layer. A sliding layer holds only its window, as a ring: position p is in slot p %
    window. The order in the ring does not matter, because RoPE has already rotated each key by its position. One
    compiled step serves every length, because no shape depends on the length and the length is a tensor."""

    def __init__(self, config, max_tokens, device, cuda_graphs=False):
        self.length = torch.zeros(1, dtype=torch.int64, device=device)  # number of tokens in the cache
        self.slots = {SLIDING: min(max_tokens, config.sliding_window), FULL: max_tokens}
        self.kinds = config.layer_types
        self.rings = [None] * len(self.kinds)  # (2, B, K, slots, D) each, allocated by update() in the keys' dtype
        self.cuda_graphs = cuda_graphs
        if cuda_graphs:  # PyTorch skips CUDA graphs that write into a tensor without a static address
            torch._dynamo.mark_static_address(self.length)

    def valid_slots(self):
        """Return {kind: bool (slots,)}: true for the slots in use and for the slot of the new token."""
        return {kind: torch.arange(n, device=self.length.device) <= self.length for kind, n in self.slots.items()}

    def update(self, layer, k, v):
        """Store k, v (B, K, T, D). Return the keys and values to attend to: a prompt's own (T > 1), or the ring."""
        kv = torch.stack((k, v))  # (2, B, K, T, D)
        slots, T = self.slots[self.kinds[layer]], k.shape[2]
        if self.rings[layer] is None:
            self.rings[layer] = kv.new_zeros(*kv.shape[:3], slots, kv.shape[4])
            if self.cuda_graphs:
                torch._dynamo.mark_static_address(self.rings[layer])
        ring = self.rings[layer]
        if T > 1:  # the ring holds the end of the prompt
            positions = torch.arange(max(0, T - slots), T, device=k.device)
            ring[:, :, :, positions % slots] = kv[:, :, :, positions]
            return k, v
        ring.index_copy_(3, self.length % slots, kv)
        return ring.unbind()


def sample_token(logits, *, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw token ids (B,) from logits (B, V). Like transformers, keep the top_k likeliest tokens, then the smallest set
    of these with probability top_p. Temperature 0 is greedy. top_k 0 and top_p 1 keep all tokens."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, tokens = logits / temperature, None
    if top_k or top_p < 1:  # sorted, the likeliest first; drawing from few is much faster than from a whole vocabulary
        logits, tokens = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    if top_p < 1:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs.cumsum(-1) - probs >= top_p, -math.inf)  # earlier tokens already reach top_p
    drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
    return (drawn if tokens is None else tokens.gather(1, drawn))[:, 0]


def complete(model, tokenizer, prompts, max_new_tokens, **sampling):
    """Return the texts that generate_batch() adds to the prompts. tokenizer: any object with decode(ids)."""
    with torch.compiler.set_stance("force_eager"):  # compiled layers would recompile for every length
        *_, made = model.generate_batch(prompts, max_new_tokens, **sampling)
    return [tokenizer.decode(ids) for ids in made]


# ---- files: configuration and weights. Damaged ones raise ValueError -------------------------------------------------

# transformers' settings with the same value in every Gemma 3. They are written to config.json and checked on reading.
# A field of GemmaConfig with the same name replaces the constant
GEMMA3_CONSTANTS = {
    "attention_bias": False, "final_logit_softcapping": None, "attn_logit_softcapping": None,
    "tie_word_embeddings": True, "use_bidirectional_attention": False,
}  # fmt: skip
# transformers' defaults for settings that a config.json lacks. The published 4B to 27B models omit some of them
HF_DEFAULTS = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131072, "sliding_window": 4096,
}  # fmt: skip


def require(condition, message):
    if not condition:
        raise ValueError(message)


def check_config(c):
    """Raise ValueError for a setting of the wrong type or size, and for settings that contradict each other."""
    for f in fields(c):
        value = getattr(c, f.name)
        fits = isinstance(value, (int, float) if f.type is float else f.type)
        fits = fits and isinstance(value, bool) == (f.type is bool)
        require(fits, f"{f.name}={value!r} must be of type {getattr(f.type, '__name__', f.type)}")
        if f.name.endswith("_token_id") and value is not None:
            good = all(type(i) is int and 0 <= i < 2**31 for i in (value if isinstance(value, list) else [value]))
            require(good, f"{f.name}={value!r} is not a token id")
        elif type(value) in (int, float):
            require(0 < value < 2**31, f"{f.name}={value!r} must be a number above 0")
    require(c.num_hidden_layers <= 1000, f"num_hidden_layers={c.num_hidden_layers} is more than any Gemma 3 has")
    kinds = [SLIDING] * c.num_hidden_layers if c.layer_types is None else c.layer_types
    good = len(kinds) == c.num_hidden_layers and all(kind in (SLIDING, FULL) for kind in kinds)
    require(good, f"layer_types needs {c.num_hidden_layers} entries, each {SLIDING!r} or {FULL!r}")
    require(c.hidden_activation in ACTIVATIONS, f"hidden_activation={c.hidden_activation!r} must be {[*ACTIVATIONS]}")
    heads, shared = c.num_attention_heads, c.num_key_value_heads
    require(heads % shared == 0, f"num_attention_heads={heads} is not a multiple of num_key_value_heads={shared}")
    require(c.head_dim % 2 == 0, f"head_dim={c.head_dim} is odd, but RoPE rotates pairs: make it even")
    window, limit = c.sliding_window, c.max_position_embeddings
    require(window <= limit, f"sliding_window={window} is larger than max_position_embeddings={limit}: lower it")


def read_json(path):
    """Return the dict in a JSON file. Raises ValueError, with the file's name, if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path.name} is not JSON: {e}") from None
    require(isinstance(content, dict), f"{path.name} holds a {type(content).__name__}, not a JSON object")
    return content


def dict_at(d, key):
    """Return d[key], which must be a dict; {} if it is None or missing."""
    value = d.get(key)
    require(isinstance(value, dict | None), f"{key}={value!r} is not a JSON object")
    return value or {}


def read_config(path):
    """Return the GemmaConfig of a model directory."""
    config, generation = config_from_dict(read_json(path / "config.json")), path / "generation_config.json"
    if generation.exists():  # this file lists all tokens that end a text
        config = replace(config, eos_token_id=read_json(generation).get("eos_token_id", config.eos_token_id))
    return config


def config_from_dict(d):
    """Return the GemmaConfig from the dict of a config.json, in the old style (rope_theta, rope_scaling) or the new one
    (rope_parameters). From a multimodal model's dict, read the text part."""
    kind = d.get("model_type")
    require(kind in ("gemma3_text", "gemma3"), f"model_type {kind!r} is not Gemma 3's ('gemma3_text' or 'gemma3')")
    d = HF_DEFAULTS | d | dict_at(d, "text_config")
    own = {f.name for f in fields(GemmaConfig)}
    for key, value in GEMMA3_CONSTANTS.items():
        given = d.get(key)
        require(key in own or given in (None, value), f"{key}={given!r} is not supported: Gemma 3 has {value!r}")
    rope = dict_at(d, "rope_parameters")
    full, sliding = dict_at(d, "rope_scaling") | dict_at(rope, FULL), dict_at(rope, SLIDING)
    rope_type, local_type = (d.get("rope_type", "default") for d in (full, sliding))
    # transformers 5 ignores 'type' and older versions use it, so such a file is ambiguous
    require("rope_type" in full or "type" not in full, "rope_scaling: rename 'type' to 'rope_type'")
    require(rope_type in ("default", "linear"), f"rope_type {rope_type!r}: Gemma 3 has 'default' and 'linear' only")
    require(local_type == "default", f"rope_type {local_type!r} in sliding layers: Gemma 3 has 'default' only")
    renamed = {
        "sliding_window_pattern": d.get("_sliding_window_pattern"), "rope_theta": full.get("rope_theta"),
        "rope_local_base_freq": sliding.get("rope_theta"),
        "rope_linear_factor": full.get("factor", 1.0) if rope_type == "linear" else 1.0,
    }  # fmt: skip
    d |= {key: value for key, value in renamed.items() if value is not None}
    return GemmaConfig(**{key: d[key] for key in own & d.keys()})


def config_to_dict(config):
    """Return the dict for config.json, with RoPE in the old and the new style, because some programs read only one."""
    d = asdict(config)
    factor = d.pop("rope_linear_factor")
    scaling = {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}
    d["rope_parameters"] = {FULL: {"rope_theta": config.rope_theta, **scaling},
                            SLIDING: {"rope_theta": config.rope_local_base_freq, "rope_type": "default"}}  # fmt: skip
    d["rope_scaling"] = None if factor == 1 else scaling
    kind = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    return GEMMA3_CONSTANTS | d | kind | {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}


def weight_files(path):
    """Return the safetensors files of a model directory: a single file, or its shards."""
    files = [*path.glob("model.safetensors")] or sorted(path.glob("model-*-of-*.safetensors"))
    require(files, f"{path}: no model.safetensors; convert weights of another kind by transformers' save_pretrained()")
    return files


def weights_fingerprint(path):
    """Return a hex digest (BLAKE2b, 16 bytes) of the weights in a model directory."""
    digest = hashlib.blake2b(digest_size=16)
    for file in weight_files(Path(path)):
        with open(file, "rb") as f:
            hashlib.file_digest(f, lambda: digest)  # continues the digest
    return digest.hexdigest()


def tensor_shapes(file):
    """Return {name: shape} of the tensors in a safetensors file."""
    try:
        with safe_open(file, framework="pt") as f:
            return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
    except SafetensorError as e:
        raise ValueError(f"{file.name}: {e}") from None


def find_tensors(path, expected):
    """Return {our name: (file, name in the file)} for the weights in a model directory. expected: {our name: shape}.
    Raises ValueError, before any tensor is read, unless the names and shapes are exactly these."""
    found, shapes = {}, {}
    for file in weight_files(path):
        for name, shape in tensor_shapes(file).items():
            if "vision_tower." not in name and "multi_modal_projector." not in name:
                ours = name.replace("language_model.", "", 1)  # the prefix of the text part in multimodal checkpoints
                require(ours not in found, f"{ours} is in the files twice")
                found[ours], shapes[ours] = (file, name), shape
    if (head := "lm_head.weight") in found.keys() - expected.keys():  # some programs save the tied matrix twice
        tied = [read_tensor(*found[name], "cpu") for name in (head, "model.embed_tokens.weight") if name in found]
        require(len(tied) == 2 and torch.equal(*tied), f"{head} is not the embedding, and Gemma 3 ties the two")
        del found[head], shapes[head]
    for name in expected | shapes:
        stored, wanted = (d.get(name, "no such tensor") for d in (shapes, expected))
        require(stored == wanted, f"{name}: the files have {stored}, the config asks for {wanted}")
    return found


def read_tensor(file, name, device):
    """Return one tensor of a safetensors file. The file is opened again for each tensor, because an open file keeps
    every tensor that was read from it in memory, in addition to the weights."""
    with safe_open(file, framework="pt", device=str(device)) as f:
        return f.get_tensor(name)
