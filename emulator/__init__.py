"""flushlab: KVM's TLB flushing, emulated on real threads and judged by an oracle."""

from __future__ import annotations

__version__ = "0.1.0"
