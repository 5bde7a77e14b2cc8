#!/usr/bin/env python3
"""Runs megatron_kosmosg.cli.dataset_shards from a checkout."""

import sys

from megatron_kosmosg.cli.dataset_shards import main

if __name__ == "__main__":
    sys.exit(main())
