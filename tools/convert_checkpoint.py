#!/usr/bin/env python
"""Checkpoints of other projects -> ours, ours -> folders that stock libraries open."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

RAW = argparse.RawDescriptionHelpFormatter

EPILOG = """\
commands (each has its own --help with an example):
  import-fairseq  the authors' checkpoint_stage1.pt, checkpoint_stage2.pt, checkpoint_final.pt

One process, no GPU. Tensors are read and written one after another. Nothing appears under the
output's name until all of it is written.
"""

IMPORT_FAIRSEQ = """\
The authors' fairseq checkpoint as a checkpoint that training and inference take like their own.

Whether it is a stage 1 (pretrain), stage 2 (align) or final (instruct) file follows from the parts
it holds. Sizes are read from the tensors. The number of attention heads cannot be: the decoder's is
in the file; for the image tower and AlignerNet the released model's are taken if the widths are
the released model's, else give model.vision.num_attention_heads and
model.aligner.num_attention_heads. Every tensor is used once, or is on a list of tensors that may be
left out, or the file is refused.
"""
IMPORT_FAIRSEQ_EPILOG = """\
examples:
  tools/convert_checkpoint.py import-fairseq --input checkpoint_stage1.pt \\
      --tokenizer-model sentencepiece.bpe.model --output runs/released_stage1
  tools/convert_checkpoint.py import-fairseq --input checkpoint_final.pt --output runs/released \\
      --tokenizer-model sentencepiece.bpe.model model.diffusion.path=stable-diffusion-v1-5

Then start the next stage from it with checkpoint.load=runs/released_stage1.
"""


def main() -> int:
    """0 when the output is complete, 2 (message on stderr) when nothing was written."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=RAW)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_import_fairseq(commands)
    given = parser.parse_args()
    try:
        lines = given.run(given)
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint {given.command}: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


def _add_import_fairseq(commands) -> None:
    parser = commands.add_parser(
        "import-fairseq",
        description=IMPORT_FAIRSEQ,
        epilog=IMPORT_FAIRSEQ_EPILOG,
        formatter_class=RAW,
    )
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="checkpoint")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument(
        "--vision",
        type=Path,
        metavar="FILE",
        help="CLIP state dict (ViT-L-14-sd.pt) for image-tower tensors that the checkpoint lacks",
    )
    parser.add_argument(
        "--tokenizer-model", type=Path, metavar="SPM", help="SentencePiece model to record"
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="also rebuild Python objects in the file (options of some fairseq versions); this can "
        "run code that the file's author chose, so only for files from a source you trust",
    )
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out further tensors by name, e.g. 'audio_model.*'; repeatable",
    )
    _add_config(parser)
    parser.set_defaults(run=_import_fairseq)


def _import_fairseq(given: argparse.Namespace) -> list[str]:
    from megatron_kosmosg.conversion.import_fairseq import FairseqImport, import_fairseq

    job = FairseqImport(
        input=given.input,
        output=given.output,
        vision=given.vision,
        config_file=given.config,
        overrides=tuple(given.overrides),
        tokenizer=given.tokenizer_model,
        trust=given.trust_pickle,
        drop=tuple(given.drop),
    )
    imported = import_fairseq(job, progress_bar())
    return [*imported.notes, str(imported.checkpoint)]


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="YAML", help="config whose other settings are stored"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings, as in training"
    )


def progress_bar() -> Callable[[int, int], None]:
    """A callback (bytes done, bytes in all) that shows both, the rate and the remaining time."""
    interval = 0.2 if sys.stderr.isatty() else 30
    bar = tqdm(unit="B", unit_scale=True, mininterval=interval, maxinterval=interval, delay=1)

    def report(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return report


if __name__ == "__main__":
    sys.exit(main())
