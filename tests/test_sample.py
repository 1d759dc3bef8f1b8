import contextlib
import io
import itertools
import json
import math
from pathlib import Path

import gguf
import pytest
import torch
from conftest import TINY, copy_project, fails, publish_gemma, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer

import sample
from config import UserError, configure
from data import fable_grammar
from lora import TEMPLATES, encode_conversation, load_adapter, merge_lora
from model import Gemma
from prepare import Tokenizer


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with a tiny trained model."""
    path = copy_project(tmp_path_factory.mktemp("project"))
    run_script(
        path, "prepare.py", "--dataset=fables", "--max_documents=300", "--val_fraction=0.05", "--tokenizer=bpe:400"
    )
    run_script(
        path, "train.py", "--dataset=fables", *TINY, "--max_iters=30", "--eval_interval=30", "--learning_rate=0.01"
    )
    return path


def sampled(project, *args):
    """What sample.py prints, run in this process."""
    with contextlib.chdir(project), contextlib.redirect_stdout(io.StringIO()) as printed:
        sample.main(*configure([sample.SampleConfig], ["--device=cpu", "--dtype=float32", *map(str, args)]))
    return printed.getvalue()


def refused(project, *args):
    """The one line in which a mistake ends."""
    with pytest.raises(UserError) as e:
        sampled(project, *args)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


def story(printed):
    """What stands between the checkpoint's name and the speed."""
    return printed.split("]\n\n", 1)[1].rsplit("\n\n[", 1)[0]


def test_the_same_seed_gives_the_same_text(project):
    a, b, c = (story(sampled(project, "--start=Once", f"--seed={s}", "--max_new_tokens=40")) for s in (1, 1, 2))
    assert a == b != c and a.startswith("Once")


def test_what_streams_is_what_the_model_makes(project):
    tokenizer = Tokenizer.load(project / "out/fables/best")
    model = Gemma.from_pretrained(project / "out/fables/best").eval()
    prompt = torch.tensor([[tokenizer.eot, *map(int, tokenizer.encode("The fox"))]])
    ids = [t.item() for t in model.generate(prompt, 50, temperature=0, stop_ids=[tokenizer.eot])]
    assert story(
        sampled(project, "--start=The fox", "--temperature=0", "--max_new_tokens=50")
    ) == "The fox" + tokenizer.decode(ids)


def test_several_samples_are_one_batch_and_differ(project):
    texts = story(sampled(project, "--num_samples=3", "--max_new_tokens=30", "--start=A")).split("\n\n---\n\n")
    assert len(texts) == len(set(texts)) == 3 and all(t.startswith("A") for t in texts)


def test_start_from_a_file(project):
    (project / "prompt.txt").write_text("Once upon a time", encoding="utf-8")
    assert story(sampled(project, "--start=FILE:prompt.txt", "--max_new_tokens=5")).startswith("Once upon a time")


def test_a_model_directory_and_zero_tokens(project):
    assert story(sampled(project, "--model=out/fables/last", "--start=Hi", "--max_new_tokens=0")) == "Hi"


def test_end_of_text_ends_a_sample(project):
    """A model for which all tokens are equally likely comes to end-of-text some time: nothing may come after it, and
    its name may not show."""
    model, tokenizer = Gemma.from_pretrained(project / "out/fables/best"), Tokenizer.load(project / "out/fables/best")
    with torch.no_grad():
        model.model.norm.weight.fill_(-1)  # every logit is 0
    model.save_pretrained(project / "mute")
    tokenizer.save(project / "mute")
    ids = [t.item() for t in model.eval().generate(torch.tensor([[tokenizer.bos]]), 500, 0.8, seed=1)]
    length = ids.index(tokenizer.eot)
    printed = sampled(project, "--model=mute", "--max_new_tokens=500", "--seed=1")
    assert story(printed) == tokenizer.decode(ids[:length]).lstrip() and f"\n\n[{length} tokens, " in printed


def test_interactive_keeps_asking(project):
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
        (["--top_p=0"], "between 1e-06 and 1"),
        (["--num_samples=0"], "at least 1"),
        (["--start=" + "fox " * 700], "512 positions"),
    ],
)
def test_mistakes_end_in_one_line(project, args, message):
    assert message in refused(project, *args)


def test_no_checkpoint_at_all(tmp_path):
    assert "train one first" in fails(copy_project(tmp_path), "sample.py")


# ----------------------------------------------------------------------------------------------------------------------
# instructions


@pytest.fixture(scope="module")
def tuned(project):
    """An adapter trained for a moment on the project's model."""
    records = [{"instruction": f"Who is number {i}?", "output": f"The fox {i}."} for i in range(60)]
    (project / "records.json").write_text(json.dumps(records))
    run_script(
        project, "lora.py", "--init_from=out/fables/best", "--data=records.json", "--template=short", "--rank=2",
        "--num_samples=1", "--sample_tokens=8", "--compile=False", "--device=cpu", "--out_dir=out/tuned",
        "--eval_interval=99", "--learning_rate=0.02",
    )  # fmt: skip
    return project


ASK = ("--adapter=out/tuned/best", "--instruct=Who is it?", "--input=A fox.", "--max_new_tokens=20", "--temperature=0")


def greedy_answer(project, adapter):
    """What the model answers to ASK, by hand."""
    tokenizer = Tokenizer.load(project / "out/fables/best")
    model = Gemma.from_pretrained(project / "out/fables/best")
    if adapter:
        load_adapter(model, project / "out/tuned/best")
    asked = [{"role": "user", "content": "Who is it?", "input": "A fox."}]
    prompt = torch.tensor([encode_conversation(tokenizer, asked, "short")[0]])
    return tokenizer.decode(
        [t.item() for t in model.eval().generate(prompt, 20, temperature=0, stop_ids=[tokenizer.eot])]
    ).lstrip()


def test_an_instruction_is_rendered_as_in_training(tuned):
    assert story(sampled(tuned, *ASK)) == greedy_answer(tuned, adapter=True)


def test_compare_shows_the_base_and_then_the_tuned(tuned):
    base, after = sampled(tuned, *ASK, "--compare=True").split("tuned:\n\n")
    assert base.split("base:\n\n")[1].startswith(greedy_answer(tuned, adapter=False) + "\n\n[")
    assert after.startswith(greedy_answer(tuned, adapter=True) + "\n\n[")


def test_a_conversation(tuned, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Tell a fable.\n" + "again " * 400 + "\nWho was it?\n"))
    printed = sampled(tuned, "--adapter=out/tuned/best", "--interactive=True", "--max_new_tokens=4")
    assert printed.count("> ") == 4 and "positions: shorten it" in printed


@pytest.mark.parametrize(
    "args, message",
    [
        (["--adapter=nowhere"], "no adapter here"),
        (["--adapter=out/tuned/best", "--model=out/nowhere"], "out/nowhere: not a directory here"),
        (["--compare=True"], "compare needs an adapter"),
        (["--out_dir=out/tuned"], "use --adapter=out/tuned/best"),
        (["--model=out/tuned/best"], "use --adapter=out/tuned/best"),
    ],
)
def test_mistakes_with_adapters(tuned, args, message):
    assert message in refused(tuned, *args)


# ----------------------------------------------------------------------------------------------------------------------
# published checkpoints


def test_a_published_model_from_the_hub_takes_turns(project, hub, tmp_path, monkeypatch):
    """Its answer is the one transformers gives, from the prompt that its own chat template makes."""
    hub["google/gemma-3-270m-it"], hub["google/gated"] = publish_gemma(tmp_path, instructed=True), None
    how = ("--temperature=0", "--max_new_tokens=30")
    tokenizer, peer = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Tell a fable about <eos>."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.eos_token_id) == 1
    ids[ids.index(tokenizer.eos_token_id) : ids.index(tokenizer.eos_token_id) + 1] = tokenizer(
        "<eos>", add_special_tokens=False, split_special_tokens=True
    ).input_ids  # what a user writes is text to us, and a control token to transformers
    made = peer.float().generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, len(ids) :]
    answer = tokenizer.decode(made, skip_special_tokens=True).lstrip()
    from_hub = ("--model=google/gemma-3-270m-it", "--device=cpu", "--dtype=float32")
    asked = run_script(project, "sample.py", *from_hub, *how, "--instruct=Tell a fable about <eos>.")
    assert story(asked.stdout) == answer
    monkeypatch.setattr("sys.stdin", io.StringIO("Tell a fable about <eos>.\n"))
    assert sampled(project, f"--model={tmp_path}", *how, "--interactive=True").count(answer) == 1
    assert "accept its terms" in fails(project, "sample.py", "--model=google/gated")
    assert "neither a directory here" in fails(project, "sample.py", "--model=google/none")


# ----------------------------------------------------------------------------------------------------------------------
# GGUF


@pytest.fixture(scope="module")
def hard(project):
    """A model whose every peculiarity shows within a hundred tokens, trained a little so that it is sure of itself."""
    shape = "--sliding_window=12 --query_pre_attn_scalar=23 --rope_linear_factor=8 --rope_theta=500 --head_dim=32"
    run_script(
        project, "train.py", "--dataset=fables", *TINY, *shape.split(), "--hidden_size=64", "--num_hidden_layers=4",
        "--sliding_window_pattern=3", "--max_iters=30", "--eval_interval=30", "--learning_rate=0.01",
        "--out_dir=out/hard",
    )  # fmt: skip
    return project / "out/hard/best"


TEXT = "Once upon a time a fox said: 'I'll go!' " * 3


def export(project, model, kind):
    file = project / f"{Path(model).parent.name}-{kind}.gguf"
    sampled(project, f"--model={model}", f"--export_gguf={file}", f"--gguf_type={kind}")
    return file


def greedy(path, ids, count=100):
    """Ours, and transformers', neither stopping at end-of-text."""
    prompt = torch.tensor([ids])
    ours = [t.item() for t in Gemma.from_pretrained(path).eval().generate(prompt, count, temperature=0)]
    peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    peer.generation_config.eos_token_id = None
    everything = torch.ones_like(prompt)  # else the first token, which is also the one for padding, is masked
    theirs = peer.generate(prompt, attention_mask=everything, max_new_tokens=count, do_sample=False)[
        0, len(ids) :
    ].tolist()
    assert ours == theirs
    return ours


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16", "q8_0"])
def test_a_gguf_file_holds_the_weights(project, hard, kind):
    """Read by the gguf package: every weight, norms with 1 added as llama.cpp expects, as exact as its type."""
    file = gguf.GGUFReader(export(project, hard, kind))
    tensors = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in file.tensors}
    state = Gemma.from_pretrained(hard).state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 4)
    assert len(tensors) == len(state)
    for name, weight in state.items():
        got = tensors[names.get_name(name, (".weight",))]
        if weight.ndim == 1:
            gain = (1 + weight) * (32 / 23) ** 0.5 if "q_norm" in name else 1 + weight
            torch.testing.assert_close(got, gain)
        else:
            error = {"f32": 0, "bf16": 2**-8, "f16": 2**-11, "q8_0": 1 / 127}[kind] * weight.abs().max()
            assert (got - weight).abs().max() <= error, name


def test_llama_cpp_writes_what_we_write(project, hard):
    """Both layer types, a prompt beyond the window, an attention scale and RoPE bases of our own, scaled positions."""
    peer = open_in_llama_cpp(export(project, hard, "f32"))
    from test_prepare import random_texts

    tokenizer = Tokenizer.load(hard)
    ids = [tokenizer.bos, *map(int, tokenizer.encode(TEXT))]
    assert peer.tokenize(TEXT.encode(), add_bos=True, special=False) == ids
    for text in random_texts(1000):
        assert peer.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text).tolist()
    assert list(itertools.islice(peer.generate(ids, temp=0, top_k=1, repeat_penalty=1.0), 100)) == greedy(hard, ids)


def open_in_llama_cpp(file):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which takes minutes to build")
    return llama_cpp.Llama(str(file), n_ctx=512, verbose=False, type_k=llama_cpp.GGML_TYPE_F32,
                           type_v=llama_cpp.GGML_TYPE_F32, swa_full=False)  # fmt: skip


def test_llama_cpp_reads_gemmas_tokenizer(project, tmp_path):
    published = publish_gemma(tmp_path / "published", instructed=True)
    peer = open_in_llama_cpp(export(project, published, "f32"))
    tokenizer = Tokenizer.load(published)
    fable, _ = fable_grammar.tell("gguf")
    for text in (fable, "A fox.\n\nÜber <eos> 🦆"):
        assert peer.tokenize(text.encode(), add_bos=True, special=False) == [2, *tokenizer.encode(text).tolist()]
    assert peer.token_eos() == 1 and "<start_of_turn>" in peer.metadata["tokenizer.chat_template"]


def test_an_adapter_is_merged_into_the_export(tuned):
    printed = sampled(tuned, "--adapter=out/tuned/best", "--export_gguf=tuned.gguf", "--gguf_type=f32")
    assert printed.endswith("MB; llama-cli -m tuned.gguf runs it, or docs/play.html in a browser\n")
    file = gguf.GGUFReader(tuned / "tuned.gguf")
    assert file.fields["tokenizer.chat_template"].contents() == TEMPLATES["short"]
    tensors = {t.name: torch.tensor(t.data) for t in file.tensors}
    model = merge_lora(load_adapter(Gemma.from_pretrained(tuned / "out/fables/best"), tuned / "out/tuned/best"))
    torch.testing.assert_close(tensors["blk.1.ffn_up.weight"], model.model.layers[1].mlp.up_proj.weight.detach())


@pytest.mark.parametrize(
    "args, message",
    [
        (["--gguf_type=q4_k", "--export_gguf=x.gguf"], "f32, bf16, f16 or q8_0"),
        (["--export_gguf=no/folder/x.gguf"], "no/folder"),
    ],
)
def test_mistakes_of_an_export(project, args, message):
    assert message in refused(project, "--out_dir=out/fables", *args)


def test_what_llama_cpp_cannot_compute_is_not_exported(project, tmp_path):
    path = project / "out/fables/best"
    model = Gemma.from_pretrained(path)
    model.config.hidden_activation = "relu2"
    with pytest.raises(UserError, match="hidden_activation=relu2"):
        sample.export_gguf(model, Tokenizer.load(path), tmp_path / "x.gguf", "f32")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# evaluation harness

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


def test_the_evaluation_harness_measures_what_we_measure(project, tmp_path):
    """lm-evaluation-harness on a run's best checkpoint, a task of our own, no network: our bits per byte."""
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
