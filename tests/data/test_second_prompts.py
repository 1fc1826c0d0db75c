"""Tests of records with two prompts, and of responses that repeat the prompt: no text is lost or trained on twice."""

import json

import pytest

from dpo_engine.data.formats import FORMATS, BadRecord, Pair, checked, read_pairs
from dpo_engine.errors import DataError
from support.built import write

TEXT = {"prompt": "Add the numbers.", "chosen": "It is 4.", "rejected": "It is 5."}
ASK = {"role": "user", "content": TEXT["prompt"]}
CHAT = {
    "prompt": [ASK],
    "chosen": [{"role": "assistant", "content": "4"}],
    "rejected": [{"role": "assistant", "content": "5"}],
}
WHOLE = {"chosen": [ASK, *CHAT["chosen"]], "rejected": [ASK, *CHAT["rejected"]]}
MORE = "The numbers are 2 and 2."


class TestTwoPrompts:
    @pytest.mark.parametrize("row", [TEXT, CHAT, WHOLE], ids=["text", "messages", "whole conversations"])
    @pytest.mark.parametrize("name", ["input", "instruction", "question", "Query", "userInput", "problem", "messages"])
    def test_the_second_is_refused_by_name(self, row, name, tmp_path):
        value = [{"role": "user", "content": MORE}] if name == "messages" else MORE
        if "prompt" not in row and name == "messages":
            return  # read as sharegpt
        path = write(tmp_path / "a.jsonl", [row, {**row, name: value}])
        with pytest.raises(DataError) as caught:
            list(read_pairs(path))
        beside = "prompt" if "prompt" in row else "chosen"
        says = (
            f"{path}:2: '{name}' is not read beside {beside}; make them one field, or set data.columns={{{name}: null}}"
        )
        assert str(caught.value).startswith(says)
        with pytest.raises(BadRecord, match=f"'{name}' is not read beside {beside}"):
            FORMATS["auto"]({**row, name: value})
        assert len(list(read_pairs(path, "auto", None, {name: None}))) == 2
        assert len(list(read_pairs(path, "text" if row is TEXT else "messages"))) == 2

    @pytest.mark.parametrize(
        "harmless",
        [
            {"question": " Add  the numbers. "},
            {"instruction": "Add", "input": "the numbers."},
            {"query": "", "input": None, "messages": []},
            {"messages": [ASK, {"role": "assistant", "content": "An answer that is neither of both."}]},
            {"conversation": [{"input": TEXT["prompt"], "output": "Another answer."}]},
            {
                "prompt_id": "8f",
                "judge_prompt": MORE,
                "original_prompt": MORE,
                "input_length": 7,
                "question_type": MORE,
            },
        ],
    )
    def test_copies_and_other_fields_do_no_harm(self, harmless):
        assert checked(FORMATS["auto"]({**TEXT, **harmless})) == Pair(**TEXT)
        assert checked(FORMATS["auto"]({**CHAT, **harmless})).prompt == (ASK,)

    def test_formats_of_other_systems(self):
        row = {"messages": [ASK, *CHAT["chosen"]], "rejected_response": "5"}
        assert FORMATS["auto"](row)
        with pytest.raises(BadRecord, match="'question' is not read beside messages"):
            FORMATS["auto"]({**row, "question": MORE})
        row = {"prompt": "2 + 2 =", "responses": [" 4", " 5"], "scores": [1, 0]}
        with pytest.raises(BadRecord, match="'input' is not read beside prompt"):
            FORMATS["auto"]({**row, "input": MORE})


class TestRepeatedPrompts:
    def test_whole_dialogues_beside_a_prompt_are_refused(self, tmp_path):
        dialogue = "\n\nHuman: Add 2 and 2.\n\nAssistant:"
        rows = [
            {"prompt": prompt, "chosen": f"{dialogue} It is 4.", "rejected": f"{dialogue} It is 5."}
            for prompt in (dialogue, "Add 2 and 2.", dialogue.strip())
        ]
        for row in rows:
            path = write(tmp_path / "a.jsonl", [row])
            with pytest.raises(
                DataError, match=":1: chosen and rejected are whole dialogues that repeat the prompt; set "
            ):
                list(read_pairs(path))
            ((_, (pair,)),) = read_pairs(path, "auto", None, {"prompt": None})
            assert pair == Pair(dialogue, " It is 4.", " It is 5.")

    def test_responses_that_repeat_a_text_prompt_are_counted(self, build):
        rows = [
            {
                "prompt": "which is larger?",
                "chosen": "which is larger? the second",
                "rejected": " which is larger? first",
            },
            {"prompt": "which is larger?\n", "chosen": "which is larger?\nthe second", "rejected": "which is it"},
            {"prompt": "which is", "chosen": " larger", "rejected": " smaller"},
        ]
        report = build(rows)[1]
        says = (
            "1 pair whose responses begin with the whole prompt, which is therefore trained on; if this is not intended"
        )
        assert report.repeated == 1 and says in str(report)
        report = build(rows[1:], cache="b")[1]
        assert report.repeated == 0 and "begin with" not in str(report)
        row = {"prompt": [ASK], "chosen": json.dumps(ASK), "rejected": "5"}
        assert build([row], cache="c")[1].repeated == 0
