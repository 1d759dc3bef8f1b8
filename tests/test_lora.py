"""lora.py: LoRA against PEFT, the packing of records, and whole tuning runs."""

import contextlib
import io
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import (
    TINY,
    adapted,
    base_model,
    copy_project,
    losses,
    prepare_fables,
    publish_gemma,
    random_tokens,
    run_script,
    small_tokenizer,
    talk,
)
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM

import lora
import train
from data.fable_grammar import TASKS, follows
from lora import (
    TEMPLATES,
    InstructionTuning,
    LoraConfig,
    LoRALinear,
    TuneConfig,
    add_lora,
    cast_base_weights,
    choose_template,
    fill_in,
    load_adapter,
    lora_layers,
    merge_lora,
    open_records,
    report,
    save_adapter,
)
from model import Gemma, GemmaConfig
from support.conversations import encode_conversation, end_of_response, exchange
from support.log import read_log
from support.settings import UserError, configure
from support.tokenizer import Tokenizer
from train import TrainConfig, make_optimizers, warmup_steps

TOKENIZER = small_tokenizer()


# ---- LoRA itself -----------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing():
    x = random_tokens(2, 20)
    assert torch.equal(base_model()(x), add_lora(base_model(), 4, 8.0)(x))


@pytest.mark.parametrize("target_modules", ["all-linear", "q_proj,v_proj"])
def test_our_adapter_opens_in_peft_with_our_logits(tmp_path, target_modules):
    base, model = adapted(target_modules)
    base.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", "base")
    peer = PeftModel.from_pretrained(Gemma3ForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    x = random_tokens(2, 20)
    assert not torch.allclose(model(x), base(x), atol=1e-2)
    torch.testing.assert_close(model(x), peer(x).logits, atol=1e-4, rtol=0)


def test_gradients_equal_those_of_peft(tmp_path):
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


def test_an_opened_adapter_draws_no_dropout_and_a_merged_model_can_be_trained(tmp_path):
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


def test_an_adapter_survives_a_round_trip(tmp_path):
    _, model = adapted()
    save_adapter(model, str(tmp_path))
    again = load_adapter(base_model(), tmp_path).eval()
    x = random_tokens(2, 20)
    assert torch.equal(model(x), again(x))


def test_merging_keeps_the_function_and_the_tied_embedding(tmp_path):
    """Merging must not touch the embedding, which is also the head (peft 2018, transformers 45127)."""
    base, model = adapted()
    x = random_tokens(2, 20)
    before = model(x)
    merge_lora(model)
    assert not lora_layers(model)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=0)
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(Gemma3ForCausalLM.from_pretrained(tmp_path)(x).logits, before, atol=1e-4, rtol=0)


def test_target_modules_are_found_by_name_and_an_unknown_name_is_an_error():
    """minimind 570: a filter by square shape matches no layer of Gemma 3 270M, silently."""
    model = add_lora(base_model(), 2, 4.0, target_modules="q_proj, down_proj")
    assert {name.rpartition(".")[2] for name, _ in lora_layers(model)} == {"q_proj", "down_proj"}
    with pytest.raises(ValueError, match=r"qkv: no such linear layers; the model has down_proj, gate_proj"):
        add_lora(base_model(), 2, 4.0, target_modules="q_proj,qkv")


def test_lora_works_in_your_own_loop(tmp_path):
    """In a notebook a path may be a str, no setting is named twice, and .tolist() makes tokens of a tokenizer's ids."""
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


def test_frozen_weights_have_no_gradient_and_no_optimizer_state():
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


@pytest.mark.parametrize("target_modules", ["q_proj,v_proj", "q_proj,k_proj,v_proj", "gate_proj,up_proj", "o_proj"])
def test_adapters_on_some_layers_answer_without_autocast(target_modules):
    """When a part of the base was bfloat16, queries had one dtype and keys another."""
    _, model = adapted(target_modules)
    cast_base_weights(model, torch.bfloat16)
    assert len(list(model.generate(random_tokens(2, 20), 2))) == 2


def test_a_base_stored_in_bfloat16_gives_the_same_gradients():
    gradients, x = [], random_tokens(2, 20)
    for dtype in (torch.float32, torch.bfloat16):
        _, model = adapted()
        cast_base_weights(model, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            model(x, x).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))
    assert len(list(model.generate(x, 2))) == 2  # without autocast, like the answers in the report
    assert {p.dtype for name, p in model.named_parameters() if "base_layer" not in name} == {torch.float32}


def test_a_published_embedding_is_stored_in_bfloat16_and_computes_the_same():
    """Its values are bfloat16 anyway. It is most of a small Gemma: 168M of 268M parameters."""
    x, results = random_tokens(2, 20), []
    for dtype in (torch.float32, torch.bfloat16):
        _, model = adapted()
        embedding = model.model.embed_tokens
        embedding.weight.data = embedding.weight.bfloat16().float()
        cast_base_weights(model, dtype)
        assert embedding.weight.dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, x)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(map(torch.equal, *results))
    assert len(list(model.generate(x, 2))) == 2


def test_flops_of_frozen_weights_count_less():
    """MFU once counted a LoRA step as a step that trains all weights, which is half as much again."""
    config = GemmaConfig(vocab_size=512, hidden_size=64, intermediate_size=256, num_hidden_layers=6, head_dim=16,
                         num_attention_heads=4, sliding_window=64)  # fmt: skip
    model, x = add_lora(Gemma(config).init_weights(0), rank=2), torch.randint(0, 512, (2, 64))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(x, x).backward()
    counted = counter.get_total_flops() / x.numel()
    assert counted == pytest.approx(model.flops_per_token(64), rel=0.05)  # the first layer's input needs no gradient
    assert model.requires_grad_(True).flops_per_token(64) > 1.25 * counted


def test_dropout_acts_on_the_adapter_only():
    layer = LoRALinear(torch.nn.Linear(8, 8, bias=False), 2, 2.0, 0.5)
    x = torch.randn(4, 8)
    assert torch.equal(layer(x), layer.base_layer(x))  # B is zero, so dropout shows nothing yet
    torch.nn.init.normal_(layer.lora_B.weight)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# ---- records ---------------------------------------------------------------------------------------------------------


def tuning(records, **settings):
    """Return a task whose records are (instruction, input, response), or lists of such turns. It trains on all records
    and also evaluates on all."""
    config = GemmaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, head_dim=16, intermediate_size=32)
    settings = {"template": "short", "max_length": 100, "max_tokens_per_batch": 200} | settings
    model = Gemma(config).init_weights(0)
    conversations = [talk(record if isinstance(record, list) else [record]) for record in records]
    cfg = LoraConfig(**settings)
    return InstructionTuning(cfg, TuneConfig(), model, TOKENIZER, TEMPLATES[cfg.template], [conversations] * 2)


def unpacked(batches):
    """Return the (tokens, labels) of every record in packed rows, the longest first."""
    records = []
    for x, y, doc_ids in batches:
        assert x.shape == y.shape == doc_ids.shape
        for row in range(len(x)):
            numbers = doc_ids[row]
            assert (y[row, numbers == 0] == -100).all()  # padding
            records += [(x[row, numbers == n], y[row, numbers == n]) for n in numbers.unique().tolist() if n]
    return sorted(records, key=lambda record: -len(record[0]))


def test_only_the_response_and_its_end_are_labels():
    task = tuning([("Say hi.", "", "hello"), ("Say hi.", "in", "hello world, hello")])
    x, y = zip(*unpacked(task.validation_sets()["val"]), strict=True)
    assert len(x) == 2
    for row, (prompt, response) in enumerate(
        [
            ("Input: in\nInstruction: Say hi.\nResponse:", " hello world, hello"),
            ("Instruction: Say hi.\nResponse:", " hello"),
        ]
    ):
        labels = [t for t in y[row].tolist() if t != -100]
        assert labels == [*TOKENIZER.encode(response), TOKENIZER.eot]
        first = y[row].tolist().index(labels[0])
        shown = x[row][: first + 1].tolist()
        assert shown[0] == TOKENIZER.eot and TOKENIZER.decode(shown) == prompt
        assert x[row][first + 1 :].tolist() == labels[:-1] and len(y[row]) == first + len(labels)


def test_every_response_of_a_conversation_is_learned():
    """Each response is predicted from all turns before it, and only responses are labels."""
    task = tuning([[("Say hi.", "in", "hello"), ("Say", "", "world")]])
    ((x, y),) = unpacked(task.validation_sets()["val"])
    parts = [
        (False, "Input: in\nInstruction: Say hi.\nResponse:"), (True, " hello"),
        (False, "Instruction: Say\nResponse:"), (True, " world"),
    ]  # fmt: skip
    ids, labels = [TOKENIZER.eot], []
    for is_response, text in parts:
        pieces = [*map(int, TOKENIZER.encode(text))] + [TOKENIZER.eot] * is_response
        ids += pieces
        labels += pieces if is_response else [-100] * len(pieces)
    assert x.tolist() == ids[:-1] and y.tolist() == labels


LONG = "word " * 80


@pytest.mark.parametrize(
    "turns, kept",
    [
        ([("Say hi.", "", "hello")], [("Say hi.", "", "hello")]),
        ([("a", "", LONG), ("b", "", "c")], [("b", "", "c")]),  # the oldest turn goes
        ([("a", "", "b"), (LONG, "", "c")], None),  # neither an instruction nor a response is cut
        ([("a", "", LONG)], None),
        ([("a", "", "")], None),
        ([("a", "", "b"), ("c", "", " ")], None),  # no response to learn
    ],
)
def test_long_conversations_lose_old_turns_but_never_an_instruction_or_a_response(turns, kept):
    """The beginning was cut, which is the instruction itself, and nothing was said. No record has only masked labels,
    which trl reported as loss 0 (trl 6668)."""
    task = tuning([[("Say", "", "hello")]], max_length=40)
    shortened = task.shorten(talk(turns))
    assert (shortened and shortened[0]) == (kept and talk(kept))
    task = tuning([[("Say", "", "hello")], turns], max_length=40)
    assert (task.cut, task.dropped) == (2 * (kept not in (None, turns)), 2 * (kept is None))  # in both splits
    assert all(1 + len(tokens) <= 40 for tokens, _ in task.train_set)


def test_a_long_input_loses_its_end_and_a_system_message_stays(capsys):
    task = tuning([[("Say", "", "hello")]], max_length=40)
    (user, assistant), ids, _ = task.shorten(talk([("Say hi.", LONG, "hello")]))
    assert (user["content"], assistant["content"]) == ("Say hi.", "hello")
    assert LONG.startswith(user["input"]) and len(user["input"]) > 20
    assert 30 < len(ids) <= 40 and ids == encode_conversation(TOKENIZER, [user, assistant], task.template)[0]
    messages = talk([("a", "", LONG), ("b", "", "c")])
    messages[0]["system"] = "Rhyme."
    assert task.shorten(messages)[0][0]["system"] == "Rhyme."
    with pytest.raises(UserError, match="no train record has a response within 40 tokens"):
        tuning([("Say hi.", "", LONG)], max_length=40)


def test_batches_have_one_shape_and_hold_every_record_once():
    """Rows stay within the limit and have little padding. A record has the same loss as in a row of its own."""
    records = [("Say hi.", "", "hello " * (1 + i % 9)) for i in range(600)]
    task = tuning(records)
    assert sorted(i for row in task.train_rows for i in row) == list(range(600))
    tokens = sum(len(tokens) for tokens, _ in task.train_set)
    assert tokens > 0.9 * len(task.train_rows) * task.row_length  # the fables' 6,000 conversations have 1% of padding
    shapes = {tuple(t.shape) for step in range(5) for batch in task.micro_batches(step) for t in batch}
    assert shapes == {(task.rows_per_batch, task.row_length)} and 100 < task.rows_per_batch * task.row_length <= 200
    model = task.model.eval()
    for batch in task.micro_batches(0):
        alone = sum(model(x[None], y[None], reduction="sum") for x, y in unpacked([batch]))
        torch.testing.assert_close(model(*batch, reduction="sum"), alone)


def test_answers_come_in_the_order_of_their_prompts():
    records = [("Say hi. " * (1 + 7 * i % 5), "", "hello") for i in range(9)]
    task = tuning(records)
    together = task.answers(task.val_records, [2 + i for i in range(9)])
    alone = [task.answers([talk([r])], [2 + i])[0] for i, r in enumerate(records)]
    assert together == alone and len(set(alone)) > 4


@pytest.mark.parametrize("count, steps", [(20, 50), (50, 50), (200, 100), (1100, 200), (12_000, 200)])
def test_defaults_suit_any_number_of_records(count, steps):
    task = tuning([("Say hi.", "", "hello")] * count, max_tokens_per_batch=10**6)
    cfg = fill_in(task, {})
    assert cfg.max_iters == pytest.approx(steps, rel=0.1) and cfg.learning_rate == 1 / 32  # a toy's
    assert cfg.eval_interval == pytest.approx(count / max(4, count / 100), rel=0.1)
    assert warmup_steps(cfg) == cfg.max_iters / 20
    task.cfg = TuneConfig(learning_rate=1.0, max_iters=7)
    assert (fill_in(task, {}).max_iters, fill_in(task, {}).learning_rate) == (7, 1.0)


@pytest.mark.parametrize("width, rank, rate", [(32, 8, 1 / 32), (192, 8, 100 / 192**2), (640, 8, 100 / 640**2),
                                               (1152, 8, 2e-4), (640, 0, 10 / 640**2)])  # fmt: skip
def test_the_default_rate_suits_google_s_models_and_toys(width, rank, rate):
    task = tuning([("Say hi.", "", "hello")], rank=rank)
    task.model.config.hidden_size = width
    assert fill_in(task, {}).learning_rate == pytest.approx(rate)


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with a tiny trained model and 120 records."""
    path = prepare_fables(copy_project(tmp_path_factory.mktemp("project")))
    run_script(path, "train.py", "--dataset=fables", *TINY, "--max_iters=10", "--learning_rate=0.01")
    records = [
        {"instruction": f"Say {w} {i}.", "output": f"{w} {i}"} for i in range(40) for w in ("fox", "crow", "owl")
    ]
    (path / "records.json").write_text(json.dumps(records))
    return path


LORA = """
--data=records.json --template=short --init_from=out/fables/best --val_fraction=0.2 --epochs=4 --max_length=64
--max_tokens_per_batch=256 --batch_size=99 --rank=2 --eval_interval=10 --log_interval=1 --sample_tokens=8
--num_samples=2 --compile=False --device=cpu --learning_rate=0.01 --warmup_iters=2
""".split()  # noqa: SIM905


def tune(project, out, *args):
    """Run lora.py in this process, in the project's folder. Return the run's folder and what was printed."""
    printed = io.StringIO()
    with contextlib.chdir(project), contextlib.redirect_stdout(printed):
        lora.main(*configure([LoraConfig, TuneConfig], [*LORA, f"--out_dir=out/{out}", *args]))
    return project / "out" / out, printed.getvalue()


@pytest.mark.parametrize("rank", [2, 0])
def test_a_run_learns_reports_and_saves(project, rank):
    run, printed = tune(project, f"run{rank}", f"--rank={rank}", "--merge=True")
    evals = [e for e in read_log(run / "log.jsonl") if e["event"] == "eval"]
    assert evals[-1]["val_loss"] < 0.9 * evals[0]["val_loss"]
    assert evals[-1]["val_perplexity"] == pytest.approx(math.exp(evals[-1]["val_loss"]))
    for line in ("instruction: Say", "before:", "after:", "response perplexity:"):
        assert line in printed and line in (run / "samples.txt").read_text()
    report = next(e for e in read_log(run / "log.jsonl") if e["event"] == "report")
    figures = re.search(r"exact match: ([\d.]+) before, ([\d.]+) after", printed).groups()
    assert figures == tuple(f"{report[when]['exact match']:.4f}" for when in ("before", "after"))
    assert (run / "best" / ("adapter_config.json" if rank else "config.json")).exists()
    merged = Gemma.from_pretrained(run / "merged").eval()
    tuned = Gemma.from_pretrained(project / "out/fables/best" if rank else run / "best").eval()
    if rank:
        load_adapter(tuned, run / "best")
    x = random_tokens(1, 12)
    torch.testing.assert_close(merged(x), tuned.eval()(x), atol=1e-4, rtol=0)


def test_exact_match_counts_answers_that_equal_the_wanted_one_but_for_spaces_and_case():
    wanted = ["Paris", "a b", "x", "Yes."]
    answers = {"q0": "paris", "q1": " A  b\n", "q2": "x y", "q3": "yes"}
    task = SimpleNamespace(
        lora_cfg=LoraConfig(data="mine.json", num_samples=0),
        cfg=TuneConfig(),
        val_records=[exchange(f"q{i}", "", text) for i, text in enumerate(wanted)],
        tokenizer=SimpleNamespace(encode=lambda text: text.split()),
        answers=lambda records, limits: [answers[messages[-2]["content"]] for messages in records],
        model=torch.nn.Identity(),
    )
    assert lora.measure(task)[0] == {"exact match": 0.5}
    assert lora.measure(task, num_checked=2)[0] == {"exact match": 1.0}
    assert lora.measure(task, num_checked=0)[0] == {}


@pytest.mark.parametrize("rank", [2, 0])
def test_the_best_checkpoint_is_reported_and_merged(project, rank):
    """The last checkpoint is ruined here, by a learning rate that is far too high."""
    how = ("--learning_rate=30", "--warmup_iters=1", "--grad_clip=0", "--epochs=1", "--merge=True")
    run, printed = tune(project, f"ruined{rank}", f"--rank={rank}", *how)
    evals = [e["val_loss"] for e in read_log(run / "log.jsonl") if e["event"] == "eval"]
    assert evals[-1] > evals[0] + 0.1
    assert min(evals) == evals[0]  # so the best checkpoint is the model before any step
    before, after = re.search(r"response loss: ([\d.]+) before, ([\d.]+) after", printed).groups()
    assert after == before
    shown = re.findall(r"before: (.*)\nafter: (.*)\n", printed)  # answers of the checkpoint, loaded again
    assert len(shown) == 2 and all(before == after for before, after in shown)
    merged, base = Gemma.from_pretrained(run / "merged"), Gemma.from_pretrained(project / "out/fables/best")
    assert torch.equal(merged(random_tokens(1, 12)), base(random_tokens(1, 12)))


def test_an_adapter_is_not_resumed_on_a_base_that_was_trained_again(project):
    base = project / "out" / "other"
    shutil.copytree(project / "out/fables/best", base)
    how = ["--init_from=out/other", "--epochs=1", "--num_samples=0"]
    tune(project, "moved", *how)
    model = Gemma.from_pretrained(base)
    model.model.norm.weight.data += 0.1
    model.save_pretrained(base)
    with pytest.raises(UserError, match="other weights than out/other has now"):
        tune(project, "moved", *how, "--init_from=resume")


@pytest.mark.parametrize("instructed", [False, True])
def test_a_published_checkpoint_is_tuned_and_opens_in_peft(project, tmp_path, instructed):
    """The adapter opens in PEFT and the merged model in transformers, both with our logits. A published chat model is
    tuned with its own template. Every tuned model stops at the token that ends its answers."""
    base = publish_gemma(tmp_path / "published", instructed)
    template = ["--template=", "--max_length=128"] if instructed else ["--template=alpaca", "--max_length=256"]
    flags = [f"--init_from={base}", "--epochs=1", "--merge=True", "--learning_rate=0.003", *template]
    run, _ = tune(project, f"published{instructed}", *flags)
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
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(project, rank):
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
    # the report compares with the model before the first step, not with the one that was resumed
    reports = [(run / "samples.txt").read_text().split("--- before and after")[1] for run in (killed, whole)]
    assert reports[0] == reports[1]


def test_a_resumed_run_keeps_the_settings_that_are_not_named_again(project):
    run, _ = tune(project, "kept", "--max_iters=3", "--eval_interval=2")
    tune(project, "kept", "--init_from=resume")
    assert [e["step"] for e in read_log(run / "log.jsonl") if e["event"] == "eval"] == [0, 2, 3]
    _, printed = tune(project, "kept", "--init_from=resume", "--epochs=0.5")
    assert "epochs 4.0 -> 0.5" in printed and "0.5 epochs" in printed
    _, printed = tune(project, "kept", "--init_from=resume", "--epochs=0.5", "--max_iters=5")
    assert "max_iters" in printed
    run, printed = tune(project, "kept", "--init_from=resume", "--epochs=2", "--max_iters=7")  # both at once
    assert "epochs 0.5 -> 2.0" in printed and read_log(run / "log.jsonl")[-1]["step"] == 7
    with pytest.raises(UserError, match="another dataset"):
        tune(project, "kept", "--init_from=resume", "--max_records=60")


def test_an_instruction_may_be_empty(project):
    """A run once ended in a traceback when it printed the next command."""
    (project / "bare.json").write_text(json.dumps([{"instruction": "", "input": "x", "output": "y"}] * 12))
    _, printed = tune(project, "bare", "--data=bare.json", "--max_iters=1")
    assert "--instruct=" in printed.splitlines()[-1]


def test_the_format_is_the_first_of_flag_adapter_model_and_alpaca(tmp_path):
    """An adapter with its own chat template was prompted in Alpaca's format, and so was a model whose template ends a
    turn with a token that generation_config.json does not name."""
    adapter, model = tmp_path / "adapter", tmp_path / "model"
    adapter.mkdir()
    model.mkdir()
    assert choose_template("", [adapter, model]) == (TEMPLATES["alpaca"], "")
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "of the model"}]
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert choose_template("", [adapter, model]) == ("of the model", f"the chat template of {model}")
    (adapter / "chat_template.jinja").write_text(TEMPLATES["short"])
    assert choose_template("", [adapter, model]) == (TEMPLATES["short"], f"short of {adapter}")
    assert choose_template("gemma", [adapter, model]) == (TEMPLATES["gemma"], "gemma (--template)")
    (model / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(UserError, match="chat template cannot be read: chat_template is int"):
        choose_template("", [model])


def test_records_of_a_folder_are_read_and_what_is_not_read_is_said(tmp_path, capsys):
    record = {"instruction": "a", "output": "b", "id": 1}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record | {"id": i}) + "\n" for i in range(6)))
    (tmp_path / "b.csv").write_text("instruction,output\nc,d\ne,f\n")
    (tmp_path / "c.txt").write_text("a text")
    conversations = open_records(LoraConfig(data=str(tmp_path)), seed=0)
    assert sum(map(len, conversations)) == 8
    printed = capsys.readouterr().out
    assert "not read: column 'id' (6 times)" in printed and "(texts, not records): c.txt" in printed
    (tmp_path / "d.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"text": "a"}\n{"text": "b"}\n{"instr')
    with pytest.raises(UserError, match=r"3 of 12 records cannot be read, the first: d.jsonl, line 2: no instruction"):
        open_records(LoraConfig(data=str(tmp_path)), seed=0)
    (tmp_path / "one.jsonl").write_text('{"instruction": "a", "output": "b"}')
    with pytest.raises(UserError, match="needs at least two records"):
        open_records(LoraConfig(data=str(tmp_path / "one.jsonl")), seed=0)


@pytest.mark.parametrize("place", ["folder", "Hub"])
def test_a_validation_split_is_held_out_and_a_test_split_left_out(tmp_path, monkeypatch, capsys, place):
    """lora.py once trained on a folder's validation records, and on a part of the Hub's training split only."""
    splits = {"train": 6, "validation": 3, "test": 2}
    records = {name: [{"instruction": f"{name} {i}", "output": "b"} for i in range(n)] for name, n in splits.items()}
    for name in splits:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[name]))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: records)
    found = open_records(LoraConfig(data=str(tmp_path) if place == "folder" else "someone/records"), seed=0)
    for name, conversations in zip(splits, found, strict=False):
        assert [messages[0]["content"] for messages in conversations] == [f"{name} {i}" for i in range(splits[name])]
    printed = capsys.readouterr().out
    assert ("(a test split): test.jsonl" if place == "folder" else "left out the splits test") in printed
    assert "held out: its validation split, whatever val_fraction is" in printed


@pytest.mark.parametrize("losses, found", [([3.0, 2.0, 1.0], False), ([3.0, 1.0, 2.0], True), ([1.0, 1.005], False)])
def test_the_report_says_when_the_last_checkpoint_is_worse_than_the_best(tmp_path, losses, found, capsys):
    task = tuning([("Say hi.", "", "hello")])
    task.cfg = replace(task.cfg, out_dir=str(tmp_path))
    events = [{"event": "eval", "step": i, "val_loss": loss} for i, loss in enumerate(losses)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    report(task, SimpleNamespace(before=({}, []), best_val_loss=min(losses), step=2), ({}, []))
    assert ("overfitting: the response loss rose from 1.0000 at step 1" in capsys.readouterr().out) == found


@pytest.mark.parametrize("word", "abcdefgh")
def test_one_of_two_records_is_held_out(tmp_path, word):
    records = [{"prompt": f"Say {word} {i}.", "completion": f"{word} {i}"} for i in range(2)]
    (tmp_path / "two.json").write_text(json.dumps(records))
    train_records, val_records = open_records(LoraConfig(data=str(tmp_path / "two.json")), seed=0)
    assert len(train_records) == len(val_records) == 1


@pytest.mark.parametrize(
    "args, message",
    [
        (["--init_from=scratch"], "LoRA tunes a trained model"),
        (["--target_modules=qkv"], "--target_modules=qkv: qkv: no such linear layers"),
        (["--data=nowhere.json"], "no such file"),
        (["--template=none"], "must be one of alpaca"),
        (["--rank=-1"], "at least 0"),
        (["--max_length=600", "--max_tokens_per_batch=600"], "exceeds max_position_embeddings=512"),
        (
            ["--data=odd.jsonl"],
            "1 of 1 records cannot be read, the first: odd.jsonl, line 1: no instruction in ask",
        ),
    ],
)
def test_mistakes_end_in_one_line(project, args, message):
    (project / "odd.jsonl").write_text('{"ask": "a", "tell": "b"}\n')
    with pytest.raises(UserError, match=message) as found:
        tune(project, "mistake", *args)
    assert "\n" not in str(found.value)


def test_fable_records_are_conversations_whose_answers_can_be_checked():
    train_records, val_records = open_records(LoraConfig(max_records=30, num_checked=12), seed=0)
    assert len(train_records) == 30 and len(val_records) == 12
    for (user, assistant), task in zip(val_records, TASKS * 2, strict=True):
        assert user["turn"]["task"] == task and follows(user["turn"], assistant["content"])
