"""The table at the end: what was read, what each rule removed, what stays."""

from __future__ import annotations

from lm_train.data.shards import Manifest
from lm_train.output import aligned


def report(manifest: Manifest) -> str:
    """Lines of text; the counts of the manifest, and examples of none."""
    counts = manifest.counts
    read, kept = counts["read"], counts["kept"]
    rows = [("", "documents", "dropped", "characters")]
    rows.append(("read", f"{read['documents']:,}", "", f"{read['characters']:,}"))
    for rule, removed in counts["removed"].items():
        if rule == "empty" and not removed["documents"]:
            continue
        rows.append((rule, f"{removed['documents']:,}", f"{removed['dropped']:,}", f"{-removed['characters']:,}"))
        rows += [(f"  {reason}", "", f"{count:,}", "") for reason, count in removed.get("reasons", {}).items()]
    rows.append(("kept", f"{kept['documents']:,}", "", f"{kept['characters']:,}"))
    lines = aligned(rows)
    for split, shards in manifest.splits.items():
        per_token = shards.text_bytes / max(1, shards.tokens)
        lines.append(
            f"{split}: {shards.tokens:,} tokens of {per_token:.2f} bytes in {shards.documents:,} documents, "
            f"{len(shards.shards):,} shards"
        )
    return "\n".join(lines)
