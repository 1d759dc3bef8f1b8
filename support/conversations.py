"""Records of any usual shape to conversations, and conversations to tokens through a chat template.

A conversation is a list of messages: dicts with "role" ("user" or "assistant") and "content". A user's message may have
an "input", the text that its content is about."""

import functools
import re

from jinja2.sandbox import ImmutableSandboxedEnvironment

from support.settings import UserError, user_errors

# names of a record's instruction, input and response
SHAPES = [("instruction", "input", "output"), ("instruction", "context", "response"), ("prompt", "input", "completion")]


def read_messages(record):
    """Return the conversation in a record. A system message joins the user's message after it."""
    messages, asked = [], []  # asked: the texts since the last response
    for message in record.get("messages") or record.get("conversations") or []:
        text = message.get("content", message.get("value")) or ""
        if not isinstance(text, str):
            raise UserError(f"the content of a message is {type(text).__name__}, not text")
        if message.get("role", message.get("from")) in ("assistant", "gpt", "model"):
            messages += exchange("\n\n".join(asked), "", text)
            asked = []
        else:
            asked.append(text.strip())
    if messages or asked:
        return messages or exchange("\n\n".join(asked), "", "")  # without a response, add an empty one
    for keys in SHAPES:
        if keys[0] in record and keys[2] in record:
            return exchange(*("" if record.get(key) is None else str(record[key]) for key in keys))
    known = ", ".join(map("/".join, SHAPES))
    raise UserError(f"it has {', '.join(record)}; known are {known} and messages")


def exchange(instruction, context, response):
    """Return an instruction and its response as messages."""
    return [{"role": "user", "content": instruction, "input": context}, {"role": "assistant", "content": response}]


def encode_conversation(tokenizer, messages, template):
    """Return the token ids of a conversation, and for each id whether it is part of a response or the end of one. In
    the template "short" these are the marked ids:

        <|endoftext|>Instruction: Who is it?\\nResponse: Emil.<|endoftext|>
                                                        ^^^^^^^^^^^^^^^^^^^

    template: the text of a chat template. If the last message is a user's, the ids are a prompt for the response.
    Training and sampling both call this function, so their prompts cannot differ. Contents are encoded separately, so
    the name of a special token in a content remains text."""
    knows_input = re.search(r"\bm\.input\b", template)  # as the templates in lora.py do
    texts, marked = [], []  # the contents, and the messages with a mark in place of each content
    for message in messages:
        is_response, marks = message["role"] == "assistant", {}
        for key in ("content", "input"):
            text = message.get(key) or ""
            if text or key == "content":
                marks[key] = f"\0{len(texts)}\0"
                texts.append((text if is_response else text.strip(), is_response))
        if not knows_input:
            marks = {"content": "\n\n".join(marks.values())}
        marked.append({"role": message["role"], **marks})
    # text of the template, a space or none, the number of a content, text of the template, ...
    pieces = re.split(r"( ?)\0(\d+)\0", render(template, marked, tokenizer))
    if sorted(map(int, pieces[2::3])) != list(range(len(texts))):
        raise UserError("the chat template leaves out or repeats messages: choose another format with --template")
    parts, is_response = [([tokenizer.bos], False)], False
    for own_text, space, number in zip(pieces[::3], [*pieces[1::3], ""], [*pieces[2::3], ""], strict=True):
        ids = tokenizer.encode(own_text, markers=True).tolist()
        if is_response:  # the model learns to end it, too
            parts.append(([ids.pop(0) if ids and ids[0] in tokenizer.special_ids else tokenizer.eot], True))
        if number or not is_response:  # the text after the last response is left out
            parts.append((ids, False))
        if number:
            text, is_response = texts[int(number)]
            # most tokenizers join a word with the space before it
            parts.append((tokenizer.encode(space + text).tolist() if text else [], is_response))
    return [t for ids, _ in parts for t in ids], [flag for ids, flag in parts for _ in ids]


def end_of_response(tokenizer, template):
    """Return the id of the token that ends a response in this chat template."""
    ids, _ = encode_conversation(tokenizer, exchange("a", "", "b"), template)
    return ids[-1]


def render(template, messages, tokenizer):
    """Return the text of messages in a chat template, without the bos token at its beginning."""
    with user_errors("the chat template cannot be rendered"):
        special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eot_token}
        is_prompt = messages[-1]["role"] != "assistant"
        text = compile_template(template).render(messages=messages, add_generation_prompt=is_prompt, **special)
    return text.removeprefix(tokenizer.bos_token)


@functools.cache
def compile_template(template):
    """Compile a Jinja template as transformers does, in a sandbox, because published models bring their own."""
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
