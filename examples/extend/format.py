"""A plugin with a data format: a question with scored answers. The best and the worst answer form a pair."""

from typing import Any

from dpo_engine.data.formats import FORMATS, BadRecord, Pair


@FORMATS.register("scored")
def scored(row: dict[str, Any]) -> Pair | None:
    """Read ``{"question": ..., "answers": [{"text": ..., "score": ...}, ...]}``.

    The margin of the pair is the difference between the two scores. A record that does not have two different scores is
    left out, and such records are counted.
    """
    try:
        answers = sorted(row["answers"], key=lambda answer: answer["score"])
        if len(answers) < 2 or answers[0]["score"] == answers[-1]["score"]:
            return None
        worst, best = answers[0], answers[-1]
        return Pair(row["question"], best["text"], worst["text"], margin=best["score"] - worst["score"])
    except (KeyError, TypeError) as error:
        raise BadRecord(f"has no usable question and answers ({error})") from error
