#!/usr/bin/env python3
"""Runs megatron_kosmosg.toy.cli.make_toy_dreambench from a checkout."""

import sys

from megatron_kosmosg.toy.cli.make_toy_dreambench import main

if __name__ == "__main__":
    sys.exit(main())
