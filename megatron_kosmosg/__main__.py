"""`python -m megatron_kosmosg COMMAND`, as `kosmosg COMMAND` where the package is installed."""

from megatron_kosmosg.cli.main import start

if __name__ == "__main__":
    start()
