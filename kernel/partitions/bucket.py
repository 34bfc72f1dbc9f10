"""The JetStream KV bucket that holds the leases of an app."""

from __future__ import annotations

from typing import Any


def bucket_of(app: str) -> str:
    """Return the name of the bucket that holds an app's leases."""
    return f"{app}-leases"


def faults_of(config: dict[str, Any], subject: str) -> list[str]:
    """Return what keeps a stream from holding leases, for people."""
    wrong = {
        "no time to live, so the leases of dead workers would never expire": config.get("max_age", 0) <= 0,
        "a history, so a lease that is given back would leave an older one": config.get("max_msgs_per_subject") != 1,
        "keys that can't be deleted, so no lease could be given back": config.get("deny_delete", False),
        "another subject": config.get("subjects") != [subject],
        "messages that their readers remove": config.get("retention", "limits") != "limits",
        "the contents of another stream": bool(config.get("mirror") or config.get("sources")),
        "a seal": config.get("sealed", False),
        "no acknowledgements": config.get("no_ack", False),
    }
    return [fault for fault, there in wrong.items() if there]
