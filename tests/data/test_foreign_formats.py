"""Tests of records in the documented formats of other systems: the detected format, and the resulting pairs.

Each record has the form of an example in the documentation or tests of another system, but its content is invented.
Comments name the files in which the other system defines the meaning of the fields. The records of UltraFeedback
and Anthropic HH are described in the cards of these data sets. The systems' revisions are ColossalAI 4f9953b,
NeMo-Aligner af2b3bd, NeMo-RL 7ea279a, ROLL 8eb27cc, LLaMA-Factory ff6d4d1, ms-swift 3602360, TRL f2cd577 and EasyDeL
090a03b.
"""

import copy
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from dpo_engine.data.formats import FORMATS, BadRecord, Pair, checked, detect, read_pairs, recognize

TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}


def turn(role, content):
    return {"role": role, "content": content}


SYSTEM, ASK = turn("system", "Be brief."), turn("user", "What eats a heron?")
FIRST, MORE = turn("assistant", "Little."), turn("user", "And its eggs?")
EARLIER = [SYSTEM, ASK, FIRST, MORE]
BEST, WORST = "Crows eat the eggs.", "Nothing at all."


def made(name, row):
    """Check that `auto` detects the format `name` for a record, and that the format does not change the record.

    Return the pair, or None if the record is left out.
    """
    before = copy.deepcopy(row)
    assert detect(row) is FORMATS[name]
    pair = FORMATS[name](row)
    assert row == before, "a format must not change its record"
    return pair


def conversation(pair):
    """Check a pair, and return its prompt, its chosen response and its rejected response."""
    pair = checked(pair)
    return [dict(turn) for turn in pair.prompt], pair.chosen, pair.rejected


class TestColossalChat:
    # applications/ColossalChat/examples/README.md "Preference data"; coati/dataset/tokenization_utils.py tokenize_rlhf
    def record(self, **changes):
        context = [{"from": item["role"], "content": item["content"]} for item in EARLIER]
        answers = {"chosen": BEST, "rejected": WORST}
        row = {"context": context} | {k: [{"from": "assistant", "content": v}] for k, v in answers.items()}
        return row | changes

    def test_context_is_the_prompt_and_a_first_system_turn_is_kept(self):
        assert conversation(made("colossalchat", self.record())) == (EARLIER, BEST, WORST)

    def test_one_object_instead_of_a_list(self):
        # The docstring of tokenize_rlhf describes this form.
        row = self.record(chosen={"from": "assistant", "content": BEST}, rejected={"from": "assistant", "content": "-"})
        assert conversation(made("colossalchat", row)) == (EARLIER, BEST, "-")

    def test_a_value_of_the_wrong_type_is_named(self):
        with pytest.raises(BadRecord, match="chosen must be a list of messages, not text"):
            FORMATS["colossalchat"](self.record(chosen=BEST))
        with pytest.raises(BadRecord, match="context.0. must be a message, not text"):
            FORMATS["colossalchat"](self.record(context=["Hi"]))


class TestNemoAligner:
    # docs/user-guide/dpo.rst, "Prepare your Dataset"; nemo_aligner/data/nlp/datasets.py DPOModelDataset.__getitem__
    PROMPT = "<extra_id_0>System\n\n<extra_id_1>User\nWhat eats a heron?\n<extra_id_1>Assistant\n"

    def test_text_is_concatenated_as_it_is(self):
        row = {"prompt": self.PROMPT, "chosen_response": "Little.\n<extra_id_1>", "rejected_response": "All.\n"}
        assert made("nemo_aligner", row) == Pair(self.PROMPT, "Little.\n<extra_id_1>", "All.\n")

    def test_messages_and_rewards(self):
        # nemo_aligner/data/nlp/scripts/undo_special_tokens.py writes this form.
        row = {
            "prompt": [SYSTEM, ASK],
            "chosen_response": turn("assistant", BEST),
            "rejected_response": turn("assistant", WORST),
            "chosen_reward": 4.5,
            "rejected_reward": 1,
        }
        pair = made("nemo_aligner", row)
        assert conversation(pair) == ([SYSTEM, ASK], BEST, WORST)
        assert (pair.chosen_reward, pair.rejected_reward, pair.margin) == (4.5, 1, None)

    def test_text_prompt_before_messages_is_refused(self):
        row = {"prompt": "a", "chosen_response": turn("assistant", "b"), "rejected_response": turn("assistant", "c")}
        with pytest.raises(BadRecord, match="prompt is text, but the responses are messages; make prompt a list"):
            FORMATS["nemo_aligner"](row)


class TestAlpaca:
    # LLaMA-Factory: data/README.md "Preference Dataset"; src/llamafactory/data/converter.py AlpacaDatasetConverter.
    # ROLL: docs_roll/docs/User Guides/Pipeline/dpo_pipeline_start.md "Data Preparation"; dpo_pipeline.py
    def test_roll_example_is_one_user_turn(self):
        row = {"instruction": "Name a color.", "input": "", "chosen": "Grey, like water.", "rejected": "Red"}
        expected = ([turn("user", "Name a color.")], "Grey, like water.", "Red")
        assert conversation(made("alpaca", row)) == expected

    def test_input_follows_the_instruction_on_the_next_line(self):
        row = {"instruction": "Translate.", "input": "Reiher", "chosen": "heron", "rejected": "crane"}
        assert conversation(made("alpaca", row))[0] == [turn("user", "Translate.\nReiher")]
        assert conversation(made("alpaca", row | {"instruction": ""}))[0] == [turn("user", "Reiher")]

    def test_system_history_and_tools(self):
        row = {
            "instruction": MORE["content"],
            "input": None,
            "system": SYSTEM["content"],
            "history": [[ASK["content"], FIRST["content"]]],
            "tools": json.dumps([TOOL["function"]]),
            "chosen": BEST,
            "rejected": WORST,
        }
        pair = made("alpaca", row)
        assert pair.tools == (TOOL,)  # LLaMA-Factory's tool formatter also wraps tools as {type, function}
        assert conversation(pair) == (EARLIER, BEST, WORST)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"instruction": "", "input": ""}, "instruction and input are empty"),
            ({"instruction": 3, "input": ""}, "instruction and input must be text, not a number"),
            ({"history": [["a"]]}, r"history\[0\] must be a list with a user turn and the assistant's answer"),
            ({"history": "a"}, "history must be a list, not text"),
            ({"chosen": ["a"]}, "chosen must be text, not a list"),
        ],
    )
    def test_wrong_fields_are_refused(self, changes, says):
        row = {"instruction": "Name a color.", "chosen": BEST, "rejected": WORST}
        with pytest.raises(BadRecord, match=says):
            FORMATS["alpaca"]({**row, **changes})


class TestOrca:
    # LLaMA-Factory (data/dataset_info.json) and ROLL (mcore_adapter/examples/data/dataset_info.json) register
    # Intel/orca_dpo_pairs with the columns of Alpaca records. ms-swift (dataset_info.json) registers it with a
    # preprocessor for queries and responses. All three systems read the records as chats.
    def test_question_is_a_user_turn_after_the_system_turn(self):
        row = {"system": "Be brief.", "question": ASK["content"], "chosen": BEST, "rejected": WORST}
        assert conversation(made("orca", row)) == ([SYSTEM, ASK], BEST, WORST)

    def test_empty_system_is_no_turn(self):
        row = {"system": "", "question": ASK["content"], "chosen": BEST, "rejected": WORST}
        assert conversation(made("orca", row)) == ([ASK], BEST, WORST)

    def test_responses_that_contain_the_question_are_not_recognized(self):
        row = {"question": "1 + 1 =", "chosen": "1 + 1 = 2", "rejected": "1 + 1 = 3"}
        with pytest.raises(BadRecord, match="'question' may be the prompt.*or format: implicit"):
            detect(row)
        assert checked(FORMATS["implicit"](row)).prompt == "1 + 1 ="

    def test_empty_question_is_an_error(self):
        with pytest.raises(BadRecord, match="question is empty"):
            FORMATS["auto"]({"question": "", "chosen": BEST, "rejected": WORST})

    def test_another_part_of_the_prompt_is_not_left_out(self):
        row = {"context": "Herons fly.", "question": "What flies?", "chosen": BEST, "rejected": WORST}
        with pytest.raises(BadRecord, match="'context' and 'question' may be the prompt; join them as 'prompt'"):
            detect(row)


class TestSharegpt:
    # LLaMA-Factory: data/README.md "Sharegpt Format", src/llamafactory/data/converter.py SharegptDatasetConverter
    @staticmethod
    def said(*turns, names=("human", "gpt")):
        roles = dict(zip(("user", "assistant"), names, strict=True))
        return [{"from": roles.get(item["role"], item["role"]), "value": item["content"]} for item in turns]

    def record(self, **changes):
        row = {
            "conversations": self.said(ASK, FIRST, MORE),
            "chosen": {"from": "gpt", "value": BEST},
            "rejected": {"from": "gpt", "value": WORST},
        }
        return row | changes

    def test_conversations_are_the_prompt(self):
        assert conversation(made("sharegpt", self.record())) == ([ASK, FIRST, MORE], BEST, WORST)

    def test_system_column_and_system_turn(self):
        assert conversation(made("sharegpt", self.record(system="Be brief.")))[0] == EARLIER
        own = self.record(conversations=self.said(*EARLIER))
        assert conversation(made("sharegpt", own))[0] == EARLIER
        assert conversation(made("sharegpt", own | {"system": "Be brief."}))[0] == EARLIER
        with pytest.raises(BadRecord, match="system and the conversation's own system turn differ; keep one of them"):
            FORMATS["sharegpt"](own | {"system": "Be long."})

    def test_openai_tags(self):
        # data/README.md "OpenAI Format": role and content in `messages`
        row = {"messages": [ASK], "chosen": turn("assistant", BEST), "rejected": turn("assistant", WORST)}
        assert conversation(made("sharegpt", row)) == ([ASK], BEST, WORST)

    def test_tool_calls_and_results(self):
        # The value of a function_call turn is the JSON of one call or of a list of calls. The value of an observation
        # turn is the text of the tool's result.
        call = {"name": "tide", "arguments": {"hour": 6}}
        turns = self.said(ASK, turn("function_call", json.dumps(call)), turn("observation", "high"))
        pair = made("sharegpt", self.record(conversations=turns, tools=json.dumps([TOOL["function"]])))
        calls = [{"type": "function", "function": call}]
        assert pair.tools == (TOOL,)
        assert pair.prompt == [
            ASK,
            {"role": "assistant", "content": "", "tool_calls": calls},
            turn("tool", "high"),
        ]
        chosen = {"from": "function_call", "value": json.dumps([call, call])}
        assert FORMATS["sharegpt"](self.record(chosen=chosen)).chosen == [
            {"role": "assistant", "content": "", "tool_calls": calls * 2}
        ]

    def test_a_call_after_words_of_the_assistant_joins_its_turn(self):
        call = {"from": "function_call", "value": json.dumps({"name": "tide", "arguments": {}}), "weight": 0}
        words = {"from": "gpt", "value": "Wait.", "weight": 0}
        turns = [*self.said(ASK), words, call, {"from": "observation", "value": "high"}]
        calls = [{"type": "function", "function": {"name": "tide", "arguments": {}}}]
        pair = FORMATS["sharegpt"](self.record(conversations=turns))
        assert pair.prompt[1] == {"role": "assistant", "content": "Wait.", "weight": 0, "tool_calls": calls}
        turns[1] = {**words, "weight": 1}
        with pytest.raises(BadRecord, match=r"conversations\[2\].weight differs from the value in the preceding"):
            FORMATS["sharegpt"](self.record(conversations=turns))

    @pytest.mark.parametrize(
        ("value", "says"),
        [
            ("tide()", "is text, but not JSON"),
            ("[1]", "must be a tool call as JSON, with a name and optional arguments"),
            ("{}", "must be a tool call as JSON, with a name and optional arguments"),
        ],
    )
    def test_a_value_that_is_not_a_tool_call_is_refused(self, value, says):
        with pytest.raises(BadRecord, match=rf"^chosen\[0\] {says}"):
            FORMATS["sharegpt"](self.record(chosen={"from": "function_call", "value": value}))

    def test_whole_conversations_of_easydel(self):
        # EasyDeL: easydel/trainers/prompt_transforms.py DPOPreprocessTransform, maybe_convert_to_chatml
        row = {
            "chosen": self.said(*EARLIER, turn("assistant", BEST)),
            "rejected": self.said(*EARLIER, turn("assistant", WORST)),
        }
        assert conversation(made("sharegpt", row)) == (EARLIER, BEST, WORST)


class TestSwift:
    # docs/source_en/Customization/Custom-dataset.md "DPO/ORPO/CPO/SimPO/RM"; swift/dataset/preprocessor/core.py;
    # swift/template/template_inputs.py TemplateInputs
    def record(self, **changes):
        return {"messages": [*EARLIER, turn("assistant", BEST)], "rejected_response": WORST} | changes

    def test_rejected_response_replaces_what_follows_the_last_user_turn(self):
        assert conversation(made("swift", self.record())) == (EARLIER, BEST, WORST)
        listed = self.record(rejected_response=[turn("assistant", WORST)])
        assert conversation(made("swift", listed)) == (EARLIER, BEST, WORST)

    def test_rejected_messages_are_a_whole_conversation(self):
        row = self.record(rejected_messages=[*EARLIER, turn("assistant", WORST)])
        del row["rejected_response"]
        assert conversation(made("swift", row)) == (EARLIER, BEST, WORST)

    def test_margin_system_and_template_options(self):
        row = self.record(messages=[ASK, turn("assistant", BEST)], system="Be brief.", margin=2.0)
        row["chat_template_kwargs"] = {"enable_thinking": False}
        pair = made("swift", row)
        assert (pair.margin, pair.template_options) == (2.0, {"enable_thinking": False})
        assert conversation(pair)[0] == [SYSTEM, ASK]

    def test_agent_record(self):
        # "You can also organize the Agent dataset in the following format"
        calls = [{"name": "tide", "arguments": {"city": city}} for city in ("Hull", "Deal")]
        row = {
            "tools": json.dumps([TOOL]),
            "messages": [
                ASK,
                *(turn("tool_call", json.dumps(call)) for call in calls),
                turn("tool_response", "low"),
                turn("tool_response", "high"),
                turn("assistant", BEST),
            ],
            "rejected_response": [turn("assistant", WORST)],
        }
        pair = made("swift", row)
        wrapped = [{"type": "function", "function": call} for call in calls]
        assert pair.tools == (TOOL,) and pair.prompt == [ASK]
        assert pair.chosen == [
            {"role": "assistant", "content": "", "tool_calls": wrapped},
            turn("tool", "low"),
            turn("tool", "high"),
            turn("assistant", BEST),
        ]
        assert pair.rejected == [turn("assistant", WORST)]

    def test_prompt_may_end_with_a_turn_of_the_role_tool(self):
        # swift/template/utils.py get_last_user_round counts `tool` turns, but not `tool_response` turns, as user turns.
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "tide", "arguments": {}}}]}
        row = self.record(messages=[ASK, call, turn("tool", "low"), turn("assistant", BEST)])
        pair = made("swift", row)
        assert pair.prompt == [ASK, call, turn("tool", "low")] and pair.chosen == [turn("assistant", BEST)]

    def test_query_and_response(self):
        # "Query-Response format" and "Alpaca format", with a rejected response
        row = {
            "system": "Be brief.",
            "query": MORE["content"],
            "response": BEST,
            "history": [[ASK["content"], FIRST["content"]]],
            "rejected_response": WORST,
        }
        assert conversation(made("swift", row)) == (EARLIER, BEST, WORST)
        row = {"instruction": "Translate.", "input": "Reiher", "output": "heron", "rejected_response": "crane"}
        assert conversation(made("swift", row)) == ([turn("user", "Translate.\nReiher")], "heron", "crane")

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            (
                {"messages": [turn("assistant", BEST)]},
                "messages must have a user turn, and the chosen response must follow the last user or tool turn",
            ),
            (
                {"messages": EARLIER},
                "messages must have a user turn, and the chosen response must follow the last user or tool turn",
            ),
            ({"rejected_response": [MORE, FIRST]}, "rejected_response has a user turn; give .* as rejected_messages"),
            ({"rejected_response": None}, "rejected_response must be text or a list of messages, not null"),
            ({"rejected_tools": [TOOL]}, "rejected_tools differ from tools; both responses must have the same tools"),
            ({"objects": {"ref": ["a"]}}, "objects: only text is supported"),
            ({"rejected_objects": {"ref": ["a"]}}, "set data.columns={rejected_objects: null.* to leave it out"),
            ({"rejected_images": ["a.png"]}, "rejected_images: only text is supported"),
        ],
    )
    def test_records_that_cannot_keep_their_meaning_are_refused(self, changes, says):
        with pytest.raises(BadRecord, match=says):
            FORMATS["swift"](self.record(**changes))


class TestNemoRl:
    # docs/guides/dpo.md "Datasets"; nemo_rl/data/processors.py preference_preprocessor
    def record(self, *ranks, **changes):
        responses = [[turn("assistant", text)] for text in (BEST, WORST)]
        completions = [{"rank": rank, "completion": part} for rank, part in zip(ranks, responses, strict=True)]
        return {"context": EARLIER, "completions": completions, "task_name": "birds"} | changes

    def test_lower_rank_is_chosen(self):
        assert conversation(made("nemo_rl", self.record(0, 1))) == (EARLIER, BEST, WORST)
        assert conversation(made("nemo_rl", self.record(2, 1))) == (EARLIER, WORST, BEST)

    def test_equal_ranks_are_left_out(self):
        assert made("nemo_rl", self.record(1, 1)) is None

    def test_other_records_are_refused(self):
        with pytest.raises(
            BadRecord, match="completions must have 2 items, not 0; for more items, use the format ranked"
        ):
            FORMATS["nemo_rl"](self.record(0, 1, completions=[]))
        with pytest.raises(BadRecord, match=r"completions\[1\] must be an object with rank and completion"):
            FORMATS["nemo_rl"](self.record(0, 1, completions=[self.record(0, 1)["completions"][0], {"rank": 1}]))
        with pytest.raises(BadRecord, match=r"completions\[0\].rank must be a number, not null"):
            FORMATS["nemo_rl"](self.record(None, 1))

    def test_binary_preference_data_set(self):
        # nemo_rl/data/datasets/preference_datasets/binary_preference_dataset.py makes the prompt a user turn. TRL and
        # `auto` read the same record as plain text. With the format `messages`, the prompt is a user turn.
        row = {"prompt": ASK["content"], "chosen": BEST, "rejected": WORST}
        assert conversation(FORMATS["messages"](row)) == ([ASK], BEST, WORST)
        assert checked(FORMATS["auto"](row)) == Pair(ASK["content"], BEST, WORST)

    def test_tulu_3(self):
        # nemo_rl/data/datasets/preference_datasets/tulu3.py: whole conversations that differ in their last turn
        row = {name: [*EARLIER, turn("assistant", text)] for name, text in (("chosen", BEST), ("rejected", WORST))}
        assert conversation(made("messages", row | {"source": "birds", "id": "a1"})) == (EARLIER, BEST, WORST)


class TestHelpSteer3:
    # nemo_rl/data/datasets/preference_datasets/helpsteer3.py
    def record(self, preference, context=EARLIER):
        return {
            "domain": "general",
            "language": "english",
            "context": context,
            "response1": BEST,
            "response2": WORST,
            "overall_preference": preference,
            "individual_preference": [{"score": preference, "reasoning": "Response 1 is right.", "feedback1": "Good."}],
        }

    def test_negative_preference_chooses_the_first_response(self):
        pair = made("helpsteer3", self.record(-3))
        assert conversation(pair) == (EARLIER, BEST, WORST) and pair.margin == 3

    def test_positive_preference_chooses_the_second_response(self):
        pair = made("helpsteer3", self.record(1, context=ASK["content"]))
        assert conversation(pair) == ([ASK], WORST, BEST) and pair.margin == 1

    def test_a_record_without_a_preference_is_left_out(self):
        assert made("helpsteer3", self.record(0)) is None

    def test_preference_that_is_not_a_number_is_refused(self):
        with pytest.raises(BadRecord, match="overall_preference must be a number, not text"):
            FORMATS["helpsteer3"](self.record("left"))


class TestTrl:
    # docs/source/dataset_formats.md "Preference" and "Tool Calling"; trl/trainer/dpo_trainer.py tokenize_fn
    def test_explicit_and_implicit_prompts(self):
        from trl import extract_prompt

        whole = {name: [*EARLIER, turn("assistant", text)] for name, text in (("chosen", BEST), ("rejected", WORST))}
        theirs = extract_prompt(whole)
        expected = (theirs["prompt"], theirs["chosen"][0]["content"], theirs["rejected"][0]["content"])
        assert conversation(made("messages", whole)) == conversation(made("messages", theirs)) == expected
        row = {"prompt": "The sky is", "chosen": " grey.", "rejected": " pink."}
        assert made("text", row) == Pair("The sky is", " grey.", " pink.")

    @pytest.mark.parametrize("as_json", [False, True])
    def test_tools_and_template_options(self, as_json):
        row = {
            "prompt": [ASK],
            "chosen": [turn("assistant", BEST)],
            "rejected": [turn("assistant", WORST)],
            "tools": json.dumps([TOOL]) if as_json else [TOOL],
            "chat_template_kwargs": {"enable_thinking": False},
        }
        pair = made("messages", row)
        assert pair.tools == (TOOL,) and pair.template_options == {"enable_thinking": False}

    def test_tool_calls_in_the_prompt_are_kept(self):
        calls = [{"type": "function", "function": {"name": "light", "arguments": {"state": "on"}}}]
        prompt = [ASK, {"role": "assistant", "tool_calls": calls}, {**turn("tool", "on"), "name": "light"}]
        row = {"prompt": prompt, "chosen": [turn("assistant", BEST)], "rejected": [turn("assistant", WORST)]}
        assert made("messages", row).prompt == prompt


class TestUltraFeedback:
    # EasyDeL's docs/trainers/dpo.md and TRL use HuggingFaceH4/ultrafeedback_binarized. The fields are described in the
    # data set's card. An annotator gave each response its score, so the engine reads the scores as rewards.
    ROW = {
        "prompt": ASK["content"],
        "prompt_id": "f0e37e9f",
        "chosen": [ASK, turn("assistant", BEST)],
        "rejected": [ASK, turn("assistant", WORST)],
        "messages": [ASK, turn("assistant", BEST)],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    }

    def test_scores_are_rewards(self):
        pair = made("messages", self.ROW)
        assert conversation(pair) == ([ASK], BEST, WORST)
        assert (pair.chosen_reward, pair.rejected_reward, pair.margin) == (8.5, 3.0, None)

    @pytest.mark.parametrize("score", [None, "high", float("nan"), True])
    def test_scores_that_are_not_numbers_are_ignored(self, score):
        assert made("messages", {**self.ROW, "score_chosen": score}).chosen_reward is None

    def test_scores_that_are_too_large_are_refused(self):
        with pytest.raises(BadRecord, match="score_chosen must be a finite number, not 10000"):
            FORMATS["messages"]({**self.ROW, "score_chosen": 10**400})

    def test_a_second_reward_must_agree(self):
        with pytest.raises(BadRecord, match="score_chosen and chosen_reward differ; keep one of them"):
            FORMATS["messages"]({**self.ROW, "chosen_reward": 1.0})


def test_anthropic_hh():
    # The data set's card describes the form of its records. ms-swift reads these records with HHRLHFPreprocessor
    # (swift/dataset/dataset/llm.py), which splits the text into turns. The engine keeps the text as it is.
    start = "\n\nHuman: What eats a heron?\n\nAssistant:"
    row = {"chosen": f"{start} {BEST}", "rejected": f"{start} {WORST}"}
    assert made("hh", row) == Pair(start, f" {BEST}", f" {WORST}")


def test_records_are_read_from_json_lines_and_parquet(tmp_path):
    """JSON lines and Parquet files give the same pairs, even if fields are null or empty, as is usual in tables."""
    rows = {
        "colossalchat": TestColossalChat().record(),
        "sharegpt": TestSharegpt().record(system=None),
        "swift": TestSwift().record(tools="[]", images=[], rejected_messages=None),
        "nemo_rl": TestNemoRl().record(0, 1),
        "helpsteer3": TestHelpSteer3().record(-2),
        "messages": TestUltraFeedback.ROW,
    }
    for name, row in rows.items():
        json_file, table = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.parquet"
        json_file.write_text(json.dumps(row) + "\n")
        pa.parquet.write_table(pa.Table.from_pylist([row]), table)
        (one,) = (pair for _, pairs in read_pairs(json_file) for pair in pairs)
        (other,) = (pair for _, pairs in read_pairs(table) for pair in pairs)
        assert one == other and (one.chosen, one.rejected) == (BEST, WORST)
        assert recognize(table, "auto", None, skip=False)[0] == name
