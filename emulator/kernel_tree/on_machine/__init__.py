"""A tree's TDP MMU in the place of the model's: real threads of the machine run it, and the oracle judges it.

core.py loads the object and connects it with the machine.  tdp_mmu.py wraps its functions under KVM's names,
and install.py puts the wrappers in the place of the model's functions.  A process runs one tree.
"""
