"""The same prompt and noise with the samplers of the paper, side by side.

    python examples/inference/schedulers.py kosmos-g --prompt "<image> on a beach" --image dog.png

DPM-Solver++ with 100 steps is the paper's DreamBench setting, DDIM with 250 its FID setting;
--steps takes the place of all of them.
"""

from __future__ import annotations

import time

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from shared import embeddings, load, run, sampling

SAMPLERS = (
    (DPMSolverMultistepScheduler, 100),
    (DDIMScheduler, 250),
    (EulerDiscreteScheduler, 30),
)


def draw(args):
    pipeline = load(args).to(args.device)
    condition, images = embeddings(pipeline, args), []
    for scheduler, steps in SAMPLERS:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        started = time.perf_counter()
        steps = args.steps or steps
        settings = {**sampling(args), "num_inference_steps": steps}
        images += pipeline(**condition, **settings).images
        print(f"{scheduler.__name__}, {steps} steps: {time.perf_counter() - started:.1f} s")
    return images


if __name__ == "__main__":
    run(draw, __doc__, lambda parser: parser.set_defaults(steps=None))
