"""`bash benchmarks/gpu.sh`: the speed of training's parts and of whole updates on one GPU."""
