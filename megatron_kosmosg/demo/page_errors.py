"""What a request of the page cannot do, in words for people; the rest is for the terminal."""

from __future__ import annotations

import html
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import torch

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.demo.studio import Cancelled
from megatron_kosmosg.inference.prompt_records import PromptError

logger = logging.getLogger(__name__)


@contextmanager
def errors_for_people(*files: Path) -> Iterator[None]:
    """Context in which an error becomes a message on the page; names of files stand there without
    their folders."""
    try:
        yield
    except (PromptError, ConfigError) as error:
        message = str(error).removeprefix("image: ").removeprefix("prompt: ")
        for folder in {str(path.parent) for path in files}:
            message = message.replace(f"{folder}/", "")
        raise gr.Error(html.escape(message), print_exception=False, title="Not possible") from None
    except Cancelled as error:
        raise gr.Error(str(error), print_exception=False, title="Cancelled", duration=3) from None
    except torch.OutOfMemoryError:
        logger.exception("out of memory")
        raise gr.Error(
            "the device has not enough memory: draw fewer or smaller images, or start "
            "kosmosg demo with --offload",
            print_exception=False,
        ) from None
    except Exception:
        logger.exception("a request failed")
        raise gr.Error(
            "this failed; the terminal of kosmosg demo says why", print_exception=False
        ) from None
