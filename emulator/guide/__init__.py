"""The guide: pages in Markdown, some parts of which are generated from the code that they describe."""

from __future__ import annotations

import re
from importlib import resources

from emulator.errors import BadInput, one_of
from emulator.guide.reference import GENERATED

# In the order in which a newcomer reads them.
TOPICS = (
    "policies",
    "patches",
    "porting",
    "kernel",
    "litmus",
    "scenarios",
    "reports",
    "explore",
    "results",
    "roots",
    "nested",
    "metrics",
    "hosts",
    "package",
    "architecture",
)

_PLACE = re.compile(r"<!-- generated: (\w+) -->")


def page(topic: str) -> str:
    """Return a page's Markdown, with its generated parts.

    Raises BadInput for a topic that does not exist.
    """
    if topic not in TOPICS:
        raise BadInput("guide", f"no topic {topic!r}", one_of(topic, TOPICS))
    text = resources.files(__name__).joinpath(f"{topic}.md").read_text("utf-8")
    return _PLACE.sub(lambda place: GENERATED[place[1]](), text)


def title(topic: str) -> str:
    """Return the first heading of a page."""
    return page(topic).partition("\n")[0].removeprefix("# ")
