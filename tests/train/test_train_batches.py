"""Which rows and tokens each rank reads, and the hash that proves it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from training import RandomRows

from longctx.runtime.mesh import Group, Mesh
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS, Documents, Run
from longctx.train.batches import MicroBatch, read_micro_batches, step_rows


def mesh(rank: int, world: int, degree: int) -> Mesh:
    """The place of one rank, without communication."""
    data, sequence = divmod(rank, degree)
    ranks = range(world)
    columns = tuple(r for r in ranks if r % degree == sequence)
    rows = tuple(r for r in ranks if r // degree == data)
    return Mesh(Group(rank, tuple(ranks)), Group(data, columns), Group(sequence, rows), torch.device("cpu"))


def contexts(place: Mesh, layout: str, length: int) -> Callable[[Documents], SequenceContext]:
    """What a trainer would tell its layers about rows with some documents."""
    return lambda documents: SequenceContext(
        place.sequence, LAYOUTS[layout](length, place.sequence.size, documents), documents
    )


@dataclass
class Watched:
    """Rows that note what is read."""

    rows: RandomRows
    read_runs: list[tuple[int, Sequence[Run]]] = field(default_factory=list)

    def documents(self, row: int) -> tuple[int, ...]:
        return self.rows.documents(row)

    def read(self, row: int, runs: Sequence[Run]) -> Any:
        self.read_runs.append((row, runs))
        return self.rows.read(row, runs)


def read_all(length: int, world: int, degree: int, layout: str, batch: int, micro: int, seed: int) -> Any:
    found: list[tuple[Mesh, list[MicroBatch], Watched]] = []
    for rank in range(world):
        place = mesh(rank, world, degree)
        watched = Watched(RandomRows(length, 61, seed))
        rows = step_rows(3, batch, place)
        context_of = contexts(place, layout, length)
        found.append((place, read_micro_batches(watched, rows, micro, context_of), watched))
    return found


@pytest.mark.parametrize("world, degree, batch", [(1, 1, 6), (4, 2, 6), (6, 2, 6), (6, 6, 5), (3, 1, 9)])
def test_data_ranks_share_the_rows_of_a_step(world: int, degree: int, batch: int) -> None:
    for step in (0, 1, 7):
        rows = [list(step_rows(step, batch, mesh(rank, world, degree))) for rank in range(world)]
        for rank in range(world):
            assert rows[rank] == rows[rank - rank % degree], "ranks of one sequence read the same rows"
        together = [row for share in rows[::degree] for row in share]
        assert together == list(range(step * batch, (step + 1) * batch))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize(
    "length, world, degree", [(37, 1, 1), (37, 2, 2), (37, 6, 3), (5, 4, 4), (2, 3, 3), (64, 4, 1)]
)
def test_hashes_labels_and_tokens_do_not_depend_on_the_split(layout: str, length: int, world: int, degree: int) -> None:
    wanted = read_all(length, 1, 1, layout, 12, 1, seed=4)[0][1]
    found = read_all(length, world, degree, layout, 12, 1, seed=4)
    for quantity in ("data_hash", "labels"):
        total = sum(getattr(batch, quantity) for _, batches, _ in found for batch in batches)
        assert total == sum(getattr(batch, quantity) for batch in wanted), quantity
    tokens = torch.cat([batch.tokens_BT.flatten() for _, batches, _ in found for batch in batches])
    assert torch.equal(tokens.sort().values, torch.cat([b.tokens_BT.flatten() for b in wanted]).sort().values)


def test_a_rank_reads_only_its_own_runs() -> None:
    layout = LAYOUTS["zigzag"](37, 3)
    for place, _, watched in read_all(37, 6, 3, "zigzag", 4, 2, seed=1):
        assert [row for row, _ in watched.read_runs] == list(step_rows(3, 4, place))
        assert all(runs == layout.runs[place.sequence.rank] for _, runs in watched.read_runs)


def test_each_micro_batch_is_cut_by_its_own_documents() -> None:
    """All ranks of a sequence, and no others, must come to the same layout of the same rows."""
    found = read_all(2048, 4, 2, "balanced", 6, 1, seed=6)
    layouts = [[batch.context.layout for batch in batches] for _, batches, _ in found]
    assert layouts[0] == layouts[1] != layouts[2] == layouts[3]
    assert len(set(layouts[0])) > 1
    for _, batches, watched in found:
        for batch, (row, runs) in zip(batches, watched.read_runs, strict=True):
            context = batch.context
            assert context.documents == (watched.documents(row),)
            assert context.layout == LAYOUTS["balanced"](2048, 2, context.documents)
            assert runs == context.layout.runs[context.rank]


def test_micro_batches_hold_their_rows_and_documents() -> None:
    rows = RandomRows(37, 61, 2)
    ((_, batches, _),) = read_all(37, 1, 1, "contiguous", 6, 2, seed=2)
    assert [batch.tokens_BT.shape for batch in batches] == [(2, 37)] * 3
    for index, batch in enumerate(batches):
        for at in range(2):
            row = 18 + 2 * index + at
            tokens, labels = rows.whole(row)
            assert np.array_equal(batch.tokens_BT[at], tokens) and np.array_equal(batch.labels_BT[at], labels)
            assert batch.context.documents[at] == rows.documents(row)
        assert batch.labels == int((batch.labels_BT != -100).sum())


def test_the_hash_notices_one_token_a_swap_and_another_row() -> None:
    @dataclass(frozen=True)
    class Fixed:
        tokens: tuple[int, ...]

        def documents(self, row: int) -> tuple[int, ...]:
            return (0,)

        def read(self, row: int, runs: Any) -> Any:
            return np.array(self.tokens), np.array(self.tokens)

    def digest(tokens: tuple[int, ...], row: int = 0) -> int:
        context_of = contexts(mesh(0, 1, 1), "contiguous", len(tokens))
        (batch,) = read_micro_batches(Fixed(tokens), range(row, row + 1), 1, context_of)
        return batch.data_hash

    digests = [digest((1, 2, 3)), digest((1, 2, 4)), digest((2, 1, 3)), digest((1, 2, 3), row=1), digest((1, 2, 3, 0))]
    assert len(set(digests)) == len(digests)
    assert digest((1, 2, 3)) == digests[0]
    assert min(digests) >= 0 and max(digests) < 2**34, "sums of 32-bit numbers, exact in JSON for any step"
