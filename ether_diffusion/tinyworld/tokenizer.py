"""The miniature's tokenizer: a CLIPTokenizer for which every word of the world's captions is one token.

Other words become several tokens, down to bytes, so that it accepts any prompt.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

MAX_LENGTH = 40  # tokens; the longest caption has fewer
START, END = "<|startoftext|>", "<|endoftext|>"

Pair = tuple[str, str]


def build_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """A tokenizer with byte-pair merges learned on `words`, so that each of them is one token."""
    symbols = list(bytes_to_unicode().values())
    merges = learn_merges(words)
    pieces = dict.fromkeys(left + right for left, right in merges)
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *pieces, START, END]
    pairs: Any = merges
    return CLIPTokenizer(
        vocab={token: k for k, token in enumerate(tokens)},
        merges=pairs,
        model_max_length=MAX_LENGTH,
        pad_token=END,
    )


def learn_merges(words: Iterable[str]) -> list[Pair]:
    """Byte-pair encoding (Sennrich et al. 2016): merge the most frequent neighbours until every word is one piece."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges: list[Pair] = []
    while True:
        counts = Counter(pair for pieces in split for pair in itertools.pairwise(pieces))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        split = [_joined(pieces, best) for pieces in split]


def _joined(pieces: list[str], pair: Pair) -> list[str]:
    result: list[str] = []
    for piece in pieces:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result
