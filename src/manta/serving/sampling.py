"""From logits to tokens, and from tokens to text that stops where it was asked to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from manta.serving.generation import Delta, Request, Sampling

# Tokens of the prompt that the first token of the answer is decoded after: some tokenizers trim what stands first.
_CONTEXT = 8


def draw(logits: torch.Tensor, rules: Sequence[Sampling], chances: Sequence[float]) -> list[int]:
    """One token per row of `logits` (rows × vocabulary), each by its own rule and its own chance in [0, 1).

    The chance picks a place in the row's cumulative probability, so that a row's token depends on nothing beside it.
    """
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, rule in enumerate(rules) if rule.temperature > 0]
    if drawn:
        heat = torch.tensor([rules[row].temperature for row in drawn], dtype=torch.float32, device=logits.device)
        scores = logits[drawn].float() / heat[:, None]
        for place, row in enumerate(drawn):
            if rules[row].top_k or rules[row].top_p < 1:
                scores[place] = _limited(scores[place], rules[row])
        reached = scores.softmax(dim=-1).double().cumsum(dim=-1)
        wanted = torch.tensor([chances[row] for row in drawn], dtype=torch.float64, device=logits.device)
        places = torch.searchsorted(reached, (wanted * reached[:, -1])[:, None], right=True)[:, 0]
        tokens[drawn] = places.clamp(max=logits.shape[-1] - 1)
    return tokens.tolist()


def _limited(scores: torch.Tensor, rule: Sampling) -> torch.Tensor:
    """The scores of a row with what `top_k` and then `top_p` leave out at -inf; the likeliest is always left in."""
    ordered, places = scores.sort(descending=True, stable=True)
    if rule.top_k:
        ordered[rule.top_k :] = -torch.inf
    share = ordered.softmax(dim=-1)
    before = share.cumsum(dim=-1) - share
    left_out = before >= rule.top_p
    left_out[0] = False
    ordered[left_out] = -torch.inf
    return torch.empty_like(scores).scatter_(0, places, ordered)


class Answer:
    """The text of one answer as its tokens come, without special tokens, up to a stop word or the most tokens."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self._tokenizer = tokenizer
        self._stream: Any = DecodeStream(ids=request.prompt[-_CONTEXT:], skip_special_tokens=True)
        self._request = request
        self._unseen: list[int] = []  # tokens that are no whole characters yet
        self._held = ""  # text that may be the beginning of a stop word
        self.tokens = 0
        self.finish: str | None = None

    def add(self, token: int) -> Delta:
        """What this token adds to the text that is certain."""
        rule = self._request.sampling
        self.tokens += 1
        if token in self._request.stop_ids:
            self.finish = "stop"
        else:
            self._unseen.append(token)
            if text := self._stream.step(self._tokenizer, token):
                self._held += text
                self._unseen = []
            if self.tokens >= rule.max_tokens:
                self.finish = "length"
        if self.finish and self._unseen:
            self._held += self._tokenizer.decode(self._unseen, skip_special_tokens=True)
        found = [at for word in rule.stop if (at := self._held.find(word)) >= 0]
        if found:
            self._held, self.finish = self._held[: min(found)], "stop"
        certain = len(self._held) if self.finish else len(self._held) - _begun(self._held, rule.stop)
        text, self._held = self._held[:certain], self._held[certain:]
        return Delta(text, 1, self.finish)


def _begun(text: str, words: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `words`."""
    longest = max((len(word) for word in words), default=1) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(word.startswith(text[-count:]) for word in words):
            return count
    return 0
