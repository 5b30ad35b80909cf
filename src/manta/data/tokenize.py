"""From text to token ids and labels: what is trained and what is masked, exactly at the boundaries, and EOS learned."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from manta import manifest
from manta.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label that cross-entropy skips, as in PyTorch and transformers

# Files of a model's folder that say what its tokenizer and chat template do.
_FILES = (
    *("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("additional_chat_templates/*", "*.model", "*.tiktoken", "generation_config.json"),
)

OverlongPolicy = Literal["truncate", "drop", "error"]


@dataclass
class Sample:
    """One tokenized sample. `input_ids` and `labels` have equal length; masked positions have the label IGNORE."""

    input_ids: list[int]
    labels: list[int]
    merged_boundary: bool = False
    truncated: bool = False

    @property
    def trained(self) -> int:
        """Tokens that have a label."""
        return len(self.labels) - self.labels.count(IGNORE)

    @property
    def trains(self) -> bool:
        # The model predicts position i from positions < i: a label at position 0 is never a target.
        return self.trained > (self.labels[:1] != [IGNORE])


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


def stop_tokens(model_id: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of the tokens that end generation: the tokenizer's EOS and those of the model's generation config."""
    from transformers import GenerationConfig

    try:
        more = GenerationConfig.from_pretrained(model_id).eos_token_id
    except OSError:  # many base models have none
        more = None
    ids = [tokenizer.eos_token_id, *(more if isinstance(more, list) else [] if more is None else [more])]
    return [str(token) for token in tokenizer.convert_ids_to_tokens(list(dict.fromkeys(ids)))]


def identity(model_id: str, trust_remote_code: bool = False) -> dict[str, str]:
    """What the tokenizer is: digests of a local folder's files, which takes no import, or of what a hub's does."""
    folder = Path(model_id).expanduser()
    files = sorted(path for pattern in _FILES for path in folder.glob(pattern)) if folder.is_dir() else []
    if files:
        return {path.name: manifest.sha256(path) for path in files}
    return {"behaviour": tokenizer_digest(load_tokenizer(model_id, trust_remote_code))}


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what a tokenizer does: its vocabulary and merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    parts = [body, repr(sorted(tokenizer.special_tokens_map.items())), repr(tokenizer.chat_template)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Rendered(NamedTuple):
    """A text and the character spans [start, end) of it that are trained, in order and apart from each other.

    The text of a conversation (`chat`) holds its special tokens and stop tokens; to any other the tokenizer's own are
    added, and EOS at the end.
    """

    text: str
    trained: tuple[tuple[int, int], ...]
    chat: bool = False

    def pieces(self) -> list[tuple[str, bool]]:
        """The text divided where training begins and ends: (text, whether it is trained)."""
        edges = [0, *(edge for span in self.trained for edge in span), len(self.text)]
        found = [(self.text[a:b], index % 2 == 1) for index, (a, b) in enumerate(pairwise(edges))]
        return [piece for piece in found if piece[0]]


class Encoder:
    """Encodes texts in batches, with labels exact to the character.

    A text is tokenized as one and divided by character offsets. Where a token would span a boundary between masked
    and trained text, the two sides are tokenized apart instead: that is what the model meets when it is served, where
    the prompt ends before the answer exists. Such samples have `merged_boundary` set.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.eos = tokenizer.eos_token_id
        # The Rust tokenizer itself: it gives spans one by one, without a list of all of them.
        self.backend: Tokenizer | None = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self.backend is not None:
            self.backend = _with_whole_spans(self.backend)
            self.backend.no_truncation()  # lengths are `fit`'s affair, and some tokenizers come with a limit
            self.backend.no_padding()
            probe = self.backend.encode("a")
            self.appends = probe.token_to_chars(len(probe.ids) - 1) is None

    def __call__(self, inputs: Sequence[str], outputs: Sequence[str]) -> list[Sample]:
        """Prompts, which are masked, and answers, which are trained."""
        pairs = zip(inputs, outputs, strict=True)
        return self.encode([Rendered(a + b, ((len(a), len(a) + len(b)),)) for a, b in pairs])

    def encode(self, texts: Sequence[Rendered]) -> list[Sample]:
        """A sample for each text, in order. All of them conversations, or none."""
        if not texts:
            return []
        if self.backend is None:
            return [self._sample(*each) for each in zip(texts, self._apart(texts), strict=True)]
        chat = texts[0].chat
        encodings = self.backend.encode_batch([text.text for text in texts], add_special_tokens=not chat)
        samples: list[Sample | None] = []
        whole: dict[int, list[int]] = {}  # of the texts that must be tokenized in pieces
        for index, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            ids = self._without_appended(encoding) if self.appends and not chat else encoding.ids
            divided = self._divide(text, ids, encoding)
            samples.append(None if divided is None else self._sample(text, divided))
            if divided is None:
                whole[index] = ids
        for (index, ids), pieces in zip(whole.items(), self._apart([texts[i] for i in whole]), strict=True):
            together = [token for tokens, _ in pieces for token in tokens]
            samples[index] = self._sample(texts[index], pieces, merged_boundary=together != ids)
        return cast(list[Sample], samples)

    @staticmethod
    def _without_appended(encoding: Encoding) -> list[int]:
        """Ids without the special tokens that the tokenizer itself appended, which have no place in the text."""
        ids = encoding.ids
        while len(ids) > 1 and encoding.token_to_chars(len(ids) - 1) is None:
            ids.pop()
        return ids

    def _divide(self, text: Rendered, ids: list[int], encoding: Encoding) -> list[tuple[list[int], bool]] | None:
        """Pieces of a text tokenized whole, or None if a token spans an edge between them."""

        def end(index: int) -> int:
            span = encoding.token_to_chars(index)
            return span[1] if span else 0  # a special token put in front

        pieces = []
        first = 0
        for number, edge in enumerate(edge for span in text.trained for edge in span):
            last = len(ids)
            if edge < len(text.text):
                # Ends never fall, so the first token that reaches past the edge is found by bisection.
                last = bisect_right(range(len(ids)), edge, lo=first, key=end)
                if last < len(ids) and (encoding.token_to_chars(last) or (edge,))[0] < edge:
                    return None
            pieces.append((ids[first:last], number % 2 == 1))
            first = last
        return [*pieces, (ids[first:], False)]

    def _apart(self, texts: Sequence[Rendered]) -> list[list[tuple[list[int], bool]]]:
        """For each text, the ids of its pieces, each tokenized by itself."""
        divided = [text.pieces() for text in texts]
        for text, pieces in zip(texts, divided, strict=True):
            if not text.chat and (not pieces or pieces[0][1]):
                pieces.insert(0, ("", False))  # where the tokenizer's own special tokens stand
        first = iter(self._ids([pieces[0][0] for pieces in divided], special=False))
        later = iter(self._ids_within([(a[0], b[0]) for pieces in divided for a, b in pairwise(pieces)]))
        apart = [[(next(later if i else first), each[1]) for i, each in enumerate(pieces)] for pieces in divided]
        starts = [index for index, text in enumerate(texts) if not text.chat]
        for index, ids in zip(starts, self._ids([divided[i][0][0] for i in starts], special=True), strict=True):
            # An EOS that the tokenizer appended to the prompt, not the user, would end it before the answer.
            if ids and ids[-1] == self.eos and not divided[index][0][0].endswith(str(self.tokenizer.eos_token)):
                ids = ids[:-1]
            apart[index][0] = (ids, False)
        return apart

    def _ids_within(self, texts: list[tuple[str, str]]) -> list[list[int]]:
        """For each (text before, text), the ids of the text alone, without the space that SentencePiece puts first."""
        alone = self._ids([text for _, text in texts], special=False)
        if self.backend is None or not self.backend.encode("a", add_special_tokens=False).tokens[0].startswith("▁"):
            return alone
        # Behind a token that merges with none, which is then taken away: an added one that is there, or this character.
        added = tuple(self.tokenizer.added_tokens_encoder)
        before = [next((token for token in added if text.endswith(token)), "\0") for text, _ in texts]
        behind = self._ids([token + text for token, (_, text) in zip(before, texts, strict=True)], special=False)
        taken = self._ids(before, special=False)
        return [
            ids[len(token) :] if ids[: len(token)] == token else plain  # some tokenizers drop control characters
            for ids, token, plain in zip(behind, taken, alone, strict=True)
        ]

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"] if texts else []

    def _sample(self, text: Rendered, pieces: list[tuple[list[int], bool]], merged_boundary: bool = False) -> Sample:
        ids: list[int] = []
        labels: list[int] = []
        for tokens, trained in pieces:
            ids += tokens
            labels += tokens if trained else [IGNORE] * len(tokens)
        if not text.chat and (not labels or labels[-1] != self.eos):
            ids.append(self.eos)
            labels.append(self.eos)
        return Sample(ids, labels, merged_boundary)


def _with_whole_spans(backend: Tokenizer) -> Tokenizer:
    """The same tokenizer, with spans that hold a token's spaces: some (Llama 3) trim them, which hides a boundary."""
    from tokenizers import Tokenizer

    text = backend.to_str()
    whole = re.sub(r'("trim_offsets":\s*)true', r"\1false", text)
    return backend if whole == text else Tokenizer.from_str(whole)


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
