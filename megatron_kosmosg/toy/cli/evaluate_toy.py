"""Judges toy runs on held-out prompts: a table (metrics.json), pictures and their list."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_kosmosg.checkpoint.folder import CONFIG_FILE, find_checkpoint
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import load_saved_config
from megatron_kosmosg.files import write_json
from megatron_kosmosg.inference.trained_model import TrainedModel, one_process
from megatron_kosmosg.models.diffusion import load_diffusion
from megatron_kosmosg.toy.judging.toy_drawing import Sampling
from megatron_kosmosg.toy.judging.toy_results import Results, ToyResults
from megatron_kosmosg.toy.judging.toy_text_encoder import TextEncoderModel
from megatron_kosmosg.toy.judging.toy_words import word_rows


def parse() -> argparse.Namespace:
    """The command line; runs are still NAME=FOLDER."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: tools/evaluate_toy.py --run pretrain=runs/q/pretrain "
        "--run align=runs/q/align --run instruct=runs/q/instruct --output runs/q/evaluation",
    )
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        metavar="NAME=FOLDER",
        help="pretrain, align, instruct, or any other name for a further variant of instruct",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--count", type=int, default=64, help="held-out prompts per cell")
    parser.add_argument("--seed", type=int, default=0, help="draws prompts and start noise")
    parser.add_argument("--steps", type=int, default=8, help="sampling steps")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale")
    parser.add_argument("--fast", action="store_true", help="8 prompts a cell, no thresholds")
    return parser.parse_args()


def evaluate(arguments: argparse.Namespace) -> Results:
    """Rows and sheets of all runs. Raises ConfigError for a run without a finished checkpoint."""
    runs = dict(entry.split("=", 1) for entry in arguments.run)
    count = 8 if arguments.fast else arguments.count
    sampling = Sampling(arguments.steps, arguments.guidance, arguments.seed)
    last = find_checkpoint(Path(runs["instruct"]))
    config = load_saved_config(last / CONFIG_FILE)
    with one_process(config) as layout:
        models = {}
        for name, folder in runs.items():
            print(f"loading {name} from {folder}", flush=True)
            models[name] = TrainedModel(Path(folder), layout)
        toy = ToyResults(load_diffusion(config, layout.device), sampling, count, not arguments.fast)
        if "pretrain" in models:
            print("pretrain: words", flush=True)
            toy.results.rows.extend(
                word_rows(models["pretrain"], arguments.seed, 4 * count, not arguments.fast)
            )
        if "align" in models:
            print("align: words to pictures", flush=True)
            toy.align(models["align"], TextEncoderModel(config.model.diffusion.path))
        print("instruct: pictures to pictures", flush=True)
        toy.instruct(models["instruct"], models.get("align"))
        if "align" in models:
            toy.variant("align only", models["align"])
        for name, model in models.items():
            if name not in {"pretrain", "align", "instruct"}:
                print(f"variant {name}", flush=True)
                toy.variant(name, model)
    return toy.results


def write(results: Results, output: Path) -> None:
    """The sheets as PNG files, `images.json` that lists them, and `metrics.json`."""
    output.mkdir(parents=True, exist_ok=True)
    listed = []
    for file, title, caption, picture in results.sheets:
        picture.save(output / file)
        listed.append({"file": file, "title": title, "caption": caption})
    for name, content in (
        ("images.json", listed),
        ("metrics.json", {"rows": [row.to_json() for row in results.rows]}),
    ):
        write_json(output / name, content)


def main() -> int:
    """0, also when a threshold is missed, which the table shows; 2 for runs that cannot be read."""
    arguments = parse()
    if not all("=" in entry for entry in arguments.run) or not any(
        entry.startswith("instruct=") for entry in arguments.run
    ):
        print("error: give runs as --run NAME=FOLDER, among them instruct=...", file=sys.stderr)
        return 2
    try:
        results = evaluate(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(results, arguments.output)
    for row in results.rows:
        mark = {None: " ", True: "ok", False: "MISSED"}[row.passed]
        limit = "" if row.threshold is None else f"{row.direction} {row.threshold:g}"
        print(f"{row.group:14} {row.name:58} {row.value:8.3f} {limit:9} {mark}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
