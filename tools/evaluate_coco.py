#!/usr/bin/env python3
"""Runs megatron_kosmosg.cli.evaluate_coco from a checkout."""

import sys

from megatron_kosmosg.cli.evaluate_coco import main

if __name__ == "__main__":
    sys.exit(main())
