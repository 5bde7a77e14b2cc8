#!/usr/bin/env python3
"""Runs megatron_kosmosg.toy.cli.evaluate_toy from a checkout."""

import sys

from megatron_kosmosg.toy.cli.evaluate_toy import main

if __name__ == "__main__":
    sys.exit(main())
