"""What a difference between the database and the world is called, and told as."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from uuid import UUID

FOREIGN = "foreign"


@dataclass(frozen=True)
class Drift:
    """One difference: what was found in which layer, and what will be (or was) done about it, or why it was not.

    What is FOREIGN is no difference: it is told, and left alone. `subject` is what it is about where that is no volume:
    the digest of an image's file, the id of a golden copy.
    """

    layer: str
    volume_id: UUID | None
    found: str
    plan: str
    trouble: str | None = None
    subject: str | None = None

    def __str__(self) -> str:
        return f"{self.layer}: {self.volume_id or self.subject or '-'}: {self.found} → {self.trouble or self.plan}"

    def document(self) -> dict[str, str | None]:
        return {k: str(v) if v is not None else None for k, v in asdict(self).items()}
