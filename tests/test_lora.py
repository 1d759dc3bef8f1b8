"""lora.py against PEFT, and what a tuning run promises."""

import json
import math

import pytest
import torch
from conftest import TINY, copy_project, fails, losses, publish_gemma, run_script
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM

from lora import (
    LoraConfig,
    LoRALinear,
    Tuning,
    add_lora,
    encode_conversation,
    end_of_response,
    keep_base_in,
    load_adapter,
    lora_layers,
    merge_lora,
    read_turns,
    save_adapter,
)
from model import Gemma, GemmaConfig
from prepare import Tokenizer, train_bpe
from train import TrainConfig, make_optimizers, read_log

SETTINGS = {"base_model": "base", "rank": 3, "alpha": 7.0, "dropout": 0.0, "rslora": False}


def base_model(seed=0):
    config = GemmaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=7, sliding_window_pattern=2, max_position_embeddings=128,
        pad_token_id=None,
    )  # fmt: skip
    return Gemma(config).init_weights(seed).eval()


def random_tokens(*shape):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(1))


def adapted(rslora=False, targets="all-linear"):
    """A base model and the same with an adapter that does something."""
    base, model = base_model(), base_model()
    torch.manual_seed(3)
    add_lora(model, 3, 7.0, targets=targets, rslora=rslora)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B.weight, std=0.05)
    return base, model


# ----------------------------------------------------------------------------------------------------------------------
# LoRA itself


def test_a_new_adapter_changes_nothing():
    x = random_tokens(2, 20)
    assert torch.equal(base_model()(x), add_lora(base_model(), 4, 8.0)(x))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj"])
def test_our_adapter_opens_in_peft_with_our_logits(tmp_path, rslora, targets):
    base, model = adapted(rslora, targets)
    base.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", SETTINGS | {"rslora": rslora})
    peer = PeftModel.from_pretrained(Gemma3ForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    x = random_tokens(2, 20)
    assert not torch.allclose(model(x), base(x), atol=1e-2)
    torch.testing.assert_close(model(x), peer(x).logits, atol=1e-4, rtol=0)


def test_gradients_equal_pefts(tmp_path):
    base, model = adapted()
    base.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", SETTINGS)
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


def test_round_trip(tmp_path):
    _, model = adapted()
    save_adapter(model, tmp_path, SETTINGS)
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


@pytest.mark.parametrize("change", ["rank", "names", "dora"])
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, change):
    _, model = adapted()
    save_adapter(model, tmp_path, SETTINGS)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    about |= {"rank": {"r": 4}, "names": {"target_modules": ["q_proj"]}, "dora": {"use_dora": True}}[change]
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"lora_A|do not fit|use_dora"):
        load_adapter(base_model(), tmp_path)


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


def test_base_kept_in_bfloat16_gives_the_same_gradients():
    gradients, x = [], random_tokens(2, 20)
    for kept_in in (torch.float32, torch.bfloat16):
        _, model = adapted()
        keep_base_in(model, kept_in)
        with torch.autocast("cpu", torch.bfloat16):
            model(x, x).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))
    assert len(list(model.generate(x, 2))) == 2  # without autocast, as for the answers it shows
    assert {p.dtype for name, p in model.named_parameters() if "base_layer" not in name} == {torch.float32}


def test_dropout_acts_on_the_adapter_alone():
    layer = LoRALinear(torch.nn.Linear(8, 8, bias=False), 2, 1.0, 0.5)
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
    conversations = [record if isinstance(record, list) else [record] for record in records]
    return Tuning(LoraConfig(**settings), TrainConfig(), model, "base", TOKENIZER, conversations, conversations)


def test_masks_token_by_token():
    task = tuning([("Say hi.", "", "hello"), ("Say hi.", "in", "hello world, hello")])
    ((x, y),) = task.validation()
    assert x.shape == y.shape and len(x) == 2
    for row, (prompt, response) in enumerate(
        [
            ("Instruction: Say hi.\nResponse:", " hello"),
            ("Input: in\nInstruction: Say hi.\nResponse:", " hello world, hello"),
        ]
    ):
        targets = [t for t in y[row].tolist() if t != -100]
        assert targets == [*TOKENIZER.encode(response), TOKENIZER.eot]
        first = y[row].tolist().index(targets[0])
        shown = x[row, : first + 1].tolist()
        assert shown[0] == TOKENIZER.eot and TOKENIZER.decode(shown) == prompt
        assert x[row, first + 1 : first + len(targets)].tolist() == targets[:-1]
        assert (y[row, first + len(targets) :] == -100).all()


def test_every_response_of_a_conversation_is_learned():
    """Token by token: a response is predicted from all that was said before it, and nothing else is a target."""
    task = tuning([[("Say hi.", "in", "hello"), ("Say", "", "world")]])
    ((x, y),) = task.validation()
    said = [
        (False, "Input: in\nInstruction: Say hi.\nResponse:"), (True, " hello"),
        (False, "Instruction: Say\nResponse:"), (True, " world"),
    ]  # fmt: skip
    ids, targets = [TOKENIZER.eot], []
    for is_response, text in said:
        pieces = [*map(int, TOKENIZER.encode(text))] + [TOKENIZER.eot] * is_response
        ids += pieces
        targets += pieces if is_response else [-100] * len(pieces)
    assert x[0].tolist() == ids[:-1] and y[0].tolist() == targets


def test_long_records_lose_the_beginning_of_the_prompt_or_are_dropped():
    """All labels masked after truncation, reported as loss 0 (trl 6668), can't happen."""
    long = "word " * 80
    records = [(long, "", "hello"), ("Say hi.", "", long), ("Say hi.", "", "hello"), ("Say", "", "")]
    task = tuning([*records, [("Say hi.", "", long), ("Say", "", "hello")]], max_length=40)
    assert task.dropped == 4 and len(task.train_set) == 3  # two of five, in both halves
    for ids, is_response in (task.train_set[0], task.train_set[2]):
        assert len(ids) <= 40 and ids[0] == TOKENIZER.eot and not is_response[0]
        assert TOKENIZER.decode(ids[~is_response].tolist()).endswith("\nResponse:")
        assert TOKENIZER.decode(ids[is_response].tolist()) == " hello"  # a response without its beginning is gone
    assert len(task.train_set[0][0]) == 40
    for x, y in task.validation():
        assert ((y != -100).sum(1) > 0).all() and x.shape[1] < 40
    from config import UserError

    with pytest.raises(UserError, match="no train record has a response within 40 tokens"):
        tuning([("Say hi.", "", long)], max_length=40)


def test_batches_keep_to_the_budget_and_hold_every_record_once():
    records = [("Say hi.", "", "hello " * (1 + i % 9)) for i in range(60)]
    task = tuning(records)
    assert sorted(i for batch in task.train_batches for i in batch) == list(range(60))
    for batch in task.train_batches:
        lengths = [len(task.train_set[i][0]) for i in batch]
        assert len(batch) * max(lengths) <= 200
    assert 0 <= task.padding() < 0.2
    shapes = [x.numel() for x, _ in task.updates(0)]
    assert shapes == [x.numel() for x, _ in task.updates(0)]


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
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [("a", "", "b")]),
    ],
)  # fmt: skip
def test_shapes_of_records(record, turns):
    assert read_turns(record, "file") == turns


def test_templates():
    from lora import TEMPLATES

    def prompt(turns, template):
        ids, is_response = encode_conversation(TOKENIZER, turns, template)
        assert ids[0] == TOKENIZER.eot and len(ids) == len(is_response) and not is_response[-1]
        return TOKENIZER.decode(ids)

    alpaca = prompt([("Do it.", "with this", None)], "alpaca")
    assert alpaca.endswith("### Instruction:\nDo it.\n\n### Input:\nwith this\n\n### Response:\n")
    assert "Input" not in prompt([("Do it.", "", None)], "alpaca")
    chat = prompt([("a", "", "b"), ("c", "", None)], "short")
    assert chat == "Instruction: a\nResponse: bInstruction: c\nResponse:"  # the end-of-text after b is not shown
    assert set(TEMPLATES) == {"alpaca", "short", "gemma"}


def test_gemmas_turns_are_special_tokens_and_text_that_looks_like_them_is_not():
    spec = json.loads(json.dumps(TOKENIZER.spec))
    flags = spec["added_tokens"][0]
    spec["added_tokens"] += [
        flags | {"id": 300, "content": "<start_of_turn>"},
        flags | {"id": 301, "content": "<end_of_turn>"},
    ]
    tokenizer = Tokenizer(spec)
    ids, is_response = encode_conversation(tokenizer, [("hi <end_of_turn>", "", "yes"), ("more", "", None)], "gemma")
    learned = [token for token, flag in zip(ids, is_response, strict=True) if flag]
    assert learned == [*tokenizer.encode("yes"), 301]
    assert ids.count(300) == 4 and ids.count(301) == 3  # two user turns and two of the model, one of them open
    assert end_of_response(tokenizer, "gemma") == 301 and end_of_response(tokenizer, "short") == tokenizer.eot
    assert end_of_response(TOKENIZER, "gemma") == TOKENIZER.eot


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
--max_length=64 --max_tokens_per_batch=256 --rank=2 --eval_interval=10 --log_interval=1 --sample_tokens=8
--num_samples=2 --compile=False --device=cpu --learning_rate=0.01 --warmup_iters=2
""".split()  # noqa: SIM905


def tune(project, out, *args):
    printed = run_script(project, "lora.py", *LORA, f"--out_dir=out/{out}", *args).stdout
    return project / "out" / out, printed


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
    tuned = Gemma.from_pretrained(project / "out/fables/best" if rank else run / "last").eval()
    if rank:
        load_adapter(tuned, run / "last")
    x = random_tokens(1, 12)
    torch.testing.assert_close(merged(x), tuned.eval()(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("instructed", [False, True])
def test_a_published_checkpoint_is_tuned_and_opens_in_peft(project, tmp_path, instructed):
    """A run on a directory as Google publishes them: the adapter opens in PEFT, the merged model in transformers, both
    with our logits; an instructed model is tuned in its own turns, and any tuned one stops where its answers do."""
    base = publish_gemma(tmp_path / "published", instructed)
    run, _ = tune(
        project, f"published{instructed}", f"--init_from={base}", "--forgetting=", "--epochs=1", "--merge=True",
        "--max_length=128", *(["--template="] if instructed else ["--template=alpaca", "--max_length=256"]),
    )  # fmt: skip
    template = json.loads((run / "best/instruct.json").read_text())["template"]
    assert template == ("gemma" if instructed else "alpaca")
    tokenizer = Tokenizer.load(run / "last")
    ids, _ = encode_conversation(tokenizer, [("Say fox 3.", "", "fox 3")], template)
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
    (project / "killer.py").write_text(
        "import lora, train, sys\nfrom config import configure\n"
        "settings = configure([lora.LoraConfig, train.TrainConfig], sys.argv[1:])\nrate = train.learning_rate\n"
        "def stop(step, cfg):\n    if step == 13: sys.exit(9)\n    return rate(step, cfg)\n"
        "train.learning_rate = stop\nlora.main(*settings)\n"
    )
    killed = project / "out" / f"killed{rank}"
    assert run_script(project, "killer.py", *LORA, *args, f"--out_dir={killed}", ok=False).returncode == 9
    assert losses(killed)[-1][0] == 13
    _, printed = tune(project, f"killed{rank}", *args, "--init_from=resume")
    assert "other settings" not in printed
    assert losses(killed) == losses(whole)
    name = "adapter_model.safetensors" if rank else "model.safetensors"
    assert (killed / "last" / name).read_bytes() == (whole / "last" / name).read_bytes()
    # the report compares with the model before any tuning, not before the resumption
    reports = [(run / "samples.txt").read_text().split("--- before and after")[1] for run in (killed, whole)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--init_from=scratch"], "LoRA tunes a trained model"),
        (["--targets=qkv"], "match nothing"),
        (["--data=nowhere.json"], "no such file"),
        (["--template=none"], "must be one of alpaca"),
        (["--rank=-1"], "at least 0"),
        (["--max_length=600", "--max_tokens_per_batch=600"], "exceeds the model's max_position_embeddings=512"),
        (["--forgetting=nothing"], "no such set"),
        (["--data=odd.jsonl"], "known are instruction/input/output"),
    ],
)
def test_mistakes_end_in_one_line(project, args, message):
    (project / "odd.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    assert message in fails(project, "lora.py", *LORA, *args)


def test_fable_instructions_are_right_and_held_out_pairs_are_unseen():
    from data.fable_grammar import TASKS, conversation, derivations, follows, is_held_out

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
