"""Reads traces of a real host's KVM: text of ftrace, trace-cmd and perf.

`lines` knows how the tools print an event, `fields` the meaning of an event's text, `observed` adds the
events up, `report` prints the sums.
"""
