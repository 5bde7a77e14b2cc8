#!/usr/bin/env python3
"""Runs megatron_kosmosg.toy.cli.make_toy_world from a checkout."""

import sys

from megatron_kosmosg.toy.cli.make_toy_world import main

if __name__ == "__main__":
    sys.exit(main())
