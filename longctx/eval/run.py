"""``longctx eval``: open a model and its held-out text, run the tasks, leave one JSON file per task."""

import json
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longctx.config.load import load_config
from longctx.config.schema import Config, Model, Runtime, Sequence, Source
from longctx.data.corpus import Corpus, open_corpus
from longctx.data.progress import Progress
from longctx.data.rows import Rows
from longctx.data.tokenizer import Tokenizer
from longctx.errors import LongctxError
from longctx.eval.needle import NeedleTask, needle_retrieval
from longctx.eval.perplexity import by_position, context_gain
from longctx.eval.results import prepare_folder, write_result
from longctx.eval.unigram import unigram
from longctx.generate.decode import LanguageModel
from longctx.runtime.agreement import agree
from longctx.runtime.launcher import read_launch
from longctx.runtime.mesh import Mesh, alone
from longctx.runtime.process import joined_world

TASKS = ("perplexity", "needle", "unigram")
_DEFAULT_LENGTH = 4096
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where in the text needles are hidden."""
_WINDOWS = 8
"""Documents in the gain-from-context curve."""


@dataclass(frozen=True)
class Request:
    """What to evaluate. None stands for what the model's own run says; see ``longctx eval --help``.

    Args:
        length: tokens per scored row.
        lengths: context lengths of needle retrieval; default: all of ``length``, and of half and a quarter
            what is long enough to hold the question.
        rows: held-out rows scored, at most those there are.
        samples: needle samples per length and depth.
    """

    model: Path
    corpus: Path | None = None
    tasks: tuple[str, ...] = TASKS
    length: int | None = None
    lengths: tuple[int, ...] | None = None
    rows: int = 16
    samples: int = 4
    seed: int = 0
    out: Path | None = None


@dataclass(frozen=True)
class _Subject:
    """A model, opened, with the text it is judged on."""

    model: LanguageModel
    tokenizer: Tokenizer
    train: Corpus
    valid: Corpus
    length: int
    out: Path


def evaluate(request: Request) -> list[Path]:
    """Run the tasks on as many processes as a launcher started; all ranks of the world share one sequence.

    Returns the written files (empty on all ranks but the first).

    Raises:
        LongctxError: unknown task, no corpus, a tokenizer that is not the corpus's, an unusable model or folder;
            :class:`FailedElsewhere` on all ranks but the one that says so.
    """
    with _world() as mesh:
        subject = agree(mesh, lambda: _open(request, mesh))
        agree(mesh, lambda: prepare_folder(subject.out) if mesh.is_first else None)
        written = [_run(task, request, subject, mesh) for task in request.tasks]
    return written if mesh.is_first else []


def _run(task: str, request: Request, subject: _Subject, mesh: Mesh) -> Path:
    """Run one task on all ranks, let the first write the result, and return its path."""
    result = {
        "task": task, "model": str(request.model), "corpus": str(subject.valid.folder), "seed": request.seed,
        "world": mesh.world.size, **_RUNNERS[task](request, subject, mesh),
    }  # fmt: skip
    return agree(mesh, lambda: write_result(subject.out, result) if mesh.is_first else subject.out)


def find_run(model: Path) -> Path | None:
    """The run folder that ``model`` (a run, one of its checkpoints or its export) belongs to, or None."""
    folders = (model, *model.resolve().parents[:2])
    return next((folder for folder in folders if (folder / "config.yaml").is_file()), None)


def _corpus_of(config: Config | None, model: Path) -> Path:
    if config is None:
        raise LongctxError(f"{model} does not belong to a run that names a corpus; give one with --corpus")
    return config.data.sources[0].path


@contextmanager
def _world() -> Iterator[Mesh]:
    """The mesh of all processes that were started together; one process alone needs no process group."""
    world = read_launch().world
    if world == 1:
        yield alone("cuda" if torch.cuda.is_available() else "cpu")
        return
    with joined_world(Runtime(), Sequence(length=world, degree=world)) as mesh:
        yield mesh


def _open(request: Request, mesh: Mesh) -> _Subject:
    from longctx.checkpoint.folder import open_model

    unknown = [task for task in request.tasks if task not in TASKS]
    if unknown or not request.tasks:
        raise LongctxError(f"unknown task {', '.join(unknown) or '(none)'}; choose from {', '.join(TASKS)}")
    run = find_run(request.model)
    config = load_config(run / "config.yaml") if run else None
    corpus = request.corpus or _corpus_of(config, request.model)
    # Cheap checks first: a wrong corpus should not cost the loading of a model.
    part = (mesh.world.rank, mesh.world.size)
    valid = open_corpus(corpus, split="valid", verify_part=part)
    train = open_corpus(corpus, split="train", verify=False)
    model, shape, tokenizer = open_model(request.model, device=str(mesh.device))
    valid.check_tokenizer(tokenizer)
    length = request.length or _length_of(config, shape)
    return _Subject(model, tokenizer, train, valid, length, request.out or (run or request.model) / "eval")


def _length_of(config: Config | None, shape: Model) -> int:
    if config is not None:
        return config.sequence.length
    return shape.max_position_embeddings or _DEFAULT_LENGTH


def _perplexity(request: Request, subject: _Subject, mesh: Mesh) -> Mapping[str, Any]:
    sources = [(subject.valid, Source(path=subject.valid.folder))]
    rows = agree(
        mesh, lambda: Rows(sources, subject.length, request.seed, shuffle=False, sinks=subject.model.config.sink_ids)
    )
    num_rows = min(request.rows, rows.num_rows_per_epoch)
    with Progress("perplexity", num_rows + _WINDOWS, visible=mesh.is_first) as progress:
        scores = by_position(
            subject.model, rows, num_rows, mesh, subject.tokenizer.decode, advance=lambda: progress.advance(1)
        )
        gain = context_gain(
            subject.model, subject.valid, subject.length, _WINDOWS, request.seed, mesh,
            advance=lambda: progress.advance(1),
        )  # fmt: skip
    return {"length": subject.length, "rows": num_rows, **scores, "gain": gain}


def _needle(request: Request, subject: _Subject, mesh: Mesh) -> Mapping[str, Any]:
    task = agree(mesh, lambda: NeedleTask(subject.tokenizer, subject.valid, request.seed))
    lengths = request.lengths
    if lengths is None:
        shorter = [subject.length // part for part in (4, 2)]
        lengths = (*(n for n in shorter if task.fits(n, _DEPTHS, request.samples)), subject.length)
    total = -(-len(lengths) * len(_DEPTHS) * request.samples // mesh.world.size)
    with Progress("needle", total, visible=mesh.is_first) as progress:
        return needle_retrieval(
            subject.model, task, subject.tokenizer, lengths, _DEPTHS, request.samples, mesh,
            advance=lambda: progress.advance(1),
        )  # fmt: skip


def _unigram(request: Request, subject: _Subject, mesh: Mesh) -> Mapping[str, Any]:
    return agree(mesh, lambda: unigram(subject.train, subject.valid) if mesh.is_first else {})


_RUNNERS = {"perplexity": _perplexity, "needle": _needle, "unigram": _unigram}


def read_results(paths: Seq[Path]) -> dict[str, Any]:
    """Results by task, as :func:`evaluate` wrote them."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
