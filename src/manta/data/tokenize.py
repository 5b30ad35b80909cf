"""From text to token ids and labels: the output and EOS are trained, the input is masked, exactly at the boundary."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from manta.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label that cross-entropy skips, as in PyTorch and transformers

OverlongPolicy = Literal["truncate", "drop", "error"]


@dataclass
class Sample:
    """One tokenized sample. `input_ids` and `labels` have equal length; masked positions have the label IGNORE."""

    input_ids: list[int]
    labels: list[int]
    merged_boundary: bool = False
    truncated: bool = False

    @property
    def trains(self) -> bool:
        # The model predicts position i from positions < i: a label at position 0 is never a target.
        return any(label != IGNORE for label in self.labels[1:])


def load_tokenizer(model_id: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub model or local folder. Raises UserError if there is none or it has no EOS token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"The tokenizer of {model_id} cannot be loaded: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer of {model_id} has no EOS token, so a tuned model could never learn to stop.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by attention_mask and labels, never by its id
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what a tokenizer does: its vocabulary and merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    parts = [body, repr(sorted(tokenizer.special_tokens_map.items())), repr(tokenizer.chat_template)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Encoder:
    """Encodes (input, output) pairs in batches.

    The pair is tokenized as one text and divided by character offsets. Where a token would span the boundary, the
    two sides are tokenized apart instead: that is what the model meets when it is served, where the prompt ends
    before the answer exists. Such samples have `merged_boundary` set.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.eos = tokenizer.eos_token_id
        # The Rust tokenizer itself: it gives spans one by one, without a list of all of them.
        self.backend: Tokenizer | None = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self.trims_offsets = False
        if self.backend is not None:
            self.backend.no_truncation()  # lengths are `fit`'s affair, and some tokenizers come with a limit
            self.backend.no_padding()
            # Some tokenizers (Llama 3) trim a token's spaces from its span, which hides one that spans the boundary.
            self.trims_offsets = any(start == 2 for start, _ in self.backend.encode("a b").offsets)

    def __call__(self, inputs: Sequence[str], outputs: Sequence[str]) -> list[Sample]:
        if self.backend is None:
            return [self._sample(*pair) for pair in self._apart(inputs, outputs)]
        encodings = self.backend.encode_batch([a + b for a, b in zip(inputs, outputs, strict=True)])
        whole = [self._without_appended(encoding) for encoding in encodings]
        samples: list[Sample | None] = [
            self._divide(*each) for each in zip(inputs, outputs, whole, encodings, strict=True)
        ]
        torn = [i for i, sample in enumerate(samples) if sample is None]
        apart = self._apart([inputs[i] for i in torn], [outputs[i] for i in torn])
        for i, (masked, trained) in zip(torn, apart, strict=True):
            samples[i] = self._sample(masked, trained, merged_boundary=masked + trained != whole[i])
        return cast(list[Sample], samples)

    @staticmethod
    def _without_appended(encoding: Encoding) -> list[int]:
        """Ids without the special tokens that the tokenizer itself appended, which have no place in the text."""
        ids = encoding.ids
        while len(ids) > 1 and encoding.token_to_chars(len(ids) - 1) is None:
            ids.pop()
        return ids

    def _divide(self, prompt: str, answer: str, ids: list[int], encoding: Encoding) -> Sample | None:
        """Input and output of a text tokenized whole, or None if a token spans the boundary, or may do so unseen."""
        if self.trims_offsets and (prompt[-1:].isspace() or answer[:1].isspace()):
            return None
        boundary = len(prompt)

        def end(index: int) -> int:
            span = encoding.token_to_chars(index)
            return span[1] if span else 0  # a special token put in front

        # Ends never fall, so the first token that reaches past the boundary is found by bisection.
        first = bisect_right(range(len(ids)), boundary, key=end)
        if first < len(ids) and (encoding.token_to_chars(first) or (boundary,))[0] < boundary:
            return None
        return self._sample(ids[:first], ids[first:])

    def _apart(self, inputs: Sequence[str], outputs: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Ids of each input and each output, tokenized by themselves."""
        if not inputs:
            return []
        prompts = self.tokenizer(list(inputs), verbose=False)["input_ids"]
        answers = self.tokenizer(list(outputs), add_special_tokens=False, verbose=False)["input_ids"]
        written = [prompt.endswith(str(self.tokenizer.eos_token)) for prompt in inputs]
        return [
            # An EOS that the tokenizer appended to the prompt, not the user, would end it before the answer.
            (ids[:-1] if ids and ids[-1] == self.eos and not own else ids, answer)
            for ids, answer, own in zip(prompts, answers, written, strict=True)
        ]

    def _sample(self, masked: list[int], trained: list[int], merged_boundary: bool = False) -> Sample:
        if not trained or trained[-1] != self.eos:
            trained = [*trained, self.eos]
        return Sample(masked + trained, [IGNORE] * len(masked) + trained, merged_boundary)


def fit(sample: Sample, max_length: int, policy: OverlongPolicy, split: bool = False) -> list[Sample]:
    """What becomes of a sample under a length limit in tokens: itself, cut, left out, or cut into several.

    With `split` (continual pre-training) nothing is lost: the sample becomes consecutive pieces. Raises UserError
    under the policy "error".
    """
    if len(sample.input_ids) <= max_length:
        return [sample]
    if split:
        starts = range(0, len(sample.input_ids), max_length)
        return [Sample(sample.input_ids[i : i + max_length], sample.labels[i : i + max_length]) for i in starts]
    if policy == "error":
        raise UserError(
            f"A sample has {len(sample.input_ids)} tokens, over max_seq_length {max_length}. Raise --max_seq_length, "
            "or choose --overlong_policy truncate or drop."
        )
    if policy == "drop":
        return []
    return [Sample(sample.input_ids[:max_length], sample.labels[:max_length], sample.merged_boundary, truncated=True)]
