"""Decode states of caches that are spread over ranks: written by some ranks, read by as many or by others.

Strategy: a prompt is run on N ranks, saved, and continued there without and with the file between, to the same bits (if
nothing is offloaded); then the file is continued on M ranks, to 1e-10 and with the same tokens kept. Sets of parts that
are not whole, ranks that fail alone and writes that do not end are made by hand.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from test_generate_store import SIZES
from tiny_families import tiny_model
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longctx.cache.compress import Compression, Policy
from longctx.cache.expected import ExpectedAttention
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV
from longctx.cache.representation import RepresentationShift
from longctx.cache.scorers import KeyNorm, SnapKV
from longctx.cache.tiers import TieredPool
from longctx.config.schema import Model
from longctx.errors import DataError, LongctxError, UnsupportedError
from longctx.generate import store, store_files
from longctx.generate.batch import joined
from longctx.generate.decode import Decoded, advance
from longctx.generate.store import load_decoded, save_decoded
from longctx.model.attached import AttachedCausalLM
from longctx.model.block_transformer import build_native
from longctx.runtime.mesh import Group, build_mesh
from longctx.sequence.context import SequenceContext

LENGTH, PROMPT = 75, [37, 12]
REST = [9, 1, 1, 15]

POLICY = Policy(tokens=20, sinks=2, recent=5, every=10)
MOVING = Policy(tokens=20, sinks=2, recent=5, every=10, positions="cache")


class Case(NamedTuple):
    model: Mapping[str, Any] = MappingProxyType({})
    cache: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "softmax": Case(),
    "window": Case({"sliding_window": 21}),
    "mixed": Case({"num_layers": 3, "layers": "[gated_retention, conv, softmax]"}),
    "yoco": Case({"num_layers": 3, "layers": "[softmax, yoco*2]"}),
    "block": Case({"num_layers": 3, "block": {"size": 2, "layers": 1}}),
    "attached": Case(),
    "8 bits": Case(cache={"bits": 8}),
    "4 bits": Case(cache={"bits": 4}),
    "offload": Case(cache={"offload": 6}),
    "queries": Case(cache={"compression": Compression(SnapKV(window=4), POLICY)}),
    "window, compressed": Case({"sliding_window": 30}, {"compression": Compression(KeyNorm(), POLICY)}),
    "worth, offload": Case(cache={"compression": Compression(RepresentationShift("mlp"), POLICY), "offload": 6}),
    "moved": Case(cache={"compression": Compression(ExpectedAttention(), MOVING)}),
    "moved, 8 bits": Case(cache={"compression": Compression(KeyNorm(), MOVING), "bits": 8}),
    "moved, 4 bits": Case(cache={"compression": Compression(KeyNorm(), MOVING), "bits": 4}),
}
FEW = ["softmax", "mixed", "4 bits", "worth, offload", "moved, 8 bits"]


def model_of(name: str, seed: int) -> Any:
    if name == "attached":
        return AttachedCausalLM(tiny_model("llama", seed), Model(hf_config={}, vocab_size=97)).eval().double()
    return build_native(Model.model_validate({**SIZES, **CASES[name].model}), seed=seed).double()


def options_of(name: str) -> CacheOptions:
    ranks = build_mesh(dist.get_world_size(), torch.device("cpu"), 60).sequence if dist.is_initialized() else None
    return CacheOptions(block=4, ranks=ranks, **CASES[name].cache)


def tokens_of(seed: int) -> Tensor:
    return torch.randint(61, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


class Continued(NamedTuple):
    """Hidden states, and by cache and lane the positions on this rank and bits of its keys."""

    hidden: list[Tensor]
    positions: list[list[list[int]]]
    keys: list[list[Tensor]]
    tiered: bool


@torch.no_grad()
def prompt_of(name: str, seed: int) -> tuple[Any, Decoded]:
    model, done = model_of(name, seed), None
    for part in tokens_of(seed)[:, : sum(PROMPT)].split(PROMPT, dim=1):
        _, done = advance(model, part, done, cache=options_of(name))
    assert done is not None
    return model, done


@torch.no_grad()
def continued(model: Any, done: Decoded, name: str, seed: int) -> Continued:
    hidden = []
    for part in tokens_of(seed)[:, sum(PROMPT) :].split(REST, dim=1):
        out, done = advance(model, part, done, cache=options_of(name))
        hidden.append(out)
    caches = [leaf for leaf in tree_leaves(done.state) if isinstance(leaf, RaggedKV)]
    lanes = [[cache.lane(lane) for lane in range(cache.layout.lanes)] for cache in caches]
    positions = [[position_n.tolist() for _, _, position_n in cache] for cache in lanes]
    keys = [[k_nE for k_nE, _, _ in cache] for cache in lanes]
    return Continued(hidden, positions, keys, any(isinstance(cache.pool, TieredPool) for cache in caches))


def saved(names: list[str], seed: int, folder: Path) -> list[tuple[Continued, Continued]]:
    """Continued without the file, and from it on the same ranks."""
    found = []
    for name in names:
        model, done = prompt_of(name, seed)
        save_decoded(done, model, folder / name)
        again = load_decoded(folder / name, model, options_of(name))
        assert torch.equal(again.tokens_BS, done.tokens_BS) and again.context.lengths == done.context.lengths
        found.append((continued(model, done, name, seed), continued(model, again, name, seed)))
    return found


def loaded(names: list[str], seed: int, folder: Path) -> list[Continued]:
    models = {name: model_of(name, seed) for name in names}
    return [
        continued(models[name], load_decoded(folder / name, models[name], options_of(name)), name, seed)
        for name in names
    ]


def on(pool: Pool, ranks: int, function: Any, *arguments: Any) -> list[Any]:
    """On one rank without a world."""
    return [function(*arguments)] if ranks == 1 else pool.run(function, ranks, *arguments)


def whole(ranks: list[Continued]) -> list[list[tuple[list[int], Tensor]]]:
    """Positions and keys of every lane of every cache over all ranks, in order."""
    found = []
    for cache in range(len(ranks[0].positions)):
        lanes = []
        for lane in range(len(ranks[0].positions[cache])):
            positions = torch.tensor([position for own in ranks for position in own.positions[cache][lane]])
            keys = torch.cat([own.keys[cache][lane] for own in ranks])
            lanes.append((positions.sort().values.tolist(), keys[positions.argsort()]))
        found.append(lanes)
    return found


@pytest.mark.parametrize(
    "names, writers, readers",
    [
        (list(CASES), 2, [1]),
        (FEW, 1, [2]),
        pytest.param(list(CASES), 1, [4], marks=pytest.mark.tier2),
        pytest.param(list(CASES), 4, [1, 2], marks=pytest.mark.tier2),
        pytest.param(FEW, 3, [2, 4], marks=pytest.mark.tier2),
    ],
)
def test_a_state_goes_on_on_any_number_of_ranks(
    names: list[str], writers: int, readers: list[int], pool: Pool, seed: int, tmp_path: Path
) -> None:
    first = on(pool, writers, saved, names, seed, tmp_path)
    for number, name in enumerate(names):
        parts = [f"part-{rank + 1:05d}-of-{writers:05d}.safetensors" for rank in range(writers)]
        assert writers == 1 or sorted(file.name for file in (tmp_path / name).iterdir()) == parts
        for wanted, found in (rank[number] for rank in first):
            # What was offloaded lies in other slots, and sums are rounded in another order.
            tolerance = 1e-12 if "offload" in name else 0.0
            torch.testing.assert_close(
                found.hidden, wanted.hidden, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert found.positions == wanted.positions and found.tiered == wanted.tiered == ("offload" in name)
            torch.testing.assert_close(found.keys, wanted.keys, rtol=tolerance, atol=tolerance)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)
    for ranks in readers:
        second = on(pool, ranks, loaded, names, seed, tmp_path)
        for number, name in enumerate(names):
            found, wanted = [rank[number] for rank in second], [rank[number][0] for rank in first]
            for own in found:
                for a, b in zip(own.hidden, wanted[0].hidden, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
                assert all(torch.equal(a, b) for a, b in zip(own.hidden, found[0].hidden, strict=True)), name
            for mine, theirs in zip(whole(found), whole(wanted), strict=True):
                for (position_n, k_nE), (other_n, other_nE) in zip(mine, theirs, strict=True):
                    assert position_n == other_n, name
                    torch.testing.assert_close(k_nE, other_nE, rtol=1e-10, atol=1e-10)
            for rank, own in enumerate(found):
                assert all(lane == sorted(lane) for cache in own.positions for lane in cache), name
                owners = {position // 4 % ranks for cache in own.positions for lane in cache for position in lane}
                assert owners == {rank} and own.tiered == ("offload" in name), name


def bare(seed: int, path: Path) -> list[list[tuple[Tensor, ...]]]:
    """Keys, values and positions of every lane of a rounded cache, as they were loaded."""
    state = load_decoded(path, model_of("8 bits", seed), options_of("softmax")).state
    return [[cache.lane(lane) for lane in range(6)] for cache in state]


def test_tokens_are_dealt_bit_by_bit(pool: Pool, seed: int, tmp_path: Path) -> None:
    """Of a rounded cache not even the rounding is done again, and every token lies where the options say."""
    model, done = prompt_of("8 bits", seed)
    save_decoded(done, model, tmp_path / "one")
    ranks = pool.run(bare, 3, seed, tmp_path / "one")
    for layer, cache in enumerate(done.state):
        for lane in range(6):
            *wanted, position_n = cache.lane(lane)
            for rank, own in enumerate(ranks):
                mine_n = position_n // 4 % 3 == rank
                expected = (*(rows[mine_n] for rows in wanted), position_n[mine_n])
                assert all(map(torch.equal, own[layer][lane], expected))


@torch.no_grad()
def uneven(seed: int, path: Path, save: bool) -> tuple[list[Tensor], tuple[int, ...]]:
    """Hidden states of three rows of other lengths."""
    model, options, tokens = model_of("window", seed), options_of("window"), tokens_of(seed)
    if save:
        parts = [advance(model, tokens[:1, :length], cache=options)[1] for length in (44, 5, 30)]
        done = joined(parts)
        save_decoded(done, model, path)
    else:
        done = load_decoded(path, model, options)
    hidden = []
    for step in range(12):
        out, done = advance(model, tokens[:1, step : step + 1].expand(3, 1), done, cache=options)
        hidden.append(out)
    return hidden, done.context.lengths


@pytest.mark.parametrize("writers, readers", [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_rows_of_unequal_length_are_kept(writers: int, readers: int, pool: Pool, seed: int, tmp_path: Path) -> None:
    """With windows, which end at another position in every row."""
    wanted, lengths = on(pool, writers, uneven, seed, tmp_path / "state", True)[0]
    assert lengths == (56, 17, 42)
    for found, found_lengths in on(pool, readers, uneven, seed, tmp_path / "state", False):
        assert found_lengths == lengths
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    compression = Compression(KeyNorm(), POLICY)
    with pytest.raises(UnsupportedError, match="differ in length, and a compression shares budgets by it; load it wit"):
        load_decoded(tmp_path / "state", model_of("window", seed), CacheOptions(compression=compression))


def saved_alone(seed: int, *paths: Path) -> None:
    model, done = prompt_of("softmax", seed)
    for path in paths:
        save_decoded(done, model, path)


def test_parts_that_are_no_whole_are_refused(pool: Pool, seed: int, tmp_path: Path) -> None:
    pool.run(saved_alone, 2, seed, tmp_path / "good", tmp_path / "other")
    pool.run(saved_alone, 3, seed, tmp_path / "three")
    model, first, second = model_of("softmax", seed), "part-00001-of-00002", "part-00002-of-00002"
    load_decoded(tmp_path / "good", model)

    def spoilt(change: Any) -> str:
        path = tmp_path / "state"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "good", path)
        change(path)
        with pytest.raises(DataError) as failure:
            load_decoded(path, model)
        assert "\n" not in str(failure.value) and str(path) in str(failure.value)
        return str(failure.value)

    def cut(path: Path) -> None:
        file = path / f"{second}.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    other, three = tmp_path / "other", tmp_path / "three"
    for change, said in (
        (lambda path: (path / f"{second}.safetensors").unlink(), f"lacks {second}.safetensors; copy all of it"),
        (lambda path: [file.unlink() for file in path.iterdir()], "holds no decode state"),
        (lambda path: (path / "notes.txt").write_text("mine"), "holds notes.txt, which is no part of it; remove it"),
        (lambda path: shutil.copytree(three, path, dirs_exist_ok=True), "holds parts of 2 and 3 ranks"),
        (lambda path: shutil.copy(other / f"{second}.safetensors", path), "part 2 of the decode state .* another save"),
        (lambda path: shutil.copy(path / f"{first}.safetensors", path / f"{second}.safetensors"), "has part 1 of 2 wh"),
        (cut, "cannot read the decode state"),
    ):  # fmt: skip
        assert re.search(said, spoilt(change))


def failing(seed: int, folder: Path) -> list[str]:
    """What is said on this rank where one alone meets bad input; none waits for the others."""
    model, done = prompt_of("softmax", seed)
    rank, options, said = dist.get_rank(), options_of("softmax"), []

    def told(action: Any) -> None:
        try:
            action()
            said.append("")
        except LongctxError as error:
            said.append(f"{type(error).__name__}: {error}")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    save_decoded(done, model, folder / "a")
    save_decoded(done, model, folder / "b")
    told(lambda: load_decoded(folder / ("a" if rank == 0 else "nowhere"), model, options))
    told(lambda: load_decoded(folder / ("a" if rank == 0 else "b"), model, options))
    kept = store.save_file
    if rank == 1:
        store.save_file = full
    told(lambda: save_decoded(done, model, folder / "a"))
    store.save_file = kept
    told(lambda: save_decoded(done, model, folder / "nowhere" / "a"))
    told(lambda: load_decoded(folder / "a", model, options))
    return said


def test_ranks_fail_together(pool: Pool, seed: int, tmp_path: Path) -> None:
    first, second = pool.run(failing, 2, seed, tmp_path)
    elsewhere = "FailedElsewhere: rank {} stopped the run".format
    assert second[0].startswith("DataError: cannot read the decode state") and first[0] == elsewhere(1)
    assert first[1].startswith("DataError: ranks see different decode states at") and second[1] == elsewhere(0)
    assert "No space left on device" in second[2] and first[2] == elsewhere(1)
    assert first[3].startswith("DataError: cannot write the decode state") and second[3] == elsewhere(0)
    assert first[4] == second[4] == ""  # what was there before is whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


def test_one_form_replaces_the_other_and_nothing_else(pool: Pool, seed: int, tmp_path: Path) -> None:
    path, (model, done) = tmp_path / "state", prompt_of("softmax", seed)
    for ranks in (1, 1, 2, 2, 3, 1):
        left = tmp_path / ".writing-state"  # of a process that was killed
        left.mkdir() if ranks == 2 else left.write_text("half")
        on(pool, ranks, saved_alone, seed, path)
        assert torch.equal(load_decoded(path, model).tokens_BS, done.tokens_BS)
        assert path.is_dir() == (ranks > 1) and sorted(file.name for file in tmp_path.iterdir()) == ["state"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(DataError, match="mine is a folder and no decode state; give another name"):
        save_decoded(done, model, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("when", ["written", "replaced"])
def test_a_write_that_does_not_end_leaves_what_was(
    when: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, (model, done) = tmp_path / "state", prompt_of("softmax", seed)
    save_decoded(done, model, path)
    before = path.read_bytes()

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*((store, "save_file") if when == "written" else (store_files.Path, "replace")), stop)
    with pytest.raises(KeyboardInterrupt):
        save_decoded(done, model, path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["state"]


def test_what_has_no_caches_is_not_loaded_over_ranks(seed: int, tmp_path: Path) -> None:
    model, context = model_of("softmax", seed), SequenceContext.single(2, 9)
    with torch.no_grad():
        state = model(tokens_of(seed)[:, :9], context, state=model.empty_state(2)).state
    save_decoded(Decoded(tokens_of(seed)[:, :9], context, state), model, tmp_path / "state")
    load_decoded(tmp_path / "state", model)
    with pytest.raises(UnsupportedError, match="keys and values outside of caches"):
        load_decoded(tmp_path / "state", model, CacheOptions(ranks=Group(0, (0,))))
