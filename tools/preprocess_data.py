#!/usr/bin/env python3
"""Runs megatron_kosmosg.cli.preprocess_data from a checkout."""

import sys

from megatron_kosmosg.cli.preprocess_data import main

if __name__ == "__main__":
    sys.exit(main())
