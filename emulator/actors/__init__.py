"""The machine's actors: pCPUs, ioctl callers, host, scheduler, RCU.

All of them use the inbox and the future of `emulator.actors.inbox`, which wait natively: whoever waits for a
message or for an answer keeps serving the interrupts that others send it.
"""
