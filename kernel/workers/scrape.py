"""Merges the metrics pages of several workers into one page."""

from __future__ import annotations

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT = aiohttp.ClientTimeout(total=2)


async def scrape(url: str) -> str:
    """Return a worker's metrics page, or an empty text if the worker doesn't answer."""
    if not url:
        return ""
    try:
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as http, http.get(f"{url}/metrics") as page:
            return await page.text()
    except (aiohttp.ClientError, TimeoutError):
        return ""


def merge(pages: dict[str, str]) -> bytes:
    """Merge pages by name into one page in Prometheus's text format. Each sample gets its page's name as a label."""
    families: dict[str, list[str]] = {}
    for name, page in pages.items():
        for family in text_string_to_metric_families(page):
            title = family.name + ("_total" if family.type == "counter" else "")
            lines = families.setdefault(
                family.name,
                [f"# HELP {title} {_escaped(family.documentation)}", f"# TYPE {title} {family.type}"],
            )
            for sample in family.samples:
                labels = {"worker": name, **sample.labels}
                text = ",".join(f'{key}="{_quoted(value)}"' for key, value in labels.items())
                lines.append(f"{sample.name}{{{text}}} {sample.value}")
    return "".join(f"{line}\n" for lines in families.values() for line in lines).encode()


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', '\\"')
