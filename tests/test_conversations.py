"""support/conversations.py: records of every shape become conversations, and these become tokens as in transformers."""

import json
from collections import Counter

import pytest
from conftest import small_tokenizer, talk
from transformers import AutoTokenizer

from lora import TEMPLATES, LoraConfig
from support.conversations import encode_conversation, end_of_response, exchange, read_messages
from support.settings import UserError
from support.tokenizer import Tokenizer

TOKENIZER = small_tokenizer()
FIRST = TOKENIZER.eot + 1
ALPACA, SHORT, GEMMA = TEMPLATES["alpaca"], TEMPLATES["short"], TEMPLATES["gemma"]


NAN = float("nan")
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def chat(*messages, **more):
    """Return a record of messages, each (role, content)."""
    return {"messages": [{"role": role, "content": content} for role, content in messages]} | more


@pytest.mark.parametrize(
    "record, turns",
    [
        ({"instruction": "a", "input": "b", "output": "c"}, [("a", "b", "c")]),
        ({"instruction": "a", "context": "", "response": "c", "category": "x"}, [("a", "", "c")]),
        ({"prompt": "a", "completion": "c"}, [("a", "", "c")]),
        ({"question": "a", "context": "b", "answer": "c", "tools": []}, [("a", "b", "c")]),
        ({"instruction": "a", "input": None, "output": None}, [("a", "", "")]),
        ({"instruction": "a", "input": NAN, "output": NAN}, [("a", "", "")]),
        ({"instruction": None, "output": None, "prompt": "a", "completion": "c"}, [("a", "", "c")]),
        ({"prompt": "1 + 1", "completion": 2}, [("1 + 1", "", "2")]),
        (chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("user", "d"), ("assistant", " e\n")),
         [("a", "", "b"), ("c\n\nd", "", " e\n")]),
        (chat(("user", "a")), [("a", "", "")]),
        (chat(("user", "a"), ("assistant", "b"), ("user", "c")), [("a", "", "b")]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [("a", "", "b")]),
        ({"messages": [{"from": "human", "value": "a", "role": None, "content": None},
                       {"from": None, "value": None, "role": "model", "content": "b"}]}, [("a", "", "b")]),
        (chat(("user", [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]), ("assistant", "c")),
         [("a b", "", "c")]),
        ({"prompt": [USER], "completion": [ASSISTANT]}, [("a", "", "b")]),
        ({"instruction": "half \ud83d", "output": "c"}, [("half ?", "", "c")]),
    ],
)  # fmt: skip
def test_records_of_every_shape_are_read(record, turns):
    """Lists were once turned into their Python text, NaN into "nan", and an empty value hid the one beside it."""
    assert read_messages(record) == talk(turns)


@pytest.mark.parametrize(
    "record",
    [
        chat(("system", "s"), ("user", "a"), ("assistant", "b")),
        chat(("developer", "s"), ("user", "a"), ("assistant", "b")),
        chat(("user", "a"), ("assistant", "b"), system="s"),
        {"instruction": "a", "input": "", "output": "b", "system": "s "},
        {"system_prompt": "s", "question": "a", "response": "b"},
        {"prompt": [{"role": "system", "content": "s"}, USER], "completion": [ASSISTANT]},
    ],
)
def test_a_system_message_stands_before_the_users(record):
    """The column `system` was once dropped."""
    user, assistant = read_messages(record)
    assert user["system"] == "s" and (user["content"], assistant["content"]) == ("a", "b")
    assert "### Instruction:\ns\n\na\n" in TOKENIZER.decode(encode_conversation(TOKENIZER, [user], ALPACA)[0])


@pytest.mark.parametrize(
    "record, message",
    [
        ({"text": "a"}, "no instruction in text; known are"),
        ({"output": ["b", "c"], "instruction": "a"}, "its response is list, not text; make a record of each answer"),
        ({"output": ["b"], "instruction": ["a"]}, "a message is str, not an object"),
        ({"prompt": "a", "completion": [ASSISTANT]}, "its response is list"),
        ({"completion": {"text": "b"}, "prompt": "a"}, "its response is dict, not text"),
        ({"instruction": "a", "output": 1.5}, "float, not text"),
        ({"instruction": "a", "output": True}, "bool, not text"),
        ({"instruction": "a", "prompt": "b", "output": "c"}, "both instruction and prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "'chosen' is not supported"),
        ({"prompt": "a", "completion": "b", "label": False}, "'label' is not supported"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "'completions' is not supported"),
        (chat(("user", "a"), ("assistant", "b"), tools=[{"name": "f"}]), "'tools' is not supported"),
        (chat(("user", "a"), ("tool", "b")), "role 'tool'"),
        (chat(("user", "a"), ("observation", "b")), "role 'observation'"),
        (chat((None, "a")), "role None"),
        (chat((["user"], "a")), "role"),
        (chat(("assistant", "b")), "message 1 is the assistant's"),
        (chat(("user", "a"), ("assistant", "b"), ("assistant", "c")), "message 3 is the assistant's"),
        (chat(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "b")), "content of message 1 is list"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [{"id": 1}]}]}, "'tool_calls' is not supported"),
        ({"messages": [USER, ASSISTANT | {"reasoning_content": "so"}]}, "'reasoning_content' is not supported"),
        ({"messages": [USER, ASSISTANT | {"weight": 0.5}]}, "weight/train 0.5"),
        ({"messages": [USER | {"value": "other"}, ASSISTANT]}, "both content and value"),
        ({"messages": json.dumps([USER, ASSISTANT])}, "messages are str, not a list"),
        ({"messages": [["user", "a"]]}, "a message is list, not an object"),
        ({"instruction": "a", "output": "b", "history": [["a", "b"]]}, "'history' is not supported"),
        ({"output": "b"}, "no instruction in output"),
        ({"query": "a", "response": "b"}, "no instruction in query, response; known are"),
        (chat(("user", None), ("assistant", "b")), "message 1 has no content"),
        ({"messages": [USER, ASSISTANT | {"train": "false"}]}, "weight/train 'false'"),
        ({"instruction": "a", "input": ["one", "two"], "output": "b"}, "its input is list"),
        (chat(("user", "a"), ("assistant", ["red", "grey"])), "content of message 2 is list"),
        (chat(("user", [{"type": "text", "text": "a", "image_url": "x"}]), ("assistant", "b")), "message 1 is list"),
    ],
)
def test_records_that_could_be_misunderstood_are_refused_by_name(record, message):
    with pytest.raises(UserError, match=message):
        read_messages(record)


def test_messages_can_be_context_only_and_what_is_not_read_is_counted():
    notes = Counter()
    record = {
        "messages": [USER, ASSISTANT | {"weight": 0, "name": "Bo"}, USER, ASSISTANT | {"train": True}, USER],
        "id": 7,
    }
    messages = read_messages(record, notes)
    assert [m.get("learn", True) for m in messages if m["role"] == "assistant"] == [False, True]
    assert +notes == Counter(["column 'id'", "field 'name'", "last message without a response"])
    ids, is_response = encode_conversation(TOKENIZER, messages, SHORT)
    learned = [token for token, flag in zip(ids, is_response, strict=True) if flag]
    assert learned == [*TOKENIZER.encode(" b"), TOKENIZER.eot]
    notes = Counter()
    read_messages({"prompt": [USER], "completion": [ASSISTANT], "context": "b"}, notes)
    assert notes["column 'input'"] == 1
    (_, first, _, last) = read_messages(
        chat(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c")), notes
    )
    assert notes["empty response"] == 1 and first["learn"] is False and "learn" not in last
    few_shot = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT | {"content": "c"}]}  # only c is learned
    assert [m.get("learn", True) for m in read_messages(few_shot)[1::2]] == [False, True]


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
    """Return the small tokenizer with more special tokens, numbered from FIRST."""
    spec = json.loads(json.dumps(TOKENIZER.spec))
    flags = spec["added_tokens"][0]
    spec["added_tokens"] += [flags | {"id": FIRST + i, "content": name} for i, name in enumerate(names)]
    return Tokenizer(spec)


def test_gemmas_turns_are_special_tokens_and_their_names_in_a_content_are_text():
    tokenizer = with_special_tokens("<start_of_turn>", "<end_of_turn>")
    ids, is_response = encode_conversation(
        tokenizer, talk([("hi <end_of_turn>", "", "yes"), ("more", "", None)]), GEMMA
    )
    learned = [token for token, flag in zip(ids, is_response, strict=True) if flag]
    assert learned == [*tokenizer.encode("yes"), FIRST + 1]
    assert ids.count(FIRST) == 4 and ids.count(FIRST + 1) == 3  # two user turns and two of the model, one of them open
    assert end_of_response(tokenizer, GEMMA) == FIRST + 1 and end_of_response(tokenizer, SHORT) == tokenizer.eot
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
            plain = [{"role": m["role"], "content": m.get("system", "") + "\n\n" + m["content"]} for m in ours]
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
    start, end, after = [FIRST], [FIRST + 1], tokenizer.encode("\nNext:\n").tolist()
    contents = zip(["user", "assistant"] * 2, "abcd", strict=True)
    contents = [(role, tokenizer.encode(text).tolist()) for role, text in contents]
    expected = []  # this template has no bos token, so transformers adds none
    for role, text in contents:
        expected += start + tokenizer.encode(f"{role}\n").tolist() + text + end + after
    assert ids == expected[: -len(after)] and end_of_response(tokenizer, chatml) == FIRST + 1
    learned = [t for t, flag in zip(ids, is_response, strict=True) if flag]
    assert learned == contents[1][1] + end + contents[3][1] + end


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out or repeats"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "leaves out or repeats"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes the text of a message"),
        ("{% for m in messages %}{{ m.content.split('</think>')[-1][:3] }}{% endfor %}", "leaves out|changes the text"),
        ("{% for m in messages %}", "cannot be rendered.*--template: .*endfor"),
        ("{{ raise_exception('no system\nhere') }}", "cannot be rendered.*: no system"),
        ("{{ messages.__class__.__mro__ }}", "cannot be rendered.*: .*unsafe"),
        ("{{ missing.key }}", "cannot be rendered.*: 'missing' is undefined"),
    ],
)
def test_a_strangers_chat_template_is_rendered_in_a_sandbox(template, message):
    with pytest.raises(UserError, match=message) as found:
        encode_conversation(TOKENIZER, exchange("a </think> long", "", "b"), template)
    assert "\n" not in str(found.value)


TURN = "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
CLOSE = "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
LOOP = "{{ bos_token }}{% for m in messages %}"


@pytest.mark.parametrize(
    "template",
    [
        LOOP + TURN + "{{ m['content'] | trim }}" + CLOSE,
        LOOP + TURN + "{{ m['content'] }}" + CLOSE,  # white space stays
        (LOOP + TURN + "{{ m['content'] }}" + CLOSE).removeprefix("{{ bos_token }}"),  # no bos
        LOOP + TURN + "{% generation %}{{ m['content'] | trim }}{% endgeneration %}" + CLOSE,
        LOOP + "{% if loop.index0 > 40 %}{% break %}{% endif %}" + TURN + "{{ m['content'] | trim }}" + CLOSE,
        "Today is {{ strftime_now('%Y') }}." + LOOP + TURN + "{{ m['content'] }}" + CLOSE,
        "{{ {'a': '<b>'} | tojson }}" + LOOP + TURN + "{{ m['content'] }}" + CLOSE,
        LOOP + "{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}" + TURN + "{{ m['content'] }}" + CLOSE,
        LOOP + TURN + "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0].text }}{% endif %}"
        + CLOSE,
        "{% if tools is not none %}{{ tools[0] }}{% endif %}" + LOOP + TURN + "{{ m['content'] }}" + CLOSE,
    ],
)  # fmt: skip
def test_templates_of_others_give_the_ids_of_transformers(tmp_path, template):
    """{% generation %}, which TRL's templates have, once ended sampling and export; white space was once stripped."""
    tokenizer = with_special_tokens("<start_of_turn>", "<end_of_turn>")
    tokenizer.save(tmp_path)
    peer = AutoTokenizer.from_pretrained(tmp_path)
    turns = ("user", " Who is it?\n"), ("assistant", "  Bo.\n\n"), ("user", "Sure?"), ("assistant", "Yes.\n")
    messages = [{"role": role, "content": text} for role, text in turns]
    theirs = peer.apply_chat_template(messages, chat_template=template, return_dict=False)
    ids, is_response = encode_conversation(tokenizer, messages, template)
    assert ids == theirs[: len(ids)] and peer.decode(theirs[len(ids) :]) == "\n"
    text = "".join(peer.decode([t]) for t, flag in zip(ids, is_response, strict=True) if flag)
    strips = "| trim" in template
    assert text == ("Bo.<end_of_turn>Yes.<end_of_turn>" if strips else "  Bo.\n\n<end_of_turn>Yes.\n<end_of_turn>")
    prompt = peer.apply_chat_template(
        messages[:-1], chat_template=template, add_generation_prompt=True, return_dict=False
    )
    assert encode_conversation(tokenizer, messages[:-1], template)[0] == prompt


@pytest.mark.parametrize("is_special", [True, False])
def test_a_turn_ends_with_its_token_also_if_that_is_not_special(tmp_path, is_special):
    """tokenizer.add_tokens() instead of add_special_tokens() is a usual mistake."""
    spec = with_special_tokens("<|im_start|>", "<|im_end|>").spec
    for token in spec["added_tokens"][1:]:
        token["special"] = is_special
    tokenizer = Tokenizer(spec)
    tokenizer.save(tmp_path)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    messages = talk([("a", "", "b"), ("c", "", "d")])
    ids, is_response = encode_conversation(tokenizer, messages, template)
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        plain, chat_template=template, return_dict=False
    )
    assert ids == theirs[: len(ids)] and len(theirs) == len(ids) + 1
    learned = [token for token, flag in zip(ids, is_response, strict=True) if flag]
    assert learned == [*TOKENIZER.encode("b"), FIRST + 1, *TOKENIZER.encode("d"), FIRST + 1]


def test_a_token_of_the_template_beyond_the_embedding_is_refused():
    tokenizer = with_special_tokens("<start_of_turn>", "<end_of_turn>")
    tokenizer.check_rows(FIRST)
    with pytest.raises(UserError, match=f"the id {FIRST}, beyond the model's embedding"):
        encode_conversation(tokenizer, exchange("a", "", "b"), GEMMA)
