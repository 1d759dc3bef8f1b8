"""lora.py against PEFT, and what a tuning run promises."""

import contextlib
import io
import json
import math
import re
import shutil
import sys
from unittest.mock import patch

import pytest
import torch
from conftest import TINY, copy_project, losses, publish_gemma, run_script
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM

import lora
import train
from config import UserError, configure, usage
from data.fable_grammar import TASKS, conversation, derivations, follows, is_held_out, records
from lora import (
    TEMPLATES,
    InstructionTuning,
    LoraConfig,
    LoRALinear,
    TuneConfig,
    add_lora,
    cast_base_weights,
    check_base,
    encode_conversation,
    end_of_response,
    exchange,
    fill_in,
    load_adapter,
    lora_layers,
    merge_lora,
    open_records,
    read_messages,
    save_adapter,
    template_of,
)
from model import Gemma, GemmaConfig
from prepare import Tokenizer, train_bpe
from train import TrainConfig, make_optimizers, read_log, warmup_updates


def base_model(seed=0):
    config = GemmaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=7, sliding_window_pattern=2, max_position_embeddings=128,
        pad_token_id=None,
    )  # fmt: skip
    return Gemma(config).init_weights(seed).eval()


def random_tokens(*shape):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(1))


def adapted(targets="all-linear"):
    """A base model and the same with an adapter that does something."""
    base, model = base_model(), base_model()
    torch.manual_seed(3)
    add_lora(model, 3, 7.0, targets=targets)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B.weight, std=0.05)
    return base, model


# ----------------------------------------------------------------------------------------------------------------------
# LoRA itself


def test_a_new_adapter_changes_nothing():
    x = random_tokens(2, 20)
    assert torch.equal(base_model()(x), add_lora(base_model(), 4, 8.0)(x))


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj"])
def test_our_adapter_opens_in_peft_with_our_logits(tmp_path, targets):
    base, model = adapted(targets)
    base.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", "base")
    peer = PeftModel.from_pretrained(Gemma3ForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    x = random_tokens(2, 20)
    assert not torch.allclose(model(x), base(x), atol=1e-2)
    torch.testing.assert_close(model(x), peer(x).logits, atol=1e-4, rtol=0)


def test_gradients_equal_pefts(tmp_path):
    base, model = adapted()
    base.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    peer = Gemma3ForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    peer = PeftModel.from_pretrained(peer, tmp_path / "adapter", is_trainable=True).eval()
    x = random_tokens(2, 20)
    model(x[:, :-1], x[:, 1:]).backward()
    torch.nn.functional.cross_entropy(peer(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten()).backward()
    theirs = {n.replace(".default", ""): p.grad for n, p in peer.named_parameters() if p.requires_grad}
    ours = {f"base_model.model.{n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 7 * 3
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_peft_opens_here(tmp_path, rslora):
    base_model().save_pretrained(tmp_path / "base")
    config = PeftConfig(r=5, lora_alpha=9, target_modules=["q_proj", "down_proj"], use_rslora=rslora)
    peer = get_peft_model(Gemma3ForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    peer.save_pretrained(tmp_path / "adapter")
    model = load_adapter(Gemma.from_pretrained(tmp_path / "base").eval(), tmp_path / "adapter")
    x = random_tokens(2, 20)
    torch.testing.assert_close(model(x), peer(x).logits, atol=1e-4, rtol=0)


def test_what_is_opened_draws_no_dropout_and_what_is_merged_can_be_trained(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    _, model = adapted()
    for _, layer in lora_layers(model):
        layer.dropout.p = 0.5
    save_adapter(model, tmp_path / "adapter")
    opened = load_adapter(Gemma.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    x = random_tokens(2, 20)
    assert torch.equal(opened(x), opened(x)) and lora_layers(opened)[0][1].dropout.p == 0.5
    assert not torch.equal(opened.train()(x), opened(x))
    merge_lora(opened)(x, x).backward()
    assert all(p.grad is not None for p in opened.parameters())


def test_round_trip(tmp_path):
    _, model = adapted()
    save_adapter(model, str(tmp_path))
    again = load_adapter(base_model(), tmp_path).eval()
    x = random_tokens(2, 20)
    assert torch.equal(model(x), again(x))


def test_merging_keeps_the_function_and_the_tied_embedding(tmp_path):
    """Merging must not touch the embedding that is also the head (peft 2018, transformers 45127)."""
    base, model = adapted()
    x = random_tokens(2, 20)
    before = model(x)
    merge_lora(model)
    assert not lora_layers(model)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=0)
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(Gemma3ForCausalLM.from_pretrained(tmp_path)(x).logits, before, atol=1e-4, rtol=0)


def test_targets_are_found_by_name_and_a_miss_is_an_error():
    """minimind 570: a filter by square shape matches no layer of Gemma 3 270M, silently."""
    model = add_lora(base_model(), 2, 4.0, targets="q_proj, down_proj")
    assert {name.rpartition(".")[2] for name, _ in lora_layers(model)} == {"q_proj", "down_proj"}
    with pytest.raises(ValueError, match=r"qkv match nothing; there are down_proj, gate_proj"):
        add_lora(base_model(), 2, 4.0, targets="q_proj,qkv")


def peft_adapter(path, **settings):
    """An adapter of PEFT's that does something, saved with its base in `path` -> (the base's path, its logits)."""
    base_model().save_pretrained(path / "base")
    config = PeftConfig(**{"r": 4, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"]} | settings)
    peer = get_peft_model(Gemma3ForCausalLM.from_pretrained(path / "base"), config).eval()
    peer.save_pretrained(path / "initial")
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)), alpha=0.05)
    peer.save_pretrained(path / "adapter")
    return peer, peer(random_tokens(2, 20)).logits


@pytest.mark.parametrize(
    "settings, refused",
    [
        ({"use_rslora": True}, None),
        ({"init_lora_weights": False}, None),
        ({"init_lora_weights": "gaussian"}, None),
        ({"init_lora_weights": "orthogonal"}, None),
        ({"init_lora_weights": "mica"}, None),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights='pissa_niter_2'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"rank_pattern": {"q_proj": 2}}, "rank"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"exclude_modules": ["model.layers.0.self_attn.q_proj"]}, "exclude_modules"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["embed_tokens.weight"]}, "target_parameters"),
    ],
)
def test_adapters_of_peft_open_with_its_logits_or_are_refused_by_name(tmp_path, settings, refused):
    """PiSSA's and OLoRA's were read as plain LoRA once, though PEFT changes the base under them too."""
    _, logits = peft_adapter(tmp_path, **settings)
    model = Gemma.from_pretrained(tmp_path / "base").eval()
    if refused:
        with pytest.raises(ValueError, match=refused):
            load_adapter(model, tmp_path / "adapter")
    else:
        torch.testing.assert_close(load_adapter(model, tmp_path / "adapter")(random_tokens(2, 20)), logits)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_peft_has_made_plain_opens(tmp_path, init):
    peer, logits = peft_adapter(tmp_path, init_lora_weights=init)
    peer.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    model = load_adapter(Gemma.from_pretrained(tmp_path / "base").eval(), tmp_path / "plain")
    torch.testing.assert_close(model(random_tokens(2, 20)), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("change", [{"r": 4}, {"target_modules": ["q_proj"]}, {"target_modules": ["qkv"]}])
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, change):
    _, model = adapted()
    save_adapter(model, tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(about | change))
    with pytest.raises(ValueError, match=r"not of rank 4|do not fit|match nothing"):
        load_adapter(base_model(), tmp_path)


def test_any_json_in_an_adapter_config_is_read_or_refused_in_one_line(tmp_path):
    _, model = adapted()
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    about = json.loads(file.read_text())
    odd = [None, True, -1, 2.5, 10**30, math.nan, "a", [], ["a"], [[]], {}, {"a": 1}]
    for config in [*odd, *({**about, key: value} for key in [*about, "use_dora", "new"] for value in odd)]:
        file.write_text(json.dumps(config))
        try:
            load_adapter(base_model(), tmp_path)
        except ValueError as e:
            assert len(str(e).splitlines()) == 1
        else:
            assert isinstance(config, dict)


def test_an_adapter_knows_the_weights_it_was_tuned_on(tmp_path):
    base, model = adapted()
    base.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    check_base(tmp_path / "adapter", tmp_path / "base")  # PEFT's say nothing
    about = {"base_fingerprint": lora.weights_fingerprint(tmp_path / "base")}
    (tmp_path / "adapter/instruct.json").write_text(json.dumps(about))
    check_base(tmp_path / "adapter", tmp_path / "base")
    base_model(seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"other weights than .*base has now.*tune again"):
        check_base(tmp_path / "adapter", tmp_path / "base")


def test_a_loop_of_ones_own():
    """model.py alone is enough to train with."""
    model, tokens = base_model().train(), random_tokens(4, 21)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_lora_in_a_loop_of_ones_own(tmp_path):
    """What a notebook needs: numbers for a path and no settings twice; a tokenizer's ids are tokens after .tolist()."""
    tokens = torch.tensor([TOKENIZER.encode("Say hello world.").tolist()]) % 97
    model = add_lora(base_model()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(10):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model, str(tmp_path / "mine"))
    again = load_adapter(base_model(), str(tmp_path / "mine")).eval()
    assert torch.equal(again(tokens), model.eval()(tokens)) and not torch.equal(again(tokens), base_model()(tokens))
    torch.testing.assert_close(merge_lora(again)(tokens), model(tokens), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(model)
    with pytest.raises(ValueError, match="has no adapter"):
        save_adapter(again, tmp_path)


def test_memory_scales_with_the_adapters():
    """No gradient and no optimizer state for what is frozen, by the bytes allocated."""
    model = add_lora(base_model(), 2, 4.0).train()
    x = random_tokens(2, 20)
    model(x, x).backward()
    small = sum(p.numel() for _, layer in lora_layers(model) for p in (layer.lora_A.weight, layer.lora_B.weight))
    assert small < 0.2 * sum(p.numel() for p in model.parameters())
    assert sum(p.grad.numel() for p in model.parameters() if p.grad is not None) == small
    (optimizer,) = make_optimizers(model, TrainConfig(optimizer="adamw"))
    optimizer.step()
    state = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.numel() > 1]
    assert sum(t.numel() for t in state) == 2 * small


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "q_proj,k_proj,v_proj", "gate_proj,up_proj", "o_proj"])
def test_some_layers_alone_answer_without_autocast(targets):
    """A base of which a part was bfloat16 made queries of one dtype and keys of another."""
    _, model = adapted(targets=targets)
    cast_base_weights(model, torch.bfloat16)
    assert len(list(model.generate(random_tokens(2, 20), 2))) == 2


def test_base_kept_in_bfloat16_gives_the_same_gradients():
    gradients, x = [], random_tokens(2, 20)
    for kept_in in (torch.float32, torch.bfloat16):
        _, model = adapted()
        cast_base_weights(model, kept_in)
        with torch.autocast("cpu", torch.bfloat16):
            model(x, x).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))
    assert len(list(model.generate(x, 2))) == 2  # without autocast, as for the answers it shows
    assert {p.dtype for name, p in model.named_parameters() if "base_layer" not in name} == {torch.float32}


def test_frozen_weights_are_not_counted_as_trained():
    """MFU once took a LoRA update for a full one, half as much again."""
    config = GemmaConfig(vocab_size=512, hidden_size=64, intermediate_size=256, num_hidden_layers=6, head_dim=16,
                         num_attention_heads=4, sliding_window=64)  # fmt: skip
    model, x = add_lora(Gemma(config).init_weights(0), rank=2), torch.randint(0, 512, (2, 64))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(x, x).backward()
    counted = counter.get_total_flops() / x.numel()
    assert counted == pytest.approx(model.flops_per_token(64), rel=0.05)  # the first layer's input needs no gradient
    assert model.requires_grad_(True).flops_per_token(64) > 1.25 * counted


def test_dropout_acts_on_the_adapter_alone():
    layer = LoRALinear(torch.nn.Linear(8, 8, bias=False), 2, 2.0, 0.5)
    x = torch.randn(4, 8)
    assert torch.equal(layer(x), layer.base_layer(x))  # B is zero, so dropout shows nothing yet
    torch.nn.init.normal_(layer.lora_B.weight)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# ----------------------------------------------------------------------------------------------------------------------
# records


TOKENIZER = Tokenizer(train_bpe(["Say hi. Instruction Response Input hello world"] * 3, 300))


def tuning(records, **settings):
    config = GemmaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, head_dim=16, intermediate_size=32)
    settings = {"template": "short", "max_length": 100, "max_tokens_per_batch": 200} | settings
    model = Gemma(config).init_weights(0)
    conversations = [talk(record if isinstance(record, list) else [record]) for record in records]
    cfg = LoraConfig(**settings)
    return InstructionTuning(cfg, TuneConfig(), model, TOKENIZER, TEMPLATES[cfg.template], [conversations] * 2)


def talk(turns):
    """Messages of (instruction, input, response), a response of None being still to come."""
    messages = [message for turn in turns for message in exchange(*turn)]
    return messages if turns[-1][2] is not None else messages[:-1]


def unpacked(batches):
    """Inputs and targets of every record in packed rows, the longest first."""
    records = []
    for x, y, documents in batches:
        assert x.shape == y.shape == documents.shape
        for row in range(len(x)):
            numbers = documents[row]
            assert (y[row, numbers == 0] == -100).all()  # what fills up a row
            records += [(x[row, numbers == n], y[row, numbers == n]) for n in numbers.unique().tolist() if n]
    return sorted(records, key=lambda record: -len(record[0]))


def test_masks_token_by_token():
    task = tuning([("Say hi.", "", "hello"), ("Say hi.", "in", "hello world, hello")])
    x, y = zip(*unpacked(task.validation_batches()), strict=True)
    assert len(x) == 2
    for row, (prompt, response) in enumerate(
        [
            ("Input: in\nInstruction: Say hi.\nResponse:", " hello world, hello"),
            ("Instruction: Say hi.\nResponse:", " hello"),
        ]
    ):
        targets = [t for t in y[row].tolist() if t != -100]
        assert targets == [*TOKENIZER.encode(response), TOKENIZER.eot]
        first = y[row].tolist().index(targets[0])
        shown = x[row][: first + 1].tolist()
        assert shown[0] == TOKENIZER.eot and TOKENIZER.decode(shown) == prompt
        assert x[row][first + 1 :].tolist() == targets[:-1] and len(y[row]) == first + len(targets)


def test_every_response_of_a_conversation_is_learned():
    """Token by token: a response is predicted from all that was said before it, and nothing else is a target."""
    task = tuning([[("Say hi.", "in", "hello"), ("Say", "", "world")]])
    ((x, y),) = unpacked(task.validation_batches())
    said = [
        (False, "Input: in\nInstruction: Say hi.\nResponse:"), (True, " hello"),
        (False, "Instruction: Say\nResponse:"), (True, " world"),
    ]  # fmt: skip
    ids, targets = [TOKENIZER.eot], []
    for is_response, text in said:
        pieces = [*map(int, TOKENIZER.encode(text))] + [TOKENIZER.eot] * is_response
        ids += pieces
        targets += pieces if is_response else [-100] * len(pieces)
    assert x.tolist() == ids[:-1] and y.tolist() == targets


def test_long_records_lose_the_beginning_of_the_prompt_or_are_dropped():
    """All labels masked after truncation, reported as loss 0 (trl 6668), can't happen."""
    long = "word " * 80
    records = [(long, "", "hello"), ("Say hi.", "", long), ("Say hi.", "", "hello"), ("Say", "", "")]
    task = tuning([*records, [("Say hi.", "", long), ("Say", "", "hello")]], max_length=40)
    assert task.dropped == 4 and len(task.train_set) == 3  # two of five, in both halves
    for ids, targets in (task.train_set[0], task.train_set[2]):
        is_response = targets != -100
        assert len(ids) <= 40 and ids[0] == TOKENIZER.eot and not is_response[0]
        assert TOKENIZER.decode(ids[~is_response].tolist()).endswith("\nResponse:")
        assert TOKENIZER.decode(ids[is_response].tolist()) == " hello"  # a response without its beginning is gone
    assert len(task.train_set[0][0]) == 40
    for x, y in unpacked(task.validation_batches()):
        assert (y != -100).any() and len(x) < 40
    with pytest.raises(UserError, match="no train record has a response within 40 tokens"):
        tuning([("Say hi.", "", long)], max_length=40)


def test_batches_have_one_shape_and_hold_every_record_once():
    """Packed: within the budget, with little padding, and a record's loss is what it is in a row of its own."""
    records = [("Say hi.", "", "hello " * (1 + i % 9)) for i in range(600)]
    task = tuning(records)
    assert sorted(i for row in task.train_rows for i in row) == list(range(600))
    tokens = sum(len(ids) - 1 for ids, _ in task.train_set)
    assert tokens > 0.9 * len(task.train_rows) * task.row_length  # 1% of padding in the fables' 6,000 conversations
    shapes = {tuple(t.shape) for step in range(5) for batch in task.micro_batches(step) for t in batch}
    assert shapes == {(task.rows_per_batch, task.row_length)} and 100 < task.rows_per_batch * task.row_length <= 200
    model = task.model.eval()
    for batch in task.micro_batches(0):
        alone = sum(model(x[None], y[None], reduction="sum") for x, y in unpacked([batch]))
        torch.testing.assert_close(model(*batch, reduction="sum"), alone)


@pytest.mark.parametrize(
    "record, turns",
    [
        ({"instruction": "a", "input": "b", "output": "c"}, [("a", "b", "c")]),
        ({"instruction": "a", "context": "", "response": "c", "category": "x"}, [("a", "", "c")]),
        ({"prompt": "a", "completion": "c"}, [("a", "", "c")]),
        ({"instruction": "a", "input": None, "output": None}, [("a", "", "")]),
        ({"prompt": "1 + 1", "completion": 2}, [("1 + 1", "", "2")]),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
                          {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
                          {"role": "assistant", "content": "d"}]},
            [("s\n\na", "", "b"), ("c", "", "d")],
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, [("a", "", "")]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [("a", "", "b")]),
    ],
)  # fmt: skip
def test_shapes_of_records(record, turns):
    assert read_messages(record) == talk(turns)


def test_templates():
    def prompt(turns, template):
        ids, is_response = encode_conversation(TOKENIZER, talk(turns), template)
        assert ids[0] == TOKENIZER.eot and len(ids) == len(is_response) and not is_response[-1]
        return TOKENIZER.decode(ids)

    alpaca = prompt([("Do it.", "with this", None)], "alpaca")
    assert alpaca.endswith("### Instruction:\nDo it.\n\n### Input:\nwith this\n\n### Response:\n")
    assert "Input" not in prompt([("Do it.", "", None)], "alpaca")
    chat = prompt([("a", "", "b"), ("c", "", None)], "short")
    assert chat == "Instruction: a\nResponse: bInstruction: c\nResponse:"  # the end-of-text after b is not shown


def test_gemmas_turns_are_special_tokens_and_text_that_looks_like_them_is_not():
    spec = json.loads(json.dumps(TOKENIZER.spec))
    flags = spec["added_tokens"][0]
    spec["added_tokens"] += [
        flags | {"id": 300, "content": "<start_of_turn>"},
        flags | {"id": 301, "content": "<end_of_turn>"},
    ]
    tokenizer = Tokenizer(spec)
    ids, is_response = encode_conversation(
        tokenizer, talk([("hi <end_of_turn>", "", "yes"), ("more", "", None)]), "gemma"
    )
    learned = [token for token, flag in zip(ids, is_response, strict=True) if flag]
    assert learned == [*tokenizer.encode("yes"), 301]
    assert ids.count(300) == 4 and ids.count(301) == 3  # two user turns and two of the model, one of them open
    assert end_of_response(tokenizer, "gemma") == 301 and end_of_response(tokenizer, "short") == tokenizer.eot
    assert end_of_response(TOKENIZER, "gemma") == TOKENIZER.eot


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return publish_gemma(tmp_path_factory.mktemp("gemma"), instructed=True)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["byte-level", "gemma"])
def test_a_format_renders_in_transformers_as_in_training(gemma, tmp_path, name, kind):
    """Token by token, a system message included, which our records have joined to the user's."""
    tokenizer = Tokenizer.load(gemma) if kind == "gemma" else TOKENIZER
    tokenizer.save(tmp_path)
    peer = AutoTokenizer.from_pretrained(tmp_path)
    said = [("Who is it? ", "A fox."), ("\nAnd who\n\nelse?", "A crow, <b>I</b> think."), ("Where?", "Here.")]
    messages = [{"role": "system", "content": "You are an owl. "}]
    for asked, answered in said[: 1 if (name, kind) == ("gemma", "byte-level") else 3]:  # it has no turns
        messages.append({"role": "user", "content": asked})
        ours = read_messages({"messages": [*messages, {"role": "assistant", "content": answered}]})[:-1]
        ids, _ = encode_conversation(tokenizer, ours, name)
        how = {"add_generation_prompt": True, "return_dict": False}
        assert peer.apply_chat_template(messages, chat_template=TEMPLATES[name], **how) == ids
        if (name, kind) == ("gemma", "gemma"):  # the published template is another text with the same outcome
            assert encode_conversation(tokenizer, ours, tokenizer.config["chat_template"])[0] == ids
            turns = [{"role": m["role"], "content": m["content"]} for m in ours]
            assert peer.apply_chat_template(turns, **how) == ids
        messages.append({"role": "assistant", "content": answered})


def test_another_format_is_one_entry(monkeypatch):
    """With turn tokens, and text after a response, which was dropped once."""
    chatml = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\nNext:\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    monkeypatch.setitem(TEMPLATES, "chatml", chatml)
    assert LoraConfig(template="chatml")
    spec = json.loads(json.dumps(TOKENIZER.spec))
    flags = spec["added_tokens"][0]
    spec["added_tokens"] += [flags | {"id": 300 + i, "content": name} for i, name in enumerate(
        ("<|im_start|>", "<|im_end|>"))]  # fmt: skip
    tokenizer = Tokenizer(spec)
    ids, is_response = encode_conversation(tokenizer, talk([("a", "", "b"), ("c", "", "d")]), "chatml")
    start, end, after = [300], [301], tokenizer.encode("\nNext:\n").tolist()
    said = zip(["user", "assistant"] * 2, "abcd", strict=True)
    said = [(role, tokenizer.encode(text).tolist()) for role, text in said]
    expected = [tokenizer.bos]
    for role, text in said:
        expected += start + tokenizer.encode(f"{role}\n").tolist() + text + end + after
    assert ids == expected[: -len(after)] and end_of_response(tokenizer, "chatml") == 301
    learned = [t for t, flag in zip(ids, is_response, strict=True) if flag]
    assert learned == said[1][1] + end + said[3][1] + end


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out or repeats"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "leaves out or repeats"),
        ("{% for m in messages %}", "can't be rendered: .*endfor"),
        ("{{ raise_exception('no system\nhere') }}", "can't be rendered: 'raise_exception' is undefined"),
        ("{{ messages.__class__.__mro__ }}", "can't be rendered: .*unsafe"),
        ("{{ missing.key }}", "can't be rendered: 'missing' is undefined"),
    ],
)
def test_a_strangers_chat_template_is_rendered_in_a_sandbox(template, message):
    with pytest.raises(UserError, match=message) as found:
        encode_conversation(TOKENIZER, exchange("a", "", "b"), template)
    assert "\n" not in str(found.value)


def test_answers_come_in_order_whatever_their_lengths():
    records = [("Say hi. " * (1 + 7 * i % 5), "", "hello") for i in range(9)]
    task = tuning(records)
    together = task.answers(task.val_records, [2 + i for i in range(9)], temperature=0)
    alone = [task.answers([talk([r])], [2 + i], temperature=0)[0] for i, r in enumerate(records)]
    assert together == alone and len(set(alone)) > 4


@pytest.mark.parametrize("count, updates", [(50, 100), (200, 150), (1100, 300), (12_000, 300)])
def test_defaults_suit_any_number_of_records(count, updates):
    task = tuning([("Say hi.", "", "hello")] * count, max_tokens_per_batch=10**6)
    loop = fill_in(task, {})
    assert loop.max_iters == pytest.approx(updates, rel=0.1) and loop.learning_rate == 1 / 32
    assert loop.eval_interval == pytest.approx(count / max(4, count / 100), rel=0.1)
    assert warmup_updates(loop) == loop.max_iters / 20
    task.cfg = TuneConfig(learning_rate=1.0, max_iters=7)
    assert (fill_in(task, {}).max_iters, fill_in(task, {}).learning_rate) == (7, 1.0)


def test_help_shows_inherited_settings_with_their_comments():
    text = usage([TuneConfig])
    assert "--momentum=0.95" in text and "decay of the mean gradient" in text  # train.py's
    assert text.count("--learning_rate") == 1 and "hidden_size" in text  # ours


# ----------------------------------------------------------------------------------------------------------------------
# whole runs


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with a tiny trained model and 120 records of our own."""
    path = copy_project(tmp_path_factory.mktemp("project"))
    run_script(
        path, "prepare.py", "--dataset=fables", "--max_documents=300", "--val_fraction=0.05", "--tokenizer=bpe:400"
    )
    run_script(path, "train.py", "--dataset=fables", *TINY, "--max_iters=10", "--learning_rate=0.01")
    records = [
        {"instruction": f"Say {w} {i}.", "output": f"{w} {i}"} for i in range(40) for w in ("fox", "crow", "owl")
    ]
    (path / "records.json").write_text(json.dumps(records))
    return path


LORA = """
--data=records.json --template=short --init_from=out/fables/best --forgetting=fables --val_fraction=0.2 --epochs=4
--max_length=64 --max_tokens_per_batch=256 --batch_size=99 --rank=2 --eval_interval=10
--log_interval=1 --sample_tokens=8
--num_samples=2 --compile=False --device=cpu --learning_rate=0.01 --warmup_iters=2
""".split()  # noqa: SIM905


def tune(project, out, *args):
    """Run lora.py in this process, in the project's folder -> (the run's folder, what it printed)."""
    printed = io.StringIO()
    with contextlib.chdir(project), contextlib.redirect_stdout(printed), patch("train.DATA", project / "data"):
        lora.main(*configure([LoraConfig, TuneConfig], [*LORA, f"--out_dir=out/{out}", *args]))
    return project / "out" / out, printed.getvalue()


@pytest.mark.parametrize("rank", [2, 0])
def test_a_run_learns_reports_and_saves(project, rank):
    run, printed = tune(project, f"run{rank}", f"--rank={rank}", "--merge=True")
    evals = [e for e in read_log(run / "log.jsonl") if e["event"] == "eval"]
    assert evals[-1]["val_loss"] < 0.9 * evals[0]["val_loss"]
    assert evals[-1]["val_perplexity"] == pytest.approx(math.exp(evals[-1]["val_loss"]))
    for line in ("instruction: Say", "before:", "after:", "response perplexity:", "bits per byte on plain text:"):
        assert line in printed and line in (run / "samples.txt").read_text()
    assert (run / "best" / ("adapter_config.json" if rank else "config.json")).exists()
    merged = Gemma.from_pretrained(run / "merged").eval()
    tuned = Gemma.from_pretrained(project / "out/fables/best" if rank else run / "best").eval()
    if rank:
        load_adapter(tuned, run / "best")
    x = random_tokens(1, 12)
    torch.testing.assert_close(merged(x), tuned.eval()(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rank", [2, 0])
def test_the_best_checkpoint_is_reported_and_merged(project, rank):
    """Not the last, which a rate far too high has ruined here."""
    how = ("--learning_rate=30", "--warmup_iters=1", "--grad_clip=0", "--epochs=1", "--merge=True")
    run, printed = tune(project, f"ruined{rank}", f"--rank={rank}", *how)
    evals = [e["val_loss"] for e in read_log(run / "log.jsonl") if e["event"] == "eval"]
    assert evals[-1] > evals[0] + 0.1
    for figure in ("response loss", "bits per byte on plain text"):  # of the log; of the best checkpoint, opened again
        before, after = re.search(rf"{figure}: ([\d.]+) before, ([\d.]+) after", printed).groups()
        assert after == before
    assert min(evals) == evals[0]
    merged, base = Gemma.from_pretrained(run / "merged"), Gemma.from_pretrained(project / "out/fables/best")
    assert torch.equal(merged(random_tokens(1, 12)), base(random_tokens(1, 12)))


def test_an_adapter_is_not_resumed_on_a_base_trained_again(project):
    base = project / "out" / "other"
    shutil.copytree(project / "out/fables/best", base)
    how = ["--init_from=out/other", "--epochs=1", "--forgetting=", "--num_samples=0"]
    tune(project, "moved", *how)
    model = Gemma.from_pretrained(base)
    model.model.norm.weight.data += 0.1
    model.save_pretrained(base)
    with pytest.raises(UserError, match="other weights than out/other has now"):
        tune(project, "moved", *how, "--init_from=resume")


@pytest.mark.parametrize("instructed", [False, True])
def test_a_published_checkpoint_is_tuned_and_opens_in_peft(project, tmp_path, instructed):
    """A run on a directory as Google publishes them: the adapter opens in PEFT, the merged model in transformers, both
    with our logits; an instructed model is tuned in its own turns, and any tuned one stops where its answers do."""
    base = publish_gemma(tmp_path / "published", instructed)
    run, _ = tune(
        project, f"published{instructed}", f"--init_from={base}", "--forgetting=", "--epochs=1", "--merge=True",
        "--learning_rate=0.003",
        "--max_length=128", *(["--template="] if instructed else ["--template=alpaca", "--max_length=256"]),
    )  # fmt: skip
    template = json.loads((run / "best/instruct.json").read_text())["template"]
    assert template == (Tokenizer.load(base).config["chat_template"] if instructed else TEMPLATES["alpaca"])
    tokenizer = Tokenizer.load(run / "last")
    ids, _ = encode_conversation(tokenizer, exchange("Say fox 3.", "", "fox 3"), template)
    x = torch.tensor([ids])
    ours = load_adapter(Gemma.from_pretrained(base), run / "last").eval()(x)
    assert not torch.equal(ours, Gemma.from_pretrained(base).eval()(x))
    peer = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run / "last")
    assert (peer.eval()(x).logits - ours).abs().max() < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32).eval()
    assert (merged(x).logits - ours).abs().max() < 1e-4
    end = end_of_response(tokenizer, template)
    stops = merged.generation_config.eos_token_id
    assert stops == ([1, end] if instructed else 1) and ids[-1] == end
    theirs = AutoTokenizer.from_pretrained(run / "merged")
    messages = [{"role": "user", "content": "Say fox 3."}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert rendered == ids[: len(rendered)] and tokenizer.decode(ids[len(rendered) :]) == "fox 3"


@pytest.mark.parametrize("rank", [2, 0])
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(project, rank):
    args = [f"--rank={rank}", "--lora_dropout=0.1", "--dtype=float32"]
    whole, _ = tune(project, f"whole{rank}", *args)
    killed, rate = project / "out" / f"killed{rank}", train.learning_rate
    stop = patch("train.learning_rate", lambda step, cfg: sys.exit(9) if step == 13 else rate(step, cfg))
    with stop, pytest.raises(SystemExit):
        tune(project, f"killed{rank}", *args)
    assert losses(killed)[-1][0] == 13
    _, printed = tune(project, f"killed{rank}", *args, "--init_from=resume")
    assert "other settings" not in printed
    assert losses(killed) == losses(whole)
    name = "adapter_model.safetensors" if rank else "model.safetensors"
    assert (killed / "last" / name).read_bytes() == (whole / "last" / name).read_bytes()
    # the report compares with the model before any tuning, not before the resumption
    reports = [(run / "samples.txt").read_text().split("--- before and after")[1] for run in (killed, whole)]
    assert reports[0] == reports[1]


def test_a_resumed_run_keeps_the_settings_that_are_not_given_again(project):
    run, _ = tune(project, "kept", "--max_iters=3", "--eval_interval=2")
    tune(project, "kept", "--init_from=resume")
    assert [e["step"] for e in read_log(run / "log.jsonl") if e["event"] == "eval"] == [0, 2, 3]
    _, printed = tune(project, "kept", "--init_from=resume", "--epochs=0.5")
    assert "epochs 4.0 -> 0.5" in printed and "0.5 epochs" in printed
    tune(project, "kept", "--init_from=resume", "--epochs=0.5", "--forgetting=")  # measured before, and not after
    _, printed = tune(project, "kept", "--init_from=resume", "--epochs=0.5", "--max_iters=5")
    assert "max_iters" in printed
    run, printed = tune(project, "kept", "--init_from=resume", "--epochs=2", "--max_iters=7")  # both at once
    assert "epochs 0.5 -> 2.0" in printed and read_log(run / "log.jsonl")[-1]["step"] == 7
    with pytest.raises(UserError, match="another dataset"):
        tune(project, "kept", "--init_from=resume", "--max_records=60")


def test_an_instruction_may_be_empty(project):
    """A run once ended in a traceback, where it names the next command."""
    (project / "bare.json").write_text(json.dumps([{"instruction": "", "input": "x", "output": "y"}] * 12))
    _, printed = tune(project, "bare", "--data=bare.json", "--max_iters=1")
    assert "--instruct=" in printed.splitlines()[-1]


@pytest.mark.parametrize("names", ["generation_config", "tokenizer_config"])
def test_a_model_that_ends_at_the_end_of_a_turn_alone_takes_turns(tmp_path, names):
    base = publish_gemma(tmp_path / "published", instructed=True)
    end = json.loads((base / "generation_config.json").read_text())["eos_token_id"][1]
    file, key, value = base / f"{names}.json", *{
        "generation_config": ("eos_token_id", end), "tokenizer_config": ("eos_token", "<end_of_turn>")
    }[names]  # fmt: skip
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    tokenizer = Tokenizer.load(base)
    assert template_of(base, tokenizer) == tokenizer.config["chat_template"]


@pytest.mark.parametrize("word", "abcdefgh")
def test_of_two_records_one_is_held_out(tmp_path, word):
    records = [{"prompt": f"Say {word} {i}.", "completion": f"{word} {i}"} for i in range(2)]
    (tmp_path / "two.json").write_text(json.dumps(records))
    train_records, val_records = open_records(LoraConfig(data=str(tmp_path / "two.json")), seed=0)
    assert len(train_records) == len(val_records) == 1


@pytest.mark.parametrize(
    "args, message",
    [
        (["--init_from=scratch"], "LoRA tunes a trained model"),
        (["--targets=qkv"], "match nothing"),
        (["--data=nowhere.json"], "no such file"),
        (["--template=none"], "must be one of alpaca"),
        (["--rank=-1"], "at least 0"),
        (["--max_length=600", "--max_tokens_per_batch=600"], "exceeds max_position_embeddings=512"),
        (["--forgetting=nothing"], "no such set"),
        (["--data=odd.jsonl"], "known are instruction/input/output"),
    ],
)
def test_mistakes_end_in_one_line(project, args, message):
    (project / "odd.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(UserError, match=message) as found:
        tune(project, "mistake", *args)
    assert "\n" not in str(found.value)


def test_fable_instructions_are_right_and_held_out_pairs_are_unseen():
    assert TASKS == ["tell", "rewrite", "friend", "kind", "home", "lesson"]
    seen = [conversation(i, task) for i in range(100) for task in TASKS]
    held_out = [conversation(i, task, held_out=True) for i in range(20) for task in TASKS]
    for turns, held in [(turns, False) for turns in seen] + [(turns, True) for turns in held_out]:
        first, *others = turns
        ((_, slots),) = derivations(first["input"] or first["output"])
        assert is_held_out(slots["kind"], slots["plot"]) == held
        for turn in turns:
            assert follows(turn, turn["output"]) and not follows(turn, "I do not know.")
        for turn in others:  # asked without its text, of the fable before
            assert not turn["input"] and turn["task"] in ("friend", "kind", "home", "lesson")
        if first["task"] == "rewrite":
            ((_, retold),) = derivations(first["output"])
            changed = {slot for slot in slots if slots[slot] != retold.get(slot, slots[slot])}
            assert changed == {"kind"} and not follows(first, first["input"])
        assert (
            len(turns) == 1 if first["task"] == "rewrite" else len({turn["task"] for turn in turns}) == len(turns) > 3
        )


@pytest.mark.parametrize("count", [1000, pytest.param(6000, marks=pytest.mark.slow)])
def test_no_fable_of_a_held_out_pair_is_trained_on(count):
    """Every text of the recipe's training conversations; of 6,000 the outputs of 134 rewrites were once."""
    pairs = {held: set() for held in (False, True)}
    for held in (False, True):
        for messages in records(1337, count // (1 + 4 * held), held_out=held):
            for text in {m[key] for m in messages for key in ("content", "input") if len(m.get(key, "")) > 300}:
                ((_, slots),) = derivations(text)
                pairs[held].add((slots["kind"], slots["plot"]))
    assert not any(is_held_out(*pair) for pair in pairs[False]) and all(is_held_out(*pair) for pair in pairs[True])
    assert len(pairs[False]) > 500 and len(pairs[True]) > 80


def test_fable_records_are_conversations_and_what_to_check_answers_by():
    train_records, val_records = open_records(LoraConfig(max_records=30, num_checked=12), seed=0)
    assert len(train_records) == 30 and len(val_records) == 12
    for (asked, wanted), task in zip(val_records, TASKS * 2, strict=True):
        assert asked["turn"]["task"] == task and follows(asked["turn"], wanted["content"])
