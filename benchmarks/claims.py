"""What people say of DDP and ZeRO, measured; and four slow hosts against one.

    python benchmarks/claims.py [--quick] [--only WORD ...] [--json FILE]         the claims
    python benchmarks/claims.py --hosts [--quick] [--models NAME ...] [--json FILE]      the hosts; needs root

Each claim says by itself whether it holds in what was measured. See README.md beside this file and docs/claims.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
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


def page(claims: Sequence[Claim], findings: Sequence[Finding]) -> str:
    """The same as a part of docs/claims.md."""
    parts: list[str] = []
    for claim, found in zip(claims, findings, strict=True):
        seen = "\n".join(map(str, found.seen))
        verdict = "Holds in what was measured here" if found.holds else "False"
        parts.append(f'## "{claim.words}"\n\n{verdict}: {found.because}.\n\n```text\n{seen}\n```\n')
    return "\n".join(parts)


def rewrite(file: Path, text: str) -> None:
    """Put it in place of all that is below the marker."""
    before, marker, _ = file.read_text().partition(MARKER)
    file.write_text(f"{before}{marker or MARKER}\n\n{text}")


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
        verdict = {"bench": "claims", "case": claim.name, "metric": "holds", "value": float(finding.holds), "unit": "truth"}
        written += [verdict, *lines(claim.name, finding.seen)]
    return written


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What people say of DDP and ZeRO, measured.")
    parser.add_argument("--quick", action="store_true", help="smaller trainings, one round: under half a minute")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="claims whose name has one of these")
    parser.add_argument("--hosts", action="store_true", help="four hosts of half a core each against one, not the claims")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="with --hosts: resnet-50, gpt-33m")
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
            rewrite(args.page, page(chosen, findings))
    if args.json is not None:
        args.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
