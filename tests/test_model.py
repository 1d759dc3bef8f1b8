"""model.py against transformers' Gemma3ForCausalLM with the same weights."""

import contextlib
import functools
import inspect
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import HOME
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
)
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from model import (
    ACTIVATIONS,
    FULL,
    SLIDING,
    Gemma,
    GemmaConfig,
    KVCache,
    complete,
    config_from_dict,
    config_to_dict,
    read_config,
    sample_token,
    weights_fingerprint,
)
from sample import SampleConfig


def small(**changes):
    """Return a config with both kinds of layers, a window shorter than the sequences, and a scale other than
    head_dim's."""
    shape = dict(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=23, sliding_window=7, sliding_window_pattern=3,
        max_position_embeddings=256, pad_token_id=None,
    )  # fmt: skip
    return GemmaConfig(**shape | changes)


TWO_LAYERS = {"num_hidden_layers": 2, "sliding_window_pattern": 2}  # one of each kind, for tests that compile


def random_model(config, seed=0):
    """Return a model whose weights are so large that every part matters, norms included. The last norm's gains lie
    around 0. With gains around 1 the likeliest token would always be the one before it, because the head is the
    embedding, and generation would test nothing."""
    model = Gemma(config).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=generator))
        model.model.norm.weight.copy_(torch.randn(config.hidden_size, generator=generator) - 1)
    return model.eval()


def peer_of(model, path):
    model.save_pretrained(path)
    return Gemma3ForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def random_tokens(config, *shape, seed=1):
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("factor", [1.0, 8.0])
@pytest.mark.parametrize("pattern", [1, 2, 3])
def test_logits_and_gradients_equal_transformers(tmp_path, kv_heads, factor, pattern):
    config = small(num_key_value_heads=kv_heads, rope_linear_factor=factor, sliding_window_pattern=pattern)
    model = random_model(config, seed=kv_heads)
    peer = peer_of(model, tmp_path)
    x = random_tokens(config, 3, 141)  # longer than a block of blocked_attention
    assert (model(x) - peer(x).logits).abs().max() < 1e-4
    y = x[:, 1:].clone()
    y[0, :30] = -100
    model(x[:, :-1], y).backward()
    logits = peer(x[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
    theirs = dict(peer.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-3, atol=1e-4)


def reference_flash_forward(q, k, v, bounds_q, bounds_k, max_q, max_k, dropout, causal, debug, scale, **window):
    """Compute what aten's _flash_attention_forward computes on GPUs from q, k, v (B, T, H, D)."""
    T = q.shape[1]
    assert bounds_q is bounds_k is None and max_q == max_k == T and not dropout and window["window_size_right"] == 0
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    distance = torch.arange(T)[:, None] - torch.arange(T)
    seen = (distance >= 0) & (distance <= window["window_size_left"])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).float() * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v), None, None


def test_flash_attention_is_asked_for_what_blocks_compute(monkeypatch):
    """The kernel's arguments are tested here. tests/gpu.py tests the kernel itself."""
    model, x = random_model(small(**TWO_LAYERS)), random_tokens(small(), 2, 141)
    model(x, x).backward()
    logits, gradients = model(x), [p.grad.clone() for p in model.parameters()]
    made = [step.tolist() for step in model.generate(x[:, :130], 5, temperature=0)]
    model.zero_grad()
    known = {argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments}
    assert {"scale", "window_size_left", "window_size_right"} <= known
    monkeypatch.setattr(Gemma, "can_use_flash", lambda self: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", reference_flash_forward)
    monkeypatch.setattr("model.blocked_attention", None)  # not to be called
    model(x, x).backward()
    torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-4)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-4)
    # a prompt, then token by token from the cache
    assert made == [step.tolist() for step in model.generate(x[:, :130], 5, temperature=0)]


@pytest.mark.parametrize("change", [{}, {"major": 7}, {"hip": "6"}, {"dtype": torch.float32}, {"dtype": torch.float64},
                                    {"dropout": 0.1}])  # fmt: skip
def test_flash_attention_is_used_where_it_has_a_kernel(monkeypatch, change):
    model = Gemma(small(), change.get("dropout", 0.0)).to(change.get("dtype", torch.bfloat16))
    monkeypatch.setattr("model.Gemma.device", torch.device("cuda"))
    monkeypatch.setattr("torch.version.hip", change.get("hip"))
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)
    card = SimpleNamespace(major=change.get("major", 8))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: card)
    assert model.can_use_flash() == (change == {})


def test_the_270m_shape_equals_transformers(tmp_path):
    config = GemmaConfig(vocab_size=2048)  # all of 270M except its vocabulary
    model = random_model(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.mul_(0.15)  # about the size of trained weights, at this width
    peer = peer_of(model, tmp_path)
    x = random_tokens(config, 1, 600)  # beyond the window of 512
    with torch.no_grad():
        assert (model(x) - peer(x).logits).abs().max() < 1e-4


def test_the_window_ends_where_it_should():
    """A sliding layer does not see the key `window` tokens back, and sees the one after it."""
    config = small(num_hidden_layers=1, layer_types=[SLIDING])
    model = random_model(config)
    x = random_tokens(config, 1, 20)
    changed = x.clone()
    changed[0, 5] = (x[0, 5] + 1) % config.vocab_size
    moved = (model(x) - model(changed)).abs().amax(-1)[0]
    assert (moved[:5] == 0).all() and (moved[5:12] > 0).all() and (moved[12:] == 0).all()


def test_parameters_are_as_many_as_published():
    with torch.device("meta"):
        published, gpt2 = (Gemma(GemmaConfig(vocab_size=size)).num_params() for size in (262_144, 50_304))
    assert published == 268_098_176
    assert round(gpt2 / 1e6, 1) == 132.5 and round((gpt2 - 50_304 * 640) / 1e6, 1) == 100.3


def test_flops_per_token_equals_counted_flops():
    config = small(hidden_size=64, intermediate_size=256, sliding_window=64, layer_types=[FULL] * 4)
    model = Gemma(config).init_weights(0)
    x = random_tokens(config, 2, 64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(x, x).backward()
    assert counter.get_total_flops() == pytest.approx(model.flops_per_token(64) * x.numel(), rel=1e-6)
    records = torch.where(torch.arange(64) < 32, x, -100)  # half of each row is a prompt
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(x, records, doc_ids=torch.zeros_like(x)).backward()
    assert counter.get_total_flops() == pytest.approx(model.flops_per_token(64, 0.5) * x.numel(), rel=1e-6)


class UntiedGemma(Gemma):
    """A Gemma with a head of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self):
        return self.head.weight


def test_an_untied_head_counts_once_and_the_embedding_lookup_counts_nothing():
    config = small(hidden_size=64, intermediate_size=256, sliding_window=64, layer_types=[FULL] * 4)
    model, x = UntiedGemma(config).init_weights(0), random_tokens(config, 2, 64)
    half = torch.where(torch.arange(64) < 32, x, -100)
    for labels, doc_ids, head_share in ((x, None, 1.0), (half, torch.zeros_like(x), 0.5)):
        with FlopCounterMode(display=False) as counter:
            model(x, labels, doc_ids).backward()
        expected = model.flops_per_token(64, head_share) * x.numel()
        assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)
    assert model.num_params() - Gemma(config).num_params() == model.head.weight.numel()


def test_the_loss_is_a_mean_or_a_sum_over_labels():
    config = small()
    model = random_model(config)
    x = random_tokens(config, 2, 12)
    y = torch.where(random_tokens(config, 2, 12, seed=2) < 30, -100, x)
    logits = model(x).double()
    expected = -logits.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0][y != -100]
    assert model(x, y).item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert model(x, y, reduction="sum").item() == pytest.approx(expected.sum().item(), rel=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["plain rows", "doc_ids"])
def test_the_gradient_of_the_loss_equals_finite_differences(packed):
    """The loss has a hand-written gradient (LinearCrossEntropy). Whoever changes the logits must change it too.

    Each parameter tensor moves along its normalized gradient, forth and back, so far that the loss should change by
    0.01 each time. Float32 arithmetic limits the agreement: the loss is about 22, so its rounding error is about 2e-6
    times a small factor, or 1e-4 of the difference of 0.02 times that factor. Curvature adds less than 5e-4."""
    model, (B, T), delta = random_model(small()), (3, 41), 0.01
    with torch.no_grad():  # logits of 10 and more, so that a soft cap at 30 would show
        model.model.norm.weight.add_(1).mul_(10).sub_(1)
    x = random_tokens(model.config, B, T)
    y = torch.where(random_tokens(model.config, B, T, seed=2) < 30, -100, x.roll(-1, 1))
    doc_ids = (torch.arange(T) // 15).expand(B, T) if packed else None
    model(x, y, doc_ids).backward()
    for name, p in model.named_parameters():
        norm, start = p.grad.norm().item(), p.detach().clone()
        losses = []
        with torch.no_grad():
            for sign in (1, -1):
                p.copy_(start + sign * delta / norm * (p.grad / norm))
                losses.append(model(x, y, doc_ids).item())
            p.copy_(start)
        assert (losses[0] - losses[1]) / (2 * delta) == pytest.approx(1, abs=5e-3), name


@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_does_not_depend_on_its_chunks(monkeypatch, frozen):
    """It equals plain autograd with rows that do not divide into chunks, with masked labels, and with a trained or a
    frozen head."""
    model, x = random_model(small()), random_tokens(small(), 3, 41)
    model.model.embed_tokens.requires_grad_(not frozen)
    y = torch.where(random_tokens(small(), 3, 41, seed=2) < 40, -100, x.roll(-1, 1))
    expected = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    monkeypatch.setattr("model.CHUNK", 97 * 10)
    loss = model(x, y, reduction="sum")
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in gradients)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x, y, reduction="sum"), expected)


def test_the_first_loss_is_that_of_uniform_guessing():
    config = GemmaConfig(vocab_size=4096, num_hidden_layers=2)
    loss = Gemma(config).init_weights(0)(random_tokens(config, 2, 64), random_tokens(config, 2, 64, seed=3))
    assert abs(loss.item() - torch.tensor(4096.0).log().item()) < 0.3


def test_blocks_start_by_adding_as_much_as_a_token():
    config, sizes = GemmaConfig(vocab_size=4096, num_hidden_layers=2), []
    model = Gemma(config).init_weights(0)
    for block in model.model.layers:
        for norm in (block.post_attention_layernorm, block.post_feedforward_layernorm):
            norm.register_forward_hook(lambda module, x, y: sizes.append(y.square().mean().sqrt().item()))
    model(random_tokens(config, 2, 64))
    embedded = model.model.embed_tokens.weight.square().mean().sqrt().item() * config.hidden_size**0.5
    assert sizes == pytest.approx([embedded] * 4, rel=0.01)


def test_initial_weights_are_a_function_of_the_seed():
    a, b, c = (Gemma(small()).init_weights(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not any(torch.equal(a[k], c[k]) for k in a if "norm" not in k)


@pytest.mark.parametrize("prompt_length", [1, 3, 7, 8, 20])
def test_cached_generation_equals_uncached_beyond_the_window(prompt_length):
    """Many caches are right up to the window and wrong after it (litgpt 2153, 2182)."""
    config = small()
    model = random_model(config)
    prompt = random_tokens(config, 2, prompt_length)
    made = torch.stack(list(model.generate(prompt, 40, temperature=0)), 1)
    tokens = prompt
    with torch.no_grad():
        for _ in range(40):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    assert torch.equal(made, tokens[:, prompt_length:])


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_step_makes_the_same_tokens():
    config = small(**TWO_LAYERS)
    model = random_model(config)
    prompts = [random_tokens(config, 2, n) for n in (1, 5, 20)]
    eager = [torch.stack(list(model.generate(prompt, 30, temperature=0)), 1) for prompt in prompts]
    model.compile_step()
    torch._dynamo.reset()
    counters.clear()
    try:
        compiled = [torch.stack(list(model.generate(prompt, 30, temperature=0)), 1) for prompt in prompts]
    finally:
        torch._inductor.config.freezing = False
    assert all(map(torch.equal, eager, compiled))
    assert counters["stats"]["unique_graphs"] == 1  # it once compiled again for each length


def test_tensors_that_a_compiled_step_changes_have_static_addresses():
    """CUDA graphs are skipped ("mutated inputs") if a step writes into a tensor whose address may change. The length of
    the cache was once such a tensor."""
    graphs = []

    def look(graph, inputs):
        static = TracingContext.get().fw_metadata.static_input_indices
        placeholders = graph.graph.find_nodes(op="placeholder")
        changed = {node.args[0] for node in graph.graph.nodes if str(node.target) == "aten.copy_.default"}
        graphs.append((len(changed), [placeholders.index(node) in static for node in changed]))
        return graph

    model, cache = random_model(small()), KVCache(small(), 20, "cpu", cuda_graphs=True)
    backend = aot_autograd(fw_compiler=look, inference_compiler=look, keep_inference_input_mutations=True)
    with torch.no_grad():
        model(random_tokens(model.config, 2, 5), cache=cache)
        torch.compile(model, backend=backend)(random_tokens(model.config, 2, 1), cache=cache)
    assert graphs == [(5, [True] * 5)]  # the length, and the keys and values of four layers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_no_cuda_graph_is_skipped():
    model = random_model(small()).cuda()
    prompts = [random_tokens(model.config, 2, n).cuda() for n in (1, 20)]
    eager = [torch.stack(list(model.generate(prompt, 30, temperature=0)), 1) for prompt in prompts]
    model.compile_step()
    counters.clear()
    compiled = [torch.stack(list(model.generate(prompt, 30, temperature=0)), 1) for prompt in prompts]
    assert all(map(torch.equal, eager, compiled)) and counters["inductor"]["cudagraph_skips"] == 0


def test_a_cache_holds_windows_in_the_dtype_of_the_keys():
    """Under autocast and FSDP the embedding has another dtype."""
    config, cache = small(), KVCache(small(), 100, "cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        random_model(config)(random_tokens(config, 2, 20), cache=cache)
    assert [ring.shape[3] for ring in cache.rings] == [7 if kind == SLIDING else 100 for kind in config.layer_types]
    assert {ring.dtype for ring in cache.rings} == {torch.bfloat16}


def has_packed_products():
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(not has_packed_products(), reason="needs oneDNN's bfloat16 products")
def test_packed_weights_make_the_same_tokens_until_a_weight_changes():
    """Generation packs bfloat16 weights. A changed weight is used at once, and training gives the memory back."""
    model = random_model(small()).bfloat16()
    x = random_tokens(model.config, 2, 20)

    def tokens():
        return torch.stack(list(model.generate(x, 20, temperature=0)), 1)

    with torch.no_grad():
        plain = model(x)
        first = tokens()
        assert model.packed is not None and model.model.layers[0].mlp.up_proj.packed is not None
        torch.testing.assert_close(model(x), plain, rtol=2**-7, atol=2**-7 * plain.abs().max().item())
        assert torch.equal(tokens(), first)
        for p in model.parameters():
            p.neg_()
        changed = model(x)
        fresh = Gemma(model.config).bfloat16().eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(changed, fresh(x)) and not torch.equal(changed, plain)
    model.train()
    assert model.packed is None and all(layer.mlp.up_proj.packed is None for layer in model.model.layers)


def test_greedy_generation_equals_transformers(tmp_path):
    config = small()
    model = random_model(config)
    peer = peer_of(model, tmp_path)
    prompt = random_tokens(config, 2, 5, seed=6)  # at every step the likeliest token is 1% ahead
    ours = torch.stack(list(model.generate(prompt, 40, temperature=0)), 1)
    options = dict(max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs = peer.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(ours, theirs[:, 5:])


@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (30, 0.9), (99, 0.5), (0, 0.7), (1, 1.0)])
def test_tokens_are_drawn_from_those_that_transformers_keeps(top_k, top_p):
    """They are drawn in proportion to their probabilities. A top_k above the vocabulary keeps all tokens."""
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(1))
    left = TopKLogitsWarper(top_k)(None, logits / 0.8) if top_k else logits / 0.8
    left = TopPLogitsWarper(top_p)(None, left) if top_p < 1 else left
    how = {"temperature": 0.8, "top_k": top_k, "top_p": top_p, "generator": torch.Generator().manual_seed(0)}
    drawn = sample_token(logits.expand(20_000, 40), **how)
    shares = drawn.bincount(minlength=40) / len(drawn)
    assert not shares[left[0] == -torch.inf].any()
    assert torch.allclose(shares, left[0].softmax(-1), atol=0.015)


def test_the_switches_of_sampling_have_one_spelling():
    """None once meant off in one place, and 0 or 1 in another. Arguments by position were easily mixed up."""
    switches = {"top_k": 0, "top_p": 1.0}
    parameters = inspect.signature(sample_token).parameters
    assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name != "logits")
    for function in (sample_token, SampleConfig):
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in switches} == switches, function
    model, prompt = random_model(small()), random_tokens(small(), 2, 5)
    for function in (Gemma.generate, Gemma.generate_batch):  # they pass the switches on
        assert not switches.keys() & inspect.signature(function).parameters.keys()
    made = [torch.stack(list(model.generate(prompt, 30, seed=5, **how))) for how in ({}, switches)]
    assert torch.equal(*made) and len(made[0].unique()) > 10


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(20_000, 3)
    drawn = sample_token(logits, temperature=2.0, generator=torch.Generator().manual_seed(0))
    expected = (logits[0] / 2).softmax(-1)
    assert torch.allclose(drawn.bincount().float() / len(drawn), expected, atol=0.015)


def test_generation_stops_and_repeats_with_its_seed():
    """Generation that never ends at end-of-text is the oldest complaint (nanoGPT 36, 308)."""
    config = small()
    model = random_model(config)
    prompt = random_tokens(config, 3, 4)
    runs = [torch.stack(list(model.generate(prompt, 60, seed=5)), 1) for _ in range(2)]
    assert torch.equal(*runs)
    stop = runs[0][0, 10].item()
    row = torch.stack(list(model.generate(prompt[:1], 60, temperature=0)), 1)[0].tolist()
    stopped = torch.stack(list(model.generate(prompt[:1], 60, temperature=0, stop_ids=[row[10]])), 1)[0].tolist()
    assert stopped == row[: row.index(row[10]) + 1]
    batch = torch.stack(list(model.generate(prompt, 60, stop_ids=[stop], seed=5)), 1)
    for row, whole in zip(batch.tolist(), runs[0].tolist(), strict=True):
        length = whole.index(stop) + 1 if stop in whole else len(row)
        assert row == whole[:length] + [-1] * (len(row) - length)


def test_prompts_of_different_lengths_are_continued_as_if_each_were_alone():
    """Prompts are shorter and longer than the window, and one token long. A stop id inside a prompt stops nothing. Each
    row has its own limit."""
    model = random_model(small(max_position_embeddings=40))
    prompts = [random_tokens(model.config, n, seed=n).tolist() for n in (12, 1, 5, 25, 12, 6, 1)]
    limits, how = [20, 30, 0, 30, 1, 9, 0], {"temperature": 0}
    whole = [[t.item() for t in model.generate(torch.tensor([ids]), limit, **how)]
             for ids, limit in zip(prompts, limits, strict=True)]  # fmt: skip
    assert [len(ids) for ids in whole] == [20, 30, 0, 15, 1, 9, 0]
    stops = [whole[0][6], prompts[3][20]]
    expected = [list(itertools.takewhile(lambda token: token not in stops, ids)) for ids in whole]
    assert 0 < len(expected[0]) < 20
    *_, made = model.generate_batch(prompts, limits, stop_ids=stops, **how)
    assert made == expected
    assert complete(model, Words(), prompts, limits, **how) == list(map(str, whole))


class Words:
    """A tokenizer whose texts are printed lists of ids."""

    decode = staticmethod(str)


def test_generation_ends_at_the_last_position():
    config = small(max_position_embeddings=16)
    model = random_model(config)
    assert len(list(model.generate(random_tokens(config, 1, 10), 99))) == 6
    with pytest.raises(ValueError, match="16 positions"):
        next(model.generate(random_tokens(config, 1, 16), 1))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(random_tokens(config, 1, 17))


def test_model_py_alone_is_enough_for_your_own_training_loop():
    model = Gemma(small()).init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens, losses = random_tokens(model.config, 4, 21), []
    for _ in range(20):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_a_parameter_that_init_weights_does_not_know_is_refused():
    model = Gemma(small())
    model.model.layers[0].value_scale = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"layers\.0\.value_scale \[3\]"):
        model.init_weights(0)


def test_another_activation_is_one_line(tmp_path, monkeypatch):
    """config.json names it, and transformers, which has an activation of that name, computes the same."""
    monkeypatch.setitem(ACTIVATIONS, "relu2", lambda x: x.relu().square())
    model = random_model(small(hidden_activation="relu2"))
    x = random_tokens(model.config, 2, 20)
    assert (model(x) - peer_of(model, tmp_path)(x).logits).abs().max() < 1e-4
    monkeypatch.delitem(ACTIVATIONS, "relu2")
    with pytest.raises(ValueError, match=r"hidden_activation='relu2' must be \['gelu_pytorch_tanh'\]"):
        Gemma.from_pretrained(tmp_path)


def test_dropout_acts_in_training_only():
    config = small()
    model = Gemma(config, dropout=0.5).init_weights(0)
    x = random_tokens(config, 1, 12)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    # dropout at one of the three places
    for place in ("embedding", "attention", "residual"):
        model.train()
        model.dropout.p = 0.5 * (place == "embedding")
        for block in model.model.layers:
            block.self_attn.dropout = 0.5 * (place == "attention")
            block.dropout.p = 0.5 * (place == "residual")
        assert not torch.equal(model(x), model(x)), place


def test_a_saved_model_loads_unchanged(tmp_path):
    model = random_model(small(rope_linear_factor=8.0))
    model.save_pretrained(tmp_path)
    again = Gemma.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not (tmp_path / "pytorch_model.bin").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path)


def change_weights(path, change):
    """Replace the weights in path/model.safetensors by change(weights)."""
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, r"mlp\.up_proj\.weight: the files have no such tensor, the config asks for \(80, 48\)"),
        ({UP: torch.zeros(80, 48), "extra": torch.zeros(3)}, r"extra: the files have \(3,\), .* no such tensor"),
        ({UP: torch.zeros(48, 80)}, r"up_proj\.weight: the files have \(48, 80\), the config asks for \(80, 48\)"),
    ],
)
def test_loading_is_strict(tmp_path, change, message):
    random_model(small()).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: {k: w for k, w in weights.items() if k != UP} | change)
    with pytest.raises(ValueError, match=message):
        Gemma.from_pretrained(tmp_path)


def official_small(**changes):
    """Return transformers' config of a small Gemma 3. Every 6th layer is full, and RoPE is scaled as in 4B."""
    shape = dict(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=7, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=23, sliding_window=7, max_position_embeddings=256,
        rope_parameters={FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                         SLIDING: {"rope_type": "default", "rope_theta": 1e4}},
    )  # fmt: skip
    return Gemma3TextConfig(**shape | changes)


def save_official(model, path, **how):
    """Save a model of transformers with random bfloat16 weights, norms included. Return the model that transformers
    reads from there."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    model.bfloat16().save_pretrained(path, **how)
    return type(model).from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def edit_config(path, change):
    file = path / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def to_old_style(config):
    """Return a config.json in the style first published: flat RoPE settings, a pattern in place of layer_types."""
    config = {k: v for k, v in config.items() if k not in ("rope_parameters", "layer_types", "_sliding_window_pattern")}
    scaling = {"rope_type": "linear", "factor": 8.0}
    return config | {
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": scaling, "sliding_window_pattern": 6,
        "hidden_act": "gelu_pytorch_tanh", "torch_dtype": "bfloat16",
    }  # fmt: skip


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("style", ["new", "old"])
def test_published_text_checkpoints_load(tmp_path, style, shards):
    peer = save_official(Gemma3ForCausalLM(official_small()), tmp_path, max_shard_size="30KB" if shards else "5GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 if shards else (tmp_path / "model.safetensors").exists()
    if style == "old":
        edit_config(tmp_path, to_old_style)
    x = random_tokens(peer.config, 2, 41)
    assert (Gemma.from_pretrained(tmp_path)(x) - peer(x).logits).abs().max() < 1e-4
    assert Gemma.from_pretrained(tmp_path, dtype=torch.bfloat16)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_multimodal_checkpoints_loads(tmp_path, prefix):
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(
        text_config=official_small().to_dict(), vision_config=vision, mm_tokens_per_image=4, image_token_index=96
    )
    peer = save_official(Gemma3ForConditionalGeneration(config), tmp_path)
    assert any("vision_tower" in name for name in load_file(tmp_path / "model.safetensors"))
    if prefix == "model.language_model.":  # the names in some releases of transformers
        renamed = {"language_model.model.": prefix, "vision_tower.": "model.vision_tower.", "multi": "model.multi"}
        rename = re.compile("^(" + "|".join(renamed) + ")")
        change_weights(
            tmp_path, lambda weights: {rename.sub(lambda m: renamed[m[0]], k): w for k, w in weights.items()}
        )
        assert not any(name.startswith("language_model") for name in load_file(tmp_path / "model.safetensors"))
    x = random_tokens(config.text_config, 2, 41) % 90  # no image tokens
    assert (Gemma.from_pretrained(tmp_path)(x) - peer(x).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    "shape",
    [  # everything in the published config.json files of 4B, 12B and 27B about the text part
        dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
        dict(hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16,
             num_key_value_heads=8),
        dict(hidden_size=5376, intermediate_size=21504, num_hidden_layers=62, num_attention_heads=32,
             num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168),
    ],
    ids=["4b", "12b", "27b"],
)  # fmt: skip
def test_settings_that_published_configs_leave_out_get_their_defaults(shape):
    scaling = {"factor": 8.0, "rope_type": "linear"}
    text = shape | {"model_type": "gemma3_text", "rope_scaling": scaling, "sliding_window": 1024}
    d = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106], "vision_config": {}}
    ours, theirs = config_from_dict(d), Gemma3Config.from_dict(d).text_config
    for name in (f.name for f in fields(GemmaConfig) if hasattr(theirs, f.name) and f.name != "eos_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.eos_token_id == [1, 106] and ours.rope_linear_factor == 8


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc to measure memory")
def test_an_official_270m_checkpoint_loads_in_little_memory(tmp_path):
    """268M parameters in bfloat16 load in a process of their own, whose memory is measured."""
    config = Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, sliding_window=512, max_position_embeddings=32768,
    )  # fmt: skip
    peer = save_official(Gemma3ForCausalLM(config), tmp_path)
    code = f"""
import re, time, torch
from model import Gemma

def kib(field):
    return int(re.search(field + ":\\s+(\\d+)", open("/proc/self/status").read())[1])

before = kib("VmRSS")  # of the libraries; a CUDA build needs more
start = time.perf_counter()
model = Gemma.from_pretrained({str(tmp_path)!r}).eval()
seconds = time.perf_counter() - start
peak = kib("VmHWM")  # the highest memory use of this process
with torch.no_grad():
    torch.save(model(torch.arange(0, 262144, 20000)[None]), {str(tmp_path / "logits.pt")!r})
print(model.num_params(), seconds, before, peak)
"""
    made = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, check=True)
    parameters, seconds, before, peak = made.stdout.split()
    print(f"loaded in {float(seconds):.1f} s, at most {int(peak) / 1e6:.2f} GB")
    assert int(parameters) == 268_098_176
    assert int(peak) - int(before) < 1.25e6
    with torch.no_grad():
        logits = peer(torch.arange(0, 262144, 20000)[None]).logits
    ours = torch.load(tmp_path / "logits.pt")
    assert (ours - logits).abs().max() < 1e-4 * logits.abs().max()


def test_weights_of_another_kind_are_refused_with_the_fix(tmp_path):
    random_model(small()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no model.safetensors; convert .* save_pretrained"):
        Gemma.from_pretrained(tmp_path)


ODD = [None, [], {}, "x", -1, 1e308, True, [1, 2], [{}] * 4, 0, 2**40, {"rope_theta": "x"}]


def test_configs_of_any_content_are_read_or_refused(tmp_path):
    """A list in place of config.json, and a dict in place of a layer's kind, once ended in a traceback."""
    config = config_to_dict(small(rope_linear_factor=8.0))
    for content in (config, to_old_style(config), {"model_type": "gemma3", "text_config": config}):
        config_from_dict(content)
        for odd in with_odd_values(content):
            with contextlib.suppress(ValueError):
                config_from_dict(odd)
    random_model(small()).save_pretrained(tmp_path)
    for content in (*ODD, *with_odd_values({"eos_token_id": 1})):
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
        good = content in ({}, {"rope_theta": "x"}, *({"eos_token_id": ids} for ids in (None, [], 0, [1, 2])))
        with contextlib.nullcontext() if good else pytest.raises(ValueError):
            read_config(tmp_path)
    for content in ODD:
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError):
            read_config(tmp_path)


def with_odd_values(content):
    """Yield copies of the dict. Each copy has one value, at any depth, replaced by one of ODD."""
    for key, value in content.items():
        yield from (content | {key: odd} for odd in ODD)
        if isinstance(value, dict):
            yield from (content | {key: odd} for odd in with_odd_values(value))


def test_a_fingerprint_depends_on_all_weights_and_nothing_else(tmp_path):
    save_official(Gemma3ForCausalLM(official_small()), tmp_path, max_shard_size="30KB")
    before = weights_fingerprint(tmp_path)
    edit_config(tmp_path, lambda config: config | {"rms_norm_eps": 0.1})
    assert weights_fingerprint(str(tmp_path)) == before and len(before) == 32
    for file in sorted(tmp_path.glob("*.safetensors")):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert weights_fingerprint(tmp_path) != before
        file.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [{"model_type": "gemma2"}, {"final_logit_softcapping": 30.0}, {"use_bidirectional_attention": True},
     {"tie_word_embeddings": False}, {"hidden_activation": "silu"}, {"attention_bias": True}],
)  # fmt: skip
def test_other_architectures_than_gemma_3_are_refused(tmp_path, change):
    random_model(small()).save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config | change)
    with pytest.raises(ValueError, match=f"{next(iter(change))}"):
        Gemma.from_pretrained(tmp_path)


def test_configs_of_transformers_are_read_in_the_old_style_and_the_new():
    new = Gemma3TextConfig(
        vocab_size=97, hidden_size=48, head_dim=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=7,
        intermediate_size=80, query_pre_attn_scalar=23, sliding_window=7, max_position_embeddings=256,
        rope_parameters={FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                         SLIDING: {"rope_type": "default", "rope_theta": 2e4}},
    )  # fmt: skip
    read = config_from_dict(json.loads(new.to_json_string(use_diff=False)))
    old = {k: v for k, v in new.to_dict().items() if k not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert config_from_dict(old | {"sliding_window_pattern": 6}) == read
    assert (read.rope_theta, read.rope_local_base_freq, read.rope_linear_factor) == (5e5, 2e4, 8.0)
    assert read.layer_types == [SLIDING] * 5 + [FULL, SLIDING]


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_a_head_saved_beside_the_tied_embedding_must_be_the_embedding(tmp_path, prefix):
    model = random_model(small())
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    for weights["lm_head.weight"], good in ((head, True), (head + 1, False), (head[:5], False)):
        save_file({prefix + name: w.contiguous() for name, w in weights.items()}, tmp_path / "model.safetensors")
        refusal = pytest.raises(ValueError, match="is not the embedding")
        with contextlib.nullcontext() if good else refusal:
            read = Gemma.from_pretrained(tmp_path)
            torch.testing.assert_close(read.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_tensor_that_two_files_hold_is_refused(tmp_path):
    """The last file won, whatever the index said."""
    random_model(small()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    twice = {f"language_model.{name}": w.clone() for name, w in weights.items()}
    save_file(twice | weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is in the files twice"):
        Gemma.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "rope, message",
    [
        ({"rope_parameters": {FULL: {}, SLIDING: {"rope_type": "linear", "factor": 4.0}}}, "in sliding layers"),
        ({"rope_parameters": {FULL: {}, SLIDING: {"rope_type": "yarn", "factor": 4.0}}}, "in sliding layers"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rename 'type' to 'rope_type'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic'"),
    ],
)
def test_rope_that_would_be_computed_otherwise_is_refused(rope, message):
    """Scaled sliding layers were read as unscaled: logits differed by 1.2."""
    config = {key: value for key, value in config_to_dict(small()).items() if not key.startswith("rope")}
    with pytest.raises(ValueError, match=message):
        config_from_dict(config | rope)


def test_a_field_that_you_add_replaces_a_constant_of_gemma_3(tmp_path, monkeypatch):
    """config.json once got the constant in place of the field, and the model was loaded as if the field had never been
    there."""

    @dataclass
    class CappedConfig(GemmaConfig):
        final_logit_softcapping: float | None = None

    config = CappedConfig(**asdict(small()))
    with monkeypatch.context() as patch:
        patch.setattr("model.GemmaConfig", CappedConfig)
        for cap in (None, 30.0):
            Gemma(replace(config, final_logit_softcapping=cap)).init_weights(0).save_pretrained(tmp_path)
            assert json.loads((tmp_path / "config.json").read_text())["final_logit_softcapping"] == cap
            assert Gemma.from_pretrained(tmp_path).config == replace(config, final_logit_softcapping=cap)
    with pytest.raises(ValueError, match=r"final_logit_softcapping=30\.0 is not supported"):
        Gemma.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_attention_heads": 3}, "multiple"),
        ({"head_dim": 15}, "odd"),
        ({"sliding_window": 1000}, "max_position_embeddings"),
        ({"layer_types": [FULL]}, "layer_types"),
        ({"vocab_size": True}, "vocab_size=True"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_rows_of_records_stay_compiled(monkeypatch):
    """The loss once had more shapes than torch.compile accepts by default, and then ran uncompiled."""
    config = GemmaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, sliding_window_pattern=2, head_dim=16,
        num_attention_heads=2,
    )  # fmt: skip
    model, (B, T) = Gemma(config).init_weights(0), (2, 32)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        model.compile_layers()
        tokens = torch.randint(64, (B, T))
        for grad, share in itertools.product((True, False), (0.2, 0.4, 0.7, 1.0)):
            labels = tokens.where(torch.arange(T) < share * T, -100)
            with torch.set_grad_enabled(grad):
                model(tokens, labels, torch.ones_like(tokens))
        with torch.no_grad():
            model(tokens.repeat(4, 1), tokens.repeat(4, 1))  # plain text
