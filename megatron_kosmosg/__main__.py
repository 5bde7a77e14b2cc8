"""Makes `python -m megatron_kosmosg COMMAND` the same as `kosmosg COMMAND`, also where the package
is not installed."""

from megatron_kosmosg.cli.main import start

if __name__ == "__main__":
    start()
