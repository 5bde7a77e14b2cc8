"""Checkpoints of other projects -> ours, ours -> folders that stock libraries open.

Long because it is the help page of its commands; the work is in megatron_kosmosg/conversion.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    add_config,
    add_dtype,
    add_overrides,
    add_seed,
    add_stable_diffusion,
    add_tokenizer_model,
    command_parser,
    existing_file,
    file_path,
    first_line,
    number_from_zero,
    run_command,
)
from megatron_kosmosg.terminal_text import printable_lines

if TYPE_CHECKING:
    import torch

    from megatron_kosmosg.progress import Progress

EPILOG = """\
commands (each has its own --help with an example):
  import-fairseq  the authors' checkpoint_stage1.pt, checkpoint_stage2.pt, checkpoint_final.pt
  import-kosmos2  microsoft/kosmos-2-patch14-224 as a start of pretrain
  export-hf       a diffusers folder: images with diffusers, text with transformers
  export-lora     its adapters (lora.rank), for PEFT on the model that they were trained on
  export-mllm     only its language model, a stock Kosmos-2 (also of a pretrain checkpoint)
  import-hf       either of these folders back
  verify          two models of any of these formats on the same random prompts

One process, no GPU. Tensors are read and written one after another. Nothing appears under the
output's name until all of it is written. Exit codes: 0 done; 2 wrong arguments or input, nothing is
written; 3 the models of `verify` differ by more than its tolerance; 130 interrupted.
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
  kosmosg convert import-fairseq --input checkpoint_stage1.pt \\
      --tokenizer-model sentencepiece.bpe.model --output runs/released_stage1
  kosmosg convert import-fairseq --input checkpoint_final.pt --output runs/released \\
      --tokenizer-model sentencepiece.bpe.model model.diffusion.path=stable-diffusion-v1-5

Then start the next stage from it with checkpoint.load=runs/released_stage1.
"""

EXPORT_HF = """\
A diffusers folder of an align or instruct checkpoint, whatever layout it was trained on.

mllm/ is a stock Kosmos2ForConditionalGeneration, aligner/ the one component with code of its own;
U-Net, VAE and scheduler are taken from --stable-diffusion, whose U-Net must read conditions of
AlignerNet's width. AlignerNet N of an align checkpoint is left out. The folder opens with
DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True), with this package's
KosmosGPipeline.from_pretrained(DIR), and its language model alone with
AutoModelForImageTextToText.from_pretrained(DIR, subfolder="mllm").
"""
EXPORT_HF_EPILOG = """\
example:
  kosmosg convert export-hf --input runs/instruct --output kosmos-g --dtype fp16 \\
      --stable-diffusion stable-diffusion-v1-5
"""
EXPORT_LORA = """\
The adapters of a run with lora.rank as a folder for peft.PeftModel.from_pretrained(mllm, FOLDER),
where mllm is the stock Kosmos-2 (export-hf, export-mllm) of the checkpoint that the run started
from. Its AlignerNet is in the export of the run itself, whose mllm/ has the adapters merged.
"""
EXPORT_LORA_EPILOG = """\
example:
  kosmosg convert export-lora --input runs/instruct --output kosmos-g-lora
"""
EXPORT_MLLM = """\
The language model of a checkpoint as a folder for AutoModelForImageTextToText, AutoTokenizer and
AutoImageProcessor: stock Kosmos-2, no code of ours.
"""
EXPORT_MLLM_EPILOG = """\
example:
  kosmosg convert export-mllm --input runs/pretrain --output kosmos-g-mllm
"""
IMPORT_HF = """\
A folder of export-hf as an instruct checkpoint, or one of export-mllm as a pretrain checkpoint.

The same tensors, bit for bit, unless --dtype asks for another one. Sizes are the folder's;
--config and overrides give the other settings that the checkpoint stores.
"""
IMPORT_HF_EPILOG = """\
example:
  kosmosg convert import-hf --input kosmos-g --output runs/from_hf
"""
IMPORT_KOSMOS2 = """\
A start of pretrain from Kosmos-2 in the layout of microsoft/kosmos-2-patch14-224.

Its embedding has 1,030 more rows, for grounding tokens, which are cut off. Refused when one of the
remaining ids means something else in the folder's tokenizer. Kosmos-2 was tuned on grounded data:
a warm start, not the authors' stage 1. Mind the licence of the weights.
"""
IMPORT_KOSMOS2_EPILOG = """\
example:
  kosmosg convert import-kosmos2 --input kosmos-2-patch14-224 --output runs/kosmos2
"""
VERIFY = """\
Runs two models on the same random prompts, with two images, one and none, in float32, and prints
how far hidden states, logits and (where both have an AlignerNet) conditions are apart.

Each of --a and --b is a run or checkpoint, a folder of export-hf or export-mllm, or one of the
authors' files. The exit code is 3 when a difference, as a share of the largest value, exceeds the
tolerance. 16-bit weights on one side only differ by about 1e-3.
"""
VERIFY_EPILOG = """\
example:
  kosmosg convert verify --a runs/instruct --b kosmos-g
"""


class Different(Exception):
    """The two models of `verify` differ by more than the tolerance."""


def build_parser() -> CommandParser:
    """The options of the commands; `work` of what they parse is what to do."""
    parser = command_parser("convert", first_line(__doc__), EPILOG)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_import_fairseq(commands)
    _add_import_kosmos2(commands)
    _add_export_hf(commands)
    _add_export_mllm(commands)
    _add_export_lora(commands)
    _add_import_hf(commands)
    _add_verify(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when all is done, 2 (with a message on stderr) when nothing was written, 3 when
    models differ."""
    args = build_parser().parse_args(arguments)
    return run_command(lambda: _convert(args), writes="--output")


def _convert(args: argparse.Namespace) -> int:
    try:
        lines = args.work(args)
    except Different as error:
        print(printable_lines(error))
        return exit_codes.MISSED
    print(printable_lines("\n".join(lines)))
    return exit_codes.DONE


def _add_import_fairseq(commands) -> None:
    parser = _command(
        commands, "import-fairseq", IMPORT_FAIRSEQ, IMPORT_FAIRSEQ_EPILOG, _import_fairseq
    )
    parser.add_argument(
        "--vision",
        type=existing_file,
        metavar="FILE",
        help="CLIP state dict (ViT-L-14-sd.pt) for image-tower tensors that the checkpoint lacks",
    )
    add_tokenizer_model(parser, "to record; none")
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


def _import_fairseq(args: argparse.Namespace) -> list[str]:
    from megatron_kosmosg.conversion.import_fairseq import FairseqImport, import_fairseq

    job = FairseqImport(
        input=args.input,
        output=args.output,
        vision=args.vision,
        config_file=args.config,
        overrides=tuple(args.overrides),
        tokenizer=args.tokenizer_model,
        trust=args.trust_pickle,
        drop=tuple(args.drop),
    )
    imported = import_fairseq(job, _progress())
    return [*imported.notes, str(imported.checkpoint)]


def _add_import_kosmos2(commands) -> None:
    parser = _command(
        commands, "import-kosmos2", IMPORT_KOSMOS2, IMPORT_KOSMOS2_EPILOG, _import_kosmos2
    )
    add_tokenizer_model(parser, "sentencepiece.bpe.model in the folder")
    _add_dtype(parser, "the folder's")
    _add_config(parser)


def _import_kosmos2(args: argparse.Namespace) -> list[str]:
    from megatron_kosmosg.conversion.import_hf import import_kosmos2

    imported = import_kosmos2(
        args.input,
        args.output,
        _dtype(args),
        args.config,
        args.overrides,
        args.tokenizer_model,
        _progress(),
    )
    return [*imported.notes, str(imported.checkpoint)]


def _add_export_hf(commands) -> None:
    parser = _command(commands, "export-hf", EXPORT_HF, EXPORT_HF_EPILOG, _export_hf)
    add_stable_diffusion(parser, "whose U-Net, VAE and scheduler go along", required=True)
    parser.renamed("--sd", "--stable-diffusion")
    _add_export(parser)


def _export_hf(args: argparse.Namespace) -> list[str]:
    from megatron_kosmosg.conversion.export_hf import export_hf

    notes = export_hf(
        args.input,
        args.stable_diffusion,
        args.output,
        _dtype(args),
        args.tokenizer_model,
        _progress(),
        ema=args.ema,
    )
    return [*notes, str(args.output)]


def _add_export_mllm(commands) -> None:
    _add_export(_command(commands, "export-mllm", EXPORT_MLLM, EXPORT_MLLM_EPILOG, _export_mllm))


def _export_mllm(args: argparse.Namespace) -> list[str]:
    from megatron_kosmosg.conversion.export_hf import export_mllm

    arguments = args.input, args.output, _dtype(args), args.tokenizer_model
    notes = export_mllm(*arguments, _progress(), ema=args.ema)
    return [*notes, str(args.output)]


def _add_export_lora(commands) -> None:
    parser = _command(commands, "export-lora", EXPORT_LORA, EXPORT_LORA_EPILOG, _export_lora)
    _add_dtype(parser, "the checkpoint's")
    _add_ema(parser)


def _export_lora(args: argparse.Namespace) -> list[str]:
    from megatron_kosmosg.conversion.export_lora import export_lora

    notes = export_lora(args.input, args.output, _dtype(args), _progress(), ema=args.ema)
    return [*notes, str(args.output)]


def _add_import_hf(commands) -> None:
    parser = _command(commands, "import-hf", IMPORT_HF, IMPORT_HF_EPILOG, _import_hf)
    _add_dtype(parser, "the folder's")
    _add_config(parser)


def _import_hf(args: argparse.Namespace) -> list[str]:
    from megatron_kosmosg.conversion.import_hf import import_hf

    imported = import_hf(
        args.input, args.output, _dtype(args), args.config, args.overrides, _progress()
    )
    return [*imported.notes, str(imported.checkpoint)]


def _add_verify(commands) -> None:
    parser = commands.add_parser("verify", description=VERIFY, epilog=VERIFY_EPILOG)
    for side in ("--a", "--b"):
        parser.add_argument(side, type=file_path, required=True, metavar="PATH", help="a model")
    parser.add_argument(
        "--tolerance",
        type=number_from_zero,
        default=1e-4,
        metavar="T",
        help="largest relative difference (1e-4)",
    )
    add_seed(parser, "draws the prompts")
    parser.add_argument("--trust-pickle", action="store_true", help="as in import-fairseq")
    _add_config(parser)
    parser.set_defaults(work=_verify)


def _verify(args: argparse.Namespace) -> list[str]:
    from transformers.utils.logging import disable_progress_bar

    from megatron_kosmosg.conversion.verify import verify

    disable_progress_bar()
    found = verify(args.a, args.b, args.seed, args.config, args.overrides, args.trust_pickle)
    lines = [f"{'':10} {'largest':>10} {'difference':>11} {'relative':>9}"]
    for each in found:
        numbers = f"{each.largest_value:10.4g} {each.largest_difference:11.2e}"
        lines.append(f"{each.name:10} {numbers} {each.relative:9.2e}")
    if not all(each.relative <= args.tolerance for each in found):
        lines.append(f"DIFFERENT: more than {args.tolerance:g}")
        raise Different("\n".join(lines))
    return [*lines, f"equal within {args.tolerance:g}"]


def _command(commands, name: str, description: str, epilog: str, work) -> CommandParser:
    parser = commands.add_parser(name, description=description, epilog=epilog)
    parser.add_argument(
        "--input", type=file_path, required=True, metavar="PATH", help="what to convert"
    )
    parser.add_argument(
        "--output", type=file_path, required=True, metavar="FOLDER", help="new folder"
    )
    parser.set_defaults(work=work)
    return parser


def _add_export(parser: CommandParser) -> None:
    add_tokenizer_model(parser, "the one that the checkpoint names")
    _add_dtype(parser, "the checkpoint's")
    _add_ema(parser)


def _add_ema(parser: CommandParser) -> None:
    parser.add_argument(
        "--ema",
        action="store_true",
        help="the averages of the weights (of a run with optimizer.ema_decay) in their place",
    )


def _add_dtype(parser: CommandParser, default: str) -> None:
    add_dtype(parser, "what is written", None, default)


def _dtype(args: argparse.Namespace) -> torch.dtype | None:
    from megatron_kosmosg.parallel.platform import torch_dtype

    return None if args.dtype is None else torch_dtype(args.dtype)


def _add_config(parser: CommandParser) -> None:
    add_config(parser, "its other settings are stored")
    add_overrides(parser, "settings, as in training")


def _progress() -> Progress:
    """Bytes of one component after another; a small one is over before there is much to show."""
    from megatron_kosmosg.progress import Progress

    return Progress("", "B", delay=1.0)


if __name__ == "__main__":
    sys.exit(main())
