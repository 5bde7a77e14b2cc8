"""The whole page: headline, what happened, and the sections in the order a sceptic reads them."""

from __future__ import annotations

from pathlib import Path

from megatron_kosmosg.config.overwrites import refuse_to_overwrite
from megatron_kosmosg.files import write_text
from megatron_kosmosg.toy.report import sections
from megatron_kosmosg.toy.report.inputs import ReportInputs, read_inputs

_STORY = """
<p>KOSMOS-G (<a href="https://arxiv.org/abs/2310.02992">arXiv 2310.02992</a>) lets a language model
that reads pictures steer a frozen image decoder: prompts may hold pictures where words would not
say enough. This run trained all three of its stages from scratch in a toy world, on two processes,
through Megatron-Core's layers, schedules, optimizer and checkpoints.</p>
<ol>
<li><b>The world.</b> 32-pixel scenes with one or two subjects. Hues are continuous, their words
coarse: a picture tells more than its caption. One in eight combinations of shape, pattern and
colour never occurs in training; all measurements below use those.</li>
<li><b>pretrain.</b> The decoder learns to continue text with pictures in it.</li>
<li><b>align.</b> AlignerNet learns, from captions alone, to turn the decoder's states into what the
image decoder's own text encoder would have said.</li>
<li><b>instruct.</b> Prompts now hold pictures. The frozen image decoder says how well it can draw
the target from the condition, and the language side learns from that gradient.</li>
</ol>
<p>The image decoder, its text encoder and the image tower come trained with the package and stand
for Stable Diffusion and CLIP; the image decoder and the text encoder never change. Nothing
in the judge is learnt: it fits rendered templates to the drawn picture and reads off shape, pattern
and colours. Each figure stands beside its control, the same pictures judged against another
prompt's truth.</p>
"""

_NEXT = """
<h3>Your own data</h3>
<p>The commands above are the ones for real data too. Write one JSON line per sample, as in
<code>world/train/*.jsonl</code> of this folder, then:</p>
<pre><code>kosmosg preprocess --kind caption --input captions.jsonl \\
    --tokenizer-model sentencepiece.bpe.model --output-prefix /data/caption --workers 16
kosmosg train --config my_pretrain.yaml \\
    data.blend.caption.path=/data/caption</code></pre>
<h3>Full size on 256 GPUs</h3>
<p><code>examples/configs/{pretrain,align,instruct}_256gpu.yaml</code> hold the paper's sizes and
hyper-parameters. The dry run prints the resolved settings, what each rank holds, parameter counts
and the batch arithmetic, on any machine. No GPU run has been made for this page.</p>
<pre><code>kosmosg train \\
    --config examples/configs/instruct_256gpu.yaml --dry-run</code></pre>
<h3>diffusers</h3>
<p><code>export/</code> in this run's folder is a diffusers pipeline: <code>mllm/</code> a stock
<code>Kosmos2ForConditionalGeneration</code>, <code>unet/ vae/ scheduler/</code> those of the frozen
image decoder, only <code>aligner/</code> has code of its own. ControlNet, LoRA, schedulers and
image-to-image work on it as on Stable Diffusion (<code>examples/inference/</code>).</p>
<pre><code>from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("export", trust_remote_code=True)
pipe(["a", picture, "on a red background"], num_inference_steps=8, guidance_scale=2)</code></pre>
<p>Any Stable Diffusion folder takes the toy decoder's place in training through
<code>model.diffusion.path</code> and <code>model.clip_text.path</code>.</p>
"""

_SECTIONS = (
    ("story", "What happened", lambda inputs: _STORY),
    ("pictures", "Pictures", sections.pictures),
    ("numbers", "Measured", sections.numbers),
    ("curves", "Curves", sections.curves),
    ("times", "Times", sections.timings),
    ("commands", "Commands", sections.commands),
    ("next", "How to go on", lambda inputs: _NEXT),
)


def write_report(out: Path) -> Path:
    """OUT/report.html, replaced atomically. Raises ValueError when `out` holds nothing to show, and
    ConfigError when the page would be written over what it shows."""
    inputs, target = read_inputs(out), out / "report.html"
    refuse_to_overwrite([target], inputs.files, "--output")
    write_text(target, render(inputs))
    return target


def render(inputs: ReportInputs) -> str:
    """The page's HTML; it refers to no other file."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in _SECTIONS)
    body = "".join(
        f'<section id="{anchor}"><h2>{title}</h2>{make(inputs)}</section>'
        for anchor, title, make in _SECTIONS
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>megatron-kosmosg quickstart</title><style>{style}</style></head>
<body><header class="top"><div>
<h1>From a picture in the prompt to a new scene</h1>
<p>KOSMOS-G on Megatron-Core: three stages trained in a toy world on this machine, then judged on
combinations that never occurred in training.</p>
<nav>{links}</nav></div></header>
<main>{sections.verdict(inputs)}{sections.tiles(inputs)}{body}
<footer>{_footer(inputs)}</footer></main></body></html>
"""


def _footer(inputs: ReportInputs) -> str:
    machine = inputs.machine
    if not machine:
        return "megatron-kosmosg"
    return (
        f"megatron-kosmosg, {machine['system']}, {machine['processor']}, "
        f"{machine['cores']} core(s), Python {machine['python']}"
    )
