import json

import pytest
import torch
from conftest import TINY, copy_project, fails, publish_gemma, run_script

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


def sampled(project, *args, stdin=None):
    return run_script(project, "sample.py", "--device=cpu", "--dtype=float32", *args, stdin=stdin).stdout


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
    """One token is forced to be the end: nothing may come after it, and its name may not show."""
    model = Gemma.from_pretrained(project / "out/fables/best")
    tokenizer = Tokenizer.load(project / "out/fables/best")
    with torch.no_grad():
        model.model.norm.weight.fill_(-1)  # no signal: every logit is 0, greedy takes token 0
    model.save_pretrained(project / "mute")
    tokenizer.save(project / "mute")
    printed = sampled(project, "--model=mute", "--max_new_tokens=200", "--seed=3")
    assert int(printed.rsplit("[", 1)[1].split(" tokens")[0]) < 200 or "endoftext" not in printed
    assert "endoftext" not in printed


def test_interactive_keeps_asking(project):
    import subprocess
    import sys

    command = [sys.executable, "sample.py", "--interactive=True", "--max_new_tokens=4", "--device=cpu"]
    result = subprocess.run(
        command, cwd=project, input="The fox\nThe crow\n", capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "The fox" in result.stdout and "The crow" in result.stdout


@pytest.mark.parametrize(
    "args, message",
    [
        (["--out_dir=nowhere"], "no checkpoint in nowhere/best"),
        (["--model=data"], "not a Gemma 3 model directory"),
        (["--start=FILE:none.txt"], "none.txt"),
        (["--temperature=-1"], "at least 0"),
        (["--top_p=0"], "above 0"),
        (["--num_samples=0"], "at least 1"),
        (["--start=" + "fox " * 700], "512 positions"),
    ],
)
def test_mistakes_end_in_one_line(project, args, message):
    assert message in fails(project, "sample.py", *args)


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
    from lora import load_adapter
    from prepare import encode_conversation

    tokenizer = Tokenizer.load(project / "out/fables/best")
    model = Gemma.from_pretrained(project / "out/fables/best")
    if adapter:
        load_adapter(model, project / "out/tuned/best")
    prompt = torch.tensor([encode_conversation(tokenizer, [("Who is it?", "A fox.", None)], "short")[0]])
    return tokenizer.decode(
        [t.item() for t in model.eval().generate(prompt, 20, temperature=0, stop_ids=[tokenizer.eot])]
    ).lstrip()


def test_an_instruction_is_rendered_as_in_training(tuned):
    assert story(sampled(tuned, *ASK)) == greedy_answer(tuned, adapter=True)


def test_compare_shows_the_base_and_then_the_tuned(tuned):
    base, after = sampled(tuned, *ASK, "--compare=True").split("tuned:\n\n")
    assert base.split("base:\n\n")[1].startswith(greedy_answer(tuned, adapter=False) + "\n\n[")
    assert after.startswith(greedy_answer(tuned, adapter=True) + "\n\n[")


def test_a_conversation(tuned):
    import subprocess
    import sys

    command = [sys.executable, "sample.py", "--adapter=out/tuned/best", "--interactive=True", "--max_new_tokens=4"]
    lines = "Tell a fable.\n" + "again " * 400 + "\nWho was it?\n"
    result = subprocess.run(command, cwd=tuned, input=lines, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("> ") == 4 and "positions: shorten it" in result.stdout


@pytest.mark.parametrize(
    "args, message",
    [
        (["--adapter=nowhere"], "no adapter here"),
        (["--adapter=out/tuned/best", "--model=out/nowhere"], "out/nowhere: not a directory here"),
        (["--compare=True"], "compare needs an adapter"),
    ],
)
def test_mistakes_with_adapters(tuned, args, message):
    assert message in fails(tuned, "sample.py", *args)


# ----------------------------------------------------------------------------------------------------------------------
# published checkpoints


def test_a_published_model_from_the_hub_takes_turns(project, hub, tmp_path):
    """Its answer is the one transformers gives, from the prompt that its own chat template makes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hub["google/gemma-3-270m-it"], hub["google/gated"] = publish_gemma(tmp_path, instructed=True), None
    how = ("--model=google/gemma-3-270m-it", "--temperature=0", "--max_new_tokens=30")
    tokenizer, peer = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Tell a fable about <eos>."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.eos_token_id) == 1
    ids[ids.index(tokenizer.eos_token_id) : ids.index(tokenizer.eos_token_id) + 1] = tokenizer(
        "<eos>", add_special_tokens=False, split_special_tokens=True
    ).input_ids  # what a user writes is text to us, and a control token to transformers
    made = peer.float().generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, len(ids) :]
    answer = tokenizer.decode(made, skip_special_tokens=True).lstrip()
    assert story(sampled(project, *how, "--instruct=Tell a fable about <eos>.")) == answer
    assert sampled(project, *how, "--interactive=True", stdin="Tell a fable about <eos>.\n").count(answer) == 1
    assert "accept its terms" in fails(project, "sample.py", "--model=google/gated")
    assert "neither a directory here" in fails(project, "sample.py", "--model=google/none")
