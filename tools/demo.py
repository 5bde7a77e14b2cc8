#!/usr/bin/env python3
"""Runs megatron_kosmosg.cli.demo from a checkout."""

import sys

from megatron_kosmosg.cli.demo import main

if __name__ == "__main__":
    sys.exit(main())
