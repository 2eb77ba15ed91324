"""What a text encoder does not read of prompts and captions, in a line each: for commands to print once."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from ether_diffusion.tinyworld.phrasing import VOCABULARY

NAMED = 3
"""How many texts a line names; it counts all."""


def long_texts_note(tokenizer: Any, limit: int, texts: Iterable[str], what: str = "prompts") -> str | None:
    """Count and name the texts that are longer than the encoder reads; None if all fit.

    Args:
        tokenizer: Of the text encoder that reads most.
        limit: How many tokens that one reads, with those for the start and the end.
        what: The texts' name in the line.
    """
    once = list(dict.fromkeys(texts))
    lengths = [len(ids) for ids in tokenizer(once, verbose=False).input_ids] if once else []
    own = tokenizer.num_special_tokens_to_add()
    long = {text: length - own for text, length in zip(once, lengths, strict=True) if length > limit}
    if not long:
        return None
    named = [f'"{_short(text)}" ({length})' for text, length in long.items()]
    return (
        f"{len(long):,} of {len(once):,} {what} exceed the {limit - own} tokens that the text encoder reads, and what "
        f"comes after is ignored: {_few(named)}"
    )


def unknown_words_note(texts: Iterable[str], known: Collection[str] = ()) -> str | None:
    """Count and name the words that the base `tiny` has never seen in a caption; None if it knows all.

    Args:
        known: Words that training gives a meaning, such as a subject's identifier.
    """
    words = dict.fromkeys(word for text in texts for word in re.findall(r"[^\W_]+", text.lower()))
    unknown = [word for word in words if word not in VOCABULARY and word not in known]
    if not unknown:
        return None
    count = f"{len(unknown):,} word{'s' * (len(unknown) > 1)}"
    return (
        f"the base 'tiny' is a miniature that knows {len(VOCABULARY)} words of a small rendered world, and not "
        f"{count} of the prompts: {_few(unknown)}. See docs/tinyworld.md"
    )


def _few(items: Sequence[str]) -> str:
    return ", ".join(items[:NAMED]) + ", …" * (len(items) > NAMED)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}…"
