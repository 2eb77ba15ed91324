"""The paper's claims, each decided by the miniature's numbers and a stated criterion."""

from __future__ import annotations

from .figure_claims import figure_claims
from .paper_findings import Findings
from .table_claims import table_2_claims, table_3_claims
from .verdicts import Claim


def claims(findings: Findings) -> list[Claim]:
    """All claims, in the order of tables and figures."""
    return [*table_2_claims(findings.subjects), *table_3_claims(findings.maps), *figure_claims(findings)]
