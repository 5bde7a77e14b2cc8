"""A training update on device "cuda" of a machine that has none: shapes and counts, no numbers.

torch's FakeTensorMode gives every tensor a shape, a dtype and a device and no memory, so full size
fits anywhere. What torch's C++ or a driver would answer is answered here; the program runs its own
code from its start-up to the end of an update.

    cuda_guard, fake_gpu, fake_numbers, fake_collectives, attention_choice, frozen_files,
        made_up_stream                          stand in for what is not there
    recorder, device_memory, operator_watch, phases     count what the program does
    case, stand_ins, rank_update, server        run one rank's update, many in turn

It shows tensors of the wrong device, dtype or shape, counts what `recorder.Phase` lists, and checks
what NCCL checks. It cannot see numbers, hangs, kernels that do not exist for a dtype, workspaces of
libraries, fragmentation, or what torch.compile would do: compiled functions count as their parts.

Only `case`, `cuda_guard` and `server` may be imported by a process that is not a fake device: the
others change torch for good once they are installed.
"""
