"""Tests of the trace format, its converter and the embedded traces."""
