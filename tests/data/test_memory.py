"""Preparing streams: what the process holds does not grow with the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.real_files import ROOT, TOKENIZER

CODE = """
import resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from harness.data.build import build_jsonl, unwatched
from harness.data.tokens import TokenFile
from harness.spec import Data
tokenizer, folder, *names = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
for name in names:
    data = Data(name="d", source="jsonl", path=name, sequence_length=512, held_out_fraction=0.1, held_out_samples=50)
    made = TokenFile.open(build_jsonl(data, [Path(name)], tokenizer, Path(folder), unwatched).path)
    print(made.metadata["counts"]["tokens_input"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_many_more_rows_take_hardly_more_memory(tmp_path: Path) -> None:
    for name, count in (("few", 3_000), ("many", 40_000)):
        with (tmp_path / name).open("w") as file:
            file.writelines(json.dumps({"prompt": f"What is {n}?", "completion": f"{n} " * 40}) + "\n" for n in range(count))
    command = [sys.executable, "-c", CODE, str(TOKENIZER), str(tmp_path), str(tmp_path / "few"), str(tmp_path / "many")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (few_tokens, few_kib), (many_tokens, many_kib) = ((int(word) for word in line.split()) for line in done.stdout.splitlines())
    assert many_tokens > 10 * few_tokens
    held = 8 * many_tokens  # bytes of ids and labels alone
    assert held > 64 * 2**20
    assert (many_kib - few_kib) * 1024 < held / 2
