"""The machine's actors: pCPUs, ioctl callers, host, scheduler, RCU.

All of them use the inbox and the future of `emulator.actors.inbox`, which wait natively: an actor that waits
for a message or for an answer keeps taking the interrupts that other CPUs send it.
"""
