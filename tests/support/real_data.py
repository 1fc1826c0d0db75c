"""Paths of the files of real preference pairs that some tests use."""

import os
from pathlib import Path

DATA = Path(os.environ.get("DPO_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))

SETS = {
    "harmless": "hh_harmless/harmless-base.train.text.jsonl.gz",
    "qa_feedback": "qa_feedback/qa-feedback.train.messages.jsonl.gz",
}
