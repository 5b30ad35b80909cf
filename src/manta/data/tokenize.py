"""From text to token ids and labels: what is trained and what is masked, exactly at the boundaries, and EOS learned."""

from __future__ import annotations

import hashlib
import re
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from manta import diagnosis, manifest
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

_Pieces = list[tuple[list[int], bool]]  # ids, and whether they are trained
_Cuts = list[int] | None  # how many ids lie before each edge of a text; None if one lies on an edge


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


def import_in_background() -> None:
    """Begin the import that `load_tokenizer` waits for. It takes seconds, in which Ray can start."""
    threading.Thread(target=import_module, args=("transformers.models.auto.tokenization_auto",)).start()


def load_tokenizer(model_id: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub model or local folder. Raises UserError if there is none or it has no EOS token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = diagnosis.unloadable(model_id, error)
        raise UserError(f"The tokenizer of {model_id} cannot be loaded: {reason}.") from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of {model_id} has no EOS token, so a tuned model could never learn to stop. Set eos_token "
            "in its tokenizer_config.json, or choose a model that has one."
        )
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

    Of a fast tokenizer nothing but Rust is kept, so that a task that receives it imports no transformers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.eos = tokenizer.eos_token_id
        self.eos_token = str(tokenizer.eos_token)
        self.added = tuple(tokenizer.added_tokens_encoder)
        # The Rust tokenizer itself: it gives spans one by one, without a list of all of them.
        self.backend: Tokenizer | None = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self.slow = tokenizer if self.backend is None else None
        self.spelling: list[bytes] | None = None
        if self.backend is not None:
            self.backend = _with_whole_spans(self.backend)
            self.backend.no_truncation()  # lengths are `fit`'s affair, and some tokenizers come with a limit
            self.backend.no_padding()
            probe = self.backend.encode("a")
            spans = [probe.token_to_chars(index) for index in range(len(probe.ids))]
            self.appends = spans[-1] is None
            self.put_in_front = probe.ids[: next((i for i, span in enumerate(spans) if span), 0)]
            self.spelling = _spelling(self.backend)

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
        samples: list[Sample | None] = []
        whole: dict[int, list[int]] = {}  # of the texts that must be tokenized in pieces
        tokenize = self._by_spelling if self.spelling else self._by_offsets
        for index, (text, (ids, cuts)) in enumerate(zip(texts, tokenize(self.backend, texts), strict=True)):
            if cuts is None:
                samples.append(None)
                whole[index] = ids
            else:
                edges = pairwise([0, *cuts, len(ids)])
                samples.append(self._sample(text, [(ids[a:b], i % 2 == 1) for i, (a, b) in enumerate(edges)]))
        for (index, ids), pieces in zip(whole.items(), self._apart([texts[i] for i in whole]), strict=True):
            together = [token for tokens, _ in pieces for token in tokens]
            samples[index] = self._sample(texts[index], pieces, merged_boundary=together != ids)
        return cast(list[Sample], samples)

    def _by_offsets(self, backend: Tokenizer, texts: Sequence[Rendered]) -> Iterator[tuple[list[int], _Cuts]]:
        """For each text, tokenized whole, its ids and where its edges cut them."""
        special = not texts[0].chat
        encodings = backend.encode_batch([text.text for text in texts], add_special_tokens=special)
        for text, encoding in zip(texts, encodings, strict=True):
            ids = self._without_appended(encoding) if self.appends and special else encoding.ids
            yield ids, self._cuts(text, len(ids), encoding)

    def _by_spelling(self, backend: Tokenizer, texts: Sequence[Rendered]) -> Iterator[tuple[list[int], _Cuts]]:
        """The same by what the tokens spell, wherever that is the text, since offsets take long to compute."""
        assert self.spelling is not None
        in_front = [] if texts[0].chat else self.put_in_front
        encodings = backend.encode_batch_fast([text.text for text in texts], add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            ids = encoding.ids
            spelt = [self.spelling[token] for token in ids]
            if b"".join(spelt) != text.text.encode():  # composed characters, or spaces that a special token took
                yield from self._by_offsets(backend, [text])
                continue
            starts = list(accumulate(map(len, spelt), initial=0))
            edges = [0, *(edge for span in text.trained for edge in span)]
            in_bytes = list(accumulate(len(text.text[a:b].encode()) for a, b in pairwise(edges)))
            cuts = [bisect_right(starts, edge) - 1 for edge in in_bytes]
            found = all(starts[cut] == edge for cut, edge in zip(cuts, in_bytes, strict=True))
            yield in_front + ids, [len(in_front) + cut for cut in cuts] if found else None

    @staticmethod
    def _without_appended(encoding: Encoding) -> list[int]:
        """Ids without the special tokens that the tokenizer itself appended, which have no place in the text."""
        ids = encoding.ids
        while len(ids) > 1 and encoding.token_to_chars(len(ids) - 1) is None:
            ids.pop()
        return ids

    @staticmethod
    def _cuts(text: Rendered, count: int, encoding: Encoding) -> _Cuts:
        """Where the edges of a text tokenized whole cut its `count` ids, or None if a token spans an edge."""

        def end(index: int) -> int:
            span = encoding.token_to_chars(index)
            return span[1] if span else 0  # a special token put in front

        cuts: list[int] = []
        for edge in (edge for span in text.trained for edge in span):
            cut = count
            if edge < len(text.text):
                # Ends never fall, so the first token that reaches past the edge is found by bisection.
                cut = bisect_right(range(count), edge, lo=cuts[-1] if cuts else 0, key=end)
                if cut < count and (encoding.token_to_chars(cut) or (edge,))[0] < edge:
                    return None
            cuts.append(cut)
        return cuts

    def _apart(self, texts: Sequence[Rendered]) -> list[_Pieces]:
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
            if ids and ids[-1] == self.eos and not divided[index][0][0].endswith(self.eos_token):
                ids = ids[:-1]
            apart[index][0] = (ids, False)
        return apart

    def _ids_within(self, texts: list[tuple[str, str]]) -> list[list[int]]:
        """For each (text before, text), the ids of the text alone, without the space that SentencePiece puts first."""
        alone = self._ids([text for _, text in texts], special=False)
        if self.backend is None or not self.backend.encode("a", add_special_tokens=False).tokens[0].startswith("▁"):
            return alone
        # Behind a token that merges with none, which is then taken away: an added one that is there, or this character.
        before = [next((token for token in self.added if text.endswith(token)), "\0") for text, _ in texts]
        behind = self._ids([token + text for token, (_, text) in zip(before, texts, strict=True)], special=False)
        taken = self._ids(before, special=False)
        return [
            ids[len(token) :] if ids[: len(token)] == token else plain  # some tokenizers drop control characters
            for ids, token, plain in zip(behind, taken, alone, strict=True)
        ]

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        if self.slow is not None:
            return self.slow(texts, add_special_tokens=special, verbose=False)["input_ids"] if texts else []
        assert self.backend is not None
        return [each.ids for each in self.backend.encode_batch_fast(texts, add_special_tokens=special)]

    def _sample(self, text: Rendered, pieces: _Pieces, merged_boundary: bool = False) -> Sample:
        ids: list[int] = []
        labels: list[int] = []
        for tokens, trained in pieces:
            ids += tokens
            labels += tokens if trained else [IGNORE] * len(tokens)
        if not text.chat and (not labels or labels[-1] != self.eos):
            ids.append(self.eos)
            labels.append(self.eos)
        return Sample(ids, labels, merged_boundary)


def _spelling(backend: Tokenizer) -> list[bytes] | None:
    """What each token of a byte-level tokenizer spells, by id; None if its tokens spell no text to the letter."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    spelling = [b""] * (1 + max(vocabulary.values(), default=0))
    for token, index in vocabulary.items():
        known = index not in added and all(character in byte_of for character in token)
        spelling[index] = bytes(byte_of[character] for character in token) if known else token.encode()
    probe = "Ä  b\n"  # not spelt by one that drops accents, case or spaces, or puts a space in front
    ids = backend.encode(probe, add_special_tokens=False).ids
    return spelling if b"".join(spelling[token] for token in ids) == probe.encode() else None


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
