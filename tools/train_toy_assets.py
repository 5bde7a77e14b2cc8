#!/usr/bin/env python3
"""Runs megatron_kosmosg.toy.cli.train_toy_assets from a checkout."""

import sys

from megatron_kosmosg.toy.cli.train_toy_assets import main

if __name__ == "__main__":
    sys.exit(main())
