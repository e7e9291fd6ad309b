"""Compiles a Linux tree's own TDP MMU and runs it beside the model.

tdp_mmu.c, tdp_iter.c and spte.c of the tree are compiled unchanged against shim/, which has the primitives
that they stand on: locks, RCU, pages, flushes.  The declarations that they miss are taken from the tree's own
headers (harvest.py).  The result stays in the user's cache: nothing of a tree is part of this project.
"""
