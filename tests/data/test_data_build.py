"""Corpora: the same bytes for any number of processes, nothing half-written, nothing damaged accepted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Build
from data_helpers import contents, make_texts
from tokenizers import Tokenizer as Library
from tokenizers import models

from longctx.data.corpus import Corpus, open_corpus
from longctx.data.manifest import read_manifest
from longctx.data.tokenizer import load_tokenizer
from longctx.errors import DataError


def decoded(corpus: Corpus) -> list[str]:
    """Texts of a corpus, each checked to end with the end token and to hold no other."""
    tokenizer = load_tokenizer(corpus.tokenizer_folder)
    texts = []
    for start, stop in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True):
        ids = corpus.tokens(int(start), int(stop)).tolist()
        assert ids.index(tokenizer.eos_id) == len(ids) - 1
        texts.append(tokenizer.decode(ids))
    return texts


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "longctx", "data", *map(str, arguments)]


def execute(line: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def write_large_texts(folder: Path) -> None:
    """Sixty files that take a while to tokenize, so that a build can be killed in the middle."""
    text = "\n".join(make_texts(2000, seed=8))
    folder.mkdir()
    for index in range(60):
        (folder / f"{index:02d}.txt").write_text(f"{index} {text}")


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    """Wait until ``condition`` holds while ``process`` is running."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def test_every_text_lands_in_one_split(build: Build, texts_folder: Path, tmp_path: Path) -> None:
    folder = build([texts_folder], tmp_path / "corpus", holdout=0.3, shard_bytes=700)
    train, valid = (decoded(open_corpus(folder, split)) for split in ("train", "valid"))
    originals = [file.read_bytes().decode() for file in texts_folder.rglob("*.txt")]
    assert sorted(train + valid) == sorted(originals)
    assert not set(train) & set(valid)
    assert 5 < len(valid) < 35
    assert len(open_corpus(folder, "train").shards) > 3


def test_splits_depend_on_the_text_alone(build: Build, texts_folder: Path, tmp_path: Path) -> None:
    """The same document under another name, in another format and in other company stays on its side."""
    folder = build([texts_folder], tmp_path / "a", holdout=0.3)
    texts = decoded(open_corpus(folder, "valid")) + decoded(open_corpus(folder, "train"))
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts[:30] * 2)
    (tmp_path / "b.jsonl").write_text(lines)
    again = build([tmp_path / "b.jsonl"], tmp_path / "b", holdout=0.3, text_field="body")
    held_out = set(decoded(open_corpus(folder, "valid")))
    assert decoded(open_corpus(again, "valid")) == [text for text in texts[:30] * 2 if text in held_out]


def test_formats_give_the_same_corpus(build: Build, tmp_path: Path) -> None:
    texts = make_texts(20, seed=7)
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet", row_group_size=6)
    corpora = [
        open_corpus(build([tmp_path / f"in.{kind}"], tmp_path / kind, holdout=0)) for kind in ("jsonl", "parquet")
    ]
    assert decoded(corpora[0]) == decoded(corpora[1]) == texts


def test_wide_vocabularies_use_four_bytes(build: Build, tmp_path: Path) -> None:
    vocabulary = {f"w{index}": index for index in range(70_000)} | {"</s>": 70_000}
    Library(models.WordLevel(vocabulary, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in.txt").write_text("w69999")
    corpus = open_corpus(build([tmp_path / "in.txt"], tmp_path / "c", tokenizer=tmp_path, holdout=0))
    assert corpus.manifest.dtype == "uint32"
    assert corpus.tokens(0, 2).tolist() == [69_999, 70_000]
    assert corpus.vocab_size == 70_001


def test_manifest_describes_the_shards(
    build: Build, texts_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    (texts_folder / "empty.txt").touch()
    (texts_folder / "latin.txt").write_bytes(b"\xe4")
    folder = build([texts_folder], tmp_path / "corpus", errors="skip")
    manifest = read_manifest(folder)
    assert manifest.counts.model_dump() == {"documents": 62, "undecodable": 1, "empty": 1}
    assert manifest.tokenizer.fingerprint == load_tokenizer(tokenizer_folder).fingerprint
    for shard in manifest.shards["train"]:
        assert (folder / f"{shard.name}.bin").stat().st_size == shard.bytes == 2 * shard.tokens
        offsets = np.fromfile(folder / f"{shard.name}.offsets", "<i8")
        assert (offsets[0], offsets[-1], len(offsets)) == (0, shard.tokens, shard.documents + 1)


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_mpi_processes_writes_the_same_bytes(
    build: Build, texts_folder: Path, tokenizer_folder: Path, tmp_path: Path, mpirun: list[str], processes: int
) -> None:
    alone = build([texts_folder], tmp_path / "alone", shard_bytes=1000, holdout=0.2)
    build_line = command("build", texts_folder, "--tokenizer", tokenizer_folder, "--out", tmp_path / "together")
    done = execute([*mpirun, "-np", str(processes), *build_line, "--shard-size", "1000", "--holdout", "0.2"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fingerprint") == 1
    assert contents(tmp_path / "together") == contents(alone)
    assert len(contents(alone)) > 10


@pytest.mark.parametrize("guilty", [0, 1])
def test_a_failing_mpi_process_ends_all_with_one_sentence(
    texts_folder: Path, tokenizer_folder: Path, tmp_path: Path, mpirun: list[str], guilty: int
) -> None:
    """Units go to the processes in turn, so that the file's place decides who fails."""
    sizes = [file.stat().st_size for file in sorted(texts_folder.rglob("*.txt"))]
    bad = texts_folder / ("part0/000.txt" if guilty == 0 else "part0/003.txt")
    bad.write_bytes(b"\xff" * max(sizes))
    line = command("build", texts_folder, "--tokenizer", tokenizer_folder, "--out", tmp_path / "out", "--shard-size", 1)
    done = execute([*mpirun, "-np", "2", *line])
    assert done.returncode != 0
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert sentences == [
        f"error: {bad} is not UTF-8 at byte 0; convert it to UTF-8, or add --errors skip or --errors replace"
    ]
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_a_killed_mpi_process_ends_the_build(tokenizer_folder: Path, tmp_path: Path, mpirun: list[str]) -> None:
    inputs, out, partial = tmp_path / "in", tmp_path / "out", tmp_path / ".out.partial"
    write_large_texts(inputs)
    line = command("build", inputs, "--tokenizer", tokenizer_folder, "--out", out, "--shard-size", "1000")
    process = subprocess.Popen([*mpirun, "-np", "2", *line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: list(partial.glob("*-00003.bin")), process)
        leader = json.loads((partial / "owner.json").read_text())["pid"]
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        helpers = [int(pid) for pid in ranks if int(pid) != leader]
        assert len(helpers) == 1
        os.kill(helpers[0], signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
        process.wait()
    assert not out.exists()


def test_an_unexpected_error_ends_all_processes(mpirun: list[str]) -> None:
    """The leader waits for a helper that died of a defect: nobody may hang."""
    code = (
        "from longctx.data.processes import open_team\n"
        "with open_team() as team:\n"
        "    if team.rank == 1: raise ZeroDivisionError('planted')\n"
        "    team.start('x'); team.finish(True)\n"
    )
    done = execute([*mpirun, "-np", "2", sys.executable, "-c", code])
    assert done.returncode != 0 and "ZeroDivisionError: planted" in done.stderr


def fake_mpi(folder: Path, content: str) -> str:
    """A folder to put first on PYTHONPATH, whose mpi4py.MPI has this content."""
    (folder / "mpi4py").mkdir(parents=True)
    (folder / "mpi4py" / "__init__.py").touch()
    (folder / "mpi4py" / "MPI.py").write_text(content)
    return os.pathsep.join([str(folder), str(Path(__file__).parents[2])])


@pytest.mark.parametrize(
    "content, why",
    [
        ("raise RuntimeError('cannot load MPI library')", "cannot load MPI library"),
        ("class COMM_WORLD:\n    Get_size = staticmethod(lambda: 1)", "another MPI library"),
    ],
)
def test_without_a_usable_mpi_the_first_process_works_alone(
    build: Build, texts_folder: Path, tokenizer_folder: Path, tmp_path: Path, content: str, why: str
) -> None:
    alone = build([texts_folder], tmp_path / "alone")
    path = fake_mpi(tmp_path / "fake", content)
    line = command("build", texts_folder, "--tokenizer", tokenizer_folder, "--out", tmp_path / "out")
    launched = {"OMPI_COMM_WORLD_SIZE": "2", "PYTHONPATH": path}
    second = execute(line, **launched, OMPI_COMM_WORLD_RANK="1")
    assert (second.returncode, second.stdout) == (0, "")
    assert not (tmp_path / "out").exists()
    first = execute(line, **launched, OMPI_COMM_WORLD_RANK="0")
    assert first.returncode == 0 and why in first.stderr
    assert contents(tmp_path / "out") == contents(alone)


def test_mpi_is_not_touched_outside_mpirun(texts_folder: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    path = fake_mpi(tmp_path / "fake", "import os; os._exit(77)")
    line = command("build", texts_folder, "--tokenizer", tokenizer_folder, "--out", tmp_path / "out")
    assert execute(line, PYTHONPATH=path).returncode == 0


def test_a_killed_build_leaves_nothing_and_can_be_repeated(
    build: Build, tokenizer_folder: Path, tmp_path: Path
) -> None:
    inputs = tmp_path / "in"
    write_large_texts(inputs)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    line = command("build", inputs, "--tokenizer", tokenizer_folder, "--out", out, "--shard-size", "1000")
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: list(partial.glob("*-00001.bin")), process)
        with pytest.raises(DataError, match=f"is being written by process {process.pid} "):
            build([inputs], out)
        assert process.poll() is None, "the build ended before it could be killed: give it more text"
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not out.exists() and partial.exists()
    shutil.rmtree(inputs)
    inputs.mkdir()
    (inputs / "0.txt").write_text("short")
    build([inputs], out, holdout=0)
    assert decoded(open_corpus(out)) == ["short"]
    assert not partial.exists()


def test_building_the_same_again_changes_nothing(build: Build, texts_folder: Path, tmp_path: Path) -> None:
    out = build([texts_folder], tmp_path / "out")
    before = out.stat().st_ino
    build([texts_folder], out)
    assert out.stat().st_ino == before
    for settings in ({"holdout": 0.5}, {"shard_bytes": 999}, {"exclude": ["part1"]}):
        with pytest.raises(DataError, match=r"already holds another result; .* --overwrite"):
            build([texts_folder], out, **settings)
    file = texts_folder / "part0" / "000.txt"
    file.write_bytes(file.read_bytes().replace(b"document", b"DOCUMENT"))
    with pytest.raises(DataError, match="already holds another result"):
        build([texts_folder], out)
    old = contents(out)
    build([texts_folder], out, overwrite=True)
    assert contents(out) != old and len(decoded(open_corpus(out))) > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]


def test_only_a_corpus_is_ever_overwritten(build: Build, texts_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    build([texts_folder], out)  # an empty folder may be used
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"holds other files, such as thesis\.tex"):
        build([texts_folder], out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"
    with pytest.raises(DataError, match="is not a folder"):
        build([texts_folder], out / "thesis.tex", overwrite=True)


@pytest.mark.parametrize("out", ["file/corpus", "/proc/corpus"])
def test_unwritable_output(build: Build, texts_folder: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write output folder .*corpus: "):
        build([texts_folder], tmp_path / out)


def test_a_failure_leaves_the_old_corpus(build: Build, texts_folder: Path, tmp_path: Path) -> None:
    out = build([texts_folder], tmp_path / "out")
    old = contents(out)
    (texts_folder / "zzz.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        build([texts_folder], out, overwrite=True)
    assert contents(out) == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]


def test_nothing_left_to_train_on(build: Build, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": ""}\n{"text"}\n')
    with pytest.raises(DataError, match="of 2 documents 1 cannot be decoded, 1 are empty"):
        build([tmp_path / "in.jsonl"], tmp_path / "out", errors="skip")
    with pytest.raises(DataError, match=r"holdout is 1\.0"):
        build([tmp_path / "in.jsonl"], tmp_path / "out", holdout=1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.fixture
def corpus_folder(build: Build, texts_folder: Path, tmp_path: Path) -> Path:
    return build([texts_folder], tmp_path / "corpus", shard_bytes=1000)


@pytest.mark.parametrize("suffix", [".bin", ".offsets"])
def test_damaged_shards_are_refused_by_name(corpus_folder: Path, suffix: str) -> None:
    file = corpus_folder / f"train-00002{suffix}"
    original = file.read_bytes()

    file.write_bytes(original[:9] + bytes([original[9] ^ 1]) + original[10:])
    with pytest.raises(DataError, match=r"shard train-00002 of .* is altered"):
        open_corpus(corpus_folder)
    file.write_bytes(original[:-1])
    with pytest.raises(DataError, match=f"shard train-00002 of .* is truncated or altered .*{len(original)}"):
        open_corpus(corpus_folder, verify=False)
    file.unlink()
    with pytest.raises(DataError, match=r"shard train-00002 of .* is missing"):
        open_corpus(corpus_folder, verify=False)
    file.write_bytes(original)
    open_corpus(corpus_folder)


def test_ranks_share_the_hashing(corpus_folder: Path) -> None:
    file = corpus_folder / "train-00003.bin"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    names = [shard.name for shard in open_corpus(corpus_folder, verify=False).shards]
    for rank in range(3):
        if names.index("train-00003") % 3 == rank:
            with pytest.raises(DataError, match="train-00003"):
                open_corpus(corpus_folder, verify_part=(rank, 3))
        else:
            open_corpus(corpus_folder, verify_part=(rank, 3))


def test_damaged_manifests_are_refused(corpus_folder: Path) -> None:
    file = corpus_folder / "manifest.json"
    raw = json.loads(file.read_text())

    def refused(message: str, text: str) -> None:
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            open_corpus(corpus_folder)

    refused("version 2, this longctx reads 1", json.dumps(raw | {"version": 2}))
    refused("altered", json.dumps(raw | {"dtype": "uint32"}))
    refused("altered", json.dumps(raw | {"counts": "many"}))
    refused("altered", json.dumps([raw]))
    refused("no JSON", file.read_text()[:50])
    file.unlink()
    with pytest.raises(DataError, match="is no corpus"):
        open_corpus(corpus_folder)


def test_mismatching_tokenizers_are_refused(corpus_folder: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    from longctx.data.train_tokenizer import train_sentencepiece

    other = train_sentencepiece(make_texts(300, seed=9), tmp_path / "other", 350).tokenizer
    with pytest.raises(DataError, match="is not the one corpus"):
        open_corpus(corpus_folder).check_tokenizer(other)
    open_corpus(corpus_folder).check_tokenizer(load_tokenizer(tokenizer_folder))
    shutil.copy(other.path, corpus_folder / "tokenizer" / "tokenizer.model")
    with pytest.raises(DataError, match="is not the one corpus"):
        open_corpus(corpus_folder)
