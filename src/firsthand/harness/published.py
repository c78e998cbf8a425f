"""Evidence that is committed beside the code and shipped with it: writing, reading, and whether it is still of this code."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from firsthand.harness.fingerprint import code_fingerprint
from firsthand.harness.store import write_whole
from firsthand.harness.study import StudyError, load_study, study_path

FOLDER = Path(__file__).parent.parent / "evidence"

Evidence = dict[str, Any]


def publish(evidence: Evidence) -> Path:
    """Write the evidence beside the code of a source checkout, where it is committed and shipped.

    Raises:
        StudyError: the evidence is none: a smoke run, tuning seeds, too few of them, a failed trial, of another
            file or an older version than the shipped study; or there is no checkout to write to.
    """
    if not (FOLDER.parents[2] / "pyproject.toml").is_file():
        raise StudyError("--publish writes into a source checkout of firsthand, and this is an installed copy")
    wanted = load_study(evidence["method"]).seeds
    if is_stale(evidence):
        raise StudyError(f"the evidence is not of the shipped study {evidence['method']!r} as it is now")
    if evidence["smoke"]:
        raise StudyError("a smoke run is no evidence: leave --smoke out")
    if min(evidence["seeds"]) < 1000:
        raise StudyError("seeds below 1000 are for tuning; evidence takes seeds from 1000 up")
    if len(evidence["seeds"]) < wanted:
        raise StudyError(f"the study asks for {wanted} seeds, got {len(evidence['seeds'])}")
    if evidence["failures"]:
        first = evidence["failures"][0]
        raise StudyError(f"not published, {len(evidence['failures'])} trials failed; {first['arm']}: {first['error']}")
    path = FOLDER / f"{evidence['method']}.json"
    write_whole(path, json.dumps(evidence, indent=1, ensure_ascii=False) + "\n")
    return path


@cache
def published() -> dict[str, Evidence]:
    """All shipped evidence, by method."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json")))
    return {evidence["method"]: evidence for evidence in found}


def is_stale(evidence: Evidence) -> bool:
    """Whether the study, or code it uses, has changed since the evidence was written."""
    try:
        return bool(code_fingerprint(study_path(evidence["method"])) != evidence["fingerprint"])
    except StudyError:
        return True


def primary(evidence: Evidence) -> dict[str, Any]:
    """The claim that decides."""
    claim: dict[str, Any] = next(claim for claim in evidence["claims"] if claim["primary"])
    return claim
