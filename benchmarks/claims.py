"""What people say of DDP and ZeRO, measured; and four slow hosts against one.

    python benchmarks/claims.py [--quick] [--only WORD ...] [--json FILE]         the claims
    python benchmarks/claims.py --hosts [--quick] [--models NAME ...] [--json FILE]      the hosts; needs root

Each claim says by itself whether it holds in what was measured. See README.md beside this file and docs/claims.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import claims_counted
import claims_timed
import claims_trained
import torch
from finding import Claim, Finding, Seen

CLAIMS: Sequence[Claim] = (*claims_timed.CLAIMS, *claims_counted.CLAIMS, *claims_trained.CLAIMS)
"""Those first that fork ranks: later on this process has had threads."""

MARKER = "<!-- measured: benchmarks/claims.py --page -->"


def told(claim: Claim, finding: Finding) -> str:
    """A claim as it is printed, and as docs/claims.md shows it."""
    verdict = "holds here" if finding.holds else "false"
    return "\n".join([f'"{claim.words}": {verdict}', *(f"  {seen}" for seen in finding.seen), f"  {finding.because}"])


def section(claim: Claim, found: Finding) -> str:
    """The same as a part of docs/claims.md."""
    verdict = "Holds in what was measured here" if found.holds else "False"
    seen = "\n".join(map(str, found.seen))
    return f"{found_under(claim)}\n\n{verdict}: {found.because}.\n\n```text\n{seen}\n```\n"


def found_under(claim: Claim) -> str:
    return f'## "{claim.words}"'


def rewrite(page: str, sections: Mapping[str, str]) -> str:
    """The page with these sections, by heading, in place of its own; others stay. All in the order of the claims."""
    before, _, below = page.partition(MARKER)
    parts = {part.partition("\n")[0]: part for part in (f"## {text}" for text in below.split("\n## ")[1:])} | dict(
        sections
    )
    ordered = [parts[found_under(claim)] for claim in CLAIMS if found_under(claim) in parts]
    return "\n\n".join([f"{before}{MARKER}", *(part.rstrip() for part in ordered)]) + "\n"


def lines(name: str, seen: Sequence[Seen]) -> list[dict[str, object]]:
    return [
        {"bench": "claims", "case": f"{name}: {s.case}", "metric": s.metric, "value": s.value, "unit": s.unit}
        for s in seen
    ]


def judged(claims: Sequence[Claim], quick: bool, findings: list[Finding]) -> list[dict[str, object]]:
    """Look at every claim, print what was seen, and add it to `findings`."""
    written: list[dict[str, object]] = []
    for claim in claims:
        finding = claim.measure(quick)
        findings.append(finding)
        print(f"{told(claim, finding)}\n", flush=True)
        verdict = {
            "bench": "claims",
            "case": claim.name,
            "metric": "holds",
            "value": float(finding.holds),
            "unit": "truth",
        }
        written += [verdict, *lines(claim.name, finding.seen)]
    return written


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What people say of DDP and ZeRO, measured.")
    parser.add_argument("--quick", action="store_true", help="smaller trainings, one round: under half a minute")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="claims whose name has one of these")
    parser.add_argument(
        "--hosts", action="store_true", help="four hosts of half a core each against one, not the claims"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help="with --hosts: resnet-50, gpt-33m; with --quick resnet-tiny, gpt-tiny",
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the claims into docs/claims.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    if args.hosts:
        import claims_hosts

        written = lines("hosts", claims_hosts.measured(quick=args.quick, names=args.models))
    else:
        chosen = [c for c in CLAIMS if not args.only or any(word in c.name for word in args.only)]
        findings: list[Finding] = []
        written = judged(chosen, args.quick, findings)
        if args.page is not None:
            new = {found_under(claim): section(claim, found) for claim, found in zip(chosen, findings, strict=True)}
            args.page.write_text(rewrite(args.page.read_text(), new))
    if args.json is not None:
        args.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
