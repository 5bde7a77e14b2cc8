#!/usr/bin/env python3
"""Runs megatron_kosmosg.cli.rehearse from a checkout."""

import sys

from megatron_kosmosg.cli.rehearse import main

if __name__ == "__main__":
    sys.exit(main())
