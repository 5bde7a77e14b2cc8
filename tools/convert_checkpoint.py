#!/usr/bin/env python3
"""Runs megatron_kosmosg.cli.convert_checkpoint from a checkout."""

import sys

from megatron_kosmosg.cli.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
