"""Text from token ids, as it comes: whole characters only, stop strings cut off."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from longctx.cache.options import CacheOptions
from longctx.data.tokenizer import Tokenizer
from longctx.errors import ConfigError, DataError
from longctx.generate.batch import generate
from longctx.generate.decode import Decoded, LanguageModel, decode_ids
from longctx.generate.sampling import Sampling
from longctx.generate.speculate import Proposer, speculate_ids

_BROKEN = "\ufffd"
_CONTEXT = 8


def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    cache: CacheOptions | None = None,
    chunk: int | None = None,
    proposer: Proposer | None = None,
    before: Decoded | None = None,
    read: Callable[[Decoded], None] | None = None,
) -> Iterator[str]:
    """Yield the continuation of ``prompt`` in pieces.

    It ends after ``max_tokens`` tokens, at the tokenizer's end token, or before the first of the ``stop`` strings.

    Args:
        cache, chunk, before, read: as for :func:`longctx.generate.decode.decode_ids`.
        proposer: of several tokens per step; the text stays what greedy decoding writes. It takes neither ``before``
            nor ``read``.

    Raises:
        DataError: the prompt is empty.
        ConfigError: a stop string is empty, or a proposer is to speed up sampling.
    """
    ids, stopper, cache = _encoded(tokenizer, prompt), _Stopper(stop), cache or CacheOptions()
    if proposer is None:
        rows = decode_ids(model, [ids], max_tokens, sampling, cache=cache, chunk=chunk, before=before, read=read)
        tokens = (row[0] for row in rows)
    else:
        check_speculation(sampling or Sampling())
        tokens = (token for run in speculate_ids(model, ids, max_tokens, proposer, cache, chunk) for token in run)
    yield from _pieces(tokens, tokenizer, ids, stopper)


def batch_texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    cache: CacheOptions | None = None,
    chunk: int | None = None,
) -> list[str]:
    """The continuations of several prompts, which run together; each ends as that of :func:`stream_text` does.

    Raises:
        DataError: a prompt is empty.
        ConfigError: a stop string is empty.
    """
    ids, stoppers = [_encoded(tokenizer, prompt) for prompt in prompts], [_Stopper(stop) for _ in prompts]
    rows = generate(model, ids, max_tokens, sampling, tokenizer.eos_id, cache, chunk)
    return [
        "".join(_pieces(row, tokenizer, prompt_ids, stopper))
        for row, prompt_ids, stopper in zip(rows, ids, stoppers, strict=True)
    ]


def _encoded(tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = tokenizer.encode(prompt)
    if not ids:
        raise DataError("the prompt is empty; give some text to continue")
    return ids


def _pieces(tokens: Iterable[int], tokenizer: Tokenizer, prompt: Sequence[int], stopper: "_Stopper") -> Iterator[str]:
    """The text of tokens up to an end token or a stop string."""
    words = _Words(tokenizer, prompt)
    for token in tokens:
        if token == tokenizer.eos_id:
            break
        piece = stopper.push(words.push(token))
        if piece:
            yield piece
        if stopper.stopped:
            return
    piece = stopper.push(words.flush()) + stopper.flush()
    if piece:
        yield piece


def check_speculation(sampling: Sampling) -> None:
    """Refuse what a pass over several tokens would not reproduce.

    Raises:
        ConfigError: tokens are drawn.
    """
    if sampling.temperature:
        raise ConfigError(
            f"speculation reproduces greedy decoding, not draws at temperature {sampling.temperature}; use "
            "temperature 0 or no speculation"
        )


class _Words:
    """Turns ids into text. A few earlier ids are decoded along: some tokenizers drop a space at the very start."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._shown = len(self._ids)

    def push(self, token: int) -> str:
        """Text that this token completes; nothing while a character's bytes are still coming."""
        self._ids.append(token)
        text = self._new_text()
        return "" if text.endswith(_BROKEN) else self._show(text)

    def flush(self) -> str:
        """What is left, broken bytes included."""
        return self._show(self._new_text())

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def _show(self, text: str) -> str:
        if text:
            self._ids = self._ids[-_CONTEXT:]
            self._shown = len(self._ids)
        return text


class _Stopper:
    """Passes text on, except what may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        if any(not text for text in stop):
            raise ConfigError("a stop string is empty; leave it out")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that can be shown now."""
        self._held += text
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = self._possible_start()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back; nothing after a stop."""
        return "" if self.stopped else self._held

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(text) - 1 for text in self._stop), default=0)
        sizes = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in sizes if any(text.startswith(self._held[-n:]) for text in self._stop)), 0)
