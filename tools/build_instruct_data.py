#!/usr/bin/env python3
"""Runs megatron_kosmosg.cli.build_instruct_data from a checkout."""

import sys

from megatron_kosmosg.cli.build_instruct_data import main

if __name__ == "__main__":
    sys.exit(main())
