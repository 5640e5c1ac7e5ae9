"""Requirements of standards, the evidence in a trail for each, and the parts of it that no trail can show."""

from __future__ import annotations

from typing import NamedTuple

from ..verify.findings import TrailReport, counted
from .fields import FIELDS
from .summary import Summary

__all__ = ["Control", "controls_for"]


class Control(NamedTuple):
    """A requirement of a standard."""

    standard: str
    number: str
    title: str
    shown: str
    """The evidence in this trail."""
    not_shown: str
    """The rest of the requirement, for which other evidence is needed."""


def controls_for(summary: Summary, trail: TrailReport) -> list[Control]:
    """Return the requirements that this trail is evidence for, each with the limits of the evidence."""
    integrity, content = _integrity(trail), _content(summary)
    activity = _activity(summary)
    counts = f"{counted(summary.records, 'record')} in {counted(len(trail.streams), 'stream')}"
    created = f"{counts}, numbered by the application itself"
    soc, iso, pci, nist = "SOC 2", "ISO/IEC 27001:2022", "PCI DSS 4", "NIST SP 800-53"
    return [
        Control(
            *(soc, "CC7.2", "Monitoring of system components for anomalies"),
            f"{activity}: material for a review",
            "That anybody reviewed it, detection rules, alerts; operating systems, networks, databases",
        ),
        Control(
            *(soc, "CC7.3", "Evaluation of security events"),
            f"Operations, callers and failures by time, to evaluate an event with; {content}",
            "The evaluation, its decision, and the communication of it",
        ),
        Control(
            *(iso, "A.8.15", "Logging: produced, stored, protected, analysed"),
            f"{created}; {integrity}",
            "Retention, access to the files, analysis, clock synchronisation (A.8.17), events that the application "
            "does not record",
        ),
        Control(
            *(pci, "10.2", "Audit logs record who did what, when, from where, to what, with which result"),
            content,
            "That every event of 10.2.1.1 to 10.2.1.7 is recorded; operating systems, networks and databases in scope",
        ),
        Control(
            *(pci, "10.3", "Audit logs are protected from destruction and modification"),
            integrity,
            "Read access by need (10.3.1), backups on another server (10.3.3), monitoring of the files (10.3.4)",
        ),
        Control(
            *(nist, "AU-2", "Event logging"),
            f"{counted(len(summary.operations), 'different operation')} recorded",
            "The choice of events, its rationale and its review; operations that the application never sent",
        ),
        Control(
            *(nist, "AU-3", "Content of audit records"),
            content,
            "Whether the recorded values are true: the application says them",
        ),
        Control(
            *(nist, "AU-9", "Protection of audit information"),
            integrity,
            "Permissions on files and tools, copies on other systems (AU-9(2)), encryption. The seal is symmetric: the "
            "holder of the key can forge records, so there is no non-repudiation (AU-10)",
        ),
        Control(
            *(nist, "AU-12", "Audit record generation"),
            f"{created}; {_losses(trail)}",
            "Components that do not use this library; a process that was taken over says what its attacker wants",
        ),
    ]


def _integrity(trail: TrailReport) -> str:
    problems = len(trail.problems())
    if not trail.is_authenticated:
        numbers = counted(problems, "problem") if problems else "no gaps"
        return f"not authenticated (no key was given): anybody who can write the files can change them; {numbers}"
    if problems:
        return f"NOT whole: {counted(problems, 'problem')}"
    ends = f"; {counted(trail.without_end, 'stream')} without an end" if trail.without_end else ""
    return "every record is authenticated, and no number is missing before the last one of its stream" + ends


def _content(summary: Summary) -> str:
    if not summary.records:
        return "no records"
    worst = max(FIELDS, key=summary.unknown_share)
    share = summary.unknown_share(worst)
    if not share:
        return f"all {len(FIELDS)} fields are known in every record"
    affected = sum(summary.unknown[field].total > 0 for field in FIELDS)
    return f"{affected} of {len(FIELDS)} fields have unknown values, most of all {worst} in {share:.1%} of the records"


def _activity(summary: Summary) -> str:
    failures = summary.results.count_of("Failure")
    return (
        f"{counted(summary.records, 'operation')} by {counted(len(summary.callers), 'caller')}, "
        f"{counted(failures, 'failure')}"
    )


def _losses(trail: TrailReport) -> str:
    return f"the clients report {counted(trail.refused, 'record')} refused and {trail.left_out} left out"
