"""
Gemma 3, every component, in one file: configuration, layers, generation with its KV cache, loading and saving.

    model = Gemma.from_pretrained("out/fables/best")           # any Gemma 3 directory in the Hugging Face format
    loss = model(tokens, targets)                              # (B, T), (B, T) -> mean cross-entropy in nats
    for token in model.generate(prompt, max_new_tokens=100):   # (B, T) -> a (B,) tensor per step, as they are made
        ...

Module and config names are those of transformers' Gemma3ForCausalLM, so its checkpoints load by a strict
load_state_dict and what we save opens there. The mathematics follows google/gemma_pytorch (gemma/model.py) and
transformers (modeling_gemma3.py).

Letters in shapes: B batch, T time, C hidden_size, H attention heads, K key/value heads, D head_dim, V vocabulary.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

SLIDING, FULL = "sliding_attention", "full_attention"
# by transformers' names: x -> same shape
ACTIVATIONS = {
    # x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), written with sigmoid(2 y) = (1 + tanh y) / 2, which costs one exp
    "gelu_pytorch_tanh": lambda x: x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
}


@dataclass
class GemmaConfig:
    """The shape of a model, in Hugging Face's names. The defaults are Gemma 3 270M."""

    vocab_size: int = 262144  # rows of the embedding; when training from scratch, the tokenizer's size rounded up
    hidden_size: int = 640  # width of the residual stream
    intermediate_size: int = 2048  # width of the gated MLP
    hidden_activation: str = "gelu_pytorch_tanh"  # of the MLP's gate: a name in model.py's ACTIVATIONS
    num_hidden_layers: int = 18  # blocks
    num_attention_heads: int = 4  # query heads
    num_key_value_heads: int = 1  # key/value heads, each shared by a group of query heads
    head_dim: int = 256  # width of a head; not hidden_size / heads
    query_pre_attn_scalar: int | None = None  # attention scale is this to the -1/2; None: head_dim
    max_position_embeddings: int = 32768  # longest sequence
    sliding_window: int = 512  # a query of a sliding layer sees itself and the window - 1 tokens before it
    sliding_window_pattern: int = 6  # every n-th layer attends to everything, the others slide
    layer_types: list | None = None  # the kind of each layer, spelled out; None: from sliding_window_pattern
    rope_theta: float = 1_000_000.0  # RoPE base of full layers
    rope_local_base_freq: float = 10_000.0  # RoPE base of sliding layers
    rope_linear_factor: float = 1.0  # full layers divide positions by this (8 from Gemma 3 4B up)
    rms_norm_eps: float = 1e-6  # inside every RMSNorm's root
    bos_token_id: int | None = 2  # stands before a text; from scratch, all three come from the tokenizer
    eos_token_id: int | list | None = 1  # ends a text
    pad_token_id: int | None = 0  # fills up a batch

    def __post_init__(self):
        check_config(self)
        self.query_pre_attn_scalar = self.query_pre_attn_scalar or self.head_dim
        layers, n = range(self.num_hidden_layers), self.sliding_window_pattern
        self.layer_types = self.layer_types or [SLIDING if (i + 1) % n else FULL for i in layers]


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), computed in float32 and cast last, so that weight = 0 is the identity gain."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).type_as(x)


def rope_table(positions, head_dim, base, factor):
    """Cosines and sines of RoPE: positions (B or 1, T) -> two float32 tensors (B or 1, 1, T, D/2). The d-th pair turns
    by base^(-2d/D) radians per position (Su et al. 2021); `factor` stretches positions (linear scaling)."""
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


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm on queries and keys, then RoPE."""

    def __init__(self, config, layer, dropout):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.layer = layer
        self.head_dim = D
        self.scale = config.query_pre_attn_scalar**-0.5
        self.dropout = dropout
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.rms_norm_eps)
        self.k_norm = RMSNorm(D, config.rms_norm_eps)

    def forward(self, x, rope, attend, window, mask, cache):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        q, k = apply_rope(self.q_norm(q), rope), apply_rope(self.k_norm(k), rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        # attend: blocked_attention, flash_attention or cached_attention, below; each says what its mask is
        y = attend(q, k, v, window, self.scale, dropout, mask)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, H*D) -> (B, T, C)


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        C, I = config.hidden_size, config.intermediate_size  # noqa: E741
        self.gate_proj = nn.Linear(C, I, bias=False)
        self.up_proj = nn.Linear(C, I, bias=False)
        self.down_proj = nn.Linear(I, C, bias=False)
        self.activation = ACTIVATIONS[config.hidden_activation]

    def forward(self, x):
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then MLP, each between two norms: before it, and after it on the way back into the residual."""

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

    def forward(self, x, rope, attend, window, mask, cache):
        y = self.self_attn(self.input_layernorm(x), rope, attend, window, mask, cache)
        x = x + self.dropout(self.post_attention_layernorm(y))
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.dropout(self.post_feedforward_layernorm(y))


class Gemma(nn.Module):
    """The model. `dropout` acts on attention weights, both residual branches and the embedding (Gemma itself: 0)."""

    def __init__(self, config, dropout=0.0):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config, i, dropout) for i in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.dropout = nn.Dropout(dropout)
        self.compiled_decode_step = None

    def forward(self, tokens, targets=None, documents=None, reduction="mean", cache=None):
        """tokens (B, T) int64 -> logits (B, T, V).

        With targets (B, T): the cross-entropy in nats, "mean" or "sum" over the targets that are not -100.
        With documents (B, T), numbers that stay the same through a document: each attends to itself alone, from
        position 0, as if it had a row of its own.
        With a KVCache: tokens are a prompt for an empty one, or the one token (B, 1) that follows what it holds; only
        the last position's logits come back, (B, 1, V)."""
        config, embedding = self.config, self.model.embed_tokens.weight
        T, limit = tokens.shape[1], config.max_position_embeddings
        if T > limit and documents is None:
            raise ValueError(f"{T} tokens are more than the model's max_position_embeddings={limit}")
        positions = torch.arange(T, device=tokens.device)[None]
        if cache is not None:
            positions = positions + cache.length
        elif documents is not None:
            begins = documents != F.pad(documents[:, :-1], (1, 0), value=-1)  # (B, T), whether a document does
            positions = positions - (positions * begins).cummax(1).values
            documents = documents.int()  # for blocked_attention
        rope = {
            SLIDING: rope_table(positions, config.head_dim, config.rope_local_base_freq, 1.0),
            FULL: rope_table(positions, config.head_dim, config.rope_theta, config.rope_linear_factor),
        }
        window = {SLIDING: min(T, config.sliding_window), FULL: T}  # keys up to its own that a query sees
        if cache is not None and T == 1:
            attend, mask = cached_attention, cache.valid_slots()
        else:
            flash = documents is None and self.takes_flash_attention()
            attend, mask = flash_attention if flash else blocked_attention, {SLIDING: documents, FULL: documents}

        # the scale is rounded to the weights' dtype, as in the published models (25.25 for 270M in bfloat16)
        x = F.embedding(tokens, embedding) * torch.tensor(config.hidden_size**0.5, dtype=embedding.dtype)
        x = self.dropout(x)  # (B, T, C)
        for block in self.model.layers:
            x = block(x, rope[block.kind], attend, window[block.kind], mask[block.kind], cache)
        if cache is not None:
            cache.length += T
            x = x[:, -1:]
        if targets is None:
            return F.linear(self.model.norm(x), embedding)  # (B, T, V)
        x, kept = x.flatten(0, 1), targets.flatten()
        if documents is not None:  # instruction tuning: most positions have no target, and skip the head
            x, kept = select_targets(x, kept)
        loss = self.loss(x, kept)
        return loss / (targets != -100).sum() if reduction == "mean" else loss

    def loss(self, x, targets):
        """The last norm, the head and the cross-entropy, summed: x (N, C), targets (N,) -> nats."""
        x, grad = self.model.norm(x), torch.is_grad_enabled()
        return LinearCrossEntropy.apply(x, self.model.embed_tokens.weight, targets, grad)

    def compile_layers(self):
        """Compile for training the parts of forward() by themselves: one graph serves all layers of a kind, so that
        compiling takes no longer for many layers, and a layer's memory is planned apart from the others'."""
        # the loss alone has four shapes from select_targets, each with and without gradients, and those of plain text
        torch._dynamo.config.recompile_limit = 16
        for block in self.model.layers:
            block.compile(dynamic=False)
        self.loss = torch.compile(self.loss, dynamic=False)

    def takes_flash_attention(self):
        """Whether flash_attention's kernel can be used: on NVIDIA's cards since Ampere, in half precision, without
        dropout, for a head_dim up to 256 that 8 divides."""
        if self.device.type != "cuda" or torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
            return False
        amp = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if amp else self.model.embed_tokens.weight.dtype
        ampere, D = torch.cuda.get_device_properties(self.device).major >= 8, self.config.head_dim
        return ampere and dtype.itemsize == 2 and D <= 256 and D % 8 == 0 and not self.dropout.p

    @torch.no_grad()
    def init_weights(self, seed, device=None):
        """Draw every matrix from N(0, 0.02) on `device`, by default the model's. The embedding too: its rows are also
        the head's, and with std 0.02 the first loss is about ln(V). The norms behind attention and MLP start with the
        gain that makes what a block adds as large as an embedded token, whatever the weights before them are: at a gain
        of 1 it would be larger (twice at 270M), and learns more slowly (docs/experiments.md). Other norms start as the
        identity."""
        device = device or self.device
        generator = torch.Generator(device).manual_seed(seed)
        embedded = 0.02 * self.config.hidden_size**0.5  # rms of an embedded token
        for name, p in self.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.empty(p.shape, device=device).normal_(0, 0.02, generator=generator))
            elif name.endswith("norm.weight"):
                p.fill_(embedded - 1 if "post_" in name else 0.0)
            else:
                raise ValueError(f"init_weights knows no start for {name} {list(p.shape)}: add one")
        return self

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    def num_params(self):
        return sum(p.numel() for p in self.parameters())  # the embedding is tied with the head, and counted once

    def flops_per_token(self, T, head=1.0):
        """Training FLOPs (forward and backward) per token at sequence length T: 6 per weight in a matrix product, 4 if
        it is frozen, and 12 * H * D per token attended to, counting the full length or window as PaLM (appendix B) and
        nanoGPT do. head: the share of tokens that go through the head."""
        c, embedding = self.config, self.model.embed_tokens.weight  # which counts as the head
        shares = ((p, head if p is embedding else 1.0) for p in self.parameters() if p.ndim > 1)
        matrices = sum(share * (6 if p.requires_grad else 4) * p.numel() for p, share in shares)
        attended = sum(min(T, c.sliding_window) if kind == SLIDING else T for kind in c.layer_types)
        return matrices + 12 * c.num_attention_heads * c.head_dim * attended

    @torch.no_grad()
    def generate(
        self, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_ids=(), seed=None, lengths=None
    ):
        """Continue prompt (B, T), T >= 1: yields a (B,) tensor of token ids per step, as it is made.

        A row ends after max_new_tokens, with one of stop_ids, or at the model's last position, and yields -1 from then
        on. Temperature 0 is greedy. Raises ValueError where the prompt leaves no position free, FloatingPointError
        where logits are NaN.

        lengths (B,): of prompts padded on the right. Steps begin behind the shortest one, and a row whose prompt is
        longer yields -1 until that has been read. max_new_tokens may be a (B,) tensor too."""
        (B, T), device, limit = prompt.shape, self.device, self.config.max_position_embeddings
        if T >= limit:
            raise ValueError(f"the prompt's {T} tokens leave no room in the model's {limit} positions: shorten it")
        lengths = torch.full((B,), T, device=device) if lengths is None else lengths
        ends = (lengths + max_new_tokens).clamp(max=limit)
        shortest, longest = int(lengths.min()), int(ends.max())
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        cuda_graphs = self.compiled_decode_step is not None and device.type == "cuda"
        cache = KVCache(self.config, longest, device, cuda_graphs)
        stops = torch.tensor(stop_ids, dtype=torch.int64, device=device)
        done = ends <= shortest
        tokens, forward = prompt[:, :shortest], self
        for position in range(shortest, longest):
            logits = forward(tokens, cache=cache)[:, -1].float()  # (B, V)
            if logits.isnan().any():
                raise FloatingPointError("the model's logits are NaN: its weights are damaged or too large")
            token = sample_token(logits, temperature, top_k, top_p, generator)
            if torch.distributed.is_initialized():  # processes that went on with different tokens would wait forever
                torch.distributed.broadcast(token, 0)
            reading = position < lengths  # its own prompt
            if position < T:
                token = torch.where(reading, prompt[:, position], token)
            yield token.masked_fill(reading | done, -1)
            done |= (~reading & torch.isin(token, stops)) | (position + 1 >= ends)
            if done.all():
                return
            tokens, forward = token[:, None], self.compiled_decode_step or self

    def generate_batch(self, prompts, max_new_tokens, stop_ids=(), **sampling):
        """Continue prompts, lists of token ids of any lengths. Yields at the start, and again after each step, a list
        with the ids made so far for each prompt, without stop_ids. max_new_tokens: one number, or a list of one for
        each prompt. sampling: as in generate(), which says what is raised."""
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

    def compile_step(self):
        """Compile the step that makes one token, for every later generate(): on GPUs as a CUDA graph; on CPUs with the
        weights frozen into it, in the order in which their products read them fastest, so they must not change."""
        # freezing as an option of torch.compile takes effect too late; on GPUs it stays off: with the static addresses
        # of the cache it makes wrong tokens (PyTorch 2.13)
        torch._inductor.config.freezing = self.device.type == "cpu"
        cuda_graphs = self.device.type == "cuda"
        self.compiled_decode_step = torch.compile(self.forward, options={"triton.cudagraphs": cuda_graphs})

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.float32, dropout=0.0):
        """Open a model directory in the Hugging Face format: ours, or a published Gemma 3, in one file or in shards.
        Of a multimodal model it takes the text part. On the "meta" device it has shapes, but no weights. Raises
        ValueError for a missing, unexpected or misshapen tensor, OSError for a missing file."""
        path, device = Path(path), torch.device(device)
        with torch.device("meta"):  # no memory, no random numbers: the files bring both
            model = cls(read_config(path), dropout)
        wanted = {name: tuple(w.shape) for name, w in model.state_dict().items()}
        found, shapes = {}, {}  # by our names: the file and the name there, and the shape
        for file in weight_files(path):
            for name, shape in tensor_shapes(file).items():
                if "vision_tower." not in name and "multi_modal_projector." not in name:
                    ours = name.replace("language_model.", "", 1)  # the text part's prefix in multimodal checkpoints
                    found[ours], shapes[ours] = (file, name), shape
        for name in wanted | shapes:  # before any is read, of whatever size
            there, asked = (d.get(name, "no such tensor") for d in (shapes, wanted))
            require(there == asked, f"{name}: the files have {there}, the config asks for {asked}")
        if device.type != "meta":
            weights = {ours: read_tensor(file, name, device).to(dtype) for ours, (file, name) in found.items()}
            model.load_state_dict(weights, assign=True)
        return model.eval()

    def save_pretrained(self, path, weights=None):
        """Write config.json, generation_config.json and model.safetensors into the directory `path`. weights: a state
        dict to write in place of the model's own."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        c = self.config
        ids = {"bos_token_id": c.bos_token_id, "eos_token_id": c.eos_token_id, "pad_token_id": c.pad_token_id}
        dtype = str(self.model.embed_tokens.weight.dtype).removeprefix("torch.")
        (path / "config.json").write_text(json.dumps(config_to_dict(c) | {"dtype": dtype}, indent=2) + "\n")
        (path / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
        weights = {name: w.detach().contiguous() for name, w in (weights or self.state_dict()).items()}
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


# ---- generation ------------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of every layer. A sliding layer holds its window and no more: a ring, where position p lies in
    slot p % window. Order in the ring does not matter, as RoPE has already written the position into each key.
    Shapes stay the same from step to step, and the length is a tensor: a compiled step serves them all."""

    def __init__(self, config, max_tokens, device, cuda_graphs=False):
        self.length = torch.zeros(1, dtype=torch.int64, device=device)  # tokens whose keys are in the cache
        self.slots = {SLIDING: min(max_tokens, config.sliding_window), FULL: max_tokens}
        self.kinds = config.layer_types
        self.rings = [None] * len(self.kinds)  # (2, B, K, slots, D) each, made for the first keys, in their dtype
        self.cuda_graphs = cuda_graphs
        if cuda_graphs:  # a graph may write into tensors whose address stays the same, and is skipped for others
            torch._dynamo.mark_static_address(self.length)

    def valid_slots(self):
        """Which slots (1, slots) of each kind of layer a new token sees: those in use, its own included."""
        return {kind: torch.arange(n, device=self.length.device) <= self.length for kind, n in self.slots.items()}

    def update(self, layer, k, v):
        """Store k, v (B, K, T, D); return what this step attends to: a prompt, T > 1, itself, a new token all slots."""
        kv = torch.stack((k, v))  # (2, B, K, T, D)
        slots, T = self.slots[self.kinds[layer]], k.shape[2]
        if self.rings[layer] is None:
            self.rings[layer] = kv.new_zeros(*kv.shape[:3], slots, kv.shape[4])
            if self.cuda_graphs:
                torch._dynamo.mark_static_address(self.rings[layer])
        ring = self.rings[layer]
        if T > 1:  # the prompt attends to itself, the ring keeps its end
            kept = torch.arange(max(0, T - slots), T, device=k.device)
            ring[:, :, :, kept % slots] = kv[:, :, :, kept]
            return k, v
        ring.index_copy_(3, self.length % slots, kv)
        return ring.unbind()


def sample_token(logits, temperature, top_k=None, top_p=None, generator=None):
    """Draw from logits (B, V) -> (B,) token ids: from the top_k likeliest, and of these from the smallest set of mass
    top_p, in transformers' order; temperature 0: the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, tokens, nucleus = logits / temperature, None, top_p is not None and top_p < 1
    if top_k or nucleus:  # the likeliest first; drawing among few is much faster than among a whole vocabulary
        logits, tokens = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    if nucleus:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs.cumsum(-1) - probs >= top_p, -math.inf)  # the mass before it suffices already
    drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
    return (drawn if tokens is None else tokens.gather(1, drawn))[:, 0]


def complete(model, tokenizer, prompts, max_new_tokens, **sampling):
    """What generate_batch() makes of prompts (lists of token ids), as texts. tokenizer: anything with decode(ids)."""
    with torch.compiler.set_stance("force_eager"):  # compiled layers would be compiled for every length anew
        *_, made = model.generate_batch(prompts, max_new_tokens, **sampling)
    return [tokenizer.decode(ids) for ids in made]


# ---- configuration and weights on disk. They may come from anyone and be damaged: what is odd raises ValueError ------

# what holds for every Gemma 3: written into config.json, and checked when one is read
GEMMA3_CONSTANTS = {
    "attention_bias": False,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
}
# what transformers takes for a setting that a config.json leaves out, as those of the published 4B to 27B do
HF_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def require(condition, message):
    if not condition:
        raise ValueError(message)


def check_config(c):
    """Raises ValueError for a setting of the wrong type or size, and for settings that do not go together."""
    for f in fields(c):
        value, is_id = getattr(c, f.name), f.name.endswith("_token_id")
        fits = isinstance(value, (int, float) if f.type is float else f.type)
        fits = fits and isinstance(value, bool) == (f.type is bool)
        require(fits, f"{f.name}={value!r} must be of type {getattr(f.type, '__name__', f.type)}")
        for number in value if is_id and isinstance(value, list) else [value]:
            if is_id and number is not None:
                require(type(number) is int and 0 <= number < 2**31, f"{f.name}={value!r} is not a token id")
            elif type(number) in (int, float):
                require(0 < number < 2**31, f"{f.name}={value!r} must be a number above 0")
    require(c.num_hidden_layers <= 1000, f"num_hidden_layers={c.num_hidden_layers} is more than any Gemma 3 has")
    kinds = [SLIDING] * c.num_hidden_layers if c.layer_types is None else c.layer_types
    good = len(kinds) == c.num_hidden_layers and all(kind in (SLIDING, FULL) for kind in kinds)
    require(good, f"layer_types: need {c.num_hidden_layers} of {SLIDING!r} or {FULL!r}")
    known = ", ".join(ACTIVATIONS)
    require(c.hidden_activation in ACTIVATIONS, f"hidden_activation={c.hidden_activation!r} must be one of {known}")
    heads, shared = c.num_attention_heads, c.num_key_value_heads
    require(heads % shared == 0, f"num_attention_heads={heads} is not a multiple of num_key_value_heads={shared}")
    require(c.head_dim % 2 == 0, f"head_dim={c.head_dim} is odd, but RoPE rotates pairs: make it even")
    window, limit = c.sliding_window, c.max_position_embeddings
    require(window <= limit, f"sliding_window={window} is larger than max_position_embeddings={limit}: lower it")


def read_json(path):
    """The dict in a JSON file. Raises ValueError, which names the file, where it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path.name} is not JSON: {e}") from None
    require(isinstance(content, dict), f"{path.name} holds no JSON object but a {type(content).__name__}")
    return content


def dict_at(d, key):
    """d[key], which must be a dict; {} where it is None or missing."""
    value = d.get(key)
    require(isinstance(value, dict | None), f"{key}={value!r} is not a JSON object")
    return value or {}


def read_config(path):
    """The GemmaConfig of a model directory."""
    config, generation = config_from_dict(read_json(path / "config.json")), path / "generation_config.json"
    if generation.exists():  # names all the tokens that end a text
        config = replace(config, eos_token_id=read_json(generation).get("eos_token_id", config.eos_token_id))
    return config


def config_from_dict(d):
    """Read the dict of a config.json, old style (rope_theta, rope_scaling) or new (rope_parameters), of a text model,
    or of a multimodal one's text part -> GemmaConfig."""
    kind = d.get("model_type")
    require(kind in ("gemma3_text", "gemma3"), f"model_type {kind!r} is not Gemma 3's ('gemma3_text' or 'gemma3')")
    d = HF_DEFAULTS | d | dict_at(d, "text_config")
    for key, value in GEMMA3_CONSTANTS.items():
        require(d.get(key) in (None, value), f"{key}={d.get(key)!r} is not supported: Gemma 3 has {value!r}")
    rope = dict_at(d, "rope_parameters")
    full, sliding = dict_at(d, "rope_scaling") | dict_at(rope, FULL), dict_at(rope, SLIDING)
    rope_type = full.get("rope_type", full.get("type", "default"))
    require(rope_type in ("default", "linear"), f"rope_type {rope_type!r}: Gemma 3 has 'default' and 'linear' only")
    renamed = {
        "sliding_window_pattern": d.get("_sliding_window_pattern"),
        "rope_theta": full.get("rope_theta"),
        "rope_local_base_freq": sliding.get("rope_theta"),
        "rope_linear_factor": full.get("factor", 1.0) if rope_type == "linear" else 1.0,
    }
    d |= {key: value for key, value in renamed.items() if value is not None}
    return GemmaConfig(**{f.name: d[f.name] for f in fields(GemmaConfig) if f.name in d})


def config_to_dict(config):
    """The dict that goes into config.json. RoPE stands there in both spellings: readers know one or the other."""
    d = asdict(config)
    factor = d.pop("rope_linear_factor")
    scaling = {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}
    d["rope_parameters"] = {
        FULL: {"rope_theta": config.rope_theta, **scaling},
        SLIDING: {"rope_theta": config.rope_local_base_freq, "rope_type": "default"},
    }
    d["rope_scaling"] = None if factor == 1 else scaling
    about = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    return d | GEMMA3_CONSTANTS | about | {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}


def weight_files(path):
    """The safetensors files of a model directory: one, or the shards that an index lists."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists() or not index.exists():
        return [path / "model.safetensors"]
    names = dict_at(read_json(index), "weight_map").values()
    for name in names:
        here = isinstance(name, str) and Path(name).name == name
        require(here, f"{index.name}: {name!r} is not a file in this directory")
    return [path / name for name in sorted(set(names))]


def weights_fingerprint(path):
    """What tells one model directory's weights from another's: a hex digest (BLAKE2b, 16 bytes) of their files."""
    digest = hashlib.blake2b(digest_size=16)
    for file in weight_files(Path(path)):
        with open(file, "rb") as f:
            hashlib.file_digest(f, lambda: digest)  # goes on with it
    return digest.hexdigest()


def tensor_shapes(file):
    """{name: shape} of the tensors in a safetensors file."""
    try:
        with safe_open(file, framework="pt") as f:
            return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
    except SafetensorError as e:
        raise ValueError(f"{file.name}: {e}") from None


def read_tensor(file, name, device):
    """One tensor of a safetensors file. The file is opened for it alone: while one is open, all that was read from it
    stays in memory, beside the weights made of it."""
    with safe_open(file, framework="pt", device=str(device)) as f:
        return f.get_tensor(name)


# ---- fast paths: attention and the loss as each device does them best ------------------------------------------------

QUERY_BLOCK = 128  # of blocked_attention


def blocked_attention(q, k, v, window, scale, dropout, documents=None):
    """Causal attention of q (B, H, T, D) to k, v (B, K, T, D), each query to the `window` last keys up to its own, of
    its own document where documents (B, T) tell them apart.

    Some queries at a time multiply the keys that any of them can see, so what lies beyond a window costs nothing. On
    CPUs faster than PyTorch's flash kernel (python tests/benchmark.py --job=attention), above all backward."""
    (B, H, T, D), K = q.shape, k.shape[1]
    # compilers put as many int32 as float32 into a vector, and half as many int64
    positions, blocks = torch.arange(T, device=q.device, dtype=torch.int32), []
    for start in range(0, T, QUERY_BLOCK):
        end, first = min(start + QUERY_BLOCK, T), max(0, start + 1 - window)
        q_i = q[:, :, start:end].reshape(B, K, -1, D)  # heads that share keys make one product
        scores = (q_i @ k[:, :, first:end].transpose(2, 3)).view(B, H, end - start, end - first).float() * scale
        distance = positions[start:end, None] - positions[first:end]
        hidden = (distance < 0) | (distance >= window)
        if documents is not None:
            hidden = hidden | (documents[:, None, start:end, None] != documents[:, None, None, first:end])
        scores = scores.masked_fill(hidden, -math.inf)
        weights = F.dropout(scores.softmax(-1), dropout).type_as(v)
        blocks.append((weights.view(B, K, -1, end - first) @ v[:, :, first:end]).view(B, H, end - start, D))
    return torch.cat(blocks, dim=2)


def flash_attention(q, k, v, window, scale, dropout, documents):
    """The same by FlashAttention-2 in one kernel, without dropout or documents. Not by varlen_attn, which would take
    documents: compiled by PyTorch 2.11, its gradients are wrong (docs/gpu.md)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    T, sees = q.shape[1], {"window_size_left": window - 1, "window_size_right": 0}
    y, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, T, T, dropout, False, False, scale=scale, **sees
    )  # fmt: skip
    return y.transpose(1, 2)


def cached_attention(q, k, v, window, scale, dropout, valid):
    """Attention of one token's q (B, H, 1, D) to the slots of a cache, k and v (B, K, slots, D), that are valid: the
    window is the cache's."""
    grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])  # (B, K, H/K, D): heads that share keys make one product
    scores = (grouped @ k.transpose(2, 3)).float() * scale
    return (scores.masked_fill(~valid, -math.inf).softmax(-1).type_as(v) @ v).view(q.shape)


def select_targets(x, targets):
    """The rows of x (N, C) that have a target, and their targets. Filled up to whole quarters of N, so that what is
    compiled for them has few shapes."""
    quarter, wanted = max(1, math.ceil(len(targets) / 4)), (targets != -100).nonzero()[:, 0]
    filler = (0, max(1, math.ceil(len(wanted) / quarter)) * quarter - len(wanted))
    return x.index_select(0, F.pad(wanted, filler)), F.pad(targets[wanted], filler, value=-100)


CHUNK = 2**24  # logits that LinearCrossEntropy makes at once: 64 MB, and twice that for their gradients; GPUs: 8 times


class LinearCrossEntropy(torch.autograd.Function):
    """The head and its cross-entropy, summed over targets that are not -100, without ever holding all the logits: those
    of B 32, T 1024 and 50,304 tokens would take 6.6 GB. Some rows at a time make their logits, their loss and, while
    these are at hand, their part of the gradients, which backward then only scales."""

    @staticmethod
    def forward(ctx, x, weight, targets, with_gradients):
        """x (N, C), weight (V, C), targets (N,) -> a float32 number."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        w = weight.to(dtype)
        grad_x = torch.empty_like(x) if with_gradients else None
        grad_w = torch.zeros_like(weight, dtype=torch.float32) if with_gradients and ctx.needs_input_grad[1] else None
        loss = torch.zeros((), device=x.device)
        rows = max(1, CHUNK * (1 if device == "cpu" else 8) // len(weight))
        tokens = torch.arange(len(weight), device=x.device, dtype=torch.int32)
        for i in range(0, len(x), rows):
            x_i, y = x[i : i + rows].to(dtype), targets[i : i + rows, None]
            logits = F.linear(x_i, w).float()  # (rows, V)
            log_sum = logits.logsumexp(-1, keepdim=True)
            index, kept = y.clamp(min=0), y != -100
            # not in place: torch.compile in PyTorch 2.11 would lose the gradient of what is returned
            loss = loss + ((log_sum - logits.gather(1, index)) * kept).sum()
            if with_gradients:
                # d loss / d logits: the probabilities, less 1 at the target
                grad = (((logits - log_sum).exp() - (index.int() == tokens).float()) * kept).to(dtype)
                grad_x[i : i + rows] = grad @ w
                if grad_w is not None:
                    grad_w += grad.T @ x_i
        ctx.save_for_backward(grad_x, grad_w)
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad, None if grad_w is None else grad_w * grad, None, None
