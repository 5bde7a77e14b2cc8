"""Speed of `tools/preprocess_data.py --kind text`, beside Megatron-LM's tool in the same run.

Both read the same JSONL corpus with the same SentencePiece model and number of workers, in turn, so
that a change of the machine's speed meets both. Printed are medians over the rounds:

  whole process   megabytes of text per second of the command, imports included
  steady state    the same without start-up: ours from planning to the finished dataset, theirs
                  from their own last progress line
  CPU seconds     of the command and its workers; on a busy machine the steadier figure

Without --corpus, prose that lies on the machine (documentation and licence texts of the installed
packages) is repeated up to --megabytes; without --tokenizer-model one is trained on it. The
file is not called `tokenize`, which would hide Python's own module of that name from every script
beside it.

    python benchmarks/tokenize_text.py --megabytes 50 --workers 2 --megatron-lm ../Megatron-LM
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece

REPOSITORY = Path(__file__).parents[1]
DOCUMENT_CHARACTERS = 3000
VOCABULARY = 16_000


@dataclass(frozen=True)
class Speed:
    """One run of one of the tools."""

    whole: float
    """MB/s."""
    steady: float
    """MB/s."""
    cpu_seconds: float


def prose() -> list[str]:
    """Documents of some 3,000 characters, cut at paragraph ends."""
    texts = []
    for name in ("purelib", "stdlib"):
        root = Path(sysconfig.get_paths()[name])
        for pattern in ("*.dist-info/METADATA", "*/*.md", "*/*.rst", "*.txt", "pydoc_data/*.py"):
            texts += [path.read_text(errors="ignore") for path in sorted(root.glob(pattern))]
        for folder in sorted(root.glob("*.dist-info/licenses")):
            texts += [p.read_text(errors="ignore") for p in folder.rglob("*") if p.is_file()]
    documents, current = [], ""
    for paragraph in "\n\n".join(texts).split("\n\n"):
        current += paragraph + "\n\n"
        if len(current) >= DOCUMENT_CHARACTERS:
            documents.append(current)
            current = ""
    return documents


def write_corpus(path: Path, documents: list[str], num_bytes: int) -> None:
    """JSONL of about that size."""
    written = i = 0
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes:
            line = json.dumps({"text": documents[i % len(documents)]}, ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode())
            i += 1


def train_model(path: Path, documents: list[str], kind: str) -> None:
    """A model of that kind; the paper's has a larger vocabulary."""
    lines = (line for document in documents for line in document.splitlines() if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(path.with_suffix("")),
        vocab_size=VOCABULARY,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
    )


def run(command: list[str], environment: dict[str, str]) -> tuple[str, float, float]:
    """(output, wall seconds, CPU seconds with children)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout + done.stderr, seconds, cpu


def speed_of_preprocess(corpus: Path, model: Path, prefix: Path, workers: int) -> Speed:
    """Our tool, once."""
    output, seconds, cpu = run(
        [
            *(sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), "--kind", "text"),
            *("--input", str(corpus), "--tokenizer-model", str(model)),
            *("--output-prefix", str(prefix), "--workers", str(workers)),
        ],
        os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    megabytes = corpus.stat().st_size / 1e6
    steady = float(re.findall(r": text, ([\d.]+) s", output)[-1])
    return Speed(megabytes / seconds, megabytes / steady, cpu)


def speed_of_megatron_lm(
    checkout: Path, corpus: Path, model: Path, prefix: Path, workers: int
) -> Speed:
    """Megatron-LM's tool, once."""
    path = os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])
    output, seconds, cpu = run(
        [
            *(sys.executable, str(checkout / "tools" / "preprocess_data.py")),
            *("--input", str(corpus), "--output-prefix", str(prefix), "--append-eod"),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)),
            *("--workers", str(workers)),
        ],
        os.environ | {"PYTHONPATH": path},
    )
    megabytes = corpus.stat().st_size / 1e6
    rates = re.findall(r"([\d.]+) MB/s", output)
    # Theirs are units of 2^20.
    return Speed(megabytes / seconds, float(rates[-1]) * 1.048576, cpu)


def same_tokens(prefix: Path, other: Path) -> bool:
    """Whether both datasets hold the same tokens: ours are SentencePiece's ids plus one."""
    ids = np.fromfile(f"{prefix}.bin", np.int32)
    raw = np.fromfile(f"{other}_text_document.bin", np.uint16).astype(np.int32)
    # <unk> 0 -> 3 and </s> 2 -> 2; see data/tokenizer.py.
    mapped = np.where(raw >= 3, raw + 1, np.where(raw == 2, 2, 3))
    return np.array_equal(ids, mapped)


def median(speeds: list[Speed], name: str) -> float:
    return statistics.median(vars(speed)[name] for speed in speeds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=50, help="size of the corpus (50)")
    parser.add_argument("--workers", type=int, default=2, help="processes of each tool (2)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tool, in turn (3)")
    parser.add_argument("--corpus", type=Path, help="own JSONL file with a `text` field")
    parser.add_argument("--tokenizer-model", type=Path, help="own SentencePiece model")
    parser.add_argument(
        "--model-type",
        choices=("unigram", "bpe"),
        default="unigram",
        help="kind of model trained when none is given (unigram, as the authors' is)",
    )
    parser.add_argument(
        "--megatron-lm", type=Path, help="a checkout of Megatron-LM to compare with"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tokenize_text_") as name:
        folder = Path(name)
        corpus = args.corpus or folder / "corpus.jsonl"
        model = args.tokenizer_model or folder / "spm.model"
        if not (args.corpus and args.tokenizer_model):
            documents = prose()
            if not args.corpus:
                write_corpus(corpus, documents, int(args.megabytes * 1e6))
            if not args.tokenizer_model:
                train_model(model, documents, args.model_type)
        print(
            f"{corpus.stat().st_size / 1e6:.1f} MB, {args.workers} workers, {os.cpu_count()} cores"
        )
        results: dict[str, list[Speed]] = {"ours": []}
        for _ in range(args.rounds):
            results["ours"].append(
                speed_of_preprocess(corpus, model, folder / "ours", args.workers)
            )
            if args.megatron_lm:
                speed = speed_of_megatron_lm(
                    args.megatron_lm, corpus, model, folder / "theirs", args.workers
                )
                results.setdefault("Megatron-LM", []).append(speed)
        print(f"{'':12}  {'whole process':>14}  {'steady state':>13}  {'CPU':>8}")
        for tool, speeds in results.items():
            whole, steady = (median(speeds, column) for column in ("whole", "steady"))
            cpu = median(speeds, "cpu_seconds")
            print(f"{tool:12}  {whole:9.1f} MB/s  {steady:8.1f} MB/s  {cpu:6.1f} s")
        if args.megatron_lm:
            ratios = [
                median(results["ours"], column) / median(results["Megatron-LM"], column)
                for column in ("whole", "steady", "cpu_seconds")
            ]
            print(f"{'ratio':12}  {ratios[0]:13.2f}x  {ratios[1]:12.2f}x  {ratios[2]:7.2f}x")
            agree = "yes" if same_tokens(folder / "ours", folder / "theirs") else "NO"
            print(f"same tokens: {agree}")


if __name__ == "__main__":
    main()
