"""What a checked config amounts to: parameters, tokens, ranks. Plain arithmetic, no torch."""

from dataclasses import dataclass

from longctx.config.check import read_manifest_json, split_tokens
from longctx.config.schema import Config, Model
from longctx.errors import ConfigError


@dataclass(frozen=True)
class Summary:
    """Sizes of a run.

    ``parameters`` is None while the vocabulary is unknown (no corpus built yet) and for what is no decoder of softmax
    layers alone; ``corpus_tokens`` counts the training tokens of all sources once, None if one cannot be read.
    ``accumulation`` is micro-batches per step.
    """

    parameters: int | None
    world: int
    data_ranks: int
    accumulation: int
    tokens_per_step: int
    total_tokens: int
    corpus_tokens: int | None


def summarize(config: Config, model: Model, world: int | None = None) -> Summary:
    """Sizes of a config without problems; without ``world``, of its smallest world: one sequence at a time.

    Args:
        model: the model that will be trained, which is ``config.model`` unless that names a Hugging Face folder.
    """
    ranks = world or config.sequence.degree
    data_ranks = ranks // config.sequence.degree
    vocab = model.vocab_size or _corpus_vocab(config)
    tokens = config.train.batch * config.sequence.length
    return Summary(
        parameters=count_parameters(model, vocab) if vocab and _is_plain(model) else None,
        world=ranks,
        data_ranks=data_ranks,
        accumulation=config.train.batch // (data_ranks * config.train.micro_batch),
        tokens_per_step=tokens,
        total_tokens=tokens * config.train.steps,
        corpus_tokens=_corpus_tokens(config),
    )


def _is_plain(model: Model) -> bool:
    others = (model.hf_config, model.recurrence, model.block, model.proposals)
    return all(other is None for other in others) and set(model.mixers) == {"softmax"}


def count_parameters(model: Model, vocab_size: int) -> int:
    """Trainable numbers of a decoder, tied embeddings counted once."""
    width, heads, kv, head = model.hidden_size, model.num_heads, model.kv_heads, model.head_size
    attention = 2 * width * heads * head + 2 * width * kv * head
    attention += model.qkv_bias * (heads + 2 * kv) * head + model.o_bias * width + model.qk_norm * 2 * head
    attention += model.kv_bias * 2 * kv * head
    mlp = 3 * width * model.ffn_size + model.mlp_bias * (2 * model.ffn_size + width)
    layer = attention + mlp + 2 * width
    return model.num_layers * layer + width + vocab_size * width * (1 if model.tie_embeddings else 2)


def _corpus_vocab(config: Config) -> int | None:
    try:
        words = int(read_manifest_json(config.data.sources[0].path)["tokenizer"]["vocab_size"])
        return words + config.model.sink_tokens
    except ConfigError:
        return None


def _corpus_tokens(config: Config) -> int | None:
    try:
        return sum(split_tokens(read_manifest_json(source.path), "train") for source in config.data.sources)
    except ConfigError:
        return None
