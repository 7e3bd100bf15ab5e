"""Conversations as tokens, through the tokenizer's chat template, and which of them the assistant said."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import InputError

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_template(tokenizer: PreTrainedTokenizerBase, label: str) -> None:
    """
    Args:
        label: the source's name, for the message.
    Raises:
        InputError: the tokenizer has no chat template, or cannot say where in the text its tokens stand.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"data.sources: {label}: `source: chat` needs a tokenizer with a chat template, and this model's has none; "
            "take the model's instruct version, or `source: dataset` with a column of plain text"
        )
    if not tokenizer.is_fast:
        raise InputError(
            f"data.sources: {label}: `source: chat` needs a fast tokenizer (tokenizer.json), found "
            f"{type(tokenizer).__name__}; save the model with its fast tokenizer"
        )


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]
) -> tuple[list[int], list[int]]:
    """A conversation's tokens as its template writes them, and which of them are the assistant's.

    Args:
        messages: `{role, content}`, in order.
    Returns:
        Token ids and as many 0 or 1; 1 from the first token of each answer to its end-of-turn token.
    Raises:
        InputError: the template refuses the conversation, or does not show where the answers stand.
    """
    try:
        if GENERATION_TAG.search(tokenizer.get_chat_template()):
            given = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return list(given["input_ids"]), list(given["assistant_masks"])
        text, spans = _answers(tokenizer, messages)
    except InputError:
        raise
    except Exception as error:  # a template is a program of the model's author: it raises what it likes
        said = str(error).strip().splitlines()
        raise InputError(
            f"data.sources: the chat template refuses a conversation ({said[0] if said else type(error).__name__}); "
            f"its roles: {', '.join(str(one.get('role')) for one in messages)}; leave such rows out"
        ) from error
    given = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask, rest = [], iter([*spans, (len(text), len(text))])
    start, end = next(rest)
    for first, last in given["offset_mapping"]:
        while first >= end and end < len(text):
            start, end = next(rest)
        mask.append(int(first >= start and last <= end and last > first))
    return list(given["input_ids"]), mask


def _answers(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """The whole text, and the spans [start, end) of characters that the assistant said, each with its end of turn."""
    text = _render(tokenizer, messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], add_generation_prompt=True)
        if not text.startswith(before):
            raise InputError(
                f"data.sources: the chat template writes what stands before answer {index} otherwise once the "
                "conversation goes on, so where the answer begins is not known; use a template with "
                "{% generation %} tags"
            )
        end = _end_of_answer(text, len(before), _render(tokenizer, messages[: index + 1]), message)
        spans.append((len(before), end))
    return text, spans


def _end_of_answer(text: str, start: int, until: str, message: dict[str, Any]) -> int:
    """Where the answer that begins at `start` ends; the line break after the end of the turn is not the assistant's.

    Args:
        until: the conversation up to this answer, as the template writes it alone.
    """
    if text.startswith(until):
        return start + len(text[start : len(until)].rstrip())
    content = str(message.get("content") or "").rpartition("</think>")[2].strip()  # earlier thoughts are left out
    at, alone = text.find(content, start), until.rfind(content)
    if not content or at < 0 or alone < 0:
        raise InputError(
            "data.sources: the chat template writes an answer otherwise once the conversation goes on, so where the "
            "answer ends is not known; use a template with {% generation %} tags"
        )
    closing = until[alone + len(content) :].rstrip()
    end = at + len(content)
    return end + len(closing) if text.startswith(closing, end) else end


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> str:
    """The text of some messages; an empty list is the generation prompt alone, which no template is asked for."""
    if not messages:
        return ""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
