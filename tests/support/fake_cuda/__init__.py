"""A training update on device "cuda" of a machine that has none: shapes and counts, no numbers.

torch's FakeTensorMode gives every tensor a shape, a dtype and a device and no memory, so full size
fits anywhere. What torch's C++ or a driver would answer is answered here; the program under test
runs its own code from its start-up to the end of an update.

    guard, gpu, tensors, collectives, attention, frozen_files    stand in for what is not there
    record, memory, operators, phases                            count what the program does
    update, server                                               run one rank's update, many in turn

It shows tensors of the wrong device, dtype or shape, counts what `record.Phase` lists, and checks
what NCCL checks. It cannot see numbers, hangs, kernels that do not exist for a dtype, workspaces of
libraries, fragmentation, or what torch.compile would do: compiled functions count as their parts.
"""
