"""Inputs become the same documents however they are stored and cut."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import make_texts
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longctx.data.readers import decode
from longctx.data.sources import Plan, plan_inputs, read_unit
from longctx.errors import DataError


def read_all(plan: Plan, field: str = "text", errors: str = "strict") -> list[str | None]:
    return [decode(document, errors) for unit in plan.units for document in read_unit(unit, field)]


def write_jsonl(file: Path, texts: list[str], end: str = "\n") -> Path:
    file.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + end, encoding="utf-8")
    return file


@settings(deadline=None)
@example(unit_bytes=1, end="\n")  # cuts at, before and after every line's start
@given(unit_bytes=st.one_of(st.integers(1, 40), st.integers(1, 3000)), end=st.sampled_from(["", "\n", "\n\n"]))
def test_jsonl_is_cut_without_losing_a_line(
    tmp_path_factory: pytest.TempPathFactory, unit_bytes: int, end: str
) -> None:
    texts = make_texts(20, seed=1)
    file = write_jsonl(tmp_path_factory.mktemp("j") / "a.jsonl", texts, end)
    assert read_all(plan_inputs([file], unit_bytes=unit_bytes)) == texts


def test_jsonl_may_be_cut_exactly_at_a_line(tmp_path: Path) -> None:
    texts = make_texts(8, seed=1)
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    line_starts = [at + 1 for at, byte in enumerate(file.read_bytes()) if byte == ord("\n")]
    for unit_bytes in [near for start in line_starts for near in (start - 1, start, start + 1)]:
        assert read_all(plan_inputs([file], unit_bytes=unit_bytes)) == texts


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
@pytest.mark.parametrize("unit_bytes, units", [(1, 8), (3000, 4), (10**9, 1)])
def test_parquet_is_cut_by_row_groups(tmp_path: Path, kind: pa.DataType, unit_bytes: int, units: int) -> None:
    texts = make_texts(50, seed=2)
    table = pa.table({"id": list(range(50)), "body": pa.array([text.encode() for text in texts]).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    plan = plan_inputs([tmp_path], unit_bytes=unit_bytes)
    assert read_all(plan, "body") == texts
    # Eight groups of about 1,100 bytes.
    assert len(plan.units) == units


def test_folders_are_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/z.py", "b/a.py", "a.py", "B.py", "c.txt", ".hidden/x.py", "b/.y.py", "test/t.py", "b/test/u.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    assert read_all(plan_inputs([tmp_path], patterns=["*.py"], exclude=["test"])) == [
        "B.py",
        "a.py",
        "b/a.py",
        "b/z.py",
    ]
    assert read_all(plan_inputs([tmp_path], patterns=["b/*.py"], exclude=["*/u.py"])) == ["b/a.py", "b/z.py"]
    assert len(read_all(plan_inputs([tmp_path]))) == 7


def test_many_small_files_share_units(texts_folder: Path) -> None:
    sizes = [file.stat().st_size for file in texts_folder.rglob("*.txt")]
    plan = plan_inputs([texts_folder], unit_bytes=1000)
    assert sum(piece.stop for unit in plan.units for piece in unit) == sum(sizes)
    for unit in plan.units:
        assert len(unit) == 1 or sum(piece.stop for piece in unit) <= 1000
    assert 1 < len(plan.units) < len(sizes)


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"text": "ok"}\n{"text": "b\xff"}\n', "a.jsonl is not UTF-8 at byte 26;.* --errors skip"),
        (b'{"text": "ok"}\n{"text": "\\ud800"}\n', "the line at byte 15 of .*a.jsonl spells half a surrogate"),
        (b'{"text": "ok"}\n{"text"\n', "the line at byte 15 of .*a.jsonl is no JSON"),
        (b'{"text": "ok"}\n{"body": "x"}\n', r"the line at byte 15 .* no text in field 'text' \(it has: body\)"),
        (b'{"text": "ok"}\n[1]\n', r"no text in field 'text' \(it has: list\)"),
        (b'{"text": "ok"}\n' + b"[" * 100_000, "is no JSON"),
    ],
)
def test_bad_jsonl_lines(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    plan = plan_inputs([tmp_path])
    with pytest.raises(DataError, match=message):
        read_all(plan)
    assert read_all(plan, errors="skip") == ["ok", None]


def test_undecodable_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xe4def")
    pq.write_table(pa.table({"text": pa.array([b"fine", b"b\xffd"], pa.binary())}), tmp_path / "b.parquet")
    plan = plan_inputs([tmp_path])
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 at byte 3;"):
        read_all(plan)
    assert read_all(plan, errors="skip") == [None, "fine", None]
    assert read_all(plan, errors="replace") == ["abc\ufffddef", "fine", "b\ufffdd"]
    with pytest.raises(DataError, match=r"row 1 of .*b.parquet is not UTF-8 at byte 1;"):
        read_all(plan_inputs([tmp_path / "b.parquet"]))


def test_unusable_inputs(tmp_path: Path) -> None:
    def refused(message: str, *inputs: Path, **settings: list[str]) -> None:
        with pytest.raises(DataError, match=message):
            read_all(plan_inputs(inputs, **settings))

    refused("does not exist", tmp_path / "nowhere")
    refused("no file is found", tmp_path)
    (tmp_path / "empty.txt").touch()
    refused("all 1 files .* are empty", tmp_path)
    refused(r"no file matches \*.py", tmp_path, patterns=["*.py"])
    (tmp_path / "a.jsonl.gz").write_bytes(b"x")
    refused("compressed", tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    refused("no readable parquet", tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "b.parquet")
    refused(r"no column 'text' \(it has: body, n\)", tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"column 'n' .* as text"):
        read_all(plan_inputs([tmp_path / "b.parquet"]), "n")
