"""Audits: is the search entitled to what it says?"""
