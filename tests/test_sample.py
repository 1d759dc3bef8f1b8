"""sample.py: texts, answers, conversations and published models, against the model's own generate()."""

import io
import json
import math

import gguf
import pytest
import torch
from conftest import (
    TINY,
    copy_project,
    fails,
    prepare_fables,
    publish_gemma,
    refused,
    run_script,
    sampled,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import fable_grammar
from lora import TEMPLATES, load_adapter, merge_lora
from model import Gemma
from support.conversations import encode_conversation
from support.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with a tiny trained model."""
    path = prepare_fables(copy_project(tmp_path_factory.mktemp("project")))
    flags = ["--max_iters=30", "--eval_interval=30", "--learning_rate=0.01"]
    run_script(path, "train.py", "--dataset=fables", *TINY, *flags)
    return path


def story(printed):
    """Return what sample.py prints between the checkpoint's name and the speed."""
    return printed.split("]\n\n", 1)[1].rsplit("\n\n[", 1)[0]


def test_the_same_seed_gives_the_same_text(project):
    a, b, c = (story(sampled(project, "--start=Once", f"--seed={s}", "--max_new_tokens=40")) for s in (1, 1, 2))
    assert a == b != c and a.startswith("Once")


def test_the_printed_text_is_the_one_that_the_model_generates(project):
    tokenizer = Tokenizer.load(project / "out/fables/best")
    model = Gemma.from_pretrained(project / "out/fables/best").eval()
    prompt = torch.tensor([[tokenizer.eot, *map(int, tokenizer.encode("The fox"))]])
    ids = [t.item() for t in model.generate(prompt, 50, temperature=0, stop_ids=[tokenizer.eot])]
    printed = sampled(project, "--start=The fox", "--temperature=0", "--max_new_tokens=50")
    assert story(printed) == "The fox" + tokenizer.decode(ids)


def test_several_samples_are_one_batch_and_differ(project):
    texts = story(sampled(project, "--num_samples=3", "--max_new_tokens=30", "--start=A")).split("\n\n---\n\n")
    assert len(texts) == len(set(texts)) == 3 and all(t.startswith("A") for t in texts)


def test_a_text_can_start_from_a_file(project):
    (project / "prompt.txt").write_text("Once upon a time", encoding="utf-8")
    assert story(sampled(project, "--start=FILE:prompt.txt", "--max_new_tokens=5")).startswith("Once upon a time")


def test_zero_new_tokens_print_the_start_alone(project):
    assert story(sampled(project, "--model=out/fables/last", "--start=Hi", "--max_new_tokens=0")) == "Hi"


def test_end_of_text_ends_a_sample(project):
    """A model that finds all tokens equally likely draws end-of-text at some point. Nothing may follow it, and its name
    may not be printed."""
    model, tokenizer = Gemma.from_pretrained(project / "out/fables/best"), Tokenizer.load(project / "out/fables/best")
    with torch.no_grad():
        model.model.norm.weight.fill_(-1)  # every logit is 0
    model.save_pretrained(project / "uniform")
    tokenizer.save(project / "uniform")
    ids = [t.item() for t in model.eval().generate(torch.tensor([[tokenizer.bos]]), 500, temperature=0.8, seed=1)]
    length = ids.index(tokenizer.eot)
    printed = sampled(project, "--model=uniform", "--max_new_tokens=500", "--seed=1")
    assert story(printed) == tokenizer.decode(ids[:length]).lstrip() and f"\n\n[{length} tokens, " in printed


def test_interactive_mode_asks_again_and_again(project):
    printed = run_script(
        project, "sample.py", "--interactive=True", "--max_new_tokens=4", "--device=cpu", stdin="The fox\nThe crow\n"
    ).stdout
    assert "The fox" in printed and "The crow" in printed


@pytest.mark.parametrize(
    "args, message",
    [
        (["--out_dir=nowhere"], "no checkpoint in nowhere/best"),
        (["--model=data"], "not a Gemma 3 model directory"),
        (["--start=FILE:none.txt"], "none.txt"),
        (["--temperature=-1"], "at least 0"),
        (["--temperature=1e-40"], "between 1e-06 and 1000000.0"),
        (["--input=x"], "input needs an instruction"),
        (["--start=a", "--instruct=b"], "instruct and start cannot be combined"),
        (["--model=out/fables/last", "--out_dir=out/fables"], "model and out_dir cannot be combined"),
        (["--template=chatml"], "template='chatml' must be one of alpaca, short, gemma"),
        (["--top_p=0"], "between 1e-06 and 1"),
        (["--num_samples=0"], "at least 1"),
        (["--start=" + "fox " * 700], "512 positions"),
    ],
)
def test_mistakes_end_in_one_line(project, args, message):
    assert message in refused(project, *args)


def test_without_any_checkpoint_the_next_command_is_printed(tmp_path):
    assert "train one first" in fails(copy_project(tmp_path), "sample.py")


@pytest.fixture(scope="module")
def tuned(project):
    """The project, with an adapter that was trained for a moment on its model."""
    records = [{"instruction": f"Who is number {i}?", "output": f"The fox {i}."} for i in range(60)]
    (project / "records.json").write_text(json.dumps(records))
    run_script(
        project, "lora.py", "--init_from=out/fables/best", "--data=records.json", "--template=short", "--rank=2",
        "--num_samples=1", "--sample_tokens=8", "--compile=False", "--device=cpu", "--out_dir=out/tuned",
        "--eval_interval=99", "--learning_rate=0.02",
    )  # fmt: skip
    return project


ASK = ("--adapter=out/tuned/best", "--instruct=Who is it?", "--input=A fox.", "--max_new_tokens=20", "--temperature=0")


def greedy_answer(project):
    """Return the model's answer to ASK, made without sample.py."""
    tokenizer = Tokenizer.load(project / "out/fables/best")
    model = Gemma.from_pretrained(project / "out/fables/best")
    load_adapter(model, project / "out/tuned/best")
    messages = [{"role": "user", "content": "Who is it?", "input": "A fox."}]
    prompt = torch.tensor([encode_conversation(tokenizer, messages, TEMPLATES["short"])[0]])
    made = model.eval().generate(prompt, 20, temperature=0, stop_ids=[tokenizer.eot])
    return tokenizer.decode([t.item() for t in made]).lstrip()


def test_an_instruction_is_rendered_as_in_training(tuned):
    assert story(sampled(tuned, *ASK)) == greedy_answer(tuned)


def test_a_conversation_that_grows_too_long_starts_again(tuned, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Tell a fable.\n" + "again " * 400 + "\nWho was it?\n"))
    printed = sampled(tuned, "--adapter=out/tuned/best", "--interactive=True", "--max_new_tokens=4")
    assert printed.count("> ") == 4 and "positions: shorten it" in printed


@pytest.mark.parametrize(
    "args, message",
    [
        (["--adapter=nowhere"], "no adapter here"),
        (["--adapter=out/tuned/best", "--model=out/nowhere"], "out/nowhere: not a directory here"),
        (["--out_dir=out/tuned"], "use --adapter=out/tuned/best"),
        (["--model=out/tuned/best"], "use --adapter=out/tuned/best"),
    ],
)
def test_mistakes_with_adapters_end_in_one_line(tuned, args, message):
    assert message in refused(tuned, *args)


def test_a_published_chat_model_from_the_hub_answers_as_in_transformers(project, hub, tmp_path, monkeypatch):
    """Its answer is the one that transformers generates from the model's own chat template."""
    hub["google/gemma-3-270m-it"], hub["google/gated"] = publish_gemma(tmp_path, instructed=True), None
    how = ("--temperature=0", "--max_new_tokens=30")
    tokenizer, peer = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Tell a fable about <eos>."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.eos_token_id) == 1
    ids[ids.index(tokenizer.eos_token_id) : ids.index(tokenizer.eos_token_id) + 1] = tokenizer(
        "<eos>", add_special_tokens=False, split_special_tokens=True
    ).input_ids  # to us a user's <eos> is text; to transformers it is a control token
    made = peer.float().generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, len(ids) :]
    answer = tokenizer.decode(made, skip_special_tokens=True).lstrip()
    from_hub = ("--model=google/gemma-3-270m-it", "--device=cpu", "--dtype=float32")
    asked = run_script(project, "sample.py", *from_hub, *how, "--instruct=Tell a fable about <eos>.")
    assert story(asked.stdout) == answer
    monkeypatch.setattr("sys.stdin", io.StringIO("Tell a fable about <eos>.\n"))
    assert sampled(project, f"--model={tmp_path}", *how, "--interactive=True").count(answer) == 1
    assert "accept its terms" in fails(project, "sample.py", "--model=google/gated")
    assert "neither a directory here" in fails(project, "sample.py", "--model=google/none")


def test_an_adapter_is_merged_into_the_export(tuned):
    printed = sampled(tuned, "--adapter=out/tuned/best", "--export_gguf=tuned.gguf", "--gguf_type=f32")
    assert printed.endswith("MB; llama-cli -m tuned.gguf runs it, or docs/play.html in a browser\n")
    file = gguf.GGUFReader(tuned / "tuned.gguf")
    assert file.fields["tokenizer.chat_template"].contents() == TEMPLATES["short"]
    tensors = {t.name: torch.tensor(t.data) for t in file.tensors}
    model = merge_lora(load_adapter(Gemma.from_pretrained(tuned / "out/fables/best"), tuned / "out/tuned/best"))
    torch.testing.assert_close(tensors["blk.1.ffn_up.weight"], model.model.layers[1].mlp.up_proj.weight.detach())


TASK = """
task: fables
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, higher_is_better: false}]
"""


def test_the_evaluation_harness_measures_our_bits_per_byte(project, tmp_path):
    """lm-evaluation-harness runs a task of ours on a run's best checkpoint, without a network."""
    fables = [fable_grammar.tell(f"harness/{i}")[0] for i in range(8)]
    (tmp_path / "fables.jsonl").write_text("".join(json.dumps({"text": fable}) + "\n" for fable in fables))
    (tmp_path / "fables.yaml").write_text(TASK % (tmp_path / "fables.jsonl"))
    run_script(
        project, "-m", "lm_eval", "run", "--model=hf",
        "--model_args=pretrained=out/fables/best,dtype=float32,add_bos_token=False",
        "--tasks=fables", f"--include_path={tmp_path}", "--device=cpu", f"--output_path={tmp_path}/results.json",
    )  # fmt: skip
    (results,) = tmp_path.glob("results*.json")
    tokenizer, model = Tokenizer.load(project / "out/fables/best"), Gemma.from_pretrained(project / "out/fables/best")
    nats = 0.0
    for fable in fables:
        ids = torch.tensor([[tokenizer.bos, *map(int, tokenizer.encode(fable))]])
        nats += model(ids[:, :-1], ids[:, 1:], reduction="sum").item()
    bits_per_byte = nats / math.log(2) / sum(len(fable.encode()) for fable in fables)
    measured = json.loads(results.read_text())["results"]["fables"]["bits_per_byte,none"]
    assert measured == pytest.approx(bits_per_byte, rel=1e-4)
