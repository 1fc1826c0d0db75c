"""Refuse text records whose responses repeat the prompt's dialogue or final header. The copy would be scored."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from dpo_engine.data.records import BadRecord

TURN = re.compile(r"(?:^|\n\n?)(?:### ?)?(?:Human|Assistant):")
TEMPLATE = re.compile(
    r"(?:<s>|<bos>|<\|begin_of_text\|>)?\s*"
    r"(?:<\|(?:im_start|start_header_id)\|>(?:system|user)|<start_of_turn>user|<\|(?:system|user)\|>|\[INST\])"
)
"""The start of a whole conversation in the notation of a chat template."""
HEADER = re.compile(
    r"(?:### ?)?Assistant:|<\|im_start\|>assistant|<\|start_header_id\|>assistant<\|end_header_id\|>|"
    r"<start_of_turn>model|<\|assistant\|>"
)


def refuse_repeated_prompt(row: Mapping[str, Any]) -> None:
    """Raise :class:`BadRecord` if both responses of a text record repeat the prompt's dialogue or final header.

    If both responses begin as `TEMPLATE` describes, they count as repeated dialogues without a comparison with the
    prompt.

    It is not an error if responses repeat a prompt of plain text, because the repetition may be intended, for example
    for code. Such pairs are counted (:attr:`~dpo_engine.data.encode.Encoded.repeated`).
    """
    parts = [row.get(name) for name in ("prompt", "chosen", "rejected")]
    if not all(isinstance(part, str) for part in parts):
        return
    prompt, *responses = (part.strip() for part in parts)
    if all(map(TEMPLATE.match, responses)) or _is_dialogue(prompt, responses):
        way = "set data.columns={prompt: null}"  # the prompt is then taken from chosen and rejected
        raise BadRecord(f"chosen and rejected are whole dialogues that repeat the prompt; {way}")
    header = HEADER.match(responses[0])
    if header and responses[1].startswith(header[0]) and prompt.endswith(header[0]):
        raise BadRecord(f"responses repeat the end of prompt, {header[0]!r}; remove this text from prompt")


def _is_dialogue(prompt: str, responses: list[str]) -> bool:
    """Return whether both responses begin with the same Human turn, and their common prefix contains the prompt.

    The common prefix must also contain the label of an Assistant turn. The search for the prompt ignores turn labels
    and the amount of whitespace.
    """
    same = os.path.commonprefix(responses)
    if not re.match(r"(?:### ?)?Human:", same) or "Assistant:" not in same:
        return False
    return " ".join(TURN.sub(" ", prompt).split()) in " ".join(TURN.sub(" ", same).split())
