"""Tests of records with two prompts, and of responses that repeat the prompt: no text is silently lost or repeated."""

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
    @pytest.mark.parametrize("name", ["input", "question", "userInput", "chat_history", "messages"])
    def test_the_second_is_refused_by_name(self, row, name, tmp_path):
        value = [{"role": "user", "content": MORE}] if name == "messages" else MORE
        path = write(tmp_path / "a.jsonl", [row, {**row, name: value}])
        with pytest.raises(DataError) as caught:
            list(read_pairs(path))
        beside = "prompt" if "prompt" in row else "chosen"
        says = (
            f"{path}:2: '{name}' is not read, but {beside} is; join the two fields, or set "
            f"data.columns={{{name}: null}}"
        )
        assert str(caught.value).startswith(says)
        with pytest.raises(BadRecord, match=f"'{name}' is not read, but {beside} is"):
            FORMATS["auto"]({**row, name: value})
        assert len(list(read_pairs(path, "auto", None, {name: None}))) == 2
        assert len(list(read_pairs(path, "text" if row is TEXT else "messages"))) == 2

    @pytest.mark.parametrize(
        "harmless",
        [
            {"question": " Add  the numbers. "},
            {"instruction": "Add", "input": "the numbers."},
            {"query": "", "input": None, "messages": []},
            {"messages": [ASK, {"role": "assistant", "content": "An answer that is neither of the two."}]},
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
        with pytest.raises(BadRecord, match="'question' is not read, but messages is"):
            FORMATS["auto"]({**row, "question": MORE})
        row = {"prompt": "2 + 2 =", "responses": [" 4", " 5"], "scores": [1, 0]}
        with pytest.raises(BadRecord, match="'input' is not read, but prompt is"):
            FORMATS["auto"]({**row, "input": MORE})

    def test_messages_with_a_turn_that_is_not_in_the_prompt_are_refused(self):
        earlier = [ASK, {"role": "assistant", "content": "Which?"}, {"role": "user", "content": MORE}]
        with pytest.raises(BadRecord, match="'messages' is not read, but prompt is"):
            FORMATS["auto"]({**TEXT, "messages": earlier})

    def test_texts_to_which_the_prompt_refers(self):
        for name in ("article", "Document", "passage", "post", "background"):
            with pytest.raises(BadRecord, match=f"'{name}' is not read, but prompt is; join the two fields"):
                FORMATS["auto"]({**TEXT, name: MORE})
            whole = {**TEXT, "prompt": f"{MORE}\n\n{TEXT['prompt']}", name: MORE}
            assert checked(FORMATS["auto"](whole)).prompt == whole["prompt"]

    def test_a_prompt_for_the_judge_is_not_proposed(self):
        """The error does not name `labelling_prompt` as a possible prompt.

        In argilla/distilabel-intel-orca-dpo-pairs, this field is the prompt for the model that judged the responses.
        """
        row = {"input": MORE, "labelling_prompt": [ASK], "chosen": TEXT["chosen"], "rejected": TEXT["rejected"]}
        with pytest.raises(
            BadRecord, match="^'input' may be the prompt; set data.columns={prompt: input}, or format: im"
        ):
            FORMATS["auto"](row)
        with pytest.raises(BadRecord, match="^'input' and 'query' may be the prompt; join them as 'prompt', or"):
            FORMATS["auto"]({**row, "query": MORE})

    @pytest.mark.parametrize(
        ("field", "says"),
        [
            (
                {"initial_reason_steps": "Step 1: I count."},
                "^initial_reason_steps is not read; set data.columns={initi",
            ),
            ({"assistant_prefix": "Sure:"}, "^assistant_prefix is not read; set data.columns={assistant_prefix: null}"),
            ({"chosen_thinking": "I count."}, "^chosen_thinking is not read; set data.columns={chosen_thinking: null}"),
            ({"rejected_reasoning": "I count."}, "^rejected_reasoning is not read; set data.columns="),
            (
                {"preamble": "You are brief."},
                "^preamble is not read; set data.columns={system: preamble}, or {preamble",
            ),
            ({"is_tie": True}, "^is_tie is true, so neither response is better; remove the record, or set data."),
        ],
    )
    def test_other_parts_of_a_text_are_refused_by_name(self, field, says):
        """The responses of xinlai/Math-Step-DPO-10K continue the text of the field `initial_reason_steps`."""
        for row in (TEXT, CHAT):
            with pytest.raises(BadRecord, match=says):
                FORMATS["auto"]({**row, **field})
            (name,) = field
            assert FORMATS["auto"]({**row, name: None}) and FORMATS["auto"]({**row, name: ""})

    @pytest.mark.parametrize(
        ("chosen", "rejected", "others"),
        [
            ("response_a", "response_b", ("response_a", "response_b")),
            ("A", " B", ("response_A", "response_B")),
            ("2", "1", ("output_1", "output_2")),
        ],
    )
    def test_labels_in_the_place_of_responses_are_refused(self, chosen, rejected, others):
        row = {"prompt": "2 + 2 =", "chosen": chosen, "rejected": rejected}
        with pytest.raises(BadRecord, match="^chosen and rejected only refer to the fields '.*' and '.*'; write the"):
            FORMATS["auto"]({**row, others[0]: "It is 4.", others[1]: "It is 5."})
        assert FORMATS["auto"]({**row, "id": "4", others[0]: 1})


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
                DataError, match=":1: chosen and rejected are whole dialogues that repeat the prompt; set data.columns="
            ):
                list(read_pairs(path))
            ((_, (pair,)),) = read_pairs(path, "auto", None, {"prompt": None})
            assert pair == Pair(dialogue, " It is 4.", " It is 5.")

    @pytest.mark.parametrize(
        ("prompt", "start"),
        [
            ("Add.", "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n"),
            ("", "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"),
            ("Add.", "<s>[INST] Add. [/INST]"),
            ("### Human: Add.\n### Assistant:", "### Human: Add.\n### Assistant:"),
        ],
    )
    def test_whole_conversations_of_a_template_are_refused(self, prompt, start):
        row = {"prompt": prompt or "Be brief.", "chosen": f"{start} It is 4.", "rejected": f"{start} It is 5."}
        with pytest.raises(
            BadRecord, match="^chosen and rejected are whole dialogues that repeat the prompt; set data.columns="
        ):
            FORMATS["auto"](row)
        assert FORMATS["text"](row) == Pair(**row)

    @pytest.mark.parametrize(
        "header", ["Assistant:", "<|im_start|>assistant\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"]
    )
    def test_a_repeated_header_is_refused(self, header):
        row = {"prompt": f"Add. {header}", "chosen": f"{header} It is 4.", "rejected": f"{header} It is 5."}
        with pytest.raises(BadRecord, match="^responses repeat the end of prompt, '.*'; remove this text from prompt$"):
            FORMATS["auto"](row)
        assert FORMATS["auto"]({**row, "prompt": "Add. "})

    def test_dialogues_that_answer_a_prompt_are_read(self):
        for start in ("Human: Hello", "User: Hello\n\nAssistant: Hello"):
            row = {
                "prompt": "Write a dialogue.",
                "chosen": f"{start}\n\nAssistant: Hi!",
                "rejected": f"{start} you\n\nNo.",
            }
            assert checked(FORMATS["auto"](row)) == Pair(**row)

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
        says = "1 pair whose responses begin with the whole prompt, so the loss also covers this copy of the prompt; if"
        assert report.repeated == 1 and says in str(report)
        report = build(rows[1:], cache="b")[1]
        assert report.repeated == 0 and "begin with" not in str(report)
        row = {"prompt": [ASK], "chosen": json.dumps(ASK), "rejected": "5"}
        assert build([row], cache="c")[1].repeated == 0
