#!/usr/bin/env python3
"""Runs megatron_kosmosg.cli.score_rank from a checkout."""

import sys

from megatron_kosmosg.cli.score_rank import main

if __name__ == "__main__":
    sys.exit(main())
