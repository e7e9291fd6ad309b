"""Audits of the assumptions that the search's proofs rest on."""
