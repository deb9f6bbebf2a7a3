"""Taking a tokenizer along with an export so that transformers' AutoTokenizer gives the ids we trained on.

A ``tokenizer.json`` is copied. A SentencePiece model is rebuilt as a ``tokenizer.json`` from its pieces (transformers
would guess Llama's own normaliser and prefix space) and compared with the original on sample texts. Unigram models may
order pieces of equal total score differently (two then three spaces, or three then two); nothing else may differ.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longctx.data.tokenizer import Tokenizer, load_tokenizer
from longctx.errors import DataError

_SPACE_MARK = "\u2581"
_SAMPLES = (
    'def f(x):\n    return x + 1\n\n\nclass A:\n\t"""Doc."""\n        y = \'é ü 中 🙂\'\n',
    " leading,  double   triple     five spaces and a trailing one ",
    "Numbers 0 12 345 6789, e-mail a@b.c, UPPER lower MiXed, --flags=3.14e-10; <x> </y> {z: [1, 2]}\r\n",
    "\n\n    \n\t \x00\x7f ￿ ﬁ ａ",
)


def export_tokenizer(source: Path, folder: Path, sinks: Sequence[int] = ()) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` (and the original SentencePiece model) into ``folder``.

    Args:
        sinks: ids of the model's sink tokens, which the settings name ``<|sink_0|>`` and so on; they must follow those
            of the tokenizer, since transformers leaves no gaps.

    Raises:
        DataError: there is no readable tokenizer, or it cannot be converted without changing ids.
    """
    tokenizer = load_tokenizer(source)
    _check_sinks(tokenizer, sinks)
    for file in tokenizer.files:
        shutil.copy(file, folder / file.name)
    if tokenizer.path.suffix == ".json":
        if sinks or not (folder / "tokenizer_config.json").is_file():
            _write_settings(folder, {**_json_specials(tokenizer), **_named(sinks)})
        return
    pieces = _Pieces(tokenizer.path)
    converted = pieces.convert()
    _check_same(tokenizer, converted, ordered=pieces.is_bpe)
    converted.save(str(folder / "tokenizer.json"))
    _write_settings(folder, {**pieces.specials, **_named(sinks)})


class _Pieces:
    """The vocabulary of a SentencePiece model."""

    def __init__(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.file = file
        self.model: Any = SentencePieceProcessor(model_file=str(file))
        ids = range(self.model.get_piece_size())
        self.texts = [str(self.model.id_to_piece(i)) for i in ids]
        self.scores = [float(self.model.get_score(i)) for i in ids]
        self.control = [i for i in ids if self.model.is_control(i) or self.model.is_unknown(i)]
        special = set(self.control)
        self.learnt = [i for i in ids if i not in special and not self.model.is_byte(i)]
        self.byte_fallback = any(self.model.is_byte(i) for i in ids)

    @property
    def specials(self) -> dict[str, str]:
        """Special tokens by the name transformers gives them."""
        found = {
            "unk_token": self.model.unk_id(),
            "bos_token": self.model.bos_id(),
            "eos_token": self.model.eos_id(),
            "pad_token": self.model.pad_id(),
        }
        return {name: self.texts[i] for name, i in found.items() if i >= 0}

    def convert(self) -> Any:
        """The same tokenizer in the ``tokenizers`` library."""
        from tokenizers import AddedToken, decoders, normalizers
        from tokenizers import Tokenizer as Library

        converted = Library(self._bpe() if self.is_bpe else self._unigram())
        prefix = str(self.model.encode("a", out_type=str)[0]).startswith(_SPACE_MARK)
        steps: list[Any] = [normalizers.Replace(" ", _SPACE_MARK)]
        strip: list[Any] = []
        if prefix:
            steps.insert(0, normalizers.Prepend(_SPACE_MARK))
            strip = [decoders.Strip(content=" ", left=1)]
        converted.normalizer = normalizers.Sequence(steps)
        converted.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        converted.add_tokens([AddedToken(self.texts[i], normalized=False, special=True) for i in self.control])
        return converted

    @property
    def is_bpe(self) -> bool:
        """BPE scores are minus the rank of the merge; unigram scores are log probabilities."""
        return all(self.scores[i].is_integer() for i in self.learnt)

    def _unigram(self) -> Any:
        from tokenizers.models import Unigram

        vocabulary = list(zip(self.texts, self.scores, strict=True))
        return Unigram(vocabulary, unk_id=self.model.unk_id(), byte_fallback=self.byte_fallback)

    def _bpe(self) -> Any:
        from tokenizers.models import BPE

        vocabulary = {text: i for i, text in enumerate(self.texts)}
        return BPE(
            vocab=vocabulary,
            merges=self._merges(),
            unk_token=self.specials.get("unk_token"),
            fuse_unk=True,
            byte_fallback=self.byte_fallback,
        )

    def _merges(self) -> list[tuple[str, str]]:
        """Every way to build a piece out of two pieces, best piece first."""
        known = {self.texts[i]: self.scores[i] for i in self.learnt}
        merges = []
        for text in sorted(known, key=lambda piece: -known[piece]):
            cuts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
            merges += [(left, right) for left, right in cuts if left in known and right in known]
        return merges


def _check_same(tokenizer: Tokenizer, converted: Any, ordered: bool) -> None:
    arrange: Callable[[list[int]], list[int]] = list if ordered else sorted
    for text in _SAMPLES:
        if arrange(converted.encode(text, add_special_tokens=False).ids) != arrange(tokenizer.encode(text)):
            raise DataError(
                f"tokenizer {tokenizer.path} cannot be converted to tokenizer.json without changing ids, for example of"
                f" {text[:20]!r}; export with a tokenizer.json, or with a SentencePiece model that does not normalise"
            )


def _check_sinks(tokenizer: Tokenizer, sinks: Sequence[int]) -> None:
    if sinks and sinks[0] != tokenizer.vocab_size:
        raise DataError(
            f"the sink tokens have the ids {sinks[0]} to {sinks[-1]}, and the {tokenizer.vocab_size} tokens of "
            f"{tokenizer.path} end before; transformers leaves no gaps: train without model.vocab_size to export them"
        )


def _named(sinks: Sequence[int]) -> dict[str, Any]:
    """The setting by which transformers adds special tokens to those of a tokenizer."""
    names = {str(token): f"<|sink_{number}|>" for number, token in enumerate(sinks)}
    known = {token: {"content": name, "special": True, "normalized": False} for token, name in names.items()}
    return {"added_tokens_decoder": known} if sinks else {}


def _json_specials(tokenizer: Tokenizer) -> dict[str, str]:
    from tokenizers import Tokenizer as Library

    library = Library.from_file(str(tokenizer.path))
    found = {"eos_token": tokenizer.eos_id, "bos_token": tokenizer.bos_id}
    return {name: str(library.id_to_token(i)) for name, i in found.items() if i is not None}


def _write_settings(folder: Path, specials: dict[str, Any]) -> None:
    """Keep what is set; name the generic class, as those of models such as Llama's rebuild the tokenizer their way."""
    file = folder / "tokenizer_config.json"
    known = json.loads(file.read_bytes()) if file.is_file() else {}
    if "added_tokens_decoder" in specials:
        known["added_tokens_decoder"] = {**known.get("added_tokens_decoder", {}), **specials["added_tokens_decoder"]}
    settings = {
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        **specials,
        **known,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
