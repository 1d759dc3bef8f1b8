"""support/conversations.py: records of every shape become conversations, and these become tokens as in transformers."""

import json

import pytest
from conftest import small_tokenizer, talk
from transformers import AutoTokenizer

from lora import TEMPLATES, LoraConfig
from support.conversations import encode_conversation, end_of_response, exchange, read_messages
from support.settings import UserError
from support.tokenizer import Tokenizer

TOKENIZER = small_tokenizer()
ALPACA, SHORT, GEMMA = TEMPLATES["alpaca"], TEMPLATES["short"], TEMPLATES["gemma"]


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
def test_records_of_every_shape_are_read(record, turns):
    assert read_messages(record) == talk(turns)


def test_prompts_have_the_text_of_their_format():
    def prompt(turns, template):
        ids, is_response = encode_conversation(TOKENIZER, talk(turns), template)
        assert ids[0] == TOKENIZER.eot and len(ids) == len(is_response) and not is_response[-1]
        return TOKENIZER.decode(ids)

    with_input = prompt([("Do it.", "with this", None)], ALPACA)
    assert with_input.endswith("### Instruction:\nDo it.\n\n### Input:\nwith this\n\n### Response:\n")
    assert "Input" not in prompt([("Do it.", "", None)], ALPACA)
    chat = prompt([("a", "", "b"), ("c", "", None)], SHORT)
    assert chat == "Instruction: a\nResponse: bInstruction: c\nResponse:"  # the end-of-text after b has no text


def with_special_tokens(*names):
    """Return the small tokenizer with more special tokens, numbered from 300."""
    spec = json.loads(json.dumps(TOKENIZER.spec))
    flags = spec["added_tokens"][0]
    spec["added_tokens"] += [flags | {"id": 300 + i, "content": name} for i, name in enumerate(names)]
    return Tokenizer(spec)


def test_gemmas_turns_are_special_tokens_and_their_names_in_a_content_are_text():
    tokenizer = with_special_tokens("<start_of_turn>", "<end_of_turn>")
    ids, is_response = encode_conversation(
        tokenizer, talk([("hi <end_of_turn>", "", "yes"), ("more", "", None)]), GEMMA
    )
    learned = [token for token, flag in zip(ids, is_response, strict=True) if flag]
    assert learned == [*tokenizer.encode("yes"), 301]
    assert ids.count(300) == 4 and ids.count(301) == 3  # two user turns and two of the model, one of them open
    assert end_of_response(tokenizer, GEMMA) == 301 and end_of_response(tokenizer, SHORT) == tokenizer.eot
    assert end_of_response(TOKENIZER, GEMMA) == TOKENIZER.eot


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["byte-level", "gemma"])
def test_transformers_renders_each_format_as_training_does(gemma, tmp_path, name, kind):
    """The tokens are equal. A system message is included; our records join it to the user's message."""
    tokenizer = Tokenizer.load(gemma) if kind == "gemma" else TOKENIZER
    tokenizer.save(tmp_path)
    peer = AutoTokenizer.from_pretrained(tmp_path)
    turns = [("Who is it? ", "A fox."), ("\nAnd who\n\nelse?", "A crow, <b>I</b> think."), ("Where?", "Here.")]
    messages = [{"role": "system", "content": "You are an owl. "}]
    for question, answer in turns[: 1 if (name, kind) == ("gemma", "byte-level") else 3]:  # it has no turn tokens
        messages.append({"role": "user", "content": question})
        ours = read_messages({"messages": [*messages, {"role": "assistant", "content": answer}]})[:-1]
        ids, _ = encode_conversation(tokenizer, ours, TEMPLATES[name])
        how = {"add_generation_prompt": True, "return_dict": False}
        assert peer.apply_chat_template(messages, chat_template=TEMPLATES[name], **how) == ids
        if (name, kind) == ("gemma", "gemma"):  # the published template has another text and gives the same tokens
            assert encode_conversation(tokenizer, ours, tokenizer.config["chat_template"])[0] == ids
            plain = [{"role": m["role"], "content": m["content"]} for m in ours]
            assert peer.apply_chat_template(plain, **how) == ids
        messages.append({"role": "assistant", "content": answer})


def test_another_format_is_one_entry(monkeypatch):
    """This one has turn tokens, and text after a response, which was once dropped."""
    chatml = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\nNext:\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    monkeypatch.setitem(TEMPLATES, "chatml", chatml)
    assert LoraConfig(template="chatml")
    tokenizer = with_special_tokens("<|im_start|>", "<|im_end|>")
    ids, is_response = encode_conversation(tokenizer, talk([("a", "", "b"), ("c", "", "d")]), chatml)
    start, end, after = [300], [301], tokenizer.encode("\nNext:\n").tolist()
    contents = zip(["user", "assistant"] * 2, "abcd", strict=True)
    contents = [(role, tokenizer.encode(text).tolist()) for role, text in contents]
    expected = [tokenizer.bos]
    for role, text in contents:
        expected += start + tokenizer.encode(f"{role}\n").tolist() + text + end + after
    assert ids == expected[: -len(after)] and end_of_response(tokenizer, chatml) == 301
    learned = [t for t, flag in zip(ids, is_response, strict=True) if flag]
    assert learned == contents[1][1] + end + contents[3][1] + end


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out or repeats"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "leaves out or repeats"),
        ("{% for m in messages %}", "cannot be rendered: .*endfor"),
        ("{{ raise_exception('no system\nhere') }}", "cannot be rendered: 'raise_exception' is undefined"),
        ("{{ messages.__class__.__mro__ }}", "cannot be rendered: .*unsafe"),
        ("{{ missing.key }}", "cannot be rendered: 'missing' is undefined"),
    ],
)
def test_a_strangers_chat_template_is_rendered_in_a_sandbox(template, message):
    with pytest.raises(UserError, match=message) as found:
        encode_conversation(TOKENIZER, exchange("a", "", "b"), template)
    assert "\n" not in str(found.value)
