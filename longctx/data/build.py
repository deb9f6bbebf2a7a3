"""Building a corpus folder from text: the same bytes for any number of processes."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from longctx.data.corpus import open_corpus
from longctx.data.folders import absolute, new_folder
from longctx.data.manifest import (
    CONTENT,
    MANIFEST,
    SPLITS,
    TOKENIZER_FOLDER,
    Counts,
    Manifest,
    Recipe,
    Shard,
    Split,
    TokenizerRecord,
    canonical_digest,
    read_manifest,
)
from longctx.data.processes import Team
from longctx.data.progress import Progress
from longctx.data.shards import InputDigest, Options, Stopped, UnitResult, token_dtype, write_unit
from longctx.data.sources import Plan, plan_inputs, read_unit
from longctx.data.tokenizer import Tokenizer, load_tokenizer
from longctx.errors import DataError


@dataclass(frozen=True)
class Request:
    """What to build: input files and folders, the tokenizer (file or folder) and the folder to write."""

    inputs: Sequence[str | Path]
    tokenizer: str | Path
    out: str | Path
    options: Options = field(default_factory=Options)
    patterns: Sequence[str] = ()
    exclude: Sequence[str] = ()
    shard_bytes: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Built:
    """A corpus folder's manifest; ``fresh`` is false when an identical corpus was there already."""

    manifest: Manifest
    fresh: bool


class _Job(BaseModel):
    """What the leader tells the helpers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: Plan
    folder: str


class _Report(BaseModel):
    """What a helper tells the leader: a finished unit or why it failed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    result: UnitResult | None = None
    error: str | None = None


def build_corpus(request: Request, team: Team) -> Built | None:
    """Build a corpus together with the other processes of ``team``; all call this with the same request.

    The leader returns what was built, the helpers None. Nothing appears at ``request.out`` before the corpus is
    complete. Raises :class:`DataError` in the leader when any process fails; helpers then raise :class:`Stopped`.
    """
    if team.rank:
        _help(request, team)
        return None
    try:
        built = _lead(request, team)
    except BaseException:
        team.finish(success=False)
        raise
    team.finish(success=True)
    return built


def _lead(request: Request, team: Team) -> Built:
    if not 0 <= request.options.holdout < 1:
        raise DataError(f"--holdout is {request.options.holdout}; give a share of at least 0 and below 1")
    tokenizer = load_tokenizer(request.tokenizer)
    plan = plan_inputs(
        request.inputs, patterns=request.patterns, exclude=request.exclude, unit_bytes=request.shard_bytes
    )
    present = _identical_build(request, plan, tokenizer)
    if present is not None:
        return Built(present, fresh=False)
    target = absolute(Path(request.out))
    with new_folder(target, overwrite=request.overwrite, content=CONTENT) as partial:
        team.start(_Job(plan=plan, folder=str(partial)).model_dump_json())
        try:
            results = _work_and_collect(request, plan, tokenizer, partial, team)
        except BaseException:
            team.finish(success=False)  # before the folder goes, nobody may still be writing there
            raise
        manifest = _make_manifest(request, plan, tokenizer, results)
        _copy_tokenizer(tokenizer, partial / TOKENIZER_FOLDER)
        manifest.write(partial)
    return Built(manifest, fresh=True)


def _work_and_collect(request: Request, plan: Plan, tokenizer: Tokenizer, folder: Path, team: Team) -> list[UnitResult]:
    """Do the leader's units and gather everybody's results, in the order of the plan."""
    results: dict[int, UnitResult] = {}
    tokens = 0

    def receive(written: int) -> None:
        for text in team.collect():
            report = _Report.model_validate_json(text)
            if report.result is None:
                raise DataError(report.error or "a helper failed")
            keep(report.result)
        progress.advance(0, _note(tokens + written))

    def keep(result: UnitResult) -> None:
        nonlocal tokens
        results[result.index] = result
        tokens += sum(shard.tokens for shard in result.shards.values())
        progress.advance(1, _note(tokens))

    with Progress("building shards", len(plan.units)) as progress:
        for index in range(0, len(plan.units), team.size):
            keep(write_unit(folder, index, plan.units[index], tokenizer, request.options, receive))
        while len(results) < len(plan.units):
            receive(0)
            team.pause()
    return [results[index] for index in range(len(plan.units))]


def _help(request: Request, team: Team) -> None:
    """Do a helper's units, reporting each. Raises :class:`Stopped` if the build fails anywhere."""
    text = team.wait_for_start()
    if text:
        try:
            _work(request, _Job.model_validate_json(text), team)
        except DataError as error:
            team.report(_Report(error=str(error)).model_dump_json())
        except Stopped:
            pass
        success = team.wait_for_verdict()
    if not text or not success:
        raise Stopped


def _work(request: Request, job: _Job, team: Team) -> None:
    def check(written: int) -> None:
        if team.stopped():
            raise Stopped

    tokenizer = load_tokenizer(request.tokenizer)
    units = job.plan.units
    for index in range(team.rank, len(units), team.size):
        result = write_unit(Path(job.folder), index, units[index], tokenizer, request.options, check)
        team.report(_Report(result=result).model_dump_json())


def _identical_build(request: Request, plan: Plan, tokenizer: Tokenizer) -> Manifest | None:
    """Manifest of the corpus at ``request.out`` if building again would give the same one, else None."""
    folder = absolute(Path(request.out))
    if request.overwrite or not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    same = manifest.recipe.model_copy(update={"inputs": ""}) == _recipe(request, plan, "")
    if not same or manifest.tokenizer != _tokenizer_record(tokenizer):
        return None
    if manifest.recipe.inputs != _digest_inputs(request, plan):
        return None
    for split in SPLITS:
        open_corpus(folder, split, verify=False)
    return manifest


def _digest_inputs(request: Request, plan: Plan) -> str:
    digests = []
    for unit in plan.units:
        digest = InputDigest()
        for document in read_unit(unit, request.options.text_field):
            digest.add(document.content)
        digests.append(digest.hex())
    return canonical_digest(digests)


def _make_manifest(request: Request, plan: Plan, tokenizer: Tokenizer, results: Sequence[UnitResult]) -> Manifest:
    shards: dict[Split, list[Shard]] = {
        split: [result.shards[split] for result in results if split in result.shards] for split in SPLITS
    }
    counts = Counts(
        documents=sum(result.counts.documents for result in results),
        undecodable=sum(result.counts.undecodable for result in results),
        empty=sum(result.counts.empty for result in results),
    )
    if not shards["train"]:
        raise DataError(
            f"no document is left to train on: of {counts.documents} documents {counts.undecodable} cannot be decoded, "
            f"{counts.empty} are empty and the others are held out; give more text or lower --holdout"
        )
    return Manifest(
        dtype=token_dtype(tokenizer.vocab_size),
        tokenizer=_tokenizer_record(tokenizer),
        recipe=_recipe(request, plan, canonical_digest([result.digest for result in results])),
        counts=counts,
        shards=shards,
    ).sealed()


def _recipe(request: Request, plan: Plan, inputs: str) -> Recipe:
    options = request.options
    return Recipe(
        text_field=options.text_field,
        errors=options.errors,
        holdout=options.holdout,
        shard_bytes=plan.unit_bytes,
        inputs=inputs,
    )


def _tokenizer_record(tokenizer: Tokenizer) -> TokenizerRecord:
    return TokenizerRecord(
        file="tokenizer.json" if tokenizer.path.suffix == ".json" else "tokenizer.model",
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )


def _copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir()
    shutil.copyfile(tokenizer.path, folder / _tokenizer_record(tokenizer).file)
    for file in tokenizer.files[1:]:
        shutil.copyfile(file, folder / file.name)


def _note(tokens: int) -> str:
    return f"{tokens / 1e6:.1f}M tokens"
