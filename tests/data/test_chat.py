"""Conversations: the template's tokens, loss on the assistant's alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made_text import make_recipe, word_tokenizer
from transformers import PreTrainedTokenizerFast

from nha_convert.data import PackedDataset, WindowDataset, held_out_tokens, training_dataset
from nha_convert.data.chat import encode_conversation
from nha_convert.errors import InputError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message.content + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (  # with BOS, contents trimmed, as Llama 3 has it
    "{% for message in messages %}{{ (bos_token if loop.first else '') + '<|start|>' + message.role + '<|end|>\n\n' "
    "+ message.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
THINKING = (  # an empty thought in the last answer alone, as Qwen3 has it; earlier thoughts are left out
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHANGING = "{{ messages | length }}: {% for message in messages %}{{ message.role + message.content }}{% endfor %}"
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is one and one"},
    {"role": "assistant", "content": "two, or \N{GREEK SMALL LETTER ALPHA}"},
    {"role": "user", "content": "two, or more"},
    {"role": "assistant", "content": "two"},
]


def chat_tokenizer(template: str | None, bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer(bos)
    tokenizer.chat_template = template
    return tokenizer


def said(tokenizer: PreTrainedTokenizerFast, ids: list[int], mask: list[int]) -> list[str]:
    """The runs of tokens with loss, as text."""
    runs: list[list[int]] = []
    for index, (token, has) in enumerate(zip(ids, mask)):
        if has and (index == 0 or not mask[index - 1]):
            runs.append([])
        if has:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["two, or α<|im_end|>", "two<|im_end|>"]),
        (TAGGED, ["two, or α<|im_end|>", "two<|im_end|>"]),
        (HEADERS, ["two, or α<|eot|>", "two<|eot|>"]),
        (THINKING, ["two, or α<|im_end|>", "<think>\n\n</think>\n\ntwo<|im_end|>"]),
    ],
)
def test_the_answers_and_their_ends_have_loss(template: str, expected: list[str]) -> None:
    tokenizer = chat_tokenizer(template)
    ids, mask = encode_conversation(tokenizer, TALK)
    assert ids == tokenizer.apply_chat_template(TALK, return_dict=True)["input_ids"]
    assert len(ids) == len(mask) and set(mask) == {0, 1}
    assert said(tokenizer, ids, mask) == expected


def test_earlier_thoughts_that_the_template_leaves_out() -> None:
    talk = [dict(message) for message in TALK]
    talk[2]["content"] = "<think>\nhm\n</think>\n\ntwo, or more"
    tokenizer = chat_tokenizer(THINKING)
    ids, mask = encode_conversation(tokenizer, talk)
    assert said(tokenizer, ids, mask) == ["two, or more<|im_end|>", "<think>\n\n</think>\n\ntwo<|im_end|>"]


def test_a_template_that_hides_where_answers_begin_is_refused() -> None:
    with pytest.raises(InputError, match="where the answer begins is not known; use a template with"):
        encode_conversation(chat_tokenizer(CHANGING), TALK)


def test_a_template_that_refuses(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="refuses a conversation .*roles must alternate.*its roles: system, user"):
        encode_conversation(chat_tokenizer(template), TALK)


def talks(folder: Path, count: int = 80) -> Path:
    """Conversations about numbers, in both layouts."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        question, answer = f"what comes after {number}", f"it is {number + 1}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages[1]["name"] = "calculator"  # a key that one message has is null in the others of a table
        rows.append({"messages": messages, "question": question, "answer": answer})
    path = folder / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("template", [CHATML, TAGGED, HEADERS])
def test_packed_conversations(tmp_path: Path, template: str) -> None:
    tokenizer = chat_tokenizer(template)
    path = str(talks(tmp_path))
    recipe = make_recipe([{"source": "chat", "path": path}], packing="documents", held_out_tokens=2000)
    recipe.stages[0].sequence_length, recipe.stages[0].tokens = 256, 100 * 256
    dataset = training_dataset(recipe, 0, tokenizer)
    assert isinstance(dataset, PackedDataset) and dataset.sources[0] is not None
    assert dataset.sources[0].prefix == ([tokenizer.bos_token_id] if template == HEADERS else [])
    found = []
    for index in range(len(dataset.sources[0])):
        item = dataset[index]
        starts = [*(item["position_ids"] == 0).nonzero().flatten().tolist(), 256]
        for start, end in zip(starts, starts[1:]):
            labels = item["labels"][start:end]
            if (labels == -100).all():
                continue  # padding
            found.append(tokenizer.decode(labels[labels != -100]))
            alone = tokenizer.decode(item["input_ids"][start:end])
            number = int(found[-1].split()[2].partition("<")[0])
            messages = [
                {"role": "user", "content": f"what comes after {number - 1}"},
                {"role": "assistant", "content": f"it is {number}"},
            ]
            assert alone == tokenizer.apply_chat_template(messages, tokenize=False)
    closing = "<|eot|>" if template == HEADERS else "<|im_end|>"
    kept = [number for number in range(80) if number % 20 != 19]
    assert sorted(found) == sorted(f"it is {number + 1}{closing}" for number in kept)
    assert "what comes after 19" in tokenizer.decode(held_out_tokens(recipe, tokenizer))


def test_both_layouts_and_windows(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(CHATML)
    path = str(talks(tmp_path))
    layouts: list[dict[str, Any]] = [{}, {"prompt": "question", "response": "answer"}]
    datasets = [
        training_dataset(make_recipe([{"source": "chat", "path": path, **layout}]), 0, tokenizer) for layout in layouts
    ]
    for index in range(20):
        first, second = (dataset[index] for dataset in datasets)
        assert all(torch.equal(first[name], second[name]) for name in first)
        has = first["labels"] != -100
        assert 0 < has.sum() < 60 and torch.equal(first["labels"][has], first["input_ids"][has])
    assert all(isinstance(dataset, WindowDataset) for dataset in datasets)


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (None, {"messages": TALK}, "`source: chat` needs a tokenizer with a chat template, and this model's has none"),
        (CHATML, {"messages": "hello"}, r"column 'messages': a list of \{role, content\} is needed, found \"hello\""),
        (CHATML, {"text": "hello"}, "has no column 'messages'; its columns: text; set `column`"),
        (CHATML, {"messages": TALK[:2]}, "has no token that the assistant said"),
    ],
)
def test_what_is_no_chat_says_so(tmp_path: Path, template: str | None, row: dict[str, Any], message: str) -> None:
    (tmp_path / "talks.jsonl").write_text((json.dumps(row) + "\n") * 40)
    recipe = make_recipe([{"source": "chat", "path": str(tmp_path / "talks.jsonl")}])
    with pytest.raises(InputError, match=message):
        training_dataset(recipe, 0, chat_tokenizer(template))
