"""JSON Schemas of the documents that --json prints: `flushlab schema NAME`.

The tests hold each command's document to its schema, which allows no other keys.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel

from emulator.errors import BadInput, one_of
from emulator.schemas.documents import CompareDocument, LitmusDocument, RunDocument, SweepDocument
from emulator.schemas.explored import ExploreDocument
from emulator.schemas.hosts import ImportDocument, ReplayDocument
from emulator.schemas.races import (
    AuditDocument,
    DriftDocument,
    DriftRunDocument,
    ExecutionDocument,
    ExplainDocument,
    StateDocument,
    UnreachedDocument,
)

SCHEMAS: Final[dict[str, type[BaseModel]]] = {
    "audit": AuditDocument,
    "compare": CompareDocument,
    "drift": DriftDocument,
    "drift-run": DriftRunDocument,
    "execution": ExecutionDocument,
    "explain": ExplainDocument,
    "explore": ExploreDocument,
    "import": ImportDocument,
    "litmus": LitmusDocument,
    "replay": ReplayDocument,
    "run": RunDocument,
    "state": StateDocument,
    "sweep": SweepDocument,
    "unreached": UnreachedDocument,
}


def schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema of a document; raise BadInput for a name that there is not."""
    if name not in SCHEMAS:
        raise BadInput("schema", f"no document {name!r}", one_of(name, SCHEMAS))
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **SCHEMAS[name].model_json_schema()}
