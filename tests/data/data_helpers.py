"""Small texts and comparisons shared by the data tests."""

import random
from pathlib import Path

WORDS = ["alpha", "beta", "gamma", "return", "self", "import", "class", *"xyz012():=äß漢🙂"]


def make_texts(count: int, seed: int, longest: int = 200) -> list[str]:
    """Distinct texts of different lengths with indentation, newlines, tabs and characters beyond ASCII."""
    draw = random.Random(seed)
    texts = []
    for index in range(count):
        lines = [
            draw.choice(["", "    ", "        ", "\t"]) + " ".join(draw.choices(WORDS, k=draw.randint(0, 8)))
            for _ in range(draw.randint(1, max(1, longest // 20)))
        ]
        texts.append(f"document {index}\n" + "\n".join(lines))
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
