"""`ib-explain layers MODEL`: where a bottleneck can sit, and how well each layer cuts."""

from __future__ import annotations

import argparse
import csv

from ib_explain.commands.common import load_with_size, note, times
from ib_explain.files import replace_file
from ib_explain.sites import LEAK_LIMIT, Site, default_layer, resolve_site, sites

__all__ = ["run"]

HEADS = ("layer", "layout", "grid", "channels", "depth", "leak", "effect", "")
COLUMNS = ("layer", "layout", "height", "width", "channels", "depth", "leak", "effect", "note")


def run(args: argparse.Namespace) -> int:
    """Print the table, and write it as CSV if asked to."""
    if args.out is not None and args.out.is_dir():
        raise ValueError(f"{args.out} is a folder; --out names the CSV file")
    if args.out is not None and args.out.exists() and not args.overwrite:
        raise ValueError(f"{args.out} exists; name another --out or --overwrite")
    host, size = load_with_size(args)
    note(f"probing {args.model} at {times(size)} ...")
    found = sites(host, size) if args.layer is None else [resolve_site(host, args.layer, size)]
    default = default_layer(host, size) if any(site.usable for site in found) else None
    if not found:
        default_layer(host, size)  # which says why there is none
    print(table(found, default))
    if args.out is not None:
        with replace_file(args.out) as file, file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(COLUMNS)
            for site in found:
                facts = site.channels, site.depth, site.leak, site.effect, remark(site, default)
                writer.writerow([site.name, site.layout.kind, *site.grid, *facts])
        print(f"wrote {args.out}")
    return 0


def table(found: list[Site], default: str | None) -> str:
    """The sites as aligned text."""
    rows = [list(HEADS)]
    for site in found:
        shares = [f"{site.depth:.0%}", f"{site.leak:.1%}", f"{site.effect:.0%}"]
        rows.append([site.name, site.layout.kind, times(site.grid), str(site.channels), *shares, remark(site, default)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {HEADS.index("layer"), HEADS.index("layout"), HEADS.index("")}
    lines = [
        [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def remark(site: Site, default: str | None) -> str:
    """What is special about a site."""
    if site.name == default:
        return "default"
    if site.usable:
        return ""
    return "no cut" if site.leak > LEAK_LIMIT else "logits do not read it"
