"""A tree's TDP MMU in the place of the model's, on the machine: real threads, the oracle judging.

core.py loads the object and connects it with the machine; tdp_mmu.py has its functions under KVM's names, and
install.py puts them where the model's are.  One process has one tree.
"""
